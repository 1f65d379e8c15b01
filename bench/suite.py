#!/usr/bin/env python3
"""The CPU's measurements of docs/results.md, in one run and one JSON file.

    python3 bench/suite.py --msa build/release/msa --output bench/results/NAME.json

takes half an hour on 2 cores, 8 minutes on 16. Block lists come from the trained model in
models/code-11m, traced at the longest context. Every row of `msa bench` checks its result before it
is timed; ratios are of interleaved rounds. `--pairs build/release/python` adds torch's attention
beside ours (bench/pairs.py; needs torch).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import ROOT, write_json

MODEL = Path("models/code-11m")  # commands run in ROOT
PREFILL = "--op dense_attention,msa,index_select,sparse_attention --context 32768"
LAYER = "--op dense_attention,msa --context 32768"
GROWTH = [8192, 16384, 32768, 65536, 131072]


def plan(longest):
    """{name: arguments of msa bench}; TRACE stands for the file of a trace"""
    growth = ",".join(str(n) for n in GROWTH if n <= longest)
    runs = {
        "prefill 32K": f"{PREFILL} --selection TRACE --repeats 5",
        "prefill 32K, bf16": f"{PREFILL} --dtype bf16 --selection TRACE --repeats 5",
        "prefill 32K, random ids": f"{LAYER} --selection random --repeats 5",
        "prefill 32K, M3": f"{LAYER} --shape m3 --selection TRACE --repeats 3",
        "prefill 32K, 16/1": f"{LAYER} --shape 16,1,128,128,16 --selection TRACE --repeats 5",
        "prefill 32K, 8/1": f"{LAYER} --shape 8,1,128,128,16 --selection TRACE --repeats 5",
        "decode 128K": "--op dense_attention,msa,index_select,sparse_attention --context 131072 "
                       "--new-tokens 1 --repeats 50",
        "growth": f"--op index_select,sparse_attention --context {growth} --selection TRACE "
                  "--repeats 3",
    }
    if longest >= 131072:
        runs["prefill 128K"] = ("--op dense_attention,msa --context 131072 --selection TRACE "
                                "--repeats 3")
    return runs


def pair_with_torch(run, folder, rows):
    """Dense prefill at 8K of the shape of code-11m: a row for each dtype and number of threads."""
    heads_q, heads_kv, dim, tokens = 16, 2, 128, 8192
    flops = 2 * heads_q * dim * tokens * (tokens + 1)
    backends = {row["dtype"]: row["backend"] for row in rows if row["op"] == "dense_attention"}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        for dtype, backend in backends.items():
            (row,) = run(sys.executable, "bench/pairs.py", "--old", "torch", "--new", folder,
                         "--device", "cpu", "--dtype", dtype, "--shape", f"{heads_q},{heads_kv}",
                         "--threads", threads, "--cases", f"dense:{tokens}", "--rounds", 5)["rows"]
            ours, theirs = (sorted(row["times"][name]) for name in ("new", "old"))
            ratios = sorted(t / o for t, o in zip(row["times"]["old"], row["times"]["new"]))
            yield {"op": "dense_attention", "backend": backend, "dtype": dtype, "context": tokens,
                   "heads_q": heads_q, "heads_kv": heads_kv, "head_dim": dim, "threads": threads,
                   "pairs": len(ratios), "seconds_median": ours[len(ours) // 2],
                   "torch_seconds_median": theirs[len(theirs) // 2],
                   "gflops": flops / ours[len(ours) // 2] * 1e-9,
                   "torch_gflops": flops / theirs[len(theirs) // 2] * 1e-9,
                   "ratio_median": ratios[len(ratios) // 2], "ratio_min": ratios[0],
                   "ratio_max": ratios[-1]}


def measure(args):
    folder = Path(tempfile.mkdtemp(prefix="msa-suite-"))
    text = ["--model", MODEL, "--text", MODEL / "sample.txt"]

    def run(*words):
        out = folder / "out.json"
        subprocess.run([str(word) for word in words] + ["--json", str(out)], check=True, cwd=ROOT)
        return json.loads(out.read_text())

    result = {"rows": [], "evals": [], "pairs": []}
    result["evals"].append(run(args.msa, "eval", *text, "--context", 16384))
    trace = str(folder / "trace.safetensors")
    run(args.msa, "eval", *text, "--context", args.longest, "--attention", "msa", "--trace", trace)
    for name, words in plan(args.longest).items():
        print(f"\n{name}", flush=True)
        part = run(args.msa, "bench", *words.replace("TRACE", trace).split())
        for row in part["rows"]:
            row["selection"] = "code-11m" if row["selection"] == trace else row["selection"]
            result["rows"].append({"run": name, **row})
        result.setdefault("machine", part["machine"])
        result["machine"]["peak_gflops"].update(part["machine"]["peak_gflops"])
        result["commit"] = part["commit"]
        write_json(args.output, result)
    if args.pairs:
        result["pairs"] = list(pair_with_torch(run, args.pairs, result["rows"]))
        write_json(args.output, result)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--msa", type=Path, default=ROOT / "build/release/msa")
    parser.add_argument("--longest", type=int, default=131072,
                        help="longest context; 32768 is quick")
    parser.add_argument("--pairs", type=Path, metavar="FOLDER",
                        help="also against torch: the folder with msa_cpp")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.msa, args.output = args.msa.resolve(), args.output.resolve()
    args.pairs = args.pairs and args.pairs.resolve()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    measure(args)


if __name__ == "__main__":
    main()
