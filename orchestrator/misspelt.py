"""BLIP_* variables that are no settings, told to people: one that is misspelt would be ignored in silence."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Final

from .settings import Settings

_PREFIX: Final = "BLIP_"
#: What is read besides the settings.
_OTHERS: Final = ("REDIS_BINARY", "PARENT_PID")
#: What Kubernetes and Docker tell of a service whose name begins with `blip-`.
_SERVICE: Final = re.compile(r"(^|_)(SERVICE_(HOST|PORT)|PORT_\d+_|ENV_|NAME$)")
_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://")


def misspelt(environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that looks like a setting and is none; others may be other programs'."""
    known = [name.upper() for name in Settings.model_fields] + list(_OTHERS)
    for variable, value in sorted(environment.items()):
        name = variable.upper().removeprefix(_PREFIX)
        if name == variable.upper() or name in known or _SERVICE.search(name) or _ADDRESS.match(value):
            continue
        if near := get_close_matches(name, known, 1):
            yield f"{variable} is no setting and is ignored; is {_PREFIX}{near[0]} meant? (docs/settings.md)"
