import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reference import videomix as vm
from reference.videomix import VideoMix, apply_cuboid, cuboid_lambda, mix_labels, sample_cuboid

GOLDEN = Path(__file__).parent / "golden" / "videomix"
EVERY = [lambda **k: VideoMix(**k), lambda **k: VideoMix("T", **k),
         lambda **k: VideoMix("ST", per_sample=True, **k), lambda **k: vm.VideoMixup(**k),
         lambda **k: vm.FadeMixup(**k), lambda **k: vm.CutMixup("ST", **k),
         lambda **k: vm.FrameCutMix(**k)]


def load(name):
    with np.load(GOLDEN / name) as file:
        return {key: torch.from_numpy(file[key]) if file[key].ndim else file[key].item()
                for key in file.files}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(batch=4, frames=8, side=16, seed=0):
    return torch.rand(batch, 3, frames, side, side, generator=seeded(seed)), torch.arange(batch) % 3


# ---------------------------------------------------------------- values of public implementations

def test_boxes_of_public_code():
    g = load("boxes.npz")
    checked = 0
    for size, mode, center, box, lam, adjusted in zip(
        g["size_thw"].tolist(),
        g["mode"].tolist(),
        g["center_thw"].tolist(),
        g["box"].tolist(),
        g["lam"].tolist(),
        g["lam_adjusted"].tolist(),
    ):
        if size[0] == 1 and mode:
            continue
        found = sample_cuboid(size, lam, ("S", "T", "ST")[mode], center=center)
        assert list(found) == box and cuboid_lambda(found, size) == pytest.approx(
            adjusted, abs=1e-12
        )
        checked += 1
    assert checked == 176


@pytest.mark.parametrize("number", [0, 1])
def test_the_family_of_operators(number):
    g = load(f"mix_family_{number}.npz")
    x, y, classes = g["x"], g["y"], g["num_classes"]

    def loss_of(clip, perm, lam):
        flat = clip.flatten(2)
        features = torch.cat([flat.mean(2), flat.std(2), clip[:, :, 0].mean((2, 3)),
                              clip[:, :, -1].mean((2, 3))], 1)
        logits = features @ g["readout_weight"]
        target = mix_labels(y, perm, lam, classes)
        whole = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[perm])
        assert vm.soft_cross_entropy(logits, target).item() == pytest.approx(whole.item(), abs=1e-5)
        return logits, whole.item()

    for op in sorted({key[:-6] for key in g if key.endswith("_mixed")}):
        perm, kept = g[f"{op}_perm"], x.clone()
        name = op.removesuffix("_1")
        if name in ("cutmix", "framemix", "cubemix"):
            box = tuple(g[f"{op}_box"].tolist())
            mixed, lam = apply_cuboid(x, box, perm), cuboid_lambda(box, x.shape[2:])
            assert torch.equal(mixed, g[f"{op}_mixed"]) and torch.equal(
                apply_cuboid(x.clone(), box, perm, inplace=True), mixed
            )
            many = torch.tensor([box] * len(x))
            assert torch.equal(apply_cuboid(x, many, perm), mixed) and torch.equal(
                apply_cuboid(x.clone(), many, perm, inplace=True), mixed
            )
        elif name == "mixup":
            lam = g[f"{op}_lam_label"]
            mixed = vm.mixup_clips(x, perm, lam)
            assert torch.allclose(vm.mixup_clips(x, perm, torch.full((len(x),), lam)), mixed,
                                  atol=1e-6)
        elif name == "fademixup":
            lam = g[f"{op}_lam_label"]
            mixed = vm.fade_mixup_clips(x, perm, lam, g[f"{op}_fade_adj"])
        else:
            mixed, lam = vm.cut_mixup_clips(x, tuple(g[f"{op}_box"].tolist()), perm,
                                            g[f"{op}_beta_draws"][1].item(), g[f"{op}_u"])
        assert (mixed - g[f"{op}_mixed"]).abs().max() < 1e-6, op
        assert lam == pytest.approx(g[f"{op}_lam_label"], abs=1e-7) and torch.equal(x, kept)
        logits, loss = loss_of(mixed, perm, lam)
        assert (logits - g[f"{op}_logits"]).abs().max() < 1e-5 and loss == pytest.approx(
            g[f"{op}_loss"], abs=1e-5
        )


@pytest.mark.parametrize("number", [0, 1])
def test_other_public_implementations(number):
    g = load(f"peers_{number}.npz")
    x, y, classes = g["x"], g["y"], g["num_classes"]
    flip = torch.arange(len(x) - 1, -1, -1)
    for peer in ("ptv", "slowfast"):
        suffix = "_smooth0.1" if peer == "ptv" else ""
        for kind in ("cutmix", "mixup"):
            mixed, target = g[f"{peer}_{kind}{suffix}_mixed"], g[f"{peer}_{kind}_target"]
            own, other = (mix_labels(y, flip, lam, classes, 0.1) for lam in (1.0, 0.0))
            row = int((own - other).abs().sum(1).argmax())
            difference = (own - other)[row]
            # partners of equal labels: the weight cannot be read off
            if not difference.any():
                continue
            lam = ((target - other)[row] @ difference / (difference @ difference)).item()
            assert (mix_labels(y, flip, lam, classes, 0.1) - target).abs().max() < 1e-5
            if kind == "mixup":
                assert (vm.mixup_clips(x, flip, lam) - mixed).abs().max() < 1e-5
            else:
                changed = (mixed != x).flatten(0, 1).any(0)
                t, h, w = (changed.amax(tuple(d for d in range(3) if d != a)).nonzero().flatten()
                           for a in range(3))
                if len(t):
                    box = (int(t[0]), int(t[-1]) + 1, int(h[0]), int(h[-1]) + 1, int(w[0]),
                           int(w[-1]) + 1)
                    assert torch.equal(apply_cuboid(x, box, flip), mixed) and cuboid_lambda(
                        box, x.shape[2:]
                    ) == pytest.approx(lam, abs=1e-5)
    frames, height, width = x.shape[2:]
    x1, y1, x2, y2 = g["mmaction_cutmix_box_x1y1x2y2"].tolist()
    box = (0, frames, y1, y2, x1, x2)
    assert torch.equal(apply_cuboid(x, box, g["mmaction_cutmix_perm"]), g["mmaction_cutmix_mixed"])
    assert (mix_labels(y, g["mmaction_cutmix_perm"], cuboid_lambda(box, x.shape[2:]),
                       classes) - g["mmaction_cutmix_target"]).abs().max() < 1e-6
    h1, w1, h2, w2 = g["jc_tubemix_box_h1w1h2w2"].tolist()
    box = (0, frames, h1, h2, w1, w2)
    assert torch.equal(apply_cuboid(x, box, g["jc_tubemix_perm"]), g["jc_tubemix_mixed"])
    assert (vm.mix_frame_labels(y, g["jc_tubemix_perm"], box, x.shape[2:],
                                classes) - g["jc_tubemix_target_kt"]).abs().max() < 1e-6
    box = sample_cuboid(x.shape[2:], g["jc_stackmix_lam"], "T", placement="suffix")
    assert torch.equal(apply_cuboid(x, box, g["jc_stackmix_perm"]), g["jc_stackmix_mixed"])
    assert (vm.mix_frame_labels(y, g["jc_stackmix_perm"], box, x.shape[2:],
                                classes) - g["jc_stackmix_target_kt"]).abs().max() < 1e-6


# ---------------------------------------------------------------- cuboids

@pytest.mark.parametrize("variant, expected", [("S", 0.3208), ("T", 0.4167), ("ST", 0.2437)])
def test_expected_volume(variant, expected):
    generator, size = seeded(), (400, 400, 400)
    draws = torch.rand(40_000, generator=generator, dtype=torch.float64).tolist()
    boxes = torch.tensor([sample_cuboid(size, lam, variant, "exact", generator=generator)
                          for lam in draws])
    assert 1 - cuboid_lambda(boxes, size).mean().item() == pytest.approx(expected, abs=0.006)


def test_axes_of_length_one_and_exact_edges():
    image = sample_cuboid((1, 20, 20), 0.5, "S", center=(0, 10, 10))
    for variant in ("T", "ST"):
        assert sample_cuboid((1, 20, 20), 0.5, variant, center=(0, 10, 10)) == image
    assert sample_cuboid((6, 1, 20), 0.75, "S", center=(0, 0, 10)) == (0, 6, 0, 1, 8, 12)
    assert sample_cuboid((8, 10, 10), 0.5, "T", "exact", center=(4.2, 0, 0)) == (2, 6, 0, 10, 0, 10)
    assert sample_cuboid((8, 10, 10), 0.0, "S", "exact", center=(0, 10, 0)) == (0, 8, 5, 10, 0, 5)
    empty = sample_cuboid((8, 10, 10), 1.0, "ST", generator=seeded())
    assert empty[::2] == empty[1::2]
    for size, variant in (((5, 1, 1), "S"), ((1, 1, 1), "T"), ((1, 1, 1), "ST")):
        with pytest.raises(ValueError, match="no axis"):
            sample_cuboid(size, 0.5, variant)


# ---------------------------------------------------------------- modules

@pytest.mark.parametrize("make", EVERY)
def test_modules_mix_reproducibly_and_leave_the_input(make):
    x, y = clips()
    kept, mix = x.clone(), make(num_classes=3, smoothing=0.1)
    for seed in range(8):
        a, b = mix(x, y, seeded(seed)), mix(x, y, seeded(seed))
        assert torch.equal(a.x, b.x) and torch.equal(a.target, b.target) and torch.equal(x, kept)
        lam = torch.as_tensor(a.lam)
        assert torch.allclose(a.target, mix_labels(y, a.perm, a.lam, 3, 0.1)) and torch.allclose(
            a.target.sum(1), torch.ones(4)
        )
        assert (a.x.shape == x.shape and ((0 <= lam) & (lam <= 1)).all()
                and torch.equal(a.target_b, y[a.perm]))
        if a.boxes is not None and not isinstance(mix, vm.CutMixup):
            own = (a.x == x).all(1).flatten(1).double().mean(1)
            mixed = a.perm != torch.arange(4)
            assert torch.allclose(own[mixed], lam.double().expand(4)[mixed])
    quiet = make(num_classes=3, smoothing=0.1).eval()(x, y)
    assert (quiet.x is x and quiet.lam == 1.0 and torch.equal(quiet.target, F.one_hot(y, 3).float())
            and quiet.boxes is None)
    never = make(num_classes=3, prob=0.0)(x, y, seeded())
    assert never.x is x and torch.equal(never.perm, torch.arange(4))
    assert make(num_classes=3, pairing="flip")(x, y, seeded()).perm.tolist() == [3, 2, 1, 0]
    soft = make()(x, F.one_hot(y, 3).double(), seeded())
    assert soft.target.dtype == torch.float64


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6")
@pytest.mark.parametrize("make", [vm.VideoMix, vm.VideoMixup])
def test_mixing_per_sample_compiles_for_any_batch_size(make):
    torch._dynamo.reset()
    mix, (x, y) = make(num_classes=3, per_sample=True), clips()
    compiled = torch.compile(mix, backend="eager")
    with torch.random.fork_rng():
        for size in (2, 3, 4):                                # from the second on it is left free
            before = torch.get_rng_state()
            plain = mix(x[:size], y[:size])
            torch.set_rng_state(before)
            same = compiled(x[:size], y[:size])
            assert torch.equal(plain.x, same.x) and torch.equal(plain.target, same.target)


@pytest.mark.parametrize("make", EVERY)
def test_both_pathways_see_the_same(make):
    fast, y = clips(frames=16)
    for stride in (2, 4):
        slow = fast[:, :, ::stride].clone()
        for seed in range(6):
            result = make(num_classes=3)((slow, fast), y, seeded(seed))
            assert torch.allclose(result.x[0], result.x[1][:, :, ::stride], atol=1e-7)


def test_frame_labels():
    x, y = clips()
    for mix in (VideoMix("T", num_classes=3, frame_labels=True),
                VideoMix("ST", num_classes=3, frame_labels=True, per_sample=True),
                vm.FadeMixup(num_classes=3, frame_labels=True)):
        result = mix(x, y, seeded(1))
        assert result.frame_target.shape == (4, 3, 8) and torch.allclose(
            result.frame_target.mean(2), result.target, atol=1e-6
        )
    assert VideoMix(num_classes=3, frame_labels=True).eval()(x, y).frame_target.shape == (4, 3, 8)


def test_cutout_random_choice_inplace_and_integer_clips():
    x, y = clips()
    cut = vm.VideoCutout(num_classes=3, fill=-1.0, per_sample=True)(x, y, seeded())
    assert (cut.lam == 1.0 and torch.equal(cut.target, F.one_hot(y, 3).float())
            and cut.boxes.shape == (4, 6))
    assert (cut.x == -1).all(1).flatten(1).double().mean(1).tolist() == pytest.approx(
        (1 - cuboid_lambda(cut.boxes, (8, 16, 16))).tolist()
    )
    assert vm.VideoCutout(num_classes=3)(x[:1], y[:1], seeded()).x.shape == x[:1].shape
    choice = vm.RandomMix([VideoMix(num_classes=3), vm.VideoMixup(num_classes=3)], [0, 1])
    only = choice(x, y, seeded())
    assert only.boxes is None and only.lam < 1
    idle = seeded()
    assert choice.eval()(x, y, idle).x is x and torch.equal(idle.get_state(), seeded().get_state())
    bytes_ = (255 * x).to(torch.uint8)
    mixed = VideoMix(num_classes=3, inplace=True)(bytes_, y, seeded(2))
    assert mixed.x is bytes_ and bytes_.dtype == torch.uint8
    with pytest.raises(ValueError, match="floating-point"):
        vm.VideoMixup(num_classes=3)(bytes_, y, seeded())
    with pytest.warns(UserWarning, match="one clip"):
        assert VideoMix(num_classes=3, allow_single=True)(x[:1], y[:1]).lam == 1.0


def test_rand_augment_is_the_same_in_all_frames():
    frame = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    clip = np.repeat(frame[None], 5, 0)
    for seed in range(15):
        out = vm.RandAugment()(clip, seeded(seed))
        assert (out.shape == clip.shape and out.dtype == np.uint8
                and all(np.array_equal(out[0], f) for f in out))
        assert np.array_equal(out, vm.RandAugment()(clip, seeded(seed)))
    assert any(not np.array_equal(f, vm.RandAugment(consistent=False)(clip, seeded(1))[0])
               for f in vm.RandAugment(consistent=False)(clip, seeded(1)))
    with pytest.raises(ValueError, match="uint8"):
        vm.RandAugment()(clip.astype(np.float32))


def net(seed=0):
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                          nn.Linear(4, 3))
    generator = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def test_training_resumes_exactly_and_evaluation_averages_views():
    loader = [clips(frames=4, side=8, seed=s) for s in range(5)]
    options = {"mix": VideoMix(num_classes=3), "epochs": 3, "lr": 0.05, "warmup_epochs": 1}
    whole = list(vm.train(net(), loader, generator=seeded(1), **options))
    assert ([s["step"] for s in whole] == list(range(15)) and whole[4]["lr"] == 0.05
            and whole[-1]["lr"] < 0.01)
    steps = vm.train(net(), loader, generator=seeded(1), **options)
    for row in whole[:8]:
        assert next(steps) == row and options["mix"].eval()       # the caller may evaluate between
    buffer = io.BytesIO()
    torch.save(steps.send("state"), buffer)
    buffer.seek(0)
    rest = vm.train(net(3), loader, generator=seeded(9),
                    resume=torch.load(buffer, weights_only=True), **options)
    assert list(rest) == whole[8:]
    assert list(vm.train(net(), loader))[0]["lam"] == 1.0
    model = net().train()
    x, y = clips(frames=4, side=8)
    views = torch.stack([x, x.flip(4)], 1)
    probs = (model(x).softmax(1) + model(x.flip(4)).softmax(1)) / 2
    assert vm.evaluate(model, [(views, y)], num_clips=2) == {
        "top1": pytest.approx((probs.argmax(1) == y).float().mean().item()),
        "top5": 1.0,
    }
    assert model.training and set(vm.evaluate(model, [(x, y)])) == {"top1", "top5"}


def test_evaluation_leaves_every_module_in_its_mode():
    model, (x, y) = net(), clips()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="x must be"):
        vm.evaluate(model, [(x, y)], num_clips=2)
    assert [module.training for module in model.modules()] == modes


def test_fading_weights_keep_the_precision_of_the_clips():
    x, perm = torch.rand(2, 1, 7, 2, 2, dtype=torch.float64), torch.tensor([1, 0])
    weights = torch.linspace(0.2, 0.6, 7, dtype=torch.float64).view(-1, 1, 1)
    mixed = vm.fade_mixup_clips(x, perm, 0.4, 0.2)
    torch.testing.assert_close(mixed, weights * x + (1 - weights) * x[perm], rtol=0, atol=1e-15)


# ---------------------------------------------------------------- bad input

def test_bad_input():
    x, y = clips()
    for call, words in [(lambda: VideoMix("X"), "variant"), (lambda: VideoMix(alpha=0), "alpha"),
                        (lambda: VideoMix(prob=1.5), "prob"),
                        (lambda: VideoMix(smoothing=1.0), "smoothing"),
                        (lambda: VideoMix(pairing="roll"), "pairing"),
                        (lambda: VideoMix(rounding="up"), "rounding"),
                        (lambda: VideoMix("S", placement="suffix"), "suffix"),
                        (lambda: VideoMix(placement="left"), "placement"),
                        (lambda: VideoMix(num_classes=3)(x[0], y), r"\(B, C, T, H, W\)"),
                        (lambda: VideoMix(num_classes=3)(x, y[:2]), "2 labels for 4"),
                        (lambda: VideoMix()(x, y), "num_classes"),
                        (lambda: VideoMix(num_classes=2)(x, y), r"0\.\.1"),
                        (lambda: VideoMix(num_classes=3)(x[:1], y[:1]), "two clips"),
                        (lambda: VideoMix(num_classes=3)((x[:, :, :3], x), y), "multiple"),
                        (lambda: VideoMix(num_classes=3)((x[:, :, :4, :8], x), y), "agree"),
                        (lambda: apply_cuboid(x, (0, 9, 0, 1, 0, 1), torch.arange(4)), "outside"),
                        (lambda: apply_cuboid(x, (3, 2, 0, 1, 0, 1), torch.arange(4)), "inverted"),
                        (lambda: apply_cuboid(x, torch.zeros(3, 6, dtype=torch.int64),
                                              torch.arange(4)), "boxes must be"),
                        (lambda: sample_cuboid((4, 4, 4), 1.5), "lam"),
                        (lambda: sample_cuboid((4, 0, 4), 0.5), "size_thw"),
                        (lambda: vm.mixup_clips(x, torch.arange(4), 2.0), "lam"),
                        (lambda: vm.mixup_clips(x, torch.arange(4), torch.zeros(3)), "lam"),
                        (lambda: mix_labels(y.float(), torch.arange(4), 0.5), "y must be"),
                        (lambda: vm.soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2)),
                         r"logits .* and target"), (lambda: vm.RandomMix([]), "empty"),
                        (lambda: vm.RandomMix([VideoMix()], [1, 2]), "probs"),
                        (lambda: vm.RandomMix([VideoMix()], [-1]), "probs"),
                        (lambda: vm.RandomMix([VideoMix()], [0]), "probs"),
                        (lambda: vm.RandAugment(magnitude=11), "magnitude"),
                        (lambda: vm.evaluate(net(), [(x, y)], 2), r"\(B, 2,")]:
        with pytest.raises(ValueError, match=words):
            call()


# ---------------------------------------------------------------- pasting

def pasted_by_definition(x, boxes, perm):
    """M x_A + (1 - M) x_B with a mask, clip by clip."""
    out = x.clone()
    for b, (t1, t2, h1, h2, w1, w2) in enumerate(boxes.tolist()):
        inside = torch.zeros(x.shape[2:], dtype=torch.bool)
        inside[t1:t2, h1:h2, w1:w2] = True
        out[b] = torch.where(inside, x[perm[b]], x[b])
    return out


@pytest.mark.parametrize("dtype",
                         [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "view"])
def test_pasting_moves_bits_whatever_the_layout(dtype, layout):
    generator = seeded()
    x = (255 * torch.rand(6, 3, 5, 8, 9, generator=generator)).to(dtype)
    if layout == "channels_last_3d":
        x = x.to(memory_format=torch.channels_last_3d)
    elif layout == "view":
        x = x.transpose(3, 4)[:, :, :, 1:].transpose(3, 4)
    size = x.shape[2:]
    for round in range(12):
        perm = torch.randperm(6, generator=generator)
        boxes = torch.tensor([sample_cuboid(size, lam, "ST", generator=generator)
                              for lam in torch.rand(6, generator=generator).tolist()])
        for given, rows in ((boxes, boxes), (tuple(boxes[0].tolist()), boxes[:1].expand(6, 6))):
            expected, kept = pasted_by_definition(x, rows, perm), x.clone()
            assert torch.equal(apply_cuboid(x, given, perm), expected) and torch.equal(x, kept)
            changed = x.clone(memory_format=torch.preserve_format)
            assert apply_cuboid(changed, given, perm,
                                inplace=True) is changed and torch.equal(changed, expected)
    repeated = torch.tensor([1, 1, 0, 0, 5, 5])  # not a permutation: only as a copy
    assert torch.equal(apply_cuboid(x, boxes, repeated), pasted_by_definition(x, boxes, repeated))
    with pytest.raises(ValueError, match="permutation"):
        apply_cuboid(x, boxes, repeated, inplace=True)


def test_pasting_in_place_allocates_no_more_than_the_cuboids():
    x, box = torch.zeros(8, 3, 8, 32, 32), (0, 8, 4, 24, 4, 24)
    cuboids = x.numel() * 4 * (1 - cuboid_lambda(box, x.shape[2:]))
    for boxes in (box, torch.tensor([box] * 8)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profile:
            apply_cuboid(x, boxes, torch.arange(7, -1, -1), inplace=True)
        now = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        assert 0 < peak <= cuboids


def test_two_pathways_in_place_where_the_slow_one_is_a_view():
    fast, y = clips(frames=8)
    kept = fast.clone()
    expected = VideoMix("ST", num_classes=3)((kept[:, :, ::4].clone(), kept), y, seeded(3))
    slow, mixed = VideoMix("ST", num_classes=3, inplace=True)(
        (fast[:, :, ::4], fast), y, seeded(3)
    ).x
    assert mixed is fast and torch.equal(mixed, expected.x[1]) and torch.equal(slow, expected.x[0])
    assert not torch.equal(mixed, kept)
    # equal rates: both are mixed
    same = VideoMix(num_classes=3)((kept, kept), y, seeded(3)).x
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], kept)


def test_single_frames_are_cut_like_images():
    g, checked = load("boxes.npz"), 0
    rows = zip(g["size_thw"].tolist(), g["mode"].tolist(), g["center_thw"].tolist(),
               g["lam"].tolist())
    for size, mode, center, lam in rows:
        if size[0] == 1 and mode:
            center = [min(max(c, 0), n - 1) for c, n in zip(center, size)]
            assert sample_cuboid(size, lam, ("S", "T", "ST")[mode],
                                 center=center) == sample_cuboid(size, lam, "S", center=center)
            checked += 1
    assert checked == 22


def test_temporal_mix_of_constant_clips_is_a_step_function():
    x = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 3, 8, 4, 4).contiguous()
    result = VideoMix("T", num_classes=2, pairing="flip", frame_labels=True, placement="suffix")(
        x, torch.arange(2), seeded(2)
    )
    frames = result.x[0, 0, :, 0, 0]
    start = result.boxes[0]
    assert torch.equal(frames, (torch.arange(8) >= start).float()) and torch.equal(
        result.frame_target[0, 1], frames
    )
    assert result.lam == start / 8 and (result.x == result.x[:, :1, :, :1, :1]).all()


@pytest.mark.parametrize("make", [*EVERY, lambda **k: vm.CutMixup("T", **k)])
def test_weights_stay_in_the_unit_interval_at_the_extremes(make):
    """alpha near 0 draws whole clips and empty boxes."""
    for frames in (7, 10):
        x, y = clips(frames=frames, side=6)
        for seed in range(25):
            result = make(num_classes=3, alpha=1e-4)(x, y, seeded(seed))
            assert (torch.allclose(result.target.sum(1), torch.ones(4))
                    and (result.target >= 0).all())


def test_single_frames_fade_by_the_weight_of_the_label():
    x, y = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1), torch.tensor([0, 1])
    for seed in range(5):
        faded = vm.FadeMixup(num_classes=2, pairing="flip", frame_labels=True)(x, y, seeded(seed))
        assert faded.x.flatten().tolist() == pytest.approx([1 - faded.lam, faded.lam])
        assert torch.allclose(faded.frame_target[:, :, 0], faded.target)


@pytest.mark.parametrize("alpha", [1e-3, 1e-5, 1e-12])
def test_near_zero_alpha_tosses_a_coin(alpha):
    """Both gammas of a draw underflow then; their ratio would be one half."""
    mix = vm.VideoMixup(alpha, per_sample=True, num_classes=2)
    lam = mix(torch.zeros(1000, 1, 1, 1, 1), torch.zeros(1000, dtype=torch.int64), seeded()).lam
    assert ((lam > 0.01) & (lam < 0.99)).sum() < 20 and abs(lam.mean() - 0.5) < 0.05


def test_loss_is_that_of_both_labels_and_its_gradient():
    logits = torch.randn(5, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    y, perm, lam = (torch.tensor([0, 1, 2, 3, 0]), torch.tensor([4, 3, 2, 1, 0]),
                    torch.rand(5, generator=seeded(1), dtype=torch.float64))
    target = mix_labels(F.one_hot(y, 4).double(), perm, lam)
    both = lam * F.cross_entropy(logits, y, reduction="none") + (1 - lam) * F.cross_entropy(
        logits, y[perm], reduction="none"
    )
    assert vm.soft_cross_entropy(logits, target).item() == pytest.approx(
        both.mean().item(), abs=1e-12
    )
    assert torch.autograd.gradcheck(lambda z: vm.soft_cross_entropy(z, target), logits)
    hit = logits.argmax(1)
    expected = (lam * (hit == y) + (1 - lam) * (hit == y[perm])).mean().item()
    assert vm.mixed_accuracy(logits, y, y[perm], lam) == pytest.approx(expected)


class TwoPathwayNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.cat([part.mean((2, 3, 4)) for part in x], 1))


def test_two_pathways_train_and_are_evaluated():
    x, y = clips(frames=8, side=8)
    loader, model = [((x[:, :, ::4], x), y)] * 3, TwoPathwayNet()
    steps = list(vm.train(model, loader, VideoMix(num_classes=3), epochs=2,
                          amp_dtype=torch.bfloat16))
    assert len(steps) == 6 and all(0 <= step["acc"] <= 1 for step in steps)
    views = ((x[:, None, :, ::4], x[:, None]), y)
    assert vm.evaluate(model, [views]) == vm.evaluate(model, [((x[:, :, ::4], x), y)])


def test_more_bad_input():
    (x, y), box, size = clips(), (0, 9, 0, 1, 0, 1), (8, 16, 16)
    for call, words in [
        (lambda: apply_cuboid(x, (0, 1, 0, 1, 0, 1), torch.arange(3)), "perm"),
        (lambda: mix_labels(y, torch.zeros(1, dtype=torch.int64), 0.5, 3), "perm"),
        (lambda: vm.mix_frame_labels(y, torch.arange(3), (0, 1) * 3, size, 3), "perm"),
        (lambda: apply_cuboid(x, (0.5, 1, 0, 1, 0, 1), torch.arange(4)), "boxes"),
        (lambda: apply_cuboid(x, (0, 1, 0, 1), torch.arange(4)), "boxes"),
        (lambda: vm.mixup_clips(x, torch.zeros(4), 0.5), "perm"),
        (lambda: sample_cuboid((4, 8, 8), 0.5, center=(0, 9, 0)), "center"),
        (lambda: sample_cuboid((4, 8, 8), 0.5, center=(0, 8, 0)), "center"),
        (lambda: sample_cuboid((4, 8, 8), 0.5, center=(0, 4)), "center"),
        (lambda: sample_cuboid((4, 8.5, 8), 0.5), "size_thw"),
        (lambda: cuboid_lambda(None, size), "boxes"),
        (lambda: cuboid_lambda(box, size), "outside"),
        (lambda: vm.mixup_clips(x, torch.tensor([0, 1, 2, 4]), 0.5), "perm must be .* below 4"),
        (lambda: mix_labels(y, torch.tensor([0, 1, 2, -1]), 0.5, 3), "perm must be .* below 4"),
        (lambda: vm.fade_mixup_clips(x, torch.arange(4), torch.full((4,), 0.5), 0.1), "lam"),
        (lambda: mix_labels(y.tolist(), torch.arange(4), 0.5, 3), "y must be .*list"),
        (lambda: mix_labels(torch.rand(4, 3), torch.arange(4), 0.5, 5), r"y must be .*\(B, 5\)"),
        (lambda: VideoMix(num_classes=0), "num_classes"),
        (lambda: vm.VideoMixup(num_classes=2.5), "num_classes"),
        (lambda: vm.FrameCutMix(num_classes=3)(x[:, :, :0], y), "with pixels"),
        (lambda: vm.mixed_accuracy(torch.zeros(4), y, y, 0.5), "logits"),
        (lambda: vm.RandAugment(num_ops=1.5), "num_ops"),
        (lambda: vm.RandAugment()([1, 2]), "clip must be .*list"),
        (lambda: vm.evaluate(nn.Linear(2, 2), [(x, y[:1])]), "for B = 1"),
        (lambda: next(vm.train(nn.Linear(2, 2), [(x, y)], epochs=-1)), "epochs"),
        (lambda: next(vm.train(nn.Linear(2, 2), [(x, y)], warmup_epochs=-1.0)), "warmup_epochs"),
        (lambda: vm.fade_mixup_clips(x, torch.arange(4), 0.3, 0.4), "adj"),
        (lambda: vm.fade_mixup_clips(x, torch.arange(4), 0.3, float("nan")), "adj"),
        (lambda: next(vm.train(net(), [(x, y)], lr=float("nan"))), "lr"),
        (lambda: next(vm.train(net(), [])), "no batch in epoch 0"),
        (lambda: vm.evaluate(net(), []), "nothing to evaluate"),
        (lambda: vm.evaluate(net(), [(x, y + 2)]), r"labels must be in 0\.\."),
        (lambda: vm.mixed_accuracy(torch.zeros(4, 3), y, y - 1, 0.5), r"labels must be in 0\.\.2"),
        (lambda: vm.VideoCutout(num_classes=3, per_sample=True)(x[:0], y[:0]), "needs one, not 0"),
        (lambda: vm.mix_frame_labels(y, torch.arange(4), box, size, 3), "outside"),
        (lambda: vm.mix_frame_labels(y, torch.arange(4), [box] * 3, size, 3), "boxes"),
        (lambda: vm.mixed_accuracy(torch.zeros(4, 3), y, y, 1.5), "lam"),
        (lambda: vm.mixed_accuracy(torch.zeros(4, 3), y, y.float(), 0.5), "integers"),
        (lambda: vm.cut_mixup_clips(x, (0, 1, 0, 1, 0, 1), torch.arange(4), 0.5, 2.0), "u must"),
        (lambda: VideoMix(alpha=float("nan")), "alpha"),
        (lambda: VideoMix(num_classes=3)((x[:, :1, :4], x), y), "agree"),
        (lambda: VideoMix(num_classes=3)(x.numpy(), y), r"\(B, C, T"),
        (lambda: mix_labels(y, torch.arange(4), 0.5, 3, smoothing=1.0), "smoothing"),
        (lambda: vm.VideoCutout("U"), "variant"),
        (lambda: vm.CutMixup(rounding="floor"), "rounding"),
        (lambda: vm.FrameCutMix(rounding="floor"), "rounding"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


class PixelMeans(nn.Module):
    """Logits: a linear map of the channels' means."""

    def __init__(self, channels, classes):
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3, 4)))


def test_of_equal_scores_the_first_class_wins():
    model, x = PixelMeans(2, 10), torch.rand(3, 2, 2, 4, 4)
    nn.init.zeros_(model.fc.weight), nn.init.zeros_(model.fc.bias)
    for label in range(10):
        found = vm.evaluate(model, [(x, torch.full((3,), label))])
        assert found == {"top1": float(label == 0), "top5": float(label < 5)}


@pytest.mark.parametrize("warmup", [0.3, 0.9, 1.6])
def test_a_broken_warm_up_never_exceeds_the_rate(warmup):
    data = [(torch.rand(2, 2, 2, 4, 4), torch.tensor([0, 1]))] * 4
    rates = [row["lr"] for row in vm.train(PixelMeans(2, 2), data, epochs=3, lr=0.1,
                                           warmup_epochs=warmup)]
    warm = int(4 * warmup)
    assert max(rates) <= 0.1 and rates[:warm + 1] == sorted(rates[:warm + 1])
    assert rates[warm + 1:] == sorted(rates[warm + 1:], reverse=True)


def test_one_snapshot_starts_two_runs():
    data = [(torch.rand(2, 2, 2, 4, 4), torch.tensor([0, 1])) for _ in range(4)]
    steps = vm.train(PixelMeans(2, 2), data, VideoMix(num_classes=2))
    next(steps)
    snapshot = steps.send("state")
    first, second = (list(vm.train(PixelMeans(2, 2), data, VideoMix(num_classes=2),
                                   generator=seeded(9), resume=snapshot)) for _ in range(2))
    assert first == second == list(steps)
