"""Images to normalised pixels: Pillow and NumPy, bit-equal with transformers' `BlipImageProcessorPil`
(https://huggingface.co/docs/transformers/model_doc/blip).

This class keeps transformers' habits (no EXIF rotation, 16 bits clipped to 8). What the workers use,
`images.decode_image`, treats photographs as a labelling user expects.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from .checkpoint import HubOptions, find_checkpoint
from .errors import CheckpointError, InputError
from .features import BatchFeature, as_features

PREPROCESSOR_FILE = "preprocessor_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ImageInput: TypeAlias = Image.Image | np.ndarray[Any, Any] | Tensor


@dataclass
class BlipImageProcessor:
    """Resize (squash, no crop), rescale, normalise. Every field can be overridden in a call."""

    do_resize: bool = True
    size: Any = field(default_factory=lambda: {"height": 384, "width": 384})  # or one int for both, pixels
    resample: int = int(Image.Resampling.BICUBIC)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] | float = CLIP_MEAN
    image_std: Sequence[float] | float = CLIP_STD
    do_convert_rgb: bool = True

    def __post_init__(self) -> None:
        self.size = _as_size(self.size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BlipImageProcessor":
        """From `preprocessor_config.json`; keys of other processors (`do_pad`, `size_divisor`) are passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known and value is not None})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **loading: Any
    ) -> "BlipImageProcessor":
        """From a directory or a hub repository.

        `loading` is as of the models; use_fast and backend change nothing, for Pillow always resizes. Raises
        CheckpointError, OptionError for other names.
        """
        hub = HubOptions.of(loading, without_effect=("use_fast", "backend", "trust_remote_code"))
        return cls.from_directory(find_checkpoint(pretrained_model_name_or_path, revision, hub=hub).directory)

    @classmethod
    def from_directory(cls, directory: Path) -> "BlipImageProcessor":
        """From `preprocessor_config.json` in `directory`. Raises CheckpointError."""
        path = directory / PREPROCESSOR_FILE
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(f"{directory} holds no {PREPROCESSOR_FILE}") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no preprocessor configuration: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Ready for `preprocessor_config.json`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"image_processor_type": "BlipImageProcessor", **values}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `preprocessor_config.json`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PREPROCESSOR_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], *, return_tensors: str | None = None, **overrides: Any
    ) -> BatchFeature:
        """As `preprocess`."""
        return self.preprocess(images, return_tensors=return_tensors, **overrides)

    def preprocess(
        self, images: ImageInput | Sequence[ImageInput], *, return_tensors: str | None = None, **overrides: Any
    ) -> BatchFeature:
        """Images with values 0 to 255 to `pixel_values` (B, 3, height, width) float32.

        An image is a Pillow image, or an array or tensor (C, H, W), (H, W, C) or (H, W); one with a fourth dimension is
        a batch. Transparency is composited on white. Fractions from 0 to 1 are taken for levels divided by 255. Raises
        InputError for anything else, and TypeError for an argument that is not a field.
        """
        settings = replace(self, **overrides) if overrides else self
        batch = images if isinstance(images, Sequence) else [images]
        if not isinstance(images, Sequence | Image.Image) and images.ndim == 4:
            batch = list(images)
        pixels = [settings._prepare(image) for image in batch]
        return as_features({"pixel_values": pixels}, return_tensors)

    def _prepare(self, image: ImageInput) -> "np.ndarray[Any, Any]":
        array = _channels_last(image, self.do_convert_rgb)
        if self.do_resize:
            array = _resize(array, (self.size["width"], self.size["height"]), self.resample)
        array = np.moveaxis(array, -1, 0)
        if self.do_rescale:
            array = _scaled(array, self.rescale_factor)
        return self._normalised(array) if self.do_normalize else array

    def _normalised(self, array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        if not np.issubdtype(array.dtype, np.floating):
            array = array.astype(np.float32)
        mean, std = (np.asarray(v, array.dtype).reshape(-1, 1, 1) for v in (self.image_mean, self.image_std))
        if len(mean) not in (1, len(array)):
            raise InputError(f"an image of {len(array)} channels needs as many means, not {len(mean)}")
        return np.asarray((array - mean) / std)


#: transformers has a second, Pillow-only class under this name; ours is Pillow-only already.
BlipImageProcessorPil = BlipImageProcessor


def _as_size(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return {"height": int(size["height"]), "width": int(size["width"])}
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return _as_size(int(size["shortest_edge"]))  # how the first BLIP files said "both sides"
    raise ValueError(f"size must be a number or have height and width, not {size!r}")


def _channels_last(image: ImageInput, convert: bool) -> "np.ndarray[Any, Any]":
    """(H, W, C) of any image; with `convert`, C is 3."""
    if isinstance(image, Image.Image):
        array = np.array(_opaque(image) if convert else image)
        return array[..., None] if array.ndim == 2 else array
    if isinstance(image, Tensor):
        image = image.numpy(force=True)
    if not isinstance(image, np.ndarray):
        raise InputError(f"an image must be a Pillow image, an array or a tensor, not {type(image).__name__}")
    array = image[None] if image.ndim == 2 else image
    if array.ndim != 3 or not {array.shape[0], array.shape[-1]} & {1, 3, 4}:
        raise InputError(f"an image must be (C, H, W), (H, W, C) or (H, W) with 1, 3 or 4 channels, not {image.shape}")
    if array.shape[0] in (1, 3, 4):  # where both ends could be the channels, transformers takes the first
        array = np.moveaxis(array, 0, -1)
    if not convert or array.shape[-1] == 3:
        return array
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else _on_white(array)


def _opaque(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _on_white(array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    whole = np.issubdtype(array.dtype, np.integer)
    white = 255 if whole else 1.0
    if not whole and (array.min() < 0 or array.max() > 1):
        raise InputError("an image of fractions with transparency must lie in 0 to 1")
    alpha = array[..., 3:] / white
    blended = alpha * array[..., :3] + (1 - alpha) * white
    return (np.round(blended) if whole else blended).astype(array.dtype)


def _resize(array: "np.ndarray[Any, Any]", size: tuple[int, int], resample: int) -> "np.ndarray[Any, Any]":
    """Resize through Pillow's 8 bits; fractions come back as fractions."""
    fractions = _are_fractions(array)
    levels = (_scaled(array, 255) if fractions else array).astype(np.uint8)
    gray = levels.shape[-1] == 1  # Pillow knows no third dimension of one
    resized = np.asarray(Image.fromarray(levels[..., 0] if gray else levels).resize(size, resample))
    resized = resized[..., None] if gray else resized
    return _scaled(resized, 1 / 255) if fractions else resized


def _are_fractions(array: "np.ndarray[Any, Any]") -> bool:
    """Whether values are 0 to 1 rather than whole numbers 0 to 255; InputError when they are neither."""
    if array.dtype == np.uint8:
        return False
    whole = np.allclose(array, array.astype(int))
    if array.min() < 0 or array.max() > (255 if whole else 1):
        raise InputError(f"pixels must be 0 to 255, or fractions 0 to 1, not {array.min()} to {array.max()}")
    return not whole


def _scaled(array: "np.ndarray[Any, Any]", factor: float) -> "np.ndarray[Any, Any]":
    # In double precision first: a float32 product differs from transformers' in the last bit.
    return (array.astype(np.float64) * factor).astype(np.float32)
