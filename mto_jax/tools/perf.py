"""Counting work: FLOPs of a function's matrix products."""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def matmul_flops(fn: Callable, *args) -> int:
    """FLOPs of all matrix products of `fn(*args)`, 2 a multiply-add; arguments may be jax.ShapeDtypeStruct.

    Read off the traced program, so it holds for any method. The body of a scan counts once a turn, of a while loop
    once; of a conditional the dearest branch counts.
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def train_flops(job, images: int) -> float:
    """FLOPs an image of forward and backward pass, of matrix products: three times the forward pass, or where a part is
    frozen what both really take.

    Args:
      job: a `job.Job`.
      images: of the batch it is traced with.
    """
    state = job.shapes
    key = jax.eval_shape(lambda: jax.random.key(0))
    objective, clock = job.objective, job.clock(state.step)
    arguments = state.params, state.model_state, objective.constants, job.batch(images), key, clock
    if objective.constants:
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
        inner = [_flops(j) for j in _inside(eqn.params)]
        if inner:
            times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
            total += times * (max(inner) if eqn.primitive.name == 'cond' else sum(inner))
    return total


def _inside(params):
    """The programs that an instruction holds."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
