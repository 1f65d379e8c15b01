"""The operators of training against torch autograd of a plain implementation in float64."""

import doctest
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import msa_cpp  # noqa: E402
import msa_cpp.gradients  # noqa: E402
from msa_arrays import BACKENDS, DEVICE, Kind  # noqa: E402
from msa_oracle import Problem  # noqa: E402

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="is about arrays on the CPU")


def seen(p, ids):
    """bool [Hkv,T,S]: what a query row of the batch reads, all visible tokens without ids."""
    mask = torch.zeros(p.heads_kv, p.tokens, sum(p.kv_lens), dtype=torch.bool)
    for b in range(p.batch):
        first = int(p.cu_k[b])
        for t in p.rows(b):
            visible = p.visible(b, t)
            for r in range(p.heads_kv):
                if ids is None:
                    mask[r, t, first:first + visible] = True
                    continue
                for block in ids[r, t].tolist():
                    start = (block - p.first_block(b)) * p.block_size
                    if block >= 0 and start >= 0:
                        end = min(start + p.block_size, visible)
                        mask[r, t, first + start:first + max(end, start)] = True
    return mask


def probabilities(logits, mask):
    """softmax over the masked axis; zeros where nothing is seen."""
    p = torch.softmax(logits.masked_fill(~mask, -math.inf), -1)
    return torch.where(mask, p, 0)


def plain_attention(p, q, k, v, mask):
    """out [T,Hq,D] and the probabilities [Hq,T,S]."""
    scale = 1 / math.sqrt(p.head_dim) if p.scale is None else p.scale
    logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(p.group, 1)) * scale
    chosen = probabilities(logits, mask.repeat_interleave(p.group, 0))
    return torch.einsum("hts,shd->thd", chosen, v.repeat_interleave(p.group, 1)), chosen


def plain_kl(p, chosen, q_idx, k_idx, mask):
    """[T,Hkv]; the teacher is detached."""
    teacher = chosen.unflatten(0, (p.heads_kv, p.group)).mean(1).detach()
    logits = torch.einsum("trd,sd->rts", q_idx, k_idx) / math.sqrt(p.index_dim)
    student = torch.log_softmax(logits.masked_fill(~mask, -math.inf), -1)
    terms = teacher * (teacher.clamp_min(1e-300).log() - student.masked_fill(~mask, 0))
    return terms.sum(-1).T


class Training:
    """A problem, its arrays, and what autograd makes of them in float64 on the CPU."""

    def __init__(self, sparse, dtype=torch.float32, **sizes):
        sizes = {**dict(q_lens=[9, 0, 14], kv_lens=[30, 7, 14], heads_kv=2, group=3, head_dim=24,
                        index_dim=20, block_size=4, topk=3), **sizes}
        self.p = p = Problem(**sizes)
        self.dtype = dtype
        shapes = {"q": (p.tokens, p.heads_q, p.head_dim),
                  "k": (sum(p.kv_lens), p.heads_kv, p.head_dim),
                  "v": (sum(p.kv_lens), p.heads_kv, p.head_dim),
                  "q_idx": (p.tokens, p.heads_kv, p.index_dim),
                  "k_idx": (sum(p.kv_lens), p.index_dim),
                  "dout": (p.tokens, p.heads_q, p.head_dim)}
        kind = Kind("torch", str(dtype).removeprefix("torch."))
        self.given = {name: kind.rows(p.normal(*shape)) for name, shape in shapes.items()}
        self.batch = {**kind.batch(p), "block_size": p.block_size, "causal": p.causal}
        self.scaled = {**self.batch, "softmax_scale": p.scale}
        ids = torch.from_numpy(p.block_ids()) if sparse else None
        self.ids = None if ids is None else ids.to(DEVICE)
        mask = seen(p, ids)
        q, k, v, q_idx, k_idx = self.leaves = [
            x.cpu().double().requires_grad_() for x in self.rows("q", "k", "v", "q_idx", "k_idx")]
        self.out, chosen = plain_attention(p, q, k, v, mask)
        self.kl = plain_kl(p, chosen, q_idx, k_idx, mask)
        (self.out * self.given["dout"].cpu().double()).sum().backward()
        self.attention = [leaf.grad for leaf in self.leaves[:3]]
        assert all(leaf.grad is None for leaf in self.leaves[3:])  # the LM loss stops there
        self.kl.mean().backward()
        self.index = [leaf.grad for leaf in self.leaves[3:]]

    def rows(self, *names):
        return [self.given[name] for name in names]

    def forward(self, backend):
        if self.ids is None:
            return msa_cpp.dense_attention(*self.rows("q", "k", "v"), return_lse=True,
                                           backend=backend, **self.scaled)
        return msa_cpp.sparse_attention(*self.rows("q", "k", "v"), self.ids, return_lse=True,
                                        backend=backend, **self.scaled)

    def lists(self):
        if self.ids is None:
            return {}
        size = {name: value for name, value in self.batch.items()
                if name not in ("causal", "q_offset")}
        blocks = sum(self.p.blocks(b) for b in range(self.p.batch))
        return dict(zip(("row_ptr", "entries"),
                        msa_cpp.block_lists(self.ids, num_blocks=blocks, **size)))

    def attention_backward(self, backend="auto", **kwargs):
        out, lse = self.forward(backend)
        call = (msa_cpp.dense_attention_backward if self.ids is None else
                lambda q, k, v, *rest, **kw: msa_cpp.sparse_attention_backward(
                    q, k, v, self.ids, *rest, **kw))
        return call(*self.rows("q", "k", "v"), out, lse, self.given["dout"], backend=backend,
                    **self.scaled, **kwargs)

    def kl_arguments(self, backend="auto"):
        _, lse = self.forward(backend)
        index_lse = msa_cpp.index_lse(*self.rows("q_idx", "k_idx"), self.ids, backend=backend,
                                      **self.batch)
        return (*self.rows("q", "k"), lse, *self.rows("q_idx", "k_idx"), index_lse, self.ids)


def relative(got, want):
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def cosine(got, want):
    got = got.cpu().double().flatten()
    return torch.nn.functional.cosine_similarity(got, want.flatten(), 0).item()


SHAPES = [{}, {"group": 1, "block_size": 16}, {"group": 16, "heads_kv": 1, "block_size": 5},
          {"causal": False}, {"offsets": True, "scale": 0.3}, {"shard": True, "topk": 4},
          {"q_lens": [130], "kv_lens": [300], "block_size": 8, "topk": 7, "head_dim": 64}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_gradients_are_those_of_autograd(backend, sparse, shape):
    t = Training(sparse, **shape)
    for got, want in zip(t.attention_backward(backend), t.attention):
        assert relative(got, want) <= 1e-4
    arguments = t.kl_arguments(backend)
    *gradients, kl = msa_cpp.kl_backward(*arguments, return_kl=True, backend=backend, **t.scaled)
    for got, want in zip(gradients, t.index):
        assert relative(got, want) <= 1e-4
    for value in (kl, msa_cpp.kl_loss(*arguments, backend=backend, **t.scaled)):
        assert torch.allclose(value.cpu().double(), t.kl, rtol=1e-4, atol=1e-5)


# The other three are shapes of tuned kernels.
WIDE = {"q_lens": [300, 5, 0], "kv_lens": [300, 140, 3], "head_dim": 128, "index_dim": 128,
        "block_size": 128, "topk": 2}
BF16_SHAPES = [{"q_lens": [60, 40], "kv_lens": [60, 90], "head_dim": 64}, {**WIDE, "group": 8},
               {**WIDE, "group": 16, "heads_kv": 1}, {**WIDE, "group": 8, "causal": False}]


@pytest.mark.parametrize("shape", BF16_SHAPES, ids=str)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients_point_the_same_way(backend, sparse, shape):
    t = Training(sparse, torch.bfloat16, **shape)
    gradients = (*t.attention_backward(backend),
                 *msa_cpp.kl_backward(*t.kl_arguments(backend), backend=backend, **t.scaled))
    for got, want in zip(gradients, t.attention + t.index):
        assert got.dtype == torch.bfloat16
        assert cosine(got, want) > 0.999


def test_given_lists_and_outputs_change_nothing():
    t = Training(True)
    lists = t.lists()
    want = t.attention_backward()
    made = [torch.full_like(x, 7) for x in want]
    got = t.attention_backward(**lists, dq=made[0], dk=made[1], dv=made[2])
    for a, b, c in zip(want, got, made):
        assert b is c and torch.equal(a, b)
    want = msa_cpp.kl_backward(*t.kl_arguments(), **t.scaled)
    for a, b in zip(want, msa_cpp.kl_backward(*t.kl_arguments(), **lists, **t.scaled)):
        assert torch.equal(a, b)


def test_all_blocks_are_dense():
    dense = Training(False)
    sparse = Training(True, topk=8)
    ids = torch.arange(8, dtype=torch.int32, device=DEVICE).expand(2, sparse.p.tokens, 8).clone()
    for b, rows in enumerate([sparse.p.rows(0), sparse.p.rows(1), sparse.p.rows(2)]):
        ids[:, rows.start:rows.stop, sparse.p.blocks(b):] = -1
    sparse.ids = ids.to(DEVICE)
    for got, want in zip(sparse.attention_backward(), dense.attention_backward()):
        assert relative(got, want.cpu().double()) <= 1e-6


def test_float32_gradients_of_half_inputs():
    t = Training(True, torch.float16)
    out = [torch.empty(x.shape, device=DEVICE) for x in t.rows("q", "k", "v")]
    t.attention_backward(dq=out[0], dk=out[1], dv=out[2])
    for got, want in zip(out, t.attention):
        assert cosine(got, want) > 0.999


@on_cpu
def test_numpy_gives_the_same():
    t = Training(True)
    arguments = [None if x is None else x.numpy() for x in t.kl_arguments()]
    options = {name: value.numpy() if isinstance(value, torch.Tensor) else value
               for name, value in t.scaled.items()}
    got = msa_cpp.kl_backward(*arguments, **options)
    assert all(isinstance(x, np.ndarray) for x in got)
    for a, b in zip(got, msa_cpp.kl_backward(*t.kl_arguments(), **t.scaled)):
        np.testing.assert_array_equal(a, b.numpy())


def test_errors_name_the_argument():
    t = Training(True)
    out, lse = t.forward("auto")
    rows, dout = t.rows("q", "k", "v"), t.given["dout"]
    backward = msa_cpp.sparse_attention_backward
    with pytest.raises(ValueError, match=r"lse: got rank 2 shape \[23,2\], expected \[T,Hq\]"):
        backward(*rows, t.ids, out, lse[:, :2].contiguous(), dout, **t.scaled)
    with pytest.raises(ValueError, match=r"dout: got rank 3 shape \[22,6,24\]"):
        backward(*rows, t.ids, out, lse, dout[1:], **t.scaled)
    with pytest.raises(TypeError, match="block_ids: got None, expected an array"):
        backward(*rows, None, out, lse, dout, **t.scaled)
    with pytest.raises(ValueError, match="entries: not given"):
        backward(*rows, t.ids, out, lse, dout, row_ptr=t.lists()["row_ptr"], **t.scaled)
    with pytest.raises(ValueError, match="row_ptr: given, expected none without ids"):
        msa_cpp.kl_backward(*t.kl_arguments()[:6], **t.lists(), **t.scaled)
    if DEVICE == "cpu":  # what only a device knows is not read back
        lists = t.lists()
        lists["entries"][0, 0] += 1
        with pytest.raises(ValueError, match=r"entries\[0,0\]: got"):
            backward(*rows, t.ids, out, lse, dout, **lists, **t.scaled)


@on_cpu
def test_examples_of_the_documentation():
    result = doctest.testmod(msa_cpp.gradients, verbose=False)
    assert result.failed == 0 and result.attempted > 30
