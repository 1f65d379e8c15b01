"""Both routes on the miniature of experiments/facts.py: which training finds the right blocks.

One seed, about a minute on two cores. Bounds are loose: seeds 0 to 2 in experiments/results lie far
on their side of them.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import facts  # noqa: E402
from arm import arms  # noqa: E402

MINIATURE = facts.SIZES["miniature"]


@pytest.fixture(scope="module")
def rows():
    known = arms()
    found = facts.experiment(MINIATURE, 0, [known[name] for name in MINIATURE.arms],
                             [arm for arm in known.values() if arm.choose])
    print(facts.table(found))
    return {label: group[0] for label, group in facts.by_arm(found).items()}


def test_the_task_separates_selections(rows):
    """On the dense model: the best K blocks are enough, others are not."""
    dense = rows["dense"]["accuracy"]
    assert dense >= 0.95
    assert rows["oracle on dense"]["accuracy"] >= dense - 0.05
    assert rows["random on dense"]["accuracy"] <= 0.65
    assert rows["window + sink on dense"]["accuracy"] <= 0.65


def test_from_scratch(rows):
    assert rows["MSA-PT"]["accuracy"] >= 0.85
    assert rows["MSA-PT"]["learned_coverage"] >= rows["MSA-CPT, 0 index-only steps"][
        "learned_coverage"] + 0.1


def test_conversion(rows):
    """The index branch learns alone, then both learn together."""
    after = [rows[f"MSA-CPT, {steps} index-only steps"]["accuracy"] for steps in (0, 25, 50, 100)]
    assert after[0] <= 0.65 and after[-1] >= 0.92
    assert after[0] + 0.05 < after[1] < after[-1]
    assert rows["MSA-CPT"]["accuracy"] >= rows["dense"]["accuracy"] - 0.02


def test_without_detaching_the_input_the_index_branch_ruins_the_model(rows):
    assert rows["no detach, lambda 10"]["accuracy"] <= 0.5
