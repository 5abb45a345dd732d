"""Trains a GPT with each of the position encodings named, then tests it at lengths it never saw.

    python train.py --preset quick --pos sinusoidal rotary t5 alibi    # a laptop, minutes, no network
    python train.py --preset small --pos sinusoidal alibi              # WikiText-103 on one GPU
    torchrun --nproc_per_node=4 train.py --preset paper --pos alibi    # data-parallel
"""
import argparse
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import eval
from data import UserError, load, write_whole
from model import GPT, POSITIONS, GPTConfig, to_device

whole, positive, real = eval.number(int, 0), eval.number(int, 1), eval.number(float, 0)
fraction = eval.number(float, 0, 0.99)
PRESETS = ("quick", "small", "paper")
SETTINGS = {    # flag: type, meaning, and its value in each preset; the paper trained with NAG, here it is AdamW
    "data": (str, "wikitext-103, wikitext-2, stdlib or a folder", "stdlib", "wikitext-103", "wikitext-103"),
    "block_size": (positive, "the trained length, in tokens", 64, 512, 512),
    "batch_size": (positive, "sequences in a micro-batch, over all processes", 32, 64, 18),
    "grad_accum": (positive, "micro-batches in a step", 1, 1, 8),
    "max_iters": (positive, "steps", 400, 30000, 286000),
    "n_layer": (positive, "layers", 3, 12, 16),
    "n_head": (positive, "attention heads", 4, 12, 8),
    "n_embd": (positive, "width", 128, 768, 1024),
    "dropout": (fraction, "of embeddings and residual branches", 0.0, 0.1, 0.3),
    "attn_dropout": (fraction, "of attention weights", 0.0, 0.0, 0.1),
    "act_dropout": (fraction, "of the MLP's hidden layer", 0.0, 0.0, 0.1),
    "learning_rate": (real, "at its peak; a cosine takes it to a tenth", 2e-3, 6e-4, 5e-4),
    "warmup_iters": (whole, "steps to the peak", 40, 1000, 16000),
    "weight_decay": (real, "of matrices", 0.1, 0.1, 0.0),
    "grad_clip": (real, "the gradient's norm at most; 0 is off", 1.0, 1.0, 0.1),
    "eval_interval": (positive, "steps from one evaluation and checkpoint to the next", 200, 1000, 2000)}
# dense bfloat16 FLOP/s, from NVIDIA's data sheets
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}

# a resumed run may change these flags, and no others
FREE = "preset out_dir data_dir device dtype compile resume overwrite lengths max_iters eval_interval".split()


def get_args():
    """The flags, over the preset's defaults."""
    encodings = "\n".join(f"  {name:11} {cls.__doc__.splitlines()[0]}" for name, cls in POSITIONS.items())
    parser = eval.Parser(description=__doc__, epilog="position encodings (--pos):\n" + encodings)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="values to start from (small)")
    preset = parser.parse_known_args([arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])[0].preset
    add("--pos", nargs="+", choices=POSITIONS, default=["alibi"], metavar="NAME", help="listed below (alibi)")
    for flag, (kind, text, *values) in SETTINGS.items():
        value = values[PRESETS.index(preset)]
        add(f"--{flag}", type=kind, default=value, help=f"{text} ({value})")
    add("--tokenizer", choices=("word", "byte"), help="(byte for stdlib, word for the rest)")
    add("--out_dir", default=f"out/{preset}", help=f"each run has a folder in it (out/{preset})")
    add("--random_positions", type=whole, default=0, metavar="N", help="train at sorted random positions below N (off)")
    add("--seed", type=eval.number(int, 0, 2 ** 31), default=1337, help="of weights, batches and dropout (1337)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on cuda)")
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
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


@functools.lru_cache(maxsize=2)
def block_order(blocks, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def get_batch(tokens, args, first, rows):
    """Inputs and targets, (rows, block_size) each: sequences first, first + 1, ... of the run.

    The text is cut into blocks; each epoch takes every block once, in an order that the seed decides."""
    blocks = (len(tokens) - 1) // args.block_size
    picks = [block_order(blocks, args.seed, n // blocks)[n % blocks] for n in range(first, first + rows)]
    ids = np.stack([tokens[n * args.block_size:(n + 1) * args.block_size + 1] for n in picks]).astype(np.int64)
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])


def peak_memory(device, reset=False):
    """Peak bytes since the last reset: of the GPU's tensors, or of this process where the system is Linux."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated()
    try:
        if reset:
            return Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return math.nan


def find_checkpoint(path, args, vocab_id):
    """The checkpoint to go on from, or None. Raises UserError where it and the flags contradict each other."""
    if path.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{path} is there already: go on from it with --resume, or start anew with --overwrite")
    if args.resume and not path.exists():
        print(f"nothing to resume at {path}: starting from scratch")
    if args.overwrite or not path.exists():
        return None
    checkpoint = eval.load_checkpoint(path)
    for key, now in vars(args).items():
        if key not in FREE and checkpoint.args.get(key) != now:
            raise UserError(f"--{key} {now}, but {path} was trained with {checkpoint.args.get(key)}: name that, "
                            "or another --out_dir")
    if checkpoint.vocab_id != vocab_id:
        raise UserError(f"--data {args.data} has changed since {path}: its vocabulary is another; name an --out_dir")
    if checkpoint.step > args.max_iters:
        raise UserError(f"--max_iters {args.max_iters} is less than the {checkpoint.step} steps of {path}: raise it")
    return checkpoint


def train(config, checkpoint, corpus, args, device, dtype, rank, world):
    """One run, saved in OUT_DIR/NAME. Returns the model and its row for the summary."""
    folder = Path(args.out_dir, config.pos)
    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(args.weight_decay), betas=(0.9, 0.95), fused=True)
    step, best, log, losses, stop = 0, math.inf, [], [], []
    if checkpoint:
        model.load_state_dict(checkpoint.model)
        optimizer.load_state_dict(checkpoint.optimizer)
        step, best, log = checkpoint.step, checkpoint.best, checkpoint.log
        losses = list(torch.tensor(checkpoint.losses, device=device))
    if args.compile or args.compile is None and device.type == "cuda":
        torch.compiler.reset()      # else the encodings share one small allowance of recompilations
        model.stack = torch.compile(model.stack)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model

    def save(*names):
        state = eval.Checkpoint(vars(config), vars(args) | {"pos": config.pos}, corpus.vocab_id, step, best, log,
                                [loss.item() for loss in losses], model.state_dict(), optimizer.state_dict())._asdict()
        eval.write_csv(folder / "log.csv", ["step", "train_loss", "valid_loss", "lr", "tokens_per_s"], log)
        for name in names:
            write_whole(folder / name, lambda file: torch.save(state, file))

    def check_finite(value):
        if not math.isfinite(value):
            raise UserError(f"{config.pos}: loss or gradient is {value} at step {step}, learning rate {lr:.3g}: lower "
                            f"--learning_rate; what lies in {folder} is from before")

    def on_signal(signum, frame):       # the step under way ends first; a second signal ends all at once
        stop.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    before = {signum: signal.signal(signum, signal.SIG_IGN if rank else on_signal)
              for signum in (signal.SIGINT, signal.SIGTERM)}
    if rank == 0 and not folder.exists():
        save()      # log.csv only: an --out_dir that cannot be written is found out now
    rows, tokens = args.batch_size // world, args.batch_size * args.grad_accum * args.block_size
    bar = tqdm(total=args.max_iters, initial=step, desc=config.pos, disable=True if rank else None)
    speeds, seen, clock = [], step, time.perf_counter()
    peak_memory(device, reset=True)
    while step < args.max_iters and not stop:
        torch.manual_seed((args.seed << 31) + step)     # all that is random in a step: resumed runs repeat it exactly
        lr = get_lr(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(args.grad_accum):
            first = (step * args.grad_accum + micro) * args.batch_size + rank * rows
            x, y = get_batch(corpus.train, args, first, rows)
            parallel.require_backward_grad_sync = micro == args.grad_accum - 1      # DistributedDataParallel's
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = parallel(to_device(x, device), y).mean()
            (loss / args.grad_accum).backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        due = step % args.eval_interval == 0 or step == args.max_iters
        if due or stop or step % 10 == 0:      # a look at the loss makes the CPU wait for the GPU
            check_finite(loss.item() + norm.item())
            speeds.append((step - seen) * tokens / (time.perf_counter() - clock))
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {loss.item():.3f}, {speeds[-1]:,.0f} tokens/s")
            seen, clock = step, time.perf_counter()
        if due:
            mean = torch.stack(losses).mean() / world
            losses.clear()
            if world > 1:
                dist.all_reduce(mean)
            total, count = eval.evaluate(model, corpus.valid, config.block_size, dtype=dtype)
            valid, speed = (total.sum() / count.sum()).item(), float(np.median(speeds[1:] or speeds))
            check_finite(valid)
            tqdm.write(f"{config.pos} step {step}: train loss {mean.item():.4f}, validation loss {valid:.4f}, "
                       f"learning rate {lr:.2e}, {speed:,.0f} tokens/s")
            log = [*log, [step, mean.item(), valid, lr, speed]]
            better, best = valid < best, min(valid, best)
            if rank == 0:
                save(*["best.pt"] * better, "ckpt.pt")
            clock = time.perf_counter()
    bar.close()
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if stop:
        save("ckpt.pt")
        print(f"stopped after step {step}: the same command with --resume goes on from {folder / 'ckpt.pt'}")
        sys.exit(128 + stop[0])
    _, _, valid, _, speed = log[-1] if log else [math.nan] * 5
    return model, (config.pos, sum(p.numel() for p in model.parameters()), model.flops_per_token(), speed,
                   peak_memory(device), valid, folder / "ckpt.pt")


def summary(runs, device, world):
    """The runs side by side. MFU: the share of GPT.flops_per_token in the chips' dense bfloat16 peak."""
    chip = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = world * next((flops for key, flops in PEAK_FLOPS.items() if key in chip), math.nan)
    lines = [f"{'encoding':11} {'parameters':>11}  tokens/s  ratio  peak MB    MFU  validation loss, checkpoint"]
    for pos, size, flops, speed, memory, loss, path in runs:
        cells = f"{speed:9,.0f} {speed / runs[0][3]:6.2f} {memory / 2 ** 20:8,.0f} {speed * flops / peak:6.1%}"
        lines.append(f"{pos:11} {size:11,} {cells.replace('nan%', '   -').replace('nan', '  -')}  {loss:.4f}, {path}")
    return "\n".join(lines)


def main():
    args = get_args()
    device, dtype = eval.pick_device(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of the {world} processes")
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w")      # process 0 alone prints and writes
        dist.barrier()                          # it fills the cache first
    corpus = load(args.data, args.tokenizer, args.data_dir)
    if world > 1 and rank == 0:
        dist.barrier()
    eval.check_lengths([args.block_size], corpus.train)
    lengths = args.lengths or [n for n in (args.block_size * 2 ** k for k in range(5)) if n < len(corpus.valid)]
    eval.check_lengths([args.block_size, *lengths], corpus.valid)
    shape = {key: value for key, value in vars(args).items() if key in GPTConfig.__dataclass_fields__}
    jobs, tables, runs = [], [], []
    for pos in dict.fromkeys(args.pos):
        config = GPTConfig(**shape | {"pos": pos, "vocab_size": corpus.vocab_size})
        flags = argparse.Namespace(**vars(args) | {"pos": pos})
        jobs.append((config, find_checkpoint(Path(args.out_dir, pos, "ckpt.pt"), flags, corpus.vocab_id)))
    for config, checkpoint in jobs:
        model, run = train(config, checkpoint, corpus, args, device, dtype, rank, world)
        runs.append(run)
        tables.append(eval.measure(model, run[-1], corpus.valid, lengths, dtype=dtype))
    print(f"\n{summary(runs, device, world)}\n")
    eval.report(tables, corpus.unit, None if rank else Path(args.out_dir, "extrapolation.csv"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    eval.run(main)
