# `make` alone lists the targets. Everything that runs installs first what it needs, once.
#
#   PYTHON=python3.12   the Python to make the environment with (3.11, 3.12 or 3.13)
#   DEVICE=cuda         vLLM's CUDA build, in .venv-cuda, instead of the CPU build in .venv
#   DEMO=toy            serve the toy demo, which needs no download; or MODEL=DIR: a model of your own
#   ARGS="..."          more options for the command behind a target

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help install serve test test-all test-triton lint docs check wheel soak format demo lock clean

DEVICE ?= cpu
VENV := .venv$(if $(filter cuda,$(DEVICE)),-cuda)
BIN := $(VENV)/bin
export PYTHON

HOST ?= 127.0.0.1
PORT ?= 8000
DEMO ?= smollm2
ifdef MODEL
NAME ?= $(notdir $(MODEL:/=))
else ifeq ($(DEMO),toy)
MODEL := deploy/demo/model
NAME ?= assent-demo
PROXIES ?= $(call named,deploy/demo/proxies)
else ifeq ($(DEMO),smollm2)
MODEL = $$($(BIN)/python -m deploy.demo.smollm2.convert)
NAME ?= smollm2
PROXIES ?= $(call named,deploy/demo/smollm2/proxies)
JUDGES ?= deploy/demo/smollm2/judge
else
$(error DEMO is '$(DEMO)'; it can be smollm2 or toy)
endif
named = $(foreach path,$(wildcard $(1)/*/),$(notdir $(path:/=))=$(path:/=))

# Three workers, of which one is often waiting (tests/conftest.py says who gets what).
PYTEST := $(BIN)/python -m pytest --numprocesses 3 --dist loadfile

help:  ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install:  ## install everything into .venv (DEVICE=cuda: into .venv-cuda)
	@deploy/install/install.sh $(DEVICE)

serve: install  ## serve the demo: SmolLM2, its proxies and judge (DEMO=toy, MODEL, NAME, PROXIES, JUDGES, HOST, PORT, ARGS)
	@model=$(MODEL) && exec $(BIN)/python -m server --model "$$model" --served-model-name $(NAME) \
		$(addprefix --proxy ,$(PROXIES)) $(addprefix --judge ,$(JUDGES)) --host $(HOST) --port $(PORT) $(ARGS)

test: install  ## run the tests, but for the slow ones (ARGS="tests/proxy -x")
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install  ## run all tests: before a release, and after a change to what the slow ones are about
	$(PYTEST) $(ARGS)

test-triton: install  ## run what is for GPUs in Triton's interpreter: our kernels, and engines of Model Runner V2
	[ -d .triton ] || $(BIN)/python -m pip install --quiet --no-deps --target .triton triton==3.7.1
	PYTHONPATH=.triton $(BIN)/python -m tests.proxy.gpu_kernel
	PYTHONPATH=.triton $(BIN)/python -m tests.proxy.model_runner_v2

lint: install  ## formatter, linter and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: install .docs  ## build the docs site into site/ (ARGS=serve: show it while you write)
	$(BIN)/python -m deploy.docs.http_page docs/reference/http.md
	.docs/bin/zensical $(or $(ARGS),build --strict)

.docs: pyproject.toml
	$(BIN)/python -m venv --clear $@
	$@/bin/python -m pip install --quiet --upgrade pip
	$@/bin/python -m pip install --quiet --group docs
	@touch $@

wheel: install  ## build the wheel, and try it in an empty environment and an empty directory
	deploy/install/wheel.sh

check: lint docs test test-triton wheel  ## all that CI runs

soak: install  ## a crowd of clients for 15 minutes, on a server of its own (ARGS="--minutes 1")
	$(BIN)/python -m benchmarks.soak $(ARGS)

format: install  ## format the code and mend what the linter can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

demo: install  ## train the toy demo again: frozen LLM, proxies and judge into deploy/demo
	$(BIN)/python -m training.demo --output deploy/demo --overwrite $(ARGS)

lock:  ## pin the dependencies in pyproject.toml again (ARGS=--upgrade: newest of all)
	deploy/install/lock.sh $(ARGS)

clean:  ## remove the environments and all caches (runs/ stays)
	rm -rf .venv .venv-cuda .venv*.lock .triton .docs .cache site build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find judge proxy server training tests -name __pycache__ -prune -exec rm -rf {} +
