"""A resident engine: several checkpoints on one device, one queue, batches across jobs.

    engine = Engine.load({"caption": "demo", "vqa": "demo"})
    engine.caption([image])[0].text
    engine.answer([image, image], ["what shape is it?", "what color is it?"])

One thread (`steps.py`) takes batches and runs them. Every future settles, whatever happens.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias, cast

import numpy as np

from .checkpoint import find_checkpoint
from .config import CONFIG_FILE
from .errors import CheckpointError, EngineClosedError, InputError, OptionError
from .filtering import submit_capfilt
from .inputs import ImageLike, choices_of, listed, pixels_of
from .precision import choose_device, choose_dtype, name_of
from .requests import (
    DEMO_MODEL,
    TASKS,
    Answer,
    BatchReport,
    Caption,
    Match,
    MatchOptions,
    Request,
    Result,
    Task,
    options_for,
)
from .resident import MOST_IN_GROUP, ResidentModel, named_task
from .runner import EmbedRunner, MatchRunner, runner_for
from .steps import AnyRunner, Entry, Steps

_log = logging.getLogger(__name__)

Vectors: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint that an engine holds."""

    name: str  # what requests call it
    task: Task
    source: str  # as it was asked for: a hub id, a directory, `demo`
    revision: str | None  # the hub's commit
    weights_sha256: str
    image_size: tuple[int, int]  # height and width the model takes, pixels
    precision: str = ""  # fp32, bf16, fp16 or int8
    device: str = ""  # cpu or cuda


class Engine:
    """Holds models on a device and serves requests for all of them from one queue.

    An image is a Pillow image, a path, a file's bytes, or uint8 pixels (H, W, 3).
    """

    def __init__(
        self, device: str = "auto", precision: str = "auto", overlap: bool | None = None, compiled: bool | None = None
    ) -> None:
        """`device`: auto, cpu, cuda, cuda:N. `precision`: auto, fp32, bf16, fp16, int8. Raises OptionError.

        `overlap`: begin with the images of a batch while the one before is decoded, which takes memory for two.
        `compiled`: have torch.compile fuse the vision tower when a model is loaded (see `compiling`). None: on a GPU;
        on a CPU neither gains anything.
        """
        self.device = choose_device(device)
        on_gpu = self.device.type == "cuda"
        self._compiled = on_gpu if compiled is None else compiled
        self.dtype, self._int8 = choose_dtype(precision, self.device), precision == "int8"
        self._runners: dict[str, AnyRunner] = {}
        self._embedders: dict[str, EmbedRunner] = {}  # around the same resident models
        self._infos: dict[str, ModelInfo] = {}
        self._steps = Steps(self.device, on_gpu if overlap is None else overlap)
        thread = threading.Thread(target=self._steps.serve, name="blip-engine", daemon=True)
        thread.start()
        # A thread that is inside torch while the interpreter ends aborts the process: end it before.
        self._end = weakref.finalize(self, _stop, self._steps, thread)

    @classmethod
    def load(
        cls,
        models: Mapping[str, str],
        device: str = "auto",
        precision: str = "auto",
        overlap: bool | None = None,
        compiled: bool | None = None,
    ) -> Self:
        """An engine with models by name. A name that is a task says the task; else the checkpoint does.

        Values are as `model` of `load_model`; `demo` needs a task for its name. Raises OptionError, CheckpointError.
        """
        if isinstance(models, str):
            raise OptionError(f"models are given by name: {{'caption': {models!r}}}")
        for name, model in models.items():
            if model == DEMO_MODEL and name not in TASKS:
                raise CheckpointError(f"{name!r}: {model!r} has a checkpoint for each task; name it {', '.join(TASKS)}")
        engine = cls(device, precision, overlap, compiled)
        for name, model in models.items():
            engine.load_model(name, model, name if name in TASKS else _task_of(model))
        return engine

    @property
    def oom_splits(self) -> int:
        """How often the device ran out of memory and batches were halved."""
        return self._steps.oom_splits

    @property
    def on_batch(self) -> Callable[[BatchReport], None] | None:
        """Called in the engine's thread for every batch that was run, before its futures settle."""
        return self._steps.on_batch

    @on_batch.setter
    def on_batch(self, report: Callable[[BatchReport], None] | None) -> None:
        self._steps.on_batch = report

    def load_model(self, name: str, model: str, task: Task, image_size: int | None = None) -> ModelInfo:
        """Make a checkpoint resident under `name`; a second call for the same one returns at once.

        `model` is a hub id (`@revision` pins it), a local directory, or `demo`. `image_size`, pixels a side, if it is
        not to be the checkpoint's: positions are interpolated (Salesforce answered questions at 480). Raises
        CheckpointError, InputError for a size that is no multiple of the patches'.
        """
        held = self._infos.get(name)
        if held is not None:
            if (held.source, held.task) != (model, task) or image_size not in (None, held.image_size[0]):
                raise CheckpointError(f"the name {name!r} is taken by {held.source} ({held.task}); choose another")
            return held
        if task not in TASKS:
            raise CheckpointError(f"checkpoints are made for {', '.join(TASKS)}; {task!r} uses theirs")
        checkpoint = find_checkpoint(model, task=task)
        with ThreadPoolExecutor(1) as beside:  # half a second for a base model
            digest = beside.submit(checkpoint.weights_sha256)
            resident: ResidentModel[Any] = self._steps.call(
                lambda: ResidentModel(checkpoint, task, self.device, self.dtype, image_size, self._int8, self._compiled)
            ).result()
        info = ModelInfo(
            name, task, model, checkpoint.revision, digest.result(), resident.image_size,
            name_of(self.dtype, self._int8), self.device.type,
        )  # fmt: skip
        self._runners[name] = runner_for(task, resident)
        self._steps.runners.append(self._runners[name])
        if task == "itm":
            self._embedders[name] = EmbedRunner(resident)
        self._infos[name] = info
        _log.info(
            "%s (%s) is resident on %s in %s, %s attention%s",
            model,
            task,
            self.device,
            self.dtype,
            resident.attention,
            ", compiled" if resident.compiled else "",
        )
        return info

    def image_size(self, model: str) -> tuple[int, int]:
        """Height and width in pixels that a model takes. Raises InputError for a name that is not loaded."""
        return self._info(model).image_size

    def submit(self, request: Request) -> "Future[list[Result]]":
        """Queue a request; the future gives one result per text, or an InputError, or EngineClosedError."""
        if request.task == "capfilt":
            return submit_capfilt(self.submit, request)
        future: Future[list[Result]] = Future()
        future.set_running_or_notify_cancel()  # a cancelled one would refuse its result and end the engine's thread
        try:
            runner = self._runner(request.model, request.task)
            shapes, weight = runner.resident.shapes, -(-len(request.texts) // MOST_IN_GROUP)
            entry = Entry(runner, runner.prepare(request), future, weight, shapes.groups, shapes.images)
        except InputError as error:  # this request is settled; nothing was queued
            future.set_exception(error)
            return future
        if not self._steps.batcher.put(entry):
            future.set_exception(EngineClosedError("the engine is closed"))
        return future

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def caption(
        self,
        images: Sequence[ImageLike],
        prompts: Sequence[str] | None = None,
        *,
        model: str = "caption",
        **options: Any,
    ) -> list[Caption]:
        """A caption of every image; `prompts`, one per image, are continued. Options: `requests.GenerationOptions`.

        Raises OptionError, InputError, ImageError, EngineClosedError.
        """
        return cast(list[Caption], self._ask(model, "caption", images, prompts, options))

    def answer(
        self,
        images: Sequence[ImageLike],
        questions: Sequence[str],
        answers: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        model: str = "vqa",
        **options: Any,
    ) -> list[Answer]:
        """The answer to every question about the image at its place; an image given twice is encoded once.

        With `answers`, one list for all questions or one for each, the answer is chosen from them and `ranking` holds
        those that were read, best first, with the scores of `ranking.Ranking`. Options: `requests.AnswerOptions`.
        Errors are as of `caption`.
        """
        return cast(list[Answer], self._ask(model, "vqa", images, questions, options, answers))

    def match(
        self, images: Sequence[ImageLike], texts: Sequence[str], *, model: str = "itm", **options: Any
    ) -> list[Match]:
        """How well every text fits the image at its place; an image given twice is encoded once.

        Options: `requests.MatchOptions`. Errors are as of `caption`.
        """
        return cast(list[Match], self._ask(model, "itm", images, texts, options))

    def embed(
        self,
        images: Sequence[ImageLike] | None = None,
        texts: Sequence[str] | None = None,
        *,
        model: str = "itm",
        **options: Any,
    ) -> Vectors:
        """Unit vectors (N, projection) of images or of texts; their products are `Match.itc`.

        Options: `requests.MatchOptions`. Raises OptionError, InputError, ImageError, EngineClosedError.
        """
        runner = self._runner(model, "itm")
        if not isinstance(runner, MatchRunner) or (images is None) == (texts is None):
            raise InputError("embed takes either images or texts, and a retrieval model")
        chosen = cast(MatchOptions, options_for("itm", options))
        words = listed("texts", texts or ())
        pixels = [pixels_of(image, runner.resident.image_size) for image in listed("images", images or ())]
        embed = partial(runner.embed_images, pixels) if texts is None else partial(runner.embed_texts, words, chosen)
        return self._steps.call(lambda: embed().numpy()).result()

    def _ask(
        self,
        model: str,
        task: Task,
        images: Sequence[ImageLike],
        texts: Sequence[str] | None,
        options: Mapping[str, Any],
        answers: Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> list[Result]:
        images = listed("images", images)
        texts = [""] * len(images) if texts is None else listed("texts", texts)
        if len(images) != len(texts):
            raise InputError(f"{len(images)} images and {len(texts)} texts: there must be one text for each image")
        chosen, size = options_for(task, options), self.image_size(model)
        choices = choices_of(answers, len(images))
        # By the identity of the image, which `images` keeps alive, and the answers to choose from.
        places: dict[Hashable, list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault((id(image), choices[place]), []).append(place)
        futures = [
            self.submit(
                Request(model, task, pixels_of(images[p[0]], size), tuple(texts[n] for n in p), chosen, choices[p[0]])
            )
            for p in places.values()
        ]
        results: dict[int, Result] = {}
        for group, future in zip(places.values(), futures, strict=True):
            results.update(zip(group, future.result(), strict=True))
        return [results[place] for place in range(len(images))]

    def _info(self, model: str) -> ModelInfo:
        if model not in self._infos:
            raise InputError(f"no model {model!r} is loaded; there is: {', '.join(self._infos) or 'none'}")
        return self._infos[model]

    def _runner(self, model: str, task: Task) -> AnyRunner:
        info = self._info(model)
        if task == "embed" and model in self._embedders:
            return self._embedders[model]
        if info.task != task:
            raise InputError(f"model {model!r} serves {info.task}, not {task}")
        return self._runners[model]


def _stop(steps: Steps, thread: threading.Thread) -> None:
    steps.batcher.close()
    thread.join()


def _task_of(model: str) -> Task:
    """The task a checkpoint's configuration names."""
    directory = find_checkpoint(model).directory
    if (task := named_task(directory)) is None:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} does not say which task the model serves; name it caption, vqa or itm"
        )
    return task
