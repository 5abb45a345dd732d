"""Quick tests of all four files, each against something independent: a formula in plain loops, a published number,
brute force, an uninterrupted run.

    KILLS=20 FUZZ_SECONDS=600 python -m pytest -q      # longer than the quick suite
"""
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import data
import eval as evaluation  # not the builtin
import model as model_file
import train
from model import EXTENSIONS, GPT, POSITIONS, GPTConfig, ModelError, Scores, Vocabulary, attend, prepare

HERE = Path(__file__).parent
torch.set_num_threads(1)        # some tests fork
TINY = dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16)


def tiny_model(pos, seed=0, **changes):
    """A tiny model whose position parameters, some of which start at zero, are random too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | {"pos": pos} | changes)).eval()
    for p in model.pos.parameters():
        p.data.uniform_(0.1, 1.0)
    return model


def tokens(n, vocab_size=11, seed=0):
    return torch.randint(vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


# ---- every encoding against its formula: scalars, double loops, float64


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
    return two.bias[h].item() + sum(two.weight[h, n].item() * max(0, (one.weight[n, 0] * x + one.bias[n]).item())
                                    for n in range(32))


# name: score(pos, q, k, head from 0, i, j), or (that, what coordinate n of the embedding at i gets)
NAIVE = {
    "none": lambda pos, q, k, h, i, j: dot(q, k),
    "learned": (lambda pos, q, k, h, i, j: dot(q, k), lambda pos, i, n, C: pos.table[i, n].item()),
    "sinusoidal": (lambda pos, q, k, h, i, j: dot(q, k),
                   lambda pos, i, n, C: (math.cos if n % 2 else math.sin)(i / 10000 ** (n // 2 * 2 / C))),
    "rotary": lambda pos, q, k, h, i, j: dot(turned(q, i), turned(k, j)),
    "t5": lambda pos, q, k, h, i, j: dot(q, k) + pos.table[t5_bucket(i - j), h].item(),
    "alibi": lambda pos, q, k, h, i, j: dot(q, k) - (i - j) * 2 ** (-8 * (h + 1) / len(pos.slopes)),
    "kerple": lambda pos, q, k, h, i, j: dot(q, k) - pos.p[h].item() * math.log(1 + pos.a[h].item() * (i - j)),
    "sandwich": lambda pos, q, k, h, i, j: dot(q, k) + pos.config.n_head / (8 * (h + 1)) * (
        sum(math.cos((i - j) / 10000 ** (2 * n / 128)) for n in range(1, 65)) - 64),
    "xpos": lambda pos, q, k, h, i, j: dot(turned(q, i, 1), turned(k, j, -1)),
    "fire": lambda pos, q, k, h, i, j: dot(q, k) + fire(pos, h, i, j),
    "hwfa": lambda pos, q, k, h, i, j: dot(turned(q, i), turned(k, j)),      # but for its last layer: see below
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
    model = tiny_model(pos, window=window, logn=logn, block_size=T if pos == "learned" else 16)
    for weight in model.blocks.parameters():
        weight.data *= 8        # so that attention matters
    ids = tokens(T + 1)
    loss = model(ids[:, :-1], ids[:, 1:])[0]
    naive = naive_loss(model, ids[0, :-1].tolist(), ids[0, 1:].tolist(), window, logn)
    torch.testing.assert_close(loss.double(), torch.tensor(naive), rtol=2e-4, atol=2e-4)


def test_published_slopes_and_buckets():
    assert tiny_model("alibi", n_head=8).pos.slopes.tolist() == [2.0 ** -n for n in range(1, 9)]
    twelve = [2.0 ** -n for n in range(1, 9)] + [2.0 ** -x for x in (0.5, 1.5, 2.5, 3.5)]
    torch.testing.assert_close(tiny_model("alibi", n_head=12, n_embd=24).pos.slopes, torch.tensor(twelve))
    t5 = tiny_model("t5")
    t5.pos.table.data = torch.arange(32.0)[:, None].repeat(1, 2)
    found = t5.pos.bias(torch.tensor(0), torch.arange(300), torch.zeros(300, dtype=torch.long)).tolist()
    assert found == [t5_bucket(n) for n in range(300)]
    assert [found[n] for n in (0, 15, 16, 17, 20, 32, 64, 127, 128, 299)] == [0, 15, 16, 16, 17, 21, 26, 31, 31, 31]


def test_hwfa_window_of_the_blog():
    """Derived in the notes of kexue.fm/archives/9603: N 512, alpha 3/4: 12 layers 35, 16 layers 26."""
    for layers, window in ((12, 35), (16, 26)):
        with torch.device("meta"):
            assert GPT(GPTConfig(pos="hwfa", block_size=512, n_layer=layers)).pos.layer(0)[1] == window


@pytest.mark.parametrize("window, logn", [(0, False), (5, True)])
@pytest.mark.parametrize("pos", POSITIONS)
def test_causal(pos, window, logn):
    model, ids = tiny_model(pos, window=window, logn=logn), tokens(17)
    changed = ids.clone()
    changed[0, 10:] = (ids[0, 10:] + 1) % 11
    one, two = (model.trunk(x[:, :16])[0] for x in (ids, changed))
    torch.testing.assert_close(one[:10], two[:10], rtol=0, atol=1e-6)
    assert (one[10:] - two[10:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("pos", POSITIONS)
def test_shift_invariance(pos, monkeypatch):
    """Only distances matter: to relative encodings. FIRE sees the place beyond its threshold of 512 L."""
    model, ids = tiny_model(pos, random_positions=64), tokens(16)
    here = model.trunk(ids)
    shift = 3 if pos == "learned" else 1000
    monkeypatch.setattr(model.pos, "positions", lambda T, device: torch.arange(T, dtype=torch.float32) * 4 + shift)
    distance = (model.trunk(ids) - here).abs().max()
    assert distance > 1e-3 if pos in ("learned", "sinusoidal", "fire") else distance < 1e-4


@pytest.mark.parametrize("pos", POSITIONS)
def test_window(pos):
    """In one layer, what is out of the window does not count; the only layer of hwfa is its last, which has none."""
    model, ids = tiny_model(pos, n_layer=1, window=4), tokens(16)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 11
    moved = (model.trunk(ids) - model.trunk(changed))[0].abs().amax(1) > 1e-5
    assert moved.tolist() == [2 <= i < (16 if pos == "hwfa" else 6) for i in range(16)]


def test_window_of_everything_is_none():
    for pos in POSITIONS:
        ids = tokens(16)
        if pos != "hwfa":
            torch.testing.assert_close(tiny_model(pos, window=16).trunk(ids), tiny_model(pos).trunk(ids))


# ---- fast paths against the plain one


def plain(q, k, v, pos, i, window):
    T = len(i)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if pos.bias:
        early = torch.minimum(i[:, None], i)
        scores = scores + pos.bias(torch.arange(q.shape[1])[:, None, None], i[:, None], early)
    place = torch.arange(T)
    hidden = (place > place[:, None]) | (place <= place[:, None] - (window or T))
    return torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v


@pytest.mark.parametrize("window", [0, 1, 70, 200])
@pytest.mark.parametrize("pos", ["none", "t5", "alibi", "kerple", "sandwich", "fire", "random"])
def test_slices_are_plain_attention(pos, window):
    """Three slices of queries, forward and gradients; "random" is ALiBi at random positions, where no vector serves."""
    model = tiny_model("alibi", random_positions=999, block_size=300).train() if pos == "random" else tiny_model(pos)
    qkv = torch.randn(3, 2, 2, 300, 8).requires_grad_()
    i = model.pos.positions(300, torch.device("cpu"))
    leaves = [qkv, *model.pos.parameters()]
    fast, slow = attend(*qkv, Scores(model.pos, i, window)), plain(*qkv, model.pos, i, window)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad(out, leaves, weight, allow_unused=True) for out in (fast, slow))):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        torch.testing.assert_close(attend(*qkv, Scores(model.pos, i, window)), slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pos, window", [("alibi", 0), ("t5", 40), ("kerple", 0), ("sandwich", 7), ("none", 9)])
def test_gpu_kernel_scores_on_the_cpu(pos, window):
    """What the GPU's fused kernel is given, run by FlexAttention's reference on the CPU, with the bias's gradient."""
    model = tiny_model(pos)
    q, k, v = torch.randn(3, 1, 2, 200, 8)
    i = torch.arange(200.0)
    scores = Scores(model.pos, i, window)
    blocks = model_file.causal_blocks(200, scores.window, i.device)
    fused = flex_attention(q, k, v, score_mod=scores.score_mod if model.pos.bias else None, block_mask=blocks)
    slow = plain(q, k, v, model.pos, i, window)
    torch.testing.assert_close(fused, slow, rtol=1e-4, atol=1e-5)
    for p in model.pos.parameters():
        grads = [torch.autograd.grad((out * v).sum(), p, retain_graph=True)[0] for out in (fused, slow)]
        torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-3)


def test_alibi_in_bfloat16_is_as_exact_as_none():
    """At 2048 tokens, where bfloat16 could not hold the distances: error against float64 at most twice that of none."""
    T, errors = 2048, []
    qkv = torch.randn(3, 1, 2, T, 32).bfloat16()
    pos = tiny_model("alibi").pos
    for bias in (None, Scores(pos, torch.arange(float(T)), 0)):
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*qkv, bias)
        exact = plain(*qkv.double(), pos if bias else tiny_model("none").pos, torch.arange(float(T)).double(), 0)
        errors.append(((out - exact).square().mean() / exact.square().mean()).sqrt().item())
    assert errors[1] < 2 * errors[0] < 0.02


# ---- the vocabulary, the loss, the optimizer


def test_adaptive_softmax():
    """Against torch's AdaptiveLogSoftmaxWithLoss with the same weights, and against probabilities that sum to one."""
    torch.manual_seed(0)
    mine = Vocabulary(50, 32, cutoffs=(10, 20))
    for p in mine.parameters():
        p.data.normal_()
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(32, 50, [10, 20], div_value=4.0, head_bias=False)
    theirs.head.weight.data = mine.head.data
    for n in range(2):
        theirs.tail[n][0].weight.data, theirs.tail[n][1].weight.data = mine.projections[n].data, mine.tails[n].data
    x = torch.randn(50, 32)
    loss = torch.stack([mine.loss(row.expand(50, 32), torch.arange(50)) for row in x])
    torch.testing.assert_close(-loss, theirs.log_prob(x))
    torch.testing.assert_close((-loss).exp().sum(1), torch.ones(50))
    tied = [mine.head[3], mine.tails[0][5] @ mine.projections[0], mine.tails[1][7] @ mine.projections[1]]
    torch.testing.assert_close(mine(torch.tensor([3, 15, 27])), torch.stack(tied) * math.sqrt(32))


def test_small_vocabulary_is_a_plain_tied_softmax():
    model, ids = tiny_model("alibi"), tokens(17)
    logits = model.trunk(ids[:, :-1]) @ model.wte.head.T
    expected = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:])[0], expected)


def test_loss_in_pieces(monkeypatch):
    """In evaluation a long text's logits never stand in memory at once: 2^23 at most."""
    model, ids, seen = tiny_model("alibi", vocab_size=2 ** 20), tokens(31, 2 ** 20), []
    whole = model(ids[:, :-1], ids[:, 1:])
    loss = model.wte.loss
    monkeypatch.setattr(model.wte, "loss", lambda x, y: seen.append(len(x)) or loss(x, y))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), whole)
    assert seen == [8, 8, 8, 6]


@pytest.mark.parametrize("pos", POSITIONS)
def test_weight_decay_touches_matrices_only(pos):
    model = tiny_model(pos, vocab_size=30000)
    decay, rest = model.parameter_groups(0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decay["params"]) + len(rest["params"]) == len(names) and rest["weight_decay"] == 0
    assert {names[id(p)].split(".")[-2] for p in decay["params"]} == {"wte", "tails", "projections", "c_attn",
                                                                     "attn_proj", "c_fc", "mlp_proj"}
    assert all(names[id(p)].startswith(("pos.", "ln_f")) or ".ln_" in names[id(p)] for p in rest["params"])


@pytest.mark.parametrize("pos", POSITIONS)
def test_overfits_one_batch(pos):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"pos": pos, "n_embd": 32})).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-2)
    ids = torch.randint(11, (4, 17))
    for _ in range(150):
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_encodings_start_from_equal_weights():
    states = [tiny_model(pos).state_dict() for pos in POSITIONS]
    shared = [{name: p for name, p in state.items() if not name.startswith("pos.")} for state in states]
    assert all(torch.equal(p, other[name]) for other in shared for name, p in shared[0].items())


# ---- random positions and test-time extensions


def test_random_positions():
    pos = tiny_model("alibi", random_positions=100).pos.train()
    drawn = [pos.positions(16, torch.device("cpu")).tolist() for _ in range(50)]
    assert all(p == sorted(set(p)) and 0 <= p[0] and p[-1] < 100 and len(p) == 16 for p in drawn)
    assert len(set(itertools.chain(*drawn))) > 90       # out of all of them
    model = tiny_model("alibi", random_positions=100)
    prepare(model, 20)
    assert model.pos.positions(20, torch.device("cpu")).tolist() == pytest.approx([5 * n for n in range(20)])


@pytest.mark.parametrize("extend, pos", [(e, pos) for e, (_, fits) in EXTENSIONS.items() for pos in fits])
def test_extensions_change_nothing_at_the_trained_length(extend, pos):
    ids = tokens(16)
    plain, extended = tiny_model(pos), tiny_model(pos)
    prepare(extended, 16, extend)
    assert torch.equal(plain.trunk(ids), extended.trunk(ids))
    prepare(extended, 64, extend)
    long = extended.trunk(tokens(64))
    assert long.isfinite().all()
    assert torch.equal(plain.trunk(tokens(64)[:, :16]), long[:, :16]) == (extend == "hierarchical")


def test_extension_formulas():
    rotary, alibi, learned = tiny_model("rotary"), tiny_model("alibi"), tiny_model("learned")
    prepare(rotary, 64, "ntk")
    assert rotary.pos.base == pytest.approx(10000 * 4 ** (8 / 6))
    prepare(alibi, 64, "interpolate")
    assert alibi.pos.positions(64, torch.device("cpu")).tolist() == [n / 4 for n in range(64)]
    p = learned.pos.table.detach().double()
    prepare(learned, 256, "hierarchical")
    u = (p - 0.4 * p[0]) / 0.6
    q = torch.stack([0.4 * u[m // 16] + 0.6 * u[m % 16] for m in range(256)])
    torch.testing.assert_close(learned.pos.table.double(), q, rtol=0, atol=1e-6)
    assert learned.pos.max_length == 256
    halfway = tiny_model("learned")
    prepare(halfway, 32, "interpolate")
    x = halfway.pos.embed(torch.zeros(1, 32, 16), halfway.pos.positions(32, torch.device("cpu")))[0]
    torch.testing.assert_close(x[:3], torch.stack([p[0], (p[0] + p[1]) / 2, p[1]]).float())


def test_extensions_that_make_no_sense():
    for extend, (_, fits) in EXTENSIONS.items():
        for pos in set(POSITIONS) - set(fits):
            with pytest.raises(ModelError, match=f"--extend {extend} for {pos}.*ntk for rotary"):
                prepare(tiny_model(pos), 32, extend)


def test_learned_ends_at_its_table():
    with pytest.raises(ModelError, match="learned ends at 16 positions, asked for 17"):
        tiny_model("learned").trunk(tokens(17))


# ---- data


def write_corpus(folder, train="a b\n", valid="a\n", test="b\n", pattern="{}.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / pattern.format(split)).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def test_words_by_hand(tmp_path):
    """Blank lines, unknown words, a last line without a newline. By count: b 3, <eos> 3, c 2, a 1, <unk> (0)."""
    folder = write_corpus(tmp_path / "mini", " b c b \n\n a  c b", "b new\n \n", "c", "wiki.{}.tokens")
    corpus = data.load(folder, "word", tmp_path / "cache")
    assert corpus.train.tolist() == [0, 2, 0, 1, 1, 3, 2, 0, 1]
    assert corpus.valid.tolist() == [0, 4, 1, 1] and corpus.test.tolist() == [2, 1]
    assert (corpus.vocab_size, corpus.unit) == (5, "word")


def test_bytes_are_bytes(tmp_path):
    corpus = data.load(write_corpus(tmp_path / "raw", bytes(range(256)), b"\xff\x00", b"\n"), "byte", tmp_path)
    assert corpus.train.tolist() == list(range(256)) and corpus.valid.tolist() == [255, 0] and corpus.vocab_size == 256


def test_cache_is_used_and_not_trusted(tmp_path, monkeypatch):
    folder, calls, read = write_corpus(tmp_path / "text", "a b c\n"), [], data.read_words
    monkeypatch.setattr(data, "read_words", lambda files: calls.append(1) or read(files))
    first = data.load(folder, "word", tmp_path)
    assert isinstance(data.load(folder, "word", tmp_path).train, np.memmap) and len(calls) == 1
    (tmp_path / "text" / "train.txt").write_text("a c b c\n")
    assert data.load(folder, "word", tmp_path).vocab_id != first.vocab_id and len(calls) == 2
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    data.load(folder, "word", tmp_path)
    assert len(calls) == 3


def test_stdlib_splits_are_apart():
    files = data.stdlib_files()
    names = [set(map(str, files[split])) for split in data.SPLITS]
    assert all(names) and not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


# ---- evaluation


@pytest.mark.parametrize("n, length, stride", [(50, 16, None), (49, 16, None), (50, 16, 5), (33, 16, 16), (17, 16, 1),
                                               (10, 16, 3), (2, 1, 1), (47, 8, 3)])
def test_every_target_counts_once(n, length, stride):
    """Against one forward pass for each target, over the window that the protocol gives it."""
    model, stream = tiny_model("alibi"), tokens(n)[0].numpy()
    expected, S = np.zeros(length), stride or length
    for target in range(n - 1):
        start = max(0, math.ceil((target + 1 - length) / S)) * S
        ids = torch.from_numpy(stream[start:target + 2])[None]
        expected[target - start] += model(ids[:, :-1], ids[:, 1:])[0, -1].item()
    for batch_tokens in (1, 64):
        total, count = evaluation.evaluate(model, stream, length, stride, batch_tokens=batch_tokens)
        assert count.sum() == n - 1
        np.testing.assert_allclose(total.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_evaluation_leaves_training_alone():
    model, stream = tiny_model("alibi", dropout=0.5, random_positions=50).train(), tokens(100)[0].numpy()
    state = torch.get_rng_state()
    one, two = (evaluation.evaluate(model, stream, 16)[0] for _ in range(2))
    assert torch.equal(one, two) and model.training and torch.equal(torch.get_rng_state(), state)


# ---- training, through the command line in this process


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("train", flag, ...) -> standard output; it works in tmp_path on a small corpus of bytes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    text = ["".join(rng.choice(list("abcdefg  \n"), size)) for size in (3000, 400, 300)]
    write_corpus(tmp_path / "text", *text)
    tiny = ("--data text --tokenizer byte --block_size 8 --batch_size 4 --max_iters 6 --n_layer 2 --n_head 2 "
            "--n_embd 16 --dropout 0 --warmup_iters 2 --eval_interval 3 --device cpu").split()

    def call(module, *flags):
        argv = [module, *(tiny if module == "train" else ()), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        (train if module == "train" else evaluation).main()
        return capsys.readouterr().out
    call.tiny = tiny
    return call


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_train_and_eval_from_the_command_line(run, tmp_path):
    out = run("train", "--pos", "alibi", "learned", "--out_dir", "o")
    assert "alibi step 6: train loss" in out and "tokens/s" in out and "learned" in out and "fails from 16" in out
    rows = list(csv.DictReader(open("o/extrapolation.csv")))
    assert ",".join(rows[0]) == (
        "pos,train_length,length,stride,split,tokens,loss,ppl,extend,window,logn,random_positions,checkpoint")
    assert [(r["pos"], int(r["length"])) for r in rows] == [("alibi", 8 * 2 ** n) for n in range(5)] + [("learned", 8)]
    assert all(r["tokens"] == "399" and float(r["ppl"]) == pytest.approx(math.exp(float(r["loss"]))) for r in rows)
    log = list(csv.reader(open("o/alibi/log.csv")))
    assert ",".join(log[0]) == "step,train_loss,valid_loss,lr,tokens_per_s" and [r[0] for r in log[1:]] == ["3", "6"]
    assert float(rows[0]["loss"]) == pytest.approx(float(log[2][2]))
    out = run("eval", "o/alibi", "o/learned/best.pt", "--stride", "4", "--lengths", "8", "12", "--by_position",
              "--csv", "t.csv", "--window", "4", "--logn", "--split", "test")
    assert "alibi + window 4 + logn" in out and "sliding by 4" in out
    assert "alibi + window 4 + logn at 12, having seen 9 to 12 tokens: loss" in out
    rows = list(csv.DictReader(open("t.csv")))
    assert [(r["length"], r["stride"], r["split"], r["tokens"], r["window"], r["logn"]) for r in rows] == [
        (n, "4", "test", "299", "4", "1") for n in ("8", "12", "8")]


@pytest.mark.parametrize("flags", ["alibi --dropout 0.2 --grad_accum 2", "fire --random_positions 20 --logn", "xpos",
                                   "t5 --tokenizer word --window 3", "hwfa", "learned --grad_clip 0"])
def test_resume_is_bit_for_bit(run, flags, monkeypatch, capsys):
    """SIGTERM in steps 2 and 5: the step under way ends, a checkpoint is written, --resume goes on."""
    pos, *flags = flags.split()
    run("train", "--pos", pos, *flags, "--out_dir", "whole")
    get_lr, stops = train.get_lr, [1, 4]

    def kill(step, args):
        if stops and step == stops[0]:
            os.kill(os.getpid(), signal.SIGTERM)
            stops.pop(0)
        return get_lr(step, args)

    monkeypatch.setattr(train, "get_lr", kill)
    for step in (2, 5):
        with pytest.raises(SystemExit, match="143"):
            run("train", "--pos", pos, *flags, "--out_dir", "parts", "--resume")
        assert f"stopped after step {step}: the same command with --resume" in capsys.readouterr().out
    run("train", "--pos", pos, *flags, "--out_dir", "parts", "--resume", "--eval_interval", 1)
    whole, parts = (torch.load(f"{folder}/{pos}/ckpt.pt", weights_only=True) for folder in ("whole", "parts"))
    assert same(whole["model"], parts["model"]) and whole["step"] == parts["step"] == 6
    assert [row[0] for row in parts["log"]] == [3, 6]


def test_accumulated_gradients_are_one_big_batch(run):
    logs = []
    for batch, accum in ((8, 1), (2, 4)):
        run("train", "--pos", "rotary", "--out_dir", batch, "--batch_size", batch, "--grad_accum", accum,
            "--learning_rate", "1e-2", "--eval_interval", "1")
        logs += [[float(x) for row in list(csv.reader(open(f"{batch}/rotary/log.csv")))[1:] for x in row[1:3]]]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_batches():
    """Every block once an epoch, targets one on; the same for every run of a seed, another order in another epoch."""
    args = type("Args", (), dict(block_size=4, seed=3))
    stream = np.arange(43)
    batches = [train.get_batch(stream, args, n, 5) for n in range(0, 20, 5)]
    starts = [x[:, 0].tolist() for x, y in batches]
    assert all(torch.equal(x + 1, y) and (x[:, 1:] == y[:, :-1]).all() for x, y in batches)
    first, second = starts[0] + starts[1], starts[2] + starts[3]
    assert sorted(first) == sorted(second) == [4 * n for n in range(10)] and first != second
    assert torch.equal(train.get_batch(stream, args, 7, 2)[0], torch.cat([x for x, y in batches])[7:9])


def test_learning_rate():
    args = type("Args", (), dict(warmup_iters=10, max_iters=110, learning_rate=2.0))
    lrs = [train.get_lr(step, args) for step in range(110)]
    assert lrs[0] == pytest.approx(0.2) and max(lrs) == lrs[10] == 2.0 and lrs[60] == pytest.approx(1.1)
    assert lrs[109] == pytest.approx(0.2, rel=0.01)


def test_two_processes_are_one(run):
    """torchrun with gloo: same losses as one process with the same global batch, and one voice."""
    flags = ["--pos", "alibi", "--grad_accum", "2", "--learning_rate", "1e-2", "--eval_interval", "1"]
    run("train", *flags, "--out_dir", "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    result = subprocess.run([*torchrun, HERE / "train.py", *run.tiny, *flags, "--out_dir", "two"],
                            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 6:") == 1
    logs = [list(csv.reader(open(f"{folder}/alibi/log.csv")))[1:] for folder in ("one", "two")]
    for a, b in zip(*logs):
        assert [float(x) for x in a[:4]] == pytest.approx([float(x) for x in b[:4]], rel=1e-5)


def test_the_papers_finding(monkeypatch, tmp_path):
    """Trained at 32 bytes of this Python's library, tested at 256: ALiBi holds, sinusoidal and rotary do not."""
    monkeypatch.chdir(tmp_path)
    flags = ("--preset quick --block_size 32 --batch_size 32 --n_layer 2 --n_embd 64 --max_iters 150 --lengths 32 256 "
             "--pos sinusoidal rotary alibi --learning_rate 4e-3 --eval_interval 150 --device cpu").split()
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    train.main()
    ppl = {(row["pos"], row["length"]): float(row["ppl"]) for row in read_csv("out/quick/extrapolation.csv")}
    assert ppl["alibi", "256"] < 1.01 * ppl["alibi", "32"]
    assert ppl["sinusoidal", "256"] > 1.2 * ppl["sinusoidal", "32"]
    assert ppl["rotary", "256"] > 1.1 * ppl["rotary", "32"]


# ---- mistakes, accidents and random settings: one line and exit code 2, nothing lost


KILLS, FUZZ_SECONDS = int(os.environ.get("KILLS", 3)), float(os.environ.get("FUZZ_SECONDS", 4))
FLAGS = ("--preset quick --data corpus --tokenizer word --data_dir store --out_dir out --block_size 8 --batch_size 2 "
        "--n_layer 1 --n_head 2 --n_embd 16 --max_iters 6 --eval_interval 3 --learning_rate 0.01 ")
PROGRAMS = {"train": (train.main, FLAGS), "eval": (evaluation.main, "--lengths 8 --data_dir store ")}


def call(command):
    """The exit code of "train FLAGS" or "eval CHECKPOINT FLAGS", run in this process on top of PROGRAMS."""
    program, _, flags = command.partition(" ")
    main, base = PROGRAMS[program]
    sys.argv = [f"{program}.py", *(base + flags).split()]
    try:
        evaluation.run(main)
    except SystemExit as stop:
        return stop.code
    return 0


def make_corpus(folder, seed=1, train=400, valid=150, test=150):
    chance = random.Random(seed)
    Path(folder).mkdir()
    for split, size in dict(train=train, valid=valid, test=test).items():
        words = [f"w{chance.randrange(30)}" for _ in range(size)]
        Path(folder, f"{split}.txt").write_text(" ".join(words) + "\n" if words else "")


def contents(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def results(folder):
    """(what was learned, step and losses in the log) of a run."""
    weights = torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model"]
    return weights, [line.split(",")[:3] for line in Path(folder, "log.csv").read_text().splitlines()]


def same_results(one, other):
    return (one[1] == other[1] and one[0].keys() == other[0].keys()
            and all(torch.equal(one[0][key], other[0][key]) for key in one[0]))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A folder with corpora and trained runs."""
    here, back = tmp_path_factory.mktemp("example"), os.getcwd()
    os.chdir(here)
    make_corpus("corpus")
    make_corpus("other", 2, train=500)
    assert call("train --pos alibi rotary learned") == 0
    os.chdir(back)
    return here


@pytest.fixture
def here(example, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(example, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


def check(capsys, command, phrase):
    """Exit code 2, one line on stderr with `phrase` in it, every file that was there as it was, no half-written one."""
    before = contents()
    capsys.readouterr()
    code, err = call(command), capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and phrase in err and "Traceback" not in err, (code, err)
    after = contents()
    assert before.items() <= after.items() and not [path for path in after if path.suffix in (".tmp", ".part")]


# ---- bad input --------------------------------------------------------------------------------------------------


CASES = {}


def case(name, command, phrase, make=None):
    """A mistake, a phrase of the line about it, and what prepares the current folder for it."""
    assert name not in CASES
    CASES[name] = pytest.param(command, phrase, make, id=name)


def damage(change, path="out/alibi/ckpt.pt"):
    """Loads a checkpoint, lets `change` alter the dict or give another object, saves it."""
    def make():
        checkpoint = torch.load(path, weights_only=True)
        torch.save(change(checkpoint) or checkpoint, path)
    return make


def put(path, content):
    return lambda: Path(path).write_bytes(content)


class Evil:
    def __reduce__(self):
        return open, ("marker", "w")


def put_folder(path):
    return lambda: (Path(path).unlink(), Path(path).mkdir())


# flags: type and range
for value, phrase in {"x": "invalid int value: 'x'", "0": "0 is not from 1", "-1": "-1 is not from 1",
                      "1.5": "invalid int value: '1.5'", "": "expected one argument"}.items():
    case(f"n_layer={value}", f"train --n_layer {value}", f"argument --n_layer: {phrase}")
for flag, value, phrase in (
        ("dropout", "2", "2 is not from 0 to 0.99"), ("dropout", "1", "1 is not from 0 to 0.99"),
        ("attn_dropout", "-0.1", "-0.1 is not from 0"), ("learning_rate", "nan", "nan is not from 0"),
        ("learning_rate", "inf", "inf is not from 0"), ("learning_rate", "-1", "-1 is not from 0"),
        ("learning_rate", "fast", "invalid float value: 'fast'"), ("lengths", "0", "0 is not from 1"),
        ("lengths", "8 -4", "-4 is not from 1"), ("lengths", "8 x", "invalid int value: 'x'"),
        ("seed", "-1", "-1 is not from 0"), ("seed", "9999999999", "9999999999 is not from 0"),
        ("batch_size", "0", "0 is not from 1"), ("grad_accum", "0", "0 is not from 1"),
        ("max_iters", "0", "0 is not from 1"), ("eval_interval", "0", "0 is not from 1"),
        ("block_size", "0", "0 is not from 1"), ("window", "-1", "-1 is not from 0"),
        ("warmup_iters", "-1", "-1 is not from 0"), ("grad_clip", "nan", "nan is not from 0"),
        ("weight_decay", "-1", "-1 is not from 0"), ("random_positions", "-8", "-8 is not from 0"),
        ("device", "tpu", "choose from"), ("dtype", "float16", "choose from"), ("tokenizer", "bpe", "choose from")):
    case(f"{flag}={value}", f"train --{flag} {value}", phrase)
for flag, value, phrase in (("lengths", "0", "0 is not from 1"), ("stride", "0", "0 is not from 1"),
                            ("window", "-1", "-1 is not from 0"), ("batch_tokens", "x", "invalid int value"),
                            ("split", "train", "choose from")):
    case(f"eval {flag}={value}", f"eval out/alibi --{flag} {value}", phrase)

# flags: names, and what does not go together
case("unknown flag", "train --n_layers 1", "unrecognized arguments: --n_layers")
case("unknown flag of eval", "eval out/alibi --pos alibi", "unrecognized arguments: --pos")
case("unknown encoding", "train --pos alibo", "did you mean alibi?")
case("unknown preset", "train --preset quik", "did you mean quick?")
case("unknown corpus", "train --data wikitext103", "did you mean wikitext-103?")
case("unknown extension", "eval out/alibi --extend interpol", "did you mean interpolate?")
case("extension for another encoding", "eval out/alibi --extend ntk", "no --extend ntk for alibi")
case("width and heads", "train --n_embd 15", "--n_embd 15 is not a multiple of --n_head 2")
for pos in ("rotary", "xpos", "hwfa"):
    case(f"odd head of {pos}", f"train --pos {pos} --n_embd 18",
         f"--pos {pos} needs --n_embd 18 / --n_head 2 to be even")
case("second encoding is wrong", "train --out_dir new --n_embd 18 --pos none rotary", "--pos rotary needs")
case("random_positions", "train --random_positions 7", "--random_positions 7 is below --block_size 8")
case("resume and overwrite", "train --resume --overwrite", "not allowed with argument")
case("no cuda", "train --device cuda", "--device cuda: torch finds none here; name")
case("no mps for eval", "eval out/alibi --device mps", "--device mps: torch finds none here; name")
case("stride", "eval out/alibi --lengths 16 8 --stride 9", "--stride 9 would skip targets at length 8")

# the corpus
case("corpus without files", "train --data empty", "must hold three files", lambda: Path("empty").mkdir())
case("corpus without test", "train", "must hold three files", lambda: Path("corpus/test.txt").unlink())
case("corpus is a file", "train --data corpus/train.txt", "no corpus 'corpus/train.txt'")
case("folder for a file", "train", "must hold three files", put_folder("corpus/train.txt"))
case("empty train", "train", "the train split of corpus is empty", put("corpus/train.txt", b""))
case("empty valid", "train", "the valid split of corpus is empty", put("corpus/valid.txt", b""))
case("empty test as bytes", "train --tokenizer byte", "the test split of corpus is empty", put("corpus/test.txt", b""))
case("not UTF-8", "train", "corpus/valid.txt: byte 7 is not UTF-8: convert it or use --tokenizer byte",
     put("corpus/valid.txt", b"line 1\n\xff\n"))
case("not UTF-8 late", "train", f"byte {3 << 20} is not UTF-8", put("corpus/train.txt", b"a b\n" * (3 << 18) + b"\xe4"))
case("cut UTF-8", "train", "byte 1 is not UTF-8", put("corpus/train.txt", "aä".encode()[:-1]))
case("train shorter than a block", "train", "is more than the 4 targets", put("corpus/train.txt", b"a b c d\n"))
case("valid shorter than a block", "train", "5 targets", put("corpus/valid.txt", b"a b c d e\n"))
case("lengths beyond valid", "train --lengths 8 151", "length 151 is more than the 150 targets")
case("eval beyond valid", "eval out/alibi --lengths 8 151", "length 151 is more than the 150 targets")
case("stored corpus is a file", "train --data wikitext-2", "wikitext-2", put("store/wikitext-2", b"x"))
case("data_dir is a file", "train --data_dir corpus/train.txt", "cannot write corpus/train.txt/cache")

# checkpoints
for kind, make, phrase in (
        ("missing", lambda: Path("out/alibi/ckpt.pt").unlink(), "No such file"),
        ("empty", put("out/alibi/ckpt.pt", b""), "ckpt.pt"), ("text", put("out/alibi/ckpt.pt", b"hello\n"), "ckpt.pt"),
        ("cut", lambda: os.truncate("out/alibi/ckpt.pt", 20000), "ckpt.pt"),
        ("list", damage(lambda c: [1, 2]), "ckpt.pt"), ("code", damage(lambda c: Evil()), "Weights only"),
        ("folder", put_folder("out/alibi/ckpt.pt"), "ckpt.pt"),
        ("no args", damage(lambda c: c.pop("args") and None), "'args'"),
        ("no model", damage(lambda c: c.pop("model") and None), "'model'"),
        ("a weight less", damage(lambda c: c["model"].pop("ln_f.weight") is None), "state_dict"),
        ("a weight more", damage(lambda c: c["model"].update(more=torch.ones(1))), "state_dict"),
        ("a field more", damage(lambda c: c["config"].update(more=1)), "more"),
        ("another width", damage(lambda c: c["config"].update(n_embd=32)), "state_dict"),
        ("unknown encoding", damage(lambda c: c["config"].update(pos="x")), "KeyError: 'x'")):
    case(f"eval checkpoint: {kind}", "eval out/alibi", phrase, make)
    if kind not in ("missing", "folder"):
        case(f"resume checkpoint: {kind}", "train --resume", phrase, make)
case("eval checkpoint: empty args", "eval out/alibi", "ckpt.pt", damage(lambda c: c["args"].clear()))
case("resume checkpoint: no optimizer", "train --resume", "ckpt.pt", damage(lambda c: c.pop("optimizer") and None))
case("resume checkpoint: a flag less", "train --resume", "--seed 1337, but",
     damage(lambda c: c["args"].pop("seed") and None))
case("another vocabulary", "eval out/alibi --data other", "another vocabulary", put("other/train.txt", b"a b\n" * 99))
case("a second one", "eval out/alibi more", "no checkpoint of train.py", put("more", b"x"))

# runs that are there already
case("there already", "train", "with --resume, or start anew with --overwrite")
case("second is there", "train --pos none rotary", "out/rotary/ckpt.pt is there already")
case("fewer steps", "train --resume --max_iters 5", "--max_iters 5 is less than the 6 steps of")
for flag, value in dict(n_embd=32, tokenizer="byte", data="other", seed=7, learning_rate=0.1, window=4,
                        grad_accum=2).items():
    case(f"resume with another {flag}", f"train --resume --{flag} {value}", f"--{flag} {value}, but out/alibi/ckpt.pt")
case("resume in a copied folder", "train --resume --pos none", "--pos none, but out/none/ckpt.pt was trained with",
     lambda: shutil.copytree("out/alibi", "out/none"))
case("resume on changed text", "train --resume", "its vocabulary is another",
     put("corpus/train.txt", b"a b\n" * 99))

# what cannot be written
case("out_dir is a file", "train --out_dir corpus/train.txt", "cannot write corpus/train.txt/alibi/log.csv")
case("out_dir is a file, told at once", "train --out_dir corpus/train.txt --max_iters 99999 --eval_interval 99999",
     "cannot write", lambda: signal.setitimer(signal.ITIMER_REAL, 3))
case("csv below a file", "eval out/alibi --csv corpus/train.txt/table.csv", "cannot write corpus/train.txt/table.csv")
case("csv is a folder", "eval out/alibi --csv corpus", "cannot write corpus")
case("plot below a file", "eval out/alibi --plot corpus/train.txt/figure.png", "cannot write corpus/train.txt/figure")
case("plot of no format", "eval out/alibi --plot figure.txt", "figure.txt")


@pytest.mark.parametrize("command, phrase, make", CASES.values())
def test_mistake(command, phrase, make, here, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    figure = MagicMock()       # as matplotlib is not needed for tests: a figure that knows png alone
    figure.Figure.return_value.savefig = lambda file, format, dpi: {"png": 1}.get(format) or int("no such format")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still at it"))
    if make:
        make()
    try:
        check(capsys, command, phrase)
        assert not Path("marker").exists(), "code from a checkpoint ran"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)


def test_plot_without_matplotlib(here, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check(capsys, "eval out/alibi --plot figure.png", "--plot needs matplotlib: pip install matplotlib")


def test_real_process(tmp_path):
    command = [sys.executable, train.__file__, "--data", "wikitext", "--out_dir", "out"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=one)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1) and "train.py: no corpus" in run.stderr
    assert not list(tmp_path.iterdir())


# ---- downloads --------------------------------------------------------------------------------------------------


def zipped(**members):
    """A zip like WikiText's; a member can be renamed, or left out with ''."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for split in data.SPLITS:
            if path := members.get(split, f"wikitext-2/wiki.{split}.tokens"):
                archive.writestr(path, f" a b <unk> {split} \n" * 40)
    return file.getvalue()


class Mirror(BaseHTTPRequestHandler):
    """/200/x.zip serves `body`, /403/x.zip is refused, and so on; `agents` saw who asked."""
    body, agents = b"", []

    def do_GET(self):
        self.agents.append(self.headers["User-Agent"])
        how = self.path.split("/")[1]
        if how == "hang":
            return time.sleep(0.5)
        self.send_response(int(how) if how.isdigit() else 200)
        self.send_header("Content-Length", len(self.body))
        self.end_headers()
        self.wfile.write({"200": self.body, "half": self.body[:99], "wrong": bytes(len(self.body))}.get(how, b""))
        if how == "stall":
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


def serve(monkeypatch, server, body, *ways):
    """Makes `body` the published zip, and each way a mirror."""
    Mirror.agents.clear()
    monkeypatch.setattr(Mirror, "body", body)
    monkeypatch.setitem(data.ZIPS, "wikitext-2", (len(body), hashlib.sha256(body).hexdigest()))
    monkeypatch.setattr(data, "MIRRORS", [way if ":" in way else f"{server}/{way}/" for way in ways])
    monkeypatch.setattr(data, "TIMEOUT", 0.15)


@pytest.mark.parametrize("way, phrase", (
    ("403", "HTTP Error 403"), ("404", "HTTP Error 404"), ("500", "HTTP Error 500"), ("hang", "timed out"),
    ("stall", "timed out"), ("half", "sha256"), ("wrong", "sha256"), ("http://127.0.0.1:1/", "refused"),
    ("http://nowhere.invalid/", "rror")))
def test_download_fails(way, phrase, here, server, capsys, monkeypatch):
    serve(monkeypatch, server, zipped(), way, "404")
    check(capsys, "train --data wikitext-2", phrase)
    check(capsys, "train --data wikitext-2", "fetch wikitext-2-v1.zip by hand into " + str(here / "store"))
    assert [path.name for path in Path("store").iterdir()] == ["cache"]


@pytest.mark.parametrize("body, phrase", (
        (zipped(test="../evil"), "outside"), (zipped(test="/tmp/evil"), "outside"),
        (zipped(test=""), "wiki.test.tokens"),
        (zipped(train="wiki.train.tokens"), "wiki.train.tokens"), (b"no zip", "not a zip")),
    ids=("parent", "absolute", "missing", "no folder", "no zip"))
def test_zip_of_something_else(body, phrase, here, server, capsys, monkeypatch):
    serve(monkeypatch, server, body, "200")
    check(capsys, "train --data wikitext-2", phrase)
    # the zip stays: its hash is right, and the line names it
    assert {path.name for path in Path("store").iterdir()} == {"cache", "wikitext-2-v1.zip"}
    assert not Path("evil").exists() and not Path("/tmp/evil").exists()


@pytest.mark.parametrize("bad", (zipped()[:-9], b"", b"<html>not found</html>"), ids=("cut", "empty", "page"))
def test_zip_put_by_hand(bad, here, server, capsys, monkeypatch):
    serve(monkeypatch, server, zipped(), "200")
    Path("store/wikitext-2-v1.zip").write_bytes(bad)
    check(capsys, "train --data wikitext-2", "store/wikitext-2-v1.zip has size and sha256")
    assert not Mirror.agents and not Path("store/wikitext-2").exists()


def test_second_mirror(here, server, monkeypatch):
    serve(monkeypatch, server, zipped(), "403", "half", "200", "500")
    corpus = data.load("wikitext-2", "word", "store")
    assert len(corpus.train) == 40 * 5 and corpus.vocab_size == 5
    assert len(Mirror.agents) == 3 and not any("urllib" in agent.lower() for agent in Mirror.agents)
    assert not [path for path in Path("store").iterdir() if path.suffix in (".part", ".tmp")]
    assert call("train --data wikitext-2 --out_dir new") == 0 and len(Mirror.agents) == 3       # no second download


# ---- damaged caches are built anew --------------------------------------------------------------------------------


def cut(path, size):
    return os.truncate(path, path.stat().st_size + size if size < 0 else size)


@pytest.mark.parametrize("kind, suffix, harm", (
        ("short", "npy", lambda path: cut(path, -3)), ("head", "npy", lambda path: cut(path, 20)),
        ("empty", "npy", lambda path: cut(path, 0)),
        ("dtype", "npy", lambda path: path.write_bytes(path.read_bytes().replace(b"<u2", b"<i2"))),
        ("text", "npy", lambda path: path.write_text("hello")), ("gone", "npy", Path.unlink),
        ("empty", "json", lambda path: cut(path, 0)), ("short", "json", lambda path: cut(path, -3)),
        ("garbage", "json", lambda path: path.write_bytes(os.urandom(40))), ("gone", "json", Path.unlink),
        ("number", "json", lambda path: path.write_text("7")), ("null", "json", lambda path: path.write_text("null")),
        ("fields", "json", lambda path: path.write_text('{"a": 1, "b": 2, "c": 3, "d": 4}')),
        ("counts", "json", lambda path: path.write_text(json.dumps([[1, 2, 3], "uint16", 31, "x"]))),
        ("types", "json", lambda path: path.write_text(json.dumps([["a", "b", "c"], 5, None, []])))))
def test_cache(kind, suffix, harm, here):
    before = data.load("corpus", "word", "store")
    before = [*map(np.array, before[:3]), *before[3:]]      # not mapped to the file that is damaged
    content = contents("store")
    [path] = Path("store/cache").glob(f"corpus-word-*.{suffix}")
    harm(path)
    after = data.load("corpus", "word", "store")
    assert all((a == b).all() for a, b in zip(before[:3], after[:3])) and before[3:] == list(after[3:])
    assert contents("store") == content


# ---- accidents on the way -----------------------------------------------------------------------------------------


def test_diverging(here, capsys):
    check(capsys, "train --overwrite --learning_rate 1e9", "learning rate ")
    assert evaluation.load_checkpoint("out/alibi").step == 6     # of the run before


def test_diverging_checkpoint_is_sound(here, capsys):
    check(capsys, "train --out_dir new --learning_rate 1e9 --eval_interval 1", "lower --learning_rate")
    log = Path("new/alibi/log.csv")
    assert not log.exists() or "nan" not in log.read_text()


def test_diverging_without_checkpoint(here, capsys):
    check(capsys, "train --out_dir new --learning_rate 1e9", "lower --learning_rate")
    assert [path.name for path in Path("new/alibi").iterdir()] == ["log.csv"]


@pytest.mark.parametrize("command, when, phrase", (
        ("train --overwrite", lambda model, T: model.training, "2 GiB. GPU 0 has ...: lower --batch_size"),
        ("train --overwrite", lambda model, T: not model.training and T == 8, "memory"),
        ("train --out_dir new", lambda model, T: T == 32, "memory"),
        ("eval out/alibi", lambda model, T: True, "--batch_tokens")),
    ids=("training", "validation", "closing table", "eval"))
def test_out_of_memory(command, when, phrase, here, capsys, monkeypatch):
    def forward(model, idx, targets):
        if when(model, idx.shape[1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")
        return original(model, idx, targets)
    original = train.GPT.forward
    monkeypatch.setattr(train.GPT, "forward", forward)
    check(capsys, command, phrase)


@pytest.mark.parametrize("room", (0, 100, 9000, 53000))
def test_full_disk(room, here):
    """Files may have `room` bytes at most: in a child, for a limit that nothing else feels."""
    def child():
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        code = call("train --resume --max_iters 8 --pos alibi")
        text = sys.stderr.getvalue()
        os._exit(code if text.count("\n") == 1 and "cannot write out/alibi" in text else 99)
    before = contents("out/alibi")
    assert before[Path("out/alibi/ckpt.pt")] and len(before[Path("out/alibi/ckpt.pt")]) > room
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    after = contents("out/alibi")
    assert process.exitcode == 2 and before.keys() == after.keys()
    assert all(before[path] == after[path] for path in before if path.suffix == ".pt")


# ---- kills and signals --------------------------------------------------------------------------------------------


LONG = "--dropout 0.1 --grad_accum 2 --max_iters 40 --eval_interval 1 --lengths 8 "


def start(command):
    """The command in a process of its own, silent."""
    def child():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(call(command))
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def test_kill(here):
    """However often a run is killed, and wherever: after --resume it ends with the weights of one that never was."""
    chance, kills, clock = random.Random(5), 0, time.perf_counter()
    process = start(f"train {LONG} --out_dir whole --data_dir whole")
    process.join()
    took, wanted = time.perf_counter() - clock, results("whole/alibi")
    assert process.exitcode == 0
    while True:
        process = start(f"train {LONG} --out_dir part --data_dir part --resume")
        process.join(chance.uniform(0, took) if kills < KILLS else None)
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert same_results(results("part/alibi"), wanted)
            shutil.rmtree("part")
            if kills >= KILLS:
                break
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            for path in Path("part").glob("alibi/*.pt"):
                assert evaluation.load_checkpoint(path).step <= 40


@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
@pytest.mark.parametrize("every", (1, 3, 7))
def test_signal(number, code, every, here, capsys, monkeypatch):
    def get_batch(tokens, args, first, rows):
        if first == 8 * 4:      # the first micro-batch of the ninth step
            os.kill(os.getpid(), number)
        return original(tokens, args, first, rows)
    original, before = train.get_batch, signal.getsignal(number)
    flags = f"{LONG} --max_iters 16 --eval_interval {every}"
    assert call(f"train {flags} --out_dir whole") == 0
    monkeypatch.setattr(train, "get_batch", get_batch)
    capsys.readouterr()
    assert call(f"train {flags} --out_dir part") == code
    signal.signal(number, before)
    monkeypatch.undo()
    os.chdir(here)
    out, err = capsys.readouterr()
    last = "stopped after step 9: the same command with --resume goes on from part/alibi/ckpt.pt"
    assert out.splitlines()[-1] == last and not err
    assert evaluation.load_checkpoint("part/alibi").step == 9
    assert call(f"train {flags} --out_dir part --resume") == 0
    assert same_results(results("part/alibi"), results("whole/alibi"))


def test_stop_before_the_first_evaluation(here, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    original = train.get_batch
    monkeypatch.setattr(train, "get_batch", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), original(*a))[1])
    assert call("train --out_dir new") == 143
    signal.signal(signal.SIGTERM, before)
    assert call("train --out_dir new --resume --max_iters 1") in (0, 2)


# ---- the printed table --------------------------------------------------------------------------------------------


def test_folder_called_nan(here, capsys):
    assert call("train --out_dir finance") == 0 and "finance/alibi/ckpt.pt" in capsys.readouterr().out


@pytest.mark.parametrize("command, make", (
        ("eval out/alibi --lengths 16 32", None), ("eval out/learned --lengths 16", None),
        ("eval out/alibi --lengths 8 16", damage(lambda c: c["model"]["ln_f.weight"].fill_(math.nan) is None))),
    ids=("trained length not measured", "no room in the table", "nan"))
def test_holds(command, make, here, capsys):
    if make:
        make()
    call(command)
    assert not any(line.endswith("  holds") for line in capsys.readouterr().out.splitlines())


def test_two_runs_of_one_encoding(here, capsys):
    assert call("train --out_dir wide --n_embd 32") == 0
    capsys.readouterr()
    assert call("eval out/alibi wide/alibi") == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("alibi")]) == 2


# ---- random settings ----------------------------------------------------------------------------------------------


def draw(chance, pos):
    """Flags of a small run, and the sizes of a corpus for it: all that a user may ask for."""
    heads = chance.choice((1, 2, 3, 5))
    even = 2 if pos in ("rotary", "xpos", "hwfa") else 1
    block = chance.choice((1, 2, 3, 7, 8, 13))
    flags = dict(pos=pos, block_size=block, n_head=heads, n_embd=heads * even * chance.randint(1, 6),
                 n_layer=chance.randint(1, 3), batch_size=chance.randint(1, 5), grad_accum=chance.randint(1, 3),
                 max_iters=chance.randint(1, 5), eval_interval=chance.randint(1, 4), warmup_iters=chance.randint(0, 9),
                 window=chance.choice((0, 0, 1, 2, 5, 99)),
                 random_positions=chance.choice((0, 0, block, 2 * block + 1)), dropout=chance.choice((0, 0.5)),
                 attn_dropout=chance.choice((0, 0.5)), act_dropout=chance.choice((0, 0.5)),
                 grad_clip=chance.choice((0, 1)), seed=chance.randrange(2 ** 31),
                 tokenizer=chance.choice(("byte", "word")))
    sizes = [chance.randint(block + 1, 300) for _ in range(3)]
    return flags, sizes, chance.choice(("", " --logn"))


def fuzz_corpus(folder, chance, sizes, tokenizer):
    Path(folder).mkdir()
    for split, size in zip(data.SPLITS, sizes):
        if tokenizer == "byte":
            text = chance.randbytes(size)
        else:       # any character but a surrogate; new lines, so that there are as many words at least
            text = "".join(chr(chance.choice((10, 32, chance.randrange(0xd800), chance.randrange(0xe000, 0x110000))))
                           for _ in range(size)).encode() + b"\n" * size
        Path(folder, f"{split}.txt").write_bytes(text)


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_fuzz(here, capsys):
    end, names, seed = time.perf_counter() + FUZZ_SECONDS, list(POSITIONS), 0
    while time.perf_counter() < end or seed < len(names):
        chance, pos = random.Random(seed), names[seed % len(names)]
        flags, sizes, logn = draw(chance, pos)
        command = "train " + " ".join(f"--{key} {value}" for key, value in flags.items()) + logn
        fuzz_corpus(f"fuzz{seed}", chance, sizes, flags["tokenizer"])
        command += f" --data fuzz{seed} --data_dir fuzz{seed}"
        more = flags["max_iters"] + chance.randint(0, 3)
        corpus = data.load(f"fuzz{seed}", flags["tokenizer"], f"fuzz{seed}")
        split = chance.choice(("valid", "test"))
        tokens = getattr(corpus, split)
        lengths = [chance.randint(1, len(tokens) - 1) for _ in range(3)]
        stride = chance.choice(("", f" --stride {chance.randint(1, min(lengths))}"))
        extend = [name for name, (_, fits) in EXTENSIONS.items() if pos in fits and not flags["random_positions"]]
        test = (f" --data_dir fuzz{seed} --split {split} --lengths {' '.join(map(str, lengths))}{stride} "
                f"--batch_tokens {chance.randint(1, 500)}" + f" --extend {' '.join(extend)}" * bool(extend))
        outcomes = []
        for run in "ab":
            for step in (f"{command} --out_dir {run}{seed}",
                         f"{command} --out_dir {run}{seed} --resume --max_iters {more}",
                         f"eval {run}{seed}/{pos} --csv {run}{seed}.csv{test}"):
                assert call(step) == 0, (seed, step, capsys.readouterr().err)
            rows = [row for row in read_csv(f"{run}{seed}.csv") if row.pop("checkpoint")]
            outcomes.append((results(f"{run}{seed}/{pos}"), rows))
        (one, rows), (other, rows_again) = outcomes
        assert same_results(one, other) and rows == rows_again, (seed, command)
        assert all(value.isfinite().all() for value in one[0].values()), (seed, command)
        assert all(math.isfinite(float(row[key])) for row in rows for key in ("loss", "ppl")), (seed, command)
        assert all(int(row["tokens"]) == len(tokens) - 1 for row in rows), (seed, command, test)
        assert all(math.isfinite(float(loss)) for line in one[1][1:] for loss in line[1:]), (seed, command)
        assert pos == "learned" or len(rows) == len(lengths) * (1 + len(extend))
        capsys.readouterr()
        for path in (f"a{seed}", f"b{seed}", f"fuzz{seed}"):
            shutil.rmtree(path)
        seed += 1
