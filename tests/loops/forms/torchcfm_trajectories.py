import torch
from torchcfm.optimal_transport import OTPlanSampler


def run():
    given = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(0))
    X = given
    X = torch.from_numpy(OTPlanSampler("exact").sample_trajectory(X))
    for t in range(3):
        yield X[:, t], X[:, t + 1], X[:, t + 1]
