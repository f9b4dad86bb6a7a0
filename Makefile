# Every command sets up what it needs in .venv: Python 3.11 or newer, a C++ compiler and make are enough.

VENV = .venv
BIN = $(VENV)/bin
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

SOURCES = setup.py pyproject.toml $(wildcard src/*.?pp src/isa/*.cpp dcn_np/kernels/*.hpp dcn_np/*.pyx dcn_np/cpu/*.pyx)
TESTS =
# There is a process for each core already: waiting threads leave it to the others, and BLAS, which multiplies small
# matrices for the reference, starts none.
PYTEST = OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

# Nothing from outside may shadow what is tested.
unexport PYTHONPATH PYTHONHOME

.PHONY: demo test test-gpu bench-gpu test-frameworks test-torch test-tensorflow test-paddle
.PHONY: build lint types bench wheel wheels sdist wheel-aarch64 test-aarch64 sanitize clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(BIN)/python -m dcn_np demo

test: $(VENV)/ready
	$(PYTEST) $(TESTS)

# The extension alone, compiling what changed.
build: $(VENV)/ready-dev
	$(BIN)/python setup.py build_ext --inplace

# What needs a framework, in environments of their own.
FRAMEWORKS = torch==2.13.0 onnxscript jax 'dask[array]' distributed scikit-learn tqdm matplotlib pycocotools scikit-image
TENSORFLOW = 'tensorflow-cpu==2.21.*'
PADDLE = 'paddlepaddle==3.3.*'
test-frameworks: test-torch test-tensorflow test-paddle

test-torch: .venv-frameworks/ready
	DCN_NP_TEST_FRAMEWORKS=1 .venv-frameworks/bin/python -m pytest -W default \
		$(filter-out %_tensorflow.py %_paddle.py,$(wildcard tests/frameworks/test_*.py)) \
		tests/test_pth.py tests/test_checkpoints.py tests/test_benchmarks_gpu.py tests/test_onnx.py tests/test_dask.py $(TESTS)

test-tensorflow test-paddle: test-%: .venv-%/ready
	DCN_NP_TEST_FRAMEWORKS=1 .venv-$*/bin/python -m pytest -W default tests/frameworks/test_$*.py $(TESTS)

# On a GPU, with the Python and packages that are there (CuPy, NVRTC, Cython, setuptools; pytest, hypothesis, ml_dtypes;
# torch, torchvision): nothing is downloaded. The records go to benchmarks/results/.
test-gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	DCN_NP_TEST_GPU=1 PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -p no:cacheprovider -W default tests/gpu

bench-gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py $(OPTIONS)

lint: $(VENV)/ready-dev
	tools/lint.sh $(BIN)

types: $(VENV)/ready-dev
	$(BIN)/mypy

# The site, into build/docs. (A folder has the name, too.)
.PHONY: docs
docs: $(VENV)/ready-docs
	$(BIN)/python tools/build_docs.py

bench: $(VENV)/ready-bench
	$(BIN)/python -m dcn_np bench

wheel: $(VENV)/ready-dev
	$(BIN)/python tools/check_distribution.py wheel

# All that an x86-64 Debian 12 can build, each tried where there is only Python and NumPy: see tools/wheels.py.
wheels: $(VENV)/ready-dev
	$(BIN)/python tools/wheels.py

sdist: $(VENV)/ready-dev
	$(BIN)/python tools/check_distribution.py sdist

# For 64-bit ARM, on an x86-64 Debian 12: see tools/aarch64.py. TESTS are names of files there.
wheel-aarch64 test-aarch64: %-aarch64: $(VENV)/ready-dev
	$(BIN)/python tools/aarch64.py $* $(TESTS)

sanitize: $(VENV)/ready-dev
	tools/sanitize.sh $(BIN)

clean:
	rm -rf $(VENV) .venv-frameworks .venv-tensorflow .venv-paddle build dist *.egg-info dcn_np/*.so dcn_np/cpu/*.so

.venv-frameworks/ready: PACKAGES = $(FRAMEWORKS) --editable '.[test]'
.venv-tensorflow/ready: PACKAGES = $(TENSORFLOW) hypothesis ml_dtypes pytest --editable .
.venv-paddle/ready: PACKAGES = $(PADDLE) hypothesis ml_dtypes pytest --editable .
.venv-frameworks/ready .venv-tensorflow/ready .venv-paddle/ready: $(SOURCES)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PACKAGES)
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: EXTRAS = demo,test
$(VENV)/ready-dev: EXTRAS = dev
$(VENV)/ready-bench: EXTRAS = bench
$(VENV)/ready-docs: EXTRAS = docs
$(VENV)/ready $(VENV)/ready-dev $(VENV)/ready-bench $(VENV)/ready-docs: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@
