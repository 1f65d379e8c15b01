"""msa_attention: gradients against plain torch, who gets any, compilation, and its errors."""

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import msa_cpp  # noqa: E402
import msa_cpp.torch_ops  # noqa: E402, F401
import msa_training_oracle as oracle  # noqa: E402
from msa_cpp.autograd import MsaConfig, attend, msa_attention, select  # noqa: E402

CONFIGS = {
    "selected": MsaConfig(block_size=4, topk=3),
    "scaled, two local blocks": MsaConfig(block_size=8, topk=4, local_blocks=2, init_blocks=1,
                                          softmax_scale=0.4),
    "full support": MsaConfig(block_size=4, topk=3, kl_support="full"),
    "warm-up": MsaConfig(block_size=4, topk=None),
}
BATCHES = {"ragged": [0, 1, 40, 40, 57], "one": [0, 48]}


def inputs(cu, group=2, dtype=torch.float32, seed=0):
    """q, k, v, q_idx, k_idx that require gradients, and cu_seqlens; Hkv 2, D 16, Di 8."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(cu[-1], 2 * group, 16), (cu[-1], 2, 16), (cu[-1], 2, 16), (cu[-1], 2, 8),
              (cu[-1], 8)]
    made = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    return made, torch.tensor(cu, dtype=torch.int32)


def expected(xs, cu, config, ids, weight):
    """Values and gradients of plain torch in float64, under the given lists."""
    q, k, v, q_idx, k_idx = xs = [x.detach().double().requires_grad_() for x in xs]
    scale = config.softmax_scale or q.shape[-1] ** -0.5
    mask = oracle.visible(cu, config.block_size, ids, k.shape[1])
    o, _ = oracle.attention(q, k, v, mask, scale)
    if config.kl_support == "full":
        mask = oracle.visible(cu, config.block_size, None, k.shape[1])
    kl = oracle.kl(q, k, q_idx, k_idx, mask, scale).mean()
    return o, kl, torch.autograd.grad((o * weight).sum() + 3 * kl, xs)


def distance(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_plain_torch(name, batch, group):
    config = CONFIGS[name]
    xs, cu = inputs(BATCHES[batch], group)
    ids = None if config.topk is None else select(*xs[3:], cu, config)
    weight = torch.randn(xs[0].shape, generator=torch.Generator().manual_seed(1))
    o, kl = msa_attention(*xs, cu, config)
    got = torch.autograd.grad((o * weight).sum() + 3 * kl, xs)
    want_o, want_kl, want = expected(xs, cu, config, ids, weight)
    assert distance(o.detach(), want_o) < 1e-5
    assert abs(float(kl) - float(want_kl)) < 1e-5 * max(1, float(want_kl))
    for which, a, b in zip(("q", "k", "v", "q_idx", "k_idx"), got, want):
        assert distance(a, b) < 1e-4, which


def test_gradients_in_bf16_are_as_close_as_those_of_torch():
    config = CONFIGS["selected"]
    xs, cu = inputs([0, 64, 96], 2, torch.bfloat16)
    ids = select(*xs[3:], cu, config)
    weight = torch.randn(xs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    o, kl = msa_attention(*xs, cu, config)
    got = torch.autograd.grad((o * weight).sum() + 3 * kl, xs)
    *_, want = expected(xs, cu, config, ids, weight)
    # Torch's own bf16, of the same formulas.
    mask = oracle.visible(cu, config.block_size, ids, 2)
    theirs_o, _ = oracle.attention(*xs[:3], mask, 0.25)
    theirs_kl = oracle.kl(*xs[:2], *xs[3:], mask, 0.25).mean()
    theirs = torch.autograd.grad((theirs_o * weight).sum() + 3 * theirs_kl, xs)
    for a, b, c in zip(got, want, theirs):
        assert torch.cosine_similarity(a.double().flatten(), b.flatten(), 0) > 0.999
        assert distance(a, b) <= 2 * distance(c, b)


def test_the_formulas_of_the_oracle_pass_gradcheck():
    """Operators take no float64. So finite differences judge the plain implementation, in float64,
    and it judges them."""
    xs, cu = inputs([0, 3, 12])
    xs = [x.detach().double().requires_grad_() for x in xs]
    ids = select(*(x.float() for x in xs[3:]), cu, CONFIGS["selected"])
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
    o, kl = msa_attention(*xs, cu, CONFIGS[name])
    of_o = torch.autograd.grad(o.square().sum(), xs, allow_unused=True)
    of_kl = torch.autograd.grad(kl, xs, allow_unused=True)
    assert all(map(none, (*of_o[3:], *of_kl[:3])))
    assert not any(map(none, (*of_o[:3], *of_kl[3:])))


def test_all_blocks_selected_is_dense():
    xs, cu = inputs([0, 40, 57])
    wide = MsaConfig(block_size=4, topk=10)
    results = []
    for config in (wide, dataclasses.replace(wide, topk=None)):
        o, kl = msa_attention(*xs, cu, config)
        results.append([o, kl, *torch.autograd.grad(o.square().sum() + kl, xs)])
    for sparse, dense in zip(*results):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


def test_the_lists_of_another_selector_are_differentiable_too():
    xs, cu = inputs([0, 24])
    ids = torch.tensor([0, 2]).int().expand(2, 24, 2)
    o, lse = attend(*xs[:3], ids, cu, MsaConfig(block_size=8, topk=2))
    want, _ = oracle.attention(*xs[:3], oracle.visible(cu, 8, ids, 2), 0.25)
    assert not lse.requires_grad
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), xs[:3]) for x in (o, want))):
        assert distance(a, b.double()) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_it_compiles_in_one_graph(name):
    torch._dynamo.reset()
    call = lambda *xs: msa_attention(*xs, cu, CONFIGS[name])
    xs, cu = inputs([0, 40, 57])
    results = []
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        o, kl = f(*xs)
        results.append([o, kl, *torch.autograd.grad(o.square().sum() + kl, xs)])
    assert all(map(torch.equal, *results))


def test_opcheck():
    xs, cu = inputs([0, 40, 57])
    q, k, v, q_idx, k_idx = xs
    config = CONFIGS["selected"]
    ids = select(q_idx, k_idx, cu, config)
    _, lse = attend(q, k, v, ids, cu, config)
    arguments = (q.detach(), k.detach(), lse, q_idx, k_idx, ids, cu, cu)
    outcome = torch.library.opcheck(torch.ops.msa_cpp.index_kl.default, arguments,
                                    {"block_size": 4})
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


def test_errors_name_the_argument():
    xs, cu = inputs([0, 40])
    q, k, v, q_idx, k_idx = xs
    config = CONFIGS["selected"]
    with pytest.raises(ValueError, match="cu_seqlens"):
        msa_attention(*xs, torch.tensor([0, 30, 20, 40], dtype=torch.int32), config)
    with pytest.raises(ValueError, match="k_idx"):
        msa_attention(q, k, v, q_idx, k_idx[:, :4].contiguous(), cu, config)
    paged = torch.zeros(1, 10, dtype=torch.int32)
    pages = torch.zeros(10, 2, 4, 16, requires_grad=True)
    o = msa_cpp.sparse_attention(q, pages, pages, torch.zeros(2, 40, 1, dtype=torch.int32),
                                 cu_seqlens_q=cu, page_table=paged, block_size=4,
                                 seq_lens=torch.tensor([40], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="page_table: given"):
        o.sum().backward()
