"""The orchestrator as a process: the control loop until SIGTERM or Ctrl-C."""

import logging
import signal
import sys
import threading

from .control import Controller
from .errors import UsageError
from .settings import Settings

_LEVELS = ("debug", "info", "warning", "error")


def serve(settings: Settings, log_level: str = "info") -> None:
    """Runs the control loop; returns after the first SIGTERM or SIGINT. Raises UsageError."""
    if log_level not in _LEVELS:
        raise UsageError(f"unknown log level {log_level!r}; the levels are: {', '.join(_LEVELS)}")
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    controller = Controller(settings)
    logging.getLogger(__name__).info("control loop %s", controller.owner)
    controller.run(stop)
