# Each target calls one program; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help ready programs demo test check images cluster-up cluster-down crds

PYTHON := .venv/bin/python
# uv is taken from PATH, else installed once beside the other tools that we build, outside the work tree.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tunewright
UV := $(or $(shell command -v uv),$(CACHE)/uv/bin/uv)

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(CACHE)/uv/bin/uv:
	python3 -m venv $(CACHE)/uv && $(CACHE)/uv/bin/pip install --quiet uv

.venv/.ready: uv.lock pyproject.toml | $(filter $(CACHE)/%,$(UV))
	$(UV) sync --frozen --all-extras --quiet --compile-bytecode
	@touch $@

# The environment mostly waits for the network, the programs for processors.
ready:
	@$(MAKE) --no-print-directory -j2 .venv/.ready programs

programs: ## what a single-machine Kubernetes consists of, built from source once a machine
	python3 -m tests.cluster build

demo: ready ## the quick start: a cluster, a tuned model that answers, in three minutes once everything is built
	$(PYTHON) -m examples.quickstart.demo

test: $(if $(filter 1,$(FAST)),.venv/.ready,ready) ## every test there is; FAST=1 leaves out those that need a cluster
	$(PYTHON) -m tests

check: .venv/.ready ## format, lint, types, import contracts, generated files
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports
	$(PYTHON) -m tests.generated

crds: .venv/.ready ## write the CustomResourceDefinitions from the typed models, for crds/ and the chart
	$(PYTHON) -m tests.generated --write

images: ## build the operator's, the front end's and the trainer's image (6 GB): files for `docker load`, imported into the cluster `dev` if it is up
	python3 -m tests.cluster images --name dev --only operator --only api --only trainer

cluster-up: ## a single-machine Kubernetes named `dev`, with object storage
	python3 -m tests.cluster up --name dev

cluster-down: ## stop it and remove what it left
	python3 -m tests.cluster down --name dev
