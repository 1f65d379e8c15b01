"""MiniMax Sparse Attention (arXiv 2606.13392) on NumPy and torch; see msa_cpp.ops."""

from . import ops
from ._core import __version__
from .ops import *  # noqa: F403

__all__ = ["__version__", *ops.__all__]
