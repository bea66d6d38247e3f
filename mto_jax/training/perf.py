"""Counting work: FLOPs of a function's matrix products, and how fast devices could do them."""

import math
from collections.abc import Callable

import jax
from jax.extend import core

# Dense bfloat16 FLOPs per second of one device, by a part of jax's name for its kind; the first that matches counts.
# From NVIDIA's data sheets of the cards, and Google's documentation of Cloud TPUs.
PEAKS = {
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H200': 989e12,
    'A100': 312e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v6': 918e12,
}


def peak(kind: str) -> float | None:
    """Dense bfloat16 FLOPs per second of a device of that `device_kind`; None where they are not known."""
    return next((flops for part, flops in PEAKS.items() if part in kind), None)


def roofline(job, dtype: str) -> float | None:
    """Images per second if the devices of the mesh (`jax.set_mesh`) did a training's matrix products at their peak.

    Args:
      job: a `job.Job`.
      dtype: of the matrix products.

    Returns:
      None for devices whose peak is not known, and for float32, whose peak is another.
    """
    mesh = jax.sharding.get_abstract_mesh()
    of_one = peak(mesh.abstract_device.device_kind)
    if not of_one or dtype == 'float32':
        return None
    return of_one * mesh.size / train_flops(job)


# Matrix products of jax's calls of cuDNN's attention.
FUSED = {'dot_product_attention_fwd_wrapper': 2, 'dot_product_attention_bwd_wrapper': 4}


def matmul_flops(fn: Callable, *args) -> int:
    """FLOPs of all matrix products of `fn(*args)`, 2 a multiply-add; arguments may be jax.ShapeDtypeStruct.

    Read off the traced program, so it holds for any method. The body of a scan counts once per turn, of a while loop
    once; of a conditional the most expensive branch is counted. cuDNN's attention counts as its two products forward,
    and as twice these backward. Of blocks that a backward pass recomputes a third is taken off, which
    leaves the count at most 5% too low.
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def train_flops(job) -> float:
    """FLOPs per image of the matrix products of a `job.Job`, forward and backward, without recomputation.

    Three times the forward pass; or what both really take where a part has no gradient, a frozen encoder or a teacher.
    """
    state = job.shapes
    key = jax.eval_shape(lambda: jax.random.key(0))
    objective, clock = job.objective, job.clock(state.step)
    images = next(iter(job.microbatch.values())).shape[0]
    arguments = state.params, state.model_state, objective.constants, job.microbatch, key, clock
    if objective.constants or state.model_state:
        return matmul_flops(jax.grad(objective.loss, has_aux=True), *arguments) / images
    return 3 * matmul_flops(objective.loss, *arguments) / images


def _flops(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'dot_general':
            (contracted, _), _ = eqn.params['dimension_numbers']
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
            continue
        if eqn.primitive.name in FUSED:
            (batch, queries, heads, width), keys = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
            total += FUSED[eqn.primitive.name] * 2 * batch * heads * queries * keys * width
            continue
        inner = [_flops(j) for j in _inside(eqn.params)]
        if inner:
            times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
            flops = times * (max(inner) if eqn.primitive.name == 'cond' else sum(inner))
            total += flops * 2 // 3 if eqn.params.get('differentiated') else flops
    return total


def _inside(params):
    """The programs that an instruction holds."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
