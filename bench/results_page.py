#!/usr/bin/env python3
"""docs/results.md: tables of what the files of bench/results hold.

    python3 bench/results_page.py [--output docs/results.md]

Every figure of the page stands in one of those files. To change it, measure anew (`dev/gpu.sh` and
bench/gpu_results.py, bench/suite.py, or the program that a section names) and run this again.
"""

import argparse
import json
import math
import textwrap
from pathlib import Path

from gpu_results import INDEX, RANDOM, TRAINED, setting
from shared import ROOT, write_whole

RESULTS = ROOT / "bench/results"

K, M = 1 << 10, 1 << 20

# This project's goals for one H200 at the shape of MiniMax-M3, in seconds, by (operator, new
# tokens, context, batch, lists). Those of extends hold for any lists.
GOALS = {
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
GOAL_RATES = {
    **{("index_select", lists): (640, (128 * K,)) for lists in (TRAINED, RANDOM)},
    **{("dense_attention", lists): (600, (32 * K, 128 * K)) for lists in (TRAINED, RANDOM)},
    ("sparse_attention", TRAINED): (410, (32 * K, 128 * K)),
    ("sparse_attention", RANDOM): (290, (32 * K, 128 * K)),
}


# ---- words and tables ----------------------------------------------------------------------------


def seconds_text(seconds):
    for limit, factor, unit in ((999.5e-6, 1e6, "us"), (999.5e-3, 1e3, "ms"), (math.inf, 1, "s")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"


def spread_text(row):
    return (f"{seconds_text(row['seconds_median'])} ({seconds_text(row['seconds_p10'])} to "
            f"{seconds_text(row['seconds_p90'])})")


def context_text(tokens):
    return f"{tokens / M:.3g}M" if tokens >= M else f"{tokens / K:.3g}K"


def work_text(row):
    new, context = row["new_tokens"], context_text(row["context"])
    work = f"prefill {context}" if new == row["context"] else f"{new} over {context}"
    return f"{row['batch']} x {work}" if row["batch"] > 1 else work


def paragraph(text):
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False,
                         break_on_hyphens=False)


def table(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ceilings_text(machine):
    peaks = ", ".join(f"{name} {peak / 1e3:,.3g} TFLOP/s"
                      for name, peak in machine["peak_gflops"].items())
    return f"ceilings as measured: {peaks}, reads at {machine['read_gbps']:,.0f} GB/s"


def faster_text(row, rows):
    """How many times faster than dense attention of the same run, and the ratio of their FLOPs"""
    if not row.get("ratio_to_dense"):
        return ""
    same = ("run", "new_tokens", "context", "batch", "selection", "dtype", "heads_q", "heads_kv")
    (dense,) = {other["flops"] for other in rows if other["op"] == "dense_attention"
                and all(other.get(key) == row.get(key) for key in same)}
    return f"{row['ratio_to_dense']['median']:.2f}x ({dense / row['flops']:.2f}x)"


# ---- sections ------------------------------------------------------------------------------------


def goal_share(row):
    """The goal's time over the measured one, or the rate over the goal's; None without a goal."""
    if row["backend"] != "cuda":
        return None
    if setting(row) in GOALS:
        return GOALS[setting(row)] / row["seconds_median"]
    rate, lengths = GOAL_RATES.get((row["op"], row["selection"]), (0, ()))
    prefill = row["new_tokens"] == row["context"] and row["batch"] == 1
    return row["tflops"] / rate if prefill and row["context"] in lengths else None


def gpu_table(rows, all_rows):
    cells = []
    for row in rows:
        products = row["new_tokens"] > 16 and row["flops"] > 0
        rate = f"{row['tflops']:.0f} TFLOP/s" if products else f"{row['gbps'] / 1e3:.2f} TB/s"
        op = row["op"] if row["backend"] == "cuda" else f"{row['op']} ({row['backend']})"
        mark = "\\*" if "commit" in row else ""
        cells.append([work_text(row) + mark, row["selection"], op, spread_text(row), rate,
                      f"{row['ceiling_fraction']:.0%}", faster_text(row, all_rows)])
    titles = ["work", "lists", "operator", "time", "rate", "of the ceiling", "faster than dense"]
    return table(titles, cells)


def gpu(results):
    rows = sorted(results["rows"], key=lambda row: (
        row["selection"] == RANDOM, row["context"], row["new_tokens"], row["batch"]))
    prefill = [row for row in rows if row["new_tokens"] == row["context"]]
    decode = [row for row in rows if row["new_tokens"] <= 16]
    extend = [row for row in rows if row not in prefill and row not in decode]
    machine = results["machine"]
    yield paragraph(f"""{machine['gpu']}, CUDA {machine['cuda_driver']}, commit
        {results['commit']}; {ceilings_text(machine)} (products: a burst, cold).""")
    yield paragraph("""Shape of MiniMax-M3 (64 query, 4 KV heads, dimension 128, 16 blocks of 128),
        bf16, one layer, one call; `msa` is index, selection and attention. Lists are those of the
        trained model in `models/code-11m`, uniformly random (`random`), or what the index branch
        chose on random data (`index`). Every row was checked before it was timed; median (10th to
        90th percentile); what two runs timed stands twice. Rates count useful FLOPs, not the rows
        that a tile computes in vain. The ceiling is the larger of the times for FLOPs and bytes;
        the bytes of more than 16 new tokens are those of the whole context, so lists that leave
        much of it out can be beyond 100 %. Ratios to dense attention are of interleaved rounds, in
        brackets what the number of FLOPs would allow.""")
    earlier = sorted({row["commit"] for row in rows if "commit" in row})
    if earlier:
        yield f"\\* of an earlier run, commit {', '.join(earlier)}."
    for title, some in (("Prefill", prefill), ("New tokens over a cache", extend),
                        ("Decode", decode)):
        yield f"### {title}"
        yield gpu_table(some, rows)
    yield ("![How much faster than dense attention MSA is on one H200, measured and by arithmetic]"
           "(images/speedup-h200.png)")
    missed = [f"{row['op']}, {work_text(row)}, {row['selection']} ({share:.3f})"
              for row in rows if (share := goal_share(row)) is not None and share < 1]
    yield paragraph(f"""Slower than this project's goals, with the speed as a share of the goal's:
        {"; ".join(missed) or "none"}.""")
    yield "### The whole model `code-11m`"
    yield paragraph("`msa eval --attention msa`, bf16; the model was trained on contexts of up to "
                    "16K tokens.")
    yield table(EVAL, [eval_cells(run, run["results"][0]) for run in
                       sorted(results["evals"], key=lambda run: run["context"])])


EVAL = ["tokens", "forward pass", "of it attention", "of that the index", "bits per byte",
        "attention mass kept, by layer"]


def eval_cells(run, result):
    kept = result["kept_mass"]
    return [context_text(run["context"]), seconds_text(result["prefill_seconds"]),
            seconds_text(result["attention_seconds"]),
            seconds_text(result["index_seconds"]) if kept else "",
            f"{result['bits_per_byte']:.4f}", f"{min(kept):.0%} to {max(kept):.0%}" if kept else ""]


CONTENDERS = {"dense": "dense", "sdpa cudnn": "cuDNN", "sdpa flash": "FlashAttention",
              "vllm": "vLLM", "sglang": "SGLang",
              "adapter vllm": "ours in vLLM", "adapter sglang": "ours in SGLang"}


def compare(results):
    machine = results["machine"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "vllm", "sglang")]
    yield f"{machine['gpu']}, {', '.join(versions)}, commit {results['commit']}."
    yield paragraph("""The same shape, called from Python (`python -m msa_cpp.bench`,
        `dev/gpu.sh compare`): ours over a paged cache, torch's over contiguous copies, every result
        checked, rounds interleaved. `msa` is called in two parts here, hence slower in decode than
        above; `dense` is our dense attention; cuDNN and FlashAttention are those of torch's
        `scaled_dot_product_attention`; vLLM and SGLang are their Triton functions; the last columns
        are `msa` as the engines call it through our [adapters](serving.md). In brackets how many
        times as long as `msa` something takes. For several new tokens over a cache torch gives
        cuDNN the mask as a tensor, and neither of torch's is at its best; SGLang on CUDA treats
        draft tokens (8 x 4) as a chunk of prefill.""")
    settings = {}
    for row in (row for run in results["runs"] for row in run["rows"]):
        if "seconds_median" in row:
            found = settings.setdefault((work_text(row), row["selection"]), {})
            found[row["contender"]] = row["seconds_median"]

    def cell(found, name):
        if name not in found:
            return ""
        return f"{seconds_text(found[name])} ({found[name] / found['msa']:.2f}x)"

    yield table(["work", "lists", "msa", *CONTENDERS.values()],
                [[*work, seconds_text(found["msa"]), *(cell(found, name) for name in CONTENDERS)]
                 for work, found in settings.items()])


def range_text(seconds):
    return (f"{seconds_text(seconds['median'])} ({seconds_text(seconds['min'])} to "
            f"{seconds_text(seconds['max'])})")


def training_step(results):
    sides = ("lists", "sparse", "warm-up", "dense cudnn", "dense flash")
    machine = results["machine"]
    yield f"{machine['device']}, torch {machine['torch']}, commit {results['commit']}."
    yield paragraph("""Attention forward and all gradients of one layer, 16 query and 2 KV heads,
        bf16 (`bench/training_step.py`): median (smallest to largest), then how many times faster
        than dense attention of cuDNN. MSA's steps hold the KL loss and the gradients of the index
        branch too, which dense attention has not. `lists` is given lists that neighbours share,
        `sparse` the index branch's own choice on random data, `warm-up` full attention in both
        branches.""")
    yield table(["tokens", *sides], [
        [context_text(run["settings"]["tokens"])] +
        [f"{range_text(s)}, {s['times_faster_than_dense']:.2f}x"
         for s in map(run["seconds"].get, sides)]
        for run in sorted(results["runs"], key=lambda run: run["settings"]["tokens"])])


def cpu(results):
    machine, rows = results["machine"], results["rows"]
    yield paragraph(f"""{machine['cpu']}, {machine['cores']} cores, commit {results['commit']};
        {ceilings_text(machine)}.""")
    yield paragraph("""Shape of code-11m unless said (16 query, 2 KV heads, dimension 128, 16 blocks
        of 128; M3: 64 and 4), f32 unless said; columns as above.""")
    if "commands" in results:
        yield "\n".join(f"    {command}" for command in results["commands"])
    yield table(["run", "lists", "operator", "backend", "time", "of the ceiling",
                 "faster than dense"],
                [[row["run"], row["selection"], row["op"], row["backend"], spread_text(row),
                  f"{row['ceiling_fraction']:.0%}", faster_text(row, rows)]
                 for row in rows if row["run"] != "growth"])
    growth = {(row["context"], row["op"]): row["seconds_median"] / row["context"]
              for row in rows if row["run"] == "growth"}
    if growth:
        yield "Growth with the context, lists of the trained model:"
        yield table(["context", "index, us per token", "sparse attention, us per token"],
                    [[context_text(context)] + [f"{growth[context, op] * 1e6:.2f}"
                                                for op in ("index_select", "sparse_attention")]
                     for context in sorted({context for context, _ in growth})])
    yield "Dense prefill at 8K beside torch's `scaled_dot_product_attention`, in interleaved pairs:"
    yield table(["dtype, backend", "threads", "ours", "torch", "ratio (range of the pairs)"],
                [[f"{row['dtype']}, {row['backend']}", str(row["threads"]),
                  f"{row['gflops']:.0f} GFLOP/s", f"{row['torch_gflops']:.0f} GFLOP/s" +
                  (f" (held to {row['torch_limited_to']})" if "torch_limited_to" in row else ""),
                  f"{row['ratio_median']:.2f}x ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"]
                 for row in results["pairs"]])
    for run in results["evals"]:
        yield paragraph(f"""`msa eval` of the whole model `code-11m`; attention is
            {run['speedup_attention']:.2f}x faster with MSA, {run['speedup_sparse_layers']:.2f}x in
            the sparse layers:""")
        yield table(["attention", *EVAL],
                    [[result["attention"], *eval_cells(run, result)] for result in run["results"]])


def sixteen_cores(results):
    yield "Measured by `bench/suite.py`."
    yield from cpu(results)
    yield ("![How much faster than dense attention MSA is on 16 cores, measured and by arithmetic]"
           "(images/speedup.png)")


def checks(results):
    yield (f"Commit {results.get('commit', 'not recorded')}: {results['passed']} passed, "
           f"{results['failed']} failed, {results['skipped']} skipped.")
    yield table(["", "passed", "failed", "skipped", "largest error"],
                [[f"`{name}`", *(str(counts[key]) for key in ("passed", "failed", "skipped")),
                  f"{counts['max_error']:.2g}"]
                 for name, counts in {**results["backends"], **results.get("ops", {})}.items()])


def transformers(results):
    machine = results["machine"]
    (row,) = results["rows"]
    yield paragraph(f"""{machine['cpu']}, {machine['cores']} cores at a load of
        {machine['load_average'][0]:.1f}, torch {machine['torch']}, commit not recorded:
        {row['dtype']}, {context_text(row['tokens'])} tokens, median of {row['rounds']} rounds
        (smallest to largest), by `bench/transformers_cpu.py`.""")
    yield table(["attn_implementation", "time"],
                [[name, range_text(seconds)] for name, seconds in row["seconds"].items()])


def python_overhead(results):
    machine = results["machine"]
    yield paragraph(f"""{machine['cpu']}, {machine['cores']} cores, commit {results['commit']}:
        CPU time with next to no work in the call, by `bench/python_overhead.py`; median (10th to
        90th percentile). The first rows are what a call costs beyond the same call of the C
        interface, those of adapters what one costs beyond the call that it makes. The limits are
        this project's goals.""")
    yield table(["", "call", "overhead", "limit"],
                [[row["run"], row["call"],
                  f"{row['overhead_us_median']:.1f} us ({row['overhead_us_p10']:.1f} to "
                  f"{row['overhead_us_p90']:.1f})", f"{row['limit_us']:.3g} us"]
                 for row in results["rows"]])


SECTIONS = {  # file: title, what writes its section
    "h200.json": ("Layers on an H200", gpu),
    "h200-compare.json": ("Beside cuDNN, FlashAttention, vLLM and SGLang", compare),
    "h200-training-step.json": ("A training step on an H200", training_step),
    "xeon-16.json": ("Sixteen cores", sixteen_cores),
    "xeon-2.json": ("Two cores", cpu),
    "transformers-2.json": ("code-11m through transformers, two cores", transformers),
    "python-overhead.json": ("What a call from Python costs", python_overhead),
    "h200-check.json": ("`msa check --suite full` on an H200", checks),
    "xeon-16-check.json": ("`msa check --suite full` on sixteen cores", checks),
}


def page():
    yield "<!-- bench/results_page.py writes this page; do not edit it. -->"
    yield "# Results"
    yield paragraph("""What was measured, from the files in [bench/results](../bench/results), which
        hold more than the tables. FlashInfer and a whole engine are in [serving.md](serving.md),
        training in [training.md](training.md); what was tried, and how far kernels are from their
        bounds, in [dev/notes](../dev/notes).""")
    for name, (title, write) in SECTIONS.items():
        yield f"## {title}"
        yield f"[{name}](../bench/results/{name})"
        yield from write(json.loads((RESULTS / name).read_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results.md")
    write_whole(parser.parse_args().output, "\n\n".join(page()) + "\n")


if __name__ == "__main__":
    main()
