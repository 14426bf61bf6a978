# make demo: quantize the sample and compare; make test: everything that CI checks. Both install what they need.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
SAMPLE := samples/01_quantize_a_model
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format clean

help:
	@echo "make demo    quantize a sample model and compare it with the float one"
	@echo "make test    lint, type check and run the whole test suite"
	@echo "make test-all  the same with every case of the ONNX package's backend tests, not every tenth"
	@echo "make lint    ruff and mypy alone"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the virtual environment and everything that was built"

demo: .venv/installed
	@mkdir -p demo
	$(BIN)/qdqtool quantize $(SAMPLE)/digits.onnx --data $(SAMPLE)/calibration.npz \
		--eval $(SAMPLE)/evaluation.npz --metric top1 --target cpu -o demo/digits.qdq.onnx

test: lint
	$(BIN)/python -m pytest --quiet -n $(JOBS) --maxprocesses 8 --dist loadgroup

test-all: lint
	$(BIN)/python -m pytest --quiet -n $(JOBS) --maxprocesses 8 --dist loadgroup --backend=all

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist demo *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing qdqtool and what it needs into .venv"
	@$(PIP) --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "installing qdqtool and its development tools into .venv"
	@$(PIP) --editable '.[dev]'
	@touch .venv/installed $@

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "qdqtool needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
