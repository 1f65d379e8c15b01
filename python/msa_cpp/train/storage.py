"""Checkpoints of a run: `OUTPUT/step-N`, complete or not there.

    config.json, model*.safetensors   the model, as `msa eval` and transformers load it (f32)
    optimizer/                        AdamW's state, tensors named after the weights
    state.json                        the step, the options and the inputs of the run
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from torch import nn

from .._checkpoint import Checkpoint, Tensor, read_json, write_checkpoint
from .._command import InputError
from .._config import check_fixed, m3_config, reading
from .._files import whole_folder
from .model import Config, Model

STEP = re.compile(r"step-(\d{8})")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one weight


def steps(output: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    found = output.iterdir() if output.is_dir() else ()
    return sorted(int(m[1]) for p in found if (m := STEP.fullmatch(p.name)))


def directory(output: Path, step: int) -> Path:
    return output / f"step-{step:08}"


def save(output: Path, step: int, model: Model, optimizer: torch.optim.Optimizer, run: dict,
         keep: int) -> None:
    """Writes step-N under another name, then renames it; then removes all but the last `keep`.
    run: what state.json says besides the step.

    Whatever goes wrong before (a full disk: OSError) leaves the older checkpoints as they were.
    """
    with whole_folder(directory(output, step), replace=True) as partial:
        parameters = dict(model.named_parameters())
        write_checkpoint(partial, {name: stored(p) for name, p in parameters.items()})
        (partial / "optimizer").mkdir()
        write_checkpoint(partial / "optimizer", {
            f"{name}.{moment}": stored(value)
            for name, p in parameters.items() for moment, value in optimizer.state[p].items()
        } if optimizer.state else {})
        config = {k: v for k, v in model.config.items() if k != "torch_dtype"}
        for name, value in (("config", config | {"dtype": "float32"}),
                            ("state", {"step": step, **run})):
            (partial / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    for old in steps(output)[:-keep]:
        shutil.rmtree(directory(output, old))


def remove_partial(output: Path) -> None:
    """Removes what a run left that was killed while it saved."""
    for path in output.glob(".step-*"):
        shutil.rmtree(path)


def stored(values: torch.Tensor) -> Tensor:
    rows = values.detach().reshape(values.shape or (1,))
    return Tensor("F32", tuple(rows.shape), lambda: iter([rows.cpu().numpy()]))


def read_config(path: Path) -> Config:
    """Of a model that this trainer makes, complete. InputError names file and key."""
    with reading(path):
        config = m3_config(read_json(path))
        check_fixed(config, {"attention_dropout": (0,)})
    return config


def load_weights(model: nn.Module, path: Path) -> bool:
    """Fills the model. True if the checkpoint had an index branch; else the model's stays fresh."""
    checkpoint = Checkpoint(path)
    has_index = any(".indexer." in name for name in checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".indexer." in name and not has_index:
                continue
            values = checkpoint.take(name, tuple(parameter.shape)).values()
            parameter.copy_(torch.from_numpy(values))
    if extra := sorted(set(checkpoint) - checkpoint.taken):
        raise InputError(f"{path}: tensor {extra[0]}: no part of the model that is trained")
    return has_index


def load_optimizer(model: Model, optimizer: torch.optim.Optimizer, path: Path) -> None:
    checkpoint = Checkpoint(path / "optimizer")
    for name, parameter in model.named_parameters():
        if f"{name}.step" not in checkpoint:
            continue  # frozen so far
        shapes = dict.fromkeys(MOMENTS, tuple(parameter.shape)) | {"step": (1,)}
        state = {moment: torch.from_numpy(checkpoint.take(f"{name}.{moment}", shape).values())
                 for moment, shape in shapes.items()}
        state["step"] = state["step"].reshape(())
        optimizer.state[parameter] = {m: x.to(parameter.device) for m, x in state.items()}
