"""Folders written beside their place and put there whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes `target`'s place when the block ends well.

    What was at `target` (folder or file) stays there until then, and for good if the block or the
    exchange fails.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    # mkdtemp makes the folder private; the umask decides for what a user asked for.
    umask = os.umask(0)
    os.umask(umask)
    draft.chmod(0o777 & ~umask)
    old = None
    try:
        yield draft
        if target.exists():
            old = draft.with_name(f"{draft.name}-old")
            os.replace(target, old)
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if old is not None and old.exists() and not target.exists():
            os.replace(old, target)
        raise
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
