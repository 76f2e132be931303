"""The chart through Helm's own engine: its Go SDK in a wheel, no cluster, no `helm` program."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "blip-batch"
VALUE_SETS = {path.stem.removesuffix("-values"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}

Document = dict[str, Any]


@functools.cache
def helm() -> Any:
    """Helm's SDK; a test without it fails."""
    try:
        import helm_python  # noqa: PLC0415 - one clear line when it is absent
    except ImportError as error:
        pytest.fail(f"{error}: Helm's engine is in the wheel helm-python-sdk: pip install -c constraints.txt '.[test]'")
    return helm_python


def values(name: str | None = None, *sets: str) -> Document:
    """The values of a set of `ci/` (None: the chart's own), with `--set` expressions on top."""
    found = helm().values_from_yaml(VALUE_SETS[name].read_text(encoding="utf-8")) if name else {}
    for expression in sets:
        _merge(found, helm().parse_set_string(expression))
    return dict(found)


def _merge(into: Document, more: Document) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def texts(name: str | None = None, *sets: str) -> dict[str, str]:
    """Every file that Helm renders, by its path. Raises HelmError."""
    with helm().Chart.load(CHART) as chart:
        return dict(chart.render(values(name, *sets), name="rel", namespace="ns"))


def render(name: str | None = None, *sets: str) -> list[Document]:
    """The documents that Helm would apply. Raises HelmError."""
    return list(_documents(texts(name, *sets)))


def _documents(files: dict[str, str]) -> Iterator[Document]:
    for path, text in files.items():
        if not path.endswith("NOTES.txt"):
            yield from filter(None, yaml.load_all(text, Loader=_Strict))


class _Strict(yaml.SafeLoader):
    """A key that is given twice is a mistake, as it is for Kubernetes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def named(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    return found


def pod_spec(document: Document) -> Document | None:
    """The pod that a document makes, if it makes any."""
    if document["kind"] == "Pod":
        return dict(document["spec"])
    template = document["spec"].get("template") if "spec" in document else None
    return dict(template["spec"]) if template else None


def pods(documents: list[Document]) -> list[tuple[str, Document]]:
    """Names and pods of all that make pods."""
    found = [(document["metadata"]["name"], pod_spec(document)) for document in documents]
    return [(name, spec) for name, spec in found if spec is not None]


def environment(container: Document) -> dict[str, Any]:
    """Values of plain variables; of the others, the dict that says where they are from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container.get("env", [])}
