#!/usr/bin/env bash
# check_install.sh BUILD_DIR: installs it and builds the examples against the result, through
# find_package and pkg-config, with the static and the shared library; all must print the same.
set -euo pipefail
cd "$(dirname "$0")/.."

build=$(realpath "${1:?build directory}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
cmake --install "$build" --prefix "$prefix" >/dev/null
[[ $("$prefix/bin/msa" --version) ]]

expected=
check() {  # NAME COMMAND...: the command must print what the first example printed
  local name=$1 output
  shift
  output=$("$@")
  echo "$name: $output"
  if [[ $output != "${expected:=$output}" ]]; then
    echo "$name differs from the first example" >&2
    exit 1
  fi
}

for language in cpp c; do
  for shared in OFF ON; do
    dir=$work/$language-$shared
    cmake -S "examples/$language" -B "$dir" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" \
      -DBUILD_SHARED_LIBS=$shared --log-level=ERROR >/dev/null
    cmake --build "$dir" >/dev/null
    check "$language, find_package, shared $shared" "$dir/example"
  done
done

library_dir=$(dirname "$(find "$prefix" -name libmsa.so)")
export PKG_CONFIG_PATH=$library_dir/pkgconfig
read -ra flags < <(pkg-config --cflags --libs msa)
read -ra static_flags < <(pkg-config --static --cflags --libs msa)
g++ -std=c++20 examples/cpp/main.cc "${flags[@]}" -o "$work/cpp"
gcc -std=c11 examples/c/main.c "${flags[@]}" -o "$work/c"
check "cpp, pkg-config, shared" env LD_LIBRARY_PATH="$library_dir" "$work/cpp"
check "c, pkg-config, shared" env LD_LIBRARY_PATH="$library_dir" "$work/c"
rm "$library_dir"/libmsa.so*
g++ -std=c++20 examples/cpp/main.cc "${static_flags[@]}" -o "$work/cpp"
gcc -std=c11 examples/c/main.c "${static_flags[@]}" -o "$work/c"
check "cpp, pkg-config, static" "$work/cpp"
check "c, pkg-config, static" "$work/c"
