"""Keys and values that a decoder keeps between steps."""

from typing import TypeAlias

from torch import Tensor

#: cross-attention keys and values per layer, (images, heads, S, hs) each
CrossKeys: TypeAlias = list[tuple[Tensor, Tensor]]


class DecoderCache:
    """Self-attention keys and values of every layer so far, and cross-attention ones projected once.

    There is one row for each image, whatever the number of hypotheses (beams, samples): these are further queries on
    it. Their new tokens take places beside each other, and a mask says whose tokens each of them goes on from. So beams
    follow their parents without a copy of anything.
    """

    def __init__(self, layers: int, capacity: int, cross: CrossKeys | None = None) -> None:
        self.capacity = capacity  # places that fit without growing
        self.length = 0  # places taken
        self.cross: list[tuple[Tensor, Tensor] | None] = list(cross) if cross else [None] * layers
        self._keys: list[Tensor | None] = [None] * layers  # (images, heads, capacity, hs)
        self._values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (rows, heads, T, hs) of new tokens; returns all keys and values (images, heads, length + places, hs).

        Once there are some, `rows` may be a multiple of the images: the hypotheses of an image stand together.
        `advance` counts the places once every layer has added them.
        """
        return self._extend(self._keys, layer, key), self._extend(self._values, layer, value)

    def _extend(self, store: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        held = store[layer]
        if held is not None and len(new) != len(held):
            new = new.unflatten(0, (len(held), -1)).transpose(1, 2).flatten(2, 3)
        total = self.length + new.shape[2]
        if held is None or held.shape[2] < total:
            capacity = max(self.capacity, total)
            grown = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            store[layer] = held = grown
        held[:, :, self.length : total] = new
        return held[:, :, :total]

    def advance(self, rows: int, tokens: int) -> None:
        """Count the places of (rows, tokens) that every layer has added."""
        held = self._keys[0]
        self.length += tokens * (1 if held is None else rows // len(held))

    def narrow(self, rows: Tensor, of_cross: Tensor) -> None:
        """Keep these rows (n,) of the self-attention, and these of what the cross-attention looks at."""
        for store in (self._keys, self._values):
            for layer, held in enumerate(store):
                store[layer] = None if held is None else held[rows]
        self.cross = [held and (held[0][of_cross], held[1][of_cross]) for held in self.cross]
