"""Dataset-level couplings on a CUDA device: the plan of the CPU, without waiting for the device at every step, fast."""

import logging
import math
import time

import numpy as np
import pytest
import torch

from couplings.persistent import Pairs
from couplings.semidiscrete import Semidiscrete, ascent, fit, rows, search

logger = logging.getLogger(__name__)
CUDA = torch.device("cuda")


def images(n, side, seed=0):
    """Smooth random fields of different contrast, with a little noise; ``(n, 3, side, side)``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, side // 4, side // 4, generator=generator)
    contrast = torch.rand(n, 1, 1, 1, generator=generator) + 0.3
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    return 0.5 * contrast * (smooth + 0.1 * torch.randn(smooth.shape, generator=generator))


def drawn(n, data, seed=7):
    return torch.randn(n, *data.shape[1:], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"mirrored": True}, {"classes": torch.arange(500) % 3}], ids=str)
def test_the_plan_is_that_of_the_cpu(options):
    data = images(500, 8)
    here, there = fit(data, steps=12, **options), fit(data, steps=12, device="cuda", **options)
    torch.testing.assert_close(there.potentials, here.potentials, rtol=0, atol=0.1)
    noise, classes = drawn(300, data), options.get("classes")
    labels = None if classes is None else classes[:300]
    index = there.assign(noise.cuda(), labels)
    assert index.is_cuda
    moved = Semidiscrete(there.potentials, 0.0, classes, here.shape, "", here.mirrored, here.parts)
    assert (moved.assign(noise, labels) == index.cpu()).double().mean() > 0.97
    assert torch.equal(there.assign(noise, labels), index.cpu())


def test_the_tolerance_is_reached():
    data = images(500, 8)
    plan = fit(data, device="cuda")
    assert plan.chi2 < 0.05
    quality = plan.quality()
    assert quality.distance < quality.minibatch_2048 < quality.independent
    assert quality.used > 0.98


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_host_does_not_wait_between_two_measurements(rough, mirrored, monkeypatch):
    monkeypatch.setattr(ascent, "_typical_gap", lambda *args: (1.0, rough))
    held = rows.Rows(images(2000, 8), CUDA, mirrored=mirrored)
    finder = search.Search(held)
    state = ascent.start(held, finder, 0)

    def stepped(state):
        due = state.step in (1, state.next_check)  # things are made once in the first step
        torch.cuda.set_sync_debug_mode("default" if due else "error")

    try:
        ascent.ascend(
            held,
            finder,
            state,
            batch_size=256,
            steps=22,
            tolerance=1e-9,
            seed=0,
            checked=lambda state: None,
            stepped=lambda state: stepped(state) if state.step > 1 else None,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 22


@pytest.mark.parametrize("kind", ["tensor", "float16", "memmap"])
def test_data_that_does_not_fit_is_streamed(kind, tmp_path, monkeypatch):
    data = images(700, 8).half()
    given = {"tensor": data.float(), "float16": data}.get(kind)
    if kind == "memmap":
        np.save(tmp_path / "data.npy", data.numpy())
        given = np.load(tmp_path / "data.npy", mmap_mode="r")
    resident = fit(given, steps=12, device="cuda")
    assert resident.parts[0].rows._held is not None
    monkeypatch.setattr(rows, "_FREE_MEMORY", 0.0)
    monkeypatch.setattr(rows, "_CHUNK_VALUES", 1)
    streamed = fit(given, steps=12, device="cuda")
    assert streamed.parts[0].rows._held is None
    torch.testing.assert_close(streamed.potentials, resident.potentials, rtol=0, atol=0.1)
    assert streamed.fingerprint == resident.fingerprint


def test_data_on_the_device_stays_there(tmp_path):
    data = images(500, 8).cuda()
    plan = fit(data, steps=12)
    assert plan.parts[0].rows.device.type == "cuda"
    plan.save(tmp_path / "plan.safetensors")
    loaded = Semidiscrete.load(tmp_path / "plan.safetensors", data)
    noise = drawn(50, data).cuda()
    assert torch.equal(loaded.assign(noise), plan.assign(noise))


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_balanced_epoch_uses_every_row_once(mirrored):
    data = images(500, 8)
    plan = fit(data, steps=12, device="cuda", mirrored=mirrored)
    loader = plan.loader(torch.utils.data.TensorDataset(data, torch.arange(500)), 64)
    numbers = []
    for (_, number), noise in loader:
        assert noise.is_cuda
        numbers.append(number)
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(500))


def test_persistent_pairs_come_nearer_on_the_device(tmp_path):
    data = images(200, 8).cuda()
    with Pairs.open(tmp_path / "pairs", rows=200, seeds=2) as pairs:
        seeds = pairs.state_dict()["seeds"].flatten().sort().values
        for _ in range(3):
            for some in torch.arange(200, device="cuda").split(50):
                coupled = pairs.couple(data[some], some)
                assert coupled.noise.is_cuda
                assert coupled.cost <= coupled.cost_before * (1 + 1e-5)
        assert torch.equal(pairs.state_dict()["seeds"].flatten().sort().values, seeds)


def test_fifty_thousand_colour_images_take_less_than_two_minutes():
    data = images(50_000, 32)
    begun = time.perf_counter()
    plan = fit(data, device="cuda")
    seconds = time.perf_counter() - begun
    noise = torch.randn(4096, 3, 32, 32, device="cuda")
    matrix, flat = data.flatten(1).cuda(), noise.flatten(1)
    times = {"assign": math.inf, "product": math.inf}
    for _ in range(5):
        for name, run in (("assign", lambda: plan.assign(noise)), ("product", lambda: flat @ matrix.T)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times[name] = min(times[name], time.perf_counter() - start)
    ratio = times["assign"] / times["product"]
    logger.info("fit: %.1f s, chi^2 %.3f; assign: %.2f times its product", seconds, plan.chi2, ratio)
    assert plan.chi2 < 0.05
    assert seconds < 120
