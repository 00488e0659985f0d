# Every target sets up .venv on its first use; nothing else needs installing.
PROFILE ?= mini
RESULTS ?= book/results
TRAIN   ?= 0
DATA    ?=
SEEDS   ?=
FIGURES ?= all
PYTHON  ?= python3

# For instance: make figures PROFILE=mini DATA=/data/cifar10 TRAIN=1 FIGURES="figure4 figure5"
BIN      := .venv/bin
READY    := .venv/.ready
CHAPTERS := $(wildcard chapters/*.ipynb)
EXECUTED := book/chapters
# kernels with no start-up files of the user's, which leave it to papermill to say what went wrong
KERNELS  := build/ipython
CORES    := $(shell getconf _NPROCESSORS_ONLN)
# there when every chapter was executed with these parameters; older than a source or a run, it does not count
DRAWN    := $(EXECUTED)/.drawn-$(subst /,-,$(PROFILE)-$(RESULTS)-$(DATA)-$(SEEDS))

.DEFAULT_GOAL := help
.PHONY: help smoke train figures book test bench faults browser clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@echo "  Variables: PROFILE=$(PROFILE) RESULTS=$(RESULTS) TRAIN=$(TRAIN) FIGURES=$(FIGURES) DATA=… SEEDS=…"

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[book,test]'
	touch $@

smoke: ## train, draw and build the whole book at the smallest size, from nothing
	$(MAKE) --no-print-directory book PROFILE=smoke RESULTS=results TRAIN=1 FIGURES=all DATA= SEEDS=
	@echo "Open book/_build/html/index.html; the figures are in $(EXECUTED)/figures/."

train: $(READY) ## train what RESULTS lacks of FIGURES (default: all) at PROFILE
	$(BIN)/python -m gstlib run $(FIGURES) --profile $(PROFILE) --results $(RESULTS) \
	  $(if $(DATA),--data $(DATA)) $(if $(SEEDS),--seeds $(SEEDS))

figures: $(READY) ## redraw every figure from RESULTS (TRAIN=1: train first what is missing)
ifeq ($(TRAIN),1)
	$(MAKE) --no-print-directory train
endif
	rm -rf $(EXECUTED)
	$(MAKE) --no-print-directory $(DRAWN)

# runs/ itself is named because a run that is gone leaves no file to be newer
$(DRAWN): $(READY) $(CHAPTERS) $(wildcard gstlib/*.py gstlib/*/*.py $(RESULTS)/*.json $(RESULTS)/runs $(RESULTS)/runs/*.parquet)
	rm -rf $(EXECUTED)
	mkdir -p $(EXECUTED) $(KERNELS)/profile_default
	touch $(EXECUTED)/.begun
	echo 'c.IPKernelApp.log_level = "CRITICAL"' > $(KERNELS)/profile_default/ipython_kernel_config.py
	# in reverse, because the longest (prune, which trains) must not begin last
	printf '%s\n' $(basename $(notdir $(CHAPTERS))) | sort -r | IPYTHONDIR=$(CURDIR)/$(KERNELS) xargs -P $(CORES) -I NAME \
	  $(BIN)/papermill --no-progress-bar --log-level ERROR chapters/NAME.ipynb $(EXECUTED)/NAME.ipynb -k python3 \
	    -p profile $(PROFILE) -p results $(RESULTS) -p output $(EXECUTED)/figures \
	    $(if $(DATA),-p data $(DATA)) $(if $(SEEDS),-r seeds $(SEEDS))
	mv $(EXECUTED)/.begun $@

book: $(READY) ## build the book from RESULTS, figures redrawn where they are out of date; warnings are errors
ifeq ($(TRAIN),1)
	$(MAKE) --no-print-directory train
endif
	$(MAKE) --no-print-directory $(DRAWN)
	rm -rf book/_build
	$(BIN)/jupyter-book build book/ --all -W -n --keep-going --quiet
	test -f book/_build/html/index.html

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

bench: $(READY) ## measure the engine against a plain PyTorch loop (QUICK=1: in minutes)
	$(BIN)/python -m gstlib bench $(if $(QUICK),--quick) --output build/bench.json

faults: $(READY) ## try to break what keeps runs, and keep what was seen in RESULTS (KILLS=100)
	$(BIN)/python tests/faults.py $(if $(KILLS),--kills $(KILLS)) --output $(RESULTS)/faults.json

browser: $(READY) ## open every page of the built book in Chromium (build it first)
	$(BIN)/python -m pytest -m browser

clean: ## remove what the other targets made, stored results excepted
	rm -rf book/_build $(EXECUTED) build
