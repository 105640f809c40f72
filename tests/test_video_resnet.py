"""The video networks: sizes, published names and counts, what they see, and inflation of 2-D
weights."""

import pytest
import torch
from torch import nn

from reference import resnet
from reference import video_resnet as vr

FACTORIES = [vr.slowonly18, vr.slowfast18, vr.r2plus1d18, vr.tsm18]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("factory, count",
                         [(vr.slowonly50, 32_454_096), (vr.slowfast50, 34_566_488),
                          (vr.r2plus1d18, 31_505_325), (vr.tsm50, 24_327_632)])
def test_published_parameter_counts(factory, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in factory().parameters()) == count


def test_published_names():
    with torch.device("meta"):
        slow, both, split = (model.state_dict()
                             for model in (vr.slowonly50(), vr.slowfast50(), vr.r2plus1d18()))
        shapes = {name: tuple(value.shape) for state in (both, slow, split)
                  for name, value in state.items()}
        assert {k: v.shape for k, v in vr.tsm50(1000).state_dict().items()} == {
            k: v.shape for k, v in resnet.resnet50().state_dict().items()
        }
        assert {k: v.shape for k, v in vr.tsm18(1000).state_dict().items()} == {
            k: v.shape for k, v in resnet.resnet18().state_dict().items()
        }
    assert (len(slow), len(both), len(split)) == (320, 662, 224)
    for name, shape in {
        "blocks.0.conv.weight": (64, 3, 1, 7, 7),
        "blocks.0.norm.running_var": (64,),
        "blocks.3.res_blocks.5.branch2.conv_a.weight": (256, 1024, 3, 1, 1),
        "blocks.4.res_blocks.0.branch1_conv.weight": (2048, 1024, 1, 1, 1),
        "blocks.5.proj.weight": (400, 2048),
        "blocks.0.multipathway_blocks.1.conv.weight": (8, 3, 5, 7, 7),
        "blocks.0.multipathway_fusion.conv_fast_to_slow.weight": (16, 8, 7, 1, 1),
        "blocks.2.multipathway_blocks.0.res_blocks.0.branch1_conv.weight": (512, 320, 1, 1, 1),
        "blocks.6.proj.weight": (400, 2304),
        "stem.0.weight": (45, 3, 1, 7, 7),
        "layer2.0.conv1.0.0.weight": (230, 64, 1, 3, 3),
        "layer2.0.conv1.0.3.weight": (128, 230, 3, 1, 1),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1, 1),
    }.items():
        assert shapes[name] == shape, name
    tsm = {"module.base_model.layer1.0.conv1.net.weight": 1, "module.base_model.bn1.weight": 2,
           "module.new_fc.weight": 3}
    assert vr.tsm_names(tsm) == {"layer1.0.conv1.weight": 1, "bn1.weight": 2, "fc.weight": 3}


@pytest.mark.parametrize("factory", FACTORIES)
def test_forward_backward_and_reproducible_start(factory):
    before = torch.get_rng_state()
    a, b = (factory(5, width=8, small_stem=True, generator=seeded()) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(torch.get_rng_state(), before)
    clips = torch.randn(2, 3, 8, 32, 32, generator=seeded())
    logits = a(clips)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in a.parameters())
    features = a.forward_features(clips)
    shapes = {vr.slowonly18: (2, 64, 8, 4, 4), vr.r2plus1d18: (2, 64, 1, 4, 4),
              vr.tsm18: (2, 64, 8, 4, 4)}
    if factory is vr.slowfast18:
        assert [tuple(f.shape) for f in features] == [(2, 64, 2, 4, 4), (2, 8, 8, 4, 4)]
    else:
        assert features.shape == shapes[factory]
    half = factory(5, width=8, small_stem=True).bfloat16()(clips.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize("factory", [vr.slowonly18, vr.r2plus1d18, vr.tsm18])
def test_the_classifier_may_be_replaced(factory):
    model = factory(5, width=8, small_stem=True)
    model.fc = torch.nn.Linear(64, 3)
    assert model(torch.zeros(2, 3, 8, 32, 32)).shape == (2, 3) and model.fc.out_features == 3
    assert len({name for name, p in model.named_parameters() if p.shape == (3, 64)}) == 1


def test_every_residual_block_starts_as_the_identity():
    model = vr.slowonly18(3, width=8, generator=seeded())
    norms = [m.last_norm.weight for m in model.modules() if isinstance(m, vr.Branch)]
    assert len(norms) == 8 and all((w == 0).all() for w in norms)
    assert model.fc.weight.std() < 0.02 and (model.fc.bias == 0).all()


def test_slowfast_pathways():
    model = vr.slowfast18(3, width=8, alpha=4, small_stem=True).eval()
    fast = torch.randn(2, 3, 8, 16, 16, generator=seeded())
    slow = fast[:, :, ::4]
    together = model(fast)
    assert torch.equal(model((slow, fast)), together) and torch.equal(model(slow, fast), together)
    for bad in ((fast, fast), (slow[:1], fast), (slow[..., :8], fast)):
        with pytest.raises(ValueError, match="4 times the frames"):
            model(bad)
    with pytest.raises(ValueError, match="multiple of 8"):
        vr.slowfast18(width=4)


def test_temporal_shift():
    x = torch.arange(2 * 4 * 8).float().view(2, 4, 8, 1, 1)
    out = vr.temporal_shift(x)
    assert torch.equal(out[:, :3, 0], x[:, 1:, 0]) and (out[:, 3, 0] == 0).all()
    assert (torch.equal(out[:, 1:, 1], x[:, :3, 1]) and (out[:, 0, 1] == 0).all()
            and torch.equal(out[:, :, 2:], x[:, :, 2:]))


@pytest.mark.parametrize("factory", FACTORIES)
def test_time_matters(factory):
    """A clip and its reverse have the same frames; the networks tell them apart."""
    model = factory(4, width=8, small_stem=True, generator=seeded()).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.weight.fill_(1.0)
        x = torch.randn(1, 3, 8, 16, 16, generator=seeded(1))
        assert (model(x) - model(x.flip(2))).abs().max() > 1e-4


@pytest.mark.parametrize("depth, plain", [(18, resnet.resnet18), (50, resnet.resnet50)])
def test_inflation(depth, plain):
    source = plain(7, width=8, generator=seeded()).eval()
    for name, buffer in source.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5, generator=seeded(2))
    model = vr.SlowOnly(depth, 7, width=8).eval()
    assert vr.inflate(model, source.state_dict(), "center") == []
    clip = torch.randn(1, 3, 4, 64, 64, generator=seeded(3))
    frames = torch.stack([source.forward_features(clip[:, :, t]) for t in range(4)], 2)
    assert (model.forward_features(clip) - frames).abs().max() < 1e-4 * frames.abs().max()
    vr.inflate(model, source.state_dict())
    kernel = model.blocks[4].res_blocks[0].branch2.conv_a.weight
    original = source.layer4[0].conv1.weight
    assert torch.allclose(kernel.sum(2), original, atol=1e-6) and torch.equal(
        kernel[:, :, 0], kernel[:, :, 2]
    )
    other = vr.SlowOnly(depth, 3, width=8)
    assert vr.inflate(other, source.state_dict()) == ["blocks.5.proj.weight", "blocks.5.proj.bias"]


def test_bad_input():
    for call, words in [(lambda: vr.SlowOnly(101), "depth"),
                        (lambda: vr.SlowOnly(num_classes=0), "num_classes"),
                        (lambda: vr.TSM(width=0), "width"), (lambda: vr.R2Plus1D(50), "depth"),
                        (lambda: vr.slowonly18(2, width=8)(torch.zeros(3, 4, 16, 16)),
                         r"\(B, 3, T, H, W\)"),
                        (lambda: vr.tsm18(2, width=8)(torch.zeros(1, 4, 4, 16, 16)),
                         r"\(B, 3, T, H, W\)"),
                        (lambda: vr.slowfast18(2, width=8, fusion_kernel=4), "fusion_kernel"),
                        (lambda: vr.inflate(vr.slowonly18(2, width=8), {"x": torch.zeros(1)}),
                         "no parameter fits"),
                        (lambda: vr.inflate(vr.slowonly18(2, width=8), {}, "sum"), "mode")]:
        with pytest.raises(ValueError, match=words):
            call()
