"""Makes the golden files of this folder from the model code in transformers (minimax_m3_vl).

    python tests/golden/make_goldens.py [--only short|long]

code-11m.N.safetensors   logits of models/code-11m after some of the first N bytes of sample.txt,
                         with MSA and (beyond the K blocks) with dense attention, and the selected
                         blocks of every query that had a choice
tiny/                    a small random model with MoE layers, in both namings and config forms,
                         and tiny.safetensors: tokens, logits and selected blocks
bits.json                bits per byte of sample.txt

A selection is a bit mask of block ids: `layers.L.selected` int32 [Hi,queries], bit j = block j; the
queries are those from metadata `first_selected` on.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

HERE = Path(__file__).resolve().parent
CODE_11M = HERE.parent.parent / "models" / "code-11m"
SHORT, LONG = (200, 1000), (2500, 4096)
BITS = (4096, 8192)
CHUNK = 1024  # tokens per forward call: keeps the eager masks small


def text_tokens(count):
    return torch.tensor(list((CODE_11M / "sample.txt").read_bytes()[:count]))


def load_code_11m(dense=False):
    config = MiniMaxM3VLTextConfig(**json.loads((CODE_11M / "config.json").read_text()))
    config._attn_implementation = "eager"
    if dense:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    model = MiniMaxM3VLForCausalLM(config).to(torch.float32).eval()
    state = {}
    for shard in sorted(CODE_11M.glob("*.safetensors")):
        state |= load_file(shard)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert dense or not unexpected, unexpected
    return model


@torch.no_grad()
def run(model, tokens):
    """logits [T,V] f32, {layer: selected blocks as bit masks [Hi,T]}, the pieces they came in."""
    masks = {}

    def watch(layer):
        def hook(_module, _inputs, ids):  # [1,Hi,t,K], -1 = no block
            bits = torch.where(ids >= 0, 1 << ids.clamp(min=0), 0).sum(-1)[0]
            masks.setdefault(layer, []).append(bits)
        return hook

    handles = [
        block.self_attn.indexer.register_forward_hook(watch(i))
        for i, block in enumerate(model.model.layers)
        if block.self_attn.indexer is not None
    ]
    cache = DynamicCache(config=model.config)
    logits = [
        model(input_ids=piece[None], past_key_values=cache, use_cache=True).logits[0]
        for piece in tokens.split(CHUNK)
    ]
    for handle in handles:
        handle.remove()
    return torch.cat(logits).float(), {i: torch.cat(m, dim=1) for i, m in masks.items()}


def to_i32(bits):  # bit 31 is the sign
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).contiguous()


def golden(config, logits, masks, dense_logits=None, count=24):
    """Tensors and metadata of one golden file."""
    length = len(logits)
    positions = torch.linspace(0, length - 1, min(count, length)).round().to(torch.int32)
    tensors = {"positions": positions, "logits": logits[positions.long()].contiguous()}
    if dense_logits is not None:
        tensors["dense_logits"] = dense_logits[positions.long()].contiguous()
    first = config.index_topk_blocks * config.index_block_size
    if length > first:
        for layer, bits in masks.items():
            tensors[f"layers.{layer}.selected"] = to_i32(bits[:, first:])
    return tensors, {"context": str(length), "first_selected": str(first)}


def golden_code_11m(length):
    tokens = text_tokens(length)
    model = load_code_11m()
    logits, masks = run(model, tokens)
    beyond = length > model.config.index_topk_blocks * model.config.index_block_size
    dense = run(load_code_11m(dense=True), tokens)[0] if beyond else None
    return golden(model.config, logits, masks, dense)


def bits_per_byte(logits, tokens):
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:])
    return float(loss) / math.log(2)


def tiny_config():
    return MiniMaxM3VLTextConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, dense_intermediate_size=96, intermediate_size=48,
        shared_intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
        routed_scaling_factor=1.5, rms_norm_eps=1e-5, swiglu_alpha=1.5, swiglu_limit=2.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                         "partial_rotary_factor": 0.5},
        layer_types=["full_attention"] + ["minimax_m3_sparse"] * 3,
        mlp_layer_types=["dense", "dense", "sparse", "sparse"],
        index_n_heads=2, index_head_dim=64, index_block_size=16, index_topk_blocks=4,
        index_local_blocks=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def tiny_model():
    config = tiny_config()
    config._attn_implementation = "eager"
    model = MiniMaxM3VLForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(20)
    state = {}
    for name, value in sorted(model.state_dict().items()):
        scale = 0.5 if "norm" in name or "bias" in name else 2.0 / math.sqrt(value.shape[-1])
        noise = torch.randn(value.shape, generator=generator) * scale
        state[name] = noise.to(torch.bfloat16).float()  # what a bf16 file can hold
    model.load_state_dict(state)
    return model


def save_tiny(folder, model):
    """The same model twice: as Hugging Face's modules, and as the released checkpoint names it."""
    state = {
        name: value if "bias" in name else value.to(torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    module = folder / "module"
    module.mkdir(parents=True, exist_ok=True)
    save_file(state, module / "model.safetensors", metadata={"format": "pt"})
    keys = ("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim dense_intermediate_size intermediate_size shared_intermediate_size "
            "num_local_experts num_experts_per_tok routed_scaling_factor rms_norm_eps swiglu_alpha "
            "swiglu_limit rope_parameters bos_token_id eos_token_id").split()  # fmt: skip
    config = model.config
    common = {key: getattr(config, key) for key in keys}
    index = {key: getattr(config, key) for key in (
        "index_n_heads", "index_head_dim", "index_block_size", "index_topk_blocks",
        "index_local_blocks", "layer_types", "mlp_layer_types")}  # fmt: skip
    write_json(module / "config.json", {"model_type": "minimax_m3_vl_text", **common, **index})

    released = folder / "released"
    released.mkdir(parents=True, exist_ok=True)
    rope = common.pop("rope_parameters")
    text = {
        **common,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "hidden_act": "swigluoai",
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_num_index_heads": config.index_n_heads,
            "sparse_index_dim": config.index_head_dim,
            "sparse_block_size": config.index_block_size,
            "sparse_topk_blocks": config.index_topk_blocks,
            "sparse_local_block": config.index_local_blocks,
            "sparse_init_block": 0,
            "sparse_score_type": "max",
            "sparse_attention_freq": [int(kind != "full_attention")
                                      for kind in config.layer_types],
        },
    }  # fmt: skip
    write_json(released / "config.json", {"model_type": "minimax_m3_vl", "text_config": text})
    renamed = {}
    for name, value in state.items():
        renamed |= released_names(name, value)
    renamed["mtp.layers.0.hnorm.weight"] = torch.ones(8)
    renamed["vision_tower.vision_model.pre_layrnorm.weight"] = torch.ones(8)
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, (name, value) in enumerate(sorted(renamed.items())):
        shards[list(shards)[i % 2]][name] = value.contiguous()
    for shard, tensors in shards.items():
        save_file(tensors, released / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    write_json(released / "model.safetensors.index.json", {"weight_map": weight_map})


def released_names(name, value):
    """{name: tensor} of a module's tensor in the released checkpoint."""
    name = "language_model." + name.replace(".self_attn.indexer.", ".self_attn.index_")
    if ".mlp.experts." in name or ".mlp.gate." in name or ".mlp.shared_experts." in name:
        name = name.replace(".mlp.gate.e_score", ".mlp.e_score")
        name = name.replace(".mlp.", ".block_sparse_moe.")
    if name.endswith(".experts.gate_up_proj"):
        prefix = name.removesuffix("gate_up_proj")
        halves = [expert.chunk(2) for expert in value]
        return {f"{prefix}{e}.{w}.weight": half.clone()
                for e, pair in enumerate(halves)
                for w, half in zip(("w1", "w3"), pair)}  # fmt: skip
    if name.endswith(".experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        return {f"{prefix}{e}.w2.weight": expert.clone() for e, expert in enumerate(value)}
    if name.endswith(".gate_up_proj.weight"):
        prefix = name.removesuffix("gate_up_proj.weight")
        gate, up = value.chunk(2)
        return {f"{prefix}gate_proj.weight": gate.clone(), f"{prefix}up_proj.weight": up.clone()}
    return {name: value}


def golden_tiny(model):
    tokens = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(21))
    logits, masks = run(model, tokens)
    tensors, metadata = golden(model.config, logits, masks, count=40)
    tensors["tokens"] = tokens.to(torch.int32)
    return tensors, metadata


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def load_golden(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("short", "long"))
    only = parser.parse_args().only
    if only != "long":
        model = tiny_model()
        save_tiny(HERE / "tiny", model)
        tensors, metadata = golden_tiny(model)
        save_file(tensors, HERE / "tiny.safetensors", metadata=metadata)
    for length in (*(SHORT if only != "long" else ()), *(LONG if only != "short" else ())):
        tensors, metadata = golden_code_11m(length)
        save_file(tensors, HERE / f"code-11m.{length}.safetensors", metadata=metadata)
    if only != "short":
        bits = {}
        for attention in ("dense", "msa"):
            model = load_code_11m(dense=attention == "dense")
            logits, _ = run(model, text_tokens(max(BITS)))
            for length in BITS:
                tokens = text_tokens(length)
                bits.setdefault(str(length), {})[attention] = bits_per_byte(logits[:length], tokens)
        write_json(HERE / "bits.json", bits)


if __name__ == "__main__":
    main()
