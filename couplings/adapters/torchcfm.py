"""A coupling in the place of TorchCFM's ``OTPlanSampler``.

TorchCFM draws pairs from the plan with replacement, so that a part of every batch is lost and another part repeats.
With this sampler every row is used once and the data keep their order.

>>> import torch
>>> from couplings import Coupling
>>> sampler = CouplingSampler(Coupling("auction"))
>>> noise, data = torch.randn(8, 2), torch.rand(8, 2)
>>> x0, x1 = sampler.sample_plan(noise, data)
>>> bool((x1 == data).all())
True
"""

from __future__ import annotations

from torch import Tensor

from couplings.coupling import Coupling


class CouplingSampler:
    """Drop-in for ``torchcfm.optimal_transport.OTPlanSampler``.

    Put it in place with ``flow_matcher.ot_sampler = CouplingSampler()`` on an
    ``ExactOptimalTransportConditionalFlowMatcher`` (TorchCFM 1.0).

    Parameters
    ----------
    coupling : Coupling, optional
        By default the exact coupling on squared distances.
    """

    def __init__(self, coupling: Coupling | None = None) -> None:
        self.coupling = coupling or Coupling()

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = False) -> tuple[Tensor, Tensor]:
        """Pair source noise with data.

        Parameters
        ----------
        x0 : (n, *shape) Tensor
            Noise.
        x1 : (n, *shape) Tensor
            Data.
        replace : bool
            Taken for compatibility: TorchCFM passes it. Rows are never repeated here.

        Returns
        -------
        (n, *shape) Tensor, (n, *shape) Tensor
            The noise, permuted, and the data as they were.
        """
        return self.coupling(x1, x0).noise, x1

    def sample_plan_with_labels(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        replace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Pair source noise with data; labels of the noise move with it, labels of the data stay.

        Parameters
        ----------
        x0, x1 : (n, *shape) Tensor
            Noise and data.
        y0, y1 : (n, ...) Tensor, optional
            Their labels.
        replace : bool
            As in `sample_plan`.

        Returns
        -------
        tuple
            Noise, data, labels of the noise and labels of the data.
        """
        coupled = self.coupling(x1, x0)
        return coupled.noise, x1, None if y0 is None else coupled.apply(y0), y1
