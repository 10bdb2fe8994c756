# Everything here works on a fresh Debian or Ubuntu with Python 3.11+ and make: `make demo`, `make test`.
SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
FLOWER ?= runs/flower

# The CPU build where plain pip finds one; any torch >= 2.6 that is already in the environment is kept.
TORCH ?= torch==2.13.0

export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# Nothing here needs a model hub: a missing file is an error, not a download.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-flower test test-all soak lint bench bench-silentbench bench-demo bench-plants bench-secagg bench-planner bench-speed bench-engine bench-flower bench-panels bench-monitoring example-hatecheck example-shakespeare bundled clean help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 22

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.flower: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[flower]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	@touch $@

demo: $(VENV)/.installed ## run the bundled demonstration and say where its report is
	@rm -rf $(OUT)
	@$(BIN)/fedcanary run --out $(OUT); code=$$?; [ $$code -eq 0 ] || [ $$code -eq 3 ]

demo-flower: $(VENV)/.flower ## the demonstration over a SuperLink and six SuperNodes on this machine
	@rm -rf $(FLOWER)
	@$(BIN)/fedcanary deploy init $(FLOWER) --nodes 6 --set rounds=3 --set privacy.panel=same --set privacy.min_cohort=4
	@$(BIN)/fedcanary deploy up $(FLOWER) 2> $(FLOWER)/up.log & \
	trap '$(BIN)/fedcanary deploy down $(FLOWER)' EXIT; \
	$(BIN)/fedcanary deploy run $(FLOWER); code=$$?; [ $$code -eq 0 ] || [ $$code -eq 3 ]

test: $(VENV)/.test ## the default test suite (under 5 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test-all: $(VENV)/.test ## every test, the slow, statistical, browser and service ones too
	$(BIN)/python -m pytest -q -m 'slow or not slow' --timeout 1800

soak: $(VENV)/.test ## 200 rounds over a SuperLink and six SuperNodes while nodes fail (hours)
	FEDCANARY_SOAK_ROUNDS=200 $(BIN)/python -m pytest -q -s -m services tests/engines/flower/test_deployment_soak.py

lint: $(VENV)/.test ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bundled: $(VENV)/.installed ## train the bundled model again (about 10 CPU-minutes)
	$(BIN)/python tools/pretrain_bundled.py

bench: $(VENV)/.installed ## SilentBench's quick version, into silentbench/ (two minutes)
	@rm -rf silentbench
	$(BIN)/fedcanary bench --quick --out silentbench

bench-silentbench: $(VENV)/.installed ## all that benchmarks/silentbench and docs/silentbench show (an hour)
	rm -rf silentbench
	$(BIN)/fedcanary bench --out silentbench
	cp silentbench/README.md silentbench/results.jsonl silentbench/evidence.json benchmarks/silentbench/
	cp silentbench/evidence.json src/fedcanary/landscape/evidence.json
	$(BIN)/python benchmarks/edges.py
	$(BIN)/python benchmarks/attempts.py
	$(BIN)/python benchmarks/silentbench.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[charts]'
	$(BIN)/python benchmarks/charts.py

bench-demo: $(VENV)/.installed ## time and memory of the demonstration
	$(BIN)/python benchmarks/demo.py

bench-secagg: $(VENV)/.installed ## secure aggregation: cost of a client and of the server
	$(BIN)/python benchmarks/secagg.py

bench-planner: $(VENV)/.installed ## the planner's predictions against windows played message by message
	$(BIN)/python benchmarks/planner.py

bench-speed: $(VENV)/.test ## ours beside peft, Flower and pfl on the same job (100 minutes; makes two venvs once)
	$(BIN)/python benchmarks/speed.py

bench-engine: $(VENV)/.test ## what was tried to make stacked training faster, with and without (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engine_attempts

bench-flower: $(VENV)/.test ## messages, the server's own code, SuperLink, and what watching adds to an app (30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/flower/messages.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/flower/server.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/flower/superlink.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/flower/overhead.py --repeats 1

bench-panels: $(VENV)/.installed ## a million clients' readings to a verdict: time and memory
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/panels.py

bench-monitoring: $(VENV)/.test ## what monitoring adds to a round, in the demonstration and the HateCheck example
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/monitoring.py

bench-plants: $(VENV)/.installed ## the 140 runs: six planted failures and none, 20 seeds each
	$(BIN)/python benchmarks/plants.py

example-hatecheck: $(VENV)/.test ## all six modes on HateCheck with a real encoder (needs FEDCANARY_DATA)
	$(BIN)/python examples/run.py hatecheck

example-shakespeare: $(VENV)/.installed ## one client per speaker (needs FEDCANARY_DATA)
	$(BIN)/python examples/run.py shakespeare

clean: ## remove what was made
	rm -rf $(VENV) runs silentbench build dist .pytest_cache .mypy_cache .ruff_cache
