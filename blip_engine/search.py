"""Choosing tokens: greedy, by sampling, or beams. Log-probabilities and scores are float32, and no row sees another."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from .logits import LogitRules
from .requests import GenerationOptions

_NEVER = -1.0e9  # a score no hypothesis has; finite, so that sums of it stay finite


@dataclass(frozen=True)
class Generated:
    """The new tokens of every row, best hypothesis first."""

    tokens: Tensor  # (B, sequences, steps), [SEP] included, padded behind
    lengths: Tensor  # (B, sequences), new tokens with [SEP]
    scores: Tensor  # (B, sequences) float32: log-probability of the new tokens / length^length_penalty
    beams: Tensor | None = None  # (B, sequences, steps): see GenerateOutput.beam_indices; only if Record.beams


@dataclass(frozen=True)
class Limits:
    """How many tokens a row may and must have; they differ between rows only when the caller counts the prompt in."""

    most: Tensor  # (B,)
    least: Tensor  # (B,)
    steps: int  # the largest of `most`

    @classmethod
    def of_options(cls, options: GenerationOptions, ids: Tensor) -> "Limits":
        """The options' own, for every row of (B, ·) ids."""
        return cls.uniform(len(ids), options.max_new_tokens, options.min_new_tokens, ids.device)

    @classmethod
    def uniform(cls, rows: int, most: int, least: int, device: torch.device) -> "Limits":
        """The same limits for every row."""
        return cls(torch.full((rows,), most, device=device), torch.full((rows,), least, device=device), most)

    def narrowed(self, rows: Tensor) -> "Limits":
        """Those of some rows (n,)."""
        return Limits(self.most[rows], self.least[rows], self.steps)


@dataclass(frozen=True)
class Record:
    """What to keep of every step: a list fills up, None stays None. Hypotheses (hyp.) of an image are neighbours."""

    scores: list[Tensor] | None = None  # (B, hyp., vocabulary) as the search saw them
    logits: list[Tensor] | None = None  # (B, hyp., vocabulary) as the decoder gave them
    attentions: list[tuple[Tensor, ...]] | None = None  # per layer (B * hyp., heads, T, keys)
    hidden_states: list[tuple[Tensor, ...]] | None = None  # embeddings and every layer (B * hyp., T, width)
    beams: bool = False  # whether to keep which beam every token came from


@dataclass(frozen=True)
class Extras:
    """What a direct caller may ask for beyond a job's options."""

    #: True: a row ends with its num_beams-th finished beam. "never": only when no beam can become better, however long.
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = 0  # no run of this many tokens comes twice; 0: any may
    bad_words: Sequence[Sequence[int]] = ()  # runs of tokens that do not come
    sampled_beams: bool = False  # draw the continuations of beams, by temperature, top_k and top_p
    generator: torch.Generator | None = None  # that these are drawn with; None: torch's global one
    record: Record = field(default_factory=Record)


class Search(Protocol):
    """Chooses tokens. One object per batch; `advance` is called once per step."""

    hypotheses: int  # of every row

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """From (B, K, vocabulary) logits to the (B, K) tokens to read next and the hypotheses that they go on from."""

    def open(self) -> Tensor:
        """(B,) bool: the rows whose result a further step may change."""

    def settled(self) -> Tensor:
        """Whether there is no such row, one bool, on the device."""

    def narrow(self, rows: Tensor) -> None:
        """Go on with these rows (n,) only."""

    def result(self) -> Generated: ...


class TokenSearch:
    """Greedy decoding, or, with `uniforms`, independent samples."""

    def __init__(
        self,
        rules: LogitRules,
        options: GenerationOptions,
        limits: Limits,
        end: int,
        pad: int,
        uniforms: Tensor | None,
        extras: Extras,
    ) -> None:
        rows, device = len(limits.most), limits.most.device
        self.hypotheses = options.num_return_sequences
        self._rules, self._limits, self._end, self._pad, self._uniforms = rules, limits, end, pad, uniforms
        self._penalty, self._record = options.length_penalty, extras.record
        self._tokens = torch.full((rows, self.hypotheses, limits.steps), pad, device=device)
        self._total = torch.zeros(rows, self.hypotheses, device=device)
        self._ended = torch.zeros(rows, self.hypotheses, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor, None]:
        logits = logits.float()
        ruled = self._rules.apply(logits, self._tokens[:, :, :step])
        draws = self._uniforms
        chosen = ruled.argmax(-1) if draws is None else self._rules.draw(ruled, draws[:, :, step])
        if self._record.scores is not None:
            self._record.scores.append(ruled.clone() if draws is None else self._rules.warped(ruled))
        if self._record.logits is not None:
            self._record.logits.append(logits.clone())
        gained = logits.log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1)
        self._total += gained.masked_fill(self._ended, 0.0)
        chosen = chosen.masked_fill(self._ended, self._pad)
        self._tokens[:, :, step] = chosen
        self._ended |= (chosen == self._end) | (step + 1 >= self._limits.most)[:, None]
        return chosen, None

    def open(self) -> Tensor:
        return ~self._ended.all(1)

    def settled(self) -> Tensor:
        return self._ended.all()

    def narrow(self, rows: Tensor) -> None:
        self._rules.narrow(rows)
        self._limits = self._limits.narrowed(rows)
        self._uniforms = None if self._uniforms is None else self._uniforms[rows]
        self._tokens, self._total, self._ended = self._tokens[rows], self._total[rows], self._ended[rows]

    def result(self) -> Generated:
        lengths = _lengths(self._tokens, self._limits, self._end)
        return Generated(self._tokens, lengths, self._total / lengths**self._penalty)


class BeamSearch:
    """Beam search that agrees with transformers' token by token.

    Of the best 2K continuations the first K may finish; K that did not finish go on. A row is settled when the best
    running score, normalised by the current length, cannot beat its worst finished one.
    """

    def __init__(
        self, rules: LogitRules, options: GenerationOptions, limits: Limits, end: int, pad: int, extras: Extras
    ) -> None:
        rows, device, beams = len(limits.most), limits.most.device, options.num_beams
        self.hypotheses, self._returned = beams, options.num_return_sequences
        self._rules, self._limits, self._end, self._penalty = rules, limits, end, options.length_penalty
        self._extras, self._record = extras, extras.record
        # Tokens and, where they are asked for, behind them the beams these came from.
        self._running = torch.full((rows, beams, limits.steps), pad, device=device)
        if self._record.beams:
            self._running = torch.cat([self._running, torch.full_like(self._running, -1)], dim=2)
        self._running_scores = torch.full((rows, beams), _NEVER, device=device)
        self._running_scores[:, 0] = 0.0  # at first all beams are equal: only one of them counts
        self._finished = self._running.clone()
        self._finished_scores = torch.full((rows, beams), _NEVER, device=device)
        self._is_finished = torch.zeros(rows, beams, dtype=torch.bool, device=device)
        self._open = torch.ones(rows, 1, dtype=torch.bool, device=device)  # rows whose result may still change
        self._offsets = torch.arange(rows, device=device)[:, None] * beams

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        log_probabilities = self._rules.apply(logits.float().log_softmax(-1), self._running[:, :, :step])
        if self._extras.sampled_beams:
            log_probabilities = self._rules.warped(log_probabilities, least_kept=2)
        if self._record.scores is not None:
            self._record.scores.append(log_probabilities.clone())
        if self._record.logits is not None:
            self._record.logits.append(logits.float())
        scores, flat = self._chosen(log_probabilities, step)
        vocabulary = logits.shape[-1]
        parents, tokens = flat // vocabulary, flat % vocabulary
        sequences = take(self._running, parents)
        sequences[:, :, step] = tokens
        if self._record.beams:
            sequences[:, :, self._limits.steps + step] = parents + self._offsets
        ended = (tokens == self._end) | (step + 1 >= self._limits.most)[:, None]
        self._keep_finished(sequences, scores, ended, step + 1)
        kept = (scores + ended * _NEVER).topk(self.hypotheses)
        self._running, self._running_scores = take(sequences, kept.indices), kept.values
        self._close_settled(step + 1)
        return tokens.gather(1, kept.indices), parents.gather(1, kept.indices)

    def _chosen(self, log_probabilities: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Scores and places of 2K of (B, K * vocabulary) continuations: the best, or drawn without replacement."""
        totals = (log_probabilities + self._running_scores[:, :, None]).flatten(1)
        if not self._extras.sampled_beams:
            return totals.topk(2 * self.hypotheses)
        generator = self._extras.generator
        noise = torch.empty(totals.shape, device=totals.device if generator is None else generator.device)
        gumbel = -noise.exponential_(generator=generator).log().to(totals.device)
        drawn = (totals + gumbel).topk(2 * self.hypotheses).indices  # Kool et al. 2019, arxiv.org/abs/1903.06059
        if step == 0:  # equal beams go on where there are too few continuations of one: they are worth as much
            totals = log_probabilities.flatten(1)
        return totals.gather(1, drawn), drawn

    def _keep_finished(self, sequences: Tensor, scores: Tensor, ended: Tensor, length: int) -> None:
        eligible = ended.clone()
        eligible[:, self.hypotheses :] = False
        scores = scores / length**self._penalty
        scores = scores + (~self._open) * _NEVER + (~eligible) * _NEVER
        best = torch.cat([self._finished_scores, scores], dim=1).topk(self.hypotheses)
        self._finished = take(torch.cat([self._finished, sequences], dim=1), best.indices)
        self._is_finished = torch.cat([self._is_finished, eligible], dim=1).gather(1, best.indices)
        self._finished_scores = best.values

    def _close_settled(self, length: int) -> None:
        to_the_end = self._extras.early_stopping == "never" and self._penalty > 0
        reach = self._limits.most[:, None] if to_the_end else length  # at which the best running beam would be best
        hope = self._running_scores[:, :1] / reach**self._penalty
        worst = self._finished_scores.amin(1, keepdim=True)
        beatable = (hope > torch.where(self._is_finished, worst, _NEVER)).any(1, keepdim=True)
        self._open &= beatable & (length < self._limits.most)[:, None]
        if self._extras.early_stopping is True:
            self._open &= ~self._is_finished.all(1, keepdim=True)

    def open(self) -> Tensor:
        return self._open[:, 0]

    def settled(self) -> Tensor:
        return ~self._open.any()

    def narrow(self, rows: Tensor) -> None:
        self._rules.narrow(rows)
        self._limits, self._open, self._offsets = self._limits.narrowed(rows), self._open[rows], self._offsets[rows]
        self._running, self._running_scores = self._running[rows], self._running_scores[rows]
        self._finished, self._finished_scores = self._finished[rows], self._finished_scores[rows]
        self._is_finished = self._is_finished[rows]

    def result(self) -> Generated:
        kept, steps = self._finished[:, : self._returned], self._limits.steps
        tokens, scores = kept[:, :, :steps], self._finished_scores[:, : self._returned]
        lengths = _lengths(tokens, self._limits, self._end)
        return Generated(tokens, lengths, scores, kept[:, :, steps:] if self._record.beams else None)


def take(sequences: Tensor, index: Tensor) -> Tensor:
    """Sequences (B, K', T) of (B, K, T) by (B, K') indices."""
    return sequences.gather(1, index[:, :, None].expand(-1, -1, sequences.shape[2]))


def _lengths(tokens: Tensor, limits: Limits, end: int) -> Tensor:
    """(B, n) tokens up to and with the first `end`, or the row's limit where there is none."""
    ends = tokens == end
    first = ends.int().argmax(-1) + 1
    return torch.where(ends.any(-1), first, limits.most[:, None])
