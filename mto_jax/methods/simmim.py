"""SimMIM: "A Simple Framework for Masked Image Modeling" (arXiv 2111.09886), after microsoft/SimMIM (ViT variant)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods
from mto_jax.models import vit


@dataclasses.dataclass(frozen=True)
class SimMIM(methods.SingleModule):
    """An encoder in which mask tokens stand for hidden patches, and a linear layer that predicts their pixels.

    Attributes:
      mask_ratio: fraction of hidden units, rounded up to full units.
      mask_unit: side of a masked unit in patches.
    """

    mask_ratio: float
    mask_unit: int

    module = property(lambda self: MaskedEncoder(self))


class MaskedEncoder(nn.Module):
    """SimMIM's encoder and head."""

    method: SimMIM

    def setup(self):
        a = self.method.arch
        self.encoder = vit.ViT(a, methods.attends(self.method, a))
        # The official head is a 1x1 convolution with PyTorch's default initialisation: uniform in 1 / sqrt(fan in).
        init = vit.torch_default_bias(a.width)
        self.head = nn.Dense(a.patch_size**2 * a.channels, dtype=a.dtype, kernel_init=init, bias_init=init)

    def __call__(self, images, *, noise, train, progress=None):
        """See `methods.SingleModule`. noise: float (B, units)."""
        m, a = self.method, self.method.arch
        if noise is None:
            noise = jax.random.uniform(self.make_rng('mask'), (images.shape[0], a.num_patches // m.mask_unit**2))
        mask = masking.unit_masking(noise, a.grid, m.mask_unit, m.mask_ratio).mask
        encoded = self.encoder(images, mask=mask, train=train, progress=progress)
        predictions = self.head(encoded.tokens[:, a.num_prefix :])
        loss = losses.masked_l1(predictions, losses.patchify(images.astype(jnp.float32), a.patch_size), mask)
        stack = methods.Stack(mask, encoded.embedded, encoded.stats, a.depth)
        return methods.Result({'reconstruction': loss}, {'encoder': stack}, predictions=predictions, mask=mask)

    def encode(self, images, depth, train):
        return self.encoder(images, depth=depth, train=train).tokens

    def to_pixels(self, result, images):
        del images
        return result.predictions


def build(config) -> SimMIM:
    """SimMIM from `config.model`, `config.simmim`, `config.mto` and `config.data`."""
    arch, unit = methods.architecture(config), config.simmim.mask_unit
    methods.check_units(arch.grid, 'simmim.mask_unit', unit, config.mask_ratio)
    return SimMIM(arch, methods.mto_settings(config, arch.depth), config.mask_ratio, unit)
