# make run | test | test-slow | test-python | check | matrix | test-vllm | test-engines | test-clients | test-charts | test-fixtures | test-containers | cubins | site | compiled | test-compiled | sanitize | soak | fuzz | bench | docs | clean
#
# Needs GNU make, Python 3.11-3.13 with pip and venv, and C and C++ compilers for the kernel and a test. Everything else
# is installed into .venv, pinned by constraints.txt, again only when pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:

PYTHON ?= python3
ARGS ?=
ENGINES ?=
VERSIONS ?=
BIN := .venv/bin
PINS := pyproject.toml constraints.txt
# COMPILED=1: a target's real processes run the compiled form, which `make compiled` builds.
COMPILED ?=
ON_COMPILED := env PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/compiled:$(CURDIR) $(BIN)/pytest -p no:cacheprovider
PYTEST := $(if $(COMPILED),$(ON_COMPILED),$(BIN)/pytest)
# Four also on two cores, since many tests wait for real processes; each takes 1 GB. 0: all in the process of pytest.
WORKERS ?= 4
IN_PARALLEL = -n $(WORKERS) --dist worksteal
# Without bytecode on disk, every start of a test or a worker would compile torch's thousands of modules again.
INSTALL := env -u PYTHONDONTWRITEBYTECODE $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt

.PHONY: help run test test-slow test-python check matrix test-vllm test-engines test-clients test-charts test-fixtures test-containers cubins site compiled test-compiled sanitize soak fuzz bench docs constraints clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

run: .venv/.installed ## The demo: scripted engine, traffic, a stall and its recovery; ARGS="--seconds 60" limits its duration
	@exec $(BIN)/sidecar demo $(ARGS)

test: check ## All checks, and all tests except those of the other test targets; ARGS go to pytest
	$(BIN)/pytest --ignore=tests/vllm --ignore=tests/containers -m "not vllm and not engines and not clients and not charts and not fixtures and not containers and not site and not matrix and not slow" $(IN_PARALLEL) --durations 15 $(ARGS)

check: .venv/.installed-test ## Format, lint, layers, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test-slow: .venv/.installed-test ## Tests that need minutes of real time
	$(BIN)/pytest -m slow $(ARGS)

test-fixtures: .venv/.installed-test ## Image files that others publish through every family of processors; fetches them first (50 MB)
	$(BIN)/python tests/images/public_files.py
	$(BIN)/pytest tests/images/test_public_files.py -m fixtures $(ARGS)

test-containers: .venv/.installed-test ## The image and the printed manifest in real containers: podman and runc, as root (4 GB of disk)
	$(BIN)/pytest tests/containers -m containers $(ARGS)

matrix: .venv/.installed-test ## Every hang mode and every alarm against the scripted engine; prints a table of the results
	$(PYTEST) -v -m matrix tests/e2e/test_matrix.py $(ARGS)

test-vllm: .venv/.installed-test ## Tests against a real vLLM on the CPU; installs it first (12 GB of disk, once)
	$(BIN)/python -m tests.vllm.engine_sources
	$(BIN)/python -m tests.vllm.scheduler_sources
	$(BIN)/pytest tests/vllm -m vllm $(ARGS)

test-engines: .venv/.installed-test ## The same cases next to real engines on the CPU; installs them first; ENGINES="llamacpp" for some
	$(BIN)/python -m tests.real_engines.environments $(ENGINES)
	$(BIN)/pytest tests/real_engines -m engines $(ARGS)

test-python: .venv/.installed-test ## The core's tests on Python 3.14 and 3.15, as root in a Debian sid that it makes; VERSIONS=3.15 for one
	$(BIN)/python -m tests.newer_pythons $(VERSIONS) -- $(ARGS)

test-clients: .venv/.installed-test ## The openai, anthropic, litellm and langchain clients through the relay; installs them first
	$(BIN)/python tests/e2e/clients/environment.py
	$(PYTEST) tests/e2e/test_clients.py -m clients $(ARGS)

test-charts: .venv/.installed-test ## The Helm chart and the Kustomize component by real helm and kubectl; installs them first (36 MB)
	$(BIN)/python tests/tools/kubernetes_tools.py
	$(BIN)/pytest tests/tools/test_charts.py -m charts $(ARGS)

site: .venv/.installed-test ## The documentation as a site in build/site, warnings as errors; its links, and what its search finds
	$(INSTALL) -e ".[site]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/pytest -m site tests/test_site.py $(ARGS)

cubins: .venv/.installed-test ## Compile the GPU's kernels for every architecture into kernels/cubins.zip; ARGS=--check compares, --table shows
	$(BIN)/python -m sidecar.kernels.compile_cubins $(ARGS)

compiled: .venv/.installed-test ## The sidecar with its hot path compiled (COMPILE=1), in build/compiled
	@if [ ! -e build/compiled/.made ] || [ -n "$$(find setup.py pyproject.toml sidecar kernels -newer build/compiled/.made -name '*.[pch]*' -print -quit)" ]; then
		rm -rf build/compiled build/lib.* # setuptools takes along what an earlier build left there
		COMPILE=1 $(BIN)/uv pip install --quiet --python $(BIN)/python --target build/compiled --no-deps .
		touch build/compiled/.made
	fi

test-compiled: compiled ## Conformance and connections of the relay, against build/compiled
	$(ON_COMPILED) $(IN_PARALLEL) tests/relay/conformance tests/relay/http \
		--deselect "tests/relay/http/test_client_connection.py::test_every_wait_for_a_client_ends" $(ARGS) # it shortens waits that are compiled in

sanitize: ## The compiled module under AddressSanitizer and UBSan over random images and bodies; ARGS="SECONDS SEED"
	mkdir -p build
	for level in -O1 -O3; do # -O3 is how it is shipped: some faults appear only when optimised
		for source in tests/images/sanitize.cpp tests/images/sanitize_jpeg.cpp tests/load/sanitize_scan.cpp; do
			$(CXX) -std=c++17 $$level -g -Wall -Wextra -ffp-contract=off -fno-sanitize-recover=all \
				-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero -DSIDECAR_LARGE=20000 \
				-DSIDECAR_INSTEAD_OF_AVX512='"halves.hpp"' -Itests/images -Ikernels/csrc $$source -o build/sanitize
			build/sanitize $(or $(ARGS),20)
		done
	done

soak: .venv/.installed-test ## 20 minutes of mixed load; memory and files of each process; ARGS="--minutes 3 --kills 3" for chaos
	$(BIN)/python benchmarks/soak.py $(ARGS)

fuzz: .venv/.installed-test ## Fuzz the parsers of headers, bodies and links, and the scanner; ARGS=SECONDS for each, default 60
	$(INSTALL) -e ".[fuzz]"
	for target in header body scan link request answer; do
		$(BIN)/python -m tests.fuzz $$target $(or $(ARGS),60)
	done

bench: .venv/.installed-test ## Every benchmark; ARGS="--write" keeps the results
	for file in $$(grep -l __main__ benchmarks/*.py); do # the others are imported by these
		[[ ! $$file =~ gpu_ ]] || continue # docs/gpu-day.md
		[[ ! $$file =~ nvml ]] || command -v nvidia-smi > /dev/null || continue
		echo "== $$file"
		$(BIN)/python "$$file" $(ARGS)
	done

docs: .venv/.installed-test ## Regenerate the tables of the documents, docs/verdict.md, deploy/kubernetes
	$(BIN)/python docs/generate.py

constraints: .venv/.installed-test ## Upgrade all packages and pin them in constraints.txt
	$(BIN)/uv pip install --upgrade --python $(BIN)/python --compile-bytecode -e ".[images,video,diagnose,orca,postgres,tokenizer,render,test,test-images,fuzz,site,lint]"
	{
		grep '^#' constraints.txt
		$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable
	} > constraints.new
	mv constraints.new constraints.txt

clean: ## Remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.made: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
		echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12" >&2
		exit 1
	}
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet -c constraints.txt uv
	touch $@

.venv/.installed: .venv/.made $(PINS)
	$(INSTALL) -e ".[images,diagnose]"
	touch $@

.venv/.installed-test: .venv/.made $(PINS)
	$(INSTALL) -e ".[images,video,diagnose,orca,postgres,tokenizer,render,test,test-images,lint]"
	touch $@ .venv/.installed
