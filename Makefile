# Each target that needs a virtual environment makes it first; a second run finds it and starts at once.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
SEED ?= 0
EXAMPLES ?= 2000

VENV := .venv
READY := $(VENV)/.ready
# The pinned torch, except where a GPU asks for whatever build suits it.
CONSTRAINTS = $(shell nvidia-smi -L >/dev/null 2>&1 || echo -c constraints.txt)

BUILT := $(VENV)/.built
# CUDA kernels are of use only where there is a GPU; tests compile them all the same.
BUILD = $(shell nvidia-smi -L >/dev/null 2>&1 || echo GRADL1_CUDA=0)

.DEFAULT_GOAL := help
.PHONY: help demo test full coverage fuzz soak zoo sanitize kernels lint format docs wheel bench mutate gpu gpufull clean

help:  ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Settings: PYTHON=$(PYTHON) makes the virtual environment (3.10 or newer) and runs 'make gpu';"
	@echo "WORKERS=$(WORKERS) test processes; ARGS=... goes to the demo, pytest or the benchmark; OUT=folder for 'make gpu'."
	@echo "EXAMPLES=$(EXAMPLES) of each property for 'make fuzz', drawn from SEED=$(SEED), as are the deaths of 'make soak'."

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	GRADL1_CUDA=0 GRADL1_HOST=0 $(VENV)/bin/python -m pip install $(CONSTRAINTS) --editable ".[dev]"
	touch $@

# The compiled extension, built again when its sources change. Without a C++ compiler this still succeeds.
$(BUILT): $(READY) $(wildcard csrc/*.* csrc/*/*.*)
	$(BUILD) $(VENV)/bin/python -m pip install --no-deps --editable .
	touch $@

demo: $(BUILT)  ## train, quantize and compare on a CPU; writes gradl1-demo/report.html
	$(VENV)/bin/gradl1 demo $(ARGS)

test: $(BUILT)  ## all tests; those that need a GPU are skipped where there is none
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

full: $(BUILT)  ## all tests, and the long matrices of cases that `make test` thins out
	GRADL1_TEST_FULL=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Workers of pytest and processes that tests start write a file each, brought together at the end.
coverage: $(BUILT)  ## all tests again, slower: fails under 95 % of lines and branches; ARGS=tests/nn shows those of some
	$(VENV)/bin/coverage erase
	OMP_NUM_THREADS=1 $(VENV)/bin/coverage run -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

fuzz: $(BUILT)  ## many random networks and damaged files; SEED=1 EXAMPLES=10000 for others and more
	GRADL1_TEST_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal \
	tests/properties tests/readers --hypothesis-profile=fuzz --hypothesis-seed=$(SEED) $(ARGS)

soak: $(BUILT)  ## 2,000 penalised steps in peace, and through kills and interruptions, into gradl1-soak
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.training.soak gradl1-soak --seed $(SEED) $(ARGS)

# With the newest torch: what models of other libraries need.
ZOO := .venv-zoo
$(ZOO)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv --clear $(ZOO)
	$(ZOO)/bin/python -m pip install "torch==2.14.1" "torchvision==0.29.1" timm transformers rich safetensors onnx onnxscript onnxruntime
	touch $@

$(ZOO)/.built: $(ZOO)/.ready $(wildcard csrc/*.* csrc/*/*.*)
	GRADL1_CUDA=0 $(ZOO)/bin/python -m pip install --no-deps --editable .
	touch $@

zoo: $(ZOO)/.built  ## convert the models of timm, torchvision and transformers and compare; ARGS="--only resnet" for some
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -m tests.zoo $(ARGS)

sanitize: $(BUILT)  ## CPU loops and emulated CUDA kernels under AddressSanitizer and UBSan
	GRADL1_TEST_SANITIZE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) tests/compiled/test_emulated.py $(ARGS)

kernels: $(BUILT)  ## compile the CUDA kernels anew for every default architecture; print registers, fail on spills
	rm -rf build/tests/cuda
	GRADL1_TEST_FULL=1 $(VENV)/bin/python -m pytest tests/compiled/test_cuda_sources.py -k kernels $(ARGS)

lint: $(READY)  ## style, formatting, docstrings and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)  ## put the code into the form that lint asks for
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Not --quiet: what it hides is not counted as an error either.
docs: $(READY)  ## build the documentation into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(ARGS)

# Each wheel is built from the sdist, outside of build/, which may hold files that are no longer in the package. Without
# a build tag (1cpu, 1cuda) the two compiled wheels would have the same name.
WHEEL = $(VENV)/bin/python -m build --no-isolation --outdir dist
CUDA_WHEEL = $(if $(GRADL1_CUDA),$(filter 1,$(GRADL1_CUDA)), \
	$(shell PATH="$$PATH:$$CUDA_HOME/bin:$$CUDA_PATH/bin" command -v "$${CUDACXX:-nvcc}"))
wheel: $(READY)  ## build wheels into dist/: pure Python, with CPU loops, and with CUDA kernels if nvcc is found
	GRADL1_CUDA=0 GRADL1_HOST=0 $(WHEEL)
	GRADL1_CUDA=0 GRADL1_HOST=1 $(WHEEL) -C--build-option=--build-number=1cpu
	$(if $(CUDA_WHEEL),GRADL1_CUDA=1 GRADL1_HOST=1 $(WHEEL) -C--build-option=--build-number=1cuda)

bench: $(BUILT)  ## measure operations and training steps beside their peers; ARGS="step --smoke" for a first look
	$(VENV)/bin/gradl1 bench $(ARGS)

# What needs a GPU, with the python at hand; nothing is installed. Each step runs even when one before it failed, and
# any failure counts. Tests of one file share a process: those of 2^31 elements need the memory. The steps of `make gpu`
# fit into eight minutes, building not counted; one that takes longer than its share is ended, which is a failure.
GPU = export PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}"; status=0; \
	GRADL1_CUDA=1 GRADL1_CUDA_ARCHS="$${GRADL1_CUDA_ARCHS:-native}" $(PYTHON) setup.py -q build_ext --inplace || status=1;
OF_XDIST = $$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 4 --dist loadfile")
gpu:  ## the tests that need a GPU, launches, host time and time of steps, bandwidth of kernels, into OUT (bench/results)
	@$(GPU) \
	timeout 240 $(PYTHON) -m pytest tests/gpu $(OF_XDIST) || status=1; \
	timeout 180 $(PYTHON) -m bench.launches --out "$${OUT:-bench/results}" || status=1; \
	timeout 60 $(PYTHON) -m bench.kernels --out "$${OUT:-bench/results}" || status=1; \
	exit $$status

gpufull:  ## all of `make gpu` without its limits of time, compute-sanitizer, and every network by every provider
	@$(GPU) \
	$(PYTHON) -m pytest tests/gpu $(OF_XDIST) || status=1; \
	if command -v compute-sanitizer >/dev/null; then for tool in memcheck racecheck initcheck; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	$(PYTHON) -m tests.gpu.small_set cuda triton || status=1; done; \
	else echo "compute-sanitizer not found: not run"; status=1; fi; \
	$(PYTHON) -m bench.launches --seconds 3600 --out "$${OUT:-bench/results}" || status=1; \
	$(PYTHON) -m bench.kernels --out "$${OUT:-bench/results}" || status=1; \
	$(PYTHON) -m bench.gpu --out "$${OUT:-bench/results}" || status=1; \
	exit $$status

# In three copies of the sources, one for each part of the work; none has a compiled extension, so the reference computes.
# Compiled files know their source by its hash: two changes within one second have the same time. The unchanged sources
# are tested before and after: where that fails, every change would seem to be noticed.
MUTANTS := build/mutate
PARTS := batch_norm products sites
.PHONY: $(PARTS:%=mutate-%)
mutate: $(READY)  ## change the operators and the reference a little, in many ways: does a test notice? takes an hour or two
	GRADL1_CUDA=0 GRADL1_HOST=0 $(VENV)/bin/python -m pip install --quiet $(CONSTRAINTS) --editable ".[mutate]"
	$(MAKE) --no-print-directory --keep-going --jobs=3 $(PARTS:%=mutate-%)

$(PARTS:%=mutate-%): mutate-%:
	rm -rf $(MUTANTS)/$* && mkdir -p $(MUTANTS)/$* && git ls-files | tar -c -T - | tar -x -C $(MUTANTS)/$*
	export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PATH="$(CURDIR)/$(VENV)/bin:$$PATH" CONFIG=tests/mutations/$*.toml; \
	cd $(MUTANTS)/$* && python -m compileall -q --invalidation-mode checked-hash gradl1_fast tests && \
	cosmic-ray init $$CONFIG session.sqlite && cr-filter-operators session.sqlite $$CONFIG && \
	python -m tests.mutations.forked around forked.socket sh -c 'cosmic-ray baseline $$CONFIG && \
	cosmic-ray exec $$CONFIG session.sqlite && cosmic-ray baseline $$CONFIG' >tests.log && \
	cr-report --show-diff --surviving-only session.sqlite

clean:  ## remove the virtual environment, caches, builds and the demo's output
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf gradl1-demo gradl1-soak $(ZOO)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
