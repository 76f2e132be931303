"""Credentials that come from the machine, late or not at all: looked for again, and no row pays for it.

And configurations of S3 that cannot be right: one line, wherever they are met.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from metadata_service import MetadataService
from servers import RedisServer, S3Server
from system import Cluster, records, write_images, write_rows
from test_cli import blip_batch, one_line_error

from orchestrator.errors import AccessDenied, NoCredentials
from orchestrator.fetch import fetch
from orchestrator.s3 import s3_client
from orchestrator.settings import load_settings
from orchestrator.storage import open_store

WAY_OUT = r"no S3 credentials \(Unable to locate credentials\); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@pytest.fixture
def machine(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataService]:
    """A machine with a role, and no other credentials; s3://blip/in/ has three images."""
    write_images(tmp_path / "in", 3)
    for path in (tmp_path / "in").iterdir():
        open_store("s3://blip/in").put_file(path.name, path)
    service = MetadataService()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{service.endpoint}/")
    s3_client.cache_clear()
    yield service
    service.close()


def mend_after(service: MetadataService, seconds: float) -> None:
    threading.Timer(seconds, lambda: setattr(service, "status", 200)).start()


def test_a_first_look_that_is_slow_is_waited_for(machine: MetadataService) -> None:
    machine.seconds = 1.2
    assert len([*open_store("s3://blip/in", load_settings(storage_retry_seconds=0.01)).list()]) == 3


def test_how_patient_it_is_can_be_set(
    machine: MetadataService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.status = 500
    store, tries = open_store("s3://blip/in", load_settings(storage_retry_seconds=0.01)), []
    for variables in ({}, {"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "2"}, {"AWS_CONFIG_FILE": str(tmp_path / "config")}):
        (tmp_path / "config").write_text("[default]\nmetadata_service_num_attempts = 1\n")
        machine.seen.clear()
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(NoCredentials):
                store.head("0.png")
        tries.append(len(machine.seen) // 2)  # of the session, then of the role
    assert tries == [5, 2, 1]


def test_a_look_that_failed_is_not_the_last_one(machine: MetadataService) -> None:
    machine.status = 500
    short = open_store("s3://blip/in", load_settings(storage_retry_seconds=0.3))
    with pytest.raises(AccessDenied, match="s3://blip/in/0.png: " + WAY_OUT):
        short.head("0.png")
    with pytest.raises(NoCredentials, match="s3://blip/in/0.png: " + WAY_OUT):
        fetch("s3://blip/in/0.png", 10_000, 0.3)
    mend_after(machine, 1.0)
    assert open_store("s3://blip/in", load_settings(storage_retry_seconds=20)).head("0.png") is not None
    assert fetch("s3://blip/in/0.png", 10_000, 0.3)
    assert short.head("0.png") is not None


def test_threads_that_need_credentials_at_once_do_not_queue_for_looks_in_vain(machine: MetadataService) -> None:
    """Each ends within its time and one look, not after those of all others."""
    machine.status, machine.seconds = 500, 0.3  # a look takes 3 s

    def ask(_: int) -> None:
        with pytest.raises(NoCredentials):
            fetch("s3://blip/in/0.png", 10_000, 2)

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert time.monotonic() - began < 10


def test_a_plain_mistake_is_one_line_after_one_that_it_waits(machine: MetadataService) -> None:
    machine.status = 404
    done = blip_batch("verify", "s3://blip/out", BLIP_STORAGE_RETRY_SECONDS="0.9")
    waits, error = done.stderr.splitlines()
    assert waits == "no S3 credentials yet; looking for them for up to 0.9 seconds …"
    assert error.startswith("Error: ")
    assert "set AWS_ACCESS_KEY_ID and" in error
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"AWS_ENDPOINT_URL_S3": "localhost:9000"}, "endpoint: localhost:9000; correct AWS_ENDPOINT_URL_S3, which"),
        ({"AWS_PROFILE": "nope"}, "The config profile (nope) could not be found; correct AWS_PROFILE"),
        ({"AWS_DEFAULT_REGION": "us/east"}, "'us/east' doesn't match a supported format; correct AWS_DEFAULT_REGION"),
        ({"AWS_CONFIG_FILE": "garbage"}, "Unable to parse config file: garbage; correct AWS_CONFIG_FILE"),
        ({"AWS_CONFIG_FILE": "flat"}, "flat is not as it should be ('str' object"),
        ({"AWS_METADATA_SERVICE_TIMEOUT": "soon"}, "'soon'; correct AWS_METADATA_SERVICE_TIMEOUT"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "missing: AWS_SECRET_ACCESS_KEY; correct the AWS_ variables"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x",
          "AWS_WEB_IDENTITY_TOKEN_FILE": "none"}, "'none'; correct AWS_WEB_IDENTITY_TOKEN_FILE"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_right(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garbage").write_text("garbage\n")
    (tmp_path / "flat").write_text("[default]\ns3 = flat\n")
    done = blip_batch("verify", "s3://blip/out", **variables)
    one_line_error(done, "Error: S3 cannot be used: ")
    assert says in done.stderr


@pytest.fixture
def cluster(
    redis_server: RedisServer, machine: MetadataService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """Its manifests and outputs are on disk: only loaders need credentials."""
    monkeypatch.setenv("BLIP_ALLOWED_BUCKETS", "blip")
    monkeypatch.setenv("BLIP_FETCH_TIMEOUT_SECONDS", "1")
    write_rows(tmp_path / "rows.jsonl", [{"image": f"s3://blip/in/{n}.png"} for n in range(3)])
    cluster = Cluster(tmp_path)
    cluster.start_orchestrator()
    yield cluster
    cluster.close()


def test_rows_wait_for_the_credentials_of_their_worker(
    cluster: Cluster, machine: MetadataService, tmp_path: Path
) -> None:
    machine.status = 500
    cluster.start_worker()
    spec = cluster.submit(tmp_path / "rows.jsonl", tmp_path / "out", chunk_rows=2)
    deadline = time.monotonic() + 30
    while "put back: s3://blip/in/" not in cluster.logs():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
    machine.status = 200
    state = cluster.until_ended(spec.id)
    assert (state.status, state.completed, state.failed) == ("completed", 3, 0)
    assert [record["error"] for record in records(tmp_path / "out")] == [None] * 3


def test_a_worker_that_finds_none_for_long_ends_and_leaves_its_work(
    cluster: Cluster, machine: MetadataService, tmp_path: Path
) -> None:
    machine.status = 500
    worker = cluster.start("impatient_worker")
    spec = cluster.submit(tmp_path / "rows.jsonl", tmp_path / "out", chunk_rows=2)
    assert worker.wait(40) == 1
    log = (tmp_path / "impatient_worker-1.log").read_text()
    assert "no S3 credentials" in log.strip().splitlines()[-1]
    assert "Traceback" not in log
    machine.status = 200
    cluster.start_worker()
    assert cluster.until_ended(spec.id).completed == 3


@pytest.mark.parametrize("output", ["out", "s3://blip/out"])
def test_a_worker_that_is_not_configured_fails_the_job_with_that_line(
    cluster: Cluster, tmp_path: Path, output: str
) -> None:
    """Met by its loaders, and by itself."""
    cluster.start_worker(AWS_PROFILE="nope")
    where = output if output.startswith("s3://") else tmp_path / output
    state = cluster.until_ended(cluster.submit(tmp_path / "rows.jsonl", where).id)
    assert state.error is not None
    says = "S3 cannot be used: The config profile (nope) could not be found; correct AWS_PROFILE"
    assert state.error["message"] == says
    assert state.failed == 0
    assert "Traceback" not in cluster.logs()
