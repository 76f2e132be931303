"""What callers of the engine give: lists of images, texts and answers, made into what requests hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from .errors import InputError
from .images import resized_pixels
from .pipelines import load_image
from .resident import Pixels

#: A Pillow image, a file, a URL, an image's bytes, or uint8 pixels (H, W, 3).
ImageLike: TypeAlias = Image.Image | str | Path | bytes | np.ndarray[Any, Any]


def listed(name: str, values: Sequence[Any]) -> list[Any]:
    """The values, kept alive one by one: slices of an array would give way to each other's identity."""
    if isinstance(values, str | bytes | Path | Image.Image):
        raise InputError(f"{name} must be a list, not one {type(values).__name__}")
    return list(values)


def choices_of(answers: Sequence[str] | Sequence[Sequence[str]] | None, number: int) -> list[tuple[str, ...]]:
    """The answers to choose from, for each of so many questions."""
    given = listed("answers", answers or ())
    if answers is not None and not given:
        raise InputError("answers to choose from are an empty list; leave them out to have answers generated")
    if all(isinstance(answer, str) for answer in given):
        return [tuple(given)] * number
    if len(given) != number:
        raise InputError(
            f"{number} questions and {len(given)} lists of answers: give one list for each, or one for all"
        )
    return [tuple(listed("answers of a question", each)) for each in given]


def pixels_of(image: ImageLike, size: tuple[int, int]) -> Pixels:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"an array must be uint8 (height, width, 3), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    return resized_pixels(load_image(image).convert("RGB"), size)
