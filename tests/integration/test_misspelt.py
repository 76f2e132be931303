"""A variable that is nearly a setting is told of, in one line, by all that read settings."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import RedisServer
from test_cli import blip_batch

from orchestrator.misspelt import misspelt
from orchestrator.settings import Settings

LINE = "BLIP_SLTS is no setting and is ignored; is BLIP_SLOTS meant?"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("BLIP_SLTS", "BLIP_SLOTS"),
        ("blip_leese_seconds", "BLIP_LEASE_SECONDS"),
        ("BLIP_METRIC_PORT", "BLIP_METRICS_PORT"),
        ("BLIP_REDIS_BINARIES", "BLIP_REDIS_BINARY"),
        ("BLIP_TOKEN", "BLIP_API_TOKEN"),
        ("BLIP_BUCKETS", "BLIP_ALLOWED_BUCKETS"),
    ],
)
def test_the_nearest_setting_is_named(variable: str, meant: str) -> None:
    (line,) = misspelt({variable: "5", "PATH": "/bin"})
    assert line.startswith(f"{variable} is no setting and is ignored; is {meant} meant?")


def test_settings_and_what_others_set_are_not_told_of() -> None:
    services = {
        "BLIP_REDIS_PORT": "tcp://10.0.0.7:6379", "BLIP_REDIS_PORT_6379_TCP": "tcp://10.0.0.7:6379",
        "BLIP_REDIS_PORT_6379_TCP_ADDR": "10.0.0.7", "BLIP_REDIS_PORT_6379_TCP_PORT": "6379",
        "BLIP_REDIS_PORT_6379_TCP_PROTO": "tcp", "BLIP_REDIS_SERVICE_HOST": "10.0.0.7",
        "BLIP_API_SERVICE_PORT": "8080", "BLIP_API_SERVICE_PORT_HTTP": "8080", "BLIP_SERVICE_HOST": "10.0.0.8",
    }  # fmt: skip
    ours = {f"BLIP_{name.upper()}": "" for name in Settings.model_fields} | {"blip_slots": "", "BLIP_REDIS_BINARY": ""}
    assert not list(misspelt({**services, **ours, "BLIP_XYZZY": "1", "SLTS": "5", "AWS_REGIO": "x"}))


def test_run_and_both_services_say_it(redis_server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("a.jpg\n")
    job = ("run", tmp_path / "m.txt", "--task", "caption", "--output", tmp_path / "out", "--device", "none")
    assert blip_batch(*job, BLIP_SLTS="5").stderr.splitlines()[0] == f"Warning: {LINE} (docs/settings.md)"
    environment = {**os.environ, "BLIP_SLTS": "5", "BLIP_LOG_FORMAT": "text"}
    for module in ("orchestrator", "workers"):
        with subprocess.Popen([sys.executable, "-m", module], stderr=subprocess.PIPE, text=True, env=environment) as p:
            assert p.stderr is not None
            assert LINE in p.stderr.readline()
            p.send_signal(signal.SIGTERM)
            p.communicate(timeout=60)
