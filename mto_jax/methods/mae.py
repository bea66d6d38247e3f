"""MAE: "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), after facebookresearch/mae."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods
from mto_jax.attention import Attend, Conditioning
from mto_jax.models import position, vit
from mto_jax.models.layers import flat_xavier, layer_norm


@dataclasses.dataclass(frozen=True)
class MAE(methods.SingleModule):
    """An encoder of the visible patches, and a light decoder in which mask tokens stand for the others.

    Attributes:
      decoder: architecture of the decoder, the stack that carries the mask tokens.
      mask_ratio: fraction of hidden patches.
      norm_pix_loss: normalise each target patch by its own mean and standard deviation.
    """

    decoder: vit.Architecture
    mask_ratio: float
    norm_pix_loss: bool

    module = property(lambda self: Autoencoder(self))


class Decoder(nn.Module):
    """Tokens of the visible patches to predicted values of all patches."""

    arch: vit.Architecture
    attends: tuple[Attend | None, ...] | None

    @nn.compact
    def __call__(self, x: jax.Array, masks: masking.Masks, outputs: int, train: bool, progress: jax.Array | None):
        """x (B, P + K, encoder width) to predictions (B, N, outputs) and the mask-bearing stack."""
        a = self.arch
        x = nn.Dense(a.width, dtype=a.dtype, kernel_init=flat_xavier, name='embed')(x)
        token = vit.mask_token(self)
        prefix, visible = x[:, : a.num_prefix], x[:, a.num_prefix :]
        patches = masking.restore(visible, token, masks)
        embedded = jnp.concatenate([prefix, patches], axis=1)
        positions = jnp.pad(position.sincos_2d(a.grid, a.width), ((a.num_prefix, 0), (0, 0)))
        masked = vit.prefix_false(masks.mask, a.num_prefix)
        seen = Conditioning(masked=masked, tokens=embedded, progress=progress)
        x = embedded.astype(a.stream_dtype) + positions.astype(a.stream_dtype)
        out = vit.Transformer(a, self.attends, name='blocks')(x, seen, train=train)
        x = layer_norm('norm', a.norm_eps)(out.tokens).astype(a.dtype)
        x = nn.Dense(outputs, dtype=a.dtype, kernel_init=flat_xavier, name='pred')(x[:, a.num_prefix :])
        return x, methods.Stack(masks.mask, patches, out.stats, a.depth)


class Autoencoder(nn.Module):
    """MAE's two stacks."""

    method: MAE

    def setup(self):
        m = self.method
        self.encoder = vit.ViT(m.arch)
        self.decoder = Decoder(m.decoder, methods.attends(m, m.decoder))

    def __call__(self, images, *, noise, train, progress=None):
        """See `methods.SingleModule`. noise: float (B, N)."""
        m, a = self.method, self.method.arch
        if noise is None:
            noise = jax.random.uniform(self.make_rng('mask'), (images.shape[0], a.num_patches))
        masks = masking.random_masking(noise, m.mask_ratio)
        target = losses.patchify(images.astype(jnp.float32), a.patch_size)
        if m.norm_pix_loss:
            target = losses.normalize_patches(target)
        encoded = self.encoder(images, ids_keep=masks.ids_keep, train=train)
        predictions, stack = self.decoder(encoded.tokens, masks, target.shape[-1], train, progress)
        loss = losses.masked_mse(predictions, target, masks.mask)
        return methods.Result({'reconstruction': loss}, {'decoder': stack}, predictions=predictions, mask=masks.mask)

    def encode(self, images, depth, train):
        return self.encoder(images, depth=depth, train=train).tokens

    def to_pixels(self, result, images):
        """Undo the target's normalisation with each true patch's own statistics, which the loss never sees."""
        predictions = result.predictions.astype(jnp.float32)
        if not self.method.norm_pix_loss:
            return predictions
        mean, std = losses.patch_moments(losses.patchify(images, self.method.arch.patch_size))
        return predictions * std + mean


def build(config) -> MAE:
    """MAE from `config.model`, `config.mae`, `config.mto` and `config.data`."""
    encoder = methods.architecture(config)
    c = config.mae
    decoder = dataclasses.replace(
        encoder, depth=c.decoder_depth, width=c.decoder_width, heads=c.decoder_heads, drop_path=0.0
    )
    methods.check_visible(config, encoder)
    settings = methods.mto_settings(config, decoder.depth)
    return MAE(encoder, settings, decoder, config.mask_ratio, c.norm_pix_loss)
