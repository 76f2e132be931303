"""Cross-attention that reads the encoder's states themselves, without keys and values of them.

A head's score of a query q and a state s is q . (K s + k) = (K' q) . s + q . k, and q . k is the same for every state,
so the softmax does not see it. The context is V (sum of p s) + v. So K and V may be applied to the few queries and
contexts instead of to the many states (DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, section 2.1.2, does so with
compressed states). With few queries for each image that is less arithmetic than projecting its 577 states in every
layer, and the states, which all layers share, stay in a processor's cache; keys and values, 24 times as large, do not.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn


class Absorbed:
    """The key and value projections of one layer, by heads, as the queries and the contexts meet them."""

    def __init__(self, key: nn.Linear, value: nn.Linear, heads: int) -> None:
        weight = key.weight.detach().unflatten(0, (heads, -1))  # (heads, hs, width)
        self._keys = (weight * weight.shape[1] ** -0.5).contiguous()  # the scores' scale is in them
        self._values = value.weight.detach().unflatten(0, (heads, -1)).transpose(1, 2).contiguous()
        self._bias = value.bias.detach().unflatten(0, (heads, 1, -1))  # (heads, 1, hs)
        self._wide = _has_wide_products(weight.device, weight.dtype)

    def attend(self, query: Tensor, states: Tensor) -> Tensor:
        """Context (B, heads, T, hs) of (B, heads, T, hs) queries that look at (B, S, width) states."""
        images, heads = query.shape[:2]
        looks = _by_image(query.transpose(0, 1).flatten(1, 2) @ self._keys, images)  # (B, heads * T, width)
        probabilities = self._scores(looks, states.transpose(1, 2)).softmax(dim=-1)
        seen = _by_image(probabilities.to(states.dtype) @ states, heads)  # (heads, B * T, width)
        return torch.baddbmm(self._bias, seen, self._values).unflatten(1, (images, -1)).transpose(0, 1)

    def _scores(self, looks: Tensor, states: Tensor) -> Tensor:
        """In float32 where that costs nothing, as a fused kernel has them: the softmax multiplies their rounding."""
        return torch.bmm(looks, states, out_dtype=torch.float32) if self._wide else looks @ states


@lru_cache
def _has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of half precision may come out in float32 here: on GPUs, from some torch on."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    tile = torch.zeros(1, 16, 16, device=device, dtype=dtype)
    try:
        return torch.bmm(tile, tile, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # this torch, or this GPU, has none: scores are rounded once
        return False


def _by_image(rows: Tensor, parts: int) -> Tensor:
    """(A, parts * T, width) to (parts, A * T, width)."""
    return rows.unflatten(1, (parts, -1)).transpose(0, 1).flatten(1, 2)


def absorbing_pays(queries: int, states: int, width: int, hidden: int, heads: int) -> bool:
    """Whether `queries` of an image cost fewer products so than with keys and values of its `states`.

    `width` is the states', `hidden` the text's. In BLIP about 60 queries are the limit: 20 tokens of three beams.
    """
    projected = 2 * states * width * hidden + queries * 2 * states * hidden
    absorbed = queries * (2 * heads * states * width + 2 * width * hidden)
    return absorbed <= projected
