# One word does each thing; CI calls the same words (.ci/run).

PYTHON ?= python3
PORT ?= 8080
MODEL ?=
ARGS ?=
WORKERS ?= 2

PY := .venv/bin/python
CODE := runtime lmcache_ext tests benchmarks examples scripts setup.py

.PHONY: setup run test fast e2e bench style types clean

setup:  ## make .venv and install everything for CPU into it; quick when nothing has changed
	@$(PYTHON) scripts/setup.py

run: setup  ## serve a tiny model, or MODEL=/path, on PORT with ARGS='more flags'
	@$(PY) scripts/run.py --model='$(MODEL)' --port=$(PORT) $(ARGS)

test: fast  ## every test; where a fast one fails, no slow one is begun
	@$(MAKE) --no-print-directory e2e

fast: setup  ## tests that start no engine, by WORKERS at once; 0 is one after the other, as a debugger wants it
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not e2e and not bench"

e2e: setup  ## tests that start real engines, or wait for servers to fail over
	$(PY) -m pytest -m "e2e and not bench"

bench: setup  ## each benchmark prints its baseline next to it
	$(PY) benchmarks/copy_pages.py
	$(PY) benchmarks/ttft.py
	$(PY) benchmarks/decode.py
	$(PY) benchmarks/serde.py
	$(PY) benchmarks/serde_links.py

style: setup  ## formatting and lint; `.venv/bin/ruff format` mends the first
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check $(CODE)

types: setup
	$(PY) -m mypy

clean:  ## remove what was built or cached, but keep .venv
	rm -rf build dist *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f lmcache_ext/ops/_*.so .venv/setup.sha256
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
