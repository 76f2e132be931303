"""The vision tower compiled: the same tokens in fp32, the same bits in any batch, no harm where there is no compiler.

Needs a C++ compiler, as torch.compile does on a CPU.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip_engine import Engine
from blip_engine.compiling import compile_layers
from blip_engine.requests import TASKS, Caption, Match, Request, Result, Task, options_for
from blip_engine.resident import Shapes
from orchestrator.settings import load_settings
from workers.engine_child import engine_main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch

TEXTS: dict[Task, tuple[str, ...]] = {"caption": ("",), "vqa": ("what is this ?",), "itm": ("a dog", "a red cat")}
IMAGES = [np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8) for n in range(9)]


def load(checkpoints: Path, device: torch.device, compiled: bool) -> Engine:
    models: dict[str, str] = {task: str(checkpoints / task) for task in TASKS}
    return Engine.load(models, str(device), "fp32", compiled=compiled)


@pytest.fixture(scope="module")
def engine(checkpoints: Path, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        with load(checkpoints, device, compiled=True) as engine:
            yield engine


def ask(engine: Engine, task: Task, images: list[Any]) -> list[list[Result]]:
    options = options_for(task, {} if task == "itm" else {"num_beams": 3, "max_new_tokens": 9})
    futures = [engine.submit(Request(task, task, image, TEXTS[task], options)) for image in images]
    return [future.result(60) for future in futures]


def test_it_is_compiled(engine: Engine) -> None:
    assert all(runner.resident.compiled for runner in engine._runners.values())


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_those_of_eager_layers(engine: Engine, checkpoints: Path, device: torch.device, task: Task) -> None:
    with load(checkpoints, device, compiled=False) as eager:
        assert not eager._runners[task].resident.compiled
        for found, truth in zip(ask(engine, task, IMAGES), ask(eager, task, IMAGES), strict=True):
            for mine, other in zip(found, truth, strict=True):
                if isinstance(mine, Match) and isinstance(other, Match):
                    assert (mine.itm, mine.itc) == pytest.approx((other.itm, other.itc), abs=1e-5)
                    continue
                assert isinstance(mine, type(other))
                assert mine.text == other.text  # type: ignore[union-attr]
                assert mine.score == pytest.approx(other.score, abs=1e-5)  # type: ignore[union-attr]
                if isinstance(mine, Caption) and isinstance(other, Caption):
                    assert mine.token_ids == other.token_ids


@pytest.mark.parametrize("task", TASKS)
def test_alone_and_in_a_crowd(engine: Engine, task: Task) -> None:
    crowd = ask(engine, task, IMAGES)
    assert ask(engine, task, IMAGES[::-1]) == crowd[::-1]
    for place in (0, 4, 8):
        assert ask(engine, task, [IMAGES[place]]) == [crowd[place]]


def test_batches_of_another_size(engine: Engine) -> None:
    """As after a device ran out of memory: compiled anew, the same captions."""
    runner = engine._runners["caption"]
    before, truth = runner.resident.shapes, ask(engine, "caption", IMAGES)
    engine._steps.call(lambda: runner.resize(Shapes(3, 6))).result(60)
    try:
        found = ask(engine, "caption", IMAGES)
    finally:
        engine._steps.call(lambda: runner.resize(before)).result(60)
    assert [row[0].text for row in found] == [row[0].text for row in truth]  # type: ignore[union-attr]


def test_another_size_that_cannot_be_compiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No batch fails with it; the rest goes on without."""
    runner = engine._runners["caption"]
    before, truth = runner.resident.shapes, ask(engine, "caption", IMAGES)
    layers = runner.resident.model.vision_model.encoder.layers
    with monkeypatch.context() as context:
        context.setattr(type(layers[0]), "compile", lambda *_, **__: 1 / 0)
        engine._steps.call(lambda: runner.resize(Shapes(5, 10))).result(60)
    try:
        assert "not compiled: division by zero" in caplog.text
        assert not runner.resident.compiled
        found = ask(engine, "caption", IMAGES)
    finally:
        runner.resident.compiled = True
        engine._steps.call(lambda: runner.resize(before)).result(60)
    assert runner.resident.compiled
    assert [row[0].text for row in found] == [row[0].text for row in truth]  # type: ignore[union-attr]


class Layer(torch.nn.Module):
    """A layer whose compilation fails, or gives something else."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self._other = compiled

    def forward(self, states: torch.Tensor) -> Any:
        return states + 1, None

    def compile(self, **_: Any) -> None:
        if isinstance(self._other, Exception):
            raise self._other
        self._compiled_call_impl = self._other


@pytest.mark.parametrize(
    ("compiled", "said"),
    [
        (RuntimeError("no C compiler\nfurther lines"), "the vision tower is not compiled: no C compiler"),
        (RuntimeError(), "the vision tower is not compiled: RuntimeError"),
        (lambda states: (states + 2, None), "the vision tower is not compiled: compiled layers differ by"),
        (lambda states: (states * torch.nan, None), "the vision tower is not compiled: compiled layers differ by nan"),
    ],
)
def test_what_cannot_be_compiled_stays(compiled: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    layers, states = [Layer(compiled), Layer(compiled)], torch.zeros(2, 3, 4)
    with caplog.at_level(logging.WARNING):
        assert not compile_layers(layers, lambda: states)
    assert said in caplog.text
    assert "further lines" not in caplog.text
    assert layers[0](states)[0].equal(states + 1)


def test_where_it_happens_by_itself() -> None:
    """On a GPU; a CPU's layers are packed instead."""
    assert load_settings().compile == "auto"
    with Engine(device="cpu") as engine:
        assert not engine._compiled
    assert "compiled" in engine_main.__annotations__
