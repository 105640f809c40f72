"""The ReLabel scripts on their smallest preset: a kill loses nothing, misfits are refused."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

TINY = ("--preset", "tiny", "--threads", "1")


@pytest.fixture
def run(run_script):
    """run(script, out folder, *arguments): the script's results."""
    return lambda script, out, *arguments: run_script(script, out, *TINY, *arguments)


def accuracies(results):
    return {name: row for name, row in results["results"].items() if "-seed" in name}


def test_the_study_survives_a_kill(tmp_path, run, kill_script):
    methods = ("--methods", "one-hot", "relabel", "distillation", "--device", "cpu")
    whole = run("relabel_imagenet", tmp_path / "whole", *methods, "--figures", tmp_path / "figures")
    assert len(whole["tables"]["targets"]) == 4 and len(whole["tables"]["cost"]) == 3
    assert (tmp_path / "figures" / "relabel_methods.png").exists()
    always = ("--checkpoint-seconds", "0")
    kill_script("relabel_imagenet", tmp_path / "part", "relabel-seed0-*.pt", *TINY, *methods,
                *always)
    rest = run("relabel_imagenet", tmp_path / "part", *methods, *always, "--resume")
    assert accuracies(rest) == accuracies(whole)


def test_maps_of_a_teacher_serve_the_study_and_another_set_is_refused(tmp_path, run):
    results = run("relabel_imagenet", tmp_path / "a", "--maps", "teacher", "--methods",
                  "global-single", "relabel+cutmix", "localized-single")
    assert results["results"]["generation"]["images"] == 128
    with pytest.raises(ValueError, match="samples do not fill a batch of 32"):
        run("relabel_imagenet", tmp_path / "a", "--maps", "teacher", "--methods", "cleaning")
    generated = run("relabel_generate", tmp_path / "b", "--figures", tmp_path / "figures")
    assert (tmp_path / "figures" / "relabel_maps.png").exists()
    assert generated["claims"][0]["holds"] and generated["tables"]["store"][0]["images"] == 64
    (store,) = (tmp_path / "b").glob("store-*")
    with pytest.raises(ValueError, match="the store holds 64 maps, the training set 128 images"):
        run("relabel_imagenet", tmp_path / "c", "--methods", "relabel", "--store", store)


def test_crops_and_speed(tmp_path, run):
    crops = run("relabel_crops", tmp_path / "crops", "--figures", tmp_path / "figures")
    assert len(crops["tables"]["crops of a 500 x 375 image"]) == 7
    assert len(list((tmp_path / "figures").iterdir())) == 2
    speed = run("speed_relabel", tmp_path / "speed")
    assert [row["way"] for row in speed["tables"]["pooling"]][:2] == ["sparse", "dense"]


@pytest.mark.parametrize("script, option, value", [
    ("relabel_crops", "--store", "x"), ("relabel_crops", "--metadata", "x"),
    ("relabel_generate", "--teacher", "x"), ("relabel_generate", "--size", 64),
    ("relabel_imagenet", "--sets", "x"), ("relabel_imagenet", "--images", 3)])
def test_files_for_real_images_need_these(script, option, value, tmp_path, run, capsys):
    with pytest.raises(SystemExit):
        run(script, tmp_path / "out", option, value)
    assert re.search(f"{option}.* (need.?|only with) --data", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_named(tmp_path, run, capsys):
    for option, *values in (("--methods", "relabel", "relabel"),
                            ("--sets", tmp_path / "none", "--data", tmp_path)):
        with pytest.raises(SystemExit):
            run("relabel_imagenet", tmp_path / "out", option, *values)
        assert f"error: {option}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="not 'small-x'"):
        run("relabel_imagenet", tmp_path / "out", "--methods", "one-hot", "--arch", "small-x")
    with pytest.raises(ValueError, match="128 samples do not fill a batch of 999"):
        run("relabel_coco", tmp_path / "out", "--methods", "image", "--batch", 999)
    for boxes, sizes, words in (("", "", "localization.txt: holds no box"),
                                ("a/b,1,2,3,nan", "a/b,9,9", "localization.txt:1: box must be"),
                                ("a/b,1,2,3,4", "a/b,0,9", "image_sizes.txt:1: width and height")):
        (tmp_path / "localization.txt").write_text(boxes)
        (tmp_path / "image_sizes.txt").write_text(sizes)
        with pytest.raises(SystemExit):
            run("relabel_crops", tmp_path / "crops", "--data", tmp_path, "--metadata", tmp_path)
        assert re.search(words, capsys.readouterr().err) and not (tmp_path / "crops").exists()


def tree(root, folders, count=2, size=48):
    """Images of noise, `count` in each folder."""
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"ILSVRC2012_val_{number + 1:08d}.png")


def test_real_layout_with_robustness_sets(tmp_path, run):
    classes, data, sets = ["n01", "n02", "n03"], tmp_path / "data", tmp_path / "sets"
    tree(data / "train", classes, 12)
    tree(data / "val", classes)
    tree(sets / "imagenet-a", classes[1:])
    corruptions = ("gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur "
                   "zoom_blur snow frost fog brightness contrast elastic_transform pixelate "
                   "jpeg_compression").split()
    folders = [f"{name}/{level}/{wnid}"
               for name in corruptions for level in range(1, 6) for wnid in classes]
    tree(sets / "imagenet-c", folders, 1, 16)
    for kind in ("mixed_same", "mixed_rand"):
        tree(sets / "bg_challenge" / kind / "val", ["00_dog", "01_bird"])
    groups = {"0": 0, "1": 1, "2": -1}
    (sets / "bg_challenge" / "in_to_in9.json").write_text(json.dumps(groups))
    (tmp_path / "real.json").write_text(json.dumps([[0, 1], [2]]))
    annotated = {"ILSVRC2012_val_00000001.JPEG": {"correct": classes}}
    (tmp_path / "accuracy.json").write_text(
        json.dumps({"initial_annots": annotated, "problematic_images": {}}))
    options = ("--data", data, "--sets", sets)
    results = run("relabel_imagenet", tmp_path / "out", *options, "--methods", "one-hot", "relabel",
                  "--real", tmp_path / "real.json", "--shankar", tmp_path / "accuracy.json",
                  "--images", 11)
    row = results["results"]["relabel-seed0"]
    assert row.pop("Shankar et al.") == 100
    targets = results["tables"]["targets"]
    assert [line["paper, ReaL"] for line in targets[:2]] == [83.6, 85.0]
    assert set(row) == {"val", "ReaL", "FGSM 1/255", "FGSM 4/255", "ImageNet-C", "ImageNet-A",
                        "mixed_same", "mixed_rand", "BGC gap"}
    assert all(0 <= value <= 100 for name, value in row.items() if name != "BGC gap")
    assert results["tables"]["robustness"][0]["targets"] == "one-hot"
    assert results["results"]["generation"]["images"] == 33
    (store,) = (tmp_path / "out").glob("store-*")
    some = ("--data", data, "--methods", "relabel", "--images", 11, "--store", store)
    assert run("relabel_imagenet", tmp_path / "some", *some)["results"]["relabel-seed0"]["val"] >= 0
    with pytest.raises(ValueError, match="--store: .* has no map for n01/ILSVRC2012_val_00000012"):
        run("relabel_imagenet", tmp_path / "more", *some[:4], "--store", store)
    weights = tmp_path / "out" / "relabel-seed0-weights.pt"
    again = run("relabel_imagenet", tmp_path / "again", *options, "--checkpoint", weights)
    (again,) = again["tables"]["students"]
    del row["ReaL"]
    assert {name: again[name] for name in row} == row


def test_augmentation_of_the_paper(run):
    import relabel_imagenet as study

    grey = Image.new("RGB", (4, 4), (100, 120, 140))
    jitter = study.ColorJitter()
    jitter.generator = torch.Generator().manual_seed(0)
    changed = np.asarray(jitter(grey)).astype(float)
    assert changed.std((0, 1)).max() == 0 and 0.2 < changed.mean() / 120 < 2
    images = torch.zeros(2000, 3, 1, 1)
    shift = study.lighting(images, torch.Generator().manual_seed(0)).flatten(1)
    vectors = torch.tensor([(-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140),
                            (-0.5836, -0.6948, 0.4203)])
    along = (shift * torch.tensor(study.MEAN_STD[1])) @ vectors  # the eigenvectors are columns
    assert along.std(0).tolist() == pytest.approx([0.02175, 0.00188, 0.00045], rel=0.1)


def test_multi_label_study_on_the_coco_layout(tmp_path, run):
    import test_coco

    for split, seed in (("train2017", 0), ("val2017", 1)):
        (tmp_path / split).mkdir()

        def many(content):
            rng = np.random.default_rng(seed)
            content["images"], content["annotations"] = [], []
            for number in range(70):
                name = f"{number:012d}.png"
                pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name)
                content["images"].append({"id": number, "file_name": name, "width": 30,
                                          "height": 24})
                content["annotations"].append(test_coco.annotation(
                    number, number, (1, 13, 90)[number % 3], bbox=[0, 0, 15, 24]))

        path = test_coco.tree(tmp_path, many)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path.rename(tmp_path / "annotations" / f"instances_{split}.json")
    results = run("relabel_coco", tmp_path / "out", "--data", tmp_path, "--arch", "small-4",
                  "--size", 16)
    rows = results["tables"]["multi-label"]
    assert [row["targets"] for row in rows] == ["image", "machine", "oracle"]
    assert len(results["claims"]) == 3 and (tmp_path / "out" / "oracle" / "store.json").exists()


def test_ablations_of_teacher_and_classes(tmp_path, run):
    results = run("relabel_ablation", tmp_path, "--teachers", 1, 2)
    assert [row["teacher"] for row in results["tables"]["teacher"]][1:] == ["1 epochs", "2 epochs"]
    kept = results["tables"]["classes kept"]
    assert [row["k"] for row in kept] == [1, 3, 5, 8] and kept[-1]["KL(all || k)"] == 0


def test_checkpoints_that_fit_and_others(tmp_path, run):
    from harness import load_weights
    from relabel_generate import build_model

    one, other = (build_model("small-2", classes, classes) for classes in (3, 4))
    torch.save({"state_dict": {f"module.{key}": value for key, value in one.state_dict().items()}},
               tmp_path / "a.pt")
    load_weights(other, tmp_path / "a.pt", head=False)
    assert torch.equal(other.conv1.weight, one.conv1.weight) and len(other.fc.bias) == 4
    headless = build_model("small-2", 3, 4)
    headless.fc = torch.nn.Identity()
    load_weights(headless, tmp_path / "a.pt", head=False)
    assert torch.equal(headless.conv1.weight, one.conv1.weight)
    torch.save({"conv1.weight": one.conv1.weight.data}, tmp_path / "part.pt")
    (tmp_path / "empty.pt").touch()
    for name, reason in (("a", "does not fit this model: "), ("part", "does not fit this model: "),
                         ("empty", "is damaged or no checkpoint")):
        with pytest.raises(ValueError, match=f"{name}.pt {reason}"):
            load_weights(other, tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_weights(other, tmp_path / "none.pt")


def test_multi_labels_of_imagenet(tmp_path, run):
    import relabel_imagenet as study

    class Validation(list):
        classes = ["n0", "n1", "n2"]

        def name(self, index):
            return self[index]

    path = tmp_path / "labels.json"
    names = Validation(f"n0/ILSVRC2012_val_0000000{n}.JPEG" for n in (2, 1, 3))
    path.write_text("[[0, 2, 900], [901], [1]]")
    real = study.valid_classes(path, names, 3)
    assert real.tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    image = "ILSVRC2012_val_0000000{}.JPEG".format
    annotated = {image(1): {"correct": ["n1"], "unclear": ["n2", "n900"], "wrong": ["n0"]},
                 image(3): {"correct": ["n1"]}, image(7): {}}
    path.write_text(json.dumps({"initial_annots": annotated, "problematic_images": {image(3): 1}}))
    shankar = study.valid_classes(path, names, 3)
    assert shankar.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]
    for content, words in (("[[1], [2]]", "no entry for n0/ILSVRC2012_val_00000003.JPEG"),
                           ("[1, 2]", "no lists of labels"), ("{", "no lists of labels"),
                           ("{}", "no lists of labels: KeyError")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"labels.json.* {words}"):
            study.valid_classes(path, names, 3)


def test_mean_average_precision(run):
    from relabel_coco import mean_average_precision

    scores = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.3, 0.0], [0.6, 0.4, 0.0]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).bool()
    first = (1 + 2 / 3) / 2  # positives at ranks 1 and 3
    second = (1 / 2 + 2 / 3) / 2  # at ranks 2 and 3; the third class has none and does not count
    assert mean_average_precision(scores, labels) == pytest.approx(50 * (first + second))
