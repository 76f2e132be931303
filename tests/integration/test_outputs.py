"""Outputs that are not what a job left there: given to another job, planned anew, or of a manifest that changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from api import body, http, problem, serving
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer, S3Server
from test_cli import blip_batch, one_line_error

from orchestrator import jobs, lifecycle
from orchestrator.contract import JobSpec, JobState
from orchestrator.control import Controller
from orchestrator.embedded import finished_summary
from orchestrator.errors import JobConflict
from orchestrator.jobs import known_plan, make_spec, submit
from orchestrator.parts import REDO
from orchestrator.plan import Plan, load_plan
from orchestrator.recover import recover
from orchestrator.rounds import load_rounds
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


def finish(settings: Settings, controller: Controller, spec: JobSpec) -> JobState:
    return advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))


def rounds_of(output: Path, settings: Settings) -> int:
    plan = load_plan(open_store(str(output)), settings)
    assert plan is not None
    return len(load_rounds(plan))


def test_an_old_job_leaves_the_output_of_another_alone(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    old = caption_spec(write_manifest(tmp_path, 40, lambda n: n == 3), tmp_path / "out")
    finish(settings, controller, old)
    shutil.rmtree(tmp_path / "out")
    new = make_spec(str(tmp_path / "rows.jsonl"), "caption", str(tmp_path / "out"), model="demo", chunk_rows=7)
    finish(settings, controller, new)
    with pytest.raises(JobConflict, match=f"{old.id} has lost its output: .* holds a job with chunk_rows=7, not 10"):
        lifecycle.retry(controller.ledger, settings, old.id)
    assert rounds_of(tmp_path / "out", settings) == 0
    state = controller.ledger.state(old.id)
    assert state is not None
    assert state.status == "completed"
    assert verify(str(tmp_path / "out")).ok


def test_a_job_whose_output_was_planned_anew_elsewhere(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """As by `run`, which has a Redis of its own: ours takes up what is there when the job is submitted again."""
    spec = caption_spec(write_manifest(tmp_path, 40, lambda n: n == 3), tmp_path / "out")
    finish(settings, controller, spec)
    old = {name: controller.ledger._redis.hget(f"blip:job:{spec.id}", name) for name in ("plan", "total", "completed")}
    shutil.rmtree(tmp_path / "out")
    write_manifest(tmp_path, 50, lambda n: n % 10 == 3)
    finish(settings, controller, spec)
    controller.ledger._redis.hset(f"blip:job:{spec.id}", mapping=old)
    with pytest.raises(JobConflict, match=f"job {spec.id}: .*out was planned anew; submit the job again"):
        lifecycle.retry(controller.ledger, settings, spec.id)
    assert rounds_of(tmp_path / "out", settings) == 0
    state = finish(settings, controller, spec)
    assert (state.total, state.completed, state.failed) == (50, 45, 5)
    assert lifecycle.retry(controller.ledger, settings, spec.id).rows == 5


@pytest.mark.parametrize("action", ["submit", "recover"])
def test_a_retry_that_died_before_the_job_was_woken(
    settings: Settings, controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    spec = caption_spec(write_manifest(tmp_path, 40, lambda n: n % 10 == 3), tmp_path / "out")
    finish(settings, controller, spec)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(controller.ledger, "set_status", die)
        with pytest.raises(KeyboardInterrupt):
            lifecycle.retry(controller.ledger, settings, spec.id)
    assert rounds_of(tmp_path / "out", settings) == 1
    (tmp_path / "mended-bad-3.png").touch()
    if action == "submit":
        submit(controller.ledger, spec, settings)
    else:
        assert not recover(str(tmp_path / "out"), settings).complete
    state = advance(controller, spec.id, lambda state: ended(state) and state.round == 1, MiniWorker(settings))
    assert (state.status, state.completed, state.failed) == ("completed", 37, 3)
    assert verify(str(tmp_path / "out")).ok
    submit(controller.ledger, spec, settings)  # nothing is left to do now
    again = controller.ledger.state(spec.id)
    assert again is not None
    assert again.status == "completed"


CHANGED = "rows.jsonl was changed since this output was planned from it; choose another output, or remove this one"


def test_the_same_command_after_the_manifest_changed(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec = caption_spec(write_manifest(tmp_path, 20), tmp_path / "out")
    finish(settings, controller, spec)
    write_manifest(tmp_path, 30)
    command = ("--task", "caption", "--output", tmp_path / "out", "--model", "demo", "--chunk-rows", 10)
    for one in (("run", tmp_path / "rows.jsonl", *command), ("run", tmp_path / "rows.jsonl", *command, "--retry"),
                ("submit", tmp_path / "rows.jsonl", *command)):  # fmt: skip
        done = blip_batch(*one)
        one_line_error(done, CHANGED)
        assert str(tmp_path / "out") in done.stderr
    assert json.loads((tmp_path / "out/summary.json").read_text())["request_counts"]["total"] == 20
    assert recover(str(tmp_path / "out"), settings).complete  # is about the output, whatever the manifest is now
    shutil.rmtree(tmp_path / "out")
    assert finish(settings, controller, spec).total == 30


def test_over_http_it_is_a_conflict(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    given = body(tmp_path)
    with serving(settings, allowed_folders=(str(tmp_path),)) as url, http(url) as api:
        job = api.post("/v1/jobs", json=given).json()["id"]
        advance(controller, job, ended, MiniWorker(settings))
        assert api.post("/v1/jobs", json=given).status_code == 200
        write_manifest(tmp_path, 30)
        problem(api.post("/v1/jobs", json=given), 409, "conflict", CHANGED)


def test_manifests_that_are_copied_to_the_plan(s3_server: S3Server, settings: Settings, controller: Controller) -> None:
    """Their rows lie beside the plan: one that is gone is no other one. Prefixes have no version to compare."""
    store = open_store("s3://blip/in")
    store.put("rows.csv", b"image\ns3://blip/a.jpg\n")
    store.put("pictures/a.jpg", b"x")
    csv, prefix = (caption_spec(f"s3://blip/in/{name}", f"s3://blip/{name}-out") for name in ("rows.csv", "pictures/"))
    for spec in (csv, prefix):
        assert finish(settings, controller, spec).status == "completed"
        assert submit(controller.ledger, spec, settings) == spec.id
    store.put("rows.csv", b"image\ns3://blip/a.jpg\ns3://blip/b.jpg\n")
    store.put("pictures/b.jpg", b"x")
    with pytest.raises(JobConflict, match=r"the manifest s3://blip/in/rows\.csv was changed"):
        submit(controller.ledger, csv, settings)
    s3_client(5.0).delete_object(Bucket="blip", Key="in/rows.csv")
    for spec in (csv, prefix):
        submit(controller.ledger, spec, settings)
        summary = finished_summary(spec, settings)
        assert summary is not None
        assert summary["request_counts"]["total"] == 1


def test_a_manifest_that_cannot_be_read_to_its_end_leaves_the_output_free(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    lines = ["image\n", *(f"{n}.png\n" for n in range(20_000))]
    (tmp_path / "broken.csv").write_text("".join(lines) + '"20000.png\n')
    (tmp_path / "whole.csv").write_text("".join(lines))
    broken, whole = (caption_spec(tmp_path / name, tmp_path / "out", chunk_rows=10_000) for name in
                     ("broken.csv", "whole.csv"))  # fmt: skip
    state = finish(settings, controller, broken)
    assert state.error is not None
    assert "20002" in state.error["message"].replace(",", "")
    assert finish(settings, controller, whole).completed == 20_000
    with pytest.raises(JobConflict, match="holds a job with manifest="):
        submit(controller.ledger, broken, settings)


def test_a_retry_that_takes_long_to_begin_is_begun_by_the_control_loop(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A job that was stopped has no summary: each of its parts has to be asked. Redis may be lost before that."""
    given = body(tmp_path, 60)
    with serving(settings, allowed_folders=(str(tmp_path),)) as url, http(url) as api:
        job, worker = api.post("/v1/jobs", json=given).json()["id"], MiniWorker(settings)
        advance(controller, job, lambda state: state.chunks_done >= 3, worker)
        api.post(f"/v1/jobs/{job}/cancel")
        done = advance(controller, job, ended).completed
        monkeypatch.setattr("orchestrator.rounds._FEW", 5)
        begun = api.post(f"/v1/jobs/{job}/retry").json()
        assert (begun["round"], begun["rows"], begun["job"]["status"]) == (1, None, "validating")
        assert rounds_of(tmp_path / "out", settings) == 0
        while worker.take():  # of the first pass
            pass
        redis_server.client().flushall()
        fresh = Controller(settings)  # one that never heard of the job
        assert api.post("/v1/jobs", json=given).status_code == 201
        worker.worked.clear()
        for n in (3, 13):
            (tmp_path / f"mended-bad-{n}.png").touch()
        state = advance(fresh, job, ended, worker)
        fresh.close()
        assert (state.status, state.round, state.completed, state.failed) == ("completed", 1, 56, 4)
        assert len(worker.worked) == len(set(worker.worked)) == 60 - done
        audit = verify(str(tmp_path / "out"))
        assert audit.ok, audit.problems
        assert api.post(f"/v1/jobs/{job}/retry").json()["rows"] == 4  # the summary tells


@pytest.fixture(params=["s3", "local"])
def out(request: pytest.FixtureRequest, s3_server: S3Server, tmp_path: Path) -> str:
    """An output that a removal can be interrupted in."""
    return "s3://blip/out" if request.param == "s3" else str(tmp_path / "out")


def remove(output: str, kept: Callable[[str], bool]) -> None:
    """As `aws s3 rm --recursive` or `rm -r` that did not come to its end."""
    for info in [*open_store(output).list()]:
        if not kept(info.key) and output.startswith("s3://"):
            s3_client(5.0).delete_object(Bucket="blip", Key=f"out/{info.key}")
        elif not kept(info.key):
            (Path(output) / info.key).unlink()


def contents(output: str) -> dict[str, bytes]:
    store = open_store(output)
    return {info.key: store.get(info.key) for info in store.list() if info.key != "plan/probe"}


@pytest.mark.parametrize(
    "kept",
    [
        lambda key: key >= "results/",  # removed in the order of keys
        lambda key: key.startswith("results/"),  # as that leaves a job without a retry
        lambda key: key.startswith("rounds/"),
        lambda key: key == "summary.json",
        lambda key: key != "job.json",  # the parts may be another model's
        lambda key: not key.startswith("plan/"),
    ],
)
def test_results_whose_job_is_gone_are_never_taken_for_the_new_jobs(
    settings: Settings, controller: Controller, tmp_path: Path, out: str, kept: Callable[[str], bool]
) -> None:
    spec = caption_spec(write_manifest(tmp_path, 20, lambda n: n == 3), out)
    finish(settings, controller, spec)
    lifecycle.retry(controller.ledger, settings, spec.id)
    assert advance(controller, spec.id, ended, MiniWorker(settings)).round == 1
    remove(out, kept)
    before = contents(out)
    if "job.json" not in before and "plan/plan.json" not in before:
        write_manifest(tmp_path, 20)  # of equal shape
    controller.ledger._redis.flushall()
    state = finish(settings, controller, spec)
    assert state.error is not None
    assert state.error["code"] == "output_taken"
    assert f"{out} holds results of a job whose job.json or plan is gone; remove all" in state.error["message"]
    assert contents(out) == before
    remove(out, lambda _: False)
    assert finish(settings, controller, spec).status == "completed"
    assert verify(out).ok


def test_two_who_plan_the_same_output_are_in_nobodys_way(
    settings: Settings, controller: Controller, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One looks for a plan just before the other has written it, and for results just after."""
    spec = caption_spec(write_manifest(tmp_path, 20), out)
    finish(settings, controller, spec)
    answers: list[Plan | None] = [None]
    monkeypatch.setattr(jobs, "load_plan", lambda *args: answers.pop() if answers else load_plan(*args))
    found = known_plan(open_store(out), settings)
    assert found is not None
    assert found.rows == 20
    assert not answers


def test_a_part_of_another_plan_is_not_counted(
    s3_server: S3Server, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """As a worker may leave it that was at the old job when its output was removed and done anew."""
    spec, store = caption_spec(write_manifest(tmp_path, 20), "s3://blip/out"), open_store("s3://blip/out")
    finish(settings, controller, spec)
    key = "results/part-00000001.jsonl"
    head = store.head(key)
    assert head is not None
    store.put(key, store.get(key), metadata={**head.metadata, "plan": "0" * 32})
    controller.ledger._redis.flushall()
    state = finish(settings, controller, spec)
    assert state.error is not None
    assert state.error["code"] == "part_invalid"
    assert state.error["message"] == f"s3://blip/out/{key}: a part of another plan; delete this part, then {REDO}"
    s3_client(5.0).delete_object(Bucket="blip", Key=f"out/{key}")
    assert finish(settings, controller, spec).status == "completed"


def rewrite(path: Path, *without: str, **spec: object) -> None:
    """job.json, with another spec."""
    record = json.loads(path.read_text())
    record["spec"] = {name: value for name, value in record["spec"].items() if name not in without} | spec
    path.write_text(json.dumps(record))


def test_an_output_of_an_earlier_or_a_later_version_goes_on(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """Whose spec has fewer fields, which had no other value then than the default now, or one more."""
    spec = caption_spec(write_manifest(tmp_path, 40, lambda n: n == 3), tmp_path / "out")
    finish(settings, controller, spec)
    rewrite(tmp_path / "out/job.json", "results", "columns", "manifest_format", "weight", later=1)
    assert finished_summary(spec, settings) is not None
    assert lifecycle.retry(controller.ledger, settings, spec.id).rows == 1
    assert advance(controller, spec.id, ended, MiniWorker(settings)).status == "completed"
    rewrite(tmp_path / "out/job.json", results="parquet")
    with pytest.raises(JobConflict, match="holds a job with results='parquet', not 'jsonl'"):
        submit(controller.ledger, spec, settings)


@pytest.mark.parametrize("damage", [{"task": "paint"}, {"task": []}, {"chunk_rows": "x"}, {"model": None}], ids=str)
def test_a_damaged_job_json_is_one_line_that_names_it(
    settings: Settings, controller: Controller, tmp_path: Path, damage: dict[str, object]
) -> None:
    out, (place,) = tmp_path / "out", damage
    spec = caption_spec(write_manifest(tmp_path, 10), out)
    finish(settings, controller, spec)
    rewrite(out / "job.json", *damage, **{name: value for name, value in damage.items() if value is not None})
    says = f"{out}/job.json: {place}: "
    for arguments in (("export", out, tmp_path / "x.csv"), ("report", out, tmp_path / "x.html"), ("recover", out)):
        one_line_error(blip_batch(*arguments), says)
    with pytest.raises(JobConflict, match=f"{says}.* it was damaged, or another version wrote it"):
        submit(controller.ledger, spec, settings)
    (out / "job.json").write_text("[" * 100_000)
    one_line_error(blip_batch("export", out, tmp_path / "x.csv"), "job.json is no job of ours")


@pytest.mark.parametrize("command", ["export", "report", "verify"])
def test_a_damaged_plan_json_is_one_line_that_names_it(
    settings: Settings, controller: Controller, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    finish(settings, controller, caption_spec(write_manifest(tmp_path, 10), out))
    text = (out / "plan/plan.json").read_text()
    more = [] if command == "verify" else [tmp_path / "x.csv"]
    for damaged in (text.replace('"jsonl"', '"xml"'), text.replace('"results"', '"resluts"'), "[" * 100_000):
        (out / "plan/plan.json").write_text(damaged)
        one_line_error(blip_batch(command, out, *more), f"{out}/plan/plan.json is not a plan")


def test_a_report_where_the_options_were_taken_out(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:  # fmt: skip
    out = tmp_path / "out"
    finish(settings, controller, caption_spec(write_manifest(tmp_path, 10), out))
    record = json.loads((out / "job.json").read_text())
    del record["options"]
    (out / "job.json").write_text(json.dumps(record))
    assert blip_batch("report", out, tmp_path / "x.html").returncode == 0
