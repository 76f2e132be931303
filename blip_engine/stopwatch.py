"""How long the stages of a batch took: by the device's own clock where it works on its own."""

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch


class _Moment(Protocol):
    def seconds_since(self, earlier: Any) -> float: ...


class _HostMoment:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def seconds_since(self, earlier: "_HostMoment") -> float:
        return self._at - earlier._at


class _DeviceMoment:
    """When the device has done all that the current stream was asked so far."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def seconds_since(self, earlier: "_DeviceMoment") -> float:
        self._event.synchronize()  # the results are on the host already: this waits for next to nothing
        return earlier._event.elapsed_time(self._event) / 1000


class Stopwatch:
    """Seconds between marks. A few microseconds a batch; never makes the host wait for the device in between."""

    def __init__(self, device: torch.device) -> None:
        """Begins now."""
        self._on_device = device.type == "cuda"
        self._marks: list[tuple[str | None, _Moment]] = [(None, self._now())]

    def mark(self, stage: str | None) -> None:
        """What was done since the last mark was this stage; None: it was none."""
        self._marks.append((stage, self._now()))

    def stop(self, stage: str) -> Mapping[str, float]:
        """Seconds of every stage; what came last is `stage`. The results must be on the host."""
        self.mark(stage)
        seconds: dict[str, float] = {}
        for (_, earlier), (name, moment) in pairwise(self._marks):
            if name is not None:
                seconds[name] = seconds.get(name, 0.0) + moment.seconds_since(earlier)
        return seconds

    def _now(self) -> _Moment:
        return _DeviceMoment() if self._on_device else _HostMoment()
