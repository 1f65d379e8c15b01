#!/usr/bin/env bash
# Installs what is missing: scripts/setup.sh [build|test|dev]
#   build    compiler, CMake, Ninja and the libraries of the msa command
#   test     the same, and .venv with the Python packages of the tests, torch and transformers among
#            them: some 6 GB, once (default)
#   dev      the same as test, and clang, clang-tidy and clang-format 19
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-test}
packages=(g++ make cmake ninja-build pkg-config git libcli11-dev libfmt-dev nlohmann-json3-dev
          libgtest-dev)
case $profile in
  build | test) ;;
  dev) packages+=(clang-19 clang-format-19 clang-tidy-19 libclang-rt-19-dev) ;;
  *) echo "setup: got \"$profile\", expected build, test or dev" >&2; exit 2 ;;
esac

installed() { [[ $(dpkg-query -W -f='${db:Status-Abbrev}' "$1" 2>/dev/null) == ii* ]]; }

install_packages() {
  local missing=() package sudo=()
  for package in "$@"; do installed "$package" || missing+=("$package"); done
  ((${#missing[@]})) || return 0
  if (($(id -u))); then
    if ! command -v sudo >/dev/null; then
      echo "setup: ask an administrator for: apt-get install ${missing[*]}" >&2
      exit 1
    fi
    sudo=(sudo)
  fi
  echo "setup: installing ${missing[*]}"
  "${sudo[@]}" apt-get update -q
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# Without apt the tools must be there already; CMake names a missing library itself.
check_tools() {
  local missing=() tool
  for tool in "$@"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  ((${#missing[@]})) || return 0
  echo "setup: missing: ${missing[*]}; install what your system calls ${packages[*]}" >&2
  exit 1
}

# A Python environment.
make_venv() {
  if [[ ! -x .venv/bin/pip ]]; then
    rm -rf .venv
    if ! python3 -m venv .venv 2>/dev/null; then
      rm -rf .venv
      command -v apt-get >/dev/null && install_packages python3 python3-venv
      PATH=/usr/bin:$PATH python3 -m venv .venv || {
        rm -rf .venv
        echo "setup: python3 -m venv fails; install Python >= 3.10 with its venv module" >&2
        exit 1
      }
    fi
  fi
}

# The Python packages of the tests, and the headers that the extension is compiled with.
install_python() {
  local file=scripts/requirements-test.txt header
  make_venv
  if ! cmp -s "$file" .venv/requirements-test.txt; then
    echo "setup: installing Python packages into .venv; torch is large"
    .venv/bin/pip install --quiet --requirement "$file"
    cp "$file" .venv/
  fi
  header=$(.venv/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [[ -e $header ]] && return
  command -v apt-get >/dev/null && install_packages python3-dev
  [[ -e $header ]] || { echo "setup: missing: $header, the headers of Python" >&2; exit 1; }
}

if command -v apt-get >/dev/null; then
  install_packages "${packages[@]}"
else
  check_tools c++ cmake ninja pkg-config
fi

[[ $profile == build ]] || install_python

cmake_version=$(cmake --version | sed -n '1s/[^0-9]*//p')
if [[ $(printf '%s\n' 3.25 "$cmake_version" | sort -V | head -1) != 3.25 ]]; then
  echo "setup: cmake $cmake_version is older than 3.25; installing a newer one into .venv"
  make_venv
  .venv/bin/pip install --quiet cmake
fi
