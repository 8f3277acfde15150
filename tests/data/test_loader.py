"""Batches: the same whatever decodes them, resumable by step, one part to each host."""

import dataclasses
import io
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from grids import exhaustive, grid
from PIL import Image

from clipmoe_jax.data.loader import CaptionTurns, DecodedPairs, StreamedPairs, batches
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.samplers import Shares, ShuffledSampler
from clipmoe_jax.data.sources import Pair
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.models.inputs import END_ID

NUM_PAIRS, SIZE, LENGTH = 22, 16, 8
COLORS = ("red", "green", "blue")


class Turns:
    """Of samplers that draw every record once an epoch."""

    def times_before(self, step, first_epoch=0):
        return np.full(self.global_batch, first_epoch + step // self.num_steps)


@dataclasses.dataclass
class Shuffled(Turns):
    """A permutation an epoch; the last batch of one is padded."""

    global_batch: int = 4
    num_steps: int = 6  # 22 pairs fill 5 batches and half of the sixth

    def indices(self, step):
        epoch, step = divmod(step, self.num_steps)
        order = np.random.default_rng(epoch).permutation(NUM_PAIRS)
        order = np.pad(order, (0, 2), constant_values=-1)
        return order[step * self.global_batch :][: self.global_batch]


TURNS = CaptionTurns(5)


@dataclasses.dataclass
class InOrder(Turns):
    """Records 0, 1, … each epoch."""

    global_batch: int
    num_steps: int

    def indices(self, step):
        return np.arange(self.global_batch) + step % self.num_steps * self.global_batch


def make_pair(i):
    """Pair i has 1 + i % 3 captions: "red i", "green i", "blue i"."""
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    captions = tuple(f"{color} {i}" for color in COLORS[: 1 + i % 3])
    return Pair(str(i), file.getvalue(), captions)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "out"
    prepare([make_pair(i) for i in range(NUM_PAIRS)], str(out))
    return Records(str(out))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(LENGTH)


@pytest.fixture(scope="module")
def streamed(records, tokenizer):
    return StreamedPairs(records, tokenizer, SIZE)


@pytest.fixture(scope="module")
def decoded(records, tokenizer):
    return DecodedPairs(records, tokenizer, SIZE)


def take(pairs, sampler=None, *, num_steps=13, caption_turns=TURNS, **options):
    options = {"start_step": 0, "num_steps": num_steps, "caption_turns": caption_turns, **options}
    with batches(pairs, sampler or Shuffled(), **options) as iterator:
        return list(iterator)


def assert_same(batches_a, batches_b):
    assert len(batches_a) == len(batches_b)
    for a, b in zip(batches_a, batches_b, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
            assert a[name].dtype == b[name].dtype


def test_a_batch_by_hand(streamed, tokenizer):
    first, *_, last_of_epoch = take(streamed, num_steps=6, caption_turns=None)
    assert {name: (array.shape, array.dtype.name) for name, array in first.items()} == {
        "image": ((4, SIZE, SIZE, 3), "uint8"),
        "text": ((4, LENGTH), "int32"),
        "index": ((4,), "int64"),
        "valid": ((4,), "bool"),
    }
    np.testing.assert_array_equal(first["index"], Shuffled().indices(0))
    for row, i in enumerate(first["index"]):
        pixels = preprocess_image(make_pair(i).image, SIZE)
        np.testing.assert_array_equal(first["image"][row], pixels)
        np.testing.assert_array_equal(first["text"][row], tokenizer(f"red {i}")[0])
    assert last_of_epoch["valid"].tolist() == [True, True, False, False]
    assert last_of_epoch["index"][2:].tolist() == [-1, -1]
    assert not last_of_epoch["image"][2:].any() and not last_of_epoch["text"][2:].any()
    assert last_of_epoch["image"][:2].any()


@pytest.fixture(scope="module")
def long_records(tmp_path_factory):
    """12 records whose longest captions have so many words (start and end come to them); the first have 1."""
    counts = [3, 4, 9, 2, 3, 20, 1, 1, 1, 1, 2, 3]
    texts = [tuple(" ".join(["a"] * n) for n in (1, count)) for count in counts]
    out = tmp_path_factory.mktemp("long") / "out"
    prepare([make_pair(i)._replace(captions=texts[i]) for i in range(12)], str(out))
    return Records(str(out))


class ThreeSteps(Turns):
    """Two shards of three pairs; the last step has two pairs."""

    global_batch, num_steps = 6, 3

    def indices(self, step):
        return np.array([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [0, 11, -1, -1, -1, -1]][step % 3])


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    grid((StreamedPairs, 0), (DecodedPairs, 0), rest=[(StreamedPairs, 1)]),
    ids=["streamed", "decoded", "worker process"],
)
def test_captions_that_share_rows_are_the_same_captions(kind, num_workers, long_records):
    """Two hosts with a shard each give the tokens of one caption a row, in as few rows as can be."""
    tokenizer, sampler = Tokenizer(13), ThreeSteps()
    plain = take(kind(long_records, tokenizer, SIZE), sampler, num_steps=6)
    packed = [
        take(
            kind(long_records, tokenizer, SIZE, packs=True),
            sampler,
            num_steps=6,
            process_index=host,
            process_count=2,
            num_text_shards=2,
            num_workers=num_workers,
            rows=(1, 2),
        )
        for host in (0, 1)
    ]
    # Lengths 5, 6, 11 take two rows of 13 (11; 6 + 5), and 4, 5, 13 do; 3, 3, 3 and 3, 4, 5 take one, as
    # 5, 5 and nothing. They are those of the longest captions, in the first epoch too, where all have 3.
    assert [batch["text"].tokens.shape for batch in packed[0]] == [(2, 13), (1, 13), (1, 13)] * 2
    for whole, *parts in zip(plain, *packed, strict=True):
        for host, part in enumerate(parts):
            text, mine = part["text"], slice(3 * host, 3 * host + 3)
            np.testing.assert_array_equal(part["index"], whole["index"][mine])
            assert all(type(array) is np.ndarray and array.dtype == np.int32 for array in text)
            assert text.tokens.shape == parts[0]["text"].tokens.shape
            tokens, segments = text.tokens.reshape(-1), text.segments.reshape(-1)
            assert not tokens[segments == 0].any()
            for caption, end, valid in zip(whole["text"][mine], text.ends, part["valid"], strict=True):
                length = np.argmax(caption == END_ID) + 1
                if not valid:
                    assert end == 0
                    continue
                here = slice(end + 1 - length, end + 1)
                np.testing.assert_array_equal(tokens[here], caption[:length])
                assert np.ptp(segments[here]) == 0 and segments[end] > 0
            own = [np.argmax(row == END_ID) + 1 for row in whole["text"][mine][part["valid"]]]
            assert np.count_nonzero(segments) == sum(own)


def test_pairs_are_packed_only_where_both_sides_ask(long_records):
    pairs = {packs: DecodedPairs(long_records, Tokenizer(13), SIZE, packs) for packs in (False, True)}
    for packs, num_text_shards in ((False, 2), (True, 0)):
        options = {"num_text_shards": num_text_shards, "caption_turns": None}
        (batch,) = take(pairs[packs], InOrder(6, 2), num_steps=1, **options)
        np.testing.assert_array_equal(batch["text"], pairs[0].gather(np.arange(6))["text"])


@pytest.mark.parametrize(("num_text_shards", "process_count"), [(4, 1), (3, 2)])
def test_shards_must_divide_the_batch_and_hosts_the_shards(long_records, num_text_shards, process_count):
    pairs = DecodedPairs(long_records, Tokenizer(13), SIZE, packs=True)
    with pytest.raises(
        ValueError, match=f"batch of 6 in {num_text_shards} shards of {process_count} processes"
    ):
        take(pairs, InOrder(6, 2), num_text_shards=num_text_shards, process_count=process_count)


@pytest.mark.parametrize("pixels", [None, SIZE], ids=["files", "pixels"])
def test_short_captions_are_first_sentences_of_the_same_captions(tmp_path, pixels, tokenizer):
    captions = [("red 0. it is big.", "blue 0? so"), ("green\nof 1",), ("black 2.5 m",), ("white",)]
    pairs = [make_pair(i)._replace(captions=captions[i]) for i in range(4)]
    prepare(pairs, str(tmp_path / "out"), pixels=pixels)
    for kind in (StreamedPairs, DecodedPairs) if pixels is None else (StreamedPairs,):
        found = kind(Records(str(tmp_path / "out")), tokenizer, SIZE, short_captions=True)
        for turn, first in ((0, "red 0."), (1, "blue 0?")):
            batch = found.gather(np.arange(4), np.full(4, turn, np.uint64))
            np.testing.assert_array_equal(
                batch["short_text"], tokenizer([first, "green", "black 2.5 m", "white"])
            )


@pytest.mark.parametrize("kind", ["streamed", "decoded"])
def test_each_caption_of_a_record_has_its_turn_once_before_any_has_it_again(kind, request, tokenizer):
    """Over two phases: three epochs and another three, which begin where those end."""
    pairs, sampler = request.getfixturevalue(kind), Shuffled()
    shown = {i: [] for i in range(NUM_PAIRS)}
    for first_epoch in (0, 3):
        turns = CaptionTurns(5, first_epoch)
        for batch in take(pairs, num_steps=3 * sampler.num_steps, caption_turns=turns):
            for i, text in zip(batch["index"][batch["valid"]], batch["text"], strict=False):
                texts = [tokenizer(caption)[0].tolist() for caption in make_pair(int(i)).captions]
                shown[int(i)].append(texts.index(text.tolist()))
    for i, numbers in shown.items():
        n = len(make_pair(i).captions)
        assert len(numbers) == 6
        assert numbers[n:] == numbers[:-n] and sorted(numbers[:n]) == list(range(n))


@pytest.mark.parametrize("kind", ["streamed", "decoded"])
def test_record_that_comes_often_in_an_epoch_shows_each_caption_as_often(kind, request, tokenizer):
    """To one time, in two processes that resume in the middle of an epoch."""
    pairs, sampler = request.getfixturevalue(kind), ShuffledSampler(NUM_PAIRS, 2, 0, Shares([4, 18], [1, 1]))
    shown = {i: [] for i in range(NUM_PAIRS)}
    for first, last in ((0, 5), (5, 33)):
        for process in range(2):
            options = {"start_step": first, "process_index": process, "process_count": 2}
            for batch in take(pairs, sampler, num_steps=last - first, **options):
                texts = [tokenizer(caption)[0].tolist() for caption in make_pair(batch["index"][0]).captions]
                shown[int(batch["index"][0])].append(texts.index(batch["text"][0].tolist()))
    for i, numbers in shown.items():
        assert np.ptp(np.bincount(numbers, minlength=len(make_pair(i).captions))) <= 1
    assert min(len(shown[i]) for i in range(4)) == 8


def test_one_epoch_shows_captions_of_every_number():
    """As the paper's phases have it, in which a caption of number 0 alone would be shown."""
    turns = TURNS(np.arange(3000), np.zeros(3000, int)) % np.uint64(5)
    assert np.abs(np.bincount(turns.astype(np.int64), minlength=5) - 600).max() < 100
    assert (CaptionTurns(6)(np.arange(3000), np.zeros(3000, int)) % np.uint64(5) != turns).mean() > 0.7


@pytest.mark.parametrize("kind", ["streamed", "decoded"])
def test_without_turns_every_record_shows_its_first_caption(kind, request, tokenizer):
    """For embedding and evaluation, in any epoch."""
    for batch in take(request.getfixturevalue(kind), num_steps=10, caption_turns=None):
        for i, text in zip(batch["index"][batch["valid"]], batch["text"], strict=False):
            np.testing.assert_array_equal(text, tokenizer(f"red {i}")[0])


def test_in_memory_equals_streamed(streamed, decoded):
    assert len(streamed) == len(decoded) == NUM_PAIRS
    assert_same(take(decoded), take(streamed))


def test_worker_processes_change_nothing(streamed):
    with_workers = take(streamed, num_workers=2)
    assert_same(with_workers, take(streamed))
    assert all(type(array) is np.ndarray for batch in with_workers for array in batch.values())


def test_resumes_at_any_step(streamed, decoded):
    whole = take(streamed)
    assert_same(take(streamed, start_step=5, num_steps=8), whole[5:])  # across an epoch's end
    assert_same(take(decoded, start_step=9, num_steps=4), whole[9:])
    assert take(streamed, num_steps=0) == []


@pytest.mark.parametrize("kind", ["streamed", "decoded"])
def test_hosts_join_to_the_global_batch(kind, request):
    pairs = request.getfixturevalue(kind)
    hosts = [take(pairs, process_index=p, process_count=2) for p in (0, 1)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*hosts, strict=True)]
    assert_same(joined, take(pairs))


def test_hosts_must_divide_the_batch(decoded):
    with pytest.raises(ValueError, match="batch of 4 does not divide among 3 processes"):
        take(decoded, process_count=3)


def test_a_closed_iterator_gives_up_its_workers(streamed):
    before = multiprocessing.active_children()
    with batches(streamed, Shuffled(), start_step=0, num_steps=1000, num_workers=1) as iterator:
        next(iterator)
        assert len(multiprocessing.active_children()) == len(before) + 1
    assert multiprocessing.active_children() == before


SCRIPT = """
import sys
import numpy as np
from clipmoe_jax.data.loader import StreamedPairs, batches
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer

class InOrder:
    global_batch, num_steps = 4, 5

    def indices(self, step):
        return np.arange(4) + 4 * step

if __name__ == "__main__":
    pairs = StreamedPairs(Records(sys.argv[1]), Tokenizer(8), 16)
    with batches(pairs, InOrder(), start_step=0, num_steps=5, num_workers=2) as iterator:
        for batch in iterator:
            print(*batch["index"], end=" ")
"""


@exhaustive
def test_a_script_with_workers_ends_without_complaint(records, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", records.path],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(i) for i in range(20)]
    assert done.stderr == ""  # no leaked shared memory, no flags that nobody parsed


@dataclasses.dataclass
class Damaged:
    """Records whose pair 7 has lost half of its image."""

    records: Records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        if index == 7:
            record["image"] = record["image"][: len(record["image"]) // 2]
        return record


def test_an_unreadable_record_is_named(records, tokenizer):
    message = r"record 7 \('7'\) has an image that does not decode, .*truncated"
    with pytest.raises(ValueError, match=message):
        take(StreamedPairs(Damaged(records), tokenizer, SIZE))
    with pytest.raises(ValueError, match=message):
        DecodedPairs(Damaged(records), tokenizer, SIZE)


def test_slice_longer_than_the_data_set_is_refused(scenes):
    with pytest.raises(ValueError, match=r"has no split 'train\[:97\]': choose train .96 records."):
        Records(scenes, "train[:97]")
