"""Quick tests of all four files, each against something independent: a formula in plain loops, a published number, brute
force, an uninterrupted run."""
import csv
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import data
import eval as evaluation       # not the builtin
import model as model_file
import train
from model import EXTENSIONS, GPT, POSITIONS, GPTConfig, ModelError, Scores, Vocabulary, attend, prepare

HERE = Path(__file__).parent
TINY = dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16)


def make(pos, seed=0, **changes):
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
            reach = window or max(w for w in range(1, 99) if (w - 1) * (config.n_layer - 1) + 1 <= 0.75 * config.block_size)
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
    model = make(pos, window=window, logn=logn, block_size=T if pos == "learned" else 16)
    for weight in model.blocks.parameters():
        weight.data *= 8        # so that attention matters
    ids = tokens(T + 1)
    loss = model(ids[:, :-1], ids[:, 1:])[0]
    naive = naive_loss(model, ids[0, :-1].tolist(), ids[0, 1:].tolist(), window, logn)
    torch.testing.assert_close(loss.double(), torch.tensor(naive), rtol=2e-4, atol=2e-4)


def test_published_slopes_and_buckets():
    assert make("alibi", n_head=8).pos.slopes.tolist() == [2.0 ** -n for n in range(1, 9)]
    twelve = [2.0 ** -n for n in range(1, 9)] + [2.0 ** -x for x in (0.5, 1.5, 2.5, 3.5)]
    torch.testing.assert_close(make("alibi", n_head=12, n_embd=24).pos.slopes, torch.tensor(twelve))
    t5 = make("t5")
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
    model, ids = make(pos, window=window, logn=logn), tokens(17)
    changed = ids.clone()
    changed[0, 10:] = (ids[0, 10:] + 1) % 11
    one, two = (model.trunk(x[:, :16])[0] for x in (ids, changed))
    torch.testing.assert_close(one[:10], two[:10], rtol=0, atol=1e-6)
    assert (one[10:] - two[10:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("pos", POSITIONS)
def test_shift_invariance(pos, monkeypatch):
    """Only distances matter: to relative encodings. FIRE sees the place beyond its threshold of 512 L."""
    model, ids = make(pos, random_positions=64), tokens(16)
    here = model.trunk(ids)
    shift = 3 if pos == "learned" else 1000
    monkeypatch.setattr(model.pos, "positions", lambda T, device: torch.arange(T, dtype=torch.float32) * 4 + shift)
    distance = (model.trunk(ids) - here).abs().max()
    assert distance > 1e-3 if pos in ("learned", "sinusoidal", "fire") else distance < 1e-4


@pytest.mark.parametrize("pos", POSITIONS)
def test_window(pos):
    """In one layer, what is out of the window does not count; the only layer of hwfa is its last, which has none."""
    model, ids = make(pos, n_layer=1, window=4), tokens(16)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 11
    moved = (model.trunk(ids) - model.trunk(changed))[0].abs().amax(1) > 1e-5
    assert moved.tolist() == [2 <= i < (16 if pos == "hwfa" else 6) for i in range(16)]


def test_window_of_everything_is_none():
    for pos in POSITIONS:
        ids = tokens(16)
        if pos != "hwfa":
            torch.testing.assert_close(make(pos, window=16).trunk(ids), make(pos).trunk(ids))


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
    model = make("alibi", random_positions=999, block_size=300).train() if pos == "random" else make(pos)
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
    """What the GPU's fused kernel is given, run by FlexAttention's reference on the CPU, gradient of the bias included."""
    model = make(pos)
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
    pos = make("alibi").pos
    for bias in (None, Scores(pos, torch.arange(float(T)), 0)):
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*qkv, bias)
        exact = plain(*qkv.double(), pos if bias else make("none").pos, torch.arange(float(T)).double(), 0)
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
    model, ids = make("alibi"), tokens(17)
    logits = model.trunk(ids[:, :-1]) @ model.wte.head.T
    expected = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:])[0], expected)


def test_loss_in_pieces(monkeypatch):
    """In evaluation a long text's logits never stand in memory at once: 2^23 at most."""
    model, ids, seen = make("alibi", vocab_size=2 ** 20), tokens(31, 2 ** 20), []
    whole = model(ids[:, :-1], ids[:, 1:])
    loss = model.wte.loss
    monkeypatch.setattr(model.wte, "loss", lambda x, y: seen.append(len(x)) or loss(x, y))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), whole)
    assert seen == [8, 8, 8, 6]


@pytest.mark.parametrize("pos", POSITIONS)
def test_weight_decay_touches_matrices_only(pos):
    model = make(pos, vocab_size=30000)
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
    shared = [{name: p for name, p in make(pos).state_dict().items() if not name.startswith("pos.")} for pos in POSITIONS]
    assert all(torch.equal(p, other[name]) for other in shared for name, p in shared[0].items())


# ---- random positions and test-time extensions


def test_random_positions():
    pos = make("alibi", random_positions=100).pos.train()
    drawn = [pos.positions(16, torch.device("cpu")).tolist() for _ in range(50)]
    assert all(p == sorted(set(p)) and 0 <= p[0] and p[-1] < 100 and len(p) == 16 for p in drawn)
    assert len(set(itertools.chain(*drawn))) > 90       # out of all of them
    model = make("alibi", random_positions=100)
    prepare(model, 20)
    assert model.pos.positions(20, torch.device("cpu")).tolist() == pytest.approx([5 * n for n in range(20)])


@pytest.mark.parametrize("extend, pos", [(e, pos) for e, (_, fits) in EXTENSIONS.items() for pos in fits])
def test_extensions_change_nothing_at_the_trained_length(extend, pos):
    ids = tokens(16)
    plain, extended = make(pos), make(pos)
    prepare(extended, 16, extend)
    assert torch.equal(plain.trunk(ids), extended.trunk(ids))
    prepare(extended, 64, extend)
    long = extended.trunk(tokens(64))
    assert long.isfinite().all()
    assert torch.equal(plain.trunk(tokens(64)[:, :16]), long[:, :16]) == (extend == "hierarchical")


def test_extension_formulas():
    rotary, alibi, learned = make("rotary"), make("alibi"), make("learned")
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
    halfway = make("learned")
    prepare(halfway, 32, "interpolate")
    x = halfway.pos.embed(torch.zeros(1, 32, 16), halfway.pos.positions(32, torch.device("cpu")))[0]
    torch.testing.assert_close(x[:3], torch.stack([p[0], (p[0] + p[1]) / 2, p[1]]).float())


def test_extensions_that_make_no_sense():
    for extend, (_, fits) in EXTENSIONS.items():
        for pos in set(POSITIONS) - set(fits):
            with pytest.raises(ModelError, match=f"--extend {extend} for {pos}.*ntk for rotary"):
                prepare(make(pos), 32, extend)


def test_learned_ends_at_its_table():
    with pytest.raises(ModelError, match="learned ends at 16 positions, asked for 17"):
        make("learned").trunk(tokens(17))


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
    model, stream = make("alibi"), tokens(n)[0].numpy()
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
    model, stream = make("alibi", dropout=0.5, random_positions=50).train(), tokens(100)[0].numpy()
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
    tiny = ("--data text --tokenizer byte --block_size 8 --batch_size 4 --max_iters 6 --n_layer 2 --n_head 2 --n_embd 16 "
            "--dropout 0 --warmup_iters 2 --eval_interval 3 --device cpu").split()

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
    assert ",".join(rows[0]) == "pos,train_length,length,stride,split,tokens,loss,ppl,extend,window,logn"
    assert [(r["pos"], r["length"]) for r in rows] == [("alibi", str(8 * 2 ** n)) for n in range(5)] + [("learned", "8")]
    assert all(r["tokens"] == "399" and float(r["ppl"]) == pytest.approx(math.exp(float(r["loss"]))) for r in rows)
    log = list(csv.reader(open("o/alibi/log.csv")))
    assert log[0] == ["step", "train_loss", "valid_loss", "lr", "tokens_per_s"] and [r[0] for r in log[1:]] == ["3", "6"]
    assert float(rows[0]["loss"]) == pytest.approx(float(log[2][2]))
    out = run("eval", "o/alibi", "o/learned/best.pt", "--stride", "4", "--lengths", "8", "12", "--by_position",
              "--csv", "t.csv", "--window", "4", "--logn", "--split", "test")
    assert "alibi + window 4 + logn" in out and "sliding by 4" in out and "8-8" not in out and "5-8" in out
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
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", HERE / "train.py", *run.tiny, *flags]
    result = subprocess.run([*command, "--out_dir", "two"], capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
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
    ppl = {(row["pos"], row["length"]): float(row["ppl"]) for row in csv.DictReader(open("out/quick/extrapolation.csv"))}
    assert ppl["alibi", "256"] < 1.01 * ppl["alibi", "32"]
    assert ppl["sinusoidal", "256"] > 1.2 * ppl["sinusoidal", "32"]
    assert ppl["rotary", "256"] > 1.1 * ppl["rotary", "32"]
