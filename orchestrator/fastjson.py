"""JSON at the speed of orjson, with the meaning of Python's `json`, where the two differ.

orjson reads integers beyond 64 bits as floats, refuses lone surrogates and deep nesting, and writes NaN and infinities
as null. What it refuses, and what it might read or write differently, goes through `json` instead.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import orjson

Loads: TypeAlias = Callable[[bytes], Any]

#: An integer that orjson might not read exactly has so many digits.
_LONG: Final = b"0" * 19
_DIGITS: Final = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))  # every digit to "0", the rest to " "


def exact_loads(text: bytes) -> Any:
    """Python's own way, of UTF-8 only. Raises ValueError, and RecursionError."""
    return json.loads(text.decode())


def loads_for(data: bytes, otherwise: Loads = exact_loads) -> Loads:
    """What reads JSON texts that are pieces of `data`; `otherwise` reads, or refuses, what orjson does not."""
    if _LONG in data.translate(_DIGITS):
        return otherwise

    def loads(text: bytes) -> Any:
        try:
            return orjson.loads(text)
        except ValueError:
            return otherwise(text)

    return loads


def dumps(value: Mapping[str, Any]) -> bytes:
    """An object as compact JSON in UTF-8; lone surrogates, which UTF-8 cannot carry, as escapes.

    Raises ValueError for NaN and infinities: they are not JSON.
    """
    try:
        data = orjson.dumps(value)
    except TypeError:
        return _exact_dumps(value)
    # As many nulls as there are Nones: then none of them is a NaN.
    return data if data.count(b"null") == [*value.values()].count(None) else _exact_dumps(value)


def is_json(value: Any) -> bool:
    """Whether it holds neither NaN nor infinity."""
    try:
        if b"null" not in orjson.dumps(value):
            return True
    except TypeError:  # the other way decides
        pass
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _exact_dumps(value: Any) -> bytes:
    try:
        return _UTF8.encode(value).encode()
    except UnicodeEncodeError:
        return _ASCII.encode(value).encode()


_UTF8: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ASCII: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
