"""Converts models/code-11m anew: its dense backbone gets a fresh index branch and is trained.

    python experiments/code_11m.py                  reduced, for two cores: some minutes
    python experiments/code_11m.py --size gpu --device cuda --minutes 9

The text is Python source of the packages that are installed here. `sample.txt`, the test text, is
from the standard library; so files that could be of it are left out, and counted. Then bits per
byte of the test text: full attention, the trained selection, the released model's, a fresh index
branch, and a window with the first block. Writes `results/code-11m-SIZE.md` and `.json`, the latter
every minute. With --minutes the schedule gets as many steps, up to the size's own, as fit into the
time that is left after a few steps of each stage were tried.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import torch
from arm import arms
from facts import HERE, machine, progress, seconds_per_step

from msa_cpp._command import device_here
from msa_cpp._files import write_whole
from msa_cpp.train import storage
from msa_cpp.train.data import SEPARATOR, Text
from msa_cpp.train.model import Attend, Model, dense, listed
from msa_cpp.train.trainer import Options, Trainer, by_index, msa_config

MODEL = HERE.parent / "models" / "code-11m"
RUN = 10  # lines in a row that make two files related
SHORTEST = 256  # bytes of a file that is worth reading
SIZES = {
    "cpu": dict(steps=36, warmup_steps=24, batch=1, context=4096, contexts=(8192,), sequences=2,
                log_every=5),
    "gpu": dict(steps=6000, warmup_steps=2000, batch=4, context=16384, contexts=(8192, 16384),
                sequences=16, dtype="bf16", log_every=200),
    "smoke": dict(steps=2, warmup_steps=1, batch=1, context=2304, contexts=(2304,), sequences=1),
}


# ---- text ----------------------------------------------------------------------------------------


def runs(text: bytes) -> set[bytes]:
    """Digests of every RUN lines in a row, without blanks."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {hashlib.sha256(b"\n".join(lines[i:i + RUN])).digest()[:12]
            for i in range(len(lines) - RUN + 1)}


def training_texts(folder: Path, limit: int) -> tuple[list[bytes], dict[str, int]]:
    """Sources below `folder` that are none of the standard library's, and how many were.

    Left out by name: files whose path ends like that of a module (random.py, json/decoder.py).
    By content: files that equal one of the library or of the test text, or share RUN lines in a
    row with one.
    """
    library = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    paths = [p for p in library.rglob("*.py") if installed.isdisjoint(p.parts)]
    names = {p.relative_to(library).as_posix() for p in paths}
    tests = (MODEL / "sample.txt").read_bytes().split(bytes([SEPARATOR]))
    known = [*(p.read_bytes() for p in paths), *tests]
    whole = {hashlib.sha256(text).digest() for text in known}
    parts = set().union(*map(runs, known))

    texts, seen, size = [], set(), 0
    counts = dict.fromkeys(("by name", "by hash of the file", "by shared lines", "copies"), 0)
    order = lambda p: hashlib.sha256(p.relative_to(folder).as_posix().encode()).digest()
    for path in sorted(folder.rglob("*.py"), key=order):  # a mixture, the same one everywhere
        relative, text = path.relative_to(folder).parts, path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if len(text) < SHORTEST:
            continue
        if any("/".join(relative[i:]) in names for i in range(len(relative))):
            counts["by name"] += 1
        elif digest in whole:
            counts["by hash of the file"] += 1
        elif runs(text) & parts:
            counts["by shared lines"] += 1
        elif digest in seen:
            counts["copies"] += 1
        else:
            seen.add(digest)
            texts.append(text)
            size += len(text)
        if size > limit:
            break
    return texts, counts


# ---- test ----------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: Model, attend: Attend, context: int, sequences: int, dtype: str) -> float:
    """Mean over `sequences` pieces of the test text, far from each other; dtype of products."""
    device = model.lm_head.weight.device
    text = (MODEL / "sample.txt").read_bytes()
    stride = (len(text) - context - 1) // max(1, sequences - 1) if sequences > 1 else 0
    total = 0.0
    for i in range(sequences):
        piece = torch.tensor(list(text[i * stride:i * stride + context + 1]), device=device)
        ends = torch.tensor([0, context], dtype=torch.int32, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            logits, _ = model(piece[:-1], ends, context, attend)
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:])) / math.log(2)
    return total / sequences


def fitted(options: Options, model: Model, source: Text, seconds: float) -> tuple[Options, dict]:
    """The schedule with as many steps as fit, and the measured seconds of a step of each stage."""
    trainer = Trainer(options, copy.deepcopy(model), source)
    share = options.warmup_steps / options.steps
    warmup, sparse = (seconds_per_step(trainer, n) for n in (0, options.warmup_steps))
    steps = min(options.steps, int(seconds / (share * warmup + (1 - share) * sparse)))
    return (replace(options, steps=max(2, steps), warmup_steps=max(1, round(share * steps))),
            {"warmup": warmup, "sparse": sparse})


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--device", type=device_here, default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, help="that the whole run may take")
    parser.add_argument("--texts", type=Path, default=Path(sysconfig.get_path("purelib")),
                        help="folder of Python sources (the installed packages)")
    parser.add_argument("--megabytes", type=int, default=64, help="of text to use (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    given = parser.parse_args()
    size = dict(SIZES[given.size])
    contexts, sequences = size.pop("contexts"), size.pop("sequences")

    texts, counts = training_texts(given.texts, given.megabytes << 20)
    left_out = ", ".join(f"{n} {why}" for why, n in counts.items())
    text_line = (f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB of Python source; left "
                 f"out: {left_out}.")
    print(text_line, file=sys.stderr, flush=True)
    source = Text(texts, given.seed)

    config = storage.read_config(MODEL / "config.json")
    released, model = (Model(config, given.seed) for _ in range(2))
    storage.load_weights(released, MODEL)
    fresh = {name: p.detach().clone() for name, p in model.index_parameters().items()}
    model.load_state_dict(released.state_dict())
    model.load_state_dict(fresh, strict=False)  # the dense backbone, and a fresh index branch
    for each in (released, model):
        each.to(given.device)

    options = Options(route="msa-cpt", freeze="all", lr=1e-3, index_warmup_lr=1e-3, index_lr=5e-4,
                      lr_warmup=10, seed=given.seed, **size)
    attention = msa_config(config, options)
    selected = lambda: listed(by_index(attention), attention)
    window = listed(arms()["window"].choose(attention, given.seed), attention)
    measure = lambda m, attend: [bits_per_byte(m, attend, n, sequences, options.dtype)
                                 for n in contexts]
    found = {"machine": machine(given.device), "left_out": counts, "contexts": contexts,
             "bits_per_byte": {}}
    given.output.mkdir(parents=True, exist_ok=True)
    stem = given.output / f"code-11m-{given.size}"

    def keep(**more: object) -> None:
        found.update(more, seconds=round(time.monotonic() - began))
        write_whole(stem.with_suffix(".json"), json.dumps(found) + "\n")

    table = found["bits_per_byte"]
    for name, m, attend in (("full attention", released, dense),
                            ("window + sink", released, window),
                            ("a fresh index branch", model, selected()),
                            ("the released index branch", released, selected())):
        start = time.monotonic()
        table[name] = measure(m, attend)
        keep()
    if given.minutes:
        last = 2 * (time.monotonic() - start) + 5  # for the evaluation at the end
        options, per_step = fitted(options, model, source, began + 60 * given.minutes - last -
                                   time.monotonic())
        keep(seconds_per_step=per_step)
    keep(steps=options.steps, warmup_steps=options.warmup_steps)

    trainer, kept = Trainer(options, model, source), time.monotonic()
    say = progress("code-11m", trainer)

    def on_step(done: int) -> None:
        nonlocal kept
        say(done)
        if time.monotonic() - kept > 60:
            kept = time.monotonic()
            keep(log=trainer.log)

    trainer.on_step, start = on_step, time.monotonic()
    trainer.run()
    seconds = time.monotonic() - start
    table["the index branch trained here"] = measure(model, selected())
    keep(log=trainer.log)

    dense_bits = table["full attention"]
    lines = [f"| bits per byte of sample.txt | {' | '.join(f'{n}, gap' for n in contexts)} |",
             "|---" * (1 + len(contexts)) + "|"]
    for name, bits in table.items():
        cells = (f"{b:.4f}, {b - d:+.4f}" for b, d in zip(bits, dense_bits))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    verdicts, met = [], {True: "met", False: "missed"}
    for i, n in enumerate(contexts):
        gap = table["the index branch trained here"][i] - dense_bits[i]
        control = table["window + sink"][i] - dense_bits[i]
        verdicts.append(f"At {n} the gap is {gap:+.4f} (goal: at most 0.005: {met[gap <= 0.005]}) "
                        f"beside {control:+.4f} of the window (goal: less than half of it: "
                        f"{met[gap < control / 2]}).")
    text = (f"{found['machine']}; seed {given.seed}; {options.steps} steps, {options.warmup_steps} "
            f"of them warm-up, {options.batch} x {options.context} tokens, {seconds:.0f} s; "
            f"{sequences} sequences per context.\n{text_line}\n\n" + "\n".join(lines) + "\n\n" +
            "\n".join(verdicts) + "\n")
    write_whole(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
