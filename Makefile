# Every job of the project, the same for people and CI. The first one sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The release of torch that `make constraints` resolves everything else around.
TORCH := 2.13.0

PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# For `make train`: RECIPE=name (empty: the default one); for train and the tests: ARGS="...".
RECIPE :=
ARGS :=

# One thread per pytest worker: the workers already fill the cores.
# `python -m` puts this folder on the path, where processes that a test starts look for it.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help train test lint format format-check typecheck imports docs pytest test-slow test-gpu
.PHONY: install constraints clean mutation-check bench bench-gpu bench-evaluations bench-tables
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(STAMP) ## train RECIPE (default: text that ships with Python); ARGS="--options"
	@$(BIN)/equilibria train $(RECIPE) $(ARGS)

# In this order, so that the cheap checks speak first and pytest has the last word.
test: lint format-check typecheck imports docs pytest ## everything that CI checks

lint: $(STAMP) ## ruff's rules
	$(BIN)/ruff check

format: $(STAMP) ## rewrite the sources in the one format
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

format-check: $(STAMP) ## fail where `make format` would change something
	$(BIN)/ruff format --check

typecheck: $(STAMP) ## strict types in src
	$(BIN)/basedpyright --pythonpath $(BIN)/python

imports: $(STAMP) ## who may import whom
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(STAMP) ## build the site into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pytest: $(STAMP) ## the tests without slow and gpu; ARGS="-k anderson"
	$(PYTEST) -n auto --maxprocesses 8 $(ARGS)

test-slow: $(STAMP) ## the slow tests
	$(PYTEST) -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PYTEST) -m gpu $(ARGS)

mutation-check: $(STAMP) ## break the code on purpose and see a test fail (half an hour); ARGS="linear/gmres"
	$(BIN)/python tests/mutation_check.py $(ARGS)

bench: $(STAMP) ## measure time and memory on the CPU (about 15 minutes), then pictures and tables
	@$(BIN)/python -c 'import torchdeq' || { \
		echo "error: torchdeq is missing: $(BIN)/python -m pip install -e '.[peers]'" >&2; exit 1; }
	set -e; for name in overhead profile_step training_step mixed_difficulty memory rounded_history scaling; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name; done
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.tables

bench-gpu: $(STAMP) ## run what is still to be measured on this GPU; ARGS="--only kernels"
	$(BIN)/python -m benchmarks.gpu.run_queue $(ARGS)

bench-evaluations: $(STAMP) ## count evaluations against other libraries (about ten minutes)
	@$(BIN)/python -c 'import jaxopt, optimistix, torchdeq' || { \
		echo "error: the other libraries are missing: $(BIN)/python -m pip install -e '.[peers]'" >&2; \
		exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evaluations
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.backward_evaluations

bench-tables: $(STAMP) ## write the tables of the docs from benchmarks/results
	$(BIN)/python -m benchmarks.tables

install: $(STAMP) ## set up .venv and nothing else; PYTHON=... names the interpreter

# The stamp is the last thing written: an interrupted installation is taken up again next time.
# __init__.py has the version, which the metadata of the installed project repeats.
$(STAMP): pyproject.toml constraints.txt src/equilibria/__init__.py
	@rm -f $@
	@$(call is_new_enough,$(BIN)/python) && $(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| { $(require_python) && echo "creating $(VENV)" && $(PYTHON) -m venv --clear $(VENV); }
	$(PIP_INSTALL) --quiet hatchling
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

# The header of constraints.txt is kept. CUDA packages are left out: which ones torch wants depends
# on the machine, and torch itself pins them.
constraints: ## resolve all dependencies anew and rewrite constraints.txt
	@$(require_python)
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && set -e; \
	$(PYTHON) -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/python" -m pip install torch==$(TORCH); \
	"$$scratch/venv/bin/python" -m pip install torch==$(TORCH) '.[dev]'; \
	grep '^#' constraints.txt > "$$scratch/pins"; \
	"$$scratch/venv/bin/python" -m pip freeze --all --exclude pip --exclude equilibria \
		> "$$scratch/freeze"; \
	sed -E 's/\+[a-z0-9.]+$$//' "$$scratch/freeze" | grep -vE '^(nvidia-|cuda-|triton)' \
		>> "$$scratch/pins"; \
	cp "$$scratch/pins" constraints.txt

clean: ## remove .venv, caches and builds; runs are kept
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

is_new_enough = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
define require_python
{ $(call is_new_enough,$(PYTHON)) || { \
	echo "error: equilibria needs Python 3.11 or newer, and $(PYTHON) is" \
		"$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing)." >&2; \
	echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; }
endef
