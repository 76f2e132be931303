"""BlipProcessor against transformers': the same features from the same calls, and no argument passed over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small_models import save_checkpoint
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as TheirImageProcessor

from blip_engine import BlipImageProcessor, BlipProcessor

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
    {"images": IMAGE, "text": "a dog", "rescale_factor": -1.0, "padding": "max_length", "max_length": 12},
    {"images": [IMAGE] * 2, "text": TWO, "rescale_factor": -1.0, "padding": "longest"},
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


def test_a_parts_own_values_hold_until_a_call_says_otherwise(processors: tuple[BlipProcessor, Any]) -> None:
    ours, theirs = (
        type(processor)(kind(rescale_factor=-1.0), processor.tokenizer)
        for processor, kind in zip(processors, (BlipImageProcessor, TheirImageProcessor), strict=True)
    )
    for given in ({}, {"rescale_factor": 1.0}):
        mine, other = (model(images=IMAGE, return_tensors="pt", **given).pixel_values for model in (ours, theirs))
        assert torch.equal(mine, other)
        assert (mine.mean() < 0) == (not given)


def test_saved_processors_are_read_by_both(processors: tuple[BlipProcessor, Any], tmp_path: Path) -> None:
    parts = BlipImageProcessor(size=40, do_normalize=False), processors[0].tokenizer
    BlipProcessor(*parts).save_pretrained(tmp_path)
    call = {"images": IMAGE, "text": TWO, "padding": True, "return_tensors": "pt"}
    truth = BlipProcessor(*parts)(**call)
    assert truth.pixel_values.shape == (1, 3, 40, 40)
    for kind in map(type, processors):
        features = kind.from_pretrained(tmp_path, backend="pil")(**call)
        assert all(torch.equal(features[name], value) for name, value in truth.items())


def test_decoding_is_the_tokenizers(processors: tuple[BlipProcessor, Any]) -> None:
    ids = [[1, 4, 5, 8, 1, 0, 8], [3, 4, 3, 1, 1, 8, 9]]
    for skip in (True, False):
        mine, other = (model.batch_decode(ids, skip_special_tokens=skip) for model in processors)
        assert mine == other == processors[0].tokenizer.batch_decode(ids, skip_special_tokens=skip)
        assert processors[0].decode(ids[0], skip_special_tokens=skip) == mine[0]


def test_only_fractions_change_their_type(processors: tuple[BlipProcessor, Any]) -> None:
    given = {"images": IMAGE, "text": "a dog", "return_tensors": "pt"}
    for place in ((torch.float16,), ("cpu", torch.bfloat16)):
        mine, other = (model(**given).to(*place) for model in processors)
        assert {key: value.dtype for key, value in mine.items()} == {key: value.dtype for key, value in other.items()}
        assert mine["pixel_values"].dtype == place[-1]


def test_names_are_shown_without_their_values(processors: tuple[BlipProcessor, Any]) -> None:
    mine, other = (model(images=IMAGE, text="a dog", return_tensors="pt") for model in processors)
    assert sorted(map(repr, mine.keys())) == sorted(map(repr, other.keys()))
    assert repr(mine.keys()) == f"dict_keys({list(mine)})"
    assert [key for key, _ in mine.items()] == list(mine)
    assert [value.shape for value in mine.values()] == [mine[key].shape for key in mine]


def test_an_unknown_argument_is_named_not_passed_over(processors: tuple[BlipProcessor, Any]) -> None:
    for given in ({"text": "a dog"}, {"images": IMAGE}, {"images": IMAGE, "text": "a dog"}):
        with pytest.raises(TypeError, match="BlipProcessor has no argument 'stride'"):
            processors[0](**given, stride=8)
    with pytest.raises(ValueError, match="either images or text"):
        processors[0]()
