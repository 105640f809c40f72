"""The PRDC scripts on their smallest presets: figures, feature files and folders, a kill and
--resume, bad input."""

import numpy as np
import prdc_images
import pytest
import torch
from PIL import Image

from reference.prdc import compute_prdc

TINY = "--preset", "tiny", "--threads", "1"
pytestmark = pytest.mark.filterwarnings("ignore:.* real and .* fake rows")


@pytest.fixture
def run(run_script):
    return lambda script, out, *arguments: run_script(script, out, *TINY, *arguments)


@pytest.fixture
def refused(run, tmp_path, capsys):
    """refused(error type, script, *arguments): what the script says, before it trains anything."""
    def call(error, script, *arguments):
        with pytest.raises(error) as stopped:
            run(script, tmp_path / "refused", *arguments)
        assert not list((tmp_path / "refused").glob("*.jsonl"))
        return f"{stopped.value} {capsys.readouterr().err}"
    return call


def test_gaussians(tmp_path, run, kill_script):
    results = run("prdc_toy", tmp_path, "--seeds", 2, "--figures", tmp_path / "figures")
    kill_script("prdc_toy", tmp_path / "part", "recorded.json", *TINY, "--seeds", "2")
    resumed = run("prdc_toy", tmp_path / "part", "--seeds", 2, "--resume")
    assert resumed["tables"] == results["tables"]
    assert set(results["tables"]) == {"equal sets", "k", "outliers", "modes", "variance"}
    assert len(list((tmp_path / "figures").iterdir())) == 6
    assert len(run("prdc_toy", tmp_path / "one", "--seeds", 1)["tables"]) == 5
    last = results["tables"]["outliers"][-1]
    assert last["real outlier at 3, precision"] == 1
    assert 0.2 <= last["real outlier at 3, density"] < 0.22


def test_images_survive_a_kill(tmp_path, run, kill_script):
    whole = run("prdc_images", tmp_path / "whole", "--seeds", 1, "--figures", tmp_path / "figures")
    assert len(whole["tables"]["images"]) == 16 and len(list((tmp_path / "figures").iterdir())) == 3
    kill_script("prdc_images", tmp_path / "part", "autoencoder-*.pt", *TINY, "--seeds", "1",
                "--checkpoint-seconds", "0")
    resumed = run("prdc_images", tmp_path / "part", "--seeds", 1, "--checkpoint-seconds", 0,
                  "--resume")
    assert resumed["results"] == whole["results"]


def test_feature_files_and_folders(tmp_path, run, refused):
    rng = np.random.default_rng(0)
    real, fake = (rng.standard_normal((40, 6)).astype(np.float32) for _ in range(2))
    np.save(tmp_path / "real.npy", real.astype(">f4"))
    np.savez(tmp_path / "fake.npz", fake)
    results = run("prdc_images", tmp_path / "a", "--real-features", tmp_path / "real.npy",
                  "--fake-features", tmp_path / "fake.npz", "--count", 30)
    row, expected = results["tables"]["images"][0], compute_prdc(real[:30], fake[:30], 5)
    assert {name: row[name] for name in expected} == expected
    for side in ("real", "fake"):
        (tmp_path / side / "below").mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / "below" / f"{number}.png")
    results = run("prdc_images", tmp_path / "b", "--real", tmp_path / "real", "--fake",
                  tmp_path / "fake", "--seeds", 1)
    assert [row["embedding"] for row in results["tables"]["images"]] == ["pixels", "R64"]

    (tmp_path / "real" / "below" / "3.png").write_bytes(b"broken")
    images = "prdc_images", "--real", tmp_path / "real"
    assert "3.png: not a readable image" in refused(ValueError, *images, "--fake",
                                                    tmp_path / "fake")
    assert "needs both sets" in refused(SystemExit, *images)
    for arguments, message in ((("--count", 1), "--count must be at least 2"),
                               (("--nearest-k", 0), "--nearest-k: must be at least 1"),
                               (("--real", tmp_path, "--real-features", tmp_path), "given once"),
                               (("--data", tmp_path, "--real", tmp_path), "sets of its own"),
                               (("--weights", tmp_path / "none.pth"), "none.pth: no such file")):
        assert message in refused(SystemExit, "prdc_images", *arguments)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(ValueError, "prdc_images", "--real", tmp_path / "empty",
                                        "--fake", tmp_path / "fake")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    text = refused(ValueError, "prdc_images", "--real-features", tmp_path / "cube.npy",
                   "--fake-features", tmp_path / "fake.npz")
    assert "cube.npy: holds float64 (2, 2, 2)" in text
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    for arguments, message in (
            (("--fake-features", tmp_path / "broken.npz"), "broken.npz: not a .npy or .npz file"),
            (("--fake", tmp_path / "fake"), "one set is of features, the other of images"),
            (("--fake-features", tmp_path / "fake.npz", "--weights", tmp_path / "fake.npz"),
             "--weights makes features of images"),
            (("--fake-features", tmp_path / "fake.npz", "--nearest-k", 20),
             "--nearest-k 20 needs sets of at least 42 (spreads are those of half a set), the "
             "smallest has 40")):
        assert message in refused(ValueError, "prdc_images", "--real-features",
                                  tmp_path / "real.npy", *arguments)
    (tmp_path / "w.pth").write_bytes(b"broken")
    for arguments, message in ((("--count", 11), "needs sets of at least 12"),
                               (("--weights", tmp_path / "w.pth"), "w.pth is damaged")):
        assert message in refused(ValueError, "prdc_images", *arguments)


def test_speed(tmp_path, run, refused):
    results = run("speed_prdc", tmp_path)
    row = results["tables"]["speed"][0]
    assert row["ours, s"] > 0 and all(claim["holds"] is not False for claim in results["claims"])
    growth = run("speed_prdc", tmp_path / "growth", "--growth", "--figures",
                 tmp_path / "figures")["tables"]["growth"]
    assert [row["N = M"] for row in growth] == [200, 400]
    assert (tmp_path / "figures" / "prdc-cost-per-pair.png").exists()
    for size in ("12", "6x4", "9x0"):
        assert "--sizes must be like" in refused(SystemExit, "speed_prdc", "--sizes", size)


def test_glyphs_are_reproducible_and_differ_by_seed():
    one, two = prdc_images.glyphs(20, 0), prdc_images.glyphs(20, 1)
    assert torch.equal(one, prdc_images.glyphs(20, 0)) and not torch.equal(one, two)
    assert one.shape == (20, 3, 32, 32) and one.dtype == torch.uint8
    assert one.float().std(dim=(1, 2, 3)).min() > 5
    blurred, same, noisy = (x.float().std() for x in (prdc_images.blurred(one), one,
                                                      prdc_images.noisy(one, 0)))
    assert blurred < same < noisy
    assert prdc_images.jpeg(one).shape == one.shape
