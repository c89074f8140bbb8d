# Every target installs what it needs into a virtual environment, once; without compiling every module there, which takes
# most of the time: Python compiles those that are imported, and keeps them. Were it told not to, as containers often do,
# each process of the tests would take more than twice as long to start.
export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: train test test-all test-slow test-optimized test-interrupted lint format docs package test-newest test-oldest clean

train: $(INSTALLED)
	$(BIN)/python -m jaxnorm.training $(ARGS)

# Neighbouring tests stay together, and share what was compiled; idle workers take over what is left.
tests = $(1)/bin/python -m pytest -n auto --dist worksteal

test: $(INSTALLED)
	$(call tests,$(VENV)) -m "not slow" $(ARGS)

# More combinations, processes that are killed, the notebooks.
test-slow: $(INSTALLED)
	$(call tests,$(VENV)) -m "slow and not optimized" $(ARGS)

# The targets above compile without optimization; this one as for users, what is about rounding, memory or long runs.
test-optimized: $(INSTALLED)
	JAXNORM_OPTIMIZE=1 $(call tests,$(VENV)) -m optimized $(ARGS)

# Each signal ends a training, which then goes on to the same bits.
test-interrupted: $(INSTALLED)
	$(BIN)/python benchmarks/kill_and_resume.py --attempts 1

test-all: test test-slow test-optimized

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python docs/prose.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# dist/: the source distribution, and the wheel made from it; both checked.
package: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# docs/_build/html: the documentation, warnings being errors; then its links, and that it loads nothing from elsewhere.
# All pages are written every time: Sphinx forgets what {index} says of a page that it does not write.
docs: $(VENV)/documents
	$(BIN)/python -m sphinx --write-all --fail-on-warning --keep-going --quiet --doctree-dir docs/_build/doctrees docs docs/_build/html
	$(BIN)/python docs/check.py docs/_build/html

# The newest versions that the registry has for PYTHON, and the oldest that pyproject.toml allows.
# Not what no version changes, nor the examples in docstrings.
test-newest: .venv-newest/installed
	$(call tests,.venv-newest) tests -m "not slow and not any_version" $(ARGS)

test-oldest: .venv-oldest/installed
	$(call tests,.venv-oldest) -m "not slow" $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --editable ".[dev]"
	touch $@

# All at once: pip builds the project anew each time.
$(VENV)/documents: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --editable ".[dev,docs]"
	touch $(INSTALLED) $@

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -qq --upgrade --editable ".[test]"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	PIP_CONSTRAINT=constraints-oldest.txt .venv-oldest/bin/python -m pip install -qq --editable ".[test]"
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-tpu docs/_build docs/notebooks
