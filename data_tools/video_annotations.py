"""Readers of the annotation files of seven video data sets, as published.

    videos, classes = read_kinetics("kinetics400/train.csv")
    videos[0]   # Labelled("abseiling/0347ZoDXyP0_000095_000105", label=0, start=95.0, end=105.0)

Kinetics, Mini-Kinetics, Something-Something-V2, UCF-101 and HMDB-51 give a list of `Labelled` and
the class names; THUMOS'14 gives the actions of each video, AVA the people of each key frame. A line
that does not fit is a ValueError that names the file and the line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Labelled(NamedTuple):
    """One video of an annotation file. name: its path or name without the folder of the set; label:
    from 0, -1 if withheld; start, end: seconds in the source, or None."""

    name: str
    label: int
    start: float | None = None
    end: float | None = None


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(place, stripped line) of the lines that are not empty; the place is for error messages."""
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def read_kinetics(path: str | Path,
                  classes: Sequence[str] | None = None) -> tuple[list[Labelled], list[str]]:
    """Kinetics: csv with label, youtube_id, time_start, time_end, split. Returns videos, named
    CLASS/ID_START_END as the downloaders do, and the classes (sorted, if not given)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    needed = {"youtube_id", "time_start", "time_end"}
    if not rows or not needed <= set(rows[0]):
        raise ValueError(f"{path}: expected columns label, {', '.join(sorted(needed))}; "
                         f"found {', '.join(rows[0]) if rows else 'no rows'}")
    names = (sorted({row["label"] for row in rows if row.get("label")}) if classes is None
             else list(classes))
    number, out = {name: i for i, name in enumerate(names)}, []
    for line, row in enumerate(rows, 2):
        label = row.get("label") or None
        try:
            start, end = float(row["time_start"]), float(row["time_end"])
            key = -1 if label is None else number[label]
        except (TypeError, ValueError, KeyError):
            raise ValueError(f"{path}, line {line}: unknown class or time in "
                             f"{list(row.values())}") from None
        name = f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}"
        out.append(Labelled(f"{label}/{name}" if label else name, key, start, end))
    return out, names


def read_mini_kinetics(path: str | Path, kinetics: str | Path) -> tuple[list[Labelled], list[str]]:
    """Mini-Kinetics-200: a list of youtube ids (one a line), of videos in a Kinetics csv file. Its
    classes are those that occur, sorted."""
    chosen = {line.split(",")[0] for _, line in _lines(path)}
    videos, names = read_kinetics(kinetics)
    videos = [v for v in videos if v.name.split("/")[-1].rsplit("_", 2)[0] in chosen]
    if not videos:
        raise ValueError(f"{path}: none of its {len(chosen)} videos is in {kinetics}")
    used = sorted({v.label for v in videos})
    return [v._replace(label=used.index(v.label)) for v in videos], [names[label] for label in used]


def read_ssv2(path: str | Path, labels: str | Path) -> tuple[list[Labelled], list[str]]:
    """Something-Something-V2: ...-{train,validation,test}.json and ...-labels.json. The class is
    the template without its brackets; test items have none (-1). Videos are ID.webm."""
    numbers = json.loads(Path(labels).read_text("utf-8"))
    number = {name: int(value) for name, value in numbers.items()}
    out = []
    for item in json.loads(Path(path).read_text("utf-8")):
        template = item.get("template")
        name = template.replace("[", "").replace("]", "") if template is not None else None
        if name is not None and name not in number:
            raise ValueError(f"{path}: video {item.get('id')} has the unknown template "
                             f"{template!r}")
        out.append(Labelled(f"{item['id']}.webm", -1 if name is None else number[name]))
    return out, sorted(number, key=number.get)


def read_ucf101(folder: str | Path, split: int = 1,
                train: bool = True) -> tuple[list[Labelled], list[str]]:
    """UCF-101: classInd.txt (`1 ApplyEyeMakeup`), trainlist0S.txt, testlist0S.txt (without
    labels)."""
    folder = Path(folder)
    names = [line.split()[1] for _, line in _lines(folder / "classInd.txt")]
    out = []
    for place, line in _lines(folder / f"{'train' if train else 'test'}list{split:02d}.txt"):
        name, *number = line.split()
        label = names.index(name.split("/")[0]) if name.split("/")[0] in names else -1
        if label < 0 or number and int(number[0]) != label + 1:
            raise ValueError(f"{place}: the class of {line!r} is not that of classInd.txt")
        out.append(Labelled(name, label))
    return out, names


def read_hmdb51(folder: str | Path, split: int = 1,
                train: bool = True) -> tuple[list[Labelled], list[str]]:
    """HMDB-51: CLASS_test_splitS.txt with `video.avi 0|1|2` (0 unused, 1 train, 2 test)."""
    suffix, out = f"_test_split{split}.txt", []
    files = sorted(Path(folder).glob(f"*{suffix}"))
    if not files:
        raise ValueError(f"{folder}: holds no *{suffix}")
    names = [file.name.removesuffix(suffix) for file in files]
    for label, file in enumerate(files):
        for place, line in _lines(file):
            name, _, part = line.rpartition(" ")
            if part not in ("0", "1", "2"):
                raise ValueError(f"{place}: expected `video 0|1|2`, found {line!r}")
            if part == ("1" if train else "2"):
                out.append(Labelled(f"{names[label]}/{name.strip()}", label))
    return out, names


def read_thumos14(folder: str | Path,
                  split: str = "val") -> tuple[dict[str, list[Labelled]], list[str]]:
    """THUMOS'14 temporal annotations: CLASS_val.txt or CLASS_test.txt with `video start end` in
    seconds. Returns {video: its actions} and the classes; Ambiguous_*.txt is left out."""
    files = sorted(path for path in Path(folder).glob(f"*_{split}.txt")
                   if not path.name.startswith("Ambiguous"))
    if not files:
        raise ValueError(f"{folder}: holds no *_{split}.txt")
    names, videos = [file.name.removesuffix(f"_{split}.txt") for file in files], {}
    for label, file in enumerate(files):
        for place, line in _lines(file):
            try:
                video, start, end = line.split()
                action = Labelled(video, label, float(start), float(end))
            except ValueError:
                raise ValueError(f"{place}: expected `video start end`, found {line!r}") from None
            videos.setdefault(video, []).append(action)
    return videos, names


class Keyframe(NamedTuple):
    """The people of one annotated moment of AVA. boxes: (N, 4) x0, y0, x1, y1 in [0, 1]; actions:
    of each box, its labels (AVA's numbers, from 1)."""

    video: str
    seconds: float
    boxes: np.ndarray
    actions: list[list[int]]


def read_ava(path: str | Path, excluded: str | Path | None = None) -> list[Keyframe]:
    """AVA: csv rows video_id, timestamp, x1, y1, x2, y2, action_id, person_id, without a header;
    `excluded`: csv of video_id, timestamp that do not count. Rows of the same box are one
    person."""
    skipped = set()
    if excluded is not None:
        skipped = {(v, float(t)) for v, t in (line.split(",")[:2] for _, line in _lines(excluded))}
    moments: dict[tuple, dict[tuple, list[int]]] = {}
    for place, line in _lines(path):
        try:
            video, seconds, *numbers = line.split(",")
            box, action = tuple(float(v) for v in numbers[:4]), int(numbers[4])
            if not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(f"{place}: expected `video,seconds,x1,y1,x2,y2,action,person`, "
                             f"found {line!r}") from None
        if (video, float(seconds)) not in skipped:
            moments.setdefault((video, float(seconds)), {}).setdefault(box, []).append(action)
    return [Keyframe(video, seconds, np.array(list(people)), list(people.values()))
            for (video, seconds), people in moments.items()]


def read_ava_classes(path: str | Path) -> dict[int, str]:
    """{number: name} of ava_action_list_v2.2.pbtxt (the 60 evaluated classes, or all 80)."""
    text = Path(path).read_text("utf-8")
    found = re.findall(r'name:\s*"([^"]*)"\s*(?:label_id|id):\s*(\d+)', text)
    if not found:
        raise ValueError(f'{path}: holds no `name: "..." id: ...`')
    return {int(number): name for name, number in found}
