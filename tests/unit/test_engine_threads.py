"""That a process with an engine computes in one thread only: a second one would have OpenMP threads of its own."""

import os
import subprocess
import sys
from pathlib import Path

from small_models import save_checkpoint, small_config

#: Prints the process's threads before, with a working engine, and after it.
SCRIPT = """
import os, sys, time
import numpy as np
from blip_engine import Engine

def threads():
    return len(os.listdir("/proc/self/task"))

found = [threads()]
image = np.zeros((32, 32, 3), dtype=np.uint8)
with Engine.load({"itm": sys.argv[1]}, "cpu", sys.argv[2]) as engine:
    engine.match([image] * 9, ["a dog"] * 9)
    engine.embed(images=[image] * 9)
    engine.load_model("again", sys.argv[1], "itm")
    engine.match([image] * 9, ["a dog"] * 9, model="again")
    found.append(threads())
ends = time.monotonic() + 30
while threads() > found[0] and time.monotonic() < ends:  # the system's ends a moment after Python's
    time.sleep(0.01)
print(*found, threads())
"""


def test_one_thread_has_openmp_threads(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 1024}
    save_checkpoint(tmp_path, "itm", **small_config(wide, {"encoder_hidden_size": 256}))
    for precision in ("fp32", "bf16"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), precision],
            env={**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        before, working, after = map(int, done.stdout.split())
        assert working - before == 2  # the engine's and one of OpenMP
        assert after == before
