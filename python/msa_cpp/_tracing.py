"""Calls that torch traces, differentiates or casts, which go through torch.ops.msa_cpp."""

from __future__ import annotations

import sys
from typing import Any


def through_torch(first: Any, *others: Any, plan: Any) -> bool:
    """Whether torch traces, differentiates or casts the call: then it is one of torch.ops.msa_cpp.

    Tensor subclasses (fake tensors and the like) have no memory of their own to work on either.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(first, torch.Tensor):
        return False
    if not (torch.compiler.is_compiling() or type(first) not in (torch.Tensor, torch.nn.Parameter)
            or torch.is_autocast_enabled("cuda" if first.is_cuda else "cpu")):
        if not torch.is_grad_enabled():
            return False
        for tensor in (first, *others):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                break
        else:
            return False
    if plan is not None:
        raise ValueError("plan: given, expected None under torch.compile and torch.autocast and "
                         "for tensors that require gradients; give max_seqlen_q, max_seqlen_k and "
                         "backend")
    return True


def torch_op(name: str) -> Any:
    from . import torch_ops

    return getattr(torch_ops, name)


def is_f32(out: Any) -> bool:
    return out is not None and out.dtype == sys.modules["torch"].float32


def into(out: Any, result: Any) -> Any:
    """What a traced call returns; traced calls make their outputs, so a given one is copied to."""
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(f"out: got shape {tuple(out.shape)} of {out.dtype}, expected "
                         f"{tuple(result.shape)} of {result.dtype}")
    return out.copy_(result)
