"""msa_cpp.plot: pictures show what the files say; what is refused, and how."""

import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from msa_cpp import plot
from msa_cpp._command import InputError

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/code-11m"
BENCH = ROOT / "bench/results/xeon-16.json"


def lists(tokens, block_size, topk, seed=0):
    """int32 [T,K]: the query's own block, then visible others, without repetition."""
    generator = np.random.default_rng(seed)
    ids = np.full((tokens, topk), -1, np.int32)
    for t in range(tokens):
        own = t // block_size
        others = generator.permutation(own)[: topk - 1]
        ids[t, : 1 + len(others)] = [own, *others]
    return ids


def write_trace(path, ids, layer=3, dtype="I32", **metadata):
    header = {f"layers.{layer}.block_ids": {
        "dtype": dtype, "shape": ids.shape, "data_offsets": [0, ids.nbytes]}}  # fmt: skip
    header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + ids.tobytes())


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("tokens, block_size, bins", [(70, 8, 384), (96, 8, 384), (200, 8, 10)])
def test_reading_shares(tokens, block_size, bins, monkeypatch):
    monkeypatch.setattr(plot, "MAX_BINS", bins)
    ids = lists(tokens, block_size, 3)
    got = plot.reading_shares(ids, block_size)
    blocks = -(-tokens // block_size)
    n = min(blocks, bins)
    for row in range(n):
        for column in range(n):
            pairs = [
                block in ids[t]
                for t in range(tokens)
                for block in range(t // block_size + 1)
                if t * n // tokens == row and block * n // blocks == column
            ]
            expected = np.mean(pairs) if pairs else np.nan
            np.testing.assert_allclose(got[row, column], expected, equal_nan=True)


@pytest.mark.skipif("MSA_CLI" not in os.environ, reason="MSA_CLI does not name the msa command")
def test_trace_of_the_command(tmp_path, capsys):
    trace, picture = tmp_path / "trace.safetensors", tmp_path / "map.png"
    subprocess.run(
        [os.environ["MSA_CLI"], "eval", "--model", MODEL, "--text", MODEL / "sample.txt",
         "--context", "4096", "--attention", "msa", "--trace", trace],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ids, block_size = plot.read_trace(trace, 3)
    assert (ids.shape, ids.dtype, block_size) == ((2, 4096, 16), np.int32, 128)
    shares = plot.reading_shares(ids[0], block_size)
    assert np.nanmin(shares) >= 0 and np.nanmax(shares) == 1
    assert (np.diagonal(shares) == 1).all(), "the local block is always read"
    arguments = ["selection", str(trace), "--layer", "3", "--output", str(picture)]
    assert plot.main(arguments) == 0
    assert capsys.readouterr().out == f"{trace} -> {picture}\n"
    first = picture.read_bytes()
    assert plot.main(arguments) == 0
    assert picture.read_bytes() == first, "the same trace gives the same bytes"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.png", "trace.safetensors"]
    assert picture.stat().st_mode & 0o777 == 0o644
    assert min(png_size(picture)) > 400


def test_selection_map():
    ids = np.stack([lists(300, 16, 4, seed) for seed in range(5)])
    figure = plot.selection(ids, 16, "A title")
    assert figure.get_suptitle() == "A title"
    assert "300 tokens, blocks of 16 keys, 4 per query" in figure.get_supxlabel()
    panels = [axes for axes in figure.axes if axes.get_title().startswith("KV head")]
    assert len(panels) == 5
    for axes in panels:
        assert axes.get_xlabel() == "key position (tokens)"
        assert axes.images[0].get_array().shape == (19, 19)


def test_bound_is_that_of_the_measured_rows():
    rows = plot.read_bench(BENCH)["rows"]
    compared = 0
    for msa in rows:
        if msa["op"] != "msa" or msa["new_tokens"] != msa["context"]:
            continue
        dense = next(r for r in rows if r["op"] == "dense_attention" and r["run"] == msa["run"])
        expected = dense["flops"] / msa["flops"]
        assert plot.flop_bound(msa, msa["context"]) == pytest.approx(expected, rel=1e-6)
        compared += 1
    assert compared >= 5


def test_speedup_shows_the_measured_ratios():
    bench = plot.read_bench(BENCH)
    figure = plot.speedup(bench)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "context (tokens, all of them new)"
    assert bench["commit"] in figure.get_supxlabel()
    assert "16 cores" in figure.get_supxlabel()
    drawn = {y for container in axes.containers for y in container.lines[0].get_ydata()}
    expected = {
        row["ratio_to_dense"]["median"]
        for row in bench["rows"]
        if row["op"] == "msa" and row["new_tokens"] == row["context"]
    }
    assert drawn == expected and len(expected) >= 5


def test_rows_of_another_commit_are_named():
    bench = plot.read_bench(BENCH)
    row = next(row for row in bench["rows"] if row["op"] == "msa" and row["context"] == 32768)
    row["commit"] = "an earlier one"
    assert "(32K: an earlier one)" in plot.speedup(bench).get_supxlabel()


def test_roofline_holds_every_row():
    bench = plot.read_bench(BENCH)
    figure = plot.roofline(bench)
    (axes,) = figure.axes
    assert "FLOP per byte" in axes.get_xlabel() and "GFLOP/s" in axes.get_ylabel()
    assert bench["commit"] in figure.get_supxlabel()
    drawn = [tuple(np.ravel(line.get_xydata())) for line in axes.lines]
    for row in bench["rows"]:
        point = row["flops"] / row["bytes"], row["flops"] / row["seconds_median"] / 1e9
        assert point in drawn
        assert point[1] <= 1.05 * bench["machine"]["peak_gflops"][row["backend"]]


@pytest.mark.parametrize(
    "name, page",
    [("selection", "README.md"), ("speedup", "docs/results.md"),
     ("speedup-h200", "docs/results.md"), ("roofline", "docs/python.md")],
)
def test_pictures_of_the_pages(name, page):
    path = ROOT / f"docs/images/{name}.png"
    assert path.stat().st_size <= 200_000
    assert 600 <= png_size(path)[0] <= 1200
    assert f"({path.relative_to((ROOT / page).parent)})" in (ROOT / page).read_text()


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, which must fail with one line and write nothing."""

    def check(says, *arguments):
        before = sorted(tmp_path.rglob("*"))
        assert plot.main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("msa_cpp.plot: error: ") and says in captured.err
        assert sorted(tmp_path.rglob("*")) == before

    return check


def test_bad_traces(tmp_path, refused):
    trace, out = tmp_path / "trace.safetensors", tmp_path / "map.png"
    ids = np.stack([lists(64, 8, 2)] * 2)
    good = ["selection", trace, "--layer", 3, "--output", out]
    refused("No such file", *good)
    trace.write_bytes(b"not safetensors")
    refused("not a safetensors file", *good)
    write_trace(trace, ids, layer=2)
    refused("layer 3: the file has 2", *good)
    write_trace(trace, ids, dtype="F32")
    refused("expected I32 [Hi,T,K]", *good)
    write_trace(trace, ids[0])
    refused("expected I32 [Hi,T,K]", *good)
    write_trace(trace, ids[:, :0])
    refused("expected I32 [Hi,T,K]", *good)
    for size in ("x", "0", "-8"):
        write_trace(trace, ids, block_size=size)
        refused("block_size", *good)
    write_trace(trace, ids, block_size="16")
    refused("block ids: got -1 to 7, expected -1 to 3", *good)
    write_trace(trace, ids, block_size="8")
    refused("expected a name in .png", *good[:-1], tmp_path / "map.svg")
    refused("no such directory", *good[:-1], tmp_path / "none/map.png")
    refused("--output", *good[:-2])
    refused("--layer", "selection", trace, "--output", out)
    refused("invalid choice", "nonsense")
    assert plot.main([str(argument) for argument in good]) == 0


@pytest.mark.parametrize("change, says", [
    (lambda bench: bench.pop("rows"), "not a file of msa bench"),
    (lambda bench: bench.update(rows=3), "not a file of msa bench"),
    (lambda bench: bench.update(rows=[3]), "not a file of msa bench"),
    (lambda bench: bench["rows"][0].pop("flops"), "flops: missing"),
    (lambda bench: bench["rows"][0].update(bytes="x"), "not a file of msa bench"),
    (lambda bench: bench["rows"][0].update(seconds_median=0), "seconds_median"),
    (lambda bench: bench["machine"].pop("read_gbps"), "'read_gbps': missing"),
    (lambda bench: bench.pop("machine"), "not a file of msa bench"),
    (lambda bench: bench.update(rows=[]), "row"),
    (lambda bench: [row.update(seconds_median=None) for row in bench["rows"]], "row"),
])  # fmt: skip
def test_bad_benches(change, says, tmp_path, refused):
    bench = json.loads(BENCH.read_text())
    change(bench)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    for command in ("speedup", "roofline"):
        refused(says, command, path, "--output", tmp_path / "out.png")


def test_every_committed_measurement_can_be_drawn():
    drawn = 0
    for path in (ROOT / "bench/results").glob("*.json"):
        # Only `msa bench` writes a ceiling; the other programs of bench/ have no operators to draw.
        if "peak_gflops" in json.loads(path.read_text()).get("machine", {}):
            plot.roofline(plot.read_bench(path))
            drawn += 1
    assert drawn >= 2


def test_speedup_needs_ratios(tmp_path):
    bench = plot.read_bench(BENCH)
    bench["rows"] = [row for row in bench["rows"] if row["op"] != "msa"]
    with pytest.raises(InputError, match="no prefill row of op msa"):
        plot.speedup(bench)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    figure = plot.selection(lists(64, 8, 2)[None], 8)
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot.save(figure, tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []
