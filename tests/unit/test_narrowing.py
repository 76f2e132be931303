"""Settled rows leave a batch that is being decoded: the same results, bit for bit, for less work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from twins import BOS, twins

from blip_engine.generation import Generated, Memory, Prompt, generate
from blip_engine.narrowing import NarrowingDecoder
from blip_engine.requests import GenerationOptions

ROWS, SEEN, WIDTH = 16, 9, 48
MOST = 14


@pytest.fixture(scope="module")
def decoder() -> Any:
    """Its captions end after one to MOST tokens."""
    return twins("caption", end=1.5)[0].text_decoder


@pytest.fixture(scope="module")
def states() -> Tensor:
    return torch.randn(ROWS, SEEN, WIDTH, generator=torch.Generator().manual_seed(3))


def prompts(rows: int = ROWS, words: bool = False) -> Prompt:
    tokens = [[BOS, *range(5, 5 + row % 4)] if words else [BOS] for row in range(rows)]
    return Prompt.of(tokens, 0, torch.device("cpu"))


@contextmanager
def counted(decoder: Any) -> Iterator[list[int]]:
    """How many rows each call of the decoder reads."""
    rows: list[int] = []
    forward = decoder.forward

    def seen(ids: Tensor, *args: Any, **more: Any) -> Any:
        rows.append(len(ids))
        return forward(ids, *args, **more)

    with patch.object(decoder, "forward", seen):
        yield rows


def assert_same(found: Generated, truth: Generated, rows: slice | list[int] = slice(None)) -> None:
    for mine, other in zip(
        (found.tokens, found.lengths, found.scores), (truth.tokens, truth.lengths, truth.scores), strict=True
    ):
        assert mine[rows].equal(other[rows])


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, "repetition_penalty": 1.2},
    {"num_beams": 1, "do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
    {"num_beams": 2, "min_new_tokens": 4},
]


@pytest.mark.parametrize("words", [False, True], ids=["bos", "prompts"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_are_those_of_whole_batches(decoder: Any, states: Tensor, options: dict[str, Any], words: bool) -> None:
    asked = GenerationOptions(max_new_tokens=MOST, **options)
    uniforms = None
    if asked.do_sample:
        draws = (ROWS, asked.num_return_sequences, MOST)
        uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(7))
    truth = generate(decoder, prompts(words=words), Memory(states), asked, uniforms=uniforms)
    assert len(set(truth.lengths[:, 0].tolist())) > 2  # they end at different times
    narrowing = NarrowingDecoder(decoder)
    for _ in range(2):  # the second time it knows which sizes are steady
        assert_same(narrowing.generate(prompts(words=words), Memory(states), asked, uniforms), truth)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_less_is_read(decoder: Any, states: Tensor, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = GenerationOptions(max_new_tokens=MOST, **options)
    with counted(decoder) as whole:
        truth = generate(decoder, prompts(), Memory(states), asked)
    monkeypatch.setattr(NarrowingDecoder, "_find_steady", lambda *_: [8, 4, 2])  # whatever this processor rounds
    with counted(decoder) as rows:
        found = NarrowingDecoder(decoder).generate(prompts(), Memory(states), asked)
    assert found.tokens.equal(truth.tokens)
    assert sum(rows) < 0.8 * sum(whole)
    assert set(rows) <= {ROWS, *(asked.num_beams * size for size in (16, 8, 4, 2))}  # fixed sizes


def test_prompts_that_share_a_memory_stay_together(decoder: Any, states: Tensor) -> None:
    """Two prompts for each image, keys and values projected before, as many texts about one image have it."""
    images = states[: ROWS // 2]
    layers = [layer.crossattention.self for layer in decoder.bert.encoder.layer]
    with torch.no_grad():
        memory = Memory(None, None, [layer.project(images) for layer in layers])
    asked = GenerationOptions(num_beams=3, max_new_tokens=MOST)
    prompt = prompts(words=True)
    truth = generate(decoder, prompt, memory, asked)
    with counted(decoder) as rows:
        assert_same(NarrowingDecoder(decoder).generate(prompt, memory, asked), truth)
    assert {row % 2 for row in rows} == {0}


def test_masked_memories(decoder: Any, states: Tensor) -> None:
    """Questions of different lengths."""
    lengths = 1 + torch.arange(ROWS) % SEEN
    mask = (torch.arange(SEEN) < lengths[:, None]).long()
    asked = GenerationOptions(num_beams=3, max_new_tokens=MOST)
    truth = generate(decoder, prompts(), Memory(states, mask), asked)
    assert_same(NarrowingDecoder(decoder).generate(prompts(), Memory(states, mask), asked), truth)


def test_blank_rows_leave_at_once(decoder: Any, states: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, used = GenerationOptions(num_beams=3, max_new_tokens=MOST, min_new_tokens=6), [0, 1]
    truth = generate(decoder, prompts(), Memory(states), asked)
    monkeypatch.setattr(NarrowingDecoder, "_find_steady", lambda *_: [8, 4, 2])
    with counted(decoder) as rows:
        found = NarrowingDecoder(decoder).generate(prompts(), Memory(states), asked, None, used)
    assert found.tokens[used].equal(truth.tokens[used])
    assert rows[0] == ROWS
    assert set(rows[1:]) == {3 * 2}  # the two that are used, of three beams each


def test_sizes_that_change_bits_are_not_used(decoder: Any, states: Tensor) -> None:
    """A decoder whose numbers depend on how many rows it reads: all stay until all are settled."""
    asked = GenerationOptions(num_beams=3, max_new_tokens=MOST)
    forward = decoder.forward

    def unsteady(ids: Tensor, *args: Any, **more: Any) -> Any:
        output = forward(ids, *args, **more)
        output.logits = output.logits + 1e-3 / len(ids) * torch.arange(output.logits.shape[-1])
        return output

    with patch.object(decoder, "forward", unsteady):
        truth = generate(decoder, prompts(), Memory(states), asked)
        narrowing = NarrowingDecoder(decoder)
        narrowing.generate(prompts(), Memory(states), asked)
        with counted(decoder) as rows:
            assert_same(narrowing.generate(prompts(), Memory(states), asked), truth)
    assert set(rows) == {ROWS, 3 * ROWS}


def test_what_was_found_of_other_sizes_is_forgotten(decoder: Any, states: Tensor) -> None:
    narrowing, asked = NarrowingDecoder(decoder), GenerationOptions(num_beams=3, max_new_tokens=MOST)
    narrowing.generate(prompts(), Memory(states), asked)
    assert narrowing._sizes
    narrowing.forget()
    assert not narrowing._sizes
