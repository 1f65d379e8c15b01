"""msa_cpp.compat.sglang against plain torch: slot-major caches behind req_to_token."""

import logging
import sys
import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import msa_cpp.compat.sglang as ours  # noqa: E402
from msa_arrays import DEVICE  # noqa: E402
from msa_serving import BLOCK, Serving, check_close, shuffled  # noqa: E402
from test_compat_vllm import stand_in  # noqa: E402

OPS = "sglang.kernels.ops.attention.minimax_sparse"


class Slots:
    """The caches of a batch, slot by slot; pages of `page_size` tokens, shuffled."""

    def __init__(self, s, page_size=BLOCK, length=1024):
        count = s.pages * BLOCK * 2 // page_size
        order = torch.randperm(count, generator=s.generator).tolist()
        slots = count * page_size
        nan = float("nan")
        self.k = torch.full((slots, s.heads_kv, s.dim), nan, dtype=s.dtype, device=DEVICE)
        self.v, self.index = self.k.clone(), self.k[:, :1].clone()
        rows = len(s.kv_lens) + 2  # two rows that belong to others
        self.slot_ids = torch.randperm(rows, generator=s.generator)[:len(s.kv_lens)].to(DEVICE)
        table = torch.randint(0, slots, (rows, length), dtype=torch.int32, generator=s.generator)
        for b, n in enumerate(s.kv_lens):
            pages = torch.tensor([order.pop() for _ in range(-(-n // page_size))], dtype=torch.long)
            where = (pages[:, None] * page_size + torch.arange(page_size)).reshape(-1)[:n]
            table[self.slot_ids[b].item(), :n] = where.int()
            where = where.to(DEVICE)
            self.k[where], self.v[where] = s.keys[b], s.values[b]
            self.index[where] = s.index_keys[b][:, None]
        self.table = table.to(DEVICE)


def prefill(**changes):
    return Serving(**{**dict(q_lens=[140, 9, 30], kv_lens=[140, 500, 401]), **changes})


def drafts(**changes):
    """One new token per row; the last three rows are the draft tokens of one request."""
    return Serving(**{**dict(q_lens=[1] * 4, kv_lens=[400, 131, 700, 1]), **changes})


def select_prefill(s, slots, functions=ours, **changes):
    return functions.flash_prefill_with_topk_index(**{**dict(
        q=s.idx_q, k_cache=slots.index, v_cache=None, sink=None, req_to_token=slots.table,
        slot_ids=slots.slot_ids, cu_seqlens=s.cu_seqlens_q, seq_lens=s.seq_lens,
        prefix_lens=s.prefix_lens, max_seqlen_q=max(s.q_lens), max_seqlen_k=max(s.kv_lens),
        block_size_q=1, block_size_k=BLOCK, topk=s.topk, init_blocks=s.init_blocks,
        local_blocks=s.local_blocks, disable_index_value=True, page_size=BLOCK), **changes})


def attend_prefill(s, slots, ids, functions=ours, **changes):
    return functions.flash_prefill_with_gqa_share_sparse(**{**dict(
        q=s.q, k_cache=slots.k, v_cache=slots.v, sink=None, req_to_token=slots.table,
        slot_ids=slots.slot_ids, topk_idx=ids.to(DEVICE), block_size_q=1, block_size_k=BLOCK,
        cu_seqlens=s.cu_seqlens_q, seq_lens=s.seq_lens, prefix_lens=s.prefix_lens,
        max_seqlen_q=max(s.q_lens), sm_scale=0.1), **changes})


def select_decode(s, slots, functions=ours, **changes):
    return functions.flash_decode_with_topk_idx(**{**dict(
        q=s.idx_q, sink=None, k_cache=slots.index, v_cache=None, req_to_token=slots.table,
        seq_lens=s.seq_lens.long(), max_seqlen=max(s.kv_lens), slot_ids=slots.slot_ids,
        block_size=BLOCK, topk=s.topk, init_blocks=s.init_blocks, local_blocks=s.local_blocks,
        disable_index_value=True, page_size=BLOCK), **changes})


def attend_decode(s, slots, ids, functions=ours, **changes):
    return functions.flash_decode_with_gqa_share_sparse(**{**dict(
        q=s.q, sink=None, k_cache=slots.k, v_cache=slots.v, req_to_token=slots.table,
        seq_lens=s.seq_lens.long(), slot_ids=slots.slot_ids, block_size=BLOCK,
        topk_idx=ids.to(DEVICE), page_size=BLOCK), **changes})


@pytest.fixture
def server(monkeypatch):
    """The settings of a running server, as sglang.srt.runtime_context holds them."""
    module = types.ModuleType("sglang.srt.runtime_context")
    schedule = types.SimpleNamespace(page_size=BLOCK)
    module.get_schedule = lambda: schedule
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", module)
    return schedule


@pytest.mark.parametrize("page_size", [128, 256])
def test_prefill_over_cached_prefixes(server, page_size):
    s = prefill(init_blocks=1)
    slots = Slots(s, page_size)
    idx_o, ids = select_prefill(s, slots, page_size=page_size)
    assert idx_o is None and torch.equal(ids.cpu(), s.ids())
    out = attend_prefill(s, slots, shuffled(s.ids()))
    check_close(out, s.attention(s.ids(), 0.1)[0])


def test_draft_tokens_as_a_chunk(server):
    s = prefill(q_lens=[4, 4, 2])
    slots = Slots(s)
    assert torch.equal(select_prefill(s, slots)[1].cpu(), s.ids())
    check_close(attend_prefill(s, slots, s.ids()), s.attention(s.ids(), 0.1)[0])


def test_prefill_in_bfloat16(server):
    s = prefill(dtype=torch.bfloat16, q_lens=[20, 5, 12])
    slots = Slots(s)
    assert torch.equal(select_prefill(s, slots)[1].cpu(), s.ids())
    out = attend_prefill(s, slots, s.ids())
    assert out.dtype == torch.bfloat16
    check_close(out, s.attention(s.ids(), 0.1)[0], torch.bfloat16)


def test_decode():
    s = drafts(init_blocks=1)
    slots = Slots(s)
    out = torch.full((2, 4, 3), 77, dtype=torch.int32, device=DEVICE)
    idx_o, ids, lengths = select_decode(s, slots, topk_out=out)
    assert idx_o is None and lengths is None and ids is out
    assert torch.equal(ids.cpu(), s.ids())
    check_close(attend_decode(s, slots, shuffled(s.ids())), s.attention(s.ids())[0])


def test_rows_of_a_speculative_draft_share_a_slot_id():
    s = Serving([1], [700])
    slots = Slots(s)
    draft = Serving([3], [700])  # the same keys: the same seed draws them first
    assert torch.equal(draft.keys[0], s.keys[0])
    draft.q_lens, draft.kv_lens = [1] * 3, [698, 699, 700]
    draft.keys, draft.values, draft.index_keys = (
        [x[0][:n] for n in draft.kv_lens] for x in (s.keys, s.values, s.index_keys))
    draft.seq_lens = draft.int32(draft.kv_lens)
    slots.slot_ids = slots.slot_ids.expand(3)
    assert torch.equal(select_decode(draft, slots)[1].cpu(), draft.ids())
    check_close(attend_decode(draft, slots, draft.ids()), draft.attention(draft.ids())[0])


def test_rows_of_length_0_and_stale_slots_are_harmless():
    s = drafts(kv_lens=[400, 0, 700, 1])
    slots = Slots(s)
    assert torch.equal(select_decode(s, slots)[1].cpu(), s.ids())
    check_close(attend_decode(s, slots, s.ids()), s.attention(s.ids())[0])


def test_small_pages_are_not_served(server):
    s = drafts()
    slots = Slots(s, 64)
    message = "page_size: got 64, supported are multiples of the 128 tokens of a block"
    with pytest.raises(NotImplementedError, match=message):
        select_decode(s, slots, page_size=64)
    server.page_size = 1
    with pytest.raises(NotImplementedError, match="page_size: got 1"):
        attend_decode(s, slots, s.ids(), page_size=0)  # the call does not say, the server does

    def not_published():
        raise ValueError("config namespace 'schedule' not published")

    sys.modules["sglang.srt.runtime_context"].get_schedule = not_published
    with pytest.raises(NotImplementedError, match="page_size: got 1"):
        attend_decode(s, slots, s.ids(), page_size=0)
    del sys.modules["sglang.srt.runtime_context"]
    with pytest.raises(NotImplementedError, match="page_size: got 1"):
        select_decode(s, slots, page_size=1)


def test_what_is_not_served_is_refused_by_name(server):
    s, d = prefill(), drafts()
    slots, more = Slots(s), Slots(d)
    one = torch.ones(1)
    fp8 = slots.k.to(torch.float8_e4m3fn)
    for message, call in [
            ("sink: given, supported is None", lambda: select_prefill(s, slots, sink=one)),
            ("loc_mapping: given", lambda: select_prefill(s, slots, loc_mapping=one)),
            ("loc_mapping: given", lambda: attend_prefill(s, slots, s.ids(), loc_mapping=one)),
            ("hisparse_slots: given", lambda: attend_decode(d, more, d.ids(), hisparse_slots=one)),
            ("k_scale: got 0.5, supported is 1.0",
             lambda: attend_prefill(s, slots, s.ids(), k_scale=0.5)),
            ("v_scale: got 2.0", lambda: attend_decode(d, more, d.ids(), v_scale=2.0)),
            ("score_type: got 'lse'", lambda: select_decode(d, more, score_type="lse")),
            ("disable_index_value: got False",
             lambda: select_decode(d, more, disable_index_value=False)),
            ("use_dense_main_attn: got True",
             lambda: select_decode(d, more, use_dense_main_attn=True)),
            ("block_size_q: got 2, supported is 1",
             lambda: select_prefill(s, slots, block_size_q=2)),
            ("k_cache: got 2 index key heads", lambda: select_prefill(s, slots, k_cache=slots.k)),
            ("k: got dtype torch.float8_e4m3fn",
             lambda: attend_prefill(s, slots, s.ids(), k_cache=fp8, v_cache=fp8))]:
        with pytest.raises(NotImplementedError, match=message):
            call()


@pytest.mark.skipif(DEVICE != "cpu", reason="lengths on a device are not read back")
def test_bad_input_is_refused_where_the_host_sees_it(server):
    s = prefill()
    slots = Slots(s)
    far = s.ids()
    far[0, 0, 0] = 3
    for message, call in [
            (r"seq_lens\[1\]: got 500, expected 0..256",
             lambda: attend_prefill(s, slots, s.ids(), req_to_token=slots.table[:, :256])),
            (r"block_ids\[0,0,0\]: got 3", lambda: attend_prefill(s, slots, far)),
            (r"page_table\[\d,\d\]: got \d+, expected 0",
             lambda: attend_prefill(s, slots, s.ids(), k_cache=slots.k[:200],
                                    v_cache=slots.v[:200])),
            ("max_seqlen_k: got 300, the longest length in seq_lens is 500",
             lambda: select_prefill(s, slots, max_seqlen_k=300))]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture
def sglang(monkeypatch):
    """SGLang's modules as far as they matter."""
    modules = {}
    for module, functions in ours._engine.modules.items():
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in modules:
                modules[name] = types.ModuleType(name)
                modules[name].__path__ = []
                monkeypatch.setitem(sys.modules, name, modules[name])
        for function in functions:
            setattr(modules[module], function.__name__, stand_in(function.__name__, function))
    modules["sglang"].__version__ = "0.5.23"
    yield modules
    ours.unpatch()


def test_patch_serves_and_hands_back(sglang, caplog, monkeypatch):
    monkeypatch.setenv("MSA_SGLANG", "1")
    decode = sglang[f"{OPS}.decode.flash_with_topk_idx"]
    original = decode.flash_decode_with_topk_idx
    ours.plugin()
    s = drafts()
    slots = Slots(s)
    args = (s.idx_q, None, slots.index, None, slots.table, s.seq_lens, 700, slots.slot_ids, BLOCK,
            3, 0, 1)
    got = decode.flash_decode_with_topk_idx(*args, disable_index_value=True, page_size=BLOCK)
    assert torch.equal(got[1].cpu(), s.ids())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "msa_cpp.compat"):
        for _ in range(2):
            got = decode.flash_decode_with_topk_idx(*args, disable_index_value=True, page_size=64)
            assert got[0] == "original"
    assert len(caplog.records) == 1 and "page_size: got 64" in caplog.text
    ours.unpatch()
    assert decode.flash_decode_with_topk_idx is original


def test_functions_that_take_page_tables_are_refused(sglang):
    module = sglang[f"{OPS}.prefill.topk_sparse"]

    def flash_prefill_with_gqa_share_sparse(q, k_cache, v_cache, sink, page_table, topk_idx):
        pass

    module.flash_prefill_with_gqa_share_sparse = flash_prefill_with_gqa_share_sparse
    with pytest.raises(RuntimeError, match="takes page_table; known is sglang 0.5.23"):
        ours.patch()
    sglang["sglang"].__version__ = "0.6.0"
    with pytest.raises(RuntimeError, match="sglang: got version 0.6.0"):
        ours.patch()
