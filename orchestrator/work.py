"""What there is to do for a job, as object storage tells it."""

from dataclasses import dataclass
from itertools import islice
from typing import Final

from .contract import Hint, JobSpec, JobState
from .errors import JobError
from .ledger import Ledger
from .parts import PartInfo
from .plan import Plan, load_plan
from .rounds import Round, load_rounds, parts_of, present_chunks
from .settings import Settings
from .stopping import go_on
from .storage import open_store

_BATCH: Final = 500  # chunks named in one call of a script
_FEW: Final = 1000  # parts that are soon asked


@dataclass
class Work:
    """In the first round all of a job's plan, later what the last round is about."""

    plan: Plan
    rounds: list[Round]
    counted: bool = False  # whether the ledger knows of each part how many rows failed

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
        """Tells the ledger what there is to do, and what of it storage holds already: so many parts.

        They are listed, a thousand at once; where they are many, `count` asks them one by one while workers go on.
        """
        plan, number, restored = self.plan, self.number, 0
        ledger.reset(job, epoch, plan.hash, plan.chunks, plan.rows, number)
        if self.rounds:
            to_do = iter(zip(self.rounds[-1].chunks, self.rounds[-1].rows, strict=True))
            while batch := list(islice(to_do, _BATCH)):
                go_on()
                ledger.open(job, epoch, plan.hash, number, batch)
        present = iter(sorted(present_chunks(plan, number)))
        while found := [(chunk, self._rows_of(chunk)) for chunk in islice(present, _BATCH)]:
            go_on()
            ledger.restore(job, epoch, plan.hash, found, number)
            restored += len(found)
        if restored <= _FEW:
            self.count(ledger, job, epoch)
        return restored

    def _rows_of(self, chunk: int) -> int:
        return self.rounds[-1].rows_of(chunk) if self.rounds else self.plan.chunk(chunk).rows

    def count(self, ledger: Ledger, job: str, epoch: str) -> None:
        """Counts the failed rows of the parts that `restore` found; of a huge job that takes minutes.

        It may be killed, and goes on from there. A part that has vanished is the finalizer's to notice.
        """
        while chunks := ledger.uncounted(job, _BATCH):
            go_on()
            parts = parts_of(self.plan, chunks, self.number)
            failed = [(chunk, part.failed, part.codes) if part else (chunk, 0, "") for chunk, part in parts]
            ledger.count(job, epoch, self.plan.hash, failed, self.number)
        self.counted = True


def counts(part: PartInfo) -> tuple[int, int, int, str]:
    """A part as `Ledger.mark` takes it."""
    return part.chunk, part.rows - part.failed, part.failed, part.codes
