"""docs/api.md is what the docstrings say, and the docstrings say what a reader needs."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import blip_engine

DOCS = Path(__file__).parents[2] / "docs"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


API = _generator()
PAGE = (DOCS / "api.md").read_text(encoding="utf-8")


def _definitions() -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Everything the page shows that is defined with `class` or `def`, by its dotted name."""
    found: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    for module, names in API.shown().items():
        for name in names:
            node = API.source(module)[1].get(name)
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[f"{module}.{name}"] = node
            for part in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(part, ast.FunctionDef) and (part.name == "__call__" or not part.name.startswith("_")):
                    found.setdefault(f"{module}.{name}.{part.name}", part)  # a setter comes behind its property
    return found


DEFINITIONS = _definitions()
FUNCTIONS = {name: node for name, node in DEFINITIONS.items() if isinstance(node, ast.FunctionDef)}
TENSORS = re.compile(r"(?<!\[str, )\b(Tensor|ndarray)\b")  # not a checkpoint's, by name
# (B, T), (images, texts) or (N, projection): a parenthesis with a comma, not `(as here)`
SHAPE = re.compile(r"\(\w[\w +*-]*,[^)]*\)")


def _takes_or_gives_tensors(node: ast.FunctionDef) -> bool:
    annotations = [each.annotation for each in [*node.args.args, *node.args.kwonlyargs]] + [node.returns]
    return any(TENSORS.search(ast.unparse(each)) for each in annotations if each is not None)


def test_the_page_is_up_to_date() -> None:
    assert API.page() == PAGE, "docs/api.md is behind the docstrings; run `make docs` and commit it"


@pytest.mark.parametrize("name", blip_engine.__all__)
def test_every_public_name_has_its_section(name: str) -> None:
    assert PAGE.count(f"\n### {name}\n") == 1


@pytest.mark.parametrize("name", DEFINITIONS)
def test_everything_shown_has_a_docstring(name: str) -> None:
    text = ast.get_docstring(DEFINITIONS[name])
    assert text
    assert text[0] != " "
    assert text.splitlines()[0].endswith((".", "`."))


def test_every_link_leads_somewhere() -> None:
    headings = {line.lstrip("# ").lower() for line in PAGE.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings


@pytest.mark.parametrize("name", [name for name, node in FUNCTIONS.items() if _takes_or_gives_tensors(node)])
def test_shapes_are_told(name: str) -> None:
    assert SHAPE.search(ast.get_docstring(FUNCTIONS[name]) or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_error_raised_in_a_function_is_told(name: str) -> None:
    raised = {
        ast.unparse(node.exc.func)
        for node in ast.walk(FUNCTIONS[name])
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    text = ast.get_docstring(FUNCTIONS[name]) or ""
    assert not {error for error in raised if error not in text}


@pytest.mark.parametrize(
    "module", ["models", "contrastive", "text", "vision", "config", "image_processor", "tokenizer", "ranking"]
)
def test_a_module_of_the_model_names_its_source(module: str) -> None:
    section = PAGE.split(f"\n## blip_engine.{module}\n")[1].split("\n### ")[0]
    assert "https://" in section
