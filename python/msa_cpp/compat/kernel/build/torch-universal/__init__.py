"""msa_cpp's operators under the names of MiniMax's kernel package, for loaders of kernels."""

from msa_cpp.compat.fmha_sm100 import *  # noqa: F403
from msa_cpp.compat.fmha_sm100 import __all__  # noqa: F401
