"""Errors of several checks: all are told, each once."""

import pytest

from clipmoe_jax.core.errors import Errors, SeveralErrors, printable_errors


def collected(*raised, what=""):
    errors = Errors()
    for error in raised:
        with errors.of(what):
            raise error
    return errors


def test_nothing_is_raised_where_nothing_was_collected():
    errors = collected()
    errors.raise_all()
    assert not errors.any()


def test_single_error_is_raised_as_it_came():
    error = FileNotFoundError("a file")
    errors = collected(error)
    assert errors.any()
    with pytest.raises(FileNotFoundError) as raised:
        errors.raise_all()
    assert raised.value is error


def test_single_error_is_raised_with_what_it_is_of():
    for kind in (ValueError, FileNotFoundError):
        with pytest.raises(kind, match="^data.train: it$"):
            collected(kind("it"), what="data.train").raise_all()


def test_several_errors_are_raised_together_in_their_order():
    several = SeveralErrors(["b", "c"])
    with pytest.raises(SeveralErrors) as raised:
        collected(ValueError("a"), several, FileNotFoundError("d"), ValueError("a"), what="x").raise_all()
    assert raised.value.messages == ("x: a", "x: b", "x: c", "x: d")
    assert str(raised.value) == "x: a\nx: b\nx: c\nx: d"


def test_error_of_the_whole_is_no_news_of_its_parts():
    errors = collected(ValueError("a"))
    with errors.of("part"):
        raise SeveralErrors(["a", "b"])
    with pytest.raises(SeveralErrors) as raised:
        errors.raise_all()
    assert raised.value.messages == ("a", "part: b")


def test_message_that_comes_again_is_told_once_with_all_that_it_is_of():
    errors = Errors()
    for what, message in (("a", "it"), ("b", "other"), ("c", "it"), ("c", "it")):
        with errors.of(what):
            raise ValueError(message)
    with pytest.raises(SeveralErrors) as raised:
        errors.raise_all()
    assert raised.value.messages == ("a, c: it", "b: other")


def test_errors_that_are_not_made_for_people_pass():
    with pytest.raises(TypeError):
        collected(TypeError("a bug"))


def test_names_of_strangers_are_escaped_and_shortened_in_an_error_and_in_what_it_comes_from():
    @printable_errors()
    def read():
        try:
            raise KeyError("red\x1b[2J")
        except KeyError as error:
            raise SeveralErrors(["blue\u202e", f"x{'y' * 10**6}z"]) from error

    with pytest.raises(SeveralErrors) as raised:
        read()
    first, second = raised.value.messages
    assert first == r"blue\u202e" and len(second) < 4001 and "xyy" in second and "yy…yy" in second
    assert str(raised.value.__cause__) == repr(r"red\x1b[2J") and len(str(raised.value)) < 5000
    with pytest.raises(FileNotFoundError, match="No such file or directory"), printable_errors():
        open("/nowhere")
