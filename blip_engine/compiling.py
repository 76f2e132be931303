"""The vision tower's layers, compiled by torch.compile: what stands between their products becomes few kernels.

On a GPU the products of a layer take about as long as reading and writing what GELU, norms and residuals do one by one.
The layers are alike, so one compilation serves them all. It happens when a model is loaded, on the batch size that it
will run with, and is kept in TORCHINDUCTOR_CACHE_DIR for the next process. Shapes are fixed, so the same kernels run
for every batch and a row's bits do not depend on its neighbours (https://docs.pytorch.org/docs/stable/torch.compiler).

On a CPU in half precision `packing` does the same without a compiler.
"""

import logging
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .errors import first_line

_log = logging.getLogger(__name__)

_MOST_SHAPES = 64  # of all models of a process together; a model has one, and another each time memory runs out
_ROUNDINGS = 8  # of the number type, relative to the largest state: how far compiled layers may be from the others


@torch.inference_mode()
def compile_layers(layers: Sequence[nn.Module], embedded: Callable[[], Tensor]) -> bool:
    """Compile layers for states (B, T, width) as `embedded` makes them, and whether that worked; if not, they stay.

    It does not where torch finds no compiler (Triton's needs a C compiler, too), where memory runs out, or if the
    results differ by more than rounding. The log says so. They may be compiled before, for another shape.
    """
    started = time.perf_counter()
    _make_eager(layers)
    try:
        torch._dynamo.config.recompile_limit = max(_MOST_SHAPES, torch._dynamo.config.recompile_limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that float32 products could be less exact, and what torch deprecates
            _compile_and_check(layers, embedded())
    except Exception as error:  # a compiler has many; without it everything works, only slower
        _make_eager(layers)
        _log.warning("the vision tower is not compiled: %s", first_line(error))
        return False
    _log.info("the vision tower is compiled (%.0f s)", time.perf_counter() - started)
    return True


def _make_eager(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        layer._compiled_call_impl = None


def _compile_and_check(layers: Sequence[nn.Module], states: Tensor) -> None:
    truth = _through(layers, states)
    for layer in layers:
        layer.compile(dynamic=False)
    _check(_through(layers, states), truth)


def _through(layers: Sequence[nn.Module], states: Tensor) -> Tensor:
    for layer in layers:
        states, _ = layer(states)
    return states


def _check(found: Tensor, truth: Tensor) -> None:
    reach = float(truth.float().abs().max())
    off = float((found.float() - truth.float()).abs().max())
    if not off <= _ROUNDINGS * torch.finfo(truth.dtype).eps * reach:
        raise RuntimeError(f"compiled layers differ by {off:.3g}, where the largest state is {reach:.3g}")
