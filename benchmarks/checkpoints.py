"""Snapshots of a run and weights of networks: read with errors that name the file, written whole
under a temporary name and renamed."""

import re
import zipfile
from pathlib import Path

import torch

from records import write_atomically


def write_tensors(path: Path, value: dict) -> None:
    try:
        write_atomically(path, lambda file: torch.save(value, file))
    except RuntimeError as error:                             # how torch.save reports a full disk
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error


def read_tensors(path: Path) -> dict:
    """A checkpoint, on the CPU; ValueError for any other file."""
    open(path, "rb").close()                                  # an OSError that names it, if any
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")                # torch.load would not see it
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                # of many types, if it is damaged
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None


def load_weights(model: torch.nn.Module, path: Path, head: bool = True) -> torch.nn.Module:
    """A checkpoint of the model: a plain state dict or one under "model" or "state_dict".

    head=False: the last layer stays as it is. ValueError for what does not fit.
    """
    state = read_tensors(path)
    try:
        for wrapper in ("model", "state_dict"):
            state = state.get(wrapper, state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if not head:
            own = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
            state = {key: v for key, v in state.items() if not key.startswith("fc.")} | own
        model.load_state_dict(state)
    except Exception as error:  # of many types, if the state is not a network's
        raise ValueError(f"{path} does not fit this model: {error}") from None
    return model


class Snapshots:
    """The newest snapshots of a run's parts in `folder`, `<name>-<step>.rank<r>.pt`; each process
    writes its own, and all go on from the newest step that every one of them has."""

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1):
        self.folder, self.rank, self.world_size = folder, rank, world_size

    def newest(self, name: str) -> int:
        """0: there is none."""
        steps = [set(self._steps(name, rank)) for rank in range(self.world_size)]
        return max(set.intersection(*steps), default=0)

    def read(self, name: str, step: int) -> dict:
        try:
            return read_tensors(self._path(name, step))
        except ValueError as error:
            raise ValueError(f"{error}; remove it, and --resume goes on from the snapshot before "
                             "it") from None

    def write(self, name: str, step: int, snapshot: dict) -> None:
        write_tensors(self._path(name, step), snapshot)

    def keep(self, name: str, count: int) -> None:
        """Remove all of this process but the newest `count`."""
        steps = self._steps(name, self.rank)
        for step in steps[:max(0, len(steps) - count)]:
            self._path(name, step).unlink(missing_ok=True)

    def _path(self, name: str, step: int) -> Path:
        return self.folder / f"{name}-{step:08d}.rank{self.rank}.pt"

    def _steps(self, name: str, rank: int) -> list[int]:
        pattern = re.compile(re.escape(name) + rf"-(\d{{8}})\.rank{rank}\.pt")
        names = (path.name for path in self.folder.iterdir())
        return sorted(int(m[1]) for m in map(pattern.fullmatch, names) if m)
