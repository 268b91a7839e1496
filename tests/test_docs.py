"""The examples that users copy, and the numbers that they read."""

import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation_tables, pools_tables, solver_steps, solver_tables, tables, training_tables
from benchmarks.published import TABLES as PUBLISHED
from benchmarks.published import tables as published
from benchmarks.published.measures import verdict
from couplings.kernels.assignment.costs import CAP
from couplings.kernels.assignment.tuning import TUNING

ROOT = Path(__file__).parents[1]


def test_tables_of_the_pages_are_those_of_the_records():
    for page in tables.PAGES:
        assert tables.filled(page.read_text()) == page.read_text(), f"{page}: run python -m benchmarks.tables"


# -- numbers in prose: below are the phrases that hold them, written anew from the records


def gain(n, method="auction", **fixed):
    return f"{ablation_tables.pick(n=n, method=method, **{'ranks': 1, **fixed})['reduction'].mean():.2%}"


def mean(field, **fixed):
    return ablation_tables.pick(ranks=1, **fixed)[field].mean()


def milliseconds(name, n, show=".1f"):
    return f"{1e3 * solver_tables.find(solver_tables.committed(), 'solve', name, n)['median']:{show}} ms"


def told(method, condition):
    z = ablation_tables.pick(n=1024, method=method, condition=condition)["leakage.z"]
    return ablation_tables.stouffer(z)


def rounded(name, digits):
    changed, lost = (
        mean(field, n=1024, method="auction", quantize=name) for field in ("rows_changed", "reduction_lost")
    )
    return f"{changed:.0%} of the rows otherwise and loses {100 * lost:.{digits}f} points"


def change(kind, nfe, suite="training"):
    results = training_tables.committed(suite)
    return f"{results.change(kind, nfe, results.last[kind])[0]:+.0%}"


def on_digits(kind, *nfe):
    return [change(kind, n, "training-digits") for n in nfe]


def frechet(pairing):
    return f"{training_tables.committed('training-digits').at('v', pairing, 5, 500).mean():.0f}"


def digits(field):
    records = training_tables.committed("training-digits").of("point", arm="v-coupled", step=500)
    return statistics.fmean(field(record) for record in records)


def of_pool(kind, pairing, way):
    change = pools_tables.committed("pools").change(kind, pairing, way)[0]
    return f"{change:+.0%}".replace("-0%", "0%").replace("+0%", "0%")


def pool(kind, way, listed="{}, {} and {}"):
    return listed.format(*(of_pool(kind, pairing, way) for pairing in ("batch", "window", "semidiscrete")))


def consistency(kind, way, listed="{}, {} and {}"):
    results = pools_tables.committed("consistency")
    changes = (results.change(kind, pairing, way)[0] for pairing in ("batch", "window", "semidiscrete"))
    return listed.format(*(f"{change:+.0%}" for change in changes))


def renoised(pairing):
    distances = (
        pools_tables.committed("renoised").at("ct", pairing, f"2, {kind} at 5") for kind in ("repeated", "fresh")
    )
    return "{:.0f} instead of {:.0f}".format(*(found.mean() for found in distances))


def told_by_noise(pairing):
    cells = {}
    for record in published.committed():
        name, _, side = record["cell"].partition(" ")
        if record["table"] == "class-from-noise" and name == pairing:
            cells.setdefault(side, []).append(record["measured"]["balanced accuracy"])
    means = [statistics.fmean(values) for values in cells.values()]
    return " to ".join(dict.fromkeys(f"{x:.0f}%" for x in (min(means), max(means))))


def explained(kind):
    return f"{training_tables.levels(training_tables.committed())[f'{kind}-coupled', 1.0].mean():.0%}"


def known(batch, method="auction"):
    (record,) = training_tables.committed().of("coupling", method=method, batch=batch)
    return f"{record['explained']:.0%}"


def exchanged(nfe):
    results = training_tables.committed()
    base, ours = (training_tables.switched(results, "v", "epsilon", name)[nfe] for name in ("independent", "coupled"))
    return f"{ours.mean() / base.mean() - 1:+.0%}"


def choosing():
    v, flow = (on_digits(kind, 1, 2, 5, 20) for kind in ("v", "flow"))
    epsilon = on_digits("epsilon", 1, 20)
    near = {kind: [of_pool(kind, "nearest-l2", way) for way in ("1", "5", "50")] for kind in ("flow", "v")}
    learnt = pools_tables.committed("noisier")
    noisier = {
        (way, step): f"{learnt.change('flow-noisier', 'semidiscrete', way, step)[0]:+.0%}"
        for way in learnt.ways
        for step in (1500, 6000)
    }
    published_ct = pools_tables.committed("consistency")
    early, late = published_ct.at("ct", "semidiscrete", "1", 2000), published_ct.at("ct", "independent", "1", 6000)
    kept = [of_pool("flow", "persistent", way) for way in ("1", "50", "dopri5")]
    peak = {name: f"{mean('peak_bytes', n=2048, method=name) / 2**20:.0f} MiB" for name in ("auction", "sliced")}
    return [
        f"by {gain(64)} at n = 64, {gain(128)} at n = 128, {gain(512)} at n = 512 and {gain(2048)} at n = 2048",
        f"64 rows by themselves gain {gain(64)}",
        f"2 x 64 together {gain(64, scope='global', ranks=2)} and 4 x 64 {gain(64, scope='global', ranks=4)}",
        "of one step changes by " + pool("flow", "1", "{} within 128 rows, {} within 2,048 (`lookahead`) and {} where"),
        f"and by {pool('image', '1')} with image prediction",
        f"At 50 steps the smaller pool is as good or better: ({pool('flow', '50')}) and ({pool('image', '50')})",
        f"flow matching loses, by {pool('flow', 'dopri5')}",
        f"as its batch does at few steps, {kept[0]} in one step of flow matching",
        f"and loses least, {kept[1]} at 50 steps and {kept[2]} with the adaptive solver",
        f"the whole dataset {noisier['50', 1500]} at 50 steps and {noisier['dopri5', 1500]} with the adaptive solver",
        f"after 1,500 training steps, and {noisier['50', 6000]} at 50 steps after 6,000",
        "changes by {} at 1, {} at 5 and {} at 50 sampling steps with flow matching".format(*near["flow"]),
        "by {}, {} and {} with v prediction.".format(*near["v"]),
        f"128 rows in four classes gain {gain(128, condition='class')}, and {gain(128)} across them",
        f"takes {milliseconds('couplings', 128)} where scipy takes {milliseconds('scipy', 128)} at n = 128",
        f"{milliseconds('couplings', 1024)} against {milliseconds('scipy', 1024, '.0f')} at n = 1024",
        f"{milliseconds('couplings', 4096, '.0f')} against {milliseconds('scipy', 4096, ',.0f')} at n = 4096",
        f"at n = 512 `auction` gains {gain(512)}, `greedy` {gain(512, 'greedy')} and `sliced` {gain(512, 'sliced')}",
        f"at n = 2048 and 3072 dimensions a call takes {peak['sliced']} beyond them, `auction` {peak['auction']}",
        f"at 5 sampling steps is {frechet('sinkhorn0.2')} at reg 0.2, {frechet('sinkhorn0.5')} at reg 0.5",
        f"{frechet('sinkhorn1')} at reg 1, against {frechet('coupled')} for the exact coupling",
        f"drifts by {mean('drift.norm', n=128, label='nearest k=4 score=l2'):.1f} standard deviations at k = 4",
        # As arXiv 2505.18521 says.
        "is 6.63, 5.14 and 4.45 for DDIM (k = 8) and 4.92, 5.02 and 3.56 for flow matching (k = 4)",
        "10.22, 8.54 and 9.16 for consistency",
        *("CIFAR-10", "[arXiv 2505.18521]"),
        f"at n = 128 the exact coupling gains {digits(lambda record: record['reduction']):.2%} on 8x8 digits",
        f"{gain(128)} on 32x32x3 crops, {gain(128, data='crops64')} on 64x64x3 crops",
        f"{gain(128, data='latents')} on 4x32x32 latents",
        f"{frechet('coupled')} with `sqeuclidean`, {frechet('l2')} with `l2`, {frechet('l1')} with `l1`",
        f"{frechet('independent')} without coupling (Frechet distance on digits, 5 sampling steps)",
        f"at n = 1024, the noise tells the class {told('auction', 'none'):.0f} standard deviations above chance",
        f"within them it is {told('auction', 'class'):.1f}, and {told('independent', 'none'):.1f} for random pairs",
        f"a reduction of {gain(1024, condition='class')} instead of {gain(1024)}",
        f"the class of Fashion-MNIST in {told_by_noise('ot')} of the cases after pairing without labels",
        f"and in {told_by_noise('c2ot')}, which is chance",
        f"at n = 1024 it pairs {mean('rows_changed', n=1024, quantize='fp16'):.1%} of the rows otherwise",
        "loses less than 0.0001 percentage points",
        f"pairs {rounded('fp8_e5m2', 3)}; `int8` {rounded('int8', 4)}",
        f"at 1, 2, 5 and 20 sampling steps, by {v[0]}, {v[1]}, {v[2]} and {v[3]} with v prediction",
        f"by {flow[0]}, {flow[1]}, {flow[2]} and {flow[3]} with flow matching",
        f"at 10 sampling steps by {change('image', 10)} with image prediction, {change('v', 10)} with v prediction",
        f"{change('flow', 10)} with flow matching, but by {change('epsilon', 10)} with epsilon prediction",
        f"{change('weighted', 10)} with v prediction under epsilon's weights",
        f"epsilon prediction changes by {epsilon[0]} at 1 and {epsilon[1]} at 20 sampling steps",
        f"it is {digits(lambda record: record['coupling_ms'] / record['step_ms']):.0%} of a step of the digit models",
        "in one step, " + consistency("ct", "1", "{} within 128 rows, {} within 2,048 and {} from the whole dataset"),
        f"2,000 training steps, {early.mean():.0f}, is nearly that of independent noise after 6,000, {late.mean():.0f}",
        "Two steps give the gain away: " + consistency("ct", "2, fresh at 2.5") + " with fresh noise at level 2.5",
        f"at level 5 {renoised('independent')} without and {renoised('batch')} within 128 rows",
        "and loses: " + consistency("ict", "1") + " in one step",
        "weighted alike: " + consistency("ict-weights", "1"),
        *("32x32x3 crops", "n x n matrix"),
    ]


def training():
    (real,) = training_tables.committed().of("real")
    epsilon, half = ([find(n) for n in (3, 5, 10, 20)] for find in (lambda n: change("epsilon", n), exchanged))
    return [
        f"{real['samples']:,} real images are at {real['frechet']:.1f}",
        f"{known(128)} of the images' variance, linearly",
        f"{known(8)} with 8, {known(32)} with 32, {known(128)} with 128, {known(512)} with 512",
        f"{known(2048)} with 2,048",
        f"{explained('v')} (v prediction), {explained('image')} (image prediction) and {explained('flow')} (flow",
        f"{explained('weighted')} (v prediction under epsilon's weights) and {explained('epsilon')} (epsilon",
        f"v prediction changes by {change('v', 10)} at 10 and {change('v', 20)} at 20 sampling steps",
        f"by {change('weighted', 10)} and {change('weighted', 20)} with epsilon's",
        f"prediction itself changes by {change('epsilon', 10)} and {change('epsilon', 20)}",
        f"by {epsilon[0]}, {epsilon[1]}, {epsilon[2]} and {epsilon[3]} at 3, 5, 10 and 20 sampling steps",
        f"they change by {half[0]}, {half[1]}, {half[2]} and {half[3]}",
        f"leaves {known(128, 'auction-whitened')} of the variance explained instead of {known(128)}",
        "patches of 4 pixels, width 64, depth 4; batches of 128, adam at a constant 0.001",
        *("distance of 1,000 samples", "SNR / (SNR + 1)", "Level 1 is"),
    ]


def solver():
    record = solver_steps.committed()
    phases = [phase for phase in record["phases"] if phase["epsilon"] > 0]
    by_cost, by_price = (np.array(record[name]) for name in ("places", "places_at_prices"))
    (paths,) = record["paths"]
    n, all_bids = record["n"], sum(phase["bids"] for phase in phases)
    assert (len(phases), phases[2]["where"], phases[3]["where"]) == (5, "sketch", "lists")
    assert (record["gap"], record["exact"], paths["left"]) == (0, True, 0)
    return [
        f"one solve of {n:,} crops",
        f"makes {phases[0]['bids'] / n:.1f} bids for each row and is within {phases[0]['gap']:.1%} of the optimum",
        f"the five phases together make {all_bids / n:.1f}, and end within {phases[-1]['gap']:.4%}.",
        f"half of the rows have {statistics.median_low(by_cost) - 1} or more columns that cost less",
        f"the first two for {(by_price <= 2).mean():.0%} of the rows, and among the first {by_price.max()} for all",
        f"A list of at most {record['list_size']} columns",
        f"{record['freed']} of the {n:,}, and bid once more without epsilon; {paths['before']} are left",
        f"epsilon divided by {TUNING.epsilon_factor:.0f}",
        f"at least 2^{np.log2(CAP / 4):.0f} of them up to",
        f"Up to {TUNING.dense_entries**0.5:.0f} rows",
        *("numbers in float64", "For float32 costs", "int16 lower bound", "relatively: 0 here", "a gap of 0"),
        *("[Bertsekas 1988]", "[Jonker and Volgenant 1987]"),
    ]


def unbacked(page, phrases):
    """Return the numbers of a page that stand in none of the phrases, and the phrases that it does not hold."""
    text = tables.BLOCK.sub("", page)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", " ".join(text.split()))
    missing = [phrase for phrase in phrases if phrase not in text]
    for phrase in phrases:
        text = text.replace(phrase, "")
    return [*re.findall(r"\S*\d\S*", re.sub(r"`[^`]*`", "", text)), *missing]


@pytest.mark.parametrize(
    ("page", "phrases"),
    [("docs/choosing.md", choosing), ("docs/solver.md", solver), ("benchmarks/results/training.md", training)],
)
def test_numbers_in_prose_are_those_of_the_records(page, phrases):
    assert unbacked((ROOT / page).read_text(), phrases()) == []


def test_comparisons_in_prose_are_those_of_the_records():
    assert mean("reduction_lost", n=1024, method="auction", quantize="fp16") < 1e-6
    assert mean("ms", n=2048, method="auction") < mean("ms", n=2048, method="sliced")
    gaps = [mean("gap", n=512, method=name) for name in ("auction", "hungarian", "lapjv", "emd")]
    assert max(map(abs, gaps)) < 1e-6
    # pools.md: where flow matching loses, and what becomes of it
    begun, longer = (pools_tables.committed(study) for study in ("begun", "longer"))
    for pairing in ("batch", "semidiscrete"):
        lost = [begun.change("flow", pairing, t)[0] for t in ("1", "0.95", "0.8")]
        assert lost[0] > 0
        assert lost[1] < -0.2
        assert lost[2] == pytest.approx(-0.5, abs=0.05)
        assert longer.change("flow", pairing, "1")[0] < longer.change("flow", pairing, "1", 1500)[0]
    assert begun.at("flow", "semidiscrete", "0").mean() < 1.3 * begun.at("flow", "independent", "0").mean()
    assert longer.change("flow", "batch", "50")[0] < 0
    assert not longer.change("flow", "batch", "dopri5")[1]
    assert longer.change("flow", "semidiscrete", "dopri5")[0] > 0.1
    noisier = pools_tables.committed("noisier")
    for pairing in ("batch", "semidiscrete"):
        cells = [(way, step) for way in noisier.ways for step in (1500, 3000)]
        changes = [noisier.change("flow-noisier", pairing, *cell) for cell in cells]
        assert all(change < 0 and agreed for change, agreed in changes)
        assert all(noisier.change("flow-noisier", pairing, "50", step)[0] < 0 for step in noisier.steps)
    assert 0 < noisier.change("flow-noisier", "batch", "dopri5")[0] < 0.03
    assert not noisier.change("flow-noisier", "semidiscrete", "dopri5")[1]


def test_what_is_said_of_consistency_training_is_that_of_the_records():
    found, between = (pools_tables.committed(study) for study in ("consistency", "renoised"))
    pools = ("batch", "window", "semidiscrete")
    for pairing in (*pools, "batch-l2"):
        change, agreed = found.change("ct", pairing, "1")
        assert change == pytest.approx(-1 / 3, abs=0.03)
        assert agreed
        assert found.change("ct", pairing, "data at 40")[0] < -0.35
    assert found.at("ct", "semidiscrete", "1", 2000).mean() < 1.02 * found.at("ct", "independent", "1", 6000).mean()
    best = [min(found.at("ct", name, way).mean() for way in found.ways[1:]) for name in ("independent", *pools)]
    assert best[0] == min(best)
    for pairing in (*pools, "batch-l2", "nearest-l2"):
        assert found.change("ict", pairing, "1")[0] > 0
        assert found.change("ict", pairing, "2, fresh at 2.5")[0] > 0
    for pairing in pools:
        assert -0.22 < found.change("ict-weights", pairing, "1")[0] < -0.1
        assert abs(found.change("ict-levels", pairing, "1")[0]) < 0.08
    assert found.change("ct", "nearest-l2", "1")[0] > 0
    for pairing in ("independent", "batch", "semidiscrete"):
        for level in ("10", "5", "2.5"):
            fresh, repeated, coupled = (
                between.at("ct", pairing, f"2, {kind} at {level}").mean() for kind in ("fresh", "repeated", "coupled")
            )
            assert 0.575 < repeated / fresh < 0.695
            assert coupled == pytest.approx(repeated, rel=0.05)


def test_pairs_that_do_not_see_the_condition_are_worse_than_random_ones():
    """What published.md says of C2OT's toy, which every cell agrees with."""
    toy, found = PUBLISHED["c2ot-toy"], {}
    for record in published.committed():
        if record["table"] == toy.name:
            found.setdefault(record["cell"], []).append(record["measured"])
    for cell, values in toy.cells.items():
        for measure, value in values.items():
            assert verdict([measured[measure] for measured in found[cell]], value) == "agrees"
    adaptive = {cell: statistics.fmean(values["adaptive"] for values in found[cell]) for cell in found}
    for told in ("class", "x"):
        assert adaptive[f"c2ot-{told}"] < adaptive[f"fm-{told}"] < adaptive[f"ot-{told}"]
    assert adaptive["ot"] < adaptive["fm"]


def test_a_number_that_no_record_supports_is_found():
    page = "It gains 2% at n = 8.\n\n`x1` and [this](page2.md) do not count.\n"
    assert unbacked(page, ["gains 2% at n = 8"]) == []
    assert unbacked(page, ["gains 3% at n = 8"]) == ["2%", "8.", "gains 3% at n = 8"]


def test_a_table_that_no_record_supports_is_found():
    page = "above\n<!-- ranks-calls:begin -->\n| old |\n<!-- ranks-calls:end -->\nbelow\n"
    new = tables.filled(page)
    assert "old" not in new
    assert new.startswith("above\n<!-- ranks-calls:begin -->\n| ranks | rows each |")
    assert new.endswith("\n<!-- ranks-calls:end -->\nbelow\n")
    assert tables.filled(new) == new


def test_pages_name_only_files_that_exist():
    for page in tables.PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_docstring_examples_give_what_they_say():
    # In a process of its own: examples register methods, which last as long as the process.
    code = (
        "import doctest, importlib, pkgutil, couplings, sys\n"
        "bad = tried = 0\n"
        "for info in pkgutil.walk_packages(couplings.__path__, 'couplings.'):\n"
        "    if info.name.endswith('__main__'): continue\n"
        "    result = doctest.testmod(importlib.import_module(info.name), optionflags=doctest.ELLIPSIS)\n"
        "    bad += result.failed; tried += result.attempted\n"
        "print(tried); sys.exit(bool(bad) or tried < 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_steps_of_a_solve_are_recorded():
    found = solver_steps.watch(300)
    epsilons = [phase["epsilon"] for phase in found["phases"]]
    assert epsilons == sorted(epsilons, reverse=True)
    assert found["exact"]
    gaps = [phase["gap"] for phase in found["phases"] if phase["gap"] is not None]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3
    assert max(found["places_at_prices"]) <= found["list_size"]
