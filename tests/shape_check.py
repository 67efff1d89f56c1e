"""The run-time type checker of the tests: beartype, with int allowed where float is asked."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
