"""A GPT whose one moving part is the position encoding, which acts in three places:

    x = pos.embed(wte(idx), i)
    q, k = pos.rotate(q, k, i)
    scores = q k' / sqrt(D) + pos.bias(i, j)        # softmax over j <= i, of these the last `window`

Shapes: B sequences, T tokens, C width (n_embd), H heads, D = C / H, V vocabulary.
Positions, i of queries and j of keys, are float32: fractions and offsets are positions too.

To add an encoding: a subclass of Position, an entry in POSITIONS, its plain formula in test_model.py.
"""
import functools
import math
from collections import namedtuple
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention


class ModelError(ValueError):
    """Settings that no model can have: one line that says which and why."""


@dataclass
class GPTConfig:
    """Everything that shapes a model. Raises ModelError for values that cannot be or do not fit together."""
    vocab_size: int = 256
    block_size: int = 64        # the trained length, in tokens
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0        # of embeddings and residual branches
    attn_dropout: float = 0.0   # of attention weights
    act_dropout: float = 0.0    # of the MLP's hidden layer
    pos: str = "alibi"
    window: int = 0             # a token sees itself and the window - 1 before it; 0 is all
    logn: bool = False          # queries times max(1, ln(place) / ln(block_size)), places from 1
    random_positions: int = 0   # train at sorted random positions below this; 0 is off

    def __post_init__(self):
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.default == 0 else 1
            if type(value) is not field.type or field.type in (int, float) and not least <= value < 2 ** 31:
                raise ModelError(f"{field.name} is {value!r}, not of {field.type.__name__} from {least} on")
        if self.n_embd % self.n_head:
            raise ModelError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        if 0 < self.random_positions < self.block_size:
            raise ModelError(f"--random_positions {self.random_positions} < --block_size {self.block_size}")
        if issubclass(POSITIONS[self.pos], Rotary) and self.n_embd // self.n_head % 2:
            raise ModelError(f"--pos {self.pos}: --n_embd {self.n_embd} / --n_head {self.n_head} is not even")


# ---- position encodings ---------------------------------------------------------------------------

Layer = namedtuple("Layer", "rotates window logn")      # what may differ from layer to layer


class Position(nn.Module):
    """No position at all but the causal mask ("NoPE", Haviv et al. 2203.16634)."""
    relative = True     # the bias depends on i - j alone
    scale = 1.0         # from one position to the next

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = [Layer(True, config.window, config.logn)] * config.n_layer

    def positions(self, T, device):
        """(T,): evenly spaced, or in training sorted random ones (Ruoss et al. 2305.16843)."""
        N = self.config.random_positions
        if N and self.training:
            return to_device(torch.randperm(N)[:T].sort().values.float(), device)
        spacing = N / T if N else self.scale
        return torch.arange(T, device=device, dtype=torch.float32) * spacing

    def embed(self, x, i):
        """Adds to the embeddings: (B, T, C), (T,) -> (B, T, C)."""
        return x

    def rotate(self, q, k, i):
        """Turns queries and keys: (B, T, H, D) twice, (T,) -> the same shapes."""
        return q, k

    def bias(self, i, j):
        """What is added to the scores: (rows, 1), (1, keys), j <= i -> (H, rows, keys)."""
        return torch.zeros_like(i - j)[None]


class Learned(Position):
    """x_i + p_i, one trained vector a position, up to the trained length (Gehring et al. 1705.03122)."""

    def __init__(self, config):
        super().__init__(config)
        rows = max(config.block_size, config.random_positions)
        self.table = nn.Parameter(torch.randn(rows, config.n_embd) * 0.02)

    def embed(self, x, i):
        length = round(len(self.table) / self.scale)
        if len(i) > length and not self.config.random_positions:
            raise ModelError(f"learned ends at {length} positions, asked for {len(i)}")
        # a position between two rows of the table gets a mixture of both
        below, above = i.floor().long(), i.ceil().long().clamp(max=len(self.table) - 1)
        share = (i - below)[:, None]
        return x + torch.lerp(F.embedding(below, self.table), F.embedding(above, self.table), share)


def angles(i, width, base=10000.0):
    """i w_n, w_n = base^(-2n/width), n from 0: (T,) -> (T, width / 2), in float32, for any positions."""
    return i[:, None] * base ** (-torch.arange(0, width, 2, device=i.device) / width)


class Sinusoidal(Position):
    """x_i + [sin(i w_n), cos(i w_n)], w_n = 10000^(-2n/C) (Vaswani et al. 1706.03762)."""

    def embed(self, x, i):
        angle = angles(i, x.shape[-1])
        waves = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)      # (T, C), C + 1 where it is odd
        return x + waves[:, :x.shape[-1]]


class Rotary(Position):
    """(q, k)_n turned by i w_n, w_n = 10000^(-2n/D), pairs (n, n + D/2) (RoPE, Su et al. 2104.09864)."""
    base = 10000.0

    def rotate(self, q, k, i):
        return self.turn(q, i), self.turn(k, i)

    def turn(self, x, i, growth=1.0):
        """x (B, T, H, D) turned by its positions (T,), and scaled by growth (T, 1, D/2)."""
        angle = angles(i, x.shape[-1], self.base)[:, None]                  # (T, 1, D/2)
        cos, sin = angle.cos() * growth, angle.sin() * growth
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)


class XPos(Rotary):
    """Rotary, q_n z_n^(i/512), k_n z_n^(-j/512), z_n = (2n/D + 0.4) / 1.4 (Sun et al. 2212.10554)."""

    def rotate(self, q, k, i):
        D = q.shape[-1]
        zeta = (torch.arange(0, D, 2, device=i.device) / D + 0.4) / 1.4
        growth = zeta ** ((i - i.mean())[:, None, None] / 512)              # centred: the powers stay small
        return self.turn(q, i, growth), self.turn(k, i, 1 / growth)


class T5(Position):
    """score + sqrt(D) t[bucket(i - j)]_h, 32 buckets, logarithmic from 16 to 128 (Raffel et al. 1910.10683).

    T5 itself does not divide scores by sqrt(D). Where they are divided, KERPLE's code multiplies the table:
    Adam, whose steps have one size, would else move it too little."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros(32, config.n_head))

    def bias(self, i, j):
        near = i - j
        far = 16 + 16 * torch.log(near.clamp(min=16) / 16) / math.log(128 / 16)
        bucket = torch.where(near < 16, near, far.clamp(max=31)).long()     # (rows, keys)
        return self.table[bucket].movedim(-1, 0) * math.sqrt(self.config.n_embd / self.config.n_head)


class ALiBi(Position):
    """score - m_h (i - j), m_h = 2^(-8h/H), h from 1, for H a power of 2 (Press et al. 2108.12409)."""

    def bias(self, i, j):
        # beyond n heads, the largest power of two, every other slope of 2n heads: h = 1 .. n, 1/2, 3/2, ...
        H = self.config.n_head
        n = 2 ** int(math.log2(H))
        h = torch.cat((torch.arange(1, n + 1, device=i.device), torch.arange(0.5, n, device=i.device)))[:H]
        slopes = 2.0 ** (-8 * h / n)
        return -slopes[:, None, None] * (i - j)


class Kerple(Position):
    """score - p_h ln(1 + a_h (i - j)), p and a trained, at least 0.01 (KERPLE-log, Chi et al. 2205.09921)."""

    def __init__(self, config):
        super().__init__(config)
        self.p = nn.Parameter(2 * torch.rand(config.n_head))
        self.a = nn.Parameter(torch.rand(config.n_head))

    def bias(self, i, j):
        for x in (self.p, self.a):
            x.data.clamp_(min=0.01)         # as the authors: in the graph, a head below would never learn
        return -self.p[:, None, None] * torch.log1p(self.a[:, None, None] * (i - j))


class Sandwich(Position):
    """score + (sum_n cos((i - j) / 10000^(n/64)) - 64) H / (8h), n = 1 .. 64 (Chi et al. 2212.10356)."""

    def bias(self, i, j):
        H = self.config.n_head
        h = torch.arange(1, H + 1, device=i.device)[:, None, None]
        n = torch.arange(1, 65, device=i.device)
        waves = torch.cos((i - j)[..., None] * 10000.0 ** (-n / 64)).sum(-1)
        return (waves - 64) * H / (8 * h)


class FIRE(Position):
    """score + MLP_h(ln(1 + c (i - j)) / ln(1 + c max(L, i))), MLP, c and L trained (Li et al. 2310.04418)."""
    relative = False

    def __init__(self, config):
        super().__init__(config)
        self.c = nn.Parameter(torch.tensor(0.1))
        self.L = nn.Parameter(torch.tensor(1.0))        # in units of 512
        self.mlp = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, config.n_head))

    def bias(self, i, j):
        c, L = self.c.abs(), 512 * self.L.abs()
        share = torch.log1p(c * (i - j)) / (torch.log1p(c * torch.maximum(L, i)) + 1e-6)
        return self.mlp(share[..., None]).movedim(-1, 0)


class HWFA(Rotary):
    """Rotary in a window; the last layer sees all, with log n, no positions (Su, kexue.fm/archives/9603)."""

    def __init__(self, config):
        super().__init__(config)
        below = config.n_layer - 1
        # the largest window that reaches at most 3/4 of the trained length, stacked: (window - 1) below + 1
        window = config.window or 1 + int(0.75 * config.block_size - 1) // max(1, below)
        self.layers = [Layer(True, window, config.logn)] * below + [Layer(False, 0, True)]


POSITIONS = {"none": Position, "learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "t5": T5,
             "alibi": ALiBi, "kerple": Kerple, "sandwich": Sandwich, "xpos": XPos, "fire": FIRE, "hwfa": HWFA}


# ---- test-time extensions: each sets one attribute for a length, at the trained one to what it was


def interpolate(pos, length):
    """Squeezes `length` positions into the trained range (Chen et al. 2306.15595)."""
    pos.scale = min(1.0, pos.config.block_size / length)


def ntk(pos, length):
    """Rotary's base times s^(D/(D-2)), s = length / trained length (bloc97, r/LocalLLaMA 2023)."""
    D = pos.config.n_embd // pos.config.n_head
    pos.base = Rotary.base * max(1.0, length / pos.config.block_size) ** (D / max(D - 2, 1))


def hierarchical(pos, length):
    """Position n i + j gets a u_i + (1 - a) u_j, u = (p - a p_0) / (1 - a) (Su, kexue.fm/archives/7947).

    With a = 0.4. That is p_j + a / (1 - a) (p_i - p_0): the first n stay as they were, bit for bit."""
    n = pos.config.block_size
    row = torch.arange(max(n, min(length, n * n)), device=pos.table.device)
    p = pos.table.data[:n]
    pos.table = nn.Parameter(p[row % n] + 0.4 / 0.6 * (p[row // n] - p[0]))


EXTENSIONS = {"interpolate": (interpolate, ("learned", "sinusoidal", "rotary", "alibi")),
              "ntk": (ntk, ("rotary",)),
              "hierarchical": (hierarchical, ("learned",))}


def fits(config, extension):
    """Whether a test-time extension is for a model with this config."""
    return config.pos in EXTENSIONS[extension][1] and not config.random_positions


# ---- attention ------------------------------------------------------------------------------------


class Mask:
    """What layers with one window add to their scores: pos.bias, and -inf for the keys out of sight.

    A relative bias looks the same from every query, so the rows of the (T, T) mask are pieces of one line:

        line = T - 1 times -inf, then the bias at distance 0, 1, ..., T - 1     # (H, 2T - 1)
        row of query i, its keys from the last to the first = line[i : i + T]

    Read with the keys backwards the mask is a view of it (unfold), without memory at any length."""

    def __init__(self, pos, i, window, fused):
        T = len(i)
        self.pos, self.i, self.T, self.window = pos, i, T, window or T
        self.biased = type(pos).bias is not Position.bias
        drawn = pos.training and pos.config.random_positions       # positions at random are not evenly apart
        self.relative = not self.biased or pos.relative and not drawn
        self.plain = not self.biased and self.window >= T           # causal attention is all there is
        if self.relative and not self.plain:
            bias = self.bias((i - i[0])[:, None], i.new_zeros(1, 1))[..., 0]                # (H, T)
            bias = bias.masked_fill(torch.arange(T, device=i.device) >= self.window, -math.inf)
            self.line = F.pad(bias, (T - 1, 0), value=-math.inf)
        self.blocks = causal_blocks(T, self.window, i.device) if fused and self.relative else None
        self.sliced = not self.plain and self.blocks is None
        if not self.sliced:
            return

        # All layers share the slices. Without a line they take memory: in evaluation each layer then
        # draws its own, of few queries.
        shared = self.relative or torch.is_grad_enabled()
        self.rows = 128 if shared else max(1, 2 ** 18 // T)
        self.whole = self.slice(0).flip(-1) if T <= self.rows else None     # (H, T, T), keys first to last
        several = shared and T > self.rows
        self.slices = [self.slice(start) for start in range(0, T, self.rows)] if several else None

    def bias(self, i, j):
        """In float32 under autocast too: bfloat16 has no distances beyond 256."""
        with torch.autocast(i.device.type, enabled=False):
            return self.pos.bias(i, j)

    def slice(self, start):
        """(H, rows, keys) for queries from `start` on; keys from the last one down to the first in sight."""
        stop = min(start + self.rows, self.T)
        first = max(0, start - self.window + 1)
        if self.relative:
            return self.line[:, start + self.T - stop:stop + self.T - 1 - first].unfold(1, stop - first, 1)
        place = torch.arange(self.T, device=self.i.device)
        query, key = place[start:stop, None], place[first:stop].flip(0)
        bias = self.bias(self.i[query], self.i[torch.minimum(query, key)])
        return bias.masked_fill((key > query) | (key <= query - self.window), -math.inf)

    def score_mod(self, score, b, h, q_idx, k_idx):
        """The same for FlexAttention, inside its kernel."""
        zero = self.line.shape[1] // 2
        return score + self.line[h, zero + q_idx - k_idx]


def attend(q, k, v, mask, dropout=0.0):
    """softmax(q k' / sqrt(D) + mask) v, by the fastest kernel that can: (B, H, T, D) -> (B, H, T, D)."""
    if mask.plain:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if mask.blocks is not None:
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex()
        score_mod = mask.score_mod if mask.biased else None
        return flex(q, k, v, score_mod=score_mod, block_mask=mask.blocks, kernel_options=FLEX_OPTIONS)
    with sdpa_kernel(MASKED_KERNELS):
        if mask.whole is not None:
            return F.scaled_dot_product_attention(q, k, v, lay_out(mask.whole, q), dropout)
        k, v, y = k.flip(2), v.flip(2), []              # the last key first, as in the mask
        for start in reversed(range(0, mask.T, mask.rows)):     # the longest first: the rest fits its memory
            rows = mask.slices[start // mask.rows] if mask.slices else mask.slice(start)
            queries = q[:, :, start:start + mask.rows]
            last = mask.T - start - queries.shape[2]
            keys = slice(last, last + rows.shape[-1])
            y.append(F.scaled_dot_product_attention(
                queries, k[:, :, keys], v[:, :, keys], lay_out(rows, q), dropout))
    return torch.cat(y[::-1], 2)


def lay_out(mask, q):
    """As kernels want it: (1, H, ...), in q's dtype; on CUDA contiguous, rows a multiple of 8 apart."""
    mask, keys = mask[None].to(q.dtype), mask.shape[-1]
    return F.pad(mask, (0, -keys % 8))[..., :keys] if q.is_cuda else mask


# not cuDNN's, which misreads masks: pytorch/pytorch 191612, 196678
MASKED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
compiled_flex = functools.cache(lambda: torch.compile(flex_attention))      # not at import: it takes seconds
# tiles that fit into the shared memory of an RTX 4090, an A100 and an H100
FLEX_OPTIONS = {"fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 2, "bwd_num_stages": 2}


@functools.lru_cache(maxsize=16)
def causal_blocks(T, window, device):
    """FlexAttention's BlockMask: the 128 x 128 tiles of the scores that are seen in part, and in full."""
    tile = torch.arange(-(-T // 128), device=device)
    query, key = tile[:, None], tile
    nearest, farthest = 128 * (query - key) - 127, 128 * (query - key) + 127        # distances in a tile
    seen = (key <= query) & (nearest < window)
    full = (key < query) & (farthest < window) & (128 * (query + 1) <= T)
    tiles = []
    for kind in (seen & ~full, full):       # how many of a kind in each row of tiles, and their columns first
        order = kind.int().argsort(dim=1, descending=True, stable=True)
        tiles += [kind.sum(1)[None, None].int(), order[None, None].int()]
    return BlockMask.from_kv_blocks(*tiles, 128, lambda b, h, i, j: (j <= i) & (i < j + window), (T, T))


# ---- the transformer ------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and the paper's ReLU MLP."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.attn_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.mlp_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.act_dropout = nn.Dropout(config.act_dropout)

    def forward(self, x, i, pos, layer, mask):
        x = x + self.dropout(self.attention(self.ln_1(x), i, pos, layer, mask))
        hidden = self.act_dropout(F.relu(self.c_fc(self.ln_2(x)), inplace=True))
        return x + self.dropout(self.mlp_proj(hidden))

    def attention(self, x, i, pos, layer, mask):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.config.n_head, -1).unbind(2)        # (B, T, H, D)
        if layer.rotates:
            q, k = pos.rotate(q, k, i)
        if layer.logn:
            place = torch.arange(1, T + 1, device=x.device)[:, None, None]
            q = (q * (place.log() / math.log(max(2, self.config.block_size))).clamp(min=1)).to(q.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)               # (B, H, T, D)
        y = attend(q, k, v, mask, self.config.attn_dropout if self.training else 0.0)
        return self.attn_proj(y.transpose(1, 2).reshape(B, T, C))


class Vocabulary(nn.Module):
    """Token embedding and output layer, tied: one (V, C) matrix, its rows times sqrt(C) on the way in.

    Beyond 20000 types, in bands of width C, C/4, C/16: adaptive input (Baevski & Auli 1809.10853) and
    adaptive softmax (Grave et al. 1609.04309). The head's last rows stand for the rare bands."""

    def __init__(self, V, C, cutoffs=(20000, 60000)):
        super().__init__()
        edges = [cutoff for cutoff in cutoffs if cutoff < V]
        self.bands = list(zip(edges, edges[1:] + [V]))          # of the rare types: first id, last + 1
        self.common = edges[0] if edges else V                  # how many types the head knows one by one
        widths = [max(1, C // 4 ** (n + 1)) for n in range(len(edges))]
        self.head = nn.Parameter(torch.randn(self.common + len(edges), C) * 0.02)
        sizes = [(stop - start, width) for (start, stop), width in zip(self.bands, widths)]
        self.tails = nn.ParameterList(torch.randn(size) * size[1] ** -0.5 for size in sizes)
        self.projections = nn.ParameterList(torch.randn(w, C) * 0.02 for w in widths)

    def forward(self, idx):
        """Embeddings: (B, T) -> (B, T, C)."""
        x = F.embedding(idx.clamp(max=self.common - 1), self.head)
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            rare = F.embedding(idx.clamp(start, stop - 1) - start, tail) @ projection
            x = torch.where((idx >= start)[..., None], rare.to(x.dtype), x)
        return x * x.shape[-1] ** 0.5

    def loss(self, x, targets):
        """-log p of each target in nats: (N, C), (N,) on the CPU -> (N,)."""
        # to the head a rare type is its band, whose row follows those of the common types
        head_targets = targets.clamp(max=self.common - 1) + sum(targets >= start for start, _ in self.bands)
        loss = self.head_loss(x, to_device(head_targets, x.device))
        # each band tells its own types apart, for the targets that lie in it
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            rows = ((targets >= start) & (targets < stop)).nonzero().squeeze(1)
            rare = to_device(targets[rows] - start, x.device)
            rows = to_device(rows, x.device)
            logits = F.linear(F.linear(x[rows], projection), tail)
            loss = loss.index_add(0, rows, F.cross_entropy(logits, rare, reduction="none").to(loss.dtype))
        return loss

    def head_loss(self, x, targets):
        """The head tells the common types and the bands apart: (N, C), (N,) -> (N,)."""
        # on CUDA with padded rows: matrix products like multiples of 64
        head = F.pad(self.head, (0, 0, 0, -len(self.head) % 64)) if x.is_cuda else self.head
        logits = F.linear(x, head)[:, :len(self.head)]
        return F.cross_entropy(logits, targets, reduction="none")


def to_device(x, device):
    """A copy that the CPU does not wait for."""
    pin = x.device.type == "cpu" and device.type == "cuda"
    return (x.pin_memory() if pin else x).to(device, non_blocking=True)


class GPT(nn.Module):
    """A pre-norm decoder. At equal seed all encodings start from the same weights: their own come last."""
    fuses = True        # attention through FlexAttention on CUDA; --no-compile turns it off

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = Vocabulary(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer) if "_proj" in name else 0.02)
        self.pos = POSITIONS[config.pos](config)

    def trunk(self, idx):
        """Final hidden states: (B, T) -> (B, T, C). Raises ModelError where T is beyond the encoding."""
        T, config = idx.shape[1], self.config
        i = self.pos.positions(T, idx.device)
        x = self.drop(self.pos.embed(self.wte(idx), i))
        # the masks are made here, outside of the compiled graph, where a trained bias would lose its gradient
        dropout = config.attn_dropout if self.training else 0.0
        fused = self.fuses and x.is_cuda and not dropout and config.n_embd // config.n_head >= 16
        masks = {layer.window: Mask(self.pos, i, layer.window, fused) for layer in set(self.pos.layers)}
        # a compiler unrolls slices, a graph for each length: it sees them at the trained length only
        unrolls = T != config.block_size and any(mask.sliced for mask in masks.values())
        return GPT.stack(self, x, i, masks) if unrolls else self.stack(x, i, masks)

    def stack(self, x, i, masks):
        """What torch.compile is for, all blocks: (B, T, C), (T,), the Mask for each window -> (B, T, C)."""
        for block, layer in zip(self.blocks, self.pos.layers):
            x = block(x, i, self.pos, layer, masks[layer.window])
        return self.ln_f(x)

    def forward(self, idx, targets):
        """Loss of each target in nats: (B, T) twice -> (B, T). In evaluation not all logits at once, and for
        a target of -1 none: its loss is 0."""
        x, flat = self.trunk(idx).flatten(0, 1), targets.flatten()
        if torch.is_grad_enabled():
            return self.wte.loss(x, flat).view(targets.shape)
        loss = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        logits = 2 ** (28 if x.is_cuda else 23)
        for rows in (flat >= 0).nonzero().squeeze(1).split(max(1, logits // self.config.vocab_size)):
            there = to_device(rows, x.device)
            loss[there] = self.wte.loss(x[there], flat[rows]).to(loss.dtype)
        return loss.view(targets.shape)

    def parameter_groups(self, weight_decay):
        """For AdamW: matrices decay; norms and whatever belongs to the position encoding do not."""
        decay, rest = [], []
        for name, p in self.named_parameters():
            (rest if p.dim() < 2 or name.startswith("pos.") else decay).append(p)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def flops_per_token(self):
        """Of a training step: 6 for each weight of blocks and head, 12 C for each key that a query sees."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1) + self.wte.head.numel()
        T = self.config.block_size
        windows = [min(layer.window or T, T) for layer in self.pos.layers]
        keys = sum(w - w * (w - 1) / (2 * T) for w in windows)      # on average: the first queries see fewer
        return 6 * weights + 12 * self.config.n_embd * keys
