"""A GPT whose one moving part is the position encoding.

Letters in shapes: B sequences, T tokens, C width (n_embd), H heads, D = C / H, V vocabulary.
i is the position of a query, j of a key, h a head; scores are q_i . k_j / sqrt(D) before the softmax.
To add an encoding: a subclass of Position, an entry in POSITIONS, its plain formula in test_model.py.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


class ModelError(ValueError):
    """Settings that no model can have: one line that says which and why."""


@dataclass
class GPTConfig:
    """Everything that shapes a model. Raises ModelError where the numbers do not fit together."""
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
    random_positions: int = 0   # train at sorted random positions out of [0, N); 0 is off

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ModelError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        if self.random_positions and self.random_positions < self.block_size:
            raise ModelError(f"--random_positions {self.random_positions} is below --block_size {self.block_size}")
        if issubclass(POSITIONS[self.pos], Rotary) and self.n_embd // self.n_head % 2:
            raise ModelError(f"--pos {self.pos} needs --n_embd {self.n_embd} / --n_head {self.n_head} to be even")


# ---- position encodings ---------------------------------------------------------------------------


class Position(nn.Module):
    """No position at all but the causal mask ("NoPE", Haviv et al. 2203.16634)."""
    bias = None           # or bias(h, i, j), elementwise: what is added to the score
    relative = True       # the bias depends on i - j alone
    max_length = math.inf

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scale = config.random_positions / config.block_size or 1.0     # from one position to the next

    def positions(self, T, device):
        """(T,) float32: evenly spaced, or sorted random in training (Ruoss et al. 2305.16843)."""
        if self.training and self.config.random_positions:
            return torch.randperm(self.config.random_positions)[:T].sort().values.to(device, torch.float32)
        return torch.arange(T, device=device, dtype=torch.float32) * self.scale

    def embed(self, x, i):
        """Adds to the embeddings: (B, T, C), (T,) -> (B, T, C)."""
        return x

    def rotate(self, q, k, i):
        """Turns queries and keys: (B, T, H, D) twice, (T,) -> the same."""
        return q, k

    def layer(self, n):
        """(rotates, window, logn) of layer n."""
        return True, self.config.window, self.config.logn


class Learned(Position):
    """x_i + p_i, one trained vector a position, none beyond the trained length (Gehring et al. 1705.03122)."""

    def __init__(self, config):
        super().__init__(config)
        rows = max(config.block_size, config.random_positions)
        self.table = nn.Parameter(torch.randn(rows, config.n_embd) * 0.02)

    @property
    def max_length(self):
        return round(len(self.table) / self.scale)

    def embed(self, x, i):
        low, high = i.floor().long(), i.ceil().long().clamp(max=len(self.table) - 1)
        return x + torch.lerp(F.embedding(low, self.table), F.embedding(high, self.table), (i - low)[:, None])


def angles(i, width, base=10000.0):
    """i w_n, w_n = base^(-2n/width), n from 0: (T,) -> (T, width / 2), in float32, for any positions."""
    return i[:, None] * base ** (-torch.arange(0, width, 2, device=i.device) / width)


class Sinusoidal(Position):
    """x_i + [sin(i w_n), cos(i w_n)], w_n = 10000^(-2n/C) (Vaswani et al. 1706.03762)."""

    def embed(self, x, i):
        angle = angles(i, x.shape[-1])
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :x.shape[-1]]


class Rotary(Position):
    """(q, k)_n turned by i w_n, w_n = 10000^(-2n/D), pairs (n, n + D/2) (RoPE, Su et al. 2104.09864)."""
    base = 10000.0

    def rotate(self, q, k, i):
        return self.turn(q, i), self.turn(k, i)

    def turn(self, x, i, growth=1.0):
        """x turned by its positions, and scaled by growth, which spreads to (T, 1, D/2)."""
        D = x.shape[-1]
        angle = angles(i, D, self.base)[:, None]
        cos, sin = angle.cos() * growth, angle.sin() * growth
        return torch.addcmul(x * torch.cat((cos, cos), -1), x.roll(D // 2, -1), torch.cat((-sin, sin), -1)).to(x.dtype)


class XPos(Rotary):
    """Rotary with q_n times z_n^(i/512), k_n times z_n^(-j/512), z_n = (2n/D + 0.4) / 1.4 (Sun et al. 2212.10554)."""

    def rotate(self, q, k, i):
        D = q.shape[-1]
        zeta = (torch.arange(0, D, 2, device=i.device) / D + 0.4) / 1.4
        growth = zeta ** ((i - i.mean())[:, None, None] / 512)               # centred: the powers stay small
        return self.turn(q, i, growth), self.turn(k, i, 1 / growth)


class T5(Position):
    """score + t[h, bucket(i - j)], 32 buckets, logarithmic from 16 to 128 (Raffel et al. 1910.10683)."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros(32, config.n_head))

    def bias(self, h, i, j):
        far = 16 + (16 * torch.log((i - j).clamp(min=16) / 16) / math.log(128 / 16)).long()
        return self.table[torch.where(i - j < 16, (i - j).long(), far.clamp(max=31)), h]


class ALiBi(Position):
    """score - m_h (i - j), m_h = 2^(-8h/H), h from 1 (Press et al. 2108.12409)."""

    def __init__(self, config):
        super().__init__(config)
        n = 2 ** int(math.log2(config.n_head))      # beyond a power of two: every other slope of twice as many heads
        exponents = [8 * h / n for h in range(1, n + 1)] + [4 * h / n for h in range(1, 2 * n, 2)]
        self.register_buffer("slopes", 2.0 ** -torch.tensor(exponents[:config.n_head]), persistent=False)

    def bias(self, h, i, j):
        return -self.slopes[h] * (i - j)


class Kerple(Position):
    """score - p_h ln(1 + a_h (i - j)), p and a trained, at least 0.01 (KERPLE-log, Chi et al. 2205.09921)."""

    def __init__(self, config):
        super().__init__(config)
        self.p = nn.Parameter(2 * torch.rand(config.n_head))
        self.a = nn.Parameter(torch.rand(config.n_head))

    def bias(self, h, i, j):
        return -self.p[h].clamp(min=0.01) * torch.log1p(self.a[h].clamp(min=0.01) * (i - j))


class Sandwich(Position):
    """score + (sum_n cos((i - j) / 10000^(n/64)) - 64) H / 8h, n and h from 1, n to 64 (Chi et al. 2212.10356)."""

    def bias(self, h, i, j):
        frequency = 10000.0 ** (-torch.arange(1, 65, device=i.device) / 64)
        return (torch.cos((i - j)[..., None] * frequency).sum(-1) - 64) * self.config.n_head / (8 * (h + 1))


class FIRE(Position):
    """score + MLP_h(ln(1 + c (i - j)) / ln(1 + c max(L, i))), MLP, c and L trained (Li et al. 2310.04418)."""
    relative = False

    def __init__(self, config):
        super().__init__(config)
        self.c, self.L = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))   # L in units of 512
        self.mlp = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, config.n_head))

    def bias(self, h, i, j):
        nearness = torch.log1p(self.c.abs() * (i - j))
        reach = torch.log1p(self.c.abs() * torch.maximum((512 * self.L).abs(), i))
        return self.mlp((nearness / (reach + 1e-6))[..., None]).movedim(-1, 0)[h.flatten()]


class HWFA(Rotary):
    """Rotary within a window; the last layer sees all, with log n, without positions (Su, kexue.fm/archives/9603)."""

    def layer(self, n):
        below = self.config.n_layer - 1
        if n == below:
            return False, 0, True
        # the largest window that stacks to at most 3/4 of the trained length
        window = 1 + int(0.75 * self.config.block_size - 1) // below
        return True, self.config.window or window, self.config.logn


POSITIONS = {"none": Position, "learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "t5": T5,
             "alibi": ALiBi, "kerple": Kerple, "sandwich": Sandwich, "xpos": XPos, "fire": FIRE, "hwfa": HWFA}


# ---- test-time extensions of a trained encoding: each sets one attribute, and at the trained length changes nothing


def interpolate(pos, length):
    """Squeezes `length` positions into the trained range (Chen et al. 2306.15595)."""
    pos.scale = pos.scale * min(1.0, pos.config.block_size / length)


def ntk(pos, length):
    """Rotary's base times s^(D/(D-2)), s = length / trained length (bloc97, r/LocalLLaMA 2023)."""
    D = pos.config.n_embd // pos.config.n_head
    pos.base = Rotary.base * max(1.0, length / pos.config.block_size) ** (D / max(D - 2, 1))


def hierarchical(pos, length):
    """Position n i + j gets a u_i + (1 - a) u_j, a = 0.4, u = (p - a p_0) / (1 - a) (Su, kexue.fm/archives/7947).

    Multiplied out that is p_j + a / (1 - a) (p_i - p_0): the first n stay as they were, bit for bit."""
    n = pos.config.block_size
    row = torch.arange(max(n, min(length, n * n)), device=pos.table.device)
    p = pos.table.data[:n]
    pos.table = nn.Parameter(p[row % n] + 0.4 / 0.6 * (p[row // n] - p[0]))


EXTENSIONS = {"interpolate": (interpolate, ("learned", "sinusoidal", "rotary", "alibi")), "ntk": (ntk, ("rotary",)),
              "hierarchical": (hierarchical, ("learned",))}


def prepare(model, length, extend=""):
    """Readies a model for testing at `length` tokens. Raises ModelError where the extension is not for its encoding."""
    config, pos = model.config, model.pos
    pos.scale = config.random_positions / length or 1.0
    if extend:
        apply, fits = EXTENSIONS[extend]
        if config.pos not in fits or config.random_positions:
            pairs = "; ".join(f"{key} for {', '.join(names)}" for key, (_, names) in EXTENSIONS.items())
            raise ModelError(f"no --extend {extend} for {config.pos}, only {pairs}, trained without random positions")
        apply(pos, length)


# ---- the transformer ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def causal_blocks(T, window, device):
    """FlexAttention's block mask: which 128 x 128 tiles of the scores hold anything to compute."""
    return create_block_mask(lambda b, h, i, j: (j <= i) & (i < j + window), None, None, T, T, device=device)


class Scores:
    """What a forward pass adds to the scores of layers with this window: the bias, and -inf for what is not seen.

    A relative bias is one vector over the distances, and any slice of the (T, T) mask a strided view of it:
    mask[i, T-1-j] = past[T-1 + i-j]. So keys run backwards in slices, and a mask of any length takes no memory."""

    def __init__(self, pos, i, window):
        self.pos, self.i, self.T, self.window = pos, i, len(i), window or len(i)
        self.h = torch.arange(pos.config.n_head, device=i.device)[:, None]
        self.relative = pos.bias is None or pos.relative and not (pos.training and pos.config.random_positions)
        if self.relative:
            vector = pos.bias(self.h, i - i[0], 0 * i) if pos.bias else i.new_zeros(1, self.T)
            self.vector = vector.masked_fill(torch.arange(self.T, device=i.device) >= self.window, -math.inf)  # (H, T)
            self.past = torch.cat((torch.full_like(self.vector[:, 1:], -math.inf), self.vector), 1)
            self.blocks = causal_blocks(self.T, self.window, i.device) if i.is_cuda else None
        shared = self.relative or torch.is_grad_enabled()       # by all layers; else as many queries as memory is for
        self.rows = 128 if shared else max(1, min(128, 2 ** 18 // self.T))
        self.masks = [self.slice(start) for start in range(0, self.T, self.rows)] if shared else None

    def slice(self, start):
        """(1, H, rows, keys): queries from start on, keys from the last query's down to the first in their windows.

        Where one slice is the whole, its few keys run forward."""
        first, stop = max(0, start - self.window + 1), min(start + self.rows, self.T)
        if self.relative:
            H, width = self.past.shape
            mask = self.past.as_strided((1, H, stop - start, stop - first), (0, width, 1, 1), start + self.T - stop)
            return mask if self.T > self.rows else mask.flip(-1)
        place = torch.arange(self.T, device=self.i.device)
        i, j = place[start:stop, None], place[first:stop]
        j = j.flip(0) if self.T > self.rows else j
        bias = self.pos.bias(self.h[..., None], self.i[i], self.i[torch.minimum(i, j)])
        return bias.masked_fill((j > i) | (i >= j + self.window), -math.inf)[None]

    def score_mod(self, score, b, h, i, j):
        """The same for FlexAttention, inside its kernel."""
        return score + self.vector[h, (i - j).clamp(min=0)]


flex = torch.compile(flex_attention)


def attend(q, k, v, scores, dropout=0.0):
    """softmax(q k' / sqrt(D) + scores) v, causal, by the fastest kernel that can: (B, H, T, D) three times -> the same.

    Slices of the queries keep the memory linear in T; they run in float32, since bfloat16 would round the bias."""
    if scores is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if q.is_cuda and scores.relative and not dropout and q.shape[-1] >= 16:      # FlexAttention's least head width
        return flex(q, k, v, score_mod=scores.score_mod if scores.pos.bias else None, block_mask=scores.blocks)
    dtype, T, y = q.dtype, q.shape[2], []
    q, k, v = q.float(), k.float(), v.float()
    if T > scores.rows:
        k, v = k.flip(2), v.flip(2)
    with torch.autocast(q.device.type, enabled=False):
        for start in reversed(range(0, T, scores.rows)):     # the longest first: the others fit where it was
            stop = min(start + scores.rows, T)
            mask = scores.masks[start // scores.rows] if scores.masks else scores.slice(start)
            keys = slice(T - stop, T - stop + mask.shape[-1])
            y.append(F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], mask, dropout))
    return torch.cat(y[::-1], 2).to(dtype)


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
        self.dropout, self.act_dropout = nn.Dropout(config.dropout), nn.Dropout(config.act_dropout)

    def forward(self, x, *position):
        x = x + self.dropout(self.attention(self.ln_1(x), *position))
        hidden = self.act_dropout(F.relu(self.c_fc(self.ln_2(x)), inplace=True))
        return x + self.dropout(self.mlp_proj(hidden))

    def attention(self, x, i, rotate, logn, scores):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.config.n_head, -1).unbind(2)             # (B, T, H, D)
        if rotate:
            q, k = rotate(q, k, i)
        if logn:
            place = torch.arange(1, T + 1, device=x.device)[:, None, None]
            q = q * (place.log() / math.log(max(2, self.config.block_size))).clamp(min=1).to(q.dtype)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                                     # (B, H, T, D)
        y = attend(q, k, v, scores, self.config.attn_dropout if self.training else 0.0)
        return self.attn_proj(y.transpose(1, 2).reshape(B, T, C))


class Vocabulary(nn.Module):
    """Token embedding and output layer, tied: one (V, C) matrix, its rows times sqrt(C) on the way in.

    Beyond 20000 types, in bands of width C, C/4, C/16: adaptive input (Baevski & Auli 1809.10853) and adaptive
    softmax (Grave et al. 1609.04309). The head's last rows stand for the rare bands."""

    def __init__(self, V, C, cutoffs=(20000, 60000)):
        super().__init__()
        edges = [cutoff for cutoff in cutoffs if cutoff < V]
        self.bands = list(zip(edges, edges[1:] + [V]))
        self.first = edges[0] if edges else V
        widths = [max(1, C // 4 ** n) for n in range(1, len(edges) + 1)]
        self.head = nn.Parameter(torch.randn(self.first + len(edges), C) * 0.02)
        self.tails = nn.ParameterList(torch.randn(b - a, w) * w ** -0.5 for (a, b), w in zip(self.bands, widths))
        self.projections = nn.ParameterList(torch.randn(w, C) * 0.02 for w in widths)

    def forward(self, idx):
        """Embeddings: (B, T) -> (B, T, C)."""
        x = F.embedding(idx.clamp(max=self.first - 1), self.head)
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            rare = F.embedding(idx.clamp(start, stop - 1) - start, tail) @ projection
            x = torch.where((idx >= start)[..., None], rare.to(x.dtype), x)
        return x * x.shape[-1] ** 0.5

    def loss(self, x, targets):
        """-log p of each target in nats: (N, C), (N,) -> (N,). Targets on the CPU spare a GPU all waiting."""
        band = sum((targets >= start).long() for start, _ in self.bands) if self.bands else 0
        head_targets = torch.where(targets < self.first, targets, self.first - 1 + band)
        loss = F.cross_entropy(F.linear(x, self.head), to_device(head_targets, x.device), reduction="none")
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            rows = ((targets >= start) & (targets < stop)).nonzero().squeeze(1)
            rare = to_device(targets[rows] - start, x.device)
            rows = to_device(rows, x.device)
            logits = F.linear(F.linear(x[rows], projection), tail)
            loss = loss.index_add(0, rows, F.cross_entropy(logits, rare, reduction="none").to(loss.dtype))
        return loss


def to_device(x, device):
    """A copy that the CPU does not wait for."""
    pin = x.device.type == "cpu" and device.type == "cuda"
    return (x.pin_memory() if pin else x).to(device, non_blocking=True)


class GPT(nn.Module):
    """A pre-norm decoder. At equal seed every encoding starts from the same shared weights: its own come last."""

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
        T = idx.shape[1]
        if T > self.pos.max_length:
            raise ModelError(f"{self.config.pos} ends at {self.pos.max_length} positions, asked for {T}")
        i = self.pos.positions(T, idx.device)
        x = self.drop(self.pos.embed(self.wte(idx), i))
        windows = {self.pos.layer(n)[1] for n in range(len(self.blocks))}
        scores = {w: Scores(self.pos, i, w) if self.pos.bias or 0 < w < T else None for w in windows}
        return self.stack(x, i, scores)

    def stack(self, x, i, scores):
        """What torch.compile is for, all blocks: (B, T, C), (T,), the Scores for each window -> (B, T, C)."""
        for n, block in enumerate(self.blocks):
            rotates, window, logn = self.pos.layer(n)
            x = block(x, i, self.pos.rotate if rotates else None, logn, scores[window])
        return self.ln_f(x)

    def forward(self, idx, targets):
        """Loss of each target in nats: (B, T), (B, T) -> (B, T). In evaluation never more than 2^23 logits at once."""
        x, targets_flat = self.trunk(idx).flatten(0, 1), targets.flatten()
        rows = len(x) if torch.is_grad_enabled() else max(1, 2 ** 23 // self.config.vocab_size)
        loss = [self.wte.loss(*chunk) for chunk in zip(x.split(rows), targets_flat.split(rows))]
        return torch.cat(loss).view(targets.shape)

    def parameter_groups(self, weight_decay):
        """For AdamW: matrices decay; norms and whatever belongs to the position encoding do not."""
        decay, rest = [], []
        for name, p in self.named_parameters():
            (rest if p.dim() < 2 or name.startswith("pos.") else decay).append(p)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def flops_per_token(self):
        """Of a training step: 6 a weight of the blocks and the output's head, 6 C T a layer for causal attention."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1) + self.wte.head.numel()
        return 6 * weights + 6 * self.config.n_layer * self.config.n_embd * self.config.block_size
