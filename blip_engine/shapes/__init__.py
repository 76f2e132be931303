"""The demo checkpoints: three small BLIP models trained by this project on drawings of shapes, and how they were made.

`drawings` draws and describes, `train` trains; `checkpoints/` holds the result in the layout of Hugging Face.
"""

from pathlib import Path


def demo_checkpoint(task: str) -> Path:
    """The directory of the bundled checkpoint for `task` (caption, vqa or itm)."""
    return Path(__file__).parent / "checkpoints" / task
