"""docs/kubernetes.md tells of every value, with its default."""

import json
import re
import shutil
import subprocess
from typing import Any

import yaml
from chart import CHART, ROOT, pod_spec, render

TEXT = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
TOLD = dict(re.findall(r"^\| `([a-zA-Z0-9_.]+)` \| `(.*?)` \|", TEXT, re.MULTILINE))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def default(path: str) -> Any:
    found = DEFAULTS
    for key in path.split("."):
        found = found[key]
    return found


def leaves(tree: dict[str, Any], above: str = "") -> set[str]:
    """Paths of values, as deep as the tables have them: a map that is told of whole is one value."""
    found = set()
    for key, value in tree.items():
        path = f"{above}{key}"
        if path not in TOLD and isinstance(value, dict) and value:
            found |= leaves(value, f"{path}.")
        else:
            found.add(path)
    return found


def test_every_value_is_told_and_no_other() -> None:
    assert leaves(DEFAULTS) == TOLD.keys()


def test_defaults_are_the_charts() -> None:
    told = {path: _read(text) for path, text in TOLD.items()}
    assert told == {path: default(path) for path in TOLD}


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


LOGS = re.search(
    r"\$ kubectl logs -l 'app.kubernetes.io/name=([\w-]+),app.kubernetes.io/component in \((.*)\)' .*\|\n"
    r"    jq (-\w+) '(.*)'\n",
    (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8"),
)


def test_the_runbooks_first_command_asks_our_programs_and_not_redis() -> None:
    assert LOGS
    name, components = LOGS[1], LOGS[2].split(",")
    asked = set()
    for document in filter(pod_spec, render()):
        labels = (document["spec"].get("template") or document)["metadata"]["labels"]
        if labels["app.kubernetes.io/name"] == name and labels["app.kubernetes.io/component"] in components:
            asked.add(document["metadata"]["name"])
    assert asked == {"rel-blip-batch-orchestrator", "rel-blip-batch-worker-default"}


def test_the_runbooks_first_command_passes_over_lines_that_are_no_json() -> None:
    assert LOGS
    assert "R" in LOGS[3]  # lines as they are; without it the first that is no JSON ends the program
    assert LOGS[4].startswith("fromjson? | objects | ")
    if (jq := shutil.which("jq")) is None:  # a client's program, not one of ours: what it does with the rest is known
        return
    lines = ["worker: Warm shutdown (MainProcess)", '{"level":"info"}', "7", "", '{"level":"error","job":"a"}']
    found = subprocess.run([jq, LOGS[3], LOGS[4]], input="\n".join(lines), capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [lines[-1]]


def test_the_formula_is_the_readmes() -> None:
    formula = re.search(r"    by_time = .*\n    by_work = .*\n    desired_workers = .*\n", TEXT)
    assert formula
    assert formula[0] in (ROOT / "docs/http-api.md").read_text(encoding="utf-8")
