"""Dense label maps on disk: a packed store of a few large files, and the released tree of many.

A label map holds, for every cell of an h x w grid over an image, the k highest class scores of an
annotator and their classes: a `(2, k, h, w)` tensor, [0] scores and [1] classes. The released maps
of ReLabel (arXiv:2101.05022) are a tree `<wnid>/<image stem>.pt` of 1.28 million such float32
files. The store keeps int16 classes and float16 scores in memory-mapped shards: 4.5 kB an image at
15 x 15 top-5 instead of 9.4 kB, a handful of files instead of one per image.

    STORE/store.json           k, h, w, number of classes and images, shard size, the annotator
    STORE/images.txt           one image a line, `<wnid>/<stem>`, in the order of the records
    STORE/shard-00000.npy      records (classes int16 (k, h, w), scores float16 (k, h, w))
    STORE/shard-00000.sha256   its checksum; written last, so a shard with one is whole

    writer = StoreWriter("store", images, k=5, height=15, width=15, num_classes=1000)
    for start, stop in writer.missing():                     # shards not there: so a run resumes
        writer.write(start, maps_of(images[start:stop]))     # (stop - start, 2, k, h, w)
    store = LabelMaps("store")
    topk = store[[3, 14, 15]]                                # (3, 2, k, h, w) float32

    python -m data_tools.label_maps pack TREE STORE         the released tree into a store (resumes)
    python -m data_tools.label_maps unpack STORE TREE       and back
    python -m data_tools.label_maps verify STORE            checksums, ranges, doubled classes

Which axis is which: the maps a convolutional annotator produces are (rows, columns). How the
released files are laid out is not documented, and the released training code hands (y, x)
coordinates to a function that takes (x, y). Both fit together if the files are transposed.
`pack --transpose` swaps the two map axes on the way in, for a tree that turns out to be stored
(columns, rows); compare one map with its image before deciding.
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data_tools.files import read_text, write_whole

FORMAT = 1


class LabelMaps:
    """A complete store, read by memory map: `images`, `index(image)`, `store[i]`, `store[[i, j]]`.

    ValueError names the file when the store is unfinished or damaged in shape; `verify` checks the
    contents.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        try:
            self.images = read_text(self.folder / "images.txt").splitlines()
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        count, size = self.meta["count"], self.meta["shard_size"]
        if len(self.images) != count:
            raise ValueError(f"{self.folder / 'images.txt'} has {len(self.images)} lines, "
                             f"store.json says {count}")
        missing = [p.name for p in map(self._path, range(-(-count // size)))
                   if not p.with_suffix(".sha256").exists()]
        if missing:
            raise ValueError(f"{self.folder} is unfinished: {len(missing)} shards are missing, the "
                             f"first is {missing[0]}; run its generation again, it goes on where "
                             "it stopped")
        # opened on first use, so that worker processes open their own
        self._shards: dict[int, np.ndarray] = {}
        self._rows: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}

    def index(self, image: str | Path) -> int:
        """The record of an image by its path: the last two parts, up to the first dot, count."""
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(self.images)}
        key = image_key(image)
        if key not in self._rows:
            raise KeyError(f"{self.folder} has no map for {key} (asked for {image})")
        return self._rows[key]

    def __getitem__(self, rows: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """`(2, k, h, w)` float32 of one record, `(n, 2, k, h, w)` of a sequence of them."""
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise TypeError(f"rows must be integers, not {rows.dtype}")
        if rows.ndim == 0:
            return self[rows[None]][0]
        rows = rows.astype(np.int64).reshape(-1)
        rows = np.where(rows < 0, rows + len(self), rows)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows must be in 0..{len(self) - 1}, not {rows.min()}..{rows.max()}")
        out = np.empty((len(rows), 2, self.meta["k"], self.meta["height"], self.meta["width"]),
                       dtype=np.float32)
        shard = rows // self.meta["shard_size"]
        for number in np.unique(shard):
            mine = np.flatnonzero(shard == number)
            records = self._shard(int(number))[rows[mine] % self.meta["shard_size"]]
            out[mine, 0], out[mine, 1] = records["scores"], records["classes"]
        return torch.from_numpy(out)

    def _path(self, number: int) -> Path:
        return _shard_path(self.folder, number)

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            start = number * self.meta["shard_size"]
            expected = (min(self.meta["shard_size"], self.meta["count"] - start),)
            try:
                array = np.load(self._path(number), mmap_mode="r", allow_pickle=False)
            except Exception as error:  # NumPy raises nearly anything on a damaged header
                raise ValueError(f"{self._path(number)} cannot be read: {error}") from error
            if array.dtype != _record(self.meta) or array.shape != expected:
                raise ValueError(f"{self._path(number)} holds {array.shape} {array.dtype}, "
                                 f"expected {expected} {_record(self.meta)}")
            self._shards[number] = array
        return self._shards[number]


class StoreWriter:
    """Writes a store shard by shard; several processes may write different shards of one store.

    images: paths or keys in the order of the records. A folder that holds a store of other images
    or another shape is refused with ValueError. `annotator` is a note kept in store.json.
    """

    def __init__(self, folder: str | Path, images: Iterable[str | Path], *, k: int, height: int,
                 width: int, num_classes: int, shard_size: int = 8192, annotator: str = "") -> None:
        sizes = (k, height, width, num_classes, shard_size)
        if any(int(n) != n or n < 1 for n in sizes) or not k <= num_classes <= 2**15:
            raise ValueError(f"need 1 <= k <= num_classes <= 32768 and positive sizes, not k={k}, "
                             f"num_classes={num_classes}, height={height}, width={width}, "
                             f"shard_size={shard_size}")
        self.folder, keys = Path(folder), [image_key(image) for image in images]
        if len(set(keys)) != len(keys):
            raise ValueError(f"images must be different; {len(keys) - len(set(keys))} keys of "
                             f"{len(keys)} repeat")
        self.meta = {"format": FORMAT, "count": len(keys), "k": k, "height": height,
                     "width": width, "num_classes": num_classes, "shard_size": shard_size,
                     "annotator": annotator}
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{key}\n" for key in keys)
        if (self.folder / "store.json").exists():
            before = _read_meta(self.folder)
            changed = [name for name, value in self.meta.items() if before.get(name) != value]
            if changed or read_text(self.folder / "images.txt") != lines:
                raise ValueError(f"{self.folder} holds another store "
                                 f"(differs in {', '.join(changed) or 'images'}); "
                                 "give a new folder, or delete this one")
        else:
            write_whole(self.folder / "images.txt", lines.encode())
            meta = json.dumps(self.meta, indent=1) + "\n"
            write_whole(self.folder / "store.json", meta.encode())

    def missing(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, int]]:
        """Record ranges (start, stop) of shards to write; each process gets every R-th shard."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1, got {rank} of {world_size}")
        size = self.meta["shard_size"]
        for number, start in enumerate(range(0, self.meta["count"], size)):
            whole = _shard_path(self.folder, number).with_suffix(".sha256")
            if number % world_size == rank and not whole.exists():
                yield start, min(start + size, self.meta["count"])

    def write(self, start: int, maps: torch.Tensor | np.ndarray) -> None:
        """One whole shard: maps `(n, 2, k, h, w)` of the records from `start`.

        ValueError names the first image with a bad map.
        """
        size, count = self.meta["shard_size"], self.meta["count"]
        if isinstance(maps, torch.Tensor):
            maps = maps.detach().cpu().float().numpy()  # NumPy has no bfloat16
        maps = np.asarray(maps)
        cells = (self.meta["k"], self.meta["height"], self.meta["width"])
        expected = (min(size, count - start), 2, *cells)
        if start % size or not 0 <= start < count or maps.shape != expected:
            raise ValueError(f"maps must be the whole shard {expected} from a multiple of {size}, "
                             f"not {maps.shape} from {start}")
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, by name
            records = np.empty(len(maps), dtype=_record(self.meta))
            records["scores"], records["classes"] = maps[:, 0], maps[:, 1]
        if problem := _problem(records, self.meta, exact=maps[:, 1]):
            names = read_text(self.folder / "images.txt").splitlines()
            raise ValueError(f"map of {names[start + problem[0]]}: {problem[1]}")
        buffer = io.BytesIO()
        np.save(buffer, records, allow_pickle=False)
        path = _shard_path(self.folder, start // size)
        write_whole(path, buffer.getbuffer())
        write_whole(path.with_suffix(".sha256"),
                    hashlib.sha256(buffer.getbuffer()).hexdigest().encode() + b"\n")


def generate(annotate: Callable[[list[int]], torch.Tensor], writer: StoreWriter, *,
             batch_size: int = 256, rank: int = 0, world_size: int = 1) -> Iterator[dict]:
    """Fill the missing shards: `annotate(rows)` returns the maps `(n, 2, k, h, w)` of those images.

    Yields {"image": records done by this process, "total": of how many, "rows": of this batch}
    after every batch. A killed run loses the shard it was writing, nothing else.
    """
    todo = list(writer.missing(rank, world_size))
    total, done = sum(stop - start for start, stop in todo), 0
    for start, stop in todo:
        parts = []
        for first in range(start, stop, batch_size):
            rows = list(range(first, min(first + batch_size, stop)))
            parts.append(annotate(rows).cpu())
            done += len(rows)
            if rows[-1] == stop - 1:
                writer.write(start, torch.cat(parts))
            yield {"image": done, "total": total, "rows": len(rows)}


# ---------------------------------------------------------------- the released tree


def image_key(image: str | Path) -> str:
    """`<folder>/<stem>` from a path: the last two parts, the name up to its first dot."""
    parts = Path(image).parts
    if len(parts) < 2:
        raise ValueError(f"image must be given as <class folder>/<name>, not {str(image)!r}")
    key = f"{parts[-2]}/{parts[-1].split('.')[0]}"
    if key.splitlines() != [key]:  # images.txt has one a line
        raise ValueError(f"image must have a name of one line, not {key!r}")
    return key


def released_maps(folder: str | Path) -> list[Path]:
    """The files of a released tree `<wnid>/<stem>.pt`, sorted. ValueError if there are none."""
    files = sorted(Path(folder).glob("*/*.pt"))
    if not files:
        raise ValueError(f"{folder} holds no <wnid>/<stem>.pt files: "
                         "give the folder that relabel_imagenet.tar unpacks to")
    return files


def read_released(path: str | Path, transpose: bool = False) -> torch.Tensor:
    """One released file as `(2, k, h, w)` float32; ValueError names a file that is none."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not isinstance(value, torch.Tensor) or value.ndim != 4 or value.shape[0] != 2:
        found = getattr(value, "shape", type(value).__name__)
        raise ValueError(f"{path} must hold one (2, k, h, w) tensor, not {found}")
    return (value.transpose(2, 3) if transpose else value).float()


def pack(source: str | Path, store: str | Path, *, num_classes: int = 1000, shard_size: int = 8192,
         transpose: bool = False, annotator: str = "released maps") -> Iterator[dict]:
    """The released tree into a store; yields progress as `generate` does and resumes like it."""
    files = released_maps(source)
    first = read_released(files[0], transpose)
    writer = StoreWriter(store, files, k=first.shape[1], height=first.shape[2],
                         width=first.shape[3], num_classes=num_classes, shard_size=shard_size,
                         annotator=f"{annotator}, map axes swapped" if transpose else annotator)

    def annotate(rows: list[int]) -> torch.Tensor:
        maps = [read_released(files[row], transpose) for row in rows]
        for row, m in zip(rows, maps):
            if m.shape != first.shape:
                raise ValueError(f"{files[row]} holds {tuple(m.shape)}, "
                                 f"the first file holds {tuple(first.shape)}")
        return torch.stack(maps)

    yield from generate(annotate, writer)


def unpack(store: str | Path, folder: str | Path) -> Iterator[dict]:
    """A store into the released tree, one `.pt` file per image; files there already stay."""
    maps, folder = LabelMaps(store), Path(folder)
    for row, image in enumerate(maps.images):
        path = folder / f"{image}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            torch.save(maps[row], buffer)
            write_whole(path, buffer.getbuffer())
        yield {"image": row + 1, "total": len(maps), "rows": 1}


def verify(folder: str | Path) -> Iterator[str]:
    """One line per problem: a checksum that differs, scores or classes that cannot be."""
    maps = LabelMaps(folder)
    if len(set(maps.images)) < len(maps):
        yield f"{maps.folder / 'images.txt'}: {len(maps) - len(set(maps.images))} names repeat"
    size = maps.meta["shard_size"]
    for number in range(-(-len(maps) // size)):
        path = maps._path(number)
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != read_text(path.with_suffix(".sha256")).strip():
                yield f"{path}: the checksum differs; delete it with its .sha256 and generate again"
            if problem := _problem(maps._shard(number), maps.meta):
                yield f"{path}: {maps.images[number * size + problem[0]]}: {problem[1]}"
        except (OSError, ValueError) as error:
            yield str(error)


# ---------------------------------------------------------------- small parts


def _record(meta: dict) -> np.dtype:
    grid = (meta["k"], meta["height"], meta["width"])
    return np.dtype([("classes", "<i2", grid), ("scores", "<f2", grid)])


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def _problem(records: np.ndarray, meta: dict,
             exact: np.ndarray | None = None) -> tuple[int, str] | None:
    """(row, what is wrong) of the first record that no annotator can have produced."""
    classes = records["classes"]
    ordered = np.sort(classes, axis=1)
    problems = {
        "a score is not finite, or too large for float16 (65504)": ~np.isfinite(records["scores"]),
        f"a class is outside 0..{meta['num_classes'] - 1}":
            (classes < 0) | (classes >= meta["num_classes"]),
        "a cell names the same class twice": ordered[:, 1:] == ordered[:, :-1],
        "a class is not an integer in the range of int16":
            classes != (classes if exact is None else exact)}
    for text, wrong in problems.items():
        rows = np.flatnonzero(wrong.any(axis=(1, 2, 3)))
        if len(rows):
            return int(rows[0]), text
    return None


def _read_meta(folder: Path) -> dict:
    path = folder / "store.json"
    try:
        meta = json.loads(read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no label-map store: it has no store.json") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}")
    for name in ("count", "k", "height", "width", "num_classes", "shard_size"):
        if type(meta.get(name)) is not int or meta[name] < (name != "count"):
            raise ValueError(f"{path} is damaged: {name} is {meta.get(name)!r}")
    return meta


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.label_maps", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("source"), packing.add_argument("store")
    packing.add_argument("--num-classes", type=int, default=1000)
    packing.add_argument("--transpose", action="store_true",
                         help="the files are (columns, rows): swap the map axes")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("store"), unpacking.add_argument("tree")
    commands.add_parser("verify").add_argument("store")
    args = parser.parse_args(argv)
    try:
        if args.command == "verify":
            problems = list(verify(args.store))
            fine = f"{args.store}: {len(LabelMaps(args.store))} maps, all well"
            print("\n".join(problems) or fine)
            return bool(problems)
        if args.command == "pack":
            steps = pack(args.source, args.store, num_classes=args.num_classes,
                         transpose=args.transpose)
        else:
            steps = unpack(args.store, args.tree)
        step = {"image": 0, "total": 0}
        for step in steps:
            if step["image"] % 1024 < step["rows"]:
                print(f"\r{step['image']}/{step['total']}", end="", file=sys.stderr, flush=True)
        print(f"\r{step['image']} maps done", file=sys.stderr)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
