"""Decoding as CUDA graphs: the kernels of every few tokens are launched as one.

A step of decoding is several hundred small kernels, and launching them one by one takes longer than running them. A
graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) replays kernels with the addresses they were
captured with, so inputs are copied to where they were then, and results are copied away.

The first batch of a kind runs as usual; the second is captured as well, and from then on the kind is replayed, if that
gave bit for bit what the usual way gave. What cannot be captured, or differs, goes on as usual, and the log says so.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from .cache import CrossKeys
from .errors import first_line
from .generation import WAIT_EVERY, Memory, Prompt, decoding, generate
from .requests import GenerationOptions
from .search import Generated, Search
from .text import BlipTextLMHeadModel

_log = logging.getLogger(__name__)

_MOST_KINDS: Final = 16  # kept; the one that was not used for longest gives way
ValueT = TypeVar("ValueT")


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Runs a function once while its kernels are noted, and gives what replays them, and what it returned."""

    def __call__(self, function: Callable[[], ValueT]) -> tuple[Graph, ValueT]: ...


class CudaCapture:
    """Captures what a function asks of one GPU. Raises RuntimeError where that cannot be captured.

    As `torch.cuda.graph` does, but for three things: that takes its stream from the thread's current device, and what
    then is captured on another one is an empty graph; it stays in its stream when a capture is cut short; and a pool of
    memory whose graphs are all gone cannot be used again. Kernels keep the priority of their stream: those of decoding
    are small and waited for, and go before the vision tower's of the next batch.
    """

    _one: ClassVar[threading.Lock] = threading.Lock()  # torch allows one capture at a time in a process
    _cut_short: ClassVar[bool] = False  # torch's allocator takes the capture for one that goes on

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device, priority=-1)
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, function: Callable[[], ValueT]) -> tuple[Graph, ValueT]:
        with CudaCapture._one, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if CudaCapture._cut_short:
                raise RuntimeError("a capture before was cut short")
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # while something is captured nothing can be
            graph = torch.cuda.CUDAGraph()
            pool = next((other.pool() for other in self._graphs), None)
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            CudaCapture._cut_short = True
            try:
                found = function()
            finally:
                graph.capture_end()
                CudaCapture._cut_short = False
        self._graphs.add(graph)
        return graph, found


@dataclass(frozen=True)
class _Inputs:
    """What a batch is decoded from."""

    prompt: Prompt
    memory: Memory
    uniforms: Tensor | None

    def tensors(self) -> list[Tensor]:
        parts = [self.prompt.ids, self.prompt.mask, self.memory.states, self.memory.mask, self.uniforms]
        return [part for part in parts if part is not None] + [part for pair in self.memory.keys or () for part in pair]

    def like(self, tensors: Sequence[Tensor]) -> "_Inputs":
        """The same with other tensors, in the order of `tensors`."""
        given = iter(tensors)

        def taken(part: Tensor | None) -> Tensor | None:
            return None if part is None else next(given)

        prompt = Prompt(next(given), taken(self.prompt.mask))
        states, mask, uniforms = taken(self.memory.states), taken(self.memory.mask), taken(self.uniforms)
        keys: CrossKeys | None = None
        if self.memory.keys is not None:
            keys = [(next(given), next(given)) for _ in self.memory.keys]
        return _Inputs(prompt, Memory(states, mask, keys), uniforms)

    def kind(self) -> Hashable:
        return tuple((tuple(tensor.shape), tensor.dtype) for tensor in self.tensors())


@dataclass
class _Captured:
    """The graphs of one kind of batch, and where they read and write."""

    inputs: list[Tensor]
    #: per few tokens: the graph, whether all was settled behind it, the result so far
    parts: list[tuple[Graph, Tensor, Generated]] = field(default_factory=list)

    def spoil(self) -> None:
        """Overwrite all results: what is not computed again by the graphs will show."""
        for _, settled, found in self.parts:
            settled.fill_(False)
            found.tokens.fill_(-1)
            found.scores.fill_(torch.nan)

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Bring the inputs to where the graphs read them."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)

    def run(self, tensors: Sequence[Tensor]) -> Generated:
        self.read(tensors)
        found = self.parts[-1][2]
        for graph, settled, found in self.parts:  # noqa: B007  # the last one that ran counts
            graph.replay()
            if bool(settled):
                break
        return Generated(found.tokens.clone(), found.lengths.clone(), found.scores.clone())


class GraphedDecoder:
    """`generate` by a decoder, captured for the kinds of batches that come again."""

    def __init__(self, decoder: BlipTextLMHeadModel, capture: Capture) -> None:
        self._decoder, self._capture = decoder, capture
        self._kinds: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: came once
        self._refused: set[Hashable] = set()  # kinds that cannot be captured
        self._static: dict[Hashable, Tensor] = {}  # inputs of the graphs, shared by the kinds whose inputs fit

    def generate(
        self,
        prompt: Prompt,
        memory: Memory,
        options: GenerationOptions,
        uniforms: Tensor | None = None,
        used: Sequence[int] | None = None,  # noqa: ARG002  # a graph always decodes the whole batch
    ) -> Generated:
        """As `generation.generate`; `used` is for decoders that could do less."""
        inputs = _Inputs(prompt, memory, uniforms)
        kind = (options, inputs.kind())
        captured = self._kinds.get(kind)
        if captured is not None:
            self._kinds.move_to_end(kind)
            return captured.run(inputs.tensors())
        found = generate(self._decoder, prompt, memory, options, uniforms=uniforms)
        if kind in self._kinds:
            self._try(kind, inputs, options, found)
        elif kind not in self._refused:
            self._kinds[kind] = None
            while len(self._kinds) > _MOST_KINDS:
                self._kinds.popitem(last=False)
        return found

    def forget(self) -> None:
        """Free all graphs: the device ran out of memory, or the shapes of batches change."""
        self._kinds.clear()
        self._static.clear()

    def _try(self, kind: Hashable, inputs: _Inputs, options: GenerationOptions, truth: Generated) -> None:
        """Capture a kind, unless that fails or gives another result than the usual way gave."""
        try:
            captured = self._captured(inputs, options)
            captured.spoil()
            found = captured.run(inputs.tensors())
            if not (torch.equal(found.tokens, truth.tokens) and torch.equal(found.scores, truth.scores)):
                raise RuntimeError("the captured kernels gave another result")
        except torch.OutOfMemoryError:  # this batch has its result; when the kind comes again there may be room
            _log.warning("no memory to capture decoding as a CUDA graph; those that were captured are freed")
            self.forget()
            return
        except RuntimeError as error:  # of torch: the capture is void, the batch has its result, later ones go on so
            _log.warning("decoding is not captured as a CUDA graph: %s", first_line(error))
            del self._kinds[kind]
            self._refused.add(kind)
            return
        self._kinds[kind] = captured

    def _captured(self, inputs: _Inputs, options: GenerationOptions) -> _Captured:
        static = [self._static_like(place, tensor) for place, tensor in enumerate(inputs.tensors())]
        captured, at = _Captured(static), inputs.like(static)
        captured.read(inputs.tensors())
        searches = decoding(self._decoder, at.prompt, at.memory, options, uniforms=at.uniforms, every=WAIT_EVERY)
        for _ in range(-(-options.max_new_tokens // WAIT_EVERY)):
            graph, (settled, found) = self._capture(lambda: _further(searches))
            captured.parts.append((graph, settled, found))
        return captured

    def _static_like(self, place: int, tensor: Tensor) -> Tensor:
        """Where a graph reads its input `place`: the same for all graphs, which run one after the other."""
        key = place, tuple(tensor.shape), tensor.dtype
        if key not in self._static:
            self._static[key] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return self._static[key]


def _further(searches: Iterator[Search]) -> tuple[Tensor, Generated]:
    search = next(searches)
    return search.settled(), search.result()
