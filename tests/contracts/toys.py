"""Small made-up methods, models and data: one for every place that a method can take."""

from __future__ import annotations

from contracts.toy_data import *  # noqa: F403
from contracts.toy_models import *  # noqa: F403
from contracts.toy_objectives import *  # noqa: F403
from contracts.toy_steps import *  # noqa: F403

from outlay.core.card import Card  # noqa: F401
from outlay.core.losses import Shaped, Term  # noqa: F401
from outlay.core.method import OnData  # noqa: F401
