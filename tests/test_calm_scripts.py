"""The CALM scripts on their smallest preset and on small trees; a killed run ends alike."""

import calm_cub
import calm_remove
import calm_wsol
import numpy as np
import pytest
import speed_calm
import torch
from PIL import Image
from test_cub import golden, write_tree  # noqa: F401  (a fixture)

from data_tools import glyphs, wsol_data

FOLDER = ["--arch", "small-4", "--size", "16", "--epochs", "2", "--batch", "8", "--lr", "0.05",
          "--threads", "1"]


@pytest.fixture
def run(run_script, tmp_path):
    """run(script, out, *arguments): its results."""
    return lambda script, out, *arguments: run_script(script.__name__, tmp_path / out, *arguments)


def image_folder(root, count=10, size=16, classes=3):
    """Photographs with boxes in the layout of data_tools.wsol_data, with classes.txt."""
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        split = wsol_data.Split([], {})
        for label in range(classes):
            for n in range(count):
                image_id = f"{name}/n{label:08d}/{n}.png"
                (root / image_id).parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 100, (size, size, 3), dtype=np.uint8)
                x, y = rng.integers(0, size // 2, 2)
                pixels[y:y + size // 2, x:x + size // 2, label] += 150
                Image.fromarray(pixels).save(root / image_id)
                split.image_ids.append(image_id)
                split.labels[image_id], split.sizes[image_id] = label, (size, size)
                split.boxes[image_id] = np.array([[x, y, x + size // 2, y + size // 2]])
        wsol_data.write_split(root / "metadata" / name, split)
    lines = (f"n{label:08d}\tcolour {label}, hue\n" for label in range(classes))
    (root / "classes.txt").write_text("".join(lines))
    return root


def test_toys(run, tmp_path):
    results = run(calm_cub, "cub", "--preset", "tiny", "--methods", "cam", "calm-em",
                  "calm-official", "--figures", tmp_path / "figures")
    assert [len(results["tables"][t]) for t in ("glyphs", "query", "birds")] == [3, 12, 6]
    assert all(c["holds"] is None for c in results["claims"])
    removed = run(calm_remove, "remove", "--preset", "tiny", "--samples", "2", "--methods", "cam",
                  "calm-em", "--figures", tmp_path / "figures")
    maps = [row["map"] for row in removed["tables"]["R_k"]]
    assert maps == ["gradient", "integrated", "SmoothGrad", "VarGrad", "CAM", "calm-em"]
    found = run(calm_wsol, "wsol", "--preset", "tiny", "--methods", "cam", "calm-em", "--figures",
                tmp_path / "figures")
    maps = {row["map"] for row in found["tables"]["localisation"]}
    assert maps == {"cam", "joint", "posterior", "prior", "superclass"}
    names = sorted(path.stem for path in (tmp_path / "figures").iterdir())
    assert names == ["calm_counterfactual_scenes", "calm_glyphs", "calm_remove_glyphs"]


def test_photographs_survive_a_kill_and_lend_their_weights(run, kill_script, tmp_path):
    data = image_folder(tmp_path / "data")
    (tmp_path / "is_a").write_text("top n00000000\ntop n00000001\nother n00000002\n")
    arguments = ["--data", data, *FOLDER, "--pretrain", 1, "--methods", "cam", "calm-em",
                 "--device", "cpu", "--wordnet", tmp_path / "is_a", "--superclass", "top"]
    whole = run(calm_wsol, "whole", *arguments)
    assert len(whole["tables"]["query"]) == 8
    assert {"pretrained-cam-seed0", "folder-calm-em-seed0"} <= whole["results"].keys()
    always = ("--checkpoint-seconds", "0")
    kill_script("calm_wsol", tmp_path / "part", "folder-*.pt", *arguments, *always)
    resumed = run(calm_wsol, "part", *arguments, *always, "--resume")
    assert resumed["results"] == whole["results"]
    removed = run(calm_remove, "remove", "--data", data, *FOLDER, "--methods", "cam", "calm-em",
                  "--samples", 1, "--models", tmp_path / "whole", "--paper", "ImageNet")
    assert [row["paper"] is not None for row in removed["tables"]["R_k"]] == [True] * 6
    with pytest.raises(ValueError, match="no such file; --models"):
        run(calm_remove, "other", "--data", data, *FOLDER, "--methods", "calm-ml", "--models",
            tmp_path / "whole")


def test_wrong_arguments_are_named(run, tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    for script, *arguments in ((calm_cub, "--size", 32), (calm_remove, "--arch", "small-4"),
                               (calm_wsol, "--wordnet", "is_a"), (calm_wsol, "--lr", 0.1),
                               (calm_remove, "--methods", "cam", "cam")):
        with pytest.raises(SystemExit):
            run(script, "out", "--preset", "tiny", *arguments)
        assert f"error: {arguments[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for options, words in ((("--arch", "small-0"), "--arch must be"),
                           (("--batch", 999), "do not fill a batch of 999")):
        with pytest.raises(ValueError, match=words):
            run(calm_remove, "out", "--data", data, *FOLDER, "--methods", "cam", *options)
    torch.save({"x": torch.zeros(1)}, tmp_path / "glyphs-cam-seed0.pt")
    with pytest.raises(ValueError, match="glyphs-cam-seed0.pt does not fit this model"):
        run(calm_remove, "out", "--preset", "tiny", "--methods", "cam", "--models", tmp_path)


def test_birds_in_the_real_layout(run, tmp_path, golden):  # noqa: F811
    root = write_tree(tmp_path / "CUB_200_2011", golden)
    results = run(calm_cub, "cub", "--data", root, *FOLDER, "--size", 32, "--batch", 2, "--samples",
                  1, "--methods", "cam", "calm-em")
    table = {row["map"]: row for row in results["tables"]["cue localisation"]}
    assert set(table) == {"CAM", "gradient", "integrated", "SmoothGrad", "VarGrad", "calm-em"}
    assert table["CAM"]["paper"] == "24.1 / 28.3 / 32.2"
    # a toy tree has not the 31, 64 and 96 pairs of CUB
    assert results["claims"][0]["holds"] is False


def test_speed(run):
    results = run(speed_calm, "speed", "--preset", "tiny", "--threads", 1)
    assert [row["what"] for row in results["tables"]["map"]] == [
        "classifier, prediction", "CAM prediction", "CAM map", "CALM prediction", "CALM map"]
    maps = {row["map"] for row in results["tables"]["baselines"]}
    assert maps >= {"Grad-CAM", "integrated gradients"}


def test_glyphs_are_where_the_masks_say():
    data = glyphs.glyph_scenes(20, seed=3, noise=0.0)
    assert data["images"].shape == (20, 3, 32, 32) and (data["masks"].sum((1, 2)) == 49).all()
    other = glyphs.glyph_scenes(20, seed=3, noise=0.0, labels=(data["labels"] + 1) % 8)
    outside = other["images"] - data["images"]
    assert (outside.abs().amax(1).bool() & ~data["masks"]).sum() == 0 and outside.abs().sum() > 0
    birds = glyphs.mini_birds(12, seed=3, noise=0.0, labels=torch.arange(12))
    assert (birds["images"].amax(1).bool() & ~birds["masks"].any(1)).sum() == 0
    assert (birds["masks"].sum((2, 3)) == 49).all()
    again, once = (glyphs.glyph_scenes(4, seed=1)["images"] for _ in range(2))
    assert torch.equal(again, once)
    for call in (lambda: glyphs.glyph_scenes(-1),
                 lambda: glyphs.mini_birds(2, labels=torch.tensor([0, 12]))):
        with pytest.raises(ValueError):
            call()
