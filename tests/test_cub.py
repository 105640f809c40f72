"""CUB-200-2011 in its real layout, written small: what is read, what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import cub, loader, wsol_data
from reference import calm

GOLDEN = Path(__file__).parent / "golden" / "calm"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "cub_trait.npz") as file:
        return {key: file[key] for key in file.files}


def write_tree(root, g):
    """The fixture's birds as a CUB_200_2011 folder, attributes.txt and segmentations outside it."""
    files, sizes = [str(name) for name in g["image_files"]], g["image_sizes_wh"]
    classes = sorted({name.split("/")[0] for name in files})
    known = len(g["class_attribute_continuous"])
    classes += [f"{n:03d}.Unseen" for n in range(len(classes) + 1, known + 1)]
    for folder in ("parts", "attributes", "images"):
        (root / folder).mkdir(parents=True)
    table = lambda name, rows: (root / name).write_text("".join(" ".join(map(str, row)) + "\n"
                                                                for row in rows))  # noqa: E731
    table("images.txt", enumerate(files, 1))
    table("classes.txt", enumerate(classes, 1))
    table("image_class_labels.txt",
          ((n, classes.index(name.split("/")[0]) + 1) for n, name in enumerate(files, 1)))
    table("train_test_split.txt", ((n, n % 2) for n in range(1, len(files) + 1)))
    table("bounding_boxes.txt",
          ((n, 2.0, 3.0, w - 5.0, h - 6.0) for n, (w, h) in enumerate(sizes, 1)))
    table("parts/parts.txt", enumerate(map(str, g["part_names"]), 1))
    table("parts/part_locs.txt",
          ((int(row[0]), int(row[1]), row[2], row[3], int(row[4])) for row in g["part_locs"]))
    table("attributes/class_attribute_labels_continuous.txt", g["class_attribute_continuous"])
    table("../attributes.txt", enumerate(map(str, g["attribute_names"]), 1))
    for name, (w, h), values in zip(files, sizes, g["segmentations_padded"]):
        for base, suffix in ((root / "images", ".jpg"), (root.parent / "segmentations", ".png")):
            path = (base / name).with_suffix(suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values[:h, :w]).save(path)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory, golden):
    return write_tree(tmp_path_factory.mktemp("cub") / "CUB_200_2011", golden)


def test_parts_and_masks_are_those_of_the_released_code(tree, golden):
    parts = cub.CUBParts(tree)
    pairs = parts.pairs_by_difference()
    for (i, j), count, members in zip(golden["pairs"].tolist(), golden["pair_num_diff"],
                                      golden["pair_part_membership"]):
        assert (i, j) in pairs[int(count)]
        assert parts.groups((i, j)) == (np.flatnonzero(members) + 1).tolist()
    classes = len(golden["class_attribute_continuous"])
    assert sum(map(len, pairs.values())) == classes * (classes - 1) // 2
    for (pair, image), none, expected in zip(golden["mask_pair_image"], golden["mask_is_none"],
                                             golden["masks"]):
        mask = parts.mask(int(image) + 1, tuple(golden["pairs"][pair]))
        assert (mask is None) == bool(none)
        if mask is not None:
            np.testing.assert_array_equal(mask, expected.astype(bool))
            again = parts.mask(str(golden["image_files"][image]), tuple(golden["pairs"][pair]))
            np.testing.assert_array_equal(mask, again)


def test_other_pairs_than_published_are_noticed(tree):
    parts = cub.CUBParts(tree)
    parts.present, parts.speaks_of = np.zeros((200, 312), bool), np.zeros((312, 7), bool)
    with pytest.warns(UserWarning, match="published are {1: 31, 2: 64, 3: 96}"):
        assert len(parts.pairs_by_difference()[0]) == 19_900


def test_merged_parts_are_those_of_the_module(tree, golden):
    parts = cub.CUBParts(tree, size=60)
    for row, (w, h) in enumerate(golden["image_sizes_wh"]):
        points, seen = parts.points(row)
        expected, ids = calm.merge_cub_parts(parts.located[row], w, h, 60)
        np.testing.assert_array_equal(points[seen], expected.numpy())
        np.testing.assert_array_equal(cub.POINT_GROUPS[seen], ids.numpy())


def test_an_image_without_visible_parts_has_no_mask(tree, golden, tmp_path):
    root = tmp_path / "birds" / "CUB_200_2011"
    shutil.copytree(tree.parent, root.parent)
    rows = [line.split() for line in (root / "parts" / "part_locs.txt").read_text().splitlines()]
    lines = [f"{a} {b} {x} {y} {0 if a == '1' else v}\n" for a, b, x, y, v in rows]
    (root / "parts" / "part_locs.txt").write_text("".join(lines))
    assert all(cub.CUBParts(root).mask(1, tuple(pair)) is None for pair in golden["pairs"])


def test_splits_images_boxes_and_captions(tree, golden):
    whole, train, test = (cub.CUB(tree, split) for split in ("all", "train", "test"))
    assert len(whole) == len(train) + len(test) == len(golden["image_files"])
    assert train.ids.tolist() == whole.ids[::2].tolist()
    assert whole.labels.min() >= 0
    assert test.names == [whole.names[i] for i in range(1, len(whole), 2)]
    w, h = golden["image_sizes_wh"][0]
    assert whole.boxes[0].tolist() == [2, 3, w - 3, h - 3]
    assert whole.segmentation(0).size == (w, h) and whole.segmentation(0).mode == "L"
    image, label = train[0]
    assert image.mode == "RGB" and image.size == (w, h) and label == train.labels[0]
    with pytest.raises(FileNotFoundError, match="text_c10"):
        whole.captions(0)
    path = (tree.parent / "text_c10" / whole.names[0]).with_suffix(".txt")
    path.parent.mkdir(parents=True)
    path.write_text("a small bird\n\nwith a long bill\n")
    with pytest.warns(UserWarning, match="1 blank captions skipped"):
        assert whole.captions(0) == ["a small bird", "with a long bill"]
    assert cub.CUB(tree, captions_of=lambda name: [name]).captions(1) == [whole.names[1]]


def test_batches_through_the_loader(tree):
    batches = loader.Loader(cub.CUB(tree, "train"), 2, transform=wsol_data.Resize(32))
    images, labels = next(iter(batches))
    assert images.shape == (2, 3, 32, 32) and labels.dtype.is_floating_point is False


@pytest.mark.parametrize("path, text, words", [
    ("images.txt", None, "images.txt: no such file"),
    ("images.txt", "1\n", "images.txt:1: 2 fields expected"),
    ("images.txt", "", "images.txt: holds no line"),
    ("images.txt", "1 a\n1 b\n", "images.txt:2: .*stand once; got 1 b"),
    ("images.txt", "1 a\n2 a\n", "images.txt:2: .*stand once; got 2 a"),
    ("images.txt", "1 a\n-2 b\n", "images.txt:2: a number must be an integer"),
    ("classes.txt", "1 a\n3 b\n", "classes.txt:2: number 2 expected, got 3"),
    ("train_test_split.txt", "1 0\n2 2\n", "train_test_split.txt:2: 0..1 expected, got '2'"),
    ("train_test_split.txt", "1 0\n1 1\n", "train_test_split.txt:2: image 1 stands twice"),
    ("image_class_labels.txt", "1 1\n", "image_class_labels.txt: no line for image 2"),
    ("image_class_labels.txt", "1 900\n", "image_class_labels.txt:1: 1..[0-9]+ expected"),
    ("image_class_labels.txt", "99 1\n", "image_class_labels.txt:1: image 99 .*not in images.txt"),
    ("parts/part_locs.txt", "1 1 1 2 1\n\n1 1 x 2 1\n", "part_locs.txt:3: only numbers.*'x'"),
    ("parts/part_locs.txt", "1 1.5 1 2 1\n", "part_locs.txt:1: only numbers.*'1.5'"),
    ("parts/part_locs.txt", "nan 1 1 2 1\n", "part_locs.txt:1: only numbers.*'nan'"),
    ("parts/part_locs.txt", "1 1 inf 2 1\n", "part_locs.txt:1: only finite numbers.*'1 1 inf 2 1'"),
    ("parts/part_locs.txt", "1 16 1.0 2.0 1\n", "part_locs.txt:1: .*part 16 does not exist"),
    ("parts/part_locs.txt", "9999 1 1.0 2.0 1\n", "part_locs.txt:1: image 9999"),
    ("parts/part_locs.txt", "1 1 1 2 1\n1 1 1 2 0\n", "part_locs.txt:2: a part stands once"),
    ("parts/part_locs.txt", "1 1 1 2 3\n", "part_locs.txt:1: .*visible .1. or not .0."),
    ("parts/part_locs.txt", "1 1 1 2 1\n", "part_locs.txt: no line for image 1, part 2"),
    ("../attributes.txt", "2 a\n", "attributes.txt:1: number 1 expected, got 2"),
    ("attributes/class_attribute_labels_continuous.txt", "1 2 3\n",
     "continuous.txt:1: .* fields expected"),
    ("../attributes.txt", None, "attributes.txt: no such file")])
def test_broken_trees_name_the_file(tree, tmp_path, path, text, words):
    root = tmp_path / "birds" / "CUB_200_2011"
    shutil.copytree(tree.parent, root.parent)
    (root / path).unlink()
    if text is not None:
        (root / path).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        cub.CUBParts(root)


def test_bad_images_and_arguments(tree, golden, tmp_path):
    root = tmp_path / "birds" / "CUB_200_2011"
    shutil.copytree(tree.parent, root.parent)
    whole = cub.CUB(root)
    bird = (root.parent / "segmentations" / whole.names[0]).with_suffix(".png")
    Image.new("L", (3, 5)).save(bird)
    with pytest.raises(loader.BadImage, match=f"{bird.name}: its size is .3, 5."):
        whole.segmentation(0)
    shutil.rmtree(root.parent / "segmentations")
    with pytest.raises(loader.BadImage, match="segmentations.tgz"):
        whole.segmentation(0)
    (root / "images" / whole.names[0]).write_bytes(b"none")
    with pytest.raises(loader.BadImage, match=whole.names[0].split("/")[1]):
        whole[0]
    parts = cub.CUBParts(root)
    for call, words in ((lambda: cub.CUB(root, "val"), "split"),
                        (lambda: parts.mask("none.jpg", (1, 2)), "none.jpg"),
                        (lambda: parts.groups((0, 1)), "pair must hold classes"),
                        (lambda: cub.CUBParts(root, 0), "size must be an integer, at least 1"),
                        (lambda: cub.CUBParts(root, 1.5), "size must be an integer, at least 1")):
        with pytest.raises(ValueError, match=words):
            call()
    for lines, words in (("1 2 nan 3 4\n", "bounding_boxes.txt:1: only finite numbers"),
                         ("1 2 3 0 4\n", "bounding_boxes.txt:1: one box of positive sides"),
                         ("1 2 3 4 5\n" * 2, "bounding_boxes.txt:2: one box .*for each image")):
        (root / "bounding_boxes.txt").write_text(lines)
        with pytest.raises(ValueError, match=words):
            whole.boxes
