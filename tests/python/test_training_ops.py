"""msa_attention: gradients against plain torch, who gets any, compilation, and its errors."""

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import msa_cpp  # noqa: E402
import msa_cpp.torch_ops  # noqa: E402, F401
import msa_training_oracle as oracle  # noqa: E402
from msa_arrays import DEVICE  # noqa: E402
from msa_cpp import torch_ops  # noqa: E402
from msa_cpp.autograd import MsaConfig, attend, select  # noqa: E402

CONFIGS = {
    "selected": MsaConfig(block_size=4, topk=3),
    "scaled, two local blocks": MsaConfig(block_size=8, topk=4, local_blocks=2, init_blocks=1,
                                          softmax_scale=0.4),
    "full support": MsaConfig(block_size=4, topk=3, kl_support="full"),
    "warm-up": MsaConfig(block_size=4, topk=None),
}
BATCHES = {"ragged": [0, 1, 40, 40, 57], "one": [0, 48]}
BOUND = {} if DEVICE == "cpu" else {"max_seqlen": 300}  # lengths that only the device knows


def inputs(cu, group=2, dtype=torch.float32, dim=16, index_dim=8):
    """q, k, v, q_idx, k_idx that require gradients, and cu_seqlens; Hkv 2."""
    shapes = [(cu[-1], 2 * group, dim), (cu[-1], 2, dim), (cu[-1], 2, dim), (cu[-1], 2, index_dim),
              (cu[-1], index_dim)]
    made = [normal(s, seed).to(DEVICE, dtype).requires_grad_() for seed, s in enumerate(shapes)]
    return made, torch.tensor(cu, dtype=torch.int32, device=DEVICE)


def msa_attention(*xs_and_cu, max_seqlen=None):
    """(o, kl) of packed sequences under a configuration."""
    *xs, cu, config = xs_and_cu
    return msa_cpp.msa_attention(*xs, **vars(config), cu_seqlens_q=cu, cu_seqlens_k=cu,
                                 max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, return_kl=True)


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def host(xs):
    """Copies on the CPU that gradients do not cross."""
    return [None if x is None else x.detach().cpu() for x in xs]


def expected(xs, cu, config, ids, weight):
    """Values and gradients of plain torch in float64 on the CPU, under the given lists."""
    q, k, v, q_idx, k_idx = xs = [x.double().requires_grad_() for x in host(xs)]
    cu, ids, weight = host((cu, ids, weight))
    scale = config.softmax_scale or q.shape[-1] ** -0.5
    mask = oracle.visible(cu, config.block_size, ids, k.shape[1])
    o, _ = oracle.attention(q, k, v, mask, scale)
    if config.kl_support == "full":
        mask = oracle.visible(cu, config.block_size, None, k.shape[1])
    kl = oracle.kl(q, k, q_idx, k_idx, mask, scale).mean()
    return o, kl, torch.autograd.grad((o * weight).sum() + 3 * kl, xs)


def distance(got, want):
    (got, want), norm = host((got, want)), want.detach().norm().clamp_min(1e-30).cpu()
    return float((got.double() - want).norm() / norm)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_plain_torch(name, batch, group):
    config = CONFIGS[name]
    xs, cu = inputs(BATCHES[batch], group)
    ids = None if config.topk is None else select(*xs[3:], cu, config, **BOUND)
    weight = normal(xs[0].shape, 9).to(DEVICE)
    o, kl = msa_attention(*xs, cu, config, **BOUND)
    got = torch.autograd.grad((o * weight).sum() + 3 * kl, xs)
    want_o, want_kl, want = expected(xs, cu, config, ids, weight)
    assert distance(o.detach(), want_o) < 1e-5
    assert abs(float(kl) - float(want_kl)) < 1e-5 * max(1, float(want_kl))
    for which, a, b in zip(("q", "k", "v", "q_idx", "k_idx"), got, want):
        assert distance(a, b) < 1e-4, which


@pytest.mark.parametrize("shape, config", [
    (dict(cu=[0, 64, 96]), CONFIGS["selected"]),
    (dict(cu=[0, 300, 430], group=8, dim=128, index_dim=128), MsaConfig(topk=2)),
    (dict(cu=[0, 300, 430], group=16, dim=128, index_dim=128), MsaConfig(topk=2)),
    (dict(cu=[0, 300, 430], group=8, dim=128, index_dim=128), MsaConfig(topk=None)),
], ids=["small", "group 8", "group 16", "warm-up"])
def test_gradients_in_bf16_are_as_close_as_those_of_torch(shape, config):
    xs, cu = inputs(dtype=torch.bfloat16, **shape)
    ids = None if config.topk is None else select(*xs[3:], cu, config, **BOUND)
    weight = normal(xs[0].shape, 9).bfloat16().to(DEVICE)
    o, kl = msa_attention(*xs, cu, config, **BOUND)
    got = torch.autograd.grad((o * weight).sum() + 3 * kl, xs)
    *_, want = expected(xs, cu, config, ids, weight)
    # Torch's own bf16, of the same formulas, on the CPU.
    theirs_xs = [x.requires_grad_() for x in host(xs)]
    cu, ids, weight = host((cu, ids, weight))
    mask, scale = oracle.visible(cu, config.block_size, ids, 2), xs[0].shape[-1] ** -0.5
    theirs_o, _ = oracle.attention(*theirs_xs[:3], mask, scale)
    theirs_kl = oracle.kl(*theirs_xs[:2], *theirs_xs[3:], mask, scale).mean()
    theirs = torch.autograd.grad((theirs_o * weight).sum() + 3 * theirs_kl, theirs_xs)
    for which, a, b, c in zip(("q", "k", "v", "q_idx", "k_idx"), got, want, theirs):
        assert torch.cosine_similarity(host([a])[0].double().flatten(), b.flatten(), 0) > 0.999
        assert distance(a, b) <= 2 * distance(c, b), which


@pytest.mark.parametrize("name", CONFIGS)
def test_readers_of_the_blocks_are_found_once(name, monkeypatch):
    """Both gradients get the lists of one call, and are bit for bit those they would make alone."""
    config, (xs, cu) = CONFIGS[name], inputs(BATCHES["ragged"], 3)
    got, calls = [], []
    made = torch_ops.block_lists
    monkeypatch.setattr(torch_ops, "block_lists", lambda *a, **k: calls.append(1) or made(*a, **k))
    for lists in (made, lambda *a, **k: (None, None)):
        if lists is not made:
            monkeypatch.setattr(torch_ops, "block_lists", lists)
        o, kl = msa_attention(*xs, cu, config, **BOUND)
        got.append(torch.autograd.grad(o.square().sum() + kl, xs))
    assert len(calls) == (config.topk is not None)
    assert all(map(torch.equal, *got))


def test_the_formulas_of_the_oracle_pass_gradcheck():
    """Operators take no float64. So finite differences judge the plain implementation, in float64,
    and it judges them."""
    xs, cu = inputs([0, 3, 12])
    (ids,), cu = host([select(*xs[3:], cu, CONFIGS["selected"], **BOUND)]), cu.cpu()
    xs = [x.double().requires_grad_() for x in host(xs)]
    mask = oracle.visible(cu, 4, ids, 2)
    attention = lambda q, k, v: oracle.attention(q, k, v, mask, 0.25)[0]
    assert torch.autograd.gradcheck(attention, xs[:3])
    index = lambda q_idx, k_idx: oracle.kl(*xs[:2], q_idx, k_idx, mask, 0.25).mean()
    assert torch.autograd.gradcheck(index, xs[3:])


@pytest.mark.parametrize("name", CONFIGS)
def test_neither_loss_reaches_the_other_branch(name):
    """Not small but none at all: no gradient, or bitwise zero."""
    xs, cu = inputs([0, 40, 57])
    none = lambda g: g is None or not g.any()
    o, kl = msa_attention(*xs, cu, CONFIGS[name], **BOUND)
    of_o = torch.autograd.grad(o.square().sum(), xs, allow_unused=True)
    of_kl = torch.autograd.grad(kl, xs, allow_unused=True)
    assert all(map(none, (*of_o[3:], *of_kl[:3])))
    assert not any(map(none, (*of_o[:3], *of_kl[3:])))


def test_all_blocks_selected_is_dense():
    xs, cu = inputs([0, 40, 57])
    wide = MsaConfig(block_size=4, topk=10)
    results = []
    for config in (wide, dataclasses.replace(wide, topk=None)):
        o, kl = msa_attention(*xs, cu, config, **BOUND)
        results.append([o, kl, *torch.autograd.grad(o.square().sum() + kl, xs)])
    for sparse, dense in zip(*results):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


def test_the_lists_of_another_selector_are_differentiable_too():
    xs, cu = inputs([0, 24])
    ids = torch.tensor([0, 2]).int().expand(2, 24, 2)
    o, lse = attend(*xs[:3], ids.to(DEVICE), cu, MsaConfig(block_size=8, topk=2), **BOUND)
    theirs = [x.double().requires_grad_() for x in host(xs[:3])]
    want, _ = oracle.attention(*theirs, oracle.visible(cu.cpu(), 8, ids, 2), 0.25)
    assert not lse.requires_grad
    for a, b in zip(torch.autograd.grad(o.square().sum(), xs[:3]),
                    torch.autograd.grad(want.square().sum(), theirs)):
        assert distance(a, b) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_it_compiles_in_one_graph(name):
    torch._dynamo.reset()
    call = lambda *xs: msa_attention(*xs, cu, CONFIGS[name], **BOUND)
    xs, cu = inputs([0, 40, 57])
    results = []
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        o, kl = f(*xs)
        results.append([o, kl, *torch.autograd.grad(o.square().sum() + kl, xs)])
    assert all(map(torch.equal, *results))


def test_padding_behind_the_last_sequence_changes_nothing():
    """Rows behind cu_seqlens[-1], whatever they hold: values and gradients as without them."""
    for name, config in CONFIGS.items():
        xs, cu = inputs([0, 24, 40])
        padded = [torch.cat((x, 9 * x[:23])).detach().requires_grad_() for x in xs]
        results = []
        for arguments in (xs, padded):
            o, kl = msa_attention(*arguments, cu, config, **BOUND)
            made = torch.autograd.grad(o.square().sum() + kl, arguments)
            results.append([kl.detach(), *(x[:40] for x in (o.detach(), *made))])
            assert not any(x[40:].any() for x in (o, *made))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda m: f"{name}: {m}")


def test_the_old_spelling_is_the_same():
    xs, cu = inputs([0, 40, 57])
    want = msa_attention(*xs, cu, CONFIGS["selected"], **BOUND)
    with pytest.warns(DeprecationWarning, match="its name is msa_cpp.msa_attention") as caught:
        got = msa_cpp.autograd.msa_attention(*xs, cu, CONFIGS["selected"], **BOUND)
    assert caught[0].filename == __file__ and all(map(torch.equal, got, want))


def test_no_queries_have_no_loss():
    xs, _ = inputs([0, 8])
    none = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    _, kl = msa_attention(*xs, none, CONFIGS["selected"], **BOUND)
    assert kl == 0 and not any(g.any() for g in torch.autograd.grad(kl, xs[3:]))


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "recomputed", "backward inside", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_is_casting_by_hand(name, dtype, way):
    """q and k in f32, as RoPE leaves them, v as its projection makes it; gradients come back so."""
    torch._dynamo.reset()
    xs, cu = inputs(BATCHES["ragged"])
    xs[2] = xs[2].detach().to(dtype).requires_grad_()
    call = layer = lambda *xs: msa_attention(*xs, cu, CONFIGS[name], **BOUND)
    if way == "recomputed":
        layer = lambda *xs: checkpoint(call, *xs, use_reentrant=False)
    elif way == "compiled":
        layer = torch.compile(call, fullgraph=True, backend="aot_eager")
    o, kl = call(*(x.to(dtype) for x in xs))
    want = [o, kl, *torch.autograd.grad(o.float().square().sum() + kl, xs)]
    with torch.autocast(DEVICE, dtype=dtype):
        o, kl = layer(*xs)
        loss = o.float().square().sum() + kl
        got = torch.autograd.grad(loss, xs) if way == "backward inside" else None
    got = [o, kl, *(got or torch.autograd.grad(loss, xs))]
    assert [x.dtype for x in got] == [dtype, torch.float32, *(x.dtype for x in xs)]
    assert all(map(torch.equal, got, want))


def test_opcheck():
    xs, cu = inputs([0, 40, 57])
    q, k, v, q_idx, k_idx = xs
    config = CONFIGS["selected"]
    ids = select(q_idx, k_idx, cu, config, **BOUND)
    _, lse = attend(q, k, v, ids, cu, config, **BOUND)
    arguments = (q.detach(), k.detach(), lse, q_idx, k_idx, ids, cu, cu)
    bounds = {f"{name}_{x}": bound for name, bound in BOUND.items() for x in "qk"}
    outcome = torch.library.opcheck(torch.ops.msa_cpp.index_kl.default, arguments,
                                    {"block_size": 4, **bounds})
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("fields, message", [
    ({"block_size": 0}, "block_size: got 0, expected at least 1"),
    ({"topk": 0}, "topk: got 0, expected at least 1, the forced blocks, or None"),
    ({"topk": 2, "init_blocks": 2}, "topk: got 2, expected at least 3"),
    ({"local_blocks": -1}, "local_blocks: got -1, expected at least 0"),
    ({"kl_support": "all"}, "kl_support: got 'all', supported are selected and full"),
])
def test_configurations_that_mean_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        MsaConfig(**fields)


@pytest.mark.skipif(DEVICE != "cpu", reason="lengths on a device are not read back")
def test_lengths_that_mean_nothing():
    xs, _ = inputs([0, 40])
    with pytest.raises(ValueError, match="cu_seqlens"):
        msa_attention(*xs, torch.tensor([0, 30, 20, 40], dtype=torch.int32), CONFIGS["selected"])


def test_errors_name_the_argument():
    xs, cu = inputs([0, 40])
    q, k, v, q_idx, k_idx = xs
    with pytest.raises(ValueError, match="k_idx"):
        msa_attention(q, k, v, q_idx, k_idx[:, :4].contiguous(), cu, CONFIGS["selected"], **BOUND)
    with torch.device(DEVICE):
        pages = torch.zeros(10, 2, 4, 16, requires_grad=True)
        ids, table = torch.zeros(2, 40, 1).int(), torch.zeros(1, 10).int()
        length = torch.tensor([40], dtype=torch.int32)
    o = msa_cpp.sparse_attention(q, pages, pages, ids, cu_seqlens_q=cu, page_table=table,
                                 block_size=4, seq_lens=length, max_seqlen_q=40, max_seqlen_k=40)
    with pytest.raises(NotImplementedError, match="page_table: given"):
        o.sum().backward()
