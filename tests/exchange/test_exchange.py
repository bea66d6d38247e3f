"""Conversion: round trips, what is read from shapes, damaged and foreign files, and the command from end to end."""

import json
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from configs import finetune, knn
from mto_jax import convert, exchange, tasks
from mto_jax.errors import UserError
from mto_jax.exchange import files, runs, tables
from mto_jax.models import position
from tests.exchange import made
from tests.training.conftest import cut_down, pretrained  # noqa: F401


def arrays(weights, kind):
    """As the family keeps them."""
    return tables.write(tables.TABLES[kind](weights.method, weights.pool), weights.flat())


def file(path, found):
    files.save_safetensors(path, found)
    return path


FAMILIES = [
    ('mae', 'mae', ''),
    ('simmim', 'simmim', ''),
    ('bootmae', 'bootmae', ''),
    ('conmim', 'conmim', ''),
    ('hf_mae', 'mae', ''),
    *((kind, 'mae', pool) for kind in ('timm_vit', 'hf_vit') for pool in ('', 'class')),
    *((kind, 'simmim', pool) for kind in ('timm_beit', 'hf_beit') for pool in ('', 'class', 'fc_norm')),
]


def weights_of(rng, method, kind, pool, **fields):
    whole = kind in ('mae', 'hf_mae', 'simmim', 'bootmae', 'conmim')
    return made.weights(rng, method, **fields) if whole else made.encoder(rng, method, pool, **fields)


@pytest.mark.parametrize(('kind', 'method', 'pool'), FAMILIES)
def test_round_trips_are_exact(rng, tmp_path, kind, method, pool):
    """In, out, and in again: the same bits there and here, and the same architecture."""
    first = weights_of(rng, method, kind, pool)
    there = arrays(first, kind)
    hints = {'decoder_heads': 2} if kind in ('mae', 'hf_mae') else {}
    back = exchange.read(file(tmp_path / 'x.safetensors', there), heads=4, **hints)
    made.assert_same(first, back)
    fields = dict.fromkeys(('drop_path', 'init', 'size', 'attention', 'dtype', 'residual_dtype'))
    ours, theirs = (w.config.model.to_dict() | fields for w in (first, back))
    assert ours == theirs
    again = arrays(back, kind)
    assert again.keys() == there.keys()
    for name, array in there.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


# Key names as the official files have them: parts that are easily mistaken, each with its shape.
OFFICIAL = {
    'mae': {
        'cls_token': (1, 1, 32),
        'pos_embed': (1, 17, 32),
        'mask_token': (1, 1, 16),
        'decoder_pos_embed': (1, 17, 16),
        'patch_embed.proj.weight': (32, 3, 8, 8),
        'blocks.1.attn.qkv.weight': (96, 32),
        'blocks.1.attn.qkv.bias': (96,),
        'blocks.1.mlp.fc1.weight': (128, 32),
        'decoder_embed.weight': (16, 32),
        'decoder_blocks.1.attn.qkv.weight': (48, 16),
        'decoder_norm.bias': (16,),
        'decoder_pred.weight': (192, 16),
    },
    'simmim': {
        'encoder.mask_token': (1, 1, 32),
        'encoder.rel_pos_bias.relative_position_bias_table': (52, 4),
        'encoder.blocks.0.gamma_1': (32,),
        'encoder.blocks.0.attn.q_bias': (32,),
        'encoder.blocks.0.attn.v_bias': (32,),
        'encoder.norm.weight': (32,),
        'decoder.0.weight': (192, 32, 1, 1),
        'decoder.0.bias': (192,),
    },
    'bootmae': {
        'de_pos_embed': (1, 17, 20),
        'mask_token': (1, 1, 20),
        'mask_token_1': (1, 1, 32),
        'decode_blocks.0.attn.qkv.weight': (60, 20),
        'decode_blocks.0.c_attn.q.weight': (20, 20),
        'decode_blocks.0.c_attn.kv.weight': (40, 32),
        'decode_blocks.0.c_attn.v_bias': (20,),
        'decode_blocks.0.norm3.weight': (20,),
        'decode_blocks.0.norm4.weight': (32,),
        'decode_blocks_1.1.c_attn.proj.weight': (32, 32),
        'decode_norm_1.weight': (32,),
        'down.weight': (20, 32),
        'down_1.bias': (32,),
        'lm_head.proj.weight': (20, 3, 8, 8),
        'lm_head.proj.bias': (3,),
        'lm_head_1.weight': (32, 32),
    },
    'conmim': {
        'blocks.0.gamma_2': (32,),
        'projectors.0.weight': (24, 32),
        'projectors.1.weight': (24,),
        'projectors.3.weight': (24, 24),
        'projectors.4.bias': (24,),
        'projectors.6.weight': (8, 24),
        'rel_pos_bias.relative_position_bias_table': (52, 4),
    },
}


@pytest.mark.parametrize('kind', OFFICIAL)
def test_names_of_the_official_files(rng, kind):
    found = arrays(made.weights(rng, kind), kind)
    for name, shape in OFFICIAL[kind].items():
        assert found[name].shape == shape, name
        assert found[name].dtype == np.float32


def test_pixels_lie_where_the_official_heads_have_them(rng):
    """A pixel shuffle and a transposed convolution, written out for one token."""
    token = rng.normal(size=32).astype(np.float32)
    simmim = made.weights(rng, 'simmim')
    there, head = arrays(simmim, 'simmim'), simmim.params['head']
    channels = there['decoder.0.weight'][:, :, 0, 0] @ token + there['decoder.0.bias']
    ours = (token @ head['kernel'] + head['bias']).reshape(8, 8, 3)
    for row, column, channel in ((0, 0, 0), (2, 5, 1), (7, 1, 2)):
        shuffled = channels[channel * 64 + row * 8 + column]
        assert ours[row, column, channel] == pytest.approx(shuffled, abs=1e-4)
    bootmae = made.weights(rng, 'bootmae')
    there, head = arrays(bootmae, 'bootmae'), bootmae.params['pixel_head']
    token = rng.normal(size=20).astype(np.float32)
    image = np.einsum('w,wchk->chk', token, there['lm_head.proj.weight']) + there['lm_head.proj.bias'][:, None, None]
    ours = (token @ head['proj']['kernel']).reshape(8, 8, 3) + head['bias']
    np.testing.assert_allclose(ours, image.transpose(1, 2, 0), atol=1e-4)


def renamed(name):
    """As transformers 5 has it in memory."""
    for old, new in (
        ('encoder.layer.', 'layers.'),
        ('attention.attention.query', 'attention.q_proj'),
        ('attention.attention.key', 'attention.k_proj'),
        ('attention.attention.value', 'attention.v_proj'),
        ('attention.output.dense', 'attention.o_proj'),
        ('intermediate.dense', 'mlp.fc1'),
        ('output.dense', 'mlp.fc2'),
        ('encoder.relative_position_bias', 'shared_position_bias'),
    ):
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize(('kind', 'method'), [('hf_mae', 'mae'), ('hf_vit', 'mae'), ('hf_beit', 'simmim')])
def test_both_generations_of_hugging_faces_names(rng, tmp_path, kind, method):
    first = weights_of(rng, method, kind, '')
    found = arrays(first, kind)
    other = {('vit.' if not n.startswith('decoder') else '') + renamed(n): a for n, a in found.items()}
    assert not other.keys() & found.keys() - {n for n in found if n.startswith('decoder.')}
    hints = {'decoder_heads': 2} if kind == 'hf_mae' else {}
    made.assert_same(first, exchange.read(file(tmp_path / 'x.safetensors', other), heads=4, **hints))


def test_shapes_and_hints(rng, tmp_path):
    fields = {'model__mlp_ratio': 2.6, 'model__class_token': False, 'data__image_size': (16, 40), 'data__channels': 5}
    first = made.encoder(rng, data__mean=(0.1,) * 5, data__std=(0.2,) * 5, **fields)
    path = file(tmp_path / 'x.safetensors', arrays(first, 'timm_vit'))
    back = exchange.read(path, heads=4, image_size=(16, 40), mean=(0.1,) * 5, std=(0.2,) * 5, norm_eps=1e-3)
    made.assert_same(first, back)
    other = {'crop': '', 'eval_resize': 18}  # 16 * 256 / 224
    assert back.config.data.to_dict() | {'crop': ''} == first.config.data.to_dict() | other
    assert (back.config.model.norm_eps, int(back.config.model.mlp_ratio * 32)) == (1e-3, 83)
    standard = made.encoder(rng, model__width=192, model__heads=3)
    path = file(tmp_path / 'y.safetensors', arrays(standard, 'timm_vit'))
    assert exchange.read(path).config.model.heads == 3
    # 64 is the width of `nano` alone, which is this project's own.
    other = file(tmp_path / 'z.safetensors', arrays(made.encoder(rng, model__width=64, model__heads=4), 'timm_vit'))
    with pytest.raises(UserError, match='heads cannot be read from a width of 64'):
        exchange.read(other)
    with pytest.raises(UserError, match='image size cannot be read'):
        exchange.read(tmp_path / 'x.safetensors', heads=4)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(rng, tmp_path, dtype):
    first = made.encoder(rng)
    found = {n: a.astype(dtype) for n, a in arrays(first, 'timm_vit').items()}
    back = exchange.read(file(tmp_path / 'x.safetensors', found), heads=4)
    assert back.params['encoder']['norm']['scale'].dtype == np.float32
    np.testing.assert_array_equal(
        back.params['encoder']['norm']['scale'], first.params['encoder']['norm']['scale'].astype(dtype)
    )


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('kind', ['mae', 'hf_mae', 'bootmae'])
def test_tables_of_half_precision_are_the_computed_ones(rng, tmp_path, kind, dtype):
    first = made.weights(rng, kind.removeprefix('hf_'))
    found = {n: a.astype(dtype) for n, a in arrays(first, kind).items()}
    hints = {} if kind == 'bootmae' else {'decoder_heads': 2}
    back = exchange.read(file(tmp_path / 'x.safetensors', found), heads=4, **hints)
    assert back.config.model.position == first.config.model.position
    table = next(n for n in found if 'decoder_pos' in n or 'de_pos' in n)
    found[table] = found[table] * dtype(1.05)
    with pytest.raises(UserError, match=f'{table} differs from the table'):
        exchange.read(file(tmp_path / 'y.safetensors', found), heads=4, **hints)


@pytest.mark.parametrize('edge', [0, 36, 60])
@pytest.mark.parametrize('target', ['huggingface', 'timm'])
def test_as_much_of_an_image_is_seen_after_a_round_trip(rng, tmp_path, target, edge):
    first = made.encoder(rng, data__eval_resize=edge)
    exchange.write(first, tmp_path / 'there', target)
    assert exchange.read(tmp_path / 'there').config.data.eval_resize == edge


@pytest.mark.parametrize(
    ('name', 'content', 'edge'),
    [
        ('preprocessor_config.json', {'do_resize': True, 'size': 32}, 0),  # ViT's, as it was before 2022
        ('preprocessor_config.json', {'size': {'height': 32, 'width': 32}, 'do_center_crop': False}, 0),
        ('preprocessor_config.json', {'size': {'height': 40, 'width': 40}, 'do_center_crop': True}, 40),
        ('preprocessor_config.json', {'do_center_crop': True, 'do_resize': False, 'size': {'shortest_edge': 9}}, 0),
        (
            'config.json',
            {'pretrained_cfg': {'crop_pct': 0.9, 'crop_mode': 'center'}, 'model_args': {'num_heads': 4}},
            35,
        ),
        ('config.json', {'model_args': {'num_heads': 4}}, 37),
    ],
)
def test_how_much_of_an_image_others_see(rng, tmp_path, name, content, edge):
    kind = 'hf_vit' if name.startswith('pre') else 'timm_vit'
    file(tmp_path / 'model.safetensors', arrays(made.encoder(rng), kind))
    if kind == 'hf_vit':
        files.save_json(tmp_path / 'config.json', {'num_attention_heads': 4})
    files.save_json(tmp_path / name, content)
    assert exchange.read(tmp_path).config.data.eval_resize == edge


def test_weights_in_several_files(rng, tmp_path):
    first = made.encoder(rng)
    found = arrays(first, 'hf_vit')
    halves = list(found)[::2], list(found)[1::2]
    index = {}
    for i, names in enumerate(halves):
        file(tmp_path / f'{i}.safetensors', {n: found[n] for n in names})
        index |= dict.fromkeys(names, f'{i}.safetensors')
    files.save_json(tmp_path / files.INDEX, {'weight_map': index})
    files.save_json(tmp_path / 'config.json', {'num_attention_heads': 4, 'layer_norm_eps': 1e-6})
    made.assert_same(first, exchange.read(tmp_path))


def test_omitted_arrays_are_named(rng, tmp_path):
    """An unused head, running statistics and an index that can be computed."""
    first = made.weights(rng, 'conmim')
    more = {
        'lm_head.weight': np.zeros((9, 32), np.float32),
        'projectors.1.num_batches_tracked': np.array(3),
        'rel_pos_bias.relative_position_index': position.relative_index((4, 4), 1).astype(np.int64),
    }
    back = exchange.read(file(tmp_path / 'x.safetensors', arrays(first, 'conmim') | more))
    made.assert_same(first, back)
    assert back.notes == (
        'left out: lm_head.weight (a head that no loss reads)',
        'left out: projectors.1.num_batches_tracked (running statistics, which no loss reads)',
    )


# ------------------------------------------------------------------------------------------- damaged and foreign files


def changed(found, **arrays_):
    return {n: a for n, a in {**found, **arrays_}.items() if a is not None}


KEY_BIAS = np.zeros(96, np.float32)
KEY_BIAS[40] = 1
# What is done to the arrays of a plain ViT, or to its file, and a part of the line that says so.
DAMAGED = {
    'a missing array': (lambda a: changed(a, **{'norm.weight': None}), r'norm\.weight is missing'),
    'a missing block': (lambda a: {n: x for n, x in a.items() if not n.startswith('blocks.0')}, r'numbered \[1\]'),
    'an extra array': (lambda a: changed(a, extra=np.zeros(2, np.float32)), r'extra is unexpected'),
    'a wrong shape': (
        lambda a: changed(a, **{'blocks.1.mlp.fc2.weight': np.zeros((32, 127), np.float32)}),
        r'blocks\.1\.mlp\.fc2\.weight has shape \(32, 127\), expected \(32, 128\)',
    ),
    'three at once': (
        lambda a: changed(
            a, extra=np.zeros(2, np.float32), **{'norm.bias': None, 'cls_token': np.zeros(3, np.float32)}
        ),
        r'3 arrays do not fit: norm\.bias is missing; extra is unexpected; cls_token has shape \(3,\)',
    ),
    'integers': (lambda a: changed(a, **{'norm.weight': np.zeros(32, np.int32)}), r'norm\.weight is int32, expected'),
    'doubles': (lambda a: {n: x.astype(np.float64) for n, x in a.items()}, r'is float64, expected float32'),
    'not a number': (lambda a: changed(a, **{'norm.bias': np.full(32, np.nan, np.float32)}), r'not finite: norm\.bias'),
    'long patches': (
        lambda a: changed(a, **{'patch_embed.proj.weight': np.zeros((32, 3, 8, 4), np.float32)}),
        r'patches are 8 x 4 pixels',
    ),
    'a flat kernel': (
        lambda a: changed(a, **{'patch_embed.proj.weight': np.zeros((32, 192), np.float32)}),
        r'patch_embed\.proj\.weight has shape \(32, 192\); expected 4',
    ),
    'an empty kernel': (
        lambda a: changed(a, **{'patch_embed.proj.weight': np.zeros((0, 3, 8, 8), np.float32)}),
        r'has shape \(0, 3, 8, 8\)',
    ),
    'other positions': (
        lambda a: changed(a, pos_embed=np.ones((1, 19, 32), np.float32)),
        r'image size cannot be read|pos_embed has shape',
    ),
    'registers': (lambda a: changed(a, reg_token=np.ones((1, 4, 32), np.float32)), r'register tokens \(reg_token\)'),
    'a table in each block': (
        lambda a: changed(a, **{'blocks.0.attn.relative_position_bias_table': np.ones((52, 4), np.float32)}),
        r'a table of relative positions in each block',
    ),
    'a Swin': (lambda a: {'layers.0.blocks.0.norm1.weight': np.ones(3, np.float32)}, r'no known family'),
    'a ResNet': (lambda a: {'conv1.weight': np.ones((8, 3, 7, 7), np.float32)}, r'no known family'),
    'nothing': (lambda a: {}, r'no known family'),
}


def bytes_of(path, change):
    path.write_bytes(change(path.read_bytes()))


SPOILED = {
    'empty': (lambda b: b'', r'is empty'),
    'truncated': (lambda b: b[: len(b) // 2], r'not an intact safetensors file'),
    'truncated in the header': (lambda b: b[:20], r'not an intact safetensors file'),
    'a web page': (lambda b: b'<!doctype html><title>404</title>', r'not an intact safetensors file'),
    'a header without end': (lambda b: b'\xff' * 8 + b[8:], r'not an intact safetensors file'),
    'a pickle': (lambda b: b"cos\nsystem\n(S'touch ran'\ntR.", r'not an intact safetensors file'),
}


def refused(capsys, folder, source, words, *flags):
    """The command's one line, and nothing left behind."""
    before = sorted(folder.rglob('*'))
    with pytest.raises(SystemExit) as stopped:
        convert.main([f'--from={source}', f'--to={folder / "out"}', *flags])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith('error: ')
    assert line.count('\n') == 1
    assert re.search(words, line), line
    assert sorted(folder.rglob('*')) == before


@pytest.mark.parametrize('what', DAMAGED)
def test_other_arrays_are_refused(rng, tmp_path, capsys, what):
    change, words = DAMAGED[what]
    path = file(tmp_path / 'x.safetensors', change(arrays(made.encoder(rng), 'timm_vit')))
    refused(capsys, tmp_path, path, words, '--heads=4')


@pytest.mark.parametrize('what', SPOILED)
def test_damaged_files_are_refused(rng, tmp_path, capsys, what):
    change, words = SPOILED[what]
    path = file(tmp_path / 'x.safetensors', arrays(made.encoder(rng), 'timm_vit'))
    bytes_of(path, change)
    refused(capsys, tmp_path, path, words)


def test_other_things_are_refused(rng, tmp_path, capsys, monkeypatch):
    encoder = made.encoder(rng, model__width=40)
    good = file(tmp_path / 'x.safetensors', arrays(encoder, 'timm_vit'))
    refused(capsys, tmp_path, tmp_path / 'nowhere', 'does not exist')
    refused(capsys, tmp_path, tmp_path, r'holds none of model\.safetensors')
    refused(capsys, tmp_path, file(tmp_path / 'x.npz', {}), r'must end with \.safetensors')
    refused(capsys, tmp_path, good, r'heads cannot be read from a width of 40; give it with --heads')
    refused(capsys, tmp_path, good, r'width 40 is not a multiple of 3 heads', '--heads=3')
    refused(capsys, tmp_path, good, r'image_size is 30', '--heads=4', '--image_size=30')
    refused(capsys, tmp_path, good, r"kind is 'simmim', but the names are those of 'timm_vit'", '--kind=simmim')
    refused(capsys, tmp_path, good, r'mean has 2 values', '--heads=4', '--mean=0.5,0.5')
    refused(capsys, tmp_path, good, r'unrecognized arguments: --size=3; --help', '--size=3')
    refused(capsys, tmp_path, good, '--teacher is for a workdir', '--heads=4', '--teacher')
    refused(capsys, tmp_path, good, r"key is 'model_ema', which is for", '--heads=4', '--key=model_ema')
    refused(capsys, tmp_path, good, r"pool is 'mean', which is for a classifier", '--heads=4', '--pool=mean')
    refused(capsys, tmp_path, good, r'decoder_heads is 2, which is not for', '--heads=4', '--decoder_heads=2')
    refused(capsys, tmp_path, good, '--part is for an export', '--heads=4', '--part=encoder')
    refused(capsys, tmp_path, good, r"target is 'keras'", '--heads=4', '--target=keras')
    (tmp_path / 'index').mkdir()
    files.save_json(tmp_path / 'index' / files.INDEX, {'weight_map': {'a': '../x.safetensors'}})
    refused(capsys, tmp_path, tmp_path / 'index', r'names files that are not in its folder')
    (tmp_path / 'hf').mkdir()
    file(tmp_path / 'hf' / 'model.safetensors', arrays(encoder, 'hf_vit'))
    (tmp_path / 'hf' / 'config.json').write_text('{"hidden_size": ')
    refused(capsys, tmp_path, tmp_path / 'hf', r'config\.json is not JSON')
    (tmp_path / 'x.pth').write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    monkeypatch.setitem(sys.modules, 'torch', None)
    refused(capsys, tmp_path, tmp_path / 'x.pth', r'install PyTorch')
    assert not (tmp_path / 'ran').exists()


def test_a_bias_of_the_keys_is_not_dropped(rng, tmp_path):
    """timm's BEiT has none, and a fused one must be zero where ours has none."""
    row = tables.biases('attn', 'qv', {'qkv': 'attn.qkv.bias'})
    with pytest.raises(UserError, match=r'attn\.qkv\.bias holds a bias of the keys'):
        row.back([(4, 8), (4, 8)], KEY_BIAS)
    with pytest.raises(UserError, match='has no place for'):
        tables.biases('attn', 'qkv', {'q': 'q', 'v': 'v'})


def test_positions_that_a_decoder_cannot_keep(rng, tmp_path):
    found = arrays(made.weights(rng, 'mae'), 'mae')
    found['decoder_pos_embed'] = found['decoder_pos_embed'] + 0.01
    with pytest.raises(UserError, match='decoder_pos_embed differs from the table'):
        exchange.read(file(tmp_path / 'x.safetensors', found), heads=4, decoder_heads=2)


@pytest.mark.parametrize(
    ('target', 'method', 'pool', 'fields', 'words'),
    [
        ('huggingface', 'mae', 'mean', {}, r'a head on the mean of the patches.*--target=timm can'),
        ('huggingface', 'mae', 'fc_norm', {}, r'biases of keys.*--target=timm can'),
        ('huggingface', 'mae', '', {'model__class_token': False}, r'no class token.*--target=timm can'),
        ('huggingface', 'simmim', '', made.SIZES['wide_image'] | {'simmim__mask_unit': 1}, r'not square.*=timm can'),
        ('timm', 'simmim', '', {'model__norm_eps': 1e-5}, r'an eps of LayerNorm other.*--target=huggingface can'),
        ('timm', 'simmim', '', {'model__qkv_bias': 'qkv'}, r'relative positions.*biases of keys\)$'),
        ('mae', 'simmim', '', {}, r'relative positions, layer scale'),
    ],
)
def test_targets_name_unsupported_features(rng, tmp_path, target, method, pool, fields, words):
    weights = made.encoder(rng, method, pool, **fields)
    with pytest.raises(UserError, match=words):
        exchange.write(weights, tmp_path / 'out', target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'fields', [{'mto__enabled': True, 'mto__recalibration': 'ramp'}, {'model__mask_token_norm': 1.0}]
)
def test_a_decoder_that_is_another_there(rng, tmp_path, fields):
    weights = made.weights(rng, 'mae', **fields)
    for target in ('huggingface', 'mae'):
        with pytest.raises(UserError, match='--part=encoder leaves the decoder out'):
            exchange.write(weights, tmp_path / 'out', target)
        exchange.write(weights, tmp_path / target, target, part='encoder')
    assert 'Not in this export: decoder.' in (tmp_path / 'mae' / 'README.md').read_text()


def test_another_activation_is_refused(rng, tmp_path):
    exchange.write(made.encoder(rng), tmp_path / 'hf', 'huggingface')
    path = tmp_path / 'hf' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'hidden_act': 'gelu_new'}))
    with pytest.raises(UserError, match="activation is 'gelu_new'"):
        exchange.read(tmp_path / 'hf')


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        (['--from=gs://bucket/run', '--to=x'], 'gs://bucket/run is no run'),
        (['--from=run', '--to=gs://bucket/x'], '--to is gs://bucket/x; it must be a local folder'),
    ],
)
def test_buckets(args, words, capsys, monkeypatch):
    """A run in a bucket is looked for there; nothing is written to one."""
    monkeypatch.setattr(epath.gpath.PosixGPath, 'is_dir', lambda self: False)
    with pytest.raises(SystemExit):
        convert.main(args)
    assert words in capsys.readouterr().err


def test_out_of_a_run_and_in_again(pretrained, tmp_path, capsys):  # noqa: F811
    """The features that an evaluation takes from what comes back are those of the run."""
    convert.main([f'--from={pretrained}', f'--to={tmp_path / "hf"}', '--target=huggingface'])
    assert sorted(p.name for p in (tmp_path / 'hf').iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
        'preprocessor_config.json',
    ]
    card = (tmp_path / 'hf' / 'README.md').read_text()
    assert 'ViTMAEForPreTraining.from_pretrained(folder)' in card
    assert '| `method` | `mae` |' in card
    assert '| loss at step 2 |' in card
    convert.main([f'--from={tmp_path / "hf"}', f'--to={tmp_path / "run"}'])
    assert f'--config.checkpoint={tmp_path / "run"}' in capsys.readouterr().out
    run, back = exchange.read(pretrained), exchange.read(tmp_path / 'run')
    made.assert_same(run, back)
    scores = []
    for source in (pretrained, tmp_path / 'run'):
        c = knn.get_config()
        c.checkpoint, c.eval.batch_size, c.mesh.data, c.allow_cpu = str(source), 32, 1, True
        c.data.name, c.data.data_dir = 'fashion_mnist_12k', 'data'
        c.data.train_split, c.data.test_split = 'train[:130]', 'test[:70]'
        scores.append(tasks.run(c, tmp_path / f'knn{len(scores)}'))
    same = [{k: v for k, v in found.items() if k not in ('checkpoint', 'step')} for found in scores]
    assert same[0] == same[1]
    with pytest.raises(SystemExit):
        convert.main([f'--from={tmp_path / "hf"}', f'--to={tmp_path / "run"}'])
    assert 'run exists; choose another --to' in capsys.readouterr().err


def test_a_fine_tuned_run(pretrained, tmp_path, capsys):  # noqa: F811
    """Averaged weights and head, out, in and out again: the same bits; its accuracy is on the card."""
    c = cut_down(finetune.get_config('vit_b'), pretrained)
    c.classify.ema, c.epochs, c.optim.warmup_epochs = 0.5, 0.5, 0.0
    report = tasks.run(c, tmp_path / 'tuned')
    for source, to, flags in (
        ('tuned', 'timm', ['--target=timm']),
        ('timm', 'run', []),
        ('run/checkpoints/0', 'again', ['--target=timm']),
    ):
        convert.main([f'--from={tmp_path / source}', f'--to={tmp_path / to}', *flags])
    first, again = ((tmp_path / name / 'model.safetensors').read_bytes() for name in ('timm', 'again'))
    assert first == again
    weights, _ = runs.load(tmp_path / 'tuned')
    assert (weights.pool, weights.head['kernel'].shape) == ('fc_norm', (16, 10))
    card = (tmp_path / 'timm' / 'README.md').read_text()
    assert f'| top1 on test[:70] (finetune.json) | {report["top1"]:.4f} |' in card
    assert 'does not say how they were trained' in (tmp_path / 'again' / 'README.md').read_text()
    capsys.readouterr()
    refused(capsys, tmp_path, tmp_path / 'tuned', 'is already a run of mto_jax')
    refused(capsys, tmp_path, tmp_path / 'checkpoints' / 'mae.pth', 'mae.pth does not exist')
    refused(capsys, tmp_path, tmp_path / 'tuned', 'a head on the mean of the patches', '--target=huggingface')
    refused(capsys, tmp_path, pretrained, 'has no teacher', '--target=timm', '--teacher')
    refused(capsys, tmp_path, pretrained, '--heads is for foreign files', '--target=timm', '--heads=2')
    refused(capsys, tmp_path, pretrained, '--key is for a .pth file', '--target=timm', '--key=model')


def test_an_encoder_is_not_pretrained(rng, tmp_path, config):
    config.method = 'encoder'
    with pytest.raises(UserError, match="method is 'encoder', which has no pre-training loss"):
        tasks.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_the_command_itself(tmp_path):
    """As a program, in its own process: help without loading a library, and one line for a wrong flag."""
    shown = subprocess.run(
        [sys.executable, '-m', 'mto_jax.convert', '--help'], capture_output=True, text=True, check=True
    )
    assert '--from' in shown.stdout
    wrong = subprocess.run([sys.executable, '-m', 'mto_jax.convert', '--to=x'], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count('\n')) == (2, 1)
