"""MAE: "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), after facebookresearch/mae."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods, mto
from mto_jax.models import position, vit
from mto_jax.models.layers import flat_xavier, layer_norm


class Decoder(nn.Module):
    """Tokens of the visible patches to predicted values of all patches. This stack carries the mask tokens."""

    arch: vit.Architecture
    settings: mto.Settings | None

    @nn.compact
    def __call__(self, x: jax.Array, masks: masking.Masks, outputs: int, train: bool, everything: bool):
        """x (B, P + K, encoder width) to predictions (B, N, outputs), the blocks' output and the embedded tokens."""
        a = self.arch
        x = nn.Dense(a.width, dtype=a.dtype, kernel_init=flat_xavier, name='embed')(x)
        token = vit.mask_token(self)
        prefix, visible = x[:, : a.num_prefix], x[:, a.num_prefix :]
        hidden = jnp.broadcast_to(token, (x.shape[0], a.num_patches - visible.shape[1], a.width))
        patches = jnp.concatenate([visible, hidden], axis=1)
        patches = jnp.take_along_axis(patches, masks.ids_restore[..., None], axis=1)
        embedded = jnp.concatenate([prefix, patches], axis=1)
        positions = jnp.pad(position.sincos_2d(a.grid, a.width), ((a.num_prefix, 0), (0, 0)))
        out = vit.Transformer(a, self.settings, name='blocks')(
            embedded + positions.astype(a.dtype),
            masked=vit.prefix_false(masks.mask, a.num_prefix),
            embedded=embedded,
            train=train,
            everything=everything,
        )
        x = layer_norm('norm')(out.tokens).astype(a.dtype)
        x = nn.Dense(outputs, dtype=a.dtype, kernel_init=flat_xavier, name='pred')(x[:, a.num_prefix :])
        return x, out, patches


class MAE(methods.Method):
    """An encoder of the visible patches, and a light decoder in which mask tokens stand for the others.

    Attributes:
      encoder_arch, decoder_arch: of the two stacks.
      mto_settings: MTO's settings for the decoder, or None.
      mask_ratio: share of hidden patches.
      norm_pix_loss: normalise each target patch by its own mean and standard deviation.
    """

    encoder_arch: vit.Architecture
    decoder_arch: vit.Architecture
    mto_settings: mto.Settings | None
    mask_ratio: float
    norm_pix_loss: bool

    arch = property(lambda self: self.encoder_arch)
    settings = property(lambda self: self.mto_settings)
    mask_depth = property(lambda self: self.decoder_arch.depth)

    def setup(self):
        self.encoder = vit.ViT(self.encoder_arch)
        self.decoder = Decoder(self.decoder_arch, self.mto_settings)

    def __call__(self, images, *, noise=None, train=False, everything=False) -> methods.Output:
        """See `methods.Method`. noise: float (B, N)."""
        a = self.encoder_arch
        if noise is None:
            noise = jax.random.uniform(self.make_rng('mask'), (images.shape[0], a.num_patches))
        masks = masking.random_masking(noise, self.mask_ratio)
        target = losses.patchify(images.astype(jnp.float32), a.patch_size)
        if self.norm_pix_loss:
            target = losses.normalize_patches(target)
        encoded = self.encoder(images, ids_keep=masks.ids_keep, train=train)
        predictions, out, embedded = self.decoder(encoded.tokens, masks, target.shape[-1], train, everything)
        loss = losses.masked_mse(predictions, target, masks.mask)
        return methods.Output({'reconstruction': loss}, predictions, target, masks.mask, out.stats, embedded)

    def encode(self, images, depth=None):
        return self.encoder(images, depth=depth).tokens

    def to_pixels(self, output, images):
        """Undo the target's normalisation with each true patch's own statistics, which the loss never sees."""
        predictions = output.predictions.astype(jnp.float32)
        if not self.norm_pix_loss:
            return predictions
        mean, std = losses.patch_moments(losses.patchify(images, self.encoder_arch.patch_size))
        return predictions * std + mean


def build(config) -> MAE:
    """MAE from `config.model`, `config.mae`, `config.mto` and `config.data`."""
    encoder = methods.architecture(config)
    c = config.mae
    decoder = dataclasses.replace(
        encoder,
        depth=c.decoder_depth,
        width=c.decoder_width,
        heads=c.decoder_heads,
        drop_path=0.0,
        position='sincos',  # of the decoder, whatever the encoder's are
    )
    keep = masking.num_visible(encoder.num_patches, config.mask_ratio)
    if not 2 <= keep < encoder.num_patches:
        raise ValueError(
            f'mask_ratio is {config.mask_ratio}: of {encoder.num_patches} patches {keep} stay visible; '
            f'2 to {encoder.num_patches - 1} must'
        )
    settings = methods.mto_settings(config, decoder.depth)
    return MAE(encoder, decoder, settings, config.mask_ratio, c.norm_pix_loss)
