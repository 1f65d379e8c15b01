#!/usr/bin/env python3
"""Counts of the tree: prints them, and ends with 1 where one is over its limit.

    dev/counts.py                   this tree
    dev/counts.py --at 03dc165      an older commit, beside it
    dev/counts.py index_lse         the files that name an operator

Lines are those of C++, CUDA, C, Python, shell, CMake and make, blank ones and comments included.
tests/, the conformance suite and the emulator are tests; c_ops.h is printed by a program. A family
of src/cuda/sm90 is a folder with a launch.cu.
"""

import argparse
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".cc", ".h", ".cu", ".cuh", ".c", ".py", ".pyi", ".sh", ".cmake"}
NAMES = {"CMakeLists.txt", "Makefile"}
TESTS = {"tests", "conformance", "emulator"}  # folders, wherever they lie
GENERATED = "include/msa/c_ops.h"
MOST_IN_A_FILE, MOST_IN_README, MOST_IN_HEADERS = 500, 170, 900


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def read(commit):
    """{path: text} of the sources and the README; of this tree where there is no commit."""
    def wanted(path):
        path = PurePosixPath(path)
        return path.suffix in SUFFIXES or path.name in NAMES or str(path) == "README.md"

    if commit is None:
        paths = git("ls-files", "--cached", "--others", "--exclude-standard").decode().splitlines()
        paths = [path for path in paths if wanted(path) and (ROOT / path).is_file()]
        return {path: (ROOT / path).read_text() for path in paths}
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as tar:
        return {entry.name: tar.extractfile(entry).read().decode() for entry in tar
                if entry.isfile() and wanted(entry.name)}


def lines(text):
    return text.count("\n")


def sources(tree):
    """Those that are no tests."""
    return {path: text for path, text in tree.items()
            if path not in (GENERATED, "README.md") and TESTS.isdisjoint(path.split("/"))}


def includes_between_families(tree):
    """["FILE includes FILE"] from one family of src/cuda/sm90 to another."""
    families = {path.split("/")[3] for path in tree
                if re.fullmatch(r"src/cuda/sm90/\w+/launch\.cu", path)}
    found = []
    for path, text in tree.items():
        own = path.removeprefix("src/cuda/sm90/").split("/")[0]
        if path.startswith("src/cuda/sm90/") and own in families:
            found += [f"{path} includes {other}"
                      for other in re.findall(r'#include "(cuda/sm90/[^"]+)"', text)
                      if other.split("/")[2] in families - {own}]
    return found


def counts(tree):
    """{what: (number, limit or None, what is over it)}"""
    own = sources(tree)
    headers = {path: text for path, text in own.items() if path.startswith("include/")}
    long = [f"{path}: {lines(text)}" for path, text in own.items() if lines(text) > MOST_IN_A_FILE]
    between = includes_between_families(own)
    return {
        "lines without tests": (sum(map(lines, own.values())), None, []),
        f"files above {MOST_IN_A_FILE} lines": (len(long), 0, long),
        "includes between sm90 families": (len(between), 0, between),
        "lines of README.md": (lines(tree["README.md"]), MOST_IN_README, []),
        "lines of public headers": (sum(map(lines, headers.values())), MOST_IN_HEADERS, []),
    }


def naming(tree, op):
    """The sources that name an operator as index_lse, IndexLse or kIndexLse."""
    camel = "".join(word.capitalize() for word in op.split("_"))
    name = re.compile(rf"(?<![a-z0-9]){op}(?![a-z0-9_])|{camel}(?![a-z])")
    return [path for path, text in sorted(sources(tree).items()) if name.search(text)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="?", help="an operator, to list the files that name it")
    parser.add_argument("--at", metavar="COMMIT", help="an older tree, for comparison")
    options = parser.parse_args()
    tree = read(None)
    before = read(options.at) if options.at else None
    if options.op:
        paths = naming(tree, options.op)
        print(*paths, sep="\n")
        then = f"; {len(naming(before, options.op))} at {options.at}" if before else ""
        print(f"{len(paths)} sources name {options.op}{then}")
        return 0 if paths else f"counts: no source names {options.op}"
    now, then, failed = counts(tree), counts(before) if before else {}, False
    for what, (number, limit, over) in now.items():
        failed = failed or (limit is not None and number > limit)
        most = "" if limit is None else f"  (at most {limit})"
        older = f"  {then[what][0]:6} at {options.at}" if then else ""
        print(f"{number:6} {what}{most}{older}")
        for line in over:
            print(f"       {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
