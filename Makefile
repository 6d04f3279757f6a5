# make demo: set up, then train the demo from nothing to a report.   make test: set up, then all tests.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
RUN ?= runs/demo
BIN := $(VENV)/bin
VESPO := $(BIN)/megatron-vespo
export OMP_NUM_THREADS := 1

.PHONY: setup demo test check format clean

setup: $(VENV)/.ready

# torch comes first and with its dependencies, since the same line brings the CUDA build on an ordinary machine;
# everything else is exactly what the lock says, without a resolver.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) tools/check_python.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint requirements.lock torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(VESPO) demo-inputs $(RUN)/inputs --seed $(SEED)
	$(VESPO) sft configs/demo_sft.toml seed=$(SEED) run_dir=$(RUN)/sft model=$(RUN)/inputs/model \
	    data.train=$(RUN)/inputs/demonstrations.parquet
	$(VESPO) train configs/demo.toml seed=$(SEED) run_dir=$(RUN)/rl model=$(RUN)/sft/final \
	    prompts.train=$(RUN)/inputs/train.parquet prompts.heldout=$(RUN)/inputs/heldout.parquet

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .compat runs
