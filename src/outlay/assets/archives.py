"""Files inside npm and source tarballs and Debian packages, read where they lie.

Nothing is unpacked onto the disk: members are found by name and read into memory.
"""

from __future__ import annotations

import io
import tarfile
from functools import lru_cache
from pathlib import Path

from ..core.errors import DataError

_AR = b"!<arch>\n"
_HEADER = 60  # bytes of a member's header in an ar archive


class Packed:
    """A place inside an archive, with the few verbs of a path that assets use.

    Args:
        archive: The archive's file.
        place: Path inside, parted by slashes; "" is the top.
    """

    def __init__(self, archive: Path, place: str = "") -> None:
        self.archive, self.place = archive, place

    def __truediv__(self, part: str) -> Packed:
        return Packed(self.archive, f"{self.place}/{part}" if self.place else part)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.place.rpartition("/")[2]

    def is_file(self) -> bool:
        """True if the archive has a regular file of this name."""
        return self.place in _members(self.archive)

    def read_bytes(self) -> bytes:
        """Content of the file."""
        tar, members = _opened(self.archive), _members(self.archive)
        found = tar.extractfile(members[self.place]) if self.place in members else None
        if found is None:
            raise FileNotFoundError(f"{self.archive} holds no file {self.place!r}")
        return found.read()

    def iterdir(self) -> list[Packed]:
        """Files directly inside, by name."""
        lead = f"{self.place}/" if self.place else ""
        names = [n for n in _members(self.archive) if n.startswith(lead)]
        return [Packed(self.archive, n) for n in sorted(names) if "/" not in n[len(lead) :]]


def top(archive: Path) -> Packed:
    """The folder that holds everything in an archive: its top, or its only first folder."""
    firsts = {name.partition("/")[0] for name in _members(archive)}
    return Packed(archive, firsts.pop() if len(firsts) == 1 else "")


@lru_cache(maxsize=4)
def _opened(archive: Path) -> tarfile.TarFile:
    try:
        data = archive.read_bytes()
        return tarfile.open(fileobj=io.BytesIO(_debian_data(data) if data[:8] == _AR else data))
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"archive {str(archive)!r} cannot be read ({type(error).__name__})", "fetch it again"
        ) from None


@lru_cache(maxsize=4)
def _members(archive: Path) -> dict[str, tarfile.TarInfo]:
    files = [member for member in _opened(archive) if member.isreg()]
    return {member.name.removeprefix("./"): member for member in files}


def _debian_data(data: bytes) -> bytes:
    """The member `data.tar.*` of a Debian package, which is an ar archive."""
    place = len(_AR)
    while place + _HEADER <= len(data):
        name = data[place : place + 16].decode("ascii").strip().rstrip("/")
        size = int(data[place + 48 : place + 58])
        place += _HEADER
        if name.startswith("data.tar"):
            return data[place : place + size]
        place += size + size % 2
    raise ValueError("it has no data")
