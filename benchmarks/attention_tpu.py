"""Forms of attention for a TPU: cycles that the compiler estimates for one block, forward and backward, without a TPU.

    python -m benchmarks.attention_tpu [--stack=decoder|encoder|simmim] [--forms=plain,heads] [--topology=v5e:2x2]

Needs libtpu (requirements-tpu.txt). A block is ViT-B's (or MAE's decoder's) in bfloat16 at 64 images on one chip. Each
form takes about a minute. `plain` and `heads` are what the package has (`mto_jax.attention.kernel`); the others were
tried.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mto_jax import attention
from mto_jax.models.layers import Block
from mto_jax.tools import compile_tpu

STACKS = {'decoder': (197, 512, 16), 'encoder': (50, 768, 12), 'simmim': (197, 768, 12)}  # tokens, width, heads
IMAGES = 64
f32 = jnp.float32


def logits(q, k):
    return attention.logits(q, k)


def unnormalised(q, k, v, products=None):
    """The sum of the weights divides the output, not the weights."""
    s = logits(q, k) if products is None else products
    p = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    out = jnp.einsum('bhqk,bkhd->bqhd', p.astype(v.dtype), v, preferred_element_type=f32)
    return (out / p.sum(-1).transpose(0, 2, 1)[..., None]).astype(v.dtype)


def bfloat16_logits(q, k, v):
    """Logits are rounded to bfloat16 in memory."""
    s = jnp.einsum('bqhd,bkhd->bhqk', q * q.dtype.type(1 / math.sqrt(q.shape[-1])), k)
    return unnormalised(q, k, v, s.astype(f32))


def keys_first(q, k, v):
    """(B, h, M, N): the softmax runs over the other axis of the chip's registers."""
    weights = jax.nn.softmax(logits(k, q), axis=-2)
    return jnp.einsum('bhkq,bkhd->bqhd', weights.astype(v.dtype), v)


def recomputed(q, k, v):
    return jax.checkpoint(lambda *x: attention.weighted_values(logits(*x[:2]), x[2]))(q, k, v)


@jax.custom_vjp
def logsumexp_kept(q, k, v):
    """As flash attention: the backward pass makes the weights anew from queries, keys and the logsumexp."""
    return _logsumexp_kept(q, k, v)[0]


def _logsumexp_kept(q, k, v):
    s = logits(q, k)
    total = jax.nn.logsumexp(s, axis=-1, keepdims=True)
    out = jnp.einsum('bhqk,bkhd->bqhd', jnp.exp(s - total).astype(v.dtype), v)
    return out, (q, k, v, out, total)


def _logsumexp_back(kept, g):
    q, k, v, out, total = kept
    p = jnp.exp(logits(q, k) - total)
    mean = (g.astype(f32) * out.astype(f32)).sum(-1).transpose(0, 2, 1)[..., None]
    on_p = jnp.einsum('bqhd,bkhd->bhqk', g, v, preferred_element_type=f32)
    s = (p * (on_p - mean) / math.sqrt(q.shape[-1])).astype(q.dtype)
    on_q, on_k = jnp.einsum('bhqk,bkhd->bqhd', s, k), jnp.einsum('bhqk,bqhd->bkhd', s, q)
    return on_q, on_k, jnp.einsum('bhqk,bqhd->bkhd', p.astype(q.dtype), g)


logsumexp_kept.defvjp(_logsumexp_kept, _logsumexp_back)


def images_in_fours(q, k, v):
    """A loop over four images at a time, recomputed in the backward pass."""
    return jax.lax.map(lambda one: recomputed(*(x[None] for x in one))[0], (q, k, v), batch_size=4)


def heads_in_a_scan(q, k, v):
    """A loop over heads, recomputed in the backward pass, as jax differentiates it."""
    parts = tuple(x.transpose(2, 0, 1, 3)[:, :, :, None] for x in (q, k, v))
    return jax.lax.map(lambda one: recomputed(*one), parts)[:, :, :, 0].transpose(1, 2, 0, 3)


def heads_in_fours(q, k, v):
    """A loop over four heads at a time, recomputed in the backward pass."""
    parts = tuple(x.reshape(*x.shape[:2], -1, 4, x.shape[-1]).transpose(2, 0, 1, 3, 4) for x in (q, k, v))
    return jax.lax.map(lambda one: recomputed(*one), parts).transpose(1, 2, 0, 3, 4).reshape(q.shape)


def block_diagonal(q, k, v):
    """The heads that fill 128 features share each product: keys and values stand in a block-diagonal matrix."""
    b, n, heads, d = q.shape
    group = min(heads, 128 // d)
    q, k, v = (x.reshape(b, n, heads // group, group, d) for x in (q, k, v))
    blocks = jnp.eye(group, dtype=q.dtype)
    k, v = (jnp.einsum('bngid,ij->bgjnid', x, blocks).reshape(b, -1, group * n, group * d) for x in (k, v))
    q = q.transpose(0, 2, 1, 3, 4).reshape(b, -1, n, group * d)
    s = jnp.einsum('bgqc,bgkc->bgqk', q, k, preferred_element_type=f32) / math.sqrt(d)
    weights = jax.nn.softmax(s.reshape(*s.shape[:-1], group, n), axis=-1).reshape(s.shape)
    out = jnp.einsum('bgqk,bgkc->bqgc', weights.astype(v.dtype), v)
    return out.reshape(b, n, heads, d)


def pairs_of_images(q, k, v):
    """Two images share each product; what belongs to different images is masked."""
    b, n, heads, d = q.shape
    q, k, v = (x.reshape(b // 2, 2 * n, heads, d) for x in (q, k, v))
    image = jnp.arange(2 * n) // n
    s = jnp.where(image[:, None] == image, logits(q, k), -jnp.inf)
    return attention.weighted_values(s, v).reshape(b, n, heads, d)


def pallas_flash(q, k, v):
    """The kernel that jax ships, on tokens padded to blocks of 128. Its cost is not in the compiler's estimate."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    n, d = q.shape[1], q.shape[-1]
    longer = -(-n // 128) * 128
    q, k, v = (jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, longer - n), (0, 0))) for x in (q, k, v))
    there = jnp.broadcast_to((jnp.arange(longer) < n).astype(jnp.int32), (len(q), longer))
    out = flash.flash_attention(q, k, v, segment_ids=flash.SegmentIds(there, there), sm_scale=1 / math.sqrt(d))
    return out[:, :, :n].transpose(0, 2, 1, 3)


def heads_unrolled(q, k, v):
    parts = [recomputed(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(q.shape[2])]
    return jnp.concatenate(parts, axis=2)


def shipped(implementation):
    return lambda q, k, v: attention.DotProduct(implementation)(q, k, v, attention.Conditioning())[0]


FORMS = {'plain': shipped(''), 'heads': shipped('heads')} | {
    f.__name__: f
    for f in (
        unnormalised,
        bfloat16_logits,
        keys_first,
        recomputed,
        logsumexp_kept,
        images_in_fours,
        heads_in_a_scan,
        heads_in_fours,
        heads_unrolled,
        block_diagonal,
        pairs_of_images,
        pallas_flash,
    )
}


def compiled(form, stack: str, device):
    """A block's gradients with respect to its input and parameters."""
    tokens, width, heads = STACKS[stack]
    block = Block(heads=heads, attend=lambda q, k, v, seen: (form(q, k, v), {}), dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((IMAGES, tokens, width), jnp.bfloat16)
    seen = attention.Conditioning()
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, seen, False), x)
    here = SingleDeviceSharding(device)
    params, x = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), (params, x))

    def loss(params, x):
        return jnp.square(block.apply(params, x, seen, False)[0].astype(f32)).mean()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()


def device_of(topology: str):
    """One chip of a slice, to compile for."""
    compile_tpu.prepare_libtpu()
    chip = compile_tpu.CHIPS[topology.partition(':')[0]]
    return topologies.get_topology_desc(topology, 'tpu', chip_config_name=chip.config).devices[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--stack', choices=STACKS, default='decoder')
    parser.add_argument('--forms', default=','.join(FORMS))
    parser.add_argument('--topology', default='v5e:2x2')
    args = parser.parse_args()
    device = device_of(args.topology)
    for name in args.forms.split(','):
        start_time = time.perf_counter()
        program = compiled(FORMS[name], args.stack, device)
        cycles, _, left_out = compile_tpu.read_hlo(program.as_text())
        temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
        print(
            f'{args.topology} {args.stack} {name}: {cycles / 1e6:.2f} M cycles, {temporaries:.0f} MiB of temporaries, '
            f'compiled in {time.perf_counter() - start_time:.0f} s',
            *(f'; without {what}' for what in left_out),
            flush=True,
        )


if __name__ == '__main__':
    main()
