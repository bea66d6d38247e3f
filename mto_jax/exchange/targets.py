"""Weights in the form of another library: which of its classes holds them, its names and its config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mto_jax.errors import UserError
from mto_jax.exchange import tables
from mto_jax.exchange.model import Weights, encoder_alone
from mto_jax.methods.mae import MAE

TARGETS = ('huggingface', 'timm', 'mae')
EPS = 1e-6  # of timm's LayerNorm, and of the official MAE's


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written for a target.

    Attributes:
      name: of the class that holds it.
      arrays: by its names.
      config: config.json; {} for none.
      preprocessor: preprocessor_config.json; {} for none.
      load: Python that loads it, from the folder `folder`.
      left_out: parts of our parameters that it does not hold.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    load: str
    left_out: tuple[str, ...] = ()


def export(weights: Weights, target: str, part: str = 'all') -> Export:
    """Weights as `target` has them.

    Args:
      part: 'encoder' to leave out the decoder of an MAE, which is else written where the target has a place for it.

    Raises:
      UserError: naming what the target cannot express, and a target that can.
    """
    if target not in TARGETS:
        raise UserError(f'target is {target!r}; it must be one of {", ".join(TARGETS)}')
    whole = part == 'all' and isinstance(weights.method, MAE) and target in WHOLE
    kept = weights if whole else encoder_alone(weights)
    found, reasons = _first((WHOLE[target],) if whole else ENCODERS[target], kept)
    if found:
        left = {_part(name) for name in weights.flat()} - {_part(name) for name in kept.flat()}
        return dataclasses.replace(found, left_out=tuple(sorted(left)))
    ways = ['--part=encoder leaves the decoder out'] if whole else []
    ways += [f'--target={t} can' for t in TARGETS if not whole and t != target and _first(ENCODERS[t], kept)[0]]
    raise UserError('; '.join([f'{target} cannot express these weights ({"; ".join(reasons)})', *ways]))


def _first(classes, weights) -> tuple[Export | None, list[str]]:
    """What the first class that can hold the weights makes of them, or what each of them cannot express."""
    reasons = []
    for make in classes:
        found = make(weights)
        if isinstance(found, Export):
            return found, []
        name, problems = found
        reasons.append(f'{name}: {", ".join(problems)}')
    return None, reasons


def _part(name: str) -> str:
    return 'mask token' if name == 'encoder/mask_token' else name.split('/')[0]


def _made(name, kind, weights, config, preprocessor, load, prefix='') -> Export:
    rows = tables.TABLES[kind](weights.method, weights.pool)
    arrays = tables.write(rows, weights.flat())
    outside = ('classifier.', 'decoder.')
    named = {n if n.startswith(outside) else prefix + n: a for n, a in arrays.items()}
    return Export(name, named, config, preprocessor, load)


def _problems(**found: bool) -> list[str]:
    """The names of what there is, as sentences have them."""
    return [name.replace('_', ' ') for name, there in found.items() if there]


# ------------------------------------------------------------------------------------------------------- Hugging Face


def _size(weights) -> int | list[int]:
    height, width = weights.config.data.image_size
    return height if height == width else [height, width]


def _huggingface(weights, name, model_type, **more) -> dict[str, Any]:
    """What the config.json of all classes has."""
    a = weights.method.arch
    config = {
        'architectures': [name],
        'model_type': model_type,
        'hidden_size': a.width,
        'num_hidden_layers': a.depth,
        'num_attention_heads': a.heads,
        'intermediate_size': int(a.width * a.mlp_ratio),
        'hidden_act': 'gelu',
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
        'layer_norm_eps': a.norm_eps,
        'image_size': _size(weights),
        'patch_size': a.patch_size,
        'num_channels': a.channels,
        'dtype': 'float32',
    }
    if weights.head:
        labels = [f'LABEL_{i}' for i in range(len(weights.head['bias']))]
        config['id2label'] = {str(i): label for i, label in enumerate(labels)}
        config['label2id'] = {label: i for i, label in enumerate(labels)}
    return config | more


def _preprocessor(weights) -> dict[str, Any]:
    """How images become pixels: as evaluations here read them."""
    d = weights.config.data
    height, width = d.image_size
    out = {
        # Not ViT's, which has no crop before transformers 5.
        'image_processor_type': 'BitImageProcessor',
        'do_convert_rgb': d.channels == 3,
        'do_resize': True,
        'size': {'height': height, 'width': width},
        'resample': 3,  # bicubic
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': list(d.mean),
        'image_std': list(d.std),
    }
    if d.eval_resize:
        out |= {
            'size': {'shortest_edge': max(d.eval_resize, height, width)},
            'crop_size': {'height': height, 'width': width},
        }
    return out | {'do_center_crop': bool(d.eval_resize)}


def _load_huggingface(name: str, more: str = '') -> str:
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained(folder{more}).eval()'


def _vit_mae(weights):
    name = 'ViTMAEForPreTraining'
    a, d, mto = weights.method.arch, weights.method.decoder, weights.config.mto
    problems = _problems(
        no_class_token=not a.class_token,
        layer_scale=bool(a.layer_scale),
        a_mask_token_of_fixed_length=bool(a.mask_token_norm),
        MTO_in_the_attention_of_the_decoder=bool(mto.enabled and mto.recalibration != 'none'),
        a_number_of_patches_that_is_no_square=math.isqrt(a.num_patches) ** 2 != a.num_patches,
    )
    if problems:
        return name, problems
    config = _huggingface(
        weights,
        name,
        'vit_mae',
        qkv_bias=bool(a.qkv_bias),
        decoder_hidden_size=d.width,
        decoder_num_hidden_layers=d.depth,
        decoder_num_attention_heads=d.heads,
        decoder_intermediate_size=int(d.width * d.mlp_ratio),
        mask_ratio=weights.config.mask_ratio,
        norm_pix_loss=weights.config.mae.norm_pix_loss,
    )
    return _made(name, 'hf_mae', weights, config, _preprocessor(weights), _load_huggingface(name), 'vit.')


def _vit(weights):
    a = weights.method.arch
    name = 'ViTForImageClassification' if weights.head else 'ViTModel'
    problems = _problems(
        no_class_token=not a.class_token,
        relative_positions=a.relative_bias,
        layer_scale=bool(a.layer_scale),
        a_head_on_the_mean_of_the_patches=weights.pool in ('mean', 'fc_norm'),
    )
    if problems:
        return name, problems
    config = _huggingface(weights, name, 'vit', qkv_bias=bool(a.qkv_bias))
    load = _load_huggingface(name, '' if weights.head else ', add_pooling_layer=False')
    return _made(name, 'hf_vit', weights, config, _preprocessor(weights), load, 'vit.' if weights.head else '')


def _beit(weights):
    a = weights.method.arch
    name = 'BeitForImageClassification' if weights.head else 'BeitModel'
    problems = _problems(
        no_class_token=not a.class_token,
        biases_of_keys=a.qkv_bias == 'qkv',
        no_biases_of_queries_and_values=not a.qkv_bias,
        a_grid_of_patches_that_is_not_square=a.grid[0] != a.grid[1],
        a_head_on_the_mean_of_normalised_patches=weights.pool == 'mean',
    )
    if problems:
        return name, problems
    config = _huggingface(
        weights,
        name,
        'beit',
        use_mask_token=False,
        use_absolute_position_embeddings=a.position != 'none',
        use_relative_position_bias=False,
        use_shared_relative_position_bias=a.relative_bias,
        layer_scale_init_value=float(a.layer_scale),
        drop_path_rate=0.0,
        use_mean_pooling=weights.pool == 'fc_norm',
    )
    load = _load_huggingface(name)
    return _made(name, 'hf_beit', weights, config, _preprocessor(weights), load, 'beit.' if weights.head else '')


# --------------------------------------------------------------------------------------------------------------- timm


def _timm(weights, name, kind, architecture, **args):
    a, d = weights.method.arch, weights.config.data
    classes = len(weights.head['bias']) if weights.head else 0
    args = {
        'img_size': list(a.image_size),
        'patch_size': a.patch_size,
        'in_chans': a.channels,
        'embed_dim': a.width,
        'depth': a.depth,
        'num_heads': a.heads,
        'mlp_ratio': a.mlp_ratio,
        'qkv_bias': bool(a.qkv_bias),
        'init_values': float(a.layer_scale) or None,
        **args,
    }
    pretrained = {
        'input_size': [a.channels, *a.image_size],
        'fixed_input_size': True,
        'interpolation': 'bicubic',
        'crop_pct': min(a.image_size) / max(d.eval_resize, *a.image_size) if d.eval_resize else 1.0,
        'crop_mode': 'center' if d.eval_resize else 'squash',
        'mean': list(d.mean),
        'std': list(d.std),
        'num_classes': classes,
        'pool_size': None,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
    }
    config = {
        'architecture': architecture,
        'num_classes': classes,
        'num_features': a.width,
        'global_pool': args['global_pool'],
        'model_args': args,
        'pretrained_cfg': pretrained,
    }
    load = (
        'import json\n\nimport timm\n\n'
        "arguments = json.load(open(f'{folder}/config.json'))['model_args']\n"
        f"model = timm.create_model('{architecture}', checkpoint_path=f'{{folder}}/model.safetensors',\n"
        f'                          num_classes={classes}, **arguments).eval()\n'
        "# or, in one: timm.create_model(f'local-dir:{folder}', pretrained=True)"
    )
    return _made(name, kind, weights, config, {}, load)


def _timm_vit(weights):
    a, pool = weights.method.arch, weights.pool
    problems = _problems(relative_positions=a.relative_bias, an_eps_of_LayerNorm_other_than_1e_6=a.norm_eps != EPS)
    if problems:
        return 'VisionTransformer', problems
    token = pool == 'class' or (not pool and a.class_token)
    return _timm(
        weights,
        'VisionTransformer',
        'timm_vit',
        'vit_base_patch16_224',
        class_token=a.class_token,
        global_pool='token' if token else 'avg',
        fc_norm=pool == 'fc_norm',
    )


def _timm_beit(weights):
    a, pool = weights.method.arch, weights.pool
    problems = _problems(
        no_class_token=not a.class_token,
        biases_of_keys=a.qkv_bias == 'qkv',
        an_eps_of_LayerNorm_other_than_1e_6=a.norm_eps != EPS,
    )
    if problems:
        return 'Beit', problems
    return _timm(
        weights,
        'Beit',
        'timm_beit',
        'beit_base_patch16_224',
        use_abs_pos_emb=a.position != 'none',
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=a.relative_bias,
        global_pool='token' if pool in ('', 'class') else 'avg',
        use_fc_norm=pool == 'fc_norm',
    )


# ------------------------------------------------------------------------------------------------------- official MAE


def _official(weights):
    a, mto = weights.method.arch, weights.config.mto
    problems = _problems(
        no_class_token=not a.class_token,
        relative_positions=a.relative_bias,
        layer_scale=bool(a.layer_scale),
        no_biases_of_queries_and_values=not a.qkv_bias,
        an_eps_of_LayerNorm_other_than_1e_6=a.norm_eps != EPS,
        a_head_on_the_mean_of_normalised_patches=weights.pool == 'mean',
        a_mask_token_of_fixed_length=bool(a.mask_token_norm) and isinstance(weights.method, MAE),
        MTO_in_the_attention_of_the_decoder=bool(mto.enabled and mto.recalibration != 'none'),
    )
    name = 'MaskedAutoencoderViT' if isinstance(weights.method, MAE) else 'VisionTransformer of facebookresearch/mae'
    if problems:
        return name, problems
    load = (
        'from safetensors.torch import load_file\n\n'
        "weights = load_file(f'{folder}/model.safetensors')\n"
        "# as the official code keeps it: torch.save({'model': weights}, 'checkpoint.pth')"
    )
    kind = 'mae' if isinstance(weights.method, MAE) else 'timm_vit'
    return _made(name, kind, weights, {}, {}, load)


# What may hold the weights in each target. Each gives an `Export`, or its name and what it cannot express.
WHOLE = {'huggingface': _vit_mae, 'mae': _official}  # an MAE with its decoder
ENCODERS = {'huggingface': (_vit, _beit), 'timm': (_timm_vit, _timm_beit), 'mae': (_official,)}
