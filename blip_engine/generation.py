"""Decoding: greedy, beam search and nucleus sampling over one cached decoder.

The loop is logits -> search -> next tokens. Hypotheses (beams, samples) are extra queries on the keys and values of an
image and its tokens, which exist once: beams that change places change a mask, and nothing is copied. Log-probabilities
and scores are float32. No row looks at another image's: its result depends on its own image, prompt and options only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import CrossKeys
from .logits import LogitRules
from .requests import GenerationOptions
from .search import BeamSearch, Extras, Generated, Limits, Record, Search, TokenSearch, take
from .text import BlipTextLMHeadModel

WAIT_EVERY = 5  # tokens between two looks at whether all rows are settled, on a GPU


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

    def narrowed(self, rows: Tensor) -> "Prompt":
        """Those of some rows (n,)."""
        return Prompt(self.ids[rows], None if self.mask is None else self.mask[rows])


@dataclass(frozen=True)
class Memory:
    """What the decoder attends to: an image, or an image and a question, encoded."""

    states: Tensor | None  # (B, S, width)
    mask: Tensor | None = None  # (B, S), 1 for tokens
    keys: CrossKeys | None = None  # instead of the states: their keys and values, projected before

    def __len__(self) -> int:
        """How many there are. Each may have several neighbouring rows of the prompt."""
        held = self.states if self.keys is None else self.keys[0][0]
        return 0 if held is None else len(held)

    def narrowed(self, rows: Tensor) -> "Memory":
        """Some of them (n,)."""
        states, mask = (None if part is None else part[rows] for part in (self.states, self.mask))
        return Memory(states, mask, self.keys and [(key[rows], value[rows]) for key, value in self.keys])


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
    if limits is None:
        limits = Limits.of_options(options, prompt.ids)
    extras = extras or Extras()
    search = search_for(decoder, prompt, options, limits, uniforms, extras)
    state = DecoderState(decoder, prompt, memory, limits.steps, search.hypotheses, extras.record)
    logits = state.read_prompt()
    for step in range(limits.steps):
        tokens, parents = search.advance(logits, step)
        if (step + 1) % every == 0 or step + 1 == limits.steps:
            yield search
        if step + 1 < limits.steps:
            logits = state.read_tokens(tokens, parents)


def search_for(
    decoder: BlipTextLMHeadModel,
    prompt: Prompt,
    options: GenerationOptions,
    limits: Limits,
    uniforms: Tensor | None,
    extras: Extras,
) -> Search:
    """What the options ask for."""
    end, pad = decoder.config.sep_token_id, decoder.config.pad_token_id
    rules = LogitRules(
        options, prompt.ids, prompt.mask, limits.least, end, extras.no_repeat_ngram_size, extras.bad_words
    )
    if options.num_beams > 1:
        return BeamSearch(rules, options, limits, end, pad, extras)
    if options.do_sample and uniforms is None:
        uniforms = torch.rand(len(prompt.ids), options.num_return_sequences, limits.steps, device=prompt.ids.device)
    return TokenSearch(rules, options, limits, end, pad, uniforms if options.do_sample else None, extras)


class DecoderState:
    """The decoder with its cache, masks and positions: turns tokens into the next logits."""

    def __init__(
        self,
        decoder: BlipTextLMHeadModel,
        prompt: Prompt,
        memory: Memory,
        steps: int,
        hypotheses: int,
        record: Record | None = None,
    ) -> None:
        self._decoder, self._prompt, self._memory, self._record = decoder, prompt, memory, record or Record()
        places = prompt.ids.shape[1] + hypotheses * (steps - 1)  # the last tokens are not read
        self._cache = decoder.bert.new_cache(places, memory.keys)
        self._mask, self._next_position = prompt.mask, prompt.lengths[:, None]
        self._hypotheses = hypotheses
        self._ways: Tensor | None = None  # (B, K, read) whose token each of K hypotheses has at every step, if K > 1
        self._own = torch.arange(hypotheses, device=prompt.ids.device)

    def read_prompt(self) -> Tensor:
        """Logits (B, K, vocabulary) behind the prompt, the same for all hypotheses."""
        positions = None
        if self._mask is not None:
            positions = (self._mask.cumsum(1) - 1).clamp_(min=0)
        logits = self._run(self._prompt.ids, self._mask, positions)
        if self._hypotheses > 1:
            self._fan_out()
        return logits[:, None].expand(-1, self._hypotheses, -1)

    def _fan_out(self) -> None:
        self._ways = self._own.new_empty(len(self._prompt.ids), self._hypotheses, 0)
        for kept in (self._record.attentions, self._record.hidden_states):
            if kept:  # of the prompt, which was read once for all of them
                kept[0] = tuple(layer.repeat_interleave(self._hypotheses, 0) for layer in kept[0])
        self._next_position = self._next_position.repeat_interleave(self._hypotheses, 0)

    def read_tokens(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Logits (B, K, vocabulary) behind `tokens` (B, K), each hypothesis going on from that of (B, K) `parents`."""
        positions = self._next_position
        self._next_position = positions + 1
        if self._ways is None:
            if self._mask is not None:
                self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
            mask = self._mask
        else:
            ways = self._ways if parents is None else take(self._ways, parents)
            self._ways = torch.cat([ways, self._own.expand(len(tokens), -1)[:, :, None]], dim=2)
            mask = self._visible(self._ways)
        return self._run(tokens.flatten()[:, None], mask, positions).unflatten(0, tokens.shape)

    def narrow(self, rows: Tensor, of_memory: Tensor) -> None:
        """Go on with these rows (n,) of the prompt, all those of these rows of the memory."""
        self._prompt, self._memory = self._prompt.narrowed(rows), self._memory.narrowed(of_memory)
        self._cache.narrow(rows, of_memory)
        positions = self._next_position.unflatten(0, (-1, self._hypotheses))  # each has its own once the prompt is read
        self._next_position = positions[rows].flatten(0, 1)
        self._mask = None if self._mask is None else self._mask[rows]
        self._ways = None if self._ways is None else self._ways[rows]

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
