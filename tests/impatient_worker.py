"""`python -m impatient_worker`: a worker that is judged, and gives up, within seconds instead of minutes."""

import sys

from workers import health, worker
from workers.__main__ import main


def hurry() -> None:
    health._LOOK_SECONDS = 0.1  # type: ignore[misc]
    health.DEAF_SECONDS = 1.5  # type: ignore[misc]
    worker._LOOK_SECONDS = 3.0  # type: ignore[misc]
    health.Health._patience = lambda _health, loading: 30.0 if loading else 1.5  # type: ignore[method-assign]


if __name__ == "__main__":
    hurry()
    sys.exit(main())
