"""The study's scripts: their tiny presets, a killed run that is resumed, two processes, the speed
script."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


TINY = "--preset", "tiny", "--threads", "1"


@pytest.fixture
def run(run_script):
    return lambda script, out, *arguments: run_script(script, out, *TINY, *arguments)


def test_small_images_resume_to_the_same_figures(tmp_path, run, kill_script):
    methods = ("--methods", "cutout+ls", "fgsm-training", "--seeds", 1)
    whole = run("regularization_cifar100", tmp_path / "whole", *methods, "--figures",
                tmp_path / "figures")
    row = whole["results"]["fgsm-training-seed0"]
    assert 0 <= row["error"] <= 1 and len(row["corruptions"]) == 15
    assert set(row["ood"]) == {"uniform", "gaussian", "shuffled"}
    assert all(Image.open(f).size[0] >= 640 for f in (tmp_path / "figures").iterdir())

    # interrupted in the middle of the second row: the first is kept, the second goes on from its
    # checkpoint
    always = "--checkpoint-seconds", "0"
    kill_script("regularization_cifar100", tmp_path / "part", "fgsm-training-seed0-*.pt", *TINY,
                *methods, *always)
    resumed = run("regularization_cifar100", tmp_path / "part", *methods, *always, "--resume")
    assert resumed["results"] == whole["results"]


def folder(root):
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for label in range(4):
            (root / split / f"n{label}").mkdir(parents=True)
            for k in range(30):
                pixels = rng.randint(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"n{label}" / f"{k}.JPEG")
    return root


def test_image_folders(tmp_path, run):
    data = folder(tmp_path / "data")
    results = run("regularization_cifar100", tmp_path / "a", "--data", data, "--classes", 2,
                  "--methods", "baseline", "--seeds", 1)
    assert "other classes" in results["results"]["baseline-seed0"]["ood"]
    results = run("regularization_imagenet", tmp_path / "b", "--data", data, "--methods",
                  "dropblock")
    assert 0 < results["results"]["dropblock-seed0"]["mce"]


def test_two_processes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "benchmarks" / "regularization_cifar100.py", *TINY, "--methods", "baseline",
         "--seeds", "1", "--device", "cpu", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("grows with severity") == 1, done.stderr
    results = json.loads((tmp_path / "regularization_cifar100.json").read_text())
    assert 0 <= results["results"]["baseline-seed0"]["error"] <= 1


def test_speed_script(tmp_path, run):
    tables = run("speed_corruptions", tmp_path)["tables"]
    assert len(tables["set"]) == 19 and tables["glass"][0]["equal"] is True


def test_wrong_arguments_are_one_line_and_leave_no_folder(tmp_path, capsys, monkeypatch):
    data = str(folder(tmp_path / "data"))
    for made in ("empty", "sets/no images", "pickles/cifar-100-python"):
        (tmp_path / made).mkdir(parents=True)
    for script, *arguments in (
            ("regularization_cifar100", "--methods", "mixup", "mixup"),
            ("regularization_cifar100", "--per-class", "5"),
            ("regularization_cifar100", "--ood", str(tmp_path / "empty")),
            ("regularization_cifar100", "--ood", str(tmp_path / "sets")),
            ("regularization_cifar100", "--data", str(tmp_path / "pickles"), "--per-class", "5"),
            ("regularization_imagenet", "--methods", "mixup", "mixup"),
            ("regularization_imagenet", "--data", data, "--corrupted", str(tmp_path / "empty"))):
        monkeypatch.setattr(sys, "argv", [script])
        with pytest.raises(SystemExit) as left:
            importlib.import_module(script).main([*arguments, "--out", str(tmp_path / "out")])
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_unfit_image_folders_are_named(tmp_path):
    images = folder(tmp_path / "data")
    study = importlib.import_module("regularization_cifar100")
    Image.new("RGB", (40, 20)).save(images / "train" / "n1" / "0.JPEG")
    with pytest.raises(SystemExit, match="train have 2 sizes"):
        study.class_arrays(images, "train", ["n0", "n1"])
