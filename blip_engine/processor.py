"""Images and texts to a model's inputs in one call."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from .checkpoint import HubOptions, find_checkpoint
from .features import BatchFeature
from .image_processor import BlipImageProcessor, ImageInput
from .tokenizer import BertTokenizer

_TEXT_OPTIONS: Final = frozenset(inspect.signature(BertTokenizer.__call__).parameters) - {"self", "text"}


class BlipProcessor:
    """An image processor and a tokenizer behind one call."""

    def __init__(self, image_processor: BlipImageProcessor, tokenizer: BertTokenizer) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **loading: Any
    ) -> "BlipProcessor":
        """From a directory or a hub repository.

        `loading` is as of the models; use_fast and backend change nothing, for Pillow always resizes. Raises
        CheckpointError, OptionError for other names.
        """
        hub = HubOptions.of(loading, without_effect=("use_fast", "backend", "trust_remote_code"))
        return cls.from_directory(find_checkpoint(pretrained_model_name_or_path, revision, hub=hub).directory)

    @classmethod
    def from_directory(cls, directory: Path) -> "BlipProcessor":
        """From the files in `directory`. Raises CheckpointError."""
        return cls(BlipImageProcessor.from_directory(directory), BertTokenizer.from_directory(directory))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the files of both parts."""
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """`pixel_values` (B, 3, H, W) of `images`, `input_ids` and `attention_mask` (B, T) of `text`.

        `options` are those of BlipImageProcessor and BertTokenizer: padding, truncation, do_resize and so on. Raises
        ValueError when there is neither an image nor a text, TypeError for an argument that neither has, InputError for
        what is no image or no text.
        """
        if images is None and text is None:
            raise ValueError("You have to specify either images or text")
        text_options = {name: options.pop(name) for name in _TEXT_OPTIONS & options.keys()}
        unknown = [name for name in options if name not in self.image_processor.to_dict()]
        if unknown:
            raise TypeError(f"BlipProcessor has no argument {unknown[0]!r}")
        features = BatchFeature()
        if text is not None:
            features.update(self.tokenizer(text, return_tensors=return_tensors, **text_options))
        if images is not None:
            features.update(self.image_processor(images, return_tensors=return_tensors, **options))
        return features

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """As `BertTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """As `BertTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens)
