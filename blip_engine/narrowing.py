"""Decoding in which rows that are settled leave the batch: the rest goes on in a smaller one.

A batch ends with its slowest row, and its blank rows, which fill it up, are as slow as others. On a CPU a step of half
the rows takes little more than half the time. (On a GPU steps are captured, see `graphs`, and run beside the next
batch's images.)

The smaller batches have fixed sizes, too: a half, a quarter, … of the memories that rows look at. A size is used only
if rows get the same bits in it as among all: for each kind of batch that is found out once, on its first one. So a
row's result does not depend on when its neighbours leave.
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .generation import DecoderState, Memory, Prompt, search_for
from .requests import GenerationOptions
from .search import Extras, Generated, Limits, Search
from .text import BlipTextLMHeadModel

_log = logging.getLogger(__name__)

_PARTS = (2, 4, 8)  # of the batch
_LEAST_ROWS = 4  # hypotheses counted: below, a step takes as long


class NarrowingDecoder:
    """`generation.generate` by a decoder, for batches of fixed sizes."""

    def __init__(self, decoder: BlipTextLMHeadModel) -> None:
        self._decoder = decoder
        self._sizes: dict[Hashable, tuple[int, ...]] = {}  # of every kind of batch, in rows of the memory

    @torch.no_grad()
    def generate(
        self,
        prompt: Prompt,
        memory: Memory,
        options: GenerationOptions,
        uniforms: Tensor | None = None,
        used: Sequence[int] | None = None,
    ) -> Generated:
        """As `generation.generate`. Only the rows `used` (None: all) need a result; the others' may be anything."""
        limits = Limits.of_options(options, prompt.ids)
        search = search_for(self._decoder, prompt, options, limits, uniforms, Extras())
        state = DecoderState(self._decoder, prompt, memory, limits.steps, search.hypotheses)
        batch = _Batch(search, len(prompt.ids), len(memory), used)
        logits = state.read_prompt()
        for step in range(limits.steps):
            tokens, parents = search.advance(logits, step)
            needed = batch.needed()
            if step + 1 == limits.steps or not needed:
                break
            size = len(batch)
            if 2 * len(needed) <= size:
                sizes = self._steady_sizes(prompt, memory, search.hypotheses)
                size = min((size, *(other for other in sizes if other >= len(needed))))
            if size < len(batch):
                rows, of_memory = batch.narrow(needed, size)
                state.narrow(rows, of_memory)
                tokens, parents = tokens[rows], None if parents is None else parents[rows]
            logits = state.read_tokens(tokens, parents)
        return batch.result()

    def forget(self) -> None:
        """Batches have other sizes from now on."""
        self._sizes.clear()

    def _steady_sizes(self, prompt: Prompt, memory: Memory, hypotheses: int) -> tuple[int, ...]:
        held = memory.states if memory.keys is None else memory.keys[0][0]
        kind = prompt.ids.shape, prompt.mask is None, held is None or held.shape, memory.mask is None, hypotheses
        if kind not in self._sizes:
            self._sizes[kind] = tuple(self._find_steady(prompt, memory, hypotheses))
            _log.debug("batches %s go on with %s", kind, self._sizes[kind])
        return self._sizes[kind]

    def _find_steady(self, prompt: Prompt, memory: Memory, hypotheses: int) -> list[int]:
        """The sizes in which rows from all over the batch have the logits that they have among all, bit for bit."""
        whole, rows_each = len(memory), len(prompt.ids) // len(memory)
        truth = self._after_two(prompt, memory, hypotheses, None)
        steady = []
        for size in {whole // part for part in _PARTS if whole % part == 0}:
            if size * rows_each * hypotheses < _LEAST_ROWS:
                continue
            part = torch.arange(whole // size - 1, whole, whole // size)  # each at another place than it was
            if self._after_two(prompt, memory, hypotheses, part).equal(truth[_rows_of(part, rows_each)]):
                steady.append(size)
        return steady

    def _after_two(self, prompt: Prompt, memory: Memory, hypotheses: int, part: Tensor | None) -> Tensor:
        """Logits behind two tokens that differ from row to row, read with `part` of the memory."""
        state = DecoderState(self._decoder, prompt, memory, 3, hypotheses)
        rows, words = len(prompt.ids), state.read_prompt().shape[-1]
        kept = torch.arange(rows)
        if part is not None:
            kept = _rows_of(part, rows // len(memory))
            state.narrow(kept, part)
        number = torch.arange(rows * hypotheses).unflatten(0, (rows, hypotheses))[kept]
        parents = (number % hypotheses).flip(1) if hypotheses > 1 else None
        state.read_tokens(number * 7 % words, parents)
        return state.read_tokens((number * 11 + 5) % words, parents)


class _Batch:
    """Which rows are left of a batch, and what those that left found."""

    def __init__(self, search: Search, rows: int, memories: int, used: Sequence[int] | None) -> None:
        self._search, self._each = search, rows // memories
        self._rows = list(range(rows))  # where the rows that are left were at first
        self._used = frozenset(self._rows if used is None else used)
        self._found: Generated | None = None

    def __len__(self) -> int:
        """Rows of the memory."""
        return len(self._rows) // self._each

    def needed(self) -> list[int]:
        """The rows of the memory that some row with a result still to come looks at."""
        flags = self._search.open().tolist()
        rows = (place for place, row in enumerate(self._rows) if flags[place] and row in self._used)
        return list(dict.fromkeys(row // self._each for row in rows))

    def narrow(self, needed: list[int], size: int) -> tuple[Tensor, Tensor]:
        """Go on with `size` rows of the memory, those needed among them; returns rows, and rows of the memory."""
        self._found = self.result()
        others = [row for row in range(len(self)) if row not in needed]
        of_memory = torch.tensor(sorted([*needed, *others[: size - len(needed)]]))
        rows = _rows_of(of_memory, self._each)
        self._rows = [self._rows[row] for row in rows.tolist()]
        self._search.narrow(rows)
        return rows, of_memory

    def result(self) -> Generated:
        """Of all rows that were there at first."""
        now = self._search.result()
        if self._found is None:
            return now
        parts = ((self._found.tokens, now.tokens), (self._found.lengths, now.lengths), (self._found.scores, now.scores))
        places = torch.tensor(self._rows)
        tokens, lengths, scores = (before.index_copy(0, places, after) for before, after in parts)
        return replace(now, tokens=tokens, lengths=lengths, scores=scores)


def _rows_of(memories: Tensor, each: int) -> Tensor:
    """The rows that look at these memories, each of which has `each` neighbouring ones."""
    return (memories[:, None] * each + torch.arange(each)).flatten()
