"""The localization scripts on their smallest preset: results, a kill, two processes, metadata."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TABLE = ("--preset", "tiny", "--methods", "has", "--device", "cpu", "--checkpoint-seconds", "0",
         "--threads", "1")


def test_a_killed_table_goes_on_to_the_same_numbers(tmp_path, run_script, kill_script):
    whole = run_script("wsol_table", tmp_path / "whole", *TABLE, "--figures", tmp_path / "figures")
    assert [row["method"] for row in whole["tables"]["main"]] == ["cam", "has", "fewshot", "centre"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "wsol_maps.png", "wsol_curves.png", "wsol_supervision.png"}
    assert all(row["holds"] is None for row in whole["claims"])         # one seed supports none
    out = tmp_path / "killed"
    kill_script("wsol_table", out, "has-*.pt", *TABLE)
    resumed = run_script("wsol_table", out, *TABLE, "--resume")
    assert resumed["tables"] == whole["tables"] and resumed["claims"] == whole["claims"]


def test_two_processes_share_training_and_evaluation(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(BENCHMARKS / "wsol_table.py"), *TABLE, "--methods", "cam",
               "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads((tmp_path / "wsol_table.json").read_text())["results"]["centre-seed0"]
    import wsol_nets
    import wsol_table
    part = wsol_nets.scene_parts(wsol_table.EMBEDDED["tiny"], 0, 0.5, 2)[2]
    alone = wsol_nets.evaluate(wsol_nets.centre_map(part), part, Alone())
    assert all(shared[key] == alone[key] for key in ("v1", "v2", "pxap"))


class Alone:
    """What `evaluate` needs of a run of one process."""
    rank, world_size, device, args = 0, 1, "cpu", argparse.Namespace(workers=0)

    def sum(self, value):
        return value


def write_metadata(root: Path, masks: bool) -> None:
    """Twelve training and eight tuning images in the released layout."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        folder = root / "metadata" / split
        folder.mkdir(parents=True)
        (root / split).mkdir()
        rows = {"image_ids": [], "class_labels": [], "image_sizes": [], "localization": []}
        for i in range(count):
            name = f"{split}/{i}.png"
            Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(root / name)
            rows["image_ids"].append(name)
            rows["class_labels"].append(f"{name},{i % 2}")
            rows["image_sizes"].append(f"{name},30,40")
            if split == "val" and masks:
                mask = np.zeros((40, 30), np.uint8)
                mask[5 + i:25, 8:20] = 255
                Image.fromarray(mask).save(root / f"val/{i}_m.png")
                rows["localization"].append(f"{name},val/{i}_m.png,")
            elif split == "val":
                rows["localization"] += [f"{name},8,{5 + i},20,25", f"{name},1,1,6,9"]
        for key, lines in rows.items():
            (folder / f"{key}.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("masks", (False, True))
def test_the_table_reads_released_metadata(tmp_path, run_script, masks):
    write_metadata(tmp_path / "data", masks)
    result = run_script("wsol_table", tmp_path / "out", *TABLE, "--data", tmp_path / "data",
                        "--shots", 2, "--trials", 1, "--epochs", 1, "--width", 4, "--pretrain", 1,
                        "--per-class", 4)
    metric = "pxap" if masks else "v2"
    assert all(0 <= row[metric] <= 100 for row in result["tables"]["main"])
    assert result["data"] == "8 training, 4 tuning, 4 test images, 2 classes"
    for options, message in ((["--shots", 1], "--shots 1: 2 images"),
                             (["--shots", 9], "--shots 9: 8 images to tune on and 0 to test on"),
                             (["--classes", 3], "--classes 3: .*train has 2")):
        with pytest.raises(ValueError, match=message):          # before anything is trained
            run_script("wsol_table", tmp_path / "bad", "--data", tmp_path / "data", *options)
    assert not list((tmp_path / "bad").glob("*.pt"))


@pytest.mark.parametrize("script,options,message", [
    ("wsol_table", ["--arch", "vgg16", "--shots", 3], "--arch, --shots: only with --data"),
    ("wsol_table", ["--data", ".", "--weights", "."], "--weights is for the published"),
    ("wsol_table", ["--data", ".", "--arch", "vgg16", "--pretrain", 1], "--pretrain for --arch sm"),
    ("wsol_table", ["--preset", "paper"], "--preset paper needs --data"),
    ("wsol_center", ["--masks", "."], "--masks: only with --data")])
def test_options_that_would_not_be_used_are_refused(tmp_path, run_script, capsys, script, options,
                                                    message):
    with pytest.raises(SystemExit) as end:
        run_script(script, tmp_path / "out", *options)
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_classes_are_as_many_as_asked_for_and_evenly_spaced(tmp_path):
    import wsol_table
    write_metadata(tmp_path, False)
    labels = tmp_path / "metadata" / "train" / "class_labels.txt"
    labels.write_text("".join(f"train/{i}.png,{i % 5}\n" for i in range(12)))
    args = argparse.Namespace(data=tmp_path, dataset="", preset="default", arch="small", size=8,
                              classes=2, per_class=0, shots=2, epochs=1, trials=1, width=4,
                              workers=0, weights=None, pretrain=0)
    labels = tmp_path / "metadata" / "val" / "class_labels.txt"
    labels.write_text("".join(f"val/{i}.png,{2 * (i % 2)}\n" for i in range(8)))
    task = wsol_table.real_task(Alone(), args, 0)
    assert task.classes == 2 and set(task.train.split.labels.values()) == {0, 1}
    assert task.train.split.image_ids == [f"train/{i}.png" for i in (0, 2, 5, 7, 10)]


def test_published_networks_train_on_released_metadata(tmp_path, run_script):
    write_metadata(tmp_path / "data", False)
    result = run_script("wsol_table", tmp_path / "out", *TABLE[:2], "--device", "cpu", "--data",
                        tmp_path / "data", "--methods", "cam", "--arch", "resnet50", "--size", 32,
                        "--shots", 2, "--trials", 1, "--epochs", 1, "--per-class", 2)
    trial = result["results"]["cam-seed0-trial0"]["trial"]
    assert set(trial) == {"lr", "large_feature_map"}


def test_the_centre_baseline_from_metadata(tmp_path, run_script):
    embedded = run_script("wsol_center", tmp_path / "out", "--preset", "tiny", "--figures",
                          tmp_path / "figures")
    assert embedded["claims"][0]["holds"] and (tmp_path / "figures/wsol_center.png").exists()
    write_metadata(tmp_path / "masks", True)
    write_metadata(tmp_path / "boxes", False)
    several = run_script("wsol_center", tmp_path / "out", "--data", tmp_path / "boxes" / "metadata")
    any_box, first, largest = several["tables"]["center"]
    assert (any_box["split"], any_box["images"]) == ("val", 8)
    assert any_box["V2"] >= max(first["V2"], largest["V2"]) > 0
    pixels = run_script("wsol_center", tmp_path / "out", "--data", tmp_path / "masks" / "metadata",
                        "--masks", tmp_path / "masks")
    assert 0 < pixels["tables"]["center"][0]["PxAP"] < 100
    with pytest.raises(ValueError, match="no localization.txt"):
        run_script("wsol_center", tmp_path / "out", "--data", tmp_path / "figures")
    with pytest.raises(ValueError, match="no split with boxes; masks need --masks"):
        run_script("wsol_center", tmp_path / "out", "--data", tmp_path / "masks" / "metadata")


def test_the_ill_posedness_step_is_exact(tmp_path, run_script):
    result = run_script("wsol_illposed", tmp_path / "out", "--preset", "tiny", "--figures",
                        tmp_path / "figures")
    step = {row["w0"]: row["exact posterior"] for row in result["tables"]["step"]}
    assert step == {0.1: pytest.approx(13 / 15), 0.6: 1.0}
    assert [row["MaxBoxAcc"] for row in result["tables"]["calibration"]] == [100.0] * 3
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "wsol_illposed.png", "wsol_illposed_thresholds.png"}


def test_the_speed_script_compares_equal_counts(tmp_path, run_script):
    result = run_script("speed_wsol", tmp_path / "out", "--preset", "tiny")
    assert [row["contours"] for row in result["tables"]["boxes"]] == ["largest", "all"]
    assert all(row["public / ours"] > 0 for row in result["tables"]["other steps"])
