"""Write docs/api.md: every public name of blip_engine with its signature and docstring. (`make docs`).

Signatures and fields are shown as they stand in the source, because the comments there tell shapes and units.
"""

import ast
import importlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the sources beside this file, whatever is installed
import blip_engine  # noqa: E402

API_FILE = ROOT / "docs" / "api.md"
INTRODUCTION = """# The library, name by name

Made by `make docs` from the docstrings of `blip_engine`; edit those. Shapes are in parentheses: B is the number of
rows, T of tokens, H and W are pixels. Exceptions are of `blip_engine.errors` or Python's own."""
#: The order of the page. A module with public names that is missing here comes behind these.
ORDER = ("engine", "requests", "pipelines", "models", "contrastive", "text", "vision", "config", "processor")
#: Modules that are shown whole, and names that public ones return or inherit from.
WHOLE = ("requests", "outputs", "errors")
BESIDES = {
    "cache": ("DecoderCache",),
    "config": ("PreTrainedConfig",),
    "features": ("BatchFeature",),
    "pipelines": ("VisualQuestionAnsweringPipeline", "ImageToTextPipeline", "ImageTextMatchingPipeline"),
    "pretrained": ("PreTrainedModel",),
    "ranking": ("Ranking", "rank"),
    "training": ("ImageTextObjective", "ImageTextLosses"),
}


@cache
def source(module: str) -> tuple[list[str], dict[str, ast.stmt]]:
    """The lines of a module and its definitions and annotated constants by name."""
    text = inspect.getsource(importlib.import_module(f"blip_engine.{module}"))
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AnnAssign):
            found[ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else node.name] = node
    return text.splitlines(), found


def shown() -> dict[str, list[str]]:
    """The names on the page by module, in order."""
    homes = {module: list(names) for module, names in blip_engine._HOMES.items()}
    for module in WHOLE:
        homes[module] = [name for name in source(module)[1] if not name.startswith("_")]
    for module, names in BESIDES.items():
        homes.setdefault(module, []).extend(names)
    return {module: homes[module] for module in sorted(homes, key=lambda m: (m not in ORDER, [*ORDER, m].index(m)))}


def block(lines: list[str]) -> str:
    """Lines as a block of Python, without remarks to linters."""
    kept = [re.sub(r"  # (noqa|type: ignore).*", "", line) for line in lines if line.strip()]
    return f"```python\n{inspect.cleandoc(chr(10).join(kept)).removesuffix(':')}\n```"


def first_line(node: ast.ClassDef | ast.FunctionDef) -> int:
    """Where a definition begins, its decorators included."""
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def signature(lines: list[str], node: ast.FunctionDef) -> list[str]:
    """A function's header and docstring."""
    return [block(lines[first_line(node) - 1 : node.body[0].lineno - 1]), ast.get_docstring(node) or ""]


def class_entry(lines: list[str], node: ast.ClassDef) -> list[str]:
    """A class's docstring, its fields if it is a dataclass, and its public methods."""
    paragraphs, header = [ast.get_docstring(node) or ""], lines[first_line(node) - 1 : node.body[0].lineno - 1]
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    if header[0].startswith("@dataclass"):
        fields_end = min([node.end_lineno or 0, *(first_line(each) - 1 for each in functions)])
        paragraphs.append(block(header + lines[node.body[0].end_lineno : fields_end]))
    for each in functions:
        if not each.name.startswith("_") or each.name in ("__init__", "__call__"):
            paragraphs += signature(lines, each)
    return paragraphs


def entry(module: str, name: str) -> list[str]:
    """The paragraphs of one name; annotated constants are shown under the module instead."""
    value: Any = getattr(importlib.import_module(f"blip_engine.{module}"), name)
    lines, found = source(module)
    node = found.get(name)
    if node is None:
        return [f"### {name}", f"Another name of [`{value.__name__}`](#{value.__name__.lower()})."]
    if not isinstance(node, ast.ClassDef):
        return [f"### {name}", *signature(lines, node)] if isinstance(node, ast.FunctionDef) else []
    known = {each for names in shown().values() for each in names}
    bases = [f"[`{base}`](#{base.lower()})" for base in (each.__name__ for each in value.__mro__[1:]) if base in known]
    inherited = [f"Inherits from {', '.join(bases)}."] if bases else []
    return [f"### {name}", *class_entry(lines, node), *inherited]


def page() -> str:
    """The whole file."""
    paragraphs = [INTRODUCTION]
    for module, names in shown().items():
        lines, found = source(module)
        told = inspect.getdoc(importlib.import_module(f"blip_engine.{module}")) or ""
        in_columns = r"(?m)^(?=\S+ {3}|[│├└])"  # the tree of errors
        paragraphs += [f"## blip_engine.{module}", re.sub(in_columns, "    ", told)]
        constants = [found[name] for name in names if isinstance(found.get(name), ast.AnnAssign)]
        if constants:
            paragraphs.append(block([line for node in constants for line in lines[node.lineno - 1 : node.end_lineno]]))
        for name in names:
            paragraphs += entry(module, name)
    return "\n\n".join(filter(None, paragraphs)) + "\n"


if __name__ == "__main__":
    API_FILE.write_text(page(), encoding="utf-8")
