"""An autoscaler for worker processes of this machine: KEDA's part in a test, or on a workstation.

    BLIP_API_URL=http://127.0.0.1:8080 BLIP_REDIS_URL=… python -m benchmarks.autoscaler --most 4 --kill 0.3

It asks `GET /v1/backlog` as KEDA does, starts workers (`python -m workers`) up to `desired_workers`, and lets go of
them with SIGTERM once fewer were desired for a while; the last one goes only when nothing is desired. `--kill 0.3`
kills (SIGKILL) 30 % of the workers a minute, as a bad spot market would. It ends when a job was seen, nothing is left
and no worker is. Every line: seconds, desired and running workers, rows left, workers started, killed, let go.
"""

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.client import BlipBatch
from orchestrator.errors import ApiUnavailable


@dataclass(frozen=True)
class Look:
    """What was seen at one moment."""

    seconds: float  # since the start
    desired: int
    running: int  # after what was done about it
    rows: int  # left


class Autoscaler:
    """Call `step` every second or so, then `close`."""

    def __init__(
        self,
        client: BlipBatch,
        environment: Mapping[str, str],
        most: int,
        kill_per_minute: float = 0.0,
        patience: float = 5.0,
        seed: int = 0,
    ) -> None:
        """`environment` of the workers; `patience`: seconds that fewer must be desired before a worker goes."""
        self._client, self._environment, self._most = client, dict(environment), most
        self._kill_per_minute, self._patience, self._random = kill_per_minute, patience, random.Random(seed)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._leaving: list[subprocess.Popen[bytes]] = []  # told to end, and at it
        self._due = 0.0  # workers that should have been killed by now and were not
        self._enough_since: float | None = None
        self._began = self._last = time.monotonic()
        self.started = self.killed = self.let_go = 0
        self.looks: list[Look] = []

    @property
    def running(self) -> int:
        """Workers, those that are leaving included."""
        return len(self._workers) + len(self._leaving)

    @property
    def done(self) -> bool:
        """Something was to do, and nothing is left, of work and of workers."""
        return any(look.rows for look in self.looks) and self.looks[-1].rows == 0 and self.running == 0

    def step(self) -> Look | None:
        """Look, and act. None: the API did not answer, and nothing was changed, as KEDA would."""
        self._bury()
        self._kill()
        try:
            backlog = self._client.backlog()
        except ApiUnavailable:
            return None
        wanted = min(self._most, backlog.desired_workers)
        while len(self._workers) < wanted:
            self._start()
        self._let_go(wanted)
        look = Look(time.monotonic() - self._began, backlog.desired_workers, self.running, backlog.rows)
        self.looks.append(look)
        return look

    def close(self) -> None:
        """End what still runs."""
        for worker in [*self._workers, *self._leaving]:
            worker.kill()
            worker.wait()

    def _start(self) -> None:
        self._workers.append(subprocess.Popen([sys.executable, "-m", "workers"], env=self._environment))
        self.started += 1

    def _let_go(self, wanted: int) -> None:
        if len(self._workers) <= wanted:
            self._enough_since = None
            return
        self._enough_since = self._enough_since or time.monotonic()
        if time.monotonic() - self._enough_since >= self._patience:
            worker = self._workers.pop()
            worker.send_signal(signal.SIGTERM)
            self._leaving.append(worker)
            self.let_go += 1

    def _kill(self) -> None:
        """The share that is due since the last time, by chance among the workers."""
        now = time.monotonic()
        self._due += len(self._workers) * self._kill_per_minute * (now - self._last) / 60
        self._last = now
        for _ in range(min(math.floor(self._due), len(self._workers))):
            worker = self._random.choice(self._workers)
            worker.kill()
            worker.wait()
            self._workers.remove(worker)
            self._due -= 1
            self.killed += 1

    def _bury(self) -> None:
        for group in (self._workers, self._leaving):
            group[:] = [worker for worker in group if worker.poll() is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4, help="workers at most")
    parser.add_argument("--kill", type=float, default=0.0, help="share of the workers to kill each minute")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds before a worker that is too many goes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="give up after them, with exit code 1")
    arguments = parser.parse_args()
    with BlipBatch(patience=5) as client:
        scaler = Autoscaler(client, os.environ, arguments.most, arguments.kill, arguments.patience)
        try:
            began = time.monotonic()
            while not scaler.done:
                look = scaler.step()
                counts = f"started {scaler.started} killed {scaler.killed} let go {scaler.let_go}"
                if look is None:
                    print("the API does not answer")
                else:
                    print(
                        f"{look.seconds:6.1f} s desired {look.desired} running {look.running} rows {look.rows} {counts}"
                    )
                if time.monotonic() - began > arguments.seconds:
                    sys.exit(1)
                time.sleep(1)
        except KeyboardInterrupt:
            pass
        finally:
            scaler.close()


if __name__ == "__main__":
    main()
