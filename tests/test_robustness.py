"""Attacks, occlusion, calibration and out-of-distribution metrics against public implementations,
closed forms and brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reference import robustness as R

GOLDEN = Path(__file__).parent / "golden" / "regularization"


def golden(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.tensor(data[key]) for key in data.files}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def random_logits(n=500, k=7, seed=0, scale=3.0):
    draw = gen(seed)
    z = scale * torch.randn(n, k, generator=draw, dtype=torch.float64)
    y = torch.where(torch.rand(n, generator=draw) < 0.6, z.argmax(1),
                    torch.randint(k, (n,), generator=draw))
    return z, y


class Net(nn.Module):
    """The network of the fixture; normalisation outside."""

    def __init__(self, data):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(150, 5)
        self.load_state_dict({"conv.weight": data["conv_w"], "conv.bias": data["conv_b"],
                              "fc.weight": data["fc_w"], "fc.bias": data["fc_b"]})

    def forward(self, x):
        return self.fc(F.softplus(self.conv(x)).flatten(1))


# ---- attacks and occlusion ----


def test_fgsm_and_pgd_equal_torchattacks():
    data = golden("adversarial")
    net, x, y = Net(data), data["x"], data["y"]
    norm = {"mean": data["mean"], "std": data["std"]}
    clean = net((x - data["mean"]) / data["std"])
    torch.testing.assert_close(clean, data["clean_logits"], atol=1e-5, rtol=0)
    for k in (1, 2, 4, 8, 16):
        adv = R.fgsm(net, x, y, k / 255, **norm)
        torch.testing.assert_close(adv, data[f"adv_{k}_255"], atol=1e-6, rtol=0)
        z = net((adv - data["mean"]) / data["std"])
        torch.testing.assert_close(z, data[f"logits_adv_{k}_255"], atol=1e-4, rtol=0)
    adv = R.pgd(net, x, y, 8 / 255, 2 / 255, 10, **norm)
    torch.testing.assert_close(adv, data["pgd_8_255_a2_10_norandom"], atol=1e-5, rtol=0)
    lists = {key: value.flatten().tolist() for key, value in norm.items()}
    assert torch.equal(R.fgsm(net, x, y, 8 / 255, **lists), R.fgsm(net, x, y, 8 / 255, **norm))


def test_attacks_leave_the_model_alone_and_attack_in_eval_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(256, 5))
    net[1].eval()  # a submodule frozen on purpose stays so
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x, y = torch.rand(4, 3, 10, 10, generator=gen()), torch.tensor([0, 1, 2, 3])
    copy = x.clone()
    with torch.no_grad():  # callers often evaluate under no_grad
        one = R.fgsm(net, x, y, 0.1)
        R.pgd(net, x, y, 0.1, 0.05, 2)
        R.odin(net, x)
    assert net.training and not net[1].training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert net[4].weight.grad is None and torch.equal(x, copy) and not one.requires_grad
    with torch.inference_mode():
        assert torch.equal(R.fgsm(net, x.clone(), y.clone(), 0.1), one)
    alone = torch.cat([R.fgsm(net, x[i : i + 1], y[i : i + 1], 0.1) for i in range(4)])
    torch.testing.assert_close(one, alone, atol=1e-6, rtol=0)  # batch statistics would couple them


def test_attack_geometry():
    data = golden("adversarial")
    net, x, y = Net(data), data["x"], data["y"]
    assert torch.equal(R.fgsm(net, x, y, 0.0), x) and torch.equal(R.pgd(net, x, y, 0.1, 0.1, 0), x)
    adv = R.pgd(net, x, y, 0.1, 0.04, 5, random_start=True, generator=gen(3))
    assert (adv - x).abs().max() <= 0.1 + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    assert torch.equal(adv, R.pgd(net, x, y, 0.1, 0.04, 5, random_start=True, generator=gen(3)))
    free = R.fgsm(net, x, y, 0.1, clip=None)
    torch.testing.assert_close((free - x).abs(), torch.full_like(x, 0.1))
    flat = lambda v: v.sum((1, 2, 3))[:, None] * torch.zeros(5)  # sign(0) = 0
    assert torch.equal(R.fgsm(flat, x, y, 0.1), x)
    assert R.fgsm(net.double(), x.double(), y, 0.1).dtype == torch.float64
    sure = lambda v: v.mean((1, 2, 3))[:, None] * torch.tensor([-200, 200])  # p < 1e-45 in float32
    assert (R.fgsm(sure, x.double(), torch.ones_like(y), 0.1, clip=None) < x).all()
    half = R.fgsm(net.bfloat16(), x.bfloat16(), y, 0.1)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_adversarial_steps_compile_for_any_batch_size():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    @torch.compile(backend="eager")
    def attack(x, y):
        return R.pgd(net, x, y, 0.1, 0.05, 2, random_start=True)

    for size in (2, 3, 5):  # from the second on it is left free
        x = torch.rand(size, 3, 2, 2, generator=gen())
        assert 0 < (attack(x, torch.arange(size) % 3) - x).abs().max() <= 0.1 + 1e-6


def test_attack_errors():
    net, y = nn.Flatten(), torch.tensor([0])
    image = torch.rand(1, 3, 4, 4)
    with pytest.raises(TypeError, match="float image batch"):
        R.fgsm(net, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), y, 0.1)
    for bad in ({"eps": -1}, {"eps": math.nan}, {"eps": math.inf}, {"clip": (1, 0)},
                {"mean": [0.5, 0.5]}, {"std": [1, 0, 1]}, {"std": torch.ones(2, 1, 1)}):
        with pytest.raises(ValueError):
            R.fgsm(net, image, y, **{"eps": 0.1, **bad})
    with pytest.raises(ValueError, match="batch size"):
        R.fgsm(net, image, torch.tensor([0, 1]), 0.1)
    with pytest.raises(ValueError, match="step_size"):
        R.pgd(net, image, y, 0.1, -0.1)


def test_occlude_keeps_and_blanks_complementary_pixels():
    x = torch.rand(2, 3, 9, 9, generator=gen()) + 1
    for size in range(10):
        centre, rim = R.occlude(x, size), R.occlude(x, size, "boundary")
        assert torch.equal(centre + rim, x) and (rim != 0).sum() == 6 * size * size
    top = (9 - 4) // 2
    blank = R.occlude(x, 4, fill=0.5)[..., top : top + 4, top : top + 4]
    assert (blank == 0.5).all() and torch.equal(R.occlude(x, 0), x) and R.occlude(x, 0) is not x
    wide = torch.rand(1, 1, 8, 5, generator=gen())
    assert (R.occlude(wide, 6)[..., 1:7, :] == 0).all()
    assert torch.equal(R.occlude(wide, 8, "boundary"), wide)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(R.occlude(last, 3), R.occlude(x, 3))
    for bad in ({"size": -1}, {"size": 10}, {"size": 3, "kind": "corner"}):
        with pytest.raises(ValueError):
            R.occlude(x, **bad)


# ---- corruption errors ----


def test_mce_of_the_reference_is_one_hundred():
    assert R.mce(R.ALEXNET_ERRORS) == pytest.approx(100)
    assert len(R.ALEXNET_ERRORS) == 15
    draw = np.random.RandomState(0)
    errors = {name: draw.rand(5).tolist() for name in R.ALEXNET_ERRORS}
    expected = np.mean([np.mean(errors[n]) / a for n, a in R.ALEXNET_ERRORS.items()])
    means = {name: float(np.mean(e)) for name, e in errors.items()}
    assert R.mce(errors) == pytest.approx(100 * expected, abs=1e-10)
    assert R.mce({**means, "spatter": 0.3}) == pytest.approx(R.mce(errors), abs=1e-10)
    shuffled = dict(sorted(errors.items()))
    assert R.mce(shuffled) == pytest.approx(R.mce(errors), abs=1e-10)
    per_severity = {n: [a] * 5 for n, a in R.ALEXNET_ERRORS.items()}
    assert R.mce(errors, per_severity) == pytest.approx(R.mce(errors), abs=1e-10)
    assert R.relative_mce(R.ALEXNET_ERRORS, 0.4, 0.4) == pytest.approx(100)
    half = {n: (a + 0.4) / 2 for n, a in R.ALEXNET_ERRORS.items()}
    assert R.relative_mce(half, 0.4, 0.4) == pytest.approx(50)


def test_mce_errors():
    errors = dict(R.ALEXNET_ERRORS)
    with pytest.raises(KeyError, match="fog"):
        R.mce({name: e for name, e in errors.items() if name != "fog"})
    for bad in (40.0, -0.1, [0.1] * 4, float("nan")):
        with pytest.raises(ValueError, match="fog"):
            R.mce({**errors, "fog": bad})
    with pytest.raises(ValueError, match="reference"):
        R.mce(errors, {})


def test_corruption_errors_asks_each_severity():
    asked = []

    def loader_of(name, severity):
        asked.append((name, severity))
        y = torch.arange(10) % 2
        wrong = torch.arange(10) < severity
        yield F.one_hot(y ^ wrong, 2).float(), y

    errors = R.corruption_errors(nn.Identity(), loader_of, ["fog", "snow"])
    assert errors == {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [0.1, 0.2, 0.3, 0.4, 0.5]}
    assert asked[:2] == [("fog", 1), ("fog", 2)] and len(asked) == 10


# ---- calibration ----


@pytest.mark.parametrize("case", ["a", "b", "tiny"])
def test_calibration_equals_public_packages(case):
    data = {k[len(case) + 1 :]: v for k, v in golden("calibration").items()
            if k.startswith(case + "_")}
    z, y = data["logits"], data["labels"]
    close = lambda value, key: pytest.approx(float(data[key]), abs=1e-6) == value
    assert close(R.expected_calibration_error(z, y, 10), "ece10")
    for norm in ("l1", "l2", "max"):
        assert close(R.expected_calibration_error(z, y, 15, norm), f"tm_{norm}")
    assert close(R.expected_calibration_error(z, y), "ece15")
    assert close(R.expected_calibration_error(z.softmax(1), y, from_probs=True), "ece15")
    assert close(R.nll(z, y), "nll") and close(R.brier(z, y), "brier")
    assert close(R.brier(z.softmax(1), y, from_probs=True), "brier")
    assert close(1 - R.evaluate_logits(z, y)["error"], "acc")
    if "T" in data:
        T = R.fit_temperature(z, y)
        assert T == pytest.approx(float(data["T"]), abs=1e-4)
        assert close(R.nll(z / T, y), "nll_T")
        assert R.expected_calibration_error(z / T, y) == pytest.approx(float(data["ece15_T"]),
                                                                       abs=1e-4)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_equals_a_loop_over_bins(bins):
    z, y = random_logits()
    p, table = z.softmax(1).numpy(), R.reliability_table(z, y, bins)
    confidence, hit = p.max(1), p.argmax(1) == y.numpy()
    gaps, sizes = [], []
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        assert table["count"][m] == inside.sum()
        gaps.append(abs(hit[inside].mean() - confidence[inside].mean()) if inside.any() else 0)
        sizes.append(inside.mean())
        if inside.any():
            assert table["accuracy"][m] == pytest.approx(hit[inside].mean())
            assert table["confidence"][m] == pytest.approx(confidence[inside].mean())
        else:
            assert table["accuracy"][m] == table["confidence"][m] == 0
    expected = {"l1": np.dot(sizes, gaps), "l2": np.sqrt(np.dot(sizes, np.square(gaps))),
                "max": max(gaps)}
    for norm, value in expected.items():
        assert R.expected_calibration_error(z, y, bins, norm) == pytest.approx(value, abs=1e-12)
    assert table["lower"][0] == 0 and table["upper"][-1] == 1 and len(table["lower"]) == bins
    classes = 0.0
    for k in range(p.shape[1]):
        for m in range(bins):
            inside = (p[:, k] > m / bins) & (p[:, k] <= (m + 1) / bins)
            if inside.any():
                gap = (y.numpy()[inside] == k).mean() - p[inside, k].mean()
                classes += inside.mean() * abs(gap)
    assert R.classwise_calibration_error(z, y, bins) == pytest.approx(classes / p.shape[1],
                                                                      abs=1e-12)


def test_adaptive_bins_hold_equal_shares_and_do_not_depend_on_the_order():
    z, y = random_logits(203)
    confidence = z.softmax(1).amax(1)
    order = confidence.argsort()
    hit = (z.argmax(1) == y)[order].double()
    expected = sum(len(c) / 203 * abs(h.mean() - c.mean()).item() for c, h in zip(
        np.array_split(confidence[order].numpy(), 15), np.array_split(hit.numpy(), 15)))
    assert R.expected_calibration_error(z, y, strategy="adaptive") == pytest.approx(expected,
                                                                                    abs=1e-12)
    saturated = z.round() * 40  # many confidences of exactly 1
    shuffle = torch.randperm(203, generator=gen(4))
    one = R.expected_calibration_error(saturated, y, 7, strategy="adaptive")
    two = R.expected_calibration_error(saturated[shuffle], y[shuffle], 7, strategy="adaptive")
    assert one == pytest.approx(two, abs=1e-12)
    few = R.expected_calibration_error(z[:3], y[:3], 15, strategy="adaptive")
    alone = (confidence[:3] - (z[:3].argmax(1) == y[:3]).double()).abs().mean().item()
    assert few == pytest.approx(alone)


def test_calibration_closed_forms():
    z, y = torch.full((6, 3), -1e4), torch.tensor([0, 1, 2, 0, 1, 2])
    right = z.scatter(1, y[:, None], 1e4)
    assert R.expected_calibration_error(right, y) == R.nll(right, y) == R.brier(right, y) == 0
    wrong = z.scatter(1, (y[:, None] + 1) % 3, 1e4)
    assert R.expected_calibration_error(wrong, y) == 1 and R.brier(wrong, y) == 2
    assert R.nll(wrong, y) == 2e4  # never the logarithm of a clamped probability
    even = torch.zeros(6, 3)
    assert R.nll(even, y) == pytest.approx(math.log(3)) and R.brier(even, y) == pytest.approx(2 / 3)
    # one sample, one class
    assert R.expected_calibration_error(torch.zeros(1, 1), torch.tensor([0])) == 0
    for bins in (4, 10, 20, 24):  # m / bins belongs to the bin that ends there
        for m in range((bins + 1) // 2, bins + 1):
            edge = torch.tensor([[m / bins, 1 - m / bins]], dtype=torch.float64)
            table = R.reliability_table(edge, torch.tensor([0]), bins, from_probs=True)
            assert table["count"].nonzero().item() == m - 1
    z, y = random_logits()
    for dtype in (torch.half, torch.bfloat16, torch.float32):
        assert R.expected_calibration_error(z.to(dtype), y) == pytest.approx(
            R.expected_calibration_error(z.to(dtype).float(), y), abs=1e-12)
    assert R.nll(z.T.contiguous().T, y) == R.nll(z, y)


def test_fit_temperature_is_the_minimum():
    for seed, scale in ((0, 3.0), (1, 0.3), (2, 40.0)):
        z, y = random_logits(seed=seed, scale=scale)
        T = R.fit_temperature(z, y)
        best = R.nll(z / T, y)
        assert all(best <= R.nll(z / (T * f), y) for f in (0.5, 0.99, 0.9999, 1.0001, 1.01, 2))
        assert R.fit_temperature(5 * z, y) == pytest.approx(5 * T, rel=1e-9)
        assert R.fit_temperature(z + 100, y) == pytest.approx(T, rel=1e-9)


def test_fit_temperature_without_a_minimum():
    z, y = random_logits()
    with pytest.warns(UserWarning, match="T -> 0"):
        assert R.fit_temperature(z, z.argmax(1)) == pytest.approx(1e-3)
    with pytest.warns(UserWarning, match="worse than constant"):
        assert R.fit_temperature(z, z.argmin(1)) == pytest.approx(1e3)
    with pytest.warns(UserWarning, match="T -> 0"):  # its minimum is beyond the cap
        assert R.fit_temperature(1e-5 * z, y) == pytest.approx(1e-3)
    assert R.fit_temperature(torch.ones(5, 3), torch.tensor([0, 1, 2, 0, 1])) == 1


def test_calibration_errors():
    z, y = random_logits(10)
    with pytest.raises(TypeError, match="float tensor"):
        R.nll(z.long(), y)
    for logits, labels in ((z, y[:9]), (z[0], y), (z[:0], y[:0]), (z, y + 7), (z, y - 9),
                           (z * np.nan, y)):
        for measure in (R.nll, R.brier, R.expected_calibration_error, R.fit_temperature,
                        R.reliability_table, R.classwise_calibration_error):
            with pytest.raises(ValueError):
                measure(logits, labels)
    for bad in ({"norm": "l3"}, {"strategy": "mass"}, {"n_bins": 0}, {"n_bins": 2.5},
                {"from_probs": True}):
        with pytest.raises(ValueError):
            R.expected_calibration_error(z, y, **bad)


# ---- out of distribution ----


@pytest.mark.parametrize("case", ["easy", "hard", "ties", "inv", "small"])
def test_ood_metrics_equal_sklearn(case):
    data = {k[len(case) + 1 :]: v for k, v in golden("ood").items() if k.startswith(case + "_")}
    a, b = data["in"], data["out"]
    close = lambda value, key: value == pytest.approx(float(data[key]), abs=1e-12)
    assert close(R.auroc(a, b), "sk_auroc")
    assert close(R.aupr(a, b), "sk_aupr_in") and close(R.aupr(a, b, "out"), "sk_aupr_out")
    assert close(R.fpr_at_tpr(a, b), "fpr95_first_ge")
    assert R.tnr_at_tpr(a, b) == 1 - R.fpr_at_tpr(a, b)
    assert close(R.detection_accuracy(a, b), "dtacc_sk")
    assert R.detection_accuracy(a, b) == pytest.approx(float(data["maha_DTACC"]), abs=1e-9)
    if case != "ties":  # that code mishandles ties
        assert R.auroc(a, b) == pytest.approx(float(data["maha_AUROC"]), abs=1e-9)
    out = data["oe_out_positive"]
    assert R.aupr(a, b, "out") == pytest.approx(float(out[1]), abs=1e-9)
    # That code takes the point nearest to the level, on a plateau the one with the most false
    # positives.
    assert R.fpr_at_tpr(a, b, positive="out") <= float(out[2]) + 1 / len(a) + 1e-12


def test_ood_metrics_equal_brute_force_under_ties():
    draw = np.random.RandomState(1)
    for _ in range(20):
        a, b = draw.randint(0, 6, draw.randint(1, 30)), draw.randint(-2, 5, draw.randint(1, 30))
        pairs = (a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean()
        assert R.auroc(a, b) == pytest.approx(pairs, abs=1e-12)
        assert R.auroc(b, a) == pytest.approx(1 - pairs, abs=1e-12)
        points = [((a >= t).mean(), (b >= t).mean()) for t in np.unique(np.r_[a, b])]
        for tpr in (0.2, 0.5, 0.95, 1.0):
            best = min(f for t, f in points if t >= tpr)
            assert R.fpr_at_tpr(a, b, tpr) == pytest.approx(best, abs=1e-12)
        assert R.detection_accuracy(a, b) == pytest.approx(
            max(0.5, *((t + 1 - f) / 2 for t, f in points)), abs=1e-12)
        for metric in (R.aupr, R.fpr_at_tpr):
            assert metric(a, b, positive="out") == pytest.approx(metric(-b, -a), abs=1e-12)


def test_ood_closed_forms_and_inputs():
    s = [0.1, 0.4, 0.4, 2.0]
    assert R.auroc(s, s) == 0.5 and R.tnr_at_tpr(s, s) == 0 and R.detection_accuracy(s, s) == 0.5
    assert R.auroc([1, 2], [0]) == R.aupr([1, 2], [0]) == R.tnr_at_tpr([1, 2], [0]) == 1
    assert R.auroc([0], [1, 2]) == 0 and R.fpr_at_tpr([0], [1, 2]) == 1
    assert R.auroc([float("inf"), 1.0], [-float("inf")]) == 1
    assert R.fpr_at_tpr([1.0], [2.0], tpr=0) == 0
    a = torch.linspace(0, 1, 20, dtype=torch.float16)
    assert R.auroc(a, a.numpy() - 0.5) == R.auroc(a.tolist(), (a - 0.5).double())
    assert R.ood_metrics([1, 2], [0])["auroc"] == 1
    assert R.auroc([1 + 1e-9], [1.0]) == 1  # lists are not rounded to float32
    assert R.auroc(np.arange(3)[::-1], [1]) == 0.5
    for bad in ([], [[1.0]], [float("nan")]):
        for metric in (R.auroc, R.aupr, R.fpr_at_tpr, R.tnr_at_tpr, R.detection_accuracy):
            with pytest.raises(ValueError):
                metric(bad, [0.0])
            with pytest.raises(ValueError):
                metric([0.0], bad)
    for bad in ({"positive": "both"}, {"tpr": 1.5}):
        with pytest.raises(ValueError):
            R.fpr_at_tpr([1.0], [0.0], **bad)


def test_ood_scores():
    z, _ = random_logits(50)
    p = z.softmax(1)
    torch.testing.assert_close(R.ood_score(z), p.amax(1))
    torch.testing.assert_close(R.ood_score(z, "max_logit"), z.amax(1))
    torch.testing.assert_close(R.ood_score(z, "entropy"), (p * p.log()).sum(1))
    torch.testing.assert_close(R.ood_score(z, "energy", 2.0), 2 * (z / 2).logsumexp(1))
    with pytest.raises(ValueError, match="kind"):
        R.ood_score(z, "odd")
    for temperature in (0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            R.ood_score(z, temperature=temperature)


def test_odin_equals_the_published_steps_on_normalised_input():
    data = golden("adversarial")
    net, x, mean, std = Net(data), data["x"], data["mean"], data["std"]
    score = R.odin(net, x, 0.002, 1000.0, mean, std)
    inputs = ((x - mean) / std).requires_grad_(True)
    outputs = net(inputs) / 1000
    F.cross_entropy(outputs, outputs.argmax(1)).backward()
    moved = inputs.detach() - 0.002 * inputs.grad.sign() / std
    expected = (net(moved).detach() / 1000).softmax(1).amax(1)
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=0)
    before = (net(inputs).detach() / 1000).softmax(1).amax(1)
    assert (score > before).all()
    torch.testing.assert_close(R.odin(net, x, 0.0, 1000.0, mean, std), before, atol=1e-7, rtol=0)


# ---- running a model ----


def test_predict_and_evaluate():
    draw = gen()
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(12, 4))
    batches = [(torch.randn(n, 3, 2, 2, generator=draw), torch.randint(4, (n,), generator=draw))
               for n in (5, 1)]
    z, y = R.predict(net, batches)
    assert z.shape == (6, 4) and y.dtype == torch.int64 and net.training and not z.requires_grad
    assert torch.equal(z, R.predict(net, batches)[0])  # evaluation mode: no dropout
    result = R.evaluate(net, batches)
    assert {"error", "nll", "ece", "brier"} <= set(result)
    assert result["error"] == pytest.approx((z.argmax(1) != y).float().mean().item())
    assert result["gap"] == pytest.approx(1 - result["error"] - z.softmax(1).amax(1).mean().item(),
                                          abs=1e-6)
    with pytest.raises(ValueError, match="empty"):
        R.predict(net, [])
    with pytest.raises(ValueError, match="1 labels with 2 logits"):
        R.predict(net, [(torch.zeros(2, 12), torch.zeros(1, dtype=torch.int64))])
    named = [(*pair, ["name"] * len(pair[1])) for pair in batches]
    assert torch.equal(R.predict(net, named)[0], z)  # what else the loader gives is left aside
    images, labels, out = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)
    reused = ((images.fill_(k), labels.fill_(k)) for k in range(2))  # buffers of loader and model
    z, y = R.predict(lambda x: out.copy_(x), reused)
    assert y.tolist() == z[:, 0].tolist() == [0, 0, 1, 1]
