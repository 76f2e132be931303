"""A row's result is bit for bit the same alone, in a crowd, at every place and in any order.

The small models say that rows never mix. The wide ones have the widths of BLIP base, where matrix products choose
their kernels by the shapes they get: with `runner.run` on batches of any length, as a job's last chunk has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import save_checkpoint, small_config

from blip_engine.checkpoint import find_checkpoint
from blip_engine.requests import TASKS, MatchOptions, Request, Result, Task, options_for
from blip_engine.resident import ResidentModel
from blip_engine.runner import EmbedRunner, Runner, runner_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
TEXTS: dict[Task, list[tuple[str, ...]]] = {
    "caption": [("",), ("a dog",), ("",), ("the picture of a red cat on the left is",), ("a", ""), ("",)],
    "vqa": [
        ("what is this ?",),
        ("how many dogs are in this picture of a red cat on the left ?", "what ?"),
        ("is the dog red ?",),
        ("a",),
    ],
    "itm": [("a dog",), ("a picture of two cats on the left in this photo of a red dog",), ("a", "the dogs run", "")],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "greedy": {"num_beams": 1},
    "penalties": {"num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.3, "min_new_tokens": 4},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 2.0, "num_return_sequences": 2, "seed": 7},
}
CASES = [(task, name) for task in TASKS for name in OPTIONS if task != "itm" or name == "default"]
WIDE = small_config(
    {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 1,
        "image_size": 384, "patch_size": 16, "initializer_range": 0.03,
    },
    {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 2,
        "vocab_size": 30524, "initializer_range": 0.005,
    },
) | {"image_text_hidden_size": 256}  # fmt: skip


def runner(
    folder: Path, task: Task, dtype: str, device: torch.device, config: dict[str, Any] | None = None
) -> Runner[Any]:
    if not (folder / "config.json").is_file():
        save_checkpoint(folder, task, **(config or {}))
    if dtype == "int8" and device.type != "cpu":
        pytest.skip("int8 is for CPUs")
    resident: ResidentModel[Any] = ResidentModel(
        find_checkpoint(folder), task, device, DTYPES[dtype], int8=dtype == "int8"
    )
    return runner_for(task, resident)


def requests(runner: Runner[Any], task: Task, number: int, **options: Any) -> list[Request]:
    random, chosen = np.random.default_rng(1), options_for(task, options)
    pictures = [random.integers(0, 256, (*runner.resident.image_size, 3), dtype=np.uint8) for _ in range(number)]
    texts = TEXTS[task]
    return [Request("m", task, pixels, texts[i % len(texts)], chosen) for i, pixels in enumerate(pictures)]


def run(runner: Runner[Any], batch: Sequence[Request]) -> list[list[Result]]:
    return runner.run([runner.prepare(request) for request in batch])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("task", "name"), CASES)
def test_small_models(folder: Path, task: Task, name: str, dtype: str, device: torch.device) -> None:
    model = runner(folder / task, task, dtype, device)
    images = model.resident.shapes.images
    batch = requests(model, task, images + 3, **OPTIONS[name])
    crowd = run(model, batch)
    assert all(len(found) == len(request.texts) for found, request in zip(crowd, batch, strict=True))
    assert len({str(found[0]) for found in crowd}) > len(crowd) // 2  # rows differ, so that a mix-up would show
    assert run(model, batch[::-1]) == crowd[::-1]
    for row in (0, 1, images - 1, images, images + 2):
        assert run(model, [batch[row]]) == [crowd[row]]
    for shift in (1, 5, images - 1):  # every place of a batch, and other last rows
        turned = [*range(shift, len(batch)), *range(shift)]
        assert run(model, [batch[row] for row in turned]) == [crowd[row] for row in turned]
    assert run(model, [batch[2]] * 5) == [crowd[2]] * 5


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", TASKS)
def test_wide_models(folder: Path, task: Task, dtype: str, device: torch.device) -> None:
    model = runner(folder / f"wide-{task}", task, dtype, device, WIDE)
    images = model.resident.shapes.images
    batch = requests(model, task, images + 1, **({} if task == "itm" else {"max_new_tokens": 3}))
    crowd = run(model, batch)
    last = images  # the lonely row of the last block of images
    assert run(model, [batch[last]]) == [crowd[last]]
    assert run(model, [batch[last], *batch[1:images]]) == [crowd[last], *crowd[1:images]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings(folder: Path, dtype: str, device: torch.device) -> None:
    model: Any = runner(folder / "itm", "itm", dtype, device)
    pixels = [request.pixels for request in requests(model, "itm", model.resident.shapes.images + 3)]
    texts = [f"a {word} dog" * (1 + i % 4) for i, word in enumerate(["red", "blue", "green"] * 9)]
    pictures, words = model.embed_images(pixels), model.embed_texts(texts, MatchOptions())
    for row in (0, 5, len(pixels) - 1):
        assert model.embed_images([pixels[row]])[0].equal(pictures[row])
    for row in range(len(texts)):
        assert model.embed_texts([texts[row]], MatchOptions())[0].equal(words[row])


@pytest.mark.parametrize("config", [None, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_requests(folder: Path, dtype: str, config: dict[str, Any] | None, device: torch.device) -> None:
    model = EmbedRunner(runner(folder / ("wide-itm" if config else "itm"), "itm", dtype, device, config).resident)
    images = model.resident.shapes.images
    batch = [
        replace(request, task="embed", options=options_for("embed"), texts=(*request.texts, ""))
        for request in requests(model, "itm", images + 1)
    ]
    crowd = run(model, batch)
    assert run(model, batch[::-1]) == crowd[::-1]
    for row in (0, 1, images - 1, images):
        assert run(model, [batch[row]]) == [crowd[row]]
        assert run(model, [replace(batch[row], texts=batch[row].texts[:1])]) == [crowd[row][:1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_chosen_answers(folder: Path, dtype: str, device: torch.device) -> None:
    model = runner(folder / "vqa", "vqa", dtype, device)
    words = ["red", "blue", "a dog", "a cat on the left", "two dogs in a picture of the red cat", "yes", "no"]
    batch = [replace(request, candidates=tuple(words[i % 3 :])) for i, request in enumerate(requests(model, "vqa", 7))]
    crowd = run(model, batch)
    assert run(model, batch[::-1]) == crowd[::-1]
    for row in range(len(batch)):
        assert run(model, [batch[row]]) == [crowd[row]]
