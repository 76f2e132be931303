"""Scaled dot-product attention and its masks, the one place where both towers attend."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, heads, T, hs) queries over (B, heads, S, hs) keys (https://arxiv.org/abs/1706.03762).

    `mask` is added to the scores and broadcasts to (B, heads, T, S). Returns the context (B, heads, T, hs) and, with
    `weights`, the attention probabilities (B, heads, T, S), which the fused kernels do not give.
    """
    if not weights:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    probabilities = (scores if mask is None else scores + mask).softmax(dim=-1)
    return F.dropout(probabilities, dropout) @ value, probabilities


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, T, heads * hs) to (B, heads, T, hs)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """(B, heads, T, hs) to (B, T, heads * hs)."""
    return states.transpose(1, 2).flatten(-2)


def padding_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a (B, S) mask with 1 for tokens and 0 for padding: (B, 1, 1, S) to add to the scores."""
    return _additive(attention_mask[:, None, None, :].bool(), dtype)


def causal_mask(length: int, past: int, attention_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """For `length` new tokens behind `past` cached ones: (B or 1, 1, length, past + length), None if nothing is hidden.

    `attention_mask` (B, past + length), 1 for tokens, hides padding as well.
    """
    if length == 1 and attention_mask is None:
        return None
    total = past + length
    visible = torch.ones(length, total, dtype=torch.bool, device=like.device).tril(past)[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    return _additive(visible, like.dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # Half of the lowest finite number: exp() of it is exactly 0, and a row that sees nothing (left padding) stays
    # finite instead of turning into NaN.
    hidden = torch.finfo(dtype).min / 2
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)
