"""Folders, robustness sets, CIFAR pickles, transforms, the loader and packs, on trees written
here."""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import imagenet as data
from data_tools import loader as loading
from data_tools import pack as packs

ROOT = Path(__file__).parents[1]


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


# ------------------------------------------------------------------------------------ folders


def test_folder_order_labels_and_names(tree):
    dataset = data.imagenet(tree, "train")
    assert len(dataset) == 12 and dataset.classes == ["n01", "n02", "n03"]
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [dataset.name(i) for i in (0, 3, 4, 11)] == [
        "n01/n01_0.JPEG", "n01/n01_3.JPEG", "n02/n02_0.JPEG", "n03/n03_3.JPEG"
    ]
    image, label = dataset[5]
    expected = Image.open(tree / "train/n02/n02_1.JPEG").convert("RGB")
    assert label == 1 and np.array_equal(np.asarray(image), np.asarray(expected))


def test_class_subsets(tree):
    assert data.imagenet(tree, classes=2).classes == ["n01", "n02"]
    chosen = data.imagenet(tree, classes=["n03", "n01"])
    assert chosen.classes == ["n01", "n03"] and chosen.labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="no class folder 'n9'"):
        data.imagenet(tree, classes=["n01", "n9"])
    with pytest.raises(ValueError, match="classes=4.*3 class folders"):
        data.imagenet(tree, classes=4)


def test_index_cache_follows_changed_folders(tree, monkeypatch):
    root = tree / "train"
    for folder in root.iterdir():
        os.utime(folder, (1_000_000_000, 1_000_000_000))
    data.ImageFolder(root)
    assert (root / ".image_index.json").exists()
    scanned = []
    original = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(Path(path).name)
                        or original(path))
    data.ImageFolder(root)
    assert scanned == ["train"]  # the class folders are not listed again
    photo(99).save(root / "n02" / "a_new.JPEG")
    os.utime(root / "n02", (1_000_000_100, 1_000_000_100))
    scanned.clear()
    dataset = data.ImageFolder(root)
    assert sorted(scanned) == ["n02", "train"] and len(dataset) == 13
    assert dataset.name(4) == "n02/a_new.JPEG"
    (root / ".image_index.json").write_text("[1, 2")
    assert len(data.ImageFolder(root)) == 13


def test_index_of_just_changed_folders_is_not_trusted(tree):
    data.ImageFolder(tree / "train")
    assert not (tree / "train" / ".image_index.json").exists()


def test_index_goes_elsewhere_when_the_source_is_read_only(tree, tmp_path, monkeypatch):
    root = tree / "train"
    for folder in root.iterdir():
        os.utime(folder, (1_000_000_000, 1_000_000_000))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = Path.write_text

    def refuse(path, *args, **kwargs):
        if path.parent == root:
            raise OSError(30, "Read-only file system")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse)
    data.ImageFolder(root)
    assert len(list((tmp_path / "cache" / "image_index").glob("*.json"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert len(data.ImageFolder(root)) == 12


@pytest.mark.parametrize(
    "mode, suffix", [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG")]
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    (tmp_path / "c").mkdir()
    image = photo(1).convert(mode)
    image.save(tmp_path / "c" / "x.JPEG", suffix, quality=95)  # PNG files called .JPEG too
    out, _ = data.ImageFolder(tmp_path)[0]
    assert out.mode == "RGB" and out.size == (48, 40)
    difference = np.abs(np.asarray(out, int) - np.asarray(image.convert("RGB"), int))
    assert difference.mean() < 4


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    (tmp_path / "c").mkdir()
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "c" / "x.png")
    out, _ = data.ImageFolder(tmp_path)[0]
    assert np.array_equal(np.asarray(out)[..., 1], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    (tmp_path / "c").mkdir()
    image, exif = photo(2), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "c" / "x.jpg", quality=95, exif=exif)
    steps = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
    }
    stored = np.asarray(Image.open(tmp_path / "c" / "x.jpg"))
    dataset = data.ImageFolder(tmp_path)
    expected = steps[orientation](stored)
    assert np.array_equal(np.asarray(dataset[0][0]), expected)
    assert loading.image_size(dataset.open(0)) == expected.shape[1::-1]
    assert np.array_equal(np.asarray(data.ImageFolder(tmp_path, exif=False)[0][0]), stored)


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


def test_bad_images_are_named(tree):
    dataset, expected = damage(tree)
    for index, reason in expected.items():
        with pytest.raises(data.BadImage) as caught:
            dataset[index]
        message = str(caught.value)
        assert message.startswith(str(tree / "train" / dataset.name(index))) and reason in message
        assert "\n" not in message


def test_what_pillow_refuses_in_its_own_ways(tmp_path):
    (tmp_path / "c").mkdir()
    bomb = io.BytesIO()
    Image.new("1", (8, 8)).save(bomb, "PPM")
    (tmp_path / "c" / "a.ppm").write_bytes(bomb.getvalue().replace(b"8 8", b"60000 60000"))
    (tmp_path / "c" / "b.ppm").write_bytes(b"P6\nxx yy\n255\n")
    (tmp_path / "c" / "d.ppm").mkdir()
    dataset = data.ImageFolder(tmp_path)
    for index, reason in enumerate(["exceeds limit", "invalid literal", "Is a directory"]):
        with pytest.raises(data.BadImage, match=f"^{tmp_path}/{dataset.name(index)}: .*{reason}"):
            dataset.open(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_raises_or_leaves_out_bad_images(tree, workers):
    dataset, expected = damage(tree)
    options = dict(transform=data.EvalTransform(16), workers=workers)
    with pytest.raises(data.BadImage) as caught:
        list(data.Loader(dataset, 6, **options))
    assert "n02_0.JPEG" in str(caught.value) and "\n" not in str(caught.value)
    loader = data.Loader(dataset, 4, on_bad_image="skip", **options)
    with pytest.warns(UserWarning, match="4 so far"):
        labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [0] * 4 + [2] * 4 and len(loader.bad_images) == 4


def test_shuffled_loader_replaces_bad_images(tree):
    dataset, _ = damage(tree)
    loader = data.Loader(
        dataset, 4, shuffle=True, on_bad_image="skip", transform=data.TrainTransform(16)
    )
    with pytest.warns(UserWarning):
        batches = list(loader)
    assert [len(images) for images, _ in batches] == [4, 4, 4]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0] * 4 + [2] * 8


def test_layout_errors_say_what_to_do(tree, tmp_path):
    with pytest.raises(ValueError, match="no such folder; expected .*/train/<class>"):
        data.imagenet(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="an empty folder"):
        data.imagenet(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds splits, not classes; pass .*set/train"):
        data.ImageFolder(tree)
    with pytest.raises(ValueError, match="4 images directly in it.*one folder per class"):
        data.ImageFolder(tree / "val" / "n01")
    with pytest.raises(ValueError, match='"train" or "val", got \'test\''):
        data.imagenet(tree, "test")
    (tree / "val" / "n03").rename(tree / "val" / "n04")
    with pytest.raises(ValueError, match="different class folders.*1 only in train.*'n03'"):
        data.imagenet(tree)
    (tree / "train" / "n00").mkdir()
    with pytest.raises(ValueError, match="n00 holds no images"):
        data.ImageFolder(tree / "train")


# ----------------------------------------------------------------------------- other data sets


def test_variants_map_by_wnid_not_by_position(tmp_path):
    wnids = [f"n{i:02d}" for i in range(20)]
    write_tree(tmp_path / "a", ("n03", "n11"), 2, ("all",))
    dataset = data.imagenet_variant(tmp_path / "a/all", "a", wnids)
    assert dataset.labels.tolist() == [3, 3, 11, 11] and dataset.classes == ["n03", "n11"]
    with pytest.raises(ValueError, match="'n11' is none of the 11 known classes"):
        data.imagenet_variant(tmp_path / "a/all", "r", wnids[:11])
    with pytest.raises(ValueError, match="sorted"):
        data.imagenet_variant(tmp_path / "a/all", "sketch", wnids[::-1])
    with pytest.raises(ValueError, match="needs wnids"):
        data.imagenet_variant(tmp_path / "a/all", "a")
    with pytest.raises(ValueError, match="kind must be"):
        data.imagenet_variant(tmp_path / "a/all", "b", wnids)


def test_v2_folders_sort_as_numbers(tmp_path):
    write_tree(tmp_path, ("0", "1", "2", "10", "100"), 1, ("v2",))
    dataset = data.imagenet_variant(tmp_path / "v2", "v2")
    assert dataset.labels.tolist() == [0, 1, 2, 10, 100]
    assert [dataset.name(i) for i in range(5)] == [f"{c}/{c}_0.JPEG" for c in (0, 1, 2, 10, 100)]
    for folder in ("n01", "1000", "07"):
        write_tree(tmp_path, ("7", folder), 1, (f"wrong{folder}",))
        with pytest.raises(ValueError, match=f"'{folder}' has no class number"):
            data.imagenet_variant(tmp_path / f"wrong{folder}", "v2")


def test_imagenet9(tmp_path):
    write_tree(tmp_path, ("00_dog", "01_bird", "08_insect"), 1, ("val",))
    assert data.imagenet_variant(tmp_path / "val", "9").labels.tolist() == [0, 1, 8]
    (tmp_path / "map.json").write_text(
        json.dumps({str(i): -1 if i % 3 else i % 9 for i in range(1000)}))
    groups = data.imagenet9_groups(tmp_path / "map.json")
    assert groups.shape == (1000,) and groups[:4].tolist() == [0, -1, -1, 3]
    with pytest.raises(ValueError, match="1000 classes, expected keys 0 .. 998"):
        data.imagenet9_groups(tmp_path / "map.json", 999)
    for text in ("{", "[1]", '{"a": 1}', '{"0": null}'):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(ValueError, match="map.json: not a map"):
            data.imagenet9_groups(tmp_path / "map.json")
    write_tree(tmp_path, ("00_dog", "09_more"), 1, ("wrong",))
    with pytest.raises(ValueError, match="'09_more' has no class number"):
        data.imagenet_variant(tmp_path / "wrong", "9")


def test_read_wnids(tree, tmp_path):
    assert data.read_wnids(tree) == data.read_wnids(tree / "train") == ["n01", "n02", "n03"]
    (tmp_path / "list.txt").write_text("n2 tench\nn1, goldfish\n\n")
    assert data.read_wnids(tmp_path / "list.txt") == ["n1", "n2"]


def write_cifar(folder, files, key, count=20):
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(0), {}
    for file in files:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, count).tolist()
        batch = {b"data": pixels, key: labels, b"filenames": [b"a.png"] * count}
        (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
        written[file] = pixels, labels
    return written


def test_cifar_pickles(tmp_path):
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    written = write_cifar(tmp_path / "cifar-10-batches-py", files, b"labels")
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        train = data.cifar(root, "cifar10")
        assert len(train) == 100 and train.labels.dtype == np.int64
    pixels, labels = written["data_batch_2"]
    assert train.labels[20:40].tolist() == labels
    assert np.array_equal(train.open(21), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert len(data.cifar(tmp_path, "cifar10", train=False)) == 20
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], b"fine_labels")
    assert len(data.cifar(tmp_path, "cifar100")) == 20
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="data_batch_3 is missing"):
        data.cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    for labels in ([0] * 19, [10] * 20, [-1] * 20, ["a"] * 20, [[1]] * 20, None):
        batch = {b"data": pixels, b"labels": labels}
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(batch))
        with pytest.raises(ValueError, match="data_batch_1: 'labels' are not 20 integers in 0"):
            data.cifar(tmp_path, "cifar10")
    with pytest.raises(ValueError, match='"cifar10" or "cifar100"'):
        data.cifar(tmp_path, "cifar")


def test_pickle_as_python_2_wrote_it(tmp_path):
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    state = (b"(I1\n(I2\nI3\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
             b"I00\nS'abcdef'\ntb")
    (tmp_path / "old").write_bytes(b"(dS'data'\n" + array + state + b"s.")
    loaded = data.load_pickle(tmp_path / "old")
    assert loaded["data"].dtype == np.uint8
    assert loaded["data"].tolist() == [[97, 98, 99], [100, 101, 102]]


class Evil:
    def __reduce__(self):
        return os.system, ("touch EVIL",)


@pytest.mark.parametrize(
    "content", [Evil(), np.array([Evil()]), {"a": Path("x")}, np.array([1 + 2j]), {"x": eval}]
)
def test_unpickler_refuses_everything_else(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_bytes(pickle.dumps({"data": content}))
    with pytest.raises(ValueError, match="not a CIFAR pickle.*refused"):
        data.load_pickle(tmp_path / "bad")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_pickle_errors_name_the_file(tmp_path):
    (tmp_path / "cut").write_bytes(pickle.dumps({"data": b"x" * 1000})[:500])
    with pytest.raises(ValueError, match="cut: not a CIFAR pickle"):
        data.load_pickle(tmp_path / "cut")
    (tmp_path / "list").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="holds a list"):
        data.load_pickle(tmp_path / "list")


def test_array_images(tmp_path):
    images = torch.arange(5 * 3 * 4 * 6, dtype=torch.int64).to(torch.uint8).view(5, 3, 4, 6)
    dataset = data.ArrayImages(images, torch.arange(5))
    loaded = torch.cat([images for images, _ in data.Loader(dataset, 2)])
    assert torch.equal(loaded, images)
    turned = data.Loader(data.ArrayImages(images.permute(0, 2, 3, 1), range(5)), 2)
    assert torch.equal(torch.cat([i for i, _ in turned]), images)
    with pytest.raises(ValueError, match="uint8"):
        data.ArrayImages(images.float(), torch.arange(5))
    with pytest.raises(ValueError, match="5 images but 4 labels"):
        data.ArrayImages(images, torch.arange(4))


# --------------------------------------------------------------------------------- transforms


def test_crop_boxes_follow_the_stated_distribution():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([loading.random_resized_crop_box((640, 480), generator)
                          for _ in range(4000)]).double()
    left, top, width, height = boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 640).all() and (top + height <= 480).all()
    area, aspect = width * height / (640 * 480), width / height
    assert 0.079 < area.min() < 0.09 and area.max() > 0.95
    assert aspect.min() > 0.73 and aspect.max() < 1.36
    assert abs(aspect[area < 0.4].log().mean()) < 0.02  # large crops fit better when they are wide
    inside = (width < 500) & (height < 400)
    assert abs((left / (640 - width))[inside].mean() - 0.5) < 0.02
    assert abs((top / (480 - height))[inside].mean() - 0.5) < 0.02


def test_crop_box_falls_back_to_the_centre():
    assert loading.random_resized_crop_box((1000, 30), torch.Generator()) == (480, 0, 40, 30)
    assert loading.random_resized_crop_box((30, 1000), torch.Generator()) == (0, 480, 30, 40)
    assert loading.random_resized_crop_box((1, 1), torch.Generator()) == (0, 0, 1, 1)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [17, 40, 120, (30, 50)])
def test_crop_resize_agrees_with_pillow(interpolation, size):
    image, box = photo(3, 90, 70), (11, 7, 60, 55)
    rows, columns = (size, size) if isinstance(size, int) else size
    method = {"bicubic": Image.Resampling.BICUBIC,
              "bilinear": Image.Resampling.BILINEAR}[interpolation]
    expected = np.asarray(image.crop((11, 7, 71, 62)).resize((columns, rows), method), int)
    for source in (image, np.asarray(image)):
        out = loading.crop_resize(source, box, size, interpolation=interpolation)
        assert out.dtype == torch.uint8 and out.shape == (3, rows, columns)
        difference = np.abs(out.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 3 and difference.mean() < 0.3
    flipped = loading.crop_resize(image, box, size, interpolation=interpolation, flip=True)
    assert torch.equal(flipped.flip(2), out)


@pytest.mark.parametrize("orientation", [1, 6])
def test_draft_decoding_is_close_and_smaller(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(4, 640, 480).save(tmp_path / "x.jpg", quality=95, exif=exif)

    def opened():
        return Image.open(tmp_path / "x.jpg")

    width, height = loading.image_size(opened())
    assert loading.decode(opened(), (100, 100)).size == (width // 4, height // 4)
    assert loading.decode(opened()).size == (width, height)
    box = (40, 60, 400, 380)
    fast = loading.crop_resize(opened(), box, 64)
    full = loading.crop_resize(loading.decode(opened()), box, 64)
    assert (fast.int() - full.int()).abs().float().mean() < 1.5


def test_encoded_jpeg_decodes_as_pillow_does(tmp_path):
    photo(8, 203, 101).save(tmp_path / "x.jpg", quality=90)
    encoded = loading.EncodedJpeg((tmp_path / "x.jpg").read_bytes(), (203, 101))
    for at_least in (None, (203, 101), (101, 50), (60, 30), (40, 25), (3, 3)):
        expected = loading.decode(Image.open(tmp_path / "x.jpg"), at_least)
        assert np.array_equal(np.asarray(loading.decode(encoded, at_least)), np.asarray(expected))
    whole = np.asarray(loading.decode(encoded))
    for row in (0, 1, 37, 80, 84, 85, 100, 101):
        top = encoded.above(row)
        assert top.size == (203, min(101, row + 4))
        assert np.array_equal(np.asarray(top.decode())[:row], whole[:row])
    box = (150, 3, 50, 40)
    assert torch.equal(loading.crop_resize(encoded, box, 20),
                       loading.crop_resize(Image.fromarray(whole), box, 20))
    for damaged in (encoded.data[:500], b"", b"x" * 500):
        with pytest.raises(data.BadImage):
            loading.decode(loading.EncodedJpeg(damaged, (203, 101)))


def test_train_transform_returns_its_crop(tmp_path):
    image = np.zeros((100, 200, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(100)[:, None], np.arange(200)[None]
    transform = data.TrainTransform(50, scale=(0.3, 0.3), flip=0.0, coords=True)
    out, coords = transform(image, torch.Generator().manual_seed(1))
    top, left, height, width = coords.tolist()
    assert out[0].float().mean() == pytest.approx(100 * (top + height / 2) - 0.5, abs=1)
    assert out[1].float().mean() == pytest.approx(200 * (left + width / 2) - 0.5, abs=1)
    assert height * width == pytest.approx(0.3, abs=0.01)
    same, _ = transform(image, torch.Generator().manual_seed(1))
    assert torch.equal(out, same)
    flip = data.TrainTransform(50, scale=(0.3, 0.3), flip=1.0)(image,
                                                               torch.Generator().manual_seed(1))
    assert torch.equal(flip.flip(2), out)


def test_augmentation_gets_the_image_and_the_generator():
    class Invert:
        generator = None

        def __call__(self, image):
            assert image.size == (8, 8) and self.generator is generator
            return Image.eval(image, lambda value: 255 - value)

    generator = torch.Generator().manual_seed(3)
    augmented = data.TrainTransform(8, augment=Invert())(np.asarray(photo(5)), generator)
    plain = data.TrainTransform(8)(np.asarray(photo(5)), torch.Generator().manual_seed(3))
    assert torch.equal(augmented, 255 - plain)


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (70, 70)])
def test_eval_transform_resizes_then_crops(size):
    image = photo(6, *size)
    rows, columns = int(36 * size[1] / 70), int(36 * size[0] / 70)
    whole = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC), int)
    top, left = round((rows - 32) / 2), round((columns - 32) / 2)
    out = data.EvalTransform(32, crop=0.875)(image)
    difference = np.abs(out.permute(1, 2, 0).numpy() - whole[top : top + 32, left : left + 32])
    assert out.shape == (3, 32, 32) and difference.max() <= 3
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="crop must be"):
            data.EvalTransform(32, crop=bad)
    with pytest.raises(ValueError, match="interpolation must be"):
        data.TrainTransform(32, interpolation="nearest")


def test_pad_crop_transform():
    image = np.asarray(photo(7, 32, 32))
    generator, seen = torch.Generator().manual_seed(0), set()
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    places = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    for _ in range(400):
        out = data.PadCropTransform(flip=0.0)(image, generator)
        seen.add(places[out.permute(1, 2, 0).contiguous().numpy().tobytes()])
    assert len(seen) > 75


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator())
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    expected = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    out = data.normalize(images)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), expected, atol=1e-6)
    with pytest.raises(TypeError, match="must be uint8"):
        data.normalize(out)


# ------------------------------------------------------------------------------------- loader


def equal(first, second):
    return len(first) == len(second) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
        for a, b in zip(first, second)
    )


def test_batches_depend_neither_on_workers_nor_on_the_start(tree):
    dataset = data.imagenet(tree)
    options = dict(transform=data.TrainTransform(16, coords=True), shuffle=True, seed=5)
    plain = data.Loader(dataset, 5, **options)
    first, second = list(plain), list(plain)
    assert len(plain) == 3 and [len(b[1]) for b in first] == [5, 5, 2]
    assert first[0][2].shape == (5, 4)
    assert not equal(first, second)  # every pass is the next epoch
    assert not equal(first, list(data.Loader(dataset, 5, **{**options, "seed": 6})))
    workers = data.Loader(dataset, 5, workers=2, **options)
    assert equal(first, list(workers)) and equal(second, list(workers))
    for loader in (plain, workers):
        loader.set_epoch(1, 2)
        assert len(loader) == 3 and equal(second[2:], list(loader))
        loader.set_epoch(0)
        iterator = iter(loader)
        next(iterator)
        del iterator  # an epoch left early does not disturb the next
        assert equal(second, list(loader))
    with pytest.raises(ValueError, match="an epoch has 3 batches"):
        plain.set_epoch(0, 4)


def test_skipped_batches_are_not_read(tree):
    class Counted:
        def __init__(self, dataset):
            self.dataset, self.labels, self.opened = dataset, dataset.labels, []

        def __len__(self):
            return len(self.dataset)

        def open(self, index):
            self.opened.append(index)
            return self.dataset.open(index)

    counted = Counted(data.imagenet(tree))
    loader = data.Loader(counted, 4, transform=data.EvalTransform(8))
    loader.set_epoch(0, 2)
    list(loader)
    assert counted.opened == [8, 9, 10, 11]


def test_shares_of_the_ranks(tree):
    dataset = data.imagenet(tree)
    dataset.labels = np.arange(12)  # labels show which samples came
    make = lambda rank, **more: data.Loader(  # noqa: E731
        dataset, 2, rank=rank, world_size=5, transform=data.EvalTransform(8), **more
    )
    seen = [torch.cat([labels for _, labels in make(rank)]).tolist() for rank in range(5)]
    assert sorted(sum(seen, [])) == list(range(12)) and seen[0] == [0, 5, 10]
    seen = [torch.cat([labels for _, labels in make(rank, shuffle=True)]).tolist()
            for rank in range(5)]
    assert {len(share) for share in seen} == {3} and set(sum(seen, [])) == set(range(12))
    loaders = [make(rank, shuffle=True, drop_last=True) for rank in range(5)]
    seen = [torch.cat([labels for _, labels in loader]).tolist() for loader in loaders]
    assert {len(loader) for loader in loaders} == {1} and len(set(sum(seen, []))) == 10
    one = data.Loader(dataset, 10, shuffle=True, drop_last=True, transform=data.TrainTransform(8))
    two = [
        next(iter(data.Loader(dataset, 5, rank=r, world_size=2, shuffle=True, drop_last=True,
                              transform=data.TrainTransform(8))))
        for r in range(2)
    ]
    images, labels = next(iter(one))
    assert torch.equal(labels[0::2], two[0][1]) and torch.equal(images[1::2], two[1][0])


def test_sampler_repeats_are_augmented_differently(tree):
    class Thrice:
        def __len__(self):
            return 6

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch] * 3 + [7] * 3)

    loader = data.Loader(data.imagenet(tree), 3, sampler=Thrice(),
                         transform=data.TrainTransform(12))
    loader.set_epoch(2)
    (first, labels), (second, _) = loader
    assert labels.tolist() == [0, 0, 0]
    assert not torch.equal(first[0], first[1]) and not torch.equal(second[0], second[2])


def test_ordinary_transforms_and_array_labels(tree):
    def transform(image):
        assert image.mode == "RGB"
        return torch.full((2,), float(image.width))

    dataset = data.imagenet(tree)
    dataset.labels = torch.arange(36.0).view(12, 3)
    images, labels = next(iter(data.Loader(dataset, 4, transform=transform)))
    assert images[:, 0].tolist() == [48.0, 56.0, 64.0, 72.0] and labels.shape == (4, 3)
    with pytest.raises(ValueError, match="different sizes"):
        list(data.Loader(dataset, 4))


def test_normalised_batches_and_bad_arguments(tree):
    dataset = data.imagenet(tree)
    stats = (data.IMAGENET_MEAN, data.IMAGENET_STD)
    raw = data.Loader(dataset, 4, transform=data.EvalTransform(8), device="cpu")
    done = data.Loader(dataset, 4, transform=data.EvalTransform(8), device="cpu", normalize=stats)
    for (images, _), (floats, _) in zip(raw, done):
        assert torch.equal(data.normalize(images), floats)
    for wrong, message in (
        (dict(batch_size=0), "batch_size"), (dict(rank=1), "rank"),
        (dict(on_bad_image="x"), "on_bad_image"), (dict(workers=-1), "workers"),
    ):
        with pytest.raises(ValueError, match=message):
            data.Loader(dataset, **{"batch_size": 4, **wrong})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(tree):
    options = dict(transform=data.EvalTransform(8),
                   normalize=(data.IMAGENET_MEAN, data.IMAGENET_STD), workers=1)
    dataset = data.imagenet(tree)
    for (a, b), (c, d) in zip(data.Loader(dataset, 4, device="cuda", **options),
                              data.Loader(dataset, 4, **options)):
        assert a.is_cuda and b.is_cuda and torch.allclose(a.cpu(), c,
                                                          atol=1e-6) and torch.equal(b.cpu(), d)


def test_sample_seeds_do_not_collide():
    seeds = {loading.sample_seed(s, e, i, 0) for s in range(3) for e in range(10)
             for i in range(500)}
    assert len(seeds) > 15000 - 3  # 32 bits: 0.03 collisions are expected among 15,000
    assert loading.sample_seed(0, 1) != loading.sample_seed(1, 0)


# -------------------------------------------------------------------------------------- packs


def test_pack_holds_the_files_and_the_same_order(tree, tmp_path):
    packs.pack(tree, tmp_path / "pack", images_per_shard=5, workers=1)
    folder, packed = data.imagenet(tree), data.imagenet(tmp_path / "pack")
    assert len(packed) == 12 and packed.classes == folder.classes
    assert np.array_equal(packed.labels, folder.labels)
    assert [packed.name(i) for i in range(12)] == [folder.name(i) for i in range(12)]
    for index in range(12):  # small upright JPEGs are copied as they are
        assert packed.record(index).tobytes() == (folder.root / folder.name(index)).read_bytes()
    options = dict(transform=data.TrainTransform(16), shuffle=True)
    assert equal(list(data.Loader(folder, 5, **options)),
                 list(data.Loader(packed, 5, workers=1, **options)))
    subset = data.imagenet(tmp_path / "pack", "val", classes=["n03", "n01"])
    assert subset.labels.tolist() == [0] * 4 + [1] * 4 and subset.name(4) == "n03/n03_0.JPEG"
    assert len(pickle.dumps(packed)) < 20000


def test_raw_pack(tree, tmp_path):
    packs.pack(tree, tmp_path / "pack", raw=True, short_side=32, workers=1)
    packed, folder = data.imagenet(tmp_path / "pack"), data.imagenet(tree)
    for index in range(12):
        pixels = packed.open(index)
        assert min(pixels.shape[:2]) == 32 and pixels.dtype == np.uint8
        expected = folder[index][0].resize(pixels.shape[1::-1], Image.Resampling.BICUBIC,
                                           reducing_gap=3.0)
        assert np.array_equal(pixels, np.asarray(expected)) and packed[index][0].mode == "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a read-only map must not make torch warn
        list(data.Loader(packed, 4, transform=data.TrainTransform(16)))
        packed[0]


def test_raw_pack_of_equal_images_is_read_by_batches(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    for i in range(5):
        photo(i, 32, 32).save(tmp_path / "set" / "a" / f"{i}.png")
    packs.pack(tmp_path / "set", tmp_path / "pack", raw=True, workers=1)
    packed, folder = data.imagenet(tmp_path / "pack", "val"), data.ImageFolder(tmp_path / "set")
    assert hasattr(packed, "batch")
    assert equal(list(data.Loader(folder, 2)), list(data.Loader(packed, 2, workers=1)))
    assert len(pickle.loads(pickle.dumps(packed)).batch([1, 2])) == 2


def test_pack_converts_what_is_not_a_plain_jpeg(tmp_path):
    folder = tmp_path / "set" / "c"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(1).save(folder / "0.jpg", quality=95, exif=exif)
    photo(2).convert("CMYK").save(folder / "1.jpg", quality=95)
    photo(3).convert("L").save(folder / "2.png")
    photo(4, 100, 50).save(folder / "3.jpg", quality=95)
    photo(5).save(folder / "4.jpg", quality=95, progressive=True)
    packs.pack(tmp_path / "set", tmp_path / "pack", short_side=40, quality=95, workers=1)
    packed = data.imagenet(tmp_path / "pack", "val")
    sizes = [packed.open(i).size for i in range(5)]
    assert sizes == [(40, 48), (48, 40), (48, 40), (80, 40), (48, 40)]
    for index, (image, _) in enumerate(data.ImageFolder(tmp_path / "set")):
        stored = Image.open(io.BytesIO(packed.record(index)))
        assert stored.format == "JPEG" and stored.mode == "RGB" and "progressive" not in stored.info
        image = image.resize(stored.size, Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(image, int) - np.asarray(packed[index][0], int))
        assert difference.mean() < 3


def run(*arguments, **keywords):
    command = [sys.executable, "-m", "data_tools.imagenet", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **keywords)


def test_command_line_and_damaged_records(tree, tmp_path):
    dst = tmp_path / "pack"
    done = run("pack", tree, dst, "--workers", 1, "--images-per-shard", 6)
    assert done.returncode == 0 and "train 12, val 12 images" in done.stdout, done.stderr
    assert run("verify", dst).stdout.strip() == "all images are whole"
    packed = data.imagenet(dst)
    table = np.load(dst / "train-00001.npz")
    with open(dst / "train-00001.bin", "r+b") as file:
        file.seek(int(table["offset"][2]) + 40)
        file.write(b"\0\0\0\0")
    assert packs.verify(dst) == [f"train/{packed.name(8)}"]
    broken = run("verify", dst)
    assert broken.returncode == 1 and broken.stderr.strip() == f"damaged: train/{packed.name(8)}"
    os.truncate(dst / "val-00000.bin", 100)
    with pytest.raises(ValueError, match="val-00000.bin has 100 bytes instead of"):
        data.imagenet(dst, "val")
    (dst / "train-00000.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="train-00000.npz is damaged"):
        packs.verify(dst)
    (dst / "train-00000.npz").unlink()
    with pytest.raises(ValueError, match="train-00000.npz is missing"):
        packs.verify(dst)
    with pytest.raises(ValueError, match="not a pack"):
        packs.verify(tree)
    header = (dst / "pack.json").read_text()
    for damage in ("", "[1]", header.replace('"n02"', '"n05"'), header.replace("true", "false")):
        (dst / "pack.json").write_text(damage if damage != header else header[:-9])
        with pytest.raises(ValueError, match="pack.json is damaged"):
            packs.verify(dst)
        if not damage.startswith("{"):
            assert "pack.json is damaged" in run("pack", tree, dst).stderr


def test_bad_images_do_not_get_into_a_pack(tree, tmp_path):
    (tree / "train/n02/n02_1.JPEG").write_bytes(b"junk")
    failed = run("pack", tree, tmp_path / "pack", "--workers", 1)
    assert failed.returncode == 1 and "n02_1.JPEG: not an image" in failed.stderr
    assert "--on-bad-image skip" in failed.stderr and failed.stderr.count("\n") == 1
    checked = run("check", tree)
    assert checked.returncode == 1 and "n02_1.JPEG" in checked.stderr
    header = packs.pack(tree, tmp_path / "other", workers=2, on_bad_image="skip",
                        images_per_shard=3)
    assert header["splits"]["train"]["images"] == 11 == len(data.imagenet(tmp_path / "other"))
    with pytest.raises(ValueError, match="other files or options"):
        packs.pack(tree, tmp_path / "other", workers=1, short_side=20)


def test_pack_goes_on_after_a_kill(tmp_path):
    tree, dst = write_tree(tmp_path / "set", count=20), tmp_path / "pack"
    code = (
        "import time; from data_tools import pack; old = pack.encode\n"
        "def slow(*args, **kw): time.sleep(0.02); return old(*args, **kw)\n"
        "pack.encode = slow\n"
        f"pack.pack({str(tree)!r}, {str(dst)!r}, workers=1, images_per_shard=10)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while len(list(dst.glob("*.npz"))) < 3 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in dst.glob("*.npz")}
    assert 3 <= len(kept) < 12
    with pytest.raises(ValueError, match="not finished; run the same pack command again"):
        data.imagenet(dst)
    packs.pack(tree, dst, workers=1, images_per_shard=10)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    packs.pack(tree, tmp_path / "whole", workers=1, images_per_shard=10)
    for path in (tmp_path / "whole").iterdir():
        if path.suffix == ".bin":
            assert path.read_bytes() == (dst / path.name).read_bytes()
    assert packs.verify(dst) == [] and sorted(p.suffix
                                              for p in dst.iterdir()).count(".partial") == 0


def test_full_disk_keeps_finished_shards(tree, tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    packs_dst = tmp_path / "pack"
    command = ("pack", tree, packs_dst, "--workers", 1, "--images-per-shard", 4)
    sizes = [
        sum((tree / "train" / c / f"{c}_{i}.JPEG").stat().st_size for i in range(4))
        for c in ("n01", "n02", "n03")
    ]
    assert max(sizes) < 9000
    photo(1, 800, 800).save(tree / "train/n03/n03_3.JPEG", quality=100, subsampling=0)
    failed = run(*command, "--short-side", 800, preexec_fn=small_disk)
    assert failed.returncode == 1 and failed.stderr.count(
        "\n") == 1 and "free space" in failed.stderr
    assert {p.name for p in packs_dst.glob("*.bin*")} == {"train-00000.bin", "train-00001.bin"}
    assert run(*command, "--short-side", 800).returncode == 0 and packs.verify(packs_dst) == []


def test_output_that_cannot_be_written(tree, tmp_path):
    (tmp_path / "file").write_text("x")
    failed = run("pack", tree, tmp_path / "file" / "pack")
    assert failed.returncode == 1 and "choose another folder" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_pack_arguments(tree, tmp_path):
    for wrong in (dict(short_side=0), dict(quality=101), dict(images_per_shard=0),
                  dict(on_bad_image="x")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            packs.pack(tree, tmp_path / "pack", **wrong)
    with pytest.raises(ValueError, match="holds the splits train, val, not 'test'"):
        packs.pack(tree, tmp_path / "pack", workers=1)
        packs.PackedImages(tmp_path / "pack", "test")
    header = json.loads((tmp_path / "pack/pack.json").read_text())
    (tmp_path / "pack/pack.json").write_text(json.dumps({**header, "version": 9}))
    with pytest.raises(ValueError, match="pack version 9"):
        data.imagenet(tmp_path / "pack")
    with pytest.raises(ValueError, match="is a pack.*exif must be True"):
        data.imagenet(tmp_path / "pack", exif=False)
