"""Prints what each process holds between two examples: a script for ``torchrun``.

python -m torch.distributed.run --nproc-per-node 2 -m tests.fisher_zero3_memory MODEL DATA
"""

from __future__ import annotations

import contextlib
import json
import sys

from shardmerge.estimate.examples import read_sample
from shardmerge.estimate.fisher import _log_p
from shardmerge.estimate.fisher_zero3 import Zero3
from shardmerge.estimate.models import describe_model, examples_for
from shardmerge.stores import Stores


def main() -> None:
    model, data = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        runner = Zero3("cpu")
        described = describe_model(model, None, Stores())
        chosen = read_sample([data], samples=3, seed=0).chosen
        loaded = runner.load(described)
        sums = runner.sums(loaded)
        for example in examples_for(described, chosen, max_length=None, seed=0):
            _log_p(loaded, example).backward()
            sums.unsound()
    parameters = loaded.parameters.values()
    held = {
        "parameters": sum(p.numel() for p in parameters),
        "partitions": sum(p.ds_tensor.numel() for p in parameters),
        "sums": sum(value.size for _, value in sums.parts()),
        "all": sum(p.ds_numel for p in parameters),
    }
    sys.stdout.write(json.dumps(held) + "\n")


if __name__ == "__main__":
    main()
