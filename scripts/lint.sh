#!/usr/bin/env bash
# Format, clang-tidy, ruff, mypy and the counts of the tree. LINT_FIX=1 formats in place.
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

dev/counts.py

CC=clang-19 CXX=clang++-19 cmake --preset debug -B build/lint --log-level=WARNING >/dev/null
cmake --build build/lint --target msa_commit >/dev/null  # a generated header
run-clang-tidy-19 -quiet -p build/lint -j "${JOBS:-$(nproc)}" "^$PWD/(src|bindings|tools|tests)/" \
  >build/lint/clang-tidy.log 2>&1 || {
  grep -E '(error|warning):' build/lint/clang-tidy.log | sort -u >&2
  exit 1
}
echo "clang-tidy: $(grep -c '^\[' build/lint/clang-tidy.log || true) files"
