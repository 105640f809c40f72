"""Every method on the CPU and on another device, the same numbers: on the second device, or on a
real one that the environment variable DEVICE names. Run by test_devices.py in a process of its own,
since a backend cannot be taken out of one again."""

import contextlib
import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from reference import (adamp, attribution, calm, nha, pcme, pit, prdc, regularization, relabel,
                       robustness, video_resnet, videomix, videomix_localization, wsol,
                       wsol_evaluation)

if "DEVICE" in os.environ:
    torch.backends.cudnn.allow_tf32 = False
    other_device, waits = lambda: contextlib.nullcontext(torch.device(os.environ["DEVICE"])), {}
else:
    from second_device import second_device as other_device, waits


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def small_net():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(randn(*p.shape, seed=i) * 0.2)
    return net


def assert_same(a, b, **tolerance):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(b.cpu() if isinstance(b, torch.Tensor) else b, a, **tolerance)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], **tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other, **tolerance)
    else:
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def both(function, **tolerance):
    """function(device) on both devices; returns where the host waited for the other."""
    expected = function(torch.device("cpu"))
    with other_device() as device:
        assert_same(expected, function(device), **tolerance)
        return dict(waits)


def test_the_second_device_is_strict():
    with other_device() as device:
        x = torch.ones(3, device=device, requires_grad=True)
        (x * 2).sum().backward()
        assert x.grad.device.type == device.type and x.grad.tolist() == [2, 2, 2]
        for wrong in (lambda: x + torch.ones(3), lambda: x.detach().numpy(),
                      lambda: torch.ones(3)[x.detach().long()],
                      lambda: torch.rand(3, device=device, generator=torch.Generator())):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


@pytest.mark.parametrize("make", [
    lambda p: adamp.AdamP(p, 0.01, weight_decay=0.1),
    lambda p: adamp.AdamP(p, 0.01, nesterov=True),
    lambda p: adamp.SGDP(p, 0.01, momentum=0.9, weight_decay=0.1),
    lambda p: adamp.SGDP(p, 0.01, momentum=0.9, project_buffer=True)])
def test_adamp_steps_without_waiting(make):
    def weights(device):
        params = [nn.Parameter(randn(*shape).to(device)) for shape in ((4, 3, 3), (5, 4), (6,))]
        optimizer = make(params)
        optimizer._path = lambda group, p: optimizer._foreach_step      # as on any accelerator
        for step in range(3):
            for p in params:
                p.grad = torch.cos(p.detach() + step)
            waits.clear()
            optimizer.step()
            assert not waits
        return [p.detach() for p in params]
    both(weights, rtol=1e-5, atol=1e-6)


def test_pit():
    model = pit.PoolingTransformer(32, 4, 4, (8, 8, 8), (1, 1, 1), (2, 2, 2), num_classes=5)
    x, y = torch.rand(4, 3, 32, 32, generator=rng()), torch.tensor([0, 1, 2, 3])

    def results(device):
        net = copy.deepcopy(model).to(device).train()
        images, labels = x.to(device), y.to(device)
        target = pit.smooth_one_hot(labels, 5, 0.1)
        loss = pit.SoftTargetCrossEntropy()(net(pit.cutmix_batch(images, 0.7, (8, 8))[0]), target)
        loss.backward()
        net.eval()
        return (loss.detach(), [p.grad for p in net.parameters()], net.attention_maps(images),
                pit.fgsm(net, images, labels, 0.01))
    both(results, rtol=1e-4, atol=1e-5)


def test_prdc():
    real, fake = randn(300, 8), randn(250, 8, seed=1) + 0.3
    both(lambda device: prdc.compute_prdc(real.to(device), fake.to(device), [3, 5], details=True))


@pytest.mark.filterwarnings("ignore")
def test_wsol():
    maps = torch.rand(6, 20, 24, generator=rng())
    x, y = torch.rand(4, 3, 16, 16, generator=rng()), torch.tensor([0, 1, 2, 3])

    def results(device):
        boxes = [wsol_evaluation.scoremap_boxes(maps.to(device), multi_contour=m) for m in (0, 1)]
        net = small_net().to(device).eval()
        return (boxes, wsol_evaluation.resize_scoremap(maps.to(device), 40),
                wsol.has(x.to(device), 4, 0.5, generator=rng()),
                wsol.vanilla_gradient(net, x.to(device), y.to(device)),
                wsol.smooth_grad(net, x.to(device), y.to(device), n=3, generator=rng()))
    both(results, rtol=1e-4, atol=1e-5)


def test_calm_and_attribution():
    features, y = randn(4, 6, 7, 7), torch.tensor([0, 1, 2, 3])
    x = torch.rand(4, 3, 16, 16, generator=rng())
    head = calm.CALMHead(6, 5)

    def results(device):
        output = copy.deepcopy(head).to(device)(features.to(device))
        net, images, classes = small_net().to(device).eval(), x.to(device), y.to(device)
        losses = [calm.calm_loss(output, classes, method) for method in ("em", "ml")]
        maps = [calm.attribution_map(output, classes, kind) for kind in ("joint", "posterior")]
        return ([v.detach() for v in losses + maps],
                attribution.grad_cam(net, net[2], images, classes),
                attribution.score_cam(net, net[2], images, classes),
                attribution.integrated_gradients(net, images, classes, steps=4))
    both(results, rtol=1e-4, atol=1e-5)


def test_pcme():
    image, text = randn(6, 3, 8), randn(6, 3, 8, seed=1)

    def results(device):
        q, g = image.to(device), text.to(device)
        loss = pcme.MCSoftContrastiveLoss().to(device)
        value, _ = loss(q, g, torch.zeros(6, 8, device=device), torch.zeros(6, 8, device=device))
        sim = loss.match_prob(q, g)
        return value.detach(), sim.detach(), pcme.recall_at_k(sim, torch.eye(6), 2)
    both(results, rtol=1e-4, atol=1e-5)


def test_regularization_and_robustness():
    x, y = torch.rand(4, 3, 16, 16, generator=rng()), torch.tensor([0, 1, 2, 3])

    def results(device):
        images, labels, net = x.to(device), y.to(device), small_net().to(device).eval()
        mixes = [mix(images, labels, per_sample=each, generator=rng()) for each in (False, True)
                 for mix in (regularization.cutmix, regularization.mixup)]
        logits = net(images).detach()
        return ([m.x for m in mixes], regularization.cutout(images, 6, generator=rng()),
                robustness.pgd(net, images, labels, 0.03, 0.01, 3),
                robustness.expected_calibration_error(logits, labels),
                robustness.ood_metrics(logits[:, 0], logits[:, 1]))
    both(results, rtol=1e-4, atol=1e-5)


def test_relabel():
    scores = randn(4, 5, 6, 6)
    coords = torch.tensor([[0.1, 0.2, 0.5, 0.6]]).repeat(4, 1)
    maps = torch.stack([scores, torch.randint(20, scores.shape, generator=rng()).float()], 1)
    both(lambda device: relabel.label_pooling(maps.to(device), coords.to(device), 20), rtol=1e-4,
         atol=1e-5)


@pytest.mark.parametrize("mix", [
    videomix.VideoMix("S", num_classes=4), videomix.VideoMix("ST", num_classes=4, per_sample=True),
    videomix.VideoMixup(num_classes=4), videomix.FadeMixup(num_classes=4),
    videomix.CutMixup(num_classes=4), videomix.FrameCutMix(num_classes=4),
    videomix.VideoCutout(num_classes=4)])
def test_videomix(mix):
    clips, labels = torch.rand(4, 3, 8, 12, 12, generator=rng()), torch.arange(4)
    both(lambda device: mix(clips.to(device), labels.to(device), generator=rng())[:3])


def test_video_networks_and_localisation():
    net = video_resnet.slowfast18(3, width=8, generator=rng()).eval()
    boxes, scores = torch.rand(6, 4, generator=rng()), torch.rand(6, generator=rng())
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([0, 1, 0, 1, 0, 0])

    def results(device):
        found, true = ([v.to(device) for v in part] for part in
                       ((boxes, labels, scores), (boxes[:4] * 1.05, labels[:4])))
        return (net.to(device)(randn(1, 3, 8, 32, 32).to(device)).detach(),
                videomix_localization.localize_actions(scores.to(device)),
                videomix_localization.detection_ap([found], [true], rule="ava"))
    both(results, rtol=1e-3, atol=1e-4)


def test_nha():
    runs = nha.RenoTCP().sample_exact(3, 30.0, generator=rng(), dtype=torch.float32)
    t = torch.linspace(0, 30, 400, dtype=torch.float64)
    pieces = [piece for i in range(3) for at, x, mode in [runs.trajectory(t, i)]
              for piece in nha.segment(at.float(), x.float(), mode=mode, jump_threshold=0.5)]
    batch, model = nha.pack_pieces(pieces), nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=i) * 0.3)

    def results(device):
        net = copy.deepcopy(model).to(device)
        on_device = nha.PaddedPieces(*(part.to(device) for part in batch))
        losses = [row["loss"] for row in nha.train_mode_recovery(
            net, on_device, epochs=3, solver="exact", generator=rng())]
        y = randn(5, 2, dtype=torch.float64).to(device).requires_grad_()
        grid = torch.linspace(0, 1, 5, dtype=torch.float64, device=device)
        ball = nha.odeint_hybrid(nha.BouncingBall(), torch.tensor(
            [[1.0, 0.0]], dtype=torch.float64, device=device), 0, grid)
        path = nha.odeint(lambda t, y: -y.sin(), y, grid).ys
        return losses, path.detach(), torch.autograd.grad(path[-1].sum(), y)[0], ball.ys
    both(results, rtol=1e-4, atol=1e-6)


def test_the_solver_waits_every_eighth_attempt():
    y, t = randn(16, 2, dtype=torch.float64), torch.tensor([0.0, 20.0], dtype=torch.float64)
    with other_device() as device:
        stats = nha.odeint(lambda t, y: torch.stack([y[:, 1], -y[:, 0].sin()], 1), y.to(device),
                           t.to(device), rtol=1e-8).stats
        attempts = int((stats.n_accepted + stats.n_rejected).max())
        assert attempts > 100 and sum(waits.values()) < attempts / 8 + 15
