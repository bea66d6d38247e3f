"""What a foreign file is, and the config that its shapes, its config.json and hints describe."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mto_jax import config as schema
from mto_jax.errors import UserError
from mto_jax.exchange import tables
from mto_jax.exchange.files import Source
from mto_jax.exchange.model import Weights, flat, nested
from mto_jax.masking import num_visible
from mto_jax.models import vit

HEADS = {width: heads for _, width, heads in (vit.SIZES[size] for size in ('ti', 's', 'b', 'l', 'h'))}  # by width
SETTINGS = {
    'layer_norm_eps': 'norm_eps',
    'num_attention_heads': 'heads',
    'decoder_num_attention_heads': 'decoder_heads',
}

# Names that transformers 5 has in memory, and in some files, and those in published checkpoints.
LETTERS = {'q': 'query', 'k': 'key', 'v': 'value'}
RENAMED = (
    (r'^(vit|beit)\.', ''),
    (r'^layers\.', 'encoder.layer.'),
    (r'^decoder\.decoder_encoder\.layer\.', 'decoder.decoder_layers.'),
    (r'^shared_position_bias\.', 'encoder.relative_position_bias.'),
    (r'\.attention\.([qkv])_proj\.', lambda m: f'.attention.attention.{LETTERS[m[1]]}.'),
    (r'\.attention\.o_proj\.', '.attention.output.dense.'),
    (r'\.mlp\.fc1\.', '.intermediate.dense.'),
    (r'\.mlp\.fc2\.', '.output.dense.'),
)
# Arrays that may be there and have no place here, and what they are.
LEFT_OUT = {
    'conmim': {
        r'lm_head\.(weight|bias)': 'a head that no loss reads',
        r'projectors\.\d\.(running_mean|running_var|num_batches_tracked)': 'running statistics, which no loss reads',
    },
    'timm_beit': {'mask_token': 'the mask token', r'lm_head\.(weight|bias)': 'a head for visual words'},
    'hf_vit': {r'pooler\.dense\.(weight|bias)': 'the pooler', r'embeddings\.mask_token': 'the mask token'},
    'hf_beit': {r'embeddings\.mask_token': 'the mask token', r'lm_head\.(weight|bias)': 'a head for visual words'},
}
# Parts of models that are other than ours, and what they are.
FOREIGN = {
    r'reg_token|.*register_tokens': 'register tokens',
    r'dist_token|.*distillation_token': 'a distillation token',
    r'norm_pre\..*': 'a norm before the blocks',
    r'.*\.(q_norm|k_norm)\..*': 'norms of queries and keys',
    r'attn_pool\..*': 'attention pooling',
    r'(blocks|encoder\.layer)\.\d+\..*relative_position_bias_table': 'a table of relative positions in each block',
    r'.*mlp\.(fc1_g|fc1_x|w1|w2|w12)\..*': 'a gated MLP',
    r'.*patch_embed\.backbone\..*|patch_embed\.proj\.\d+\..*': 'a stem of several convolutions',
}


@dataclasses.dataclass(frozen=True)
class Hints:
    """What cannot be read from a file, or is to be another than it says; None for what is found or usual.

    Attributes:
      kind: the family, one of `tables.TABLES`.
      image_size: (height, width), or one number for both.
      heads, decoder_heads: of the attention.
      norm_eps: of LayerNorm.
      mean, std: of the pixels, per channel.
      pool: of a classifier.
      norm_pix_loss: of MAE and BootMAE.
      dtype: of matrix products, float32 unless it is given.
    """

    kind: str | None = None
    image_size: tuple[int, int] | int | None = None
    heads: int | None = None
    decoder_heads: int | None = None
    norm_eps: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pool: str | None = None
    norm_pix_loss: bool | None = None
    dtype: str | None = None


def weights(source: Source, hints: Hints) -> Weights:
    """The method that a file's arrays are, with its parameters.

    Raises:
      UserError: if it is of no known family, or has what our models have not.
    """
    try:
        return _weights(source, hints)
    except UserError as e:
        raise UserError(f'{source.path}: {e}') from None


def _weights(source, hints):
    arrays = {name.removeprefix('module.'): array for name, array in source.arrays.items()}
    arrays = _renamed(arrays)
    kind = _kind(arrays, source.config, hints.kind)
    arrays, notes = _usable(arrays, kind)
    found = _Reading(arrays, kind, source, hints)
    config = found.config()
    weights = Weights(config, {}, None, found.pool, tuple(notes))
    try:
        method = weights.method
    except ValueError as e:
        raise UserError(str(e)) from None
    rows = tables.TABLES[kind](method, found.pool)
    shapes = {path: x.shape for path, x in flat(jax.eval_shape(method.init, jax.random.key(0))[0]).items()}
    if found.pool:
        shapes |= {'head/kernel': (method.arch.width, found.classes), 'head/bias': (found.classes,)}
    params = nested(tables.read(rows, arrays, shapes))
    head = params.pop('head') if found.pool else None
    return dataclasses.replace(weights, params=params, head=head)


def _renamed(arrays):
    """With Hugging Face's published names, where they are Hugging Face's."""
    if not any('patch_embeddings.projection.' in name for name in arrays):
        return arrays
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        new = name
        for pattern, to in RENAMED:
            new = re.sub(pattern, to, new)
        if new in out:
            raise UserError(f'{name} and another array are both {new}')
        out[new] = array
    if 'classifier.weight' not in out and 'layernorm.weight' not in out:
        # BeitModel with mean pooling has its only norm behind it.
        out = {re.sub(r'^pooler\.layernorm\.', 'layernorm.', name): array for name, array in out.items()}
    return out


def _kind(arrays, config, given):
    """The family, a key of `tables.TABLES`."""
    if given and given not in tables.TABLES:
        raise UserError(f'kind is {given!r}; it must be one of {", ".join(tables.TABLES)}')
    found = _recognised(arrays, config)
    if found is None:
        first = ', '.join(sorted(arrays)[:3]) or 'none'
        raise UserError(
            f'the weights belong to no known family ({", ".join(tables.TABLES)}); the first of '
            f'{len(arrays)} names: {first}'
        )
    if given and given != found and (given, found) != ('mae', 'timm_vit'):  # of its encoder alone
        raise UserError(f'kind is {given!r}, but the names are those of {found!r}')
    return found


def _recognised(arrays, config):
    def has(pattern):
        return any(re.match(pattern, name) for name in arrays)

    beit = r'(encoder\.layer\.0\.lambda_1|blocks\.0\.gamma_1|.*relative_position_bias_table|blocks\.0\.attn\.q_bias)'
    if 'embeddings.patch_embeddings.projection.weight' in arrays:
        if 'decoder.decoder_embed.weight' in arrays:
            return 'hf_mae'
        query, key = (f'encoder.layer.0.attention.attention.{name}.bias' in arrays for name in ('query', 'key'))
        no_key = query and not key
        return 'hf_beit' if config.get('model_type') == 'beit' or has(beit) or no_key else 'hf_vit'
    if 'encoder.patch_embed.proj.weight' in arrays:
        return 'simmim'
    if 'patch_embed.proj.weight' not in arrays:
        return None
    if has(r'decode_blocks\.'):
        return 'bootmae'
    if has(r'decoder_blocks\.'):
        return 'mae'
    if has(r'projectors\.'):
        return 'conmim'
    return 'timm_beit' if has(beit) else 'timm_vit'


def _usable(arrays, kind):
    """Without what is left out, and notes about that; raises where there are parts that our models lack."""
    foreign = {w: n for p, w in FOREIGN.items() for n in arrays if re.fullmatch(p, n)}
    if foreign:
        raise UserError(
            'the model has features that are not supported here: ' + ', '.join(f'{w} ({n})' for w, n in foreign.items())
        )
    unused = {
        name: words
        for pattern, words in LEFT_OUT.get(kind, {}).items()
        for name in arrays
        if re.fullmatch(pattern, name)
    }
    notes = [f'left out: {name} ({words})' for name, words in unused.items()]
    return {name: array for name, array in arrays.items() if name not in unused}, notes


class _Reading:
    """A config from shapes."""

    def __init__(self, arrays, kind: str, source: Source, hints: Hints):
        self.arrays, self.kind, self.hints = arrays, kind, hints
        self.json, self.preprocessor = source.config, source.preprocessor
        self.prefix = 'encoder.' if kind == 'simmim' else ''
        styles = {'timm_vit': tables.TIMM, 'mae': tables.TIMM, 'hf_vit': tables.HF_VIT, 'hf_mae': tables.HF_VIT}
        styles['hf_beit'] = tables.HF_BEIT
        self.style = styles.get(kind, tables.BEIT)
        self.pool, self.classes = self._head()

    def setting(self, name: str, default=None):
        """A hint, what the config.json says, or a default."""
        given = getattr(self.hints, name)
        if given is not None:
            return given
        theirs = next((t for t, ours in SETTINGS.items() if ours == name), name)
        return self.json.get(theirs, default)

    def array(self, name: str, ndim: int) -> np.ndarray:
        found = self.arrays.get(self.prefix + name)
        if found is None or found.ndim != ndim or 0 in found.shape:
            got = 'is missing' if found is None else f'has shape {found.shape}'
            raise UserError(f'{self.prefix + name} {got}; expected {ndim} dimensions')
        return found

    def depth(self, pattern: str) -> int:
        """How many blocks there are."""
        start = re.escape(self.prefix + pattern).replace(r'\{\}', r'(\d+)') + r'\.'
        numbers = {int(m[1]) for name in self.arrays if (m := re.match(start, name))}
        if not numbers or numbers != set(range(len(numbers))):
            raise UserError(f'the blocks {pattern.format("*")} are numbered {sorted(numbers)}; expected 0, 1, ...')
        return len(numbers)

    def config(self) -> ConfigDict:
        """The complete config."""
        c, s = schema.get_config(), self.style
        m, d = c.model, c.data
        kernel = self.array(f'{s.patch}.weight', 4)
        given = self.json.get('hidden_act') or self.json.get('model_args', {}).get('act_layer') or 'gelu'
        if given != 'gelu':
            raise UserError(f'config.json: the activation is {given!r}; here it is the exact gelu')
        m.width, d.channels, m.patch_size, other = kernel.shape
        if other != m.patch_size:
            raise UserError(f'{s.patch}.weight: patches are {m.patch_size} x {other} pixels; here they are square')
        m.depth = self.depth(s.block)
        first = self.prefix + s.block.format(0)
        m.mlp_ratio = _ratio(self.array(f'{s.block.format(0)}.{s.mlp_in}.weight', 2).shape[0], m.width)
        m.class_token = self.prefix + s.cls in self.arrays
        m.relative_bias = self.prefix + s.relative in self.arrays
        m.qkv_bias = ''.join(k for k, name in s.biases.items() if f'{first}.{name}' in self.arrays)
        m.layer_scale = 0.0
        if s.gammas and f'{first}.{s.gammas[0]}' in self.arrays:
            m.layer_scale = float(self.json.get('layer_scale_init_value') or 0.1)
        m.norm_eps = float(self.setting('norm_eps', 1e-12 if self.kind.startswith('hf') and self.json else 1e-6))
        m.heads = self.heads()
        m.init = 'beit' if s in (tables.BEIT, tables.HF_BEIT) else 'mae'
        d.image_size = self.image_size(m)
        d.eval_resize = self.eval_resize(min(d.image_size))
        m.position = self.position(m, d.image_size)
        d.mean, d.std = self.pixels(d.channels)
        if self.pool:
            d.num_classes, c.classify.pool = self.classes, self.pool
        m.dtype = self.hints.dtype or 'float32'
        c.method = self.kind if self.kind in METHODS else 'encoder'
        for hint, readers in (('decoder_heads', ('mae', 'hf_mae')), ('norm_pix_loss', ('mae', 'hf_mae', 'bootmae'))):
            if (given := getattr(self.hints, hint)) is not None and self.kind not in readers:
                raise UserError(f'{hint} is {given!r}, which is not for weights of {self.kind}: leave it out')
        if self.kind in METHODS:
            METHODS[self.kind](self, c)
        return c

    def heads(self) -> int:
        if self.prefix + self.style.relative in self.arrays:
            table = self.array(self.style.relative, 2)
            if self.setting('heads', table.shape[1]) != table.shape[1]:
                raise UserError(
                    f'heads is {self.setting("heads")}; the table of relative positions has {table.shape[1]}'
                )
            return table.shape[1]
        width = self.array(f'{self.style.patch}.weight', 4).shape[0]
        heads = self.setting('heads', self._timm('num_heads', HEADS.get(width)))
        if heads is None:
            raise UserError(f'the number of heads cannot be read from a width of {width}; give it with --heads')
        return heads

    def image_size(self, m) -> tuple[int, int]:
        given = self.setting('image_size', self._timm('img_size'))
        if given is not None:
            size = tuple(given) if isinstance(given, list | tuple) else (given, given)
            if len(size) != 2 or not all(isinstance(n, int) and n > 0 and n % m.patch_size == 0 for n in size):
                raise UserError(
                    f'image_size is {given!r}; it must be one or two multiples of the patch size, {m.patch_size} pixels'
                )
            return size
        if self.prefix + self.style.pos in self.arrays:
            side = math.isqrt(self.array(self.style.pos, 3).shape[1])
            square = side**2 in (n := self.array(self.style.pos, 3).shape[1], n - m.class_token)
        elif m.relative_bias:
            n = self.array(self.style.relative, 2).shape[0] - 3
            side = (math.isqrt(n) + 1) // 2
            square = (2 * side - 1) ** 2 == n
        else:
            square = False
        if not square:
            raise UserError('the image size cannot be read from the shapes; give it with --image_size=HEIGHT,WIDTH')
        return (side * m.patch_size,) * 2

    def eval_resize(self, side: int) -> int:
        """`data.eval_resize` where the shorter side of the model's images has so many pixels."""
        theirs, cfg = self.preprocessor, self.json.get('pretrained_cfg', {})
        if theirs:
            size = theirs.get('size')
            edge = size.get('shortest_edge') or size.get('height') if isinstance(size, Mapping) else size
            return int(edge or 0) if theirs.get('do_center_crop') and theirs.get('do_resize', True) else 0
        if 'crop_pct' in cfg:
            return 0 if cfg.get('crop_mode') == 'squash' else math.floor(side / cfg['crop_pct'] + 1e-6)
        return round(side * 256 / 224)  # the usual ratio, and the official codes'

    def position(self, m, image_size) -> str:
        """The kind of positions: one that is computed where the stored table is that."""
        name = self.prefix + self.style.pos
        if name not in self.arrays:
            if self.style.table:
                raise UserError(f'{name} is missing')
            return 'none'
        table, grid = self.array(self.style.pos, 3), tuple(n // m.patch_size for n in image_size)
        count = grid[0] * grid[1]
        if m.class_token and table.shape[1] == count:  # timm's no_embed_class
            table = np.pad(table, ((0, 0), (1, 0), (0, 0)))
            self.arrays[name] = table
        for kind in ('none', 'sincos', 'sincos_rows'):
            if kind != 'none' and m.width % 4:
                continue
            arch = vit.Architecture(
                image_size, 1, m.patch_size, 1, m.width, 1, position=kind, class_token=m.class_token
            )
            value = tables.positions(arch)
            if tables.computed(table, value):
                return kind
        return 'learned'

    def pixels(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the pixels."""
        d = schema.get_config().data
        usual = {'mean': d.mean, 'std': d.std} if channels == 3 and self.kind != 'bootmae' else {}
        cfg = self.json.get('pretrained_cfg', {})
        out = []
        for name in ('mean', 'std'):
            value = getattr(self.hints, name) or self.preprocessor.get(f'image_{name}') or cfg.get(name)
            value = tuple(float(v) for v in value or usual.get(name, (0.5,) * channels))
            if len(value) != channels:
                raise UserError(f'{name} has {len(value)} values; it must have one for each of {channels} channels')
            out.append(value)
        return tuple(out)

    def _timm(self, name: str, default=None):
        """An argument of a model in timm's config.json."""
        return self.json.get('model_args', {}).get(name, default)

    def _head(self) -> tuple[str, int]:
        """What a classifier's head sees, and how many classes it tells apart."""
        s, given = self.style, self.hints.pool
        if f'{s.head}.weight' not in self.arrays or self.kind not in ('timm_vit', 'timm_beit', 'hf_vit', 'hf_beit'):
            if given:
                raise UserError(f'pool is {given!r}, which is for a classifier; the file has none: leave it out')
            return '', 0
        classes = self.array(f'{s.head}.weight', 2).shape[0]
        if f'{s.head_norm}.weight' in self.arrays:
            if given not in (None, 'fc_norm'):
                raise UserError(f"pool is {given!r}; the norm behind the pooling in the file makes it 'fc_norm'")
            return 'fc_norm', classes
        found = {'avg': 'mean', 'token': 'class'}.get(self._timm('global_pool', ''))
        pool = given or found or ('class' if s.cls in self.arrays else 'mean')
        if pool not in ('class', 'mean'):
            raise UserError(f"pool is {pool!r}; with a final norm in the file it must be 'class' or 'mean'")
        return pool, classes


def _ratio(hidden: int, width: int) -> float:
    """mlp_ratio, of which the hidden width is made by truncation."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _mae(found: _Reading, c: ConfigDict) -> None:
    at, layers = ('decoder.', 'decoder.decoder_layers.{}') if found.kind == 'hf_mae' else ('', 'decoder_blocks.{}')
    c.method, c.mae.decoder_depth = 'mae', found.depth(layers)
    c.mae.decoder_width = width = found.array(f'{at}decoder_embed.weight', 2).shape[0]
    c.mae.decoder_heads = found.setting('decoder_heads', 16 if width == 512 else None) or 0
    if not c.mae.decoder_heads:
        raise UserError(f'the number of heads cannot be read from a decoder {width} wide; give it with --decoder_heads')
    c.mae.norm_pix_loss = bool(found.setting('norm_pix_loss', True))
    c.mask_ratio = float(found.json.get('mask_ratio', c.mask_ratio))


def _simmim(found: _Reading, c: ConfigDict) -> None:
    c.mask_ratio, c.simmim.mask_unit = 0.6, _unit(c)


def _conmim(found: _Reading, c: ConfigDict) -> None:
    c.conmim.mask_unit = _unit(c)
    c.conmim.hidden = found.array('projectors.0.weight', 2).shape[0]
    c.conmim.out = found.array('projectors.6.weight', 2).shape[0]


def _bootmae(found: _Reading, c: ConfigDict) -> None:
    b, grid = c.bootmae, [n // c.model.patch_size for n in c.data.image_size]
    b.decoder_depth, b.decoder_width = found.depth('decode_blocks.{}'), found.array('down.weight', 2).shape[0]
    b.norm_pix_loss = bool(found.setting('norm_pix_loss', True))
    # The official blocks, or where the grid has no room for them the largest that it has room for.
    count = math.prod(grid)
    b.block_patches = max(1, min(b.block_patches, count - num_visible(count, c.mask_ratio)))
    least = max(1, min(b.block_area[0], b.block_patches, (grid[0] - 1) * (grid[1] - 1)))
    b.block_area = (least, max(least, b.block_area[1]))
    c.model.init = 'bootmae'


def _unit(c: ConfigDict) -> int:
    """Patches per side of a masked unit: the official 2 where they divide the grid."""
    return 1 if any(n // c.model.patch_size % 2 for n in c.data.image_size) else 2


# What a family's method has besides an encoder, by its name.
METHODS: Mapping[str, Callable[[_Reading, ConfigDict], Any]] = {
    'mae': _mae,
    'hf_mae': _mae,
    'simmim': _simmim,
    'conmim': _conmim,
    'bootmae': _bootmae,
}
