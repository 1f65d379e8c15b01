"""The compiled part of the package, as bindings/python/module.cc binds it."""

from typing import Any, Protocol, final

__version__: str

@final
class Plan:
    """An operator bound to a backend, made by `msa_cpp.plan`."""

    @property
    def op(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def num_threads(self) -> int: ...

def plan(
    *, op: str, dtype: str, paged: bool, heads_q: int, heads_kv: int, head_dim: int,
    index_dim: int, block_size: int, topk: int, init_blocks: int, local_blocks: int,
    cuda_device: int, max_batch: int, max_tokens: int, max_seqlen_q: int, max_seqlen_k: int,
    backend: str,
) -> Plan: ...  # fmt: skip
def backends() -> list[tuple[str, bool, str, str, int]]: ...
def operators() -> list[tuple[Any, ...]]: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...

class _Operator(Protocol):
    def __call__(
        self, tensors: tuple[Any, ...], batch: tuple[Any, ...] | None, options: tuple[Any, ...],
        plan: Plan | None, workspace: Any, backend: str | None,
    ) -> tuple[Any, ...]: ...  # fmt: skip

# Every operator of the library, by its name: they all have this signature.
def __getattr__(name: str) -> _Operator: ...
