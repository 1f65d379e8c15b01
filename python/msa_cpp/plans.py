"""Backends, plans and threads: what computes the operators of `msa_cpp.ops`, and what it needs."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _core
from ._call import OPERATORS, deprecated

Plan = _core.Plan

_OLD_NAMES = {"sparse_decode": "sparse_attention", "msa_layer_decode": "msa_layer"}  # of steps


class Backend(NamedTuple):
    """One way to compute the operators, as `msa info` shows it."""

    name: str
    usable: bool
    reason: str  #: why it is not usable here, else ""
    requirement: str
    priority: int  #: "auto" takes the highest usable one that supports the problem


def backends() -> list[Backend]:
    """The backends of this build, usable or not, highest priority first.

    >>> import msa_cpp
    >>> [b.usable for b in msa_cpp.backends() if b.name == "reference"]
    [True]
    """
    return [Backend(*record) for record in _core.backends()]


def plan(
    op: str, *, dtype: str = "float32", paged: bool = False,
    heads_q: int = 64, heads_kv: int = 4, head_dim: int = 128, index_dim: int = 128,
    block_size: int = 128, topk: int = 16, init_blocks: int = 0, local_blocks: int = 1,
    device: Any = "cpu", max_batch: int = 1, max_tokens: int = 1, max_seqlen_q: int | None = None,
    max_seqlen_k: int = 1, backend: str = "auto",
) -> Plan:
    """Binds an operator to a backend and states the workspace, for any call within the bounds.

    Calls make and keep plans by themselves; an explicit one says beforehand which backend works and
    how much memory it needs, and is the same for every call that it is given to.

    Args:
        op: the name of a function of `msa_cpp.ops`.
        dtype: "float32", "bfloat16" or "float16": of q, k, v and the index keys.
        paged: whether keys lie in pages; append_paged has no others.
        heads_q, heads_kv, head_dim, index_dim, block_size, topk, init_blocks, local_blocks: Hq,
            Hkv, D, Di, Bk, K and the forced blocks; what the operator does not use is ignored.
        device: "cpu", "cuda", "cuda:1" or a torch.device.
        max_batch, max_tokens: bounds of B and T.
        max_seqlen_q, max_seqlen_k: bounds of the lengths of one sequence; `max_seqlen_q` defaults
            to `max_tokens`.

    Errors: ValueError for what no plan can be made of, NotImplementedError, with each backend's
    reason, where none can compute it. The plan uses the threads of `num_threads()`.

    >>> import msa_cpp
    >>> made = msa_cpp.plan("merge", max_tokens=16, backend="reference")
    >>> made.op, made.backend
    ('merge', 'reference')
    """
    kind, _, index = str(device).partition(":")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f'device: got "{device}", expected "cpu" or "cuda"')
    if op in _OLD_NAMES:
        deprecated(op, _OLD_NAMES[op])
        op, paged = _OLD_NAMES[op], True
    paged = paged or (op in OPERATORS and OPERATORS[op].keys == "paged")
    return _core.plan(
        op=op, dtype=dtype, paged=paged, heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim,
        index_dim=index_dim, block_size=block_size, topk=topk, init_blocks=init_blocks,
        local_blocks=local_blocks, cuda_device=-1 if kind == "cpu" else int(index or 0),
        max_batch=max_batch, max_tokens=max_tokens,
        max_seqlen_q=max_tokens if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=max_seqlen_k, backend=backend)


def num_threads() -> int:
    """CPU threads of a call: `set_num_threads`, else MSA_THREADS of the environment, else all.

    >>> import msa_cpp
    >>> msa_cpp.num_threads() >= 1
    True
    """
    return _core.num_threads()


def set_num_threads(count: int) -> None:
    """Sets the CPU threads of calls from now on, in every Python thread; results do not change.

    >>> import msa_cpp
    >>> before = msa_cpp.num_threads()
    >>> msa_cpp.set_num_threads(1)
    >>> msa_cpp.num_threads()
    1
    >>> msa_cpp.set_num_threads(before)
    """
    _core.set_num_threads(count)
