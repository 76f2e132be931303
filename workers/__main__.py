"""`python -m workers`: one worker against BLIP_REDIS_URL, until SIGTERM or SIGINT."""

import logging
import os
import sys

from orchestrator import logs
from orchestrator.collector import collect_rarely
from orchestrator.errors import BlipBatchError
from orchestrator.misspelt import misspelt
from orchestrator.settings import load_settings

from .children import die_with_parent


def main() -> int:
    """Exit status: 0 after an orderly end, 1 with one line on standard error when it cannot work."""
    if parent := os.environ.pop("BLIP_PARENT_PID", None):  # embedded: never outlive the command
        die_with_parent(int(parent))
    for name in ("celery.app.trace", "celery.worker.strategy"):  # lines per message, and a traceback per put back one
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from .app import run_worker  # noqa: PLC0415 - an absent package becomes one clear line

        settings = load_settings()
        logs.configure("info", settings.log_format)
        for line in misspelt(os.environ):
            logging.getLogger("workers").warning("%s", line)
        collect_rarely()
        return run_worker(settings)
    except ImportError as error:
        sys.stderr.write(f"the worker cannot start: {error}; install blip-batch[worker]\n")
    except BlipBatchError as error:
        sys.stderr.write(f"the worker cannot start: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
