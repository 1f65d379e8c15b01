"""Batch, msa_attention, and the rule of results: the same numbers by every way of calling."""

import dataclasses
import inspect

import numpy as np
import pytest

import msa_cpp
from msa_arrays import DEVICE, FRAMEWORKS, Kind
from msa_cpp._call import OPERATORS
from msa_oracle import Problem

FORCED = dict(topk=3, init_blocks=1, local_blocks=1)
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)
paged_or_not = pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])


def layer(framework, paged, q_lens=(9, 2)):
    """(q, k, v, q_idx, k_idx), fields of a Batch"""
    kind = Kind(framework, "float32")
    kind.skip_unless_there()
    p = Problem(list(q_lens), [40, 17], heads_kv=2, group=2, head_dim=16, index_dim=8, block_size=4,
                topk=3, paged=paged)
    new = (kind.rows(p.normal(p.tokens, heads, dim)) for heads, dim in ((4, 16), (2, 8)))
    q, q_idx = new
    k, v, k_idx = (kind.rows(p.store(p.normal(57, *inner))) for inner in ((2, 16), (2, 16), (8,)))
    bounds = dict(max_seqlen_q=max(q_lens), max_seqlen_k=40) if paged or DEVICE != "cpu" else {}
    return (q, k, v, q_idx, k_idx), {**kind.batch(p), **bounds, "block_size": 4}


def same(got, want):
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert type(a) is type(b)
        np.testing.assert_array_equal(*(np.asarray(getattr(x, "cpu", lambda x=x: x)())
                                        for x in (a, b)))


# ---- the batch


@frameworks
@paged_or_not
def test_a_batch_is_its_keywords(framework, paged):
    (q, k, v, q_idx, k_idx), fields = layer(framework, paged)
    batch = msa_cpp.Batch(**fields)
    assert len(batch) == 2
    ids = msa_cpp.index_select(q_idx, k_idx, topk=3, batch=batch)
    for call in (lambda **b: msa_cpp.index_select(q_idx, k_idx, topk=3, return_scores=True, **b),
                 lambda **b: msa_cpp.index_scores(q_idx, k_idx, **b),
                 lambda **b: msa_cpp.sparse_attention(q, k, v, ids, return_lse=True, **b),
                 lambda **b: msa_cpp.dense_attention(q, k, v, return_lse=True,
                                                     return_block_max=True, **b),
                 lambda **b: msa_cpp.msa_attention(q, k, v, q_idx, k_idx, **FORCED, **b)):
        same(call(batch=batch), call(**fields))


@pytest.mark.parametrize("changes, error, message", [
    ({"cu_seqlens_q": np.zeros((2, 2), np.int32)}, ValueError,
     "cu_seqlens_q: got shape [2, 2], expected [B+1]"),
    ({"seq_lens": np.array([1, 2, 3], np.int32)}, ValueError,
     "seq_lens: got shape [3], expected [B] with B = 2"),
    ({"seq_lens": np.array([1, 2])}, TypeError, "seq_lens: got dtype int64, expected int32"),
    ({"page_table": np.zeros(2, np.int32)}, ValueError,
     "page_table: got shape [2], expected [B,max_pages] with B = 2"),
    ({"seq_lens": None}, ValueError, "seq_lens: not given, expected the lengths of the pages"),
    ({"seq_lens": None, "page_table": None}, ValueError,
     "cu_seqlens_k, seq_lens: neither given, expected one"),
    ({"cu_seqlens_k": np.zeros(3, np.int32)}, ValueError,
     "cu_seqlens_k, seq_lens: both given, expected one"),
    ({"block_size": 0}, ValueError, "block_size: got 0, expected >= 1"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: got -1, expected >= 0"),
])  # fmt: skip
def test_a_bad_batch_is_refused_when_it_is_made(changes, error, message):
    fields = dict(cu_seqlens_q=np.array([0, 1, 2], np.int32), seq_lens=np.array([3, 4], np.int32),
                  page_table=np.zeros((2, 2), np.int32))
    msa_cpp.Batch(**fields)
    with pytest.raises(error) as caught:
        msa_cpp.Batch(**{**fields, **changes})
    assert str(caught.value).startswith(message)


@frameworks
def test_fields_beside_a_batch_are_refused(framework):
    (q, k, v, *_), fields = layer(framework, paged=False)
    with pytest.raises(TypeError, match="block_size, causal: given beside batch, expected in it"):
        msa_cpp.dense_attention(q, k, v, batch=msa_cpp.Batch(**fields), block_size=4, causal=True)


def test_lengths_of_a_batch_may_grow():
    arrays, fields = layer(FRAMEWORKS[0], paged=True)
    batch = msa_cpp.Batch(**fields)
    fields["seq_lens"][1] -= 1
    before = msa_cpp.msa_attention(*arrays, **FORCED, batch=batch)
    fields["seq_lens"][1] += 1
    same(msa_cpp.msa_attention(*arrays, **FORCED, batch=batch),
         msa_cpp.msa_attention(*arrays, **FORCED, **fields))
    assert (before != msa_cpp.msa_attention(*arrays, **FORCED, batch=batch)).any()


@frameworks
def test_rows_of_a_larger_page_table(framework):
    arrays, fields = layer(framework, paged=True)
    want = msa_cpp.msa_attention(*arrays, **FORCED, **fields)
    kind, table = Kind(framework, "float32"), Kind(framework, "float32").numpy(fields["page_table"])
    larger = np.full((5, table.shape[1]), -1, np.int32)
    larger[[3, 0]] = table
    flat, ends = larger.ravel(), np.array([3 * table.shape[1], 0], np.int32)
    for pages, rows in ((larger, np.array([3, 0], np.int32)), (flat, ends)):
        batch = msa_cpp.Batch(**{**fields, "page_table": kind.raw(pages)},
                              page_rows=kind.raw(rows))
        same(msa_cpp.msa_attention(*arrays, **FORCED, batch=batch), want)


# ---- results


@pytest.mark.parametrize("op", OPERATORS)
def test_every_result_has_its_array_and_optional_ones_are_asked_for(op):
    """The rule of `msa_cpp.ops`, of all operators of the library."""
    known = inspect.signature(getattr(msa_cpp, op)).parameters
    optional = {a.name for a in OPERATORS[op].outputs if a.role == "extra"}
    for a in OPERATORS[op].outputs:
        assert known[a.name].default is None and known[a.name].kind is known[a.name].KEYWORD_ONLY
    assert {n for n in known if n.startswith("return_")} == {f"return_{n}" for n in optional}
    assert ("batch" in known) == OPERATORS[op].batched


@frameworks
def test_an_array_for_an_optional_result_is_filled_and_not_returned(framework):
    (q, k, v, *_), fields = layer(framework, paged=False)
    out, lse = msa_cpp.dense_attention(q, k, v, return_lse=True, **fields)
    given = lse * 0
    same(msa_cpp.dense_attention(q, k, v, lse=given, **fields), out)
    same(given, lse)


# ---- msa_attention


@frameworks
@pytest.mark.parametrize("q_lens", [(9, 2), (40, 17)], ids=["decode", "prefill"])
@paged_or_not
def test_msa_attention_is_selection_and_attention(framework, paged, q_lens):
    (q, k, v, q_idx, k_idx), fields = layer(framework, paged, q_lens)
    ids = msa_cpp.index_select(q_idx, k_idx, **FORCED, **fields)
    out, lse = msa_cpp.sparse_attention(q, k, v, ids, softmax_scale=0.3, return_lse=True, **fields)
    call = lambda **options: msa_cpp.msa_attention(q, k, v, q_idx, k_idx, **FORCED, **options,
                                                   softmax_scale=0.3, **fields)
    got = call(return_lse=True, return_block_ids=True)
    same(got[2], ids)
    for a, b in zip(got[:2], (out, lse)):  # a decoding step sums in another order
        np.testing.assert_allclose(a.tolist(), b.tolist(), rtol=1e-5, atol=1e-6)
    same(call(), got[0])
    same(call(return_block_ids=True), (got[0], ids))
    arrays = [x * 0 for x in got]
    assert call(out=arrays[0], lse=arrays[1], block_ids=arrays[2]) is arrays[0]
    same(tuple(arrays), got)


@frameworks
def test_without_topk_every_block_is_read(framework):
    arrays, fields = layer(framework, paged=True)
    same(msa_cpp.msa_attention(*arrays, topk=None, return_lse=True, **fields),
         msa_cpp.dense_attention(*arrays[:3], return_lse=True, **fields))
    with pytest.raises(ValueError, match="block_ids: asked for, expected a number as topk"):
        msa_cpp.msa_attention(*arrays, topk=None, return_block_ids=True, **fields)


@pytest.mark.skipif(DEVICE != "cpu", reason="NumPy arrays have no device")
def test_a_loss_is_torchs_alone():
    arrays, fields = layer("numpy", paged=False)
    with pytest.raises(TypeError, match="q: got a NumPy array, expected a torch tensor"):
        msa_cpp.msa_attention(*arrays, return_kl=True, **fields)


@paged_or_not
def test_msa_attention_compiles_with_a_batch(paged):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch._dynamo.reset()
    arrays, fields = layer("torch", paged)
    batch = msa_cpp.Batch(**fields)
    call = lambda *xs, **b: msa_cpp.msa_attention(*xs, **FORCED, return_lse=True, **b)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    same(compiled(*arrays, batch=batch), call(*arrays, batch=batch))
    same(compiled(*arrays, **fields), call(*arrays, batch=batch))


def test_gradients_pass_only_where_something_requires_them():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays, fields = layer("torch", paged=False)
    batch = msa_cpp.Batch(**fields)
    plain = msa_cpp.msa_attention(*arrays, **FORCED, batch=batch)
    assert not plain.requires_grad
    arrays[0].requires_grad_(), arrays[3].requires_grad_()
    out = msa_cpp.msa_attention(*arrays, **FORCED, batch=batch)
    assert torch.equal(out, plain)
    of_q, of_index = torch.autograd.grad(out.sum(), (arrays[0], arrays[3]), allow_unused=True)
    assert of_q.any() and of_index is None
    with pytest.raises(ValueError, match="cu_seqlens_k: got another array than cu_seqlens_q"):
        msa_cpp.msa_attention(*arrays, **FORCED, batch=batch, return_kl=True)
    with pytest.raises(NotImplementedError, match="causal: given, supported with return_kl: True"):
        ends = fields["cu_seqlens_q"]
        msa_cpp.msa_attention(*arrays, **FORCED, return_kl=True, batch=dataclasses.replace(
            batch, causal=False, cu_seqlens_k=ends))
