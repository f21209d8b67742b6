# One command for each thing people do here. Every target sets the project up first if needed.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-versions test-serve lab docs export readme clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready  ## make .venv with everything in it, at the versions of constraints.txt

# torch on its own and first: it is by far the largest (gigabytes of CUDA, unless pip is set to CPU
# builds), and the rest must fit it.
.venv/.ready: constraints.txt settings.ini setup.py
	@echo 'Setting up .venv (some minutes the first time)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) pip setuptools wheel
	@$(PIP) torch
	@$(PIP) --no-build-isolation -e '.[dev,test,docs,lab]'
	@touch $@

# One thread: the bundled teacher's matrices are too small for two to be faster.
demo: setup  ## the whole conversion on the bundled teacher: a table and report.html
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE $(BIN)/flashmorph demo --overwrite

test: setup  ## every check: export in sync, lint, types, notebooks, tests
	@tests/run.sh

test-versions: setup  ## model, resume and widget tests with the oldest and the newest versions
	@tests/versions.sh

test-serve:  ## hybrids and exports in a real engine, vLLM on the CPU (builds .venv-serve, 4 GB)
	@PYTHON=$(PYTHON) tests/serve.sh $(SERVE_OPTIONS)

lab: setup  ## open the notebooks in JupyterLab, at the first tutorial
	@$(BIN)/jupyter lab --notebook-dir=nbs \
		--LabApp.default_url=/lab/tree/tutorials/01_five_minutes.ipynb

docs: setup  ## the site: notebooks and API as web pages in docs/_build/html
	@$(BIN)/python docs/build.py && echo 'Open docs/_build/html/index.html'

export: setup  ## write flashmorph/ and README.md from the notebooks, and clean the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(MAKE) -s readme

readme: setup  ## write README.md from nbs/index.ipynb
	@$(BIN)/python docs/readme.py

clean:  ## remove what the other targets built (not .venv, not your runs)
	@rm -rf build dist *.egg-info docs/_build docs/_work .pytest_cache .mypy_cache .ruff_cache
	@find nbs flashmorph tests docs \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} +
