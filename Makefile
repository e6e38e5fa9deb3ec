# Every target makes its own virtual environment when there is none and says nothing when there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
READY := $(VENV)/.ready
XDIST ?= 2

.PHONY: demo test lint bench clean

$(READY): pyproject.toml
	@echo "setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(TORCH) -e ".[dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/road_finetuning/run.py $(ARGS)

test: $(READY)
	@echo "== tests"
	@$(BIN)/python -m pytest -n $(XDIST) --dist loadfile
	@echo "== kernels in Triton's interpreter"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interp
	@echo "== kernels compiled ahead of time"
	@$(BIN)/python -m pytest -m aot
	@echo "== PEFT's own tests, with our RoadConfig in place of theirs"
	@$(BIN)/python -m tests.peft_suite

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/python -m benchmarks.train --quick
	@$(BIN)/python -m benchmarks.merge --quick
	@$(BIN)/python -m benchmarks.ops --quick

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
