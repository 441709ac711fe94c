# Each target sets up what it needs: a virtual environment with the pinned packages, on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := .venv-bench

.PHONY: help install pong cartpole watch test lint format bench features clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

# torch comes first and by its pinned version: a range would take the newest build with its CUDA packages.
# The stamp is touched last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(STAMP)  ## Set up .venv

pong: $(STAMP)  ## Train Pong agents, about two hours (ARGS="--recipe pong --seed 1")
	$(BIN)/python scripts/train_pong.py $(ARGS)

cartpole: $(STAMP)  ## Train CartPole agents, about five minutes
	$(BIN)/python scripts/train_cartpole.py $(ARGS)

# A window where there is a display, watch.gif where there is none.
FILE := agents/pretrained/pong-lite/T1.safetensors
watch: $(STAMP)  ## Watch a trained agent play (FILE=..., ARGS="--steps 2000 --video pong.gif")
	$(BIN)/python scripts/watch.py $(FILE) $(ARGS)

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(STAMP)  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The frameworks to compare with have an environment of their own. The constraints keep them from replacing torch;
# norse reads OpenCV without saying so.
PEERS := spikingjelly==2.0.0 snntorch==1.0.0 norse==1.1.0 sinabs==2.0.3 nirtorch onnxruntime==1.32.0 \
	opencv-python-headless torchvision==0.28.0
$(BENCH)/.installed: pyproject.toml constraints.txt Makefile
	$(BENCH)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[scripts,nir,onnx,hub,zoo]'
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt $(PEERS)
	touch $@

bench: $(BENCH)/.installed  ## Compare speed and memory with other frameworks, about half an hour
	$(BENCH)/bin/python benchmarks/layers.py nature --batch 32
	$(BENCH)/bin/python benchmarks/layers.py nature --batch 256 --rounds 5
	$(BENCH)/bin/python benchmarks/layers.py vgg16 --batch 32 --rounds 3
	$(BENCH)/bin/python benchmarks/acting.py
	$(BENCH)/bin/python benchmarks/scaling.py $(BENCH)/scaling.png
	$(BENCH)/bin/python benchmarks/agents.py

features: $(BENCH)/.installed  ## Compare features with other frameworks and write docs/features.md
	$(BENCH)/bin/python benchmarks/features.py $(ARGS)

clean:  ## Remove .venv and caches, but not the runs
	rm -rf $(VENV) $(BENCH) .pytest_cache .ruff_cache .mypy_cache .hypothesis
