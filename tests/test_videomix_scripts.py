"""The VideoMix scripts run on their smallest preset and on real frames, survive a kill, and refuse
what does not fit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import synthetic, video_frames

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ("--preset", "tiny", "--threads", "1")


@pytest.fixture
def finish(run_script):
    """finish(out, *arguments): run a script in this process; returns its results."""
    return lambda out, *arguments, script="videomix": run_script(script, out, *TINY, *arguments)


def write_frames(folder, clip):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip.permute(1, 2, 3, 0).numpy(), 1):
        name = folder / video_frames.FRAME.format(number)
        Image.fromarray(np.ascontiguousarray(frame)).save(name)


def test_the_study_survives_a_kill(tmp_path, finish, kill_script):
    one = ("--seeds", 1, "--device", "cpu")
    whole = finish(tmp_path / "whole", *one, "--figures", tmp_path / "figures")
    kill_script("videomix", tmp_path / "part", "S-1.0-4-*.pt", *TINY, *one,
                "--checkpoint-seconds", 0)
    again = finish(tmp_path / "part", *one, "--resume")
    assert again["results"] == whole["results"] and again["tables"] == whole["tables"]
    rows = whole["tables"]["variants"]
    assert {row["augmentation"] for row in rows} == {"none", "S", "T", "ST"}
    assert {row["videos"] for row in rows} == {"own scenes", "class scenes"}
    assert any(row["scene reliance"] != "-" for row in rows)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["videomix_lengths.png"]


def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [BENCHMARKS / "videomix.py", "--preset", "tiny", "--threads", "1", "--device", "cpu"]
    command += ["--seeds", "1", "--table", "ssv2", "--out", tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "videomix.json").read_text())
    assert done.stdout.count("a flip hurts") == 1           # one process prints
    assert [row["augmentation"] for row in found["tables"]["ssv2"]] == ["none", "S", "flip"]


def test_every_augmentation(tmp_path, finish):
    found = finish(tmp_path / "a", "--table", "augmentations", "--seeds", 2, "--figures", tmp_path)
    assert [row["augmentation"] for row in found["tables"]["augmentations"]][4] == "frame CutMix"
    assert len(found["tables"]["augmentations"]) == 12 and len(found["tables"]["variants"]) == 13
    assert all(row["paper"] is None for row in found["tables"]["augmentations"])
    assert (tmp_path / "videomix_mixes.png").exists()


def test_localisation_tables(tmp_path, finish):
    found = finish(tmp_path / "a", "--table", "thumos", "--seeds", 1, "--figures", tmp_path)
    methods = [row["augmentation"] for row in found["tables"]["thumos"]]
    assert methods == ["none", "Mixup", "frame CutMix", "S", "T", "ST"]
    assert all(0 <= seed["mAP@0.5"] <= 100 for seed in found["results"].values())
    assert len(list(tmp_path.glob("videomix_sequence_*.png"))) == 4
    boxes = finish(tmp_path / "b", "--table", "ava", "--seeds", 1)
    assert all(0 <= seed["CAM on actor"] <= 100 for seed in boxes["results"].values())


def test_real_frames(tmp_path, finish, capsys):
    """One folder that is laid out as a classification set, as THUMOS'14 and as AVA."""
    data = synthetic.videos(8, 24, 12, seed=0)
    for i, clip in enumerate(data["videos"]):
        write_frames(tmp_path / "frames" / f"video {i}", clip)
    rows = [(f"frames/video {i}", 12, label) for i, label in enumerate(data["labels"].tolist())]
    (tmp_path / "annotation").mkdir()
    for part, chosen in (("train", range(6)), ("val", range(4, 8))):
        video_frames.write_index(tmp_path / f"{part}.txt", [rows[i] for i in chosen])
        people = [f"video {i},900,0.1,0.1,0.5,0.6,{1 + i % 2},0\n" for i in chosen]
        (tmp_path / f"ava_{part}_v2.2.csv").write_text("".join(people))
        (tmp_path / f"ava_{part}_excluded_timestamps_v2.2.csv").write_text("video 9,0900\n")
    actions = "".join(f'item {{\n  name: "a{k}"\n  id: {k}\n}}\n' for k in (1, 2, 12))
    (tmp_path / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(actions)
    for i, label in enumerate(data["labels"].tolist()):
        write_frames(tmp_path / "frames" / f"v{i}", data["videos"][i])
        part = "val" if i < 5 else "test"
        with open(tmp_path / "annotation" / f"C{label}_{part}.txt", "a") as file:
            file.write(f"v{i} 0.2 0.8\n")
    common = ("--data", tmp_path, "--seeds", 1, "--batch-size", 4, "--epochs", 1, "--fps", 10)
    found = finish(tmp_path / "a", *common, "--table", "ssv2", "--networks", "slowfast18",
                   "--methods", "none", "S", "RandAugment")
    assert [row["augmentation"] for row in found["tables"]["ssv2"]] == ["none", "S", "RandAugment"]
    assert all(0 <= row["top1"] <= row["top5"] <= 100 for row in found["results"].values())
    network = (*common, "--networks", "slowonly18", "--methods", "S")
    found = finish(tmp_path / "b", *network, "--table", "thumos")
    assert set(found["tables"]["thumos"][0]) >= {"mAP@0.1", "mAP@0.9"}
    (weights,) = (tmp_path / "b").glob("S-*.pt")
    found = finish(tmp_path / "c", *network, "--table", "ava", "--inits", weights)
    assert all(0 <= row["mAP@0.5"] <= 100 for row in found["results"].values())
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no parameter fits; the checkpoint holds other.weight"):
        finish(tmp_path / "d", *network, "--table", "ssv2", "--init", tmp_path / "other.pt")

    def refused(words, *arguments):
        with pytest.raises(SystemExit):
            finish(tmp_path / "e", *arguments)
        assert words in capsys.readouterr().err and not (tmp_path / "e").exists()
    refused("a checkpoint for each of", *network, "--table", "ava")
    refused("--inits goes with --table ava", *network, "--inits", weights)
    refused("not slowfast", *common, "--networks", "slowfast18", "--table", "thumos")
    torch.save([1], tmp_path / "list.pt")
    refused("list.pt: holds no state dict", *network, "--init", tmp_path / "list.pt")
    (tmp_path / "ava_val_v2.2.csv").write_text("gone,900,0.1,0.1,0.5,0.6,1,0\n")
    refused("none of the 1 key frames", *network, "--table", "ava", "--inits", weights)
    for folder in (tmp_path / "frames").glob("v[5-7]"):
        shutil.rmtree(folder)
    refused("needs frames of videos of both parts", *network, "--table", "thumos")
    (tmp_path / "val.txt").unlink()
    refused("val.txt: no such file", *network, "--table", "kinetics")


@pytest.mark.parametrize("script, arguments, words", [
    ("videomix", ["--data", ".", "--p", 1.5], "--p must be at most 1"),
    ("videomix", ["--data", ".", "--table", "ava", "--fps", 0], "--fps positive"),
    ("videomix", ["--data", ".", "--methods", "S", "none", "S"], "--methods names one twice"),
    ("videomix", ["--p", 0.5, "--epochs", 3], "--p, --epochs: only with --data"),
    ("videomix", ["--init", "weights.pt"], "--init: only with --data")])
def test_wrong_arguments(tmp_path, finish, capsys, script, arguments, words):
    with pytest.raises(SystemExit) as stop:
        finish(tmp_path / "out", *arguments, script=script)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_speed(tmp_path, finish):
    found = finish(tmp_path, "--device", "cpu", script="speed_videomix")     # a GPU rounds up sizes
    ways = {row["way"]: row for row in found["tables"]["mixing"]}
    assert {"in place", "copy", "flip-based peer"} <= set(ways)
    assert ways["in place"]["peak / cuboids"] <= 1 and len(found["tables"]["loading"]) == 5
