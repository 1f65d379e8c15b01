"""The way of every operator from Python: into the compiled part, or, where torch traces,
differentiates or casts, into torch.ops.msa_cpp."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _core
from .batch import Batch

BATCH = ("cu_seqlens_q", "cu_seqlens_k", "seq_lens", "page_table", "q_offset", "block_offset",
         "page_rows")
OPTIONS = ("causal", "block_size", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "topk",
           "init_blocks", "local_blocks", "num_blocks")  # in the order of the compiled part
_NO_BATCH = (None,) * (len(BATCH) + 4)


class Argument(NamedTuple):
    """An array of an operator. Letters of `shape` are those of `msa_cpp.ops`; behind a bar, those
    with paged keys."""

    name: str
    role: str  #: input, optional, output, extra, updated or absent
    content: str  #: rows, wide, f32, i32 or blocks
    shape: str

    @property
    def is_input(self) -> bool:
        return self.role in ("input", "optional", "updated")


class Operator(NamedTuple):
    """A row of the library's table of operators."""

    name: str
    arguments: tuple[Argument, ...]
    batched: bool
    keys: str  #: packed, paged or any
    scaled: bool  #: by softmax_scale
    selects: bool  #: topk blocks, some of them forced
    inputs: int  #: how many arguments stand before the outputs
    outputs: tuple[Argument, ...]
    compiled: Any


def _operator(name: str, rows: tuple[Any, ...], batched: bool, keys: str, scaled: bool,
              selects: bool) -> Operator:
    arguments = tuple(Argument(*row) for row in rows)
    outputs = tuple(a for a in arguments if a.role in ("output", "extra"))
    return Operator(name, arguments, batched, keys, scaled, selects, len(arguments) - len(outputs),
                    outputs, getattr(_core, name))


OPERATORS = {row[0]: _operator(*row) for row in _core.operators()}


def call(op: str, tensors: tuple[Any, ...], returns: tuple[bool, ...], batch: Batch | None,
         keywords: Mapping[str, Any], softmax_scale: float | None = None, topk: int | None = None,
         init_blocks: int | None = None, local_blocks: int | None = None,
         num_blocks: int | None = None) -> Any:
    """Runs an operator of the table.

    tensors: an array or None for each of its arguments; True: an optional result to be made.
    returns: which of the results come back, the only one by itself. batch, keywords: one of them
    says the batch, and `keywords` how to run.
    """
    o = OPERATORS[op]
    if batch is not None:
        fields, workspace, plan, backend = _beside(batch, **keywords)
    elif o.batched:
        fields, workspace, plan, backend = _fields(**keywords)
    else:
        fields, workspace, plan, backend = (_NO_BATCH, *_run(**keywords))
    options = (*fields[len(BATCH):], softmax_scale, topk, init_blocks, local_blocks, num_blocks)
    if _through_torch(tensors[:o.inputs]):
        if plan is not None:
            raise ValueError("plan: given, expected None under torch.compile and torch.autocast "
                             "and for tensors that require gradients; give max_seqlen_q, "
                             "max_seqlen_k and backend")
        made = _traced(o, tensors, fields[:len(BATCH)], options, backend)
    else:
        made = o.compiled(tensors, fields, options, plan, workspace, backend)
    if len(returns) == 1:
        return made[0]
    kept = tuple(x for x, wanted in zip(made, returns) if wanted)
    return kept[0] if len(kept) == 1 else kept


def wanted(array: Any, returned: bool) -> Any:
    """The place of an optional result in `tensors`."""
    return returned if array is None else array


def deprecated(old: str, new: str, level: int = 3) -> None:
    warnings.warn(f"{old} is deprecated and goes in 0.3, its name is {new}", DeprecationWarning,
                  stacklevel=level)


def renamed(keywords: Any, old: str, new: str, value: Any) -> Any:
    """The value of an argument of the calling function, which may be given under its old name."""
    if old not in keywords:
        return value
    if value is not None:
        raise TypeError(f"{old}: given beside {new}, expected {new} alone")
    deprecated(old, new, level=4)
    return keywords.pop(old)


def _run(workspace: Any = None, plan: Any = None, backend: str = "auto",
         **others: Any) -> tuple[Any, ...]:
    if others:
        raise TypeError(f"{', '.join(others)}: unknown, expected workspace, plan or backend")
    return workspace, plan, backend


def _beside(batch: Batch, workspace: Any = None, plan: Any = None, backend: str = "auto",
            **others: Any) -> tuple[Any, ...]:
    if not isinstance(batch, Batch):
        raise TypeError(f"batch: got {type(batch).__name__}, expected a msa_cpp.Batch")
    if others:
        raise TypeError(f"{', '.join(others)}: given beside batch, expected in it")
    return batch.laid_out(), workspace, plan, backend


def _fields(
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seq_lens: Any = None,
    page_table: Any = None, q_offset: Any = None, block_offset: Any = None, page_rows: Any = None,
    causal: bool = True, block_size: int = 128, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, workspace: Any = None, plan: Any = None, backend: str = "auto",
    max_q_len: int | None = None, **others: Any,
) -> tuple[Any, ...]:
    if others:
        raise TypeError(f"{', '.join(others)}: unknown, expected fields of a msa_cpp.Batch, "
                        "workspace, plan or backend")
    if cu_seqlens_q is None:
        raise TypeError("cu_seqlens_q: got None, expected an array [B+1], or a batch")
    if max_q_len is not None:
        if max_seqlen_q is not None:
            raise TypeError("max_q_len: given beside max_seqlen_q, expected max_seqlen_q alone")
        deprecated("max_q_len", "max_seqlen_q", level=5)
        max_seqlen_q = max_q_len
    return ((cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset, page_rows,
             causal, block_size, max_seqlen_q, max_seqlen_k), workspace, plan, backend)


# ---- torch ---------------------------------------------------------------------------------------


def _through_torch(inputs: tuple[Any, ...]) -> bool:
    """Whether torch traces, differentiates or casts the call.

    Tensor subclasses (fake tensors and the like) have no memory of their own to work on either.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    first = inputs[0] if inputs[0] is not None else inputs[2]  # append_paged may have k_idx alone
    if not isinstance(first, torch.Tensor):
        return False
    if (torch.compiler.is_compiling() or type(first) not in (torch.Tensor, torch.nn.Parameter)
            or torch.is_autocast_enabled("cuda" if first.is_cuda else "cpu")):
        return True
    return differentiated(*inputs)


def differentiated(*arrays: Any) -> bool:
    """Whether torch records a gradient by one of them."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.is_grad_enabled():
        for array in arrays:
            if isinstance(array, torch.Tensor) and array.requires_grad:
                return True
    return False


def _traced(o: Operator, tensors: tuple[Any, ...], batch: tuple[Any, ...],
            options: tuple[Any, ...], backend: str) -> tuple[Any, ...]:
    """Traced calls make their outputs, so those that are given are copied to."""
    from . import torch_ops

    known, float32 = torch_ops.PARAMETERS[o.name], sys.modules["torch"].float32
    given = {n: x for n, x in zip((*BATCH, *OPTIONS), (*batch, *options))
             if n in known and x is not None}
    results = []
    for a, x in zip(o.arguments, tensors):
        if a.is_input:
            given[a.name] = x
        elif a.role in ("output", "extra"):
            array = None if isinstance(x, bool) else x
            results.append((a.name, array))
            if f"with_{a.name}" in known:
                given[f"with_{a.name}"] = x is not None and x is not False
            if a.content == "wide" and array is not None and array.dtype == float32:
                given[torch_ops.f32_flag(o)] = True
    made = getattr(torch_ops, o.name)(**given, backend=backend)
    made = made if isinstance(made, tuple) else (made,)
    return tuple(_into(name, array, x) for (name, array), x in zip(results, made))


def _into(name: str, array: Any, result: Any) -> Any:
    if array is None:
        return result
    if array.shape != result.shape or array.dtype != result.dtype:
        raise ValueError(f"{name}: got shape {tuple(array.shape)} of {array.dtype}, expected "
                         f"{tuple(result.shape)} of {result.dtype}")
    return array.copy_(result)
