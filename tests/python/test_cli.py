"""The command `msa` from outside: exit codes, one-line errors, JSON keys, nothing half-written.

MSA_CLI names the command (default: the release build). Needs pytest and nothing else.
"""

import json
import mmap
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MSA = os.environ.get("MSA_CLI", str(ROOT / "build/release/msa"))
MODEL = ROOT / "models/code-11m"
TINY = ROOT / "tests/golden/tiny/module"
TEXT = MODEL / "sample.txt"
COMMANDS = ["eval", "generate", "attend", "inspect", "check", "bench", "info"]


def run(*arguments, **options):
    return subprocess.run([MSA, *map(str, arguments)], capture_output=True, text=True, timeout=240,
                          stdin=subprocess.DEVNULL, **options)


def run_ok(*arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "stderr of a pipe must stay silent"
    return done.stdout


def run_bad(*arguments, says=(), code=2, **options):
    """Exit code 2, nothing on stdout, one line on stderr that contains each of `says`."""
    done = run(*arguments, **options)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("msa: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    for part in [says] if isinstance(says, str) else says:
        assert part in done.stderr, done.stderr
    return done.stderr


# --- safetensors without a library ----------------------------------------------------------------

CODES = {"F32": "f", "I32": "i", "I64": "q"}


def bf16(values):
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def pack(dtype, values):
    if dtype == "BF16":
        return bf16(values)
    return struct.pack(f"<{len(values)}{CODES[dtype]}", *values)


def file_of(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def safetensors(tensors):
    """{name: (dtype, shape, values)} as the bytes of a file."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        raw = pack(dtype, values)
        header[name] = {"dtype": dtype, "shape": list(shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return file_of(header, data)


def parse(path):
    raw = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = raw[8 + size + begin:8 + size + end]
        code = {"F32": "f", "I32": "i", "BF16": "H"}[entry["dtype"]]
        out[name] = (entry["dtype"], entry["shape"],
                     struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))
    return out


def normal(count, seed):
    random.seed(seed)
    return [random.gauss(0, 1) for _ in range(count)]


T, HQ, HKV, D, BK = 50, 4, 2, 16, 8


def attend_inputs(dtype="F32"):
    def tensor(seed, *shape):
        count = 1
        for extent in shape:
            count *= extent
        return dtype, shape, normal(count, seed)

    return {"q": tensor(1, T, HQ, D), "k": tensor(2, T, HKV, D), "v": tensor(3, T, HKV, D),
            "q_idx": tensor(4, T, HKV, D), "k_idx": tensor(5, T, D)}


def local_ids(width=2):
    """Each query's own block and the one before it."""
    lists = [[t // BK - 1, t // BK] if t >= BK else [0, -1] for t in range(T)]
    return "I32", (HKV, T, width), [block for _ in range(HKV) for ids in lists for block in ids]


@pytest.fixture
def attend(tmp_path):
    """Writes tensors and returns the arguments of `msa attend`; the output must not appear."""
    def prepare(tensors, *flags):
        raw = tensors if isinstance(tensors, bytes) else safetensors(tensors)
        (tmp_path / "in.safetensors").write_bytes(raw)
        return ["attend", "--input", tmp_path / "in.safetensors", "--output",
                tmp_path / "out.safetensors", *flags]

    yield prepare


@pytest.fixture
def attend_bad(attend, tmp_path):
    def check(tensors, *flags, says):
        run_bad(*attend(tensors, *flags), says=says)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]

    return check


# --- help, version, flags -------------------------------------------------------------------------

def test_help_and_version():
    top = run_ok("--help")
    assert all(command in top for command in COMMANDS)
    assert re.fullmatch(r"msa \d+\.\d+\.\d+\n", run_ok("--version"))
    for command in COMMANDS:
        text = run_ok(command, "--help")
        assert "Example" in text
        assert all(flag in text for flag in ("--backend", "--threads", "--quiet"))


@pytest.mark.parametrize("arguments", [
    [], ["nonsense"], ["info", "--nonsense"], ["info", "--threads", "-1"], ["info", "--json"],
    ["bench", "--context", "1k"], ["bench", "--context", "0"], ["bench", "--context", ""],
    ["bench", "--repeats", "0"], ["bench", "--dtype", "f64"], ["bench", "--op", "msa,nonsense"],
    ["bench", "--new-tokens", "9", "--context", "8"], ["attend"], ["eval"], ["inspect"],
    ["generate"], ["check", "--suite", "huge"],
])
def test_bad_flags(arguments):
    run_bad(*arguments)


def test_unknown_backend_names_the_known_ones():
    for command in (["info"], ["bench", "--context", "64"], ["check"]):
        run_bad(*command, "--backend", "nonsense", says=["nonsense", "reference"])
    run_bad("info", env={**os.environ, "MSA_BACKEND": "nonsense"}, says=["MSA_BACKEND", "nonsense"])


def test_unknown_command_names_the_known_ones():
    run_bad("nonsense", says=["nonsense", "eval", "info"])
    run_bad(says="subcommand")


# --- JSON -----------------------------------------------------------------------------------------

def test_info_json():
    info = json.loads(run_ok("info", "--json", "-"))
    assert {"version", "commit", "cuda", "machine", "isa", "backends"} <= set(info)
    assert {"cpu", "cores", "memory_gib", "os", "compiler", "build"} <= set(info["machine"])
    assert all({"name", "requirement", "priority", "usable", "reason", "chosen"} == set(backend)
               for backend in info["backends"])
    assert sum(backend["chosen"] for backend in info["backends"]) == 1
    assert all(backend["usable"] or backend["reason"] for backend in info["backends"])


BENCH_KEYS = {"op", "backend", "dtype", "context", "new_tokens", "batch", "heads_q", "heads_kv",
              "head_dim", "block", "topk", "seconds_median", "seconds_p10", "seconds_p90", "flops",
              "bytes", "tflops", "gbps", "ceiling_fraction", "verdict", "max_error"}
ALL_OPS = ["dense_attention", "index_scores", "select_blocks", "index_select", "sparse_attention",
           "msa", "merge", "block_lists", "append_paged", "block_mass"]


@pytest.mark.parametrize("flags", [
    ["--op", ",".join(ALL_OPS), "--context", "100,333", "--batch", "2"],
    ["--op", ",".join(ALL_OPS), "--context", "200", "--layout", "paged", "--dtype", "bf16"],
    ["--op", "sparse_attention,msa,dense_attention", "--context", "300", "--new-tokens", "3",
     "--batch", "3", "--dtype", "f16"],
    ["--context", "256", "--selection", "random", "--new-tokens", "100"],
])
def test_bench(tmp_path, flags):
    rows_file, table = tmp_path / "rows.json", tmp_path / "rows.tsv"
    out = run_ok("bench", "--shape", "8,2,32,16,4", "--repeats", "2", "--json", rows_file, "--tsv",
                 table, *flags)
    result = json.loads(rows_file.read_text())
    assert {"machine", "commit", "rows"} == set(result)
    assert result["rows"]
    for row in result["rows"]:
        assert BENCH_KEYS <= set(row)
        assert row["verdict"] == "ok" and row["op"] in out
        assert 0 < row["seconds_p10"] <= row["seconds_median"] <= row["seconds_p90"]
        has_ratio = row["op"] == "msa" or row["op"].startswith("sparse_")
        ratio = {"median", "p10", "p90"} if has_ratio else set()
        assert set(row["ratio_to_dense"] or []) == ratio
    lines = table.read_text().splitlines()
    assert len(lines) == 1 + len(result["rows"]) and BENCH_KEYS <= set(lines[0].split("\t"))
    assert all(line.count("\t") == lines[0].count("\t") for line in lines)


def test_old_names_of_operators():
    """With a warning, and the new ones in the rows."""
    done = run("bench", "--shape", "8,2,32,16,4", "--op", "sparse_decode,msa_layer_decode",
               "--context", "64", "--new-tokens", "2", "--repeats", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert [row["op"] for row in json.loads(done.stdout)["rows"]] == ["sparse_attention",
                                                                      "msa_layer"]
    assert "sparse_decode is deprecated, its name is sparse_attention; gone in 0.3" in done.stderr
    done = run("info", "--problem", "op=msa_layer_decode,layout=packed")
    assert done.stdout.startswith("msa_layer, f32, packed")
    assert "msa_layer_decode is deprecated" in done.stderr


def test_bench_bad(tmp_path):
    for shape in ("3,2,64,16,4", "8,2,64,16,0", "8,2,64,16", "8,2,64,16,4,1", "m4", "8,2,x,16,4"):
        run_bad("bench", "--shape", shape, "--context", "64")
    run_bad("bench", "--shape", "3,2,64,16,4", says=["heads_q", "3", "2"])
    run_bad("bench", "--context", "16777216", "--shape", "m3", says="memory")
    run_bad("bench", "--selection", tmp_path / "none", says="none")
    run_bad("bench", "--selection", MODEL / "model-00001-of-00002.safetensors", says="block_ids")
    trace = tmp_path / "trace.safetensors"
    trace.write_bytes(safetensors({"layers.1.block_ids": ("I32", (2, 64, 16), [7] * 2048)}))
    run_bad("bench", "--selection", trace, "--context", "64", says="block 7")
    run_bad("bench", "--selection", trace, "--context", "128", says="[2,64,16]")


def test_eval_trace_and_bench_on_it(tmp_path):
    trace, report = tmp_path / "trace.safetensors", tmp_path / "eval.json"
    run_ok("eval", "--model", MODEL, "--text", TEXT, "--context", "400", "--trace", trace, "--json",
           report)
    result = json.loads(report.read_text())
    assert {"context", "tokens", "results", "speedup_attention", "backend", "threads",
            "model"} <= set(result)
    assert [entry["attention"] for entry in result["results"]] == ["dense", "msa"]
    for entry in result["results"]:
        assert {"attention", "bits_per_byte", "prefill_seconds", "attention_seconds",
                "index_seconds", "kept_mass"} <= set(entry)
        assert 0.5 < entry["bits_per_byte"] < 8
    rows = json.loads(run_ok("bench", "--shape", "16,4,128,128,16", "--context", "300", "--op",
                             "msa,sparse_attention", "--repeats", "1", "--selection", trace,
                             "--json", "-"))["rows"]
    assert all(row["verdict"] == "ok" and row["selection"] == str(trace) for row in rows)


def test_check_json():
    result = json.loads(run_ok("check", "--backend", "reference", "--json", "-"))
    assert {"passed", "failed", "skipped", "cases"} <= set(result)
    assert result["failed"] == 0 and result["passed"] > 0
    assert all({"backend", "op", "name", "status", "max_error"} <= set(case)
               for case in result["cases"])


def test_check_of_some_operators():
    both = "merge,block_lists"
    result = json.loads(run_ok("check", "--backend", "reference", "--op", both, "--json", "-"))
    assert {case["op"] for case in result["cases"]} == set(both.split(","))
    assert result["passed"] == len(result["cases"])


# --- attend ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("op", ["index_select", "sparse_attention", "dense_attention", "msa"])
@pytest.mark.parametrize("flags", [[], ["--no-causal", "--scale", "0.5"]])
def test_attend_round_trip(attend, tmp_path, op, dtype, flags):
    tensors = attend_inputs(dtype)
    if op == "sparse_attention":
        tensors["block_ids"] = local_ids()
    report = json.loads(run_ok(*attend(tensors, "--op", op, "--block", BK, "--check", "--json", "-",
                                       *flags, *(["--topk", 3] if op in ("msa", "index_select")
                                                 else []))))
    assert {"op", "backend", "threads", "seconds", "input", "output", "outputs",
            "check"} == set(report)
    assert report["op"] == op and report["check"]["passed"]
    out = parse(tmp_path / "out.safetensors")
    if op in ("msa", "index_select"):
        assert out["block_ids"][:2] == ("I32", [HKV, T, 3])
    if op != "index_select":
        assert out["o"][:2] == (dtype, [T, HQ, D]) and out["lse"][:2] == ("F32", [T, HQ])


@pytest.mark.parametrize("scale", ["0", "-0.0", "1e-60", "nan", "inf", "1e60"])
def test_attend_refuses_the_scales_that_python_refuses(attend_bad, scale):
    attend_bad(attend_inputs(), f"--scale={scale}", says=["--scale"])


def test_attend_takes_a_scale_below_zero(attend):
    run_ok(*attend(attend_inputs(), "--scale=-0.25", "--check"))


def test_attend_with_all_blocks_is_dense(attend, tmp_path):
    tensors = attend_inputs()
    run_ok(*attend(tensors, "--op", "dense_attention", "--check"))
    dense = parse(tmp_path / "out.safetensors")
    run_ok(*attend(tensors, "--op", "msa", "--block", BK, "--topk", (T + BK - 1) // BK))
    sparse = parse(tmp_path / "out.safetensors")
    for name in ("o", "lse"):
        assert sparse[name][2] == pytest.approx(dense[name][2], abs=1e-5)


def test_attend_finds_the_operator(attend):
    tensors = attend_inputs()
    some = lambda *names: {name: tensors[name] for name in names}
    for given, op in [(tensors, "msa"), (some("q", "k", "v"), "dense_attention"),
                      (some("q_idx", "k_idx"), "index_select"),
                      ({**some("q", "k", "v"), "block_ids": local_ids()}, "sparse_attention")]:
        assert json.loads(run_ok(*attend(given, "--block", BK, "--json", "-")))["op"] == op


def paged_inputs():
    """Two sequences of 20 and 30 tokens, all new, in shuffled pages of 8; page 9 is in no table."""
    pages = [3, 0, 6, 8, 2, 1, 5, 4]
    return {"q": ("F32", (T, HQ, D), normal(T * HQ * D, 1)),
            "k": ("F32", (10, HKV, BK, D), normal(10 * HKV * BK * D, 2)),
            "v": ("F32", (10, HKV, BK, D), normal(10 * HKV * BK * D, 3)),
            "q_idx": ("F32", (T, HKV, D), normal(T * HKV * D, 4)),
            "k_idx": ("F32", (10, BK, D), normal(10 * BK * D, 5)),
            "page_table": ("I64", (2, 4), pages),
            "seq_lens": ("I32", (2,), [20, 30]),
            "cu_seqlens_q": ("I32", (3,), [0, 20, 50])}


def test_attend_paged(attend):
    report = json.loads(run_ok(*attend(paged_inputs(), "--topk", "2", "--check", "--json", "-")))
    assert report["op"] == "msa" and report["check"]["passed"]


def test_attend_bad_tensors(attend_bad):
    good = attend_inputs()
    change = lambda **tensors: {**good, **tensors}
    without = lambda name: {key: value for key, value in good.items() if key != name}
    attend_bad(without("k"), "--op", "msa", says="k: no such tensor")
    attend_bad(change(extra=("F32", (1,), [0.0])), says=["extra", "unknown"])
    attend_bad(change(q=("I32", (T, HQ, D), [1] * (T * HQ * D))), says=["q", "I32"])
    attend_bad(change(q=("F32", (T * HQ, D), good["q"][2])), says=["q", "rank 2"])
    attend_bad(change(q=("BF16", *good["q"][1:])), "--op", "dense_attention", says="bf16")
    attend_bad(change(v=("F32", (T, HKV, D - 1), good["v"][2][:T * HKV * (D - 1)])),
               "--op", "dense_attention", says="v")
    attend_bad(change(q=("F32", (T, 3, D), good["q"][2][:T * 3 * D])), says=["heads_q", "3", "2"])
    attend_bad(good, "--topk", "2", "--init-blocks", "2", says="init_blocks")
    attend_bad(good, "--topk", "0", says="--topk")
    attend_bad(good, "--scale", "nan", says="--scale")
    falling = ("I32", (3,), [0, 60, 50])
    attend_bad(change(cu_seqlens_q=falling, cu_seqlens_k=falling), says="cu_seqlens_q")
    attend_bad(change(cu_seqlens_q=("I64", (2,), [0, 2**40])), says="cu_seqlens_q")


def test_attend_bad_ids_and_pages(attend_bad):
    tensors = {name: attend_inputs()[name] for name in ("q", "k", "v")}
    for id_, says in [(7, "7"), (-2, "-2"), (2**31 - 1, "2147483647")]:
        kind, shape, values = local_ids()
        attend_bad({**tensors, "block_ids": (kind, shape, [*values[:-1], id_])}, "--block", BK,
                   says=["block_ids", says])
    kind, shape, values = local_ids()
    twice = (kind, shape, [*values[:-2], 6, 6])
    attend_bad({**tensors, "block_ids": twice}, "--block", BK, "--backend", "reference",
               says="block_ids")
    for page in (10, -1):
        paged = paged_inputs()
        paged["page_table"] = ("I32", (2, 4), [3, 0, page, 8, 2, 1, 5, 4])
        attend_bad(paged, says=["page_table", str(page)])
    paged = paged_inputs()
    paged["seq_lens"] = ("I32", (2,), [20, 33])
    attend_bad(paged, says="seq_lens")


def test_backend_says_what_it_does_not_support(attend_bad):
    fast = [b["name"] for b in json.loads(run_ok("info", "--json", "-"))["backends"]
            if b["usable"] and b["priority"] > 0]
    if not fast:
        pytest.skip("no fast backend works on this machine")
    wide = 8192
    tensors = {name: ("BF16", (2, 1, wide), normal(2 * wide, 1)) for name in ("q", "k", "v")}
    for backend in fast:
        attend_bad(tensors, "--backend", backend, says=[backend, "head_dim", str(wide)])


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN_FILES = {
    "empty": b"",
    "short": b"\x01\x02",
    "no header": struct.pack("<Q", 1000),
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": file_of(b"{nonsense", b""),
    "no object": file_of(b"[1, 2]", b""),
    "truncated data": file_of({"q": entry(0, 8)}, bytes(7)),
    "overlap": file_of({"q": entry(0, 8), "k": entry(4, 12)}, bytes(12)),
    "out of range": file_of({"q": entry(8, 16)}, bytes(8)),
    "backwards": file_of({"q": entry(8, 0)}, bytes(8)),
    "negative": file_of({"q": entry(-8, 0)}, bytes(8)),
    "size against shape": file_of({"q": entry(0, 8, (3,))}, bytes(8)),
    "overflowing shape": file_of({"q": entry(0, 8, (2**62, 2**62))}, bytes(8)),
    "negative shape": file_of({"q": entry(0, 8, (-2,))}, bytes(8)),
    "duplicate": file_of(b'{"q":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                         b'"q":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', bytes(16)),
    "unknown dtype": file_of({"q": entry(0, 8, dtype="X99")}, bytes(8)),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_safetensors(attend_bad, name):
    attend_bad(BROKEN_FILES[name], says="in.safetensors")


def test_attend_paths(attend, tmp_path):
    arguments = attend(attend_inputs())
    run_bad("attend", "--input", tmp_path / "none", "--output", tmp_path / "o", says="none")
    run_bad("attend", "--input", tmp_path, "--output", tmp_path / "o", says=str(tmp_path))
    for output in (tmp_path / "no" / "dir.safetensors", tmp_path):
        run_bad(*arguments[:4], output, says=str(output))
    run_bad(*arguments, "--json", tmp_path / "no" / "x.json", says="x.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]


# --- models ---------------------------------------------------------------------------------------

@pytest.fixture
def model(tmp_path):
    """A copy of code-11m that a test may break."""
    copy = tmp_path / "model"
    shutil.copytree(MODEL, copy)
    return copy


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (model / "config.json").write_text(json.dumps(config))


def eval_bad(model, *flags, says):
    run_bad("eval", "--model", model, "--text", TEXT, "--context", "300", *flags, says=says)


@pytest.mark.parametrize("key, value, says", [
    ("num_attention_heads", None, "num_attention_heads"),
    ("num_attention_heads", 15, "15"),
    ("index_topk_blocks", 0, "index_topk_blocks"),
    ("index_local_blocks", 17, "17"),
    ("head_dim", -128, "head_dim"),
    ("vocab_size", 385, ["385", "384", "weight"]),
    ("hidden_size", 512, ["512", "256", "weight"]),
    ("layer_types", ["full_attention"], "layer_types"),
    ("layer_types", ["nonsense"] * 6, "nonsense"),
    ("rms_norm_eps", "small", "rms_norm_eps"),
])
def test_bad_config(model, key, value, says):
    edit_config(model, **{key: value})
    eval_bad(model, says=says)


def test_broken_checkpoints(model):
    shard = model / "model-00002-of-00002.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1])
    eval_bad(model, says=shard.name)
    shard.write_bytes(raw.replace(b'"BF16"', b'"I16" ', 1))
    eval_bad(model, says=["I16", "weight"])
    shard.unlink()
    eval_bad(model, says=shard.name)
    (model / "config.json").write_text("{")
    eval_bad(model, says="config.json")
    (model / "config.json").unlink()
    eval_bad(model, says="config.json")
    eval_bad(model / "none", says="none")


def place_of(shard, name):
    """Where the bytes of a tensor begin and end."""
    raw = shard.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8:8 + size])[name]["data_offsets"]
    return 8 + size + begin, 8 + size + end


def edit_tensor(model, name, change):
    """Replaces the bf16 values of a tensor of code-11m, as 16-bit patterns; returns the shard."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"][name]
    begin, end = place_of(shard, name)
    raw = shard.read_bytes()
    values = list(struct.unpack(f"<{(end - begin) // 2}H", raw[begin:end]))
    change(values)
    shard.write_bytes(raw[:begin] + struct.pack(f"<{len(values)}H", *values) + raw[end:])
    return shard


def runs_of(model, tmp_path):
    """Every command that computes with a model."""
    text = ["--model", model, "--text", TEXT, "--context", 300]
    return (["eval", *text, "--json", tmp_path / "out.json"],
            ["eval", *text, "--attention", "dense", "--json", "-"],
            ["inspect", *text, "--layer", "2", "--output", tmp_path / "map.svg"],
            ["generate", "--model", model, "--prompt", "def main(", "--tokens", 4])


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_weights_that_are_no_numbers_are_refused(model, tmp_path, bits):
    name = "model.layers.3.self_attn.v_proj.weight"
    shard = edit_tensor(model, name, lambda values: values.__setitem__(2 * 256 + 5, bits))
    for command in runs_of(model, tmp_path):
        run_bad(*command, says=f"{shard}: tensor {name}: element [2,5] is NaN or infinity")
    assert list(tmp_path.iterdir()) == [model]


def test_an_overflow_is_named_and_exits_with_1(model, tmp_path):
    """Every weight is finite, no product of them is."""
    edit_tensor(model, "model.layers.3.self_attn.o_proj.weight",
                lambda values: values.__setitem__(slice(None), [0x7F00] * len(values)))
    for command in runs_of(model, tmp_path):
        run_bad(*command, code=1, says="layer 3, token 0: its attention holds NaN, infinity")
    assert list(tmp_path.iterdir()) == [model]


def test_an_overflow_of_one_token_names_it(model, tmp_path):
    first = TEXT.read_bytes().index(b"(")
    def change(values):
        values[ord("(") * 256:(ord("(") + 1) * 256] = [0x7F00] * 256
    edit_tensor(model, "model.embed_tokens.weight", change)
    for command in runs_of(model, tmp_path):
        token = "def main(".index("(") if command[0] == "generate" else first
        run_bad(*command, code=1, says=f"layer 0, token {token}: its embedding")


def test_text_paths_and_layers(tmp_path):
    short, ids = tmp_path / "short.txt", tmp_path / "ids.safetensors"
    short.write_text("x")
    ids.write_bytes(safetensors({"ids": ("I32", (3,), [1, 2, 384])}))
    run_bad("eval", "--model", MODEL, "--text", short, says=["short.txt", "1", "2"])
    run_bad("eval", "--model", MODEL, "--text", tmp_path / "none", says="none")
    run_bad("eval", "--model", MODEL, "--token-ids", ids, says="384")
    for path in (tmp_path / "no" / "out.json", tmp_path):
        eval_bad(MODEL, "--json", path, says=str(path))
        eval_bad(MODEL, "--trace", path, says=str(path))
    inspect = ["inspect", "--model", MODEL, "--text", TEXT, "--context", "64", "--output"]
    run_bad(*inspect, tmp_path / "map.svg", "--layer", "0", says=["0", "1, 2, 3, 4, 5"])
    run_bad(*inspect, tmp_path / "map.svg", "--layer", "6", says="1, 2, 3, 4, 5")
    run_bad(*inspect, tmp_path / "map.png", "--layer", "1", says=".svg")
    run_bad(*inspect, tmp_path / "no" / "map.svg", "--layer", "1", says="map.svg")
    run_bad("inspect", "--model", MODEL, "--layer", "1", "--output", tmp_path / "m.svg",
            says="--text")
    run_bad("generate", "--model", MODEL, "--prompt", "x", "--temperature", "hot")
    assert sorted(p.name for p in tmp_path.iterdir()) == [ids.name, short.name]


@pytest.mark.parametrize("kind, holds", [("svg", ["<svg", "KV head 1", "</svg>"]),
                                         ("html", ["<!doctype html>", "<svg", "</html>"])])
def test_inspect(tmp_path, kind, holds):
    path = tmp_path / f"map.{kind}"
    out = run_ok("inspect", "--model", MODEL, "--text", TEXT, "--layer", "2", "--context", "1500",
                 "--topk", "4", "--output", path)
    assert "p50" in out
    picture = path.read_text()
    assert all(part in picture for part in holds)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", picture), "must be self-contained"


def test_generate_is_deterministic():
    flags = ["generate", "--model", MODEL, "--prompt", "def main(", "--tokens", "12"]
    assert run_ok(*flags) == run_ok(*flags)
    sampled = [*flags, "--temperature", "1.5", "--seed"]
    assert run_ok(*sampled, 3) == run_ok(*sampled, 3) != run_ok(*sampled, 4)


def ids_of(tmp_path, count, vocabulary):
    path = tmp_path / "ids.safetensors"
    random.seed(5)
    path.write_bytes(safetensors({
        "ids": ("I32", (count,), [random.randrange(3, vocabulary) for _ in range(count)])}))
    return path


def test_ids_give_ids_and_text_gives_bytes(model, tmp_path):
    """code-11m has 384 ids: none may be lost behind a prompt of ids."""
    def change(values):  # one of the two is always the most likely
        values[300 * 256:302 * 256] = [0x447A] + [0] * 255 + [0xC47A] + [0] * 255
    edit_tensor(model, "lm_head.weight", change)
    edit_config(model, eos_token_id=None)
    out = run_ok("generate", "--model", model, "--token-ids", ids_of(tmp_path, 20, 256),
                 "--tokens", 9)
    assert len(out.split()) == 9 and set(out.split()) <= {"300", "301"}
    assert run_ok("generate", "--model", model, "--prompt", "x", "--tokens", 9) == "\n"
    ids = run_ok("generate", "--model", MODEL, "--token-ids", ids_of(tmp_path, 20, 256),
                 "--tokens", 9).split()
    assert len(ids) == 9 and all(0 <= int(x) < 384 for x in ids)


def write_generation_config(model, **keys):
    (model / "generation_config.json").write_text(json.dumps(keys))


def test_generation_config_ends_the_text(model, tmp_path):
    ids = tmp_path / "ids.safetensors"
    ids.write_bytes(safetensors({"ids": ("I32", (9,), list(b"def main("))}))
    flags = ["generate", "--model", model, "--token-ids", ids, "--tokens", 16]
    edit_config(model, eos_token_id=None)
    made = run_ok(*flags).split()
    assert len(made) == 16
    stop = next(i for i, token in enumerate(made) if i > 3 and token not in made[:i])
    expected = made[:stop]
    for eos in (int(made[stop]), [383, int(made[stop])]):
        write_generation_config(model, eos_token_id=eos)
        assert run_ok(*flags).split() == expected
    write_generation_config(model, eos_token_id=int(made[stop]))
    edit_config(model, eos_token_id=int(made[1]))
    assert run_ok(*flags).split() == expected, "generation_config.json wins"
    write_generation_config(model, bos_token_id=1)
    assert run_ok(*flags).split() == made[:1], "config.json's where it is silent"


def test_generation_config_gives_the_sampling(model):
    flags = ["generate", "--model", model, "--prompt", "def main(", "--tokens", "12", "--seed", "3"]
    greedy = run_ok(*flags)
    values = {"temperature": 1.5, "top_k": 30, "top_p": 0.95}
    sampled = run_ok(*flags, "--temperature", 1.5, "--top-k-sampling", 30, "--top-p", 0.95)
    assert sampled != greedy
    write_generation_config(model, do_sample=True, **values)
    assert run_ok(*flags) == sampled
    assert run_ok(*flags, "--temperature", 0) == greedy
    write_generation_config(model, do_sample=False, **values)
    assert run_ok(*flags) == greedy
    write_generation_config(model, do_sample=True)
    assert run_ok(*flags) == run_ok(*flags, "--temperature", 1, "--top-k-sampling", 50)


def test_broken_generation_configs_are_named(model):
    path = model / "generation_config.json"
    for text, says in (("{", "JSON"), ('{"eos_token_id": "</s>"}', "eos_token_id"),
                       ('{"do_sample": true, "top_p": 7}', "top_p: got 7")):
        path.write_text(text)
        run_bad("generate", "--model", model, "--prompt", "x", says=[str(path), says])
        run_ok("inspect", "--model", model, "--text", TEXT, "--context", 64, "--layer", 1,
               "--output", model / "map.svg")  # no business of the others


def test_long_files_are_cut_with_a_note(tmp_path):
    """One default for every command that reads a text; a note says so, under --quiet too."""
    ids = ids_of(tmp_path, 16385, 96)
    base = ["--model", TINY, "--token-ids", ids]
    commands = (["eval", *base, "--attention", "msa", "--json", tmp_path / "out.json"],
                ["inspect", *base, "--layer", "1", "--output", tmp_path / "map.svg"])
    for command in commands:
        for quiet in ([], ["--quiet"]):
            done = run(*command, *quiet)
            assert done.returncode == 0, done.stderr
            assert done.stderr == (f"msa: note: {ids}: cut to its first 16384 tokens, "
                                   "--context N reads more\n")
            assert "16,384" in done.stdout or "16384" in done.stdout
        whole = run_ok(*command, "--context", 16385)
        assert "16,385" in whole or "16385" in whole
        run_ok(*command, "--context", 300)
        run_bad(*command, "--context", 16386, says=["16385", "16386"])
        assert "16384" in run_ok(command[0], "--help")
    ids_of(tmp_path, 16384, 96)
    assert "16384" in run_ok(*commands[0])


# --- files and the terminal -----------------------------------------------------------------------

def test_outputs_replace_files_and_spare_devices(tmp_path):
    target, link = tmp_path / "info.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    run_ok("info", "--json", link)
    assert link.is_symlink() and json.loads(target.read_text())["version"]
    run_ok("info", "--json", "/dev/null")
    assert Path("/dev/null").is_char_device()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["info.json", "link.json"]


def writers(tmp_path):
    """Every option of every command that writes a file: (arguments without the path, a name)."""
    (tmp_path / "in.safetensors").write_bytes(safetensors(attend_inputs()))
    read = ["--model", MODEL, "--text", TEXT, "--context", 300]
    bench = ["bench", "--op", "merge", "--context", 300, "--repeats", 2]
    evaluate = ["eval", *read, "--topk", 2, "--attention", "msa"]
    attend = ["attend", "--input", tmp_path / "in.safetensors", "--output"]
    return ([*attend],
            [*attend, "/dev/null", "--json"],
            [*evaluate, "--json"],
            [*evaluate, "--trace"],
            [*bench, "--json"],
            [*bench, "--tsv"],
            ["check", "--op", "merge", "--backend", "reference", "--json"],
            ["info", "--json"],
            ["inspect", *read, "--layer", 2, "--output"])


@pytest.mark.parametrize("number", range(9))
def test_a_failed_write_leaves_the_old_file(tmp_path, number):
    """No file of the command may grow beyond 100 bytes, as on a full disk."""
    command = writers(tmp_path)[number]
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "result.svg"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    for old in (None, b"old" * 100):
        if old:
            target.write_bytes(old)
        done = run(*command, target, preexec_fn=limit)
        assert done.returncode == 2, (done.stdout, done.stderr)
        assert done.stderr == f"msa: error: {target}: cannot be written, File too large\n"
        assert [p.read_bytes() for p in folder.iterdir()] == ([old] if old else [])
    run_ok(*command, target)
    assert list(folder.iterdir()) == [target] and target.read_bytes() != old


def test_a_mapped_result_stays_as_it_is(attend, tmp_path):
    out = tmp_path / "out.safetensors"
    run_ok(*attend(attend_inputs()))
    first = out.read_bytes()
    with out.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        others = attend_inputs()
        others["k"], others["v"] = others["v"], others["k"]
        run_ok(*attend(others))  # of the same size: a shorter file would end this process
        assert mapped[:] == first
    assert out.read_bytes() != first
    out.chmod(0o600)
    arguments = attend(attend_inputs())
    run_ok(*arguments)
    assert out.read_bytes() == first and out.stat().st_mode & 0o777 == 0o600
    run_ok(*arguments[:4], arguments[2])  # over its own input
    assert arguments[2].read_bytes() == first


def test_outputs_to_pipes_links_and_stdout(attend, tmp_path):
    arguments = attend(attend_inputs())
    run_ok(*arguments)
    out = tmp_path / "out.safetensors"
    expected = out.read_bytes()
    for name in ("-", "/dev/stdout"):
        assert json.loads(run_ok("info", "--json", name))["version"]
        with (tmp_path / "stdout").open("wb") as stdout:
            subprocess.run([MSA, *map(str, arguments[:4]), name], stdout=stdout, check=True)
        assert (tmp_path / "stdout").read_bytes() == expected
        with (tmp_path / "stdout").open("ab") as stdout:  # as `>>`: behind what is there
            subprocess.run([MSA, *map(str, arguments[:4]), name], stdout=stdout, check=True)
        assert (tmp_path / "stdout").read_bytes() == 2 * expected
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    run_ok(*arguments[:4], pipe)
    reader.join(60)
    assert seen == [expected]
    link = tmp_path / "link"
    link.symlink_to("later.safetensors")  # names nothing yet
    run_ok(*arguments[:4], link)
    assert link.is_symlink() and (tmp_path / "later.safetensors").read_bytes() == expected
    with open("/dev/full", "wb") as full:
        done = subprocess.run([MSA, "info"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr
    names = ["in.safetensors", "later.safetensors", "link", "out.safetensors", "pipe", "stdout"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_interrupt_leaves_a_clean_terminal(tmp_path):
    """A bar appears on a terminal; Ctrl-C clears it, shows the cursor and exits with 130."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(MSA, [MSA, "check", "--suite", "full", "--backend", "reference", "--json",
                       str(tmp_path / "out.json")])
    seen, deadline = b"", time.monotonic() + 60
    while b"left" not in seen and time.monotonic() < deadline:
        seen += os.read(terminal, 4096)
    assert b"left" in seen, "no progress bar within a minute"
    os.kill(pid, signal.SIGINT)
    _, status = os.waitpid(pid, 0)
    os.set_blocking(terminal, False)
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
    except OSError:  # the other end is closed, or there is no more
        pass
    assert os.waitstatus_to_exitcode(status) == 130
    assert seen.endswith(b"\r\x1b[K\x1b[?25h")
    assert list(tmp_path.iterdir()) == []
