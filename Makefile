# Two commands do all the set-up: `make demo` trains a small model that grows, `make test` runs the tests.
VENV   ?= .venv
PYTHON ?= python3
TORCH  := $(shell sed -n 's/^torch==//p' requirements.txt)
# Where to get torch from, when not from pip's own index: make demo TORCH_INDEX=https://...
TORCH_INDEX ?=
RANKS  ?= 4
# Processes that share the tests out; each forks its tests' ranks from itself.
WORKERS ?= 2

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
export PATH := $(BIN):$(PATH)
unexport PYTHONPATH

.PHONY: help demo test check parity chaos preflight-faults bench format clean
help:
	@echo "make demo    install, prepare text, train a model that grows twice on $(RANKS) processes; replaces runs/demo"
	@echo "make test    install what tests need, and run them"
	@echo "make check   lint and types"
	@echo "make parity  print the table of every layout against one process (2 minutes)"
	@echo "make chaos   kill ranks, damage checkpoints, fill the disk; show that nothing is lost (10 minutes)"
	@echo "make preflight-faults  plant 18 faults in small runs, and show that each is found before training (2 minutes)"
	@echo "make bench   measure what docs/performance.md shows (BENCH='--only layouts', or '--gpu'); 20 minutes"
	@echo "make clean   remove the demo's run, text and the virtual environment"

demo: $(VENV)/.installed data/demo/shakespeare-train.bin
	rm -rf runs/demo
	@[ "$$(nvidia-smi -L 2>/dev/null | wc -l)" -ge $(RANKS) ] || export DS_ACCELERATOR=cpu; \
	 $(BIN)/deepspeed --num_accelerators $(RANKS) launcher/train.py --config configs/demo.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/.installed
	$(BIN)/python tools/parity.py

chaos: $(VENV)/.installed
	$(BIN)/python tools/chaos.py

preflight-faults: $(VENV)/.installed
	$(BIN)/python tools/preflight_faults.py

bench: $(VENV)/.installed data/demo/shakespeare-train.bin
	$(PIP) -r requirements-bench.txt
	mkdir -p runs
	$(BIN)/python -m benchmarks --json runs/bench.json $(BENCH)

data/demo/shakespeare-train.bin: | $(VENV)/.installed
	$(BIN)/python tools/demo_text.py
	$(BIN)/python tools/preprocess.py data/demo/shakespeare.txt --train-tokenizer 1024 --model-type bpe \
	    --valid-fraction 0.05 --output data/demo/shakespeare

# A CPU build of torch where there is no GPU and one can be had; the default build works everywhere.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) and the other packages (some minutes) ..."
	@index="$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))"; \
	 if nvidia-smi -L >/dev/null 2>&1; then $(PIP) $$index "torch==$(TORCH)"; \
	 elif ! $(PIP) $$index "torch==$(TORCH)+cpu" 2>/dev/null; then \
	   echo "no CPU build of torch $(TORCH) on this index: taking the default build (TORCH_INDEX=URL names another)"; \
	   $(PIP) $$index "torch==$(TORCH)"; \
	 fi
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) data/demo runs/demo
