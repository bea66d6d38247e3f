"""Attention on arrays: what a block does between its projections. B images, h heads, N queries, M keys, d features."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Conditioning:
    """What a block sees in addition to its input, and differs from batch to batch; None where there is none.

    Attributes:
      bias: float (h, N, N), the relative-position bias.
      masked: bool (B, N), where a mask token stands for a patch; False for prefix tokens.
      tokens: (B, N, D), the block's input as statistics read it: the input itself, or at a stack's first block the
        embedded tokens before positions are added.
      inputs: (B, N, D), the block's input itself.
      progress: float32 scalar, the fraction of the training that is over; None for a training that has ended.
      memory: (B, M, D'), the tokens that cross-attention reads. With it every block has a cross-attention.
    """

    bias: jax.Array | None = None
    masked: jax.Array | None = None
    tokens: jax.Array | None = None
    inputs: jax.Array | None = None
    progress: jax.Array | None = None
    memory: jax.Array | None = None


# `attend(q, k, v, seen) -> (out, statistics)` with q, k, v (B, N or M, h, d), a Conditioning, and out like q. A block's
# field: hashable, known when the block is built.
Attend = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


# What cuDNN's fused attention takes, forward and backward, on all GPUs that have it.
CUDNN_DTYPES, CUDNN_MULTIPLE, CUDNN_WIDEST, CUDNN_CAPABILITY = ('bfloat16', 'float16'), 8, 128, 8.0
# Bytes of logits on one TPU from which one head at a time is faster: they do not stay in the chip's own memory.
LARGE = 2**26
EXTRA = 8  # features that `fused` adds to each head for a shift: kernels want multiples of 8
# A logit that leaves a key no weight, and is still a number in float16.
REMOVED = -1e4


@dataclasses.dataclass(frozen=True)
class DotProduct:
    """Scaled dot-product attention.

    Attributes:
      implementation: as for `kernel`.
    """

    implementation: str = ''

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: Conditioning) -> tuple[jax.Array, dict]:
        chosen = kernel(self.implementation, q, k)
        if chosen:
            return fused(q, k, v, seen.bias, chosen), {}
        products = logits(q, k)
        return weighted_values(products if seen.bias is None else products + seen.bias, v), {}


def kernel(implementation: str, q: jax.Array, k: jax.Array, extra: int = 0) -> str:
    """The form of attention for queries and keys on the devices of the mesh (`jax.set_mesh`), or jax's default ones.

    Args:
      implementation: 'auto' for cuDNN's kernel on a GPU where it fits, one head at a time on a TPU where the logits are
        large, and plain products otherwise; or what is returned.
      q, k: (B, N, h, d) and (B, M, h, d).
      extra: features that each head gets in addition.

    Returns:
      'cudnn' or 'xla', implementations of `jax.nn.dot_product_attention`; 'heads' for plain products of one head at a
      time; '' for plain products of all.
    """
    if implementation != 'auto':
        return implementation
    mesh = jax.sharding.get_abstract_mesh()
    platform = mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
    width, split = q.shape[-1] + extra, dict(mesh.shape)
    if platform == 'gpu' and _has_cudnn():
        fits = q.dtype.name in CUDNN_DTYPES and width % CUDNN_MULTIPLE == 0 and width <= CUDNN_WIDEST
        return 'cudnn' if fits else ''
    tensor = split.get('tensor', 1)  # splits heads: a loop over them would gather them
    if platform == 'tpu' and tensor == 1:
        images, queries, heads, _ = q.shape
        return 'heads' if 4 * images * heads * queries * k.shape[1] / max(mesh.size, 1) > LARGE else ''
    return ''


def _has_cudnn() -> bool:
    capability = str(getattr(jax.local_devices(backend='gpu')[0], 'compute_capability', ''))
    return capability.replace('.', '', 1).isdigit() and float(capability) >= CUDNN_CAPABILITY  # of AMD: 'gfx90a'


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    implementation: str,
    shift: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention that stores no (B, h, N, M).

    Args:
      q, k, v: (B, N, h, d) and (B, M, h, d).
      bias: (h, N, M), added to the logits; or None.
      implementation: 'cudnn', 'xla' or 'heads', see `kernel`.
      shift: float32 (B, N) of 0 and 1, and (B, M) of at least `REMOVED`: their products are added to all heads' logits.
        They have no gradient. None for nothing.
    """
    n, m, d, bounds = q.shape[1], k.shape[1], q.shape[-1], {}
    if implementation == 'heads':
        return head_by_head(q, k, v, bias, shift)[0]
    if shift:
        q, k, v = _with_shift(q, k, v, *shift)
    if implementation == 'cudnn' and (n % 2 or m % 2):  # cuDNN has no gradients of an odd number of tokens
        q, (k, v) = _longer(q, n % 2), (_longer(x, m % 2) for x in (k, v))
        if bias is None:
            lengths = {'query_seq_lengths': n, 'key_value_seq_lengths': m}
            bounds = {name: jnp.full(len(q), length, jnp.int32) for name, length in lengths.items()}
        else:
            bias = jnp.pad(bias, ((0, 0), (0, n % 2), (0, 0)))
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, m % 2)), constant_values=REMOVED)
    bias = None if bias is None else bias.astype(q.dtype)[None]
    out = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0 / math.sqrt(d), implementation=implementation, **bounds)
    return out[:, :n, :, :d]


def _with_shift(q, k, v, on_queries, on_keys):
    """Queries, keys and values whose plain attention, with the scale of the given ones, has the shift.

    It is a matrix of rank one, and so one more feature of queries and keys; a second has what the dtype rounds off.
    """
    on_keys = jnp.maximum(math.sqrt(q.shape[-1]) * on_keys, REMOVED)
    coarse = on_keys.astype(k.dtype)
    on_keys = jnp.stack([coarse, (on_keys - coarse.astype(on_keys.dtype)).astype(k.dtype)], axis=-1)

    def widened(x, features):
        features = jnp.broadcast_to(features[:, :, None], (*x.shape[:3], 2)).astype(x.dtype)
        return jnp.concatenate([x, jnp.pad(features, ((0, 0), (0, 0), (0, 0), (0, EXTRA - 2)))], axis=-1)

    return widened(q, on_queries[..., None]), widened(k, on_keys), jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, EXTRA)))


def head_by_head(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    shift: tuple[jax.Array, jax.Array] | None = None,
    masked: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """`fused` in a loop over the heads; and how much of the softmax of the products alone lies on which keys.

    Args:
      q, k, v, bias, shift: as for `fused`.
      masked: bool (B, M), or None.

    Returns:
      The output (B, N, h, d); and float32 (B, h, N), the sums over keys that are not masked and over those that are, of
      a softmax without bias and shift. None without `masked`.
    """
    heads_first = (x.transpose(2, 0, 1, 3) for x in (q, k, v))
    out, mass = _head_by_head(*heads_first, bias, shift, masked)
    return out.transpose(1, 2, 0, 3), jax.tree.map(lambda x: x.transpose(1, 0, 2), mass)


def _products(q, k):
    return 1.0 / math.sqrt(q.shape[-1]) * jnp.einsum('bqd,bkd->bqk', q, k, preferred_element_type=jnp.float32)


def _with_bias(x, bias, combine):
    """x (B, N, M) with a bias (N, M), or one of each device's images (devices, N, M), or None."""
    if bias is None:
        return x
    if bias.ndim == 2:
        return combine(x, bias)
    return combine(x.reshape(len(bias), -1, *bias.shape[1:]), bias[:, None]).reshape(x.shape)


def _one_head(q, k, v, bias, shift):
    """Attention of (B, N, d), and None."""
    products = _with_bias(_products(q, k), bias, jnp.add)
    if shift is not None:
        products = products + shift[0][:, :, None] * shift[1][:, None, :]
    return jnp.einsum('bqk,bkd->bqd', jax.nn.softmax(products, axis=-1).astype(v.dtype), v), None


def _one_head_and_mass(q, k, v, bias, factor, on_masked):
    """Attention of (B, N, d), weights times `factor` (B, N, M), and the masses by `on_masked` (B, N, M), 1 or 0."""
    products = _products(q, k)
    # One exponential for both softmaxes: bias and shift are factors of it.
    weights = jnp.exp(products - jax.lax.stop_gradient(products.max(-1, keepdims=True)))
    total, masses = weights.sum(-1), [(weights * chosen).sum(-1) for chosen in (1.0 - on_masked, on_masked)]
    weights = _with_bias(weights * factor, None if bias is None else jnp.exp(bias), jnp.multiply)
    out = jnp.einsum('bqk,bkd->bqd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return out.astype(v.dtype), tuple(mass / total for mass in masses)


def _for_one_head(q, shift, masked):
    """What is done with each head: a function of its q, k, v and bias."""
    if masked is None:
        return partial(_one_head, shift=shift)
    pairs = (len(masked), q.shape[2], masked.shape[1])
    factor = jnp.ones(pairs, jnp.float32)
    if shift is not None:
        factor += shift[0][:, :, None] * jnp.expm1(shift[1])[:, None, :]
    on_masked = jnp.broadcast_to(masked[:, None, :], pairs).astype(q.dtype)
    # Made here, once: on a TPU, spreading a value per key over the queries costs each head more than its softmax.
    factor, on_masked = jax.lax.optimization_barrier((factor, on_masked))
    return partial(_one_head_and_mass, factor=factor, on_masked=on_masked)


def _per_device(bias: jax.Array, images: int) -> jax.Array:
    """A bias (h, N, M) once per device along the batch, (h, devices, N, M).

    So each device sums the gradient over its own images, and one reduction follows the loop instead of one per turn.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in ('data', 'fsdp') if name in mesh.axis_names)
    devices = math.prod(mesh.shape[name] for name in axes)
    if images % devices:
        return bias[:, None]
    bias = jnp.broadcast_to(bias[:, None], (len(bias), devices, *bias.shape[1:]))
    return jax.lax.with_sharding_constraint(bias, jax.sharding.PartitionSpec(None, axes)) if axes else bias


@jax.custom_vjp
def _head_by_head(q, k, v, bias, shift, masked):
    """Attention of (h, B, N, d), in a loop over the heads: what lies between its products never leaves the chip."""
    one_head = _for_one_head(q, shift, masked)
    return jax.lax.map(lambda head: one_head(*head), (q, k, v, bias))


def _head_by_head_fwd(q, k, v, bias, shift, masked):
    return _head_by_head(q, k, v, bias, shift, masked), ((q, k, v, bias), shift, masked)


def _head_by_head_bwd(kept, gradient):
    """Each head's gradients take the place of its inputs: new arrays would be filled with zeros first."""
    inputs, shift, masked = kept
    one_head = _for_one_head(inputs[0], shift, masked)
    if inputs[3] is not None:
        inputs = (*inputs[:3], _per_device(inputs[3], len(inputs[0][0])))

    def turn(i, arrays):
        one = partial(jax.lax.dynamic_index_in_dim, index=i, axis=0, keepdims=False)
        # All is read before any is overwritten; else the arrays would be copied.
        head, back_in = jax.lax.optimization_barrier(jax.tree.map(one, (arrays, gradient)))
        _, back = jax.vjp(one_head, *head)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), arrays, back(back_in))

    *of_tokens, of_bias = jax.lax.fori_loop(0, len(inputs[0]), turn, inputs)
    return *of_tokens, None if of_bias is None else of_bias.sum(1), None, None


_head_by_head.defvjp(_head_by_head_fwd, _head_by_head_bwd)


def _longer(x: jax.Array, by: int) -> jax.Array:
    """x (B, N, h, d) with so many tokens of zeros more."""
    return jnp.pad(x, ((0, 0), (0, by), (0, 0), (0, 0)))


def logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled dot products, float32 (B, h, N, M), of q (B, N, h, d) and k (B, M, h, d)."""
    return 1.0 / math.sqrt(q.shape[-1]) * jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=jnp.float32)


def mean_logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """The mean over heads of `logits`, float32 (B, N, M), as one product."""
    scale = 1.0 / (q.shape[2] * math.sqrt(q.shape[-1]))
    return scale * jnp.einsum('bqhd,bkhd->bqk', q, k, preferred_element_type=jnp.float32)


def weighted_values(logits: jax.Array, v: jax.Array) -> jax.Array:
    """The values (B, M, h, d) weighted by the softmax of logits (B, h, N, M) over the keys: (B, N, h, d)."""
    return values(jax.nn.softmax(logits, axis=-1), v)


def values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """The values (B, M, h, d) with weights (B, h, N, M): (B, N, h, d)."""
    return jnp.einsum('bhqk,bkhd->bqhd', weights.astype(v.dtype), v)
