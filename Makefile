# make demo   sets up .venv, trains on the embedded digits, shows the result
# make check  sets up .venv, runs lint, types and the tests that take seconds
# make test   sets up .venv, runs lint, types and all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No whole trainings and no processes of their own.
FAST_TESTS := tests/config tests/loggers tests/optimizers tests/plan/test_planner.py tests/switches \
  tests/data/test_augmentation.py tests/data/test_draws.py tests/data/test_sampling.py \
  tests/models/test_blocks.py tests/models/test_resnet.py tests/training/test_loss.py \
  tests/training/test_metrics.py tests/training/test_step.py tests/test_closed_sets.py \
  tests/test_layers.py

.PHONY: setup demo lint check test clean

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/efficient-resnet train --config digits --name demo --output-dir logs

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -n auto -q $(FAST_TESTS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup --durations=10

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build ./*.egg-info
