"""PiT: parity with the public implementation, tables, identities of the method, errors."""

import copy
import doctest
import math
import re
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reference import pit

GOLDEN = Path(__file__).parent / "golden" / "pit"
CONFIG_A = dict(image_size=32, patch_size=8, stride=4, base_dims=[8, 8, 8], depth=[1, 2, 1],
                heads=[2, 4, 8], mlp_ratio=4, num_classes=10)
CONFIG_B = dict(image_size=30, patch_size=7, stride=5, in_chans=1, base_dims=[4, 4], depth=[2, 1],
                heads=[3, 6], mlp_ratio=2, num_classes=7)
BOTH = pytest.mark.parametrize("model_class",
                               [pit.PoolingTransformer, pit.DistilledPoolingTransformer])
EXACT = dict(rtol=1e-6, atol=1e-6)


def load(name, prefix=""):
    """The arrays of a file whose key starts with `prefix`, without it; text stays numpy."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    return {key: torch.from_numpy(value) if value.dtype.kind in "fiu" else value
            for key, value in arrays.items()}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, seed=0, **options):
    return torch.rand(*(shape or (2, 3, 32, 32)), generator=rng(seed), **options)


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


def seeded_image(seed):
    u = 1.7 * uniform_from_key("input.x", (1, 3, 224, 224), seed)
    return torch.from_numpy(u.astype(np.float32))


def small(model_class=pit.PoolingTransformer, seed=0, **changes):
    model = model_class(**{**CONFIG_A, **changes})
    pit.init_weights(model, generator=rng(seed))
    return model


def close(found, wanted, atol=2e-5, rtol=1e-4):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)


def close_gradient(found, wanted):
    close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3)


def equal(a, b):
    """Whether two state dicts, or two sequences of tensors, hold the same numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def blocks_of(model):
    return [block for stage in model.transformers for block in stage.blocks]


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
    golden, params = load(name), load(name, "param/")
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
    state = seeded(model, seed).state_dict()
    assert list(state) == list(golden["param_checksum/names"])
    for kind, value in (("sum", torch.Tensor.double), ("abs_sum", lambda v: v.double().abs())):
        close(torch.stack([value(v).sum() for v in state.values()]),
              golden[f"param_checksum/{kind}"], atol=1e-9, rtol=1e-9)
    x = seeded_image(seed)
    checksum = torch.stack([x.double().sum(), x.double().abs().sum()])
    close(checksum, golden["x_checksum"], rtol=1e-9, atol=0)

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
    gradients = {key: p.grad.flatten() for key, p in model.named_parameters()}
    assert sorted(gradients) == sorted(golden["grad/names"])
    for i, key in enumerate(golden["grad/names"]):
        grad = gradients[key]
        close(grad.norm(), golden["grad/l2"][i].float(), rtol=1e-3, atol=0)
        first = grad[torch.arange(8) % len(grad)]
        close(first, golden["grad/first8"][i].float(), rtol=1e-3,
              atol=1e-5 * float(grad.abs().max()))
    close(x.grad.norm(), golden["grad_x_l2"].float(), rtol=1e-3, atol=0)
    close_gradient(F.avg_pool2d(x.grad.abs(), 28), golden["grad_x_mean_abs_8x8"])


def test_deit_tiny():
    golden, model = load("full_deit_tiny"), pit.deit_tiny_patch16_224().eval()
    seed = int(golden["seed"])
    state = seeded(model, seed).state_dict()
    assert list(state) == list(golden["param_checksum/names"])
    shapes = [re.findall(r"\d+", text) for text in golden["param_checksum/shapes"]]
    assert [list(map(str, value.shape)) for value in state.values()] == shapes
    close(torch.stack([v.double().sum() for v in state.values()]), golden["param_checksum/sum"],
          rtol=1e-9, atol=1e-9)
    assert parameters(model) == int(golden["num_params"])
    x = seeded_image(seed)
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


def test_position_map_resized_while_a_graph_is_alive():
    model = small()
    optimizer, alive = torch.optim.SGD(model.parameters(), 0.1), model(images())
    model.set_image_size(40)
    before = model.pos_embed.detach().clone()
    model(images(2, 3, 40, 40)).square().sum().backward()
    optimizer.step()                            # it still holds the map
    assert alive.requires_grad and (model.pos_embed != before).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_given_drop_path_masks(checkpointing):
    golden = load("drop_path_masked")
    model = small(drop_path_rate=0.5, grad_checkpointing=checkpointing)
    model = seeded(model, int(golden["seed"])).train()
    rows = iter(zip(golden["keep_masks"], golden["drop_rates"].tolist()))

    class Masked(nn.Module):
        def __init__(self, drop_path):
            super().__init__()
            self.keep, self.rate = next(rows)
            assert drop_path.drop_prob == pytest.approx(self.rate)

        def forward(self, x):
            return x * self.keep.view(-1, 1, 1) / (1 - self.rate)

    for block in blocks_of(model):
        block.drop_path1, block.drop_path2 = Masked(block.drop_path1), Masked(block.drop_path2)
    close(model(golden["x"]), golden["logits_train"])


def test_attention_statistics():
    golden, maps = load("attention_stats_small_a"), load("small_a", "attn/")
    for i, attn in enumerate(maps.values()):
        def wanted(name):
            return golden[f"block{i}/{name}_per_head"]

        close(pit.attention_entropy(attn), wanted("entropy_nats"), **EXACT)
        close(pit.interaction_distance(attn), wanted("distance_in_tokens"), **EXACT)
        grid = int(golden[f"block{i}/grid"])
        assert torch.equal(pit.interaction_distance(attn, (grid, grid)),
                           pit.interaction_distance(attn, grid))
        for tau in (0.01, 0.02, 0.1):
            close(pit.interaction_rate(attn, tau), wanted(f"interaction_rate_tau{tau}"), atol=1e-6)
    assert len(maps) == 4


# Tables and identities


@pytest.mark.parametrize("name, counts, gmacs, side, stages", [
    ("ti", (4847272, 5104336), (0.699, 0.705), 27, (0.208, 0.292, 0.162)),
    ("xs", (10618888, 11003984), (1.395, 1.407), 27, None),
    ("s", (23461912, 24039056), (2.871, 2.897), 27, (0.670, 1.311, 0.808)),
    ("b", (73764840, 74790096), (12.402, 12.482), 31, (3.691, 5.257, 3.306))])
def test_parameters_macs_and_grids_of_the_paper(name, counts, gmacs, side, stages):
    with torch.device("meta"):
        models = [getattr(pit, f"pit_{name}{suffix}")() for suffix in ("", "_distilled")]
        headless = getattr(pit, f"pit_{name}_224")(num_classes=0)
    assert tuple(map(parameters, models)) == counts
    assert counts[0] - parameters(headless) == models[0].head.weight.numel() + 1000
    assert [len(model.state_dict()) for model in models] == ([172, 174] if name == "b"
                                                             else [160, 162])
    assert models[0].grids == [(n, n) for n in (side, (side + 1) // 2, (side + 3) // 4)]
    for model, total in zip(models, gmacs):
        macs = pit.count_macs(model)
        assert round(macs["total"] / 1e9, 3) == total
        assert macs["total"] == sum([macs["embed"], *macs["stages"], *macs["pools"], macs["head"]])
    if stages:
        found = pit.count_macs(models[0])["stages"]
        assert tuple(round(n / 1e9, 3) for n in found) == stages


@pytest.mark.parametrize("name, count, gmacs", [
    ("tiny", 5717416, 1.254), ("small", 22050664, 4.599), ("base", 86567656, 17.564),
    ("tiny_distilled", 5910800, None), ("small_distilled", None, None),
    ("base_distilled", None, None)])
def test_parameters_and_macs_of_deit(name, count, gmacs):
    with torch.device("meta"):
        model = getattr(pit, f"deit_{name}_patch16_224")()
    assert count in (None, parameters(model))
    assert gmacs in (None, round(pit.count_macs(model)["total"] / 1e9, 3))
    tokens = 2 if "distilled" in name else 1
    assert model.pos_embed.shape[1] == 196 + tokens
    assert ("dist_token" in model.state_dict()) == (tokens == 2)


@BOTH
def test_last_block_on_class_tokens_alone_is_exact(model_class):
    model = small(model_class).double().eval()
    x = images(dtype=torch.float64)

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
    x, exact = images(dtype=torch.float64), dict(rtol=1e-12, atol=1e-12)
    features = vit.forward_features(x)
    logits, logits_dist = vit(x)
    assert features.shape == (2, 18, 24)
    close(logits, vit.head(features[:, 0]), **exact)
    close(logits_dist, vit.head_dist(features[:, 1]), **exact)
    close(vit.eval()(x), (logits + logits_dist) / 2, **exact)


def test_without_positions_one_stage_ignores_the_order_of_patches():
    model = small(base_dims=[8], depth=[2], heads=[4], stride=8, pool="none").eval()
    model.pos_embed.data.zero_()
    x = images()
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
    close(model(images()), vit(images()), rtol=1e-5, atol=1e-6)
    assert pit.count_macs(model) == pit.count_macs(vit)


@pytest.mark.parametrize("pool, peer", [("avg", F.avg_pool2d), ("max", F.max_pool2d)])
def test_parameter_free_pooling(pool, peer):
    model = small(pool=pool).eval()
    assert not any("conv" in key for key in model.state_dict() if key.startswith("pools"))
    x = images(2, 4, 5, 7)
    spatial, tokens = pit.HeadPooling(4, 8, pool)(x, images(2, 1, 4))
    assert spatial.shape == (2, 8, 3, 4) and tokens.shape == (2, 1, 8)
    for channel in range(8):
        assert torch.equal(spatial[:, channel], peer(x, 3, 2, 1)[:, channel // 2])
    assert model(images()).shape == (2, 10)


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


# Checkpoints and heads


def test_keys_of_timm_wrappers_and_prefixes(tmp_path):
    official = small().state_dict()
    timm = {re.sub(r"^pools\.(\d)\.", lambda m: f"transformers.{int(m[1]) + 1}.pool.", k): v
            for k, v in official.items()}
    assert timm.keys() != official.keys()
    assert list(pit.convert_timm_state_dict(timm)) == list(official)
    assert list(pit.convert_timm_state_dict(official)) == list(official)
    for wrapped in (timm, {"model": official, "epoch": 3}, {"state_dict": timm},
                    {"model_ema": timm}, {f"module.{k}": v for k, v in timm.items()},
                    {"model": {f"module._orig_mod.{k}": v for k, v in official.items()}}):
        torch.save(wrapped, tmp_path / "w.pth")
        for state in (wrapped, pit.load_pit_checkpoint(tmp_path / "w.pth")):
            other = small(seed=1)
            other.load_state_dict(state)
            assert equal(other.state_dict(), official)


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
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="head_dist.weight"):
        model.load_state_dict({**state, "head_dist.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="norm.bias"):
        model.load_state_dict({key: v for key, v in state.items() if key != "norm.bias"})
    for content, message in (([1, 2], "holds a list"), ({}, "holds no weights, only nothing"),
                             ({"epoch": 3, "args": ""}, "holds no weights, only epoch, args")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"w.pth {message}"):
            pit.load_pit_checkpoint(path)
    with pytest.raises(TypeError, match="path of a checkpoint, got True"):
        pit.pit_ti(True)
    for content in (b"", b"not a checkpoint", b"junk", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="w.pth is not a torch.save file"):
            pit.load_pit_checkpoint(path)
    small_vit = dict(image_size=32, depth=1, num_classes=3)
    vit = pit.deit_tiny_patch16_224(**small_vit)
    torch.save({"model": {f"module.{k}": v for k, v in vit.state_dict().items()}}, path)
    assert equal(pit.deit_tiny_patch16_224(path, **small_vit).state_dict(), vit.state_dict())
    with pytest.raises(ValueError, match="another image size"):
        pit.deit_tiny_patch16_224(path, **{**small_vit, "image_size": 48})


@pytest.mark.parametrize("model", [
    small(pit.DistilledPoolingTransformer),
    pit.VisionTransformer(32, 8, 64, 1, 2, num_classes=10, distilled=True)], ids=["pit", "vit"])
def test_classifier_can_be_replaced(model):
    model, x = model.double(), images(dtype=torch.float64)
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(3)
    assert [z.shape for z in model(x)] == [(2, 3), (2, 3)] and model.num_classes == 3
    model.eval().reset_classifier(0)
    assert model(x).shape == (2, 64) and not any(m.training for m in model.modules())


def test_names_without_weight_decay_and_headless_model():
    assert small(num_classes=0).get_classifier()(5) == 5
    for model_class in (pit.PoolingTransformer, pit.DistilledPoolingTransformer):
        assert small(model_class).no_weight_decay() == {"pos_embed", "cls_token"}
    assert pit.VisionTransformer(32).no_weight_decay() == {"pos_embed", "cls_token", "dist_token"}


# Arithmetic: stochastic depth, checkpointing, precision, initialisation


@BOTH
def test_checkpointing_gives_the_same_gradients_under_stochastic_depth(model_class):
    results = []
    for checkpointing in (False, True):
        model = small(model_class, drop_path_rate=0.5, grad_checkpointing=checkpointing)
        generator = rng(5)
        for module in model.modules():
            if isinstance(module, pit.DropPath):
                module.generator = generator
        out = model(images(8, 3, 32, 32))
        sum((z**2).sum() for z in (out if isinstance(out, tuple) else (out,))).backward()
        results.append([p.grad for p in model.parameters()] + [generator.get_state()])
    assert equal(*results)


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
    kept = pit.DropPath(0.3)(torch.ones(50, dtype=torch.float64)).max()
    assert kept.item() == pytest.approx(1 / 0.7, rel=1e-15)


def test_inference_without_gradients_gives_the_same_numbers():
    model, x = small().eval(), images()
    wanted = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), wanted) and torch.equal(model(x), wanted)
    close(model.requires_grad_(False)(x), wanted, rtol=1e-5, atol=1e-5)


def test_precision_layout_and_batch_of_one_or_none():
    model, x = small().eval(), images(4, 3, 32, 32)
    wanted, near = model(x), dict(rtol=1e-4, atol=1e-5)
    close(model(x[:1]), wanted[:1], **near)
    assert model(x[:0]).shape == (0, 10)
    close(model(x.to(memory_format=torch.channels_last)), wanted, **near)
    close(model(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), wanted, **near)
    for dtype, tolerance in ((torch.float64, near), (torch.bfloat16, dict(rtol=0.05, atol=0.05)),
                             (torch.float16, dict(rtol=0.01, atol=0.01))):
        close(copy.deepcopy(model).to(dtype)(x.to(dtype)).float(), wanted, **tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        close(model(x).float(), wanted, rtol=0.05, atol=0.05)
    if torch.cuda.is_available():
        close(model.cuda()(x.cuda()).cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_bf16_gradients_of_maps_one_cell_wide():
    """PyTorch's depth-wise weight gradient on a CPU, channels last, is uninitialised there."""
    for size in (8, (40, 8)) * 5:
        gradients = []
        for enabled in (False, True):
            model = small(image_size=size)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(images(3, 3, *model.image_size)).square().sum()
            loss.backward()
            gradients.append([pool.conv.weight.grad for pool in model.pools])
        for a, b in zip(*gradients):
            close(b, a, rtol=0, atol=0.1 * float(a.abs().max()))


class Doubled(nn.Module):
    """A layer in the place of another, as adapters and quantised layers are: it has no `weight`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2"])
@pytest.mark.parametrize("index", [0, -1])
@torch.no_grad()
def test_short_cuts_respect_replaced_and_watched_layers(name, index):
    model, seen = small().eval(), []
    block, wanted = blocks_of(model)[index], model(images())
    layer, (parent, _, leaf) = block.get_submodule(name), name.partition(".")
    hook = layer.register_forward_hook(lambda layer, args, out: seen.extend([out, out.clone()]))
    close(model(images()), wanted)
    assert torch.equal(*seen)                   # what a hook keeps is not overwritten afterwards
    hook.remove()
    setattr(block.get_submodule(parent), leaf, Doubled(layer))
    assert not torch.allclose(model(images()), wanted, atol=1e-4)


def test_gradients_by_finite_differences():
    model = small(image_size=12, base_dims=[2, 2], depth=[1, 1], heads=[1, 2]).double()
    x = images(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x).sin(), (x,), atol=1e-6)


def test_init_rules():
    model = pit.DistilledPoolingTransformer(**CONFIG_A, init="deit")
    assert blocks_of(model)[0].attn.qkv.bias.abs().max() == 0
    assert model.patch_embed.conv.bias.abs().max() > 0       # convolutions keep PyTorch's rule
    assert model.head_dist.bias.abs().max() == 0
    big = pit.PoolingTransformer(32, 8, 8, (64,), (1,), (8,))
    fc1 = blocks_of(big)[0].mlp.fc1
    assert fc1.weight.abs().max() <= 512**-0.5 and abs(fc1.weight.std() * 1536**0.5 - 1) < 0.02
    assert abs(big.pos_embed.std() - 0.02) < 2e-3 and big.norm.weight.unique().tolist() == [1]
    a, b, c = (small(seed=seed).state_dict() for seed in (1, 1, 2))
    assert equal(a, b) and not torch.equal(a["cls_token"], c["cls_token"])


def test_train_eval_modes_of_the_distilled_model():
    model = small(pit.DistilledPoolingTransformer)
    logits, logits_dist = model(images())
    close(model.eval()(images()), (logits + logits_dist) / 2)


def test_attention_maps_are_those_of_the_calling_thread():
    model = small().eval()
    wanted = model.attention_maps(images())

    def interrupt():
        other = threading.Thread(target=model, args=(images(3, 3, 32, 32),))
        other.start()
        other.join()

    hook = model.pools[0].register_forward_hook(
        lambda *_: interrupt() if threading.current_thread() is threading.main_thread() else None)
    found = model.attention_maps(images())
    hook.remove()
    assert len(found) == 4
    for a, b in zip(found, wanted):
        close(a, b)


def test_model_compiles_without_breaks():
    model = small().eval()
    close(torch.compile(model, backend="eager", fullgraph=True)(images()), model(images()))


def test_docstring_example():
    assert doctest.testmod(pit).failed == 0


# Errors


@pytest.mark.parametrize("changes, message", [
    (dict(depth=[1, 2]), "one entry per stage"), (dict(heads=None), "heads.*None"),
    (dict(depth=3), "one entry per stage.*, 3,"), (dict(depth=[1, 2.0, 1]), r"depth.*2\.0"),
    (dict(base_dims=[], depth=[], heads=[]), "at least one"),
    (dict(heads=[2, 3, 8]), r"multiple.*\[16, 24, 64\]"), (dict(image_size=7), "7x7.*patch of 8"),
    (dict(image_size=(32, 5)), "32x5"), (dict(image_size=(1, 2, 3)), "image_size"),
    (dict(drop_rate=1.0), "drop_rate.*1.0"), (dict(attn_drop_rate=-0.1), "attn_drop_rate.*-0.1"),
    (dict(drop_path_rate=1.5), "drop_path_rate.*1.5"), (dict(num_classes=-1), "num_classes.*-1"),
    (dict(init="normal"), "init.*'normal'"), (dict(attention="flash"), "attention.*'flash'"),
    (dict(pool="mean"), "pool.*'mean'"), (dict(pool="none"), "pool='none'.*one stage"),
    (dict(drop_path_rule="x"), "drop_path_rule"), (dict(depth=[1, 0, 1]), "depth.*at least 1"),
    (dict(patch_size=0), "patch_size.*at least 1"), (dict(mlp_ratio=0), "mlp_ratio.*0"),
    (dict(mlp_ratio=float("inf")), "mlp_ratio.*inf"), (dict(image_size="32"), "image_size.*'32'"),
    (dict(image_size=32.5), "image_size.*32.5"), (dict(patch_size=7.5), "patch_size.*7.5"),
    (dict(num_classes=2.5), "num_classes.*2.5"), (dict(drop_rate="0.1"), "drop_rate.*'0.1'")])
def test_bad_constructor_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        pit.PoolingTransformer(**{**CONFIG_A, **changes})


@pytest.mark.parametrize("changes, message", [
    (dict(embed_dim=10), "embed_dim"), (dict(image_size=8), "smaller than a patch"),
    (dict(depth=0), "depth.*at least 1"), (dict(drop_path_rate=1), "drop_path_rate.*1"),
    (dict(num_classes=-1), "num_classes.*-1")])
def test_bad_constructor_arguments_of_vit(changes, message):
    with pytest.raises(ValueError, match=message):
        pit.VisionTransformer(**changes)


@pytest.mark.parametrize("model", [small(), pit.VisionTransformer(32, 8, 8, 1, 2, num_classes=2)],
                         ids=["pit", "vit"])
@pytest.mark.parametrize("x, error, message", [
    (torch.rand(3, 32, 32), ValueError, r"\(B, 3, H, W\).*\(3, 32, 32\)"),
    (torch.rand(1, 1, 32, 32), ValueError, r"\(1, 1, 32, 32\)"),
    (torch.rand(1, 3, 32, 36), ValueError, r"\(32, 36\).*\(32, 32\)"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
    (np.zeros((1, 3, 32, 32), np.float32), TypeError, "images.*float tensor, got ndarray")],
    ids=["3-D", "channels", "size", "uint8", "numpy"])
def test_bad_images(model, x, error, message):
    with pytest.raises(error, match=message):
        model(x)


def test_numpy_integers_are_sizes():
    model = small(image_size=np.int64(32), depth=np.array([1, 2, 1]))
    model.set_image_size(np.int64(40))
    assert model.image_size == (40, 40)


def test_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match="smaller than a patch"):
        small(dynamic_image_size=True)(torch.rand(1, 3, 32, 5))


@pytest.mark.parametrize("call, message", [
    (lambda: pit.DropPath(1.0), "drop_prob"),
    (lambda: pit.interaction_distance(torch.rand(1, 2, 9, 9), grid=3), "3x3"),
    (lambda: small().reset_classifier(-2), "num_classes.*-2"),
    (lambda: small(num_classes=True), "num_classes.*True"),
    (lambda: small().set_image_size(4), "smaller than a patch"),
    (lambda: small().load_state_dict([]), "checkpoint holds a list")])
def test_other_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size, stride, image", [(8, 4, (37, 50)), (6, 2, (20, 23)),
                                                 (4, 4, (17, 16)), (3, 1, (5, 7))])
def test_the_patch_convolution_in_blocks_is_the_convolution(size, stride, image):
    conv = pit.PatchConv(3, 5, size, stride).double()
    x = torch.randn(2, 3, *image, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for way in (conv, conv.in_blocks):
        leaf = x.clone().requires_grad_()
        out = way(leaf)
        results.append([out, *torch.autograd.grad(out.cos().sum(), [leaf, *conv.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    assert conv.in_blocks(x[:0]).shape == conv(x[:0]).shape
