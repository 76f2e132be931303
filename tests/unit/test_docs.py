"""README and docs/ tell of everything there is: commands, flags, settings, options, error codes."""

import re
from pathlib import Path
from typing import get_args

import pytest
import typer.main

from blip_engine.requests import JOB_TASKS, option_names
from orchestrator.cli import app
from orchestrator.contract import ErrorCode
from orchestrator.settings import Settings

ROOT = Path(__file__).parents[2]
README, COMMANDS_PAGE, TASKS_PAGE, RESULTS_PAGE, SETTINGS_PAGE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/commands.md", "docs/tasks.md", "docs/results.md", "docs/settings.md")
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_its_section(name: str) -> None:
    assert re.search(rf"^## .*`blip-batch {name}\b", COMMANDS_PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_in_the_readme(name: str) -> None:
    assert re.search(rf"^\| `blip-batch .*\b{name}\b", README, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_flag_is_explained(name: str) -> None:
    flags = [flag for parameter in COMMANDS[name].params for flag in parameter.opts if flag.startswith("--")]
    missing = [flag for flag in flags if not re.search(rf"`{re.escape(flag)}\b", COMMANDS_PAGE) and flag != "--help"]
    assert not missing


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_explained(name: str) -> None:
    assert re.search(rf"^\| `BLIP_{name.upper()}` \| .+ \| .+ \|$", SETTINGS_PAGE, re.MULTILINE)


def test_no_setting_is_explained_that_does_not_exist() -> None:
    told = set(re.findall(r"^\| `BLIP_(\w+)` ", SETTINGS_PAGE, re.MULTILINE))
    assert told == {name.upper() for name in Settings.model_fields} | {"REDIS_BINARY"}


@pytest.mark.parametrize("task", JOB_TASKS)
def test_every_task_and_option_is_explained(task: str) -> None:
    assert f"| `{task}` |" in TASKS_PAGE
    for option in option_names(task):
        assert f"`{option}`" in TASKS_PAGE


def test_every_error_code_is_listed() -> None:
    listed = RESULTS_PAGE.split("Error codes:")[1].split(".")[0]
    assert set(re.findall(r"[a-z_]+", listed)) == set(get_args(ErrorCode))


def test_nothing_waits_to_be_filled_in() -> None:
    assert not [page.name for page in PAGES if "@@" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if heading:
            assert heading in {_anchor(title) for title in re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)}


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
