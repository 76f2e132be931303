"""BlipProcessor against transformers': the same features from the same calls, and no argument passed over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small_models import save_checkpoint

from blip_engine import BlipProcessor

IMAGE = Image.linear_gradient("L").convert("RGB")
TWO = ["a dog", "the cats sit on a photo"]
CALLS: list[dict[str, Any]] = [
    {"text": "a dog"},
    {"text": TWO},
    {"text": TWO, "padding": True, "return_tensors": "pt"},
    {"text": TWO, "padding": "longest", "return_tensors": "np"},
    {"text": TWO, "padding": "max_length", "max_length": 9, "return_tensors": "pt"},
    {"text": TWO, "padding": True, "truncation": True, "max_length": 5, "return_tensors": "pt"},
    {"text": TWO, "padding": True, "pad_to_multiple_of": 8, "return_tensors": "pt"},
    {"text": TWO, "max_length": 4},
    {"text": TWO, "padding": True, "padding_side": "left", "return_tensors": "np", "return_attention_mask": False},
    {"text": "a dog", "add_special_tokens": False, "truncation": "only_first", "max_length": 1},
    {"images": IMAGE, "return_tensors": "pt"},
    {"images": [IMAGE, IMAGE.rotate(90)], "return_tensors": "np"},
    {"images": IMAGE, "text": TWO, "padding": True, "return_tensors": "pt"},
    {"images": IMAGE, "text": "a dog", "do_resize": False, "return_tensors": "pt"},
    {"images": IMAGE, "size": {"height": 24, "width": 40}, "do_normalize": False, "return_tensors": "pt"},
    {"images": np.full((3, 20, 20), 0.5, np.float32), "do_rescale": False, "return_tensors": "pt"},
]


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlipProcessor, Any]:
    folder: Path = save_checkpoint(tmp_path_factory.mktemp("processor"), "caption")
    return BlipProcessor.from_pretrained(folder), transformers.BlipProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("call", CALLS, ids=", ".join)
def test_features(processors: tuple[BlipProcessor, Any], call: dict[str, Any]) -> None:
    mine, other = (processor(**call) for processor in processors)
    assert list(mine) == list(other)
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine[name], value)
        else:
            assert type(mine[name]) is type(value)
            np.testing.assert_equal(mine[name], value)


def test_an_unknown_argument_is_named_not_passed_over(processors: tuple[BlipProcessor, Any]) -> None:
    for given in ({"text": "a dog"}, {"images": IMAGE}, {"images": IMAGE, "text": "a dog"}):
        with pytest.raises(TypeError, match="BlipProcessor has no argument 'stride'"):
            processors[0](**given, stride=8)
    with pytest.raises(ValueError, match="either images or text"):
        processors[0]()
