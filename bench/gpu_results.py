#!/usr/bin/env python3
"""The JSON files that `dev/gpu.sh bench` leaves, as one file, and README's table of it.

    python3 bench/gpu_results.py build/gpu --output bench/results/NAME.json [--commit ID]
    python3 bench/gpu_results.py --table bench/results/NAME.json

A row is one of `msa bench`: checked before it was timed, median of its rounds. `selection` is
"random" (uniform block ids), "index" (what the index branch chose on the random data) or "code-11m"
(the lists of the trained model at that context).
"""

import argparse
import json
from pathlib import Path


def merge(folder, commit):
    """{machine, commit, rows, evals} of every bench_*.json and eval_*.json in a folder"""
    merged = {"machine": None, "commit": commit, "rows": [], "evals": []}
    for path in sorted(folder.glob("bench_*.json")):
        run = json.loads(path.read_text())
        merged["machine"] = merged["machine"] or run["machine"]
        merged["commit"] = merged["commit"] or run["commit"]
        for row in run["rows"]:
            if row["selection"] not in ("random", "index"):  # the file of a trace
                row["selection"] = "code-11m"
            merged["rows"].append(row)
    for path in sorted(folder.glob("eval_*.json")):
        merged["evals"].append(json.loads(path.read_text()))
    return merged


def seconds_text(seconds):
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def context_text(tokens):
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"


def order(row):
    """prefill before extends before decode, trained lists before random ones, short before long"""
    decode, extend = row["new_tokens"] <= 16, row["new_tokens"] < row["context"]
    return (decode, extend, row["selection"] == "random", row["context"], row["batch"])


def print_table(results):
    machine = results["machine"]
    print(f"{machine['gpu']}, CUDA {machine['cuda_driver']}, commit {results['commit']}; "
          f"ceilings of the run: {machine['peak_gflops']['cuda'] / 1e3:.0f} TFLOP/s, "
          f"{machine['read_gbps'] / 1e3:.2f} TB/s.\n")
    print("| new tokens over context | lists | operator | time | spread | of the ceiling | rate |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(results["rows"], key=order):
        new, context = row["new_tokens"], context_text(row["context"])
        work = f"prefill {context}" if new == row["context"] else f"{new} over {context}"
        if row["batch"] > 1:
            work = f"{row['batch']} x {work}"
        products = new > 16 and row["flops"] > 0
        rate = f"{row['tflops']:.0f} TFLOP/s" if products else f"{row['gbps'] / 1e3:.2f} TB/s"
        median = seconds_text(row["seconds_median"])
        # "cuda" is what one gets; others are there for comparison.
        op = row["op"] if row["backend"] == "cuda" else f"{row['op']} ({row['backend']})"
        print(f"| {work} | {row['selection']} | {op} | {median} | "
              f"{seconds_text(row['seconds_p10'])} to {seconds_text(row['seconds_p90'])} | "
              f"{row['ceiling_fraction']:.0%} | {rate} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what dev/gpu.sh bench left")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="where the binary does not know it")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        print_table(json.loads(options.table.read_text()))
    elif options.folder and options.output:
        merged = merge(options.folder, options.commit)
        options.output.write_text(json.dumps(merged, indent=1) + "\n")
    else:
        parser.error("give a folder and --output, or --table")


if __name__ == "__main__":
    main()
