"""Every operator against float64 NumPy, through NumPy and torch, fast backend and reference.

Ragged batches, padded and empty sequences, packed and paged keys, strided views, all drawn by
hypothesis from fixed seeds.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import msa_cpp
import msa_oracle as oracle
from msa_arrays import BACKENDS, DEVICE, FRAMEWORKS, KINDS, Kind

drawn = settings(max_examples=25, deadline=None, derandomize=True, database=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
kinds = pytest.mark.parametrize("kind", KINDS, ids=repr)


@pytest.fixture(autouse=True)
def _there(request):
    if "kind" in request.fixturenames:
        request.getfixturevalue("kind").skip_unless_there()


def transposed(array):
    """The same values with the first two axes swapped in memory."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)


def close(got, want, bound, what):
    assert got.shape == want.shape, what
    finite = np.isfinite(want)
    same = got == want
    same[finite] = np.abs(got[finite] - want[finite]) <= bound  # false for NaN
    worst = np.unravel_index(np.argmin(same), same.shape) if same.size else ()
    assert same.all(), f"{what}{list(worst)}: got {got[worst]}, expected {want[worst]} +- {bound}"


@kinds
@drawn
@given(p=oracle.problems(shards=True))
def test_index_branch(kind: Kind, p):
    q_idx = p.small_integers(p.tokens, p.heads_kv, p.index_dim)
    k_idx = p.small_integers(sum(p.kv_lens), p.index_dim)
    want = oracle.index_scores(p, q_idx, k_idx)
    want_ids, want_best = oracle.index_select(p, want)
    batch = {**kind.batch(p), "block_size": p.block_size, "causal": p.causal}
    rows, keys = kind.rows(transposed(q_idx)), kind.rows(p.store(k_idx, interleaved=True))
    forced = {"init_blocks": p.init_blocks, "local_blocks": p.local_blocks}
    for backend in BACKENDS:
        got = msa_cpp.index_scores(rows, keys, **batch, backend=backend)
        np.testing.assert_array_equal(kind.numpy(got), want)

        best = kind.empty(want_ids.shape, "float32")
        ids = msa_cpp.index_select(rows, keys, topk=p.topk, scores=best, **forced, **batch,
                                   backend=backend)
        np.testing.assert_array_equal(kind.numpy(ids), want_ids)
        np.testing.assert_array_equal(kind.numpy(best), want_best)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@drawn
@given(p=oracle.problems())
def test_select_blocks(framework, p):
    kind = Kind(framework, "float32")
    kind.skip_unless_there()
    scores = p.rng.integers(-2, 3, (p.heads_kv, p.tokens, 2 * p.columns)).astype(np.float32)
    scores[p.rng.random(scores.shape) < 0.1] = -np.inf
    scores[p.rng.random(scores.shape) < 0.1] = np.nan
    every_other = scores[..., ::2]  # any strides, the innermost too
    ranked = np.where(np.isnan(every_other), -np.inf, every_other)
    valid = p.rng.integers(0, p.columns + 1, p.tokens).astype(np.int32)
    forced = {"init_blocks": p.init_blocks, "local_blocks": p.local_blocks}
    same = int(valid[0]) if len(valid) else 0
    for given_valid, per_row in [(kind.raw(valid), valid), (same, np.full_like(valid, same)),
                                 (None, np.full_like(valid, p.columns))]:
        for backend in BACKENDS:
            ids = msa_cpp.select_blocks(kind.raw(every_other), p.topk, backend=backend,
                                        num_valid_blocks=given_valid, **forced)
            np.testing.assert_array_equal(kind.numpy(ids), oracle.select_blocks(p, ranked, per_row))


def qkv(kind, p):
    """q, k, v as stored, and the same values in float32."""
    q = kind.rounded(p.normal(p.tokens, p.heads_q, p.head_dim))
    k, v = (kind.rounded(p.normal(sum(p.kv_lens), p.heads_kv, p.head_dim)) for _ in range(2))
    arrays = (kind.rows(transposed(q)), kind.rows(p.store(k, interleaved=True)),
              kind.rows(p.store(v)))
    return arrays, (q, k, v)


@kinds
@drawn
@given(p=oracle.problems(shards=True))
def test_sparse_attention(kind: Kind, p):
    arrays, values = qkv(kind, p)
    ids = p.block_ids()
    want, want_lse, _, _ = oracle.attention(p, *values, ids)
    o_bound, lse_bound, _ = oracle.tolerance(p, *values, kind.dtype)
    batch = {**kind.batch(p), "block_size": p.block_size, "causal": p.causal,
             "softmax_scale": p.scale}
    for backend in BACKENDS:
        out, lse = msa_cpp.sparse_attention(*arrays, kind.raw(ids), **batch, return_lse=True,
                                            backend=backend)
        close(kind.numpy(out), want, o_bound, f"{backend} out")
        close(kind.numpy(lse), want_lse, lse_bound, f"{backend} lse")


@kinds
@drawn
@given(p=oracle.problems(paged=True))
def test_sparse_attention_of_a_decoding_step(kind: Kind, p):
    arrays, values = qkv(kind, p)
    ids = p.block_ids()[:1]  # one list for all heads, with a head stride of 0
    shared = np.broadcast_to(ids, (p.heads_kv, *ids.shape[1:]))
    want, want_lse, _, _ = oracle.attention(p, *values, shared)
    o_bound, lse_bound, _ = oracle.tolerance(p, *values, kind.dtype)
    given_ids = kind.raw(ids)
    given_ids = given_ids.expand(shared.shape) if kind.framework == "torch" else shared
    for backend in BACKENDS:
        lse = kind.empty(want_lse.shape, "float32")
        out = kind.empty(want.shape, "float32")
        got = msa_cpp.sparse_attention(
            *arrays, given_ids, **kind.batch(p, decode=True), max_seqlen_q=max(p.q_lens, default=0),
            block_size=p.block_size, causal=p.causal, softmax_scale=p.scale, out=out, lse=lse,
            backend=backend)
        assert got is out
        close(kind.numpy(out), want, o_bound, f"{backend} out")
        close(kind.numpy(lse), want_lse, lse_bound, f"{backend} lse")


@kinds
@drawn
@given(p=oracle.problems(paged=True))
def test_msa_layer(kind: Kind, p):
    p.offsets, p.q_offset, p.causal = False, None, True
    (q, k, v), values = qkv(kind, p)
    q_idx = p.small_integers(p.tokens, p.heads_kv, p.index_dim)
    k_idx = p.small_integers(sum(p.kv_lens), p.index_dim)
    want_ids, _ = oracle.index_select(p, oracle.index_scores(p, q_idx, k_idx))
    want, want_lse, _, _ = oracle.attention(p, *values, want_ids)
    o_bound, lse_bound, _ = oracle.tolerance(p, *values, kind.dtype)
    for backend in BACKENDS:
        ids = kind.empty(want_ids.shape, "int32")
        out, lse = msa_cpp.msa_layer(
            q, kind.rows(q_idx), k, v, kind.rows(p.store(k_idx)), **kind.batch(p, decode=True),
            max_seqlen_q=max(p.q_lens, default=0), topk=p.topk, block_size=p.block_size,
            init_blocks=p.init_blocks, local_blocks=p.local_blocks, softmax_scale=p.scale,
            block_ids=ids, return_lse=True, backend=backend)
        np.testing.assert_array_equal(kind.numpy(ids), want_ids)
        close(kind.numpy(out), want, o_bound, f"{backend} out")
        close(kind.numpy(lse), want_lse, lse_bound, f"{backend} lse")


@kinds
@drawn
@given(p=oracle.problems(shards=True))
def test_dense_attention_and_block_mass(kind: Kind, p):
    arrays, values = qkv(kind, p)
    want, want_lse, want_mass, want_max = oracle.attention(p, *values)
    o_bound, lse_bound, mass_bound = oracle.tolerance(p, *values, kind.dtype)
    batch = {**kind.batch(p), "block_size": p.block_size, "causal": p.causal,
             "softmax_scale": p.scale}
    for backend in BACKENDS:
        maxima = kind.empty(want_max.shape, "float32")
        out, lse = msa_cpp.dense_attention(*arrays, **batch, return_lse=True, block_max=maxima,
                                           backend=backend)
        close(kind.numpy(out), want, o_bound, f"{backend} out")
        close(kind.numpy(lse), want_lse, lse_bound, f"{backend} lse")
        close(kind.numpy(maxima), want_max, lse_bound / (p.scale or p.head_dim ** -0.5),
              f"{backend} block_max")
        exact = kind.raw(want_lse.astype(np.float32))
        mass = msa_cpp.block_mass(*arrays[:2], exact, **batch, backend=backend)
        close(kind.numpy(mass), want_mass, mass_bound + 2 * lse_bound, f"{backend} mass")


@kinds
@drawn
@given(p=oracle.problems())
def test_merge(kind: Kind, p):
    parts = 1 + p.seed % 3
    o_parts = kind.rounded(p.normal(parts, p.tokens, p.heads_q, p.head_dim))
    lse_parts = p.normal(parts, p.tokens, p.heads_q) * 3
    lse_parts[p.rng.random(lse_parts.shape) < 0.3] = -np.inf
    want, want_lse = oracle.merge(o_parts, lse_parts)
    unit = {"float32": 2.0 ** -20, "bfloat16": 2.0 ** -8, "float16": 2.0 ** -11}[kind.dtype]
    bound = unit * max(1.0, float(np.abs(o_parts).max(initial=0)))
    for backend in BACKENDS:
        out, lse = msa_cpp.merge(kind.rows(o_parts), kind.raw(lse_parts), return_lse=True,
                                 backend=backend)
        close(kind.numpy(out), want, bound, f"{backend} out")
        close(kind.numpy(lse), want_lse, 2.0 ** -18, f"{backend} lse")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@drawn
@given(p=oracle.problems(shards=True))
def test_block_lists(framework, p):
    kind = Kind(framework, "float32")
    kind.skip_unless_there()
    ids = p.block_ids()
    want_rows, want_entries = oracle.block_lists(p, ids)
    for backend in BACKENDS:
        for num_blocks in (None, want_rows.shape[1] - 1)[DEVICE != "cpu":]:
            row_ptr, entries = msa_cpp.block_lists(
                kind.raw(ids), **kind.batch(p, pages=False), block_size=p.block_size,
                num_blocks=num_blocks, backend=backend)
            np.testing.assert_array_equal(kind.numpy(row_ptr), want_rows)
            np.testing.assert_array_equal(kind.numpy(entries), want_entries)


@kinds
@drawn
@given(p=oracle.problems(paged=True))
def test_append_paged(kind: Kind, p):
    p.kv_lens = [0 if kv < q else kv for q, kv in zip(p.q_lens, p.kv_lens)]  # or padded
    new = [p.normal(p.tokens, p.heads_kv, p.head_dim), p.normal(p.tokens, p.heads_kv, p.head_dim),
           p.normal(p.tokens, p.index_dim)]
    old = [p.normal(p.pages, p.heads_kv, p.block_size, p.head_dim) for _ in range(2)]
    old.append(p.normal(p.pages, p.block_size, p.index_dim))
    want = [kind.rounded(pages) for pages in old]
    for b in range(p.batch):
        if p.kv_lens[b] == 0:
            continue
        for i, t in enumerate(p.rows(b)):
            s = p.kv_lens[b] - p.q_lens[b] + i
            page, slot = p.page_table[b, s // p.block_size], s % p.block_size
            want[0][page, :, slot], want[1][page, :, slot] = (kind.rounded(x[t]) for x in new[:2])
            want[2][page, slot] = kind.rounded(new[2][t])
    meta = kind.batch(p)
    meta.pop("q_offset", None)
    for backend in BACKENDS:
        for with_kv, with_index in ((True, True), (True, False), (False, True)):
            pages = [kind.rows(pages.copy()) for pages in old]
            k, v, k_idx = (kind.rows(x) for x in new)
            result = msa_cpp.append_paged(
                k if with_kv else None, v if with_kv else None, k_idx if with_index else None,
                k_pages=pages[0] if with_kv else None, v_pages=pages[1] if with_kv else None,
                k_idx_pages=pages[2] if with_index else None, block_size=p.block_size, **meta,
                backend=backend)
            assert result is None
            for i, (got, written) in enumerate(zip(pages, (with_kv, with_kv, with_index))):
                expected = want[i] if written else kind.rounded(old[i])
                np.testing.assert_array_equal(kind.numpy(got), expected)
