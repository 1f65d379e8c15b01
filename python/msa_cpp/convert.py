"""Turns a dense checkpoint of Llama's family into one of MiniMax-M3's shape.

    python -m msa_cpp.convert Qwen3-4B Qwen3-4B-msa --full-attention 0,1,2
    python -m msa_cpp.convert --check Qwen3-4B-msa

Under dense attention the converted model computes what its source computed; `msa` and transformers
(`minimax_m3_vl`) load it. Its sparse layers get a fresh index branch, which waits for training.

Three parts of M3's layer are not in Llama's and have no switch. Weights turn them off, by powers of
two wherever a matrix is touched, so that no bit of it is lost:

* Its MLP computes `(up + 1) * gate * sigmoid(alpha * gate)` with clamps. `swiglu_alpha` becomes 1
  and `swiglu_limit` out of reach; up_proj times 2^40 leaves of the 1 only 2^-40, far below the last
  bit of an f32 activation, and down_proj takes the factor back.
* It norms every head of q and k. Where the source does not (Llama, Mistral), q_proj and k_proj
  shrink by 2^40: beside `rms_norm_eps` the mean square vanishes from 1 / sqrt(mean(x^2) + eps).
  A constant is left, which the norm's weight takes back together with the factor.
* Its norms multiply by `1 + weight`. Weights near -1 are coarse in bf16, so they are written as
  f32; and so that a loader may cast them to bf16 all the same, norms with small weights grow by a
  power of two that the matrices behind them take back.

So the absolute sizes of these weights mean nothing any more, and an optimiser whose steps do not
follow them (Adam) must leave them frozen. Training the index branch alone is not affected.

Tensors pass through in pieces of 32 MiB; a model is never in memory as a whole.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ._checkpoint import Checkpoint, Tensor, read_json, write_checkpoint
from ._command import InputError, Parser, exit_code
from ._config import (
    FIXED,
    FULL,
    ROPE_KEYS,
    SPARSE,
    check_fixed,
    integer,
    m3_config,
    positive,
    reading,
    refuse,
    rope_parameters,
)
from ._files import whole_folder

HEAD_NORMS = ("qwen3",)  # of these, with a norm of every query and key head
DEFAULTS = {  # what transformers takes for a key that is not there, by type of model
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128},
}
DEFAULT_THETA = 10000.0
COMPANIONS = (  # files that go along
    "tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt chat_template* "
    "generation_config.json LICENSE*"
).split()
FADE = 40  # a factor of 2^40 makes a 1 invisible
LEAST_EPS = 1e-9  # beside it mean(x^2) vanishes in f32 while the source's q and k are under 5,000
NO_LIMIT = 2.0**100  # of the clamps; no other model has it, so it tells a converted one
INDEX_STD = 0.02  # of the fresh projections; a norm follows them, so only gradients see it


# --- tensors from tensors -------------------------------------------------------------------------


def scaled(source: Tensor, exponent: int) -> Tensor:
    """Times 2^exponent. F16 has no room for that and becomes F32."""
    dtype = "F32" if source.dtype == "F16" else source.dtype
    return Tensor(dtype, source.shape, lambda: (np.ldexp(p, exponent) for p in source.pieces()))


def stacked(top: Tensor, bottom: Tensor) -> Tensor:
    """[n,k] over [m,k] as one [n+m,k]."""

    def pieces() -> Iterator[np.ndarray]:
        yield from top.pieces()
        yield from bottom.pieces()

    dtype = top.dtype if top.dtype == bottom.dtype else "F32"
    return Tensor(dtype, (top.shape[0] + bottom.shape[0], top.shape[1]), pieces)


def constant(value: float, shape: tuple[int, ...]) -> Tensor:
    return Tensor("F32", shape, lambda: iter([np.full(shape, value, np.float32)]))


def one_plus(weight: Tensor, exponent: int) -> Tensor:
    """The weight of a norm in Gemma's form that multiplies by 2^exponent times `weight`."""
    values = np.ldexp(weight.values(), exponent) - np.float32(1)
    return Tensor("F32", weight.shape, lambda: iter([values]))


def undone_norm(eps: float) -> float:
    """The weight of a norm whose output is 2^FADE times its input, where mean(x^2) << eps."""
    return math.ldexp(math.sqrt(np.float32(eps)), FADE) - 1


def room_for_one(weight: np.ndarray) -> int:
    """The least p >= 0 for which `2^p |weight| - 1` is exact in bf16: where 2^p |weight| is between
    1/2 and 256. Weights of less than 2^-8 of the largest may miss that, and are rounded."""
    size = np.abs(weight[weight != 0])
    if size.size == 0:
        return 0
    wanted, most = -math.frexp(size.min())[1], 8 - math.frexp(size.max())[1]
    return max(0, min(wanted, most))


def random_normal(shape: tuple[int, ...], dtype: str, *seeds: int) -> Tensor:
    """A pure function of the seeds."""

    def pieces() -> Iterator[np.ndarray]:
        normal = np.random.default_rng(seeds).standard_normal(shape, np.float32)
        yield normal * np.float32(INDEX_STD)

    return Tensor(dtype, shape, pieces)


# --- configurations -------------------------------------------------------------------------------


def dense_config(config: dict) -> dict:
    """The configuration of a source, checked and complete; RoPE stands in `rope_parameters` alone.

    Refuses by name what M3's layer cannot compute.
    """
    model_type = config.get("model_type")
    if model_type == "qwen2":
        refuse("model_type", model_type, "whose biases of q, k and v have no place in M3's layer")
    if model_type not in list(DEFAULTS):
        refuse("model_type", model_type, "supported are " + ", ".join(DEFAULTS))
    rest = {key: value for key, value in config.items() if key not in ROPE_KEYS}
    made = DEFAULTS[model_type] | rest
    check_fixed(made, FIXED | {"hidden_act": ("silu",)})
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        integer(made, key)
    integer(made, "num_hidden_layers", most=1 << 16)
    heads = made["num_attention_heads"]
    for key, default in (
        ("num_key_value_heads", heads),
        ("head_dim", made["hidden_size"] // heads),
    ):
        if made.get(key) is None:
            made[key] = default
        integer(made, key)
    if heads % made["num_key_value_heads"]:
        least = f"expected a multiple of num_key_value_heads ({made['num_key_value_heads']})"
        refuse("num_attention_heads", heads, least)
    if made["head_dim"] % 2:
        refuse("head_dim", made["head_dim"], "expected an even number")
    eps = positive(made, "rms_norm_eps")
    if eps < LEAST_EPS and model_type not in HEAD_NORMS:
        refuse("rms_norm_eps", eps, f"supported is at least {LEAST_EPS}")
    window = made.get("sliding_window")
    if window is not None and (model_type == "mistral" or made.get("use_sliding_window")):
        refuse("sliding_window", window, "supported is null: full attention in every layer")
    kinds = made.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != FULL for kind in kinds)):
        refuse("layer_types", kinds, "supported is full attention in every layer")
    rope = made["rope_parameters"] = rope_parameters(config, DEFAULT_THETA)
    if rope["partial_rotary_factor"] != 1:
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "supported is 1")
    return made


def converted_config(source: dict, full_attention: list[int], topk: int) -> dict:
    """config.json of the converted model, in the form of transformers' minimax_m3_vl text model.

    source: of `dense_config`.
    """
    layers = source["num_hidden_layers"]
    if wrong := [layer for layer in full_attention if not 0 <= layer < layers]:
        raise InputError(
            f"full attention in layer {wrong[0]}: expected layers from 0 to {layers - 1}"
        )
    if len(set(full_attention)) == layers:
        raise InputError(f"full attention in all {layers} layers: some must be sparse")
    if topk < 1:
        raise InputError(f"topk: got {topk}, expected at least 1")
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps rope_parameters"
    ).split()
    config = {
        "architectures": ["MiniMaxM3VLForCausalLM"],
        "model_type": "minimax_m3_vl_text",
        **{key: source[key] for key in same},
        "dense_intermediate_size": source["intermediate_size"],
        "rotary_dim": source["head_dim"],
        "swiglu_alpha": 1.0,
        "swiglu_limit": NO_LIMIT,
        "layer_types": [FULL if i in full_attention else SPARSE for i in range(layers)],
        "mlp_layer_types": ["dense"] * layers,
        "index_n_heads": source["num_key_value_heads"],
        "index_head_dim": max(128, source["head_dim"]),  # at least as many channels as RoPE turns
        "index_block_size": 128,
        "index_topk_blocks": topk,
        "index_local_blocks": 1,
        "tie_word_embeddings": False,
    }
    for key in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        if key in source:
            config[key] = source[key]
    return config


def layout(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model with dense MLPs, in the order they are written."""
    hidden, inner = config["hidden_size"], config["dense_intermediate_size"]
    dim, index_dim = config["head_dim"], config["index_head_dim"]
    kv_heads = config["num_key_value_heads"]
    q_rows, kv_rows = config["num_attention_heads"] * dim, kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for i, kind in enumerate(config["layer_types"]):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "self_attn.q_norm": (dim,),
            "self_attn.k_norm": (dim,),
        }
        if kind == SPARSE:
            layer |= {
                "self_attn.indexer.q_proj": (kv_heads * index_dim, hidden),
                "self_attn.indexer.k_proj": (index_dim, hidden),
                "self_attn.indexer.q_norm": (index_dim,),
                "self_attn.indexer.k_norm": (index_dim,),
            }
        layer |= {
            "post_attention_layernorm": (hidden,),
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


# --- the conversion -------------------------------------------------------------------------------


def converted_tensors(
    source: Checkpoint, source_config: dict, config: dict, seed: int
) -> dict[str, Tensor]:
    """Every tensor of `layout(config)`, as a function of the source's."""
    shapes = layout(config)
    has_head_norms = source_config["model_type"] in HEAD_NORMS
    inner_by_hidden = config["dense_intermediate_size"], config["hidden_size"]
    out: dict[str, Tensor] = {}

    def matrix(name: str, exponent: int = 0, source_name: str | None = None) -> None:
        out[name] = scaled(source.take(source_name or name, shapes[name]), exponent)

    def norm(name: str) -> int:
        """Adds a norm; returns p of its factor 2^p, which its readers take back."""
        weight = source.take(name, shapes[name])
        exponent = room_for_one(weight.values())
        out[name] = one_plus(weight, exponent)
        return exponent

    matrix("model.embed_tokens.weight")
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        p = norm(layer + "input_layernorm.weight")
        for which, x in enumerate("qk"):
            name = f"{attention}{x}_norm.weight"
            if has_head_norms:
                matrix(f"{attention}{x}_proj.weight", -p)
                out[name] = one_plus(source.take(name, shapes[name]), 0)
            else:
                matrix(f"{attention}{x}_proj.weight", -p - FADE)
                out[name] = constant(undone_norm(config["rms_norm_eps"]), shapes[name])
            if kind == SPARSE:
                name = f"{attention}indexer.{x}_proj.weight"
                dtype = out[f"{attention}{x}_proj.weight"].dtype
                out[name] = random_normal(shapes[name], dtype, seed, i, which)
                name = f"{attention}indexer.{x}_norm.weight"
                out[name] = constant(0, shapes[name])
        matrix(f"{attention}v_proj.weight", -p)
        matrix(f"{attention}o_proj.weight")
        p = norm(layer + "post_attention_layernorm.weight")
        gate, up = (source.take(f"{mlp}{x}_proj.weight", inner_by_hidden) for x in ("gate", "up"))
        out[mlp + "gate_up_proj.weight"] = stacked(scaled(gate, -p), scaled(up, FADE - p))
        matrix(mlp + "down_proj.weight", -FADE)
    p = norm("model.norm.weight")
    tied = source_config.get("tie_word_embeddings") is True
    matrix("lm_head.weight", -p, "model.embed_tokens.weight" if tied else None)

    for name in source:
        idle = name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
        if name not in source.taken and not idle:
            why = "M3's layer has no biases" if name.endswith(".bias") else "unknown"
            raise InputError(f"tensor {name}: {why}")
    return {name: out[name] for name in shapes}


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    full_attention: list[int],
    topk: int = 16,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Writes the directory `output`, which must not exist, from the checkpoint `source`.

    full_attention lists the layers that get no index branch; topk is the number of blocks of 128
    tokens that a query of the others reads; seed makes the index branch. on_progress gets bytes
    written and to be written. Returns the new configuration. Raises InputError, one line, and
    leaves nothing behind.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise InputError(f"{output}: exists already")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such directory")
    with reading(source / "config.json"):
        source_config = dense_config(read_json(source / "config.json"))
    config = converted_config(source_config, full_attention, topk)
    checkpoint = Checkpoint(source)
    tensors = converted_tensors(checkpoint, source_config, config, seed)
    matrices = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) == 2}
    config["dtype"] = "bfloat16" if matrices == {"BF16"} else "float32"

    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    if (free := shutil.disk_usage(output.parent).free) < total:
        raise InputError(f"{output}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with whole_folder(output) as partial:
        write_checkpoint(partial, tensors, on_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for pattern in COMPANIONS:
            for file in source.glob(pattern):
                shutil.copy(file, partial)
    return config


def check(directory: str | os.PathLike) -> dict:
    """Raises InputError unless `directory` holds a whole model of M3's shape with dense MLPs.

    Every tensor that the configuration asks for is there, in a supported dtype, in its shape and
    finite, the index branch of every sparse layer included, and none besides. Returns the
    configuration.
    """
    directory = Path(directory)
    with reading(directory / "config.json"):
        config = m3_config(read_json(directory / "config.json"))
        if SPARSE not in config["layer_types"]:
            refuse("layer_types", config["layer_types"], f"expected {SPARSE} in some layer")
    checkpoint = Checkpoint(directory)
    for name, shape in layout(config).items():
        for _ in checkpoint.take(name, shape).pieces():
            pass
    if extra := sorted(set(checkpoint) - checkpoint.taken):
        raise InputError(f"tensor {extra[0]}: no part of the model that config.json describes")
    return config


# --- the command ----------------------------------------------------------------------------------


def layer_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def draw_progress(done: int, total: int) -> None:
    bar = f"[{'#' * (40 * done // total):40}] {done / 1e9:.1f} of {total / 1e9:.1f} GB"
    print(f"\r{bar}" if done < total else "\r\033[K", end="", file=sys.stderr, flush=True)


def run(arguments: list[str] | None) -> str:
    parser = Parser(
        prog="python -m msa_cpp.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", nargs="?", help="directory with config.json and safetensors")
    add("output", nargs="?", help="directory to make")
    add("--full-attention", metavar="L,L,...", type=layer_list, default=[0, 1, 2],
        help="layers that get no index branch (0,1,2, as in M3)")  # fmt: skip
    add("--topk", type=int, default=16, help="blocks of 128 tokens per query (16)")
    add("--seed", type=int, default=0, help="of the index branch (0)")
    add("--check", metavar="DIR", help="check a converted checkpoint instead")
    add("--quiet", action="store_true", help="no progress bar on the terminal")
    options = parser.parse_args(arguments)
    if options.check is not None:
        if options.source is not None:
            parser.error("--check takes one directory and nothing else")
        config = check(options.check)
        done = f"{options.check} is whole"
    else:
        if options.output is None:
            parser.error("expected SOURCE and OUTPUT, or --check DIR")
        if options.seed < 0:
            parser.error(f"--seed: got {options.seed}, expected at least 0")
        config = convert(
            options.source,
            options.output,
            full_attention=options.full_attention,
            topk=options.topk,
            seed=options.seed,
            **({"on_progress": draw_progress} if sys.stderr.isatty() and not options.quiet else {}),
        )
        done = f"{options.output} written"
    full = [str(i) for i, kind in enumerate(config["layer_types"]) if kind == FULL]
    return (
        f"{done}: {len(config['layer_types'])} layers, full attention in "
        f"{', '.join(full) or 'none'}, an index branch in the others"
    )


def main(arguments: list[str] | None = None) -> int:
    return exit_code("msa_cpp.convert", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
