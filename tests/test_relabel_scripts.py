"""The ReLabel scripts run on their smallest preset, survive a kill, and refuse what does not fit."""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(script, out, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--preset", "tiny", "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(script, out, *arguments, code=0):
    process = start(script, out, *arguments)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == code, text[-2000:]
    return text if code else json.loads((out / f"{script}.json").read_text())


def test_the_study_survives_a_kill(tmp_path):
    methods = ("--methods", "one-hot", "relabel", "--threads", "1")
    accuracies = lambda results: [{k: v for k, v in row.items() if k != "ms per step"} for row in results["results"].values()]      # noqa: E731
    whole = finish("relabel_imagenet", tmp_path / "whole", *methods)
    process = start("relabel_imagenet", tmp_path / "part", *methods, "--checkpoint-seconds", "0")
    while process.poll() is None and not list((tmp_path / "part").glob("relabel-seed0-*.pt")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert accuracies(finish("relabel_imagenet", tmp_path / "part", *methods, "--resume")) == accuracies(whole)


def test_generation_crops_and_speed(tmp_path):
    generated = finish("relabel_generate", tmp_path / "generate", "--threads", "1")
    assert generated["claims"][0]["holds"] and generated["tables"]["store"][0]["images"] == 64
    crops = finish("relabel_crops", tmp_path / "crops", "--figures", str(tmp_path / "figures"))
    assert len(crops["tables"]["crops of a 500 x 375 image"]) == 7 and len(list((tmp_path / "figures").iterdir())) == 2
    speed = finish("speed_relabel", tmp_path / "speed", "--threads", "1")
    assert {row["way"] for row in speed["tables"]["pooling"]} == {"sparse", "dense"}


def test_a_store_of_another_set_is_refused(tmp_path):
    finish("relabel_generate", tmp_path / "generate", "--threads", "1")
    text = finish("relabel_imagenet", tmp_path / "study", "--methods", "relabel", "--store", str(tmp_path / "generate" / "store"), code=1)
    assert "the store holds 64 maps, the training set 128 images" in text and "Traceback" not in text
