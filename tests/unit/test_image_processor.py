"""The image processor is bit-equal with transformers' Pillow one, and says so where it cannot take an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as Theirs

from blip_engine import BlipImageProcessor
from blip_engine.errors import CheckpointError, InputError
from blip_engine.images import resized_pixels

CHANNELS = {"RGB": 3, "L": 1, "LA": 2, "RGBA": 4, "CMYK": 4}
SWITCHES: list[dict[str, Any]] = [
    {"do_resize": False},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_resize": False, "do_rescale": False},
    {"do_resize": False, "do_rescale": False, "do_normalize": False},
    {"resample": int(Image.Resampling.BILINEAR)},
    {"rescale_factor": 1 / 128},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    {"image_mean": 0.5, "image_std": 0.25},
    {"size": {"height": 24, "width": 40}},
]


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, CHANNELS[mode]), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode)


def assert_same(image: Any, **options: Any) -> None:
    """Ours and theirs agree in every bit and in the type."""
    ours = BlipImageProcessor(**options)(image, return_tensors="np").pixel_values
    theirs = Theirs(**options)(image, return_tensors="np").pixel_values
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
class TestPillowImages:
    @pytest.mark.parametrize("size", [384, 64])
    @pytest.mark.parametrize("shape", [(64, 48), (640, 480), (100, 999), (1, 1), (3, 200)])
    @pytest.mark.parametrize("mode", list(CHANNELS))
    def test_modes(self, mode: str, shape: tuple[int, int], size: int) -> None:
        assert_same(noise(mode, *shape), size=size)

    def test_palettes(self) -> None:
        palette = noise("RGB", 70, 50).quantize(32)
        assert palette.mode == "P"
        assert_same(palette)
        palette.info["transparency"] = 3
        assert_same(palette)

    def test_black_and_white_and_sixteen_bits(self) -> None:
        assert_same(noise("L", 33, 20).convert("1"))
        assert_same(Image.fromarray(np.linspace(0, 65535, 600, dtype=np.uint16).reshape(20, 30)))
        assert_same(noise("RGB", 33, 20).convert("HSV"))

    def test_transparency_is_composited_on_white(self) -> None:
        image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
        pixels = BlipImageProcessor(do_normalize=False)(image, return_tensors="np").pixel_values
        assert (pixels == 1.0).all()

    def test_unconverted_modes(self) -> None:
        for mode in ("L", "RGBA", "CMYK"):
            assert_same(noise(mode, 30, 20), do_convert_rgb=False, do_normalize=False)
        assert_same(noise("RGB", 30, 20), do_convert_rgb=False)

    @settings(max_examples=40, deadline=None)
    @given(
        width=st.integers(1, 300),
        height=st.integers(1, 300),
        target=st.tuples(st.integers(1, 96), st.integers(1, 96)),
        mode=st.sampled_from(list(CHANNELS)),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_size(self, width: int, height: int, target: tuple[int, int], mode: str, seed: int) -> None:
        assert_same(noise(mode, width, height, seed), size={"height": target[0], "width": target[1]})

    @pytest.mark.parametrize("switches", SWITCHES, ids=str)
    def test_switches(self, switches: dict[str, Any]) -> None:
        assert_same(noise("RGB", 60, 50), **switches)

    def test_several_images_and_overrides_in_the_call(self) -> None:
        images = [noise("RGB", 60, 50, seed) for seed in range(3)]
        assert_same(images)
        size = {"height": 32, "width": 32}
        ours = BlipImageProcessor()(images, return_tensors="pt", size=size, do_normalize=False).pixel_values
        theirs = Theirs()(images, return_tensors="pt", size=size, do_normalize=False).pixel_values
        assert torch.equal(ours, theirs)


def array(*shape: int, dtype: Any = np.uint8) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).astype(dtype)


class TestArrays:
    @pytest.mark.parametrize("shape", [(50, 60, 3), (3, 50, 60), (50, 60, 1), (1, 50, 60), (50, 60, 4), (4, 50, 60)])
    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
    def test_shapes_and_types(self, shape: tuple[int, ...], dtype: Any) -> None:
        values = array(*shape, dtype=dtype)
        if 4 in shape and np.issubdtype(dtype, np.floating):  # fractions, or else refused by both
            values /= 255
        assert_same(values)
        assert_same(torch.from_numpy(values))

    @pytest.mark.parametrize("shape", [(3, 40, 3), (3, 4, 1), (1, 40, 3), (4, 30, 4)])
    def test_ambiguous_layouts_are_read_as_transformers_reads_them(self, shape: tuple[int, ...]) -> None:
        assert_same(array(*shape))

    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_fractions(self, dtype: Any, rescale: bool) -> None:
        values = (array(50, 60, 3, dtype=np.float32) / 255).astype(dtype)
        assert_same(values, do_rescale=rescale)
        assert_same(values, do_resize=False, do_rescale=rescale)

    def test_whole_zeros_and_ones_are_levels_not_fractions(self) -> None:
        assert_same((array(20, 30, 3) > 100).astype(np.float32))
        assert_same(array(20, 30, 3) > 100)

    def test_a_fourth_dimension_is_a_batch(self) -> None:
        assert_same(array(2, 20, 30, 3))
        assert_same(torch.from_numpy(array(2, 3, 20, 30)))

    def test_two_dimensions_are_gray(self) -> None:  # transformers refuses them
        gray = array(20, 30)
        ours = BlipImageProcessor()(gray, return_tensors="np").pixel_values
        np.testing.assert_array_equal(ours, BlipImageProcessor()(gray[None], return_tensors="np").pixel_values)

    @pytest.mark.parametrize(
        "values",
        [np.full((8, 9, 3), 300), np.full((8, 9, 3), -1), np.full((8, 9, 3), 1.5), np.full((8, 9, 4), 7.0)],
        ids=["above", "below", "fraction above 1", "fractions with alpha above 1"],
    )
    def test_values_out_of_range_are_refused_by_both(self, values: Any) -> None:
        with pytest.raises(ValueError, match="outside the range"):
            Theirs()(values)
        with pytest.raises(InputError, match="0 to"):
            BlipImageProcessor()(values)

    @pytest.mark.parametrize(
        ("image", "fault"),
        [("a.jpg", "not str"), (np.zeros(3), r"not \(3,\)"), (np.zeros((5, 6, 7)), "channels"), (None, "NoneType")],
    )
    def test_what_is_no_image_is_named(self, image: Any, fault: str) -> None:
        with pytest.raises(InputError, match=fault):
            BlipImageProcessor()([image])

    def test_channels_without_means_are_refused(self) -> None:
        for processor in (BlipImageProcessor(do_convert_rgb=False), Theirs(do_convert_rgb=False)):
            with pytest.raises(ValueError, match="mean"):
                processor(array(20, 30, 1))


class TestFiles:
    @pytest.mark.parametrize("size", [384, {"height": 384, "width": 384}, 48])
    def test_hub_configurations(self, size: Any, tmp_path: Path) -> None:
        hub = {
            "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True, "size_divisor": 32,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "resample": 3,
            "rescale_factor": 0.00392156862745098, "size": size, "crop_size": None,
        }  # fmt: skip
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(hub))
        images = [noise("RGB", 70, 50), noise("RGB", 20, 90)]
        ours = BlipImageProcessor.from_pretrained(tmp_path)(images, return_tensors="np").pixel_values
        theirs = Theirs.from_pretrained(tmp_path)(images, return_tensors="np").pixel_values
        np.testing.assert_array_equal(ours, theirs)

    def test_saved_files_are_read_by_both(self, tmp_path: Path) -> None:
        ours = BlipImageProcessor(size=40, image_std=[0.3, 0.2, 0.1])
        ours.save_pretrained(tmp_path)
        again, theirs = BlipImageProcessor.from_pretrained(tmp_path), Theirs.from_pretrained(tmp_path)
        image = noise("RGB", 70, 50)
        for other in (again, theirs):
            np.testing.assert_array_equal(ours(image)["pixel_values"][0], other(image)["pixel_values"][0])

    def test_files_saved_by_transformers(self, tmp_path: Path) -> None:
        theirs = Theirs(size={"height": 40, "width": 24})
        theirs.save_pretrained(tmp_path)
        ours, image = BlipImageProcessor.from_pretrained(tmp_path), noise("RGB", 70, 50)
        np.testing.assert_array_equal(ours(image)["pixel_values"][0], theirs(image)["pixel_values"][0])

    @pytest.mark.parametrize("text", ["{", "[1]", '{"size": "large"}', '{"size": {"width": 3}}'])
    def test_a_broken_file_is_named(self, text: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no preprocessor_config\.json"):
            BlipImageProcessor.from_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is no preprocessor configuration"):
            BlipImageProcessor.from_pretrained(tmp_path)


def test_what_the_workers_resize_is_what_the_processor_resizes() -> None:
    image = noise("RGB", 333, 222)
    pixels = BlipImageProcessor(size=96, do_rescale=False, do_normalize=False)(image, return_tensors="np").pixel_values
    np.testing.assert_array_equal(np.moveaxis(pixels[0], 0, -1), resized_pixels(image, 96))
