"""`python -m impatient_worker`: a worker whose health is judged within seconds instead of minutes."""

import sys

from workers import health
from workers.__main__ import main


def hurry() -> None:
    health._LOOK_SECONDS = 0.1  # type: ignore[misc]
    health.DEAF_SECONDS = 1.5  # type: ignore[misc]
    health.Health._patience = lambda _health, loading: 30.0 if loading else 1.5  # type: ignore[method-assign]


if __name__ == "__main__":
    hurry()
    sys.exit(main())
