"""What there is to do for a job, as object storage tells it."""

from dataclasses import dataclass
from itertools import islice
from typing import Final

from .contract import Hint, JobSpec, JobState
from .errors import JobError
from .ledger import Ledger
from .parts import PartInfo
from .plan import Plan, load_plan
from .rounds import Round, existing_parts, load_rounds
from .settings import Settings
from .stopping import go_on
from .storage import open_store

_BATCH: Final = 500  # chunks named in one call of a script


@dataclass(frozen=True)
class Work:
    """In the first round all of a job's plan, later what the last round is about."""

    plan: Plan
    rounds: list[Round]

    @classmethod
    def load(cls, spec: JobSpec, state: JobState, settings: Settings) -> "Work":
        """The work that the ledger tells of. Raises JobError when storage holds another plan, and StorageError."""
        plan = load_plan(open_store(spec.output, settings), settings)
        if plan is None or plan.hash != state.plan:
            raise JobError("plan_invalid", f"{spec.output}/plan was removed or replaced; choose another output")
        return cls(plan, load_rounds(plan)[: state.round])

    @property
    def number(self) -> int:
        return len(self.rounds)

    @property
    def rows_per_chunk(self) -> float:
        if self.rounds:
            return sum(self.rounds[-1].rows) / len(self.rounds[-1].chunks)
        return self.plan.rows / self.plan.chunks

    def hint(self, job: str, chunk: int) -> Hint:
        todo = self.rounds[-1].rows_of(chunk) if self.rounds else 0
        return Hint.of(job, self.plan.hash, self.plan.chunk(chunk), self.number, todo)

    def restore(self, ledger: Ledger, job: str, epoch: str) -> int:
        """Tells the ledger what there is to do, and what of it storage holds already: so many parts."""
        plan, number, restored = self.plan, self.number, 0
        ledger.reset(job, epoch, plan.hash, plan.chunks, plan.rows, number)
        if self.rounds:
            to_do = iter(zip(self.rounds[-1].chunks, self.rounds[-1].rows, strict=True))
            while batch := list(islice(to_do, _BATCH)):
                go_on()
                ledger.open(job, epoch, plan.hash, number, batch)
        parts = existing_parts(plan, number)
        while found := [counts(part) for part in islice(parts, _BATCH)]:
            go_on()
            ledger.mark(job, epoch, plan.hash, found, number)
            restored += len(found)
        return restored


def counts(part: PartInfo) -> tuple[int, int, int, str]:
    """A part as `Ledger.mark` takes it."""
    return part.chunk, part.rows - part.failed, part.failed, part.codes
