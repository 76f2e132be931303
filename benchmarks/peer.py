"""transformers, as the engine is measured against it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.nn import functional as F

from blip_engine import BertTokenizer, BlipImageProcessor
from blip_engine.memory import keep_memory
from blip_engine.requests import Task
from blip_engine.resident import MODEL_CLASSES

from .workloads import Images, Workload


class Theirs:
    """transformers, in one number type."""

    def __init__(self, folder: Path, task: Task, device: torch.device, threads: int | None, settle: bool) -> None:
        if settle:
            keep_memory()
        if threads:
            torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        kind = getattr(transformers, MODEL_CLASSES[task].__name__)
        self._full = self._model = kind.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self._tokenizer, self._device = BertTokenizer.from_pretrained(folder), device
        self._dtype = torch.float32
        self._inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def use(self, dtype: torch.dtype) -> None:
        """Compute in this number type."""
        if dtype != self._dtype:
            full = dtype == torch.float32
            self._model, self._dtype = (self._full if full else copy.deepcopy(self._full).to(dtype)), dtype

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def prepare(self, workload: Workload, images: Images, most: int | None = None) -> int:
        """Keep pixels and token ids of every (image, text) pair, as the model takes them, at `most` so many."""
        processor = BlipImageProcessor()
        pixels = processor(list(images), do_resize=False, return_tensors="pt").pixel_values.to(self._dtype)
        ids = torch.empty(len(pixels), 0, dtype=torch.long)
        if workload.texts:
            ids = torch.tensor(self._tokenizer.encode_rows(workload.words)).repeat(len(images), 1)
            pixels = pixels.repeat_interleave(workload.texts, 0)
        kept = pixels[:most], ids[:most]
        self._inputs = (kept[0].pin_memory(), kept[1].pin_memory()) if self._device.type == "cuda" else kept
        return len(ids[:most])

    def run(self, workload: Workload, batch: int) -> list[Any]:
        """Results of what was prepared, as plain lists or arrays, batch by batch."""
        if self._inputs is None:
            raise ValueError("nothing was prepared")
        pairs = zip(*(kind.split(batch) for kind in self._inputs), strict=True)
        try:
            return [self._batch(workload, *map(self._sent, pair)) for pair in pairs]
        except torch.OutOfMemoryError:  # not a setting for this device
            torch.cuda.empty_cache()
            raise

    def _sent(self, part: torch.Tensor) -> torch.Tensor:
        return part.to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _batch(self, workload: Workload, pixels: torch.Tensor, ids: torch.Tensor) -> Any:
        model, options = self._model, dict(workload.options)
        if options.get("do_sample"):
            options["top_k"] = 0
        if workload.task == "caption":
            return model.generate(pixels, **options).cpu()[:, 1:].numpy()
        mask = torch.ones_like(ids)
        if workload.task == "vqa":
            return model.generate(ids, pixels, attention_mask=mask, **options).cpu()[:, 1:].numpy()
        if not workload.embeds:
            return model(ids, pixels, attention_mask=mask).itm_score.float().softmax(-1)[:, 1].cpu().numpy()
        pictures = model.vision_proj(model.vision_model(pixels).last_hidden_state[:, 0])
        words = model.text_proj(model.text_encoder(ids, mask).last_hidden_state[:, 0])
        return tuple(F.normalize(vectors.float(), dim=-1).cpu().numpy() for vectors in (pictures, words))


class _Manager(BaseManager):
    """Makes and calls objects in a process of its own."""


_Manager.register("Theirs", Theirs)


@contextmanager
def peer(folder: Path, task: Task, device: torch.device, threads: int | None, settle: bool) -> Iterator[Theirs]:
    """transformers with a checkpoint, in a process of its own; with `settle` that keeps memory as the engine's does."""
    with _Manager(ctx=get_context("spawn")) as manager:
        made = manager.Theirs(folder, task, device, threads, settle)  # type: ignore[attr-defined]
        yield cast(Theirs, made)
