"""What the chart starts, started: our programs with exactly its arguments and variables, asked as its probes ask."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from chart import environment, named, of_kind, pod_spec, render
from servers import MotoServer, RedisServer, free_port
from system import write_images

TOKEN = "a-token-of-the-cluster"
BIN = Path(sys.executable).parent


class Release:
    """The chart's documents, and what stands for the Secrets that they name."""

    def __init__(self, redis: RedisServer, store: MotoServer) -> None:
        self.port = free_port()
        self.secrets = {
            "url": redis.url, "token": TOKEN, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"
        }  # fmt: skip
        self.documents = render(
            "minimal", f"api.port={self.port}", f"s3.endpointUrl={store.endpoint}", "s3.region=us-east-1",
            "settings.BLIP_ENGINE=dry_engine:Engine", "autoscaling.kind=keda",
        )  # fmt: skip

    def container(self, kind: str, name: str) -> dict[str, Any]:
        pod = pod_spec(named(self.documents, kind, f"rel-blip-batch-{name}"))
        assert pod is not None
        return dict(pod["containers"][0])

    def variables(self, container: dict[str, Any]) -> dict[str, str]:
        """Only the chart's, with the machine's place for programs and ours for the engine without a model."""
        given = {
            name: value if isinstance(value, str) else self.secrets[value["secretKeyRef"]["key"]]
            for name, value in environment(container).items()
        }
        loopback = {name: "127.0.0.1" for name in ("BLIP_API_HOST", "BLIP_METRICS_HOST") if name in given}
        return given | loopback | {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1])}

    @contextmanager
    def running(self, name: str, port: int, log: Path, **more: str) -> Iterator["subprocess.Popen[bytes]"]:
        container = self.container("Deployment", name)
        with (
            log.open("wb") as out,
            subprocess.Popen(
                [BIN / "blip-batch", *container["args"]], env=self.variables(container) | more, stdout=out, stderr=out
            ) as process,
        ):
            try:
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    _until_well(f"http://127.0.0.1:{port}{container[probe]['httpGet']['path']}", log)
                yield process
            finally:
                process.kill()


def _until_well(url: str, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:  # not there, or not ready
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"{url} was never well:\n{log.read_text()}")


@pytest.fixture
def release(redis_server: RedisServer, s3_server: MotoServer) -> Release:
    return Release(redis_server, s3_server)


def ask(release: Release, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{release.port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_a_job_runs_from_the_chart_to_the_bucket(release: Release, tmp_path: Path) -> None:
    write_images(tmp_path, 12)
    store = boto3.client("s3")
    for number in range(12):
        store.upload_file(str(tmp_path / f"{number}.png"), "blip", f"photos/{number}.png")
    backlog = urllib.parse.urlsplit(
        of_kind(release.documents, "ScaledObject")[0]["spec"]["triggers"][0]["metadata"]["url"]
    )
    with ExitStack() as cluster:
        cluster.enter_context(release.running("orchestrator", release.port, tmp_path / "orchestrator.log"))
        assert ask(release, backlog.path)["desired_workers"] == 0
        job = ask(release, "/v1/jobs", {"manifest": "s3://blip/photos/", "task": "caption", "output": "s3://blip/out"})
        assert ask(release, backlog.path)["desired_workers"] == 1  # from zero

        port = free_port()
        metrics = {"BLIP_METRICS_PORT": str(port)}
        worker = cluster.enter_context(release.running("worker-default", port, tmp_path / "worker.log", **metrics))
        deadline = time.monotonic() + 60
        while (state := ask(release, f"/v1/jobs/{job['id']}"))["status"] != "completed":
            assert time.monotonic() < deadline, (state, (tmp_path / "worker.log").read_text())
            time.sleep(0.1)
        assert state["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
        assert ask(release, backlog.path)["desired_workers"] == 0  # and to zero
        worker.terminate()
        assert worker.wait(20) == 0

        hook = release.container("Pod", "test")
        variables = release.variables(hook) | {"BLIP_API_URL": f"http://127.0.0.1:{release.port}"}
        done = subprocess.run(
            [sys.executable, "-c", *hook["args"]], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("ok: ")
        release.secrets["token"] = "another"
        variables = release.variables(hook) | {"BLIP_API_URL": f"http://127.0.0.1:{release.port}"}
        done = subprocess.run([sys.executable, "-c", *hook["args"]], env=variables, capture_output=True, check=False)
        assert done.returncode != 0


def test_the_hook_of_helm_test_waits_for_what_was_just_installed(release: Release, tmp_path: Path) -> None:
    hook = release.container("Pod", "test")
    variables = release.variables(hook) | {"BLIP_API_URL": f"http://127.0.0.1:{release.port}"}
    with subprocess.Popen(
        [sys.executable, "-c", *hook["args"]], env=variables, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            assert process.stdout.readline().rstrip().endswith("; waiting")  # nobody listens yet
            with release.running("orchestrator", release.port, tmp_path / "orchestrator.log"):
                said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert said.splitlines()[-1].startswith("ok: ")
