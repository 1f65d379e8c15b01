"""msa_cpp.compat.vllm against plain torch, and patch() against stand-ins of vLLM's modules."""

import importlib.util
import inspect
import logging
import re
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import msa_cpp.compat.vllm as ours  # noqa: E402
from msa_arrays import DEVICE  # noqa: E402
from msa_serving import Serving, check_close, shuffled  # noqa: E402

LAYOUTS = ["NHD", "HND", "layers"]
OPS = "vllm.models.minimax_m3.common.ops"


def prefill(**changes):
    """A first chunk, no token, one over a cached prefix, and one that begins inside a block."""
    return Serving(**{**dict(q_lens=[140, 0, 9, 30], kv_lens=[140, 77, 500, 401]), **changes})


def verify(length=3, **changes):
    """A decode batch of `length` tokens per request, one of them padding."""
    lengths = [400, 0, 131, 700]
    return Serving(**{**dict(q_lens=[length] * 4, kv_lens=lengths), **changes})


def scores_of(s):
    return ours.minimax_m3_index_score(
        s.idx_q, s.index_cache(), s.block_table, s.cu_seqlens_q, s.seq_lens, s.prefix_lens,
        max(s.q_lens), max(s.kv_lens), s.heads_kv)


def token_major(s, rows):
    """An id buffer as vLLM keeps it, and as its functions see it."""
    buffer = torch.full((rows, s.heads_kv, s.topk), 77, dtype=torch.int32, device=DEVICE)
    return buffer, buffer.transpose(0, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_of_a_prefill_over_cached_prefixes(layout):
    s = prefill(layout=layout, init_blocks=1)
    score = scores_of(s)
    want = s.scores()
    assert score.shape == (2, s.tokens, 16) and score.dtype == torch.float32
    columns = want.shape[2]
    visible = want > -float("inf")
    torch.testing.assert_close(score[..., :columns].cpu()[visible], want[visible], rtol=0, atol=0)

    poisoned = score.clone()  # whatever lies behind a row's causal range must not matter
    poisoned[..., :columns][~visible.to(DEVICE)] = 1e30
    poisoned[..., columns:] = float("nan")
    buffer, seen = token_major(s, s.tokens + 5)
    for given, out in ((score, None), (poisoned, seen)):
        ids = ours.minimax_m3_index_topk(given, s.cu_seqlens_q, s.prefix_lens, max(s.q_lens),
                                         s.topk, 1, 1, out=out)
        assert torch.equal(ids.cpu(), s.ids())
    assert ids.data_ptr() == buffer.data_ptr() and (buffer[s.tokens:] == 77).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 4])
def test_index_of_a_decode_batch(layout, length):
    s = verify(length, layout=layout, topk=4, init_blocks=1, local_blocks=2)
    args = (s.idx_q, s.index_cache(), s.block_table, s.seq_lens, 1000)
    rest = (s.heads_kv, length, 4)
    buffer, out = token_major(s, s.tokens + 4)
    ids = ours.minimax_m3_index_decode(*args, 4, 1, 2, *rest, out=out)
    assert torch.equal(ids.cpu(), s.ids()) and ids.data_ptr() == buffer.data_ptr()
    assert (buffer[s.tokens:] == 77).all()

    scores = s.poison(s.tokens, s.heads_kv, 9).transpose(0, 1)  # a buffer with room behind
    got = ours.minimax_m3_index_decode(*args, 4, 1, 2, *rest, score_out=scores)
    assert torch.equal(got.cpu(), s.ids()) and (scores[..., 8:] == 77).all()
    assert torch.equal(ours.minimax_m3_index_decode_score(*args, 1, 2, *rest).cpu()[..., :8],
                       scores.cpu()[..., :8])
    want = s.scores()
    for t, _, position in s.rows():
        for j in range(position // 128 + 1):
            forced = 1e29 if j >= position // 128 - 1 else 1e30 if j < 1 else None
            expected = want[:, t, j] if forced is None else torch.full((2,), forced)
            assert torch.equal(scores[:, t, j].cpu(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_prefill(layout, dtype):
    s = prefill(layout=layout, dtype=dtype, q_lens=[40, 0, 5, 12], kv_lens=[40, 77, 500, 401])
    ids = s.ids()
    out = s.poison(s.tokens, 2 * 4, 128, dtype=dtype)[:, ::2]  # strided in place
    result = ours.minimax_m3_sparse_attn(
        s.q, s.kv_cache(), shuffled(ids).to(DEVICE), s.block_table, s.cu_seqlens_q, s.seq_lens,
        s.prefix_lens, max(s.q_lens), s.heads_kv, 0.1, out)
    assert result is None
    check_close(out, s.attention(ids, 0.1)[0], dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 4, 17])
def test_attention_of_a_decode_batch(layout, length):
    s = verify(length, layout=layout)
    out = s.poison(*s.q.shape)
    ids = token_major(s, s.tokens)[1].copy_(s.ids())
    ours.minimax_m3_sparse_attn_decode(
        s.q, s.kv_cache(), ids, s.block_table, s.seq_lens, s.heads_kv, s.dim ** -0.5, out, length,
        k_scale=torch.ones(1), v_scale=torch.ones(1))  # of no meaning without an 8-bit cache
    check_close(out, s.attention(s.ids())[0])
    assert (out[length:2 * length] == 0).all()  # the padded request


def test_attention_of_a_ragged_decode_batch():
    s = Serving([1, 3, 0, 2], [400, 131, 0, 700])
    out = s.poison(*s.q.shape)
    ours.minimax_m3_sparse_attn_decode(
        s.q, s.kv_cache(), s.ids().to(DEVICE), s.block_table, s.seq_lens, s.heads_kv,
        s.dim ** -0.5, out, 3, query_start_loc=s.cu_seqlens_q,
        token_to_req_indices=s.int32([0, 1, 1, 1, 3, 3]))
    check_close(out, s.attention(s.ids())[0])


@pytest.mark.skipif(DEVICE != "cpu", reason="lengths on a device are not read back")
def test_bad_input_is_refused_where_the_host_sees_it():
    s = prefill()
    ids = s.ids()
    score = scores_of(s)
    attn = (s.q, s.kv_cache(), ids, s.block_table, s.cu_seqlens_q, s.seq_lens, s.prefix_lens,
            max(s.q_lens), s.heads_kv, 0.1, torch.full_like(s.q, 77))

    def attend(**changes):
        names = list(inspect.signature(ours.minimax_m3_sparse_attn).parameters)
        ours.minimax_m3_sparse_attn(**{**dict(zip(names, attn)), **changes})

    far = ids.clone()
    far[0, 0, 0] = 3
    for error, message, call in [
            (ValueError, r"seq_lens\[2\]: got 500, expected 0..256",
             lambda: attend(block_table=s.block_table[:, :2])),
            (ValueError, r"block_ids\[0,0,0\]: got 3, expected -1 or a block of sequence 0",
             lambda: attend(topk_idx=far)),
            (ValueError, r"block_ids: got rank 3 .* expected \[Hkv,T,K\]",
             lambda: attend(topk_idx=ids[:1])),
            (ValueError, "out: got rank 3", lambda: attend(output=attn[-1][:-1])),
            (ValueError, "max_seqlen_q: got 5, the longest length in cu_seqlens_q is 140",
             lambda: attend(max_query_len=5)),
            (ValueError, "max_seqlen_k: got 300, the longest length in seq_lens is 500",
             lambda: ours.minimax_m3_index_score(
                 s.idx_q, s.index_cache(), s.block_table, s.cu_seqlens_q, s.seq_lens,
                 s.prefix_lens, 140, 300, 2)),
            (ValueError, "out: got 178 rows, expected at least the 179 tokens",
             lambda: ours.minimax_m3_index_topk(
                 score, s.cu_seqlens_q, s.prefix_lens, 140, 3, 0, 1,
                 out=torch.empty(2, 178, 3, dtype=torch.int32))),
            (ValueError, "decode_query_len: got 2 for 179 tokens of 4 requests",
             lambda: ours.minimax_m3_sparse_attn_decode(
                 *attn[:4], s.seq_lens, 2, 0.1, attn[-1], 2)),
            (NotImplementedError, "k: got dtype torch.float8_e4m3fn",
             lambda: attend(kv_cache=s.kv_cache().to(torch.float8_e4m3fn)))]:
        with pytest.raises(error, match=message):
            call()
    assert (attn[-1] == 77).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_step_serves_other_lengths():
    """Captured once, replayed 100 times with other lengths; as the call outside a graph, bit by
    bit. Two draft tokens, padding among the requests."""
    s = Serving([2] * 8, [700] * 8, dtype=torch.bfloat16)
    cache, index_cache = s.kv_cache(), s.index_cache()
    buffer, ids = token_major(s, s.tokens + 4)
    out = s.poison(*s.q.shape, dtype=torch.bfloat16)

    def step(ids, out):
        ours.minimax_m3_index_decode(s.idx_q, index_cache, s.block_table, s.seq_lens, 1000, s.topk,
                                     0, 1, s.heads_kv, 2, 2, out=ids)
        ours.minimax_m3_sparse_attn_decode(s.q, cache, ids[:, :s.tokens], s.block_table,
                                           s.seq_lens, s.heads_kv, 0.1, out, 2)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(ids, out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ids, out)
    for _ in range(100):
        lengths = torch.randint(0, 701, (8,), generator=s.generator)
        s.seq_lens.copy_(lengths.int() * (lengths > 99))  # every seventh is padding
        graph.replay()
        want_ids, want = torch.empty_like(buffer).transpose(0, 1), torch.empty_like(out)
        step(want_ids, want)
        assert torch.equal(ids[:, :s.tokens], want_ids[:, :s.tokens])
        assert torch.equal(out, want)
    assert (buffer[s.tokens:] == 77).all()


# ---- patch()


def stand_in(name, ours):
    """A function with the arguments and defaults of ours that says it was called."""
    def original(*args, **kwargs):
        return "original", args, kwargs

    original.__name__ = original.__qualname__ = name
    original.__signature__ = inspect.signature(ours)
    return original


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's modules as far as they matter: two that define, two that import by name."""
    modules = {}

    def module(name, **members):
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(members)
        monkeypatch.setitem(sys.modules, name, modules[name])

    parts = OPS.split(".")
    for i in range(1, len(parts) + 1):
        module(".".join(parts[:i]), __path__=[])
    modules["vllm"].__version__ = "0.33.1"
    functions = {f.__name__: stand_in(f.__name__, f)
                 for group in ours._engine.modules.values() for f in group}
    names = list(functions)
    module(f"{OPS}.index_topk", **{name: functions[name] for name in names[:4]})
    module(f"{OPS}.sparse_attn", **{name: functions[name] for name in names[4:]})
    module("vllm.models.minimax_m3.common.indexer", **{n: functions[n] for n in names[:3]})
    module("vllm.models.minimax_m3.common.sparse_attention", renamed=functions[names[4]],
           **{n: functions[n] for n in names[4:]})
    yield modules, functions
    ours.unpatch()


def test_patch_rebinds_every_place_and_unpatch_gives_back(vllm):
    modules, functions = vllm
    before = {name: dict(vars(module)) for name, module in modules.items()}
    ours.patch()
    ours.patch()  # idempotent
    for name in (f"{OPS}.index_topk", f"{OPS}.sparse_attn", "vllm.models.minimax_m3.common.indexer",
                 "vllm.models.minimax_m3.common.sparse_attention"):
        held = [value for value in vars(modules[name]).values() if callable(value)]
        assert held and not any(value in functions.values() for value in held), name

    s = verify(1)
    decode = modules["vllm.models.minimax_m3.common.indexer"].minimax_m3_index_decode
    ids = decode(s.idx_q, s.index_cache(), s.block_table, s.seq_lens, 1000, s.topk, 0, 1,
                 s.heads_kv, 1, max_decode_query_len=1)
    assert torch.equal(ids.cpu(), s.ids())

    ours.unpatch()
    ours.unpatch()
    assert {name: dict(vars(module)) for name, module in modules.items()} == before


def test_what_is_not_served_goes_to_the_original_and_is_said_once(vllm, caplog):
    modules, _ = vllm
    ours.patch()
    s = prefill()
    attend = modules[f"{OPS}.sparse_attn"].minimax_m3_sparse_attn
    cache = s.kv_cache().to(torch.float8_e4m3fn)
    args = (s.q, cache, s.ids(), s.block_table, s.cu_seqlens_q, s.seq_lens, s.prefix_lens, 140, 2,
            0.1)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "msa_cpp.compat"):
        for _ in range(3):
            said, got, kwargs = attend(*args, output=s.q)
            assert said == "original" and got == args and kwargs == {"output": s.q}
    assert len(caplog.records) == 1
    assert "minimax_m3_sparse_attn goes to the original: k: got dtype" in caplog.text


def test_unknown_versions_and_signatures_are_refused_by_name(vllm):
    modules, functions = vllm
    ours_now = dict(vars(modules[f"{OPS}.sparse_attn"]))
    modules["vllm"].__version__ = "0.34.0"
    with pytest.raises(RuntimeError, match="vllm: got version 0.34.0; known is vllm 0.33"):
        ours.patch()
    modules["vllm"].__version__ = "0.33.0"
    topk = modules[f"{OPS}.index_topk"]

    def minimax_m3_index_topk(score, cu_seqlens_q, prefix_lens, max_query_len, topk, init_blocks,
                              local_blocks, out=None, temperature=1.0):
        pass

    topk.minimax_m3_index_topk = minimax_m3_index_topk
    with pytest.raises(RuntimeError, match="minimax_m3_index_topk: takes temperature; known is"):
        ours.patch()
    topk.minimax_m3_index_topk = lambda score, topk: None
    with pytest.raises(RuntimeError, match="minimax_m3_index_topk: does not take cu_seqlens_q"):
        ours.patch()
    del topk.minimax_m3_index_topk
    with pytest.raises(RuntimeError, match=f"{OPS}.index_topk: has no minimax_m3_index_topk"):
        ours.patch()
    assert dict(vars(modules[f"{OPS}.sparse_attn"])) == ours_now  # nothing was replaced


def test_older_functions_without_the_newest_arguments_are_known(vllm):
    modules, _ = vllm

    def minimax_m3_sparse_attn_decode(q, kv_cache, topk_idx, block_table, seq_lens, num_kv_heads,
                                      sm_scale, output, decode_query_len, k_scale=None,
                                      v_scale=None):
        raise AssertionError("replaced")

    modules[f"{OPS}.sparse_attn"].minimax_m3_sparse_attn_decode = minimax_m3_sparse_attn_decode
    ours.patch()
    s = verify(2)
    out = s.poison(*s.q.shape)
    modules[f"{OPS}.sparse_attn"].minimax_m3_sparse_attn_decode(
        s.q, s.kv_cache(), s.ids().to(DEVICE), s.block_table, s.seq_lens, 2, s.dim ** -0.5, out, 2)
    check_close(out, s.attention(s.ids())[0])


def test_the_plugin_does_nothing_unless_asked(vllm, monkeypatch):
    modules, functions = vllm
    monkeypatch.delenv("MSA_VLLM", raising=False)
    ours.plugin()
    held = modules[f"{OPS}.sparse_attn"].minimax_m3_sparse_attn
    assert held is functions["minimax_m3_sparse_attn"]
    monkeypatch.setenv("MSA_VLLM", "1")
    ours.plugin()
    assert modules[f"{OPS}.sparse_attn"].minimax_m3_sparse_attn is not held


def test_the_page_about_serving(vllm, caplog):
    page = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text()
    (code,) = re.findall(r"<!-- runs with a stand-in of vllm -->\n```python\n(.*?)```", page,
                         re.DOTALL)
    exec(code, {})
    modules, functions = vllm
    assert modules[f"{OPS}.sparse_attn"].minimax_m3_sparse_attn is functions[
        "minimax_m3_sparse_attn"]
    assert "vllm: minimax_m3_index_score, minimax_m3_index_topk, " in caplog.text
    assert "vllm: minimax_m3_index_score, minimax_m3_index_topk, ..." in page


def test_without_the_engine():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(ImportError, match="vllm"):
        ours.patch()
