"""A corpus, by name or folder, as arrays of token ids: download, verify, tokenise, cache.

    corpus = load("wikitext-103", "word", "data")      # or "wikitext-2", "stdlib", or a folder of three text files
    corpus.train, corpus.valid, corpus.test            # memory-mapped, one id a token

A cache belongs to its source files (path, size, time) and this version of the tokenisers; any other is rebuilt.
"""
import hashlib
import json
import os
import sysconfig
import urllib.request
import zipfile
from collections import defaultdict, namedtuple
from difflib import get_close_matches
from http.client import HTTPException
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

VERSION = 1     # of the tokenisers: raise it when their output changes
SPLITS = ("train", "valid", "test")
# bytes and sha256 of NAME-v1.zip, from huggingface/datasets: datasets/wikitext/dataset_infos.json
ZIPS = {"wikitext-103": (190229076, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"),
        "wikitext-2": (4475746, "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c")}
NAMES = (*ZIPS, "stdlib")
MIRRORS = ("https://wikitext.smerity.com/", "https://s3.amazonaws.com/research.metamind.io/wikitext/")
TIMEOUT = 30    # seconds of silence before the next mirror's turn

# vocab_id is a digest of the vocabulary: a model fits a corpus where it is equal; unit is "word" or "byte"
Corpus = namedtuple("Corpus", [*SPLITS, "vocab_size", "vocab_id", "unit"])


class UserError(Exception):
    """A mistake its user can mend: one line that says what is wrong and what would be right."""


def nearest(name, names):
    """'' or a hint at the name that was probably meant."""
    return "".join(f"did you mean {near}? " for near in get_close_matches(name, names, 1, 0.4))


def write_whole(path, write, mode="wb"):
    """Calls write(file) for a file that takes its place at `path` when whole: an error or a kill leaves the old one."""
    beside = Path(f"{path}.tmp")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, mode) as file:
            write(file)
        os.replace(beside, path)
    except (OSError, RuntimeError, ValueError) as error:    # as torch or matplotlib have it
        if beside.exists():
            beside.unlink()
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot write {path} ({reason}): make room or name another file or folder") from error


def load(name, tokenizer, data_dir):
    """The Corpus called `name`, or in the folder `name`, tokenised once and cached. Raises UserError."""
    files = stdlib_files() if name == "stdlib" else corpus_files(name, Path(data_dir))
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for split in SPLITS for path in files[split]]
    key = hashlib.sha256(repr((VERSION, tokenizer, stats)).encode()).hexdigest()[:16]
    cache = Path(data_dir, "cache", f"{Path(name).resolve().name}-{tokenizer}-{key}.npy")
    if corpus := open_cache(cache, tokenizer):
        return corpus
    words, splits = (read_bytes if tokenizer == "byte" else read_words)(files)
    if empty := [split for split, ids in zip(SPLITS, splits) if not len(ids)]:
        raise UserError(f"the {empty[0]} split of {name} is empty: every split needs text")
    vocab_id = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    meta = [len(ids) for ids in splits], str(splits[0].dtype), len(words), vocab_id
    write_whole(cache, lambda file: np.save(file, np.concatenate(splits)))
    write_whole(cache.with_suffix(".json"), lambda file: json.dump(meta, file), "w")     # last: it vouches for it
    return open_cache(cache, tokenizer)


def open_cache(path, tokenizer):
    """The cached Corpus, memory-mapped, or None where there is no whole one."""
    try:
        counts, dtype, vocab_size, vocab_id = json.loads(path.with_suffix(".json").read_text())
        ids = np.load(path, mmap_mode="r")
        if len(ids) == sum(counts) and ids.dtype == dtype:
            return Corpus(*np.split(ids, np.cumsum(counts)[:2]), vocab_size, vocab_id, tokenizer)
    except (OSError, EOFError, ValueError, TypeError):
        return None


# ---- tokenisers: {split: [path, ...]} -> the words by id, the ids of each split


def read_bytes(files):
    """The 256 byte values."""
    splits = [np.frombuffer(b"".join(path.read_bytes() for path in files[split]), np.uint8) for split in SPLITS]
    return [str(value) for value in range(256)], splits


def read_words(files):
    """fairseq's reading of WikiText: white space parts words, <eos> ends each line, ids by falling frequency in train.

    Ties stand in order of appearance. A word of valid or test that train lacks is <unk>."""
    ids = defaultdict()
    ids.default_factory = ids.__len__       # a new word gets the next id
    train = np.fromiter(map(ids.__getitem__, chain.from_iterable(read_chunks(files["train"]))), np.int32)
    ids.default_factory = None
    unk = ids.setdefault("<unk>", len(ids))
    order = np.argsort(-np.bincount(train, minlength=len(ids)), kind="stable")
    rank = np.argsort(order).astype(np.uint16 if len(ids) <= 2 ** 16 else np.int32)
    rest = [np.fromiter((ids.get(word, unk) for words in read_chunks(files[split]) for word in words), np.int32)
            for split in SPLITS[1:]]
    return np.array(list(ids), object)[order], [rank[split] for split in (train, *rest)]


def read_chunks(paths):
    """Yields lists of words, a megabyte of whole lines at a time. Raises UserError where a file is not UTF-8."""
    for path in paths:
        with open(path, "rb") as file, progress(path.stat().st_size, f"reading {path.name}") as bar:
            while chunk := b"".join(file.readlines(1 << 20)):
                try:
                    text = chunk.decode().removesuffix("\n") + "\n"
                except UnicodeDecodeError as error:
                    place = file.tell() - len(chunk) + error.start
                    raise UserError(f"{path}: byte {place} is not UTF-8: convert it or use --tokenizer byte") from error
                yield text.replace("\n", " <eos> ").split()
                bar.update(len(chunk))


def progress(total, label):
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=None)


# ---- where the text comes from: {split: [path, ...]}


def stdlib_files():
    """The running Python's own library: of each hundred files one is for validation, one for test."""
    root, skip = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages", "test", "tests"}
    train = sorted(path for path in root.rglob("*.py") if not skip.intersection(path.relative_to(root).parts))
    valid, test = train[49::100], train[99::100]
    return {"train": [path for path in train if path not in valid + test], "valid": valid, "test": test}


def corpus_files(name, data_dir):
    """A folder's three text files; WikiText is downloaded first. Raises UserError."""
    folder = data_dir / name if name in ZIPS else Path(name)
    if name in ZIPS and not folder.exists():
        archive = data_dir / f"{name}-v1.zip"
        if not archive.exists():
            download(name, archive)
        verify(archive, name)
        unpack(name, archive, folder)
    if not folder.is_dir():
        raise UserError(f"no corpus '{name}': {nearest(name, NAMES)}it is one of {', '.join(NAMES)}, or a folder")
    for pattern in ("wiki.{}.tokens", "{}.txt"):
        files = {split: [folder / pattern.format(split)] for split in SPLITS}
        if all(path.is_file() for [path] in files.values()):
            return files
    raise UserError(f"{folder} must hold three files: wiki.{{train,valid,test}}.tokens or {{train,valid,test}}.txt")


def download(name, path):
    """Fetches the zip from the first mirror that serves it whole. Raises UserError with what each one did."""
    part, failures = path.with_suffix(".part"), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for mirror in MIRRORS:
        # the first mirror refuses urllib's own User-Agent
        request = urllib.request.Request(mirror + path.name, headers={"User-Agent": "Mozilla/5.0"})
        try:
            with (urllib.request.urlopen(request, timeout=TIMEOUT) as reply, open(part, "wb") as file,
                  progress(ZIPS[name][0], f"downloading {path.name}") as bar):
                while block := reply.read(1 << 20):
                    bar.update(file.write(block))
            verify(part, name)
            return os.replace(part, path)
        except (OSError, HTTPException, UserError) as error:
            failures.append(f"{mirror}: {error}")
            part.unlink(missing_ok=True)
    raise UserError(f"cannot download {name} ({'; '.join(failures)}): fetch {path.name} by hand into "
                    f"{path.parent.resolve()}, or use --data stdlib")


def verify(path, name):
    """Raises UserError unless the file is the published zip."""
    content = path.read_bytes()
    found = len(content), hashlib.sha256(content).hexdigest()
    if found != ZIPS[name]:
        raise UserError(f"{path} has size and sha256 {found}, the real one {ZIPS[name]}: remove it, it will be fetched")


def unpack(name, path, folder):
    """The zip's three files into `folder`, all or nothing; no path in it is followed. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(".." in member or member.startswith("/") for member in archive.namelist()):
                raise KeyError("a path in it leads outside")
            texts = {file: archive.read(f"{name}/{file}") for file in (f"wiki.{split}.tokens" for split in SPLITS)}
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is not WikiText ({error.args[0]}): remove it, it will be fetched") from error
    beside = Path(f"{folder}.tmp")
    for file, text in texts.items():
        write_whole(beside / file, lambda out: out.write(text))
    os.replace(beside, folder)
