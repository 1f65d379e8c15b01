#!/usr/bin/env bash
# Runs every fuzzer for FUZZ_SECONDS (30), starting from its seeds in tests/fuzz/corpus.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${FUZZ_SECONDS:-30}
cmake --preset fuzz --log-level=WARNING >/dev/null
cmake --build --preset fuzz --parallel "${JOBS:-$(nproc)}" --target msa_fuzzers
for fuzzer in build/fuzz/fuzz_*; do
  [[ -x $fuzzer && -f $fuzzer ]] || continue
  name=$(basename "$fuzzer")
  found=build/fuzz/found/$name  # new inputs and crashes stay here
  mkdir -p "$found"
  echo "fuzz: $name for $seconds s"
  if ! "$fuzzer" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=512 \
    -artifact_prefix="$found/" "$found" "tests/fuzz/corpus/${name#fuzz_}" >"$found.log" 2>&1; then
    tail -40 "$found.log" >&2
    echo "fuzz: $name failed; the input is in $found" >&2
    exit 1
  fi
  grep -E '^Done|stat::number_of_executed' "$found.log" || tail -1 "$found.log"
done
