#!/usr/bin/env bash
# The kernels of src/cuda/sm90/prefill without a GPU: builds them with g++ against the emulator of
# dev/emulator (its cta.h says what is emulated) into build/emulator and runs its cases, each in
# the orders union, KV-outer and auto. Exits with 1 where one fails. x86-64.
set -euo pipefail
cd "$(dirname "$0")/.."

out=build/emulator
prefill=cuda/sm90/prefill
rm -rf build/emulator
mkdir -p "$out/$prefill"

# Short calls shall take several windows, rounds of windows and passes over a sequence, and `auto`
# shall ask the device: the same headers with small sizes come first in the include path.
shrink() {  # HEADER NAME VALUE
  local to=$out/$prefill/$1
  [[ -e $to ]] || cp "src/$prefill/$1" "$to"
  sed -i -E "s|(inline constexpr [a-z0-9_]+ $2 =)[^;]*;|\1 $3;|" "$to"
  grep -qF " $2 = $3;" "$to" || { echo "$1 has no constant $2" >&2; exit 1; }
}
shrink windows.h kPartBytes '(16 * 16 * 260 * 23)'  # 23 queries of 16 heads, K 16
shrink windows.h kRoundWindows 2
shrink build_lists.cuh kTableBlocks 5
shrink choose.h kFewTokens 0

# g++ else calls an initialiser of the thread_local `__shared__` that does not exist.
flags=(-std=c++20 -O2 -fno-strict-aliasing -fno-extern-tls-init -pthread
  -I "$out" -I dev/emulator -I src -I include -I tests)
sources=(dev/emulator/*.cc src/core/*.cc src/reference/*.cc src/cpu/threads.cc
  src/cuda/tensor_map.cc tests/conformance/*.cc)
objects=()
compile() {  # SOURCE FLAGS...
  local object=$out/${1//\//_}.o
  objects+=("$object")
  g++ "${flags[@]}" "${@:2}" -c "$1" -o "$object"
}
for source in "${sources[@]}"; do compile "$source"; done
compile "src/$prefill/launch.cu" -x c++ -include cuda_runtime.h -Wno-unknown-pragmas -Wno-psabi
g++ -pthread -o "$out/emulate" "${objects[@]}"
exec "$out/emulate"
