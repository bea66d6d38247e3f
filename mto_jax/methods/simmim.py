"""SimMIM: "A Simple Framework for Masked Image Modeling" (arXiv 2111.09886), after microsoft/SimMIM (ViT variant)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods, mto
from mto_jax.models import vit


class SimMIM(methods.Method):
    """An encoder in which mask tokens stand for hidden patches, and a linear layer that predicts their pixels.

    Attributes:
      encoder_arch: of the encoder, which carries the mask tokens.
      mto_settings: MTO's settings for the encoder, or None.
      mask_ratio: share of hidden units, rounded up to whole units.
      mask_unit: side of a masked unit in patches.
    """

    encoder_arch: vit.Architecture
    mto_settings: mto.Settings | None
    mask_ratio: float
    mask_unit: int

    arch = property(lambda self: self.encoder_arch)
    settings = property(lambda self: self.mto_settings)

    def setup(self):
        a = self.encoder_arch
        self.encoder = vit.ViT(a, self.mto_settings)
        # The official head is a 1x1 convolution with PyTorch's default initialisation: uniform in 1 / sqrt(fan in).
        init = vit.torch_default_bias(a.width)
        self.head = nn.Dense(a.patch_size**2 * a.channels, dtype=a.dtype, kernel_init=init, bias_init=init)

    def __call__(self, images, *, noise=None, train=False, everything=False) -> methods.Output:
        """See `methods.Method`. noise: float (B, units)."""
        a = self.encoder_arch
        if noise is None:
            units = (a.grid[0] // self.mask_unit) * (a.grid[1] // self.mask_unit)
            noise = jax.random.uniform(self.make_rng('mask'), (images.shape[0], units))
        mask = masking.unit_masking(noise, a.grid, self.mask_unit, self.mask_ratio).mask
        encoded = self.encoder(images, mask=mask, train=train, everything=everything)
        predictions = self.head(encoded.tokens[:, a.num_prefix :])
        target = losses.patchify(images.astype(jnp.float32), a.patch_size)
        loss = losses.masked_l1(predictions, target, mask)
        return methods.Output({'reconstruction': loss}, predictions, target, mask, encoded.stats, encoded.embedded)

    def encode(self, images, depth=None):
        return self.encoder(images, depth=depth).tokens


def build(config) -> SimMIM:
    """SimMIM from `config.model`, `config.simmim`, `config.mto` and `config.data`."""
    arch, unit = methods.architecture(config), config.simmim.mask_unit
    if arch.grid[0] % unit or arch.grid[1] % unit:
        raise ValueError(f'simmim.mask_unit is {unit} patches; it must divide the grid of {arch.grid} patches')
    units = arch.num_patches // unit**2
    masked = masking.num_masked_units(arch.grid, unit, config.mask_ratio)
    if not 1 <= masked < units:
        raise ValueError(
            f'mask_ratio is {config.mask_ratio}: {masked} of {units} units are hidden; 1 to {units - 1} must'
        )
    return SimMIM(arch, methods.mto_settings(config, arch.depth), config.mask_ratio, unit)
