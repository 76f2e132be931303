"""Captured decoding. A recorder does on a CPU what a CUDA graph does: the same kernels at the same addresses."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from small_models import WORDS, save_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from blip_engine import BlipForConditionalGeneration
from blip_engine.generation import Generated, Memory, Prompt, generate
from blip_engine.graphs import CudaCapture, GraphedDecoder
from blip_engine.requests import GenerationOptions, options_for

ROWS, SEEN, WIDTH, BOS = 3, 17, 48, len(WORDS)


class Recorder(TorchDispatchMode):
    """Notes every operation with the tensors it read and made; `replay` does them again, into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        found = function(*args, **(kwargs or {}))
        self.noted.append((function, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        for function, args, kwargs, found in self.noted:
            if function.is_view:
                continue  # it looks at the same place
            again = function(*args, **kwargs)
            made = found if isinstance(found, (list, tuple)) else [found]
            for old, new in zip(made, again if isinstance(again, (list, tuple)) else [again], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Captures:
    """How often something was captured, and what with."""

    def __init__(self, spoil: Callable[[Any], Any] = lambda found: found) -> None:
        self.graphs: list[Recorder] = []
        self._spoil = spoil

    def __call__(self, function: Callable[[], Any]) -> tuple[Recorder, Any]:
        self.graphs.append(Recorder())
        with self.graphs[-1]:
            found = self._spoil(function())
        return self.graphs[-1], found


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "caption", "caption")
    return BlipForConditionalGeneration.from_pretrained(folder).text_decoder


def batch(decoder: Any, seed: int, prompts: int = 1) -> tuple[Prompt, Memory]:
    generator = torch.Generator().manual_seed(seed)
    layers = [layer.crossattention.self for layer in decoder.bert.encoder.layer]
    states = torch.randn(ROWS, SEEN, WIDTH, generator=generator)
    rows = [
        [BOS, *torch.randint(5, 30, (prompts - 1,), generator=generator).tolist()][: prompts - n % 2]
        for n in range(ROWS)
    ]
    prompt = Prompt.of(rows if prompts > 1 else [[BOS]] * ROWS, 0, torch.device("cpu"))
    return prompt, Memory(None, None, [layer.project(states) for layer in layers])


def options(**given: Any) -> GenerationOptions:
    chosen = options_for("caption", given)
    assert isinstance(chosen, GenerationOptions)
    return chosen


def same(one: Generated, other: Generated) -> bool:
    return one.tokens.equal(other.tokens) and one.lengths.equal(other.lengths) and one.scores.equal(other.scores)


KINDS = [
    {},
    {"num_beams": 1},
    {"num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.3, "min_new_tokens": 4},
    {"do_sample": True, "top_p": 0.9, "temperature": 2.0},
    {"max_new_tokens": 3},
]


@torch.no_grad()
@pytest.mark.parametrize("prompts", [1, 4])
@pytest.mark.parametrize("given", KINDS, ids=str)
def test_replayed_batches_come_out_as_usual(decoder: Any, given: dict[str, Any], prompts: int) -> None:
    captures, chosen = Captures(), options(**given)
    graphed = GraphedDecoder(decoder, captures)
    for seed in range(5):
        prompt, memory = batch(decoder, seed, prompts)
        uniforms = None
        if chosen.do_sample:
            uniforms = torch.rand(ROWS, 1, chosen.max_new_tokens, generator=torch.Generator().manual_seed(seed))
        truth = generate(decoder, prompt, memory, chosen, uniforms=uniforms)
        assert same(graphed.generate(prompt, memory, chosen, uniforms), truth)
        assert len(captures.graphs) == (0 if seed == 0 else -(-chosen.max_new_tokens // 5))  # at the second one, once
    assert len({str(batch(decoder, seed)[1].keys) for seed in range(5)}) == 5


@torch.no_grad()
def test_results_are_not_overwritten_by_the_next_batch(decoder: Any) -> None:
    graphed, chosen = GraphedDecoder(decoder, Captures()), options()
    batches = [batch(decoder, seed) for seed in range(4)]
    found = [graphed.generate(prompt, memory, chosen) for prompt, memory in batches]
    truths = [generate(decoder, prompt, memory, chosen) for prompt, memory in batches]
    assert all(same(one, other) for one, other in zip(found, truths, strict=True))
    assert len({str(each.tokens) for each in found}) > 1


@torch.no_grad()
def test_nothing_is_replayed_behind_the_end(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captures, chosen = Captures(), options(num_beams=1)
    graphed = GraphedDecoder(decoder, captures)
    prompt, memory = batch(decoder, 0)
    truth = graphed.generate(prompt, memory, chosen)
    graphed.generate(prompt, memory, chosen)
    replayed: list[Recorder] = []
    replay = Recorder.replay
    monkeypatch.setattr(Recorder, "replay", lambda graph: (replayed.append(graph), replay(graph)))
    assert same(graphed.generate(prompt, memory, chosen), truth)
    assert replayed == captures.graphs[: -(-int(truth.lengths.max()) // 5)]


@torch.no_grad()
@pytest.mark.parametrize("how", ["raises", "differs"])
def test_what_cannot_be_captured_goes_on_as_usual(decoder: Any, how: str, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(found: Any) -> Any:
        if how == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        return found[0], Generated(found[1].tokens, found[1].lengths, found[1].scores - 1)

    captures, chosen = Captures(spoil), options(max_new_tokens=4)
    graphed = GraphedDecoder(decoder, captures)
    with caplog.at_level(logging.WARNING, "blip_engine.graphs"):
        for seed in range(4):
            prompt, memory = batch(decoder, seed)
            assert same(graphed.generate(prompt, memory, chosen), generate(decoder, prompt, memory, chosen))
    assert len(captures.graphs) == 1  # it is not tried again
    assert len(caplog.records) == 1
    assert ("not permitted" if how == "raises" else "another result") in caplog.text


@torch.no_grad()
def test_what_replays_nothing_is_not_used(
    decoder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on another GPU than the current one: the kernels run while they are captured, and an empty graph remains."""
    captures, chosen = Captures(), options(max_new_tokens=4)
    monkeypatch.setattr(Recorder, "replay", lambda _: None)
    graphed = GraphedDecoder(decoder, captures)
    for seed in range(4):
        prompt, memory = batch(decoder, seed)
        assert same(graphed.generate(prompt, memory, chosen), generate(decoder, prompt, memory, chosen))
    assert len(captures.graphs) == 1
    assert "another result" in caplog.text


@torch.no_grad()
def test_memory_that_runs_out_while_capturing(decoder: Any) -> None:
    """It frees what was captured, and the kind is captured when it comes again."""
    errors = [torch.OutOfMemoryError("none left")]

    def spoil(found: Any) -> Any:
        if errors:
            raise errors.pop()
        return found

    captures, chosen = Captures(spoil), options(max_new_tokens=4)
    graphed = GraphedDecoder(decoder, captures)
    for seed in range(5):
        prompt, memory = batch(decoder, seed)
        assert same(graphed.generate(prompt, memory, chosen), generate(decoder, prompt, memory, chosen))
        assert bool(graphed._static) == (seed >= 3)
    assert len(captures.graphs) == 2


class FakeGraph:
    """What torch.cuda.CUDAGraph is, without a GPU."""

    begun: ClassVar[list[Any]] = []
    broken = False

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.begun.append(pool)
        self._pool = pool or object()

    def capture_end(self) -> None:
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def pool(self) -> Any:
        return self._pool

    def replay(self) -> None: ...


@pytest.fixture
def cuda_capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaCapture]:
    """One whose device is not there."""
    monkeypatch.setattr(FakeGraph, "begun", [])
    for name, value in {
        "Stream": lambda device, priority: (device, priority), "CUDAGraph": FakeGraph, "device": nullcontext,
        "stream": nullcontext, "synchronize": lambda: None, "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    yield CudaCapture(torch.device("cuda", 1))
    CudaCapture._cut_short = False


def test_a_pool_is_shared_as_long_as_a_graph_uses_it(cuda_capture: CudaCapture) -> None:
    first, found = cuda_capture(lambda: 7)
    second, _ = cuda_capture(lambda: 8)
    assert found == 7
    assert FakeGraph.begun == [None, first.pool()]  # type: ignore[attr-defined]
    del first, second
    cuda_capture(lambda: 9)
    assert FakeGraph.begun[2] is None


def test_what_fails_within_a_capture(cuda_capture: CudaCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        cuda_capture(lambda: 1 / 0)
    assert cuda_capture(lambda: 7)[1] == 7  # the capture was ended: others go on
    monkeypatch.setattr(FakeGraph, "broken", True)
    with pytest.raises(RuntimeError, match="a previous error"):
        cuda_capture(lambda: 7)
    monkeypatch.setattr(FakeGraph, "broken", False)
    with pytest.raises(RuntimeError, match="cut short"):  # torch takes it for one that goes on
        cuda_capture(lambda: 7)


@torch.no_grad()
def test_memory_is_bounded(decoder: Any) -> None:
    graphed = GraphedDecoder(decoder, Captures())
    prompt, memory = batch(decoder, 0)
    for number in range(20):
        graphed.generate(prompt, memory, options(max_new_tokens=2, seed=number))
    assert len(graphed._kinds) == 16
    graphed.generate(prompt, memory, options(max_new_tokens=2, seed=19))
    assert len(graphed._static) == len(memory.keys or ()) * 2 + 1
    graphed.forget()
    assert not graphed._kinds
    assert not graphed._static


def test_a_wait_in_the_decoding_would_void_the_capture() -> None:
    with pytest.raises(RuntimeError, match="not permitted"), Recorder():
        torch.ones(1).sum().item()
