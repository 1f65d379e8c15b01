"""msa_cpp under the names that other people's code calls.

    vllm, sglang    functions of the engines, replaced by patch(); see docs/serving.md
    fmha_sm100      MiniMax's public operators; `install` makes them importable under that name

Nothing happens at import, and each of the modules needs torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

_PACKAGE = f"{__name__}.fmha_sm100"
_PARTS = ("", ".api", ".sparse", ".nvfp4_kv")
_VLLM = "vllm.third_party.fmha_sm100"


def install(vllm: bool = False, shadow: bool = False) -> None:
    """Makes `import fmha_sm100` find `msa_cpp.compat.fmha_sm100`. Idempotent.

    Args:
        vllm: also under vLLM's alias `vllm.third_party.fmha_sm100`.
        shadow: even where another package of that name is installed.

    Errors: RuntimeError where another package would be hidden and `shadow` is False.
    """
    names = ["fmha_sm100", _VLLM] if vllm else ["fmha_sm100"]
    for name in names:
        if not shadow and not _is_ours(name) and _is_there(name):
            raise RuntimeError(f"{name}: another package of this name is installed; "
                               "shadow=True hides it")
    for name in names:
        for part in _PARTS:
            sys.modules[name + part] = importlib.import_module(_PACKAGE + part)
    if vllm and "vllm.third_party" in sys.modules:
        setattr(sys.modules["vllm.third_party"], "fmha_sm100", sys.modules[_VLLM])


def uninstall() -> None:
    """Undoes `install`; what was imported from it before stays with its importers. Idempotent."""
    for name in ("fmha_sm100", _VLLM):
        if not _is_ours(name):
            continue
        for part in _PARTS:
            sys.modules.pop(name + part, None)
        parent, _, child = name.rpartition(".")
        if parent in sys.modules and hasattr(sys.modules[parent], child):
            delattr(sys.modules[parent], child)


def kernel_folder() -> Path:
    """A folder that `kernels.get_local_kernel` and its like load: build/torch-universal, with the
    names of `fmha_sm100`. It needs msa_cpp installed beside it."""
    return Path(__file__).parent / "kernel"


def _is_ours(name: str) -> bool:
    return sys.modules.get(name) is not None and sys.modules[name] is sys.modules.get(_PACKAGE)


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError, ValueError):  # a parent that is not there
        return False
