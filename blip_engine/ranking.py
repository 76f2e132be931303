"""Visual question answering by choice: which of given answers the decoder finds likeliest.

Source: `rank_answer` in `models/blip_vqa.py` of https://github.com/salesforce/BLIP. The first wordpiece picks the
candidates worth reading, teacher forcing scores those.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError
from .generation import Memory
from .text import BlipTextLMHeadModel
from .text_layers import BlipTextLayer

#: In the loss that ranks, in evaluation too: Salesforce's.
LABEL_SMOOTHING: Final = 0.1
_IGNORED: Final = -100


@dataclass(frozen=True)
class Ranking:
    """The likeliest candidates for every question, best first; equal ones in the candidates' order."""

    answers: Tensor  # (B, k) rows of the candidates
    scores: Tensor  # (B, k) float32, sums over an answer's wordpieces and [SEP]: not divided by the length


@torch.no_grad()
def rank(
    decoder: BlipTextLMHeadModel,
    memory: Memory,
    candidates: Tensor,
    k: int = 128,
    label_smoothing: float = LABEL_SMOOTHING,
) -> Ranking:
    """Rank `candidates` (A, L), [BOS] words [SEP] padded on the right, for the B questions of `memory`.

    The `k` whose first wordpiece is likeliest are scored, all if there are fewer. A score is minus the cross-entropy of
    the answer. `label_smoothing` in it is Salesforce's, in evaluation too; 0 makes the score a log-probability.
    Raises InputError.
    """
    if candidates.dim() != 2 or not len(candidates) or candidates.shape[1] < 2:
        raise InputError(
            f"candidates must be (answers, tokens) ids, at least one of two, not {tuple(candidates.shape)}"
        )
    if k < 1:
        raise InputError(f"k must be 1 or more, not {k}")
    memory = with_keys(decoder, memory)
    chances = first_token_chances(decoder, memory, int(candidates[0, 0]))
    likely = chances[:, candidates[:, 1]].argsort(dim=1, descending=True, stable=True)[:, :k]
    # Question by question: the logits of k answers are large, and no question depends on another.
    scores = torch.stack(
        [
            answer_scores(decoder, _row(memory, n), candidates[chosen], label_smoothing)
            for n, chosen in enumerate(likely)
        ]
    )
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Ranking(likely.gather(1, order), scores.gather(1, order))


def with_keys(decoder: BlipTextLMHeadModel, memory: Memory) -> Memory:
    """The questions' states (B, S, width) as the decoder's keys and values, projected once for all their answers."""
    if memory.states is None:
        raise InputError("ranking reads the questions' states, not their keys and values")
    layers = cast(Iterable[BlipTextLayer], decoder.bert.encoder.layer)
    return Memory(None, memory.mask, [layer.crossattention.self.project(memory.states) for layer in layers])


def first_token_chances(decoder: BlipTextLMHeadModel, memory: Memory, bos: int) -> Tensor:
    """(B, vocabulary) float32 probabilities of an answer's first token, for the B questions of `memory`'s keys."""
    keys = memory.keys or []
    start = torch.full((len(keys[0][0]), 1), bos, device=keys[0][0].device)
    return _logits(decoder, start, memory)[:, 0].softmax(-1)


def _row(memory: Memory, row: int) -> Memory:
    return Memory(
        None,
        None if memory.mask is None else memory.mask[row : row + 1],
        [(key[row : row + 1], value[row : row + 1]) for key, value in memory.keys or []],
    )


def answer_scores(decoder: BlipTextLMHeadModel, memory: Memory, ids: Tensor, label_smoothing: float) -> Tensor:
    """(n,) minus cross-entropies of (n, L) answers, to the n questions of `memory`'s keys or all to its only one."""
    logits = _logits(decoder, ids, memory)
    targets = ids.masked_fill(ids == decoder.config.pad_token_id, _IGNORED)[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        targets.flatten(),
        ignore_index=_IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return -losses.unflatten(0, targets.shape).sum(1)


def _logits(decoder: BlipTextLMHeadModel, ids: Tensor, memory: Memory) -> Tensor:
    cache = decoder.bert.new_cache(ids.shape[1], memory.keys)
    return decoder(ids, encoder_attention_mask=memory.mask, past_key_values=cache).logits.float()
