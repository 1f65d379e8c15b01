"""MiniMax Sparse Attention (arXiv 2606.13392) for NumPy arrays and torch tensors; see msa_cpp.ops."""

from ._core import __version__
from .ops import dense_attention, index_select, sparse_attention

__all__ = ["__version__", "dense_attention", "index_select", "sparse_attention"]
