"""The defaults that every other config starts from: plain MAE with ViT-B/16 on ImageNet.

All fields, what they may be and what they do are in mto_jax/config.py; one that is not there is an error.
"""

from mto_jax.config import evaluation, get_config

__all__ = ['evaluation', 'get_config']
