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
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, check, find_files, read_split, write_csv, write_whole
from model import EXTENSIONS, GPT, GPTConfig


@torch.no_grad()
def evaluate(model, tokens, length, stride=None, dtype="float32", batch_tokens=16384):
    """(2, length): losses in nats summed and targets counted, by position in the window, over the whole text.

    Uses no randomness. Leaves the model in training mode, as train.py needs it."""
    device = next(model.parameters()).device
    stride = stride or length
    last = len(tokens) - 1
    starts = range(0, max(1, last - length + stride), stride)
    # the first window alone, since all of its targets count; of later ones the last `stride`
    windows = max(1, batch_tokens // length)
    later = [starts[n:n + windows] for n in range(1, len(starts), windows)]
    sums = torch.zeros(2, length, dtype=torch.float64)
    model.eval()
    for batch in tqdm([starts[:1], *later], f"{model.config.pos} at {length}", leave=False, disable=None):
        index = torch.tensor(batch)[:, None] + torch.arange(length + 1)             # (B, T + 1)
        ids = tokens[index.clamp(max=last)].long().to(device)    # the last token fills a short window
        new = length if batch[0] == 0 else stride
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids[:, :-1], ids[:, -new:]).cpu().double()                 # (B, new)
        count = index[:, -new:] <= last
        sums[:, -new:] += torch.stack((loss * count, count)).sum(1)
    model.train()
    return sums


# ---- checkpoints ----------------------------------------------------------------------------------


def find_checkpoints(paths):
    """Each is a checkpoint, or a folder with ckpt.pt in it or below, also behind links. Raises UserError."""
    found = {}
    for path in map(Path, paths):
        below = glob.glob(f"{glob.escape(str(path))}/**/ckpt.pt", recursive=True)
        check(below or not path.is_dir(), f"no ckpt.pt in {path} or below")
        for file in map(Path, sorted(below) or [path]):
            found.setdefault(file.resolve(), file)      # each once
    return list(found.values())


def load_checkpoint(path, **changes):
    """Settings, vocabulary and model, with fields of the config changed unless None. Raises UserError."""
    changes = {field: value for field, value in changes.items() if value is not None}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint["config"] | checkpoint["recipe"] | {"step": checkpoint["step"]}
        model = GPT(GPTConfig(**checkpoint["config"] | changes))
        model.load_state_dict(checkpoint["model"])
        return settings, checkpoint["words"], model
    except Exception as error:      # whatever a foreign, older or damaged file leads to
        last = str(error).strip().rpartition("\n")[2].strip()
        raise UserError(f"{path} is no checkpoint of train.py ({type(error).__name__}: {last})") from error


def read_run(path, args):
    """All that tells a run from others, its model, the tokens to test it on. Raises UserError, OSError."""
    settings, words, model = load_checkpoint(path, window=args.window, logn=args.logn)
    data = args.data or settings["data"]
    files = find_files(data, [args.split], args.data_dir)
    tokens = read_split(files[args.split], words)
    unit = "byte"
    if words:
        unknown = (tokens == words.index("<unk>")).double().mean()
        unit = f"word ({unknown:.1%} <unk>)"
    return settings | {"checkpoint": str(path), "text": f"{unit} of {data}"}, model, tokens


# ---- measuring ------------------------------------------------------------------------------------


def measure(settings, model, tokens, extension, args):
    """Yields a CSV row for each length, or --by_position for each of its spans, which double.

    Of an extension that does not fit the model it yields none."""
    config = model.config
    if extension:
        extend, encodings = EXTENSIONS[extension]
        if config.pos not in encodings or config.random_positions:
            print(f"{settings['checkpoint']} takes no {extension}", file=sys.stderr)
            return
    for length in pick_lengths(args, config.block_size, tokens):
        if extension:
            extend(model.pos, length)
        sums = torch.zeros(2, length)       # where the encoding has ended a loss is 0 / 0, shown as -
        if length <= model.pos.max_length:
            sums = evaluate(model, tokens, length, args.stride, args.dtype, args.batch_tokens)
        doubled = [2 ** n for n in range((length - 1).bit_length())] if args.by_position else []
        for first, last in pairwise([0, *doubled, length]):
            total, count = sums[:, first:last].sum(1)
            loss = total / count
            row = dict(     # the CSV's columns
                pos=config.pos, train_length=config.block_size, length=length, stride=args.stride,
                split=args.split, tokens=int(count), loss=loss.item(), ppl=loss.exp().item(),
                extend=extension, window=config.window, logn=int(config.logn),
                random_positions=config.random_positions, seed=settings["seed"],
                checkpoint=settings["checkpoint"], data=args.data or settings["data"])
            if args.by_position:
                row |= dict(first=first + 1, last=last)
            yield row


def pick_lengths(args, block_size, tokens):
    """--lengths, or those that the text has room for. Raises UserError where one cannot be measured."""
    doubled = [block_size * 2 ** n for n in range(5)]
    fit = [length for length in doubled if length < len(tokens)]
    lengths = sorted(set(args.lengths or fit or doubled[:1]))
    shortest, longest = lengths[0], lengths[-1]
    check(longest < len(tokens), f"{args.split} has {len(tokens)} tokens, too few for a length of {longest}")
    check((args.stride or 1) <= shortest, f"--stride {args.stride} is above {shortest}, one of --lengths")
    return lengths


# ---- results: {(label, trained length): {length: [perplexity of each seed]}} ----------------------


def group(measured):
    """The results of [(settings, row)]: a label names each setting in which the runs differ, but the seed."""
    results = {}
    same = set.intersection(*(set(settings.items()) for settings, _ in measured))
    for settings, row in measured:
        label = label_of(row)
        # seed, path, and what label_of names are in the row
        for key, value in sorted(settings.items() - same - row.items()):
            if key not in ("block_size", "vocab_size"):     # a column of its own; the text's
                label += f", {key} {value}"
        if "last" in row:       # --by_position
            label += f" at {row['length']}"
        column = row.get("last", row["length"])
        by_length = results.setdefault((label, row["train_length"]), {})
        by_length.setdefault(column, []).append(row["ppl"])
    return results


def label_of(row):
    """How a CSV row's model is called: rotary + ntk + window 64."""
    parts = [row["pos"], row["extend"], "logn" if row["logn"] else ""]
    parts += [f"{key} {row[key]}" for key in ("window", "random_positions") if row[key]]
    return " + ".join(filter(None, parts))


def verdict(trained, by_length):
    """holds, or from which length on it fails; nothing without the trained length and a longer one."""
    longer = [length for length in sorted(by_length) if length > trained]
    if not longer or trained not in by_length:
        return ""
    limit = 1.01 * np.mean(by_length[trained])
    for length in longer:
        if not np.mean(by_length[length]) <= limit:     # which nan is not either
            return f"fails from {length}"
    return "holds"


def cell(ppl):
    """The mean over seeds, and where there are several the standard deviation."""
    mean = np.mean(ppl)
    if np.isnan(mean):
        return "-"
    return f"{mean:.2f} ± {np.std(ppl, ddof=1):.2f}" if len(ppl) > 1 else f"{mean:.2f}"


def print_table(results, heading, verdicts):
    """A line for each label, a column for each length."""
    lengths = sorted({length for by_length in results.values() for length in by_length})
    lines = [["encoding", "trained", *map(str, lengths), ""]]
    for (label, trained), by_length in results.items():
        cells = [cell(by_length[length]) if length in by_length else "" for length in lengths]
        end = verdict(trained, by_length) if verdicts else ""
        lines.append([label, str(trained), *cells, end])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(heading)
    for label, *cells, end in lines:
        cells = map(str.rjust, cells, widths[1:])
        line = "  ".join([label.ljust(widths[0]), *cells, end])
        print(line.rstrip())
    if verdicts:
        print("fails: over 1% above the trained length's perplexity, or -, beyond the last position")


def new_figure(path):
    """matplotlib's. Raises ImportError, and UserError where it could not be saved at path."""
    from matplotlib.figure import Figure
    check(Path(path).suffix in (".png", ".pdf", ".svg"), f"--plot {path}: .png, .pdf or .svg, by its name")
    return Figure(figsize=(7, 5), layout="constrained")


def plot(figure, path, results, title, by):
    """Like the paper's Figure 1: perplexity against length, one std over seeds, dashed the trained length."""
    axes = figure.add_subplot(title=title, xlabel=by, ylabel="perplexity")
    axes.loglog(base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    for (label, trained), by_length in results.items():
        means = [np.mean(ppl) for ppl in by_length.values()]
        stds = [np.std(ppl, ddof=min(1, len(ppl) - 1)) for ppl in by_length.values()]
        axes.errorbar([*by_length], means, stds, label=label, marker="o", capsize=3)
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:], dpi=150))


# ---- the command line -----------------------------------------------------------------------------


def bounded(kind, least, below=np.inf):
    """An argparse type: an int or float that is at least `least` and less than `below`."""
    def number(text):       # argparse shows this name where kind(text) fails
        value = kind(text)
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")
        return value
    return number


positive = bounded(int, 1)


def make_parser(doc, epilog=None):
    """A parser with the flags that both programs have."""
    parser = argparse.ArgumentParser(description=doc, epilog=epilog, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", default="data", help="downloads and caches (data)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(the best there is)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(on cuda bfloat16)")
    add("--compile", action=argparse.BooleanOptionalAction, help="with torch.compile (on cuda)")
    add("--lengths", type=positive, nargs="+", help="to test at (1 to 16 times the trained one)")
    add("--window", type=bounded(int, 0), help="keys a query sees; 0: all, or what rnope and hwfa choose")
    add("--logn", action=argparse.BooleanOptionalAction,
        help="queries times max(1, ln(place + 1) / ln(trained length))")
    return parser


def get_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT_OR_RUN_DIR", help="file, run's folder, or folder of runs")
    add("--data", help="corpus or folder (what the checkpoint was trained on)")
    add("--split", choices=("valid", "test"), default="valid", help="which text (valid)")
    add("--stride", type=positive, help="sliding windows that move on by so many tokens")
    add("--extend", nargs="+", default=[], choices=EXTENSIONS, help="at test time")
    add("--by_position", action="store_true", help="by position in the window, not by length alone")
    add("--batch_tokens", type=positive, default=16384, help="tokens in a batch (16384)")
    add("--csv", help="write the table")
    add("--plot", help="draw the figure (needs matplotlib)")
    return parser.parse_args(argv)


def pick_device(args):
    """Puts a choice where --device, --dtype or --compile left one open. Raises UserError."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found.type if found else "cpu"
    check(args.device in ("auto", "cpu", best), f"--device {args.device}: torch finds only {best} here")
    if args.device == "auto":
        args.device = best
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.compile is None:
        args.compile = args.device == "cuda"


def compare(args):
    """Measures and shows what can be measured, with a line on stderr for the rest, whose paths it returns."""
    pick_device(args)
    figure = new_figure(args.plot) if args.plot else None       # what it lacks is told before the measuring
    paths = find_checkpoints(args.checkpoints)
    measured, left_out = [], set(paths)
    for path in paths:
        try:
            for extension in ["", *args.extend]:
                settings, model, tokens = read_run(path, args)
                model.to(args.device)
                if args.compile:
                    model.compile_parts()
                for row in measure(settings, model, tokens, extension, args):
                    measured.append((settings, row))
            left_out.remove(path)
        except (UserError, OSError, RuntimeError) as error:
            print(f"left out: {path}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(f"stopped at {path}", file=sys.stderr)
            break
    if not measured:
        return left_out

    texts = " or ".join(sorted({settings["text"] for settings, _ in measured}))
    how = f"sliding by {args.stride}" if args.stride else "non-overlapping"
    by = "position in the window, up to" if args.by_position else "length in tokens"
    heading = f"perplexity per {texts}, {args.split} split, {how}"
    results = group(measured)
    print_table(results, f"{heading}, by {by}", not args.by_position)
    if args.csv:
        write_csv(args.csv, [row for _, row in measured if row["tokens"]])
    if figure:
        plot(figure, args.plot, results, heading, by)
    return left_out


def main():
    left_out = compare(get_args())
    check(not left_out, f"{len(left_out)} of the checkpoints could not be measured at every length")


def guarded(program):
    """Calls it; what a user can put right, and Ctrl-C, end in one line on standard error and exit code 1."""
    try:
        program()
    except KeyboardInterrupt:
        sys.exit("stopped: train.py --resume goes on from the last checkpoint, if there is one")
    except (UserError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    guarded(main)
