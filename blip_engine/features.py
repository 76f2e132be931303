"""What processors return: a dictionary of arrays that a model takes as keyword arguments."""

from collections import UserDict
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


class BatchFeature(UserDict[str, Any]):
    """A dictionary whose items are attributes too, and whose tensors move together with `to`."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # asked for while unpickling, before there is any
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here; there is: {', '.join(self.data)}") from None

    # The dictionary's own: those of UserDict show all values where names are asked for.

    def keys(self) -> KeysView[str]:
        """Names."""
        return self.data.keys()

    def values(self) -> ValuesView[Any]:
        """Arrays."""
        return self.data.values()

    def items(self) -> ItemsView[str, Any]:
        """Names with arrays."""
        return self.data.items()

    def to(
        self, device: torch.device | torch.dtype | str | int | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move tensors to a device, a dtype (floating-point tensors only) or both; in place."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name, value in self.data.items():
            if isinstance(value, Tensor):
                self.data[name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        return self


def as_features(values: Mapping[str, Any], return_tensors: str | None) -> BatchFeature:
    """Lists of equal shapes as torch tensors ("pt"), NumPy arrays ("np"), or as they are (None)."""
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, not {return_tensors!r}")
    if return_tensors is None:
        return BatchFeature(values)
    return BatchFeature({name: _stacked(name, value, return_tensors) for name, value in values.items()})


def _stacked(name: str, rows: Any, kind: str) -> Any:
    try:
        array = np.asarray(rows)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths: pass padding=True (and truncation=True)") from None
    return torch.from_numpy(array) if kind == "pt" else array
