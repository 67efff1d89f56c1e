"""The JSON schema of recipes, for editors and programs that write them."""

from __future__ import annotations

import ast
from typing import Any

from ..core import registry
from .settings import Setting, attribute_texts, described, summary_of

_PLAIN = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
_BOUNDS = {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}
_BUDGET = {
    "type": "string",
    "description": "A number and a unit, as 60steps, 2e6tokens, 1e15flops, 90s.",
    "examples": ["60steps", "2e6tokens", "1e15flops", "90s"],
}


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file; `$defs/methods` describes the settings of each method."""
    from ..training import recipe as parts

    whole = parts.Recipe.model_json_schema(mode="validation")
    definitions = whole.setdefault("$defs", {})
    definitions["Budget"] = dict(_BUDGET)
    for name, definition in [("Recipe", whole), *definitions.items()]:
        kind = getattr(parts, name, None)
        if not isinstance(kind, type) or "properties" not in definition:
            continue
        text = kind.__doc__ or ""
        definition["description"] = summary_of(_dedented(text))
        for field, said in attribute_texts(_dedented(text)).items():
            if field in definition["properties"]:
                definition["properties"][field]["description"] = said
    for part, kind in (("model", "ModelSpec"), ("data", "DataSpec")):
        whole["properties"][part] = {
            "anyOf": [{"$ref": f"#/$defs/{kind}"}, {"type": "string"}],
            "description": whole["properties"][part].get("description", ""),
        }
    calls = {
        "type": "array",
        "items": {"type": "string", "pattern": r"^\s*[A-Za-z_][\w-]*\s*(\(.*\))?\s*$"},
        "description": "Call strings in the order they act, as bone(r=16); see $defs/methods.",
        "examples": [["bone(r=16)"]],
    }
    whole["properties"]["methods"] = {**calls, "default": []}
    for budget in ("budget", "cap"):
        whole["properties"][budget] = {
            "anyOf": [{"$ref": "#/$defs/Budget"}, {"type": "null"}],
            "description": whole["properties"][budget].get("description", ""),
        }
    stage = definitions.get("StageSpec", {}).get("properties", {})
    if stage:
        stage["methods"] = {"anyOf": [calls, {"type": "null"}], "default": None}
        stage["budget"] = {"anyOf": [{"$ref": "#/$defs/Budget"}, {"type": "null"}]}
    definitions["methods"] = {
        name: method_schema(entry)
        for name, entry in sorted(registry.entries().items())
        if entry.kind == "method"
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "outlay recipe",
        **{key: value for key, value in whole.items() if key != "title"},
    }


def method_schema(entry: registry.Entry) -> dict[str, Any]:
    """Settings of one method, as the keyword arguments of its call string."""
    about = described(entry)
    return {
        "type": "object",
        "title": entry.card.name,
        "description": entry.card.summary or about.summary.split("\n")[0],
        "properties": {s.name: _property(s) for s in about.settings},
        "required": [s.name for s in about.settings if s.default is None],
        "additionalProperties": about.is_open,
    }


def _property(setting: Setting) -> dict[str, Any]:
    kinds = [_PLAIN[part.strip()] for part in setting.type.split("|") if part.strip() in _PLAIN]
    whole = len(kinds) == len(setting.type.split("|"))
    found: dict[str, Any] = {"description": setting.text} if setting.text else {}
    if whole:
        found["type"] = kinds[0] if len(kinds) == 1 else kinds
        found |= {_BOUNDS[sign]: value for sign, value in setting.bounds.items()}
    else:
        found["x-type"] = setting.type
    if setting.choices:
        found["enum"] = [*setting.choices, *([None] if "None" in setting.type else [])]
    if setting.default is not None:
        try:
            found["default"] = ast.literal_eval(setting.default)
        except (ValueError, SyntaxError):
            found["x-default"] = setting.default
    return found


def _dedented(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)
