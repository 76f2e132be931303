# Every target sets up what it needs: Python 3.11 or 3.12, make and access to the package registries are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

.PHONY: demo test lint docs bench clean

demo: $(VENV)/worker.stamp ## draw pictures; caption, question and match them; show how often the model is right
	$(BIN)/blip-batch demo --output demo $(DEMO_ARGS)

test: $(VENV)/dev.stamp ## the whole test suite, against real servers
	$(BIN)/python -m pytest -q $(TEST_ARGS)

lint: $(VENV)/dev.stamp ## style, types, the rule of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/worker.stamp ## docs/api.md from the docstrings
	$(BIN)/python docs/generate_api.py

bench: $(VENV)/dev.stamp ## speed against transformers on this machine; takes minutes
	$(BIN)/python benchmarks/engine.py

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/worker.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,test,lint]'
	touch $@ $(VENV)/worker.stamp
