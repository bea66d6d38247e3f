"""The optimizers: AdamW with a decay mask, layer-wise rates and clipping; and LARS for linear probes.

What differs between parameters stands in two tables of (pattern, value). A pattern is a regular expression for the full
path of a parameter ('encoder/blocks/block0/attn/proj/kernel'); the first that matches counts.
"""

import re

import jax
import optax

from mto_jax.errors import UserError


def decay_mask(params, decay_cls_token: bool, decay_mask_token: bool):
    """True for the parameters that weight decay acts on: a pytree like `params`.

    Where no pattern matches, matrices decay and vectors do not (a single scale, a statistic).
    """
    table = (
        (r'(.*/)?\w*cls_token\w*(/embedding)?', decay_cls_token),
        (r'(.*/)?\w*mask_token\w*(/embedding)?', decay_mask_token),
        (r'(.*/)?\w*pos_embed\w*(/embedding)?', False),
        (r'(.*/)?relative_\w+', True),  # a table of relative positions, as SimMIM and ConMIM have it
        # Vectors in the official codes, whatever their shape here: biases, norms (of layers and batches), layer scales.
        (r'(.*/)?(\w*bias|scale|gamma\w*)', False),
    )

    def decays(path, leaf):
        return _first(table, path, leaf.ndim > 1)

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params, layer_decay: float):
    """Factors of the learning rate, a pytree of floats like `params`: `layer_decay` to the power of the layers above.

    The patch projection, tokens and positions lie below block 0; the final norm, a shared relative-position table, and
    whatever is not the encoder have factor 1 (the rule of BEiT's and MAE's fine-tuning codes).
    """
    blocks = [name for name in params['encoder']['blocks'] if name.startswith('block')]
    table = (
        *((f'encoder/blocks/{name}/.*', len(blocks) - int(name.removeprefix('block'))) for name in blocks),
        (r'encoder/(norm/.*|relative_bias_table)', 0),
        (r'encoder/.*', len(blocks) + 1),
    )
    return jax.tree_util.tree_map_with_path(lambda path, _: layer_decay ** _first(table, path, 0), params)


def _first(table, path, default):
    """The value of the first pattern that matches the full path of a leaf."""
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return next((value for pattern, value in table if re.fullmatch(pattern, name)), default)


def build(optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer that `config.optim`, or a group like it, names. Raises as `lars`."""
    return lars(optim, schedule) if optim.name == 'lars' else adamw(optim, schedule)


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


def lars(optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """LARS (arXiv 1708.03888) as MAE's linear probe has it (facebookresearch/mae, util/lars.py), with momentum `b1`.

    The rate of each matrix is `trust_coefficient` times its norm over that of its gradient; vectors have neither that
    nor weight decay. The learning rate multiplies what leaves the momentum.

    Raises:
      UserError: for `layer_decay`, which it does not have.
    """
    if optim.layer_decay != 1:
        raise UserError(f"optim.layer_decay is {optim.layer_decay:g}; with optim.name='lars' it must be 1")

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        optax.add_decayed_weights(optim.weight_decay, matrices),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=optim.trust_coefficient), matrices),
        optax.trace(optim.b1),
        optax.scale_by_learning_rate(schedule),
    )
