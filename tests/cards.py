"""The code of the cards that `convert` writes, for tests that run it."""

import re


def code_of(card: str) -> str:
    """Returns the Python of a card, all of its blocks as one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
