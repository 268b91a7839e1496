"""Train recipes in the same processes, whose start takes long: ``-m several FOLDER NAME...``.

Each runs to its end, loses its last checkpoint and is resumed, but for the first, which is left for others to resume.
"""

import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from integrations import train


def run(name, folder, *further):
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([name, "--overlay", "smoke", "--output", str(folder / name), *further])
    torch.distributed.barrier()


if __name__ == "__main__":
    folder, (first, *others) = Path(sys.argv[1]), sys.argv[2:]
    for name in (first, *others):
        run(name, folder)
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / name, folder / "whole" / name)
            shutil.rmtree(folder / name / "checkpoints" / "step-3")
        torch.distributed.barrier()
        if name != first:
            run(name, folder, "--resume", "auto")
