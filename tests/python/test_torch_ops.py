"""torch.ops.msa_cpp.*: registration, fake kernels, torch.compile, and the places of autograd."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import msa_cpp  # noqa: E402
import msa_cpp.torch_ops  # noqa: E402
from msa_arrays import DEVICE, Kind  # noqa: E402
from msa_cpp._call import OPERATORS  # noqa: E402
from msa_oracle import Problem  # noqa: E402

OPS = torch.ops.msa_cpp
NAMES = list(OPERATORS)
DIFFERENTIABLE = ["sparse_attention", "dense_attention"]  # their gradients: test_training_ops.py
FUNCTIONAL = [name for name in NAMES if name != "append_paged"]

# Lengths that only the device knows need bounds.
BOUND = {} if DEVICE == "cpu" else {"max_seqlen_q": 100, "max_seqlen_k": 100}


@pytest.fixture(autouse=True)
def _device():
    with torch.device(DEVICE):
        yield


def arguments(name, dtype="float32"):
    """(positional, keyword) arguments of the operator over a ragged batch."""
    p = Problem([5, 3], [21, 12], heads_kv=2, group=2, head_dim=16, index_dim=8, block_size=4,
                topk=3, paged=name == "msa_layer" or OPERATORS[name].keys == "paged")
    kind = Kind("torch", dtype)
    meta = kind.batch(p, decode=name == "msa_layer")
    q = kind.rows(p.normal(p.tokens, p.heads_q, p.head_dim))
    k, v = (kind.rows(p.store(p.normal(sum(p.kv_lens), p.heads_kv, p.head_dim))) for _ in range(2))
    q_idx = kind.rows(p.normal(p.tokens, p.heads_kv, p.index_dim))
    k_idx = kind.rows(p.store(p.normal(sum(p.kv_lens), p.index_dim)))
    ids = kind.raw(p.block_ids())
    size = {"block_size": p.block_size}
    if name == "select_blocks":
        scores = kind.raw(p.normal(2, p.tokens, 6))
        return (scores, torch.full((p.tokens,), 5, dtype=torch.int32), 3), {"init_blocks": 1}
    if name == "merge":
        return (torch.stack([q, 2 * q]), torch.randn(2, p.tokens, p.heads_q)), {}
    if name == "merge_lists":
        return (torch.randn(3, 2, p.tokens, 4),
                torch.arange(12, dtype=torch.int32).reshape(3, 1, 1, 4).expand(3, 2, p.tokens, 4)
                ), {"with_scores": True}
    if name == "block_lists":
        return (ids,), {**meta, **size, "num_blocks": sum(p.blocks(b) for b in range(2))}
    if name == "append_paged":
        new = [kind.rows(p.normal(p.tokens, p.heads_kv, p.head_dim)) for _ in range(2)]
        index = kind.rows(p.normal(p.tokens, p.index_dim))
        pages = [torch.zeros_like(x) for x in (k, v, k_idx)]
        return (*new, index, *pages), {**meta, **size}
    bounds = {"max_seqlen_k": 21}
    return {
        "index_scores": ((q_idx, k_idx), {**meta, **size, **bounds}),
        "index_select": ((q_idx, k_idx), {**meta, **size, "topk": 3, "with_scores": True}),
        "sparse_attention": ((q, k, v, ids), {**meta, **size, "softmax_scale": 0.3}),
        "msa_layer": ((q, q_idx, k, v, k_idx), {**meta, **size, "max_seqlen_q": 5, "topk": 3}),
        "dense_attention": ((q, k, v), {**meta, **size, **bounds, "with_block_max": True}),
        "block_mass": ((q, k, torch.full((p.tokens, p.heads_q), 4.0)), {**meta, **size, **bounds}),
        **training_arguments(q, k, v, q_idx, k_idx, ids, {**meta, **size}),
    }[name]


def training_arguments(q, k, v, q_idx, k_idx, ids, batch):
    """None for paged keys, which have no gradients."""
    if "cu_seqlens_k" not in batch:
        return {}
    out, lse = msa_cpp.sparse_attention(q, k, v, ids, return_lse=True, **batch)
    dense, dense_lse = msa_cpp.dense_attention(q, k, v, return_lse=True, **batch)
    index_lse = msa_cpp.index_lse(q_idx, k_idx, ids, **batch)
    kl = (q, k, lse, q_idx, k_idx, index_lse, ids)
    return {
        "sparse_attention_backward": ((q, k, v, ids, out, lse, out), {**batch, "grads_f32": True}),
        "dense_attention_backward": ((q, k, v, dense, dense_lse, dense), batch),
        "index_lse": ((q_idx, k_idx, None), batch),
        "kl_loss": (kl, batch),
        "kl_backward": (kl, {**batch, "grads_f32": True}),
    }


def direct(name, args, kwargs):
    """The same call by msa_cpp.<name>, as a tuple of what the operator returns."""
    kwargs = dict(kwargs)
    if name == "select_blocks":
        scores, valid, topk = args
        return (msa_cpp.select_blocks(scores, topk, num_valid_blocks=valid, **kwargs),)
    if name in ("index_select", "merge_lists"):
        kwargs["return_scores"] = kwargs.pop("with_scores")
    if name == "msa_layer":
        return msa_cpp.msa_layer(*args, return_lse=True, return_block_ids=True, **kwargs)
    if name == "dense_attention":
        kwargs["return_block_max"] = kwargs.pop("with_block_max")
    if name in ("sparse_attention", "dense_attention", "merge"):
        kwargs["return_lse"] = True
    if name == "append_paged":
        k, v, k_idx, *pages = args
        pages = [page.clone() for page in pages]
        msa_cpp.append_paged(k, v, k_idx, k_pages=pages[0], v_pages=pages[1], k_idx_pages=pages[2],
                             **kwargs)
        return tuple(pages)
    if kwargs.pop("grads_f32", False):  # the dtype of the gradients is that of the given ones
        inputs = args[3:5] if name == "kl_backward" else args[:3]
        names = ("dq_idx", "dk_idx") if name == "kl_backward" else ("dq", "dk", "dv")
        kwargs.update(zip(names, (torch.empty(x.shape) for x in inputs)))
    if name == "kl_backward":
        kwargs["return_kl"] = True
    result = getattr(msa_cpp, name)(*args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


def results(name, args, kwargs):
    """What the registered operator returns, as a tuple; append_paged: the pages."""
    if name == "append_paged":
        pages = [page.clone() for page in args[3:]]
        assert getattr(OPS, name)(*args[:3], *pages, **kwargs) is None
        return tuple(pages)
    result = getattr(OPS, name)(*args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_operator_and_function_agree(name, dtype):
    args, kwargs = arguments(name, dtype)
    same(results(name, args, kwargs), direct(name, args, kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    args, kwargs = arguments(name)
    outcome = torch.library.opcheck(getattr(OPS, name).default, args, kwargs)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.skipif(DEVICE != "cpu", reason="lengths on a device are not read back")
@pytest.mark.parametrize("name", ["index_scores", "block_mass", "block_lists"])
def test_opcheck_with_a_shape_that_depends_on_lengths(name):
    args, kwargs = arguments(name)
    for bound in ("max_seqlen_k", "num_blocks"):
        kwargs.pop(bound, None)
    outcome = torch.library.opcheck(getattr(OPS, name).default, args, kwargs)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_compiled_functions_agree(name):
    """fullgraph: the canonical function is one operator of the graph, whatever its Python does."""
    torch._dynamo.reset()
    args, kwargs = arguments(name)
    compiled = torch.compile(lambda *a, **k: direct(name, a, k), fullgraph=True,
                             backend="aot_eager")
    same(compiled(*args, **kwargs), direct(name, args, kwargs))


def layer(q, k, v, q_idx, k_idx, lengths, out=None, **options):
    """A sparse layer between ordinary operators."""
    batch = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths, block_size=8, **BOUND, **options)
    ids = msa_cpp.index_select(q_idx * 2, k_idx, topk=2, **batch)
    o, lse = msa_cpp.sparse_attention(q + 1, k, v, ids, out=out, return_lse=True, **batch)
    return torch.relu(o) + 1, lse


def layer_inputs(tokens):
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    shapes = [(tokens, 4, 16), (tokens, 2, 16), (tokens, 2, 16), (tokens, 2, 8), (tokens, 8)]
    return [*(torch.randn(s, generator=generator) for s in shapes),
            torch.tensor([0, tokens], dtype=torch.int32)]


def test_inductor_compiles_a_layer_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (40, 41, 77):
        inputs = layer_inputs(tokens)
        for a, b in zip(compiled(*inputs), layer(*inputs)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_compiled_calls_write_a_given_output():
    torch._dynamo.reset()
    inputs = layer_inputs(40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, *rest = inputs
        q, k, v = (x.to(dtype) for x in (q, k, v))
        got, want = (torch.full((40, 4, 16), 5.0) for _ in range(2))
        compiled(q, k, v, *rest, out=got)
        layer(q, k, v, *rest, out=want)
        assert torch.equal(got, want)
    with pytest.raises(Exception, match="out: got shape"):
        compiled(*inputs, out=torch.empty(3, 40, 4, 16))


def test_msa_layer_compiles():
    torch._dynamo.reset()
    p = Problem([1, 2], [21, 12], heads_kv=2, group=2, head_dim=16, index_dim=8, block_size=4,
                topk=3, paged=True)
    kind = Kind("torch", "float32")
    k, v = (kind.raw(p.store(p.normal(33, 2, 16))) for _ in range(2))
    args = (kind.raw(p.normal(3, 4, 16)), kind.raw(p.normal(3, 2, 8)), k, v,
            kind.raw(p.store(p.normal(33, 8))))
    kwargs = dict(kind.batch(p, decode=True), max_seqlen_q=2, topk=3, block_size=4, return_lse=True)
    compiled = torch.compile(msa_cpp.msa_layer, fullgraph=True, backend="aot_eager")
    same(compiled(*args, **kwargs), msa_cpp.msa_layer(*args, **kwargs))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_layer_reads_lengths_when_it_is_replayed():
    """Fresh outputs and workspace come from the graph's own pool; no bound is exceeded."""
    inputs = layer_inputs(77)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = layer(*inputs)
        for tokens in (77, 1, 40, 76):
            inputs[-1].copy_(torch.tensor([0, tokens], dtype=torch.int32))
            graph.replay()
            want, want_lse = layer(*inputs)
            assert torch.equal(out[:tokens], want[:tokens])
            assert torch.equal(lse[:tokens], want_lse[:tokens])


def test_fake_tensors_get_shapes_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = [torch.empty(40, 4, 16), torch.empty(40, 2, 16), torch.empty(40, 2, 16),
                  torch.empty(40, 2, 8), torch.empty(40, 8), torch.empty(2, dtype=torch.int32)]
        out, lse = layer(*inputs)
    assert out.shape == (40, 4, 16) and lse.shape == (40, 4) and lse.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in FUNCTIONAL if name not in DIFFERENTIABLE])
def test_without_a_backward_says_so_by_name(name):
    """Forward works with inputs that need gradients; only backward() is an error."""
    args, kwargs = arguments(name)
    args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                 for a in args)
    outputs = results(name, args, kwargs)
    plain = [o for o in outputs if o.is_floating_point()]
    assert all(o.requires_grad for o in plain)
    assert not any(o.requires_grad for o in outputs if not o.is_floating_point())
    same([o.detach() for o in outputs],
         results(name, [a.detach() if isinstance(a, torch.Tensor) else a for a in args], kwargs))
    if plain:
        with pytest.raises(NotImplementedError, match=f"msa_cpp.{name} has no backward in this"):
            plain[0].sum().backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_only_the_output_of_attention_is_differentiable(name):
    args, kwargs = arguments(name)
    args[0].requires_grad_()
    out, *others = results(name, args, kwargs)
    assert out.requires_grad and not any(other.requires_grad for other in others)
    out.sum().backward()
    assert args[0].grad.any()


def test_the_canonical_functions_take_part_in_autograd():
    inputs = layer_inputs(40)
    inputs[0].requires_grad_()
    out, _ = layer(*inputs)
    out.sum().backward()
    assert inputs[0].grad.any()
    with torch.no_grad():
        out, _ = layer(*inputs)
    assert not out.requires_grad


def test_a_cache_refuses_gradients():
    args, kwargs = arguments("append_paged")
    before = [page.clone() for page in args[3:]]
    args[0].requires_grad_()
    for call in (results, direct):
        with pytest.raises(NotImplementedError, match="append_paged has no backward"):
            call("append_paged", args, kwargs)
    same(args[3:], before)
    with torch.no_grad():
        results("append_paged", args, kwargs)


def test_errors_pass_through_torch():
    args, kwargs = arguments("sparse_attention")
    with pytest.raises(ValueError, match="q: got innermost stride 4, expected 1"):
        OPS.sparse_attention(args[0].transpose(1, 2).contiguous().transpose(1, 2), *args[1:],
                             **kwargs)
    with pytest.raises(TypeError, match="block_ids: got dtype torch.int64"):
        OPS.sparse_attention(*args[:3], args[3].long(), **kwargs)
    q = args[0].requires_grad_()
    plan = msa_cpp.plan("dense_attention")
    kwargs.pop("softmax_scale")
    with pytest.raises(ValueError, match="plan: given, expected None under torch.compile"):
        msa_cpp.dense_attention(q, *args[1:3], plan=plan, **kwargs)


CAST = ("q", "k", "v", "q_idx", "k_idx")
WITH_KEYS = [name for name in NAMES if not name.endswith("_backward")
             and {a.name for a in getattr(OPS, name).default._schema.arguments} & {*CAST}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WITH_KEYS)
def test_autocast_takes_any_mixture_of_dtypes(name, dtype):
    """As if queries and keys had been cast by hand: to its dtype, or to that of pages."""
    torch._dynamo.reset()
    args, kwargs = arguments(name)
    names = [a.name for a in getattr(OPS, name).default._schema.arguments]
    if "page_table" in kwargs:  # pages have a dtype already, which is not that of autocast
        pages = ("k_pages", "v_pages", "k_idx_pages")
        pages = pages if pages[0] in names else ("k", "v", "k_idx")
        args = [x.to(dtype) if n in pages else x for n, x in zip(names, args)]
        ambient = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    else:
        pages, ambient = (), dtype
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    mixed = [x.to(next(dtypes)) if n in CAST and n not in pages else x
             for n, x in zip(names, args)]
    want = results(name, [x.to(dtype) if n in CAST else x for n, x in zip(names, mixed)], kwargs)
    with torch.autocast(DEVICE, dtype=ambient):
        same(results(name, mixed, kwargs), want)
        same(direct(name, mixed, kwargs), want)
        compiled = torch.compile(lambda *a, **k: results(name, a, k), fullgraph=True,
                                 backend="aot_eager")
        same(compiled(*mixed, **kwargs), want)


def test_autocast_casts_the_steps_of_a_decoding_layer():
    p = Problem([1, 2], [21, 12], heads_kv=2, group=2, head_dim=16, index_dim=8, block_size=4,
                topk=3, paged=True)
    kind = Kind("torch", "bfloat16")
    q, q_idx = kind.raw(p.normal(3, 4, 16)), kind.raw(p.normal(3, 2, 8))
    pages = [kind.rows(p.store(p.normal(33, *inner))) for inner in ((2, 16), (2, 16), (8,))]
    kwargs = dict(kind.batch(p, decode=True), max_seqlen_q=2, topk=3, block_size=4)
    want = msa_cpp.msa_layer(q.bfloat16(), q_idx.bfloat16(), *pages, **kwargs)
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = msa_cpp.msa_layer(q, q_idx.half(), *pages, **kwargs)
    rounded = msa_cpp.msa_layer(q.bfloat16(), q_idx.half().bfloat16(), *pages, **kwargs)
    assert got.dtype == want.dtype == torch.bfloat16 and torch.equal(got, rounded)


@pytest.mark.parametrize("name", [name for name in NAMES if "_backward" in name])
def test_gradients_are_computed_in_the_dtypes_they_are_given_under_autocast(name):
    args, kwargs = arguments(name)
    want = results(name, args, kwargs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        same(results(name, args, kwargs), want)
        same(direct(name, args, kwargs), want)


def test_autocast_leaves_numbers_alone_that_it_does_not_cast():
    """float64, as in products of torch, so that the operator refuses it by name; and NumPy."""
    args, kwargs = arguments("sparse_attention")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="got dtype torch.float64"):
            msa_cpp.sparse_attention(args[0].double(), *args[1:], **kwargs)
        with pytest.raises(ValueError, match="plan: given, expected None under torch.compile and "):
            kwargs.pop("softmax_scale")
            msa_cpp.sparse_attention(*args, plan=msa_cpp.plan("sparse_attention"), **kwargs)
        if DEVICE == "cpu":
            ends = np.array([0, 2], np.int32)
            ones = np.ones((2, 1, 4), np.float32)
            out = msa_cpp.dense_attention(ones, ones, ones, cu_seqlens_q=ends, cu_seqlens_k=ends)
            assert out.dtype == np.float32


def test_parameters_and_views_need_no_detour():
    """nn.Parameter without gradients and strided views go the direct way."""
    args, kwargs = arguments("sparse_attention")
    want = msa_cpp.sparse_attention(*args, **kwargs)
    parameter = torch.nn.Parameter(args[0], requires_grad=False)
    assert torch.equal(msa_cpp.sparse_attention(parameter, *args[1:], **kwargs), want)
    wide = torch.cat([args[0], args[0]], dim=-1)
    got = msa_cpp.sparse_attention(wide[..., :16], *args[1:], **kwargs)
    assert isinstance(got, torch.Tensor) and got.is_contiguous()
    np.testing.assert_array_equal(got.cpu().numpy(), want.cpu().numpy())
