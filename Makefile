# Each target does its own set-up in .venv: only Python 3.9+ and pip are needed. After the install nothing uses a network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

# Older versions of hosts, each in a folder of its own with what it does not share with the newest (WITH_...).
HOSTS := open_clip_torch-2.16.0 open_clip_torch-2.30.0 transformers-4.46.3 \
	sentence-transformers-3.4.1 sentence-transformers-5.1.0
BEFORE_5 := "huggingface_hub<1" "datasets==4.0.0"
WITH_transformers-4.46.3 := $(BEFORE_5) "tokenizers<0.21"
WITH_transformers-4.57.1 := $(BEFORE_5) "tokenizers<0.23.1"
WITH_sentence-transformers-3.4.1 := transformers==4.46.3 $(WITH_transformers-4.46.3)
WITH_sentence-transformers-5.1.0 := transformers==4.57.1 $(WITH_transformers-4.57.1)

.PHONY: help demo test quick docs hosts mutants clean

# A process for each core, whole files at a time: many tests share what their file trained.
IN_PARALLEL := -n logical --maxprocesses 8 --dist loadfile

# No trainer, no second rank, nothing compiled: some ten seconds of processor time, mypy aside (half a minute at first).
QUICK := $(patsubst %,tests/test_%.py,core config fields tables hits diagnostics losses docs mutants) \
	-k "not (rank or golden or openclips or compiles or sparse)"

help:
	@echo "make demo   train a small OpenCLIP model plain and with MM-TS, and compare them (minutes, no GPU)"
	@echo "make test   lint, type-check and test everything"
	@echo "make quick  lint, type-check and the quick tests (under a minute)"
	@echo "make hosts  older versions of the trainers, which 'make test' tests as well"
	@echo "make docs   the documents as a site, in build/site; a broken link is an error"
	@echo "make mutants   break the code on purpose, a line at a time, and see a test fail each time (long)"
	@echo "make clean  remove .venv and the demo's output"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras; .dev holds all of .all.
$(VENV)/.all: pyproject.toml | $(VENV)/bin/python
	@test -e $(VENV)/.dev || { echo "Installing into $(VENV) (PyTorch and the trainers: some minutes)"; \
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[all]'; }
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV) (PyTorch, the trainers and the test tools: some minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.all
	$(BIN)/mmts demo --output mmts_demo --force

$(VENV)/hosts/%: | $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@.part \
	"$$(echo $* | sed 's/-\([0-9.]*\)$$/==\1/')" $(WITH_$*)
	@rm -rf $@ && mv $@.part $@

hosts: $(addprefix $(VENV)/hosts/,$(HOSTS))

test: $(VENV)/.dev hosts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL)

quick: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(QUICK)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants/run.py

clean:
	rm -rf $(VENV) mmts_demo
