"""PiT's training recipe: schedule, augmentation, mixing, losses, distillation, training, probes."""

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_pit import EXACT, blocks_of, close, equal, images, load, rng, small
from torch import nn

from reference import pit


def photograph(height, width, seed=0):
    pixels = torch.randint(256, (height, width, 3), generator=rng(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def pixels(image):
    return torch.from_numpy(np.array(image))


# Parity


def test_schedule():
    lrs = [pit.cosine_lr(t, 1e-3) for t in range(310)]
    close(torch.tensor(lrs, dtype=torch.float64), load("recipe")["sched/lr_per_epoch"], rtol=1e-6,
          atol=0)
    lagged = [pit.cosine_lr(t, 1e-3, lag=True) for t in range(4)]
    assert lagged == [lrs[0], lrs[0], lrs[1], lrs[2]]


@pytest.mark.parametrize("prefix", ["mix/", "mix_nosmooth/"])
def test_mixing(prefix):
    golden = load("recipe", prefix)
    x, y = golden["x"], golden["y"]
    target = pit.smooth_one_hot(y, int(golden["num_classes"]), float(golden["smoothing"]))

    def mixed_target(lam):
        return lam * target + (1 - lam) * target.flip(0)

    lam = float(golden["mixup_lam"])
    close(pit.mixup_batch(x, lam), golden["mixup_x"], **EXACT)
    close(mixed_target(lam), golden["mixup_target"], **EXACT)
    for j in range(2):
        center = tuple(golden[f"cutmix{j}_center_yx"].tolist())
        mixed, lam = pit.cutmix_batch(x, float(golden[f"cutmix{j}_lam"]), center)
        assert isinstance(lam, float) and torch.equal(mixed, golden[f"cutmix{j}_x"])
        close(mixed_target(lam), golden[f"cutmix{j}_target"], **EXACT)


def test_losses():
    golden = load("recipe", "loss/")
    logits, y, soft = golden["logits"], golden["y"], golden["soft_target"]
    close(pit.SoftTargetCrossEntropy()(logits, soft), golden["soft_target_ce"], **EXACT)
    smoothed = pit.LabelSmoothingCrossEntropy()(logits, y)
    close(smoothed, golden["label_smoothing_ce_0.1"], **EXACT)
    for kind, alpha, tau in (("none", 0.5, 1.0), ("hard", 0.5, 1.0), ("soft", 0.1, 3.0)):
        loss = pit.DistillationLoss(pit.SoftTargetCrossEntropy(),
                                    lambda _: golden["teacher_logits"], kind, alpha, tau)
        found = loss(logits, (logits, golden["logits_dist"]), soft)
        close(found, golden[f"distill_{kind}_alpha{alpha}_tau{tau}"], **EXACT)


def test_sampler():
    golden = load("recipe", "ra/")
    for key, wanted in golden.items():
        n, replicas, rank, epoch = map(int, re.findall(r"\d+", key))
        sampler = pit.RepeatedAugSampler(n, replicas, rank)
        sampler.set_epoch(epoch)
        assert list(sampler) == wanted.tolist() and len(sampler) == len(wanted)
    assert len(golden) == 3
    tiny = pit.RepeatedAugSampler(range(10), num_replicas=3, rank=1, shuffle=False)
    assert list(tiny) == [0, 1, 2] and len(tiny) == 3       # below 256 images: floor(n / replicas)


def test_weight_decay_names():
    golden = load("recipe", "wd/")
    names = set(golden["no_decay"]) | set(golden["decay"])
    model = next(m for m in (small(), small(pit.DistilledPoolingTransformer), pit.pit_ti())
                 if {name for name, _ in m.named_parameters()} == names)
    by_id = {id(p): name for name, p in model.named_parameters()}
    for group, kind, rate in zip(pit.param_groups(model, 0.07), ("no_decay", "decay"), (0, 0.07)):
        assert group["weight_decay"] == rate
        assert {by_id[id(p)] for p in group["params"]} == set(golden[kind])


def test_models_inside_wrappers():
    model = small()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert type(pit.ModelEma(wrapped).module) is pit.PoolingTransformer
        assert pit.param_groups(wrapped) == pit.param_groups(model)
    own = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    own.module = own["module"]                  # only a name: nothing is unwrapped
    assert sum(len(group["params"]) for group in pit.param_groups(own)) == 4


def test_drop_path_rates():
    golden = load("recipe", "droppath/")
    for key, wanted in golden.items():
        name, rate, rule = re.fullmatch(r"(pit_\w+?)_([\d.]+)_(\w+)", key).groups()
        with torch.device("meta"):
            model = getattr(pit, name)(drop_path_rate=float(rate), drop_path_rule=rule)
        for which in ("drop_path1", "drop_path2"):
            rates = [getattr(block, which).drop_prob for block in blocks_of(model)]
            close(torch.tensor(rates, dtype=torch.float64), wanted, rtol=1e-6, atol=1e-9)
    assert len(golden) > 1


def test_ema():
    golden = load("recipe", "ema/")
    model = nn.Linear(3, 1, bias=False)
    model.weight.data.zero_()
    model.register_buffer("seen", torch.zeros(()))
    ema = pit.ModelEma(model, float(golden["decay"]))
    for fed, wanted in zip(golden["weights_fed"].tolist(), golden["state"]):
        model.weight.data.fill_(fed)
        model.seen += 1
        ema.update(model)
        close(ema.module.weight.data[0], wanted, **EXACT)
        assert ema.module.seen == model.seen
    assert model.weight[0, 0] == 5 and not ema.module.weight.requires_grad


def test_evaluation_transform():
    golden = load("recipe", "eval/")
    image = Image.fromarray(golden["img_uint8"].numpy())
    close(pit.eval_transform(image, 32, 0.9), golden["size32_crop0.9"], **EXACT)
    close(pit.eval_transform(image, 48, 0.875), golden["size48_crop0.875"], **EXACT)


def test_randaugment_operations():
    golden = load("recipe", "ra_ops/")
    image, level = Image.fromarray(golden["img_uint8"].numpy()), float(golden["level"])
    assert pit.RANDAUGMENT_OPS == tuple(golden["order"])
    cases = [key.split("/")[:2] for key in golden if key.endswith("/out")]
    for name, sign in cases:
        arg = pit.randaugment_argument(name, level, sign == "neg1")
        wanted = golden[f"{name}/{sign}/args"].tolist()
        assert ([] if arg is None else [arg]) == pytest.approx(wanted)
        out = np.asarray(pit.apply_randaugment_op(image, name, level, sign == "neg1")).astype(int)
        off = np.abs(out - golden[f"{name}/{sign}/out"].numpy().astype(int)).max()
        assert off <= (1 if name.startswith(("Rotate", "Shear", "Translate")) else 0), name
    assert len(cases) == 24


# The pieces that draw random numbers


def test_mixup_draws():
    x, y = images(4, 3, 16, 16), torch.arange(4)
    mix, again = (pit.Mixup(num_classes=5, generator=rng()) for _ in range(2))
    kinds = set()
    for _ in range(20):
        mixed, target = mix(x, y)
        assert equal((mixed, target), again(x, y))
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
    image = photograph(20, 24)
    a, b = ([pixels(pit.RandAugment(generator=rng(i))(image)) for i in range(20)] for _ in range(2))
    assert equal(a, b)
    changed = sum(not torch.equal(p, pixels(image)) for p in a)
    assert 8 <= changed <= 19                                 # one in four is left alone
    assert torch.equal(pixels(pit.RandAugment(prob=0, generator=rng())(image)), pixels(image))
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
    image = photograph(40, 60)

    def transform(seed, augment=None):
        return pit.train_transform(image, 24, augment, rng(seed))

    out = transform(0, pit.RandAugment(generator=rng(1)))
    assert out.shape == (3, 24, 24) and out.dtype == torch.float32
    assert torch.equal(transform(3), transform(3)) and not torch.equal(transform(3), transform(4))
    assert pit.train_transform(Image.new("L", (1, 90)), 8, generator=rng()).shape == (3, 8, 8)
    plain = pit.train_transform(Image.new("RGB", (30, 30), (124, 116, 104)), 8, generator=rng())
    assert plain.abs().max() < 0.02                           # the mean colour becomes zero
    assert len({round(float(transform(i).mean()), 5) for i in range(40)}) > 30


# Training, evaluation, probes


def toy(batch=8, batches=3, model_class=pit.PoolingTransformer, **changes):
    x = images(batch * batches, 3, 32, 32, seed=7)
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
    (log,) = pit.train(model, loader, epochs=1, lr=1e-3, warmup_epochs=0)
    optimizer = torch.optim.AdamW(pit.param_groups(mirror, 0.05), lr=1e-3, eps=1e-8)
    F.cross_entropy(mirror(loader[0][0]), loader[0][1]).backward()
    norm = torch.cat([p.grad.flatten() for p in mirror.parameters()]).norm().item()
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    optimizer.step()
    for a, b in zip(model.parameters(), mirror.parameters()):
        close(a, b, rtol=1e-5, atol=1e-7)


class Counted(list):
    """A loader that can start in the middle of an epoch."""

    def set_epoch(self, epoch, start_batch=0):
        self.start = start_batch

    def __iter__(self):
        return iter(self[self.start:])


def shuffled(generator):
    return lambda batches: torch.utils.data.DataLoader(batches, None, True, generator=generator)


@pytest.mark.parametrize("container", [list, Counted, shuffled(None), shuffled(rng(5))])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resumed_training_is_bit_identical(tmp_path, stop, container):
    def start(resume=None):
        model, loader = toy(model_class=pit.DistilledPoolingTransformer, drop_path_rate=0.3)
        ema = pit.ModelEma(model, 0.9)
        steps = pit.train(model, container(loader), epochs=3, warmup_epochs=1, generator=rng(9),
                          ema=ema, mixup=pit.Mixup(num_classes=10, generator=rng(10)),
                          teacher=lambda x: torch.ones(len(x), 10), resume=resume)
        return model, ema, steps

    (model, ema, steps), losses = start(), []
    for log in steps:
        losses.append(log["loss"])
        model.eval()                                # evaluation changes nothing
        if len(losses) == stop:
            torch.save(steps.send("state"), tmp_path / "s.pt")
    snapshot = torch.load(tmp_path / "s.pt", weights_only=True)
    for _ in range(2):                              # resuming leaves the snapshot as it is
        model2, ema2, rest = start(snapshot)
        assert [log["loss"] for log in rest] == losses[stop:]
        assert equal(model.state_dict(), model2.state_dict())
        assert equal(ema.module.state_dict(), ema2.module.state_dict())


def test_a_sampler_is_told_the_epoch():
    model, batches = toy(batches=1)
    loader, seen = torch.utils.data.DataLoader(range(300), sampler=pit.RepeatedAugSampler(300)), []
    loader.collate_fn = lambda index: (seen.append(index[0]), batches[0])[1]
    list(pit.train(model, loader, epochs=2))
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert seen[256 * epoch:][:256] == list(loader.sampler)


def test_training_errors():
    model, loader = toy(model_class=pit.DistilledPoolingTransformer)
    with pytest.raises(TypeError, match="teacher"):
        next(pit.train(model, loader, epochs=1))
    model, loader = toy()
    with pytest.raises(ValueError, match="one tensor"):
        next(pit.train(model, loader, epochs=1, teacher=nn.Identity()))
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        next(pit.train(model, [(loader[0][0] * float("nan"), loader[0][1])], epochs=1))
    for empty, epoch in (([], 0), (iter(loader), 1)):
        with pytest.raises(ValueError, match=f"no batch in epoch {epoch}"):
            list(pit.train(toy()[0], empty, epochs=2))


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_mixed_precision_training(device):
    for dtype in (torch.bfloat16, torch.float16)[:1 if device == "cpu" else 2]:
        model, loader = toy()
        logs = list(pit.train(model, loader, epochs=3, lr=1e-3, warmup_epochs=0, amp_dtype=dtype,
                              device=device, generator=torch.Generator(device).manual_seed(0),
                              mixup=pit.Mixup(num_classes=10, generator=rng())))
        assert all(math.isfinite(log["loss"]) for log in logs)
        assert next(model.parameters()).dtype == torch.float32


def test_evaluate_by_hand():
    model, loader = toy()
    logits = torch.cat([model.eval()(x) for x, _ in loader])
    labels = torch.cat([y for _, y in loader])
    model.train().norm.eval()
    found = pit.evaluate(model, loader)
    assert model.training and not model.norm.training and found["count"] == 24
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    top5 = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
    assert found["top5"] == pytest.approx(100 * top5.double().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    subset = [(x, y % 3) for x, y in loader]
    kept = pit.evaluate(model, subset, transform_logits=lambda z: z[:, [7, 2, 5]])
    assert kept["top5"] == 100
    wanted = (logits[:, [7, 2, 5]].argmax(1) == labels % 3).double().mean().item()
    assert kept["top1"] == pytest.approx(100 * wanted)
    found = pit.evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 0]))])    # no weights
    assert found["top1"] == pytest.approx(200 / 3) and found["count"] == 3


def test_fgsm():
    model, loader = toy()
    x, y = loader[0][0].clamp(0, 1), loader[0][1]
    adversary = pit.fgsm(model, x, y, 0.1)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert adversary.min() >= 0 and adversary.max() <= 1
    assert (adversary - x).abs().max() <= 0.1 + 1e-6
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pit.IMAGENET_MEAN, pit.IMAGENET_STD))
    model.eval()

    def loss(z):
        return F.cross_entropy(model((z - mean) / std), y)

    assert loss(adversary) > loss(x)
    z = x.clone().requires_grad_()
    loss(z).backward()
    assert torch.equal(adversary, (x + 0.1 * z.grad.sign()).clamp(0, 1))
    other = pit.fgsm(model, x, y, 0.1, mean=(0, 0, 0), std=(1, 1, 1))
    assert not torch.equal(other, adversary) and torch.equal(pit.fgsm(model, x, y, 0.0), x)
    with torch.inference_mode():
        assert torch.equal(pit.fgsm(model, x.clone(), y.clone(), 0.1), adversary)


def test_occlusion():
    x = images(8, 3, 32, 32)
    hidden = pit.occlude_center(x, 12)
    assert (hidden[..., 10:22, 10:22] == 0).all()
    assert torch.equal(hidden[..., :10, :], x[..., :10, :])
    assert (hidden != x).sum() == 8 * 3 * 144 and torch.equal(pit.occlude_center(x, 0), x)
    assert (pit.occlude_center(x, 32) == 0).all()
    assert (pit.occlude_center(images(1, 1, 8, 12), 4) == 0).nonzero()[[0, -1], 2:].tolist() == \
        [[2, 4], [5, 7]]


X, Y, PAIR = torch.rand(3, 3, 8, 8), torch.arange(3), (torch.rand(3, 4),) * 2


@pytest.mark.parametrize("call, error, message", [
    (lambda: pit.DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), "medium"), ValueError,
     "kind.*'medium'"),
    (lambda: pit.DistillationLoss(nn.CrossEntropyLoss(), nn.Identity())(X, PAIR[0], Y), ValueError,
     "one tensor"),
    (lambda: pit.Mixup(num_classes=3)(X, Y), ValueError, "even batch.*3"),
    (lambda: pit.Mixup(0, 0), ValueError, "not both 0"),
    (lambda: pit.Mixup(num_classes=3)(X[:2], Y[:1]), ValueError, "x and y.*2 and 1"),
    (lambda: pit.Mixup(num_classes=0), ValueError, "num_classes.*0"),
    (lambda: pit.Mixup(-1), ValueError, "mixup_alpha.*-1"),
    (lambda: pit.Mixup(prob=1.5), ValueError, "prob.*1.5"),
    (lambda: pit.mixup_batch(X, float("nan")), ValueError, "lam.*nan"),
    (lambda: pit.cutmix_batch(X, 1.1), ValueError, "lam.*1.1"),
    (lambda: pit.cutmix_batch(X, 0.5, (0, -10)), ValueError, "center.*-10"),
    (lambda: pit.cutmix_batch(X, 0.5, (8, 0)), ValueError, "center.*8"),
    (lambda: pit.smooth_one_hot(Y, 2), ValueError, "y must be in 0..1, got 0..2"),
    (lambda: pit.smooth_one_hot(Y.float(), 3), ValueError, "y must be.*int64.*float32"),
    (lambda: pit.smooth_one_hot(Y[None], 3), ValueError, r"y must be \(B,\).*\(1, 3\)"),
    (lambda: pit.SoftTargetCrossEntropy()(PAIR[0], PAIR[0][:, :2]), ValueError, "target.*3, 4"),
    (lambda: pit.DistillationLoss(nn.CrossEntropyLoss(), None), ValueError, "teacher"),
    (lambda: pit.DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), tau=0), ValueError, "tau"),
    (lambda: pit.DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), alpha=2), ValueError,
     "alpha.*2"),
    (lambda: pit.ModelEma(nn.Identity(), 1.1), ValueError, "decay.*1.1"),
    (lambda: pit.cosine_lr(0, 1e-3, 0), ValueError, "epochs.*0"),
    (lambda: pit.cosine_lr(-1, 1e-3), ValueError, "epoch.*-1"),
    (lambda: pit.cosine_lr(0, 1e-3, 10, -1), ValueError, "warmup_epochs.*-1"),
    (lambda: pit.RandomErasing(min_area=0.5), ValueError, "min_area.*0.5"),
    (lambda: pit.RandomErasing(min_aspect=0), ValueError, "min_aspect.*0"),
    (lambda: pit.RandomErasing()(X[0, 0]), ValueError, r"\(C, H, W\).*\(8, 8\)"),
    (lambda: pit.RandomErasing()(X.byte()), TypeError, "x.*float.*uint8"),
    (lambda: pit.RandAugment(magnitude=11), ValueError, "magnitude.*11"),
    (lambda: pit.randaugment_argument("Rotate", 11), ValueError, "level.*11"),
    (lambda: pit.eval_transform(Image.new("RGB", (8, 8)), 4, 0), ValueError, "crop.*0"),
    (lambda: pit.train_transform(Image.new("RGB", (8, 8)), 0), ValueError, "size.*0"),
    (lambda: pit.eval_transform(Image.new("RGB", (8, 8)), 4.5), ValueError, "size.*4.5"),
    (lambda: pit.eval_transform(X[0], 4), TypeError, "image.*PIL.*Tensor"),
    (lambda: pit.train_transform(None, 4), TypeError, "image.*PIL.*NoneType"),
    (lambda: pit.RandAugment()(X[0]), TypeError, "image.*PIL.*Tensor"),
    (lambda: pit.fgsm(small(), X, Y, -0.1), ValueError, "eps.*-0.1"),
    (lambda: pit.fgsm(small(), X.byte(), Y, 0.1), TypeError, "x.*float.*uint8"),
    (lambda: pit.attention_entropy(X[0]), ValueError, "attn.*N, N"),
    (lambda: pit.interaction_rate(X, num_tokens=8), ValueError, "num_tokens.*8"),
    (lambda: pit.SoftTargetCrossEntropy()(PAIR, Y), TypeError, "teacher"),
    (lambda: pit.LabelSmoothingCrossEntropy()(PAIR, Y), TypeError, "teacher"),
    (lambda: pit.LabelSmoothingCrossEntropy(1.5), ValueError, "smoothing.*1.5"),
    (lambda: pit.RepeatedAugSampler(10, num_replicas=2, rank=2), ValueError, "rank"),
    (lambda: pit.RepeatedAugSampler(-1), ValueError, "data_source.*-1"),
    (lambda: pit.randaugment_argument("Blur", 9), ValueError, "name.*Blur"),
    (lambda: pit.RandAugment()(Image.new("L", (8, 8))), ValueError, "RGB.*mode L"),
    (lambda: pit.apply_randaugment_op(Image.new("L", (8, 8)), "Invert", 9), ValueError, "mode L"),
    (lambda: pit.RandAugment(num_ops=1.5), ValueError, "num_ops.*1.5"),
    (lambda: pit.cutmix_batch(X, 0.5, (1, 2, 3)), ValueError, "center.*1, 2, 3"),
    (lambda: pit.attention_entropy(X.numpy()), TypeError, "attn.*ndarray"),
    (lambda: pit.occlude_center(X, 9), ValueError, "size.*9"),
    (lambda: pit.evaluate(small(), []), ValueError, "empty")])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
