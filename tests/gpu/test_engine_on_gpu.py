"""What only a GPU shows: memory that runs out, the kernels chosen, half precision, waits for the device.

    pytest --device cuda -m gpu

runs these and every other test that uses the `device` fixture: parity, batch invariance and the engine. Each engine
compiles its vision tower there; TORCH_COMPILE_DISABLE=1 spares that to all but tests/unit/test_compiling.py.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import save_checkpoint, small_config
from torch.profiler import ProfilerActivity, profile

from blip_engine import Engine
from blip_engine.checkpoint import find_checkpoint
from blip_engine.requests import TASKS, Request, Task, options_for
from blip_engine.resident import ResidentModel, Shapes
from blip_engine.runner import runner_for

pytestmark = pytest.mark.gpu

#: As wide as BLIP base, with one layer of each kind.
WIDE = small_config(
    {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 1,
        "image_size": 384, "patch_size": 16, "initializer_range": 0.03,
    },
    {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 1,
        "initializer_range": 0.005,
    },
)  # fmt: skip
PICTURES = [np.random.default_rng(n).integers(0, 256, (384, 384, 3), dtype=np.uint8) for n in range(4)]
TEXTS: dict[Task, str] = {"caption": "", "vqa": "how many dogs are in this picture ?", "itm": "a red dog"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for task in TASKS:
        save_checkpoint(root / task, task, **WIDE)
    return root


def engine(folder: Path, device: torch.device, precision: str) -> Engine:
    return Engine.load({task: str(folder / task) for task in TASKS}, str(device), precision)


def request(task: Task, pixels: Any) -> Request:
    options = {} if task == "itm" else {"max_new_tokens": 8, "min_new_tokens": 8}
    return Request(task, task, pixels, (TEXTS[task],), options_for(task, options))


@pytest.fixture
def little_memory(device: torch.device) -> Iterator[None]:
    """About 3 GiB of the device for torch; weights and one small batch fit, the largest batch does not."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    index = device.index or 0  # a device without one is refused
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3 * 2**30 / total), index)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, index)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_memory_that_runs_out_halves_the_batches(folder: Path, device: torch.device) -> None:
    with engine(folder, device, "fp32") as held:
        truth = held.caption(PICTURES, max_new_tokens=4)
        held._runners["caption"].resident.shapes = Shapes(
            512, 1024
        )  # 2 GB of pixels alone, several of each layer's states
        found = held.caption(PICTURES, max_new_tokens=4)
        assert held.oom_splits >= 1
        assert held._runners["caption"].resident.shapes.images < 512
        assert [caption.text for caption in found] == [caption.text for caption in truth]
        assert held.caption(PICTURES, max_new_tokens=4) == found  # and it goes on, with the smaller batches


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_vision_uses_flash_attention(folder: Path, device: torch.device, precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    resident: ResidentModel[Any] = ResidentModel(find_checkpoint(folder / "caption"), "caption", device, dtype)
    resident.shapes = Shapes(4, 8)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        resident.image_states(PICTURES)
        torch.cuda.synchronize()
    names = {event.key for event in seen.key_averages()}
    assert any("flash" in name or "cudnn_attention" in name for name in names), sorted(names)


@pytest.mark.parametrize("task", TASKS)
def test_texts_do_without_plans(folder: Path, device: torch.device, task: Task) -> None:
    """cuDNN makes one for every shape, and decoding has another shape in every step."""
    resident: ResidentModel[Any] = ResidentModel(find_checkpoint(folder / task), task, device, torch.bfloat16)
    resident.shapes = Shapes(4, 8)
    runner = runner_for(task, resident)
    begun = runner.begin([runner.prepare(request(task, pixels)) for pixels in PICTURES])
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        runner.finish(begun)
        torch.cuda.synchronize()
    assert not [event.key for event in seen.key_averages() if "cudnn" in event.key and "attention" in event.key]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_to_single(folder: Path, device: torch.device, precision: str) -> None:
    """Within three times the rounding of the type, by the greatest vector or score."""
    with engine(folder, device, "fp32") as exact, engine(folder, device, precision) as half:
        vectors = [held.embed(images=PICTURES) for held in (exact, half)]
        np.testing.assert_allclose(vectors[1], vectors[0], atol=3 * 2**-8)
        matches = [[match.itm for match in held.match(PICTURES, [TEXTS["itm"]] * 4)] for held in (exact, half)]
        assert matches[1] == pytest.approx(matches[0], abs=3 * 2**-6)
        scores = [held.caption(PICTURES, num_beams=1, max_new_tokens=1)[0].score for held in (exact, half)]
        assert scores[1] == pytest.approx(scores[0], rel=0.05)


@pytest.mark.parametrize("task", TASKS)
def test_single_precision_is_single(folder: Path, device: torch.device, task: Task) -> None:
    """`fp32` on a GPU is no TF32: as on a CPU within rounding, tokens equal."""
    with engine(folder, device, "fp32") as gpu, engine(folder, torch.device("cpu"), "fp32") as cpu:
        for pixels in PICTURES[:2]:
            (mine,), (other,) = (held.submit(request(task, pixels)).result(120) for held in (gpu, cpu))
            if task == "itm":
                assert mine.itm == pytest.approx(other.itm, abs=1e-5)
                assert mine.itc == pytest.approx(other.itc, abs=1e-5)
            else:
                assert mine.text == other.text
                assert mine.score == pytest.approx(other.score, abs=1e-4)


def test_waits_for_the_device(folder: Path, device: torch.device) -> None:
    """One every few steps, and those for what is brought to the device and read from it."""
    resident: ResidentModel[Any] = ResidentModel(find_checkpoint(folder / "caption"), "caption", device, torch.bfloat16)
    resident.shapes = Shapes(4, 8)
    runner = runner_for("caption", resident)
    batch = [runner.prepare(request("caption", pixels)) for pixels in PICTURES]
    for _ in range(2):  # kernels and libraries are loaded at the first run, and decoding is captured at the second
        runner.run(batch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")  # warns of itself, too
            runner.run(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in told if "synchronizing" in str(warning.message)]
    assert len(waits) <= 2 + 3 + 4, waits  # every few steps, results, and what is brought to the device


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_decoding_is_captured_and_stays_the_same(
    folder: Path, device: torch.device, task: Task, precision: torch.dtype
) -> None:
    resident: ResidentModel[Any] = ResidentModel(find_checkpoint(folder / task), task, device, precision)
    resident.shapes = Shapes(4, 8)
    runner = runner_for(task, resident)
    batches = [[runner.prepare(request(task, pixels)) for pixels in PICTURES[n:] + PICTURES[:n]] for n in range(4)]
    usual, captured, *replayed = [runner.run(batch) for batch in batches]
    assert not runner._decoder._refused  # type: ignore[union-attr]
    assert all(kind is not None for kind in runner._decoder._kinds.values())  # type: ignore[union-attr]
    for n, found in enumerate((captured, *replayed), 1):
        assert found == usual[n:] + usual[:n]


def test_vision_and_text_stay_on_the_device(folder: Path, device: torch.device) -> None:
    with engine(folder, device, "auto") as held:
        for runner in held._runners.values():
            assert {parameter.device.type for parameter in runner.resident.model.parameters()} == {"cuda"}
            assert runner.resident.dtype in {torch.bfloat16, torch.float16}
