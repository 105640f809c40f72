"""Small files that land whole, or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """`content` under a temporary name beside `path`, flushed to disk, then renamed over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
