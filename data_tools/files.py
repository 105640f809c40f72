"""Small files: written whole or not at all, read with errors that name them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | Path,
                content: bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """`content`, or what it writes when called with the file: under a temporary name beside `path`,
    flushed to disk, then renamed over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
