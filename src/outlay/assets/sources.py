"""Where a package's files are, without importing the package: installed, unpacked or packed.

Packages come from the Python index (installed, unpacked, a wheel or a source tarball), from npm (a
tarball of `npm pack`) and from Debian (installed, or the file of `apt-get download`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from .archives import Packed, top

# A folder of unpacked wheels or wheel files; several, parted as PATH is.
FOLDERS = "OUTLAY_ASSETS"
CACHE = "OUTLAY_CACHE"


@dataclass(frozen=True)
class Source:
    """The files of one package.

    Attributes:
        root: Folder of the module: a `Path`, or a place inside a wheel or an archive.
        version: Version found; "" if nothing says.
        place: Where it was found, for people.
    """

    root: Any
    version: str
    place: Path

    def read(self, *parts: str) -> bytes:
        """Content of one file."""
        return self.file(*parts).read_bytes()

    def file(self, *parts: str) -> Any:
        """A file or folder inside."""
        place = self.root
        for part in parts:
            place = place / part
        return place

    @property
    def is_packed(self) -> bool:
        """True if the files are inside a wheel or an archive."""
        return not isinstance(self.root, Path)


def find(package: str, module: str, needs: str, registry: str = "pypi") -> Source | None:
    """The first place that holds the module with the file `needs`: folders, then installed.

    Args:
        package: Name on its registry.
        module: Top-level module; for npm and Debian a folder of the package, or "".
        needs: Path inside the module that must be there.
        registry: "pypi", "npm" or "debian".
    """
    for folder in _folders():
        places = [*_unpacked(folder, package, module), *_wheel(folder, package, module)]
        for found in (*places, *_archives(folder, package, module, registry)):
            if _holds(found, needs):
                return found
    if registry == "debian":
        found = Source(Path("/", module), "", Path("/", module))
        return found if _holds(found, needs) else None
    if registry == "npm":
        return None
    for location in _installed(module):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        found = Source(Path(location), version, Path(location))
        if _holds(found, needs):
            return found
    return None


def _installed(module: str) -> list[str]:
    """Folders of an installed top-level package, which is not imported."""
    spec = importlib.util.find_spec(module)
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def _holds(source: Source, needs: str) -> bool:
    return source.file(*needs.split("/")).is_file()


def archive_folder() -> Path:
    """Where `make setup` puts archives: beside the installed packages."""
    return Path(sys.prefix) / "share" / "outlay"


def _folders() -> list[Path]:
    folders = [Path(p).expanduser() for p in os.environ.get(FOLDERS, "").split(os.pathsep) if p]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"{FOLDERS} = {str(folder)!r} is not a folder",
                "name a folder of wheels and archives, or unset it",
            )
    return [*folders, *(place for place in (archive_folder(),) if place.is_dir())]


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "_", package).lower()


def _unpacked(folder: Path, package: str, module: str) -> list[Source]:
    found = []
    for base in (folder, folder / package, folder / module):
        if (base / module).is_dir():
            versions = [
                name.name.removesuffix(".dist-info").rpartition("-")[2]
                for name in base.glob("*.dist-info")
                if _plain(name.name.rpartition("-")[0]) == _plain(package)
            ]
            found.append(Source(base / module, versions[0] if versions else "", base / module))
    return found


def _wheel(folder: Path, package: str, module: str) -> list[Source]:
    found = []
    for path in sorted(folder.glob("*.whl")):
        name, _, rest = path.name.partition("-")
        if _plain(name) == _plain(package) and zipfile.is_zipfile(path):
            root = zipfile.Path(path, f"{module}/")
            found.append(Source(root, rest.partition("-")[0], path))
    return found


# File name of an archive: what stands before the version, and how it ends.
_ARCHIVES = {"pypi": ("-", ".tar.gz"), "npm": ("-", ".tgz"), "debian": ("_", ".deb")}


def _archives(folder: Path, package: str, module: str, registry: str) -> list[Source]:
    mark, end = _ARCHIVES[registry]
    found = []
    for path in sorted(folder.glob(f"*{end}")):
        name, _, version = path.name.removesuffix(end).partition(mark)
        if registry != "debian":
            name, _, version = path.name.removesuffix(end).rpartition(mark)
        if _plain(name) == _plain(package.removeprefix("@").replace("/", "-")):
            root = Packed(path) if registry == "debian" else top(path)
            for part in filter(None, module.split("/")):
                root = root / part
            found.append(Source(root, version.partition("_")[0], path))
    return found


def cache_folder() -> Path:
    """Where converted and unpacked models are kept."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "outlay"
