"""Image decoding, transforms and the batch loader that every data set here shares.

    loader = Loader(dataset, 256, transform=TrainTransform(224), shuffle=True, seed=0, workers=8,
                    drop_last=True, device="cuda", normalize=(IMAGENET_MEAN, IMAGENET_STD))
    for epoch in range(300):
        loader.set_epoch(epoch)                       # set_epoch(epoch, 120) goes on at batch 120
        for images, labels in loader: ...                 # (256, 3, 224, 224) float32 on the GPU

A *data set* is any object with `len()`, `labels` (one row per sample), `name(index)` and
`open(index)`, which returns a PIL image that is not decoded yet, an EncodedJpeg, or an (H, W, 3)
uint8 array. Decoding is left to the transform, because a transform that knows its crop decodes a
large JPEG at half or a quarter of its size. Ordinary transforms (PIL image in, tensor out) work as
well.

Everything random about a sample follows from (seed, epoch, index): results depend neither on the
number of workers nor on where an epoch was resumed. Images stay uint8 until they are on the device.
"""

from __future__ import annotations

import inspect
import io
import math
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BadImage(ValueError):
    """An image that cannot be read; the message is one line that starts with the file's name."""


# ------------------------------------------------------------------------------------- decoding


class EncodedJpeg:
    """A plain RGB JPEG of known size: Pillow need not parse its headers (0.1 ms of Python each).

    data: the file's bytes, which libjpeg reads; size: (width, height).
    """

    __slots__ = ("data", "size")

    def __init__(self, data: bytes, size: tuple[int, int]):
        self.data, self.size = data, size

    def above(self, row: int) -> "EncodedJpeg":
        """The same image down to row (and a margin, since chroma is interpolated): less to decode.

        A lower height is written into the frame header; libjpeg then stops after it.
        """
        width, height = self.size
        at, end = 2, row + 4
        while end < height and len(self.data) > at + 9 and self.data[at] == 0xFF:
            if self.data[at + 1] in (0xC0, 0xC1):  # baseline frame: length 2, precision 1, height 2
                head, tail = self.data[: at + 5], self.data[at + 7 :]
                return EncodedJpeg(head + end.to_bytes(2, "big") + tail, (width, end))
            at += 2 + int.from_bytes(self.data[at + 2 : at + 4], "big")
        return self

    def decode(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """RGB pixels, at 1/2, 1/4 or 1/8 of the size unless that is below at_least; or BadImage."""
        width, height = self.size
        reduction = min(width // at_least[0], height // at_least[1]) if at_least else 1
        scale = max(s for s in (1, 2, 4, 8) if s <= max(1, reduction))
        size = -(-width // scale), -(-height // scale)
        try:
            return Image.frombytes("RGB", size, self.data, "jpeg", "RGB", "", scale, 0)
        except (ValueError, OSError) as error:
            raise BadImage(f"{error}") from error


Opened = Image.Image | EncodedJpeg | np.ndarray               # what a data set's `open` returns


def open_image(path: str | Path, mode: str | None = None) -> Image.Image:
    """The image in a file: header read, pixels not decoded unless `mode` asks for a conversion.

    Raises BadImage.
    """
    data = b""
    try:
        data = Path(path).read_bytes()
        image = Image.open(io.BytesIO(data))
        return image.convert(mode) if mode else image
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image" if data else "empty file"
        raise BadImage(f"{path}: {reason}".splitlines()[0]) from error


def open_stored(path: str | Path) -> Image.Image:
    """`open_image` of a file whose pixels are taken as they are stored, whatever orientation EXIF
    asks for: its annotations speak of those."""
    image = open_image(path)
    image.info.pop("exif", None)
    return image


def image_size(image: Opened) -> tuple[int, int]:
    """(width, height) as the picture is meant to be seen, without decoding it."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    if isinstance(image, EncodedJpeg):
        return image.size
    return image.size[::-1] if orientation(image) >= 5 else image.size


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; parsing EXIF is slow, and most images have none."""
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        if image.format == "TIFF":
            image.load()  # Pillow turns these itself
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF does not make the pixels unreadable
        return 1
    return value if value in range(1, 9) else 1


def decode(image: Opened, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes what `open` returned to an upright RGB image.

    Greyscale, palette, CMYK and 16-bit images are converted; EXIF orientation is applied.
    at_least: (width, height) that is enough: a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size,
    as far as the result does not fall below it. Raises BadImage with the reason.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, EncodedJpeg):
        return image.decode(at_least)
    try:
        turned = orientation(image)
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft("RGB", at_least[::-1] if turned >= 5 else at_least)
        image.load()
        if turned != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
            image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as in open_image
        raise BadImage(f"{type(error).__name__}: {error}".splitlines()[0]) from error


class ArrayImages:
    """Images in memory, uint8 (N, 3, H, W) or (N, H, W, 3), array or tensor, and their labels."""

    def __init__(self, images: np.ndarray | Tensor, labels: Any,
                 classes: Sequence[str] | None = None):
        images = images.numpy() if isinstance(images, Tensor) else np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or 3 not in images.shape[1::2]:
            raise ValueError("images must be uint8 (N, 3, H, W) or (N, H, W, 3), "
                             f"got {images.dtype} {images.shape}")
        self.images = images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)
        self.labels = np.asarray(labels)
        if len(self.labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(self.labels)} labels")
        self.classes = list(classes) if classes is not None else None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> np.ndarray:
        return self.images[index]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, H, W) uint8, copied in one go."""
        return torch.from_numpy(self.images[np.asarray(indices)]).permute(0, 3, 1, 2).contiguous()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode(self.images[index]), int(self.labels[index])


def open_and(dataset: Any, index: int, function: Callable) -> Any:
    """function(dataset.open(index)); a BadImage raised by function gets the sample's name."""
    image = dataset.open(index)
    try:
        return function(image)
    except BadImage as error:
        root = getattr(dataset, "root", None)
        raise BadImage(
            f"{root / dataset.name(index) if root else dataset.name(index)}: {error}") from error


# ----------------------------------------------------------------------------------- transforms


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """(3, H, W) uint8 from a PIL RGB image or an (H, W, 3) array."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN,
              std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(..., 3, H, W) uint8 to float32, on its device; the statistics are of values in [0, 1]."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}; are they normalised already?")
    mean = torch.tensor(mean, device=images.device).mul_(255)[:, None, None]
    scale = torch.tensor(std, device=images.device).mul_(255).reciprocal_()[:, None, None]
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    one_by_one = images.ndim == 4 and images.device.type == "cpu"  # an image fits into the cache
    for target, source in zip(out, images) if one_by_one else [(out, images)]:
        target.copy_(source).sub_(mean).mul_(scale)
    return out


def random_resized_crop_box(
    size: tuple[int, int],
    generator: torch.Generator | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the Inception crop: area fraction and log aspect are uniform.

    size: (width, height). Ten tries, then the largest central crop whose aspect is within ratio.
    """
    width, height = size
    draws = torch.rand(4, 10, generator=generator).tolist()
    for area, aspect, x, y in zip(*draws):
        area = width * height * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + aspect * math.log(ratio[1] / ratio[0]))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def crop_resize(image: Opened, box: tuple[float, float, float, float],
                size: int | tuple[int, int], *, flip: bool = False, interpolation: str = "bicubic",
                draft: float = 1.0) -> Tensor:
    """The part box = (left, top, width, height) of an image, resized to size, as (3, h, w) uint8.

    The box is rounded to pixels. size: side or (h, w). Antialiased, by torch's uint8 kernel: three
    times as fast as Pillow's, and the same up to rounding. A JPEG is decoded at a reduced size as
    long as the crop keeps `draft` times the pixels of size along both sides.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    width, height = image_size(image)
    left, top, w, h = box
    if not (0 <= left < left + w <= width + 0.5 and 0 <= top < top + h <= height + 0.5):
        raise ValueError(f"box (left, top, width, height) must lie in the image of {width} x "
                         f"{height}, got {tuple(box)}")
    fx = fy = 1.0
    if not isinstance(image, np.ndarray):
        if isinstance(image, EncodedJpeg):
            image = image.above(math.ceil(top + h))
            height = image.size[1]
        wanted = math.ceil(width * draft * columns / w), math.ceil(height * draft * rows / h)
        image = decode(image, wanted if min(w / columns, h / rows) >= 2 * draft else None)
        fx, fy = image.width / width, image.height / height
    x0, y0 = round(left * fx), round(top * fy)
    x1, y1 = max(x0 + 1, round((left + w) * fx)), max(y0 + 1, round((top + h) * fy))
    part = image[y0:y1, x0:x1] if isinstance(image, np.ndarray) else image.crop((x0, y0, x1, y1))
    part = torch.from_numpy(np.array(part)).permute(2, 0, 1)
    if part.shape[1:] != (rows, columns):
        part = F.interpolate(part[None], (rows, columns), mode=interpolation, antialias=True)[0]
    return part.flip(2) if flip else part


class TrainTransform:
    """Random resized crop, flip, optional augmentation: image to (3, size, size) uint8.

    augment: called on the cropped PIL image (RandAugment, colour jitter); an attribute `generator`
    on it is set to the sample's generator first. coords=True also returns the crop (4,) float64 =
    (top/H, left/W, height/H, width/W) of the whole image; a flip leaves it as it is.
    """

    takes_encoded = True

    def __init__(self, size: int = 224, scale: tuple[float, float] = (0.08, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3), flip: float = 0.5,
                 interpolation: str = "bicubic",
                 augment: Callable[[Image.Image], Image.Image] | None = None, coords: bool = False):
        _check(size, interpolation)
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1] and 0 <= flip <= 1):
            raise ValueError("scale must be 0 < low <= high <= 1, ratio must be 0 < low <= high, "
                             f"flip must be 0 .. 1; got {scale}, {ratio} and {flip}")
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.interpolation, self.augment, self.coords = interpolation, augment, coords

    def __call__(self, image: Opened,
                 generator: torch.Generator | None = None) -> Tensor | tuple[Tensor, Tensor]:
        width, height = image_size(image)
        box = random_resized_crop_box((width, height), generator, self.scale, self.ratio)
        flip = torch.rand((), generator=generator).item() < self.flip
        out = crop_resize(image, box, self.size, flip=flip, interpolation=self.interpolation)
        if self.augment is not None:
            if hasattr(self.augment, "generator"):
                self.augment.generator = generator
            picture = Image.fromarray(out.permute(1, 2, 0).contiguous().numpy())
            out = to_tensor(self.augment(picture))
        if not self.coords:
            return out
        left, top, w, h = box
        corners = [top / height, left / width, h / height, w / width]
        return out, torch.tensor(corners, dtype=torch.float64)


class EvalTransform:
    """Short side to int(size / crop), central square: image to (3, size, size) uint8.

    JPEGs are drafted only where twice the needed resolution remains.
    """

    takes_encoded = True

    def __init__(self, size: int = 224, crop: float = 0.875, interpolation: str = "bicubic"):
        if not 0 < crop <= 1:
            raise ValueError(f"crop must be in (0, 1], got {crop}")
        _check(size, interpolation)
        self.size, self.crop, self.interpolation = size, crop, interpolation

    def __call__(self, image: Opened) -> Tensor:
        width, height = image_size(image)
        short, side = min(width, height), int(self.size / self.crop)
        rows, columns = side * height // short, side * width // short
        whole = (0, 0, width, height)
        out = crop_resize(image, whole, (rows, columns), interpolation=self.interpolation,
                          draft=2.0)
        top, left = round((rows - self.size) / 2), round((columns - self.size) / 2)
        return out[:, top : top + self.size, left : left + self.size]


class PadCropTransform:
    """The CIFAR augmentation: zero padding, random crop of the old size, flip: (3, H, W) uint8."""

    takes_encoded = True

    def __init__(self, padding: int = 4, flip: float = 0.5):
        if not (isinstance(padding, int) and padding >= 0 and 0 <= flip <= 1):
            raise ValueError("padding must be >= 0 pixels and flip in [0, 1], "
                             f"got {padding} and {flip}")
        self.padding, self.flip = padding, flip

    def __call__(self, image: Opened,
                 generator: torch.Generator | None = None) -> Tensor:
        pixels = to_tensor(image if isinstance(image, np.ndarray) else decode(image))
        height, width = pixels.shape[1:]
        x, y, flip = torch.rand(3, generator=generator).tolist()
        left, top = int(x * (2 * self.padding + 1)), int(y * (2 * self.padding + 1))
        out = F.pad(pixels, (self.padding,) * 4)[:, top : top + height, left : left + width]
        return out.flip(2) if flip < self.flip else out


def _check(size: int, interpolation: str) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a whole number of pixels, at least 1, got {size!r}")
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f'interpolation must be "bicubic" or "bilinear", got {interpolation!r}')


# --------------------------------------------------------------------------------------- loader


def sample_seed(*parts: int) -> int:
    """A 32-bit seed that differs between tuples of non-negative integers (SplitMix64 finaliser)."""
    state, mask = 0, (1 << 64) - 1
    for part in parts:
        state = (state ^ part) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 32


class _Batches:
    """(epoch, indices, slots) of each batch of the coming pass.

    It does not know the Loader: as part of a reference cycle, DataLoader does not stop its workers
    at once, but kills each after five seconds.
    """

    def __init__(self) -> None:
        self.coming: list[tuple[int, list[int], list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int], list[int]]]:
        return iter(self.coming)


class _Reader:
    """What a worker runs: reads, transforms and stacks one batch."""

    def __init__(self, loader: "Loader"):
        self.dataset, self.transform, self.seed = loader.dataset, loader.transform, loader.seed
        self.substitute = loader.shuffle and loader.on_bad_image == "skip"
        self.generator: torch.Generator | None = None
        self.takes_encoded = getattr(self.transform, "takes_encoded", False)
        self.takes_generator = (self.transform is not None
                                and "generator" in inspect.signature(self.transform).parameters)

    def __getitems__(self, batch: tuple[int, list[int], list[int]]) -> tuple[Any, Any, list[str]]:
        epoch, indices, slots = batch
        if self.transform is None and hasattr(self.dataset, "batch"):
            return self.dataset.batch(indices), self._labels(indices), []
        samples, used, bad = [], [], []
        for index, slot in zip(indices, slots):
            tries = min(100, len(self.dataset)) if self.substitute else 1
            for candidate in range(index, index + tries):
                candidate %= len(self.dataset)
                try:
                    samples.append(self._sample(candidate, (self.seed, epoch, index, slot)))
                    used.append(candidate)
                    break
                except BadImage as error:
                    bad.append(str(error))
        if samples and isinstance(samples[0], Tensor) and len({s.shape for s in samples}) > 1:
            raise ValueError(
                "images of different sizes in a batch: pass a transform that makes them equal")
        return default_collate(samples) if samples else None, self._labels(used), bad

    def _labels(self, indices: list[int]) -> Tensor:
        return torch.as_tensor(self.dataset.labels[np.asarray(indices, np.int64)])

    def _sample(self, index: int, key: tuple[int, ...]) -> Any:
        if self.transform is None:
            return open_and(self.dataset, index, lambda image: to_tensor(decode(image)))
        keywords = {}
        if self.takes_generator:
            if self.generator is None:  # made here: generators cannot be pickled to a worker
                self.generator = torch.Generator()
            keywords["generator"] = self.generator.manual_seed(sample_seed(*key))
        if self.takes_encoded:
            return open_and(self.dataset, index, lambda image: self.transform(image, **keywords))
        return self.transform(open_and(self.dataset, index, decode), **keywords)


class Loader:
    """Batches (images, labels[, extras of the transform]) of one epoch; iterate for the next one.

    dataset: see the module's docstring; its `labels` may hold more than one number per sample.
    transform: image to tensor, or to a tuple of tensors, called with generator=... if it has such
        a parameter; it gets a PIL RGB image, or the undecoded image if it has `takes_encoded`.
        None: (3, H, W) uint8.
    workers: processes; 0 reads in this one. The batches are the same for any number.
    rank, world_size: this process's share of the samples. A shuffled epoch is made equally long
        on every rank (filled up from its beginning, or cut with drop_last); an unshuffled one
        holds each sample once.
    drop_last: leave out what does not fill a batch; a set smaller than one is a ValueError.
    sampler: indices, already this rank's share (repeated augmentation), with `set_epoch` or not.
    device, normalize: images go there as uint8; normalize=(mean, std) then makes them float32.
    on_bad_image: "raise" BadImage, or "skip": a shuffled epoch takes the next readable image
        instead (batches keep their size), any other leaves the sample out. `bad_images` lists
        what was met, with reasons.
    """

    def __init__(self, dataset: Any, batch_size: int, *, transform: Callable | None = None,
                 shuffle: bool = False, seed: int = 0, workers: int = 0, drop_last: bool = False,
                 rank: int = 0, world_size: int = 1, sampler: Any = None,
                 device: str | torch.device | None = None,
                 normalize: tuple[Sequence[float], Sequence[float]] | None = None,
                 on_bad_image: str = "raise"):
        if batch_size < 1 or workers < 0:
            raise ValueError(
                f"batch_size must be >= 1 and workers >= 0, got {batch_size} and {workers}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1, got {rank} of {world_size}")
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f'on_bad_image must be "raise" or "skip", got {on_bad_image!r}')
        if len(dataset) == 0:
            raise ValueError("the data set is empty")
        self.dataset, self.batch_size, self.transform = dataset, batch_size, transform
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.rank, self.world_size, self.sampler = rank, world_size, sampler
        self.device = torch.device(device) if device is not None else None
        self.normalize, self.on_bad_image = normalize, on_bad_image
        self.bad_images: list[str] = []
        self._epoch = self._start = 0
        if drop_last and not len(self):
            raise ValueError(f"{self._samples()} samples do not fill a batch of {batch_size}")
        self._batches = _Batches()
        self._loader = DataLoader(_Reader(self), batch_sampler=self._batches, num_workers=workers,
                                  collate_fn=_identity, persistent_workers=workers > 0,
                                  generator=torch.Generator(),  # or it draws from the global one
                                  prefetch_factor=4 if workers else None,
                                  pin_memory=self.device is not None and self.device.type == "cuda")

    def _samples(self) -> int:
        """Samples of this rank per epoch, before drop_last."""
        if self.sampler is not None:
            return len(self.sampler)
        count, world = len(self.dataset), self.world_size
        if not self.shuffle:
            return len(range(self.rank, count, world))
        return count // world if self.drop_last else -(-count // world)

    def __len__(self) -> int:
        """Batches per epoch on this rank, wherever the epoch starts."""
        samples = self._samples()
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next pass is this epoch, from this batch on; nothing before it is read or decoded."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"epoch {epoch}, batch {start_batch}: an epoch has {len(self)} batches")
        self._epoch, self._start = epoch, start_batch

    def _order(self, epoch: int) -> tuple[list[int], list[int]]:
        """This rank's indices in order, and slots that tell repeats of an index apart."""
        if self.sampler is not None:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            indices = [int(index) for index in self.sampler]
            return indices, [i * self.world_size + self.rank + 1 for i in range(len(indices))]
        if self.shuffle:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch))
            order = torch.randperm(len(self.dataset), generator=generator)
            total = self._samples() * self.world_size
            order = order.repeat(-(-total // len(order)))[:total]
        else:
            order = torch.arange(len(self.dataset))
        indices = order[self.rank :: self.world_size].tolist()
        return indices, [0] * len(indices)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch, start = self._epoch, self._start
        self._epoch, self._start = epoch + 1, 0
        return self._iterate(epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        indices, slots = self._order(epoch)
        size = self.batch_size
        self._batches.coming = [(epoch, indices[at : at + size], slots[at : at + size])
                                for at in range(start * size, len(self) * size, size)]
        for samples, labels, bad in self._loader:
            for message in bad:
                if self.on_bad_image == "raise":
                    raise BadImage(message)
                if message not in self.bad_images:
                    self.bad_images.append(message)
                    warnings.warn(f"skipped {message} ({len(self.bad_images)} so far)",
                                  stacklevel=2)
            if samples is None:
                if self.shuffle:
                    raise BadImage(
                        f"{len(bad)} images in a row are unreadable, the last: {bad[-1]}")
                continue
            images, *extras = samples if isinstance(samples, (list, tuple)) else (samples,)
            if self.device is not None:
                images = images.to(self.device, non_blocking=True)
                labels = labels.to(self.device, non_blocking=True)
                extras = [extra.to(self.device, non_blocking=True) for extra in extras]
            if self.normalize is not None:
                images = normalize(images, *self.normalize)
            yield images, labels, *extras


def _identity(batch: Any) -> Any:
    return batch
