#!/usr/bin/env bash
# Kernels of src/cuda without a GPU: builds families of them with g++ against the emulator of
# dev/emulator (its cta.h says what is emulated) into build/emulator and runs their cases. Exits
# with 1 where one fails. x86-64.
#
#   dev/emulate.sh [FAMILY [WORD]]   one family, and of its cases those whose name contains WORD
set -euo pipefail
cd "$(dirname "$0")/.."

out=build/emulator
mkdir -p "$out"

# FAMILY: the .cu files it needs. dev/emulator/FAMILY.cc has its backend and its cases.
declare -A kernels=(
  [prefill]="sm90/prefill/family.cc sm90/prefill/launch.cu"
  [decode]="sm90/decode/family.cc sm90/decode/launch.cu"
  [dense]="sm90/dense/family.cc sm90/dense/launch.cu"
  [index]="sm90/index/family.cc sm90/index/launch.cu"
  [backward]="sm90/backward/family.cc sm90/backward/launch.cu sm90/backward/query_gradient.cu smxx/block_lists.cu"
  [kl]="sm90/kl/family.cc sm90/kl/launch.cu smxx/block_lists.cu"
  [plain]="smxx/plain.cc smxx/attention.cu smxx/scores.cu smxx/block_lists.cu
    smxx/attention_backward.cu smxx/kl.cu smxx/select.cu smxx/append.cu smxx/mass.cu smxx/merge.cu"
)
order=(prefill decode dense index backward kl plain)

# Short calls shall take several windows, rounds of windows and passes over a sequence, and `auto`
# shall ask the device; decode shall have clusters of every size, and the index branch parts of
# tiles: the same headers with small sizes come first in the include path.
shrink() {  # HEADER NAME VALUE
  local to=$out/cuda/$1
  [[ -e $to ]] || { mkdir -p "$(dirname "$to")" && cp "src/cuda/$1" "$to"; }
  sed -i -E "s|(constexpr [a-z0-9_]+ $2 =)[^;]*;|\1 $3;|" "$to"
  grep -qF " $2 = $3;" "$to" || { echo "$1 has no constant $2" >&2; exit 1; }
}
rm -rf "$out/cuda"
declare -A sms
shrink sm90/prefill/windows.h kPartBytes '(16 * 16 * 264 * 23)'  # 23 queries of 16 heads, K 16
shrink sm90/prefill/windows.h kRoundWindows 2
shrink sm90/prefill/build_lists.cuh kTableBlocks 5
shrink sm90/prefill/order.h kFewTokens 0
sms[decode]=34  # two lists get clusters of 16, 18 none
shrink sm90/dense/shape.h kMaxCtas 3  # whole tiles from 1,536 rows on
sms[index]=5  # several parts of a tile for short contexts
shrink sm90/index/config.h kMostBytes '(16 << 10)'

# g++ else calls an initialiser of the thread_local `__shared__` that does not exist.
flags=(-std=c++20 -O2 -fno-strict-aliasing -fno-extern-tls-init -pthread
  -I "$out" -I dev/emulator -I src -I include -I tests)
compiler=(g++)
command -v ccache >/dev/null && compiler=(ccache g++)
compile() {  # SOURCE FLAGS...: the object goes to `objects`
  local object=$out/${1//\//_}.o
  rm -f "$object"  # where it fails, so does the link
  "${compiler[@]}" "${flags[@]}" "${@:2}" -c "$1" -o "$object"
  objects+=("$object")
}
objects=()
for source in dev/emulator/{cta,driver,main}.cc src/core/*.cc src/reference/*.cc \
  src/cpu/threads.cc src/cuda/{tensor_map,sm90/conditions}.cc tests/conformance/*.cc; do
  compile "$source"
done
shared=("${objects[@]}")

run_family() {  # FAMILY WORD
  local objects=("${shared[@]}") source
  shrink sm90/shape.h kSMs "${sms[$1]:-132}"
  compile "dev/emulator/$1.cc"
  for source in ${kernels[$1]}; do
    compile "src/cuda/$source" -x c++ -include cuda_runtime.h \
      -Wno-unknown-pragmas -Wno-psabi
  done
  g++ -pthread -o "$out/$1" "${objects[@]}"
  "$out/$1" "${@:2}"
}
if (($# > 0)); then
  [[ ${kernels[$1]:-} ]] || { echo "no family $1; there are: ${order[*]}" >&2; exit 2; }
  run_family "$@"
else
  for family in "${order[@]}"; do run_family "$family"; done
fi
