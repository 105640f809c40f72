"""Transforms and the batch loader, on trees written here."""

import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import imagenet as data
from data_tools import loader as loading
from image_trees import damage, equal, photo, tree  # noqa: F401, F811


# --------------------------------------------------------------------------------- transforms


def test_crop_boxes_follow_the_stated_distribution():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([loading.random_resized_crop_box((640, 480), generator)
                          for _ in range(4000)]).double()
    left, top, width, height = boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 640).all() and (top + height <= 480).all()
    area, aspect = width * height / (640 * 480), width / height
    assert 0.079 < area.min() < 0.09 and area.max() > 0.95
    assert aspect.min() > 0.73 and aspect.max() < 1.36
    assert abs(aspect[area < 0.4].log().mean()) < 0.02  # large crops fit better when they are wide
    inside = (width < 500) & (height < 400)
    assert abs((left / (640 - width))[inside].mean() - 0.5) < 0.02
    assert abs((top / (480 - height))[inside].mean() - 0.5) < 0.02


def test_crop_box_falls_back_to_the_centre():
    assert loading.random_resized_crop_box((1000, 30), torch.Generator()) == (480, 0, 40, 30)
    assert loading.random_resized_crop_box((30, 1000), torch.Generator()) == (0, 480, 30, 40)
    assert loading.random_resized_crop_box((1, 1), torch.Generator()) == (0, 0, 1, 1)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [17, 40, 120, (30, 50)])
def test_crop_resize_agrees_with_pillow(interpolation, size):
    image, box = photo(3, 90, 70), (11, 7, 60, 55)
    rows, columns = (size, size) if isinstance(size, int) else size
    method = {"bicubic": Image.Resampling.BICUBIC,
              "bilinear": Image.Resampling.BILINEAR}[interpolation]
    expected = np.asarray(image.crop((11, 7, 71, 62)).resize((columns, rows), method), int)
    for source in (image, np.asarray(image)):
        out = loading.crop_resize(source, box, size, interpolation=interpolation)
        assert out.dtype == torch.uint8 and out.shape == (3, rows, columns)
        difference = np.abs(out.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 3 and difference.mean() < 0.3
    flipped = loading.crop_resize(image, box, size, interpolation=interpolation, flip=True)
    assert torch.equal(flipped.flip(2), out)


def test_crops_and_transforms_refuse_what_cannot_be():
    image = np.zeros((30, 40, 3), np.uint8)
    for box in ((-1, 0, 9, 9), (0, 0, 41, 9), (0, 0, 9, 31), (0, 0, 0, 9), (float("nan"), 0, 9, 9)):
        with pytest.raises(ValueError, match="must lie in the image of 40 x 30"):
            loading.crop_resize(image, box, 8)
    for wrong in (dict(size=0), dict(size=1.5), dict(scale=(0, 1)), dict(scale=(0.5, 1.5)),
                  dict(ratio=(2, 1)), dict(flip=2), dict(interpolation="nearest")):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            data.TrainTransform(**wrong)
    with pytest.raises(ValueError, match="size must be"):
        data.EvalTransform(0)
    for wrong in (dict(padding=-1), dict(padding=0.5), dict(flip=-1)):
        with pytest.raises(ValueError, match="padding must be .* and flip in"):
            data.PadCropTransform(**wrong)


@pytest.mark.parametrize("orientation", [1, 6])
def test_draft_decoding_is_close_and_smaller(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(4, 640, 480).save(tmp_path / "x.jpg", quality=95, exif=exif)

    def opened():
        return Image.open(tmp_path / "x.jpg")

    width, height = loading.image_size(opened())
    assert loading.decode(opened(), (100, 100)).size == (width // 4, height // 4)
    assert loading.decode(opened()).size == (width, height)
    box = (40, 60, 400, 380)
    fast = loading.crop_resize(opened(), box, 64)
    full = loading.crop_resize(loading.decode(opened()), box, 64)
    assert (fast.int() - full.int()).abs().float().mean() < 1.5


def test_encoded_jpeg_decodes_as_pillow_does(tmp_path):
    photo(8, 203, 101).save(tmp_path / "x.jpg", quality=90)
    encoded = loading.EncodedJpeg((tmp_path / "x.jpg").read_bytes(), (203, 101))
    for at_least in (None, (203, 101), (101, 50), (60, 30), (40, 25), (3, 3)):
        expected = loading.decode(Image.open(tmp_path / "x.jpg"), at_least)
        assert np.array_equal(np.asarray(loading.decode(encoded, at_least)), np.asarray(expected))
    whole = np.asarray(loading.decode(encoded))
    for row in (0, 1, 37, 80, 84, 85, 100, 101):
        top = encoded.above(row)
        assert top.size == (203, min(101, row + 4))
        assert np.array_equal(np.asarray(top.decode())[:row], whole[:row])
    box = (150, 3, 50, 40)
    assert torch.equal(loading.crop_resize(encoded, box, 20),
                       loading.crop_resize(Image.fromarray(whole), box, 20))
    for damaged in (encoded.data[:500], b"", b"x" * 500):
        with pytest.raises(data.BadImage):
            loading.decode(loading.EncodedJpeg(damaged, (203, 101)))


def test_train_transform_returns_its_crop(tmp_path):
    image = np.zeros((100, 200, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(100)[:, None], np.arange(200)[None]
    transform = data.TrainTransform(50, scale=(0.3, 0.3), flip=0.0, coords=True)
    out, coords = transform(image, torch.Generator().manual_seed(1))
    top, left, height, width = coords.tolist()
    assert out[0].float().mean() == pytest.approx(100 * (top + height / 2) - 0.5, abs=1)
    assert out[1].float().mean() == pytest.approx(200 * (left + width / 2) - 0.5, abs=1)
    assert height * width == pytest.approx(0.3, abs=0.01)
    same, _ = transform(image, torch.Generator().manual_seed(1))
    assert torch.equal(out, same)
    flip = data.TrainTransform(50, scale=(0.3, 0.3), flip=1.0)(image,
                                                               torch.Generator().manual_seed(1))
    assert torch.equal(flip.flip(2), out)


def test_augmentation_gets_the_image_and_the_generator():
    class Invert:
        generator = None

        def __call__(self, image):
            assert image.size == (8, 8) and self.generator is generator
            return Image.eval(image, lambda value: 255 - value)

    generator = torch.Generator().manual_seed(3)
    augmented = data.TrainTransform(8, augment=Invert())(np.asarray(photo(5)), generator)
    plain = data.TrainTransform(8)(np.asarray(photo(5)), torch.Generator().manual_seed(3))
    assert torch.equal(augmented, 255 - plain)


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (70, 70)])
def test_eval_transform_resizes_then_crops(size):
    image = photo(6, *size)
    rows, columns = int(36 * size[1] / 70), int(36 * size[0] / 70)
    whole = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC), int)
    top, left = round((rows - 32) / 2), round((columns - 32) / 2)
    out = data.EvalTransform(32, crop=0.875)(image)
    difference = np.abs(out.permute(1, 2, 0).numpy() - whole[top : top + 32, left : left + 32])
    assert out.shape == (3, 32, 32) and difference.max() <= 3
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="crop must be"):
            data.EvalTransform(32, crop=bad)
    with pytest.raises(ValueError, match="interpolation must be"):
        data.TrainTransform(32, interpolation="nearest")


def test_pad_crop_transform():
    image = np.asarray(photo(7, 32, 32))
    generator, seen = torch.Generator().manual_seed(0), set()
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    places = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    for _ in range(400):
        out = data.PadCropTransform(flip=0.0)(image, generator)
        seen.add(places[out.permute(1, 2, 0).contiguous().numpy().tobytes()])
    assert len(seen) > 75


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator())
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    expected = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    out = data.normalize(images)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), expected, atol=1e-6)
    with pytest.raises(TypeError, match="must be uint8"):
        data.normalize(out)


# ------------------------------------------------------------------------------------- loader


def test_batches_depend_neither_on_workers_nor_on_the_start(tree):
    dataset = data.imagenet(tree)
    options = dict(transform=data.TrainTransform(16, coords=True), shuffle=True, seed=5)
    plain = data.Loader(dataset, 5, **options)
    first, second = list(plain), list(plain)
    assert len(plain) == 3 and [len(b[1]) for b in first] == [5, 5, 2]
    assert first[0][2].shape == (5, 4)
    assert not equal(first, second)  # every pass is the next epoch
    assert not equal(first, list(data.Loader(dataset, 5, **{**options, "seed": 6})))
    workers = data.Loader(dataset, 5, workers=2, **options)
    assert equal(first, list(workers)) and equal(second, list(workers))
    for loader in (plain, workers):
        loader.set_epoch(1, 2)
        assert len(loader) == 3 and equal(second[2:], list(loader))
        loader.set_epoch(0)
        iterator = iter(loader)
        next(iterator)
        del iterator  # an epoch left early does not disturb the next
        assert equal(second, list(loader))
    with pytest.raises(ValueError, match="an epoch has 3 batches"):
        plain.set_epoch(0, 4)


def test_skipped_batches_are_not_read(tree):
    class Counted:
        def __init__(self, dataset):
            self.dataset, self.labels, self.opened = dataset, dataset.labels, []

        def __len__(self):
            return len(self.dataset)

        def open(self, index):
            self.opened.append(index)
            return self.dataset.open(index)

    counted = Counted(data.imagenet(tree))
    loader = data.Loader(counted, 4, transform=data.EvalTransform(8))
    loader.set_epoch(0, 2)
    list(loader)
    assert counted.opened == [8, 9, 10, 11]


def test_shares_of_the_ranks(tree):
    dataset = data.imagenet(tree)
    dataset.labels = np.arange(12)  # labels show which samples came
    make = lambda rank, **more: data.Loader(  # noqa: E731
        dataset, 2, rank=rank, world_size=5, transform=data.EvalTransform(8), **more
    )
    seen = [torch.cat([labels for _, labels in make(rank)]).tolist() for rank in range(5)]
    assert sorted(sum(seen, [])) == list(range(12)) and seen[0] == [0, 5, 10]
    seen = [torch.cat([labels for _, labels in make(rank, shuffle=True)]).tolist()
            for rank in range(5)]
    assert {len(share) for share in seen} == {3} and set(sum(seen, [])) == set(range(12))
    loaders = [make(rank, shuffle=True, drop_last=True) for rank in range(5)]
    seen = [torch.cat([labels for _, labels in loader]).tolist() for loader in loaders]
    assert {len(loader) for loader in loaders} == {1} and len(set(sum(seen, []))) == 10
    one = data.Loader(dataset, 10, shuffle=True, drop_last=True, transform=data.TrainTransform(8))
    two = [
        next(iter(data.Loader(dataset, 5, rank=r, world_size=2, shuffle=True, drop_last=True,
                              transform=data.TrainTransform(8))))
        for r in range(2)
    ]
    images, labels = next(iter(one))
    assert torch.equal(labels[0::2], two[0][1]) and torch.equal(images[1::2], two[1][0])


def test_sampler_repeats_are_augmented_differently(tree):
    class Thrice:
        def __len__(self):
            return 6

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch] * 3 + [7] * 3)

    loader = data.Loader(data.imagenet(tree), 3, sampler=Thrice(),
                         transform=data.TrainTransform(12))
    loader.set_epoch(2)
    (first, labels), (second, _) = loader
    assert labels.tolist() == [0, 0, 0]
    assert not torch.equal(first[0], first[1]) and not torch.equal(second[0], second[2])


def test_ordinary_transforms_and_array_labels(tree):
    def transform(image):
        assert image.mode == "RGB"
        return torch.full((2,), float(image.width))

    dataset = data.imagenet(tree)
    dataset.labels = torch.arange(36.0).view(12, 3)
    images, labels = next(iter(data.Loader(dataset, 4, transform=transform)))
    assert images[:, 0].tolist() == [48.0, 56.0, 64.0, 72.0] and labels.shape == (4, 3)
    with pytest.raises(ValueError, match="different sizes"):
        list(data.Loader(dataset, 4))


def test_normalised_batches_and_bad_arguments(tree):
    dataset = data.imagenet(tree)
    stats = (data.IMAGENET_MEAN, data.IMAGENET_STD)
    raw = data.Loader(dataset, 4, transform=data.EvalTransform(8), device="cpu")
    done = data.Loader(dataset, 4, transform=data.EvalTransform(8), device="cpu", normalize=stats)
    for (images, _), (floats, _) in zip(raw, done):
        assert torch.equal(data.normalize(images), floats)
    for wrong, message in (
        (dict(batch_size=0), "batch_size"), (dict(rank=1), "rank"),
        (dict(on_bad_image="x"), "on_bad_image"), (dict(workers=-1), "workers"),
        (dict(batch_size=16, drop_last=True), "12 samples do not fill a batch of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            data.Loader(dataset, **{"batch_size": 4, **wrong})


def test_batches_on_the_device(tree):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(transform=data.EvalTransform(8),
                   normalize=(data.IMAGENET_MEAN, data.IMAGENET_STD), workers=1)
    dataset = data.imagenet(tree)
    for (a, b), (c, d) in zip(data.Loader(dataset, 4, device=device, **options),
                              data.Loader(dataset, 4, **options)):
        assert a.device.type == b.device.type == device
        assert torch.allclose(a.cpu(), c, atol=1e-6) and torch.equal(b.cpu(), d)


def test_sample_seeds_do_not_collide():
    seeds = {loading.sample_seed(s, e, i, 0) for s in range(3) for e in range(10)
             for i in range(500)}
    assert len(seeds) > 15000 - 3  # 32 bits: 0.03 collisions are expected among 15,000
    assert loading.sample_seed(0, 1) != loading.sample_seed(1, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_raises_or_leaves_out_bad_images(tree, workers):
    dataset, expected = damage(tree)
    options = dict(transform=data.EvalTransform(16), workers=workers)
    with pytest.raises(data.BadImage) as caught:
        list(data.Loader(dataset, 6, **options))
    assert "n02_0.JPEG" in str(caught.value) and "\n" not in str(caught.value)
    loader = data.Loader(dataset, 4, on_bad_image="skip", **options)
    with pytest.warns(UserWarning, match="4 so far"):
        labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [0] * 4 + [2] * 4 and len(loader.bad_images) == 4


def test_shuffled_loader_replaces_bad_images(tree):
    dataset, _ = damage(tree)
    loader = data.Loader(
        dataset, 4, shuffle=True, on_bad_image="skip", transform=data.TrainTransform(16)
    )
    with pytest.warns(UserWarning):
        batches = list(loader)
    assert [len(images) for images, _ in batches] == [4, 4, 4]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0] * 4 + [2] * 8


def test_a_loader_is_no_reference_cycle():
    """Or its workers would not stop at once, but be killed after five seconds each."""
    dataset = data.ArrayImages(np.zeros((6, 4, 4, 3), np.uint8), range(6))
    loader = data.Loader(dataset, 2, transform=data.PadCropTransform(1), workers=1)
    worker = next(iter(loader)) and loader._loader._iterator._workers[0]
    freed = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert freed() is None and not worker.is_alive()
    finally:
        gc.enable()


def test_two_passes_at_once_and_the_global_generator():
    dataset = data.ArrayImages(np.zeros((6, 4, 4, 3), np.uint8), range(6))
    loader = data.Loader(dataset, 2, shuffle=True, seed=3)
    state = torch.get_rng_state()
    first, second = list(loader), list(loader)
    assert torch.equal(torch.get_rng_state(), state)          # DataLoader would draw a seed
    loader.set_epoch(0)
    pairs = list(zip(loader, loader))
    assert equal([a for a, _ in pairs], first) and equal([b for _, b in pairs], second)
