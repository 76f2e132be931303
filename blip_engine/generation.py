"""Decoding: greedy, beam search and nucleus sampling over one cached decoder.

The loop is logits -> search -> next tokens. Hypotheses (beams, samples) are extra queries on the keys and values of an
image and its tokens, which exist once: beams that change places change a mask, and nothing is copied. Log-probabilities
and scores are float32. No row looks at another image's: its result depends on its own image, prompt and options only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from .cache import CrossKeys
from .logits import LogitRules
from .requests import GenerationOptions
from .text import BlipTextLMHeadModel

WAIT_EVERY = 5  # tokens between two looks at whether all rows are settled, on a GPU
_NEVER = -1.0e9  # a score no hypothesis has; finite, so that sums of it stay finite


@dataclass(frozen=True)
class Prompt:
    """Where decoding starts: [BOS] and, for captions, the words given."""

    ids: Tensor  # (B, P), padded on the left so that every row's last token is its last column
    mask: Tensor | None  # (B, P), 1 for tokens; None when no row is padded

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> "Prompt":
        """From lists of ids, padded to the longest."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        always_masked = width > 1  # decided by the width, never by the other rows: see batch invariance
        return cls(ids.to(device), mask.to(device) if always_masked else None)

    @property
    def lengths(self) -> Tensor:
        """(B,) number of tokens."""
        rows, width = self.ids.shape
        return self.ids.new_full((rows,), width) if self.mask is None else self.mask.sum(1)


@dataclass(frozen=True)
class Memory:
    """What the decoder attends to: an image, or an image and a question, encoded."""

    states: Tensor | None  # (B, S, width)
    mask: Tensor | None = None  # (B, S), 1 for tokens
    keys: CrossKeys | None = None  # instead of the states: their keys and values, projected before


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
    def uniform(cls, rows: int, most: int, least: int, device: torch.device) -> "Limits":
        """The same limits for every row."""
        return cls(torch.full((rows,), most, device=device), torch.full((rows,), least, device=device), most)


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


@torch.no_grad()
def generate(
    decoder: BlipTextLMHeadModel,
    prompt: Prompt,
    memory: Memory,
    options: GenerationOptions,
    limits: Limits | None = None,
    uniforms: Tensor | None = None,
    extras: Extras | None = None,
) -> Generated:
    """Decode every row of a batch.

    `limits` default to the options' own. `uniforms` (B, num_return_sequences, steps) in [0, 1) are the draws of
    sampling; without them torch's global generator gives them.
    """
    # A look at whether all is settled waits for the device. A GPU runs dry then; a CPU has nothing else to do.
    every = WAIT_EVERY if prompt.ids.device.type != "cpu" and extras is None else 1
    for search in decoding(decoder, prompt, memory, options, limits, uniforms, extras, every):
        if bool(search.settled()):
            break
    return search.result()


@torch.no_grad()
def decoding(
    decoder: BlipTextLMHeadModel,
    prompt: Prompt,
    memory: Memory,
    options: GenerationOptions,
    limits: Limits | None = None,
    uniforms: Tensor | None = None,
    extras: Extras | None = None,
    every: int = 1,
) -> Iterator["Search"]:
    """The search of `generate`, each time it has come `every` tokens further. Nothing in it waits for the device."""
    rows, device = len(prompt.ids), prompt.ids.device
    if limits is None:
        limits = Limits.uniform(rows, options.max_new_tokens, options.min_new_tokens, device)
    extras = extras or Extras()
    search = _search_for(decoder, prompt, options, limits, uniforms, extras)
    # The last token is not read.
    state = _DecoderState(decoder, prompt, memory, search.hypotheses * (limits.steps - 1), extras.record)
    logits = state.read_prompt()[:, None].expand(-1, search.hypotheses, -1)
    state.fan_out(search.hypotheses)
    for step in range(limits.steps):
        tokens, parents = search.advance(logits, step)
        if (step + 1) % every == 0 or step + 1 == limits.steps:
            yield search
        if step + 1 < limits.steps:
            logits = state.read_tokens(tokens, parents).unflatten(0, (rows, -1))


class _DecoderState:
    """The decoder with its cache, masks and positions: turns tokens into the next logits."""

    def __init__(
        self, decoder: BlipTextLMHeadModel, prompt: Prompt, memory: Memory, capacity: int, record: Record
    ) -> None:
        self._decoder, self._prompt, self._memory, self._record = decoder, prompt, memory, record
        self._cache = decoder.bert.new_cache(prompt.ids.shape[1] + capacity, memory.keys)
        self._mask, self._next_position = prompt.mask, prompt.lengths[:, None]
        self._ways: Tensor | None = None  # (B, K, read) whose token each of K hypotheses has at every step, if K > 1

    def read_prompt(self) -> Tensor:
        """Logits (B, vocabulary) behind the prompt."""
        positions = None
        if self._mask is not None:
            positions = (self._mask.cumsum(1) - 1).clamp_(min=0)
        return self._run(self._prompt.ids, self._mask, positions)

    def fan_out(self, hypotheses: int) -> None:
        """Go on with `hypotheses` rows for every row."""
        if hypotheses == 1:
            return
        rows, device = len(self._prompt.ids), self._prompt.ids.device
        self._ways = torch.empty(rows, hypotheses, 0, dtype=torch.long, device=device)
        self._own = torch.arange(hypotheses, device=device)
        for kept in (self._record.attentions, self._record.hidden_states):
            if kept:  # of the prompt, which was read once for all of them
                kept[0] = tuple(layer.repeat_interleave(hypotheses, 0) for layer in kept[0])
        self._next_position = self._next_position.repeat_interleave(hypotheses, 0)

    def read_tokens(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Logits (rows, vocabulary) behind `tokens` (rows,), each row going on from row `parents` of the last call.

        A row and its parent belong to the same image, so positions stay where they are.
        """
        positions = self._next_position
        self._next_position = positions + 1
        if self._ways is None:
            if self._mask is not None:
                self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
            return self._run(tokens[:, None], self._mask, positions)
        rows, hypotheses, _ = self._ways.shape
        if parents is not None:
            self._ways = self._ways.flatten(0, 1).index_select(0, parents).unflatten(0, (rows, hypotheses))
        self._ways = torch.cat([self._ways, self._own.expand(rows, -1)[:, :, None]], dim=2)
        return self._run(tokens[:, None], self._visible(self._ways), positions)

    def _visible(self, ways: Tensor) -> Tensor:
        """(B, K, P + read * K): the prompt, and of every step's K tokens the one on a hypothesis' way."""
        hypotheses = ways.shape[1]
        seen = (ways[..., None] == self._own).flatten(2)
        before = torch.ones_like(self._prompt.ids) if self._mask is None else self._mask
        return torch.cat([before.bool()[:, None].expand(-1, hypotheses, -1), seen], dim=2)

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        output = self._decoder(
            ids,
            mask,
            positions,
            encoder_hidden_states=self._memory.states,
            encoder_attention_mask=self._memory.mask,
            past_key_values=self._cache,
            logits_to_keep=1,
            output_attentions=self._record.attentions is not None,
            output_hidden_states=self._record.hidden_states is not None,
        )
        if self._record.attentions is not None:
            self._record.attentions.append(tuple(self._on_the_way(layer) for layer in output.attentions))
        if self._record.hidden_states is not None:
            self._record.hidden_states.append(output.hidden_states)
        return output.logits[:, -1]

    def _on_the_way(self, attention: Tensor) -> Tensor:
        """Of the attention (B, heads, K, places) of K hypotheses that at their own tokens: (B * K, heads, 1, T)."""
        if self._ways is None:
            return attention
        rows, hypotheses, steps = self._ways.shape
        prompt = torch.arange(self._prompt.ids.shape[1], device=attention.device).expand(rows, hypotheses, -1)
        later = prompt.shape[2] + hypotheses * torch.arange(steps, device=attention.device) + self._ways
        places = torch.cat([prompt, later], dim=2)[:, None].expand(-1, attention.shape[1], -1, -1)
        return attention.gather(3, places).transpose(1, 2).flatten(0, 1)[:, :, None]


class Search(Protocol):
    """Chooses tokens. One object per batch; `advance` is called once per step."""

    hypotheses: int  # rows per image

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """From (B, hypotheses, vocabulary) logits to the tokens to read next and the rows they go on from."""

    def settled(self) -> Tensor:
        """Whether no further step can change the result, one bool, on the device."""

    def result(self) -> Generated: ...


def _search_for(
    decoder: BlipTextLMHeadModel,
    prompt: Prompt,
    options: GenerationOptions,
    limits: Limits,
    uniforms: Tensor | None,
    extras: Extras,
) -> Search:
    end, pad = decoder.config.sep_token_id, decoder.config.pad_token_id
    rules = LogitRules(
        options, prompt.ids, prompt.mask, limits.least, end, extras.no_repeat_ngram_size, extras.bad_words
    )
    if options.num_beams > 1:
        return _BeamSearch(rules, options, limits, end, pad, extras)
    if options.do_sample and uniforms is None:
        uniforms = torch.rand(len(prompt.ids), options.num_return_sequences, limits.steps, device=prompt.ids.device)
    return _TokenSearch(rules, options, limits, end, pad, uniforms if options.do_sample else None, extras)


class _TokenSearch:
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
        return chosen.flatten(), None

    def settled(self) -> Tensor:
        return self._ended.all()

    def result(self) -> Generated:
        lengths = _lengths(self._tokens, self._limits, self._end)
        return Generated(self._tokens, lengths, self._total / lengths**self._penalty)


class _BeamSearch:
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
        sequences = _take(self._running, parents)
        sequences[:, :, step] = tokens
        if self._record.beams:
            sequences[:, :, self._limits.steps + step] = parents + self._offsets
        ended = (tokens == self._end) | (step + 1 >= self._limits.most)[:, None]
        self._keep_finished(sequences, scores, ended, step + 1)
        kept = (scores + ended * _NEVER).topk(self.hypotheses)
        self._running, self._running_scores = _take(sequences, kept.indices), kept.values
        self._close_settled(step + 1)
        return tokens.gather(1, kept.indices).flatten(), (parents.gather(1, kept.indices) + self._offsets).flatten()

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
        self._finished = _take(torch.cat([self._finished, sequences], dim=1), best.indices)
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

    def settled(self) -> Tensor:
        return ~self._open.any()

    def result(self) -> Generated:
        kept, steps = self._finished[:, : self._returned], self._limits.steps
        tokens, scores = kept[:, :, :steps], self._finished_scores[:, : self._returned]
        lengths = _lengths(tokens, self._limits, self._end)
        return Generated(tokens, lengths, scores, kept[:, :, steps:] if self._record.beams else None)


def _take(sequences: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K', T) of (B, K, T) by (B, K') indices."""
    return sequences.gather(1, index[:, :, None].expand(-1, -1, sequences.shape[2]))


def _lengths(tokens: Tensor, limits: Limits, end: int) -> Tensor:
    """(B, n) tokens up to and with the first `end`, or the row's limit where there is none."""
    ends = tokens == end
    first = ends.int().argmax(-1) + 1
    return torch.where(ends.any(-1), first, limits.most[:, None])
