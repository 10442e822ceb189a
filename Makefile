# Everything a user types. `make demo` or `make test` may be the first command on a fresh clone:
# each creates .venv, installs into it and runs. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
# One TOML file, or several between quotes: later ones win.
CONFIG ?= configs/demo.toml
# The graphics card that all stages have to fit: 12gb and others of configs/cards/, or auto.
CARD   ?=
# What runs stages 1 and 2; on several GPUs: LAUNCH="accelerate launch --num_processes 8"
LAUNCH ?= python
ARGS   ?=

RUN     := . $(VENV)/bin/activate &&
# One process per core with one thread each: the models are too small for more.
TESTS   := $(RUN) OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal
# Who names data or a base of their own, and no CONFIG, gets no setting of the demo.
STAGES  := $(filter precompute train infer score serve,$(MAKECMDGOALS))
ifneq ($(and $(STAGES)$(filter fits,$(MAKECMDGOALS)),$(filter file,$(origin CONFIG)),$(SOURCE)$(BASE)$(CACHE)$(OUTPUT)),)
CONFIG  :=
endif
# pip compiles one file after the other, compileall on all cores. Tests, and the hundreds of models of
# transformers, are left to Python, which compiles what it imports. A package may hold files that are
# not for this Python: that is no failure.
define INSTALL
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e ".[$(1)]"
	$(VENV)/bin/python -m compileall -q -j 0 -x '/(tests|transformers/models)/' $(VENV)/lib || true
endef
STAMP   := $(VENV)/.installed
DEV_STAMP   := $(VENV)/.installed-dev
SERVE_STAMP := $(VENV)/.installed-serve
CHECK_STAMP := $(VENV)/.installed-check
# Not written in the call: commas end arguments there.
CHECK_EXTRAS := bitsandbytes,browser,deepspeed,energon,lora,notebook,prodigy,schedulefree,serve
GPU_STAMP   := $(VENV)/.installed-gpu
IS_DEMO := $(filter %demo.toml %demo-fast.toml %demo-full.toml,$(CONFIG))

CONFIG_FLAGS    = $(foreach file,$(CONFIG),--config "$(file)")
# Where SOURCE, BASE, CACHE or OUTPUT is not given, the configuration's own path stands.
SOURCE_FLAG     = $(if $(SOURCE),--source "$(SOURCE)")
BASE_FLAG       = $(if $(BASE),--pretrained-model-name-or-path "$(BASE)")
CACHE_FLAG      = $(if $(CACHE),--cache "$(CACHE)")
OUTPUT_FLAG     = $(if $(OUTPUT),--output-dir "$(OUTPUT)")
CARD_FLAG       = $(if $(CARD),--card "$(CARD)")
CONTROLNET_FLAG = $(if $(OUTPUT),--controlnet "$(OUTPUT)")
IMAGES_FLAG     = $(if $(OUTPUT),--output-dir "$(OUTPUT)/images")
SERVE_FLAG      = $(if $(OUTPUT),--output-dir "$(OUTPUT)/served")
SIZE_FLAG       = $(if $(SIZE),--size "$(SIZE)")
SCORE_FLAG      = $(if $(OUTPUT),--output-dir "$(OUTPUT)/score")

# Without a CONFIG a stage has to be told everything.
NEEDED_precompute := SOURCE BASE CACHE
NEEDED_train      := BASE CACHE OUTPUT
NEEDED_infer      := BASE OUTPUT
NEEDED_score      := SOURCE BASE OUTPUT
NEEDED_serve      := BASE OUTPUT
ifeq ($(CONFIG),)
$(foreach stage,$(STAGES),$(foreach name,$(NEEDED_$(stage)),$(if $($(name)),,\
  $(error make $(stage) also needs $(name)=…, or CONFIG=configs/sd35-medium.toml))))
endif

# A variable that a target would not look at is refused.
ifneq ($(and $(CARD),$(filter circles demo demo-full verify fits,$(MAKECMDGOALS))),)
ifeq ($(STAGES),)
$(error CARD=$(CARD) is for make precompute, train, infer, score and serve; leave it out)
endif
endif
ifeq ($(sort $(MAKECMDGOALS)),fits)
$(foreach name,SOURCE CACHE OUTPUT,$(if $($(name)),\
  $(error $(name)=$($(name)): make fits does not look at it; leave it out)))
endif
ifneq ($(and $(filter demo,$(MAKECMDGOALS)),$(filter-out 0,$(FAST)),$(filter-out file,$(origin CONFIG))),)
$(error FAST=1 is configs/demo-fast.toml; give it or CONFIG=$(CONFIG), not both)
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo demo-full circles precompute train infer score serve verify fits test lint check mutate gpu clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-13s %s\n", $$1, $$2 }'
	@echo
	@echo 'The stages run the demo by default. With your own data and a base model:'
	@echo '  make precompute SOURCE=photos BASE=sd3 CACHE=cache ARGS="--conditioning-from canny"'
	@echo '  make train      CONFIG=configs/sd35-medium.toml CACHE=cache OUTPUT=out ARGS="--train-batch-size 8"'
	@echo 'CONFIG brings a base and settings that go with it; without it the defaults stand.'
	@echo 'Variables: CONFIG CARD SOURCE BASE CACHE OUTPUT MEMORY ARGS LAUNCH SIZE, and PYTHON for setup.'

setup: $(STAMP)  ## Create .venv and install what all stages need into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11, 3.12, 3.13 or 3.14 is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 15))' || \
	  echo "Warning: $$($(PYTHON) --version) has not been tried; 3.11 to 3.14 have." >&2
	@echo "Creating $(VENV) with $$($(PYTHON) --version) and installing PyTorch, diffusers and others into it."
	@echo "This takes a few minutes and 2 GB, or several GB more where PyTorch comes with CUDA."
	$(PYTHON) -m venv $(VENV)
	$(call INSTALL,canny)
	@touch $@
	@echo "$(VENV) is ready."

$(DEV_STAMP): $(STAMP)
	$(call INSTALL,dev)
	@touch $@

$(SERVE_STAMP): $(STAMP)
	$(call INSTALL,serve)
	@touch $@

$(CHECK_STAMP): $(DEV_STAMP)
	$(call INSTALL,$(CHECK_EXTRAS))
	@touch $@

$(GPU_STAMP): $(DEV_STAMP)
	$(call INSTALL,bitsandbytes)
	@touch $@

demo: setup  ## Run the whole pipeline on a laptop in seven minutes; with FAST=1 in two, learning nothing
	$(RUN) python -m demo $(if $(filter-out 0,$(FAST)),--config configs/demo-fast.toml,$(CONFIG_FLAGS))

demo-full: setup  ## Run the demo with longer training, in half an hour
	$(RUN) python -m demo --config configs/demo-full.toml

circles: setup  ## Draw the demo's data set
	$(RUN) python -m demo.circles $(CONFIG_FLAGS)

precompute: setup $(if $(IS_DEMO),$(if $(SOURCE),,circles))  ## Stage 1: encode SOURCE with BASE's encoders into CACHE
	$(RUN) $(LAUNCH) -m precompute $(CONFIG_FLAGS) $(CARD_FLAG) $(SOURCE_FLAG) $(BASE_FLAG) $(CACHE_FLAG) $(ARGS)

train: setup  ## Stage 2: train a ControlNet for BASE from CACHE into OUTPUT
	$(RUN) $(LAUNCH) -m train $(CONFIG_FLAGS) $(CARD_FLAG) $(BASE_FLAG) $(CACHE_FLAG) $(OUTPUT_FLAG) $(ARGS)

infer: setup  ## Stage 3: draw pictures with BASE and OUTPUT's ControlNet
	$(RUN) python -m infer generate $(CONFIG_FLAGS) $(CARD_FLAG) $(BASE_FLAG) $(CONTROLNET_FLAG) $(IMAGES_FLAG) $(ARGS)

serve: setup $(SERVE_STAMP)  ## Serve a web page where OUTPUT's ControlNet follows what you draw
	$(RUN) python -m infer serve $(CONFIG_FLAGS) $(CARD_FLAG) $(BASE_FLAG) $(CONTROLNET_FLAG) $(SERVE_FLAG) $(ARGS)

score: setup  ## Measure how well OUTPUT's ControlNet draws SOURCE
	$(RUN) python -m infer score $(CONFIG_FLAGS) $(CARD_FLAG) $(SOURCE_FLAG) $(BASE_FLAG) $(CONTROLNET_FLAG) $(SCORE_FLAG) $(ARGS)

verify: setup  ## Check every record of CACHE
	$(RUN) python -m shards verify "$(or $(CACHE),$(if $(IS_DEMO),runs/$(basename $(notdir $(IS_DEMO)))/cache,$(error Say which: make verify CACHE=…)))"

fits: setup  ## Say what all stages need of a card, and whether one of MEMORY GB has it: CONFIG=configs/sd35-medium.toml MEMORY=8
	$(RUN) python -m benchmarks.memory.fits $(CONFIG_FLAGS) $(BASE_FLAG) $(if $(MEMORY),--memory "$(MEMORY)") $(ARGS)

test: setup $(DEV_STAMP)  ## Run the tests that take seconds
	$(TESTS) -m "not slow and not extras and not gpu and not network" $(ARGS)

lint: setup $(DEV_STAMP)  ## Run ruff and mypy --strict
	$(RUN) ruff check . && ruff format --check . && mypy

check: lint $(CHECK_STAMP)  ## Install the optional packages; run lint, and all tests that need neither GPU nor network
	$(TESTS) -m "not gpu and not network" $(ARGS)

mutate: setup $(DEV_STAMP)  ## Plant faults on purpose and count those that the quick tests find, in AREAS or everywhere
	$(RUN) python -m tests.mutation $(AREAS)

gpu: setup $(GPU_STAMP)  ## On a machine with a GPU: its tests, benchmarks and tables, in 25 minutes; SIZE=tiny tries them without
	$(RUN) python -m benchmarks.gpu $(SIZE_FLAG)

clean:  ## Remove .venv, the demo's runs and the tools' caches
	rm -rf $(VENV) runs/demo runs/demo-fast runs/demo-full runs/gpu runs/gpu-tiny .pytest_cache .mypy_cache .ruff_cache *.egg-info
