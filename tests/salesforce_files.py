"""Salesforce's `.pth` files in small, by renaming the tensors of our own random models."""

import re
from typing import Any

import torch
from small_models import CLASSES, liven, small_config
from torch import Tensor

from blip_engine import BlipConfig
from blip_engine.requests import Task

#: From the hub's names to Salesforce's, in the order of replacement; text towers and heads have the same names.
SALESFORCE = (
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv", r"visual_encoder.blocks.\1.attn.qkv"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])", r"visual_encoder.blocks.\1.norm\2"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp", r"visual_encoder.blocks.\1.mlp"),
    (r"^vision_model\.post_layernorm", "visual_encoder.norm"),
)


def config(vision_width: int = 128, text_width: int = 128) -> dict[str, Any]:
    """As the file's reader must tell it: heads of 64, feed-forward blocks four times as wide, epsilon 1e-6."""
    return small_config(
        {
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": 3,
            "num_attention_heads": vision_width // 64,
            "layer_norm_eps": 1e-6,
        },
        {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_attention_heads": text_width // 64},
    )


def small(task: Task, **widths: int) -> Any:
    torch.manual_seed(0)
    return liven(CLASSES[task](BlipConfig(**config(**widths))), 2.0)  # type: ignore[operator]


def their_name(name: str) -> str:
    for pattern, replacement in SALESFORCE:
        name = re.sub(pattern, replacement, name)
    return name


def their_tensors(model: Any) -> dict[str, Tensor]:
    """The model's tensors and what Salesforce's files hold besides."""
    tensors = {their_name(name): value for name, value in model.state_dict().items()}
    momentum = {re.sub(r"^(\w+)\.", r"\1_m.", name): value + 1 for name, value in tensors.items()}
    names = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue", "temp")
    positions = {name: torch.arange(64)[None] for name in _position_ids(tensors)}
    return tensors | momentum | positions | {name: torch.zeros(1, dtype=torch.long) for name in names}


def _position_ids(tensors: dict[str, Tensor]) -> list[str]:
    return [
        name.replace("position_embeddings.weight", "position_ids") for name in tensors if "position_embeddings" in name
    ]
