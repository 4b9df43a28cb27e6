SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help paper report figures publish bundle test lab install

MODEL ?= tiny
SEED ?= 0
SEEDS ?= 1
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help:
	@echo "make paper [MODEL=tiny] [SEED=0]    run the numbered notebooks and say what they found (V=1: and list what they made)"
	@echo "make paper [MODEL=tiny] SEEDS=5     the same for seeds 0 to 4 side by side, and what sums them up"
	@echo "make report [MODEL=tiny]            one HTML page of what was made: claims, figures, provenance"
	@echo "make publish [MODEL=tiny]           copy the figures and records that were made here to figures/"
	@echo "make figures [MODEL=tiny]           draw the published figures again, from their records"
	@echo "make bundle MODEL=smollm2           one folder for a machine without a network, in parts"
	@echo "make lab                            open the notebooks in JupyterLab"
	@echo "make test                           run the notebooks' lessons, the tests and the checks"

paper: $(READY)
	@$(BIN)/python -m rlsft_nb.paper --model $(MODEL) --seed $(SEED) --seeds $(SEEDS) $(if $(V),-v)

report: $(READY)
	@$(BIN)/python -m rlsft_nb.report --model $(MODEL)

publish: $(READY)
	@$(BIN)/python -m rlsft_nb.paper publish --model $(MODEL)

figures: $(READY)
	@$(BIN)/python -m rlsft_nb.gallery --model $(MODEL)

bundle: $(READY)
	@$(BIN)/python -m rlsft_nb.bundle pack $(MODEL) --out bundle-$(MODEL)

# One thread for each of two workers. A run that finds no notebook is a failure, which nbdev_test would call a success.
# Export, clean and README drift, and pyflakes, are tests/test_repo.py.
test: $(READY)
	@export OMP_NUM_THREADS=1; $(BIN)/nbdev_test --n_workers 2 2>&1 | tee .venv/nbdev_test.log
	@if grep -q 'No files were eligible' .venv/nbdev_test.log; then echo 'nbdev_test found no notebook'; exit 1; fi
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 tests

lab: $(READY)
	@$(BIN)/jupyter lab nbs

install: $(READY)

# torch first, by itself: the others then find it in place.
$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv: some minutes, once.'
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
