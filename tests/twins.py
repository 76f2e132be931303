"""Our models and transformers' with the same random weights."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from small_models import CLASSES, WORDS, liven, small_config
from torch import Tensor

import blip_engine
from blip_engine import BlipConfig
from blip_engine.requests import Task

SEP, BOS = 3, len(WORDS)

CONFIGS: dict[str, dict[str, Any]] = {
    "vision wider": small_config(),
    "vision narrower": small_config({"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}),
    "deep": small_config({"num_hidden_layers": 4}, {"num_hidden_layers": 5, "num_attention_heads": 2}),
    "large patches, other epsilon": small_config(
        {"image_size": 48, "patch_size": 16, "layer_norm_eps": 1e-6}, {"layer_norm_eps": 1e-5, "num_attention_heads": 8}
    ),
    "other activations, smoothed labels": small_config(
        {"hidden_act": "relu"}, {"hidden_act": "silu", "label_smoothing": 0.1, "hidden_size": 40}
    ),
    "one layer, one head": small_config(
        {"num_hidden_layers": 1, "num_attention_heads": 1}, {"num_hidden_layers": 1, "num_attention_heads": 1}
    ),
}
#: transformers can do VQA only where both widths are equal.
VQA_CONFIGS = {
    name: config | {"vision_config": config["vision_config"] | {"hidden_size": config["text_config"]["hidden_size"]}}
    for name, config in CONFIGS.items()
}


def configs_for(task: Task) -> dict[str, dict[str, Any]]:
    """Configurations that transformers can run."""
    return VQA_CONFIGS if task == "vqa" else CONFIGS


#: As wide as the published checkpoints, with few layers and words. These have 12 text heads; the default is 8.
_BASE = {"hidden_size": 768, "intermediate_size": 1024, "num_attention_heads": 12, "num_hidden_layers": 1}
_PATCHES = {"image_size": 48, "patch_size": 16, "initializer_range": 0.03}
WIDE_CONFIGS: dict[str, dict[str, Any]] = {
    "base-wide, 8 heads": small_config(_BASE | _PATCHES, _BASE | {"num_attention_heads": 8}),
    "base-wide, 12 heads": small_config(_BASE | _PATCHES, _BASE | {"num_hidden_layers": 2}),
    "large-wide": small_config(_BASE | _PATCHES | {"hidden_size": 1024, "num_attention_heads": 16}, _BASE),
}
#: Classes that are one tower, and which part of a configuration they take.
TOWERS = {"BlipVisionModel": "vision_config", "BlipTextModel": "text_config", "BlipTextLMHeadModel": "text_config"}


def pair(name: str, config: dict[str, Any], seed: int = 0, end: float = 0.0) -> tuple[Any, Any]:
    """Ours and theirs of any class, by its name. `end` is added to the logit of [SEP]."""
    torch.manual_seed(seed)
    whole, other = BlipConfig(**config), transformers.BlipConfig(**config)
    part = TOWERS.get(name)
    theirs = getattr(transformers, name)(getattr(other, part) if part else other)
    ours = getattr(blip_engine, name)(getattr(whole, part) if part else whole)
    if name == "BlipForQuestionAnswering":  # transformers' decoder has the width of the images, not of the questions
        answers = copy.deepcopy(other.text_config)
        answers.encoder_hidden_size = answers.hidden_size
        theirs.text_decoder = transformers.BlipTextLMHeadModel(answers)
    liven(theirs, 8.0 if whole.text_config.hidden_size < 100 else 2.0, "" if part == "text_config" else "text")
    if hasattr(theirs, "text_decoder"):
        theirs.text_decoder.cls.predictions.bias.data[SEP] += end
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def twins(task: Task, config: dict[str, Any] | None = None, seed: int = 0, end: float = 0.0) -> tuple[Any, Any]:
    """Ours and theirs. `end` is added to the logit of [SEP], so that texts end at different lengths."""
    config = config or configs_for(task)["vision wider"]
    kind = CLASSES[task]
    torch.manual_seed(seed)
    theirs = liven(getattr(transformers, kind.__name__)(transformers.BlipConfig(**config)))
    if end:
        with torch.no_grad():
            theirs.text_decoder.cls.predictions.bias[SEP] += end
    ours = kind(BlipConfig(**config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


def images(model: Any, number: int = 3, seed: int = 0) -> Tensor:
    """Normalised pixels (number, 3, size, size)."""
    size = model.config.vision_config.image_size
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def words(*shape: int, seed: int = 0) -> Tensor:
    """Ids of ordinary words."""
    return torch.randint(5, len(WORDS), shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal within 1e-5 of the larger of one and the greatest value."""
    assert ours.shape == theirs.shape
    scale = max(1.0, float(theirs.detach().abs().max()))
    assert float((ours - theirs).detach().abs().max()) <= 1e-5 * scale


def texts(sequences: Tensor, prompt: int = 1) -> list[list[int]]:
    """Ids without what stands behind the first [SEP] after the prompt; transformers fills up beams with [SEP]."""
    return [_text(row, prompt) for row in sequences.tolist()]


def _text(row: Sequence[int], prompt: int) -> list[int]:
    ends = [place for place, token in enumerate(row) if token == SEP and place >= prompt]
    return list(row[: ends[0] + 1] if ends else row)
