"""Write held-out drawings with everything there is to ask of them, ready for `blip-batch run`.

    python -m blip_engine.shapes.drawings OUT --count 500 --seed 1

gives `OUT/images/*.png` and the manifests `caption.jsonl`, `vqa.jsonl` and `itm.jsonl`, whose rows carry what a right
model says as `expected`. Needs Pillow only.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from .scenes import Drawing, held_out_drawings
from .texts import mismatch, questions


def write(out: Path, count: int, seed: int) -> None:
    """Write the images and the three manifests below `out`. Equal arguments give equal bytes."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"caption": [], "vqa": [], "itm": []}
    for index, held_out in enumerate(held_out_drawings(count, seed)):
        name = f"images/{index:06d}.png"
        held_out.image().save(out / name)
        for task, fields in _rows(held_out, index).items():
            lines[task].append(json.dumps({"image": name, "id": f"{index:06d}", **fields}))
    for task, rows in lines.items():
        (out / f"{task}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _rows(held_out: Drawing, index: int) -> dict[str, dict[str, str | bool]]:
    """One row of each task; the kinds of questions and the truth of texts take turns."""
    rng = Random(held_out.seed)
    scene = held_out.scene
    asked = questions(scene, rng)
    question = asked[index % len(asked)]
    matches = index % 2 == 0
    text = (scene if matches else mismatch(scene, rng)).caption
    return {
        "caption": {"expected": scene.caption},
        "vqa": {"question": question.text, "expected": question.answer, "kind": question.kind},
        "itm": {"text": text, "expected": matches},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m blip_engine.shapes.drawings", description="Draw held-out scenes.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=500, help="how many drawings (default 500, at most a million)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default 0)")
    given = parser.parse_args(arguments)
    if not 1 <= given.count <= 10**6 or given.seed < 0:
        parser.error("--count must be 1 to 1000000 and --seed 0 or more")
    try:
        write(given.out, given.count, given.seed)
    except OSError as error:
        sys.stderr.write(f"cannot write to {given.out}: {error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
