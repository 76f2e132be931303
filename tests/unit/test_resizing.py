"""The resize on the engine's device: Pillow's to within a level, and each image's own affair."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip_engine import Engine
from blip_engine.images import decode_image, resized_pixels
from blip_engine.requests import Caption, Request, options_for
from blip_engine.resizing import resized
from workers.load import decode_into
from workers.loader import LoaderLimits
from workers.messages import Failure
from workers.slots import SLOT_BYTES, Slots

SIDE = 96
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def edges(height: int, width: int) -> Pixels:
    """Black and white lines: what overshoots most."""
    lines = np.zeros((height, width, 3), dtype=np.uint8)
    lines[:, ::7] = lines[::5] = 255
    return lines


def photo(height: int, width: int) -> Pixels:
    coarse = Image.fromarray(noise(max(2, height // 8), max(2, width // 8)))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = np.random.default_rng(0).integers(-12, 13, smooth.shape)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


SIZES = [
    (120, 160), (160, 120), (96, 130), (130, 96), (95, 97), (97, 95), (24, 32), (32, 24), (300, 20), (20, 300),
    (97, 96), (96, 97), (99, 97), (98, 97), (144, 120), (145, 120), (96, 96), (1, 1), (500, 333), (333, 500),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [photo, noise, edges])
def test_it_is_pillows_to_within_a_level(kind: "type[object]", size: tuple[int, int], device: torch.device) -> None:
    pixels: Pixels = kind(*size)  # type: ignore[call-arg,assignment]
    found = resized(torch.from_numpy(pixels).to(device), (SIDE, SIDE)).permute(1, 2, 0).cpu().numpy()
    expected = resized_pixels(Image.fromarray(pixels), SIDE)
    off = np.abs(found.astype(int) - expected.astype(int))
    assert off.max() <= 1
    assert off.mean() < 0.002


@pytest.fixture(scope="module")
def engine(device: torch.device) -> Iterator[Engine]:
    with Engine.load({"caption": "demo", "itm": "demo"}, device=str(device), precision="fp32") as engine:
        yield engine


def asked(engine: Engine, images: list[Pixels]) -> list[Caption]:
    options = options_for("caption")
    futures = [engine.submit(Request("caption", "caption", image, ("",), options)) for image in images]
    return [future.result(60)[0] for future in futures]  # type: ignore[misc]


def test_a_crowd_of_all_sizes_changes_no_bit(engine: Engine) -> None:
    height, width = engine.image_size("caption")
    images = [photo(*size) for size in [(120, 160), (height, width), (200, 90), (120, 160), (33, 47)]] * 4
    alone = [asked(engine, [image])[0] for image in images[:5]]
    assert asked(engine, images) == alone * 4
    assert asked(engine, images[::-1]) == (alone * 4)[::-1]


def test_images_at_the_models_size_are_taken_as_they_are(engine: Engine) -> None:
    pixels = photo(*engine.image_size("caption"))
    resident = engine._runners["caption"].resident
    assert torch.equal(resident._block([pixels])[0].cpu(), torch.from_numpy(pixels).permute(2, 0, 1))


def test_what_it_costs_in_captions_and_matches(engine: Engine, tmp_path: Path) -> None:
    """Both resizes on pictures: the same words; scores that differ in the third decimal at most."""
    size = engine.image_size("caption")
    pictures = [np.asarray(Image.fromarray(photo(*size)).resize((150, 110))) for _ in range(4)]
    by_pillow = asked(engine, [resized_pixels(Image.fromarray(picture), size) for picture in pictures])
    on_device = asked(engine, pictures)
    assert [caption.text for caption in on_device] == [caption.text for caption in by_pillow]
    for one, other in zip(on_device, by_pillow, strict=True):
        assert one.score == pytest.approx(other.score, abs=5e-3)


class TestLoaders:
    def png(self, folder: Path, pixels: Pixels) -> bytes:
        Image.fromarray(pixels).save(folder / "a.png")
        return (folder / "a.png").read_bytes()

    def limits(self, **more: bool) -> LoaderLimits:
        return LoaderLimits(10**8, 10**8, 5.0, 30.0, **more)  # type: ignore[arg-type]

    def test_they_ship_the_pixels_as_they_are(self, tmp_path: Path) -> None:
        slots, pixels = Slots(1), photo(60, 80)
        outcome = decode_into(slots, 0, self.png(tmp_path, pixels), (SIDE, SIDE), self.limits(resize=False))
        assert outcome == (60, 80)
        assert np.array_equal(slots.pixels(0, (60, 80)), pixels)

    def test_what_does_not_fit_a_slot_is_resized_by_them(self, tmp_path: Path) -> None:
        slots, pixels = Slots(1), noise(1200, 1200)
        assert pixels.nbytes > SLOT_BYTES
        outcome = decode_into(slots, 0, self.png(tmp_path, pixels), (SIDE, SIDE), self.limits(resize=False))
        assert outcome == (SIDE, SIDE)
        assert np.array_equal(slots.pixels(0, (SIDE, SIDE)), resized_pixels(Image.fromarray(pixels), SIDE))

    def test_large_jpegs_may_be_decoded_smaller(self, tmp_path: Path) -> None:
        pixels = photo(800, 1200)
        Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=90)
        data = (tmp_path / "a.jpg").read_bytes()
        slots = Slots(2)
        for slot, draft in enumerate((False, True)):
            assert decode_into(slots, slot, data, (SIDE, SIDE), self.limits(draft=draft)) == (SIDE, SIDE)
        off = np.abs(slots.pixels(0, (SIDE, SIDE)).astype(int) - slots.pixels(1, (SIDE, SIDE)).astype(int))
        assert 0 < off.mean() < 1
        assert decode_image(data, draft=2 * SIDE).size == (300, 200)  # no side below 192
        assert decode_image(data, draft=801).size == decode_image(data).size == (1200, 800)
        assert decode_image(self.png(tmp_path, pixels), draft=SIDE).size == (1200, 800)

    def test_a_bad_image_has_its_code(self) -> None:
        outcome = decode_into(Slots(1), 0, b"no image", (SIDE, SIDE), self.limits(resize=False, draft=True))
        assert isinstance(outcome, Failure)
        assert outcome.code == "image_unreadable"
