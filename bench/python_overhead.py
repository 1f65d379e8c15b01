#!/usr/bin/env python3
"""What a call from Python costs beyond the same call of the C interface, as JSON rows.

    python3 bench/python_overhead.py --library build/release/src/libmsa.so [--output FILE]

One query over one key (Hq 2, Hkv 1, D 16), one thread: next to no work, so that the call is what
is measured. Rounds of the C call and of each way from Python alternate on one machine; a round's
overhead is the difference of their mean CPU times, and on a machine with other work the difference
of the fastest rounds says more. The C call goes through ctypes, whose own cost, that of a call that
does nothing, is subtracted. With torch, calls through the adapters for serving engines are set
beside the canonical calls they make, in the same way.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["MSA_THREADS"] = "1"
import numpy as np  # noqa: E402

import msa_cpp  # noqa: E402
from shared import ROOT, cpu_name, write_json  # noqa: E402

F32, I32, CPU, SPARSE_ATTENTION = 0, 3, 1, 3  # codes of the C interface
BLOCK = 16


def struct(name, *fields):
    """A struct of include/msa/c_api.h; each starts with its own size."""
    kind = type(name, (ctypes.Structure,), {"_fields_": [("struct_size", ctypes.c_uint32), *(
        (field, of) for of, names in fields for field in names.split())]})
    return ctypes.POINTER(kind), lambda **values: kind(ctypes.sizeof(kind), **values)


INT32, INT64, FOUR = ctypes.c_int32, ctypes.c_int64, ctypes.c_int64 * 4
TensorPointer, make_tensor = struct(
    "Tensor", (INT32, "dtype"), (ctypes.c_void_p, "data"),
    (INT32, "device_kind device_id rank reserved"), (FOUR, "shape stride"))
BatchPointer, make_batch = struct(
    "Batch", (INT32, "non_causal"),
    (TensorPointer, "cu_seqlens_q cu_seqlens_k seq_lens page_table q_offset block_offset"))
_, make_params = struct(
    "Params", (ctypes.c_float, "softmax_scale"), (TensorPointer, "q k v ids"),
    (BatchPointer, "batch"), (TensorPointer, "o lse"))
_, make_problem = struct(
    "Problem", (INT32, "op dtype layout heads_q heads_kv head_dim index_dim block_size topk "
                       "init_blocks local_blocks device_kind device_id"))
_, make_limits = struct(
    "Limits", (INT32, "max_threads"), (INT64, "max_batch max_tokens max_q_len max_kv_len"))


def tensor_of(array):
    return make_tensor(dtype=F32 if array.dtype == np.float32 else I32, data=array.ctypes.data,
                       device_kind=CPU, rank=array.ndim, shape=FOUR(*array.shape),
                       stride=FOUR(*(s // array.itemsize for s in array.strides)))


def c_call(library, q, k, v, ids, lengths, out):
    """(a function that runs sparse_attention through the C interface, one that does nothing)"""
    lib = ctypes.CDLL(library)
    lib.msa_last_error.restype = ctypes.c_char_p
    lib.msa_plan_workspace_bytes.restype = ctypes.c_int64
    problem = make_problem(op=SPARSE_ATTENTION, dtype=F32, heads_q=q.shape[1], heads_kv=k.shape[1],
                           head_dim=q.shape[2], index_dim=128, block_size=BLOCK, topk=ids.shape[2],
                           local_blocks=1, device_kind=CPU)
    limits = make_limits(max_threads=1, max_batch=1, max_tokens=1, max_q_len=1, max_kv_len=1)
    plan = ctypes.c_void_p()
    if lib.msa_plan_create(ctypes.byref(problem), ctypes.byref(limits), b"auto",
                           ctypes.byref(plan)) != 0:
        sys.exit(lib.msa_last_error().decode())
    bytes_needed = lib.msa_plan_workspace_bytes(plan)
    memory = np.zeros(bytes_needed + 64, np.uint8)
    workspace = ctypes.c_void_p(memory.ctypes.data + -memory.ctypes.data % 64)
    names = ("q", "k", "v", "ids", "lengths", "o")
    at = {name: ctypes.pointer(tensor_of(a)) for name, a in
          zip(names, (q, k, v, ids, lengths, out))}
    ends = at.pop("lengths")
    batch = make_batch(cu_seqlens_q=ends, cu_seqlens_k=ends)
    params = make_params(batch=ctypes.pointer(batch), **at)
    arguments = (plan, ctypes.byref(params), workspace, ctypes.c_size_t(bytes_needed), None)
    run, nothing = lib.msa_run_sparse_attention, lib.msa_threads_destroy
    run.keepalive = (memory, at, ends, batch, params)
    if run(*arguments) != 0:
        sys.exit(lib.msa_last_error().decode())
    return lambda: run(*arguments), lambda: nothing(None)


def python_calls(q, k, v, ids, lengths, out):
    """name -> (call, most microseconds that it may cost)"""
    batch = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "block_size": BLOCK}
    calls = {
        "numpy, out given": (lambda: msa_cpp.sparse_attention(q, k, v, ids, out=out, **batch), 15),
        "numpy": (lambda: msa_cpp.sparse_attention(q, k, v, ids, **batch), 15),
    }
    try:
        import torch

        import msa_cpp.torch_ops  # noqa: F401
    except ImportError:
        print("torch is not installed: its rows are left out", file=sys.stderr)
        return calls
    t = [torch.from_numpy(a) for a in (q, k, v, ids)]
    length, result = torch.from_numpy(lengths), torch.from_numpy(out)
    in_torch = {"cu_seqlens_q": length, "cu_seqlens_k": length, "block_size": BLOCK}
    op = torch.ops.msa_cpp.sparse_attention
    return calls | {
        "torch, out given": (lambda: msa_cpp.sparse_attention(*t, out=result, **in_torch), 15),
        "torch": (lambda: msa_cpp.sparse_attention(*t, **in_torch), 15),
        "torch.ops": (lambda: op(*t, length, length, block_size=BLOCK), 40),
    }


def adapter_calls():
    """name -> (call through an adapter, the canonical call): one query over one page."""
    try:
        import torch

        from msa_cpp.compat import fmha_sm100, sglang, vllm
    except ImportError:
        return {}
    q, idx_q = torch.randn(1, 2, 16), torch.randn(1, 1, 16)
    cache, index_cache = torch.randn(1, 1, 128, 32), torch.randn(1, 128, 16)
    table, ids = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    lengths, ends = torch.ones(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    out, k, v = torch.empty_like(q), cache[..., :16], cache[..., 16:]
    batch = dict(cu_seqlens_q=ends, seq_lens=lengths, page_table=table, max_seqlen_k=128)
    slots = cache[:, 0, :, None]  # [1,slots,1,2*D]
    keys, values, tokens = slots[0, ..., :16], slots[0, ..., 16:], torch.arange(128).int()[None]
    request = torch.zeros(1, dtype=torch.int64)
    plan = fmha_sm100.fmha_sm100_plan(lengths, lengths, 2, 1, page_size=128, device="cpu")
    return {
        "sglang, attention": (
            lambda: sglang.flash_decode_with_gqa_share_sparse(
                q, None, keys, values, tokens, lengths, request, 128, ids, page_size=128),
            lambda: msa_cpp.sparse_attention(q, k, v, ids, max_seqlen_q=1, **batch)),
        "fmha_sm100, sparse": (
            lambda: fmha_sm100.fmha_sm100(q, k, v, plan, page_table=table, kv_block_indexes=ids,
                                          out=out),
            lambda: msa_cpp.sparse_attention(q, k, v, ids, max_seqlen_q=1, out=out, **batch)),
        "vllm, index": (
            lambda: vllm.minimax_m3_index_decode(idx_q, index_cache, table, lengths, 128, 1, 0, 1,
                                                 1, 1, 1, out=ids),
            lambda: msa_cpp.index_select(idx_q, index_cache, topk=1, max_seqlen_q=1, out=ids,
                                         **batch)),
        "vllm, attention": (
            lambda: vllm.minimax_m3_sparse_attn_decode(q, cache, ids, table, lengths, 1, 0.25, out,
                                                       1),
            lambda: msa_cpp.sparse_attention(q, k, v, ids, max_seqlen_q=1, softmax_scale=0.25,
                                             out=out, **batch)),
    }


def seconds(call, count):
    """CPU time of this thread, which other programs on the machine do not lengthen."""
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def spread(prefix, values):
    cuts = statistics.quantiles(values, n=10)
    return {f"{prefix}_median": round(statistics.median(values), 3),
            f"{prefix}_p10": round(cuts[0], 3), f"{prefix}_p90": round(cuts[-1], 3)}


def adapter_row(name, through, canonical, args):
    """What an adapter adds; at most 5 us and 5 % of the canonical call."""
    for call in (through, canonical):
        for _ in range(200):
            call()
    pairs = [(1e6 * seconds(through, args.calls), 1e6 * seconds(canonical, args.calls))
             for _ in range(args.rounds)]
    over, base = [a - b for a, b in pairs], [b for _, b in pairs]
    row = {"run": "adapter overhead", "call": name, "clock": "thread CPU time",
           "rounds": args.rounds, "calls_per_round": args.calls,
           "limit_us": round(5 + 0.05 * statistics.median(base), 3),
           **spread("overhead_us", over),
           "overhead_us_of_the_fastest": round(min(a for a, _ in pairs) - min(base), 3),
           **spread("canonical_us", base)}
    print(f"{name:18} {row['overhead_us_median']:6.2f} us over the canonical call "
          f"({row['overhead_us_p10']:.2f} to {row['overhead_us_p90']:.2f}; fastest rounds "
          f"{row['overhead_us_of_the_fastest']:.2f}), limit {row['limit_us']}", file=sys.stderr)
    return row


def commit():
    return subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True,
                          capture_output=True).stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, type=Path, help="libmsa.so of the same build")
    parser.add_argument("--output", type=Path, default="/dev/stdout",
                        help="JSON file (default: standard output)")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--calls", type=int, default=50, help="calls of each kind in a round")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, 16), dtype=np.float32) for h in (2, 1, 1))
    ids, lengths = np.zeros((1, 1, 1), np.int32), np.array([0, 1], np.int32)
    out = np.empty_like(q)
    run, nothing = c_call(str(args.library.resolve()), q, k, v, ids, lengths, out)
    rows = []
    for name, (call, limit) in python_calls(q, k, v, ids, lengths, out).items():
        for _ in range(200):
            call()
        out[:] = 0
        run()
        np.testing.assert_array_equal(out, np.asarray(msa_cpp.sparse_attention(
            q, k, v, ids, cu_seqlens_q=lengths, cu_seqlens_k=lengths, block_size=BLOCK)))
        in_c, in_python = [], []
        for _ in range(args.rounds):
            in_c.append(1e6 * (seconds(run, args.calls) - seconds(nothing, args.calls)))
            in_python.append(1e6 * seconds(call, args.calls))
        over = [p - c for p, c in zip(in_python, in_c)]
        rows.append({"run": "python overhead", "op": "sparse_attention", "call": name,
                     "clock": "thread CPU time", "rounds": args.rounds,
                     "calls_per_round": args.calls, "limit_us": limit,
                     **spread("overhead_us", over),
                     "overhead_us_of_the_fastest": round(min(in_python) - min(in_c), 3),
                     **spread("python_us", in_python), **spread("c_us", in_c)})
        row = rows[-1]
        print(f"{name:18} {row['overhead_us_median']:6.2f} us over C "
              f"({row['overhead_us_p10']:.2f} to {row['overhead_us_p90']:.2f}; fastest rounds "
              f"{row['overhead_us_of_the_fastest']:.2f}), limit {limit}", file=sys.stderr)
    rows += [adapter_row(name, *pair, args) for name, pair in adapter_calls().items()]
    machine = {"cpu": cpu_name(), "cores": os.cpu_count()}
    write_json(args.output, {"machine": machine, "commit": commit(), "rows": rows})


if __name__ == "__main__":
    main()
