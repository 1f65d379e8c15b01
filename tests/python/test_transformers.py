"""attn_implementation="msa_cpp" against the eager model of transformers, which is the oracle.

Two models: code-11m as it lies in models/, and a small random one with MoE layers. Selections are
compared as sets; a difference must be a near tie, by the scores of both sides, and is counted.
"""

import copy
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the cores are shared with other tests

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", "5.23", reason="transformers is not installed")
pytest.importorskip("msa_cpp", reason="msa_cpp is not installed")
pytest.importorskip(
    "transformers.models.minimax_m3_vl", reason="this transformers has no minimax_m3_vl"
)
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3  # noqa: E402

import msa_cpp.integrations.transformers as integration  # noqa: E402
from msa_arrays import DEVICE  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "golden"))
import make_goldens  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
ROOM = 64 + 9  # of a static cache: the new tokens, and what makes it no multiple of a block


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()
    with torch.no_grad(), torch.device(DEVICE):
        yield
    integration.unregister()


@functools.cache
def model_of(name, implementation, dtype=F32):
    """code-11m (with its own 16 blocks or with 2, so that short texts have a choice) or "moe"."""
    if name == "moe":
        config = make_goldens.tiny_config()
        config._attn_implementation = implementation
        model = m3.MiniMaxM3VLForCausalLM(config)
        model.load_state_dict(tiny_state())
        model = model.to(dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(
            make_goldens.CODE_11M, attn_implementation=implementation, dtype=dtype,
            index_topk_blocks=int(name.removeprefix("code-11m, K=")),
        )  # fmt: skip
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(DEVICE)


def tiny_state():
    with torch.device("cpu"):
        return make_goldens.tiny_model().state_dict()


def tokens_of(name, length, start=0):
    """int64 [length]: text for code-11m, random tokens for the random model."""
    if name == "moe":
        generator = torch.Generator().manual_seed(31 + start)
        return torch.randint(2, 96, (length,), generator=generator, device="cpu").to(DEVICE)
    text = (make_goldens.CODE_11M / "sample.txt").read_bytes()[start : start + length]
    return torch.tensor(list(text))


MODELS = {"code-11m, K=2": 600, "moe": 300}  # name -> tokens, beyond what K blocks hold
both_models = pytest.mark.parametrize("name, length", MODELS.items(), ids=MODELS)
caches = pytest.mark.parametrize("kind", ("dynamic", "static"))


def cache_for(model, kind, length):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length + ROOM)


class Selections:
    """Block scores, in torch and fp32, and chosen ids of every sparse layer of a run."""

    def __init__(self, model):
        self.scores, self.ids = {}, {}
        self.handles = [
            layer.self_attn.indexer.register_forward_hook(self.hook)
            for layer in model.model.layers if layer.self_attn.indexer is not None
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def hook(self, indexer, inputs, ids):
        hidden, rope, cache, positions = inputs

        def heads(projection, norm):
            return norm(projection(hidden).unflatten(-1, (-1, indexer.head_dim))).transpose(1, 2)

        q, k = m3.apply_rotary_pos_emb(
            heads(indexer.q_proj, indexer.q_norm), heads(indexer.k_proj, indexer.k_norm), *rope
        )
        if cache is not None:
            k = cache.layers[indexer.layer_idx].idx_keys
        hidden_keys = torch.arange(k.shape[2]) > positions[:, None, :, None]
        scores = (q.float() @ k.float().mT).masked_fill(hidden_keys, -torch.inf)
        scores = torch.nn.functional.pad(
            scores, (0, -k.shape[2] % indexer.block_size), value=-torch.inf
        )
        # An fp32 sum of Di products errs by less than Di 2^-24 |q| |k|.
        error = indexer.head_dim * 2.0**-24 * q.float().norm(dim=-1) * k.float().norm(dim=-1).max()
        scores = scores.unflatten(-1, (-1, indexer.block_size)).amax(-1)
        self.scores.setdefault(indexer.layer_idx, []).append((scores, error))
        self.ids.setdefault(indexer.layer_idx, []).append(ids)


def chosen(ids, blocks):
    """ids [...,K], -1 tail -> bool [...,blocks]"""
    out = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool)
    return out.scatter(-1, ids.masked_fill(ids < 0, blocks), True)[..., :blocks]


def flips(ours, theirs, real):
    """(lists that differ, all lists) of the real tokens [B,T]; each difference must be a near tie.

    Where ours took block i and theirs block j instead, ours_i >= ours_j and theirs_j >= theirs_i,
    so theirs_j - theirs_i is at most the sum of both blocks' |ours - theirs|.
    """
    count = total = 0
    for layer in theirs.ids:
        pieces = real.split([ids.shape[2] for ids in theirs.ids[layer]], dim=1)
        for call, piece in enumerate(pieces):
            def rows(values):  # [B,Hi,T,...] -> [real tokens,Hi,...]
                return values.transpose(1, 2)[piece]  # noqa: B023

            a, error = (rows(x) for x in ours.scores[layer][call])
            b = rows(theirs.scores[layer][call][0])
            visible = torch.isfinite(b)
            apart = (a - b).masked_fill(~visible, 0).abs().amax(-1) + error
            mine, other = (chosen(rows(x.ids[layer][call]), b.shape[-1]) for x in (ours, theirs))
            assert torch.equal(mine.sum(-1), other.sum(-1))
            best_missed = b.masked_fill(~(other & ~mine), -torch.inf).amax(-1)
            worst_taken = b.masked_fill(~(mine & ~other), torch.inf).amin(-1)
            different = (mine != other).any(-1)
            gap = (best_missed - worst_taken)[different]
            assert (gap <= 2 * apart[different]).all(), f"layer {layer}: gaps {gap}"
            count, total = count + int(different.sum()), total + different.numel()
    return count, total


def forward(model, ids, cache=None, chunk=None, **kwargs):
    """logits [B,T,V], hidden states [B,T,H] of every layer, and the selections."""
    pieces = ids.split(chunk or ids.shape[1], dim=1)
    with Selections(model) as selections:
        outputs = [model(piece, past_key_values=cache, output_hidden_states=True, **kwargs)
                   for piece in pieces]  # fmt: skip
    logits = torch.cat([o.logits for o in outputs], dim=1)
    hidden = [torch.cat(states, dim=1) for states in zip(*(o.hidden_states for o in outputs))]
    return logits, hidden, selections


@functools.cache
def reference(name, length):
    """The eager model's forward over one text, in f32."""
    return forward(model_of(name, "eager"), tokens_of(name, length)[None])


def assert_close(ours, theirs, real=None):
    """f32 outputs that differ by the order of sums only.

    transformers itself moves the logits of code-11m by 2e-4 between "eager" and "sdpa".
    """
    real = torch.ones(ours[0].shape[:2], dtype=torch.bool) if real is None else real.bool()
    count, total = flips(ours[2], theirs[2], real)
    print(f"{count} of {total} lists differ, all near ties")
    torch.testing.assert_close(ours[0][real], theirs[0][real], rtol=0, atol=2e-4)
    for mine, other in zip(ours[1], theirs[1]):
        torch.testing.assert_close(mine[real], other[real], rtol=0,
                                   atol=2e-5 * other[real].abs().max().item())  # fmt: skip


@both_models
def test_whole_prefill(name, length):
    ours = forward(model_of(name, "msa_cpp"), tokens_of(name, length)[None])
    assert_close(ours, reference(name, length))


def test_the_sixteen_blocks_of_code_11m():
    """4096 tokens against the golden file, which the eager model wrote: logits and selections."""
    golden, metadata = make_goldens.load_golden(ROOT / "tests/golden/code-11m.4096.safetensors")
    golden = {key: value.to(DEVICE) for key, value in golden.items()}
    length, first = (int(metadata[key]) for key in ("context", "first_selected"))
    model = model_of("code-11m, K=16", "msa_cpp")
    cache = DynamicCache(config=model.config)
    logits, _, ours = forward(model, tokens_of("code-11m", length)[None], cache)
    count = 0
    for layer in ours.ids:
        bits = golden[f"layers.{layer}.selected"].long()  # [Hi,T-first]
        theirs = (bits[..., None] >> torch.arange(length // 128) & 1).bool()
        (scores, _), ids = ours.scores[layer][0], ours.ids[layer][0]
        mine, scores = chosen(ids, length // 128)[0, :, first:], scores[0, :, first:]
        different = (mine != theirs).any(-1)
        count += int(different.sum())
        worst_taken = scores.masked_fill(~(mine & ~theirs), torch.inf).amin(-1)
        best_missed = scores.masked_fill(~(theirs & ~mine), -torch.inf).amax(-1)
        gap = (worst_taken - best_missed) / best_missed.abs().clamp(min=1)
        assert (gap[different] <= 1e-4).all()
    print(f"{count} of {len(ours.ids) * mine.shape[0] * mine.shape[1]} lists differ")
    difference = logits[0, golden["positions"].long()] - golden["logits"]
    assert difference.abs().max() <= (2e-4 if count == 0 else 2e-3)


@both_models
@caches
def test_chunked_prefill(name, length, kind):
    model = model_of(name, "msa_cpp")
    ids = tokens_of(name, length)[None]
    logits, hidden, _ = forward(model, ids, cache_for(model, kind, length), chunk=length // 4 + 3)
    theirs = reference(name, length)
    torch.testing.assert_close(logits, theirs[0], rtol=0, atol=2e-4)


def padded(name, length):
    """Two texts, the second shorter and padded on the right: ids and mask [2,T]."""
    short = length * 2 // 3 + 5
    ids = torch.stack((tokens_of(name, length), tokens_of(name, length, start=5000)))
    mask = torch.ones_like(ids)
    ids[1, short:], mask[1, short:] = 0, 0
    return ids, mask


@both_models
def test_right_padding(name, length):
    ids, mask = padded(name, length)
    ours, theirs = (forward(model_of(name, kind), ids, attention_mask=mask)
                    for kind in ("msa_cpp", "eager"))  # fmt: skip
    assert_close(ours, theirs, mask)


def test_right_padding_in_four_dimensions():
    """The masks that transformers makes for "sdpa", bool [B,1,T,S], and for "eager", additive."""
    length = MODELS["moe"]
    ids, mask = padded("moe", length)
    model = model_of("moe", "msa_cpp")
    expected = model(ids, attention_mask=mask).logits
    allowed = torch.ones(length, length).tril().bool() & mask[:, None, None].bool()
    for wide in (allowed, torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)):
        logits = model(ids, attention_mask=wide).logits
        assert torch.equal(logits[mask.bool()], expected[mask.bool()])


@caches
def test_right_padding_in_chunks(kind):
    """A chunk that is padding alone must leave the cache of its row as it was."""
    name, length = "moe", MODELS["moe"]
    ids, mask = padded(name, length)
    model = model_of(name, "msa_cpp")
    places = (mask.cumsum(1) - 1) * mask  # as generate() gives them: 0 for padding
    cache = cache_for(model, kind, length)
    logits = torch.cat([
        model(ids[:, a : a + 70], attention_mask=mask[:, : a + 70], past_key_values=cache,
              position_ids=places[:, a : a + 70]).logits
        for a in range(0, length, 70)
    ], dim=1)  # fmt: skip
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-4)


def greedy(model, ids, **kwargs):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          return_dict_in_generate=True, output_logits=True, **kwargs)  # fmt: skip


@functools.cache
def eager_text(name, length, start=0, dtype=F32):
    """64 greedy tokens of the eager model behind a text, and the logits of every step."""
    ids = tokens_of(name, length, start)[None]
    out = greedy(model_of(name, "eager", dtype), ids, max_new_tokens=64)
    return out.sequences[0, length:], [step[0] for step in out.logits]


def assert_same_text(ours, theirs, their_logits, tolerance=2e-4):
    """Equal tokens [T], or different ones first where theirs hardly prefers its own."""
    different = (ours != theirs).nonzero()
    if len(different):
        step = int(different[0])
        gap = their_logits[step][theirs[step]] - their_logits[step][ours[step]]
        print(f"texts part at token {step}, a tie by {float(gap):.1e}")
        assert gap <= 2 * tolerance


@both_models
@caches
def test_generate_greedy(name, length, kind):
    """On a GPU generate() compiles the decoding over a static cache: here that of the model without
    experts, whose loop would be compiled anew for every choice of them."""
    ids = tokens_of(name, length)[None]
    ours = greedy(model_of(name, "msa_cpp"), ids, max_new_tokens=64, cache_implementation=kind,
                  disable_compile=name == "moe")
    assert ours.sequences.shape == (1, length + 64)
    assert_same_text(ours.sequences[0, length:], *eager_text(name, length))


def test_generate_in_chunks_and_batches():
    name, length = "moe", MODELS["moe"]
    ids = torch.stack([tokens_of(name, length, start=n) for n in range(3)])
    chunked = greedy(model_of(name, "msa_cpp"), ids, max_new_tokens=64, prefill_chunk_size=90)
    for b in range(3):
        assert_same_text(chunked.sequences[b, length:], *eager_text(name, length, start=b))


@both_models
def test_generate_sampling(name, length):
    ids = tokens_of(name, length, start=177)[None]
    texts = []
    for kind in ("msa_cpp", "eager"):
        torch.manual_seed(3)
        texts.append(model_of(name, kind).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_p=0.95,
            max_new_tokens=64))  # fmt: skip
    assert torch.equal(*texts)


@pytest.mark.parametrize("way", ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}), ids=str)
def test_generate_that_moves_the_caches(way):
    """Beams reorder their rows, rejected drafts are cut off their end."""
    ids = tokens_of("moe", 100).repeat(2)[None]
    texts = [model_of("moe", kind).generate(ids, attention_mask=torch.ones_like(ids),
                                            do_sample=False, max_new_tokens=20, **way)
             for kind in ("msa_cpp", "eager")]  # fmt: skip
    assert torch.equal(*texts)


def continue_padded(model, decode, ids, mask, cache, steps):
    """Greedy tokens [B,steps] and their logits behind prompts padded on the right."""
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    rows = torch.arange(len(ids))
    places = mask.sum(1)
    logits = logits[rows, places - 1]
    texts, history = [], []
    for _ in range(steps):
        texts.append(logits.argmax(-1))
        history.append(logits)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        logits = decode(input_ids=texts[-1][:, None], attention_mask=mask, past_key_values=cache,
                        position_ids=places[:, None]).logits[:, -1]  # fmt: skip
        places = places + 1
    return torch.stack(texts, dim=1), torch.stack(history, dim=1)


@both_models
@caches
def test_padded_prompts_go_on_as_if_alone(name, length, kind):
    """64 tokens behind padding, against the eager model on each prompt without padding.

    The eager model itself cannot: its sparse layers look for a token at its slot in the cache.
    """
    ids, mask = padded(name, length)
    model = model_of(name, "msa_cpp")
    texts, _ = continue_padded(model, model, ids, mask, cache_for(model, kind, length), 64)
    for b, (start, count) in enumerate(zip((0, 5000), mask.sum(1).tolist())):
        assert_same_text(texts[b], *eager_text(name, count, start))


@functools.cache
def bf16_prefill(name, length, implementation, kind="dynamic"):
    model = model_of(name, implementation, BF16)
    ids = tokens_of(name, length)[None]
    return forward(model, ids, cache_for(model, kind, length), chunk=length // 2)


@both_models
@caches
def test_bf16_is_as_near_to_f32_as_eager(name, length, kind):
    """Errors of logits and of the last hidden state against the eager model in f32."""
    exact = reference(name, length)
    errors = []
    for run in (bf16_prefill(name, length, "msa_cpp", kind), bf16_prefill(name, length, "eager")):
        errors.append([(run[0].float() - exact[0]).norm(),
                       (run[1][-1].float() - exact[1][-1]).norm()])  # fmt: skip
    print("errors, ours against eager's:", [f"{a / b:.2f}" for a, b in zip(*errors)])
    for mine, other in zip(*errors):
        assert mine <= 1.25 * other


@both_models
def test_generate_in_bf16(name, length):
    ids = tokens_of(name, length)[None]
    ours = greedy(model_of(name, "msa_cpp", BF16), ids, max_new_tokens=64).sequences[0, length:]
    # What rounding to bf16 does to logits of the eager model itself on this text.
    rounding = (bf16_prefill(name, length, "eager")[0] - reference(name, length)[0]).abs().max()
    assert_same_text(ours, *eager_text(name, length, dtype=BF16), tolerance=rounding)


@pytest.fixture
def small():
    """A dense and a sparse layer: dynamo takes its time for each."""
    config = make_goldens.tiny_config()
    config.num_hidden_layers, config._attn_implementation = 2, "msa_cpp"
    model = m3.MiniMaxM3VLForCausalLM(config).eval()
    model.load_state_dict(tiny_state(), strict=False)
    return model, torch.compile(model.forward, fullgraph=True, backend="aot_eager")


def test_compiled_prefill(small):
    """torch.compile(fullgraph=True): all is traced, though no code is generated."""
    model, compiled = small
    ids = tokens_of("moe", 150)[None]
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", (False, True), ids=("full", "padded"))
def test_compiled_decoding(small, padding):
    """Over a static cache, as generate() compiles it."""
    length, (model, compiled) = 100, small
    ids, mask = padded("moe", length)
    if not padding:
        mask = torch.ones_like(mask)
    runs = [continue_padded(model, decode, ids, mask, cache_for(model, "static", length), 8)
            for decode in (model, compiled)]  # fmt: skip
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=1e-5)


def test_other_forms_of_the_model():
    """Several local blocks, and no sparse layer at all."""
    ids = tokens_of("moe", 300)[None]
    for changes in ({"index_local_blocks": 2}, {"layer_types": ["full_attention"] * 4}):
        logits = []
        for implementation in ("msa_cpp", "eager"):
            config = copy.deepcopy(make_goldens.tiny_config())
            config._attn_implementation = implementation
            for key, value in changes.items():
                setattr(config, key, value)
            model = m3.MiniMaxM3VLForCausalLM(config).eval()
            model.load_state_dict(tiny_state(), strict=False)
            logits.append(model(ids).logits)
        torch.testing.assert_close(*logits, rtol=0, atol=2e-4)


@caches
def test_keys_and_values_are_read_where_they_lie(kind, monkeypatch):
    """No copies: the operators see the memory of the cache."""
    model = model_of("moe", "msa_cpp")
    cache = cache_for(model, kind, 300)
    seen = {}

    def spy(name):
        real = getattr(integration.msa_cpp, name)

        def call(q, *tensors, **kwargs):
            seen.setdefault(name, []).append([x.data_ptr() for x in tensors[:2]])
            return real(q, *tensors, **kwargs)

        monkeypatch.setattr(integration.msa_cpp, name, call)

    for name in ("index_select", "sparse_attention", "dense_attention"):
        spy(name)
    model(tokens_of("moe", 300)[None], past_key_values=cache)
    assert [len(calls) for calls in seen.values()] == [1, 3, 3]
    for calls, layers in (("dense_attention", (0,)), ("sparse_attention", (1, 2, 3))):
        assert seen[calls] == [[cache.layers[i].keys.data_ptr(), cache.layers[i].values.data_ptr()]
                               for i in layers]  # fmt: skip
    assert [x[0] for x in seen["index_select"]] == [cache.layers[i].idx_keys.data_ptr()
                                                    for i in (1, 2, 3)]  # fmt: skip


def tiny_vision_config():
    return {
        "hidden_size": 160, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    }  # fmt: skip


def test_the_vision_tower_runs_with_sdpa(monkeypatch):
    text = make_goldens.tiny_config().to_dict()
    config = m3.MiniMaxM3VLConfig(text_config=text, vision_config=tiny_vision_config(),
                                  image_token_index=95, projector_hidden_size=64)  # fmt: skip
    torch.manual_seed(5)
    model = m3.MiniMaxM3SparseForConditionalGeneration(config).eval()
    pixels = torch.randn(16, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, 4, 4]])
    ids = tokens_of("moe", 200)[None].clamp(max=90)
    ids[0, 10:14] = 95  # 4 x 4 patches, merged 2 x 2
    sdpa, calls = integration.ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def spy(module, query, *args, **kwargs):
        calls.append((type(module), query.shape[-1], kwargs["is_causal"]))
        return sdpa(module, query, *args, **kwargs)

    outputs = {}
    for implementation in ("eager", "sdpa", "msa_cpp"):
        model.set_attn_implementation(implementation)
        assert model.model.vision_tower.config._attn_implementation == implementation
        with monkeypatch.context() as patch:
            if implementation == "msa_cpp":
                patch.setitem(integration.ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
            outputs[implementation] = model(
                input_ids=ids, pixel_values=pixels, image_grid_thw=grid
            )
    assert calls == [(m3.MiniMaxM3VLVisionAttention, 80, False)] * 2
    images = [torch.cat(outputs[kind].image_hidden_states) for kind in ("msa_cpp", "sdpa")]
    assert torch.equal(*images)
    torch.testing.assert_close(outputs["msa_cpp"].logits, outputs["eager"].logits,
                               rtol=0, atol=2e-4)  # fmt: skip


def test_the_attention_function_alone():
    """As transformers calls it: a mask for right padding, ids in score order, any capacity."""
    model = model_of("moe", "msa_cpp")
    torch.manual_seed(8)
    q, k, v = torch.randn(2, 4, 50, 64), torch.randn(2, 2, 77, 64), torch.randn(2, 2, 77, 64)
    ids = torch.tensor([2, 0, -1]).expand(2, 2, 50, 3).clone()
    ids[:, :, :48], ids[:, :, :32] = torch.tensor([2, 0, -1]), torch.tensor([1, 0, -1])
    ids[:, :, :16] = torch.tensor([0, -1, -1])
    mask = torch.ones(50, 77).tril().bool().expand(2, 1, 50, 77)
    out, weights = integration.attention(model.model.layers[1].self_attn, q, k, v, mask,
                                         scaling=0.3, block_indices=ids,
                                         position_ids=torch.arange(50)[None])  # fmt: skip
    allowed = mask & chosen(ids, 5).repeat_interleave(16, -1)[..., :77].repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="row 0 is padded on the left"):
        integration.attention(model.model.layers[0].self_attn, q, k, v, mask.flip(3), scaling=0.3,
                              position_ids=torch.arange(50)[None])  # fmt: skip


# What is refused


def refused(model, kind, match, ids=None, **kwargs):
    with pytest.raises(kind, match=match):
        model(tokens_of("moe", 40)[None].repeat(2, 1) if ids is None else ids, **kwargs)


def test_refusals():
    model = model_of("moe", "msa_cpp")
    mask = torch.ones(2, 40, dtype=torch.long)

    left = mask.clone()
    left[1, :3] = 0
    refused(model, ValueError, "row 1 is padded on the left.*block grid", attention_mask=left)

    hole = mask.clone()
    hole[0, 20:22] = 0
    refused(model, ValueError, "between the tokens", attention_mask=hole)

    packed = torch.arange(20).repeat(2)[None]
    refused(model, ValueError, r"position_ids\[0,20\]: got 0, expected 20.*packed",
            position_ids=packed)  # fmt: skip

    window = torch.ones(40, 40).tril().triu(-7).bool().expand(2, 1, 40, 40)
    refused(model, NotImplementedError, "not causal with padding", attention_mask=window)
    with pytest.raises(NotImplementedError, match="sliding window: got 8"):
        integration.padding_mask(batch_size=1, q_length=4, kv_length=4, local_size=8)

    refused(model, NotImplementedError, "output_attentions", output_attentions=True)

    cache = DynamicCache(config=model.config)
    model(tokens_of("moe", 40)[None].repeat(2, 1), past_key_values=cache)
    refused(model, ValueError, "got 40 columns, expected 80", attention_mask=left,
            past_key_values=cache)  # fmt: skip


@caches
def test_a_refused_call_leaves_the_cache_as_it_was(kind):
    model = model_of("moe", "msa_cpp")
    cache = cache_for(model, kind, 60)
    model(tokens_of("moe", 40)[None], past_key_values=cache)
    before = copy.deepcopy(cache)
    refused(model, ValueError, "packed", tokens_of("moe", 5)[None], past_key_values=cache,
            position_ids=torch.arange(5)[None])  # fmt: skip
    for now, then in zip(cache.layers, before.layers):
        assert int(now.get_seq_length()) == int(then.get_seq_length()) == 40
        assert torch.equal(now.keys, then.keys) and torch.equal(now.values, then.values)
        if hasattr(now, "idx_keys"):
            assert torch.equal(now.idx_keys, then.idx_keys)


def test_generate_refuses_padded_prompts():
    model = model_of("moe", "msa_cpp")
    ids, mask = padded("moe", 60)
    with pytest.raises(ValueError, match="generate.. on prompts padded on the right"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
    with pytest.raises(ValueError, match="row 1 is padded on the left"):
        model.generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=3)


def test_gradients_are_those_of_the_eager_model():
    """The choice of blocks has none, there and here; the loss of the index branch is not in it."""
    ids = tokens_of("moe", 300)[None]
    gradients = []
    for implementation in ("eager", "msa_cpp"):
        model = copy.deepcopy(model_of("moe", implementation)).requires_grad_()
        with torch.enable_grad():
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, want in gradients[0].items():
        got = gradients[1][name]
        if want is None or not want.any():
            assert got is None or not got.any(), name
        else:
            assert (got - want).norm() < 1e-3 * want.norm(), name


# Autocast: f32 weights, products in 16 bits. RoPE leaves q and k in f32 beside a 16-bit v.

HALF = [BF16, torch.float16]


@functools.cache
def dense_mlps(implementation):
    """A random model in which no near tie decides: without experts, and with all blocks chosen."""
    config = make_goldens.tiny_config()
    config.index_topk_blocks = 32
    config.mlp_layer_types = ["dense"] * config.num_hidden_layers
    config._attn_implementation = implementation
    generator = torch.Generator(DEVICE).manual_seed(5)
    model = m3.MiniMaxM3VLForCausalLM(config).eval()
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim == 1 else 2.0 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ("code-11m, K=2", "random"))
@pytest.mark.parametrize("kind", (None, "dynamic", "static"))
def test_autocast_is_as_near_to_f32_as_eager(name, kind, dtype):
    """Whole, and in chunks over caches whose keys and values differ in dtype."""
    make = dense_mlps if name == "random" else functools.partial(model_of, name)
    length = 300 if name == "random" else MODELS[name]
    ids = tokens_of("moe" if name == "random" else name, length)[None]
    exact = forward(make("eager"), ids)
    errors = []
    for implementation in ("msa_cpp", "eager"):
        model = make(implementation)
        cache = None if kind is None else cache_for(model, kind, length)
        with torch.autocast(DEVICE, dtype=dtype):
            logits, hidden, _ = forward(model, ids, cache,
                                        chunk=length if kind is None else length // 2)  # fmt: skip
        assert logits.dtype == dtype
        errors.append([(logits.float() - exact[0]).norm(), (hidden[-1] - exact[1][-1]).norm()])
        if cache is not None:
            sparse = cache.layers[-1]
            assert (sparse.keys.dtype, sparse.idx_keys.dtype) == (F32, F32)
            assert sparse.values.dtype == dtype
    print("errors, ours against eager's:", [f"{a / b:.2f}" for a, b in zip(*errors)])
    for mine, other in zip(*errors):
        assert mine <= 1.25 * other


@pytest.mark.parametrize("dtype", HALF, ids=str)
@caches
def test_generate_under_autocast(kind, dtype):
    length, steps = 200, 24
    ids = tokens_of("moe", length)[None]
    with torch.autocast(DEVICE, dtype=dtype):
        ours, theirs = (
            greedy(dense_mlps(implementation), ids, max_new_tokens=steps, disable_compile=True,
                   cache_implementation=kind)
            for implementation in ("msa_cpp", "eager")
        )  # fmt: skip
        rounded = dense_mlps("eager")(ids).logits
    rounding = (rounded.float() - dense_mlps("eager")(ids).logits).abs().max()
    assert_same_text(ours.sequences[0, length:], theirs.sequences[0, length:],
                     [step[0].float() for step in theirs.logits], tolerance=rounding)  # fmt: skip


def gradients_of(model, ids, dtype=F32, recompute=False):
    """(loss, gradients by name) of one text."""
    model = copy.deepcopy(model).requires_grad_()
    if recompute:
        model.train()
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    with torch.enable_grad():
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != F32):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    made = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.dtype == F32 for gradient in made.values())
    return loss.detach(), made


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_under_autocast_are_as_near_to_f32_as_eager(dtype):
    ids = tokens_of("moe", 300)[None]
    loss, exact = gradients_of(dense_mlps("eager"), ids)
    model = dense_mlps("msa_cpp")
    ours, theirs = gradients_of(model, ids, dtype), gradients_of(dense_mlps("eager"), ids, dtype)
    assert (ours[0] - loss).abs() <= 4 * (theirs[0] - loss).abs() + torch.finfo(dtype).eps
    ratios = {}
    for name, want in exact.items():
        if not want.any():  # of the index branch
            assert name not in ours[1] or not ours[1][name].any(), name
            continue
        errors = [(made[1][name] - want).norm() for made in (ours, theirs)]
        ratios[name] = float(errors[0] / errors[1])
    print(f"errors, ours against eager's: {min(ratios.values()):.2f} to {max(ratios.values()):.2f}")
    assert max(ratios.values()) <= 2, max(ratios, key=ratios.get)
    again = gradients_of(model, ids, dtype, recompute=True)
    assert again[0] == ours[0]
    assert all(torch.equal(again[1][name], ours[1][name]) for name in ours[1])


def test_a_training_loop_under_autocast():
    """What Trainer(bf16=True) does: losses go down step by step as those of the eager model do."""
    ids = torch.stack([tokens_of("moe", 150, start=n) for n in range(2)])
    losses = {}
    for implementation in ("eager", "msa_cpp"):
        model = copy.deepcopy(dense_mlps(implementation)).train().requires_grad_()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[implementation] = []
        for _ in range(6):
            with torch.enable_grad():
                with torch.autocast(DEVICE, dtype=BF16):
                    loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[implementation].append(loss.item())
    print(losses)
    ours, theirs = (losses[name] for name in ("msa_cpp", "eager"))
    assert ours == pytest.approx(theirs, rel=2e-2) and ours[-1] < 0.9 * ours[0]


def test_trainer_in_bf16(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    model = copy.deepcopy(dense_mlps("msa_cpp")).requires_grad_()
    rows = [dict(input_ids=x, labels=x) for x in
            (tokens_of("moe", 96, start=n).cpu() for n in range(4))]  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(tmp_path), bf16=True, max_steps=4, per_device_train_batch_size=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=DEVICE == "cpu",
        gradient_checkpointing=True, save_strategy="no")  # fmt: skip
    with torch.enable_grad():
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_attention_dropout_is_refused():
    model = copy.deepcopy(model_of("moe", "msa_cpp"))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    refused(model, NotImplementedError, "attention_dropout: got 0.1")


def test_other_models_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=96,
                         intermediate_size=32, attn_implementation="msa_cpp")  # fmt: skip
    refused(LlamaForCausalLM(config).eval(), NotImplementedError, "got a LlamaAttention")


# register and unregister


def test_eager_models_stay_what_they_were(monkeypatch):
    for name in ("_select", "_attend", "_settle", "_places"):
        monkeypatch.delattr(integration, name)
    for implementation in ("eager", "sdpa"):
        model_of("moe", implementation)(tokens_of("moe", 100)[None])
    refused(model_of("moe", "msa_cpp"), NameError, "_places")


def test_unregister_restores_everything():
    model, ours = model_of("moe", "eager"), model_of("moe", "msa_cpp")
    ids = tokens_of("moe", 200)[None]
    with_ours = model(ids).logits
    integration.unregister()
    try:
        theirs = m3.MiniMaxM3VLAttention.forward, m3.MiniMaxM3VLIndexer.forward
        assert all(f.__module__ == m3.__name__ for f in theirs)
        for interface in (integration.AttentionInterface, integration.AttentionMaskInterface):
            assert "msa_cpp" not in interface._global_mapping
        assert torch.equal(model(ids).logits, with_ours)
        with pytest.raises(ValueError, match='attn_implementation="msa_cpp"'):
            m3.MiniMaxM3VLForCausalLM._from_config(
                make_goldens.tiny_config(), attn_implementation="msa_cpp"
            )
        refused(ours, KeyError, "msa_cpp")
        integration.unregister()  # a second time changes nothing
        assert (m3.MiniMaxM3VLAttention.forward, m3.MiniMaxM3VLIndexer.forward) == theirs
    finally:
        integration.register()
    integration.register()  # and so does this
    integration.unregister()
    assert (m3.MiniMaxM3VLAttention.forward, m3.MiniMaxM3VLIndexer.forward) == theirs
    integration.register()


def test_another_version_is_refused_as_a_whole(monkeypatch):
    integration.unregister()
    try:
        monkeypatch.setattr(m3.MiniMaxM3VLIndexer, "forward", lambda self, hidden_states: None)
        before = m3.MiniMaxM3VLAttention.forward
        with pytest.raises(RuntimeError, match="MiniMaxM3VLIndexer.forward takes self, hidden"):
            integration.register()
        assert m3.MiniMaxM3VLAttention.forward is before
        assert "msa_cpp" not in integration.AttentionInterface._global_mapping
    finally:
        monkeypatch.undo()
        integration.register()
