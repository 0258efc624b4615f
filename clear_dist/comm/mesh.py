"""Ranks as a device mesh: groups that draw different pictures at the same time, and the ranks of each."""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from clear_dist.comm.group import Group

DATA, IMAGE = "data", "image"
"""The mesh's axes; the second one is halves for guidance times stripes, or stripes alone (`Group.halves`)."""


def image_group(everyone: Group, data_ranks: int) -> Group:
    """The ranks that draw this rank's pictures, a row of a mesh of all; all ranks call this. Raises as `Group.create`.

    With one group of data it is `everyone`.
    """
    if data_ranks == 1:
        return everyone
    shape = (data_ranks, everyone.size // data_ranks)
    mesh = init_device_mesh(everyone.device.type, shape, mesh_dim_names=(DATA, IMAGE))
    # GPUs that are shared have been agreed to, and those of other rows are not idle.
    group = Group.create(everyone.device, process_group=mesh.get_group(IMAGE), share_gpus=True)
    everyone.barrier()  # some may still connect
    for made in map(mesh.get_group, (DATA, IMAGE)):
        if made is not dist.group.WORLD:  # which torch takes for an axis of all ranks
            dist.destroy_process_group(made)
    return group


class SharedCount:
    """A number that ranks add to, each when it likes: nobody waits for another."""

    def __init__(self, group: Group, name: str) -> None:
        self._store = group.main.get_group_store()
        self._key = f"clear-dist/{name}"

    def add(self, amount: float) -> float:
        """Add a whole number, or one rounded to it; returns what all have added so far. 0: look."""
        return self._store.add(self._key, round(amount))
