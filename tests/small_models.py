"""Small random checkpoints: every class of BLIP at a size that a test can afford."""

from pathlib import Path
from typing import Any

import torch

from blip_engine import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
)
from blip_engine.requests import Task
from blip_engine.tokenizer import wordpiece

#: On matrices of this size threads cost more in waiting for each other than they give, on a busy machine tenfold.
torch.set_num_threads(1)

# fmt: off
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "is", "are", "how", "many", "what", "red", "blue",
    "green", "dog", "cat", "dogs", "cats", "picture", "of", "photo", "on", "in", "this", "left", "right", "yes", "no",
    "one", "two", "three", "?", ",", ".", "##s", "##ing", "run", "sit",
]
# fmt: on
CLASSES = {
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "itm": BlipForImageTextRetrieval,
}


def small_config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of BlipConfig, ours and transformers' alike."""
    words = len(WORDS)
    return {
        "image_text_hidden_size": 16,
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.1,
        }
        | (vision or {}),
        "text_config": {
            "vocab_size": words + 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": words,
            "sep_token_id": 3,
            "pad_token_id": 0,
        }
        | (text or {}),
    }


def liven(model: torch.nn.Module, factor: float = 8.0, within: str = "text") -> torch.nn.Module:
    """Scale a fresh model's text matrices, so that its logits differ enough for searches to have something to find."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if within in name and parameter.dim() == 2:
                parameter.mul_(factor)
    return model.eval()


def save_checkpoint(directory: Path, task: Task, seed: int = 0, **config: Any) -> Path:
    """A checkpoint directory as a hub repository has it: configuration, weights, tokenizer, preprocessor."""
    torch.manual_seed(seed)
    settings = BlipConfig(**(config or small_config()))
    liven(CLASSES[task](settings)).save_pretrained(directory)  # type: ignore[operator]
    BertTokenizer(wordpiece({word: i for i, word in enumerate(WORDS)})).save_pretrained(directory)
    BlipImageProcessor(size=settings.vision_config.image_size).save_pretrained(directory)
    return directory
