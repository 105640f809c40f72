"""Readers of the annotation files of seven video data sets, as published.

    videos, classes = read_kinetics("kinetics400/train.csv")
    videos[0]   # Labelled("abseiling/0347ZoDXyP0_000095_000105", label=0, start=95.0, end=105.0)

Kinetics, Mini-Kinetics, Something-Something-V2, UCF-101 and HMDB-51 give a list of `Labelled` and
the class names; THUMOS'14 gives the actions of each video, AVA the people of each key frame. A line
that does not fit is a ValueError that names the file and the line.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.files import read_lines, read_text


class Labelled(NamedTuple):
    """One video of an annotation file. name: its path or name without the folder of the set; label:
    from 0, -1 if withheld; start, end: seconds in the source, or None."""

    name: str
    label: int
    start: float | None = None
    end: float | None = None


# ---------------------------------------------------------------- reading and checking

def _json(path: str | Path, kind: type) -> list | dict:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: must hold a JSON {kind.__name__}, not {content!r:.80}")
    return content


@contextlib.contextmanager
def _expecting(what: str, place: str | Path, found: object) -> Iterator[None]:
    """Whatever goes wrong inside is a ValueError that says where."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError):
        raise ValueError(f"{place}: expected {what}, found {found!r:.200}") from None


def _interval(start: str, end: str) -> tuple[float, float]:
    """Seconds from two fields; ValueError unless 0 <= start <= end."""
    start, end = float(start), float(end)
    if not 0 <= start <= end < math.inf:
        raise ValueError
    return start, end


# ---------------------------------------------------------------- labels of whole videos

def read_kinetics(path: str | Path,
                  classes: Sequence[str] | None = None) -> tuple[list[Labelled], list[str]]:
    """Kinetics: csv with label, youtube_id, time_start, time_end, split. Returns videos, named
    CLASS/ID_START_END as the downloaders do, and the classes (sorted, if not given)."""
    needed = ["youtube_id", "time_start", "time_end"]
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None
    if not rows or not set(needed) <= set(reader.fieldnames):
        raise ValueError(f"{path}: expected columns label, {', '.join(needed)} and rows, "
                         f"found {len(rows)} rows of {reader.fieldnames}")
    names = (sorted({row["label"] for _, row in rows if row.get("label")}) if classes is None
             else list(classes))
    number, out = {name: i for i, name in enumerate(names)}, []
    for line, row in rows:
        with _expecting("an id, times and a known label", f"{path}:{line}", row):
            label, video = row.get("label"), row["youtube_id"]
            start, end = _interval(row["time_start"], row["time_end"])
            if not video:
                raise ValueError
            name = f"{video}_{int(start):06d}_{int(end):06d}"
            out.append(Labelled(f"{label}/{name}", number[label], start, end) if label
                       else Labelled(name, -1, start, end))
    return out, names


def read_mini_kinetics(path: str | Path, kinetics: str | Path) -> tuple[list[Labelled], list[str]]:
    """Mini-Kinetics-200: a list of youtube ids (one a line), of videos in a Kinetics csv file. Its
    classes are those that occur, sorted."""
    chosen = {line.strip().split(",")[0] for _, line in read_lines(path)}
    videos, names = read_kinetics(kinetics)
    videos = [v for v in videos if v.name.split("/")[-1].rsplit("_", 2)[0] in chosen]
    if not videos:
        raise ValueError(f"{path}: none of its {len(chosen)} videos is in {kinetics}")
    used = sorted({v.label for v in videos})
    return [v._replace(label=used.index(v.label)) for v in videos], [names[label] for label in used]


def read_ssv2(path: str | Path, labels: str | Path) -> tuple[list[Labelled], list[str]]:
    """Something-Something-V2: ...-{train,validation,test}.json and ...-labels.json. The class is
    the template without its brackets; test items have none (-1). Videos are ID.webm."""
    number, out = {}, []
    for name, value in _json(labels, dict).items():
        with _expecting("the number of a template", labels, {name: value}):
            number[name] = int(value)
    if sorted(number.values()) != list(range(len(number))):
        raise ValueError(f"{labels}: must number its {len(number)} templates from 0 on, each once")
    for item in _json(path, list):
        with _expecting(f"an id and a template of {labels}", path, item):
            template = item.get("template")
            label = -1 if template is None else number[template.replace("[", "").replace("]", "")]
            out.append(Labelled(f"{item['id']}.webm", label))
    return out, sorted(number, key=number.get)


def read_ucf101(folder: str | Path, split: int = 1,
                train: bool = True) -> tuple[list[Labelled], list[str]]:
    """UCF-101: classInd.txt (`1 ApplyEyeMakeup`), trainlist0S.txt, testlist0S.txt (without
    labels)."""
    folder, names, out = Path(folder), [], []
    for place, line in read_lines(folder / "classInd.txt"):
        with _expecting(f"`{len(names) + 1} Class`", place, line):
            number, name = line.split()
            if int(number) != len(names) + 1 or name in names:
                raise ValueError
            names.append(name)
    for place, line in read_lines(folder / f"{'train' if train else 'test'}list{split:02d}.txt"):
        with _expecting("`Class/video.avi [number]` as in classInd.txt", place, line):
            name, *number = line.split()
            label = names.index(name.split("/")[0])
            if number not in ([], [str(label + 1)]):
                raise ValueError
            out.append(Labelled(name, label))
    return out, names


def read_hmdb51(folder: str | Path, split: int = 1,
                train: bool = True) -> tuple[list[Labelled], list[str]]:
    """HMDB-51: CLASS_test_splitS.txt with `video.avi 0|1|2` (0 unused, 1 train, 2 test). Classes
    are sorted (climb before climb_stairs, unlike their files)."""
    suffix, out = f"_test_split{split}.txt", []
    names = sorted(file.name.removesuffix(suffix) for file in Path(folder).glob(f"*{suffix}"))
    if not names:
        raise ValueError(f"{folder}: holds no *{suffix}")
    for label, class_name in enumerate(names):
        for place, line in read_lines(Path(folder) / (class_name + suffix)):
            name, _, part = line.strip().rpartition(" ")
            if not name.strip() or part not in ("0", "1", "2"):
                raise ValueError(f"{place}: expected `video 0|1|2`, found {line!r}")
            if part == ("1" if train else "2"):
                out.append(Labelled(f"{class_name}/{name.strip()}", label))
    return out, names


# ---------------------------------------------------------------- when and where

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
        for place, line in read_lines(file):
            with _expecting("`video start end`", place, line):
                video, start, end = line.split()
                videos.setdefault(video, []).append(Labelled(video, label, *_interval(start, end)))
    return videos, names


class Keyframe(NamedTuple):
    """The people of one annotated moment of AVA. boxes: (N, 4) x0, y0, x1, y1 in [0, 1]; actions:
    of each box, its labels (AVA's numbers, from 1 to 80)."""

    video: str
    seconds: float
    boxes: np.ndarray
    actions: list[list[int]]


def read_ava(path: str | Path, excluded: str | Path | None = None) -> list[Keyframe]:
    """AVA: csv rows video_id, timestamp, x1, y1, x2, y2, action_id, person_id, without a header;
    `excluded`: csv of video_id, timestamp that do not count. Rows of the same box are one
    person."""
    skipped, moments = set(), {}
    for place, line in read_lines(excluded) if excluded is not None else ():
        with _expecting("`video,seconds`", place, line):
            video, seconds = line.strip().split(",")
            skipped.add((video, _interval(seconds, seconds)[0]))
    for place, line in read_lines(path):
        with _expecting("`video,seconds,x1,y1,x2,y2,action,person`", place, line):
            video, seconds, *numbers = line.strip().split(",")
            box, action = tuple(float(v) for v in numbers[:4]), int(numbers[4])
            x0, y0, x1, y1 = box
            if not (video and 1 <= action <= 80 and 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
                raise ValueError
            moment = video, _interval(seconds, seconds)[0]
            if moment not in skipped:                 # dicts as sets that keep the order
                moments.setdefault(moment, {}).setdefault(box, {})[action] = None
    return [Keyframe(video, seconds, np.array(list(people)), list(map(list, people.values())))
            for (video, seconds), people in moments.items()]


def read_ava_classes(path: str | Path) -> dict[int, str]:
    """{number: name} of ava_action_list_v2.2.pbtxt (the 60 evaluated classes, or all 80)."""
    classes = {}
    for block in re.findall(r"\{([^{}]*)\}", read_text(path)):
        with _expecting('`name: "..." id: ...`', path, block):
            number, name = re.search(r"\b(?:label_)?id:\s*(\d+)", block), re.search(
                r'\bname:\s*"([^"]*)"', block)
            classes[int(number[1])] = name[1]
    if not classes:
        raise ValueError(f'{path}: holds no `{{name: "..." id: ...}}`')
    return classes
