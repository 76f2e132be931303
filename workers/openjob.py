"""A job as a worker sees it: its spec, plan, output and checkpoint. Opened once, used by all of its chunks."""

import logging
from dataclasses import dataclass
from pathlib import Path

from blip_engine.errors import OptionError
from blip_engine.requests import Options, checkpoints_of, options_for
from orchestrator.contract import BadRow, Hint, JobSpec, Row
from orchestrator.errors import JobError, SpecUnreadable
from orchestrator.fetch import ImagePolicy
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, load_plan
from orchestrator.rounds import numbers_to_do
from orchestrator.settings import Settings
from orchestrator.storage import Store, open_store

from .messages import Checkpoint

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenJob:
    """Shared by the worker's threads; only `checkpoint` is ever set later."""

    spec: JobSpec
    store: Store
    plan: Plan
    options: Options
    images: ImagePolicy
    checkpoint: Checkpoint | None = None  # once it is resident and reported

    @classmethod
    def of(cls, ledger: Ledger, hint: Hint, settings: Settings) -> "OpenJob":
        """Raises JobError when the job has no such plan, SpecUnreadable when another version wrote what is meant."""
        spec = ledger.spec(hint.job)
        if spec is None:
            raise JobError("unknown_job", f"job {hint.job} is not in Redis")
        store = open_store(spec.output, settings)
        plan = load_plan(store, settings)
        if plan is None or plan.hash != hint.plan:
            raise JobError("plan_changed", f"{spec.output} has another plan than the job's; choose another output")
        try:
            options = options_for(spec.task, spec.options)
        except OptionError as error:  # they were checked when the job was submitted: by a version that knows more
            raise SpecUnreadable(f"job {hint.job}: this version cannot read its options ({error}); upgrade") from error
        _refuse_shadowed(spec)
        return cls(spec, store, plan, options, plan.image_policy())

    def rows(self, hint: Hint) -> list[Row | BadRow]:
        """The rows that the hint is about: the chunk's, in a later round those without a result.

        Raises JobError (`manifest_changed`, PartError) and StorageError.
        """
        chunk = hint.as_chunk()
        rows = self.plan.read_rows(chunk, self.spec.task)
        if hint.round == 0:
            return rows
        numbers = set(numbers_to_do(self.store, chunk, hint.round, hint.todo, self.plan.results))
        return [row for row in rows if row.number in numbers]

    def report(self, ledger: Ledger, checkpoint: Checkpoint) -> None:
        """Tell the ledger what serves this job. Raises JobError when it began with other weights."""
        info = {
            "model": self.spec.model,
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "weights_sha256": checkpoint.weights_sha256,
            "precision": checkpoint.precision,
            "device": checkpoint.device,
        }
        if not ledger.report_model(self.spec.id, info):
            raise JobError(
                "model_changed",
                f"model {self.spec.model!r} has other weights now than when the job began; pin its @revision, or "
                "choose another output",
            )
        state = ledger.state(self.spec.id)
        began = (state.model or {}).get("precision") if state is not None else None
        if began not in (None, checkpoint.precision):  # no fault: a pool may be of several kinds of machines
            _log.warning("this job began in %s: scores of %s differ a little", began, checkpoint.precision)
        self.checkpoint = checkpoint


def _refuse_shadowed(spec: JobSpec) -> None:
    """Raises JobError where the engine would take a directory of the worker's own for a hub repository.

    Directories are named by whole paths, which were checked against BLIP_ALLOWED_FOLDERS; hub names were not.
    """
    for _, model in checkpoints_of(spec.task, spec.model):
        if model.count("/") == 1 and not model.startswith("/") and Path(model).is_dir():
            here = Path(model).absolute()
            raise JobError("model_shadowed", f"{here} hides the hub's {model}; start workers elsewhere")
