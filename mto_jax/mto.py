"""Masked token optimization (MTO): weight recalibration, heterogeneity, and its three losses.

Source of the idea: "Emerging Property of Masked Token for Effective Pre-training" (arXiv 2404.08330, ECCV 2024).
Its equations were not available to us: every formula here is this project's own reading of the abstract and of
published summaries (docs/method.md keeps the two apart). Everything is a pure function on arrays and knows no model.

Notation: B images, h heads, N tokens of which the first P are prefix (class) tokens, L blocks of the stack that carries
masked tokens. `masked` is bool (B, N), False for prefix tokens: they count as visible in the attention terms and belong
to neither set in the token terms. `logits` (B, h, N, N) are scaled dot products before any bias and before
recalibration, query axis before key axis. Statistics are float32, in logsumexp form, whatever the input's dtype.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mto_jax import attention

PER_TOKEN = ('adaptive', 'threshold', 'rank')  # schedules whose gate depends on each masked token
SCHEDULES = ('none', 'exclude', 'ramp', *PER_TOKEN)
AFFINITIES = ('attention', 'attention_mean', 'token', 'gram', 'gram_positions')
MEASURES = ('entropy', 'density')
SPA_FORMS = ('mass', 'mass+visible_entropy', 'row_entropy', 'mass+row_entropy')
DEPTHS = {  # weight of L_spa in block b of L
    'falling': lambda b, depth: 1.0 - b / max(depth - 1, 1),
    'equal': lambda b, depth: 1.0,
    'rising': lambda b, depth: b / max(depth - 1, 1),
}
TERMS = ('spa', 'e', 'r')
ROWS = ('visible', 'all')
# Below this weight a masked key is removed by a mask: its logarithm would only lose precision.
MIN_GATE = 1e-4
LN_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every choice of MTO. Hashable, so that it can be a static field of a model.

    Attributes:
      recalibration: schedule of the weight g of masked keys in visible rows: 'none'; 'exclude' (0 in the first
        `exclude_blocks`, then 1); 'ramp' (l / (L - 1)); and by the heterogeneity of each masked token: 'adaptive' (1
        minus it), 'threshold' (0 above `exclude_above`) or 'rank' (0 for the `exclude_fraction` with the highest).
      rows: the queries that recalibration acts on: 'visible' ones, or 'all', so that masked tokens too read visible
        keys alone where masked keys are excluded.
      exclude_blocks: how many blocks 'exclude' covers; 0 for K, -1 for all of them.
      exclude_above: the threshold of 'threshold'.
      exclude_fraction: of an image's masked tokens, for 'rank'.
      open_until: fraction of the training by which all gates have opened, linearly, to 1; 0: they never open.
      initial_blocks: K, how many blocks count as initial; 0 for max(1, round(L / 4)), -1 for all of them.
      blocks: the blocks the losses read; empty for all.
      affinity: what heterogeneity's entropy is taken of in the losses and the gates of single tokens: 'attention'
        logits per head, their mean over heads ('attention_mean'), 'token' products, or plain products of tokens
        without a norm or a scale, at the first block before positions are added ('gram') or after ('gram_positions').
        What is shown is always per head (`diagnosis`).
      measure: what L_e uses: 'entropy' or 'density'.
      scale_guard: divide attention logits by the (constant) standard deviation of the visible queries' own, so that
        smaller query and key weights alone do not raise the entropy.
      stop_keys: stop the gradient of heterogeneity into the visible keys.
      stop_previous: L_r's constant is the heterogeneity of the block before, so that it cannot be raised instead.
      margin: drop in heterogeneity that L_r asks of each block; at most 0.5 / (L - K).
      w_spa, w_e, w_r: weights of L_spa, L_e, L_r; 0 turns a term off.
      spa_form: what L_spa is of a visible query's row: 'mass', minus the log of what it keeps on visible keys;
        'mass+visible_entropy', plus its entropy over the visible keys; 'row_entropy', its entropy over all keys;
        'mass+row_entropy', both.
      spa_depth: how L_spa's weight changes with depth: 'falling' to 0 in the last block, 'equal', or 'rising' from 0.
      warmup: fraction of the training over which the three weights grow linearly from 0.
      fade: the terms, of 'spa', 'e' and 'r', whose weights fall linearly to 0.
      fade_until: fraction of the training at which they are 0.
    """

    recalibration: str = 'none'
    rows: str = 'visible'
    exclude_blocks: int = 0
    exclude_above: float = 0.5
    exclude_fraction: float = 0.5
    open_until: float = 0.0
    initial_blocks: int = 0
    blocks: tuple[int, ...] = ()
    affinity: str = 'attention'
    measure: str = 'entropy'
    scale_guard: bool = False
    stop_keys: bool = False
    stop_previous: bool = True
    margin: float = 0.02
    w_spa: float = 0.0
    w_e: float = 0.0
    w_r: float = 0.0
    spa_form: str = 'mass'
    spa_depth: str = 'falling'
    warmup: float = 0.05
    fade: tuple[str, ...] = ()
    fade_until: float = 1.0

    def __post_init__(self):
        for field, value, allowed in (
            ('recalibration', self.recalibration, SCHEDULES),
            ('rows', self.rows, ROWS),
            ('affinity', self.affinity, AFFINITIES),
            ('measure', self.measure, MEASURES),
            ('spa_form', self.spa_form, SPA_FORMS),
            ('spa_depth', self.spa_depth, DEPTHS),
            *(('fade', term, TERMS) for term in self.fade),
        ):
            if value not in allowed:
                raise ValueError(f'mto.{field} is {value!r}; it must be one of {", ".join(allowed)}')
        for field in ('w_spa', 'w_e', 'w_r', 'margin'):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f'mto.{field} is {getattr(self, field)}; it must be finite and not negative')
        if not 0 <= self.warmup < 1:
            raise ValueError(f'mto.warmup is {self.warmup}; it must be a fraction of the training, in [0, 1)')
        for field in ('exclude_above', 'exclude_fraction', 'open_until', 'fade_until'):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f'mto.{field} is {getattr(self, field)}; it must be in [0, 1]')
        if not self.fade_until:
            raise ValueError('mto.fade_until is 0; it must be above 0: for terms that are off set their weights to 0')
        for field in ('exclude_blocks', 'initial_blocks'):
            if getattr(self, field) < -1:
                raise ValueError(f'mto.{field} is {getattr(self, field)}; it must be -1, 0 or a count')

    def validate(self, depth: int) -> None:
        """Raise ValueError where the settings do not fit a stack of `depth` blocks."""
        k = self.num_initial(depth)
        for field in ('exclude_blocks', 'initial_blocks'):
            if getattr(self, field) > depth:
                raise ValueError(f'mto.{field} is {getattr(self, field)} but the stack has {depth} blocks')
        if any(not 0 <= b < depth for b in self.blocks):
            raise ValueError(f'mto.blocks is {self.blocks}; the stack has blocks 0 to {depth - 1}')
        if self.w_r and k < depth and self.margin > 0.5 / (depth - k):
            raise ValueError(
                f'mto.margin is {self.margin}; with {depth} blocks of which {k} are initial it is at most '
                f'{0.5 / (depth - k):.4g}'
            )
        read = self.loss_blocks(depth)
        if self.w_e and not any(b < k for b in read):
            raise ValueError(f'mto.w_e is {self.w_e} but mto.blocks {self.blocks} has no block below {k}')
        if self.w_r and not any(b >= k for b in read[1:]):
            raise ValueError(f'mto.w_r is {self.w_r} but no block of mto.blocks follows another from {k} on')

    @property
    def has_losses(self) -> bool:
        return bool(self.w_spa or self.w_e or self.w_r)

    def num_initial(self, depth: int) -> int:
        """K, the number of initial blocks in a stack of `depth`."""
        if self.initial_blocks == -1:
            return depth
        return self.initial_blocks or max(1, round(depth / 4))

    def loss_blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks whose statistics enter a loss, ascending. Blocks that no active term uses are left out."""
        if not self.has_losses:
            return ()
        named = tuple(sorted(set(self.blocks))) or tuple(range(depth))
        if self.w_spa or self.w_r:
            return named
        return tuple(b for b in named if b < self.num_initial(depth))

    def attend(
        self, block: int, depth: int, num_prefix: int, watch: bool = False, implementation: str = ''
    ) -> 'MaskedAttention | None':
        """What one block does with its queries, keys and values, or None where that is plain attention.

        Args:
          block: index of the block, from 0.
          depth: number of blocks in the stack.
          num_prefix: P, the number of prefix tokens.
          watch: return `diagnosis` instead of the statistics that the losses need.
          implementation: of the attention, as for `attention.kernel`.
        """
        excluded = depth if self.exclude_blocks == -1 else self.exclude_blocks or self.num_initial(depth)
        gate = gates(self.recalibration, depth, excluded)[block]
        per_token = self.recalibration in PER_TOKEN
        read = block in self.loss_blocks(depth)
        if not (read or watch or per_token) and gate == 1.0:
            return None
        return MaskedAttention(self, None if per_token else float(gate), num_prefix, read, watch, implementation)


def attends(
    settings: Settings | None, depth: int, num_prefix: int, watch: bool = False, implementation: str = ''
) -> tuple['MaskedAttention | None', ...] | None:
    """`Settings.attend` of every block of a stack; None where all of them are plain attention.

    Args:
      settings: None where MTO is off.
      depth, num_prefix, watch, implementation: as there.
    """
    if settings is None and not watch:
        return None
    found = tuple((settings or Settings()).attend(b, depth, num_prefix, watch, implementation) for b in range(depth))
    return found if any(found) else None


def gates(schedule: str, depth: int, excluded: int) -> np.ndarray:
    """The weight g of masked keys per block, float (L,); ones where it depends on the data (`token_gates`)."""
    layers = np.arange(depth)
    if schedule == 'exclude':
        return (layers >= excluded).astype(float)
    if schedule == 'ramp':
        return layers / max(depth - 1, 1)
    return np.ones(depth)


def token_gates(settings: Settings, het: jax.Array, masked: jax.Array) -> jax.Array:
    """The weight g of each masked key by its own heterogeneity: float32 (B, N), anything where nothing is masked.

    Of 'rank' the tokens that are as heterogeneous as one that is excluded are too.

    Args:
      settings: whose `recalibration` is one of PER_TOKEN.
      het: float32 (B, N), as `heterogeneity` returns it per token.
      masked: bool (B, N).
    """
    if settings.recalibration == 'adaptive':
        return jnp.clip(1.0 - het, 0.0, 1.0)
    if settings.recalibration == 'threshold':
        return (het <= settings.exclude_above).astype(jnp.float32)
    higher = (masked[:, None, :] & (het[:, None, :] > het[:, :, None])).sum(-1)
    return (higher >= settings.exclude_fraction * masked.sum(-1, keepdims=True)).astype(jnp.float32)


def recalibrate(logits: jax.Array, masked: jax.Array, gate: float | jax.Array, rows: str = 'visible') -> jax.Array:
    """Multiply the attention weight of masked keys in visible rows by `gate`, before the softmax renormalises it.

    Args:
      logits: (B, h, N, N), relative-position bias included.
      masked: bool (B, N).
      gate: g in [0, 1], a number or one value per key, (B, N). At most 1e-4 removes the key.
      rows: 'all' treats masked rows as the visible ones.

    Returns:
      float32 logits of the same shape; masked rows are untouched unless rows is 'all'.
    """
    shift = _log_gate(gate, masked, jnp.finfo(jnp.float32).min)
    removed = shift == jnp.finfo(jnp.float32).min
    pairs = masked[:, None, None, :]
    if rows == 'visible':
        pairs = pairs & ~masked[:, None, :, None]
    logits = logits.astype(jnp.float32)
    # A minimum, not a sum, where a key is removed: a sum could overflow to -inf.
    return jnp.where(
        pairs,
        jnp.where(removed[:, None, None, :], jnp.finfo(jnp.float32).min, logits + shift[:, None, None, :]),
        logits,
    )


def _log_gate(gate: float | jax.Array, masked: jax.Array, removed: float) -> jax.Array:
    """The logarithm of a gate, float32 (B, N); `removed` where the gate is too small to be one."""
    gate = jnp.broadcast_to(jnp.asarray(gate, jnp.float32), masked.shape)
    return jnp.where(gate <= MIN_GATE, removed, jnp.log(jnp.maximum(gate, MIN_GATE)))


def recalibrating_shift(
    masked: jax.Array, gate: float | jax.Array, rows: str = 'visible'
) -> tuple[jax.Array, jax.Array]:
    """`recalibrate` as a shift of the logits, for `attention.fused`: float32 (B, N) of queries and of keys.

    Args:
      masked, gate, rows: as there.
    """
    on_keys = jnp.where(masked, _log_gate(gate, masked, attention.REMOVED), 0.0)
    return jnp.ones_like(on_keys) if rows == 'all' else (~masked).astype(jnp.float32), on_keys


def _mean_over(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """Per-image mean (B,) of values (B, ..., N) over the chosen (B, N) entries of the last axis and all middle ones."""
    chosen = jnp.broadcast_to(chosen.reshape(chosen.shape[0], *[1] * (values.ndim - 2), chosen.shape[1]), values.shape)
    axes = tuple(range(1, values.ndim))
    return jnp.where(chosen, values, 0.0).sum(axes) / chosen.sum(axes)


def _logsumexp(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """logsumexp of logits (B, ..., N, N) over the chosen keys (B, N)."""
    keys = keys.reshape(keys.shape[0], *[1] * (logits.ndim - 2), keys.shape[1])
    return jax.nn.logsumexp(jnp.where(keys, logits, -jnp.inf), axis=-1)


def _entropy(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Entropy (B, ..., N) in nats of softmax(logits) over the chosen keys (B, N): logsumexp(s) - sum p s."""
    keys = keys.reshape(keys.shape[0], *[1] * (logits.ndim - 2), keys.shape[1])
    # Shifting by the row's constant maximum keeps p * s small and leaves the entropy as it is.
    s = logits - jax.lax.stop_gradient(jnp.where(keys, logits, -jnp.inf).max(-1, keepdims=True))
    s = jnp.where(keys, s, 0.0)
    weight = jnp.where(keys, jnp.exp(s), 0.0)
    total = weight.sum(-1)
    return jnp.log(total) - (weight * s).sum(-1) / total


def layer_norm(tokens: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without affine parameters, float32, eps 1e-6."""
    tokens = tokens.astype(jnp.float32)
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LN_EPS)


def token_affinity(tokens: jax.Array, stop_visible: jax.Array | None = None, *, norm: bool = True) -> jax.Array:
    """<LN x_i, LN x_j> / sqrt(D), float32 (B, N, N), of tokens (B, N, D).

    Args:
      tokens: the tokens that enter a block.
      stop_visible: bool (B, N); the gradient of these tokens is stopped.
      norm: without it <x_i, x_j>, the affinity in the code of the authors' neighbouring paper (arXiv 2404.08327).
    """
    x = layer_norm(tokens) if norm else tokens.astype(jnp.float32)
    if stop_visible is not None:
        x = jnp.where(stop_visible[..., None], jax.lax.stop_gradient(x), x)
    products = jnp.einsum('bid,bjd->bij', x, x, precision='highest')
    return products / math.sqrt(tokens.shape[-1]) if norm else products


def heterogeneity(
    affinity: jax.Array, masked: jax.Array, *, scale_guard: bool = False, per_token: bool = False
) -> jax.Array:
    """Entropy measure: how evenly masked tokens lean on the visible ones, in [0, 1]; 1 is fully heterogeneous.

    `Het = mean over masked i of H(softmax over visible j of s_ij) / log|V|`, then the mean over heads (docs/method.md).

    Args:
      affinity: (B, h, N, N) attention logits or (B, N, N) token affinities.
      masked: bool (B, N).
      scale_guard: divide by the constant standard deviation of the visible queries' logits, per image and head.
      per_token: return each token's own value (B, N), meaningful at masked positions, instead of the mean.

    Returns:
      float32 scalar, or (B, N).
    """
    s = affinity.astype(jnp.float32)
    visible = ~masked
    if scale_guard:
        rows = visible.reshape(visible.shape[0], *[1] * (s.ndim - 3), visible.shape[1], 1)
        cols = visible.reshape(visible.shape[0], *[1] * (s.ndim - 2), visible.shape[1])
        std = jnp.std(s, axis=(-2, -1), where=jnp.broadcast_to(rows & cols, s.shape), keepdims=True)
        s = s / jax.lax.stop_gradient(std + LN_EPS)
    entropy = _entropy(s, visible)
    log_v = jnp.log(visible.sum(-1).astype(jnp.float32))
    het = entropy / log_v.reshape(-1, *[1] * (entropy.ndim - 1))
    if per_token:
        return het if het.ndim == 2 else het.mean(1)
    return _mean_over(het, masked).mean()


def density(tokens: jax.Array, masked: jax.Array, *, stop_visible: bool = False) -> jax.Array:
    """Density measure rho: log-likelihood of masked tokens under a kernel estimate of the visible ones, relative.

    `rho = mean_{i in M} logmeanexp_{j in V} s_ij - mean_{k in V} logmeanexp_{j in V, j != k} s_kj` with the token
    affinity s; negative where masked tokens lie where the data are not (docs/method.md).

    Args:
      tokens: (B, N, D) without prefix tokens.
      masked: bool (B, N).
      stop_visible: stop the gradient into the visible tokens.

    Returns:
      float32 scalar, the mean over images.
    """
    visible = ~masked
    s = token_affinity(tokens, visible if stop_visible else None)
    count = visible.sum(-1, keepdims=True).astype(jnp.float32)
    of_masked = _logsumexp(s, visible) - jnp.log(count)
    others = jnp.where(jnp.eye(s.shape[-1], dtype=bool), -jnp.inf, jnp.where(visible[:, None, :], s, -jnp.inf))
    of_visible = jax.nn.logsumexp(others, axis=-1) - jnp.log(count - 1)
    return (_mean_over(of_masked, masked) - _mean_over(of_visible, visible)).mean()


def spatial_term(logits: jax.Array, masked: jax.Array, form: str = 'mass') -> jax.Array:
    """One block of L_spa: `mean_{i in V} [logsumexp_all(a_i) - logsumexp_V(a_i)]`, float32 scalar.

    It is minus the log of the attention mass that visible queries keep on visible keys.

    Args:
      logits: (B, h, N, N) before recalibration.
      masked: bool (B, N).
      form: one of SPA_FORMS, see `Settings`.
    """
    logits = logits.astype(jnp.float32)
    visible, row = ~masked, 0.0
    if form.startswith('mass'):
        row = jax.nn.logsumexp(logits, axis=-1) - _logsumexp(logits, visible)
    if form == 'mass+visible_entropy':
        row += _entropy(logits, visible)
    if form.endswith('row_entropy'):
        row += _entropy(logits, jnp.ones_like(masked))
    return _mean_over(row, visible).mean()


def spatial_term_of_weights(weights: jax.Array, masked: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`spatial_term`, the mass alone, of weights that attention has made without recalibration.

    Args:
      weights: float32 (B, h, N, N), the softmax of the logits and the bias.
      masked: bool (B, N).
      bias: (h, N, N), which is taken out again; or None.
    """
    if bias is not None:
        weights = weights * jnp.exp(-bias.astype(jnp.float32))
    keys = masked[:, None, None, :]
    on_visible, on_masked = (jnp.where(chosen, weights, 0.0).sum(-1) for chosen in (~keys, keys))
    total = on_visible + on_masked
    return _spatial_term_of_mass(on_visible / total, on_masked / total, masked)


def fused_spatial_term(q: jax.Array, k: jax.Array, masked: jax.Array, implementation: str) -> jax.Array:
    """`spatial_term` of queries and keys (B, N, h, d), the mass alone, in a kernel that stores no logits.

    The kernel weighs two features instead of values: 1 for visible keys, and 1 for masked ones.
    """
    kinds = jnp.pad(jnp.stack([~masked, masked], axis=-1), ((0, 0), (0, 0), (0, q.shape[-1] - 2))).astype(q.dtype)
    kinds = jnp.broadcast_to(kinds[:, :, None], k.shape)
    mass = attention.fused(q, k, kinds, None, implementation)[..., :2].astype(jnp.float32).transpose(0, 2, 1, 3)
    return _spatial_term_of_mass(mass[..., 0], mass[..., 1], masked)


def _spatial_term_of_mass(on_visible: jax.Array, on_masked: jax.Array, masked: jax.Array) -> jax.Array:
    """`spatial_term` of the masses (B, h, N), which add up to 1. The smaller is exact: near 1 there are few digits."""
    few = on_masked < 0.5
    # Both branches of a gradient are computed: each gets numbers at which it is finite.
    on_visible = jnp.maximum(on_visible, jnp.finfo(jnp.float32).tiny)
    row = jnp.where(few, -jnp.log1p(-jnp.where(few, on_masked, 0.0)), -jnp.log(jnp.where(few, 1.0, on_visible)))
    return _mean_over(row, ~masked).mean()


def masked_mass(logits: jax.Array, masked: jax.Array) -> jax.Array:
    """Attention mass of visible queries on masked keys, divided by |M| / N: 1 means uniform attention."""
    logits = logits.astype(jnp.float32)
    mass = jnp.exp(_logsumexp(logits, masked) - jax.nn.logsumexp(logits, axis=-1))
    return (_mean_over(mass, ~masked) / masked.mean(-1)).mean()


def diagnosis(
    logits: jax.Array, used: jax.Array, masked: jax.Array, tokens: jax.Array, num_prefix: int
) -> dict[str, jax.Array]:
    """What is shown of one block. No setting enters, so that runs with and without MTO can be compared.

    Args:
      logits: (B, h, N, N) before bias and recalibration.
      used: (B, h, N, N), the logits that the softmax gets.
      masked: bool (B, N).
      tokens: (B, N, D) that enter the block; at block 0, before positions are added.
      num_prefix: P, the number of prefix tokens.

    Returns:
      Float32 scalars: 'het', heterogeneity of the attention, the mean over heads of each head's own; 'het_token', that
      of token products; 'het_visible', the same entropy as 'het' for visible queries; 'rho', the density measure;
      'spa', this block's L_spa by mass alone; 'mass', attention from visible queries to masked keys; 'mass_used',
      the same after bias and recalibration.
    """
    logits = logits.astype(jnp.float32)
    visible, patches, patch_masked = ~masked, tokens[:, num_prefix:], masked[:, num_prefix:]
    visible_rows = _entropy(logits, visible) / jnp.log(visible.sum(-1).astype(jnp.float32))[:, None, None]
    return {
        'het': heterogeneity(logits, masked),
        'het_token': heterogeneity(token_affinity(patches), patch_masked),
        'het_visible': _mean_over(visible_rows, visible).mean(),
        'rho': density(patches, patch_masked),
        'spa': spatial_term(logits, masked),
        'mass': masked_mass(logits, masked),
        'mass_used': masked_mass(used, masked),
    }


def singularity_loss(het_or_rho: Sequence[jax.Array], measure: str) -> jax.Array:
    """L_e over the initial blocks: mean of 1 - Het ('entropy') or of softplus(rho) ('density')."""
    values = jnp.stack(list(het_or_rho))
    return jnp.mean(1.0 - values) if measure == 'entropy' else jnp.mean(jax.nn.softplus(values))


def ranking_loss(het: Sequence[jax.Array], first: int, margin: float, stop_previous: bool = True) -> jax.Array:
    """L_r: `mean over l >= first of max(0, Het^l - stop_gradient(Het^(l-1)) + margin)`.

    Args:
      het: heterogeneity of the blocks read, in order.
      first: index in `het` of the first block that must lie below the one before it, at least 1.
      margin: how far below.
      stop_previous: without it, the gradient flows into the earlier block too.
    """
    het = jnp.stack(list(het))
    before = jax.lax.stop_gradient(het[first - 1 : -1]) if stop_previous else het[first - 1 : -1]
    drop = het[first:] - before + margin
    return jnp.maximum(drop, 0.0).mean()


@dataclasses.dataclass(frozen=True)
class MaskedAttention:
    """Attention of one block with MTO: an `attention.Attend` that recalibrates masked keys and returns statistics.

    Attributes:
      settings: MTO's.
      gate: g of this block; None where each masked token has its own.
      num_prefix: P, the number of prefix tokens.
      read: whether the statistics that the losses need are returned.
      watch: whether `diagnosis` is returned instead.
      implementation: of the attention, as for `attention.kernel`. Where statistics need the logits of each head, they
        are plain products.
    """

    settings: Settings
    gate: float | None
    num_prefix: int
    read: bool
    watch: bool
    implementation: str = ''

    @property
    def needs_logits(self) -> bool:
        """Whether something is read that a kernel does not return."""
        s = self.settings
        entropy = self.gate is None or (self.read and bool(s.w_r or (s.w_e and s.measure == 'entropy')))
        rows = self.read and bool(s.w_spa) and s.spa_form != 'mass'
        return self.watch or (entropy and s.affinity == 'attention') or rows

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, seen: attention.Conditioning
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The output (B, N, h, d) and the statistics of q, k, v (B, N, h, d) and what the block sees."""
        s, masked = self.settings, seen.masked
        patches, patch_masked = seen.tokens[:, self.num_prefix :], masked[:, self.num_prefix :]
        chosen = '' if self.needs_logits else attention.kernel(self.implementation, q, k, attention.EXTRA)
        logits = None if chosen else attention.logits(q, k)

        def entropy(q, k, per_token: bool = False):
            if not s.affinity.startswith('attention'):
                stop = ~patch_masked if s.stop_keys else None
                read = patches if s.affinity != 'gram_positions' else seen.inputs[:, self.num_prefix :]
                products = token_affinity(read, stop, norm=s.affinity == 'token')
                return heterogeneity(products, patch_masked, per_token=per_token)
            products = attention.mean_logits if s.affinity == 'attention_mean' else attention.logits
            affinity = products(q, jax.lax.stop_gradient(k) if s.stop_keys else k)
            return heterogeneity(affinity, masked, scale_guard=s.scale_guard, per_token=per_token)

        gate = self.gate
        if gate is None:
            het = jax.lax.stop_gradient(entropy(q, k, per_token=True))
            het = jnp.pad(het, ((0, 0), (masked.shape[1] - het.shape[1], 0)))  # prefix tokens are never masked
            gate = token_gates(s, het, masked)
        if s.open_until:
            progress = 1.0 if seen.progress is None else seen.progress
            gate += (1.0 - gate) * jnp.minimum(1.0, progress / s.open_until)
        gated = not isinstance(gate, float) or gate != 1.0
        # Where the statistics have logits of their own, the backward pass makes them anew: kept, they are the largest
        # arrays of a block.
        stats, spatial = {}, self.read and bool(s.w_spa)
        if chosen:
            shift = recalibrating_shift(masked, gate, s.rows) if gated else None
            if spatial and chosen == 'heads':
                out, mass = attention.head_by_head(q, k, v, seen.bias, shift, masked)
                stats['spa'] = _spatial_term_of_mass(*mass, masked)
            else:
                out = attention.fused(q, k, v, seen.bias, chosen, shift)
                if spatial:
                    stats['spa'] = fused_spatial_term(q, k, masked, chosen)
        else:
            used = logits if seen.bias is None else logits + seen.bias.astype(jnp.float32)
            used = recalibrate(used, masked, gate, s.rows) if gated else used
            weights = jax.nn.softmax(used, axis=-1)
            out = attention.values(weights, v)
            if self.watch:
                return out, diagnosis(logits, used, masked, seen.tokens, self.num_prefix)
            if spatial and s.spa_form == 'mass' and not gated:
                stats['spa'] = spatial_term_of_weights(weights, masked, seen.bias)
            elif spatial:
                term = jax.checkpoint(lambda q, k: spatial_term(attention.logits(q, k), masked, s.spa_form))
                stats['spa'] = term(q, k)
        if self.read and (s.w_r or (s.w_e and s.measure == 'entropy')):
            stats['het'] = jax.checkpoint(entropy)(q, k)
        if self.read and s.w_e and s.measure == 'density':
            stats['rho'] = density(patches, patch_masked, stop_visible=True)
        return out, stats


def weights(settings: Settings, progress: jax.Array | float) -> dict[str, jax.Array]:
    """Weights of the three terms at `progress` in [0, 1] of the training."""
    progress = jnp.asarray(progress, jnp.float32)
    grown = jnp.minimum(1.0, progress / settings.warmup) if settings.warmup else jnp.ones_like(progress)
    faded = jnp.maximum(0.0, 1.0 - progress / settings.fade_until)
    each = zip(TERMS, (settings.w_spa, settings.w_e, settings.w_r), strict=True)
    return {name: weight * grown * (faded if name in settings.fade else 1.0) for name, weight in each}


def losses(settings: Settings, stats: Mapping[int, Mapping[str, jax.Array]], depth: int) -> dict[str, jax.Array]:
    """The active terms, unweighted: a subset of {'spa', 'e', 'r'}, float32 scalars.

    Args:
      settings: which terms are on.
      stats: for each block that was read, what its `MaskedAttention` returned.
      depth: L, the number of blocks of the stack.
    """
    terms = {}
    read = sorted(stats)
    k = settings.num_initial(depth)
    if settings.w_spa:
        # By default it falls to 0 in the last block, whose visible rows feed no decoder loss.
        weight = DEPTHS[settings.spa_depth]
        terms['spa'] = jnp.mean(jnp.stack([weight(b, depth) * stats[b]['spa'] for b in read]))
    if settings.w_e:
        name = 'het' if settings.measure == 'entropy' else 'rho'
        terms['e'] = singularity_loss([stats[b][name] for b in read if b < k], settings.measure)
    if settings.w_r:
        first = max(1, sum(b < k for b in read))
        terms['r'] = ranking_loss([stats[b]['het'] for b in read], first, settings.margin, settings.stop_previous)
    return terms


def token_distance(tokens: jax.Array, masked: jax.Array) -> jax.Array:
    """Distance of the masked tokens from the visible ones, in standard deviations of the latter; float32 scalar.

    Root mean square over the features of (mean masked - mean visible) / std visible, over all images at once; for
    tokens (B, N, D) before positions are added and masked bool (B, N). 0: the mask token is the data's mean.
    """
    x = tokens.astype(jnp.float32)
    vis = jnp.broadcast_to(~masked[..., None], x.shape)
    mean, std = jnp.mean(x, (0, 1), where=vis), jnp.std(x, (0, 1), where=vis)
    centre = jnp.mean(x, (0, 1), where=~vis)
    return jnp.sqrt(jnp.mean(jnp.square((centre - mean) / (std + LN_EPS))))
