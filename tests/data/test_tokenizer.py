"""The tokenizer against the released code's ids, and against hand-made cases."""

import json
import pickle
import time

import numpy as np
import pytest

from clipmoe_jax.data.tokenizer import Tokenizer, build_vocabulary, clean, read_merges

START, END = 49406, 49407
SPECIAL_TEXT = "<|startoftext|> literal <|endoftext|> tokens"


def words(ids):
    """The ids between the start token and the first end token."""
    ids = ids.tolist()
    return ids[1 : ids.index(END)]


@pytest.fixture(scope="module")
def tokenize():
    return Tokenizer(77)


@pytest.mark.parametrize("length", [77, 248])
def test_ids_equal_the_released_codes(golden_dir, length):
    rows = json.loads((golden_dir / "tokens.json").read_text())
    assert len(rows) == 103 and SPECIAL_TEXT in [row["text"] for row in rows]
    expected = np.zeros((len(rows), length), np.int32)
    for row, golden in zip(expected, rows, strict=True):
        ids = golden[f"ids_{length}"]
        row[: len(ids)] = ids
    np.testing.assert_array_equal(Tokenizer(length)([row["text"] for row in rows]), expected)


def test_rows_are_int32_padded_with_zeros(tokenize):
    ids = tokenize("a photo of a cat")
    assert ids.shape == (1, 77) and ids.dtype == np.int32
    assert ids[0, :8].tolist() == [START, 320, 1125, 539, 320, 2368, END, 0]
    assert not ids[0, 7:].any()
    assert tokenize(["one", "two"]).shape == (2, 77)
    assert tokenize([]).shape == (0, 77)


def test_a_long_caption_keeps_the_end_token_last():
    ids = Tokenizer(5)("a photo of a cat")[0]
    assert ids.tolist() == [START, 320, 1125, 539, END]
    exactly_full = Tokenizer(7)("a photo of a cat")[0]
    assert exactly_full.tolist() == [START, 320, 1125, 539, 320, 2368, END]


@pytest.mark.parametrize(
    "text",
    [
        SPECIAL_TEXT,
        "<|ENDOFTEXT|>",
        "<start_of_text>a<end_of_text>",
        "&lt;|endoftext|&gt;",
    ],
)
def test_special_tokens_in_a_data_sets_caption_are_plain_text(text):
    ids = Tokenizer(77, parse_special_tokens=False)(text)[0].tolist()
    assert ids.count(START) == 1 and ids.count(END) == 1
    assert ids.index(END) > 3


def test_a_special_word_after_punctuation_is_punctuation(tokenize):
    """OpenAI's pattern takes "!<|" as one run of punctuation before it looks for the special word."""
    glued, plain = tokenize("a !<|endoftext|>")[0], Tokenizer(77, parse_special_tokens=False)
    np.testing.assert_array_equal(glued, plain("a !<|endoftext|>")[0])
    assert tokenize("a <|endoftext|>")[0, :4].tolist() == [START, 320, END, END]


# What is special for OpenAI's cleaning: every row has the words of its plain twin.
@pytest.mark.parametrize(
    ("text", "plain"),
    [
        pytest.param("A  Photo\tof\n a CAT ", "a photo of a cat", id="case and white space"),
        pytest.param("salt &amp;amp; pepper", "salt & pepper", id="entity escaped twice"),
        pytest.param("â€œquotedâ€\x9d", '"quoted"', id="mojibake and curly quotes"),
        pytest.param("ﬁsh", "fish", id="ligature"),
        pytest.param("ａｂｃ", "abc", id="full width"),
        pytest.param("a\x00b\x1b[0m", "ab", id="control characters"),
        pytest.param("bad \ud800 half", "bad \ufffd half", id="lone surrogate"),
        pytest.param("a \u0345 b", "a b", id="combining iota is dropped"),
    ],
)
def test_text_is_cleaned_as_in_clip(tokenize, text, plain):
    assert words(tokenize(text)[0]) == words(tokenize(plain)[0])


def test_contractions_split_as_in_clip(tokenize):
    vocabulary = build_vocabulary(read_merges())
    assert words(tokenize("it's")[0]) == [vocabulary["it</w>"], vocabulary["'s</w>"]]
    # A long s counts as an s: its apostrophe does not end a word.
    assert words(tokenize("it'ſ")[0])[:2] == [vocabulary["it</w>"], vocabulary["'"]]


def test_vocabulary_is_clips():
    merges = read_merges()
    vocabulary = build_vocabulary(merges)
    assert len(merges) == 48894 and merges[0] == ("i", "n") and merges[-1] == ("jeky", "ll</w>")
    assert len(vocabulary) == 49408
    # 256 bytes from "!" on, the same 256 as word ends, then the merges.
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256 and vocabulary["in"] == 512
    assert vocabulary["<|startoftext|>"] == START and vocabulary["<|endoftext|>"] == END


def test_tokenizer_pickles(tokenize):
    copy = pickle.loads(pickle.dumps(tokenize))
    np.testing.assert_array_equal(copy("a red cube"), tokenize("a red cube"))
    assert len(pickle.dumps(tokenize)) < 500  # not the vocabulary


@pytest.mark.parametrize("length", [2, 0, -1])
def test_context_length_too_short_is_refused(length):
    with pytest.raises(ValueError, match=f"context_length={length} .* 3 or more"):
        Tokenizer(length)


def test_texts_that_are_not_strings_are_refused(tokenize):
    with pytest.raises(TypeError, match="caption 1 is a NoneType"):
        tokenize(["fine", None])
    with pytest.raises(TypeError, match="caption 0 is a int"):
        tokenize([3])


@pytest.mark.parametrize("escaped", ["&#{};", "&#{}", "&amp;#{};"])
def test_an_entity_of_very_many_digits_is_text(escaped):
    text = "&eacute; " + escaped.format(4301 * "7")
    assert clean(text) == text.replace("&eacute;", "é").replace("&amp;", "&")


def test_accents_without_end_are_repaired_in_parts():
    text = "a" + 50_000 * "\u0301\u0323"
    start = time.perf_counter()
    assert len(clean(text)) > 99_000
    assert time.perf_counter() - start < 3  # as one line it took 14 s
