"""The PiT scripts on their smallest presets and on small trees; a killed run ends alike."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pit_ablation
import pit_imagenet
import pytest
import speed_pit
import torch
from PIL import Image

from reference import resnet

SCRIPT = Path(pit_imagenet.__file__)
TINY = ("--preset", "tiny", "--checkpoint-seconds", "0", "--device", "cpu", "--threads", "1")


@pytest.fixture
def run(run_script, tmp_path):
    """run(script, out, *arguments): its results."""
    return lambda script, out, *arguments: run_script(script.__name__, tmp_path / out, "--device",
                                                      "cpu", *arguments)


def start_process(out, *arguments, launcher=()):
    command = [sys.executable, *launcher, SCRIPT, *TINY, *arguments, "--out", out]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def test_benchmark_killed_at_any_step_resumes_to_the_same_numbers(run, tmp_path):
    arguments = ("--models", "PiT", "ViT", "--drop-path", "0.2", "--recipe", "deit")
    killed = start_process(tmp_path / "killed", *arguments)
    log = tmp_path / "killed" / "ViT-seed0.jsonl"
    step = 1 + time.time_ns() % 9
    while killed.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= step):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    whole = run(pit_imagenet, "whole", *TINY, *arguments)["results"]
    first_model = (tmp_path / "killed" / "PiT-seed0.jsonl").stat().st_mtime_ns
    resumed = run(pit_imagenet, "killed", *TINY, *arguments, "--resume")["results"]
    assert resumed == whole and set(whole) == {"PiT-seed0", "ViT-seed0"}
    assert (tmp_path / "killed" / "PiT-seed0.jsonl").stat().st_mtime_ns == first_model
    weights = [torch.load(tmp_path / name / "ViT-seed0.pt", weights_only=True)["model"]
               for name in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_two_processes_train_the_same_model_as_one(run, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = start_process(tmp_path / "two", "--models", "PiT", launcher=launcher)
    a = run(pit_imagenet, "one", *TINY, "--models", "PiT")["results"]["PiT-seed0"]
    assert two.wait(120) == 0, two.stdout.read()
    b = json.loads((tmp_path / "two" / "pit_imagenet.json").read_text())["results"]["PiT-seed0"]
    assert a["count"] == b["count"] == 50
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    assert b["top1"] == pytest.approx(a["top1"], abs=2)


@pytest.fixture
def tree(tmp_path):
    """A folder in ImageNet's layout: two classes that differ in colour; ImageNet-A and the
    background challenge with one of them."""
    def write(path, label, seed):
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(100, (40, 36, 3), generator=generator, dtype=torch.uint8)
        pixels[..., 2 * label] += 120
        Image.fromarray(pixels.numpy()).save(path)

    for label, wnid in enumerate(("n01", "n02")):
        for split, count in (("train", 6), ("val", 3)):
            for i in range(count):
                write(tmp_path / "data" / split / wnid / f"{i}.JPEG", label, 10 * i + label)
    write(tmp_path / "a" / "n02" / "x.jpg", 1, 21)
    write(tmp_path / "background" / "00_dog" / "x.jpg", 1, 21)
    (tmp_path / "in9.json").write_text(json.dumps({"0": -1, "1": 0}))
    return tmp_path


def test_benchmark_on_a_real_folder_and_evaluation_of_its_checkpoint(tree, run, capsys):
    common = ("--data", tree / "data", "--preset", "small32")
    trained = run(pit_imagenet, "o", *common, "--epochs", 8, "--batch-size", 4, "--models", "PiT",
                  "--figures", tree / "figures")["results"]["PiT-seed0"]
    assert trained["count"] == 6 and trained["top1"] >= 50 and list((tree / "figures").iterdir())
    weights = tree / "o" / "PiT-seed0.pt"
    evaluated = run(pit_imagenet, "e", *common, "--models", "PiT", "--checkpoint", weights,
                    "--imagenet-a", tree / "a", "--background", tree / "background",
                    "--in9-map", tree / "in9.json")
    found = {row["set"]: row["value"] for row in evaluated["tables"]["evaluation"]}
    assert found["top1"] == trained["top1"] and found["FGSM 8/255"] == trained["FGSM 8/255"]
    assert found["ImageNet-A"] == 100 and found["background"] in (0, 100)

    for arguments, message in (
            (("--models", "pit_ti", "--checkpoint", weights), "does not fit pit_ti"),
            (("--models", "resnet"), "no model 'resnet'.*PiT, ViT"),
            (("--models", "pit_ti", "--recipe", "distill", "--batch-size", 4, "--teacher",
              "resnet18", weights), "teacher.*PiT-seed0.pt does not fit resnet18 with 2 classes"),
            (("--models", "pit_ti", "--recipe", "distill", "--batch-size", 4, "--teacher",
              "ResNet", weights), "teacher: no model 'ResNet'"),
            (("--models", "PiT"), "12 samples do not fill a batch of 64")):
        with pytest.raises((SystemExit, ValueError), match=message):
            run(pit_imagenet, "f", *common, *arguments)
    results = run(pit_imagenet, "t", "--data", tree / "data", "--preset", "tiny", "--models", "PiT",
                  "--batch-size", 4)["results"]
    assert results["PiT-seed0"]["count"] == 6
    (tree / "data" / "val" / "n03").mkdir()
    with pytest.raises(ValueError, match="different class folders"):
        run(pit_imagenet, "f", *common)
    for script in (pit_imagenet, pit_ablation):
        with pytest.raises(SystemExit, match="--preset small32 needs --data"):
            run(script, "f", "--preset", "small32")
    data = "--data", tree / "data"
    evaluate = *data, "--checkpoint", weights, "--models", "PiT", "--preset", "small32"
    capsys.readouterr()
    for script, message, *arguments in (
            (pit_imagenet, "only with --data", "--sketch", tree),
            (pit_imagenet, "need --checkpoint", *data, "--sketch", tree),
            (pit_imagenet, "needs one --models", *data, "--checkpoint", weights),
            (pit_imagenet, "--in9-map .* need each other", *evaluate, "--background", tree),
            (pit_imagenet, "--checkpoint evaluates", *evaluate, "--epochs", 3),
            (pit_imagenet, "--checkpoint evaluates", *evaluate, "--teacher", "pit_ti", weights),
            (pit_imagenet, "distill needs --teacher", "--models", "pit_ti", "--recipe", "distill"),
            (pit_imagenet, "--teacher is for --recipe", "--teacher", "pit_ti", weights),
            (pit_imagenet, "names one twice: PiT PiT", "--models", "PiT", "PiT"),
            (speed_pit, "at least 1", "--rounds", 0),
            (speed_pit, "no model 'pit'", "--models", "pit")):
        with pytest.raises(SystemExit, match="2"):
            run(script, "g", *arguments)
        assert re.search(message, capsys.readouterr().err)
    assert not (tree / "g").exists()


def test_distillation_recipe_with_a_teacher(tree, run):
    torch.save(resnet.resnet18(num_classes=2).state_dict(), tree / "teacher.pth")
    results = run(pit_imagenet, "o", "--data", tree / "data", "--preset", "paper", "--image-size",
                  32, "--models", "pit_ti", "--recipe", "distill", "--teacher", "resnet18",
                  tree / "teacher.pth", "--epochs", 1, "--batch-size", 4)["results"]
    assert results["pit_ti_distilled-seed0"]["count"] == 6


def test_ablation(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(pit_ablation, "a", "--imagenet-a", tmp_path)
    assert "unrecognized arguments: --imagenet-a" in capsys.readouterr().err
    tables = run(pit_ablation, "a", "--preset", "tiny", "--epochs", 1, "--figures",
                 tmp_path / "f")["tables"]
    assert [len(tables[name]) for name in ("pooling", "dimensions", "attention")] == [6, 4, 8]
    assert len(list((tmp_path / "f").glob("*.png"))) == 6
    for row in tables["attention"]:
        assert 0.9 < row["entropy / log N"] <= 1 and 0 < row["distance, px"] < 45


def test_speed(run):
    tables = run(speed_pit, "s", "--preset", "tiny", "--threads", 1)["tables"]
    assert {row["pass"] for row in tables["time"]} == {"forward", "training step"}
    assert 0 < tables["memory"][0]["ours / unfused"] < 1
