"""experiments/ and two programs of bench/: budgets of time, and what runs cut short leave."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from msa_arrays import DEVICE  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import code_11m  # noqa: E402
import facts  # noqa: E402
import msa_cpp  # noqa: E402
from msa_cpp.train.data import Text  # noqa: E402
from msa_cpp.train.model import MINIATURE, Model  # noqa: E402
from msa_cpp.train.trainer import Options  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """A size whose arms take a second."""
    size = replace(facts.SIZES["miniature"], batch=2, steps=6, warmup_steps=3, conversion=(0, 2),
                   sparse_steps=2, log_every=2)
    monkeypatch.setitem(facts.SIZES, "miniature", size)


def run(monkeypatch, output, *arguments):
    """What facts.py leaves in the JSON."""
    monkeypatch.setattr(sys, "argv", ["facts.py", "--output", str(output), "--device", DEVICE,
                                      *map(str, arguments)])
    facts.main()
    return json.loads((output / "facts-miniature.json").read_text())


def names(found):
    return list(dict.fromkeys(row["arm"] for row in found["rows"]))


ON_DENSE = ["oracle on dense", "random on dense", "window + sink on dense"]


def test_arms_run_in_the_order_given(tiny, monkeypatch, tmp_path, capsys):
    found = run(monkeypatch, tmp_path, "--arms", "dense,msa_cpt,lambda_0", "--minutes", 30)
    assert names(found) == ["dense", *ON_DENSE, "MSA-CPT", "lambda 0"]
    assert found["not_run"] == [] and (tmp_path / "facts-miniature.md").exists()
    ends = [row for row in found["rows"] if row["end"]]
    assert all(line["seconds"] >= 0 for row in ends for line in row["log"])
    assert [line["step"] for line in ends[0]["log"]] == [0, 2, 4, 5]
    progress = capsys.readouterr().err
    assert "seed 0: MSA-CPT: 3 of 4, sparse: loss" in progress and "ms a step" in progress


def test_what_does_not_fit_is_listed(tiny, monkeypatch, tmp_path):
    """Cheaper arms still run; those that start from one that was left out do not."""
    needs = {"dense": 1e6, "MSA-PT": 1e6}
    monkeypatch.setattr(facts.Runner, "estimate", lambda self, arm: needs.get(arm.name, 0))
    found = run(monkeypatch, tmp_path, "--arms", "dense,msa_pt,msa_cpt,no_warmup", "--minutes", 5)
    assert names(found) == ["no warm-up"]
    assert [line.partition(":")[0] for line in found["not_run"]] == [
        "dense, seed 0", "MSA-PT, seed 0", "MSA-CPT, seed 0"]
    assert "needs 1000000 s" in found["not_run"][0] and "from dense" in found["not_run"][2]
    assert "Not run: MSA-PT" in (tmp_path / "facts-miniature.md").read_text()


def test_a_killed_run_leaves_the_arms_before(tiny, monkeypatch, tmp_path):
    train = facts.Runner.train

    def killed(self, arm):
        if arm.name == "lambda 0":
            raise KeyboardInterrupt
        return train(self, arm)

    monkeypatch.setattr(facts.Runner, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, "--arms", "dense,lambda_0")
    found = json.loads((tmp_path / "facts-miniature.json").read_text())
    assert names(found) == ["dense", *ON_DENSE]


def test_an_arm_that_diverges_is_listed(tiny, monkeypatch, tmp_path):
    wild = replace(facts.arms()["dense"], options=lambda size: {"lr": 1e38, "clip": 1e38})
    known = facts.arms() | {"lambda_0": replace(wild, name="wild")}
    monkeypatch.setattr(facts, "arms", lambda: known)
    found = run(monkeypatch, tmp_path, "--arms", "lambda_0,no_warmup")
    assert names(found) == ["no warm-up"]
    assert "wild, seed 0: step" in found["not_run"][0] and "NaN" in found["not_run"][0]


def test_figures_are_drawn_from_files_alone(tiny, monkeypatch, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(monkeypatch, one, "--arms", "dense")
    run(monkeypatch, two, "--arms", "lambda_0")
    table = (one / "facts-miniature.md").read_text()
    (one / "facts-miniature.md").unlink()
    draw = lambda *paths: monkeypatch.setattr(sys, "argv", ["facts.py", "--plot", *(
        str(path / "facts-miniature.json") for path in paths)]) or facts.main()
    draw(one)
    assert (one / "facts-miniature.md").read_text() == table
    draw(one, two)
    joined = (one / "facts-miniature.md").read_text()
    assert "| dense |" in joined and "| lambda 0 |" in joined
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert (one / "facts-miniature.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_and_homeless_arms_are_refused(tiny, monkeypatch, tmp_path, capsys):
    for arms, message in (("dense,nsa", "got 'nsa', supported are dense"),
                          ("msa_cpt,dense", "got msa_cpt, which starts from dense")):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, "--arms", arms)
        assert message in capsys.readouterr().err


def test_a_schedule_is_cut_to_its_time(monkeypatch):
    """A third of the steps is warm-up, at 2 seconds; the others take half a second."""
    model = Model(MINIATURE)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    options = Options(route="msa-cpt", freeze="all", steps=600, warmup_steps=200, batch=1,
                      context=64, log_every=50)
    source = Text([b"some text to read " * 30])
    cut, per_step = code_11m.fitted(options, model, source, 1e9)
    assert cut == options and min(per_step.values()) > 0
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    monkeypatch.setattr(code_11m, "seconds_per_step", lambda trainer, n: 2 if n == 0 else 0.5)
    cut, _ = code_11m.fitted(options, model, source, 30)
    assert (cut.steps, cut.warmup_steps) == (30, 10)


def test_training_step_measures_all_sides(tmp_path):
    path = tmp_path / "step.json"
    result = subprocess.run(
        [sys.executable, ROOT / "bench" / "training_step.py", "--device", DEVICE, "--tokens", "192",
         "--dim", "32", "--block-size", "16", "--topk", "3", "--rounds", "2", "--json", path],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text())
    assert {"sparse", "lists", "warm-up", "dense flash"} <= set(found["seconds"])
    for row in found["seconds"].values():
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert max(found["errors"]["dense flash"]) < 2e-2


def test_torch_and_a_build_in_pairs(tmp_path):
    command = [sys.executable, ROOT / "bench" / "pairs.py", "--old", "torch", "--new",
               Path(msa_cpp.__file__).parents[1], "--device", DEVICE, "--dtype", "bf16", "--shape",
               "4,2", "--rounds", "2", "--json", tmp_path / "pairs.json", "--cases"]
    result = subprocess.run([*command, "dense:300"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "pairs.json").read_text())["rows"]
    assert {name: len(times) for name, times in row["times"].items()} == {
        "old": 2, "again": 2, "new": 2}
    assert min(row["new/old"]) > 0 and min(row["old/old"]) > 0
    refused = subprocess.run([*command, "index:300"], capture_output=True, text=True)
    assert refused.returncode == 1 and "torch has dense alone" in refused.stderr
