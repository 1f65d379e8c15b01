"""Trains a small MiniMax-M3-shaped model with MSA.

    python -m msa_cpp.train --route msa-pt --data facts --output run
    python -m msa_cpp.train --route full --data TEXTS --config config.json --output dense
    python -m msa_cpp.train --route msa-cpt --init dense/step-00000400 --data TEXTS --output sparse
    torchrun --nproc-per-node 2 -m msa_cpp.train --route msa-pt --data facts --output run

Routes: `full` trains with full attention and leaves the index branch alone. `msa-pt` trains both
from scratch: --warmup-steps with full attention in both branches, then sparse. `msa-cpt` starts
from a checkpoint (--init), whose backbone rests during the warm-up. docs/training.md says more.

The output folder gets log.jsonl and step-N/: checkpoints that `msa eval` and transformers load. A
killed run goes on with --resume and the same command, bit for bit as if it had not been killed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as distributed

from .._checkpoint import read_json
from .._command import InputError, Parser, device_here, exit_code
from ..convert import NO_LIMIT
from . import storage
from .data import Facts, Source, Text, read_folder
from .model import MINIATURE, Config, Model
from .trainer import ROUTES, Options, Trainer

HELP = {
    "steps": "optimiser steps of the run",
    "warmup_steps": "of these, with full attention in both branches",
    "batch": "windows per process and micro step",
    "context": "tokens of a window",
    "accumulate": "micro steps per optimiser step, weighted by their targets",
    "lr": "peak learning rate; a linear start, then a cosine down to a tenth",
    "index_lr": "that of the index branch (as --lr)",
    "index_warmup_lr": "that of the index branch during the warm-up, held (as --index-lr)",
    "lr_warmup": "steps of the linear start",
    "weight_decay": "of the backbone's matrices; the index branch has none",
    "clip": "largest gradient norm of the backbone",
    "index_clip": "largest gradient norm of the index branch",
    "kl_weight": "lambda, the weight of the KL loss",
    "save_every": "steps between checkpoints",
    "keep": "checkpoints that are kept",
    "log_every": "steps between lines of the log",
    "seed": "of weights and data",
}
CHOICES = {
    "kl_support": (("selected", "full"), "tokens that the KL loss of the sparse stage compares"),
    "kl_reduction": (("mean", "sum"), "of the KL loss over the sparse layers"),
    "freeze": (("none", "warmup", "all"),
               "stages in which only the index branch learns (msa-cpt: warmup, others: none)"),
    "dtype": (("f32", "bf16"), "of products and activations; weights are f32"),
}
LEAST = {
    **dict.fromkeys(("steps", "batch", "accumulate", "save_every", "keep", "log_every"), 1),
    "context": 2,  # a token is judged by what stands before it
    **dict.fromkeys(("lr", "index_lr", "index_warmup_lr", "lr_warmup", "weight_decay", "clip",
                     "index_clip", "kl_weight", "seed"), 0),
}
FREE = ("save_every", "keep", "log_every")  # may change when a run goes on


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m msa_cpp.train", description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    defaults = {field.name: field.default for field in fields(Options)}
    flag = lambda name: "--" + name.replace("_", "-")
    add("--route", choices=ROUTES, required=True)
    add("--data", required=True, help='"facts" (generated), or a folder whose files are texts')
    add("--output", required=True, type=Path, help="folder of the run")
    add("--config", type=Path, help="config.json of the model (that of --init; else a miniature)")
    add("--init", type=Path, metavar="CHECKPOINT", help="weights to start from")
    add("--resume", action="store_true",
        help="go on from the last checkpoint of the output; what makes another run is refused")
    for name, text in HELP.items():
        default = defaults[name]
        add(flag(name), type=float if default is None else type(default), default=default,
            help=text if default is None else f"{text} ({default})")
    for name, (values, text) in CHOICES.items():
        add(flag(name), choices=values, default=defaults[name], help=text)
    add("--no-detach", dest="detach_input", action="store_false",
        help="the KL loss reaches the backbone through the input of the index branch")
    add("--no-force-local", dest="force_local", action="store_false",
        help="a query's own block must win its place")
    add("--activation-checkpointing", action="store_true", help="less memory, a second forward")
    add("--device", type=device_here, default="cpu", help="cpu or cuda")
    add("--quiet", action="store_true", help="no progress bar on the terminal")
    return made


def checked(arguments: argparse.Namespace) -> Options:
    """The options of the run; InputError names the flag."""
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    for name, least in LEAST.items():
        given = getattr(options, name)
        limit, said = (2**63, "2^63") if isinstance(given, int) else (math.inf, "infinity")
        if given is not None and not least <= given < limit:  # no comparison holds for NaN
            raise InputError(f"--{name.replace('_', '-')}: got {given}, expected at least {least} "
                             f"and less than {said}")
    if options.route != "full" and not 0 <= options.warmup_steps <= options.steps:
        raise InputError(f"--warmup-steps: got {options.warmup_steps}, expected 0 to "
                         f"{options.steps}, the steps")
    if options.route == "full" and options.freeze == "all":
        raise InputError("--freeze: got all, but route full trains nothing else than the backbone")
    if options.route == "msa-cpt" and arguments.init is None and not arguments.resume:
        raise InputError("--init: not given, expected a checkpoint: route msa-cpt converts one")
    return options


def source(name: str, seed: int) -> Source:
    return Facts(seed) if name == "facts" else Text(read_folder(name), seed)


def starting_model(arguments: argparse.Namespace, resumed: Path | None) -> Model:
    """With the weights that the run begins with."""
    weights = resumed or arguments.init
    path = resumed / "config.json" if resumed else arguments.config or (
        arguments.init and arguments.init / "config.json")
    config: Config = storage.read_config(path) if path else MINIATURE
    model = Model(config, arguments.seed)
    if weights:
        if model.config["swiglu_limit"] == NO_LIMIT and arguments.freeze != "all":
            raise InputError(f"--freeze: got {arguments.freeze or 'nothing'}, expected all: "
                             f"{weights} comes from msa_cpp.convert, and its weights carry factors "
                             "of 2^40 that AdamW's steps do not follow")
        storage.load_weights(model, weights)
    return model


def inputs_of(arguments: argparse.Namespace, data: Source, processes: int) -> dict:
    """What a run is made of besides its options."""
    return {"data": arguments.data, "sha256": getattr(data, "sha256", None),
            "init": arguments.init and str(arguments.init.resolve()), "processes": processes}


def check_resumed(options: Options, inputs: dict, config: Path | None, path: Path) -> None:
    """Raises InputError, which names the flag, where a run would go on as another one."""
    state = read_json(path / "state.json")
    before, began = state.get("options", {}), state.get("inputs", {})

    def refuse(flag: str, given: object, was: object) -> None:
        raise InputError(f"{flag}: got {given}, but the run began with {was}")

    for field in fields(Options):
        given, was = getattr(options, field.name), before.get(field.name)
        if field.name not in FREE and given != was:
            refuse(f"--{field.name.replace('_', '-')}", given, was)
    if began:
        if inputs["sha256"] != began["sha256"]:
            other = " of other contents" if inputs["data"] == began["data"] else ""
            refuse("--data", inputs["data"], began["data"] + other)
        if inputs["init"] not in (None, began["init"]):
            refuse("--init", inputs["init"], began["init"])
        if inputs["processes"] != began["processes"]:
            refuse("processes", inputs["processes"], began["processes"])
    if config:
        given, was = (storage.read_config(p) | {"dtype": "float32"}
                      for p in (config, path / "config.json"))
        given.pop("torch_dtype", None)
        for key in sorted(given.keys() | was.keys()):
            if given.get(key) != was.get(key):
                refuse(f"--config: {key}", given.get(key), was.get(key))


def run(command: list[str] | None) -> str:
    arguments = parser().parse_args(command)
    options = checked(arguments)
    output = arguments.output
    if "RANK" in os.environ:  # torchrun
        if arguments.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    rank, processes = 0, 1
    if distributed.is_initialized():
        rank, processes = distributed.get_rank(), distributed.get_world_size()

    found = storage.steps(output)
    if arguments.resume and not found:
        raise InputError(f"{output}: holds no checkpoint to resume")
    if found and not arguments.resume:
        raise InputError(f"{output}: holds a run already: give --resume or another folder")
    resumed = storage.directory(output, found[-1]) if found else None
    data = source(arguments.data, options.seed)
    inputs = inputs_of(arguments, data, processes)
    if resumed:
        check_resumed(options, inputs, arguments.config, resumed)
    model = starting_model(arguments, resumed)
    if data.vocab_size > model.config["vocab_size"]:
        raise InputError(f"vocab_size: got {model.config['vocab_size']}, expected at least "
                         f"{data.vocab_size} for {arguments.data}")
    if options.route != "full" and not model.index_parameters():
        raise InputError("layer_types: got full attention in every layer, expected sparse ones for "
                         f"route {options.route}: give a --config")
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options, model.to(arguments.device), data, output=output,
                      inputs=inputs)
    if sys.stderr.isatty() and not arguments.quiet and rank == 0:
        trainer.on_step = lambda done: draw_progress(done, trainer)
    if resumed:
        trainer.resume()
    elif rank == 0:
        (output / "log.jsonl").unlink(missing_ok=True)  # of a run without a checkpoint
    try:
        trainer.run()
    except NotImplementedError as error:  # no backend computes this, and why
        raise InputError(str(error)) from None
    last = trainer.log[-1] if trainer.log else {}
    figures = ", ".join(f"{name} {last[name]:.4f}" for name in ("loss", "kl") if name in last)
    return f"{storage.directory(output, trainer.step)}: {figures or 'finished before'}"


def draw_progress(done: int, trainer: Trainer) -> None:
    steps = trainer.options.steps
    loss = f" loss {trainer.log[-1]['loss']:.4f}" if trainer.log else ""
    bar = f"[{'#' * (40 * done // steps):40}] {done} of {steps}, {trainer.stage()}{loss}"
    print(f"\r\033[K{bar}" if done < steps else "\r\033[K", end="", file=sys.stderr, flush=True)


def main(command: list[str] | None = None) -> int:
    try:
        return exit_code("msa_cpp.train", lambda: run(command))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
