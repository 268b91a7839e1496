import torch
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher

from .networks import Seen, images


def run():
    FM = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    model = Seen()
    optimizer = torch.optim.Adam(model.parameters())
    for x1, y in images():
        x0 = torch.randn_like(x1)
        t, xt, ut, _, y1 = FM.guided_sample_location_and_conditional_flow(x0, x1, y1=y)
        loss = (model(xt, t, y1) - ut).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        t = t[:, None, None, None]
        yield x1, (model.seen - t * x1) / (1 - t), x1 - ut
