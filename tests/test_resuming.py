"""Training by every method resumes in the middle of an epoch of a DataLoader that shuffles."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reference import adamp, calm, pcme, pit, regularization, relabel, videomix, wsol


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(net):
    generator = rng()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return net


def classifier(loader):
    """Drops out only where the loader shuffles with what dropout draws from."""
    drop = nn.Dropout(0.2 if loader.generator is None else 0.0)
    return seeded(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), drop, nn.Linear(4, 3)))


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


class Localizer(nn.Sequential):
    def forward(self, x, labels=None):
        return {"logits": super().forward(x)}


def towers():
    return seeded(pcme.PCME(pcme.EncoderImage(nn.Conv2d(3, 6, 3, 2), 6, 8),
                            pcme.EncoderText(9, 6, 8)))


IMAGES, LABELS = torch.rand(24, 3, 8, 8, generator=rng(1)), torch.arange(24) % 3
CAPTIONS = torch.randint(1, 9, (24, 5), generator=rng(2)), torch.arange(24) % 5 + 1
TRAIN = {                                                   # (loader, snapshot) -> steps
    "adamp": lambda loader, resume: adamp.train(
        net := classifier(loader), loader, adamp.AdamP(net.parameters()), 3, resume=resume),
    "calm": lambda loader, resume: calm.train(
        seeded(calm.CALM(nn.Conv2d(3, 4, 3), calm.CALMHead(4, 3))), loader, 3, resume=resume),
    "pcme": lambda loader, resume: pcme.train(
        towers(), pcme.MCSoftContrastiveLoss(), loader, epochs=3, resume=resume),
    "pit": lambda loader, resume: pit.train(
        classifier(loader), loader, epochs=3, lr=0.1, warmup_epochs=0, resume=resume),
    "regularization": lambda loader, resume: regularization.train(
        net := classifier(loader), loader, sgd(net), epochs=3, resume=resume),
    "relabel": lambda loader, resume: relabel.train(
        net := classifier(loader), loader, sgd(net), 3, warmup_epochs=0, resume=resume),
    "videomix": lambda loader, resume: videomix.train(
        classifier(loader), loader, epochs=3, resume=resume),
    "wsol": lambda loader, resume: wsol.train(
        Localizer(*classifier(loader)), loader, {"epochs": 3}, resume=resume),
}


@pytest.mark.parametrize("own, workers", [(True, 0), (False, 0), (True, 1)],
                         ids=["own generator", "torch's generator", "persistent workers"])
@pytest.mark.parametrize("name", TRAIN)
def test_training_resumes_with_a_dataloader_that_shuffles(name, own, workers):
    labels = {"relabel": [nn.functional.one_hot(LABELS, 3).float()], "pcme": CAPTIONS}

    def start(resume=None):
        data = TensorDataset(IMAGES, *labels.get(name, [LABELS]))
        loader = DataLoader(data, 6, shuffle=True, generator=rng(5) if own else None,
                            num_workers=workers, persistent_workers=workers > 0)
        return TRAIN[name](loader, resume)

    losses, snapshots = [], {}
    with torch.random.fork_rng():
        for row in (steps := start()):
            losses.append(row["loss"])
            if len(losses) in (3, 6, 8):                    # within an epoch, and at its end
                snapshots[len(losses)] = steps.send("state")
        for done, snapshot in snapshots.items():
            torch.rand(1)                                   # others draw from torch's generator
            assert [row["loss"] for row in start(snapshot)] == losses[done:]
