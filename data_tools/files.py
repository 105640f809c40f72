"""Small files: written whole or not at all, read with errors that name them."""

import os
import pickle
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | Path,
                content: bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """`content`, or what it writes when called with the file: under a temporary name beside `path`,
    flushed to disk, then renamed over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: str | Path, missing: str = "no such file") -> str:
    """UTF-8 text, without a byte order mark; FileNotFoundError or ValueError with the file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: {missing}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def read_lines(path: str | Path, missing: str = "no such file") -> Iterator[tuple[str, str]]:
    """("file:line", line) of the lines of a text that are not blank. Unlike with `str.splitlines`,
    rare characters end none."""
    for number, line in enumerate(read_text(path, missing).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def existing(path: Path, what: str) -> Path:
    """The path itself; FileNotFoundError if there is nothing."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {what}")
    return path


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong with the contents of a file becomes a ValueError that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, EOFError,
            pickle.UnpicklingError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not {what} ({reason})") from error
