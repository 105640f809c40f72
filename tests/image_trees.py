"""Small image folders in ImageNet's layout, whole and damaged, for several test files."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import imagenet as data


def photo(seed, width=48, height=40):
    """A smooth random RGB image, so that JPEG changes it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_tree(root, classes=("n01", "n02", "n03"), count=4, splits=("train", "val")):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = photo(100 * s + 10 * c + i, 48 + 8 * i, 40 + 4 * c)
                image.save(root / split / name / f"{name}_{i}.JPEG", quality=95)
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "set")


def damage(tree):
    """Four kinds of unreadable file; returns their names and what the message must say."""
    folder = tree / "train" / "n02"
    whole = (folder / "n02_0.JPEG").read_bytes()
    (folder / "n02_0.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "n02_1.JPEG").write_bytes(b"")
    (folder / "n02_2.JPEG").write_text("<html>404</html>")
    dataset = data.ImageFolder(tree / "train")
    (folder / "n02_3.JPEG").unlink()
    return dataset, {4: "truncated", 5: "empty file", 6: "not an image", 7: "No such file"}


def equal(first, second):
    return len(first) == len(second) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
        for a, b in zip(first, second)
    )
