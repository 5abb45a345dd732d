"""A GPT whose one moving part is the position encoding, which acts in three places:

    x = pos.embed(wte(idx), i)
    q, k = pos.rotate(q, k, turns, x)               # turns = pos.turns(i); x is what q and k were made of
    scores = q k' / sqrt(D) + pos.bias(i, j)        # softmax over the keys in sight

Shapes: B sequences, T tokens, C width (n_embd), H heads, D = C / H, V vocabulary.
A token's place is its index from 0. Its position is what the encoding is told of it: i for queries, j for keys,
float32, evenly spaced or random, so fractions are positions too.

To add an encoding: a subclass of Position, an entry in POSITIONS, its plain formula in test_model.py.
"""
import functools
import math
from dataclasses import dataclass

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
    """No position at all but the causal mask ("NoPE", Haviv et al. 2203.16634)."""
    relative = True             # the bias depends on i - j alone
    max_length = math.inf       # the longest text, in tokens
    spacing = 1.0               # from one position to the next

    def __init__(self, config):
        super().__init__()
        self.config = config
        # one a layer: its encoding, how many keys a query sees, whether log n scales queries. Encodings other
        # than self are no submodules, unless they are registered as well
        self.layers = [(self, config.window or math.inf, config.logn)] * config.n_layer

    def positions(self, T, device):
        """(T,): evenly spaced, or in training sorted random ones (Ruoss et al. 2305.16843)."""
        N = self.config.random_positions
        if N and self.training:
            return torch.randperm(N)[:T].sort().values.float().to(device)
        return torch.arange(T, device=device) * (N / T if N else self.spacing)

    def embed(self, x, i):
        """Adds to the embeddings: (B, T, C), (T,) -> (B, T, C)."""
        return x

    def turns(self, i):
        """What rotate needs of the positions (T,), worked out once for all layers."""
        return None

    def rotate(self, q, k, turns, x):
        """Turns queries and keys: (B, H, T, D) twice, turns(i), the layer's normed input -> the same shapes."""
        return q, k

    def bias(self, i, j):
        """What is added to the scores: (rows, 1), (1 or rows, keys), j <= i -> (H, rows, keys), or None."""
        return None


class Learned(Position):
    """x_i + p_i, one trained vector a position, up to the trained length (Gehring et al. 1705.03122)."""

    def __init__(self, config):
        super().__init__(config)
        count = max(config.block_size, config.random_positions)
        self.vectors = nn.Parameter(torch.randn(count, config.n_embd) * 0.02)

    @property
    def max_length(self):
        return math.inf if self.config.random_positions else round(len(self.vectors) / self.spacing)

    def embed(self, x, i):
        # a position between two vectors gets a mixture of both
        below = i.long()
        above = (below + 1).clamp(max=len(self.vectors) - 1)
        return x + torch.lerp(self.vectors[below], self.vectors[above], (i - below)[:, None])


def frequencies(width, device=None):
    """w_n = 10000^(-2n/width), n from 0: (width / 2,)."""
    return 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)


class Sinusoidal(Position):
    """x_i + [sin(i w_n), cos(i w_n)], w_n = 10000^(-2n/C) (Vaswani et al. 1706.03762)."""

    def embed(self, x, i):
        angle = i[:, None] * frequencies(self.config.n_embd, i.device)      # (T, C/2)
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class Rotary(Position):
    """(q, k)_n turned by i w_n, w_n = 10000^(-2n/D), pairs (n, n + D/2) (RoPE, Su et al. 2104.09864)."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("w", frequencies(config.n_embd // config.n_head), persistent=False)

    def turns(self, i):
        angle = i[:, None] * self.w                                         # (T, D/2)
        return angle.cos(), angle.sin()

    def rotate(self, q, k, turns, x):
        cos, sin = turns
        return turned(q, cos, sin), turned(k, cos, sin)


def turned(x, cos, sin):
    """Pairs (n, n + D/2) of queries or keys, turned: (B, H, T, D), (T, D/2) twice -> (B, H, T, D)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)


class XPos(Rotary):
    """Rotary, q_n z_n^(i/512), k_n z_n^(-j/512), z_n = (2n/D + 0.4) / 1.4 (Sun et al. 2212.10554)."""
    max_length = 2 ** 16        # beyond some 72,500 the powers overflow float32

    def turns(self, i):
        cos, sin = super().turns(i)
        z = (torch.arange(len(self.w), device=i.device) / len(self.w) + 0.4) / 1.4
        growth = z ** ((i - i.mean())[:, None] / 512)       # centred, so that the powers stay small
        return cos, sin, growth

    def rotate(self, q, k, turns, x):
        cos, sin, growth = turns
        return turned(q, cos * growth, sin * growth), turned(k, cos / growth, sin / growth)


class T5(Position):
    """score + sqrt(D) t[bucket(i - j)]_h, 32 buckets, logarithmic from 16 to 128 (Raffel et al. 1910.10683).

    T5 itself does not divide scores by sqrt(D). Where they are divided, KERPLE's code multiplies t: Adam's
    steps have the same size for any parameter, and would move the scores too little without."""

    def __init__(self, config):
        super().__init__(config)
        self.t = nn.Parameter(torch.zeros(32, config.n_head))

    def bias(self, i, j):
        distance = i - j
        far = 16 + 16 * torch.log(distance.clamp(min=16) / 16) / math.log(128 / 16)
        bucket = torch.where(distance < 16, distance, far.clamp(max=31)).long()     # (rows, keys)
        return self.t[bucket].movedim(-1, 0) * math.sqrt(self.config.n_embd / self.config.n_head)


def slopes(H):
    """m_h = 2^(-8h/H), h from 1; for H no power of two those of the power below it, then every other of 2n's."""
    n = 2 ** int(math.log2(H))
    if n == H:
        return [2 ** (-8 * h / H) for h in range(1, H + 1)]
    return slopes(n) + slopes(2 * n)[::2][:H - n]


class ALiBi(Position):
    """score - m_h (i - j), m_h = 2^(-8h/H), h from 1, for H a power of 2 (Press et al. 2108.12409)."""

    def bias(self, i, j):
        return -torch.tensor(slopes(self.config.n_head), device=i.device)[:, None, None] * (i - j)


class Kerple(Position):
    """score - p_h ln(1 + a_h (i - j)), p and a trained, at least 0.01 (KERPLE-log, Chi et al. 2205.09921)."""

    def __init__(self, config):
        super().__init__(config)
        self.p = nn.Parameter(2 * torch.rand(config.n_head, 1, 1))
        self.a = nn.Parameter(torch.rand(config.n_head, 1, 1))

    def bias(self, i, j):
        # clamp() alone would give no gradient below 0.01, from where a head could not come back
        p, a = (x + (x.clamp(min=0.01) - x).detach() for x in (self.p, self.a))
        return -p * torch.log1p(a * (i - j))


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
        c = self.c.abs()
        L = 512 * self.L.abs()
        progress = torch.log1p(c * (i - j)) / (torch.log1p(c * torch.maximum(L, i)) + 1e-6)
        return self.mlp(progress[..., None]).movedim(-1, 0)


class HWFA(Rotary):
    """Rotary in a window; the last layer sees all, with log n, no positions (Su, kexue.fm/archives/9603)."""

    def __init__(self, config):
        super().__init__(config)
        # the largest window with which the layers below the last reach, one upon the other, at most 3/4 of
        # the trained length: (window - 1) below + 1
        below = config.n_layer - 1
        window = config.window or 1 + int(0.75 * config.block_size - 1) // max(1, below)
        self.layers = [(self, window, config.logn)] * below + [(Position(config), math.inf, True)]


POSITIONS = {"none": Position, "learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "xpos": XPos,
             "t5": T5, "alibi": ALiBi, "kerple": Kerple, "sandwich": Sandwich, "fire": FIRE, "hwfa": HWFA}


# ---- the transformer ------------------------------------------------------------------------------


class GPT(nn.Module):
    """A pre-norm decoder. At equal seed all encodings start from the same weights: their own come last."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.flex = False           # whether attention on CUDA goes through FlexAttention
        vocabulary = AdaptiveVocabulary if config.vocab_size > 20000 else Vocabulary
        self.wte = vocabulary(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer) if "_proj" in name else 0.02)
        self.pos = POSITIONS[config.pos](config)

    def trunk(self, idx):
        """Final hidden states: (B, T) -> (B, T, C)."""
        i = self.pos.positions(idx.shape[1], idx.device)
        x = self.drop(self.pos.embed(self.wte(idx), i))
        # FlexAttention has no dropout
        flex = self.flex and x.is_cuda and not (self.training and self.config.attn_dropout)
        evenly = not (self.training and self.config.random_positions)
        # in float32: bfloat16 cannot tell distances beyond 256 apart
        with torch.autocast(i.device.type, enabled=False):
            kinds = set(self.pos.layers)
            turns = {encoding: encoding.turns(i) for encoding, _, _ in kinds}
            masks = {(encoding, window): make_mask(encoding, window, i, evenly, flex)
                     for encoding, window, _ in kinds}
        for block, (encoding, window, logn) in zip(self.blocks, self.pos.layers):
            x = block(x, encoding, window, logn, turns[encoding], masks[encoding, window])
        return self.ln_f(x)

    def forward(self, idx, targets):
        """Loss in nats of the last S tokens' targets: (B, T), (B, S) -> (B, S)."""
        x = self.trunk(idx)[:, -targets.shape[1]:].flatten(0, 1)
        # in evaluation not all logits at once
        most = len(x) if torch.is_grad_enabled() else 1 + 2 ** 24 // self.config.vocab_size
        pieces = zip(x.split(most), targets.flatten().split(most))
        return torch.cat([self.wte.loss(*piece) for piece in pieces]).view(targets.shape)

    def log_probs(self, idx):
        """Log-probabilities of each next token, of all words: (B, T) -> (B, T, V)."""
        return self.wte.log_probs(self.trunk(idx))

    def parameter_groups(self, weight_decay):
        """For AdamW: matrices decay; norms and what an encoding trains do not."""
        decay, rest = [], []
        for name, p in self.named_parameters():
            (rest if p.dim() < 2 or name.startswith("pos.") else decay).append(p)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def compile_parts(self):
        """Compiles blocks and losses. Masks stay outside: in a graph a trained bias would lose its gradient."""
        torch.compiler.reset()      # of the models before this one
        torch._dynamo.config.recompile_limit = 64       # graphs of one function, for its shapes and layers
        for block in self.blocks:
            block.compile()
        self.wte.token_loss = torch.compile(token_loss)
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
        """(B, T, C), the layer's entry in pos.layers, its encoding's turns, its mask -> (B, T, C)."""
        B, T, C = x.shape
        normed = self.ln_1(x)
        qkv = self.c_attn(normed).view(B, T, 3, self.config.n_head, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))      # (B, H, T, D)
        if logn:
            n = torch.arange(1, T + 1, device=x.device)[:, None]
            q = (q * (n.log() / math.log(self.config.block_size)).clamp(min=1)).to(q.dtype)
        q, k = encoding.rotate(q, k, turns, normed)
        dropout = self.config.attn_dropout if self.training else 0.0
        y = attend(q, k, v, mask, window, dropout)
        x = x + self.dropout(self.attn_proj(y.transpose(1, 2).reshape(B, T, C)))
        activations = F.relu(self.c_fc(self.ln_2(x)), inplace=True)
        return x + self.dropout(self.mlp_proj(self.act_dropout(activations)))


# ---- attention as it is defined: the program runs what comes after, which the tests hold against this


def attention(q, k, v, encoding, window, i):
    """softmax(q k' / sqrt(D) + bias) v over the keys in sight: (B, H, T, D) three times, (T,) -> (B, H, T, D)."""
    place = torch.arange(len(i), device=i.device)
    scores = q @ k.mT / math.sqrt(v.shape[-1])
    return torch.softmax(scores + sight(encoding, window, i, place, place), -1) @ v


def sight(encoding, window, i, queries, keys):
    """The bias of the keys that a query sees, -inf for others: positions (T,), places (n,), (m,) -> (H, n, m)."""
    query = queries[:, None]
    # a bias is not asked for keys after the query, which get distance 0: at a negative one it may be nan
    bias = encoding.bias(i[query], i[torch.minimum(query, keys)])
    if bias is None:
        bias = torch.zeros(encoding.config.n_head, 1, 1, device=i.device)
    return bias.masked_fill((keys > query) | (keys <= query - window), -math.inf)


# ---- attention as it runs -------------------------------------------------------------------------

# cuDNN's attention misreads masks: pytorch/pytorch 191612, 196678
torch.backends.cuda.enable_cudnn_sdp(False)
# tiles that fit into the shared memory of an RTX 4090, an A100 and an H100
FLEX_OPTIONS = {"fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 2, "bwd_num_stages": 2}


def make_mask(encoding, window, i, evenly, flex):
    """What sight() gives for all queries, from the last to the first, and all keys: (H, T, T), BlockMask or None.

    Returns None where that is the causal mask alone. Where positions are `evenly` spaced, a relative bias looks
    the same from every query: all rows are pieces of

        line = the bias at distance T - 1, ..., 1, 0, then T - 1 times -inf         # (H, 2T - 1)
        row of query i = line[T - 1 - i : 2T - 1 - i]

    so that the mask is a view of it, without memory of its own; others take T^2. With the BlockMask, where the
    mask is such a view and `flex` asks for it, comes FlexAttention."""
    T = len(i)
    if window >= T and encoding.bias(i[:1, None], i[:1, None]) is None:
        return None
    place = torch.arange(T, device=i.device)
    last_to_first = place.flip(0)
    if encoding.relative and evenly:
        line = sight(encoding, window, i, last_to_first, place[:1])[..., 0]     # of the first key
        mask = F.pad(line, (0, T - 1), value=-math.inf).unfold(1, T, 1)
        return mask, causal_blocks(T, window, i.device) if flex else None
    parts = []
    for start in range(0, T, 128):
        part = sight(encoding, window, i, last_to_first[start:start + 128], place[:T - start])
        parts.append(F.pad(part, (0, start), value=-math.inf))      # keys that none of these queries sees
    return torch.cat(parts, 1), None


@functools.lru_cache(maxsize=16)
def causal_blocks(T, window, device):
    """FlexAttention's BlockMask: which tiles of the scores it need not look at."""
    def visible(b, h, i, j):
        return (j <= i) & (j > i - window)
    return create_block_mask(visible, None, None, T, T, device)


def attend(q, k, v, mask, window, dropout):
    """attention() by torch's kernels: (B, H, T, D) three times, what make_mask gave -> (B, H, T, D)."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    T = q.shape[2]
    bias, blocks = mask
    if blocks is not None:
        def score_mod(score, b, h, i, j):
            return score + bias[h, T - 1 - i, j]
        return flex_attention(q, k, v, score_mod, blocks, kernel_options=FLEX_OPTIONS)
    bias = bias.to(q.dtype)
    if q.is_cuda:
        bias = bias.contiguous()        # a kernel may not read a view whose rows overlap
    # on a CPU 128 queries at a time, without the keys that none of them sees
    most = T if q.is_cuda else 128
    parts, end = [], T
    for queries, rows in zip(q.flip(2).split(most, 2), bias.split(most, 1)):
        n = queries.shape[2]
        keys = slice(max(0, end - n - window + 1), end)
        rows = rows[None, ..., keys]
        parts.append(F.scaled_dot_product_attention(queries, k[:, :, keys], v[:, :, keys], rows, dropout))
        end -= n
    return torch.cat(parts, 2).flip(2)


# ---- the vocabulary: token embedding and output layer, tied ---------------------------------------


class Vocabulary(nn.Module):
    """One (V, C) matrix, its rows times sqrt(C) on the way in."""

    def __init__(self, V, C):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, C) * 0.02)
        self.token_loss = token_loss        # compile_parts replaces it

    def forward(self, idx):
        """Embeddings: (B, T) -> (B, T, C)."""
        return F.embedding(idx, self.weight) * math.sqrt(self.weight.shape[1])

    def loss(self, x, targets):
        """-log p of each target in nats: (N, C), (N,) -> (N,)."""
        return self.token_loss(x, self.weight, targets)

    def log_probs(self, x):
        """log p of every token: (..., C) -> (..., V)."""
        return F.linear(x, self.weight).log_softmax(-1)


def token_loss(x, weight, targets):
    """-log p of each target in nats, over the rows of the output matrix: (N, C), (V, C), (N,) -> (N,)."""
    V = len(weight)
    if x.is_cuda:
        weight = F.pad(weight, (0, 0, 0, -V % 64))      # GPUs like matrix products in multiples of 64
    return F.cross_entropy(F.linear(x, weight)[:, :V], targets, reduction="none")


class AdaptiveVocabulary(Vocabulary):
    """For more than 20000 words: rare ones in bands of width C/4, C/16 below the matrix of the common ones.

    Adaptive input (Baevski & Auli 1809.10853), adaptive softmax (Grave et al. 1609.04309): the matrix has one
    row more for each band, and a band tells its own words apart. A band's ids are from `start` to `stop` - 1."""

    def __init__(self, V, C, cutoffs=(20000, 60000)):
        starts = [cutoff for cutoff in cutoffs if cutoff < V]
        super().__init__(starts[0] + len(starts), C)
        self.common = starts[0]
        self.bands = list(zip(starts, starts[1:] + [V]))
        shapes = [(stop - start, C // 4 ** n) for n, (start, stop) in enumerate(self.bands, 1)]
        self.tails = nn.ParameterList(torch.randn(words, width) * width ** -0.5 for words, width in shapes)
        self.projections = nn.ParameterList(torch.randn(width, C) * 0.02 for _, width in shapes)

    def forward(self, idx):
        x = F.embedding(idx.clamp(max=self.common - 1), self.weight)
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            rare = F.embedding(idx.clamp(start, stop - 1) - start, tail) @ projection
            x = torch.where((idx >= start)[..., None], rare.to(x.dtype), x)
        return x * math.sqrt(x.shape[-1])

    def loss(self, x, targets):
        # in the matrix a rare word is its band, whose row follows those of the common words
        band = sum(targets >= start for start, _ in self.bands)
        loss = self.token_loss(x, self.weight, targets.clamp(max=self.common - 1) + band)
        # and then itself among the words of the band
        for (start, stop), tail, projection in zip(self.bands, self.tails, self.projections):
            inside = ((targets >= start) & (targets < stop)).nonzero().squeeze(1)
            logits = F.linear(F.linear(x[inside], projection), tail)
            rare = F.cross_entropy(logits, targets[inside] - start, reduction="none")
            loss = loss.index_add(0, inside, rare)
        return loss

    def log_probs(self, x):
        first = super().log_probs(x)
        parts = [first[..., :self.common]]
        for n, (tail, projection) in enumerate(zip(self.tails, self.projections), self.common):
            rare = F.linear(F.linear(x, projection), tail).log_softmax(-1)
            parts.append(first[..., n:n + 1] + rare)
        return torch.cat(parts, -1)


# ---- test-time extensions: each sets one attribute; at the trained length nothing changes


def interpolate(pos, length):
    """Squeezes `length` positions into the trained range (Chen et al. 2306.15595)."""
    pos.spacing = min(1.0, pos.config.block_size / length)


def ntk(pos, length):
    """Rotary with 10000 s^(D/(D-2)) for 10000, s = length / trained length (bloc97, r/LocalLLaMA 2023)."""
    D = pos.config.n_embd // pos.config.n_head
    s = max(1.0, length / pos.config.block_size)
    n = torch.arange(D // 2, device=pos.w.device)
    pos.w = frequencies(D, pos.w.device) * s ** (-2 * n / (D - 2))


def hierarchical(pos, length):
    """Position n r + s gets a u_r + (1 - a) u_s, u = (p - a p_0) / (1 - a) (Su, kexue.fm/archives/7947).

    With a = 0.4. That is p_s + a / (1 - a) (p_r - p_0): the first n stay as they were, bit for bit."""
    n = pos.config.block_size
    place = torch.arange(n * n, device=pos.vectors.device)[:max(n, length)]
    p = pos.vectors.data[:n]
    pos.vectors = nn.Parameter(p[place % n] + 0.4 / 0.6 * (p[place // n] - p[0]))


EXTENSIONS = {"interpolate": (interpolate, ("learned", "sinusoidal", "rotary", "alibi")),
              "ntk": (ntk, ("rotary",)),
              "hierarchical": (hierarchical, ("learned",))}


def fits(config, extension):
    """Whether a test-time extension is for a model with this config."""
    return config.pos in EXTENSIONS[extension][1] and not config.random_positions
