"""The vision transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) with BLIP's tensor names."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attend, merge_heads, split_heads
from .config import BlipVisionConfig
from .errors import InputError
from .outputs import VisionOutput
from .pretrained import PreTrainedModel, activation


class BlipVisionEmbeddings(nn.Module):
    """Patches, the class token and learned positions."""

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + side * side, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, 3, height, width) normalised pixels to (B, 1 + patches, width)."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        positions = self._positions(pixel_values.shape[-2:], interpolate_pos_encoding)
        patches = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + positions

    def _positions(self, size: torch.Size, interpolate: bool) -> Tensor:
        if tuple(size) == (self.image_size, self.image_size):
            return self.position_embedding
        if not interpolate:  # transformers cuts the positions off, which is silently wrong
            raise InputError(
                f"pixel_values are {size[0]}x{size[1]}, the model expects {self.image_size}x{self.image_size}; "
                "resize them, or set interpolate_pos_encoding=True"
            )
        return self.interpolated_positions(size[0], size[1])

    def interpolated_positions(self, height: int, width: int) -> Tensor:
        """The learned positions, bicubically resized to another image size in pixels: (1, 1 + patches, width)."""
        return resized_positions(self.position_embedding, height // self.patch_size, width // self.patch_size)


def resized_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions (1, 1 + side * side, width), bicubically to (1, 1 + rows * columns, width); the first stays."""
    side = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class BlipAttention(nn.Module):
    """Self-attention with one fused projection."""

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, T, width) to the same, and the attention probabilities if asked for."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(states).chunk(3, dim=-1))
        context, probabilities = attend(query, key, value, None, self.dropout if self.training else 0.0, weights)
        return self.projection(merge_heads(context)), probabilities


class BlipMLP(nn.Module):
    """The feed-forward block."""

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__()
        self.activation = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states)))


class BlipEncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__()
        self.self_attn = BlipAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BlipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        attended, probabilities = self.self_attn(self.layer_norm1(states), weights)
        states = states + attended
        return states + self.mlp(self.layer_norm2(states)), probabilities


class BlipEncoder(nn.Module):
    """The stack of layers (a module of its own only for its name in the checkpoints)."""

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BlipEncoderLayer(config) for _ in range(config.num_hidden_layers))


class BlipVisionModel(PreTrainedModel[BlipVisionConfig]):
    """BLIP's vision tower.

    Source: `visual_encoder` of https://github.com/salesforce/BLIP; tensors named as in the hub's checkpoints.
    """

    config_class = BlipVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = BlipVisionEmbeddings(config)
        self.encoder = BlipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.initialise(config.initializer_range)
        for positions in (self.embeddings.position_embedding, self.embeddings.class_embedding):
            nn.init.trunc_normal_(positions, std=config.initializer_range)

    @torch.no_grad()
    def resize_images(self, image_size: int) -> None:
        """Take images of `image_size` pixels a side from now on: the learned positions are interpolated once.

        Raises InputError for what is no multiple of the patch size.
        """
        patch, embeddings = self.config.patch_size, self.embeddings
        if image_size < patch or image_size % patch:
            raise InputError(f"image size {image_size} is no multiple of the patch size {patch}")
        embeddings.position_embedding = nn.Parameter(embeddings.interpolated_positions(image_size, image_size))
        embeddings.image_size = self.config.image_size = image_size

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode images.

        `pixel_values`: (B, 3, height, width), normalised. With `interpolate_pos_encoding` any multiple of the patch
        size is taken; without it only the configured size. Raises InputError otherwise, ValueError without images.
        Returns a VisionOutput, or a tuple with `return_dict=False`.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        keep_attentions, keep_hidden = self.asked(output_attentions, output_hidden_states)
        states = self.embeddings(pixel_values, interpolate_pos_encoding)
        hidden, attentions = [states], []
        for layer in self.encoder.layers:
            states, probabilities = layer(states, keep_attentions)
            hidden.append(states)
            attentions.append(probabilities)
        last = self.post_layernorm(states)
        output = VisionOutput(
            last_hidden_state=last,
            pooler_output=self.post_layernorm(last[:, 0]),
            hidden_states=tuple(hidden) if keep_hidden else None,
            attentions=tuple(attentions) if keep_attentions else None,
        )
        return self.returned(output, return_dict)
