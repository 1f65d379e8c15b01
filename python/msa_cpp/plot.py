"""Pictures of block selections and of measurements, as PNG.

    msa eval --model models/code-11m --text FILE --context 32768 --trace trace.safetensors
    python -m msa_cpp.plot selection trace.safetensors --layer 3 --output selection.png
    python -m msa_cpp.plot speedup bench/results/xeon-16.json --output speedup.png
    python -m msa_cpp.plot roofline bench/results/xeon-16.json --output roofline.png

`selection` draws which blocks each query reads, from the trace of `msa eval`. `speedup` and
`roofline` draw the rows of `msa bench --json`; machine and commit are in their captions. Needs
matplotlib.
"""

from __future__ import annotations

import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._checkpoint import read_header, read_json
from ._command import InputError, Parser, exit_code
from ._files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c2733", "#5a6775", "#dfe5ea"
# Told apart by all common kinds of colour vision, and dark enough on white.
COLOURS = (
    "#0b62a4 #d1580a #157a57 #a8447f #6a6a00 #4b4b8f #b3261e #2f8f9d #7a4a1d #8a8f98"
).split()
MAX_BINS = 384  # of a selection map, per axis: about one for each pixel
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """An empty figure, inches, whose layout leaves room for title and caption."""
    from matplotlib import style
    from matplotlib.figure import Figure

    style.use(STYLE)
    figure = Figure((width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(
        textwrap.fill(caption, int(16.5 * width)), x=0.012, ha="left", fontsize=8, color=MUTED
    )
    return figure


def tokens_text(count: float) -> str:
    """32768 -> 32K."""
    return f"{count / 1024:g}K" if count >= 1024 else f"{count:g}"


# --- selection map --------------------------------------------------------------------------------


def read_trace(path: Path, layer: int) -> tuple[np.ndarray, int]:
    """(block ids int32 [Hi,T,K], block size) of a layer, from a file of `msa eval --trace`."""
    entries, metadata, data = read_header(path)
    name = f"layers.{layer}.block_ids"
    if name not in entries:
        found = (re.fullmatch(r"layers\.(\d+)\.block_ids", key) for key in entries)
        layers = sorted(int(match[1]) for match in found if match)
        expected = ", ".join(map(str, layers)) or "none: not a trace of msa eval"
        raise InputError(f"{path}: layer {layer}: the file has {expected}")
    entry = entries[name]
    shape = entry["shape"]
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "I32" or len(shape) != 3 or not 0 < end - begin == 4 * math.prod(shape):
        raise InputError(f"{path}: {name}: expected I32 [Hi,T,K]")
    block_size = str(metadata.get("block_size", 128))
    if not block_size.isdecimal() or int(block_size) < 1:
        raise InputError(f"{path}: block_size: got {block_size}, expected a whole number >= 1")
    ids = np.fromfile(path, "<i4", (end - begin) // 4, offset=data + begin).reshape(shape)
    return ids, int(block_size)


def reading_shares(ids: np.ndarray, block_size: int) -> np.ndarray:
    """f64 [queries, blocks] in bins: the share of the queries that read a block, of those that can.

    ids is int32 [T,K] of one head; query t sees the blocks up to t / block_size. NaN where no query
    of a bin sees a block of the other.
    """
    tokens = len(ids)
    blocks = -(-tokens // block_size)
    if ids.max(initial=-1) >= blocks or ids.min(initial=0) < -1:
        raise InputError(f"block ids: got {ids.min()} to {ids.max()}, expected -1 to {blocks - 1}")
    bins = min(blocks, MAX_BINS)
    query_bin = np.arange(tokens) * bins // tokens
    block_bin = np.arange(blocks) * bins // blocks
    chosen = ids >= 0
    rows = np.broadcast_to(query_bin[:, None], ids.shape)[chosen]
    reads = np.bincount(rows * bins + block_bin[ids[chosen]], minlength=bins * bins)
    own = np.bincount(query_bin * blocks + np.arange(tokens) // block_size, minlength=bins * blocks)
    begin, size = np.searchsorted(block_bin, np.arange(bins)), np.bincount(block_bin)
    seen = np.clip(np.arange(1, blocks + 1)[:, None] - begin, 0, size)  # [own block, bin]
    visible = own.reshape(bins, blocks).astype(float) @ seen
    return np.divide(
        reads.reshape(bins, bins), visible, where=visible > 0, out=np.full((bins, bins), np.nan)
    )


def selection(ids: np.ndarray, block_size: int = 128, title: str = "") -> Figure:
    """The selection map of int32 ids [Hi,T,K], a panel per KV head: queries down, blocks across."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.ticker import FuncFormatter

    heads, tokens, topk = ids.shape
    caption = (
        f"{tokens:,} tokens, blocks of {block_size} keys, {topk} per query and KV head. "
        "White: in the future of every query."
    )
    columns = min(heads, 4)
    lines = -(-heads // columns)
    figure = new_figure(
        1.2 + 3.6 * columns, 0.8 + 3.6 * lines, title or "Which blocks each query reads", caption
    )
    shades = LinearSegmentedColormap.from_list(
        "reads", ["#eef3f8", "#bedae8", "#68aed0", "#2674b0", "#123e7a", "#0a183e"]
    )
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for head, axes in enumerate(panels.flat):
        if head >= heads:
            axes.set_visible(False)
            continue
        image = axes.imshow(
            reading_shares(ids[head], block_size),
            cmap=shades,
            norm=PowerNorm(0.5, 0, 1),
            extent=(0, tokens, tokens, 0),
            interpolation="nearest",
        )
        axes.set_title(f"KV head {head}")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
        axes.set_xticks(np.linspace(0, tokens, 5))
        axes.set_yticks(np.linspace(0, tokens, 5))
        axes.set_xlabel("key position (tokens)")
    for axes in panels[:, 0]:
        axes.set_ylabel("query position (tokens)")
    bar = figure.colorbar(image, ax=panels, shrink=0.75, aspect=28, pad=0.02)
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1], labels=["0", "5 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the queries that read the block")
    bar.outline.set_visible(False)
    return figure


# --- measurements ---------------------------------------------------------------------------------

NUMBERS = ("context new_tokens heads_q heads_kv block topk threads seconds_median bytes").split()
OTHERS = "op backend dtype selection ratio_to_dense flops".split()


def read_bench(path: Path) -> dict:
    """A file of `msa bench --json`, with the rows that were timed."""
    bench = read_json(path)
    try:
        bench["rows"] = [row for row in bench["rows"] if row["seconds_median"] is not None]
        bad = [key for row in bench["rows"] for key in NUMBERS if not row[key] > 0]
        bad += [key for row in bench["rows"] for key in OTHERS if key not in row]
        bad += [key for key in ("read_gbps", "peak_gflops") if not bench["machine"][key]]
    except KeyError as error:
        bad = [str(error)]
    except TypeError:
        bad = ["machine, rows"]
    if bad:
        raise InputError(f"{path}: not a file of msa bench --json: {bad[0]}: missing or not > 0")
    return bench


def machine_text(bench: dict) -> str:
    machine = bench["machine"]
    if "gpu" in machine:
        where = machine["gpu"]
    else:
        threads = sorted({str(row["threads"]) for row in bench["rows"]})
        where = (
            f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores, "
            f"{', '.join(threads)} threads"
        )
    kept = sorted({(row["context"], row["commit"]) for row in bench["rows"] if "commit" in row})
    earlier = ", ".join(f"{tokens_text(context)}: {commit}" for context, commit in kept)
    return f"{where}, commit {bench.get('commit', 'unknown')}" + (f" ({earlier})" if kept else "")


def group_size(row: dict) -> int:
    return row["heads_q"] // row["heads_kv"]


def flop_bound(row: dict, tokens: int) -> float:
    """How much less arithmetic MSA needs than dense attention for a prefill of `tokens`."""
    position = np.arange(tokens, dtype=np.float64)
    own = position % row["block"] + 1  # visible keys of the query's own block, always chosen
    read = np.minimum(position + 1, (row["topk"] - 1) * row["block"] + own).sum()
    visible = tokens * (tokens + 1) / 2
    # Attention: two products per query head and key; index: one per KV head and key.
    return 2 * group_size(row) * visible / (2 * group_size(row) * read + visible)


def series_name(row: dict) -> str:
    lists = {"random": ", random blocks", "index": ""}.get(row["selection"], ", trained lists")
    return f"{row['heads_q']}/{row['heads_kv']} heads, {row['dtype']}, {row['backend']}{lists}"


def speedup(bench: dict) -> Figure:
    """Measured speed-up of MSA prefill over dense attention, under the bound by arithmetic."""
    series: dict[str, list[dict]] = {}
    for row in bench["rows"]:
        if row["op"] == "msa" and row["ratio_to_dense"] and row["new_tokens"] == row["context"]:
            series.setdefault(series_name(row), []).append(row)
    if not series:
        raise InputError("no prefill row of op msa with a ratio_to_dense: run dense_attention too")
    caption = (
        f"{machine_text(bench)}. Index, selection and attention as one call; medians of "
        "interleaved rounds, bars from the 10th to the 90th percentile, points of one context side "
        "by side. Heads: query/KV. Lines: what the number of multiply-adds would allow."
    )
    figure = new_figure(7.2, 4.4, "Prefill: MSA against dense attention", caption)
    axes = figure.subplots()
    peers: dict[int, list[dict]] = {}  # by context
    for rows in series.values():
        for row in rows:
            peers.setdefault(row["context"], []).append(row)
    low, high = min(4096, min(peers) // 2), 2 * max(peers)
    line = np.geomspace(low, high, 40)
    colours: dict[tuple, str] = {}  # one per bound

    def beside_peers(row: dict) -> float:
        others = peers[row["context"]]
        return row["context"] * 2 ** (0.06 * (others.index(row) - (len(others) - 1) / 2))

    for number, (name, rows) in enumerate(series.items()):
        bound = group_size(rows[0]), rows[0]["topk"], rows[0]["block"]
        if bound not in colours:
            colours[bound] = COLOURS[len(colours) % len(COLOURS)]
            bounds = [flop_bound(rows[0], int(tokens)) for tokens in line]
            label = f"bound: {bound[0]} query heads per KV head, {bound[1]} blocks of {bound[2]}"
            axes.plot(line, bounds, color=colours[bound], linewidth=1.3, label=label)
        rows = sorted(rows, key=lambda row: row["context"])
        ratios = [row["ratio_to_dense"] for row in rows]
        axes.errorbar(
            [beside_peers(row) for row in rows],
            [ratio["median"] for ratio in ratios],
            [
                [ratio["median"] - ratio["p10"] for ratio in ratios],
                [ratio["p90"] - ratio["median"] for ratio in ratios],
            ],
            fmt="oDs^vP"[number % 6] + ":",
            linewidth=1,
            color=colours[bound],
            markeredgecolor="white",
            markersize=7,
            capsize=2,
            label=name,
        )
    axes.axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    ticks = [1 << power for power in range(32) if low <= 1 << power <= high]
    axes.set_xticks(ticks, labels=[tokens_text(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context (tokens, all of them new)")
    axes.set_ylabel("times faster than dense attention")
    axes.grid(axis="y")
    axes.legend(loc="upper left")
    return figure


def roofline(bench: dict) -> Figure:
    """Every measured row under the machine's measured ceilings."""
    machine = bench["machine"]
    rows = [row for row in bench["rows"] if row["flops"] > 0]  # some operators only move data
    if not rows:
        raise InputError("no timed row with products")
    read = machine["read_gbps"]
    caption = (
        f"{machine_text(bench)}. Bytes: inputs read once, outputs written once. Ceilings as "
        f"measured: reads at {read:.0f} GB/s, and the best matrix product of a backend."
    )
    figure = new_figure(7.2, 4.6, "Operators under the ceilings of the machine", caption)
    axes = figure.subplots()
    x = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(x) / 3, max(x) * 4
    for name in sorted({row["backend"] for row in rows} & machine["peak_gflops"].keys()):
        peak = machine["peak_gflops"][name]
        axes.plot([low, peak / read, high], [low * read, peak, peak], color=INK, linewidth=1.2)
        axes.annotate(
            f"{name}: {peak:,.0f} GFLOP/s",
            (high, peak),
            (-2, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
        )
    operators = list(dict.fromkeys(row["op"] for row in rows))
    for row in rows:
        axes.plot(
            row["flops"] / row["bytes"],
            row["flops"] / row["seconds_median"] / 1e9,
            "o" if row["new_tokens"] == row["context"] else "D",
            color=COLOURS[operators.index(row["op"]) % len(COLOURS)],
            markerfacecolor=None if row["dtype"] == "f32" else "none",
            markersize=6.5,
            alpha=0.85,
        )
    for colour, op in zip(COLOURS, operators, strict=False):
        axes.plot([], [], "s", color=colour, label=op)
    kinds = {"prefill": ("o", None), "behind a cache": ("D", None), "open: 16 bits": ("o", "none")}
    for label, (marker, face) in kinds.items():
        axes.plot([], [], marker, color=MUTED, markerfacecolor=face, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("arithmetic intensity (FLOP per byte)")
    axes.set_ylabel("speed (GFLOP/s)")
    axes.grid(True)
    axes.legend(loc="best", ncols=2)
    return figure


# --- the command ----------------------------------------------------------------------------------


def save(figure: Figure, output: str | os.PathLike, dpi: int = 110) -> None:
    """Writes a PNG whole or not at all; the same figure gives the same bytes."""
    output = Path(output)
    if output.suffix != ".png":
        raise InputError(f"--output: got {output}, expected a name in .png")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such directory")
    with whole_file(output) as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})


def run(arguments: list[str] | None) -> str:
    parser = Parser(prog="python -m msa_cpp.plot", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("selection", "TRACE"), ("speedup", "BENCH"), ("roofline", "BENCH")):
        command = commands.add_parser(name)
        command.add_argument("file", metavar=what)
        command.add_argument("--output", required=True, metavar="FILE.png")
        if name == "selection":
            command.add_argument("--layer", type=int, required=True)
            command.add_argument("--title", default="")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("matplotlib is not installed: pip install matplotlib") from None
    if options.command == "selection":
        ids, block_size = read_trace(Path(options.file), options.layer)
        figure = selection(ids, block_size, options.title)
    else:
        draw = {"speedup": speedup, "roofline": roofline}[options.command]
        figure = draw(read_bench(Path(options.file)))
    save(figure, options.output)
    return f"{options.file} -> {options.output}"


def main(arguments: list[str] | None = None) -> int:
    return exit_code("msa_cpp.plot", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
