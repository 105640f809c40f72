"""PiT: parity with the public implementation, the identities of the method, the recipe, errors,
long runs."""

import copy
import json
import math
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import pit_ablation
import pit_imagenet
import speed_pit
from reference import pit, resnet

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "pit"
CONFIG_A = dict(image_size=32, patch_size=8, stride=4, base_dims=[8, 8, 8], depth=[1, 2, 1],
                heads=[2, 4, 8], mlp_ratio=4, num_classes=10)
CONFIG_B = dict(image_size=30, patch_size=7, stride=5, in_chans=1, base_dims=[4, 4], depth=[2, 1],
                heads=[3, 6], mlp_ratio=2, num_classes=7)


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) if file[key].dtype.kind in "fiu" else file[key]
                for key in file.files}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform_from_key(key, shape, seed):
    start = (zlib.crc32(key.encode()) + seed * 1000003) % 2**32
    raw = np.random.PCG64(start).random_raw(math.prod(shape))
    return (2 * ((raw >> np.uint64(11)) * 2.0**-53) - 1).reshape(shape)


def seeded(model, seed):
    """Gives every tensor the values its key stands for."""
    state = {}
    for key, value in model.state_dict().items():
        u, last = uniform_from_key(key, tuple(value.shape), seed), key.split(".")[-1]
        if last in ("pos_embed", "cls_token", "dist_token"):
            u = 0.5 * u
        elif value.ndim == 1:
            u = 1 + 0.2 * u if last == "weight" else 0.1 * u
        else:
            u = u * math.sqrt(3 / math.prod(value.shape[1:]))
        state[key] = torch.from_numpy(u.astype(np.float32))
    model.load_state_dict(state)
    return model


def small(model_class=pit.PoolingTransformer, seed=0, **changes):
    model = model_class(**{**CONFIG_A, **changes})
    pit.init_weights(model, generator=rng(seed))
    return model


def close(found, wanted, atol=2e-5, rtol=1e-4):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)


def close_gradient(found, wanted):
    close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3)


def record_stages(model, x):
    """What leaves the embedding, every stage and every pooling in an ordinary forward pass."""
    found, hooks = {}, []
    hooks.append(model.patch_embed.register_forward_hook(
        lambda _, __, out: found.update(patch_embed_out=out)))
    for s, pool in enumerate(model.pools):
        hooks.append(pool.register_forward_hook(
            lambda _, __, out, s=s: found.update({f"pool{s}_x": out[0], f"pool{s}_cls": out[1]})))
    maps, tokens = model.forward_intermediates(x)
    for s, (spatial, cls) in enumerate(zip(maps, tokens)):
        found.update({f"stage{s}_x": spatial, f"stage{s}_cls": cls})
    for hook in hooks:
        hook.remove()
    found["features"], found["logits_eval"] = model.forward_features(x), model(x)
    return found


# Parity


@pytest.mark.parametrize("attention", ["sdpa", "math"])
@pytest.mark.parametrize("name, config, model_class", [
    ("small_a", CONFIG_A, pit.PoolingTransformer),
    ("small_a_distilled", CONFIG_A, pit.DistilledPoolingTransformer),
    ("small_b_gray_2stage", CONFIG_B, pit.PoolingTransformer)])
def test_small_models(name, config, model_class, attention):
    golden = load(name)
    params = {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}
    model = model_class(**config, attention=attention).eval()
    assert list(model.state_dict()) == list(params)
    model.load_state_dict(params)
    x = golden["x"].requires_grad_()
    found = record_stages(model, x)
    compared = [key for key in golden if key.startswith("out/") and not key.endswith("_train")]
    for key in compared:
        close(found[key.removeprefix("out/")], golden[key])
    assert len(compared) >= 7
    if model_class is pit.PoolingTransformer:
        attn = model.attention_maps(x)
        assert len(attn) == sum(config["depth"])
        for i, a in enumerate(attn):
            close(a, golden[f"attn/{i}"])

    out = model.train()(x)
    if model_class is pit.DistilledPoolingTransformer:
        close(out[0], golden["out/logits_cls_train"])
        close(out[1], golden["out/logits_dist_train"])
        loss = pit.DistillationLoss(nn.CrossEntropyLoss(), lambda _: golden["teacher_logits"])(
            x, out, golden["target"])
    else:
        loss = F.cross_entropy(out, golden["target"])
    close(loss, golden["loss"].squeeze())
    loss.backward()
    close_gradient(x.grad, golden["grad_x"])
    for key, p in model.named_parameters():
        close_gradient(p.grad, golden[f"grad/{key}"])


@pytest.mark.parametrize("name", ["pit_ti", "pit_s", "pit_ti_distilled", "pit_b"])
def test_published_sizes(name):
    golden, model = load(f"full_{name}"), getattr(pit, name)()
    seed = int(golden["seed"])
    seeded(model, seed)
    assert list(model.state_dict()) == list(golden["param_checksum/names"])
    sums = [(v.double().sum().item(), v.double().abs().sum().item())
            for v in model.state_dict().values()]
    wanted = torch.stack([golden["param_checksum/sum"], golden["param_checksum/abs_sum"]], 1)
    close(torch.tensor(sums, dtype=torch.float64), wanted, atol=1e-9, rtol=1e-9)
    x = torch.from_numpy((1.7 * uniform_from_key("input.x", (1, 3, 224, 224), seed)).astype(np.float32))
    close(torch.stack([x.double().sum(), x.double().abs().sum()]), golden["x_checksum"], rtol=1e-9, atol=0)

    with torch.no_grad():
        found = record_stages(model.eval(), x)
    for key in [key.removeprefix("out/") for key in golden if key.startswith("out/")]:
        if key.endswith("_mean_hw"):
            value = found[key.removesuffix("_mean_hw")].mean((2, 3))
        elif key.endswith("_std_hw"):
            value = found[key.removesuffix("_std_hw")].std((2, 3), correction=0)
        elif key.endswith("_train"):
            continue
        else:
            value = found[key]
        close(value, golden[f"out/{key}"], atol=1e-4)

    x.requires_grad_()
    out, target = model.train()(x), golden["target"]
    if isinstance(out, tuple):
        close(out[0], golden["out/logits_cls_train"], atol=1e-4)
        close(out[1], golden["out/logits_dist_train"], atol=1e-4)
        loss = (F.cross_entropy(out[0], target) + F.cross_entropy(out[1], (target + 17) % 1000)) / 2
    else:
        loss = F.cross_entropy(out, target)
    close(loss, golden["loss"].squeeze(), atol=1e-4)
    loss.backward()
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == sorted(golden["grad/names"])
    for i, key in enumerate(golden["grad/names"]):
        grad = parameters[key].grad.flatten()
        close(grad.norm(), golden["grad/l2"][i].float(), rtol=1e-3, atol=0)
        first = grad[torch.arange(8) % len(grad)]
        close(first, golden["grad/first8"][i].float(), rtol=1e-3,
              atol=1e-5 * float(grad.abs().max()))
    close(x.grad.norm(), golden["grad_x_l2"].float(), rtol=1e-3, atol=0)
    close_gradient(F.avg_pool2d(x.grad.abs(), 28), golden["grad_x_mean_abs_8x8"])


def test_deit_tiny():
    golden, model = load("full_deit_tiny"), pit.deit_tiny_patch16_224().eval()
    seed = int(golden["seed"])
    seeded(model, seed)
    state = model.state_dict()
    assert list(state) == list(golden["param_checksum/names"])
    shapes = [str(tuple(v.shape)) for v in state.values()]
    digits = lambda text: re.findall(r"\d+", text)            # noqa: E731
    assert list(map(digits, shapes)) == list(map(digits, golden["param_checksum/shapes"]))
    sums = torch.stack([v.double().sum() for v in state.values()])
    close(sums, golden["param_checksum/sum"], rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) == int(golden["num_params"])
    x = torch.from_numpy((1.7 * uniform_from_key("input.x", (1, 3, 224, 224), seed)).astype(np.float32))
    with torch.no_grad():
        features = model.forward_features(x)
        close(features[:, :1], golden["out/cls_normed"], atol=1e-4)
        close(features[:, 1:].mean(1), golden["out/patch_mean_normed"], atol=1e-4)
        close(model(x), golden["out/logits_eval"], atol=1e-4)
        close(model.head(features[:, 0]), golden["out/logits_eval"], atol=1e-4)


def test_position_map_resized_to_another_grid():
    golden = load("pos_resize_48x40")
    x = golden["x"]
    dynamic = seeded(small(dynamic_image_size=True), int(golden["seed"])).eval()
    close(dynamic(x), golden["logits"])
    fixed = seeded(small(), int(golden["seed"])).eval()
    fixed.set_image_size((48, 40))
    assert fixed.image_size == (48, 40) and fixed.grids == [(11, 9), (6, 5), (3, 3)]
    close(fixed.pos_embed.data, golden["pos_embed_resized"])
    close(fixed(x), golden["logits"])


def test_given_drop_path_masks():
    golden = load("drop_path_masked")
    model = seeded(small(drop_path_rate=0.5), int(golden["seed"])).train()
    rows = iter(zip(golden["keep_masks"], golden["drop_rates"].tolist()))

    class Masked(nn.Module):
        def __init__(self, drop_path):
            super().__init__()
            self.keep, rate = next(rows)
            assert drop_path.drop_prob == pytest.approx(rate)
            self.rate = rate

        def forward(self, x):
            return x * self.keep.view(-1, 1, 1) / (1 - self.rate)

    for stage in model.transformers:
        for block in stage.blocks:
            block.drop_path1, block.drop_path2 = Masked(block.drop_path1), Masked(block.drop_path2)
    close(model(golden["x"]), golden["logits_train"])


def test_attention_statistics():
    golden, maps = load("attention_stats_small_a"), load("small_a")
    for i in range(4):
        attn, wanted = maps[f"attn/{i}"], lambda name: golden[f"block{i}/{name}_per_head"]
        close(pit.attention_entropy(attn), wanted("entropy_nats"), rtol=1e-6, atol=1e-6)
        close(pit.interaction_distance(attn), wanted("distance_in_tokens"), rtol=1e-6, atol=1e-6)
        grid = int(golden[f"block{i}/grid"])
        assert torch.equal(pit.interaction_distance(attn, (grid, grid)),
                           pit.interaction_distance(attn, grid))
        for tau in (0.01, 0.02, 0.1):
            close(pit.interaction_rate(attn, tau), wanted(f"interaction_rate_tau{tau}"), atol=1e-6)


def test_recipe_schedule():
    golden = load("recipe")
    lrs = [pit.cosine_lr(t, 1e-3) for t in range(310)]
    close(torch.tensor(lrs, dtype=torch.float64), golden["sched/lr_per_epoch"], rtol=1e-6, atol=0)
    lagged = [pit.cosine_lr(t, 1e-3, lag=True) for t in range(4)]
    assert lagged == [lrs[0], lrs[0], lrs[1], lrs[2]]


@pytest.mark.parametrize("prefix", ["mix", "mix_nosmooth"])
def test_recipe_mixing(prefix):
    golden = {k.split("/", 1)[1]: v for k, v in load("recipe").items()
              if k.startswith(prefix + "/")}
    x, y = golden["x"], golden["y"]
    target = pit.smooth_one_hot(y, int(golden["num_classes"]), float(golden["smoothing"]))
    lam = float(golden["mixup_lam"])
    close(pit.mixup_batch(x, lam), golden["mixup_x"], rtol=1e-6, atol=1e-6)
    close(lam * target + (1 - lam) * target.flip(0), golden["mixup_target"], rtol=1e-6, atol=1e-6)
    for j in range(2):
        center = tuple(golden[f"cutmix{j}_center_yx"].tolist())
        mixed, lam = pit.cutmix_batch(x, float(golden[f"cutmix{j}_lam"]), center)
        assert isinstance(lam, float) and torch.equal(mixed, golden[f"cutmix{j}_x"])
        close(lam * target + (1 - lam) * target.flip(0), golden[f"cutmix{j}_target"], rtol=1e-6,
              atol=1e-6)


def test_recipe_losses():
    golden = {k[5:]: v for k, v in load("recipe").items() if k.startswith("loss/")}
    logits, y = golden["logits"], golden["y"]
    exact = dict(rtol=1e-6, atol=1e-6)
    close(pit.SoftTargetCrossEntropy()(logits, golden["soft_target"]), golden["soft_target_ce"], **exact)
    close(pit.LabelSmoothingCrossEntropy()(logits, y), golden["label_smoothing_ce_0.1"], **exact)
    for kind, alpha, tau in (("none", 0.5, 1.0), ("hard", 0.5, 1.0), ("soft", 0.1, 3.0)):
        loss = pit.DistillationLoss(
            pit.SoftTargetCrossEntropy(), lambda _: golden["teacher_logits"],
                                    kind, alpha, tau)
        found = loss(logits, (logits, golden["logits_dist"]), golden["soft_target"])
        close(found, golden[f"distill_{kind}_alpha{alpha}_tau{tau}"], **exact)


def test_recipe_sampler():
    golden = {k: v for k, v in load("recipe").items() if k.startswith("ra/")}
    for key, wanted in golden.items():
        n, replicas, rank, epoch = map(int, re.findall(r"\d+", key))
        sampler = pit.RepeatedAugSampler(n, replicas, rank)
        sampler.set_epoch(epoch)
        assert list(sampler) == wanted.tolist() and len(sampler) == len(wanted)
    assert len(golden) == 3
    tiny = pit.RepeatedAugSampler(range(10), num_replicas=3, rank=1, shuffle=False)
    assert list(tiny) == [0, 1, 2] and len(tiny) == 3       # below 256 images: floor(n / replicas)
    with pytest.raises(ValueError, match="rank"):
        pit.RepeatedAugSampler(10, num_replicas=2, rank=2)


def test_recipe_weight_decay_names_and_drop_path_rates():
    golden = load("recipe")
    names = set(golden["wd/no_decay"]) | set(golden["wd/decay"])
    model = next(m for m in (small(), small(pit.DistilledPoolingTransformer), pit.pit_ti())
                 if {name for name, _ in m.named_parameters()} == names)
    by_id = {id(p): name for name, p in model.named_parameters()}
    none, decay = pit.param_groups(model, 0.07)
    assert none["weight_decay"] == 0 and decay["weight_decay"] == 0.07
    assert {by_id[id(p)] for p in none["params"]} == set(golden["wd/no_decay"])
    assert {by_id[id(p)] for p in decay["params"]} == set(golden["wd/decay"])
    for key in [key for key in golden if key.startswith("droppath/")]:
        name, rate, rule = re.fullmatch(r"droppath/(pit_\w+?)_([\d.]+)_(\w+)", key).groups()
        with torch.device("meta"):
            model = getattr(pit, name)(drop_path_rate=float(rate), drop_path_rule=rule)
        blocks = [block for stage in model.transformers for block in stage.blocks]
        for which in ("drop_path1", "drop_path2"):
            rates = [getattr(block, which).drop_prob for block in blocks]
            close(torch.tensor(rates, dtype=torch.float64), golden[key], rtol=1e-6, atol=1e-9)


def test_recipe_ema():
    golden = load("recipe")
    model = nn.Linear(3, 1, bias=False)
    model.weight.data.zero_()
    model.register_buffer("seen", torch.zeros(()))
    ema = pit.ModelEma(model, float(golden["ema/decay"]))
    for fed, wanted in zip(golden["ema/weights_fed"].tolist(), golden["ema/state"]):
        model.weight.data.fill_(fed)
        model.seen += 1
        ema.update(model)
        close(ema.module.weight.data[0], wanted, rtol=1e-6, atol=1e-6)
        assert ema.module.seen == model.seen
    assert model.weight[0, 0] == 5 and not ema.module.weight.requires_grad


def test_recipe_evaluation_transform():
    golden = load("recipe")
    image = Image.fromarray(golden["eval/img_uint8"].numpy())
    found = pit.eval_transform(image, 32, 0.9)
    close(found, golden["eval/size32_crop0.9"], rtol=1e-6, atol=1e-6)
    close(pit.eval_transform(image, 48, 0.875), golden["eval/size48_crop0.875"], rtol=1e-6,
          atol=1e-6)


def test_recipe_randaugment_operations():
    golden = load("recipe")
    image, level = Image.fromarray(
        golden["ra_ops/img_uint8"].numpy()), float(golden["ra_ops/level"])
    assert pit.RANDAUGMENT_OPS == tuple(golden["ra_ops/order"])
    cases = [key for key in golden if re.fullmatch(r"ra_ops/\w+/neg\d/out", key)]
    for key in cases:
        _, name, sign, _ = key.split("/")
        negative = sign == "neg1"
        arg = pit.randaugment_argument(name, level, negative)
        wanted = golden[f"ra_ops/{name}/{sign}/args"].tolist()
        assert ([] if arg is None else [arg]) == pytest.approx(wanted)
        out = np.asarray(pit.apply_randaugment_op(image, name, level, negative)).astype(int)
        off = np.abs(out - golden[key].numpy().astype(int)).max()
        assert off <= (1 if name.startswith(("Rotate", "Shear", "Translate")) else 0), name
    assert len(cases) == 24


# Tables and identities


@pytest.mark.parametrize("name, params, distilled, gmacs", [
    ("ti", 4847272, 5104336, (0.699, 0.705)), ("xs", 10618888, 11003984, (1.395, 1.407)),
    ("s", 23461912, 24039056, (2.871, 2.897)), ("b", 73764840, 74790096, (12.402, 12.482))])
def test_parameters_macs_and_grids_of_the_paper(name, params, distilled, gmacs):
    with torch.device("meta"):
        models = [getattr(pit, f"pit_{name}{suffix}")() for suffix in ("", "_distilled")]
        headless = getattr(pit, f"pit_{name}_224")(num_classes=0)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [params, distilled]
    assert counts[
        0] - sum(p.numel() for p in headless.parameters()) == models[0].head.weight.numel() + 1000
    assert len(models[0].state_dict()) == (172 if name == "b" else 160)
    for model, total in zip(models, gmacs):
        macs = pit.count_macs(model)
        assert round(macs["total"] / 1e9, 3) == total
        assert macs[
            "total"] == macs["embed"] + sum(macs["stages"]) + sum(macs["pools"]) + macs["head"]
    side = 31 if name == "b" else 27
    assert models[0].grids == [(n, n) for n in (side, (side + 1) // 2, (side + 3) // 4)]
    stages = {"ti": (0.208, 0.292, 0.162), "s": (0.670, 1.311, 0.808), "b": (3.691, 5.257, 3.306)}
    if name in stages:
        assert tuple(round(n / 1e9, 3) for n in pit.count_macs(models[0])["stages"]) == stages[name]


@pytest.mark.parametrize("name, params, gmacs", [
    ("deit_tiny_patch16_224", 5717416, 1.254), ("deit_small_patch16_224", 22050664, 4.599),
    ("deit_base_patch16_224", 86567656, 17.564), ("deit_tiny_distilled_patch16_224", 5910800, None),
    ("deit_small_distilled_patch16_224", None, None), ("deit_base_distilled_patch16_224", None, None)])
def test_parameters_and_macs_of_deit(name, params, gmacs):
    with torch.device("meta"):
        model = getattr(pit, name)()
    if params:
        assert sum(p.numel() for p in model.parameters()) == params
    if gmacs:
        assert round(pit.count_macs(model)["total"] / 1e9, 3) == gmacs
    tokens = 2 if "distilled" in name else 1
    assert model.pos_embed.shape[
        1] == 196 + tokens and ("dist_token" in model.state_dict()) == (tokens == 2)


@pytest.mark.parametrize("model_class", [pit.PoolingTransformer, pit.DistilledPoolingTransformer])
def test_last_block_on_class_tokens_alone_is_exact(model_class):
    model = small(model_class).double().eval()
    x = torch.rand(3, 3, 32, 32, generator=rng(), dtype=torch.float64)

    def gradients(features):
        model.zero_grad()
        (features**2).sum().backward()
        return [p.grad.clone() for p in model.transformers.parameters()]

    short = model.forward_features(x)
    full = model.norm(model.forward_intermediates(x)[1][-1])
    assert (short - full).abs().max() < 1e-12
    for a, b in zip(gradients(short), gradients(full)):
        assert (a - b).abs().max() < 1e-10
    block, lengths = model.transformers[-1].blocks[-1], []
    hook = block.mlp.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    model(x), model.forward_intermediates(x), model.attention_maps(x)
    hook.remove()
    assert lengths == [model.num_tokens, 4 + model.num_tokens, 4 + model.num_tokens]


def test_vit_short_cut_is_exact_and_distilled_vit_has_two_heads():
    vit = pit.VisionTransformer(32, 8, 24, 3, 4, num_classes=5, distilled=True).double()
    x = torch.rand(2, 3, 32, 32, generator=rng(), dtype=torch.float64)
    features = vit.forward_features(x)
    logits, logits_dist = vit(x)
    assert features.shape == (2, 18, 24)
    close(logits, vit.head(features[:, 0]), rtol=1e-12, atol=1e-12)
    close(logits_dist, vit.head_dist(features[:, 1]), rtol=1e-12, atol=1e-12)
    close(vit.eval()(x), (logits + logits_dist) / 2, rtol=1e-12, atol=1e-12)


def test_without_positions_one_stage_ignores_the_order_of_patches():
    model = small(base_dims=[8], depth=[2], heads=[4], stride=8, pool="none").eval()
    model.pos_embed.data.zero_()
    x = torch.rand(2, 3, 32, 32, generator=rng())
    patches = F.unfold(x, 8, stride=8)
    shuffled = F.fold(patches[:, :, torch.randperm(16, generator=rng(1))], (32, 32), 8, stride=8)
    assert not torch.equal(shuffled, x)
    close(model(shuffled), model(x), rtol=0, atol=1e-5)
    pit.init_weights(model, generator=rng())
    assert (model(shuffled) - model(x)).abs().max() > 1e-4


def test_one_stage_is_a_vit_but_for_the_position_of_the_class_token():
    model = small(base_dims=[8], depth=[3], heads=[4], stride=8).eval()
    vit = pit.VisionTransformer(32, 8, 32, 3, 4, num_classes=10).eval()
    state = {k.replace("transformers.0.", "").replace("patch_embed.conv", "patch_embed.proj"): v
             for k, v in model.state_dict().items()}
    positions = model.pos_embed.detach().flatten(2).transpose(1, 2)
    vit.load_state_dict({**state, "pos_embed": torch.cat([torch.zeros(1, 1, 32), positions], 1)})
    x = torch.rand(2, 3, 32, 32, generator=rng())
    close(model(x), vit(x), rtol=1e-5, atol=1e-6)
    assert pit.count_macs(model) == pit.count_macs(vit)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_parameter_free_pooling(pool):
    model = small(pool=pool).eval()
    assert not any("conv" in key for key in model.state_dict() if key.startswith("pools"))
    x = torch.rand(2, 4, 5, 7, generator=rng())
    layer = pit.HeadPooling(4, 8, pool)
    spatial, tokens = layer(x, torch.rand(2, 1, 4, generator=rng()))
    assert spatial.shape == (2, 8, 3, 4) and tokens.shape == (2, 1, 8)
    pooled = (F.avg_pool2d if pool == "avg" else F.max_pool2d)(x, 3, 2, 1)
    for channel in range(8):
        assert torch.equal(spatial[:, channel], pooled[:, channel // 2])
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_attention_of_a_random_model_is_nearly_uniform():
    model = pit.pit_ti()
    pit.init_weights(model, generator=rng())
    with torch.no_grad():
        maps = model.attention_maps(torch.randn(1, 3, 224, 224, generator=rng()))
    assert [a.shape[-1] for a in maps] == [730] * 2 + [197] * 6 + [50] * 4 and model.training
    for a in maps:
        assert 0.985 < pit.attention_entropy(a).mean() / math.log(a.shape[-1]) <= 1
    uniform = torch.full((1, 2, 50, 50), 1 / 50)
    assert pit.interaction_rate(uniform, 0.019).tolist() == [1, 1]
    assert pit.interaction_rate(uniform, 0.021).tolist() == [0, 0]
    eye = torch.eye(7).expand(2, 3, 7, 7)
    assert pit.attention_entropy(eye).tolist() == [0, 0, 0]
    assert pit.interaction_distance(eye, (2, 3)).tolist() == [0, 0, 0]
    one_off = torch.eye(6).roll(1, 1)[None, None]              # 2x3 cells: five neighbours' steps
    wanted = (1 + 1 + math.sqrt(5) + 1 + 1 + math.sqrt(5)) / 6
    close(pit.interaction_distance(one_off, (2, 3), 0), torch.tensor([wanted], dtype=torch.float64))


def test_keys_of_timm_wrappers_and_prefixes(tmp_path):
    model = small()
    official = model.state_dict()
    timm = {re.sub(r"^pools\.(\d)\.", lambda m: f"transformers.{int(m[1]) + 1}.pool.", k): v
            for k, v in official.items()}
    assert timm.keys() != official.keys()
    assert list(pit.convert_timm_state_dict(timm)) == list(official)
    assert list(pit.convert_timm_state_dict(official)) == list(official)
    for wrapped in (timm, {"model": official, "epoch": 3}, {"state_dict": timm}, {"model_ema": timm},
                    {f"module.{k}": v for k, v in timm.items()},
                    {"model": {f"module._orig_mod.{k}": v for k, v in official.items()}}):
        other = small(seed=1)
        torch.save(wrapped, tmp_path / "w.pth")
        other.load_state_dict(pit.load_pit_checkpoint(tmp_path / "w.pth"))
        again = small(seed=2)
        again.load_state_dict(wrapped)
        for found in (other, again):
            assert all(torch.equal(v, official[k]) for k, v in found.state_dict().items())


def test_pretrained_and_position_map_of_another_size(tmp_path):
    path, tiny = tmp_path / "w.pth", dict(base_dims=(4, 4, 4), depth=(1, 1, 1), num_classes=3)
    model = pit.pit_ti(image_size=64, **tiny)
    torch.save(model.state_dict(), path)
    loaded = pit.pit_ti(path, image_size=64, **tiny)
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    with pytest.raises(ValueError, match="resize_pos_embed"):
        pit.pit_ti(path, image_size=96, **tiny)
    with pytest.warns(UserWarning, match=r"resized from \(7, 7\) to \(11, 11\)"):
        resized = pit.pit_ti(path, image_size=96, resize_pos_embed=True, **tiny)
    model.set_image_size(96)
    assert torch.equal(resized.pos_embed, model.pos_embed)
    with pytest.raises(RuntimeError, match="head.weight"):
        pit.pit_ti(path, image_size=64, **{**tiny, "num_classes": 4})
    with pytest.raises(RuntimeError, match="head_dist.weight"):
        model.load_state_dict({**model.state_dict(), "head_dist.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="norm.bias"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "norm.bias"})
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="w.pth holds a list"):
        pit.load_pit_checkpoint(path)
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="w.pth is not a torch.save file"):
            pit.load_pit_checkpoint(path)
    vit = pit.deit_tiny_patch16_224(image_size=32, depth=1, num_classes=3)
    torch.save({"model": {f"module.{k}": v for k, v in vit.state_dict().items()}}, path)
    other = pit.deit_tiny_patch16_224(path, image_size=32, depth=1, num_classes=3)
    assert torch.equal(other.pos_embed, vit.pos_embed)


def test_classifier_can_be_replaced():
    model = small(pit.DistilledPoolingTransformer).double()
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(3)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert [z.shape for z in model(x)] == [(2, 3), (2, 3)] and model.num_classes == 3
    model.reset_classifier(0)
    assert model.eval()(x).shape == (2, 64)
    assert small(num_classes=0).get_classifier()(x) is x
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}


@pytest.mark.parametrize("model_class", [pit.PoolingTransformer, pit.DistilledPoolingTransformer])
def test_checkpointing_gives_the_same_gradients_under_stochastic_depth(model_class):
    results = []
    for checkpointing in (False, True):
        model = small(model_class, drop_path_rate=0.5, grad_checkpointing=checkpointing)
        generator = rng(5)
        for module in model.modules():
            if isinstance(module, pit.DropPath):
                module.generator = generator
        x = torch.rand(8, 3, 32, 32, generator=rng())
        out = model(x)
        sum((z**2).sum() for z in (out if isinstance(out, tuple) else (out,))).backward()
        results.append([p.grad for p in model.parameters()] + [generator.get_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_drop_path_keeps_the_expectation():
    drop = pit.DropPath(0.25)
    drop.generator = rng()
    out = drop(torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand(-1, 6))
    assert per_sample.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(out.mean() - 1) < 0.04
    assert drop(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.ones(5)
    assert drop.eval()(x) is x and pit.DropPath()(x) is x


def test_precision_layout_and_batch_of_one():
    model = small().eval()
    x = torch.rand(4, 3, 32, 32, generator=rng())
    wanted = model(x)
    close(model(x[:1]), wanted[:1], rtol=1e-4, atol=1e-5)
    close(model(x.to(memory_format=torch.channels_last)), wanted, rtol=1e-4, atol=1e-5)
    close(model(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), wanted, rtol=1e-4,
          atol=1e-5)
    double = copy.deepcopy(model).double()
    close(double(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)
    close(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), wanted, rtol=0.05, atol=0.05)
    close(copy.deepcopy(model).half()(x.half()).float(), wanted, rtol=0.01, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        close(model(x).float(), wanted, rtol=0.05, atol=0.05)


def test_gradients_by_finite_differences():
    model = small(image_size=12, base_dims=[2, 2], depth=[1, 1], heads=[1, 2]).double()
    x = torch.rand(1, 3, 12, 12, generator=rng(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x).sin(), (x,), atol=1e-6)


def test_init_rules():
    model = pit.PoolingTransformer(**CONFIG_A, init="deit")
    assert model.transformers[0].blocks[0].attn.qkv.bias.abs().max() == 0
    assert model.patch_embed.conv.bias.abs().max() > 0       # convolutions keep PyTorch's rule
    big = pit.PoolingTransformer(32, 8, 8, (64,), (1,), (8,))
    fc1 = big.transformers[0].blocks[0].mlp.fc1
    assert fc1.weight.abs().max() <= 512**-0.5 and abs(fc1.weight.std() * 1536**0.5 - 1) < 0.02
    assert abs(big.pos_embed.std() - 0.02) < 2e-3 and big.norm.weight.unique().tolist() == [1]
    a, b, c = small(seed=1).state_dict(), small(seed=1).state_dict(), small(seed=2).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["cls_token"],
                                                                       c["cls_token"])
    assert pit.DistilledPoolingTransformer(**CONFIG_A, init="deit").head_dist.bias.abs().max() == 0


def test_train_eval_modes_of_the_distilled_model():
    model = small(pit.DistilledPoolingTransformer)
    x = torch.rand(2, 3, 32, 32, generator=rng())
    logits, logits_dist = model(x)
    close(model.eval()(x), (logits + logits_dist) / 2)


@pytest.mark.parametrize("changes, message", [
    (dict(depth=[1, 2]), "one entry per stage"), (dict(base_dims=[], depth=[], heads=[]), "at least one"),
    (dict(heads=[2, 3, 8]), r"multiple.*\[16, 24, 64\]"), (dict(image_size=7), "7x7.*patch of 8"),
    (dict(image_size=(32, 5)), "32x5"), (dict(image_size=(1, 2, 3)), "image_size"),
    (dict(drop_rate=1.0), "drop_rate.*1.0"), (dict(attn_drop_rate=-0.1), "attn_drop_rate.*-0.1"),
    (dict(drop_path_rate=1.5), "drop_path_rate.*1.5"), (dict(num_classes=-1), "num_classes.*-1"),
    (dict(init="normal"), "init.*'normal'"), (dict(attention="flash"), "attention.*'flash'"),
    (dict(pool="mean"), "pool.*'mean'"), (dict(pool="none"), "pool='none'.*one stage"),
    (dict(drop_path_rule="x"), "drop_path_rule"), (dict(depth=[1, 0, 1]), "positive")])
def test_bad_constructor_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        pit.PoolingTransformer(**{**CONFIG_A, **changes})


@pytest.mark.parametrize("model", [small(), pit.VisionTransformer(32, 8, 8, 1, 2, num_classes=2)],
                         ids=["pit", "vit"])
def test_bad_images(model):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*\(3, 32, 32\)"):
        model(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        model(torch.rand(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(32, 36\).*\(32, 32\)"):
        model(torch.rand(1, 3, 32, 36))
    with pytest.raises(TypeError, match="uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="smaller than a patch"):
        small(dynamic_image_size=True)(torch.rand(1, 3, 32, 5))


def test_other_errors():
    with pytest.raises(ValueError, match="embed_dim"):
        pit.VisionTransformer(embed_dim=10, heads=3)
    with pytest.raises(ValueError, match="smaller than a patch"):
        pit.VisionTransformer(image_size=8)
    with pytest.raises(ValueError, match="kind.*'medium'"):
        pit.DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), "medium")
    x, y = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="one tensor"):
        pit.DistillationLoss(nn.CrossEntropyLoss(), lambda x: x)(x, torch.rand(3, 4), y)
    with pytest.raises(ValueError, match="even batch.*3"):
        pit.Mixup(num_classes=3)(x, y)
    with pytest.raises(ValueError, match="not both 0"):
        pit.Mixup(0, 0)
    for loss in (pit.SoftTargetCrossEntropy(), pit.LabelSmoothingCrossEntropy()):
        with pytest.raises(TypeError, match="teacher"):
            loss((torch.rand(3, 4),) * 2, y)
    with pytest.raises(ValueError, match="name.*Blur"):
        pit.randaugment_argument("Blur", 9)
    with pytest.raises(ValueError, match="RGB.*mode L"):
        pit.RandAugment()(Image.new("L", (8, 8)))
    with pytest.raises(ValueError, match="size.*9"):
        pit.occlude_center(x, 9)
    with pytest.raises(ValueError, match="3x3"):
        pit.interaction_distance(torch.rand(1, 2, 9, 9), grid=3)
    with pytest.raises(ValueError, match="empty"):
        pit.evaluate(small(), [])
    with pytest.raises(ValueError, match="drop_prob"):
        pit.DropPath(1.0)


# The pieces of the recipe that draw random numbers


def test_mixup_draws():
    x, y = torch.rand(4, 3, 16, 16, generator=rng()), torch.tensor([0, 1, 2, 3])
    mix = pit.Mixup(num_classes=5, generator=rng())
    again = pit.Mixup(num_classes=5, generator=rng())
    kinds = set()
    for _ in range(20):
        mixed, target = mix(x, y)
        other, target2 = again(x, y)
        assert torch.equal(mixed, other) and torch.equal(target, target2)
        close(target.sum(1), torch.ones(4))
        from_x, from_flip = mixed == x, mixed == x.flip(0)
        cutmix = bool((from_x | from_flip).all())
        kinds.add(cutmix)
        if cutmix:                                             # the target tells the visible area
            kept = (target[0, 0] - 0.02) / 0.9
            assert float(from_x[0, 0].float().mean()) == pytest.approx(float(kept), abs=1e-5)
    assert kinds == {True, False}
    mixed, target = pit.Mixup(prob=0, num_classes=5, label_smoothing=0)(x, y)
    assert mixed is x and torch.equal(target, F.one_hot(y, 5).float())
    for arguments, cutmix in (((0, 1), True), ((0.8, 0), False)):
        mixed, _ = pit.Mixup(*arguments, num_classes=5, generator=rng(3))(x, y)
        assert bool(((mixed == x) | (mixed == x.flip(0))).all()) == cutmix
    original = x.clone()
    pit.cutmix_batch(x, 0.3, generator=rng())
    assert torch.equal(x, original)


def test_randaugment_draws():
    image = Image.fromarray(torch.randint(256, (20, 24, 3), generator=rng(), dtype=torch.uint8).numpy())
    a = [np.asarray(pit.RandAugment(generator=rng(i))(image)) for i in range(20)]
    b = [np.asarray(pit.RandAugment(generator=rng(i))(image)) for i in range(20)]
    assert all(np.array_equal(p, q) for p, q in zip(a, b))
    changed = sum(not np.array_equal(p, np.asarray(image)) for p in a)
    assert 8 <= changed <= 19                                 # one in four is left alone
    assert np.array_equal(np.asarray(pit.RandAugment(prob=0, generator=rng())(image)),
                          np.asarray(image))
    for level in (0, 10):
        for name in pit.RANDAUGMENT_OPS:
            for negative in (False, True):
                out = pit.apply_randaugment_op(image, name, level, negative)
                assert out.size == image.size and out.mode == "RGB"


def test_random_erasing():
    x = torch.zeros(300, 3, 20, 30)
    out = pit.RandomErasing(generator=rng())(x)
    hit = (out != 0).all(1)
    share = hit.flatten(1).float().mean(1)
    assert 0.17 < (share > 0).float().mean() < 0.33 and x.abs().max() == 0
    for mask in hit[share > 0]:                               # each is one full rectangle
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert mask.sum() == height * width and height < 20 and width < 30
        assert 0.01 < mask.float().mean() < 0.36
    assert abs(out[hit[:, None].expand_as(out)].std() - 1) < 0.05
    single = pit.RandomErasing(1.0, generator=rng())(torch.zeros(1, 8, 9))
    assert single.shape == (1, 8, 9) and (single != 0).any()
    assert torch.equal(pit.RandomErasing(0.0)(x), x)
    two = pit.RandomErasing(1.0, count=2, generator=rng())(torch.zeros(50, 1, 32, 32))
    assert (two != 0).flatten(1).float().mean(1).max() < 0.36


def test_training_transform():
    generator = rng()
    image = Image.fromarray(torch.randint(256, (40, 60, 3), generator=generator, dtype=torch.uint8).numpy())
    out = pit.train_transform(image, 24, pit.RandAugment(generator=rng(1)), generator)
    assert out.shape == (3, 24, 24) and out.dtype == torch.float32
    same = [pit.train_transform(image, 24, generator=rng(3)) for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0],
                                                  pit.train_transform(image, 24, generator=rng(4)))
    assert pit.train_transform(Image.new("L", (1, 90)), 8, generator=rng()).shape == (3, 8, 8)
    plain = pit.train_transform(Image.new("RGB", (30, 30), (124, 116, 104)), 8, generator=rng())
    assert plain.abs().max() < 0.02                           # the mean colour becomes zero
    flips = [pit.train_transform(image, 24, generator=rng(i)) for i in range(40)]
    assert len({round(float(f.mean()), 5) for f in flips}) > 30


# Training, evaluation, probes


def toy(batch=8, batches=3, model_class=pit.PoolingTransformer, **changes):
    x = torch.rand(batch * batches, 3, 32, 32, generator=rng(7))
    y = torch.randint(10, (batch * batches,), generator=rng(8))
    x[torch.arange(len(y)), :, 3 * y] += 2                    # a bright row tells the class
    return small(model_class, **changes), list(zip(x.split(batch), y.split(batch)))


def test_training_fits_and_reports():
    model, loader = toy()
    logs = list(pit.train(model, loader, epochs=20, lr=5e-3, warmup_epochs=1))
    assert [log["step"] for log in logs] == list(range(1, 61))
    assert set(logs[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s"}
    assert all(isinstance(v, (int, float)) for v in logs[0].values())
    assert logs[0]["lr"] == 1e-6 and logs[4]["lr"] == pytest.approx(pit.cosine_lr(1, 5e-3, 20, 1))
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert pit.evaluate(model, loader)["top1"] > 80
    assert next(pit.train(*toy(), epochs=1, warmup_epochs=0))["lr"] == pytest.approx(5e-4 * 8 / 512)


def test_first_step_of_training_is_adamw():
    model, loader = toy(batches=1)
    mirror = copy.deepcopy(model)
    list(pit.train(model, loader, epochs=1, lr=1e-3, warmup_epochs=0))
    optimizer = torch.optim.AdamW(pit.param_groups(mirror, 0.05), lr=1e-3, eps=1e-8)
    F.cross_entropy(mirror(loader[0][0]), loader[0][1]).backward()
    optimizer.step()
    for a, b in zip(model.parameters(), mirror.parameters()):
        close(a, b, rtol=1e-5, atol=1e-7)


class Counted(list):
    """A loader that can start in the middle of an epoch."""

    def set_epoch(self, epoch, start_batch=0):
        self.start = start_batch

    def __iter__(self):
        return iter(self[self.start:])


@pytest.mark.parametrize("container", [list, Counted])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resumed_training_is_bit_identical(tmp_path, stop, container):
    def start(resume=None):
        model, loader = toy(model_class=pit.DistilledPoolingTransformer, drop_path_rate=0.3)
        ema = pit.ModelEma(model, 0.9)
        steps = pit.train(model, container(loader), epochs=3, warmup_epochs=1, generator=rng(9), ema=ema,
                          mixup=pit.Mixup(num_classes=10, generator=rng(10)), resume=resume,
                          teacher=lambda x: torch.ones(len(x), 10))
        return model, ema, steps

    model, ema, steps = start()
    losses = [log["loss"] for log in steps]
    _, _, interrupted = start()
    for _ in range(stop):
        next(interrupted)
    torch.save(interrupted.send("state"), tmp_path / "s.pt")
    snapshot = torch.load(tmp_path / "s.pt", weights_only=True)
    model2, ema2, rest = start(snapshot)
    assert [log["loss"] for log in rest] == losses[stop:]
    for a, b in ((model, model2), (ema.module, ema2.module)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_training_errors():
    model, loader = toy(model_class=pit.DistilledPoolingTransformer)
    with pytest.raises(TypeError, match="teacher"):
        next(pit.train(model, loader, epochs=1))
    model, loader = toy()
    with pytest.raises(ValueError, match="one tensor"):
        next(pit.train(model, loader, epochs=1, teacher=nn.Identity()))
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        next(pit.train(model, [(loader[0][0] * float("nan"), loader[0][1])], epochs=1))


def test_mixed_precision_training():
    model, loader = toy()
    logs = list(pit.train(model, loader, epochs=3, lr=1e-3, warmup_epochs=0,
                          amp_dtype=torch.bfloat16))
    assert all(math.isfinite(log["loss"]) for log in logs)
    assert next(model.parameters()).dtype == torch.float32


def test_evaluate_by_hand():
    model, loader = toy()
    logits = torch.cat([model.eval()(x) for x, _ in loader])
    labels = torch.cat([y for _, y in loader])
    found = pit.evaluate(model.train(), loader)
    assert model.training and found["count"] == 24
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    top5 = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
    assert found["top5"] == pytest.approx(100 * top5.double().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    subset = [(x, y % 3) for x, y in loader]
    kept = pit.evaluate(model, subset, transform_logits=lambda z: z[:, [7, 2, 5]])
    assert kept["top5"] == 100
    wanted = (logits[:, [7, 2, 5]].argmax(1) == labels % 3).double().mean().item()
    assert kept["top1"] == pytest.approx(100 * wanted)


def test_fgsm_and_occlusion():
    model, loader = toy()
    x, y = loader[0][0].clamp(0, 1), loader[0][1]
    adversary = pit.fgsm(model, x, y, 0.1)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert adversary.min() >= 0 and adversary.max() <= 1 and (adversary - x).abs().max() <= 0.1 + 1e-6
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pit.IMAGENET_MEAN, pit.IMAGENET_STD))
    model.eval()
    loss = lambda z: F.cross_entropy(model((z - mean) / std), y)          # noqa: E731
    assert loss(adversary) > loss(x)
    z = x.clone().requires_grad_()
    loss(z).backward()
    assert torch.equal(adversary, (x + 0.1 * z.grad.sign()).clamp(0, 1))
    other = pit.fgsm(model, x, y, 0.1, mean=(0, 0, 0), std=(1, 1, 1))
    assert not torch.equal(other, adversary) and torch.equal(pit.fgsm(model, x, y, 0.0), x)

    hidden = pit.occlude_center(x, 12)
    assert (hidden[..., 10:22, 10:22] == 0).all() and torch.equal(hidden[..., :10, :],
                                                                  x[..., :10, :])
    assert (hidden != x).sum() == 8 * 3 * 144 and torch.equal(pit.occlude_center(x, 0), x)
    assert (pit.occlude_center(x, 32) == 0).all()


def test_model_compiles_without_breaks():
    model = small().eval()
    x = torch.rand(2, 3, 32, 32, generator=rng())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), model(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    model, loader = toy()
    wanted = model.eval()(loader[0][0]).detach()
    close(model.cuda()(loader[0][0].cuda()).cpu(), wanted, rtol=1e-3, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        logs = list(pit.train(model, loader, epochs=2, amp_dtype=dtype, generator=rng(),
                              mixup=pit.Mixup(num_classes=10, generator=rng())))
        assert math.isfinite(logs[-1]["loss"])


# The scripts


def read_results(folder, script="pit_imagenet"):
    return json.loads((folder / f"{script}.json").read_text())


def start_script(out, *arguments, launcher=(sys.executable,)):
    command = [*launcher, str(ROOT / "benchmarks" / "pit_imagenet.py"), "--preset", "tiny",
               "--out", str(out),
               "--checkpoint-seconds", "0", "--device", "cpu", "--threads", "1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_benchmark_killed_at_any_step_resumes_to_the_same_numbers(tmp_path):
    arguments = ("--models", "PiT", "ViT", "--drop-path", "0.2", "--recipe", "deit")
    whole = start_script(tmp_path / "whole", *arguments)
    killed = start_script(tmp_path / "killed", *arguments)
    log = tmp_path / "killed" / "ViT-seed0.jsonl"
    step = 1 + time.time_ns() % 9
    while killed.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= step):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert whole.wait() == 0, whole.stdout.read()
    resumed = start_script(tmp_path / "killed", *arguments, "--resume")
    text = resumed.communicate()[0]
    assert resumed.returncode == 0 and "PiT-seed0 12/12" not in text, text
    a, b = (read_results(tmp_path / name) for name in ("whole", "killed"))
    assert a["results"] == b["results"] and set(a["results"]) == {"PiT-seed0", "ViT-seed0"}
    weights = [torch.load(tmp_path / name / "ViT-seed0.pt", weights_only=True)["model"]
               for name in ("whole", "killed")]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_two_processes_train_the_same_model_as_one(tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = start_script(tmp_path / "two", "--models", "PiT", launcher=launcher)
    one = start_script(tmp_path / "one", "--models", "PiT")
    assert two.wait(120) == 0, two.stdout.read()
    assert one.wait(120) == 0, one.stdout.read()
    a, b = (read_results(tmp_path / name)["results"]["PiT-seed0"] for name in ("one", "two"))
    assert b["count"] == a["count"] == 50
    assert b["loss"] == pytest.approx(a["loss"],
                                      rel=1e-3) and b["top1"] == pytest.approx(a["top1"], abs=2)


@pytest.fixture
def tree(tmp_path):
    """A folder in ImageNet's layout: two classes that differ in colour, and ImageNet-A with one of
    them."""
    for split, count in (("train", 6), ("val", 3)):
        for label, wnid in enumerate(("n01", "n02")):
            folder = tmp_path / "data" / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(100, (40, 36, 3), generator=rng(10 * i + label),
                                       dtype=torch.uint8)
                pixels[..., 2 * label] += 120
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.JPEG")
    (tmp_path / "a" / "n02").mkdir(parents=True)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a" / "n02" / "x.jpg")
    (tmp_path / "background" / "00_dog").mkdir(parents=True)
    Image.fromarray(pixels.numpy()).save(tmp_path / "background" / "00_dog" / "x.jpg")
    (tmp_path / "in9.json").write_text(json.dumps({"0": -1, "1": 0}))
    return tmp_path


def test_benchmark_on_a_real_folder_and_evaluation_of_its_checkpoint(tree, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pit_imagenet.py"])
    common = ["--data", str(tree / "data"), "--preset", "small32", "--device", "cpu"]
    pit_imagenet.main([*common, "--epochs", "8", "--batch-size", "4", "--models", "PiT", "--out",
                       str(tree / "o"),
                       "--figures", str(tree / "figures")])
    trained = read_results(tree / "o")["results"]["PiT-seed0"]
    assert trained["count"] == 6 and trained["top1"] >= 50 and list((tree / "figures").iterdir())
    pit_imagenet.main([*common, "--models", "PiT", "--checkpoint",
                       str(tree / "o" / "PiT-seed0.pt"), "--out", str(tree / "e"),
                       "--imagenet-a", str(tree / "a"), "--background", str(tree / "background"),
                       "--in9-map", str(tree / "in9.json")])
    found = {row["set"]: row["value"] for row in read_results(tree / "e")["tables"]["evaluation"]}
    assert found["top1"] == trained["top1"] and found["FGSM 8/255"] == trained["FGSM 8/255"]
    assert found["ImageNet-A"] == 100 and found["background"] in (0, 100)

    with pytest.raises(SystemExit, match="does not fit pit_ti"):
        pit_imagenet.main([*common, "--models", "pit_ti", "--checkpoint",
                           str(tree / "o" / "PiT-seed0.pt"), "--out", str(tree / "f")])
    with pytest.raises(SystemExit, match="no model 'resnet'.*PiT, ViT"):
        pit_imagenet.main([*common, "--models", "resnet", "--out", str(tree / "f")])
    with pytest.raises(SystemExit, match="distill needs --teacher"):
        pit_imagenet.main([*common, "--models", "pit_ti", "--recipe", "distill", "--batch-size",
                           "4", "--out", str(tree / "f")])
    with pytest.raises(SystemExit, match="whole batch"):
        pit_imagenet.main([*common, "--models", "PiT", "--out", str(tree / "f")])
    (tree / "data" / "val" / "n03").mkdir()
    with pytest.raises(SystemExit, match="different class folders"):
        pit_imagenet.main([*common, "--out", str(tree / "f")])
    with pytest.raises(SystemExit):
        pit_imagenet.main(["--preset", "small32", "--out", str(tree / "f")])
    assert "--preset small32 needs --data" in capsys.readouterr().err


def test_distillation_recipe_with_a_teacher(tree, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pit_imagenet.py"])
    teacher = resnet.resnet18(num_classes=2)
    torch.save(teacher.state_dict(), tree / "teacher.pth")
    pit_imagenet.main(["--data", str(tree / "data"), "--preset", "paper", "--image-size", "32",
                       "--models", "pit_ti",
                       "--recipe", "distill", "--teacher", "resnet18", str(tree / "teacher.pth"),
                       "--epochs", "1",
                       "--batch-size", "4", "--device", "cpu", "--out", str(tree / "o")])
    assert read_results(tree / "o")["results"]["pit_ti_distilled-seed0"]["count"] == 6


def test_ablation_and_speed_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pit_ablation.py"])
    pit_ablation.main(["--preset", "tiny", "--epochs", "1", "--device", "cpu", "--out",
                       str(tmp_path / "a"),
                       "--figures", str(tmp_path / "f")])
    tables = read_results(tmp_path / "a", "pit_ablation")["tables"]
    assert [len(tables[name]) for name in ("pooling", "dimensions", "attention")] == [6, 4, 8]
    assert len(list((tmp_path / "f").glob("*.png"))) == 6
    for row in tables["attention"]:
        assert 0.9 < row["entropy / log N"] <= 1 and 0 < row["distance, px"] < 45
    monkeypatch.setattr(sys, "argv", ["speed_pit.py"])
    speed_pit.main(["--preset", "tiny", "--threads", "1", "--device", "cpu", "--out",
                    str(tmp_path / "s")])
    tables = read_results(tmp_path / "s", "speed_pit")["tables"]
    assert {row["pass"] for row in tables["time"]} == {"forward", "training step"}
    assert 0 < tables["memory"][0]["ours / unfused"] < 1
