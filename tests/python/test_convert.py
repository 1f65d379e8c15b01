"""msa_cpp.convert: dense results unchanged in transformers and in msa; what it refuses, and how."""

import functools
import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msa_cpp import _checkpoint, _config, convert

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from safetensors.torch import load_file, save_file  # noqa: E402

from msa_cpp.train.model import MINIATURE  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "models/code-11m/sample.txt"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.08,
    "max_position_embeddings": 4096,
}
KINDS = {
    "llama": {"rms_norm_eps": 1e-5, "rope_theta": 5e5},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 128},
    "qwen3-tied": {"tie_word_embeddings": True},
}


def make_source(directory, kind, dtype):
    """A random model whose norms spread over two orders of magnitude, as trained ones do."""
    torch.manual_seed(1)
    name = kind.split("-")[0]
    config = transformers.AutoConfig.for_model(name, **(SIZES | KINDS[kind]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, weight in model.named_parameters():
        if "norm" in key:
            spread = 0.2 if "self_attn" in key else 1.0
            weight.data = torch.exp(spread * torch.randn_like(weight) - spread)
    model = model.to(dtype).eval()
    model.save_pretrained(directory)
    return model


def load(directory, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@torch.no_grad()
def logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0].float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    make_source(directory, "llama", torch.bfloat16)
    return directory


@pytest.fixture(scope="module")
def tokens():
    return list(TEXT.read_bytes()[:700])  # fewer than 16 blocks: sparse layers read everything


# --- the same results -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory, tokens):
    """A source in bf16, its conversion, and what the source computes in f32."""
    directory = tmp_path_factory.mktemp(request.param)
    source = make_source(directory / "dense", request.param, torch.bfloat16)
    convert.convert(directory / "dense", directory / "msa", full_attention=[1])
    return source, directory / "msa", logits(load(directory / "dense", torch.float32), tokens)


def assert_same_in_f32(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_transformers_in_f32(pair, tokens):
    _, converted, expected = pair
    assert_same_in_f32(logits(load(converted, torch.float32), tokens), expected)


def test_transformers_in_bf16(pair, tokens):
    """Both round, elsewhere: ours must not be farther from the truth."""
    source, converted, truth = pair
    model = load(converted, "auto")
    assert model.dtype == torch.bfloat16
    theirs, ours = (logits(m, tokens) - truth for m in (source, model))
    assert ours.square().mean().sqrt() <= 1.25 * theirs.square().mean().sqrt()


@pytest.mark.skipif("MSA_CLI" not in os.environ, reason="MSA_CLI does not name the msa command")
def test_msa_eval(pair, tmp_path, tokens):
    _, converted, expected = pair
    nats = torch.nn.functional.cross_entropy(expected[:-1], torch.tensor(tokens[1:]))
    subprocess.run(
        [os.environ["MSA_CLI"], "eval", "--model", converted, "--text", TEXT,
         "--context", str(len(tokens)), "--json", tmp_path / "out.json"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["attention"] for result in results] == ["dense", "msa"]
    for result in results:
        assert result["bits_per_byte"] == pytest.approx(nats.item() / np.log(2), abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_sources_become_f32(dtype, tmp_path, tokens):
    make_source(tmp_path / "dense", "llama", dtype)
    convert.convert(tmp_path / "dense", tmp_path / "msa", full_attention=[0])
    model = load(tmp_path / "msa", "auto")
    assert model.dtype == torch.float32
    expected = logits(load(tmp_path / "dense", torch.float32), tokens)
    assert_same_in_f32(logits(model, tokens), expected)


def test_head_norms_vanish_bit_for_bit_in_bf16(llama, tmp_path):
    """Of every finite bf16 q up to 2^16, and for the two usual eps."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    q = bits[(bits.abs() <= 2.0**16) & (bits.abs() >= 2.0**-40)].reshape(-1, 1)
    for eps in (1e-5, 1e-6):
        weight = convert.undone_norm(eps)
        norm = transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLRMSNorm(1, eps)
        for dtype in (torch.float32, torch.bfloat16):
            norm.weight.data = torch.tensor([weight]).to(dtype)
            assert torch.equal(norm(q * 2.0**-convert.FADE), q)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.floats(2**-20, 64, width=32), min_size=1, max_size=50), st.booleans())
@example([32, 0.1], False)
def test_norm_weights_survive_a_cast_to_bf16(values, negative):
    """Exactly where they are within 2^8 of the largest, and else to 2^-15 of the largest."""
    weight = torch.tensor(values).to(torch.bfloat16).float() * (-1 if negative else 1)
    p = convert.room_for_one(weight.numpy())
    tensor = _checkpoint.Tensor("F32", tuple(weight.shape), lambda: iter([weight.numpy()]))
    stored = torch.from_numpy(convert.one_plus(tensor, p).values())
    exact = (1 + stored) * 2.0**-p
    torch.testing.assert_close(exact, weight, rtol=0, atol=2.0**-24 * weight.abs().max().item())
    cast = (1 + stored.to(torch.bfloat16).float()) * 2.0**-p
    largest = weight.abs().max()
    if not negative:  # weights below zero are rare; -w - 1 needs one bit more than w - 1
        near = weight * 2.0**p >= 0.5
        assert near[weight >= 2.0**-8 * largest].all()
        assert torch.equal(cast[near], weight[near])
    torch.testing.assert_close(cast, weight, rtol=2.0**-7, atol=2.0**-15 * largest.item())


def test_matrices_keep_their_bits(llama, tmp_path):
    convert.convert(llama, tmp_path / "msa", full_attention=[0])
    before, after = (
        load_file(llama / "model.safetensors"),
        load_file(tmp_path / "msa/model.safetensors"),
    )
    for name, weight in after.items():
        old = before.get(name.replace("gate_up_proj", "up_proj"))
        if weight.ndim == 2 and old is not None:
            assert weight.dtype == old.dtype == torch.bfloat16, name
            new = weight[-len(old) :].float()
            (ratio,) = set((new[old != 0] / old[old != 0].float()).unique().tolist())
            assert np.frexp(ratio)[0] == 0.5, name
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


# --- the index branch -----------------------------------------------------------------------------


def test_index_branch_is_seeded(llama, tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert.convert(llama, tmp_path / name, full_attention=[0, 2], topk=8, seed=seed)
        files.append(load_file(tmp_path / name / "model.safetensors"))
    a, b, c = files
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    different = sorted(name for name in a if not torch.equal(a[name], c[name]))
    index = "model.layers.1.self_attn.indexer."
    assert different == [index + "k_proj.weight", index + "q_proj.weight"]
    for name in different:
        assert a[name].float().std() == pytest.approx(0.02, rel=0.05)
        assert a[name].float().mean().abs() < 1e-3
    assert not a[index + "q_norm.weight"].any()
    assert [name for name in a if "indexer" in name and ".1." not in name] == []
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["layer_types"] == ["full_attention", "minimax_m3_sparse", "full_attention"]
    assert config["index_topk_blocks"] == 8


# --- files ----------------------------------------------------------------------------------------


def test_shards_in_and_out(tmp_path, tokens, monkeypatch):
    source = make_source(tmp_path / "dense", "llama", torch.float32)
    source.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    (tmp_path / "sharded/tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    monkeypatch.setattr(
        convert, "write_checkpoint",
        functools.partial(_checkpoint.write_checkpoint, shard_bytes=300_000),
    )  # fmt: skip
    monkeypatch.setattr(_checkpoint, "PIECE_BYTES", 1000)
    convert.convert(tmp_path / "sharded", tmp_path / "msa", full_attention=[0])
    assert len(list((tmp_path / "msa").glob("*.safetensors"))) > 2
    assert (tmp_path / "msa/tokenizer.json").exists()
    convert.check(tmp_path / "msa")
    monkeypatch.undo()
    convert.convert(tmp_path / "dense", tmp_path / "whole", full_attention=[0])
    whole = load_file(tmp_path / "whole/model.safetensors")
    for shard in (tmp_path / "msa").glob("*.safetensors"):
        for name, value in load_file(shard).items():
            assert torch.equal(value, whole.pop(name)), name
    assert whole == {}
    assert logits(load(tmp_path / "msa", torch.float32), tokens[:50]).isfinite().all()


def test_an_overlay_is_what_the_index_says(tmp_path):
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3)}
    save_file(tensors, tmp_path / "model-1.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def value(**shards):
        index.write_text(json.dumps({"weight_map": shards}))
        return _checkpoint.Checkpoint(tmp_path).take("a", (3,)).values().tolist()

    first, second = "model-1.safetensors", "model-2.safetensors"
    assert value(a=second, b=first) == [1, 1, 1]
    save_file({"a": torch.ones(3), "c": torch.ones(3)}, tmp_path / second)
    assert value(a=first, b=first, c=second) == [0, 0, 0]
    says = f"tensor a: given twice, by {tmp_path / first} and by {tmp_path / second}"
    with pytest.raises(convert.InputError, match=re.escape(says)):
        value(b=first, c=second)
    with pytest.raises(convert.InputError, match="tensor b: missing"):
        value(a=first, b=second)


def test_a_full_disk_leaves_nothing(llama, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    done = run(llama, tmp_path / "msa", "--full-attention", "0", preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"File too large: '{tmp_path / 'msa'}'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded(tmp_path):
    """An embedding of 256 MB passes through a process that may take 240 MB in all."""
    config = {
        "model_type": "llama", "vocab_size": 1 << 19, "hidden_size": 128, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (1 << 19, 128), "model.norm.weight": (128,)}
    for i in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (128,)
        for x in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{x}_proj.weight"] = (128, 128)
        for name, shape in (("gate", (8, 128)), ("up", (8, 128)), ("down", (128, 8))):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no space
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # stacks of many would count
    run_ok(source, tmp_path / "out", "--full-attention", "0", preexec_fn=limit_memory,
           env=one_thread)  # fmt: skip
    assert (tmp_path / "out/model.safetensors").stat().st_size > 1 << 29


def limit_memory():
    resource.setrlimit(resource.RLIMIT_DATA, (240 << 20, 240 << 20))


# --- the command ----------------------------------------------------------------------------------


def run(*arguments, **options):
    command = [sys.executable, "-m", "msa_cpp.convert", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, text=True, timeout=240, **options)


def run_ok(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "stderr of a pipe must stay silent"
    return done.stdout


def test_command(llama, tmp_path):
    out = tmp_path / "msa"
    text = run_ok(llama, out, "--full-attention", "0,2", "--topk", "4", "--seed", "3")
    assert (
        text == f"{out} written: 3 layers, full attention in 0, 2, an index branch in the others\n"
    )
    assert "is whole" in run_ok("--check", out)
    assert "is whole" in run_ok("--check", ROOT / "models/code-11m")
    assert out.stat().st_mode & 0o777 == 0o755


def test_progress_bar_only_on_a_terminal(llama, tmp_path):
    ours, theirs = pty.openpty()
    assert run(llama, tmp_path / "a", "--full-attention", "0", stderr=theirs).returncode == 0
    assert (
        run(llama, tmp_path / "b", "--full-attention", "0", "--quiet", stderr=theirs).returncode
        == 0
    )
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    assert text.count("GB\r") > 1 and text.endswith("\r\x1b[K")
    os.close(ours)


@pytest.mark.parametrize("arguments, says", [
    ([], "expected SOURCE and OUTPUT"),
    (["a"], "expected SOURCE and OUTPUT"),
    (["a", "--check", "b"], "--check takes one directory"),
    (["/nowhere", "out"], "/nowhere/config.json: No such file"),
    (["--check", "/nowhere"], "/nowhere/config.json: No such file"),
    (["SOURCE", "/nowhere/out"], "/nowhere: no such directory"),
    (["SOURCE", "SOURCE"], "exists already"),
    (["SOURCE", "out", "--full-attention", "0,3"], "layer 3: expected layers from 0 to 2"),
    (["SOURCE", "out", "--full-attention", "0,1,2"], "all 3 layers"),
    (["SOURCE", "out", "--full-attention", "x"], "--full-attention"),
    (["SOURCE", "out", "--full-attention", "0", "--topk", "0"], "topk: got 0"),
    (["SOURCE", "out", "--full-attention", "0", "--seed", "-1"], "--seed: got -1"),
    (["SOURCE", "out", "--nonsense"], "--nonsense"),
])  # fmt: skip
def test_bad_flags(arguments, says, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert.main([str(llama) if a == "SOURCE" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("msa_cpp.convert: error: ") and says in captured.err
    assert list(tmp_path.iterdir()) == []


# --- bad sources ----------------------------------------------------------------------------------


@pytest.fixture
def refused(llama, tmp_path):
    """Converts the source after a change of its configuration and tensors; nothing may be left."""

    def check(says, config=None, change=lambda tensors: None):
        source = tmp_path / "in/source"
        source.mkdir(parents=True, exist_ok=True)
        values = json.loads((llama / "config.json").read_text()) | (config or {})
        (source / "config.json").write_text(json.dumps(values))
        tensors = load_file(llama / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors")
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(convert.InputError, match=says) as error:
            convert.convert(source, tmp_path / "out/msa", full_attention=[0])
        assert "\n" not in str(error.value)
        assert list((tmp_path / "out").iterdir()) == []

    return check


@pytest.mark.parametrize("config, says", [
    ({"model_type": "qwen2"}, "qwen2.*biases"),
    ({"model_type": "gemma2"}, "gemma2.*supported are llama, mistral, qwen3"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act: got .gelu."),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type: got .llama3."),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: got .linear."),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta: got .x."),
    ({"model_type": "mistral"}, "sliding_window: got 4096"),
    ({"model_type": "mistral", "sliding_window": 64}, "sliding_window: got 64"),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 9}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ({"layer_types": 5}, "layer_types"),
    ({"quantization_config": {"quant_method": "gptq"}}, "config.json: quantization_config: got"),
    ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads"),
    ({"num_key_value_heads": 4}, "k_proj.weight: shape: got .128, 96., expected .256, 96."),
    ({"head_dim": 63}, "head_dim: got 63, expected an even number"),
    ({"num_hidden_layers": 4}, "model.layers.3.*missing"),
    ({"num_hidden_layers": 2}, "model.layers.2.*unknown"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"vocab_size": True}, "vocab_size: got true"),
    ({"hidden_size": -1}, "hidden_size: got -1"),
    ({"hidden_size": "96"}, "hidden_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: got 0"),
    ({"rms_norm_eps": 1e-12}, "rms_norm_eps: got 1e-12, supported is at least 1e-09"),
    ({"model_type": "qwen3"}, "q_norm.weight: missing"),
])  # fmt: skip
def test_configurations_that_are_refused(config, says, refused):
    refused(says, config)


CASES = json.loads((ROOT / "tests/config_cases.json").read_text())
ROPE = {"rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "rotary_dim"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: json.dumps(case["change"]))
def test_keys_are_read_where_transformers_reads_them(case, llama, tmp_path):
    """As tests/unit/config_test.cc reads the same cases. Llama's have no partial RoPE."""
    changed = {"rope_theta": 1e4} | case["change"]
    without_rope = lambda config: {k: v for k, v in config.items() if k not in ROPE}
    target = without_rope(MINIATURE) | changed
    source = without_rope(json.loads((llama / "config.json").read_text())) | changed
    for_llama = set(case["change"]) <= ROPE | set(_config.FIXED)
    if "refused" in case:
        with pytest.raises(_config.ConfigError, match="^" + re.escape(case["refused"])):
            _config.m3_config(target)
        if for_llama:
            with pytest.raises(_config.ConfigError, match="^" + re.escape(case["refused"])):
                convert.dense_config(source)
        return
    theta, factor = case["rope"]
    ours = _config.m3_config(target)
    assert ours["rope_parameters"] == {
        "rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}  # fmt: skip
    assert ours["rotary_dim"] == MINIATURE["head_dim"] * factor
    assert _config.m3_config(ours) == ours
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(target)))
    assert theirs.rope_parameters["rope_theta"] == theta
    assert theirs.rope_parameters.get("partial_rotary_factor", 1.0) == factor
    if not for_llama:
        return
    (tmp_path / "config.json").write_text(json.dumps(source))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == theta
    if factor == 1:
        converted = convert.converted_config(convert.dense_config(source), [0], 16)
        assert converted["rope_parameters"]["rope_theta"] == theta
    else:
        with pytest.raises(_config.ConfigError, match="partial_rotary_factor: got 0"):
            convert.dense_config(source)


@pytest.mark.parametrize("model_type", convert.DEFAULTS)
def test_absent_keys_are_what_transformers_takes(model_type):
    sizes = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 96,
             "num_hidden_layers": 2, "num_attention_heads": 64, "sliding_window": None}  # fmt: skip
    ours = convert.dense_config(sizes | {"model_type": model_type})
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps"):
        assert ours[key] == getattr(theirs, key), key
    assert ours["rope_parameters"]["rope_theta"] == theirs.rope_parameters["rope_theta"]


def change_of(name, make):
    def change(tensors):
        tensors[name] = make(tensors.get(name))

    return change


@pytest.mark.parametrize("name, make, says", [
    ("model.layers.1.self_attn.q_proj.bias", lambda _: torch.ones(512), "has no biases"),
    ("model.layers.1.mlp.down_proj.bias", lambda _: torch.ones(96), "has no biases"),
    ("model.layers.1.self_attn.sinks", lambda _: torch.ones(8), "sinks: unknown"),
    ("lm_head.weight", lambda w: w[:-1], "lm_head.weight: shape: got .299, 96."),
    ("lm_head.weight", lambda w: w.to(torch.int8), "dtype: got I8"),
    ("lm_head.weight", lambda w: w * float("nan"), "lm_head.weight: holds NaN"),
    ("model.norm.weight", lambda w: w * float("inf"), "model.norm.weight: holds NaN or inf"),
])  # fmt: skip
def test_tensors_that_are_refused(name, make, says, refused):
    refused(says, change=change_of(name, make))


def test_damaged_files(llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    whole = (llama / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    entry = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]}}'
    damaged = {
        "cut": whole[:-10],
        "empty": b"",
        "short": b"1234",
        "huge header": (1 << 60).to_bytes(8, "little") + whole[8:],
        "no JSON": whole[:8] + b"{" * size + whole[8 + size:],
        "a list": (2).to_bytes(8, "little") + b"[]",
        "no entry": (9).to_bytes(8, "little") + b'{"a": {}}',
        "beyond": len(entry).to_bytes(8, "little") + entry,
    }  # fmt: skip
    (source / "config.json").write_text((llama / "config.json").read_text())
    for what, content in damaged.items():
        (source / "model.safetensors").write_bytes(content)
        with pytest.raises(convert.InputError, match="safetensors"):
            convert.convert(source, tmp_path / "out", full_attention=[0])
        assert not (tmp_path / "out").exists(), what
    (source / "model.safetensors").unlink()
    with pytest.raises(convert.InputError, match="has neither"):
        convert.convert(source, tmp_path / "out", full_attention=[0])
    index = source / "model.safetensors.index.json"
    for shards, says in (
        ({"a": "missing.safetensors"}, "missing.safetensors: No such file"),
        ({"a": "../x.safetensors"}, "plain file names"),
        ([], "plain file names"),
    ):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(convert.InputError, match=says):
            convert.convert(source, tmp_path / "out", full_attention=[0])
    index.write_text("{")
    with pytest.raises(convert.InputError, match="not valid JSON"):
        convert.convert(source, tmp_path / "out", full_attention=[0])


# --- --check --------------------------------------------------------------------------------------

INDEX_Q = "model.layers.1.self_attn.indexer.q_proj.weight"


@pytest.mark.parametrize("config, change, says", [
    ({}, lambda t: t.pop(INDEX_Q), "indexer.q_proj.weight: missing"),
    ({}, change_of(INDEX_Q, lambda w: w[1:]), "indexer.q_proj.weight: shape"),
    ({}, change_of(INDEX_Q, lambda w: w / 0), "indexer.q_proj.weight: holds NaN"),
    ({}, change_of(INDEX_Q, lambda w: w.to(torch.int32)), "dtype: got I32"),
    ({}, change_of("model.extra", lambda _: torch.ones(1)), "model.extra: no part"),
    ({"layer_types": ["full_attention"] * 3}, None, "minimax_m3_sparse in some layer"),
    ({"layer_types": ["minimax_m3_sparse"] * 3}, None, "layers.0.self_attn.indexer.*missing"),
    ({"layer_types": ["minimax_m3_sparse"] * 2}, None, "for each layer"),
    ({"layer_types": [[]] * 3}, None, "for each layer"),
    ({"mlp_layer_types": ["sparse"] * 3}, None, "mlp_layer_types"),
    ({"model_type": "llama"}, None, "model_type"),
    ({"index_n_heads": 8}, None, "one per KV head"),
    ({"tie_word_embeddings": True}, None, "tie_word_embeddings"),
    ({"index_topk_blocks": None}, None, "index_topk_blocks: got null"),
    ({"use_gemma_norm": False}, None, "config.json: use_gemma_norm: got false, supported is true"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, None, "config.json: rope_scaling.type"),
    ({"sparse_attention_config": {"sparse_topk_blocks": 4}}, None, "sparse_attention_config: got"),
])  # fmt: skip
def test_check_finds(config, change, says, llama, tmp_path, capsys):
    out = tmp_path / "msa"
    convert.convert(llama, out, full_attention=[0])
    assert convert.main(["--check", str(out)]) == 0
    values = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(values))
    if change:
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors")
    capsys.readouterr()
    assert convert.main(["--check", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(convert.InputError, match=says):
        convert.check(out)
