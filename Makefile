# setup, demo, check, test: each does all the set-up that it needs and is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo check test test-long clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" sh jobs/demo.sh

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest -n 2

# Minutes each: a queue of real jobs that are disturbed, a run whose nodes are taken away, lm_eval;
# and workers killed at every moment of a run.
test-long: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[long]'
	$(BIN)/python -m pytest -m long
	S2FT_KILLS=60 $(BIN)/python -m pytest -s tests/distributed/test_kills.py

clean:
	rm -rf $(VENV) build dist *.egg-info
