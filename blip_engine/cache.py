"""Keys and values that a decoder keeps between steps."""

from typing import TypeAlias

from torch import Tensor

#: cross-attention keys and values per layer, (images, heads, S, hs) each
CrossKeys: TypeAlias = list[tuple[Tensor, Tensor]]


class DecoderCache:
    """Self-attention keys and values of every layer so far, and cross-attention ones projected once.

    Rows of the self-attention are images times hypotheses (beams or samples, 1 while the prompt is read). The
    cross-attention stays one per image: hypotheses are further queries on it, never copies of it.
    """

    def __init__(self, layers: int, capacity: int, cross: CrossKeys | None = None) -> None:
        self.capacity = capacity  # tokens that fit without growing
        self.length = 0  # tokens held
        self.cross: list[tuple[Tensor, Tensor] | None] = list(cross) if cross else [None] * layers
        self._keys: list[Tensor | None] = [None] * layers  # (rows, heads, capacity, hs)
        self._values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (rows, heads, T, hs) of new tokens; returns all keys and values (rows, heads, length + T, hs).

        `advance` counts the tokens once every layer has added them.
        """
        total = self.length + key.shape[2]
        return self._extend(self._keys, layer, key, total), self._extend(self._values, layer, value, total)

    def _extend(self, store: list[Tensor | None], layer: int, new: Tensor, total: int) -> Tensor:
        held = store[layer]
        if held is None or held.shape[2] < total:
            capacity = max(self.capacity, total)
            grown = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            store[layer] = held = grown
        held[:, :, self.length : total] = new
        return held[:, :, :total]

    def advance(self, tokens: int) -> None:
        """Count `tokens` that every layer has added."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Let row i of the self-attention go on from row `rows[i]` of (rows,): beams follow their parents."""
        for store in (self._keys, self._values):
            for layer, held in enumerate(store):
                if held is not None:
                    store[layer] = held.index_select(0, rows)
