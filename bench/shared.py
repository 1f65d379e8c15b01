"""What the programs of this folder share. The package need not be built for it."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
write_whole = runpy.run_path(str(ROOT / "python/msa_cpp/_files.py"))["write_whole"]


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=1) + "\n")


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"
