"""What cells a grid has."""

import json

import pytest

from couplings.ablation.grid import Point, points, read_grid, read_method
from couplings.cli import main

YAML = """
- data: [crops32, latents]
  n: [16, 32]
  methods: [auction, {sinkhorn: {reg: 0.1}}, {nearest: {k: 4, score: dot}}]
  metrics: [l2, cosine]
  quantizers: [none, int8]
  conditions: [none, class]
  scopes: [local, global]
  ranks: 3
  seeds: 2
"""
FLAGS = (
    "--data crops32,latents -n 16,32 --methods auction,sinkhorn:reg=0.1,nearest:k=4:score=dot --metrics l2,cosine "
    "--quantizers none,int8 --conditions none,class --scopes local,global --ranks 3 --seeds 2"
)


def test_a_grid_is_the_same_from_yaml_json_and_flags(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(YAML)
    grids = read_grid(tmp_path / "grid.yaml")
    (tmp_path / "grid.json").write_text(json.dumps(grids))
    told = []
    for axes in (str(tmp_path / "grid.yaml"), str(tmp_path / "grid.json"), FLAGS):
        assert main(["ablate", *axes.split(), "--list"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    cells = points(grids)
    assert len(told[0].splitlines()) == len(cells) == 2 * 2 * 3 * 2 * 2 * 2 * 2 * 2
    assert len({cell.key for cell in cells}) == len(cells)
    assert Point.from_dict(json.loads(cells[-1].key)) == cells[-1]
    assert points([*grids, *grids]) == cells
    assert main(["ablate", str(tmp_path / "grid.yaml"), "--metrics", "l1", "--list"]) == 2
    assert "holds the axes: leave --metrics away" in capsys.readouterr().err


def test_cells_are_every_combination_once_under_canonical_names():
    cells = points([{"n": 8, "methods": ["exact", "auction", "GREEDY"], "metrics": ["l2", "L2", "l1"], "seeds": 1}])
    assert [(cell.metric, cell.method) for cell in cells] == [
        (metric, method) for metric in ("l2", "l1") for method in ("auction", "greedy")
    ]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"method": "auction"}, "unknown axis of a grid 'method'.*methods"),
        ({"methods": ["auctoin"]}, "unknown method 'auctoin'.*auction"),
        ({"methods": {"sinkhorn": {"rge": 1}}}, "unknown option of the method sinkhorn.*reg"),
        ({"methods": {"sinkhorn": 0.1}}, "options of sinkhorn as a mapping"),
        ({"n": [0]}, "n: expected whole numbers of at least 1, got 0"),
        ({"scopes": "globl"}, "unknown scope 'globl'.*global"),
        ({"conditions": "label"}, "unknown condition 'label'"),
    ],
)
def test_a_mistake_in_a_grid_is_named(grid, said):
    with pytest.raises((ValueError, TypeError), match=said):
        points([grid])


@pytest.mark.parametrize(("name", "text"), [("grid.yaml", "a: [1"), ("grid.json", "{"), ("grid.yaml", "just words")])
def test_a_file_that_is_no_grid_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: (not valid|expected a mapping)"):
        read_grid(tmp_path / name)


@pytest.mark.parametrize(
    "methods",
    [
        ["auction", "sinkhorn:reg=0.1:draw=rows"],
        ["auction", {"sinkhorn": {"reg": 0.1, "draw": "rows"}}],
        [{"auction": None, "sinkhorn": {"reg": 0.1, "draw": "rows"}}],
    ],
    ids=["text", "mapping", "one mapping"],
)
def test_options_are_written_in_either_way(methods):
    cells = points([{"methods": methods, "n": 8, "seeds": 1}])
    assert [(cell.method, cell.options) for cell in cells] == [
        ("auction", {}),
        ("sinkhorn", {"reg": 0.1, "draw": "rows"}),
    ]
    assert cells[1].label == "sinkhorn reg=0.1 draw=rows"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("auction", ("auction", {})),
        (" nearest : k = 4 :score=dot", ("nearest", {"k": 4, "score": "dot"})),
        ("own.module:function", ("own.module:function", {})),
        (
            "own.module:function:depth=2:wide=true:seed=none",
            ("own.module:function", {"depth": 2, "wide": True, "seed": None}),
        ),
    ],
)
def test_a_method_is_read_with_its_options(text, read):
    assert read_method(text) == read


@pytest.mark.parametrize(
    ("text", "said"), [("a:b=1:c", "name=value, got 'c'"), ("a:=1", "name=value"), ("a:b=1:b=2", "twice")]
)
def test_options_that_cannot_be_read_are_named(text, said):
    with pytest.raises(ValueError, match=said):
        read_method(text)
