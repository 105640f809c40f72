"""ReLabel: localised multi-labels for classifiers trained on random crops.

Paper: "Re-labeling ImageNet: from Single to Multi-Labels, from Global to Localized Labels", S. Yun, S. J. Oh, B. Heo,
D. Han, J. Choe, S. Chun, CVPR 2021, arXiv:2101.05022.

An ImageNet image has one label, often shows several classes, and is trained on random crops that may miss the labelled
object altogether. ReLabel asks a strong classifier once for a dense map of class scores per training image, and turns
the part of the map under each crop into a soft multi-label:

    L[c, y, x] = sum_d W[c, d] F[d, y, x] + b[c]      the classifier (W, b) without its pooling: one score per cell
    keep the k largest classes of each cell           (k = 5: 9 kB per image instead of 0.9 MB)
    z[c] = RoIAlign(L[c], crop)                       LabelPooling; classes that were not kept count as score 0
    t = softmax(z),   loss = -sum_c t[c] log p[c]     p: the student's prediction on that crop

The teacher runs once per image, not once per crop and epoch as in distillation. Because absent classes have score 0
and not -inf, t is never one-hot: label smoothing is built in, and none is added.

RoIAlign to a single value is separable: its bilinear samples form a regular grid, so z = sum_yx a[y] b[x] L[y, x] with
one weight vector per axis. `label_pooling` computes a and b once per crop and adds the k * h * w stored scores where
they belong; the dense (B, C, h, w) map of the released code never exists.

    annotator = to_dense_classifier(teacher.forward_features, teacher.fc)
    topk = generate_label_maps(annotator, whole_images)                  # (B, 2, 5, h, w): scores, classes
    crop, coords = RandomResizedCropWithCoords(224)(image)               # coords: top, left, height, width in [0, 1]
    for step in train(student, loader, optimizer, epochs=300): ...       # loader: (images, topk, coords)

`label_pooling` (with `axis_weights`) is all one needs to use the released maps in another training loop. Whole maps
must come from the whole image, squashed to the annotator's square: then map and image coordinates are proportional.

>>> topk = torch.tensor([[[[[8.0, 8.0]]], [[[1.0, 3.0]]]]])              # one row of two cells: class 1, then class 3
>>> label_pooling(topk, torch.tensor([[0.0, 0.0, 1.0, 0.5]]), num_classes=4, softmax=False)   # the left half
tensor([[0., 8., 0., 0.]])
>>> label_pooling(topk, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), num_classes=4, softmax=False)   # all of it
tensor([[0., 4., 0., 4.]])
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

VARIANTS = ("localized-multi", "localized-single", "global-multi", "global-single")


# ---------------------------------------------------------------- the annotator and its maps (section 3.1)

class DenseClassifier(nn.Module):
    """A pooled classifier asked at every cell: the linear head as a 1x1 convolution, its weights shared."""

    def __init__(self, features: Callable[[Tensor], Tensor], head: nn.Linear) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to class scores `(B, C, h, w)`; their mean over the cells is the pooled classifier's output."""
        maps = self.features(images)
        if maps.ndim != 4 or maps.shape[1] != self.head.in_features:
            raise ValueError(f"features must return (B, {self.head.in_features}, h, w) before pooling, not {tuple(maps.shape)}")
        return F.conv2d(maps, self.head.weight[:, :, None, None], self.head.bias)


def to_dense_classifier(features: Callable[[Tensor], Tensor], head: nn.Linear) -> nn.Module:
    """The annotator made from a classifier `head(features(x).mean((2, 3)))`: maps `(B, 3, H, W)` to `(B, C, h, w)`.

    `features`: a module, or the bound method of one (such as `resnet.forward_features`), that returns the last feature
    map. `head`: its nn.Linear. Nothing is trained or copied.
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, not {type(head).__name__}")
    dense = DenseClassifier(features, head)
    owner = getattr(features, "__self__", None)
    if isinstance(owner, nn.Module):
        dense.owner = owner                                   # so that .eval(), .to() reach the method's module
    return dense


@torch.no_grad()
def generate_label_maps(annotator: nn.Module, images: Tensor, k: int = 5) -> Tensor:
    """The `k` highest scores of every cell and their classes: `(B, 2, k, h, w)` float32, scores in descending order.

    The annotator runs in eval mode and is put back into the mode it was in. `images` are whole images, squashed to the
    annotator's input size. Scores are raw logits (no softmax). ValueError if k is not in 1..C.
    """
    modes = [(module, module.training) for module in annotator.modules()]
    annotator.eval()
    try:
        scores = annotator(images).float()
    finally:
        for module, training in modes:
            module.training = training
    if scores.ndim != 4:
        raise ValueError(f"annotator must return (B, C, h, w), not {tuple(scores.shape)}")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be in 1..{scores.shape[1]} (the number of classes), not {k}")
    values, classes = scores.topk(k, dim=1)
    return torch.stack([values, classes.float()], dim=1)


def save_label_map(path: str | Path, m: Tensor) -> None:
    """Write one map `(2, k, h, w)` as the released `.pt` files hold it, through a temporary name."""
    if m.ndim != 4 or m.shape[0] != 2:
        raise ValueError(f"m must be (2, k, h, w), not {tuple(m.shape)}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(m.detach().cpu().clone(), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_label_map(path: str | Path) -> Tensor:
    """One map `(2, k, h, w)` of the released layout; ValueError if the file holds anything else."""
    m = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(m, Tensor) or m.ndim != 4 or m.shape[0] != 2:
        found = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
        raise ValueError(f"{path} must hold one (2, k, h, w) tensor, not {found}")
    return m


# ---------------------------------------------------------------- RoIAlign and LabelPooling (section 3.2)

def axis_weights(start: Tensor, end: Tensor, length: int, bins: int = 1, sampling_ratio: int = -1,
                 aligned: bool = False) -> Tensor:
    """RoIAlign along one axis as a matrix: `(K, bins, length)` weights of the cells in each bin's average.

    `start`, `end` (K,): the boxes' sides in cells. A bin is sampled at `sampling_ratio` points, or at
    ceil(side / bins) if that is not positive. Sampling is bilinear, positions are clamped into the map, and samples
    further than one cell outside count as zero. Without `aligned` a side shorter than one cell grows to one.
    """
    side = end - start
    if not aligned:
        side = side.clamp(min=1)
    count = torch.full_like(side, sampling_ratio) if sampling_ratio > 0 else (side / bins).ceil().clamp(min=0)
    points = torch.arange(int(count.max()) if len(count) else 0, device=side.device, dtype=side.dtype)
    bin_at = torch.arange(bins, device=side.device, dtype=side.dtype).view(1, -1, 1)
    count, width = count.view(-1, 1, 1), (side / bins).view(-1, 1, 1)
    at = start.view(-1, 1, 1) + bin_at * width + (points + 0.5) * width / count.clamp(min=1)      # (K, bins, points)
    weight = ((points < count) & (at >= -1) & (at <= length)).to(side.dtype) / count.clamp(min=1)
    at = at.clamp(0, length - 1)
    low = at.floor()
    upper_share = (at - low) * weight
    low = low.long()
    weights = side.new_zeros(len(side), bins, length)
    weights.scatter_add_(2, low, weight - upper_share)
    return weights.scatter_add_(2, (low + 1).clamp(max=length - 1), upper_share)


def roi_align(input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | tuple[int, int],
              spatial_scale: float = 1.0, sampling_ratio: int = -1, aligned: bool = False) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, section 3) with torchvision's signature and rules; differentiable in `input`.

    input `(N, C, H, W)`; boxes `(K, 5)` rows (image index, x1, y1, x2, y2), or one `(L, 4)` tensor per image.
    Returns `(K, C, ph, pw)` in the dtype of `input` (half precision is computed in float32).
    """
    if input.ndim != 4 or not input.is_floating_point():
        raise ValueError(f"input must be a floating-point (N, C, H, W) tensor, not {input.dtype} {tuple(input.shape)}")
    if not isinstance(boxes, Tensor):
        if len(boxes) != len(input) or any(b.ndim != 2 or b.shape[1] != 4 for b in boxes):
            raise ValueError(f"boxes as a list must hold one (L, 4) tensor for each of the {len(input)} images")
        boxes = torch.cat([F.pad(b, (1, 0), value=n) for n, b in enumerate(boxes)])
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"boxes must be (K, 5) or a list of (L, 4), not {tuple(boxes.shape)}")
    bins_y, bins_x = (output_size, output_size) if isinstance(output_size, int) else output_size
    work = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    index = boxes[:, 0].long()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(input):
        raise ValueError(f"boxes: image index must be in 0..{len(input) - 1}, not {int(index.min())}..{int(index.max())}")
    x1, y1, x2, y2 = (boxes[:, 1:].to(work) * spatial_scale - (0.5 if aligned else 0.0)).unbind(1)
    rows = axis_weights(y1, y2, input.shape[2], bins_y, sampling_ratio, aligned)
    columns = axis_weights(x1, x2, input.shape[3], bins_x, sampling_ratio, aligned)
    order = index.argsort(stable=True)                        # one image at a time: its boxes share the map uncopied
    pooled = [input.new_zeros(0, input.shape[1], bins_y, bins_x)]
    for n, mine in zip(*_groups(index[order], order)):
        pooled.append(torch.einsum("kpy,cyx,kqx->kcpq", rows[mine], input[n].to(work), columns[mine]).to(input.dtype))
    return torch.cat(pooled)[order.argsort()]


def _groups(values: Tensor, rows: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    """The distinct ones of sorted `values`, and for each the `rows` that stand beside it."""
    distinct, counts = values.unique_consecutive(return_counts=True)
    return distinct.tolist(), rows.split(counts.tolist())


def get_labelmaps(topk: Tensor, num_classes: int = 1000) -> Tensor:
    """The dense maps `(B, C, h, w)` that the stored scores stand for: 0 where a class was not kept. For tests."""
    _check_topk(topk, num_classes)
    dense = topk.new_zeros(len(topk), num_classes, *topk.shape[3:])
    return dense.scatter_add_(1, topk[:, 1].long(), topk[:, 0])


def label_pooling(topk: Tensor, coords: Tensor, num_classes: int = 1000, axes: str = "xy",
                  softmax: bool = True) -> Tensor:
    """LabelPooling: the soft labels `(B, C)` of crops, from the stored maps (section 3.2).

    topk `(B, 2, k, h, w)`: scores and classes. coords `(B, 4)`: (top, left, height, width) of each crop relative to
    the original image. The crop is pooled by RoIAlign to one cell with the box coords * (h, w) - 0.5 (cell centres lie
    at integers) and a softmax over all classes follows; softmax=False returns the pooled scores. Computed in float64
    (the number of samples is a ceil(), which float32 can put on the wrong side), returned in the dtype of `topk`.

    axes="official" swaps rows and columns as the released training code does (square maps only): it hands
    (y1, x1, y2, x2) to a function that takes (x1, y1, x2, y2). Right for row-major maps is "xy".

    ValueError: coords outside [0, 1] by more than 1e-6, empty crops, classes that are not integers in 0..C-1, NaN.
    """
    _check_topk(topk, num_classes)
    coords = torch.as_tensor(coords, device=topk.device).to(torch.float64)
    if coords.shape != (len(topk), 4):
        raise ValueError(f"coords must be ({len(topk)}, 4), one (top, left, height, width) per map, not {tuple(coords.shape)}")
    top, left, height, width = coords.unbind(1)
    bad = (coords < -1e-6).any(1) | (top + height > 1 + 1e-6) | (left + width > 1 + 1e-6) | (height <= 0) | (width <= 0)
    if (bad | coords.isnan().any(1)).any():
        row = int((bad | coords.isnan().any(1)).nonzero()[0])
        raise ValueError(f"coords must lie in [0, 1] with positive height and width; row {row} is {coords[row].tolist()}")
    rows, columns = topk.shape[3:]
    if axes not in ("xy", "official"):
        raise ValueError(f"axes must be 'xy' or 'official', not {axes!r}")
    if axes == "official":
        if rows != columns:
            raise ValueError(f"axes='official' needs square maps, not {rows} x {columns}")
        top, left, height, width = left, top, width, height
    a = axis_weights(top * rows - 0.5, (top + height) * rows - 0.5, rows)[:, 0]
    b = axis_weights(left * columns - 0.5, (left + width) * columns - 0.5, columns)[:, 0]
    out = topk.new_empty(len(topk), num_classes)
    block = 16 if topk.device.type == "cpu" else 4096        # images at a time: what is added up stays in the cache
    for part in (slice(start, start + block) for start in range(0, len(topk), block)):
        values = topk[part, 0].double() * (a[part].unsqueeze(2) * b[part].unsqueeze(1)).unsqueeze(1)      # (n, k, h, w)
        place = topk[part, 1].long()
        place += num_classes * torch.arange(len(place), device=topk.device).view(-1, 1, 1, 1)
        pooled = values.new_zeros(len(place) * num_classes)  # one axis: deterministic on a GPU too, when torch is told so
        pooled = pooled.scatter_add_(0, place.flatten(), values.flatten()).view(-1, num_classes).to(topk.dtype)
        out[part] = pooled.softmax(1) if softmax else pooled
    return out


def _check_topk(topk: Tensor, num_classes: int) -> None:
    if topk.ndim != 5 or topk.shape[1] != 2 or not topk.is_floating_point():
        raise ValueError(f"topk must be floating-point (B, 2, k, h, w), not {topk.dtype} {tuple(topk.shape)}")
    if not topk.numel():
        return
    scores, classes = topk[:, 0], topk[:, 1]
    if not scores.abs().amax().isfinite():
        raise ValueError("topk[:, 0] holds scores that are not finite")
    low, high = torch.aminmax(classes)
    if not (0 <= low and high < num_classes) or classes.frac().any():
        wrong = classes[~((classes >= 0) & (classes < num_classes) & (classes.frac() == 0))][0]
        raise ValueError(f"topk[:, 1] must hold integral classes in 0..{num_classes - 1}, found {float(wrong)}")


def label_variant(topk: Tensor, coords: Tensor, variant: str, num_classes: int = 1000, axes: str = "xy") -> Tensor:
    """The targets `(B, C)` of the paper's factor analysis: "localized" or "global" (the whole map, whatever the crop),
    "multi" (soft) or "single" (one-hot of the largest); "localized-multi" is ReLabel."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, not {variant!r}")
    where, kind = variant.split("-")
    if where == "global":
        coords = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).expand(len(topk), 4)
    targets = label_pooling(topk, coords, num_classes, axes)
    return targets if kind == "multi" else F.one_hot(targets.argmax(1), num_classes).to(targets.dtype)


def accepted_labels(topk: Tensor, labels: Tensor, num_classes: int = 1000, rank: int = 1) -> Tensor:
    """Label cleaning: (B,) bool, True where the given label is among the `rank` best of the whole map's pooled scores.

    Images that the annotator rejects are dropped from the training set.
    """
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).expand(len(topk), 4)
    pooled = label_pooling(topk, whole, num_classes, softmax=False)
    return (pooled > pooled.gather(1, labels.view(-1, 1))).sum(1) < rank


# ---------------------------------------------------------------- crops, loss, CutMix

class RandomResizedCropWithCoords:
    """A random crop (torchvision's rule) resized to a square, and where it came from.

    Called with a PIL image: returns the PIL image of `size` x `size` pixels and (top, left, height, width) as four
    floats relative to the image's height and width. A horizontal flip afterwards does not change a pooled label.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.08, 1), ratio: tuple[float, float] = (3 / 4, 4 / 3),
                 generator: torch.Generator | None = None) -> None:
        if size < 1 or not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"size must be >= 1, scale and ratio increasing and positive, not {size}, {scale}, {ratio}")
        self.size, self.scale, self.ratio, self.generator = size, scale, ratio, generator

    def __call__(self, img: Image.Image) -> tuple[Image.Image, tuple[float, float, float, float]]:
        width, height = img.size
        i, j, h, w = self.choose(width, height)
        crop = img.crop((j, i, j + w, i + h)).resize((self.size, self.size), Image.BILINEAR)
        return crop, (i / height, j / width, h / height, w / width)

    def choose(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop in pixels."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            scale, log_ratio = torch.rand(2, generator=self.generator, dtype=torch.float64).tolist()
            area = width * height * (self.scale[0] + scale * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + log_ratio * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return self._integer(height - h), self._integer(width - w), h, w
        w, h = width, height                                  # the central crop that comes closest
        if width / height < self.ratio[0]:
            h = round(w / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(h * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w

    def _integer(self, last: int) -> int:
        return int(torch.randint(last + 1, (), generator=self.generator))


class SoftTargetCrossEntropy(nn.Module):
    """mean_b(-sum_c t[b, c] log softmax(z[b])[c]), in float32 or better; the targets need not sum to one."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape != targets.shape or logits.ndim != 2:
            raise ValueError(f"logits and targets must both be (B, C), not {tuple(logits.shape)} and {tuple(targets.shape)}")
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """(1 - e) t + e / C."""
    return (1 - smoothing) * targets + smoothing / targets.shape[1]


def cutmix(images: Tensor, targets: Tensor, lam: float | None = None, beta: float = 1.0,
           generator: torch.Generator | None = None, box: Sequence[int] | None = None, perm: Tensor | None = None,
           smoothing: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """CutMix on soft targets: a box of another image of the batch, targets mixed by the area.

    images `(B, C, H, W)`, targets `(B, K)`. The box `(r1, c1, r2, c2)` (rows r1:r2, columns c1:c2) is taken as given, or
    has sides sqrt(1 - lam) of the image (rounded down to an even number of pixels, cut off at the borders) around a
    random centre, lam ~ Beta(beta, beta). Returns new images, new targets and the share `lam` of the image that stays.
    """
    if len(images) != len(targets) or targets.ndim != 2:
        raise ValueError(f"targets must be ({len(images)}, K), not {tuple(targets.shape)}")
    rows, columns = images.shape[2:]
    if box is None:
        if lam is None:
            lam = _beta(beta, generator)
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], not {lam}")
        side = math.sqrt(1 - lam)
        sides = []
        for length in (rows, columns):
            half, centre = int(length * side) // 2, int(torch.randint(length, (), generator=generator))
            sides.append((max(centre - half, 0), min(centre + half, length)))
        box = (sides[0][0], sides[1][0], sides[0][1], sides[1][1])
    r1, c1, r2, c2 = (int(v) for v in box)
    if not (0 <= r1 <= r2 <= rows and 0 <= c1 <= c2 <= columns):
        raise ValueError(f"box (r1, c1, r2, c2) must lie in the {rows} x {columns} image, not {(r1, c1, r2, c2)}")
    if perm is None:
        perm = torch.randperm(len(images), generator=generator)
    perm = torch.as_tensor(perm).to(images.device)
    mixed = images.clone()
    mixed[:, :, r1:r2, c1:c2] = images[perm, :, r1:r2, c1:c2]
    lam = 1 - (r2 - r1) * (c2 - c1) / (rows * columns)
    targets = smooth(targets, smoothing)
    return mixed, lam * targets + (1 - lam) * targets[perm.to(targets.device)], lam


def _beta(beta: float, generator: torch.Generator | None) -> float:
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    x, y = torch._standard_gamma(torch.full((2,), beta, dtype=torch.float64), generator=generator).tolist()
    return x / (x + y) if x + y > 0 else 0.5


# ---------------------------------------------------------------- training and evaluation

def lr_at(epoch: int, iteration: int, iters_per_epoch: int, epochs: int, init_lr: float, warmup_epochs: int = 5,
          warmup_lr: float = 0.0, schedule: str = "cos") -> float:
    """The learning rate of one iteration: linear warm-up, then "cos", "linear" or "default" (a tenth every 30 epochs)."""
    if epoch < warmup_epochs:
        return warmup_lr + (init_lr - warmup_lr) * (iteration + epoch * iters_per_epoch) / (warmup_epochs * iters_per_epoch)
    done = (iteration + (epoch - warmup_epochs) * iters_per_epoch) / ((epochs - warmup_epochs) * iters_per_epoch)
    if schedule == "cos":
        return init_lr * (math.cos(math.pi * done) + 1) / 2
    if schedule == "linear":
        return init_lr * (1 - done)
    if schedule == "default":
        return init_lr * 0.1 ** (epoch // 30)
    raise ValueError(f"schedule must be 'cos', 'linear' or 'default', not {schedule!r}")


def train(model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, epochs: int, *,
          init_lr: float | None = None, warmup_epochs: int = 5, warmup_lr: float = 0.0, schedule: str = "cos",
          cutmix_prob: float = 0.0, cutmix_beta: float = 1.0, cutmix_off_epochs: int = 5, smoothing: float = 0.0,
          axes: str = "xy", num_classes: int = 1000, generator: torch.Generator | None = None,
          variant: str = "localized-multi", teacher: nn.Module | None = None,
          amp_dtype: torch.dtype | None = None, resume: dict | None = None) -> Iterator[dict]:
    """Train on soft targets; yields {"epoch", "step", "loss", "lr"} per step.

    loader: sized; batches (images, targets (B, C)), or (images, topk, coords), pooled here on the model's device.
    `smoothing` is for one-hot targets (label-smoothing baseline); pooled ones are smooth already. `variant`: see
    `label_variant`. `teacher`: distillation on the fly, the comparator: the targets are softmax(teacher(images)) and
    those of the loader are not used. `steps.send("state")` returns a snapshot; `resume=snapshot` goes on from it.
    """
    if schedule not in ("cos", "linear", "default"):
        raise ValueError(f"schedule must be 'cos', 'linear' or 'default', not {schedule!r}")
    device = next(model.parameters()).device
    init_lr = optimizer.param_groups[0]["lr"] if init_lr is None else init_lr
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    criterion, per_epoch = SoftTargetCrossEntropy(), len(loader)
    first_epoch, skip = 0, 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        generator.set_state(resume["generator"])
        first_epoch, skip = resume["epoch"], resume["batch"]
    for epoch in range(first_epoch, epochs):
        seekable = hasattr(loader, "set_epoch")
        if seekable:
            loader.set_epoch(epoch, skip)
        model.train()
        for batch, (images, *label) in enumerate(loader, skip if seekable else 0):
            if batch < skip:
                continue
            images = images.to(device, non_blocking=True)
            if teacher is not None:
                targets = images.new_zeros(len(images), 1)    # found below, on what the student will see
            elif len(label) == 2:
                targets = label_variant(label[0].to(device), label[1], variant, num_classes, axes)
            else:
                targets = label[0].to(device)
            if epoch < epochs - cutmix_off_epochs and float(torch.rand((), generator=generator)) < cutmix_prob:
                images, targets, _ = cutmix(images, targets, beta=cutmix_beta, generator=generator, smoothing=smoothing)
            else:
                targets = smooth(targets, smoothing)
            if teacher is not None:
                with torch.no_grad():
                    targets = teacher(images).float().softmax(1)
            lr = lr_at(epoch, batch, per_epoch, epochs, init_lr, warmup_epochs, warmup_lr, schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            loss = criterion(logits, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (yield {"epoch": epoch, "step": epoch * per_epoch + batch, "loss": loss.item(), "lr": lr}) == "state":
                yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                       "generator": generator.get_state(), "epoch": epoch, "batch": batch + 1}
        skip = 0


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, device: torch.device | None = None) -> dict:
    """{"top1", "top5", "count"} in percent, on batches of (images, labels); eval mode during, mode restored after.

    Labels (B,) are classes. Labels (B, C) are valid classes per image (ReaL style): a prediction is right if it is
    among them, and images without any valid class are not counted.
    """
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    right1 = right5 = count = 0
    for images, labels, *_ in loader:
        logits = model(images.to(device))
        valid = labels.to(device)
        if valid.ndim == 1:
            valid = F.one_hot(valid, logits.shape[1])
        hits = valid.bool().gather(1, logits.topk(min(5, logits.shape[1]), dim=1).indices)
        right1, right5 = right1 + int(hits[:, 0].sum()), right5 + int(hits.any(1).sum())
        count += int(valid.any(1).sum())
    model.train(was_training)
    return {"top1": 100 * right1 / max(count, 1), "top5": 100 * right5 / max(count, 1), "count": count}


# ---------------------------------------------------------------- demonstration

def _demonstrate() -> None:
    """Crops of an image with two objects: what the pooled label says as the crop moves from one to the other."""
    generator = torch.Generator().manual_seed(0)
    topk = torch.zeros(1, 2, 2, 15, 15)
    topk[:, 1, 1] = 1                                         # the classes stored in every cell: 0 and 1
    topk[:, 0, 0, 3:12, :6] = 20.0                            # object 0 on the left
    topk[:, 0, 1, 3:12, 9:] = 20.0                            # object 1 on the right
    print("crop            share of object 0 / object 1 / all other classes in its label")
    for name, coords in [("left half", (0.0, 0.0, 1.0, 0.5)), ("whole image", (0.0, 0.0, 1.0, 1.0)),
                         ("right object", (0.2, 0.6, 0.6, 0.4)), ("top strip", (0.0, 0.0, 0.2, 1.0))]:
        label = label_pooling(topk, torch.tensor([coords]))[0]
        print(f"{name:15s} {label[0]:.3f} / {label[1]:.3f} / {1 - label[0] - label[1]:.3f}")
    crop, boxes, hits = RandomResizedCropWithCoords(224, generator=generator), torch.tensor([3, 3, 11, 11]) / 15, 0
    for _ in range(2000):
        i, j, h, w = crop.choose(500, 375)
        y, x = torch.tensor([i / 375, (i + h) / 375]), torch.tensor([j / 500, (j + w) / 500])
        inter = (min(y[1], boxes[3]) - max(y[0], boxes[1])).clamp(min=0) * (min(x[1], boxes[2]) - max(x[0], boxes[0])).clamp(min=0)
        union = (y[1] - y[0]) * (x[1] - x[0]) + (boxes[2] - boxes[0]) * (boxes[3] - boxes[1]) - inter
        hits += bool(inter / union > 0.5)
    print(f"random crops whose IoU with an object of 28 % of the image exceeds 0.5: {hits / 20:.1f} % (paper, ImageNet: 23.5 %)")


if __name__ == "__main__":
    _demonstrate()
