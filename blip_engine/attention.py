"""Scaled dot-product attention and its masks, the one place where both towers attend."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .precision import cpu_features

#: Scores made at once where nobody asks for them: more of them leave a processor's cache before the softmax and the
#: second product have read them, which cost a seventh of the vision tower's attention.
_AT_ONCE = 2_000_000
_TILE_ROWS = 8
_SHORT = 64  # queries: fewer than any image has patches
_UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ALIGNED = 8  # elements: torch's kernels pad a mask whose rows are not, anew in each layer


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, heads, T, hs) queries over (B, heads, S, hs) keys (https://arxiv.org/abs/1706.03762).

    `mask` is added to the scores and broadcasts to (B, heads, T, S). Returns the context (B, heads, T, hs) and, with
    `weights`, the attention probabilities (B, heads, T, S), which the fused kernels do not give.
    """
    plain = weights or _learns(mask, query, key, value) or prefers_products(query.device.type, query.dtype)
    if not plain:
        with _kernels_for(query, mask):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
    if mask is None and not weights and not dropout and not torch.is_grad_enabled():
        return _in_parts(query, key, value), None
    probabilities = _scores(query, key, mask).softmax(dim=-1)
    kept = F.dropout(probabilities, dropout) if dropout else probabilities
    return kept @ value, probabilities if weights else None


def _kernels_for(query: Tensor, mask: Tensor | None) -> AbstractContextManager[None]:
    """Keeps texts on a GPU from cuDNN, which torch may prefer on recent ones.

    It makes a plan for every shape, which takes a large part of a second, and decoding has another one in every step.
    """
    if query.is_cuda and (mask is not None or query.shape[2] < _SHORT):
        return sdpa_kernel(_UNPLANNED)
    return nullcontext()


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, T, S), scaled and masked."""
    scores = (query @ key.transpose(-1, -2)).mul_(query.shape[-1] ** -0.5)
    return scores if mask is None else scores + mask


def _in_parts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The context, a few heads after the other."""
    batch, tokens, scale = query.shape[:2], query.shape[2], query.shape[-1] ** -0.5
    query = _whole_tiles(query).flatten(0, 1)
    heads = max(1, _AT_ONCE // (query.shape[1] * key.shape[2]))
    context, unread = torch.empty_like(query), query.new_empty(1, 1, 1)
    parts = (states.split(heads) for states in (query, key.flatten(0, 1), value.flatten(0, 1), context))
    for q, k, v, into in zip(*parts, strict=True):
        # beta is 0. So the product is scaled on its way out, not in a further pass
        scores = torch.baddbmm(unread, q, k.transpose(1, 2), beta=0, alpha=scale)
        torch.bmm(scores.softmax(-1), v, out=into)
    return context.unflatten(0, batch)[:, :, :tokens]


def _whole_tiles(query: Tensor) -> Tensor:
    """(B, heads, T, hs) queries with blank ones behind them: the products' kernels are slow at rows left over.

    The 577 rows of an image took a third longer than 576 do.
    """
    missing = -query.shape[2] % _TILE_ROWS
    return F.pad(query, (0, 0, 0, missing)) if missing and query.shape[2] > _TILE_ROWS else query.contiguous()


def prefers_products(device: str, dtype: torch.dtype) -> bool:
    """Whether attention on this type of device is better done as plain products than by torch's fused kernel.

    It is in half precision on processors without AMX: the fused kernel has a fast path for AMX only, and elsewhere
    takes two to three times as long. The processor alone decides, not a measurement: the two round differently, and
    every process of a machine must give the same bits.
    """
    return device == "cpu" and dtype in {torch.bfloat16, torch.float16} and not _has_amx()


@lru_cache
def _has_amx() -> bool:
    return bool(cpu_features().get("amx_bf16"))


def _learns(mask: Tensor | None, *inputs: Tensor) -> bool:
    """Whether gradients are to flow past a mask.

    Those of a fused kernel are wrong where a query sees nothing (left padding): it keeps the logarithm of the sum of a
    row's exponentials, in which the mask's value swallows the rest.
    """
    return mask is not None and torch.is_grad_enabled() and any(part.requires_grad for part in inputs)


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

    `attention_mask` (B, past + length), 1 for tokens, hides padding as well. (B, T, past + T) says all by itself what
    each of T tokens sees.
    """
    if attention_mask is not None and attention_mask.ndim == 3:
        return _additive(attention_mask[:, None].bool(), like.dtype)
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
    hidden, length = torch.finfo(dtype).min / 2, visible.shape[-1]
    room = -(-length // _ALIGNED) * _ALIGNED if visible.is_cuda else length
    mask = torch.zeros(*visible.shape[:-1], room, dtype=dtype, device=visible.device)[..., :length]
    return mask.masked_fill_(~visible, hidden)
