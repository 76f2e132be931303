"""The HTML page of an output: whole, self-contained, and safe whatever captions and manifests say."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from servers import S3Server
from system import write_images, write_rows
from test_cli import blip_batch, one_line_error

from orchestrator.contract import Hint, Row, error_row, result_row
from orchestrator.jobs import claim_output, make_spec
from orchestrator.page import write_page
from orchestrator.parts import put_part
from orchestrator.plan import Plan, make_plan
from orchestrator.settings import load_settings
from orchestrator.storage import open_store

EVIL = '<script>alert("x")</script> & "more" \ud800'


class Page(HTMLParser):
    """Tags and what they say; every source must be inside of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert name not in {"href", "onload"}
            assert name != "src" or (value or "").startswith("data:image/jpeg;base64,/9j/")

    def handle_data(self, data: str) -> None:
        self.text += data


def output(folder: Path, where: str, task: str = "caption", rows: int = 30, images: int = 25) -> Plan:
    """An output of one part whose every tenth row failed; images of the last rows are gone."""
    write_images(folder, images)
    manifest = write_rows(folder / "rows.jsonl", [{"image": f"{n}.png", "text": EVIL} for n in range(rows)])
    spec = make_spec(str(manifest), task, where, model="demo")
    store = open_store(spec.output)
    claim_output(spec, store)
    plan = make_plan(spec, store, load_settings())
    for chunk in plan.all_chunks():
        records = [record(row, task) for row in plan.read_rows(chunk, "caption") if isinstance(row, Row)]
        put_part(store, Hint.of(spec.id, plan.hash, chunk), records, "w")
    return plan


def record(row: Row, task: Any) -> dict[str, Any]:
    if row.number % 10 == 9:
        return error_row(row, task, "image_truncated", "it ends early")
    if task == "embed":
        return result_row(row, task, {"embedding": [0.6, 0.8]})
    return result_row(row, task, {"caption": EVIL, "score": -row.number / 7, "tokens": 3})


def test_a_page_of_captions(tmp_path: Path) -> None:
    output(tmp_path / "in", str(tmp_path / "out"))
    file = tmp_path / "page.html"
    done = blip_batch("report", tmp_path / "out", file, "--sample", "100")
    assert done.returncode == 0, done.stderr
    assert "23 of 27 thumbnails" in done.stdout
    page = Page(file.read_text())
    assert page.tags.count("figure") == 27
    assert page.tags.count("img") == 23  # of 27 rows with results, the images of 4 are gone
    assert "script" not in page.tags
    assert '<script>alert("x")</script> & "more" ?' in page.text
    assert re.search(r"image_truncated\s*3", page.text)
    assert "caption of 30 rows" in page.text
    assert page.tags.count("rect") > 10
    again = tmp_path / "again.html"
    write_page(str(tmp_path / "out"), str(again), 100)
    assert again.read_bytes() == file.read_bytes()


def test_a_sample_on_s3_without_scores(s3_server: S3Server, tmp_path: Path) -> None:
    output(tmp_path / "in", "s3://blip/out", "embed")
    assert write_page("s3://blip/out", "s3://blip/pages/embed.html", 5)[0] <= 5
    page = Page(open_store("s3://blip/pages").get("embed.html").decode())
    assert page.tags.count("figure") == 5
    assert "embedding: 2 numbers" in page.text
    assert "svg" not in page.tags


def test_without_pillow_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output(tmp_path / "in", str(tmp_path / "out"), rows=1, images=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # as where Pillow is not installed
    assert write_page(str(tmp_path / "out"), str(tmp_path / "page.html"))[0] == 0
    assert "1 of 1 results" in Page((tmp_path / "page.html").read_text()).text


def test_thumbnails_of_what_is_no_image(tmp_path: Path) -> None:
    write_images(tmp_path, 1, (400, 100))
    (tmp_path / "none").write_bytes(b"")
    subprocess.run([sys.executable, "-m", "blip_engine.thumbnails", str(tmp_path), "50"], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "0.png.jpg", "none"]


def test_mistakes(tmp_path: Path) -> None:
    output(tmp_path / "in", str(tmp_path / "out"))
    one_line_error(blip_batch("report", tmp_path, tmp_path / "x.html"), "holds no job")
    one_line_error(blip_batch("report", tmp_path / "out", tmp_path / "out/job.json"), "part of the output itself")
    next((tmp_path / "out/results").iterdir()).unlink()
    one_line_error(
        blip_batch("report", tmp_path / "out", tmp_path / "x.html"), "is missing: rows 0 to 15; let the job finish"
    )
    assert not (tmp_path / "x.html").exists()
