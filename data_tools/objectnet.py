"""ObjectNet (Barbu et al., NeurIPS 2019) with the labels of an ImageNet classifier.

    dataset, valid = objectnet("/data/objectnet-1.0")   # 113 of its 313 objects are in ImageNet
    right = valid[labels, logits.argmax(1)]

The distribution's layout:

    images/<folder>/*.png                       every image with a red border, which is cut off here
    mappings/folder_to_objectnet_label.json     {folder: object}
    mappings/objectnet_to_imagenet_1k.json      {object: "ImageNet name; ImageNet name; ..."}
    mappings/imagenet_to_label_2012_v2          one ImageNet name per line: line i is id i of 2012
    mappings/pytorch_to_imagenet_2012_id.json   {class number: id of 2012}
"""

import json
from pathlib import Path

import torch
from PIL import Image

from data_tools.files import read_text, reading
from data_tools.imagenet import BadImage, ImageFolder, class_folders, decode

BORDER = 2  # pixels


class ObjectNet(ImageFolder):
    """The folders that overlap with ImageNet, labels 0 .. n-1 in sorted order; without border."""

    def open(self, index: int) -> Image.Image:
        image = super().open(index)
        try:
            image = decode(image)               # cropping would decode it, with errors of its own
        except BadImage as error:
            raise BadImage(f"{self.root / self.name(index)}: {error}") from error
        if min(image.size) <= 2 * BORDER:
            raise BadImage(f"{self.root / self.name(index)}: nothing but border, {image.size}")
        return image.crop((BORDER, BORDER, image.width - BORDER, image.height - BORDER))


def objectnet(root: str | Path, num_classes: int = 1000) -> tuple[ObjectNet, torch.Tensor]:
    """The images whose object ImageNet knows, and (n, num_classes) bool: the right classes.

    ValueError names a mapping file that is missing, damaged, or speaks of classes nobody knows.
    """
    root = Path(root)
    labels = _mapping(root, "folder_to_objectnet_label.json", str)
    names_of = _mapping(root, "objectnet_to_imagenet_1k.json", str)
    id_of_number = _mapping(root, "pytorch_to_imagenet_2012_id.json", int)
    with reading(root / "mappings" / "pytorch_to_imagenet_2012_id.json", "{class number: id}"):
        number_of_id = {i: int(number) for number, i in id_of_number.items()}
        if len(number_of_id) < len(id_of_number) or min(number_of_id.values(), default=0) < 0:
            raise ValueError("a number is negative, or an id stands twice")
    names = root / "mappings" / "imagenet_to_label_2012_v2"
    lines = [line.strip() for line in _text(names).splitlines()]
    number_of = {name: number_of_id[i] for i, name in enumerate(lines) if i in number_of_id}
    folders, rows = [], []
    for folder in class_folders(root / "images"):
        if folder not in labels:
            raise ValueError(f"{root / 'images' / folder}: not in folder_to_objectnet_label.json")
        if labels[folder] in names_of:
            known = [name.strip() for name in names_of[labels[folder]].split(";")]
            unknown = [name for name in known if number_of.get(name, num_classes) >= num_classes]
            if unknown:
                raise ValueError(f"objectnet_to_imagenet_1k.json: {unknown[0]!r} (for "
                                 f"{labels[folder]!r}) is none of the {num_classes} classes in "
                                 f"{names.name}")
            folders.append(folder)
            rows.append([number_of[name] for name in known])
    if not folders:
        raise ValueError(f"{root / 'images'}: no folder overlaps with ImageNet's classes")
    valid = torch.zeros(len(folders), num_classes, dtype=torch.bool)
    for row, classes in enumerate(rows):
        valid[row, classes] = True
    return ObjectNet(root / "images", classes=folders), valid


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it comes with ObjectNet") from None


def _mapping(root: Path, name: str, kind: type) -> dict:
    """A JSON object whose values are of this kind."""
    path = root / "mappings" / name
    text = _text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict) or not all(type(item) is kind for item in value.values()):
        raise ValueError(f"{path} must hold one JSON object with values of type {kind.__name__}")
    return value
