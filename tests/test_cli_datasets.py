"""`couplings fit` and `couplings quality`, and the datasets that they read."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from couplings.ablation.files import read_classes, read_dataset
from couplings.cli import main
from couplings.semidiscrete import Semidiscrete, fit


@pytest.fixture
def rows():
    return torch.randn(200, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path, rows, monkeypatch):
    """A folder to work in, with data and classes."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", rows.half().numpy())
    np.savez("both.npz", rows=rows.numpy(), labels=np.arange(200) % 2)
    return tmp_path


def write_idx(path, array, compressed):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    if compressed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command line."""
    code = main([word for argument in argv for word in str(argument).split()])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_fit_writes_the_plan_of_the_library_and_quality_measures_it(capsys, folder, rows):
    code, said, complained = run(capsys, "fit rows.npy -o plan.safetensors --tolerance 0.1 --seed 3")
    assert (code, complained) == (0, "")
    expected = fit(rows.half(), tolerance=0.1, seed=3)
    plan = Semidiscrete.load("plan.safetensors", rows.half())
    assert torch.equal(plan.potentials, expected.potentials)
    assert f"chi2            {plan.chi2:.6g}" in said
    code, said, complained = run(capsys, "quality plan.safetensors rows.npy --json")
    assert (code, complained) == (0, "")
    found = json.loads(said)
    assert found["chi2"] == plan.chi2
    assert found["distance"] < found["minibatch_2048"] < found["independent"]
    assert "minibatch_2048" in run(capsys, "quality plan.safetensors rows.npy")[1]


def test_fit_takes_every_choice_that_the_library_takes(capsys, folder, rows):
    argv = "fit both.npz:rows -o plan.safetensors --classes both.npz:labels --mirrored --batch-size 64 --steps 5 "
    argv += "--tolerance 1e-6 --device cpu --checkpoint state --json"
    code, said, complained = run(capsys, argv)
    assert code == 0
    assert "tolerance=1e-06 was not reached" in complained or not complained
    found = json.loads(said)
    assert (found["rows"], found["shape"], found["classes"], found["mirrored"]) == (200, [3, 4], 2, True)
    expected = fit(rows, classes=torch.arange(200) % 2, mirrored=True, batch_size=64, steps=5, tolerance=1e-6)
    assert torch.equal(Semidiscrete.load("plan.safetensors", rows).potentials, expected.potentials)
    code, said, _ = run(capsys, argv.replace("--steps 5", "--steps 9"), "--force")  # goes on
    assert json.loads(said)["chi2"] != found["chi2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("fit missing.npy -o plan", "no such file"),
        ("fit rows.txt -o plan", "the suffix says the format"),
        ("fit . -o plan", "train-images-idx3-ubyte: no such file"),
        ("fit both.npz:labels -o plan", "must be floating"),
        ("fit rows.npy -o rows.npy --force", "is also an input"),
        ("fit rows.npy -o plan --checkpoint rows.npy", "is also an input"),
        ("fit rows.npy -o taken", "taken exists"),
        ("fit rows.npy -o missing/plan", "the folder missing does not exist"),
        ("fit rows.npy -o plan --classes rows.npy", "must be integers"),
        ("fit rows.npy -o plan --tolerance 0", "tolerance= must be above 0"),
        ("fit rows.npy -o plan --steps 0", "--steps"),
        (
            "fit rows.npy -o plan --device nowhere",
            "--device nowhere: no device is called that. Try cpu, cuda or cuda:1.",
        ),
        ("fit rows.npy -o plan --checkpoint taken", "is no checkpoint"),
        ("fit rows.npy -o plan --checkpoint .", "this is a folder"),
        ("fit rows.npy", "output"),
        ("quality taken rows.npy", "is no plan"),
        ("quality missing rows.npy", "no such file"),
        ("quality plan.safetensors both.npz:rows", "fitted to other data"),
        ("quality plan.safetensors rows.npy --rows 100", "--rows"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_nothing_written(capsys, folder, rows, argv, message):
    (folder / "taken").write_bytes(b"taken")
    if argv.startswith("quality plan"):
        fit(rows.half(), steps=1, tolerance=1e9).save("plan.safetensors")
    before = sorted(path.name for path in folder.iterdir())
    code, said, complained = run(capsys, argv)
    assert (code, said) == (2, "")
    assert complained.startswith("couplings: error: ")
    assert message in complained
    assert complained.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder where nobody can write")
@pytest.mark.parametrize("argv", ["-o /sys/p.safetensors", "-o plan --checkpoint /sys/p.safetensors"])
def test_fit_refuses_what_cannot_be_written_before_it_begins(capsys, folder, monkeypatch, argv):
    monkeypatch.setattr("couplings.semidiscrete.fit", lambda *_, **__: pytest.fail("it began"))
    code, said, complained = run(capsys, "fit rows.npy", argv)
    assert (code, said) == (2, "")
    assert complained.endswith("'/sys/p.safetensors'\n")
    assert ".part" not in complained


@pytest.mark.parametrize("compressed", [False, True])
def test_folders_of_idx_files_are_read(tmp_path, compressed):
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3), np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", images, compressed)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(5, dtype=np.uint8), compressed)
    data = read_dataset(str(tmp_path))
    assert torch.equal(data, (torch.from_numpy(images)[:, None].float() / 127.5) - 1)
    assert read_classes(str(tmp_path)).tolist() == [0, 1, 2, 3, 4]
    np.save(tmp_path / "bytes.npy", images)
    assert torch.equal(read_dataset(str(tmp_path / "bytes.npy")), data[:, 0])


def test_damaged_idx_files_are_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.zeros((5, 2, 3), np.uint8), False)
    whole = path.read_bytes()
    for damaged in (b"", whole[:3], whole[:10], whole[:-1], whole + b"0", b"1" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no complete idx file"):
            read_dataset(str(tmp_path))
    path.rename(path.with_suffix(".gz"))
    with pytest.raises(ValueError, match="no complete idx file"):
        read_dataset(str(tmp_path))


def test_npy_files_stay_on_disk(folder):
    assert isinstance(read_dataset("rows.npy"), np.memmap)
    (folder / "bad.npy").write_bytes((folder / "rows.npy").read_bytes()[:50])
    with pytest.raises(ValueError, match="is no readable"):
        read_dataset("bad.npy")
