"""ImageNet-style image data: folders, packs, robustness sets and CIFAR pickles.

    train = imagenet("/data/imagenet", "train")           # a folder tree or a pack made from one
    loader = Loader(train, 256, transform=TrainTransform(224), shuffle=True, seed=0, workers=8,
                    drop_last=True, device="cuda", normalize=(IMAGENET_MEAN, IMAGENET_STD))
    for epoch in range(300):
        loader.set_epoch(epoch)
        for images, labels in loader: ...                 # (256, 3, 224, 224) float32 on the GPU

Loader and transforms live in `data_tools.loader`, packs in `data_tools.pack`; the names a training
script needs can be imported from here.

    python -m data_tools.imagenet pack SRC DST [--short-side 256] [--raw]  # a few large files
    python -m data_tools.imagenet verify DST                               # names damaged records
    python -m data_tools.imagenet check SRC                                # names unreadable images
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.files import read_lines, read_text, write_whole
from data_tools.loader import (  # noqa: F401  (also what scripts import from here)
    IMAGENET_MEAN,
    IMAGENET_STD,
    ArrayImages,
    BadImage,
    EvalTransform,
    Loader,
    PadCropTransform,
    TrainTransform,
    decode,
    normalize,
    open_and,
    open_image,
)

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class ImageFolder:
    """Images in class folders, `root/<class>/<name>.JPEG`.

    classes: None for all folders, an int k for the first k in sorted order, or a list of folder
    names; the labels are then 0 .. k-1 in sorted order. label_of: {folder name: label} for sets
    whose labels are given from outside (folders without an entry are an error). exif=False leaves
    images as they are stored, which is how published ImageNet accuracies were measured (a handful
    of images differ).

    The list of files is kept in `root/.image_index.json` (or under ~/.cache when root is read-only)
    and is used again as long as no class folder has changed; cache=False neither reads nor writes
    it.

    Attributes: labels (N,) int64, classes (folder names in label order), root.
    """

    def __init__(self, root: str | Path, *, classes: int | Sequence[str] | None = None,
                 label_of: dict[str, int] | None = None, exif: bool = True, cache: bool = True):
        self.root, self.exif = Path(root), exif
        folders = choose_classes(class_folders(self.root), classes, str(root))
        if label_of is None:
            label_of = {name: label for label, name in enumerate(folders)}
        elif unknown := [name for name in folders if name not in label_of]:
            raise ValueError(f"{root}: folder {unknown[0]!r} is none of the {len(label_of)} known "
                             f"classes ({len(unknown)} such folders); pass the class list this set "
                             "belongs to")
        self.classes = sorted(folders, key=label_of.__getitem__)
        names = _list_images(self.root, self.classes, cache)
        if empty := [c for c in self.classes if not names[c]]:
            known = ", ".join(EXTENSIONS[:4])
            raise ValueError(f"{self.root / empty[0]} holds no images ({known}, ...); "
                             f"fill or remove the folder ({len(empty)} empty)")
        counts = [len(names[c]) for c in self.classes]
        self.labels = np.repeat(np.array([label_of[c] for c in self.classes], np.int64), counts)
        # One byte string of names: a million str objects would be copied into every worker.
        encoded = [os.fsencode(name) for c in self.classes for name in names[c]]
        self.names_blob = b"".join(encoded)
        self._name_ends = np.cumsum([len(name) for name in encoded])
        self._class_ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Path of a sample below root: `<class>/<file>`."""
        index = range(len(self))[index]
        start = self._name_ends[index - 1] if index else 0
        folder = self.classes[bisect.bisect_right(self._class_ends, index)]
        return f"{folder}/{os.fsdecode(self.names_blob[start:self._name_ends[index]])}"

    def open(self, index: int) -> Image.Image:
        """The image, header read and pixels not decoded. Raises BadImage."""
        image = open_image(self.root / self.name(index))
        if not self.exif:
            image.info.pop("exif", None)
        return image

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """(PIL RGB image, label)."""
        return open_and(self, index, decode), int(self.labels[index])


def class_folders(root: str | Path) -> list[str]:
    """Sorted names of the class folders in root; ValueError says what is wrong with the layout."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected {root}/<class>/*.JPEG")
    with os.scandir(root) as entries:
        entries = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    folders = [name for name, is_folder in entries if is_folder]
    images = [name for name, is_folder in entries if name.lower().endswith(EXTENSIONS)]
    if not folders:
        found = f"{len(images)} images directly in it" if images else "no folders in it"
        hint = "sort the images into one folder per class" if images else "is the path right?"
        raise ValueError(f"{root}: {found}; expected {root}/<class>/*.JPEG ({hint})")
    if set(folders) & {"train", "val"}:
        inside = next(name for name in ("train", "val") if name in folders)
        raise ValueError(f"{root} holds splits, not classes; pass {root / inside}")
    return folders


def choose_classes(folders: list[str], classes: int | Sequence[str] | None,
                   where: str) -> list[str]:
    """The wanted ones of the sorted class folders: all, the first k, or those named."""
    if classes is None:
        return folders
    if isinstance(classes, int) and not isinstance(classes, bool):
        if not 1 <= classes <= len(folders):
            raise ValueError(f"classes={classes}, but {where} has {len(folders)} class folders")
        return folders[:classes]
    if isinstance(classes, (str, bool, float)) or not len(classes):
        raise TypeError(f"classes must be a number or a list of folder names, got {classes!r}")
    if missing := sorted(set(classes) - set(folders)):
        raise ValueError(f"{where} has no class folder {missing[0]!r} ({len(missing)} missing)")
    return sorted(set(classes))


def _list_images(root: Path, folders: list[str], cache: bool) -> dict[str, list[str]]:
    """{folder: sorted image file names}, from the index cache where the folder has not changed."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "image_index"
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    places = [root / ".image_index.json", fallback / f"{digest}.json"]
    known: dict[str, tuple[int, list[str]]] = {}
    for place in places if cache else []:
        try:
            saved = json.loads(place.read_bytes())
            known = {name: (stamp, files) for name, (stamp, files) in saved.items()}
            break
        except (OSError, ValueError, TypeError, AttributeError):  # absent or damaged: scan again
            continue
    stamps = {name: (root / name).stat().st_mtime_ns for name in folders}
    stale = [name for name in folders if known.get(name, (None,))[0] != stamps[name]]
    started = time.time_ns()

    def scan(name: str) -> list[str]:
        with os.scandir(root / name) as entries:
            return sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS)
                          and not e.name.startswith("."))

    with ThreadPoolExecutor(16) as pool:  # network file systems answer many at a time
        listed = dict(zip(stale, pool.map(scan, stale)))
    names = {name: listed[name] if name in listed else known[name][1] for name in folders}
    # A folder that changed within the last two seconds can change again under the same time stamp.
    settled = {n: (stamps[n], f) for n, f in listed.items() if started - stamps[n] > 2_000_000_000}
    if cache and settled:
        for place in places:
            with contextlib.suppress(OSError):  # read-only or full: the index is a convenience
                place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(place, json.dumps({**known, **settled}).encode())
                break
    return names


def imagenet(root: str | Path, split: str = "train", *, classes: int | Sequence[str] | None = None,
             exif: bool = True) -> Any:
    """The "train" or "val" split below root: an ImageFolder, or a PackedImages when root is a pack.

    With both splits present their class folders must be the same, since the labels come from their
    order.
    """
    root = Path(root)
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", got {split!r}')
    if (root / "pack.json").exists() or (root / "unfinished.json").exists():
        from data_tools.pack import PackedImages

        if not exif:
            raise ValueError(f"{root} is a pack, whose images are upright: exif must be True")
        return PackedImages(root, split, classes=classes)
    if not (root / split).is_dir():
        inside = sorted(path.name for path in root.iterdir()) if root.is_dir() else ["nothing"]
        raise ValueError(f"{root / split}: no such folder; expected {root}/train/<class>/*.JPEG "
                         f"and {root}/val/<class>/*.JPEG, found "
                         f"{', '.join(inside[:5]) or 'an empty folder'}")
    other = root / ("val" if split == "train" else "train")
    if other.is_dir():
        mine, theirs = set(class_folders(root / split)), set(class_folders(other))
        if mine != theirs:
            name = min(mine ^ theirs)
            raise ValueError(
                f"{root}: train and val have different class folders ({len(mine - theirs)} only in "
                f"{split}, {len(theirs - mine)} only in {other.name}, first {name!r}); "
                "labels would not match")
    return ImageFolder(root / split, classes=classes, exif=exif)


def read_wnids(source: str | Path) -> list[str]:
    """The class list: from a text file (first word of each line) or the class folders of a split.

    Sorted, as ImageNet numbers its classes. ValueError for an empty list or a repeated class.
    """
    source = Path(source)
    if source.is_dir():
        splits = (source / name for name in ("val", "train"))
        split = next((folder for folder in splits if folder.is_dir()), source)
        return class_folders(split)
    wnids = sorted(line.split()[0].strip(",") for _, line in read_lines(source))
    if not wnids or len(set(wnids)) < len(wnids):
        raise ValueError(f"{source}: {len(wnids)} lines with {len(set(wnids))} classes; expected "
                         "one class a line")
    return wnids


def imagenet_variant(root: str | Path, kind: str, wnids: Sequence[str] | None = None, *,
                     exif: bool = True) -> ImageFolder:
    """Robustness sets with the labels of the 1000-class problem.

    kind "a", "r", "sketch": folders are wnids; wnids is the sorted list of the training classes
    (`read_wnids`), and each folder gets its position there. `labels` of A and R take 200 values:
    restrict the logits to `np.unique(dataset.labels)` before the argmax.
    kind "v2": folders are class numbers, "0" .. "999", sorted as numbers.
    kind "9": the background challenge, folders `00_dog` .. `08_...`, labels 0 .. 8; see
    `imagenet9_groups`.
    """
    folders = class_folders(root)
    if kind in ("a", "r", "sketch"):
        if wnids is None:
            raise ValueError(f'kind={kind!r} needs wnids, e.g. read_wnids("/data/imagenet/val")')
        if list(wnids) != sorted(set(wnids)):
            raise ValueError("wnids must be sorted and without repeats: the order is the number")
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
    elif kind in ("v2", "9"):
        pattern, expected = {"v2": ("(0|[1-9][0-9]{0,2})", "0, 1, ..., 999"),
                             "9": ("0([0-8])_.*", "00_dog, ..., 08_fish")}[kind]
        numbers = {name: re.fullmatch(pattern, name) for name in folders}
        if wrong := [name for name, number in numbers.items() if number is None]:
            raise ValueError(
                f"{root}: folder {wrong[0]!r} has no class number; expected {expected}")
        label_of = {name: int(number[1]) for name, number in numbers.items()}
    else:
        raise ValueError(f'kind must be "a", "r", "sketch", "v2" or "9", got {kind!r}')
    return ImageFolder(root, label_of=label_of, exif=exif)


def imagenet9_groups(path: str | Path, num_classes: int = 1000) -> Tensor:
    """(num_classes,) int64: the group 0..8 of each class, -1 for none, from `in_to_in9.json`.

    A prediction counts as right when `groups[logits.argmax(1)] == label`.
    """
    try:
        groups = {int(key): int(value) for key, value in json.loads(read_text(path)).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a map {{class: group}} ({error})") from None
    if sorted(groups) != list(range(num_classes)):
        raise ValueError(f"{path}: {len(groups)} classes, expected keys 0 .. {num_classes - 1}")
    if odd := set(groups.values()) - set(range(-1, 9)):
        raise ValueError(f"{path}: groups must be -1 .. 8, got {min(odd)}")
    return torch.tensor([groups[index] for index in range(num_classes)])


class _ArrayUnpickler(pickle.Unpickler):
    """Loads containers, numbers, strings and numeric arrays; refuses all that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # filled by the array's __setstate__
            return lambda kind, shape, code: np.empty(0, np.uint8)
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only ever handed to _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return self._numeric_dtype
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return self._filled  # protocol 5
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"refused to load {module}.{name}: not plain data")

    @staticmethod
    def _filled(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
        return np.frombuffer(data, dtype).reshape(shape, order=order)

    @staticmethod
    def _numeric_dtype(code: str | bytes, *flags: bool) -> np.dtype:
        dtype = np.dtype(code.decode() if isinstance(code, bytes) else code)
        if dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"refused to load an array of {dtype}")
        return dtype


def load_pickle(path: str | Path) -> dict[str, Any]:
    """A pickled dict of arrays and lists, with str keys, from a file that need not be trusted."""
    try:
        with open(path, "rb") as file:
            data = _ArrayUnpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a CIFAR pickle ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, expected a dict")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value
            for key, value in data.items()}


def cifar(root: str | Path, name: str = "cifar10", train: bool = True) -> ArrayImages:
    """CIFAR-10 or CIFAR-100 (fine labels) from the pickles: 50,000 or 10,000 images of 32 x 32.

    root holds the pickles or the folder of the archive (`cifar-10-batches-py`, `cifar-100-python`).
    """
    sets = {
        "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch",
                    "labels"),
        "cifar100": ("cifar-100-python", ["train"], "test", "fine_labels"),
    }
    if name not in sets:
        raise ValueError(f'name must be "cifar10" or "cifar100", got {name!r}')
    folder, training, test, key = sets[name]
    root = Path(root) / folder if (Path(root) / folder).is_dir() else Path(root)
    images, labels = [], []
    for file in training if train else [test]:
        if not (root / file).is_file():
            raise ValueError(f"{root / file} is missing; unpack {folder} into {root}")
        batch = load_pickle(root / file)
        data = batch.get("data")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise ValueError(f"{root / file}: 'data' is not uint8 (N, 3072)")
        found, classes = np.asarray(batch.get(key)), int(name.removeprefix("cifar"))
        if found.dtype.kind not in "iu" or found.shape != data.shape[:1] or len(found) and not (
                0 <= found.min() and found.max() < classes):
            raise ValueError(f"{root / file}: {key!r} are not {len(data)} integers in 0 .. "
                             f"{classes - 1}, one for each image")
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(found.astype(np.int64))
    return ArrayImages(np.concatenate(images), np.concatenate(labels))


if __name__ == "__main__":
    from data_tools.pack import main

    sys.exit(main())
