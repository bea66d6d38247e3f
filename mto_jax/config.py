"""The schema: every config field with its default, what it may be, and what it does to a run.

A field that is not here is an error, on the command line too. Empty strings and zeros mean "chosen for you" where the
comment says so. What fields must be to each other (heads that divide a width, a batch that splits over a mesh) is
checked where they meet. ml_collections checks types.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mto_jax.errors import UserError

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and in words what is


def at_least(low: float) -> Rule:
    return lambda v: v >= low, f'at least {low:g}'


def above(low: float) -> Rule:
    return lambda v: v > low, f'above {low:g}'


def within(low: float, high: float) -> Rule:
    """From low on, below high."""
    return lambda v: low <= v < high, f'in [{low:g}, {high:g})'


def one_of(*values) -> Rule:
    return lambda v: v in values, 'one of ' + ', '.join(repr(v) for v in values)


def integer(low: int) -> Rule:
    return lambda v: isinstance(v, int) and v >= low, f'an integer of at least {low}'


def each(rule: Rule, count: int = 0) -> Rule:
    """A sequence whose members follow a rule; `count` of them, or any number but none."""
    ok, words = rule
    return (
        lambda v: (len(v) == count if count else len(v) > 0) and all(map(ok, v)),
        f'{count or "one or more"} values, each {words}',
    )


def different(rule: Rule) -> Rule:
    """A sequence of at least one, without a value twice."""
    ok, words = rule
    return lambda v: len(v) > 0 and all(map(ok, v)) and len(set(v)) == len(v), f'different values, each {words}'


def none_or(rule: Rule) -> Rule:
    ok, words = rule
    return lambda v: len(v) == 0 or ok(v), f'empty, or {words}'


def ascending(rule: Rule) -> Rule:
    ok, words = each(rule, 2)
    return lambda v: ok(v) and v[0] <= v[1], f'{words}, the smaller first'


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field.

    Attributes:
      default: also says the type.
      rule: what a value must be.
      shapes_run: a run that resumes must keep the value, for the weights depend on it.
      own: an evaluation of a checkpoint has its own value.
      replaces: an evaluation may replace the checkpoint's: where the data lie and how they are read, and the attention
        kernel, which may not exist on the device that evaluates.
      trains: a fine-tuning of a checkpoint has its own value.
    """

    default: Any
    rule: Rule | None
    shapes_run: bool
    own: bool = False
    replaces: bool = False
    trains: bool = False


def shapes(default, rule=None, **more) -> Field:
    """A field that shapes a run."""
    return Field(default, rule, True, **more)


def shows(default, rule=None, **more) -> Field:
    """A field that changes what is shown or kept, not what is computed."""
    return Field(default, rule, False, **more)


PORTION = (lambda v: 0 < v <= 1, 'in (0, 1]')
# More bits than these would not tell streams apart: jax's keys take 32.
SEED = (lambda v: isinstance(v, int) and 0 <= v < 2**32, 'an integer from 0 to 2**32 - 1')
UNIT = (lambda v: 0 <= v <= 1, 'in [0, 1], of pixels in [0, 1]: divide what is meant for 0 to 255 by 255')
DEVIATION = (lambda v: 0 < v <= 1, UNIT[1].replace('[0, 1]', '(0, 1]', 1))
PROBABILITY = (lambda v: 0 <= v <= 1, 'in [0, 1]')


def _optim(group: str, kind: Callable[..., Field] = shapes) -> dict[str, Field]:
    """An optimizer's fields."""
    fields = {
        'name': kind('adamw', one_of('adamw', 'lars')),
        'base_lr': kind(1.5e-4, at_least(0)),  # per lr_reference images: lr = base_lr * batch_size / lr_reference
        'lr_reference': kind(256, at_least(0)),  # 0: base_lr and warmup_lr are absolute
        'b1': kind(0.9, within(0, 1)),  # of LARS: the momentum
        'b2': kind(0.95, within(0, 1)),
        'eps': kind(1e-8, above(0)),
        'weight_decay': kind(0.05, at_least(0)),
        'decay_cls_token': kind(True),  # weight decay acts on the class token, as in the official MAE
        'decay_mask_token': kind(True),  # and on the mask token
        'clip_norm': kind(0.0, at_least(0)),  # 0: no clipping
        'schedule': kind('cosine', one_of('cosine', 'multistep')),  # cosine, multistep
        'warmup_epochs': kind(40.0, at_least(0)),
        'warmup_lr': kind(0.0, at_least(0)),  # where the warm-up starts, per lr_reference images like base_lr
        # the last warm-up step is at the peak, as in the BEiT family, instead of the first after it
        'warmup_inclusive': kind(False),
        'warmup_prefix': kind(True),  # False, as in timm: the cosine runs from step 0 on, behind the warm-up
        'min_lr': kind(0.0, at_least(0)),  # where the cosine ends; absolute
        # multistep: where the rate is multiplied by decay_factor
        'decay_epochs': kind((), none_or(different(above(0)))),
        'decay_factor': kind(0.1, above(0)),
        # factor of the rate per block, from the head down; 1: none
        'layer_decay': kind(1.0, PORTION),
        'trust_coefficient': kind(1e-3, above(0)),  # of LARS
    }
    return {f'{group}.{name}': field for name, field in fields.items()}


# The tasks that evaluate a checkpoint, and whether they train.
EVALUATIONS = {'knn': False, 'linear': False, 'probe': True, 'finetune': True}

# Fields that name files or folders; where there may be several, commas lie between them.
PATHS = ('workdir', 'checkpoint', 'resume_from', 'init_from', 'data.data_dir', 'data.mask', 'report.runs')

FIELDS: dict[str, Field] = {
    'task': shows('pretrain', own=True),  # pretrain, knn, linear, probe, finetune, compare, report
    'method': shapes('mae'),  # mae, simmim, bootmae, conmim, or an importable module with build(config)
    'seed': shapes(0, SEED, trains=True),
    'workdir': shows('', own=True),  # '' for runs/<name of the config>; the same workdir resumes
    'checkpoint': shapes('', own=True),  # for an evaluation: a workdir (its newest step), or workdir/checkpoints/<step>
    # a new workdir continues from this run's full state: its workdir, or its checkpoints/<step>
    'resume_from': shows('', trains=True),
    'init_from': shapes(''),  # a new workdir starts from this run's weights, at step 0: named the same way
    'resume_anyway': shows(False, trains=True),  # resume although fields differ from those the run started with
    # --- Data
    # a TFDS name; '' where data_dir is itself a prepared TFDS directory; or 'folder'
    'data.name': shapes('imagenet2012', replaces=True),
    'data.data_dir': shows('', replaces=True),  # '' for TFDS' own default
    'data.train_split': shapes('train', replaces=True),
    'data.val_split': shows('validation', replaces=True),  # watched during development
    'data.test_split': shows('validation', replaces=True),  # what evaluations, comparisons and studies report
    # height, width; an evaluation at another size interpolates what the encoder learned per position
    'data.image_size': shapes((224, 224), each(integer(1), 2), replaces=True),
    'data.channels': shapes(3, at_least(1)),
    'data.num_classes': shapes(1000, at_least(1), replaces=True),
    # resize: the full image, no crop
    'data.crop': shapes('random_resized', one_of('random_resized', 'resize'), trains=True),
    # fraction of the image that a crop covers
    'data.crop_area': shapes((0.2, 1.0), ascending(PORTION), trains=True),
    'data.crop_aspect': shapes((3 / 4, 4 / 3), ascending(above(0)), trains=True),  # width over height
    # of training images: bicubic, bilinear; an evaluation is always bicubic
    'data.interpolation': shapes('bicubic', one_of('bicubic', 'bilinear'), trains=True),
    # where training images are resized: by the host, or by the device, which gets crops of up to twice image_size
    'data.resize': shapes('host', one_of('host', 'device'), trains=True),
    # shorter side before the centre crop, at least; 0 resizes to image_size, no crop
    'data.eval_resize': shapes(256, at_least(0), replaces=True),
    'data.flip': shapes(True, replaces=True),
    # of training images, after the crop: '' or like 'rand-m9-mstd0.5-inc1'; see data/randaugment.py
    'data.randaugment': shapes('', trains=True),
    # label maps, for dense probes: the name of a TFDS feature; of a folder, the folder that mirrors it with PNGs
    'data.mask': shapes('', trains=True),
    # subtracted from their values; what is below 0 then is ignored
    'data.mask_offset': shapes(0, at_least(0), trains=True),
    'data.ignore_label': shapes(255, within(0, 256), trains=True),  # a value that counts for nothing
    'data.mean': shapes((0.485, 0.456, 0.406), each(UNIT)),  # of pixels in [0, 1], one per channel
    'data.std': shapes((0.229, 0.224, 0.225), each(DEVIATION)),
    'data.shuffle_buffer': shapes(20_000, at_least(1)),  # records; TFRecord only, ArrayRecord permutes exactly
    # an image that cannot be decoded: raise, or replace it by the next one that can
    'data.on_error': shows('raise', one_of('raise', 'replace'), replaces=True),
    'data.threads': shows(0, at_least(0), replaces=True),  # of the host pipeline; 0 for one per core
    # --- Encoder
    'model.size': shapes('b'),  # nano, micro, ti, s, b, l, h
    'model.depth': shapes(0, at_least(0)),  # 0: from the size
    'model.width': shapes(0, at_least(0)),
    'model.heads': shapes(0, at_least(0)),
    'model.patch_size': shapes(16, at_least(1)),
    'model.mlp_ratio': shapes(4.0, above(0)),
    'model.position': shapes('sincos'),  # sincos (columns first), sincos_rows, learned, none
    'model.relative_bias': shapes(False),
    'model.class_token': shapes(True),
    'model.qkv_bias': shapes('qkv'),
    'model.layer_scale': shapes(0.0, at_least(0)),
    'model.norm_eps': shapes(1e-6, above(0)),  # added to the variance in every LayerNorm
    'model.drop_path': shapes(0.0, within(0, 1), trains=True),
    'model.init': shapes('mae'),  # mae, beit, bootmae
    'model.mask_token_scale': shapes(1.0),  # factor of the mask token's initial value
    'model.mask_token_norm': shapes(0.0, at_least(0)),  # its fixed length; 0: free
    # of matrix products, and of the residual stream unless residual_dtype names another; parameters stay float32. Not
    # float16: the gradient of one predicted value, a share of the batch's mean, is 0 in it
    'model.dtype': shapes('bfloat16', one_of('float32', 'bfloat16'), trains=True),
    'model.residual_dtype': shapes('', one_of('', 'float32', 'bfloat16')),
    'model.remat': shapes(False, trains=True),
    # auto: cuDNN's kernel on a GPU where it fits, one head at a time on a TPU where the logits are large, plain matrix
    # products otherwise; cudnn or xla, those of jax.nn.dot_product_attention; heads; '' for plain products
    'model.attention': shapes('auto', one_of('auto', 'cudnn', 'xla', 'heads', ''), replaces=True),
    # --- Method
    'mask_ratio': shapes(0.75, within(0, 1)),
    'mae.decoder_depth': shapes(8, at_least(1)),
    'mae.decoder_width': shapes(512, at_least(1)),
    'mae.decoder_heads': shapes(16, at_least(1)),
    'mae.norm_pix_loss': shapes(True),
    'simmim.mask_unit': shapes(2, at_least(1)),  # patches per side of a masked unit
    'bootmae.decoder_depth': shapes(2, at_least(1)),  # of both decoders
    'bootmae.decoder_width': shapes(512, at_least(1)),  # of the pixel decoder; the other is as wide as the encoder
    'bootmae.block_patches': shapes(120, at_least(1)),  # hidden in blocks; the rest of mask_ratio one by one
    'bootmae.block_area': shapes((16, 60), ascending(integer(1))),  # of one block, in patches
    'bootmae.block_aspect': shapes(0.3, PORTION),  # height over width: from this to its inverse
    'bootmae.norm_pix_loss': shapes(True),
    'bootmae.weight_patches': shapes(True),  # a hidden patch counts up to twice, the more of its neighbours are hidden
    'bootmae.feature_weight': shapes(1.0, at_least(0)),  # of the feature loss
    'bootmae.feature_warmup': shapes(0.25, PORTION),  # fraction of the epochs over which that weight grows from 0
    # The teacher moves by this fraction of its distance from the student, 1 minus the decay: linear between milestones,
    # which are fractions of the epochs, and as the last from there on
    'bootmae.ema_milestones': shapes((0.0, 100 / 801, 400 / 801), each(within(0, 1))),
    'bootmae.ema_rates': shapes((1e-3, 1e-4, 1e-5), each(PORTION)),
    'conmim.mask_unit': shapes(2, at_least(1)),  # patches per side of a masked unit
    'conmim.hidden': shapes(4096, at_least(1)),  # width of the projector's two hidden layers
    'conmim.out': shapes(256, at_least(1)),  # and of its last one
    'conmim.group': shapes(64, at_least(1)),  # images per group of batch normalisation
    'conmim.temperature': shapes(0.1, above(0)),
    'conmim.momentum': shapes(0.996, PORTION),  # of the teacher at the first step; it rises to 1 along half a cosine
    # of the Gaussian blur in the teacher's view: standard deviations in pixels
    'conmim.blur_radius': shapes((0.1, 2.0), ascending(above(0))),
    # --- MTO: fields as in mto_jax.mto.Settings
    'mto.enabled': shapes(False),
    'mto.recalibration': shapes('none'),
    'mto.rows': shapes('visible'),
    'mto.exclude_blocks': shapes(0),
    'mto.exclude_above': shapes(0.5),
    'mto.exclude_fraction': shapes(0.5),
    'mto.open_until': shapes(0.0),
    'mto.initial_blocks': shapes(0),
    'mto.blocks': shapes(()),
    'mto.affinity': shapes('attention_mean'),
    'mto.measure': shapes('entropy'),
    'mto.scale_guard': shapes(False),
    'mto.stop_keys': shapes(False),
    'mto.stop_previous': shapes(True),
    'mto.margin': shapes(0.02),
    'mto.w_spa': shapes(0.0),
    'mto.w_e': shapes(0.0),
    'mto.w_r': shapes(0.0),
    'mto.spa_form': shapes('mass'),
    'mto.spa_depth': shapes('falling'),
    'mto.warmup': shapes(0.05),
    'mto.fade': shapes(()),
    'mto.fade_until': shapes(1.0),
    # --- Training
    'batch_size': shapes(4096, at_least(1), trains=True),  # images per step, over all devices
    'accumulate': shapes(1, at_least(1), trains=True),  # microbatches per step
    'epochs': shapes(800.0, above(0), trains=True),
    **_optim('optim', partial(shapes, trains=True)),
    # --- Devices along each axis; -1 for the rest
    'mesh.data': shows(-1, own=True),  # splits the batch
    'mesh.fsdp': shows(1, own=True),  # splits the batch, and parameters with their optimizer state
    'mesh.tensor': shows(1, own=True),  # splits heads and MLP
    # --- Hosts: see mto_jax/runtime/hosts.py
    # 'auto' finds a TPU slice's or a SLURM step's hosts; host:port; '' for one host
    'hosts.coordinator': shows('auto', own=True),
    'hosts.count': shows(1, own=True),  # with host:port: the number of hosts, and this one's own number from 0
    'hosts.index': shows(0, own=True),
    'hosts.timeout': shows(300.0, above(0), own=True),  # seconds within which all hosts must have started
    'allow_cpu': shows(False, own=True),  # train although no GPU or TPU is found
    'deterministic': shapes(False, own=True),  # on a GPU: the same result bit by bit each time, slower
    # --- What is shown and kept
    'log_every': shows(50, at_least(1), trains=True),  # steps
    'diagnose_every': shows(1000, at_least(0)),  # steps; 0: never
    # (first, last): steps that are traced by jax's profiler into <workdir>/profile
    'profile_steps': shows((), none_or(ascending(at_least(1))), trains=True),
    'log_images': shows(6, at_least(1)),  # shown in pictures of reconstructions
    'checkpoints.every': shows(1000, at_least(0), trains=True),  # steps; 0: only the last, which is always saved
    'checkpoints.keep': shows(2, at_least(1), trains=True),  # newest ones kept; the best is kept in addition
    # --- Probes of frozen features
    # kNN of a pre-training, or the scores of a training on labels, on val_split; 0: never
    'eval.every_epochs': shows(0.0, at_least(0), own=True),
    'eval.batch_size': shows(512, at_least(1), own=True),
    # how many training images the probes use, a fixed random subset; 0: all
    'eval.train_examples': shows(0, at_least(0), own=True),
    'eval.features': shows('mean', own=True),  # mean of the patch tokens, or class
    # teacher: where the method has one
    'eval.weights': shows('student', one_of('student', 'teacher'), own=True),
    'eval.depth': shows(0, at_least(0), own=True),  # blocks to apply; 0 for all and the final norm
    # tasks knn, linear and probe: several such, of which the best is named; () for eval.depth alone
    'eval.depths': shapes((), none_or(different(integer(0))), own=True),
    'eval.knn_k': shows((1, 5, 10, 20), each(integer(1)), own=True),
    'eval.knn_temperature': shows(0.07, above(0), own=True),
    # chosen on a held-out tenth of the training features, per class
    'eval.linear_l2': shows((1e-5, 1e-4, 1e-3, 1e-2), each(at_least(0)), own=True),
    # kNN, L-BFGS and studies: accuracies are the mean over the classes of each one's own
    'eval.balanced': shows(False, own=True),
    'eval.linear_steps': shows(200, at_least(1), own=True),  # L-BFGS iterations
    # --- task=compare
    'compare.seeds': shows((0,), different(SEED)),  # one pre-training with and one without MTO for each
    # --- task=report
    'report.runs': shows(''),  # workdirs of runs, separated by commas
    # --- task=finetune
    'classify.from_scratch': shapes(False, own=True),  # the checkpoint's architecture with fresh weights
    'classify.pool': shapes('fc_norm', one_of('fc_norm', 'mean', 'class'), own=True),
    'classify.head_scale': shapes(2e-5, at_least(0), own=True),  # standard deviation of the head's initial weights
    'classify.smoothing': shapes(0.1, within(0, 1), own=True),  # of the labels
    'classify.mixup': shapes(0.8, at_least(0), own=True),  # alpha of the Beta distribution; 0: no mixup
    'classify.cutmix': shapes(1.0, at_least(0), own=True),
    'classify.mix_prob': shapes(1.0, PROBABILITY, own=True),  # with which a batch is mixed
    'classify.switch_prob': shapes(0.5, PROBABILITY, own=True),  # with which it is cutmix, where both are used
    'classify.erase': shapes(0.25, PROBABILITY, own=True),  # probability of random erasing, per image
    'classify.ema': shapes(0.0, within(0, 1), own=True),  # decay of averaged weights, which are evaluated; 0: none
    # --- task=probe
    'probe.head': shapes('linear', one_of('linear', 'attentive', 'dense'), own=True),  # see models/heads.py
    'probe.pool': shapes('class', one_of('class', 'mean', 'fc_norm'), own=True),  # what the linear head sees
    'probe.heads': shapes(0, at_least(0), own=True),  # of the attentive head; 0: the encoder's
    'probe.group': shapes(512, at_least(1), own=True),  # images per group of batch normalisation
    # --- Fine-tuning of a study's runs
    'finetune.epochs': shows(0.0, at_least(0)),  # 0: no fine-tuning
    'finetune.label_share': shows(0.1, PORTION),  # of the training images
    'finetune.batch_size': shows(128, at_least(1)),
    **_optim('finetune.optim', shows),
    # --- python -m mto_jax.studies
    'study.variants': shows({}),  # {name: {field: value}}: changes to this; one is 'baseline', more may begin so
    'study.seeds': shows((0,), different(SEED)),
    'study.budgets': shows(()),  # epochs of each training; () for `epochs`. The warm-up and the decays scale along
    # of a training of the largest budget, evenly spaced; the others: at their end only
    'study.evaluations': shows(4, at_least(1)),
    # where the probes are measured: val while choosing, test to confirm
    'study.split': shows('val', one_of('val', 'test')),
    'study.seeds_at_once': shows(1, at_least(1)),  # trained side by side in one dispatch
    'study.index': shows(0),  # this process runs every count-th run of the grid, starting at index
    'study.count': shows(1, at_least(1)),
}


def get_config() -> ConfigDict:
    """All defaults: plain MAE with ViT-B/16 on ImageNet. Every shipped config starts from it."""
    return nested({name: field.default for name, field in FIELDS.items()})


def evaluation(task: str) -> ConfigDict:
    """The config of an evaluation: None, for what the checkpoint's own config says, in every field but its own."""

    def own(field):
        return field.own or field.default == {} or (EVALUATIONS[task] and field.trains)

    kept = {n: f.default if own(f) else placeholder(type(f.default)) for n, f in FIELDS.items()}
    return nested(kept | {'task': task})


def nested(fields: Mapping[str, Any]) -> ConfigDict:
    """A config from {dotted name: value}."""
    c = ConfigDict()
    for name, value in fields.items():
        *groups, last = name.split('.')
        inner = c
        for group in groups:
            if group not in inner:
                inner[group] = ConfigDict()
            inner = inner[group]
        inner[last] = ConfigDict() if value == {} else value
    return c


def field_of(name: str) -> Field | None:
    """The field of a dotted name, or the one that it lies below (`study.variants`); None for an unknown one."""
    while name not in FIELDS and '.' in name:
        name = name.rpartition('.')[0]
    return FIELDS.get(name)


def kept(name: str) -> bool:
    """Whether a saved field of that dotted name means something now: one of `FIELDS`, or in a group that has none of
    them, which a method of one's own reads."""
    group, _, inner = name.partition('.')
    return field_of(name) is not None or bool(inner and not any(n.split('.')[0] == group for n in FIELDS))


def check(config: ConfigDict, partial: bool = False) -> None:
    """Raises UserError for the first field that cannot be what it is, naming it, its value and what it must be.

    Args:
      partial: fields may be None, which stands for what a checkpoint's config says.
    """
    for name, value in values(config):
        if (value is None and partial) or not FIELDS[name].rule:
            continue
        ok, words = FIELDS[name].rule
        if value is None or not _holds(ok, value):
            raise UserError(f'{name} is {value!r}; it must be {words}')
    for name in ('mean', 'std'):
        if partial and None in (config.data[name], config.data.channels):
            continue
        if len(config.data[name]) != config.data.channels:
            raise UserError(
                f'data.{name} has {len(config.data[name])} values; it must have one for each of data.channels '
                f'({config.data.channels})'
            )


def _holds(ok: Callable[[Any], bool], value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        return ok(value)
    except TypeError:  # a member of another type than the rule compares it with
        return False


def values(config: ConfigDict) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field."""
    for name in FIELDS:
        value = config
        for part in name.split('.'):
            value = value[part]
        yield name, value
