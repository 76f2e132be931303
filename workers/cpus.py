"""How many processors this process may use: what it may run on, and no more than the time that its cgroup gives it.

A container's CPU limit hides no processor. Who counts those of the node starts threads and processes for all of them,
and the kernel then stops every one of them for most of each tenth of a second.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """Processors, at least 1. `root`: where /proc and /sys are."""
    limit = _limit(root)
    return len(_allowed()) if limit is None else max(1, min(len(_allowed()), math.ceil(limit)))


def settle_threads(root: Path = _ROOT) -> None:
    """Keep OpenMP, and with it torch, within the cgroup's limit, and polite. To be called before they are imported.

    Without a limit they know best; OMP_NUM_THREADS, where it is set, is someone's decision. Threads of libgomp look
    300,000 times whether there is work before they sleep: on a machine with other work they take the processor from the
    one that they wait for, and two engines on two cores were ten to a hundred times slower. A thirtieth of that is
    some tenth of a millisecond, more than lies between two operators, and costs nothing where nothing else runs.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    usable = usable_cpus(root)
    if usable < len(_allowed()) and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(min(usable, _cores(root)))


def _allowed() -> set[int]:
    """The processors that this process may run on."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def _cores(root: Path) -> int:
    """Of those, the cores: the second thread of a core does not multiply faster."""
    siblings = root / "sys/devices/system/cpu"
    return len({_text(siblings / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in _allowed()})


def _limit(root: Path) -> float | None:
    """In processors; None: there is none. That of any group above counts too."""
    return min((found for folder in _groups(root) if (found := _quota(folder)) is not None), default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the process's groups that may limit it, and of those above."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in ("cpu", controllers) if controllers else ("", "unified"):
            # In a container the path may be the node's, which is not there: its own group is then at the top.
            top = root / "sys/fs/cgroup" / mount
            group = top.joinpath(*(name for name in path.split("/") if name not in {"", ".."}))
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _quota(folder: Path) -> float | None:
    """What cpu.max (version 2) or cpu.cfs_quota_us (version 1) of a group allow, in processors."""
    quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()
    if not (quota.isdecimal() and period.isdecimal() and int(period)):  # "max", -1, or nothing is there
        return None
    return int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # not there, or not ours to read: it tells nothing
        return ""
