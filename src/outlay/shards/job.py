"""One selection from shards to shards: score, decide, write; each resumable a shard at a time.

```text
OUT/
  data/       the kept documents with their scores, one file a shard
  dropped/    the others with their reasons, if asked for
  scores/     a narrow side table a shard in row order, and its rows that were set aside
  selectors/  what the methods learned
  run.json  manifest.json  quarantine.jsonl
```

Every file is written under another name, synced and renamed; a Parquet file's footer says what it
was made from. So a shard is done or not, whenever the work was stopped, and `manifest.json` comes
last.
"""

from __future__ import annotations

import heapq
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..core.drafts import drafted
from ..core.errors import ConfigError, DataError, OutlayError
from .deciding import Columns, Decision, decide, kept_share_notes
from .engines import Engine, part_of, run_tasks
from .progress import Silent
from .reading import read
from .scorers import Scorer, load_scorer
from .selector import SAMPLE, SAMPLE_CHARACTERS, Selecting
from .sets import Fields, ShardSet, digest, open_shards
from .tables import chunks, footer, sweep, whole
from .tasks import Exporting, Scoring, export_shard, score_shard

_FAILED_SHARE = 1e-3  # of documents that a scorer may fail on
_BUCKET = 2_000_000  # ids that are compared at once
_EXAMPLES = 20


@dataclass(frozen=True)
class Selection:
    """A finished selection.

    Attributes:
        folder: Where it lies.
        manifest: As in `manifest.json`.
        examples: Kept and dropped documents drawn at random, with scores and reasons.
    """

    folder: Path
    manifest: dict[str, Any]
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def select(
    inputs: str | Path | Sequence[str | Path],
    methods: Sequence[Any],
    out: str | Path,
    *,
    fields: Fields | None = None,
    engine: Engine = "local",
    workers: int = 1,
    limit: int | None = None,
    keep_dropped: bool = False,
    seed: int = 0,
    part: str | None = None,
    progress: Silent | None = None,
) -> Selection | None:
    """Choose documents from shards, one method after the other.

    Every method's scores are computed in one pass over the texts; a method's share is of what the
    methods before it left. Shards that were finished before are not read again.

    Args:
        inputs: Files, folders or globs.
        methods: Methods of selection, in order.
        out: Folder of the result.
        fields: Columns.
        engine: "local" or "ray".
        workers: Processes.
        limit: Rows of each shard that are read.
        keep_dropped: Write the dropped documents as well.
        seed: Of random orders, where a method has no seed of its own.
        part: "0/4" scores one part of the shards and stops: for array jobs. A call without it
            joins what the parts did.
        progress: Hears how far it is.

    Returns:
        The selection; None for a part.

    Raises:
        ConfigError: If a method cannot choose from shards, or `out` holds another selection.
        DataError: If files break off, a scorer fails too often, or nothing is kept.
    """
    job = _Job(
        open_shards(inputs, fields, Path(out)), tuple(methods), Path(out), engine, workers, limit,
        keep_dropped, seed, progress or Silent(),
    )  # fmt: skip
    return job.run(None if part is None else part_of(part))


@dataclass
class _Job:
    shards: ShardSet
    methods: tuple[Any, ...]
    out: Path
    engine: Engine
    workers: int
    limit: int | None
    keep_dropped: bool
    seed: int
    progress: Silent

    def run(self, part: tuple[int, int] | None) -> Selection | None:
        if not self.methods:
            raise ConfigError("no method to select by", "give one, as random_selection(keep=0.1)")
        for method in self.methods:
            if not isinstance(method, Selecting):
                raise ConfigError(
                    f"{method.card.name!r} does not choose documents",
                    "`outlay list` shows the group selection",
                )
        self.fingerprint = digest(
            __version__, self.shards.fingerprint, [m.identity(self.seed) for m in self.methods],
            self.limit, self.seed,
        )  # fmt: skip
        self._claim_folder()
        scorers = self._scorers()
        self._score(scorers, part)
        if part is not None:
            return None
        self.copies = self._copies()
        decisions = self._decide()
        return self._finish(scorers, decisions)

    def _claim_folder(self) -> None:
        """The folder belongs to one selection, from its first shard on."""
        record = self.out / "run.json"
        if not record.is_file():
            if self.out.is_dir() and any(self.out.iterdir()):
                raise ConfigError(
                    f"{str(self.out)!r} is not empty and holds no selection", "give another folder"
                )
            _write_json(record, {"fingerprint": self.fingerprint})
            return
        try:
            known = json.loads(record.read_text(encoding="utf-8"))["fingerprint"]
        except (ValueError, KeyError, TypeError):
            known = None
        if known != self.fingerprint:
            raise ConfigError(
                f"{str(self.out)!r} holds a selection from other files or settings",
                "give another folder, or remove that one",
            )

    # ---- scores ----------------------------------------------------------------------------------

    def _scorers(self) -> tuple[Scorer, ...]:
        """What the methods learned, from the folder if they learned it before."""
        found: dict[str, Scorer] = {}
        kept: list[str] | None = None

        def pool() -> list[str]:
            nonlocal kept
            kept = self._sample() if kept is None else kept
            return kept

        for number, method in enumerate(self.methods):
            place = self.out / "selectors" / f"{number}-{method.card.name}"
            if not (place / "columns.json").is_file():
                with drafted(place) as draft, tempfile.TemporaryDirectory() as scratch:
                    scorers = method.scorers(pool, Path(scratch))
                    for scorer in scorers:
                        scorer.save(draft / scorer.column)
                    names = json.dumps([scorer.column for scorer in scorers])
                    (draft / "columns.json").write_text(names, encoding="utf-8")
            for column in json.loads((place / "columns.json").read_text(encoding="utf-8")):
                scorer = load_scorer(place / column)
                if found.setdefault(column, scorer).fingerprint != scorer.fingerprint:
                    raise ConfigError(
                        f"two methods score {column!r} differently",
                        "select with one first, and with the other from what it kept",
                    )
        return tuple(found.values())

    def _sample(self) -> list[str]:
        """Texts whose ids hash lowest: a random sample that no order of shards changes."""
        lowest: list[tuple[int, str]] = []
        size = sum(shard.size for shard in self.shards.shards)
        self.progress.phase("sampling", len(self.shards.shards), size)
        for shard in self.shards.shards:
            for batch in read(shard, self.shards.fields, limit=self.limit):
                for document in batch.documents:
                    entry = (-document.key, document.text[:SAMPLE_CHARACTERS])
                    if len(lowest) < SAMPLE:
                        heapq.heappush(lowest, entry)
                    elif entry > lowest[0]:
                        heapq.heapreplace(lowest, entry)
            self.progress.shard(shard.size, {})
        return [text for _, text in sorted(lowest, reverse=True)]

    def _score(self, scorers: tuple[Scorer, ...], part: tuple[int, int] | None) -> None:
        facts = (self.shards.fields, self.limit, [s.fingerprint for s in scorers])
        tasks = [
            Scoring(
                shard, self.shards.fields, scorers, self.out / "scores", self.limit,
                digest(shard.fingerprint, asdict(facts[0]), *facts[1:]),
            )
            for shard in self.shards.shards
            if part is None or shard.number % part[1] == part[0]
        ]  # fmt: skip
        self._run("scoring", score_shard, tasks)
        self.scored = tasks
        if part is None:
            self._refuse_failures()

    def _run(self, phase: str, function: Callable[[Any], Any], tasks: Sequence[Any]) -> None:
        left = []
        self.progress.phase(phase, len(tasks), sum(task.shard.size for task in tasks))
        for task in tasks:
            facts = footer(task.path, task.fingerprint)
            if facts is None:
                left.append(task)
            else:
                self.progress.shard(task.shard.size, facts["counts"])
        sizes = {task.shard.number: task.shard.size for task in left}
        for number, counts in run_tasks(function, left, engine=self.engine, workers=self.workers):
            self.progress.shard(sizes[number], counts)

    def _refuse_failures(self) -> None:
        total: Counter[str] = Counter()
        for task in self.scored:
            total.update((footer(task.path, task.fingerprint) or {})["counts"])
        failed = total["failed"]
        if failed > _FAILED_SHARE * total["read"] and failed > 1:
            raise DataError(
                f"scorers failed on {failed:,} of {total['read']:,} documents",
                f"see {str(self.out / 'scores')!r}, mend the scorer and select anew",
            )
        if total["quarantined"] == total["read"]:
            raise DataError(
                f"none of {total['read']:,} rows can be used"
                + (f": {self._first_reason()}" if total["read"] else ""),
                "name the column of the text, or check the files",
            )

    def _first_reason(self) -> str:
        return next(json.loads(line)["reason"] for line in self._set_aside())

    def _set_aside(self) -> Iterator[str]:
        for task in self.scored:
            with task.quarantine.open(encoding="utf-8") as file:
                yield from file

    def _copies(self) -> dict[int, list[int]]:
        """Rows of each shard whose id came before, in a smaller row or an earlier shard."""
        if self.shards.fields.id is None:
            return {}
        found: dict[int, list[int]] = {}
        total = sum((footer(t.path, t.fingerprint) or {})["counts"]["usable"] for t in self.scored)
        buckets = np.uint64(max(1, -(-total // _BUCKET)))
        for bucket in range(int(buckets)):
            parts = []
            for task in self.scored:
                for rows in chunks(task.path, ["row", "key"]):
                    among = rows["key"] % buckets == np.uint64(bucket)
                    shard = np.full(int(among.sum()), task.shard.number, np.int64)
                    parts.append((rows["key"][among], shard, rows["row"][among]))
            keys, shards, places = (np.concatenate(column) for column in zip(*parts))
            order = np.lexsort((places, shards, keys))
            again = order[1:][keys[order][1:] == keys[order][:-1]]
            for index in again.tolist():
                found.setdefault(int(shards[index]), []).append(int(places[index]))
        return {number: sorted(rows) for number, rows in sorted(found.items())}

    # ---- decisions -------------------------------------------------------------------------------

    def _decide(self) -> tuple[Decision, ...]:
        decisions: tuple[Decision, ...] = ()
        for method in self.methods:
            earlier = decisions

            def left(earlier: tuple[Decision, ...] = earlier) -> Iterator[Columns]:
                for task in self.scored:
                    for rows in chunks(task.path):
                        yield _remaining(rows, earlier, self.copies.get(task.shard.number, []))

            decision = decide(method.rule(self.seed), left)
            kept = total = 0
            for rows in left():
                total += int(rows["tokens"].sum())
                kept += int(rows["tokens"][decision.apply(rows) == ""].sum())
            if not kept:
                raise DataError(
                    f"{method.card.name} keeps none of {total:,} tokens", "loosen its settings"
                )
            for text in kept_share_notes(method.card.name, kept, total):
                self.progress.note(text)
            decisions = (*decisions, decision)
        return decisions

    # ---- the result ------------------------------------------------------------------------------

    def _finish(self, scorers: tuple[Scorer, ...], decisions: tuple[Decision, ...]) -> Selection:
        tasks = [
            Exporting(
                task.shard, self.shards.fields, task.path, decisions,
                tuple(self.copies.get(task.shard.number, ())), self.out, self.limit,
                self.keep_dropped, _EXAMPLES,
                digest(self.fingerprint, task.fingerprint, self.keep_dropped),
            )
            for task in self.scored
        ]  # fmt: skip
        self._run("writing", export_shard, tasks)
        totals: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        drawn: dict[str, list[dict[str, Any]]] = {"kept": [], "dropped": []}
        inputs = []
        for task in tasks:
            facts = footer(task.path, task.fingerprint)
            if facts is None:
                raise OutlayError(f"{str(task.path)!r} is gone", "select again")
            counts = facts["counts"]
            facts_of_input = {"name": task.shard.name, "bytes": task.shard.size}
            facts_of_input |= {"fingerprint": task.shard.fingerprint, "rows": counts["read"]}
            inputs.append(facts_of_input)
            totals.update({key: counts[key] for key in ("read", "kept", "quarantined")})
            dropped.update(facts["dropped"])
            tokens.update(facts["tokens"])
            for side, found in facts["examples"].items():
                drawn[side] = sorted(drawn[side] + found, key=lambda e: e["draw"])[:_EXAMPLES]
        assert totals["read"] == totals["kept"] + totals["quarantined"] + sum(dropped.values())
        manifest = {
            "outlay": __version__,
            "fingerprint": self.fingerprint,
            "inputs": inputs,
            "settings": {
                "methods": [method.spec() for method in self.methods],
                "fields": asdict(self.shards.fields), "limit": self.limit, "seed": self.seed,
                "tokens": self.shards.fields.tokens or "bytes / 4",
            },
            "scorers": {scorer.column: scorer.fingerprint for scorer in scorers},
            "thresholds": [
                {"method": decision.rule.name, "score": decision.threshold.value}
                for decision in decisions if decision.threshold is not None
            ],
            "counts": {
                "read": totals["read"], "kept": totals["kept"],
                "dropped": dict(sorted(dropped.items())), "quarantined": totals["quarantined"],
            },
            "tokens": dict(sorted(tokens.items())),
        }  # fmt: skip
        self._write_quarantine()
        _write_json(self.out / "manifest.json", manifest)
        sweep(self.out)
        return Selection(self.out, manifest, drawn)

    def _write_quarantine(self) -> None:
        with (
            whole(self.out / "quarantine.jsonl") as draft,
            draft.open("w", encoding="utf-8") as file,
        ):
            file.writelines(self._set_aside())
            for task in self.scored:
                for row in self.copies.get(task.shard.number, ()):
                    entry = {"file": task.shard.name, "line": row, "reason": "id seen before"}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _remaining(rows: Columns, decisions: Sequence[Decision], copies: Sequence[int]) -> Columns:
    """The rows that earlier methods left."""
    alive = ~np.isin(rows["row"], copies)
    for decision in decisions:
        rows = {name: values[alive] for name, values in rows.items()}
        alive = decision.apply(rows) == ""
    return {name: values[alive] for name, values in rows.items()}


def _write_json(path: Path, value: Any) -> None:
    with whole(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
