from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reference import attribution as at

GOLDEN = Path(__file__).parent / "golden" / "calm"
NETS = ("baselines_gap.npz", "baselines_mlp.npz")


class Net(nn.Module):
    def __init__(self, g):
        super().__init__()
        self.conv1 = nn.Conv2d(3, g["w.conv1.weight"].shape[0], 3, padding=1)
        self.conv2 = nn.Conv2d(g["w.conv2.weight"].shape[1], g["w.conv2.weight"].shape[0], 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        if not g["gap_fc"]:
            self.mid = nn.Linear(*reversed(g["w.mid.weight"].shape))
        self.fc = nn.Linear(*reversed(g["w.fc.weight"].shape))
        self.load_state_dict({key[2:]: torch.from_numpy(g[key]) for key in g if key.startswith("w.")})

    def forward(self, x):
        x = self.relu(self.conv2(self.conv1(x).relu())).mean((2, 3))
        return self.fc(self.mid(x).tanh() if hasattr(self, "mid") else x)


@pytest.fixture(params=NETS)
def case(request):
    with np.load(GOLDEN / request.param) as file:
        g = {key: file[key] for key in file.files}
    return g, Net(g).eval(), torch.from_numpy(g["images"]), torch.from_numpy(g["labels"])


def close(a, b, rtol=1e-4, atol=1e-6):
    np.testing.assert_allclose(a.detach().numpy(), b, rtol=rtol, atol=atol)


def test_cam_family_equals_the_packages(case):
    g, net, images, labels = case
    close(net(images), g["logits"])
    layer = net.relu
    close(at.grad_cam(net, layer, images, labels, relu=True), g["pgcraw_GradCAM"].clip(0))
    close(at.grad_cam(net, layer, images, labels), g["captum_LayerGradCam"][:, 0])
    close(at.grad_cam(net, layer, images, labels, relu=True), g["torchcam_GradCAM"].clip(0))
    scale = np.abs(g["pgcraw_GradCAMPlusPlus"]).max()
    close(at.grad_cam_pp(net, layer, images, labels, eps=1e-6) , g["pgcraw_GradCAMPlusPlus"], 1e-3, 1e-5 * scale)
    close(at.xgrad_cam(net, layer, images, labels), g["pgcraw_XGradCAM"], 1e-4, 1e-5)
    close(at.layer_cam(net, layer, images, labels), g["pgcraw_LayerCAM"])
    close(at.hires_cam(net, layer, images, labels), g["pgcraw_HiResCAM"])
    if g["gap_fc"]:
        close(100 * at.grad_cam(net, layer, images, labels), g["cam_raw"], 1e-3, 1e-5)
    for function, key in ((at.score_cam, "pgc_ScoreCAM"), (at.ablation_cam, "pgc_AblationCAM")):
        maps = function(net, layer, images, labels, relu=True)
        scaled = lambda m: (m - m.amin((1, 2), keepdim=True)) / (1e-7 + (m - m.amin((1, 2), keepdim=True)).amax((1, 2), keepdim=True))      # noqa: E731
        close(scaled(at.resize_map(scaled(maps), images.shape[-1])), g[key], 1e-3, 2e-3)
        assert torch.allclose(function(net, layer, images, labels, chunk=5), function(net, layer, images, labels), atol=1e-6)


def test_gradients_equal_the_official_code_and_captum(case):
    g, net, images, labels = case
    close(at.input_gradient(net, images, labels), g["off_gradient"])
    close(at.input_gradient(net, images, labels, signed=True), g["captum_Saliency_signed"])
    noise, samples = torch.from_numpy(g["noise"]), int(g["n_iter"])
    options = {"samples": samples, "sigma_divisor": float(g["sigma_divisor"]), "noise": noise}
    for function, key in ((at.smooth_grad, "off_smooth_grad"), (at.smooth_grad_squared, "off_smooth_grad_square"), (at.var_grad, "off_var_grad")):
        for chunk in (None, 3):
            close(function(net, images, labels, chunk=chunk, **options), g[key], 1e-3, 1e-6 * (1 + np.abs(g[key]).max()))
    close(at.integrated_gradients(net, images, labels, steps=samples, variant="calm"), g["off_integrated"], 1e-4, 1e-6)
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
    for function in (at.grad_cam, at.grad_cam_pp, at.xgrad_cam, at.layer_cam, at.hires_cam, at.score_cam, at.ablation_cam):
        calls.clear()
        both = function(net, net.relu, images, classes)
        assert both.shape == (len(images), 2, *g["features"].shape[2:]) and (len(calls) == 1 or function in (at.score_cam, at.ablation_cam))
        assert torch.allclose(both[:, 1], function(net, net.relu, images, classes[:, 1]), rtol=1e-4, atol=1e-6)
        assert torch.allclose(function(net, net.relu, images, 2), function(net, net.relu, images, torch.full_like(labels, 2)))
    with torch.no_grad():
        at.grad_cam(net, net.relu, images, labels)
        at.smooth_grad(net, images, labels, samples=2, generator=torch.Generator().manual_seed(0))
    assert all(p.grad is None for p in net.parameters()) and not net.relu._forward_hooks and not images.requires_grad
    first, second = (at.smooth_grad(net, images, labels, samples=3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_explained(case):
    g, net, images, labels = case
    with torch.enable_grad():
        x = images.clone().requires_grad_()
        for output, score in (("log_prob", net(x).log_softmax(1)), ("prob", net(x).softmax(1))):
            expected = torch.autograd.grad(score.gather(1, labels[:, None]).sum(), x)[0]
            assert torch.allclose(at.input_gradient(net, images, labels, output=output, signed=True), expected, atol=1e-7)

    class Wrapped(nn.Module):
        def forward(self, x):
            class Result:
                pooled = staticmethod(lambda: net(x))
                probs = staticmethod(lambda: net(x).softmax(1))
            return Result
    assert torch.allclose(at.input_gradient(Wrapped(), images, labels), at.input_gradient(net, images, labels))
    with pytest.raises(ValueError, match="log_probs"):
        at.input_gradient(Wrapped(), images, labels, output="log_prob")


def test_bad_input(case):
    g, net, images, labels = case
    for call, error, words in [
        (lambda: at.grad_cam(net, net.relu, images, 9), ValueError, "targets must be in 0"),
        (lambda: at.grad_cam(net, net.relu, images, labels[:1]), ValueError, "targets must be"),
        (lambda: at.grad_cam(net, net.relu, images, labels.float()), TypeError, "integers"),
        (lambda: at.grad_cam(net, net.relu, images[0], 1), ValueError, "images must be"),
        (lambda: at.grad_cam(net, nn.ReLU(), images, 1), ValueError, "layer was not used"),
        (lambda: at.grad_cam(net, net.relu, images, 1, output="score"), ValueError, "output must be"),
        (lambda: at.input_gradient(net, images, labels[:, None].repeat(1, 2)), ValueError, "one class per image"),
        (lambda: at.smooth_grad(net, images, 1, samples=0), ValueError, "samples"),
        (lambda: at.smooth_grad(net, images, 1, samples=2, noise=torch.zeros(3)), ValueError, "noise must be"),
        (lambda: at.integrated_gradients(net, images, 1, method="simpson"), ValueError, "method"),
        (lambda: at.integrated_gradients(net, images, 1, variant="other"), ValueError, "variant"),
        (lambda: at.integrated_gradients(net, images, 1, steps=0), ValueError, "steps"),
        (lambda: at.normalize_map(images, "sum"), ValueError, "mode"),
        (lambda: at.grad_cam(nn.Identity(), nn.Identity(), images, 1), ValueError, r"\(B, C\) scores"),
    ]:
        with pytest.raises(error, match=words):
            call()
