# Every target sets up what it needs: Python 3.11 or 3.12, make and access to the package registries are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=

.PHONY: demo test lint docs bench bench-limit bench-vision bench-profile bench-pipeline bench-feeding bench-orchestrator clean

demo: $(VENV)/worker.stamp ## draw pictures; caption, question and match them; show how often the model is right
	$(BIN)/blip-batch demo --output demo $(DEMO_ARGS)

test: $(VENV)/dev.stamp $(VENV)/prometheus/promtool ## the whole test suite, against real servers
	$(BIN)/python -m pytest -q $(TEST_ARGS)

lint: $(VENV)/dev.stamp ## style, types, the rule of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/worker.stamp ## docs/api.md from the docstrings; Grafana's dashboards from their panels
	$(BIN)/python docs/generate_api.py
	$(BIN)/python docs/generate_dashboards.py

# Which and how: BENCH_ARGS='--model large --repeats 9 --json figures.json'; each says its flags with --help.
bench: $(VENV)/dev.stamp ## speed against transformers on this machine; takes minutes
	$(BIN)/python -m benchmarks.engine $(BENCH_ARGS)

bench-limit: $(VENV)/dev.stamp ## what this machine can multiply and copy, and the share of it every stage reaches
	$(BIN)/python -m benchmarks.limit $(BENCH_ARGS)

bench-vision: $(VENV)/dev.stamp ## the vision tower beside OpenVINO's, on a CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check openvino
	$(BIN)/python -m benchmarks.vision $(BENCH_ARGS)

bench-profile: $(VENV)/dev.stamp ## where the engine's time goes, stage by stage
	$(BIN)/python -m benchmarks.profile $(BENCH_ARGS)

bench-pipeline: $(VENV)/dev.stamp ## a whole `blip-batch run` against the engine alone
	$(BIN)/python -m benchmarks.pipeline $(BENCH_ARGS)

bench-feeding: $(VENV)/dev.stamp ## what a GET, a decode, a resize and a row's messages cost
	$(BIN)/python -m benchmarks.feeding $(BENCH_ARGS)

# BENCH_ARGS='plan --rows 100000000' (10 GB that exist nowhere), 'job --rows 10000000' (needs 4 GB of disk), 'fairness'
bench-orchestrator: $(VENV)/dev.stamp ## planning, handing out, writing and checking, without images or a model
	$(BIN)/python -m benchmarks.orchestrator $(or $(BENCH_ARGS),job)

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Where it cannot be had, a line says how, and the tests that need it fail with that line.
$(VENV)/prometheus/promtool: | $(BIN)/python
	-sh tests/get_prometheus.sh $(@D)

$(VENV)/worker.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,test,lint]'
	touch $@ $(VENV)/worker.stamp
