"""What the pages show runs, prints what they say and stands in the files that they name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
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


def readme_block(language):
    (block,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return block


def test_readme_python_runs():
    done = subprocess.run(
        [sys.executable, "-c", readme_block("python")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(4096, 16, 128) the last token reads [ 0 ")


@pytest.mark.parametrize("language, compiler, standard", [
    ("cpp", "g++", "c++20"), ("c", "gcc", "c11"),
])  # fmt: skip
def test_readme_code_compiles(language, compiler, standard, tmp_path):
    source = tmp_path / f"readme.{language}"
    source.write_text(readme_block(language))
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run(
        [compiler, *flags, "-I", ROOT / "include", source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def table_rows(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_readme_times_are_those_of_the_results():
    """All but FlashInfer's, which are in no file of bench/results."""
    section = README.split("## How fast\n")[1].split("\n## ")[0]
    results = (ROOT / "docs/results.md").read_text()
    results = results.split("## Beside cuDNN")[1].split("\n## ")[0]
    found = table_rows(results)
    titles = found["work"]
    rows = table_rows(section)
    assert len(rows.pop("new tokens")) == 5 and len(rows) == 6
    for work, (ours, _, *others) in rows.items():
        measured = dict(zip(titles, found[work], strict=True))
        assert ours.split(" / ")[1] == measured["msa"]
        assert others == [measured[name] for name in ("vLLM", "SGLang", "cuDNN")]


def test_the_page_of_results_is_the_files_of_results(tmp_path):
    page = tmp_path / "results.md"
    script = ROOT / "bench/results_page.py"
    subprocess.run([sys.executable, script, "--output", page], check=True, timeout=60)
    assert (ROOT / "docs/results.md").read_text() == page.read_text(), f"run {script}"
    for path in (ROOT / "bench/results").glob("*.json"):
        assert f"(../bench/results/{path.name})" in page.read_text()


def anchors(path):
    """As GitHub makes them of headings"""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [
    path for folder in (".", "docs", "dev/notes", "experiments/results", "models/code-11m")
    for path in sorted((ROOT / folder).glob("*.md"))
], ids=name_of)  # fmt: skip
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
