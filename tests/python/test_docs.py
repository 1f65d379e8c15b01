"""docs/python.md and docs/serving.md show files of examples and what they print; README a part."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("python", "serving")}
EXAMPLES = sorted(path for name in PAGES for path in (ROOT / "examples" / name).glob("*.py"))
SHOWN = {
    name: (code, output)
    for page in PAGES.values()
    for name, code, output in re.findall(
        r"<!-- (\S+) -->\n```python\n(.*?)```\n```text\n(.*?)```\n", page, re.DOTALL
    )
}


def name_of(path):
    return str(path.relative_to(ROOT))


def test_all_examples_are_shown():
    assert len(EXAMPLES) >= 5
    assert sorted(SHOWN) == [name_of(path) for path in EXAMPLES]
    blocks = sum(page.count("```python") for page in PAGES.values())
    assert blocks == len(SHOWN) + 1  # patching vLLM: test_compat_vllm.py runs it


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    code, output = SHOWN[name_of(path)]
    assert code == path.read_text(), "the page shows another text"
    if not path.stem.startswith("numpy"):
        pytest.importorskip("torch", reason="torch is not installed")
    done = subprocess.run(
        [sys.executable, path], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},  # the cores may be shared
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_readme_shows_lines_of_the_transformers_example():
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    example = (ROOT / "examples/python/transformers_generate.py").read_text().splitlines()
    lines = [line for line in block.splitlines() if line]
    assert len(lines) >= 3 and all(line in example for line in lines)
