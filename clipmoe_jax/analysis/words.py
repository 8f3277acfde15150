"""The tokens of captions as words: their text, and a coarse class of each word.

Letters: B captions, L length.
"""

import functools

import numpy as np
from tokenizers import decoders

from clipmoe_jax.data.tokenizer import backend
from clipmoe_jax.models.inputs import END_ID, START_ID

END_OF_WORD = "</w>"
WORD_CLASSES = ("numbers", "colour words", "function words", "punctuation", "other")

NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
    "million billion dozen".split()
)
COLOURS = frozenset(
    "black white gray grey red green blue yellow orange brown pink purple violet cyan teal turquoise magenta "
    "maroon navy beige tan gold golden silver lime peach plum".split()
)
FUNCTION_WORDS = frozenset(
    "a an the this that these those some any no each every all both either neither such another other "
    "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs "
    "who whom whose which what where when why how there here "
    "and or but nor so yet if than then as because while although though whether "
    "of in on at by to from with without into onto over under above below between among through during "
    "before after behind beside near across along around about against toward towards upon within off out up "
    "down for per via "
    "is are was were be been being am do does did has have had having can could will would shall should may "
    "might must not very too also just only "
    "'s 't 're 've 'm 'll 'd".split()
)


def word_class(word: str) -> int:
    """Returns the index into WORD_CLASSES of a lower-cased word.

    The first rule that holds decides: digits or a cardinal number; a colour's name; an article, pronoun,
    preposition, conjunction, auxiliary or clitic; no letter in it; other.
    """
    if word.isnumeric() or word in NUMBERS:
        return 0
    if word in COLOURS:
        return 1
    if word in FUNCTION_WORDS:
        return 2
    return 4 if any(character.isalpha() for character in word) else 3


def classes_of_tokens(tokens: np.ndarray) -> np.ndarray:
    """Returns the class of the word that each token is, or is a piece of: (B, L) int32 -> (B, L) int8.

    -1 for the start token, and from the end token on.
    """
    pieces, classes = _pieces(), np.full(tokens.shape, -1, np.int8)
    class_of = functools.cache(lambda ids: word_class(_decode([pieces[i] for i in ids])))
    for row, ids in enumerate(tokens.tolist()):
        first = 0
        for place, token in enumerate(ids):
            if token == START_ID:
                first = place + 1
            elif token == END_ID:
                classes[row, first:place] = class_of(tuple(ids[first:place])) if place > first else -1
                break
            elif pieces[token].endswith(END_OF_WORD):
                classes[row, first : place + 1] = class_of(tuple(ids[first : place + 1]))
                first = place + 1
    return classes


def token_texts(tokens: np.ndarray) -> list[str]:
    """Returns the text of each token, or piece of a word, of a caption up to its end token, (L,) int32."""
    pieces = _pieces()
    ends = np.flatnonzero(tokens == END_ID)
    return [_decode([pieces[i]]) for i in tokens[: ends[0] + 1 if len(ends) else None].tolist()]


@functools.cache
def _pieces() -> list[str]:
    """Returns the bytes of each token, as the byte-pair encoder writes them; a word's last ends in "</w>"."""
    vocabulary = backend().get_vocab()
    return sorted(vocabulary, key=lambda piece: vocabulary[piece])


def _decode(pieces: list[str]) -> str:
    """Returns the text of some pieces; bytes that are no whole character become U+FFFD."""
    return decoders.ByteLevel().decode([piece.removesuffix(END_OF_WORD) for piece in pieces])
