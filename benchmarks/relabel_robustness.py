"""Robustness of an ImageNet classifier: attacked, corrupted, unusual and re-composed images.

    relabel_imagenet.py --checkpoint relabel.pt --data /data/imagenet --sets /data/robustness ...

measure() gives one student's accuracies in percent, by name:

    FGSM e/255        one step of the sign of the gradient, of size e/255, on the [0, 1] image
    corrupted         mean over the 15 corruptions of ImageNet-C, made here from the test images
                      (severity 3), where no copy of ImageNet-C is given
and for what the folder of sets holds:
    imagenet-a        <wnid>/*.jpg; the best of its own 200 classes counts
    imagenet-c        <corruption>/<severity>/<wnid>/*.JPEG; mean over 15 corruptions, 5 severities
    objectnet-1.0     images/ and mappings/ as distributed; the classes that overlap
    bg_challenge      mixed_same/val, mixed_rand/val, in_to_in9.json; "BGC gap" is the difference
                      (Xiao et al., "Noise or signal": how much the background decides)

The paper reports ReLabel above the baselines on all of them, without numbers that could be read
here.
"""

from pathlib import Path

import numpy as np
import torch
from relabel_generate import MEAN_STD

from data_tools import imagenet
from data_tools.corruptions import corrupt_batch
from data_tools.objectnet import objectnet
from reference import robustness

STRENGTHS = (1, 4)  # of FGSM, in 1/255
SEVERITY = 3


def measure(run, model, clean, transform, sets: Path | None) -> dict[str, float]:
    """The accuracies of `model`; `clean`: the test set, `transform`: to (3, S, S) uint8."""
    judge = Judge(run, model, transform)
    results = {f"FGSM {e}/255": judge.attacked(clean, e / 255) for e in STRENGTHS}
    def there(name):
        return sets is not None and (sets / name).is_dir()
    if there("imagenet-c"):
        results["ImageNet-C"] = float(np.mean([
            judge(imagenet.ImageFolder(sets / "imagenet-c" / name / str(severity),
                                       label_of=numbers(clean.classes)))
            for name in robustness.ALEXNET_ERRORS for severity in range(1, 6)]))
    else:
        results["corrupted"] = judge.corrupted(clean)
    if there("imagenet-a"):
        dataset = imagenet.imagenet_variant(sets / "imagenet-a", "a", clean.classes)
        own = torch.from_numpy(np.unique(dataset.labels))
        results["ImageNet-A"] = judge(dataset, lambda z, y: own[z[:, own].argmax(1)] == y)
    if there("objectnet-1.0"):
        dataset, valid = objectnet(sets / "objectnet-1.0", len(clean.classes))
        results["ObjectNet"] = judge(dataset, lambda z, y: valid[y, z.argmax(1)])
    if there("bg_challenge"):
        mapping = sets / "bg_challenge" / "in_to_in9.json"
        groups = imagenet.imagenet9_groups(mapping, len(clean.classes))
        for name in ("mixed_same", "mixed_rand"):
            dataset = imagenet.imagenet_variant(sets / "bg_challenge" / name / "val", "9")
            results[name] = judge(dataset, lambda z, y: groups[z.argmax(1)] == y)
        results["BGC gap"] = results["mixed_same"] - results["mixed_rand"]
    return results


def numbers(classes) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


class Judge:
    """Accuracy of one model in percent; call it with a data set."""

    def __init__(self, run, model, transform):
        self.run, self.model, self.transform = run, model, transform

    def batches(self, dataset):
        """(images in [0, 1], labels)."""
        loader = imagenet.Loader(dataset, 256, transform=self.transform, device=self.run.device,
                                 workers=self.run.args.workers)
        for images, labels, *_ in loader:
            yield images.float() / 255, labels

    def logits(self, images):
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in MEAN_STD)
        return self.model((images - mean) / std)

    @torch.no_grad()
    def percent(self, batches, right=lambda logits, labels: logits.argmax(1) == labels) -> float:
        with robustness.eval_mode(self.model):
            hits = [right(self.logits(images).cpu(), labels.cpu()) for images, labels in batches]
        return 100 * torch.cat(hits).double().mean().item()

    def __call__(self, dataset, *right) -> float:
        return self.percent(self.batches(dataset), *right)

    def attacked(self, dataset, eps: float) -> float:
        mean, std = MEAN_STD
        return self.percent(
            (robustness.fgsm(self.model, images, labels, eps, mean=mean, std=std), labels)
            for images, labels in self.batches(dataset))

    def corrupted(self, dataset) -> float:
        """Mean over the corruptions, applied to the images as the model sees them."""
        variant = "imagenet" if self.transform.size >= 128 else "cifar"
        def batches(name):
            first = 0
            for images, labels in self.batches(dataset):
                pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                pixels = corrupt_batch(pixels, name, SEVERITY, variant,
                                       indices=range(first, first + len(pixels)))
                first += len(pixels)
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2).to(images.device) / 255, labels
        return float(np.mean([self.percent(batches(name)) for name in robustness.ALEXNET_ERRORS]))
