"""What the client and the orchestrator load: no torch, no Pillow, no NumPy, and quickly."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "PIL", "numpy", "tokenizers", "safetensors", "huggingface_hub", "transformers")


@pytest.mark.parametrize("module", ["blip_engine", "blip_engine.requests", "blip_engine.errors", "orchestrator.cli"])
def test_nothing_heavy_is_loaded_by(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == []


def test_every_public_name_is_found_and_no_other() -> None:
    code = (
        "import blip_engine\n"
        "assert set(blip_engine.__all__) < set(dir(blip_engine))\n"
        "assert all(getattr(blip_engine, name) is not None for name in blip_engine.__all__)\n"
        "assert 'torch' in __import__('sys').modules\n"
        "try: blip_engine.Nothing\n"
        "except AttributeError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "module 'blip_engine' has no attribute 'Nothing'"


def test_help_comes_within_half_a_second() -> None:
    command, times = [str(Path(sys.executable).with_name("blip-batch")), "--help"], []
    for _ in range(8):  # the best counts: the machine may be busy with something else
        start = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        times.append(time.perf_counter() - start)
        assert "Usage" in run.stdout
        if len(times) >= 5 and min(times) <= 0.5:
            break
    assert min(times) <= 0.5, f"the best of {len(times)} took {min(times):.2f} s"
