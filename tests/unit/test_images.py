"""Decoding of image files: what comes out of the odd ones, and that hostile ones give one clear error."""

import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image, features
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip_engine.errors import ImageError
from blip_engine.images import FORMATS, ImageLimits, decode_image, resized_pixels


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """Every pixel differs from its neighbours, and no turn or flip maps it to itself."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 3], axis=-1).astype(np.uint8))


def refusal(data: bytes, limits: ImageLimits | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, limits or ImageLimits())
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encoded(gradient(), kind, **options))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(gradient()))


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_lossy_formats_come_back_nearly(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    decoded = decode_image(encoded(gradient(), kind, quality=95))
    assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(gradient())).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, 1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
def test_exif_orientation_is_applied(kind: str, orientation: int, stored: Callable[[Any], Any]) -> None:
    upright = np.asarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    file = encoded(Image.fromarray(np.ascontiguousarray(stored(upright))), kind, exif=exif, **options)
    decoded = np.asarray(decode_image(file), dtype=int)
    assert decoded.shape == upright.shape
    assert np.abs(decoded - upright).max() <= (8 if kind == "JPEG" else 0)


def test_unknown_and_broken_orientations_leave_the_image_as_it_lies() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert decode_image(encoded(gradient(), "PNG", exif=exif)).size == gradient().size
    broken = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode_image(broken).size == gradient().size


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), kind)))
    assert np.array_equal(decoded[..., 0], np.rint(values / 257).astype(np.uint8))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_32_bit_and_float_gray_are_stretched() -> None:
    for values in (np.array([[-1000, 0], [500, 1000]], np.int32), np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32)):
        decoded = np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF")))
        assert decoded[..., 0].tolist() == [[0, 128], [191, 255]]
    flat = np.full((2, 2), np.nan, np.float32)
    assert not np.asarray(decode_image(encoded(Image.fromarray(flat), "TIFF"))).any()


def test_alpha_is_composited_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (200, 0, 0, alpha))
    decoded = decode_image(encoded(image, "PNG"))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (227, 127, 127)
    assert decoded.getpixel((2, 0)) == (200, 0, 0)
    gray = Image.new("LA", (1, 1), (10, 0))
    assert decode_image(encoded(gray, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        decoded = decode_image(encoded(image, kind))
        assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]
    for kind in ("PNG", "GIF"):
        decoded = decode_image(encoded(image, kind, transparency=0))
        assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]
    several = encoded(image, "PNG", transparency=b"\x00\xff")  # an alpha per color: Pillow would warn
    assert decode_image(several).getpixel((0, 0)) == (255, 255, 255)


def test_gray_bilevel_and_cmyk() -> None:
    assert decode_image(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("L", (4, 4), 77), "JPEG")).getpixel((0, 0)) == (77, 77, 77)
    for kind in ("JPEG", "TIFF"):
        red = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind)).getpixel((4, 4))
        assert isinstance(red, tuple)
        assert np.abs(np.array(red) - (255, 0, 0)).max() < 5


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(file).getpixel((4, 4)) == (255, 0, 0)


def test_a_cap_on_bytes_pixels_and_frames() -> None:
    file = encoded(gradient(), "PNG")
    assert refusal(file, ImageLimits(max_bytes=len(file) - 1)).code == "image_too_large"
    assert refusal(file, ImageLimits(max_pixels=40 * 24 - 1)).code == "image_too_large"
    assert decode_image(file, ImageLimits(max_bytes=len(file), max_pixels=40 * 24)).size == (40, 24)
    frames = [Image.new("RGB", (4, 4), (shade * 40, 0, 0)) for shade in range(7)]
    for kind in ("GIF", "PNG", "WEBP"):
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert refusal(file, ImageLimits(max_frames=6)).code == "image_too_large"
        assert decode_image(file, ImageLimits(max_frames=7)).size == (4, 4)


def test_bombs_are_refused_from_their_header_alone() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert refusal(png).code == "image_too_large"
    assert refusal(b"P6 60000 60000 255\n").code == "image_too_large"
    # Between Pillow's warning and its error: refused by our cap, and silent.
    assert refusal(b"P6 10000 10000 255\n", ImageLimits(max_pixels=10**7)).code == "image_too_large"
    assert refusal(b"P6 10000 10000 255\n").code == "image_truncated"


def test_a_gif_of_very_many_frames_is_refused_soon() -> None:
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    assert decode_image(header + frame * 3 + b";").size == (1, 1)
    assert refusal(header + frame * 1_000_000 + b";").code == "image_too_large"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 100, b"hello, this is no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"],
)  # fmt: skip
def test_what_is_no_image_is_unreadable(data: bytes) -> None:
    assert refusal(data).code == "image_unreadable"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF"])
def test_a_file_cut_in_half_is_truncated(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file = encoded(noise, kind)
    assert refusal(file[: len(file) // 2]).code == "image_truncated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_file_cut_in_its_header_is_truncated(kind: str) -> None:
    file = encoded(gradient().convert("P"), kind) if kind == "GIF" else encoded(gradient(), kind)
    for size in (16, 20, 30):
        error = refusal(file[:size])
        assert error.code == "image_truncated"
        assert str(error).startswith(f"{kind} image that ends too early or is damaged")


def test_an_empty_file_is_called_so() -> None:
    assert (refusal(b"").code, str(refusal(b""))) == ("image_unreadable", "empty file")


def _files() -> list[bytes]:
    kinds = [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")]
    return [encoded(gradient(), kind) for kind in kinds] + [encoded(gradient().convert("P"), "GIF", transparency=3)]


FILES = _files()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_damaged_files_give_an_image_or_an_image_error_and_no_warning(file: bytes, data: st.DataObject) -> None:
    damaged = bytearray(file[: data.draw(st.integers(0, len(file)))])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(file)), st.integers(0, 255)), max_size=5)):
        if at < len(damaged):
            damaged[at] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            outcome = decode_image(bytes(damaged), ImageLimits(max_pixels=10**6)).mode
        except ImageError as error:
            outcome = error.code
    assert outcome in {"RGB", "image_too_large", "image_unreadable", "image_truncated"}


@settings(max_examples=40, deadline=None)
@given(
    npst.arrays(np.uint8, st.tuples(st.integers(1, 90), st.integers(1, 90), st.just(3))),
    st.integers(1, 80),
    st.integers(1, 80),
)
def test_resizing_is_bit_for_bit_transformers(pixels: Any, height: int, width: int) -> None:
    processor = BlipImageProcessorPil(size={"height": height, "width": width}, do_rescale=False, do_normalize=False)
    theirs = np.asarray(processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0])
    ours = resized_pixels(Image.fromarray(pixels), (height, width))
    assert ours.dtype == np.uint8
    assert ours.shape == (height, width, 3)
    assert np.array_equal(np.moveaxis(theirs, 0, -1), ours)


def test_one_number_is_both_sides_and_other_modes_become_rgb() -> None:
    assert resized_pixels(gradient().convert("L"), 16).shape == (16, 16, 3)
