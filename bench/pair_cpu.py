#!/usr/bin/env python3
"""Our dense prefill against torch's scaled_dot_product_attention on the CPU, in interleaved pairs.

Both compute causal attention of the same random q, k, v with the same number of threads. Torch gets
its faster form: grouped heads (enable_gqa) or key/value heads repeated beforehand, untimed. Results
are compared before anything is timed.

    python3 bench/pair_cpu.py --library build/release/src/libmsa.so --json pair.json
"""

import argparse
import ctypes as c
import json
import os
import platform
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

# The package need not be built here.
write_whole = runpy.run_path(
    str(Path(__file__).resolve().parents[1] / "python/msa_cpp/_files.py"))["write_whole"]

DTYPES = {"f32": (0, torch.float32, 2e-5), "bf16": (1, torch.bfloat16, 2e-2)}
I32, DENSE_ATTENTION = 3, 5


def struct(name, fields):
    """A C struct that starts with its own size."""
    return type(name, (c.Structure,), {"_fields_": [("struct_size", c.c_uint32), *fields]})


def make(kind, **values):
    return kind(c.sizeof(kind), **values)


# Mirrors include/msa/c_api.h.
Tensor = struct("Tensor", [
    ("dtype", c.c_int32), ("data", c.c_void_p), ("device_kind", c.c_int32),
    ("device_id", c.c_int32), ("rank", c.c_int32), ("reserved", c.c_int32),
    ("shape", c.c_int64 * 4), ("stride", c.c_int64 * 4)])
TensorPtr = c.POINTER(Tensor)
Batch = struct("Batch", [("non_causal", c.c_int32)] + [
    (name, TensorPtr) for name in ("cu_seqlens_q", "cu_seqlens_k", "seq_lens", "page_table",
                                   "q_offset", "block_offset")])
Problem = struct("Problem", [(name, c.c_int32) for name in (
    "op", "dtype", "layout", "heads_q", "heads_kv", "head_dim", "index_dim", "block_size", "topk",
    "init_blocks", "local_blocks", "device_kind", "device_id")])
Limits = struct("Limits", [("max_threads", c.c_int32)] + [
    (name, c.c_int64) for name in ("max_batch", "max_tokens", "max_seqlen_q", "max_seqlen_k")])
Queue = struct("Queue", [("reserved", c.c_uint32), ("threads", c.c_void_p),
                         ("cuda_stream", c.c_void_p)])
DenseParams = struct("DenseParams", [
    ("softmax_scale", c.c_float), ("q", TensorPtr), ("k", TensorPtr), ("v", TensorPtr),
    ("batch", c.POINTER(Batch)), ("o", TensorPtr), ("lse", TensorPtr), ("block_max", TensorPtr)])


def view(tensor):
    code = {torch.float32: 0, torch.bfloat16: 1, torch.int32: I32}[tensor.dtype]
    quad = c.c_int64 * 4
    return c.pointer(make(Tensor, dtype=code, data=tensor.data_ptr(), device_kind=1,
                          rank=tensor.dim(), shape=quad(*tensor.shape),
                          stride=quad(*tensor.stride())))


class Dense:
    """Our dense attention on fixed tensors, bound once."""

    def __init__(self, library, backend, threads, q, k, v):
        self.library = library
        for name in ("msa_last_error", "msa_plan_backend"):
            getattr(library, name).restype = c.c_char_p
        library.msa_plan_workspace_bytes.restype = c.c_int64
        tokens, heads_q, dim = q.shape
        code = DTYPES["f32" if q.dtype == torch.float32 else "bf16"][0]
        problem = make(Problem, op=DENSE_ATTENTION, dtype=code, heads_q=heads_q,
                       heads_kv=k.shape[1], head_dim=dim, index_dim=dim, block_size=128, topk=16,
                       local_blocks=1, device_kind=1)
        limits = make(Limits, max_threads=threads, max_batch=1, max_tokens=tokens,
                      max_seqlen_q=tokens, max_seqlen_k=tokens)
        self.plan, team = c.c_void_p(), c.c_void_p()
        self.check(library.msa_threads_create(threads, c.byref(team)))
        self.check(library.msa_plan_create(c.byref(problem), c.byref(limits), backend.encode(),
                                           c.byref(self.plan)))
        self.backend = library.msa_plan_backend(self.plan).decode()
        self.bytes = library.msa_plan_workspace_bytes(self.plan)
        self.workspace = torch.empty(self.bytes + 64, dtype=torch.uint8)
        self.o = torch.empty_like(q)
        lengths = torch.tensor([0, tokens], dtype=torch.int32)
        batch = make(Batch, cu_seqlens_q=view(lengths), cu_seqlens_k=view(lengths))
        self.params = make(DenseParams, q=view(q), k=view(k), v=view(v), batch=c.pointer(batch),
                           o=view(self.o))
        self.queue = make(Queue, threads=team)
        self.alive = (q, k, v, lengths)

    def check(self, status):
        if status != 0:
            sys.exit(f"pair_cpu: error: {self.library.msa_last_error().decode()}")

    def __call__(self):
        start = (self.workspace.data_ptr() + 63) // 64 * 64
        self.check(self.library.msa_run_dense_attention(
            self.plan, c.byref(self.params), c.c_void_p(start), c.c_size_t(self.bytes),
            c.byref(self.queue)))
        return self.o


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def torch_calls(q, k, v):
    """Torch's two ways; heads first, as it wants them."""
    q, k, v = (x.transpose(0, 1).contiguous().unsqueeze(0) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return {
        "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                             enable_gqa=True),
        "repeated heads": lambda: F.scaled_dot_product_attention(q, wide_k, wide_v,
                                                                 is_causal=True),
    }


def pair(library, options, dtype, threads):
    _, kind, tolerance = DTYPES[dtype]
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    heads_q, heads_kv, dim, tokens = *options.shape, options.context
    q, k, v = (torch.randn(tokens, heads, dim).to(kind) for heads in (heads_q, heads_kv, heads_kv))
    ours = Dense(library, options.backend, threads, q, k, v)
    calls = torch_calls(q, k, v)

    want = calls["repeated heads"]()[0].transpose(0, 1).float()  # also the warm-up
    error = ((ours().float() - want).abs().max() / want.abs().max()).item()
    if not error <= tolerance:
        sys.exit(f"pair_cpu: error: {dtype} results differ by {error:.2e}, allowed {tolerance}")
    variant = min(calls, key=lambda name: min(seconds_of(calls[name]) for _ in range(2)))

    times = [(seconds_of(ours), seconds_of(calls[variant])) for _ in range(options.pairs)]
    ratios = sorted(theirs / mine for mine, theirs in times)
    mine, theirs = (statistics.median(column) for column in zip(*times))
    flops = 2 * heads_q * dim * tokens * (tokens + 1)
    row = {"op": "dense_attention", "backend": ours.backend, "dtype": dtype, "context": tokens,
           "heads_q": heads_q, "heads_kv": heads_kv, "head_dim": dim, "threads": threads,
           "pairs": len(times), "seconds_median": mine, "torch_seconds_median": theirs,
           "gflops": flops / mine * 1e-9, "torch_gflops": flops / theirs * 1e-9,
           "torch_variant": variant, "ratio_median": statistics.median(ratios),
           "ratio_min": ratios[0], "ratio_max": ratios[-1], "max_error": error}
    print(f"{dtype} {ours.backend}, {tokens} tokens, {threads} threads: "
          f"{row['ratio_median']:.2f}x torch ({ratios[0]:.2f} to {ratios[-1]:.2f}, "
          f"{len(times)} pairs), {row['gflops']:.0f} against {row['torch_gflops']:.0f} GFLOP/s",
          flush=True)
    return row


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=Path("build/release/src/libmsa.so"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--shape", type=lambda s: tuple(map(int, s.split(","))),
                        default=(16, 2, 128), help="HQ,HKV,D")
    parser.add_argument("--dtype", type=lambda s: s.split(","), default=list(DTYPES))
    parser.add_argument("--threads", type=lambda s: list(map(int, s.split(","))), default=[1, 0],
                        help="numbers of threads, 0 = all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.library.exists():
        sys.exit(f"pair_cpu: error: no {options.library}; build the target msa_shared first")
    library = c.CDLL(str(options.library.resolve()))
    counts = sorted({n or len(os.sched_getaffinity(0)) for n in options.threads})
    rows = [pair(library, options, dtype, n) for n in counts for dtype in options.dtype]
    if options.json:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__}
        write_whole(options.json, json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
