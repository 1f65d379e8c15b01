#!/usr/bin/env python3
"""What the stages of `dev/gpu.sh` leave, as files of bench/results.

    python3 bench/gpu_results.py build/gpu --output bench/results/NAME.json [--commit ID] [--keep]

writes NAME.json of bench_*.json and eval_*.json, NAME-compare.json of compare_*.json,
NAME-training-step.json of training_step_*.json and NAME-check.json of check_*.json: those whose
files are there. With `--keep`, rows of NAME.json that the folder lacks stay in it, under the commit
that they are of. bench/results_page.py makes docs/results.md of them.

A row of NAME.json is one of `msa bench`: checked before it was timed, median of its rounds.
`selection` is "random" (uniform block ids), "index" (what the index branch chose on the random
data) or "code-11m" (the lists of the trained model at that context).
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from shared import write_json

TRAINED, RANDOM, INDEX = "code-11m", "random", "index"


def read(folder, pattern):
    """[(name without the pattern's beginning, JSON)] of the files of a stage."""
    paths = sorted(folder.glob(pattern))
    return [(path.stem.removeprefix(pattern[:-6]), json.loads(path.read_text())) for path in paths]


def name_selection(row):
    if row["selection"] not in (RANDOM, INDEX):  # the file of a trace
        row["selection"] = TRAINED
    return row


def setting(row):
    """What a row measures, on whichever backend"""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the stages of dev/gpu.sh left")
    parser.add_argument("--output", type=Path, metavar="NAME.json", required=True)
    parser.add_argument("--commit", help="where the program does not know it")
    parser.add_argument("--keep", action="store_true",
                        help="rows of NAME.json that the folder lacks stay in it")
    options = parser.parse_args()
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
            write_json(output, merged)
            print(output)


if __name__ == "__main__":
    main()
