"""Every file that the Python programs write is whole or as it was: full disks, pipes, links."""

import ast
import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from msa_cpp._files import whole_file, whole_folder, write_whole

ROOT = Path(__file__).resolve().parents[2]
OLD = b"old" * 100


@contextlib.contextmanager
def small_disk(size=100):
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_whole_file_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "ä")
    assert path.read_bytes() == "ä".encode()
    path.chmod(0o640)
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == "ä".encode(), "the old one until the end"
    assert tree(tmp_path) == {Path("a.json"): b"new"} and path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("old", [None, OLD])
def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, old):
    path = tmp_path / "a.json"
    if old:
        path.write_bytes(old)
    before = tree(tmp_path)
    with small_disk(), pytest.raises(OSError, match=r"File too large: .*a\.json"):
        write_whole(path, "x" * 1000)
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(OSError, match="no/a.json"):
        write_whole(tmp_path / "no/a.json", "x")
    assert tree(tmp_path) == before


def test_links_stay_and_devices_and_pipes_are_written(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    link.symlink_to("target")  # which is not there yet
    write_whole(link, "new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    os.mkfifo(pipe)
    seen = []
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, "through")
    reader.join(60)
    assert seen == [b"through"]
    write_whole("/dev/null", "x")
    assert Path("/dev/null").is_char_device()
    code = ("from msa_cpp._files import write_whole\nprint('a', flush=True)\n"
            "write_whole('/dev/stdout', 'b\\n')\nprint('c')")
    with (tmp_path / "stdout").open("wb") as stdout:  # a regular file behind a descriptor
        subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True)
    assert (tmp_path / "stdout").read_text() == "a\nb\nc\n"


def test_a_whole_folder_takes_the_place_of_the_old_if_told(tmp_path):
    path = tmp_path / "out"
    with whole_folder(path) as partial:
        (partial / "a").write_bytes(b"1")
        assert not path.exists()
    assert tree(tmp_path) == {Path("out/a"): b"1"} and path.stat().st_mode & 0o777 == 0o755
    with pytest.raises(OSError), whole_folder(path) as partial:
        (partial / "a").write_bytes(b"2")
    with small_disk(), pytest.raises(OSError, match="File too large"):
        with whole_folder(path, replace=True) as partial:
            (partial / "a").write_bytes(OLD)
    assert tree(tmp_path) == {Path("out/a"): b"1"}
    with whole_folder(path, replace=True) as partial:
        (partial / "b").write_bytes(b"3")
    assert tree(tmp_path) == {Path("out/b"): b"3"}


# --- the programs ---------------------------------------------------------------------------------

def picture(path):
    import numpy as np

    plot = pytest.importorskip("msa_cpp.plot", reason="matplotlib is not installed")
    plot.save(plot.selection(np.zeros((1, 64, 1), np.int32), 8), path)


def bench(option):
    def write(path):
        module = pytest.importorskip("msa_cpp.bench", reason="torch is not installed")
        module.body(["--device", "cpu", "--shape", "4,2", "--topk", "3", "--repeats", "2",
                     "--context", "256", "--contenders", "msa", option, str(path)])

    return write


@pytest.mark.parametrize("write", [picture, bench("--json"), bench("--tsv")],
                         ids=["picture", "bench --json", "bench --tsv"])
def test_programs_leave_the_old_file(tmp_path, write):
    path = tmp_path / "result.png"
    path.write_bytes(OLD)
    write(path)
    assert path.read_bytes() != OLD and path.stat().st_size > 100
    path.write_bytes(OLD)
    with small_disk(), pytest.raises(OSError, match=r"File too large: .*result\.png"):
        write(path)
    assert tree(tmp_path) == {Path("result.png"): OLD}


def test_scripts_without_the_package_leave_the_old_file(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "runs/check_a.json").write_text(json.dumps(
        {"passed": 1, "failed": 0, "skipped": 0, "cases": [
            {"backend": "cuda", "op": "merge", "status": "passed", "max_error": 0.5}]}))
    (tmp_path / "out/results-check.json").write_bytes(OLD)
    command = [sys.executable, ROOT / "bench/gpu_results.py", tmp_path / "runs", "--output",
               tmp_path / "out/results.json"]
    without = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    done = subprocess.run(command, env=without, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert tree(tmp_path / "out") == {Path("results-check.json"): OLD}
    subprocess.run(command, env=without, check=True)
    (written,) = tree(tmp_path / "out").values()
    assert json.loads(written)["passed"] == 1


def test_no_program_opens_an_output_by_itself():
    """Calls that write in place belong to folders which take their name at the end."""
    allowed = {
        ("python/msa_cpp/_checkpoint.py", "open"): 1,  # both into the folder that it is given
        ("python/msa_cpp/_checkpoint.py", "write_text"): 1,
        ("python/msa_cpp/convert.py", "write_text"): 1,
        ("python/msa_cpp/train/storage.py", "write_text"): 1,
        ("python/msa_cpp/train/trainer.py", "open"): 1,  # appends to the log
    }
    found = Counter()
    for folder in ("python", "bench", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "_files.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if name in ("write_text", "write_bytes", "tofile", "save_file", "savez") or (
                    name == "open" and any(str(mode)[:1] in "wax" for mode in modes)
                ) or name == "savefig" and ast.unparse(node.args[0]) != "file":
                    found[str(path.relative_to(ROOT)), name] += 1
    assert found == allowed
