"""The glue between transformers' calling conventions for `generate` and ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, OptionError
from .generation import Generated, Limits
from .requests import GenerationOptions

_DEFAULT_NEW_TOKENS = 20  # what transformers generates for BLIP when no length is given
_DEFAULT_TOP_K = 50  # its default when sampling
_NAMES = (
    *("num_beams", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "length_penalty"),
    *("num_return_sequences", "max_length", "min_length", "max_new_tokens", "min_new_tokens"),
)


def generation_setup(
    given: Mapping[str, Any], prompt_lengths: Tensor, positions: int
) -> tuple[GenerationOptions, Limits]:
    """Options and limits of `generate(**given)`, with transformers' defaults and meanings.

    `max_length` and `min_length` count the prompt (B,) lengths, the `*_new_tokens` do not and win over them.
    `positions` is how many tokens the decoder can tell apart. Raises InputError when the lengths leave no room.
    Raises OptionError for an argument that does not exist here.
    """
    values = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in values if name not in _NAMES]
    if unknown:
        raise OptionError(f"generate() has no argument {unknown[0]!r}; it has: {', '.join(_NAMES)}")
    most = _limit(values, "max_new_tokens", "max_length", prompt_lengths, _DEFAULT_NEW_TOKENS)
    least = _limit(values, "min_new_tokens", "min_length", prompt_lengths, 0).clamp(min=0)
    if int(most.min()) < 1:
        raise InputError("max_length leaves no room behind the prompt; raise it, or set max_new_tokens")
    values.setdefault("num_beams", 1)
    if values.get("do_sample"):
        values.setdefault("top_k", _DEFAULT_TOP_K)
    longest = int((prompt_lengths + most).max()) - 1  # the last token is not read
    if longest > positions:
        raise InputError(f"prompt and new tokens need {longest} positions, the model has {positions}")
    steps = int(most.max())
    options = GenerationOptions(max_new_tokens=steps, min_new_tokens=min(int(least.max()), steps), **values)
    return options, Limits(most, least, steps)


def _limit(values: dict[str, Any], new: str, total: str, prompt_lengths: Tensor, default: int) -> Tensor:
    whole = values.pop(total, None)
    fresh = values.pop(new, None)
    if fresh is None and whole is not None:
        return int(whole) - prompt_lengths
    return torch.full_like(prompt_lengths, default if fresh is None else int(fresh))


def token_rows(input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None) -> list[list[int]]:
    """The ids of every row without its padding, as lists."""
    ids = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(row) for row in input_ids]
    if attention_mask is None:
        return ids
    return [
        [token for token, kept in zip(row, mask, strict=True) if kept]
        for row, mask in zip(ids, attention_mask.tolist(), strict=True)
    ]


def with_prompts(prompts: Sequence[Sequence[int]], generated: Generated, pad: int) -> Tensor:
    """Prompt and new tokens of every sequence, (B * sequences, T), padded on the right."""
    rows = [
        [*prompt, *tokens[:length]]
        for prompt, sequences, lengths in zip(
            prompts, generated.tokens.tolist(), generated.lengths.tolist(), strict=True
        )
        for tokens, length in zip(sequences, lengths, strict=True)
    ]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=generated.tokens.device)
