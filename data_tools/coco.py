"""COCO-format annotations for multi-label classification: classes present, and where they are.

    train = CocoImages("coco/train2017", "coco/annotations/instances_train2017.json")
    train.labels[3]                # (80,) bool: the classes annotated in image 3
    train.label_maps([3, 14], 15)  # (2, 2, k, 15, 15), scores 0 or 1: which classes cover a cell
    train.open(3)                  # PIL image, as the other data sets give it to data_tools.loader

A file in COCO's format is one JSON object with "images" (id, file_name, width, height),
"categories" (id, name) and "annotations" (image_id, category_id, bbox [x, y, width, height] in
pixels, segmentation as polygons or run lengths, iscrowd). Category ids may have gaps: class numbers
are their sorted order.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_tools.files import read_text
from data_tools.loader import decode, open_and, open_stored


class CocoImages:
    """Images of a folder with their annotations; keep_empty=False leaves out images without any.

    Attributes: labels (N, C) bool array, classes (names in class order), root, sizes (N, 2) as
    (width, height). ValueError names the file and what is wrong in it.
    """

    def __init__(self, root: str | Path, annotations: str | Path, *, keep_empty: bool = True):
        self.root, self.path = Path(root), Path(annotations)
        try:
            content = json.loads(read_text(self.path))
            images, entries = content["images"], content["annotations"]
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes = [category["name"] for category in categories]
            number_of = {category["id"]: number for number, category in enumerate(categories)}
            objects: dict[int, list] = {image["id"]: [] for image in images}
            for image in images:
                sides = image["width"], image["height"]
                if (not isinstance(image["file_name"], str) or not all(
                        type(side) is int and side > 0 for side in sides)):
                    raise ValueError(f"image {image} needs a file_name and whole, positive sides")
            for entry in entries:
                image, category = entry["image_id"], entry["category_id"]
                if image not in objects or category not in number_of:
                    raise ValueError(f"annotation {entry.get('id')} is of image {image} and "
                                     f"category {category}, one of which is not listed")
                objects[image].append((number_of[category], entry))
            kept = [image for image in images if keep_empty or objects[image["id"]]]
            self._files = [image["file_name"] for image in kept]
            self._objects = [objects[image["id"]] for image in kept]
            self.sizes = np.array([(image["width"], image["height"]) for image in kept], np.int64)
        except FileNotFoundError:
            raise ValueError(f"{self.path}: no such file") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error if type(error) is ValueError else repr(error)
            raise ValueError(f"{self.path} is not in COCO's format: {reason}") from None
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder of images")
        if not kept:
            raise ValueError(f"{self.path} lists no images" + (" with objects" if images else ""))
        if len(objects) < len(images) or len(number_of) < len(categories):
            raise ValueError(f"{self.path}: an image or category id stands twice")
        self.labels = np.zeros((len(kept), len(self.classes)), dtype=bool)
        for row, found in enumerate(self._objects):
            self.labels[row, [number for number, _ in found]] = True

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """`<folder>/<file>`."""
        return f"{self.root.name}/{self._files[index]}"

    def open(self, index: int) -> Image.Image:
        """The stored image, header read. Raises BadImage with the file's name."""
        return open_stored(self.root / self._files[index])

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        return open_and(self, index, decode), self.labels[index]

    def label_maps(self, rows: Iterable[int], cells: int, k: int | None = None,
                   share: float = 0.1) -> torch.Tensor:
        """(n, 2, k, cells, cells) float32 from the masks, as reference/relabel.py pools them.

        Score 1 where a class covers more than `share` of a cell (an outline that touches a cell may
        cover 1/16 of it), 0 elsewhere. k: by default enough for the image with the most classes; of
        more than k classes, the first k are kept.
        """
        rows = list(rows)
        k = int(self.labels[rows].sum(1).max(initial=1)) if k is None else k
        if cells < 1 or not 1 <= k <= len(self.classes) or not 0 <= share < 1:
            raise ValueError(f"cells must be at least 1, k in 1..{len(self.classes)} and share in "
                             f"[0, 1), not {cells}, {k} and {share}")
        out = np.zeros((len(rows), 2, k, cells, cells), dtype=np.float32)
        for at, row in enumerate(rows):
            named = np.argsort(~self.labels[row], kind="stable")[:k]  # those present come first
            out[at, 1] = named.reshape(k, 1, 1)
            place_of = {int(number): place for place, number in enumerate(named)}
            for number, entry in self._objects[row]:
                if number in place_of:
                    try:
                        covered = self._shares(row, entry, cells) > share
                    except (ValueError, KeyError, TypeError) as error:
                        raise ValueError(f"{self.path}: annotation {entry.get('id')} has a broken "
                                         f"bbox or segmentation ({error})") from error
                    out[at, 0, place_of[number]] = np.maximum(out[at, 0, place_of[number]], covered)
        return torch.from_numpy(out)

    def _shares(self, row: int, entry: dict, cells: int, fine: int = 16) -> np.ndarray:
        """(cells, cells) share of each cell under an annotation, counted on fine x fine points.

        Its segmentation counts, or its box where it has none.
        """
        side, shape = cells * fine, entry.get("segmentation")
        scale = side / self.sizes[row]
        if isinstance(shape, dict):
            width, height = self.sizes[row].tolist()
            if list(shape["size"]) != [height, width]:
                raise ValueError(f"a mask of {shape['size']} in an image of {[height, width]}")
            mask = Image.fromarray(run_length_mask(shape["counts"], height, width))
            canvas = mask.resize((side, side), Image.NEAREST)
        else:
            canvas = Image.new("1", (side, side))
            pen = ImageDraw.Draw(canvas)
            if not shape:
                x, y, w, h = entry["bbox"]
                if min(w, h) < 0:
                    raise ValueError(f"a box of {w} x {h}")
                shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            for polygon in shape:
                points = np.reshape(polygon, (-1, 2)) * scale - 0.5  # of pixel centres
                if not np.isfinite(points).all():
                    raise ValueError(f"a corner at {points[~np.isfinite(points)][0]}")
                pen.polygon([tuple(point) for point in points.tolist()], fill=1)
        return np.asarray(canvas).reshape(cells, fine, cells, fine).mean((1, 3))


def run_length_mask(counts: Sequence[int] | str, height: int, width: int) -> np.ndarray:
    """(height, width) bool from COCO's run lengths: column by column, background first.

    counts: the lengths, or COCO's text form (6 bits a character from "0", the top one for "more
    follows"; from the fourth on, each is the difference to the length two before).
    """
    if isinstance(counts, (str, bytes)):
        text = counts.encode() if isinstance(counts, str) else counts
        lengths: list[int] = []
        value = shift = 0
        for code in text:
            bits = code - 48
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                if bits & 16:  # negative: fill up the sign
                    value -= 1 << shift
                lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
                value = shift = 0
        counts = lengths
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    if len(flat) != height * width:
        raise ValueError(f"run lengths cover {len(flat)} pixels of a {height} x {width} mask")
    return flat.reshape(width, height).T
