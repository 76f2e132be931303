"""The live workers, also right after a Redis that was emptied has forgotten them."""

from time import monotonic
from typing import Final

from .ledger import Ledger
from .scheduling import Workers

_SECONDS: Final = 10.0  # workers report every 5 (`workers.leases`)


class Roster:
    """Who hints may be meant for.

    Were all workers unknown for these seconds, hints of models that only workers of their own serve would go to
    everyone's queue, where nobody takes them until they are overdue.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: Workers = {}  # as last seen
        self._until = 0.0

    def recall(self) -> None:
        """Redis lost everything: the workers known before it count as live until they can have reported again."""
        self._until = monotonic() + _SECONDS

    def look(self) -> Workers:
        """The workers that are live now."""
        live = self._ledger.live_workers()
        if monotonic() < self._until:
            return {**self._known, **live}
        self._known = live or self._known  # none at all: perhaps it was emptied, which is not known yet
        return live
