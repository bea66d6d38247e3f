"""The optimizer: AdamW with a decay mask, and clipping."""

import jax
import optax

TOKENS = ('cls_token', 'mask_token')


def decay_mask(params, decay_tokens: bool):
    """True for the parameters that weight decay acts on: a pytree like `params`.

    Biases, norms and layer scales never decay (whatever their shape here, they are vectors in the official codes);
    learned positions never do; class and mask tokens do where `decay_tokens` says so.
    """

    def decays(path, leaf):
        name = path[-1].key
        if name in TOKENS:
            return decay_tokens
        return leaf.ndim > 1 and not name.endswith('bias') and name != 'pos_embed'

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW as `config.optim` has it, behind clipping by the global norm where `clip_norm` is positive."""
    tx = optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=lambda params: decay_mask(params, optim.decay_tokens),
    )
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx) if optim.clip_norm else tx
