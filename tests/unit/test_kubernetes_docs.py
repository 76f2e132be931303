"""docs/kubernetes.md tells of every value, with its default."""

import json
import re
from typing import Any

import yaml
from chart import CHART, ROOT

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


def test_the_formula_is_the_readmes() -> None:
    formula = re.search(r"    by_time = .*\n    by_work = .*\n    desired_workers = .*\n", TEXT)
    assert formula
    assert formula[0] in (ROOT / "docs/http-api.md").read_text(encoding="utf-8")
