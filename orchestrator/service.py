"""The orchestrator as a process: the control loop and the HTTP API until SIGTERM or Ctrl-C."""

import logging
import os
import signal
import threading
from time import monotonic
from typing import Final

from .api.server import ApiServer
from .control import Controller
from .errors import UsageError
from .logs import LEVELS, configure
from .misspelt import misspelt
from .settings import Settings

STALLED_SECONDS: Final = 120.0  # a job's part of a step is done in less, also while Redis or the store is away


def serve(settings: Settings, log_level: str = "info") -> None:
    """Runs the control loop and the API; returns after the first SIGTERM or SIGINT. Raises UsageError."""
    if log_level not in LEVELS:
        raise UsageError(f"unknown log level {log_level!r}; the levels are: {', '.join(LEVELS)}")
    configure(log_level, settings.log_format)
    for line in misspelt(os.environ):
        logging.getLogger(__name__).warning("%s", line)
    stop = threading.Event()
    controller = Controller(settings)
    api = ApiServer(settings, lambda: ailing(controller))

    def end(*_: object) -> None:
        stop.set()
        api.stop()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, end)
    logging.getLogger(__name__).info("control loop %s", controller.owner)
    api.start()
    try:
        controller.run(stop)
    finally:
        api.close()


def ailing(controller: Controller) -> str | None:
    """What is wrong with the control loop, if anything is. An outage of Redis is not: it is waited out."""
    silent = monotonic() - controller.stepped_at
    return f"the control loop has been stuck for {silent:.0f} s" if silent > STALLED_SECONDS else None
