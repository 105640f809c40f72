"""Fetches a file over HTTP and unpacks archives, without trusting the network or the archive.

    python -m data_tools.download URL DST [--sha256 HEX] [--size BYTES] [--unpack DIR]

`download` writes to DST.part, continues there after an interruption (HTTP Range, guarded by the
server's ETag or date, so that two versions are never mixed), retries with growing pauses, compares
size and SHA-256, and only then renames the file to DST. `unpack` writes tar and zip archives into a
staging folder and moves the files to their place when all of them are good; it refuses, by the
member's name, whatever leaves the folder, is a link or a device, or grows out of proportion.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import http.client
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Iterator, Sequence

BLOCK = 1 << 20
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, RuntimeError)
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
FREE_BYTES = 64 << 20  # archives may grow to this size at any ratio


class DownloadError(RuntimeError):
    """A download that failed for good; the message says why and what to do."""


class UnsafeArchive(ValueError):
    """An archive that was refused; the message names the member."""


# ------------------------------------------------------------------------------------- download


def download(url: str, dst: str | Path, *, sha256: str | None = None, size: int | None = None,
             retries: int = 5, timeout: float = 30.0, backoff: float = 1.0,
             progress: bool = True) -> Path:
    """Fetches url to the file dst (or into the folder dst, under the URL's last name) and returns
    its path.

    A file that is there already is kept if it has the given sha256 and size, and is an error if it
    has not. retries: failed tries in a row that bring less than 1 MB each; pauses are backoff * 1,
    2, 4, ... seconds, 30 at most. timeout: seconds without a byte. Raises DownloadError; what has
    arrived stays in `dst.part`.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"url must start with http:// or https://, got {url!r}")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    if size is not None and size < 0:
        raise ValueError(f"size must be >= 0 bytes, got {size}")
    if not (retries >= 0 and backoff >= 0 and timeout > 0):
        raise ValueError("retries and backoff must be >= 0 and timeout > 0, "
                         f"got {retries}, {backoff} and {timeout}")
    dst = Path(dst)
    if dst.is_dir():
        name = PurePosixPath(urllib.parse.unquote(parts.path)).name
        if name in ("", ".."):
            raise ValueError(f"{url} has no file name; give dst as a file")
        dst = dst / name
    if dst.exists():
        if problem := _mismatch(dst, sha256, size):
            raise DownloadError(
                f"{dst} is there already, but {problem}; remove it to fetch it again")
        return dst
    dst.parent.mkdir(parents=True, exist_ok=True)
    part = dst.with_name(dst.name + ".part")
    with open(part, "ab") as file:
        if not _lock(file.fileno()):
            raise DownloadError(f"{part} is being written by another process")
        try:
            _fetch_whole(url, part, sha256, size, retries, timeout, backoff, progress)
            os.replace(part, dst)
            _validator_path(part).unlink(missing_ok=True)
        finally:
            if part.exists() and not _size(part):
                part.unlink()
                _validator_path(part).unlink(missing_ok=True)
    return dst


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed; False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _fetch_whole(url: str, part: Path, sha256: str | None, size: int | None, retries: int,
                 timeout: float, backoff: float, progress: bool) -> None:
    """As many tries as it takes and `retries` allows."""
    failures, restarted = 0, False
    while True:
        before = _size(part)
        try:
            _fetch(url, part, size, timeout, progress)
            problem = _mismatch(part, sha256, size)
            if problem is None:
                return
            _discard(part)
            if before and not restarted:  # the old beginning may be to blame: once more from zero
                restarted = True
                continue
            raise DownloadError(
                f"{url}: {problem}; the server has another file, or the expected value is wrong")
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.HTTPError):
                if error.code < 500 and error.code not in (408, 416, 429):
                    raise DownloadError(f"{url}: HTTP {error.code} {_reason(error)}") from error
            elif getattr(error, "filename", None) or getattr(error, "errno", None) in LOCAL:
                error.filename = error.filename or str(part)
                raise  # the local file or disk, not the network
            gained = _size(part) - before
            failures = 0 if gained >= BLOCK else failures + 1
            if failures > retries:
                raise DownloadError(
                    f"{url}: {_reason(error)} ({failures} tries in a row; {_size(part)} bytes are "
                    f"kept in {part}, the same command goes on from there)") from error
            time.sleep(min(30.0, backoff * 2 ** max(0, failures - 1)))


def _reason(error: Exception) -> str:
    reason = " ".join(str(getattr(error, "reason", None) or error).split())
    return reason or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size


def _validator_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _discard(part: Path) -> None:
    os.truncate(part, 0)
    _validator_path(part).unlink(missing_ok=True)


def _mismatch(path: Path, sha256: str | None, size: int | None) -> str | None:
    """What is wrong with the file, or None."""
    if not path.is_file():
        return "it is not a file"
    if size is not None and path.stat().st_size != size:
        return f"it has {path.stat().st_size} bytes instead of {size}"
    if sha256 is not None:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != sha256.lower():
            return f"its SHA-256 is {digest.hexdigest()} instead of {sha256.lower()}"
    return None


def _fetch(url: str, part: Path, size: int | None, timeout: float, progress: bool) -> None:
    """One try: continues part, or starts afresh if the server does not continue the same file."""
    have = _size(part)
    validator = _validator_path(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "data_tools"}
    if have and validator.exists():
        headers |= {"Range": f"bytes={have}-", "If-Range": validator.read_text()}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers),
                                          timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        error.close()
        if total and int(total[1]) == have:
            return  # everything had arrived before the interruption
        _discard(part)
        raise
    with response:
        tag = response.headers.get("ETag", "")
        tag = response.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdecimal() else size
        start = 0
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)",
                                response.headers.get("Content-Range", ""))
            changed = tag not in ("", headers.get("If-Range", tag))  # which some servers ignore
            if not span or int(span[1]) != have or changed:
                _discard(part)
                raise http.client.HTTPException("the server continued at another place, or another "
                                                "file")
            start = have
            total = int(span[2]) + 1 if span[3] == "*" else int(span[3])
        if size is not None and total != size:
            _discard(part)
            raise DownloadError(f"{url}: the server's file has {total} bytes instead of {size}")
        with open(part, "ab" if start else "wb") as file:
            if not start:
                validator.write_text(tag) if tag else validator.unlink(missing_ok=True)
            meter = _Meter(part.name.removesuffix(".part"), start, total, progress)
            received = start
            while block := response.read1(BLOCK):
                received += len(block)
                if total is not None and received > total:
                    raise DownloadError(
                        f"{url}: the server sent more than the {total} bytes expected")
                file.write(block)
                meter.update(received)
            file.flush()
            os.fsync(file.fileno())
            meter.close(received)
        if total is not None and received < total:
            raise http.client.HTTPException(
                f"the connection ended after {received} of {total} bytes")


class _Meter:
    """Bytes, rate and time left on stderr: in place on a terminal, every ten seconds elsewhere."""

    def __init__(self, name: str, start: int, total: int | None, enabled: bool):
        self.name, self.start, self.total, self.enabled = name, start, total, enabled
        self.terminal = sys.stderr.isatty()
        self.began = self.shown = time.monotonic()

    def update(self, received: int, last: bool = False) -> None:
        now = time.monotonic()
        if not self.enabled or not last and now - self.shown < (0.5 if self.terminal else 10.0):
            return
        self.shown = now
        rate = (received - self.start) / max(now - self.began, 1e-9)
        text = f"{self.name}: {received / 1e6:.1f} MB"
        if self.total:
            left = (self.total - received) / max(rate, 1e-9)
            share = received / self.total
            text += f" of {self.total / 1e6:.1f} ({share:.0%}), {left:.0f} s left"
        text += f", {rate / 1e6:.1f} MB/s"
        print(f"\r{text}\033[K" if self.terminal else text, file=sys.stderr, flush=True,
              end="\n" if last or not self.terminal else "")

    def close(self, received: int) -> None:
        self.update(received, last=True)


# --------------------------------------------------------------------------------------- unpack


def unpack(archive: str | Path, dst: str | Path, *, max_bytes: int | None = None,
           max_ratio: float = 200.0) -> int:
    """Unpacks a tar (also .gz, .bz2, .xz) or zip archive below dst; returns the number of files.

    Refused with UnsafeArchive, and then nothing is added to dst: absolute names, names with "..",
    links, devices, sparse or encrypted members, and contents above max_bytes or above max_ratio
    times the size of the archive (64 MB are always allowed; there, an empty member counts 512
    bytes). Of members with one name the last is kept. Permissions and owners in the archive are
    ignored. A damaged archive raises ValueError.
    """
    if not max_ratio > 0 or max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_ratio must be > 0 and max_bytes >= 0, got {max_ratio}, {max_bytes}")
    archive, dst = Path(archive), Path(dst)
    room = max(FREE_BYTES, max_ratio * archive.stat().st_size)
    limit = room if max_bytes is None else min(room, max_bytes)
    dst.mkdir(parents=True, exist_ok=True)
    staging, folder = dst / ".data_tools-unpack", os.open(dst, os.O_RDONLY)
    try:
        _lock(folder, wait=True)
        shutil.rmtree(staging, ignore_errors=True)  # of a killed process
        staging.mkdir()
        try:
            _extract(archive, staging, limit, room)
            return _move(staging, dst)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(folder)


def _extract(archive: Path, staging: Path, limit: float, room: float) -> None:
    """Members to files below staging, at most `limit` bytes, and `room` bytes of tar headers."""
    packed = archive.stat().st_size
    written = members = 0
    name = ""
    try:
        for name, source in _members(archive):
            target = staging / _safe_name(archive, name)
            members += 1
            if members * tarfile.BLOCKSIZE > room:
                raise UnsafeArchive(f"{archive}: {name!r} is member {members} (the archive has "
                                    f"{packed} bytes); raise max_ratio if it can be trusted")
            if source is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                while block := source.read(BLOCK):
                    written += len(block)
                    if written > limit:
                        raise UnsafeArchive(
                            f"{archive}: {name!r} takes the contents above {limit:.0f} bytes (the "
                            f"archive has {packed}); raise max_bytes and max_ratio if it can be "
                            "trusted")
                    file.write(block)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UnsafeArchive(f"{archive}: {name!r} is both a file and a folder") from error
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(staging / name)
            raise  # the disk; errors of the gzip and bz2 readers carry no number
        raise ValueError(f"{archive}: damaged at {name!r} ({error}); fetch it again") from error


def _move(staging: Path, dst: Path) -> int:
    """Every file below staging to its place below dst, or none; returns their number."""
    def walk() -> Iterator[tuple[Path, Path, list[str], list[str]]]:
        for folder, folders, files in os.walk(staging):
            yield Path(folder), dst / Path(folder).relative_to(staging), folders, files

    for _, place, folders, files in walk():
        for name in folders + files if place.exists() else ():
            there = place / name
            if there.exists() and there.is_dir() != (name in folders):
                raise FileExistsError(f"{there} is in the way: only one of it and of what the "
                                      "archive holds there is a folder")
    moved = 0
    for folder, place, _, files in walk():
        place.mkdir(exist_ok=True)
        for name in files:
            os.replace(folder / name, place / name)
        moved += len(files)
    return moved


def _safe_name(archive: Path, name: str) -> str:
    """The relative name of a member, or UnsafeArchive."""
    parts = name.replace("\\", "/").split("/")
    absolute = parts[0] == "" or re.match("[A-Za-z]:", name)
    if absolute or ".." in parts or "\0" in name or not name:
        raise UnsafeArchive(f"{archive}: {name!r} leads out of the folder")
    return "/".join(part for part in parts if part not in ("", "."))


class _Header(tarfile.TarInfo):
    """A header of a tar archive: where tarfile takes a broken one for the end, an error; no
    extended header (names, comments), which is read into memory, of more than a megabyte."""

    @classmethod
    def frombuf(cls, *arguments) -> tarfile.TarInfo:
        try:
            info = super().frombuf(*arguments)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from error
        if info.type in b"LKxgX" and info.size > BLOCK:
            raise tarfile.ReadError(f"an extended header of {info.size} bytes")
        return info


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """(name, open file or None for a folder) of each member; refuses what is neither."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UnsafeArchive(f"{archive}: {info.filename!r} is a link or a device")
                if info.flag_bits & 1:
                    raise UnsafeArchive(f"{archive}: {info.filename!r} is encrypted")
                if info.is_dir():
                    yield info.filename, None
                else:
                    with bundle.open(info) as file:
                        yield info.filename, file
        return
    try:
        bundle = tarfile.open(archive, "r:*", tarinfo=_Header)
    except tarfile.TarError as error:  # whose message has five lines
        raise ValueError(
            f"{archive} is neither a tar nor a zip archive, or is damaged") from error
    with bundle:
        for info in bundle:
            if info.isdir():
                yield info.name, None
            elif info.isreg() and not info.issparse():
                yield info.name, bundle.extractfile(info)
            else:
                raise UnsafeArchive(
                    f"{archive}: {info.name!r} is a link, a device or a sparse file")
        while bundle.fileobj.read(BLOCK):  # the checksum of gzip and xz comes after the last member
            pass


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.download",
                                     description="Fetch and unpack.")
    parser.add_argument("url")
    parser.add_argument("dst", type=Path, help="file, or an existing folder")
    parser.add_argument("--sha256")
    parser.add_argument("--size", type=int)
    parser.add_argument("--unpack", type=Path, metavar="DIR",
                        help="unpack the tar or zip archive there")
    args = parser.parse_args(argv)
    try:
        path = download(args.url, args.dst, sha256=args.sha256, size=args.size)
        print(path)
        if args.unpack is not None:
            print(f"{unpack(path, args.unpack)} files in {args.unpack}")
    except (DownloadError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
