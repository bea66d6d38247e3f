"""ConMIM: "Masked Image Modeling with Denoising Contrast" (arXiv 2205.09616), after TencentARC/ConMIM.

The official code also holds a prediction head for visual words that no loss reads; it is left out here.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods
from mto_jax.data import augment
from mto_jax.models import vit
from mto_jax.models.layers import RUNNING_RATE, BatchNorm
from mto_jax.runtime import parallel


@dataclasses.dataclass(frozen=True)
class ConMIM(methods.Method):
    """An encoder with mask tokens and a projector. Each hidden patch must find itself among the patches of its image,
    as a momentum copy of both embeds them from an augmented view without masks.

    The copy stays in training mode: its batch normalisation uses the statistics of its own batch.

    Attributes:
      mask_ratio: fraction of hidden units, rounded up to full units.
      mask_unit: side of a masked unit in patches.
      hidden, out: widths of the projector.
      group: images over which batch normalisation takes its statistics: consecutive ones of a microbatch. For the
        diagnosis, all images are one group.
      temperature: of the contrast.
      momentum: of the copy at the first step; it rises to 1 along half a cosine.
      strong: makes the copy's view.
    """

    mask_ratio: float
    mask_unit: int
    hidden: int
    out: int
    group: int
    temperature: float
    momentum: float
    strong: augment.Strong

    @property
    def views(self):
        return {'image': None, 'strong': self.strong}

    @property
    def tensor_axes(self):
        return (
            (r'.*/projector/linear0/kernel', 1),
            (r'.*/projector/norm0/(scale|bias)', 0),
            (r'.*/projector/linear\d/kernel', 0),
        )

    @property
    def encoder(self) -> vit.ViT:
        return vit.ViT(self.arch, methods.attends(self, self.arch))

    @property
    def projector(self) -> 'Projector':
        return Projector(self.hidden, self.out, self.arch)

    def init(self, key):
        a = self.arch
        keys = jax.random.split(key)
        images, mask = jnp.zeros((1, *a.image_size, a.channels)), jnp.zeros((1, a.num_patches), bool)
        tokens = jnp.zeros((1, a.num_prefix + a.num_patches, a.width))
        projector = self.projector.init(keys[1], tokens, 1)['params']
        params = {'encoder': self.encoder.init(keys[0], images, mask=mask)['params'], 'projector': projector}
        moments = jax.eval_shape(lambda: self.projector.apply({'params': projector}, tokens, 1)[1])
        running = jax.tree_util.tree_map_with_path(
            lambda path, s: jnp.full(s.shape, float(path[-1].key == 'var')),
            {'student': moments, 'teacher': moments},
        )
        return params, {'teacher': jax.tree.map(jnp.copy, params), 'running': running}

    def masks(self, key: jax.Array, count: int, noise: jax.Array | None = None) -> jax.Array:
        """Hidden patches of so many images, bool (B, N); of `noise` (B, units) instead of the key where given."""
        grid, unit = self.arch.grid, self.mask_unit
        if noise is None:
            noise = jax.random.uniform(key, (count, self.arch.num_patches // unit**2))
        return masking.unit_masking(noise, grid, unit, self.mask_ratio).mask

    def loss(self, params, model_state, views, key, clock, *, noise=None):
        mask_key, student_key, teacher_key = jax.random.split(key, 3)
        mask = self.masks(mask_key, len(views['image']), noise)
        encoded, queries, student = self._embed(params, views['image'], student_key, mask, clock.progress)
        _, keys, teacher = self._embed(model_state['teacher'], views['strong'], teacher_key)
        similarity = cosines(queries, keys)
        return methods.Result(
            {'contrast': contrast(similarity / self.temperature, mask)},
            {'encoder': methods.Stack(mask, encoded.embedded, encoded.stats, self.arch.depth)},
            logs={'matched': losses.masked_mean(similarity.argmax(-1) == jnp.arange(self.arch.num_patches), mask)},
            statistics={'student': student, 'teacher': teacher},
        )

    def _embed(self, params, images, key, mask=None, progress=None) -> tuple[vit.Encoded, jax.Array, Any]:
        """What the encoder returns; what the projector makes of its patch tokens (B, N, K); and its statistics."""
        train, rngs = not self.watch, {'dropout': key}
        inputs = {'mask': mask, 'train': train, 'progress': progress}
        encoded = self.encoder.apply({'params': params['encoder']}, images, **inputs, rngs=rngs)
        group = len(images) if self.watch else self.group
        projected, statistics = self.projector.apply({'params': params['projector']}, encoded.tokens, group)
        return encoded, projected[:, self.arch.num_prefix :], statistics

    def after_update(self, params, model_state, statistics, clock):
        rate = (1.0 - self.momentum) * jnp.square(jnp.cos(jnp.pi / 2 * clock.progress))
        return {
            'teacher': methods.moved(model_state['teacher'], params, rate),
            'running': methods.moved(model_state['running'], statistics, RUNNING_RATE),
        }

    def encode(self, params, images, *, depth=None, train=False, key=None):
        rngs = {'dropout': key} if train else {}
        return self.encoder.apply({'params': params['encoder']}, images, depth=depth, train=train, rngs=rngs).tokens

    def pictures(self, params, model_state, images, key, clock):
        """'matched' has in each hidden place the patch that the copy's embeddings match best there."""
        mask_key, student_key, teacher_key = jax.random.split(key, 3)
        mask = self.masks(mask_key, len(images))
        _, queries, _ = self._embed(params, images, student_key, mask, clock.progress)
        _, keys, _ = self._embed(model_state['teacher'], images, teacher_key)
        true, hidden = losses.patchify(images, self.arch.patch_size), mask[..., None]
        best = cosines(queries, keys).argmax(-1)[..., None]
        shown = {'original': true, 'masked': jnp.where(hidden, jnp.nan, true)}
        shown['matched'] = jnp.where(hidden, jnp.take_along_axis(true, best, 1), true)
        return {n: losses.unpatchify(p, self.arch.grid, self.arch.patch_size) for n, p in shown.items()}


class Projector(nn.Module):
    """Three linear layers without biases, each before a batch normalisation, the first two of these before a ReLU.

    Attributes:
      hidden, out: widths.
      arch: of the encoder, for initial values and the dtype of matrix products.
    """

    hidden: int
    out: int
    arch: vit.Architecture

    @nn.compact
    def __call__(self, x: jax.Array, group: int) -> tuple[jax.Array, Any]:
        """Tokens (B, T, D) to float32 (B, T, out), and {norm: {'mean', 'var'}} of the batch."""
        a, statistics = self.arch, {}
        x = parallel.constrain_batch(x)
        for i, width in enumerate((self.hidden, self.hidden, self.out)):
            name, inner = f'norm{i}', i < 2
            dense = nn.Dense(width, use_bias=False, dtype=a.dtype, kernel_init=a.weight_init, name=f'linear{i}')
            x, statistics[name] = BatchNorm(affine=inner, name=name)(dense(x), group)
            x = nn.relu(x) if inner else x
        return x, statistics


def cosines(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Cosine similarity (B, N, M) of queries (B, N, K) and keys (B, M, K), float32."""

    def unit(x):
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))

    return jnp.einsum('bnk,bmk->bnm', unit(queries), unit(keys), precision='highest')


def contrast(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Cross-entropy of each hidden patch's own position: logits (B, N, N), over the hidden patches of mask (B, N)."""
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    return losses.masked_mean(jax.nn.logsumexp(logits, axis=-1) - own, mask)


def build(config) -> ConMIM:
    """ConMIM from `config.model`, `config.conmim`, `config.mto` and `config.data`."""
    c, arch = config.conmim, methods.architecture(config)
    methods.check_units(arch.grid, 'conmim.mask_unit', c.mask_unit, config.mask_ratio)
    microbatch = config.batch_size // config.accumulate
    if not microbatch or microbatch % c.group:
        raise ValueError(
            f'conmim.group is {c.group} images; it must divide the {microbatch} images of a microbatch '
            '(batch_size / accumulate)'
        )
    fields = ('mask_unit', 'hidden', 'out', 'group', 'temperature', 'momentum')
    return ConMIM(
        arch,
        methods.mto_settings(config, arch.depth),
        config.mask_ratio,
        **{name: c[name] for name in fields},
        strong=augment.Strong(blur_radius=tuple(c.blur_radius)),
    )
