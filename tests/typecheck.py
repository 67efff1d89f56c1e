"""The checker behind the import hook: beartype, with an int allowed where a float is meant."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
