"""A GPT whose one moving part is the position encoding, which acts in three places:

    x = pos.embed(wte(idx), i)
    q, k = pos.rotate(q, k, turns, x)               # turns = pos.turns(i); x is what q and k were made of
    scores = q k' / sqrt(D) + pos.bias(i, j)        # softmax over the keys in sight

Shapes: B sequences, T tokens, C width (n_embd), H heads, D = C / H, V vocabulary.
A token's place is its index from 0. Its position is what the encoding is told of it, i for queries and j for
keys: a float32 number, evenly spaced or random. config.pos is an encoding's name, model.pos the module; what
a layer has of it is called `encoding`.

To add an encoding: a subclass of Position, an entry in POSITIONS, its plain formula in test_model.py.
"""
import functools
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, inf, log, log2, pi, sqrt

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


@dataclass
class GPTConfig:
    vocab_size: int = 256
    block_size: int = 256       # the trained length, in tokens
    n_layer: int = 3
    n_head: int = 8
    n_embd: int = 128
    dropout: float = 0.0        # of embeddings and residual branches
    attn_dropout: float = 0.0   # of attention weights
    act_dropout: float = 0.0    # of the MLP's activations
    pos: str = "alibi"          # a name in POSITIONS
    window: int = 0             # a token sees itself and the window - 1 before it; 0 is all
    logn: bool = False          # queries times max(1, ln(place + 1) / ln(block_size))
    random_positions: int = 0   # train at sorted random positions below this; 0 is off


# ---- position encodings ---------------------------------------------------------------------------


class Position(nn.Module):
    """No position at all but the causal mask ("NoPE", Haviv et al. 2203.16634).

    It is the base of all others, which override what they change."""
    relative = True             # the bias depends on i - j alone
    max_length = inf            # the longest text, in tokens
    spacing = 1.0               # from one position to the next

    def __init__(self, config):
        super().__init__()
        self.config = config

    def layer(self, n):
        """Of layer n: its encoding, its window (0 is all), whether log n scales queries.

        An encoding in one part of the layers alone, or with a window of its own, overrides this."""
        return self, self.config.window, self.config.logn

    def at_random(self):
        """Whether positions are drawn: in training, where random_positions says so."""
        return self.training and self.config.random_positions > 0

    def positions(self, T, device):
        """(T,): evenly spaced, or sorted random ones (Ruoss et al. 2305.16843)."""
        N = self.config.random_positions
        if self.at_random():
            return torch.randperm(N)[:T].sort().values.float().to(device)
        return torch.arange(T, device=device) * (N / T if N else self.spacing)

    def embed(self, x, i):
        """Adds to the embeddings: (B, T, C), (T,) -> (B, T, C)."""
        return x

    def turns(self, i):
        """What rotate needs of the positions (T,), worked out once for all layers."""
        return None

    def rotate(self, q, k, turns, x):
        """Changes queries and keys (B, H, T, D): turns them by turns(i), or appends coordinates.

        x is the layer's normed input (B, T, C), for encodings that look at the text."""
        return q, k

    def bias(self, i, j):
        """What is added to the scores, or None: (rows, 1), (rows, keys), j <= i -> (H, rows, keys)."""
        return None


class Learned(Position):
    """x_i + p_i, one trained vector a position, up to the trained length (Gehring et al. 1705.03122)."""

    def __init__(self, config):
        super().__init__(config)
        count = max(config.block_size, config.random_positions)
        self.vectors = nn.Parameter(torch.randn(count, config.n_embd) * 0.02)
        self.max_length = count

    def embed(self, x, i):
        # a position between two vectors gets a mixture of both
        below = i.long()
        above = (below + 1).clamp(max=len(self.vectors) - 1)
        return x + torch.lerp(self.vectors[below], self.vectors[above], (i - below)[:, None])


def frequencies(width, device=None):
    """w_n = 10000^(-2n/width), n from 0: (width / 2,)."""
    return 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)


class Sinusoidal(Position):
    """x_i + sin(i w_n) at 2n, cos(i w_n) at 2n + 1, w_n = 10000^(-2n/C) (Vaswani et al. 1706.03762)."""

    def embed(self, x, i):
        angle = i[:, None] * frequencies(self.config.n_embd, i.device)      # (T, C/2)
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class Rotary(Position):
    """(q, k)_n turned by i w_n, w_n = 10000^(-2n/D), pairs (n, n + D/2) (RoPE, Su et al. 2104.09864)."""
    stretch = 1.0               # times w; test-time extensions set it
    amplitude = 1.0             # times q and k; yarn sets it

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("w", frequencies(config.n_embd // config.n_head), persistent=False)

    def turns(self, i):
        """(cos, sin) of queries, (cos, sin) of keys: (T, D/2) each."""
        angle = i[:, None] * (self.w * self.stretch)
        of_both = angle.cos() * self.amplitude, angle.sin() * self.amplitude
        return of_both, of_both

    def rotate(self, q, k, turns, x):
        of_queries, of_keys = turns
        return turned(q, *of_queries), turned(k, *of_keys)


def turned(x, cos, sin):
    """Pairs (n, n + D/2) of queries or keys, turned: (B, H, T, D), (T, D/2) twice -> (B, H, T, D)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)


class XPos(Rotary):
    """Rotary, q_n z_n^(i/512), k_n z_n^(-j/512), z_n = (2n/D + 0.4) / 1.4 (Sun et al. 2212.10554)."""
    def turns(self, i):
        n = torch.arange(len(self.w), device=i.device)
        z = (n / len(n) + 0.4) / 1.4
        centred = i - (i[0] + i[-1]) / 2        # so that the powers stay small
        growth = z ** (centred[:, None] / 512)
        (cos, sin), _ = super().turns(i)
        return (cos * growth, sin * growth), (cos / growth, sin / growth)


class HoPE(Rotary):
    """Rotary, but pairs with no whole turn in block_size, w_n < 2 pi / L, have none (Chen et al. 2410.21216).

    p-RoPE (Barbero et al. 2410.06205) turns the first p D/2 pairs instead."""

    def __init__(self, config):
        super().__init__(config)
        self.w[self.w < 2 * pi / config.block_size] = 0.0


class T5(Position):
    """score + sqrt(D) t[bucket(i - j)]_h, 32 buckets, logarithmic from 16 to 128 (Raffel et al. 1910.10683).

    T5 itself does not divide scores by sqrt(D). Here they are divided, so t is multiplied, as in KERPLE's
    code: else Adam, whose steps have one size, would move the scores too slowly."""

    def __init__(self, config):
        super().__init__(config)
        self.t = nn.Parameter(torch.zeros(32, config.n_head))

    def bias(self, i, j):
        distance = i - j
        octaves = torch.log2(distance.clamp(min=16) / 16)       # 3 from 16 to 128
        far = (16 + 16 * octaves / 3).clamp(max=31)
        bucket = torch.minimum(distance, far).long()                        # (rows, keys)
        D = self.config.n_embd / self.config.n_head
        return sqrt(D) * self.t[bucket].movedim(-1, 0)


def slopes(H):
    """m_h = 2^(-8h/H), h from 1, for H a power of 2; else slopes(n), n the power below, then every other of
    slopes(2n)."""
    n = 2 ** int(log2(H))
    if n == H:
        return [2 ** (-8 * h / H) for h in range(1, H + 1)]
    return slopes(n) + slopes(2 * n)[::2][:H - n]


class ALiBi(Position):
    """score - m_h (i - j), m_h = 2^(-8h/H), h from 1, for H a power of 2 (Press et al. 2108.12409)."""

    def bias(self, i, j):
        m = torch.tensor(slopes(self.config.n_head), device=i.device)
        return -m[:, None, None] * (i - j)


class Kerple(Position):
    """score - p_h ln(1 + a_h (i - j)), p and a trained, at least 0.01 (KERPLE-log, Chi et al. 2205.09921)."""

    def __init__(self, config):
        super().__init__(config)
        self.p = nn.Parameter(2 * torch.rand(config.n_head, 1, 1))
        self.a = nn.Parameter(torch.rand(config.n_head, 1, 1))

    def bias(self, i, j):
        return -at_least_001(self.p) * torch.log1p(at_least_001(self.a) * (i - j))


def at_least_001(x):
    """x clamped, with a gradient below 0.01 too: else it could not come back from there."""
    return x + (x.clamp(min=0.01) - x).detach()


class Sandwich(Position):
    """score + (sum_n cos((i - j) / 10000^(n/64)) - 64) H / (8h), n = 1 .. 64 (Chi et al. 2212.10356)."""

    def bias(self, i, j):
        H = self.config.n_head
        h = torch.arange(1, H + 1, device=i.device)[:, None, None]
        n = torch.arange(1, 65, device=i.device)
        angles = (i - j)[..., None] * 10000.0 ** (-n / 64)
        # less 64: so it is 0 at distance 0, where bfloat16 is finest; softmax does not see a constant
        return (angles.cos().sum(-1) - 64) * H / (8 * h)


class FIRE(Position):
    """score + MLP_h(ln(1 + c (i - j)) / ln(1 + c max(l, i))), MLP, c and l trained (Li et al. 2310.04418)."""
    relative = False

    def __init__(self, config):
        super().__init__(config)
        self.c = nn.Parameter(torch.tensor(0.1))
        self.l = nn.Parameter(torch.tensor(1.0))        # in quarters of the trained length
        self.mlp = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, config.n_head))

    def bias(self, i, j):
        c = self.c.abs()
        threshold = self.config.block_size / 4 * self.l.abs()
        norm = torch.log1p(c * torch.maximum(threshold, i)) + 1e-6
        progress = torch.log1p(c * (i - j)) / norm
        return self.mlp(progress[..., None]).movedim(-1, 0)


class RNoPE(Rotary):
    """Rotary in a window; every 4th layer from the last sees all, no positions (Yang et al. 2501.18795)."""
    every = 4
    scaled = False              # whether log n scales queries in the layers that see all

    def __init__(self, config):
        super().__init__(config)
        self.plain = Position(config)

    def layer(self, n):
        config = self.config
        if (config.n_layer - 1 - n) % self.every == 0:
            return self.plain, 0, config.logn or self.scaled
        # the layers between, with windows of w, reach 1 + between (w - 1) tokens: 3/4 of block_size at most
        between = min(self.every, config.n_layer) - 1
        widest = 1 + int(0.75 * config.block_size - 1) // between
        return self, config.window if config.window else widest, config.logn


class HWFA(RNoPE):
    """Rotary in a window; the last layer sees all, with log n, no positions (Su, kexue.fm/archives/9603)."""
    every = inf                 # n % inf is 0 for 0 alone
    scaled = True


class FoX(Position):
    """score + ln f_(j+1) + ... + ln f_i, f_t,h = sigmoid(w_h x_t + b_h) (FoX, Lin et al. 2503.02130).

    The forget gates f go by tokens, not by positions; each layer has its own."""

    def __init__(self, config):
        super().__init__(config)
        self.gates = nn.ModuleList(ForgetGate(config) for _ in range(config.n_layer))

    def layer(self, n):
        return self.gates[n].layer(n)       # the gate, config.window, config.logn


class ForgetGate(Position):
    """One layer of FoX. With c_i = ln f_0 + ... + ln f_i the sum is c_i - c_j; softmax does not see c_i."""

    def __init__(self, config):
        super().__init__(config)
        self.f = nn.Linear(config.n_embd, config.n_head)
        nn.init.normal_(self.f.weight, std=0.02)
        nn.init.zeros_(self.f.bias)

    def rotate(self, q, k, turns, x):
        """Eight coordinates more: 1 in queries; in keys three that add up to -c_j sqrt(D), then five of 0.

        Three keep float32's precision in bfloat16. Eight, since kernels like multiples of it."""
        log_f = F.logsigmoid(self.f(x).float())                             # (B, T, H)
        rest = log_f.mT.cumsum(2) * -sqrt(q.shape[-1])                 # (B, H, T)
        parts = []
        for _ in range(3):
            parts.append(rest.to(q.dtype))
            rest = rest - parts[-1]
        k = torch.cat((k, torch.stack(parts, -1)), -1)
        return F.pad(q, (0, 8), value=1.0), F.pad(k, (0, 5))


POSITIONS = {"none": Position, "learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "xpos": XPos,
             "hope": HoPE, "rnope": RNoPE, "hwfa": HWFA, "t5": T5, "alibi": ALiBi, "kerple": Kerple,
             "sandwich": Sandwich, "fire": FIRE, "fox": FoX}


# ---- the transformer ------------------------------------------------------------------------------


class GPT(nn.Module):
    """A pre-norm decoder. At equal seed all encodings start from the same weights: their own come last."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.flex = False           # whether attention on CUDA goes through FlexAttention
        # 20000 is AdaptiveVocabulary's first cutoff
        vocabulary = AdaptiveVocabulary if config.vocab_size > 20000 else Vocabulary
        self.wte = vocabulary(config.vocab_size, config.n_embd)     # and, tied, nanoGPT's lm_head
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                residual = sqrt(2 * config.n_layer) if "_proj" in name else 1
                nn.init.normal_(weight, std=0.02 / residual)
        self.pos = POSITIONS[config.pos](config)

    def trunk(self, idx):
        """Final hidden states: (B, T) -> (B, T, C)."""
        T = idx.shape[1]
        i = self.pos.positions(T, idx.device)
        x = self.dropout(self.pos.embed(self.wte(idx), i))
        # FlexAttention has no dropout
        flex = self.flex and x.is_cuda and not (self.training and self.config.attn_dropout)
        shared = {}         # turns and mask, by layers with the same encoding and window
        for n, block in enumerate(self.blocks):
            encoding, window, logn = self.pos.layer(n)
            window = min(window, T) if window else T
            if (encoding, window) not in shared:
                # in float32: bfloat16 cannot tell distances beyond 256 apart
                with torch.autocast(i.device.type, enabled=False):
                    mask = make_mask(encoding, window, i, flex)
                    shared[encoding, window] = encoding.turns(i), mask
            x = block(x, encoding, window, logn, *shared[encoding, window])
        return self.ln_f(x)

    def forward(self, idx, targets):
        """Losses in nats at the last S places: (B, T), targets (B, S) -> (B, S)."""
        S = targets.shape[1]
        x = self.trunk(idx)[:, -S:].flatten(0, 1)
        # in evaluation not all logits at once
        most = len(x) if torch.is_grad_enabled() else 1 + 2 ** 24 // len(self.wte.weight)
        pieces = zip(x.split(most), targets.flatten().split(most))
        return torch.cat([self.wte.loss(*piece) for piece in pieces]).view(-1, S)

    def log_probs(self, idx):
        """log p of every token as the next one, at each place: (B, T) -> (B, T, V)."""
        return self.wte.log_probs(self.trunk(idx))

    def parameter_groups(self, weight_decay):
        """For AdamW: matrices decay; norms and what an encoding trains do not."""
        decay, rest = [], []
        for name, p in self.named_parameters():
            (rest if p.dim() < 2 or name.startswith("pos.") else decay).append(p)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def compile_parts(self):
        """Compiles blocks and vocabulary. Not make_mask: in a graph a trained bias loses its gradient."""
        torch.compiler.reset()      # of the models before this one
        torch._dynamo.config.recompile_limit = 64       # graphs of one function, for its shapes and layers
        for part in (self.wte, *self.blocks):
            part.compile()
        self.wte.token_loss = torch.compile(self.wte.token_loss)
        self.flex = True


class Block(nn.Module):
    """Pre-norm attention and the paper's ReLU MLP."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C, bias=False)
        self.c_attn = nn.Linear(C, 3 * C, bias=False)
        self.attn_proj = nn.Linear(C, C, bias=False)
        self.ln_2 = nn.LayerNorm(C, bias=False)
        self.c_fc = nn.Linear(C, 4 * C, bias=False)
        self.mlp_proj = nn.Linear(4 * C, C, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.act_dropout = nn.Dropout(config.act_dropout)

    def forward(self, x, encoding, window, logn, turns, mask):
        """(B, T, C), what pos.layer says, with a window of at most T, turns, mask -> (B, T, C)."""
        B, T, C = x.shape
        normed = self.ln_1(x)
        qkv = self.c_attn(normed).view(B, T, 3, self.config.n_head, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))      # (B, H, T, D)
        if logn:        # before the encoding, whose own coordinates are not scaled
            n = torch.arange(1, T + 1, device=x.device)[:, None]
            scale = n.log() / log(self.config.block_size)
            q = (q * scale.clamp(min=1)).to(q.dtype)
        q, k = encoding.rotate(q, k, turns, normed)
        dropout = self.config.attn_dropout if self.training else 0.0
        y = attend(q, k, v, mask, window, dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.dropout(self.attn_proj(y))
        activations = F.relu(self.c_fc(self.ln_2(x)), inplace=True)
        return x + self.dropout(self.mlp_proj(self.act_dropout(activations)))


# ---- attention as it is defined. The tests alone call attention(); make_mask() below calls sight(), too


def attention(q, k, v, encoding, window, i):
    """softmax(q k' / sqrt(D) + bias) v: (B, H, T, D) three times, positions (T,) -> (B, H, T, D).

    Queries and keys may be wider than values; D is the width of values."""
    place = torch.arange(len(i), device=i.device)
    scores = q @ k.mT / sqrt(v.shape[-1])
    return torch.softmax(scores + sight(encoding, window, i, place, place), -1) @ v


def sight(encoding, window, i, queries, keys):
    """The bias where a query sees a key, else -inf: positions (T,), places (n,) and (m,) -> (H, n, m)."""
    query = queries[:, None]
    # for keys after the query the bias is that of distance 0: at a negative one it may be nan
    bias = encoding.bias(i[query], i[torch.minimum(query, keys)])
    if bias is None:
        bias = torch.zeros(encoding.config.n_head, 1, 1, device=i.device)
    return bias.masked_fill((keys > query) | (keys <= query - window), -inf)


# ---- attention as it runs -------------------------------------------------------------------------

# cuDNN's attention misreads masks: pytorch/pytorch 191612, 196678
torch.backends.cuda.enable_cudnn_sdp(False)
# tiles that fit into the shared memory of an RTX 4090, an A100 and an H100
FLEX_OPTIONS = {"fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 2, "bwd_num_stages": 2}


def make_mask(encoding, window, i, flex):
    """What sight() gives for all queries, the last one first: (H, T, T), and a BlockMask for FlexAttention.

    Both are None for the causal mask alone, and the BlockMask where FlexAttention does not run.
    At evenly spaced positions a relative bias looks the same from every query. So all rows are pieces of one
    line, each a step further on. For T = 3, b(d) the bias at distance d:

        line                  b(2)  b(1)  b(0)  -inf  -inf          # (H, 2T - 1)
        row of query 2        b(2)  b(1)  b(0)
        row of query 1              b(1)  b(0)  -inf
        row of query 0                    b(0)  -inf  -inf

    Such a mask is a view of the line, without memory of its own. Others take H T^2 numbers, as do the copies
    that FlexAttention gets of short and of trained ones."""
    T = len(i)
    first = i[:1, None]
    if encoding.bias(first, first) is None and window >= T:
        return None, None       # kernels have the causal mask of their own
    place = torch.arange(T, device=i.device)
    last_to_first = place.flip(0)
    if encoding.relative and not encoding.at_random():
        of_first_key = sight(encoding, window, i, last_to_first, place[:1])         # (H, T, 1)
        line = F.pad(of_first_key[..., 0], (0, T - 1), value=-inf)
        mask = line.unfold(1, T, 1)
        if not flex:
            return mask, None
        # a copy lets the kernel load neighbours together; and a view would lose its gradient
        if T <= 1024 or mask.requires_grad:
            mask = mask.contiguous()
        return mask, causal_blocks(T, window, i.device)
    rows = []
    for queries in last_to_first.split(128):        # FIRE takes 32 times the memory on its way
        end = T - 128 * len(rows)       # of the keys that any of these queries sees
        seen = sight(encoding, window, i, queries, place[:end])
        rows.append(F.pad(seen, (0, T - end), value=-inf))
    return torch.cat(rows, 1), None


@functools.lru_cache(maxsize=16)
def causal_blocks(T, window, device):
    """FlexAttention's BlockMask: which tiles of the scores it need not look at."""
    def visible(b, h, query, key):
        return (key <= query) & (key > query - window)
    return create_block_mask(visible, None, None, T, T, device)


def attend(q, k, v, mask, window, dropout):
    """attention() by torch's kernels: (B, H, T, D) three times, what make_mask gave -> (B, H, T, D).

    A mask begins with the last query, hence the flips."""
    D = v.shape[-1]
    scale = D ** -0.5
    if q.shape[-1] > D:         # as FoX's are
        v = F.pad(v, (0, q.shape[-1] - D))
    rows, blocks = mask
    kernel = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scale)
    if rows is None:
        y = kernel(q, k, v, is_causal=True)
    elif blocks is not None:
        y = by_flex(q, k, v, rows, blocks, scale)
    elif q.is_cuda:
        rows = rows.to(q.dtype).contiguous()        # a kernel may not read a view whose rows overlap
        y = kernel(q.flip(2), k, v, rows[None]).flip(2)
    else:
        y = in_slices(q, k, v, rows, window, kernel)
    return y[..., :D]


def by_flex(q, k, v, rows, blocks, scale):
    """FlexAttention: one kernel that adds the rows and leaves out tiles without keys in sight."""
    T = q.shape[2]

    def score_mod(score, b, h, query, key):
        return score + rows[h, T - 1 - query, key]
    return flex_attention(q, k, v, score_mod, blocks, scale, kernel_options=FLEX_OPTIONS)


def in_slices(q, k, v, rows, window, kernel):
    """128 queries at a time, the last first, without the keys that none of them sees."""
    y = []
    end = q.shape[2]
    for queries, part in zip(q.flip(2).split(128, 2), rows.split(128, 1)):
        start = end - queries.shape[2]
        seen = slice(max(0, start - window + 1), end)
        part = part[None, ..., seen].to(q.dtype)
        y.append(kernel(queries, k[:, :, seen], v[:, :, seen], part))
        end = start
    return torch.cat(y, 2).flip(2)


# ---- the vocabulary: token embedding and output layer, tied ---------------------------------------


class Vocabulary(nn.Module):
    """One (V, C) matrix, its rows times sqrt(C) on the way in."""

    def __init__(self, V, C):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, C) * 0.02)

    def forward(self, idx):
        """Embeddings: (B, T) -> (B, T, C)."""
        return F.embedding(idx, self.weight) * sqrt(self.weight.shape[1])

    def loss(self, x, targets):
        """-log p of each target in nats: (N, C), (N,) -> (N,)."""
        return self.token_loss(x, self.weight, targets)

    def log_probs(self, x):
        """log p of every token: (..., C) -> (..., V)."""
        return F.linear(x, self.weight).log_softmax(-1)

    @staticmethod
    def token_loss(x, weight, targets):
        """-log p of each target among the rows of a matrix: (N, C), (rows, C), (N,) -> (N,)."""
        V = len(weight)
        if x.is_cuda:
            weight = F.pad(weight, (0, 0, 0, -V % 64))      # GPUs like matrix products in multiples of 64
        logits = F.linear(x, weight)[:, :V]
        return F.cross_entropy(logits, targets, reduction="none")


class AdaptiveVocabulary(Vocabulary):
    """For more than 20000 words: the matrix has the common ones, and a row for each band of rarer ones.

    Adaptive input (Baevski & Auli 1809.10853), adaptive softmax (Grave et al. 1609.04309)."""

    def __init__(self, V, C, cutoffs=(20000, 60000)):
        starts = [cutoff for cutoff in cutoffs if cutoff < V]
        super().__init__(starts[0] + len(starts), C)
        self.common = starts[0]
        self.bands = nn.ModuleList()
        for n, (start, stop) in enumerate(pairwise([*starts, V]), 1):
            self.bands.append(Band(start, stop, max(1, C // 4 ** n), C))

    def forward(self, idx):
        x = F.embedding(idx.clamp(max=self.common - 1), self.weight)
        for band in self.bands:
            inside, rows = band.find(idx)
            rare = F.embedding(rows, band.weight) @ band.projection
            x = torch.where(inside[..., None], rare.to(x.dtype), x)
        return x * sqrt(x.shape[-1])

    def loss(self, x, targets):
        # in the matrix a rare word is its band, whose row follows those of the common words
        rows = targets.clamp(max=self.common - 1) + sum(targets >= band.start for band in self.bands)
        loss = self.token_loss(x, self.weight, rows)
        # and then itself among the words of the band
        for band in self.bands:
            inside, rows = band.find(targets)
            inside = inside.nonzero().squeeze(1)        # once, since a GPU has to be waited for
            narrow = F.linear(x[inside], band.projection)
            loss[inside] += self.token_loss(narrow, band.weight, rows[inside])
        return loss

    def log_probs(self, x):
        of_rows = super().log_probs(x)
        parts = [of_rows[..., :self.common]]
        for row, band in enumerate(self.bands, self.common):
            narrow = F.linear(x, band.projection)
            inside = F.linear(narrow, band.weight).log_softmax(-1)
            parts.append(of_rows[..., row:row + 1] + inside)
        return torch.cat(parts, -1)


class Band(nn.Module):
    """Words with ids from `start` to `stop` - 1: vectors of a smaller width, and a projection to C."""

    def __init__(self, start, stop, width, C):
        super().__init__()
        self.start, self.stop = start, stop
        self.weight = nn.Parameter(torch.randn(stop - start, width) * width ** -0.5)
        self.projection = nn.Parameter(torch.randn(width, C) * 0.02)

    def find(self, idx):
        """Whether words are in the band, and their rows of the weight; those outside get any."""
        rows = idx.clamp(self.start, self.stop - 1) - self.start
        return rows == idx - self.start, rows


# ---- test-time extensions: set for each length; at the trained length nothing changes


def interpolate(pos, length):
    """Squeezes `length` positions into the trained range (Chen et al. 2306.15595)."""
    pos.spacing = min(1.0, pos.config.block_size / length)
    pos.max_length = length


def ntk(pos, length):
    """Rotary with 10000 s^(D/(D-2)) for 10000, s = length / trained length (bloc97, r/LocalLLaMA 2023)."""
    s = max(1.0, length / pos.config.block_size)
    n = torch.arange(len(pos.w), device=pos.w.device)
    pos.stretch = s ** (-n / max(1, len(n) - 1))


def yarn(pos, length):
    """Rotary with w_n / s for pairs with at most one period in the trained length, w_n from 32 periods on.

    Between them it is linear in n, s = length / trained length; q and k times 0.1 ln s + 1 (Peng et al.
    2309.00071, as their code has it, without their fine-tuning)."""
    L, half = pos.config.block_size, len(pos.w)
    s = max(1.0, length / L)
    n_32, n_1 = (half * log(L / (2 * pi * periods), 10000) for periods in (32, 1))
    low = max(0, floor(n_32))
    high = max(low + 0.001, min(2 * half - 1, ceil(n_1)))
    n = torch.arange(half, device=pos.w.device)
    ramp = ((n - low) / (high - low)).clamp(0, 1)
    pos.stretch = 1 + ramp * (1 / s - 1)
    pos.amplitude = 0.1 * log(s) + 1


EXTENSIONS = {"interpolate": (interpolate, ("learned", "sinusoidal", "rotary", "hope", "alibi")),
              "ntk": (ntk, ("rotary", "hope")),
              "yarn": (yarn, ("rotary", "hope"))}
