"""Trains a GPT with each of the position encodings named, then tests all runs in
OUT_DIR at the trained length and at longer ones.

    python train.py --preset quick --pos sinusoidal rotary t5 alibi   # laptop
    python train.py --preset small --pos sinusoidal alibi             # one GPU
    torchrun --nproc_per_node=2 train.py --preset paper --pos alibi   # two
"""
import functools
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
from data import UserError, check, load, write_csv, write_whole
from model import GPT, POSITIONS, GPTConfig

PRESETS = ("quick", "small", "paper")
SETTINGS = {    # the value in each preset and its meaning; the paper trained with NAG, here it is AdamW
    "data": ("stdlib", "wikitext-103", "wikitext-103", "wikitext-103, wikitext-2, stdlib or a folder"),
    "block_size": (256, 512, 512, "the trained length, in tokens"),
    "batch_size": (2, 64, 18, "sequences in a micro-batch, over all processes"),
    "grad_accum": (1, 1, 8, "micro-batches in a step"),
    "max_iters": (1000, 30000, 286000, "steps"),
    "n_layer": (3, 12, 16, "layers"),
    "n_head": (8, 12, 8, "attention heads"),
    "n_embd": (128, 768, 1024, "width"),
    "dropout": (0.0, 0.1, 0.3, "of embeddings and residual branches"),
    "attn_dropout": (0.0, 0.0, 0.1, "of attention weights"),
    "act_dropout": (0.0, 0.0, 0.1, "of the MLP's hidden layer"),
    "learning_rate": (4e-3, 6e-4, 5e-4, "at its peak; a cosine takes it to a tenth"),
    "warmup_iters": (100, 1000, 16000, "steps to the peak"),
    "weight_decay": (0.1, 0.1, 0.0, "of matrices"),
    "grad_clip": (1.0, 1.0, 0.1, "the gradient's norm at most; 0 is off"),
    "eval_interval": (500, 1000, 2000, "steps from one evaluation and checkpoint to the next")}
# with the model and the text, what decides a run: --resume insists on it
RECIPE = "seed batch_size grad_accum max_iters learning_rate warmup_iters weight_decay grad_clip dtype"


def get_args():
    """The flags, over the preset's defaults."""
    formulas = [f"  {pos:11} {str(POSITIONS[pos].__doc__).splitlines()[0]}" for pos in POSITIONS]
    parser = evaluation.make_parser(__doc__, "\n".join(["position encodings (--pos):", *formulas]))
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="values to start from (small)")
    # the preset first: it has the other flags' defaults, which --help shows
    asked = [arg for arg in sys.argv[1:] if arg not in ("-h", "--help")]
    preset = parser.parse_known_args(asked)[0].preset
    for flag, (*values, text) in SETTINGS.items():
        value = values[PRESETS.index(preset)]
        add(f"--{flag}", type=type(value), default=value, metavar="X", help=f"{text} ({value})")
    add("--pos", nargs="+", choices=POSITIONS, default=["alibi"], metavar="NAME", help="listed below (alibi)")
    add("--tokenizer", choices=("word", "byte"), help="of the text (byte for stdlib, else word)")
    add("--out_dir", default=f"out/{preset}", metavar="DIR", help=f"has a folder for each run (out/{preset})")
    add("--random_positions", type=int, default=0, metavar="N", help="random, below N, in training (off)")
    add("--seed", type=int, default=1337, help="of weights, batches and dropout (1337)")
    add("--resume", action="store_true", help="go on from OUT_DIR/NAME/ckpt.pt")
    add("--overwrite", action="store_true", help="delete OUT_DIR/NAME/ckpt.pt and start anew")
    parser.set_defaults(window=0, logn=False)
    args = parser.parse_args()
    check(args.n_embd % (2 * args.n_head) == 0, "--n_embd must be a multiple of twice --n_head")
    args.tokenizer = args.tokenizer or ("byte" if args.data == "stdlib" else "word")
    return args


def get_lr(step, args):
    """Linear warm-up, then a cosine from the peak to a tenth of it at max_iters."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / (args.max_iters - args.warmup_iters)
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


@functools.lru_cache(maxsize=2)
def order(blocks, seed, epoch):
    """(blocks,): which block comes when in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def get_batch(tokens, args, n):
    """Inputs and targets, (rows, block_size) each, of micro-batch n of the run: this process's share.

    The text is cut into blocks; each epoch takes every block once, in an order that the seed decides."""
    blocks = tokens.unfold(0, args.block_size + 1, args.block_size)     # a view: (blocks, T + 1)
    rows = args.batch_size // args.processes
    first = n * args.batch_size + args.rank * rows
    places = [divmod(k, len(blocks)) for k in range(first, first + rows)]
    chosen = [order(len(blocks), args.seed, epoch)[place] for epoch, place in places]
    ids = blocks[chosen].long().to(args.device)
    return ids[:, :-1], ids[:, 1:]


def resume(path, model, optimizer, recipe):
    """Puts a checkpoint in place: its step and its log. Raises UserError where it is of another run."""
    checkpoint, _ = evaluation.load_checkpoint(path)
    saved = checkpoint["config"] | checkpoint["recipe"]
    for flag, value in recipe.items():
        check(saved[flag] == value, f"{path} was trained with {flag} {saved[flag]!s:.30}, not {value!s:.30}")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], checkpoint["log"]


def train(path, config, corpus, args):
    """One run, saved at `path` with log.csv beside it."""
    torch.manual_seed(args.seed)
    model = GPT(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameter_groups(args.weight_decay), betas=(0.9, 0.95), fused=True)
    recipe = {flag: vars(args)[flag] for flag in RECIPE.split()}
    recipe |= dict(train_tokens=len(corpus.train), words=corpus.words)
    step, log = 0, []
    if args.resume and path.exists():
        step, log = resume(path, model, optimizer, vars(config) | recipe)
    if args.compile:
        model.compile_parts()
    parallel = DistributedDataParallel(model) if args.processes > 1 else model

    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() for p in model.parameters())
    if args.rank == 0:
        print(f"{config.pos}: {size:,} parameters on {args.device} in {args.dtype}, saved in {path.parent}")
    last_eval, loss_sum, clock = step, 0.0, time.perf_counter()
    hidden = args.rank > 0 or None          # None: only where output is no terminal
    bar = tqdm(range(step, args.max_iters), config.pos, args.max_iters, initial=step, disable=hidden)
    for step in bar:
        # all that is random in a step comes from here (2^32 steps a seed): a resumed run repeats it exactly
        torch.manual_seed((args.seed << 32) + step * args.processes + args.rank)
        lr = get_lr(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward; the gradients of micro-batches add up
        for micro in range(args.grad_accum):
            x, y = get_batch(corpus.train, args, step * args.grad_accum + micro)
            parallel.require_backward_grad_sync = micro == args.grad_accum - 1      # DDP averages there
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = parallel(x, y).mean() / args.grad_accum
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
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
        if args.rank:
            continue

        # evaluate, save, print
        total, count = evaluation.evaluate(model, corpus.valid, config.block_size, dtype=args.dtype)
        valid_loss = (total.sum() / count.sum()).item()
        check(math.isfinite(valid_loss), f"{config.pos}: the loss is {valid_loss}: lower --learning_rate")
        log.append(dict(step=done, train_loss=train_loss, valid_loss=valid_loss, lr=lr, tokens_per_s=speed))
        checkpoint = dict(config=vars(config), recipe=recipe, data=args.data, step=done, log=log,
                          model=model.state_dict(), optimizer=optimizer.state_dict())
        write_whole(path, lambda file: torch.save(checkpoint, file))
        write_csv(path.with_name("log.csv"), log)
        tqdm.write(f"{config.pos} step {done}: train loss {train_loss:.4f}, valid loss {valid_loss:.4f}, "
                   f"{speed:,.0f} tokens/s")
        clock = time.perf_counter()


def join_processes(args):
    """Under torchrun: joins the others. Process 0 alone prints, evaluates and writes."""
    args.rank, args.processes = 0, 1
    if dist.is_torchelastic_launched():
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        args.rank, args.processes = dist.get_rank(), dist.get_world_size()
        torch._dynamo.config.optimize_ddp = False       # it cannot split graphs with FlexAttention in them
    check(args.batch_size % args.processes == 0, "--batch_size must be a multiple of the processes")


def main():
    args = get_args()
    evaluation.pick_device(args)
    join_processes(args)

    # what can be wrong is found before the first run
    corpus = load(args.data, args.tokenizer, args.data_dir)
    check(0 < args.block_size < len(corpus.train), f"--block_size: train has {len(corpus.train)} tokens")
    evaluation.pick_lengths(args, args.block_size, corpus.valid, "valid")
    paths = {pos: Path(args.out_dir, pos, "ckpt.pt") for pos in args.pos}
    for path in paths.values():
        if args.overwrite:
            path.unlink(missing_ok=True)
        check(args.resume or not path.exists(), f"{path} is there: --resume goes on, --overwrite starts anew")

    fields = {field: value for field, value in vars(args).items() if field in GPTConfig.__dataclass_fields__}
    fields["vocab_size"] = len(corpus.words) or 256
    for pos, path in paths.items():
        try:
            train(path, GPTConfig(**fields | {"pos": pos}), corpus, args)
        except KeyboardInterrupt:
            step = evaluation.load_checkpoint(path)[0]["step"] if path.exists() else 0
            raise UserError(f"stopped: --resume goes on from step {step} of {path}") from None
    if args.processes > 1:
        dist.destroy_process_group()
    if args.rank == 0:
        test = evaluation.get_args([args.out_dir, "--csv", f"{args.out_dir}/extrapolation.csv"])
        vars(test).update({key: vars(args)[key] for key in "data_dir device dtype compile lengths".split()})
        evaluation.main(test)


if __name__ == "__main__":
    evaluation.run(main)
