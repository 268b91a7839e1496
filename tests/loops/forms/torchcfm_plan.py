import torch
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher

from .networks import Seen, images


def run():
    FM = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    model = Seen()
    optimizer = torch.optim.Adam(model.parameters())
    for x1, _ in images():
        x0 = torch.randn_like(x1)
        t, xt, ut = FM.sample_location_and_conditional_flow(x0, x1)
        loss = (model(xt, t) - ut).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        t = t[:, None, None, None]
        yield x1, (model.seen - t * x1) / (1 - t), x1 - ut
