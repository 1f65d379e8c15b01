"""Which selection of blocks answers questions about a stream of facts, and which training of it.

    python experiments/facts.py                  the main arms of the miniature, as in CI
    python experiments/facts.py --arms all --seeds 0,1,2
    python experiments/facts.py --size gpu --device cuda --minutes 9
    python experiments/facts.py --size gpu-blocks --device cuda     blocks of 128, 64 and 32 tokens
    python experiments/facts.py --size smoke     every arm of the GPU experiment, a few steps
    python experiments/facts.py --plot experiments/results/facts-gpu.json

Trains arms of `arms/` on the task of `msa_cpp.train.data.Facts`, tries the selectors that need
no training on the dense model as well, and writes all figures (facts-SIZE.json), after every arm,
and at the end a table (.md) and a picture (.png, with matplotlib) into `results/`. --plot draws
these two from figures that are there, of several files as of one run.

With --minutes every arm is tried for a few steps first; one that would not fit into the time that
is left is listed as not run. Arms are never shortened, so that they compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from arm import Arm, Size, arms, from_scratch

from msa_cpp._checkpoint import read_json
from msa_cpp._command import InputError, device_here
from msa_cpp._files import whole_file, write_whole
from msa_cpp.train.data import Examples, Facts
from msa_cpp.train.metrics import NAMES, Recorder
from msa_cpp.train.model import MINIATURE, SPARSE, Attend, Model, dense, listed
from msa_cpp.train.trainer import Diverged, Options, Trainer, by_index, msa_config

HERE = Path(__file__).resolve().parent
HELD_OUT = 1_000_000  # examples from here on are never trained on
BATCHES = 8  # of these, for an evaluation
GPU_CONFIG = MINIATURE | {
    "vocab_size": 2048, "hidden_size": 256, "dense_intermediate_size": 768,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
    "rotary_dim": 64, "layer_types": [SPARSE] * 4, "mlp_layer_types": ["dense"] * 4,
    "index_n_heads": 2, "index_head_dim": 128, "index_block_size": 128, "index_topk_blocks": 8,
}
GPU_DATA = {"keys": 1536, "values": 64, "shares": (0.3, 0.3, 0.1, 0.3), "short": 256}
GPU = Size(GPU_CONFIG, context=8192, batch=4, lr=2e-3, steps=400, warmup_steps=125,
           conversion=(0, 25, 50, 100), sparse_steps=150, data=GPU_DATA, dtype="bf16",
           log_every=50,
           arms=("dense", "msa_pt", "msa_cpt", "no_detach_10", "no_warmup", "lambda_0",
                 "random_blocks", "window", "lambda_10", "no_detach", "value_head"))
SIZES = {
    "miniature": Size(MINIATURE, context=96, batch=16, lr=1e-2, steps=200, warmup_steps=60,
                      conversion=(0, 25, 50, 100), sparse_steps=60,
                      arms=("dense", "msa_pt", "no_detach_10", "msa_cpt")),
    "gpu": GPU,
    "gpu-blocks": replace(GPU, config=GPU_CONFIG | {"index_topk_blocks": 2}, context=2048,
                          batch=16, arms=("dense", "msa_pt", "small_blocks", "smaller_blocks")),
    "smoke": Size(GPU_CONFIG | {"num_hidden_layers": 2, "layer_types": [SPARSE] * 2,
                                "mlp_layer_types": ["dense"] * 2, "index_block_size": 16},
                  context=256, batch=1, lr=2e-3, steps=4, warmup_steps=2, conversion=(0, 2),
                  sparse_steps=2, data=GPU_DATA, dtype="bf16"),
}


@torch.no_grad()
def evaluate(model: Model, attend: Attend, task: Facts, size: Size, device: torch.device,
             batches: int = BATCHES) -> dict:
    """Answers on held-out sequences, in all and by distance; distances are eighths of a context."""
    right, asked = torch.zeros(2, 8, 8)  # by place of the query and distance, in eighths
    local, filler = [], []
    for number in range(batches):
        e = task.examples(HELD_OUT + number, size.batch, size.context).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=size.dtype == "bf16"):
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
    """Facts that every arm of a seed reads, made once and kept on the device."""

    def __init__(self, seed: int, device: torch.device, **data: object) -> None:
        super().__init__(seed, **data)
        self._device = device
        self._made: dict[tuple[int, int, int], Examples] = {}

    def examples(self, number: int, batch: int, context: int) -> Examples:
        key = number, batch, context
        if key not in self._made:
            self._made[key] = super().examples(*key).to(self._device)
        return self._made[key]


class Runner:
    """The arms of one seed; those that start from another arm find its weights here."""

    def __init__(self, size: Size, seed: int, device: str) -> None:
        self.size, self.seed = size, seed
        self.device = torch.empty(0, device=device).device  # with its number
        self.task = Remembered(seed, self.device, **size.data)
        self.held_out = Remembered(seed, self.device, **size.data | {"short": 0})
        self.weights: dict[str, dict] = {}

    def trainer(self, arm: Arm) -> Trainer:
        size = self.size
        options = replace(from_scratch(size, self.seed), **arm.options(size))
        model = arm.model(size.config | arm.config(size.config), self.seed).to(self.device)
        if arm.start:
            model.load_state_dict(self.weights[arm.start], strict=False)
        choose = arm.choose(msa_config(model.config, options), self.seed) if arm.choose else None
        return Trainer(options, model, self.task, choose=choose)

    def look(self, trainer: Trainer, batches: int = BATCHES) -> dict:
        """What the model answers, and the figures of its selection."""
        if trainer.options.route == "full":
            return evaluate(trainer.model, dense, self.held_out, self.size, self.device, batches)
        recorder = Recorder(trainer.attend("sparse"), trainer.choose or by_index(trainer.msa),
                            trainer.msa)
        figures = evaluate(trainer.model, recorder, self.held_out, self.size, self.device, batches)
        return figures | recorder.means()

    def train(self, arm: Arm) -> list[dict]:
        """Rows of the table: one for each look, and for the end; progress on stderr."""
        began, trainer, rows = time.monotonic(), self.trainer(arm), []
        options = trainer.options
        trainer.on_step = progress(f"seed {self.seed}: {arm.name}", trainer)
        for stop in (*arm.looks(self.size), options.steps):
            trainer.run(stop)
            row = {"arm": arm.name, "seed": self.seed, "step": stop, "end": stop == options.steps,
                   **self.look(trainer)}
            if options.route != "full":
                row |= {k: v for k, v in trainer.figures.items() if k != "loss"}
            rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
        rows[-1]["log"] = trainer.log
        self.weights[arm.name] = trainer.model.state_dict()
        return rows

    def estimate(self, arm: Arm) -> float:
        """Seconds that `train` would take, from a few steps of each stage on a model of its own."""
        trainer, total = self.trainer(arm), 0.0
        o = trainer.options
        stages = [(0, o.steps)] if o.route == "full" else [
            (0, o.warmup_steps), (o.warmup_steps, o.steps - o.warmup_steps)]
        for first, steps in stages:
            total += steps * seconds_per_step(trainer, first) if steps else 0
        self.look(trainer, 1)
        began = time.monotonic()
        self.look(trainer, 1)
        return total + BATCHES * (1 + len(arm.looks(self.size))) * (time.monotonic() - began)

    def zero_shot(self, arm: Arm) -> dict:
        """The dense model with the arm's selector, without any training of the two together."""
        model = Model(self.size.config).to(self.device)
        model.load_state_dict(self.weights["dense"])
        config = msa_config(model.config, Options())
        attend = listed(arm.choose(config, self.seed), config)
        return {"arm": f"{arm.name} on dense", "seed": self.seed, "step": 0, "end": False,
                **evaluate(model, attend, self.held_out, self.size, self.device)}


def seconds_per_step(trainer: Trainer, first: int) -> float:
    """Of the stage in which step `first` is: steps without a line of the log, and the share of one.

    Trains for five steps; the first of them may set up something.
    """
    every = trainer.options.log_every
    first = min(-(-first // every) * every, trainer.options.steps - 1)  # one with a line
    seconds = []
    for start, steps in ((first, 1), (first, 1), (first + 1, 3)):
        trainer.step, began = start, time.monotonic()
        trainer.run(min(start + steps, trainer.options.steps))
        seconds.append((time.monotonic() - began) / steps)
    _, line, plain = seconds
    return plain + max(0, line - plain) / every


def progress(name: str, trainer: Trainer) -> Callable[[int], None]:
    """Says at every line of the log how far a run is, and what a step takes."""
    began, before = time.monotonic(), 0

    def on_step(done: int) -> None:
        nonlocal began, before
        entry = trainer.log[-1]
        if entry["step"] == done - 1:
            now = time.monotonic()
            print(f"{name}: {done} of {trainer.options.steps}, {entry['stage']}: loss "
                  f"{entry['loss']:.4f}, kl {entry['kl']:.4f}, "
                  f"{1e3 * (now - began) / (done - before):.1f} ms a step",
                  file=sys.stderr, flush=True)
            began, before = now, done

    return on_step


def experiment(size: Size, seed: int, chosen: list[Arm], zero_shot: list[Arm], device: str = "cpu",
               *, deadline: float | None = None,
               report: Callable[[list[dict], list[str]], None] = lambda rows, not_run: None,
               ) -> list[dict]:
    """The rows of one seed, in the order of the arms; progress on stderr.

    deadline: of time.monotonic(); arms that would end later do not run. report: gets the rows so
    far, and why others are missing, after every arm.
    """
    runner, rows, not_run = Runner(size, seed, device), [], []

    def obstacle(arm: Arm) -> str | None:
        if arm.start and arm.start not in runner.weights:
            return f"starts from {arm.start}, which was not run"
        if deadline is None:
            return None
        needs, left = runner.estimate(arm), deadline - time.monotonic()
        return f"needs {needs:.0f} s, {max(0, left):.0f} s were left" if needs > left else None

    for arm in chosen:
        why = obstacle(arm)
        if why is None:
            try:
                rows += runner.train(arm)
            except (Diverged, NotImplementedError, torch.OutOfMemoryError) as error:
                why = str(error).partition("\n")[0]
        if why is None:
            said = f"{rows[-1]['accuracy']:.3f} ({rows[-1]['seconds']} s)"
        else:
            said = f"not run: {why}"
            not_run.append(f"{arm.name}, seed {seed}: {why}")
        print(f"seed {seed}: {arm.name}: {said}", file=sys.stderr, flush=True)
        report(rows, not_run)
        if arm.name == "dense" and why is None:
            rows += [runner.zero_shot(other) for other in zero_shot]
            report(rows, not_run)
    return rows


# ---- what is written -----------------------------------------------------------------------------


def by_arm(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of all seeds under one label, those of the dense model's selectors last."""
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["arm"].endswith("on dense")):
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
    colours: dict[str, tuple] = {}  # one per selector, dashed where it is on the dense model
    for label, group in by_arm(rows).items():
        untrained = label.endswith(" on dense")
        if group[0]["end"] or untrained:
            lines = torch.tensor([[float("nan") if x is None else x for x in row["by_distance"]]
                                  for row in group])
            colour = colours.setdefault(label.removesuffix(" on dense"),
                                        pyplot.get_cmap("tab20")(len(colours)))
            left.plot(range(1, 9), lines.nanmean(0), label=label, marker=".", color=colour,
                      linestyle="--" if untrained else "-")
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
    with whole_file(path) as file:
        drawing.savefig(file, format="png", dpi=90, metadata={"Software": None})


def machine(device: str) -> str:
    """Where and what: processor, threads, commit."""
    commit = ""
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, commit " + (
        commit or "unknown")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--size", choices=SIZES, default="miniature")
    add("--arms", type=lambda text: text.split(","), metavar="NAME,NAME,...",
        help="all, or files of arms/ in the order in which they run (the size's own choice)")
    add("--seeds", type=numbers, default=[0], help="numbers, separated by commas (0)")
    add("--minutes", type=float, help="that the whole run may take")
    add("--device", type=device_here, default="cpu", help="cpu or cuda")
    add("--output", type=Path, default=HERE / "results", help="folder (experiments/results)")
    add("--plot", type=Path, nargs="+", metavar="JSON",
        help="only draw what these files hold, beside the first")
    return made


def main() -> None:
    began, options = time.monotonic(), parser().parse_args()
    if options.minutes is not None and options.minutes <= 0:
        parser().error(f"--minutes: got {options.minutes}, expected more than 0")
    if options.plot:
        try:
            found = joined([read_found(path) for path in options.plot])
        except InputError as error:
            parser().error(f"--plot: {error}")
        draw(found, options.plot[0].with_suffix(""))
        return
    known, size = arms(), SIZES[options.size]
    names = options.arms or size.arms or ["all"]
    names = list(known) if "all" in names else names
    for place, name in enumerate(names):
        if name not in known:
            parser().error(f"--arms: got {name!r}, supported are {', '.join(known)}")
        start = known[name].start
        if start and start not in names[:place]:
            parser().error(f"--arms: got {name}, which starts from {start}: expected that before")
    chosen = [known[name] for name in names]
    zero_shot = [arm for arm in known.values() if arm.choose]
    deadline = began + 60 * options.minutes if options.minutes else None
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"facts-{options.size}"
    found = {"machine": machine(options.device), "size": options.size, "seeds": [], "seconds": 0,
             "steps": size.steps, "not_run": [], "rows": []}
    for seed in options.seeds:
        before, missing = found["rows"], found["not_run"]
        found["seeds"] = [*found["seeds"], seed]

        def report(rows: list[dict], not_run: list[str]) -> None:
            found.update(rows=before + rows, not_run=missing + not_run,
                         seconds=round(time.monotonic() - began))
            write_whole(stem.with_suffix(".json"), json.dumps(found) + "\n")

        experiment(size, seed, chosen, zero_shot, options.device, deadline=deadline, report=report)
    draw(found, stem)


def read_found(path: Path) -> dict:
    """What an experiment wrote."""
    found = read_json(path)
    names = ("machine", "size", "seeds", "seconds", "steps", "not_run", "rows")
    if not found.keys() >= set(names):
        raise InputError(f"{path}: not a result of this experiment, which has {', '.join(names)}")
    return found


def joined(parts: list[dict]) -> dict:
    """Several files as one: rows of all, in the order given."""
    machines = dict.fromkeys(part["machine"] for part in parts)
    seeds = dict.fromkeys(seed for part in parts for seed in part["seeds"])
    return parts[0] | {"machine": "; ".join(machines), "seeds": list(seeds),
                       **{name: sum((part[name] for part in parts), type(parts[0][name])())
                          for name in ("rows", "not_run", "seconds")}}


def draw(found: dict, stem: Path) -> None:
    """The table and, with matplotlib, the picture."""
    missing = "".join(f"\n- Not run: {line}." for line in found["not_run"])
    if missing:
        missing += "\n"
    text = (f"{found['machine']}; seeds {', '.join(map(str, found['seeds']))}; "
            f"{found['seconds']:.0f} s. Mean over the seeds (smallest to largest); "
            f"{found['steps']} steps from scratch.\n{missing}\n{table(found['rows'])}")
    write_whole(stem.with_suffix(".md"), text)
    try:
        picture(found["rows"], stem.with_suffix(".png"), f"facts in a stream, {found['size']}")
    except ImportError:
        print("no picture: matplotlib is not installed; --plot draws it", file=sys.stderr)
    print(text)


if __name__ == "__main__":
    main()
