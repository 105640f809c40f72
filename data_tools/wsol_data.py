"""Images with labels and boxes or masks for weakly supervised localization: metadata files, CUB,
ILSVRC, OpenImages30k, yours.

    split = read_split("metadata/CUB/val", image_root="dataset/CUB")     # checked line by line
    images = SplitImages(split, "dataset/CUB")
    loader = Loader(images, 32, transform=TrainResizeCrop(), shuffle=True,
                    normalize=(IMAGENET_MEAN, IMAGENET_STD))
    evaluator = BoxEvaluator(split.boxes, split.sizes)                   # of wsol_evaluation

A split is a folder of text files, the format published with clovaai/wsolevaluation (which also
ships these files for the three data sets, below
`metadata/<CUB|ILSVRC|OpenImages>/<train|val|test>`; train has image labels, val the small full
supervision):

    image_ids.txt       path                 image_ids_proxy.txt, optional: a part, for fast search
    class_labels.txt    path,label           0 .. classes - 1
    image_sizes.txt     path,width,height    may be empty
    localization.txt    path,x0,y0,x1,y1     one line per box, pixels of the original image; or
                        path,mask,ignore     one line per instance mask, ignore only on the first of
                                             an image; may be empty

Images: CUB-200-2011 and CUBV2 under one folder of classes; ILSVRC `train/<wnid>/*.JPEG`,
`val/*.JPEG` (the test split) and ImageNetV2 `val2/<class>/<n>.jpeg`; OpenImages30k
`<split>/<class>/<id>.jpg` with `<id>_m<class>_<hash>.png` masks and `<id>_ignore.png` beside it.
Where the metadata are not at hand, most of them follow from the original annotations:

    python -m data_tools.wsol_data cub CUB_200_2011 metadata/CUB                train and test
    python -m data_tools.wsol_data ilsvrc ILSVRC XML_FOLDER metadata/ILSVRC     train, test; val
                                                   with val2 and --v2-boxes ImageNetV2_boxes.txt
    python -m data_tools.wsol_data openimages OpenImages metadata/OpenImages    all splits
    python -m data_tools.wsol_data own IMAGES annotations.csv metadata/mine/test
                                                   path,class,x0,y0,x1,y1 or path,class,mask
    python -m data_tools.wsol_data check metadata/CUB/val [--images dataset/CUB]

The boxes of CUBV2 only come as metadata: the released CUBV2_boxes.txt holds width and height in its
last two columns and internal numbers for images.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Container, Iterable, Iterator
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.files import read_lines, write_whole
from data_tools.loader import (IMAGENET_MEAN, IMAGENET_STD, BadImage, Loader,  # noqa: F401
                               decode, open_image, open_stored, to_tensor)

IMAGES = (".jpg", ".jpeg", ".png")


@dataclass
class Split:
    """image_ids in order; labels {id: int}; sizes {id: (width, height)}; boxes {id: int64 [k, 4]};
    masks {id: paths}; ignore {id: path of the ignore mask}. What a split does not have is empty."""
    image_ids: list[str]
    labels: dict[str, int]
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    boxes: dict[str, np.ndarray] = field(default_factory=dict)
    masks: dict[str, list[str]] = field(default_factory=dict)
    ignore: dict[str, str] = field(default_factory=dict)

    def subset(self, image_ids: Iterable[str]) -> "Split":
        """The split of these images."""
        ids = list(image_ids)
        if unknown := [i for i in ids if i not in self.labels]:
            raise ValueError(f"{len(unknown)} image ids are not in the split, first {unknown[0]!r}")
        if twice := [i for i, times in Counter(ids).items() if times > 1]:
            raise ValueError(f"{len(twice)} image ids are chosen twice, first {twice[0]!r}")
        parts = {name: {i: getattr(self, name)[i] for i in ids if i in getattr(self, name)}
                 for name in ("labels", "sizes", "boxes", "masks", "ignore")}
        return replace(self, image_ids=ids, **parts)

    def per_class(self, count: int, seed: int = 0, short: str = "raise") -> "Split":
        """`count` random images of each class, 0: all. A class with fewer is an error, or with
        short="take" taken whole (CUBV2 has classes of three and four images)."""
        if count < 0 or short not in ("raise", "take"):
            raise ValueError('count must be >= 0 and short "raise" or "take", '
                             f"got {count} and {short!r}")
        if count == 0:
            return self
        rng, groups = np.random.default_rng(seed), {}
        for image_id in self.image_ids:
            groups.setdefault(self.labels[image_id], []).append(image_id)
        few = {label: len(ids) for label, ids in groups.items() if len(ids) < count}
        if few and short == "raise":
            label, have = min(few.items())
            raise ValueError(f"{len(few)} classes have fewer than {count} images (class {label}: "
                             f'{have}); use fewer, 0 for all, or short="take"')
        chosen = set()
        for _, ids in sorted(groups.items()):
            chosen.update(ids[k] for k in rng.permutation(len(ids))[:count])
        return self.subset(i for i in self.image_ids if i in chosen)


# ------------------------------------------------------------------------------------- reading

class _Lines:
    """Rows of a metadata file; `fail` names the file and the line of the current row."""

    def __init__(self, path: Path, fields: tuple[int, ...], known: Container[str] | None = None):
        self.path, self.fields, self.known, self.place = path, fields, known, str(path)

    def __iter__(self) -> Iterator[list[str]]:
        for self.place, line in read_lines(self.path):
            row = [part.strip() for part in line.split(",")]
            if len(row) not in self.fields:
                self.fail(f"{' or '.join(map(str, self.fields))} fields separated by commas "
                          f"expected, got {line!r}")
            if self.known is not None and row[0] not in self.known:
                self.fail(f"image {row[0]!r} is not in image_ids.txt")
            yield row

    def fail(self, message: str) -> None:
        raise ValueError(f"{self.place}: {message}")

    def integers(self, values: list[str], name: str) -> list[int]:
        """Numbers as whole pixels: what follows the point is cut."""
        try:
            return [int(float(value)) for value in values]
        except (ValueError, OverflowError):
            self.fail(f"{name} must be numbers, got {','.join(values)!r}")

    def inside(self, box: Iterable[float], size: tuple[int, int]) -> tuple[int, ...]:
        try:
            return _inside(box, size)
        except ValueError as error:
            self.fail(str(error))


def _inside(box: Iterable[float], size: tuple[int, int]) -> tuple[int, ...]:
    """The part of a box that lies in the image; ValueError if there is none."""
    x0, y0, x1, y1 = box = tuple(map(int, box))
    part = max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])
    if part[0] > part[2] or part[1] > part[3]:
        raise ValueError(f"box {','.join(map(str, box))} has no part in the image of "
                         f"{size[0]} x {size[1]}")
    return part


def read_split(folder: str | Path, proxy: bool = False, image_root: str | Path | None = None,
               mask_root: str | Path | None = None, outside: str = "raise") -> Split:
    """Read and check a folder of metadata; ValueError with file and line for the first thing wrong.

    proxy: the images of image_ids_proxy.txt only. image_root, mask_root: check that every image
    (mask) is there. outside: what to do with a box that leaves its image, "raise" or "clip"."""
    folder = Path(folder)
    if not (folder / "image_ids.txt").exists():
        raise FileNotFoundError(f"{folder / 'image_ids.txt'}: no such file; a split is a folder "
                                "with class_labels.txt, image_sizes.txt and localization.txt, too")
    image_ids = _read_ids(folder / "image_ids.txt", image_root)
    known = set(image_ids)
    labels = {}
    for row in (lines := _Lines(folder / "class_labels.txt", (2,), known)):
        if row[0] in labels:
            lines.fail(f"image {row[0]!r} has two labels")
        if not re.fullmatch("[0-9]{1,9}", row[1]):
            lines.fail(f"label must be an integer >= 0, got {row[1]!r}")
        labels[row[0]] = int(row[1])
    if missing := [i for i in image_ids if i not in labels]:
        raise ValueError(f"{folder / 'class_labels.txt'}: no label for {len(missing)} images, "
                         f"first {missing[0]!r}")
    split = Split(image_ids, labels, _read_sizes(folder, known))
    _read_localization(split, folder, known, mask_root, outside)
    if proxy:
        return split.subset(_read_ids(folder / "image_ids_proxy.txt", None, known))
    return split


def read_boxes(folder: str | Path, outside: str = "raise") -> tuple[dict, dict]:
    """(boxes, sizes) as in a `Split`, from localization.txt and image_sizes.txt alone."""
    split = Split([], {}, _read_sizes(Path(folder)))
    _read_localization(split, Path(folder), outside=outside)
    if not split.boxes:
        raise ValueError(f"{Path(folder) / 'localization.txt'}: holds no box")
    return split.boxes, split.sizes


def _read_ids(path: Path, image_root: str | Path | None,
              known: Container[str] | None = None) -> list[str]:
    ids = {}
    for (image_id,) in (lines := _Lines(path, (1,), known)):
        if image_id in ids:
            lines.fail(f"image {image_id!r} stands twice, first in {ids[image_id]}")
        if image_root is not None and not (Path(image_root) / image_id).is_file():
            lines.fail(f"no image {Path(image_root) / image_id}")
        ids[image_id] = lines.place
    if not ids:
        raise ValueError(f"{path}: holds no image")
    return list(ids)


def _read_sizes(folder: Path, known: Container[str] | None = None) -> dict[str, tuple[int, int]]:
    sizes = {}
    for row in (lines := _Lines(folder / "image_sizes.txt", (3,), known)):
        if row[0] in sizes:
            lines.fail(f"image {row[0]!r} has two sizes")
        width, height = lines.integers(row[1:], "width and height")
        if width < 1 or height < 1:
            lines.fail(f"width and height must be positive, got {width},{height}")
        sizes[row[0]] = (width, height)
    return sizes


def _read_localization(split: Split, folder: Path, known: Container[str] | None = None,
                       mask_root: str | Path | None = None, outside: str = "raise") -> None:
    if outside not in ("raise", "clip"):
        raise ValueError(f'outside must be "raise" or "clip", got {outside!r}')
    boxes: dict[str, list] = {}
    for row in (lines := _Lines(folder / "localization.txt", (3, 5), known)):
        image_id = row[0]
        if len(row) == 3 and boxes or len(row) == 5 and split.masks:
            lines.fail("boxes and masks in one file")
        if len(row) == 3:
            _, mask, ignore = row
            if not mask:
                lines.fail("the name of the mask is empty")
            if ignore and image_id in split.masks:
                lines.fail(f"only the first line of image {image_id!r} may name an ignore mask")
            for name in filter(None, (mask, ignore)):
                if mask_root is not None and not (Path(mask_root) / name).is_file():
                    lines.fail(f"no mask {Path(mask_root) / name}")
            split.masks.setdefault(image_id, []).append(mask)
            if ignore:
                split.ignore[image_id] = ignore
            continue
        x0, y0, x1, y1 = lines.integers(row[1:], "box")
        if x1 < x0 or y1 < y0:
            lines.fail(f"box must have x0 <= x1 and y0 <= y1, got {x0},{y0},{x1},{y1} "
                       "(x0,y0,width,height?)")
        if image_id not in split.sizes:
            lines.fail(f"image {image_id!r} has a box and no line in image_sizes.txt")
        width, height = split.sizes[image_id]
        if min(x0, y0) < 0 or x1 > width or y1 > height:
            if outside == "raise":
                lines.fail(f"box {x0},{y0},{x1},{y1} leaves the image of {width} x {height}")
            x0, y0, x1, y1 = lines.inside((x0, y0, x1, y1), (width, height))
        boxes.setdefault(image_id, []).append((x0, y0, x1, y1))
    split.boxes.update((image_id, np.array(rows, dtype=np.int64))
                       for image_id, rows in boxes.items())


def write_split(folder: str | Path, split: Split) -> None:
    """Write the files that `read_split` reads; what it would refuse or lose is not written."""
    names = [*split.image_ids, *split.ignore.values(), *chain(*split.masks.values())]
    if bad := [name for name in names if "," in name or name.splitlines() != [name]
               or name != name.strip().lstrip("\ufeff")]:
        raise ValueError("names of images and masks must be one line without commas or surrounding "
                         f"blanks, got {bad[0]!r}")
    known, parts = set(split.image_ids), (split.labels, split.sizes, split.boxes, split.masks)
    stray = [i for part in parts for i in part if i not in known]
    if stray or (stray := [i for i in split.ignore if i not in split.masks]):
        raise ValueError(f"{stray[0]!r} is no image of the split, or has only an ignore mask")
    rows = [(i, *box) for i in split.image_ids
            for box in np.asarray(split.boxes.get(i, ())).tolist()]
    rows += [(i, mask, split.ignore.get(i, "") if k == 0 else "")
             for i in split.image_ids for k, mask in enumerate(split.masks.get(i, ()))]
    tables = {"image_ids": [(i,) for i in split.image_ids],
              "class_labels": [(i, split.labels.get(i, "")) for i in split.image_ids],
              "image_sizes": [(i, *split.sizes[i]) for i in split.image_ids if i in split.sizes],
              "localization": rows}
    with TemporaryDirectory() as draft:
        _write_tables(Path(draft), tables)
        try:
            read_split(draft)
        except ValueError as error:
            raise ValueError(f"not written: {str(error).removeprefix(draft + '/')}") from None
    _write_tables(Path(folder), tables)


def _write_tables(folder: Path, tables: dict[str, list[tuple]]) -> None:
    for name, rows in tables.items():
        _write_lines(folder / f"{name}.txt", (",".join(map(str, row)) for row in rows))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


# ------------------------------------------------------------------------------------- images

class SplitImages:
    """The images of a split, as `data_tools.loader.Loader` wants them: the pixels as they are
    stored, to which boxes and sizes belong, whatever orientation EXIF asks for."""

    def __init__(self, split: Split, root: str | Path):
        self.split, self.root = split, Path(root)
        self.labels = np.array([split.labels[i] for i in split.image_ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.split.image_ids)

    def name(self, index: int) -> str:
        return self.split.image_ids[index]

    def open(self, index: int) -> Image.Image:
        return open_stored(self.root / self.name(index))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode(self.open(index)), int(self.labels[index])

    def masks(self, index: int,
              mask_root: str | Path) -> tuple[list[np.ndarray], np.ndarray | None]:
        """(instance masks, ignore mask or None), uint8 of their own sizes: the arguments of
        `get_mask`."""
        image_id = self.name(index)
        ignore = self.split.ignore.get(image_id)
        return ([_read_grey(Path(mask_root) / mask) for mask in self.split.masks.get(image_id, ())],
                None if ignore is None else _read_grey(Path(mask_root) / ignore))


def _read_grey(path: Path) -> np.ndarray:
    return np.asarray(open_image(path, "L"))


class Resize:
    """Both sides to `size`, aspect ratio given up, so that the score map covers the whole image:
    (3, size, size) uint8."""

    def __init__(self, size: int = 224):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an integer >= 1, got {size!r}")
        self.size = size

    def __call__(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB").resize((self.size,) * 2, Image.Resampling.BILINEAR)
        return to_tensor(image)


class TrainResizeCrop(Resize):
    """`Resize` to `resize`, random crop of `size`, horizontal flip: (3, size, size) uint8."""

    def __init__(self, size: int = 224, resize: int = 256, flip: float = 0.5):
        super().__init__(resize)
        if not isinstance(size, int) or not 1 <= size <= resize or not 0 <= flip <= 1:
            raise ValueError("size must be an integer in 1 .. resize and flip in [0, 1], "
                             f"got size={size!r}, resize={resize}, flip={flip}")
        self.crop, self.flip = size, flip

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        x, y, flip = torch.rand(3, generator=generator).tolist()
        room = self.size - self.crop + 1
        top, left = int(y * room), int(x * room)
        out = super().__call__(image)[:, top:top + self.crop, left:left + self.crop]
        return out.flip(2) if flip < self.flip else out


# ----------------------------------------------------------------------------- making metadata

def cub_splits(root: str | Path) -> dict[str, Split]:
    """{"train", "test"} from CUB_200_2011 as it is distributed; train without boxes."""
    from data_tools.cub import CUB                     # which itself needs the classes above
    splits = {}
    for part in ("train", "test"):
        birds = CUB(root, part)
        splits[part] = split = birds.split
        for index, name in enumerate(birds.names):
            split.sizes[name] = birds.open(index).size
            if part == "test":
                try:
                    split.boxes[name] = np.array([_inside(birds.boxes[index], split.sizes[name])])
                except ValueError as error:
                    raise ValueError(f"{birds.folder / 'bounding_boxes.txt'}: image "
                                     f"{birds.ids[index]}: {error}") from None
    return splits


def ilsvrc_splits(root: str | Path, annotations: str | Path,
                  v2_boxes: str | Path | None = None) -> dict[str, Split]:
    """{"train", "test"[, "val"]}: class folders `train`, images `val` with the XML boxes of
    `annotations`; with v2_boxes (ImageNetV2_boxes.txt) also ImageNetV2 in `val2/<class>/`. Classes
    in the order of the sorted wnids."""
    root = Path(root)
    wnids = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train = Split([], {})
    for wnid in wnids:
        for path in sorted((root / "train" / wnid).iterdir()):
            if path.suffix.lower() in IMAGES:
                train.image_ids.append(f"train/{wnid}/{path.name}")
                train.labels[train.image_ids[-1]] = label_of[wnid]
    test = Split([], {})
    for path in sorted((root / "val").iterdir()):
        if path.suffix.lower() not in IMAGES:
            continue
        xml, name = Path(annotations) / f"{path.stem}.xml", f"val/{path.name}"
        try:
            tree = ElementTree.parse(xml).getroot()
            classes = {item.findtext("name") for item in tree.iter("object")}
            size = tuple(int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
            boxes = [_inside([float(item.findtext(f"bndbox/{side}"))
                              for side in ("xmin", "ymin", "xmax", "ymax")], size)
                     for item in tree.iter("object")]
        except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
            raise ValueError(f"{xml}: {error}") from error
        if len(classes) != 1 or not classes <= label_of.keys():
            raise ValueError(f"{xml}: one class of {root / 'train'} expected, "
                             f"got {sorted(map(str, classes))}")
        test.image_ids.append(name)
        test.labels[name] = label_of[classes.pop()]
        test.sizes[name], test.boxes[name] = size, np.array(boxes)
    splits = {"train": train, "test": test}
    if v2_boxes is not None:
        val, boxes = Split([], {}), {}
        for row in (lines := _Lines(Path(v2_boxes), (5,))):
            if row[0] == "image_id":
                continue
            name = row[0] if row[0].startswith("val2/") else f"val2/{row[0]}"
            if name not in val.labels:
                if not (root / name).is_file():
                    lines.fail(f"no image {root / name}")
                val.image_ids.append(name)
                label = name.split("/")[1]
                if not label.isdecimal():
                    lines.fail(f"image must be <class>/<n>.jpeg, got {row[0]!r}")
                val.labels[name], val.sizes[name] = int(label), open_image(root / name).size
            box = lines.inside(lines.integers(row[1:], "box"), val.sizes[name])
            boxes.setdefault(name, []).append(box)
        if not boxes:
            raise ValueError(f"{v2_boxes}: holds no box")
        val.boxes.update((name, np.array(rows)) for name, rows in boxes.items())
        splits["val"] = val
    return splits


def openimages_splits(root: str | Path) -> dict[str, Split]:
    """{"train", "val", "test"} as far as the folders are there; masks are the PNGs beside an image;
    train without."""
    root, splits = Path(root), {}
    for name in ("train", "val", "test"):
        if not (root / name).is_dir():
            continue
        splits[name] = split = Split([], {})
        folders = sorted(path for path in (root / name).iterdir() if path.is_dir())
        for label, folder in enumerate(folders):
            place, masks = f"{name}/{folder.name}", {}
            for path in sorted(folder.glob("*_m*.png")):
                masks.setdefault(path.name.split("_m")[0], []).append(f"{place}/{path.name}")
            for path in sorted(folder.glob("*.jpg")):
                image_id = f"{place}/{path.name}"
                split.image_ids.append(image_id)
                split.labels[image_id] = label
                if name == "train":
                    continue
                if path.stem not in masks:
                    raise ValueError(f"{path}: no mask {path.stem}_m*.png beside it")
                split.masks[image_id] = masks[path.stem]
                if (ignore := folder / f"{path.stem}_ignore.png").is_file():
                    split.ignore[image_id] = f"{place}/{ignore.name}"
    if not splits:
        raise ValueError(f"{root}: none of the folders train, val, test")
    return splits


def own_split(images: str | Path, annotations: str | Path) -> tuple[Split, list[str]]:
    """(split, class names) from a CSV of your own: lines `path,class,x0,y0,x1,y1` or
    `path,class,mask`, several per image."""
    images, names, sizes, rows = Path(images), {}, {}, []
    for row in (lines := _Lines(Path(annotations), (3, 6))):
        if not (images / row[0]).is_file():
            lines.fail(f"no image {images / row[0]}")
        if not row[1]:
            lines.fail("the name of the class is empty")
        if names.setdefault(row[0], row[1]) != row[1]:
            lines.fail(f"image {row[0]!r} was given the class {names[row[0]]!r} before")
        if rows and len(rows[0]) != len(row):
            lines.fail("boxes and masks in one file")
        if len(row) == 3 and not (images / row[2]).is_file():
            lines.fail(f"no mask {images / row[2]}")
        if row[0] not in sizes:
            sizes[row[0]] = open_image(images / row[0]).size
        rows.append(row if len(row) == 3 else [*row[:2], *lines.integers(row[2:], "box")])
        if len(row) == 6:
            x0, y0, x1, y1 = rows[-1][2:]
            width, height = sizes[row[0]]
            if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
                lines.fail(f"box {x0},{y0},{x1},{y1} does not fit the image of {width} x {height}")
    if not rows:
        raise ValueError(f"{annotations}: holds no annotation")
    classes = sorted(set(names.values()))
    split = Split(list(names), {i: classes.index(name) for i, name in names.items()}, sizes)
    for image_id, _, *rest in rows:
        if len(rest) == 1:
            split.masks.setdefault(image_id, []).append(rest[0])
        else:
            split.boxes.setdefault(image_id, []).append(rest)
    split.boxes = {i: np.array(boxes, dtype=np.int64) for i, boxes in split.boxes.items()}
    return split, classes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, places in (("cub", ["root"]), ("ilsvrc", ["root", "annotations"]),
                         ("openimages", ["root"]), ("own", ["images", "annotations"]),
                         ("check", [])):
        command = commands.add_parser(name)
        for place in (*places, "metadata"):
            command.add_argument(place, type=Path)
        if name == "ilsvrc":
            command.add_argument("--v2-boxes", type=Path,
                                 help="ImageNetV2_boxes.txt; the images lie in val2/")
        if name == "check":
            command.add_argument("--images", type=Path)
            command.add_argument("--masks", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "own":
            split, classes = own_split(args.images, args.annotations)
            splits = {"": split}
        elif args.command == "check":
            splits = {"": read_split(args.metadata, image_root=args.images, mask_root=args.masks)}
        elif args.command == "ilsvrc":
            splits = ilsvrc_splits(args.root, args.annotations, args.v2_boxes)
        else:
            splits = (cub_splits if args.command == "cub" else openimages_splits)(args.root)
        for name, split in splits.items():
            if args.command != "check":
                write_split(args.metadata / name, split)
            counts = {"images": len(split.image_ids), "classes": len(set(split.labels.values())),
                      "boxes": sum(map(len, split.boxes.values())),
                      "masks": sum(map(len, split.masks.values()))}
            print(f"{args.metadata / name}:", ", ".join(f"{n} {key}" for key, n in counts.items()))
        if args.command == "own":
            _write_lines(args.metadata / "classes.txt", classes)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
