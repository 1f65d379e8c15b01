"""How operators are called: outputs, scratch memory, plans, threads, examples of the docs."""

import doctest
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import msa_cpp
import msa_cpp.ops
import msa_cpp.plans
from msa_arrays import Kind
from msa_heap import growth
from msa_oracle import Problem


@pytest.fixture(autouse=True)
def _threads():
    before = msa_cpp.num_threads()
    yield
    msa_cpp.set_num_threads(before)


def problem(**changes):
    sizes = dict(q_lens=[40, 3], kv_lens=[70, 50], heads_kv=2, group=4, head_dim=64, index_dim=32,
                 block_size=8, topk=4)
    return Problem(**{**sizes, **changes})


def attention_call(p, kind=Kind("numpy", "float32")):
    """Positional and keyword arguments of sparse_attention."""
    q, k, v = (kind.rows(p.normal(n, h, p.head_dim)) for n, h in (
        (p.tokens, p.heads_q), (sum(p.kv_lens), p.heads_kv), (sum(p.kv_lens), p.heads_kv)))
    return (q, k, v, kind.raw(p.block_ids())), {**kind.batch(p), "block_size": p.block_size}


def test_examples_of_the_documentation():
    results = [doctest.testmod(module) for module in (
        msa_cpp.ops, msa_cpp.plans, msa_cpp.attention, msa_cpp.batch)]
    assert all(result.failed == 0 for result in results)
    assert sum(result.attempted for result in results) > 50 and results[1].attempted > 5


def test_every_public_name_has_documentation():
    for name in msa_cpp.__all__:
        assert getattr(msa_cpp, name).__doc__, name


def test_outputs_are_written_in_place():
    args, kw = attention_call(problem())
    want, want_lse = msa_cpp.sparse_attention(*args, **kw, return_lse=True)
    wide = np.full((*want.shape[:2], 2 * want.shape[2]), 5, np.float32)
    out, lse = wide[..., 3:3 + want.shape[2]], np.empty_like(want_lse)
    got = msa_cpp.sparse_attention(*args, **kw, out=out, lse=lse)
    assert got is out
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
    assert (wide[..., :3] == 5).all() and (wide[..., 3 + want.shape[2]:] == 5).all()
    pair = msa_cpp.sparse_attention(*args, **kw, out=out, lse=lse, return_lse=True)
    assert pair[0] is out and pair[1] is lse


def test_numpy_and_torch_share_one_path_and_its_bits():
    torch = pytest.importorskip("torch")
    p = problem()
    args, kw = attention_call(p)
    want = msa_cpp.sparse_attention(*args, **kw)
    kw = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in kw.items()}
    got = msa_cpp.sparse_attention(*map(torch.from_numpy, args), **kw)
    np.testing.assert_array_equal(got.numpy(), want)


def test_any_exporter_of_dlpack_is_read():
    class Exporter:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    args, kw = attention_call(problem())
    want = msa_cpp.sparse_attention(*args, **kw)
    kw = {k: Exporter(v) if isinstance(v, np.ndarray) else v for k, v in kw.items()}
    out = np.empty_like(want)
    msa_cpp.sparse_attention(*map(Exporter, args), **kw, out=Exporter(out))
    np.testing.assert_array_equal(out, want)
    with pytest.raises(TypeError, match="out: not given, .* inputs are Exporter"):
        msa_cpp.sparse_attention(*map(Exporter, args), **kw)


def test_workspace_of_the_caller():
    args, kw = attention_call(problem(q_lens=[4, 1]))
    want = msa_cpp.sparse_attention(*args, **kw)
    plan = msa_cpp.plan("sparse_attention", heads_q=8, heads_kv=2, head_dim=64, block_size=8,
                        topk=4, max_batch=2, max_tokens=5, max_seqlen_k=70)
    memory = np.empty(plan.workspace_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start:start + plan.workspace_bytes]
    got = msa_cpp.sparse_attention(*args, **kw, plan=plan, workspace=aligned)
    np.testing.assert_allclose(got, want, atol=1e-5)
    needs = f"workspace: got .* the plan needs {plan.workspace_bytes}"
    with pytest.raises(ValueError, match=needs):
        msa_cpp.sparse_attention(*args, **kw, plan=plan, workspace=aligned[:-1])
    with pytest.raises(ValueError, match="workspace: the address must be a multiple of 64"):
        msa_cpp.sparse_attention(*args, **kw, plan=plan, workspace=memory[start + 1:])
    with pytest.raises(ValueError, match="workspace: got rank 2"):
        msa_cpp.sparse_attention(*args, **kw, plan=plan, workspace=aligned[None])


def test_explicit_plans():
    args, kw = attention_call(problem())
    sizes = dict(heads_q=8, heads_kv=2, head_dim=64, block_size=8, topk=4, max_batch=2,
                 max_tokens=64, max_seqlen_k=128)
    plan = msa_cpp.plan("sparse_attention", backend="reference", **sizes)
    assert (plan.op, plan.backend) == ("sparse_attention", "reference")
    assert "sparse_attention" in repr(plan)
    got = msa_cpp.sparse_attention(*args, **kw, plan=plan)
    np.testing.assert_array_equal(got, msa_cpp.sparse_attention(*args, **kw, backend="reference"))
    for changes, message in [
            (dict(block_size=16), "block_size: got 8, the plan was made for 16"),
            (dict(topk=5), r"block_ids: got rank 3 .* expected \[Hkv,T,K\] = \[2,43,5\]"),
            (dict(max_tokens=42), "T: got 43, the plan's max_tokens is 42"),
            (dict(max_seqlen_k=69), "cu_seqlens_k.* the plan's max_seqlen_k is 69"),
            (dict(dtype="bfloat16"), "q: got dtype f32, expected bf16"),
            (dict(paged=True), "k: got rank 3")]:
        other = msa_cpp.plan("sparse_attention", **{**sizes, **changes})
        with pytest.raises(ValueError, match=message):
            msa_cpp.sparse_attention(*args, **kw, plan=other)
    with pytest.raises(ValueError, match="plan: made for merge"):
        msa_cpp.sparse_attention(*args, **kw, plan=msa_cpp.plan("merge"))
    with pytest.raises(TypeError, match="plan: got .*str"):
        msa_cpp.sparse_attention(*args, **kw, plan="auto")


def test_backends_explain_themselves():
    names = [b.name for b in msa_cpp.backends()]
    assert names.index("reference") < names.index("reference-f64")
    for backend in msa_cpp.backends():
        assert backend.usable == (backend.reason == "")
        assert backend.requirement
    assert [b.priority for b in msa_cpp.backends()] == sorted(
        (b.priority for b in msa_cpp.backends()), reverse=True)


def test_MSA_BACKEND_counts_when_it_changes(monkeypatch):
    monkeypatch.setenv("MSA_BACKEND", "reference")
    assert msa_cpp.plan("merge").backend == "reference"
    args, kw = attention_call(problem())
    slow = msa_cpp.sparse_attention(*args, **kw)
    np.testing.assert_array_equal(slow, msa_cpp.sparse_attention(*args, **kw, backend="reference"))
    monkeypatch.setenv("MSA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match='MSA_BACKEND: got "nonsense", expected auto'):
        msa_cpp.sparse_attention(*args, **kw)


def test_growing_lengths_need_few_plans():
    """Nothing is kept per length."""
    q = np.ones((1, 2, 8), np.float32)
    one = np.array([0, 1], np.int32)
    keys = np.ones((4096, 1, 8), np.float32)
    lengths = iter(range(2049, 4096))

    def step():
        length = next(lengths)
        msa_cpp.dense_attention(q, keys[:length], keys[:length], cu_seqlens_q=one, block_size=8,
                                cu_seqlens_k=np.array([0, length], np.int32))

    in_heap, in_python = growth(step, 1000)
    assert in_heap < 20_000 and in_python < 200


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(threads):
    args, kw = attention_call(problem())
    msa_cpp.set_num_threads(2)
    want = msa_cpp.sparse_attention(*args, **kw)
    msa_cpp.set_num_threads(threads)
    assert msa_cpp.num_threads() == threads
    np.testing.assert_array_equal(msa_cpp.sparse_attention(*args, **kw), want)


def test_an_older_plan_keeps_its_threads():
    msa_cpp.set_num_threads(3)
    plan = msa_cpp.plan("sparse_attention", heads_q=8, heads_kv=2, head_dim=64, block_size=8,
                        topk=4, max_batch=2, max_tokens=64, max_seqlen_k=128)
    msa_cpp.set_num_threads(1)
    args, kw = attention_call(problem())
    assert plan.num_threads == 3
    msa_cpp.sparse_attention(*args, **kw, plan=plan)


def in_child(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_threads_from_the_environment():
    say = "import msa_cpp\nprint(msa_cpp.num_threads())"
    assert in_child(say, MSA_THREADS="3") == ["3"]
    assert int(in_child(say, MSA_THREADS="")[0]) >= 1
    refused = "import msa_cpp\ntry: msa_cpp.num_threads()\nexcept ValueError as e: print(e)"
    for bad in ("0", "two", "-1", "1.5"):
        assert in_child(refused, MSA_THREADS=bad)[:3] == ["MSA_THREADS:", "got", f'"{bad}",']
    with pytest.raises(ValueError, match="num_threads: got 0, expected >= 1"):
        msa_cpp.set_num_threads(0)


def test_two_threads_at_once():
    """Different problems from many Python threads, each of which must get its own results."""
    calls = [attention_call(problem(seed=i, q_lens=[40 + i, 3])) for i in range(4)]
    want = [msa_cpp.sparse_attention(*args, **kw) for args, kw in calls]
    wrong, barrier = [], threading.Barrier(4)

    def work(i):
        barrier.wait()
        args, kw = calls[i]
        for _ in range(100):
            if not np.array_equal(msa_cpp.sparse_attention(*args, **kw), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_gil_is_free_during_the_work():
    """Another Python thread works on in the first half of a long call."""
    p = problem(q_lens=[800], kv_lens=[800])
    (q, k, v, _), kw = attention_call(p)
    msa_cpp.set_num_threads(1)

    def call():
        start = time.monotonic()
        msa_cpp.dense_attention(q, k, v, **kw, backend="reference")
        return start, time.monotonic() - start

    seconds = min(call()[1] for _ in range(2))
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    worker = threading.Thread(target=tick)
    worker.start()
    try:
        start, _ = call()
    finally:
        stop.set()
        worker.join()
    assert any(start + 0.1 * seconds < t < start + 0.5 * seconds for t in ticks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_a_forked_child_makes_its_own_threads():
    args, kw = attention_call(problem(q_lens=[400], kv_lens=[400]))
    msa_cpp.set_num_threads(2)
    want = msa_cpp.sparse_attention(*args, **kw)  # the parent's team is there
    child = os.fork()
    if child == 0:
        same = np.array_equal(msa_cpp.sparse_attention(*args, **kw), want)
        os._exit(0 if same else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs in its first call")
    assert status == 0


def test_importing_needs_numpy_alone():
    loaded = in_child("import sys, msa_cpp\nprint(*(m for m in ('torch', 'transformers', "
                      "'matplotlib', 'msa_cpp.torch_ops') if m in sys.modules))")
    assert loaded == []


def test_the_lists_of_shards_merge_into_those_of_the_whole():
    rng = np.random.default_rng(3)
    q_idx = rng.standard_normal((5, 2, 16), dtype=np.float32)
    k_idx = rng.integers(-2, 3, (93, 16)).astype(np.float32)  # ties, and a last block of 5
    q_idx = np.round(q_idx)
    kw = dict(topk=4, block_size=8, init_blocks=1, cu_seqlens_q=np.array([0, 5], np.int32),
              q_offset=np.array([88], np.int32))

    def lists(first, last, shard):
        scores = np.empty((2, 5, 4), np.float32)
        lengths = np.array([0, min(last, 93) - first], np.int32)
        ids = msa_cpp.index_select(q_idx, k_idx[first:last], cu_seqlens_k=lengths,
                                   block_offset=shard, scores=scores, **kw)
        return ids, scores

    ids, scores = lists(0, 93, None)
    parts = [lists(8 * b, 8 * b + 32, np.array([b], np.int32)) for b in (8, 0, 4)]
    for backend in ("reference", "auto"):
        got_scores = np.empty_like(scores)
        got = msa_cpp.merge_lists(np.stack([s for _, s in parts]), np.stack([i for i, _ in parts]),
                                  scores=got_scores, backend=backend)
        np.testing.assert_array_equal(got, ids)
        np.testing.assert_array_equal(got_scores, scores)


def test_the_plan_of_a_decoding_step():
    p = problem(q_lens=[2, 1], paged=True)
    rng = np.random.default_rng(0)
    args = [rng.standard_normal(s, dtype=np.float32) for s in ((3, 8, 64), (3, 2, 32))]
    keys = [p.store(p.normal(120, *inner)) for inner in ((2, 64), (2, 64), (32,))]
    kw = {**p.metadata(np.copy), "max_seqlen_q": 2, "topk": 4, "block_size": 8}
    sizes = dict(heads_q=8, heads_kv=2, head_dim=64, index_dim=32, block_size=8, topk=4,
                 max_batch=2, max_tokens=3, max_seqlen_q=2, max_seqlen_k=70)
    plan = msa_cpp.plan("msa_layer", paged=True, **sizes)
    want = msa_cpp.msa_layer(*args, *keys, **kw)
    np.testing.assert_allclose(msa_cpp.msa_layer(*args, *keys, **kw, plan=plan), want,
                               atol=1e-5)


@pytest.mark.parametrize("old, new", [("sparse_decode", "sparse_attention"),
                                      ("msa_layer_decode", "msa_layer")])
def test_the_old_names_of_a_decoding_step(old, new):
    p = problem(q_lens=[2, 1], paged=True)
    q, q_idx = p.normal(3, 8, 64), p.normal(3, 2, 32)
    k, v, k_idx = (p.store(p.normal(120, *inner)) for inner in ((2, 64), (2, 64), (32,)))
    ids = np.zeros((2, 3, 1), np.int32)
    args = (q, k, v, ids) if old == "sparse_decode" else (q, q_idx, k, v, k_idx)
    options = dict(p.metadata(np.copy), block_size=8)
    want = getattr(msa_cpp, new)(*args, **options, max_seqlen_q=2)
    call = partial(getattr(msa_cpp, old), *args, **options)
    for name in ("max_seqlen_q", "max_q_len"):
        with pytest.warns(DeprecationWarning, match=f"{old} is .* its name is {new}") as w:
            np.testing.assert_array_equal(call(**{name: 2}), want)
        assert w[0].filename == __file__
    with (pytest.warns(DeprecationWarning),
          pytest.raises(TypeError, match="max_q_len: given beside max_seqlen_q")):
        call(max_q_len=2, max_seqlen_q=2)
    with pytest.warns(DeprecationWarning, match=f"its name is {new}"):
        plan = msa_cpp.plan(old, heads_q=8, heads_kv=2, head_dim=64, index_dim=32, block_size=8)
    assert plan.op == new


def test_old_names_work_and_name_the_new_ones():
    p = problem(q_lens=[2, 1], paged=True)
    q, q_idx = p.normal(3, 8, 64), p.normal(3, 2, 32)
    keys = [p.store(p.normal(120, *inner)) for inner in ((2, 64), (2, 64), (32,))]
    batch = msa_cpp.Batch(**p.metadata(np.copy), block_size=8, max_seqlen_q=2)
    out, ids = msa_cpp.msa_layer(q, q_idx, *keys, topk=4, batch=batch, return_block_ids=True)
    _, scores = msa_cpp.index_select(q_idx, keys[2], topk=4, batch=batch, return_scores=True)
    lists = msa_cpp.block_lists(ids, batch=batch)
    results = [np.empty_like(x) for x in (ids, scores, *lists)]
    for call, message in (
            (lambda: msa_cpp.index_select(q_idx, keys[2], topk=4, scores_out=results[1],
                                          batch=batch), "scores_out .* its name is scores"),
            (lambda: msa_cpp.block_lists(ids, out=tuple(results[2:]), batch=batch),
             "out .* its name is row_ptr and entries"),
            (lambda: np.testing.assert_array_equal(
                msa_cpp.msa_layer_decode(q, q_idx, *keys, topk=4, ids_out=results[0], batch=batch),
                out),
             "msa_layer_decode .* its name is msa_layer")):
        with pytest.warns(DeprecationWarning, match=message) as caught:
            call()
        assert [w.filename for w in caught] == [__file__]
    for got, want in zip(results, (ids, scores, *lists)):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(TypeError, match="scores_out: given beside scores, expected scores alone"):
        msa_cpp.index_select(q_idx, keys[2], scores_out=scores, scores=scores, batch=batch)


def test_the_overhead_bench_runs(tmp_path):
    """It compares its own results; how long calls take is not judged here."""
    root = Path(__file__).resolve().parents[2]
    build = Path(os.environ.get("MSA_CLI", root / "build/release/msa")).parent
    if not (build / "src/libmsa.so").exists():
        pytest.skip(f"no libmsa.so in {build}/src")
    subprocess.run([sys.executable, root / "bench/python_overhead.py", "--rounds", "3",
                    "--calls", "2", "--library", build / "src/libmsa.so",
                    "--output", tmp_path / "rows.json"],
                   check=True, timeout=120)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) in (2, 9)  # without and with torch
    assert all(row["limit_us"] in (15, 40) for row in rows if row["run"] == "python overhead")
    assert all("overhead_us_median" in row for row in rows)
