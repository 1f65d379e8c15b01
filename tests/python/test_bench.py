"""python -m msa_cpp.bench on the CPU: verdicts, files, lists. Not how long things take."""

import json
import sys
import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from msa_cpp import _measure, bench  # noqa: E402
from msa_cpp._command import InputError  # noqa: E402

SMALL = ["--device", "cpu", "--shape", "4,2", "--topk", "3", "--repeats", "2"]
ADAPTERS = ["adapter vllm", "adapter sglang", "adapter fmha"]


def test_rows_of_a_prefill_and_their_files(tmp_path):
    said = bench.body([*SMALL, "--context", "400,600", "--json", str(tmp_path / "rows.json"),
                       "--tsv", str(tmp_path / "rows.tsv")])
    result = json.loads((tmp_path / "rows.json").read_text())
    names = ["msa", "index", "sparse", "dense", *ADAPTERS, "sdpa"]
    assert [row["contender"] for row in result["rows"]] == 2 * names
    for row in result["rows"]:
        assert row["verdict"] == "ok" and 0 < row["seconds_p10"] <= row["seconds_p90"]
        assert 0 <= row["max_error"] <= _measure.TOLERANCE["f32"]
        assert row["ratio"] > 0 and row["context"] in (400, 600) and row["dtype"] == "f32"
    assert said.count("\n") == 15 and "adapter fmha" in said and result["machine"]["threads"] >= 1
    lines = (tmp_path / "rows.tsv").read_text().splitlines()
    assert len(lines) == 17 and len({line.count("\t") for line in lines}) == 1


@pytest.mark.parametrize("new_tokens", ["1", "4", "40"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decode_and_extends_in_batches(new_tokens, dtype):
    said = bench.body([*SMALL, "--context", "700", "--new-tokens", new_tokens, "--batch", "2",
                       "--selection", "random", "--dtype", dtype])
    assert said.count(f"2 x {new_tokens} over 700") == 8


def test_contenders_that_are_not_asked_for_make_nothing_large(monkeypatch):
    """The written scores of a prefill of 1M tokens alone would take 137 GB."""
    work = bench.Work(bench.Case(300, 300, 1, 4, 2, 3, "f32", "cpu", "index"), 0, None)

    def full(*size, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "full", full)
        calls = bench.contenders(work)
        assert not {"slots", "contiguous"} & work.__dict__.keys()
        with pytest.raises(MemoryError):
            calls["adapter fmha"]()
    for name in ("adapter fmha", "adapter vllm", "sdpa"):
        _measure.check(work, *calls[name]())


def test_lists_of_a_trace(tmp_path):
    """Four KV heads from two layers of two."""
    path = tmp_path / "trace.safetensors"
    layers = {}
    for layer in (3, 5):
        ids = torch.full((2, 600, 3), -1, dtype=torch.int32)
        for t in range(600):
            own = t // 128
            listed = [*range(max(0, own - 2), own + 1)] if layer == 3 else [*{0, own // 2, own}]
            listed += [j for j in range(own + 1) if j not in listed][:3 - len(listed)]
            ids[:, t, :len(listed)] = torch.tensor(sorted(listed), dtype=torch.int32)
        layers[f"layers.{layer}.block_ids"] = ids
    safetensors.save_file(layers, path, {"block_size": "128"})
    case = bench.Case(500, 20, 2, 8, 4, 3, "f32", "cpu", str(path))
    ids = bench.given_ids(case)
    assert ids.shape == (4, 40, 3)
    assert torch.equal(ids[2, 20:], layers["layers.5.block_ids"][0, 480:500])
    bench.body([*SMALL[:2], "--shape", "8,4", "--topk", "3", "--repeats", "1", "--context", "500",
                "--new-tokens", "20", "--selection", str(path)])
    for message, words in ((r"expected \[>=4,>=601,3\]", ["--context", "601", "--topk", "3"]),
                           (r"lists are \[4, 600, 3\]", ["--context", "500", "--topk", "4"])):
        with pytest.raises(InputError, match=message):
            bench.body(["--shape", "8,4", "--device", "cpu", "--selection", str(path), *words])


@pytest.mark.parametrize("flag", ["--context", "--new-tokens", "--batch", "--topk", "--repeats"])
def test_numbers_below_one_are_refused(flag):
    with pytest.raises(InputError, match=f"{flag}: got 0, expected"):
        bench.body(["--context", "100", "--device", "cpu", flag, "0"])


@pytest.mark.parametrize("wrong, message", [
    ("values", "failed: error"), ("nan", "failed: error"), ("lists", "failed: query"),
    ("better", "a missed block scores")])
def test_wrong_results_are_found(wrong, message, monkeypatch, capsys):
    """A contender that is wrong is never timed, and the command fails."""
    honest = bench.Work.ours

    def ours(work):
        calls = honest(work)
        msa = calls["msa"]

        def call():
            ids, out = msa()
            if wrong == "values":
                return ids, out * 1.01
            if wrong == "nan":
                return ids, out * float("nan")
            ids = ids.clone()
            if wrong == "lists":
                ids[..., 0] = -1
            else:  # the local block and the worst others
                last = ids[..., -1:]
                ids = torch.cat((torch.arange(2).expand(*ids.shape[:2], 2), last), -1).int()
            return ids, None

        return {"msa": call, "dense": calls["dense"]}

    monkeypatch.setattr(bench.Work, "ours", ours)
    with pytest.raises(SystemExit) as stopped:
        bench.body([*SMALL, "--context", "2048", "--new-tokens", "2"])
    assert "wrong results: msa" in str(stopped.value)
    said = capsys.readouterr()
    assert message in said.err and "dense" in said.out and "msa  " not in said.out


def test_the_calls_of_sglang(monkeypatch):
    """Its caches are ours seen slot by slot; its functions need a GPU, so ours stand for them."""
    from msa_cpp.compat import sglang

    server = types.ModuleType("sglang.srt.runtime_context")
    server.get_schedule = lambda: types.SimpleNamespace(page_size=128)
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", server)
    for new_tokens in (1, 4, 30):
        work = bench.Work(bench.Case(500, new_tokens, 2, 4, 2, 3, "f32", "cpu", "index"), 0, None)
        _measure.check(work, *work.as_sglang(sglang)())


def test_a_contender_of_somebody_else_may_fail_in_any_way():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: .*by zero"):
        bench.refusing(lambda: 1 // 0)()


def test_bad_input():
    for message, words in (("--new-tokens: got 9", ["--context", "8", "--new-tokens", "9"]),
                           ("--shape: got x", ["--shape", "x"]),
                           ("--shape: got 6,4", ["--shape", "6,4"]),
                           ("--context: got x", ["--context", "x"]),
                           ("--contenders: got foo", ["--context", "8", "--contenders", "foo"]),
                           ("--json: /not/there: no such directory", ["--json", "/not/there"]),
                           ("not-there: No such file", ["--selection", "not-there"])):
        with pytest.raises(InputError, match=message):
            bench.body(["--device", "cpu", *words])
