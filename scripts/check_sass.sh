#!/usr/bin/env bash
# What ptxas made of the tuned kernels for Hopper: every tensor kernel multiplies on the tensor cores
# (HGMMA; decode HMMA), and those that promise it keep everything in registers.
#
#   scripts/check_sass.sh BUILD_DIR
#
# Needs cuobjdump: of the toolkit, or of the Python package triton. Without one it says so and
# succeeds.
set -euo pipefail
build=$1
[[ -d $build ]] || { echo "no folder $build" >&2; exit 2; }
cd "$(dirname "$0")/.."

find_tool() {
  local python triton
  command -v cuobjdump && return
  for python in .venv/bin/python3 python3; do
    triton=$("$python" -c 'import importlib.util as u; print(u.find_spec("triton").submodule_search_locations[0])' \
      2>/dev/null) || continue
    [[ -x $triton/backends/nvidia/bin/cuobjdump ]] || continue
    echo "$triton/backends/nvidia/bin/cuobjdump"
    return
  done
  return 1
}
if ! tool=$(find_tool); then
  echo "skipped: no cuobjdump, neither the toolkit's nor triton's"
  exit 0
fi

# family, start of the mangled name, instruction, most bytes of stack. The planner of 16 queries a
# tile (G 8) spills 72 bytes, outside of what multiplies.
expected='
prefill attend_unionILi16E HGMMA 0
prefill attend_unionILi8E  HGMMA 48
prefill attend_blocksI     HGMMA 0
index   score_blocksI      HGMMA 0
dense   attendI            HGMMA 0
backward key_gradientI     HGMMA 0
kl      kl_blocksI         HGMMA 0
kl      index_lse_blocksE  HMMA  0
decode  scoreE             HMMA  0
decode  attendI            HMMA  0
'
failed=0
fail() {
  echo "$1" >&2
  failed=1
}
checked=0
while read -r family kernel instruction stack; do
  [[ $family ]] || continue
  object=$(find "$build" -path "*sm90/$family/launch.cu.o" | head -n 1)
  if [[ ! $object ]]; then
    fail "$family: no launch.cu.o under $build"
    continue
  fi
  # One line per kernel: its name, how often the instruction occurs, loads and stores of locals.
  counts=$("$tool" -sass "$object" | awk -v instruction="$instruction" '
    function flush() { if (name != "") print name, products + 0, locals + 0 }
    /Function :/ { flush(); name = $3; products = locals = 0 }
    $0 ~ "[ \t]" instruction "[ .]" { ++products }
    /[ \t](LDL|STL)[ .]/ { ++locals }
    END { flush() }')
  usage=$("$tool" -res-usage "$object" 2>&1 | awk '
    /Function / { name = $2; sub(/:$/, "", name) }
    /STACK:/ { match($0, /STACK:[0-9]+/); print name, substr($0, RSTART + 6, RLENGTH - 6) }')
  found=0
  while read -r name products locals; do
    [[ $name =~ [0-9]$kernel ]] || continue
    found=1
    checked=$((checked + 1))
    used=$(awk -v name="$name" '$1 == name { print $2 }' <<<"$usage")
    ((products > 0)) || fail "$family: no $instruction in $name"
    ((used <= stack)) || fail "$family: $name has $used bytes of stack, at most $stack expected"
    ((stack > 0 || locals == 0)) || fail "$family: $locals accesses to local memory in $name"
  done <<<"$counts"
  ((found)) || fail "$family: no kernel $kernel"
done <<<"$expected"
((failed == 0)) && echo "$checked tensor kernels: on the tensor cores, no spills but the known ones"
exit $failed
