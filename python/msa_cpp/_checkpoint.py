"""Checkpoints as directories of safetensors, read and written piece by piece.

Needs NumPy alone, which has no bf16: values are f32 in memory, and F32, BF16 or F16 in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._command import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PIECE_BYTES = 32 << 20
SHARD_BYTES = 4 << 30


STORAGE: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
}


def to_f32(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def from_f32(values: np.ndarray, dtype: str) -> np.ndarray:
    """To F32, or BF16 (to nearest, ties to even)."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class Tensor:
    """A tensor that comes in pieces: f32 arrays that follow each other in memory order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize

    def values(self) -> np.ndarray:
        """All of it, for vectors."""
        return np.concatenate([np.ravel(piece) for piece in self.pieces()]).reshape(self.shape)


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """(entries, metadata, where data begins) of a safetensors file; every entry lies inside it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = (
                json.loads(file.read(length)) if length <= size - 8 else {"": None}
            )
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            count = math.prod(entry["shape"])
            item = STORAGE[entry["dtype"]].itemsize if entry["dtype"] in STORAGE else None
            if not 0 <= begin <= end <= size - 8 - length or item and end - begin != count * item:
                raise InputError(
                    f"{path}: tensor {name}: its bytes do not fit its shape or the file"
                )
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a safetensors file") from None
    return header, metadata, 8 + length


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


class Checkpoint:
    """The tensors of model.safetensors, or of the shards that its index names."""

    def __init__(self, directory: Path) -> None:
        if (directory / INDEX_FILE).exists():
            shards = read_json(directory / INDEX_FILE).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(s, str) and s == Path(s).name for s in shards.values()
            ):
                raise InputError(
                    f"{directory / INDEX_FILE}: expected a weight_map of plain file names"
                )
            files = sorted(set(shards.values()))
        elif (directory / SINGLE_FILE).exists():
            shards, files = None, [SINGLE_FILE]
        else:
            raise InputError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
        self._entries: dict[str, tuple[Path, int, dict]] = {}
        self.taken: set[str] = set()
        for name in files:
            path = directory / name
            entries, _, data = read_header(path)
            for key, entry in entries.items():
                if shards is not None and shards.get(key, name) != name:
                    continue  # the index places it in another shard
                if key in self._entries:
                    raise InputError(
                        f"tensor {key}: given twice, by {self._entries[key][0]} and by {path}"
                    )
                self._entries[key] = (path, data + entry["data_offsets"][0], entry)
        for key in shards or ():
            if key not in self._entries:
                raise InputError(
                    f"{directory}: tensor {key}: missing, though {INDEX_FILE} lists it"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name`, whose shape must be the given one and whose values must be finite."""
        if name not in self._entries:
            raise InputError(f"tensor {name}: missing in the checkpoint")
        path, begin, entry = self._entries[name]
        dtype = entry["dtype"]
        if dtype not in STORAGE:
            raise InputError(f"tensor {name}: dtype: got {dtype}, supported are F32, BF16 and F16")
        if tuple(entry["shape"]) != shape:
            raise InputError(f"tensor {name}: shape: got {entry['shape']}, expected {list(shape)}")
        self.taken.add(name)
        count, step = math.prod(shape), PIECE_BYTES // STORAGE[dtype].itemsize

        def pieces() -> Iterator[np.ndarray]:
            for first in range(0, count, step):
                size = min(step, count - first)
                at = begin + first * STORAGE[dtype].itemsize
                values = to_f32(np.fromfile(path, STORAGE[dtype], size, offset=at), dtype)
                if len(values) != size:
                    raise InputError(f"{path}: ends inside tensor {name}")
                if not np.isfinite(values).all():
                    raise InputError(f"{path}: tensor {name}: holds NaN or infinity")
                yield values

        return Tensor(dtype, shape, pieces)


def write_checkpoint(
    directory: Path,
    tensors: dict[str, Tensor],
    on_bytes: Callable[[int], None] = lambda done: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the tensors in their order: one file, or shards of up to shard_bytes and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in shard.items():
            offsets = [end, end := end + tensor.nbytes]
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for tensor in shard.values():
                for piece in tensor.pieces():
                    out.write(from_f32(piece, tensor.dtype).data)
                    on_bytes(piece.size * STORAGE[tensor.dtype].itemsize)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
