# The two commands are `make demo` and `make test`; the rest are short names for common steps.
# Variables: PRESET (a preset of CMakePresets.json), JOBS (parallel compilers).

# The CUDA backend is built only where there is a device to use it.
PRESET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && command -v nvcc >/dev/null && echo cuda || echo release)
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BUILD := build/$(PRESET)
MODEL := models/code-11m

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export CMAKE_C_COMPILER_LAUNCHER CMAKE_CXX_COMPILER_LAUNCHER CMAKE_CUDA_COMPILER_LAUNCHER
CMAKE_C_COMPILER_LAUNCHER ?= $(shell command -v ccache)
CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)
CMAKE_CUDA_COMPILER_LAUNCHER ?= $(shell command -v ccache)

.PHONY: demo test test-goldens build lint fuzz bench clean

demo:  ## dense attention against MSA on a trained model and real text
	@scripts/setup.sh build
	@cmake --preset $(PRESET) --log-level=WARNING >/dev/null
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target msa_cli
	$(BUILD)/msa eval --model $(MODEL) --text $(MODEL)/sample.txt --context 16384 --attention both

test:  ## every test that needs no GPU
	@scripts/setup.sh test
	@$(MAKE) --no-print-directory build
	ctest --preset $(PRESET)
	@sed -n 's/^SKIPPED/skipped:/p' $(BUILD)/Testing/Temporary/LastTest.log

test-goldens:  ## the tests against Hugging Face; installs torch and transformers into .venv
	@scripts/setup.sh goldens
	@$(MAKE) --no-print-directory build
	ctest --preset $(PRESET) -R test_goldens

build:
	@cmake --preset $(PRESET) --log-level=WARNING >/dev/null
	@cmake --build --preset $(PRESET) --parallel $(JOBS)

lint:  ## format, clang-tidy, header budget, symbols
	@scripts/setup.sh dev
	scripts/lint.sh

fuzz:  ## each fuzzer for FUZZ_SECONDS (30)
	@scripts/setup.sh dev
	scripts/fuzz.sh

bench: build
	$(BUILD)/msa bench $(BENCH)

clean:
	rm -rf build
