"""CUB-200-2011 as it is distributed: images, boxes, parts, attributes, segmentations, captions.

    train = CUB("/data/CUB_200_2011", "train")                # 5,994 images, 200 classes
    loader = Loader(train, 64, transform=TrainResizeCrop(), shuffle=True)       # of wsol_data
    parts = CUBParts("/data/CUB_200_2011")
    parts.pairs_by_difference()[1]                            # 31 pairs: one body part differs
    parts.mask("040.Olive_sided_Flycatcher/x.jpg", (38, 40))  # (224, 224) bool: where they differ

    CUB_200_2011/   images.txt  image_class_labels.txt  train_test_split.txt  bounding_boxes.txt
                    classes.txt  images/<class>/<name>.jpg  parts/{parts,part_locs}.txt
                    attributes/class_attribute_labels_continuous.txt
    attributes.txt                     outside the folder in the archive; also found in the folder
                                       or in attributes/
    segmentations/<class>/<name>.png   an archive of its own; beside the folder or in it
    text_c10/<class>/<name>.txt        ten captions per image, from elsewhere (also below
                                       cvpr2016_cub); likewise

Numbers in the files count from 1. Labels here count from 0, the pairs of classes of `CUBParts` from
1, as in the published evaluation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.captions import cub_caption_lines
from data_tools.files import read_lines
from data_tools.loader import BadImage, open_image
from data_tools.wsol_data import Split, SplitImages

PART_COUNT = 15
PUBLISHED_PAIRS = {1: 31, 2: 64, 3: 96}       # parts that differ: pairs of CUB-200-2011's classes
# Words in an attribute's name, and the group of body parts they speak of, 1 .. 7.
PART_WORDS = (("bill", "crown", "eye", "forehead", "head", "nape", "throat"), ("back",), ("belly",),
              ("breast",), ("tail",), ("leg",), ("wing",))
HEAD_PARTS = np.array([2, 5, 6, 7, 10, 11, 15]) - 1
# The other points in the order that decides ties: back, belly, breast, tail, legs, wings.
OTHER_PARTS = np.array([1, 3, 4, 14, 8, 12, 9, 13]) - 1
POINT_GROUPS = np.array([1, 2, 3, 4, 5, 6, 6, 7, 7], dtype=np.uint8)


def _lines(path: Path, fields: int, last_is_text: bool = False) -> Iterator[tuple[str, list[str]]]:
    """("file:line", its `fields`) of a text file's lines; an error names the file and the line."""
    missing = "no such file; CUB_200_2011 is expected as it is distributed"
    for place, line in read_lines(path, missing):
        row = line.split(None, fields - 1) if last_is_text else line.split()
        if len(row) != fields:
            raise ValueError(f"{place}: {fields} fields expected, got {line!r}")
        yield place, row


def _numbered(path: Path, from_one: bool = False) -> dict[str, str]:
    """{number: name} of lines `number name`, each once; from_one: numbers 1, 2, 3, ..."""
    names, seen = {}, set()
    for place, (number, name) in _lines(path, 2, last_is_text=True):
        if not number.isdecimal() or number in names or name in seen:
            raise ValueError(f"{place}: a number must be an integer, it and its name stand once; "
                             f"got {number} {name}")
        if from_one and int(number) != len(names) + 1:
            raise ValueError(f"{place}: number {len(names) + 1} expected, got {number}")
        names[number] = name
        seen.add(name)
    if not names:
        raise ValueError(f"{path}: holds no line")
    return names


def _numbers(path: Path, fields: int, whole: int = 0) -> Iterator[tuple[str, list[float]]]:
    """("file:line", finite numbers) of a table's lines; the first `whole` columns are integers."""
    for place, row in _lines(path, fields):
        try:
            numbers = [*map(int, row[:whole]), *map(float, row[whole:])]
        except ValueError as error:
            raise ValueError(f"{place}: only numbers expected; {error}") from None
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{place}: only finite numbers expected, got {' '.join(row)!r}")
        yield place, numbers


def _beside(root: Path, *names: str) -> Path:
    """The first of root/name, root/../name that exists, else root/name."""
    places = [base / name for name in names for base in (root, root.parent)]
    return next((place for place in places if place.exists()), places[0])


class CUB(SplitImages):
    """A split ("train", "test" or "all") as `data_tools.loader.Loader` wants it.

    Attributes: folder; ids (N,) the numbers of images.txt; names; labels (N,) int64 from 0;
    classes. captions_of: what gives an image's captions from its name (default: the lines of
    text_c10/<class>/<name>.txt). ValueError or FileNotFoundError, with the file, for what is
    missing or broken.
    """

    def __init__(self, root: str | Path, split: str = "all",
                 captions_of: Callable[[str], list[str]] | None = None):
        if split not in ("train", "test", "all"):
            raise ValueError(f"split must be 'train', 'test' or 'all', not {split!r}")
        self.folder = Path(root)
        self.captions_of = captions_of or self._caption_file
        self.classes = list(_numbered(self.folder / "classes.txt", from_one=True).values())
        listed = _numbered(self.folder / "images.txt")
        classes = [str(n + 1) for n in range(len(self.classes))]
        labels = self._by_image("image_class_labels.txt", listed, classes)
        part = self._by_image("train_test_split.txt", listed, ["0", "1"])
        wanted = {"train": (1,), "test": (0,), "all": (0, 1)}[split]
        kept = [number for number in listed if part[number] in wanted]
        self.ids = np.array(kept, dtype=np.int64)
        self.names = [listed[number] for number in kept]
        chosen = Split(self.names, {listed[number]: labels[number] for number in kept})
        super().__init__(chosen, self.folder / "images")

    def _by_image(self, name: str, listed: dict[str, str], values: list[str]) -> dict[str, int]:
        """{image number: place of its value in values} of a file with one line for each image."""
        path, table, place_of = self.folder / name, {}, {text: n for n, text in enumerate(values)}
        for line, (number, text) in _lines(path, 2):
            if number not in listed or number in table:
                raise ValueError(f"{line}: image {number} stands twice, or not in images.txt")
            if text not in place_of:
                raise ValueError(f"{line}: {values[0]}..{values[-1]} expected, got {text!r}")
            table[number] = place_of[text]
        if missing := [number for number in listed if number not in table]:
            raise ValueError(f"{path}: no line for image {missing[0]} ({len(missing)} missing)")
        return table

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) float64 x0, y0, x1, y1 in pixels of the original images."""
        path, rows = self.folder / "bounding_boxes.txt", {}
        for place, (number, x, y, width, height) in _numbers(path, 5, whole=1):
            if number in rows or min(width, height) <= 0:
                raise ValueError(f"{place}: one box of positive sides for each image expected")
            rows[number] = x, y, x + width, y + height
        if missing := [number for number in self.ids if number not in rows]:
            raise ValueError(f"{path}: no box for image {missing[0]} ({len(missing)} missing)")
        return np.array([rows[number] for number in self.ids], dtype=np.float64).reshape(-1, 4)

    def segmentation(self, index: int) -> Image.Image:
        """The bird, mode L, 0 outside; as large as the image."""
        path = _beside(self.folder, "segmentations") / Path(self.names[index]).with_suffix(".png")
        if not path.exists():
            raise BadImage(f"{path}: no such file (an archive of its own, segmentations.tgz)")
        bird, size = open_image(path, "L"), self.open(index).size
        if bird.size != size:
            raise BadImage(f"{path}: its size is {bird.size}, that of the image is {size}")
        return bird

    def captions(self, index: int) -> list[str]:
        return self.captions_of(self.names[index])

    def _caption_file(self, name: str) -> list[str]:
        folder = _beside(self.folder, "text_c10", "cvpr2016_cub/text_c10")
        return cub_caption_lines((folder / name).with_suffix(".txt"), self.folder / "images" / name)


class CUBParts:
    """Where two bird classes differ: body parts by attributes, and masks of them in an image.

    Parts are groups 1 head, 2 back, 3 belly, 4 breast, 5 tail, 6 leg, 7 wing. Every pixel of a
    size x size image belongs to its nearest visible part; a mask holds the pixels of the differing
    parts that lie on the bird. What depends on an image alone is kept for its next pairs.
    """

    def __init__(self, root: str | Path, size: int = 224):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an integer, at least 1, not {size!r}")
        self.cub, self.size = CUB(root), size
        folder = self.cub.folder
        self.row_of = {name: row for row, name in enumerate(self.cub.names)}
        self.row_of |= {int(number): row for row, number in enumerate(self.cub.ids)}
        path = _beside(folder, "attributes/attributes.txt", "attributes.txt")
        self.attributes = list(_numbered(path, from_one=True).values())
        path = folder / "attributes" / "class_attribute_labels_continuous.txt"
        percent = [row for _, row in _numbers(path, len(self.attributes))]
        if len(percent) != len(self.cub.classes):
            raise ValueError(f"{path}: {len(self.cub.classes)} rows expected, one per class, "
                             f"got {len(percent)}")
        self.present = np.array(percent) >= 50                                    # (C, attributes)
        self.speaks_of = np.array([[any(word in name for word in words) for words in PART_WORDS]
                                   for name in self.attributes]).reshape(-1, len(PART_WORDS))
        path = folder / "parts" / "part_locs.txt"
        self.located = np.full((len(self.cub), PART_COUNT, 3), -1.0)              # x, y, visible
        for place, (number, part, *values) in _numbers(path, 5, whole=2):
            if number not in self.row_of or not 1 <= part <= PART_COUNT:
                raise ValueError(f"{place}: image {number}, part {part} does not exist")
            here = self.located[self.row_of[number], part - 1]
            if here[2] >= 0 or values[2] not in (0, 1):
                raise ValueError(f"{place}: a part stands once, visible (1) or not (0)")
            here[:] = values
        if (missing := self.located[..., 2] < 0).any():
            row, part = np.argwhere(missing)[0]
            raise ValueError(f"{path}: no line for image {self.cub.ids[row]}, part {part + 1} "
                             f"({missing.sum()} missing)")
        self._kept = lru_cache(maxsize=8)(self._labels_and_bird)

    def groups(self, pair: tuple[int, int]) -> list[int]:
        """Part groups in which two classes (from 1) differ, ascending."""
        a, b = pair
        if not 1 <= min(a, b) <= max(a, b) <= len(self.present):
            raise ValueError(f"pair must hold classes in 1..{len(self.present)}, not {pair}")
        differ = self.present[a - 1] != self.present[b - 1]
        return (np.flatnonzero(self.speaks_of[differ].any(0)) + 1).tolist()

    def pairs_by_difference(self) -> dict[int, list[tuple[int, int]]]:
        """{number of differing parts: pairs (i, j) of classes, i < j, from 1}.

        Warns when the 200 classes and 312 attributes of CUB-200-2011 do not give PUBLISHED_PAIRS.
        """
        first, second = np.triu_indices(len(self.present), 1)
        differ = (self.present[first] != self.present[second]).astype(np.float32)
        counts = (differ @ self.speaks_of.astype(np.float32) > 0).sum(1)
        pairs = np.stack([first, second], 1) + 1
        found = {n: int((counts == n).sum()) for n in PUBLISHED_PAIRS}
        if self.present.shape == (200, 312) and found != PUBLISHED_PAIRS:
            warnings.warn(f"{self.cub.folder}: pairs by differing parts are {found}, published are "
                          f"{PUBLISHED_PAIRS}; are these the attributes of CUB-200-2011?",
                          stacklevel=2)
        return {int(n): [tuple(pair) for pair in pairs[counts == n].tolist()]
                for n in np.unique(counts)}

    def mask(self, image: str | int, pair: tuple[int, int]) -> np.ndarray | None:
        """(size, size) bool, None where no differing part is visible.

        image: its name, or its number in images.txt. pair: classes from 1.
        """
        if image not in self.row_of:
            raise ValueError(f"image {image!r} is not in {self.cub.folder / 'images.txt'}")
        groups, row = self.groups(pair), self.row_of[image]
        _, seen = self.points(row)
        if not np.isin(POINT_GROUPS[seen], groups).any():
            return None
        labels, bird = self._kept(row)
        return np.isin(labels, groups) & bird

    def points(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Merged points (9, 2) int64 x, y in the resized image, of groups POINT_GROUPS, and which
        of them are visible (9,) bool."""
        with self.cub.open(row) as picture:
            place = self.located[row, :, :2] * (self.size / np.array(picture.size))
        visible = self.located[row, :, 2] > 0
        head = visible[HEAD_PARTS]
        middle = place[HEAD_PARTS][head].mean(0) if head.any() else np.zeros(2)
        points = np.stack([middle, *place[OTHER_PARTS]]).astype(np.int64)         # truncates
        return points, np.array([head.any(), *visible[OTHER_PARTS]])

    def _labels_and_bird(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Part group of each pixel (uint8), and the bird (bool); size x size."""
        points, seen = self.points(row)
        line = np.arange(self.size)
        x, y = points[seen].T[:, :, None]
        distance = ((line - x) ** 2)[:, None, :] + ((line - y) ** 2)[:, :, None]
        labels = POINT_GROUPS[seen][distance.argmin(0)]                           # first of equals
        picture = self.cub.segmentation(row).resize((self.size,) * 2, Image.Resampling.BICUBIC)
        return labels, np.asarray(picture) > 0
