# make demo: set up, then train the demo from nothing to a report.   make test: set up, then all tests.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
RUN ?= runs/demo
BIN := $(VENV)/bin
VESPO := $(BIN)/megatron-vespo
export OMP_NUM_THREADS := 1

.PHONY: setup demo demo-dense test check format clean

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

# A demo that was interrupted goes on where it stopped; one that is complete says so.
demo: setup
	$(VESPO) demo-inputs $(RUN)/inputs --seed $(SEED)
	$(VESPO) sft configs/demo_sft.toml seed=$(SEED) run_dir=$(RUN)/sft model=$(RUN)/inputs/model \
	    data.train=$(RUN)/inputs/demonstrations.parquet --resume auto
	$(VESPO) train configs/demo.toml seed=$(SEED) run_dir=$(RUN)/rl model=$(RUN)/sft/final \
	    prompts.train=$(RUN)/inputs/train.parquet evaluation.sets.heldout=$(RUN)/inputs/heldout.parquet --resume auto

# The second configuration: a dense model, synchronous, prompts from jsonl.
demo-dense: setup
	$(VESPO) demo-inputs runs/dense/inputs --seed $(SEED)
	$(VESPO) sft configs/demo_sft.toml seed=$(SEED) run_dir=runs/dense/sft model=runs/dense/inputs/dense_model \
	    data.train=runs/dense/inputs/demonstrations.parquet trainer.layout.expert=1 --resume auto
	$(VESPO) train configs/dense_sync.toml seed=$(SEED) --resume auto

# The trainer must hold on both ends of the supported range of megatron-core: what touches Megatron is run on both.
OTHER_MEGATRON := .compat/megatron-core-0.19.2
ON_BOTH := $(addprefix tests/trainer/test_,checkpoint.py cpu.py hf_weights.py layout.py layouts.py routing.py step.py)
test: setup $(OTHER_MEGATRON)/.ready
	$(BIN)/python -m pytest
	PYTHONPATH=$(CURDIR)/$(OTHER_MEGATRON) $(BIN)/python -m pytest $(ON_BOTH) --expect-megatron-core 0.19.2 \
	    -k 'not test_recomputation_changes_no_gradient'

$(OTHER_MEGATRON)/.ready: | setup
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --ignore-requires-python \
	    --target $(OTHER_MEGATRON) megatron-core==0.19.2
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .compat runs
