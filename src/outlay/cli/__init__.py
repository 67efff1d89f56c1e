"""The command: one file a verb or family of verbs."""


def main() -> None:
    """Entry point of `outlay`."""
    from .app import run_app

    run_app()
