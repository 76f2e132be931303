"""BLIP in PyTorch and a resident engine that batches its three tasks.

Names are imported on first use: `import blip_engine.requests` loads neither torch nor Pillow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .auto import AutoModel as AutoModel
    from .auto import AutoModelForVisualQuestionAnswering as AutoModelForVisualQuestionAnswering
    from .auto import AutoProcessor as AutoProcessor
    from .auto import AutoTokenizer as AutoTokenizer
    from .config import BlipConfig as BlipConfig
    from .config import BlipTextConfig as BlipTextConfig
    from .config import BlipVisionConfig as BlipVisionConfig
    from .contrastive import BlipModel as BlipModel
    from .engine import Engine as Engine
    from .engine import ModelInfo as ModelInfo
    from .image_processor import BlipImageProcessor as BlipImageProcessor
    from .image_processor import BlipImageProcessorPil as BlipImageProcessorPil
    from .models import BlipForConditionalGeneration as BlipForConditionalGeneration
    from .models import BlipForImageTextRetrieval as BlipForImageTextRetrieval
    from .models import BlipForQuestionAnswering as BlipForQuestionAnswering
    from .pipelines import pipeline as pipeline
    from .processor import BlipProcessor as BlipProcessor
    from .recipes import capfilt as capfilt
    from .recipes import find_images as find_images
    from .recipes import find_texts as find_texts
    from .text import BlipTextLMHeadModel as BlipTextLMHeadModel
    from .text import BlipTextModel as BlipTextModel
    from .tokenizer import BertTokenizer as BertTokenizer
    from .vision import BlipVisionModel as BlipVisionModel

_HOMES = {
    "auto": ("AutoModel", "AutoModelForVisualQuestionAnswering", "AutoProcessor", "AutoTokenizer"),
    "config": ("BlipConfig", "BlipTextConfig", "BlipVisionConfig"),
    "contrastive": ("BlipModel",),
    "engine": ("Engine", "ModelInfo"),
    "image_processor": ("BlipImageProcessor", "BlipImageProcessorPil"),
    "models": ("BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering"),
    "pipelines": ("pipeline",),
    "processor": ("BlipProcessor",),
    "recipes": ("capfilt", "find_images", "find_texts"),
    "text": ("BlipTextLMHeadModel", "BlipTextModel"),
    "tokenizer": ("BertTokenizer",),
    "vision": ("BlipVisionModel",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # derived, so that a name stands in one place


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, and rarely wanted

    try:
        return version("blip-batch")
    except PackageNotFoundError:  # a source tree that was not installed
        return "unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
