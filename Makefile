# Every target that runs something sets up .venv first; once that is done it costs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-gpu bench bench-gpu check freeze clean

PY := .venv/bin/python
STAMP := .venv/.setup-stamp
PYTEST := $(PY) -m pytest
# Tests run small models: more threads than cores would only fight over them.
# Two at a time: many tests start ranks of their own. Set to 0 to debug in one process. Files go to
# the workers in order of their folders: the longest first, unit tests last.
WORKERS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONFAULTHANDLER=1

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(STAMP): pyproject.toml constraints.txt deploy/setup.sh
	@deploy/setup.sh
	@touch $@

setup: ## install everything into .venv (settings: EXTRAS, PYTHON, TORCH_INDEX_URL)
	@deploy/setup.sh

demo: $(STAMP) ## convert, pre-train, resume and paint on this machine (settings: SRC, URI, OUT, STEPS, MINUTES)
	$(PY) -m train.demo $(if $(SRC),--src '$(SRC)') $(if $(URI),--uri '$(URI)') --run-dir '$(or $(OUT),runs/demo)' \
	  $(if $(STEPS),--steps '$(STEPS)') $(if $(MINUTES),--minutes '$(MINUTES)')

test: $(STAMP) ## all tests that need no GPU
	$(TEST_ENV) $(PYTEST) -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=12 --durations-min=5 $(ARGS)

test-unit: $(STAMP) ## the fast tests, under a minute
	$(TEST_ENV) $(PYTEST) tests/unit -m "not slow and not gpu and not slurm" -n $(WORKERS) --dist loadfile $(ARGS)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PYTEST) -m gpu tests/gpu $(ARGS)

bench: $(STAMP) ## loader, storage and conversion beside their peers, on an idle machine
	$(PY) -m pipeline.bench --peers --folder runs/bench --report runs/bench/loaders.md $(ARGS)
	$(PY) -m pipeline.storage_bench --runs 5
	$(PY) -m pipeline.convert_bench

bench-gpu: $(STAMP) ## the loader on a CUDA device by decoder and share of the JPEG engine; the training step by model and mode
	$(PY) -m pipeline.bench --peers --device cuda --batch-size 256 --folder runs/bench --report runs/bench/loaders-gpu.md $(ARGS)
	$(PY) -m train.step_bench --model vit_b_16 vit_l_16 vit_h_14 --images 64 128 256 --precision bf16 fp16 --steps 20
	$(PY) -m train.step_bench --model vit_l_16 vit_h_14 --images 128 --precision bf16 --compile off on \
	  --checkpointing none selective full --steps 20
	$(PY) -m train.step_bench --model vit_h_14 --images 64 --precision bf16 --optimizer fused foreach loops --steps 20

check: $(STAMP) ## lint, format, types, import arrows, page of settings, shell scripts, Dockerfile
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo
	$(PY) -m train.settings.reference --check
	.venv/bin/shellcheck deploy/setup.sh .ci/run
	.venv/bin/hadolint deploy/Dockerfile

freeze: $(STAMP) ## write the installed versions into constraints.txt
	@sed '/^# Frozen/q' constraints.txt > constraints.new
	@$(PY) -m pip list --format freeze --exclude-editable \
	  | grep -viE '^(pip|setuptools|wheel|ffcv)==' \
	  | grep -viE "^($$(sed -n '/^# Frozen/q; s/^\([A-Za-z0-9_.-]*\)[=<>].*/\1/p' constraints.txt | paste -sd'|' -))==" \
	  | sed 's/+[a-z0-9]*$$//' >> constraints.new
	@mv constraints.new constraints.txt

clean: ## remove caches; .venv and runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist
	find pipeline model train deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +
