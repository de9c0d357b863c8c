# The two that matter: make quickstart, make test. Both install what they need first. `make help` lists the rest.

# Which recipe `make sft`, `make reward`, `make dpo` and `make self-contrast` run; when not set the one of that name in recipes/.
RECIPE ?=
# The first Python that is new enough; python3 when none is, and the installer says what to do.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
# Where pip looks for the CPU build of torch when its own index has none: the CPU index URL shown on pytorch.org's Get Started page.
TORCH_INDEX ?=
export TORCH_INDEX

.PHONY: help setup quickstart sft reward dpo ppo pipeline self-contrast test test-plain-cpu check bench gpu doctor clean
.DEFAULT_GOAL := help

help: ## what you can make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: RECIPE=file, PYTHON=python3.11, TORCH_INDEX=url"

setup: ## install the pinned packages into .venv (a second call does nothing)
	@$(PYTHON) requirements/install.py

quickstart: setup ## align a real 135M model on this machine and show before and after
	@.venv/bin/align run quickstart

sft: setup ## supervised fine-tuning: RECIPE=recipes/sft.yaml, or yours
	@.venv/bin/align sft --recipe $(or $(RECIPE),recipes/sft.yaml)

reward: setup ## reward model: RECIPE=recipes/reward.yaml, or yours
	@.venv/bin/align reward --recipe $(or $(RECIPE),recipes/reward.yaml)

dpo: setup ## preference optimisation: RECIPE=recipes/dpo.yaml, or yours
	@.venv/bin/align dpo --recipe $(or $(RECIPE),recipes/dpo.yaml)

ppo: setup ## reinforcement learning from a reward model: RECIPE=recipes/ppo.yaml, or yours
	@.venv/bin/align run --recipe $(or $(RECIPE),recipes/ppo.yaml)

pipeline: setup ## ChatGLM-RLHF from end to end: RECIPE=recipes/chatglm_rlhf.yaml, or yours
	@.venv/bin/align run --recipe $(or $(RECIPE),recipes/chatglm_rlhf.yaml)

self-contrast: setup ## align from conversations alone: RECIPE=recipes/self_contrast.yaml, or yours
	@.venv/bin/align run --recipe $(or $(RECIPE),recipes/self_contrast.yaml)

test: setup ## run the tests
	@.venv/bin/python -m pytest -n 2 --dist loadfile

# Another processor's arithmetic, from the same libraries: sums in another order, products in other kernels.
PLAIN_CPU = ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41

test-plain-cpu: setup ## run the numeric tests once more, as on a processor without AVX
	@$(PLAIN_CPU) .venv/bin/python -m pytest -n 2 --dist loadfile tests/oracles tests/invariants

check: setup ## lint, format and types
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy

bench: setup ## measure speed and memory
	@.venv/bin/python -m benchmarks

gpu: setup ## on an NVIDIA GPU: its tests, speed and memory, in eight minutes
	@.venv/bin/python -m benchmarks gpu

doctor: setup ## say whether this environment fits together
	@.venv/bin/align doctor

clean: ## remove caches and build results; keeps .venv and runs/
	@rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find align tests benchmarks requirements -name __pycache__ -type d -prune -exec rm -rf {} +
