"""Loads checkpoints onto four devices, in a process that has them, and compares with the same arrays on one.

python -m tests.divided_loading ADAPTER BASE_OF_IT FOLDER ...
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wpjax.checkpoints.checkpoint import fingerprint, load_checkpoint
from wpjax.checkpoints.convert import flatten, leaves_from_hf
from wpjax.checkpoints.folder import SafetensorsFolder
from wpjax.models.parameters import PARAMETERS
from wpjax.runtime.placement import partition


class Counting(SafetensorsFolder):
    """Counts how often each tensor is read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.reads = []

    def read(self, name):
        self.reads.append(name)
        return super().read(name)


def cut_axes(path, shape):
    """Heads and neurons are cut in two, unless their number is odd."""
    axes = PARAMETERS[path].axes
    sizes = zip(axes, shape[len(shape) - len(axes) :], strict=True)
    return {axis for axis, n in sizes if axis in ("head", "kv_head", "neuron") and n % 2 == 0}


def place(path, shape):
    """Each half stands on two devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("patch", "model"))
    axes = PARAMETERS[path].axes
    rules = dict.fromkeys(cut_axes(path, shape), "model")
    return NamedSharding(mesh, partition(("layer", *axes) if path.startswith("blocks/") else axes, rules))


def main():
    adapter, its_base, *folders = sys.argv[1:]
    assert jax.device_count() == 4
    for folder in folders:
        one, four = load_checkpoint(folder), load_checkpoint(folder, place=place)
        ours, whole = flatten(four.params), flatten(one.params)
        for path, leaf in ours.items():
            assert leaf.sharding.is_equivalent_to(place(path, leaf.shape), leaf.ndim), path
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(whole[path])[shard.index], path)
            parts = 2 if cut_axes(path, leaf.shape) else 1
            assert leaf.addressable_shards[0].data.size == leaf.size // parts, path
    base = load_checkpoint(its_base, place=place)
    assert fingerprint(base.cfg, base.params) == fingerprint(base.cfg, load_checkpoint(its_base).params)
    # Base and expert share arrays that are divided, too; but not equal numbers at another place.
    ours = flatten(base.params)
    again, apart = (flatten(load_checkpoint(its_base, base=base, place=p).params) for p in (place, None))
    assert all(again[path] is leaf for path, leaf in ours.items())
    assert not any(apart[path] is leaf for path, leaf in ours.items())
    expert = load_checkpoint(adapter, base=base, place=place)
    truth = load_checkpoint(adapter, base=load_checkpoint(its_base))
    assert fingerprint(expert.cfg, expert.params) == fingerprint(truth.cfg, truth.params)
    changed = expert.params["blocks"]["attn"]["W_Q"]
    assert changed.sharding.spec == PartitionSpec(None, None, "model", None)
    assert expert.params["blocks"]["attn"]["W_K"] is base.params["blocks"]["attn"]["W_K"]
    # A tensor is read once, however many devices hold a part of it.
    counting = Counting(Path(its_base))
    dict(leaves_from_hf(base.cfg, counting, place=place))
    assert len(counting.reads) == len(set(counting.reads)) == len(counting.names())


if __name__ == "__main__":
    main()
