"""torch.ops.msa_cpp.*: the operators for torch.compile, torch.export and autograd.

Importing this module registers them, each as the library's table of operators describes it; the
functions of `msa_cpp.ops` call them where torch traces or differentiates. An operator has a kernel
for CPU and CUDA tensors, a fake kernel, which gives shapes and dtypes, and a backward: that of
`sparse_attention` and `dense_attention` (packed keys) and of `index_kl` goes back from the first
output; the others say by name that they have none.

Arguments are named and mean what they do in `msa_cpp.ops` and `msa_cpp.gradients`: the inputs, the
batch, the options. All operators are functional but `append_paged`, which writes into the pages.
They return all their results; ``with_scores`` and ``with_block_max`` ask for those that cost much,
which are empty without it; ``out_f32`` and ``grads_f32`` ask for float32 where results have the
dtype of the queries.

Under `torch.autocast` queries, keys and values come in any mixture of dtypes, as matrix products of
torch do, and are cast to the dtype of autocast; with keys in pages, which stay as they are, to that
of the pages. Gradients come back in the dtypes that were given. A backward computes in the dtypes
of its forward, whatever autocast is by then.
"""

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, float32

from ._call import BATCH, OPERATORS, OPTIONS, Argument, Operator

_library = torch.library.Library("msa_cpp", "DEF")
_CAST = ("q", "k", "v", "q_idx", "k_idx")  # under autocast
_AUTOCAST = (torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
             | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))
_LISTS = ("row_ptr", "entries")  # what `block_lists` makes
_ON_REQUEST = ("scores", "block_max")

_Given = Dict[str, Any]  # the arguments of a call by their names, defaults included
if TYPE_CHECKING:  # the operators are made below
    def __getattr__(name: str) -> Any: ...
PARAMETERS: Dict[str, List[str]] = {}  # the names of an operator's arguments, in order


# ---- registration --------------------------------------------------------------------------------


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


def _cast(given: _Given, device: str) -> _Given:
    """The arguments of a call as autocast has them."""
    dtype, pages = torch.get_autocast_dtype(device), []
    if given.get("page_table") is not None:
        pages = [n for n in ("k_pages", "k_idx_pages") if given.get(n) is not None]
        pages = pages or [n for n in ("k", "v", "k_idx") if n in given]
    if pages:
        dtype = given[pages[0]].dtype
    return given | {name: x.to(dtype) for name, x in given.items()
                    if name in _CAST and name not in pages and isinstance(x, Tensor)
                    and x.device.type == device and x.is_floating_point()
                    and x.dtype != torch.float64}


def _register(name: str, signature: inspect.Signature, kernel: Callable[[_Given], Any],
              fake: Callable[[_Given], Any], mutates: Tuple[str, ...] = (),
              backward: Optional[Callable[..., Dict[str, Tensor]]] = None) -> None:
    """Makes torch.ops.msa_cpp.<name>, which is an attribute of this module too.

    `backward` gets the arguments as attributes of one object, the tuple of outputs and the gradient
    of the first of them, and returns gradients by the names of arguments. The other outputs take no
    part in autograd.
    """
    names = list(signature.parameters)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}

    def on(function: Callable[[_Given], Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(
            {**defaults, **dict(zip(names, args)), **kwargs})

    def prototype() -> None: ...

    prototype.__signature__ = signature  # type: ignore[attr-defined]
    _library.define(name + torch.library.infer_schema(prototype, mutates_args=mutates))
    operator = getattr(torch.ops.msa_cpp, name).default

    def under_autocast(device: str) -> Callable[..., Any]:
        def cast(given: _Given) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                return operator(**_cast(given, device))

        return on(cast)

    for device in ("cpu", "cuda"):
        _library.impl(name, on(kernel), device.upper())
        if not name.endswith("_backward"):
            _library.impl(name, under_autocast(device), f"Autocast{device.upper()}")
    torch.library.register_fake(f"msa_cpp::{name}", on(fake), lib=_library)
    if not mutates:
        gradient, keep = ((_no_backward(name), None) if backward is None
                          else _autograd(names, backward))
        torch.library.register_autograd(f"msa_cpp::{name}", gradient, lib=_library,
                                        setup_context=keep)
    PARAMETERS[name], globals()[name] = names, operator


# ---- operators of the table ----------------------------------------------------------------------


_DEFAULTS = {"causal": True, "block_size": 128, "topk": 16, "init_blocks": 0, "local_blocks": 1}
_TYPES = {"causal": bool, "softmax_scale": Optional[float], "max_seqlen_q": Optional[int],
          "max_seqlen_k": Optional[int], "num_blocks": Optional[int]}


def f32_flag(o: Operator) -> str:
    """The argument that asks for outputs in float32."""
    return "out_f32" if o.outputs and o.outputs[0].name == "out" else "grads_f32"


def _signature(o: Operator) -> inspect.Signature:
    needed = inspect.Parameter.empty
    parameters: List[Tuple[str, Any, Any]] = [
        (a.name, Tensor if a.role == "input" else Optional[Tensor], needed)
        for a in o.arguments if a.is_input and a.name not in _LISTS]
    options: List[str] = []
    if o.batched:
        parameters.append((BATCH[0], Tensor, needed))
        parameters += [(n, Optional[Tensor], None) for n in BATCH[1:-1]]
        options += OPTIONS[:4]
    options += ["softmax_scale"] if o.scaled else []
    options += ["topk", "init_blocks", "local_blocks"] if o.selects else []
    options += ["num_blocks"] if o.name == "block_lists" else []
    parameters += [(n, _TYPES.get(n, int), _DEFAULTS.get(n)) for n in options]
    if any(a.content == "wide" for a in o.outputs):
        parameters.append((f32_flag(o), bool, False))
    parameters += [(f"with_{a.name}", bool, False) for a in o.outputs if a.name in _ON_REQUEST]
    parameters.append(("backend", str, "auto"))
    parameters += [(BATCH[-1], Optional[Tensor], None)] if o.batched else []
    if o.name == "sparse_attention" or any(a.name in _LISTS for a in o.arguments if a.is_input):
        parameters += [(n, Optional[Tensor], None) for n in _LISTS]  # the backward's, else made
    return inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=t, default=d)
         for n, t, d in parameters],
        return_annotation={0: None, 1: Tensor}.get(len(o.outputs),
                                                   Tuple[(Tensor,) * len(o.outputs)]))


class _Results:
    """The shapes and dtypes of the results of a call."""

    def __init__(self, o: Operator, given: _Given) -> None:
        self.given, self.like = given, given[o.arguments[0].name]
        self.f32 = given.get(f32_flag(o), False) if o.outputs else False
        self.paged = given.get("page_table") is not None or given.get("seq_lens") is not None
        self.extents: Dict[str, Any] = {"K": given["topk"]} if o.selects else {}
        for a in o.arguments:
            if a.is_input and given[a.name] is not None:
                self.extents.update(zip(self.letters(a), given[a.name].shape))

    def letters(self, a: Argument) -> List[str]:
        return a.shape.split("|")[-1 if self.paged else 0].split(",")

    def extent(self, letter: str) -> Any:
        """Known from a bound, or only when lengths are read."""
        bound, size = self.given.get("max_seqlen_k"), self.given.get("block_size")
        if letter == "blocks" and bound is not None:
            return (bound + size - 1) // size
        if letter == "NB+1" and self.given["num_blocks"] is not None:
            return self.given["num_blocks"] + 1
        if letter == "T*K":
            return self.extents["T"] * self.extents["K"]
        if letter in self.extents:
            return self.extents[letter]
        return torch.library.get_ctx().new_dynamic_size()

    def empty(self, a: Argument) -> Tensor:
        if not self.given.get(f"with_{a.name}", True):
            return self.like.new_empty(0, dtype=float32)
        dtype = torch.int32 if a.content in ("i32", "blocks") else float32
        if a.content == "wide" and not self.f32:
            dtype = self.like.dtype
        return self.like.new_empty([self.extent(letter) for letter in self.letters(a)], dtype=dtype)


def _of_tuple(outputs: Tuple[Any, ...]) -> Any:
    return outputs if len(outputs) > 1 else outputs[0] if outputs else None


def _fake(o: Operator) -> Callable[[_Given], Any]:
    def fake(given: _Given) -> Any:
        results = _Results(o, given)
        return _of_tuple(tuple(map(results.empty, o.outputs)))

    return fake


def _kernel(o: Operator) -> Callable[[_Given], Any]:
    f32 = f32_flag(o)
    inputs = [a.name if a.is_input else "" for a in o.arguments[:o.inputs]]

    def place(given: _Given, a: Argument) -> Any:
        if a.role == "extra":
            return given.get(f"with_{a.name}", True)
        return _Results(o, given).empty(a) if a.content == "wide" and given[f32] else None

    def kernel(given: _Given) -> Any:
        get = given.get
        made = o.compiled(
            (*map(get, inputs), *[place(given, a) for a in o.outputs]),
            tuple(map(get, BATCH)), tuple(map(get, OPTIONS)), None, None, given["backend"])
        return _of_tuple(tuple(_Results(o, given).empty(a) if x is None else x
                               for x, a in zip(made, o.outputs)))

    return kernel


def _attention_gradients(a: Any, outputs: Tuple[Tensor, ...], dout: Tensor) -> Dict[str, Tensor]:
    """Of sparse_attention and, without block_ids, of dense_attention."""
    if a.page_table is not None:
        raise NotImplementedError("page_table: given, but attention has a backward for packed keys "
                                  "only")
    name, lists = "dense_attention_backward", {}
    if hasattr(a, "block_ids"):
        name = "sparse_attention_backward"
        lists = dict(block_ids=a.block_ids, row_ptr=a.row_ptr, entries=a.entries)
    options = {n: getattr(a, n) for n in (*BATCH, *OPTIONS[:5], "backend")}
    return dict(zip("qkv", globals()[name](
        q=a.q, k=a.k, v=a.v, out=outputs[0], lse=outputs[1], dout=dout.contiguous(), **lists,
        **options)))


for _o in OPERATORS.values():
    _register(_o.name, _signature(_o), _kernel(_o), _fake(_o),
              tuple(a.name for a in _o.arguments if a.role == "updated"),
              _attention_gradients if _o.name in ("sparse_attention", "dense_attention") else None)


def _append_without_gradients(*args: Any) -> None:
    """What is written into a cache has no gradient, so that asking for one is an error here."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        _no_backward("append_paged")()
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.msa_cpp.append_paged(*args)


_library.impl("append_paged", _append_without_gradients, "Autograd")


# ---- the loss of the index branch ----------------------------------------------------------------


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
    batch: _Given = dict(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_size=block_size,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, backend=backend)
    student = torch.ops.msa_cpp.index_lse(q_idx, k_idx, block_ids, **batch)
    dq_idx, dk_idx, kl = torch.ops.msa_cpp.kl_backward(
        q, k, lse, q_idx, k_idx, student, block_ids, **batch, softmax_scale=softmax_scale,
        row_ptr=row_ptr, entries=entries, grads_f32=True)
    rows = cu_seqlens_q[-1] * kl.shape[1]  # stays on the device
    return kl.sum() / rows.clamp_min(1), dq_idx, dk_idx


def _fake_kl(given: _Given) -> Tuple[Tensor, ...]:
    q_idx, k_idx = given["q_idx"], given["k_idx"]
    return tuple(q_idx.new_empty(shape, dtype=float32)
                 for shape in ((), q_idx.shape, k_idx.shape))


def _kl_gradients(a: Any, outputs: Tuple[Tensor, ...], dkl: Tensor) -> Dict[str, Tensor]:
    return {name: (gradient * dkl).to(getattr(a, name).dtype)
            for name, gradient in zip(("q_idx", "k_idx"), outputs[1:])}


_composed = index_kl  # _register puts the operator in its place
_register("index_kl", inspect.signature(index_kl), lambda given: _composed(**given), _fake_kl,
          backward=_kl_gradients)
