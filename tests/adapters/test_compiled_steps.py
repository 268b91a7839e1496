"""`couple` and `Coupling` inside torch.compile: the graph breaks there by itself, and the pairs are the same."""

from importlib.util import find_spec

import pytest
import torch
from oracles import MODULES

import couplings

METHODS = [info.name for info in couplings.methods() if all(find_spec(MODULES[extra]) for extra in info.requires)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(name, n=8):
    generator = torch.Generator().manual_seed(0)
    k = 2 if name == "nearest" else 1
    return torch.rand(n, 3, 2, 2, generator=generator), torch.randn(k * n, 3, 2, 2, generator=generator)


def step(couple, weight, data, noise, t):
    noise = couple(data, noise)
    mixed = (1 - t) * noise + t * data
    return (mixed * weight - (data - noise)).square().mean()


@pytest.mark.parametrize(
    ("name", "form"), [("auction", "couple"), ("auction", "submit"), *((name, "Coupling") for name in METHODS)]
)
def test_a_step_that_couples_compiles_and_gives_the_same_loss_and_gradient(name, form):
    coupling = couplings.Coupling(name)
    couple = {
        "couple": lambda data, noise: couplings.couple(data, noise, name).noise,
        "Coupling": lambda data, noise: coupling(data, noise).noise,
        "submit": lambda data, noise: coupling.submit(data, noise).result().noise,
    }[form]
    found = []
    for compiled in (False, True):
        weight = torch.full((3, 1, 1), 0.5, requires_grad=True)
        run = torch.compile(step, backend="eager") if compiled else step
        loss = run(couple, weight, *batch(name), torch.full((8, 1, 1, 1), 0.3))
        loss.backward()
        found.append((loss.detach(), weight.grad))
    assert torch.allclose(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1])


def test_what_is_around_the_coupling_is_still_compiled():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def around(data, noise, weight):
        return (couplings.couple(data.sin(), noise).noise * weight).cos()

    data, noise = batch("auction")
    found = torch.compile(around, backend=backend)(data, noise, torch.full((), 2.0))
    assert torch.equal(found, (couplings.couple(data.sin(), noise).noise * 2).cos())
    called = {node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_method"}
    assert {"sin", "cos"} <= called
    assert len(graphs) == 2


def test_new_values_of_the_same_shapes_compile_nothing_again():
    counted = torch._dynamo.testing.CompileCounter()

    def around(coupling, data, noise, weight):
        return coupling(data + 1, noise).noise * weight

    run, weight = torch.compile(around, backend=counted), torch.ones(())
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        data, noise = (torch.randn(8, 3, generator=generator) for _ in range(2))
        run(couplings.couple, data, noise, weight)
    assert counted.frame_count == 2  # before the coupling and after it


def test_the_call_itself_is_never_traced():
    def around(data, noise, weight):
        return couplings.couple(data, noise).noise * weight

    run, weight = torch.compile(around, backend="eager"), torch.ones(())
    for n in (4, 5, 6):
        run(torch.rand(n, 3), torch.randn(n, 3), weight)
    assert not torch._C._dynamo.eval_frame._debug_get_cache_entry_list(couplings.couple.__code__)


def test_one_graph_for_all_is_refused_by_the_compiler_and_not_wrong():
    run = torch.compile(lambda data, noise: couplings.couple(data, noise).noise, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(*batch("auction"))
