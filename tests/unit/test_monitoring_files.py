"""Dashboards, rules and runbook agree with each other, the code, and the formats of Grafana and Prometheus."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from monitoring import promtool

from orchestrator import metrics as of_orchestrator
from workers import metrics as of_worker

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "blip-batch"
RULES = CHART / "rules" / "blip-batch.yaml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule]
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
FAMILIES = [*of_orchestrator.FAMILIES, *of_worker.FAMILIES]
PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")

sys.path.insert(0, str(ROOT / "docs"))
import generate_dashboards  # noqa: E402


def lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """What of `given` is not in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            problem
            for key, value in given.items()
            for problem in (lost(value, kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"])
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            problem for n, pair in enumerate(zip(given, kept, strict=True)) for problem in lost(*pair, f"{path}[{n}]")
        ]
    return [] if given == kept else [f"{path}: {given!r} became {kept!r}"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_what_the_generator_writes(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generate_dashboards.dashboard(path.stem), "run `make docs`"


def test_no_dashboard_is_missing() -> None:
    assert {path.stem for path in DASHBOARDS} == set(generate_dashboards.DASHBOARDS)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafanas_own_schema_knows_every_field(path: Path) -> None:
    """Its types drop what they do not know: nothing may be lost on the way through them."""
    given = json.loads(path.read_text(encoding="utf-8"))
    kept = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(given)))
    assert lost(given, kept) == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_lie_side_by_side_and_explain_themselves(path: Path) -> None:
    panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["title"]
        assert panel["description"].endswith(".")
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)


def test_uids_differ() -> None:
    uids = [json.loads(path.read_text(encoding="utf-8"))["uid"] for path in DASHBOARDS]
    assert len(set(uids)) == len(uids)


def queries() -> list[tuple[str, str]]:
    panels = [
        (f"{path.stem}: {panel['title']}", target["expr"])
        for path in DASHBOARDS
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
        for target in panel["targets"]
    ]
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return panels + [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules]


def test_queries_name_only_metrics_that_exist() -> None:
    suffixes = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    known = {family.name + suffix for family in FAMILIES for suffix in suffixes[family.kind]}
    for name, query in queries():
        assert set(re.findall(r"\bblip_\w+", query)) <= known, name


def test_every_metric_is_in_a_dashboard_or_an_alert() -> None:
    asked = " ".join(query for _, query in queries())
    assert [family.name for family in FAMILIES if family.name not in asked] == []


def test_the_readme_lists_every_metric_with_its_labels() -> None:
    listed = dict(re.findall(r"^\| `(blip_\w+)(?:\{([\w,]*)\})?` \| \w+ \|", PAGE, re.MULTILINE))
    assert listed == {family.name: ",".join(family.labels) for family in FAMILIES}


def test_help_texts_are_sentences_and_kinds_follow_the_names() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"[A-Z1].*\.", family.help, re.DOTALL), family.name
        assert (family.kind == "counter") == family.name.endswith("_total"), family.name
        assert (family.kind == "histogram") == bool(family.buckets), family.name
        assert list(family.buckets) == sorted(set(family.buckets)), family.name
        assert not {"job", "row", "image", "id", "instance", "le"} & set(family.labels), family.name


def test_rules_are_right_and_fire_as_they_should(tmp_path: Path) -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert checked.returncode == 0, checked.stderr.decode()
    tests = (ROOT / "tests" / "fixtures" / "rules_test.yaml").read_text().replace("[RULES]", f"[{RULES}]")
    (tmp_path / "rules_test.yaml").write_text(tests)
    ran = promtool("test", "rules", str(tmp_path / "rules_test.yaml"))
    assert ran.returncode == 0, (ran.stdout + ran.stderr).decode()
    assert {rule["alert"] for rule in ALERTS} == set(re.findall(r"alertname: (\w+)", tests))


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_its_section_in_the_runbook(rule: dict[str, Any]) -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    name = rule["alert"]
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    section = runbook.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert "**Means**" in section
    assert "**Do**" in section
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}


def test_links_within_the_runbook_lead_somewhere() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    sections = {title.lower() for title in re.findall(r"^## (\w+)$", runbook, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", runbook)) <= sections
