#!/usr/bin/env python3
"""Writes the seeds of the fuzzers: small valid inputs, and one broken in each typical way."""

import json
import pathlib
import random
import struct

HERE = pathlib.Path(__file__).parent
CORPUS = HERE / "corpus"
MODEL = HERE.parent.parent / "models" / "code-11m"


def write(target, name, data):
    directory = CORPUS / target
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(data)


def safetensors(tensors, metadata=None):
    """tensors: name -> (dtype, shape, bytes)."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def npy(shape, descr, data, version=1):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    prefix = 10 if version == 1 else 12
    text += b" " * (-(prefix + len(text) + 1) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


rng = random.Random(3)


def f32(*shape):
    count = 1
    for extent in shape:
        count *= extent
    return "F32", list(shape), struct.pack(f"<{count}f", *(rng.gauss(0, 1) for _ in range(count)))


def bf16(*shape):
    dtype, extents, data = f32(*shape)
    pairs = (data[i + 2:i + 4] for i in range(0, len(data), 4))
    return "BF16", extents, b"".join(pairs)


def i32(values, *shape):
    return "I32", list(shape or [len(values)]), struct.pack(f"<{len(values)}i", *values)


def safetensors_seeds():
    good = safetensors({"a": f32(2, 3), "b": bf16(4), "c": i32([1, 2, 3])}, {"format": "pt"})
    write("safetensors", "three", good)
    write("safetensors", "empty", safetensors({}))
    write("safetensors", "scalar", safetensors({"x": f32()}))
    write("safetensors", "i64", safetensors({"x": ("I64", [2], struct.pack("<2q", -1, 1 << 40))}))
    write("safetensors", "truncated", good[:-5])
    write("safetensors", "overlap", good.replace(b"[24,32]", b"[16,24]"))
    write("safetensors", "huge_header", struct.pack("<Q", 1 << 62) + good[8:])
    write("safetensors", "huge_shape", good.replace(b"[2,3]", b"[4611686018427387905,4]"))


def config_seeds():
    model = json.loads((MODEL / "config.json").read_text())
    write("config", "code-11m.json", json.dumps(model).encode())
    released = {"text_config": {
        **{key: model[key] for key in
           ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
           if key in model},
        "num_hidden_layers": 2, "intermediate_size": 64, "dense_intermediate_size": 64,
        "shared_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_layer_freq": [0, 1], "rotary_dim": 64, "rope_theta": 5000000,
        "sparse_attention_config": {
            "sparse_num_index_heads": model.get("num_key_value_heads", 2),
            "sparse_index_dim": 128, "sparse_block_size": 128, "sparse_topk_blocks": 16,
            "sparse_local_block": 1, "sparse_init_block": 0, "sparse_score_type": "max",
            "sparse_attention_freq": [0, 1]}}}
    write("config", "released.json", json.dumps(released).encode())
    for key in ("num_key_value_heads", "head_dim", "layer_types"):
        write("config", f"without_{key}.json",
              json.dumps({k: v for k, v in model.items() if k != key}).encode())
    write("config", "odd_heads.json", json.dumps({**model, "num_attention_heads": 7}).encode())
    write("config", "not_json", b"{\"a\": [1, 2")


def tokens_seeds():
    data = struct.pack("<4i", 0, 255, 17, -1)
    write("tokens", "four.npy", npy("(4,)", "<i4", data))
    write("tokens", "version2.npy", npy("(4,)", "<i4", data, version=2))
    write("tokens", "short.npy", npy("(5,)", "<i4", data))
    write("tokens", "matrix.npy", npy("(2, 2)", "<i4", data))
    write("tokens", "int64.npy", npy("(2,)", "<i8", data))
    write("tokens", "huge.npy", npy("(4611686018427387905,)", "<i4", data))
    write("tokens", "ids.safetensors", safetensors({"ids": i32([5, 6, 7])}))


def attend_seeds():
    def seed(name, flags, tensors):
        write("attend", name, bytes(flags) + safetensors(tensors))

    packed = {"q": f32(6, 4, 8), "k": f32(10, 2, 8), "v": f32(10, 2, 8)}
    index = {"q_idx": f32(6, 2, 8), "k_idx": f32(10, 8)}
    lengths = {"cu_seqlens_q": i32([0, 2, 6]), "cu_seqlens_k": i32([0, 3, 10])}
    pages = {"q": bf16(3, 2, 16), "k": bf16(4, 1, 4, 16), "v": bf16(4, 1, 4, 16),
             "page_table": i32([2, 0, 3, 1], 2, 2), "seq_lens": i32([7, 5]),
             "cu_seqlens_q": i32([0, 1, 3])}
    lists = [rng.choice([[0, 1], [2, 0], [1, -1], [-1, -1]]) for _ in range(2 * 6)]
    ids = {"ids": i32(sum(lists, []), 2, 6, 2)}
    seed("dense", [3, 0, 4, 0, 0, 1, 0, 2], packed | lengths)
    seed("msa", [4, 0, 4, 2, 0, 1, 0, 2], packed | index)
    seed("select", [1, 1, 4, 2, 1, 1, 0, 0], index | lengths)
    seed("sparse", [2, 0, 4, 2, 0, 1, 4, 2], packed | ids)
    seed("paged", [3, 0, 4, 0, 0, 1, 0, 2], pages)
    bad_page = {"page_table": i32([2, 9, 3, 1], 2, 2)}
    seed("paged_bad_page", [3, 1, 4, 0, 0, 1, 0, 0], pages | bad_page)
    seed("unknown_name", [0, 0, 0, 0, 0, 1, 0, 0], {"query": f32(2, 2, 8)})
    no_rows = {"q": f32(0, 2, 8), "k": f32(4, 1, 8), "v": f32(4, 1, 8)}
    seed("no_rows", [3, 0, 4, 0, 0, 1, 0, 0], no_rows)


safetensors_seeds()
config_seeds()
tokens_seeds()
attend_seeds()
