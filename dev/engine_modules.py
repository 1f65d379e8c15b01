#!/usr/bin/env python3
"""The Triton functions of vLLM and SGLang without the engines, to be measured beside ours:

    python3 dev/engine_modules.py FOLDER
    PYTHONPATH=FOLDER dev/gpu.sh compare

Takes the Python files of the engines' wheels (by pip), and what they import beside torch and what
comes with it. The engines themselves pin a version of torch and install many GB; their sparse
attention runs on any torch and Triton that know its instructions. Two files are left empty, since
these functions use neither: the package of the model, which imports all of the engine, and vLLM's
compiled operators. With the engines installed as they want to be, nothing of this is needed.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ENGINES = ("vllm==0.33.0", "sglang==0.5.23")
NEEDS = ("aiohttp", "apache-tvm-ffi==0.1.11", "cachetools", "cbor2", "cloudpickle", "fastapi",
         "ipython", "llguidance", "msgspec", "openai", "openai-harmony", "opentelemetry-api",
         "orjson", "partial-json-parser", "pillow", "prometheus-client", "psutil", "py-cpuinfo",
         "pybase64", "pydantic", "pyzmq", "regex", "requests", "starlette", "tqdm", "uvloop")
ALONE = ("xgrammar",)  # it would bring a torch of its own
EMPTY = ("vllm/_C_stable_libtorch.py", "vllm/models/minimax_m3/__init__.py")


def wanted(path: str) -> bool:
    """Python, the names of the distributions, which vLLM looks up, and the CUDA that SGLang
    compiles when it is first called."""
    return path.endswith((".py", ".dist-info/METADATA")) or (
        path.startswith("sglang/kernels/jit/") and path.endswith((".cuh", ".h", ".hpp", ".cu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where modules go; it must not exist yet")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"folder: {folder} exists already")
    if not folder.parent.is_dir():
        parser.error(f"folder: {folder.parent} is not a directory")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheels, modules = Path(scratch, "wheels"), Path(scratch, "modules")
        subprocess.run([*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(wheels),
                        *ENGINES], check=True)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(modules, filter(wanted, archive.namelist()))
        for needs in (NEEDS, ("--no-deps", *ALONE)):
            subprocess.run([*pip, "install", "--target", str(modules), *needs], check=True)
        for name in EMPTY:
            (modules / name).write_text("")
        modules.rename(folder)  # only when it is whole


if __name__ == "__main__":
    main()
