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
import resource
import shutil
import sys
import time
import zipfile
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import RLock, Thread
from unittest import mock

import numpy as np
import pytest
import torch

import data
import eval as evaluation  # not the builtin
import model as model_file
import train
from model import EXTENSIONS, GPT, POSITIONS, GPTConfig, Position, Vocabulary, attend, make_mask

torch.set_num_threads(1)        # some tests fork
parametrize = pytest.mark.parametrize
every_encoding = parametrize("pos", POSITIONS)


# ---- the formulas: scores of query i and key j in head h (from 1), in plain Python floats -----------


def dot(q, k):
    return sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q))


def turned(v, place, growth=0.0):
    """RoPE in pairs (n, n + D/2); with growth 1 or -1 also xPos's scale."""
    half, out = len(v) // 2, list(v)
    for n in range(half):
        angle = place * 10000 ** (-n / half)
        scale = ((n / half + 0.4) / 1.4) ** (growth * place / 512)
        out[n] = scale * (v[n] * math.cos(angle) - v[n + half] * math.sin(angle))
        out[n + half] = scale * (v[n] * math.sin(angle) + v[n + half] * math.cos(angle))
    return out


def none(pos, q, k, i, j, h):
    return dot(q, k)


def rotary(pos, q, k, i, j, h):
    return dot(turned(q, i), turned(k, j))


def xpos(pos, q, k, i, j, h):
    return dot(turned(q, i, growth=1), turned(k, j, growth=-1))


def t5(pos, q, k, i, j, h):
    n = i - j
    bucket = n if n < 16 else min(31, 16 + math.floor(16 * math.log(n / 16) / math.log(128 / 16)))
    return dot(q, k) + math.sqrt(len(q)) * pos.table[bucket, h - 1].item()


def alibi(pos, q, k, i, j, h):
    return dot(q, k) - 2 ** (-8 * h / pos.config.n_head) * (i - j)


def kerple(pos, q, k, i, j, h):
    return dot(q, k) - pos.p[h - 1].item() * math.log(1 + pos.a[h - 1].item() * (i - j))


def sandwich(pos, q, k, i, j, h):
    waves = sum(math.cos((i - j) / 10000 ** (n / 64)) for n in range(1, 65))
    return dot(q, k) + (waves - 64) * pos.config.n_head / (8 * h)


def fire(pos, q, k, i, j, h):
    c, L = abs(pos.c.item()), abs(512 * pos.L.item())
    x = math.log(c * (i - j) + 1) / (math.log(c * max(L, i) + 1) + 1e-6)
    w1, b1, w2, b2 = (p.tolist() for p in pos.mlp.parameters())
    hidden = [max(0, w * x + b) for [w], b in zip(w1, b1)]
    return dot(q, k) + b2[h - 1] + sum(w * a for w, a in zip(w2[h - 1], hidden))


NAIVE = {"none": none, "learned": none, "sinusoidal": none, "rotary": rotary, "t5": t5, "alibi": alibi,
         "kerple": kerple, "sandwich": sandwich, "xpos": xpos, "fire": fire, "hwfa": rotary}


def learned_embedding(pos, i, n, C):
    return pos.table[i, n].item()


def sinusoidal_embedding(pos, i, n, C):
    wave = math.cos if n % 2 else math.sin
    return wave(i / 10000 ** (2 * (n // 2) / C))


# what coordinate n of C gets at position i
NAIVE_EMBEDDING = {"learned": learned_embedding, "sinusoidal": sinusoidal_embedding}


def naive_layer(config, layer):
    """The score, the window and the log n of a layer."""
    if config.pos != "hwfa":
        return NAIVE[config.pos], config.window, config.logn
    if layer == config.n_layer - 1:
        return none, 0, True
    return rotary, config.window or config.block_size * 3 // 4, config.logn     # where two layers are all


def naive_attention(model, layer, positions, q, k, v):
    """(T, H, D) three times -> (T, H, D), score by score."""
    score, window, logn = naive_layer(model.config, layer)
    out = np.zeros_like(v)
    for i, h in np.ndindex(q.shape[:2]):
        factor = max(1, math.log(i + 1) / math.log(model.config.block_size)) if logn else 1
        query, seen = (factor * q[i, h]).tolist(), range(max(0, i - window + 1) if window else 0, i + 1)
        scores = [score(model.pos, query, k[j, h].tolist(), positions[i], positions[j], h + 1) for j in seen]
        out[i, h] = np.exp(scores) / np.exp(scores).sum() @ v[seen.start:seen.stop, h]
    return out


def naive_norm(x, weight):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight


def naive_loss(model, idx, targets):
    """The whole model in float64: a list of the targets' losses in nats."""
    w = {name: p.double().numpy() for name, p in model.state_dict().items()}
    T, C, H = len(idx), model.config.n_embd, model.config.n_head
    x = w["wte.head"][idx] * math.sqrt(C)
    positions = [n * (model.config.random_positions or T) // T for n in range(T)]
    if model.config.pos in NAIVE_EMBEDDING:
        embedding = NAIVE_EMBEDDING[model.config.pos]
        x += [[embedding(model.pos, i, n, C) for n in range(C)] for i in positions]
    for layer in range(model.config.n_layer):
        block = f"blocks.{layer}."
        qkv = naive_norm(x, w[block + "ln_1.weight"]) @ w[block + "c_attn.weight"].T
        y = naive_attention(model, layer, positions, *qkv.reshape(T, 3, H, C // H).swapaxes(0, 1))
        x = x + y.reshape(T, C) @ w[block + "attn_proj.weight"].T
        hidden = np.maximum(0, naive_norm(x, w[block + "ln_2.weight"]) @ w[block + "c_fc.weight"].T)
        x = x + hidden @ w[block + "mlp_proj.weight"].T
    logits = naive_norm(x, w["ln_f.weight"]) @ w["wte.head"].T
    return np.log(np.exp(logits).sum(1)) - logits[range(T), targets]


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


@parametrize("window, logn, N", [(0, False, 0), (5, False, 0), (3, True, 40)])
@every_encoding
def test_model_is_its_formula(pos, window, logn, N):
    """Beyond the trained length; with N at every second position."""
    assert pos in NAIVE, "write its formula at the top of test_model.py and enter it in NAIVE"
    length = 20 if pos == "learned" and not N else 16
    model = tiny_model(pos, 12, window=window, logn=logn, random_positions=N, block_size=length)
    if pos == "fire":
        model.pos.L.data.fill_(0.02)        # its threshold, 512 L, lies within the text
    ids = tokens(21)
    naive = naive_loss(model, ids[0, :-1].tolist(), ids[0, 1:].tolist())
    close(model(ids[:, :-1], ids[:, 1:])[0].double(), naive)


@parametrize("window, logn", [(0, False), (4, True)])
@every_encoding
def test_causal_and_window(pos, window, logn):
    """In one layer a token counts for itself and the window - 1 after it; hwfa's only layer has none."""
    model, ids = tiny_model(pos, n_layer=1, window=window, logn=logn), tokens(16)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 11
    moved = (model.trunk(ids) - model.trunk(changed))[0].abs().amax(1) > 1e-5
    reach = window if window and pos != "hwfa" else 16
    assert moved.tolist() == [2 <= i < 2 + reach for i in range(16)]


@every_encoding
def test_relative_is_told_truly(pos, monkeypatch):
    """Where it is, but for embeddings, distances alone matter. FIRE sees places beyond 512 L."""
    model, ids, near = tiny_model(pos, random_positions=64), tokens(16), 4 * torch.arange(16.0)
    start, far = model.trunk(ids), near + (3 if pos == "learned" else 1000)
    one, two = (model.pos.bias(i[:, None], torch.minimum(i[:, None], i)) for i in (near, far))
    assert torch.equal(one, two) == model.pos.relative
    monkeypatch.setattr(model.pos, "positions", lambda T, device: far)
    moved = (model.trunk(ids) - start).abs().max()
    distances_alone = type(model.pos).embed is Position.embed and model.pos.relative
    assert moved < 1e-5 if distances_alone else moved > 1e-3


@every_encoding
def test_overfits_one_batch(pos):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=32, pos=pos))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=6e-3)
    ids = torch.randint(11, (4, 17))
    for _ in range(40):
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.2        # from ln(11) = 2.4


@every_encoding
def test_start_from_equal_weights(pos):
    plain, state = tiny_model("none").state_dict(), tiny_model(pos).state_dict()
    assert all(torch.equal(p, state[name]) for name, p in plain.items())
    assert all(name in plain or name.startswith("pos.") for name in state)


@every_encoding
def test_weight_decay_is_for_matrices(pos):
    model = tiny_model(pos, vocab_size=30000)
    names = {p: name for name, p in model.named_parameters()}
    decay, rest = model.parameter_groups(0.1)
    assert {*decay["params"], *rest["params"]} == set(names)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    assert {names[p].split(".")[-2] for p in decay["params"]} == {
        "wte", "tails", "projections", "c_attn", "attn_proj", "c_fc", "mlp_proj"}


# ---- single encodings and extensions ----------------------------------------------------------------


def test_slopes_of_the_paper():
    eight = [2.0 ** -n for n in range(1, 9)]
    for slopes in (eight, eight + [2.0 ** -x for x in (0.5, 1.5, 2.5, 3.5)]):
        pos = tiny_model("alibi", n_head=len(slopes), n_embd=48).pos
        close(-pos.bias(torch.ones(1, 1), torch.zeros(1, 1)).flatten(), slopes)


def test_buckets_as_published():
    pos = tiny_model("t5", n_embd=2).pos        # D = 1: the table as it is
    pos.table.data = torch.arange(32.0)[:, None].repeat(1, 2)
    places = {0: 0, 15: 15, 16: 16, 17: 16, 20: 17, 32: 21, 64: 26, 127: 31, 128: 31, 299: 31}
    found = pos.bias(torch.tensor([*places])[:, None].float(), torch.zeros(1, 1))[0, :, 0]
    assert found.tolist() == [*places.values()]


def test_kerple_comes_back():
    """The authors project the parameters: a head below 0.01 is put there, and goes on learning."""
    pos = tiny_model("kerple").pos
    pos.p.data[0] = -0.5
    bias = pos.bias(torch.full((1, 1), 9.0), torch.zeros(1, 1))
    close(bias[0, 0, 0], -0.01 * math.log1p(9 * pos.a[0].item()))
    bias.sum().backward()
    assert pos.p.grad.abs().min() > 0.1


@parametrize("T, finite", [(2 ** 16, True), (73000, False)])
def test_xpos_ends_before_its_powers(T, finite):
    """Beyond, float32 cannot hold them; eval.py leaves out what is longer than max_length."""
    pos, i = tiny_model("xpos", n_embd=4).pos, torch.arange(float(T))
    q, k = pos.rotate(*torch.ones(2, 1, 1, T, 2), i)
    assert (q * k).isfinite().all() == finite == (T <= pos.max_length)


@parametrize("layers, window", [(12, 35), (16, 26)])
def test_hwfa_window_of_the_blog(layers, window):
    """Derived in the notes of kexue.fm/archives/9603 for N = 512 and alpha = 3/4."""
    with torch.device("meta"):
        pos = GPT(GPTConfig(pos="hwfa", block_size=512, n_layer=layers)).pos
    assert [layer.config.window for layer in pos.layers] == [window] * (layers - 1) + [0]


def test_random_positions():
    pos = tiny_model("none", random_positions=100).pos
    pos.train()
    drawn = torch.stack([pos.positions(16, "cpu") for _ in range(50)])
    assert (drawn.diff() > 0).all() and drawn.min() >= 0 and drawn.max() < 100 and len(drawn.unique()) > 90


@parametrize("name, pos", [(name, pos) for name, (_, fits) in EXTENSIONS.items() for pos in fits])
def test_extensions_change_nothing_at_the_trained_length(name, pos):
    model, ids, longer, extend = tiny_model(pos), tokens(16), tokens(64), EXTENSIONS[name][0]
    plain = model.trunk(ids)
    extend(model.pos, 64)
    long = model.trunk(longer)
    assert torch.equal(plain, long[:, :16]) == (name == "hierarchical") and long.isfinite().all()
    for length in (16, 8):
        extend(model.pos, length)
        assert torch.equal(model.trunk(ids), plain)


def test_extensions_by_hand():
    turning, linear = tiny_model("rotary").pos, tiny_model("alibi").pos
    model_file.ntk(turning, 64)
    assert turning.base == pytest.approx(10000 * 4 ** (8 / 6))
    model_file.interpolate(linear, 64)
    close(linear.positions(64, "cpu"), [n / 4 for n in range(64)])


def test_a_table_and_its_end():
    """Interpolated between its rows; hierarchical up to its square; at random positions without an end."""
    pos = tiny_model("learned").pos
    p, end = pos.table.detach(), pos.max_length
    model_file.interpolate(pos, 64)
    assert (end, pos.max_length) == (16, 64)
    x = pos.embed(torch.zeros(1, 64, 16), pos.positions(64, "cpu"))[0]
    close(x[:, 0], np.interp(np.arange(64) / 4, np.arange(16), p[:, 0]))
    model_file.interpolate(pos, 16)
    model_file.hierarchical(pos, 1000)
    u = (p - 0.4 * p[0]) / 0.6
    close(pos.table, torch.stack([0.4 * u[n // 16] + 0.6 * u[n % 16] for n in range(256)]))
    assert [pos.max_length, tiny_model("learned", random_positions=99).pos.max_length] == [256, math.inf]


# ---- masks and attention, against the plain form ----------------------------------------------------


def plain_attention(q, k, v, pos, i):
    """All scores at once: (B, H, T, D) three times, positions (T,)."""
    place = torch.arange(len(i))
    query = place[:, None]
    hidden = (place > query) | (place <= query - (pos.config.window or len(i)))
    bias = pos.bias(i[query], i[torch.minimum(query, place)])
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    return torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v


def same_gradients(fast, slow, leaves):
    weight = torch.randn_like(fast)
    for pair in zip(*(torch.autograd.grad(y, leaves, weight) for y in (fast, slow))):
        close(*pair, 2e-3)


@parametrize("window", [0, 1, 70, 200])
@parametrize("pos, N", [("none", 0), ("t5", 0), ("alibi", 0), ("kerple", 0), ("sandwich", 0), ("fire", 0),
                        ("alibi", 999)])
def test_slices_are_plain_attention(pos, N, window):
    """Three slices of queries, forward and gradients; once in training at random positions below N."""
    pos = tiny_model(pos, window=window, random_positions=N, block_size=300).pos.train()
    qkv, i = torch.randn(3, 2, 2, 300, 8).requires_grad_(), pos.positions(300, "cpu")
    fast = attend(*qkv, make_mask(pos, i, False), window, 0.0)
    slow = plain_attention(*qkv, pos, i)
    close(fast, slow, 1e-3)
    same_gradients(fast, slow, [qkv, *pos.parameters()])


@parametrize("pos, window", [("alibi", 0), ("t5", 40), ("kerple", 0), ("none", 9)])
def test_fused_kernel_by_its_reference(pos, window, monkeypatch):
    """What FlexAttention is given on a GPU, run by its reference on the CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    pos, i = tiny_model(pos, window=window).pos, torch.arange(200.0)
    qkv = torch.randn(3, 1, 2, 200, 8).requires_grad_()
    line, blocks = make_mask(pos, i, True)
    assert line.shape == (2, 399)       # a row for each head, though none's are all the same
    fused, slow = attend(*qkv, (line, blocks), window, 0.0), plain_attention(*qkv, pos, i)
    close(fused, slow, 1e-3)
    same_gradients(fused, slow, [qkv, *pos.parameters()])


@parametrize("pos", ["none", "learned", "t5", "xpos", "fire", "hwfa"])       # all kinds of graphs
def test_compiled_and_fused(pos, monkeypatch):
    """The graphs that a GPU compiles, run op by op on the CPU: the gradients are those of the slices."""
    T, window = 150, 50 if pos == "none" else 0
    model = tiny_model(pos, 4, n_layer=1 + (pos == "hwfa"), n_embd=32, block_size=T, window=window).train()
    ids, leaves = tokens(T + 1), list(model.parameters())
    slices = model(ids[:, :-1], ids[:, 1:])
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(model_file, "make_mask", lambda pos, i, fused: make_mask(pos, i, True))
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager", fullgraph=True))
    model.compile_parts()
    same_gradients(model(ids[:, :-1], ids[:, 1:]), slices, leaves)


@parametrize("pos", [pos for pos in POSITIONS if pos != "fire"])        # which may take T^2
def test_memory_grows_with_the_length_alone(pos):
    """A (H, T, T) array in float32 would take 288 MB here."""
    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        evaluation.evaluate(tiny_model(pos, n_layer=1, block_size=6000), tokens(6000)[0], 5999)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return after - before > 200 * 2 ** (20 if sys.platform == "darwin" else 10)
    assert exit_code(fork(child)) == 0


def test_bfloat16_is_as_exact_with_a_bias_as_without():
    """At 2048 tokens, where bfloat16 has no distances: error against float64 at most twice that of none."""
    errors, i = [], torch.arange(2048.0)
    qkv = torch.randn(3, 1, 2, 2048, 32).bfloat16()
    for pos in (tiny_model("none").pos, tiny_model("alibi").pos):
        exact = plain_attention(*qkv.double(), pos, i.double())
        error = attend(*qkv, make_mask(pos, i, False), 0, 0.0) - exact
        errors.append((error.norm() / exact.norm()).item())
    assert errors[1] < 2 * errors[0] < 0.02


@torch.no_grad()
def test_masks_are_made_in_float32(monkeypatch):
    """Under autocast too, where FIRE's MLP would run in bfloat16."""
    made = []
    monkeypatch.setattr(model_file, "make_mask", lambda *args: made.append(make_mask(*args)) or made[-1])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tiny_model("fire").trunk(tokens(200))
    torch.testing.assert_close(*made, rtol=0, atol=0)


# ---- vocabulary and loss ----------------------------------------------------------------------------


def test_adaptive_softmax():
    """Against torch's of the same weights; in bfloat16 roughly the same. Its rows are the embeddings."""
    torch.manual_seed(0)
    mine, x, ids = Vocabulary(50, 32, cutoffs=(10, 20)), torch.randn(50, 32), torch.arange(50)
    for p in mine.parameters():
        p.data.normal_()
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(32, 50, [10, 20], div_value=4.0, head_bias=False)
    theirs.head.weight.data = mine.head.data
    for layers, *ours in zip(theirs.tail, mine.projections, mine.tails):
        layers[0].weight.data, layers[1].weight.data = (p.data for p in ours)
    loss = torch.stack([mine.loss(row.expand(50, 32), ids) for row in x])
    close(-loss, theirs.log_prob(x))
    close((-loss).exp().sum(1), torch.ones(50))
    with torch.autocast("cpu", torch.bfloat16):
        close(mine.loss(x, ids), loss.diagonal(), 0.1)
    bands = [tail @ projection for tail, projection in zip(mine.tails, mine.projections)]
    close(mine(ids), torch.cat([mine.head[:10], *bands]) * math.sqrt(32))      # tied


def test_loss_in_pieces():
    """In evaluation 2^25 logits at most stand in memory at once; only the last targets cost any."""
    model, ids = tiny_model("none", vocab_size=2 ** 20), tokens(61, 2 ** 20)
    whole = model(ids[:, :-1], ids[:, 1:])
    with torch.no_grad(), mock.patch.object(model.wte, "loss", wraps=model.wte.loss) as loss:
        for last in (60, 12):
            close(model(ids[:, :-1], ids[:, -last:]), whole[:, -last:])
    pieces = [len(call.args[0]) for call in loss.call_args_list]
    assert len(pieces) > 2 and max(pieces) <= 32 and sum(pieces) == 60 + 12


def test_parameters_of_the_paper():
    """fairseq's transformer_lm_wiki103 has 246,933,504; listed is where this model differs."""
    shape = dict(vocab_size=267735, block_size=512, n_layer=16, n_head=8, n_embd=1024)
    with torch.device("meta"):
        ours = sum(p.numel() for p in GPT(GPTConfig(pos="sinusoidal", **shape)).parameters())
    biases = 16 * (3072 + 1024 + 4096 + 1024 + 2 * 1024)        # of four linear layers and two norms a block
    assert ours + biases + 1024 ** 2 + 9 * 64 - 1024 == 246_933_504     # first band, dictionary, final norm


# ---- the two programs, in this process --------------------------------------------------------------

BASE = {"train": "--preset quick --data corpus --tokenizer word --data_dir store --out_dir out --device cpu "
                 "--block_size 8 --batch_size 2 --n_layer 1 --n_head 2 --n_embd 16 --max_iters 6 "
                 "--eval_interval 3 --warmup_iters 2 --learning_rate 0.01",
        "eval": "--lengths 8 --data_dir store --device cpu"}


def call(command):
    """What "train FLAGS" or "eval FLAGS" does on top of BASE: exit code, standard output, standard error."""
    program, *flags = command.split()
    argv = [f"{program}.py", *BASE[program].split(), *flags]
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with mock.patch.multiple(sys, argv=argv, stdout=out, stderr=err), pytest.raises(SystemExit) as stop:
        evaluation.run({"train": train, "eval": evaluation}[program].main)
        sys.exit(0)
    code = stop.value.code
    if isinstance(code, str):       # Python prints it and ends with 1
        code = err.write(f"{code}\n") and 1
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def works(command):
    """Standard output of a command that must end well."""
    code, out, err = call(command)
    assert code == 0, err
    return out


def table(command):
    """The labels of the table that a command prints, and the cells of each line."""
    lines = works(command).partition("\nencoding ")[2].partition("\nfails: ")[0].splitlines()[1:]
    cells = [re.split("  +", line.replace(" 8 ", "  8  ", 1)) for line in lines]
    return [label for label, *_ in cells], [line[2:] for line in cells]


def contents(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(command, phrase):
    """An exit code, one line on standard error with `phrase` in it, nothing lost, nothing half-written."""
    before, (code, _, err), after = contents(), call(command), contents()
    assert code and phrase in err.splitlines()[-1], (code, err)
    assert err.count("\n") == 1 or err.startswith("usage:"), err        # argparse says more
    assert before.items() <= after.items() and not list(Path().rglob("*.tmp"))


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


def write_corpus(folder, *texts):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, text in zip(data.SPLITS, texts):
        Path(folder, f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        os.utime(Path(folder, f"{split}.txt"), (1, 1))
    return folder


def random_words(seed):
    chance = random.Random(seed)
    return [" ".join(f"w{chance.randrange(30)}" for _ in range(size)) + "\n" for size in (400, 150, 150)]


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def column(path, key):
    """Numbers of a CSV."""
    return [float(row[key]) for row in read_csv(path)]


def load_run(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)


def learned_in(folder):
    """The weights of a run, in bytes, and the steps and losses in its log."""
    weights = {name: p.numpy().tobytes() for name, p in load_run(folder)["model"].items()}
    return weights, [column(Path(folder, "log.csv"), key) for key in ("step", "train_loss", "valid_loss")]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A folder with two corpora and three trained runs."""
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_corpus("corpus", *random_words(1))
        write_corpus("other", *random_words(2))
        works("train --pos alibi rotary learned")
    return folder


@pytest.fixture
def here(example, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(example, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- data -------------------------------------------------------------------------------------------

@parametrize("texts, words, ids", [
    # blank lines, unknown words, no last newline; by count b 3, <eos> 3, c 2, a 1, <unk> (0)
    ([b" b c b \n\n a  c b", b"b new\n \n", b"c"], "b <eos> c a <unk>",
     [[0, 2, 0, 1, 1, 3, 2, 0, 1], [0, 4, 1, 1], [2, 1]]),
    # a byte order mark
    ([b"\xef\xbb\xbfa b a\n", b"\xef\xbb\xbfa\n", b"b"], "a b <eos> <unk>", [[0, 1, 0, 2], [0, 2], [1, 2]]),
    ([bytes(range(256)), b"\xff\x00", b"\n"], "", [list(range(256)), [255, 0], [10]])], ids=range(3))
def test_words_and_bytes_by_hand(texts, words, ids, tmp_path):
    write_corpus(tmp_path, *texts)
    for _ in range(2):      # the second time from the cache
        corpus = data.load(tmp_path, "word" if words else "byte", tmp_path)
        assert corpus.words == words.split() and [split.tolist() for split in corpus[:3]] == ids


def test_text_under_a_vocabulary(tmp_path):
    """Of more words than two bytes can count; one that it lacks is <unk>."""
    write_corpus(tmp_path, "69999 new 7\n")
    words = [*map(str, range(70000)), "<eos>", "<unk>"]
    assert data.read_split([tmp_path / "train.txt"], words).tolist() == [69999, 70001, 7, 70000]


def test_cache_is_used_until_something_changes(tmp_path, monkeypatch):
    text, read = write_corpus(tmp_path, "", "a", "b") / "train.txt", mock.Mock(wraps=data.read_split)
    monkeypatch.setattr(data, "read_split", read)
    # another size, another time, another tokeniser, another version of them
    for change in (("a b c", 1, "word"), ("a b", 1, "word"), ("b b", 2, "word"), ("b b", 2, "byte"), None):
        content, time, tokenizer = change or ("b b", 2, "byte")
        text.write_text(content)
        os.utime(text, (time, time))
        monkeypatch.setattr(data, "VERSION", data.VERSION + (change is None))
        one, two = (data.load(tmp_path, tokenizer, tmp_path) for _ in range(2))
        assert torch.equal(one.train, two.train) and one.words == two.words and read.call_count == 3
        read.reset_mock()


def test_cache_knows_texts_apart(tmp_path, monkeypatch):
    """Two of the same name as the user wrote it, of equal size and time."""
    for folder, text in (("one", b"a a b"), ("two", b"b a a")):
        write_corpus(tmp_path / folder / "corpus", text, "a", "b")
        monkeypatch.chdir(tmp_path / folder)
        assert bytes(data.load("corpus", "byte", tmp_path).train.tolist()) == text


def test_stdlib_splits_are_apart():
    train, valid, test = map(set, data.stdlib_files().values())
    assert train and valid and test and not (train & valid or train & test or valid & test)


def test_download(here, monkeypatch):
    """A wrong zip is refused, the right one fetched once, not by urllib's name; or it is put by hand."""
    agents = []

    class Mirror(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            agents.append(self.headers["User-Agent"])

    with zipfile.ZipFile("wikitext-2-v1.zip", "w") as archive:
        for split in data.SPLITS:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", f" a b <unk> {split} \n" * 40)
    right = hashlib.sha256(Path("wikitext-2-v1.zip").read_bytes()).hexdigest()
    with HTTPServer(("127.0.0.1", 0), Mirror) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "MIRROR", f"http://127.0.0.1:{server.server_port}/")
        refused("train --data wikitext-2", "damaged")
        assert not Path("store/wikitext-2").exists()
        monkeypatch.setitem(data.SHA256, "wikitext-2", right)
        for _ in range(2):
            works("train --data wikitext-2 --overwrite --out_dir new")
        server.shutdown()
    assert len(agents) == 2 and "urllib" not in agents[0]
    shutil.rmtree("store/wikitext-2")
    refused("train --data wikitext-2", "wikitext-2-v1.zip")
    shutil.move("wikitext-2-v1.zip", "store")
    assert data.load("wikitext-2", "word", "store").words == ["a", "b", "<unk>", "train", "<eos>"]


# ---- how lengths are compared -----------------------------------------------------------------------


@parametrize("n, length, stride", [(50, 16, None), (49, 16, None), (50, 16, 5), (33, 16, 16), (17, 16, 1),
                                   (2, 1, 1), (47, 8, 3)])
def test_every_target_counts_once(n, length, stride):
    """Against one forward for each target, in the window that the protocol gives it, hiding what follows."""
    model, stream = tiny_model("sinusoidal", random_positions=99), tokens(n)[0]
    expected, step = torch.zeros(2, length), stride or length
    for target in range(1, n):
        start = max(0, math.ceil((target - length) / step)) * step
        place = target - start - 1
        ids = torch.nn.functional.pad(stream[start:target], (0, length - place - 1))[None]
        loss = model(ids, stream[target].expand(1, length))[0, place]
        expected[:, place] += torch.tensor([loss.item(), 1])
    with mock.patch.object(model.wte, "loss", wraps=model.wte.loss) as loss:
        for batch_tokens in (1, 64):
            found = evaluation.evaluate(model, stream, length, stride, batch_tokens=batch_tokens)
            close(found, expected, 1e-3)
    # what does not count costs no logits
    assert sum(len(call.args[1]) for call in loss.call_args_list) < 2 * (n - 1 + step)


def test_evaluation_leaves_training_alone():
    model, stream = tiny_model("none", dropout=0.5, random_positions=50).train(), tokens(100)[0]
    state = torch.get_rng_state()
    assert torch.equal(*(evaluation.evaluate(model, stream, 16) for _ in range(2)))
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_by_position(here):
    """The spans, weighted by their counts, give the loss of the whole; the table has a column for each."""
    works("eval out/alibi --lengths 12 --csv whole.csv")
    _, head, line = works("eval out/alibi --lengths 12 --by_position --csv spans.csv").splitlines()
    assert "fails" not in works("eval out/alibi --by_position")
    first, last, counts, loss = (column("spans.csv", key) for key in "first last tokens loss".split())
    assert (first, last, head.split()[2:]) == ([1, 2, 3, 5, 9], [1, 2, 4, 8, 12], "1 2 4 8 12".split())
    assert counts == [sum(a <= n % 12 + 1 <= b for n in range(150)) for a, b in zip(first, last)]
    assert column("whole.csv", "loss") == pytest.approx([np.average(loss, weights=counts)], rel=1e-5)
    assert line.split() == ["alibi", "at", "12", "8", *(f"{math.exp(x):.2f}" for x in loss)]


def test_table_and_csv(here):
    flags = "--stride 4 --lengths 8 12 --csv t.csv --window 4 --logn --split test"
    labels, [first, second] = table(f"eval out/alibi out/learned/ckpt.pt {flags}")
    assert labels == ["alibi + logn + window 4", "learned + logn + window 4"]
    assert second[1:] == ["-", "fails from 12"]
    loss = column("t.csv", "loss")
    assert first[:2] + second[:1] == [f"{math.exp(x):.2f}" for x in loss]
    head, *lines = Path("t.csv").read_text().splitlines()
    assert head == ("pos,train_length,length,stride,split,tokens,loss,ppl,extend,window,logn,"
                    "random_positions,seed,checkpoint,data")
    for line, x, start in zip(lines, loss, ("alibi,8,8", "alibi,8,12", "learned,8,8"), strict=True):
        assert line.startswith(f"{start},4,test,150,{x},")
        assert line.endswith(f",,4,1,0,1337,out/{start.split(',')[0]}/ckpt.pt,corpus")


def test_eval_measures_what_training_measured(here):
    os.symlink(shutil.move("out/rotary", here / "moved"), "out/rotary")
    works("eval out out/alibi moved --lengths 8 16 32 64 128 --csv t.csv --batch_tokens 99")
    again, before = (column(file, "loss") for file in ("t.csv", "out/extrapolation.csv"))
    assert again == pytest.approx(before, rel=1e-4) and len(again) == 11        # each checkpoint once
    write_corpus("strange", "", "w1 new\n")
    Path("strange/train.txt").unlink()      # valid is enough
    assert "per word (33.3% <unk>), valid" in works("eval out/alibi --lengths 2 --data strange")
    assert before[0] == pytest.approx(column("out/alibi/log.csv", "valid_loss")[-1])


def test_options_of_the_checkpoint(here):
    """A window and log n of the training hold unless others are named; 0 and --no-logn end them."""
    works("train --window 4 --logn --out_dir new")
    found = []
    for flags in ("", "--window 4 --logn", "--window 0", "--window 99", "--no-logn", "--window 0 --no-logn"):
        works(f"eval new --lengths 16 --csv t.csv {flags}")
        found += column("t.csv", "loss")
    kept, same, all_seen, wide, unscaled, neither = found
    assert kept == same and all_seen == pytest.approx(wide, rel=1e-5)
    assert len({round(loss, 5) for loss in (kept, all_seen, unscaled, neither)}) == 4


def test_seeds_share_a_line(here):
    """Runs that differ in seed and folder alone: mean ± std, and CSV rows for each; all others apart."""
    for seed in (1, 2, 3):
        works(f"train --seed {seed} --out_dir seeds/{seed} --eval_interval {seed} --pos alibi learned")
    works("train --learning_rate 0.02 --out_dir seeds/4")
    labels, [first, second, third] = table("eval seeds --lengths 8 16 --csv t.csv")
    assert labels == ["alibi", "learned", "alibi in seeds/4/alibi"]
    *ppl, short, long = column("t.csv", "ppl")
    ppl = np.reshape(ppl, (3, 3))       # alibi at 8, at 16, learned at 8, of each seed
    cells = [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(ppl.mean(0), ppl.std(0, ddof=1))]
    assert second == [cells[2], "-", "fails from 16"]
    assert first[:2] + third[:2] == cells[:2] + [f"{short:.2f}", f"{long:.2f}"]


@parametrize("flag", ("batch_size 3", "grad_accum 2", "max_iters 7", "dropout 0.1", "n_embd 8", "data other"))
def test_another_recipe_has_its_folder_in_its_label(flag, here):
    works(f"train --seed 7 --{flag} --out_dir [deep]/er")
    labels, _ = table("eval out/alibi [deep]")
    assert labels == ["alibi", "alibi in [deep]/er/alibi"]


def test_extensions_have_lines_of_their_own(here):
    works("train --pos rotary --out_dir drawn --random_positions 20")
    labels, _ = table("eval out/rotary drawn --extend interpolate ntk hierarchical")
    assert labels == ["rotary", "rotary + interpolate", "rotary + ntk", "rotary + random_positions 20"]


@parametrize("ppl, verdict", [
    ({8: [2], 16: [2.019], 32: [1]}, "holds"), ({8: [2], 16: [2.021], 32: [1]}, "fails from 16"),
    ({8: [1, 3], 16: [3, 1]}, "holds"), ({8: [2], 32: [math.nan], 16: [2]}, "fails from 32"),
    ({8: [2], 16: [math.inf]}, "fails from 16"), ({8: [math.inf], 16: [math.inf]}, "fails from 16"),
    ({8: [math.nan], 16: [2]}, "fails from 16"), ({4: [9], 8: [2]}, ""), ({16: [2], 32: [2]}, "")])
def test_verdict(ppl, verdict):
    """None without the trained length and a longer one."""
    assert evaluation.verdict(8, ppl) == verdict and evaluation.cell([math.inf]) == "inf"


def test_figure(here):
    pytest.importorskip("matplotlib")
    works("eval out --lengths 8 16 --plot figure.png")
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")


# ---- training and resuming --------------------------------------------------------------------------


def test_train_from_the_command_line(here, monkeypatch):
    """The table and its CSV have the other runs of OUT_DIR, too."""
    monkeypatch.setenv("WORLD_SIZE", "2")       # left over: it was not torchrun
    labels, _ = table("train --pos none xpos --tokenizer byte --window 9")
    assert labels == ["alibi", "learned", "none + window 9", "rotary", "xpos + window 9"]
    rows = [(row["pos"], row["length"], row["tokens"]) for row in read_csv("out/extrapolation.csv")]
    size = Path("corpus/valid.txt").stat().st_size
    assert rows[-5:] == [("xpos", f"{8 * 2 ** n}", f"{size - 1}") for n in range(5)]
    assert rows[5:7] == [("learned", "8", "150"), ("none", "8", f"{size - 1}")]     # learned ends at 8
    assert "step,train_loss,valid_loss,lr,tokens_per_s\n3," in Path("out/none/log.csv").read_text()


def test_bfloat16(here):
    """One step of every encoding: all of its parameters move."""
    flags = "--dtype bfloat16 --block_size 132 --max_iters 1 --warmup_iters 0 --lengths 132"
    works(f"train --pos {' '.join(POSITIONS)} --out_dir new {flags}")
    works(f"train --pos none --out_dir new/exact {flags} --dtype float32")
    works("eval new/exact/none --lengths 132 --csv t.csv --dtype bfloat16")
    rounded, exact = learned_in("new/none"), learned_in("new/exact/none")
    assert rounded[0] != exact[0] and column("t.csv", "loss") != exact[1][2]
    for pos in POSITIONS:
        trained = load_run(f"new/{pos}")
        torch.manual_seed(1337)
        for name, p in GPT(GPTConfig(**trained["config"])).named_parameters():
            assert 0 < (trained["model"][name] - p).abs().max() < math.inf, (pos, name)


@parametrize("flags, interval", [
    ("none --dropout 0.2 --grad_accum 2", 3), ("xpos", 7), ("fire --random_positions 20 --logn", 1),
    ("t5 --tokenizer byte --window 3 --attn_dropout 0.1", 3), ("hwfa --act_dropout 0.5", 2),
    ("learned --grad_clip 0 --weight_decay 0.5", 1)], ids=range(6))
def test_stopped_and_resumed(flags, interval, here, monkeypatch):
    """Ctrl-C in steps 1 and 4: one line names the step that is saved; --resume goes on, bit for bit."""
    command = f"train --n_layer 2 --eval_interval {interval} --lengths 8 --pos {flags} --out_dir"
    works(f"{command} whole")
    run, get_lr, steps, stops = f"parts/{flags.split()[0]}", train.get_lr, [], [1, 4]

    def interrupt(step, args):
        steps.append(step)
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt
        return get_lr(step, args)

    monkeypatch.setattr(train, "get_lr", interrupt)
    first, second = (stop // interval * interval for stop in stops)
    refused(f"{command} parts --resume", f"--resume goes on from step {first} of {run}/ckpt.pt")
    code, _, err = call(f"{command} parts --resume")
    assert code and f"--resume goes on from step {second} of {run}/ckpt.pt" in err
    works(f"{command} parts --resume")
    assert steps == [0, 1, *range(first, 5), *range(second, 6)]
    assert learned_in(run) == learned_in(run.replace("parts", "whole"))


def test_killed_and_resumed(here):
    """By kill -9, wherever it is: after --resume it ends like a run that never was."""
    flags = "train --pos none --dropout 0.1 --max_iters 80 --eval_interval 1 --lengths 8 --out_dir"
    works(f"{flags} whole")
    log = Path("part/none/log.csv")
    for wanted in (10, 40):
        process = fork(lambda: call(f"{flags} part --resume")[0])
        while not log.exists() or log.read_text().count("\n") <= wanted:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        assert exit_code(process) == -9 and wanted <= load_run("part/none")["step"] < 80
    works(f"{flags} part --resume")
    assert learned_in("part/none") == learned_in("whole/none")


def test_never_half_a_checkpoint(here, monkeypatch):
    """A disk that is full half way: the checkpoint before and its log stay."""
    save = torch.save

    def full(content, file):
        if "step" in content and content["step"] == 6:
            file.write(b"half")
            raise OSError("No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    code, _, err = call("train --out_dir new")
    assert code and err == "train.py: No space left on device\n"
    assert load_run("new/alibi")["step"] == 3 and column("new/alibi/log.csv", "step") == [3]


def test_accumulated_gradients_are_one_big_batch(here):
    for batch, accum in ((8, 1), (2, 4)):
        flags = f"--batch_size {batch} --grad_accum {accum} --eval_interval 1 --lengths 8"
        works(f"train --pos rotary --out_dir {batch} {flags}")
    for key in ("train_loss", "valid_loss"):
        assert column("8/rotary/log.csv", key) == pytest.approx(column("2/rotary/log.csv", key), rel=1e-4)


def test_batches():
    """Every block once an epoch, each epoch in another order, as the seed says; targets one on."""
    def starts(n, seed=3, rank=0, processes=1):
        args = mock.Mock(block_size=4, batch_size=10, device="cpu", seed=seed, rank=rank, processes=processes)
        x, y = train.get_batch(torch.arange(51), args, n)
        assert torch.equal(x, x[:, :1] + torch.arange(4)) and torch.equal(y, x + 1)
        return x[:, 0].tolist()

    epochs = sum(map(starts, range(6)), [])
    one, two = epochs[:12], epochs[12:24]
    assert sorted(one) == sorted(two) == list(range(0, 48, 4)) and one != two
    assert starts(0, seed=4) != starts(0)
    assert starts(1, rank=0, processes=2) + starts(1, rank=1, processes=2) == starts(1)


def test_learning_rate():
    args = mock.Mock(warmup_iters=10, max_iters=110, learning_rate=2.0)
    rates = [train.get_lr(step, args) for step in range(110)]
    wanted = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 60: 1.1, 109: 0.2}
    assert {step: rates[step] for step in wanted} == pytest.approx(wanted, rel=0.01) and max(rates) == 2.0


def two_processes(command):
    """The command in two processes, told of each other as by torchrun: the output and first loss of each."""
    with HTTPServer(("127.0.0.1", 0), None) as free:
        port = free.server_port

    def body(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
        forward, first = GPT.forward, []
        GPT.forward = lambda *args: first.append(forward(*args)) or first[-1]
        code, out, _ = call(command)
        torch.save((out, first[0].tolist()), f"rank{rank}")
        return code

    processes = [fork(body, rank) for rank in (0, 1)]
    assert [exit_code(process) for process in processes] == [0, 0]
    return torch.load("rank0"), torch.load("rank1")


def test_two_processes_are_one(here):
    """Same losses as one process with the same global batch, and one voice."""
    flags = "train --pos t5 --grad_accum 2 --batch_size 4 --eval_interval 1 --lengths 8"
    works(f"{flags} --out_dir one")
    (voice, _), (silence, _) = two_processes(f"{flags} --out_dir two")
    assert voice.count("step 3:") == voice.count("perplexity per") == 1 and silence == ""
    one, two = (column(f"{folder}/t5/log.csv", "valid_loss") for folder in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_two_processes_draw_apart(here):
    """On a text that is the same everywhere only dropout can tell two processes' losses apart."""
    write_corpus("same", "a " * 404, "a " * 40, "a " * 40)
    (_, one), (_, two) = two_processes("train --data same --out_dir new --lengths 8 --dropout 0.5")
    assert one != two


def test_help():
    """Within reason, and with every encoding's formula."""
    lines = works("train --help").splitlines()
    assert len(lines) < 100 and max(map(len, lines)) < 130 and works("eval --help")
    assert {f"  {pos:11} {x.__doc__.splitlines()[0]}" for pos, x in POSITIONS.items()} <= set(lines)


def test_the_papers_finding(here):
    """Trained at 32 bytes of Python's library, tested at 256: ALiBi holds, sinusoidal and rotary do not."""
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"".join(path.read_bytes() for path in library)[:2 ** 20 + 12000]
    write_corpus("library", text[:2 ** 20], text[2 ** 20:], b"empty")
    works("train --data library --tokenizer byte --block_size 32 --batch_size 16 --n_head 4 --n_embd 64 "
          "--max_iters 120 --warmup_iters 40 --learning_rate 4e-3 --eval_interval 120 "
          "--lengths 32 256 --pos sinusoidal rotary alibi --out_dir new")
    ppl = column("new/extrapolation.csv", "ppl")
    linear, turning, waves = (long / short for short, long in zip(ppl[::2], ppl[1::2]))     # by name
    assert linear < 1.04 < min(turning, waves)


# ---- mistakes: one line and an exit code, nothing lost -----------------------------------------------


MISTAKES = {        # the command, a phrase of the line about it, what brings it about
    "unknown corpus": ("train --data wikitext", "no corpus wikitext"),
    "not UTF-8": ("train", "valid.txt is not UTF-8", lambda: Path("corpus/valid.txt").write_bytes(b"\xff\n")),
    "short text": ("train --out_dir new", "--block_size", lambda: os.truncate("corpus/train.txt", 9)),
    "length beyond the text": ("train --out_dir new --lengths 8 151", "151 tokens"),
    "stride above a length": ("eval out/alibi --lengths 16 8 --stride 9", "--stride"),
    "there already": ("train --pos rotary", "out/rotary/ckpt.pt is there"),
    "another seed": ("train --resume --seed 7", "seed 1337, not 7"),
    "another text": ("train --resume --data other", "words"),
    "shorter text": ("train --resume", "train_tokens 401", lambda: os.truncate("corpus/train.txt", 1000)),
    "foreign": ("eval out/alibi", "no checkpoint", lambda: Path("out/alibi/ckpt.pt").write_text("hello")),
    "cut": ("train --resume", "no checkpoint of", lambda: os.truncate("out/alibi/ckpt.pt", 20000)),
    "heads that do not divide": ("train --n_embd 15", "--n_embd"),
    "no such device": ("train --out_dir new --device cuda", "--device cuda"),
    "diverging": ("train --out_dir new --learning_rate 1e9", "--learning_rate"),
    "file for a folder": ("train --out_dir corpus/train.txt", "corpus/train.txt")}


@parametrize("mistake", MISTAKES)
def test_mistake(mistake, here, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    command, phrase, *makes = MISTAKES[mistake]
    for make in makes:
        make()
    refused(command, phrase)
    assert not Path("new/alibi/ckpt.pt").exists()


# ---- the numbers of README.md and assets/RESULTS.md, against the CSVs -------------------------------

ASSETS = Path(__file__).parent / "assets"
PAGES = ASSETS.parent / "README.md", ASSETS / "RESULTS.md"
TEXT = "\n\n".join(page.read_text() for page in PAGES)


def read_tables():
    """Yields each table: the last CSV linked before it, its first row, {a row's name: its other cells}."""
    for page in PAGES:
        text = page.read_text()
        for lines in re.finditer(r"^\|.*\n(?:\|.*\n?)+", text, re.M):
            links = ["", *re.findall(r"\(([\w./]+\.csv)\)", text[:lines.start()])]
            rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.group().splitlines()]
            cells = {name.strip("*`"): cells for name, *cells in rows[2:]}
            yield page.parent / links[-1], rows[0], cells


def tables(title):
    """Those whose first row begins so."""
    return [pytest.param(file, head, rows, id=file.stem) for file, (start, *head), rows in read_tables()
            if re.match(title, f"{start} | {head[0]}")]


def shows(cell, *numbers):
    """Whether a cell has these numbers, rounded to its digits."""
    printed = re.findall(r"[\d.]+", cell.replace(",", ""))
    digits = [len(text.partition(".")[2]) for text in printed]
    return printed == [f"{x:.{n}f}" for x, n in zip(numbers, digits, strict=True)]


def measured(file):
    """{(name, trained length, length or span's end): [perplexity or loss of each seed]} of a CSV."""
    found = {}
    for row in read_csv(file):
        name = evaluation.label_of(row | {k: int(row[k]) for k in "logn window random_positions".split()})
        where, value = (row["last"], row["loss"]) if "last" in row else (row["length"], row["ppl"])
        found.setdefault((name, row["train_length"], where), []).append(float(value))
    return found


def check_column(cells, column):
    """Means over seeds, ± deviations; bold is one below all others by more than two standard errors."""
    for cell, ppl in zip(cells, column, strict=True):
        numbers = [np.mean(ppl), np.std(ppl, ddof=1)] if len(ppl) > 1 else ppl
        assert shows(cell, *numbers) if ppl else cell == "-", (cell, ppl)
    best, *others = sorted(filter(None, column), key=np.mean)
    [seeds] = {len(ppl) for ppl in column if ppl}
    far = others and seeds > 1 and all(
        np.mean(x) - np.mean(best) > 2 * math.sqrt((np.var(x, ddof=1) + np.var(best, ddof=1)) / seeds)
        for x in others)
    assert [ppl for cell, ppl in zip(cells, column) if "**" in cell] == ([best] if far else [])


def test_pages_and_assets_name_each_other():
    assert {path.name for path in ASSETS.glob("*.csv")} <= set(re.findall(r"\w+\.csv", TEXT))
    links = {page.parent / x for page in PAGES for x in re.findall(r"\]\(([\w./]+)[)#]", page.read_text())}
    assert len(links) > 10 and [link for link in links if not link.exists()] == []
    assert any(set(rows) == set(POSITIONS) for _, head, rows in read_tables() if "formula" in head)
    assert len(tables(r"encoding \| \d")) > 8 and len(tables(r"trained|encoding \| (paper|tokens)")) > 2


@parametrize("file, head, rows", tables(r"encoding \| \d"))
def test_tables_of_results(file, head, rows):
    """By length, with eval's verdict, or by position."""
    found, first = measured(file), read_csv(file)[0]
    trained, ends = first["train_length"], [end for end in head if end]
    assert {(name, trained) for name in rows} == {key[:2] for key in found}
    assert set(ends) == {key[2] for key in found}
    for end, cells in zip(ends, zip(*rows.values(), strict=True)):
        check_column(cells, [found.get((name, trained, end), []) for name in rows])
    for name, cells in rows.items():
        ppl = {int(end): found.get((name, trained, end), [math.nan]) for end in ends}
        assert cells[len(ends):] == ([] if "last" in first else [evaluation.verdict(int(trained), ppl)]), name


@parametrize("file, head, rows", tables("trained"))
def test_train_short_test_long(file, head, rows):
    """In blocks and sliding, here and in the paper; every model of short.csv has its row."""
    files = {"": "short.csv", "sliding": "short_sliding.csv", "paper": "paper.csv"}
    speed = speeds(ASSETS / "short_speed.csv")
    models = [tuple(name.split()) for name in rows]
    assert set(models) == set(speed) == {key[:2] for key in measured(ASSETS / "short.csv")}
    for title, cells in zip(head, zip(*rows.values()), strict=True):
        kind, _, length = title.rpartition(" ")
        if title == "speed":
            ratios = [np.median(speed[model] / speed["sinusoidal", "512"]) for model in models]
            assert all(map(shows, cells, ratios))
        else:
            found = measured(ASSETS / files[kind])
            check_column(cells, [found.get((*model, length), []) for model in models])


@parametrize("file, head, rows", tables(r"encoding \| paper"))
def test_ratios_to_the_paper(file, head, rows):
    """Perplexity by that at the trained length, in the paper and here."""
    assert list(rows) == ["sinusoidal", "rotary", "t5", "alibi"]
    ppl = {"paper": measured(ASSETS / "paper.csv"), "here": measured(ASSETS / "bytes.csv")}
    for name, cells in rows.items():
        for title, cell in zip(head, cells, strict=True):
            side, long, _, short = title.split()
            assert shows(cell, np.mean(ppl[side][name, short, long]) / np.mean(ppl[side][name, short, short]))


def speeds(file):
    """{(pos, trained length): tokens/s of each round} of a CSV."""
    found = {}
    for row in sorted(read_csv(file), key=lambda row: row["run"]):
        found.setdefault((row["pos"], row["train_length"]), []).append(float(row["tokens_per_s"]))
    return {key: np.array(rounds) for key, rounds in found.items()}


@parametrize("file, head, rows", tables(r"encoding \| tokens"))
def test_table_of_speeds(file, head, rows):
    speed = {pos: rounds for (pos, _), rounds in speeds(file).items()}
    assert set(rows) == set(speed) and head == ["tokens/s", "ratio to none"]
    for pos, (tokens_per_s, ratio) in rows.items():
        assert shows(tokens_per_s, np.median(speed[pos]))
        assert shows(ratio, np.median(speed[pos] / speed["none"]))


def test_quick_run_as_printed():
    """The table of the two commands."""
    found = measured(ASSETS / "quick.csv")
    [(head, lines)] = re.findall(r"^ *encoding +trained(.*)\n((?: *\w+ +256 .*\n)+)", TEXT, re.M)
    for line in lines.splitlines():
        name, _, *cells = line.split()
        ppl = {int(length): found.pop((name, "256", length)) for length in head.split()}
        assert all(shows(cell, *x) for cell, x in zip(cells, ppl.values()))
        assert line.split("  ")[-1] == evaluation.verdict(256, ppl)
    assert not found
