"""A method of one's own, outside the package: hidden patches are told by their mean colour alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods, mto
from mto_jax.models import vit


class Colours(methods.Method):
    """An encoder with mask tokens, and a linear layer that predicts the mean colour of each hidden patch."""

    encoder_arch: vit.Architecture
    mto_settings: mto.Settings | None
    mask_ratio: float

    arch = property(lambda self: self.encoder_arch)
    settings = property(lambda self: self.mto_settings)

    def setup(self):
        self.encoder = vit.ViT(self.encoder_arch, self.mto_settings)
        self.head = nn.Dense(self.encoder_arch.channels)

    def __call__(self, images, *, noise=None, train=False, everything=False):
        a = self.encoder_arch
        if noise is None:
            noise = jax.random.uniform(self.make_rng('mask'), (images.shape[0], a.num_patches))
        mask = masking.unit_masking(noise, a.grid, 1, self.mask_ratio).mask
        encoded = self.encoder(images, mask=mask, train=train, everything=everything)
        predictions = self.head(encoded.tokens[:, a.num_prefix :].astype(jnp.float32))
        target = losses.patchify(images.astype(jnp.float32), a.patch_size)
        target = target.reshape(*target.shape[:2], -1, a.channels).mean(2)
        loss = jnp.sum(mask[..., None] * (predictions - target) ** 2) / (jnp.sum(mask) * a.channels)
        return methods.Output({'colour': loss}, predictions, target, mask, encoded.stats, encoded.embedded)

    def encode(self, images, depth=None):
        return self.encoder(images, depth=depth).tokens

    def to_pixels(self, output, images):
        """Every pixel of a patch in its predicted colour."""
        return jnp.tile(output.predictions, (1, 1, self.encoder_arch.patch_size**2))


def build(config):
    arch = methods.architecture(config)
    return Colours(arch, methods.mto_settings(config, arch.depth), config.mask_ratio)
