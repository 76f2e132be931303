"""Our models and transformers' with the same random weights."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from small_models import CLASSES, WORDS, liven, small_config
from torch import Tensor

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
