"""Files and folders that are whole or not there: another name first, then a rename.

Imports nothing of the package: scripts that run without it load this file by its path.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError that names no file, as those of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file in the folder of `path`, which takes its name when the block ends without error.

    After an error it is removed, and what `path` named before is whole. Symbolic links are followed
    and permissions kept. Devices, pipes and the file that is stdout or stderr are written directly.
    """
    path = Path(path)
    with naming(path):
        if path.exists() and not _is_replaceable(path):
            with _direct(path) as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        file = _create_beside(target)
        try:
            with file:
                if target.exists():
                    os.chmod(file.name, target.stat().st_mode & 0o7777)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def write_whole(path: str | os.PathLike, text: str) -> None:
    """`text` as the contents of `path`, by `whole_file`."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder beside `path` (its name with a dot in front and an ending), then renamed to it.

    After an error it is removed. With `replace` an older folder of that name makes place, else it
    is an OSError.
    """
    with naming(path):
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            partial.chmod(0o755)  # mkdtemp's is private
            yield partial
            for file in (*partial.rglob("*"), partial):
                _sync(file)
            if replace:
                shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _is_replaceable(path: Path) -> bool:
    return path.is_dir() or path.is_file() and _own_descriptor(path) is None


def _own_descriptor(path: Path) -> int | None:
    """stdout's or stderr's, if `path` is the same file."""
    for descriptor in (1, 2):
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except OSError:  # the process has no such stream
            continue
    return None


def _direct(path: Path) -> BinaryIO:
    own = _own_descriptor(path)
    return path.open("wb") if own is None else os.fdopen(os.dup(own), "wb")


def _create_beside(target: Path) -> BinaryIO:
    for number in itertools.count():
        try:
            return (target.parent / f".msa-{os.getpid()}-{number}.tmp").open("xb")
        except FileExistsError:
            continue
        except OSError as error:  # for `naming`: the user knows the target alone
            raise OSError(error.errno, error.strerror) from None
    raise AssertionError


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
