"""README's five commands from a manifest to Parquet, as they stand there, with the output that it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet

from orchestrator.verify import verify

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## From a manifest to Parquet in five commands")[1].split("\n## ")[0]
CONSOLE = SECTION.split("```console\n")[1].split("```")[0]
#: What is typed, and what comes then.
COMMANDS = [(text.partition("\n")[0], text.partition("\n")[2]) for text in CONSOLE.split("$ ")[1:]]
EXIT_CODES = (0, 3, 0, 0, 0)  # the first run ends with a failed row


def shell(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def told(text: str) -> list[list[str]]:
    """The words of each line, without the frames of tables; speeds differ, and so does what was left out."""
    lines = [re.findall(r"[^\s│┌┐└┘├┤─┬┴┼]+", line) for line in text.splitlines()]
    return [words for words in lines if words and words[0] not in {"rows/s", "…"}]


def test_from_a_manifest_to_parquet(tmp_path: Path) -> None:
    drawings = tmp_path / "drawings"
    drawing = [sys.executable, "-m", "blip_engine.shapes.drawings", str(drawings), "--count", "200"]
    subprocess.run(drawing, check=True)
    (making,) = re.findall(r"`cd demo/drawings-500 && ([^`]+)`", SECTION)
    assert shell(making, drawings).returncode == 0
    away, image = drawings / "away.png", drawings / "images/000007.png"
    image.rename(away)
    assert len(COMMANDS) == len(EXIT_CODES) == 5
    for (line, output), code in zip(COMMANDS, EXIT_CODES, strict=True):
        if "--retry" in line:
            away.rename(image)
        done = shell(line, drawings)
        assert done.returncode == code, (line, done.stderr)
        real = told((done.stdout + done.stderr).replace(f"{drawings}/", ""))
        missing = [words for words in told(output) if words not in real]
        assert not missing, (line, done.stdout, done.stderr)
    assert verify(str(drawings / "captions")).ok
    table = pyarrow.parquet.read_table(drawings / "captions.parquet").to_pylist()
    assert [row["row"] for row in table] == list(range(200))
    (caption,) = re.findall(r'"caption":\s"([^"]+)"', SECTION)
    assert table[7]["result"]["caption"] == " ".join(caption.split())
    page = (drawings / "captions.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == 24
