#!/usr/bin/env python3
"""Two builds of msa_cpp against each other, in interleaved pairs.

    python3 bench/pair_builds.py --old OLD/python --new build/cuda/python --json pair.json

A process for each build holds the same random data (M3's shape, bf16) and waits for its turn: one
calls, the others are idle. The old build runs twice, so that `old/old` says what two runs of one
build differ by; the order changes every round. A build is faster or slower where the median of
`new/old` leaves that spread.

    index, random, shared   index_select; sparse_attention on random lists, and on lists that
                            neighbouring queries share
    dense                   dense_attention
    backward, kl            the gradients, on shared lists
    decode                  msa_layer_decode, one new token a sequence

A measurement is the mean of the calls that fill --milliseconds, on a GPU by events. --cases names
what is run, as CASE:TOKENS or, for decode, CASE:BATCHxTOKENS.
"""

import argparse
import inspect
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

write_whole = runpy.run_path(
    str(Path(__file__).resolve().parents[1] / "python/msa_cpp/_files.py"))["write_whole"]

CASES = ("index:32768 random:32768 shared:32768 dense:32768 backward:32768 kl:32768 index:131072 "
         "random:131072 shared:131072 decode:8x131072 decode:1x131072")
HEADS, GROUPS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--old", required=True, help="folder with the old build's msa_cpp")
    parser.add_argument("--new", required=True, help="folder with the new one's")
    parser.add_argument("--cases", default=CASES, help=f"what is timed (default: {CASES})")
    parser.add_argument("--rounds", type=int, default=50, help="pairs of each (default: 50)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--milliseconds", type=float, default=20, help="of a measurement")
    parser.add_argument("--json", help="file for all measurements")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---- a process that holds one build


def make_call(case, device):
    """A call without arguments."""
    import msa_cpp
    import torch

    name, _, size = case.partition(":")
    batch, _, tokens = ("1x" + size if "x" not in size else size).partition("x")
    batch, tokens = int(batch), int(tokens)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    def int32(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    if name == "decode":
        pages = -(-tokens // BLOCK)
        q, q_idx = normal(batch, HEADS, DIM), normal(batch, GROUPS, DIM)
        k, v = (normal(batch * pages, GROUPS, BLOCK, DIM) for _ in range(2))
        k_idx, out = normal(batch * pages, BLOCK, DIM), torch.empty_like(q)
        table = torch.randperm(batch * pages, generator=generator, device=device)
        lengths = dict(page_table=table.int().view(batch, pages), max_seqlen_k=tokens,
                       seq_lens=int32(*[tokens] * batch), cu_seqlens_q=int32(*range(batch + 1)))
        decode = getattr(msa_cpp, "msa_layer", None)
        if decode is None:  # builds before 0.2
            decode = msa_cpp.msa_layer_decode
            known = inspect.signature(decode).parameters
            lengths["max_seqlen_q" if "max_seqlen_q" in known else "max_q_len"] = 1
        else:
            lengths["max_seqlen_q"] = 1
        return lambda: decode(q, q_idx, k, v, k_idx, topk=TOPK, out=out, **lengths)

    lengths = dict(cu_seqlens_q=int32(0, tokens), cu_seqlens_k=int32(0, tokens),
                   max_seqlen_q=tokens, max_seqlen_k=tokens)
    if name == "index":
        q_idx, k_idx = normal(tokens, GROUPS, DIM), normal(tokens, DIM)
        return lambda: msa_cpp.index_select(q_idx, k_idx, topk=TOPK, **lengths)

    # Lists by random scores: of each query, or of 32 neighbours, nearer blocks more often.
    own = torch.arange(tokens, device=device) // BLOCK
    run = 1 if name == "random" else 32
    chance = torch.rand(GROUPS, -(-tokens // run), int(own[-1]) + 1, device=device,
                        generator=generator).repeat_interleave(run, 1)[:, :tokens]
    if name != "random":
        distance = own[:, None] - torch.arange(chance.shape[2], device=device)
        chance = chance / (1 + distance.clamp(min=0))
    ids = msa_cpp.select_blocks(chance, TOPK, num_valid_blocks=(own + 1).int())
    del chance
    q, k, v = normal(tokens, HEADS, DIM), normal(tokens, GROUPS, DIM), normal(tokens, GROUPS, DIM)
    out = torch.empty_like(q)
    if name == "dense":
        return lambda: msa_cpp.dense_attention(q, k, v, out=out, **lengths)
    if name in ("random", "shared"):
        return lambda: msa_cpp.sparse_attention(q, k, v, ids, out=out, **lengths)
    o, lse = msa_cpp.sparse_attention(q, k, v, ids, return_lse=True, **lengths)
    if name == "backward":
        d_o = normal(tokens, HEADS, DIM)
        return lambda: msa_cpp.sparse_attention_backward(q, k, v, ids, o, lse, d_o, **lengths)
    if name == "kl":
        q_idx, k_idx = normal(tokens, GROUPS, DIM), normal(tokens, DIM)
        index_lse = msa_cpp.index_lse(q_idx, k_idx, ids, **lengths)
        return lambda: msa_cpp.kl_backward(q, k, lse, q_idx, k_idx, index_lse, ids, **lengths)
    sys.exit(f"pair_builds: error: --cases: got \"{case}\", expected a case of --help")


def work(device):
    """Reads cases and numbers of calls, a line each; answers with seconds. 0 calls: a new case,
    which is made and called once."""
    import torch

    def seconds(call, calls):
        if device == "cpu":
            began = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - began) / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # so that the GPU has work while the CPU queues the rest
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls

    call = None
    for line in sys.stdin:
        case, _, calls = line.strip().partition(" ")
        if calls == "0":
            call = None
            if device == "cuda":
                torch.cuda.empty_cache()
            call = make_call(case, device)
            call()
            if device == "cuda" and case.startswith("decode"):  # without the host's share
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                call = graph.replay
        print(seconds(call, max(1, int(calls))), flush=True)


# ---- the comparison


def ask(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"pair_builds: error: a process ended at \"{line}\"")
    return float(answer)


def start(folder, device):
    if not (Path(folder) / "msa_cpp").is_dir():
        sys.exit(f"pair_builds: error: no msa_cpp in {folder}")
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", "--old", "-", "--new", "-", "--device", device],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(Path(folder).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def percentiles(values):
    ordered = sorted(values)
    pick = lambda share: ordered[round(share * (len(ordered) - 1))]
    return statistics.median(ordered), pick(0.1), pick(0.9)


def main():
    o = parse()
    if o.worker:
        return work(o.device)
    processes = {"old": start(o.old, o.device), "again": start(o.old, o.device),
                 "new": start(o.new, o.device)}
    rows = []
    print(f"{'case':<18} {'old':>10} {'new':>10}   new/old (10th to 90th)       old/old")
    for case in o.cases.split():
        once = max(ask(process, f"{case} 0") for process in processes.values())
        calls = max(1, round(o.milliseconds / 1e3 / once))
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
        write_whole(o.json, json.dumps({"rounds": o.rounds, "rows": rows}, indent=1) + "\n")
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
