"""Jobs: what a user asked for, checked, and the output that belongs to it."""

import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Final

from pydantic import ValidationError

from blip_engine.errors import OptionError
from blip_engine.requests import DEFAULT_MODELS, DEMO_MODEL, JOB_TASKS, Task, checkpoints_of, options_for

from .contract import FORMATS, RESULT_FORMATS, JobSpec, JobState
from .errors import JobConflict, JobError, ObjectNotFound, UsageError
from .ledger import Ledger
from .parts import PREFIX
from .plan import Plan, load_plan
from .rounds import SUMMARY_KEY, is_whole, load_rounds, round_key
from .rows import checked_columns
from .settings import Settings
from .storage import Store, is_s3, open_store, refuse_other_uris, split_s3

JOB_KEY: Final = "job.json"
_LISTED: Final = 20_000  # parts, which S3 lists within a second or two
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
#: ./x and ../x are paths: no name on the hub begins with a dot, or has two in a row.
_MODEL: Final = re.compile(r"demo|(?!.*\.\.)\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)


def make_spec(  # noqa: PLR0913 - a job has as many arguments as options
    manifest: str,
    task: str,
    output: str,
    *,
    model: str | None = None,
    manifest_format: str | None = None,
    columns: Mapping[str, str] | None = None,
    results: str = "jsonl",
    options: Mapping[str, Any] | None = None,
    chunk_rows: int | None = None,
    max_error_ratio: float = 0.5,
    weight: float = 1.0,
    remote: Settings | None = None,
) -> JobSpec:
    """A whole spec, with its id; the same work on the same output always has the same id.

    Raises UsageError for anything that can be known to be wrong without reading the manifest or loading the model.
    `remote`: another machine asks, and of local files only those in BLIP_ALLOWED_FOLDERS are looked for.
    """
    if task not in JOB_TASKS:
        raise UsageError(f"unknown task {task!r}; the tasks are: {', '.join(JOB_TASKS)}")
    if results not in RESULT_FORMATS:
        raise UsageError(f"unknown format of results {results!r}; they are: {', '.join(RESULT_FORMATS)}")
    if manifest_format is not None and manifest_format not in FORMATS:
        raise UsageError(f"unknown manifest format {manifest_format!r}; the formats are: {', '.join(FORMATS)}")
    for text in (manifest, output, model or "", *(columns or {}).values()):
        if _LONE_SURROGATE.search(text):  # a file name that is no UTF-8, or an escape that is half a character
            raise UsageError(f"{text!r} is not text in UTF-8, which JSON needs; rename it")
    for name, value in (options or {}).items():
        if isinstance(value, float) and not math.isfinite(value):  # which JSON cannot say
            raise UsageError(f"option {name!r} must be a finite number, not {value!r}")
    try:
        options_for(task, options)
        draft = JobSpec(
            id="draft", task=task, model=models_of(task, model, remote), manifest=manifest_uri(manifest, remote),
            manifest_format=manifest_format, columns=checked_columns(columns or {}), output=_output(output, remote),
            results=results, options=dict(options or {}), chunk_rows=chunk_rows, max_error_ratio=max_error_ratio,
            weight=weight, created_at=time.time(),
        )  # fmt: skip
    except OptionError as error:
        raise UsageError(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{first['loc'][0]}={first['input']!r}: {first['msg']}") from None
    text = json.dumps(draft.identity(), sort_keys=True)
    return draft.model_copy(update={"id": "job-" + hashlib.sha256(text.encode()).hexdigest()[:20]})


def _check_allowed(what: str, text: str, settings: Settings) -> None:
    """Raises UsageError for a path outside of BLIP_ALLOWED_FOLDERS, in the same words whether anything is there."""
    if not text.startswith("/") or ".." in text.split("/"):  # what `..` means depends on links, and who follows them
        raise UsageError(f"{what} {text}: give an s3:// URI, or a whole path that starts with / and has no .. in it")
    path = os.path.realpath(text) + "/"
    if not any(path.startswith(os.path.realpath(folder).rstrip("/") + "/") for folder in settings.allowed_folders):
        raise UsageError(f"{what} {text}: the orchestrator takes s3:// URIs, and paths below its BLIP_ALLOWED_FOLDERS")


def manifest_uri(manifest: str, remote: Settings | None = None) -> str:
    """An s3:// URI as it is, a path made absolute, a folder with / at its end. Raises UsageError."""
    if is_s3(manifest):
        split_s3(manifest)
        return manifest
    path = _local(manifest, "manifest", remote)
    if not os.path.exists(path):  # noqa: PTH110 -- unlike Path's, it never raises
        raise UsageError(f"manifest {manifest} does not exist")
    return path + "/" if os.path.isdir(path) else path  # noqa: PTH112


def _output(output: str, remote: Settings | None) -> str:
    if is_s3(output):
        split_s3(output)
        return output.rstrip("/")
    path = _local(output, "output", remote)
    if os.path.isfile(path):  # noqa: PTH113
        raise UsageError(f"output {output} is a file; name a folder or s3:// prefix")
    return path


def _local(text: str, what: str, remote: Settings | None) -> str:
    refuse_other_uris(text, f"{what} ")
    if not text or "\0" in text:
        raise UsageError(f"{what} {text!r} is not a path")
    if remote is not None:
        _check_allowed(what, text, remote)
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111


def models_of(task: Task, model: str | None, remote: Settings | None = None) -> str:
    """The model of a job, or its two; None: the task's default. Raises UsageError, OptionError for a wrong number."""
    model = model or DEFAULT_MODELS[task]
    named = checkpoints_of(task, model)
    return model if model == DEMO_MODEL else "+".join(model_name(name, remote) for _, name in named)


def model_name(model: str, remote: Settings | None = None) -> str:
    """A local directory as an absolute path, `demo` or a hub repository's name as it is. Raises UsageError."""
    local = model != DEMO_MODEL
    if remote is not None:  # only a whole path is a directory: no other name is looked for on this disk
        local = model.startswith(("/", ".", "~")) and "\0" not in model
        if local:
            _check_allowed("model", model, remote)
    folder = os.path.abspath(os.path.expanduser(model))  # noqa: PTH100, PTH111
    if local and os.path.isdir(folder):  # noqa: PTH112
        return folder
    if not _MODEL.fullmatch(model):
        raise UsageError(
            f"model {model!r}: neither an existing directory nor a hub repository (owner/name, @revision to pin it) "
            "nor `demo`"
        )
    return model


def submit(ledger: Ledger, spec: JobSpec, settings: Settings) -> str:
    """Starts the job, or goes on with it where it is; returns its id.

    A job that ended as failed or cancelled, or is paused, goes on from its finished parts; one whose output was
    removed begins anew. Raises JobConflict as `plan_to_go_on_with` does, and while the job is being cancelled.
    """
    return wake(ledger, spec, plan_to_go_on_with(spec, settings))


def plan_to_go_on_with(spec: JobSpec, settings: Settings) -> Plan | None:
    """The plan of the job's output; None: it has none yet, or nothing is there.

    Raises JobConflict when the output belongs to other work, or was planned from another version of the manifest.
    """
    store = open_store(spec.output, settings)
    plan = None if check_owner(spec, store) is None else load_plan(store, settings)
    if plan is not None:
        plan.check_source()
    return plan


def wake(ledger: Ledger, spec: JobSpec, plan: Plan | None) -> str:
    """As `submit`, of a job whose output was looked at already and has `plan`."""
    if not ledger.create_job(spec):
        state = _state_to_go_on_from(ledger, spec.id)
        ledger.update_spec(spec)
        idle = state is not None and (state.status in {"failed", "cancelled", "paused"} or _is_outdated(state, plan))
        if state is not None and idle and not ledger.set_status(spec.id, "validating", since=state.status):
            _state_to_go_on_from(ledger, spec.id)  # someone was quicker: to wake it, or to cancel it
    return spec.id


def _state_to_go_on_from(ledger: Ledger, job: str) -> JobState | None:
    """Raises JobConflict where a cancel is under way: it would end what was just asked for, without a word."""
    state = ledger.state(job)
    if state is not None and state.status == "cancelling":
        raise JobConflict(f"job {job} is being cancelled; submit it again once it has ended")
    return state


def _is_outdated(state: JobState, plan: Plan | None) -> bool:
    """Whether the output of a job that is complete was removed, in parts or whole, or made anew, or has a round begun.

    The parts of a huge job are not listed here, where someone waits: `retry` brings them back.
    """
    if state.status != "completed":
        return False
    if plan is None or plan.hash != state.plan or plan.store.head(round_key(state.round + 1)) is not None:
        return True
    return plan.chunks <= _LISTED and not is_whole(plan, load_rounds(plan))


def read_job(store: Store) -> dict[str, Any] | None:
    """The output's job.json; None when there is none. Raises JobConflict when it is none of ours."""
    try:
        record = json.loads(store.get(JOB_KEY))
    except ObjectNotFound:
        return None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("spec"), dict):
        raise JobConflict(f"{store.uri(JOB_KEY)} is no job of ours; choose another output")
    return record


def spec_of(record: Mapping[str, Any], store: Store) -> JobSpec:
    """What a job.json says was asked for, as this version reads it. Raises JobConflict when it cannot."""
    try:
        return JobSpec.stored(record["spec"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise JobConflict(
            f"{store.uri(JOB_KEY)}: {place}: {first['msg']}; it was damaged, or another version wrote it: put it back, "
            "upgrade, or choose another output"
        ) from None


def check_owner(spec: JobSpec, store: Store) -> dict[str, Any] | None:
    """The output's job.json. Raises JobConflict when it tells of other work than `spec`."""
    record = read_job(store)
    if record is None:
        return None
    old = spec_of(record, store).identity()  # with the defaults of fields that an earlier version did not know
    for name, value in spec.identity().items():
        if old[name] != value:
            raise JobConflict(
                f"{store.root} holds a job with {name}={old[name]!r}, not {value!r}; choose another output, "
                f"repeat the first command to go on with it, or remove this output to begin anew"
            )
    return record


def known_plan(store: Store, settings: Settings) -> Plan | None:
    """The output's plan; None: it has none yet.

    Raises JobError (`output_taken`) for results whose job.json or plan is gone, as a removal that was interrupted
    leaves them: they may be of other rows, or another model's.
    """
    plan = load_plan(store, settings)
    if (plan is None or store.head(JOB_KEY) is None) and _holds_results(store):
        plan = load_plan(store, settings)  # once more: a planner that was quicker wrote both before any result
        if plan is None or store.head(JOB_KEY) is None:
            raise JobError(
                "output_taken",
                f"{store.root} holds results of a job whose job.json or plan is gone; remove all that is there, or "
                "choose another output",
            )
    return plan


def _holds_results(store: Store) -> bool:
    parts = (next(store.list(prefix), None) for prefix in (PREFIX, "rounds/"))
    return any(parts) or store.head(SUMMARY_KEY) is not None


def claim_output(spec: JobSpec, store: Store) -> dict[str, Any]:
    """Makes the output the job's: writes job.json unless it is there. Returns job.json.

    The store must have been probed (`Store.check_conditional_put`). Raises StorageError, or JobError (`output_taken`)
    when another job was first.
    """
    record = {
        "spec": spec.model_dump(),
        "options": asdict(options_for(spec.task, spec.options)),  # the defaults filled in
        "versions": {"blip-batch": version("blip-batch"), "python": platform.python_version()},
        "plan": None,
        "model": None,
    }
    store.put_new(JOB_KEY, _as_json(record))
    try:
        return check_owner(spec, store) or record
    except UsageError as error:
        raise JobError("output_taken", str(error)) from None


def complete_job_record(store: Store, plan: Plan, state: JobState) -> None:
    """Adds to job.json what is known only later: the manifest's version, and the model that workers loaded."""
    record = read_job(store)
    if record is None:
        return
    manifest = {"uri": plan.source, "etag": plan.etag, "format": plan.format, "rows": plan.rows}
    full = {**record, "plan": plan.hash, "manifest": manifest, "model": state.model or record.get("model")}
    if full != record:
        store.put(JOB_KEY, _as_json(full))


def _as_json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2, ensure_ascii=True).encode() + b"\n"
