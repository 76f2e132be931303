"""The demo checkpoints: three small BLIP models trained by this project on drawings of shapes, and how they were made.

`scenes` draws, `texts` asks and describes, `drawings` writes manifests, `train` trains; `checkpoints/` holds the
result in the hub's layout.
"""

from pathlib import Path

from ..errors import CheckpointError
from ..requests import TASKS, Task


def demo_checkpoint(task: Task) -> Path:
    """The directory of the shipped checkpoint of a task. CheckpointError if there is none."""
    if task not in TASKS:
        raise CheckpointError(f"no demo checkpoint for task {task!r}; there is one for each of: {', '.join(TASKS)}")
    folder = Path(__file__).with_name("checkpoints") / task
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the demo checkpoint {folder} is missing; install the package again")
    return folder
