"""Arrays in files: `.npy`, `.npz`, `.pt` and `.safetensors`, read without unpickling and written atomically."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from couplings._names import unknown

__all__ = ["SUFFIXES", "check_output", "check_target", "read_array", "split_key", "write_arrays", "written_atomically"]

SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")

_WITH_KEY = re.compile(rf"(?P<path>.+?(?:{'|'.join(map(re.escape, SUFFIXES))}))(?::(?P<key>.+))?", re.IGNORECASE)

# A file's arrays by name, read when called; the array of a file that names none is called "".
_Arrays = Mapping[str, Callable[[], Tensor]]


def split_key(spec: str) -> tuple[Path, str | None]:
    """Split ``FILE`` or ``FILE:key``.

    Raises
    ------
    ValueError
        If the file has none of the known suffixes.
    """
    matched = _WITH_KEY.fullmatch(spec)
    if matched is None:
        msg = f"{spec}: the suffix says the format, and must be one of {', '.join(SUFFIXES)} (FILE or FILE:key)."
        raise ValueError(msg)
    if Path(spec).is_file():  # a colon may be part of a name
        return Path(spec), None
    return Path(matched["path"]), matched["key"]


def read_array(spec: str) -> Tensor:
    """Read one array.

    Parameters
    ----------
    spec : str
        ``FILE``, or ``FILE:key`` where the file holds several arrays.

    Returns
    -------
    Tensor
        On the CPU, with the dtype of the file.

    Raises
    ------
    OSError
        If there is no such file, or it may not be read.
    ValueError
        If it is not what its suffix says, holds no such array, or holds several and no key is given.

    Notes
    -----
    Nothing is unpickled: files that hold Python objects are refused.
    """
    path, key = split_key(spec)
    if not path.is_file():
        msg = f"{path}: {'this is a folder' if path.is_dir() else 'no such file'}."
        raise FileNotFoundError(msg)
    with _clear_errors(path):
        arrays = _READERS[path.suffix.lower()](path)
    name = _choose(path, list(arrays), key)
    with _clear_errors(path):
        return arrays[name]()


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Say which file it is, whatever the library that parses it raises on damaged bytes."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        msg = (
            f"{path} is no readable {path.suffix} file: it is damaged, of another format, or holds Python objects, "
            f"which are never unpickled ({type(error).__name__})."
        )
        raise ValueError(msg) from error


def _choose(path: Path, names: list[str], key: str | None) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if not names:
        msg = f"{path} holds no array."
    elif key is None:
        msg = f"{path} holds {len(names)} arrays: {', '.join(names)}. Choose one: {path}:{names[0]}"
    elif key in names:
        return key
    elif names == [""]:
        msg = f"{path} holds one array without a name, but {key!r} was asked for. Leave :{key} away."
    else:
        msg = f"{path}: {unknown('array', key, names)}"
    raise ValueError(msg)


def _from_numpy(value: Any) -> Tensor:
    array = np.asarray(value)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _held(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _read_npy(path: Path) -> _Arrays:
    # Not np.load, which looks at the bytes and not at the suffix, and would also open a pickle or an archive.
    with path.open("rb") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return {"": _held(_from_numpy(array))}


def _read_npz(path: Path) -> _Arrays:
    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return _from_numpy(archive[name])

        return read

    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: reader(name) for name in archive.files}


def _read_pt(path: Path) -> _Arrays:
    held = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(held, Tensor):
        return {"": _held(held)}
    if not isinstance(held, dict):
        msg = f"expected a tensor or a dictionary of tensors, got {type(held).__name__}"
        raise TypeError(msg)
    return {str(name): _held(value) for name, value in held.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path) -> _Arrays:
    from safetensors import safe_open

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as archive:
                tensor: Tensor = archive.get_tensor(name)
                return tensor

        return read

    with safe_open(path, framework="pt") as archive:
        return {name: reader(name) for name in archive.keys()}  # noqa: SIM118 - the archive is no mapping


_READERS: dict[str, Callable[[Path], _Arrays]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
}


def check_output(path: Path, *, force: bool) -> None:
    """Refuse early what could not be written in the end.

    Raises
    ------
    ValueError
        For an unknown suffix.
    OSError
        If the folder does not exist, or the file does and `force` is not set.
    """
    if path.suffix.lower() not in SUFFIXES:
        msg = f"{path}: the suffix says the format, and must be one of {', '.join(SUFFIXES)}."
        raise ValueError(msg)
    check_target(path, force=force)


def check_target(path: Path, *, force: bool) -> None:
    """Check that a file can be put there.

    Raises
    ------
    OSError
        If the folder does not exist, or the file does and `force` is not set.
    """
    if path.is_dir():
        msg = f"{path}: this is a folder; name a file in it."
        raise IsADirectoryError(msg)
    if not path.parent.is_dir():
        msg = f"{path}: the folder {path.parent} does not exist. Make it first."
        raise FileNotFoundError(msg)
    if path.exists() and not force:
        msg = f"{path} exists. Choose another name, or pass --force to overwrite it."
        raise FileExistsError(msg)


def write_arrays(path: Path, arrays: Mapping[str, Tensor], *, force: bool = False) -> None:
    """Write arrays under their names; `.npy`, which has no names, takes the first only.

    Parameters
    ----------
    path : Path
        Its suffix says the format.
    arrays : mapping of str to Tensor
    force : bool
        Whether to replace a file.

    Raises
    ------
    OSError
        If the file exists, or cannot be written; a file that was there is then still there, unchanged.
    TypeError
        If the format has no such dtype.
    """
    check_output(path, force=force)
    suffix = path.suffix.lower()
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in arrays.items()}
    with written_atomically(path, force=force) as file:
        if suffix == ".pt":
            torch.save(held, file)
        elif suffix == ".safetensors":
            from safetensors.torch import save

            file.write(save(held))
        elif suffix == ".npz":
            np.savez(file, **{name: _to_numpy(tensor, path) for name, tensor in held.items()})
        else:
            np.save(file, _to_numpy(next(iter(held.values())), path), allow_pickle=False)


def _to_numpy(tensor: Tensor, path: Path) -> Any:
    try:
        return tensor.numpy()
    except TypeError as error:
        msg = f"{path}: NumPy has no {tensor.dtype}. Write a .safetensors or .pt file."
        raise TypeError(msg) from error


@contextmanager
def written_atomically(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place once it is complete and on disk.

    Raises
    ------
    OSError
        If `path` exists by then and `force` is not set, or the disk is full. Nothing is left behind.
    """
    target = path.resolve()  # a link is followed, not replaced
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_target(path, force=force)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
