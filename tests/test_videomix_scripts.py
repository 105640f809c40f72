"""The VideoMix scripts run on their smallest preset and on real frames, survive a kill, and refuse
what does not fit."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools import synthetic, video_frames

ROOT = Path(__file__).resolve().parent.parent


def start(out, *arguments, script="videomix"):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / f"{script}.py"),
        "--preset",
        "tiny",
        "--threads",
        "1",
        "--out",
        str(out),
        *map(str, arguments),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(out, *arguments, script="videomix", code=0):
    process = start(out, *arguments, script=script)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == code, text[-2000:]
    return text if code else json.loads((out / f"{script}.json").read_text())


def write_frames(folder, clip):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip.permute(1, 2, 3, 0).numpy(), 1):
        Image.fromarray(np.ascontiguousarray(frame)).save(
            folder / video_frames.FRAME.format(number)
        )


def test_the_study_survives_a_kill(tmp_path):
    whole = finish(tmp_path / "whole", "--seeds", 1, "--figures", tmp_path / "figures")
    process = start(tmp_path / "part", "--seeds", 1, "--checkpoint-seconds", 0)
    while process.poll() is None and not list((tmp_path / "part").glob("S-1.0-*.pt")):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    again = finish(tmp_path / "part", "--seeds", 1, "--resume")
    assert again["results"] == whole["results"] and again["tables"] == whole["tables"]
    rows = whole["tables"]["variants"]
    assert {row["augmentation"] for row in rows} == {"none", "S", "T", "ST"}
    assert {row["videos"] for row in rows} == {"own scenes", "class scenes"} and all(
        row["paper"] is None for row in rows
    )
    assert any(row["scene reliance"] != "-" for row in rows)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["videomix_lengths.png"]


def test_localisation_tables(tmp_path):
    found = finish(
        tmp_path / "time", "--table", "thumos", "--seeds", 2, "--figures", tmp_path / "figures"
    )
    assert [row["augmentation"] for row in found["tables"]["thumos"]] == [
        "none",
        "Mixup",
        "frame CutMix",
        "S",
        "T",
        "ST",
    ]
    assert all(0 <= seed["mAP@0.5"] <= 100 for seed in found["results"].values())
    assert len(list((tmp_path / "figures").glob("videomix_sequence_*.png"))) == 4
    boxes = finish(tmp_path / "boxes", "--table", "ava", "--seeds", 1)
    assert all(0 <= seed["CAM on actor"] <= 100 for seed in boxes["results"].values())


def test_real_frames(tmp_path):
    data = synthetic.videos(12, 24, 12, seed=0)
    rows = [(f"class {label}/v {i}", 12, label) for i, label in enumerate(data["labels"].tolist())]
    for (name, _, _), clip in zip(rows, data["videos"]):
        write_frames(tmp_path / "set" / name, clip)
    video_frames.write_index(tmp_path / "set" / "train.txt", rows[:8])
    video_frames.write_index(tmp_path / "set" / "val.txt", rows[4:])
    options = ("--seeds", 1, "--batch-size", 4, "--data", tmp_path / "set")
    found = finish(
        tmp_path / "a",
        *options,
        "--table",
        "kinetics",
        "--networks",
        "slowfast18",
        "--methods",
        "none",
        "S",
    )
    assert [row["augmentation"] for row in found["tables"]["kinetics"]] == ["none", "S"]
    assert all(0 <= row["top1"] <= row["top5"] <= 100 for row in found["results"].values())
    found = finish(
        tmp_path / "b",
        *options,
        "--table",
        "ssv2",
        "--networks",
        "tsm18",
        "--methods",
        "RandAugment",
    )
    assert len(found["results"]) == 1
    thumos = tmp_path / "thumos"
    (thumos / "annotation").mkdir(parents=True)
    for number, (clip, label) in enumerate(zip(data["videos"], data["labels"].tolist())):
        part, long = ("val", "validation") if number < 8 else ("test", "test")
        write_frames(thumos / "frames" / f"video_{long}_{number:07d}", clip)
        with open(thumos / "annotation" / f"Class{label}_{part}.txt", "a") as file:
            file.write(f"video_{long}_{number:07d} 0.2 0.8\n")
    found = finish(
        tmp_path / "c",
        *options[:4],
        "--data",
        thumos,
        "--table",
        "thumos",
        "--networks",
        "slowonly18",
        "--methods",
        "S",
    )
    assert set(found["tables"]["thumos"][0]) >= {"mAP@0.1", "mAP@0.9"}
    text = finish(tmp_path / "d", *options[:4], "--data", tmp_path, "--table", "kinetics", code=1)
    assert "train.txt" in text and "Traceback" not in text


def test_boxes_of_ava(tmp_path):
    data, options = synthetic.videos(4, 24, 20, seed=0), ("--seeds", 1, "--batch-size", 2)
    rows = [(f"frames/v{i}", 20, i % 2) for i in range(4)]
    for (name, _, _), clip in zip(rows, data["videos"]):
        write_frames(tmp_path / name, clip)
    for part in ("train", "val"):
        video_frames.write_index(tmp_path / f"{part}.txt", rows)
        lines = [
            f"v{i},{second},0.1,0.1,0.5,0.6,{1 + i % 2},0\nv{i},{second},0.5,0.2,0.9,0.8,12,1\n"
            for i in range(4)
            for second in (900, 901)
        ]
        (tmp_path / f"ava_{part}_v2.2.csv").write_text("".join(lines))
        (tmp_path / f"ava_{part}_excluded_timestamps_v2.2.csv").write_text("v0,0900\n")
    actions = "".join(f'item {{\n  name: "a{k}"\n  id: {k}\n}}\n' for k in (1, 2, 12))
    (tmp_path / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(actions)
    shared = ("--data", tmp_path, *options, "--networks", "slowonly18", "--epochs", 1)
    finish(tmp_path / "a", *shared, "--table", "kinetics", "--methods", "none")
    (weights,) = (tmp_path / "a").glob("*.pt")
    found = finish(
        tmp_path / "b",
        *shared,
        "--table",
        "ava",
        "--fps",
        10,
        "--methods",
        "none",
        "--inits",
        weights,
    )
    assert (
        0 <= found["results"]["none-1.0-1-" + tmp_path.name + "-slowonly18-seed0"]["mAP@0.5"] <= 100
    )
    assert "a checkpoint for each of" in finish(tmp_path / "c", *shared, "--table", "ava", code=1)


def test_speed(tmp_path):
    found = finish(tmp_path, script="speed_videomix")
    ways = {row["way"]: row for row in found["tables"]["mixing"]}
    assert {"in place", "copy", "flip-based peer"} <= set(ways) and ways["in place"][
        "peak / cuboids"
    ] <= 1
    assert len(found["tables"]["loading"]) == 5
