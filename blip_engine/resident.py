"""A checkpoint held on the device, ready to run: the weights cast once, and the arithmetic of one batch.

**Batch invariance.** Floating-point sums depend on the shapes of the matrices they are part of. So every stage runs on
batches of one fixed shape, filled up with blank rows that nobody reads: `Shapes.images` images, `Shapes.texts` texts
of a length rounded up to a multiple of LENGTH_STEP (a text's own length decides, not its neighbours'). Rows never mix,
so a row's result is bit for bit the same alone, in a crowd and at any place in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import split_heads
from .cache import CrossKeys
from .checkpoint import Checkpoint
from .models import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from .processor import BlipProcessor
from .requests import Task
from .text import BlipTextModel
from .text_layers import BlipTextLayer

LENGTH_STEP: Final = 8  # tokens

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
TaskModel = BlipForConditionalGeneration | BlipForQuestionAnswering | BlipForImageTextRetrieval
ModelT = TypeVar("ModelT", BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval)

MODEL_CLASSES: Final[dict[Task, type[TaskModel]]] = {
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "itm": BlipForImageTextRetrieval,
}


@dataclass(frozen=True)
class Shapes:
    """The fixed batch sizes of a resident model."""

    images: int  # of the vision tower
    texts: int  # of the text towers: a multiple of `images`, for decoding gains more from a large batch

    @classmethod
    def fitting(cls, tokens_per_image: int, device: torch.device) -> "Shapes":
        """Sizes that fill the device: about 2,048 vision tokens at once on a CPU, 32,768 on a GPU."""
        budget, factor = (32768, 2) if device.type == "cuda" else (2048, 4)
        images = 1 << max(2, (budget // tokens_per_image).bit_length() - 1)
        return cls(images, images * factor)

    def halved(self) -> "Shapes":
        """For a device that ran out of memory; never below one."""
        return Shapes(max(1, self.images // 2), max(1, self.texts // 2))


@dataclass(frozen=True)
class ImageStates:
    """Encoded images; the last ones may be blank."""

    states: Tensor  # (N, S, vision width)
    cross: CrossKeys  # what text attends to, per layer


@dataclass(frozen=True)
class TextBatch:
    """Texts of one padded length, filled up to the fixed number."""

    rows: list[int]  # which texts of the step these are; the blank ones are not listed
    tokens: list[Sequence[int]]  # of the texts listed
    images: Tensor  # (texts,) the image each belongs to
    ids: Tensor  # (texts, T)
    mask: Tensor  # (texts, T), 1 for tokens


class ResidentModel(Generic[ModelT]):
    """Weights, processor and fixed-shape stages of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: Task,
        device: torch.device,
        dtype: torch.dtype,
        image_size: int | None = None,
    ) -> None:
        self.model: ModelT = MODEL_CLASSES[task].from_checkpoint(checkpoint, dtype, device)  # type: ignore[assignment]
        if image_size is not None:
            self.model.vision_model.resize_images(image_size)
        self.processor = BlipProcessor.from_directory(checkpoint.directory)
        self.device, self.dtype = device, dtype
        vision = self.model.config.vision_config
        self.image_size = (vision.image_size, vision.image_size)
        self.shapes = Shapes.fitting((vision.image_size // vision.patch_size) ** 2 + 1, device)
        self._levels = self._normalised_levels().to(device, dtype)
        layers = cast(Iterable[BlipTextLayer], self._attending_text().encoder.layer)
        attentions = [layer.crossattention.self for layer in layers]
        projections = [p for attention in attentions for p in (attention.key, attention.value)]
        # One matrix for the keys and values of all layers: one large product, not 2 * layers small ones.
        self._cross_weight = torch.cat([p.weight for p in projections]).detach()
        self._cross_bias = torch.cat([p.bias for p in projections]).detach()

    def _attending_text(self) -> BlipTextModel:
        model = self.model
        return model.text_decoder.bert if isinstance(model, BlipForConditionalGeneration) else model.text_encoder

    def _normalised_levels(self) -> Tensor:
        """(3, 256): what the processor makes of each 8-bit level of each channel, bit for bit."""
        levels = np.repeat(np.arange(256, dtype=np.uint8)[None, None], 3, axis=0)  # (3, 1, 256): a row of gray pixels
        pixels = self.processor.image_processor(levels, return_tensors="pt", do_resize=False).pixel_values
        return pixels[0, :, 0]

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Pixels]) -> ImageStates:
        """uint8 (H, W, 3) images at the model's size to their states and cross-attention keys and values."""
        states = self.image_states(pixels)
        cross = [self._project_cross(part) for part in states]
        layers = [
            (torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])) for parts in zip(*cross, strict=True)
        ]
        return ImageStates(torch.cat(states), layers)

    @torch.inference_mode()
    def image_states(self, pixels: Sequence[Pixels]) -> list[Tensor]:
        """The states alone, in blocks (`shapes.images`, S, vision width), the last one filled up with blank images."""
        size, states = self.shapes.images, []
        for start in range(0, len(pixels), size):
            block = np.zeros((size, *self.image_size, 3), dtype=np.uint8)
            for row, image in enumerate(pixels[start : start + size]):
                block[row] = image
            states.append(self.model.vision_model(self._normalise(torch.from_numpy(block))).last_hidden_state)
        return states

    def _normalise(self, block: Tensor) -> Tensor:
        levels = block.to(self.device, non_blocking=True).permute(0, 3, 1, 2).int()
        return torch.stack([self._levels[channel][levels[:, channel]] for channel in range(3)], dim=1)

    def _project_cross(self, states: Tensor) -> CrossKeys:
        heads, layers = self.model.config.text_config.num_attention_heads, len(self._attending_text().encoder.layer)
        parts = F.linear(states, self._cross_weight, self._cross_bias).chunk(2 * layers, dim=-1)
        split = [split_heads(part, heads) for part in parts]
        return list(zip(split[::2], split[1::2], strict=True))

    def text_batches(self, token_rows: Sequence[Sequence[int]], images: Sequence[int], left: bool) -> list[TextBatch]:
        """Sort texts into batches of the fixed shapes. `left`: pad on the left, for a decoder's prompt."""
        by_width: dict[int, list[int]] = {}
        for index, row in enumerate(token_rows):
            width = 1 if len(row) == 1 else -(-len(row) // LENGTH_STEP) * LENGTH_STEP
            by_width.setdefault(width, []).append(index)
        size = self.shapes.texts
        return [
            self._text_batch(rows[start : start + size], width, token_rows, images, left)
            for width, rows in by_width.items()
            for start in range(0, len(rows), size)
        ]

    def _text_batch(
        self, rows: list[int], width: int, token_rows: Sequence[Sequence[int]], images: Sequence[int], left: bool
    ) -> TextBatch:
        ids = np.full((self.shapes.texts, width), self.model.config.text_config.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        mask[:, -1 if left else 0] = 1  # a blank text sees one token, so that nothing in it is undefined
        owners = np.zeros(self.shapes.texts, dtype=np.int64)
        for place, index in enumerate(rows):
            tokens = token_rows[index]
            span = slice(width - len(tokens), width) if left else slice(0, len(tokens))
            ids[place, span], mask[place, span], owners[place] = tokens, 1, images[index]
        ids_, mask_, owners_ = (torch.from_numpy(array).to(self.device) for array in (ids, mask, owners))
        return TextBatch(rows, [token_rows[index] for index in rows], owners_, ids_, mask_)

    def cross_of(self, encoded: ImageStates, images: Tensor) -> CrossKeys:
        """Keys and values of the image of every text, (texts, heads, S, hs) per layer."""
        return [(key.index_select(0, images), value.index_select(0, images)) for key, value in encoded.cross]
