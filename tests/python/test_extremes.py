"""Numbers at the ends of their range, and lists and masks that engines hand over by accident."""

import numpy as np
import pytest

import msa_cpp
from msa_arrays import BACKENDS, DEVICE, KINDS

kinds = pytest.mark.parametrize("kind", KINDS, ids=repr)
backends = pytest.mark.parametrize("backend", BACKENDS)
FLOAT = KINDS[0]


@pytest.fixture(autouse=True)
def _there(request):
    if "kind" in request.fixturenames:
        request.getfixturevalue("kind").skip_unless_there()


def packed(kind, q_len, kv_len):
    """One sequence; on a GPU with the bounds of its lengths."""
    out = {"cu_seqlens_q": kind.raw(np.array([0, q_len], np.int32)),
           "cu_seqlens_k": kind.raw(np.array([0, kv_len], np.int32))}
    return out if DEVICE == "cpu" else out | {"max_seqlen_q": q_len, "max_seqlen_k": kv_len}


def paged(kind, kv_len, block):
    """One sequence whose pages follow each other."""
    table = np.arange(-(-kv_len // block), dtype=np.int32)[None]
    out = {"cu_seqlens_q": kind.raw(np.array([0, 1], np.int32)), "max_seqlen_q": 1,
           "seq_lens": kind.raw(np.array([kv_len], np.int32)), "page_table": kind.raw(table)}
    return out if DEVICE == "cpu" else out | {"max_seqlen_k": kv_len}


def constant(*shape, value):
    return np.full(shape, value, np.float32)


# ---- large logits --------------------------------------------------------------------------------


def large(kind):
    """A number that every dtype holds exactly, and whose square every product of 128."""
    return 57344.0 if kind.dtype == "float16" else 133120.0


@kinds
@backends
@pytest.mark.parametrize("dim", [64, 128])
def test_one_key_of_a_large_logit_is_everything(kind, backend, dim):
    x = large(kind)
    q, k = kind.rows(constant(1, 2, dim, value=x)), kind.rows(constant(1, 1, dim, value=x))
    options = {**packed(kind, 1, 1), "backend": backend}
    ids = kind.raw(np.zeros((1, 1, 1), np.int32))
    calls = [lambda: msa_cpp.dense_attention(q, k, k, **options, return_lse=True),
             lambda: msa_cpp.sparse_attention(q, k, k, ids, **options, return_lse=True),
             lambda: msa_cpp.sparse_attention(
                 q, *[kind.rows(constant(1, 1, 4, dim, value=x))] * 2, ids, **paged(kind, 1, 4),
                 block_size=4, return_lse=True, backend=backend)]
    for call in calls:
        out, lse = call()
        np.testing.assert_allclose(kind.numpy(out), x, rtol=2.0 ** -22)
        np.testing.assert_allclose(kind.numpy(lse), x * x * dim ** 0.5, rtol=2.0 ** -21)
    mass = msa_cpp.block_mass(q, k, lse, **options)
    np.testing.assert_allclose(kind.numpy(mass), 1, rtol=2.0 ** -22)


@kinds
@backends
@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0 ** -12])
def test_only_the_largest_of_large_logits_counts(kind, backend, scale):
    """Over 300 keys that rise from small logits to the largest, which is one key or two."""
    dim, keys = 64, 300
    weights = np.linspace(0, 120, keys).round() * 2.0 ** 8  # up to 2^15, exact in 8 bits
    values = np.arange(keys * dim, dtype=np.float32).reshape(keys, 1, dim) % 7
    q = kind.rows(constant(1, 1, dim, value=2.0 ** 15) * np.sign(scale).astype(np.float32))
    for at in ([299], [130], [7, 8], [5, 290]):
        rows = weights.copy()
        rows[at] = 125 * 2.0 ** 8
        k = kind.rows(np.repeat(rows.astype(np.float32), dim).reshape(keys, 1, dim))
        out, lse = msa_cpp.dense_attention(q, k, kind.rows(values), **packed(kind, 1, keys),
                                           softmax_scale=scale, return_lse=True, backend=backend)
        largest = abs(scale) * dim * 2.0 ** 15 * 125 * 2.0 ** 8
        want = values[at].mean(0)
        np.testing.assert_allclose(kind.numpy(out)[0], want, rtol=0, atol=2.0 ** -8 * want.max())
        np.testing.assert_allclose(kind.numpy(lse), largest, rtol=2.0 ** -20)


@kinds
@backends
def test_merge_of_equal_large_parts_is_their_mean(kind, backend):
    parts = np.array([1, 3, 5], np.float32)[:, None, None, None] * np.ones((3, 1, 1, 8), np.float32)
    lse = np.array([2e11, 2e11, 1e11], np.float32)[:, None, None]
    out, total = msa_cpp.merge(kind.rows(parts), kind.raw(lse), return_lse=True, backend=backend)
    np.testing.assert_array_equal(kind.numpy(out), 2)
    np.testing.assert_array_equal(kind.numpy(total), np.float32(2e11))
    lse[1] = np.nan
    out, total = msa_cpp.merge(kind.rows(parts), kind.raw(lse), return_lse=True, backend=backend)
    assert np.isnan(kind.numpy(out)).all() and np.isnan(kind.numpy(total)).all()


@kinds
@backends
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_large_logits(kind, backend, sparse):
    """Of two keys the second is larger: all of d_o goes to its value, nothing to q and k."""
    x, dim = large(kind) / 2, 64
    q = kind.rows(constant(1, 2, dim, value=x))
    k = kind.rows(np.concatenate([constant(1, 1, dim, value=x), constant(1, 1, dim, value=2 * x)]))
    v = kind.rows(np.stack([constant(1, dim, value=3), constant(1, dim, value=5)]))
    dout = kind.rows(constant(1, 2, dim, value=2))
    options = {**packed(kind, 1, 2), "backend": backend}
    ids = [kind.raw(np.array([[[1, 0]]], np.int32))] if sparse else []
    if sparse:
        options["block_size"] = 1
    name = "sparse_attention" if sparse else "dense_attention"
    out, lse = getattr(msa_cpp, name)(q, k, v, *ids, **options, return_lse=True)
    dq, dk, dv = getattr(msa_cpp.gradients, name + "_backward")(
        q, k, v, *ids, out, lse, dout, **options)
    np.testing.assert_array_equal(kind.numpy(dq), 0)
    np.testing.assert_array_equal(kind.numpy(dk), 0)
    np.testing.assert_allclose(kind.numpy(dv)[:, 0, 0], [0, 4], rtol=2.0 ** -22)


@kinds
@backends
def test_kl_of_large_logits(kind, backend):
    """Teacher and student agree on the larger key."""
    x, dim = large(kind) / 2, 64
    q = kind.rows(constant(1, 2, dim, value=x))
    k = kind.rows(np.concatenate([constant(1, 1, dim, value=x), constant(1, 1, dim, value=2 * x)]))
    q_idx, k_idx = (kind.rows(np.array(kind.numpy(a))[:, 0].reshape(s)) for a, s in (
        (q, (1, 1, dim)), (k, (2, dim))))
    options = {**packed(kind, 1, 2), "backend": backend}
    _, lse = msa_cpp.dense_attention(q, k, k, **options, return_lse=True)
    index_lse = msa_cpp.gradients.index_lse(q_idx, k_idx, **options)
    np.testing.assert_allclose(kind.numpy(index_lse), 2 * x * x * dim ** 0.5, rtol=2.0 ** -21)
    kl, dq_idx, dk_idx = msa_cpp.gradients.kl_backward(
        q, k, lse, q_idx, k_idx, index_lse, **options, return_kl=True)
    for zero in (kl, dq_idx, dk_idx):
        np.testing.assert_allclose(kind.numpy(zero), 0, atol=1e-6)


# ---- what a query may not see --------------------------------------------------------------------


@kinds
@backends
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_nobody_may_see_stay_out(kind, backend, bad):
    """Rows before a poisoned token are those of clean values; it and later ones show it."""
    tokens, dim, block = 300, 64, 128
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((tokens, heads, dim), np.float32) for heads in (4, 2, 2))
    options = {**packed(kind, tokens, tokens), "block_size": block, "backend": backend}
    lists = np.broadcast_to(np.array([2, 0, 1], np.int32), (2, tokens, 3)).copy()
    q, k, ids = kind.rows(q), kind.rows(k), kind.raw(lists)

    def both(values):
        rows = kind.rows(values)
        return [kind.numpy(call) for call in (
            msa_cpp.dense_attention(q, k, rows, **options),
            msa_cpp.sparse_attention(q, k, rows, ids, **options))]

    clean = both(v)
    for at in (0, 77, 128, 299):
        poisoned = v.copy()
        poisoned[at, 0, 3] = bad
        for got, want in zip(both(poisoned), clean):
            np.testing.assert_array_equal(got[:at], want[:at])
            np.testing.assert_array_equal(got[:, 2:], want[:, 2:])  # heads of the other KV head
            assert not np.isfinite(got[at:, :2, 3]).any()
            np.testing.assert_array_equal(got[at:, :2, :3], want[at:, :2, :3])


@kinds
@backends
def test_a_page_of_another_request_stays_out(kind, backend):
    """Decoding over a pool whose other pages, and whose rows past the last token, are NaN."""
    dim, block, kv_len = 64, 8, 20
    rng = np.random.default_rng(1)
    q = kind.rows(rng.standard_normal((1, 4, dim), np.float32))
    k, v = (rng.standard_normal((6, 2, block, dim), np.float32) for _ in range(2))
    ids = kind.raw(np.array([[[0, 2, -1]], [[2, 1, 0]]], np.int32))
    options = {**paged(kind, kv_len, block), "block_size": block, "backend": backend}
    want = kind.numpy(msa_cpp.sparse_attention(q, kind.rows(k), kind.rows(v), ids, **options))
    for pool in (k, v):
        pool[3:] = np.nan
        pool[2, :, kv_len % block:] = np.nan
    v[1, 0] = np.nan  # not listed by the first KV head
    got = kind.numpy(msa_cpp.sparse_attention(q, kind.rows(k), kind.rows(v), ids, **options))
    np.testing.assert_array_equal(got, want)


@backends
def test_a_key_that_is_no_number_shows(backend):
    """A key of NaN that a query sees makes its row NaN, and no weight of 0."""
    kind = FLOAT
    keys = np.ones((9, 1, 8), np.float32)
    keys[5] = np.nan
    q, v = kind.rows(np.ones((9, 1, 8), np.float32)), kind.rows(np.ones((9, 1, 8), np.float32))
    out, lse = msa_cpp.dense_attention(q, kind.rows(keys), v, **packed(kind, 9, 9),
                                       return_lse=True, backend=backend)
    assert np.isnan(kind.numpy(out)).all((1, 2)).tolist() == [False] * 5 + [True] * 4
    assert np.isnan(kind.numpy(lse))[:, 0].tolist() == [False] * 5 + [True] * 4


# ---- lists that name a block twice ---------------------------------------------------------------


@backends
@pytest.mark.parametrize("lists", [[0, 2, 0], [2, 2, -1], [1, 0, 1]], ids=str)
def test_a_block_twice(backend, lists):
    """An error on a CPU; on a GPU it counts once, in all operators that take lists."""
    kind = FLOAT
    rng = np.random.default_rng(2)
    rows = {name: kind.rows(rng.standard_normal(shape, np.float32)) for name, shape in (
        ("q", (1, 2, 8)), ("k", (300, 1, 8)), ("q_idx", (1, 1, 8)), ("k_idx", (300, 8)))}
    q, k, q_idx, k_idx = rows.values()
    distinct = [*dict.fromkeys(i for i in lists if i >= 0)]
    twice = kind.raw(np.array([[lists]], np.int32))
    once = kind.raw(np.array([[distinct + [-1] * (3 - len(distinct))]], np.int32))
    options = {**packed(kind, 1, 300), "backend": backend}
    pages = kind.rows(rng.standard_normal((3, 1, 128, 8), np.float32))
    out, lse = msa_cpp.sparse_attention(q, k, k, once, **options, return_lse=True)
    index_lse = msa_cpp.gradients.index_lse(q_idx, k_idx, once, **options)
    lengths = {n: a for n, a in options.items() if n != "max_seqlen_k"}
    calls = {
        "sparse_attention": lambda ids: msa_cpp.sparse_attention(
            q, k, k, ids, **options, return_lse=True),
        "decode": lambda ids: msa_cpp.sparse_attention(
            q, pages, pages, ids, **paged(kind, 300, 128), return_lse=True, backend=backend),
        "index_lse": lambda ids: [msa_cpp.gradients.index_lse(q_idx, k_idx, ids, **options)],
        "backward": lambda ids: msa_cpp.gradients.sparse_attention_backward(
            q, k, k, ids, out, lse, q, **options),
        "kl_backward": lambda ids: msa_cpp.gradients.kl_backward(
            q, k, lse, q_idx, k_idx, index_lse, ids, **options, return_kl=True),
        "kl_loss": lambda ids: [msa_cpp.gradients.kl_loss(
            q, k, lse, q_idx, k_idx, index_lse, ids, **options)],
        "block_lists": lambda ids: msa_cpp.block_lists(
            ids, num_blocks=3, **({**lengths, **packed(kind, 1, 300)})),
    }
    for name, call in calls.items():
        if DEVICE == "cpu":
            slot = next(i for i in range(3) if lists[i] in lists[:i])
            with pytest.raises(ValueError, match=rf"block_ids\[0,0,{slot}\]: got {lists[slot]} a "
                               "second time, expected distinct blocks"):
                call(twice)
            continue
        for got, want in zip(call(twice), call(once)):
            got, want = kind.numpy(got), kind.numpy(want)
            if name == "block_lists":  # slots are those of the first places
                want = [lists.index(distinct[e]) if e >= 0 else e for e in want.ravel()] \
                    if want.shape == (1, 3) else want.ravel()
                np.testing.assert_array_equal(got.ravel(), want)
            else:
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ---- selection without a mask --------------------------------------------------------------------


@backends
@pytest.mark.parametrize("options", [{}, {"local_blocks": 3}, {"init_blocks": 1}], ids=str)
def test_without_a_mask_the_last_block_is_forced(backend, options):
    kind = FLOAT
    rng = np.random.default_rng(0)
    q_idx = kind.rows(rng.standard_normal((40, 2, 8), np.float32))
    k_idx = kind.rows(rng.standard_normal((40, 8), np.float32))
    call = {**packed(kind, 40, 40), "block_size": 8, "causal": False, "backend": backend}
    got = kind.numpy(msa_cpp.index_select(q_idx, k_idx, topk=4, **options, **call))
    scores = msa_cpp.index_scores(q_idx, k_idx, **call)
    want = kind.numpy(msa_cpp.select_blocks(scores, 4, **options, backend=backend))
    np.testing.assert_array_equal(got, want)
    assert (got == 4).any(-1).all()
    shard = {**call, "block_offset": kind.raw(np.array([3], np.int32))}
    got = kind.numpy(msa_cpp.index_select(q_idx, k_idx, topk=2, **shard))
    assert (got == 3 + 4).any(-1).all()
