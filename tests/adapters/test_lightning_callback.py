"""The callback, inside a Trainer of Lightning, with and without torch.compile."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from couplings import Coupling, couple
from couplings.adapters.lightning import CoupledNoise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("pytorch_lightning", exc_type=ImportError)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Pairs(torch.utils.data.Dataset):
    def __init__(self, rows, named):
        generator = torch.Generator().manual_seed(0)
        self.images, self.named = torch.rand(rows, 1, 4, 4, generator=generator), named

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": i % 2} if self.named else (self.images[i], i % 2)


class Flow(pl.LightningModule):
    """Rectified flow on the noise that the callback puts into the batch."""

    def __init__(self, compiled=False):
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16), nn.Unflatten(1, (1, 4, 4))
        )
        if compiled:
            self.network.compile(backend="eager")
        self.seen = []

    def training_step(self, batch, _):
        images, labels, *rest = batch.values() if isinstance(batch, dict) else batch
        noise = rest[0] if rest else couple(images, torch.randn_like(images)).noise
        self.seen.append((images, labels, noise))
        t = torch.rand(len(images), 1, 1, 1)
        return (self.network((1 - t) * noise + t * images) - (images - noise)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def trainer(*callbacks, **options):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    options = {"max_epochs": 1, **options}
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **{**quiet, **options})


def loader(named=False, rows=32):
    return DataLoader(Pairs(rows, named), batch_size=8)


@pytest.mark.parametrize("named", [False, True])
def test_every_batch_gets_coupled_noise_of_its_own(named):
    module, place = Flow(), ("image", "label") if named else (0, 1)
    fit = trainer(CoupledNoise(data=place[0]), max_epochs=2)
    fit.fit(module, loader(named))
    assert len(module.seen) == 8
    for images, _, noise in module.seen:
        assert noise.shape == images.shape
        assert torch.equal(couple(images, noise).index, torch.arange(8)), "already the best pairing"
    rows = torch.cat([noise for _, _, noise in module.seen]).flatten(1)
    assert len(rows.unique(dim=0)) == 64
    assert fit.logged_metrics["coupling/reduction"] > 0


def test_classes_are_coupled_within():
    blind, within = Flow(), Flow()
    trainer(CoupledNoise(Coupling("independent"))).fit(blind, loader())
    trainer(CoupledNoise(condition=1)).fit(within, loader())
    for (images, labels, drawn), (_, _, noise) in zip(blind.seen, within.seen, strict=True):
        assert torch.equal(couple(images, drawn, condition=labels).noise, noise)


def test_noise_depends_on_seed_epoch_batch_and_rank_alone():
    runs = []
    for seed in (0, 0, 1):
        module = Flow()
        torch.manual_seed(len(runs))
        trainer(CoupledNoise(seed=seed)).fit(module, loader())
        runs.append(torch.stack([noise for _, _, noise in module.seen]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])

    class Rank:
        current_epoch, global_rank = 0, 1

    batch = next(iter(loader()))
    CoupledNoise(Coupling("independent"), log=False).on_train_batch_start(Rank(), None, batch, 0)
    Rank.global_rank, other = 0, next(iter(loader()))
    CoupledNoise(Coupling("independent"), log=False).on_train_batch_start(Rank(), None, other, 0)
    assert not (batch[2].flatten(1)[:, None] == other[2].flatten(1)).all(2).any()


def test_with_accumulation_every_micro_batch_is_coupled():
    module = Flow()
    trainer(CoupledNoise(), accumulate_grad_batches=2).fit(module, loader())
    assert len(module.seen) == 4
    assert all(torch.equal(couple(x, noise).index, torch.arange(8)) for x, _, noise in module.seen)


@pytest.mark.parametrize("callbacks", [[], [CoupledNoise()]], ids=["one line in the step", "callback"])
@pytest.mark.parametrize("compiled", ["the network", "the module"])
def test_compiled_modules_train(compiled, callbacks):
    # Lightning's own self.log cannot be traced by this torch, with or without a coupling: the step logs nothing.
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Flow(compiled=compiled == "the network")
    if compiled == "the module":
        module = torch.compile(module, backend="eager")
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(outputs["loss"].item())

    trainer(*callbacks, Losses(), max_epochs=10).fit(module, loader(rows=64))
    assert sum(losses[-16:]) < 0.9 * sum(losses[:16])
    torch._dynamo.reset()


def test_a_batch_that_cannot_take_noise_is_refused():
    tensors = DataLoader(
        TensorDataset(torch.rand(8, 1, 4, 4)), batch_size=8, collate_fn=lambda rows: torch.stack([x for (x,) in rows])
    )
    with pytest.raises(TypeError, match="dictionary or a list, got Tensor"):
        trainer(CoupledNoise()).fit(Flow(), tensors)
