"""Against transformers on the device of `--device`: forward passes and decoding of the three classes, in fp32.

The other parity tests say it for every argument, on a CPU. Halves: near to our own single precision.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from twins import assert_close, images, texts, twins, words

from blip_engine.requests import TASKS, Task

OPTIONS = [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 4, "repetition_penalty": 1.3, "min_new_tokens": 3}]


@pytest.fixture(autouse=True)
def _exact(device: torch.device) -> Iterator[None]:
    """Convolutions too: by default they are TF32 on a GPU, in transformers and here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_forward(task: Task, device: torch.device) -> None:
    ours, theirs = (model.to(device) for model in twins(task))
    pixels, ids = images(ours).to(device), words(3, 6).to(device)
    if task == "vqa":
        labels = words(3, 4, seed=1).to(device)
        assert_close(ours(ids, pixels, labels=labels).loss, theirs(ids, pixels, labels=labels).loss)
    elif task == "caption":
        assert_close(ours(pixels, ids).logits, theirs(pixels, ids).logits)
    else:
        for head in (True, False):
            found, wanted = (model(ids, pixels, use_itm_head=head).itm_score for model in (ours, theirs))
            assert_close(found, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_generate(task: Task, options: dict[str, float], device: torch.device) -> None:
    ours, theirs = (model.to(device) for model in twins(task, end=2.0))
    pixels = images(ours, 5).to(device)
    asked = {"max_new_tokens": 9, **options}

    def said(model: torch.nn.Module) -> Tensor:
        given = (pixels,) if task == "caption" else (words(5, 6).to(device), pixels)
        return model.generate(*given, **asked)  # type: ignore[operator, no-any-return]

    assert texts(said(ours)) == texts(said(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_half_precision(task: Task, dtype: torch.dtype, device: torch.device) -> None:
    """Hidden states of the vision tower within a few roundings of single precision."""
    ours, _ = (model.to(device) for model in twins(task))
    half = copy.deepcopy(ours).to(dtype)
    pixels = images(ours).to(device)
    exact = ours.vision_model(pixels).last_hidden_state
    near = half.vision_model(pixels.to(dtype)).last_hidden_state.float()
    rounding = torch.finfo(dtype).eps
    assert float((near - exact).abs().max()) <= 8 * rounding * float(exact.abs().max())
