"""The optimizer: AdamW with a decay mask, layer-wise rates, and clipping."""

import jax
import optax


def decay_mask(params, decay_cls_token: bool, decay_mask_token: bool):
    """True for the parameters that weight decay acts on: a pytree like `params`.

    Biases, norms and layer scales never decay (whatever their shape here, they are vectors in the official codes);
    learned positions never do; the class token and the mask token do where the arguments say so.
    """
    tokens = {'cls_token': decay_cls_token, 'mask_token': decay_mask_token}

    def decays(path, leaf):
        name = path[-1].key
        if name in tokens:
            return tokens[name]
        return leaf.ndim > 1 and not name.endswith('bias') and name != 'pos_embed'

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params, layer_decay: float):
    """Factors of the learning rate, a pytree of floats like `params`: `layer_decay ** (blocks above + 1)`.

    The patch projection, tokens and positions lie below block 0; the final norm, a shared relative-position table, and
    whatever is not the encoder have factor 1 (the rule of BEiT's and MAE's fine-tuning codes).
    """
    depth = sum(name.startswith('block') for name in params['encoder']['blocks'])

    def scale(path, _):
        names = [p.key for p in path]
        if names[0] != 'encoder' or names[1] in ('norm', 'relative_bias_table'):
            return 1.0
        index = 1 + int(names[2].removeprefix('block')) if names[1] == 'blocks' else 0
        return layer_decay ** (depth + 1 - index)

    return jax.tree_util.tree_map_with_path(scale, params)


def adamw(optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW as `config.optim` has it: behind clipping by the global norm where `clip_norm` is positive, and with the
    rates of `layer_scales` where `layer_decay` is not 1.

    Its state has the same tree whatever these two are, so that a run can resume with another choice.
    """
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    tx = optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=lambda params: decay_mask(params, optim.decay_cls_token, optim.decay_mask_token),
    )
    by_layer = optax.identity()
    if optim.layer_decay != 1.0:
        by_layer = optax.stateless(
            lambda updates, params: jax.tree.map(lambda u, s: u * s, updates, layer_scales(params, optim.layer_decay))
        )
    return optax.chain(clip, tx, by_layer)
