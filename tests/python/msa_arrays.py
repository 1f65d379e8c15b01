"""NumPy and torch behind one face, for tests that run on both.

MSA_TEST_DEVICE=cuda puts the tensors on a GPU: `dev/gpu.sh python` runs the suite so.
"""

import os

import numpy as np
import pytest

try:
    import torch
except ImportError:
    torch = None
try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

DEVICE = os.environ.get("MSA_TEST_DEVICE", "cpu")


class Kind:
    """Makes arrays of one framework and dtype, and reads them back as NumPy."""

    def __init__(self, framework, dtype):
        self.framework, self.dtype = framework, dtype

    def __repr__(self):
        return f"{self.framework}-{self.dtype}"

    def skip_unless_there(self):
        if self.framework == "torch" and torch is None:
            pytest.skip("torch is not installed")
        if self.framework == "numpy" and self.dtype == "bfloat16" and ml_dtypes is None:
            pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")

    def raw(self, array):
        """The same memory where it can be shared: strides and dtype stay."""
        if self.framework == "torch":
            shared = torch.from_numpy(array)
            return shared if DEVICE == "cpu" else _copy(shared, shared.dtype)
        return array

    def rows(self, array):
        """A float32 array in this dtype; strides are kept."""
        if self.framework == "torch":
            shared = torch.from_numpy(array)
            if self.dtype == "float32" and DEVICE == "cpu":
                return shared
            return _copy(shared, getattr(torch, self.dtype))
        if self.dtype == "float32":
            return array
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float16
        strides = [s // array.itemsize * np.dtype(dtype).itemsize for s in array.strides]
        extent = sum((n - 1) * s for n, s in zip(array.shape, strides)) if array.size else 0
        memory = np.zeros(extent // 2 + 1, dtype)
        out = np.lib.stride_tricks.as_strided(memory, array.shape, strides)
        out[...] = array
        return out

    def empty(self, shape, dtype=None):
        dtype = dtype or self.dtype
        if self.framework == "torch":
            return torch.full(shape, 77, dtype=getattr(torch, dtype), device=DEVICE)
        return np.full(shape, 77, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def rounded(self, array):
        """A float32 array as this dtype holds it, in float32."""
        return self.numpy(self.rows(np.ascontiguousarray(array))).astype(np.float32)

    def numpy(self, array):
        if self.framework == "torch":
            assert isinstance(array, torch.Tensor)
            return (array.float() if array.dtype.is_floating_point else array).cpu().numpy()
        assert isinstance(array, np.ndarray)
        return array.astype(np.float32) if array.dtype.itemsize == 2 else array

    def batch(self, p, decode=False, **options):
        """The metadata of a Problem, and the bounds of its lengths where they are not read back."""
        out = p.metadata(self.raw, **options)
        if self.framework == "torch" and DEVICE != "cpu":
            out["max_seqlen_k"] = max([*p.kv_lens, 0])
            if not decode:  # else the calls give it
                out["max_seqlen_q"] = max([*p.q_lens, 0])
        return out


def _copy(array, dtype):
    """On the device of the tests, with the strides of `array`."""
    out = torch.empty_strided(array.shape, array.stride(), dtype=dtype, device=DEVICE)
    return out.copy_(array)


# A GPU takes tensors of torch alone, and has backends of its own.
FRAMEWORKS = ["numpy", "torch"] if DEVICE == "cpu" else ["torch"]
BACKENDS = ["auto", "reference"] if DEVICE == "cpu" else ["cuda", "cuda-plain"]
KINDS = [Kind(f, d) for f in FRAMEWORKS for d in ("float32", "bfloat16", "float16")]
