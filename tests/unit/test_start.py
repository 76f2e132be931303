"""What starting costs: modules that take long to import are not imported where nothing needs them."""

import subprocess
import sys

import pytest

LOAD = """
import sys
from blip_engine.engine import Engine
with Engine(device="cpu") as engine:
    for task in ("caption", "vqa", "itm"):
        engine.load_model(task, "demo", task)
"""


@pytest.mark.parametrize(
    ("what", "absent"),
    [
        (LOAD, ["torch._dynamo", "torch._inductor", "sympy", "transformers", "huggingface_hub"]),
        ("import sys, workers.loader", ["numpy", "PIL", "celery", "redis", "pydantic"]),
        ("import sys, workers.engine_child", ["torch", "numpy", "PIL", "celery", "redis", "pydantic"]),
        ("import sys, workers.app", ["torch", "numpy", "PIL", "boto3", "pyarrow", "fastapi"]),
    ],
)
def test_what_a_start_does_not_import(what: str, absent: list[str]) -> None:
    code = f"{what}\nprint([name for name in {absent} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
