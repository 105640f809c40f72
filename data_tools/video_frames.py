"""Videos as frames: extraction, index files, clip sampling and loading.

    python -m data_tools.video_frames extract videos/ frames/ --short-side 256 --workers 8
    python -m data_tools.video_frames index kinetics train.csv frames/ train.txt

    dataset = VideoFolder("frames/train.txt", clip_len=8, stride=8, train=True)
    loader = VideoLoader(dataset, 64, shuffle=True, workers=8, device="cuda")
    for clips, labels in loader: ...                  # (64, 3, 8, 224, 224) float32, (64,)

On disk: ROOT/CLASS/VIDEO/img_00001.jpg (from 1, five digits; mmaction2's rawframes), and an index
file with one `relative_path num_frames label` a line (labels from 0; the path may hold spaces). A
path may also name an animated GIF, WebP or APNG, or a .npy or .npz with uint8 (T, H, W, 3): these
need no ffmpeg. Frames stay uint8 until they are on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor

from data_tools.files import read_lines, write_whole
from data_tools.loader import BadImage, EncodedJpeg, Loader, decode, open_and
from data_tools.video_annotations import (read_hmdb51, read_kinetics, read_mini_kinetics, read_ssv2,
                                          read_ucf101)

FRAME = "img_{:05d}.jpg"
ANIMATED, ARRAYS = (".gif", ".webp", ".apng", ".png"), (".npy", ".npz")
VIDEOS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", *ANIMATED[:3], *ARRAYS)


# ---------------------------------------------------------------- extraction

def find_ffmpeg() -> str:
    """Path of the ffmpeg program; FileNotFoundError that tells how to get it."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise FileNotFoundError(
            "ffmpeg is not on the PATH. Install it (apt-get, conda or brew install ffmpeg) or give "
            "animated GIF, WebP or APNG files or .npz arrays, which need none")
    return program


def extract(src: str | Path, dst: str | Path, short_side: int | None = 340,
            fps: float | None = None, quality: int = 2) -> int:
    """Write the frames of a video as dst/img_00001.jpg, ...; returns their number.

    short_side: pixels of the shorter side (None: as it is); fps: frames per second (None: every
    frame); quality: 2 (best) to 31, as ffmpeg counts. A folder `dst` that holds frames is complete
    and left alone: they are written beside it and the folder renamed at the end. ValueError, with
    the reason, for a file without readable frames and for a `dst` that holds something else.
    """
    src, dst = Path(src), Path(dst)
    _check_options(short_side, fps, quality)
    if dst.is_dir() and (count := count_frames(dst)):
        return count
    if dst.is_file() or dst.is_dir() and any(dst.iterdir()):
        raise ValueError(f"{dst}: exists and holds no frames")
    if not src.is_file():
        raise FileNotFoundError(f"{src}: no such file")
    temporary = dst.with_name(f".{dst.name}.tmp")     # of an extraction that was killed, too
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        plain = src.suffix.lower() in ANIMATED + ARRAYS
        write = _write_with_pillow if plain else _write_with_ffmpeg
        message = write(src, temporary, short_side, fps, quality)
        count = count_frames(temporary)
        if not count:
            raise ValueError(f"{src}: no frames{': ' + message if message else ''}")
        temporary.rename(dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def _check_options(short_side: int | None = None, fps: float | None = None,
                   quality: int = 2) -> None:
    if short_side is not None and short_side < 1 or fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"short_side and fps must be positive, not {short_side} and {fps}")
    if not 2 <= quality <= 31:
        raise ValueError(f"quality must be in 2..31, not {quality}")


def _write_with_ffmpeg(src: Path, folder: Path, short_side: int | None, fps: float | None,
                       quality: int) -> str:
    """Returns what ffmpeg had to say; ValueError if it failed."""
    filters = [f"fps={fps:g}"] if fps is not None else []
    if short_side is not None:
        filters.append(f"scale='if(lt(iw,ih),{short_side},-2)':'if(lt(iw,ih),-2,{short_side})'")
    options = ["-vf", ",".join(filters)] if filters else []
    # without a rate, frames must pass as they are; by default some are repeated for a constant rate
    for passing in ([],) if fps is not None else (["-fps_mode", "passthrough"], ["-vsync", "0"]):
        done = subprocess.run(
            [find_ffmpeg(), "-nostdin", "-hide_banner", "-loglevel", "error", "-i", str(src),
             *options, *passing, "-q:v", str(quality), "-start_number", "1",
             str(folder).replace("%", "%%") + "/img_%05d.jpg"], capture_output=True, text=True)
        if "fps_mode" not in done.stderr:             # the other name is for ffmpeg before 5.1
            break
    message = " / ".join(done.stderr.strip().splitlines()[-2:])
    if done.returncode:
        raise ValueError(f"{src}: {message or f'ffmpeg ended with code {done.returncode}'}")
    return message


def _write_with_pillow(src: Path, folder: Path, short_side: int | None, fps: float | None,
                       quality: int) -> str:
    number, clock = 0, 0.0
    for frame, seconds in _timed_frames(src):
        if fps is not None and not seconds:
            raise ValueError(f"{src}: holds no times of its frames, which fps={fps:g} needs")
        clock += seconds
        due = number + 1 if fps is None else math.floor(clock * fps + 0.5)
        if due > number and short_side is not None:
            factor = short_side / min(frame.size)
            size = [max(1, round(side * factor)) for side in frame.size]
            frame = frame.resize(size, Image.BILINEAR)
        while number < due:
            number += 1
            frame.save(folder / FRAME.format(number), quality=max(5, 101 - 3 * quality))
    return ""


def _timed_frames(src: Path) -> Iterator[tuple[Image.Image, float]]:
    """RGB frames and their seconds (0 if unknown); ValueError for a file that cannot be read."""
    if src.suffix.lower() in ARRAYS:
        video = open_video(src)
        for index in range(video.count):
            yield video.read([index])[0], 0.0
        return
    with _reading(src), Image.open(src) as image:
        for frame in ImageSequence.Iterator(image):
            yield frame.convert("RGB"), frame.info.get("duration", 0) / 1000


def extract_all(jobs: Iterable[tuple[str | Path, str | Path]], workers: int = os.cpu_count() or 1,
                progress: Callable | None = None, **options) -> dict[str, str]:
    """`extract` every (src, dst), in `workers` threads; returns {src: reason} of what failed.

    Call it again to go on after an interruption: finished folders are skipped. progress(done) is
    called after each video. ValueError for two videos with one dst.
    """
    _check_options(**options)                         # or every video would fail
    if workers < 1:
        raise ValueError(f"workers must be positive, not {workers}")
    jobs, source = list(jobs), {}
    for src, dst in jobs:
        if (other := source.setdefault(Path(dst), src)) != src:
            raise ValueError(f"{other} and {src} would both be extracted to {dst}")

    def one(job: tuple) -> tuple[str, str | None]:
        try:
            extract(*job, **options)
            return str(job[0]), None
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and Path(job[0]).is_file():
                raise                                 # ffmpeg is missing: no video will do
            return str(job[0]), str(error)
    failed, pool = {}, ThreadPoolExecutor(workers)
    try:
        for done, (name, reason) in enumerate(pool.map(one, jobs), 1):
            if reason is not None:
                failed[name] = reason
            if progress is not None:
                progress(done)
    finally:
        # Ctrl-C: what is running ends, nothing else starts
        pool.shutdown(cancel_futures=True)
    return failed


def count_frames(folder: str | Path) -> int:
    """Number of frames img_00001.jpg ... in a folder; ValueError if one is missing in between."""
    numbers = [int(m[1]) for m in (re.fullmatch(r"img_(\d{5,})\.jpg", name)
                                   for name in os.listdir(folder)) if m]
    if numbers and (min(numbers) != 1 or max(numbers) != len(numbers)):
        raise ValueError(f"{folder}: {len(numbers)} frames, numbered {min(numbers)} to "
                         f"{max(numbers)}")
    return len(numbers)


# ---------------------------------------------------------------- reading frames

@contextlib.contextmanager
def _reading(name: str | Path) -> Iterator[None]:
    """What damaged files make Pillow and NumPy raise (nearly anything) becomes a BadImage."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = error if isinstance(error, BadImage) else f"{type(error).__name__}: {error}"
        raise BadImage(f"{name}: {reason}") from error


class FrameFolder:
    """A folder of JPEG frames; reads just those asked for, at 1/2, 1/4 or 1/8 if that is enough."""

    def __init__(self, path: Path, count: int):
        self.path, self.count, self.size = path, count, None

    def read(self, indices: Sequence[int] | None,
             at_least: Callable | None = None) -> list[Image.Image]:
        """RGB images of the frames (from 0; None: all); at_least(width, height): a size that is
        enough, or None."""
        out = []
        for index in range(self.count) if indices is None else indices:
            name = self.path / FRAME.format(index + 1)
            with _reading(f"{self.path.name}/{name.name}"):
                out.append(self._frame(name, at_least))
        return out

    def _frame(self, name: Path, at_least: Callable | None) -> Image.Image:
        if self.size is not None:         # as the first frame: no headers to parse
            with contextlib.suppress(BadImage):
                enough = at_least(*self.size) if at_least else None
                return EncodedJpeg(name.read_bytes(), self.size).decode(enough)
        with Image.open(name) as image:
            if image.mode == "RGB" and "exif" not in image.info:
                self.size = image.size
            return decode(image, at_least(*image.size) if at_least else None)


class AnimatedFile:
    """An animated GIF, WebP or APNG; the format decodes all frames up to the last one asked for."""

    def __init__(self, path: Path):
        self.path = path
        with _reading(path), Image.open(path) as image:
            self.count = getattr(image, "n_frames", 1)

    def read(self, indices: Sequence[int] | None,
             at_least: Callable | None = None) -> list[Image.Image]:
        indices, frames = range(self.count) if indices is None else indices, {}
        with _reading(self.path.name), Image.open(self.path) as image:
            for index in sorted(set(indices)):
                image.seek(index)
                frames[index] = image.convert("RGB")
        return [frames[index] for index in indices]


class ArrayFile:
    """A .npy (memory-mapped) or .npz file with one uint8 array (T, H, W, 3)."""

    def __init__(self, path: Path):
        with _reading(path):
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(frames, np.ndarray):
                frames = frames["video" if "video" in frames.files else frames.files[0]]
            if frames.dtype != np.uint8 or frames.shape[3:] != (3,) or not frames.size:
                raise BadImage(f"must hold uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
        self.frames, self.count = frames, len(frames)

    def read(self, indices: Sequence[int] | None,
             at_least: Callable | None = None) -> list[Image.Image]:
        indices = range(self.count) if indices is None else indices
        return [Image.fromarray(np.ascontiguousarray(self.frames[index])) for index in indices]


def open_video(path: str | Path,
               count: int | None = None) -> FrameFolder | AnimatedFile | ArrayFile:
    """A folder of frames (`count` of them, counted if None), an animated image or an array file."""
    path = Path(path)
    if path.suffix.lower() in ANIMATED:
        return AnimatedFile(path)
    if path.suffix.lower() in ARRAYS:
        return ArrayFile(path)
    return FrameFolder(path, count_frames(path) if count is None else count)


# ---------------------------------------------------------------- index files

_INDEX_LINE = re.compile(r"(\S.*) ([1-9]\d*) (\d+)")


def write_index(path: str | Path, rows: Iterable[tuple[str, int, int]]) -> None:
    """Lines `relative_path num_frames label`, atomically; ValueError for what none can hold."""
    lines = [f"{name} {count} {label}" for name, count, label in rows]
    for line in lines:
        if not _INDEX_LINE.fullmatch(line) or len(line.splitlines()) > 1:
            raise ValueError(f"{path}: cannot hold the path, frames (from 1) and label of {line!r}")
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def read_index(path: str | Path) -> list[tuple[str, int, int]]:
    """(relative path, frames, label) of every line; ValueError names the file and the line."""
    rows = []
    for place, line in read_lines(path):
        match = _INDEX_LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{place}: expected `path frames label`, found {line!r}")
        rows.append((match[1], int(match[2]), int(match[3])))
    if not rows:
        raise ValueError(f"{path}: holds no video")
    return rows


def make_index(root: str | Path,
               labels: Iterable[tuple[str, int]]) -> tuple[list[tuple], list[str]]:
    """Rows for `write_index` of the (relative path, label) whose frames are there, and the paths of
    the others.

    A path is looked for as it is, then without its suffix: `v_Yo_g01_c01.avi` finds the folder
    `v_Yo_g01_c01`.
    """
    def readable(path: Path) -> bool:
        return path.is_dir() or path.suffix.lower() in ANIMATED + ARRAYS and path.is_file()
    root, rows, missing = Path(root), [], []
    for name, label in labels:
        found = next((p for p in (Path(name), Path(name).with_suffix("")) if readable(root / p)),
                     None)
        count = open_video(root / found).count if found is not None else 0
        if count:
            rows.append((found.as_posix(), count, label))
        else:
            missing.append(name)
    return rows, missing


# ---------------------------------------------------------------- choosing frames

def dense_starts(frames: int, span: int, num_clips: int) -> list[int]:
    """First frames of `num_clips` clips of `span` frames, evenly from 0 to the last that fits, both
    included; the middle for one."""
    last = max(0, frames - span)
    return [last // 2] if num_clips == 1 else np.linspace(0, last, num_clips).astype(int).tolist()


def dense_indices(frames: int, clip_len: int, stride: int, start: int) -> list[int]:
    """`clip_len` frames, `stride` apart; a video that is too short starts again."""
    return [(start + i * stride) % frames for i in range(clip_len)]


def segment_indices(frames: int, segments: int, generator: torch.Generator | None = None,
                    at: float = 0.5) -> list[int]:
    """A frame of each of `segments` equal parts: random with a generator, else at fraction `at`."""
    if generator is None:
        place = torch.full((segments,), at, dtype=torch.float64)
    else:
        place = torch.rand(segments, generator=generator, dtype=torch.float64)
    chosen = ((torch.arange(segments) + place) * frames / segments).long()
    return chosen.clamp(max=frames - 1).tolist()


class ClipTransform:
    """Frames to uint8 (T, size, size, 3): one crop and one flip for all frames of a clip.

    train: the short side is scaled to a random length in `jitter`, a random square of `size` cut
    out, and mirrored with probability `flip` (0 where left and right matter: Something-Something).
    Else the short side becomes `size`, with `crops` squares: 1 in the middle, 3 from one end to the
    other. augment(clip array, generator): more, on the clip (RandAugment). Frames are decoded at a
    reduced size where that is enough, and cut and scaled in one step.
    """

    def __init__(self, size: int = 224, train: bool = False, jitter: tuple[int, int] = (256, 320),
                 flip: float = 0.5, crops: int = 1, augment: Callable | None = None):
        if size < 1 or not size <= jitter[0] <= jitter[1] and train:
            raise ValueError(f"size must be positive and not above jitter, not {size} and {jitter}")
        if crops not in (1, 3) or not 0 <= flip <= 1:
            raise ValueError(f"crops must be 1 or 3 and flip in [0, 1], not {crops} and {flip}")
        self.size, self.train, self.jitter, self.flip = size, train, jitter, flip
        self.crops, self.augment = 1 if train else crops, augment

    def __call__(self, read: Callable,
                 generator: torch.Generator | None = None) -> list[np.ndarray]:
        """`crops` clips of the frames that read(at_least) returns."""
        size, low, high = self.size, *self.jitter
        short, mirrored = size, False
        places = [(0.5, 0.5)] if self.crops == 1 else [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]
        if self.train:
            scale, *place, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            short, mirrored = low + int(scale * (high - low + 1)), coin < self.flip
            places = [place]

        def enough(width: int, height: int) -> tuple[int, int]:
            factor = short / min(width, height)
            return max(1, int(width * factor)), max(1, int(height * factor))
        frames, clips = read(enough), []
        width, height = frames[0].size
        if any(frame.size != (width, height) for frame in frames):
            raise BadImage("the frames are not of one size")
        side = max(1, round(min(height, width) * size / short))
        for across, down in places:
            top, left = round(down * (height - side)), round(across * (width - side))
            box = (left, top, left + side, top + side)
            out = torch.from_numpy(np.stack([np.asarray(frame.crop(box)) for frame in frames]))
            out = out.permute(0, 3, 1, 2)
            if side != size:                          # on uint8: several times faster than Pillow
                out = F.interpolate(out, (size, size), mode="bilinear", antialias=True)
            out = (out.flip(3) if mirrored else out).permute(0, 2, 3, 1).numpy()
            out = self.augment(out, generator) if self.augment is not None else out
            clips.append(np.ascontiguousarray(out))
        return clips


class VideoFolder:
    """The videos of an index file as clips, for `VideoLoader`.

    mode "dense": clip_len frames, stride apart, from a random place (train) or from `num_clips`
    places; "segments": one frame from each of clip_len equal parts of the video, random in it
    (train) or in its middle (num_clips > 1: at that many places of it). transform: a ClipTransform
    (None: the default for `train`). root: folder of the relative paths (None: the index file's).
    Only the frames of the clip are read. dataset[i] is (clip, label), random choices by torch's own
    generator.
    """

    def __init__(self, index: str | Path, clip_len: int = 8, stride: int = 8, mode: str = "dense",
                 train: bool = False, transform: ClipTransform | None = None, num_clips: int = 1,
                 root: str | Path | None = None):
        if mode not in ("dense", "segments"):
            raise ValueError(f"mode must be dense or segments, not {mode!r}")
        if min(clip_len, stride, num_clips) < 1 or train and num_clips > 1:
            raise ValueError("clip_len, stride and num_clips must be positive, and num_clips 1 for "
                             f"training, not {clip_len}, {stride} and {num_clips}")
        self.rows = read_index(index)
        self.root = Path(root) if root is not None else Path(index).parent
        self.labels = np.array([label for _, _, label in self.rows])
        self.clip_len, self.stride, self.mode, self.train = clip_len, stride, mode, train
        self.num_clips, self.transform = num_clips, transform or ClipTransform(train=train)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index][0]

    def open(self, index: int) -> FrameFolder | AnimatedFile | ArrayFile:
        name, count, _ = self.rows[index]
        return open_video(self.root / name, count)

    def indices(self, frames: int, generator: torch.Generator | None = None) -> list[list[int]]:
        """The frames of each clip of a video with that many frames."""
        if generator is None and self.train:
            generator = torch.default_generator
        if self.mode == "segments":
            places = [(i + 0.5) / self.num_clips for i in range(self.num_clips)]
            return [segment_indices(frames, self.clip_len, generator if self.train else None, at)
                    for at in places]
        span = (self.clip_len - 1) * self.stride + 1
        if self.train:
            starts = [int(torch.randint(max(1, frames - span + 1), (), generator=generator))]
        else:
            starts = dense_starts(frames, span, self.num_clips)
        return [dense_indices(frames, self.clip_len, self.stride, start) for start in starts]

    def clip(self, video: FrameFolder | AnimatedFile | ArrayFile,
             generator: torch.Generator | None = None) -> Tensor:
        """uint8 (T, H, W, 3), or (views, T, H, W, 3) for several clips or crops."""
        views = [view for chosen in self.indices(video.count, generator)
                 for view in self.transform(lambda size: video.read(chosen, size), generator)]
        views = torch.from_numpy(np.stack(views))
        return views[0] if len(views) == 1 else views

    clip.takes_encoded = True             # for Loader: hand over the video, not its pixels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return open_and(self, index, self.clip), int(self.labels[index])


def to_clips(frames: Tensor, mean: float | Sequence[float] = 0.45,
             std: float | Sequence[float] = 0.225) -> Tensor:
    """uint8 (..., T, H, W, 3) to float32 (..., 3, T, H, W), (v / 255 - mean) / std; in memory the
    channels stay last (torch.channels_last_3d), which saves a pass."""
    if frames.dtype != torch.uint8 or frames.shape[-1] != 3:
        raise TypeError(f"frames must be uint8 (..., T, H, W, 3), "
                        f"not {frames.dtype} {tuple(frames.shape)}")
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=frames.device) for v in (mean, std))
    if frames.device.type == "cpu":       # numpy asks for huge pages, torch does not: twice as fast
        clips = torch.from_numpy(np.empty(frames.shape, np.float32)).copy_(frames)
    else:
        clips = frames.float()
    return clips.sub_(255 * mean).mul_(1 / (255 * std)).movedim(-1, -4)


class VideoLoader(Loader):
    """`data_tools.loader.Loader` for a VideoFolder: batches (B, 3, T, H, W) float32, or
    (B, views, 3, T, H, W), and labels (B,). Options as of Loader."""

    def __init__(self, dataset: VideoFolder, batch_size: int, *,
                 mean: float | Sequence[float] = 0.45,
                 std: float | Sequence[float] = 0.225, **options):
        super().__init__(dataset, batch_size, transform=dataset.clip, **options)
        self.mean, self.std = mean, std

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((to_clips(frames, self.mean, self.std), labels)
                for frames, labels, *_ in super().__iter__())


# ---------------------------------------------------------------- command line

READERS = {"kinetics": read_kinetics, "mini-kinetics": read_mini_kinetics, "ssv2": read_ssv2,
           "ucf101": read_ucf101, "hmdb51": read_hmdb51}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    extraction = commands.add_parser("extract",
                                     help="videos of a folder, at any depth, to folders of frames")
    extraction.add_argument("videos", type=Path)
    extraction.add_argument("frames", type=Path)
    extraction.add_argument("--short-side", type=int, default=340, help="pixels; 0: as it is")
    extraction.add_argument("--fps", type=float, help="frames per second (default: every frame)")
    extraction.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    indexing = commands.add_parser("index",
                                   help="the index file of a set whose frames are extracted")
    indexing.add_argument("set", choices=READERS)
    indexing.add_argument("annotations", type=Path, help="csv, json, list, or folder of lists")
    indexing.add_argument("frames", type=Path)
    indexing.add_argument("out", type=Path)
    indexing.add_argument("--with", dest="second", type=Path,
                          help="Kinetics csv of mini-kinetics; labels of ssv2")
    indexing.add_argument("--split", type=int, default=1, help="of ucf101 and hmdb51")
    indexing.add_argument("--test", action="store_true", help="the test list of ucf101 and hmdb51")
    args = parser.parse_args(argv)
    try:
        (_extract_command if args.command == "extract" else _index_command)(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _extract_command(args: argparse.Namespace) -> None:
    sources = sorted(p for p in args.videos.rglob("*") if p.suffix.lower() in VIDEOS)
    if not sources:
        raise ValueError(f"{args.videos}: holds no videos ({', '.join(VIDEOS)})")
    jobs = [(src, args.frames / src.relative_to(args.videos).with_suffix("")) for src in sources]
    began = time.monotonic()

    def show(done: int) -> None:
        rate = done / max(time.monotonic() - began, 1e-9)
        print(f"\r{done}/{len(jobs)}  {rate:.1f}/s  {(len(jobs) - done) / rate:.0f} s left ",
              end="", file=sys.stderr, flush=True)
    failed = extract_all(jobs, args.workers, show, short_side=args.short_side or None, fps=args.fps)
    print(f"\n{len(jobs) - len(failed)} of {len(jobs)} videos are in {args.frames}")
    for reason in failed.values():
        print(f"failed: {reason}")
    if failed:
        sys.exit(1)


def _index_command(args: argparse.Namespace) -> None:
    if (args.set in ("ssv2", "mini-kinetics")) != (args.second is not None):
        raise ValueError(f"{args.set} {'takes no' if args.second else 'needs'} --with FILE")
    if (args.test or args.split != 1) and args.set not in ("ucf101", "hmdb51"):
        raise ValueError(f"{args.set} takes no --split or --test: each part is a file of its own")
    extra = {"kinetics": (), "ucf101": (args.split, not args.test),
             "hmdb51": (args.split, not args.test)}
    videos, classes = READERS[args.set](args.annotations, *extra.get(args.set, (args.second,)))
    rows, missing = make_index(args.frames, [(v.name, v.label) for v in videos if v.label >= 0])
    if not rows:
        raise ValueError(f"{args.frames}: holds frames of none of the {len(missing)} labelled "
                         f"videos of {args.annotations}")
    write_index(args.out, rows)
    print(f"{args.out}: {len(rows)} videos of {len(classes)} classes; {len(missing)} have no frames"
          + (f", the first {missing[0]}" if missing else ""))


if __name__ == "__main__":
    main()
