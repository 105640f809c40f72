"""VGG: published sizes, torchvision's names and shapes, initial weights, the embeddings."""

import doctest

import pytest
import torch

from reference import vgg

PUBLISHED = {"vgg11": 132_863_336, "vgg13": 133_047_848, "vgg16": 138_357_544, "vgg19": 143_667_240}


def small(**options):
    return vgg.vgg16(10, **{"fc2": 12, "width": 2, "hidden": 16, "side": 32, "seed": 0} | options)


def test_docstring_example():
    assert doctest.testmod(vgg).failed == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in getattr(vgg, name)().parameters()) == PUBLISHED[name]


def test_state_dict_has_torchvision_names_and_shapes():
    convolutions = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128),
                    12: (256, 256), 14: (256, 256),
                    17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512),
                    28: (512, 512)}
    expected = {}
    for index, (outputs, inputs) in convolutions.items():
        expected[f"features.{index}.weight"] = (outputs, inputs, 3, 3)
        expected[f"features.{index}.bias"] = (outputs,)
    for index, (outputs, inputs) in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
        expected[f"classifier.{index}.weight"] = (outputs, inputs)
        expected[f"classifier.{index}.bias"] = (outputs,)
    with torch.device("meta"):
        state = vgg.vgg16().state_dict()
        normed = vgg.vgg16(batch_norm=True).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert normed["features.40.weight"].shape == (512, 512, 3, 3)
    assert normed["features.41.running_var"].shape == (512,)


def test_forward_is_features_pooling_and_three_layers():
    model, x = small().eval(), torch.randn(2, 3, 70, 96, generator=torch.Generator().manual_seed(1))
    maps = model.forward_features(x)
    assert maps.shape == (2, 16, 2, 3)
    first, second, last = (model.classifier[i] for i in (0, 3, 6))
    embedding = second(first(maps.mean((2, 3))).relu()).relu()
    torch.testing.assert_close(model.embed(x), embedding)
    torch.testing.assert_close(model(x), last(embedding))


def test_the_classifier_may_be_replaced_hooked_and_traced():
    model, images, seen = small().eval(), torch.rand(2, 3, 32, 32), []
    model.classifier.register_forward_hook(lambda module, inputs, out: seen.append(out))
    logits = model(images)
    assert seen == [logits]
    assert torch.equal(torch.fx.symbolic_trace(model)(images), logits)
    model.classifier = torch.nn.Linear(16, 3)
    assert model(images).shape == (2, 3)


def test_initial_weights_follow_the_rule_and_the_seed():
    one, two, other = (small(width=16, hidden=512, **seed) for seed in ({}, {}, {"seed": 1}))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.features[0].weight, other.features[0].weight)
    assert one.features[28].weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert one.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not one.classifier[3].bias.any()
    before = torch.get_rng_state()
    small(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_random_embedding_is_reproducible_and_resizes():
    images = torch.randint(256, (3, 3, 40, 52), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    embed, again = (vgg.r64(5, 32, width=4, hidden=32) for _ in range(2))
    features = embed(images)
    assert features.shape == (3, 64) and features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(features, again(images)) and features.min() >= 0 and features.std() > 0
    same = torch.nn.functional.interpolate(images / 255, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(embed.model.embed((same - embed.mean) / embed.std), features)
    low = again.to(torch.bfloat16)(images)
    assert low.dtype == torch.bfloat16 and (low - features).norm() < 0.05 * features.norm()
    assert torch.equal(vgg.Embedding(embed.model.to(torch.bfloat16), 32)(images), low)
    for wrong in (images.float(), images[0], images[:, :2], images.numpy()):
        with pytest.raises(TypeError, match=r"images must be \(B, 3, H, W\) uint8 tensors"):
            embed(wrong)


@pytest.mark.parametrize("options, words", [
    ({"depth": 12}, "depth.*11, 13, 16, 19.*12"), ({"fc2": 0}, "fc2.*0"),
    ({"width": 0}, "width.*0"), ({"width": 2.5}, "width must be an integer.*2.5"),
    ({"side": 31}, "side.*31"), ({"hidden": 0}, "hidden.*0"),
    ({"num_classes": 0}, "num_classes.*0")], ids=str)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        vgg.VGG(**{"width": 2, "hidden": 4, "fc2": 4, "side": 32} | options)
