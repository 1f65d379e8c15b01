"""MiniMax Sparse Attention (arXiv 2606.13392) on NumPy and torch; see msa_cpp.ops
and, for training, msa_cpp.gradients."""

from . import gradients, ops
from ._core import __version__
from .gradients import *  # noqa: F403
from .ops import *  # noqa: F403

__all__ = ["__version__", *gradients.__all__, *ops.__all__]
