"""Arrays in files: `.npy`, `.npz`, `.pt` and `.safetensors`, read without unpickling and written atomically.

Whole datasets are read as well from folders of idx files, as the MNIST family comes in; `.npy` files stay on disk.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couplings._files import check_target, written_atomically
from couplings._names import unknown
from couplings.inputs import Array

__all__ = [
    "SUFFIXES",
    "check_output",
    "read_array",
    "read_classes",
    "read_dataset",
    "read_idx",
    "split_key",
    "write_arrays",
]

SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")

_WITH_KEY = re.compile(rf"(?P<path>.+?(?:{'|'.join(map(re.escape, SUFFIXES))}))(?::(?P<key>.+))?", re.IGNORECASE)


def split_key(spec: str) -> tuple[Path, str | None]:
    """Split ``FILE`` or ``FILE:key``; a ValueError if the file has none of the known suffixes."""
    matched = _WITH_KEY.fullmatch(spec)
    if matched is None:
        msg = f"{spec}: the suffix says the format, and must be one of {', '.join(SUFFIXES)} (FILE or FILE:key)."
        raise ValueError(msg)
    if Path(spec).is_file():  # a colon may be part of a name
        return Path(spec), None
    return Path(matched["path"]), matched["key"]


def read_array(spec: str) -> Tensor:
    """Read one array onto the CPU. Nothing is unpickled: files that hold Python objects are refused.

    Parameters
    ----------
    spec : str
        ``FILE``, or ``FILE:key`` where the file holds several arrays.

    Raises
    ------
    OSError
        If there is no such file, or it may not be read.
    ValueError
        If it is not what its suffix says, holds no such array, or holds several and no key is given.
    """
    path, key = split_key(spec)
    if not path.is_file():
        msg = f"{path}: {'this is a folder' if path.is_dir() else 'no such file'}."
        raise FileNotFoundError(msg)
    with ExitStack() as opened:
        with _clear_errors(path):
            arrays = _open(path, opened)
        name = _choose(path, list(arrays), key)
        with _clear_errors(path):
            value = arrays[name]
            if isinstance(value, Tensor):
                return value
            return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))


def read_dataset(spec: str) -> Array:
    """Read a whole dataset onto the CPU; bytes are taken for images and scaled, ``x / 127.5 - 1`` in float32.

    Parameters
    ----------
    spec : str
        ``FILE`` or ``FILE:key`` as for `read_array`, but ``.npy`` is mapped from disk; or a folder with
        ``train-images-idx3-ubyte``, gzipped or not, of which ``(n, 1, h, w)`` is made.
    """
    if Path(spec).is_dir():
        data: Array = torch.from_numpy(read_idx(Path(spec) / "train-images-idx3-ubyte"))[:, None]
    elif spec.lower().endswith(".npy") and Path(spec).is_file():
        with _clear_errors(Path(spec)):
            data = np.lib.format.open_memmap(spec, mode="r")
    else:
        data = read_array(spec)
    if str(data.dtype).endswith("uint8"):
        pixels = data if isinstance(data, Tensor) else torch.from_numpy(np.array(data))
        data = pixels.float().div_(127.5).sub_(1.0)
    return data


def read_classes(spec: str) -> Tensor:
    """Read classes: a file of integers, or a folder with ``train-labels-idx1-ubyte``, gzipped or not."""
    if Path(spec).is_dir():
        return torch.from_numpy(read_idx(Path(spec) / "train-labels-idx1-ubyte"))
    return read_array(spec)


def read_idx(path: Path) -> Any:
    """Read an idx file of bytes, gzipped or not: two zeros, the type, the number of axes, their lengths, the bytes.

    Raises
    ------
    OSError
        If there is no such file, or it may not be read.
    ValueError
        If it is not whole.
    """
    found = [file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()]
    if not found:
        msg = f"{path}: no such file, nor with .gz."
        raise FileNotFoundError(msg)
    try:
        content = found[0].read_bytes()
        content = gzip.decompress(content) if found[0].suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error):
        content = b""
    axes = int(path.name.partition("-idx")[2][0])
    head, values = content[: 4 + 4 * axes], content[4 + 4 * axes :]
    lengths = [int.from_bytes(head[at : at + 4]) for at in range(4, len(head), 4)]
    if head[:4] != bytes([0, 0, 8, axes]) or len(lengths) != axes or math.prod(lengths) != len(values):
        msg = f"{found[0]} is no complete idx file of bytes."
        raise ValueError(msg)
    return np.frombuffer(values, np.uint8).reshape(lengths).copy()


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Name the file, whatever the library that parses it raises on damaged bytes."""
    try:
        yield
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        msg = (
            f"{path} is no readable {path.suffix} file: it is damaged, of another format, or holds Python objects, "
            f"which are never unpickled ({type(error).__name__})."
        )
        raise ValueError(msg) from error


def _open(path: Path, opened: ExitStack) -> Mapping[str, Any]:
    """Return the arrays of a file by name; the array of a file that names none is called ``""``."""
    suffix = path.suffix.lower()
    if suffix == ".npy":  # not by np.load, which looks at the bytes and not at the suffix
        with path.open("rb") as file:
            return {"": np.lib.format.read_array(file, allow_pickle=False)}
    if suffix == ".npz":
        file = opened.enter_context(path.open("rb"))  # closed here: np.load leaves it open when it fails
        archive: Mapping[str, Any] = opened.enter_context(np.load(file, allow_pickle=False))
        return archive  # reads an array when it is asked for
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        return {"": loaded}
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


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


def check_output(path: Path, *, force: bool) -> None:
    """Check that arrays can be written there, before they are computed: the suffix, and what `check_target` checks."""
    if path.suffix.lower() not in SUFFIXES:
        msg = f"{path}: the suffix says the format, and must be one of {', '.join(SUFFIXES)}."
        raise ValueError(msg)
    check_target(path, force=force)


def write_arrays(path: Path, arrays: Mapping[str, Tensor], *, force: bool = False) -> None:
    """Write arrays under their names in the format of the suffix; `.npy`, which has no names, takes the first only.

    Raises
    ------
    OSError
        If the file exists and `force` is not set, or it cannot be written: what was there is then there unchanged.
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
