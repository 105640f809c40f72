"""ResNet: published sizes, torchvision's names and shapes, strides, stems, initial weights."""

import doctest
import math

import pytest
import torch

from reference import resnet

PUBLISHED = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032,
             "resnet101": 44_549_160, "resnet152": 60_192_808}


def small(**options):
    options = {"width": 8, "small_stem": True,
               "generator": torch.Generator().manual_seed(0)} | options
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), options.pop("num_classes", 10), **options)


def test_docstring_example():
    assert doctest.testmod(resnet).failed == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name):
    with torch.device("meta"):
        model = getattr(resnet, name)()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def expected_state(bottleneck, layers):
    """torchvision's names and shapes, written out from its naming rule."""
    shapes = {}

    def conv(name, out_channels, in_channels, size):
        shapes[f"{name}.weight"] = (out_channels, in_channels, size, size)

    def norm(name, channels):
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{key}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    inputs = 64
    for stage, count in enumerate(layers, start=1):
        channels = 64 * 2 ** (stage - 1)
        outputs = channels * (4 if bottleneck else 1)
        sizes = [(channels, 1), (channels, 3), (outputs, 1)] if bottleneck else [(channels, 3)] * 2
        for block in range(count):
            previous = inputs
            for index, (width, size) in enumerate(sizes, start=1):
                conv(f"layer{stage}.{block}.conv{index}", width, previous, size)
                norm(f"layer{stage}.{block}.bn{index}", width)
                previous = width
            if block == 0 and (inputs != outputs or stage > 1):
                conv(f"layer{stage}.{block}.downsample.0", outputs, inputs, 1)
                norm(f"layer{stage}.{block}.downsample.1", outputs)
            inputs = outputs
    shapes["fc.weight"], shapes["fc.bias"] = (1000, inputs), (1000,)
    return shapes


@pytest.mark.parametrize("name, bottleneck, layers", [
    ("resnet18", False, (2, 2, 2, 2)), ("resnet34", False, (3, 4, 6, 3)),
    ("resnet50", True, (3, 4, 6, 3)), ("resnet101", True, (3, 4, 23, 3)),
    ("resnet152", True, (3, 8, 36, 3))])
@pytest.mark.parametrize("strides", [{}, {"layer3_stride": 1, "layer4_stride": 1}])
def test_state_dict_has_torchvision_names_whatever_the_strides(name, bottleneck, layers, strides):
    with torch.device("meta"):
        state = getattr(resnet, name)(**strides).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == \
        expected_state(bottleneck, layers)


@pytest.mark.parametrize("strides, side", [((2, 2), 2), ((2, 1), 4), ((1, 2), 4), ((1, 1), 8)])
def test_feature_map_side(strides, side):
    model = small(small_stem=False, layer3_stride=strides[0], layer4_stride=strides[1])
    assert model.forward_features(torch.zeros(2, 3, 64, 64)).shape == (2, 64, side, side)


def test_stride_sits_in_the_3x3_convolution():
    block = resnet.resnet50(width=8).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


def test_small_stem_keeps_the_resolution():
    assert small().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 4, 4)


def test_forward_is_pooled_features_times_classifier():
    model = small(in_chans=1).eval()
    x = torch.randn(3, 1, 20, 24, generator=torch.Generator().manual_seed(1))
    pooled = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(model(x), pooled @ model.fc.weight.T + model.fc.bias)
    headless = small(in_chans=1, num_classes=0).eval()
    torch.testing.assert_close(headless(x), pooled)


def test_channels_last_and_double_give_the_same_numbers():
    model = small().eval().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)


def test_residual_block_against_the_definition():
    block = small(width=4).layer2[0].eval()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (branch + block.downsample(x)).relu())


def test_initial_weights_follow_the_rule_and_the_generator():
    before = torch.get_rng_state()
    one, two = (small(width=64, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(one.conv1.weight, small(width=64).conv1.weight)
    weight = one.layer4[0].conv2.weight
    fan_out = weight.shape[0] * 9
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.01)
    assert one.fc.weight.abs().max().item() <= 1 / math.sqrt(one.num_features)
    assert torch.equal(one.layer1[0].bn2.weight, torch.ones(64))


def test_zero_init_residual_makes_every_block_the_identity():
    for block in (resnet.BasicBlock, resnet.Bottleneck):
        model = resnet.ResNet(block, (2, 1, 1, 1), width=8, zero_init_residual=True)
        x = torch.rand(1, 8 * block.expansion, 6, 6)
        torch.testing.assert_close(model.layer1[1](x), x)


@pytest.mark.parametrize("options, word", [
    ({"num_classes": -1}, "num_classes.*-1"), ({"in_chans": 0}, "in_chans.*0"),
    ({"width": 0}, "width.*0"), ({"layer3_stride": 3}, "layer3_stride.*3"),
    ({"layer4_stride": 0}, "layer4_stride.*0")])
def test_bad_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        small(**options)


def test_bad_block_counts_are_named():
    with pytest.raises(ValueError, match="layers.*four"):
        resnet.ResNet(resnet.BasicBlock, (1, 1, 1))
