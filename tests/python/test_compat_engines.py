"""The engines' own modules, where vLLM or SGLang are installed: patch() inside them, their layers
over our functions, and on a GPU their Triton functions as a second judge."""

import importlib
import sys
import types
from importlib.metadata import entry_points

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from msa_arrays import DEVICE  # noqa: E402
from msa_cpp.bench import originals  # noqa: E402
from msa_cpp.compat import install, sglang, uninstall, vllm  # noqa: E402
from msa_serving import BLOCK, Serving  # noqa: E402
from test_compat_sglang import (  # noqa: E402
    Slots,
    attend_decode,
    attend_prefill,
    select_decode,
    select_prefill,
)

needs_triton = pytest.mark.skipif(DEVICE == "cpu", reason="the engines' Triton needs a GPU")
VLLM = "vllm.models.minimax_m3.common"
VLLM_MSA = "vllm.models.minimax_m3.nvidia"
SGLANG = "sglang.srt.layers.attention.minimax_sparse_ops"


def module_or_skip(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def engine_or_skip(adapter):
    functions = originals(adapter)
    if functions is None:
        pytest.skip(f"{adapter._engine.name} is not installed")
    return functions


@pytest.fixture(params=[vllm, sglang], ids=["vllm", "sglang"])
def patched(request):
    engine_or_skip(request.param)
    yield request.param
    request.param.unpatch()


def test_patch_and_unpatch_in_every_module_of_the_engine(patched):
    functions = originals(patched)
    theirs = [getattr(functions, f.__name__) for group in patched._engine.modules.values()
              for f in group]
    importers = f"{VLLM}.indexer", f"{VLLM}.sparse_attention", f"{SGLANG}.minimax_sparse"
    for name in importers:  # by name
        if name.startswith(patched._engine.name):
            module_or_skip(name)

    def held():
        return sorted((module, name) for module, content in list(sys.modules.items())
                      for name, value in list(getattr(content, "__dict__", {}).items())
                      if module.startswith(patched._engine.name) and callable(value)
                      and any(value is f for f in theirs))

    before = held()
    assert len({module for module, _ in before}) > len(patched._engine.modules)
    patched.patch()
    assert held() == []
    patched.unpatch()
    assert held() == before


def test_the_plugin_is_loaded_and_does_what_its_variable_says(patched, monkeypatch):
    name = patched._engine.name
    module, group, loader, loaded = {
        "vllm": ("vllm.plugins", "vllm.general_plugins", "load_general_plugins", "plugins_loaded"),
        "sglang": ("sglang.srt.plugins", "sglang.srt.plugins", "load_plugins", "_plugins_loaded"),
    }[name]
    if not entry_points(group=group, name="msa_cpp"):
        pytest.skip("msa_cpp is importable, but not installed: no entry points")
    plugins = module_or_skip(module)
    for value, is_patched in (("0", False), ("1", True)):
        monkeypatch.setenv(f"MSA_{name.upper()}", value)
        monkeypatch.setattr(plugins, loaded, False)
        getattr(plugins, loader)()
        assert bool(patched._engine._patched) == is_patched


# ---- the engines' layers over our functions


def mixed(**changes):
    """Two requests that decode two tokens each, then two prefill chunks; as vLLM orders them."""
    return Serving(**{**dict(q_lens=[2, 2, 130, 9], kv_lens=[400, 131, 130, 500], heads_kv=4,
                             group=16, topk=4, dtype=torch.bfloat16), **changes})


def error_norm(got, want):
    got, want = got.float().cpu(), want.float().cpu()
    return ((got - want).norm() / want.norm()).item()


class VllmStep:
    """What vLLM's builders hand its layers for `mixed()`, as far as the layers read it."""

    def __init__(self, s, monkeypatch):
        self.s, self.monkeypatch = s, monkeypatch
        self.decodes, self.first = 2, 4  # requests that decode, and their tokens
        n = self.decodes
        self.buffer = torch.full((s.tokens + 5, s.heads_kv, s.topk), 77, dtype=torch.int32,
                                 device=DEVICE)
        self.out = s.poison(s.tokens, s.heads_kv * s.group * s.dim, dtype=torch.bfloat16)
        self.decode = types.SimpleNamespace(
            seq_lens=s.seq_lens[:n], block_table=s.block_table[:n], max_seq_len=1000,
            decode_query_len=2, max_decode_query_len=16)
        self.prefill = types.SimpleNamespace(
            cu_seqlens_q=s.cu_seqlens_q[n:] - self.first, seq_lens=s.seq_lens[n:],
            cu_seqlens_k=s.int32([0, *s.kv_lens[n:]]).cumsum(0, dtype=torch.int32),
            context_lens=s.prefix_lens[n:], block_table=s.block_table[n:], max_query_len=130,
            max_seq_len=500, total_kv_blocks=sum(s.blocks[n:]))

    def metadata(self, kind, **fields):
        made = object.__new__(kind)
        made.__dict__.update(num_actual_tokens=self.s.tokens, num_decodes=self.decodes,
                             num_decode_tokens=self.first, num_prefills=2, decode=self.decode,
                             prefill=self.prefill, **fields)
        return made

    def forward(self, indexer, sparse, index_metadata, main_metadata):
        """Both layers, one after the other; classes of vLLM's, whose state they read is ours."""
        s = self.s
        context = types.SimpleNamespace(attn_metadata={"index": index_metadata,
                                                       "main": main_metadata})
        for layer in (indexer, sparse):
            self.monkeypatch.setattr(sys.modules[layer.__module__], "get_forward_context",
                                     lambda: context)
        indexer.forward(types.SimpleNamespace(
            index_cache=types.SimpleNamespace(prefix="index", kv_cache=s.index_cache()),
            num_index_heads=s.heads_kv, index_head_dim=s.dim, topk_indices_buffer=self.buffer,
            topk_blocks=s.topk, init_blocks=0, local_blocks=1, num_kv_heads=s.heads_kv,
            scale=s.dim ** -0.5), s.idx_q.flatten(1))
        sparse.forward(types.SimpleNamespace(
            head_size=s.dim, num_heads=s.heads_kv * s.group, use_fp8_kv=False, use_nvfp4_kv=False,
            use_cutlass_decode=False, scale=0.1, num_kv_heads=s.heads_kv, topk_blocks=s.topk),
            types.SimpleNamespace(layer_name="main", topk_indices_buffer=self.buffer),
            s.q.flatten(1), s.kv_cache(), self.out)

    def check(self):
        s = self.s
        assert torch.equal(self.buffer[:s.tokens].transpose(0, 1).cpu(), s.ids())
        assert (self.buffer[s.tokens:] == 77).all()
        assert error_norm(self.out.view_as(s.q), s.attention(s.ids(), 0.1)[0]) < 2.0 ** -7


@pytest.fixture
def vllm_step(monkeypatch):
    engine_or_skip(vllm)
    vllm.patch()
    yield VllmStep(mixed(), monkeypatch)
    vllm.unpatch()


def test_a_step_of_vllms_layers(vllm_step):
    indexer, sparse = (module_or_skip(f"{VLLM}.{name}")
                       for name in ("indexer", "sparse_attention"))
    vllm_step.forward(indexer.MiniMaxM3IndexerTritonImpl, sparse.MiniMaxM3SparseTritonImpl,
                      vllm_step.metadata(indexer.MiniMaxM3IndexerMetadata),
                      vllm_step.metadata(sparse.MiniMaxM3SparseMetadata))
    vllm_step.check()


def test_a_step_of_vllms_layers_on_fmha_sm100(vllm_step):
    """Its layers for Blackwell, whose prefill calls MiniMax's operators: ours, in place of the
    copy that vLLM brings."""
    indexer, sparse = (module_or_skip(f"{VLLM_MSA}.{name}_msa")
                       for name in ("indexer", "sparse_attention"))
    s, step = vllm_step.s, vllm_step
    install(vllm=True, shadow=True)
    try:
        from vllm.third_party.fmha_sm100.api import _fmha_sm100_plan

        new, all_ = (torch.tensor(x[step.decodes:], dtype=torch.int32)
                     for x in (s.q_lens, s.kv_lens))
        plan = _fmha_sm100_plan(new, all_, s.heads_kv, num_kv_heads=1, qo_offset=all_ - new,
                                page_size=BLOCK, output_maxscore=True, causal=True,
                                num_kv_splits=1)
        plan["max_k_tiles"] = indexer.MAX_K_TILES
        pages = [page for own in s.own_pages[step.decodes:] for page in own]
        scores = torch.full((s.tokens, s.heads_kv, indexer.MAX_K_TILES), -float("inf"),
                            device=DEVICE)
        valid = s.int32([position // BLOCK + 1 for _, _, position in s.rows()])
        step.forward(
            indexer.MiniMaxM3IndexerMSAImpl, sparse.MiniMaxM3SparseMSAImpl,
            step.metadata(indexer.MiniMaxM3IndexerMSAMetadata, unified_scores=scores,
                          topk_num_valid_pages=valid,
                          prefill_msa=types.SimpleNamespace(plan=plan, page_table=s.int32(pages))),
            step.metadata(module_or_skip(f"{VLLM}.sparse_attention").MiniMaxM3SparseMetadata))
    finally:
        uninstall()
    step.check()


@pytest.fixture
def pages_of_a_block(monkeypatch):
    """What a running server has published."""
    runtime = module_or_skip("sglang.srt.runtime_context")
    monkeypatch.setattr(runtime, "get_schedule", lambda: types.SimpleNamespace(page_size=BLOCK))


def sglang_batch(new_tokens):
    return mixed(q_lens=[1] * 4 if new_tokens == 1 else [2, 2, 130, 9])


@pytest.mark.parametrize("new_tokens", [1, 130])
def test_a_step_of_sglangs_layers(pages_of_a_block, new_tokens):
    engine_or_skip(sglang)
    module = module_or_skip(f"{SGLANG}.minimax_sparse")
    s = sglang_batch(new_tokens)
    slots = Slots(s)
    inputs = dict(q=s.q, k_cache=slots.k, v_cache=slots.v, sink=None, idx_q=s.idx_q,
                  idx_k_cache=slots.index, idx_v_cache=None, idx_sink=None,
                  req_to_token=slots.table, slot_ids=slots.slot_ids, seq_lens=s.seq_lens,
                  block_size_q=1, block_size_k=BLOCK, topk=s.topk, init_blocks=0, local_blocks=1,
                  sm_scale=0.1, disable_index_value=True, page_size=BLOCK)
    try:
        sglang.patch()
        if new_tokens == 1:
            _, out = module.minimax_sparse_decode(**inputs, max_seqlen=max(s.kv_lens))
        else:
            _, out = module.minimax_sparse_prefill(
                **inputs, prefix_lens=s.prefix_lens, cu_seqlens=s.cu_seqlens_q,
                max_seqlen_q=max(s.q_lens), max_seqlen_k=max(s.kv_lens))
    finally:
        sglang.unpatch()
    assert error_norm(out, s.attention(s.ids(), 0.1)[0]) < 2.0 ** -7


@pytest.fixture
def sglang_msa():
    """SGLang's path through MiniMax's operators, which finds ours."""
    engine_or_skip(sglang)
    module = module_or_skip(f"{SGLANG}.msa")
    install(shadow=True)
    module._load_fmha_sm100.cache_clear()
    yield module
    module._load_fmha_sm100.cache_clear()
    uninstall()


def test_a_prefill_of_sglang_on_fmha_sm100(sglang_msa):
    s = sglang_batch(130)
    slots = Slots(s)
    out = sglang_msa.msa_sparse_prefill_main(
        s.q, slots.k, slots.v, s.ids().to(DEVICE), slots.table, slots.slot_ids, s.cu_seqlens_q,
        s.seq_lens, s.prefix_lens, BLOCK, sm_scale=0.1)
    assert error_norm(out, s.attention(s.ids(), 0.1)[0]) < 2.0 ** -7


def test_decodes_of_sglang_on_fmha_sm100(sglang_msa):
    """One plan and one page table, which every step updates in place."""
    heads = (64, 4)
    plan = sglang_msa.build_msa_decode_cg_plan(*heads, BLOCK, 4, 4, device=torch.device(DEVICE))
    pages = torch.zeros(4 * 8, dtype=torch.int32, device=DEVICE)
    for lengths in ([400, 131, 130, 500], [1, 900, 512, 77]):
        s = mixed(q_lens=[1] * 4, kv_lens=lengths)
        slots = Slots(s)
        sglang_msa.update_msa_decode_cg_meta(plan, pages, slots.table, slots.slot_ids, s.seq_lens,
                                             BLOCK, 4, *heads)
        out = sglang_msa.msa_sparse_decode_main(
            s.q, slots.k, slots.v, s.ids().to(DEVICE), slots.table, slots.slot_ids, s.seq_lens,
            BLOCK, sm_scale=0.1, kv_indices=pages, plan=plan)
        assert error_norm(out, s.attention(s.ids(), 0.1)[0]) < 2.0 ** -7


def test_sglang_without_a_server_says_what_it_lacks():
    engine_or_skip(sglang)
    module_or_skip("sglang.srt.runtime_context")
    s = sglang_batch(130)
    slots = Slots(s)
    with pytest.raises(NotImplementedError, match="page_size: got 1, supported are multiples"):
        sglang.flash_prefill_with_gqa_share_sparse(
            s.q, slots.k, slots.v, None, slots.table, slots.slot_ids, s.ids().to(DEVICE), 1, BLOCK,
            s.cu_seqlens_q, s.seq_lens, s.prefix_lens, 130)


# ---- the engines' Triton functions as a judge


def check_choice(s, ids):
    """Theirs break ties as they come: lists of as many blocks, as good, with the local one."""
    scores, want = s.scores(), s.ids()
    for t, _, position in s.rows():
        for h in range(s.heads_kv):
            got, best = (x[h, t][x[h, t] >= 0].long() for x in (ids.cpu(), want))
            assert len(set(got.tolist())) == len(got) == len(best), (t, h, got, best)
            assert position // BLOCK in got
            assert torch.equal(scores[h, t, got].sort().values, scores[h, t, best].sort().values)


@needs_triton
@pytest.mark.parametrize("functions", [None, vllm], ids=["theirs", "ours"])
def test_vllms_functions(functions):
    """The same checks for their functions and for ours."""
    theirs = engine_or_skip(vllm)
    functions = functions or theirs
    s = mixed(q_lens=[2, 2, 130, 9])
    cache, index_cache = s.kv_cache().nan_to_num(0), s.index_cache().nan_to_num(0)
    lengths = (s.cu_seqlens_q, s.seq_lens, s.prefix_lens)
    scores = functions.minimax_m3_index_score(s.idx_q, index_cache, s.block_table, *lengths, 130,
                                              500, s.heads_kv)
    want = s.scores()
    visible = want > -float("inf")
    assert torch.equal(scores[..., :want.shape[2]].cpu()[visible], want[visible])
    ids = functions.minimax_m3_index_topk(scores, lengths[0], lengths[2], 130, s.topk, 0, 1)
    check_choice(s, ids)
    out = torch.empty_like(s.q)
    functions.minimax_m3_sparse_attn(s.q, cache, ids, s.block_table, *lengths, 130, s.heads_kv,
                                     0.1, out)
    assert error_norm(out, s.attention(ids.cpu(), 0.1)[0]) < 2.0 ** -7

    for length in (1, 4):
        s = mixed(q_lens=[length] * 4)
        cache, index_cache = s.kv_cache().nan_to_num(0), s.index_cache().nan_to_num(0)
        ids = functions.minimax_m3_index_decode(s.idx_q, index_cache, s.block_table, s.seq_lens,
                                                1000, s.topk, 0, 1, s.heads_kv, length, length)
        check_choice(s, ids)
        out = torch.empty_like(s.q)
        functions.minimax_m3_sparse_attn_decode(s.q, cache, ids, s.block_table, s.seq_lens,
                                                s.heads_kv, 0.1, out, length)
        assert error_norm(out, s.attention(ids.cpu(), 0.1)[0]) < 2.0 ** -7


@needs_triton
@pytest.mark.parametrize("new_tokens", [1, 130])
@pytest.mark.parametrize("functions", [None, sglang], ids=["theirs", "ours"])
def test_sglangs_functions(pages_of_a_block, functions, new_tokens):
    theirs = engine_or_skip(sglang)
    functions = functions or theirs
    s = sglang_batch(new_tokens)
    slots = Slots(s)
    for cache in (slots.k, slots.v, slots.index):
        cache.nan_to_num_(0)
    select, attend = ((select_decode, attend_decode) if new_tokens == 1
                      else (select_prefill, attend_prefill))
    ids = select(s, slots, functions)[1]
    check_choice(s, ids)
    out = attend(s, slots, ids, functions, sm_scale=0.1)
    assert error_norm(out, s.attention(ids.cpu(), 0.1)[0]) < 2.0 ** -7
