"""The golden files say what transformers says today, and the command agrees with both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip(
    "transformers.models.minimax_m3_vl", reason="this transformers has no minimax_m3_vl"
)
import make_goldens  # noqa: E402


def assert_same(fresh, path):
    """The regenerated tensors are those of the file; logits up to the order of f32 sums."""
    tensors, metadata = fresh
    golden, golden_metadata = make_goldens.load_golden(path)
    assert metadata == golden_metadata
    assert sorted(tensors) == sorted(golden)
    for name, value in tensors.items():
        assert value.shape == golden[name].shape, name
        if "logits" in name:
            torch.testing.assert_close(value, golden[name], rtol=0, atol=2e-4)
        else:
            different = (value != golden[name]).float().mean().item()
            assert different <= 1e-3, f"{name}: {different:.2%} of the entries differ"


@pytest.mark.parametrize("length", make_goldens.SHORT)
def test_code_11m_short(length):
    assert_same(
        make_goldens.golden_code_11m(length), GOLDEN / f"code-11m.{length}.safetensors"
    )


def test_tiny_model(tmp_path):
    model = make_goldens.tiny_model()
    assert_same(make_goldens.golden_tiny(model), GOLDEN / "tiny.safetensors")
    make_goldens.save_tiny(tmp_path, model)
    committed = sorted(p.relative_to(GOLDEN / "tiny") for p in (GOLDEN / "tiny").rglob("*.*"))
    assert committed == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    for name in committed:
        assert (tmp_path / name).read_bytes() == (GOLDEN / "tiny" / name).read_bytes(), name


def test_released_config_means_the_same_to_transformers():
    text = json.loads((GOLDEN / "tiny/released/config.json").read_text())["text_config"]
    theirs, ours = make_goldens.MiniMaxM3VLTextConfig(**text), make_goldens.tiny_config()
    for key in (
        "layer_types mlp_layer_types index_n_heads index_head_dim index_block_size "
        "index_topk_blocks index_local_blocks rope_parameters hidden_size head_dim"
    ).split():
        assert getattr(theirs, key) == getattr(ours, key), key


@pytest.mark.skipif("MSA_CLI" not in os.environ, reason="MSA_CLI does not name the msa command")
def test_eval_gives_the_same_bits_per_byte(tmp_path):
    length = make_goldens.SHORT[-1]
    tokens = make_goldens.text_tokens(length)
    logits, _ = make_goldens.run(make_goldens.load_code_11m(), tokens)
    out = tmp_path / "eval.json"
    model = make_goldens.CODE_11M
    subprocess.run(
        [os.environ["MSA_CLI"], "eval", "--model", model, "--text", model / "sample.txt",
         "--context", str(length), "--json", out],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    results = json.loads(out.read_text())["results"]
    assert [result["attention"] for result in results] == ["dense", "msa"]
    for result in results:
        expected = make_goldens.bits_per_byte(logits, tokens)
        assert result["bits_per_byte"] == pytest.approx(expected, abs=5e-4)
