"""CLIP's lower-cased byte-pair tokenizer: captions in, int32 ids out.

Axis letters: B captions, L context length.
"""

import functools
import gzip
import html
import re
from collections.abc import Sequence
from importlib import resources

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from clipmoe_jax.models.inputs import END_ID, PAD_ID, SPECIAL_IDS, START_ID

# CLIP splits words with `regex`, ignoring case. There the long s matches "'s", and U+0345, a
# combining iota that folds to a letter, matches nothing; the tokenizers library has to be told.
_WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\u0345]+"

# ftfy changes plain ASCII only where there are control characters.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

# ftfy repairs this many characters of a line at once: to sort accents takes the square of their number.
_LINE_PART = 2000
# The number of an HTML entity that has more digits than Python parses.
_LONG_ENTITY = re.compile(r"&(?=#[0-9]{4301})")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


class Tokenizer:
    """Turns captions into CLIP's token ids.

    A row is start, words, end, padding with 0. A caption that is too long loses its last words,
    never its end token.

    Attributes:
        context_length: L, the ids in a row.
        parse_special_tokens: whether the words `<|startoftext|>` and `<|endoftext|>` become those
            tokens, as in OpenAI's code. With False they are the characters they consist of, so that
            no caption of a data set can place an end token.
    """

    def __init__(self, context_length: int, parse_special_tokens: bool = True):
        """Raises ValueError if context_length leaves no room for start, one word and end."""
        if context_length < 3:
            raise ValueError(f"context_length={context_length} is too short: use 3 or more")
        self.context_length = context_length
        self.parse_special_tokens = parse_special_tokens

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Tokenises one caption or several.

        Args:
            texts: a caption, or B captions.

        Returns:
            int32 (B, L); B is 1 for a single string.

        Raises:
            TypeError: a caption is not a string.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"caption {i} is a {type(text).__name__}, expected a string")
        ids = np.full((len(texts), self.context_length), PAD_ID, np.int32)
        texts = [clean(text) for text in texts]
        encodings = backend().encode_batch_fast(texts)
        for row, text, encoding in zip(ids, texts, encodings, strict=True):
            words = encoding.ids
            if self.parse_special_tokens and any(special in text for special in SPECIAL_IDS):
                words = _parse_special_tokens(text)
            self.fill(row, words)
        return ids

    def fill(self, row: np.ndarray, words: Sequence[int]) -> None:
        """Writes start, as many of the words' ids as fit, and end into a row of padding, int32 (L,)."""
        words = words[: self.context_length - 2]
        row[0] = START_ID
        row[1 : len(words) + 1] = words
        row[len(words) + 1] = END_ID


def word_ids(texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text's words, all of them, without start and end; special words are text."""
    return [encoding.ids for encoding in backend().encode_batch_fast([clean(text) for text in texts])]


def first_sentence(text: str) -> str:
    """Returns a text up to its first full stop, question or exclamation mark that white space follows, or up
    to the end of its first line."""
    return _SENTENCE_END.split(text.strip(), maxsplit=1)[0]


def clean(text: str) -> str:
    """Repairs broken Unicode and HTML entities, collapses white space, lower-cases. The number of an entity
    that has more than 4,300 digits is text, and a line of more than 2,000 characters is repaired in parts."""
    if not text.isascii() or "&" in text or _CONTROL_CHARACTERS.search(text):
        import ftfy  # slow to import, and most captions need none of it

        text = _unescape(_unescape(ftfy.fix_text(text, max_decode_length=_LINE_PART)))
    return " ".join(text.split()).lower()


def read_merges() -> list[tuple[str, str]]:
    """Reads CLIP's 48,894 byte-pair merges, the first to apply first."""
    packed = resources.files("clipmoe_jax.data").joinpath("clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return [(first, second) for first, second in (line.split(" ") for line in lines)]


def build_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Returns {token: id} of CLIP's 49,408 tokens: bytes, bytes that end a word, merges, start, end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet]
    tokens += ["".join(pair) for pair in merges]
    tokens += SPECIAL_IDS
    return {token: i for i, token in enumerate(tokens)}


@functools.lru_cache(maxsize=1)
def backend() -> Backend:
    """Returns the byte-pair encoder, without special tokens, for clean text; built once a process."""
    merges = read_merges()
    vocabulary = build_vocabulary(merges)
    backend = Backend(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _unescape(text: str) -> str:
    return html.unescape(_LONG_ENTITY.sub("&amp;", text))


def _parse_special_tokens(text: str) -> list[int]:
    """Returns the ids of a clean text, special words as tokens unless punctuation stands before them."""
    special = "|".join(re.escape(word) for word in SPECIAL_IDS)
    split = pre_tokenizers.Split(Regex(f"{special}|{_WORDS}"), behavior="removed", invert=True)
    ids = []
    for word, _ in split.pre_tokenize_str(text):
        ids += [SPECIAL_IDS[word]] if word in SPECIAL_IDS else backend().encode(word).ids
    return ids
