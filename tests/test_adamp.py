"""AdamP and SGDP: recorded trajectories, paths, identities, arguments, state, scripts."""

import copy
import doctest
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import timing
import torch
from torch import nn

from reference import adamp
from reference.adamp import SGDP, AdamP

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "adamp"
ADAMP_PATHS = {"readable": {"foreach": False, "fused": False}, "foreach": {"foreach": True},
               "fused": {"fused": True}, "capturable": {"capturable": True}, "default": {},
               "as on CUDA": {"foreach": True, "fused": True}}
SGDP_PATHS = {"readable": {"foreach": False}, "foreach": {"foreach": True}, "default": {},
              "as on CUDA": {"foreach": True}}
SHAPES = [(6, 3, 3, 3), (7, 12), (1, 10), (5, 1, 1, 1), (4, 3, 5), (6,), ()]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(w, g):
    """g without its part along w, row by row."""
    rows, grads = w.reshape(len(w), -1), g.reshape(len(w), -1)
    return (grads - rows * ((rows * grads).sum(1) / (rows * rows).sum(1))[:, None]).reshape(w.shape)


def replay(make, steps=10, dtype=torch.float64, shapes=SHAPES, seed=0, layout=None, **options):
    """Weights after `steps` gradients, every second one of a matrix orthogonal to its weight."""
    generator = rng(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
              for s in shapes]
    if layout:
        params = [nn.Parameter(p.data.to(memory_format=layout)) if p.ndim == 4 else p
                  for p in params]
    optimizer = make(params, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim > 1 and (i + step) % 2:
                g = orthogonal(p.detach().double(), g)
            p.grad = torch.empty_like(p).copy_(g)
        optimizer.step()
    return params, optimizer


def assert_same(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), **tolerance)


# ---------------------------------------------------------------- recorded trajectories

def golden_cases():
    for file in sorted(GOLDEN.glob("*.npz")):
        paths = ADAMP_PATHS if file.stem.startswith("adamp") else SGDP_PATHS
        for path in paths:
            yield pytest.param(file.name, path, id=f"{file.stem}-{path}")


@pytest.mark.parametrize("name, path", list(golden_cases()))
def test_recorded_trajectory(name, path):
    data = np.load(GOLDEN / name)
    is_adamp = str(data["optimizer"]) == "adamp"
    options = {key[3:]: data[key].tolist() for key in data.files if key.startswith("hp_")}
    names, kept = data["names"].tolist(), data["traj_steps"].tolist()
    exact = data[f"{names[0]}__w0"].dtype == np.float64
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 0, "atol": 2e-5}
    runs = [{}] if is_adamp else [{"project_buffer": True}, {"project_buffer": False}]
    for run in runs:
        params = [nn.Parameter(torch.from_numpy(data[f"{n}__w0"]).clone()) for n in names]
        optimizer = (AdamP if is_adamp else SGDP)(
            params, **options, **run, **(ADAMP_PATHS if is_adamp else SGDP_PATHS)[path])
        official = run.get("project_buffer", True)
        source = "official" if official else "timm"
        for step in range(1, 51):
            for n, p in zip(names, params):
                p.grad = torch.from_numpy(data[f"{n}__grads"][step - 1]).clone()
            optimizer.step()
            if official:
                for n, p in zip(names, params):
                    assert p.norm().item() == pytest.approx(
                        data[f"{n}__official_norm"][step].item(), rel=1e-11 if exact else 2e-5,
                        abs=1e-12)
                    if step in kept:
                        np.testing.assert_allclose(
                            p.detach().numpy(), data[f"{n}__official_traj"][kept.index(step)],
                            **tolerance)
        for n, p in zip(names, params):
            if not official:
                np.testing.assert_allclose(p.detach().numpy(), data[f"{n}__timm_final"],
                                           **tolerance)
            for key, value in optimizer.state[p].items():
                np.testing.assert_allclose(np.asarray(value), data[f"{n}__{source}_state_{key}"],
                                           **tolerance)


def test_the_two_buffers_differ_where_the_packages_do():
    data = np.load(GOLDEN / "sgdp_momentum.npz")
    gap = max(np.abs(data[f"{n}__timm_final"] - data[f"{n}__official_traj"][-1]).max()
              for n in data["names"])
    assert gap > 0.1


# ---------------------------------------------------------------- paths agree

@pytest.mark.parametrize("path", ["foreach", "fused", "capturable", "default", "as on CUDA"])
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.3, "lr": 0.02}, {"nesterov": True, "weight_decay": 0.1},
    {"maximize": True}, {"delta": 0.0}, {"delta": 3.0, "wd_ratio": 0.0, "weight_decay": 0.1},
    {"betas": (0.0, 0.0), "wd_ratio": 1.0}, {"lr": 0.0, "weight_decay": 0.1}, {"eps": 1e-3}],
    ids=str)
def test_adamp_paths_agree(path, options):
    expected, reference = replay(AdamP, **options, **ADAMP_PATHS["readable"])
    for layout in (None, torch.channels_last):
        actual, optimizer = replay(AdamP, layout=layout, **options, **ADAMP_PATHS[path])
        assert_same(actual, expected, rtol=1e-9, atol=1e-12)
        assert optimizer.stats == reference.stats


@pytest.mark.parametrize("path", ["foreach", "default", "as on CUDA"])
@pytest.mark.parametrize("project_buffer", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 1.0}, {"momentum": 0.9, "delta": 0},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "delta": 3.0, "weight_decay": 0.1}], ids=str)
def test_sgdp_paths_agree(path, project_buffer, options):
    options = {"lr": 0.05, "project_buffer": project_buffer} | options
    expected, reference = replay(SGDP, **options, **SGDP_PATHS["readable"])
    for layout in (None, torch.channels_last):
        fused = {"fused": True} if path == "as on CUDA" else {}
        actual, optimizer = replay(lambda params, **given: SGDP([{"params": params, **fused}],
                                                                **given),
                                   layout=layout, **options, **SGDP_PATHS[path])
        assert_same(actual, expected, rtol=1e-9, atol=1e-12)
        assert optimizer.stats == reference.stats
        assert_same([optimizer.state[p]["momentum"] for p in actual],
                    [reference.state[p]["momentum"] for p in expected], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options, alike, used", [
    ({"foreach": True, "fused": True}, True, True), ({"foreach": True}, True, False),
    ({"foreach": True, "fused": True}, False, False),
    ({"capturable": True, "fused": True}, True, False)])
def test_the_branch_free_path_takes_the_kernel_if_asked(monkeypatch, options, alike, used):
    kernel, calls = AdamP._kernel, []
    monkeypatch.setattr(AdamP, "_kernel",
                        lambda self, *rest: (calls.append(1), kernel(self, *rest)))
    w = nn.Parameter(torch.randn(4, 5, generator=rng()))
    w.grad = torch.ones(4, 5) if alike else torch.ones(5, 4).t()
    AdamP([w], **options).step()
    assert bool(calls) == used


@pytest.mark.parametrize("make, path", [(AdamP, {"fused": True}),
                                        (AdamP, {"fused": True, "nesterov": True}),
                                        (AdamP, {"fused": True, "nesterov": True,
                                                 "maximize": True}),
                                        (SGDP, {"lr": 0.1, "momentum": 0.9}),
                                        (SGDP, {"lr": 0.1, "momentum": 0.9, "nesterov": True})])
@pytest.mark.parametrize("view", ["channel", "layer"])
def test_blocks_smaller_than_the_tensor(monkeypatch, make, path, view):
    monkeypatch.setattr(adamp, "BLOCK", 30)
    results = []
    for options in (path, {**path, "foreach": False,
                           **({"fused": False} if make is AdamP else {})}):
        generator = rng(3)
        w = nn.Parameter(torch.randn(11, 9, generator=generator, dtype=torch.float64))
        optimizer = make([w], weight_decay=0.1, **options)
        for _ in range(6):
            g = torch.randn(11, 9, generator=generator, dtype=torch.float64)
            w.grad = orthogonal(w.detach() if view == "channel" else w.detach()[None],
                                g if view == "channel" else g[None]).view(11, 9)
            optimizer.step()
            assert optimizer.stats[view] == 1
        results.append(w)
    assert_same(results[:1], results[1:], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("make, options, most", [(AdamP, {"lr": 0.0}, 1),
                                                 (AdamP, {"lr": 0.0, "nesterov": True}, 2),
                                                 (SGDP, {"lr": 0.0, "momentum": 0.9}, 1)])
@pytest.mark.parametrize("view", ["channel", "layer", None])
def test_extra_memory_is_at_most_the_largest_tensor(make, options, most, view):
    w = nn.Parameter(torch.randn(512, 1200, generator=rng()))
    g = torch.randn(512, 1200, generator=rng(1)) + (w.detach() if view is None else 0)
    w.grad = {"channel": lambda: orthogonal(w.detach(), g), None: lambda: g,
              "layer": lambda: orthogonal(w.detach()[None], g[None])[0]}[view]()
    optimizer = make([w], **options)
    optimizer.step()
    limit = most * 4 * w.numel() + 100_000
    assert timing.peak_bytes(optimizer.step, torch.device("cpu")) <= limit
    assert optimizer.stats["projected"] == (view is not None) == optimizer.stats.get(view, 0)


def test_unusual_memory_layouts():
    for make, path in itertools.chain(((AdamP, p) for p in ADAMP_PATHS.values()),
                                      ((SGDP, {"lr": 0.1, **p}) for p in SGDP_PATHS.values())):
        generator = rng(1)
        base = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        grad = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        plain = nn.Parameter(base.clone())
        odd = nn.Parameter(base.T.contiguous().T)                 # transposed storage
        strided = nn.Parameter(torch.stack([base, base], -1)[..., 0])
        optimizer = make([plain, odd, strided], **path)
        for p in (plain, odd, strided):          # the gradient's layout is not the parameter's
            p.grad = grad.clone()
        optimizer.step()
        assert_same([odd, strided], [plain, plain], rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- identities

@pytest.mark.parametrize("path", ADAMP_PATHS)
def test_delta_zero_is_adamw(path):
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    expected, _ = replay(torch.optim.AdamW, foreach=False, **options)
    actual, optimizer = replay(AdamP, delta=0, **options, **ADAMP_PATHS[path])
    assert_same(actual, expected, rtol=1e-11, atol=1e-12)
    assert optimizer.stats == {"tested": 5, "channel": 0, "layer": 0, "projected": 0}


def test_delta_zero_is_sgd():
    for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        expected, _ = replay(torch.optim.SGD, lr=0.1, **options)
        actual, _ = replay(SGDP, lr=0.1, delta=0, **options)
        assert_same(actual, expected, rtol=1e-11, atol=1e-12)


def test_decoupled_decay_of_sgdp_settles_like_coupled_decay():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGDP([w], lr=0.1, momentum=0.9, weight_decay=0.01)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(w.detach(),
                               torch.full((3,), 1 - 0.1 * 0.01 / 0.1, dtype=torch.float64))


def test_norm_after_projected_steps_grows_by_pythagoras():
    w = nn.Parameter(torch.randn(5, 8, generator=rng(), dtype=torch.float64))
    optimizer = SGDP([w], lr=0.1, momentum=0.9, eps=0)
    for step in range(20):
        before = w.detach().clone()
        w.grad = orthogonal(before, torch.randn(5, 8, generator=rng(step), dtype=torch.float64))
        optimizer.step()
        move = w.detach() - before
        torch.testing.assert_close((w.detach() ** 2).sum(1),
                                   (before ** 2).sum(1) + (move ** 2).sum(1), rtol=1e-12, atol=0)
        plane = torch.stack([before[0], optimizer.state[w]["momentum"][0], w.detach()[0]])
        assert torch.linalg.svdvals(plane)[-1] < 1e-12        # Proposition 3.1: one great circle


def test_gradient_of_a_scale_invariant_function_passes_the_test():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    x, weight = torch.randn(8, 3, 6, 6, generator=rng()), torch.randn(4, 1, 1, generator=rng(1))
    (norm(conv(x)).tanh() * weight).square().sum().backward()
    assert adamp.scale_invariance(conv.weight, conv.weight.grad) == "channel"
    assert adamp.scale_invariance(norm.weight, norm.weight.grad) is None


def test_projection_views_and_purity():
    generator = rng(2)
    w, u = (torch.randn(4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    g = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    by_channel, by_layer, along = orthogonal(w, g), orthogonal(w[None], g[None])[0], g + 5 * w
    copies = [x.clone() for x in (w, u, by_channel)]
    result, factor = adamp.projection(w, by_channel, u, 0.1, 0.3, 1e-8)
    assert factor == 0.3 and result is not u
    torch.testing.assert_close(result, orthogonal(w, u), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip((w, u, by_channel), copies))
    result, factor = adamp.projection(w, by_layer, u, 0.1, 0.3, 1e-8)
    assert adamp.scale_invariance(w, by_layer) == "layer" and factor == 0.3
    torch.testing.assert_close(result, orthogonal(w[None], u[None])[0], rtol=1e-6, atol=1e-7)
    assert adamp.projection(w, along, u, 0.1, 0.3, 1e-8) == (u, 1)


def test_threshold_uses_the_row_length_and_is_strict():
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    cosine = 0.6
    g = torch.tensor([[cosine, 0.8], [1.0, 0.0]], dtype=torch.float64)
    border = cosine * math.sqrt(2)
    for delta, expected in ((border + 1e-9, "channel"), (border - 1e-9, None)):
        g_layer = g.clone()                      # the second row spoils the layer view
        g_layer[1] = torch.tensor([0.0, 10.0]) if expected is None else g[1]
        assert adamp.scale_invariance(w, g_layer, delta) == expected
    assert adamp.scale_invariance(w, w.flip(1), 0.0) is None                 # 0 < 0 is false


def test_small_weights_add_eps_in_the_projection_only():
    w, g, u = torch.tensor([[[1e-7, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]], dtype=torch.float64)
    result, _ = adamp.projection(w, g, u, 0.1, 0.1, 1e-8)
    assert result[0, 0].item() == pytest.approx(1 - (1e-7 / 1.1e-7) ** 2, rel=1e-9)


def test_vectors_scalars_and_empty_tensors_never_hit():
    for shape in ((4,), (), (0, 3)):
        x = torch.zeros(shape)
        assert adamp.scale_invariance(x, x) is None
        assert adamp.projection(x, x, x, 0.1, 0.1, 1e-8) == (x, 1)


def test_zero_weight_or_gradient_counts_as_a_hit():
    for path in ADAMP_PATHS.values():
        w = nn.Parameter(torch.zeros(3, 4))
        optimizer = AdamP([w], lr=0.1, **path)
        w.grad = torch.ones(3, 4)
        optimizer.step()
        assert optimizer.stats["channel"] == 1
        torch.testing.assert_close(w.detach(), torch.full((3, 4), -0.1))


def test_effective_step():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert adamp.effective_step(a, b) == pytest.approx(math.sqrt(2))
    assert adamp.effective_step(a, 7 * a) == 0
    assert math.isnan(adamp.effective_step(a, 0 * a))
    with pytest.raises(ValueError, match=r"one shape.*\(1, 2\).*\(2,\)"):
        adamp.effective_step(a, b[0])


@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_tensors_of_several_shapes_are_an_error(shape):
    p, other = torch.ones(shape), torch.ones(3, 1)
    for call in (lambda: adamp.projection(p, p, other, 0.1, 0.1, 1e-8),
                 lambda: adamp.projection(p, other, p, 0.1, 0.1, 1e-8),
                 lambda: adamp.scale_invariance(p, other)):
        with pytest.raises(ValueError, match=r"p and (perturb|grad) .*one shape.*\(3, 1\)"):
            call()


# ---------------------------------------------------------------- groups, closures, dtypes, state

@pytest.mark.parametrize("path", ["readable", "foreach", "default"])
def test_scale_invariant_override_and_per_group_options(path):
    generator = rng(4)
    start = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    grad = orthogonal(start, torch.randn(5, 6, generator=generator, dtype=torch.float64))
    spoiled = grad + start
    for make, options in ((AdamP, ADAMP_PATHS[path]), (SGDP, {"lr": 0.1, **SGDP_PATHS[path]})):
        always, never, tested, off = (nn.Parameter(start.clone()) for _ in range(4))
        optimizer = make([{"params": [always], "scale_invariant": True},
                          {"params": [never], "scale_invariant": False},
                          {"params": [tested]}, {"params": [off], "delta": 0.0}], **options)
        for p, g in ((always, spoiled), (never, grad), (tested, grad), (off, grad)):
            p.grad = g.clone()
        optimizer.step()
        assert optimizer.stats == {"tested": 4, "channel": 2, "layer": 0, "projected": 2}
        assert torch.equal(never, off)
        radial = ((always.detach() - start) * start).sum(1)
        assert radial.abs().max() < 1e-7
    with pytest.raises(ValueError, match="scale_invariant.*'yes'"):
        AdamP([{"params": [nn.Parameter(start)], "scale_invariant": "yes"}])


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    w = nn.Parameter(torch.ones(2, 2))
    for optimizer in (AdamP([w]), SGDP([w], 0.1)):
        def closure():
            optimizer.zero_grad()
            loss = (w ** 2).sum()
            loss.backward()
            return loss
        with torch.no_grad():
            before = (w ** 2).sum().item()
            assert optimizer.step(closure).item() == pytest.approx(before)
        assert optimizer.step() is None
        assert not w.grad.requires_grad and w.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ADAMP_PATHS)
def test_half_precision_keeps_float32_state(dtype, path):
    w = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    optimizer = AdamP([w], lr=0.01, **ADAMP_PATHS[path])
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w, torch.ones_like(w))
    w.grad = torch.full_like(w, 1e-4)
    optimizer.step()
    assert optimizer.state[w]["exp_avg_sq"].dtype == torch.float32 and w.dtype == dtype
    again = AdamP([w], lr=0.01, **ADAMP_PATHS[path])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state[w]["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(again.state[w]["exp_avg_sq"], optimizer.state[w]["exp_avg_sq"])
    again.step()
    assert torch.isfinite(w).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_of_loading_have_the_last_word(dtype):
    names = {"a": 0, "b": 1}
    first, second = (nn.Parameter(torch.full((2, 3), x, dtype=dtype)) for x in (1.0, 2.0))
    saved = AdamP([first, second])
    first.grad, second.grad = torch.full_like(first, 3), torch.full_like(second, 5)
    saved.step()

    def by_name(_, state):                                   # as torch's documentation does it
        groups = [{**state["param_groups"][0], "params": [names["b"], names["a"]]}]
        return {"state": state["state"], "param_groups": groups}

    loaded = AdamP([second, first])
    loaded.register_load_state_dict_pre_hook(by_name)
    loaded.register_load_state_dict_post_hook(
        lambda optimizer: optimizer.state[first]["exp_avg"].zero_())
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert torch.equal(loaded.state[second]["exp_avg"], saved.state[second]["exp_avg"])
    assert not loaded.state[first]["exp_avg"].any() and saved.state[first]["exp_avg"].all()
    assert len(loaded._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("make, path", [*((AdamP, path) for path in ADAMP_PATHS.values()),
                                        *((SGDP, {"lr": 0.1, "momentum": 0.9, **path})
                                          for path in SGDP_PATHS.values())])
def test_the_dtype_may_change_after_some_steps(make, path):
    for start, end in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        results = []
        for options in (path, path | {"foreach": False} | ({"fused": False} if make is AdamP
                                                           else {})):
            params, optimizer = replay(make, 3, start, **options)
            for i, p in enumerate(params):
                p.grad = None
                p.data = p.data.to(end)                      # model.double(), or model.float()
                g = torch.randn(p.shape, generator=rng(i)).to(end)
                p.grad = orthogonal(p.detach(), g) if p.ndim > 1 and i % 2 else g
            optimizer.step()
            results.append(params)
        assert_same(*results, rtol=1e-5, atol=1e-6)


def test_half_precision_follows_float32():
    for make, options in ((AdamP, {"lr": 0.01}), (SGDP, {"lr": 0.01, "momentum": 0.9})):
        exact, _ = replay(make, dtype=torch.float32, **options)
        for extra in ({}, {"foreach": False}):
            half, _ = replay(make, dtype=torch.bfloat16, **options, **extra)
            assert_same([p.float() for p in half], exact, rtol=0.05, atol=0.05)


def test_mixed_dtypes_in_one_group():
    params = [nn.Parameter(torch.ones(2, 3, dtype=d))
              for d in (torch.float32, torch.float64, torch.bfloat16)]
    for options in ADAMP_PATHS.values():
        optimizer = AdamP(params, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.stats["tested"] == 3


def test_parameters_without_gradient_and_empty_ones_are_skipped():
    lazy, empty, used = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (0, 3), (2, 2)))
    empty.grad, used.grad = torch.ones(0, 3), torch.ones(2, 2)
    for optimizer in (AdamP([lazy, empty, used]), SGDP([lazy, empty, used], 0.1)):
        optimizer.step()
        assert optimizer.stats["tested"] == 1
        assert torch.equal(lazy, torch.ones(2, 2)) and len(optimizer.state) == 1


@pytest.mark.parametrize("make, options", [(AdamP, {"lr": 0.01, "capturable": True}),
                                           (SGDP, {"lr": 0.01, "foreach": True})])
def test_gradients_that_come_and_go_keep_few_layouts(monkeypatch, make, options):
    monkeypatch.setattr(adamp, "LAYOUTS", 3)
    generator, results = rng(), []
    grads = torch.randn(30, 3, 4, generator=generator).double()
    present = torch.rand(30, 6, generator=generator) < 0.5
    for path in (options, {"lr": 0.01, "foreach": False}):
        params = [nn.Parameter(torch.ones(3, 4).double() + i) for i in range(6)]
        big = nn.Parameter(torch.ones(99).double())  # no bucket is larger than the largest
        optimizer = make([*params, big], **path)
        big.grad = torch.ones_like(big)
        for grad, there in zip(grads, present.tolist()):
            for p, some in zip(params, there):
                p.grad = grad if some else None
            optimizer.step()
        assert len(optimizer._rows) <= 3
        results.append(params)
    assert_same(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", ADAMP_PATHS)
def test_a_default_dtype_of_16_bits_still_counts_steps(path):
    params, optimizer = replay(AdamP, **ADAMP_PATHS[path])
    expected, counted = replay(AdamP, foreach=False)
    torch.set_default_dtype(torch.bfloat16)              # which has no 257
    try:
        for state in (*optimizer.state.values(), *counted.state.values()):
            state["step"] = 256
        for _ in range(3):
            for p, q in zip(params, expected):
                p.grad = q.grad = torch.ones_like(p)
            optimizer.step()
            counted.step()
        new = AdamP(twins := [nn.Parameter(p.detach().clone()) for p in params],
                    **ADAMP_PATHS[path])
        for p in twins:
            p.grad = torch.ones_like(p)
        new.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(params, expected, rtol=1e-9, atol=1e-12)
    assert {float(state["step"]) for state in optimizer.state.values()} == {259}
    if path == "capturable":
        assert all(state["step"].dtype == torch.float32 for state in new.state.values())


@pytest.mark.parametrize("make, options, keys", [
    (AdamP, {"lr": 0.01, "weight_decay": 0.1},
     ("lr", "betas", "eps", "weight_decay", "delta", "wd_ratio", "nesterov")),
    (SGDP, {"lr": 0.01, "momentum": 0.9},
     ("lr", "momentum", "dampening", "weight_decay", "nesterov", "eps", "delta", "wd_ratio"))])
def test_official_state_dict_loads_and_continues(make, options, keys):
    params, optimizer = replay(make, **options)
    state = copy.deepcopy(optimizer.state_dict())
    assert tuple(state["param_groups"][0])[:len(keys)] == keys
    for group in state["param_groups"]:                     # what the official package saves
        for key in set(group) - set(keys) - {"params"}:
            del group[key]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = make(twins, lr=0.5)
    loaded.load_state_dict(state)
    for p, q in zip(params, twins):
        p.grad = q.grad = torch.randn(p.shape, generator=rng(), dtype=p.dtype)
    optimizer.step()
    loaded.step()
    for p, q in zip(params, twins):
        assert torch.equal(p, q)


def test_step_may_be_a_tensor_and_capturable_may_change():
    params, optimizer = replay(AdamP, capturable=True)
    assert isinstance(optimizer.state[params[0]]["step"], torch.Tensor)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    plain = AdamP(twins)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["capturable"] = False
    plain.load_state_dict(state)
    for p, q in zip(params, twins):
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    plain.step()
    assert plain.state[twins[0]]["step"] == 11
    assert_same(twins, params, rtol=1e-9, atol=1e-12)


def test_deepcopy_and_tensor_learning_rate():
    params, optimizer = replay(AdamP, lr=torch.tensor(0.01, dtype=torch.float64))
    expected, _ = replay(AdamP, lr=0.01)
    assert_same(params, expected, rtol=1e-9, atol=1e-12)
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    twin.step()
    assert twin.stats["tested"] == 5


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("make, options", [*((AdamP, o) for o in ADAMP_PATHS.values()),
                                           *((SGDP, o) for o in SGDP_PATHS.values())])
def test_the_rate_may_be_a_tensor_and_betas_any_number(make, options, shape):
    options, other = {"weight_decay": 0.1} | options, {}
    if make is AdamP:
        options |= {"betas": (0.5, 0.75)}
        other = {"betas": (np.float16(0.5), torch.tensor(0.75))}
    lr = torch.full(shape, 0.01)
    expected, _ = replay(make, lr=lr.item(), **options)
    for rate in (lr, np.float32(0.01)):
        actual, _ = replay(make, lr=rate, **options | other)
        assert_same(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("path", ADAMP_PATHS)
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_backward_through_weights_of_before_a_step_fails(path, shape):
    w = nn.Parameter(torch.ones(shape))
    loss = (w ** 2).sum()
    loss.backward(retain_graph=True)
    AdamP([w], **ADAMP_PATHS[path]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


NEW_COMPILER = torch.__version__ >= (2, 13)          # that of 2.4 breaks the graph, at `sorted`


@pytest.mark.parametrize("make, options", [
    (AdamP, {"capturable": True}), (AdamP, {"lr": torch.tensor(0.01)}),
    (SGDP, {"lr": torch.tensor(0.01), "momentum": 0.9})][:3 if NEW_COMPILER else 1])
def test_compiled_step_gives_the_same_numbers(make, options):
    results = []
    for compiled in (False, True):
        params = [nn.Parameter(torch.randn(shape, generator=rng(), dtype=torch.float64))
                  for shape in ((4, 5), (3, 2, 2), (6,))]
        optimizer = make(params, **{"lr": 0.01, "weight_decay": 0.1} | options)
        step = optimizer.step
        if compiled:
            step = torch.compile(step, backend="eager", fullgraph=NEW_COMPILER)
        for seed in range(3):
            for w in params:
                g = torch.randn(w.shape, generator=rng(seed), dtype=torch.float64)
                w.grad = orthogonal(w.detach(), g) if w.ndim > 1 else g
            step()
        assert optimizer.stats["channel"] == 2
        results.append(params)
    assert_same(*results, rtol=1e-12, atol=1e-14)


def test_nan_gradients_give_nan_weights():
    for path in ADAMP_PATHS.values():
        w = nn.Parameter(torch.ones(2, 3))
        w.grad = torch.full((2, 3), float("nan"))
        optimizer = AdamP([w], **path)
        optimizer.step()
        assert w.isnan().all() and optimizer.stats["projected"] == 0


def sharded_steps(rank, folder):
    from torch.distributed.tensor import Shard, distribute_tensor
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous",
                                         rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for make, options in ((AdamP, {}), (SGDP, {"momentum": 0.9, "project_buffer": True})):
        generator = rng()
        whole = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
                 for shape in ((1, 8), (3, 5), (4, 2, 3), (1,), (5,))]     # one channel, two ranks
        shards = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)]))
                  for p in whole]
        optimizers = [make(params, lr=0.1, weight_decay=0.1, **options)
                      for params in (whole, shards)]
        for step in range(4):
            for i, (p, shard) in enumerate(zip(whole, shards)):
                g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.grad = orthogonal(p.detach(), g) if p.ndim > 1 and (i + step) % 2 else g
                shard.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
            assert optimizers[0].stats == optimizers[1].stats and optimizers[0].stats["channel"]
        assert_same([p.full_tensor() for p in shards], whole, rtol=1e-9, atol=1e-12)
    torch.distributed.destroy_process_group()
    os._exit(0)                  # gloo's threads can abort the interpreter's end: see the harness


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="DTensor was not public yet")
def test_a_rank_without_a_channel_steps_like_the_others(tmp_path):
    torch.multiprocessing.spawn(sharded_steps, (str(tmp_path),), nprocs=2)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("options, words", [
    ({"lr": -1}, "lr.*-1"), ({"lr": float("nan")}, "lr.*nan"), ({"eps": -1e-8}, "eps.*-1e-08"),
    ({"betas": (1.0, 0.9)}, r"betas.*1\.0"), ({"betas": (0.9, -0.1)}, r"betas.*-0\.1"),
    ({"betas": (0.9,)}, "betas.*two"), ({"betas": 0.9}, r"betas.*two.*0\.9"),
    ({"betas": (0.9, "x")}, "betas.*'x'"), ({"lr": torch.ones(2)}, "lr.*tensor"),
    ({"eps": None}, "eps.*None"), ({"delta": -1}, "delta.*-1"),
    ({"weight_decay": -0.1}, r"weight_decay.*-0\.1"),
    ({"wd_ratio": 1.5}, r"wd_ratio.*1\.5"), ({"wd_ratio": -0.5}, r"wd_ratio.*-0\.5")], ids=str)
def test_adamp_arguments_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        AdamP([nn.Parameter(torch.ones(2))], **options)
    optimizer = AdamP([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options, words", [
    ({"lr": -1}, "lr.*-1"), ({"eps": -1}, "eps.*-1"), ({"delta": -1}, "delta.*-1"),
    ({"wd_ratio": 2}, "wd_ratio.*2"), ({"weight_decay": -1}, "weight_decay.*-1"),
    ({"momentum": -0.1}, r"momentum.*-0\.1"), ({"momentum": "x"}, "momentum.*'x'"),
    ({"dampening": None}, "dampening.*None"), ({"dampening": math.nan}, "dampening.*nan"),
    ({"nesterov": True}, "nesterov.*momentum 0"),
    ({"momentum": 1, "weight_decay": 0.1}, "momentum.*below 1.*got 1"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, r"nesterov.*dampening 0\.1")], ids=str)
def test_sgdp_arguments_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        SGDP([nn.Parameter(torch.ones(2))], **({"lr": 0.1} | options))


def test_sparse_complex_and_flat_parameters():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    for optimizer in (AdamP(embedding.parameters()), SGDP(embedding.parameters(), 0.1)):
        with pytest.raises(RuntimeError, match=r"sparse gradients.*\(5, 3\)"):
            optimizer.step()
    with pytest.raises(ValueError, match="lr must be a number.*'0.1'"):
        AdamP([nn.Parameter(torch.ones(2))], lr="0.1")
    with pytest.raises(ValueError, match="real.*complex64"):
        AdamP([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    for mark in ("_is_flat_param", "_fsdp_flattened"):       # the second: of use_orig_params=True
        flat = nn.Parameter(torch.ones(8))
        before = AdamP([flat])
        setattr(flat, mark, True)
        with pytest.raises(ValueError, match="flat sharded"):
            SGDP([flat], 0.1)
        flat.grad = torch.ones(8)
        with pytest.raises(ValueError, match="flat sharded"):
            before.step()                                    # made before FSDP took the model


# ---------------------------------------------------------------- training loop

def tiny_problem():
    generator = rng(7)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    loader = [(torch.randn(8, 1, 6, 6, generator=generator),
               torch.randint(3, (8,), generator=generator))
              for _ in range(5)]
    return model, loader


@pytest.mark.parametrize("make", [lambda p: AdamP(p, 0.01), lambda p: SGDP(p, 0.1, momentum=0.9),
                                  lambda p: torch.optim.SGD(p, 0.1)])
def test_training_resumes_to_the_same_numbers(make, tmp_path):
    model, loader = tiny_problem()
    whole = list(adamp.train(model, loader, make(model.parameters()), epochs=3, measure_every=2))
    assert [v["step"] for v in whole] == list(range(15))
    assert "weight_norm" in whole[2] and "weight_norm" not in whole[1]
    other, loader = tiny_problem()
    steps = adamp.train(other, loader, make(other.parameters()), epochs=3, measure_every=2)
    first = [next(steps) for _ in range(7)]
    torch.save(steps.send("state"), tmp_path / "state.pt")
    snapshot = torch.load(tmp_path / "state.pt", weights_only=True)
    for _ in range(2):                                      # resuming leaves the snapshot as it is
        third, loader = tiny_problem()
        rest = list(adamp.train(third, loader, make(third.parameters()), epochs=3, measure_every=2,
                                resume=snapshot))
        assert first + rest == whole
        for p, q in zip(model.parameters(), third.parameters()):
            assert torch.equal(p, q)


def test_training_measures_the_projection():
    model, loader = tiny_problem()
    last = list(adamp.train(model, loader, AdamP(model.parameters(), 0.01), measure_every=1))[-1]
    assert last["projected"] >= 0.5 and last["effective_step"] > 0
    with pytest.raises(ValueError, match="measure_every.*0"):
        next(adamp.train(model, loader, AdamP(model.parameters()), measure_every=0))


def test_docstring_example():
    assert doctest.testmod(adamp).failed == 0


# ---------------------------------------------------------------- scripts

TINY = "--preset", "tiny", "--threads", "1"


@pytest.fixture
def script(run_script):
    """script(name, out, *arguments): the results of the smallest preset."""
    return lambda name, out, *arguments: run_script(name, out, *TINY, *arguments)


def test_the_toys_reproduce_the_theory(tmp_path, script):
    results = script("adamp_toy", tmp_path, "--seeds", 1, "--figures", tmp_path / "figures")
    assert all(claim["holds"] is not False for claim in results["claims"])
    assert len(list((tmp_path / "figures").iterdir())) == 4
    row = results["tables"]["plane"][0]
    assert (round(row["momentum: norm"], 3), row["momentum: steps"]) == (4.331, 94)
    assert (round(row["SGDP: norm"], 3), row["SGDP: steps"]) == (1.209, 22)
    assert (round(row["SGDP, official buffer: norm"], 3),
            row["SGDP, official buffer: steps"]) == (1.347, 36)


def test_the_study_with_attacks_resumes_after_a_kill(tmp_path, script, kill_script):
    arguments = ("--seeds", 1, "--attack", "linf")
    whole = script("adamp_imagenet", tmp_path / "whole", *arguments, "--figures",
                   tmp_path / "figures")
    row = whole["tables"]["main"][1]
    assert row["paper, attacked"] == 66.28 and 0 <= row["attacked"] <= row["top-1"] + 5
    assert len(list((tmp_path / "figures").iterdir())) == 2
    kill_script("adamp_imagenet", tmp_path / "part", "adamp-seed0-*.pt", *TINY, *arguments,
                "--checkpoint-seconds", "0")
    assert script("adamp_imagenet", tmp_path / "part", *arguments,
                  "--resume")["results"] == whole["results"]


def test_the_language_model_learns_and_is_projected(tmp_path, script):
    results = script("adamp_language", tmp_path, "--seeds", 1)
    rows = {row["optimiser"] + row["weight normalisation"]: row
            for row in results["tables"]["main"]}
    assert rows["adampyes"]["projected"] > 0.3 > rows["adampno"]["projected"]
    assert rows["adampyes"]["norm end"] < rows["adamwyes"]["norm end"]


def test_speed_script(tmp_path, script):
    results = script("speed_adamp", tmp_path)
    names = {row["optimiser"] for row in results["tables"]["AdamP"]}
    assert names >= {"AdamW fused", "AdamP", "AdamP foreach"}


@pytest.mark.parametrize("name, arguments, message", [
    ("adamp_imagenet", ["--epochs", 0], "--epochs: must be at least 1, not 0"),
    ("adamp_imagenet", ["--amp", "fp16"], "use bf16"),
    ("adamp_imagenet", ["--preset", "small"], "--preset small needs --data"),
    ("adamp_imagenet", ["--arch", "resnet18", "--width", 8], "only of stem3 and stem7")])
def test_what_a_script_cannot_do_is_one_line(run_script, tmp_path, capsys, name, arguments,
                                             message):
    with pytest.raises(SystemExit, match="2"):
        run_script(name, tmp_path / "out", "--device", "cpu", *arguments)
    assert capsys.readouterr().err.strip().endswith(message)


# ---------------------------------------------------------------- GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("make", [lambda p: AdamP(p, 0.01, weight_decay=0.1),
                                  lambda p: AdamP(p, 0.01, weight_decay=0.1, foreach=True),
                                  lambda p: SGDP(p, 0.01, momentum=0.9, weight_decay=0.1)])
def test_no_synchronisation_in_a_step(make):
    params = [nn.Parameter(torch.randn(s, device="cuda")) for s in SHAPES]
    optimizer = make(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.stats["tested"] == 5


@needs_gpu
def test_gpu_equals_cpu_and_a_graph_equals_both():
    results = []
    for device, capture in (("cpu", False), ("cuda", False), ("cuda", True)):
        params = [nn.Parameter(torch.randn(s, generator=rng(1), dtype=torch.float64).to(device))
                  for s in SHAPES]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = AdamP(params, 0.01, capturable=capture)
        for _ in range(3):
            optimizer.step()
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            graph.replay()
        else:
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    assert_same(results[1], results[0], rtol=1e-9, atol=1e-12)
    assert_same(results[2], results[0], rtol=1e-9, atol=1e-12)
