"""From record indices to batches of numpy arrays, in an order that only the step decides.

Axis letters: N records, B pairs of a batch on this host, H, W image height and width, L context
length, R rows of packed text.

`StreamedPairs` reads and decodes what a batch needs; `DecodedPairs` decodes the whole data set once and keeps
it in memory. `batches` takes either and gives the same arrays.

Text has a caption in each row, or, with `packs` and `num_text_shards`, several (data/packing.py). The number
of rows must be the same in every process. So each process places all captions of the global batch, by the
length of each record's longest caption, which leaves room for whichever has its turn.

With `short_captions` there is also "short_text", int32 (B, L'): the first sentence of each caption, for
`losses.short_caption_loss`.

Captions of a record take turns (`CaptionTurns`): training sees each as often as the others.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from clipmoe_jax.core import cli, distributed, metrics
from clipmoe_jax.core.terminal import reading
from clipmoe_jax.data.decoding import map_decoding, num_cores
from clipmoe_jax.data.packing import Places, pack, place_captions, row_numbers, with_room
from clipmoe_jax.data.permutation import make_key
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.records import Records, check_stored_size
from clipmoe_jax.data.tokenizer import Tokenizer, first_sentence
from clipmoe_jax.models.inputs import END_ID, PackedText

Batch = dict[str, np.ndarray | PackedText]

# L', or the context length where that is less: longer first sentences lose their last words.
SHORT_LENGTH = 64
SAMPLED_STEPS = 32  # whose captions tell how many rows batches need


class Sampler(Protocol):
    """Which records a step uses: a pure function of the step.

    Attributes:
        global_batch: rows of a batch over all hosts.
        num_steps: steps of one epoch.
    """

    global_batch: int
    num_steps: int

    def indices(self, step: int) -> np.ndarray:
        """Returns int64 (global_batch,): record indices, -1 for padding. Steps count on over epochs."""
        ...

    def times_before(self, step: int, first_epoch: int = 0) -> np.ndarray:
        """Returns int64 (global_batch,): how often each of a step's records had its turn before.

        Once an epoch, or as often as `Shares` say. first_epoch: how many epochs were before step 0.
        """
        ...

    def origin(self, step: int) -> str:
        """Describes where a step's records come from."""
        ...


@dataclasses.dataclass(frozen=True)
class CaptionTurns:
    """The turns of a record's n captions: after t times it shows number (hash(seed, record) + t) mod n.

    A record that comes n times shows each of its n captions once, and records differ in whose turn it is, so
    that a single epoch sees captions of every number. Without `Shares` t is the epoch.

    Attributes:
        seed: of the hash.
        first_epoch: how many epochs of the same records came before step 0, in earlier phases, as
            `Sampler.times_before` counts them.
    """

    seed: int
    first_epoch: int = 0

    def __call__(self, indices: np.ndarray, times_before: np.ndarray) -> np.ndarray:
        """Returns uint64 (B,): each record's turn, whose remainder by n is the caption's number.

        indices: int (B,), records. times_before: int (B,), how often each came before.
        """
        hashes = make_key(self.seed, indices) >> np.uint64(1)  # so that sums never overflow
        return hashes + times_before.astype(np.uint64)


@dataclasses.dataclass(frozen=True)
class StreamedPairs:
    """Pairs that are read and decoded each time they are used.

    Attributes:
        records: the data set.
        tokenizer: of captions.
        image_size: of the decoded images.
        packs: whether captions may share rows.
        short_captions: whether batches have "short_text".
        num_threads: that decode, in all.
    """

    records: Records
    tokenizer: Tokenizer
    image_size: int
    packs: bool = False
    short_captions: bool = False
    num_threads: int = num_cores()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def context_length(self) -> int:
        """Returns L, the tokens of a row."""
        return self.tokenizer.context_length

    def caption_lengths(self, indices: np.ndarray) -> np.ndarray:
        """Returns int64 (B,): tokens of each record's longest caption, L at most; 0 where the index is -1."""
        return _caption_lengths(self.records.token_counts, indices, self.context_length)

    def gather(self, indices: np.ndarray, turns: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Decodes some pairs, each with the caption whose turn it is.

        Args:
            indices: int (B,), records; -1 gives zeros.
            turns: uint64 (B,), of `CaptionTurns`; None gives each record's first caption.

        Returns:
            "image" uint8 (B, H, W, 3), "text" int32 (B, L) and with short_captions "short_text".

        Raises:
            ValueError: an image that does not decode, by record id and index.
        """
        image = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        text = np.zeros((len(indices), self.tokenizer.context_length), np.int32)
        shorten = _short_tokenizer(self.tokenizer)
        short_text = np.zeros((len(indices), shorten.context_length), np.int32)
        turns = np.zeros(len(indices), np.uint64) if turns is None else turns

        def fill(row: int) -> None:
            if indices[row] < 0:
                image[row] = 0
                return
            record = self.records[indices[row]]
            turn = int(turns[row]) % len(record["captions"])
            image[row] = decode(record, indices[row], self.image_size)
            if "tokens" in record:
                self.tokenizer.fill(text[row], record["tokens"][turn])
            else:
                text[row] = self.tokenizer(record["captions"][turn])[0]
            if self.short_captions:
                short_text[row] = shorten(first_sentence(record["captions"][turn]))[0]

        def fill_some(rows: np.ndarray) -> None:
            for row in rows:
                fill(row)

        # A few rows at a time: to hand over a single one takes as long as to copy stored pixels.
        parts = np.array_split(np.arange(len(indices)), min(len(indices), 4 * self.num_threads))
        list(_threads(self.num_threads).map(fill_some, parts))  # waits for all, raises the first error
        batch = {"image": image, "text": text}
        return batch | {"short_text": short_text} if self.short_captions else batch


class DecodedPairs:
    """Pairs that are decoded once and held in memory, for data sets that are small and read often.

    Takes N·H·W·3 bytes for the images and 4·L for each caption.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: Tokenizer,
        image_size: int,
        packs: bool = False,
        short_captions: bool = False,
    ):
        """Decodes everything, with a progress bar if it takes more than two seconds.

        Args: as for `StreamedPairs`.

        Raises:
            ValueError: an image that does not decode, by record id and index.
        """
        self._image = np.empty((len(records), image_size, image_size, 3), np.uint8)

        def fill(index: int) -> list[str]:
            record = records[index]
            self._image[index] = decode(record, index, image_size)
            return record["captions"]

        captions = []
        with metrics.progress_bar("decoding", len(records), "image", delay=2) as progress:
            for of_one in map_decoding(fill, range(len(records))):
                captions.append(of_one)
                progress.update()
        self._num_captions = np.array([len(of_one) for of_one in captions])  # (N,)
        self._first_caption = np.cumsum(self._num_captions) - self._num_captions  # (N,) in _text
        captions = [caption for of_one in captions for caption in of_one]
        self._text, self._short_text = tokenizer(captions), None
        if short_captions:
            self._short_text = _short_tokenizer(tokenizer)([first_sentence(caption) for caption in captions])
        lengths = _lengths(self._text)
        self._longest = np.maximum.reduceat(lengths, self._first_caption)  # (N,) of a record's captions
        self.packs, self.context_length = packs, tokenizer.context_length

    def __len__(self) -> int:
        return len(self._image)

    def caption_lengths(self, indices: np.ndarray) -> np.ndarray:
        """Returns the same as `StreamedPairs.caption_lengths`."""
        return _caption_lengths(self._longest, indices, self.context_length)

    def gather(self, indices: np.ndarray, turns: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns the same as `StreamedPairs.gather`; raises nothing."""
        captions = self._first_caption[indices]
        if turns is not None:
            captions = captions + (turns % self._num_captions[indices].astype(np.uint64)).astype(np.int64)
        batch = {"image": self._image[indices], "text": self._text[captions]}
        if self._short_text is not None:
            batch["short_text"] = self._short_text[captions]
        for array in batch.values():
            array[indices < 0] = 0
        return batch


Pairs = StreamedPairs | DecodedPairs


@contextlib.contextmanager
def batches(
    pairs: Pairs,
    sampler: Sampler,
    *,
    start_step: int,
    num_steps: int,
    caption_turns: CaptionTurns | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_text_shards: int = 0,
    rows: Sequence[int] = (),
) -> Iterator[Iterator[Batch]]:
    """Opens an iterator over this host's part of the batches of some steps.

        with batches(pairs, sampler, start_step=0, num_steps=sampler.num_steps) as iterator:
            for batch in iterator: …

    Batches depend on the step alone: to resume, start at the step where the run stopped. Host p
    of P gets rows p·B to (p+1)·B of each global batch, B = global_batch / P.

    Args:
        pairs: where images and captions come from.
        sampler: which records a step uses.
        start_step: the first step, counted over epochs.
        num_steps: how many batches to give.
        caption_turns: which caption of a record has its turn; None is always the first.
        process_index: p.
        process_count: P.
        num_workers: processes that decode streamed pairs ahead; with 0, threads of this process
            do, which is enough up to some 10,000 images per second. Workers hand batches over in
            shared memory: /dev/shm must hold a few of them for each.
        num_text_shards: how many parts the global batch has for text, one for each device and microbatch:
            captions of a part share rows if the pairs say `packs`. 0 leaves a caption a row, which whatever
            looks at single tokens needs.
        rows: the numbers of rows that a part may have, ascending (`rows_of_batches`); one that needs more has
            a row for each caption.

    Yields:
        an iterator of {"image": uint8 (B, H, W, 3), "text": int32 (B, L), or PackedText of this host's
        shards, "index": int64 (B,) records, "valid": bool (B,)}, and "short_text" if the pairs have it.
        Padding pairs are zero, -1 in "index", False in "valid".

    Raises:
        ValueError: hosts or shards that do not divide the batch; from the iterator, an unreadable record.
    """
    if sampler.global_batch % process_count:
        raise ValueError(
            f"a global batch of {sampler.global_batch} does not divide among {process_count} "
            f"processes: use a multiple of {process_count}"
        )
    if num_text_shards and (sampler.global_batch % num_text_shards or num_text_shards % process_count):
        raise ValueError(
            f"a global batch of {sampler.global_batch} in {num_text_shards} shards of {process_count} "
            "processes: the shards must divide the batch, and the processes the shards"
        )
    steps = range(start_step, start_step + num_steps)
    num_text_shards = num_text_shards if pairs.packs else 0
    processes = process_index, process_count
    local_batch = _LocalBatch(pairs, sampler, caption_turns, *processes, num_text_shards, tuple(rows))
    if isinstance(pairs, DecodedPairs):
        yield map(local_batch, steps)
        return
    num_threads = max(1, pairs.num_threads // max(1, num_workers))
    local_batch = dataclasses.replace(local_batch, pairs=dataclasses.replace(pairs, num_threads=num_threads))
    iterator = _read_ahead(local_batch, steps, num_workers)
    try:
        yield map(_own, iterator) if num_workers else iterator
    finally:
        iterator.close()


def rows_of_batches(
    pairs: Pairs,
    sampler: Sampler,
    num_steps: int,
    num_text_shards: int,
    row_cost: float,
) -> tuple[int, ...]:
    """Returns the numbers of rows that the text of a phase's batches should have, as `batches` takes them.

    By some batches of the first epoch, with room for others that need a little more: the same in every
    process, and whenever a phase resumes. num_steps: of the phase. row_cost: what a row of all parts costs in
    a step, in compilations of it. Batches that need more have a row for each caption, as `batches` gives
    them.
    """
    if not pairs.packs or not num_steps:
        return ()
    num_sampled = min(SAMPLED_STEPS, num_steps, sampler.num_steps)
    steps = np.arange(num_sampled) * min(num_steps, sampler.num_steps) // num_sampled
    indices = (np.asarray(sampler.indices(int(step)), np.int64) for step in steps)
    needed = np.array(
        [
            place_captions(pairs.caption_lengths(of_step), num_text_shards, pairs.context_length).num_rows
            for of_step in indices
        ]
    )
    size = sampler.global_batch // num_text_shards
    numbers = row_numbers(with_room(needed, size), row_cost * num_steps / num_sampled)
    return tuple(number for number in numbers if number < size)


@dataclasses.dataclass(frozen=True)
class _LocalBatch:
    """Returns this host's batch of a step. Worker processes get a copy of it."""

    pairs: Pairs
    sampler: Sampler
    caption_turns: CaptionTurns | None
    process_index: int
    process_count: int
    num_text_shards: int
    rows: tuple[int, ...]

    def __call__(self, step: int) -> Batch:
        all_indices = np.asarray(self.sampler.indices(step), np.int64)
        indices = self._part(all_indices)
        turns = None
        if self.caption_turns is not None:
            times_before = self.sampler.times_before(step, self.caption_turns.first_epoch)
            turns = self.caption_turns(indices, self._part(times_before))
        arrays = self.pairs.gather(indices, turns)
        batch: Batch = {**arrays, "index": indices, "valid": indices >= 0}
        if self.num_text_shards:
            lengths = self.pairs.caption_lengths(all_indices)
            places = place_captions(lengths, self.num_text_shards, self.pairs.context_length)
            size = len(all_indices) // self.num_text_shards
            num_rows = next(number for number in (*self.rows, size) if number >= places.num_rows)
            places = Places(num_rows, self._part(places.starts), self._part(places.segments))
            lengths = np.where(indices >= 0, _lengths(arrays["text"]), 0)
            num_shards = self.num_text_shards // self.process_count
            batch["text"] = pack(arrays["text"], lengths, places, num_shards)
        return batch

    def _part(self, array: np.ndarray) -> np.ndarray:
        return np.split(array, self.process_count)[self.process_index]


def _read_ahead(local_batch: _LocalBatch, steps: range, num_workers: int):
    """Returns a grain iterator of local_batch(step), computed ahead of use."""
    import grain  # here because it is slow to import

    dataset = grain.MapDataset.range(steps.start, steps.stop).map(local_batch)
    # One batch at a time: its rows already use every thread.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if num_workers:
        cli.mark_flags_parsed()  # grain's workers read flags
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            distributed.leave_signals_to_parent,
        )
    return iter(dataset)


def _own(batch: Batch) -> Batch:
    """Moves a worker's batch out of shared memory, which must not outlive the workers.

    Emptying grain's dict frees that memory now: grain's threads may hold on to the dict.
    """

    def copy(array: np.ndarray | PackedText) -> np.ndarray | PackedText:
        return PackedText(*map(np.array, array)) if isinstance(array, PackedText) else np.array(array)

    return {name: copy(batch.pop(name)) for name in list(batch)}


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Returns the process's pool of threads, kept from batch to batch."""
    return ThreadPoolExecutor(count, thread_name_prefix="decode")


def _short_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(min(SHORT_LENGTH, tokenizer.context_length), tokenizer.parse_special_tokens)


def _caption_lengths(longest: np.ndarray, indices: np.ndarray, context_length: int) -> np.ndarray:
    """Picks the lengths of some records from those of all, (N,): `StreamedPairs.caption_lengths`."""
    lengths = np.zeros(len(indices), np.int64)
    lengths[indices >= 0] = longest[indices[indices >= 0]]
    return np.minimum(lengths, context_length)


def _lengths(text: np.ndarray) -> np.ndarray:
    """Counts tokens up to the first end token: (B, L) -> (B,) int64."""
    return np.argmax(text == END_ID, axis=1) + 1


def decode(record: dict, index: int, image_size: int) -> np.ndarray:
    """Returns the pixels of a record as a model takes them, uint8 (image_size, image_size, 3). Raises
    ValueError naming it if its image does not decode, or is stored as pixels of another size."""
    if isinstance(record["image"], np.ndarray):
        check_stored_size(len(record["image"]), image_size)
        return record["image"]
    try:
        with reading([f"record {index} ({record['id']!r})"]):
            return preprocess_image(record["image"], image_size)
    except UnreadableImageError as error:
        raise ValueError(
            f"record {index} ({record['id']!r}) has an image that does not decode, its files have changed: "
            f"prepare the data set again ({error})"
        ) from error
