"""Classes of words, token by token."""

from clipmoe_jax.analysis.words import classes_of_tokens, token_texts
from clipmoe_jax.data.tokenizer import Tokenizer

NUMBER, COLOUR, FUNCTION, PUNCTUATION, OTHER = range(5)


def test_every_token_of_a_caption_has_the_class_of_its_word():
    # "anticlockwise" is three tokens and "turquoise" one; so is each digit, and "'s".
    caption = "Two 47 anticlockwise turquoise dogs - it's the Grey café"
    tokens = Tokenizer(24)([caption])
    words = {
        **{"two": NUMBER, "4": NUMBER, "7": NUMBER, "antic": OTHER, "lock": OTHER, "wise": OTHER},
        **{"turquoise": COLOUR, "dogs": OTHER, "-": PUNCTUATION, "it": FUNCTION, "'s": FUNCTION},
        **{"the": FUNCTION, "grey": COLOUR, "café": OTHER},
    }
    assert token_texts(tokens[0])[1:-1] == list(words)
    padding = [-1] * (24 - 2 - len(words))
    assert classes_of_tokens(tokens)[0].tolist() == [-1, *words.values(), -1, *padding]


def test_piece_of_a_word_is_not_classed_as_a_word():
    """ "antic" + "lock" + "wise": "wise" alone ends a word, but "as" in a longer word must not be a function
    word; and the end token may cut a word off."""
    tokens = Tokenizer(4)(["anticlockwise", "as wise"])
    assert token_texts(tokens[0]) == ["<|startoftext|>", "antic", "lock", "<|endoftext|>"]
    assert classes_of_tokens(tokens).tolist() == [[-1, OTHER, OTHER, -1], [-1, FUNCTION, OTHER, -1]]
