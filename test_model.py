"""`python -m pytest -k "formula and alibi"` holds one encoding against its formula; without -k all tests run.

Each test compares with something independent: a formula in plain loops, a published number, brute force, an
uninterrupted run. A new encoding is one short function below and its name in NAIVE; the tests that run over
POSITIONS come right after.
"""
import csv
import hashlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from math import ceil, inf, log, nan, pi, sqrt
from pathlib import Path
from threading import Thread
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation  # not the builtin
import model as model_file
import train
from model import EXTENSIONS, GPT, POSITIONS, GPTConfig, attend, attention, make_mask

torch.set_num_threads(1)        # for equal bits in all processes
parametrize = pytest.mark.parametrize
every_encoding = parametrize("pos", POSITIONS)


def cases(names, lines):
    """A line each, the first is left out."""
    return parametrize(names, [line.split(" | ") for line in lines.splitlines()[1:]])


# ---- the formulas, in float64: the score of one pair of a query and a key

# layer and head from 0; query and key (D,); the query's position i and distance d = i - j to the key's; what
# the layer gets, normed, of each token after the key up to the query: (n, C)
Pair = namedtuple("Pair", "pos layer h q k i d inputs")


def none(s):
    return s.q @ s.k / sqrt(len(s.q))


def turning(s, w, z=1.0):
    """RoPE's pairs (n, n + D/2) as complex numbers, where of two turns the difference is left; xPos's z."""
    q, k = (torch.complex(*x.chunk(2)) for x in (s.q, s.k))
    turns = torch.exp(1j * w * s.d) * z ** (s.d / 512)
    return (q * k.conj() * turns).real.sum() / sqrt(len(s.q))


def waves(D):
    return 10000 ** (-2 * torch.arange(D // 2).double() / D)


def rotary(s):
    return turning(s, waves(len(s.q)))


def xpos(s):
    w = waves(len(s.q))
    return turning(s, w, (torch.arange(len(w)).double() / len(w) + 0.4) / 1.4)


def hope(s):
    w = waves(len(s.q))
    return turning(s, w * (w * s.pos.config.block_size >= 2 * pi))


def t5(s):
    bucket = s.d if s.d < 16 else min(31, 16 + 16 * log(s.d / 16, 8))
    return none(s) + sqrt(len(s.q)) * s.pos.t[int(bucket), s.h]


def alibi(s):
    return none(s) - 2 ** (-8 * (s.h + 1) / s.pos.config.n_head) * s.d


def kerple(s):
    return none(s) - (s.pos.p[s.h] * torch.log(1 + s.pos.a[s.h] * s.d)).squeeze()


def sandwich(s):
    cosines = np.cos(s.d / 10000 ** (np.arange(1, 65) / 64))
    return none(s) + (cosines.sum() - 64) * s.pos.config.n_head / (8 * (s.h + 1))


def fire(s):
    c, threshold = abs(s.pos.c), abs(s.pos.l) * s.pos.config.block_size / 4
    progress = torch.log(1 + c * s.d) / (torch.log(1 + c * max(threshold, s.i)) + 1e-6)
    return none(s) + s.pos.mlp(progress[None])[s.h]


def fox(s):
    return none(s) + s.pos.gates[s.layer].f(s.inputs)[:, s.h].sigmoid().log().sum()


NAIVE = {"none": none, "learned": none, "sinusoidal": none, "rotary": rotary, "xpos": xpos, "hope": hope,
         "rnope": rotary, "hwfa": rotary, "t5": t5, "alibi": alibi, "kerple": kerple, "sandwich": sandwich,
         "fire": fire, "fox": fox}


def naive_embedding(pos, i):
    """What the token at position i gets: (C,)."""
    w = waves(pos.config.n_embd)
    if pos.config.pos == "sinusoidal":
        return torch.stack((torch.sin(i * w), torch.cos(i * w)), 1).flatten()
    if pos.config.pos == "learned":
        return torch.lerp(pos.vectors[int(i)], pos.vectors[ceil(i)], i % 1)
    return torch.zeros(1)


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
    """(T, C) once, (T, H, D) three times -> (T, C), score by score."""
    score, window, logn = naive_layer(model.config, layer)
    out = []
    for i, h in product(range(len(q)), range(model.config.n_head)):
        query = q[i, h] * (max(1, log(i + 1, model.config.block_size)) if logn else 1)
        first = max(0, i - window + 1) if window else 0
        scores = [score(Pair(model.pos, layer, h, query, k[j, h], positions[i], positions[i] - positions[j],
                             inputs[j + 1:i + 1])) for j in range(first, i + 1)]
        out.append(torch.stack(scores).softmax(0) @ v[first:i + 1, h])
    return torch.cat(out).view(len(q), -1)


def naive_loss(model, ids):
    """The whole model: (T + 1,) -> (T,), the loss of each next token in nats."""
    T, C = len(ids) - 1, model.config.n_embd
    positions = [n * (model.config.random_positions or T) / T for n in range(T)]
    x = model.wte.weight[ids[:-1]] * sqrt(C)
    x = x + torch.stack([naive_embedding(model.pos, i) for i in positions])
    for layer, block in enumerate(model.blocks):
        inputs = block.ln_1(x)
        qkv = block.c_attn(inputs).view(T, 3, model.config.n_head, -1)
        x = x + block.attn_proj(naive_attention(model, layer, positions, inputs, *qkv.unbind(1)))
        x = x + block.mlp_proj(block.c_fc(block.ln_2(x)).relu())
    return F.cross_entropy(model.ln_f(x) @ model.wte.weight.T, ids[1:], reduction="none")


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


def loss_of(model, ids):
    torch.manual_seed(0)        # of random positions
    return model(ids[:, :-1], ids[:, 1:])[0]


def same_losses(loss, model, wanted, exact):
    """And gradients."""
    close(loss, wanted)
    grads = torch.autograd.grad(loss.sum(), [*model.parameters()])
    for pair in zip(grads, torch.autograd.grad(wanted.sum(), [*exact.parameters()])):
        close(*pair, 2e-3)


@parametrize("window, logn, N", [(0, False, 0), (5, False, 0), (3, True, 30)])
@every_encoding
def test_model_is_its_formula(pos, window, logn, N):
    """Beyond the trained length; with N at positions 0, 1.5, 3, ..."""
    assert pos in NAIVE, "write its formula at the top of test_model.py and enter it in NAIVE"
    shape = dict(block_size=20 if pos == "learned" else 16, n_layer=6 if pos in ("rnope", "hwfa") else 2)
    flags = shape | dict(window=window, logn=logn, random_positions=N)
    model, exact = tiny_model(pos, 12, **flags), tiny_model(pos, 12, **flags).double()
    same_losses(loss_of(model, tokens(21)), model, naive_loss(exact, tokens(21)[0]), exact)


@every_encoding
def test_equal_start_and_decay(pos):
    """Matrices decay, but not what an encoding trains."""
    plain = tiny_model("none", vocab_size=30000).state_dict()
    model = tiny_model(pos, vocab_size=30000)
    decay, rest = model.parameter_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    for name, p in model.named_parameters():
        shared = not name.startswith("pos.")
        assert not shared or torch.equal(p, plain.pop(name))
        assert (p in {*decay["params"]}) == (shared and "ln_" not in name)
    assert not plain


# ---- attention --------------------------------------------------------------------------------------


@parametrize("window, N", [(0, 0), (1, 0), (70, 0), (200, 0), (0, 999), (70, 999)])
@every_encoding
def test_attention_is_as_defined(pos, window, N, monkeypatch):
    """Three slices of queries; with N in training at random positions."""
    model = tiny_model(pos, 4, window=window, random_positions=N, block_size=300).train()
    fast = loss_of(model, tokens(301))
    monkeypatch.setattr(model_file, "make_mask", lambda encoding, window, i, *_: (encoding, window, i))
    monkeypatch.setattr(model_file, "attend", lambda q, k, v, mask, *_: attention(q, k, v, *mask))
    same_losses(fast, model, loss_of(model, tokens(301)), model)


@parametrize("pos", "none alibi t5 kerple xpos fire hwfa fox".split())      # all kinds of graphs
def test_compiled_with_flex_attention(pos, monkeypatch):
    """What a GPU compiles, run op by op on the CPU, FlexAttention by its reference."""
    T = 1100 if pos in ("alibi", "kerple") else 150     # from there on the mask of alibi is a view
    model = tiny_model(pos, 4, block_size=T, window=50 if pos in ("none", "fox") else 0).train()
    slices = loss_of(model, tokens(T + 1))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(model_file, "make_mask", lambda *args: make_mask(*args[:-1], True))
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager", fullgraph=True))
    model.compile_parts()
    same_losses(loss_of(model, tokens(T + 1)), model, slices, model)


@parametrize("pos", [pos for pos in POSITIONS if POSITIONS[pos].relative])      # others take T^2
def test_memory_grows_with_the_length_alone(pos):
    """A (H, T, T) array would take 144 MB here, at once, and twice that in float32."""
    model = tiny_model(pos, n_layer=1, block_size=6000)
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluation.evaluate(model, tokens(6000)[0], 5999, dtype="bfloat16")
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 2e7


def test_bfloat16_is_as_exact_with_a_bias_as_without():
    """At 2048 tokens, where bfloat16 has no distances: error against float64 at most twice that of none."""
    errors, i, x = [], torch.arange(2048.0), torch.randn(1, 2048, 16)
    q, k, v = torch.randn(3, 1, 2, 2048, 16).bfloat16()
    for pos in ("none", "alibi", "fox"):
        encoding = defined = tiny_model(pos).pos.layer(0)[0]
        mask = make_mask(encoding, 2048, i, False)
        with torch.autocast("cpu", torch.bfloat16):
            fast = attend(*encoding.rotate(q, k, None, x), v, mask, 2048, 0.0)
            if pos == "fox":        # whose gates may be rounded, but not their sum
                c = encoding.f(x)[0].double().sigmoid().log().cumsum(0).T
                defined = mock.Mock(bias=lambda *_: c[:, :, None] - c[:, None])
        exact = attention(q.double(), k.double(), v.double(), defined, 2048, i.double())
        errors.append((fast - exact).norm() / exact.norm())
    assert max(errors) < 2 * errors[0] < 0.02


def test_masks_are_made_in_float32():
    """Under autocast too, where FIRE's MLP would run in bfloat16."""
    model, made = tiny_model("fire"), []
    model.pos.mlp.register_forward_hook(lambda *args: made.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model.trunk(tokens(16))
    assert {*made} == {torch.float32}


# ---- published numbers ------------------------------------------------------------------------------


def test_slopes_of_the_paper():
    exponents = np.array([1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])
    for H in (8, 12):
        assert model_file.slopes(H) == pytest.approx(0.5 ** exponents[:H])


def test_buckets_as_published():
    pos = tiny_model("t5", n_embd=2).pos        # D = 1: the table as it is
    pos.t.data[:] = torch.arange(32)[:, None]
    distances = torch.tensor([[0.0, 15, 16, 17, 20, 32, 64, 127, 128, 299]])
    assert pos.bias(distances, 0)[0].tolist() == [[0, 15, 16, 16, 17, 21, 26, 31, 31, 31]]


@parametrize("pos, layers, full, window", [("hwfa", 12, [11], 35), ("hwfa", 16, [15], 26),
                                           ("rnope", 12, [3, 7, 11], 128), ("rnope", 3, [2], 192)])
def test_layers_that_see_all(pos, layers, full, window):
    """The windows derived in the notes of kexue.fm/archives/9603 for N = 512 and alpha = 3/4."""
    pos = tiny_model(pos, block_size=512, n_layer=layers).pos
    found = [pos.layer(n)[1] for n in range(layers)]
    assert found == [0 if n in full else window for n in range(layers)]


def test_yarn_as_published():
    """At four times the trained length, queries and keys alike."""
    pos = tiny_model("rotary", n_embd=32, block_size=256).pos
    model_file.yarn(pos, 1024)
    unit = torch.arange(16).lt(8).float()
    for x in pos.rotate(unit, unit, pos.turns(torch.ones(1)), None):
        pairs = torch.complex(*x.flatten().chunk(2))
        close(pairs.angle() / waves(16), [1, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25, 0.25])
        close(pairs.abs(), [1.1386] * 8)


def test_parameters_of_the_paper(monkeypatch):
    """fairseq's transformer_lm_wiki103 has 246,933,504; listed is where this model differs."""
    monkeypatch.setattr(sys, "argv", "train.py --preset paper --dropout 0.2".split())
    args = vars(train.get_args())
    assert (args["pos"], args["data"], args["dropout"]) == (["alibi"], "wikitext-103", 0.2)
    shape = {flag: args[flag] for flag in ("block_size", "n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        ours = sum(p.numel() for p in GPT(GPTConfig(267735, **shape)).parameters())
    biases = 16 * (3072 + 1024 + 4096 + 1024 + 2 * 1024)        # of four linear layers and two norms a block
    assert ours + biases + 1024 ** 2 + 9 * 64 - 1024 == 246_933_504     # first band, dictionary, final norm


# ---- single encodings and extensions ----------------------------------------------------------------


def test_kerple_comes_back():
    """A head below 0.01 counts as 0.01 and goes on learning; a forward pass writes nothing."""
    pos = tiny_model("kerple").pos
    pos.p.data[:], pos.a.data[:] = -0.5, 0.5
    bias = pos.bias(torch.full((1, 1), 9.0), 0)
    bias.sum().backward()
    close(bias, [[[-0.01 * log(5.5)]]] * 2)
    close(pos.p.grad, [[[-log(5.5)]]] * 2)
    assert (pos.p == -0.5).all()


def test_random_positions():
    drawn = tiny_model("none", random_positions=100).pos.train().positions(90, "cpu")
    assert drawn.diff().min() == 1 and 89 < drawn.max() < 100


@parametrize("name, pos", [(name, pos) for name, (_, names) in EXTENSIONS.items() for pos in names])
def test_extensions_change_nothing_at_the_trained_length(name, pos):
    model, ids, extend = tiny_model(pos, block_size=64), tokens(256), EXTENSIONS[name][0]
    plain = model.trunk(ids[:, :64])
    extend(model.pos, 256)
    longer = model.trunk(ids)[:, :64]
    assert not torch.equal(plain, longer) and longer.isfinite().all()
    for length in (64, 8):
        extend(model.pos, length)
        assert torch.equal(model.trunk(ids[:, :64]), plain)


def test_extensions_by_hand():
    rotary, learned = tiny_model("rotary").pos, tiny_model("learned").pos
    model_file.ntk(rotary, 64)
    _, (_, sin) = rotary.turns(torch.ones(1))
    close(sin[0].arcsin(), (10000 * 4 ** (8 / 6)) ** (-torch.arange(4) / 4))
    model_file.interpolate(learned, 64)
    close(learned.positions(64, "cpu"), torch.arange(64) / 4)
    assert learned.max_length == 64


# ---- vocabulary and loss ----------------------------------------------------------------------------


def test_adaptive_vocabulary():
    """Against torch's of the same weights. Its rows are the embeddings."""
    torch.manual_seed(0)
    mine, x, ids = model_file.AdaptiveVocabulary(50, 32, (10, 20)), torch.randn(50, 32), torch.arange(50)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(32, 50, [10, 20])
    matrices = [p.data.normal_() for p in theirs.parameters()]
    for p, n in zip(mine.parameters(), (0, 2, 1, 4, 3)):
        p.data = matrices[n]
    wanted = theirs(x, ids).output
    close(mine.log_probs(x), theirs.log_prob(x))
    close(-mine.loss(x, ids), wanted)
    rows = [mine.weight[:10], *(band.weight @ band.projection for band in mine.bands)]
    close(mine(ids), torch.cat(rows) * sqrt(32))


@parametrize("V", [20000, 70000])
def test_losses_are_log_probs_in_pieces(V):
    """In evaluation not many more than 2^24 logits are there at once."""
    model, ids = tiny_model("none", vocab_size=V), tokens(1001, V)
    wanted = -model.log_probs(ids[:, :-1]).gather(2, ids[:, 1:, None])[0, :, 0]
    close(loss_of(model, ids), wanted)
    with torch.no_grad(), mock.patch.object(model.wte, "loss", wraps=model.wte.loss) as loss:
        close(loss_of(model, ids), wanted)
    assert max(len(call.args[0]) for call in loss.call_args_list) < 840


# ---- the two programs, in this process --------------------------------------------------------------

BASE = {"train": "--data corpus --tokenizer word --data_dir store --device cpu --block_size 8 --n_layer 1 "
                 "--n_head 2 --n_embd 16 --max_iters 6 --eval_interval 3 --warmup_iters 2 --out_dir",
        "eval": "--lengths 8 --data_dir store --device cpu"}


def call(command):
    """What "train OUT_DIR FLAGS" or "eval FLAGS" does on top of BASE: exit code, standard output, error."""
    program, *flags = command.split()
    argv, out, err = [f"{program}.py", *BASE[program].split(), *flags], io.StringIO(), io.StringIO()
    with mock.patch.multiple(sys, argv=argv, stdout=out, stderr=err), pytest.raises(SystemExit) as stop:
        sys.exit(evaluation.guarded({"train": train, "eval": evaluation}[program].main))
    return stop.value.code, out.getvalue(), f"{err.getvalue()}{stop.value.code}"


def start(flags, *launcher):
    """What "train OUT_DIR FLAGS" does, as a process of its own."""
    command = [sys.executable, *launcher, train.__file__, *BASE["train"].split(), *flags.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def works(command):
    """Standard output of a command that must end well."""
    code, out, err = call(command)
    assert not code, err
    return out


def table(command):
    """What it prints: {label: [trained length, *cells, verdict]}."""
    lines = works(command).partition("\nencoding ")[2].splitlines()
    return {label: cells for label, *cells in (re.split("  +", line) for line in lines[1:-1])}


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(command, phrase):
    """An exit code, a line on standard error with `phrase` in it, nothing lost, nothing half-written."""
    before, (code, _, err) = contents(), call(command)
    assert code and phrase in err and (err.count("\n") < 2 or "usage:" in err), err
    assert before.items() <= contents().items() and not list(Path().rglob("*.tmp"))


def write_corpus(folder, *texts):
    """These texts, or drawn ones of 8 words."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    draw = random.Random(folder).choices
    drawn = [" ".join(draw("abcdefgh", k=size)).encode() for size in (400, 150, 150)]
    for split, text in zip(data.SPLITS, texts or drawn):
        Path(folder, f"{split}.txt").write_bytes(text)


def column(path, key):
    """Numbers of a CSV."""
    return [float(row[key]) for row in csv.DictReader(Path(path).read_text().splitlines())]


def load_run(folder):
    return torch.load(f"{folder}/ckpt.pt")


def learned_in(folder):
    """The weights of a run, in bytes, and its log without the speeds."""
    run = load_run(folder)
    return [p.numpy().tobytes() for p in run["model"].values()], [[*row.values()][:-1] for row in run["log"]]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A folder with two corpora and three trained runs."""
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_corpus("corpus")
        write_corpus("other")
        works("train out --pos alibi rotary learned")
    return folder


@pytest.fixture
def here(example, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(example, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


# ---- data -------------------------------------------------------------------------------------------


@parametrize("texts, words, ids", [
    # blank lines, unknown words, no last newline; by count b 3, <eos> 3, c 2, a 1, <unk> (0)
    ([b" b c b \n\n a  c b", b"b new\n \n", b"c"], "b <eos> c a <unk>", "0 2 0 1 1 3 2 0 1 | 0 4 1 1 | 2 1"),
    # a byte order mark
    ([b"\xef\xbb\xbfa b a\n", b"\xef\xbb\xbfa\n", b"b"], "a b <eos> <unk>", "0 1 0 2 | 0 2 | 1 2"),
    ([b"\x00\x80\r\n\xff", b"\xff\x00", b"\n"], "", "0 128 13 10 255 | 255 0 | 10")])
def test_words_and_bytes_by_hand(texts, words, ids, here):
    write_corpus("hand", *texts)
    for _ in range(2):      # the second time from the cache
        corpus = data.load("hand", "word" if words else "byte", "new")
        found = [" ".join(map(str, split.tolist())) for split in corpus[:3]]
        assert corpus.words == words.split() and " | ".join(found) == ids


def test_cache(here, monkeypatch):
    """Used until the text's time or the tokeniser changes; a damaged one is made anew."""
    read = mock.Mock(wraps=data.read_split)
    monkeypatch.setattr(data, "read_split", read)
    for seconds, tokenizer in ((1, "word"), (2, "word"), (2, "byte")):
        os.utime("corpus/train.txt", (seconds, seconds))
        for _ in range(2):
            data.load("corpus", tokenizer, "new")
    assert read.call_count == 9
    for path in Path("new/cache").iterdir():
        path.write_text("cut")
    data.load("corpus", "byte", "new")
    assert read.call_count == 12


def test_stdlib_splits_are_apart():
    train, valid, test = map(set, data.stdlib_files().values())
    assert train and valid and test and not (train & valid or train & test or valid & test)


def test_download(here, monkeypatch):
    """Cut or damaged it is refused, else fetched once, not by urllib's name."""
    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self):
            assert "urllib" not in self.headers["User-Agent"]
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + answers.pop(0))

    with zipfile.ZipFile("zip", "w") as archive:
        for split in data.SPLITS:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", f" a b <unk> {split} \n" * 40)
    content = Path("zip").read_bytes()
    monkeypatch.setitem(data.SHA256, "wikitext-2", hashlib.sha256(content).hexdigest())
    answers = [b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", b"\r\n" + content[:-1], b"\r\n" + content]
    with HTTPServer(("127.0.0.1", 0), Mirror) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "MIRROR", f"http://127.0.0.1:{server.server_port}/")
        refused("train new --data wikitext-2", "IncompleteRead")
        refused("train new --data wikitext-2", "damaged")
        assert not Path("store/wikitext-2").exists()
        words = data.load("wikitext-2", "word", "store").words
        server.shutdown()
    assert words == ["a", "b", "<unk>", "train", "<eos>"]


# ---- how lengths are compared -----------------------------------------------------------------------


@parametrize("n, length, stride", [(50, 16, None), (49, 16, None), (50, 16, 5), (2, 1, 1)])
def test_every_target_counts_once(n, length, stride):
    """Against one forward for each target, in the window that the protocol gives it, hiding what follows."""
    model, stream = tiny_model("sinusoidal", random_positions=99), tokens(n)[0]
    expected, step = torch.zeros(2, length), stride or length
    for target in range(1, n):
        start = max(0, ceil((target - length) / step)) * step
        place = target - start - 1
        ids = F.pad(stream[start:target], (0, length - place - 1))[None]
        loss = model(ids, stream[target].expand(1, length))[0, place]
        expected[:, place] += torch.tensor([loss.item(), 1])
    for batch_tokens in (1, 64):
        close(evaluation.evaluate(model, stream, length, stride, batch_tokens=batch_tokens), expected, 1e-3)


def test_by_position(here):
    """The spans, weighted by their counts, give the loss of the whole; the table has a column for each."""
    works("eval out/alibi --lengths 12 --csv whole.csv")
    _, head, _ = works("eval out/alibi --lengths 12 --by_position --csv spans.csv").splitlines()
    assert head.split()[2:] == "1 2 4 8 12".split()
    counts, loss = column("spans.csv", "tokens"), column("spans.csv", "loss")
    assert counts == [13, 13, 26, 50, 48]       # of 150
    assert column("whole.csv", "loss") == pytest.approx([np.average(loss, weights=counts)])


# ---- table, CSV, labels -----------------------------------------------------------------------------


def test_table_and_csv(here):
    flags = "--stride 4 --lengths 8 12 --csv t.csv --window 4 --logn --split test"
    found = table(f"eval out/alibi out/learned/ckpt.pt {flags}")
    short, long, ended = (f"{ppl:.2f}" for ppl in column("t.csv", "ppl"))
    assert found["alibi + logn + window 4"][:3] == ["8", short, long]
    assert found["learned + logn + window 4"] == ["8", ended, "-", "fails from 12"]
    head, *_, line = Path("t.csv").read_text().splitlines()
    assert head == ("pos,train_length,length,stride,split,tokens,loss,ppl,extend,window,logn,"
                    "random_positions,seed,checkpoint,data")
    loss, ppl = (column("t.csv", key)[2] for key in ("loss", "ppl"))
    assert line == f"learned,8,8,4,test,150,{loss},{ppl},,4,1,0,1337,out/learned/ckpt.pt,corpus"


def test_links_and_other_texts(here):
    """Each checkpoint counts once; an extension that fits none is told; of another text valid is enough."""
    shutil.move("out/rotary", "moved")
    os.symlink("../moved", "out/rotary")
    assert "±" not in works("eval out out/alibi moved")
    assert evaluation.find_checkpoints([""]) == evaluation.find_checkpoints(["."])
    assert "out/alibi/ckpt.pt takes no ntk" in call("eval out --extend ntk")[2]
    write_corpus("strange", b"", b"a new\n")
    Path("strange/train.txt").unlink()
    assert "per word (33.3% <unk>) of strange, valid" in works("eval out --lengths 2 --data strange")


def test_seeds_share_a_line(here):
    for seed in (1, 2, 3):
        works(f"train seeds/{seed} --seed {seed} --eval_interval {seed} --pos alibi")
    [cells] = table("eval seeds --lengths 8 16 --csv t.csv").values()
    ppl = np.reshape(column("t.csv", "ppl"), (3, 2))
    assert cells[1:3] == [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(ppl.mean(0), ppl.std(0, ddof=1))]


@cases("flags, runs, labels", """
--data other | out/alibi new --data other | alibi, data corpus, train_text #; alibi, train_text #
--data other | out/alibi new | alibi, text word (0.0% <unk>) of corpus, train_text #; \
alibi, text word (0.0% <unk>) of other, train_text #
--tokenizer byte | out/rotary new | rotary, text word (0.0% <unk>) of corpus, train_text #; \
alibi, text byte of corpus, train_text #
--n_embd 8 --max_iters 3 | new out/alibi [a].pt half.pt | alibi, max_iters 3, n_embd 8, step 3; \
alibi, max_iters 6, n_embd 16, step 6; alibi, max_iters 6, n_embd 16, step 3
--window 4 --logn | new out/alibi --window 0 --no-logn | alibi, logn True, window 4; alibi
--random_positions 20 | out/rotary new --extend interpolate ntk | rotary; rotary + interpolate; \
rotary + ntk; alibi + random_positions 20""")
def test_label(flags, runs, labels, here):
    """It names all in which the runs differ, but for the seed."""
    works(f"train new --seed 7 --pos alibi {flags}")
    torch.save(load_run("out/alibi") | {"step": 3}, "half.pt")
    shutil.copy("out/alibi/ckpt.pt", "[a].pt")
    found = table(f"eval {runs}")
    assert re.sub("train_text [0-9a-f]{8}", "train_text #", "; ".join(found)) == labels


@cases("ppl, verdict", """
2 2.019 1 | holds
2 2.021 1 | fails from 16
2 2 nan | fails from 32
nan 2 | fails from 16
2 | """)
def test_verdict(ppl, verdict):
    by_length = {8 * 2 ** n: [float(x)] for n, x in enumerate(ppl.split())}
    assert evaluation.verdict(8, by_length) == verdict


def test_what_cannot_be_measured_is_left_out(here, monkeypatch):
    """With a line that says why; the rest is in table and CSV."""
    write_corpus("brief", b"a b c d e f g h " * 9, b"a " * 20, b"")
    torch.save({"model": {}}, "out/learned/ckpt.pt")        # of another program
    works("train out --data brief --pos fox")
    code, out, err = call("eval out --lengths 8 64 --csv t.csv")
    assert code and err.count("left out: ") == 2 and "out/fox/ckpt.pt: valid has 21 tokens" in err
    assert column("t.csv", "length") == [8, 64] * 2 and "rotary" in out
    stopped = mock.Mock(side_effect=[torch.ones(2, 8), KeyboardInterrupt])
    monkeypatch.setattr(evaluation, "evaluate", stopped)
    code, out, _ = call("eval out/alibi out/rotary --csv t.csv")
    assert code and column("t.csv", "length") == [8] and "alibi" in out


def test_a_csv_goes_where_it_is_sent(here):
    """Into a pipe, after what is there in a shell's `> log`, through a link."""
    works("eval out --csv t.csv")
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.symlink("file", "link")
    with open("log", "a") as log:
        print("before", file=log, flush=True)
        for path in ("pipe", "link", f"/dev/fd/{log.fileno()}"):
            works(f"eval out --csv {path}")
    text = Path("t.csv").read_text()
    assert Path("pipe").is_fifo() and os.read(reader, 9999).decode() == text == Path("file").read_text()
    assert Path("log").read_text() == "before\n" + text


def test_figure(here):
    pytest.importorskip("matplotlib")
    refused("eval out --plot figure.txt", "--plot figure.txt")
    works("eval out --lengths 8 16 --plot figure.png")
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")


# ---- training and resuming --------------------------------------------------------------------------


def test_train_from_the_command_line(here):
    """No --pos is the paper's four; the table has the other runs of OUT_DIR, too."""
    assert [*table("train out --overwrite")] == "alibi learned rotary sinusoidal t5".split()
    assert "step,train_loss,valid_loss,lr,tokens_per_s\n3," in Path("out/t5/log.csv").read_text()


def test_bfloat16(here):
    """One step of every encoding: all of its parameters move."""
    flags = "--block_size 132 --max_iters 1 --warmup_iters 0 --lengths 132 --pos"
    works(f"train new --dtype bfloat16 {flags} {' '.join(POSITIONS)}")
    works(f"train exact {flags} none")
    assert learned_in("new/none") != learned_in("exact/none")
    for pos in POSITIONS:
        run = load_run(f"new/{pos}")
        torch.manual_seed(1337)
        for name, p in GPT(GPTConfig(**run["config"])).named_parameters():
            assert 0 < (run["model"][name] - p).abs().max() < inf, (pos, name)


@parametrize("flags", [
    "none --dropout 0.2 --grad_accum 2", "fire --random_positions 20 --logn", "fox --act_dropout 0.5",
    "t5 --tokenizer byte --window 3 --attn_dropout 0.1", "learned --grad_clip 0 --weight_decay 0.5"])
def test_stopped_and_resumed(flags, here, monkeypatch):
    """Ctrl-C in steps 1 and 4: one line says what to do; --resume goes on, bit for bit."""
    works(f"train whole --lengths 8 --pos {flags}")
    command, get_lr, steps = f"train parts --resume --lengths 8 --pos {flags}", train.get_lr, []

    def interrupt(step, args):
        steps.append(str(step))
        if "".join(steps) in ("01", "0101234"):
            raise KeyboardInterrupt
        return get_lr(step, args)

    monkeypatch.setattr(train, "get_lr", interrupt)
    run = flags.split()[0]
    for _ in range(2):
        refused(command, "--resume goes on")
    works(command)
    assert "".join(steps) == "0101234345" and learned_in(f"parts/{run}") == learned_in(f"whole/{run}")


def test_killed_and_resumed(here):
    """By kill -9, wherever it is: after --resume it ends like a run that never was."""
    flags = "--pos none --dropout 0.1 --max_iters 80 --eval_interval 1 --lengths 8"
    works(f"train whole {flags}")
    log = Path("part/none/log.csv")
    for wanted in (10, 40):
        process = start(f"part --resume {flags}")
        while not log.exists() or log.read_text().count("\n") <= wanted:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert wanted <= load_run("part/none")["step"] < 80
    works(f"train part --resume {flags}")
    assert learned_in("part/none") == learned_in("whole/none")


def test_never_half_a_checkpoint(here, monkeypatch):
    """A disk that is full half way: the checkpoint before and its log stay."""
    save = torch.save

    def full(content, file):
        if "step" in content and content["step"] == 6:
            file.write(b"half")
            raise OSError("No space")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    refused("train new --pos alibi", "No space")
    assert load_run("new/alibi")["step"] == 3


def test_accumulated_gradients_are_one_big_batch(here):
    works("train big --pos rotary --eval_interval 1 --batch_size 8")
    works("train small --pos rotary --eval_interval 1 --batch_size 2 --grad_accum 4")
    for key in ("train_loss", "valid_loss"):
        big = column("big/rotary/log.csv", key)
        assert big == pytest.approx(column("small/rotary/log.csv", key), rel=1e-4)


def test_batches():
    """Every block once an epoch, each epoch in another order; targets one on."""
    args = mock.Mock(block_size=4, batch_size=8, device="cpu", seed=3, rank=0, processes=1)
    ids = torch.arange(51)
    x, y = map(torch.cat, zip(*[train.get_batch(ids, args, n) for n in range(3)]))
    assert torch.equal(x, x[:, :1] + torch.arange(4)) and torch.equal(y, x + 1)
    one, two = x[:, 0].split(12)
    assert one.tolist() != two.tolist() and {*one.tolist()} == {*two.tolist()} == {*range(0, 48, 4)}
    args.processes = 2
    assert torch.equal(torch.cat([train.get_batch(ids, args, 1)[0] for args.rank in (0, 1)]), x[8:16])


def test_learning_rate():
    args = mock.Mock(warmup_iters=10, max_iters=110, learning_rate=2.0)
    rates = [train.get_lr(step, args) for step in (0, 9, 10, 60, 109)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.1, 0.2], rel=0.01)


def test_two_processes_are_one(here):
    """Same losses as one process with the same global batch, and one voice."""
    flags = "--pos t5 --grad_accum 2 --batch_size 4 --eval_interval 1"
    works(f"train one {flags}")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    voice, _ = start(f"two {flags}", *torchrun).communicate()
    assert voice.count("step 3:") == voice.count("perplexity per") == 1
    one, two = (column(f"{folder}/t5/log.csv", "valid_loss") for folder in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_the_papers_finding(here):
    """Trained at 32 bytes of Python's library, tested at 256: ALiBi holds, sinusoidal and rotary do not."""
    text = b"".join(map(Path.read_bytes, sorted(Path(os.__file__).parent.glob("*.py"))))
    write_corpus("library", text[:2 ** 20], text[2 ** 20:][:12000], b"")
    works("train new --data library --tokenizer byte --block_size 32 --batch_size 16 --n_layer 3 --n_head 4 "
          "--n_embd 64 --max_iters 120 --warmup_iters 40 --eval_interval 120 --lengths 32 256 "
          "--pos sinusoidal rotary alibi")
    ppl = column("new/extrapolation.csv", "ppl")
    assert ppl[1] / ppl[0] < 1.04 < min(ppl[3] / ppl[2], ppl[5] / ppl[4])       # by name


# ---- help and mistakes: a line and an exit code, nothing lost ---------------------------------------


def test_help():
    lines = (works("train new --help") + works("eval --help")).splitlines()
    assert {f"  {pos:11} {x.__doc__.splitlines()[0]}" for pos, x in POSITIONS.items()} <= set(lines)


@cases("command, phrase", """
train new --data wikitext | a folder that has train.txt, valid.txt
train new --data latin | valid.txt is not UTF-8
train new --data short | train has 3 tokens
train new --lengths 8 151 | 151 tokens
train new --n_embd 15 | --n_embd
train new --device cuda | --device cuda
train new --learning_rate 1e9 | lower --learning_rate
train new --random_positions 7 | --random_positions
train new --dropout 1.5 | --dropout
train new --seed 4294967296 | --seed
train new --eval_interval 0 | --eval_interval
train out --pos none rotary | out/rotary/ckpt.pt is there
train out --pos none alibi --resume --data other | data corpus, not other
train broken --pos alibi --resume | no checkpoint of
train out --pos alibi --resume --overwrite | not allowed with
eval out/alibi --lengths 16 8 --stride 9 | --stride
eval out/alibi --window -1 | --window
eval out/alibi --lengths 999 | out/alibi""")
def test_mistake(command, phrase, here, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    write_corpus("latin", b"a", b"\xff\n", b"a")
    write_corpus("short", b"a b", b"a", b"a")
    shutil.copytree("out/alibi", "broken/alibi")
    os.truncate("broken/alibi/ckpt.pt", 20000)
    refused(command, phrase)
    assert not [*Path().glob("new/*/ckpt.pt"), *Path().glob("out/none")]


# ---- README.md and assets/RESULTS.md: each line of a table is what its CSV says ---------------------

ASSETS = Path(__file__).parent / "assets"
PAGES = ASSETS.parent / "README.md", ASSETS / "RESULTS.md"
TEXT = "\n".join(page.read_text() for page in PAGES)


def read_results(file):
    """As eval.group has them: {(label, trained length): {length: [perplexity of each seed]}}."""
    results = {}
    for row in csv.DictReader((ASSETS / file).read_text().splitlines()):
        flags = {key: int(row[key]) for key in ("logn", "window", "random_positions")}
        key = evaluation.label_of(row | flags), int(row["train_length"])
        length, value = (row["last"], row["loss"]) if "last" in row else (row["length"], row["ppl"])
        results.setdefault(key, {}).setdefault(int(length), []).append(float(value))
    return results


def markdown(file):
    """Its table, line by line; with verdicts where one trained length is tested at others."""
    results = read_results(file)
    lengths = sorted({length for by_length in results.values() for length in by_length})
    several = len({trained for _, trained in results}) > 1
    verdicts = not several and "first" not in (ASSETS / file).read_text()
    lines = [["trained" if several else "encoding", *map(str, lengths)] + [""] * verdicts]
    for (label, trained), measured in results.items():
        by_length = {length: measured.get(length, [nan]) for length in lengths}
        cells = [f"{label} {trained}" if several else label, *map(evaluation.cell, by_length.values())]
        lines.append(cells + [evaluation.verdict(trained, by_length)] * verdicts)
    return [f"| {' | '.join(cells)} |".replace("  ", " ") for cells in lines]


@parametrize("file", sorted({path.name for path in ASSETS.glob("*.csv")} - {"quick_log.csv"}))
def test_tables_are_their_csvs(file, capsys):
    """Each line stands in a page; quick.csv as eval.py prints it."""
    lines = markdown(file)
    if file == "quick.csv":
        evaluation.print_table(read_results(file), "", True)
        lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line not in TEXT] == []


def test_pages_name_what_is_there():
    links = {page.parent / x for page in PAGES for x in re.findall(r"\]\(([\w./]+)[)#]", page.read_text())}
    assert links and [link for link in links if not link.exists()] == []
    assert {path.name for path in ASSETS.iterdir()} <= {link.name for link in links}
    assert re.findall(r"^\| `(\w+)` \| ", PAGES[0].read_text(), re.M) == [*POSITIONS]
