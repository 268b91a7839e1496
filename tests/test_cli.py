"""The `couplings` command, through `main(argv)` as a user would type it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import couplings
from couplings.assigners import registry
from couplings.cli import main


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.rand(12, 3, 4, 4, generator=generator),
        "noise": torch.randn(12, 3, 4, 4, generator=generator),
    }


@pytest.fixture
def folder(tmp_path, arrays, monkeypatch):
    """A folder to work in, with data and noise."""
    monkeypatch.chdir(tmp_path)
    for name, tensor in arrays.items():
        np.save(f"{name}.npy", tensor.numpy())
        torch.save(tensor, f"{name}.pt")
    np.savez("both.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    return tmp_path


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command line, given in words or as one string."""
    code = main([word for argument in argv for word in str(argument).split()])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- couple


@pytest.mark.parametrize("out", ["out.npy", "out.npz"])
def test_couple_writes_what_couple_returns(capsys, folder, arrays, out):
    code, said, complained = run(capsys, "couple", "both.npz:images", "noise.npy", "-o", out)
    expected = couplings.couple(arrays["images"], arrays["noise"])
    assert (code, complained) == (0, "")
    found = np.load(out)
    if out == "out.npz":
        assert np.array_equal(found["index"], expected.index)
        found = found["noise"]
    assert np.array_equal(found, expected.noise)
    assert not np.array_equal(found, arrays["noise"])
    assert f"reduction  {float(expected.reduction):.6g}\n" in said
    assert "gap        0\n" in said
    assert "marginal   permutation\n" in said
    assert out in said


def test_couple_takes_every_choice_that_the_library_takes(capsys, folder, arrays):
    labels = torch.arange(12) % 3
    torch.save({"labels": labels, "epoch": 4}, "labels.pt")
    argv = "couple both.npz:images both.npz:noise -o out.pt --metric l2 --quantize int8 "
    argv += "--condition labels.pt:labels --method SINKHORN:reg=0.5:draw=permutation "
    assert run(capsys, argv, "--seed 7")[0] == 0
    expected = couplings.couple(
        arrays["images"],
        arrays["noise"],
        "sinkhorn",
        metric="l2",
        quantize="int8",
        condition=labels,
        generator=torch.Generator().manual_seed(7),
        reg=0.5,
    )
    found = torch.load("out.pt", weights_only=True)
    assert torch.equal(found["index"], expected.index)
    assert torch.equal(labels[found["index"]], labels)
    assert run(capsys, argv, "--seed 8 -o other.pt")[0] == 0
    assert not torch.equal(torch.load("other.pt", weights_only=True)["index"], expected.index)


def test_couple_says_where_there_is_no_certificate_and_what_was_selected(capsys, folder, arrays):
    torch.save(torch.cat([arrays["noise"], arrays["noise"] + 1]), "candidates.pt")
    code, said, _ = run(capsys, "couple", "images.pt", "candidates.pt", "-o", "out.pt", "--method", "nearest")
    assert code == 0
    assert "gap        no certificate\n" in said
    assert "marginal   selected\n" in said


# --- errors

BAD_COUPLE = {
    "missing file": (["absent.npy", "noise.npy"], "absent.npy: no such file"),
    "torn": (["torn.npy", "noise.npy"], "torn.npy is no readable .npy file"),
    "shapes": (["images.npy", "flat.npy"], "must agree in all axes but the first"),
    "rows": (["images.npy", "few.npy"], "12 rows of data and 5 of noise"),
    "NaN": (["images.npy", "nan.npy"], "noise contains NaN or infinity in 1 of 12 rows (first: row 3)"),
    "dtypes": (["images.npy", "double.npy"], "float64"),
    "method": (["images.npy", "noise.npy", "--method", "auctoin"], "Did you mean 'auction'"),
    "metric": (["images.npy", "noise.npy", "--metric", "l3"], "unknown metric 'l3'. Did you mean"),
    "quantizer": (["images.npy", "noise.npy", "--quantize", "fp15"], "Did you mean 'fp16'"),
    "option": (["images.npy", "noise.npy", "--method", "auction:tolerence=1"], "Did you mean 'tolerance'"),
    "option twice": (["images.npy", "noise.npy", "--method", "auction:tolerance=1:tolerance=2"], "twice"),
    "option syntax": (["images.npy", "noise.npy", "--method", "auction:tolerance=1:seconds"], "name=value"),
    "option of the call": (["images.npy", "noise.npy", "--method", "auction:scope=global"], "scope"),
    "reg": (["images.npy", "noise.npy", "--method", "sinkhorn:reg=-1"], "reg= must be positive"),
    "seed": (["images.npy", "noise.npy", "--seed", "-1"], "--seed"),
    "condition": (["images.npy", "noise.npy", "--condition", "few.npy:labels"], "without a name"),
    "condition rows": (["images.npy", "noise.npy", "--condition", "labels.npy"], "condition= must have shape (12,)"),
    "positional": (["images.npy"], "NOISE"),
    "flag": (["images.npy", "noise.npy", "--metrik", "l2"], "--metric"),
}


@pytest.mark.parametrize("case", BAD_COUPLE)
def test_bad_input_is_one_line_on_stderr_and_nothing_written(capsys, folder, arrays, case):
    argv, message = BAD_COUPLE[case]
    (folder / "torn.npy").write_bytes((folder / "images.npy").read_bytes()[:100])
    noise = arrays["noise"].numpy()
    np.save("flat.npy", noise.reshape(12, -1))
    np.save("few.npy", noise[:5])
    np.save("double.npy", noise.astype(np.float64))
    np.save("labels.npy", np.arange(5))
    spoiled = noise.copy()
    spoiled[3, 0, 0, 0] = np.nan
    np.save("nan.npy", spoiled)
    before = sorted(folder.iterdir())

    code, said, complained = run(capsys, "couple", *argv, "-o", "out.npy")

    assert (code, said) == (2, "")
    assert complained.startswith("couplings: error: ")
    assert complained.count("\n") == 1
    assert message in complained
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("out", "message"), [("out.txt", ".safetensors"), ("images.npy", "exists"), (".", "suffix")])
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_read(capsys, folder, out, message):
    code, said, complained = run(capsys, "couple", "absent.npy", "noise.npy", "-o", out)
    assert (code, said) == (2, "")
    assert complained.count("\n") == 1
    assert message in complained


def test_an_input_is_not_overwritten_even_by_force(capsys, folder):
    before = (folder / "noise.npy").read_bytes()
    code, _, complained = run(capsys, "couple", "images.npy", "noise.npy", "-o", folder / "noise.npy", "--force")
    assert code == 2
    assert "also an input" in complained
    assert (folder / "noise.npy").read_bytes() == before


def test_traceback_is_shown_on_request(capsys, folder):
    code, _, complained = run(capsys, "--traceback", "couple", "absent.npy", "noise.npy", "-o", "out.npy")
    assert code == 2
    assert "Traceback" in complained
    assert complained.endswith("couplings: error: absent.npy: no such file.\n")


@pytest.mark.parametrize("argv", [[], ["cuple"], ["methods", "--jsn"], ["compare", "--repeats", "0"]])
def test_bad_command_lines_point_to_the_help(capsys, argv):
    code, said, complained = run(capsys, *argv)
    assert (code, said) == (2, "")
    assert complained.count("\n") == 1
    assert "--help" in complained


# --- compare


def strict(text):
    """Parse one JSON document, refusing what strict JSON has not."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_compare_json_is_one_list_with_a_cell_for_every_method(capsys):
    code, said, complained = run(capsys, "compare", "-n", 16, "--repeats", 1, "--json")
    cells = strict(said)
    assert (code, complained) == (0, "")
    assert [cell["method"] for cell in cells] == [info.name for info in couplings.methods()]
    for cell in cells:
        assert {"method", "metric", "quantize", "n", "reduction", "gap", "seconds"} <= cell.keys()
        assert (cell["metric"], cell["quantize"], cell["n"]) == ("sqeuclidean", None, 16)
        assert cell["seconds"] > 0
    assert max(cell["reduction"] for cell in cells if cell["method"] != "nearest") == pytest.approx(
        next(cell["reduction"] for cell in cells if cell["method"] == "auction")
    )


def test_compare_measures_every_combination_on_given_arrays(capsys, folder, arrays):
    argv = "compare both.npz:images noise.pt --methods exact,greedy --metrics l2,cosine --quantizers none,int8"
    code, said, _ = run(capsys, argv, "--repeats", 1, "--json")
    cells = strict(said)
    assert code == 0
    assert [(cell["metric"], cell["quantize"], cell["method"]) for cell in cells] == [
        (metric, quantize, method)
        for metric in ("l2", "cosine")
        for quantize in (None, "int8")
        for method in ("auction", "greedy")
    ]
    coupled = couplings.couple(arrays["images"], arrays["noise"], metric="l2")
    assert cells[0]["reduction"] == pytest.approx(float(coupled.reduction), abs=1e-6)
    assert {cell["data"] for cell in cells} == {"both.npz:images"}


def test_compare_takes_the_first_rows_and_draws_noise_where_none_is_given(capsys, folder, arrays):
    code, said, _ = run(capsys, "compare", "images.pt", "-n", 8, "--methods", "nearest,auction", "--json")
    cells = strict(said)
    assert code == 0
    assert [(cell["n"], cell["noise_rows"]) for cell in cells] == [(8, 32), (8, 8)]
    noise = torch.randn((32, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    coupled = couplings.couple(arrays["images"][:8], noise[:8])
    assert cells[1]["reduction"] == pytest.approx(float(coupled.reduction), abs=1e-6)


def test_compare_gives_candidates_of_a_larger_noise_file_to_nearest_only(capsys, folder, arrays):
    torch.save(torch.cat([arrays["noise"]] * 3), "thrice.pt")
    argv = "compare images.pt thrice.pt --methods nearest,auction --repeats 1 --json"
    cells = strict(run(capsys, argv)[1])
    assert [(cell["n"], cell["noise_rows"]) for cell in cells] == [(12, 36), (12, 12)]
    cells = strict(run(capsys, argv, "-n", 8)[1])
    assert [(cell["n"], cell["noise_rows"]) for cell in cells] == [(8, 32), (8, 8)]


def test_compare_skips_by_default_what_it_refuses_by_name(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    code, said, _ = run(capsys, "compare", "images.pt", "noise.pt", "--repeats", 1, "--json")
    skipped = {cell["method"]: cell["skipped"] for cell in strict(said) if cell["skipped"]}
    assert code == 0
    assert skipped.keys() == {"emd", "nearest"}
    assert "couplings[pot]" in skipped["emd"]
    assert all(cell["reduction"] is cell["gap"] is None for cell in strict(said) if cell["skipped"])
    code, said, complained = run(capsys, "compare", "images.pt", "noise.pt", "--methods", "auction,emd", "--json")
    assert (code, said) == (2, "")
    assert "pip install 'couplings[pot]'" in complained
    code, _, complained = run(capsys, "compare", "images.pt", "noise.pt", "--methods", "nearest")
    assert code == 2
    assert "k * 12 rows" in complained
    table = run(capsys, "compare", "images.pt", "noise.pt", "--repeats", 1)[1]
    assert "emd: pot not installed: pip install 'couplings[pot]'" in table


def test_compare_table_says_what_a_reader_needs(capsys):
    code, said, complained = run(capsys, "compare", "-n", 16, "--repeats", 2)
    assert (code, complained) == (0, "")
    for info in couplings.methods():
        assert f" {info.name} " in said
    assert "16 rows of built-in image crops, 3x32x32, sqeuclidean" in said
    assert "nearest: k = 4 candidates per row" in said
    assert "median of 2 warm calls" in said
    assert "…" not in said


def test_compare_has_a_table_for_each_metric_and_quantizer_that_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    argv = "compare -n 16 --repeats 1 --methods auction,nearest --metrics sqeuclidean,l1 --quantizers none,fp8_e5m2"
    said = run(capsys, argv)[1]
    titles = ("sqeuclidean", "sqeuclidean, fp8_e5m2", "l1", "l1, fp8_e5m2")
    assert all(f"3x32x32, {title} " in said for title in titles)
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said


def test_compare_draws_a_plot(capsys, folder):
    code, said, complained = run(capsys, "compare", "-n", 8, "--repeats", 1, "--json", "--plot", "out.png")
    assert code == 0
    assert len(strict(said)) == len(couplings.methods())
    assert complained == "wrote out.png\n"
    from matplotlib.image import imread

    picture = imread("out.png")
    assert picture.shape[0] > 400
    # Every method's colour is in the panel, left of the legend: axes and grid are grey.
    panel = picture[:, : picture.shape[1] * 2 // 3, :3].reshape(-1, 3)
    coloured = panel[np.ptp(panel, axis=1) > 0.3]
    assert len(np.unique(coloured.round(1), axis=0)) >= 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plot", "absent/out.png"], "does not exist"),
        (["--plot", "out.xyz"], ".png"),
        (["--methods", "greddy"], "Did you mean 'greedy'"),
        (["--methods", "greedy,"], "commas"),
        (["--metrics", "l2,l4"], "unknown metric 'l4'"),
        (["--quantizers", "int9"], "Did you mean 'int8'"),
        (["--methods", "sinkhorn:regg=1"], "Did you mean 'reg'"),
        (["--methods", "auction:reg=1"], "unknown option"),
        (["--methods", "absent.module:function"], "No module named 'absent'. Name a function that can be imported"),
        (["images.pt", "-n", "13"], "12 rows, fewer than -n 13"),
        (["images.pt", "nan.pt"], "NaN"),
        (["images.pt", "few.pt"], "5 of noise"),
        (["bytes.pt"], "must be floating"),
        (["scalar.pt"], "batch axis"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_compare_refuses_bad_input_in_one_line(capsys, folder, arrays, argv, message):
    torch.save(torch.full((12, 3, 4, 4), torch.nan), "nan.pt")
    torch.save(arrays["noise"][:5].clone(), "few.pt")
    torch.save(torch.zeros(12, 3, dtype=torch.uint8), "bytes.pt")
    torch.save(torch.tensor(1.0), "scalar.pt")
    code, said, complained = run(capsys, "compare", *argv, "--json")
    assert (code, said) == (2, "")
    assert complained.count("\n") == 1
    assert message in complained


def test_third_party_methods_are_compared_as_any_other_and_cannot_spoil_the_json(capsys):
    def loud(cost, *, generator=None, volume=1):
        sys.stdout.write("coupling!" * volume)
        return torch.arange(len(cost))

    def broken(cost, *, generator=None):
        raise KeyError("lost")

    couplings.register("loud", loud, marginal="permutation")
    couplings.register("broken", broken, marginal="permutation", summary="[red]broken[/]")
    try:
        argv = "compare -n 8 --repeats 1 --methods auction,loud:volume=2,broken"
        code, said, complained = run(capsys, argv, "--json")
        table = run(capsys, argv)[1]
        listed = run(capsys, "methods", "*o*")[1]
    finally:
        del registry._registry["loud"], registry._registry["broken"]
    cells = {cell["method"]: cell for cell in strict(said)}
    assert code == 1
    assert cells["loud"]["reduction"] == 0.0
    assert cells["loud"]["options"] == {"volume": 2}
    assert "coupling!coupling!" in complained
    assert cells["broken"]["error"] == "KeyError: 'lost'"
    assert "broken, sqeuclidean, none failed: KeyError: 'lost'" in complained
    assert cells["auction"]["gap"] == 0.0
    assert "failed" in table
    assert "[red]broken[/]" in listed


def test_a_promise_that_is_broken_is_said_beside_its_row(capsys):
    couplings.register("closest", lambda cost, *, generator=None: cost.argmin(1), marginal="resampled")
    try:
        code, table, _ = run(capsys, "compare -n 64 --repeats 1 --methods auction,closest")
    finally:
        del registry._registry["closest"]
    assert code == 0
    assert "resampled: broken" in table
    assert "closest: declares 'resampled', but moved the" in table
    assert "auction: declares" not in table


# --- methods, env


def test_methods_lists_every_record(capsys):
    code, said, _ = run(capsys, "methods", "--json")
    listed = strict(said)
    assert code == 0
    assert [entry["name"] for entry in listed] == [info.name for info in couplings.methods()]
    for entry, info in zip(listed, couplings.methods(), strict=True):
        assert entry["summary"] == info.summary
        assert entry["marginal"] == info.marginal
        assert entry["requires"] == list(info.requires)
    table = run(capsys, "methods")[1]
    assert all(info.name in table and info.marginal in table for info in couplings.methods())


def test_methods_says_what_is_installed(capsys, monkeypatch):
    assert "pot: installed" in run(capsys, "methods")[1]
    assert all(entry["installed"] for entry in strict(run(capsys, "methods", "--json")[1]))
    monkeypatch.setitem(sys.modules, "ot", None)
    assert "pot: missing" in run(capsys, "methods")[1]
    installed = {entry["name"]: entry["installed"] for entry in strict(run(capsys, "methods", "--json")[1])}
    assert installed["emd"] is False
    assert installed["lapjv"] is True


def test_methods_takes_a_pattern(capsys):
    listed = strict(run(capsys, "methods", "S*", "--json")[1])
    assert [entry["name"] for entry in listed] == ["sinkhorn", "stable", "sliced"]
    code, said, complained = run(capsys, "methods", "x*")
    assert (code, said) == (2, "")
    assert "no method is called 'x*'" in complained


def test_env_tells_versions_hardware_and_what_is_absent(capsys, monkeypatch):
    from importlib import metadata

    from couplings.ablation import environment

    def version(package):
        if package == "lapjv":
            raise metadata.PackageNotFoundError(package)
        return metadata.version(package)

    monkeypatch.setattr(environment, "version", version)
    code, said, _ = run(capsys, "env", "--json")
    described = strict(said)
    assert code == 0
    assert described["couplings"] == couplings.__version__
    assert described["packages"]["torch"] == metadata.version("torch")
    assert described["threads"] == torch.get_num_threads()
    assert len(described["devices"]) == torch.cuda.device_count()
    assert described["optional"]["lapjv"] == {"version": None, "extras": ["lapjv"]}
    text = run(capsys, "env")[1]
    assert ["torch", metadata.version("torch")] in [line.split() for line in text.splitlines()]
    assert "absent (couplings[lapjv])" in text
    assert os.path.isdir(described["kernel_cache"])  # noqa: PTH112 - a string of the JSON


# --- the process


def test_the_module_runs_as_a_command(folder):
    argv = [sys.executable, "-m", "couplings", "couple", "images.npy", "absent.npy", "-o", "out.npz"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "couplings: error: absent.npy: no such file.\n"


def test_help_imports_nothing_that_the_library_does_not():
    code = (
        "import sys, couplings; before = set(sys.modules)\n"
        "from couplings.cli import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted(name for name in set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "--quantizers" in done.stdout
    loaded = set(done.stderr.replace("'", " ").replace(",", " ").split())
    assert "couplings.cli" in loaded
    assert not loaded & {"scipy", "matplotlib", "numba", "pandas", "safetensors", "couplings.ablation", "ot"}


def test_version_is_printed(capsys):
    assert run(capsys, "--version") == (0, f"couplings {couplings.__version__}\n", "")


def test_a_reader_that_goes_away_is_no_error():
    with subprocess.Popen([sys.executable, "-m", "couplings", "methods"], stdout=-1, stderr=-1) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(120)) == (b"", 1)


@pytest.mark.parametrize(
    ("missing", "argv", "message"),
    [
        ("typer", "--version", "pip install 'couplings[cli]'"),
        ("matplotlib", "compare -n 8 --plot out.png", "pip install 'couplings[ablate]'"),
        ("yaml", "ablate grid.yaml --list", "pip install 'couplings[ablate]'"),
        ("safetensors", "couple images.safetensors noise.npy -o out.npy", "pip install 'couplings[cli]'"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(folder, missing, argv, message):
    (folder / "grid.yaml").write_text("n: 8")
    (folder / "images.safetensors").touch()
    blocked = f"import sys; sys.modules[{missing!r}] = None\nfrom couplings.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", blocked, *argv.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_ends_without_a_traceback(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("couplings.ablation.environment.describe", interrupt)
    code, said, complained = run(capsys, "env")
    assert (code, said, complained) == (130, "", "couplings: interrupted\n")


def test_the_time_left_is_told_where_nobody_watches(monkeypatch, capsys):
    from rich.console import Console

    from couplings import cli

    monkeypatch.setattr(cli, "_SECONDS_BETWEEN_LINES", 0.0)
    with cli._progress(Console(stderr=True), unit="measurements") as show:
        for count, done in (("1 of 9", 0.1), ("2 of 9", 0.2)):  # the first waited for workers to start
            show(done, count, "x")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "1 of 9 measurements"
    assert second.startswith("2 of 9 measurements, 0:00:0")
