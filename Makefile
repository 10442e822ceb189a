# Everything a user types. `make demo` or `make test` may be the first command on a fresh clone:
# each makes .venv, installs into it and runs. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/demo.toml
# What runs stage 2; on several GPUs: LAUNCH="accelerate launch --num_processes 8"
LAUNCH ?= python
ARGS   ?=

RUN     := . $(VENV)/bin/activate &&
STAMP   := $(VENV)/.installed
IS_DEMO := $(filter configs/demo.toml,$(CONFIG))
DEMO    := runs/demo
DEMO_INPUTS := $(DEMO)/circles/prompt.json $(DEMO)/base/model_index.json
# The demonstration's own inputs stand in for SOURCE, BASE, CACHE and OUTPUT where those are not given.
SOURCE_FLAG     = $(if $(SOURCE),--source "$(SOURCE)")
BASE_FLAG       = $(if $(BASE),--pretrained-model-name-or-path "$(BASE)")
CACHE_OUT_FLAG  = $(if $(CACHE),--output-dir "$(CACHE)")
CACHE_IN_FLAG   = $(if $(CACHE),--shards "$(CACHE)")
OUTPUT_FLAG     = $(if $(OUTPUT),--output-dir "$(OUTPUT)")
CONTROLNET_FLAG = $(if $(OUTPUT),--controlnet "$(OUTPUT)")
IMAGES_FLAG     = $(if $(OUTPUT),--output-dir "$(OUTPUT)/images")

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo precompute train infer verify test lint check clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-13s %s\n", $$1, $$2 }'
	@echo
	@echo 'The stages run the demo by default. For real:'
	@echo '  make precompute CONFIG=configs/sd35-medium.toml SOURCE=fill50k.zip CACHE=cache'
	@echo '  make train      CONFIG=configs/sd35-medium.toml CACHE=cache OUTPUT=out ARGS="--train-batch-size 8"'
	@echo 'Variables: CONFIG SOURCE BASE CACHE OUTPUT ARGS LAUNCH, and PYTHON for setup.'

setup: $(STAMP)  ## Make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup  ## The whole pipeline on a laptop: circles, base, precompute, train, infer
	@$(MAKE) --no-print-directory precompute train infer CONFIG=configs/demo.toml ARGS=
	@echo
	@echo 'Pictures: $(DEMO)/images/contact_sheet.png (conditioning | result), $(DEMO)/controlnet/validation/'

$(DEMO)/circles/prompt.json: | $(STAMP)
	$(RUN) python -m demo.circles --output-dir $(DEMO)/circles

$(DEMO)/base/model_index.json: | $(STAMP)
	$(RUN) python -m demo.base --output-dir $(DEMO)/base

precompute: setup $(if $(IS_DEMO),$(DEMO_INPUTS))  ## Stage 1: encode SOURCE with BASE's encoders into CACHE
	$(RUN) python -m precompute --config "$(CONFIG)" $(SOURCE_FLAG) $(BASE_FLAG) $(CACHE_OUT_FLAG) $(ARGS)

train: setup  ## Stage 2: train a ControlNet for BASE from CACHE into OUTPUT
	$(RUN) $(LAUNCH) -m train --config "$(CONFIG)" $(BASE_FLAG) $(CACHE_IN_FLAG) $(OUTPUT_FLAG) $(ARGS)

infer: setup  ## Stage 3: draw pictures with BASE and OUTPUT's ControlNet
	$(RUN) python -m infer generate --config "$(CONFIG)" $(BASE_FLAG) $(CONTROLNET_FLAG) $(IMAGES_FLAG) $(ARGS)

verify: setup  ## Check every record of CACHE
	$(RUN) python -m shards verify "$(or $(CACHE),$(DEMO)/cache)"

test: setup  ## The tests that take seconds
	$(RUN) python -m pytest -m "not slow and not gpu and not network" $(ARGS)

lint: setup  ## ruff and mypy --strict
	$(RUN) ruff check . && ruff format --check . && mypy

check: lint  ## lint, and all tests that need neither GPU nor network
	$(RUN) python -m pytest -m "not gpu and not network" $(ARGS)

clean:  ## Remove what make made: .venv and runs/demo
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache *.egg-info
