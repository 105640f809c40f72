from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from reference import relabel
from reference.relabel import label_pooling, roi_align

GOLDEN = Path(__file__).parent / "golden" / "relabel"
POOLING = sorted(p.name for p in GOLDEN.glob("labelpool_*.npz"))


def load(name):
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(g, key, shape):
    out = torch.zeros(shape, dtype=torch.float64)
    out[g[f"{key}__row"].astype(int),
        g[f"{key}__col"].astype(int)] = torch.from_numpy(g[f"{key}__val"])
    return out


def random_topk(generator, batch=3, k=4, h=6, w=9, classes=20, dtype=torch.float64):
    scores = 5 * torch.randn(batch, classes, h, w, generator=generator, dtype=dtype)
    values, index = scores.topk(k, dim=1)
    return torch.stack([values, index.to(dtype)], 1)


def random_coords(generator, batch):
    size = 0.1 + 0.9 * torch.rand(batch, 2, generator=generator, dtype=torch.float64)
    return torch.cat(
        [torch.rand(batch, 2, generator=generator, dtype=torch.float64) * (1 - size), size], 1)


# ---------------------------------------------------------------- values of the released code


@pytest.mark.parametrize("name", POOLING)
def test_label_pooling_equals_the_released_code(name):
    g = load(name)
    topk, coords = torch.from_numpy(g["topk"]), torch.from_numpy(g["crop_ijhw_rel"])
    boxes = torch.from_numpy(g["boxes_official"])
    steady = g["row_max_abs_diff_official_f32_vs_f64"] < 1e-5
    for axes, suffix in (("official", "f64"), ("xy", "xy_correct_f64")):
        expected = dense(g, f"pooled_logits_{suffix}", (len(topk), 1000))
        pooled = label_pooling(topk.double(), coords, axes=axes, softmax=False)
        assert (pooled - expected)[steady].abs().max() < 1e-5
        targets = label_pooling(topk, coords, axes=axes)
        target = torch.from_numpy(
            g["target_f64" if axes == "official" else "target_xy_correct_f64"])
        assert targets.dtype == torch.float32 and (targets - target)[steady].abs().max() < 5e-5
    maps = relabel.get_labelmaps(topk.double())
    assert maps.shape == (len(topk), 1000, *topk.shape[3:])
    aligned = roi_align(maps, boxes, (1, 1))[:, :, 0, 0]
    assert (aligned - dense(g, "pooled_logits_f64", (len(topk), 1000))).abs().max() < 1e-10
    official = torch.from_numpy(g["target_official_f32"])
    assert (roi_align(maps.float(), boxes.float(), 1)[:, :, 0, 0].softmax(1)
            - official).abs().max() < 5e-5


@pytest.mark.parametrize("case", range(6))
def test_roi_align_equals_the_definition(case):
    g = load("roi_align.npz")
    ph, pw, scale, ratio, aligned = g[f"case{case}__args"]
    data, boxes = torch.from_numpy(g["input"]), torch.from_numpy(g[f"case{case}__boxes"])
    arguments = ((int(ph), int(pw)), float(scale), int(ratio), bool(aligned))
    out = roi_align(data, boxes, *arguments)
    assert (out - torch.from_numpy(g[f"case{case}__out"])).abs().max() < 1e-10
    listed = [boxes[boxes[:, 0] == n, 1:] for n in range(3)]
    order = torch.cat([(boxes[:, 0] == n).nonzero()[:, 0] for n in range(3)])
    assert torch.equal(roi_align(data, listed, *arguments), out[order])
    assert (roi_align(data.half(), boxes, *arguments) - out).abs().max() < 2e-2


@pytest.mark.parametrize("name", ["cutmix_soft.npz", "cutmix_soft_ls.npz"])
def test_cutmix_and_loss_equal_the_released_code(name):
    g = load(name)
    images, targets = torch.from_numpy(g["images"]), torch.from_numpy(g["targets"])
    kept = images.clone(), targets.clone()
    out, soft, lam = relabel.cutmix(images, targets, box=g["bbox_r1_c1_r2_c2"],
                                    perm=torch.from_numpy(g["perm"]),
                                    smoothing=float(g["smoothing"]))
    assert torch.equal(out, torch.from_numpy(g["images_out"]))
    assert lam == pytest.approx(float(g["lam_out"]), abs=1e-12)
    assert (soft - torch.from_numpy(g["targets_out"])).abs().max() < 1e-6
    assert torch.equal(images, kept[0]) and torch.equal(targets, kept[1])
    loss = relabel.SoftTargetCrossEntropy()(torch.from_numpy(g["logits"]).double(),
                                            torch.from_numpy(g["targets_out"]).double())
    assert float(loss) == pytest.approx(float(g["loss_f64"]), abs=1e-6)


@pytest.mark.parametrize("key", ["cos_sgd", "cos_adamp", "linear", "default"])
def test_learning_rates_equal_the_released_code(key):
    g = load("lr_schedule.npz")
    lr, epochs, warmup, per_epoch = g[f"{key}__init_epochs_warmup_itersperepoch"]
    epochs, per_epoch = int(epochs), int(per_epoch)
    rates = [relabel.lr_at(e, i, per_epoch, epochs, lr, int(warmup), schedule=key.split("_")[0])
             for e in range(epochs) for i in range(per_epoch)]
    np.testing.assert_allclose(rates, g[key], rtol=1e-12, atol=1e-18)


# ---------------------------------------------------------------- identities


def scalar_roi(channel, x1, y1, x2, y2):
    """RoIAlign to one value, sample by sample."""
    rows, columns = channel.shape
    rh, rw = max(y2 - y1, 1.0), max(x2 - x1, 1.0)
    gh, gw = int(np.ceil(rh)), int(np.ceil(rw))
    total = 0.0
    for iy in range(gh):
        for ix in range(gw):
            y, x = y1 + (iy + 0.5) * rh / gh, x1 + (ix + 0.5) * rw / gw
            if not (-1 <= y <= rows and -1 <= x <= columns):
                continue
            y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
            y0, x0 = int(y), int(x)
            yn, xn = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            fy, fx = y - y0, x - x0
            upper = (1 - fx) * channel[y0, x0] + fx * channel[y0, xn]
            lower = (1 - fx) * channel[yn, x0] + fx * channel[yn, xn]
            total += (1 - fy) * upper + fy * lower
    return total / (gh * gw)


def test_pooling_equals_a_scalar_loop_on_non_square_maps():
    generator = seeded()
    topk, coords = random_topk(generator, batch=5), random_coords(generator, 5)
    maps = relabel.get_labelmaps(topk, 20).numpy()
    kept = topk.clone()
    pooled = label_pooling(topk, coords, 20, softmax=False)
    assert torch.equal(topk, kept)
    for b, (i, j, h, w) in enumerate(coords.tolist()):
        for c in range(20):
            value = scalar_roi(maps[b, c], j * 9 - 0.5, i * 6 - 0.5, (j + w) * 9 - 0.5,
                               (i + h) * 6 - 0.5)
            assert float(pooled[b, c]) == pytest.approx(value, abs=1e-11)
    assert torch.allclose(label_pooling(topk, coords, 20), pooled.softmax(1))
    assert torch.equal(label_pooling(topk[:1], coords[:1], 20), label_pooling(topk, coords, 20)[:1])
    noncontiguous = topk.permute(0, 1, 2, 4, 3).contiguous().permute(0, 1, 2, 4, 3)
    assert torch.equal(label_pooling(noncontiguous, coords, 20), label_pooling(topk, coords, 20))
    assert label_pooling(topk.half(), coords, 20).dtype == torch.float16


def test_batches_of_any_size_and_any_number_of_classes():
    generator = seeded(6)
    for batch, classes in ((100, 7), (45, 1), (1, 3000)):
        shape = {"batch": batch, "classes": classes, "k": min(4, classes), "h": 3, "w": 5}
        topk, coords = random_topk(generator, **shape), random_coords(generator, batch)
        together = label_pooling(topk, coords, classes)
        maps = relabel.get_labelmaps(topk, classes)
        top, left, height, width = coords.T
        boxes = torch.stack([left * 5, top * 3, (left + width) * 5, (top + height) * 3], 1)
        index = torch.arange(batch, dtype=torch.float64)[:, None]
        dense_way = roi_align(maps, torch.cat([index, boxes - 0.5], 1), 1)[:, :, 0, 0].softmax(1)
        assert torch.allclose(together, dense_way, atol=1e-12)
        row = batch // 2
        assert torch.equal(label_pooling(topk[row:row + 1], coords[row:row + 1], classes),
                           together[row:row + 1])
    assert label_pooling(topk[:0], coords[:0], 3000).shape == (0, 3000)


def test_coordinates_as_collated():
    generator = seeded(7)
    topk, coords = random_topk(generator), random_coords(generator, 3)
    collated = torch.utils.data.default_collate([tuple(row) for row in coords.tolist()])
    assert torch.equal(label_pooling(topk, collated, 20), label_pooling(topk, coords, 20))
    assert torch.equal(label_pooling(topk, coords.tolist(), 20), label_pooling(topk, coords, 20))
    coords[:, 2:] = 1 - coords[:, :2]  # crops that end at the border, where rounding may add up
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        whole = label_pooling(topk, coords.to(dtype), 20).sum(1)
        assert torch.allclose(whole, torch.ones(3, dtype=torch.float64))


def test_transposing_the_map_and_the_crop_is_the_official_axis_order():
    generator = seeded(1)
    topk, coords = random_topk(generator, h=7, w=7), random_coords(generator, 3)
    swapped = coords[:, [1, 0, 3, 2]]
    assert torch.equal(label_pooling(topk, coords, 20, axes="official"),
                       label_pooling(topk, swapped, 20))
    assert torch.allclose(label_pooling(topk.transpose(3, 4), coords, 20, "official"),
                          label_pooling(topk, coords, 20))


def test_whole_crop_with_all_classes_is_the_pooled_classifier():
    generator = seeded(2)
    body = nn.Conv2d(3, 8, 3, padding=1).double()
    head = nn.Linear(8, 10).double()
    annotator = relabel.to_dense_classifier(body, head)
    images = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    logits = head(body(images).mean((2, 3)))
    assert (annotator(images).mean((2, 3)) - logits).abs().max() < 1e-12
    annotator.train()
    topk = relabel.generate_label_maps(annotator, images, k=10)
    assert annotator.training and topk.shape == (2, 2, 10, 5, 7) and topk.dtype == torch.float32
    assert (topk[:, 0].diff(dim=1) <= 0).all()
    pooled = label_pooling(topk.double(), [[0, 0, 1, 1]] * 2, 10, softmax=False)
    assert (pooled - logits).abs().max() < 1e-5
    assert head.weight is annotator.head.weight


def test_annotator_from_a_bound_method_runs_in_eval_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop, self.head = nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.Linear(4, 3)

        def forward_features(self, x):
            return self.drop(self.body(x))

    net = Net()
    annotator = relabel.to_dense_classifier(net.forward_features, net.head)
    images = torch.randn(2, 3, 4, 4, generator=seeded())
    assert torch.equal(relabel.generate_label_maps(annotator, images, 3),
                       relabel.generate_label_maps(annotator, images, 3))
    assert net.training and net.drop.training


def test_roi_align_gradient():
    generator = seeded(3)
    data = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor(
        [[1, 0.3, 0.2, 3.1, 2.7], [0, -0.5, -0.5, 2.0, 1.0], [1, 2.0, 1.0, 6.0, 5.5]],
        dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: roi_align(t, boxes, (2, 3), 0.9, 2, True), data)
    none = roi_align(data, boxes[:0], 2)
    assert none.shape == (0, 2, 2, 2)
    none.sum().backward()
    assert not data.grad.any()


def test_variants_and_label_cleaning():
    generator = seeded(4)
    topk, coords = random_topk(generator), random_coords(generator, 3)
    localized = relabel.label_variant(topk, coords, "localized-multi", 20)
    assert torch.equal(localized, label_pooling(topk, coords, 20))
    single = relabel.label_variant(topk, coords, "localized-single", 20)
    assert torch.equal(single.argmax(1), localized.argmax(1))
    assert torch.equal(single.sum(1), torch.ones(3).double())
    whole = label_pooling(topk, [[0, 0, 1, 1]] * 3, 20)
    assert torch.equal(relabel.label_variant(topk, coords, "global-multi", 20), whole)
    assert torch.equal(relabel.label_variant(topk, coords, "global-single", 20),
                       F.one_hot(whole.argmax(1), 20).double())
    ranked = whole.argsort(1, descending=True)
    assert relabel.accepted_labels(topk, ranked[:, 0], 20).all()
    assert not relabel.accepted_labels(topk, ranked[:, 1], 20).any()
    assert relabel.accepted_labels(topk, ranked[:, 1], 20, rank=2).all()


def test_random_crops_follow_the_rule():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    crop = relabel.RandomResizedCropWithCoords(16, generator=seeded())
    areas = []
    for _ in range(300):
        out, (i, j, h, w) = crop(image)
        top, left, height, width = round(i * 30), round(j * 50), round(h * 30), round(w * 50)
        assert (i, j, h, w) == (top / 30, left / 50, height / 30, width / 50)
        assert i + h <= 1
        assert j + w <= 1
        again = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.BILINEAR)
        assert out.size == (16, 16) and out.tobytes() == again.tobytes()
        areas.append(h * w)
    assert 0.07 < min(areas) and 0.3 < np.mean(areas) < 0.55
    for size, expected in [((400, 2), (0, 198, 2, 3)),
                           ((2, 400), (198, 0, 3, 2))]:  # no crop fits: the central one
        never = relabel.RandomResizedCropWithCoords(4, scale=(1, 1), generator=seeded())
        assert never.choose(*size) == expected
    first, second = (relabel.RandomResizedCropWithCoords(4, generator=seeded(9)).choose(90, 70)
                     for _ in range(2))
    assert first == second


def test_random_cutmix_boxes():
    images, targets = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 9, 12), torch.eye(4)
    for seed in range(20):
        mixed, soft, lam = relabel.cutmix(images, targets, generator=seeded(seed))
        kept = (mixed == images).flatten(1).float().mean(1)
        moved = soft.diagonal() < 1
        assert torch.allclose(kept[moved], torch.full_like(kept[moved], lam))
        assert torch.allclose(soft.sum(1), torch.ones(4))
        assert torch.allclose(soft.diagonal()[moved], torch.full_like(kept[moved], lam))
    assert relabel.cutmix(images, targets, lam=1.0, generator=seeded())[2] == 1.0


# ---------------------------------------------------------------- training


def toy_training(seed, epochs=3, resume=None, **options):
    generator = seeded(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 20))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    loader = [(torch.randn(4, 3, 4, 4, generator=generator),
               random_topk(generator, 4, dtype=torch.float32), random_coords(generator, 4))
              for _ in range(5)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, relabel.train(model, loader, optimizer, epochs, warmup_epochs=1, cutmix_prob=0.5,
                                cutmix_off_epochs=1, num_classes=20, generator=seeded(7),
                                resume=resume, **options)


def test_training_lowers_the_loss_and_resumes_exactly():
    _, steps = toy_training(0, epochs=12)
    losses = [step["loss"] for step in steps]
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    _, steps = toy_training(0)
    whole = list(steps)
    assert [s["step"] for s in whole] == list(range(15))
    assert whole[0]["lr"] == 0.0
    assert whole[5]["lr"] == pytest.approx(0.1)
    _, steps = toy_training(0)
    for _ in range(7):
        next(steps)
    snapshot = torch.load(saved(steps.send("state")), weights_only=True)
    _, rest = toy_training(0, resume=snapshot)
    assert list(rest) == whole[7:]


def test_a_snapshot_serves_again_and_so_does_the_optimizer():
    model, data = nn.Linear(4, 3), [(torch.randn(2, 4, generator=seeded()), torch.eye(3)[:2])] * 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def training(resume=None):
        return relabel.train(model, data, optimizer, 3, warmup_epochs=1, resume=resume)

    steps = training()
    before = [next(steps) for _ in range(7)]
    snapshot = steps.send("state")
    rest = list(steps)
    for _ in range(2):
        assert list(training(snapshot)) == rest and before[-1]["lr"] != 0.1


def saved(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_training_on_targets_variants_and_with_a_teacher():
    for variant in relabel.VARIANTS:
        assert len(list(toy_training(0, epochs=1, variant=variant)[1])) == 5
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 20))
    assert len(list(toy_training(0, teacher=teacher)[1])) == 15
    model, data = nn.Linear(4, 3), [(torch.randn(2, 4, generator=seeded()), torch.eye(3)[:2])]
    (step,) = relabel.train(model, data, torch.optim.SGD(model.parameters(), lr=0.1), 1,
                            smoothing=0.1)
    assert step["epoch"] == 0 and step["lr"] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_half_precision_resumes(dtype):
    whole = list(toy_training(0, epochs=2, amp_dtype=dtype)[1])
    assert all(np.isfinite(step["loss"]) for step in whole)
    _, steps = toy_training(0, epochs=2, amp_dtype=dtype)
    for _ in range(4):
        next(steps)
    snapshot = torch.load(saved(steps.send("state")), weights_only=True)
    assert list(toy_training(0, epochs=2, amp_dtype=dtype, resume=snapshot)[1]) == whole[4:]


def test_another_criterion():
    model = nn.Linear(4, 3)
    data = [(torch.randn(2, 4, generator=seeded()), torch.eye(3)[:2])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.BCEWithLogitsLoss()
    expected = criterion(model(data[0][0]), data[0][1]).item()
    (step,) = relabel.train(model, data, optimizer, 1, criterion=criterion)
    assert step["loss"] == pytest.approx(expected)


def test_an_evaluation_between_two_steps_changes_nothing():
    model, steps = toy_training(0, epochs=1)
    for _ in steps:
        assert model.training
        model.eval()


class Loader:
    """Batches that claim a length."""

    def __init__(self, batches, length):
        self.batches, self.length = batches, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.batches)


def test_loaders_of_another_length():
    batches = [(torch.randn(2, 4, generator=seeded(i)), torch.eye(3)[:2]) for i in range(3)]

    def run(loader):
        model = nn.Linear(4, 3)
        return list(relabel.train(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    assert [step["step"] for step in run(Loader(batches, 4))] == [0, 1, 2, 4, 5, 6]
    for loader, words in [(Loader(batches, 2), "more batches than its length, 2"),
                          (Loader([], 0), "no batches in epoch 0"),
                          (Loader(iter(batches), 3), "no batches in epoch 1")]:
        with pytest.raises(ValueError, match=f"loader gave {words}"):
            run(loader)


def test_frozen_parts_stay_in_evaluation_mode():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3))
    model.train()
    model[1].eval()
    relabel.evaluate(model, [(torch.randn(2, 3, 2, 2, generator=seeded()), torch.tensor([0, 1]))])
    assert model.training and model[2].training and not model[1].training


def test_evaluate_counts_single_and_multiple_labels():
    model = nn.Identity()
    model.register_parameter("none", nn.Parameter(torch.zeros(1)))
    logits = torch.tensor([[9.0, 1, 0, 0, 0, 0], [0, 9, 8, 7, 6, 5], [0, 0, 0, 0, 1, 9]])
    single = relabel.evaluate(model, [(logits, torch.tensor([0, 0, 4]))])
    assert single == {"top1": pytest.approx(100 / 3), "top5": pytest.approx(200 / 3), "count": 3}
    valid = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]])
    multi = relabel.evaluate(model, [(logits, valid)])
    assert multi == {"top1": 50.0, "top5": 100.0, "count": 2} and model.training


# ---------------------------------------------------------------- files and bad input


def test_label_map_files(tmp_path):
    m = torch.randn(2, 5, 15, 15, generator=seeded())
    relabel.save_label_map(tmp_path / "a.pt", m)
    assert torch.equal(relabel.load_label_map(tmp_path / "a.pt"), m)
    assert len(list(tmp_path.iterdir())) == 1
    torch.save({"x": m}, tmp_path / "b.pt")
    torch.save(m[0], tmp_path / "c.pt")
    for name in ("b.pt", "c.pt"):
        with pytest.raises(ValueError, match=name):
            relabel.load_label_map(tmp_path / name)
    with ThreadPoolExecutor(4) as threads:  # each save is whole, and none takes another's file
        list(threads.map(lambda n: relabel.save_label_map(tmp_path / "a.pt", m + n), range(80)))
    assert float((relabel.load_label_map(tmp_path / "a.pt") - m).std()) < 1e-4
    assert len(list(tmp_path.iterdir())) == 3
    for wrong in (m[0], m[:, :0], m.tolist(), None):
        with pytest.raises(ValueError, match="m must be"):
            relabel.save_label_map(tmp_path / "d.pt", wrong)


def test_damaged_label_map_files(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"nothing")
    torch.save(Path("code"), tmp_path / "b.pt")
    (tmp_path / "c.pt").touch()
    torch.save(torch.zeros(2, 5, 15, 15), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    damaged = {"e.pt": b"junk", "f.pt": b"hello world", "g.pt": whole[:9000], "h.pt": whole[:-1]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    for name in ("a.pt", "b.pt", "c.pt", *damaged):
        with pytest.raises(ValueError, match=f"{name} must hold one"):
            relabel.load_label_map(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        relabel.load_label_map(tmp_path / "d.pt")


def test_bad_input():
    generator = seeded(5)
    topk, coords = random_topk(generator, h=6, w=9), random_coords(generator, 3)

    def changed(position, value):
        out = topk.clone()
        out[0, position, 0, 0, 0] = value
        return out

    for arguments, words in [((topk, coords - 0.5), "coords must lie"),
                             ((topk, coords + torch.tensor([0, 0, 1.0, 0])), "coords must lie"),
                             ((topk, coords * torch.tensor([1, 1, 0.0, 1])), "coords must lie"),
                             ((topk, coords[:2]), "one .* per map"),
                             ((topk, coords[:, :3]), "coords must be"),
                             ((topk, coords, 20, "official"), "square maps"),
                             ((topk, coords, 20, "yx"), "axes must be"),
                             ((topk[0], coords), "topk must be"), ((topk, coords, 3), "0..2"),
                             ((topk[:, :, :0], coords, 20), "topk must be"),
                             ((topk[..., :0], coords, 20), "topk must be"),
                             ((topk, coords, 0), "num_classes"),
                             ((topk, coords, 20.5), "num_classes"),
                             ((changed(1, -1), coords, 20), "classes"),
                             ((changed(1, 0.5), coords, 20), "classes"),
                             ((changed(1, float("nan")), coords, 20), "classes"),
                             ((changed(0, float("nan")), coords, 20), "not finite"),
                             ((changed(0, -float("inf")), coords, 20), "not finite"),
                             ((topk, coords * float("nan"), 20), "coords must lie"),
                             ((topk.long(), coords), "floating-point")]:
        with pytest.raises(ValueError, match=words):
            label_pooling(*arguments)
    with pytest.raises(TypeError, match="topk must be a tensor, not ndarray"):
        label_pooling(topk.numpy(), coords)
    annotator = relabel.to_dense_classifier(nn.Identity(), nn.Linear(3, 4))
    for k in (0, 5):
        with pytest.raises(ValueError, match="k must be in 1..4"):
            relabel.generate_label_maps(annotator, torch.zeros(1, 3, 2, 2), k)
    with pytest.raises(ValueError, match="annotator gave scores that are not finite"):
        relabel.generate_label_maps(annotator, torch.full((1, 3, 2, 2), float("nan")), 2)
    with pytest.raises(ValueError, match="features must return"):
        annotator(torch.zeros(1, 5, 2, 2))
    for features, head in ((nn.Identity(), nn.Identity()), (None, nn.Linear(3, 4))):
        with pytest.raises(TypeError, match="callable and head an nn.Linear"):
            relabel.to_dense_classifier(features, head)
    for epoch in (0, 9):
        with pytest.raises(ValueError, match="schedule"):
            relabel.lr_at(epoch, 0, 1, 10, 0.1, schedule="step")
    for position in ((11, 0, 5, 10), (-1, 0, 5, 10), (0, 5, 5, 10), (0, 0, 0, 10)):
        with pytest.raises(ValueError, match="epoch must be"):
            relabel.lr_at(*position, 0.1)
    assert relabel.lr_at(10, 0, 5, 10, 0.1) == 0 and relabel.lr_at(5, 0, 1, 5, 0.1) == 0.1
    for rates in ((-0.1,), (float("nan"),), (0.1, -1), (0.1, 5, float("inf"))):
        with pytest.raises(ValueError, match="finite and not negative"):
            relabel.lr_at(0, 0, 1, 10, *rates)
    for options, words in (({"cutmix_prob": 1.5}, "cutmix_prob must"), ({"axes": "yx"}, "axes"),
                           ({"variant": "local"}, "variant"), ({"schedule": "step"}, "schedule"),
                           ({"warmup_epochs": -1}, "warmup_epochs"), ({"epochs": -1}, "epoch must"),
                           ({}, "loader must give")):
        model = nn.Linear(1, 1)
        with pytest.raises((ValueError, TypeError), match=words):
            next(relabel.train(model, [(torch.zeros(2, 1),)], None, **{
                "epochs": 1, "init_lr": 0.1, "cutmix_off_epochs": 0} | options))
    with pytest.raises(ValueError, match="bfloat16 cannot number 1000 classes"):
        label_pooling(topk.bfloat16(), coords)
    with pytest.raises(ValueError, match="variant"):
        relabel.label_variant(topk, coords, "local", 20)
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        relabel.cutmix(torch.zeros(2, 3, 4, 4), torch.eye(2), generator=3)
    with pytest.raises(ValueError, match="lam must"):
        relabel.cutmix(torch.zeros(2, 3, 4, 4), torch.eye(2), lam=1.5)
    for box in ((0, 0, 5, 4), (0, 0, 4), (0, 0.5, 4, 4)):
        with pytest.raises(ValueError, match="box must be"):
            relabel.cutmix(torch.zeros(2, 3, 4, 4), torch.eye(2), box=box)
    for beta in (0, float("inf")):
        with pytest.raises(ValueError, match="beta must be positive"):
            relabel.cutmix(torch.zeros(2, 3, 4, 4), torch.eye(2), beta=beta)
    for perm in ([0], [0, 2], [0, -1], [0.5, 1]):
        with pytest.raises(ValueError, match="perm must hold 2 indices"):
            relabel.cutmix(torch.zeros(2, 3, 4, 4), torch.eye(2), perm=torch.tensor(perm))
    with pytest.raises(ValueError, match="smoothing in"):
        relabel.cutmix(torch.zeros(2, 3, 4, 4), torch.eye(2), smoothing=1.5)
    with pytest.raises(ValueError, match="images must be"):
        relabel.cutmix(torch.zeros(2, 3, 4, 4), torch.eye(3))
    with pytest.raises(ValueError, match="logits and targets"):
        relabel.SoftTargetCrossEntropy()(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="boxes"):
        roi_align(torch.zeros(1, 1, 3, 3), torch.zeros(2, 4), 1)
    with pytest.raises(ValueError, match="boxes as a list"):
        roi_align(torch.zeros(1, 1, 3, 3), [[0, 0, 1, 1]], 1)
    with pytest.raises(ValueError, match="at least one cell"):
        roi_align(torch.zeros(1, 1, 0, 3), torch.zeros(2, 5), 1)
    with pytest.raises(ValueError, match="image index"):
        roi_align(torch.zeros(1, 1, 3, 3), torch.tensor([[1.0, 0, 0, 1, 1]]), 1)
    with pytest.raises(ValueError, match="input must be"):
        roi_align(torch.zeros(1, 3, 3), torch.zeros(2, 5), 1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="boxes must be finite"):
            roi_align(torch.zeros(1, 1, 3, 3), torch.tensor([[0.0, 0, 0, value, 1]]), 1)
    for size in ((1, 0), (1, 2, 3), -1):
        with pytest.raises(ValueError, match="output_size must be positive"):
            roi_align(torch.zeros(1, 1, 3, 3), torch.zeros(1, 5), size)
    for options in ((0,), (2.5,), (4, (0.1,)), (4, (0.5, 0.1)), (4, (0.1, 1), (1, float("inf")))):
        with pytest.raises(ValueError, match="size must be"):
            relabel.RandomResizedCropWithCoords(*options)
    with pytest.raises(TypeError, match="img must be a PIL image"):
        relabel.RandomResizedCropWithCoords(4)(np.zeros((8, 8, 3)))
