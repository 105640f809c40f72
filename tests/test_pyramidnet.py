"""PyramidNet and Wide ResNet against the published network, counts and widths."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reference.pyramidnet import PyramidBlock, PyramidNet, ShakeDrop, WideResNet

GOLDEN = Path(__file__).parent / "golden" / "regularization"


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def count(net):
    return sum(p.numel() for p in net.parameters())


def seed_layers(net, seed=5):
    for module in net.modules():
        if hasattr(module, "generator"):
            module.generator = gen(seed)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_logits_equal_the_published_network(kind):
    data = np.load(GOLDEN / f"pyramidnet_{kind}.npz")
    depth, alpha, classes, bottleneck = data["config"].tolist()
    net = PyramidNet(depth, alpha, classes, bottleneck=bool(bottleneck))
    assert count(net) == int(data["n_params"])
    weights = {key[3:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("sd/")}
    net.load_state_dict(weights)  # strict: the names are the published ones
    x = torch.from_numpy(data["x"])
    eval_logits = torch.from_numpy(data["y_eval"])
    close = {"atol": 1e-4, "rtol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), eval_logits, **close)
        last = net(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, eval_logits, **close)
        torch.testing.assert_close(net(x[:1]), eval_logits[:1], **close)
        double = copy.deepcopy(net).double()(x.double())
        torch.testing.assert_close(double.float(), eval_logits, **close)
        torch.testing.assert_close(net.train()(x), torch.from_numpy(data["y_train"]), **close)
    mean = torch.from_numpy(data["bn_final_mean_after_train"])
    torch.testing.assert_close(net.bn_final.running_mean, mean, **close)


def test_published_parameter_counts():
    with torch.device("meta"):
        for (depth, alpha, bottleneck, classes), parameters in {
            (200, 240, True, 100): 26_844_952, (200, 240, True, 10): 26_752_702,
            (110, 270, False, 100): 28_511_307, (110, 48, False, 100): 1_778_556,
            (110, 84, False, 100): 3_913_536, (164, 270, True, 100): 27_319_071,
            (236, 220, True, 100): 27_054_096, (272, 200, True, 100): 26_288_692,
        }.items():
            assert count(PyramidNet(depth, alpha, classes, bottleneck)) == parameters
        net = PyramidNet(50, 300, 10, dataset="imagenet")
        assert count(net) == 15_411_772 and net.fc.in_features == 1456
        for (depth, widen, classes), parameters in {
                (28, 10, 100): 36_536_884, (28, 10, 10): 36_479_194, (40, 2, 100): 2_255_156,
                (16, 8, 10): 10_961_370}.items():
            assert count(WideResNet(depth, widen, classes)) == parameters


def test_widths_of_pyramidnet_200():
    with torch.device("meta"):
        net = PyramidNet(200, 240, 100)
    widths = [block.outputs // 4 for stage in net.stages for block in getattr(net, stage)]
    assert widths == [20, 23, 27, 31, 34, 38, 41, 45, 49, 52, 56, 60, 63, 67, 71, 74, 78, 81, 85,
                      89, 92, 96,
                      100, 103, 107, 111, 114, 118, 121, 125, 129, 132, 136, 140, 143, 147, 151,
                      154, 158,
                      161, 165, 169, 172, 176, 180, 183, 187, 191, 194, 198, 201, 205, 209, 212,
                      216, 220,
                      223, 227, 231, 234, 238, 241, 245, 249, 252, 256]


def test_shortcut_pads_channels_at_the_end_and_halves_by_averaging():
    block = PyramidBlock(4, 6, 2, False, 0.0, "image").eval()
    nn.init.zeros_(block.bn3.weight)  # the branch vanishes
    nn.init.zeros_(block.bn3.bias)
    x = torch.rand(2, 4, 7, 7, generator=gen())
    out = block(x)
    torch.testing.assert_close(out[:, :4], F.avg_pool2d(x, 2, 2, ceil_mode=True))
    assert out.shape == (2, 6, 4, 4) and (out[:, 4:] == 0).all()


def test_the_network_is_traced_by_fx():
    net, x = PyramidNet(20, 12, 5, False, shakedrop=0.5).eval(), torch.rand(2, 3, 16, 16)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_imagenet_network_runs():
    net = PyramidNet(18, 30, 7, bottleneck=False, dataset="imagenet", shakedrop=0.5)
    assert net(torch.rand(2, 3, 64, 64, generator=gen())).shape == (2, 7)


@pytest.mark.parametrize("level", ["image", "batch", "channel", "pixel"])
def test_shakedrop_forward_and_backward_factors(level):
    layer = ShakeDrop(0.5, level)
    layer.generator = gen(1)
    forward, backward = [], []
    for _ in range(400):
        x = torch.ones(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        out = layer(x)
        forward.append(out.detach())
        backward.append(torch.autograd.grad(out.sum(), x)[0])
    forward, backward = torch.stack(forward), torch.stack(backward)
    open_gate = (forward == 1).flatten(1).all(1)
    torch.testing.assert_close(open_gate, (backward == 1).flatten(1).all(1))
    closed, grads = forward[~open_gate], backward[~open_gate]
    assert closed.min() >= -1 and closed.max() < 1 and grads.min() >= 0 and grads.max() < 1
    distinct = {"batch": 1, "image": 3, "channel": 6, "pixel": 96}[level]
    assert {len(f.unique()) for f in closed} <= {distinct, distinct - 1}
    spread = 3 * closed.std() / len(closed) ** 0.5
    assert abs(closed[:, 0, 0, 0, 0].mean()) < 1.5 * spread
    assert abs(grads[:, 0, 0, 0, 0].mean() - 0.5) < 0.1
    assert abs(open_gate.double().mean() - 0.5) < 0.1
    correlation = np.corrcoef(closed[:, 0, 0, 0, 0], grads[:, 0, 0, 0, 0])[0, 1]
    assert abs(correlation) < 0.25  # alpha and beta are drawn apart
    torch.testing.assert_close(layer.eval()(x), x * 0.5)


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.skipif(
    torch.__version__ < "2.5", reason="torch 2.4 recomputes nothing on the meta device"))])
def test_a_training_step_reads_no_value_on_the_host(recompute):
    with torch.device("meta"):  # tensors without values: reading one raises
        net = PyramidNet(20, 12, 10, bottleneck=False, shakedrop=0.5)
        net.recompute = recompute
        net(torch.empty(2, 3, 16, 16)).sum().backward()
        with pytest.raises(RuntimeError):
            net.fc.bias.grad.sum().item()


def test_shakedrop_rates_grow_linearly():
    net = PyramidNet(20, 12, 10, bottleneck=False, shakedrop=0.5)
    rates = [block.shake.p_drop for stage in net.stages for block in getattr(net, stage)]
    np.testing.assert_allclose(rates, [0.5 * i / 9 for i in range(1, 10)])
    assert not any(isinstance(m, ShakeDrop) for m in PyramidNet(20, 12, 10, False).modules())


@pytest.mark.parametrize("depth, bottleneck, wrap", [
    (20, False, lambda net: net), (20, True, lambda net: net),
    (20, False, nn.SyncBatchNorm.convert_sync_batchnorm),    # without processes: plain batch norm
    pytest.param(8, False, lambda net: net.compile(backend="aot_eager") or net,
                 marks=pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"),
                                          reason="torch before 2.6"))],
    ids=["basic", "bottleneck", "synchronised", "compiled"])
def test_recompute_gives_the_same_gradients_and_statistics(depth, bottleneck, wrap):
    one = PyramidNet(depth, 12, 5, bottleneck, shakedrop=0.5)
    two = wrap(copy.deepcopy(one))
    two.recompute = True
    x = torch.rand(4, 3, 16, 16, generator=gen())
    for net in (one, two):
        seed_layers(net)
        F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(one.named_buffers(), two.buffers()):
        assert torch.equal(a, b), name
    assert two.bn1.num_batches_tracked == two.layer1[0].bn1.num_batches_tracked == 1


def test_recompute_with_a_hook_that_is_gone_at_the_backward_pass():
    net, grads = PyramidNet(20, 12, 5, False), []
    for net.recompute in (False, True):
        hook = net.layer2[0].conv2.register_forward_pre_hook(lambda _, args: (args[0].flip(0),))
        out = net(torch.rand(4, 3, 16, 16, generator=gen()))
        hook.remove()
        grads.append(torch.autograd.grad(out[0].sum(), net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("name", ["layer3", "layer3.0", "layer3.0.conv2"])
def test_recompute_calls_every_forward_hook_once(name):
    net, seen = PyramidNet(20, 12, 5, False), []
    net.recompute = True
    net.get_submodule(name).register_forward_hook(lambda *call: seen.append(call))
    net(torch.rand(4, 3, 16, 16, generator=gen())).sum().backward()
    assert len(seen) == 1


def test_recompute_keeps_less_for_the_backward_pass():
    def kept(net):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = net(torch.rand(8, 3, 32, 32, generator=gen())).sum()
        loss.backward()
        return sum(storages.values())

    net = PyramidNet(29, 30, 10)
    before = kept(net)
    net.recompute = True
    assert kept(net) < 0.5 * before


def test_wide_resnet_block_structure():
    net = WideResNet(10, 2, 5, dropout=0.3).eval()
    block = net.layer1[0]
    x = torch.rand(2, 16, 8, 8, generator=gen())
    activated = F.relu(block.bn1(x))
    branch = block.conv2(F.relu(block.bn2(block.conv1(activated))))
    torch.testing.assert_close(block(x), branch + block.shortcut(activated))
    assert block.dropout.p == 0.3 and net(torch.rand(1, 3, 32, 32, generator=gen())).shape == (1, 5)
    assert net.layer2[0].conv1.stride == net.layer2[0].shortcut.stride == (2, 2)
    assert not any(m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d))


def test_initial_weights_come_from_the_generator():
    for build in (lambda g: PyramidNet(8, 12, 5, False, generator=g),
                  lambda g: WideResNet(10, 2, 5, generator=g)):
        one, two, other = build(gen(1)), build(gen(1)), build(gen(2))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
        assert not torch.equal(one.fc.weight, other.fc.weight)
    weight = one.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.05)


def test_bad_arguments():
    for bad in ({"depth": 30}, {"depth": 2}, {"depth": 26, "bottleneck": False, "alpha": -1},
                {"num_classes": 0}, {"dataset": "mnist"}, {"dataset": "imagenet", "depth": 29},
                {"dataset": "imagenet", "depth": 18}, {"shakedrop": 1.5},
                {"shakedrop": 0.5, "level": "row"}):
        with pytest.raises(ValueError):
            PyramidNet(**{"depth": 29, "alpha": 10, "num_classes": 10, **bad})
    for bad in ((12, 1, 10), (4, 1, 10), (16, 0, 10), (16, 1, 0)):
        with pytest.raises(ValueError):
            WideResNet(*bad)
