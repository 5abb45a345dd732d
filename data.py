"""A corpus, by name or folder, as tensors of token ids: download, verify, tokenise, cache.

    corpus = load("wikitext-103", "word", "data")       # or "wikitext-2", "stdlib", or a folder
    corpus.train, corpus.valid, corpus.test             # (tokens,), one id each
    corpus.words                                        # the vocabulary by id, empty for bytes

Any text can be read under the vocabulary of a trained model: read_split(find_files(...)[split], words).
"""
import csv
import hashlib
import io
import os
import sysconfig
import urllib.request
import zipfile
from collections import Counter, namedtuple
from http.client import HTTPException
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

VERSION = 5     # of the tokenisers and the cache: raise it when what they write changes
SPLITS = ("train", "valid", "test")
Corpus = namedtuple("Corpus", "train valid test words")

# sha256 of NAME-v1.zip, from huggingface/datasets: datasets/wikitext/dataset_infos.json
SHA256 = {"wikitext-103": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
          "wikitext-2": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"}
MIRROR = "https://wikitext.smerity.com/"        # the original on S3 is gone


class UserError(Exception):
    """What a user can put right: one line that says what is wrong and what would be right."""


def check(condition, message):
    """Raises UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def write_whole(path, write):
    """Calls write(file) on a temporary file, which then replaces `path`: never a half-written one.

    A pipe, and what lies in /dev, /dev/stdout say, is written to as it is, after all that was printed."""
    path = Path(path)
    if path.is_relative_to("/dev") or path.exists() and not path.is_file():
        print(end="", flush=True)
        with open(path, "ab") as file:
            write(file)
        return
    path = path.resolve()       # the file, where it is a link
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(f"{path}.{os.getpid()}.tmp")      # two processes may write the same path
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_csv(path, rows):
    """Writes dicts with the same keys, which are the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def load(name, tokenizer, data_dir):
    """The Corpus called `name`, or in the folder `name`, tokenised once and cached. Raises UserError."""
    files = find_files(name, SPLITS, data_dir)
    stats = [(path.resolve(), path.stat().st_mtime_ns) for path in chain(*files.values())]
    key = hashlib.sha256(repr((VERSION, tokenizer, stats)).encode()).hexdigest()
    cache = Path(data_dir, "cache", f"{tokenizer}-{key[:16]}.pt")
    try:
        return Corpus(*torch.load(cache, mmap=True))
    except Exception:       # there is none, or it is damaged
        words = read_words(files["train"]) if tokenizer == "word" else []
        splits = [read_split(files[split], words) for split in SPLITS]
        write_whole(cache, lambda file: torch.save([*splits, words], file))
        return Corpus(*splits, words)


# ---- tokenisers -----------------------------------------------------------------------------------


def read_words(paths):
    """The words of a text, the most frequent first, ties in order of appearance; <unk> is always one."""
    counts = Counter(chain.from_iterable(read_lines(paths)))
    counts["<unk>"] += 0
    return [word for word, _ in counts.most_common()]


def read_split(paths, words):
    """(tokens,) ids of a text: bytes, or words of a vocabulary; a word that it lacks is <unk>."""
    if not words:
        return torch.from_numpy(np.concatenate([np.fromfile(path, np.uint8) for path in paths]))
    ids = {word: n for n, word in enumerate(words)}
    unk = ids["<unk>"]
    text = (ids.get(word, unk) for word in chain.from_iterable(read_lines(paths)))
    return torch.from_numpy(np.fromiter(text, np.int32))


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
    """The text files of the splits; WikiText is fetched where it is not there. Raises UserError."""
    if name == "stdlib":
        return stdlib_files()
    folder = Path(data_dir, name) if name in SHA256 else Path(name)
    for pattern in ("wiki.{}.tokens", "{}.txt"):
        files = {split: [folder / pattern.format(split)] for split in splits}       # one path a split
        missing = [path.name for [path] in files.values() if not path.is_file()]
        if not missing:
            return files
    if name in SHA256:
        fetch(name, folder)
        return find_files(name, splits, data_dir)
    raise UserError(f"no corpus {name}: it is neither wikitext-103, wikitext-2 nor stdlib, nor a folder that "
                    f"has {', '.join(missing)}")


def stdlib_files():
    """The running Python's own library: of each hundred files one is for validation, one for test."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(path for path in root.rglob("*.py") if skip.isdisjoint(path.relative_to(root).parts))
    train = [path for n, path in enumerate(files, 1) if n % 50]
    return {"train": train, "valid": files[49::100], "test": files[99::100]}


def fetch(name, folder):
    """Downloads, verifies and unpacks a zip; one put beside `folder` saves the download. Raises UserError."""
    archive = folder.with_name(f"{name}-v1.zip")
    try:
        content = archive.read_bytes() if archive.exists() else download(MIRROR + archive.name)
    except (OSError, HTTPException) as error:
        raise UserError(f"no {archive.name} from {MIRROR} ({error}): put it into {folder.parent}") from error
    check(hashlib.sha256(content).hexdigest() == SHA256[name], f"{archive.name} is damaged: get it again")
    for split in SPLITS:
        text = zipfile.ZipFile(io.BytesIO(content)).read(f"{name}/wiki.{split}.tokens")
        write_whole(folder / f"wiki.{split}.tokens", lambda file: file.write(text))


def download(url):
    """Its bytes. Raises OSError, HTTPException."""
    print(f"downloading {url}")
    # the mirror refuses urllib's own User-Agent
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    return urllib.request.urlopen(request, timeout=30).read()
