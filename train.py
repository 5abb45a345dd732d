"""Trains a GPT with each of the position encodings named, then tests all runs in
OUT_DIR at the trained length and at longer ones.

    python train.py                                                   # laptop, minutes
    python train.py --preset small --pos sinusoidal alibi             # one GPU
    torchrun --nproc_per_node=2 train.py --preset paper               # two
"""
import argparse
import functools
import hashlib
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
from data import check, load, write_csv, write_whole
from eval import bounded, positive
from model import GPT, POSITIONS, GPTConfig

PRESETS = ("quick", "small", "paper")
fraction, not_negative = bounded(float, 0, 1), bounded(float, 0)
SETTINGS = {    # type, value in each preset, meaning
    "data": (str, "stdlib", "wikitext-103", "wikitext-103", "wikitext-103, wikitext-2, stdlib or a folder"),
    "block_size": (bounded(int, 2), 256, 512, 512, "the trained length, in tokens"),
    "batch_size": (positive, 2, 64, 18, "sequences in a micro-batch, over all processes"),
    "grad_accum": (positive, 1, 1, 8, "micro-batches in a step"),
    "max_iters": (positive, 1000, 30000, 286000, "steps"),
    "n_layer": (positive, 3, 12, 16, "layers"),
    "n_head": (positive, 8, 12, 8, "attention heads"),
    "n_embd": (positive, 128, 768, 1024, "width"),
    "dropout": (fraction, 0.0, 0.1, 0.3, "of embeddings and residual branches"),
    "attn_dropout": (fraction, 0.0, 0.0, 0.1, "of attention weights"),
    "act_dropout": (fraction, 0.0, 0.0, 0.1, "of the MLP's activations"),
    "learning_rate": (not_negative, 4e-3, 6e-4, 5e-4, "at its peak; a cosine takes it to a tenth"),
    "warmup_iters": (bounded(int, 0), 100, 1000, 16000, "steps to the peak"),
    "weight_decay": (not_negative, 0.1, 0.1, 0.0, "of matrices"),
    "grad_clip": (not_negative, 1.0, 1.0, 0.1, "the gradient's norm at most; 0 is off"),
    "eval_interval": (positive, 500, 1000, 2000, "steps from one evaluation and checkpoint to the next"),
    "out_dir": (Path, "out/quick", "out/small", "out/paper", "has a folder for each run")}
# beside the model and the text, whose checksum main adds, this decides the weights: --resume holds it fast
RECIPE = ("data", "seed", "batch_size", "grad_accum", "max_iters", "learning_rate", "warmup_iters",
          "weight_decay", "grad_clip", "dtype")


def get_args():
    """The flags, filled up from the preset."""
    formulas = [f"  {name:11} {POSITIONS[name].__doc__.splitlines()[0]}" for name in POSITIONS]
    parser = evaluation.make_parser(__doc__, "\n".join(["position encodings (--pos):", *formulas]))
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="quick | small | paper: which values below")
    for flag, (kind, *values, meaning) in SETTINGS.items():
        text = f"{meaning} ({' | '.join(map(str, values))})"
        add(f"--{flag}", type=kind, metavar="X", default=argparse.SUPPRESS, help=text)
    add("--pos", nargs="+", choices=POSITIONS, metavar="NAME",
        help="listed below (quick: the paper's four; else alibi)")
    add("--tokenizer", choices=("word", "byte"), help="of the text (byte for stdlib, else word)")
    add("--random_positions", type=bounded(int, 0, 2 ** 16), default=0,
        help="training draws sorted positions below this; 0 is off")
    add("--seed", type=bounded(int, 0, 2 ** 32), default=1337, help="(1337)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from OUT_DIR/NAME/ckpt.pt")
    again.add_argument("--overwrite", action="store_true", help="start anew, over that")
    parser.set_defaults(window=0, logn=False)
    args = parser.parse_args()
    for flag, (_, *values, _) in SETTINGS.items():
        vars(args).setdefault(flag, values[PRESETS.index(args.preset)])
    if args.pos is None:
        args.pos = ["sinusoidal", "rotary", "t5", "alibi"] if args.preset == "quick" else ["alibi"]
    if args.tokenizer is None:
        args.tokenizer = "byte" if args.data == "stdlib" else "word"
    check(args.n_embd % (2 * args.n_head) == 0, "--n_embd must be a multiple of twice --n_head")
    check(not 0 < args.random_positions < args.block_size,
          f"--random_positions: {args.block_size} (--block_size) at least, or 0")
    return args


def get_lr(step, args):
    """Linear warm-up, then a cosine from the peak to a tenth of it at max_iters."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / (args.max_iters - args.warmup_iters)
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


@functools.lru_cache(maxsize=2)     # a batch may lie in two epochs
def permutation(blocks, seed, epoch):
    """(blocks,): which block comes when in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def get_batch(tokens, args, n):
    """Inputs and targets, (rows, block_size) each, of micro-batch n of the run: this process's share.

    The text is cut into blocks; each epoch takes every block once, in an order that the seed decides."""
    blocks = tokens.unfold(0, args.block_size + 1, args.block_size)     # a view: (blocks, T + 1)
    rows = args.batch_size // args.processes
    first = n * args.batch_size + args.rank * rows
    chosen = []
    for k in range(first, first + rows):
        epoch, place = divmod(k, len(blocks))
        chosen.append(permutation(len(blocks), args.seed, epoch)[place])
    ids = blocks[chosen].long()
    if args.device == "cuda":
        ids = ids.pin_memory()      # so that nothing waits for the copy
    ids = ids.to(args.device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


def check_same(path, wanted):
    """Raises UserError where the checkpoint at `path` is of a run with another config or recipe."""
    settings, _, _ = evaluation.load_checkpoint(path)
    for flag, value in wanted.items():
        was = settings.get(flag)
        check(was == value, f"{path} was trained with {flag} {was}, not {value}")


def train(path, config, recipe, corpus, args):
    """One run, saved at `path` with log.csv beside it."""
    torch.manual_seed(args.seed)
    model = GPT(config).to(args.device)
    # the paper's optimizer is NAG
    optimizer = torch.optim.AdamW(model.parameter_groups(args.weight_decay), betas=(0.9, 0.95), fused=True)
    start, log = 0, []
    if args.resume and path.exists():
        checkpoint = torch.load(path, map_location="cpu")       # main has checked it
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, log = checkpoint["step"], checkpoint["log"]
    if args.compile:
        model.compile_parts()
    parallel = DistributedDataParallel(model) if args.processes > 1 else model

    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    if args.rank == 0:
        print(f"{config.pos}: {parameters:,} parameters on {args.device} in {args.dtype}, "
              f"saved in {path.parent}", flush=True)
    last_eval, loss_sum, clock = start, 0.0, time.perf_counter()
    no_bar = True if args.rank > 0 else None        # tqdm's None: a bar on terminals only
    bar = tqdm(range(start, args.max_iters), config.pos, disable=no_bar)
    for step in bar:
        # all that is random in a step comes from here (2^32 steps a seed): a resumed run repeats it exactly
        torch.manual_seed((args.seed << 32) + step * args.processes + args.rank)
        lr = get_lr(step, args)
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = lr

        # forward and backward; the gradients of micro-batches add up
        for micro in range(args.grad_accum):
            x, y = get_batch(corpus.train, args, step * args.grad_accum + micro)
            parallel.require_backward_grad_sync = micro == args.grad_accum - 1      # DDP averages then
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = parallel(x, y).mean() / args.grad_accum
            loss.backward()
            loss_sum += loss.detach()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 10 == 0:      # now and then: to look at the loss makes the CPU wait for the GPU
            bar.set_postfix_str(f"loss {loss.item() * args.grad_accum:.3f}")
        if done % args.eval_interval and done < args.max_iters:
            continue

        # the mean loss, of this process, and the speed since the last evaluation
        train_loss = loss_sum.item() / (done - last_eval)
        tokens = (done - last_eval) * args.grad_accum * args.batch_size * args.block_size
        speed = tokens / (time.perf_counter() - clock)
        last_eval, loss_sum = done, 0.0
        if args.rank > 0:
            continue

        # evaluate, save, print
        total, targets = evaluation.evaluate(model, corpus.valid, config.block_size, dtype=args.dtype)
        valid_loss = (total.sum() / targets.sum()).item()
        check(math.isfinite(valid_loss), f"{config.pos}: the loss is {valid_loss}: lower --learning_rate")
        log.append(dict(step=done, train_loss=train_loss, valid_loss=valid_loss, lr=lr, tokens_per_s=speed))
        checkpoint = dict(config=vars(config), recipe=recipe, words=corpus.words, step=done, log=log,
                          model=model.state_dict(), optimizer=optimizer.state_dict())
        write_whole(path, lambda file: torch.save(checkpoint, file))
        write_csv(path.with_name("log.csv"), log)
        bar.clear()
        print(f"{config.pos} step {done}: train loss {train_loss:.4f}, valid loss {valid_loss:.4f}, "
              f"{speed:,.0f} tokens/s", flush=True)
        clock = time.perf_counter()


def join_processes(device):
    """This process's rank and how many there are; under torchrun it joins the others.

    Process 0 alone evaluates and saves."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch._dynamo.config.optimize_ddp = False       # it cannot split graphs with FlexAttention in them
    return dist.get_rank(), dist.get_world_size()


def main():
    args = get_args()
    evaluation.pick_device(args)
    args.rank, args.processes = join_processes(args.device)

    # what can be wrong is found before the first run
    check(args.batch_size % args.processes == 0, "--batch_size must be a multiple of the processes")
    if args.rank > 0:
        dist.barrier()      # process 0 downloads and tokenises, the others find its cache
    corpus = load(args.data, args.tokenizer, args.data_dir)
    if args.rank == 0 and args.processes > 1:
        dist.barrier()
    train_size, valid_size = len(corpus.train), len(corpus.valid)
    check(args.block_size < train_size, f"train has {train_size} tokens, too few for --block_size")
    longest = max(args.lengths or [args.block_size])
    check(longest < valid_size, f"valid has {valid_size} tokens, too few for a length of {longest}")
    recipe = {flag: vars(args)[flag] for flag in RECIPE}
    recipe["train_text"] = hashlib.sha256(corpus.train.numpy()).hexdigest()[:8]
    configs = {}
    for pos in args.pos:
        fields = vars(args) | {"pos": pos, "vocab_size": len(corpus.words) if corpus.words else 256}
        config = GPTConfig(**{field: fields[field] for field in GPTConfig.__dataclass_fields__})
        path = Path(args.out_dir, pos, "ckpt.pt")
        configs[path] = config
        if path.exists() and not args.overwrite:
            check(args.resume, f"{path} is there: --resume, --overwrite, or another --out_dir")
            check_same(path, vars(config) | recipe)

    for path, config in configs.items():
        train(path, config, recipe, corpus, args)
    if args.processes > 1:
        dist.destroy_process_group()
    if args.rank == 0:
        closing = evaluation.get_args([f"{args.out_dir}", "--csv", f"{args.out_dir}/extrapolation.csv"])
        for flag in ("data_dir", "device", "dtype", "compile", "lengths"):
            setattr(closing, flag, getattr(args, flag))
        evaluation.compare(closing)


if __name__ == "__main__":
    evaluation.guarded(main)
