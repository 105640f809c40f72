"""The PCME scripts run on their smallest preset, on Flickr8k's layout too, and survive a kill."""

import pytest
import torch
from PIL import Image

from data_tools import synthetic

TINY = ("--preset", "tiny", "--device", "cpu", "--threads", "1")


@pytest.fixture
def finish(run_script):
    """finish(script, out folder, *arguments): the script's results."""
    return lambda script, out, *arguments: run_script(script, out, *TINY, *arguments)


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    root = tmp_path_factory.mktemp("flickr8k")
    scenes = synthetic.captioned_shapes(30, 32, seed=5)
    (root / "images").mkdir()
    for row, image in enumerate(scenes["images"]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / f"{row}.jpg")
    lines = (f"{row // 5}.jpg\t{text}\n" for row, text in enumerate(scenes["captions"]))
    (root / "captions.txt").write_text("".join(lines))
    for split, rows in (("train", range(20)), ("dev", range(20, 25)), ("test", range(20, 30))):
        (root / f"{split}_images.txt").write_text("".join(f"{row}.jpg\n" for row in rows))
    return root


def test_the_study_survives_a_kill(tmp_path, finish, kill_script):
    cpu = ("--device", "cpu", "--checkpoint-seconds", "0")
    whole = finish("pcme_coco", tmp_path / "whole", "--methods", "PCME", "triplet", *cpu,
                   "--figures", tmp_path / "figures")
    assert [row["method"] for row in whole["tables"]["retrieval"]] == [
        "PCME, match probability", "PCME, mean only", "triplet, mean only"]
    assert (tmp_path / "figures" / "pcme_retrieval.png").exists()
    kill_script("pcme_coco", tmp_path / "part", "PCME-seed0-*.pt", *TINY, "--methods", "PCME",
                *cpu)
    part = finish("pcme_coco", tmp_path / "part", "--methods", "PCME", *cpu, "--resume")
    assert part["results"]["PCME-seed0"] == whole["results"]["PCME-seed0"]


def test_real_folders_and_the_uncertainty_of_trained_models(flickr, tmp_path, finish):
    study = finish("pcme_coco", tmp_path / "study", "--data", flickr, "--methods", "PCME")
    assert {"i2t R@1", "t2i R@10"} <= study["tables"]["retrieval"][0].keys()
    result = finish("pcme_uncertainty", tmp_path / "uncertainty", "--data", flickr, "--models",
                    tmp_path / "study", "--figures", tmp_path / "figures")
    assert len(result["tables"]["uncertainty"]) == 5
    assert len(list((tmp_path / "figures").iterdir())) == 4
    torch.save({"model": {}}, tmp_path / "PCME-seed0-weights.pt")
    with pytest.raises(ValueError, match="does not fit this model"):
        finish("pcme_uncertainty", tmp_path / "other", "--models", tmp_path)
    with pytest.raises(FileNotFoundError, match="no Flickr8k here"):
        finish("pcme_coco", tmp_path / "wrong", "--data", tmp_path)


@pytest.mark.parametrize("script, arguments, message", [
    ("pcme_coco", ("--epochs", 0), "must be at least 1"),
    ("pcme_coco", ("--epochs", 1, 2), "--epochs takes one number per phase, here 1"),
    ("pcme_coco", ("--methods", "PCME", "PCME"), "--methods names one twice"),
    ("pcme_coco", ("--vocabulary", __file__), "--vocabulary: only with --data"),
    ("pcme_coco", ("--glove", "nowhere"), "--glove nowhere: no such file"),
    ("pcme_cub", ("--lists", "nowhere"), "--lists: only with --data"),
    ("pcme_uncertainty", ("--models", "nowhere"), "--models nowhere: no such file"),
    ("pcme_uncertainty", ("--bins", 1), "--bins must be at least 2")])
def test_wrong_arguments_are_refused_at_once(script, arguments, message, tmp_path, finish, capsys):
    with pytest.raises(SystemExit) as stop:
        finish(script, tmp_path / "out", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_uncertainty_and_the_plane_on_embedded_scenes(tmp_path, finish, capsys):
    with pytest.raises(SystemExit):                           # 25 images: known before training
        finish("pcme_uncertainty", tmp_path / "out", "--bins", 26)
    assert "--bins must be at most the 25 images" in capsys.readouterr().err
    result = finish("pcme_uncertainty", tmp_path / "out", "--figures", tmp_path / "figures")
    assert len(result["tables"]["recall by uncertainty"]) == 10
    assert (tmp_path / "figures" / "pcme_plane.png").exists()
    assert any(row["claim"].endswith("caption, images it fits") for row in result["claims"])


def test_the_attribute_toy_has_every_score_and_goes_on(tmp_path, finish):
    result = finish("pcme_toy", tmp_path / "out", "--seeds", "1", "--figures", tmp_path / "figures")
    assert len(result["tables"]["retrieval"]) == 10
    assert len(result["tables"]["uncertainty"]) == 6
    assert len(list((tmp_path / "figures").iterdir())) == 4
    again = finish("pcme_toy", tmp_path / "out", "--seeds", "1", "--resume")
    assert again["claims"] == result["claims"]


def test_scores_and_ablation_on_unseen_classes(tmp_path, finish):
    result = finish("pcme_cub", tmp_path / "out", "--methods", "PCME",
                    "sigmoid and LayerNorm on sigma", "without local attention",
                    "one sigma for all dimensions", "--figures", tmp_path / "figures")
    assert len(result["tables"]["training"]) == 4 and len(result["tables"]["scores of PCME"]) == 17
    assert (tmp_path / "figures" / "pcme_cub_samples.png").exists()


def test_speed(tmp_path, finish):
    result = finish("speed_pcme", tmp_path / "out")
    rows = result["tables"]["one thread"]
    assert {"loss, forward and backward", "match probabilities"} <= {row["what"] for row in rows}
    assert all(row["largest difference"] < 1e-5 for row in rows)
