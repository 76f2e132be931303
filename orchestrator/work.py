"""What there is to do for a job, as object storage tells it."""

from dataclasses import dataclass

from .contract import Hint, JobSpec, JobState
from .errors import JobError
from .plan import Plan, load_plan
from .rounds import Round, load_rounds
from .settings import Settings
from .storage import open_store


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
