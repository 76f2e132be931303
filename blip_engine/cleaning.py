"""How Salesforce's code cleans texts before its tokenizer (`data/utils.py` of https://github.com/salesforce/BLIP).

The hub's processors do none of this, so it is a switch; whoever compares with figures of the paper wants it.
"""

import re
from typing import Final

_REMOVED: Final = re.compile(r'[.!"()*#:;~]')
_SPACES: Final = re.compile(r"\s{2,}")
MAX_WORDS: Final = 50


def clean_question(text: str) -> str:
    """In lower case, the characters taken out, at most MAX_WORDS words."""
    return _first_words(_REMOVED.sub("", text.lower()).rstrip(" "))


def clean_caption(text: str) -> str:
    """In lower case, a space for each of the characters, single spaces, at most MAX_WORDS words."""
    return _first_words(_SPACES.sub(" ", _REMOVED.sub(" ", text.lower())).rstrip("\n").strip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])
