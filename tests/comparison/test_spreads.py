"""What seeds can show, said beforehand: where spreads come from, and the sentences."""

import json

import pytest

from outlay import recipes
from outlay.comparison import spreads
from outlay.comparison import statistics as st
from outlay.comparison.spreads import Spread, foresee, pooled, recorded
from outlay.core.errors import ConfigError


def test_spreads_are_pooled_over_degrees_of_freedom():
    assert pooled([(3, 1.0), (5, 2.0)]) == pytest.approx(((2 * 1 + 4 * 4) / 6) ** 0.5)
    assert pooled([(3, None), (1, 7.0), (4, 0.0)]) is None


def write(folder, name, **facts):
    place = folder / name
    place.mkdir()
    (place / "comparison.json").write_text(json.dumps(facts))
    return place


def test_earlier_comparisons_of_the_same_kind_come_first(tmp_path):
    same = {"metric": "test/accuracy", "budget": "300steps"}
    pairs = [{"seeds": 5, "spread": 0.5}, {"seeds": 5, "spread": None}]
    first = write(tmp_path, "comparison-digits-vit-0123456789", pairs=pairs, **same)
    write(tmp_path, "comparison-digits-vit-small-0123456789", pairs=[{"seeds": 9, "spread": 9.0}],
          **same)  # fmt: skip
    write(tmp_path, "comparison-digits-vit-1123456789", metric="test/loss", budget="300steps",
          pairs=[{"seeds": 9, "spread": 9.0}])  # fmt: skip
    write(tmp_path, "comparison-digits-vit-2123456789", metric="test/accuracy", budget="9steps",
          pairs=[{"seeds": 9, "spread": 9.0}])  # fmt: skip
    (tmp_path / "comparison-digits-vit-3123456789").mkdir()
    found = recorded("digits-vit", "test/accuracy", "300steps", tmp_path)
    assert found == Spread(0.5, f"from 1 earlier comparison in {tmp_path}")
    left = recorded("digits-vit", "test/accuracy", "300steps", tmp_path, without=first)
    assert left is not None and "recorded for digits-vit with" in left.source


def test_every_packaged_recipe_has_a_recorded_spread_for_its_own_metric(tmp_path):
    from outlay.training.evaluate import main_metric

    # The first has not been measured at its own budget; the others have stages, whose methods no
    # arm changes.
    without = {"pretrain-lm", "digits-self-distillation", "minilm-self-distillation"}
    assert without.isdisjoint(spreads.packaged())
    for name in set(recipes.names()) - without:
        recipe = recipes.get(name)
        metric = f"test/{main_metric(recipe.task)[0]}"
        found = recorded(name, metric, str(recipe.budget), tmp_path)
        assert found is not None and found.value > 0, name
        assert spreads.packaged()[name]["budget"] == str(recipe.budget)
    other = recorded("digits-vit", "test/accuracy", "60steps", tmp_path)
    assert other is not None and other.source.endswith("at 300steps, not at 60steps")


def asked(spread, **settings):
    settings = {"recipe": "mine", "metric": "test/accuracy", "arms": 3, "seeds": 5, **settings}
    return foresee(spread, **settings)


def test_it_says_the_smallest_difference_and_the_seeds_that_one_takes():
    plan = asked(Spread(0.02, "from a drawer"), detect=0.01)
    assert plan["detectable"] == pytest.approx(st.detectable_difference(0.02, 5, 0.05, 3, 0.8))
    assert plan["seeds_needed"] == st.seeds_needed(0.01, 0.02, 0.05, 3, 0.8) > 5
    first, second = plan["sentences"]
    assert first.startswith("5 seeds and 3 pairs of arms can show a difference of 0.0")
    assert "from a drawer" in first and second.endswith("; 5 are given.")
    assert "may still differ" in plan["warning"]
    enough = asked(Spread(0.02, "from a drawer"), detect=1.0)
    assert enough["seeds_needed"] <= 5 and enough["warning"] == ""
    assert json.loads(json.dumps(plan)) == plan


def test_without_a_record_it_says_so_and_goes_on():
    plan = asked(None, detect=0.01)
    assert plan["detectable"] is None and plan["seeds_needed"] is None and not plan["warning"]
    assert "how many seeds a difference of 0.0100 takes" in plan["sentences"][0]
    with pytest.raises(ConfigError, match="detect = -1 is not positive"):
        asked(None, detect=-1)
