"""The command: one file a verb or family of verbs."""

from __future__ import annotations


def main() -> None:
    """Entry point of `outlay`."""
    import sys

    from .app import run_app

    sys.exit(run_app())
