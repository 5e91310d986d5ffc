# Two commands do all the set-up: `make demo` trains a small model that grows, `make test` runs the tests.
VENV   ?= .venv
PYTHON ?= python3
TORCH  := $(shell sed -n 's/^torch==//p' requirements.txt)
# Where to get torch from, when not from pip's own index: make demo TORCH_INDEX=https://...
TORCH_INDEX ?=
RANKS  ?= 4
# Processes that share the tests out; each forks its tests' ranks from itself. Four for two cores: some tests wait.
WORKERS ?= 4
# A fork copies the tables of its parent's pages: in larger pages there are fewer of them, and a rank starts in half the time.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# What `make gpu-check` runs with: this environment where there is one, else the Python of the machine, which has torch.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON))
WHEELS := build/gpu-check-wheels
SITE   := build/gpu-check-site

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
export PATH := $(BIN):$(PATH)
# PYTHONDONTWRITEBYTECODE: with it each process that a test starts, and each worker at every run, compiles all sources.
unexport PYTHONPATH PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check parity chaos fuzz real-models preflight-faults bench gpu-check gpu-check-wheels format docs \
        site clean
help:
	@echo "make demo    install, prepare text, train a model that grows three times on $(RANKS) processes; replaces runs/demo"
	@echo "make test    install what tests need, and run them (GPU=1: also those that need an NVIDIA GPU)"
	@echo "make check   lint, types, and transcripts in the documents that are no longer what their commands print"
	@echo "make parity  print the table of every layout against one process (2 minutes; GPU=1: ranks on GPUs)"
	@echo "make chaos   kill ranks, damage checkpoints, fill the disk; show that nothing is lost (KILLS=100; 5 minutes)"
	@echo "make fuzz    mutate what checkpoints, token files and Hugging Face directories say, 1,000 times a kind of file"
	@echo "make real-models  fetch the real SmolLM2-135M-Instruct (93 MB) into data/smollm2, and test that it came in right"
	@echo "make preflight-faults  plant 18 faults in small runs, and show that each is found before training (2 minutes)"
	@echo "make bench   measure what docs/performance.md shows (BENCH='--only layouts', or '--gpu'); half an hour"
	@echo "make gpu-check  what one NVIDIA GPU must do right, and how fast it is (at most 9 minutes; docs/first_gpu.md)"
	@echo "make gpu-check-wheels  collect what a GPU machine without a network lacks for that, in $(WHEELS)"
	@echo "make docs    run the commands that the documents show, and write what they print into the pages (15 minutes)"
	@echo "make site    build the documents as a site in build/site, its links checked"
	@echo "make clean   remove the demo's run, text and the virtual environment"

demo: $(VENV)/.installed data/demo/shakespeare-train.bin
	rm -rf runs/demo
	@[ "$$(nvidia-smi -L 2>/dev/null | wc -l)" -ge $(RANKS) ] || export DS_ACCELERATOR=cpu; \
	 $(BIN)/megabus train --nproc-per-node $(RANKS) --config configs/demo.yaml

test: $(VENV)/.installed-dev
	$(HUGE_PAGES) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(GPU),--gpu) tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/make_docs.py --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python tools/make_docs.py $(PAGES)

site: $(VENV)/.installed
	$(PIP) -c requirements.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

parity: $(VENV)/.installed
	$(BIN)/megabus parity $(if $(GPU),--device cuda)

chaos: $(VENV)/.installed
	$(BIN)/megabus chaos $(if $(KILLS),--kills $(KILLS))

fuzz: $(VENV)/.installed-dev
	FUZZ=1000 $(BIN)/python -m pytest -n 0 tests/fuzz

real-models: $(VENV)/.installed-dev
	$(BIN)/python tools/real_models.py
	REAL_MODELS=1 $(BIN)/python -m pytest -n 0 tests/test_real_models.py

preflight-faults: $(VENV)/.installed
	$(BIN)/megabus preflight-faults

bench: $(VENV)/.installed data/demo/shakespeare-train.bin
	$(PIP) -c requirements.txt -e '.[report,bench]'
	$(BIN)/python -m benchmarks --json benchmarks/measured.json $(BENCH)

gpu-check:
	@[ ! -d $(WHEELS) ] || $(GPU_PYTHON) -m benchmarks.gpu_check.wheels install $(WHEELS) $(SITE)
	PYTHONPATH=$(SITE) $(GPU_PYTHON) -m benchmarks.gpu_check $(CHECK)

gpu-check-wheels:
	$(PYTHON) -m benchmarks.gpu_check.wheels collect $(WHEELS)

data/demo/shakespeare-train.bin: | $(VENV)/.installed
	$(BIN)/python tools/demo_text.py
	$(BIN)/megabus preprocess data/demo/shakespeare.txt --train-tokenizer 1024 --model-type bpe \
	    --valid-fraction 0.05 --out data/demo/shakespeare

# A CPU build of torch where there is no GPU and one can be had; the default build works everywhere.
$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) and the other packages (some minutes) ..."
	@index="$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))"; \
	 if nvidia-smi -L >/dev/null 2>&1; then $(PIP) $$index "torch==$(TORCH)"; \
	 elif ! $(PIP) $$index "torch==$(TORCH)+cpu" 2>/dev/null; then \
	   echo "no CPU build of torch $(TORCH) on this index: taking the default build (TORCH_INDEX=URL names another)"; \
	   $(PIP) $$index "torch==$(TORCH)"; \
	 fi
	$(PIP) -c requirements.txt -e '.[report]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c requirements.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) data/demo runs/demo
