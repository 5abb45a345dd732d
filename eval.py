"""Loss and perplexity of trained checkpoints at many lengths: the table, the CSV, the figure.

    python eval.py out/quick --csv table.csv --plot figure.png
    python eval.py out/quick/rotary --extend interpolate ntk
    python eval.py out/quick/rotary --window 256 --stride 128 --lengths 256 512

Without --stride the text is cut into blocks; with it, windows of each length move on by that many tokens
and score what no window before them has. Either way every target (each token but the first) counts once,
at every length.
"""
import argparse
import glob
import math
import os
import sys
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, check, find_files, read_split, write_csv, write_whole
from model import EXTENSIONS, GPT, GPTConfig, fits


@torch.no_grad()
def evaluate(model, tokens, length, stride=None, dtype="float32", batch_tokens=16384):
    """(2, length): losses in nats summed and targets counted, by position in the window, over the whole text.

    Uses no randomness; leaves the model in training mode."""
    device = next(model.parameters()).device
    last, stride = len(tokens) - 1, stride or length        # the last token's index; as many targets
    starts = list(range(0, max(1, last - length + stride), stride))
    # the first window alone, since all of its targets count; of later ones the last `stride`
    size = max(1, batch_tokens // length)
    batches = [starts[:1]] + [starts[n:n + size] for n in range(1, len(starts), size)]
    sums = torch.zeros(2, length, dtype=torch.float64)
    model.eval()
    for batch in tqdm(batches, f"{model.config.pos} at {length}", leave=False, disable=None):
        index = torch.tensor(batch)[:, None] + torch.arange(length + 1)             # (B, T + 1)
        ids = tokens[index.clamp(max=last)].long().to(device)        # the last token fills a short window
        new = length if batch[0] == 0 else stride
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids[:, :-1], ids[:, -new:]).cpu().double()                 # (B, new)
        count = index[:, -new:] <= last
        sums[:, -new:] += torch.stack((loss * count, count)).sum(1)
    model.train()
    return sums


# ---- results: {(label, trained length): {length: [perplexity of each seed]}} ----------------------


def label_of(row):
    """How a CSV row's model is called: rotary + ntk + window 64."""
    parts = [row["pos"], row["extend"], "logn" * row["logn"]]
    parts += [f"{key} {row[key]}" for key in ("window", "random_positions") if row[key]]
    return " + ".join(filter(None, parts))


def verdict(trained, by_length):
    """holds, or from which length on it fails; nothing without the trained length and a longer one."""
    longer = [length for length in sorted(by_length) if length > trained]
    if not longer or trained not in by_length:
        return ""
    limit = 1.01 * np.mean(by_length[trained])
    fails = [length for length in longer if not np.mean(by_length[length]) <= limit < math.inf]
    return f"fails from {fails[0]}" if fails else "holds"


def cell(ppl):
    """The mean over seeds, and where there are several the standard deviation."""
    mean = np.mean(ppl)
    text = f"{mean:.2f}" if mean < 1e6 else f"{mean:.1e}"
    std = f" ± {np.std(ppl, ddof=1):.2f}" if len(ppl) > 1 else ""
    return "-" if math.isnan(mean) else text + std


def print_table(results, heading, verdicts=True):
    lengths = sorted({length for by_length in results.values() for length in by_length})
    wide = max(len(label) for label, _ in [("encoding", 0), *results])
    width = 2 + max(6, *(len(cell(ppl)) for by_length in results.values() for ppl in by_length.values()))
    print(f"{heading}\n{'encoding':{wide}} trained" + "".join(f"{length:{width}}" for length in lengths))
    for (label, trained), by_length in results.items():
        cells = [cell(by_length.get(length, [math.nan])).rjust(width) for length in lengths]
        end = verdict(trained, by_length) if verdicts else ""
        print(f"{label:{wide}} {trained:7}{''.join(cells)}  {end}".rstrip())
    if verdicts:
        print("fails: over 1% above the trained length's perplexity, or -, beyond the last position")


def plot(results, path, unit, by):
    """Like the paper's Figure 1: perplexity against length, one std over seeds, dashed the trained length."""
    os.environ["MPLBACKEND"] = "agg"        # which a file does not need, but matplotlib checks
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=by, ylabel=f"perplexity per {unit}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    # the legend has the lines in the order of their ends
    lines = sorted(results.items(), key=lambda line: -np.nan_to_num(np.mean(line[1][max(line[1])])))
    for (label, trained), by_length in lines:
        means = [np.mean(ppl) for ppl in by_length.values()]
        stds = [np.std(ppl, ddof=1) if len(ppl) > 1 else 0.0 for ppl in by_length.values()]
        axes.errorbar(list(by_length), means, stds, label=label.replace("$", r"\$"), marker="o", capsize=3)
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=150))


# ---- checkpoints ----------------------------------------------------------------------------------


def find_checkpoints(paths):
    """Each is a checkpoint, or a folder with ckpt.pt in it or below, also behind links."""
    found = []
    for path in paths:
        below = glob.glob(f"{glob.escape(path)}/**/ckpt.pt", recursive=True)
        found += map(Path, sorted(below) or [path])
    return {path.resolve(): path for path in found}.values()        # each once


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


def make_parser(doc, epilog=None):
    """A parser with the flags that both programs have."""
    raw, optional = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=doc, epilog=epilog, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--data_dir", default="data", metavar="DIR", help="downloads and caches (data)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="to run on (the best)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(bfloat16 on cuda)")
    add("--compile", action=optional, help="with torch.compile, Triton (on cuda)")
    add("--lengths", type=int, nargs="+", metavar="N", help="to test at (1 to 16 times the trained one)")
    add("--window", type=int, metavar="N", help="keys that a query sees; 0: all, in hwfa its own")
    add("--logn", action=optional, help="queries times max(1, ln(place + 1) / ln(trained length))")
    return parser


def get_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT_OR_RUN_DIR", help="file, run's folder, or folder of runs")
    add("--data", metavar="NAME", help="corpus or folder (what the checkpoint was trained on)")
    add("--split", choices=("valid", "test"), default="valid", help="which text (valid)")
    add("--stride", type=int, metavar="N", help="sliding windows that move on by N tokens")
    add("--extend", nargs="+", default=[], choices=EXTENSIONS, metavar="NAME", help=", ".join(EXTENSIONS))
    add("--by_position", action="store_true", help="by position in the window, not by length alone")
    add("--batch_tokens", type=int, default=16384, metavar="N", help="tokens in a batch (16384)")
    add("--csv", metavar="FILE", help="write the table")
    add("--plot", metavar="FILE", help="draw the figure (needs matplotlib)")
    return parser.parse_args(argv)


def pick_device(args):
    """Puts a choice where --device, --dtype or --compile left one open. Raises UserError."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found.type if found else "cpu"
    check(args.device in ("auto", "cpu", best), f"--device {args.device}: torch finds none here, but {best}")
    args.device = best if args.device == "auto" else args.device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.compile is None:
        args.compile = args.device == "cuda"


def pick_lengths(args, block_size, tokens, split, stride=1):
    """--lengths, or those that the text has room for. Raises UserError where one cannot be measured."""
    doubled = [block_size * 2 ** n for n in range(5)]
    lengths = sorted({*(args.lengths or [n for n in doubled if n < len(tokens)] or doubled[:1])})
    fit = 0 < stride <= lengths[0] and lengths[-1] < len(tokens)
    check(fit, f"--lengths {lengths}: from {stride} (--stride) on, below the {len(tokens)} tokens of {split}")
    return lengths


def measure(model, tokens, args, row):
    """Yields a CSV row for each length, or --by_position for each of its spans, which double."""
    for length in pick_lengths(args, model.config.block_size, tokens, args.split, args.stride or 1):
        if row["extend"]:
            EXTENSIONS[row["extend"]][0](model.pos, length)
        sums = torch.zeros(2, length)       # stays so beyond the last position: a loss of 0 / 0, no CSV row
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
    for path, extension in product(find_checkpoints(args.checkpoints), ["", *dict.fromkeys(args.extend)]):
        checkpoint, model = load_checkpoint(path, **changes)
        config, recipe = model.config, checkpoint["recipe"]
        if extension and not fits(config, extension):
            continue
        model.to(args.device)
        if args.compile:
            model.compile_parts()
        data = args.data or checkpoint["data"]
        files = find_files(data, [args.split], args.data_dir)
        words = recipe["words"]
        tokens = read_split(files[args.split], words)
        unknown = (tokens == words.index("<unk>")).double().mean() if words else 0.0
        units.add(f"word ({unknown:.1%} <unk>)" if words else "byte")
        row = dict(pos=config.pos, train_length=config.block_size, length=0, stride=args.stride,
                   split=args.split, tokens=0, loss=0.0, ppl=0.0, extend=extension, window=config.window,
                   logn=int(config.logn), random_positions=config.random_positions, seed=recipe["seed"],
                   checkpoint=str(path), data=data)

        # runs that differ only in their seed share a line; another recipe's of that name has its folder in it
        label = label_of(row)
        same = repr((label, config, recipe | {"seed": 0}, checkpoint["step"]))
        if same not in labels and (label, config.block_size) in labels.values():
            label += f" in {path.parent}"
        label, trained = labels.setdefault(same, (label, config.block_size))
        for measured in measure(model, tokens, args, row):
            line = f"{label} at {measured['length']}" if args.by_position else label
            column = measured["last" if args.by_position else "length"]
            results.setdefault((line, trained), {}).setdefault(column, []).append(measured["ppl"])
            rows.append(measured)

    unit = " or ".join(sorted(units))
    how = f"sliding by {args.stride}" if args.stride else "non-overlapping"
    by = "position in the window, up to" if args.by_position else "length in tokens"
    print_table(results, f"perplexity per {unit}, {args.split} split, {how}, by {by}", not args.by_position)
    if args.csv:
        write_csv(args.csv, [row for row in rows if row["tokens"]])
    if args.plot:
        plot(results, args.plot, unit, by)


def run(main):
    """Calls main; what a user can put right ends in one line on standard error and exit code 1."""
    # where it goes into a file, too, each line is there at once
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except (UserError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    run(main)
