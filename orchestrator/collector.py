"""Python's collector of cyclic garbage, told that records by the thousand are none."""

import gc


def collect_rarely() -> None:
    """For a process that handles many records: look for cycles less often, and never among what is there by now.

    Rows and records hold no cycles, yet every few hundred of them would start a search, and take a third of the time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
