"""Training examples in a seeded order that can be resumed by seeking, never by replaying."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...core.errors import ConfigError, DataError, nearest
from ...core.method import Example, generator_of

ALL = ""


class Chosen(Sequence[Example]):
    """Some of a lazy sequence's examples, still made when they are asked for.

    Attributes:
        ids: Id of each example.
        domains: Domain of each example.
        lengths: Tokens of each example.
    """

    def __init__(self, examples: Any, indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, indices
        self.ids = tuple(examples.ids[i] for i in indices)
        self.domains = tuple(examples.domains[i] for i in indices)
        self.lengths = tuple(examples.lengths[i] for i in indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.examples[i] for i in self.indices[index]]
        return self.examples[self.indices[index]]


class Pool:
    """Ids, domains and weights of the training examples, and the order they come in.

    Without weights every example comes once an epoch, in an order drawn from (seed, epoch).
    With domain weights, each position draws a domain and takes the next example of that
    domain's own order. An example's epoch (`visit`) is its own visit count, also where weights
    come later. The state is one cursor a domain, so continuing costs the same at step 10 and at
    step 10,000.

    Args:
        examples: Dicts with at least `id`; `domain` is optional.
        seed: Seed of the order.
        domain_weights: Sampling weight of each domain, >= 0.
        rows: The rows that the examples were made from, for methods that choose by text.

    Raises:
        DataError: If there is no example, or two have one id.
    """

    needs_model = False

    needs_examples: ClassVar[bool] = True

    def __init__(
        self,
        examples: Sequence[Example],
        seed: int = 0,
        domain_weights: Mapping[str, float] | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if self.needs_examples and not len(examples):
            raise DataError("no training example is left", "check the data and the selectors")
        self.lock = threading.RLock()
        self.examples = examples
        self.rows = rows
        self.seed = seed
        self.version = 0
        self.position = 0
        self.cursors: dict[str, int] = {}
        self.domain_weights: dict[str, float] | None = None
        self._members: dict[str, list[int]] | None = None
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self._earlier: dict[Any, int] | None = None
        # A lazy sequence knows its ids and domains without making the examples.
        ids = getattr(examples, "ids", None)
        if ids is None:
            if any("id" not in example for example in examples):
                raise DataError("a training example has no id", "give each example its own id")
            ids = [example["id"] for example in examples]
        if len(set(ids)) != len(ids):
            seen: set[Any] = set()
            twice = next(i for i in ids if i in seen or seen.add(i))
            raise DataError(f"two examples have the id {twice!r}", "give each example its own id")
        if domain_weights is not None:
            self.set_weights(domain_weights)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> tuple[Any, ...]:
        """Ids in stored order."""
        known = getattr(self.examples, "ids", None)
        return tuple(example["id"] for example in self.examples) if known is None else known

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain of each example in stored order."""
        known = getattr(self.examples, "domains", None)
        if known is not None:
            return known
        return tuple(str(example.get("domain", ALL)) for example in self.examples)

    def members(self) -> dict[str, list[int]]:
        """Indices by domain."""
        if self._members is None:
            self._members = {}
            for index, domain in enumerate(self.domains):
                self._members.setdefault(domain, []).append(index)
        return self._members

    def set_weights(self, by_domain: Mapping[str, float]) -> None:
        """Sample domains by weight from the next position on; prefetched batches are redrawn.

        Raises:
            ConfigError: Unknown domain, negative weight, or no weight above zero.
        """
        known = self.members()
        for domain, weight in by_domain.items():
            if domain not in known:
                raise ConfigError(
                    f"unknown domain {domain!r}", f"{nearest(domain, known)}known: {list(known)}"
                )
            if not weight >= 0:
                raise ConfigError(f"weight of {domain!r} is {weight}", "give weights >= 0")
        if sum(by_domain.values()) <= 0:
            raise ConfigError("no domain has a weight above zero", "give at least one")
        with self.lock:
            self.domain_weights = {d: float(by_domain.get(d, 0.0)) for d in known}
            self.version += 1

    def keep(self, chosen: Iterable[int] | Callable[[Example], bool]) -> Pool:
        """A pool of the chosen examples (indices, or a test on the example), order kept."""
        if callable(chosen):
            chosen = [i for i, example in enumerate(self.examples) if chosen(example)]
        indices = sorted(set(chosen))
        lazy = hasattr(self.examples, "ids")
        examples = Chosen(self.examples, indices) if lazy else [self.examples[i] for i in indices]
        kept = self._like(examples)
        if self.domain_weights is not None:
            left = kept.members()
            kept.set_weights({d: w for d, w in self.domain_weights.items() if d in left})
        return kept

    def _like(self, examples: Sequence[Example]) -> Pool:
        """A pool of this kind over other examples; subclasses hand on their settings."""
        return type(self)(examples, self.seed, rows=self.rows)

    def documents(self) -> list[tuple[Mapping[str, Any], list[int]]]:
        """The rows that still have examples, each with the indices of its examples.

        Raises:
            DataError: If an example was not made from one row.
        """
        places = {row["id"]: place for place, row in enumerate(self.rows)}
        found: dict[int, list[int]] = {}
        for index, name in enumerate(self.ids):
            # Windows after a row's first one end in "#1", "#2" and so on.
            place = places.get(name, places.get(str(name).rpartition("#")[0]))
            if place is None:
                raise DataError(
                    f"example {name!r} was not made from one row, so no row can be left out",
                    "leave data.blocks out, or choose beforehand with `outlay select`",
                )
            found.setdefault(place, []).append(index)
        return [(self.rows[place], found[place]) for place in sorted(found)]

    def _next_of(self, group: str, indices: Sequence[int]) -> Example:
        """The next example of one group's own order."""
        cursor = self.cursors.get(group, 0)
        epoch, offset = divmod(cursor, len(indices))
        if self._orders.get(group, (-1,))[0] != epoch:
            self._orders[group] = (epoch, self._order(group, epoch, len(indices)))
        self.cursors[group] = cursor + 1
        index = indices[self._orders[group][1][offset]]
        earlier = 0 if group == ALL else self._visits_before_weights(index)
        return {**self.examples[index], "visit": epoch + earlier}

    def _order(self, group: str, epoch: int, count: int) -> list[int]:
        generator = generator_of(self.seed, "order", group, epoch)
        return torch.randperm(count, generator=generator).tolist()

    def _visits_before_weights(self, index: int) -> int:
        """How often an example came in the whole pool's order, before domains had weights."""
        epoch, offset = divmod(self.cursors.get(ALL, 0), len(self.examples))
        if self._earlier is None:
            order = self._order(ALL, epoch, len(self.examples)) if offset else []
            self._earlier = dict.fromkeys(order[:offset], 1)
        return epoch + self._earlier.get(index, 0)

    def draw(self, count: int, model: Any = None) -> list[Example]:
        """The next examples, each with its `visit` count."""
        with self.lock:
            return self._take(count)

    def _take(self, count: int) -> list[Example]:
        drawn = []
        everything = range(len(self.examples))
        for _ in range(count):
            if self.domain_weights is None:
                self._earlier = None
                drawn.append(self._next_of(ALL, everything))
            else:
                drawn.append(self._draw_by_domain())
            self.position += 1
        return drawn

    def _draw_by_domain(self) -> Example:
        assert self.domain_weights is not None
        names = sorted(name for name, weight in self.domain_weights.items() if weight > 0)
        total, bounds = 0.0, []
        for name in names:
            total += self.domain_weights[name]
            bounds.append(total)
        generator = generator_of(self.seed, "domain", self.position)
        point = float(torch.rand((), generator=generator, dtype=torch.float64)) * total
        domain = names[min(bisect.bisect_right(bounds, point), len(names) - 1)]
        # The cursor of a domain must not meet that of the whole pool.
        return self._next_of(f"domain:{domain}", self.members()[domain])

    def peek(self, count: int) -> list[Example]:
        """The first examples of the order, without moving."""
        with self.lock:
            cursor, position = self.cursors, self.position
            self.cursors, self.position, self._earlier = {}, 0, None
            try:
                return self._take(min(count, len(self)))
            finally:
                self.cursors, self.position, self._earlier = cursor, position, None

    def cursor(self) -> dict[str, Any]:
        """Where the order stands."""
        return {"position": self.position, "cursors": dict(self.cursors)}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Go to a place of the order; weights stay."""
        with self.lock:
            self.position = int(cursor["position"])
            self.cursors = {str(k): int(v) for k, v in cursor["cursors"].items()}
            self._earlier = None

    def state_dict(self) -> dict[str, Any]:
        """Weights and whatever a subclass keeps (the cursor is the drawer's to save)."""
        return {"domain_weights": self.domain_weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        if state.get("domain_weights") is not None:
            self.set_weights(state["domain_weights"])


class NoPool(Pool):
    """In a pool's place where nothing will be drawn, as in a finished run without its data."""

    needs_examples: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(())

    def task_of_step(self, step: int) -> int:
        """The first one: methods that follow tasks are put together and never step."""
        return 0
