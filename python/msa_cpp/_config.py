"""What a config.json says, for the converter and the trainer.

Keys are read where transformers reads them, and one that asks for another computation than ours is
refused by name. The C++ reader (src/model/config.cc) does the same, with the mixture of experts and
the released checkpoint's form besides; tests/config_cases.json holds all three to transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import NoReturn

from ._command import InputError

FULL, SPARSE = "full_attention", "minimax_m3_sparse"
SIZES = (
    "vocab_size hidden_size dense_intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads index_n_heads index_head_dim index_block_size index_topk_blocks"
).split()
ROPE_PLACES = ("rope_parameters", "rope_scaling")
ROPE_KEYS = (*ROPE_PLACES, "rope_theta", "partial_rotary_factor")

#: Keys that switch what is fixed here, and the values that say what is computed. Absent and null
#: are fine as well.
FIXED: dict[str, tuple] = {
    "attention_bias": (False,),
    "compression_config": (),
    "is_causal": (True,),
    "mlp_bias": (False,),
    "per_layer_config": ({},),
    "quantization_config": (),
}
M3_FIXED: dict[str, tuple] = FIXED | {
    "attention_output_gate": (False,),
    "hidden_act": ("silu", "swigluoai"),  # both name the MLP of `swiglu_alpha` and `swiglu_limit`
    "n_group": (1,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "qk_norm_type": ("per_head",),
    "scoring_func": ("sigmoid",),
    "swiglu_beta": (1,),
    "tie_word_embeddings": (False,),
    "use_gemma_norm": (True,),
    "use_qk_norm": (True,),
    "use_routing_bias": (True,),
}
INDEX_FIXED = {"sparse_score_type": ("max",), "use_sparse_attention": (True,)}
M3_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "index_local_blocks": 1,
    "index_init_blocks": 0,
}


class ConfigError(InputError):
    """A key that is wrong or not supported; `reading` adds the file."""


@contextmanager
def reading(path: str | PathLike) -> Iterator[None]:
    """Names the file in a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from None


def refuse(key: str, value: object, why: str) -> NoReturn:
    given = json.dumps(value)
    given = given if len(given) <= 60 else given[:60] + "..."
    raise ConfigError(f"{key}: got {given}, {why}")


def integer(config: Mapping, key: str, least: int = 1, most: int = 1 << 24) -> int:
    value = config.get(key)
    if type(value) is not int or not least <= value <= most:
        refuse(key, value, f"expected a whole number from {least} to {most}")
    return value


def positive(config: Mapping, key: str) -> float:
    value = config.get(key)
    if type(value) is bool or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        refuse(key, value, "expected a number > 0")
    return float(value)


def check_fixed(config: Mapping, fixed: Mapping[str, tuple]) -> None:
    for key, served in fixed.items():
        value = config.get(key)
        if value is None:
            continue
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                   for one in served):
            names = " or ".join(map(json.dumps, served))
            refuse(key, value, f"supported is {names}" if served else
                   "supported are plain weights: BF16, F16 or F32")


def rope_parameters(config: Mapping, default_theta: float | None = None) -> dict:
    """rope_type, rope_theta and partial_rotary_factor, as transformers finds them.

    A `rope_scaling` that is not empty replaces `rope_parameters`; what stands in it precedes what
    stands beside it. Only "default", one for all layers, is supported.
    """
    for place in ROPE_PLACES:
        if config.get(place) is not None and not isinstance(config[place], dict):
            refuse(place, config[place], "expected an object")
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    inner = config.get(place) or {}
    for key, value in inner.items():
        if isinstance(value, dict):
            refuse(f"{place}.{key}", value, "supported is one RoPE for all layers")
    kind = "rope_type" if "rope_type" in inner else "type"
    if inner.get(kind, "default") != "default":
        refuse(f"{place}.{kind}", inner[kind], 'supported is "default"')
    values = {"rope_theta": default_theta, "partial_rotary_factor": 1.0}
    if "rope_theta" in config:
        values["rope_theta"] = config["rope_theta"]
    if config.get("partial_rotary_factor") is not None:
        values["partial_rotary_factor"] = config["partial_rotary_factor"]
    values |= {key: inner[key] for key in values if key in inner}
    factor = positive(values, "partial_rotary_factor")
    if factor > 1:
        refuse("partial_rotary_factor", factor, "expected at most 1")
    return {"rope_type": "default", "rope_theta": positive(values, "rope_theta"),
            "partial_rotary_factor": factor}


def m3_config(config: Mapping) -> dict:
    """The configuration of a text model of M3 with dense MLPs, checked and complete.

    Takes the form of transformers' `minimax_m3_vl_text`. Defaults are filled in, RoPE stands in
    `rope_parameters` alone, and `rotary_dim`, which transformers does not read, follows from it.
    Raises ConfigError.
    """
    if config.get("model_type") != "minimax_m3_vl_text":
        refuse("model_type", config.get("model_type"), 'expected "minimax_m3_vl_text"')
    for key in ("text_config", "sparse_attention_config"):
        if config.get(key) is not None:
            refuse(key, config[key], "supported is transformers' form: layer_types, index_topk_"
                   "blocks and the like beside the others")
    check_fixed(config, M3_FIXED)
    if config.get("sliding_window") is not None and config.get("use_sliding_window") is not False:
        refuse("sliding_window", config["sliding_window"], "supported is null: no window")
    made = {key: value for key, value in config.items()
            if key not in ROPE_KEYS and not (key in M3_DEFAULTS and value is None)}
    made = M3_DEFAULTS | made
    for key in SIZES:
        integer(made, key)
    for key in ("rms_norm_eps", "swiglu_alpha", "swiglu_limit"):
        positive(made, key)
    for key, kinds in (("layer_types", (FULL, SPARSE)), ("mlp_layer_types", ("dense",))):
        given = made.get(key)
        if (not isinstance(given, list) or len(given) != made["num_hidden_layers"]
                or any(kind not in kinds for kind in given)):
            refuse(key, given, f"expected {' or '.join(kinds)} for each layer")
    if SPARSE in made["layer_types"]:
        check_fixed(config, INDEX_FIXED)
    heads, groups = made["num_attention_heads"], made["num_key_value_heads"]
    if heads % groups:
        refuse("num_attention_heads", heads, f"expected a multiple of num_key_value_heads "
               f"({groups})")
    if made["index_n_heads"] != groups:
        refuse("index_n_heads", made["index_n_heads"], f"expected {groups}, one per KV head")
    topk = made["index_topk_blocks"]
    forced = [integer(made, f"index_{which}_blocks", least=0) for which in ("init", "local")]
    if sum(forced) > topk:
        refuse("index_topk_blocks", topk, f"expected at least {sum(forced)}, the forced blocks")
    rope = rope_parameters(config)
    size = int(made["head_dim"] * rope["partial_rotary_factor"])
    room = min(made["head_dim"], made["index_head_dim"])
    if size % 2 or size > room:
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], f"which gives {size} "
               f"channels, expected an even number up to {room}, the channels of a head")
    return made | {"rotary_dim": size, "rope_parameters": rope}
