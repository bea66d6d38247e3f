"""BootMAE: "Bootstrapped Masked Autoencoders" (arXiv 2207.07116), after LightDXY/BootMAE."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods, mto
from mto_jax.attention import Attend, Conditioning
from mto_jax.models import position, vit
from mto_jax.models.layers import layer_norm

EPS = 1e-5  # of the pixel target's variance


@dataclasses.dataclass(frozen=True)
class BootMAE(methods.SingleModule):
    """An encoder of the visible patches and two light decoders with mask tokens: one predicts pixels, the other the
    features that a teacher, a moving average of the encoder, has of the full image.

    Visible patches and the class token also reach the decoders by cross-attention: the output of the encoder's first
    block goes to the regressor of pixels, that of its last block to the predictor of features.

    Attributes:
      regressor, predictor: architectures of the decoders, the two stacks that carry mask tokens.
      mask_ratio: fraction of hidden patches.
      blocks: that hide most of them.
      norm_pix_loss: normalise each colour of each target patch by its own mean and standard deviation.
      weight_patches: weight hidden patches by how many of their neighbours are hidden.
      feature_weight: final weight of the feature loss.
      feature_warmup: fraction of the epochs over which it grows from 0, once per epoch.
      ema_milestones, ema_rates: by how much the teacher moves towards the encoder after each update; it changes once
        per epoch, linearly between these fractions of the epochs.
    """

    regressor: vit.Architecture
    predictor: vit.Architecture
    mask_ratio: float
    blocks: masking.Blocks
    norm_pix_loss: bool
    weight_patches: bool
    feature_weight: float
    feature_warmup: float
    ema_milestones: tuple[float, ...]
    ema_rates: tuple[float, ...]

    module = property(lambda self: Bootstrapped(self))

    @property
    def tensor_axes(self):
        return ((r'.*/(regressor|predictor)/embed/kernel', None),)

    def init(self, key):
        params, _ = super().init(key)
        return params, {'teacher': {'encoder': jax.tree.map(jnp.copy, params['encoder'])}}

    def loss(self, params, model_state, views, key, clock, *, noise=None):
        images = views['image']
        target = self.encode(model_state['teacher'], images, depth=self.arch.depth)[:, self.arch.num_prefix :]
        result = self._apply(params, images, key, noise, train=not self.watch, progress=clock.progress, target=target)
        warmup = self.feature_warmup * clock.total / clock.steps_per_epoch
        weight = self.feature_weight * jnp.minimum(1.0, (clock.epoch + 1) / warmup)
        return result.replace(weights={'features': weight}, logs={'feature_weight': weight})

    def after_update(self, params, model_state, statistics, clock):
        milestones = jnp.array(self.ema_milestones) * (clock.total / clock.steps_per_epoch)
        rate = jnp.interp(clock.epoch, milestones, jnp.array(self.ema_rates))
        return {'teacher': methods.moved(model_state['teacher'], {'encoder': params['encoder']}, rate)}


class Decoder(nn.Module):
    """Tokens of the visible patches to tokens of all patches."""

    arch: vit.Architecture
    attends: tuple[Attend | None, ...] | None

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array, masks: masking.Masks, train: bool, progress: jax.Array | None):
        """x and memory (B, P + K, encoder width) to (B, N, D) after the norm, and the mask-bearing stack."""
        a = self.arch
        x = nn.Dense(a.width, dtype=a.dtype, kernel_init=a.weight_init, name='embed')(x)
        prefix, visible = x[:, : a.num_prefix], x[:, a.num_prefix :]
        patches = masking.restore(visible, vit.mask_token(self), masks)
        embedded = jnp.concatenate([prefix, patches], axis=1)
        masked = vit.prefix_false(masks.mask, a.num_prefix)
        positions = jnp.pad(position.sincos_2d(a.grid, a.width, rows_first=True), ((a.num_prefix, 0), (0, 0)))
        # Visible tokens have theirs from the encoder.
        x = embedded.astype(a.stream_dtype) + jnp.where(masked[..., None], positions, 0).astype(a.stream_dtype)
        seen = Conditioning(masked=masked, tokens=embedded, progress=progress, memory=memory)
        out = vit.Transformer(a, self.attends, name='blocks')(x, seen, train=train)
        x = layer_norm('norm', a.norm_eps)(out.tokens[:, a.num_prefix :]).astype(a.dtype)
        return x, methods.Stack(masks.mask, patches, out.stats, a.depth)


class PixelHead(nn.Module):
    """Tokens to the pixels of their patches: officially a transposed convolution, so that each colour has one bias."""

    arch: vit.Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.arch
        pixels = a.patch_size**2
        init = vit.torch_default_bias(pixels * a.channels)
        x = nn.Dense(pixels * a.channels, use_bias=False, dtype=a.dtype, kernel_init=init, name='proj')(x)
        return x + jnp.tile(self.param('bias', init, (a.channels,)), pixels).astype(a.dtype)


class Bootstrapped(nn.Module):
    """BootMAE's encoder and decoders."""

    method: BootMAE

    def setup(self):
        m, a = self.method, self.method.arch
        self.encoder = vit.ViT(a, taps=(0, a.depth - 1))
        self.regressor = Decoder(m.regressor, methods.attends(m, m.regressor))
        self.predictor = Decoder(m.predictor, methods.attends(m, m.predictor))
        self.pixel_head = PixelHead(a)
        self.feature_head = nn.Dense(a.width, dtype=a.dtype, kernel_init=a.weight_init)

    def __call__(self, images, *, noise, train, progress=None, target=None):
        """See `methods.SingleModule`.

        Args:
          noise: a `masking.BlockNoise`.
          target: the teacher's tokens (B, N, D) before the final norm; without them there is no feature loss.
        """
        m, a = self.method, self.method.arch
        if noise is None:
            noise = masking.block_noise(self.make_rng('mask'), images.shape[0], a.num_patches)
        masks = masking.block_masking(noise, a.grid, m.blocks, m.mask_ratio)
        encoded = self.encoder(images, ids_keep=masks.ids_keep, train=train)
        pixels, regressor = self.regressor(encoded.tokens, encoded.taps[0], masks, train, progress)
        features, predictor = self.predictor(encoded.tokens, encoded.taps[a.depth - 1], masks, train, progress)
        predictions, features = self.pixel_head(pixels), self.feature_head(features)
        weights = patch_weights(masks.mask, a.grid) if m.weight_patches else 1.0

        def loss(predicted, true):
            error = jnp.square(predicted.astype(jnp.float32) - true).mean(-1)
            return losses.masked_mean(weights * error, masks.mask)

        patches = losses.patchify(images.astype(jnp.float32), a.patch_size)
        mean, std = self.moments(patches)
        terms = {'reconstruction': loss(predictions, (patches - mean) / std)}
        if target is not None:
            terms['features'] = loss(mto.layer_norm(features), mto.layer_norm(target))
        stacks = {'regressor': regressor, 'predictor': predictor}
        return methods.Result(terms, stacks, predictions=predictions, mask=masks.mask)

    def encode(self, images, depth, train):
        return self.encoder(images, depth=depth, train=train).tokens

    def to_pixels(self, result, images):
        """Undo the target's normalisation with each true patch's own statistics, which the loss never sees."""
        mean, std = self.moments(losses.patchify(images, self.method.arch.patch_size))
        return result.predictions.astype(jnp.float32) * std + mean

    def moments(self, patches):
        """What is subtracted from the target patches, and what they are then divided by."""
        return colour_moments(patches, self.method.arch.channels) if self.method.norm_pix_loss else (0.0, 1.0)


def colour_moments(patches: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each colour of each patch (B, N, p * p * C), in that shape.

    The variance is the biased one plus 1e-5, unlike that of `losses.patch_moments`.
    """
    pixels = patches.reshape(*patches.shape[:2], -1, channels)
    mean, std = pixels.mean(2), jnp.sqrt(pixels.var(2) + EPS)
    return tuple(jnp.tile(x, pixels.shape[2]) for x in (mean, std))


def patch_weights(mask: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Weight of each patch (B, N): 0 where visible, else 1 plus the fraction of hidden ones among the 3 x 3 around it.

    What lies outside the image counts as visible.
    """
    hidden = mask.reshape(-1, *grid).astype(jnp.float32)
    around = jax.lax.reduce_window(hidden, 0.0, jax.lax.add, (1, 3, 3), (1, 1, 1), 'SAME') / 9
    return (hidden * (1 + around)).reshape(mask.shape)


def build(config) -> BootMAE:
    """BootMAE from `config.model`, `config.bootmae`, `config.mto` and `config.data`."""
    encoder, c = methods.architecture(config), config.bootmae
    head_width = c.decoder_width // encoder.heads
    if not head_width:
        raise ValueError(f'bootmae.decoder_width is {c.decoder_width}; it must be at least the {encoder.heads} heads')
    hidden = encoder.num_patches - methods.check_visible(config, encoder)
    if c.block_patches > hidden:
        raise ValueError(f'bootmae.block_patches is {c.block_patches}; it must be at most the {hidden} hidden patches')
    room = (encoder.grid[0] - 1) * (encoder.grid[1] - 1)  # a block leaves a row and a column free
    if c.block_area[0] > min(room, c.block_patches):
        raise ValueError(
            f'bootmae.block_area begins at {c.block_area[0]}; it must be at most bootmae.block_patches '
            f'({c.block_patches}) and the {room} patches of the largest block that moves in the grid of {encoder.grid}'
        )
    if c.decoder_width % 4 or encoder.width % 4:
        raise ValueError(
            f'bootmae.decoder_width is {c.decoder_width} and the encoder {encoder.width} wide; sine-cosine positions '
            'need multiples of 4'
        )
    if len(c.ema_milestones) != len(c.ema_rates) or list(c.ema_milestones) != sorted(c.ema_milestones):
        raise ValueError(
            f'bootmae.ema_milestones is {c.ema_milestones}; it must ascend, with one for each of bootmae.ema_rates '
            f'{c.ema_rates}'
        )
    predictor = dataclasses.replace(encoder, depth=c.decoder_depth, drop_path=0.0)
    regressor = dataclasses.replace(
        predictor,
        width=c.decoder_width,
        head_width=head_width,
        attention='' if head_width % 8 else encoder.attention,  # kernels want multiples of 8
    )
    return BootMAE(
        encoder,
        methods.mto_settings(config, c.decoder_depth),
        regressor,
        predictor,
        config.mask_ratio,
        masking.Blocks(c.block_patches, *c.block_area, c.block_aspect),
        c.norm_pix_loss,
        c.weight_patches,
        c.feature_weight,
        c.feature_warmup,
        tuple(c.ema_milestones),
        tuple(c.ema_rates),
    )
