"""The rules every file of the project keeps."""

import ast
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("reference", "data_tools", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
METHODS = [path for path in sorted((ROOT / "reference").glob("*.py")) if path.name != "__init__.py"]
name_of = lambda path: str(path.relative_to(ROOT))            # noqa: E731


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_imports_only_torch_numpy_pillow_and_the_standard_library(path):
    assert imported(path) <= set(sys.stdlib_module_names) | {"torch", "numpy", "PIL"}


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_snapshots_of_training_are_copies(path):
    """Training that goes on must not change what `send("state")` handed out, nor training that is
    resumed what it was given: an optimiser keeps the tensors it loads."""
    source = path.read_text(encoding="utf-8")
    handed_out = source.count('while request == "state":')         # as often as it is asked for
    copies = source.count("request = yield copy.deepcopy({")
    assert source.count('== "state":') == handed_out == copies
    assert not re.search(r'load_state_dict\(resume\["optimi[sz]er"\]\)', source)


def run_all(commands: list[list[str]], folders: list[Path],
            path: str | None) -> list[subprocess.CompletedProcess]:
    """Run Python with each argument list in its folder, a single-threaded process on every core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path or "",
                   "PYTHONSAFEPATH": "1"}

    def run(command, folder):
        return subprocess.run([sys.executable, *command], cwd=folder, env=environment,
                              capture_output=True, text=True, timeout=180)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, commands, folders))


def selected(request, argument: str) -> list:
    """What the tests that are about to run and use this fixture have as `argument`."""
    return [item.callspec.params[argument] for item in request.session.items
            if request.fixturename in item.fixturenames]


@pytest.fixture(scope="module")
def demonstrations(request, tmp_path_factory):
    paths = selected(request, "path")
    folders = [tmp_path_factory.mktemp(path.stem) for path in paths]
    for path, folder in zip(paths, folders):
        shutil.copy(path, folder)
    return dict(zip(paths, run_all([[path.name] for path in paths], folders, None)))


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_copied_alone_runs_its_demonstration(path, demonstrations):
    done = demonstrations[path]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), "the demonstration prints nothing"


def test_data_tools_import_no_method_and_only_allowed_packages():
    for path in sorted((ROOT / "data_tools").glob("*.py")):
        allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "PIL", "data_tools"}
        assert imported(path) <= allowed, path


def test_the_top_level_holds_only_what_belongs_there():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:                # not a checkout: an unpacked archive
        names = {path.name for path in ROOT.iterdir()
                 if not path.name.endswith(".egg-info")} - {"runs", "data", "build"}
    else:
        names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    shown = {name for name in names if not name.startswith(".")}
    assert shown <= {"setup.py", "README.md", "LICENSE", *FOLDERS}


GLOBAL_SEEDING = re.compile(r"(torch\.(random\.|cuda\.)?|(np|numpy)\.random\.|random\.)"
                            r"(manual_)?seed(_all)?")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_global_seeding_no_unsafe_load_no_leftovers_no_long_line(path):
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        assert not GLOBAL_SEEDING.fullmatch(call), f"line {node.lineno}: {call}"
        if call == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only"
                    and getattr(k.value, "value", False) is True]
            assert safe, f"line {node.lineno}: torch.load without weights_only=True"
    leftovers = "|".join(("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"))
    assert not re.search(rf"\b({leftovers})\b", text)
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not long, f"more than 100 columns in lines {long}"


def python_blocks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def snippets(request, tmp_path_factory):
    blocks = selected(request, "block")
    folders = [tmp_path_factory.mktemp("snippet") for _ in blocks]
    return dict(zip(blocks, run_all([["-c", block] for block in blocks], folders, str(ROOT))))


@pytest.mark.parametrize("block", python_blocks(),
                         ids=lambda block: block.strip().splitlines()[0][:60])
def test_snippets_of_the_readme_run(block, snippets):
    assert snippets[block].returncode == 0, snippets[block].stderr[-2000:]


def test_tables_of_the_readme_are_those_of_the_recorded_runs():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_all_pictures_and_no_others():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
    assert sorted(shown) == sorted(map(name_of, (ROOT / "benchmarks" / "results").glob("*.png")))
