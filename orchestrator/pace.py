"""How often to look at jobs: often soon after one came on, rarely while it runs.

Whoever looks wakes Redis too, and on a machine with workers both take the processors from them: ten looks a second made
an engine on two cores some percent slower. A job changes its status several times in its first and last second, and not
in between.
"""

from time import monotonic
from typing import Final

_LEAST_SECONDS: Final = 0.1
_SHARE: Final = 0.01  # of the time since the last change: so much later, at most, the next one is seen
_REST: Final = 4.0  # times what the look took: with hundreds of jobs it takes long, and they change all the time


class Pace:
    """The pauses of a loop that looks at something."""

    def __init__(self, most: float) -> None:
        """`most`: seconds that no pause is longer than."""
        self._most, self._seen, self._changed_at = most, object(), monotonic()

    def saw(self, what: object) -> None:
        """Tell what is there now; where it was something else before, pauses are short again."""
        if what != self._seen:
            self._seen, self._changed_at = what, monotonic()

    def pause(self, took: float = 0.0) -> float:
        """Seconds until the next look, after one that `took` seconds."""
        return min(self._most, max(_LEAST_SECONDS, _SHARE * (monotonic() - self._changed_at), _REST * took))
