"""Downloads from a misbehaving server on loopback, and archives that want out of their folder."""

import hashlib
import http.server
import io
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from data_tools import download as tool

ROOT = Path(__file__).parents[1]
CONTENT = hashlib.shake_256(b"content").digest(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; `server.script` holds one behaviour per request, "good" when it is empty."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        behaviour = server.script.pop(0) if server.script else "good"
        server.requests.append((behaviour, self.headers.get("Range")))
        content = server.content
        if behaviour in ("404", "503"):
            self.send_error(int(behaviour))
            return
        if behaviour == "redirect to itself":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        known = behaviour == "any tag" or self.headers.get("If-Range") == server.tag
        if wanted and behaviour != "ignore range" and known:
            start = int(wanted[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
            shown = start + 7 if behaviour == "wrong place" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        elif behaviour == "a part":
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-99/{len(content)}")
            content = content[:100]
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        body = content[start:]
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour == "truncate":
            body = body[: len(body) // 2]
        if behaviour == "stall":
            self.wfile.write(body[:1000])
            self.wfile.flush()
            server.released.wait(10)
            return
        if behaviour == "wrong bytes":
            body = bytes(len(body))
        try:
            self.wfile.write(body)
        except ConnectionError:
            pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.requests, server.released = [], [], threading.Event()
    server.content, server.tag = CONTENT, '"v1"'
    server.url = f"http://127.0.0.1:{server.server_port}/files/set.bin?x=1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01},
                     daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetch(server, dst, **options):
    options = {"sha256": DIGEST, "size": len(CONTENT), "backoff": 0.0, "progress": False, **options}
    return tool.download(server.url, dst, **options)


def test_plain_download(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path == tmp_path / "set.bin" and path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["set.bin"]
    fetch(server, path)
    assert len(server.requests) == 1  # it is there already
    path.write_bytes(b"mine")
    with pytest.raises(tool.DownloadError,
                       match="there already, but it has 4 bytes instead of 3000000; remove"):
        fetch(server, path)
    assert path.read_bytes() == b"mine"
    assert fetch(server, tmp_path / "new" / "name").exists()


def test_truncated_answers_are_continued(server, tmp_path):
    server.script = ["truncate", "truncate", "503"]
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT
    assert [r for _, r in server.requests] == [
        None, "bytes=1500000-", "bytes=2250000-", "bytes=2250000-"
    ]


def test_a_stalling_server_is_left(server, tmp_path):
    server.script = ["stall"]
    assert fetch(server, tmp_path / "x", timeout=0.3).read_bytes() == CONTENT
    assert server.requests[1] == ("good", "bytes=1000-")


def test_a_server_that_ignores_range_starts_over(server, tmp_path):
    server.script = ["truncate", "ignore range"]
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT


def test_a_file_that_changed_is_not_mixed_with_the_old_one(server, tmp_path):
    server.content, server.script = bytes(len(CONTENT)), ["truncate", "503"]
    with pytest.raises(tool.DownloadError, match="1500000 bytes are kept"):
        fetch(server, tmp_path / "x", retries=0)
    server.content, server.tag, server.script = CONTENT, '"v2"', []
    assert fetch(server, tmp_path / "x", sha256=None).read_bytes() == CONTENT


def test_without_a_tag_nothing_is_continued(server, tmp_path):
    server.tag, server.script = "", ["truncate"]
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT
    assert [r for _, r in server.requests] == [None, None]


def test_a_complete_part_file_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT)
    (tmp_path / "x.part.etag").write_text('"v1"')
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.requests == [("good", f"bytes={len(CONTENT)}-")]


def test_a_server_that_ignores_if_range_does_not_mix_two_files(server, tmp_path):
    (tmp_path / "x.part").write_bytes(b"old" * 500_000)
    (tmp_path / "x.part.etag").write_text('"v0"')
    server.script = ["any tag"]
    tool.download(server.url, tmp_path / "x", backoff=0.0, progress=False)
    assert (tmp_path / "x").read_bytes() == CONTENT and len(server.requests) == 2


def test_an_answer_from_another_place_is_discarded(server, tmp_path):
    server.script = ["truncate", "wrong place"]
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT


def test_a_part_is_not_taken_for_the_whole(server, tmp_path):
    server.script = ["a part"]
    assert fetch(server, tmp_path / "x", sha256=None, size=None).read_bytes() == CONTENT
    (tmp_path / "y.part").write_bytes(CONTENT[:50])     # no tag beside it, so it cannot go on
    server.script = ["a part"]
    assert fetch(server, tmp_path / "y", sha256=None, size=None).read_bytes() == CONTENT


def test_a_file_is_written_by_one_process(server, tmp_path):
    server.script = ["stall"]
    first = threading.Thread(target=fetch, args=(server, tmp_path / "x"))
    first.start()
    while not (tmp_path / "x.part.etag").exists():
        time.sleep(0.01)
    with pytest.raises(tool.DownloadError, match="x.part is being written by another process"):
        fetch(server, tmp_path / "x")
    server.released.set()
    first.join()
    assert (tmp_path / "x").read_bytes() == CONTENT and len(server.requests) == 2


def test_wrong_bytes_are_never_kept(server, tmp_path):
    server.script = ["wrong bytes"]
    with pytest.raises(tool.DownloadError, match=f"SHA-256 is [0-9a-f]+ instead of {DIGEST}"):
        fetch(server, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    server.script = ["truncate", "wrong bytes"]  # a bad continuation is tried once more from zero
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT
    with pytest.raises(tool.DownloadError, match="server's file has 3000000 bytes instead of 5"):
        fetch(server, tmp_path / "y", size=5)


def test_unknown_length(server, tmp_path):
    server.script = ["no length"]
    assert fetch(server, tmp_path / "x", size=None).read_bytes() == CONTENT
    server.script, server.content = ["no length"], CONTENT + b"more"
    with pytest.raises(tool.DownloadError, match="more than the 3000000 bytes"):
        fetch(server, tmp_path / "y")


def test_tries_are_bounded(server, tmp_path):
    server.script = ["503"] * 10
    with pytest.raises(tool.DownloadError, match="3 tries in a row"):
        fetch(server, tmp_path / "x", retries=2)
    assert len(server.requests) == 3
    server.script = ["404"]
    with pytest.raises(tool.DownloadError, match="HTTP 404"):
        fetch(server, tmp_path / "x")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(tool.DownloadError, match="refused"):
            tool.download(url, tmp_path / "x", retries=1, backoff=0)
    server.script = ["redirect to itself"] * 20
    with pytest.raises(tool.DownloadError, match="HTTP 302 .* loop") as error:
        fetch(server, tmp_path / "x")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_pauses_grow(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.script = ["503"] * 7
    fetch(server, tmp_path / "x", retries=7, backoff=1.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="must start with http"):
        tool.download("file:///etc/passwd", tmp_path)
    for wrong in (dict(retries=-1), dict(timeout=0), dict(timeout=float("nan")),
                  dict(backoff=-1.0), dict(size=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tool.download("http://x/y", tmp_path, **wrong)
    with pytest.raises(ValueError, match="has no file name"):
        tool.download("http://x/y/%2e%2e", tmp_path)
    with pytest.raises(ValueError, match="64 hexadecimal"):
        tool.download("http://x/y", tmp_path, sha256="abc")
    with pytest.raises(ValueError, match="no file name"):
        tool.download("http://x/", tmp_path)


def test_a_local_failure_is_not_retried(server, tmp_path):
    (tmp_path / "x.part").mkdir()
    with pytest.raises(IsADirectoryError):
        fetch(server, tmp_path / "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(tool.DownloadError, match="pipe is there already, but it is not a file"):
        fetch(server, tmp_path / "pipe")
    assert server.requests == []


def test_full_disk(server, tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    command = [sys.executable, "-m", "data_tools.download", server.url, str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=small_disk)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"File too large: '{tmp_path / 'x.part'}'" in done.stderr
    assert len(server.requests) == 1 and (tmp_path / "x.part").stat().st_size == 1_000_000
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT


def test_command_line(server, tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as bundle:
        bundle.writestr("a/b.txt", "hello")
    server.content = inner.getvalue()
    digest = hashlib.sha256(server.content).hexdigest()
    command = [sys.executable, "-m", "data_tools.download", server.url, str(tmp_path / "x.zip")]
    options = ["--sha256", digest, "--size", str(len(server.content)), "--unpack",
               str(tmp_path / "out")]
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 files in" in done.stdout and "100%" in done.stderr
    assert (tmp_path / "out/a/b.txt").read_text() == "hello"
    failed = subprocess.run(command + ["--size", "3"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith(
        "error: ") and failed.stderr.count("\n") == 1


def test_continues_after_a_kill(server, tmp_path):
    server.script = ["stall"]
    command = [sys.executable, "-m", "data_tools.download", server.url, str(tmp_path / "x")]
    process = subprocess.Popen(command, cwd=ROOT)
    part, deadline = tmp_path / "x.part", time.time() + 60
    while not (part.exists() and (tmp_path / "x.part.etag").exists()) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    server.released.set()
    assert not (tmp_path / "x").exists()
    assert fetch(server, tmp_path / "x").read_bytes() == CONTENT


# -------------------------------------------------------------------------------------- unpack


def make_tar(path, *members, mode="w"):
    with tarfile.open(path, mode) as bundle:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = content
            bundle.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def make_zip(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if not isinstance(content, bytes):
                info.external_attr, content = content << 16, b"/etc/passwd"
            bundle.writestr(info, content)
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_unpack(tmp_path, mode):
    files = [("set/a.txt", b"one"), ("./set/sub/b.txt", b"two"), ("empty", b"")]
    make = make_zip(tmp_path / "x", *files) if mode == "zip" else make_tar(tmp_path / "x", *files,
                                                                           mode=mode)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("kept")
    assert tool.unpack(make, tmp_path / "out") == 3
    found = sorted(p.relative_to(tmp_path / "out").as_posix()
                   for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["empty", "kept", "set/a.txt", "set/sub/b.txt"]
    assert (tmp_path / "out/set/sub/b.txt").read_bytes() == b"two"


def test_unpack_again_and_over_other_files(tmp_path):
    archive = make_tar(tmp_path / "x", ("a", b"1"), ("d/b", b"2"), ("./a", b"3"), ("z", b"4"))
    out = tmp_path / "out"
    (out / ".data_tools-unpack/d").mkdir(parents=True)      # left by a killed process
    assert tool.unpack(archive, out, max_ratio=float("inf")) == 3
    assert sorted(path.name for path in out.iterdir()) == ["a", "d", "z"]
    assert (out / "a").read_bytes() == b"3"
    shutil.rmtree(out)
    (out / "z").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="out/z is in the way"):
        tool.unpack(archive, out)
    (out / "z").rmdir()
    (out / "d").write_text("mine")
    with pytest.raises(FileExistsError, match="out/d is in the way"):
        tool.unpack(archive, out)
    assert [path.name for path in out.iterdir()] == ["d"] and (out / "d").read_text() == "mine"
    for wrong in (dict(max_ratio=0), dict(max_ratio=float("nan")), dict(max_bytes=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tool.unpack(archive, out, **wrong)


OUTSIDE = ["../x", "a/../../x", "/tmp/x", "C:/x", "C:\\x", "..\\x", "\\x", "a/.."]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_names_that_lead_out(tmp_path, make, name):
    archive = make(tmp_path / "x", ("good", b"1"), (name, b"2"))
    with pytest.raises(tool.UnsafeArchive, match=re.escape(repr(name))):
        tool.unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize("kind", KINDS)
def test_tar_links_and_devices(tmp_path, kind):
    archive = make_tar(tmp_path / "x", ("good", b"1"), ("odd", (kind, "good")))
    with pytest.raises(tool.UnsafeArchive, match="'odd' is a link, a device"):
        tool.unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_zip_links_and_devices(tmp_path, kind):
    archive = make_zip(tmp_path / "x", ("good", b"1"), ("odd", kind))
    with pytest.raises(tool.UnsafeArchive, match="'odd' is a link or a device"):
        tool.unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("make", [lambda p, *m: make_tar(p, *m, mode="w:gz"), make_zip])
def test_bombs(tmp_path, make):
    archive = make(tmp_path / "x", ("small", b"1"), ("bomb", bytes(70_000_000)))
    with pytest.raises(tool.UnsafeArchive, match="'bomb' takes the contents above 67108864 bytes"):
        tool.unpack(archive, tmp_path / "out")
    archive = make(tmp_path / "y", ("a", bytes(600)), ("b", bytes(600)))
    with pytest.raises(tool.UnsafeArchive, match="'b' takes the contents above 1000 bytes"):
        tool.unpack(archive, tmp_path / "out", max_bytes=1000)
    assert list((tmp_path / "out").iterdir()) == []
    assert tool.unpack(archive, tmp_path / "out", max_bytes=1200) == 2


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_damaged_archives(tmp_path, mode):
    members = ("name", CONTENT), ("last", b"1")
    archive = make_zip(tmp_path / "x", *members) if mode == "zip" else make_tar(tmp_path / "x",
                                                                                *members, mode=mode)
    whole = archive.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes(40) + whole[middle + 40 :]):
        if mode == "w" and len(damaged) == len(whole):
            continue  # plain tar has no checksum of the contents
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="/x"):
            tool.unpack(archive, tmp_path / "out")
    (tmp_path / "y").write_text("not an archive")
    with pytest.raises(ValueError, match="y is neither a tar nor a zip archive, or is damaged$"):
        tool.unpack(tmp_path / "y", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_headers_of_a_tar(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "x", ("a", b"1"), ("b", b"2"), ("c", b"3"))
    whole = archive.read_bytes()
    archive.write_bytes(whole[:1030] + b"?" + whole[1031:])      # the name of b
    with pytest.raises(ValueError, match="damaged at 'a'.*bad checksum"):
        tool.unpack(archive, tmp_path / "out")
    archive.write_bytes(whole[:1100])
    with pytest.raises(ValueError, match="damaged at 'a'.*truncated header"):
        tool.unpack(archive, tmp_path / "out")
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.XHDTYPE, 2 << 20
    archive.write_bytes(whole[:1024] + long.tobuf() + bytes(2 << 20) + whole[1024:])
    with pytest.raises(ValueError, match="damaged at 'a'.*extended header of 2097152 bytes"):
        tool.unpack(archive, tmp_path / "out")
    monkeypatch.setattr(tool, "FREE_BYTES", 1000)
    archive = make_tar(tmp_path / "y", *((f"{i}", b"") for i in range(50)), mode="w:xz")
    with pytest.raises(tool.UnsafeArchive, match="is member .* raise max_ratio"):
        tool.unpack(archive, tmp_path / "out", max_ratio=20)
    assert list((tmp_path / "out").iterdir()) == []
    assert tool.unpack(archive, tmp_path / "out", max_ratio=200) == 50


def test_zip_checksum_and_encryption(tmp_path):
    archive = make_zip(tmp_path / "x", ("name", b"0123456789" * 100))
    data = bytearray(archive.read_bytes())
    central = data.rfind(b"PK\x01\x02")
    data[central + 16 : central + 20] = b"\0\0\0\0"
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="damaged at 'name'.*CRC"):
        tool.unpack(archive, tmp_path / "out")
    data[central + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(tool.UnsafeArchive, match="'name' is encrypted"):
        tool.unpack(archive, tmp_path / "out")


def test_a_name_that_is_both_file_and_folder(tmp_path):
    archive = make_tar(tmp_path / "x", ("a", b"1"), ("a/b", b"2"))
    with pytest.raises(tool.UnsafeArchive, match="'a/b' is both"):
        tool.unpack(archive, tmp_path / "out")
