"""The Celery side of a worker: one queue, one task, and a clean end. See `worker` for what is done with a hint."""

import logging
import os
import signal
import socket
import threading
import uuid
from typing import Any

from celery import Celery
from celery.exceptions import Reject
from celery.signals import worker_ready, worker_shutting_down

from orchestrator.broker import TASK_NAME, make_celery
from orchestrator.settings import Settings

from .endpoint import Endpoint
from .health import Health
from .worker import PutBack, Refuse, Worker

_log = logging.getLogger(__name__)


def make_app(settings: Settings, worker: Worker) -> Celery:
    """The Celery application whose only task hands its message to `worker`."""
    app = make_celery(settings)
    app.conf.update(worker_hijack_root_logger=False, worker_redirect_stdouts=False)  # logging is `__main__`'s

    @app.task(name=TASK_NAME, bind=True, typing=False)  # type: ignore[untyped-decorator]
    def process_chunk(_task: Any, *args: object, **options: object) -> None:
        _process(worker, args, options)

    return app


def _process(worker: Worker, args: tuple[object, ...], options: dict[str, object]) -> None:
    try:
        if len(args) != 1 or options:
            raise Refuse("not a hint: other arguments than one")
        worker.handle(args[0])
    except PutBack as why:
        raise Reject(str(why), requeue=True) from None
    except Refuse as why:
        _log.error("message dropped: %s", why)
        raise Reject(str(why), requeue=False) from None
    except BaseException:  # acknowledged: anything else would leak the thread's slot (MemoryError, SystemExit)
        # The lease runs out, the control loop sends the chunk again, and the attempt counts.
        _log.exception("chunk left to the control loop")


def run_worker(settings: Settings) -> int:
    """Work until told to stop; the exit status. Raises UsageError when the worker cannot start."""
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    worker = Worker(settings, name)
    health = Health(worker, settings)
    endpoint = Endpoint(settings, worker.metrics.registry, health)
    try:
        worker.start()
        app = make_app(settings, worker)
        worker_ready.connect(lambda **_: health.consuming(), weak=False)
        worker_shutting_down.connect(lambda **_: worker.drain(), weak=False)
        threading.Thread(target=_end_when_faulty, args=(worker,), name="faults", daemon=True).start()
        _consume(app, settings, name, worker.queues)
    finally:
        health.stop()
        worker.close()
        endpoint.close()
    if worker.faulty.is_set():
        _log.critical("%s", worker.fault)
        return 1
    return 0


def _consume(app: Celery, settings: Settings, name: str, queues: list[str]) -> None:
    # Threads: they answer pings while busy, and leave CUDA to one child. The rest is chatter we have no use for.
    celery_worker = app.Worker(
        pool="threads", concurrency=settings.worker_threads, without_gossip=True, without_mingle=True,
        hostname=f"blip@{name}", queues=queues, loglevel="INFO", quiet=True,
    )  # fmt: skip
    celery_worker.start()


def _end_when_faulty(worker: Worker) -> None:
    worker.faulty.wait()
    os.kill(os.getpid(), signal.SIGTERM)  # the warm way out: hints go back to the queue for other workers
