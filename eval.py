"""Loss and perplexity of trained checkpoints at many lengths: the table, the CSV, the figure.

    python eval.py out/quick/sinusoidal out/quick/alibi --csv table.csv --plot figure.png
    python eval.py out/quick/rotary --extend interpolate ntk --window 64 --stride 32 --by_position

Without --stride the text is cut into blocks; with it, windows of each length move on by that many tokens and score
what no window before them has. Either way every target (each token but the first) counts once, at every length.
"""
import argparse
import csv
import importlib.util
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError, load, nearest, write_whole
from model import EXTENSIONS, GPT, GPTConfig, ModelError, prepare

Checkpoint = namedtuple("Checkpoint", "config args vocab_id step best log losses model optimizer")  # saved as a dict


@torch.no_grad()
def evaluate(model, tokens, length, stride=None, dtype=torch.float32, batch_tokens=16384):
    """(2, length): loss in nats summed and targets counted, by position in the window, over all of `tokens`.

    `length` may be at most model.pos.max_length. Uses no randomness; the model stays in its mode."""
    device, training, stride = next(model.parameters()).device, model.training, stride or length
    model.eval()
    starts = list(range(0, max(0, len(tokens) - 1 - length) + stride, stride))
    last, size = starts.pop(), max(1, batch_tokens // length)           # the last window may be short
    batches = [starts[n:n + size] for n in range(0, len(starts), size)] + [[last]]
    sums = torch.zeros(2, length, dtype=torch.float64)
    for batch in tqdm(batches, f"{model.config.pos} at {length}", leave=False, disable=None):
        ids = torch.stack([torch.from_numpy(tokens[n:n + length + 1].astype("int64")) for n in batch])
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids[:, :-1].to(device), ids[:, 1:]).cpu().double()                  # (B, T)
        # the window before has scored all targets but the last `stride`
        new = torch.arange(loss.shape[1]) >= torch.tensor([[length - stride if n else 0] for n in batch])
        sums[:, :loss.shape[1]] += torch.stack((loss * new, new)).sum(1)
    model.train(training)
    return sums


def measure(model, path, tokens, lengths, split="valid", stride=None, extend="", by_position=False, **options):
    """One CSV row a length, a dict; tokens, loss and ppl are None beyond what the encoding can do."""
    config, rows = model.config, []
    if next(model.parameters()).is_cuda:
        torch.compiler.reset()      # the fused kernel's allowance of recompilations is small
    for length in lengths:
        row = dict(pos=config.pos, train_length=config.block_size, length=length, stride=stride, split=split,
                   tokens=None, loss=None, ppl=None, extend=extend, window=config.window, logn=int(config.logn),
                   random_positions=config.random_positions, checkpoint=path)
        rows.append(row)
        prepare(model, length, extend)
        if length <= model.pos.max_length:
            total, count = evaluate(model, tokens, length, stride, **options)
            loss = (total.sum() / count.sum()).item()
            row.update(tokens=int(count.sum()), loss=loss, ppl=math.exp(min(loss, 700)))
        if by_position and row["loss"]:
            edges = [0, *(2 ** n for n in range((length - 1).bit_length())), length]    # bins that double
            for a, b in zip(edges, edges[1:]):
                bin_loss = total[a:b].sum() / count[a:b].sum()
                print(f"{name(row)} at {length}, having seen {a + 1} to {b} tokens: loss {bin_loss:.4f}")
    return rows


def name(row):
    """How a row's model is called: rotary + ntk + window 64."""
    extra = [f"{key} {row[key]}" for key in ("window", "random_positions") if row[key]] + ["logn"] * row["logn"]
    return " + ".join(filter(None, [row["pos"], row["extend"], *extra]))


def write_csv(path, header, rows):
    """A CSV file, written whole or not at all."""
    write_whole(path, lambda file: csv.writer(file, lineterminator="\n").writerows([header, *rows]), "w")


def report(runs, unit, path):
    """Prints the table: a line for each run, a column for each length, and who extrapolates.

    Writes what was measured to the CSV file `path`, if any."""
    first, lengths = runs[0][0], sorted({row["length"] for run in runs for row in run})
    wide = max(len(name(run[0])) for run in runs)
    protocol = f"sliding by {first['stride']}" if first["stride"] else "non-overlapping"
    print(f"perplexity per {unit}, {first['split']} split, {protocol}, by length in tokens")
    print(f"{'encoding':{wide}} trained" + "".join(f"{length:>9}" for length in lengths))
    for run in runs:
        trained, ppl = run[0]["train_length"], {row["length"]: row["ppl"] for row in run}
        fails = [n for n in ppl if n > trained and not (ppl[n] or math.inf) <= 1.01 * (ppl.get(trained) or 0)]
        verdict = "" if not ppl.get(trained) else f"fails from {fails[0]}" if fails else "holds"
        cells = "".join(f"{ppl[n]:9.2f}" if ppl.get(n) else f"{'-':>9}" for n in lengths)
        print(f"{name(run[0]):{wide}} {trained:>7}{cells}  {verdict}")
    print("fails: more than 1% above the perplexity at the trained length, "
          "or - : no room in the encoding's table of positions")
    if path:
        write_csv(path, first, [row.values() for run in runs for row in run if row["loss"] is not None])


def plot(runs, path, unit):
    """Like the paper's Figure 1: perplexity against length, a line for each run, the trained length marked."""
    from matplotlib.figure import Figure
    figure, lengths = Figure(figsize=(7, 4.5)), sorted({row["length"] for run in runs for row in run})
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="length in tokens", ylabel=f"perplexity per {unit}")
    for run in runs:
        ppl = [row["ppl"] or math.nan for row in run]
        axes.plot([row["length"] for row in run], ppl, marker="o", label=name(run[0]))
    for trained in {run[0]["train_length"] for run in runs}:
        axes.axvline(trained, color="grey", linestyle="--", label=f"trained length {trained}")
    axes.set_xticks(lengths, lengths)
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=150))


def load_checkpoint(path):
    """What train.py saved, from a file or a run's folder, as a Checkpoint. Runs no code from it. Raises UserError."""
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    try:
        checkpoint = Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
        build(checkpoint)
        assert {"data", "tokenizer"} <= checkpoint.args.keys()
        return checkpoint
    except Exception as error:      # whatever a damaged or foreign file does to the unpickler or the model
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{path} is no checkpoint of train.py ({reason}): name a ckpt.pt or a run's folder") from error


def build(checkpoint, **changes):
    """The model in a checkpoint, with these fields of its config changed."""
    model = GPT(GPTConfig(**checkpoint.config | changes))
    model.load_state_dict(checkpoint.model)
    return model


# ---- what this command line shares with train.py's


class Parser(argparse.ArgumentParser):
    """argparse with the flags that both command lines have, and with one line for an error."""

    def __init__(self, **texts):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts)
        add = self.add_argument
        add("--data_dir", default="data", help="downloads and caches (data)")
        add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto is the best there is (auto)")
        add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto is bfloat16 on cuda (auto)")
        add("--lengths", type=number(int, 1), nargs="+", help="of the table (1, 2, 4, 8, 16 x the trained one)")
        add("--window", type=number(int, 0), default=0, help="each token sees itself and WINDOW - 1 before it (all)")
        add("--logn", action="store_true", help="scale queries by max(1, ln(place) / ln(trained length)) (off)")

    def error(self, message):
        wrong, *choices = re.findall(r"[\w-]+", message.partition("invalid choice: ")[2]) or [""]
        self.exit(2, f"{self.prog}: {message} {nearest(wrong, choices)}\n")


def number(kind, low, high=10 ** 9):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    parse.__name__ = kind.__name__      # argparse names it when the text is no number
    return parse


def pick_device(args):
    """The torch.device and torch.dtype that --device and --dtype ask for."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best if args.device == "auto" else torch.device(args.device)
    if device.type not in ("cpu", best.type):
        raise UserError(f"--device {device}: torch finds none here; name {best} or auto")
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(args.dtype, args.dtype)
    return device, getattr(torch, dtype)


def check_lengths(lengths, tokens, stride=None):
    """Raises UserError where the split is too short for a length, or a length for the stride."""
    if max(lengths) >= len(tokens):
        raise UserError(f"length {max(lengths)} is more than the {len(tokens) - 1} targets of a split: shorten it")
    if stride and stride > min(lengths):
        raise UserError(f"--stride {stride} would skip targets at length {min(lengths)}: make it at most that")


def run(main):
    """Calls main; a user's mistake ends in one line on standard error and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, ModelError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        hint = ": lower --batch_size and raise --grad_accum, in eval.py lower --batch_tokens" if memory else ""
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        sys.exit(2)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT_OR_RUN_DIR")
    add("--data", help="corpus name or folder (what the checkpoint was trained on)")
    add("--split", choices=("valid", "test"), default="valid", help="which text (valid)")
    add("--stride", type=number(int, 1), help="sliding windows that move on by this many tokens")
    add("--extend", nargs="+", default=[], choices=EXTENSIONS, help="a further row for each")
    add("--by_position", action="store_true", help="print loss against position in the window")
    add("--batch_tokens", type=number(int, 1), default=16384, help="tokens in a batch (16384)")
    add("--csv", metavar="FILE", help="write the table")
    add("--plot", metavar="FILE", help="draw the figure (needs matplotlib)")
    args = parser.parse_args()
    device, dtype = pick_device(args)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    changes = {key: vars(args)[key] for key in ("window", "logn") if vars(args)[key]}
    jobs, runs, units = [], [], set()
    for path in args.checkpoints:
        checkpoint = load_checkpoint(path)
        corpus = load(args.data or checkpoint.args["data"], checkpoint.args["tokenizer"], args.data_dir)
        units.add(corpus.unit)
        if corpus.vocab_id != checkpoint.vocab_id or len(units) > 1:
            raise UserError(f"{path} has another vocabulary than the corpus or the checkpoint before: name its --data")
        lengths = args.lengths or [checkpoint.config["block_size"] * 2 ** n for n in range(5)]
        check_lengths(lengths, getattr(corpus, args.split), args.stride)
        for extend in ["", *args.extend]:
            model = build(checkpoint, **changes)
            prepare(model, lengths[0], extend)
            jobs.append((model, path, getattr(corpus, args.split), lengths, args.split, args.stride, extend))
    for model, *job in jobs:
        runs.append(measure(model.to(device), *job, args.by_position, dtype=dtype, batch_tokens=args.batch_tokens))
    report(runs, corpus.unit, args.csv)
    if args.plot:
        plot(runs, args.plot, corpus.unit)


if __name__ == "__main__":
    run(main)
