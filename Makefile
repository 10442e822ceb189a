# Everything a user types. `make demo` or `make test` may be the first command on a fresh clone:
# each makes .venv, installs into it and runs. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/demo.toml
# The graphics card that training is to fit, e.g. 12gb: see configs/cards/.
CARD   ?=
# What runs stages 1 and 2; on several GPUs: LAUNCH="accelerate launch --num_processes 8"
LAUNCH ?= python
ARGS   ?=

RUN     := . $(VENV)/bin/activate &&
# A process a core with a thread each: the models are too small for more.
TESTS   := $(RUN) OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal
STAMP   := $(VENV)/.installed
IS_DEMO := $(filter configs/demo%.toml,$(CONFIG))
# The configuration's own paths stand where SOURCE, BASE, CACHE and OUTPUT are not given.
SOURCE_FLAG     = $(if $(SOURCE),--source "$(SOURCE)")
BASE_FLAG       = $(if $(BASE),--pretrained-model-name-or-path "$(BASE)")
CACHE_FLAG      = $(if $(CACHE),--cache "$(CACHE)")
OUTPUT_FLAG     = $(if $(OUTPUT),--output-dir "$(OUTPUT)")
CARD_FLAG       = $(if $(CARD),--config "configs/cards/$(CARD).toml")
CONTROLNET_FLAG = $(if $(OUTPUT),--controlnet "$(OUTPUT)")
IMAGES_FLAG     = $(if $(OUTPUT),--output-dir "$(OUTPUT)/images")
SERVE_FLAG      = $(if $(OUTPUT),--output-dir "$(OUTPUT)/served")
SCORE_FLAG      = $(if $(OUTPUT),--output-dir "$(OUTPUT)/score")

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo demo-full circles precompute train infer score serve verify test lint check clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-13s %s\n", $$1, $$2 }'
	@echo
	@echo 'The stages run the demo by default. For real:'
	@echo '  make precompute CONFIG=configs/sd35-medium.toml SOURCE=fill50k.zip CACHE=cache'
	@echo '  make train      CONFIG=configs/sd35-medium.toml CACHE=cache OUTPUT=out ARGS="--train-batch-size 8"'
	@echo 'Variables: CONFIG CARD SOURCE BASE CACHE OUTPUT ARGS LAUNCH, and PYTHON for setup.'

setup: $(STAMP)  ## Make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup  ## The whole pipeline on a laptop, in ten minutes; FAST=1: in two, learning nothing
	$(RUN) python -m demo --config $(if $(filter-out 0,$(FAST)),configs/demo-fast.toml,"$(CONFIG)")

demo-full: setup  ## The same, trained for longer, in an hour
	$(RUN) python -m demo --config configs/demo-full.toml

circles: setup  ## The demo's data set
	$(RUN) python -m demo.circles --config "$(CONFIG)"

precompute: setup $(if $(IS_DEMO),$(if $(SOURCE),,circles))  ## Stage 1: encode SOURCE with BASE's encoders into CACHE
	$(RUN) $(LAUNCH) -m precompute --config "$(CONFIG)" $(SOURCE_FLAG) $(BASE_FLAG) $(CACHE_FLAG) $(ARGS)

train: setup  ## Stage 2: train a ControlNet for BASE from CACHE into OUTPUT
	$(RUN) $(LAUNCH) -m train --config "$(CONFIG)" $(CARD_FLAG) $(BASE_FLAG) $(CACHE_FLAG) $(OUTPUT_FLAG) $(ARGS)

infer: setup  ## Stage 3: draw pictures with BASE and OUTPUT's ControlNet
	$(RUN) python -m infer generate --config "$(CONFIG)" $(BASE_FLAG) $(CONTROLNET_FLAG) $(IMAGES_FLAG) $(ARGS)

serve: setup  ## A page on which to draw a conditioning image and have OUTPUT's ControlNet follow it
	$(RUN) python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[serve]"
	$(RUN) python -m infer serve --config "$(CONFIG)" $(BASE_FLAG) $(CONTROLNET_FLAG) $(SERVE_FLAG) $(ARGS)

score: setup  ## Measure how well OUTPUT's ControlNet draws SOURCE
	$(RUN) python -m infer score --config "$(CONFIG)" $(SOURCE_FLAG) $(BASE_FLAG) $(CONTROLNET_FLAG) $(SCORE_FLAG) $(ARGS)

verify: setup  ## Check every record of CACHE
	$(RUN) python -m shards verify "$(or $(CACHE),runs/demo/cache)"

test: setup  ## The tests that take seconds
	$(TESTS) -m "not slow and not gpu and not network" $(ARGS)

lint: setup  ## ruff and mypy --strict
	$(RUN) ruff check . && ruff format --check . && mypy

check: lint  ## lint, and all tests that need neither GPU nor network
	$(TESTS) -m "not gpu and not network" $(ARGS)

clean:  ## Remove what make made: .venv and the demo's runs
	rm -rf $(VENV) runs/demo runs/demo-fast runs/demo-full .pytest_cache .mypy_cache .ruff_cache *.egg-info
