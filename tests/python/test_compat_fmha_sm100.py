"""msa_cpp.compat.fmha_sm100 against plain torch, and the names under which it can be imported."""

import importlib
import importlib.util
import sys
import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import msa_cpp.compat as compat  # noqa: E402
import msa_oracle as oracle  # noqa: E402
from msa_arrays import DEVICE  # noqa: E402
from msa_cpp.compat import fmha_sm100 as fmha  # noqa: E402
from msa_cpp.compat.fmha_sm100 import api, nvfp4_kv  # noqa: E402
from msa_serving import Serving, check_close, shuffled  # noqa: E402

INF = float("inf")


def batch(**changes):
    """Two decode rows, a verify row of three tokens and a chunk behind a prefix."""
    return Serving(**{**dict(q_lens=[1, 1, 3, 20], kv_lens=[300, 5, 390, 401]), **changes})


def lens(values):
    return torch.tensor(values, dtype=torch.int32)


def plan_of(s, heads=None, kv_heads=None, **options):
    return fmha.fmha_sm100_plan(lens(s.q_lens), lens(s.kv_lens),
                                heads or s.heads_kv * s.group, kv_heads or s.heads_kv,
                                **{**dict(page_size=128, causal=True, device=DEVICE), **options})


def pages(s):
    """K and V as pages [P,Hkv,128,D], index keys as [P,1,128,D], and the flat list of pages."""
    packed = s.kv_cache()
    flat = [page for own in s.own_pages for page in own]
    return (packed[..., :s.dim], packed[..., s.dim:], s.index_cache()[:, None],
            s.int32(flat))


def score_plan(s, **options):
    return plan_of(s, s.heads_kv, 1, output_maxscore=True, num_kv_splits=1, **options)


def valid_of(s):
    return [position // 128 + 1 for _, _, position in s.rows()]


@pytest.mark.parametrize("layout", ["HKT", "THK", "none"])
def test_scores_of_index_heads_in_all_layouts(layout):
    s = batch(layout="layers")
    _, _, k, flat = pages(s)
    plan = score_plan(s)
    assert plan[:3] == (False, 0, 4) and plan[4] is None and plan[3]["max_k_tiles"] == 128
    plan[3]["max_k_tiles"] = 9
    shape = dict(HKT=(2, 9, s.tokens), THK=(s.tokens, 2, 9)).get(layout)
    buffer = None if shape is None else s.poison(*shape)
    out, got = fmha.fmha_sm100(s.idx_q, k, k, plan, kv_indices=flat, output_o=False,
                               max_score=buffer)
    assert out is None and (buffer is None or got is buffer)
    scores = got.transpose(0, 1) if layout == "THK" else got.transpose(1, 2)
    assert torch.equal(scores[..., :4].cpu(), s.scores())  # 4 tiles: the longest request
    assert (scores[..., 4:] == (-INF if buffer is None else 77)).all()


def test_the_plan_is_read_when_it_runs():
    """What callers write into the dict counts, as under a CUDA graph; fewer keys, other pages."""
    long, short = Serving([1, 1], [700, 500]), Serving([1, 1], [131, 400], seed=1)
    _, _, k, flat = pages(short)
    plan = score_plan(long)
    info = plan[3]
    info["kv_segment_lens"].copy_(short.seq_lens)
    info["qo_offset"].copy_(short.prefix_lens)
    info["kv_page_indptr"].copy_(short.int32([0, 2, 6]))
    info["max_k_tiles"] = 8192
    unified = short.poison(5, 2, 8192)
    fmha.fmha_sm100(short.idx_q, k, k, plan, kv_indices=flat, output_o=False,
                    max_score=unified[1:3])
    want = short.scores()
    assert torch.equal(unified[1:3, :, :4].transpose(0, 1).cpu(), want)
    assert (unified[0] == 77).all() and (unified[3:] == 77).all()
    override = short.int32([0, 0])  # the queries as the first of their requests
    _, got = fmha.fmha_sm100(short.idx_q, k, k, plan, kv_indices=flat, output_o=False,
                             q_offset_override=override)
    assert (got[:, 1:] == -INF).all() and (got[:, 0] > -INF).all()


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("layout", ["HKT", "THK"])
def test_dense_attention_with_maxima(paged, layout):
    s = batch()
    k, v, _, flat = pages(s)
    if not paged:
        k, v, flat = torch.cat(s.keys), torch.cat(s.values), None
    plan = plan_of(s, output_maxscore=True, page_size=128 if paged else -1)
    plan[3]["max_k_tiles"] = 5
    buffer = s.poison(*((4, 5, s.tokens) if layout == "HKT" else (s.tokens, 4, 5)))
    out, got = fmha.fmha_sm100(s.q, k, v, plan, kv_indices=flat, max_score=buffer, sm_scale=0.1)
    check_close(out, s.attention(scale=0.1)[0])
    scores = buffer.transpose(0, 1) if layout == "THK" else buffer.transpose(1, 2)
    for t, b, position in s.rows():
        for h in range(4):
            dots = s.keys[b][:position + 1, h // 2] @ s.q[t, h]
            for j in range(position // 128 + 1):
                torch.testing.assert_close(scores[h, t, j], dots[128 * j:128 * (j + 1)].max())
    assert got is buffer and (scores[..., 4:] == 77).all()


def test_sparse_attention_of_a_plan():
    s = batch()
    k, v, _, flat = pages(s)
    ids = shuffled(s.ids()).transpose(0, 1).contiguous().to(DEVICE)
    out = s.poison(*s.q.shape)
    got, scores = fmha.fmha_sm100(s.q, k, v, plan_of(s, kv_block_num=3), kv_indices=flat,
                                  kv_block_indexes=ids, out=out)
    assert got is out and scores is None
    check_close(out, s.attention(s.ids())[0])
    table, _ = fmha.fmha_sm100(s.q, k, v, plan_of(s, kv_block_num=3), page_table=s.block_table,
                               kv_block_indexes=ids)
    assert torch.equal(table, out)
    private = api._fmha_sm100(s.q, k, v, plan_of(s, decode_backend="kv_mode3")[3], flat, ids)
    assert torch.equal(private[0], out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("longer", [[300, 700, 5, 390], [700]])
def test_requests_may_grow_beyond_the_plan_where_lists_are_given(longer, causal):
    """A decode plan for short requests, whose tensors are then those of longer ones."""
    first, s = (Serving(q_lens=[1] * len(longer), kv_lens=kv_lens)
                for kv_lens in ([128] * len(longer), longer))
    plan, now = (plan_of(x, kv_block_num=3, causal=causal) for x in (first, s))
    for name in ("kv_segment_lens", "kv_segment_offsets", "kv_page_indptr", "qo_offset"):
        plan[3][name].copy_(now[3][name])
    k, v, _, flat = pages(s)
    spare = torch.cat((flat, flat[:5]))  # a buffer for more pages than there are
    out, _ = fmha.fmha_sm100(s.q, k, v, plan, kv_indices=spare,
                             kv_block_indexes=s.ids().transpose(0, 1).to(DEVICE))
    check_close(out, s.attention(s.ids())[0])


@pytest.mark.parametrize("spare", [0, 5])
def test_scores_and_lists_of_one_request(spare):
    """Whose list of pages is its table."""
    s = Serving(q_lens=[40], kv_lens=[700])
    k, v, index, flat = pages(s)
    flat = torch.cat((flat, flat[:spare]))
    _, scores = fmha.fmha_sm100(s.idx_q, index, index, score_plan(s), kv_indices=flat,
                                output_o=False)
    assert torch.equal(scores.transpose(1, 2)[..., :6].cpu(), s.scores()[..., :6])
    out, _ = fmha.fmha_sm100(s.q, k, v, plan_of(s, kv_block_num=3), kv_indices=flat,
                             kv_block_indexes=s.ids().transpose(0, 1).to(DEVICE))
    check_close(out, s.attention(s.ids())[0])


@pytest.mark.parametrize("layout", ["HKT", "THK"])
@pytest.mark.parametrize("given", ["tensor", "int64", "int", None])
def test_topk_select(layout, given):
    s = batch(topk=3, init_blocks=1)
    scores = torch.full((2, s.tokens, 130), -INF)
    scores[..., :4] = s.scores()
    rows = valid_of(s)
    if given in ("int", None):  # the same for all rows
        count = 3 if given == "int" else 130
        want = torch.tensor([[sorted([0, count - 1, max(range(1, count - 1),
                             key=lambda j: (scores[h, t, j], -j))]) for h in range(2)]
                             for t in range(s.tokens)], dtype=torch.int32)
        valid = count if given == "int" else None
    else:
        want = s.ids().transpose(0, 1)
        scores[..., 4:] = 1e30  # poison behind what counts
        valid = s.int32(rows) if given == "tensor" else s.int32(rows).long()
    scores = scores.to(DEVICE)
    scores = (scores.transpose(1, 2) if layout == "HKT" else scores.transpose(0, 1)).contiguous()
    output = torch.full((s.tokens + 2, 2, 3), 77, dtype=torch.int32, device=DEVICE)
    got = fmha.sparse_topk_select(scores, 3, valid, output[:-2], 1, 1, layout)
    assert torch.equal(got.cpu(), want) and (output[-2:] == 77).all()
    table = torch.arange(got.shape[0] * 2 * 130, dtype=torch.int32, device=DEVICE)
    table = table.view(got.shape[0], 2, 130)
    remapped = fmha.sparse_topk_select(scores, 3, valid, None, 1, 1, layout, table)
    expected = torch.where(want < 0, want, table.cpu().gather(2, want.clamp(min=0).long()))
    assert torch.equal(remapped.cpu(), expected)


@pytest.mark.parametrize("paged", [True, False])
def test_csr_and_sparse_attention(paged):
    s = batch()
    k, v, _, _ = pages(s)
    keys = dict(page_table=s.block_table, seqused_k=s.seq_lens)
    cu_k = s.int32(torch.tensor([0, *s.kv_lens]).cumsum(0))
    if not paged:
        k, v, keys = torch.cat(s.keys), torch.cat(s.values), {}
    buffer = torch.full((2, s.tokens, 4), -1, dtype=torch.int32)  # padded to a width of 4
    buffer[..., :3] = shuffled(s.ids())
    seen = buffer.transpose(0, 1).contiguous().transpose(0, 1).to(DEVICE)  # token-major
    row_ptr, indices, schedule = fmha.build_k2q_csr(
        seen, s.cu_seqlens_q, cu_k, 128, total_k=0, max_seqlen_k=401, max_seqlen_q=20,
        total_rows=sum(s.blocks), qhead_per_kv=2, return_schedule=True)
    out = s.poison(*s.q.shape)
    got, lse = fmha.sparse_atten_func(
        s.q, k, v, row_ptr, indices, 4, cu_seqlens_q=s.cu_seqlens_q, cu_seqlens_k=cu_k,
        max_seqlen_q=20, max_seqlen_k=401, causal=True, softmax_scale=0.1, schedule=schedule,
        return_softmax_lse=True, out=out, **keys)
    want, want_lse = s.attention(s.ids(), 0.1)
    assert got is out
    check_close(out, want)
    check_close(lse, want_lse)


def test_one_packed_request_may_use_part_of_its_buffer():
    s = Serving([5], [200])
    k, v = (torch.cat((x[0], torch.full_like(x[0], float("nan")))) for x in (s.keys, s.values))
    pair = fmha.build_k2q_csr(s.ids().to(DEVICE), s.cu_seqlens_q, s.int32([0, 400]), 128)
    got = fmha.sparse_atten_func(s.q, k, v, *pair, 3, cu_seqlens_q=s.cu_seqlens_q,
                                 cu_seqlens_k=s.int32([0, 400]), max_seqlen_q=5, max_seqlen_k=400,
                                 causal=True, seqused_k=s.seq_lens)
    check_close(got, s.attention(s.ids())[0])


class Small:
    """A ragged batch of msa_oracle in torch, with blocks and pages of a few tokens."""

    def __init__(self, paged, causal=True, q_lens=(1, 5, 3), kv_lens=(9, 21, 12), block_size=4,
                 scale=None):
        self.p = p = oracle.Problem(list(q_lens), list(kv_lens), head_dim=16, topk=3, paged=paged,
                                    causal=causal, block_size=block_size, scale=scale)
        self.arrays = (p.normal(p.tokens, p.heads_q, p.head_dim),
                       *(p.normal(sum(kv_lens), p.heads_kv, p.head_dim) for _ in range(2)))
        self.q, self.k, self.v = (here(x) for x in (
            self.arrays[0], *(p.store(x) for x in self.arrays[1:])))
        self.lists = p.block_ids()
        self.ids, self.cu_q, self.cu_k = map(here, (self.lists, p.cu_q, p.cu_k))
        self.table = here(p.page_table) if paged else None
        self.lengths = dict(cu_seqlens_q=self.cu_q, cu_seqlens_k=self.cu_k,
                            max_seqlen_q=max(q_lens), max_seqlen_k=max(kv_lens))

    def atten(self, **options):
        """sparse_atten_func, as upstream's tests call it."""
        p = self.p
        pair = fmha.build_k2q_csr(self.ids, self.cu_q, self.cu_k, p.block_size)
        return fmha.sparse_atten_func(
            self.q, self.k, self.v, *pair, p.topk, **{**self.lengths, **dict(
                blk_kv=p.block_size, causal=p.causal, softmax_scale=p.scale,
                page_table=self.table), **options})

    def expected(self, scale=None, lists=None):
        """(out, LSE) of the oracle, over the lists or all blocks."""
        self.p.scale, kept = scale or self.p.scale, self.p.scale
        out, lse, *_ = oracle.attention(self.p, *self.arrays,
                                        self.lists if lists is None else lists)
        self.p.scale = kept
        return torch.from_numpy(out), torch.from_numpy(lse)


def here(array):
    return torch.from_numpy(array).to(DEVICE)


paged_or_not = pytest.mark.parametrize("paged", [True, False], ids=["paged", "packed"])
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])


@paged_or_not
@causal_or_not
def test_lengths_follow_from_cu_seqlens_k(paged, causal):
    """Without seqused_k, whatever is in the rest of a page and of the table."""
    s = Small(paged, causal)
    out, lse = s.atten(return_softmax_lse=True, partial_dtype=torch.float32, usable_SM_count=4)
    want, want_lse = s.expected()
    check_close(out, want)
    check_close(lse, want_lse)


@paged_or_not
@causal_or_not
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("temperature", [0.25, 1, 3.0])
def test_the_lse_of_another_temperature(paged, causal, scale, temperature):
    """That of the logits divided by it; output and LSE are those of the logits themselves."""
    s = Small(paged, causal, scale=scale)
    options = dict(return_softmax_lse=True, lse_temperature_scale=temperature)
    out, lse, tempered = s.atten(**options, return_temperature_lse=True)
    for got, same in zip((out, lse), s.atten(**options)):
        assert torch.equal(got, same)
    check_close(tempered, s.expected((scale or 16 ** -0.5) / temperature)[1])
    s.v.fill_(float("nan"))  # values take no part
    assert torch.equal(s.atten(**options, return_temperature_lse=True)[2], tempered)


def test_packed_requests_may_use_part_of_their_buffers():
    s = Small(paged=False)
    used = [7, 18, 12]
    cut = oracle.Problem(s.p.q_lens, used, head_dim=16, block_size=4)
    kept = [b + i for b, n in zip(s.p.cu_k, used) for i in range(n)]
    lists = s.lists.copy()
    for b, n in enumerate(used):  # blocks that are in use
        rows = lists[:, s.p.cu_q[b]:s.p.cu_q[b + 1]]
        rows[...] = [0, (n - 1) // 4, -1]
    s.ids.copy_(here(lists))
    q, k, v = s.arrays
    want, want_lse, *_ = oracle.attention(cut, q, k[kept], v[kept], lists)
    out, lse = s.atten(seqused_k=lens(used).to(DEVICE), return_softmax_lse=True)
    check_close(out, torch.from_numpy(want))
    check_close(lse, torch.from_numpy(want_lse))
    with pytest.raises(NotImplementedError, match="seqused_k: given for several packed requests"):
        s.atten(seqused_k=lens(used).to(DEVICE), causal=False)


def small_plan(s, **options):
    p = s.p
    return fmha.fmha_sm100_plan(lens(p.q_lens), lens(p.kv_lens), p.heads_q, p.heads_kv,
                                page_size=p.block_size if p.paged else -1, causal=p.causal,
                                device=DEVICE, **options)


@causal_or_not
@pytest.mark.parametrize("given", ["kv_indices", "page_table"])
@pytest.mark.parametrize("kv_lens", [[9, 21, 12], [21]], ids=str)
def test_pages_of_any_size(causal, given, kv_lens):
    """Blocks in lists are pages; without lists every page is read."""
    s = Small(True, causal, q_lens=[1, 5, 3][:len(kv_lens)], kv_lens=kv_lens)
    flat = [page for b in range(s.p.batch) for page in s.p.page_table[b, :s.p.blocks(b)]]
    pages = {given: s.table if given == "page_table" else lens(flat).to(DEVICE)}
    every = (torch.arange(6).expand(2, s.p.tokens, 6)).numpy()
    out, scores = fmha.fmha_sm100(s.q, s.k, s.v, small_plan(s), **pages)
    assert scores is None
    check_close(out, s.expected(lists=every)[0])
    ids = s.ids.transpose(0, 1)
    out, _ = fmha.fmha_sm100(s.q, s.k, s.v, small_plan(s, kv_block_num=3), **pages,
                             kv_block_indexes=ids)
    check_close(out, s.expected()[0])
    wide = ids.repeat_interleave(2, 1)  # a list per query head: the first of a group counts
    wide[:, 1::2] = -1
    again, _ = fmha.fmha_sm100(s.q, s.k, s.v, small_plan(s), **pages, kv_block_indexes=wide)
    assert torch.equal(again, out)
    buffer = torch.full_like(out, 77)
    got, _ = fmha.sparse_fmha(s.q, s.k, s.v, small_plan(s)[3], buffer, **pages,
                              kv_block_indexes=ids)
    assert got is buffer and torch.equal(got, out)


@causal_or_not
def test_packed_keys_without_lists(causal):
    s = Small(False, causal)
    every = (torch.arange(6).expand(2, s.p.tokens, 6)).numpy()
    out, _ = fmha.fmha_sm100(s.q, s.k, s.v, small_plan(s))
    check_close(out, s.expected(lists=every)[0])


@causal_or_not
@pytest.mark.parametrize("seqlen_q", [2, 17])
def test_decode_over_small_pages(causal, seqlen_q):
    """As many new tokens as a caller says, and every key for each where it is not causal."""
    s = Small(True, causal, q_lens=[seqlen_q] * 2, kv_lens=[40, 23])
    wrapper = fmha.SparseDecodePagedAttentionWrapper(blk_kv=4, causal=causal)
    wrapper.plan(page_table=s.table, seqused_k=lens(s.p.kv_lens).to(DEVICE), seqlen_q=seqlen_q,
                 max_seqlen_k=40, q2k_indices=s.ids, num_qo_heads=4, num_kv_heads=2, head_dim=16,
                 enable_cuda_graph=True, max_grid_size=7, fixed_split_size=2,
                 disable_split_kv=True)
    lse = torch.full(s.q.shape[:2], 77.0, device=DEVICE)
    out, got = wrapper.run(s.q, s.k, s.v, return_softmax_lse=True, lse=lse)
    want, want_lse = s.expected()
    assert got is lse
    check_close(out, want)
    check_close(lse, want_lse)


@pytest.mark.parametrize("sparse", [True, False])
def test_paged_decode(sparse):
    s = Serving([2] * 3, [300, 0, 131])
    k, v, _, _ = pages(s)
    ids = s.ids() if sparse else None
    wrapper = fmha.SparseDecodePagedAttentionWrapper(blk_kv=128, causal=True)
    with pytest.raises(RuntimeError, match="not planned"):
        wrapper.run(s.q, k, v)
    planned = dict(page_table=s.block_table, seqused_k=s.seq_lens, seqlen_q=2, max_seqlen_k=512,
                   q2k_indices=ids if ids is None else ids.to(DEVICE))
    out, lse = wrapper.plan(**planned).run(s.q, k, v, return_softmax_lse=True,
                                           out=s.poison(*s.q.shape))
    want, want_lse = s.attention(ids)
    check_close(out, want)
    check_close(lse, want_lse)
    assert torch.equal(fmha.sparse_decode_atten_func(
        s.q, k, v, planned.pop("q2k_indices"), **planned), out)


def test_what_does_not_fit_is_refused_by_name():
    s = batch()
    k, v, index, flat = pages(s)
    plan, ids = plan_of(s), s.ids().to(DEVICE)
    run = dict(kv_indices=flat)
    fp8 = torch.float8_e4m3fn
    calls = [
        (ValueError, "q: tokens: got 24, the plan was made for 25",
         lambda: fmha.fmha_sm100(s.q[1:], k, v, plan, **run)),
        (ValueError, "q: heads: got 2, the plan was made for 4",
         lambda: fmha.fmha_sm100(s.idx_q, k, v, plan, **run)),
        (ValueError, "k: heads: got 1, the plan was made for 2",
         lambda: fmha.fmha_sm100(s.q, index, index, plan, **run)),
        (ValueError, "k: rank: got 3, the plan was made for 4",
         lambda: fmha.fmha_sm100(s.q, s.keys[0], s.values[0], plan)),
        (ValueError, "kv_indices: not given", lambda: fmha.fmha_sm100(s.q, k, v, plan)),
        (ValueError, "max_score: got shape",
         lambda: fmha.fmha_sm100(s.idx_q, index, index, score_plan(s), **run, output_o=False,
                                 max_score=s.poison(2, 9, s.tokens))),
        (ValueError, "output_o: got False", lambda: fmha.fmha_sm100(
            s.q, k, v, plan, **run, output_o=False)),
        (NotImplementedError, "k_scale: got 0.5, supported is 1",
         lambda: fmha.fmha_sm100(s.q, k, v, plan, **run, k_scale=0.5)),
        (NotImplementedError, "q: got dtype torch.float8_e4m3fn",
         lambda: fmha.fmha_sm100(s.q.to(fp8), k, v, plan, **run)),
        (NotImplementedError, "kv_dtype, use_fp8_kvcache, q8kv4",
         lambda: plan_of(s, kv_dtype="nvfp4")),
        (NotImplementedError, "page_size: got 64, supported with output_maxscore is 128",
         lambda: plan_of(s, page_size=64, output_maxscore=True)),
        (ValueError, "k: tokens of a page: got 128, the plan was made for 64",
         lambda: fmha.fmha_sm100(s.q, k, v, plan_of(s, page_size=64), **run)),
        (ValueError, "kv_segment_lens: got 1 requests",
         lambda: fmha.fmha_sm100_plan(lens([1, 1]), lens([5]), 4)),
        (ValueError, "max_score_layout: got 'KHT'",
         lambda: fmha.sparse_topk_select(s.poison(2, 3, 4), 2, max_score_layout="KHT")),
        (NotImplementedError, "block_table: got rank 2",
         lambda: fmha.sparse_topk_select(s.poison(2, 3, 4), 2, block_table=s.block_table)),
        (ValueError, "init_blocks . local_blocks: got 2 . 1",
         lambda: fmha.sparse_topk_select(s.poison(2, 3, 4), 2, None, None, 2, 1)),
        (ValueError, "k2q_q_indices: got shape", lambda: fmha.sparse_atten_func(
            s.q, k, v, *fmha.build_k2q_csr(ids, s.cu_seqlens_q, s.cu_seqlens_q, 128), 16,
            cu_seqlens_q=s.cu_seqlens_q, cu_seqlens_k=s.cu_seqlens_q, max_seqlen_q=20,
            max_seqlen_k=401)),
        *((error, message, lambda options=options: Small(True).atten(**options))
          for error, message, options in (
              (ValueError, "return_temperature_lse: got True, expected return_softmax_lse=True",
               dict(return_temperature_lse=True)),
              (ValueError, "lse_temperature_scale: got 0, expected a positive finite number",
               dict(lse_temperature_scale=0)),
              (ValueError, "lse_temperature_scale: got nan", dict(lse_temperature_scale=INF - INF)),
              (NotImplementedError, "output_scale: given", dict(output_scale=torch.ones(1))),
              (NotImplementedError, "pv_dtype: got torch.float8_e4m3fn", dict(pv_dtype=fp8)))),
        (NotImplementedError, "4-bit", lambda: fmha.fp4_indexer_block_scores(1)),
        (NotImplementedError, "4-bit", lambda: fmha.sparse_atten_nvfp4_kv_func(1)),
        (NotImplementedError, "nvfp4_head_slot_views: 4-bit",
         lambda: nvfp4_kv.nvfp4_head_slot_views(1))]
    if DEVICE == "cpu":
        calls += [(ValueError, "kv_indices: got 3 pages, the plan needs 12",
                   lambda: fmha.fmha_sm100(s.q, k, v, plan, kv_indices=flat[:3])),
                  (ValueError, r"page_table\[3,\d\]: got 99",
                   lambda: fmha.fmha_sm100(s.q, k, v, plan, kv_indices=torch.cat(
                       (flat[:-1], s.int32([99])))))]
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()


# ---- names


@pytest.fixture
def installed():
    yield compat.install
    compat.uninstall()


def test_install_and_uninstall(installed):
    assert importlib.util.find_spec("fmha_sm100") is None  # never by default
    installed()
    installed()
    assert importlib.import_module("fmha_sm100").fmha_sm100_plan is fmha.fmha_sm100_plan
    assert importlib.import_module("fmha_sm100.sparse").build_k2q_csr is fmha.build_k2q_csr
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fmha_sm100")


def test_vllms_alias_on_request(installed, monkeypatch):
    for name in ("vllm", "vllm.third_party"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    installed()
    with pytest.raises(ImportError):
        importlib.import_module("vllm.third_party.fmha_sm100")
    installed(vllm=True)
    theirs = importlib.import_module("vllm.third_party.fmha_sm100.api")
    assert theirs._fmha_sm100_plan is api._fmha_sm100_plan
    assert sys.modules["vllm.third_party"].fmha_sm100 is fmha
    compat.uninstall()
    assert not hasattr(sys.modules["vllm.third_party"], "fmha_sm100")


def test_another_package_is_hidden_on_request_only(installed, tmp_path, monkeypatch):
    (tmp_path / "fmha_sm100.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="fmha_sm100: another package of this name"):
        installed()
    installed(shadow=True)
    assert importlib.import_module("fmha_sm100") is fmha
    compat.uninstall()
    assert importlib.import_module("fmha_sm100").real
    monkeypatch.delitem(sys.modules, "fmha_sm100")


@pytest.mark.parametrize("inner", ["", "msa"])
def test_the_folder_for_loaders_of_kernels(inner):
    """As `kernels` does: build/<variant>/__init__.py under a name of its own."""
    path = compat.kernel_folder() / "build/torch-universal" / inner / "__init__.py"
    spec = importlib.util.spec_from_file_location("kernel_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.sparse_atten_func is fmha.sparse_atten_func
    assert callable(module.build_k2q_csr)


def test_kernels_loads_the_folder():
    kernels = pytest.importorskip("kernels", reason="kernels is not installed")
    module = kernels.get_local_kernel(compat.kernel_folder())
    assert module.sparse_atten_func is fmha.sparse_atten_func
