"""Tests of all four files, each against something independent: the paper's formula in a double loop,
a published number, brute force, an uninterrupted run.

    KILLS=20 FUZZ_SECONDS=600 python -m pytest -q      # longer than the quick suite
"""
import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import sys
import sysconfig
import time
import zipfile
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import data
import eval as evaluation  # not the builtin
import model as model_file
import train
from model import EXTENSIONS, GPT, POSITIONS, GPTConfig, Mask, ModelError, Position, Vocabulary, attend

CPU = torch.device("cpu")
KILLS, FUZZ_SECONDS = int(os.environ.get("KILLS", 2)), float(os.environ.get("FUZZ_SECONDS", 0))
torch.set_num_threads(1)        # some tests fork
TINY = dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16)


def tiny_model(pos, seed=0, **changes):
    """A tiny model whose position parameters, some of which start at zero, are random too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | {"pos": pos} | changes)).eval()
    for p in model.pos.parameters():
        p.data.uniform_(0.1, 1.0)
    return model


def extend(model, name, length):
    EXTENSIONS[name][0](model.pos, length)


def tokens(n, vocab_size=11, seed=0):
    return torch.randint(vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


# ---- the two programs, in this process --------------------------------------------------------------

Result = namedtuple("Result", "code out err")
BASE = {"train": "--preset quick --data corpus --tokenizer word --data_dir store --out_dir out --device cpu "
                 "--block_size 8 --batch_size 2 --n_layer 1 --n_head 2 --n_embd 16 --max_iters 6 "
                 "--eval_interval 3 --warmup_iters 2 --learning_rate 0.01",
        "eval": "--lengths 8 --data_dir store --device cpu"}


def call(command):
    """What "train FLAGS" or "eval FLAGS" does, run in this process on top of BASE."""
    program, *flags = command.split()
    main, code = {"train": train.main, "eval": evaluation.main}[program], 0
    argv = [f"{program}.py", *BASE[program].split(), *flags]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (mock.patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()) as out,
          redirect_stderr(io.StringIO()) as err):
        try:
            evaluation.run(main)
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


def works(command):
    """Standard output of a command that must end well."""
    result = call(command)
    assert result.code == 0, result.err
    return result.out


def contents(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(command, phrase):
    """Exit code 2, one line on standard error with `phrase` in it, nothing lost, nothing half-written."""
    before, (code, _, err), after = contents(), call(command), contents()
    assert code == 2 and err.count("\n") == 1 and phrase in err and "Traceback" not in err, (code, err)
    assert before.items() <= after.items() and not [path for path in after if path.suffix == ".tmp"]


def fork(child, *args):
    """A process of its own, silent, that ends with what child(*args) returns."""
    def body():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        train.tqdm.set_lock(RLock())        # tqdm's own is shared between processes, also with killed ones
        os._exit(child(*args))
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def ends(process):
    """The exit code, for a process that hangs a signal's number below zero."""
    process.join(100)
    process.kill()
    process.join()
    return process.exitcode


def write_corpus(folder, train="a b\n", valid="a\n", test="b\n", pattern="{}.txt"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, text in dict(train=train, valid=valid, test=test).items():
        Path(folder, pattern.format(split)).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def random_words(seed, sizes=(400, 150, 150)):
    chance = random.Random(seed)
    return [" ".join(f"w{chance.randrange(30)}" for _ in range(size)) + "\n" for size in sizes]


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def load(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)


def results(folder):
    """What a run learned, in bytes, and the steps and losses in its log."""
    weights = {name: p.numpy().tobytes() for name, p in load(folder)["model"].items()}
    return weights, [line.split(",")[:3] for line in Path(folder, "log.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A folder with two corpora and three trained runs."""
    here, back = tmp_path_factory.mktemp("example"), os.getcwd()
    os.chdir(here)
    write_corpus("corpus", *random_words(1))
    write_corpus("other", *random_words(2))
    works("train --pos alibi rotary learned")
    os.chdir(back)
    return here


@pytest.fixture
def here(example, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(example, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- encodings, each against its formula: scalars, double loops, float64 ----------------------------


def dot(q, k):
    return sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q))


def turned(v, place, growth=0.0):
    """RoPE in pairs (n, n + D/2); with growth 1 or -1 also xPos's scale."""
    half, out = len(v) // 2, list(v)
    for n in range(half):
        angle, zeta = place * 10000 ** (-n / half), ((n / half + 0.4) / 1.4) ** (growth * place / 512)
        out[n] = zeta * (v[n] * math.cos(angle) - v[n + half] * math.sin(angle))
        out[n + half] = zeta * (v[n] * math.sin(angle) + v[n + half] * math.cos(angle))
    return out


def t5_bucket(n):
    return n if n < 16 else min(31, 16 + math.floor(16 * math.log(n / 16) / math.log(128 / 16)))


def fire(pos, h, i, j):
    c, L = abs(pos.c.item()), abs(512 * pos.L.item())
    x = math.log(c * (i - j) + 1) / (math.log(c * max(L, i) + 1) + 1e-6)
    one, two = pos.mlp[0], pos.mlp[2]
    hidden = [max(0, w * x + b) for [w], b in zip(one.weight.tolist(), one.bias.tolist())]
    return two.bias[h].item() + sum(w * a for w, a in zip(two.weight[h].tolist(), hidden))


# encodings with a table that ends
LIMITED = [name for name, encoding in POSITIONS.items() if issubclass(encoding, POSITIONS["learned"])]

# name: score(pos, q, k, head from 0, i, j), or (that, what coordinate n of the embedding at i gets)
NAIVE = {
    "none": lambda pos, q, k, h, i, j: dot(q, k),
    "learned": (lambda pos, q, k, h, i, j: dot(q, k), lambda pos, i, n, C: pos.table[i, n].item()),
    "sinusoidal": (lambda pos, q, k, h, i, j: dot(q, k),
                   lambda pos, i, n, C: (math.cos if n % 2 else math.sin)(i / 10000 ** (n // 2 * 2 / C))),
    "rotary": lambda pos, q, k, h, i, j: dot(turned(q, i), turned(k, j)),
    "t5": lambda pos, q, k, h, i, j: dot(q, k) + math.sqrt(len(q)) * pos.table[t5_bucket(i - j), h].item(),
    "alibi": lambda pos, q, k, h, i, j: dot(q, k) - (i - j) * 2 ** (-8 * (h + 1) / pos.config.n_head),
    "kerple": lambda pos, q, k, h, i, j: dot(q, k) - pos.p[h].item() * math.log1p(pos.a[h].item() * (i - j)),
    "sandwich": lambda pos, q, k, h, i, j: dot(q, k) + pos.config.n_head / (8 * (h + 1)) * (
        sum(math.cos((i - j) / 10000 ** (2 * n / 128)) for n in range(1, 65)) - 64),
    "xpos": lambda pos, q, k, h, i, j: dot(turned(q, i, 1), turned(k, j, -1)),
    "fire": lambda pos, q, k, h, i, j: dot(q, k) + fire(pos, h, i, j),
    "hwfa": lambda pos, q, k, h, i, j: dot(turned(q, i), turned(k, j)),      # its last layer: see below
}


def naive_loss(model, idx, targets, window=0, logn=False):
    """The whole model in float64 and loops: a list of the targets' losses in nats."""
    w = {key: value.detach().double().numpy() for key, value in model.state_dict().items()}
    config, pos = model.config, model.pos
    H, D, C = config.n_head, config.n_embd // config.n_head, config.n_embd
    score, embed = NAIVE[config.pos] if isinstance(NAIVE[config.pos], tuple) else (NAIVE[config.pos], None)

    def norm(x, weight):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight

    x = w["wte.head"][idx] * math.sqrt(C)
    for i in range(len(x)) if embed else ():
        x[i] += [embed(pos, i, n, C) for n in range(C)]
    for layer in range(config.n_layer):
        reach, scaled, rule = window, logn, score
        if config.pos == "hwfa" and layer == config.n_layer - 1:
            reach, scaled, rule = 0, True, NAIVE["none"]
        elif config.pos == "hwfa":
            fits = [w for w in range(1, 99) if (w - 1) * (config.n_layer - 1) + 1 <= 0.75 * config.block_size]
            reach = window or fits[-1]
        block = f"blocks.{layer}."
        qkv = (norm(x, w[block + "ln_1.weight"]) @ w[block + "c_attn.weight"].T).reshape(len(x), 3, H, D)
        out = np.zeros((len(x), H, D))
        for h, i in itertools.product(range(H), range(len(x))):
            seen = range(max(0, i - reach + 1) if reach else 0, i + 1)
            q = qkv[i, 0, h] * (max(1, math.log(i + 1) / math.log(config.block_size)) if scaled else 1)
            weights = np.exp([rule(pos, list(q), list(qkv[j, 1, h]), h, i, j) for j in seen])
            out[i, h] = sum(a * qkv[j, 2, h] for a, j in zip(weights / weights.sum(), seen))
        x = x + out.reshape(len(x), C) @ w[block + "attn_proj.weight"].T
        hidden = np.maximum(0, norm(x, w[block + "ln_2.weight"]) @ w[block + "c_fc.weight"].T)
        x = x + hidden @ w[block + "mlp_proj.weight"].T
    logits = norm(x, w["ln_f.weight"]) @ w["wte.head"].T
    return [np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, targets)]


@pytest.mark.parametrize("window, logn", [(0, False), (5, False), (3, True)])
@pytest.mark.parametrize("pos", POSITIONS)
def test_model_is_its_formula(pos, window, logn):
    T = 24
    model = tiny_model(pos, window=window, logn=logn, block_size=T if pos in LIMITED else 16)
    for weight in model.blocks.parameters():
        weight.data *= 12 if weight.dim() == 2 else 1       # so that attention matters
    if pos == "fire":
        model.pos.L.data.fill_(0.02)        # its threshold, 512 L, lies within the text
    ids = tokens(T + 1)
    loss = model(ids[:, :-1], ids[:, 1:])[0]
    naive = naive_loss(model, ids[0, :-1].tolist(), ids[0, 1:].tolist(), window, logn)
    torch.testing.assert_close(loss.double(), torch.tensor(naive), rtol=2e-5, atol=2e-5)


def test_published_slopes_and_buckets():
    def slopes(**shape):
        return -tiny_model("alibi", **shape).pos.bias(torch.ones(1, 1), torch.zeros(1, 1)).flatten()
    eight = [2.0 ** -n for n in range(1, 9)]
    assert slopes(n_head=8).tolist() == eight
    twelve = torch.tensor(eight + [2.0 ** -x for x in (0.5, 1.5, 2.5, 3.5)])
    torch.testing.assert_close(slopes(n_head=12, n_embd=24), twelve)
    t5 = tiny_model("t5", n_embd=2).pos         # D = 1: the table as it is
    t5.table.data = torch.arange(32.0)[:, None].repeat(1, 2)
    found = t5.bias(torch.arange(300.0)[:, None], torch.zeros(1, 1))[0, :, 0].tolist()
    assert found == [t5_bucket(n) for n in range(300)]
    places = (0, 15, 16, 17, 20, 32, 64, 127, 128, 299)
    assert [found[n] for n in places] == [0, 15, 16, 16, 17, 21, 26, 31, 31, 31]


def test_kerple_comes_back():
    """The authors project the parameters: a head below 0.01 is put there, and goes on learning."""
    pos = tiny_model("kerple").pos
    pos.p.data[0] = -0.5
    bias = pos.bias(torch.full((1, 1), 9.0), torch.zeros(1, 1))
    assert bias[0].item() == pytest.approx(-0.01 * math.log1p(9 * pos.a[0].item()))
    bias.sum().backward()
    assert pos.p.grad.abs().min() > 0.1


def test_hwfa_window_of_the_blog():
    """Derived in the notes of kexue.fm/archives/9603: N 512, alpha 3/4: 12 layers 35, 16 layers 26."""
    for layers, window in ((12, 35), (16, 26)):
        with torch.device("meta"):
            found = GPT(GPTConfig(pos="hwfa", block_size=512, n_layer=layers)).pos.layers
        assert [layer.window for layer in found] == [window] * (layers - 1) + [0]


@pytest.mark.parametrize("window, logn", [(0, False), (5, True)])
@pytest.mark.parametrize("pos", POSITIONS)
def test_causal(pos, window, logn):
    model, ids = tiny_model(pos, window=window, logn=logn), tokens(17)
    changed = ids.clone()
    changed[0, 10:] = (ids[0, 10:] + 1) % 11
    one, two = (model.trunk(x[:, :16])[0] for x in (ids, changed))
    torch.testing.assert_close(one[:10], two[:10], rtol=0, atol=1e-5)
    assert (one[10:] - two[10:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("pos", POSITIONS)
def test_relative_is_told(pos):
    """The bias is the same at places far away, beyond FIRE's threshold of 512 L, where `relative` says so."""
    pos, place = tiny_model(pos).pos, torch.arange(0.0, 60.0, 3.0)
    i, j = place[:, None], torch.minimum(place[:, None], place)
    distance = (pos.bias(i + 1e4, j + 1e4) - pos.bias(i, j)).abs().max().item()
    assert distance == 0 if pos.relative else distance > 1e-3


@pytest.mark.parametrize("pos", POSITIONS)
def test_shift_invariance(pos, monkeypatch):
    """Only distances matter: to relative encodings. FIRE sees the place beyond its threshold of 512 L."""
    model, ids = tiny_model(pos, random_positions=64), tokens(16)
    here = model.trunk(ids)
    spaced = torch.arange(16.0) * 4 + (3 if pos in LIMITED else 1000)
    monkeypatch.setattr(model.pos, "positions", lambda T, device: spaced)
    distance = (model.trunk(ids) - here).abs().max()
    absolute = type(model.pos).embed is not Position.embed or not model.pos.relative
    assert distance > 1e-3 if absolute else distance < 1e-5


@pytest.mark.parametrize("pos", POSITIONS)
def test_window(pos):
    """In one layer, what is out of the window does not count; hwfa's only layer is its last, without one."""
    model, ids = tiny_model(pos, n_layer=1, window=4), tokens(16)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 11
    moved = (model.trunk(ids) - model.trunk(changed))[0].abs().amax(1) > 1e-5
    assert moved.tolist() == [2 <= i < (16 if pos == "hwfa" else 6) for i in range(16)]
    if pos != "hwfa":       # a window of everything is none
        torch.testing.assert_close(tiny_model(pos, window=16).trunk(ids), tiny_model(pos).trunk(ids))


def test_random_positions():
    pos = tiny_model("alibi", random_positions=100).pos
    assert pos.positions(20, CPU).tolist() == pytest.approx([5 * n for n in range(20)])
    pos.train()
    drawn = [pos.positions(16, CPU).tolist() for _ in range(50)]
    assert all(p == sorted(set(p)) and 0 <= p[0] and p[-1] < 100 and len(p) == 16 for p in drawn)
    assert len(set(itertools.chain(*drawn))) > 90       # out of all of them


@pytest.mark.parametrize("name, pos", [(name, pos) for name, (_, fits) in EXTENSIONS.items() for pos in fits])
def test_extensions_change_nothing_at_the_trained_length(name, pos):
    ids, longer = tokens(16), tokens(64)
    plain, extended = tiny_model(pos), tiny_model(pos)
    extend(extended, name, 16)
    assert torch.equal(plain.trunk(ids), extended.trunk(ids))
    extend(extended, name, 64)
    long = extended.trunk(longer)
    assert long.isfinite().all()
    assert torch.equal(plain.trunk(longer[:, :16]), long[:, :16]) == (name == "hierarchical")
    extend(extended, name, 16)
    assert torch.equal(plain.trunk(ids), extended.trunk(ids))


def test_extension_formulas():
    rotary, alibi, learned, quarters = map(tiny_model, ("rotary", "alibi", "learned", "learned"))
    extend(rotary, "ntk", 64)
    assert rotary.pos.base == pytest.approx(10000 * 4 ** (8 / 6))
    extend(alibi, "interpolate", 64)
    assert alibi.pos.positions(64, CPU).tolist() == [n / 4 for n in range(64)]
    p = learned.pos.table.detach().double()
    extend(learned, "hierarchical", 256)
    u = (p - 0.4 * p[0]) / 0.6
    q = torch.stack([0.4 * u[m // 16] + 0.6 * u[m % 16] for m in range(256)])
    torch.testing.assert_close(learned.pos.table.double(), q, rtol=0, atol=1e-5)
    learned.trunk(tokens(256))
    with pytest.raises(ModelError, match="learned ends at 256 positions, asked for 257"):
        learned.trunk(tokens(257))
    extend(quarters, "interpolate", 64)
    x = quarters.pos.embed(torch.zeros(1, 64, 16), quarters.pos.positions(64, CPU))[0]
    mixed = [p[n // 4] * (1 - n % 4 / 4) + p[min(15, n // 4 + 1)] * (n % 4 / 4) for n in range(64)]
    torch.testing.assert_close(x.double(), torch.stack(mixed), rtol=0, atol=1e-5)


def test_learned_ends_at_its_table():
    with pytest.raises(ModelError, match="learned ends at 16 positions, asked for 17"):
        tiny_model("learned").trunk(tokens(17))


# ---- mask and kernels, against the plain formula ----------------------------------------------------


def plain(q, k, v, pos, i, window=0, rows=slice(None)):
    """What attention gives for all queries, or for these rows of them."""
    j = torch.arange(len(i))
    query = j[rows, None]
    bias = pos.bias(i[query], i[torch.minimum(query, j)])
    scores = q[:, :, rows] @ k.mT / math.sqrt(q.shape[-1]) + bias
    hidden = (j > query) | (j <= query - (window or len(i)))
    return torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v


@pytest.mark.parametrize("window", [0, 1, 70, 200])
@pytest.mark.parametrize("pos", ["none", "t5", "alibi", "kerple", "sandwich", "fire", "random"])
def test_slices_are_plain_attention(pos, window):
    """Three slices of queries, forward and gradients; "random" is ALiBi at random positions."""
    if pos == "random":
        pos = tiny_model("alibi", random_positions=999, block_size=300).pos.train()
    else:
        pos = tiny_model(pos).pos
    qkv = torch.randn(3, 2, 2, 300, 8).requires_grad_()
    i = pos.positions(300, CPU)
    leaves = [qkv, *pos.parameters()]
    fast, slow = attend(*qkv, Mask(pos, i, window, False)), plain(*qkv, pos, i, window)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)
    weight = torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad(out, leaves, weight, allow_unused=True) for out in (fast, slow))):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        torch.testing.assert_close(attend(*qkv, Mask(pos, i, window, False)), slow, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_long_text_in_slices():
    """Beyond 2048 tokens a mask without a line is drawn for fewer queries at a time."""
    pos, qkv, i = tiny_model("fire").pos, torch.randn(3, 1, 2, 2200, 4), torch.arange(2200.0)
    fast, rows = attend(*qkv, Mask(pos, i, 2100, False)), [0, 1, 118, 119, 120, 127, 128, 2047, 2150, 2199]
    torch.testing.assert_close(fast[:, :, rows], plain(*qkv, pos, i, 2100, rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pos, window", [("alibi", 0), ("t5", 40), ("kerple", 0), ("none", 9)])
def test_gpu_kernel_scores_on_the_cpu(pos, window):
    """What the GPU's fused kernel is given, run by FlexAttention's reference, with the bias's gradient."""
    pos, (q, k, v), i = tiny_model(pos).pos, torch.randn(3, 1, 2, 200, 8), torch.arange(200.0)
    mask = Mask(pos, i, window, True)
    fused = flex_attention(q, k, v, score_mod=mask.score_mod if mask.biased else None, block_mask=mask.blocks)
    slow = plain(q, k, v, pos, i, window)
    torch.testing.assert_close(fused, slow, rtol=1e-3, atol=1e-4)
    for p in pos.parameters():
        grads = [torch.autograd.grad((out * v).sum(), p, retain_graph=True)[0] for out in (fused, slow)]
        torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("T", [1, 64, 127, 128, 129, 200, 256, 640])
def test_tiles_are_those_of_torch(T):
    """The closed form against create_block_mask, which looks at every pair."""
    for window in (1, 2, 50, 127, 128, 129, 130, 255, 256, 257, T):
        mine = model_file.causal_blocks(T, window, CPU)
        theirs = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), 1, 1, T, T, "cpu", 128)
        assert mine.seq_lengths == theirs.seq_lengths == (T, T)
        assert torch.equal(mine.to_dense(), theirs.to_dense())
        for kind in ("kv", "full_kv", "q", "full_q"):
            counts = [getattr(blocks, f"{kind}_num_blocks")[0, 0].tolist() for blocks in (mine, theirs)]
            columns = [getattr(blocks, f"{kind}_indices")[0, 0].tolist() for blocks in (mine, theirs)]
            used = [[sorted(row[:n]) for row, n in zip(*pair)] for pair in zip(columns, counts)]
            assert counts[0] == counts[1] and used[0] == used[1], (window, kind)


def force_the_gpus_path(patch):
    """All attention goes through the graph that a GPU compiles and FlexAttention, run op by op on the CPU."""
    patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    patch.setattr(model_file, "Mask", lambda pos, i, window, fused: Mask(pos, i, window, True))
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


@pytest.mark.parametrize("pos", POSITIONS)
def test_compiled_and_fused(pos, monkeypatch):
    """The graph that a GPU compiles, run op by op on the CPU: the gradients are those of the slices."""
    T, window = {"none": (200, 50), "learned": (64, 0), "t5": (64, 9), "alibi": (129, 128)}.get(pos, (150, 0))
    model = tiny_model(pos, n_layer=1 + (pos == "hwfa"), n_embd=32, block_size=T, window=window).train()
    for weight in model.blocks.parameters():
        weight.data *= 4
    ids, parameters = tokens(T + 1), list(model.parameters())

    def gradients():
        return torch.autograd.grad(model(ids[:, :-1], ids[:, 1:]).mean(), parameters)

    slices = gradients()
    force_the_gpus_path(monkeypatch)
    model.stack = torch.compile(model.stack, fullgraph=True)
    model.wte.head_loss = torch.compile(model.wte.head_loss, fullgraph=True)
    try:
        for (name, _), a, b in zip(model.named_parameters(), gradients(), slices):
            torch.testing.assert_close(a, b, rtol=5e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    finally:
        torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("pos", ["none", "alibi", "fire"])
def test_graphs_do_not_grow_with_the_text(pos):
    """Beyond the trained length slices are not unrolled into graphs; no length has one of its own."""
    model, seen = tiny_model(pos), []
    torch._dynamo.reset()
    graphs, whole = CompileCounterWithBackend("eager"), model.trunk(tokens(700))
    model.stack = torch.compile(model.stack, backend=graphs, fullgraph=True)
    for T in (16, 8, 17, 40, 300, 700):
        long = model.trunk(tokens(700)[:, :T])
        seen.append((graphs.frame_count, graphs.op_count / graphs.frame_count))
    torch._dynamo.reset()
    assert seen[-1][0] <= 2 and len(set(seen[1:])) == 1 and seen[0][1] == pytest.approx(seen[-1][1], rel=0.2)
    torch.testing.assert_close(long, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pos", ["none", "learned", "t5", "alibi", "fire", "hwfa"])
def test_memory_grows_with_the_length_alone(pos):
    """A (H, T, T) array in float32 would take 288 MB here."""
    def child():
        model, ids = tiny_model(pos, n_layer=1, block_size=6000), tokens(6000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.no_grad():
            model(ids, ids)
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return min(255, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // unit // 4)
    assert ends(fork(child)) < 200 // 4


@pytest.mark.parametrize("pos", ["none", "fire"])
def test_graphs_of_a_whole_run(pos, here, monkeypatch):
    """Training, evaluation and the closing table: as many, however many steps and lengths there are."""
    compile, counts = torch.compile, []
    for flags in ("--max_iters 2 --lengths 8 16 32", "--max_iters 6 --lengths 8 9 16 24 32 64 128"):
        graphs = CompileCounterWithBackend("eager")
        monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=graphs))
        works(f"train --overwrite --compile --pos {pos} --out_dir new {flags}")
        counts.append(graphs.frame_count)
    torch._dynamo.reset()
    assert counts[0] == counts[1] <= 6, counts


def test_alibi_in_bfloat16_is_as_exact_as_none():
    """At 2048 tokens, where bfloat16 has no distances: error against float64 at most twice that of none."""
    T, errors = 2048, []
    qkv, i = torch.randn(3, 1, 2, T, 32).bfloat16(), torch.arange(float(T))
    for pos in (tiny_model("none").pos, tiny_model("alibi").pos):
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*qkv, Mask(pos, i, 0, False))
        exact = plain(*qkv.double(), pos, i.double())
        errors.append(((out - exact).square().mean() / exact.square().mean()).sqrt().item())
    assert errors[1] < 2 * errors[0] < 0.02


@torch.no_grad()
def test_masks_are_made_in_float32():
    """Under autocast too, where FIRE's MLP would run in bfloat16; then they get the queries' dtype."""
    pos, i = tiny_model("fire").pos, torch.arange(200.0)
    exact = Mask(pos, i, 0, False).slice(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Mask(pos, i, 0, False).slice(0), exact)


@pytest.mark.parametrize("keys", (1, 8, 100))
def test_masks_as_gpu_kernels_want_them(keys):
    """In the queries' dtype, each row contiguous and a multiple of 8 elements from the next."""
    queries = argparse.Namespace(is_cuda=True, dtype=torch.bfloat16)        # stands for a tensor on a GPU
    mask = torch.randn(2, 109).unfold(1, keys, 1)
    laid = model_file.lay_out(mask, queries)
    assert torch.equal(laid, mask[None].bfloat16()) and laid.stride(-1) == 1 and laid.stride(-2) % 8 == 0


@torch.no_grad()
def test_logn_is_rounded_once(monkeypatch):
    """In bfloat16 the product is rounded, not the factor as well."""
    seen, ids = [], tokens(200)
    monkeypatch.setattr(model_file, "attend", lambda q, k, v, mask, dropout: seen.append(q) or v)
    for logn in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            tiny_model("none", n_layer=1, logn=logn).trunk(ids)
    factor = torch.tensor([max(1, math.log(n) / math.log(16)) for n in range(1, 201)])[:, None]
    once, twice = (seen[0].float() * factor).bfloat16(), seen[0] * factor.bfloat16()
    assert (seen[1] != once).float().mean() < 0.01 < (seen[1] != twice).float().mean()


# ---- model and vocabulary ---------------------------------------------------------------------------


def test_adaptive_softmax():
    """Against torch's AdaptiveLogSoftmaxWithLoss of the same weights, and probabilities that sum to one."""
    torch.manual_seed(0)
    mine = Vocabulary(50, 32, cutoffs=(10, 20))
    for p in mine.parameters():
        p.data.normal_()
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(32, 50, [10, 20], div_value=4.0, head_bias=False)
    theirs.head.weight.data = mine.head.data
    for n in range(2):
        theirs.tail[n][0].weight.data = mine.projections[n].data
        theirs.tail[n][1].weight.data = mine.tails[n].data
    x = torch.randn(50, 32)
    loss = torch.stack([mine.loss(row.expand(50, 32), torch.arange(50)) for row in x])
    torch.testing.assert_close(-loss, theirs.log_prob(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((-loss).exp().sum(1), torch.ones(50), rtol=1e-4, atol=1e-4)
    tied = [mine.head[3], mine.tails[0][5] @ mine.projections[0], mine.tails[1][7] @ mine.projections[1]]
    found = mine(torch.tensor([3, 15, 27]))
    torch.testing.assert_close(found, torch.stack(tied) * math.sqrt(32), rtol=1e-4, atol=1e-4)


def test_small_vocabulary_is_a_plain_tied_softmax():
    model, ids = tiny_model("alibi"), tokens(17)
    logits = model.trunk(ids[:, :-1]) @ model.wte.head.T
    expected = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:])[0], expected)


def test_loss_in_pieces(monkeypatch):
    """In evaluation a long text's logits do not stand in memory at once: 2^23 at most, none for target -1."""
    model, ids, seen = tiny_model("alibi", vocab_size=2 ** 20), tokens(31, 2 ** 20), []
    targets = ids[:, 1:].clone()
    whole = model(ids[:, :-1], targets)
    loss = model.wte.loss
    monkeypatch.setattr(model.wte, "loss", lambda x, y: seen.append(len(x)) or loss(x, y))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :-1], targets), whole)
        targets[0, :20:2] = -1
        torch.testing.assert_close(model(ids[:, :-1], targets), whole.where(targets >= 0, 0))
    assert seen == [8, 8, 8, 6] + [8, 8, 4]


@pytest.mark.parametrize("pos", POSITIONS)
def test_weight_decay_touches_matrices_only(pos):
    model = tiny_model(pos, vocab_size=30000)
    decay, rest = model.parameter_groups(0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decay["params"]) + len(rest["params"]) == len(names) and rest["weight_decay"] == 0
    assert {names[id(p)].split(".")[-2] for p in decay["params"]} == {
        "wte", "tails", "projections", "c_attn", "attn_proj", "c_fc", "mlp_proj"}
    assert all(names[id(p)].startswith(("pos.", "ln_f")) or ".ln_" in names[id(p)] for p in rest["params"])


@pytest.mark.parametrize("pos", POSITIONS)
def test_overfits_one_batch(pos):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"pos": pos, "n_embd": 32})).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0))
    ids = torch.randint(11, (4, 17))
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 10)
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 1.2        # from ln(11) = 2.4


def test_encodings_start_from_equal_weights():
    states = [tiny_model(pos).state_dict() for pos in POSITIONS]
    shared = [{name: p for name, p in state.items() if not name.startswith("pos.")} for state in states]
    assert all(torch.equal(p, other[name]) for other in shared for name, p in shared[0].items())


@pytest.mark.parametrize("pos, window", [("none", 0), ("alibi", 5), ("rotary", 99), ("hwfa", 0)])
def test_flops_are_counted_pair_by_pair(pos, window):
    """6 for each weight that a token meets, 12 for each product of a query and a key that it sees."""
    model, C, pairs = tiny_model(pos, window=window), 16, 0
    for layer in range(2):
        reach = window or 16
        if pos == "hwfa":
            reach = (12, 16)[layer]
        pairs += sum(0 <= i - j < reach for i in range(16) for j in range(16))
    weights = 2 * (3 + 1 + 4 + 4) * C * C + 11 * C
    assert model.flops_per_token() == pytest.approx(6 * weights + 12 * C * pairs / 16)


def test_parameters_of_the_paper():
    """fairseq's transformer_lm_wiki103 has 246,933,504; the README lists where this model differs."""
    shape = dict(vocab_size=267735, block_size=512, n_layer=16, n_head=8, n_embd=1024, pos="sinusoidal")
    with torch.device("meta"):
        ours = sum(p.numel() for p in GPT(GPTConfig(**shape)).parameters())
    biases = 16 * (3072 + 1024 + 4096 + 1024 + 2 * 1024)        # of four linear layers and two norms a block
    first_band, dictionary, final_norm = 1024 ** 2, 9 * 64, 1024
    assert ours + biases + first_band + dictionary - final_norm == 246_933_504


# ---- data -------------------------------------------------------------------------------------------


def test_words_by_hand(tmp_path):
    """Blank lines, unknown words, no last newline. By count: b 3, <eos> 3, c 2, a 1, <unk> (0)."""
    folder = write_corpus(tmp_path / "mini", " b c b \n\n a  c b", "b new\n \n", "c", "wiki.{}.tokens")
    corpus = data.load(folder, "word", tmp_path / "cache")
    assert corpus.words == ["b", "<eos>", "c", "a", "<unk>"]
    assert corpus.train.tolist() == [0, 2, 0, 1, 1, 3, 2, 0, 1]
    assert corpus.valid.tolist() == [0, 4, 1, 1] and corpus.test.tolist() == [2, 1]


def test_byte_order_mark_is_no_part_of_a_word(tmp_path):
    mark = b"\xef\xbb\xbf"
    write_corpus(tmp_path, mark + b"a b a\n", mark + b"a\n", mark + b"b\n")
    corpus = data.load(tmp_path, "word", tmp_path)
    assert corpus.words == ["a", "b", "<eos>", "<unk>"]
    assert [split.tolist() for split in corpus[:3]] == [[0, 1, 0, 2], [0, 2], [1, 2]]


def test_bytes_are_bytes(tmp_path):
    folder = write_corpus(tmp_path / "raw", bytes(range(256)), b"\xff\x00", b"\n")
    corpus = data.load(folder, "byte", tmp_path)
    assert corpus.train.tolist() == list(range(256)) and corpus.valid.tolist() == [255, 0]
    assert corpus.words == [] and corpus.test.tolist() == [10]


def test_large_vocabulary(tmp_path):
    """Beyond what two bytes can count."""
    words = 2 ** 16 + 1
    text = " ".join(map(str, range(words)))
    corpus = data.load(write_corpus(tmp_path / "large", text + "\n", text, "none"), "word", tmp_path)
    assert len(corpus.words) == words + 2
    assert corpus.valid.tolist() == corpus.train.tolist() == [*range(words), words]
    assert corpus.test.tolist() == [words + 1, words]


def test_any_text_under_a_vocabulary(tmp_path):
    """One split is enough; what the vocabulary lacks is <unk>."""
    folder = write_corpus(tmp_path / "new", valid="b new a\n")
    Path(folder, "train.txt").unlink()
    Path(folder, "test.txt").unlink()
    words = ["a", "<eos>", "<unk>", "b"]
    assert data.load_split(folder, "valid", words, tmp_path).tolist() == [3, 2, 0, 1]
    assert data.load_split(folder, "valid", [], tmp_path).tolist() == list(b"b new a\n")
    with pytest.raises(data.UserError, match="new must hold wiki.{test}.tokens or {test}.txt"):
        data.load_split(folder, "test", words, tmp_path)


def test_cache_is_used_and_not_trusted(tmp_path, monkeypatch):
    folder, calls, read = write_corpus(tmp_path / "text", "a b c\n"), [], data.read_words
    monkeypatch.setattr(data, "read_words", lambda paths: calls.append(1) or read(paths))
    first = data.load(folder, "word", tmp_path)
    mapped, maps = data.load(folder, "word", tmp_path), Path("/proc/self/maps")
    [cache] = Path(tmp_path, "cache").iterdir()
    assert torch.equal(mapped.train, first.train) and len(calls) == 1
    assert not maps.exists() or str(cache) in maps.read_text()
    Path(folder, "train.txt").write_text("a c b c\n")
    assert data.load(folder, "word", tmp_path).digest != first.digest and len(calls) == 2
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    data.load(folder, "word", tmp_path)
    assert len(calls) == 3


HARM = dict(
    short=lambda path: os.truncate(path, path.stat().st_size - 3), head=lambda path: os.truncate(path, 20),
    empty=lambda path: os.truncate(path, 0), text=lambda path: path.write_text("hello"), gone=Path.unlink,
    noise=lambda path: path.write_bytes(bytes(range(200, 240))), few=lambda path: torch.save([1, 2], path),
    fields=lambda path: torch.save({"a": 1, "b": 2}, path),
    flipped=lambda path: flip_a_byte(path), types=lambda path: torch.save([1, 2, 3, 4, 5], path))


@pytest.mark.parametrize("harm", HARM)
def test_damaged_cache_is_built_anew(harm, here):
    *splits, words, digest = data.load("corpus", "word", "store")
    splits, content = [split.clone() for split in splits], contents("store")     # clones: it will be damaged
    [path] = Path("store/cache").glob("corpus-word-*.pt")
    HARM[harm](path)
    *again, words_again, digest_again = data.load("corpus", "word", "store")
    assert all(map(torch.equal, splits, again)) and (words, digest) == (words_again, digest_again)
    assert contents("store") == content


def test_stdlib_splits_are_apart():
    files = data.stdlib_files()
    names = [set(map(str, files[split])) for split in data.SPLITS]
    assert all(names) and len(set.union(*names)) == sum(map(len, names))


def zipped():
    """A zip like WikiText's."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for split in data.SPLITS:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", f" a b <unk> {split} \n" * 40)
    return file.getvalue()


class Mirror(BaseHTTPRequestHandler):
    """/200/x.zip serves `body`, /403/x.zip is refused, and so on; `agents` saw who asked."""
    body, agents = zipped(), []

    def do_GET(self):
        self.agents.append(self.headers["User-Agent"])
        how = self.path.split("/")[1]
        if how != "hang":
            self.send_response(int(how) if how.isdigit() else 200)
            self.send_header("Content-Length", len(self.body))
            self.end_headers()
            parts = {"200": self.body, "half": self.body[:99], "wrong": bytes(len(self.body))}
            self.wfile.write(parts.get(how, b""))
        if how in ("hang", "stall"):
            time.sleep(0.5)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.daemon_threads, server.block_on_close = True, False
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def mirror(here, server, monkeypatch):
    """mirror(way) makes the server's zip the published one, and this way of serving it the mirror."""
    def mirror(way, timeout=30):
        Mirror.agents.clear()
        body = Mirror.body
        monkeypatch.setitem(data.ZIPS, "wikitext-2", (len(body), hashlib.sha256(body).hexdigest()))
        monkeypatch.setattr(data, "MIRROR", way if ":" in way else f"{server}/{way}/")
        monkeypatch.setattr(data, "TIMEOUT", timeout)
    return mirror


@pytest.mark.parametrize("way, phrase", (
    ("403", "HTTP Error 403"), ("404", "HTTP Error 404"), ("500", "HTTP Error 500"), ("hang", "timed out"),
    ("stall", "timed out"), ("half", "sha256"), ("wrong", "sha256"), ("http://127.0.0.1:1/", "refused"),
    ("http://nowhere.invalid/", "rror")))
def test_download_fails(way, phrase, mirror, here):
    mirror(way, timeout=0.15 if way in ("hang", "stall") else 30)
    refused("train --data wikitext-2", phrase)
    refused("train --data wikitext-2", f"put the real wikitext-2-v1.zip into {here / 'store'}, or use --data")
    assert [path.name for path in Path("store").iterdir()] == ["cache"]


def test_download(mirror):
    mirror("200")
    corpus = data.load("wikitext-2", "word", "store")
    assert corpus.words == ["a", "b", "<unk>", "train", "<eos>"] and len(corpus.train) == 40 * 5
    assert len(Mirror.agents) == 1 and "urllib" not in Mirror.agents[0].lower()
    assert {path.name for path in Path("store").iterdir()} == {"cache", "wikitext-2"}
    works("train --data wikitext-2 --out_dir new")
    assert len(Mirror.agents) == 1      # no second download


def test_zip_put_by_hand(mirror):
    mirror("404")
    Path("store/wikitext-2-v1.zip").write_bytes(Mirror.body)
    assert len(data.load("wikitext-2", "word", "store").test) == 40 * 5 and not Mirror.agents


@pytest.mark.parametrize("bad", (zipped()[:-9], b"", b"<html>not found</html>"), ids=("cut", "empty", "page"))
def test_wrong_zip_put_by_hand(bad, mirror):
    mirror("200")
    Path("store/wikitext-2-v1.zip").write_bytes(bad)
    refused("train --data wikitext-2", "store/wikitext-2-v1.zip")
    refused("train --data wikitext-2", "size and sha256")
    assert not Mirror.agents and not Path("store/wikitext-2").exists()


@pytest.mark.parametrize("corpus, meet", [("corpus", "torch.save"), ("wikitext-2", "zipfile.ZipFile"),
                                          ("wikitext-2", "os.replace")])
def test_two_runs_at_once(corpus, meet, mirror):
    """In a fresh folder, with both of them at the same place: both succeed."""
    mirror("200")
    barrier, module, name = multiprocessing.get_context("fork").Barrier(2), *meet.split(".")
    original, met = getattr(sys.modules[module], name), []

    def together(*args):
        if not met:
            met.append(barrier.wait(60))
        return original(*args)

    flags = f"--data {corpus} --data_dir fresh --max_iters 1"
    with mock.patch.object(sys.modules[module], name, together):
        runs = [fork(lambda out: call(f"train {flags} --out_dir {out}").code, out) for out in ("one", "two")]
    assert [ends(run) for run in runs] == [0, 0]
    assert results("one/alibi") == results("two/alibi")
    assert len(list(Path("fresh/cache").iterdir())) <= 2 and not list(Path("fresh").rglob("*.tmp"))


# ---- protocols --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, length, stride", [(50, 16, None), (49, 16, None), (50, 16, 5), (33, 16, 16),
                                               (17, 16, 1), (10, 16, 3), (2, 1, 1), (47, 8, 3)])
def test_every_target_counts_once(n, length, stride, monkeypatch):
    """Against one forward pass for each target, over the window that the protocol gives it."""
    model, stream = tiny_model("alibi"), tokens(n)[0]
    expected, S = np.zeros((2, length)), stride or length
    for target in range(n - 1):
        start = max(0, math.ceil((target + 1 - length) / S)) * S
        ids = stream[start:target + 2][None]
        expected[:, target - start] += model(ids[:, :-1], ids[:, 1:])[0, -1].item(), 1
    loss, seen = model.wte.loss, []
    monkeypatch.setattr(model.wte, "loss", lambda x, y: seen.append(len(x)) or loss(x, y))
    for batch_tokens in (1, 64):
        found = evaluation.evaluate(model, stream, length, stride, batch_tokens=batch_tokens)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert sum(seen) == 2 * (n - 1)     # what is not scored costs no logits


@pytest.mark.parametrize("vocab_size", [11, 20100])
def test_evaluates_other_precisions(vocab_size):
    stream = tokens(60, vocab_size)[0]
    models = (tiny_model("alibi", vocab_size=vocab_size).to(dtype)
              for dtype in (torch.float32, torch.float64, torch.bfloat16))
    loss, exact, rough = (evaluation.evaluate(model, stream, 16, 5)[0] for model in models)
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.1)


def test_evaluation_leaves_training_alone():
    model, stream = tiny_model("alibi", dropout=0.5, random_positions=50).train(), tokens(100)[0]
    state = torch.get_rng_state()
    one, two = (evaluation.evaluate(model, stream, 16)[0] for _ in range(2))
    assert torch.equal(one, two) and model.training and torch.equal(torch.get_rng_state(), state)


def test_by_position(here):
    """The bins, weighted by their counts, give the loss of the whole."""
    out = works("eval out/alibi --lengths 12 --by_position --csv t.csv")
    found = re.findall(r"alibi at 12, position (\d+) to (\d+): loss ([\d.]+) over (\d+) targets, out/al", out)
    assert [(int(a), int(b)) for a, b, *_ in found] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 12)]
    [row] = read_csv("t.csv")
    count = [sum(int(a) <= n % 12 + 1 <= int(b) for n in range(int(row["tokens"]))) for a, b, *_ in found]
    assert count == [int(targets) for *_, targets in found]
    mean = np.average([float(loss) for _, _, loss, _ in found], weights=count)
    assert mean == pytest.approx(float(row["loss"]), abs=1e-3)


def test_table_and_csv(here):
    out = works("eval out/alibi out/learned/ckpt.pt --stride 4 --lengths 8 12 --csv t.csv --window 4 --logn "
                "--split test")
    assert "test split, sliding by 4" in out and "learned + logn + window 4" in out
    rows, keys = read_csv("t.csv"), ("length", "stride", "split", "tokens", "window", "logn")
    found = [[r[key] for key in keys] for r in rows]
    assert found == [[n, "4", "test", "150", "4", "1"] for n in ("8", "12", "8")]
    assert all(float(r["ppl"]) == pytest.approx(math.exp(float(r["loss"]))) for r in rows)


def test_eval_measures_what_training_measured(here):
    works("eval out --lengths 8 16 32 64 128 --csv t.csv")
    one, two = ({(r["pos"], r["length"]): float(r["loss"]) for r in read_csv(path)}
                for path in ("t.csv", "out/extrapolation.csv"))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 11


def test_a_folder_of_runs(here):
    """All below it, in order; other text and several corpora are told apart."""
    out = works("eval out").splitlines()
    assert [line.split()[0] for line in out[2:5]] == ["alibi", "learned", "rotary"]
    works("train --data other --out_dir deep/er")
    assert "alibi on other" in works("eval out deep")
    assert "alibi on other" not in works("eval out/alibi --data other")
    works("train --n_embd 32 --out_dir wide")
    out = works("eval out/alibi deep/er/alibi wide out/learned --data corpus --lengths 8")
    assert re.findall(r"^(\w.*?) +8 ", out, re.M) == [
        "alibi in out/alibi", "alibi in deep/er/alibi", "alibi in wide/alibi", "learned"]


def test_options_of_the_checkpoint(here):
    """A window and log n of the training hold unless others are named; 0 and --no-logn end them."""
    works("train --window 4 --logn --out_dir new")
    losses = []
    for flags in ("", "--window 4 --logn", "--window 0", "--window 99", "--no-logn", "--window 0 --no-logn"):
        works(f"eval new --lengths 16 --csv t.csv {flags}")
        [row] = read_csv("t.csv")
        losses.append(float(row["loss"]))
    assert (row["window"], row["logn"]) == ("0", "0")
    kept, same, all_seen, wide, plain, neither = losses
    assert kept == same and all_seen == pytest.approx(wide, rel=1e-5)
    assert len({round(loss, 5) for loss in (kept, all_seen, plain, neither)}) == 4


def test_seeds_share_a_row(here):
    """Runs that differ in seed and folder alone: mean and standard deviation, and a CSV row for each."""
    for seed in (1, 2, 3):
        works(f"train --seed {seed} --out_dir seeds/{seed} --eval_interval {seed} --pos alibi learned")
    works("train --learning_rate 0.02 --out_dir seeds/4")
    _, _, mean, std, learned, end, other, *_ = works("eval seeds --lengths 8 16 --csv t.csv").splitlines()
    ppl = [[float(r["ppl"]) for r in read_csv("t.csv") if (r["pos"], r["length"]) == ("alibi", n)]
           for n in ("8", "16")]
    assert mean.split()[:6] == ["alibi", "in", "seeds/1/alibi", "8",
                                *(f"{sum(three) / 3:.2f}" for *three, _ in ppl)]
    squares = [sum((x - sum(three) / 3) ** 2 for x in three) for *three, _ in ppl]
    assert std.split() == ["std", "of", "3", *(f"{math.sqrt(total / 2):.2f}" for total in squares)]
    assert other.split()[:6] == ["alibi", "in", "seeds/4/alibi", "8", *(f"{one:.2f}" for *_, one in ppl)]
    assert learned.split()[3:] == ["-", "fails", "from", "16"] and end.split()[4:] == ["-"]


@pytest.mark.parametrize("flag", ("seed 1337", "batch_size 3", "grad_accum 2", "max_iters 7", "dropout 0.1",
                                  "weight_decay 1", "dtype float32", "data other"))
def test_other_runs_have_rows_of_their_own(flag, here):
    """Other settings, another text, and the same seed again."""
    works(f"train --seed 7 --{flag} --out_dir two")
    out = works("eval out/alibi two")
    assert len(re.findall("^alibi", out, re.M)) == 2 and "std of" not in out


def test_extensions_have_rows_of_their_own(here):
    lines = works("eval out/alibi out/rotary --extend interpolate ntk").splitlines()
    assert [re.split(" +8 ", line)[0] for line in lines[2:-2]] == [
        "alibi", "alibi + interpolate", "rotary", "rotary + interpolate", "rotary + ntk"]


@pytest.mark.parametrize("changes", [{}, dict(pos="none", window=123456, logn=1)])
def test_columns(changes, capsys):
    """However large or missing a perplexity is, the table stays a table."""
    ppl = [1.25, 99999.99, 1234567.8, 98765432109.8, math.inf]
    row = dict(pos="sandwich", train_length=8, stride=None, split="valid", tokens=1, loss=1.0, extend="",
               window=0, logn=0, random_positions=0, checkpoint="x", data="corpus") | changes
    lines = [[[row | dict(length=8 * 2 ** n, ppl=value) for n, value in enumerate(order)]]
             for order in (ppl, ppl[::-1])]
    evaluation.report(lines, "word", "")
    _, head, *printed = capsys.readouterr().out.splitlines()
    start = head.index(" trained") + 8
    for line, order in zip(printed, (ppl, ppl[::-1])):
        cells = [line[start + 9 * n:start + 9 * n + 9] for n in range(5)]
        assert line[start - 8:start].strip() == "8" and all(cell[0] == " " for cell in cells)
        for cell, value in zip(cells, order):
            assert cell.strip() == "-" if value == math.inf else float(cell) == pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize("ppl, verdict", [
    ({8: 2, 16: 2.019, 32: 1}, "holds"), ({8: 2, 16: 2.021, 32: 1}, "fails from 16"),
    ({8: 2, 16: 2, 32: math.nan}, "fails from 32"), ({8: 2, 16: math.inf}, "fails from 16"),
    ({8: math.nan, 16: 2}, "fails from 16"), ({4: 9, 8: 2}, ""), ({16: 2, 32: 2}, ""),
    ({8: math.inf, 16: 2}, "")
])
def test_verdict(ppl, verdict):
    """Nothing is said where the trained length or a longer one was not measured."""
    rows = [dict(train_length=8, length=n, ppl=value) for n, value in ppl.items()]
    assert evaluation.verdict(rows) == verdict


@pytest.mark.parametrize("command", ("eval out/alibi --lengths 16 32", "eval out/learned --lengths 16",
                                     "eval out --lengths 4 8", "eval nan --lengths 8 16"))
def test_does_not_hold(command, here):
    checkpoint = load("out/alibi")
    checkpoint["model"]["ln_f.weight"].fill_(math.nan)
    torch.save(checkpoint, "nan")
    assert "holds" not in works(command)


@pytest.mark.parametrize("into", ("pipe", "file"))
def test_csv_to_standard_output(into, here, monkeypatch):
    """The table goes where the CSV goes, and nothing that is there goes."""
    def child():
        os.dup2(target.fileno(), 1)
        sys.stdout = open(1, "w", closefd=False)
        evaluation.run(evaluation.main)
        sys.stdout.flush()
        return 0

    monkeypatch.setattr(sys, "argv", ["eval.py", *BASE["eval"].split(), "out/alibi", "--csv", "/dev/stdout"])
    source, target = map(open, os.pipe(), "rw") if into == "pipe" else (None, open("output", "w"))
    target.write("before\n")
    target.flush()
    assert ends(fork(child)) == 0
    target.close()
    text = source.read() if source else Path("output").read_text()
    assert text.startswith("before\npos,") and "\nalibi,8,8,,valid,150," in text
    assert text.index("\nalibi,") < text.index("\nperplexity per word")


def test_table_in_any_case(here):
    """Even where its file cannot be written."""
    Path("out/extrapolation.csv").unlink()
    Path("out/extrapolation.csv").mkdir()
    for command in ("train --pos none", "eval out/alibi --csv out/extrapolation.csv"):
        code, out, err = call(command)
        assert code == 2 and "perplexity per word" in out and "cannot write out/extrapolation.csv" in err


def test_each_checkpoint_once(here):
    assert len(re.findall("^alibi ", works("eval out out/alibi out/alibi/ckpt.pt"), re.M)) == 1


def test_csv_through_a_link(here):
    Path("link.csv").symlink_to("table.csv")
    works("eval out/alibi --csv link.csv")
    assert Path("link.csv").is_symlink() and Path("table.csv").is_file()


def test_figure(here):
    pytest.importorskip("matplotlib")
    works("eval out --lengths 8 16 --plot figure --csv t.csv")
    assert Path("figure").read_bytes().startswith(b"\x89PNG")


# ---- the README's numbers ----------------------------------------------------------------------------

PROJECT = Path(__file__).parent


def measured(file):
    """{(name, length): perplexities, one for each seed} of a CSV file in assets."""
    found = {}
    for row in read_csv(PROJECT / file):
        flags = {key: int(row[key]) for key in ("window", "logn", "random_positions")}
        found.setdefault((evaluation.name(row | flags), int(row["length"])), []).append(float(row["ppl"]))
    return found


def standard_error(x):
    return statistics.stdev(x) / math.sqrt(len(x))


README = (PROJECT / "README.md").read_text()


def split_table(table):
    """(head's cells, {a row's name: its other cells}) of a table in the README."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return head[1:], {name: cells for name, *cells in rows}


RESULTS = re.findall(r"\((assets/\w+\.csv)\)[^|]*?\n\n(\| encoding \| \d.*\n(?:\|.*\n)+)", README)
BY_POSITION = re.findall(
    r"\((assets/\w+_by_position\.csv)\)(?s:.*?)\n\n(\| loss having seen .*\n(?:\|.*\n)+)", README)


def test_readme_lists_every_encoding():
    listed = re.findall(r"^\| `(\w+)` \| (?:nothing|embeddings|queries|scores)", README, re.M)
    assert sorted(listed) == sorted({name for name, _ in measured("assets/bytes.csv")})
    assert set(listed) <= set(POSITIONS)


def test_every_table_of_the_readme_has_a_csv():
    assert len(RESULTS) == len(re.findall(r"\n\| encoding \| \d", README)) > 1
    assert len(BY_POSITION) == README.count("\n| loss having seen") > 0


@pytest.mark.parametrize("file, table", RESULTS)
def test_tables_of_the_readme(file, table):
    """Each cell is the mean in the CSV above; bold where it beats all others by two standard errors."""
    found, (head, rows) = measured(file), split_table(table)
    trained = int(read_csv(PROJECT / file)[0]["train_length"])
    lengths = [dict(train_length=trained, length=int(length)) for length in filter(None, head)]
    assert set(rows) == {name for name, _ in found}
    for name, cells in rows.items():
        ppl = [statistics.mean(found.get((name, row["length"]), [math.inf])) for row in lengths]
        assert cells[-1] == evaluation.verdict([row | {"ppl": x} for row, x in zip(lengths, ppl)]), name
        for length, cell in zip(filter(None, head), cells):
            seeds = found.get((name, int(length)))
            number, *std = re.findall(r"\d+\.\d+", cell) or ["-"]
            digits = len(number.partition(".")[2])
            assert number == (f"{statistics.mean(seeds):.{digits}f}" if seeds else "-"), (name, length)
            assert not std or float(std[0]) == round(statistics.stdev(seeds), len(std[0].partition(".")[2]))
            others = [x for key, x in found.items() if key[1] == int(length) and key[0] != name]
            best = others and seeds and min(map(len, [seeds, *others])) > 1 and all(
                statistics.mean(x) - statistics.mean(seeds)
                > 2 * math.hypot(standard_error(x), standard_error(seeds)) for x in others)
            assert cell.startswith("**") == bool(best), (name, length)


def test_ratios_of_the_readme():
    """Perplexity by that at the trained length, in the paper and here."""
    [table] = re.findall(r"\| encoding \| paper.*\n(?:\|.*\n)+", README)
    head, rows = split_table(table)
    assert list(rows) == ["sinusoidal", "rotary", "t5", "alibi"]
    for name, cells in rows.items():
        for column, cell in zip(head, cells):
            where, long, short = re.fullmatch(r"(paper|here) (\d+) / (\d+)", column).groups()
            ppl = measured({"paper": "assets/paper.csv", "here": "assets/bytes.csv"}[where])
            long, short = (statistics.mean(ppl[name, int(length)]) for length in (long, short))
            assert cell == f"{long / short:.2f}"


def test_quick_table_of_the_readme():
    found = measured("assets/quick.csv")
    [head, table] = re.findall(r"^    encoding +trained(.*)\n((?:    \w+ +64 .*\n)+)", README, re.M)[0]
    rows = [line.split() for line in table.splitlines()]
    assert [row[0] for row in rows] == ["sinusoidal", "rotary", "t5", "alibi"]
    for name, _, *cells, _ in (row[:8] for row in rows):
        assert cells == [f"{found[name, int(length)][0]:.2f}" for length in head.split()]


def test_quick_summary_of_the_readme():
    """Tokens/s, their ratio to the first, and the loss of what quick_log.csv ends with."""
    last = {row["pos"]: row for row in read_csv(PROJECT / "assets/quick_log.csv")}
    [table] = re.findall(r"^    encoding +parameters .*\n((?:    .*\n)+)", README, re.M)
    rows = [line.split() for line in table.splitlines()]
    first = float(last[rows[0][0]]["tokens_per_s"])
    assert [row[0] for row in rows] == ["sinusoidal", "rotary", "t5", "alibi"]
    for name, size, speed, ratio, loss, *_ in rows:
        found = float(last[name]["tokens_per_s"])
        assert [speed, ratio] == [f"{found:,.0f}", f"{found / first:.2f}"]
        assert loss == f"{float(last[name]['valid_loss']):.4f}" and last[name]["step"] == "1000"
        config = GPTConfig(pos=name, vocab_size=256, block_size=64, n_layer=3, n_head=4, n_embd=128)
        assert size == f"{sum(p.numel() for p in GPT(config).parameters()):,}"


def test_speeds_of_the_readme():
    speed = {(row["pos"], row["run"]): float(row["tokens_per_s"])
             for row in read_csv(PROJECT / "assets/speed.csv")}
    [table] = re.findall(r"\| ratio to none .*\n(?:\|.*\n)+", README)
    head, rows = split_table(table)
    assert sorted(rows) == sorted({pos for pos, _ in speed} - {"none"} | {"none, tokens/s"})
    assert head == ["median", "round 1", "round 2", "round 3"]
    none = [speed["none", run] for run in "123"]
    assert rows.pop("none, tokens/s") == [f"{x:,.0f}" for x in [statistics.median(none), *none]]
    for name, cells in rows.items():
        ratios = [speed[name, run] / speed["none", run] for run in "123"]
        assert cells == [f"{x:.2f}" for x in [statistics.median(ratios), *ratios]]


@pytest.mark.parametrize("file, table", BY_POSITION)
def test_losses_by_position_of_the_readme(file, table):
    loss = {}
    for row in read_csv(PROJECT / file):
        span = row["first"] if row["first"] == row["last"] else f"{row['first']} to {row['last']}"
        loss.setdefault((row["pos"], span), []).append(float(row["loss"]))
    head, rows = split_table(table)
    assert len(rows) * len(head) == len(loss)
    for name, cells in rows.items():
        assert cells == [f"{statistics.mean(loss[name, span]):.2f}" for span in head]


# ---- training ---------------------------------------------------------------------------------------


def test_train_from_the_command_line(here):
    out = works("train --out_dir new --pos alibi learned --tokenizer byte")
    assert max(map(len, out.splitlines())) <= 80
    assert "alibi step 6: train loss" in out and re.search("^learned.*fails from 16", out, re.M)
    rows, size = read_csv("new/extrapolation.csv"), Path("corpus/valid.txt").stat().st_size
    assert list(rows[0])[:13] == ["pos", "train_length", "length", "stride", "split", "tokens", "loss", "ppl",
                                  "extend", "window", "logn", "random_positions", "checkpoint"]
    lengths = [("alibi", str(8 * 2 ** n)) for n in range(5)] + [("learned", "8")]
    assert [(r["pos"], r["length"]) for r in rows] == lengths
    assert {r["tokens"] for r in rows} == {str(size - 1)}
    assert all(float(r["ppl"]) == pytest.approx(math.exp(float(r["loss"]))) for r in rows)
    log = read_csv("new/alibi/log.csv")
    assert list(log[0]) == ["step", "train_loss", "valid_loss", "lr", "tokens_per_s"]
    assert [r["step"] for r in log] == ["3", "6"]
    assert float(rows[0]["loss"]) == pytest.approx(float(log[1]["valid_loss"]))


def test_bfloat16(here):
    """One step of every encoding: finite, and its own parameters move."""
    pos = " ".join(POSITIONS)
    flags = "--dtype bfloat16 --block_size 132 --max_iters 1 --warmup_iters 0 --lengths 132"
    works(f"train --pos {pos} --out_dir new {flags}")
    for pos in POSITIONS:
        [row], checkpoint = read_csv(f"new/{pos}/log.csv"), load(f"new/{pos}")
        torch.manual_seed(checkpoint["args"]["seed"])
        for name, p in GPT(GPTConfig(**checkpoint["config"])).named_parameters():
            assert not torch.equal(p, checkpoint["model"][name]), (pos, name)
        assert math.isfinite(float(row["train_loss"])) and math.isfinite(float(row["valid_loss"]))


@pytest.mark.parametrize("flags, number, interval", [
    ("alibi --dropout 0.2 --grad_accum 2", signal.SIGTERM, 3), ("xpos", signal.SIGTERM, 7),
    ("fire --random_positions 20 --logn", signal.SIGINT, 1),
    ("t5 --tokenizer byte --window 3 --attn_dropout 0.1", signal.SIGINT, 3),
    ("hwfa --act_dropout 0.5", signal.SIGINT, 7), ("learned --grad_clip 0", signal.SIGTERM, 1)])
def test_stopped_and_resumed(flags, number, interval, here, monkeypatch, capfd):
    """A signal in steps 2 and 5: that is told at once, the step ends, --resume goes on, bit for bit."""
    pos, command = flags.split()[0], f"train --n_layer 2 --eval_interval {interval} --pos {flags} --out_dir"
    works(f"{command} whole")
    get_lr, stops = train.get_lr, [1, 4]

    def interrupt(step, args):
        if stops and step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), number)
            told = sys.stderr.getvalue() + capfd.readouterr().err
            assert "finishing this step; once more stops at once" in told
        return get_lr(step, args)

    monkeypatch.setattr(train, "get_lr", interrupt)
    for step in (2, 5):
        code, out, err = call(f"{command} parts --resume")
        assert code == 128 + number and err.strip().count("\n") == 0 and out.splitlines()[-1] == (
            f"stopped after step {step}: --resume goes on from parts/{pos}/ckpt.pt")
        assert load(f"parts/{pos}")["step"] == step
        assert ("starts anew" in out) == (step == 2)
    works(f"{command} parts --resume --eval_interval 1")
    assert results(f"parts/{pos}") == results(f"whole/{pos}")


def test_saves_before_it_prints(here, monkeypatch):
    """As where `| head -1` has closed standard output."""
    monkeypatch.setattr(train.tqdm, "write", mock.Mock(side_effect=BrokenPipeError))
    assert call("train --out_dir new").code == 2 and load("new/alibi")["step"] == 3
    assert [row["step"] for row in read_csv("new/alibi/log.csv")] == ["3"]


def test_stopped_without_standard_error(here, monkeypatch):
    """As where Ctrl-C has ended `| tee` as well: the step is finished and saved all the same."""
    get_lr = train.get_lr

    def interrupt(step, args):
        if step == 1:
            os.close(2)
            os.kill(os.getpid(), signal.SIGINT)
        return get_lr(step, args)

    monkeypatch.setattr(train, "get_lr", interrupt)
    assert ends(fork(lambda: call("train --out_dir new").code)) == 130 and load("new/alibi")["step"] == 2


def test_resume_knows_the_text(here):
    """By its content: a folder may move or be named otherwise, but not change."""
    command = "train --tokenizer byte --out_dir new --max_iters 7"
    works(f"{command} --max_iters 6")
    shutil.copytree("corpus", "moved")
    for name in ("./corpus", "moved", here / "corpus"):
        shutil.copytree("new", "again")
        works(f"{command} --out_dir again --resume --data {name}")
        shutil.rmtree("again")
    train_text = Path("corpus/train.txt")
    train_text.write_text(train_text.read_text().replace("w1", "w2", 1))
    refused(f"{command} --resume", "--data corpus is not the text of new/alibi/ckpt.pt")


def test_more_steps(here):
    """A longer cosine is not silent: from step 6 of 6 to step 6 of 9."""
    out = works("train --resume --max_iters 9")
    assert "alibi: --max_iters was 6, the learning rate jumps to 4.50e-03\n" in out
    assert "jumps" not in works("train --resume --max_iters 9")


def test_summary_is_of_the_last_step(here, monkeypatch):
    """Stopped between two evaluations and ended there: no older step's loss stands for the last one's."""
    get_batch = train.get_batch

    def interrupt(tokens, args, first, rows):
        if first == 4 * args.batch_size:
            os.kill(os.getpid(), signal.SIGTERM)
        return get_batch(tokens, args, first, rows)

    with monkeypatch.context() as patch:
        patch.setattr(train, "get_batch", interrupt)
        assert call("train --out_dir new").code == 143
    assert load("new/alibi")["step"] == 5 and [row[0] for row in load("new/alibi")["log"]] == [3]
    assert re.search(r"^alibi .* nan  ", works("train --out_dir new --resume --max_iters 5"), re.M)
    works("train --out_dir new --resume")


def test_log_is_that_of_the_checkpoint(here):
    """Also where a run was killed between the writing of the two."""
    log = Path("out/alibi/log.csv")
    before = log.read_text()
    log.write_text("step\n")
    works("train --resume")
    assert log.read_text() == before


def test_another_encoding_into_the_same_folder(here):
    def found():
        return [(row["pos"], row["length"]) for row in read_csv("out/extrapolation.csv")]
    before = found()
    works("train --pos none --lengths 8 16")
    assert found() == before + [("none", "8"), ("none", "16")]
    works("train --pos none --lengths 8 16 --overwrite")
    assert found() == before + [("none", "8"), ("none", "16")]


def test_accumulated_gradients_are_one_big_batch(here):
    logs = []
    for batch, accum in ((8, 1), (2, 4)):
        sizes = f"--batch_size {batch} --grad_accum {accum}"
        works(f"train --pos rotary --out_dir {batch} {sizes} --eval_interval 1")
        log = read_csv(f"{batch}/rotary/log.csv")
        logs += [[float(row[key]) for row in log for key in ("train_loss", "valid_loss")]]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_batches():
    """Every block once an epoch, each epoch in another order, the same for a seed; targets one on."""
    args = argparse.Namespace(block_size=4, seed=3)
    stream = torch.arange(43)
    batches = [train.get_batch(stream, args, n, 5) for n in range(0, 20, 5)]
    starts = [x[:, 0].tolist() for x, y in batches]
    assert all(torch.equal(x + 1, y) and (x[:, 1:] == y[:, :-1]).all() for x, y in batches)
    first, second = starts[0] + starts[1], starts[2] + starts[3]
    assert sorted(first) == sorted(second) == [4 * n for n in range(10)] and first != second
    assert torch.equal(train.get_batch(stream, args, 7, 2)[0], torch.cat([x for x, y in batches])[7:9])


def test_learning_rate():
    args = argparse.Namespace(warmup_iters=10, max_iters=110, learning_rate=2.0)
    lrs = [train.get_lr(step, args) for step in range(110)]
    assert lrs[0] == pytest.approx(0.2) and max(lrs) == lrs[10] == 2.0 and lrs[60] == pytest.approx(1.1)
    assert lrs[109] == pytest.approx(0.2, rel=0.01)


def two_processes(command):
    """The command in two processes, told of each other as by torchrun: both outputs, both first losses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def body(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        importlib.reload(train)
        forward, losses = GPT.forward, []
        GPT.forward = lambda *args: losses.append(forward(*args)) or losses[-1]
        if "--compile" in command:
            force_the_gpus_path(pytest.MonkeyPatch())
        code, out, _ = call(command)
        Path(f"output{rank}").write_text(out)
        Path(f"loss{rank}").write_text(str(losses[0].tolist()))
        return code

    processes = [fork(body, rank) for rank in (0, 1)]
    assert [ends(process) for process in processes] == [0, 0]
    return [Path(name).read_text() for name in ("output0", "output1", "loss0", "loss1")]


@pytest.mark.parametrize("flags", ("--grad_accum 2", "--pos t5 --lengths 8 --compile"),
                         ids=("plain", "compiled"))
def test_two_processes_are_one(flags, here):
    """Same losses as one process with the same global batch, and one voice; compiled ones as on a GPU."""
    works(f"train {flags} --no-compile --eval_interval 1 --out_dir one")
    voice, silence, *_ = two_processes(f"train {flags} --eval_interval 1 --out_dir two")
    assert voice.count("step 3:") == 1 and silence == ""
    one, two = ([[float(row[key]) for key in ("step", "train_loss", "valid_loss", "lr")]
                 for row in read_csv(next(Path(folder).glob("*/log.csv")))] for folder in ("one", "two"))
    assert np.array(one) == pytest.approx(np.array(two), rel=1e-4)


@pytest.mark.parametrize("dropout", (0, 0.5))
def test_two_processes_draw_apart(dropout, here):
    """On a text that is the same everywhere only dropout can tell two processes' losses apart."""
    write_corpus("same", "a " * 404, "a " * 40, "a " * 40)
    flags = f"--data same --max_iters 1 --lengths 8 --dropout {dropout}"
    *_, one, two = two_processes(f"train --out_dir new {flags}")
    assert (one == two) == (dropout == 0)


def test_compiler_fails(here, monkeypatch):
    """As it does without a C++ compiler: one line that names --no-compile."""
    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler found")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    refused("train --overwrite --compile", "--no-compile does without")
    torch._dynamo.reset()


@pytest.mark.parametrize("program, flags", re.findall(r"(train|eval)\.py (.*?)(?: +#.*)?$",
                                                      train.__doc__ + evaluation.__doc__, re.M))
def test_commands_of_the_docstrings(program, flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, *flags.split()])
    assert {"train": train, "eval": evaluation}[program].get_args()


@pytest.mark.parametrize("program", ("train", "eval"))
def test_help(program, monkeypatch):
    """In 80 columns, each option with a text, each encoding with its formula."""
    monkeypatch.setenv("COLUMNS", "80")
    options, add = [], argparse.ArgumentParser.add_argument

    def noted(self, *names, **more):
        options.append(more.get("help"))
        return add(self, *names, **more)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", noted)
    out = works(f"{program} --help")
    assert max(map(len, out.splitlines())) <= 80
    assert len(options) > 12 and all(options)
    assert program == "eval" or all(re.search(rf"^  {pos} +\S", out, re.M) for pos in POSITIONS)


def test_the_papers_finding(tmp_path, monkeypatch):
    """Trained at 32 bytes of Python's library, tested at 256: ALiBi holds, sinusoidal and rotary do not."""
    monkeypatch.chdir(tmp_path)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in library)[:2 ** 20 + 12000]
    write_corpus("library", text[:2 ** 20], text[2 ** 20:], b"none")
    works("train --data library --tokenizer byte --block_size 32 --batch_size 16 --n_head 4 --n_embd 64 "
          "--max_iters 120 --warmup_iters 40 --learning_rate 4e-3 --eval_interval 120 "
          "--lengths 32 256 --pos sinusoidal rotary alibi")
    ppl = {(row["pos"], row["length"]): float(row["ppl"]) for row in read_csv("out/extrapolation.csv")}
    ratio = {pos: ppl[pos, "256"] / ppl[pos, "32"] for pos in ("sinusoidal", "rotary", "alibi")}
    assert ratio["alibi"] < 1.04 < min(ratio["sinusoidal"], ratio["rotary"]), ratio


# ---- accidents: one line and exit code 2, nothing lost ----------------------------------------------

CASES = []


def case(command, phrase, make=None, name=""):
    """A mistake, a phrase of the line about it, and what prepares the current folder for it."""
    CASES.append(pytest.param(command, phrase, make, id=name or command))


def damage(change, path="out/alibi/ckpt.pt"):
    """Loads a checkpoint, lets `change` alter the dict or give another object, saves it."""
    def make():
        checkpoint = torch.load(path, weights_only=True)
        torch.save(change(checkpoint) or checkpoint, path)
    return make


def put(path, content):
    return lambda: Path(path).write_bytes(content)


def put_folder(path):
    return lambda: (Path(path).unlink(), Path(path).mkdir())


def flip_a_byte(path=Path("out/alibi/ckpt.pt")):
    """One of the largest tensor's."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[info.header_offset + 500] ^= 64
    path.write_bytes(content)


def change_head(change):
    return lambda c: c["model"].update({"wte.head": change(c["model"]["wte.head"])})


def compress():
    """As in a zip bomb."""
    path = Path("out/alibi/ckpt.pt")
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(*member)


class Evil:
    def __reduce__(self):
        return open, ("marker", "w")


def values(program, phrase, words):
    for flag, value in (word.split("=") for word in words.split()):
        case(f"{program} --{flag} {value}", f"argument --{flag}: " + phrase.format(value))


# flags: type and range
values("train", "invalid int value: '{}'", "n_layer=x n_layer=1.5")
values("train", "invalid float value: 'fast'", "learning_rate=fast")
values("train", "expected one argument", "n_layer=")
values("train", "{} is not from 1 to 1000000000", "n_layer=0 n_layer=-1 lengths=0 grad_accum=0 "
       "max_iters=0 eval_interval=0 block_size=0")
values("train", "{} is not from 1 to 1000000\n", "batch_size=0 batch_size=1000000000")
values("train", "{} is not from 0 to 1000000\n", "random_positions=-8 random_positions=1000000000")
values("train", "{} is not from 0 to ", "dropout=2 dropout=1 attn_dropout=-0.1 learning_rate=nan "
       "learning_rate=inf learning_rate=-1 seed=-1 seed=9999999999 window=-1 warmup_iters=-1 grad_clip=nan "
       "weight_decay=-1")
values("train", "invalid choice: '{}' (choose from ",
       "device=tpu dtype=float16 tokenizer=bpe pos=alibo preset=quik")
values("eval out/alibi", "{} is not from ", "lengths=0 stride=0 window=-1")
values("eval out/alibi", "invalid choice: '{}' (choose from ", "split=train extend=interpol")
values("eval out/alibi", "invalid int value: '{}'", "batch_tokens=x")
case("train --lengths 8 -4", "-4 is not from 1")
case("train --lengths 8 x", "invalid int value: 'x'")

# flags: names, and what does not go together
case("train --n_layers 1", "unrecognized arguments: --n_layers")
case("eval out/alibi --pos alibi", "unrecognized arguments: --pos")
case("train --data wikitext", "no corpus 'wikitext': it is one of wikitext-103, wikitext-2, stdlib, or a")
case("eval out/alibi --extend ntk", "--extend ntk is for rotary")
case("eval out/rotary --extend ntk hierarchical", "--extend hierarchical is for learned")
case("eval out/alibi --extend interpolate", "without random positions",
     lambda: works("train --overwrite --random_positions 20"))
case("train --n_embd 15", "--n_embd 15 is not a multiple of --n_head 2")
for pos in ("rotary", "xpos", "hwfa"):
    case(f"train --pos {pos} --n_embd 18", f"--pos {pos}: --n_embd 18 / --n_head 2 is not even")
case("train --out_dir new --n_embd 18 --pos none rotary", "--pos rotary: ")
case("train --random_positions 7", "--random_positions 7 < --block_size 8")
case("train --resume --overwrite", "not allowed with argument")
case("train --device cuda", "--device cuda: torch finds none here; name")
case("eval out/alibi --device mps", "--device mps: torch finds none here; name")
case("eval out/alibi --lengths 16 8 --stride 9", "--stride 9 would skip targets at length 8")
case("eval out/alibi bytes/alibi", "words and bytes do not compare",
     lambda: works("train --tokenizer byte --out_dir bytes"))

# the corpus
files, train_text = "must hold wiki.{train,valid,test}.tokens or {train,valid,test}.txt", "corpus/train.txt"
case("train --data empty", files, lambda: Path("empty").mkdir())
case("train", files, lambda: Path("corpus/test.txt").unlink(), "corpus without test")
case("train --data corpus/train.txt", "no corpus 'corpus/train.txt'")
case("train", files, put_folder(train_text), "a folder for a file")
for split in data.SPLITS:
    case("train", f"the {split} split of corpus is empty", put(f"corpus/{split}.txt", b""), f"empty {split}")
case("train --tokenizer byte", "the test split of corpus is empty", put("corpus/test.txt", b""))
case("train", "corpus/valid.txt is not UTF-8 (invalid start byte): try --tokenizer byte",
     put("corpus/valid.txt", b"line 1\n\xff\n"), "not UTF-8")
case("train", "train.txt is not UTF-8", put(train_text, b"a b\n" * (3 << 18) + b"\xe4"), "not UTF-8 late")
case("train", "is not UTF-8 (unexpected end of data)", put(train_text, "aä".encode()[:-1]), "cut UTF-8")
case("train", "train has 4 targets", put(train_text, b"a b c d\n"), "train shorter than a block")
case("train", "length 8 needs more than the 6 tokens", put("corpus/valid.txt", b"a b c d e\n"), "short valid")
case("train --lengths 8 151", "length 151 needs more than the 151 tokens")
case("eval out/alibi --lengths 8 151", "length 151 needs more than the 151 tokens")
case("eval out/alibi", "the 0 tokens", put("corpus/valid.txt", b""), "eval of an empty text")
case("train --data wikitext-2", "wikitext-2", put("store/wikitext-2", b"x"))
case("train --data_dir corpus/train.txt", "cannot write corpus/train.txt/cache")

# checkpoints
for kind, make in {
        "empty": put("out/alibi/ckpt.pt", b""), "text": put("out/alibi/ckpt.pt", b"hello\n"),
        "cut": lambda: os.truncate("out/alibi/ckpt.pt", 20000), "flipped byte": flip_a_byte,
        "list": damage(lambda c: [1, 2]), "code": damage(lambda c: Evil()),
        **{f"no {key}": damage(lambda c, key=key: c.pop(key) and None)
           for key in ("args", "model", "config", "words", "digest", "step", "log", "optimizer")},
        "a weight less": damage(lambda c: c["model"].pop("ln_f.weight") is None),
        "a weight more": damage(lambda c: c["model"].update(more=torch.ones(1))),
        "a field more": damage(lambda c: c["config"].update(more=1)),
        "another width": damage(lambda c: c["config"].update(n_embd=32)),
        "seed of another type": damage(lambda c: c["args"].update(seed=torch.ones(2))),
        "a vast log": damage(lambda c: c.update(log=[torch.zeros(1).expand(5, 10 ** 8)])),
        "a log of text": damage(lambda c: c.update(log=["abcde"])),
        "one number for a weight": damage(change_head(lambda p: torch.ones(1).expand(p.shape))),
        "sparse weight": damage(change_head(torch.Tensor.to_sparse)),
        "half a weight": damage(change_head(torch.Tensor.half)),
        "compressed": compress, "word twice": damage(lambda c: c["words"].__setitem__(0, c["words"][1])),
        "layers without weights": damage(lambda c: c["config"].update(n_layer=9) or c["model"].update(
            {f"blocks.{n}.ln_1.weight": torch.ones(16) for n in range(9)})),
        "one number for a moment": damage(lambda c: c["optimizer"][0].update(
            exp_avg=torch.ones(1).expand(c["optimizer"][0]["exp_avg"].shape))),
        "unknown encoding": damage(lambda c: c["config"].update(pos="x")),
        "huge vocabulary": damage(lambda c: c["config"].update(vocab_size=10 ** 9)),
        "many layers": damage(lambda c: c["config"].update(n_layer=10 ** 6)),
        "more words": damage(lambda c: c["words"].append("one more")),
        "words are numbers": damage(lambda c: c.update(words=list(range(len(c["words"]))))),
        "no unknown word": damage(lambda c: c["words"].remove("<unk>") or c["words"].append("x")),
        "a word less": damage(lambda c: c["words"].remove("<unk>")),
        "step is text": damage(lambda c: c.update(step="6")),
        "log is text": damage(lambda c: c.update(log="6")),
        "optimizer is empty": damage(lambda c: c["optimizer"].clear()),
        "optimizer of another shape": damage(
            lambda c: [state.update(exp_avg=torch.ones(3)) for state in c["optimizer"].values()] and None),
        "empty args": damage(lambda c: c["args"].clear())}.items():
    case("eval out/alibi", "out/alibi/ckpt.pt is no checkpoint of train.py", make, f"eval: {kind}")
    if kind.startswith(("no ", "step", "log", "optimizer", "one number", "flipped")):
        case("train --resume", "out/alibi/ckpt.pt is no checkpoint of train.py", make, f"resume: {kind}")
case("eval out/alibi", "no ckpt.pt in out/alibi", Path("out/alibi/ckpt.pt").unlink, "no checkpoint")
case("eval out/alibi", "ckpt.pt", put_folder("out/alibi/ckpt.pt"), "checkpoint is a folder")
case("train --resume", "--tokenizer word, but out/alibi/ckpt.pt has 7",
     damage(lambda c: c["args"].update(tokenizer=7)), "tokenizer is 7")
case("train --resume", "--seed 1337, but", damage(lambda c: c["args"].pop("seed") and None), "a flag less")
case("eval out/alibi", "choose the text for out/alibi/ckpt.pt with --data", lambda: os.rename("corpus", "x"))
case("eval out/alibi more", "no checkpoint of train.py", put("more", b"x"))

# runs that are there already
case("train", "out/alibi/ckpt.pt is there already: --resume goes on from it, --overwrite starts anew")
case("train --pos none rotary", "out/rotary/ckpt.pt is there already")
case("train --resume --max_iters 5", "--max_iters 5 is less than the 6 steps of")
for flag in ("n_embd 32", "tokenizer byte", "seed 7", "learning_rate 0.1", "window 4", "grad_accum 2"):
    case(f"train --resume --{flag}", f"--{flag}, but out/alibi/ckpt.pt")
case("train --resume --pos none", "--pos none, but out/none/ckpt.pt has alibi",
     lambda: shutil.copytree("out/alibi", "out/none"))
case("train --resume --data other", "--data other is not the text of")
case("train --resume", "--data corpus is not the text of", put(train_text, b"a b\n" * 99), "changed text")

# what cannot be written
case("train --out_dir corpus/train.txt", "cannot write corpus/train.txt/alibi/")
case("train --out_dir corpus/train.txt --max_iters 99999 --eval_interval 99999", "cannot write")    # at once
case("eval out/alibi --csv corpus/train.txt/table.csv", "cannot write corpus/train.txt/table.csv")
case("eval out/alibi --csv corpus", "cannot write corpus")
case("eval out/alibi --plot corpus/train.txt/figure.png", "cannot write corpus/train.txt/figure")
for file in ("figure.csv", "figure.txt", "corpus/valid.txt", "out/alibi/ckpt.pt"):
    case(f"eval out/alibi --plot {file}", f"--plot {file}: name a .png, .jpg, .svg or .pdf")
case("eval --csv out/alibi/ckpt.pt out/rotary", "ckpt.pt is there, a checkpoint or a text: name a .csv")


@pytest.mark.parametrize("command, phrase, make", CASES)
def test_mistake(command, phrase, make, here, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    if make:
        make()
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still at it"))
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        refused(command, phrase)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
    assert not Path("marker").exists(), "code from a checkpoint ran"


def test_plot_without_matplotlib(here, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("eval out/alibi --plot figure.png", "--plot needs matplotlib: pip install matplotlib")


def test_nothing_is_made_for_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("train --data wikitext")
    assert (code, out, err.count("\n")) == (2, "", 1) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ("--overwrite", "--out_dir new", "--out_dir new --eval_interval 1"))
def test_diverging(flags, here):
    """No checkpoint and no log of it; what was there before stays."""
    refused(f"train {flags} --learning_rate 1e9", "lower --learning_rate")
    assert load("out/alibi")["step"] == 6
    logs = [path.read_text() for path in Path().rglob("log.csv")]
    assert len(logs) >= 3 and not any("nan" in log for log in logs)


def test_the_loss_itself_is_looked_at(here, monkeypatch):
    """An infinite loss can have finite gradients."""
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args: forward(*args) + math.inf)
    refused("train --overwrite", "the loss is inf")


@pytest.mark.parametrize("command, when, phrase", (
    ("train --overwrite", lambda model, T: model.training, "2 GiB. GPU 0 has ...: lower --batch_size"),
    ("train --overwrite", lambda model, T: not model.training and T == 8, "memory"),
    ("train --out_dir new", lambda model, T: T == 32, "memory"),
    ("eval out/alibi", lambda model, T: True, "--batch_tokens")),
    ids=("training", "validation", "closing table", "eval"))
def test_out_of_memory(command, when, phrase, here, monkeypatch):
    def forward(model, idx, targets):
        if when(model, idx.shape[1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")
        return original(model, idx, targets)
    original = GPT.forward
    monkeypatch.setattr(GPT, "forward", forward)
    refused(command, phrase)


@pytest.mark.parametrize("room", (0, 100, 9000, 40000))
def test_full_disk(room, here):
    """Files may have `room` bytes at most: in a child, for a limit that nothing else feels."""
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        code, _, err = call("train --resume --max_iters 8")
        return code if err.count("\n") == 1 and "cannot write out/alibi" in err else 99
    before = contents("out/alibi")
    assert len(before[Path("out/alibi/ckpt.pt")]) > room
    assert ends(fork(child)) == 2
    after = contents("out/alibi")
    assert before.keys() == after.keys()
    assert all(before[path] == after[path] for path in before if path.suffix == ".pt")


def test_kill(here):
    """However often a run is killed, and wherever: after --resume it ends like one that never was."""
    flags = "train --dropout 0.1 --grad_accum 2 --max_iters 40 --eval_interval 1 --lengths 8 --data_dir"
    chance, kills, clock = random.Random(5), 0, time.perf_counter()
    assert ends(fork(lambda: call(f"{flags} whole --out_dir whole").code)) == 0
    took, wanted = time.perf_counter() - clock, results("whole/alibi")
    while True:
        process = fork(lambda: call(f"{flags} part --out_dir part --resume").code)
        process.join(chance.uniform(0, took) if kills < KILLS else None)
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert results("part/alibi") == wanted
            shutil.rmtree("part")
            if kills >= KILLS:
                break
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            for path in Path("part").glob("alibi/*.pt"):
                assert evaluation.load_checkpoint(path)["step"] <= 40


def test_second_signal_stops_at_once(here, monkeypatch):
    def twice(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train, "get_batch", twice)
    assert ends(fork(lambda: call("train --out_dir new").code)) == -signal.SIGTERM
    assert not Path("new/alibi/ckpt.pt").exists()


def test_stopped_before_the_first_evaluation(here, monkeypatch):
    """It resumes, also where no step is left to do."""
    get_batch = train.get_batch
    with monkeypatch.context() as patch:
        patch.setattr(train, "get_batch", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), get_batch(*a))[1])
        assert call("train --out_dir new").code == 143
    assert call("train --out_dir new --resume --max_iters 1").code in (0, 2)
    works("train --out_dir new --resume --max_iters 2")


def test_name_that_is_not_utf8(here):
    """Twice: the table is read and written again."""
    folder = os.fsdecode(b"ou\xff")
    for pos in ("alibi", "none"):
        works(f"train --out_dir {folder} --pos {pos}")
    table = Path(folder, "extrapolation.csv").read_bytes()
    assert table.count(b"ou\xff/alibi/ckpt.pt") == table.count(b"ou\xff/none/ckpt.pt") == 5


def test_folder_called_nan(here):
    works("train --out_dir finance")
    assert "finance/alibi/ckpt.pt" in str(read_csv("finance/extrapolation.csv"))


def draw(chance, pos):
    """Flags of a small run: all that a user may ask for."""
    heads, block = chance.choice((1, 2, 3, 5)), chance.choice((1, 2, 3, 7, 8, 13))
    even = 2 if pos in ("rotary", "xpos", "hwfa") else 1
    return dict(
        pos=pos, block_size=block, n_head=heads, n_embd=heads * even * chance.randint(1, 6),
        n_layer=chance.randint(1, 3), batch_size=chance.randint(1, 5), grad_accum=chance.randint(1, 3),
        max_iters=chance.randint(1, 5), eval_interval=chance.randint(1, 4), warmup_iters=chance.randint(0, 9),
        window=chance.choice((0, 0, 1, 2, 5, 99)), dropout=chance.choice((0, 0.5)),
        random_positions=chance.choice((0, 0, block, 2 * block + 1)), attn_dropout=chance.choice((0, 0.5)),
        act_dropout=chance.choice((0, 0.5)), grad_clip=chance.choice((0, 1)), seed=chance.randrange(2 ** 31),
        tokenizer=chance.choice(("byte", "word")))


def any_text(chance, size, tokenizer):
    if tokenizer == "byte":
        return chance.randbytes(size)
    # any character but a surrogate; new lines, so that there are as many words at least
    ranges = (10, 32, chance.randrange(0xd800), chance.randrange(0xe000, 0x110000))
    return "".join(chr(chance.choice(ranges)) for _ in range(size)).encode() + b"\n" * size


def fuzz(seed, pos):
    """A run with random settings is made twice, resumed and tested: nothing fails, both end the same."""
    chance, folder = random.Random(seed), f"fuzz{seed}"
    flags = draw(chance, pos)
    sizes = [chance.randint(flags["block_size"] + 1, 300) for _ in range(3)]
    write_corpus(folder, *(any_text(chance, size, flags["tokenizer"]) for size in sizes))
    command = " ".join(f"--{key} {value}" for key, value in flags.items()) + chance.choice(("", " --logn"))
    command = f"train {command} --data {folder} --data_dir {folder} --out_dir"
    more, split = flags["max_iters"] + chance.randint(0, 3), chance.choice(("valid", "test"))
    targets = len(getattr(data.load(folder, flags["tokenizer"], folder), split)) - 1
    lengths = [chance.randint(1, targets) for _ in range(3)]
    test = f"--split {split} --batch_tokens {chance.randint(1, 500)} --lengths {' '.join(map(str, lengths))}"
    test += chance.choice(("", f" --stride {chance.randint(1, min(lengths))}"))
    extensions = [] if flags["random_positions"] else [n for n, (_, fit) in EXTENSIONS.items() if pos in fit]
    test += " --extend " * bool(extensions) + " ".join(extensions)
    outcomes = []
    for out in (f"{folder}/a", f"{folder}/b"):
        works(f"{command} {out}")
        works(f"{command} {out} --resume --max_iters {more}")
        works(f"eval {out}/{pos} --data_dir {folder} --csv {out}.csv {test}")
        rows = [row for row in read_csv(f"{out}.csv") if row.pop("checkpoint")]
        outcomes.append((*results(f"{out}/{pos}"), rows))
    assert outcomes[0] == outcomes[1]
    weights, log, rows = outcomes[0]
    assert all(np.isfinite(np.frombuffer(p, np.float32)).all() for p in weights.values())
    assert np.isfinite([[float(x) for x in line[1:]] for line in log[1:]]).all()
    assert all(math.isfinite(float(row[key])) for row in rows for key in ("loss", "ppl"))
    assert all(int(row["tokens"]) == targets for row in rows)
    assert pos in LIMITED or len(rows) == len(set(lengths)) * (1 + len(extensions))
    shutil.rmtree(folder)


@pytest.mark.parametrize("seed, pos", list(enumerate(POSITIONS)))
def test_fuzz(seed, pos, here):
    end = time.perf_counter() + FUZZ_SECONDS / len(POSITIONS)
    fuzz(seed, pos)
    while time.perf_counter() < end:
        seed += len(POSITIONS)
        fuzz(seed, pos)
