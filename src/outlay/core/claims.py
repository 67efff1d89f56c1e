"""Who holds what in a run: a closed list of words, the pairs that clash, and the check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, Conflict

if TYPE_CHECKING:
    from torch import nn

    from .method import Method

WORDS: dict[str, str] = {
    "weight.replaced": "the weight matrix is computed from other parameters",
    "weight.initial": "the weight's starting value is written",
    "delta.additive": "a trainable term is added to the frozen weight; several stack",
    "delta.multiplicative": "the frozen weight is multiplied; does not stack with other changes",
    "mask": "entries of the weight are held at zero or at their value",
    "base.trained": "which of the model's own parameters train; one holder a parameter",
    "base.frozen": "nothing is added to the model's weights and nothing in them changes",
    "structure": "the weight itself is replaced or split during the run",
    "objective.token": "the loss of a token or example is replaced",
    "objective.weights": "losses are weighted; several multiply",
    "example.corruption": "inputs and labels of an example are rewritten",
    "batch.layout": "how examples become the rows of a batch",
    "tokenizer": "the tokenizer is replaced (adding tokens claims nothing)",
    "optimizer": "the update rule",
    "schedule": "the learning-rate schedule's shape",
    "data.order": "the order in which examples come",
    "data.weights": "sampling weights of domains or examples, changed during the run",
    "router": "the router's biases or its balance loss",
    "export.source": "which module is exported and evaluated",
    "reward.weights": "the weights of several rewards",
    "gradient.whole": "needs the gradients of all parameters at once",
    "update.inside": "updates parameters inside the backward pass",
}

# A word that stands beside itself is exclusive: one holder a parameter (or a run).
CLASHES: frozenset[frozenset[str]] = frozenset(
    frozenset(pair)
    for pair in [
        ("weight.replaced", "weight.replaced"),
        ("weight.replaced", "delta.additive"),
        ("weight.replaced", "delta.multiplicative"),
        ("weight.replaced", "mask"),
        ("weight.replaced", "weight.initial"),
        ("weight.initial", "weight.initial"),
        ("delta.multiplicative", "delta.multiplicative"),
        ("delta.multiplicative", "delta.additive"),
        ("delta.multiplicative", "mask"),
        ("mask", "mask"),
        ("base.trained", "base.trained"),
        ("base.frozen", "delta.additive"),
        ("base.frozen", "delta.multiplicative"),
        ("base.frozen", "weight.replaced"),
        ("base.frozen", "mask"),
        ("base.frozen", "structure"),
        ("structure", "structure"),
        ("structure", "mask"),
        ("structure", "weight.replaced"),
        ("objective.token", "objective.token"),
        ("example.corruption", "example.corruption"),
        ("batch.layout", "batch.layout"),
        ("tokenizer", "tokenizer"),
        ("optimizer", "optimizer"),
        ("schedule", "schedule"),
        ("data.order", "data.order"),
        ("data.weights", "data.weights"),
        ("router", "router"),
        ("export.source", "export.source"),
        ("reward.weights", "reward.weights"),
        ("gradient.whole", "update.inside"),
    ]
)


# A place whose function only one method can give implies the word, whatever the card says.
IMPLIED = {"OnOptimizer": "optimizer", "OnReward": "reward.weights"}


@dataclass(frozen=True)
class Claim:
    """One thing that a method holds.

    Attributes:
        word: A key of `WORDS`.
        parameters: Names of parameters or modules on the original model; a module's name means
            everything under it; empty means the whole run.
        share: First and last share of the budget during which the claim holds.
    """

    word: str
    parameters: frozenset[str] = frozenset()
    share: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.word not in WORDS:
            raise ConfigError(f"unknown claim {self.word!r}", f"use one of {', '.join(WORDS)}")
        if not 0 <= self.share[0] < self.share[1] <= 1:
            raise ConfigError(
                f"claim {self.word!r} holds over shares {self.share}", "give 0 <= first < last <= 1"
            )


def _same_place(first: Claim, second: Claim, tree: Mapping[str, int]) -> str | None:
    """Name what both claims hold, or None."""
    if first.share[1] <= second.share[0] or second.share[1] <= first.share[0]:
        return None
    if not first.parameters or not second.parameters:
        return "the whole run" if not (first.parameters or second.parameters) else "every weight"
    held = _held(first.parameters, tree)
    for place, name in _held(second.parameters, tree).items():
        if place in held:
            return name
        # Without the model, or beyond it, names meet by prefix.
        for other in held:
            if isinstance(place, str) and isinstance(other, str) and _meet(place, other):
                return name
    return None


def _held(names: Iterable[str], tree: Mapping[str, int]) -> dict[int | str, str]:
    """Parameter objects (two names of a tied one are one), or names that are not in the tree."""
    found: dict[int | str, str] = {}
    for name in sorted(names):
        inside = [n for n in tree if n == name or n.startswith(f"{name}.")]
        for each in inside:
            found.setdefault(tree[each], each)
        if not inside:
            found.setdefault(name, name)
    return found


def _meet(first: str, second: str) -> bool:
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def _claims_of(method: Method, model: nn.Module | None) -> list[Claim]:
    claims = list(method.claims(model))
    words = {claim.word for claim in claims}
    implied = [IMPLIED[place] for place in method.places() if place in IMPLIED]
    return claims + [Claim(word) for word in implied if word not in words]


def find_clashes(
    methods: Sequence[Method], model: nn.Module | None = None
) -> list[tuple[Any, Any, Claim, Claim, str]]:
    """List every clashing pair as (method, method, claim, claim, place)."""
    tree: dict[str, int] = {}
    if model is not None:
        tree = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    # By place in the list: one object written twice is two holders.
    held = [
        (order, method, claim)
        for order, method in enumerate(methods)
        for claim in _claims_of(method, model)
    ]
    found = []
    for index, (second_order, second_owner, second) in enumerate(held):
        for first_order, first_owner, first in held[:index]:
            clash = frozenset((first.word, second.word)) in CLASHES
            if first_order == second_order or not clash:
                continue
            place = _same_place(first, second, tree)
            if place:
                found.append((first_owner, second_owner, first, second, place))
    return found


def check(methods: Sequence[Method], model: nn.Module | None = None) -> None:
    """Refuse methods that cannot share a run.

    Args:
        methods: Methods in the order they were written.
        model: The original model; without it every claim is taken as run-wide where the
            method cannot name its parameters.

    Raises:
        Conflict: With both names, the place, and the way out.
    """
    clashes = find_clashes(methods, model)
    if clashes:
        first, second, held, wanted, place = clashes[0]
        raise Conflict(
            f"{first.card.name!r} holds {held.word!r} on {place} and {second.card.name!r} "
            f"wants {wanted.word!r} there",
            f"leave one of them out{_elsewhere(place)}",
        )


def _elsewhere(place: str) -> str:
    return "" if place == "the whole run" else ", or give them different target_modules or layers"


def words_of(names: Iterable[str]) -> tuple[str, ...]:
    """Check and sort claim words for display."""
    return tuple(sorted(Claim(name).word for name in names))
