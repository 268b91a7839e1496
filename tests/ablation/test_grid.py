"""What cells a grid has."""

import json

import pytest

from couplings.ablation.grid import Point, points, read_grid, share_options
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


def test_options_go_to_the_methods_that_take_them():
    shared = share_options(["auction", "sinkhorn", "sliced"], {"reg": 0.5, "sliced.directions": 3})
    assert shared == [{"auction": {}}, {"sinkhorn": {"reg": 0.5}}, {"sliced": {"directions": 3}}]
    with pytest.raises(TypeError, match="Did you mean 'reg'"):
        share_options(["auction", "sinkhorn"], {"regg": 0.5})
    with pytest.raises(ValueError, match="sinkhorn, which is not compared"):
        share_options(["auction"], {"sinkhorn.reg": 0.5})
    with pytest.raises(TypeError, match="option of the method auction"):
        points([{"methods": share_options(["auction"], {"auction.reg": 0.5})}])
