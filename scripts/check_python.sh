#!/usr/bin/env bash
# check_python.sh: the last commit, cloned and installed by pip into a fresh environment, runs the
# examples. Only torch and transformers are borrowed from .venv, since they are large.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone --quiet --depth 1 "file://$PWD" "$work/clone"
.venv/bin/python3 -m venv "$work/venv"
python=$work/venv/bin/python3
"$python" -m pip install --quiet --disable-pip-version-check "$work/clone"

cd "$work/clone"
"$python" examples/python/numpy_attention.py
"$python" -c 'import msa_cpp, sys; assert not {"torch", "transformers", "matplotlib"} & {*sys.modules}'

site='import sysconfig; print(sysconfig.get_path("purelib"))'
"$OLDPWD/.venv/bin/python3" -c "$site" >"$("$python" -c "$site")/borrowed.pth"
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
