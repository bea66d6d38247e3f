"""What each config field may be, by itself: checked before anything else is done.

What fields must be to each other (heads that divide a width, a batch that splits over a mesh) is checked where they
meet. Types are ml_collections' business.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mto_jax.errors import UserError

Rule = tuple[Callable[[Any], bool], str]


def at_least(low: float) -> Rule:
    return lambda v: v >= low, f'at least {low:g}'


def above(low: float) -> Rule:
    return lambda v: v > low, f'above {low:g}'


def within(low: float, high: float, closed: bool = False) -> Rule:
    """From low on, below high or up to it."""
    return lambda v: low <= v < high or (closed and v == high), f'in [{low:g}, {high:g}{"]" if closed else ")"}'


def one_of(*values) -> Rule:
    return lambda v: v in values, 'one of ' + ', '.join(repr(v) for v in values)


def each(rule: Rule, count: int = 0) -> Rule:
    """A sequence whose members follow a rule; `count` of them, or any number but none."""
    ok, words = rule
    return (
        lambda v: (len(v) == count if count else len(v) > 0) and all(map(ok, v)),
        f'{count or "one or more"} numbers, each {words}',
    )


def ascending(rule: Rule) -> Rule:
    ok, words = each(rule, 2)
    return lambda v: ok(v) and v[0] <= v[1], f'{words}, the smaller first'


OPTIM = {
    'base_lr': at_least(0),
    'lr_reference': at_least(1),
    'b1': within(0, 1),
    'b2': within(0, 1),
    'eps': above(0),
    'weight_decay': at_least(0),
    'clip_norm': at_least(0),
    'schedule': one_of('cosine', 'multistep'),
    'warmup_epochs': at_least(0),
    'warmup_lr': at_least(0),
    'min_lr': at_least(0),
    'layer_decay': (lambda v: 0 < v <= 1, 'in (0, 1]'),
}
RULES: dict[str, Rule] = {
    'seed': at_least(0),
    'data.image_size': each(at_least(1), 2),
    'data.channels': at_least(1),
    'data.num_classes': at_least(1),
    'data.crop': one_of('random_resized', 'resize'),
    'data.crop_area': ascending((lambda v: 0 < v <= 1, 'in (0, 1]')),
    'data.crop_aspect': ascending(above(0)),
    'data.interpolation': one_of('bicubic', 'bilinear'),
    'data.eval_resize': at_least(0),
    'data.std': each(above(0)),
    'data.shuffle_buffer': at_least(1),
    'data.on_error': one_of('raise', 'replace'),
    'data.threads': at_least(0),
    'model.depth': at_least(0),
    'model.width': at_least(0),
    'model.heads': at_least(0),
    'model.patch_size': at_least(1),
    'model.mlp_ratio': above(0),
    'model.layer_scale': at_least(0),
    'model.drop_path': within(0, 1),
    'model.mask_token_norm': at_least(0),
    'model.dtype': one_of('float32', 'bfloat16', 'float16'),
    'model.attention': one_of('xla', 'cudnn', ''),
    'mask_ratio': within(0, 1),
    'mae.decoder_depth': at_least(1),
    'mae.decoder_width': at_least(1),
    'mae.decoder_heads': at_least(1),
    'simmim.mask_unit': at_least(1),
    'batch_size': at_least(1),
    'accumulate': at_least(1),
    'epochs': above(0),
    'hosts.timeout': above(0),
    'log_every': at_least(1),
    'diagnose_every': at_least(0),
    'log_images': at_least(1),
    'checkpoints.every': at_least(0),
    'checkpoints.keep': at_least(1),
    'eval.every_epochs': at_least(0),
    'eval.batch_size': at_least(1),
    'eval.train_examples': at_least(0),
    'eval.weights': one_of('student', 'teacher'),
    'eval.depth': at_least(0),
    'eval.knn_k': each(at_least(1)),
    'eval.knn_temperature': above(0),
    'eval.linear_l2': each(at_least(0)),
    'eval.linear_steps': at_least(1),
    'compare.seeds': each(at_least(0)),
    'finetune.epochs': at_least(0),
    'finetune.label_share': (lambda v: 0 < v <= 1, 'in (0, 1]'),
    'finetune.batch_size': at_least(1),
    'study.evaluations': at_least(1),
    'study.split': one_of('val', 'test'),
    'study.seeds_at_once': at_least(1),
    'study.count': at_least(1),
} | {f'{part}optim.{name}': rule for part in ('', 'finetune.') for name, rule in OPTIM.items()}


# Fields that an evaluation of a checkpoint has itself; a name that ends in a dot stands for all below it.
EVALUATION = ('task', 'workdir', 'checkpoint', 'deterministic', 'allow_cpu', 'hosts.', 'mesh.', 'eval.')
# Fields of the checkpoint's config that it may replace: where the data lie and how they are read, and the attention
# kernel, which may not exist on the device that evaluates.
REPLACEABLE = ('data.name', 'data.data_dir', 'data.train_split', 'data.test_split', 'data.num_classes')
REPLACEABLE += ('data.eval_resize', 'data.on_error', 'data.threads', 'model.attention')


def is_among(name: str, fields: Sequence[str]) -> bool:
    """Whether a dotted name is one of the fields, or below one that ends in a dot."""
    return any(name == f or (f[-1] == '.' and name.startswith(f)) for f in fields)


def check(config, partial: bool = False) -> None:
    """Raises UserError for the first field that cannot be what it is, naming it, its value and what it must be.

    Args:
      partial: fields may be None, which stands for what a checkpoint's config says.
    """
    for name, (ok, words) in RULES.items():
        value = config
        for part in name.split('.'):
            value = value[part]
        if value is None and partial:
            continue
        if value is None or not ok(value):
            raise UserError(f'{name} is {value!r}; it must be {words}')
    for name in ('mean', 'std'):
        if partial and None in (config.data[name], config.data.channels):
            continue
        if len(config.data[name]) != config.data.channels:
            raise UserError(
                f'data.{name} has {len(config.data[name])} values; it must have one for each of data.channels '
                f'({config.data.channels})'
            )
