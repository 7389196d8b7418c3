# `make` alone lists the targets. Everything that runs installs first what it needs, once.
#
#   PYTHON=python3.12   the Python to make the environment with (3.11, 3.12 or 3.13)
#   DEVICE=cuda         vLLM's CUDA build, in .venv-cuda, instead of the CPU build in .venv
#   ARGS="..."          more options for the command behind a target

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help install serve test test-all lint check wheel soak format demo lock clean

DEVICE ?= cpu
VENV := .venv$(if $(filter cuda,$(DEVICE)),-cuda)
BIN := $(VENV)/bin
export PYTHON

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= deploy/demo/model
NAME ?= assent-demo
PROXIES ?= aligned=deploy/demo/proxies/aligned polite=deploy/demo/proxies/polite

# Two workers (tests/conftest.py says who gets what).
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

help:  ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install:  ## install everything into .venv (DEVICE=cuda: into .venv-cuda)
	@deploy/install/install.sh $(DEVICE)

serve: install  ## serve the demo model and its proxies (MODEL, NAME, PROXIES, HOST, PORT, ARGS)
	@exec $(BIN)/python -m server --model $(MODEL) --served-model-name $(NAME) \
		$(addprefix --proxy ,$(PROXIES)) --host $(HOST) --port $(PORT) $(ARGS)

test: install  ## run the tests, but for the slow ones (ARGS="tests/proxy -x")
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install  ## run all tests: before a release, and after a change to what the slow ones are about
	$(PYTEST) $(ARGS)

lint: install  ## formatter, linter and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

wheel: install  ## build the wheel, and try it in an empty environment and an empty directory
	deploy/install/wheel.sh

check: lint test wheel  ## all that CI runs

soak: install  ## a crowd of clients for 15 minutes, on a server of its own (ARGS="--minutes 1")
	$(BIN)/python -m benchmarks.soak $(ARGS)

format: install  ## format the code and mend what the linter can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

demo: install  ## train the demo again: frozen LLM, proxies and judge into deploy/demo
	$(BIN)/python -m training.demo --output deploy/demo --overwrite $(ARGS)

lock:  ## pin the dependencies in pyproject.toml again (ARGS=--upgrade: newest of all)
	deploy/install/lock.sh $(ARGS)

clean:  ## remove the environments and all caches (runs/ stays)
	rm -rf .venv .venv-cuda .venv*.lock build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find judge proxy server training tests -name __pycache__ -prune -exec rm -rf {} +
