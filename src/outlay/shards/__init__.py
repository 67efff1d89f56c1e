"""Data larger than memory: shards, scorers, narrow side tables, the exact cut, engines."""

from .cut import Threshold, find_threshold, select_top
from .deciding import Rule
from .job import Selection, select
from .scorers import FastText, HashedLinear, Overlap, WordList, load_scorer
from .selector import Selecting
from .sets import Fields, Shard, ShardSet, open_shards

__all__ = [
    "FastText", "Fields", "HashedLinear", "Overlap", "Rule", "Selecting", "Selection", "Shard",
    "ShardSet", "Threshold", "WordList", "find_threshold", "load_scorer", "open_shards", "select",
    "select_top",
]  # fmt: skip
