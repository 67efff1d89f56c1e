"""recipe list, copy, check and schema."""

from __future__ import annotations

import pytest

from outlay import recipes
from outlay.cli.inputs import assignment, literal
from outlay.core import registry
from outlay.training.recipe import Recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_packaged_recipe_copies_and_checks(outlay, work, name):
    assert outlay("recipe", "copy", name).code == 0
    answer = outlay("recipe", "check", f"{name}.yaml")
    assert answer.code == 0 and answer.out.startswith("ok\n")
    assert Recipe.read(work / f"{name}.yaml") == recipes.get(name)


def test_copy_refuses_to_overwrite(outlay, work):
    target = work / "there.yaml"
    target.write_text("mine\n")
    refused = outlay("recipe", "copy", "digits-vit", target)
    assert refused.code == 3 and target.read_text() == "mine\n"
    assert outlay("recipe", "copy", "digits-vit", target, "--force").code == 0
    assert "digits" in target.read_text()
    assert outlay("recipe", "copy", "digits_vit", "-").out.count("name: digits-vit") == 1
    assert [p.name for p in work.iterdir() if p.name.startswith(".")] == []


def test_check_gives_the_resolved_recipe(outlay, work):
    plain = outlay("recipe", "check", "mine.yaml", "--json").json
    assert plain["ok"] and plain["recipe"]["methods"] == ["bone(r=4)"]
    assert plain["recipe"]["data"]["path"] == str(work / "rows.csv")


def test_relative_paths_start_at_the_recipes_file(outlay, work, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    plain = outlay("recipe", "check", work / "mine.yaml", "--json").json
    assert plain["recipe"]["data"]["path"] == str(work / "rows.csv")


def test_schema_knows_fields_and_methods(outlay):
    schema = outlay("recipe", "schema").json
    assert schema["properties"]["budget"]["anyOf"][0] == {"$ref": "#/$defs/Budget"}
    assert schema["$defs"]["BatchSpec"]["properties"]["size"]["description"]
    methods = schema["$defs"]["methods"]
    assert set(methods) == {n for n, e in registry.entries().items() if e.kind == "method"}
    r = methods["bone"]["properties"]["r"]
    assert (r["type"], r["minimum"], r["default"]) == ("integer", 1, 64)
    assert methods["bone"]["properties"]["variant"]["enum"] == ["shard", "mini", "bat"]


def test_recipe_alone_shows_its_help(outlay):
    answer = outlay("recipe")
    assert answer.code == 0 and "schema" in answer.out


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 0.001), ("0.5", 0.5), ("true", True), ("null", None), ("[1, 2]", [1, 2]),
     ("text", "text"), ("{a: 1}", {"a": 1}), ("-2E+3", -2000.0)],
)  # fmt: skip
def test_values_are_yaml_literals(text, value):
    assert literal(text) == value and type(literal(text)) is type(value)


def test_assignments_take_dashes():
    assert assignment("optimizer.weight-decay=0.1") == ("optimizer.weight_decay", 0.1)
