"""One process without the type checker, shared by the tests that need it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conformance import kit, settings


@pytest.fixture(scope="session")
def plain_process() -> dict[str, Any]:
    """What `plain.py` found."""
    given = {
        "settings": {name: rows[0] for name, rows in settings.ROWS.items()},
        "recipes": [
            kit.recipe(methods=[spec], model={"dropout": 0.1}, every={"save": 2}).to_yaml()
            for spec in settings.specs()
        ],
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain.py"))],
        input=json.dumps(given), text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
