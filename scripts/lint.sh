#!/usr/bin/env bash
# Format, clang-tidy, ruff, mypy and the line budget of the public headers. LINT_FIX=1 formats in place.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t sources < <(git ls-files '*.h' '*.cc' '*.cu' '*.cuh' '*.c')
if [[ ${LINT_FIX:-} ]]; then
  clang-format-19 -i "${sources[@]}"
else
  clang-format-19 --dry-run --Werror "${sources[@]}"
fi
echo "format: ${#sources[@]} files"

.venv/bin/ruff check --quiet .
echo "ruff: $(git ls-files '*.py' | wc -l) files"
printf 'mypy: '
.venv/bin/mypy --cache-dir build/mypy

# c_ops.h is printed by a program.
lines=$(find include/msa -name '*.h' ! -name c_ops.h -exec cat {} + | wc -l)
if ((lines > 900)); then
  echo "the public headers have $lines lines written by hand, more than 900" >&2
  exit 1
fi
echo "public headers: $lines of 900 lines"

CC=clang-19 CXX=clang++-19 cmake --preset debug -B build/lint --log-level=WARNING >/dev/null
cmake --build build/lint --target msa_commit >/dev/null  # a generated header
run-clang-tidy-19 -quiet -p build/lint -j "${JOBS:-$(nproc)}" "^$PWD/(src|bindings|tools|tests)/" \
  >build/lint/clang-tidy.log 2>&1 || {
  grep -E '(error|warning):' build/lint/clang-tidy.log | sort -u >&2
  exit 1
}
echo "clang-tidy: $(grep -c '^\[' build/lint/clang-tidy.log || true) files"
