"""Which selection of blocks answers questions about a stream of facts, and which training of it.

    python experiments/facts.py                  the main arms of the miniature, as in CI
    python experiments/facts.py --arms all --seeds 0,1,2
    python experiments/facts.py --size gpu --device cuda
    python experiments/facts.py --size smoke     every arm of the GPU experiment, a few steps

Trains arms of `arms/` on the task of `msa_cpp.train.data.Facts`, tries the selectors that need
no training on the dense model as well, and writes a table (facts-SIZE.md), all figures (.json) and
a picture (.png, with matplotlib) into `results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from arm import Arm, Size, arms, from_scratch

from msa_cpp.train.data import Examples, Facts
from msa_cpp.train.metrics import NAMES, Recorder
from msa_cpp.train.model import MINIATURE, SPARSE, Attend, Model, dense, listed
from msa_cpp.train.trainer import Options, Trainer, by_index, msa_config

HERE = Path(__file__).resolve().parent
HELD_OUT = 1_000_000  # examples from here on are never trained on
GPU_CONFIG = MINIATURE | {
    "vocab_size": 2048, "hidden_size": 256, "dense_intermediate_size": 768,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
    "rotary_dim": 64, "layer_types": [SPARSE] * 4, "mlp_layer_types": ["dense"] * 4,
    "index_n_heads": 2, "index_head_dim": 128, "index_block_size": 128, "index_topk_blocks": 8,
}
GPU_DATA = {"keys": 1536, "values": 64, "shares": (0.3, 0.3, 0.1, 0.3)}
SIZES = {
    "miniature": Size(MINIATURE, context=96, batch=16, lr=1e-2, steps=200, warmup_steps=60,
                      conversion=(0, 25, 50, 100), sparse_steps=60,
                      arms=("dense", "MSA-PT", "no detach, lambda 10", "MSA-CPT")),
    "gpu": Size(GPU_CONFIG, context=8192, batch=4, lr=2e-3, steps=1500, warmup_steps=300,
                conversion=(0, 25, 50, 100), sparse_steps=300, data=GPU_DATA, dtype="bf16"),
    "smoke": Size(GPU_CONFIG | {"num_hidden_layers": 2, "layer_types": [SPARSE] * 2,
                                "mlp_layer_types": ["dense"] * 2, "index_block_size": 16},
                  context=256, batch=1, lr=2e-3, steps=4, warmup_steps=2, conversion=(0, 2),
                  sparse_steps=2, data=GPU_DATA, dtype="bf16"),
}


@torch.no_grad()
def evaluate(model: Model, attend: Attend, task: Facts, size: Size, device: str,
             batches: int = 8) -> dict:
    """Answers on held-out sequences, in all and by distance; distances are eighths of a context."""
    right, asked = torch.zeros(2, 8, 8)  # by place of the query and distance, in eighths
    local, filler = [], []
    for number in range(batches):
        e = task.examples(HELD_OUT + number, size.batch, size.context).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=size.dtype == "bf16"):
            logits, _ = model(e.tokens, e.cu_seqlens, e.max_seqlen, attend)
        good = logits.argmax(-1) == e.targets
        place = torch.arange(size.context, device=device).repeat(size.batch) * 8 // size.context
        cell = (place * 8 + e.distances * 8 // size.context)[e.kinds == task.QUERY].cpu()
        right.view(-1).index_add_(0, cell, good[e.kinds == task.QUERY].float().cpu())
        asked.view(-1).index_add_(0, cell, torch.ones(len(cell)))
        local.append(good[e.kinds == task.LOCAL].float().mean())
        at = e.kinds == task.FILLER
        filler.append(torch.nn.functional.cross_entropy(logits[at], e.targets[at]))
    ratio = lambda a, b: [round(float(x), 4) if n else None for x, n in zip(a / b, b)]
    return {
        "accuracy": float(right.sum() / asked.sum()),
        "by_distance": ratio(right.sum(0), asked.sum(0)),
        "by_place_and_distance": [ratio(r, n) for r, n in zip(right, asked)],
        "local": float(torch.stack(local).mean()),
        "filler_loss": float(torch.stack(filler).mean()),
    }


class Remembered(Facts):
    """Facts that every arm of a seed reads, made once."""

    def __init__(self, seed: int, **data: object) -> None:
        super().__init__(seed, **data)
        self._made: dict[tuple[int, int, int], Examples] = {}

    def examples(self, number: int, batch: int, context: int) -> Examples:
        key = number, batch, context
        if key not in self._made:
            self._made[key] = super().examples(*key)
        return self._made[key]


class Runner:
    """The arms of one seed; those that start from another arm find its weights here."""

    def __init__(self, size: Size, seed: int, device: str) -> None:
        self.size, self.seed, self.device = size, seed, device
        self.task = Remembered(seed, **size.data)
        self.weights: dict[str, dict] = {}

    def train(self, arm: Arm) -> list[dict]:
        """Rows of the table: one for each look, and for the end."""
        size, began = self.size, time.monotonic()
        options = replace(from_scratch(size, self.seed), **arm.options(size))
        model = arm.model(size.config | arm.config(size.config), self.seed).to(self.device)
        if arm.start:
            model.load_state_dict(self.weights[arm.start], strict=False)
        config = msa_config(model.config, options)
        choose = arm.choose(config, self.seed) if arm.choose else None
        trainer = Trainer(options, model, self.task, choose=choose)
        rows = []
        for stop in (*arm.looks(size), options.steps):
            trainer.run(stop)
            look = {"arm": arm.name, "seed": self.seed, "step": stop,
                    "end": stop == options.steps}
            attend = dense
            if options.route != "full":
                attend = trainer.attend("sparse")
                attend = recorder = Recorder(attend, choose or by_index(config), config)
            look |= evaluate(model, attend, self.task, size, self.device)
            if options.route != "full":
                look |= recorder.means()
            last = trainer.log[-1] if trainer.log else {}
            look |= {k: last[k] for k in ("kl", "grad_norm_backbone", "grad_norm_index")
                     if k in last and options.route != "full"}
            rows.append(look | {"seconds": round(time.monotonic() - began, 1)})
        self.weights[arm.name] = model.state_dict()
        return rows

    def zero_shot(self, arm: Arm) -> dict:
        """The dense model with the arm's selector, without any training of the two together."""
        model = Model(self.size.config).to(self.device)
        model.load_state_dict(self.weights["dense"])
        config = msa_config(model.config, Options())
        attend = listed(arm.choose(config, self.seed), config)
        return {"arm": f"{arm.name} on dense", "seed": self.seed, "step": 0, "end": False,
                **evaluate(model, attend, self.task, self.size, self.device)}


def experiment(size: Size, seed: int, chosen: list[Arm], zero_shot: list[Arm],
               device: str = "cpu") -> list[dict]:
    """The rows of one seed; progress on stderr."""
    runner, rows = Runner(size, seed, device), []
    for arm in chosen:
        rows += runner.train(arm)
        print(f"seed {seed}: {arm.name}: {rows[-1]['accuracy']:.3f} ({rows[-1]['seconds']} s)",
              file=sys.stderr)
    return rows + [runner.zero_shot(arm) for arm in zero_shot]


# ---- what is written -----------------------------------------------------------------------------


def by_arm(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of all seeds under one label."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        looks = any(r["arm"] == row["arm"] and not r["end"] for r in rows)
        label = row["arm"] if row["end"] or not looks or "on dense" in row["arm"] else (
            f"{row['arm']}, {row['step']} index-only steps")
        found.setdefault(label, []).append(row)
    return found


def figure(rows: list[dict], name: str, digits: int = 3) -> str:
    """The mean over the seeds, and the range where there are several."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(rows: list[dict]) -> str:
    columns = ("accuracy", "local", "filler_loss", *reversed(NAMES), "kl", "grad_norm_backbone",
               "grad_norm_index")
    lines = ["| arm | nearest eighth | farthest half | " + " | ".join(
        name.replace("_", " ") for name in columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for label, group in by_arm(rows).items():
        for row in group:
            far = [x for x in row["by_distance"][4:] if x is not None]
            row |= {"near": row["by_distance"][0], "far": sum(far) / len(far) if far else None}
        cells = [figure(group, name) for name in ("near", "far", *columns)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], path: Path, title: str) -> None:
    """Accuracy by distance of every arm, and by place and distance for MSA-PT."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for label, group in by_arm(rows).items():
        if group[0]["end"] or label.endswith("on dense"):
            lines = torch.tensor([[float("nan") if x is None else x for x in row["by_distance"]]
                                  for row in group])
            left.plot(range(1, 9), lines.nanmean(0), label=label, marker=".")
    left.set(xlabel="distance to the fact, eighths of the context", ylabel="right answers",
             ylim=(0, 1.02), title=title)
    drawing.legend(loc="outside lower center", fontsize="small", ncols=6)
    shown = [r for r in rows if r["end"] and r["arm"] == "MSA-PT"] or rows[:1]
    cells = [[float("nan") if x is None else x for x in line]
             for line in shown[0]["by_place_and_distance"]]
    image = right.imshow(cells, vmin=0, vmax=1, origin="lower", extent=(0, 8, 0, 8))
    right.set(xlabel="distance, eighths", ylabel="place of the query, eighths",
              title=f"right answers of {shown[0]['arm']}, seed {shown[0]['seed']}")
    drawing.colorbar(image, ax=right)
    drawing.savefig(path, dpi=90, metadata={"Software": None})


def machine(device: str) -> str:
    """Where and what: processor, threads, commit."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=HERE,
                         capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device == "cuda" else next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, commit " + (
        git.stdout.strip() or "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="miniature")
    parser.add_argument("--arms", type=lambda text: text.split("+"), metavar="NAME+NAME+...",
                        help="all, or names (the size's own choice)")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    known = arms()
    names = options.arms or SIZES[options.size].arms or ("all",)
    names = tuple(known) if "all" in names else names
    for name in names:
        if name not in known:
            parser.error(f"--arms: got {name!r}, supported are {', '.join(known)}")
    chosen = [arm for arm in known.values() if arm.name in names]
    needed = {arm.start for arm in chosen if arm.start} - {arm.name for arm in chosen}
    if needed:
        parser.error(f"--arms: got one that starts from {needed.pop()}, expected that too")
    zero_shot = [arm for arm in known.values() if arm.choose and known["dense"] in chosen]
    rows, began, where = [], time.monotonic(), machine(options.device)
    for count, seed in enumerate(options.seeds, 1):
        rows += experiment(SIZES[options.size], seed, chosen, zero_shot, options.device)
        write(rows, options, options.seeds[:count], where, time.monotonic() - began)


def write(rows: list[dict], options: argparse.Namespace, seeds: list[int], where: str,
          seconds: float) -> None:
    """Table, figures and picture of the seeds so far."""
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"facts-{options.size}"
    text = (f"{where}; seeds {', '.join(map(str, seeds))}; {seconds:.0f} s. Mean over the seeds "
            f"(smallest to largest); {SIZES[options.size].steps} steps from scratch.\n\n"
            f"{table(rows)}")
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({"machine": where, "rows": rows}) + "\n")
    try:
        picture(rows, stem.with_suffix(".png"), f"facts in a stream, {options.size}")
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
    print(text)


if __name__ == "__main__":
    main()
