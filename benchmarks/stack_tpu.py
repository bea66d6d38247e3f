"""A stack of blocks as a loop, for a TPU: what it saves in compile time and costs in cycles and memory, without a TPU.

    python -m benchmarks.stack_tpu [--size=l] [--tokens=50] [--forms=unrolled,loop] [--topology=v5e:2x2]

Needs libtpu (requirements-tpu.txt). An encoder's stack in bfloat16 at 64 images on one chip, forward and backward, with
the gradients of all parameters, which stay per block outside of the loop. The package unrolls its stacks.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.attention_tpu import IMAGES, device_of
from mto_jax import attention
from mto_jax.models.layers import Block
from mto_jax.models.vit import SIZES
from mto_jax.tools import compile_tpu

SEEN = attention.Conditioning()


def unrolled(block, params, x):
    for p in params:
        x = block(p, x)
    return x


def loop(block, params, x, unroll=1):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(lambda x, p: (block(p, x), None), x, stacked, unroll=unroll)[0]


def recomputed(block, params, x):
    return loop(jax.checkpoint(block), params, x)


def products_kept(block, params, x):
    """The backward pass recomputes all but the products."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return loop(jax.checkpoint(block, policy=policy), params, x)


FORMS = {
    'unrolled': unrolled,
    'loop': loop,
    'loop, 2 per turn': partial(loop, unroll=2),
    'loop, 4 per turn': partial(loop, unroll=4),
    'loop, products kept': products_kept,
    'loop, recomputed': recomputed,
}


def compiled(form, size: str, tokens: int, device):
    depth, width, heads = SIZES[size]
    block = Block(heads=heads, dtype=jnp.bfloat16)
    here = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((IMAGES, tokens, width), jnp.bfloat16, sharding=here)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, SEEN, False), x)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), params)

    def loss(params, x):
        out = form(lambda p, x: block.apply(p, x, SEEN, False)[0], params, x)
        return jnp.square(out.astype(jnp.float32)).mean()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower([params] * depth, x).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--size', choices=SIZES, default='l')
    parser.add_argument('--tokens', type=int, default=50)
    parser.add_argument('--forms', type=lambda text: text.split(';'), default=list(FORMS), help='separated by ;')
    parser.add_argument('--topology', default='v5e:2x2')
    args = parser.parse_args()
    device = device_of(args.topology)
    for name in args.forms:
        start_time = time.perf_counter()
        program = compiled(FORMS[name], args.size, args.tokens, device)
        seconds = time.perf_counter() - start_time
        cycles, *_ = compile_tpu.read_hlo(program.as_text())
        temporaries = program.memory_analysis().temp_size_in_bytes / 2**30
        print(
            f'{args.topology} ViT-{args.size}, {args.tokens} tokens, {name}: {cycles / 1e6:.1f} M cycles, '
            f'{temporaries:.2f} GiB of temporaries, traced and compiled in {seconds:.0f} s',
            flush=True,
        )


if __name__ == '__main__':
    main()
