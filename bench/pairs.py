#!/usr/bin/env python3
"""Two builds of msa_cpp against each other, or torch and a build, in interleaved pairs.

    python3 bench/pairs.py --old OLD/python --new build/cuda/python --json pair.json
    python3 bench/pairs.py --old torch --new build/release/python --device cpu --dtype f32 \\
        --shape 16,2 --cases dense:8192

A process for each side holds the same random data and waits for its turn: one calls, the others
are idle. The old side runs twice, so that `old/old` says what two runs of the same differ by; the
order changes every round. A side is faster or slower where the median of `new/old` leaves that
spread. Torch has dense attention alone, in its faster form: grouped heads (enable_gqa), or key and
value heads repeated beforehand, untimed. Attention on given lists and dense attention are compared
before they are timed.

    index, random, shared   index_select; sparse_attention on random lists, and on lists that
                            neighbouring queries share
    dense                   dense_attention
    backward, kl            the gradients, on shared lists
    decode                  msa_layer, one new token a sequence

A measurement is the mean of the calls that fill --milliseconds, on a GPU by events. --cases names
what is run, as CASE:TOKENS or, for decode, CASE:BATCHxTOKENS.
"""

import argparse
import inspect
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import write_json

CASES = ("index:32768 random:32768 shared:32768 dense:32768 backward:32768 kl:32768 index:131072 "
         "random:131072 shared:131072 decode:8x131072 decode:1x131072")
DIM, BLOCK, TOPK = 128, 128, 16
COMPARED = ("random", "shared", "dense")
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2}  # of the largest element


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--old", required=True, help="folder of the old build's msa_cpp, or torch")
    parser.add_argument("--new", required=True, help="folder with the new one's")
    parser.add_argument("--cases", default=CASES, help=f"what is timed (default: {CASES})")
    parser.add_argument("--rounds", type=int, default=50, help="pairs of each (default: 50)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bf16", choices=TOLERANCE)
    parser.add_argument("--shape", default="64,4", help="query and KV heads (default: 64,4, M3's)")
    parser.add_argument("--threads", type=int, help="on the CPU (default: all)")
    parser.add_argument("--milliseconds", type=float, default=20, help="of a measurement")
    parser.add_argument("--json", help="file for all measurements")
    parser.add_argument("--worker", metavar="SIDE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---- a process that holds one side


def faster_of_torch(q, k, v):
    """scaled_dot_product_attention of [T,H,D], heads first, as torch wants them."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (x.transpose(0, 1).contiguous()[None] for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    forms = [lambda: attend(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1),
             lambda: attend(q, wide_k, wide_v, is_causal=True)[0].transpose(0, 1)]
    for form in forms:
        form()
    return min(forms, key=lambda form: min(seconds(form, 1, q.device.type) for _ in range(2)))


def make_call(case, o):
    """A call without arguments."""
    import torch

    device, dtype = o.device, {"f32": torch.float32, "bf16": torch.bfloat16}[o.dtype]
    heads, groups = map(int, o.shape.split(","))
    name, _, size = case.partition(":")
    batch, _, tokens = ("1x" + size if "x" not in size else size).partition("x")
    batch, tokens = int(batch), int(tokens)
    generator = torch.Generator(device).manual_seed(0)
    threads = o.threads or len(os.sched_getaffinity(0))

    def normal(*shape):
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def int32(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    def rows():
        return normal(tokens, heads, DIM), normal(tokens, groups, DIM), normal(tokens, groups, DIM)

    if o.worker == "torch":
        if name != "dense":
            sys.exit(f"pairs: error: --cases: got \"{case}\", torch has dense alone")
        torch.set_num_threads(threads)
        return faster_of_torch(*rows())

    import msa_cpp

    msa_cpp.set_num_threads(threads)
    if name == "decode":
        pages = -(-tokens // BLOCK)
        q, q_idx = normal(batch, heads, DIM), normal(batch, groups, DIM)
        k, v = (normal(batch * pages, groups, BLOCK, DIM) for _ in range(2))
        k_idx, out = normal(batch * pages, BLOCK, DIM), torch.empty_like(q)
        table = torch.randperm(batch * pages, generator=generator, device=device)
        lengths = dict(page_table=table.int().view(batch, pages), max_seqlen_k=tokens,
                       seq_lens=int32(*[tokens] * batch), cu_seqlens_q=int32(*range(batch + 1)))
        layer = getattr(msa_cpp, "msa_layer", None) or msa_cpp.msa_layer_decode  # before 0.2
        known = inspect.signature(layer).parameters
        old = "max_q_len" in known and "max_seqlen_q" not in known
        lengths["max_q_len" if old else "max_seqlen_q"] = 1
        return lambda: layer(q, q_idx, k, v, k_idx, topk=TOPK, out=out, **lengths)

    lengths = dict(cu_seqlens_q=int32(0, tokens), cu_seqlens_k=int32(0, tokens),
                   max_seqlen_q=tokens, max_seqlen_k=tokens)
    if name == "index":
        q_idx, k_idx = normal(tokens, groups, DIM), normal(tokens, DIM)
        return lambda: msa_cpp.index_select(q_idx, k_idx, topk=TOPK, **lengths)

    q, k, v = rows()
    out = torch.empty_like(q)
    if name == "dense":
        return lambda: msa_cpp.dense_attention(q, k, v, out=out, **lengths)

    # Lists by random scores: of each query, or of 32 neighbours, nearer blocks more often.
    own = torch.arange(tokens, device=device) // BLOCK
    run = 1 if name == "random" else 32
    chance = torch.rand(groups, -(-tokens // run), int(own[-1]) + 1, device=device,
                        generator=generator).repeat_interleave(run, 1)[:, :tokens]
    if name != "random":
        distance = own[:, None] - torch.arange(chance.shape[2], device=device)
        chance = chance / (1 + distance.clamp(min=0))
    ids = msa_cpp.select_blocks(chance, TOPK, num_valid_blocks=(own + 1).int())
    del chance
    if name in ("random", "shared"):
        return lambda: msa_cpp.sparse_attention(q, k, v, ids, out=out, **lengths)
    o, lse = msa_cpp.sparse_attention(q, k, v, ids, return_lse=True, **lengths)
    if name == "backward":
        d_o = normal(tokens, heads, DIM)
        return lambda: msa_cpp.sparse_attention_backward(q, k, v, ids, o, lse, d_o, **lengths)
    if name == "kl":
        q_idx, k_idx = normal(tokens, groups, DIM), normal(tokens, DIM)
        index_lse = msa_cpp.index_lse(q_idx, k_idx, ids, **lengths)
        return lambda: msa_cpp.kl_backward(q, k, lse, q_idx, k_idx, index_lse, ids, **lengths)
    sys.exit(f"pairs: error: --cases: got \"{case}\", expected a case of --help")


def seconds(call, calls, device):
    """Of one call; on a GPU by events."""
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()  # so that the GPU has work while the CPU queues the rest
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def work(o):
    """Reads cases and numbers of calls, a line each; answers with seconds. 0 calls: a new case,
    which is made and called once, and leaves some rows of its output in the file that follows."""
    import torch

    call = None
    for line in sys.stdin:
        case, calls, *file = line.split()
        if calls == "0":
            call = None
            if o.device == "cuda":
                torch.cuda.empty_cache()
            call = make_call(case, o)
            out = call()
            if case.partition(":")[0] in COMPARED:
                torch.save(out[::-(-len(out) // 64)].float().cpu(), *file)
            if o.device == "cuda" and case.startswith("decode"):  # without the host's share
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                call = graph.replay
        print(seconds(call, max(1, int(calls)), o.device), flush=True)


# ---- the comparison


def ask(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"pairs: error: a process ended at \"{line}\"")
    return float(answer)


def start(folder, o):
    if folder != "torch" and not (Path(folder) / "msa_cpp").is_dir():
        sys.exit(f"pairs: error: no msa_cpp in {folder}")
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", folder, "--old", "-", "--new", "-", "--device",
         o.device, "--dtype", o.dtype, "--shape", o.shape, "--threads", str(o.threads or 0)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(Path(folder).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def begin(processes, case, dtype):
    """Makes a case on all sides: the seconds of a call. Ends where what they compute differs."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in processes}
        once = max(ask(process, f"{case} 0 {files[name]}") for name, process in processes.items())
        if files["new"].exists():
            import torch

            old, new = torch.load(files["old"]), torch.load(files["new"])
            error = ((new - old).abs().max() / old.abs().max()).item()
            if not error <= TOLERANCE[dtype]:
                sys.exit(f"pairs: error: {case}: results differ by {error:.1e}, allowed "
                         f"{TOLERANCE[dtype]:.0e}")
    return once


def percentiles(values):
    ordered = sorted(values)
    pick = lambda share: ordered[round(share * (len(ordered) - 1))]
    return statistics.median(ordered), pick(0.1), pick(0.9)


def main():
    o = parse()
    if o.worker:
        return work(o)
    processes = {"old": start(o.old, o), "again": start(o.old, o), "new": start(o.new, o)}
    rows = []
    print(f"{'case':<18} {'old':>10} {'new':>10}   new/old (10th to 90th)       old/old")
    for case in o.cases.split():
        calls = max(1, round(o.milliseconds / 1e3 / begin(processes, case, o.dtype)))
        for process in processes.values():
            ask(process, f"{case} {calls}")
        times = {name: [] for name in processes}
        names = list(processes)
        for turn in range(o.rounds):
            for name in names[turn % 3:] + names[:turn % 3]:
                times[name].append(ask(processes[name], f"{case} {calls}"))
        new = percentiles([n / p for n, p in zip(times["new"], times["old"])])
        old = percentiles([n / p for n, p in zip(times["again"], times["old"])])
        rows.append({"case": case, "calls": calls, "times": times, "new/old": new, "old/old": old})
        medians = [statistics.median(times[name]) * 1e3 for name in ("old", "new")]
        print(f"{case:<18} {medians[0]:>7.4f} ms {medians[1]:>7.4f} ms   "
              f"{new[0]:.4f} ({new[1]:.4f} to {new[2]:.4f})   "
              f"{old[0]:.4f} ({old[1]:.4f} to {old[2]:.4f})", flush=True)
    if o.json:
        write_json(o.json, {"rounds": o.rounds, "rows": rows})
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
