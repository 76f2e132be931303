"""A checkpoint held on the device, ready to run: the weights cast once, and the arithmetic of one batch.

**Batch invariance.** Floating-point sums depend on the shapes of the matrices they are part of. So every stage runs on
batches of one fixed shape, filled up with blank rows that nobody reads: `Shapes.images` images, or `Shapes.groups`
groups of texts. A group are the texts of one request, which share their image's keys and values; their number is
rounded up to a power of two, their length to a multiple of LENGTH_STEP. So a request's own texts decide the shape, not
its neighbours', and rows never mix: its results are bit for bit the same alone, in a crowd and at any place in it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .absorption import Absorbed, absorbing_pays
from .attention import prefers_products, split_heads
from .cache import CrossKeys
from .checkpoint import Checkpoint
from .compiling import compile_layers
from .config import CONFIG_FILE, BlipConfig
from .errors import CheckpointError, OptionError
from .generation import Memory
from .models import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from .packing import Int8Linear, PackedLinear, can_pack, pack_linears
from .processor import BlipProcessor
from .requests import DEFAULT_MODELS, Task
from .resizing import resized
from .text import BlipTextModel
from .text_layers import BlipTextLayer

LENGTH_STEP: Final = 16  # tokens: wide enough that most questions share one width, and with it their batches
_USUAL_BEAMS: Final = 3
_MOST_GROUPS: Final = 256  # in a batch: about as many images as a worker has decoded while as many are computed
MOST_IN_GROUP: Final = 8  # texts; further ones of a request make another group

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
TaskModel = BlipForConditionalGeneration | BlipForQuestionAnswering | BlipForImageTextRetrieval
ValueT = TypeVar("ValueT")
ModelT = TypeVar("ModelT", BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval)

MODEL_CLASSES: Final[dict[Task, type[TaskModel]]] = {
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "itm": BlipForImageTextRetrieval,
}


_KINDS: Final[dict[Task, str]] = {
    "caption": "a captioning", "vqa": "a question-answering", "itm": "an image-text matching",
}  # fmt: skip


def named_task(directory: Path) -> Task | None:
    """The task that a checkpoint's configuration names; None: it names none."""
    try:
        names = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["architectures"]
        return next((task for task, kind in MODEL_CLASSES.items() if kind.__name__ in names), None)
    except (OSError, ValueError, KeyError, TypeError):  # whoever loads it will say what is wrong
        return None


def _loaded(checkpoint: Checkpoint, task: Task, dtype: torch.dtype, device: torch.device) -> TaskModel:
    """The model of that task. Raises CheckpointError, which tells a checkpoint of another kind from a damaged one."""
    try:
        return MODEL_CLASSES[task].from_checkpoint(checkpoint, dtype, device)
    except CheckpointError:
        named = named_task(checkpoint.directory)
        if named in {None, task}:
            raise
        kinds = f"{_KINDS[named]} checkpoint; task {task} needs {_KINDS[task]} one, such as {DEFAULT_MODELS[task]}"
        raise CheckpointError(f"{checkpoint.source} is {kinds}") from None


def _tokens(config: BlipConfig) -> int:
    """Of an image, the class token included."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


@dataclass(frozen=True)
class Shapes:
    """The fixed batch sizes of a resident model."""

    images: int  # of the vision tower
    groups: int  # of texts; also how many requests run together: more than `images`, for decoding gains more from it

    @classmethod
    def fitting(cls, config: BlipConfig, device: torch.device, dtype: torch.dtype) -> "Shapes":
        """Sizes that fill the device: about 2,048 vision tokens at once on a CPU, 32,768 on a GPU with the memory."""
        budget = 32768 if device.type == "cuda" else 2048
        images = 1 << max(2, (budget // _tokens(config)).bit_length() - 1)
        # A processor that computes in float32 is slow: no batch of it should take minutes.
        factor = 8 if device.type == "cuda" or dtype.itemsize == 2 else 4
        shapes = cls(images, min(factor * images, _MOST_GROUPS))
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]  # bytes, the weights already taken
            while shapes.memory(config, dtype) > free // 2 and shapes.images > 1:
                shapes = shapes.halved()
        return shapes

    def memory(self, config: BlipConfig, dtype: torch.dtype) -> int:
        """Bytes that a step takes at most, roughly: states of a vision layer, keys and values, logits of the beams."""
        vision, text, seen = config.vision_config, config.text_config, _tokens(config)
        layer = seen * (2 * vision.intermediate_size + 8 * vision.hidden_size) * dtype.itemsize
        keys = 2 * text.num_hidden_layers * text.hidden_size * seen * dtype.itemsize
        logits = 4 * _USUAL_BEAMS * text.vocab_size * 4  # of four texts, in float32
        return self.images * layer + self.groups * (2 * keys + 4 * logits)  # graphs read copies; searches make some

    def groups_of(self, size: int) -> int:
        """How many groups of `size` texts a batch has: fewer large ones, for few requests fill few rows."""
        return max(1, self.groups * 4 // max(4, size))

    def halved(self) -> "Shapes":
        """For a device that ran out of memory; never below one."""
        return Shapes(max(1, self.images // 2), max(1, self.groups // 2))


@dataclass(frozen=True)
class ImageStates:
    """Encoded images, in blocks of the vision tower's fixed shape; the last ones may be blank."""

    blocks: list[Tensor]  # (shapes.images, S, vision width)
    project: Callable[[Tensor], CrossKeys]

    @cached_property
    def states(self) -> Tensor:
        """(N, S, vision width)."""
        return torch.cat(self.blocks) if len(self.blocks) > 1 else self.blocks[0]

    @cached_property
    def keys(self) -> CrossKeys:
        """What text attends to, per layer; made when it is first asked for."""
        layers = zip(*(self.project(block) for block in self.blocks), strict=True)
        return [(torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])) for parts in layers]


@dataclass(frozen=True)
class TextBatch:
    """Groups of texts of one padded length and size, filled up with blank texts to the fixed shape."""

    texts: list[int]  # which texts of the step these are, without the blank ones
    rows: list[int]  # the row that each of them has
    tokens: list[Sequence[int]]  # theirs
    owners: list[int]  # (groups,) the image that each group is about; the blank groups' is the first
    ids: Tensor  # (groups * size, T)
    mask: Tensor  # (groups * size, T), 1 for tokens

    @property
    def size(self) -> int:
        """Texts in a group."""
        return len(self.ids) // len(self.owners)

    def listed(self, values: Sequence[ValueT]) -> list[ValueT]:
        """Of values for all rows those of the texts."""
        return [values[row] for row in self.rows]


class ResidentModel(Generic[ModelT]):
    """Weights, processor and fixed-shape stages of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: Task,
        device: torch.device,
        dtype: torch.dtype,
        image_size: int | None = None,
        int8: bool = False,
        compiled: bool = False,
    ) -> None:
        """`compiled`: have the vision tower compiled now, if that is possible here."""
        self.model: ModelT = _loaded(checkpoint, task, dtype, device)  # type: ignore[assignment]
        if image_size is not None:
            self.model.vision_model.resize_images(image_size)
        self.processor = BlipProcessor.from_directory(checkpoint.directory)
        words, room = len(self.processor.tokenizer), self.model.config.text_config.vocab_size
        if words > room:  # on a GPU an id outside the vocabulary ends the process
            raise CheckpointError(f"{checkpoint.source}: the tokenizer has {words} words, the model room for {room}")
        if device.type == "cuda":
            # fp32 means fp32, in the patches' convolution too, and whatever the environment says of products
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.device, self.dtype = device, dtype
        self.attention = "product" if prefers_products(device.type, dtype) else "fused"
        vision = self.model.config.vision_config
        self.image_size = (vision.image_size, vision.image_size)
        self.shapes = Shapes.fitting(self.model.config, device, dtype)
        self._levels = self._normalised_levels().to(device, dtype)
        layers = cast(Iterable[BlipTextLayer], self.attending_text().encoder.layer)
        attentions = [layer.crossattention.self for layer in layers]
        for attention in attentions:
            attention.absorbed = Absorbed(attention.key, attention.value, attention.heads)
        projections = [p for attention in attentions for p in (attention.key, attention.value)]
        # One matrix for the keys and values of all layers: one large product, not 2 * layers small ones.
        weight = torch.cat([p.weight for p in projections]).detach()
        bias = torch.cat([p.bias for p in projections]).detach()
        self._cross: Callable[[Tensor], Tensor] = partial(F.linear, weight=weight, bias=bias)
        kind = Int8Linear if int8 else PackedLinear
        if can_pack(device, dtype, kind):
            pack_linears(self.model, int8)
            self._cross = kind(weight, bias)
        elif int8:
            raise OptionError(f"precision 'int8' does not run on this {device.type} with torch {torch.__version__}")
        self.compiled = compiled and self._compile()

    def _compile(self) -> bool:
        tower, noise = self.model.vision_model, np.random.default_rng(0)
        images = noise.integers(0, 256, (self.shapes.images, *self.image_size, 3), dtype=np.uint8)
        return compile_layers(list(tower.encoder.layers), lambda: tower.embeddings(self._normalise(list(images))))

    def resize(self, shapes: Shapes) -> None:
        """Run batches of other sizes from now on. What was compiled is compiled for them now, not within a batch."""
        self.shapes = shapes
        self.compiled = self.compiled and self._compile()

    def attending_text(self) -> BlipTextModel:
        """The part of the model that looks at images."""
        model = self.model
        return model.text_decoder.bert if isinstance(model, BlipForConditionalGeneration) else model.text_encoder

    def _normalised_levels(self) -> Tensor:
        """(3, 256): what the processor makes of each 8-bit level of each channel, bit for bit."""
        levels = np.repeat(np.arange(256, dtype=np.uint8)[None, None], 3, axis=0)  # (3, 1, 256): a row of gray pixels
        pixels = self.processor.image_processor(levels, return_tensors="pt", do_resize=False).pixel_values
        return pixels[0, :, 0]

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Pixels]) -> ImageStates:
        """uint8 (H, W, 3) images, best at the model's size, to what texts read of them."""
        return ImageStates(self.image_states(pixels), self._project_cross)

    @torch.inference_mode()
    def image_states(self, pixels: Sequence[Pixels]) -> list[Tensor]:
        """The states alone, in blocks (`shapes.images`, S, vision width), the last one filled up with blank images."""
        size, states = self.shapes.images, []
        for start in range(0, len(pixels), size):
            block = self._normalise(pixels[start : start + size])
            states.append(self.model.vision_model(block).last_hidden_state)
        return states

    def _normalise(self, images: Sequence[Pixels]) -> Tensor:
        levels = self._block(images).int()
        return torch.stack([self._levels[channel][levels[:, channel]] for channel in range(3)], dim=1)

    def _block(self, images: Sequence[Pixels]) -> Tensor:
        """uint8 (`shapes.images`, 3, H, W) on the device. Images of other sizes are resized there, each by itself."""
        block = np.zeros((self.shapes.images, *self.image_size, 3), dtype=np.uint8)
        others = {row: image for row, image in enumerate(images) if image.shape[:2] != self.image_size}
        for row, image in enumerate(images):
            if row not in others:
                block[row] = image
        levels = self._sent(block).permute(0, 3, 1, 2)
        for row, image in others.items():
            levels[row] = resized(self._sent(image), self.image_size)
        return levels

    def _sent(self, array: Pixels) -> Tensor:
        values = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device.type == "cuda":
            values = values.pin_memory()  # else the copy waits for the device
        return values.to(self.device, non_blocking=True)

    def _project_cross(self, states: Tensor) -> CrossKeys:
        heads, layers = self.model.config.text_config.num_attention_heads, len(self.attending_text().encoder.layer)
        parts = self._cross(states).chunk(2 * layers, dim=-1)
        split = [split_heads(part, heads) for part in parts]
        return list(zip(split[::2], split[1::2], strict=True))

    def text_batches(self, token_rows: Sequence[Sequence[int]], owners: Sequence[int], left: bool) -> list[TextBatch]:
        """Sort texts into batches of the fixed shapes.

        `owners` are the images that the texts are about; texts of one image stand together. `left`: pad on the left,
        for a decoder's prompt.
        """
        buckets: dict[tuple[int, int], list[list[int]]] = {}
        for _, members in groupby(range(len(token_rows)), key=owners.__getitem__):
            for group in batched(members, MOST_IN_GROUP):
                longest = max(len(token_rows[text]) for text in group)
                width = 1 if longest == 1 else -(-longest // LENGTH_STEP) * LENGTH_STEP
                buckets.setdefault((width, 1 << (len(group) - 1).bit_length()), []).append(group)
        return [
            self._text_batch(groups, bucket, token_rows, owners, left)
            for bucket, every in buckets.items()
            for groups in batched(every, self.shapes.groups_of(bucket[1]))
        ]

    def _text_batch(
        self,
        groups: list[list[int]],
        bucket: tuple[int, int],
        token_rows: Sequence[Sequence[int]],
        owners: Sequence[int],
        left: bool,
    ) -> TextBatch:
        width, size = bucket
        number = self.shapes.groups_of(size)
        ids = np.full((number * size, width), self.model.config.text_config.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        mask[:, -1 if left else 0] = 1  # a blank text sees one token, so that nothing in it is undefined
        rows = [place * size + n for place, group in enumerate(groups) for n in range(len(group))]
        texts = [text for group in groups for text in group]
        for row, text in zip(rows, texts, strict=True):
            tokens = token_rows[text]
            span = slice(width - len(tokens), width) if left else slice(0, len(tokens))
            ids[row, span], mask[row, span] = tokens, 1
        images = [owners[group[0]] for group in groups] + [0] * (number - len(groups))
        ids_, mask_ = (torch.from_numpy(array).to(self.device) for array in (ids, mask))
        return TextBatch(texts, rows, [token_rows[text] for text in texts], images, ids_, mask_)

    def of_groups(self, values: Tensor, batch: TextBatch) -> Tensor:
        """Rows (groups, ...) of values (images, ...); a view where neighbouring groups have neighbouring images."""
        first, number = batch.owners[0], len(batch.owners)
        if batch.owners == list(range(first, first + number)):
            return values[first : first + number]
        return values.index_select(0, torch.tensor(batch.owners, device=values.device))

    def memory_of_groups(self, encoded: ImageStates, batch: TextBatch, queries: int) -> Memory:
        """What the groups look at, where each has so many `queries` in all: states, or keys and values of them.

        Which one is less work follows from the shapes alone, so a row's neighbours do not change its arithmetic.
        """
        text = self.model.config.text_config
        _, seen, width = encoded.blocks[0].shape
        if absorbing_pays(queries, seen, width, text.hidden_size, text.num_attention_heads):
            return Memory(self.of_groups(encoded.states, batch))
        return Memory(None, None, self.keys_of_groups(encoded.keys, batch))

    def keys_of_groups(self, keys: CrossKeys, batch: TextBatch) -> CrossKeys:
        """Keys and values (groups, heads, S, hs) per layer of what each group is about."""
        return [(self.of_groups(key, batch), self.of_groups(value, batch)) for key, value in keys]


def batched(values: Iterable[ValueT], size: int) -> Iterator[list[ValueT]]:
    """Lists of `size` of them, the last one perhaps shorter."""
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part
