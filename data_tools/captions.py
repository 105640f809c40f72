"""Images with captions: COCO (Karpathy splits), CUB (published splits), Flickr8k; batches of them.

    data = coco_captions("/data/coco", "train", "dataset_coco.json")
    data = cub_captions("/data/cub", cub_classes("trainval", "/data/cub/lists"))
    data = flickr8k("/data/flickr8k", "train")

    vocabulary = Vocabulary.of(data.captions, tokenize)          # or Vocabulary.load(path)
    batches = PairBatches(data, vocabulary, 128, transform=TrainTransform(224), seed=0)
    for images, tokens, lengths, image_ids, caption_image_ids in batches: ...

A `CaptionSet` lists the images in the order in which they first appear and keeps the captions of
an image together; it is also a data set for `data_tools.loader.Loader` whose labels are image rows.
`tokenize` (string to list of strings) comes from the caller: `reference.pcme.tokenize` gives the
tokens of the published vocabularies. Words and vocabularies live in `data_tools.words`.

Where the files come from: COCO's 2014 images and annotations with Karpathy's dataset_coco.json;
CUB-200-2011 with the captions of Reed et al. (`cvpr2016_cub/text_c10`) and the class lists of Xian
et al.; Flickr8k with its token and split files. Nothing is downloaded here.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.files import existing, read_lines, read_text, reading
from data_tools.loader import IMAGENET_MEAN, IMAGENET_STD, Loader, open_image
from data_tools.words import (END, PAD, SPECIAL, START, UNKNOWN, Vocabulary,  # noqa: F401
                              drop_words, pad, read_glove, set_word_vectors)

# ---------------------------------------------------------------- images with captions


@dataclass
class CaptionSet:
    """Ni images and Nc captions; caption c describes image `owner[c]`.

    images: paths, or uint8 (Ni, 3, H, W). image_ids (Ni,), caption_ids (Nc,), owner (Nc,) int64,
    nondecreasing; classes (Ni,) int64 or None.
    """

    images: list[Path] | Tensor
    image_ids: np.ndarray
    captions: list[str]
    caption_ids: np.ndarray
    owner: np.ndarray
    classes: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        return np.arange(len(self.images))

    @property
    def caption_image_ids(self) -> np.ndarray:
        """(Nc,) id of each caption's image."""
        return self.image_ids[self.owner]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return f"image {row}" if isinstance(self.images, Tensor) else str(self.images[row])

    def open(self, row: int) -> Image.Image | np.ndarray:
        """The image of a row: undecoded, or (H, W, 3) uint8. Raises BadImage."""
        if isinstance(self.images, Tensor):
            return self.images[row].permute(1, 2, 0).numpy()
        return open_image(self.images[row])

    def first(self, images: int) -> CaptionSet:
        """The first images and their captions."""
        if images < 0:
            raise ValueError(f"images must not be negative, got {images}")
        end = int(np.searchsorted(self.owner, images))
        classes = None if self.classes is None else self.classes[:images]
        return CaptionSet(self.images[:images], self.image_ids[:images], self.captions[:end],
                          self.caption_ids[:end], self.owner[:end], classes)

    def in_memory(self, transform: Callable | None = None) -> CaptionSet:
        """The same set with all images decoded (and transformed) once, as one uint8 tensor."""
        pixels = [images for images, _ in Loader(self, 64, transform=transform)]
        if len({images.shape[1:] for images in pixels}) > 1:
            raise ValueError("images of different sizes: pass a transform that makes them equal")
        return replace(self, images=torch.cat(pixels))


def _grouped(rows: Iterable[tuple[int, object, Path, str]],
             classes: dict | None = None) -> CaptionSet:
    """(caption id, image id, path, caption) in any order -> captions grouped by image."""
    images: dict[object, list] = {}
    for caption_id, image_id, path, caption in rows:
        images.setdefault(image_id, [path, []])[1].append((caption_id, caption))
    if not images:
        raise ValueError("no captions are left after the selection")
    ids = list(images)
    numbers = ids if isinstance(ids[0], (int, np.integer)) else range(len(ids))
    paths, groups = zip(*images.values())
    caption_ids, captions = zip(*(pair for group in groups for pair in group))
    labels = None if classes is None else np.array([classes[i] for i in ids], dtype=np.int64)
    return CaptionSet(list(paths), np.array(numbers, dtype=np.int64), list(captions),
                      np.array(caption_ids, dtype=np.int64),
                      np.repeat(np.arange(len(ids)), [len(group) for group in groups]), labels)


def _read_json(path: Path) -> dict | list:
    with reading(path, "valid JSON"):
        return json.loads(read_text(path))


def _once(path: Path, missing: str, item: Callable = lambda line, place: line) -> list:
    """What the lines of a list stand for: item(line, "file:line"), each once and at least one."""
    found: dict[object, str] = {}
    for place, line in read_lines(path, missing):
        if (value := item(line := line.strip(), place)) in found:
            raise ValueError(f"{place}: {line!r} stands twice, first in {found[value]}")
        found[value] = place
    if not found:
        raise ValueError(f"{path}: the list is empty")
    return list(found)


def _first_existing(candidates: Sequence[Path], what: str) -> Path:
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(f"{what} not found; looked for {', '.join(map(str, candidates))}")


# ---------------------------------------------------------------- COCO captions

KARPATHY = {"train": "train", "restval": "restval", "dev": "val", "test": "test"}


def karpathy_ids(source: str | Path, split: str) -> np.ndarray:
    """Caption ids (int64) of a Karpathy split: "train" (with the 30,504 images of "restval"),
    "dev", "test".

    source: dataset_coco.json, or a folder of `{train,restval,dev,test}_ids` files, .npy or .txt,
    also with a leading "coco_".
    """
    _check_split(split)
    parts = ("train", "restval") if split == "train" else (split,)
    source, ids = existing(Path(source), "dataset_coco.json or folder of id lists"), []
    if source.is_file():
        wanted, document = {KARPATHY[part] for part in parts}, _read_json(source)
        with reading(source, "Karpathy's dataset_coco.json"):
            for image in document["images"]:
                ids += image["sentids"] if image["split"] in wanted else ()
            if wrong := [i for i in ids if type(i) is not int]:
                raise ValueError(f"the sentence id {wrong[0]!r}")
    for part in parts if source.is_dir() else ():
        names = [f"{a}{part}_ids.{b}" for a in ("coco_", "") for b in ("npy", "txt")]
        path = _first_existing([source / name for name in names], f"id list of split {part!r}")
        ids += _id_list(path)
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{source}: split {split!r} has {len(ids)} ids, {len(set(ids))} of them "
                         "different")
    return np.array(ids, dtype=np.int64)


def _id_list(path: Path) -> list[int]:
    if path.suffix == ".txt":
        return _once(path, "no such list of ids", _caption_id)
    with reading(path, "a list of different caption ids"):
        ids = np.load(path)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size == len(np.unique(ids)) > 0:
            raise ValueError(f"{ids.dtype} {ids.shape}, {len(np.unique(ids))} of them different")
        return ids.tolist()


def _caption_id(line: str, place: str) -> int:
    if not (line.isascii() and line.isdecimal()):
        raise ValueError(f"{place}: a caption id expected, got {line!r}")
    return int(line)


def _check_split(split: str) -> None:
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be 'train', 'dev' or 'test', got {split!r}")


def coco_captions(root: str | Path, split: str, ids: str | Path) -> CaptionSet:
    """COCO captions of a Karpathy split; `ids` as for `karpathy_ids`.

    root holds annotations/captions_{train,val}2014.json (also one folder deeper) and the images in
    images/trainval35k, in train2014 and val2014, or in images/train2014 and images/val2014.
    """
    root, wanted, captions = Path(root), karpathy_ids(ids, split).tolist(), {}
    for part in ("train2014", "val2014"):
        path = _annotations(root, f"captions_{part}.json")
        document = _read_json(path)
        with reading(path, "a COCO caption file"):
            names = {image["id"]: image["file_name"] for image in document["images"]}
            found = {a["id"]: (a["image_id"], part, names[a["image_id"]], a["caption"])
                     for a in document["annotations"]}
            if len(names) < len(document["images"]) or len(found) < len(document["annotations"]):
                raise ValueError("an image or caption id stands twice")
            if wrong := [i for i, (_, _, *texts) in found.items()
                         if not all(isinstance(text, str) for text in texts)]:
                raise ValueError(f"caption {wrong[0]} or its file_name is no text")
            captions |= found
    if missing := [i for i in wanted if i not in captions]:
        raise ValueError(f"{root}: {len(missing)} caption ids of split {split!r} are not in the "
                         f"annotations, first {missing[:3]}")
    folders = {}
    for part in {captions[i][1] for i in wanted}:
        places = [root / "images" / "trainval35k", root / part, root / "images" / part]
        folders[part] = _first_existing(places, f"images of {part}")
    rows = ((i, *captions[i]) for i in wanted)
    return _grouped((i, image, folders[part] / name, text) for i, image, part, name, text in rows)


def coco_instances(root: str | Path) -> list[dict[str, int]]:
    """image_id and category_id of all instance annotations, for `plausible_match_codes`."""
    found = []
    for part in ("train2014", "val2014"):
        path = _annotations(Path(root), f"instances_{part}.json")
        document = _read_json(path)
        with reading(path, "a COCO instance file"):
            found += [{key: a[key] for key in ("image_id", "category_id")}
                      for a in document["annotations"]]
    return found


def _annotations(root: Path, name: str) -> Path:
    folder = root / "annotations"
    return _first_existing([folder / name, folder / "annotations" / name], name)


def match_lists(path: str | Path, query_ids: Sequence[int],
                gallery_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """ECCV Caption or CxC matches, JSON {query id: [gallery ids]}.

    Returns the rows of the queries that have an entry (Q,), and positives (Q, Ng) bool.
    """
    document = _read_json(existing(Path(path), "list of matches"))
    column = {int(item): index for index, item in enumerate(gallery_ids)}
    if len(column) < len(gallery_ids):
        raise ValueError(f"gallery_ids must differ, {len(column)} of {len(gallery_ids)} do")
    with reading(path, "a list of matches {query id: [gallery ids]}"):
        lists = {int(key): [column[int(item)] for item in items if int(item) in column]
                 for key, items in document.items()}
    rows = [row for row, item in enumerate(query_ids) if int(item) in lists]
    positives = np.zeros((len(rows), len(column)), dtype=bool)
    for line, row in enumerate(rows):
        positives[line, lists[int(query_ids[row])]] = True
    return np.array(rows, dtype=np.int64), positives


# ---------------------------------------------------------------- CUB captions

CUB_LISTS = {
    "trainval": "trainvalclasses.txt",
    "test": "testclasses.txt",
    **{f"{part}{n}": f"{part}classes{n}.txt" for part in ("train", "val") for n in (1, 2, 3)},
}


def cub_classes(split: str, lists: str | Path | None = None) -> list[int]:
    """Classes (0 .. 199) of "trainval" (150), "test" (50), "train1".."train3" (100) or
    "val1".."val3" (50).

    lists: folder of the published lists, one `NNN.Class_name` a line; names may differ from the
    image folders', so that only the number counts. None: classes 1-150 and 151-200, with a warning.
    """
    if split not in CUB_LISTS:
        raise ValueError(f"split must be one of {', '.join(CUB_LISTS)}; got {split!r}")
    if lists is None:
        if split not in ("trainval", "test"):
            raise ValueError(f"split {split!r} needs the folder of the published class lists")
        warnings.warn(
            "without the published class lists, classes 1-150 are trained and 151-200 tested: "
            "the figures cannot be compared with published ones", stacklevel=2)
        return list(range(150)) if split == "trainval" else list(range(150, 200))
    return _once(Path(lists) / CUB_LISTS[split], "no such class list", _class_number)


def seen_test_images(lists: str | Path) -> set[str]:
    """Held-out images of the trained classes, as `<class folder>/<file>`: left out of training."""
    return set(_once(Path(lists) / "seen_test_images.txt", "no such list of images"))


def _class_number(name: str, source: str | Path) -> int:
    prefix = name.split(".")[0]
    if not (prefix.isascii() and prefix.isdecimal()) or not 1 <= int(prefix) <= 200:
        raise ValueError(f"{source}: {name!r} does not start with a class number 001..200")
    return int(prefix) - 1


def cub_captions(root: str | Path, classes: Sequence[int], *, omit: Iterable[str] = (),
                 only: Iterable[str] | None = None) -> CaptionSet:
    """Captions of CUB-200-2011 images, sorted by folder and file; classes are 0 .. 199.

    root holds CUB_200_2011/images/NNN.Class/*.jpg and cvpr2016_cub/text_c10/NNN.Class/*.txt (or
    just `images` and `text_c10`). omit, only: images as `<class folder>/<file>` to leave out, or to
    keep alone.
    """
    root, wanted = Path(root), set(classes)
    omit, only = set(omit), None if only is None else set(only)
    images = _first_existing([root / "CUB_200_2011" / "images", root / "images"], "CUB images")
    texts = _first_existing([root / "cvpr2016_cub" / "text_c10", root / "text_c10"], "CUB captions")
    rows, label_of = [], {}
    for folder in sorted(path for path in images.iterdir() if path.is_dir()):
        label = _class_number(folder.name, images)
        if label not in wanted:
            continue
        for image in sorted(folder.glob("*.jpg")):
            name = f"{folder.name}/{image.name}"
            if name in omit or (only is not None and name not in only):
                continue
            label_of[name] = label
            for caption in cub_caption_lines(texts / folder.name / f"{image.stem}.txt", image):
                rows.append((len(rows), name, image, caption))
    return _grouped(rows, label_of)


def cub_caption_lines(text: Path, image: str | Path) -> list[str]:
    """The captions of an image, one a line; blank ones are skipped with a warning, and bytes that
    are not UTF-8 replaced."""
    if not text.exists():
        raise FileNotFoundError(
            f"{text}: no captions for {image}; the captions belong to CUB-200-2011, whose files "
            "are named differently from those of the older CUB-200")
    content = text.read_text(encoding="utf-8-sig", errors="replace").rstrip()
    lines = [line.strip() for line in content.split("\n")]
    if not any(lines):
        raise ValueError(f"{text}: no caption for {image}")
    if not all(lines):
        warnings.warn(f"{text}: {lines.count('')} blank captions skipped", stacklevel=3)
    return [line for line in lines if line]


# ---------------------------------------------------------------- Flickr8k

FLICKR_LAYOUTS = (  # captions, lists of images, folder of images
    ("captions.txt", "{}_images.txt", "images"),
    ("Flickr8k.token.txt", "Flickr_8k.{}Images.txt", "Flicker8k_Dataset"),
    ("Flickr8k.token.txt", "Flickr_8k.{}Images.txt", "Flickr8k_Dataset"),
)


def flickr8k(root: str | Path, split: str) -> CaptionSet:
    """Flickr8k: "train" (6,000 images), "dev" or "test" (1,000 each), five captions an image.

    Layouts: Flickr8k.token.txt (`name.jpg#0 TAB caption`), Flickr_8k.{train,dev,test}Images.txt and
    Flicker8k_Dataset/; or captions.txt (`name.jpg TAB caption`), {train,dev,test}_images.txt and
    images/.
    """
    _check_split(split)
    root = Path(root)
    for text, listed, folder in FLICKR_LAYOUTS:
        if (root / text).exists() and (root / folder).exists():
            break
    else:
        known = "; ".join(f"{text} and {folder}/" for text, _, folder in FLICKR_LAYOUTS)
        raise FileNotFoundError(f"{root}: no Flickr8k here; expected one of: {known}")
    text, listed, folder = root / text, root / listed.format(split), root / folder
    captions: dict[str, list] = {name: [] for name in _once(listed, "no such list of images")}
    for number, (place, line) in enumerate(read_lines(text)):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise ValueError(f"{place}: no tab between image and caption")
        if (name := name.split("#")[0]) in captions:
            captions[name].append((number, name, folder / name, caption.strip()))
    if bare := [name for name, found in captions.items() if not found]:
        raise ValueError(f"{text}: no caption for {len(bare)} images of {listed.name}, "
                         f"first {bare[0]}")
    return _grouped(row for rows in captions.values() for row in rows)


# ---------------------------------------------------------------- batches


def random_erasing(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Zero a random rectangle (area 2 to 33 %, aspect 0.3 to 3.3) of some images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    images = images.clone()
    for image in images:
        if torch.rand((), generator=generator) >= probability:
            continue
        for area, aspect, y, x in torch.rand(10, 4, generator=generator).tolist():
            area = height * width * (0.02 + area * (1 / 3 - 0.02))
            aspect = 0.3 * (1 / 0.09) ** aspect
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
                image[:, top:top + h, left:left + w] = 0
                break
    return images


class PairBatches:
    """Training batches of a caption set, determined by (seed, epoch), as `reference.pcme.train`
    takes them: images (B, 3, H, W), tokens (C, T), lengths (C,), image ids (B,), ids of the
    captions' images (C,).

    pairs="captions": every caption once an epoch, with its image (published for COCO).
    pairs="images": every image once an epoch, with `captions_per_image` of its captions.
    pairs="classes": one random caption and its image of every class (published for CUB; batch_size
    is then the number of classes); an epoch has as many steps as captions / classes.

    transform: of the loader. word_drop, erasing: probabilities of the published augmentations of
    captions and images. mean_std: channel statistics. With several processes, each gets its part of
    the same batches, and a smaller last batch is left out.
    """

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, batch_size: int, *,
                 transform: Callable | None = None, pairs: str = "captions",
                 captions_per_image: int = 1, word_drop: float = 0.0, erasing: float = 0.0,
                 seed: int = 0, workers: int = 0, device: str | torch.device | None = None,
                 mean_std: tuple = (IMAGENET_MEAN, IMAGENET_STD), rank: int = 0,
                 world_size: int = 1):
        if pairs not in ("captions", "images", "classes"):
            raise ValueError(f"pairs must be 'captions', 'images' or 'classes', got {pairs!r}")
        if captions_per_image < 1 or (captions_per_image > 1 and pairs != "images"):
            raise ValueError("captions_per_image must be 1, or more with pairs='images'; "
                             f"got {captions_per_image}")
        if pairs == "classes":
            if data.classes is None:
                raise ValueError("pairs='classes' needs a caption set with classes")
            labels = data.classes[data.owner]
            self.members = [np.flatnonzero(labels == c) for c in np.unique(data.classes)]
            batch_size = len(self.members)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1, got {rank} of {world_size}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size {world_size}, "
                             f"got {batch_size}")
        if not (0 <= word_drop < 1 and 0 <= erasing <= 1):
            raise ValueError("word_drop must be in [0, 1) and erasing in [0, 1], "
                             f"got {word_drop} and {erasing}")
        self.data, self.batch_size, self.pairs, self.k = data, batch_size, pairs, captions_per_image
        self.word_drop, self.erasing, self.seed = word_drop, erasing, seed
        self.rank, self.world_size = rank, world_size
        self.words = [vocabulary.ids(caption) for caption in data.captions]
        self.epoch = self.start = 0
        self.loader = Loader(data, batch_size // world_size, transform=transform, seed=seed,
                             workers=workers, device=device, normalize=mean_std)

    def _order(self, epoch: int) -> Tensor:
        """Caption rows (steps * batch_size, k) of an epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        count = len(self.data.captions)
        if self.pairs == "captions":
            return torch.randperm(count, generator=generator)[:, None]
        if self.pairs == "images":
            order = torch.randperm(len(self.data), generator=generator)
            owner = torch.from_numpy(self.data.owner)
            first = torch.searchsorted(owner, order)
            counts = torch.bincount(owner)[order]
            draws = torch.rand(len(order), max(int(counts.max()), self.k), generator=generator)
            draws[torch.arange(draws.shape[1]) >= counts[:, None]] = 2.0
            return first[:, None] + draws.argsort(1)[:, :self.k] % counts[:, None]
        steps = count // self.batch_size
        columns = [torch.from_numpy(m)[torch.randint(len(m), (steps,), generator=generator)]
                   for m in self.members]
        return torch.stack(columns, 1).reshape(-1, 1)

    def __len__(self) -> int:
        """Steps of an epoch."""
        items = len(self.data if self.pairs == "images" else self.data.captions)
        if self.pairs == "classes":
            return items // self.batch_size
        return items // self.batch_size if self.world_size > 1 else -(-items // self.batch_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next pass is this epoch, from this step on."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(f"epoch {epoch}, step {start_batch}: an epoch has {len(self)} steps")
        self.epoch, self.start = epoch, start_batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch, first = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0
        owner, ids = torch.from_numpy(self.data.owner), torch.from_numpy(self.data.image_ids)
        share = self.batch_size // self.world_size
        parts = [batch[self.rank * share:(self.rank + 1) * share]
                 for batch in self._order(epoch).split(self.batch_size)[:len(self)]]
        self.loader.sampler = owner[torch.cat(parts)[:, 0]].tolist()
        self.loader.set_epoch(epoch, first)
        for step, (images, rows) in enumerate(self.loader, first):
            seed = (self.seed * 1_000_003 + epoch) * 1_000_003 + step * self.world_size + self.rank
            generator = torch.Generator().manual_seed(seed % 2**63)
            words = [self.words[caption] for caption in parts[step].flatten().tolist()]
            if self.word_drop:
                words = [drop_words(w, self.word_drop, generator) for w in words]
            if self.erasing:
                images = random_erasing(images, self.erasing, generator)
            numbers = ids.to(rows.device)[rows]
            yield images, *pad(words), numbers, numbers.repeat_interleave(self.k)
