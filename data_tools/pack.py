"""Packs: an image set in a few large files, read by memory map.

    python -m data_tools.imagenet pack SRC DST [--short-side 256] [--quality 90] [--raw]
    python -m data_tools.imagenet verify DST
    python -m data_tools.imagenet check SRC

A training job that opens a million small files waits for the file system, and decodes pixels which
the crop throws away. A pack stores each image once more: upright, RGB, its short side reduced to
`--short-side`, as JPEG or (`--raw`) as plain pixels which need no decoding at all (0.1 MB for 32
thousand pixels; 1000 images of 256 x 341 pixels take 26 MB as JPEG, 262 MB raw). JPEG files that
are small enough already, RGB and upright are copied as they are, byte by byte.

    DST/pack.json                    splits, classes, options, and the checksum of every index file
    DST/train-00000.bin              records, one after the other
    DST/train-00000.npz              offset, length, width, height, label, CRC-32 and name of each
                                     record

A shard is written under another name and renamed when it is complete, its index after it, and
pack.json last: a killed run goes on with the first missing shard when it is started again, and
never looks finished.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.files import read_text, write_whole
from data_tools.imagenet import ImageFolder, choose_classes, imagenet
from data_tools.loader import BadImage, EncodedJpeg, decode, image_size, open_and, orientation

VERSION = 1
IMAGES_PER_SHARD = 16384
COLUMNS = ("offset", "length", "width", "height", "label", "crc")


class PackedImages:
    """One split of a pack, with the interface of ImageFolder.

    classes: as for ImageFolder. `open` returns an EncodedJpeg, or for raw packs the pixels
    themselves, (H, W, 3) uint8, as a view of the mapped file.
    """

    def __init__(self, root: str | Path, split: str = "train", *,
                 classes: int | Sequence[str] | None = None):
        self.root = Path(root)
        header = read_header(self.root)
        if split not in header["splits"]:
            raise ValueError(
                f"{root} holds the splits {', '.join(header['splits'])}, not {split!r}")
        self.raw = header["options"]["raw"]
        self.files = [self.root / f"{name}.bin" for name in header["splits"][split]["shards"]]
        tables = [load_index(self.root, name, header) for name in header["splits"][split]["shards"]]
        self._table = {key: np.concatenate([t[key] for t in tables]) for key in COLUMNS}
        self._shard = np.repeat(np.arange(len(tables)), [len(t["label"]) for t in tables])
        self._names = np.concatenate([t["name"] for t in tables])
        every = header["splits"][split]["classes"]
        self.classes = choose_classes(every, classes, str(root))
        if len(self.classes) < len(every):
            new_label = np.full(len(every), -1)
            new_label[[every.index(name) for name in self.classes]] = np.arange(len(self.classes))
            kept = np.flatnonzero(new_label[self._table["label"]] >= 0)
            self._table = {key: column[kept] for key, column in self._table.items()}
            self._shard, self._names = self._shard[kept], self._names[kept]
            self._table["label"] = new_label[self._table["label"]]
        self.labels = self._table["label"].astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}
        sizes = set(zip(self._table["width"].tolist(), self._table["height"].tolist()))
        if self.raw and len(sizes) == 1:  # equal images: the loader may copy a whole batch at once
            self.batch = self._batch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a map pickled to a worker would be copied whole

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """`<class>/<file>` as it was in the source."""
        return self._names[index].decode("utf-8", "surrogateescape")

    def record(self, index: int) -> np.ndarray:
        """The stored bytes, (length,) uint8, not copied."""
        shard = int(self._shard[index])
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.files[shard], np.uint8, mode="r")
        start = int(self._table["offset"][index])
        return self._maps[shard][start : start + int(self._table["length"][index])]

    def open(self, index: int) -> EncodedJpeg | np.ndarray:
        data = self.record(index)
        width, height = int(self._table["width"][index]), int(self._table["height"][index])
        if self.raw:
            return np.asarray(data).reshape(height, width, 3)
        return EncodedJpeg(data.tobytes(), (width, height))

    def _batch(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, H, W) uint8, for packs whose images all have one size."""
        pixels = torch.from_numpy(np.stack([self.open(i) for i in indices]))
        return pixels.permute(0, 3, 1, 2).contiguous()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_and(self, index, decode), int(self.labels[index])

    def verify(self) -> list[str]:
        """Names of the records whose bytes do not match their checksum."""
        return [self.name(i) for i in range(len(self))
                if len(data := self.record(i)) != self._table["length"][i]
                or zlib.crc32(data) != self._table["crc"][i]]


# ------------------------------------------------------------------------------------- on disk


def read_header(root: Path) -> dict[str, Any]:
    """pack.json, checked."""
    if not (root / "pack.json").exists():
        if (root / "unfinished.json").exists():
            raise ValueError(f"{root}: the pack is not finished; run the same pack command again "
                             "to complete it")
        raise ValueError(f"{root}: not a pack (no pack.json)")
    header = _read_plan(root / "pack.json")
    if header.get("version") != VERSION:
        raise ValueError(f"{root}: pack version {header.get('version')}, this code reads {VERSION}")
    if header.get("sha256", _digest(header)) != _digest(header):  # packs of old have none
        raise ValueError(f"{root / 'pack.json'} is damaged (checksum); make the pack again")
    return header


def _read_plan(path: Path) -> dict[str, Any]:
    """pack.json or unfinished.json."""
    try:
        plan = json.loads(read_text(path))
        if not isinstance(plan, dict):
            raise ValueError(f"holds a {type(plan).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make the pack again") from None
    return plan


def _digest(header: dict[str, Any]) -> str:
    """SHA-256 of all that pack.json holds besides it."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_index(root: Path, shard: str, header: dict[str, Any]) -> dict[str, np.ndarray]:
    """The columns of one shard's index, once its checksum and the data file's size are compared."""
    path, data_path = root / f"{shard}.npz", root / f"{shard}.bin"
    expected = header["checksums"][shard]
    if not path.is_file() or not data_path.is_file():
        missing = data_path if path.is_file() else path
        raise ValueError(f"{missing} is missing; copy it again or make the pack again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected["index"]:
        raise ValueError(f"{path} is damaged (checksum); copy it again or make the pack again")
    if data_path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{data_path} has {data_path.stat().st_size} bytes instead of "
                         f"{expected['bytes']}; copy it again or make the pack again")
    with np.load(io.BytesIO(data), allow_pickle=False) as table:
        return dict(table)


def encode(dataset: Any, index: int, short_side: int, quality: int,
           raw: bool) -> tuple[bytes, int, int]:
    """(record, width, height) of one image, reduced to the short side if it is larger."""

    def stored(image: Image.Image) -> tuple[bytes, int, int]:
        width, height = image_size(image)
        scale = min(1.0, short_side / min(width, height))
        plain = image.format == "JPEG" and image.mode == "RGB" and orientation(image) == 1
        source = image.fp.getvalue() if plain and not image.info.get("progressive") else None
        pixels = decode(image)  # always: an unreadable file must not get into a pack
        if source is not None and scale == 1 and not raw:
            return source, width, height
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            pixels = pixels.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        if raw:
            return pixels.tobytes(), *pixels.size
        out = io.BytesIO()
        pixels.save(out, "JPEG", quality=quality)
        return out.getvalue(), *pixels.size

    return open_and(dataset, index, stored)


def _write_shard(dataset: ImageFolder, dst: Path, shard: str, indices: range,
                 options: dict[str, Any], skip: bool) -> list[str]:
    """Writes shard.bin and then shard.npz; returns the messages of skipped images."""
    rows, names, bad = [], [], []

    def write(file: BinaryIO) -> None:
        for index in indices:
            try:
                record, width, height = encode(dataset, index, **options)
            except BadImage as error:
                if not skip:
                    raise
                bad.append(str(error))
                continue
            label = int(dataset.labels[index])
            rows.append((file.tell(), len(record), width, height, label, zlib.crc32(record)))
            names.append(dataset.name(index).encode("utf-8", "surrogateescape"))
            file.write(record)

    write_whole(dst / f"{shard}.bin", write)
    columns = dict(zip(COLUMNS, np.array(rows, np.int64).reshape(-1, len(COLUMNS)).T))
    out = io.BytesIO()
    np.savez(out, **columns, name=np.array(names, np.bytes_), bad=np.array(bad, np.str_))
    write_whole(dst / f"{shard}.npz", out.getvalue())
    return bad


def pack(src: str | Path, dst: str | Path, *, short_side: int = 256, quality: int = 90,
         raw: bool = False, workers: int | None = None, on_bad_image: str = "raise",
         images_per_shard: int = IMAGES_PER_SHARD) -> dict[str, Any]:
    """Packs src (train/ and/or val/ with class folders, or class folders directly) into dst;
    returns the header.

    A folder of class folders becomes the split "val". Started again with the same arguments after
    an interruption (on_bad_image may be another) it continues; a finished pack is left as it is.
    The source is only read. Files that were renamed, added or removed meanwhile are an error; new
    pixels under an old name are not noticed.
    """
    src, dst = Path(src), Path(dst)
    workers = os.cpu_count() or 1 if workers is None else workers
    if min(short_side, images_per_shard, workers) < 1 or not 1 <= quality <= 95:
        raise ValueError("short_side, images_per_shard and workers must be >= 1 and quality 1 .. "
                         f"95, got {short_side}, {images_per_shard}, {workers} and {quality}")
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f'on_bad_image must be "raise" or "skip", got {on_bad_image!r}')
    splits = [split for split in ("train", "val") if (src / split).is_dir()]
    sources = {split: imagenet(src, split) for split in splits} or {"val": ImageFolder(src)}
    here = (dst.resolve(), *dst.resolve().parents)
    if src.resolve() == here[0] or any(data.root.resolve() in here for data in sources.values()):
        raise ValueError(f"{dst} lies among the images of {src}; choose another folder")
    listing = hashlib.sha256()
    for split, dataset in sources.items():
        listing.update(f"{split} {dataset.classes} {images_per_shard}".encode())
        listing.update(dataset.labels.tobytes() + dataset.names_blob)
    options = {"short_side": short_side, "quality": quality, "raw": raw}
    plan = {"version": VERSION, "options": options, "source": listing.hexdigest()}
    dst.mkdir(parents=True, exist_ok=True)
    for name in ("pack.json", "unfinished.json"):
        if (dst / name).exists():
            found = _read_plan(dst / name)
            if {key: found.get(key) for key in plan} != plan:
                raise ValueError(f"{dst} holds a pack of other files or options "
                                 f"({found.get('options')}); remove it or choose another folder")
            if name == "pack.json":
                (dst / "unfinished.json").unlink(missing_ok=True)
                print(f"{dst} is complete")
                return found
            break
    else:
        write_whole(dst / "unfinished.json", json.dumps(plan).encode())
    for left in dst.glob(".*.tmp"):  # by a killed run
        left.unlink(missing_ok=True)

    jobs = {
        f"{split}-{number:05d}": (dataset,
                                  range(start, min(start + images_per_shard, len(dataset))))
        for split, dataset in sources.items()
        for number, start in enumerate(range(0, len(dataset), images_per_shard))
    }
    missing = [shard for shard in jobs if not (dst / f"{shard}.npz").exists()]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} shards are there already")
    workers = min(len(missing), workers)
    skip = on_bad_image == "skip"
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            tasks = {pool.submit(_write_shard, jobs[s][0], dst, s, jobs[s][1], options, skip): s
                     for s in missing}
            try:
                for done, task in enumerate(as_completed(tasks), 1):
                    task.result()
                    print(f"{tasks[task]}: {done} of {len(missing)} shards", flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    else:
        for done, shard in enumerate(missing, 1):
            _write_shard(jobs[shard][0], dst, shard, jobs[shard][1], options, skip)
            print(f"{shard}: {done} of {len(missing)} shards", flush=True)

    header = {**plan, "checksums": {}, "splits": {
        split: {"classes": dataset.classes, "images": len(dataset),
                "shards": [shard for shard in jobs if shard.startswith(split)]}
        for split, dataset in sources.items()}}
    for shard in jobs:
        header["checksums"][shard] = {
            "index": hashlib.sha256((dst / f"{shard}.npz").read_bytes()).hexdigest(),
            "bytes": (dst / f"{shard}.bin").stat().st_size}
    for shard in jobs:
        with np.load(dst / f"{shard}.npz", allow_pickle=False) as table:
            header["splits"][shard.split("-")[0]]["images"] -= len(table["bad"])
            for message in table["bad"]:
                if not skip:
                    raise ValueError(f"{message}; an earlier run left this out, remove {dst} to "
                                     "start over")
                print(f"left out {message}")
    header["sha256"] = _digest(header)
    write_whole(dst / "pack.json", json.dumps(header, indent=1).encode())
    (dst / "unfinished.json").unlink(missing_ok=True)
    return header


# -------------------------------------------------------------------------------- command line


def verify(root: str | Path) -> list[str]:
    """Damaged records of all splits, `<split>/<class>/<file>`; ValueError for a damaged index."""
    return [f"{split}/{name}" for split in read_header(Path(root))["splits"]
            for name in PackedImages(root, split).verify()]


def check(src: str | Path) -> list[str]:
    """One message for each image below src (a split, or train/ and val/) that cannot be decoded."""
    src = Path(src)
    roots = [src / split for split in ("train", "val") if (src / split).is_dir()] or [src]
    bad = []
    for dataset in map(ImageFolder, roots):
        for index in range(len(dataset)):
            try:
                dataset[index]
            except BadImage as error:
                bad.append(str(error))
    return bad


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.imagenet",
                                     description="Image packs.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("pack", help="write an image tree into a few large files")
    make.add_argument("src", type=Path)
    make.add_argument("dst", type=Path)
    make.add_argument("--short-side", type=int, default=256,
                      help="larger images are reduced to this")
    make.add_argument("--quality", type=int, default=90, help="of re-encoded JPEGs")
    make.add_argument("--raw", action="store_true",
                      help="store pixels: no decoding, about 10x the space")
    make.add_argument("--workers", type=int, default=None, help="processes (all cores)")
    make.add_argument("--on-bad-image", choices=("raise", "skip"), default="raise")
    make.add_argument("--images-per-shard", type=int, default=IMAGES_PER_SHARD)
    for name, text in (("verify", "compare all checksums"), ("check", "decode all images")):
        commands.add_parser(name, help=text).add_argument("root", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "pack":
            header = pack(args.src, args.dst, short_side=args.short_side, quality=args.quality,
                          raw=args.raw, workers=args.workers, on_bad_image=args.on_bad_image,
                          images_per_shard=args.images_per_shard)
            size = sum(entry["bytes"] for entry in header["checksums"].values())
            counts = ", ".join(f"{name} {entry['images']}"
                               for name, entry in header["splits"].items())
            print(f"{args.dst}: {counts} images, {size / 1e6:.1f} MB")
            return 0
        bad = verify(args.root) if args.command == "verify" else check(args.root)
    except ValueError as error:
        hint = " (repair the file, or pass --on-bad-image skip; finished shards are kept)"
        print(f"error: {error}{hint * isinstance(error, BadImage)}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or vars(args).get("dst", "")
        print(f"error: {where}: {error.strerror}; free space or choose another folder, then run "
              "the same command again: finished shards are kept", file=sys.stderr)
        return 1
    for message in bad:
        print(f"damaged: {message}", file=sys.stderr)
    print(f"{len(bad)} damaged" if bad else "all images are whole")
    return 1 if bad else 0
