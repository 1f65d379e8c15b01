#!/usr/bin/env python3
"""The measurements behind README's table, in one run and one JSON file.

    python3 bench/suite.py --msa build/release/msa --library build/release/src/libmsa.so \\
        --output bench/results/NAME.json            measures (half an hour on 2 cores, 8 minutes on 16)
    python3 bench/suite.py --table bench/results/NAME.json      prints the table

Block lists come from the trained model in models/code-11m, traced at the longest context. Every row of `msa bench`
checks its result before it is timed; ratios are of interleaved rounds. --pairs adds torch's attention
(bench/pair_cpu.py; needs torch).
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The package need not be built here.
write_whole = runpy.run_path(str(ROOT / "python/msa_cpp/_files.py"))["write_whole"]
MODEL = Path("models/code-11m")  # commands run in ROOT
PREFILL = "dense_attention,msa,index_select,sparse_attention"
GROWTH = [8192, 16384, 32768, 65536, 131072]


def plan(longest, trace):
    """(name, arguments of msa bench)"""
    real, several = ["--selection", trace], ["--repeats", "5"]
    runs = [
        ("prefill 32K", ["--op", PREFILL, "--context", "32768", *real, *several]),
        ("prefill 32K, bf16", ["--op", PREFILL, "--context", "32768", "--dtype", "bf16", *real, *several]),
        ("prefill 32K, random ids", ["--op", "dense_attention,msa", "--context", "32768", "--selection", "random",
                                     *several]),
        ("prefill 32K, M3", ["--op", "dense_attention,msa", "--context", "32768", "--shape", "m3", *real,
                             "--repeats", "3"]),
        ("prefill 32K, 16/1", ["--op", "dense_attention,msa", "--context", "32768", "--shape", "16,1,128,128,16",
                               *real, *several]),
        ("prefill 32K, 8/1", ["--op", "dense_attention,msa", "--context", "32768", "--shape", "8,1,128,128,16",
                              *real, *several]),
        ("decode 128K", ["--op", "dense_attention,msa,index_select,sparse_attention", "--context", "131072",
                         "--new-tokens", "1", "--repeats", "50"]),
        ("growth", ["--op", "index_select,sparse_attention", "--repeats", "3", *real,
                    "--context", ",".join(str(n) for n in GROWTH if n <= longest)]),
    ]
    if longest >= 131072:
        runs.append(("prefill 128K", ["--op", "dense_attention,msa", "--context", "131072", *real, "--repeats", "3"]))
    return runs


def save(result, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, json.dumps(result, indent=1) + "\n")


def measure(args):
    folder = Path(tempfile.mkdtemp(prefix="msa-suite-"))
    text = ["--model", str(MODEL), "--text", str(MODEL / "sample.txt")]

    def run(*words):
        out = folder / "out.json"
        subprocess.run([str(word) for word in words] + ["--json", str(out)], check=True, cwd=ROOT)
        return json.loads(out.read_text())

    result = {"rows": [], "evals": [], "pairs": []}
    result["evals"].append(run(args.msa, "eval", *text, "--context", 16384))
    trace = folder / "trace.safetensors"
    run(args.msa, "eval", *text, "--context", args.longest, "--attention", "msa", "--trace", trace)
    for name, words in plan(args.longest, str(trace)):
        print(f"\n{name}", flush=True)
        part = run(args.msa, "bench", *words)
        for row in part["rows"]:
            row["selection"] = "code-11m" if row["selection"] == str(trace) else row["selection"]
            result["rows"].append({"run": name, **row})
        result.setdefault("machine", part["machine"])
        result["machine"]["peak_gflops"].update(part["machine"]["peak_gflops"])
        result["commit"] = part["commit"]
        save(result, args.output)
    if args.pairs:
        result["pairs"] = run(sys.executable, "bench/pair_cpu.py", "--library", args.library)["rows"]
        save(result, args.output)


def seconds(value):
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def spread(row):
    return f"{seconds(row['seconds_median'])} ({seconds(row['seconds_p10'])} to {seconds(row['seconds_p90'])})"


def table(result):
    machine = result["machine"]
    peaks = ", ".join(f"{name} {peak:,.0f} GFLOP/s" for name, peak in machine["peak_gflops"].items())
    print(f"{machine['cpu']}, {machine['cores']} cores, commit {result['commit']}; measured ceilings: {peaks}, "
          f"read {machine['read_gbps']:.0f} GB/s. Median (10th to 90th percentile).\n")
    print("| run | operator | backend | time | of the ceiling | faster than dense |\n|---|---|---|---|---|---|")
    for row in result["rows"]:
        if row["run"] == "growth":
            continue
        ratio = row.get("ratio_to_dense")
        faster = f"{ratio['median']:.2f}x" if ratio else ""
        print(f"| {row['run']} | {row['op']} | {row['backend']} | {spread(row)} | {row['ceiling_fraction']:.0%} | "
              f"{faster} |")
    growth = {(row["op"], row["context"]): row for row in result["rows"] if row["run"] == "growth"}
    if growth:
        print("\n| context | index, us per token | sparse attention, us per token |\n|---|---|---|")
    for context in sorted({context for _, context in growth}):
        cells = [growth[op, context]["seconds_median"] / context * 1e6 for op in ("index_select", "sparse_attention")]
        print(f"| {context} | {cells[0]:.2f} | {cells[1]:.2f} |")
    if result["pairs"]:
        print("\n| dense prefill at 8K against torch | threads | ours | torch | ratio (range of the pairs) |")
        print("|---|---|---|---|---|")
    for row in result["pairs"]:
        print(f"| {row['dtype']}, {row['backend']} | {row['threads']} | {row['gflops']:.0f} GFLOP/s | "
              f"{row['torch_gflops']:.0f} GFLOP/s | {row['ratio_median']:.2f}x ({row['ratio_min']:.2f} to "
              f"{row['ratio_max']:.2f}) |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--msa", type=Path, default=ROOT / "build/release/msa")
    parser.add_argument("--library", type=Path, default=ROOT / "build/release/src/libmsa.so")
    parser.add_argument("--longest", type=int, default=131072, help="longest context; 32768 is quick")
    parser.add_argument("--pairs", action="store_true", help="also against torch")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of this file")
    args = parser.parse_args()
    if args.table:
        table(json.loads(args.table.read_text()))
    elif args.output:
        args.msa, args.library = args.msa.resolve(), args.library.resolve()
        measure(args)
    else:
        parser.error("give --output FILE or --table FILE")


if __name__ == "__main__":
    main()
