"""Which part of the engine's work a moment belongs to: watching the model's parts by name while a batch runs."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import record_function

from blip_engine import search, text_layers, vision
from blip_engine.absorption import Absorbed
from blip_engine.generation import Memory, Prompt, generate
from blip_engine.graphs import GraphedDecoder
from blip_engine.requests import GenerationOptions
from blip_engine.resident import ResidentModel
from blip_engine.runner import Runner
from blip_engine.search import Generated

from .common import synchronise

PREFIX = "stage: "
HOST = "host and rest"
#: in the order of the work
STAGES = (
    "pixels", "vision", "vision attention", "cross K/V", "K/V gather", "text encoder", "text attention", "decoder",
    "head", "search", HOST,
)  # fmt: skip


def _parts(runner: Runner[Any]) -> list[tuple[str, Any, str]]:
    """(stage, owner, name) of the functions that are watched; the inner one of nested ones has the time."""
    resident = runner.resident
    model: Any = resident.model
    parts: list[tuple[str, Any, str]] = [
        ("pixels", resident, "_normalise"),
        ("vision", model.vision_model, "forward"),
        ("vision attention", vision, "attend"),
        ("cross K/V", resident, "_project_cross"),
        ("K/V gather", ResidentModel, "keys_of_groups"),
        ("text attention", text_layers, "attend"),
        ("text attention", Absorbed, "attend"),
    ]
    if hasattr(model, "text_encoder"):
        parts.append(("text encoder", model.text_encoder, "forward"))
    if hasattr(model, "text_decoder"):
        parts += [("decoder", model.text_decoder.bert, "forward"), ("head", model.text_decoder.cls, "forward")]
    for kind in (search.BeamSearch, search.TokenSearch):
        parts += [("search", kind, name) for name in ("advance", "settled", "result")]
    return parts


class Watch:
    """Seconds and calls of every stage, each without the stages inside it."""

    def __init__(self, device: torch.device, exact: bool) -> None:
        """`exact`: wait for the device at every border, so that its work counts where it was asked for."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._device, self._exact = device, exact
        self._inside: list[float] = []  # seconds of inner stages, per open stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time of this block is the stage's."""
        if self._exact:
            synchronise(self._device)
        started = time.perf_counter()
        self._inside.append(0.0)
        try:
            with record_function(PREFIX + name):
                yield
        finally:
            if self._exact:
                synchronise(self._device)
            took = time.perf_counter() - started
            self.seconds[name] += took - self._inside.pop()
            self.calls[name] += 1
            if self._inside:
                self._inside[-1] += took


@contextmanager
def watching(runner: Runner[Any], exact: bool = True) -> Iterator[Watch]:
    """Watch what runs until the block ends, in this thread. A part that is not there any more raises AttributeError.

    Decoding runs without CUDA graphs.
    """
    watch = Watch(runner.resident.device, exact)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            with watch.stage(name):
                return function(*args, **more)

        return call

    def step_by_step(
        prompt: Prompt, memory: Memory, options: GenerationOptions, uniforms: Any = None, _used: Any = None
    ) -> Generated:
        return generate(runner.resident.model.text_decoder, prompt, memory, options, uniforms=uniforms)

    with ExitStack() as stack:
        for name, owner, attribute in _parts(runner):
            stack.enter_context(patch.object(owner, attribute, watched(name, getattr(owner, attribute))))
        if isinstance(graphed := getattr(runner, "_decoder", None), GraphedDecoder):
            stack.enter_context(patch.object(graphed, "generate", step_by_step))
        yield watch
