"""An encoder without a pre-training loss: weights that come from elsewhere, for every evaluation."""

import jax
import jax.numpy as jnp

from mto_jax import methods
from mto_jax.errors import UserError
from mto_jax.models import vit


class Encoder(methods.Method):
    """The encoder alone: `encode`, and nothing to train it with but labels."""

    def init(self, key):
        images = jnp.zeros((1, *self.arch.image_size, self.arch.channels))
        return {'encoder': vit.ViT(self.arch).init(key, images)['params']}, {}

    def loss(self, params, model_state, views, key, clock, *, noise=None):
        raise UserError(
            "method is 'encoder', which has no pre-training loss: evaluate or fine-tune it (configs/knn.py, "
            'configs/finetune.py), or pre-train with mae, simmim, bootmae or conmim'
        )

    def encode(self, params, images, *, depth=None, train=False, key=None) -> jax.Array:
        rngs = {'dropout': key} if train else {}
        encoder = vit.ViT(self.arch)
        return encoder.apply({'params': params['encoder']}, images, depth=depth, train=train, rngs=rngs).tokens


def build(config) -> Encoder:
    """The encoder of `config.model` and `config.data`."""
    return Encoder(methods.architecture(config), None)
