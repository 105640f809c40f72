"""The regularisers against public implementations, their definitions and closed forms; the training
loop."""

import copy
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reference import regularization as R

GOLDEN = Path(__file__).parent / "golden" / "regularization"


def golden(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.tensor(data[key]) for key in data.files}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=6, size=8, classes=4, seed=0):
    return torch.randn(n, 3, size, size, generator=gen(seed)), torch.arange(n) % classes


# ---- cutmix, mixup, cutout ----


def test_boxes_equal_the_published_ones():
    for h, w, lam, _, cy, cx, *box, adjusted in golden("mixing")["bbox_table"].tolist():
        h, w = int(h), int(w)
        y1, x1, y2, x2 = R.rand_bbox(h, w, lam, center=(int(cy), int(cx)))
        assert [y1, x1, y2, x2] == box
        mixed = R.cutmix(torch.zeros(1, 1, h, w), torch.tensor([0]), box=(y1, x1, y2, x2))
        assert mixed.lam == pytest.approx(adjusted, abs=1e-12)
    assert R.rand_bbox(8, 8, 0.75, center=(20, -5)) == (8, 0, 8, 0)  # nothing of it inside


def test_cutmix_equals_the_published_batch():
    data = golden("mixing")
    x, y, perm, box = data["cm_x"], data["cm_y"], data["cm_perm"], tuple(data["cm_box"].tolist())
    mixed = R.cutmix(x, y, perm=perm, lam=float(data["cm_lam_in"]), box=box)
    assert torch.equal(mixed.x, data["cm_out"]) and torch.equal(mixed.y_b, y[perm])
    assert mixed.lam == pytest.approx(float(data["cm_lam_out"]), abs=1e-12)
    logits = data["cm_logits"].clone().requires_grad_(True)
    loss = R.mixed_cross_entropy(logits, *mixed[1:])
    torch.testing.assert_close(loss.double(), data["cm_loss"], atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, data["cm_grad"], atol=1e-6, rtol=0)


def test_mixup_equals_the_published_batch():
    data = golden("mixing")
    mixed = R.mixup(data["cm_x"], data["cm_y"], perm=data["mu_perm"], lam=float(data["mu_lam"]))
    torch.testing.assert_close(mixed.x, data["mu_out"], atol=1e-6, rtol=0)
    logits = data["cm_logits"].clone().requires_grad_(True)
    loss = R.mixed_cross_entropy(logits, *mixed[1:])
    torch.testing.assert_close(loss.double(), data["mu_loss"], atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, data["mu_grad"], atol=1e-6, rtol=0)


def test_cutout_equals_the_published_masks():
    data = golden("mixing")
    for (h, w, holes, length, seed), mask in zip(data["cutout_table"].tolist(),
                                                 data["cutout_masks"]):
        draw = np.random.RandomState(seed)
        centers = torch.tensor([[[draw.randint(h), draw.randint(w)] for _ in range(holes)]])
        out = R.cutout(torch.ones(1, 2, h, w), length, holes, centers=centers)
        assert torch.equal(out[0, 1], mask[:h, :w].float())


def test_cutout_fill_area_and_draws():
    x = torch.rand(500, 3, 16, 16, generator=gen()) + 1
    out = R.cutout(x, 7, fill=-3.0, generator=gen(1))
    hole = (out == -3)[:, 0]
    assert torch.equal(out[:, :1] == -3, (out == -3)[:, 1:2]) and (hole.sum((1, 2)) <= 36).all()
    assert torch.equal(out.where(out != -3, x), x) and (hole.sum((1, 2)) >= 9).all()
    # expected height, by enumeration
    side = sum(min(c + 3, 16) - max(c - 3, 0) for c in range(16)) / 16
    area = hole.sum((1, 2)).double()
    assert abs(area.mean() - side**2) < 4 * area.std() / 500**0.5
    assert torch.equal(out, R.cutout(x, 7, fill=-3.0, generator=gen(1)))
    assert torch.equal(R.cutout(x, 1), x) and torch.equal(R.cutout(x, 0), x)
    one, three = ((R.cutout(x, 4, holes, generator=gen()) == 0).sum() for holes in (1, 3))
    assert three > one
    last = x[:4].contiguous(memory_format=torch.channels_last)
    assert torch.equal(R.cutout(last, 7, generator=gen(1)), R.cutout(x[:4], 7, generator=gen(1)))
    assert R.cutout(x.half(), 4).dtype == torch.half


@pytest.mark.parametrize("per_sample", [False, True])
def test_cutmix_pastes_boxes_and_weighs_them(per_sample):
    y = torch.arange(8)
    x = y.float().view(8, 1, 1, 1).expand(8, 2, 12, 9)  # a view whose pixels name their image
    before = x.clone()
    for seed in range(20):
        mixed = R.cutmix(x, y, per_sample=per_sample, generator=gen(seed))
        own = (mixed.x == y.view(8, 1, 1, 1)).double().mean((1, 2, 3))
        partner = (mixed.x == mixed.y_b.view(8, 1, 1, 1)).double().mean((1, 2, 3))
        lam = torch.as_tensor(mixed.lam, dtype=torch.float64).expand(8)
        moved = mixed.y_b != y
        torch.testing.assert_close(own[moved], lam[moved], atol=1e-6, rtol=0)
        torch.testing.assert_close(partner[moved], 1 - lam[moved], atol=1e-6, rtol=0)
        again = R.cutmix(x, y, per_sample=per_sample, generator=gen(seed))
        assert torch.equal(mixed.x, again.x) and torch.equal(mixed.y_b, again.y_b)
    assert torch.equal(x, before)
    assert isinstance(mixed.lam, float) != per_sample


def test_cutmix_extreme_lam_and_unadjusted():
    x, y = batch()
    mixed = R.cutmix(x, y, lam=1.0, generator=gen())
    assert mixed.lam == 1 and torch.equal(mixed.x, x)
    lams = [R.cutmix(x, y, lam=0.0, generator=gen(s)).lam for s in range(200)]
    assert min(lams) == 0 and 0.5 < max(lams) <= 0.75  # a full-size cut, clipped around its centre
    assert R.cutmix(x, y, lam=0.4, adjust_lam=False, generator=gen()).lam == 0.4
    skipped = R.cutmix(x, y, prob=0.0)
    assert skipped.x is x and skipped.y_b is y and skipped.lam == 1.0
    share = np.mean([R.cutmix(x, y, prob=0.3, generator=gen(s)).y_b is not y for s in range(400)])
    assert abs(share - 0.3) < 0.08
    one = R.cutmix(x[:1], y[:1], generator=gen())
    assert torch.equal(one.x, x[:1]) and torch.equal(one.y_b, y[:1])
    for function in (R.cutmix, R.mixup):  # per sample: always a tensor, also of one, also given
        assert function(x[:1], y[:1], per_sample=True).lam.shape == (1,)
        assert function(x, y, per_sample=True, lam=0.5, generator=gen()).lam.shape == (6,)
    apart = R.cutmix(x, y, per_sample=True, lam=0.5, adjust_lam=False, generator=gen())
    moved = (apart.x != x).any(1).flatten(1)[apart.y_b != y]
    assert (apart.lam == 0.5).all() and len(moved.unique(dim=0)) > 1  # boxes differ


def test_cutmix_mean_of_adjusted_lam_equals_enumeration():
    x, y = torch.zeros(4000, 1, 6, 5), torch.zeros(4000, dtype=torch.int64)
    lam = R.cutmix(x, y, lam=torch.full((4000,), 0.4), generator=gen()).lam
    every = [R.cutmix(x[:1], y[:1], box=R.rand_bbox(6, 5, 0.4, center=(r, c))).lam
             for r in range(6) for c in range(5)]
    assert abs(lam.mean().item() - np.mean(every)) < 4 * np.std(every) / 4000**0.5


def test_mixup_per_sample_and_beta_moments():
    x, y = batch(2000, 2)
    mixed = R.mixup(x, y, alpha=0.4, per_sample=True, generator=gen(2))
    lam = mixed.lam.view(-1, 1, 1, 1)
    partner = (mixed.x - lam * x) / (1 - lam).clamp(min=1e-9)
    sure = mixed.lam < 0.9
    assert torch.equal((partner.flatten(1)[sure, None]
                        - x.flatten(1)[None]).abs().amax(2).argmin(1) % 4,
                       mixed.y_b[sure])
    variance = 1 / (4 * (2 * 0.4 + 1))  # of Beta(a, a)
    assert abs(mixed.lam.mean() - 0.5) < 0.04 and abs(mixed.lam.var() - variance) < 0.015
    assert R.mixup(x, y, alpha=0).lam == 1.0 and torch.equal(R.mixup(x, y, alpha=0).x, x)
    assert R.mixup(x[:1], y[:1], generator=gen()).x.shape == (1, 3, 2, 2)
    assert R.mixup(x.half(), y, lam=0.3).x.dtype == torch.half


def test_mixing_errors():
    x, y = batch()
    image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for function in (R.cutmix, R.mixup):
        with pytest.raises(TypeError, match="float image batch"):
            function(image, y[:2])
        for bad in ({"lam": 1.5}, {"lam": torch.full((6,), -0.1)}, {"perm": torch.arange(3)},
                    {"lam": torch.full((5,), 0.5)}, {"lam": float("nan")}):
            with pytest.raises(ValueError):
                function(x, y, **bad)
        with pytest.raises(ValueError, match="equal lengths"):
            function(x, y[:3])
    with pytest.raises(TypeError):
        R.cutout(image, 2)
    with pytest.raises(TypeError):
        R.gaussian_noise(image, 0.1)
    for call in (lambda: R.rand_bbox(4, 4, -0.1), lambda: R.cutmix(x, y, prob=2),
                 lambda: R.cutmix(x, y, box=(0, 0, 9, 2)), lambda: R.cutmix(x, y, box=(3, 0, 2, 2)),
                 lambda: R.cutout(x[0], 3), lambda: R.cutout(x, -1), lambda: R.cutout(x, 2.5),
                 lambda: R.mixup(x, y, float("nan")), lambda: R.cutmix(x, y, float("inf")),
                 lambda: R.cutout(x, 2, centers=torch.zeros(6, 2)),
                 lambda: R.cutout(x, 2, centers=torch.zeros(5, 1, 2)),
                 lambda: R.cutout(x, 2, centers=y), lambda: R.gaussian_noise(x, -1)):
        with pytest.raises(ValueError):
            call()


def test_gaussian_noise():
    x = torch.full((4, 3, 64, 64), 0.5, dtype=torch.float64)
    noise = R.gaussian_noise(x, 0.1, generator=gen()) - x
    assert abs(noise.mean()) < 0.002 and abs(noise.std() - 0.1) < 0.002
    assert R.gaussian_noise(x, 5.0, generator=gen()).unique().numel() > 2
    wide = R.gaussian_noise(x, 5.0, generator=gen())
    assert wide.min() == 0 and wide.max() == 1 and R.gaussian_noise(x, 5.0, None, gen()).min() < 0


# ---- losses ----


@pytest.mark.parametrize("eps", ["0", "0.05", "0.1", "0.3", "1"])
def test_label_smoothing_equals_torch(eps):
    data = golden("losses")
    logits, y = data["logits"].clone().requires_grad_(True), data["labels"]
    loss = R.label_smoothing_loss(logits, y, float(eps))
    torch.testing.assert_close(loss.double(), data[f"ls_{eps}_mean"], rtol=1e-5, atol=1e-6)
    each = R.label_smoothing_loss(logits, y, float(eps), reduction="none")
    torch.testing.assert_close(each, data[f"ls_{eps}_none"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], data[f"ls_{eps}_grad"],
                               rtol=1e-5, atol=1e-7)


def test_other_losses_equal_public_ones():
    data = golden("losses")
    z, y, adv = data["logits"], data["labels"], data["logits_adv"]
    close = {"rtol": 1e-5, "atol": 1e-6}
    smoothed, soft = R.label_smoothing_loss(z, y, 0.1), R.soft_cross_entropy(z, data["soft"])
    torch.testing.assert_close(smoothed.double(), data["timm_ls_0.1"], **close)
    torch.testing.assert_close(soft.double(), data["soft_ce"], **close)
    torch.testing.assert_close(R.alp_loss(z, adv).double(), data["alp_l2_mean"], **close)
    torch.testing.assert_close(R.alp_loss(z, adv, "sum").double(),
                               data["alp_l2_sum_per_sample_mean"], **close)
    far = torch.full((2, 9), 300.0, dtype=torch.half)  # its square is beyond half precision
    assert R.alp_loss(far, -far, "sum") == 9 * 600**2


def test_mixed_cross_entropy_is_the_soft_target_loss():
    z = torch.randn(9, 5, generator=gen(), dtype=torch.float64, requires_grad=True)
    a, b = torch.arange(9) % 5, torch.arange(9) * 2 % 5
    for lam in (0.3, torch.linspace(0, 1, 9, dtype=torch.float64)):
        for eps in (0.0, 0.2):
            weight = torch.as_tensor(lam, dtype=torch.float64).reshape(-1, 1)
            hard = weight * F.one_hot(a, 5) + (1 - weight) * F.one_hot(b, 5)
            target = (1 - eps) * hard + eps / 5
            loss = R.mixed_cross_entropy(z, a, b, lam, eps, "none")
            torch.testing.assert_close(loss, R.soft_cross_entropy(z, target, "none"))
            gradient = torch.autograd.grad(loss.mean(), z)[0]
            torch.testing.assert_close(gradient, (z.softmax(1) - target).detach() / 9)
    half = R.mixed_cross_entropy(z.half(), a, b, 0.3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), R.mixed_cross_entropy(z, a, b, 0.3), rtol=2e-3,
                               atol=1e-3)


def test_loss_errors():
    z, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    for call in (lambda: R.label_smoothing_loss(z, y, 1.5),
                 lambda: R.label_smoothing_loss(z, y, -0.1),
                 lambda: R.label_smoothing_loss(z, y[:3]),
                 lambda: R.label_smoothing_loss(z, y, reduction="sum"),
                 lambda: R.mixed_cross_entropy(z, y, y + 1, torch.full((3,), 0.5)),
                 lambda: R.mixed_cross_entropy(z, y, y, 2.0),
                 lambda: R.mixed_cross_entropy(z, z, z, 0.5),  # soft labels
                 lambda: R.soft_cross_entropy(z, z[:3]), lambda: R.alp_loss(z, z[:3]),
                 lambda: R.alp_loss(z, z, "none")):
        with pytest.raises(ValueError):
            call()


# ---- manifold mixup ----


def small_net(seed=0, classes=4):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(2),
                        nn.Flatten(), nn.Linear(24, classes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=gen(seed)))
    return net


def test_manifold_mixup_mixes_the_input_of_one_module():
    net, (x, y) = small_net().eval(), batch()
    perm = torch.tensor([1, 0, 3, 2, 5, 4])
    for name, head, tail in (("", nn.Identity(), net), ("0", nn.Identity(), net),
                             ("3", net[:3], net[3:])):
        with R.manifold_mixup(net, [name], perm=perm, lam=0.3) as mixed:
            logits = net(x)
        inside = head(x)
        torch.testing.assert_close(logits, tail(0.3 * inside + 0.7 * inside[perm]))
        assert mixed.lam == 0.3 and torch.equal(mixed.perm, perm)
        expected = R.mixed_cross_entropy(logits, y, y[perm], 0.3, 0.1)
        torch.testing.assert_close(mixed.loss(logits, y, 0.1), expected)
    torch.testing.assert_close(net(x), net(x))  # and no hook stays
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_manifold_mixup_draws_and_cleans_up():
    net, (x, _) = small_net().eval(), batch()
    clean, seen = net(x), set()
    for seed in range(12):
        with R.manifold_mixup(net, ["", "3"], generator=gen(seed)) as mixed:
            seen.add([n for n, m in net.named_modules() if m._forward_pre_hooks][0])
            net(x)
        assert 0 <= mixed.lam <= 1 and sorted(mixed.perm.tolist()) == list(range(6))
    assert seen == {"", "3"}
    with pytest.raises(RuntimeError):
        with R.manifold_mixup(net, ["3"]):
            raise RuntimeError("inside")
    assert torch.equal(net(x), clean)
    with R.manifold_mixup(net, ["3"], mode="cutmix", perm=torch.arange(6).flip(0), lam=0.5,
                          generator=gen(1)) as mixed:
        logits = net(x)
    area = round((1 - mixed.lam) * 64)
    assert 0 < area <= 36 and math.isclose(mixed.lam, 1 - area / 64)
    assert not torch.equal(logits, clean)
    for bad in ({"module_names": ["9"]}, {"module_names": []}, {"mode": "cut"}, {"lam": 2.0},
                {"module_names": ["5"], "mode": "cutmix"}):  # whose input is (B, C)
        with pytest.raises(ValueError, match="must|needs"):
            with R.manifold_mixup(net, **{"module_names": [""], **bad}):
                net(x)


def test_manifold_mixup_reaches_into_compiled_networks():
    net, (x, y) = small_net().eval(), batch()
    compiled, perm = torch.compile(net, backend="eager"), torch.arange(6).flip(0)
    with torch.no_grad():
        compiled(x)  # from now on there is a graph without the hook
        for lam in (0.3, 0.6):
            for one in (compiled, net):
                with R.manifold_mixup(one, ["3"], perm=perm, lam=lam):
                    logits = compiled(x)
                with R.manifold_mixup(net, ["3"], perm=perm, lam=lam):
                    torch.testing.assert_close(logits, net(x))
        torch.testing.assert_close(compiled(x), net(x))
    with R.manifold_mixup(net, ["3"]) as mixed:
        net[0](x)
    with pytest.raises(ValueError, match="'3' was not called"):
        mixed.loss(net(x), torch.arange(6))


# ---- ShakeDrop and DropBlock ----


def test_shake_drop_equals_the_published_layer():
    data = golden("shakedrop")
    for gate in (0, 1):
        x = data["x"].clone().requires_grad_(True)
        out = R.shake_drop(x, gate, data["alpha"], data["beta"])
        torch.testing.assert_close(out, data[f"out_gate{gate}"], atol=1e-7, rtol=0)
        grad = torch.autograd.grad(out, x, data["grad_out"])[0]
        torch.testing.assert_close(grad, data[f"grad_gate{gate}"], atol=1e-7, rtol=0)
    for p in (0.1, 0.5, 0.9):
        out = R.ShakeDrop(p).eval()(data["x"])
        torch.testing.assert_close(out, data[f"eval_p{p}"], atol=1e-7, rtol=0)
    for length in (9, 54, 66):
        np.testing.assert_allclose(R.linear_drop_rates(length), data[f"p_drop_L{length}"],
                                   atol=1e-12)


def test_shake_drop_factors_broadcast():
    x = torch.randn(3, 2, 4, 4, generator=gen(), dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([1, 0, 0])
    alpha = torch.randn(3, 2, 1, 1, generator=gen(1), dtype=torch.float64)
    out = R.shake_drop(x, gate, alpha, 0.25)
    assert torch.equal(out[0], x[0]) and torch.equal(out[1:], (x * alpha)[1:])
    grad = torch.autograd.grad(out.sum(), x)[0]
    assert (grad[0] == 1).all() and (grad[1:] == 0.25).all()


@pytest.mark.parametrize("level", ["image", "batch", "channel", "pixel"])
def test_shake_drop_layer_mean_is_its_evaluation_factor(level):
    layer = R.ShakeDrop(0.4, alpha=(0.0, 1.0), level=level)
    layer.generator = gen(3)
    x = torch.ones(2, 3, 2, 2, requires_grad=True)
    outs, grads = [], []
    for _ in range(2000):
        out = layer(x)
        outs.append(out[0, 0, 0, 0].item())
        grads.append(torch.autograd.grad(out.sum(), x)[0][0, 0, 0, 0].item())
    assert abs(np.mean(outs) - 0.8) < 3 * np.std(outs) / 2000**0.5 + 0.01
    assert abs(np.mean(grads) - 0.8) < 3 * np.std(grads) / 2000**0.5 + 0.01
    torch.testing.assert_close(layer.eval()(x), 0.8 * x)
    none = R.ShakeDrop(0.0, level=level)
    assert torch.equal(none(x), x) and torch.equal(none.eval()(x), x)


@pytest.mark.parametrize("layer", [R.ShakeDrop(0.4), R.ShakeDrop(0.4, level="pixel"),
                                   R.DropBlock2d(0.4, 3)])
def test_random_layers_read_no_value_on_the_host(layer):
    x = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)  # no values: reading one raises
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    with pytest.raises(RuntimeError):
        x.sum().item()


@pytest.mark.parametrize("function", [
    R.ShakeDrop(0.4), R.ShakeDrop(0.4, level="pixel"), R.DropBlock2d(0.4, 3),
    lambda x: R.cutout(x, 4), lambda x: R.gaussian_noise(x, 0.1),
    lambda x: R.mixup(x, x, lam=1 / len(x)).x, lambda x: R.cutmix(x, x, per_sample=True).x,
    lambda x: R.mixed_cross_entropy(x[:, 0, 0], *2 * [torch.arange(len(x))], 1 / x.shape[0],
                                    reduction="none")])
def test_functions_compile_for_any_batch_size(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    for size in (2, 3, 5):  # from the second on it is left free
        assert len(compiled(torch.rand(size, 3, 8, 8))) == size


def test_drop_block_drops_blocks_and_keeps_the_mean():
    x = torch.ones(64, 3, 20, 20)
    layer = R.DropBlock2d(0.3, 5)
    layer.generator = gen()
    out = layer(x)
    dropped = out[:, 0] == 0
    assert torch.equal(dropped, out[:, 2] == 0) and 0.15 < dropped.float().mean() < 0.35
    assert out.mean().item() == pytest.approx(1, abs=1e-5)
    single = R.DropBlock2d(1 / 64, 4)  # rare seeds: isolated blocks of exactly 4 x 4 inside
    single.generator = gen(1)
    holes = single(torch.ones(400, 1, 12, 12))[:, 0] == 0
    areas = {int(h.sum()) for h in holes if h.any() and h[2:-2, 2:-2].sum() == h.sum()}
    assert 16 in areas
    assert torch.equal(layer.eval()(x), x) and layer(x) is x
    assert (R.DropBlock2d(1.0, 1)(x) == 0).all()  # everything dropped: zeros, no NaN
    assert R.DropBlock2d(0.1, 7)(x[..., :3, :3].half()).isfinite().all()


def test_drop_block_gamma_and_warm_up():
    def share(layer, size=16, n=3000):
        layer.generator = gen(2)
        return (layer(torch.ones(n, 1, size, size)) == 0).float().mean().item()

    plain, exact = share(R.DropBlock2d(0.2, 1)), share(R.DropBlock2d(0.2, 1, exact_gamma=True))
    assert plain == pytest.approx(0.2, abs=0.005) == exact
    gamma = 0.05 / 9 * (16 * 16) / (14 * 14)
    inner = R.DropBlock2d(0.05, 3, exact_gamma=True)
    inner.generator = gen(4)
    centre = (inner(torch.ones(20000, 1, 16, 16))[:, 0, 8, 8] == 0).float().mean().item()
    assert centre == pytest.approx(1 - (1 - gamma) ** 9, abs=0.005)
    ramp = R.DropBlock2d(0.4, 1, warmup_steps=4)
    shares = [share(ramp, n=300) for _ in range(6)]
    np.testing.assert_allclose(shares, [0, 0.1, 0.2, 0.3, 0.4, 0.4], atol=0.02)
    assert ramp.state_dict()["passes"] == 6
    for bad in ({"block_size": 2.5}, {"drop_prob": 2}, {"block_size": 0}, {"warmup_steps": -1}):
        with pytest.raises(ValueError):
            R.DropBlock2d(**bad)
    with pytest.raises(ValueError, match="B, C, H, W"):
        R.DropBlock2d()(torch.ones(3, 4))
    for bad in ({"p_drop": -1}, {"level": "row"}, {"alpha": (1, -1)}, {"beta": (0,)}):
        with pytest.raises(ValueError):
            R.ShakeDrop(**bad)
    with pytest.raises(ValueError, match="p_last"):
        R.linear_drop_rates(4, 1.5)


# ---- combinations and training ----


def test_regularizer_equals_its_parts():
    x, y = batch()
    for name, function in (("cutmix", R.cutmix), ("mixup", R.mixup)):
        one, two = R.Regularizer(name)(x, y, gen(4)), function(x, y, generator=gen(4))
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, two))
    both = R.Regularizer(["mixup", "cutout"], length=4, label_smoothing=0.2)
    draw = gen(5)
    expected = R.mixup(R.cutout(x, 4, generator=draw), y, generator=draw)
    assert torch.equal(both(x, y, gen(5)).x, expected.x) and both.label_smoothing == 0.2
    plain = R.Regularizer()(x, y)
    assert plain.x is x and plain.lam == 1.0 and plain.y_b is y
    assert R.Regularizer("cutmix", prob=0.0)(x, y).x is x
    noisy = R.Regularizer("noise", sigma=0.5, clip=None)(x, y, gen())
    assert abs((noisy.x - x).std() - 0.5) < 0.05
    for bad in ({"input": "cut"}, {"input": 3}, {"input": ["mixup", "cutmix"]}, {"prob": 2},
                {"label_smoothing": -1}, {"feature": "mixup"}, {"modules": ["0"]},
                {"input": "mixup", "feature": "mixup", "modules": ["0"]}):
        with pytest.raises(ValueError):
            R.Regularizer(**bad)


class Loader:
    """Re-iterable batches in an order of the epoch, able to begin in the middle."""

    def __init__(self, x, y, size=4):
        self.x, self.y, self.size, self.epoch, self.start = x, y, size, 0, 0

    def set_epoch(self, epoch, start_batch=0):
        self.epoch, self.start = epoch, start_batch

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=gen(self.epoch))
        for part in list(order.split(self.size))[self.start :]:
            yield self.x[part], self.y[part]


def attack(model, x, y):
    x = x.detach().requires_grad_(True)
    grad = torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]
    return (x + 0.05 * grad.sign()).detach()


COMBINATIONS = {
    "plain": {},
    "cutout + cutmix + smoothing": {"input": ["cutout", "cutmix"], "length": 4,
                                    "label_smoothing": 0.1, "prob": 0.5},
    "manifold mixup": {"feature": "mixup", "modules": ["", "3"], "alpha": 2.0},
    "feature cutmix": {"feature": "cutmix", "modules": ["1"]},
    "adversarial + pairing": {"adversary": attack, "pairing": 0.5},
}


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("kind", ["seeking", "list", "dataloader", "global"])
def test_training_resumes_to_the_same_numbers(name, kind):
    x, y = batch(14)
    draws = gen(9)

    def start(snapshot=None):
        net = small_net()
        net.insert(3, R.ShakeDrop(0.3))
        net.insert(4, R.DropBlock2d(0.2, 3, warmup_steps=3))
        net.append(nn.Dropout(0.1))
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True)
        generator = None if kind == "global" else gen(7)
        loader = {"seeking": Loader(x, y), "list": list(zip(x.split(4), y.split(4)))}.get(kind)
        if loader is None:  # shuffles with the very generator that training draws from
            data = torch.utils.data.TensorDataset(x, y)
            loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)
        regularizer = R.Regularizer(**COMBINATIONS[name])
        if regularizer.modules:
            regularizer.modules = ["" if m == "" else "2" for m in regularizer.modules]
        return net, R.train(net, loader, optimizer, regularizer=regularizer, epochs=3,
                            generator=generator,
                            schedule=lambda step: 0.1 / (1 + step), resume=snapshot)

    state = torch.get_rng_state()
    try:
        net, steps = start()
        logs, snapshots = [], {}
        for log in steps:
            logs.append(log)
            if log["step"] in (2, 4, 7):  # the middle of an epoch and its very end
                file = io.BytesIO()
                torch.save(steps.send("state"), file)
                snapshots[log["step"]] = file.getvalue()
        assert len(logs) == 12 and {len(log) for log in logs} == {6}
        assert [log["lr"] for log in logs[:2]] == [0.1, 0.05]
        for step, saved in snapshots.items():
            torch.rand(3)  # the default generator has moved on in the meantime
            other, rest = start(torch.load(io.BytesIO(saved), weights_only=True))
            assert list(rest) == logs[step:]
            for a, b in zip(net.state_dict().values(), other.state_dict().values()):
                assert torch.equal(a, b)
    finally:
        torch.set_rng_state(state)
    assert draws.initial_seed() == 9


def test_training_steps_equal_a_plain_loop():
    x, y = batch(8)
    one, two = small_net(), small_net()
    logs = list(R.train(one, [(x, y, "more")], torch.optim.SGD(one.parameters(), 0.1), epochs=3))
    optimizer = torch.optim.SGD(two.parameters(), 0.1)
    for log in logs:
        logits = two(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert log["acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert [(log["step"], log["epoch"]) for log in logs] == [(1, 0), (2, 1), (3, 2)]
    assert logs[0]["lam"] == 1 and logs[0]["lr"] == 0.1
    assert all(isinstance(value, (int, float)) for value in logs[0].values())


def test_training_mode_and_loaders_without_batches():
    x, y = batch(8)
    batches, losses = [(x[:4], y[:4]), (x[4:], y[4:])], []

    def start(loader, resume=None):
        net = small_net()
        return net, R.train(net, loader, torch.optim.SGD(net.parameters(), 0.1), epochs=2,
                            resume=resume)

    for caller_evaluates in (False, True):
        net, steps = start(batches)
        for log in steps:
            losses.append(log["loss"])
            if caller_evaluates:
                net.eval()
    assert losses[:4] == losses[4:]
    for loader in ([], iter(batches)):
        with pytest.raises(ValueError, match="no batch in epoch"):
            list(start(loader)[1])
    _, steps = start(batches)
    next(steps), next(steps)
    with pytest.raises(ValueError, match="fewer than the 2 batches"):
        list(start(batches[:1], steps.send("state"))[1])
    net = small_net()
    for bad in ({"epochs": -1}, {"regularizer": "cutmix"}):
        with pytest.raises(ValueError, match="regularizer must be"):
            next(R.train(net, batches, torch.optim.SGD(net.parameters(), 0.1), **bad))


def test_training_learns_with_every_combination_and_half_precision():
    x, y = batch(16)
    x = x * 0.3 + y.view(-1, 1, 1, 1) - 1.5
    for settings in (*COMBINATIONS.values(), {"amp": True}):
        settings = dict(settings)
        net, amp = small_net(), settings.pop("amp", False)
        optimizer = torch.optim.SGD(net.parameters(), 0.2, 0.9)
        regularizer = R.Regularizer(**settings)
        steps = R.train(net, [(x, y)], optimizer, regularizer=regularizer, epochs=30, amp=amp,
                        generator=gen())
        losses = [log["loss"] for log in steps]
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
        assert all(p.dtype == torch.float32 for p in net.parameters())


def test_layers_draw_from_the_training_generator_only_while_training():
    net = nn.Sequential(R.ShakeDrop(), nn.Flatten(), nn.Linear(192, 4))
    steps = R.train(net, [batch()], torch.optim.SGD(net.parameters(), 0.1), generator=gen())
    next(steps)
    assert net[0].generator is not None
    steps.close()
    assert net[0].generator is None
    copy.deepcopy(net)


def test_parameter_groups_and_schedule():
    net = small_net()
    decayed, spared = R.parameter_groups(net, 1e-4, no_decay_norm=True)
    assert {p.ndim for p in spared["params"]} == {1}
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    everything, nothing = R.parameter_groups(net, 1e-4)
    assert len(everything["params"]) == 6 and not nothing["params"]
    assert everything["weight_decay"] == 1e-4
    schedule = R.step_schedule(0.25, (150, 225))
    np.testing.assert_allclose([schedule(s) for s in (0, 149, 150, 224, 225)],
                               [0.25, 0.25, 0.025, 0.025, 0.0025])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu():
    x, y = batch()
    for per_sample in (False, True):
        cpu = R.cutmix(x, y, per_sample=per_sample, generator=gen(1))
        gpu = R.cutmix(x.cuda(), y.cuda(), per_sample=per_sample, generator=gen(1))
        assert torch.equal(cpu.x, gpu.x.cpu())
    net = small_net().cuda()
    net.insert(3, R.ShakeDrop(0.3))
    log = list(R.train(net, [(x, y)], torch.optim.SGD(net.parameters(), 0.1), amp=True,
                       generator=gen(),
                       regularizer=R.Regularizer("cutmix")))
    assert math.isfinite(log[0]["loss"])
