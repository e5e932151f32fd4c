# The two commands of the README, and what they are made of. `make help` lists the targets.
# Everything that needs thought is in tools/*.py; this file only names it.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
HOST ?= 127.0.0.1
MODEL ?=
SPECULATE ?=
ARGS ?=
JOBS ?= 2
TORCH_INDEX ?=

BIN = $(VENV)/bin
# In JOBS processes, whose idle threads leave the cores to each other. "load" keeps the order: vLLM's
# engines bind the threads of their process for good, so that tests/vllm must come last in each.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses "$(JOBS)" --dist load

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-fast test-versions lint format build clean

help: ## list the targets and settings
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22
	@echo "settings: MODEL=path-or-name HOST=$(HOST) PORT=$(PORT) ARGS=\"options of vllm serve\""
	@echo "          SPECULATE=ngram|draft (draft: of the demo model)"
	@echo "          VENV=$(VENV) PYTHON=$(PYTHON) TORCH_INDEX=address-of-PyTorch's-CPU-wheels"
	@echo "          ARGS also goes to pytest: make test ARGS=\"-k server\"; JOBS=0: in one process"

# The script itself sees what is up to date, and a lock keeps two of them apart.
setup: ## make the environment and build the kernels
	@$(PYTHON) tools/setup_env.py --venv "$(VENV)" --torch-index "$(TORCH_INDEX)"

serve: setup ## start the server (makes the demo model when MODEL is not given)
	@$(BIN)/python tools/serve.py --host "$(HOST)" --port "$(PORT)" --model "$(MODEL)" \
		--speculate "$(SPECULATE)" -- $(ARGS)

test: setup ## run every test
	@$(PYTEST) $(ARGS)

test-fast: setup ## run what starts no engine, server or benchmark and compiles nothing: two minutes
	@$(PYTEST) -m "not engine and not server and not build and not run" $(ARGS)

test-versions: setup ## run tests beside other versions of vLLM, transformers and torch: an hour
	@$(BIN)/python -m tools.test_versions --torch-index "$(TORCH_INDEX)" $(ARGS)

lint: setup ## check style, types and formatting of everything
	@PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files --color never

format: setup ## rewrite the sources in the house format
	@-$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .
	@PATH="$(abspath $(BIN)):$$PATH" python tools/clang_format.py

build: setup ## build the wheel and the source archive into dist/
	@$(BIN)/python -m build

clean: ## remove what was built (not the environment, not the demo model)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bmc_core bmc_deepspeed bmc_transformers bmc_vllm benchmarks tests tools -name __pycache__ -prune -exec rm -rf {} +
	find bmc_core -name '*.so' -delete
	rm -f "$(VENV)/.bmc-setup/package"
