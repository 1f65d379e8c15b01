#!/usr/bin/env python3
"""The CPU's measurements of docs/results.md, in one run and one JSON file.

    python3 bench/suite.py --msa build/release/msa --library build/release/src/libmsa.so \\
        --output bench/results/NAME.json            (half an hour on 2 cores, 8 minutes on 16)

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--msa", type=Path, default=ROOT / "build/release/msa")
    parser.add_argument("--library", type=Path, default=ROOT / "build/release/src/libmsa.so")
    parser.add_argument("--longest", type=int, default=131072, help="longest context; 32768 is quick")
    parser.add_argument("--pairs", action="store_true", help="also against torch")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.msa, args.library = args.msa.resolve(), args.library.resolve()
    measure(args)


if __name__ == "__main__":
    main()
