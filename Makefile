SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help paper report site figures publish bundle test faults lab install hooks

# What is imported is compiled once: a shell that forbids it makes every process compile a thousand modules again, ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

MODEL ?= tiny
SEED ?= 0
SEEDS ?= 1
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.ready-dev

help:
	@echo "make paper [MODEL=tiny] [SEED=0]    run the numbered notebooks and say what they found (V=1: and list what they made)"
	@echo "make paper [MODEL=tiny] SEEDS=5     the same for seeds 0 to 4 side by side, and what sums them up"
	@echo "make report [MODEL=tiny]            one HTML page of what was made: claims, figures, provenance"
	@echo "make site [MODEL=tiny]              the notebooks and that page as site/, for any web server"
	@echo "make publish [MODEL=tiny]           copy the figures and records that were made here to figures/"
	@echo "make figures [MODEL=tiny]           draw the published figures again, from their records"
	@echo "make bundle MODEL=smollm2           one folder for a machine without a network, in parts"
	@echo "make lab                            open the notebooks in JupyterLab"
	@echo "make test                           run the notebooks' lessons, the tests and the checks"
	@echo "make faults [SHARE=1]               the campaign of faults: hostile files and answers, disks, kills, memory, versions; hours"

paper: $(READY)
	@$(BIN)/python -m rlsft_nb.paper --model $(MODEL) --seed $(SEED) --seeds $(SEEDS) $(if $(V),-v)

report: $(READY)
	@$(BIN)/python -m rlsft_nb.report --model $(MODEL)

site: $(DEV)
	@rm -rf site && $(BIN)/python -m rlsft_nb.site --model $(MODEL)

publish: $(READY)
	@$(BIN)/python -m rlsft_nb.paper publish --model $(MODEL)

figures: $(READY)
	@$(BIN)/python -m rlsft_nb.gallery --model $(MODEL)

bundle: $(READY)
	@$(BIN)/python -m rlsft_nb.bundle pack $(MODEL) --out bundle-$(MODEL)

# One thread for each of two workers. A file of tests stays with one of them, for what its tests share is made once.
# A run that finds no notebook is a failure, which nbdev_test would call a success.
# Export, clean and README drift, and pyflakes, are tests/test_repo.py.
test: hooks
	@export OMP_NUM_THREADS=1; $(BIN)/nbdev_test --n_workers 2 2>&1 | tee .venv/nbdev_test.log
	@if grep -q 'No files were eligible' .venv/nbdev_test.log; then echo 'nbdev_test found no notebook'; exit 1; fi
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=15 -n 2 --dist loadfile --no-loadscope-reorder tests

faults: $(DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/faults/run.py --share $(or $(SHARE),1)

# Saved as it is stored: no counts, no widgets, small pictures. The root is here, for notebooks show figures/.
lab: hooks
	@$(BIN)/jupyter lab nbs/index.ipynb --ServerApp.root_dir="$(CURDIR)" --ContentsManager.pre_save_hook=rlsft_nb.upkeep.saved

# nbdev's git hooks, once: notebooks merge cell by cell. Its hook for Jupyter would go to the home folder; ours is above.
hooks: $(DEV)
	@if [ -d .git ] && [ ! -f .gitconfig ]; then HOME="$(CURDIR)/.venv" PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_install_hooks > /dev/null \
	    && sed -i.old 's#= nbdev_merge#= $(BIN)/nbdev_merge#' .gitconfig && rm .gitconfig.old \
	    && printf '#!/bin/sh\n$(BIN)/nbdev_trust || true\n' > .git/hooks/post-merge || echo 'The git hooks could not be installed; all else works.'; fi

install: $(READY)

# What the notebooks need; JupyterLab, nbdev and the tests come with `make lab` or `make test`. Python compiles at its first import what is used.
$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv: some minutes, once.'
	@$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[paper]'
	@touch $@

$(DEV): $(READY)
	@$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	@touch $@
