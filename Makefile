# The two commands are `make demo` and `make test`; the rest are short names for common steps.
# Variables: PRESET (a preset of CMakePresets.json), JOBS (parallel compilers), and those of
# scripts/wheel.sh.

# The CUDA backend is built only where there is a device to use it.
PRESET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && command -v nvcc >/dev/null && echo cuda || echo release)
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BUILD := build/$(PRESET)
MODEL := models/code-11m
CONFIGURE = cmake --preset $(PRESET) --log-level=WARNING -D MSA_BUILD_PYTHON=$(EXTENSION) >/dev/null
EXTENSION := AUTO
PLOT = PYTHONPATH=$(BUILD)/python .venv/bin/python3 -m msa_cpp.plot

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export CMAKE_C_COMPILER_LAUNCHER CMAKE_CXX_COMPILER_LAUNCHER CMAKE_CUDA_COMPILER_LAUNCHER
CMAKE_C_COMPILER_LAUNCHER ?= $(shell command -v ccache)
CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)
CMAKE_CUDA_COMPILER_LAUNCHER ?= $(shell command -v ccache)

test pictures: EXTENSION := ON

.PHONY: demo test build wheel pictures lint fuzz bench clean

demo:  ## dense attention against MSA on a trained model and real text
	@scripts/setup.sh build
	@$(CONFIGURE)
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target msa_cli
	$(BUILD)/msa eval --model $(MODEL) --text $(MODEL)/sample.txt --context 16384 --attention both

test:  ## every test that needs no GPU
	@scripts/setup.sh test
	@$(CONFIGURE)
	@cmake --build --preset $(PRESET) --parallel $(JOBS)
	ctest --preset $(PRESET)
	@sed -n 's/^SKIPPED/skipped:/p' $(BUILD)/Testing/Temporary/LastTest.log

build:  ## with the Python extension where it can be built
	@$(CONFIGURE)
	@cmake --build --preset $(PRESET) --parallel $(JOBS)

wheel:  ## for machines without a compiler: PYTHON=python3.12 CUDA=ON choose for which
	@scripts/setup.sh build
	scripts/wheel.sh

pictures:  ## those of README and docs
	@scripts/setup.sh test
	@$(CONFIGURE)
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target msa_cli _core
	$(BUILD)/msa eval --model $(MODEL) --text $(MODEL)/sample.txt --context 32768 \
	  --attention msa --trace $(BUILD)/trace.safetensors
	$(PLOT) selection $(BUILD)/trace.safetensors --layer 3 --output docs/images/selection.png \
	  --title "Which blocks each query of layer 3 reads (code-11m, Python source code)"
	$(PLOT) speedup bench/results/xeon-16.json --output docs/images/speedup.png
	$(PLOT) speedup bench/results/h200.json --output docs/images/speedup-h200.png
	$(PLOT) roofline bench/results/xeon-16.json --output docs/images/roofline.png

lint:  ## format, clang-tidy, ruff, mypy, counts of the tree
	@scripts/setup.sh dev
	scripts/lint.sh

fuzz:  ## each fuzzer for FUZZ_SECONDS (30)
	@scripts/setup.sh dev
	scripts/fuzz.sh

bench: build
	$(BUILD)/msa bench $(BENCH)

clean:
	rm -rf build
