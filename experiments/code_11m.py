"""Converts models/code-11m anew: its dense backbone gets a fresh index branch and is trained.

    python experiments/code_11m.py                  reduced, for two cores: some minutes
    python experiments/code_11m.py --size gpu --device cuda

The text is Python source of the packages that are installed here. `sample.txt`, the test text, is
from the standard library; so files that could be of it are left out, and counted. Then bits per
byte of the test text: full attention, the trained selection, the released model's, a fresh index
branch, and a window with the first block. Writes `results/code-11m-SIZE.md` and `.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from arm import arms
from facts import HERE, machine

from msa_cpp.train import storage
from msa_cpp.train.data import SEPARATOR, Text
from msa_cpp.train.model import Attend, Model, dense, listed
from msa_cpp.train.trainer import Options, Trainer, by_index, msa_config

MODEL = HERE.parent / "models" / "code-11m"
RUN = 10  # lines in a row that make two files related
SHORTEST = 256  # bytes of a file that is worth reading
SIZES = {
    "cpu": dict(steps=36, warmup_steps=24, batch=1, context=4096, contexts=(8192,), sequences=2),
    "gpu": dict(steps=3000, warmup_steps=1000, batch=4, context=16384, contexts=(8192, 16384),
                sequences=16, dtype="bf16"),
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
    paths = [p for p in library.rglob("*.py") if "site-packages" not in p.parts]
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
def bits_per_byte(model: Model, attend: Attend, context: int, sequences: int, device: str) -> float:
    """Mean over `sequences` pieces of the test text, far from each other."""
    text = (MODEL / "sample.txt").read_bytes()
    stride = (len(text) - context - 1) // max(1, sequences - 1) if sequences > 1 else 0
    total = 0.0
    for i in range(sequences):
        piece = torch.tensor(list(text[i * stride:i * stride + context + 1]), device=device)
        ends = torch.tensor([0, context], dtype=torch.int32, device=device)
        logits, _ = model(piece[:-1], ends, context, attend)
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:])) / math.log(2)
    return total / sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
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
    print(text_line, file=sys.stderr)

    config = storage.read_config(MODEL / "config.json")
    released, model = (Model(config, given.seed) for _ in range(2))
    storage.load_weights(released, MODEL)
    fresh = {name: p.detach().clone() for name, p in model.index_parameters().items()}
    model.load_state_dict(released.state_dict())
    model.load_state_dict(fresh, strict=False)  # the dense backbone, and a fresh index branch
    for each in (released, model):
        each.to(given.device)

    options = Options(route="msa-cpt", freeze="all", lr=1e-3, index_warmup_lr=1e-3, index_lr=5e-4,
                      lr_warmup=10, seed=given.seed, log_every=5, **size)
    attention = msa_config(config, options)
    selected = lambda: listed(by_index(attention), attention)
    window = listed(arms()["window + sink"].choose(attention, given.seed), attention)
    measure = lambda m, attend: [bits_per_byte(m, attend, n, sequences, given.device)
                                 for n in contexts]
    table = {"full attention": measure(released, dense),
             "window + sink": measure(released, window),
             "a fresh index branch": measure(model, selected()),
             "the released index branch": measure(released, selected())}
    where, began = machine(given.device), time.monotonic()
    trainer = Trainer(options, model, Text(texts, given.seed))
    trainer.on_step = lambda done: print(f"step {done}: {trainer.log[-1]}", file=sys.stderr) if (
        done % 10 == 1) else None
    trainer.run()
    seconds = time.monotonic() - began
    table["the index branch trained here"] = measure(model, selected())

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
    text = (f"{where}; seed {given.seed}; {options.steps} steps, {options.warmup_steps} of them "
            f"warm-up, {options.batch} x {options.context} tokens, {seconds:.0f} s; "
            f"{sequences} sequences per context.\n{text_line}\n\n" + "\n".join(lines) + "\n\n" +
            "\n".join(verdicts) + "\n")
    given.output.mkdir(parents=True, exist_ok=True)
    stem = given.output / f"code-11m-{given.size}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(
        {"machine": where, "left_out": counts, "contexts": contexts, "bits_per_byte": table,
         "log": trainer.log}) + "\n")
    print(text)


if __name__ == "__main__":
    main()
