import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import figures
import harness
import records
import tables
from checkpoints import Snapshots

ROOT = Path(__file__).resolve().parent.parent
TOY = '''
import time
import harness, torch

def train(steps, seed, pause, resume=None):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(model.weight), torch.nn.init.ones_(model.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = 0
    if resume:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        generator.set_state(resume["generator"])
        start = resume["step"]
    for step in range(start, steps):
        loss = model(torch.randn(8, 4, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(pause)
        if (yield {"step": step, "loss": loss.item()}) == "state":
            yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                   "generator": generator.get_state(), "step": step + 1}

parser = harness.parser("toy", seeds=2)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--steps", type=int, default=60)
run = harness.start(parser)
for seed in run.seeds:
    name = f"toy-{seed}"
    if (row := run.recorded(name)) is None:
        steps = train(run.args.steps, seed + run.rank, run.args.pause, run.resumed(name))
        last = run.drive(name, steps, run.args.steps)
        row = run.record(name, run.mean({"loss": last["loss"], "count": 1.0}))
run.finish([{"claim": "loss", "paper": None, "this run": row["loss"], "holds": row["loss"] < 5}],
           {"rows": [row]}, note=float("nan"))
'''


def toy_in(folder):
    """toy(*arguments): exit code, output, errors of the script TOY run in this folder."""
    (folder / "toy.py").write_text(TOY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}

    def start(*arguments, launch=(sys.executable,), **options):
        command = [*launch, str(folder / "toy.py"), *map(str, arguments)]
        return subprocess.Popen(command, cwd=folder, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def finish(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    finish.start = start
    return finish


@pytest.fixture
def toy(tmp_path):
    return toy_in(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of TOY that nothing stopped."""
    folder = tmp_path_factory.mktemp("toy")
    code, _, err = toy_in(folder)("--out", "whole")
    assert code == 0, err
    return folder / "whole"


def wait_for(path_or_test, seconds=60):
    end = time.monotonic() + seconds
    while not path_or_test():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def results_in(folder):
    return json.loads((folder / "toy.json").read_text())["results"]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_leaves_log_results_and_a_table(toy, tmp_path):
    code, out, err = toy("--out", f"{tmp_path}/a/")
    assert code == 0, err
    assert "| claim" in out and "yes" in out.splitlines()[-1]
    results = json.loads((tmp_path / "a" / "toy.json").read_text())
    assert results["seeds"] == [0, 1] and results["command"] == "python benchmarks/toy.py --out a/"
    assert results["versions"]["torch"] == torch.__version__ and results["hardware"]["cores"] >= 1
    assert results["note"] is None and results["wall_seconds"] >= 0
    log = [json.loads(line) for line in lines(tmp_path / "a" / "toy-1.jsonl")]
    assert [entry["step"] for entry in log] == list(range(60))
    assert not [*(tmp_path / "a").glob("*.rank0.pt"), *(tmp_path / "a").glob(".*tmp")]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_stopped_run_resumes_to_the_same_numbers(toy, tmp_path, whole, kill):
    process = toy.start("--out", "part", "--pause", "0.02", "--checkpoint-seconds", "0")
    # in the second seed
    wait_for(lambda: len(lines(tmp_path / "part" / "toy-1.jsonl")) > 7)
    process.send_signal(kill)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if kill == signal.SIGKILL else 130)
    if kill != signal.SIGKILL:
        assert "--resume" in out and "everything is saved" in out
    code, out, err = toy("--out", "part", "--pause", "0.02", "--resume")
    assert code == 0 and "going on after step" in out, err
    for name in ("toy-0.jsonl", "toy-1.jsonl"):
        assert lines(tmp_path / "part" / name) == lines(whole / name)
    assert results_in(tmp_path / "part") == results_in(whole)


def test_a_run_killed_after_its_last_step_resumes_to_the_same_numbers(toy, tmp_path, whole):
    script = tmp_path / "toy.py"
    script.write_text(TOY.replace("row = run.record(", "time.sleep(60); row = run.record("))
    process = toy.start("--out", "part", "--checkpoint-seconds", "0")
    wait_for(lambda: list((tmp_path / "part").glob("toy-0-00000060.rank0.pt")))
    process.kill()
    process.communicate()
    newest = max((tmp_path / "part").glob("*.pt"))
    script.write_text(TOY)
    good = newest.read_bytes()
    middle = good.index(bytes(Snapshots(newest.parent).read("toy-0", 60)["generator"][:99])) + 50
    for damaged in (good[:500], good[:-100],
                    good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]):
        newest.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{newest.name} is damaged.*; remove it"):
            Snapshots(newest.parent).read("toy-0", 60)
    newest.write_bytes(damaged)
    code, out, err = toy("--out", "part", "--resume")
    assert code == 1 and f"{newest.name} is damaged" in err and "Traceback" not in err
    newest.write_bytes(good)
    left = newest.with_name(".toy-0-00000060.rank0.pt.0.tmp")
    left.touch()
    assert toy("--out", "part", "--resume")[0] == 0 and not left.exists()
    assert results_in(tmp_path / "part") == results_in(whole)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return lambda *arguments, **kind: harness.start(harness.parser("toy", **kind),
                                                    ["--out", "a", *arguments])


def counting(resume=None, missing=None):
    for step in range(resume["step"] if resume else 0, 9):
        if step == missing:
            raise FileNotFoundError(2, "no such file", "cat.jpg")
        if (yield {"step": step}) == "state":
            yield {"step": step + 1}


def test_what_kills_leave_behind_is_put_right(start):
    folder, every = Path("a"), ("--checkpoint-seconds", "0")
    run = start(*every)
    with pytest.raises(FileNotFoundError) as stop:
        run.drive("x", counting(missing=6))
    assert str(stop.value) == "[Errno 2] no such file: 'cat.jpg'"       # and no word of the disk
    (folder / "x.jsonl").write_bytes(b'{"step": 0}\n{"st')    # a disk's cache was lost
    (folder / ".x-00000007.rank0.pt.1.tmp").touch()
    run = start(*every, "--resume")
    assert run.drive("x", counting(run.resumed("x"))) == {"step": 8}
    assert [json.loads(line)["step"] for line in lines(folder / "x.jsonl")] == [0, 6, 7, 8]
    old = {path: path.read_bytes() for path in folder.glob("*.pt")}
    assert len(old) == 2 and not list(folder.glob(".*"))
    run.record("x", 1.0)
    for path, content in old.items():                         # killed before they were removed
        path.write_bytes(content)
    assert start(*every, "--resume").recorded("x") == 1 and not list(folder.glob("*.pt"))


def test_a_run_does_not_go_on_from_damaged_or_others_files(start, capsys):
    start().record("part", 1)
    settings = json.loads(Path("a/run.json").read_text())
    for name, changed, words in (
            ("run.json", json.dumps({**settings, "nproc_per_node": 2}), "node was 2, now 1"),
            ("run.json", "[]", "run.json is damaged"), ("run.json", "{", "run.json is damaged"),
            ("recorded.json", '{"results', "recorded.json is damaged")):
        path = Path("a", name)
        before = path.read_text()
        path.write_text(changed)
        with pytest.raises(SystemExit):
            start("--resume")
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        path.write_text(before)


def test_a_loss_that_is_no_number_ends_in_one_line(start, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(harness, "_end_process", codes.append)
    start()._explain(FloatingPointError, FloatingPointError("the loss is nan"), None)
    assert codes == [1] and capsys.readouterr().err.startswith("error: the loss is nan\n")


def test_scripts_refuse_options_that_they_have_no_use_for(start, capsys):
    run = start(networks=False, figures=False)
    assert run.amp_dtype is run.figures is None
    assert type(run.wrap(torch.nn.Linear(1, 1))) is torch.nn.Linear
    for option in ("--compile", "--workers=1", "--amp=bf16", "--figures=pictures"):
        with pytest.raises(SystemExit):
            start(option, networks=False, figures=False)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_a_process_with_no_share_does_not_spoil_the_mean(start, monkeypatch):
    run = start()
    run.world_size = 2
    monkeypatch.setattr(run, "sum", lambda own: own + torch.tensor([6.0, 2.0, 2.0]))   # the other's
    assert run.mean({"a": float("nan"), "count": 0.0}, 0) == {"a": 3.0, "count": 2.0}
    monkeypatch.setattr(run, "sum", lambda own: own)          # no process has any
    assert np.isnan(run.mean({"a": 1.0}, 0)["a"])


def test_one_run_in_a_folder_keeps_its_two_newest_snapshots(toy, tmp_path):
    process = toy.start("--out", "a", "--steps", "100000", "--checkpoint-seconds", "0")
    wait_for(lambda: len(lines(tmp_path / "a" / "toy-0.jsonl")) > 10)
    code, out, err = toy("--out", "a")
    assert code == 2 and "another run is at work in a;" in err and process.poll() is None
    process.kill()
    process.communicate()
    # 3 when killed between save and removal
    assert 1 <= len(list((tmp_path / "a").glob("toy-0-*.rank0.pt"))) <= 3


def test_two_processes_agree_and_resume(toy, tmp_path):
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
              "--rdzv_backend=c10d",
              "--rdzv_endpoint=localhost:0")
    code, out, err = toy("--out", "whole", launch=launch)
    assert code == 0, err
    process = toy.start("--out", "part", "--pause", "0.02", "--checkpoint-seconds", "0",
                        launch=launch)
    wait_for(lambda: len(lines(tmp_path / "part" / "toy-0.jsonl")) > 7)
    # torchrun passes it on; both save after the same step
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "everything is saved" in out
    code, out, err = toy("--out", "part", "--pause", "0.02", "--resume", launch=launch)
    assert code == 0 and "going on after step" in out, err
    assert lines(tmp_path / "part" / "toy-0.jsonl") == lines(tmp_path / "whole" / "toy-0.jsonl")
    results = results_in(tmp_path / "part")
    assert results == results_in(tmp_path / "whole")
    assert results["toy-0"]["count"] == 2
    last = json.loads(lines(tmp_path / "whole" / "toy-0.jsonl")[-1])["loss"]
    assert results["toy-0"]["loss"] != last                   # the mean of two different processes


def test_bad_arguments_get_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    Path("file").touch()

    def start(*arguments):
        parser = harness.parser("toy")
        parser.add_argument("--kinds", nargs="+", choices="ab")
        parser.real.add_argument("--part", default="b")
        return harness.start(parser, list(arguments))

    for arguments, words in [
        (("--resume", "--out", "none"), "no run in none"),
        (("--data", "nowhere"), "--data nowhere: no such file or folder"),
        (("--seeds", "0"), "--seeds: must be at least 1, not 0"),
        (("--seeds", "two"), "--seeds: invalid count value: 'two'"),
        (("--device", "cuda:77"), "--device cuda:77 is not usable here"),
        (("--out", "file/x"), "cannot write there"),
        (("--figures", "file"), "'file'; choose other folders by --out and --figures"),
        (("--workers", "-1"), "must not be negative"),
        (("--record", "a/b"), "--record takes letters"),
        (("--kinds", "a", "a"), "--kinds names one twice: a a"),
        (("--part", "a", "--kinds", "a"), "--part: only with --data"),
    ]:
        with pytest.raises(SystemExit) as stop:
            start(*arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error.splitlines()[-1], error
    start("--out", "a").record("part", {"x": 1})
    with pytest.raises(SystemExit):
        start("--out", "a", "--resume", "--seed", "3")
    assert "--seed was 0, now 3" in capsys.readouterr().err
    run = start("--out", "a", "--resume", "--seeds", "3")      # more seeds: the others are kept
    assert run.recorded(
        "part") == {"x": 1} and run.recorded("other") is None and run.resumed("other") is None
    with pytest.raises(SystemExit):
        start("--out", "a", "--resume")
    assert "--seeds was 3, now 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name must be"):
        run.record("a/b", {})


def test_a_fresh_run_keeps_an_unfinished_one(start, capsys):
    with pytest.raises(FileNotFoundError):
        start("--checkpoint-seconds", "0").drive("x", counting(missing=6))
    run = start()
    assert "kept in a.1" in capsys.readouterr().out and len(list(Path("a.1").glob("*.pt"))) == 2
    run.record("x", 1)
    run.finish([{"claim": "c"}])
    start().record("x", 1)                                    # that run was finished
    assert "kept in" not in capsys.readouterr().out
    Path("a", f"{run.script}.json").unlink()                  # as if killed between its two parts
    start()
    assert "kept in a.2" in capsys.readouterr().out and Path("a.2/recorded.json").exists()


def test_a_full_disk_ends_with_a_clear_line_and_whole_files(toy, tmp_path):
    import resource

    def limit():                                              # smaller than a snapshot
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
    code, out, err = toy("--out", "a", "--checkpoint-seconds", "0", preexec_fn=limit)
    assert code == 1 and "writing to a failed" in err and "--resume" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "a").glob("*.pt")) and not list((tmp_path / "a").glob(".*tmp"))
    code, out, err = toy("--out", "b", "--steps", "200", preexec_fn=limit)   # or the log
    assert code == 1 and "writing to b failed" in err and "Traceback" not in err


def test_results_are_kept_when_the_table_cannot_be_printed(toy, tmp_path):
    process = toy.start("--out", "a", "--steps", "2")
    process.stdout.close()
    process.stderr.read()
    assert process.wait(60) != 0 and (tmp_path / "a" / "toy.json").exists()


def test_a_progress_line_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((40, 24)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    line = harness.ProgressLine("long", 5)
    line.update(3, {f"value {i}": 1.0 for i in range(9)})
    line.close()
    text = capsys.readouterr().err
    assert text.startswith("\rlong 3/5") and text.endswith("\x1b[K\n") and len(text) == 40 + 4
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((0, 0)))
    line = harness.ProgressLine("long", 5)                    # a terminal that does not know
    line.update(5)
    line.close()
    assert "long 5/5" in capsys.readouterr().err


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.json"
    records.write_json(path, {"a": np.float32(1.5), "b": torch.tensor([1, 2]), "c": float("inf")})
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")
    with pytest.raises(OSError):
        records.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [1, 2], "c": None}
    with ThreadPoolExecutor(8) as pool:                       # writers of one file do not meet
        list(pool.map(lambda number: records.write_json(path, number), range(100)))
    assert json.loads(path.read_text()) in range(100) and len(list(tmp_path.iterdir())) == 1


def test_format_table_and_readme_block(tmp_path, monkeypatch):
    table = records.format_table([{"a": 1.23456, "b|": None}, {"a": "x\n|y", "c": True}])
    assert table.splitlines() == ["| a     | b\\| | c    |", "|-------|-----|------|",
                                  "| 1.235 | -   | -    |", "| x \\|y | -   | True |"]
    run = {"claims": [{"claim": "c", "holds": None}], "tables": {"main": [{"m": 1}]},
           "command": "python benchmarks/x.py",
           "hardware": {"gpu": None, "cores": 2}, "versions": {"torch": "2"}, "wall_seconds": 60}
    (tmp_path / "x.json").write_text(json.dumps(run))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| 1 |" in tables.render("x", "main") and "not asserted" in tables.render("x", "claims")
    with pytest.raises(SystemExit, match="no table 'other'"):
        tables.render("x", "other")
    assert records.format_table([{"a": np.float32(1.23456), "b": torch.tensor(2.34567)}]).endswith(
        "| 1.235 | 2.346 |")
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(SystemExit, match="y.json is no record of a run: KeyError.'claims'"):
        tables.render("y", "claims")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    readme, block = tmp_path / "README.md", "<!-- table:x:main -->\nold\n<!-- /table -->\n"
    readme.write_text(f"before\n{block}between\n{block}after\n")
    tables.main()
    once = readme.read_text()
    tables.main()
    assert readme.read_text() == once == once.replace("old", "") and once.count("| 1 |") == 2
    for broken in ("<!-- table:x:main -->\nprecious\n" + block, "<!-- table:x:main -->\nprecious\n",
                   block.replace(":main", ""), f"{block}<!-- /table -->"):
        readme.write_text(broken)
        with pytest.raises(SystemExit, match="needs a line of its own"):
            tables.main()
        assert readme.read_text() == broken


def test_pictures_are_written(tmp_path):
    picture = torch.rand(3, 16, 20, generator=torch.Generator().manual_seed(0))
    boxed = figures.draw_boxes(picture, [[2, 3, 10, 12], [0, 0, 0, 0]], scale=4)
    assert boxed.shape == (64, 80, 3) and tuple(boxed[12, 20]) == (0x1F, 0x6F, 0xB4)
    heat = figures.overlay(picture, torch.arange(12.0).view(3, 4))
    assert heat.shape == (16, 20, 3) and heat.dtype == np.uint8
    figures.image_grid(tmp_path / "grid.png", [boxed, heat, np.zeros((5, 5), bool)],
                       titles=["a", "b" * 90, "c"], columns=2)
    x = np.linspace(0.1, 10, 50)
    curves = {"a": (x, 1 / x), "b": (x, x, 0.1 * x), "gap": (x, np.where(x > 5, np.nan, x))}
    figures.line_chart(tmp_path / "line.png", curves, logx=True, logy=True, title="t", xlabel="x",
                       ylabel="y", markers=True)
    bars = {"m": ([1, -2], [0.1, 0.2]), "n": [3, float("nan")]}
    figures.bar_chart(tmp_path / "bar.png", ["p", "q"], bars)
    figures.scatter_chart(tmp_path / "dots.png", {"a": (x, x)}, title="dots")
    chart = figures.Chart((0, 1), (0, 1))
    chart.line([0, 0.5, 1], [0, 1, 0], dashed=True, label="dashes")
    chart.ellipse(0.5, 0.5, 0.2, 0.1)
    chart.text(0.1, 0.9, "text"), chart.save(tmp_path / "own.png")
    for name in ("grid", "line", "bar", "dots", "own"):
        image = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert len(image.getcolors(1 << 20)) > 5
    half = torch.rand(3, 8, 8).bfloat16()
    assert np.array_equal(figures.as_image(half), figures.as_image(half.float()))
    with pytest.raises(ValueError, match="0..255, not 0..300"):
        figures.as_image(np.array([[0, 300]]))
    with pytest.raises(ValueError, match="columns"):
        figures.image_grid(tmp_path / "no.png", [half], columns=0)
    with pytest.raises(ValueError, match="image must be"):
        figures.as_image(np.zeros((2, 3, 4, 5)))
    with pytest.raises(ValueError, match="limits"):
        figures.Chart((0, 0), (0, 1))
    with pytest.raises(ValueError, match="heat must be"):
        figures.overlay(half, torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="shorter"):
        figures.line_chart(tmp_path / "no.png", {"a": ([1, 2, 3], [1, 2])})
    for labels, series in ((["p", "q"], {"m": [1]}), ([], {"m": []}), (["p"], {})):
        with pytest.raises(ValueError, match="each series"):
            figures.bar_chart(tmp_path / "no.png", labels, series)


def colors_of(path):
    return {color for _, color in Image.open(path).convert("RGB").getcolors(1 << 20)}


@pytest.mark.filterwarnings("error")
def test_charts_of_odd_values(tmp_path):
    path, nan, inf, blue = tmp_path / "x.png", float("nan"), float("inf"), (0x1F, 0x6F, 0xB4)
    for x, y in (([1], [2]), ([1, 2, 3], [nan, 1, nan])):     # points without a neighbour
        figures.line_chart(path, {"": (x, y)})
        assert any(b > r + 60 for r, g, b in colors_of(path))
    for series in ({}, {"a": ([], [])}, {"a": ([1, 2], [nan, nan])},
                   {"a": ([1, 2, 3], [1, inf, -inf], [0.1, nan, inf])}):
        figures.line_chart(path, series)
    for values in ([-1, -1], [0, 0], [nan, None], [1, inf], ([1, -2], [nan, 0.5])):
        figures.bar_chart(path, ["p", "q"], {"m": values})
        assert (blue in colors_of(path)) == any(v and abs(v) < inf for v in np.ravel(values)
                                                if v is not None)
    names = {f"a name that is long {i}" * 3: ([0, 1], [0, i]) for i in range(30)}
    figures.line_chart(path, names, size=(200, 140), title="t" * 99, ylabel="y" * 99)
    assert figures._ticks(1e8, 1e8 + 2, False)[1][1] == "100000000.5"
    assert figures._wrap("one two three four", 50) == "one two\nthree\nfour"
    assert [label for _, label in figures._ticks(1.8, 47, True)] == ["2", "5", "10", "20"]
    figures.bar_chart(path, [f"label {i}" for i in range(30)], {"m": range(1, 31)}, logy=True)
    figures.line_chart(path, {"a": ([1, 2], [1, 2], [3, 3])}, logy=True)
    heat = np.arange(12.0).reshape(3, 4)
    plain, heat[0, 0], heat[2, 3] = figures.heat_colors(heat), -inf, inf
    assert np.array_equal(figures.heat_colors(heat)[[0, 2], [0, 3]], plain[[0, 2], [0, 3]])
    assert len(np.unique(figures.heat_colors(heat).reshape(-1, 3), axis=0)) > 9
    figures.heat_colors(np.full((2, 2), nan))


def test_charts_hide_nothing(tmp_path):
    path, x = tmp_path / "x.png", np.linspace(0, 1, 50)
    lines = {f"line {i}": (x, i + 0 * x) for i in range(8)}
    figures.line_chart(path, lines)                           # fills the axes: the legend is beside
    assert Image.open(path).width > 640
    figures.line_chart(path, {"a": (x, x)})
    assert Image.open(path).size == (640, 420)
    ticks = [(i / 99, str(i)) for i in range(100)]
    chart = figures.Chart((0, 1), (0, 1), xticks=ticks, yticks=ticks, ylabel="y" * 200)
    chart.text(1, 0.5, "words that begin at the right edge")
    assert np.asarray(chart.canvas)[:, -4:].min() == 255      # and end within the picture
    before = np.array(chart.canvas)
    for x, y in (([-1, 2], [0.5, 0.6]), ([0.5, 0.5], [0, 1e9]), ([2], [0.5])):   # cut off
        chart.line(x, y, dashed=x[0] == -1)
    rows, columns = (before != np.asarray(chart.canvas)).any(2).nonzero()
    x0, y0, x1, y1 = (2 * edge for edge in chart.box)
    assert x0 <= columns.min() < columns.max() <= x1 and y0 <= rows.min() < rows.max() <= y1
    figures.draw_boxes(np.zeros((4, 4)), [[0, 0, np.inf, 1e12], [np.nan, 0, 1, 1]])


def test_every_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)          # as if there were GPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert harness.pick_device("cuda", 1) == harness.pick_device(None, 1) == torch.device("cuda:1")
    assert harness.pick_device("cuda:0", 1) == torch.device("cuda:0")
