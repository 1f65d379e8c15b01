"""python -m msa_cpp.train: what a run leaves behind, how it goes on, and how it fails."""

import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from msa_arrays import DEVICE  # noqa: E402
from msa_cpp.autograd import MsaConfig  # noqa: E402
from msa_cpp.train import metrics, storage  # noqa: E402
from msa_cpp.train.__main__ import main  # noqa: E402
from msa_cpp.train.data import NO_TARGET, Facts, Text, packed, read_folder  # noqa: E402
from msa_cpp.train.model import MINIATURE, SPARSE, Heads, Model, dense  # noqa: E402
from msa_cpp.train.trainer import Diverged, Options, Trainer, by_index  # noqa: E402

CLI = os.environ.get("MSA_CLI")
SMALL = ["--data", "facts", "--batch", "2", "--context", "64", "--log-every", "1", "--device",
         DEVICE]
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="needs no device")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name in ("a.txt", "b/c.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.integers(32, 127, 700, np.uint8).tobytes())
    (folder / "empty").touch()
    return folder


def train(*arguments):
    return main([*map(str, arguments)])


def fresh():
    return Model(MINIATURE, seed=1).to(DEVICE)


def log(output, seconds=False):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if seconds or k != "seconds"} for line in lines]


def process(*arguments, **kwargs):
    return subprocess.Popen([sys.executable, "-m", "msa_cpp.train", *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


# ---- data ----------------------------------------------------------------------------------------


def test_every_fact_that_is_asked_for_has_been_told():
    facts = Facts(3)
    e = facts.examples(5, 4, 200)
    again = facts.examples(5, 4, 200)
    assert torch.equal(e.tokens, again.tokens) and torch.equal(e.targets, again.targets)
    assert not torch.equal(e.tokens, facts.examples(6, 4, 200).tokens)
    assert e.tokens.max() < facts.vocab_size and e.cu_seqlens.tolist() == [0, 200, 400, 600, 800]
    for b in range(4):
        rows = slice(200 * b, 200 * (b + 1))
        tokens, targets, kinds = e.tokens[rows], e.targets[rows], e.kinds[rows]
        keys = tokens[kinds == facts.PAIR, 0]
        assert len(keys.unique()) == len(keys)
        for i in (kinds == facts.QUERY).nonzero()[:, 0]:
            place = i - e.distances[rows][i]
            assert kinds[place] == facts.PAIR and tokens[place, 0] == tokens[i, 0]
            assert targets[i] == tokens[place, 1]
        for i in (kinds == facts.LOCAL).nonzero()[:, 0]:
            assert kinds[i - 2] == facts.PAIR and targets[i] == tokens[i - 2, 1]
        assert (targets[kinds == facts.PAIR] == -100).all()
        filler = (kinds == facts.FILLER).nonzero()[:, 0]
        assert torch.equal(targets[filler[:-1]], tokens[filler[1:], 0])


def plain_sequence(facts, rng, length):
    """Facts, a position at a time."""
    look, ask, babble = range(facts.vocab_size - 3, facts.vocab_size)
    keys = rng.permutation(facts._keys).tolist()
    values = (facts._keys + rng.integers(facts._values, size=length)).tolist()
    kinds = rng.choice(4, length, p=facts._shares).tolist()
    luck = rng.random(length).tolist()
    state, told, rows = int(luck[0] * len(facts._chain)), [], []  # told: places of pairs
    for i, kind in enumerate(kinds):
        if kind == facts.LOCAL and (i < 2 or rows[i - 2][3] != facts.PAIR):
            kind = facts.PAIR
        if kind == facts.QUERY and not told:
            kind = facts.PAIR
        if kind == facts.PAIR and len(told) == len(keys):
            kind = facts.QUERY
        place = i
        if kind == facts.PAIR:
            row = keys[len(told)], values[i], -100
            told.append(i)
        elif kind == facts.QUERY:
            place = told[int(luck[i] * len(told))]
            row = rows[place][0], ask, rows[place][1]
        elif kind == facts.LOCAL:
            row = look, ask, rows[i - 2][1]
        else:
            following = sum(luck[i] >= x for x in facts._chain[state])
            row = facts._first_state + state, babble, facts._first_state + following
            state = following
        rows.append((*row, kind, i - place))
    return np.array(rows).T


@pytest.mark.parametrize("shares", [(0.4, 0.3, 0.1, 0.2), (0.1, 0.1, 0.7, 0.1), (0, 0, 1, 0),
                                    (0.1, 0.5, 0.1, 0.3)], ids=str)
@pytest.mark.parametrize("keys", [1, 7, 64])
def test_sequences_are_those_of_the_plain_loop(keys, shares):
    for seed in range(20):
        facts = Facts(seed, keys=keys, values=5, states=1 + seed % 4, shares=shares)
        got, want = (make(np.random.default_rng(seed), 80 + seed) for make in (
            facts._sequence, lambda rng, length: plain_sequence(facts, rng, length)))
        np.testing.assert_array_equal(got, want)


def test_every_other_window_may_hold_short_sequences():
    e = Facts(3, short=25).examples(0, 3, 100)
    assert e.cu_seqlens.tolist() == [0, 100, 125, 150, 175, 200, 300] and e.max_seqlen == 100
    assert torch.equal(e.tokens[:100], Facts(3).examples(0, 1, 100).tokens)
    assert e.distances[100:200].max() < 25 < e.distances.max()


def test_windows_of_text_are_packed_documents(texts):
    e = Text(read_folder(texts), seed=1).examples(0, 2, 1000)
    assert e.cu_seqlens[-1] == 2000 and 1000 in e.cu_seqlens
    documents = [b"\1" + p.read_bytes()
                 for p in (texts / "a.txt", texts / "b/c.py")]
    for first, end in zip(e.cu_seqlens[:-1], e.cu_seqlens[1:]):
        piece, target = e.tokens[first:end].numpy(), e.targets[first:end].numpy()
        assert any(piece.astype(np.uint8).tobytes() in d for d in documents)
        np.testing.assert_array_equal(piece[1:], target[:-1])


# ---- the model -----------------------------------------------------------------------------------


def test_documents_of_a_batch_do_not_see_each_other():
    model = fresh()
    tokens = torch.randint(0, 99, (60,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ends = lambda *rows: torch.tensor([0, *rows], dtype=torch.int32, device=DEVICE)
    both, _ = model(tokens, ends(25, 60), 35, dense)
    for piece in (slice(0, 25), slice(25, 60)):
        length = piece.stop - piece.start
        alone, _ = model(tokens[piece], ends(length), length, dense)
        torch.testing.assert_close(alone, both[piece], rtol=1e-4, atol=1e-5)


def test_losses_train_their_own_weights_only():
    for detach in (True, False):
        model = fresh()
        trainer = Trainer(Options(steps=1, detach_input=detach), model, Facts())
        examples = trainer.source.examples(0, 2, 96).to(trainer.device)
        for stage in ("warmup", "sparse"):
            trainer._enter(stage)
            lm, kl = trainer.losses(examples, trainer.attend(stage))
            touched = {}
            for name, loss in (("lm", lm), ("kl", kl)):
                parameters = dict(model.named_parameters())
                made = torch.autograd.grad(loss, parameters.values(), allow_unused=True,
                                           retain_graph=True)
                touched[name] = {n for n, g in zip(parameters, made)
                                 if g is not None and g.any()}
            index = set(model.index_parameters())
            assert touched["lm"] == set(model.backbone_parameters())
            assert index <= touched["kl"]
            assert (touched["kl"] == index) == detach  # the switch lets it through


def test_recomputed_activations_and_bf16_change_little():
    examples = Facts().examples(0, 2, 96).to(fresh().lm_head.weight.device)
    results = {}
    for name, options in {"plain": {}, "recomputed": {"activation_checkpointing": True},
                          "bf16": {"dtype": "bf16"}}.items():
        model = fresh()
        trainer = Trainer(Options(**options), model, Facts())
        lm, kl = trainer.losses(examples, trainer.attend("sparse"))
        (lm + kl).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        results[name] = lm.detach(), [p.grad for p in model.parameters()]
    assert results["plain"][0] == results["recomputed"][0]
    assert all(map(torch.equal, results["plain"][1], results["recomputed"][1]))
    assert abs(results["plain"][0] - results["bf16"][0]) < 0.05


class Uneven:
    """Windows with 1 and with 95 targets by turns, of 96 tokens and of 48 and a half as long."""

    vocab_size = 256

    def __init__(self, targets=(1, 95), lengths=((96,), (30, 18))):
        self.targets, self.lengths = targets, lengths

    def examples(self, number, batch, context):
        windows = [self.window((number * batch + i) % 2) for i in range(batch)]
        tokens, targets, lengths = zip(*windows)
        return packed(np.concatenate(tokens), np.concatenate(targets), sum(lengths, []))

    def window(self, which):
        rng, lengths = np.random.default_rng(which), [*self.lengths[which]]
        tokens, targets = rng.integers(2, 255, (2, sum(lengths)))
        targets[self.targets[which]:] = NO_TARGET
        return tokens, targets, lengths


def first_step(source, route, **options):
    """Loss, KL and gradient norms of a step, in the form of the log."""
    options = Options(route=route, steps=1, warmup_steps=0, clip=1e9, index_clip=1e9, lr=0.0,
                      **options)
    trainer = Trainer(options, fresh(), source)
    trainer.run()
    return trainer.figures


@pytest.mark.parametrize("route", ["full", "msa-pt"])
def test_micro_steps_weigh_by_what_they_count(route):
    """Two windows at once or one after the other are the same step, loss and gradients alike."""
    whole = first_step(Uneven(), route, batch=2, accumulate=1)
    parts = first_step(Uneven(), route, batch=1, accumulate=2)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["grad_norm_backbone"] > 0 and (whole["kl"] > 0) == (route != "full")


def test_micro_steps_without_a_target_take_no_part():
    alone = first_step(Uneven((95, 95)), "full", batch=1, accumulate=1)
    beside = first_step(Uneven((95, 0)), "full", batch=1, accumulate=2)
    assert beside == pytest.approx(alone, rel=1e-5)
    nothing = first_step(Uneven((0, 0)), "full", batch=1, accumulate=2)
    assert nothing["loss"] == nothing["grad_norm_backbone"] == 0


def test_figures_of_a_selection_leave_padding_out():
    """Rows behind cu_seqlens[-1] have no block to choose, wherever they would stand."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)
    shapes = ((4, 16), (2, 16), (2, 16), (2, 8), (8,))
    config = MsaConfig(block_size=4, topk=2)
    ends = torch.tensor([0, 40, 64], dtype=torch.int32, device=DEVICE)
    rows = [make(64, *shape) for shape in shapes]
    heads = Heads(0, *rows, ends, 64)
    padded = Heads(0, *(torch.cat((x, make(100, *x.shape[1:]))) for x in rows), ends, 164)
    ids = by_index(config)
    want, got = (metrics.measure(h, ids(h), config) for h in (heads, padded))
    assert got == pytest.approx(want, rel=1e-6) and want["kept_mass"] > 0


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """20 steps of MSA-PT with checkpoints after 5, 10, 15, 20 of which two stay."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert train("--route", "msa-pt", "--output", output, "--steps", 20, "--warmup-steps", 8,
                 "--save-every", 5, *SMALL) == 0
    return output


def test_the_log_says_how_both_branches_do(run):
    lines = log(run, seconds=True)
    assert [line["step"] for line in lines] == [*range(20)]
    assert [line["stage"] for line in lines] == ["warmup"] * 8 + ["sparse"] * 12
    for name in ("loss", "kl", "lr", "index_lr", "grad_norm_backbone", "grad_norm_index", "seconds",
                 "score_recall", "block_recall", "kept_mass", "learned_coverage"):
        assert all(line[name] >= 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert storage.steps(run) == [15, 20]
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_checkpoints_load_in_transformers(run):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    m3 = transformers.models.minimax_m3_vl
    path = storage.directory(run, 20)
    config = m3.configuration_minimax_m3_vl.MiniMaxM3VLTextConfig(
        **json.loads((path / "config.json").read_text()))
    config._attn_implementation = "eager"
    theirs, info = m3.modeling_minimax_m3_vl.MiniMaxM3VLForCausalLM.from_pretrained(
        path, config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = Model(storage.read_config(path / "config.json")).to(DEVICE)
    storage.load_weights(model, path)
    tokens = torch.arange(96) % 91
    trainer = Trainer(Options(), model, Facts())
    with torch.no_grad():
        ends = torch.tensor([0, 96], dtype=torch.int32, device=DEVICE)
        ours, _ = model(tokens.to(DEVICE), ends, 96, trainer.attend("sparse"))
        want = theirs(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(ours.cpu(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not CLI, reason="MSA_CLI is not set")
def test_checkpoints_load_in_the_msa_command(tmp_path, texts):
    assert train("--route", "full", "--data", texts, "--output", tmp_path, "--steps", 2, "--batch",
                 1, "--context", 64, "--device", DEVICE) == 0
    result = subprocess.run(
        [CLI, "eval", "--model", storage.directory(tmp_path, 2), "--text", texts / "a.txt",
         "--context", "256", "--attention", "both", "--json", "-"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_dense_checkpoint_gets_an_index_branch(run, tmp_path, texts):
    """A checkpoint without one, full attention in every layer, is converted by another config."""
    source = storage.directory(run, 20)
    dense_dir, config = tmp_path / "dense", storage.read_config(source / "config.json")
    config["layer_types"] = ["full_attention"] * 2
    (tmp_path / "full.json").write_text(json.dumps(config))
    (tmp_path / "sparse.json").write_text(json.dumps(config | {"layer_types": [SPARSE] * 2}))
    assert train("--route", "full", "--output", dense_dir, "--steps", 2, "--config",
                 tmp_path / "full.json", *SMALL) == 0
    start = storage.directory(dense_dir, 2)
    assert train("--route", "msa-cpt", "--init", start, "--config", tmp_path / "sparse.json",
                 "--output", tmp_path / "cpt", "--steps", 5, "--warmup-steps", 3, "--save-every",
                 3, *SMALL) == 0
    before, middle, end = (dict(np_weights(p)) for p in (
        start, storage.directory(tmp_path / "cpt", 3), storage.directory(tmp_path / "cpt", 5)))
    for name, value in before.items():  # the backbone rests, then moves
        assert torch.equal(value, middle[name]) and not torch.equal(value, end[name])
    assert {n for n in middle if n not in before} == {n for n in middle if ".indexer." in n}
    assert [line["grad_norm_backbone"] for line in log(tmp_path / "cpt")][:3] == [0, 0, 0]


def np_weights(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


# ---- going on ------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_nothing_had_happened(run, tmp_path):
    output = tmp_path / "out"
    command = ("--route", "msa-pt", "--output", output, "--steps", 20, "--warmup-steps", 8,
               "--save-every", 5, *SMALL)
    child = process(*command)
    stop = int(np.random.default_rng(time.time_ns()).integers(6, 18))
    while child.poll() is None:
        if (output / "log.jsonl").exists() and len(log(output)) > stop:
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and storage.steps(output), stop
    (output / ".step-half").mkdir()  # as if it had been killed while it saved
    assert train(*command, "--resume") == 0
    assert log(output) == log(run), f"killed after line {stop}"
    assert not (output / ".step-half").exists()
    a, b = (np_weights(storage.directory(o, 20)) for o in (run, output))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_on_with_what_it_began_with(texts, tmp_path, capsys):
    """Other data, weights, model or number of processes make another run, and are named."""
    output, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(texts, other)
    (tmp_path / "init.json").write_text(json.dumps(MINIATURE))
    assert train("--route", "full", "--data", texts, "--output", tmp_path / "dense", "--steps", 1,
                 *SMALL[2:]) == 0
    start = storage.directory(tmp_path / "dense", 1)
    command = ("--route", "msa-pt", "--output", output, "--steps", 4, "--warmup-steps", 2,
               *SMALL[2:], "--config", tmp_path / "init.json")
    assert train(*command, "--data", texts, "--init", start, "--save-every", 2) == 0
    shutil.rmtree(storage.directory(output, 4))
    capsys.readouterr()
    files = lambda: {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    kept = files()

    def refused(*arguments):
        error = fails(capsys, *command, *arguments, "--resume")
        assert files() == kept
        return error

    assert f"--data: got facts, but the run began with {texts}" in refused("--data", "facts")
    (other / "a.txt").write_bytes(b"other")
    assert f"--data: got {other}, but the run began with {texts}" in refused("--data", other)
    here = texts / "new.txt"
    here.write_text("one more")
    try:
        assert f"--data: got {texts}, but the run began with {texts} of other contents" in refused(
            "--data", texts)
    finally:
        here.unlink()
    assert (f"--init: got {storage.directory(tmp_path, 7)}, but the run began with {start}"
            in refused("--data", texts, "--init", storage.directory(tmp_path, 7)))
    state = storage.directory(output, 2) / "state.json"
    was = json.loads(state.read_text())
    state.write_text(json.dumps(was | {"inputs": was["inputs"] | {"processes": 2}}))
    kept = files()
    assert "processes: got 1, but the run began with 2" in refused("--data", texts)
    state.write_text(json.dumps(was))
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(MINIATURE | {"index_topk_blocks": 4}))
    kept = files()
    assert ("--config: index_topk_blocks: got 4, but the run began with 3"
            in refused("--data", texts, "--config", wide))
    shutil.rmtree(other)
    shutil.copytree(texts, other)  # the same contents elsewhere are the same data
    assert train(*command, "--data", other, "--init", start, "--resume") == 0
    assert storage.steps(output) == [2, 4]


@pytest.mark.skipif(DEVICE != "cpu" and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_are_one_with_twice_the_steps(tmp_path):
    """Two ranks, over gloo or NCCL, take the micro steps of one process in turns."""
    command = ("--route", "msa-pt", "--steps", 6, "--warmup-steps", 3, *SMALL)
    assert train(*command, "--output", tmp_path / "one", "--accumulate", 2) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [process(*command, "--output", tmp_path / "two", env=os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MSA_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port)}) for rank in range(2)]
    for child in ranks:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        for name in ("loss", "kl", "grad_norm_backbone", "grad_norm_index"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), (a["step"], name)


def test_the_progress_bar_is_for_terminals(tmp_path):
    ours, theirs = pty.openpty()
    command = ("--route", "full", "--steps", 3, *SMALL, "--output", tmp_path)
    child = subprocess.Popen([sys.executable, "-m", "msa_cpp.train", *map(str, command)],
                             stdout=subprocess.PIPE, stderr=theirs, text=True)
    out, _ = child.communicate()
    shown = os.read(ours, 10_000).decode()
    assert child.returncode == 0 and "2 of 3, full loss" in shown and shown.endswith("\r\33[K")
    assert out.startswith(f"{storage.directory(tmp_path, 3)}: loss ") and out.count("\n") == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU is not waited for")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("route", ["full", "msa-pt"])
def test_a_step_does_not_wait_for_the_device(route, dtype):
    options = Options(route=route, steps=9, warmup_steps=3, batch=2, context=64, dtype=dtype)
    trainer = Trainer(options, fresh(), Facts())
    for stop in (1, 4):  # the first step of a stage may set up something
        trainer.run(stop)
        try:
            torch.cuda.set_sync_debug_mode("error")
            trainer._train_step(False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- what goes wrong -----------------------------------------------------------------------------


def fails(capsys, *arguments, code=2):
    assert train(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("msa_cpp.train: error: ")
    return err


def test_bad_input_is_one_line(run, tmp_path, texts, capsys):
    (tmp_path / "nothing").mkdir()
    base = ("--route", "msa-pt", "--output", tmp_path / "out")
    assert "holds no text" in fails(capsys, *base, "--data", tmp_path / "nothing")
    assert "no such directory" in fails(capsys, *base, "--data", tmp_path / "missing")
    assert "is a file" in fails(capsys, *base, "--data", __file__)
    assert "--steps: got 0" in fails(capsys, *base, "--data", texts, "--steps", 0)
    for flag, value in (("--lr", -1.0), ("--index-lr", "nan"), ("--clip", "inf"), ("--seed", -1),
                        ("--context", 1)):
        assert f"{flag}: got {value}" in fails(capsys, *base, "--data", texts, flag, value)
    assert "--warmup-steps: got 9, expected 0 to 5" in fails(
        capsys, *base, "--data", texts, "--steps", 5, "--warmup-steps", 9)
    assert "--init: not given" in fails(capsys, "--route", "msa-cpt", *base[2:], "--data", texts)
    assert "holds no checkpoint" in fails(capsys, *base, "--data", texts, "--resume")
    assert "holds a run already" in fails(capsys, *base[:2], "--output", run, "--data", "facts")
    assert "--lr: got 0.5, but the run began with 0.003" in fails(
        capsys, *base[:2], "--output", run, "--steps", 20, "--warmup-steps", 8, *SMALL, "--lr",
        "0.5", "--resume")
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(MINIATURE | {"hidden_size": 128}))
    assert "tensor model.embed_tokens.weight: shape: got [256, 64], expected [256, 128]" in fails(
        capsys, *base, "--data", texts, "--config", wide, "--init", storage.directory(run, 20))
    wide.write_text(json.dumps(MINIATURE | {"index_n_heads": 3}))
    assert "index_n_heads: got 3, expected 2" in fails(capsys, *base, "--data", texts, "--config",
                                                       wide)
    assert "--freeze: got all" in fails(capsys, "--route", "full", *base[2:], "--data", texts,
                                        "--freeze", "all")
    wide.write_text(json.dumps(MINIATURE | {"layer_types": ["full_attention"] * 2}))
    assert "layer_types: got full attention in every layer" in fails(
        capsys, *base, "--data", texts, "--config", wide)
    if not torch.cuda.is_available():
        assert "--device: got cuda" in fails(capsys, *base, "--data", texts, "--device", "cuda")
    assert not (tmp_path / "out").exists()


@on_cpu
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """Files of this process may not grow beyond 100 KB: the model has more."""
    options = Options(steps=4, warmup_steps=2, batch=2, context=64, save_every=2, log_every=1)
    Trainer(options, fresh(), Facts(), output=tmp_path).run(2)
    files = lambda: {p: p.read_bytes() for p in tmp_path.rglob("step-*/**/*") if p.is_file()}
    kept = files()
    assert max(map(len, kept.values())) > 100_000
    command = ("--route", "msa-pt", "--output", tmp_path, "--steps", 4, "--warmup-steps", 2,
               "--save-every", 2, *SMALL, "--resume")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    child = process(*command, preexec_fn=limit)
    _, errors = child.communicate()
    assert child.returncode == 2 and errors.count("\n") == 1 and "File too large" in errors, errors
    assert files() == kept and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert train(*command) == 0 and storage.steps(tmp_path) == [2, 4]


def test_a_nan_stops_the_run_by_name(tmp_path):
    model = fresh()
    options = Options(steps=9, warmup_steps=2, batch=2, context=64, save_every=3)
    trainer = Trainer(options, model, Facts(), output=tmp_path)
    trainer.run(4)
    kept = np_weights(storage.directory(tmp_path, 3))
    asked = Facts().examples(4, 2, 64).tokens[0, 0]
    with torch.no_grad():
        model.model.embed_tokens.weight[asked] = float("nan")
    with pytest.raises(Diverged, match=r"step 4: model.embed_tokens.weight holds NaN or infinity"):
        trainer.run()
    after = np_weights(storage.directory(tmp_path, 3))
    assert storage.steps(tmp_path) == [3]
    assert all(torch.equal(kept[name], after[name]) for name in kept)

    def poison(module, inputs, output):
        return output * float("inf")

    model = fresh()
    model.model.layers[1].mlp.register_forward_hook(poison)
    with pytest.raises(Diverged, match=r"step 0: the output of model.layers.1.mlp holds NaN"):
        Trainer(options, model, Facts()).run()


def test_a_diverging_run_says_so(tmp_path, capsys):
    error = fails(capsys, "--route", "full", "--output", tmp_path, "--steps", 50, "--lr", "1e38",
                  "--clip", "1e38", *SMALL, code=1)
    assert "step " in error and "holds NaN or infinity" in error


def test_a_converted_checkpoint_keeps_its_backbone(tmp_path, capsys):
    """Its weights carry factors of 2^40: only the index branch may learn."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from msa_cpp.convert import convert

    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "msa", full_attention=[0])
    capsys.readouterr()
    command = ("--init", tmp_path / "msa", "--output", tmp_path / "out", "--steps", 2,
               "--warmup-steps", 1, *SMALL)
    for route, freeze, given in (("msa-pt", (), "nothing"), ("msa-cpt", (), "nothing"),
                                 ("full", (), "nothing"), ("msa-pt", ("--freeze", "none"), "none"),
                                 ("msa-cpt", ("--freeze", "warmup"), "warmup")):
        error = fails(capsys, "--route", route, *command, *freeze)
        assert f"--freeze: got {given}, expected all: {tmp_path / 'msa'} comes from" in error
        assert not (tmp_path / "out").exists()
    assert train("--route", "msa-cpt", *command, "--freeze", "all") == 0
    before, after = np_weights(tmp_path / "msa"), np_weights(storage.directory(tmp_path / "out", 2))
    assert {n for n in after if not torch.equal(before[n].float(), after[n])} == {
        n for n in after if ".indexer." in n}


def test_the_model_is_that_of_config_json(tmp_path, capsys):
    """RoPE from every place that transformers reads, to the logits; what is not ours, by name."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    m3 = transformers.models.minimax_m3_vl
    rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25}
    outer = {"rope_theta": 300.0, "partial_rotary_factor": 0.25}
    rest = {k: v for k, v in MINIATURE.items() if k not in ("rope_parameters", "rms_norm_eps",
                                                            "swiglu_alpha", "swiglu_limit")}
    tokens, ends = torch.arange(96) % 91, torch.tensor([0, 96], dtype=torch.int32, device=DEVICE)
    for places in ({"rope_parameters": rope}, {"rope_scaling": rope}, outer,
                   {"rope_parameters": {"rope_type": "default"}, **outer}):
        config = rest | places
        model = Model(config, seed=1).to(DEVICE)
        assert model.config["rotary_dim"] == 4
        theirs = m3.modeling_minimax_m3_vl.MiniMaxM3VLForCausalLM(
            m3.configuration_minimax_m3_vl.MiniMaxM3VLTextConfig(
                **json.loads(json.dumps(config)), attn_implementation="eager")).eval()
        theirs.load_state_dict(model.state_dict())
        with torch.no_grad():
            attend = Trainer(Options(), model, Facts()).attend("sparse")
            ours, _ = model(tokens.to(DEVICE), ends, 96, attend)
            want = theirs(input_ids=tokens[None]).logits[0]
        torch.testing.assert_close(ours.cpu(), want, rtol=1e-3, atol=1e-4)
    path = tmp_path / "config.json"
    for change, says in (
            ({"use_gemma_norm": False}, "use_gemma_norm: got false, supported is true"),
            ({"attention_dropout": 0.1}, "attention_dropout: got 0.1, supported is 0"),
            ({"index_init_blocks": 3}, "index_topk_blocks: got 3, expected at least 4"),
            ({"sparse_attention_config": {"sparse_topk_blocks": 4}}, "sparse_attention_config: "),
            ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type: got")):
        path.write_text(json.dumps(MINIATURE | change))
        error = fails(capsys, "--route", "msa-pt", "--config", path, "--output", tmp_path / "out",
                      *SMALL)
        assert f"error: {path}: {says}" in error
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_nan_is_refused(run, tmp_path, capsys):
    from safetensors.torch import save_file

    shutil.copytree(storage.directory(run, 20), tmp_path / "bad")
    weights = np_weights(tmp_path / "bad")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "bad" / "model.safetensors")
    assert "tensor model.norm.weight: holds NaN" in fails(
        capsys, "--route", "msa-pt", "--init", tmp_path / "bad", "--output", tmp_path / "o", *SMALL)
