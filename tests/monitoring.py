"""A real Prometheus for the tests, and what they ask of it."""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from servers import Server

Sample = dict[str, Any]  # {"metric": labels, "value": [time, text]}


def program(name: str) -> str:
    """`prometheus` or `promtool`: the one beside the virtual environment, or on PATH. Raises RuntimeError."""
    beside = Path(sys.prefix) / "prometheus" / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"no {name} here: run `make .venv/prometheus/promtool`, or install the package prometheus")
    return found


def promtool(*arguments: str, stdin: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([program("promtool"), *arguments], input=stdin, capture_output=True, timeout=60, check=False)


class Prometheus(Server):
    """Scrapes `targets` (job -> ports of this machine) and evaluates `rules` every second."""

    def __init__(self, folder: Path, targets: Mapping[str, list[int]], rules: Mapping[str, Any]) -> None:
        super().__init__(folder)
        (folder / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
        scrapes = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            for job, ports in targets.items()
        ]
        times = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        configuration = {"global": times, "rule_files": ["rules.yaml"], "scrape_configs": scrapes}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))

    def command(self) -> list[str]:
        return [
            program("prometheus"), f"--config.file={self.folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self.folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}",
        ]  # fmt: skip

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Sample]:
        """What the expression is now."""
        return list(self.ask("query", query=expression)["result"])

    def until(self, expression: str, seconds: float = 40, holds: Callable[[list[Sample]], bool] = bool) -> list[Sample]:
        """Its samples once they are as wanted: there, if nothing else is said."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if holds(found := self.query(expression)):
                return found
            time.sleep(0.25)
        raise AssertionError(f"{expression} is {self.query(expression)}")
