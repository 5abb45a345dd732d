"""Loss and perplexity of trained checkpoints at many lengths: the table, the
CSV, the figure.

    python eval.py out/quick --csv table.csv --plot figure.png
    python eval.py out/quick/rotary --extend interpolate ntk --by_position
    python eval.py out/quick/rotary --window 64 --stride 32 --lengths 64 128

Without --stride the text is cut into blocks; with it, windows of each length
move on by that many tokens and score what no window before them has. Either
way every target (each token but the first) counts once, at every length.
"""
import argparse
import csv
import importlib.util
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, load_split, load_whole, write_csv, write_whole
from model import EXTENSIONS, GPT, GPTConfig, ModelError, fits


@torch.no_grad()
def evaluate(model, tokens, length, stride=None, dtype=torch.float32, batch_tokens=16384):
    """(2, length): loss in nats summed and targets counted, by position in the window, over all of `tokens`.

    Uses no randomness; the model stays in its mode. Raises ModelError beyond the encoding's length."""
    device, training, stride = next(model.parameters()).device, model.training, stride or length
    targets, offsets = len(tokens) - 1, torch.arange(length + 1)
    starts = torch.arange(0, max(0, targets - length) + stride, stride)
    batches = starts.split(max(1, batch_tokens // length))
    sums = torch.zeros(2, length, dtype=torch.float64)
    model.eval()
    for start in tqdm(batches, f"{model.config.pos} at {length}", leave=False, disable=None):
        place = start[:, None] + offsets                                # (B, T + 1)
        ids = tokens[place.clamp(max=targets)].long()                   # the last token fills a short window
        # the window before has scored all targets but the last `stride`
        counts = (place[:, 1:] <= targets) & ((place[:, :1] == 0) | (offsets[1:] > length - stride))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids[:, :-1].to(device), ids[:, 1:].where(counts, -1)).cpu().double()       # (B, T)
        sums += torch.stack((loss, counts)).sum(1)
    model.train(training)
    return sums


def measure(model, tokens, lengths, path, data, split="valid", stride=None, extension="", by_position=False,
            **options):
    """One CSV row a length, as a dict; without tokens and loss, ppl inf, beyond what the encoding can do."""
    config, rows = model.config, []
    if next(model.parameters()).is_cuda:
        torch.compiler.reset()      # the allowance of recompilations is for all models together
    for length in lengths:
        row = dict(pos=config.pos, train_length=config.block_size, length=length, stride=stride, split=split,
                   tokens=None, loss=None, ppl=math.inf, extend=extension, window=config.window,
                   logn=int(config.logn), random_positions=config.random_positions, checkpoint=str(path),
                   data=data)
        rows.append(row)
        if extension:
            EXTENSIONS[extension][0](model.pos, length)
        try:
            total, count = evaluate(model, tokens, length, stride, **options)
        except ModelError:      # beyond the encoding
            continue
        loss = (total.sum() / count.sum()).item()
        row.update(tokens=int(count.sum()), loss=loss, ppl=math.exp(min(loss, 700)))
        if by_position:
            edges = [0, *(2 ** n for n in range((length - 1).bit_length())), length]        # bins that double
            for a, b in zip(edges, edges[1:]):
                targets = int(count[a:b].sum())
                print(f"{name(row)} at {length}, position {a + 1} to {b}: "
                      f"loss {total[a:b].sum() / targets:.4f} over {targets:,} targets, {path}")
    return rows


def name(row):
    """How a row's model is called: rotary + ntk + window 64."""
    parts = [row["pos"], row["extend"], "logn" if row["logn"] else ""]
    parts += [f"{key} {row[key]}" for key in ("window", "random_positions") if row[key]]
    return " + ".join(filter(None, parts))


def labels(runs):
    """The runs' names, with their texts and the folders of their checkpoints where these tell them apart."""
    rows = [run[0] for run in runs]
    several = len({row["data"] for row in rows}) > 1
    names = [name(row) + (f" on {row['data']}" if several else "") for row in rows]
    return [label + (f" in {Path(row['checkpoint']).parent}" if names.count(label) > 1 else "")
            for label, row in zip(names, rows)]


def average(runs):
    """Runs that differ in their seeds as one: ppl is their mean, std their standard deviation."""
    ppl = torch.tensor([[row["ppl"] for row in run] for run in runs], dtype=torch.double)
    mean, std = ppl.mean(0).tolist(), ppl.std(0, correction=min(1, len(runs) - 1)).tolist()
    return [row | dict(ppl=m, std=s, runs=len(runs)) for row, m, s in zip(runs[0], mean, std)]


def verdict(run):
    """holds, or from which length on it fails; nothing without the trained length and a longer one."""
    trained, ppl = run[0]["train_length"], {row["length"]: row["ppl"] for row in run}
    longer = [length for length in ppl if length > trained]
    if not longer or ppl.get(trained, math.inf) == math.inf:
        return ""
    fails = [length for length in longer if not ppl[length] <= 1.01 * ppl[trained]]
    return f"fails from {fails[0]}" if fails else "holds"


def report(groups, unit, path, keep=False):
    """Writes the CSV file `path`, if any; prints the table, even where that failed.

    A group is a list of runs that differ in their seeds, a run a list of rows from measure."""
    runs = [average(group) for group in groups]
    first, lengths = runs[0][0], sorted({row["length"] for run in runs for row in run})
    names = labels(runs)
    wide = max(map(len, ["std of 10", *names]))
    protocol = f"sliding by {first['stride']}" if first["stride"] else "non-overlapping"

    def line(label, trained, run, key):
        known = {row["length"]: row[key] for row in run if row["ppl"] != math.inf}
        cells = {n: f"{x:.2f}" if x < 99999 else f"{x:.2e}" for n, x in known.items()}
        return f"{label:{wide}} {trained:>7}" + "".join(f"{cells.get(n, '-'):>9}" for n in lengths)

    lines = [f"perplexity per {unit}, {first['split']} split, {protocol}, by length in tokens",
             f"{'encoding':{wide}} trained" + "".join(f"{length:>9}" for length in lengths)]
    for label, run in zip(names, runs):
        lines.append(line(label, run[0]["train_length"], run, "ppl") + f"  {verdict(run)}".rstrip())
        if run[0]["runs"] > 1:
            lines.append(line(f"std of {run[0]['runs']}", "", run, "std"))
    try:
        if path:
            write_rows(sum(groups, []), path, keep)
    finally:
        print(*lines, "fails: more than 1% above the perplexity at the trained length,",
              "or - where the encoding's table of positions ends", sep="\n")


def write_rows(runs, path, keep):
    """The CSV file of what was measured; with `keep` rows of other encodings stay in it."""
    header, rows = list(runs[0][0]), [row for run in runs for row in run if row["loss"] is not None]
    if keep and Path(path).is_file():
        measured = {run[0]["pos"] for run in runs}
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = csv.DictReader(line.replace("\0", "") for line in file)
            rows = [row for row in lines if row.get("pos") not in measured] + rows
    write_csv(path, header, [[row.get(key) for key in header] for row in rows])


def plot(runs, path, unit):
    """Like the paper's Figure 1: perplexity against length, a line a run, one std above and below it."""
    import matplotlib.figure
    gap = min(0.06, 1 / len(runs))      # between the lines' names, as a share of the height
    figure, lengths = matplotlib.figure.Figure(figsize=(7, 0.24 / gap), layout="constrained"), set()
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="length in tokens",
                              ylabel=f"perplexity per {unit}")
    # lines in the order of their ends, in colours that the golden ratio keeps apart
    known = [[row for row in run if row["ppl"] != math.inf] for run in runs]
    lines = sorted(filter(all, zip(known, labels(runs))), key=lambda line: line[0][-1]["ppl"])
    colors = matplotlib.colormaps["turbo"](0.05 + 0.9 * (0.618 * np.arange(len(lines)) % 1))[:, :3] * 0.8
    for (run, _), color in zip(lines, colors):
        x, ppl, std = (np.array([row[key] for row in run]) for key in ("length", "ppl", "std"))
        axes.plot(x, ppl, marker="o", color=color)
        axes.fill_between(x, ppl - std, ppl + std, color=color, alpha=0.2, linewidth=0)
        axes.axvline(run[0]["train_length"], color="grey", linestyle="--", zorder=0)
        lengths.update(x.tolist())
    axes.set_xticks(sorted(lengths), sorted(lengths))
    axes.set_xticks([], minor=True)
    axes.yaxis.set(major_locator=matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)),
                   major_formatter="{x:g}", minor_locator=matplotlib.ticker.NullLocator())
    axes.set_title("dashed: the trained length", loc="left", size="small", color="grey")
    # names in the same order, from the lowest up, moved apart, none above the axes
    height, (low, high) = -1.0, np.log(axes.get_ylim())
    for above, (run, label), color in zip(reversed(range(len(lines))), lines, colors):
        x, ppl = run[-1]["length"], run[-1]["ppl"]
        height = min(max((math.log(ppl) - low) / (high - low), height + gap), 1 - gap * above)
        label, width = (label, 0.8) if x == max(lengths) else (f"{label}, to {x}", 0)
        axes.annotate(label, (x, ppl), (1.06, height), textcoords=axes.transAxes, color=color, va="center",
                      arrowprops=dict(arrowstyle="-", linewidth=width, color=color))
    write_whole(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=150))


# ---- checkpoints ----------------------------------------------------------------------------------


def find_checkpoints(path):
    """The file itself, or all ckpt.pt in a folder and below. Raises UserError."""
    found = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("ckpt.pt"))
    if not found:
        raise UserError(f"no ckpt.pt in {path}: name a checkpoint, a run's folder, or a folder of runs")
    return found


def load_checkpoint(path):
    """What train.py saved, a dict. Runs no code from the file. Raises UserError."""
    try:
        checkpoint = load_whole(path)
        check_values(**checkpoint)
        return checkpoint
    except MemoryError:
        raise
    except Exception as error:      # whatever a damaged or foreign file does to the unpickler or the model
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{path} is no checkpoint of train.py ({reason}): "
                        "name another, or train it anew with --overwrite") from error


def check_values(config, args, words, digest, step, log, loss_sum, model, optimizer):
    """Raises where a stranger's checkpoint holds what train.py does not save."""
    json.dumps([args, words, log])      # plain data, or this raises
    texts, numbers = [args["data"], digest, *words], [step, loss_sum, *(x for row in log for x in row)]
    if not (all(isinstance(x, str) for x in texts) and all(isinstance(x, (int, float)) for x in numbers)
            and isinstance(words, list) and config["vocab_size"] == (len(words) or 256)
            and len({*words}) == len(words) and ("<unk>" in words) == bool(words)
            and isinstance(log, list) and all(isinstance(row, list) and len(row) == 5 for row in log)
            and isinstance(step, int) and step >= 0 and isinstance(loss_sum, float)
            and isinstance(optimizer, dict) and config["n_layer"] <= len(model)):
        raise ValueError("its values are not what train.py saves")
    groups = build(config, model).parameter_groups(0.0)
    for n, p in enumerate(p for group in groups for p in group["params"]):
        tensors = optimizer[n] | {"weight": p}
        for key, shape in dict(weight=p.shape, exp_avg=p.shape, exp_avg_sq=p.shape, step=()).items():
            x = tensors[key]
            kind = x.layout, x.dtype, x.device.type, x.shape, x.is_contiguous()
            if kind != (torch.strided, torch.float32, "cpu", shape, True):
                raise ValueError("its weights and its optimizer's state are not what train.py saves")


def build(config, weights, **changes):
    """The model in a checkpoint, with these fields of its config changed."""
    with torch.device("meta"):      # no memory, no initial weights
        model = GPT(GPTConfig(**config | changes))
    model.load_state_dict(dict(weights), assign=True)       # dict: torch notes things in what it is given
    return model


# ---- what this command line shares with train.py's ------------------------------------------------


def number(kind, low, high=10 ** 9):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    parse.__name__ = kind.__name__      # argparse names it when the text is no number
    return parse


class Parser(argparse.ArgumentParser):
    """argparse with the flags that both command lines have, and with one line for an error."""

    def __init__(self, **texts):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts)
        add = self.add_argument
        add("--data_dir", default="data", metavar="DIR", help="downloads and caches (data)")
        add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="to run on (the best)")
        add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(bfloat16 on cuda)")
        add("--compile", action=argparse.BooleanOptionalAction, help="with torch.compile, Triton (on cuda)")
        add("--lengths", type=number(int, 1), nargs="+", metavar="N", help="tested (1 to 16 x trained one)")
        add("--window", type=number(int, 0), default=0, metavar="N", help="keys that a query sees, 0 for all")
        add("--logn", action=argparse.BooleanOptionalAction, default=False,
            help="queries times max(1, ln(place) / ln(trained length))")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def pick_device(args):
    """The torch.device and torch.dtype asked for; sets args.compile where it was left open."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best if args.device == "auto" else torch.device(args.device)
    if device.type not in ("cpu", best.type):
        raise UserError(f"--device {device}: torch finds none here; name {best} or auto")
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(args.dtype, args.dtype)
    if args.compile is None:
        args.compile = device.type == "cuda"
    return device, getattr(torch, dtype)


def pick_lengths(args, block_size, tokens, stride=None):
    """--lengths, or those that the split has room for. Raises UserError where one cannot be measured."""
    doubled = [block_size * 2 ** n for n in range(5)]
    lengths = sorted(set(args.lengths or [n for n in doubled if n < len(tokens)] or doubled[:1]))
    if max(lengths) >= len(tokens):
        raise UserError(f"length {max(lengths)} needs more than the {len(tokens)} tokens of the split")
    if stride and stride > min(lengths):
        raise UserError(f"--stride {stride} would skip targets at length {min(lengths)}: at most that")
    return lengths


def run(main):
    """Calls main; a user's mistake ends in one line on standard error and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in reason:
            reason += ": lower --batch_size and raise --grad_accum, in eval.py lower --batch_tokens"
        elif any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__):
            reason = f"cannot compile ({reason[:200]}): --no-compile does without"
        elif not isinstance(error, (UserError, ModelError, OSError, csv.Error)):
            raise
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
        sys.exit(2)


# runs that agree in these flags, the model and the text differ in their seeds, and are one row
RECIPE = "batch_size grad_accum max_iters learning_rate warmup_iters weight_decay grad_clip dtype".split()


def get_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT_OR_RUN_DIR", help="file, run's folder, or folder of runs")
    add("--data", metavar="NAME", help="corpus or folder (what the checkpoint was trained on)")
    add("--split", choices=("valid", "test"), default="valid", help="which text (valid)")
    add("--stride", type=number(int, 1), metavar="N", help="sliding windows that move on by N tokens")
    add("--extend", nargs="+", default=[], choices=EXTENSIONS, metavar="NAME",
        help=f"a further row for each of {', '.join(EXTENSIONS)}")
    add("--by_position", action="store_true", help="print loss against position in the window")
    add("--batch_tokens", type=number(int, 1), default=16384, metavar="N", help="tokens in a batch (16384)")
    add("--csv", metavar="FILE", help="write the table")
    add("--plot", metavar="FILE", help="draw the figure (needs matplotlib)")
    parser.set_defaults(window=None, logn=None)     # as in the checkpoint
    return parser.parse_args()


def main():
    args = get_args()
    device, dtype = pick_device(args)
    if args.plot:
        if not importlib.util.find_spec("matplotlib"):
            raise UserError("--plot needs matplotlib: pip install matplotlib")
        from matplotlib.backend_bases import FigureCanvasBase
        if Path(args.plot).suffix[1:].lower() not in ("", *FigureCanvasBase.filetypes):
            raise UserError(f"--plot {args.plot}: name a .png, .jpg, .svg or .pdf")
    if args.csv and Path(args.csv).suffix in (".pt", ".txt", ".tokens") and Path(args.csv).is_file():
        # --csv out/*/ckpt.pt
        raise UserError(f"{args.csv} is there, a checkpoint or a text: name a .csv to write")
    changes = {key: vars(args)[key] for key in ("window", "logn") if vars(args)[key] is not None}

    # all that can be wrong is found before the first measurement
    jobs, units = [], set()
    for path in dict.fromkeys(path for given in args.checkpoints for path in find_checkpoints(given)):
        checkpoint = load_checkpoint(path)
        data = args.data or checkpoint["args"]["data"]
        try:
            tokens = load_split(data, args.split, checkpoint["words"], args.data_dir)
        except UserError as error:
            raise UserError(f"{error}; choose the text for {path} with --data") from error
        lengths = pick_lengths(args, checkpoint["config"]["block_size"], tokens, args.stride)
        extensions = [ext for ext in args.extend if fits(GPTConfig(**checkpoint["config"]), ext)]
        jobs.append((path, data, tokens, lengths, extensions))
        units.add("word" if checkpoint["words"] else "byte")
    unit, *others = units
    if others:
        raise UserError("words and bytes do not compare: name checkpoints of one tokenizer")
    for extension in set(args.extend).difference(*(job[-1] for job in jobs)):
        raise UserError(f"--extend {extension} is for {', '.join(EXTENSIONS[extension][1])}, "
                        "trained without random positions: none of the checkpoints is")

    groups, copies = {}, Counter()
    for path, data, tokens, lengths, extensions in jobs:
        checkpoint = load_checkpoint(path)
        recipe = checkpoint["config"], [checkpoint["args"].get(flag) for flag in RECIPE], checkpoint["step"]
        seed = repr(checkpoint["args"].get("seed"))
        for extension in ["", *extensions]:
            model = build(checkpoint["config"], checkpoint["model"], **changes).to(device)
            model.fuses = args.compile
            run = measure(model, tokens, lengths, path, data, args.split, args.stride, extension,
                          args.by_position, dtype=dtype, batch_tokens=args.batch_tokens)
            same = repr((recipe, checkpoint["digest"], data, extension))
            copies[same, seed] += 1         # of one seed each has a row of its own
            groups.setdefault((same, copies[same, seed]), []).append(run)
    report(list(groups.values()), unit, args.csv)
    if args.plot:
        plot([average(runs) for runs in groups.values()], args.plot, unit)


if __name__ == "__main__":
    run(main)
