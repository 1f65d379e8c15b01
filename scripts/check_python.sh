#!/usr/bin/env bash
# check_python.sh: the wheel of the last commit, built in a clean clone and installed into an empty
# environment, runs the command and the examples. Only torch and transformers are borrowed from
# .venv, since they are large.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$PWD
git clone --quiet --depth 1 "file://$root" "$work/clone"
cd "$work/clone"
PYTHON=$root/.venv/bin/python3 scripts/wheel.sh
wheel=$(echo dist/cpu/*.whl)
auditwheel=$(echo build/wheel/venv-*/bin/auditwheel)
tag=$("$auditwheel" show "$wheel" | sed -n 's/.*platform tag: "\(.*\)".*/\1/p')
if [[ -z $tag || $wheel != *-"$tag".whl ]]; then
  echo "$wheel: auditwheel finds ${tag:-no tag}" >&2
  exit 1
fi

"$root/.venv/bin/python3" -m venv "$work/venv"
python=$work/venv/bin/python3
(  # where no command is found but those of the environment
  PATH=$work/venv/bin
  hash -r
  for tool in cc c++ gcc g++ clang cmake ninja nvcc; do
    if command -v $tool; then
      echo "$tool is within reach, so nothing is learnt" >&2
      exit 1
    fi
  done
  pip install --quiet --disable-pip-version-check --only-binary :all: "$wheel"
  python3 examples/python/numpy_attention.py
  msa info
  msa eval --model models/code-11m --text models/code-11m/sample.txt --context 2048
  if msa no-such-command 2>/dev/null || (($? != 2)); then
    echo "msa: expected exit code 2 for bad input" >&2
    exit 1
  fi
)
"$python" -c 'import msa_cpp, sys; assert not {"torch", "transformers", "matplotlib"} & {*sys.modules}'

site='import sysconfig; print(sysconfig.get_path("purelib"))'
"$root/.venv/bin/python3" -c "$site" >"$("$python" -c "$site")/borrowed.pth"
for example in examples/{python,serving}/*.py; do
  echo "$example"
  "$python" "$example"
done
"$python" -c 'import importlib.metadata as m
for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    (plugin,) = m.entry_points(group=group, name="msa_cpp")
    plugin.load()()  # nothing, unless asked'
"$python" -c 'import msa_cpp.compat as c; assert (c.kernel_folder() / "build/torch-universal/__init__.py").exists()'
"$python" -m msa_cpp.convert --check models/code-11m
"$python" -m msa_cpp.plot speedup bench/results/xeon-16.json --output "$work/speedup.png"
