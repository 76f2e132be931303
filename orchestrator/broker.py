"""Celery on Redis, with the settings that survive its known failures. A message is only a hint (`contract.Hint`)."""

import logging
from collections.abc import Iterable
from typing import Any, Final

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from .contract import Hint
from .errors import RedisUnavailable
from .ledger import QUEUE as QUEUE  # noqa: PLC0414 -- workers take it from here
from .redis_url import broker
from .settings import Settings

TASK_NAME: Final = "blip.process_chunk"

_CONFIGURATION: Final[dict[str, Any]] = {
    "task_acks_late": True,  # a worker that dies leaves its message to others
    "worker_prefetch_multiplier": 1,
    "task_ignore_result": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_channel_error_retry": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "task_serializer": "json",
    "accept_content": ["json"],  # never pickle: a message must not be able to run code
    "task_default_queue": QUEUE,
    "broker_transport_options": {
        "visibility_timeout": 3600,  # the control loop finds lost chunks long before
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "priority_steps": [0],  # one list, named as the queue
    },
}


def make_celery(settings: Settings) -> Celery:
    """The Celery application of publishers and workers. There is no result backend: results are parts in storage.

    Raises UsageError for a URL that is none.
    """
    url, options = broker(settings.redis_url)
    app = Celery("blip", broker=url, set_as_current=False)
    app.conf.update(_CONFIGURATION)
    app.conf.broker_transport_options = _CONFIGURATION["broker_transport_options"] | options
    return app


def publish(app: Celery, hints: Iterable[Hint], queue: str = QUEUE) -> int:
    """Sends hints; returns how many. Raises RedisUnavailable; what was not sent is overdue later and sent again."""
    sent = 0
    try:
        with app.producer_or_acquire() as producer:
            for hint in hints:
                app.send_task(TASK_NAME, args=[hint.to_message()], queue=queue, producer=producer, retry=False)
                sent += 1
    except (OperationalError, RedisError, OSError) as error:  # kombu wraps only some of them
        raise RedisUnavailable.of("the queue", error) from error
    finally:
        logging.getLogger(__name__).debug("published %d hints", sent)
    return sent
