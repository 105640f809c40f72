import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.coco import CocoImages, run_length_mask
from data_tools.loader import BadImage
from reference.relabel import label_pooling

MASK = np.zeros((9, 12), dtype=bool)
MASK[2:7, 3:11], MASK[4, 5], MASK[0, 0] = True, False, True
MASK_TEXT = "01l04XO00MM033000000007"  # what COCO's own tool writes for MASK


def annotation(number, image, category, **more):
    return {"id": number, "image_id": image, "category_id": category, "iscrowd": 0, **more}


def tree(root, change=None):
    """Two images with objects and an empty one; category ids have gaps and are not sorted."""
    for name, size in (("a.png", (40, 20)), ("b.png", (12, 9)), ("c.png", (8, 8))):
        Image.new("RGB", size, (10, 20, 30)).save(root / name)
    sizes = {7: ("a.png", 40, 20), 3: ("b.png", 12, 9), 5: ("c.png", 8, 8)}
    content = {
        "images": [{"id": number, "file_name": name, "width": width, "height": height}
                   for number, (name, width, height) in sizes.items()],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"},
                       {"id": 13, "name": "stop sign"}],
        "annotations": [
            annotation(1, 7, 90, bbox=[0, 0, 20, 20],
                       segmentation=[[0, 0, 20, 0, 20, 20, 0, 20]]),
            annotation(2, 7, 1, bbox=[20, 10, 20, 10]),
            annotation(3, 3, 13, bbox=[0, 0, 11, 7],
                       segmentation={"counts": MASK_TEXT, "size": [9, 12]})]}
    if change:
        change(content)
    path = root / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_labels_and_maps_follow_the_annotations(tmp_path):
    data = CocoImages(tmp_path, tree(tmp_path))
    assert data.classes == ["person", "stop sign", "toothbrush"] and len(data) == 3
    assert data.labels.tolist() == [[True, False, True], [False, True, False], [False] * 3]
    assert data[0][0].size == (40, 20) and data.name(1) == f"{tmp_path.name}/b.png"
    maps = data.label_maps([0, 2], cells=4)
    assert maps.shape == (2, 2, 2, 4, 4) and not maps[1, 0].any()
    scores = {int(maps[0, 1, place, 0, 0]): maps[0, 0, place] for place in range(2)}
    left = torch.tensor([[1.0, 1, 0, 0]] * 4)
    assert torch.equal(scores[2], left)
    below = torch.zeros(4, 4)
    below[2:, 2:] = 1
    assert torch.equal(scores[0], below)
    crops = torch.tensor([[0, 0, 1, 0.25], [0.75, 0.75, 0.25, 0.25], [0, 0.75, 0.25, 0.25]])
    seen = label_pooling(maps[:1].expand(3, -1, -1, -1, -1), crops, 3, softmax=False) > 0
    assert seen.tolist() == [[False, False, True], [True, False, False], [False] * 3]
    assert data.label_maps([], 4).shape == (0, 2, 1, 4, 4)
    assert len(CocoImages(tmp_path, tmp_path / "instances.json", keep_empty=False)) == 2


def test_images_stay_as_their_annotations_see_them(tmp_path):
    data = CocoImages(tmp_path, tree(tmp_path))
    exif = Image.Exif()
    exif[0x0112] = 6                                           # to be shown turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png", exif=exif)
    assert data.open(0).size == data[0][0].size == (40, 20)


def test_run_lengths_as_text_and_as_numbers():
    assert np.array_equal(run_length_mask(MASK_TEXT, 9, 12), MASK)
    flat = np.flatnonzero(np.diff(np.concatenate([[0], MASK.T.ravel(), [2]])))
    counts = np.diff(np.concatenate([[0], flat])).tolist()
    assert np.array_equal(run_length_mask(counts, 9, 12), MASK)
    with pytest.raises(ValueError, match="cover 108 pixels of a 9 x 13 mask"):
        run_length_mask(MASK_TEXT, 9, 13)


def test_shares_of_cells(tmp_path):
    data = CocoImages(tmp_path, tree(tmp_path))
    shares = data._shares(1, {"segmentation": {"counts": MASK_TEXT, "size": [9, 12]}}, 3)
    exact = MASK.reshape(3, 3, 3, 4).mean((1, 3))
    assert np.abs(shares - exact).max() < 0.05
    circle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    ring = np.stack([20 + 8 * np.cos(circle), 10 + 8 * np.sin(circle)], 1)
    shares = data._shares(0, {"segmentation": [ring.ravel().tolist()], "bbox": [12, 2, 16, 16]}, 15)
    assert shares.mean() == pytest.approx(np.pi * 64 / 800, rel=0.03)


def drop(key):
    return lambda content: content.pop(key)


@pytest.mark.parametrize("change, words", [
    (drop("images"), "not in COCO's format"), (drop("annotations"), "not in COCO's format"),
    (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 is of image 99"),
    (lambda c: c["annotations"][2].update(category_id=2), "category 2, one of which is not listed"),
    (lambda c: c["categories"][0].pop("name"), "not in COCO's format: KeyError.'name'"),
    (lambda c: c["images"][1].pop("width"), "not in COCO's format: KeyError.'width'"),
    (lambda c: c["annotations"].append([1]), "not in COCO's format: TypeError"),
    (lambda c: c["images"].append(c["images"][0]), "an image or category id stands twice"),
    (lambda c: c["categories"].append({"id": 1, "name": "x"}), "category id stands twice"),
    (lambda c: c["images"][1].update(width=0), "b.png.* whole, positive sides"),
    (lambda c: c["images"][1].update(width="12"), "b.png.* whole, positive sides"),
    (lambda c: c["images"][1].update(file_name=5), "image .*'id': 3.* needs a file_name"),
    (lambda c: (c["images"].clear(), c["annotations"].clear()), "lists no images")])
def test_broken_annotations_are_named(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        CocoImages(tmp_path, tree(tmp_path, change))


@pytest.mark.parametrize("shape", [
    {"bbox": [0, 0]}, {"segmentation": [[0, 0, 1]]}, {"segmentation": {"counts": [3]}},
    {"segmentation": {"counts": "0~", "size": [9, 12]}}, {"bbox": [0, 0, -1, 5]},
    {"bbox": [0, 0, float("nan"), 5]}, {"segmentation": [[0, 0, float("inf"), 0, 9, 9]]},
    {"segmentation": {"counts": [108], "size": [12, 9]}},
    {"segmentation": {"counts": [10**12], "size": [10**6, 10**6]}}])
def test_broken_outlines_are_named(tmp_path, shape):
    path = tree(tmp_path, lambda c: c["annotations"].append(annotation(8, 3, 1, **shape)))
    with pytest.raises(ValueError, match="instances.json: annotation 8 has a broken bbox or segm"):
        CocoImages(tmp_path, path).label_maps([0, 1], 4)


def test_broken_files_are_named(tmp_path):
    path = tree(tmp_path)
    data = CocoImages(tmp_path, path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="a.png"):
        data.open(0)
    for bad in ({"cells": 4, "k": 4}, {"cells": 0}, {"cells": 4, "share": 1.5}):
        with pytest.raises(ValueError, match="cells must be at least 1, k in 1..3 and share in .0"):
            data.label_maps([0], **bad)
    with pytest.raises(ValueError, match="none: no such folder of images"):
        CocoImages(tmp_path / "none", path)
    path.write_text("{")
    with pytest.raises(ValueError, match="instances.json is not in COCO's format"):
        CocoImages(tmp_path, path)
    with pytest.raises(ValueError, match="no such file"):
        CocoImages(tmp_path, tmp_path / "none.json")
