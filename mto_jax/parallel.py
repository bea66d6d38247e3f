"""The device mesh and how arrays lie on it: the batch is split along 'data', the state is replicated."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mto_jax.errors import UserError


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices (-1: all of them) along the axis 'data'.

    Raises:
      UserError: if there are not so many devices.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise UserError(f'mesh.data is {data}; there are {len(devices)} devices ({devices[0].platform})')
    # With Explicit axes, the default, Linen layers would have to name their output shardings.
    return jax.make_mesh((count,), ('data',), (AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec('data'))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Mapping[str, jax.Array]:
    """Move a host batch to the devices, its leading axis split over 'data'."""
    return jax.device_put(dict(batch), along_batch(mesh))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise UserError where microbatches do not split evenly over the mesh."""
    if accumulate < 1 or batch_size < 1 or batch_size % (accumulate * mesh.size):
        raise UserError(
            f'batch_size is {batch_size}; it must be a positive multiple of accumulate ({accumulate}) times the '
            f'{mesh.size} devices'
        )
