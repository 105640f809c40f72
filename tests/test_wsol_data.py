import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import wsol_data as data
from reference import wsol_evaluation as wsol


def picture(path, size=(32, 32), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


def mask(path, box, size=(32, 32)):
    image = np.zeros((size[1], size[0]), np.uint8)
    image[box[1]:box[3], box[0]:box[2]] = 255
    Image.fromarray(image).save(path)


@pytest.fixture
def tree(tmp_path):
    """Images val/<wnid>/val_<n>.JPEG, 32 x 32, and metadata beside them."""
    ids = [f"val/n0{label}/val_{n}.JPEG" for label in range(3) for n in range(4)]
    for n, image_id in enumerate(ids):
        picture(tmp_path / image_id, value=20 * n)
    folder = tmp_path / "metadata" / "val"
    folder.mkdir(parents=True)
    (folder / "image_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    (folder / "image_ids_proxy.txt").write_text("".join(f"{i}\n" for i in ids[::4]))
    (folder / "class_labels.txt").write_text("".join(f"{i},{n // 4}\n" for n, i in enumerate(ids)))
    (folder / "image_sizes.txt").write_text("".join(f"{i},32,32\n" for i in ids))
    boxes = "".join(f"{i},{n},2,{n + 20},32\n" for n, i in enumerate(ids))
    (folder / "localization.txt").write_text(boxes + f"{ids[0]},1,1,5,5\n")
    return tmp_path


def test_read_write_and_evaluate(tree):
    split = data.read_split(tree / "metadata" / "val", image_root=tree)
    assert len(split.image_ids) == 12 and split.labels["val/n02/val_3.JPEG"] == 2
    assert split.boxes["val/n00/val_0.JPEG"].tolist() == [[0, 2, 20, 32], [1, 1, 5, 5]]
    assert split.sizes["val/n01/val_0.JPEG"] == (32, 32)
    data.write_split(tree / "copy", split)
    for name in ("image_ids.txt", "class_labels.txt", "image_sizes.txt"):
        assert (tree / "copy" / name).read_text() == (tree / "metadata/val" / name).read_text()
    again = data.read_split(tree / "copy")
    assert all(np.array_equal(again.boxes[i], split.boxes[i]) for i in split.image_ids)
    assert data.read_split(tree / "metadata/val", proxy=True).image_ids == split.image_ids[::4]
    evaluator = wsol.BoxEvaluator(split.boxes, split.sizes, resize_length=32)
    evaluator.accumulate_batch(torch.ones(12, 32, 32), split.image_ids)
    assert evaluator.compute(strict=True)[0] == 100


def test_images_and_transforms(tree):
    split = data.read_split(tree / "metadata" / "val")
    images = data.SplitImages(split, tree)
    loader = data.Loader(images, 5, transform=data.TrainResizeCrop(24, 28), shuffle=True, seed=1)
    first = list(loader)
    loader.set_epoch(0)
    again = list(loader)
    assert first[0][0].shape == (5, 3, 24, 24) and first[0][0].dtype == torch.uint8
    assert torch.equal(first[1][0], again[1][0])
    loader.set_epoch(0, 2)
    assert torch.equal(next(iter(loader))[1], first[2][1])
    values = {int(image[0, 0, 0]) // 20: label for images_, labels in first
              for image, label in zip(images_, labels)}
    assert all(int(label) == value // 4 for value, label in values.items())
    picture(tree / "wide.png", (40, 10))
    assert data.Resize(16)(Image.open(tree / "wide.png")).shape == (3, 16, 16)
    for call in (lambda: data.TrainResizeCrop(224, 200), lambda: data.TrainResizeCrop(0),
                 lambda: data.TrainResizeCrop(flip=1.5), lambda: data.Resize(0),
                 lambda: data.Resize(2.5)):
        with pytest.raises(ValueError, match="size must be an integer"):
            call()
    exif = Image.Exif()
    exif[0x0112] = 6                                           # to be shown turned by 90 degrees
    Image.new("RGB", (40, 10)).save(tree / split.image_ids[0], exif=exif)
    assert images.open(0).size == images[0][0].size == (40, 10)
    (tree / split.image_ids[0]).write_text("no image")
    with pytest.raises(data.BadImage, match="val_0.JPEG"):
        images[0]


def test_the_random_crop_reaches_every_place_and_flips():
    ramp = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(8, 0))
    generator = torch.Generator().manual_seed(0)
    rows = {tuple(data.TrainResizeCrop(6, 8)(ramp, generator)[0, 0].tolist()) for _ in range(60)}
    assert rows == {tuple(range(s, s + 6))[::way] for s in range(3) for way in (1, -1)}


def test_small_supervision(tree):
    split = data.read_split(tree / "metadata" / "val")
    few = split.per_class(2, seed=3)
    assert sorted(few.labels.values()) == [0, 0, 1, 1, 2, 2]
    assert set(few.boxes) == set(few.image_ids)
    assert few.image_ids == split.per_class(2, seed=3).image_ids
    assert few.image_ids != split.per_class(2, seed=4).image_ids
    assert split.per_class(0) is split
    with pytest.raises(ValueError, match="3 classes have fewer than 5"):
        split.per_class(5)
    assert len(split.per_class(5, short="take").image_ids) == 12
    for ids, message in ((["x"], "first 'x'"), (split.image_ids[:1] * 2, "chosen twice")):
        with pytest.raises(ValueError, match=message):
            split.subset(ids)


@pytest.mark.parametrize("name,line,message", [
    ("image_ids", "val/n00/val_0.JPEG", r"image_ids.txt:13: .* stands twice, first in .*ids.txt:1"),
    ("image_ids", "val/n09/gone.JPEG", r"image_ids.txt:13: no image"),
    ("class_labels", "val/n00/val_0.JPEG,1", r"class_labels.txt:13: .*two labels"),
    ("class_labels", "other.JPEG,1", r"class_labels.txt:13: image 'other.JPEG' is not in image_i"),
    ("class_labels", "val/n00/val_0.JPEG", r"class_labels.txt:13: 2 fields"),
    ("image_sizes", "val/n00/val_0.JPEG,32,32", r"image_sizes.txt:13: .*two sizes"),
    ("localization", "val/n00/val_0.JPEG,1,2,3", r"localization.txt:14: 3 or 5 fields"),
    ("localization", "val/n00/val_0.JPEG,9,2,3,8",
     r"localization.txt:14: box must have x0 <= x1.*9,2,3,8"),
    ("localization", "val/n00/val_0.JPEG,9,2,33,8",
     r"localization.txt:14: box .*leaves the image of 32 x 32"),
    ("localization", "val/n00/val_0.JPEG,9,2,wide,8", r"localization.txt:14: box must be numbers"),
    ("localization", "val/n00/val_0.JPEG,m.png,", r"localization.txt:14: boxes and masks"),
])
def test_errors_name_file_and_line(tree, name, line, message):
    path = tree / "metadata" / "val" / f"{name}.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        data.read_split(tree / "metadata" / "val", image_root=tree)


def test_more_errors_of_metadata(tree):
    folder = tree / "metadata" / "val"
    path = folder / "localization.txt"
    path.write_text(path.read_text() + "val/n00/val_0.JPEG,9,2,40,8\n")
    clipped = data.read_split(folder, outside="clip").boxes["val/n00/val_0.JPEG"]
    assert clipped[-1].tolist() == [9, 2, 32, 8]
    for box in ("40,2,50,8", "-9,2,-3,8", "9,33,20,50"):
        folder.joinpath("localization.txt").write_text(f"val/n00/val_0.JPEG,{box}\n")
        with pytest.raises(ValueError, match=f"localization.txt:1: box {box} has no part"):
            data.read_split(folder, outside="clip")
    with pytest.raises(ValueError, match="outside"):
        data.read_split(folder, outside="ignore")
    labels = folder / "class_labels.txt"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="no label for 1 images, first 'val/n00/val_0.JPEG'"):
        data.read_split(folder)
    for label in ("cat", "-1", "1.0", str(10**20), "\u0661"):
        labels.write_text(f"val/n00/val_0.JPEG,{label}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"class_labels.txt:1: label must be an integer"):
            data.read_split(folder)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="class_labels.txt"):
        data.read_split(folder)
    with pytest.raises(FileNotFoundError, match="image_ids.txt: no such file; a split is a folder"):
        data.read_split(tree)
    with pytest.raises(ValueError, match="commas"):
        data.write_split(tree / "x", data.Split(["a,b.jpg"], {"a,b.jpg": 0}))
    for name in ("", " a", "a\n", "a\rb", "a\u2028b", "\ufeffa"):
        with pytest.raises(ValueError, match="one line"):
            data.write_split(tree / "x", data.Split([name], {name: 0}))
    with pytest.raises(ValueError, match="a,m.png"):
        data.write_split(tree / "x", data.Split(["a"], {"a": 0}, masks={"a": ["a,m.png"]}))
    box, size = {"a": np.array([[0, 0, 2, 2]])}, {"a": (9, 9)}
    for change, message in (({"labels": {"a": -1}}, "not written: class_labels.txt:1: label"),
                            ({"labels": {}}, "class_labels.txt:1"), ({"sizes": {}}, "no line in"),
                            ({"image_ids": ["a", "a"]}, "image_ids.txt:2: image 'a' stands twice"),
                            ({"boxes": {"a": box["a"][:, ::-1]}}, "x0 <= x1"),
                            ({"boxes": box | {"b": box["a"]}}, "'b' is no image of the split"),
                            ({"ignore": {"a": "i.png"}}, "only an ignore mask"),
                            ({"masks": {"a": ["m.png"]}}, "boxes and masks in one file")):
        split = data.Split(**{"image_ids": ["a"], "labels": {"a": 0}, "sizes": size, "boxes": box,
                              **change})
        with pytest.raises(ValueError, match=message):
            data.write_split(tree / "x", split)
    assert not (tree / "x").exists()


def test_boxes_without_ids_and_labels(tree):
    folder = tree / "metadata" / "val"
    whole = data.read_split(folder)
    for name in ("image_ids.txt", "class_labels.txt"):
        (folder / name).unlink()
    boxes, sizes = data.read_boxes(folder)
    assert sizes == whole.sizes and boxes.keys() == whole.boxes.keys()
    assert all(np.array_equal(boxes[i], whole.boxes[i]) for i in boxes)
    for row, message in (("gone.JPEG,1,1,2,2", "localization.txt:1: .* no line in image_sizes.txt"),
                         ("val/n00/val_0.JPEG,1,1,40,2", "localization.txt:1: .*leaves the image"),
                         ("val/n00/val_0.JPEG,m.png,", "localization.txt: holds no box"),
                         ("val/n00/val_0.JPEG,3,1,2,2", "localization.txt:1: box must have")):
        (folder / "localization.txt").write_text(row + "\n")
        with pytest.raises(ValueError, match=message):
            data.read_boxes(folder)
    (folder / "localization.txt").write_text("val/n00/val_0.JPEG,1,1,40,2\n")
    assert data.read_boxes(folder, "clip")[0]["val/n00/val_0.JPEG"].tolist() == [[1, 1, 32, 2]]


def test_openimages(tree, tmp_path):
    root = tmp_path / "OpenImages"
    for part in ("train", "val"):
        for label in ("01226z", "03xyz"):
            picture(root / part / label / "ab.jpg")
    for label in ("01226z", "03xyz"):
        mask(root / "val" / label / f"ab_m{label}_77.png", (2, 2, 9, 9))
    mask(root / "val" / "03xyz" / "ab_m03xyz_88.png", (20, 20, 30, 30))
    mask(root / "val" / "03xyz" / "ab_ignore.png", (0, 0, 4, 4))
    assert data.main(["openimages", str(root), str(tmp_path / "meta")]) == 0
    split = data.read_split(tmp_path / "meta" / "val", image_root=root, mask_root=root)
    assert list(split.labels.values()) == [0, 1] and not split.boxes
    masks, ignore = data.SplitImages(split, root).masks(1, root)
    assert len(masks) == 2 and split.ignore == {"val/03xyz/ab.jpg": "val/03xyz/ab_ignore.png"}
    truth = wsol.get_mask(masks, ignore, 32)
    assert truth[3, 3] == 1 and truth[0, 0] == 255 and truth[25, 25] == 1 and truth[15, 15] == 0
    (root / "val" / "03xyz" / "ab_m03xyz_88.png").unlink()
    with pytest.raises(ValueError, match=r"localization.txt:3: no mask .*_88.png"):
        data.read_split(tmp_path / "meta" / "val", mask_root=root)
    picture(root / "val" / "03xyz" / "cd.jpg")
    with pytest.raises(ValueError, match="cd.jpg: no mask"):
        data.openimages_splits(root)


def test_cub(tmp_path):
    names = ["001.A/a.jpg", "001.A/b.jpg", "002.B/c.jpg"]
    for name in names:
        picture(tmp_path / "images" / name, (50, 40))
    boxes = ["1.0 2.0 30.0 20.0", "5.0 6.0 44.0 35.0", "30.0 27.0 325.0"]
    for file, column in (("images.txt", names), ("classes.txt", ["001.A", "002.B"]),
                         ("image_class_labels.txt", [1, 1, 2]),
                         ("train_test_split.txt", [1, 0, 0]), ("bounding_boxes.txt", boxes)):
        (tmp_path / file).write_text("".join(f"{n} {value}\n" for n, value in enumerate(column, 1)))
    with pytest.raises(ValueError, match=r"bounding_boxes.txt:3: 5 fields"):
        data.cub_splits(tmp_path)
    boxes = tmp_path / "bounding_boxes.txt"
    boxes.write_text(boxes.read_text().replace("325.0", "325.0 9.0"))
    splits = data.cub_splits(tmp_path)
    assert splits["train"].image_ids == names[:1] and not splits["train"].boxes
    assert splits["test"].labels == {names[1]: 0, names[2]: 1}
    assert splits["test"].boxes[names[1]].tolist() == [[5, 6, 49, 40]]          # cut at the image
    assert splits["test"].boxes[names[2]].tolist() == [[30, 27, 50, 36]]
    for file, line, message in (
            ("bounding_boxes.txt", "3 1 2 nan 4", "bounding_boxes.txt:3: only finite numbers"),
            ("bounding_boxes.txt", "3 60 2 9 4", "bounding_boxes.txt: image 3: box 60,2,69,6 has"),
            ("image_class_labels.txt", "3 0", "image_class_labels.txt:3: 1..2 expected, got '0'"),
            ("image_class_labels.txt", "", "image_class_labels.txt: no line for image 3"),
            ("train_test_split.txt", "3 no", "train_test_split.txt:3: 0..1 expected, got 'no'")):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text("".join(text.splitlines(keepends=True)[:2]) + line)
        with pytest.raises(ValueError, match=message):
            data.cub_splits(tmp_path)
        (tmp_path / file).write_text(text)
    boxes.write_text("1 1.0 2.0 30.0 20.0\n")
    with pytest.raises(ValueError, match="bounding_boxes.txt: no box for image 2"):
        data.cub_splits(tmp_path)


def test_ilsvrc_with_v2(tmp_path, capsys):
    root = tmp_path / "ILSVRC"
    for wnid in ("n02", "n01"):
        picture(root / "train" / wnid / f"{wnid}_1.JPEG")
    picture(root / "val" / "ILSVRC2012_val_00000001.JPEG", (60, 50))
    picture(root / "val2" / "1" / "0.jpeg", (30, 20))
    part = ("<object><name>n02</name><bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>60</xmax>"
            "<ymax>9</ymax></bndbox></object>")
    (tmp_path / "ILSVRC2012_val_00000001.xml").write_text(
        "<annotation><size><width>60</width><height>50</height></size>" + part.format(1)
        + part.format(7) + "</annotation>")
    (tmp_path / "boxes.txt").write_text(
        "image_id,x0,y0,x1,y1\n1/0.jpeg,2,3,30,20\n1/0.jpeg,0,0,4,4\n")
    call = ["ilsvrc", str(root), str(tmp_path), str(tmp_path / "meta"), "--v2-boxes",
            str(tmp_path / "boxes.txt")]
    assert data.main(call) == 0
    test = data.read_split(tmp_path / "meta" / "test", image_root=root)
    assert list(test.labels.values()) == [1]
    assert [b.tolist() for b in test.boxes.values()] == [[[1, 2, 60, 9], [7, 2, 60, 9]]]
    val = data.read_split(tmp_path / "meta" / "val", image_root=root)
    assert val.labels == {"val2/1/0.jpeg": 1} and len(val.boxes["val2/1/0.jpeg"]) == 2
    assert not data.read_split(tmp_path / "meta" / "train", image_root=root).boxes
    (tmp_path / "boxes.txt").write_text("1/0.jpeg,40,3,50,20\n")
    with pytest.raises(ValueError, match="boxes.txt:1: box 40,3,50,20 has no part"):
        data.ilsvrc_splits(root, tmp_path, tmp_path / "boxes.txt")
    (tmp_path / "boxes.txt").write_text("image_id,x0,y0,x1,y1\n")
    with pytest.raises(ValueError, match="boxes.txt: holds no box"):
        data.ilsvrc_splits(root, tmp_path, tmp_path / "boxes.txt")
    (tmp_path / "ILSVRC2012_val_00000001.xml").write_text("<annotation>")
    assert data.main(call) == 1
    assert "ILSVRC2012_val_00000001.xml" in capsys.readouterr().err


def test_own_images(tree, tmp_path, capsys):
    csv = tmp_path / "mine.csv"
    csv.write_text("val/n01/val_0.JPEG,dog,1,2,9,9\nval/n00/val_0.JPEG,cat,0,0,32,32\n"
                   "val/n01/val_0.JPEG,dog,4,4,5,5\n")
    assert data.main(["own", str(tree), str(csv), str(tmp_path / "meta")]) == 0
    assert data.main(["check", str(tmp_path / "meta"), "--images", str(tree)]) == 0
    split = data.read_split(tmp_path / "meta")
    assert split.labels == {"val/n01/val_0.JPEG": 1, "val/n00/val_0.JPEG": 0}
    assert len(split.boxes["val/n01/val_0.JPEG"]) == 2
    assert (tmp_path / "meta" / "classes.txt").read_text() == "cat\ndog\n"
    mask(tmp_path / "val/n00/m.png", (1, 1, 5, 5))
    csv.write_text("val/n00/val_0.JPEG,cat,val/n00/m.png\n")
    split, _ = data.own_split(tree, csv)
    assert split.masks == {"val/n00/val_0.JPEG": ["val/n00/m.png"]}
    for row, message in (("gone.jpg,cat,1,1,2,2", "mine.csv:1: no image"),
                         ("val/n00/val_0.JPEG,cat,1,1,2", "mine.csv:1: 3 or 6"),
                         ("val/n00/val_0.JPEG,cat,1,1,99,2", "does not fit"),
                         ("val/n00/val_0.JPEG,,1,1,2,2", "mine.csv:1: the name of the class"),
                         ("val/n00/val_0.JPEG,cat,g.png", "no mask"), ("", "no annotation")):
        csv.write_text(row + "\n")
        with pytest.raises(ValueError, match=message):
            data.own_split(tree, csv)
    csv.write_text("val/n00/val_0.JPEG,cat,1,1,2,2\n", encoding="utf-8-sig")   # as Excel does
    assert data.own_split(tree, csv)[1] == ["cat"]
    csv.write_bytes(b"val/n00/val_0.JPEG,\xff,1,1,2,2\n")
    with pytest.raises(ValueError, match="mine.csv: not UTF-8 text"):
        data.own_split(tree, csv)
    csv.write_text("val/n00/val_0.JPEG,cat,1,1,2,2\nval/n00/val_0.JPEG,dog,1,1,2,2\n")
    assert data.main(["own", str(tree), str(csv), str(tmp_path / "meta")]) == 1
    assert "mine.csv:2" in capsys.readouterr().err
