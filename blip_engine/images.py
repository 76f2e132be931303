"""Image bytes to RGB pixels as a labelling user expects them: upright, opaque, in eight bits (Pillow and NumPy only).

What transformers does otherwise: it ignores the EXIF orientation, drops alpha and clips 16-bit values at 255.

Runs in loader processes on bytes from strangers: the caps are checked before anything is decoded, only formats of
images of pixels are tried (none that runs an interpreter or carries vectors), and whatever is wrong with a file
comes out as one ImageError.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import ImageError, one_line

Pixels: TypeAlias = "np.ndarray[Any, Any]"

#: What `decode_image` takes. A JPEG with several pictures (MPO) counts as JPEG.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_SIGNATURES: Final = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a file may claim; more is `image_too_large`."""

    max_bytes: int = 64 * 2**20  # of the file
    max_pixels: int = 178_956_970  # width x height; Pillow itself refuses more than this, unless it is told otherwise
    max_frames: int = 10_000  # of an animation, though only the first one is decoded


def decode_image(data: bytes, limits: ImageLimits = ImageLimits(), draft: int = 0) -> Image.Image:
    """The (first) picture in `data`: mode RGB, turned as its EXIF orientation says, alpha composited on white.

    16-bit gray is scaled to 8 bits; 32-bit integers and floats, which have no agreed white, are stretched from their
    darkest to their brightest value. `draft`: pixels; a JPEG may be decoded smaller, by a half, a quarter or an eighth,
    but no side below this. Raises ImageError with the code `image_too_large` (a cap of `limits`),
    `image_unreadable` (not an image of FORMATS) or `image_truncated` (it begins like one, the rest ends early or is
    damaged: Pillow does not tell these apart).
    """
    if not data:
        raise ImageError("image_unreadable", "empty file")
    if len(data) > limits.max_bytes:
        raise ImageError(
            "image_too_large", f"file of {len(data)} bytes; limit {limits.max_bytes} (BLIP_MAX_IMAGE_BYTES)"
        )
    # Pillow warns of odd metadata and of large sizes; the caps here decide, and a loader's stderr stays clean.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _opening(data):
            image = Image.open(BytesIO(data), formats=FORMATS)
        _check_caps(image, data, limits)
        if draft and image.format == "JPEG":
            image.draft(image.mode, (draft, draft))
        with _refusals("image_truncated", f"{image.format} image that ends too early or is damaged"):
            image.load()
        with _refusals("image_unreadable", f"{image.format} image in a color mode that cannot be converted"):
            return _opaque_rgb(_upright(image))


def resized_pixels(image: Image.Image, size: int | tuple[int, int]) -> Pixels:
    """uint8 (H, W, 3) of an RGB image squashed bicubically to `size`: both sides, or (height, width).

    Bit for bit the resize of transformers' `BlipImageProcessorPil`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


@contextmanager
def _refusals(code: str, what: str) -> Iterator[None]:
    """Every failure of Pillow becomes one ImageError: its plugins raise nearly anything on hostile bytes."""
    try:
        yield
    except MemoryError:  # the machine's trouble, not the file's: whoever called knows what to do
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # at half of it Pillow warns
        raise ImageError("image_too_large", f"image of more pixels than Pillow decodes ({most})") from None
    except UnidentifiedImageError:
        raise ImageError(code, what) from None
    except Exception as error:
        reason = one_line(error)[:200] or type(error).__name__
        raise ImageError(code, f"{what}: {reason}") from None


def _opening(data: bytes) -> AbstractContextManager[None]:
    """Pillow names nothing that ends within its header; by its first bytes it may be known all the same."""
    kind = next((name for name, begins in _SIGNATURES.items() if begins.match(data)), None)
    if kind is None:
        return _refusals("image_unreadable", f"not an image in one of the formats {', '.join(FORMATS)}")
    return _refusals("image_truncated", f"{kind} image that ends too early or is damaged")


def _check_caps(image: Image.Image, data: bytes, limits: ImageLimits) -> None:
    """Judge what the header claims. `n_frames` of a GIF or TIFF would walk the file without an end in sight."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            "image_too_large",
            f"image of {width}x{height} pixels; limit {limits.max_pixels} (BLIP_MAX_IMAGE_PIXELS)",
        )
    if image.format == "GIF":
        frames = _gif_frames(data, limits.max_frames)
    else:
        frames = 1 if image.format == "TIFF" else getattr(image, "n_frames", 1)  # a TIFF has pages: the first is taken
    if frames > limits.max_frames:
        raise ImageError("image_too_large", f"animation of more than {limits.max_frames} frames")


def _gif_frames(data: bytes, limit: int) -> int:
    """How many frames a GIF has, counted to `limit` + 1 (GIF89a specification, sections 15-26)."""
    frames, at = 0, 13 + _gif_palette_size(data[10:11])
    while frames <= limit:
        kind = data[at : at + 1]
        if kind == b",":  # image descriptor, its palette, the code size, data
            frames += 1
            at += 11 + _gif_palette_size(data[at + 9 : at + 10])
        elif kind == b"!":  # extension: its label, data
            at += 2
        else:  # the trailer, the end of the file or rubbish
            break
        while at < len(data) and data[at]:  # data blocks, each with its length in front
            at += 1 + data[at]
        at += 1
    return frames


def _gif_palette_size(flags: bytes) -> int:
    return 3 * 2 ** (1 + (flags[0] & 7)) if flags and flags[0] & 0x80 else 0


_ORIENTATION: Final = 0x0112  # the EXIF tag
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing of the picture: it is taken as it lies
        turn = None
    return image if turn is None else image.transpose(turn)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits by its full range; 32-bit integers and floats by their own."""
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow scales PPM to 16 bits
        return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    values = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = values.min(), values.max()
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
