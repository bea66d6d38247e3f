"""Which foreign arrays hold which of our parameters: one table per family of files, read in both directions.

A table is a list of rows, made for one method. `read` and `write` go through the same rows, so what comes in and what
goes out cannot disagree. Our parameters are named by their path ('encoder/blocks/block0/norm1/scale').
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from mto_jax import methods
from mto_jax.errors import UserError
from mto_jax.models import position, vit

Arrays = Mapping[str, np.ndarray]
TOLERANCE = 1e-5  # of tables that are computed here and stored there: sine-cosine positions


@dataclasses.dataclass(frozen=True)
class Row:
    """A few of our arrays, and the foreign ones that hold the same numbers.

    Attributes:
      ours, theirs: names.
      out: of our arrays, theirs.
      back: of the shapes of ours and their arrays, ours. Raises UserError where theirs hold what ours cannot.
      optional: not written, and need not be there.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    out: Callable[..., Sequence[np.ndarray]]
    back: Callable[..., Sequence[np.ndarray]]
    optional: bool = False


# ---------------------------------------------------------------------------------------------------------------- rows


def same(ours: str, theirs: str) -> Row:
    """The same array up to its shape."""
    return Row((ours,), (theirs,), lambda x: (x,), lambda shapes, x: (x,))


def dense(ours: str, theirs: str, bias: bool = True) -> Row:
    """A linear layer: a kernel (in, out) against a weight (out, in)."""
    arrays = 2 if bias else 1
    return Row(
        (f'{ours}/kernel', f'{ours}/bias')[:arrays],
        (f'{theirs}.weight', f'{theirs}.bias')[:arrays],
        lambda k, *b: (k.T, *b),
        lambda shapes, w, *b: (w.T.reshape(shapes[0]), *b),
    )


def norm(ours: str, theirs: str) -> Row:
    """A normalisation's scale and bias."""
    names = (f'{ours}/scale', f'{ours}/bias'), (f'{theirs}.weight', f'{theirs}.bias')
    return Row(*names, lambda *x: x, lambda shapes, *x: x)


def patches(ours: str, theirs: str, patch: int) -> Row:
    """A linear layer on patches (row, column, channel) against a convolution (out, channel, row, column)."""
    return Row(
        (f'{ours}/kernel', f'{ours}/bias'),
        (f'{theirs}.weight', f'{theirs}.bias'),
        lambda k, b: (k.reshape(patch, patch, -1, k.shape[-1]).transpose(3, 2, 0, 1), b),
        lambda shapes, w, b: (w.transpose(2, 3, 1, 0).reshape(shapes[0]), b),
    )


def pixel_convolution(ours: str, theirs: str, patch: int) -> Row:
    """A linear layer to patches against a 1 x 1 convolution whose channels a pixel shuffle spreads."""

    def out(kernel, bias):
        weight = kernel.reshape(len(kernel), patch, patch, -1).transpose(3, 1, 2, 0)
        bias = bias.reshape(patch, patch, -1).transpose(2, 0, 1)
        return weight.reshape(-1, len(kernel), 1, 1), bias.reshape(-1)

    def back(shapes, weight, bias):
        weight = weight.reshape(-1, patch, patch, weight.shape[1]).transpose(3, 1, 2, 0)
        return weight.reshape(shapes[0]), bias.reshape(-1, patch, patch).transpose(1, 2, 0).reshape(-1)

    return Row((f'{ours}/kernel', f'{ours}/bias'), (f'{theirs}.weight', f'{theirs}.bias'), out, back)


def pixel_transposed(ours: str, bias: str, theirs: str, patch: int) -> Row:
    """A linear layer to patches, one bias per colour, against a transposed convolution (in, channel, row, column)."""
    return Row(
        (f'{ours}/kernel', bias),
        (f'{theirs}.weight', f'{theirs}.bias'),
        lambda k, b: (k.reshape(len(k), patch, patch, -1).transpose(0, 3, 1, 2), b),
        lambda shapes, w, b: (w.transpose(0, 2, 3, 1).reshape(shapes[0]), b),
    )


def projections(ours: str, theirs: Sequence[str]) -> Row:
    """A kernel (in, parts, heads, d) against one weight (parts * heads * d, in), or one weight for each part."""
    if len(theirs) == 1:
        return Row(
            (ours,),
            (f'{theirs[0]}.weight',),
            lambda k: (k.reshape(len(k), -1).T,),
            lambda shapes, w: (w.T.reshape(shapes[0]),),
        )
    return Row(
        (ours,),
        tuple(f'{name}.weight' for name in theirs),
        lambda k: tuple(k[:, i].reshape(len(k), -1).T for i in range(k.shape[1])),
        lambda shapes, *w: (np.stack([x.T for x in w], axis=1).reshape(shapes[0]),),
    )


def biases(ours: str, has: str, theirs: Mapping[str, str]) -> Row:
    """The biases (heads, d) of queries, keys and values.

    Args:
      has: the letters that we have.
      theirs: foreign names by the letters that each holds, one after the other. Those that we lack are zero there.
    """
    held = ''.join(theirs)
    if lost := set(has) - set(held):
        raise UserError(f'{ours} has biases of {has}; it has no place for that of {"".join(lost)}')

    def out(*ours):
        flat = dict(zip(has, (bias.reshape(-1) for bias in ours), strict=True))
        parts = {letter: flat.get(letter, np.zeros_like(flat[has[0]])) for letter in held}
        return tuple(np.concatenate([parts[letter] for letter in letters]) for letters in theirs)

    def back(shapes, *arrays):
        parts = {}
        for (letters, name), array in zip(theirs.items(), arrays, strict=True):
            parts |= dict(zip(letters, np.split(array, len(letters)), strict=True))
            for letter in letters:
                if letter not in has and parts[letter].any():
                    raise UserError(
                        f'{name} holds a bias of the {"keys" if letter == "k" else letter} that is not zero; this '
                        'family has none'
                    )
        return tuple(parts[letter] for letter in has)

    return Row(tuple(f'{ours}/{letter}_bias' for letter in has), tuple(theirs.values()), out, back)


def computed(stored: np.ndarray, value: np.ndarray) -> bool:
    """Whether a stored table is the computed one, as a file of half precision would round it."""
    if stored.shape != value.shape:
        return False
    rounding = 0.0
    for half in (np.float16, ml_dtypes.bfloat16):
        if stored.dtype.kind == 'f' and np.array_equal(stored.astype(half).astype(stored.dtype), stored):
            rounding = max(rounding, float(ml_dtypes.finfo(half).eps))
    return bool((np.abs(stored - value) <= TOLERANCE + rounding * np.abs(value)).all())


def fixed(theirs: str, value: np.ndarray, optional: bool = False) -> Row:
    """An array that is stored there and computed here."""

    def back(shapes, array):
        if not computed(array, value):
            raise UserError(f'{theirs} differs from the table that this architecture computes; it cannot be kept here')
        return ()

    return Row((), (theirs,), lambda: (value,), back, optional)


# -------------------------------------------------------------------------------------------------------------- styles


@dataclasses.dataclass(frozen=True)
class Style:
    """How a library names the parts of a Vision Transformer.

    Attributes:
      patch, cls, mask, pos, norm, relative: parts of the encoder.
      block: of block {}.
      norm1, qkv, biases, proj, norm2, mlp_in, mlp_out: parts of a block; `biases` as for the function of this name.
      gammas: layer scale of both branches; () where it has none.
      head, head_norm: the classifier, and the norm behind the pooling that stands in for the encoder's.
      table: there always is a table of positions.
    """

    patch: str = 'patch_embed.proj'
    cls: str = 'cls_token'
    mask: str = 'mask_token'
    pos: str = 'pos_embed'
    norm: str = 'norm'
    relative: str = 'rel_pos_bias.relative_position_bias_table'
    block: str = 'blocks.{}'
    norm1: str = 'norm1'
    qkv: tuple[str, ...] = ('attn.qkv',)
    biases: Mapping[str, str] = dataclasses.field(default_factory=lambda: {'qkv': 'attn.qkv.bias'})
    proj: str = 'attn.proj'
    norm2: str = 'norm2'
    mlp_in: str = 'mlp.fc1'
    mlp_out: str = 'mlp.fc2'
    gammas: tuple[str, ...] = ('ls1.gamma', 'ls2.gamma')
    head: str = 'head'
    head_norm: str = 'fc_norm'
    table: bool = True


TIMM = Style()
# BEiT's official code, those derived from it (SimMIM, BootMAE, ConMIM), and timm's Beit.
BEIT = Style(gammas=('gamma_1', 'gamma_2'), biases={'q': 'attn.q_bias', 'v': 'attn.v_bias'}, table=False)
# The names in published checkpoints, which transformers 4 and 5 load and 5 still writes.
HF_VIT = Style(
    patch='embeddings.patch_embeddings.projection',
    cls='embeddings.cls_token',
    mask='embeddings.mask_token',
    pos='embeddings.position_embeddings',
    norm='layernorm',
    relative='encoder.relative_position_bias.relative_position_bias_table',
    block='encoder.layer.{}',
    norm1='layernorm_before',
    qkv=tuple(f'attention.attention.{name}' for name in ('query', 'key', 'value')),
    biases={name[0]: f'attention.attention.{name}.bias' for name in ('query', 'key', 'value')},
    proj='attention.output.dense',
    norm2='layernorm_after',
    mlp_in='intermediate.dense',
    mlp_out='output.dense',
    gammas=(),
    head='classifier',
    head_norm='pooler.layernorm',
)
HF_BEIT = dataclasses.replace(
    HF_VIT,
    biases={name[0]: f'attention.attention.{name}.bias' for name in ('query', 'value')},
    gammas=('lambda_1', 'lambda_2'),
    table=False,
)


# -------------------------------------------------------------------------------------------------------------- tables


def block(ours: str, theirs: str, style: Style, arch: vit.Architecture) -> list[Row]:
    """The rows of one block."""
    s = style
    rows = [
        norm(f'{ours}/norm1', f'{theirs}.{s.norm1}'),
        projections(f'{ours}/attn/qkv_kernel', [f'{theirs}.{name}' for name in s.qkv]),
        dense(f'{ours}/attn/proj', f'{theirs}.{s.proj}'),
        norm(f'{ours}/norm2', f'{theirs}.{s.norm2}'),
        dense(f'{ours}/mlp_in', f'{theirs}.{s.mlp_in}'),
        dense(f'{ours}/mlp_out', f'{theirs}.{s.mlp_out}'),
    ]
    if arch.qkv_bias:
        rows.append(biases(f'{ours}/attn', arch.qkv_bias, {k: f'{theirs}.{v}' for k, v in s.biases.items()}))
    if arch.layer_scale:
        rows += [same(f'{ours}/gamma_{n}', f'{theirs}.{g}') for n, g in zip(('attn', 'mlp'), s.gammas, strict=True)]
    return rows


def positions(arch: vit.Architecture) -> np.ndarray:
    """An architecture's fixed positions (1, P + N, D): zeros for prefix tokens, and where there are none."""
    shape = (arch.num_patches, arch.width)
    sincos = arch.position.startswith('sincos')
    table = position.sincos_2d(arch.grid, arch.width, arch.position == 'sincos_rows') if sincos else np.zeros(shape)
    return np.pad(table, ((arch.num_prefix, 0), (0, 0)))[None].astype(np.float32)


def encoder(arch: vit.Architecture, style: Style, prefix: str = '', mask_token: bool = False) -> list[Row]:
    """The rows of an encoder.

    Args:
      prefix: of all foreign names.
      mask_token: it has one.
    """
    rows = [patches('encoder/patch_embed', style.patch, arch.patch_size), norm('encoder/norm', style.norm)]
    if arch.class_token:
        rows.append(same('encoder/cls_token', style.cls))
    if mask_token:
        rows.append(same('encoder/mask_token', style.mask))
    if arch.position == 'learned':
        rows.append(same('encoder/pos_embed', style.pos))
    elif arch.position != 'none' or style.table:
        rows.append(fixed(style.pos, positions(arch)))
    if arch.relative_bias:
        rows.append(same('encoder/relative_bias_table', style.relative))
        index = position.relative_index(arch.grid, arch.num_prefix)
        rows.append(fixed(style.relative.replace('bias_table', 'index'), index, optional=True))
    for i in range(arch.depth):
        rows += block(f'encoder/blocks/block{i}', style.block.format(i), style, arch)
    return [dataclasses.replace(row, theirs=tuple(prefix + name for name in row.theirs)) for row in rows]


def classifier(method: methods.Method, pool: str, style: Style) -> list[Row]:
    """An encoder, and where `pool` names one, the head on it.

    With 'fc_norm' the norm stands behind the pooling there; here it is the encoder's in any case.
    """
    if pool == 'fc_norm':
        style = dataclasses.replace(style, norm=style.head_norm)
    rows = encoder(method.arch, style)
    return [*rows, dense('head', style.head)] if pool else rows


def mae(method, pool: str, style: Style = TIMM, at: str = '', layers: str = 'decoder_blocks.{}') -> list[Row]:
    """facebookresearch/mae, and with other names Hugging Face's ViTMAEForPreTraining."""
    d = method.decoder
    rows = [
        dense('decoder/embed', f'{at}decoder_embed'),
        same('decoder/mask_token', f'{at}mask_token'),
        fixed(f'{at}decoder_pos_embed', positions(dataclasses.replace(d, position='sincos'))),
        norm('decoder/norm', f'{at}decoder_norm'),
        dense('decoder/pred', f'{at}decoder_pred'),
    ]
    for i in range(d.depth):
        rows += block(f'decoder/blocks/block{i}', at + layers.format(i), style, d)
    return encoder(method.arch, style) + rows


def hf_mae(method, pool: str) -> list[Row]:
    return mae(method, pool, HF_VIT, 'decoder.', 'decoder_layers.{}')


def simmim(method, pool: str) -> list[Row]:
    """microsoft/SimMIM with a ViT."""
    rows = encoder(method.arch, BEIT, 'encoder.', mask_token=True)
    return [*rows, pixel_convolution('head', 'decoder.0', method.arch.patch_size)]


def conmim(method, pool: str) -> list[Row]:
    """TencentARC/ConMIM: the student."""
    rows = encoder(method.arch, BEIT, mask_token=True)
    rows += [dense(f'projector/linear{i}', f'projectors.{3 * i}', bias=False) for i in range(3)]
    return rows + [norm(f'projector/norm{i}', f'projectors.{3 * i + 1}') for i in range(2)]


def bootmae(method, pool: str) -> list[Row]:
    """LightDXY/BootMAE."""
    rows = encoder(method.arch, BEIT)
    for name, arch, end in (('regressor', method.regressor, ''), ('predictor', method.predictor, '_1')):
        rows += [
            dense(f'{name}/embed', f'down{end}'),
            same(f'{name}/mask_token', f'mask_token{end}'),
            norm(f'{name}/norm', f'decode_norm{end}'),
        ]
        for i in range(arch.depth):
            ours, theirs = f'{name}/blocks/block{i}', f'decode_blocks{end}.{i}'
            cross, there = f'{ours}/cross_attn', f'{theirs}.c_attn'
            rows += block(ours, theirs, BEIT, arch)
            rows += [
                norm(f'{ours}/norm_queries', f'{theirs}.norm3'),
                norm(f'{ours}/norm_memory', f'{theirs}.norm4'),
                projections(f'{cross}/q_kernel', [f'{there}.q']),
                projections(f'{cross}/kv_kernel', [f'{there}.kv']),
                biases(cross, arch.qkv_bias, {'q': f'{there}.q_bias', 'v': f'{there}.v_bias'}),
                dense(f'{cross}/proj', f'{there}.proj'),
            ]
    regressor = dataclasses.replace(method.regressor, position='sincos_rows')
    return [
        *rows,
        fixed('de_pos_embed', positions(regressor)),
        pixel_transposed('pixel_head/proj', 'pixel_head/bias', 'lm_head.proj', method.arch.patch_size),
        dense('feature_head', 'lm_head_1'),
    ]


def _classifiers(style: Style) -> Callable[[methods.Method, str], list[Row]]:
    return lambda method, pool: classifier(method, pool, style)


# `(method, pool) -> rows`; `pool` is that of a classifier's head ('fc_norm', 'mean', 'class'), '' where there is none.
TABLES: dict[str, Callable[[methods.Method, str], list[Row]]] = {
    'mae': mae,
    'simmim': simmim,
    'bootmae': bootmae,
    'conmim': conmim,
    'timm_vit': _classifiers(TIMM),
    'timm_beit': _classifiers(BEIT),
    'hf_mae': hf_mae,
    'hf_vit': _classifiers(HF_VIT),
    'hf_beit': _classifiers(HF_BEIT),
}


# --------------------------------------------------------------------------------------------------------- through them


def write(rows: Sequence[Row], ours: Arrays) -> dict[str, np.ndarray]:
    """The foreign arrays of our parameters.

    Raises:
      UserError: naming parameters for which the table has no row, or rows without parameters.
    """
    named = {name for row in rows for name in row.ours}
    if wrong := sorted(named ^ ours.keys()):
        raise UserError(f'these parameters do not fit what is written: {", ".join(wrong)}')
    out = {}
    for row in rows:
        if not row.optional:
            out |= zip(row.theirs, row.out(*(ours[name] for name in row.ours)), strict=True)
    return out


def read(rows: Sequence[Row], theirs: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Our parameters, float32, of foreign arrays: the exact reverse of `write`.

    Args:
      shapes: of our parameters.

    Raises:
      UserError: listing all foreign names that are missing, unexpected or of another shape, or naming what they hold
        that our parameters cannot.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for row in rows:
        found = row.out(*(np.zeros(shapes[name], np.float32) for name in row.ours))
        wanted |= {name: array.shape for name, array in zip(row.theirs, found, strict=True)}
    optional = {name for row in rows if row.optional for name in row.theirs}
    problems = [f'{name} is missing' for name in wanted if name not in theirs and name not in optional]
    problems += [f'{name} is unexpected' for name in theirs if name not in wanted]
    problems += [
        f'{name} has shape {theirs[name].shape}, expected {shape}'
        for name, shape in wanted.items()
        if name in theirs and theirs[name].shape != shape
    ]
    problems += [
        f'{name} is {theirs[name].dtype}, expected float32, float16 or bfloat16'
        for name in wanted
        if name in theirs and name not in optional and theirs[name].dtype != np.float32
    ]
    if problems:
        raise UserError(f'{len(problems)} arrays do not fit: ' + '; '.join(problems))
    if broken := [name for name in wanted if name in theirs and not np.isfinite(theirs[name]).all()]:
        raise UserError(f'these arrays hold values that are not finite: {", ".join(broken)}')
    out = {}
    for row in rows:
        if row.optional and row.theirs[0] not in theirs:
            continue
        expected = [shapes[name] for name in row.ours]
        arrays = row.back(expected, *(theirs[name] for name in row.theirs))
        for name, array, shape in zip(row.ours, arrays, expected, strict=True):
            out[name] = np.array(array, np.float32).reshape(shape)
    return out
