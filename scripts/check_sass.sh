#!/usr/bin/env bash
# What ptxas made of the tuned kernels for Hopper: every tensor kernel multiplies on the tensor cores
# (HGMMA; decode HMMA), and those that promise it keep everything in registers.
#
#   scripts/check_sass.sh BUILD_DIR [OTHER_BUILD_DIR]
#
# With another build: whether all kernels of the library are the same there, instruction by
# instruction and in registers, stack and shared memory. Names and places in constant banks may
# differ.
#
# Needs cuobjdump: of the toolkit, or of the Python package triton. Without one it says so and
# succeeds.
set -euo pipefail
for folder in "$@"; do
  [[ -d $folder ]] || { echo "no folder $folder" >&2; exit 2; }
done
build=$(realpath "$1")
other=${2:+$(realpath "$2")}
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

# Source file of sm90, start of the mangled name, instruction, most bytes of stack. Planners of tiles
# spill, above all those of 16 queries (G 8): outside of what multiplies.
expected='
prefill/launch          attend_unionILi16E   HGMMA 0
prefill/launch          attend_unionILi8E    HGMMA 56
prefill/launch          attend_blocksI       HGMMA 0
index/launch            score_blocksI        HGMMA 0
dense/launch            attendI              HGMMA 0
backward/launch         key_gradientI        HGMMA 0
kl/launch               kl_blocksI           HGMMA 0
kl/launch               index_lse_blocksE    HMMA  0
decode/launch           scoreE               HMMA  0
decode/launch           attendI              HMMA  0
backward/query_gradient query_gradientILi16E HGMMA 16
backward/query_gradient query_gradientILi8E  HGMMA 72
'
failed=0
fail() {
  echo "$1" >&2
  failed=1
}
checked=0
while read -r file kernel instruction stack; do
  [[ $file ]] || continue
  object=$(find "$build" -path "*sm90/$file.cu.o" | head -n 1)
  if [[ ! $object ]]; then
    fail "no $file.cu.o under $build"
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
    ((products > 0)) || fail "$file: no $instruction in $name"
    ((used <= stack)) || fail "$file: $name has $used bytes of stack, at most $stack expected"
    ((stack > 0 || locals == 0)) || fail "$file: $locals accesses to local memory in $name"
  done <<<"$counts"
  ((found)) || fail "$file: no kernel $kernel"
done <<<"$expected"
((failed == 0)) && echo "$checked tensor kernels: on the tensor cores, no spills but the known ones"

machine_code() {  # OBJECT: its instructions and what its kernels take, without names
  "$tool" -sass "$1" | grep -E 'Function :|/\*[0-9a-f]{4,}\*/' |
    sed -E 's#/\*[0-9a-fx]+\*/##g; s/c\[0x[0-9a-f]+\]\[0x[0-9a-f]+\]/c[][]/g
            s/Function : .*/Function/; s/_ZN[A-Za-z0-9_]+//g; s/[ \t]+/ /g' | grep -v '^ *$'
  "$tool" -res-usage "$1" 2>&1 | grep -o 'REG:.*SHARED:[0-9]*' | sort
}
if [[ $other ]]; then
  same=0
  while read -r object; do
    old=$other/${object#"$build"/}
    [[ -e $old ]] || { echo "new: ${object#"$build"/}"; continue; }
    if cmp -s <(machine_code "$object") <(machine_code "$old"); then
      same=$((same + 1))
    else
      fail "another machine code: ${object#"$build"/}"
    fi
  done < <(find "$build/src" -name '*.cu.o' | sort)
  echo "$same files with the machine code of $other"
fi
exit $failed
