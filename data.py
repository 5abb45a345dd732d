"""A corpus, by name or folder, as arrays of token ids: download, verify, tokenise, cache.

    corpus = load("wikitext-103", "word", "data")       # or "wikitext-2", "stdlib", or a folder
    corpus.train, corpus.valid, corpus.test             # one id a token; from the cache memory-mapped

A cache belongs to its source files (path, size, time) and this version of the tokenisers; others are rebuilt.
"""
import csv
import functools
import hashlib
import io
import os
import shutil
import sysconfig
import urllib.request
import zipfile
from collections import Counter, namedtuple
from contextlib import suppress
from http.client import HTTPException
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

VERSION = 3     # of the tokenisers and the cache: raise it when what they write changes
SPLITS = ("train", "valid", "test")
# bytes and sha256 of NAME-v1.zip, from huggingface/datasets: datasets/wikitext/dataset_infos.json
ZIPS = {"wikitext-103": (190229076, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"),
        "wikitext-2": (4475746, "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c")}
MIRROR = "https://wikitext.smerity.com/"    # it refuses urllib's own User-Agent; the original on S3 is gone
TIMEOUT = 30                                # seconds of silence before a download is given up

# words: the vocabulary by id, empty for bytes; digest: what tells one training text from another
Corpus = namedtuple("Corpus", [*SPLITS, "words", "digest"])


class UserError(Exception):
    """What a user can put right: one line that says what is wrong and what would be right."""


def write_whole(path, write, mode="wb"):
    """Calls write(file) on a file beside, which then takes the place of `path`: never a half-written one.

    A pipe, a device or /dev/stdout is written to as it is. Raises UserError where it cannot be written."""
    path, target = Path(path), os.path.realpath(path)      # through links
    beside = Path(f"{target}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # standard output may be a file: its own descriptor knows how far it is
        stdout = str(path) in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
        opened = 1 if stdout else path if path.exists() and not path.is_file() else beside
        text = {} if "b" in mode else dict(encoding="utf-8", errors="surrogateescape")     # any path
        with open(opened, mode, closefd=not stdout, **text) as file:
            write(file)
        if beside.exists():
            os.replace(beside, target)
    except (OSError, RuntimeError, ValueError) as error:    # as torch or matplotlib have it
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot write {path} ({reason}): "
                        "make room, or name another file or folder") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def write_csv(path, header, rows):
    write_whole(path, lambda file: csv.writer(file, lineterminator="\n").writerows([header, *rows]), "w")


def load_whole(path, **options):
    """What torch.save wrote: plain data, no code. Raises whatever a damaged file or a zip bomb leads to."""
    with zipfile.ZipFile(path) as members:
        if any(info.compress_type for info in members.infolist()) or members.testzip():
            raise ValueError("it is damaged, or compressed")
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def load(name, tokenizer, data_dir):
    """The Corpus called `name`, or in the folder `name`, tokenised once and cached. Raises UserError."""
    files = find_files(name, SPLITS, data_dir)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in chain(*files.values())]
    key = hashlib.sha256(repr((VERSION, tokenizer, stats)).encode()).hexdigest()[:16]
    cache = Path(data_dir, "cache", f"{Path(name).resolve().name}-{tokenizer}-{key}.pt")
    with suppress(Exception):       # where there is none, or a damaged one
        *splits, words, digest = load_whole(cache, mmap=True)
        return Corpus(*splits, words.split(), digest)
    words = [] if tokenizer == "byte" else read_words(files["train"])
    splits = [read_split(files[split], words) for split in SPLITS]
    if empty := [split for split, ids in zip(SPLITS, splits) if not len(ids)]:
        raise UserError(f"the {empty[0]} split of {name} is empty: every split needs text")
    digest = hashlib.sha256(splits[0].numpy())
    digest.update(" ".join(words).encode())
    corpus = Corpus(*splits, words, digest.hexdigest())
    write_whole(cache, lambda file: torch.save([*splits, " ".join(words), corpus.digest], file))
    return corpus


def load_split(name, split, words, data_dir):
    """(T,) the ids of one split under a given vocabulary: any text for a trained model. Raises UserError."""
    return read_split(find_files(name, [split], data_dir)[split], words)


# ---- tokenisers -----------------------------------------------------------------------------------


def read_words(paths):
    """The words of a text, the most frequent first, ties in order of appearance; <unk> is always one."""
    counts = Counter(chain.from_iterable(read_lines(paths)))
    counts["<unk>"] += 0
    return [word for word, _ in counts.most_common()]


def read_split(paths, words):
    """(T,) the ids of a text: bytes, or words of the vocabulary; a word that it lacks is <unk>."""
    if not words:
        return torch.from_numpy(np.frombuffer(bytearray().join(map(Path.read_bytes, paths)), np.uint8))
    ids = {word: n for n, word in enumerate(words)}
    unk, text = ids["<unk>"], chain.from_iterable(read_lines(paths))
    return torch.from_numpy(np.fromiter((ids.get(word, unk) for word in text), np.int32))


def read_lines(paths):
    """Yields each line's words and <eos>: fairseq's reading of WikiText. Raises UserError."""
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="\n") as file:
                for line in tqdm(file, path.name, unit=" lines", leave=False, disable=None):
                    yield line.split() + ["<eos>"]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}): try --tokenizer byte") from error


# ---- where the text comes from: {split: [path, ...]} ----------------------------------------------


def find_files(name, splits, data_dir):
    """The text files of the splits; WikiText is fetched first. Raises UserError."""
    if name == "stdlib":
        return stdlib_files()
    folder = Path(data_dir, name) if name in ZIPS else Path(name)
    if name in ZIPS and not all((folder / f"wiki.{split}.tokens").exists() for split in SPLITS):
        fetch(name, folder)
    if not folder.is_dir():
        raise UserError(f"no corpus '{name}': it is one of {', '.join(ZIPS)}, stdlib, or a folder")
    for pattern in ("wiki.{}.tokens", "{}.txt"):
        files = {split: [folder / pattern.format(split)] for split in splits}
        if all(path.is_file() for [path] in files.values()):
            return files
    wanted = ",".join(splits)
    raise UserError(f"{folder} must hold wiki.{{{wanted}}}.tokens or {{{wanted}}}.txt")


@functools.cache      # to walk through it takes a second
def stdlib_files():
    """The running Python's own library: of each hundred files one is for validation, one for test."""
    root, skip = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages", "test", "tests"}
    train = sorted(path for path in root.rglob("*.py") if not skip.intersection(path.relative_to(root).parts))
    valid, test = train[49::100], train[99::100]
    return {"train": [path for path in train if path not in valid + test], "valid": valid, "test": test}


def fetch(name, folder):
    """Downloads, verifies and unpacks a zip; one put beside `folder` saves the download. Raises UserError."""
    archive, content = folder.with_name(f"{name}-v1.zip"), io.BytesIO()
    source = archive.resolve().as_uri() if archive.exists() else MIRROR + archive.name
    request = urllib.request.Request(source, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with (urllib.request.urlopen(request, timeout=TIMEOUT) as file,
              tqdm.wrapattr(file, "read", ZIPS[name][0], desc=archive.name, disable=None) as stream):
            shutil.copyfileobj(stream, content)
        found = len(content.getvalue()), hashlib.sha256(content.getvalue()).hexdigest()
        if found != ZIPS[name]:
            raise ValueError(f"size and sha256 are {found}, not {ZIPS[name]}")
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"cannot take {name} from {source} ({error}): put the real {archive.name} into "
                        f"{folder.parent.resolve()}, or use --data stdlib") from error
    for split in SPLITS:
        text = zipfile.ZipFile(content).read(f"{name}/wiki.{split}.tokens")
        write_whole(folder / f"wiki.{split}.tokens", lambda file: file.write(text))
