"""What half precision and int8 cost, on held-out drawings through the engine: hardly a row, and little of a score."""

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from blip_engine import Engine, attention
from blip_engine.requests import TASKS, Task
from blip_engine.shapes.scenes import held_out_drawings
from blip_engine.shapes.texts import mismatch, questions

COUNT = 400
DROP = 0.005  # of the rows
SCORE = 0.05  # median difference of a score or a probability


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def asked(task: Task) -> tuple[list[Any], list[str], list[Any]]:
    """Images, texts, and what is right."""
    drawn = list(held_out_drawings(COUNT, seed=3))
    images = [each.image() for each in drawn]
    if task == "caption":
        return images, [""] * COUNT, [each.scene.caption for each in drawn]
    if task == "vqa":
        picked = [(every := questions(each.scene, Random(n)))[n % len(every)] for n, each in enumerate(drawn)]
        return images, [question.text for question in picked], [question.answer for question in picked]
    pairs = [(each.scene if n % 2 else mismatch(each.scene, Random(n))).caption for n, each in enumerate(drawn)]
    return images, pairs, [bool(n % 2) for n in range(COUNT)]


def run(task: Task, precision: str, device: torch.device) -> tuple[float, list[Any], "np.ndarray[Any, Any]"]:
    """Accuracy, what was said, and the scores."""
    images, texts, right = asked(task)
    with Engine.load({task: "demo"}, str(device), precision) as engine:
        if task == "itm":
            matches = engine.match(images, texts)
            said: list[Any] = [match.itm >= 0.5 for match in matches]
            scores = [match.itm for match in matches]
        else:
            found: Any = engine.caption(images) if task == "caption" else engine.answer(images, texts)
            said, scores = [each.text for each in found], [each.score for each in found]
    return float(np.mean([one == other for one, other in zip(said, right, strict=True)])), said, np.array(scores)


@pytest.mark.parametrize("task", TASKS)
def test_half_precision(task: Task, device: torch.device) -> None:
    exact, words, scores = run(task, "fp32", device)
    assert exact >= 0.97
    for precision in ("bf16", "fp16") if device.type == "cuda" else ("bf16", "int8"):
        near, said, others = run(task, precision, device)
        assert near >= exact - DROP
        same = [n for n in range(COUNT) if said[n] == words[n]]
        assert len(same) >= (1 - 2 * DROP) * COUNT
        assert np.median(np.abs(others[same] - scores[same])) <= SCORE


@pytest.mark.parametrize(("amx", "dtype", "products"), [
    (False, torch.bfloat16, True), (True, torch.bfloat16, False), (False, torch.float32, False),
])  # fmt: skip
def test_the_processor_alone_decides_how_attention_is_done(
    amx: bool, dtype: torch.dtype, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement would decide otherwise in a busy minute, and then two workers' results would differ."""
    monkeypatch.setattr(attention, "cpu_features", lambda: {"amx_bf16": amx})
    monkeypatch.setattr(attention, "_has_amx", attention._has_amx.__wrapped__)  # asks anew
    assert attention.prefers_products("cpu", dtype) is products
    assert not attention.prefers_products("cuda", dtype)
