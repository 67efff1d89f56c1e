"""A method's settings read from its source: no import, so no torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.registry import Entry

_SIGNS = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One setting of a method.

    Attributes:
        name: Name in call strings.
        type: Type as written, constraints left out.
        default: Default as written; None if it must be given.
        allowed: Range or choices in words, or "".
        choices: The literals, if only some are allowed.
        bounds: Comparison sign to number.
        text: What the docstring says.
    """

    name: str
    type: str
    default: str | None
    allowed: str
    choices: tuple[Any, ...]
    bounds: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Described:
    """A settings class as its source describes it.

    Attributes:
        summary: Docstring without its sections.
        settings: In the order that the class takes them, inherited ones last.
        is_open: True if it takes further settings and hands them on.
    """

    summary: str
    settings: tuple[Setting, ...]
    is_open: bool = False


def described(entry: Entry) -> Described:
    """Docstring and settings of an entry's class, inherited settings included."""
    own = _classes(entry.path)[entry.qualname]
    found: dict[str, Setting] = {}
    for node, path in _lineage(own, entry.path):
        texts = attribute_texts(ast.get_docstring(node) or "")
        fresh = {s.name: s for s in _fields(node, path, texts)}
        found = {**found, **{k: v for k, v in fresh.items() if k not in found}}
    text = ast.get_docstring(own) or ""
    is_open = any(
        isinstance(n, ast.FunctionDef) and n.name == "__init__" and n.args.kwarg for n in own.body
    )
    return Described(summary_of(text), tuple(found.values()), is_open)


def summary_of(docstring: str) -> str:
    """A docstring up to its first section."""
    return re.split(r"\n\s*(?:Attributes|Args|Returns|Raises):\s*\n", docstring)[0].strip()


def attribute_texts(docstring: str) -> dict[str, str]:
    """Entries of a docstring's Attributes section."""
    match = re.search(
        r"^Attributes:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE
    )  # entries are indented, the next section is not
    texts: dict[str, str] = {}
    name = ""
    for line in (match[1] if match else "").splitlines():
        start = re.match(r"^    (\w+)(?: \([^)]*\))?: (.*)", line)
        if start:
            name = start[1]
            texts[name] = start[2].strip()
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {n.name: n for n in _tree(path).body if isinstance(n, ast.ClassDef)}


def _lineage(node: ast.ClassDef, path: Path) -> list[tuple[ast.ClassDef, Path]]:
    """The class and those it inherits settings from, nearest first."""
    line = [(node, path)]
    for base in node.bases:
        if not isinstance(base, ast.Name):
            continue
        home = path if base.id in _classes(path) else _home(base.id, path)
        if home is not None and base.id in _classes(home):
            line += _lineage(_classes(home)[base.id], home)
    return line


def _home(name: str, path: Path) -> Path | None:
    """The file that defines an imported name, followed by path and not by importing."""
    for node in _tree(path).body:
        if not isinstance(node, ast.ImportFrom) or name not in {a.name for a in node.names}:
            continue
        parts = (node.module or "").split(".")
        if node.level:
            place = path.parents[node.level - 1].joinpath(*filter(None, parts))
        else:
            top = importlib.util.find_spec(parts[0])
            if top is None or top.origin is None or not Path(top.origin).is_file():
                return None
            place = Path(top.origin).parent.joinpath(*parts[1:])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                defined = name in _classes(file) or name in _assigned(file)
                return file if defined else _home(name, file)
    return None


@functools.cache
def _assigned(path: Path) -> dict[str, ast.expr]:
    """Module-level names and what they stand for."""
    return {
        node.targets[0].id: node.value
        for node in _tree(path).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def _value_of(name: str, path: Path) -> tuple[ast.expr, Path] | None:
    """What a name stands for, here or in the module that it comes from."""
    if name in _assigned(path):
        return _assigned(path)[name], path
    home = _home(name, path)
    return None if home is None or name not in _assigned(home) else (_assigned(home)[name], home)


def _fields(node: ast.ClassDef, path: Path, texts: dict[str, str]) -> list[Setting]:
    fields = []
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        name, note = line.target.id, _resolved(line.annotation, path)
        if name.startswith("_") or ast.unparse(note).startswith("ClassVar") or _hidden(line.value):
            continue
        kind, bounds, choices = _taken_apart(note)
        allowed = [f"{sign} {value}" for sign, value in bounds.items()]
        if choices:
            allowed.append(" | ".join(map(repr, choices)))
        fields.append(
            Setting(
                name,
                kind,
                _default(line.value, path),
                ", ".join(allowed),
                choices,
                bounds,
                texts.get(name, ""),
            )
        )
    return fields


def _hidden(value: ast.expr | None) -> bool:
    """True for `field(init=False)`: state, not a setting."""
    return isinstance(value, ast.Call) and any(
        k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False
        for k in value.keywords
    )


def _default(value: ast.expr | None, path: Path) -> str | None:
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return _default(keyword.value, path)
            if keyword.arg == "default_factory":
                return f"{ast.unparse(keyword.value)}()"
        return None
    if isinstance(value, ast.Name) and (found := _value_of(value.id, path)) is not None:
        return ast.unparse(found[0])
    return None if value is None else ast.unparse(value)


def _resolved(note: ast.expr, path: Path) -> ast.expr:
    """An annotation with type aliases put in."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            found = _value_of(node.id, path)
            if found is None or not isinstance(found[0], (ast.Subscript, ast.BinOp)):
                return node
            return _resolved(found[0], found[1])

    return Fill().visit(ast.parse(ast.unparse(note), mode="eval").body)


def _taken_apart(note: ast.expr) -> tuple[str, dict[str, Any], tuple[Any, ...]]:
    """Type in words, bounds and literal choices of an annotation.

    Bounds and choices are given where they hold for the whole setting (None aside); inside a
    union they stand in the type itself.
    """
    core = [part for part in _union(note) if not _is_none(part)]
    optional = " | None" if len(core) < len(_union(note)) else ""
    if len(core) == 1 and isinstance(core[0], ast.Subscript):
        name, parts = getattr(core[0].value, "id", ""), _parts(core[0])
        if name == "Annotated":
            return _words(parts[0]) + optional, _bounds(parts[1:]), ()
        if name == "Literal":
            choices = tuple(ast.literal_eval(part) for part in parts)
            kinds = " | ".join(sorted({type(choice).__name__ for choice in choices}))
            return kinds + optional, {}, choices
    return " | ".join(map(_words, core)) + optional, {}, ()


def _union(note: ast.expr) -> list[ast.expr]:
    if isinstance(note, ast.BinOp) and isinstance(note.op, ast.BitOr):
        return [*_union(note.left), *_union(note.right)]
    return [note]


def _is_none(note: ast.expr) -> bool:
    return isinstance(note, ast.Constant) and note.value is None


def _parts(note: ast.Subscript) -> list[ast.expr]:
    return note.slice.elts if isinstance(note.slice, ast.Tuple) else [note.slice]


def _bounds(calls: Sequence[ast.expr]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for call in calls:
        sign = _SIGNS.get(getattr(getattr(call, "func", None), "id", ""))
        if sign and isinstance(call, ast.Call):
            found[sign] = ast.literal_eval(call.args[0])
    return found


def _words(note: ast.expr) -> str:
    """One type: literals as themselves, constraints left out."""
    if isinstance(note, ast.BinOp):
        return " | ".join(map(_words, _union(note)))
    if not isinstance(note, ast.Subscript):
        return ast.unparse(note)
    name, parts = ast.unparse(note.value), _parts(note)
    if name == "Annotated":
        return _words(parts[0])
    if name == "Literal":
        return " | ".join(map(ast.unparse, parts))
    return f"{name}[{', '.join(map(_words, parts))}]"
