"""Ctrl-C and SIGTERM while a job is planned or summed up: soon over, nothing left behind, the job as it was."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from harness import advance, caption_spec, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer, S3Server

from orchestrator.control import Controller
from orchestrator.finalizer import finalize
from orchestrator.jobs import submit
from orchestrator.ledger import Ledger
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings
from orchestrator.stopping import StoppingError, stopped_when
from orchestrator.storage import open_store
from orchestrator.temporary import remove_left_behind
from orchestrator.work import Work


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def endless_manifest(folder: Path) -> Path:
    """Small on disk, 10 GB of rows: nobody waits for its planning."""
    block = gzip.compress(b'{"image": "a.png"}\n' * 500_000)
    path = folder / "rows.jsonl.gz"
    with path.open("wb") as file:
        for _ in range(1000):
            file.write(block)
    return path


@pytest.fixture
def temporaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The TMPDIR of the processes that a test starts."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_ctrl_c_of_run_while_it_plans(temporaries: Path, tmp_path: Path) -> None:
    command = ["run", endless_manifest(tmp_path), "--task", "caption", "--output", tmp_path / "out", "--model", "demo"]
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *map(str, command)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until(lambda: [path for path in temporaries.glob("blip-rows-*") if path.stat().st_size])
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "The same command goes on from here" in err
    assert "Traceback" not in err
    assert "RuntimeError" not in err
    assert not list(temporaries.glob("blip-*"))


def test_sigterm_of_an_orchestrator_that_plans(
    redis_server: RedisServer, settings: Settings, temporaries: Path, tmp_path: Path
) -> None:
    ledger = Ledger.connect(settings)
    job = submit(ledger, caption_spec(endless_manifest(tmp_path), tmp_path / "out"), settings)
    with subprocess.Popen([sys.executable, "-m", "orchestrator"], stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: [path for path in temporaries.glob("blip-rows-*") if path.stat().st_size])
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in err
    assert f"{job}: left as it is" in err
    assert not list(temporaries.glob("blip-*"))
    state = ledger.state(job)
    assert state is not None
    assert (state.status, state.error) == ("validating", None)
    ledger.close()


def test_summing_up_stops_at_the_next_chunk(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec, worker = caption_spec(write_manifest(tmp_path, 50), tmp_path / "out"), MiniWorker(settings)
    state = advance(
        controller, submit(controller.ledger, spec, settings), lambda state: state.chunks_done == 5, worker
    )  # fmt: skip
    plan = Work.load(spec, state, settings).plan
    asked = iter([False, False, True])
    with stopped_when(lambda: next(asked)), pytest.raises(StoppingError):
        finalize(spec, plan, state)
    assert not (tmp_path / "out/summary.json").exists()
    assert finalize(spec, plan, state) is not None


def test_an_upload_stops_too(s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(2**20))
    for output in ("s3://blip/out", str(tmp_path / "out")):
        store = open_store(output)
        with stopped_when(lambda: True), pytest.raises(StoppingError):
            store.put_file("rows", tmp_path / "rows")
        assert store.head("rows") is None
        store.put_file("rows", tmp_path / "rows")
        assert store.head("rows") is not None


def test_an_upload_in_pieces_stops_too(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of staged rows; and it leaves no pieces behind, which a bucket charges for."""
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    s3_client.cache_clear()
    try:
        (tmp_path / "rows").write_bytes(bytes(20 * 2**23))
        store = open_store("s3://blip/out")
        with stopped_when(lambda: proxy.seen.count("PUT") >= 2), pytest.raises(StoppingError):
            store.put_file_new("rows", tmp_path / "rows")
        assert proxy.seen.count("PUT") < 10  # those on their way are finished
        assert store.head("rows") is None
        assert "Uploads" not in s3_client(5.0).list_multipart_uploads(Bucket="blip")
    finally:
        proxy.close()


def test_what_a_killed_process_left_behind_is_removed(temporaries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporaries))
    program = (
        "from orchestrator.temporary import temporary_file\n"
        "with temporary_file('blip-rows-') as file:\n"
        "    print(file.name, flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().decode().strip())
        os.utime(path, (1, 1))
        remove_left_behind()
        assert path.exists()  # it is in use
        process.kill()
        process.wait()
        (temporaries / "blip-rows-new").touch()
        (temporaries / "other").touch()
        os.utime(temporaries / "other", (1, 1))
        os.utime(path, (1, 1))
        remove_left_behind()
    assert sorted(found.name for found in temporaries.iterdir()) == ["blip-rows-new", "other"]
