"""`python -m pytest -k "formula and alibi"` holds one encoding against its formula; without -k all tests run.

Each test compares with something independent: a formula in plain loops, a published number, brute force, an
uninterrupted run. A new encoding is one short function below and its name in NAIVE; the tests that run over
POSITIONS come right after.
"""
import csv
import hashlib
import io
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import RLock, Thread
from unittest import mock

import numpy as np
import pytest
import torch

import data
import eval as evaluation       # not the builtin
import model as model_file
import train
from model import EXTENSIONS, GPT, POSITIONS, GPTConfig, attend, attention, make_mask

torch.set_num_threads(1)        # some tests fork
parametrize = pytest.mark.parametrize
every_encoding = parametrize("pos", POSITIONS)


# ---- the formulas: scores of head h (from 1) for a query at position i, a key at position j, in float64


def dot(q, k):
    return q @ k / math.sqrt(len(q))


def turning(q, k, distance, w, z=1.0):
    """RoPE's pairs (n, n + D/2) as complex numbers, where of two turns the difference is left; xPos's z."""
    q, k = (v[:len(w)] + 1j * v[len(w):] for v in (q, k))
    turns = np.exp(1j * w * distance) * z ** (distance / 512)
    return (q * k.conj() * turns).real.sum() / math.sqrt(2 * len(w))


def waves(D):
    return 10000.0 ** (-2 * np.arange(D // 2) / D)


def none(pos, q, k, *_):
    return dot(q, k)


def rotary(pos, q, k, i, j, *_):
    return turning(q, k, i - j, waves(len(q)))


def xpos(pos, q, k, i, j, *_):
    n, D = np.arange(len(q) // 2), len(q)
    return turning(q, k, i - j, waves(D), (2 * n / D + 0.4) / 1.4)


def hope(pos, q, k, i, j, *_):
    w = waves(len(q))
    return turning(q, k, i - j, np.where(w * pos.config.block_size < 2 * math.pi, 0, w))


def t5(pos, q, k, i, j, h, *_):
    n = i - j
    bucket = n if n < 16 else min(31, 16 + 16 * math.log(n / 16) / math.log(128 / 16))
    return dot(q, k) + math.sqrt(len(q)) * pos.t[int(bucket), h - 1].item()


def alibi(pos, q, k, i, j, h, *_):
    return dot(q, k) - 2 ** (-8 * h / pos.config.n_head) * (i - j)


def kerple(pos, q, k, i, j, h, *_):
    p, a = pos.p[h - 1].item(), pos.a[h - 1].item()
    return dot(q, k) - p * math.log(1 + a * (i - j))


def sandwich(pos, q, k, i, j, h, *_):
    n = np.arange(1, 65)
    return dot(q, k) + (np.cos((i - j) / 10000 ** (n / 64)).sum() - 64) * pos.config.n_head / (8 * h)


def fire(pos, q, k, i, j, h, *_):
    c, L = abs(pos.c.item()), abs(pos.L.item()) * pos.config.block_size / 4
    progress = math.log(1 + c * (i - j)) / (math.log(1 + c * max(L, i)) + 1e-6)
    w1, b1, w2, b2 = (np.array(p.tolist()) for p in pos.mlp.parameters())
    return dot(q, k) + w2[h - 1] @ np.maximum(0, w1[:, 0] * progress + b1) + b2[h - 1]


def fox(pos, q, k, i, j, h, layer, inputs):
    """The layer's normed inputs of the tokens after the key up to the query."""
    gate = pos.gates[layer].f
    w, b = gate.weight[h - 1].tolist(), gate.bias[h - 1].item()
    return dot(q, k) - sum(math.log(1 + math.exp(-x @ w - b)) for x in inputs)      # ln sigmoid


NAIVE = {"none": none, "learned": none, "sinusoidal": none, "rotary": rotary, "xpos": xpos, "hope": hope,
         "rnope": rotary, "hwfa": rotary, "t5": t5, "alibi": alibi, "kerple": kerple, "sandwich": sandwich,
         "fire": fire, "fox": fox}


def naive_embedding(pos, i, C):
    """What the token at position i gets: (C,)."""
    if pos.config.pos == "learned":
        vectors = np.array(pos.vectors.tolist())
        return [np.interp(i, range(len(vectors)), column) for column in vectors.T]
    if pos.config.pos == "sinusoidal":
        return np.stack((np.sin(i * waves(C)), np.cos(i * waves(C))), 1).flatten()
    return np.zeros(C)


def naive_layer(config, layer):
    """The score, the window and the log n of a layer."""
    window, logn = config.window, config.logn
    every = {"rnope": 4, "hwfa": config.n_layer}.get(config.pos)
    if every and layer % every == (config.n_layer - 1) % every:
        return none, 0, logn or config.pos == "hwfa"
    if every and not window:        # all such layers together reach 3/4 of the trained length
        window = 1 + (config.block_size * 3 // 4 - 1) // (every - 1)
    return NAIVE[config.pos], window, logn


def naive_attention(model, layer, positions, inputs, q, k, v):
    """(T, C) once, (T, H, D) three times -> (T, H, D), score by score."""
    score, window, logn = naive_layer(model.config, layer)
    out = np.zeros_like(v)
    for i, h in np.ndindex(q.shape[:2]):
        factor = max(1, math.log(i + 1) / math.log(model.config.block_size)) if logn else 1
        first = max(0, i - window + 1) if window else 0
        scores = [score(model.pos, factor * q[i, h], k[j, h], positions[i], positions[j], h + 1, layer,
                        inputs[j + 1:i + 1]) for j in range(first, i + 1)]
        out[i, h] = np.exp(scores) / np.exp(scores).sum() @ v[first:i + 1, h]
    return out


def naive_norm(x, weight):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight


def naive_loss(model, ids):
    """The whole model in float64: (T + 1,) -> (T,), the loss of each next token in nats."""
    w = {name: p.double().numpy() for name, p in model.state_dict().items()}
    T, C, H = len(ids) - 1, model.config.n_embd, model.config.n_head
    positions = [n * (model.config.random_positions or T) / T for n in range(T)]
    x = w["wte.weight"][ids[:-1]] * math.sqrt(C) + [naive_embedding(model.pos, i, C) for i in positions]
    for layer in range(model.config.n_layer):
        block = f"blocks.{layer}."
        inputs = naive_norm(x, w[block + "ln_1.weight"])
        qkv = (inputs @ w[block + "c_attn.weight"].T).reshape(T, 3, H, C // H).swapaxes(0, 1)
        y = naive_attention(model, layer, positions, inputs, *qkv)
        x = x + y.reshape(T, C) @ w[block + "attn_proj.weight"].T
        hidden = np.maximum(0, naive_norm(x, w[block + "ln_2.weight"]) @ w[block + "c_fc.weight"].T)
        x = x + hidden @ w[block + "mlp_proj.weight"].T
    logits = naive_norm(x, w["ln_f.weight"]) @ w["wte.weight"].T
    return np.log(np.exp(logits).sum(1)) - logits[range(T), ids[1:]]


# ---- every encoding ---------------------------------------------------------------------------------


def tiny_model(pos, sharp=1, **changes):
    """A tiny model with random position parameters; where weights are times `sharp`, attention matters."""
    torch.manual_seed(0)
    shape = dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**shape | {"pos": pos} | changes)).eval()
    for p in model.pos.parameters():
        p.data.uniform_(0.1, 1.0)
    for p in model.blocks.parameters():
        p.data *= sharp if p.dim() == 2 else 1
    return model


def tokens(n, vocab_size=11):
    return torch.randint(vocab_size, (1, n), generator=torch.Generator().manual_seed(0))


def close(found, wanted, tolerance=1e-4):
    wanted = torch.as_tensor(wanted).to(found.dtype)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@parametrize("window, logn, N", [(0, False, 0), (5, False, 0), (3, True, 30)])
@every_encoding
def test_model_is_its_formula(pos, window, logn, N):
    """Beyond the trained length, with what the encoding's parameters get; with N at 0, 1.5, 3, ..."""
    assert pos in NAIVE, "write its formula at the top of test_model.py and enter it in NAIVE"
    changes = dict(block_size=20 if pos == "learned" else 16, n_layer=6 if pos in ("rnope", "hwfa") else 2)
    model = tiny_model(pos, 12, window=window, logn=logn, random_positions=N, **changes)
    ids = tokens(21)
    loss = model(ids[:, :-1], ids[:, 1:])[0]
    close(loss, naive_loss(model, ids[0]))
    loss.sum().backward()
    for p in model.pos.parameters():
        step = torch.randn_like(p) * 1e-4
        sums = []
        for side in (1, -2):
            p.data += side * step
            sums.append(naive_loss(model, ids[0]).sum())
        p.data += step
        close((p.grad * step).sum() * 1e4, (sums[0] - sums[1]) * 5e3, 1e-2)


@every_encoding
def test_equal_start_and_decay_of_matrices(pos):
    """What an encoding trains does not decay."""
    plain, model = (tiny_model(name, vocab_size=30000) for name in ("none", pos))
    names = {p: re.sub(r"\.\d+", "", name) for name, p in model.named_parameters()}
    state = model.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in plain.state_dict().items())
    assert all(name in plain.state_dict() or name.startswith("pos.") for name in state)
    decay, rest = model.parameter_groups(0.1)
    assert {*decay["params"], *rest["params"]} == set(names)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    assert {names[p] for p in decay["params"]} == set(
        "wte.weight wte.bands.weight wte.bands.projection blocks.c_attn.weight blocks.attn_proj.weight "
        "blocks.c_fc.weight blocks.mlp_proj.weight".split())


# ---- attention --------------------------------------------------------------------------------------


def losses_and_gradients(model, ids):
    torch.manual_seed(0)        # of random positions
    loss = model(ids[:, :-1], ids[:, 1:])
    return loss, *torch.autograd.grad(loss.sum(), list(model.parameters()))


@parametrize("window, N", [(0, 0), (1, 0), (70, 0), (200, 0), (0, 999), (70, 999)])
@every_encoding
def test_attention_is_as_defined(pos, window, N, monkeypatch):
    """Three slices of queries; with N in training at random positions."""
    model = tiny_model(pos, 4, window=window, random_positions=N, block_size=300).train()
    fast = losses_and_gradients(model, tokens(301))
    monkeypatch.setattr(model_file, "make_mask", lambda encoding, window, i, *_: (encoding, window, i))
    monkeypatch.setattr(model_file, "attend", lambda q, k, v, mask, *_: attention(q, k, v, *mask))
    for pair in zip(fast, losses_and_gradients(model, tokens(301))):
        close(*pair, 2e-3)


@parametrize("pos", "none alibi t5 kerple xpos fire hwfa fox".split())      # all kinds of graphs
def test_compiled_with_flex_attention(pos, monkeypatch):
    """What a GPU compiles, run op by op on the CPU, FlexAttention by its reference."""
    model = tiny_model(pos, 4, block_size=150, window=50 if pos in ("none", "fox") else 0).train()
    slices = losses_and_gradients(model, tokens(151))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(model_file, "make_mask", lambda *args: make_mask(*args[:-1], True))
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager", fullgraph=True))
    for block in model.blocks:
        monkeypatch.setattr(block, "compile", lambda block=block: setattr(
            block, "forward", torch.compile(block.forward)))
    model.compile_parts()
    for pair in zip(losses_and_gradients(model, tokens(151)), slices):
        close(*pair, 2e-3)


@parametrize("pos", [pos for pos in POSITIONS if pos != "fire"])        # which may take T^2
def test_memory_grows_with_the_length_alone(pos):
    """A (H, T, T) array in float32 would take 288 MB here."""
    from resource import RUSAGE_SELF, getrusage

    def child():
        before = getrusage(RUSAGE_SELF).ru_maxrss
        evaluation.evaluate(tiny_model(pos, n_layer=1, block_size=6000), tokens(6000)[0], 5999)
        after = getrusage(RUSAGE_SELF).ru_maxrss
        return after - before > 200 * 2 ** (20 if sys.platform == "darwin" else 10)
    assert exit_code(fork(child)) == 0


def test_bfloat16_is_as_exact_with_a_bias_as_without():
    """At 2048 tokens, where bfloat16 has no distances: error against float64 at most twice that of none."""
    errors, i, x = {}, torch.arange(2048.0), torch.randn(1, 2048, 32)
    q, k, v = torch.randn(3, 1, 2, 2048, 16).bfloat16()
    for pos in ("none", "alibi", "fox"):
        encoding = defined = tiny_model(pos, n_embd=32).pos.layers[0][0]
        with torch.autocast("cpu", torch.bfloat16):
            rotated = encoding.rotate(q, k, None, x)
            fast = attend(*rotated, v, make_mask(encoding, math.inf, i, True, False), math.inf, 0.0)
        if pos == "fox":
            weight, bias = (p.double() for p in encoding.parameters())
            c = torch.nn.functional.logsigmoid(x[0].double() @ weight.T + bias).cumsum(0).T
            defined = mock.Mock(bias=lambda *_: c[:, :, None] - c[:, None])
        exact = attention(q.double(), k.double(), v.double(), defined, math.inf, i.double())
        errors[pos] = ((fast - exact).norm() / exact.norm()).item()
    assert max(errors.values()) < 2 * errors["none"] < 0.02


@torch.no_grad()
def test_masks_are_made_in_float32(monkeypatch):
    """Under autocast too, where FIRE's MLP would run in bfloat16."""
    made = []
    monkeypatch.setattr(model_file, "make_mask", lambda *args: made.append(make_mask(*args)) or made[-1])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tiny_model("fire").trunk(tokens(200))
    assert torch.equal(made[0][0], made[1][0])


# ---- published numbers ------------------------------------------------------------------------------


def test_slopes_of_the_paper():
    eight = [2.0 ** -n for n in range(1, 9)]
    assert model_file.slopes(8) == eight
    assert model_file.slopes(12) == pytest.approx(eight + [2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5])


def test_buckets_as_published():
    pos = tiny_model("t5", n_embd=2).pos        # D = 1: the table as it is
    pos.t.data = torch.arange(32.0)[:, None].repeat(1, 2)
    places = {0: 0, 15: 15, 16: 16, 17: 16, 20: 17, 32: 21, 64: 26, 127: 31, 128: 31, 299: 31}
    found = pos.bias(torch.tensor([*places])[:, None].float(), torch.zeros(1, 1))[0, :, 0]
    assert found.tolist() == [*places.values()]


@parametrize("pos, layers, full, window", [("hwfa", 12, [11], 35), ("hwfa", 16, [15], 26),
                                           ("rnope", 12, [3, 7, 11], 128), ("rnope", 3, [2], 192)])
def test_layers_that_see_all(pos, layers, full, window):
    """Window derived in the notes of kexue.fm/archives/9603 for N = 512 and alpha = 3/4."""
    found = tiny_model(pos, block_size=512, n_layer=layers).pos.layers
    assert [n for n, (_, window, _) in enumerate(found) if window == math.inf] == full
    assert {window for _, window, _ in found} == {window, math.inf}


@parametrize("D, L, kept", [(16, 256, 4), (64, 512, 16), (64, 1024, 18)])
def test_pairs_that_hope_turns(D, L, kept):
    cos, _ = tiny_model("hope", n_embd=2 * D, block_size=L).pos.turns(torch.tensor([0.0, 3.0]))
    assert (cos[1] != 1).tolist() == [n < kept for n in range(D // 2)]


def test_yarn_as_published():
    """Of the transformers library, at four times the trained length; queries and keys alike."""
    pos = tiny_model("rotary", n_embd=32, block_size=256).pos
    model_file.yarn(pos, 1024)
    unit = torch.tensor([1.0] * 8 + [0.0] * 8)
    for x in pos.rotate(unit, unit, pos.turns(torch.ones(1)), None):
        cos, sin = x.flatten().chunk(2)
        ratios = [1, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25, 0.25]
        close(torch.atan2(sin, cos) / torch.tensor(waves(16)), ratios)
        close(torch.hypot(cos, sin), torch.full((8,), 1.1386))


def test_parameters_of_the_paper():
    """fairseq's transformer_lm_wiki103 has 246,933,504; listed is where this model differs."""
    shape = dict(vocab_size=267735, block_size=512, n_layer=16, n_head=8, n_embd=1024)
    with torch.device("meta"):
        ours = sum(p.numel() for p in GPT(GPTConfig(pos="sinusoidal", **shape)).parameters())
    biases = 16 * (3072 + 1024 + 4096 + 1024 + 2 * 1024)        # of four linear layers and two norms a block
    assert ours + biases + 1024 ** 2 + 9 * 64 - 1024 == 246_933_504     # first band, dictionary, final norm


# ---- single encodings and extensions ----------------------------------------------------------------


def test_kerple_comes_back():
    """A head below 0.01 counts as 0.01 and goes on learning; a forward pass writes nothing."""
    pos = tiny_model("kerple").pos
    pos.p.data[0] = -0.5
    bias = pos.bias(torch.full((1, 1), 9.0), torch.zeros(1, 1))
    close(bias[0, 0, 0], -0.01 * math.log1p(9 * pos.a[0].item()))
    bias.sum().backward()
    assert pos.p.grad.abs().min() > 0.1 and pos.p[0] == -0.5


@parametrize("T, finite", [(2 ** 16, True), (73000, False)])
def test_xpos_ends_before_its_powers(T, finite):
    pos = tiny_model("xpos", n_embd=4).pos
    q, k = pos.rotate(*torch.ones(2, 1, 1, T, 2), pos.turns(torch.arange(float(T))), None)
    assert (q * k).isfinite().all() == finite == (T <= pos.max_length)


def test_random_positions():
    pos = tiny_model("none", random_positions=100).pos.train()
    drawn = torch.stack([pos.positions(16, "cpu") for _ in range(50)])
    assert (drawn.diff() > 0).all() and drawn.min() >= 0 and drawn.max() < 100 and len(drawn.unique()) > 90


@parametrize("name, pos", [(name, pos) for name, (_, names) in EXTENSIONS.items() for pos in names])
def test_extensions_change_nothing_at_the_trained_length(name, pos):
    model, ids, extend = tiny_model(pos), tokens(64), EXTENSIONS[name][0]
    plain = model.trunk(ids[:, :16])
    extend(model.pos, 64)
    longer = model.trunk(ids)
    assert torch.equal(plain, longer[:, :16]) == (name == "hierarchical") and longer.isfinite().all()
    for length in (16, 8):
        extend(model.pos, length)
        assert torch.equal(model.trunk(ids[:, :16]), plain)


def test_extensions_by_hand():
    rotary, learned = tiny_model("rotary").pos, tiny_model("learned").pos
    model_file.ntk(rotary, 64)
    cos, _ = rotary.turns(torch.ones(1))
    close(cos[0].arccos(), (10000 * 4 ** (8 / 6)) ** (-np.arange(4) / 4))
    p = learned.vectors.detach()
    model_file.interpolate(learned, 64)
    x = learned.embed(torch.zeros(1, 64, 16), learned.positions(64, "cpu"))[0]
    close(x[:, 0], np.interp(np.arange(64) / 4, np.arange(16), p[:, 0]))
    assert learned.max_length == 64
    model_file.interpolate(learned, 16)
    model_file.hierarchical(learned, 1000)
    u = (p - 0.4 * p[0]) / 0.6
    close(learned.vectors, torch.stack([0.4 * u[n // 16] + 0.6 * u[n % 16] for n in range(256)]))
    assert learned.max_length == 256


# ---- vocabulary and loss ----------------------------------------------------------------------------


def test_adaptive_vocabulary():
    """Against torch's of the same weights; in bfloat16 roughly the same. Its rows are the embeddings."""
    torch.manual_seed(0)
    mine, x, ids = model_file.AdaptiveVocabulary(50, 32, (10, 20)), torch.randn(50, 32), torch.arange(50)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(32, 50, [10, 20], div_value=4.0)
    for p in mine.parameters():
        p.data.normal_()
    theirs.head.weight.data = mine.weight.data
    for tail, band in zip(theirs.tail, mine.bands):
        tail[0].weight.data, tail[1].weight.data = band.projection.data, band.weight.data
    close(mine.log_probs(x), theirs.log_prob(x))
    close(-mine.loss(x, ids), theirs(x, ids).output)
    with torch.autocast("cpu", torch.bfloat16):
        close(-mine.loss(x, ids), theirs(x, ids).output, 0.1)
    rows = [mine.weight[:10], *(band.weight @ band.projection for band in mine.bands)]
    close(mine(ids), torch.cat(rows) * math.sqrt(32))


@parametrize("V", [20000, 70000])
def test_losses_are_log_probs_in_pieces(V):
    """In evaluation not many more than 2^24 logits are there at once; only the last targets cost any."""
    model, ids = tiny_model("none", vocab_size=V), tokens(1001, V)
    wanted = -model.log_probs(ids[:, :-1]).gather(2, ids[:, 1:, None])[..., 0]
    close(model(ids[:, :-1], ids[:, 1:]), wanted)
    with torch.no_grad(), mock.patch.object(model.wte, "loss", wraps=model.wte.loss) as loss:
        for last in (1000, 12):
            close(model(ids[:, :-1], ids[:, -last:]), wanted[:, -last:])
    pieces = [len(call.args[0]) for call in loss.call_args_list]
    assert max(pieces) < 840 and sum(pieces) == 1012


def fork(child, *args):
    """A process of its own, silent, that ends with what child(*args) returns."""
    def body():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        train.tqdm.set_lock(RLock())        # tqdm's own is shared between processes, also with killed ones
        os._exit(child(*args))
    process = multiprocessing.get_context("fork").Process(target=body, daemon=True)
    process.start()
    return process


def exit_code(process):
    """For a process that is killed a signal's number below zero."""
    process.join(100)
    return process.exitcode
