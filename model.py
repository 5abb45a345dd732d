"""A GPT whose one moving part is the position encoding, which acts in three places:

    x = pos.embed(wte(idx), i)
    q, k = pos.rotate(q, k, i)
    scores = q k' / sqrt(D) + pos.bias(i, j)        # softmax over j <= i, of these the last `window`

Shapes: B sequences, T tokens, C width (n_embd), H heads, D = C / H, V vocabulary.
Positions, i of queries and j of keys, are float32: fractions and offsets are positions too. A token's place
is its index from 0.

To add an encoding: a subclass of Position, an entry in POSITIONS, its plain formula in test_model.py.
"""
import functools
import math
from dataclasses import dataclass, replace

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
    act_dropout: float = 0.0    # of the MLP's hidden layer
    pos: str = "alibi"
    window: int = 0             # a token sees itself and the window - 1 before it; 0 is all
    logn: bool = False          # queries times max(1, ln(place + 1) / ln(block_size))
    random_positions: int = 0   # train at sorted random positions below this; 0 is off


# ---- position encodings ---------------------------------------------------------------------------


class Position(nn.Module):
    """No position at all but the causal mask ("NoPE", Haviv et al. 2203.16634)."""
    relative = True             # the bias depends on i - j alone
    max_length = math.inf       # the longest text, in tokens
    scale = 1.0                 # from one position to the next

    def __init__(self, config):
        super().__init__()
        self.config = config                        # its window and log n are those of the layers it encodes
        self.layers = [self] * config.n_layer  # one a layer, a plain list: others than self are no submodules

    def positions(self, T, device):
        """(T,): evenly spaced, or in training sorted random ones (Ruoss et al. 2305.16843)."""
        N = self.config.random_positions
        if N and self.training:
            return torch.randperm(max(N, T))[:T].sort().values.float().to(device)
        return torch.arange(T, device=device) * (N / T if N else self.scale)

    def embed(self, x, i):
        """Adds to the embeddings: (B, T, C), (T,) -> (B, T, C)."""
        return x

    def rotate(self, q, k, i):
        """Turns queries and keys: (B, H, T, D) twice, (T,) -> the same shapes."""
        return q, k

    def bias(self, i, j):
        """What is added to the scores: (rows, 1), (1 or rows, keys), j <= i -> (H, rows, keys)."""
        return torch.zeros_like(i - j).expand(self.config.n_head, -1, -1)


class Learned(Position):
    """x_i + p_i, one trained vector a position, up to the trained length (Gehring et al. 1705.03122)."""

    def __init__(self, config):
        super().__init__(config)
        rows = max(config.block_size, config.random_positions)
        self.table = nn.Parameter(torch.randn(rows, config.n_embd) * 0.02)

    @property
    def max_length(self):
        return math.inf if self.config.random_positions else round(len(self.table) / self.scale)

    def embed(self, x, i):
        # a position between two rows of the table gets a mixture of both
        below = i.long()
        above = (below + 1).clamp(max=len(self.table) - 1)
        share = (i - below)[:, None]
        return x + torch.lerp(self.table[below], self.table[above], share)


def angles(i, width, base=10000.0):
    """i w_n, w_n = base^(-2n/width), n from 0: (T,) -> (T, width / 2), in float32, for any positions."""
    return i[:, None] * base ** (-torch.arange(0, width, 2, device=i.device) / width)


class Sinusoidal(Position):
    """x_i + [sin(i w_n), cos(i w_n)], w_n = 10000^(-2n/C) (Vaswani et al. 1706.03762)."""

    def embed(self, x, i):
        angle = angles(i, x.shape[-1])                                      # (T, C/2)
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class Rotary(Position):
    """(q, k)_n turned by i w_n, w_n = 10000^(-2n/D), pairs (n, n + D/2) (RoPE, Su et al. 2104.09864)."""
    base = 10000.0

    def rotate(self, q, k, i):
        return self.turn(q, i), self.turn(k, i)

    def turn(self, x, i, growth=1.0):
        """x (B, H, T, D) turned by its positions (T,), and scaled by growth (T, D/2)."""
        angle = angles(i, x.shape[-1], self.base)                           # (T, D/2)
        cos, sin = angle.cos() * growth, angle.sin() * growth
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)


class XPos(Rotary):
    """Rotary, q_n z_n^(i/512), k_n z_n^(-j/512), z_n = (2n/D + 0.4) / 1.4 (Sun et al. 2212.10554)."""
    max_length = 2 ** 16        # beyond some 72,500 the powers overflow float32

    def rotate(self, q, k, i):
        zeta = (torch.arange(0, q.shape[-1], 2, device=i.device) / q.shape[-1] + 0.4) / 1.4
        growth = zeta ** ((i - i.mean())[:, None] / 512)        # centred, so that the powers stay small
        return self.turn(q, i, growth), self.turn(k, i, 1 / growth)


class T5(Position):
    """score + sqrt(D) t[bucket(i - j)]_h, 32 buckets, logarithmic from 16 to 128 (Raffel et al. 1910.10683).

    T5 itself does not divide scores by sqrt(D). Where they are divided, KERPLE's code multiplies the table:
    Adam's steps have the same size for any table, and would move the scores too little without."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros(32, config.n_head))

    def bias(self, i, j):
        distance = i - j
        far = 16 + 16 * torch.log(distance.clamp(min=16) / 16) / math.log(8)
        bucket = torch.where(distance < 16, distance, far.clamp(max=31)).long()     # (rows, keys)
        return self.table[bucket].movedim(-1, 0) * math.sqrt(self.config.n_embd / self.config.n_head)


class ALiBi(Position):
    """score - m_h (i - j), m_h = 2^(-8h/H), h from 1, for H a power of 2 (Press et al. 2108.12409)."""

    def bias(self, i, j):
        # n heads, the largest power of two, as above; the rest take h = 1/2, 3/2, ..., odd slopes of 2n heads
        H = self.config.n_head
        n = 2 ** int(math.log2(H))
        h = torch.tensor([*range(1, n + 1), *(m + 0.5 for m in range(H - n))], device=i.device)
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
            x.data.clamp_(min=0.01)     # as the authors, outside autograd: inside, no gradient below 0.01
        return -self.p[:, None, None] * torch.log1p(self.a[:, None, None] * (i - j))


class Sandwich(Position):
    """score + (sum_n cos((i - j) / 10000^(n/64)) - 64) H / (8h), n = 1 .. 64 (Chi et al. 2212.10356)."""

    def bias(self, i, j):
        H = self.config.n_head
        h = torch.arange(1, H + 1, device=i.device)[:, None, None]
        n = torch.arange(1, 65, device=i.device)
        # less 64, which softmax does not see, it is 0 at distance 0, where bfloat16 is finest
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
        # the largest window with which the layers below the last reach, one upon the other, at most 3/4 of
        # the trained length: (window - 1) below + 1
        below = config.n_layer - 1
        window = config.window or 1 + int(0.75 * config.block_size - 1) // max(1, below)
        super().__init__(replace(config, window=window))
        self.layers[-1] = Position(replace(config, window=0, logn=True))


POSITIONS = {"none": Position, "learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "xpos": XPos,
             "t5": T5, "alibi": ALiBi, "kerple": Kerple, "sandwich": Sandwich, "fire": FIRE, "hwfa": HWFA}


# ---- test-time extensions: each sets one attribute; at the trained length nothing changes


def interpolate(pos, length):
    """Squeezes `length` positions into the trained range (Chen et al. 2306.15595)."""
    pos.scale = min(1.0, pos.config.block_size / length)


def ntk(pos, length):
    """Rotary's base times s^(D/(D-2)), s = length / trained length (bloc97, r/LocalLLaMA 2023)."""
    D = pos.config.n_embd // pos.config.n_head
    pos.base = Rotary.base * max(1.0, length / pos.config.block_size) ** (D / (D - 2))


def hierarchical(pos, length):
    """Position n r + s gets a u_r + (1 - a) u_s, u = (p - a p_0) / (1 - a) (Su, kexue.fm/archives/7947).

    With a = 0.4. That is p_s + a / (1 - a) (p_r - p_0): the first n stay as they were, bit for bit."""
    n = pos.config.block_size
    place = torch.arange(n * n, device=pos.table.device)[:max(n, length)]
    p = pos.table.data[:n]
    pos.table = nn.Parameter(p[place % n] + 0.4 / 0.6 * (p[place // n] - p[0]))


EXTENSIONS = {"interpolate": (interpolate, ("learned", "sinusoidal", "rotary", "alibi")),
              "ntk": (ntk, ("rotary",)),
              "hierarchical": (hierarchical, ("learned",))}


def fits(config, extension):
    """Whether a test-time extension is for a model with this config."""
    return config.pos in EXTENSIONS[extension][1] and not config.random_positions


# ---- attention ------------------------------------------------------------------------------------

# cuDNN's attention misreads masks: pytorch/pytorch 191612, 196678
torch.backends.cuda.enable_cudnn_sdp(False)
# tiles that fit into the shared memory of an RTX 4090, an A100 and an H100
FLEX_OPTIONS = {"fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 2, "bwd_num_stages": 2}


def make_mask(pos, i, flex):
    """What to add to the scores of all queries and keys, -inf where a key is out of sight.

    Returns None where that is the causal mask alone, else (H, T, T) with the keys from the last to the first.
    A relative bias looks the same from every query. Its rows are then pieces of one line,

        line = T - 1 times -inf, then the bias at distance 0, 1, ..., T - 1         # (H, 2T - 1)
        row of query i = line[i : i + T]

    so that the mask is a view of the line, without memory of its own; others take T^2. FlexAttention
    (`flex`) reads the line itself: for it the result is (line, its BlockMask)."""
    T = len(i)
    window = pos.config.window or T
    if type(pos).bias is Position.bias and window >= T:
        return None
    place = torch.arange(T, device=i.device)
    # at random positions neighbours are not evenly apart
    if pos.relative and not (pos.training and pos.config.random_positions):
        bias = pos.bias(i[:, None], i[:1, None])[..., 0]          # (H, T), from the first key
        line = F.pad(bias.masked_fill(place >= window, -math.inf), (T - 1, 0), value=-math.inf)
        return (line, causal_blocks(T, window, i.device)) if flex else line.unfold(1, T, 1)
    rows = []
    for start in range(0, T, 128):
        query = place[start:start + 128, None]
        key = place[:start + 128].flip(0)
        # later keys, hidden below, get distance 0: at a negative one a bias may be nan
        bias = pos.bias(i[query], i[torch.minimum(query, key)])                             # (H, 128, keys)
        bias = bias.masked_fill((key > query) | (key <= query - window), -math.inf)
        rows.append(F.pad(bias, (T - len(key), 0), value=-math.inf))
    return torch.cat(rows, 1)


@functools.lru_cache(maxsize=16)
def causal_blocks(T, window, device):
    """FlexAttention's BlockMask: which tiles of the scores it need not look at."""
    return create_block_mask(lambda b, h, i, j: (j <= i) & (i < j + window), None, None, T, T, device)


def attend(q, k, v, mask, window, dropout):
    """softmax(q k' / sqrt(D) + mask) v: (B, H, T, D) three times, what make_mask gave -> (B, H, T, D)."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if isinstance(mask, tuple):
        line, blocks = mask

        def score_mod(score, b, h, i, j):
            return score + line[h, line.shape[1] // 2 + i - j]      # in the line's middle is distance 0
        return flex_attention(q, k, v, score_mod, blocks, kernel_options=FLEX_OPTIONS)
    T, y = q.shape[2], []
    if T <= 128 or q.is_cuda:       # to flip a short mask costs less than to flip k and v
        return F.scaled_dot_product_attention(q, k, v, mask[None].flip(3).to(q.dtype), dropout)
    # on a CPU long texts 128 queries at a time, without the keys that none of them sees
    k, v = k.flip(2), v.flip(2)
    for start, rows in zip(range(0, T, 128), mask.split(128, 1)):
        stop = start + rows.shape[1]
        keys = slice(T - stop, T - max(0, start - (window or T) + 1))
        bias, queries = rows[None, ..., keys].to(q.dtype), q[:, :, start:stop]
        y.append(F.scaled_dot_product_attention(queries, k[:, :, keys], v[:, :, keys], bias, dropout))
    return torch.cat(y, 2)


# ---- the transformer ------------------------------------------------------------------------------


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

    def forward(self, x, i, pos, mask):
        """(B, T, C), positions (T,), the layer's encoding and its mask -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.config.n_head, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))      # (B, H, T, D)
        q, k = pos.rotate(q, k, i)
        if pos.config.logn:
            seen = torch.arange(1, T + 1, device=x.device)[:, None]
            q = (q * (seen.log() / math.log(self.config.block_size)).clamp(min=1)).to(q.dtype)
        dropout = self.config.attn_dropout if self.training else 0.0
        y = attend(q, k, v, mask, pos.config.window, dropout)
        x = x + self.dropout(self.attn_proj(y.transpose(1, 2).reshape(B, T, C)))
        hidden = self.act_dropout(F.relu(self.c_fc(self.ln_2(x)), inplace=True))
        return x + self.dropout(self.mlp_proj(hidden))


def head_loss(x, head, targets):
    """-log p of each target in nats, by the output layer's softmax: (N, C), (rows, C), (N,) -> (N,)."""
    rows = len(head)
    if x.is_cuda:
        head = F.pad(head, (0, 0, 0, -rows % 64))       # GPUs like matrix products in multiples of 64
    return F.cross_entropy(F.linear(x, head)[:, :rows], targets, reduction="none")


class Vocabulary(nn.Module):
    """Token embedding and output layer, tied: one (V, C) matrix, its rows times sqrt(C) on the way in.

    Beyond 20000 types, in bands of width C, C/4, C/16: adaptive input (Baevski & Auli 1809.10853) and
    adaptive softmax (Grave et al. 1609.04309). The head's last rows stand for the rare bands."""

    def __init__(self, V, C, cutoffs=(20000, 60000)):
        super().__init__()
        edges = [cutoff for cutoff in cutoffs if cutoff < V]
        self.bands = list(zip(edges, edges[1:] + [V]))          # of the rare types: first id, last + 1
        self.common = edges[0] if edges else V                  # how many types the head knows one by one
        self.head = nn.Parameter(torch.randn(self.common + len(edges), C) * 0.02)
        self.head_loss = head_loss                              # compile_parts replaces it
        sizes = [(stop - start, C // 4 ** n) for n, (start, stop) in enumerate(self.bands, 1)]
        self.tails = nn.ParameterList(torch.randn(n, w) * w ** -0.5 for n, w in sizes)
        self.projections = nn.ParameterList(torch.randn(w, C) * 0.02 for _, w in sizes)

    def forward(self, idx):
        """Embeddings: (B, T) -> (B, T, C)."""
        x = F.embedding(idx.clamp(max=self.common - 1), self.head)
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            rare = F.embedding(idx.clamp(start, stop - 1) - start, tail) @ projection
            x = torch.where((idx >= start)[..., None], rare.to(x.dtype), x)
        return x * x.shape[-1] ** 0.5

    def loss(self, x, targets):
        """-log p of each target in nats: (N, C), (N,) -> (N,)."""
        # to the head a rare type is its band, whose row follows those of the common types
        band = sum(targets >= start for start, _ in self.bands)
        loss = self.head_loss(x, self.head, targets.clamp(max=self.common - 1) + band)
        # each band tells its own types apart, for the targets that lie in it
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            inside = ((targets >= start) & (targets < stop)).nonzero().squeeze(1)
            logits = F.linear(F.linear(x[inside], projection), tail)
            rare = F.cross_entropy(logits, targets[inside] - start, reduction="none")
            loss = loss.index_add(0, inside, rare)
        return loss


class GPT(nn.Module):
    """A pre-norm decoder. At equal seed all encodings start from the same weights: their own come last."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.flex = False          # whether attention on CUDA goes through FlexAttention
        self.wte = Vocabulary(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer) if "_proj" in name else 0.02)
        self.pos = POSITIONS[config.pos](config)

    def compile_parts(self):
        """Compiles blocks and head. Masks stay outside: in a graph a trained bias would lose its gradient."""
        torch.compiler.reset()      # of the models before this one
        torch._dynamo.config.recompile_limit = 64       # graphs of one function, for its shapes and layers
        for block in self.blocks:
            block.compile()
        self.wte.head_loss = torch.compile(head_loss)
        self.flex = True

    def trunk(self, idx):
        """Final hidden states: (B, T) -> (B, T, C)."""
        i = self.pos.positions(idx.shape[1], idx.device)
        x = self.drop(self.pos.embed(self.wte(idx), i))
        # FlexAttention has no dropout
        flex = self.flex and x.is_cuda and not (self.training and self.config.attn_dropout)
        # in float32: bfloat16 cannot tell distances beyond 256 apart
        with torch.autocast(i.device.type, enabled=False):
            masks = {pos: make_mask(pos, i, flex) for pos in set(self.pos.layers)}      # one a kind of layer
        for block, pos in zip(self.blocks, self.pos.layers):
            x = block(x, i, pos, masks[pos])
        return self.ln_f(x)

    def forward(self, idx, targets):
        """Loss in nats of the last S tokens' targets: (B, T), (B, S) -> (B, S)."""
        x = self.trunk(idx)[:, -targets.shape[1]:].flatten(0, 1)
        # in evaluation not all logits at once
        size = len(x) if torch.is_grad_enabled() else 1 + 2 ** 24 // self.config.vocab_size
        pieces = zip(x.split(size), targets.flatten().split(size))
        return torch.cat([self.wte.loss(*piece) for piece in pieces]).view(targets.shape)

    def parameter_groups(self, weight_decay):
        """For AdamW: matrices decay; norms and what an encoding trains do not."""
        decay, rest = [], []
        for name, p in self.named_parameters():
            (rest if p.dim() < 2 or name.startswith("pos.") else decay).append(p)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
