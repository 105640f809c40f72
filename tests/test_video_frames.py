"""Frames of real short clips (an animated WebP always, MP4 where ffmpeg is there), and sampling."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import video_frames as vf
from data_tools.loader import BadImage

ROOT = Path(__file__).resolve().parent.parent


def gradient(frames=7, height=24, width=36):
    """uint8 (T, H, W, 3) whose frame t has the mean level 20 + 20 t."""
    ramp = np.linspace(-15, 15, width)[None, :, None] + np.zeros((height, 1, 3))
    return np.stack([(20 + 20 * t + ramp) for t in range(frames)]).round().astype(np.uint8)


def levels(images):
    """The frame numbers that the mean levels tell."""
    return [round((np.asarray(image).mean() - 20) / 20) for image in images]


def write_animated(path, frames, milliseconds=100):
    images = [Image.fromarray(frame) for frame in frames]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0,
                   **options)
    return path


def write_folder(path, frames):
    path.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(path / f"img_{number:05d}.jpg", quality=95)
    return path


# ---------------------------------------------------------------- extraction

@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png", ".npz", ".npy"])
def test_frames_are_extracted_without_ffmpeg(tmp_path, suffix, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    clip, source = gradient(), tmp_path / f"clip{suffix}"
    if suffix == ".npz":
        np.savez_compressed(source, video=clip)
    elif suffix == ".npy":
        np.save(source, clip)
    else:
        write_animated(source, clip)
    assert vf.extract(source, tmp_path / "frames", short_side=12) == 7
    names = sorted(os.listdir(tmp_path / "frames"))
    assert names == [f"img_{i:05d}.jpg" for i in range(1, 8)]
    video = vf.open_video(tmp_path / "frames")
    assert (video.count == 7 and video.read([0])[0].size == (18, 12)
            and levels(video.read(None)) == list(range(7)))
    assert levels(vf.open_video(source).read([5, 2, 2])) == [5, 2, 2]
    assert [p for p in os.listdir(tmp_path) if p.endswith(".tmp")] == []


def test_a_rate_repeats_and_drops_frames(tmp_path):
    source = write_animated(tmp_path / "clip.webp", gradient(6), milliseconds=100)
    assert (vf.extract(source, tmp_path / "slow", None, fps=5) == 3
            and vf.extract(source, tmp_path / "fast", None, fps=20) == 12)
    assert levels(vf.open_video(tmp_path / "fast").read(None)) == [t // 2 for t in range(12)]
    np.save(tmp_path / "clip.npy", gradient())
    with pytest.raises(ValueError, match="no times"):
        vf.extract(tmp_path / "clip.npy", tmp_path / "x", fps=5)


def fake_ffmpeg(folder, script):
    folder.mkdir(exist_ok=True)
    program = folder / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport sys, pathlib\nargv = sys.argv[1:]\n{script}")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return folder


def test_what_ffmpeg_is_asked_and_what_it_answers(tmp_path, monkeypatch):
    (tmp_path / "a b.mp4").write_bytes(b"x")
    jpeg = tmp_path / "one.jpg"
    Image.new("RGB", (8, 8)).save(jpeg)
    copy = f"""
pathlib.Path({str(tmp_path / "argv")!r}).write_text(repr(argv))
if "-fps_mode" in argv:
    print("Unrecognized option 'fps_mode'.", file=sys.stderr)
    sys.exit(1)
for i in (1, 2):
    target = pathlib.Path(argv[-1].replace("%05d", f"{{i:05d}}"))
    target.write_bytes(pathlib.Path({str(jpeg)!r}).read_bytes())
"""
    monkeypatch.setenv("PATH", str(fake_ffmpeg(tmp_path / "bin", copy)))
    assert vf.extract(tmp_path / "a b.mp4", tmp_path / "out", short_side=256) == 2
    argv = eval((tmp_path / "argv").read_text())
    assert (argv[:5] == ["-nostdin", "-hide_banner", "-loglevel", "error", "-i"]
            and argv[5].endswith("a b.mp4") and "-vsync" in argv)
    assert argv[argv.index("-vf") + 1] == "scale='if(lt(iw,ih),256,-2)':'if(lt(iw,ih),-2,256)'"
    assert argv[-3:-1] == ["-start_number", "1"]
    assert vf.extract(tmp_path / "a b.mp4", tmp_path / "rate", short_side=None, fps=12.5) == 2
    argv = eval((tmp_path / "argv").read_text())
    assert argv[argv.index("-vf") + 1] == "fps=12.5" and "-vsync" not in argv
    # complete: not read again
    assert vf.extract(tmp_path / "gone.mp4", tmp_path / "out") == 2
    fake_ffmpeg(tmp_path / "bin", "print('moov atom not found', file=sys.stderr); sys.exit(1)")
    with pytest.raises(ValueError, match="a b.mp4.*moov atom not found"):
        vf.extract(tmp_path / "a b.mp4", tmp_path / "bad")
    fake_ffmpeg(tmp_path / "bin", "print('Output is empty', file=sys.stderr)")
    with pytest.raises(ValueError, match="no frames: Output is empty"):
        vf.extract(tmp_path / "a b.mp4", tmp_path / "bad")
    assert not (tmp_path / "bad").exists() and not list(tmp_path.glob(".*tmp"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt-get"):
        vf.extract(tmp_path / "a b.mp4", tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        vf.extract(tmp_path / "gone.mp4", tmp_path / "bad")


def test_a_real_mp4(tmp_path):
    # nothing to see without it
    for program in filter(None, [shutil.which("ffmpeg")]):
        write_folder(tmp_path / "in", gradient(12, 48, 64))
        subprocess.run([program, "-nostdin", "-loglevel", "error", "-framerate", "10",
                        "-start_number", "1", "-i", str(tmp_path / "in" / "img_%05d.jpg"), "-c:v",
                        "mpeg4", "-q:v", "2", str(tmp_path / "clip.mp4")], check=True)
        assert vf.extract(tmp_path / "clip.mp4", tmp_path / "all", short_side=24) == 12
        video = vf.open_video(tmp_path / "all")
        assert video.read([0])[0].size == (32, 24) and levels(video.read(None)) == list(range(12))
        assert vf.extract(tmp_path / "clip.mp4", tmp_path / "50%d off", fps=5) == 6
        (tmp_path / "cut.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:800])
        with pytest.raises(ValueError, match="cut.mp4"):
            vf.extract(tmp_path / "cut.mp4", tmp_path / "cut")


def test_extraction_of_many_goes_on_and_names_what_failed(tmp_path):
    for name in ("a", "b"):
        write_animated(tmp_path / f"{name}.webp", gradient(3))
    (tmp_path / "c.webp").write_bytes(b"not a picture")
    (tmp_path / "out" / ".a.tmp").mkdir(parents=True)  # left by a kill
    (tmp_path / "out" / ".a.tmp" / "img_00009.jpg").write_bytes(b"")
    jobs = [(tmp_path / f"{name}.webp", tmp_path / "out" / name) for name in "abc"]
    seen = []
    failed = vf.extract_all(jobs, workers=2, progress=seen.append, short_side=None)
    assert list(failed) == [str(tmp_path / "c.webp")] and seen == [1, 2, 3]
    before = (tmp_path / "out" / "a" / "img_00001.jpg").stat().st_mtime_ns
    assert (sorted(os.listdir(tmp_path / "out")) == ["a", "b"]
            and vf.count_frames(tmp_path / "out" / "a") == 3)
    vf.extract_all(jobs, workers=2)
    assert (tmp_path / "out" / "a" / "img_00001.jpg").stat().st_mtime_ns == before
    (tmp_path / "out" / "a" / "img_00002.jpg").unlink()
    with pytest.raises(ValueError, match="2 frames, numbered 1 to 3"):
        vf.open_video(tmp_path / "out" / "a")


def test_what_stops_an_extraction_and_what_does_not(tmp_path, monkeypatch):
    for name in ("a.webp", "a.gif"):
        write_animated(tmp_path / name, gradient(3))
    (tmp_path / "out" / "a").mkdir(parents=True)                  # empty: not an extracted video
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "whole.mp4").write_bytes(b"x")
    monkeypatch.setenv("PATH", "")
    jobs = [(tmp_path / name, tmp_path / "out" / name[0]) for name in ("gone.mp4", "a.webp")]
    assert list(vf.extract_all(jobs, 1)) == [str(tmp_path / "gone.mp4")]
    assert vf.count_frames(tmp_path / "out" / "a") == 3
    with pytest.raises(ValueError, match="a.webp and .*a.gif would both"):
        vf.extract_all([*jobs, (tmp_path / "a.gif", tmp_path / "out" / "a")], 1)
    with pytest.raises(FileNotFoundError, match="apt-get"):
        vf.extract_all([(tmp_path / "whole.mp4", tmp_path / "out" / "w")], 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for place in ("other", "other/notes.txt"):
        failed = vf.extract_all([(tmp_path / "a.gif", tmp_path / place)], 1)
        assert list(failed.values()) == [f"{tmp_path / place}: exists and holds no frames"]
    assert os.listdir(tmp_path / "other") == ["notes.txt"]
    for name in ("fps", "quality", "workers"):
        with pytest.raises(ValueError, match=name):              # once, not for every video
            vf.extract_all(jobs, **{name: 0})


def damaged_files(folder):
    """Files of every format that needs no ffmpeg: cut short, emptied, or with bytes exchanged."""
    folder.mkdir()
    rng, clip = np.random.default_rng(0), gradient(4)
    for suffix in (".gif", ".webp", ".png", ".npy", ".npz"):
        whole = folder / f"whole{suffix}"
        if suffix == ".npz":
            np.savez_compressed(whole, clip)
        elif suffix == ".npy":
            np.save(whole, clip)
        else:
            write_animated(whole, clip)
        data = np.frombuffer(whole.read_bytes(), np.uint8)
        for number in range(12):
            hit = data.copy()
            hit[rng.integers(len(data), size=20)] = rng.integers(256, size=20)
            (folder / f"{suffix[1:]}{number}{suffix}").write_bytes(hit)
        for number, length in enumerate((0, 20, len(data) // 2)):
            (folder / f"{suffix[1:]}-cut{number}{suffix}").write_bytes(data[:length])
        whole.unlink()
    np.savez(folder / "nothing.npz")
    np.savez(folder / "objects.npz", np.array([{}], dtype=object))
    np.save(folder / "no frames.npy", clip[:0])
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore:skipped")
def test_damaged_files_are_named_and_passed_over(tmp_path):
    files = damaged_files(tmp_path / "in")
    failed = vf.extract_all([(file, tmp_path / "out" / file.stem) for file in files], 2)
    assert len(failed) >= 30 and all(name in reason for name, reason in failed.items())
    assert len(os.listdir(tmp_path / "out")) == len(files) - len(failed)
    vf.write_index(tmp_path / "index.txt", [(f"in/{file.name}", 4, 0) for file in files])
    dataset = vf.VideoFolder(tmp_path / "index.txt", 2, 1, transform=vf.ClipTransform(8))
    loader = vf.VideoLoader(dataset, 4, on_bad_image="skip")
    read = sum(len(labels) for _, labels in loader)
    assert len(loader.bad_images) >= 30 and read + len(loader.bad_images) == len(files)
    assert all(reason.startswith(str(tmp_path / "in")) for reason in loader.bad_images)


# ---------------------------------------------------------------- sampling and loading

def test_choice_of_frames():
    assert (vf.dense_starts(100, 57, 3) == [0, 21, 43] and vf.dense_starts(5, 57, 3) == [0, 0, 0]
            and vf.dense_starts(100, 57, 1) == [21])
    assert vf.dense_indices(10, 4, 3, 5) == [5, 8, 1, 4]
    assert vf.segment_indices(8, 4) == [1, 3, 5, 7] and vf.segment_indices(2, 4) == [0, 0, 1, 1]
    drawn = torch.tensor([vf.segment_indices(20, 4, torch.Generator().manual_seed(s))
                          for s in range(200)])
    assert ((drawn // 5) == torch.arange(4)).all() and len(drawn[:, 0].unique()) == 5


def tree(tmp_path, counts=(20, 9, 30)):
    rows = []
    for number, count in enumerate(counts):
        write_folder(tmp_path / f"class {number}" / "v",
                     gradient(10, 40, 60)[np.arange(count) % 10])
        rows.append((f"class {number}/v", count, number))
    vf.write_index(tmp_path / "train.txt", rows)
    return tmp_path / "train.txt"


def test_clips_of_a_folder(tmp_path):
    index = tree(tmp_path)
    transform = vf.ClipTransform(32, train=False)
    clips = vf.VideoFolder(index, 4, 2, transform=transform, num_clips=3)
    assert (len(clips) == 3 and clips.labels.tolist() == [0, 1, 2]
            and clips.indices(20) == [[0, 2, 4, 6], [6, 8, 10, 12], [13, 15, 17, 19]])
    views, label = clips[1]
    assert views.shape == (3, 4, 32, 32, 3) and views.dtype == torch.uint8 and label == 1
    three = vf.VideoFolder(index, 4, 2, transform=vf.ClipTransform(32, crops=3), num_clips=2)[0][0]
    assert three.shape == (6, 4, 32, 32, 3)
    left, middle, right = three[:3].double().mean((1, 2, 3, 4))
    # the picture brightens to the right
    assert left < middle < right
    segments = vf.VideoFolder(index, 5, mode="segments", transform=transform)
    assert levels(segments[0][0]) == [2, 6, 0, 4, 8]
    train = vf.VideoFolder(index, 4, 2, train=True, transform=vf.ClipTransform(16, True, (20, 30)))
    a, b = (train.clip(train.open(0), torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(a, b) and a.shape == (4, 16, 16, 3)
    before = torch.get_rng_state()
    segments[0], clips[0]
    assert torch.equal(torch.get_rng_state(), before)             # test clips draw nothing
    starts = {tuple(train.indices(20, torch.Generator().manual_seed(s))[0]) for s in range(200)}
    assert {s[0] for s in starts} == set(range(14))


def test_crop_and_flip_are_shared_by_the_frames_and_only_those_are_read(tmp_path, monkeypatch):
    index = tree(tmp_path, (20,))
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    shutil.rmtree(tmp_path / "class 0")
    write_folder(tmp_path / "class 0" / "v", np.repeat(frame[None], 20, 0))
    opened, first, others = [], Image.open, Path.read_bytes
    monkeypatch.setattr(Image, "open", lambda name: opened.append(name) or first(name))
    monkeypatch.setattr(Path, "read_bytes", lambda name: opened.append(name) or others(name))
    train = vf.VideoFolder(index, 4, 3, train=True, transform=vf.ClipTransform(16, True, (18, 24)))
    clips = [train.clip(train.open(0), torch.Generator().manual_seed(s)) for s in range(12)]
    assert (len(opened) == 48 and all((clip == clip[:1]).all() for clip in clips)
            and not torch.equal(clips[0], clips[1]))
    read = lambda size: vf.open_video(tmp_path / "class 0" / "v").read([0], size)  # noqa: E731
    transforms = (vf.ClipTransform(16, True, (18, 18), flip=flip) for flip in (1.0, 0.0))
    mirrored, plain = (transform(read, torch.Generator().manual_seed(0))[0]
                       for transform in transforms)
    assert np.array_equal(mirrored, plain[:, :, ::-1])


def test_frames_of_another_kind_are_read_as_well(tmp_path):
    folder = write_folder(tmp_path / "v", gradient(5, 40, 60))
    Image.fromarray(gradient(3, 50, 60)[2]).save(folder / "img_00003.jpg")
    Image.fromarray(gradient(4)[3]).convert("L").save(folder / "img_00004.jpg")
    sizes = [frame.size for frame in vf.open_video(folder).read(None)]
    assert sizes == [(60, 40), (60, 40), (60, 50), (36, 24), (60, 40)]
    assert levels(vf.open_video(folder).read(None)) == [0, 1, 2, 3, 4]
    one, other = (np.asarray(vf.open_video(folder).read(order)[-1]) for order in ([1], [0, 1]))
    assert np.array_equal(one, other)
    with pytest.raises(BadImage, match="one size"):
        vf.ClipTransform(16)(lambda size: vf.open_video(folder).read(None))


def test_large_frames_are_decoded_small(tmp_path):
    write_folder(tmp_path / "v", gradient(1, 256, 340))
    sizes = []
    vf.ClipTransform(56)(lambda size: [sizes.append(f.size) or f
                                       for f in vf.open_video(tmp_path / "v").read([0], size)])
    assert sizes == [(85, 64)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(tmp_path, workers):
    index = tree(tmp_path)
    dataset = vf.VideoFolder(index, 4, 2, train=True,
                             transform=vf.ClipTransform(16, True, (20, 30)))
    loader = vf.VideoLoader(dataset, 2, shuffle=True, seed=3, workers=workers)
    epochs = [[(x, y) for x, y in loader] for _ in range(2)]
    assert epochs[0][0][0].shape == (2, 3, 4, 16, 16) and epochs[0][0][0].dtype == torch.float32
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    loader.set_epoch(1, 1)
    ((x, y),) = list(loader)
    assert torch.equal(x, epochs[1][1][0]) and torch.equal(y, epochs[1][1][1])
    test = vf.VideoLoader(vf.VideoFolder(index, 4, 2, transform=vf.ClipTransform(16, crops=3),
                                         num_clips=2), 3, workers=workers)
    assert next(iter(test))[0].shape == (3, 6, 3, 4, 16, 16)


def test_normalisation():
    frames = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    expected = ((frames.double() / 255 - 0.45) / 0.225).permute(0, 4, 1, 2, 3)
    assert (vf.to_clips(frames) - expected).abs().max() < 1e-5
    per_channel = vf.to_clips(frames, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    assert torch.allclose(per_channel[:, 2].double(), (frames[..., 2].double() / 255 - 0.3) / 4,
                          atol=1e-6)


def test_bad_input(tmp_path):
    index = tree(tmp_path)
    for call, error, words in [(lambda: vf.VideoFolder(index, mode="random"), ValueError, "mode"),
                               (lambda: vf.VideoFolder(index, 0), ValueError, "clip_len"),
                               (lambda: vf.VideoFolder(index, train=True, num_clips=2), ValueError,
                                "num_clips"), (lambda: vf.ClipTransform(0), ValueError, "size"),
                               (lambda: vf.ClipTransform(300, True), ValueError, "jitter"),
                               (lambda: vf.ClipTransform(crops=2), ValueError, "crops"),
                               (lambda: vf.extract("x", "y", 0), ValueError, "short_side"),
                               (lambda: vf.extract("x", "y", fps=float("inf")), ValueError, "fps"),
                               (lambda: vf.extract("x", "y", quality=1), ValueError, "quality"),
                               (lambda: vf.to_clips(torch.zeros(1, 4, 4, 3)), TypeError, "uint8")]:
        with pytest.raises(error, match=words):
            call()
    for text, words in (("a 3\n", ":1:"), ("a 3 0\nb x 1\n", ":2:"), ("a 0 1\n", ":1:"),
                        ("", "no video")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=f"bad.txt.*{words}"):
            vf.read_index(tmp_path / "bad.txt")
    for row in (("a\nb", 3, 0), ("a\u2028b", 3, 0), (" a", 3, 0), ("a", 0, 0), ("a", 3, -1)):
        with pytest.raises(ValueError, match="bad.txt: cannot hold"):
            vf.write_index(tmp_path / "bad.txt", [row])
    (tmp_path / "bom.txt").write_text("m\u00e4h 3 0\n\n", "utf-8-sig", newline="\r\n")
    assert vf.read_index(tmp_path / "bom.txt") == [("m\u00e4h", 3, 0)]
    np.save(tmp_path / "bad.npy", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="bad.npy.*uint8"):
        vf.open_video(tmp_path / "bad.npy")
    (tmp_path / "class 0" / "v" / "img_00003.jpg").write_bytes(b"broken")
    whole = vf.VideoFolder(index, 20, 1, transform=vf.ClipTransform(16))
    for call in (lambda: list(vf.VideoLoader(whole, 1)), lambda: whole[0]):
        with pytest.raises(BadImage, match=f"{tmp_path}/class 0/v: v/img_00003.jpg"):
            call()


# ---------------------------------------------------------------- command line

def test_command_line(tmp_path):
    for name in ("YoYo/v_YoYo_g01_c01", "YoYo/v_YoYo_g02_c01"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_animated(tmp_path / "videos" / f"{name}.webp", gradient(4))
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 YoYo\n")
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi 1\nYoYo/v_YoYo_g09_c01.avi 1\n")
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "data_tools.video_frames", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # noqa: E731
    done = run("extract", tmp_path / "videos", tmp_path / "frames", "--short-side", 16)
    assert done.returncode == 0 and "2 of 2 videos" in done.stdout, done.stderr
    done = run("index", "ucf101", lists, tmp_path / "frames", tmp_path / "train.txt")
    assert done.returncode == 0, done.stderr
    assert ("1 videos of 1 classes; 1 have no frames, the first YoYo/v_YoYo_g09_c01.avi"
            in done.stdout)
    assert vf.read_index(tmp_path / "train.txt") == [("YoYo/v_YoYo_g01_c01", 4, 0)]
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g09_c01.avi 1\n")
    done = run("index", "ucf101", lists, tmp_path / "frames", tmp_path / "none.txt")
    assert done.returncode == 1 and "holds frames of none of the 1 labelled videos" in done.stderr
    assert not (tmp_path / "none.txt").exists()
    (tmp_path / "frames" / "YoYo" / "raw.avi").write_bytes(b"x")  # not extracted: no frames
    assert vf.make_index(tmp_path / "frames", [("YoYo/raw.avi", 0)]) == ([], ["YoYo/raw.avi"])
    done = run("index", "ssv2", lists / "classInd.txt", tmp_path / "frames", tmp_path / "train.txt")
    assert (done.returncode == 1 and done.stderr.startswith("error: ssv2 needs --with")
            and "Traceback" not in done.stderr)
    for set_name, option, words in (("ucf101", ("--with", lists), "takes no --with"),
                                    ("kinetics", ("--test",), "takes no --split or --test")):
        with pytest.raises(SystemExit, match=f"error: {set_name} {words}"):
            vf.main(["index", set_name, str(lists), str(tmp_path), str(tmp_path / "x"),
                     *map(str, option)])
