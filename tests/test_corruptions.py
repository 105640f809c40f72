"""The corruptions against the published codes, their building blocks against scikit-image, OpenCV
and ImageMagick."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import corruption_filters as filters
from data_tools import corruption_recipes as recipes
from data_tools import corruptions as C

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "regularization"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def picture(seed=0, height=48, width=48):
    rng = np.random.RandomState(seed)
    smooth = C.gaussian_filter(rng.rand(height, width, 3), 3.0)
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 280 - 10   # some pixels saturate
    return smooth.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- parity

@pytest.mark.parametrize("variant", C.VARIANTS)
@pytest.mark.parametrize("name", C.CORRUPTIONS)
def test_corruptions_equal_the_published_ones(name, variant):
    data = golden(f"corruptions_{variant}")
    texture = np.ascontiguousarray(data["frost_texture"][..., ::-1])
    for severity in range(1, 6):
        seed = int(data[f"seed_{name}"][severity - 1])
        out = C.corrupt(data["image"], name, severity, variant, rng=seed, textures=[texture])
        difference = np.abs(out.astype(int) - data[f"{name}_s{severity}"])
        # depends on the libjpeg that Pillow was built with
        if name == "jpeg_compression":
            assert difference.mean() <= 1
            continue
        # almost all are bit-equal
        assert difference.max() <= 1 and (difference > 0).sum() <= 2, severity


def test_impulse_masks_equal_the_published_ones():
    for variant in C.VARIANTS:
        data = golden(f"corruptions_{variant}")
        image, shape = data["image"], data["image"].shape
        for severity in range(1, 6):
            flipped, salted = (np.unpackbits(
                data[f"impulse_{kind}_s{severity}"])[:image.size].reshape(shape).astype(bool)
                               for kind in ("flipped", "salted"))
            rng = np.random.default_rng(int(data["seed_impulse_noise"][severity - 1]))
            out = C.corrupt(image, "impulse_noise", severity, variant, rng)
            assert np.array_equal(out, np.where(flipped, np.where(salted, 255, 0), image))


def test_gaussian_filter_equals_scipy():
    data = golden("corruption_helpers")
    x = data["gauss_x"]
    close = {"atol": 1e-12, "rtol": 0}
    for sigma in ("0.4", "1", "2.5"):
        np.testing.assert_allclose(C.gaussian_filter(x, float(sigma)),
                                   data[f"gauss_nearest_{sigma}"], **close)
    for key, sigma in (("5", 5), ("aniso", (0.4, 1.3)), ("170.8", 170.8)):
        out = C.gaussian_filter(x, sigma, "reflect", 3)
        np.testing.assert_allclose(out, data[f"gauss_reflect_t3_{key}"], **close)
    assert np.array_equal(C.gaussian_filter(x, 0), x) and C.gaussian_filter(x.astype(np.float32),
                                                                            2).dtype == np.float32
    for sigma in (0.7, 3, 6):                             # the weights are scipy's to the last bit
        weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-30, 31) ** 2)
        weights[np.abs(np.arange(-30, 31)) > int(4 * sigma + 0.5)] = 0
        weights /= weights[weights > 0].sum()
        point = np.zeros((61, 61))
        point[30, 30] = 1
        assert np.array_equal(C.gaussian_filter(point, sigma)[30], weights[30] * weights)
    channels = np.stack([x, 2 * x], -1)
    np.testing.assert_allclose(C.gaussian_filter(channels, 2.5)[..., 1],
                               2 * data["gauss_nearest_2.5"], **close)
    with pytest.raises(ValueError, match="mode"):
        C.gaussian_filter(x, 1, "wrap")


def test_disk_plasma_and_zoom_equal_the_published_helpers():
    data = golden("corruption_helpers")
    for i in range(6):
        assert np.array_equal(C.disk(*data[f"disk_{i}_radius_alias"]), data[f"disk_{i}"])
    # OpenCV's kernel of radius 6 adds up to just less than 1: white areas lose a grey level
    assert C.disk(6, 0.5).sum(dtype=float) - 1 == pytest.approx(-6.4e-9, rel=0.01)
    white = np.full((40, 48, 3), 255, np.uint8)
    assert (C.corrupt(white, "defocus_blur", 3) == 254).all()
    for size in (8, 32, 64):
        seed, decay = data[f"plasma_{size}_seed_decay"]
        field = C.plasma(size, decay, np.random.RandomState(int(seed)))
        np.testing.assert_allclose(field, data[f"plasma_{size}"], atol=1e-12)
    assert C.plasma(1, 2, np.random.RandomState(0)).tolist() == [[0]]
    with pytest.raises(ValueError, match="power of two"):
        C.plasma(12, 2, np.random.RandomState(0))
    for zoom in ("1.01", "1.15", "1.25", "2.25"):
        for variant, key in (("imagenet", "hendrycks"), ("bethge", "bethge")):
            out = C.clipped_zoom(data["zoom_x"], float(zoom), variant)
            np.testing.assert_allclose(out, data[f"zoom_{key}_{zoom}"], atol=1e-6)
    plane = C.clipped_zoom(data["zoom_x"][..., 0], 1.25)
    assert np.array_equal(plane, C.clipped_zoom(data["zoom_x"], 1.25)[..., 0])
    lengths = [[len(np.arange(1, *c)) for c in table] for table in C.PARAMETERS["zoom_blur"]]
    assert lengths == [[12, 16, 11, 13, 11], [7, 12, 16, 21, 26]]


def test_motion_blur_equals_imagemagick():
    data = golden("corruption_helpers")
    for i in range(5):
        parameters = data[f"mb_{i}_radius_sigma_angle"]
        assert np.array_equal(C.motion_blur(data["mb_x"], *parameters), data[f"mb_{i}_imagemagick"])
        out = C.motion_blur(data["mb_x"], *parameters, "bethge")
        np.testing.assert_allclose(out, data[f"mb_{i}_numpy_bethge"], atol=1e-4)
    assert np.array_equal(C.motion_blur(data["mb_x"][..., 0], *parameters),
                          data["mb_4_imagemagick"][..., 0])


def test_colour_and_geometry_equal_the_published_helpers():
    data = golden("corruption_helpers")
    x = data["mb_x"] / 255.0
    np.testing.assert_allclose(C.rgb_to_hsv(x), data["hsv"], atol=1e-12)
    np.testing.assert_allclose(C.hsv_to_rgb(data["hsv"]), data["hsv_back"], atol=1e-12)
    out = C.map_coordinates_reflect(x[..., 0].astype(np.float32), data["mapc_y"], data["mapc_x"])
    np.testing.assert_allclose(out, data["mapc_reflect"], atol=1e-6)
    matrix = C.solve_affine(data["affine_src"], data["affine_dst"])
    np.testing.assert_allclose(matrix, data["affine_M"], atol=1e-11)
    image = x.astype(np.float32)
    np.testing.assert_allclose(C.warp_affine(image, matrix), data["affine_warp_opencv4"], atol=1e-6)
    assert np.array_equal(C.warp_affine(image[..., 1], matrix),
                          C.warp_affine(image, matrix)[..., 1])
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(C.warp_affine(image, identity, quantize=False), image, atol=1e-7)
    np.testing.assert_allclose(C.warp_affine(image, matrix, quantize=False),
                               C.warp_affine(image, matrix), atol=0.02)
    for tie in ([1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1], [0.2, 0.2, 0.1]):
        np.testing.assert_allclose(C.hsv_to_rgb(C.rgb_to_hsv(np.array(tie))), tie, atol=1e-15)


def test_spatter_chain_equals_opencv():
    data = golden("corruption_helpers")
    edges = C.canny(data["sp_in"])
    assert np.array_equal(edges, data["sp_canny"])
    distance = C.distance_5x5(255 - edges)
    assert np.array_equal(distance, data["sp_dist"])
    assert np.array_equal(C.equalize(data["sp_blur_u8"]), data["sp_eq"])
    assert (C.distance_5x5(np.ones((5, 6), np.uint8))
            == 8191).all() and (C.canny(np.full((9, 9), 7, np.uint8)) == 0).all()
    constant = np.full((4, 5), 90, np.uint8)
    assert np.array_equal(C.equalize(constant), constant)


def test_distance_equals_the_sequential_passes():
    rng = np.random.RandomState(0)
    image = (rng.rand(23, 31) > 0.02).astype(np.uint8)
    steps = [(-1, 0, 1.0), (-1, -1, 1.4), (-1, 1, 1.4), (0, -1, 1.0), (-2, -1, 2.1969),
             (-2, 1, 2.1969), (-1, -2, 2.1969), (-1, 2, 2.1969)]
    d = np.where(image == 0, np.float32(0), np.float32(8191))
    for sign in (1, -1):
        for y in range(23)[::sign]:
            for x in range(31)[::sign]:
                for dy, dx, cost in steps:
                    v, u = y + sign * dy, x + sign * dx
                    if 0 <= v < 23 and 0 <= u < 31:
                        d[y, x] = min(d[y, x], d[v, u] + np.float32(cost))
    np.testing.assert_allclose(C.distance_5x5(image), d, rtol=3e-7)  # sums in another order
    short = filters._distance_5x5(np.stack([image, image[::-1]]), 4)
    np.testing.assert_allclose(np.minimum(short, 4), np.minimum([d, d[::-1]], 4), rtol=3e-7)


def test_glass_blur_equals_the_loop():
    """The published line means to swap and, on arrays, copies; here literally."""
    image = picture(height=20, width=26)
    for reach, seed in ((1, 0), (2, 1), (4, 2)):
        offsets = np.random.RandomState(seed).randint(-reach, reach,
                                                      size=((20 - 2 * reach) * (26 - 2 * reach), 2))
        expected, k = image.copy(), 0
        for h in range(20 - reach, reach, -1):
            for w in range(26 - reach, reach, -1):
                dx, dy = offsets[k]
                k += 1
                # views: what the tuple assignment sees
                a, b = expected[h, w], expected[h + dy, w + dx]
                expected[h, w], expected[h + dy, w + dx] = b, a
        sources = recipes._glass_sources(np.stack([offsets, offsets]), 20, 26, reach)
        both = np.stack([image, image]).reshape(-1, 3)[sources].reshape(2, 20, 26, 3)
        assert np.array_equal(both[0], expected) and np.array_equal(both[1], expected)


# ---------------------------------------------------------------- the interface

def test_names_and_groups():
    assert len(C.CORRUPTIONS) == 19 and len(C.TEST_CORRUPTIONS) == 15
    assert set(C.TEST_CORRUPTIONS) | set(C.GROUPS["extra"]) == set(C.CORRUPTIONS)
    assert list(C.GROUPS) == ["noise", "blur", "weather", "digital", "extra"]


@pytest.mark.parametrize("name", C.CORRUPTIONS)
def test_batches_equal_single_images_in_any_order(name):
    images = np.stack([picture(k, 32, 32) for k in range(5)])
    before = images.copy()
    batch = C.corrupt_batch(images, name, 2, seed=3)
    single = [C.corrupt(x, name, 2, "cifar", C.image_seed(3, name, 2, i))
              for i, x in enumerate(images)]
    assert np.array_equal(batch, np.stack(single)) and np.array_equal(images, before)
    order = [3, 1, 4]
    assert np.array_equal(C.corrupt_batch(images[order], name, 2, seed=3, indices=order),
                          batch[order])
    part = C.corrupt_batch(images[:, ::-1].transpose(0, 2, 1, 3)[:2], name, 2)     # not contiguous
    assert part.shape == (2, 32, 32, 3) and part.dtype == np.uint8


def test_a_wide_blur_of_small_images_does_not_depend_on_the_batch():
    images = np.full((3, 24, 20, 3), (200, 99, 31), np.uint8)   # on the edge of every truncation
    batch = C.corrupt_batch(images, "gaussian_blur", 5, "imagenet")
    single = C.corrupt(images[0], "gaussian_blur", 5, "imagenet")
    assert all(np.array_equal(one, single) for one in batch)


@pytest.mark.parametrize("variant", C.VARIANTS)
def test_any_size_grey_and_constant_images(variant):
    grey = picture(1, 40, 57)[..., 0]
    for name in C.CORRUPTIONS:
        small = picture(2, 8, 13) if variant != "bethge" else picture(2, 32, 33)
        tiny = () if variant == "bethge" else (picture(3, 1, 2)[:, :1], picture(3, 1, 9),
                                               picture(3, 5, 2), picture(3, 3, 3))
        for image in (picture(0, 40, 57), np.full((33, 32, 3), 255, np.uint8),
                      np.zeros((32, 35, 3), np.uint8), small, *tiny):
            for severity in (1, 5):
                out = C.corrupt(image, name, severity, variant, rng=1)
                assert out.shape == image.shape and out.dtype == np.uint8
        flat = C.corrupt(grey, name, 3, variant, rng=1)
        plane = C.corrupt(grey[..., None], name, 3, variant, rng=1)
        assert flat.shape == grey.shape and np.array_equal(plane[..., 0], flat)
    rgb = C.corrupt(np.repeat(grey[..., None], 3, 2), "fog", 3, variant, rng=1).astype(float)
    assert np.array_equal(C.corrupt(grey, "fog", 3, variant, rng=1),
                          np.rint(rgb @ [0.299, 0.587, 0.114]))


def test_damage_grows_with_severity():
    images = np.stack([picture(k, 32, 32) for k in range(6)])
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "fog",
                 "contrast", "brightness"):
        damage = [np.abs(C.corrupt_batch(images, name, s).astype(int) - images).mean()
                  for s in range(1, 6)]
        assert damage == sorted(damage), name


def test_generators():
    image = picture()
    for name in ("gaussian_noise", "impulse_noise", "snow"):
        one = C.corrupt(image, name, 3, rng=7)
        state = np.random.default_rng(7) if name == "impulse_noise" else np.random.RandomState(7)
        assert np.array_equal(one, C.corrupt(image, name, 3, rng=state))
        assert not np.array_equal(one, C.corrupt(image, name, 3, rng=state))       # it has moved on
        two = C.corrupt(image, name, 3, rng=np.random.default_rng(7))
        assert np.array_equal(two, C.corrupt(image, name, 3, rng=np.random.default_rng(7)))
        assert not np.array_equal(C.corrupt(image, name, 3), C.corrupt(image, name, 3))
    C.corrupt(image, "impulse_noise", 1, rng=np.random.RandomState(0))
    with pytest.raises(TypeError, match="rng"):
        C.corrupt(image, "fog", 1, rng="seed")


def test_frost_textures(tmp_path):
    image = picture(0, 64, 64)
    one, two = np.zeros((300, 300, 3), np.uint8), np.full((300, 300, 3), 200, np.uint8)
    outs = [C.corrupt(image, "frost", 1, rng=s, textures=[one, two]) for s in range(8)]
    plain, bright = np.uint8(image), np.clip(image + 0.4 * 200, 0, 255).astype(np.uint8)
    kinds = [np.array_equal(o, plain) + 2 * np.array_equal(o, bright) for o in outs]
    assert set(kinds) == {1, 2}
    for k in range(1, 7):
        Image.fromarray(two if k == 1 else one).save(tmp_path / f"frost{k}.png")
    assert len(recipes.check_textures(tmp_path)) == 5              # the sixth is never used
    assert any(np.array_equal(C.corrupt(image, "frost", 1, rng=s, textures=tmp_path), bright)
               for s in range(20))
    small = [np.full((20, 24, 3), 9, np.uint8)]               # enlarged to cover the image
    assert (C.corrupt(np.zeros((64, 64, 3), np.uint8), "frost", 3, "bethge", 0, textures=small)
            == 6).all()
    textures = filters.procedural_frost()
    assert len(textures) == 5 and all(0.2 < t.mean() / 255 < 0.6 and t.shape == (512, 512, 3)
                                      for t in textures)
    (tmp_path / "empty").mkdir()
    for bad in ([], [np.zeros((4, 4))], tmp_path / "empty"):
        with pytest.raises(ValueError, match="texture"):
            C.corrupt(image, "frost", 1, textures=bad)


def test_errors():
    image = picture()
    with pytest.raises(TypeError, match="uint8"):
        C.corrupt(image / 255.0, "fog", 1)
    for bad in ({"name": "fogg"}, {"severity": 0}, {"severity": 6}, {"severity": 2.0},
                {"variant": "mnist"}, {"image": image[None]}, {"image": image[..., :2]},
                {"image": image[:31], "variant": "bethge"}, {"image": image[:0]}):
        with pytest.raises(ValueError):
            C.corrupt(**{"image": image, "name": "fog", "severity": 1, **bad})
    with pytest.raises(ValueError, match="gaussian_noise, shot_noise"):
        C.corrupt(image, "fogg", 1)
    with pytest.raises(ValueError, match="images must be"):
        C.corrupt_batch(image, "fog", 1)
    with pytest.raises(TypeError, match="seed"):
        C.corrupt_batch(image[None], "fog", 1, seed=1.5)
    with pytest.raises(ValueError, match="indices"):
        C.corrupt_batch(image[None], "fog", 1, indices=[1, 2])
    plane = image[..., 0]
    for function, *arguments in (
            (C.gaussian_filter, -1), (C.gaussian_filter, 1, "nearest", -1), (C.clipped_zoom, 0.5),
            (C.clipped_zoom, 2, "mnist"), (C.motion_blur, -1, 1, 0), (C.motion_blur, 3, 0, 0),
            (C.motion_blur, 3, 1, np.nan), (C.motion_blur, 3, 1, 0, "mnist")):
        with pytest.raises(ValueError):
            function(plane, *arguments)
    for function in (C.canny, C.distance_5x5, C.equalize):
        with pytest.raises(ValueError, match="H, W"):
            function(image)
        with pytest.raises(TypeError, match="uint8"):
            function(plane / 255)
    with pytest.raises(TypeError, match="uint8"):
        C.motion_blur(plane / 255, 3, 1, 0)
    same = C.gaussian_filter(plane, 0)
    assert np.array_equal(same, plane) and not np.shares_memory(same, plane)


# ---------------------------------------------------------------- data sets

def test_cifar_c_files_and_resume(tmp_path, monkeypatch):
    # two blocks per severity
    images = np.stack([picture(k, 32, 32) for k in range(3)] * 200)[:503]
    labels, names = np.arange(503) % 10, ["contrast", "impulse_noise"]
    whole = tmp_path / "whole"
    calls = []
    C.make_cifar_c(images, whole, labels, names=names, seed=1,
                   progress=lambda d, t: calls.append((d, t)))
    assert calls == [(k, 20) for k in range(1, 21)]
    for name in names:
        x, y = C.load_cifar_c(whole, name)
        assert isinstance(x, np.memmap) and x.shape == (2515, 32, 32, 3)
        assert np.array_equal(y, np.tile(labels, 5))
        for s in (1, 5):
            x, y = C.load_cifar_c(whole, name, s)
            assert np.array_equal(x, C.corrupt_batch(images, name, s, seed=1))
            assert np.array_equal(y, labels)

    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 13:
            raise Killed

    part = tmp_path / "part"
    with pytest.raises(Killed):
        C.make_cifar_c(images, part, labels, names=names, seed=1, progress=kill)
    assert (part / "contrast.npy").exists() and not (part / "impulse_noise.npy").exists()
    with open(part / ".impulse_noise.blocks", "a") as file:
        file.write("5 5")                                     # a line cut short by the kill
    count = []
    real = C.corrupt_batch
    monkeypatch.setattr(C, "corrupt_batch", lambda *args: count.append(1) or real(*args))
    C.make_cifar_c(images, part, labels, names=names, seed=1)
    assert len(count) == 7                                    # what was missing, no more
    assert sorted(p.name for p in part.iterdir()) == sorted(p.name for p in whole.iterdir())
    for file in whole.iterdir():
        assert file.read_bytes() == (part / file.name).read_bytes(), file.name
    with pytest.raises(ValueError, match="seed 1 -> 2"):
        C.make_cifar_c(images, part, names=names, seed=2)


def test_cifar_c_workers_and_errors(tmp_path):
    images = np.stack([picture(k, 32, 32) for k in range(2)])
    C.make_cifar_c(images, tmp_path, names=["fog"], seed=np.int64(0), workers=2)
    # the published files repeat the labels
    np.save(tmp_path / "labels.npy", np.arange(10) % 2)
    x, y = C.load_cifar_c(tmp_path, "fog", 4)
    assert np.array_equal(x, C.corrupt_batch(images, "fog", 4)) and y.tolist() == [0, 1]
    for bad in ({"labels": [1]}, {"names": ["fogg"]}, {"images": images / 255},
                {"images": images[..., 0]}, {"seed": "a"}):
        with pytest.raises((ValueError, TypeError)):
            C.make_cifar_c(**{"images": images, "out_dir": tmp_path / "x", **bad})
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="severity"):
        C.load_cifar_c(tmp_path, "fog", 6)
    with pytest.raises(FileNotFoundError, match="snow.npy"):
        C.load_cifar_c(tmp_path, "snow")
    np.save(tmp_path / "labels.npy", np.arange(3))
    with pytest.raises(ValueError, match="labels.npy"):
        C.load_cifar_c(tmp_path, "fog")
    for broken in (b"", (tmp_path / "fog.npy").read_bytes()[:500]):
        (tmp_path / "frost.npy").write_bytes(broken)
        with pytest.raises(ValueError, match="frost.npy: not a whole"):
            C.load_cifar_c(tmp_path, "frost")
    np.save(tmp_path / "snow.npy", np.zeros((7, 2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="snow.npy"):
        C.load_cifar_c(tmp_path, "snow")


def command(*arguments):
    return [sys.executable, "-m", "data_tools.corruptions", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)


def test_a_killed_writer_goes_on_to_the_same_files(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([picture(k, 32, 32) for k in range(4)] * 150))
    made = run(tmp_path / "x.npy", tmp_path / "whole", "--names", "contrast", "--workers", 1)
    assert made.returncode == 0, made.stderr
    again = (tmp_path / "x.npy", tmp_path / "part", "--names", "contrast", "--workers", 1)
    writer = subprocess.Popen(command(*again), cwd=ROOT, stderr=subprocess.DEVNULL)
    marks = tmp_path / "part" / ".contrast.blocks"
    while not (marks.exists() and marks.read_text()):
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    assert not (tmp_path / "part" / "contrast.npy").exists()
    assert run(*again).returncode == 0
    one, two = ((tmp_path / folder / "contrast.npy").read_bytes() for folder in ("whole", "part"))
    assert one == two and not marks.exists()


def test_a_killed_folder_writer_goes_on_to_the_same_tree(tmp_path):
    src = tmp_path / "val" / "n01"
    src.mkdir(parents=True)
    for k in range(40):
        Image.fromarray(picture(k, 40, 40)).save(src / f"{k}.png")
    options = ("--names", "contrast", "snow", "--size", 32, "--workers", 1)
    made = run(src.parent, tmp_path / "whole", *options)
    assert made.returncode == 0, made.stderr
    part = tmp_path / "part"
    writer = subprocess.Popen(command(src.parent, part, *options), cwd=ROOT,
                              stderr=subprocess.DEVNULL)
    while not any(part.rglob("*.JPEG")):
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    last = part / "snow" / "5" / "n01" / "9.JPEG"
    assert not last.exists()
    last.parent.mkdir(parents=True, exist_ok=True)
    (last.parent / ".9.JPEG.tmp").write_bytes(b"cut short by the kill")
    assert run(src.parent, part, *options).returncode == 0
    one, two = ({file.relative_to(folder): file.read_bytes() for file in folder.rglob("*")
                 if file.is_file()} for folder in (tmp_path / "whole", part))
    assert len(one) == 401 and one == two


def test_imagenet_c_folder_command_line_and_resume(tmp_path):
    src, dst = tmp_path / "val", tmp_path / "c"
    for folder, name, size in (("n01", "a.JPEG", (60, 40)), ("n01", "b.png", (30, 50)),
                               ("n02", "a.jpg", (45, 45))):
        (src / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(len(name), *size[::-1])).save(src / folder / name)
    arguments = (src, dst, "--names", "contrast", "fog", "--severity", 2, 5, "--size", 32,
                 "--workers", 1)
    first = run(*arguments)
    assert first.returncode == 0 and "3/3" in first.stderr, first.stderr
    written = sorted(p.relative_to(dst).as_posix() for p in dst.rglob("*.JPEG"))
    assert len(written) == 12 and "fog/5/n01/b.JPEG" in written
    content = {name: (dst / name).read_bytes() for name in written}
    assert Image.open(dst / written[0]).size == (32, 32)
    kept = (dst / written[1]).stat().st_mtime_ns
    (dst / written[0]).unlink()
    again = run(*arguments)
    assert "3/3" in again.stderr and (dst / written[1]).stat().st_mtime_ns == kept
    assert all((dst / name).read_bytes() == data for name, data in content.items())
    other = run(*arguments, "--seed", 1)
    assert other.returncode == 1 and "seed 0 -> 1" in other.stderr
    (src / "n02" / "broken.jpg").write_bytes(b"no image")
    broken = run(*arguments)
    assert broken.returncode == 1 and "broken.jpg" in broken.stderr
    assert "Traceback" not in broken.stderr
    with pytest.raises(ValueError, match="no images"):
        C.make_imagenet_c(tmp_path / "c" / "nothing", dst)
    Image.fromarray(picture()).save(src / "n02" / "a.png")
    for bad, said in (({"dst": src / "c"}, "must not lie in"), ({"quality": 0}, "quality"),
                      ({"size": -1}, "size"), ({}, "differ in the suffix")):
        with pytest.raises(ValueError, match=said):
            C.make_imagenet_c(**{"src": src, "dst": tmp_path / "new", **bad})
    assert not (tmp_path / "new").exists() and not (src / "c").exists()


def test_command_line_arrays_sheet_and_mistakes(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([picture(k, 32, 32) for k in range(2)]))
    made = run(tmp_path / "x.npy", tmp_path / "c", "--names", "saturate", "--workers", 1)
    assert made.returncode == 0, made.stderr
    assert np.load(tmp_path / "c" / "saturate.npy").shape == (10, 32, 32, 3)
    assert run(tmp_path / "x.npy", tmp_path / "c", "--severity", 1).returncode == 2
    assert "invalid choice" in run(tmp_path / "x.npy", tmp_path / "c", "--names", "fogg").stderr
    assert "DST is missing" in run(tmp_path / "x.npy").stderr
    np.save(tmp_path / "float.npy", np.zeros((2, 32, 32, 3)))
    (tmp_path / "empty.npy").write_bytes(b"")
    for mistake in ((tmp_path / "float.npy", tmp_path / "d"),
                    (tmp_path / "empty.npy", tmp_path / "d"),
                    (tmp_path / "x.npy", tmp_path / "d", "--textures", tmp_path / "nothing")):
        failed = run(*mistake)
        assert failed.returncode == 1 and failed.stderr.startswith("error: "), failed.stderr
    Image.fromarray(picture()).save(tmp_path / "p.png")
    C.contact_sheet(picture(), tmp_path / "sheet.png", names=("fog", "snow"), severities=(1, 5),
                    groups=2)
    assert Image.open(tmp_path / "sheet.png").size == (2 * (130 + 2 * 52), 52)
    assert run(tmp_path / "p.png", "--sheet", tmp_path / "s.png", "--names", "fog", "--size",
               48).returncode == 0
