"""Arrays of the caller's kind: NumPy in, NumPy out; torch in, torch out, on the same device."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised array of `shape` and `dtype` ("float32", ...), of the kind of `like`."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype if dtype == "bfloat16" else dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    raise TypeError(f"out: not given, expected one, since the inputs are {type(like).__name__}: "
                    "outputs are made for NumPy arrays and torch tensors only")


def stream(like: Any, device: int) -> int:
    """The handle of the current CUDA stream of torch for its tensors, of others the default one."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.cuda.current_stream(device).cuda_stream
    return 0
