"""The quick way through orjson means what Python's own `json` means."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fastjson import dumps, exact_loads, is_json, loads_for

numbers = st.integers() | st.integers(2**62, 2**65) | st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=())) | st.sampled_from(["null", "\ud800", '"\\', "\u2028", "1" * 30])
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal, with types: 1 is not 1.0, and 0.0 not -0.0."""
    return repr(one) == repr(other)


@given(st.dictionaries(text, values, max_size=5))
def test_what_is_written_is_read_by_json(value: dict[str, Any]) -> None:
    assert same(json.loads(dumps(value)), json.loads(json.dumps(value)))
    assert b"\n" not in dumps(value)


@given(values, st.booleans())
def test_what_json_wrote_is_read(value: Any, ascii_only: bool) -> None:
    try:
        data = json.dumps(value, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        data = json.dumps(value).encode()
    assert same(loads_for(data)(data), value)


@pytest.mark.parametrize(
    "line", [b"{", b"", b'{"a": 1} x', b"\xef\xbb\xbf{}", b'"\xff"', b"[" * 5000, b'{"a": "\t"}', b"[1,]", b"'a'"]
)
def test_what_json_refuses_is_refused(line: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        exact_loads(line)
    with pytest.raises((ValueError, RecursionError)):
        loads_for(line)(line)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_are_refused_wherever_they_are(bad: float) -> None:
    for value in (
        bad,
        [0.5, bad],
        {"b": [{"c": bad}]},
        {"a": None, "b": bad},
        {"a": "null", "b": bad},
        ["\ud800", bad],
    ):
        assert not is_json(value)
        for record in ({"a": value}, {"a": value, "b": None}, {"a": value, "b": "null", "c": None}):
            with pytest.raises(ValueError, match="JSON"):
                dumps(record)
    for value in (None, {"a": None}, [None, "null", 0.5], "\ud800", 2**70):
        assert is_json(value)


def test_as_compact_as_it_gets() -> None:
    assert dumps({"a": [1, 2.5, "é"], "b": None}) == '{"a":[1,2.5,"é"],"b":null}'.encode()
    assert dumps({"a": "\ud800", "b": 1}) == b'{"a":"\\ud800","b":1}'
    assert dumps({"a": 2**70}) == b'{"a":1180591620717411303424}'
