"""Arrays in files: every format there and back, nothing unpickled, nothing lost."""

import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from couplings.ablation.files import SUFFIXES, read_array, write_arrays, written_atomically

ARRAY = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_come_back_and_are_what_the_formats_own_libraries_read(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_arrays(path, {"noise": ARRAY, "index": torch.arange(2)})
    read = {
        ".npy": lambda: {"noise": torch.from_numpy(np.load(path))},
        ".npz": lambda: {name: torch.from_numpy(array) for name, array in np.load(path).items()},
        ".pt": lambda: torch.load(path, weights_only=True),
        ".safetensors": lambda: safetensors.torch.load_file(path),
    }
    found = read[suffix]()
    assert set(found) == ({"noise"} if suffix == ".npy" else {"noise", "index"})
    assert torch.equal(found["noise"], ARRAY)
    assert torch.equal(read_array(f"{path}{'' if suffix == '.npy' else ':noise'}"), ARRAY)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bfloat16_is_kept_bit_for_bit(tmp_path, suffix):
    write_arrays(tmp_path / f"half{suffix}", {"x": ARRAY.bfloat16()})
    assert torch.equal(read_array(str(tmp_path / f"half{suffix}")), ARRAY.bfloat16())
    with pytest.raises(TypeError, match=r"NumPy has no torch.bfloat16"):
        write_arrays(tmp_path / "half.npz", {"x": ARRAY.bfloat16()})
    assert not (tmp_path / "half.npz").exists()


def test_foreign_byte_order_and_names_with_colons_are_read(tmp_path):
    np.save(tmp_path / "a:b.npy", ARRAY.numpy().astype(">f4"))
    assert torch.equal(read_array(str(tmp_path / "a:b.npy")), ARRAY)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return (os.mkdir, ("trapped",))


@pytest.mark.parametrize("name", ["objects.npy", "objects.npz", "objects.pt", "pickle.npy", "pickle.npz", "pickle.pt"])
def test_nothing_is_ever_unpickled(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Trap()] * 12, dtype=object)
    np.save("objects.npy", objects, allow_pickle=True)
    np.savez("objects.npz", objects=objects)
    torch.save(Trap(), "objects.pt")
    for suffix in (".npy", ".npz", ".pt"):
        (tmp_path / f"pickle{suffix}").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=f"{name} is no readable .* never unpickled"):
        read_array(name)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("absent.npy", "absent.npy: no such file"),
        ("folder.npy", "this is a folder"),
        ("images.txt", ".safetensors"),
        ("both.npz", "Choose one: both.npz:images"),
        ("both.npz:image", "Did you mean 'images'"),
        ("one.npy:images", "one array without a name"),
        ("empty.pt", "holds no array"),
        ("list.pt", "list.pt is no readable .pt file"),
        ("void.npy", "void.npy is no readable .npy file"),
        ("other.npy", "other.npy is no readable .npy file"),
        *((f"torn{suffix}", f"torn{suffix} is no readable {suffix} file") for suffix in SUFFIXES),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, spec, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npy").mkdir()
    np.savez("both.npz", images=ARRAY.numpy(), noise=ARRAY.numpy())
    for suffix in SUFFIXES:
        write_arrays(tmp_path / f"one{suffix}", {"x": ARRAY})
        (tmp_path / f"torn{suffix}").write_bytes((tmp_path / f"one{suffix}").read_bytes()[:60])
    (tmp_path / "other.npy").write_bytes((tmp_path / "both.npz").read_bytes())
    (tmp_path / "void.npy").touch()
    torch.save({"epoch": 3}, "empty.pt")
    torch.save([ARRAY], "list.pt")
    with pytest.raises((ValueError, OSError)) as error:
        read_array(spec)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("out", "said"), [("absent/out.npy", "does not exist"), ("out.txt", ".safetensors"), ("there.npy", "--force")]
)
def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch, out, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npy").write_bytes(b"precious")
    with pytest.raises((ValueError, OSError), match=said):
        write_arrays((tmp_path / out).relative_to(tmp_path), {"x": ARRAY})
    assert (tmp_path / "there.npy").read_bytes() == b"precious"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        write_arrays(out, {"x": ARRAY}, force=True)
    assert out.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out.pt"

    def write():
        with written_atomically(out, force=False) as file:
            file.write(b"mine")
            out.write_bytes(b"theirs")

    with pytest.raises(FileExistsError):
        write()
    assert out.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [out]


def test_writers_of_a_new_file_meet_at_the_last_moment(tmp_path, monkeypatch):
    """Another makes it after it was looked for."""
    out = tmp_path / "out.pt"
    link = os.link

    def late(source, target):
        out.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileExistsError, match=r"out\.pt'$"), written_atomically(out, force=False) as file:
        file.write(b"mine")
    assert out.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [out]


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with written_atomically(tmp_path / "out", force=False) as file:
        file.write(b"mine")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_what_a_killed_writer_left_is_removed_and_what_another_writes_is_not(tmp_path):
    out = tmp_path / "out[1].npy"
    remains = tmp_path / ".out[1].npy.0badcafe.part"
    remains.touch()
    with written_atomically(out, force=True) as first, written_atomically(out, force=True) as second:
        assert not remains.exists()
        assert len(list(tmp_path.glob(".*.part"))) == 2
        first.write(b"1")
        second.write(b"2")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_bytes() == b"1"  # it was finished last
