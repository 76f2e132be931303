"""Visual question answering by choice: which of given answers the decoder finds likeliest.

Source: `rank_answer` in `models/blip_vqa.py` of https://github.com/salesforce/BLIP. The first wordpiece picks the
candidates worth reading, teacher forcing scores those.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError
from .generation import Memory
from .text import BlipTextLMHeadModel

_IGNORED = -100


@dataclass(frozen=True)
class Ranking:
    """The likeliest candidates for every question, best first; equal ones in the candidates' order."""

    answers: Tensor  # (B, k) rows of the candidates
    scores: Tensor  # (B, k) float32, sums over an answer's wordpieces and [SEP]: not divided by the length


@torch.no_grad()
def rank(
    decoder: BlipTextLMHeadModel, memory: Memory, candidates: Tensor, k: int = 128, label_smoothing: float = 0.1
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
    if memory.states is None:
        raise InputError("ranking reads the questions' states, not their keys and values")
    start = candidates[:1, :1].expand(len(memory.states), 1)
    logits = decoder(start, encoder_hidden_states=memory.states, encoder_attention_mask=memory.mask).logits[:, 0]
    first = logits.float().softmax(-1)[:, candidates[:, 1]]  # (B, A)
    likely = first.argsort(dim=1, descending=True, stable=True)[:, :k]
    # Question by question: the logits of k answers are large, and no question depends on another.
    scores = torch.stack(
        [_scores(decoder, _row(memory, n), candidates[chosen], label_smoothing) for n, chosen in enumerate(likely)]
    )
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Ranking(likely.gather(1, order), scores.gather(1, order))


def _row(memory: Memory, row: int) -> Memory:
    def one(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[row : row + 1]

    return Memory(one(memory.states), one(memory.mask))


def _scores(decoder: BlipTextLMHeadModel, memory: Memory, ids: Tensor, label_smoothing: float) -> Tensor:
    """(k,) of (k, L) answers to the one question of `memory`, whose keys and values they share."""
    logits = decoder(ids, encoder_hidden_states=memory.states, encoder_attention_mask=memory.mask).logits.float()
    targets = ids.masked_fill(ids == decoder.config.pad_token_id, _IGNORED)[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        targets.flatten(),
        ignore_index=_IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return -losses.unflatten(0, targets.shape).sum(1)
