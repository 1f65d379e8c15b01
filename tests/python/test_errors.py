"""Bad input: one clear exception each, a thousand times without growth, and nothing is touched."""

import ctypes
import dataclasses
import inspect
import resource
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np
import pytest

import msa_cpp
from msa_arrays import DEVICE, FRAMEWORKS, Kind
from msa_cpp._call import OPERATORS
from msa_heap import growth
from msa_oracle import Problem

try:
    import torch
except ImportError:
    torch = None

INT_MAX = 2**31 - 1


class Device:
    """What exports memory of another device by DLPack; nobody may look at the memory."""

    class _Tensor(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32),
                    ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
                    ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                    ("shape", ctypes.POINTER(ctypes.c_int64)),
                    ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
                    ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]

    def __init__(self, array, device_type=2, device_id=0):
        self.device = (device_type, device_id)
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        code = {"f": 2, "i": 0}[array.dtype.kind]
        self.tensor = self._Tensor(0x1000, device_type, device_id, array.ndim, code,
                                   8 * array.itemsize, 1, self.shape, self.strides, 0, None, None)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p,
                                                       ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


def arrays(op="sparse_attention"):
    """Good arguments of an operator by their names: two sequences, paged where it takes pages."""
    p = Problem([2, 1], [11, 5], heads_kv=2, group=2, head_dim=8, index_dim=4, block_size=4, topk=3,
                paged=OPERATORS[op].keys != "packed")
    out = {
        "q": p.normal(3, 4, 8), "k": p.store(p.normal(16, 2, 8)), "v": p.store(p.normal(16, 2, 8)),
        "q_idx": p.normal(3, 2, 4), "k_idx": p.store(p.normal(16, 4)), "block_ids": p.block_ids(),
        "out": np.full((3, 4, 8), 7, np.float32), "lse": np.full((3, 4), 7, np.float32),
        "scores": np.ones((2, 3, 5), np.float32), "o_parts": np.ones((2, 3, 4, 8), np.float32),
        "lse_parts": np.ones((2, 3, 4), np.float32), "index_lse": np.ones((3, 2), np.float32),
        "scores_parts": p.normal(2, 2, 3, 3),
        "block_ids_parts": np.arange(36, dtype=np.int32).reshape(2, 2, 3, 3),
        "dout": p.normal(3, 4, 8), "topk": 3, "block_size": 4, "max_seqlen_q": 2,
        **p.metadata(np.copy),
    }
    out["block_ids"][0, 0] = [1, 0, -1]
    out |= {f"{name}_pages": out[name] for name in ("k", "v", "k_idx")}
    if op == "append_paged":
        out |= {"k": np.ones((3, 2, 8), np.float32), "v": np.ones((3, 2, 8), np.float32)}
        del out["k_idx"], out["k_idx_pages"]
    for a in OPERATORS[op].outputs:  # results of other shapes are made
        if a.name in out and (a.name, a.shape) not in (("out", "T,Hq,D"), ("lse", "T,Hq")):
            del out[a.name]
    return out


def parameters(op):
    """The arguments of its function: (those by position, those by name)."""
    known = inspect.signature(getattr(msa_cpp, op)).parameters
    needed = [name for name, p in known.items()
              if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    fields = [f.name for f in dataclasses.fields(msa_cpp.Batch)] if OPERATORS[op].batched else []
    return needed, [*(known.keys() - {*needed, "keywords"}), *fields, "backend", "workspace"]


@dataclass
class Bad:
    """`op` called with good arguments but for `changes`, values or functions of the good one."""

    name: str
    op: str
    error: type
    message: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return f"{self.op}, {self.name}"


def set_at(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


def half_of(array):
    return np.ascontiguousarray(array[..., :array.shape[-1] // 2])


def strided(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


CASES = [
    # types, dtypes, ranks, strides
    Bad("a list for an array", "sparse_attention", TypeError,
        "q: got list, expected a NumPy array, a torch tensor", {"q": [1.0]}),
    Bad("None for an array", "sparse_attention", TypeError,
        "k: got None, expected an array [P,Hkv,Bk,D]", {"k": None}),
    Bad("8-bit rows", "sparse_attention", NotImplementedError,
        "k: got dtype int8; 8-bit and 4-bit elements are not in this version",
        {"k": lambda a: np.ones(a.shape, np.int8)}),
    Bad("booleans", "sparse_attention", TypeError, "q: got dtype bool, expected float32",
        {"q": np.bool_}),
    Bad("float64", "sparse_attention", TypeError,
        "q: got dtype float64, expected float32, bfloat16 or float16", {"q": np.float64}),
    Bad("int64 metadata", "sparse_attention", TypeError,
        "seq_lens: got dtype int64, expected int32 (nothing is converted",
        {"seq_lens": np.int64}),
    Bad("int64 ids", "sparse_attention", TypeError, "block_ids: got dtype int64, expected int32",
        {"block_ids": np.int64}),
    Bad("float ids", "block_lists", TypeError, "block_ids: got dtype float32, expected int32",
        {"block_ids": np.float32}),
    Bad("two dtypes", "sparse_attention", TypeError,
        "k: got dtype float16, expected float32 like the other arrays", {"k": np.float16}),
    Bad("an output of another dtype", "sparse_attention", ValueError,
        "out: got dtype f16, expected f32", {"out": lambda a: a.astype(np.float16)}),
    Bad("an lse of another dtype", "sparse_attention", TypeError,
        "lse: got dtype float16, expected float32", {"lse": lambda a: a.astype(np.float16)}),
    Bad("rank 2", "sparse_attention", ValueError, "q: got rank 2 shape [4,8], expected [T,Hq,D]",
        {"q": lambda a: a[0]}),
    Bad("rank 5", "sparse_attention", ValueError, "q: got rank 5, expected 1 to 4",
        {"q": lambda a: a[None, None]}),
    Bad("rank 0", "sparse_attention", ValueError, "seq_lens: got rank 0, expected 1 to 4",
        {"seq_lens": lambda a: a[0].reshape(())}),
    Bad("packed keys with a page table", "sparse_attention", ValueError,
        "k: got rank 3 shape [6,2,8], expected [P,Hkv,Bk,D]", {"k": lambda a: a[:6, :, 0]}),
    Bad("an inner axis with a stride", "sparse_attention", ValueError,
        "q: got innermost stride 2, expected 1", {"q": strided}),
    Bad("ids with an inner stride", "sparse_attention", ValueError,
        "block_ids: got innermost stride 2, expected 1", {"block_ids": strided}),
    Bad("foreign byte order", "sparse_attention", ValueError,
        "q: got foreign byte order", {"q": lambda a: a.astype(">f4")}),
    Bad("a read-only output", "sparse_attention", ValueError,
        "out: got a read-only array, expected a writable one",
        {"out": lambda a: np.broadcast_to(a, a.shape)}),
    Bad("an output that overlaps itself", "sparse_attention", ValueError,
        "out: got stride 0 on axis 0", {"out": lambda a: np.lib.stride_tricks.as_strided(
            a, a.shape, (0, *a.strides[1:]))}),
    Bad("another head dim", "sparse_attention", ValueError,
        "v: got rank 4 shape [7,2,4,4], expected [P,Hkv,Bk,D] = [7,2,4,8]", {"v": half_of}),
    Bad("heads that do not divide", "sparse_attention", ValueError,
        "heads_q: got 3, expected a multiple of heads_kv = 2", {"q": lambda a: a[:, :3],
                                                                "out": None, "lse": None}),
    Bad("an output of another shape", "sparse_attention", ValueError,
        "out: got rank 3 shape [2,4,8], expected [T,Hq,D] = [3,4,8]", {"out": lambda a: a[:2]}),
    Bad("pages of another block size", "sparse_attention", ValueError,
        "k: got rank 4 shape [7,2,4,8], expected [P,Hkv,Bk,D] = [*,2,16,8]", {"block_size": 16}),
    # devices
    Bad("mixed devices", "sparse_attention", ValueError,
        "k: got device kind 2 id 0, expected the problem's, kind 1 id 0", {"k": Device}),
    Bad("metadata on another device", "dense_attention", ValueError,
        "page_table: got device kind 2 id 0, expected the problem's, kind 1",
        {"page_table": Device}),
    Bad("an unknown device", "sparse_attention", ValueError,
        "q: got DLPack device 8, expected CPU or CUDA memory", {"q": lambda a: Device(a, 8)}),
    Bad("CUDA tensors without a bound", "dense_attention", ValueError,
        "max_seqlen_q: not given, expected the longest length in cu_seqlens_q, since lengths in "
        "CUDA memory are not read back",
        {n: Device for n in ("q", "k", "v", "cu_seqlens_q", "seq_lens", "page_table")}
        | {"out": None, "max_seqlen_q": None}),
    Bad("CUDA tensors without a backend", "dense_attention", NotImplementedError,
        "no backend can compute dense_attention here",
        {n: Device for n in ("q", "k", "v", "out", "lse", "cu_seqlens_q", "seq_lens", "page_table")}
        | {"max_seqlen_q": 2, "max_seqlen_k": 11}),
    # lengths and pages
    Bad("a negative length", "sparse_attention", ValueError,
        "seq_lens[1]: got -3, expected 0..", {"seq_lens": set_at(1, -3)}),
    Bad("a length behind the page table", "sparse_attention", ValueError,
        "seq_lens[1]: got 17, expected 0..16 (the plan's max_seqlen_k)",
        {"seq_lens": set_at(1, 17), "max_seqlen_k": 1000}),
    Bad("an enormous length", "sparse_attention", ValueError,
        f"seq_lens[1]: got {INT_MAX}, expected 0..16 (the plan's max_seqlen_k)",
        {"seq_lens": set_at(1, INT_MAX)}),
    Bad("a length above its bound", "sparse_attention", ValueError,
        "max_seqlen_k: got 10, the longest length in seq_lens is 11", {"max_seqlen_k": 10}),
    Bad("new tokens above their bound", "dense_attention", ValueError,
        "max_seqlen_q: got 1, the longest length in cu_seqlens_q is 2", {"max_seqlen_q": 1}),
    Bad("a negative bound", "dense_attention", ValueError,
        "max_seqlen_k: got -1, expected >= 0", {"max_seqlen_k": -1}),
    Bad("a page outside the pool", "sparse_attention", ValueError,
        "page_table[0,2]: got 7, expected 0..6", {"page_table": set_at((0, 2), 7)}),
    Bad("a negative page", "index_select", ValueError,
        "page_table[1,0]: got -1, expected 0..6", {"page_table": set_at((1, 0), -1)}),
    Bad("descending prefix sums", "index_scores", ValueError,
        "cu_seqlens_q[2]: got 1 after 2, expected ascending values",
        {"cu_seqlens_q": set_at(2, 1)}),
    Bad("prefix sums beyond the rows", "sparse_attention", ValueError,
        "cu_seqlens_q[2]: got 4, the tensor has 3 rows", {"cu_seqlens_q": set_at(2, 4)}),
    Bad("prefix sums that do not start at 0", "sparse_attention", ValueError,
        "cu_seqlens_q[0]: got 1, expected 0", {"cu_seqlens_q": set_at(0, 1)}),
    Bad("no prefix sums", "sparse_attention", ValueError,
        "cu_seqlens_q: got 0 elements, expected [B+1]", {"cu_seqlens_q": lambda a: a[:0]}),
    Bad("both kinds of key lengths", "sparse_attention", ValueError,
        "cu_seqlens_k: given, expected seq_lens alone with paged keys",
        {"cu_seqlens_k": lambda _: np.array([0, 11, 16], np.int32)}),
    Bad("a batch of another size", "sparse_attention", ValueError,
        "seq_lens: got rank 1 shape [1], expected [B] = [2]", {"seq_lens": lambda a: a[:1]}),
    Bad("a negative query offset", "sparse_attention", ValueError,
        "q_offset[1]: got -1, expected >= 0", {"q_offset": lambda _: np.array([0, -1], np.int32)}),
    # ids, K and options
    Bad("an id out of range", "sparse_attention", ValueError,
        "block_ids[0,0,0]: got 3, expected -1 or a block of sequence 0, which has 3",
        {"block_ids": set_at((0, 0, 0), 3)}),
    Bad("a negative id", "block_lists", ValueError,
        "block_ids[0,0,0]: got -2, expected -1 or a block", {"block_ids": set_at((0, 0, 0), -2)}),
    Bad("an id twice", "sparse_attention", ValueError,
        "block_ids[0,0,1]: got 1 a second time, expected distinct blocks",
        {"block_ids": set_at((0, 0, 1), 1)}),
    Bad("K = 0", "index_select", ValueError, "topk: got 0, expected >= 1", {"topk": 0}),
    Bad("more forced blocks than K", "select_blocks", ValueError,
        "init_blocks + local_blocks: got 2 + 2, expected at most topk = 3",
        {"init_blocks": 2, "local_blocks": 2}),
    Bad("K as text", "index_select", TypeError, "topk: got '16', expected an integer",
        {"topk": "16"}),
    Bad("K as a fraction", "index_select", TypeError, "topk: got 2.5, expected an integer",
        {"topk": 2.5}),
    Bad("K beyond 2^31", "index_select", ValueError, f"topk: got {2**31}, expected below 2^31",
        {"topk": 2**31}),
    Bad("a block size of 0", "index_select", ValueError, "block_size: got 0, expected >= 1",
        {"block_size": 0}),
    Bad("valid blocks beyond the scores", "select_blocks", ValueError,
        "num_valid_blocks: got 6, expected 0..5", {"num_valid_blocks": 6}),
    Bad("valid blocks of a row beyond the scores", "select_blocks", ValueError,
        "num_valid_blocks[1]: got 6",
        {"num_valid_blocks": lambda _: np.array([1, 6, 1], np.int32)}),
    Bad("scores in a list", "select_blocks", TypeError, "scores: got list",
        {"scores": [[[1.0]]], "num_valid_blocks": 1}),
    Bad("another number of blocks", "block_lists", ValueError,
        "row_ptr: got rank 2 shape [2,9], expected [Hkv,NB+1] = [2,6]", {"num_blocks": 8}),
    Bad("a scale of 0", "sparse_attention", ValueError,
        "softmax_scale: got 0, expected a finite number other than 0", {"softmax_scale": 0}),
    Bad("a scale that is no number", "sparse_attention", ValueError,
        "softmax_scale: got nan", {"softmax_scale": float("nan")}),
    Bad("a scale as text", "sparse_attention", TypeError,
        "softmax_scale: got 'x', expected a number", {"softmax_scale": "x"}),
    Bad("an unknown argument", "sparse_attention", TypeError,
        "k_scale: unknown, expected fields of a msa_cpp.Batch, workspace, plan or backend",
        {"k_scale": 1.0}),
    Bad("a field of a batch where there is none", "merge", TypeError,
        "block_size: unknown, expected workspace, plan or backend", {"block_size": 4}),
    Bad("no lengths", "sparse_attention", TypeError,
        "cu_seqlens_q: got None, expected an array [B+1], or a batch", {"cu_seqlens_q": None}),
    Bad("a batch of another kind", "sparse_attention", TypeError,
        "batch: got dict, expected a msa_cpp.Batch", {"batch": {}}),
    Bad("a paged batch for gradients", "index_lse", ValueError,
        "layout: got paged, index_lse takes packed keys only",
        {"seq_lens": np.array([11, 5], np.int32), "cu_seqlens_k": None,
         "page_table": np.zeros((2, 3), np.int32)}),
    Bad("no parts", "merge", ValueError, "o_parts: got 0 parts, expected at least 1",
        {"o_parts": lambda a: a[:0], "lse_parts": lambda a: a[:0]}),
    Bad("nothing to append", "append_paged", TypeError, "k: got None, expected an array",
        {"k": None, "v": None, "k_pages": None, "v_pages": None}),
    Bad("keys without values", "append_paged", ValueError, "v: not given, expected [T,Hkv,D]",
        {"v": None}),
    Bad("keys without pages", "append_paged", ValueError,
        "k_pages: not given, expected [P,Hkv,Bk,D]", {"k_pages": None}),
    # backends
    Bad("an unknown backend", "sparse_attention", ValueError,
        'backend: got "fast", expected auto, ', {"backend": "fast"}),
    Bad("a backend that is no name", "sparse_attention", TypeError,
        "backend: got int, expected a name of msa_cpp.backends()", {"backend": 1}),
    Bad("a workspace that is too small", "dense_attention", ValueError,
        "workspace: got 0 bytes, the plan needs", {"workspace": np.zeros(0, np.uint8)}),
]


def prepare(case: Bad) -> tuple[Callable[[], Any], dict[str, np.ndarray]]:
    """(the call, what it may not touch)"""
    good = arrays(case.op)
    for name, change in case.changes.items():
        value = good.get(name)
        if isinstance(change, type) and issubclass(change, np.generic):
            change = (lambda dtype: lambda a: a.astype(dtype))(change)
        good[name] = change(value) if callable(change) else change
    positional, keywords = parameters(case.op)
    function = getattr(msa_cpp, case.op)
    args = [good[name] for name in positional]
    kwargs = {name: good[name] for name in good if name in keywords or name in case.changes}
    kwargs = {name: value for name, value in kwargs.items() if name not in positional}
    written = {n: good[n] for n in ("out", "lse", "k_pages", "v_pages")
               if isinstance(good.get(n), np.ndarray)}
    return lambda: function(*args, **kwargs), written


@pytest.mark.parametrize("op", OPERATORS)
def test_the_good_arguments_are_good(op):
    call, _ = prepare(Bad("nothing", op, ValueError, ""))
    call()


def computes_on_cuda():
    try:
        return bool(msa_cpp.plan("dense_attention", device="cuda"))
    except NotImplementedError:
        return False


if computes_on_cuda():
    CASES = [case for case in CASES if case.name != "CUDA tensors without a backend"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error(case):
    call, written = prepare(case)
    before = {name: array.tobytes() for name, array in written.items()}
    with pytest.raises(case.error) as caught:
        call()
    assert case.message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is case.error
    for name, array in written.items():
        assert array.tobytes() == before[name], f"{name} was touched"
    prepare(Bad("nothing", case.op, ValueError, ""))[0]()  # the next good call works


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_thousand_errors_leave_nothing_behind(case):
    call, _ = prepare(case)

    def fail():
        try:
            call()
        except case.error:
            return
        raise AssertionError("no error")

    with memory_limit(256 << 20):
        in_heap, in_python = growth(fail, 1000)
    assert in_heap < 10_000, f"{in_heap} bytes of 1000 errors remain"
    assert in_python < 100, f"{in_python} Python objects of 1000 errors remain"


def test_growth_is_seen():
    kept = []
    in_heap, _ = growth(lambda: kept.append(ctypes.create_string_buffer(600)), 1000)
    assert in_heap > 500_000
    _, in_python = growth(lambda: kept.append(object()), 1000)
    assert in_python > 900


class memory_limit:
    """No more than `extra` bytes of address space beyond what the process has."""

    def __init__(self, extra):
        self.extra = extra

    def __enter__(self):
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[0])
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + self.extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def test_k_above_what_a_backend_supports():
    """The reference takes any K; a backend that does not says what it takes."""
    a = arrays()
    kw = {n: a[n] for n in ("cu_seqlens_q", "seq_lens", "page_table")}
    ids = msa_cpp.index_select(a["q_idx"], a["k_idx"], topk=300, block_size=4, **kw)
    assert ids.shape == (2, 3, 300) and (ids[..., 3:] == -1).all()
    fast = [b.name for b in msa_cpp.backends() if b.usable and b.name in ("avx2", "avx512")]
    if not fast:
        pytest.skip("no vector backend on this machine")
    with pytest.raises(NotImplementedError, match="topk: got 300, supported: 1..256"):
        msa_cpp.index_select(a["q_idx"], a["k_idx"], topk=300, block_size=4, backend=fast[0], **kw)


def test_the_cuda_backend_says_why_it_is_not_usable():
    """Built in but without a device, or not built in: asked for by name, it says so."""
    a = arrays()
    kw = {n: a[n] for n in ("cu_seqlens_q", "seq_lens", "page_table")}
    built = {b.name: b for b in msa_cpp.backends()}
    error, message = (ValueError, 'backend: got "cuda", expected auto')
    if "cuda" in built:
        error, message = NotImplementedError, "backend cuda: "  # on a GPU: these are CPU arrays
        if not built["cuda"].usable:
            assert "no device" in built["cuda"].reason
    with pytest.raises(error, match=message):
        msa_cpp.index_select(a["q_idx"], a["k_idx"], block_size=4, backend="cuda", **kw)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_empty_batches_are_legal(framework):
    kind = Kind(framework, "float32")
    kind.skip_unless_there()
    none, zero = kind.empty((0,), "int32"), kind.raw(np.zeros(1, np.int32))
    paged = dict(cu_seqlens_q=zero, seq_lens=none, page_table=kind.empty((0, 3), "int32"))
    lists = {}
    if DEVICE != "cpu":  # bounds of lengths that are not read back
        paged |= dict(max_seqlen_k=0)
        lists = dict(max_seqlen_q=0, max_seqlen_k=0, num_blocks=0)
    q, pages = kind.empty((0, 4, 8)), kind.empty((5, 2, 128, 8))
    ids = kind.empty((2, 0, 16), "int32")
    out = msa_cpp.sparse_attention(q, pages, pages, ids, max_seqlen_q=0, **paged)
    assert out.shape == (0, 4, 8)
    if DEVICE != "cpu":
        paged |= dict(max_seqlen_q=0)
    assert msa_cpp.dense_attention(q, pages, pages, **paged).shape == (0, 4, 8)
    assert msa_cpp.sparse_attention(q, pages, pages, ids, **paged).shape == (0, 4, 8)
    q_idx, k_idx = kind.empty((0, 2, 4)), kind.empty((5, 128, 4))
    assert msa_cpp.index_scores(q_idx, k_idx, **paged).shape == (2, 0, 0)
    assert msa_cpp.index_select(q_idx, k_idx, **paged).shape == (2, 0, 16)
    assert msa_cpp.select_blocks(kind.empty((2, 0, 0)), 16).shape == (2, 0, 16)
    assert msa_cpp.merge(kind.empty((1, 0, 4, 8)), kind.empty((1, 0, 4))).shape == (0, 4, 8)
    row_ptr, entries = msa_cpp.block_lists(ids, cu_seqlens_q=zero, seq_lens=none, **lists)
    assert row_ptr.shape == (2, 1) and entries.shape == (2, 0)
    assert not kind.numpy(row_ptr).any()
    packed = dict(paged, cu_seqlens_k=zero)
    packed.pop("seq_lens"), packed.pop("page_table")
    keys = kind.empty((0, 2, 8))
    assert msa_cpp.dense_attention(q, keys, keys, **packed).shape == (0, 4, 8)
    msa_cpp.append_paged(keys, keys, k_pages=pages, v_pages=pages, **paged)


def test_a_batch_of_padding_gives_zeros():
    a = arrays()
    a["seq_lens"][:] = 0
    kw = {n: a[n] for n in ("cu_seqlens_q", "seq_lens", "page_table")}
    ids = np.full((2, 3, 3), -1, np.int32)
    out, lse = msa_cpp.sparse_attention(a["q"], a["k"], a["v"], ids, block_size=4, return_lse=True,
                                        **kw)
    assert (out == 0).all() and np.isneginf(lse).all()


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_torch_errors_are_the_same():
    """The path of torch's own exchange interface, for the errors that it can meet."""
    a = arrays()
    names = ("cu_seqlens_q", "seq_lens", "page_table")
    kw = {n: torch.from_numpy(a[n]) for n in names} | {"block_size": 4}
    q, k, v, ids = (torch.from_numpy(a[n]) for n in ("q", "k", "v", "block_ids"))
    for args, changes, error, message in [
            ((q.double(), k, v, ids), {}, TypeError,
             "q: got dtype torch.float64, expected float32"),
            ((q, k, v, ids.long()), {}, TypeError, "block_ids: got dtype torch.int64"),
            ((q, k.half(), v, ids), {}, TypeError, "k: got dtype float16, expected float32"),
            ((q, k, v, ids), {"seq_lens": kw["seq_lens"].long()}, TypeError,
             "seq_lens: got dtype torch.int64, expected int32"),
            ((q.transpose(1, 2), k, v, ids), {}, ValueError,
             "q: got innermost stride 8, expected 1"),
            ((q[0], k, v, ids), {}, ValueError, "q: got rank 2"),
            ((q.to_sparse(), k, v, ids), {}, TypeError, "q: lends no memory"),
            ((q, k, v, ids), {"out": torch.empty(2, 4, 8)}, ValueError, "out: got rank 3"),
            ((q, k, v.numpy()[:, :, :, :4], ids), {}, ValueError, "v: got rank 4")]:
        with pytest.raises(error) as caught:
            msa_cpp.sparse_attention(*args, **{**kw, **changes})
        assert message in str(caught.value)

        def fail():
            try:
                msa_cpp.sparse_attention(*args, **{**kw, **changes})
            except error:
                pass

        in_heap, in_python = growth(fail, 1000)
        assert in_heap < 10_000 and in_python < 100, message
