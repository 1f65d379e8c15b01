"""torch.ops.msa_cpp.*: the operators for torch.compile, torch.export and autograd.

Importing this module registers them; the functions of `msa_cpp.ops` call them where torch traces or
differentiates. Each function below is the kernel of one operator for CPU and CUDA tensors, and its
signature is the schema. With it goes a fake kernel, which gives shapes and dtypes, and a backward:
that of `sparse_attention` and `dense_attention` (packed keys) and of `index_kl` goes back from the
first output; the others say by name that they have none.

Arguments mean what they mean in `msa_cpp.ops` and `msa_cpp.gradients`. All operators are functional
but `append_paged`, which writes into the pages; results that are made on request are empty without
it.

Under `torch.autocast` queries, keys and values come in any mixture of dtypes, as matrix products of
torch do, and are cast to the dtype of autocast; with keys in pages, which stay as they are, to that
of the pages. Gradients come back in the dtypes that were given. A backward computes in the dtypes
of its forward, whatever autocast is by then.
"""

import inspect
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from . import _core

_library = torch.library.Library("msa_cpp", "DEF")
_CAST = ("q", "k", "v", "q_idx", "k_idx")  # under autocast
_AUTOCAST = (torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
             | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))


def _no_backward(name: str) -> Callable[..., Any]:
    def backward(*_: Any) -> Any:
        raise NotImplementedError(
            f"msa_cpp.{name} has no backward in this version: call it under torch.no_grad(), or "
            "with inputs that are detached")

    return backward


def _autograd(names: List[str], backward: Callable[..., Dict[str, Tensor]]) -> Tuple[Any, Any]:
    """The (backward, setup_context) of torch.library for an operator with these arguments."""

    def keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.tensors = [name for name, x in zip(names, inputs) if isinstance(x, Tensor)]
        ctx.others = {name: x for name, x in zip(names, inputs) if not isinstance(x, Tensor)}
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)

    def gradient(ctx: Any, of_first: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them
        arguments = SimpleNamespace(**ctx.others, **dict(zip(ctx.tensors, saved)))
        gradients = backward(arguments, saved[len(ctx.tensors):], of_first)
        return tuple(gradients.get(name) for name in names)

    return gradient, keep


def _autocast(name: str, signature: inspect.Signature, device: str) -> Callable[..., Any]:
    """The kernel of an operator under autocast: its arguments cast, then the operator itself."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given, dtype, pages = bound.arguments, torch.get_autocast_dtype(device), []
        if given.get("page_table") is not None:
            pages = [n for n in ("k_pages", "k_idx_pages") if given.get(n) is not None]
            pages = pages or [n for n in ("k", "v", "k_idx") if n in given]
        if pages:
            dtype = given[pages[0]].dtype
        for argument in _CAST:
            x = given.get(argument)
            if (argument not in pages and isinstance(x, Tensor) and x.device.type == device
                    and x.is_floating_point() and x.dtype != torch.float64):
                given[argument] = x.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return getattr(torch.ops.msa_cpp, name).default(*bound.args, **bound.kwargs)

    return kernel


def _operator(fake: Callable[[Any], Any], mutates: Tuple[str, ...] = (),
              backward: Optional[Callable[..., Dict[str, Tensor]]] = None) -> Callable[..., Any]:
    """Registers the decorated kernel; `fake` gets its arguments as attributes of one object.

    `backward` gets that object, the tuple of outputs and the gradient of the first of them, and
    returns gradients by the names of arguments. The other outputs take no part in autograd.
    """

    def register(kernel: Callable[..., Any]) -> Any:
        name, signature = kernel.__name__, inspect.signature(kernel)

        def fake_kernel(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return fake(SimpleNamespace(**bound.arguments))

        _library.define(name + torch.library.infer_schema(kernel, mutates_args=mutates))
        _library.impl(name, kernel, "CPU")
        _library.impl(name, kernel, "CUDA")
        if not name.endswith("_backward"):
            for device in ("cpu", "cuda"):
                _library.impl(name, _autocast(name, signature, device), f"Autocast{device.upper()}")
        torch.library.register_fake(f"msa_cpp::{name}", fake_kernel, lib=_library)
        if not mutates:
            gradient, keep = ((_no_backward(name), None) if backward is None
                              else _autograd(list(signature.parameters), backward))
            torch.library.register_autograd(f"msa_cpp::{name}", gradient, lib=_library,
                                            setup_context=keep)
        return getattr(torch.ops.msa_cpp, name).default

    return register


# ---- shapes and dtypes ---------------------------------------------------------------------------


_Size = int | torch.SymInt


def _f32(like: Tensor, *shape: _Size) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _i32(like: Tensor, *shape: _Size) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _f32_out(like: Tensor, f32: bool, skip: int = 0) -> Optional[Tensor]:
    """The output of an attention kernel: float32 on request, else what the kernel makes."""
    return _f32(like, *like.shape[skip:]) if f32 else None


def _blocks(a: Any) -> _Size:
    """Columns of a score matrix: known from the bound, else only when the lengths are read."""
    if a.max_seqlen_k is None:
        return torch.library.get_ctx().new_dynamic_size()
    return (a.max_seqlen_k + a.block_size - 1) // a.block_size


def _fake_selected(a: Any) -> Tuple[Tensor, Tensor]:
    shape = (a.q_idx.shape[1], a.q_idx.shape[0], a.topk)
    return _i32(a.q_idx, *shape), _f32(a.q_idx, *shape) if a.with_scores else _f32(a.q_idx, 0)


def _out(like: Tensor, shape: Any, f32: bool) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32 if f32 else like.dtype)


def _fake_attended(a: Any) -> Tuple[Tensor, Tensor]:
    return _out(a.q, a.q.shape, a.out_f32), _f32(a.q, *a.q.shape[:2])


def _fake_dense(a: Any) -> Tuple[Tensor, Tensor, Tensor]:
    tokens, heads = a.q.shape[:2]
    maxima = _f32(a.q, heads, tokens, _blocks(a)) if a.with_block_max else _f32(a.q, 0)
    return (*_fake_attended(a), maxima)


def _fake_lists(a: Any) -> Tuple[Tensor, Tensor]:
    heads, tokens, topk = a.block_ids.shape
    rows = (torch.library.get_ctx().new_dynamic_size() if a.num_blocks is None
            else a.num_blocks + 1)
    return _i32(a.block_ids, heads, rows), _i32(a.block_ids, heads, tokens * topk)


# ---- the index branch ----------------------------------------------------------------------------


@_operator(lambda a: _f32(a.q_idx, a.q_idx.shape[1], a.q_idx.shape[0], _blocks(a)))
def index_scores(
    q_idx: Tensor, k_idx: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Optional[Tensor] = None,
    seq_lens: Optional[Tensor] = None, page_table: Optional[Tensor] = None,
    q_offset: Optional[Tensor] = None, block_offset: Optional[Tensor] = None, causal: bool = True,
    block_size: int = 128, max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None,
    backend: str = "auto",
) -> Tensor:
    return _core.index_scores(
        (q_idx, k_idx, None),
        (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k),
        None, None, backend)[0]


@_operator(lambda a: _i32(a.scores, *a.scores.shape[:2], a.topk))
def select_blocks(
    scores: Tensor, num_valid_blocks: Optional[Tensor], topk: int, init_blocks: int = 0,
    local_blocks: int = 1, backend: str = "auto",
) -> Tensor:
    return _core.select_blocks(
        (scores, num_valid_blocks, None), None,
        (None, None, None, None, None, topk, init_blocks, local_blocks),
        None, None, backend)[0]


@_operator(_fake_selected)
def index_select(
    q_idx: Tensor, k_idx: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Optional[Tensor] = None,
    seq_lens: Optional[Tensor] = None, page_table: Optional[Tensor] = None,
    q_offset: Optional[Tensor] = None, block_offset: Optional[Tensor] = None, causal: bool = True,
    topk: int = 16, block_size: int = 128, init_blocks: int = 0, local_blocks: int = 1,
    with_scores: bool = False, max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor]:
    ids, scores = _core.index_select(
        (q_idx, k_idx, None, with_scores),
        (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, None, topk, init_blocks, local_blocks),
        None, None, backend)
    return ids, scores if with_scores else _f32(q_idx, 0)


# ---- attention -----------------------------------------------------------------------------------


def _attention_gradients(a: Any, outputs: Tuple[Tensor, ...], dout: Tensor) -> Dict[str, Tensor]:
    """Of sparse_attention and, without block_ids, of dense_attention."""
    if a.page_table is not None:
        raise NotImplementedError("page_table: given, but attention has a backward for packed keys "
                                  "only")
    batch = (a.cu_seqlens_q, a.cu_seqlens_k, a.q_offset, a.block_offset, a.causal, a.block_size,
             a.softmax_scale)
    arguments = (*outputs[:2], dout.contiguous(), *batch)
    bounds = dict(max_seqlen_q=a.max_seqlen_q, max_seqlen_k=a.max_seqlen_k, backend=a.backend)
    if hasattr(a, "block_ids"):
        gradients = sparse_attention_backward(a.q, a.k, a.v, a.block_ids, *arguments, a.row_ptr,
                                              a.entries, **bounds)
    else:
        gradients = dense_attention_backward(a.q, a.k, a.v, *arguments, **bounds)
    return dict(zip("qkv", gradients))


@_operator(_fake_attended, backward=_attention_gradients)
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Optional[Tensor] = None, seq_lens: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None, q_offset: Optional[Tensor] = None,
    block_offset: Optional[Tensor] = None, causal: bool = True, block_size: int = 128,
    softmax_scale: Optional[float] = None, out_f32: bool = False,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
    row_ptr: Optional[Tensor] = None, entries: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """row_ptr, entries: kept for the backward, which makes them itself if they are not given."""
    return _core.sparse_attention(
        (q, k, v, block_ids, _f32_out(q, out_f32), True),
        (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale),
        None, None, backend)


@_operator(lambda a: (*_fake_attended(a),
                      _i32(a.q, a.q_idx.shape[1], a.q.shape[0], a.topk)))
def msa_layer(
    q: Tensor, q_idx: Tensor, k: Tensor, v: Tensor, k_idx: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Optional[Tensor] = None, seq_lens: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None, q_offset: Optional[Tensor] = None,
    block_offset: Optional[Tensor] = None, causal: bool = True, topk: int = 16,
    block_size: int = 128, init_blocks: int = 0, local_blocks: int = 1,
    softmax_scale: Optional[float] = None, out_f32: bool = False,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor, Tensor]:
    return _core.msa_layer(
        (q, q_idx, k, v, k_idx, _f32_out(q, out_f32), True, True),
        (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale, topk, init_blocks,
         local_blocks),
        None, None, backend)


@_operator(_fake_dense, backward=_attention_gradients)
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Optional[Tensor] = None,
    seq_lens: Optional[Tensor] = None, page_table: Optional[Tensor] = None,
    q_offset: Optional[Tensor] = None, block_offset: Optional[Tensor] = None, causal: bool = True,
    block_size: int = 128, softmax_scale: Optional[float] = None, out_f32: bool = False,
    with_block_max: bool = False, max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor, Tensor]:
    out, lse, block_max = _core.dense_attention(
        (q, k, v, _f32_out(q, out_f32), True, with_block_max),
        (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale),
        None, None, backend)
    return out, lse, block_max if with_block_max else _f32(q, 0)


@_operator(lambda a: (_out(a.o_parts, a.o_parts.shape[1:], a.out_f32),
                      _f32(a.o_parts, *a.o_parts.shape[1:3])))
def merge(
    o_parts: Tensor, lse_parts: Tensor, out_f32: bool = False, backend: str = "auto",
) -> Tuple[Tensor, Tensor]:
    out = _f32_out(o_parts, out_f32, 1)
    return _core.merge((o_parts, lse_parts, out, True), None, (), None, None, backend)


@_operator(lambda a: (_i32(a.scores_parts, *a.scores_parts.shape[1:]),
                      _f32(a.scores_parts, *a.scores_parts.shape[1:])))
def merge_lists(
    scores_parts: Tensor, block_ids_parts: Tensor, backend: str = "auto",
) -> Tuple[Tensor, Tensor]:
    return _core.merge_lists((scores_parts, block_ids_parts, None, True), None, (), None, None,
                             backend)


# ---- block lists, caches, masses -----------------------------------------------------------------


@_operator(_fake_lists)
def block_lists(
    block_ids: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Optional[Tensor] = None,
    seq_lens: Optional[Tensor] = None, block_offset: Optional[Tensor] = None,
    block_size: int = 128, num_blocks: Optional[int] = None, max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor]:
    return _core.block_lists(
        (block_ids, None, None), (cu_seqlens_q, cu_seqlens_k, seq_lens, None, None, block_offset),
        (None, block_size, max_seqlen_q, max_seqlen_k, None, None, None, None, num_blocks),
        None, None, backend)


@_operator(lambda a: None, mutates=("k_pages", "v_pages", "k_idx_pages"))
def append_paged(
    k: Optional[Tensor], v: Optional[Tensor], k_idx: Optional[Tensor], k_pages: Optional[Tensor],
    v_pages: Optional[Tensor], k_idx_pages: Optional[Tensor], cu_seqlens_q: Tensor,
    seq_lens: Tensor, page_table: Tensor, block_size: int = 128,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> None:
    _core.append_paged(
        (k, v, k_idx, k_pages, v_pages, k_idx_pages),
        (cu_seqlens_q, None, seq_lens, page_table),
        (None, block_size, max_seqlen_q, max_seqlen_k),
        None, None, backend)


def _append_without_gradients(*args: Any) -> None:
    """What is written into a cache has no gradient, so that asking for one is an error here."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        _no_backward("append_paged")()
    with torch._C._AutoDispatchBelowAutograd():
        append_paged(*args)


_library.impl("append_paged", _append_without_gradients, "Autograd")


@_operator(lambda a: _f32(a.q, a.k.shape[1], a.q.shape[0], _blocks(a)))
def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Optional[Tensor] = None,
    seq_lens: Optional[Tensor] = None, page_table: Optional[Tensor] = None,
    q_offset: Optional[Tensor] = None, block_offset: Optional[Tensor] = None, causal: bool = True,
    block_size: int = 128, softmax_scale: Optional[float] = None,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tensor:
    return _core.block_mass(
        (q, k, lse, None),
        (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale),
        None, None, backend)[0]


# ---- training ------------------------------------------------------------------------------------


def _gradients_of(grads_f32: bool, *inputs: Tensor) -> Tuple[Tensor, ...]:
    return tuple(_out(x, x.shape, grads_f32) for x in inputs)


@_operator(lambda a: _gradients_of(a.grads_f32, a.q, a.k, a.v))
def sparse_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_offset: Optional[Tensor] = None,
    block_offset: Optional[Tensor] = None, causal: bool = True, block_size: int = 128,
    softmax_scale: Optional[float] = None, row_ptr: Optional[Tensor] = None,
    entries: Optional[Tensor] = None, grads_f32: bool = False, max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor, Tensor]:
    return _core.sparse_attention_backward(
        (q, k, v, block_ids, out, lse, dout, row_ptr, entries, *_gradients_of(grads_f32, q, k, v)),
        (cu_seqlens_q, cu_seqlens_k, None, None, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale),
        None, None, backend)


@_operator(lambda a: _gradients_of(a.grads_f32, a.q, a.k, a.v))
def dense_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_offset: Optional[Tensor] = None,
    block_offset: Optional[Tensor] = None, causal: bool = True, block_size: int = 128,
    softmax_scale: Optional[float] = None, grads_f32: bool = False,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor, Tensor]:
    return _core.dense_attention_backward(
        (q, k, v, None, out, lse, dout, None, None, *_gradients_of(grads_f32, q, k, v)),
        (cu_seqlens_q, cu_seqlens_k, None, None, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale),
        None, None, backend)


@_operator(lambda a: _f32(a.q_idx, *a.q_idx.shape[:2]))
def index_lse(
    q_idx: Tensor, k_idx: Tensor, block_ids: Optional[Tensor], cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, q_offset: Optional[Tensor] = None,
    block_offset: Optional[Tensor] = None, causal: bool = True, block_size: int = 128,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tensor:
    return _core.index_lse(
        (q_idx, k_idx, block_ids, None),
        (cu_seqlens_q, cu_seqlens_k, None, None, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k),
        None, None, backend)[0]


@_operator(lambda a: _f32(a.q_idx, *a.q_idx.shape[:2]))
def kl_loss(
    q: Tensor, k: Tensor, lse: Tensor, q_idx: Tensor, k_idx: Tensor, index_lse: Tensor,
    block_ids: Optional[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    q_offset: Optional[Tensor] = None, block_offset: Optional[Tensor] = None, causal: bool = True,
    block_size: int = 128, softmax_scale: Optional[float] = None,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tensor:
    return _core.kl_loss(
        (q, k, lse, q_idx, k_idx, index_lse, block_ids, None, None, None, None, None),
        (cu_seqlens_q, cu_seqlens_k, None, None, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale),
        None, None, backend)[0]


@_operator(lambda a: (*_gradients_of(a.grads_f32, a.q_idx, a.k_idx),
                      _f32(a.q_idx, *a.q_idx.shape[:2])))
def kl_backward(
    q: Tensor, k: Tensor, lse: Tensor, q_idx: Tensor, k_idx: Tensor, index_lse: Tensor,
    block_ids: Optional[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    q_offset: Optional[Tensor] = None, block_offset: Optional[Tensor] = None, causal: bool = True,
    block_size: int = 128, softmax_scale: Optional[float] = None,
    row_ptr: Optional[Tensor] = None, entries: Optional[Tensor] = None, grads_f32: bool = False,
    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor, Tensor]:
    return _core.kl_backward(
        (q, k, lse, q_idx, k_idx, index_lse, block_ids, row_ptr, entries,
         *_gradients_of(grads_f32, q_idx, k_idx), True),
        (cu_seqlens_q, cu_seqlens_k, None, None, q_offset, block_offset),
        (causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale),
        None, None, backend)


def _kl_gradients(a: Any, outputs: Tuple[Tensor, ...], dkl: Tensor) -> Dict[str, Tensor]:
    return {name: (gradient * dkl).to(getattr(a, name).dtype)
            for name, gradient in zip(("q_idx", "k_idx"), outputs[1:])}


@_operator(lambda a: (_f32(a.q_idx), *_gradients_of(True, a.q_idx, a.k_idx)),
           backward=_kl_gradients)
def index_kl(
    q: Tensor, k: Tensor, lse: Tensor, q_idx: Tensor, k_idx: Tensor, block_ids: Optional[Tensor],
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_size: int = 128,
    softmax_scale: Optional[float] = None, row_ptr: Optional[Tensor] = None,
    entries: Optional[Tensor] = None, max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None, backend: str = "auto",
) -> Tuple[Tensor, Tensor, Tensor]:
    """The KL loss and f32 gradients by q_idx and k_idx from the same pass.

    The loss is the mean of `kl_loss` over the rows before cu_seqlens_q[B]; those behind are 0.
    Differentiable in q_idx and k_idx alone, whatever q, k and lse depend on.
    """
    batch = (cu_seqlens_q, cu_seqlens_k, None, None, True, block_size)
    bounds = (max_seqlen_q, max_seqlen_k, backend)
    student = index_lse(q_idx, k_idx, block_ids, *batch, *bounds)
    dq_idx, dk_idx, kl = kl_backward(q, k, lse, q_idx, k_idx, student, block_ids, *batch,
                                     softmax_scale, row_ptr, entries, True, *bounds)
    rows = cu_seqlens_q[-1] * kl.shape[1]  # stays on the device
    return kl.sum() / rows.clamp_min(1), dq_idx, dk_idx
