import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from reference import prdc
from reference.prdc import METRICS, PRDC, compute_prdc

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "prdc"
FILES = sorted(path.name for path in GOLDEN.glob("*.npz"))
COUNTS = ("count_per_fake", "count_per_real", "real_in_fake_manifold")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def load(name):
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def brute_force(real, fake, k, ties="strict"):
    """Everything from the full matrices of float64 differences."""
    real, fake = real.double(), fake.double()
    square = lambda a, b: torch.stack([(p - b).square().sum(1) for p in a])      # noqa: E731
    def radii(z):
        d = square(z, z).fill_diagonal_(math.inf)
        return d.sort(1).values[:, k - 1]
    d, rr, rf = square(real, fake), radii(real), radii(fake)
    inside = d < rr[:, None] if ties == "strict" else d <= rr[:, None]
    recalled = d < rf if ties == "strict" else d <= rf
    return {"count_per_fake": inside.sum(0), "count_per_real": inside.sum(1),
            "real_in_fake_manifold": recalled.any(1),
            "real_radii": rr.sqrt(), "fake_radii": rf.sqrt(),
            "precision": inside.any(0).double().mean().item(),
            "recall": recalled.any(1).double().mean().item(),
            "density": inside.sum().item() / (k * len(fake)),
            "coverage": inside.any(1).double().mean().item()}


def assert_equal(result, expected):
    for name in COUNTS:
        assert torch.equal(result[name], expected[name]), name
    for name in METRICS:
        assert result[name] == pytest.approx(expected[name], abs=1e-13), name
    for name in ("real_radii", "fake_radii"):
        assert torch.allclose(result[name], expected[name], rtol=1e-12,
                              atol=1e-13 * float(expected[name].max()) + 1e-300), name


# ---------------------------------------------------------------- values of the official package

@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("options",
                                     [{}, {"precision": "float64"},
                                      {"precision": "screened", "memory_budget": 1}],
                         ids=["default", "float64", "tiny blocks"])
def test_equal_to_the_official_package_and_to_brute_force(name, options):
    g = load(name)
    k, scale = int(g["nearest_k"]), float(np.abs(g["real"]).max())
    result = compute_prdc(g["real"], g["fake"], k, details=True, **options)
    for metric in METRICS:
        assert result[metric] == pytest.approx(float(g[f"official_{metric}"]), abs=1e-12)
        assert result[metric] == pytest.approx(float(g[f"exact_lt_{metric}"]), abs=1e-12)
    for key in COUNTS:
        np.testing.assert_array_equal(result[key].numpy(), g[f"exact_{key}"])
        np.testing.assert_array_equal(result[key].numpy(), g[f"official_{key}"])
    for side in ("real", "fake"):
        np.testing.assert_allclose(result[f"{side}_radii"].numpy(), g[f"exact_{side}_radii"],
                                   rtol=1e-12, atol=1e-12 * scale)
        rtol = 2e-6 if g["real"].dtype == np.float32 else 1e-9
        np.testing.assert_allclose(result[f"{side}_radii"].numpy(), g[f"official_{side}_radii"],
                                   rtol=rtol, atol=2e-6 * scale)
    closed = compute_prdc(g["real"], g["fake"], k, ties="inclusive", **options)
    for metric in METRICS:
        assert closed[metric] == pytest.approx(float(g[f"exact_le_{metric}"]), abs=1e-12)
    for metric in ("precision", "recall"):
        assert closed[metric] == pytest.approx(float(g[f"le_peer_{metric}"]), abs=1e-12)


# ---------------------------------------------------------------- exact for any data and blocks

def cases():
    a, b = normal(150, 6, seed=1), normal(130, 6, seed=2)
    grid = torch.randint(0, 4, (160, 3), generator=seeded(3)).float()
    clusters = normal(8, 20, seed=4, dtype=torch.float64) * 1e3
    tight = clusters.repeat_interleave(20, 0) + 1e-4 * normal(160, 20, seed=5, dtype=torch.float64)
    doubled = torch.cat([a[:60], a[:60], a[:20]])
    return {
        "duplicates": (doubled, torch.cat([a[:40], b[:50]])),
        "many equal": (torch.cat([a[:1].repeat(90, 1), a[:50]]),
                       torch.cat([a[:1].repeat(70, 1), b[:30]])),
        "offset of 1e4 deviations": (a + 1e4, b + 1e4),
        "float64 offset of 1e8": (a.double() + 1e8, b.double() + 1e8),
        "integers": (grid.to(torch.int64), grid[:90].to(torch.int64) + 1),
        "bytes": (grid.to(torch.uint8) * 60, grid[:100].to(torch.uint8) * 60),
        "tiny": (a.double() * 1e-12, b.double() * 1e-12), "tiny float32": (a * 1e-20, b * 1e-20),
        "huge": (a * 1e30, b * 1e30),
        "vanishing squares": (a.double() * 1e-200, b.double() * 1e-200),
        "subnormal float32": (a * 1e-40, b * 1e-40),
        "float32 beside larger float64": (torch.cat([a.double(), a[:20].double() * 1e6]) * 1e37,
                                          b * 1e37),
        "differences above the largest number": (a.sign().double() * 1.7e308,
                                                 b.sign().double() * 1.7e308),
        "booleans": (a > 0, b > 0.5),
        "tight groups far apart": (tight, tight[torch.randperm(160, generator=seeded(6))] + 1e-5),
        "one column": (a[:, :1], b[:, :1]), "half precision": (a.half(), b.half()),
        "wide": (normal(60, 700, seed=7), normal(50, 700, seed=8) * 0.97),
        "copy": (a, a.clone()),
        "not contiguous": (a.T.contiguous().T, b[:, [5, 4, 3, 2, 1, 0]][:, ::1]),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("ties", ["strict", "inclusive"])
def test_exact_on_difficult_data(name, ties):
    real, fake = cases()[name]
    # brute force on numbers whose squares exist
    scale = {"vanishing squares": 1e-200,
             "differences above the largest number": 2.0**1000}.get(name, 1.0)
    for k in (1, 4, 9):
        expected = brute_force(real.double() / scale, fake.double() / scale, k, ties)
        expected["real_radii"] *= scale
        expected["fake_radii"] *= scale
        for options in ({}, {"memory_budget": 20_000},
                        {"precision": "float64", "memory_budget": 1}):
            assert_equal(compute_prdc(real, fake, k, ties=ties, details=True, **options), expected)


def test_exact_on_random_mixtures_of_difficulties():
    for seed in range(40):
        g = seeded(seed)
        n, m, d = (int(torch.randint(low, high, (), generator=g))
                   for low, high in ((20, 150), (20, 150), (1, 40)))
        real, fake = (torch.randn(size, d, generator=g, dtype=torch.float64) for size in (n, m))
        if seed % 4 == 0:                                     # few values: ties everywhere
            real, fake = (z.sign().long() for z in (real, fake))
        elif seed % 4 == 1:                                   # copies, far from 0
            real = real[torch.randint(n // 3, (n,), generator=g)] + 1e4
            fake = torch.cat([real[:m // 2], fake + 1e4])[:m]
        # columns of very different scales, outliers
        elif seed % 4 == 2:
            scale = 10.0 ** torch.linspace(-20, 5, d, dtype=torch.float64)
            real, fake = real * scale, fake * scale
            real[0] *= 1e6
        k, budget = int(torch.randint(1, 19, (), generator=g)), (1, 20_000, None)[seed % 3]
        for ties in ("strict", "inclusive"):
            expected = brute_force(real, fake, k, ties)
            assert_equal(compute_prdc(real, fake, k, ties=ties, details=True,
                                      memory_budget=budget), expected)


def test_several_k_equal_separate_calls():
    real, fake = normal(120, 5), normal(90, 5, seed=1)
    for options in ({}, {"ties": "inclusive", "memory_budget": 3000}):
        options = {"details": True, "realism": True} | options
        together = compute_prdc(real, fake, [3, 1, 20], **options)
        for position, k in enumerate((3, 1, 20)):
            single = compute_prdc(real, fake, k, **options)
            for name, value in single.items():
                assert np.array_equal(together[name][position], value), name
    assert list(compute_prdc(real, fake, np.array([2]))) == list(METRICS)


def test_blocks_row_order_scale_rotation_and_swap():
    real, fake = normal(400, 7), normal(300, 7, seed=1) * 0.9
    whole = compute_prdc(real, fake, 4, details=True)
    for budget in (1, 10_000, 300_000):
        assert_equal(compute_prdc(real, fake, 4, details=True, memory_budget=budget), whole)
    p, q = torch.randperm(400, generator=seeded()), torch.randperm(300, generator=seeded())
    mixed = compute_prdc(real[p], fake[q], 4, details=True)
    assert torch.equal(mixed["count_per_real"], whole["count_per_real"][p])
    assert torch.equal(mixed["count_per_fake"], whole["count_per_fake"][q])
    assert torch.equal(mixed["real_radii"], whole["real_radii"][p])
    doubled = compute_prdc(2 * real, 2 * fake, 4, details=True)
    assert torch.equal(doubled["real_radii"],
                       2 * whole["real_radii"]) and torch.equal(doubled["count_per_real"],
                                                                whole["count_per_real"])
    rotation = torch.linalg.qr(normal(7, 7, seed=9, dtype=torch.float64)).Q
    turned = compute_prdc(real.double() @ rotation, fake.double() @ rotation, 4, details=True)
    assert (turned["count_per_fake"] - whole["count_per_fake"]).abs().sum() <= 2
    swapped = compute_prdc(fake, real, 4)
    assert swapped["precision"] == whole["recall"] and swapped["recall"] == whole["precision"]


def test_bounds_hold_where_roundings_add_up():
    for d in (1, 257, 4096):
        a = torch.full((9, d), 1 / 3) + 1e-3 * torch.rand(9, 1, generator=seeded(d))
        a, b = torch.cat([a, -a]), -7 * a.flip(0)
        scale, whole = prdc._scale((a, b), 100), (slice(0, 18), slice(0, 9))
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(18), torch.arange(9),
                                                    indexing="ij"))
        for precision in ("screened", "float64"):
            screen = prdc._Screen(d, a.device, precision, None)
            x, y = (prdc._Points(z, torch.zeros(d, dtype=torch.float64), scale, 100)
                    for z in (a, b))
            low = screen.lower(x, whole[0], x.block(whole[0], screen.dtype), y, whole[1]).flatten()
            exact = prdc._exact_distances(x, i, y, j, 100)
            assert (low <= exact).all() and (exact <= low + screen.gap(x, i, y, j)).all()


def test_screening_of_a_larger_set_against_float64():
    real, fake = normal(3000, 12), normal(2500, 12, seed=1) + 0.1
    a, b = (compute_prdc(real, fake, [3, 10], details=True, precision=p, memory_budget=m)
            for p, m in (("screened", 2_000_000), ("float64", None)))
    assert all(torch.equal(a[name], b[name]) for name in (*COUNTS, "real_radii", "fake_radii"))


def test_a_collapsed_generator_is_quick_and_right():
    real = normal(1500, 16)
    fake = real[:1].repeat(2000, 1)
    result = compute_prdc(real, fake, 5, details=True, memory_budget=3_000_000)
    inside = (real.double() - real[0].double()).norm(dim=1) < result["real_radii"]
    assert torch.equal(result["count_per_real"],
                       2000 * inside.long()) and not result["fake_radii"].any()
    assert compute_prdc(real, fake, 5, ties="inclusive")["recall"] == 1 / 1500


def test_evenly_spaced_points_by_hand():
    real = torch.arange(10.0)[:, None]
    result = compute_prdc(real, real + 0.25, 2, details=True)
    assert result["real_radii"].tolist() == [2] + [1] * 8 + [2]
    # the fake at j + 0.25 lies within 1 of the reals j and j + 1; those at 1.25 and 7.25 also
    # within 2 of an end
    assert result["count_per_fake"].tolist() == [2, 3, 2, 2, 2, 2, 2, 3, 2, 1]
    assert compute_prdc(real[:3], real[:3] + 0.25, 2)["coverage"] == 1.0        # N = k + 1


def test_realism():
    real, fake = normal(80, 4), torch.cat([normal(50, 4, seed=1), normal(3, 4)])
    for budget in (None, 2000):
        result = compute_prdc(real, fake, 3, realism=True, details=True, memory_budget=budget)
        radii = result["real_radii"]
        keep = radii <= (radii.sort().values[39] + radii.sort().values[40]) / 2
        d = prdc.compute_pairwise_distance(real, fake)
        expected = (radii[:, None] / d)[keep].amax(0)
        assert torch.allclose(result["realism"], expected, rtol=1e-12)
    same = compute_prdc(real, real[:5].clone(), 3, metrics=["density"], realism=True)["realism"]
    assert same.isinf().sum() == keep[:5].sum()
    constant = compute_prdc(torch.ones(9, 2), torch.ones(4, 2), 3, metrics=["density"],
                            realism=True)
    assert not constant["realism"].any()


def test_float32_rounding_and_approximate_mode():
    generator = np.random.default_rng(0)
    real, fake = (generator.standard_normal((400, 64)).astype(np.float32) for _ in range(2))
    # noqa: E731
    square = lambda a, b: np.stack([np.square(p - b.astype(np.float64)).sum(1)
                                    for p in a]).astype(np.float32)
    d = np.sqrt(square(real, fake))
    radii = np.sort(np.sqrt(square(real, real)), 1)[:, 5]
    rounded = compute_prdc(real, fake, 5, rounding="float32", details=True)
    np.testing.assert_array_equal(rounded["count_per_real"].numpy(), (d < radii[:, None]).sum(1))
    np.testing.assert_array_equal(rounded["real_radii"].numpy(), radii.astype(np.float64))
    rough, exact = (compute_prdc(real, fake, 5, precision=p) for p in ("float32", "screened"))
    assert all(abs(rough[m] - exact[m]) < 0.02 for m in METRICS)


# ---------------------------------------------------------------- expectations

def test_expected_coverage_and_the_law_of_counts():
    assert prdc.expected_density() == 1.0
    assert prdc.expected_coverage(5, 10_000, 10_000) == pytest.approx(0.9687734, abs=5e-8)
    assert prdc.expected_coverage(5, 2000, 2000) == pytest.approx(0.9688671, abs=5e-8)
    assert prdc.expected_coverage(3, 7, 4) == pytest.approx(1 - math.comb(6, 3) / math.comb(10, 3),
                                                            rel=1e-13)
    assert prdc.select_k(10_000, 10_000) == 5 and prdc.select_k(10_000, 5_000) == 8
    assert prdc.select_k(100_000, 1, 0.499995) == 50_000      # one fake: coverage is k / N
    assert prdc.select_k(10**9, 10**9) == 5
    with pytest.raises(ValueError, match="coverage above 1.0"):
        prdc.select_k(10**9, 10**9, 1.0)
    for wrong, words in (((9.5, 9), "num_real must be an integer"), ((9, "9"), "num_fake"),
                         ((9, 9, "0.5"), "min_coverage must be a number, not '0.5'")):
        with pytest.raises(TypeError, match=words):
            prdc.select_k(*wrong)
    assert prdc.ball_count_pmf(60, 500, 500)[0].item() == pytest.approx(
        math.comb(499, 60) / math.comb(999, 60), rel=1e-12)
    for k, n, m in ((5, 50, 80), (1, 3, 2), (7, 900, 300), (5, 10**9, 1000)):
        law = prdc.ball_count_pmf(k, n, m)
        c = torch.arange(m + 1, dtype=torch.float64)
        assert law.sum().item() == pytest.approx(1, abs=1e-10)
        assert (law @ c).item() == pytest.approx(k * m / n, rel=1e-9)
        assert law[0].item() == pytest.approx(1 - prdc.expected_coverage(k, n, m), rel=1e-9)
    for arguments in ((0, 5, 5), (5, 5, 5), (1, 5, 0)):
        with pytest.raises(ValueError, match="nearest_k"):
            prdc.expected_coverage(*arguments)
    with pytest.raises(ValueError, match="no nearest_k"):
        prdc.select_k(3, 1)


def test_equal_distributions_meet_the_expectations():
    runs = [compute_prdc(normal(200, 3, seed=2 * s), normal(150, 3, seed=2 * s + 1), 5)
            for s in range(40)]
    for metric, expected in (("density", 1.0), ("coverage", prdc.expected_coverage(5, 200, 150))):
        values = np.array([r[metric] for r in runs])
        assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / math.sqrt(len(values))


def test_outliers_fool_precision_and_recall_only():
    real, fake = normal(500, 64), normal(500, 64, seed=1)
    outlier = real.clone()
    outlier[0] = 3.0
    shifted = compute_prdc(outlier, fake + 1, 5)
    assert shifted[
        "precision"] > 0.99 and 0.2 <= shifted["density"] < 0.21 and shifted["coverage"] < 0.02
    away = fake - 1
    away[0] = 3.0
    other = compute_prdc(real, away, 5)
    assert other["recall"] > 0.99 and other["coverage"] < 0.02


# ---------------------------------------------------------------- object, subsets, progress, files

def test_batches_reset_cache_and_state(tmp_path):
    real, fake, other = normal(150, 4), normal(120, 4, seed=1), normal(90, 4, seed=2)
    expected, expected_other = compute_prdc(real, fake, [2, 5]), compute_prdc(real, other, [2, 5])
    metric = PRDC(nearest_k=[2, 5])
    for part in real.split(40):
        metric.update(part, True)
    for part in fake.numpy()[:50], fake[50:]:
        metric.update(part, real=False)
    assert metric.compute() == expected and (metric.num_real, metric.num_fake) == (150, 120)
    metric.reset(keep_real=True)
    metric.update(other, False)
    assert metric.compute() == expected_other
    metric.cache_real(tmp_path / "real.npz")
    fresh = PRDC(nearest_k=[5])
    fresh.cache_real(tmp_path / "real.npz")
    fresh.update(other, False)
    assert fresh.compute() == {name: value[1:]
                               for name, value in expected_other.items()} and fresh.num_real == 150
    again = PRDC(nearest_k=[2, 5])
    again.load_state_dict(metric.state_dict())
    assert again.compute() == expected_other
    with pytest.raises(ValueError, match="not for \\[4\\]"):
        PRDC(nearest_k=4).cache_real(tmp_path / "real.npz")
    new = PRDC(nearest_k=3)
    new.update(real, True)
    new.cache_real(tmp_path / "new.npz")
    new.update(fake, False)
    assert new.compute() == compute_prdc(real, fake, 3)
    assert sorted(os.listdir(tmp_path)) == ["new.npz", "real.npz"]
    metric.reset()
    assert metric.num_real == 0
    with pytest.raises(ValueError, match="0 real and 0 fake"):
        metric.compute()
    with pytest.raises(ValueError, match="needs real rows"):
        metric.cache_real(tmp_path / "none.npz")
    (tmp_path / "other.npz").write_bytes(b"something")
    with pytest.raises(ValueError, match="other.npz was not written by cache_real"):
        metric.cache_real(tmp_path / "other.npz")
    metric.update(real, True)
    with pytest.raises(ValueError, match="3 columns"):
        metric.update(torch.zeros(2, 3), False)


def test_a_metric_owns_what_it_holds_and_survives_bad_batches(tmp_path):
    real, fake, ks = normal(60, 4), normal(50, 4, seed=1), [3, 2]
    expected = compute_prdc(real, fake, ks)
    metric, other = PRDC(ks), PRDC(ks)
    metric.update(real, True)
    metric.update(fake, False)
    ks[0] = 1
    for bad, side, error, words in [
            (fake * math.inf, False, ValueError, "fake_features has 50 rows with NaN"),
            (fake, "fake", TypeError, "real must be True or False, not 'fake'"),
            (fake, None, TypeError, "real must be")]:
        with pytest.raises(error, match=words):
            metric.update(bad, side)
    assert metric.compute() == expected
    state = metric.state_dict()
    other.load_state_dict(state)
    for tensor in (state["real"], state["fake"], state["radii"][0]):
        tensor.zero_()
    assert metric.compute() == other.compute() == expected
    for wrong in ({name: state[name] for name in ("real", "fake", "radii")}, None):
        with pytest.raises(ValueError, match="needs a dict with real, fake, radii, radii_of"):
            other.load_state_dict(wrong)
    assert other.compute() == expected
    metric.cache_real(tmp_path / "real.npz")
    with np.load(tmp_path / "real.npz") as file:
        kept = dict(file)
    for name in ("real_features", "squared_radii", "scale"):
        np.savez(tmp_path / "broken.npz", **kept | {name: kept[name] * math.nan})
        with pytest.raises(ValueError, match="broken.npz was not .*(not finite|with NaN)"):
            metric.cache_real(tmp_path / "broken.npz")
    np.savez(tmp_path / "fewer.npz", **kept | {"real_features": kept["real_features"][:40]})
    metric.cache_real(tmp_path / "fewer.npz")                 # radii of other rows: not used
    assert metric.compute() == compute_prdc(real[:40], fake, [3, 2])


def test_kept_radii_serve_only_where_they_are_right(tmp_path):
    real, fake = normal(80, 4) + 1e4, normal(70, 4, seed=1) + 1e4
    rough = PRDC(5, precision="float32")
    rough.update(real, True)
    rough.update(fake, False)
    rough.compute()
    rough.cache_real(tmp_path / "real.npz")
    for k in (5, 3):
        metric = PRDC(k, details=True)
        metric.load_state_dict(rough.state_dict())
        expected = compute_prdc(real, fake, k, details=True)
        assert torch.equal(metric.compute()["real_radii"], expected["real_radii"])
    metric = PRDC(5, details=True)
    metric.cache_real(tmp_path / "real.npz")
    metric.update(fake, False)
    expected = compute_prdc(real, fake, 5, details=True)
    assert torch.equal(metric.compute()["real_radii"], expected["real_radii"])
    small, fake = real.double() * 1e-200, fake.double()       # a common scale hides these radii
    metric = PRDC(5)
    metric.update(small, True)
    for size in (1.0, 1e-200):
        metric.update(fake * size, False)
        result = metric.compute()
        metric.reset(keep_real=True)
    assert result == compute_prdc(small, fake * 1e-200, 5)


@pytest.mark.parametrize("narrow", [torch.float32, torch.float16, torch.bfloat16])
def test_batches_of_other_types_lose_no_digits(narrow):
    """torch.cat gives integers beside fractions the narrow type, where 70,000 may be infinite."""
    integers = (100 * normal(2, 40, 2)).long() + 2**25 + 1
    fractions = (100 * normal(20, 2)).to(narrow)
    real, fake = [integers[0], fractions, integers[1, :5]], [fractions[:9] + 1, integers[1]]
    metric = PRDC(3, details=True)
    for rows, side in ((real, True), (fake, False)):
        for part in rows:
            metric.update(part, side)
    result = metric.compute()
    assert_equal(result, brute_force(*(torch.cat([part.double() for part in rows])
                                       for rows in (real, fake)), 3))


def test_sums_do_not_depend_on_blocks_and_threads():
    real, fake = normal(12, 40_000), normal(11, 40_000, seed=1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found += [compute_prdc(real, fake, 3, details=True, memory_budget=budget)["real_radii"]
                  for budget in (1, 2**21, None)]
    assert all(torch.equal(radii, found[0]) for radii in found)


def test_threads_leave_the_setting_of_products_alone():
    sets = [(normal(200, 8, seed=s), normal(200, 8, seed=s + 9)) for s in range(4)]
    expected, found, interval = [compute_prdc(*pair) for pair in sets], {}, sys.getswitchinterval()

    def work(number):
        for _ in range(3):
            found[number] = compute_prdc(*sets[number], memory_budget=20_000)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(sets))]
    torch.set_float32_matmul_precision("medium")
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        sys.setswitchinterval(interval)
        torch.set_float32_matmul_precision("highest")
    assert [found[number] for number in range(len(sets))] == expected


@pytest.mark.parametrize("kind", ["one", "each", "old"])
def test_every_setting_of_products_is_respected_and_kept(kind, monkeypatch):
    real, fake = normal(40, 8), normal(40, 8, seed=1)
    expected, backends = compute_prdc(real, fake), torch.backends
    products = [p for p in (backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None))
                if hasattr(p, "fp32_precision")]              # since torch 2.9
    try:
        if kind == "each":                                    # torch cannot name a common one here
            for p, precision in zip(products, ("tf32", "bf16")):
                p.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision("high")
        before = [p.fp32_precision for p in products]
        if kind == "old":
            monkeypatch.setattr(backends.cuda, "matmul", object())        # torch 2.4
        assert compute_prdc(real, fake) == expected
        assert [p.fp32_precision for p in products] == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_inputs_are_left_alone_and_may_be_of_any_kind():
    real, fake = normal(60, 3, dtype=torch.float64), normal(50, 3, seed=1, dtype=torch.float64)
    kept = real.clone(), fake.clone()
    expected = compute_prdc(real, fake, 4)
    assert torch.equal(real, kept[0]) and torch.equal(fake, kept[1])
    assert compute_prdc(real_features=real.numpy(), fake_features=fake.tolist(),
                        nearest_k=4) == expected
    assert compute_prdc(real.requires_grad_(), fake, 4) == expected
    half = compute_prdc(kept[0].half(), kept[1].half(), 4)
    assert half == compute_prdc(kept[0].half().float(), kept[1].half().float(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_prdc(kept[0].float(), kept[1].float(), 4) == compute_prdc(kept[0].float(),
                                                                                 kept[1].float(), 4)
    for kind in (">f8", np.longdouble):
        assert compute_prdc(kept[0].numpy().astype(kind), kept[1], 4) == expected
    read_only = kept[0].numpy()
    read_only.flags.writeable = False
    assert compute_prdc(read_only, kept[1], 4) == expected


def test_metrics_chosen_and_official_names():
    real, fake = normal(60, 3), normal(50, 3, seed=1)
    every = compute_prdc(real, fake, 4)
    assert list(every) == list(METRICS) and all(type(v) is float for v in every.values())
    assert compute_prdc(real, fake, 4,
                        metrics=["coverage", "density"]) == {m: every[m]
                                                             for m in ("density", "coverage")}
    f = compute_prdc(real, fake, 4, metrics=["f_score"])
    p, r = every["precision"], every["recall"]
    assert f == {"f_score": pytest.approx(2 * p * r / (p + r))}
    details = compute_prdc(real, fake, 4, metrics=["density"], details=True)
    assert "fake_radii" not in details and details["density_clipped"] == pytest.approx(
        (details["count_per_fake"].double() / 4).clamp(max=1).mean().item(), abs=1e-15)
    radii = prdc.compute_nearest_neighbour_distances(real.numpy(), 4)
    assert isinstance(radii, np.ndarray) and radii.dtype == np.float64
    assert torch.equal(torch.from_numpy(radii), details["real_radii"])
    distances = prdc.compute_pairwise_distance(real)
    assert isinstance(distances, torch.Tensor) and not distances.diagonal(
        ).any() and torch.equal(distances, distances.T)
    assert torch.allclose(distances.sort(1).values[:, 4], details["real_radii"])
    assert torch.allclose(prdc.compute_pairwise_distance(real.double() * 1e200) / 1e200, distances)
    assert prdc.compute_pairwise_distance(real[:0], real).shape == (0, 60)


def test_subsets_and_progress():
    real, fake = normal(300, 4), normal(200, 4, seed=1)
    mean, std = prdc.bootstrap_prdc(real, fake, 3, num_subsets=5, seed=1)
    assert list(mean) == list(
        std) == list(METRICS) and 0 < std["density"] < 0.5 and abs(mean["density"] - 1) < 0.3
    again, other = (prdc.bootstrap_prdc(real, fake, 3, num_subsets=5, seed=s) for s in (1, 2))
    assert again == (mean, std) != other
    whole = prdc.bootstrap_prdc(real[:200], fake, 3, num_subsets=2, subset_size=200)[1]
    assert all(value == pytest.approx(0, abs=1e-15) for value in whole.values())
    torch.set_float32_matmul_precision("high")                # the caller's between two steps
    steps = []
    for step in prdc.iter_prdc(real, fake, 3, memory_budget=1):
        steps.append(step)
        assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    assert {s["stage"] for s in steps} == {"real radii", "fake radii", "counting", "done"}
    assert all(1 <= s["done"] <= s["total"]
               for s in steps) and steps[-1]["result"] == compute_prdc(real, fake, 3)
    for arguments, words in [({"num_subsets": 1}, "num_subsets"), ({"seed": 0.5}, "seed"),
                             ({"num_subsets": "3"}, "num_subsets must be an integer"),
                             ({"subset_size": 500}, "subset_size"), ({"subset_size": 9.5}, "9.5")]:
        with pytest.raises((ValueError, TypeError), match=words):
            prdc.bootstrap_prdc(real, fake, 3, **arguments)
    broken = real.clone()
    broken[7, 0] = math.nan                                   # whether a subset has the row or not
    for sets, size, words in (((broken, fake), 100, "real_features has 1 rows with NaN"),
                              ((real, fake[:0]), None, "fake_features has 0 rows"),
                              ((real, fake), 3, "subset_size must be in 4..200 for nearest_k=3")):
        with pytest.raises(ValueError, match=words):
            prdc.bootstrap_prdc(*sets, 3, subset_size=size)
    with torch.device("meta"):                                # any default device of the caller
        assert prdc.bootstrap_prdc(real, fake, 3, num_subsets=5, seed=np.int64(1)) == again


DISTRIBUTED = '''
import sys, torch, torch.distributed as dist, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from reference.prdc import PRDC, bootstrap_prdc, compute_prdc
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
g = torch.Generator().manual_seed(0)
real, fake = torch.randn(203, 5, generator=g), torch.randn(150, 5, generator=g).round(decimals=1)
mine = slice(0, 203) if rank == 0 else slice(203, 203)
nothing = torch.zeros(0, 5)                     # of another type than the rows of the other process
cut = 90
part = slice(0, cut) if rank == 0 else slice(cut, 150)
alone = compute_prdc(real, fake, [2, 5], details=True, realism=True)
real = real.double()
shared = compute_prdc(real if rank == 0 else nothing, fake[part], [2, 5], details=True,
                      realism=True, group=dist.group.WORLD, memory_budget=5000)
for name, value in alone.items():
    same = torch.equal(shared[name], value) if torch.is_tensor(value) else shared[name] == value
    assert same, name
assert bootstrap_prdc(real if rank == 0 else nothing, fake[part], group=dist.group.WORLD) == (
    bootstrap_prdc(real, fake))
metric = PRDC(5, group=dist.group.WORLD)
metric.update(real[mine], True); metric.update(fake[part], False)
assert metric.compute() == compute_prdc(real, fake, 5)
for name in (rank, "of all"):                    # a file of each process, and one file
    metric.cache_real(f"{sys.argv[2]}/{name}.npz"); dist.barrier()
    fresh = PRDC(5, group=dist.group.WORLD)
    fresh.cache_real(f"{sys.argv[2]}/{name}.npz"); fresh.update(fake[part], False)
    assert fresh.num_real == (101, 102)[rank]
    assert fresh.compute() == compute_prdc(real, fake, 5)
if rank == 1:
    fresh.update(fake[:9], True)                # the other process still has its radii
assert fresh.compute() == compute_prdc(torch.cat([real, fake[:9].double()]), fake, 5)
print("equal")
dist.destroy_process_group()
'''


def test_processes_share_the_work_and_agree(tmp_path):
    (tmp_path / "shared.py").write_text(DISTRIBUTED)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
                           str(tmp_path / "shared.py"), str(ROOT), str(tmp_path)],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr[-2000:]


MEMORY = r"""
import re, sys, torch, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from reference.prdc import compute_prdc
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
a, b = torch.randn(20000, 8, generator=g), torch.randn(20000, 8, generator=g)
compute_prdc(a[:600], b[:600])
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
before = peak()
compute_prdc(a, b, metrics=["density", "coverage"])
print((peak() - before) / 1024)
"""


def test_memory_is_bounded():
    done = subprocess.run([sys.executable, "-c", MEMORY, str(ROOT)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 150


# ---------------------------------------------------------------- bad input

def test_errors_name_the_numbers():
    good = torch.zeros(8, 3) + torch.arange(8.0)[:, None]
    bad = good.clone()
    bad[2:4, 1] = float("nan")
    for arguments, options, words in [
        ((good, torch.zeros(8, 4), 2), {}, "3 columns.*4"),
        ((good[:0], good, 2), {}, "real_features has 0 rows"),
        ((good, good[:0], 2), {}, "fake_features has 0 rows"),
        ((good, good, 0), {}, "positive integer"), ((good, good, 2.0), {}, "positive integer"),
        ((good, good, True), {}, "positive integer"), ((good, good, []), {}, "must not be empty"),
        ((good, good, [3, -1]), {}, "positive integer"),
        ((good, good, 8), {}, "more than 8 real rows, there are 8"),
        ((good, good[:3], 3), {}, "more than 3 fake rows"),
        ((bad, good, 2), {}, "real_features has 2 rows"),
        ((good, bad * math.inf, 2), {}, "fake_features has 8 rows"),
        ((good.to(torch.complex64), good, 2), {}, "real numbers"),
        ((good.numpy().astype("<U3"), good, 2), {}, "real numbers"),
        ((good[0], good, 2), {}, "flatten"), ((good[None], good, 2), {}, "flatten"),
        ((good, good, 2), {"metrics": ["fid"]}, "metrics must be"),
        ((good, good, 2), {"metrics": None}, "metrics must be"),
        ((good, good, 2), {"realism": "yes"}, "realism must be one of False, True"),
        ((good.to_sparse(), good, 2), {}, "dense real numbers"),
        ((good, good, 2), {"ties": "open"}, "ties must be"),
        ((good, good, 2), {"precision": "half"}, "precision must be"),
        ((good, good, 2), {"rounding": "up"}, "rounding must be"),
        ((good, good, 2), {"memory_budget": 0}, "memory_budget"),
        ((good, good, 2), {"memory_budget": "1 GiB"}, "memory_budget"),
        ((good, [[1, 2, 3], [4]], 2), {}, "fake_features must be an array"),
        ((good[:, :0], good[:, :0], 2), {}, "no columns"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            compute_prdc(*arguments, **options)
    # M <= k is fine without recall
    assert compute_prdc(good, good[:3] + 0.1, 3, metrics=["density"])["density"] > 0
    with pytest.raises(ValueError, match="positive integer"):
        PRDC(nearest_k=0)
    with pytest.raises(TypeError, match="unknown option 'tie'; there are metrics, ties"):
        PRDC(5, tie="strict")
    for function in (
        prdc.bootstrap_prdc, lambda a, b, k: prdc.compute_nearest_neighbour_distances(a, k)):
        with pytest.raises(ValueError, match="one positive integer"):
            function(good, good, [2, 3])
    with pytest.raises(ValueError, match="columns|features per row"):
        prdc.compute_pairwise_distance(good, good[:, :2])
    with pytest.raises(ValueError, match="data_y has 2 rows with NaN"):
        prdc.compute_pairwise_distance(good, bad)
    for wrong in ((2.0, 9, 9), (True, 9, 9), (2, 9.5, 9), (2, 9, "9")):
        with pytest.raises(TypeError, match="must be an integer"):
            prdc.expected_coverage(*wrong)


def test_warnings_tell_what_to_expect():
    def texts(*arguments, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compute_prdc(*arguments, **options)
        return " ".join(str(w.message) for w in caught)
    real = normal(50, 3)
    assert "expect a coverage of 0.9" in texts(real, normal(50, 3, seed=1), 5)
    assert "same tensor" in texts(real, real, 5)
    assert 'ties="inclusive"' in texts(torch.ones(20, 2), torch.ones(30, 2), 5)
    assert texts(normal(1000, 2), normal(1000, 2, seed=1), 5) == ""


def test_filters_of_warnings_are_left_alone(monkeypatch):
    """They are those of all threads: a call that changes them for a while may undo another's."""
    real, before, seen = normal(50, 3), list(warnings.filters), []

    def watched(*arguments, original=prdc.iter_prdc, **options):
        seen.append(list(warnings.filters))
        return original(*arguments, **options)
    monkeypatch.setattr(prdc, "iter_prdc", watched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filters[:] = before
        prdc.compute_nearest_neighbour_distances(real, 5)
        prdc.bootstrap_prdc(real, real, 5, num_subsets=2)
    assert seen == 3 * [before] and not caught


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_integers():
    real, fake = normal(3000, 40), normal(2500, 40, seed=1)
    a, b = compute_prdc(real, fake, [1, 5], details=True), compute_prdc(real, fake, [1, 5],
                                                                        details=True, device="cuda")
    assert all(torch.equal(a[name], b[name]) for name in COUNTS)
