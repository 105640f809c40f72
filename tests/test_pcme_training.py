"""PCME's models, their training and its resumption, on one process and two."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reference import pcme

ROOT = Path(__file__).resolve().parent.parent


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def z(*shape):
    return torch.randn(*shape, generator=rng())


def close(actual, expected, rtol, atol=1e-12):
    values = (x.detach() if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    np.testing.assert_allclose(*values, rtol=rtol, atol=atol)


def tiny_model(seed=0):
    model = pcme.PCME(
        pcme.EncoderImage(nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6)), 6, 8),
        pcme.EncoderText(9, 6, 8))
    g = rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=g)
    return model


def batches(count=3, size=6):
    g = rng(1)
    return [(torch.randn(size, 3, 9, 9, generator=g), torch.randint(1, 9, (size, 5), generator=g),
             torch.randint(1, 6, (size,), generator=g)) for _ in range(count)]


def test_published_sizes():
    with torch.device("meta"):
        sizes = {
            pcme.EncoderImage(nn.Identity(), 2048, 1024): 12_591_104,
            pcme.EncoderImage(nn.Identity(), 2048, 512): 8_393_728,
            pcme.EncoderText(11755, 300, 1024): 9_236_512,
            pcme.EncoderText(2151, 300, 512): 2_759_024}
    for encoder, size in sizes.items():
        assert sum(p.numel() for p in encoder.parameters()) == size


@pytest.mark.parametrize("final_state", ["last_position", "both_ends"])
def test_sentence_states_are_those_of_each_caption_alone(final_state):
    encoder = pcme.EncoderText(9, 6, 8, final_state=final_state, n_samples_inference=0)
    tokens, lengths = torch.randint(9, (4, 5), generator=rng()), torch.tensor([5, 2, 4, 1])
    batch = pcme._sentence_state(encoder.rnn, encoder.embed(tokens), lengths, final_state)
    for row, caption, length in zip(batch, tokens, lengths):
        states = encoder.rnn(encoder.embed(caption[None, :length]))[0][0]
        backward = states[-1 if final_state == "last_position" else 0, 4:]
        close(row, torch.cat([states[-1, :4], backward]), 1e-5, 1e-6)


def test_model_outputs_official_checkpoints_and_heads():
    model = tiny_model()
    out = model(*batches(1)[0])
    names = ("features", "attentions", "residuals", "logsigma", "logsigma_att", "mu")
    assert out.keys() == {f"{side}_{name}" for side in ("image", "caption") for name in names}
    assert out["image_features"].shape == (6, 7, 8)
    other = tiny_model(1)
    saved = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    other.load_official({"model": {f"module.{k}": v for k, v in saved.items()}})
    assert all(torch.equal(saved[k], other.state_dict()[k]) for k in saved)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match="Missing key"):
        other.load_official({"img_enc.fc.bias": torch.zeros(8)})
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    heads = pcme.PCME(pcme.GaussianHead(5, 4), pcme.GaussianHead(3, 4))
    out = heads(z(6, 5), z(6, 3))
    assert out["caption_features"].shape == (6, 7, 4) and out["image_attentions"] is None
    close(out["image_mu"].norm(dim=1), np.ones(6), 1e-5)
    assert pcme.EncoderImage(nn.Identity(), 5, 4)(z(6, 5))["mu"].shape == (6, 4)


@pytest.mark.parametrize("arguments, message", [
    ({"epochs": (1, 2)}, "epochs must be one per phase"), ({"epochs": 0}, "epochs must be an int"),
    ({"epochs": 1, "phases": {"lr": 1.0}}, "phase must be"),
    ({"epochs": 1, "phases": [{"lr": 1.0, "tmax": 2}]}, "phase must be"),
    ({"epochs": 1, "phases": [{"lr": 1.0, "t_max": 0}]}, "t_max"),
    ({"epochs": 1, "clip": 0.0}, "clip"), ({"epochs": 1}, "gave no batch in epoch 0")])
def test_arguments_of_the_training_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        next(pcme.train(tiny_model(), pcme.MCSoftContrastiveLoss(), [], **arguments))


def test_a_model_in_double_precision_is_judged_in_it():
    kinds = set()

    class Judge(pcme.MCSoftContrastiveLoss):
        def forward(self, *samples, **more):
            kinds.update(x.dtype for x in samples[:4])
            return super().forward(*samples, **more)

    model, (batch,) = tiny_model().double(), batches(1)
    images = (batch[0].double(), *batch[1:])
    next(pcme.train(model, Judge(5, 5, vib_beta=1e-4), [images], epochs=1))
    assert kinds == {torch.float64}


def test_a_snapshot_asked_for_twice_is_the_same_and_loses_no_step():
    steps = pcme.train(tiny_model(), pcme.MCSoftContrastiveLoss(5, 5), batches(3), epochs=1)
    assert next(steps)["step"] == 1
    first, second = steps.send("state"), steps.send("state")
    assert first["position"] == second["position"] and next(steps)["step"] == 2


def test_an_iterator_that_is_used_up_ends_the_training():
    steps = pcme.train(tiny_model(), pcme.MCSoftContrastiveLoss(5, 5), iter(batches(2)), epochs=2)
    assert [next(steps)["step"], next(steps)["step"]] == [1, 2]
    with pytest.raises(ValueError, match="epoch 1 of phase 0"):
        next(steps)


PHASES = ({"lr": 0.02, "frozen": ("img_enc.cnn", "txt_enc.embed")}, {"lr": 0.01})


def test_training_lowers_the_loss_and_freezes_in_phase_one():
    model = tiny_model()
    criterion = pcme.MCSoftContrastiveLoss(5, 5, vib_beta=1e-4, uniform_lambda=0.1)
    frozen = (model.txt_enc.embed.weight, model.img_enc.cnn[0].weight)
    before = [weight.detach().clone() for weight in frozen]
    steps = pcme.train(model, criterion, batches(1), epochs=(15, 15), phases=PHASES)
    rows = [next(steps) for _ in range(15)]
    assert all(map(torch.equal, frozen, before))
    rows += list(steps)
    assert len(rows) == 30 and all(isinstance(v, (int, float)) for v in rows[0].values())
    assert not any(map(torch.equal, frozen, before))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["lr"] == 0.02 and rows[15]["lr"] == 0.01 and rows[14]["lr"] < 0.001


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_resuming_gives_the_same_numbers(stop):
    make = lambda: pcme.MCSoftContrastiveLoss(5, 5, uniform_lambda=1.0)  # noqa: E731
    options = {"epochs": (2, 2), "phases": PHASES, "seed": 3}
    whole = list(pcme.train(tiny_model(), make(), batches(), **options))
    model = tiny_model()
    steps = pcme.train(model, make(), batches(), **options)
    for row in whole[:stop]:
        assert next(steps) == row and model.eval()            # the caller may evaluate in between
    file = io.BytesIO()
    torch.save(steps.send("state"), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for _ in range(2):                                        # the snapshot stays as it is
        rest = pcme.train(tiny_model(5), make(), batches(), resume=state, **options)
        assert list(rest) == whole[stop:]


def test_a_run_that_is_left_in_phase_one_unfreezes_the_model():
    options = {"epochs": (1, 1), "phases": PHASES}
    whole = list(pcme.train(tiny_model(), pcme.MCSoftContrastiveLoss(5, 5), batches(), **options))
    model, criterion = tiny_model(), pcme.MCSoftContrastiveLoss(5, 5)
    steps = pcme.train(model, criterion, batches(), **options)
    next(steps)
    state = steps.send("state")
    steps.close()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(pcme.train(model, criterion, batches(), resume=state, **options)) == whole[1:]


def test_one_prefix_may_be_frozen():
    model = tiny_model()
    phase = {"lr": 0.02, "frozen": "img_enc.cnn"}
    next(pcme.train(model, pcme.MCSoftContrastiveLoss(5, 5), batches(1), epochs=1, phases=[phase]))
    assert model.img_enc.cnn[0].weight.grad is None and model.img_enc.fc.weight.grad is not None


@pytest.mark.parametrize("wrap", [
    lambda model: torch.compile(model, backend="eager"),
    lambda model: pcme.PCME(*(torch.compile(tower, backend="eager") for tower in model.children())),
    lambda model: nn.DataParallel(torch.compile(model, backend="eager"))],
    ids=["model", "towers", "parallel"])
def test_compiled_models_train_and_freeze_as_plain_ones(wrap):
    torch._dynamo.reset()
    options = {"epochs": (1, 1), "phases": PHASES}
    make = lambda: pcme.MCSoftContrastiveLoss(5, 5)           # noqa: E731
    whole = [row["loss"] for row in pcme.train(tiny_model(), make(), batches(), **options)]
    model = tiny_model()
    frozen = (model.txt_enc.embed.weight, model.img_enc.cnn[0].weight)
    before, losses = [weight.detach().clone() for weight in frozen], []
    for row in pcme.train(wrap(model), make(), batches(), **options):
        losses.append(row["loss"])
        assert all(map(torch.equal, frozen, before)) == (row["phase"] == 0)
    close(losses, whole, 1e-3)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6")
def test_the_image_tower_exports_with_a_free_batch_size():
    class Means(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.encode_image(images, num_samples=0)["mu"]

    model, images = Means(tiny_model().eval()), batches(1)[0][0]
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    close(exported(images[:4]), model(images[:4]), 1e-4, 1e-5)


def test_captions_of_one_image_are_matches_when_ids_are_given():
    def row(*ids):
        batch = (*batches(1)[0], *ids)
        return next(pcme.train(tiny_model(), pcme.MCSoftContrastiveLoss(5, 5), [batch], epochs=1))

    assert row(torch.arange(6)) == row()
    assert row(torch.zeros(6, dtype=torch.int64))["i2t_neg_loss"] == pytest.approx(0, abs=1e-4)


def test_vaguer_captions_are_more_uncertain_in_the_demonstration(capsys):
    pcme._demonstrate()
    printed = capsys.readouterr().out.splitlines()[-1].split("  ")
    sigmas = [float(item.split(": ")[1]) for item in printed]
    assert len(sigmas) == 6 and sigmas == sorted(sigmas, reverse=True)


def test_baselines_take_the_same_call():
    batch = batches(1)
    for criterion in (pcme.TripletLoss(), pcme.TripletLoss(max_violation=False), pcme.InfoNCELoss(),
                      pcme.MCSoftContrastiveLoss(5, 5, deterministic_weight=1.0)):
        rows = list(pcme.train(tiny_model(), criterion, batch, epochs=12, phases=({"lr": 0.02},)))
        assert rows[-1]["loss"] < rows[0]["loss"]
    x = torch.eye(3).unsqueeze(1)
    assert pcme.TripletLoss(0.2)(x, x)[0] == 0
    close(pcme.TripletLoss(1.2, max_violation=False)(x, x)[0], 12 * 0.2, 1e-5)
    close(pcme.InfoNCELoss(1.0)(x, x)[0], math.log(math.e + 2) - 1, 1e-5)


def test_autocast_reaches_the_towers_but_not_the_loss():
    z = torch.randn(4, 3, 8, generator=rng())
    criterion = pcme.MCSoftContrastiveLoss(5, 5, deterministic_weight=1.0, uniform_lambda=1.0)
    expected = criterion.match_prob(z, z), criterion(z, z)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterion.match_prob(z, z), expected[0])
        assert torch.equal(criterion(z, z)[0], expected[1])
    half, full = (next(pcme.train(tiny_model(), pcme.MCSoftContrastiveLoss(5, 5), batches(),
                                  epochs=1, amp=amp)) for amp in (torch.bfloat16, None))
    assert half["loss"] == pytest.approx(full["loss"], rel=0.1)


def test_curves_start_at_the_plain_input():
    model = tiny_model().eval()
    images, tokens, lengths = batches(1)[0]
    mean = lambda encoded: pcme.uncertainty(encoded["logsigma"]).mean()  # noqa: E731
    hidden = pcme.occlusion_curve(model, images, [0.0, 0.5])
    close(hidden[0.0], mean(model.encode_image(images)), 1e-5)
    dropped = pcme.word_drop_curve(model, tokens, lengths, [0.0, 1.0])
    close(dropped[0.0], mean(model.encode_text(tokens, lengths)), 1e-5)
    ends = torch.stack([tokens[:, 0], tokens[torch.arange(6), lengths - 1]], 1)
    close(dropped[1.0], mean(model.encode_text(ends, lengths.clamp(max=2))), 1e-5)
    with pytest.raises(ValueError, match="ratios"):
        pcme.occlusion_curve(model, images, [2.0])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert pcme.occlusion_curve(model, images, [0.0, 0.5]) == hidden
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def losses_and_norms(batches, seed=0):
    criterion, model = pcme.MCSoftContrastiveLoss(5, 5, uniform_lambda=1.0), tiny_model(seed)
    rows = list(pcme.train(model, criterion, batches, epochs=1, freeze_bn=True))
    weight = model.img_enc.fc.weight.sum().item()
    return [[row["loss"], row["grad_norm"]] for row in rows] + [[weight, weight]]


WORKER = """
import json, os, sys, torch.distributed as dist
sys.path[:0] = sys.argv[1:]
from test_pcme_training import batches, losses_and_norms
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
numbers = losses_and_norms([[x.chunk(world)[rank] for x in batch] for batch in batches()], rank)
group = dist.group.WORLD         # its end would wait for gloo's threads, and they for Python
dist.destroy_process_group()
if rank == 1:                    # whose model was another one before
    print(json.dumps(numbers), flush=True)
os._exit(0)                      # gloo's threads can abort the interpreter's end: see the harness
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               tmp_path / "worker.py", ROOT, ROOT / "tests"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    close(json.loads(done.stdout), losses_and_norms(batches()), 1e-4)
