"""The command line as its users meet it: a process, its output, its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from api import TOKEN, serving
from servers import RedisServer, S3Server

import blip_engine
from blip_engine.requests import DEFAULT_MODELS, JOB_TASKS
from orchestrator.cli import app
from orchestrator.contract import FORMATS, RESULT_FORMATS, Hint, Row, result_row
from orchestrator.jobs import claim_output, make_spec
from orchestrator.ledger import Ledger
from orchestrator.parts import part_key, put_part
from orchestrator.plan import make_plan
from orchestrator.scheduling import speed_key
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
HEAVY = {"torch", "numpy", "PIL", "boto3", "celery", "redis", "pydantic", "pyarrow", "transformers"}


def blip_batch(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).parent / "blip-batch"
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60,
        check=False,
    )  # fmt: skip


def one_line_error(done: "subprocess.CompletedProcess[str]", says: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    assert says in done.stderr


def test_help_is_quick_and_names_every_command() -> None:
    best = 9.0
    for _ in range(3):
        began = time.monotonic()
        done = blip_batch("--help", COLUMNS="200")
        best = min(best, time.monotonic() - began)
    assert done.returncode == 0
    for command in ("plan", "verify", "orchestrator", "run", "demo", "worker", "convert"):
        assert f" {command} " in done.stdout
    assert best <= 0.5


def test_help_lists_what_a_newcomer_needs_first() -> None:
    places = [blip_batch("--help").stdout.index(f" {name} ") for name in ("demo", "run", "plan", "submit", "worker")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_says_all_that_was_written(name: str) -> None:
    """Also words in square brackets, which the terminal's markup may take for its own."""
    out = " ".join(blip_batch(name, "--help", COLUMNS="1000").stdout.split())
    command = COMMANDS[name]
    texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    assert not [text for text in texts if text and " ".join(text.split()) not in out]


@pytest.mark.parametrize("name", ["run", "submit", "plan"])
def test_help_lists_tasks_formats_and_defaults(name: str) -> None:
    out = blip_batch(name, "--help", COLUMNS="1000").stdout
    option = {line.split("--")[1].split()[0]: line for line in out.splitlines() if " --" in line}
    assert all(word in option["task"] for word in JOB_TASKS)
    assert all(word in option["format"] for word in FORMATS)
    assert "1<=x<=10000" in option["chunk-rows"]
    if name != "plan":
        assert all(word in option["results"] for word in RESULT_FORMATS)
        models = {part.rpartition("/")[2] for model in DEFAULT_MODELS.values() for part in model.split("+")}
        assert all(word in option["model"] for word in models)
        assert "0<=x<=1" in option["max-error-ratio"]


def test_version() -> None:
    done = blip_batch("--version")
    assert (done.returncode, done.stdout) == (0, f"blip-batch {version('blip-batch')}\n")
    assert blip_engine.__version__ == version("blip-batch")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['blip-batch', '--help']\nfrom orchestrator.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"found = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'loaded: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_orchestrator_runs_without_what_only_workers_have() -> None:
    """Everything of the package is imported while torch, numpy and Pillow cannot be."""
    code = (
        "import sys, pkgutil, importlib, orchestrator\n"
        "for name in 'torch numpy PIL tokenizers safetensors huggingface_hub'.split(): sys.modules[name] = None\n"
        "names = [m.name for m in pkgutil.iter_modules(orchestrator.__path__) if m.name != '__main__']\n"
        "for name in names: importlib.import_module('orchestrator.' + name)\n"
        "assert len(names) > 15"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_is_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image": "a.jpg", "question": "what?"}\n\n{"image": 7}\nnonsense\n')
    done = blip_batch(
        "plan", tmp_path / "m.jsonl", "--task", "vqa", "--json", "--rows-per-second", "1.5", "--cost-per-hour", "3600"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["format"], report["rows"], report["bad_rows"], report["chunks"]) == ("jsonl", 3, 2, 1)
    assert report["first_rows"] == [{"row": 0, "id": None, "image": "a.jpg", "texts": ["what?"]}]
    assert [bad["row"] for bad in report["first_bad_rows"]] == [1, 2]
    assert report["estimate"] == {"seconds": 2.0, "workers": 1, "cost": 2.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.jsonl"]
    text = blip_batch("plan", tmp_path / "m.jsonl", "--task", "vqa").stdout
    assert "bad_rows    2 (row_invalid: 2)" in text
    assert "row_invalid" in text
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"x")
    assert json.loads(blip_batch("plan", tmp_path / "pictures", "--json").stdout)["format"] == "folder"


def test_plan_estimates_by_what_the_cluster_was_seen_to_do(settings: Settings, tmp_path: Path) -> None:
    """Through Redis and over HTTP; 6 rows/s of a lease, two leases a worker."""
    (tmp_path / "m.txt").write_text("a.jpg\n" * 120)

    def plan(*more: str, **environment: str) -> dict[str, Any]:
        done = blip_batch("plan", tmp_path / "m.txt", "--model", "demo", "--json", *more, **environment)
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    unseen = plan()
    assert unseen["estimate"] is None
    assert "give --rows-per-second (the cluster has done none yet)" in unseen["estimate_note"]
    ledger = Ledger.connect(settings)
    ledger._redis.hset("blip:speeds", speed_key("caption", "demo"), 6)
    ledger.worker_seen("w", {"slots": 2})
    ledger.close()
    expected = {"seconds": 5.0, "workers": 2, "cost": 10.0}
    with serving(settings) as url:
        over_http = {"BLIP_API_URL": url, "BLIP_API_TOKEN": TOKEN, "BLIP_REDIS_URL": "redis://127.0.0.1:1/0"}
        for environment in ({}, over_http):
            report = plan("--workers", "2", BLIP_PRICE_PER_WORKER_HOUR="3600", **environment)
            assert report["estimate"] == expected
            assert report["estimate_note"] == "by 12.0 rows/s of a worker, as the cluster lately did caption with demo"
        assert plan("--task", "vqa", **over_http)["estimate"] is None
    assert "127.0.0.1:1" in plan(BLIP_REDIS_URL="redis://127.0.0.1:1/0")["estimate_note"]  # away: the plan is there


def test_plan_says_what_an_estimate_needs(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("a.jpg\n")
    last = blip_batch("plan", tmp_path / "m.txt").stdout.splitlines()[-1]
    assert last == (
        "estimate    none: nobody knows how fast caption with Salesforce/blip-image-captioning-base is; give "
        "--rows-per-second, or the BLIP_API_URL or BLIP_REDIS_URL of a cluster that has done some"
    )


def test_plan_of_a_manifest_on_s3(s3_server: S3Server) -> None:
    open_store("s3://blip").put("in/list.txt", b"s3://blip/a.jpg\n" * 100)
    report = json.loads(blip_batch("plan", "s3://blip/in/list.txt", "--json").stdout)
    assert (report["format"], report["rows"], report["chunks"]) == ("list", 100, 7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan"], "Missing argument"),
        (["plan", "x", "--no-such"], "--no-such"),
        (["embroider"], "embroider"),
        (["plan", "/nonexistent"], "/nonexistent does not exist"),
        (["plan", "{tmp}/empty.jsonl"], "is empty"),
        (["plan", "{tmp}/m.csv", "--column", "image=url"], "no column `url`, but image"),
        (["plan", "{tmp}/m.csv", "--column", "image"], "write KEY=NAME"),
        (["plan", "{tmp}/m.csv", "--column", "picture=image"], "one of image, id"),
        (["plan", "{tmp}"], "no images below it"),
        (["plan", "{tmp}/m.csv", "--format", "xml"], "unknown manifest format 'xml'"),
        (["plan", "{tmp}/m.csv", "--task", "x"], "unknown task 'x'"),
        (["plan", "{tmp}/m.csv", "--chunk-rows", "-5"], "'--chunk-rows': Input should be greater than or equal to 1"),
        (["plan", "{tmp}/m.csv", "--chunk-rows", "10000000000"], "'--chunk-rows': Input should be less than or equal"),
        (["plan", "{tmp}/m.csv", "--rows-per-second", "nan"], "--rows-per-second"),
        (["plan", "{tmp}/m.csv", "--cost-per-hour", "inf"], "--cost-per-hour"),
        (["plan", "{tmp}/m.csv", "--workers", "10000000000"], "--workers"),
        (["submit", "m", "--task", "caption", "--output", "o", "--option", "x=" + "[" * 100_000], "nested too deeply"),
        (["plan", "/nonexistent", "--model", "no such"], "neither an existing directory nor a hub repository"),
        (["verify", "{tmp}"], "holds no job"),
        (["plan", "{tmp}", "--format", "csv"], "is read as folder, not as csv"),
        (["verify", "gs://x"], "only s3://"),
        (["verify", "s3:/x"], "only s3://"),
        (["orchestrator", "--redis-url", "http://x"], "BLIP_REDIS_URL"),
        (["orchestrator", "--log-level", "loud"], "unknown log level"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "m.csv").write_text("image\na.jpg\n")
    one_line_error(blip_batch(*(argument.format(tmp=tmp_path) for argument in arguments)), says)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"BLIP_LEASE_SECONDS": "soon"}, "BLIP_LEASE_SECONDS"),
        ({"BLIP_LEASE_SECONDS": "10"}, "BLIP_LEASE_SECONDS=10 is less than twice BLIP_RENEW_SECONDS=15"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "BLIP_STORAGE_RETRY_SECONDS": "0.3"}, "127.0.0.1:9"),
        ({"AWS_ENDPOINT_URL_S3": "", "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no S3 credentials"),
        ({}, "s3://absent/m.jsonl does not exist"),
    ],
)
def test_s3_that_does_not_work_is_one_line(s3_server: S3Server, variables: dict[str, str], says: str) -> None:
    nowhere = {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_CONFIG_FILE": "/nonexistent"}
    one_line_error(blip_batch("plan", "s3://absent/m.jsonl", **nowhere, **variables), says)


def finished_output(folder: Path) -> Path:
    """An output of 25 rows in 3 parts, all there but for the summary."""
    (folder / "m.txt").write_text("".join(f"{n}.jpg\n" for n in range(25)))
    spec = make_spec(str(folder / "m.txt"), "caption", str(folder / "out"), model="demo", chunk_rows=10)
    settings, store = load_settings(), open_store(spec.output)
    claim_output(spec, store)
    plan = make_plan(spec, store, settings)
    for chunk in plan.all_chunks():
        rows = [row for row in plan.read_rows(chunk, "caption") if isinstance(row, Row)]
        put_part(
            store,
            Hint.of(spec.id, plan.hash, chunk),
            [result_row(row, "caption", {"caption": "x"}) for row in rows],
            "w",
        )
    return folder / "out"


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    out = finished_output(tmp_path)
    done = blip_batch("verify", out, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["problems"] == ["summary.json is missing: the job is not complete"]
    assert (report["rows_found"], report["rows_planned"], report["complete"]) == (25, 25, False)
    part = out / part_key(1)
    part.write_text(part.read_text().replace('"row":14', '"row":15'))
    (out / part_key(2)).unlink()
    (out / part_key(7)).write_text("")
    done = blip_batch("verify", out)
    assert done.returncode == 1
    assert "row 15 where row 14 belongs" in done.stdout
    assert "part-00000002.jsonl is missing: rows 20 to 24" in done.stdout
    assert "part-00000007.jsonl: no chunk of the plan" in done.stdout


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_the_control_loop_ends_when_told(redis_server: RedisServer, sig: int) -> None:
    with subprocess.Popen([sys.executable, "-m", "orchestrator"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "control loop" in process.stderr.readline()
        process.send_signal(sig)
        assert process.wait(10) == 0
