"""The device mesh, how the state and the batch lie on it, and moving arrays between hosts and devices.

Axes: 'data' splits the batch; 'fsdp' splits the batch too, and every large parameter with its optimizer state along its
largest divisible dimension; 'tensor' splits heads and MLP. All is `jax.jit` with shardings, what `pjit` became.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mto_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))
Axes = Sequence[tuple[str, int | None]]
SMALL = 4096  # elements; below that a collective costs more than a copy on each device

# The axis of a parameter that 'tensor' splits: attention heads, and the hidden units of the MLP; None where each device
# holds all of it on purpose. A pattern is for the full path behind a slash; the first that matches counts. A method has
# patterns of its own in `Method.tensor_axes`.
TENSOR_AXES: Axes = (
    (r'.*/\w*attn/(q|kv|qkv)_kernel', 2),
    (r'.*/\w*attn/[qkv]_bias', 0),
    (r'.*/\w*attn/proj/kernel', 0),
    (r'.*/mlp_in/kernel', 1),
    (r'.*/mlp_in/bias', 0),
    (r'.*/mlp_out/kernel', 0),
    (r'.*/relative_bias_table', 1),
    (r'.*/(patch_embed|decoder/embed|decoder/pred)/kernel', None),  # into and out of the stacks
    (r'.*/\w*head/(.*/)?kernel', None),
    (r'.*/\w*(cls_token|mask_token|pos_embed)\w*(/embedding)?', None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `devices` (default: all there are). One axis may be -1: the devices that the others leave.

    Raises:
      UserError: if the axes do not make up the devices. On a single host they may take the first of them only.
    """
    given = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    shown = ', '.join(f'mesh.{n}={s}' for n, s in sizes.items())
    if any(s < 1 and s != -1 for s in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f'{shown}: each must be a positive number of devices, and one of them may be -1 for the rest')
    known = math.prod(s for s in sizes.values() if s != -1)
    sizes = {n: len(given) // known if s == -1 else s for n, s in sizes.items()}
    used = math.prod(sizes.values())
    rest = -1 in (data, fsdp, tensor)
    if not 1 <= used <= len(given) or (used < len(given) and (rest or jax.process_count() > 1)):
        raise UserError(
            f'{shown} does not fit the {len(given)} {given[0].platform} device(s): the product of the axes must '
            f'{"divide" if rest else "be"} that number'
        )
    # With Explicit axes, the default, Linen layers would have to name their output shardings.
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=given[:used])


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise UserError where microbatches do not split evenly over the mesh."""
    shards = batch_shards(mesh)
    if accumulate < 1 or batch_size < 1 or batch_size % (accumulate * shards):
        raise UserError(
            f'batch_size is {batch_size}; it must be a positive multiple of accumulate ({accumulate}) times the '
            f'{shards} devices of the mesh axes data ({mesh.shape["data"]}) and fsdp ({mesh.shape["fsdp"]})'
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep activations (B, ...) split along the batch alone, so that the compiler gathers weights and not activations.

    Does nothing outside `jax.set_mesh`.
    """
    if 'data' not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def shardings(tree: Any, mesh: Mesh, tensor_axes: Axes = ()) -> Any:
    """A NamedSharding for each leaf (anything with a shape) of parameters, optimizer state or a full training state.

    A parameter's moments, averages and copies in a teacher lie as it does: their paths end as its path does.

    Args:
      tensor_axes: patterns that go before `TENSOR_AXES`.

    Raises:
      UserError: if heads or MLP units do not divide by the axis 'tensor', or no pattern matches a matrix of `SMALL`
        elements or more while that axis has several devices.
    """
    table = (*tensor_axes, *TENSOR_AXES)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        return NamedSharding(mesh, _spec(name, leaf.shape, mesh, table))

    return jax.tree_util.tree_map_with_path(one, tree)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, table: Axes) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape['tensor'], mesh.shape['fsdp']
    axis = _tensor_axis(path, shape, tensor, table) if tensor > 1 else None
    if axis is not None:
        axes[axis] = 'tensor'
    if fsdp > 1 and math.prod(shape) >= SMALL:
        free = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = 'fsdp'
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _tensor_axis(path: str, shape: tuple[int, ...], tensor: int, table: Axes) -> int | None:
    """The axis of a leaf that `tensor` devices split, or None."""
    matching = [axis for pattern, axis in table if re.fullmatch(pattern, f'/{path}')]
    if not matching and len(shape) > 1 and math.prod(shape) >= SMALL:
        raise UserError(
            f'mesh.tensor is {tensor}; no pattern covers {path} {shape}: give the '
            "method's tensor_axes one (with None for a copy on each device), or use mesh.tensor=1"
        )
    axis = matching[0] if matching else None
    if axis is not None and shape[axis] % tensor:
        raise UserError(
            f'mesh.tensor is {tensor}; it does not divide the {shape[axis]} '
            f'{"units" if "/mlp_" in path else "heads or columns"} of {path} {shape}'
        )
    return axis


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process reads of every global batch.

    Attributes:
      rows: int64, ascending: the rows of the batch that lie on its devices.
      share, shares: of the data, for formats without random access, where each process reads files of its own.
    """

    rows: np.ndarray
    share: int = 0
    shares: int = 1


def whole(batch_size: int) -> Part:
    """Everything, as a single process reads it."""
    return Part(np.arange(batch_size))


def local_part(batch_size: int, mesh: Mesh) -> Part:
    """Which rows of a global batch this process's devices hold. Processes that hold the same rows read the same."""
    rows: dict[int, set[int]] = {}
    for device, (part, *_) in along_batch(mesh).devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).update(range(*part.indices(batch_size)))
    shares = sorted({tuple(sorted(r)) for r in rows.values()})
    mine = tuple(sorted(rows[jax.process_index()]))
    return Part(np.array(mine, np.int64), shares.index(mine), len(shares))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Mapping[str, jax.Array]:
    """Move this process's rows of a global batch (those of `local_part`, in that order) to its devices."""
    sharding = along_batch(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    total = local_part(batch_shards(mesh), mesh).shares * len(next(iter(batch.values())))
    rows = local_part(total, mesh).rows

    def place(x):
        def part(index):
            start, stop, _ = index[0].indices(total)
            first = int(np.searchsorted(rows, start))
            return x[first : first + stop - start][(slice(None), *index[1:])]

        return jax.make_array_from_callback((total, *x.shape[1:]), sharding, part)

    return {name: place(x) for name, x in batch.items()}


def fetch(tree: Any) -> Any:
    """The whole of every array, on every host, as numpy. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
