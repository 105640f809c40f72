"""Packs of image folders: what they hold, damage, interruptions, full disks."""

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
from PIL import Image

from data_tools import imagenet as data
from data_tools import pack as packs
from image_trees import equal, photo, tree, write_tree  # noqa: F401, F811

ROOT = Path(__file__).parents[1]


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
    assert run("pack", tree, tmp_path / "pack", "--on-bad-image", "skip").returncode == 0
    checked = run("check", tree)
    assert checked.returncode == 1 and "n02_1.JPEG" in checked.stderr
    header = packs.pack(tree, tmp_path / "other", workers=2, on_bad_image="skip",
                        images_per_shard=3)
    assert header["splits"]["train"]["images"] == 11 == len(data.imagenet(tmp_path / "other"))
    with pytest.raises(ValueError, match="other files or options"):
        packs.pack(tree, tmp_path / "other", workers=1, short_side=20)
    (tmp_path / "other/pack.json").rename(tmp_path / "other/unfinished.json")
    with pytest.raises(ValueError, match="n02_1.JPEG: .*; an earlier run left this out, remove"):
        packs.pack(tree, tmp_path / "other", workers=1, images_per_shard=3)


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
    (dst / ".val-00001.npz.7.tmp").write_bytes(b"half")
    packs.pack(tree, dst, workers=1, images_per_shard=10)
    (dst / "unfinished.json").write_bytes((dst / "pack.json").read_bytes())   # killed at the end
    packs.pack(tree, dst, workers=1, images_per_shard=10)
    assert not list(dst.glob(".*")) and not (dst / "unfinished.json").exists()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    packs.pack(tree, tmp_path / "whole", workers=1, images_per_shard=10)
    for path in (tmp_path / "whole").iterdir():
        if path.suffix == ".bin":
            assert path.read_bytes() == (dst / path.name).read_bytes()
    assert packs.verify(dst) == []


def test_two_packs_at_once_do_not_mix(tree, tmp_path, monkeypatch):
    dst, original = tmp_path / "pack", packs.encode

    def interrupted(*arguments, **options):             # by another that writes the same shards
        monkeypatch.setattr(packs, "encode", original)
        packs.pack(tree, dst, workers=1)
        return original(*arguments, **options)

    monkeypatch.setattr(packs, "encode", interrupted)
    with pytest.raises(FileNotFoundError):              # its own unfinished file was cleared away
        packs.pack(tree, dst, workers=1)
    assert packs.verify(dst) == [] and len(data.imagenet(dst)) == 12
    assert not list(dst.glob(".*"))


def test_a_pack_does_not_go_among_its_images(tree):
    before = sorted(tree.rglob("*"))
    for dst in (tree, tree / "train", tree / "train" / "pack", tree / "val" / "n01"):
        with pytest.raises(ValueError, match="lies among the images"):
            packs.pack(tree, dst, workers=1)
    assert sorted(tree.rglob("*")) == before
    packs.pack(tree, tree / "pack", workers=1)
    assert len(data.imagenet(tree / "pack")) == len(data.imagenet(tree)) == 12


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
                  dict(workers=0), dict(on_bad_image="x")):
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
