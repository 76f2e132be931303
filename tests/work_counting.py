"""Counting what an engine does: products (FLOP), copies of keys and values (bytes), waits for the device."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import flops
from blip_engine.runner import Runner

#: Calls that wait until the device has got so far, and bring a number to the host.
WAITING = frozenset(
    ("__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "cpu", "numpy", "nonzero",
     "masked_select", "equal", "allclose", "unique")
)  # fmt: skip
COPYING = ("cat", "stack", "index_select", "index", "gather", "clone", "copy_", "_to_copy", "repeat", "contiguous")
HEAVY = ("mm", "linear", "conv", "attention", "einsum", "lstm")


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


UNLISTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch has no formula for these


class Waits(TorchFunctionMode):
    """Counts the calls that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in WAITING or (name == "__getitem__" and _masked(args[1])):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def _masked(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


class Copies(TorchDispatchMode):
    """Adds up the bytes that copies of keys and values write, and names products that the counter does not know."""

    def __init__(self, runner: Runner[Any], known: Callable[[Any], bool]) -> None:
        super().__init__()
        self.cross = self.own = 0  # bytes
        self.unknown: set[str] = set()
        self.in_vision = False
        config = runner.resident.model.config
        heads, width = config.text_config.num_attention_heads, config.text_config.hidden_size
        self._seen, self._heads = flops.patches(config) + 1, (heads, width // heads)
        self._known = known

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if any(word in name for word in HEAVY) and not self._known(function):
            self.unknown.add(name)
        if name in COPYING and isinstance(found, torch.Tensor) and not self.in_vision:
            size = found.numel() * found.element_size()
            if self._seen in found.shape:
                self.cross += size
            elif found.ndim == 4 and found.shape[1::2] == self._heads:
                self.own += size
        return found


class Work:
    """What was counted."""

    def __init__(self, products: FlopCounterMode, copies: Copies, waits: Waits, vision_rows: list[int]) -> None:
        self._products, self.copies, self.waits, self.vision_rows = products, copies, waits, vision_rows

    @property
    def flop(self) -> int:
        assert not self.copies.unknown, "products that nobody counts: give FlopCounterMode a formula for them"
        return int(self._products.get_total_flops())


@contextmanager
def counting(runner: Runner[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Count what this thread does with the runner."""
    products = FlopCounterMode(display=False, custom_mapping=UNLISTED)
    copies = Copies(runner, lambda function: function._overloadpacket in products.flop_registry)
    waits = Waits()
    rows: list[int] = []
    vision = runner.resident.model.vision_model
    forward = vision.forward

    def seen(pixels: torch.Tensor, *args: Any, **more: Any) -> Any:
        rows.append(len(pixels))
        copies.in_vision = True
        try:
            return forward(pixels, *args, **more)
        finally:
            copies.in_vision = False

    with ExitStack() as stack, monkeypatch.context() as patch:
        patch.setattr(vision, "forward", seen)
        for mode in (copies, products, waits):  # the copies outside: they see operations in their parts
            stack.enter_context(mode)
        yield Work(products, copies, waits, rows)
