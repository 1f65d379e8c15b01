"""MiniMax Sparse Attention (arXiv 2606.13392) on NumPy arrays and torch tensors.

`msa_attention` is a sparse layer's attention in one call. It is made of the operators of
`msa_cpp.ops` and, for training, of `msa_cpp.gradients`, which share these rules:

- The lengths of a batch and the places of its keys are a `Batch`, given as ``batch=``, or its
  fields as keywords.
- Results are returned, optional ones behind the others where ``return_<name>=True`` asks for them.
  Any of them is written into an array that is given under its name: ``out=``, ``lse=``, ``dq=``.
- NumPy in, NumPy out; torch in, torch out, on the same device. Nothing is copied or converted.
"""

from . import attention, gradients, ops
from ._core import __version__
from .attention import *  # noqa: F403
from .gradients import *  # noqa: F403
from .ops import *  # noqa: F403

__all__ = ["__version__", *attention.__all__, *gradients.__all__, *ops.__all__]
