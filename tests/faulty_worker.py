"""`python -m faulty_worker`: a worker with a bug, of which nobody knows yet.

Reading the rows of chunk 1 raises what nobody expects, the first FAULTS times.
"""

import os
import sys
from typing import Any

from orchestrator.contract import Hint
from workers.__main__ import main
from workers.openjob import OpenJob


def break_it(left: int) -> None:
    rows = OpenJob.rows

    def raising(job: OpenJob, hint: Hint) -> Any:
        nonlocal left
        if hint.chunk == 1 and left:
            left -= 1
            raise ArithmeticError("of two\nlines")
        return rows(job, hint)

    OpenJob.rows = raising  # type: ignore[method-assign]


if __name__ == "__main__":
    break_it(int(os.environ["FAULTS"]))
    sys.exit(main())
