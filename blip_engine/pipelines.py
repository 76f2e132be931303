"""`pipeline(task, model)`: from images and texts as people have them to answers, captions and matches.

One pair at a time and with transformers' defaults; `Engine` is for many rows.
"""

import warnings
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.error import URLError
from urllib.request import urlopen

import torch
from PIL import Image

from .errors import ImageError, InputError, OptionError
from .features import BatchFeature
from .images import ImageLimits, decode_image
from .models import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from .pretrained import DeviceMap
from .processor import BlipProcessor
from .requests import DEFAULT_MODELS, Task

_TIMEOUT_SECONDS = 30.0  # for an image's server to answer


class Pipeline:
    """A model with its processor. `pipeline` makes one."""

    task: ClassVar[Task]
    model_class: ClassVar[Any]

    def __init__(self, model: Any, processor: BlipProcessor) -> None:
        self.model, self.processor = model, processor

    def _inputs(self, image: Any, text: str | None) -> BatchFeature:
        features = self.processor(images=load_image(image), text=text, return_tensors="pt")
        return features.to(self.model.device, self.model.dtype)

    def _texts(self, sequences: torch.Tensor) -> list[str]:
        return [text.strip() for text in self.processor.batch_decode(sequences, skip_special_tokens=True)]


class VisualQuestionAnsweringPipeline(Pipeline):
    """Questions about images. Arguments of `generate` may follow; it raises OptionError for others."""

    task = "vqa"
    model_class = BlipForQuestionAnswering

    def __call__(self, image: Any, question: str | Sequence[str] | None = None, **generate_kwargs: Any) -> list[Any]:
        """`[{"answer": text}]` of a question about an image, a list of these for several.

        `image` is a path, a URL, bytes or a Pillow image. With lists every question is asked of every image, all of the
        first question before the second. Dictionaries `{"image": …, "question": …}` say both. Raises InputError.
        """

        def answer(one: Any, text: str) -> list[dict[str, str]]:
            sequences = self.model.generate(**self._inputs(one, text), **generate_kwargs)
            return [{"answer": answer} for answer in self._texts(sequences)]

        return _over_pairs(answer, image, question, "question")


class ImageToTextPipeline(Pipeline):
    """Captions. Arguments of `generate` may follow; it raises OptionError for others."""

    task = "caption"
    model_class = BlipForConditionalGeneration

    def __call__(self, images: Any, prompt: str | None = None, **generate_kwargs: Any) -> list[Any]:
        """`[{"generated_text": text}]` of an image, a list of these for a list of images.

        An image is a path, a URL, bytes or a Pillow image; the caption continues `prompt`. Raises InputError.
        """
        generate_kwargs |= generate_kwargs.pop("generate_kwargs", {})

        def caption(one: Any) -> list[dict[str, str]]:
            sequences = self.model.generate(**self._inputs(one, prompt), **generate_kwargs)
            return [{"generated_text": text} for text in self._texts(sequences)]

        return [caption(one) for one in images] if isinstance(images, list | tuple) else caption(images)


class ImageTextMatchingPipeline(Pipeline):
    """How well texts fit images."""

    task = "itm"
    model_class = BlipForImageTextRetrieval

    def __call__(self, image: Any, text: str | Sequence[str] | None = None) -> Any:
        """`{"match": probability, "similarity": cosine}` of a text and an image, a list of these for several.

        `image` and lists are as in VisualQuestionAnsweringPipeline. Raises InputError.
        """
        return _over_pairs(self._match, image, text, "text")

    @torch.no_grad()
    def _match(self, image: Any, text: str) -> dict[str, float]:
        inputs = self._inputs(image, text)
        scores = [self.model(**inputs, use_itm_head=head).itm_score.float() for head in (True, False)]
        return {"match": float(scores[0].softmax(-1)[0, 1]), "similarity": float(scores[1][0, 0])}


PIPELINES: Final[dict[str, type[Pipeline]]] = {
    "visual-question-answering": VisualQuestionAnsweringPipeline,
    "image-to-text": ImageToTextPipeline,
    "image-text-matching": ImageTextMatchingPipeline,
}


def pipeline(
    task: str,
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    device: int | str | torch.device | None = None,
    device_map: DeviceMap = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
) -> Any:
    """The pipeline of a task, over a checkpoint (default: the task's from the hub).

    `device` is a GPU's number, -1 for the CPU, or a name; on a machine without a GPU a number means the CPU, with a
    warning. The rest is as in `from_pretrained`. Raises OptionError for an unknown task, CheckpointError.
    """
    if task not in PIPELINES:
        raise OptionError(f"pipeline() has no task {task!r}; it has: {', '.join(PIPELINES)}")
    kind = PIPELINES[task]
    source = DEFAULT_MODELS[kind.task] if model is None else model
    place = device_map if device is None else _numbered(device)
    loaded = kind.model_class.from_pretrained(
        source, revision=revision, dtype=dtype, torch_dtype=torch_dtype, device_map=place
    )
    return kind(loaded, BlipProcessor.from_pretrained(source, revision=revision))


def load_image(image: Any) -> Image.Image:
    """An upright RGB image of a path, a URL (http, https), bytes, or a Pillow image, which is taken as it is.

    Raises InputError where there is none.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return decode_image(image)
    if not isinstance(image, str | Path):
        raise InputError(f"an image must be a path, a URL, bytes or a Pillow image, not {type(image).__name__}")
    try:
        return decode_image(_bytes_at(image))
    except ImageError as error:
        raise ImageError(error.code, f"{image}: {error}") from None


def _bytes_at(place: str | Path) -> bytes:
    try:
        if not str(place).startswith(("http://", "https://")):
            return Path(place).read_bytes()
        with urlopen(str(place), timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310  # the scheme is checked
            return bytes(response.read(ImageLimits().max_bytes + 1))
    except URLError as error:
        raise InputError(f"{place} cannot be fetched: {error.reason}") from None
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror or error}") from None
    except (HTTPException, ValueError) as error:  # a name that no file or server can have, a broken answer
        raise InputError(f"{place} cannot be read: {error}") from None


def _over_pairs(run: Callable[[Any, str], Any], image: Any, text: Any, name: str) -> Any:
    """`run` over one image and one text, or the list of its results over dictionaries or lists of them."""
    if isinstance(image, dict):
        return _over_pairs(run, image.get("image"), image.get(name), name)
    if isinstance(image, list | tuple) and text is None:
        return [_over_pairs(run, one, None, name) for one in image]
    if not text:
        raise InputError(f"pass a {name} with the image")
    if isinstance(text, str) and not isinstance(image, list | tuple):
        return run(image, text)
    texts = [text] if isinstance(text, str) else text
    images = image if isinstance(image, list | tuple) else [image]
    return [run(one, each) for each in texts for one in images]


def _numbered(device: int | str | torch.device) -> str | torch.device:
    if not isinstance(device, int):
        return device
    if device >= 0 and not torch.cuda.is_available():
        warnings.warn(f"there is no GPU {device} here: running on the CPU", UserWarning, stacklevel=3)
    return f"cuda:{device}" if device >= 0 and torch.cuda.is_available() else "cpu"
