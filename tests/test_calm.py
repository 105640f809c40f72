import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from reference import calm
from reference.calm import CALM, CALMHead, CALMOutput, CAMHead, CAMOutput, calm_loss

GOLDEN = Path(__file__).parent / "golden" / "calm"
HEADS = ("head_small.npz", "head_mid.npz", "head_float64.npz", "head_dead_locations.npz")


def load(name):
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(a.detach().numpy() if isinstance(a, torch.Tensor) else a, b,
                               rtol=rtol, atol=atol)


def head_of(g, kind, dtype):
    channels, classes = g["feat"].shape[1], g["cls_weight"].shape[0]
    make = {"cam": CAMHead, "official": CALMHead.official, "paper": CALMHead}[kind]
    head = make(channels, classes).to(dtype)
    state = {"cls.weight": g["cls_weight"][:, :, None, None], "cls.bias": g["cls_bias"]}
    if kind != "cam":
        state |= {"att.weight": g["att_weight"][:, :, None, None], "att.bias": g["att_bias"]}
    head.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return head


def leaves(features, head):
    """{name in the fixtures: tensor that gets a gradient}."""
    named = {f"{name}_{kind}": getattr(part, kind) for name, part in head.named_children()
             for kind in ("weight", "bias")}
    return {"feat": features, **named}


def random_output(seed=0, batch=3, classes=5, size=(4, 6), dtype=torch.float64, **options):
    g = seeded(seed)
    return CALMOutput(torch.randn(batch, classes, *size, generator=g, dtype=dtype),
                      torch.randn(batch, 1, *size, generator=g, dtype=dtype), **options)


# ---------------------------------------------------------------- values of the released code


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", ["cam", "em", "ml"])
def test_losses_probabilities_and_gradients_of_the_released_code(name, method):
    g = load(name)
    dtype = torch.float64 if g["feat"].dtype == np.float64 else torch.float32
    head = head_of(g, "cam" if method == "cam" else "official", dtype)
    labels = torch.from_numpy(g["labels"])
    features = torch.from_numpy(g["feat"]).requires_grad_()
    output = head(features)
    close(output.probs(), g[f"{method}_probs"])
    loss = calm_loss(output, labels, method)
    close(loss, g[f"{method}_loss"])
    loss.backward()
    for key, value in leaves(features, head).items():
        expected = g[f"{method}_grad_{key}"]
        close(value.grad.reshape(expected.shape), expected, 1e-4, 1e-6)
    if method != "cam":
        inputs = output.log_probs()
        if method == "em":
            everything = torch.arange(head.cls.out_channels).expand(len(labels), -1)
            inputs = (output.posterior(everything) * output.log_joint()).sum((2, 3))
        close(inputs, g[f"{method}_inputs"], 1e-4, 1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_maps_of_the_released_code(name):
    g = load(name)
    dtype = torch.float64 if g["feat"].dtype == np.float64 else torch.float32
    features, labels = torch.from_numpy(g["feat"]), torch.from_numpy(g["labels"])
    output, cam = head_of(g, "official", dtype)(features), head_of(g, "cam", dtype)(features)
    close(output.logits, g["location_logits"])
    close(calm.attribution_map(output, None, "prior"), g["map_saliency"])
    close(calm.attribution_map(output, labels, "posterior"), g["map_gtcond"])
    close(calm.attribution_map(output, labels), g["map_jointll"])
    close(calm.attribution_map(cam, labels, "cam"), g["map_vanilla"])
    rows = {c: row.tolist() for c, row in enumerate(g["superclass"])}
    for kind, key in (("joint", "jointll"), ("posterior", "gtcond")):
        close(calm.superclass_map(output, rows, kind, labels=labels), g[f"map_{key}_superclass"])
        listed = torch.from_numpy(g["superclass"])[labels]
        close(calm.superclass_map(output, listed, kind, "mean"), g[f"map_{key}_superclass_mean"])
    both = calm.superclass_map(cam, rows, "cam", labels=labels)
    close(both, g["map_vanilla_superclass"], 1e-4, 1e-5)
    if np.isfinite(g["map_vanilla_saliency"]).all():
        everything = [list(range(g["cls_weight"].shape[0]))] * len(labels)
        close(calm.superclass_map(cam, everything, "cam"), g["map_vanilla_saliency"], 1e-4, 1e-5)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", ["em", "ml"])
def test_the_papers_formulas_in_float64(name, method):
    g = load(name)
    head, labels = head_of(g, "paper", torch.float64), torch.from_numpy(g["labels"])
    features = torch.from_numpy(g["feat"]).double().requires_grad_()
    output = head(features)
    close(output.joint(), g["paper_joint"], 1e-9, 1e-14)
    close(output.probs(), g["paper_probs"], 1e-9, 1e-14)
    close(output.prior(), g["paper_prior"][:, 0], 1e-9, 1e-14)
    loss = calm_loss(output, labels, method)
    close(loss, g[f"paper_{method}_loss"], 1e-9)
    loss.backward()
    for key, value in leaves(features, head).items():
        expected = g[f"paper_{method}_grad_{key}"]
        close(value.grad.reshape(expected.shape), expected, 1e-8, 1e-13)


@pytest.mark.parametrize("method", ["cam", "em", "ml"])
def test_training_steps_of_the_released_code(method):
    g = load(f"train_{method}.npz")
    back = nn.Conv2d(3, g["back_weight0"].shape[0], 3, padding=1)
    classes, channels = g["cls_weight0"].shape[:2]
    head = (CAMHead if method == "cam" else CALMHead.official)(channels, classes)
    model = CALM(nn.Sequential(back, nn.ReLU()), head)
    parts = {"back": back, "cls": head.cls, **({} if method == "cam" else {"att": head.att})}
    for name, part in parts.items():
        part.load_state_dict({key: torch.from_numpy(g[f"{name}_{key}0"])
                              for key in ("weight", "bias")})
    loader = list(zip(torch.from_numpy(g["images"]), torch.from_numpy(g["labels"])))
    steps = list(calm.train(model, loader, 1, method=method, lr=float(g["lr"]),
                            head_ratio=float(g["ratio"])))
    close([s["loss"] for s in steps], g["losses"], 1e-4, 1e-5)
    assert [round(6 * s["accuracy"]) for s in steps] == g["correct"].tolist()
    for name, part in parts.items():
        for key in ("weight", "bias"):
            close(getattr(part, key), g[f"{name}_{key}1"], 1e-3, 1e-5)


def test_bird_parts_of_the_released_code():
    g = load("cub_trait.npz")
    names = [str(n) for n in g["attribute_names"]]
    groups = {}
    for row, (a, b) in enumerate(g["pairs"]):
        groups[row] = calm.differing_part_groups(g["class_attribute_continuous"][a - 1],
                                                 g["class_attribute_continuous"][b - 1], names)
        assert groups[row] == (np.flatnonzero(g["pair_part_membership"][row]) + 1).tolist()
        assert len(groups[row]) == g["pair_num_diff"][row]
    label_maps = []
    for image, (w, h) in enumerate(g["image_sizes_wh"]):
        rows = g["part_locs"][g["part_locs"][:, 0] == image + 1]
        points, ids = calm.merge_cub_parts(rows[rows[:, 1].argsort()][:, 2:], w, h)
        np.testing.assert_array_equal(points.numpy(), g[f"union_coords_{image}"])
        np.testing.assert_array_equal(ids.numpy(), g[f"union_ids_{image}"])
        label_maps.append((calm.part_label_map(points, ids), ids))
    for (pair, image), none, mask in zip(g["mask_pair_image"], g["mask_is_none"], g["masks"]):
        labels, ids = label_maps[image]
        assert none == (not set(ids.tolist()) & set(groups[pair]))
        if not none:
            w, h = g["image_sizes_wh"][image]
            cue = calm.cue_mask(labels, g["segmentations_padded"][image][:h, :w], groups[pair])
            np.testing.assert_array_equal(cue.numpy(), mask.astype(bool))


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("options", [
    {}, {"prior_activation": "relu"}, {"prior_activation": "exp"},
    {"prior_activation": "relu", "detach_normalizer": True, "epsilons": True}])
def test_probabilities_add_up(options):
    output = random_output(**options)
    joint = output.joint()
    one = torch.ones(3, dtype=torch.float64)
    assert torch.allclose(joint.sum((1, 2, 3)), one)
    assert torch.allclose(joint.sum(1), output.prior())
    assert torch.allclose(joint.sum((2, 3)), output.probs())
    assert torch.allclose(output.log_probs().exp(), output.probs())
    assert torch.allclose(output.posterior(2).sum((1, 2)), one)
    assert torch.allclose(output.prior().sum((1, 2)), one)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 4]])
    assert torch.allclose(output.joint(pairs)[1, 1], joint[1, 3])
    assert output.posterior(pairs).shape == (3, 2, 4, 6)
    difference = calm.counterfactual_map(output, 0, torch.tensor([1, 2, 3]))
    assert torch.equal(difference, -calm.counterfactual_map(output, torch.tensor([1, 2, 3]), 0))
    assert torch.equal(calm.counterfactual_map(output, 0, 1, mode="abs"),
                       calm.counterfactual_map(output, 0, 1).abs())
    assert (calm.counterfactual_map(output, 0, 1, mode="positive") >= 0).all()
    both = calm.superclass_map(output, [[0, 1, 2, 3, 4]] * 3)
    assert torch.allclose(both, output.prior())
    both = calm.superclass_map(output, [[0], [1, 2], [3]])[1]
    assert torch.allclose(both, joint[1, 1] + joint[1, 2])


def test_em_and_ml_have_the_same_gradient_and_differ_by_the_entropy():
    labels = torch.tensor([0, 3, 2])
    for options in ({}, {"prior_activation": "relu", "detach_normalizer": True},
                    {"prior_activation": "exp"}):
        gradients, values = [], []
        for method in ("em", "ml"):
            output = random_output(**options)
            logits, attention = output.logits.requires_grad_(), output.attention.requires_grad_()
            loss = calm_loss(CALMOutput(logits, attention, **options), labels, method,
                             reduction="sum")
            gradients.append(torch.autograd.grad(loss, [logits, attention]))
            values.append(loss)
        for a, b in zip(*gradients):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
        entropy = torch.special.entr(random_output(**options).posterior(labels)).sum()
        assert values[0].item() == pytest.approx((values[1] + entropy).item(), rel=1e-6)


def test_gradients_in_closed_form():
    output, labels = random_output(), torch.tensor([1, 0, 4])
    logits, attention = output.logits.requires_grad_(), output.attention.requires_grad_()
    output = CALMOutput(logits, attention)
    df, du = torch.autograd.grad(calm_loss(output, labels, "ml", reduction="sum"),
                                 [logits, attention])
    q, g = output.posterior(labels), logits.softmax(1)
    onehot = nn.functional.one_hot(labels, 5).double()[:, :, None, None]
    assert torch.allclose(df, q.unsqueeze(1) * (g - onehot))
    a = nn.functional.softplus(attention)
    assert torch.allclose(du[:, 0], (output.prior() - q) * (attention.sigmoid() / a)[:, 0])
    official = CALMOutput(logits, attention, "relu", True, True)
    _, du = torch.autograd.grad(calm_loss(official, labels, "ml", reduction="sum"),
                                [logits, attention])
    assert torch.allclose((attention * du).sum((1, 2, 3)), -torch.ones(3).double())
    assert torch.autograd.gradcheck(
        lambda f, u: CALMOutput(f, u).log_joint(torch.tensor([[0, 1], [2, 2], [4, 0]])),
        (logits, attention))


def test_constants_do_not_change_maps_and_extremes_stay_finite():
    output = random_output()
    shifted = CALMOutput(
        output.logits + torch.randn(3, 1, 4, 6, generator=seeded(5), dtype=torch.float64),
        output.attention)
    assert torch.allclose(shifted.joint(), output.joint())
    low = torch.full((2, 1, 3, 3), -200.0, requires_grad=True)
    low.data[0, 0, 1, 1] = -100
    extreme = CALMOutput(1e4 * torch.randn(2, 4, 3, 3, generator=seeded()), low)
    loss = calm_loss(extreme, torch.tensor([0, 1]))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, low)[0].isfinite().all()
    assert extreme.prior()[0, 1, 1] == 1
    tied = CALMOutput(torch.full((1, 3, 2, 2), 1e4).requires_grad_(), torch.zeros(1, 1, 2, 2))
    loss = calm_loss(tied, torch.tensor([1]), "ml")
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)                    # no digit lost
    assert torch.autograd.grad(loss, tied.logits)[0].sum(1).abs().max() < 1e-7
    deep = CALMOutput(torch.zeros(1, 2, 3, 3), -1e4 - torch.rand(1, 1, 3, 3, generator=seeded()))
    assert abs(deep.prior().sum() - 1) < 1e-5
    for head in (CALMHead.official(2, 3), CALMHead(2, 3, "relu")):
        dead = head(torch.zeros(2, 2, 4, 4))
        dead.attention.data.sub_(1)
        dead = CALMOutput(dead.logits.detach().requires_grad_(),
                          dead.attention.detach().requires_grad_(), "relu", head.detach_normalizer,
                          head.epsilons)
        loss = calm_loss(dead, torch.tensor([0, 2]))
        grads = torch.autograd.grad(loss, [dead.logits, dead.attention])
        assert torch.allclose(dead.prior(), torch.full((2, 4, 4), 1 / 16))
        assert grads[0].isfinite().all()
        assert not grads[1].any()


def test_half_precision_is_computed_in_float32():
    output = random_output(dtype=torch.float32)
    half = CALMOutput(output.logits.bfloat16(), output.attention.bfloat16())
    assert half.joint().dtype == torch.float32
    assert (half.probs() - output.probs()).abs().max() < 0.02


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_that_was_read_without_gradients_still_has_them(mode):
    given, labels = random_output(), torch.tensor([0, 3, 2])
    given = given.logits.requires_grad_(), given.attention.requires_grad_()
    output = CALMOutput(*given)
    with mode():
        calm_loss(output, labels), output.posterior(labels), output.joint(labels)
    fresh = torch.autograd.grad(calm_loss(CALMOutput(*given), labels), given)
    for a, b in zip(torch.autograd.grad(calm_loss(output, labels), given), fresh):
        assert torch.equal(a, b)


def test_e_steps_from_elsewhere():
    labels = torch.tensor([0, 3, 2])
    output, older = random_output(), random_output(seed=9)
    frozen = calm_loss(output, labels, posterior=older.posterior(labels))
    assert frozen.item() == pytest.approx(-(older.posterior(labels)
                                            * output.log_joint(labels)).sum((1, 2)).mean().item())
    best = -output.log_joint(labels).flatten(1).amax(1)
    assert torch.allclose(calm_loss(output, labels, hard=True, reduction="none"), best)
    assert torch.allclose(calm_loss(output, labels, temperature=1e-6, reduction="none"), best)
    assert torch.allclose(calm_loss(output, labels, temperature=1.0), calm_loss(output, labels))
    flat = calm_loss(output, labels, temperature=1e6, reduction="none")
    assert torch.allclose(flat, -output.log_joint(labels).mean((1, 2)), rtol=1e-4)
    given = older.posterior(labels)
    at = given.flatten(1).argmax(1)
    hard = calm_loss(output, labels, posterior=given, hard=True, reduction="none")
    assert torch.allclose(hard, -output.log_joint(labels).flatten(1)[torch.arange(3), at])


def test_an_averaged_e_step_is_another_algorithm_and_resumes():
    g = seeded(3)
    loader = [(torch.randn(4, 3, 6, 6, generator=g), torch.randint(3, (4,), generator=g))
              for _ in range(4)]

    def train(resume=None, **options):
        model = net(0 if resume is None else 7)
        model.backbone.append(nn.BatchNorm2d(6))
        model.train(resume is None)                           # the mode before makes no difference
        return calm.train(model, loader, 2, lr=0.1, resume=resume, **options)

    def losses(*args, **options):
        return [step["loss"] for step in train(*args, **options)]

    online, averaged = losses(), losses(ema=0.9)
    assert online[0] == averaged[0] and online != averaged and losses(hard=True) != online
    steps = train(ema=0.9)
    for _ in range(3):
        next(steps)
    assert losses(steps.send("state"), ema=0.9) == averaged[3:]
    model = net(0)
    model.backbone.append(nn.BatchNorm2d(6))
    steps = calm.train(model, loader, 2, lr=0.1)              # back in training mode every time
    assert [(step["loss"], model.eval())[0] for step in steps] == online


def test_second_derivatives_and_memory_of_the_label_only_loss(monkeypatch):
    output = random_output(classes=3, size=(2, 2))
    logits, attention = output.logits.requires_grad_(), output.attention.requires_grad_()
    classes = torch.tensor([[0, 1], [2, 2], [1, 0]])
    assert torch.autograd.gradgradcheck(lambda f, u: CALMOutput(f, u).log_joint(classes),
                                        (logits, attention))

    monkeypatch.setattr(calm, "BLOCK", 100 * 14 * 14)
    logits, attention = (torch.randn(32, c, 14, 14, generator=seeded(), requires_grad=True)
                         for c in (100, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        torch.autograd.grad(calm_loss(CALMOutput(logits, attention), torch.arange(32)),
                            (logits, attention))
    events = profile.profiler.kineto_results.events()
    held = np.cumsum([e.nbytes() for e in events if e.name() == "[memory]"])
    assert held.max() < 1.25 * logits.numel() * 4  # one gradient, and little else


def test_heads_take_any_layout_and_autocast():
    head, features = CALMHead(4, 3), torch.randn(2, 4, 5, 6, generator=seeded())
    expected = head(features).joint()
    channels_last = head(features.to(memory_format=torch.channels_last))
    assert torch.allclose(channels_last.joint(), expected, atol=1e-6)
    turned = head(features.transpose(2, 3)).joint()
    assert torch.allclose(turned, expected.transpose(2, 3), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        output, pooled = head(features), CAMHead(4, 3)(features).pooled()
        probs = output.probs()
    assert output.joint().dtype == pooled.dtype == probs.dtype == torch.float32
    assert torch.allclose(probs, output.joint().sum((2, 3)), atol=1e-6)
    assert (output.joint() - expected).abs().max() < 0.01
    single = CALMHead(4, 1)(features)
    assert torch.allclose(single.joint(0), single.prior())
    batch = (torch.randn(2, 3, 6, 6, generator=seeded()), torch.tensor([0, 1]))
    step = next(calm.train(net(), [batch], 1, amp_dtype=torch.bfloat16))
    assert np.isfinite(step["loss"])


def test_heads_use_their_convolutions_as_modules():
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.more = inner, nn.Conv2d(6, 3, 1)

        def forward(self, features):
            return self.inner(features) + self.more(features)

    model, images = net(), torch.randn(2, 3, 6, 6, generator=seeded(1))
    model.head.cls = Adapter(model.head.cls)
    prune.l1_unstructured(model.head.att, "weight", 0.5)      # a hook makes the weight
    for _ in range(2):
        model.zero_grad()
        calm_loss(model(images), torch.tensor([0, 2])).backward()
    assert model.head.cls.more.weight.grad.any()
    features, output = model.backbone(images), model(images)
    close(output.logits, model.head.cls(features).detach().numpy())
    with pytest.raises(ValueError, match="features must be"):
        model.head(features[0])


def test_the_loss_goes_through_torch_func():
    model, images, labels = net(), torch.randn(2, 3, 6, 6, generator=seeded(1)), torch.arange(2)

    def loss(parameters):
        return calm_loss(torch.func.functional_call(model, parameters, (images,)), labels)

    loss(dict(model.named_parameters())).backward()
    for name, gradient in torch.func.grad(loss)(dict(model.named_parameters())).items():
        close(gradient, model.get_parameter(name).grad.numpy())


def test_the_released_prior_stays_finite_where_all_evidence_underflows():
    logits = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    logits = logits.clone().requires_grad_()
    output = CALMOutput(logits, torch.tensor([[[[1.0, -1.0], [0.0, 2.0]]]]), "relu", True, True)
    for method in ("em", "ml"):
        loss = calm_loss(output, torch.tensor([0]), method)
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


WORDNET = ["animal bird", "animal mammal", "bird robin", "bird eagle", "mammal dog", "dog poodle",
           "dog pug", "pet pug", "thing pet", "thing animal"]


def test_superclasses_of_wordnet():
    classes = ["robin", "eagle", "poodle", "pug", "mammal"]
    for top, expected in [("bird", [[0, 1], [0, 1], [2], [3], [4]]), (0, [[0, 1, 2, 3, 4]] * 5),
                          (2, [[0, 1], [0, 1], [2, 3, 4], [2, 3, 4], [2, 3, 4]]),
                          (3, [[0], [1], [2, 3], [2, 3], [4]])]:  # pug: by its shortest way
        groups = calm.wordnet_superclasses(iter(WORDNET), classes, top)
        assert groups == dict(enumerate(expected)), top
    groups = calm.wordnet_superclasses(WORDNET, classes, 2)
    output = random_output()
    maps = calm.superclass_map(output, groups, labels=torch.tensor([0, 2, 3]))
    assert torch.allclose(maps[1], output.joint(torch.tensor([[2, 3, 4]] * 3)).sum(1)[1])


def two_processes(rank, folder, result):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous",
                                         rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(net(), find_unused_parameters=True)
    mine = [(images[rank::2], labels[rank::2]) for images, labels in batches()]
    list(calm.train(model, mine, 1, lr=0.1))
    if rank == 0:
        torch.save(model.module.state_dict(), result)
    torch.distributed.destroy_process_group()
    os._exit(0)                  # gloo's threads can abort the interpreter's end: see the harness


def batches():
    g = seeded(4)
    return [(torch.randn(4, 3, 6, 6, generator=g), torch.randint(3, (4,), generator=g))
            for _ in range(3)]


def test_two_processes_train_like_one(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path), str(tmp_path / "model.pt")),
                                nprocs=2)
    model = net()
    list(calm.train(model, batches(), 1, lr=0.1))
    for key, value in torch.load(tmp_path / "model.pt", weights_only=True).items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key


def net(seed=0, head=CALMHead):
    g = seeded(seed)
    model = CALM(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()), head(6, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model


def test_training_resumes_exactly_and_groups_parameters():
    g = seeded(3)
    loader = [(torch.randn(4, 3, 6, 6, generator=g), torch.randint(3, (4,), generator=g))
              for _ in range(5)]
    whole = list(calm.train(net(), loader, 3, lr_decay_epochs=2))
    assert [round(s["lr"], 6) for s in whole[::5]] == [0.01, 0.001, 0.001]
    assert whole[-1]["loss"] < whole[0]["loss"]
    steps = calm.train(net(), loader, 3, lr_decay_epochs=2)
    for _ in range(7):
        next(steps)
    buffer = io.BytesIO()
    torch.save(steps.send("state"), buffer)
    buffer.seek(0)
    snapshot = torch.load(buffer, weights_only=True)
    rest = list(calm.train(net(5), loader, 3, lr_decay_epochs=2, resume=snapshot))
    assert rest == whole[7:]
    cam = list(calm.train(net(head=CAMHead), loader, 1, method="cam"))
    assert all(np.isnan(s["prior_entropy"]) for s in cam)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer3, self.layer4 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    model = CALM(Body(), CALMHead(4, 2))
    base, rest = calm.param_groups(model, 0.1)
    assert [p.shape for p in base["params"]] == [(4, 3, 1, 1), (4,)]
    assert len(rest["params"]) == 6
    assert rest["lr"] == pytest.approx(1.0)


# ---------------------------------------------------------------- bad input


def test_bad_input():
    output, labels = random_output(), torch.tensor([0, 3, 2])
    cam = CAMOutput(output.logits)
    bad = random_output()
    bad.logits[0, 0, 0, 0] = float("nan")
    for value in (float("inf"), -float("inf")):               # -inf: a probability of 0, if let in
        for part in (0, 1):
            given = [t.clone() for t in (output.logits, output.attention)]
            given[part][0, -1, 0, 0] = value
            for kind in ("em", "ml", "joint", "posterior", "prior", "cam"):
                function = calm_loss if kind in ("em", "ml") else calm.attribution_map
                with pytest.raises(ValueError, match="not finite"):
                    function(CALMOutput(*given), labels, kind)
        with pytest.raises(ValueError, match="not finite"):
            given[0][0, -1, 0, 0] = value
            calm_loss(CAMOutput(given[0]), labels, "cam")
    for call, error, words in [
        (lambda: calm_loss(output, labels + 3), ValueError, "0..4"),
        (lambda: calm_loss(output, labels[:2]), ValueError, "labels must be"),
        (lambda: calm_loss(output, labels.int()), TypeError, "int64"),
        (lambda: calm_loss(output, labels, "map"), ValueError, "method"),
        (lambda: calm_loss(cam, labels, "em"), ValueError, "CAMOutput"),
        (lambda: calm_loss(output, labels, "cam"), ValueError, "CALMOutput"),
        (lambda: calm_loss(output, labels, reduction="max"), ValueError, "reduction"),
        (lambda: calm_loss(output, labels, temperature=0), ValueError, "temperature"),
        (lambda: calm_loss(output, labels, posterior=torch.zeros(3, 4)), ValueError, "posterior"),
        (lambda: calm_loss(output, labels, posterior=output.prior() - 1), ValueError, "negative"),
        (lambda: calm_loss(output.logits, labels), TypeError, "output must be"),
        (lambda: calm_loss(CALMOutput(bad.logits, bad.attention), labels), ValueError,
         "not finite"),
        (lambda: CALMHead(4, 3)(torch.zeros(2, 5, 3, 3)), ValueError, r"\(B, 4, H, W\)"),
        (lambda: CAMHead(4, 3)(torch.zeros(4, 3, 3)), ValueError, "features"),
        (lambda: CALMHead(4, 3, "sigmoid"), ValueError, "prior_activation"),
        (lambda: CALMHead(0, 3), ValueError, "positive"),
        (lambda: CALMOutput(output.logits, output.attention[:, :, :2]), ValueError, "attention"),
        (lambda: calm.attribution_map(output, 5), ValueError, "0..4"),
        (lambda: calm.attribution_map(output, 1, "gradient"), ValueError, "kind"),
        (lambda: calm.attribution_map(cam, 1), ValueError, "CALM head"),
        (lambda: calm.attribution_map(output, None), TypeError, "classes must be given"),
        (lambda: calm.attribution_map(output.logits, 1), TypeError, "output must be"),
        (lambda: calm.attribution_map(output, labels.float()), TypeError, "integers"),
        (lambda: calm.counterfactual_map(output, 0, 1, mode="both"), ValueError, "mode"),
        (lambda: calm.superclass_map(output, [[0], [], [1]]), ValueError, "non-empty"),
        (lambda: calm.superclass_map(output, labels), ValueError, "non-empty"),
        (lambda: calm.superclass_map(output.logits, [[0]] * 3), TypeError, "output must be"),
        (lambda: calm.superclass_map(output, [[0.5]] * 3), TypeError, "integers"),
        (lambda: calm.superclass_map(output, {0: [1]}), ValueError, "needs labels"),
        (lambda: calm.superclass_map(output, [[0]] * 3, "prior"), ValueError, "kind"),
        (lambda: calm.superclass_map(output, {0: [1], 3: [0]}, labels=labels), ValueError,
         "no entry for label 2"),
        (lambda: calm.attribution_map(CALMOutput(bad.logits, bad.attention), 0), ValueError,
         "not finite"),
        (lambda: next(calm.train(net(), [], 1, method="ml", hard=True)), ValueError, "hard"),
        (lambda: next(calm.train(net(), [], 1, ema=1.0)), ValueError, "ema"),
        (lambda: next(calm.train(net(), [], -1)), ValueError, "epochs"),
        (lambda: next(calm.train(net(), [], 1, lr_decay_epochs=0)), ValueError, "lr_decay_epochs"),
        (lambda: list(calm.train(net(), iter(batches()), 2)), ValueError, "no batch in epoch 1"),
        (lambda: calm.param_groups(net(), -0.1), ValueError, "lr"),
        (lambda: next(calm.train(net(), [], 1, amp_dtype=torch.float16)), ValueError, "amp_dtype"),
        (lambda: calm.merge_cub_parts(np.zeros((3, 3)), 10, 10), ValueError, "15, 3"),
        (lambda: calm.merge_cub_parts(np.zeros((15, 3)), 0, 10), ValueError, "positive"),
        (lambda: calm.merge_cub_parts([[np.nan, 1, 1]] * 15, 9, 9), ValueError, "finite"),
        (lambda: calm.cue_mask(torch.zeros(4, 4).long(), np.zeros((4, 4)), [1]), ValueError,
         "uint8"),
        (lambda: calm.wordnet_superclasses(["a b c"], ["b"], 0), ValueError, "line 1"),
        (lambda: calm.wordnet_superclasses(WORDNET, ["whale"], 0), ValueError, "whale"),
        (lambda: calm.wordnet_superclasses(WORDNET, ["robin"], "fish"), ValueError, "fish"),
        (lambda: calm.wordnet_superclasses(WORDNET, ["robin"], -1), ValueError, "depth"),
        (lambda: calm.part_label_map(torch.zeros(0, 2).long(), torch.zeros(0).long()), ValueError,
         "empty"),
        (lambda: calm.part_label_map(torch.ones(2, 3).long(), torch.ones(2).long()), ValueError,
         r"\(P, 2\)"),
        (lambda: calm.part_label_map(torch.ones(1, 2).long(), torch.ones(1).long(), 0), ValueError,
         "size positive"),
        (lambda: calm.differing_part_groups([1], [1, 2], ["a"]), ValueError, "one length")]:
        with pytest.raises(error, match=words):
            call()
