# `make demo` and `make test` set up a virtual environment in .venv first; nothing else has to be typed.
PYTHON ?= python3
# VERSIONS=oldest or newest: those of constraints-oldest.txt or constraints-newest.txt, in an environment of their own.
VENV := .venv$(VERSIONS:%=-%)
CONSTRAINTS := constraints$(VERSIONS:%=-%).txt
BIN := $(VENV)/bin
ifdef VERSIONS
export NUMBA_CACHE_DIR := $(CURDIR)/$(VENV)/numba
endif

.PHONY: demo docs test test-library test-trainers test-slow lint audit setup clean

# The libraries of the adapters; two of them without what they depend on, which would bring torchvision.
setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[all]' einops ema-pytorch pytorch-lightning
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps torchcfm denoising-diffusion-pytorch
	@touch $@

demo: setup
	$(BIN)/python -m integrations.demo

# Two processes side by side: each half takes minutes on one core.
test: setup
	$(MAKE) --jobs=2 --keep-going test-library test-trainers

test-library: setup
	$(BIN)/python -m pytest --ignore=tests/trainers

test-trainers: setup
	$(BIN)/python -m pytest tests/trainers

# Programs that try to break the library, at a tenth of their full size: about an hour.
test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs the network, to look up what is known of the dependencies.
audit: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check bandit pip-audit
	$(BIN)/bandit -q -c pyproject.toml -r couplings integrations benchmarks
	$(BIN)/pip-audit --skip-editable

# The site, in build/docs/docs/index.html; every warning is an error.
docs: setup
	$(BIN)/python -m sphinx -c docs -b html -W --keep-going -q . build/docs

clean:
	rm -rf .venv .venv-* build dist runs
