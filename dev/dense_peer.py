"""Dense attention of PyTorch (SDPA, cuDNN and Flash backends) on the shapes of dense_bench: 64/4
heads, D 128, bf16, random data, CUDA graphs, caches larger than L2 or taking turns.

    python dev/dense_peer.py [filter]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS_Q, HEADS_KV, DIM = 64, 4, 128


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def milliseconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    graphs = [graph_of(call) for call in calls]
    for i in range(5 if repeats > 5 else 2):
        graphs[i % len(graphs)].replay()
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for i, (begin, end) in enumerate(marks):
        begin.record()
        graphs[i % len(graphs)].replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)


def measure(
    name: str, backend: SDPBackend, batch: int, queries: int, keys: int, buffers: int, repeats: int
) -> None:
    sets = [
        (
            random(batch, HEADS_Q, queries, DIM),
            random(batch, HEADS_KV, keys, DIM),
            random(batch, HEADS_KV, keys, DIM),
        )
        for _ in range(buffers)
    ]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
        causal = queries > 1
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    label = f"{name} {backend.name.split('_')[0].lower()}"
    try:
        with sdpa_kernel(backend), torch.no_grad():
            times = milliseconds([call(*s) for s in sets], repeats)
    except RuntimeError as error:
        print(f"  {label:32} refused: {str(error).splitlines()[0]}")
        return
    ms = statistics.median(times)
    if queries > 1:
        flops = 4 * HEADS_Q * DIM * queries * (queries + 1) / 2
        rate = f"{flops / ms * 1e-9:6.1f} TFLOP/s"
    else:
        rate = f"{batch * keys * HEADS_KV * DIM * 4 / ms * 1e-9:6.2f} TB/s"
    print(f"  {label:32} {ms:10.4f} ms ({times[0]:.4f} .. {times[-1]:.4f})  {rate}", flush=True)


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, batch, queries, keys, buffers, repeats in [
        ("prefill 8K", 1, 8192, 8192, 1, 20),
        ("prefill 32K", 1, 32768, 32768, 1, 8),
        ("prefill 128K", 1, 131072, 131072, 1, 3),
        ("decode 1 x 32K", 1, 1, 32768, 8, 20),
        ("decode 1 x 128K", 1, 1, 131072, 3, 20),
        ("decode 1 x 1M", 1, 1, 1 << 20, 1, 20),
        ("decode 8 x 128K", 8, 1, 131072, 1, 20),
        ("decode 32 x 32K", 32, 1, 32768, 1, 20),
    ]:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            if wanted in name and not (backend == SDPBackend.FLASH_ATTENTION and queries > 40000):
                measure(name, backend, batch, queries, keys, buffers, repeats)


if __name__ == "__main__":
    main()
