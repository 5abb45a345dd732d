"""Loss and perplexity of trained checkpoints at many lengths: the table, the CSV, the figure.

    python eval.py out/quick --csv table.csv --plot figure.png
    python eval.py out/quick/rotary --extend interpolate ntk
    python eval.py out/quick/rotary --window 64 --stride 32 --lengths 64 128

Without --stride the text is cut into blocks; with it, windows of each length move on by that many tokens
and score what no window before them has. Either way every target (each token but the first) counts once,
at every length.
"""
import argparse
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, load_split, write_csv, write_whole
from model import EXTENSIONS, GPT, GPTConfig, fits


@torch.no_grad()
def evaluate(model, tokens, length, stride=None, dtype="float32", batch_tokens=16384):
    """(2, length): losses in nats summed and targets counted, by position in the window, over the whole text.

    Uses no randomness; leaves the model in training mode."""
    device = next(model.parameters()).device
    targets, stride = len(tokens) - 1, stride or length
    starts = list(range(0, max(1, targets - length + stride), stride))
    # the first window alone, since all of its targets count; of later ones the last `stride`
    size = max(1, batch_tokens // length)
    batches = [starts[:1]] + [starts[n:n + size] for n in range(1, len(starts), size)]
    sums = torch.zeros(2, length, dtype=torch.float64)
    model.eval()
    for batch in tqdm(batches, f"{model.config.pos} at {length}", leave=False, disable=None):
        place = torch.tensor(batch)[:, None] + torch.arange(length + 1)             # (B, T + 1)
        ids = tokens[place.clamp(max=targets)].long().to(device)        # the last token fills a short window
        new = length if batch[0] == 0 else stride
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids[:, :-1], ids[:, -new:]).cpu().double()                 # (B, new)
        count = place[:, -new:] <= targets
        sums[:, -new:] += torch.stack((loss * count, count)).sum(1)
    model.train()
    return sums


# ---- results: {(label, trained length): {length: [perplexity of each seed]}} ----------------------


def name(row):
    """How a CSV row's model is called: rotary + ntk + window 64."""
    parts = [row["pos"], row["extend"], "logn" * row["logn"]]
    parts += [f"{key} {row[key]}" for key in ("window", "random_positions") if row[key]]
    return " + ".join(filter(None, parts))


def mean_std(ppl):
    return np.mean(ppl), np.std(ppl, ddof=1) if len(ppl) > 1 else 0.0


def verdict(trained, by_length):
    """holds, or from which length on it fails; nothing without the trained length and a longer one."""
    longer = sorted(length for length in by_length if length > trained)
    if not longer or trained not in by_length:
        return ""
    limit = 1.01 * np.mean(by_length[trained])
    for length in longer:
        if not np.mean(by_length[length]) <= limit < math.inf:
            return f"fails from {length}"
    return "holds"


def cell(ppl):
    """The mean over seeds, and where there are several the standard deviation."""
    mean, std = mean_std(ppl)
    text = f"{mean:.2f}" if mean < 1e6 else f"{mean:.1e}"
    if len(ppl) > 1:
        text += f" ± {std:.2f}"
    return "-" if math.isnan(mean) else text


def print_table(results, heading):
    lengths = sorted({length for by_length in results.values() for length in by_length})
    wide = max(len(label) for label, _ in results)
    size = 2 + max(len(cell(ppl)) for by_length in results.values() for ppl in by_length.values())
    print(heading)
    print(f"{'encoding':{wide}} trained" + "".join(f"{length:{size}}" for length in lengths))
    for (label, trained), by_length in results.items():
        cells = [cell(by_length.get(length, [math.nan])) for length in lengths]
        line = f"{label:{wide}} {trained:7}" + "".join(text.rjust(size) for text in cells)
        print(f"{line}  {verdict(trained, by_length)}")
    print("fails: more than 1% above the perplexity at the trained length, or - where the encoding's end is")


def plot(results, path, unit):
    """Like the paper's Figure 1: perplexity against length, with the standard deviation over seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="length in tokens (dashed: trained)",
                              ylabel=f"perplexity per {unit}")
    def end(line):
        means = [np.mean(ppl) for ppl in line[1].values()]
        return [x for x in means if not math.isnan(x)][-1:]

    # the legend has the lines in the order of their ends
    for (label, trained), by_length in sorted(results.items(), key=end, reverse=True):
        means, stds = zip(*map(mean_std, by_length.values()))
        axes.errorbar(list(by_length), means, stds, label=label, marker="o", capsize=3)
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
    axes.legend()
    axes.xaxis.set_major_formatter("{x:g}")
    write_whole(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=150))


# ---- checkpoints ----------------------------------------------------------------------------------


def find_checkpoints(paths):
    """Each is a file, or a folder with ckpt.pt in it or below. Raises UserError."""
    found = []
    for path in map(Path, paths):
        below = [Path(folder, "ckpt.pt") for folder, _, files in os.walk(path) if "ckpt.pt" in files]
        if not path.is_file() and not below:
            raise UserError(f"no ckpt.pt in {path}: name a checkpoint, a run's folder, or a folder of runs")
        found += sorted(below) or [path]
    return list(dict.fromkeys(found))


def load_checkpoint(path, **changes):
    """What train.py saved, and its model, with these fields of the config changed. Raises UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**checkpoint["config"] | changes))
        model.load_state_dict(checkpoint["model"])
    except Exception as error:      # whatever a foreign or damaged file leads to
        raise UserError(f"{path} is no checkpoint of train.py ({error!r:.90})") from error
    return checkpoint, model


# ---- the command line -----------------------------------------------------------------------------


def common_flags():
    """A parser for the flags that train.py has as well."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--data_dir", default="data", metavar="DIR", help="downloads and caches (data)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="to run on (the best)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(bfloat16 on cuda)")
    add("--compile", action=argparse.BooleanOptionalAction, help="with torch.compile, Triton (on cuda)")
    add("--lengths", type=int, nargs="+", metavar="N", help="to test at (1 to 16 times the trained one)")
    add("--window", type=int, metavar="N", help="keys that a query sees, 0 for all")
    add("--logn", action=argparse.BooleanOptionalAction,
        help="queries times max(1, ln(place) / ln(trained length))")
    return parser


def pick_device(args):
    """Puts a choice where --device, --dtype or --compile left one open. Raises UserError."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best if args.device == "auto" else torch.device(args.device)
    if device.type not in ("cpu", best.type):
        raise UserError(f"--device {device}: torch finds none here; name {best} or auto")
    args.device = device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if args.compile is None:
        args.compile = device.type == "cuda"


def pick_lengths(args, block_size, tokens, split, stride=1):
    """--lengths, or those that the text has room for. Raises UserError where one cannot be measured."""
    doubled = [block_size * 2 ** n for n in range(5)]
    lengths = sorted(args.lengths or [n for n in doubled if n < len(tokens)] or doubled[:1])
    if lengths[0] < stride or lengths[-1] >= len(tokens):
        raise UserError(f"--lengths {lengths}: none may be below --stride, here {stride}, "
                        f"or reach the {len(tokens)} tokens of the {split} split")
    return lengths


def run(main):
    """Calls main; what a user can put right ends in one line on standard error and exit code 2."""
    try:
        main()
    except (UserError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, parents=[common_flags()], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT_OR_RUN_DIR", help="file, run's folder, or folder of runs")
    add("--data", metavar="NAME", help="corpus or folder (what the checkpoint was trained on)")
    add("--split", choices=("valid", "test"), default="valid", help="which text (valid)")
    add("--stride", type=int, metavar="N", help="sliding windows that move on by N tokens")
    add("--extend", nargs="+", default=[], choices=EXTENSIONS, metavar="NAME",
        help=f"a further row for each of {', '.join(EXTENSIONS)} that fits the encoding")
    add("--by_position", action="store_true", help="loss against position in the window; --csv has it, too")
    add("--batch_tokens", type=int, default=16384, metavar="N", help="tokens in a batch (16384)")
    add("--csv", metavar="FILE", help="write the table")
    add("--plot", metavar="FILE", help="draw the figure (needs matplotlib)")
    return parser.parse_args(argv)


def measure(model, tokens, args, row):
    """Yields CSV rows of one model: one a length, or --by_position one for each span, of doubling size."""
    for length in pick_lengths(args, model.config.block_size, tokens, args.split, args.stride or 1):
        if row["extend"]:
            extend, _ = EXTENSIONS[row["extend"]]
            extend(model.pos, length)
        sums = torch.full((2, length), math.nan)        # beyond the encoding's end
        if length <= model.pos.max_length:
            sums = evaluate(model, tokens, length, args.stride, args.dtype, args.batch_tokens)
        inner = [2 ** n for n in range((length - 1).bit_length())] if args.by_position else []
        for first, last in pairwise([0, *inner, length]):
            total, count = sums[:, first:last].sum(1)
            loss = total / count
            span = dict(first=first + 1, last=last) if args.by_position else {}
            yield row | dict(length=length, tokens=int(count), loss=loss.item(), ppl=loss.exp().item()) | span


def main(args=None):
    args = args or get_args()
    pick_device(args)
    changes = {flag: vars(args)[flag] for flag in ("window", "logn") if vars(args)[flag] is not None}
    results, labels, rows, units = {}, {}, [], set()
    for path in find_checkpoints(args.checkpoints):
        for extension in ["", *dict.fromkeys(args.extend)]:
            checkpoint, model = load_checkpoint(path, **changes)
            config, recipe = model.config, checkpoint["recipe"]
            if extension and not fits(config, extension):
                continue
            model.to(args.device)
            if args.compile:
                model.compile()
            data = args.data or checkpoint["data"]
            tokens = load_split(data, args.split, recipe["words"], args.data_dir)
            units.add("word" if recipe["words"] else "byte")
            row = dict(pos=config.pos, train_length=config.block_size, length=0, stride=args.stride,
                       split=args.split, tokens=0, loss=0.0, ppl=0.0, extend=extension, window=config.window,
                       logn=int(config.logn), random_positions=config.random_positions,
                       seed=recipe["seed"], checkpoint=str(path), data=data)

            # runs that differ in nothing but their seed share a label, another recipe has its folder in it
            label = name(row)
            recipe = repr((label, config, recipe | {"seed": 0}, checkpoint["step"]))
            if recipe not in labels and (label, config.block_size) in labels.values():
                label += f" in {path.parent}"
            label, trained = labels.setdefault(recipe, (label, config.block_size))
            for measured in measure(model, tokens, args, row):
                line = f"{label} at {measured['length']}" if args.by_position else label
                by_length = results.setdefault((line, trained), {})
                by_length.setdefault(measured.get("last", measured["length"]), []).append(measured["ppl"])
                rows.append(measured)

    unit = " or ".join(sorted(units))
    protocol = f"sliding by {args.stride}" if args.stride else "non-overlapping"
    columns = "position in the window, up to" if args.by_position else "length in tokens"
    print_table(results, f"perplexity per {unit}, {args.split} split, {protocol}, by {columns}")
    if args.csv:
        write_csv(args.csv, [row for row in rows if not math.isnan(row["loss"])])
    if args.plot:
        plot(results, args.plot, unit)


if __name__ == "__main__":
    run(main)
