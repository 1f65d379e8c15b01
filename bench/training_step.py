#!/usr/bin/env python3
"""One layer's training step: MSA forward and backward beside dense attention of torch.

    python3 bench/training_step.py --device cuda --tokens 32768 --json training_step.json
    python3 bench/training_step.py --tokens 512 --block-size 16     small, on the CPU

A step is what autograd does of the layer: attention forward, and the gradients of q, k and v. In
MSA's there are also the selection, the KL loss and the gradients of the index branch.

    sparse    selection by the index branch, sparse attention, KL over the selected blocks
    lists     the same on given lists: the local block and K - 1 random ones, chosen by --locality
              near the query, so that neighbouring queries share blocks as in a trained model
    warm-up   full attention in both branches, KL over all visible tokens
    dense     scaled_dot_product_attention, by each backend of torch that takes it

The sides are compared before anything is timed: `warm-up` must give what `dense` gives. Then rounds
of all, one after the other; seconds are those of CUDA events, or the clock's on a CPU.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import msa_cpp
from msa_cpp._command import device_here
from msa_cpp.autograd import MsaConfig, attend, readers
from msa_cpp.torch_ops import index_kl
from shared import cpu_name, write_json

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
        "math": SDPBackend.MATH}


def inputs(o):
    """q, k, v, q_idx, k_idx that require gradients, and the gradient of the output."""
    generator = torch.Generator().manual_seed(o.seed)
    shapes = [(o.tokens, o.heads, o.dim), *[(o.tokens, o.groups, o.dim)] * 2,
              (o.tokens, o.groups, o.dim), (o.tokens, o.dim)]
    make = lambda s: torch.randn(s, generator=generator).to(o.device, DTYPES[o.dtype])
    return [make(s).requires_grad_() for s in shapes], make(shapes[0])


def local_lists(o):
    """int32 [Hkv,T,K]: a query's own block and others below it, nearer ones more often; a run of
    --run queries has the same."""
    generator = torch.Generator(o.device).manual_seed(o.seed)
    own = torch.arange(o.tokens, device=o.device) // o.block_size
    blocks = int(own[-1]) + 1
    runs = -(-o.tokens // o.run)
    chance = torch.rand(o.groups, runs, blocks, device=o.device, generator=generator)
    chance = chance.repeat_interleave(o.run, 1)[:, :o.tokens]
    distance = own[:, None] - torch.arange(blocks, device=o.device)
    scores = chance / (1 + distance.clamp(min=0)) ** o.locality
    return msa_cpp.select_blocks(scores, o.topk, num_valid_blocks=(own + 1).int())


def msa_step(xs, dout, ends, config, o):
    out, kl = msa_cpp.msa_attention(*xs, **vars(config), cu_seqlens_q=ends, cu_seqlens_k=ends,
                                    max_seqlen_q=o.tokens, max_seqlen_k=o.tokens, return_kl=True)
    return out, torch.autograd.grad((out, kl), xs, (dout, torch.ones_like(kl)))


def lists_step(xs, dout, ends, config, o, ids):
    q, k, v, q_idx, k_idx = xs
    inverse = readers(ids, ends, len(k), config, max_seqlen=o.tokens)
    out, lse = attend(q, k, v, ids, ends, config, inverse, max_seqlen=o.tokens)
    kl, _, _ = index_kl(q.detach(), k.detach(), lse, q_idx, k_idx, ids, ends, ends,
                        config.block_size, None, *inverse, max_seqlen_q=o.tokens,
                        max_seqlen_k=o.tokens)
    return out, torch.autograd.grad((out, kl), xs, (dout, torch.ones_like(kl)))


def dense_step(xs, dout, backend):
    """xs: q, k and v, whose rows are taken as [1,H,T,D]: views, no copies."""
    q, k, v = (x.transpose(0, 1)[None] for x in xs)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                             enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1), torch.autograd.grad(out, xs, dout.transpose(0, 1)[None])


def sides(o):
    """{name: a step} of all that run here, and why others do not."""
    xs, dout = inputs(o)
    ends = torch.tensor([0, o.tokens], dtype=torch.int32, device=o.device)
    sparse = MsaConfig(block_size=o.block_size, topk=o.topk)
    warmup, ids = MsaConfig(block_size=o.block_size, topk=None), local_lists(o)
    steps = {"sparse": lambda: msa_step(xs, dout, ends, sparse, o),
             "lists": lambda: lists_step(xs, dout, ends, sparse, o, ids),
             "warm-up": lambda: msa_step(xs, dout, ends, warmup, o)}
    missing = {}
    repeated = [xs[0], *(x.detach().repeat_interleave(o.heads // o.groups, 1).requires_grad_()
                         for x in xs[1:3])]
    for name, backend in SDPA.items():
        if name == "math" and o.device != "cpu":
            continue  # a matrix of all scores
        for label, given in ((name, xs[:3]), (f"{name}, a key head per query head", repeated)):
            step = lambda given=given, backend=backend: dense_step(given, dout, backend)
            try:
                step()
            except RuntimeError as error:
                missing[f"dense {label}"] = str(error).partition("\n")[0]
            else:
                steps[f"dense {label}"] = step
                break
    return steps, missing


def check(steps, o):
    """{name: relative errors of out, dq, dk, dv} of dense sides and the warm-up."""
    ours, gradients = steps["warm-up"]()
    found = {}
    for name in steps:
        if name.startswith("dense"):
            theirs = [(a.detach().float(), b.detach().float()) for a, b in zip(
                (ours, *gradients), (lambda out, made: (out, *made))(*steps[name]()))]
            theirs = [(a, b if a.shape == b.shape else
                       b.unflatten(1, (o.groups, -1)).sum(2)) for a, b in theirs]
            found[name] = [float((a - b).norm() / b.norm()) for a, b in theirs]
            if not max(found[name]) < {"f32": 1e-4, "bf16": 2e-2}[o.dtype]:
                sys.exit(f"training_step: error: warm-up differs from {name}: {found[name]}")
    return found


def seconds(step, device):
    if device == "cpu":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", type=device_here, default="cpu", help="cpu or cuda")
    add("--dtype", choices=DTYPES, help="bf16 on cuda, f32 on the CPU")
    add("--tokens", type=int, default=32768)
    add("--heads", type=int, default=16)
    add("--groups", type=int, default=2, help="KV heads")
    add("--dim", type=int, default=128, help="of a head, in both branches")
    add("--block-size", type=int, default=128)
    add("--topk", type=int, default=16)
    add("--locality", type=float, default=1.0, help="chances of a block fall with this power")
    add("--run", type=int, default=8, help="neighbouring queries with one list")
    add("--rounds", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--json", type=Path)
    o = parser.parse_args()
    o.dtype = o.dtype or ("f32" if o.device == "cpu" else "bf16")
    steps, missing = sides(o)
    errors = check(steps, o)
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in range(o.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, o.device))
    rows = {name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
            for name, t in times.items()}
    fastest = min((n for n in rows if n.startswith("dense")), key=lambda n: rows[n]["median"],
                  default=None)
    for name, row in rows.items():
        ratio = rows[fastest]["median"] / row["median"] if fastest else float("nan")
        row["times_faster_than_dense"] = ratio
        print(f"{name:12} {1e3 * row['median']:9.3f} ms ({1e3 * row['min']:.3f} to "
              f"{1e3 * row['max']:.3f}), {ratio:.2f}x {fastest}")
    for name, why in missing.items():
        print(f"{name}: not run: {why}")
    if o.json:
        where = cpu_name() if o.device == "cpu" else torch.cuda.get_device_name()
        settings = {k: v for k, v in vars(o).items() if k != "json"}
        write_json(o.json, {
            "machine": {"device": where, "cores": os.cpu_count(), "torch": torch.__version__,
                        "msa_cpp": msa_cpp.__version__},
            "settings": settings, "errors": errors, "missing": missing, "seconds": rows})


if __name__ == "__main__":
    main()
