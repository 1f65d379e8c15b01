#!/usr/bin/env python3
"""What the stages of `dev/gpu.sh` leave, as files of bench/results, and README's tables of them.

    python3 bench/gpu_results.py build/gpu --output bench/results/NAME.json [--commit ID] [--keep]
    python3 bench/gpu_results.py --table bench/results/NAME.json [--readme]

writes NAME.json of bench_*.json and eval_*.json, NAME-compare.json of compare_*.json,
NAME-training-step.json of training_step_*.json and NAME-check.json of check_*.json: those whose
files are there. `--table` prints any of them, `--readme` only the rows that README shows. With
`--keep`, rows of NAME.json that the folder lacks stay in it, under the commit that they are of.

A row of NAME.json is one of `msa bench`: checked before it was timed, median of its rounds.
`selection` is "random" (uniform block ids), "index" (what the index branch chose on the random
data) or "code-11m" (the lists of the trained model at that context).
"""

import argparse
import json
import runpy
from collections import Counter
from pathlib import Path

# The package need not be built here.
write_whole = runpy.run_path(
    str(Path(__file__).resolve().parents[1] / "python/msa_cpp/_files.py"))["write_whole"]

K, M = 1 << 10, 1 << 20
TRAINED, RANDOM, INDEX = "code-11m", "random", "index"

# This project's goals for one H200 at the shape of MiniMax-M3, in seconds, by (operator, new
# tokens, context, batch, lists). Those of extends hold for any lists.
TARGETS = {
    ("msa", 8 * K, 8 * K, 1, TRAINED): 1.4e-3,
    ("msa", 32 * K, 32 * K, 1, TRAINED): 6.0e-3,
    ("msa", 128 * K, 128 * K, 1, TRAINED): 35e-3,
    ("msa", M, M, 1, TRAINED): 1.07,
    ("msa", 32 * K, 32 * K, 1, RANDOM): 8.2e-3,
    ("msa", 128 * K, 128 * K, 1, RANDOM): 44e-3,
    **{("msa", new, context, 1, lists): seconds
       for new, context, seconds in ((128, 128 * K, 100e-6), (K, 512 * K, 1.1e-3),
                                     (K, M, 2.0e-3), (16 * K, M, 31e-3))
       for lists in (TRAINED, RANDOM)},
    ("msa", 1, 32 * K, 1, INDEX): 11e-6,
    ("msa", 1, 128 * K, 1, INDEX): 17e-6,
    ("msa", 1, 512 * K, 1, INDEX): 40e-6,
    ("msa", 1, M, 1, INDEX): 71e-6,
    ("msa", 1, 128 * K, 8, INDEX): 78e-6,
    ("msa", 1, 32 * K, 32, INDEX): 101e-6,
    ("msa", 1, 128 * K, 32, INDEX): 288e-6,
    ("msa", 1, M, 4, INDEX): 258e-6,
    ("select_blocks", 16 * K, 128 * K, 1, RANDOM): 0.12e-3,
    ("select_blocks", 16 * K, M, 1, RANDOM): 0.65e-3,
}
# Likewise in useful TFLOP/s, of an operator alone, by (operator, lists): the rate, and at which
# lengths of a prefill.
RATES = {
    **{("index_select", lists): (640, (128 * K,)) for lists in (TRAINED, RANDOM)},
    **{("dense_attention", lists): (600, (32 * K, 128 * K)) for lists in (TRAINED, RANDOM)},
    ("sparse_attention", TRAINED): (410, (32 * K, 128 * K)),
    ("sparse_attention", RANDOM): (290, (32 * K, 128 * K)),
}
BACKWARD = ("sparse_attention_backward", "kl_backward")  # one goal for both together
BACKWARD_TARGET = 95e-3  # at 128K, trained lists
PARTS = ("sparse_attention_backward", "index_lse", "kl_backward", "kl_loss", "select_blocks")


def read(folder, pattern):
    """[(name without the pattern's beginning, JSON)] of the files of a stage."""
    paths = sorted(folder.glob(pattern))
    return [(path.stem.removeprefix(pattern[:-6]), json.loads(path.read_text())) for path in paths]


def name_selection(row):
    if row["selection"] not in (RANDOM, INDEX):  # the file of a trace
        row["selection"] = TRAINED
    return row


def setting(row):
    """A key of TARGETS"""
    return tuple(row[key] for key in ("op", "new_tokens", "context", "batch", "selection"))


def merge_bench(folder, commit, before):
    """{machine, commit, rows, evals} of every bench_*.json and eval_*.json in a folder, and the
    rows of `before` whose setting is in none of them"""
    runs = [run for _, run in read(folder, "bench_*.json")]
    if not runs:
        return None
    rows = [name_selection(row) for run in runs for row in run["rows"]]
    measured = {(row["backend"], setting(row)) for row in rows}
    kept = [{"commit": before["commit"], **row} for row in (before or {"rows": []})["rows"]
            if (row["backend"], setting(row)) not in measured]
    return {
        "machine": runs[0]["machine"],
        "commit": commit or runs[0]["commit"],
        "rows": rows + kept,
        "evals": [run for _, run in read(folder, "eval_*.json")],
    }


def merge_runs(folder, pattern, commit):
    """{machine, commit, runs}, of programs that know their machine but no commit"""
    runs = read(folder, pattern)
    if not runs:
        return None
    machines = [run.pop("machine") for _, run in runs]
    if any(machine != machines[0] for machine in machines):
        raise SystemExit(f"{folder}/{pattern}: of more than one machine")
    for name, run in runs:
        run["name"] = name
        run["rows"] = [name_selection(row) for row in run.pop("rows", [])]
    return {"machine": machines[0], "commit": commit, "runs": [run for _, run in runs]}


def merge_checks(folder, commit):
    """Counts of `msa check`, by backend and by operator"""
    runs = [run for _, run in read(folder, "check_*.json")]
    if not runs:
        return None
    cases = [case for run in runs for case in run["cases"]]
    statuses = ("passed", "failed", "skipped")

    def counts(key, name):
        own = [case for case in cases if case[key] == name]
        found = Counter(case["status"] for case in own)
        largest = max((case["max_error"] or 0 for case in own), default=0)
        return {**{status: found[status] for status in statuses}, "max_error": largest}

    merged = {"commit": commit, **{status: sum(run[status] for run in runs) for status in statuses}}
    for title, key in (("backends", "backend"), ("ops", "op")):
        merged[title] = {name: counts(key, name)
                         for name in dict.fromkeys(case[key] for case in cases)}
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


def work_text(row):
    new, context = row["new_tokens"], context_text(row["context"])
    work = f"prefill {context}" if new == row["context"] else f"{new} over {context}"
    return f"{row['batch']} x {work}" if row["batch"] > 1 else work


def target_text(row):
    """How fast against the target: 1.07 is 7 % faster. Empty without one."""
    if row["backend"] != "cuda":
        return ""
    if setting(row) in TARGETS:
        return f"{TARGETS[setting(row)] / row['seconds_median']:.2f}"
    rate, lengths = RATES.get((row["op"], row["selection"]), (0, ()))
    prefill = row["new_tokens"] == row["context"] and row["batch"] == 1
    return f"{row['tflops'] / rate:.2f}" if prefill and row["context"] in lengths else ""


def for_readme(rows):
    """Whole calls with dense attention beside them, the parts of a prefill of 32K and 128K,
    training and selection; of an operator that several runs timed the first."""
    shown = {}
    for row in rows:
        whole = row["op"] in ("msa", "dense_attention")
        part = row["op"] in ("index_select", "sparse_attention") and \
            row["new_tokens"] in (32 * K, 128 * K)
        alone = row["op"] in PARTS and row["context"] > 8 * K
        if row["backend"] == "cuda" and (whole or part or alone):
            shown.setdefault(setting(row), row)
    return list(shown.values())


def print_bench(results, readme):
    machine = results["machine"]
    print(f"{machine['gpu']}, CUDA {machine['cuda_driver']}, commit {results['commit']}; "
          f"ceilings of the run: {machine['peak_gflops']['cuda'] / 1e3:.0f} TFLOP/s, "
          f"{machine['read_gbps'] / 1e3:.2f} TB/s.\n")
    print("| new tokens over context | lists | operator | time | spread | of the ceiling | rate "
          "| of the target |")
    print("|---|---|---|---|---|---|---|---|")
    rows = sorted(for_readme(results["rows"]) if readme else results["rows"], key=order)
    for row in rows:
        products = row["new_tokens"] > 16 and row["flops"] > 0
        rate = f"{row['tflops']:.0f} TFLOP/s" if products else f"{row['gbps'] / 1e3:.2f} TB/s"
        # "cuda" is what one gets; others are there for comparison.
        op = row["op"] if row["backend"] == "cuda" else f"{row['op']} ({row['backend']})"
        mark = "\\*" if "commit" in row else ""
        print(f"| {work_text(row)}{mark} | {row['selection']} | {op} "
              f"| {seconds_text(row['seconds_median'])} "
              f"| {seconds_text(row['seconds_p10'])} to {seconds_text(row['seconds_p90'])} "
              f"| {row['ceiling_fraction']:.0%} | {rate} | {target_text(row)} |")
    earlier = sorted({row["commit"] for row in rows if "commit" in row})
    if earlier:
        print(f"\n\\* of an earlier run, commit {', '.join(earlier)}.")
    backward = [row["seconds_median"] for row in for_readme(results["rows"])
                if row["op"] in BACKWARD and row["context"] == 128 * K]
    if len(backward) == len(BACKWARD):
        print(f"\n{' and '.join(BACKWARD)} at 128K together: {seconds_text(sum(backward))}, "
              f"{BACKWARD_TARGET / sum(backward):.2f} of the target.")


def print_compare(results):
    """A line per setting: msa beside dense attention, ours and torch's, beside the engines'
    functions and through their adapters; in brackets how many times longer than msa the fastest of
    each kind takes"""
    kinds = {"dense": {"dense": "dense", "sdpa cudnn": "cuDNN", "sdpa flash": "flash"},
             "engines": {"vllm": "vLLM", "sglang": "SGLang"},
             "adapters": {"adapter vllm": "ours in vLLM", "adapter sglang": "ours in SGLang"}}
    settings = {}
    for row in (row for run in results["runs"] for row in run["rows"]):
        if "seconds_median" in row:
            found = settings.setdefault((work_text(row), row["selection"]), {})
            found[row["contender"]] = row["seconds_median"]
    measured = {name for found in settings.values() for name in found}
    kinds = {kind: {name: title for name, title in names.items() if name in measured}
             for kind, names in kinds.items()}
    titles = [title for names in kinds.values() for title in names.values()]
    machine = results["machine"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "vllm", "sglang")
                if name in machine]
    print(f"{machine['gpu']}, {', '.join(versions)}, commit {results['commit']}.\n")
    print("| new tokens over context | lists | msa |", " | ".join(titles), "|")
    print("|---|---|---|" + "---|" * len(titles))
    for (work, lists), found in settings.items():
        cells = [seconds_text(found["msa"])]
        for names in kinds.values():
            fastest = min((found[name] for name in names if name in found), default=None)
            for name in names:
                text = seconds_text(found[name]) if name in found else ""
                if name in found and found[name] == fastest:
                    text += f" ({fastest / found['msa']:.2f}x)"
                cells.append(text)
        print(f"| {work} | {lists} |", " | ".join(cells), "|")


def print_training_steps(results):
    """A line per length: forward and backward, in brackets how many times cuDNN's speed"""
    sides = ("lists", "sparse", "warm-up", "dense cudnn", "dense flash")
    print(f"{results['machine']['device']}, torch {results['machine']['torch']}, "
          f"commit {results['commit']}.\n")
    print("| tokens |", " | ".join(sides), "|")
    print("|---|" + "---|" * len(sides))
    for run in sorted(results["runs"], key=lambda run: run["settings"]["tokens"]):
        cells = [f"{seconds_text(run['seconds'][side]['median'])} "
                 f"({run['seconds'][side]['times_faster_than_dense']:.2f}x)" for side in sides]
        print(f"| {context_text(run['settings']['tokens'])} |", " | ".join(cells), "|")


def print_checks(results):
    print("| of `msa check` | passed | failed | skipped | largest error |\n|---|---|---|---|---|")
    for name, counts in {**results["backends"], **results["ops"]}.items():
        print(f"| {name} | {counts['passed']} | {counts['failed']} | {counts['skipped']} "
              f"| {counts['max_error']:.2g} |")


def print_table(results, readme):
    if not results.keys() & {"backends", "runs", "rows"}:
        raise SystemExit("--table: not a file that this script has written")
    if "backends" in results:
        print_checks(results)
    elif "runs" not in results:
        print_bench(results, readme)
    elif results["runs"][0]["rows"]:
        print_compare(results)
    else:
        print_training_steps(results)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what the stages of dev/gpu.sh left")
    parser.add_argument("--output", type=Path, metavar="NAME.json")
    parser.add_argument("--commit", help="where the program does not know it")
    parser.add_argument("--keep", action="store_true",
                        help="rows of NAME.json that the folder lacks stay in it")
    parser.add_argument("--table", type=Path, metavar="FILE.json")
    parser.add_argument("--readme", action="store_true", help="only the rows that README shows")
    options = parser.parse_args()
    if options.table:
        print_table(json.loads(options.table.read_text()), options.readme)
    elif options.folder and options.output:
        folder, commit = options.folder, options.commit
        if options.keep and not options.output.exists():
            parser.error(f"--keep: there is no {options.output}")
        before = json.loads(options.output.read_text()) if options.keep else None
        for suffix, merged in (
                ("", merge_bench(folder, commit, before)),
                ("-compare", merge_runs(folder, "compare_*.json", commit)),
                ("-training-step", merge_runs(folder, "training_step_*.json", commit)),
                ("-check", merge_checks(folder, commit))):
            if merged:
                output = options.output.with_name(f"{options.output.stem}{suffix}.json")
                write_whole(output, json.dumps(merged, indent=1) + "\n")
                print(output)
    else:
        parser.error("give a folder and --output, or --table")


if __name__ == "__main__":
    main()
