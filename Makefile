# What needs .venv sets it up on its first use; nothing else needs installing, but for `browser` Chromium.
PROFILE ?= mini
RESULTS ?= book/results
TRAIN   ?= 0
DATA    ?=
SEEDS   ?=
FIGURES ?= all
PYTHON  ?= python3

# For instance: make figures PROFILE=mini DATA=/data/cifar10 TRAIN=1 FIGURES="figure4 figure5"
# They reach commands as they were given, whatever signs they hold: through the environment, expanded by nobody.
GIVEN := PROFILE RESULTS TRAIN DATA SEEDS FIGURES QUICK KILLS RUN
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export $(GIVEN)

BIN      := .venv/bin
READY    := .venv/.ready
CHAPTERS := $(wildcard chapters/*.ipynb)
NAMES    := $(basename $(notdir $(CHAPTERS)))
EXECUTED := book/chapters
# kernels with no start-up files of the user's, which leave it to papermill to say what went wrong
KERNELS  := build/ipython
CORES    := $(shell getconf _NPROCESSORS_ONLN)

define TRAIN_MISSING
set -ef; $(BIN)/python -m gstlib run $$FIGURES --profile="$$PROFILE" --results="$$RESULTS" \
  $${DATA:+--data="$$DATA"} $${SEEDS:+--seeds="$$SEEDS"}
endef

# refuses bad parameters before it removes anything; $$drawn is what the pages that are there were drawn from, $$state
# what they would be drawn from now; chapters in reverse, because the longest (prune, which trains) must not begin last
define DRAW
set -e; state=$$($(BIN)/python -m gstlib.book.notebook $(NAMES)); \
if test "$$state" != "$$drawn"; then \
  rm -rf $(EXECUTED); mkdir -p $(EXECUTED) $(KERNELS)/profile_default; \
  echo 'c.IPKernelApp.log_level = "CRITICAL"' > $(KERNELS)/profile_default/ipython_kernel_config.py; \
  export IPYTHONDIR="$$PWD/$(KERNELS)"; \
  printf '%s\n' $(NAMES) | sort -r | xargs -P $(CORES) -n 1 sh -c '$(BIN)/papermill --no-progress-bar --log-level ERROR \
    chapters/$$0.ipynb $(EXECUTED)/$$0.ipynb -k python3 -r profile "$$PROFILE" -r results "$$RESULTS" \
    -r output $(EXECUTED)/figures $${DATA:+-r data "$$DATA"} $${SEEDS:+-r seeds "$$SEEDS"}'; \
  echo "$$state" > $(EXECUTED)/.drawn; \
fi
endef

.DEFAULT_GOAL := help
.PHONY: help smoke train figures book test audit bench faults browser readme clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@printf '  Variables: PROFILE=%s RESULTS=%s TRAIN=%s FIGURES=%s DATA=%s SEEDS=%s\n' \
	  "$$PROFILE" "$$RESULTS" "$$TRAIN" "$$FIGURES" "$$DATA" "$$SEEDS"

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[book,test]'
	touch $@

smoke: override PROFILE := smoke
smoke: override RESULTS := results
smoke: override TRAIN := 1
smoke: override FIGURES := all
smoke: override DATA :=
smoke: override SEEDS :=
smoke: book ## train, draw and build the whole book at the smallest size, from nothing
	@echo "Open book/_build/html/index.html; the figures are in $(EXECUTED)/figures/."

train: $(READY) ## train what RESULTS lacks of FIGURES (default: all) at PROFILE
	$(TRAIN_MISSING)

figures: $(READY) ## redraw every figure from RESULTS (TRAIN=1: train first what is missing)
	test "$$TRAIN" != 1 || { $(TRAIN_MISSING); }
	drawn=; $(DRAW)

book: $(READY) ## build the book from RESULTS, figures redrawn where they are out of date; warnings are errors
	test "$$TRAIN" != 1 || { $(TRAIN_MISSING); }
	drawn=$$(cat $(EXECUTED)/.drawn 2>/dev/null || :); $(DRAW)
	rm -rf book/_build
	$(BIN)/jupyter-book build book/ --all -W -n --keep-going --quiet
	test -f book/_build/html/index.html

test: $(READY) ## run the tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

audit: $(READY) ## train a random stored run of PROFILE again and compare its rows (DATA=its images; RUN=id: that one)
	set -f; $(BIN)/python -m gstlib audit --profile="$$PROFILE" --results="$$RESULTS" $${DATA:+--data="$$DATA"} $${RUN:+--run="$$RUN"}

bench: $(READY) ## measure the engine against a plain PyTorch loop (QUICK=1: in minutes)
	$(BIN)/python -m gstlib bench $${QUICK:+--quick} --output build/bench.json

faults: $(READY) ## try to break what keeps runs, and keep what was seen in RESULTS (KILLS=100)
	$(BIN)/python tests/faults.py $${KILLS:+--kills="$$KILLS"} --output="$$RESULTS/faults.json"

browser: $(READY) ## open every page of the built book in Chromium (build it first)
	$(BIN)/python -m pytest -m browser

readme: $(READY) ## write what the README says of RESULTS, and its moving picture
	$(BIN)/python -m gstlib.book.readme "$$RESULTS"

clean: ## remove the built book, its executed chapters and build/
	rm -rf book/_build $(EXECUTED) build
