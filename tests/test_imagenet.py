"""Image folders, robustness sets and CIFAR pickles, on trees written here."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_tools import imagenet as data
from data_tools import loader as loading
from image_trees import damage, photo, tree, write_tree  # noqa: F401, F811


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
    assert dataset.name(-1) == "n03/n03_3.JPEG" and dataset[-12][1] == 0
    for beyond in (12, -13):
        with pytest.raises(IndexError):
            dataset[beyond]


def test_class_subsets(tree):
    assert data.imagenet(tree, classes=2).classes == ["n01", "n02"]
    chosen = data.imagenet(tree, classes=["n03", "n01"])
    assert chosen.classes == ["n01", "n03"] and chosen.labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="no class folder 'n9'"):
        data.imagenet(tree, classes=["n01", "n9"])
    with pytest.raises(ValueError, match="classes=4.*3 class folders"):
        data.imagenet(tree, classes=4)
    for wrong in ("n01", [], True, 1.5):
        with pytest.raises(TypeError, match="classes must be a number or a list of folder names"):
            data.imagenet(tree, classes=wrong)


def test_hidden_files_are_no_images(tree):
    (tree / "train" / "n02" / "._n02_0.JPEG").write_bytes(b"a resource fork")
    assert len(data.ImageFolder(tree / "train")) == 12


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
    original = data.write_whole

    def refuse(path, content):
        if path.parent == root:
            raise OSError(30, "Read-only file system")
        original(path, content)

    monkeypatch.setattr(data, "write_whole", refuse)
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(tmp_path, orientation):
    (tmp_path / "c").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(2).save(tmp_path / "c" / "x.tif", exif=exif)
    dataset = data.ImageFolder(tmp_path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "c" / "x.tif")))
    assert np.array_equal(np.asarray(dataset[0][0]), expected)
    assert loading.image_size(dataset.open(0)) == expected.shape[1::-1]


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
    (tmp_path / "map.json").write_text('{"0": 9, "1": 0}')
    with pytest.raises(ValueError, match="map.json: groups must be -1 .. 8, got 9"):
        data.imagenet9_groups(tmp_path / "map.json", 2)
    write_tree(tmp_path, ("00_dog", "09_more"), 1, ("wrong",))
    with pytest.raises(ValueError, match="'09_more' has no class number"):
        data.imagenet_variant(tmp_path / "wrong", "9")


def test_read_wnids(tree, tmp_path):
    assert data.read_wnids(tree) == data.read_wnids(tree / "train") == ["n01", "n02", "n03"]
    (tmp_path / "list.txt").write_text("n2 tench\nn1, goldfish\n\n")
    assert data.read_wnids(tmp_path / "list.txt") == ["n1", "n2"]
    (tmp_path / "list.txt").write_text("n2\nn1\n", encoding="utf-8-sig")
    assert data.read_wnids(tmp_path / "list.txt") == ["n1", "n2"]
    for text, count in (("", 0), ("n1\nn1\n", 1)):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=f"list.txt: . lines with {count} classes"):
            data.read_wnids(tmp_path / "list.txt")


def write_cifar(folder, files, key, count=20, protocol=2):
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(0), {}
    for file in files:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, count).tolist()
        batch = {b"data": pixels, key: labels, b"filenames": [b"a.png"] * count}
        (folder / file).write_bytes(pickle.dumps(batch, protocol))
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
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], b"fine_labels", protocol=5)
    hundred = data.cifar(tmp_path, "cifar100")
    assert len(hundred) == 20 and np.array_equal(
        hundred.images, written["data_batch_1"][0].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
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
