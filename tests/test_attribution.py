from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from reference import attribution as at
from reference.attribution import PixelAP

GOLDEN = Path(__file__).parent / "golden" / "calm"
NETS = ("baselines_gap.npz", "baselines_mlp.npz")


def load(name):
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    def __init__(self, g):
        super().__init__()
        self.conv1 = nn.Conv2d(3, g["w.conv1.weight"].shape[0], 3, padding=1)
        self.conv2 = nn.Conv2d(g["w.conv2.weight"].shape[1], g["w.conv2.weight"].shape[0], 3,
                               stride=2, padding=1)
        self.relu = nn.ReLU()
        if not g["gap_fc"]:
            self.mid = nn.Linear(*reversed(g["w.mid.weight"].shape))
        self.fc = nn.Linear(*reversed(g["w.fc.weight"].shape))
        weights = {key[2:]: torch.from_numpy(g[key]) for key in g if key.startswith("w.")}
        self.load_state_dict(weights)

    def forward(self, x):
        x = self.relu(self.conv2(self.conv1(x).relu())).mean((2, 3))
        return self.fc(self.mid(x).tanh() if hasattr(self, "mid") else x)


@pytest.fixture(params=NETS)
def case(request):
    g = load(request.param)
    return g, Net(g).eval(), torch.from_numpy(g["images"]), torch.from_numpy(g["labels"])


def close(a, b, rtol=1e-4, atol=1e-6):
    np.testing.assert_allclose(a.detach().numpy(), b, rtol=rtol, atol=atol)


def scaled(maps):
    """As the grad-cam package does it."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def test_cam_family_equals_the_packages(case):
    g, net, images, labels = case
    close(net(images), g["logits"])
    layer = net.relu
    close(at.grad_cam(net, layer, images, labels, relu=True), g["pgcraw_GradCAM"].clip(0))
    close(at.grad_cam(net, layer, images, labels), g["captum_LayerGradCam"][:, 0])
    close(at.grad_cam(net, layer, images, labels, relu=True), g["torchcam_GradCAM"].clip(0))
    scale = np.abs(g["pgcraw_GradCAMPlusPlus"]).max()
    close(at.grad_cam_pp(net, layer, images, labels, eps=1e-6), g["pgcraw_GradCAMPlusPlus"], 1e-3,
          1e-5 * scale)
    close(at.xgrad_cam(net, layer, images, labels), g["pgcraw_XGradCAM"], 1e-4, 1e-5)
    close(at.layer_cam(net, layer, images, labels), g["pgcraw_LayerCAM"])
    close(at.hires_cam(net, layer, images, labels), g["pgcraw_HiResCAM"])
    if g["gap_fc"]:
        close(100 * at.grad_cam(net, layer, images, labels), g["cam_raw"], 1e-3, 1e-5)
    for function, key in ((at.score_cam, "pgc_ScoreCAM"), (at.ablation_cam, "pgc_AblationCAM")):
        maps = function(net, layer, images, labels, relu=True)
        close(scaled(at.resize_map(scaled(maps), images.shape[-1])), g[key], 1e-3, 2e-3)
        assert torch.allclose(function(net, layer, images, labels, chunk=5),
                              function(net, layer, images, labels), atol=1e-6)


def test_gradients_equal_the_official_code_and_captum(case):
    g, net, images, labels = case
    close(at.input_gradient(net, images, labels), g["off_gradient"])
    close(at.input_gradient(net, images, labels, signed=True), g["captum_Saliency_signed"])
    noise, samples = torch.from_numpy(g["noise"]), int(g["n_iter"])
    options = {"samples": samples, "sigma_divisor": float(g["sigma_divisor"]), "noise": noise}
    for function, key in ((at.smooth_grad, "off_smooth_grad"), (at.var_grad, "off_var_grad"),
                          (at.smooth_grad_squared, "off_smooth_grad_square")):
        for chunk in (None, 3):
            maps = function(net, images, labels, chunk=chunk, **options)
            close(maps, g[key], 1e-3, 1e-6 * (1 + np.abs(g[key]).max()))
    maps = at.integrated_gradients(net, images, labels, steps=samples, variant="calm")
    close(maps, g["off_integrated"], 1e-4, 1e-6)
    steps = int(g["ig_n_steps"])
    for method in at.QUADRATURES:
        maps = at.integrated_gradients(net, images, labels, steps=steps, method=method, chunk=5)
        close(maps, g[f"captum_IG_{method}"], 1e-3, 1e-5)
    whole = at.integrated_gradients(net, images, labels, steps=16)
    close(whole.sum((1, 2, 3)), g["completeness_rhs"], 1e-2, 1e-3)


def test_several_targets_in_one_forward_and_no_traces(case):
    g, net, images, labels = case
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    classes = torch.stack([labels, (labels + 1) % g["logits"].shape[1]], 1)
    for function in (at.grad_cam, at.grad_cam_pp, at.xgrad_cam, at.layer_cam, at.hires_cam,
                     at.score_cam, at.ablation_cam):
        calls.clear()
        both = function(net, net.relu, images, classes)
        assert both.shape == (len(images), 2, *g["features"].shape[2:])
        assert len(calls) == 1 or function in (at.score_cam, at.ablation_cam)
        assert torch.allclose(both[:, 1], function(net, net.relu, images, classes[:, 1]), rtol=1e-4,
                              atol=1e-6)
        assert torch.allclose(function(net, net.relu, images, 2),
                              function(net, net.relu, images, torch.full_like(labels, 2)))
    with torch.no_grad():
        at.grad_cam(net, net.relu, images, labels)
        at.smooth_grad(net, images, labels, samples=2, generator=torch.Generator().manual_seed(0))
    assert all(p.grad is None for p in net.parameters())
    assert not net.relu._forward_hooks
    assert "forward" not in vars(net.relu)
    assert not images.requires_grad
    first, second = (at.smooth_grad(net, images, labels, samples=3,
                                    generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_explained(case):
    g, net, images, labels = case
    with torch.enable_grad():
        x = images.clone().requires_grad_()
        for output, score in (("log_prob", net(x).log_softmax(1)), ("prob", net(x).softmax(1))):
            expected = torch.autograd.grad(score.gather(1, labels[:, None]).sum(), x)[0]
            gradient = at.input_gradient(net, images, labels, output=output, signed=True)
            assert torch.allclose(gradient, expected, atol=1e-7)

    class Wrapped(nn.Module):
        def forward(self, x):
            return SimpleNamespace(pooled=lambda: net(x), probs=lambda: net(x).softmax(1))

    assert torch.allclose(at.input_gradient(Wrapped(), images, labels),
                          at.input_gradient(net, images, labels))
    with pytest.raises(ValueError, match="log_probs"):
        at.input_gradient(Wrapped(), images, labels, output="log_prob")


def test_a_layer_before_an_in_place_relu_and_frozen_parameters(case):
    g, net, images, labels = case

    class InPlace(nn.Module):
        def forward(self, x):
            x = net.conv2(net.conv1(x).relu())
            return net.fc(x.relu_().mean((2, 3)))

    class Apart(InPlace):
        def forward(self, x):
            return net.fc(net.conv2(net.conv1(x).relu()).relu().mean((2, 3)))

    if hasattr(net, "mid"):
        return
    net.requires_grad_(False)
    for function in (at.hires_cam, at.ablation_cam):
        assert torch.allclose(function(InPlace(), net.conv2, images, labels),
                              function(Apart(), net.conv2, images, labels))
    assert (at.hires_cam(InPlace(), net.conv2, images, labels) < 0).any()  # A from before the ReLU


class Shared(nn.Module):
    """One ReLU in place in many parts, and a path round the layer."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), self.relu)
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), self.relu)
        self.side, self.top = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 3, 1)
        for n, p in enumerate(self.parameters()):
            nn.init.normal_(p, generator=seeded(n))

    def forward(self, x):
        y = self.relu(self.a(x) - 0.1)
        features = torch.cat([self.b(y), y * self.relu(self.side(x))], 1)
        return self.relu(self.top(features)).mean((2, 3))


def test_ablation_runs_only_what_lies_above_the_layer():
    net = Shared().double()
    images = torch.randn(2, 3, 6, 6, generator=seeded(), dtype=torch.float64)
    for layer in (net.a, net.a[0], net.b, net.b[0], net.top):
        seen, calls, k = [], [], None

        def without(module, inputs, result):
            seen[:] = [result.clone()]
            if k is not None:
                result[:, k] = 0

        with torch.no_grad():
            handle = layer.register_forward_hook(without)
            whole = net(images)[:, 1]
            a, expected = seen[0], 0
            for k in range(a.shape[1]):
                drop = (whole - net(images)[:, 1]) / whole
                expected = expected + drop[:, None, None] * a[:, k]
            handle.remove()
        handle = net.a[0].register_forward_pre_hook(lambda *_: calls.append(1))
        assert torch.allclose(at.ablation_cam(net, layer, images, 1, chunk=3), expected)
        handle.remove()
        assert len(calls) == 1 or layer is net.a[0]
        assert not any("forward" in vars(m) or m._forward_hooks for m in net.modules())


def test_dead_channels_cost_no_pass(case):
    g, net, images, labels = case
    with torch.no_grad():
        for parameter in net.conv2.parameters():
            parameter[::2] = 0
    passes = []
    net.relu.register_forward_pre_hook(lambda _, x: passes.append(len(x[0])))
    for function, extra in ((at.ablation_cam, 1), (at.score_cam, 2)):
        passes.clear()
        maps = function(net, net.relu, images, labels)
        assert sum(passes) <= (net.conv2.out_channels // 2 + extra) * len(images)
    a = net.relu(net.conv2(net.conv1(images).relu()))
    masks = nn.functional.interpolate(a, images.shape[2:], mode="bilinear", align_corners=True)
    masks = at.normalize_map(masks, "minmax").unsqueeze(2)
    scores = torch.stack([net(images * masks[:, k]) for k in range(a.shape[1])], 1)
    weights = scores.softmax(1)[torch.arange(len(a)), :, labels]
    assert torch.allclose(maps, torch.einsum("bk,bkhw->bhw", weights, a), rtol=1e-3, atol=1e-5)


def test_a_dead_layer_or_score_gives_maps_of_zeros():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    passes, images = [], torch.rand(2, 3, 6, 6, generator=seeded())
    net.register_forward_pre_hook(lambda _, x: passes.append(len(x[0])))
    for bias in (-9.0, 0.0):
        nn.init.zeros_(net[0].weight), nn.init.constant_(net[0].bias, bias)
        for function in (at.score_cam, at.ablation_cam, at.grad_cam_pp):
            assert not function(net, net[1], images, 0).any()
    nn.init.uniform_(net[0].weight, generator=seeded())
    net.append(nn.Linear(4, 2))
    nn.init.zeros_(net[-1].weight), nn.init.zeros_(net[-1].bias)
    assert not at.ablation_cam(net, net[1], images, 0).any()
    assert min(passes) > 0                                    # many networks refuse no images


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e-25), (torch.float16, 1e-3)])
def test_grad_cam_pp_with_gradients_whose_square_underflows(case, dtype, scale):
    g, net, images, labels = case
    with torch.no_grad():
        net.fc.weight.mul_(scale)
    maps = at.grad_cam_pp(net.to(dtype), net.relu, images.to(dtype), labels)
    assert maps.isfinite().all() and maps.any()


def test_score_cam_makes_the_masks_of_one_image_at_a_time(case, monkeypatch):
    g, net, images, labels = case
    expected, sizes = at.score_cam(net, net.relu, images, labels), []
    enlarge = nn.functional.interpolate
    monkeypatch.setattr(nn.functional, "interpolate", lambda maps, *args, **kwargs: (
        sizes.append(maps.shape[0] * maps.shape[1]), enlarge(maps, *args, **kwargs))[1])
    close(at.score_cam(net, net.relu, images, labels, chunk=3), expected)
    assert sizes == [net.conv2.out_channels] * len(images)


def test_half_precision_adds_up_in_float32():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for n, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, generator=seeded(n))
    images = torch.randn(2, 3, 16, 16, generator=seeded()).bfloat16()
    noise = torch.randn(300, 2, 3, 16, 16, generator=seeded(1)).bfloat16()
    half = at.var_grad(net.bfloat16(), images, 1, samples=300, noise=noise)
    expected = at.var_grad(net.float(), images.float(), 1, samples=300, noise=noise.float())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.05 * expected.max()


def test_inside_inference_mode(case):
    g, net, images, labels = case
    for function in (at.grad_cam, at.grad_cam_pp, at.score_cam, at.ablation_cam):
        expected = function(net, net.relu, images, labels)
        with torch.inference_mode():
            assert torch.equal(function(net, net.relu, images, labels), expected)
            assert torch.equal(function(net, net.relu, images + 0, labels + 0), expected)
    for function in (at.input_gradient, at.integrated_gradients):
        expected = function(net, images, labels)
        assert not function(net, images.clone().requires_grad_(), labels).requires_grad
        with torch.inference_mode():
            assert torch.equal(function(net, images + 0, labels + 0), expected)


@pytest.mark.parametrize("name", ["pxap_even.npz", "pxap_even_coarse_edges.npz", "pxap_log.npz"])
def test_pixel_ap_of_the_released_code(name):
    g = load(name)
    kind, interval = str(g["threshold_type"]), float(g["interval"])
    np.testing.assert_array_equal(at.thresholds(kind, interval), g["thresholds"])
    metric = PixelAP(kind, interval)
    for m, mask in zip(g["maps"], g["gt"]):
        metric.update(m, mask)
    result = metric.compute()
    np.testing.assert_array_equal(metric.histogram.numpy(),
                                  np.stack([g["hist_false"], g["hist_true"]]))
    assert result["ap"] == pytest.approx(float(g["pxap_percent"]), rel=1e-10)
    np.testing.assert_allclose(result["precision"], g["precision"], rtol=1e-12)
    np.testing.assert_allclose(result["recall"], g["recall"], rtol=1e-12)


def test_thresholds_normalisation_and_resizing_of_the_released_code():
    g = load("thresholds.npz")
    for key in ("even", "log"):
        np.testing.assert_array_equal(at.thresholds(key), g[key])
        np.testing.assert_array_equal(at.thresholds(key, 0.05), g[f"{key}_05"])
    g = load("normalize.npz")
    for case in ("signed", "positive", "constant", "nan"):
        for mode, key in (("max", "max"), ("minmax", "minmax"), ("clip", "clipping")):
            close(at.normalize_map(torch.from_numpy(g[f"in_{case}"]), mode), g[f"out_{key}_{case}"],
                  1e-12)
    assert not at.normalize_map(torch.from_numpy(g["in_allneg"]), "max").any()
    g = load("resize.npz")
    for key in ("7x7", "28x28"):
        close(at.resize_map(torch.from_numpy(g[f"in_{key}"]), 224), g[f"out_{key}"], 1e-5, 1e-5)


def test_erasing_of_the_released_code():
    g = load("erase.npz")
    percents = (10, 30, 50, 70, 90)
    fractions = [p / 100 for p in percents]
    masks = at.erase_masks(torch.from_numpy(g["scoremap"])[:, 0], fractions)
    for row, p in enumerate(percents):
        np.testing.assert_array_equal(masks[row].numpy(), g[f"mask_topk_{p}"][:, 0].astype(bool))
    images = torch.from_numpy(g["images"])
    close(at.fill_baseline(images, "mean"), g["baseline_mean"])
    close(at.fill_baseline(images, "blur"), g["baseline_blur"], 1e-4, 1e-5)
    weight = torch.from_numpy(g["rc_weight"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4, bias=False))
    model[1].weight.data.copy_(weight)
    scores, labels = torch.from_numpy(g["rc_scoremap"])[:, 0], torch.from_numpy(g["rc_labels"])
    random = torch.stack([torch.from_numpy(g[f"rc_mask_random_{p}"][:, 0].astype(bool))
                          for p in percents])
    seen = iter(scores.split(7))
    result = at.remove_and_classify(model, list(zip(images.split(7), labels.split(7))),
                                    lambda *_: next(seen), fractions, random_masks=random)
    np.testing.assert_allclose(result["accuracy_erased"], g["rc_correct_topk"].mean(1), rtol=1e-12)
    np.testing.assert_allclose(result["accuracy_random"], g["rc_correct_random"].mean(1),
                               rtol=1e-12)
    assert result["accuracy"] == pytest.approx(g["rc_correct_none"].mean())
    np.testing.assert_allclose(result["ratio"], g["rc_ratio"], rtol=1e-12)


def test_exact_pixel_ap_by_hand_and_underflow():
    metric = PixelAP(thresholds=None)
    metric.update(torch.tensor([[0.9, 0.8, 0.8, 0.1]]), torch.tensor([[1, 1, 0, 1]]))
    metric.update(torch.tensor([[0.7, 0.2]]), torch.tensor([[0, 255]]))
    assert metric.compute()["ap"] == pytest.approx(100 / 3 * (1 + 2 / 3 + 3 / 5))
    for count, expected in ((False, 1.0), (True, 0.5)):
        log = PixelAP("log", count_underflow=count)
        log.update(torch.tensor([[0.5, 1e-9, 0.1]]), torch.tensor([[1, 1, 0]]))
        assert log.compute()["recall"][-1] == expected


def test_threads_do_not_see_the_activations_of_others(case):
    g, net, images, labels = case
    def maps(n, function):
        return function(net, net.relu, images[n % 2:n % 2 + 1], labels[n % 2:n % 2 + 1])
    for function in (at.grad_cam, at.layer_cam, at.score_cam):
        alone = [maps(n, function) for n in range(2)]
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda n: maps(n, function), range(60)))
        assert all(torch.equal(map_, alone[n % 2]) for n, map_ in enumerate(together))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6")
def test_compiled_models_show_their_layers(case):
    g, net, images, labels = case
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(images)                                      # a graph without hooks
    for function in (at.grad_cam, at.score_cam, at.ablation_cam):
        maps = function(net, net.relu, images, labels)
        assert torch.equal(function(compiled, compiled.relu, images, labels), maps)
        if function is not at.ablation_cam:                   # which runs parts of a module
            assert torch.equal(function(lambda x: net(x), net.relu, images, labels), maps)


def test_a_backbone_without_gradients_is_named(case):
    g, net, images, labels = case

    class Probe(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                features = net.relu(net.conv2(net.conv1(x).relu())).mean((2, 3))
            return features

    for layer in (net.conv1, net.conv2):
        with pytest.raises(ValueError, match="no gradient reaches the layer"):
            at.grad_cam(Probe(), layer, images, 0)
    assert not at.ablation_cam(Probe(), net.conv2, images, 0).isnan().any()


def test_distributed_models_are_left_alone(case, monkeypatch):
    g, net, images, labels = case

    class Distributed(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module                              # a call would prepare a reduction

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Distributed)
    maps = at.grad_cam(Distributed(net), net.conv2, images, labels)
    assert torch.equal(maps, at.grad_cam(net, net.conv2, images, labels))


def test_results_are_the_callers_own():
    maps, images = torch.rand(2, 4, 4, generator=seeded()), torch.rand(2, 3, 16, 16)
    for mode in ("none", "max", "minmax", "clip"):
        assert at.normalize_map(maps, mode).data_ptr() != maps.data_ptr()
    for fill in ("zero", "mean", "blur"):
        at.fill_baseline(images, fill).add_(1)                # not an expanded view


def test_erasing_orders_ties_and_fills():
    maps = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    assert at.erase_masks(maps, [0.5])[0, 0].tolist() == [[False, False], [True, True]]
    assert at.erase_masks(maps, [0.5], "least")[0, 0].tolist() == [[False, True], [False, True]]
    assert not at.fill_baseline(torch.ones(1, 3, 4, 4), "zero").any()
    assert at.erase_masks(maps, []).shape == (0, 1, 2, 2)


@pytest.mark.filterwarnings("default::UserWarning")
def test_remove_and_classify_restores_the_mode_and_warns():
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), nn.Linear(768, 3))
    model[0].eval()
    loader = [(torch.randn(2, 3, 16, 16, generator=seeded()), torch.tensor([0, 1]))]
    gradient = lambda x, y: at.input_gradient(model, x, y)  # noqa: E731
    result = at.remove_and_classify(model, loader, gradient, [0.0, 0.5, 1.0], generator=seeded())
    modes = model.training, model[0].training, model[1].training
    assert modes == (True, False, True)  # each part in its own mode
    assert result["accuracy_erased"][0] == result["accuracy"] == result["accuracy_random"][0]
    assert result["accuracy_erased"][2] == result["accuracy_random"][2]
    never = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    nn.init.zeros_(never[1].weight), nn.init.constant_(never[1].bias, 0.0)
    never[1].bias.data[2] = 1
    with pytest.warns(UserWarning, match="NaN"):
        result = at.remove_and_classify(never, loader, lambda x, y: x[:, 0], [0.5])
    assert result["ratio"].isnan().all()


def test_remove_and_classify_orders_float64_maps_as_they_are():
    maps, seen = torch.tensor([[[1.0, 1.0 + 1e-12], [0.0, 0.0]]], dtype=torch.float64), []
    at.remove_and_classify(lambda x: (seen.append(x), x.flatten(1))[1],
                           [(torch.ones(1, 1, 2, 2), torch.zeros(1).long())], lambda *_: maps,
                           [0.25], generator=seeded())
    assert seen[1].flatten().tolist() == [1, 0, 1, 1]


def test_pixel_ap_counts_anything_once():
    maps = torch.rand(3, 5, 5, generator=seeded(), dtype=torch.float64)
    masks = torch.randint(2, (3, 5, 5), generator=seeded(1))
    for options in ({"thresholds": None}, {"thresholds": "log"},
                    {"thresholds": [0.1, 0.5, 0.9], "count_underflow": True}):
        whole, parts = PixelAP(**options), PixelAP(**options)
        whole.update(maps, masks)
        for m, mask in zip(maps, masks.bool()):
            parts.update(m.numpy(), mask.numpy())
        assert whole.compute()["ap"] == pytest.approx(parts.compute()["ap"], rel=1e-12)
    assert all(np.isnan(PixelAP(kind).compute()["ap"]) for kind in (None, "even", "log"))
    perfect = PixelAP(thresholds=None)
    perfect.update(masks.double(), masks)
    assert perfect.compute()["ap"] == pytest.approx(100)


def test_least_attributed_pixels_first():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(model[1].weight)
    # class 0: more than 20 of the 32 pixels on the left
    model[1].weight.data[0].view(3, 8, 8)[0, :, :4] = 1
    model[1].bias.data = torch.tensor([0.0, 20.0])
    loader = [(torch.ones(2, 3, 8, 8), torch.tensor([0, 0]))]

    def erased(order):
        gradient = lambda x, y: at.input_gradient(model, x, y)  # noqa: E731
        result = at.remove_and_classify(model, loader, gradient, [0.3], order=order,
                                        generator=seeded())
        return result["accuracy_erased"].item()

    assert erased("most") == 0 and erased("least") == 1
    function = lambda x: model(x)  # noqa: E731
    unchanged = at.remove_and_classify(function, loader, lambda x, y: x[:, 0], [1.0], fill="mean",
                                       generator=seeded())
    assert unchanged["accuracy_erased"] == 1


def test_bad_input(case):
    g, net, images, labels = case
    batches, zeros = [(images, labels)], torch.zeros(2, 2)
    for call, error, words in [
        (lambda: at.grad_cam(net, net.relu, images, 9), ValueError, "targets must be in 0"),
        (lambda: at.grad_cam(net, net.relu, images, labels[:1]), ValueError, "targets must be"),
        (lambda: at.grad_cam(net, net.relu, images, labels.float()), TypeError, "integers"),
        (lambda: at.grad_cam(net, net.relu, images, None), TypeError, "targets must be given"),
        (lambda: at.grad_cam(net, net.relu, images[0], 1), ValueError, "images must be"),
        (lambda: at.grad_cam(net, net.relu, images.numpy(), 1), ValueError, "not ndarray"),
        (lambda: at.resize_map(zeros.numpy(), 2), ValueError, "maps must be"),
        (lambda: at.normalize_map(zeros.numpy(), "max"), ValueError, "maps must be"),
        (lambda: at.erase_masks(zeros.numpy(), [0.5]), ValueError, "maps must be"),
        (lambda: at.grad_cam(net, nn.ReLU(), images, 1), ValueError, "layer was not used"),
        (lambda: at.grad_cam(net, "relu", images, 1), TypeError, "layer must be a module"),
        (lambda: at.ablation_cam(net, None, images, 1), TypeError, "layer must be a module"),
        (lambda: at.integrated_gradients(net, images, 1, baseline=0.0), ValueError, "not float"),
        (lambda: at.grad_cam(net, net.relu, images, labels[:, None][:, :0]), ValueError, "targets"),
        (lambda: at.integrated_gradients(net, images, 1, baseline=torch.zeros(1, 2)), ValueError,
         "baseline"),
        (lambda: at.normalize_map(torch.zeros(3), "max"), ValueError, "maps must be"),
        (lambda: at.resize_map(zeros, 0), ValueError, "size"),
        (lambda: at.resize_map(zeros[0], 2), ValueError, "maps must be"),
        (lambda: at.grad_cam(net, net.relu, images, 1, output="score"), ValueError,
         "output must be"),
        (lambda: at.input_gradient(net, images, labels[:, None].repeat(1, 2)), ValueError,
         "one class per image"),
        (lambda: at.smooth_grad(net, images, 1, samples=0), ValueError, "samples"),
        (lambda: at.smooth_grad(net, images, 1, samples=2, noise=torch.zeros(3)), ValueError,
         "noise must be"),
        (lambda: at.integrated_gradients(net, images, 1, method="simpson"), ValueError, "method"),
        (lambda: at.integrated_gradients(net, images, 1, variant="other"), ValueError, "variant"),
        (lambda: at.integrated_gradients(net, images, 1, steps=0), ValueError, "steps"),
        (lambda: at.normalize_map(images, "sum"), ValueError, "mode"),
        (lambda: at.smooth_grad(net, images, 1, samples=2, chunk=0), ValueError, "chunk"),
        (lambda: at.score_cam(net, net.relu, images, 1, chunk=0), ValueError, "chunk"),
        (lambda: at.score_cam(net, nn.ReLU(), images, 1), ValueError, "layer was not used"),
        (lambda: at.grad_cam(net, net.fc, images, 1), ValueError,
         r"layer must return one \(B, K, h, w\)"),
        (lambda: at.thresholds("linear"), ValueError, "kind"),
        (lambda: at.thresholds("even", 2), ValueError, "interval"),
        (lambda: PixelAP([0.5, 0.1]), ValueError, "ascending"),
        (lambda: PixelAP(np.zeros((2, 2))), ValueError, "1-D"),
        (lambda: PixelAP("linear"), ValueError, "thresholds must be one of"),
        (lambda: PixelAP().update(torch.zeros(2, 3), torch.zeros(3, 2)), ValueError, "one shape"),
        (lambda: PixelAP().update(zeros + 1.5, zeros), ValueError, r"\[0, 1\]"),
        (lambda: PixelAP().update(zeros + np.nan, zeros), ValueError, "NaN"),
        (lambda: PixelAP().update(zeros.long(), zeros), TypeError, "floating"),
        (lambda: at.erase_masks(torch.zeros(2, 3, 3), [1.5]), ValueError, "fractions"),
        (lambda: at.erase_masks(torch.zeros(3, 3), [0.5]), ValueError, "maps"),
        (lambda: at.erase_masks(torch.full((1, 3, 3), np.nan), [0.5]), ValueError, "NaN"),
        (lambda: at.fill_baseline(torch.zeros(3, 8, 8), "mean"), ValueError, "images must be"),
        (lambda: at.erase_masks(torch.zeros(2, 3, 3), [0.5], "best"), ValueError, "order"),
        (lambda: at.fill_baseline(torch.zeros(1, 3, 8, 8), "blur"), ValueError, "16 pixels"),
        (lambda: at.fill_baseline(torch.zeros(1, 3, 8, 8), "noise"), ValueError, "fill"),
        (lambda: at.remove_and_classify(net, [(images[0], labels)], None, [0.5]), ValueError,
         "loader must give images"),
        (lambda: at.remove_and_classify(net, [], None, [0.5]), ValueError, "loader is empty"),
        (lambda: at.remove_and_classify(net, batches, lambda x, y: x, [0.5]), ValueError,
         "map_fn must return"),
        (lambda: at.remove_and_classify(net, batches, lambda x, y: None, [0.5]), ValueError,
         "map_fn must return .* not NoneType"),
        (lambda: at.remove_and_classify(nn.Identity(), batches, lambda x, y: x[:, 0], [0.5]),
         ValueError, r"\(B, C\) scores"),
        (lambda: at.remove_and_classify(net, batches, lambda x, y: x[:, 0], [0.5],
                                        random_masks=torch.ones(1, 1, 2, 2).bool()), ValueError,
         "random_masks"),
        (lambda: at.remove_and_classify(net, batches, lambda x, y: x[:, 0], [0.5],
                                        random_masks=torch.ones(1, 99, *images.shape[2:]).bool()),
         ValueError, "random_masks"),
        (lambda: at.remove_and_classify(net, batches, lambda x, y: x[:, 0], [0.5],
                                        random_masks=torch.ones(1, len(images), *images.shape[2:])),
         ValueError, "random_masks must be bool"),
        (lambda: at.remove_and_classify(net, [(images, labels[:1])], None, [0.5]), ValueError,
         "loader must give .* labels"),
        (lambda: at.remove_and_classify(net, [(images, labels.float())], None, [0.5]), ValueError,
         "integer labels"),
        (lambda: at.grad_cam(nn.Identity(), nn.Identity(), images, 1), ValueError,
         r"\(B, C\) scores")]:
        with pytest.raises(error, match=words):
            call()
