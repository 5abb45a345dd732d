"""Trains a GPT with each of the position encodings named, then tests it at
lengths it never saw.

    python train.py --preset quick --pos sinusoidal rotary t5 alibi   # laptop
    python train.py --preset small --pos sinusoidal alibi             # one GPU
    torchrun --nproc_per_node=2 train.py --preset paper --pos alibi   # two
"""
import functools
import math
import os
import signal
import sys
import textwrap
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import UserError, load, write_csv, write_whole
from eval import Parser, evaluate, load_checkpoint, measure, number, pick_device, pick_lengths, report, run
from model import GPT, POSITIONS, GPTConfig, to_device

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun's

natural, positive, real, fraction = number(int, 0), number(int, 1), number(float, 0), number(float, 0, 0.99)
PRESETS = ("quick", "small", "paper")
SETTINGS = {    # the value in each preset, its type and meaning; the paper trained with NAG, here it is AdamW
    "data": ("stdlib", "wikitext-103", "wikitext-103", str, "wikitext-103, wikitext-2, stdlib or a folder"),
    "block_size": (64, 512, 512, positive, "the trained length, in tokens"),
    "batch_size": (8, 64, 18, number(int, 1, 10 ** 6), "sequences in a micro-batch, over all processes"),
    "grad_accum": (1, 1, 8, positive, "micro-batches in a step"),
    "max_iters": (1000, 30000, 286000, positive, "steps"),
    "n_layer": (3, 12, 16, positive, "layers"),
    "n_head": (4, 12, 8, positive, "attention heads"),
    "n_embd": (128, 768, 1024, positive, "width"),
    "dropout": (0.0, 0.1, 0.3, fraction, "of embeddings and residual branches"),
    "attn_dropout": (0.0, 0.0, 0.1, fraction, "of attention weights"),
    "act_dropout": (0.0, 0.0, 0.1, fraction, "of the MLP's hidden layer"),
    "learning_rate": (2e-3, 6e-4, 5e-4, real, "at its peak; a cosine takes it to a tenth"),
    "warmup_iters": (100, 1000, 16000, natural, "steps to the peak"),
    "weight_decay": (0.1, 0.1, 0.0, real, "of matrices"),
    "grad_clip": (1.0, 1.0, 0.1, real, "the gradient's norm at most; 0 is off"),
    "eval_interval": (500, 1000, 2000, positive, "steps from one evaluation and checkpoint to the next")}
# a resumed run may change these flags; its training text is compared by content
MAY_CHANGE = ("preset data data_dir out_dir device dtype compile resume overwrite lengths max_iters "
              "eval_interval").split()
LOG_HEADER = ["step", "train_loss", "valid_loss", "lr", "tokens_per_s"]
# dense bfloat16 FLOP/s by torch.cuda.get_device_name(), from NVIDIA's data sheets
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}


def get_args():
    """The flags, over the preset's defaults."""
    lines = [f"{name:11} {encoding.__doc__.splitlines()[0]}" for name, encoding in POSITIONS.items()]
    lines = [textwrap.fill(line, 80, initial_indent="  ", subsequent_indent=" " * 14) for line in lines]
    parser = Parser(description=__doc__, epilog="position encodings (--pos):\n" + "\n".join(lines))
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="values to start from (small)")
    asked = [arg for arg in sys.argv[1:] if arg not in ("-h", "--help")]
    preset = PRESETS.index(parser.parse_known_args(asked)[0].preset)
    for flag, (*values, kind, text) in SETTINGS.items():
        add(f"--{flag}", type=kind, default=values[preset], metavar="X", help=f"{text} ({values[preset]})")
    add("--pos", nargs="+", choices=POSITIONS, default=["alibi"], metavar="NAME", help="listed below (alibi)")
    add("--tokenizer", choices=("word", "byte"), help="of the text (byte for stdlib, else word)")
    folder = f"out/{PRESETS[preset]}"
    add("--out_dir", default=folder, metavar="DIR", help=f"each run has a folder in it ({folder})")
    add("--random_positions", type=number(int, 0, 10 ** 6), default=0, metavar="N",
        help="random, below N, in training (off)")
    add("--seed", type=number(int, 0, 2 ** 31), default=1337, help="of weights, batches and dropout (1337)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from OUT_DIR/NAME/ckpt.pt")
    start.add_argument("--overwrite", action="store_true", help="start anew where a checkpoint lies")
    args = parser.parse_args()
    args.tokenizer = args.tokenizer or ("byte" if args.data == "stdlib" else "word")
    return args


def get_lr(step, args):
    """Linear warm-up, then a cosine from the peak to a tenth of it at max_iters."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    coeff = 0.5 * (1 + math.cos(math.pi * progress))        # from 1 to 0
    min_lr = args.learning_rate / 10
    return min_lr + coeff * (args.learning_rate - min_lr)


@functools.lru_cache(maxsize=2)
def block_order(blocks, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def get_batch(tokens, args, first, rows):
    """Inputs and targets, (rows, block_size) each: sequences first, first + 1, ... of the run.

    The text is cut into blocks; each epoch takes every block once, in an order that the seed decides."""
    blocks = tokens.unfold(0, args.block_size + 1, args.block_size)     # a view: (blocks, T + 1)
    places = [divmod(n, len(blocks)) for n in range(first, first + rows)]
    ids = blocks[[block_order(len(blocks), args.seed, epoch)[n] for epoch, n in places]].long()
    return ids[:, :-1], ids[:, 1:]


def on_signal(stop, signum, frame):
    """Handles a signal: the step under way can end, a second one ends all at once."""
    stop.append(signum)
    signal.signal(signum, signal.SIG_DFL)
    with suppress(OSError):     # as where the signal has ended `| tee` too; print may be under way itself
        os.write(2, b"\nfinishing this step; once more stops at once\n")


def checkpoint_to_resume(path, config, args, digest):
    """The checkpoint to go on from, or None. Raises UserError where the flags contradict it."""
    if args.overwrite or not path.exists():
        return None
    if not args.resume:
        raise UserError(f"{path} is there already: --resume goes on from it, --overwrite starts anew")
    checkpoint = load_checkpoint(path)
    saved = checkpoint["args"] | checkpoint["config"]       # its one pos: the flag may name several
    for flag, now in (vars(args) | {"pos": config.pos}).items():
        then = saved.get(flag)
        if flag not in MAY_CHANGE and now != then:
            raise UserError(f"--{flag} {now}, but {path} has {then}: name that, or another --out_dir")
    if (checkpoint["digest"], checkpoint["config"]) != (digest, vars(config)):
        raise UserError(f"--data {args.data} is not the text of {path}: name that, or another --out_dir")
    if checkpoint["step"] > args.max_iters:
        raise UserError(f"--max_iters {args.max_iters} is less than the {checkpoint['step']} steps of {path}")
    return checkpoint


def train(path, config, corpus, args, device, dtype):
    """One run, saved at `path` with log.csv beside it: the trained model."""
    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    model.fuses = args.compile
    optimizer = torch.optim.AdamW(model.parameter_groups(args.weight_decay), betas=(0.9, 0.95), fused=True)
    step, log, loss_sum = 0, [], torch.zeros((), device=device)
    if checkpoint := checkpoint_to_resume(path, config, args, corpus.digest):
        model.load_state_dict(dict(checkpoint["model"]))
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]})
        step, log = checkpoint["step"], checkpoint["log"]
        loss_sum += checkpoint["loss_sum"]
        if (before := checkpoint["args"].get("max_iters")) != args.max_iters:
            lr = get_lr(step, args)
            print(f"{config.pos}: --max_iters was {before}, the learning rate jumps to {lr:.2e}")
    if args.compile:
        torch.compiler.reset()      # else the encodings share one small allowance of recompilations
        model.stack = torch.compile(model.stack, fullgraph=True)
        model.wte.head_loss = torch.compile(model.wte.head_loss, fullgraph=True)
    parallel = DistributedDataParallel(model) if WORLD > 1 else model

    def check_finite(value, what):
        if not math.isfinite(value):
            raise UserError(f"{config.pos}: {what} is {value} at step {step}: lower --learning_rate")

    rows = args.batch_size // WORLD         # of this process
    tokens_per_step = args.batch_size * args.grad_accum * args.block_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speeds, seen, clock = [], step, time.perf_counter()
    bar = tqdm(total=args.max_iters, initial=step, desc=config.pos, disable=True if RANK else None)
    stop, stopping = [], False
    handler = signal.SIG_IGN if RANK else functools.partial(on_signal, stop)
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    while step < args.max_iters and not stopping:
        # all that is random in a step comes from here, so that a resumed run repeats it exactly
        torch.manual_seed((((args.seed << 31) + step) * WORLD + RANK) % 2 ** 64)
        lr = get_lr(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward; the gradients of micro-batches add up
        for micro in range(args.grad_accum):
            first = (step * args.grad_accum + micro) * args.batch_size + RANK * rows
            x, y = get_batch(corpus.train, args, first, rows)
            parallel.require_backward_grad_sync = micro == args.grad_accum - 1      # for DDP
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = parallel(to_device(x, device), y).mean()
            (loss / args.grad_accum).backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # progress, now and then: a look at the loss makes the CPU wait for the GPU
        due = step % args.eval_interval == 0 or step == args.max_iters
        if due or stop or step % 10 == 0:
            check_finite(loss.item(), "the loss")
            check_finite(norm.item(), "the gradient's norm")
            speeds.append((step - seen) * tokens_per_step / (time.perf_counter() - clock))
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {loss.item():.3f}, {speeds[-1]:,.0f} tokens/s")
            seen, clock = step, time.perf_counter()

        # evaluate, save, print
        if due:
            micro_batches = args.grad_accum * (step - (log[-1][0] if log else 0))
            mean = loss_sum / micro_batches / WORLD
            loss_sum = torch.zeros_like(loss_sum)
            if WORLD > 1:
                dist.all_reduce(mean)
            total, count = evaluate(model, corpus.valid, config.block_size, dtype=dtype)
            valid, speed = (total.sum() / count.sum()).item(), float(np.median(speeds[1:] or speeds))
            check_finite(valid, "the validation loss")
            log.append([step, mean.item(), valid, lr, speed])
        stopping = bool(stop)       # looked at once: what comes later is for the next step
        if RANK == 0 and (due or stopping):
            state = dict(config=vars(config), args=vars(args), words=corpus.words, digest=corpus.digest,
                         step=step, log=log, loss_sum=loss_sum.item(),
                         model=model.state_dict(), optimizer=optimizer.state_dict()["state"])
            write_whole(path, lambda file: torch.save(state, file))
            write_csv(path.with_name("log.csv"), LOG_HEADER, log)
        if due:
            tqdm.write(f"{config.pos} step {step}: train loss {mean.item():.4f}, "
                       f"valid loss {valid:.4f}, {speed:,.0f} tokens/s")
            clock = time.perf_counter()
    bar.close()
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if stop:
        print(f"stopped after step {step}: --resume goes on from {path}")
        sys.exit(128 + stop[0])

    measured = log and log[-1][0] == step       # not where it was stopped between two evaluations
    _, _, valid, _, speed = log[-1] if measured else [math.nan] * 5
    return model, valid, speed


def summary(model, valid, speed, first_speed):
    """A finished run in a line. MFU: the share of GPT.flops_per_token in the chips' dense bfloat16 peak."""
    size = sum(p.numel() for p in model.parameters())
    line = f"{model.config.pos:11} {size:11,} {speed:9,.0f} {speed / first_speed:6.2f} {valid:10.4f}"
    if not next(model.parameters()).is_cuda:
        return line + "      -        -"
    mfu = speed * model.flops_per_token() / PEAK_FLOPS.get(torch.cuda.get_device_name(), math.nan) / WORLD
    return line + f" {mfu:6.1%} {torch.cuda.max_memory_allocated() / 2 ** 20:8,.0f}"


def main():
    args = get_args()
    device, dtype = pick_device(args)
    if args.batch_size % WORLD:
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of the {WORLD} processes")
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # one process fills the cache while the others wait, for hours if need be
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6),
                                device_id=device if device.type == "cuda" else None)
    if RANK:
        sys.stdout = open(os.devnull, "w")      # process 0 alone prints and writes
        dist.barrier()
    corpus = load(args.data, args.tokenizer, args.data_dir)
    if WORLD > 1 and RANK == 0:
        dist.barrier()

    # all that can be wrong is found before the first run
    if args.block_size >= len(corpus.train):
        raise UserError(f"--block_size {args.block_size}, but train has {len(corpus.train) - 1} targets")
    lengths = pick_lengths(args, args.block_size, corpus.valid)
    shape = {key: value for key, value in vars(args).items() if key in GPTConfig.__dataclass_fields__}
    shape["vocab_size"] = len(corpus.words) or 256
    jobs = []
    for pos in dict.fromkeys(args.pos):
        config = GPTConfig(**shape | {"pos": pos})
        path = Path(args.out_dir, pos, "ckpt.pt")
        checkpoint = checkpoint_to_resume(path, config, args, corpus.digest)
        if RANK == 0 and not args.overwrite:        # also finds out whether it can be written
            write_csv(path.with_name("log.csv"), LOG_HEADER, checkpoint["log"] if checkpoint else [])
        if args.resume and not checkpoint:
            print(f"{pos}: there is no {path} yet, it starts anew")
        jobs.append((path, config))

    groups, speeds = [], []
    lines = ["encoding     parameters  tokens/s  ratio valid loss    MFU  peak MB"]
    for path, config in jobs:
        model, valid, speed = train(path, config, corpus, args, device, dtype)
        speeds.append(speed)
        lines.append(summary(model, valid, speed, speeds[0]))
        groups.append([measure(model, corpus.valid, lengths, path, args.data, dtype=dtype)])
    print("", *lines, "", sep="\n")
    table = None if RANK else Path(args.out_dir, "extrapolation.csv")
    report(groups, args.tokenizer, table, keep=True)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
