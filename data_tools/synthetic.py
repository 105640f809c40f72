"""The embedded data: procedural images with exact labels, masks and boxes; no download.

    data = shapes(3000, size=32, seed=0)
    data["images"]   (N, 3, S, S) uint8
    data["labels"]   (N,) int64
    data["masks"]    (N, S, S) bool, True on the object
    data["boxes"]    (N, 4) int64: x0, y0, x1, y1, upper edges exclusive

    loader = Batches(data["images"], data["labels"], batch_size=64, seed=0, transform=to_float)
    for images, labels in loader: ...

A seed determines a set entirely; different seeds give independent sets (use one for training,
another for validation). Everything is drawn in vectorised batches on the CPU; `python -m
data_tools.synthetic` shows the rate.

The primitives (`shape_mask`, `stripes`, `mask_boxes`) take tensors of parameters, one entry per
object, so that other data sets (scenes with several objects, videos, captions) are built from the
same parts.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch

SHAPES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped")
CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
CHUNK = 1024                                  # images rendered at a time: bounds the memory


# ---------------------------------------------------------------- primitives

def pixel_grid(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (1, 1, S) and y (1, S, 1) coordinates of the pixel centres, 0 .. size - 1."""
    line = torch.arange(size, dtype=torch.float32)
    return line.view(1, 1, -1), line.view(1, -1, 1)


def shape_mask(kind: torch.Tensor, size: int, cx: torch.Tensor, cy: torch.Tensor,
               radius: torch.Tensor, angle: torch.Tensor | None = None) -> torch.Tensor:
    """(N, S, S) bool masks of shapes in a circle of `radius` around (cx, cy), which the corners of
    square and cross leave by 13 and 4 %.

    kind: (N,) int64 indices into SHAPES. cx, cy, radius: (N,) in pixels; a shape of less than two
    may miss every pixel's centre. angle: (N,) radians, None for upright.
    """
    x, y = pixel_grid(size)
    column = lambda v: v.view(-1, 1, 1)                       # noqa: E731
    u, v = (x - column(cx)) / column(radius), (y - column(cy)) / column(radius)
    if angle is not None:
        cos, sin = column(angle.cos()), column(angle.sin())
        u, v = u * cos + v * sin, v * cos - u * sin
    distance, largest = u.square() + v.square(), torch.maximum(u.abs(), v.abs())
    masks = torch.stack([
        distance <= 1,
        largest <= 0.8,
        (v <= 0.5) & (u.abs() <= (v + 1) / math.sqrt(3)),     # equilateral, corners on the circle
        (largest <= 1) & (torch.minimum(u.abs(), v.abs()) <= 0.3),
        (distance <= 1) & (distance >= 0.3),
    ], dim=1)
    return masks[torch.arange(len(kind)), kind]


def stripes(size: int, angle: torch.Tensor, phase: torch.Tensor,
            frequency: float = 1.9) -> torch.Tensor:
    """(N, S, S) bool: sin(frequency * (x cos a + y sin a) + phase) > 0; a, phase (N,) radians."""
    x, y = pixel_grid(size)
    a = angle.view(-1, 1, 1)
    return torch.sin(frequency * (x * a.cos() + y * a.sin()) + phase.view(-1, 1, 1)) > 0


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """(N, H, W) masks -> (N, 4) int64 tight boxes, upper edges exclusive; zeros of empty masks."""
    sides = []
    for line in (masks.any(1), masks.any(2)):                 # columns, then rows
        line = line.to(torch.uint8)
        sides.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1) * masks.flatten(1).any(1).long().unsqueeze(1)


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def to_float(images: torch.Tensor, mean: float = 0.5, std: float = 0.3) -> torch.Tensor:
    """uint8 (..., H, W) to float32 (v / 255 - mean) / std, on the images' device."""
    return images.float().div_(255 * std).sub_(mean / std)


def _check(count: int, size: int, noise: float, least: int = 8) -> None:
    if count < 0 or size < least or not noise >= 0:
        raise ValueError(f"count must be >= 0 and size >= {least}, not {count} and {size}; "
                         f"noise must be >= 0, not {noise}")


def _given_or_drawn(labels: torch.Tensor | None, count: int, classes: int,
                    generator: torch.Generator) -> torch.Tensor:
    """(count,) int64 labels in 0 .. classes - 1."""
    if labels is None:
        return torch.randint(classes, (count,), generator=generator)
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', labels)}")
    if labels.shape != (count,) or count and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must be ({count},) with values in 0..{classes - 1}, "
                         f"not {tuple(labels.shape)}")
    return labels.clone()


# ---------------------------------------------------------------- classification, masks, boxes

def shapes(count: int, size: int = 32, seed: int = 0, *, noise: float = 0.05, rotate: bool = False,
           labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """One object per image, one of 10 CLASSES, of random colours, position and size.

    Returns images (N, 3, S, S) uint8, labels (N,) int64, masks (N, S, S) bool, boxes (N, 4) int64.
    The centre is uniform in [9, 23] / 32 of the side, the radius in [5, 9] / 32; colours are
    uniform RGB; Gaussian noise of standard deviation `noise` (images in [0, 1]) is added. `labels`
    (N,) fixes the classes.
    """
    _check(count, size, noise)
    generator = torch.Generator().manual_seed(seed)
    labels = _given_or_drawn(labels, count, len(CLASSES), generator)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, size, size, dtype=torch.bool)
    scale = size / 32
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        label = labels[part]
        n = len(label)
        cx, cy = uniform(generator, 9 * scale, 23 * scale, 2, n)
        radius = uniform(generator, 5 * scale, 9 * scale, n)
        stripe_angle, phase, angle = uniform(generator, 0, 2 * math.pi, 3, n)
        mask = shape_mask(label // 2, size, cx, cy, radius, angle if rotate else None)
        lines = stripes(size, stripe_angle, phase, 1.9 / scale)
        painted = mask & ((label % 2 == 0).view(-1, 1, 1) | lines)
        back, front = uniform(generator, 0, 1, 2, n, 3, 1, 1)
        image = torch.where(painted.unsqueeze(1), front, back)
        image += noise * torch.randn(image.shape, generator=generator)
        images[part], masks[part] = to_uint8(image), mask
    return {"images": images, "labels": labels, "masks": masks, "boxes": mask_boxes(masks)}


PALETTE = {"red": (0.9, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 0.95),
           "yellow": (0.95, 0.9, 0.2)}
COLORED_CLASSES = tuple(f"{color} {shape}" for shape in ("disc", "cross") for color in PALETTE)


def colored_objects(count: int, objects: int = 2, size: int = 64, seed: int = 0, *,
                    noise: float = 0.05) -> dict[str, torch.Tensor]:
    """One object, or two of different classes, of which the label of a pair tells one.

    Eight classes that a small network learns in minutes: disc or cross in one of four colours (with
    some variation) on grey. Returns images (N, 3, S, S) uint8; classes (N, objects) int64; labels
    (N,), one of the row's classes drawn at random; masks (N, objects, S, S) bool; boxes (N,
    objects, 4). Two objects lie in different halves (left and right, or above and below). Radii are
    in [8, 14] / 64 of the side.
    """
    _check(count, size, noise)
    if objects not in (1, 2):
        raise ValueError(f"objects must be 1 or 2, not {objects}")
    generator = torch.Generator().manual_seed(seed)
    kinds, palette = len(COLORED_CLASSES), torch.tensor(list(PALETTE.values()))
    classes = torch.randint(kinds, (count, 2), generator=generator)
    classes[:, 1] = (classes[:, 0] + torch.randint(1, kinds, (count,), generator=generator)) % kinds
    classes = classes[:, :objects].contiguous()
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, objects, size, size, dtype=torch.bool)
    centres = ((14, 50),) if objects == 1 else ((15, 17), (47, 49))
    scale = size / 64
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        n = len(classes[part])
        image = uniform(generator, 0.2, 0.8, n, 1, 1, 1).expand(n, 3, size, size)
        sideways = torch.rand(n, generator=generator) < 0.5
        for number, (low, high) in enumerate(centres):
            label = classes[part, number]
            along = uniform(generator, low * scale, high * scale, n)
            across = uniform(generator, 14 * scale, 50 * scale, n)
            cx, cy = torch.where(sideways, along, across), torch.where(sideways, across, along)
            kind = torch.where(label >= 4, SHAPES.index("cross"), SHAPES.index("disc"))
            mask = shape_mask(kind, size, cx, cy, uniform(generator, 8 * scale, 14 * scale, n))
            color = palette[label % 4] + uniform(generator, -0.15, 0.15, n, 3)
            image = torch.where(mask.unsqueeze(1), color.view(n, 3, 1, 1), image)
            masks[part, number] = mask
        images[part] = to_uint8(image + noise * torch.randn(image.shape, generator=generator))
    labels = classes[torch.arange(count), torch.randint(objects, (count,), generator=generator)]
    boxes = mask_boxes(masks.flatten(0, 1)).view(count, objects, 4)
    return {"images": images, "labels": labels, "classes": classes, "masks": masks, "boxes": boxes}


class Batches:
    """Batches of tensors in memory, shuffled by (seed, epoch); may begin amid an epoch.

    Yields tuples of the tensors' rows; `transform` is applied to the first (images). With
    `world_size` processes, process `rank` gets every world_size-th row of each batch; a shuffled
    last batch that has not a row for each of them is left out.
    """

    def __init__(self, *tensors: torch.Tensor, batch_size: int, shuffle: bool = True, seed: int = 0,
                 drop_last: bool = False, rank: int = 0, world_size: int = 1,
                 transform: Callable[[torch.Tensor], torch.Tensor] | None = None):
        if not tensors or any(len(t) != len(tensors[0]) for t in tensors):
            raise ValueError(f"tensors must have equal lengths, not {[len(t) for t in tensors]}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1, not {rank} of {world_size}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a positive multiple of world_size {world_size}, "
                             f"not {batch_size}")
        self.tensors, self.batch_size, self.shuffle, self.seed = tensors, batch_size, shuffle, seed
        self.drop_last, self.transform = drop_last, transform
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_batch = 0
        if not len(self):
            raise ValueError(f"{len(tensors[0])} samples do not fill a batch of {batch_size}")

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration is epoch `epoch`, without its first `start_batch` batches."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"epoch {epoch}, batch {start_batch}: an epoch has {len(self)} batches")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        full, rest = divmod(len(self.tensors[0]), self.batch_size)
        least = self.world_size if self.shuffle else 1
        return full + (rest >= least and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        count = len(self.tensors[0])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        first, self.start_batch = self.start_batch, 0
        self.epoch += 1                                       # plain re-iteration gives a new order
        for batch in range(first, len(self)):
            rows = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            rows = rows[self.rank::self.world_size]
            images, *rest = (tensor[rows.to(tensor.device)] for tensor in self.tensors)
            yield (self.transform(images) if self.transform else images, *rest)


# ---------------------------------------------------------------- scenes that tell the class

def scenes(count: int, size: int = 64, seed: int = 0, *, rho: float = 0.5, noise: float = 0.04,
           labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """One object of CLASSES on one of ten striped backgrounds, the class's own with chance `rho`.

    Otherwise it is drawn uniformly, so rho = 0 leaves no cue outside the object and rho = 1 makes
    the background tell the class as surely as the object does. A background has a hue and a stripe
    direction; an object has, besides its shape and texture, the strong hue of its class (opposite
    to that background's) on all of it or on its stripes; the colour between the stripes, place,
    size and angle are random. Returns the keys of `shapes` and "backgrounds" (N,) int64.
    """
    _check(count, size, noise)
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], not {rho}")
    generator = torch.Generator().manual_seed(seed)
    labels = _given_or_drawn(labels, count, len(CLASSES), generator)
    telling = torch.rand(count, generator=generator) < rho
    backgrounds = torch.where(telling, labels,
                              torch.randint(len(CLASSES), (count,), generator=generator))
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, size, size, dtype=torch.bool)
    scale = size / 64
    thirds = torch.arange(3).view(1, 3, 1, 1) / 3             # red, green, blue on the hue circle
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        label, cue = labels[part], backgrounds[part]
        n = len(label)
        cx, cy = uniform(generator, 21 * scale, 43 * scale, 2, n)
        radius = uniform(generator, 13 * scale, 21 * scale, n)
        angle = uniform(generator, 0, 2 * math.pi, n)
        stripe_angle, phase, back_phase = uniform(generator, 0, 2 * math.pi, 3, n)
        hue = (cue / len(CLASSES)).view(-1, 1, 1, 1)
        back = 0.5 + 0.12 * torch.cos(2 * math.pi * (hue + thirds))
        back = back + uniform(generator, -0.08, 0.08, n, 1, 1, 1)
        bands = stripes(size, cue * (math.pi / len(CLASSES)), back_phase, 0.6 / scale).unsqueeze(1)
        mask = shape_mask(label // 2, size, cx, cy, radius, angle)
        light = (label % 2 == 0).view(-1, 1, 1) | stripes(size, stripe_angle, phase, 1.2 / scale)
        opposite = label.view(-1, 1, 1, 1) / len(CLASSES) + 0.5
        own = 0.5 + 0.4 * torch.cos(2 * math.pi * (opposite + thirds))
        own = own + uniform(generator, -0.15, 0.15, n, 3, 1, 1)
        other = uniform(generator, 0, 1, n, 3, 1, 1)
        image = torch.where(mask.unsqueeze(1), torch.where(light.unsqueeze(1), own, other),
                            back + 0.16 * (bands.float() - 0.5))
        image += noise * torch.randn(image.shape, generator=generator)
        images[part], masks[part] = to_uint8(image), mask
    return {"images": images, "labels": labels, "masks": masks, "boxes": mask_boxes(masks),
            "backgrounds": backgrounds}


# ------------------------------------------------ videos: the class is a direction of motion

def videos(count: int, size: int = 16, frames: int = 8, seed: int = 0, *, classes: int = 4,
           rho: float | None = None, action_frames: int | None = None, speed: float = 2.0,
           noise: float = 0.05, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """A square of random colour moves over a still scene; one of `classes` directions is the class.

    It moves `speed` pixels of 16 a frame on a torus (what leaves on one side comes back on the
    other), so that no single frame tells the class. rho None: every clip has a smooth random scene
    of its own. rho in [0, 1]: the scene is one of `classes` fixed ones, the class's own with
    probability rho and else a random one. action_frames: the square moves only during that many
    consecutive frames and stands still before and after (an untrimmed video; None: always).

    Returns videos (N, 3, T, S, S) uint8; labels (N,) int64; scenes (N,) int64, -1 for scenes of
    their own; masks (N, T, S, S) bool, True on the square; boxes (N, T, 4) int64 x0, y0, x1, y1
    with 0 <= x0, y0 < S, coordinates modulo S, upper edges exclusive; intervals (N, 2) int64, first
    frame of the action and the one after its last.
    """
    action = frames if action_frames is None else action_frames
    _check(count, size, noise)
    if classes < 2 or not 1 <= action <= frames:
        raise ValueError("classes must be >= 2 and 1 <= action_frames <= frames, "
                         f"not {classes}, {action_frames} and {frames}")
    if rho is not None and not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1] or None, not {rho}")
    generator = torch.Generator().manual_seed(seed)
    labels = _given_or_drawn(labels, count, classes, generator)
    if rho is None:
        scenes_of = torch.full((count,), -1)
    else:
        telling = torch.rand(count, generator=generator) < rho
        scenes_of = torch.where(telling, labels,
                                torch.randint(classes, (count,), generator=generator))
    fixed = torch.Generator().manual_seed(7919)               # class scenes are no matter of seed
    shared = torch.rand(classes, 3, 4, 4, generator=fixed)
    out = torch.empty(count, 3, frames, size, size, dtype=torch.uint8)
    masks = torch.empty(count, frames, size, size, dtype=torch.bool)
    boxes = torch.empty(count, frames, 4, dtype=torch.int64)
    intervals = torch.empty(count, 2, dtype=torch.int64)
    side, pixel = size // 4, torch.arange(size)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        label, n = labels[part], len(labels[part])
        first = torch.randint(frames - action + 1, (n, 1), generator=generator)
        moved = (torch.arange(frames) - first).clamp(0, action - 1) * (speed * size / 16)
        angle = 2 * math.pi * label / classes
        heading = torch.stack([angle.cos(), angle.sin()], 1)
        corner = torch.randint(size, (n, 1, 2), generator=generator)
        corner = corner + moved.unsqueeze(2) * heading.unsqueeze(1)           # (n, T, 2): x, y
        corner = corner.round().long() % size
        covered = (pixel - corner.unsqueeze(3)) % size < side                 # (n, T, 2, S)
        mask = covered[:, :, 0].unsqueeze(2) & covered[:, :, 1].unsqueeze(3)
        own = rho is None
        grid = torch.rand(n, 3, 4, 4, generator=generator) if own else shared[scenes_of[part]]
        scene = torch.nn.functional.interpolate(grid, (size, size), mode="bilinear").unsqueeze(2)
        color = uniform(generator, 0, 1, n, 3, 1, 1, 1)
        clip = torch.where(mask.unsqueeze(1), color, scene)
        clip = clip + noise * torch.randn(clip.shape, generator=generator)
        out[part], masks[part] = to_uint8(clip), mask
        boxes[part] = torch.cat([corner, corner + side], 2)
        intervals[part] = torch.cat([first, first + action], 1)
    return {"videos": out, "labels": labels, "scenes": scenes_of, "masks": masks, "boxes": boxes,
            "intervals": intervals}


# ---------------------------------------------------------------- captions, all matches known

HUES = {"red": (0.9, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.2, 0.3, 0.95),
        "yellow": (0.95, 0.9, 0.2), "purple": (0.65, 0.2, 0.8), "white": (1.0, 1.0, 1.0)}
SIZES = {"small": 6.0, "medium": 9.5, "large": 13.0}          # radius in 1/64 of the side
PLACES = ("upper left", "upper right", "lower left", "lower right")
ATTRIBUTES = (tuple(SIZES), tuple(HUES), SHAPES, PLACES)      # the order of an object's 4 numbers
RELATIONS = ("and", "left of", "above")


def captioned_shapes(count: int, size: int = 64, seed: int = 0, *, captions: int = 5,
                     objects: int = 3, labels: torch.Tensor | None = None,
                     noise: float = 0.03) -> dict:
    """Images of 1 to `objects` shapes in different quarters; captions tell more or less of them.

    A caption mentions one or more of the objects, each by a part of its size, colour, shape and
    place ("a large red disc in the upper left", "a blue shape above a cross"): the less it says,
    the more images it fits. labels (N,) fixes the classes of single objects, 5 * colour + shape.

    Returns images (N, 3, S, S) uint8; objects (N, 3, 4) int64, indices into ATTRIBUTES (-1: no
    object); captions, N * `captions` strings, those of an image together; mentions (N * captions,
    3, 4) int64 (-1: not told); relations (N * captions,) int64, index into RELATIONS of the first
    two mentions. See `caption_matches`.
    """
    _check(count, size, noise, 16)
    if not 1 <= objects <= 3 or captions < 1:
        raise ValueError("need objects in 1..3 and captions >= 1, "
                         f"not {objects} and {captions}")
    generator = torch.Generator().manual_seed(seed)
    scene = torch.stack([torch.randint(len(values), (count, 3), generator=generator)
                         for values in ATTRIBUTES], 2)
    scene[..., 3] = torch.rand(count, 4, generator=generator).argsort(1)[:, :3]   # all different
    number = torch.randint(1, objects + 1, (count,), generator=generator)
    if labels is not None:
        _given_or_drawn(labels, count, len(HUES) * len(SHAPES), generator)
        number = torch.ones_like(number)
        scene[:, 0, 1], scene[:, 0, 2] = labels // len(SHAPES), labels % len(SHAPES)
    scene[torch.arange(3) >= number[:, None]] = -1

    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    palette, radii = torch.tensor(list(HUES.values())), torch.tensor(list(SIZES.values()))
    unit = size / 64
    for start in range(0, count, CHUNK):
        part = scene[start:start + CHUNK]
        n = len(part)
        image = uniform(generator, 0.1, 0.45, n, 1, 1, 1).expand(n, 3, size, size)
        for extent, hue, kind, place in part.permute(1, 2, 0):
            dx, dy = uniform(generator, -2, 2, 2, n)
            radius = radii[extent] * uniform(generator, 0.93, 1.07, n)
            cx, cy = 16 + 32 * (place % 2) + dx, 16 + 32 * (place // 2) + dy
            mask = shape_mask(kind, size, unit * cx, unit * cy, unit * radius)
            mask &= (hue >= 0).view(-1, 1, 1)
            color = palette[hue] + uniform(generator, -0.1, 0.1, n, 3)
            image = torch.where(mask.unsqueeze(1), color.view(n, 3, 1, 1), image)
        image = image + noise * torch.randn(image.shape, generator=generator)
        images[start:start + CHUNK] = to_uint8(image)

    total, number = count * captions, number.repeat_interleave(captions)
    order = torch.rand(total, 3, generator=generator)
    order = order.masked_fill(torch.arange(3) >= number[:, None], 2.0).argsort(1)
    mentions = scene.repeat_interleave(captions, 0).gather(1, order[..., None].expand(-1, -1, 4))
    relations = torch.randint(len(RELATIONS), (total,), generator=generator)
    named = (torch.rand(total, generator=generator) * number).long() + 1
    true = _relation_holds(mentions[:, 0, 3], mentions[:, 1, 3])[torch.arange(total), relations]
    relations = relations.masked_fill(~true | (named < 2), 0)
    share = uniform(generator, 0.0, 1.0, total, 1, 1)         # one is sparing, another generous,
    told = torch.rand(total, 3, 4, generator=generator) < share
    told.scatter_(2, torch.randint(4, (total, 3, 1), generator=generator), True)     # none silent
    mentions = mentions.masked_fill(~told | (torch.arange(3) >= named[:, None])[..., None], -1)
    texts = [_caption_text(*row) for row in zip(mentions.tolist(), relations.tolist())]
    return {"images": images, "objects": scene, "captions": texts, "mentions": mentions,
            "relations": relations}


def _relation_holds(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Places (...) of two objects -> (..., 3) bool: which of RELATIONS hold between them."""
    left, above = first % 2 < second % 2, first // 2 < second // 2
    return torch.stack([torch.ones_like(left), left, above], -1)


def _caption_text(mentions: list[list[int]], relation: int) -> str:
    parts = []
    for extent, hue, kind, place in (mention for mention in mentions if max(mention) >= 0):
        words = ["a", ATTRIBUTES[0][extent] if extent >= 0 else "",
                 ATTRIBUTES[1][hue] if hue >= 0 else "",
                 SHAPES[kind] if kind >= 0 else "shape",
                 f"in the {PLACES[place]}" if place >= 0 else ""]
        parts.append(" ".join(filter(None, words)))
    if len(parts) > 1:
        parts[:2] = [f"{parts[0]} {RELATIONS[relation]} {parts[1]}"]
    return " and ".join(parts)


def caption_matches(objects: torch.Tensor, mentions: torch.Tensor,
                    relations: torch.Tensor) -> torch.Tensor:
    """(Ni, Nc) bool: all that caption c says, of different objects, is true of image i."""
    matches = torch.zeros(len(objects), len(mentions), dtype=torch.bool)
    place = objects[..., 3]
    lies = _relation_holds(place[:, :, None], place[:, None, :])                     # (Ni, 3, 3, 3)
    for start in range(0, len(mentions), CHUNK):
        said, seen = mentions[None, start:start + CHUNK, :, None], objects[:, None, None]
        agrees = torch.stack([(said[..., a] < 0) | (said[..., a] == seen[..., a])
                              for a in range(4)]).all(0)             # (Ni, n, mention, object)
        relation = relations[start:start + CHUNK]
        for a, b, c in itertools.permutations(range(3)):
            fits = agrees[:, :, 0, a] & agrees[:, :, 1, b] & agrees[:, :, 2, c]
            matches[:, start:start + CHUNK] |= fits & lies[:, a, b][:, relation]
    return matches


def scene_codes(objects: torch.Tensor) -> torch.Tensor:
    """(Ni, 11) uint8: which colours and shapes an image holds (as COCO's 80 categories do)."""
    present = [(objects[..., a, None] == torch.arange(len(ATTRIBUTES[a]))).any(1) for a in (1, 2)]
    return torch.cat(present, 1).to(torch.uint8)


if __name__ == "__main__":
    began = time.perf_counter()
    data = shapes(20_000)
    rate = 20_000 / (time.perf_counter() - began)
    fill = data["masks"].flatten(1).float().mean(1)
    print(f"{rate:,.0f} images of 32 px a second; the object covers {fill.mean():.0%} on average")
