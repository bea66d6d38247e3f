"""The step, the loop, resuming, stopping on a non-finite term, and every shipped config for two steps."""

import ast
import contextlib
import importlib
import json
import os
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from configs import base
from mto_jax import methods, tasks
from mto_jax.attention import Conditioning, DotProduct
from mto_jax.errors import UserError
from mto_jax.evals import probes
from mto_jax.methods import mae
from mto_jax.models import vit
from mto_jax.models.layers import Block
from mto_jax.runtime import environment, parallel
from mto_jax.runtime.log import read_history
from mto_jax.tasks import pretrain, train
from mto_jax.training import checkpoint, job, loop, objective, optim, perf, schedules, train_state
from tests import toy_method
from tests.conftest import named, shrink


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def build_step(config):
    """A training, its first state, an empty meter and a batch of 16."""
    config.batch_size = 16
    training = job.prepare(config, 130)
    images = np.random.default_rng(0).integers(0, 256, (16, *config.data.image_size, config.data.channels), np.uint8)
    return training, training.create(0), train_state.Meter.empty(training.names), {'image': images}


def lowered(config):
    training, state, meter, batch = build_step(config)
    return jax.jit(training.train_step).lower(state, meter, {}, batch, jax.random.key(0)).as_text()


@pytest.mark.parametrize('name', ['mae', 'simmim', pytest.param('bootmae', marks=pytest.mark.slow)])
def test_mto_off_costs_nothing(config, monkeypatch, name):
    """With MTO off the step lowers to the text of a model whose blocks know no hook at all."""
    config.method, config.mask_ratio = name, 0.5
    off = lowered(config)
    monkeypatch.setattr(vit, 'Transformer', PlainStack)
    assert off == lowered(config)
    monkeypatch.undo()
    config.mto.enabled = True
    assert off == lowered(config), 'MTO on, but with every part of it off, should be free too'
    config.mto.w_e = 0.1
    assert off != lowered(config)


class PlainStack(nn.Module):
    """The same blocks in a loop, without a mask, a choice of attention or statistics."""

    arch: vit.Architecture
    attends: None = None
    taps: tuple = ()

    @nn.compact
    def __call__(self, x, seen, *, train=False, depth=None):
        a, taps = self.arch, {}
        for i in range(a.depth if depth is None else depth):
            parts = {'head_width': a.head_width, 'attend': DotProduct(a.attention), 'dtype': a.dtype}
            block = Block(a.heads, a.mlp_ratio, a.qkv_bias, **parts, name=f'block{i}')
            x, _ = block(x, Conditioning(bias=seen.bias, memory=seen.memory), train)
            taps[i] = x
        return vit.Encoded(x, {}, taps)


def test_accumulation_is_the_mean_over_microbatches(config):
    """Four microbatches take one AdamW step with the mean of their gradients, each with its own mask."""
    training, state, meter, batch = build_step(config)
    config.accumulate = 4
    got, got_meter = jax.jit(build_step(config)[0].train_step)(state, meter, {}, batch, jax.random.key(7))
    key = jax.random.fold_in(jax.random.key(7), 0)
    grad, grads = jax.jit(jax.grad(training.objective.loss, has_aux=True)), []
    for i in range(4):
        part = {'image': batch['image'][i::4]}
        arguments = {}, {}, part, jax.random.fold_in(key, i), training.clock(jnp.int32(0))
        grads.append(grad(state.params, *arguments)[0])
    mean = jax.tree.map(lambda *g: sum(g) / 4, *grads)
    updates, _ = training.tx.update(mean, state.opt_state, state.params)
    want = optax.apply_updates(state.params, updates)
    # Adam divides by the gradient's own size, so only parameters whose gradient is not rounding noise compare.
    for g, a, b in zip(*(jax.tree.leaves(t) for t in (mean, got.params, want)), strict=True):
        real = np.abs(g) > 1e-5
        np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=1e-4)
    assert got_meter.sums['grad_norm'] == pytest.approx(float(optax.tree.norm(mean)), rel=1e-5)
    assert int(got.step) == 1


def test_adamw_against_numpy(config, rng):
    """Two steps of decoupled weight decay, on a decayed matrix and an undecayed bias, in float64."""
    o = config.optim
    params = {'w': {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}}
    tx = optim.adamw(o, optax.constant_schedule(0.01))
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = tx.init(p)
    m = jax.tree.map(np.zeros_like, params)
    v = jax.tree.map(np.zeros_like, params)
    for t in (1, 2):
        g = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        updates, state = tx.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), state, p)
        p = optax.apply_updates(p, updates)
        for n in ('kernel', 'bias'):
            m['w'][n] = o.b1 * m['w'][n] + (1 - o.b1) * g['w'][n]
            v['w'][n] = o.b2 * v['w'][n] + (1 - o.b2) * g['w'][n] ** 2
            decay = o.weight_decay * params['w'][n] if n == 'kernel' else 0.0
            step = m['w'][n] / (1 - o.b1**t) / (np.sqrt(v['w'][n] / (1 - o.b2**t)) + o.eps)
            params['w'][n] = params['w'][n] - 0.01 * (step + decay)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), p, params)


@pytest.mark.parametrize(
    ('name', 'decayed', 'count'),
    [
        ('mae', {'kernel', 'qkv_kernel', 'cls_token', 'mask_token'}, 85),
        ('simmim', {'kernel', 'qkv_kernel', 'mask_token', 'relative_bias_table'}, 52),
        ('bootmae', {'kernel', 'qkv_kernel', 'q_kernel', 'kv_kernel', 'mask_token'}, 83),
        # The official code has one more: the head that no loss reads.
        ('conmim', {'kernel', 'qkv_kernel', 'mask_token', 'relative_bias_table'}, 54),
    ],
)
def test_decay_of_the_official_recipes(name, decayed, count):
    """Which tensors of ViT-B decay, and how many: as the official codes' optimizers group them."""
    config = importlib.import_module(f'configs.{name}').get_config()
    method = methods.build(config)
    params = jax.eval_shape(lambda: method.init(jax.random.key(0))[0])
    o = config.optim
    flat, _ = jax.tree_util.tree_flatten_with_path(optim.decay_mask(params, o.decay_cls_token, o.decay_mask_token))
    assert {path[-1].key for path, yes in flat if yes} == decayed
    assert sum(yes for _, yes in flat) == count


# Shapes of what other methods have; paths after the names in the official codes of BootMAE and ConMIM.
OTHER_PARAMETERS = {
    'encoder/blocks/block0/gamma_attn': (4,),
    'projector/norm1/scale': (4,),
    'projector/norm1/bias': (4,),
    'projector/temperature': (),
    'encoder/relative_bias_table': (9, 2),
    'encoder/blocks/block0/relative_position_bias': (9, 2),
    'encoder/blocks/block0/attn/q_bias': (2, 4),
    'encoder/blocks/block0/cross_attn/kv_kernel': (8, 2, 2, 4),
    'feature_decoder/mask_token': (1, 1, 4),
    'mask_token_1': (1, 1, 4),
    'mask_token/embedding': (1, 4),
    'cls_token_predictor/kernel': (4, 4),
    'encoder/pos_embed': (1, 5, 4),
    'decoder/pos_embed_1': (1, 5, 4),
    'lm_head/proj/kernel': (4, 4),
    'lm_head/proj/bias': (4,),
}


def test_decay_of_parameters_of_other_methods():
    """Matrices and relative positions decay, tokens as the fields say wherever they lie, and nothing else does."""
    params = traverse_util.unflatten_dict({n: np.zeros(s) for n, s in OTHER_PARAMETERS.items()}, sep='/')
    decayed = {name for name, yes in named(optim.decay_mask(params, False, False)).items() if yes}
    tables = {'encoder/relative_bias_table', 'encoder/blocks/block0/relative_position_bias'}
    matrices = {'encoder/blocks/block0/cross_attn/kv_kernel', 'cls_token_predictor/kernel', 'lm_head/proj/kernel'}
    assert decayed == tables | matrices
    with_tokens = {name for name, yes in named(optim.decay_mask(params, False, True)).items() if yes}
    assert with_tokens - decayed == {'feature_decoder/mask_token', 'mask_token_1', 'mask_token/embedding'}


@pytest.mark.parametrize('cls_token', [True, False])
@pytest.mark.parametrize('mask_token', [True, False])
def test_tokens_decay_by_their_own_fields(config, cls_token, mask_token):
    """With a zero gradient, an update is the decay alone."""
    o = config.optim
    o.decay_cls_token, o.decay_mask_token = cls_token, mask_token
    params = methods.build(config).init(jax.random.key(0))[0]
    tx = optim.adamw(o, optax.constant_schedule(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert bool(updates['encoder']['cls_token'].any()) == cls_token
    assert bool(updates['decoder']['mask_token'].any()) == mask_token


def test_step_arithmetic():
    """ImageNet at batch 4096: 312 full batches, 249,600 steps in 800 epochs; half steps round up."""
    from mto_jax.data.order import steps_per_epoch

    assert steps_per_epoch(1_281_167, 4096) == 312
    assert schedules.to_steps(800, 312) == 249_600
    assert schedules.to_steps(0.5, 3) == 2
    assert schedules.to_steps(0.1, 4) == 0


def test_cosine_schedule_by_hand(config):
    o = config.optim
    o.base_lr, o.lr_reference, o.warmup_epochs, o.min_lr = 1e-3, 256, 1.0, 1e-5
    f = schedules.learning_rate(o, 512, 50, 10)
    assert float(f(0)) == 0
    assert float(f(5)) == pytest.approx(1e-3)
    assert float(f(10)) == pytest.approx(2e-3)
    assert float(f(30)) == pytest.approx(1e-5 + (2e-3 - 1e-5) / 2, rel=1e-4)
    assert float(f(50)) == pytest.approx(1e-5, rel=1e-4)


def test_cosine_that_runs_behind_the_warmup(config):
    """timm's, at t steps of T and W of warm-up: min + (peak - min) (1 + cos(pi t / T)) / 2 from W on. Its rates for
    microsoft/SimMIM's fine-tuning, as shares of the peak: .905 after the warm-up of a fifth."""
    o = config.optim
    o.base_lr, o.lr_reference, o.warmup_epochs, o.min_lr, o.warmup_prefix = 1e-3, 0, 20.0, 1e-5, False
    f = schedules.learning_rate(o, 512, 1000, 10)
    want = {t: 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * t / 1000)) / 2 for t in (200, 500, 777, 1000)}
    want |= {0: 0.0, 100: 5e-4, 199: 9.95e-4}
    assert [float(f(t)) for t in want] == pytest.approx(list(want.values()), rel=1e-4, abs=1e-9)
    assert (want[200] - 1e-5) / (1e-3 - 1e-5) == pytest.approx(0.905, abs=5e-4)


def test_multistep_schedule_by_hand(config):
    o = config.optim
    o.base_lr, o.lr_reference, o.warmup_epochs = 1e-3, 512, 1.0
    o.schedule, o.decay_epochs, o.decay_factor = 'multistep', (3.0,), 0.1
    f = schedules.learning_rate(o, 512, 50, 10)
    assert [float(f(s)) for s in (5, 10, 29)] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert float(f(31)) == pytest.approx(1e-4)


def test_simmim_schedule_is_the_official_one():
    """The official scheduler's own rates (batch 2048, 625 steps per epoch): step t of ours is iteration t + 1 there."""
    from configs import simmim

    official = {1: 2e-6, 2: 2.06368e-6, 3: 2.12736e-6, 100: 8.30432e-6, 6249: 3.9987264e-4, 6250: 3.9993632e-4}
    official |= {6251: 4e-4, 6252: 4e-4, 100000: 4e-4, 437499: 4e-4, 437500: 4e-4, 437501: 4e-5, 499999: 4e-5}
    c = simmim.get_config()
    f = schedules.learning_rate(c.optim, c.batch_size, 800 * 625, 625)
    assert [float(f(t - 1)) for t in official] == pytest.approx(list(official.values()), rel=1e-5)


BOOTMAE = {0: 0, 1: 1.923231e-7, 2: 3.8464621e-7, 100: 1.923231e-5, 6240: 1.2000962e-3, 12478: 2.3998077e-3}
BOOTMAE |= {12479: 2.4e-3, 12480: 2.4e-3, 12481: 2.4e-3, 50000: 2.2611721e-3, 131040: 1.2523737e-3}
BOOTMAE |= {200000: 3.4180019e-4, 249910: 1e-4, 249911: 1e-4}
BOOTMAE_LARGE = {0: 0, 1: 4.800192e-8, 24999: 1.2e-3, 25000: 1.2e-3, 250000: 6.5529415e-4, 500624: 1e-5}
CONMIM = {0: 0, 1: 1.200192e-7, 2: 2.4003841e-7, 100: 1.200192e-5, 6249: 7.5e-4, 6250: 7.5e-4, 6251: 7.5e-4}
CONMIM_800 = CONMIM | {100000: 6.8610249e-4, 250000: 3.8735641e-4, 499999: 1e-5}
CONMIM_1600 = CONMIM | {100000: 7.3386836e-4, 500000: 3.8365525e-4, 999999: 1e-5}


@pytest.mark.parametrize(
    ('official', 'base_lr', 'reference', 'min_lr', 'warmup', 'epochs', 'batch', 'per_epoch'),
    [
        pytest.param(BOOTMAE, 1.5e-4, 256, 1e-4, 40.0, 801, 4096, 312, id='bootmae'),
        pytest.param(BOOTMAE_LARGE, 1.5e-4, 256, 1e-5, 40.0, 801, 2048, 625, id='bootmae-large'),
        pytest.param(CONMIM_800, 7.5e-4, 0, 1e-5, 10.0, 800, 2048, 625, id='conmim-800'),
        pytest.param(CONMIM_1600, 7.5e-4, 0, 1e-5, 10.0, 1600, 2048, 625, id='conmim-1600'),
    ],
)
def test_official_schedules_with_inclusive_warmup(
    config, official, base_lr, reference, min_lr, warmup, epochs, batch, per_epoch
):
    """Rates by iteration as the schedulers of LightDXY/BootMAE d604b18 and TencentARC/ConMIM 4263955 compute them."""
    o = config.optim
    o.base_lr, o.lr_reference, o.min_lr, o.warmup_epochs, o.warmup_inclusive = base_lr, reference, min_lr, warmup, True
    f = schedules.learning_rate(o, batch, epochs * per_epoch, per_epoch)
    rounding = 1e-7 * max(official.values())  # of the first rates, in float32
    assert [float(f(step)) for step in official] == pytest.approx(list(official.values()), rel=1e-5, abs=rounding)


def test_inclusive_warmup_of_one_step_is_its_start(config):
    """As numpy.linspace(start, peak, 1)."""
    o = config.optim
    o.base_lr, o.lr_reference, o.warmup_lr, o.warmup_epochs, o.warmup_inclusive = 1e-3, 0, 1e-5, 1.0, True
    f = schedules.learning_rate(o, 512, 50, 1)
    assert [float(f(step)) for step in (0, 1)] == pytest.approx([1e-5, 1e-3])


@pytest.mark.parametrize(
    ('method', 'devices'),
    [('mae', 1), pytest.param('mae', 8, marks=pytest.mark.slow), pytest.param('bootmae', 8, marks=pytest.mark.slow)],
)
def test_resume_is_bitwise(config, tmp_path, method, devices):
    """Stopped after a checkpoint in the middle of an epoch, by deleting what came later, and started again."""
    config.mto.enabled, config.mto.recalibration, config.mto.w_e, config.mto.w_r = True, 'ramp', 0.1, 1.0
    config.model.drop_path, config.checkpoints.every, config.checkpoints.keep = 0.2, 3, 9
    config.method, config.mesh.data = method, devices
    whole = pretrain.run(config, tmp_path / 'whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
    for step in (6, 8):
        shutil.rmtree(tmp_path / 'part' / 'checkpoints' / str(step))
    again = pretrain.run(config, tmp_path / 'part')
    assert int(again.step) == 8
    assert same(whole, again)
    terms = [
        [{k: r[k] for k in ('step', 'loss') if k in r} for r in read_history(tmp_path / d)] for d in ('whole', 'part')
    ]
    assert terms[0][-1] == terms[1][-1]


def test_the_last_step_is_always_saved(config, tmp_path):
    """Also where nothing else is asked for; and a run that ended before its first save leaves no rows to the next."""
    config.checkpoints.every = 0
    (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "loss": 9.0}\n')
    pretrain.run(config, tmp_path)
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()] == ['8']
    rows = read_history(tmp_path)
    assert [r['step'] for r in rows] == [3, 6, 8]
    assert 'loss' in rows[-1]


def test_resume_on_other_devices(config, tmp_path, capsys):
    """From 8 devices (data 2 x fsdp 4) at step 4 to 4 devices: the right step and data, parameters up to rounding."""
    config.mto.enabled, config.mto.w_e, config.mto.w_r = True, 0.1, 1.0
    config.checkpoints.every, config.mesh.data, config.mesh.fsdp = 4, 2, 4
    whole = pretrain.run(config, tmp_path)
    shutil.rmtree(tmp_path / 'checkpoints' / '8')
    capsys.readouterr()
    config.mesh.data, config.mesh.fsdp = 4, 1
    again = pretrain.run(config, tmp_path)
    shown = capsys.readouterr().out
    assert 'resuming at step 4' in shown
    assert 'devices.mesh: data 2 x fsdp 4 x tensor 1 then, data 4 x fsdp 1 x tensor 1 now' in shown
    assert int(again.step) == 8
    assert {d for x in jax.tree.leaves(again.params) for d in x.devices()} == set(jax.devices()[:4])
    for (path, a), b in zip(jax.tree.leaves_with_path(whole.params), jax.tree.leaves(again.params), strict=True):
        if path[-1].key != 'k_bias':  # its exact gradient is zero
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """(folder, last state) of a run of `config` as it comes."""
    c = shrink(base.get_config())
    c.model.dtype = 'float32'
    folder = tmp_path_factory.mktemp('finished') / 'run'
    return folder, pretrain.run(c, folder)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the folder of `finished`."""
    return shutil.copytree(finished[0], tmp_path / 'copied')


def test_a_finished_run_is_not_trained_again(config, finished, copied, monkeypatch):
    monkeypatch.setattr(job.Job, 'step', lambda *_: lambda *_: pytest.fail('it trained'))
    assert same(finished[1], pretrain.run(config, copied))


def test_another_config_is_refused(config, copied):
    config.optim.base_lr, config.log_every = 1.0, 1
    with pytest.raises(UserError, match=r'(?s)optim.base_lr: 0.00015 there, 1.0 now.*resume_anyway') as e:
        pretrain.run(config, copied)
    assert 'log_every' not in str(e.value)
    config.resume_anyway = True
    pretrain.run(config, copied)


def test_another_model_is_refused(config, copied):
    config.model.width, config.resume_anyway = 24, True
    with pytest.raises(UserError, match=r'(?s)another model.*\(16, 8\).*\(24, 8\)'):
        pretrain.run(config, copied)


@pytest.mark.parametrize('restarts', [False, True])
@pytest.mark.parametrize(
    ('scores', 'kept'),
    [
        (((1, 3.0), (2, 9.0), (3, 1.0), (4, 2.0)), [2, 4]),
        (((1, None), (2, 9.0), (3, None), (4, None)), [2, 4]),
        (((1, None), (2, None)), [2]),
    ],
)
def test_newest_and_best_are_kept(config, tmp_path, restarts, scores, kept):
    """keep=1: the best stays in addition to the newest, also over restarts; a state without a score is never best."""
    _, state, _, _ = build_step(config)
    saver = checkpoint.Checkpointer(tmp_path, keep=1)
    for step, score in scores:
        saver.save(state.replace(step=jnp.int32(step)), config.to_dict(), score, {})
        saver.wait()
        if restarts:
            saver.close()
            saver = checkpoint.Checkpointer(tmp_path, keep=1)
    assert saver.steps == kept
    saver.close()


def test_the_best_is_the_checkpoint_that_was_evaluated(config, tmp_path, monkeypatch):
    """kNN every 4 steps, saves every 3: the best score is that of step 4, and step 4 is what is kept."""
    scores = iter([0.9, 0.1])
    monkeypatch.setattr(probes, 'probe', lambda *args: {f'knn_{k}': next(scores) for k in config.eval.knn_k[-1:]})
    config.checkpoints.every, config.checkpoints.keep, config.eval.every_epochs = 3, 1, 1.0
    pretrain.run(config, tmp_path)
    kept = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit())
    assert kept == [4, 8]


def follow(config, advice):
    """A copy of `config` with the flags that a message names set as it says."""
    changed = ConfigDict(config.to_dict())
    flags = re.findall(r'--config\.([\w.]+)=([\w.+-]*\w)', advice)
    assert flags, advice
    for name, value in flags:
        with changed.ignore_type(), contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        *parents, last = name.split('.')
        part = changed
        for parent in parents:
            part = part[parent]
        part[last] = type(part[last])(value)
    return changed


def poison(monkeypatch, change):
    """Change what the pre-training objective returns: `change(loss, terms, steps done) -> (loss, terms)`."""
    original = objective.Pretraining.loss

    def poisoned(self, params, model_state, constants, batch, key, clock):
        loss, (terms, statistics) = original(self, params, model_state, constants, batch, key, clock)
        loss, terms = change(loss, terms, clock.step)
        return loss, (terms, statistics)

    monkeypatch.setattr(objective.Pretraining, 'loss', poisoned)


def diverge_at(step, monkeypatch):
    """Make the loss of one step NaN."""
    poison(monkeypatch, lambda loss, terms, done: (loss * jnp.where(done == step - 1, jnp.nan, 1.0), terms))


@pytest.mark.parametrize('step', [1, pytest.param(5, marks=pytest.mark.slow)])
def test_advice_after_divergence_can_be_followed(config, tmp_path, step):
    """Each cure that the message names resumes with `resume_anyway`, and is refused without; a start before any save
    refuses nothing; and after an attempt that does not fit the checkpoint the original command still resumes."""
    config.checkpoints.every, config.log_every, config.model.dtype = 2, 1, 'bfloat16'
    with pytest.MonkeyPatch.context() as m:
        diverge_at(step, m)
        with pytest.raises(UserError, match=f'not finite at step {step}') as e:
            pretrain.run(config, tmp_path)
        cures = re.findall(r'--config\.(?!resume)\S+\w', str(e.value))
        assert [c.partition('=')[0] for c in cures] == [
            f'--config.{n}' for n in ('optim.clip_norm', 'optim.base_lr', 'model.dtype')
        ]
        for cure in cures if step == 5 else ():  # it is allowed, though it does not cure this made disease
            changed = tmp_path.parent / 'changed'
            shutil.copytree(tmp_path, changed)
            with pytest.raises(UserError, match='holds a run with another config'):
                pretrain.run(follow(config, cure), changed)
            with pytest.raises(UserError, match='not finite'):
                pretrain.run(follow(config, f'{cure} --config.resume_anyway=True'), changed)
            shutil.rmtree(changed)
    worse = follow(config, '--config.model.width=24 --config.resume_anyway=True')
    if step == 5:
        with pytest.raises(UserError, match='another model'):
            pretrain.run(worse, tmp_path)
        pretrain.run(config, tmp_path)
    else:
        pretrain.run(worse, tmp_path)  # nothing was saved, so nothing is refused


@pytest.mark.slow
def test_advice_without_memory_can_be_followed(config, tmp_path, monkeypatch):
    """A device that runs out of memory at step 5: each way out that the message names resumes at step 4."""
    config.checkpoints.every = 2
    real = job.Job.step

    def step(self, mesh):
        run = real(self, mesh)

        def limited(state, meter, *rest):
            if int(state.step) == 4:
                raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.')
            return run(state, meter, *rest)

        return limited

    with monkeypatch.context() as m:
        m.setattr(job.Job, 'step', step)
        with pytest.raises(UserError, match='out of device memory') as e:
            pretrain.run(config, tmp_path)
    text = str(e.value)
    ways = ['--config.accumulate=2', '--config.model.remat=True', '--config.mesh.fsdp=-1 --config.mesh.data=1']
    assert '--config.resume_anyway=True' in text
    for way in ways:
        assert way in text
        shutil.copytree(tmp_path, tmp_path.parent / 'resumed')
        pretrain.run(follow(config, f'{way} --config.resume_anyway=True'), tmp_path.parent / 'resumed')
        shutil.rmtree(tmp_path.parent / 'resumed')


def test_not_finite_stops_and_saves_nothing(config, tmp_path, capsys):
    """A learning rate that blows up: the stop names step, terms and the last good checkpoint, which resumes."""
    config.model.attention, config.mae.norm_pix_loss, config.log_every = '', False, 2
    config.checkpoints.every, config.checkpoints.keep = 2, 9

    def at_step_five(loss, terms, done):
        extra = {'extra': jnp.where(done >= 5, jnp.inf, 1.0)}
        return loss * jnp.where(done >= 4, jnp.nan, 1.0), terms | extra

    with pytest.MonkeyPatch.context() as m:
        poison(m, at_step_five)
        with pytest.raises(UserError, match=r'not finite at step 5: grad_norm, loss, param_norm.*checkpoints/4'):
            pretrain.run(config, tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [2, 4]
    assert int(pretrain.run(config, tmp_path).step) == 8
    assert 'resuming at step 4' in capsys.readouterr().out


# jaxlib 0.12's reader of profiles warns where an error ends the process.
@pytest.mark.filterwarnings('ignore:builtin type:DeprecationWarning')
def test_a_profile_of_chosen_steps(config, tmp_path, monkeypatch, capsys):
    """The trace holds those steps by their numbers; the log has the MFU where the peak is known."""
    monkeypatch.setattr(perf, 'PEAKS', {'cpu': 1e15})
    config.model.dtype, config.profile_steps = 'bfloat16', (3, 4)
    pretrain.run(config, tmp_path)
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    seen = set()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            seen |= {dict(e.stats)['step_num'] for e in line.events if e.name == 'train'}
    assert seen == {3, 4}
    (*_, row) = (r for r in read_history(tmp_path) if 'mfu' in r)
    flops = perf.train_flops(job.prepare(config, 130))
    assert row['mfu'] == pytest.approx(row['images_per_s'] * flops / 1e15)
    assert f'MFU {row["mfu"]:.1%}' in capsys.readouterr().out
    config.profile_steps = (3, 99)
    with pytest.raises(UserError, match=r'profile_steps is \(3, 99\).*8 steps'):
        pretrain.run(config, tmp_path / 'other')


def test_deterministic_from_python_too(config, monkeypatch):
    """The flag is added to others, once."""
    before = os.environ.get('XLA_FLAGS', '')
    monkeypatch.setenv('XLA_FLAGS', before)
    config.deterministic = True
    for _ in range(2):
        train.devices(config)
    assert os.environ['XLA_FLAGS'].split() == [*before.split(), '--xla_gpu_deterministic_ops=true']


def test_what_was_waited_before_the_clock_started_is_not_counted():
    class Slow:
        pending = 5.0  # its first batches

        def meter(self):
            return None

        def advance(self, state, meter, step, stop):
            self.pending += 0.25
            return state, meter, step + 1

        def waited(self):
            waited, self.pending = self.pending, 0.0
            return waited

    class Kept(loop.Record):
        logs, saves, found = (2, 4), (1,), []

        def interval(self, step, meter, waited):
            self.found.append((step, waited))

    loop.fit(Slow(), None, 0, 4, record=Kept())
    assert Kept.found == [(2, 0.25), (4, 0.5)]  # after step 1 it saved, and the clock started again


def test_threads_without_affinity(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, 'sched_getaffinity')
    assert environment.cpu_threads() == os.cpu_count()


@pytest.mark.pictures
def test_pictures_and_metrics(config, tmp_path):
    config.eval.every_epochs, config.diagnose_every = 1.0, 4
    pretrain.run(config, tmp_path)
    for name in ('curves.png', 'heterogeneity.png', 'reconstructions.png'):
        assert (tmp_path / name).stat().st_size > 5000
    assert list(tmp_path.glob('events.out.tfevents.*'))
    rows = read_history(tmp_path)
    assert {'loss', 'reconstruction', 'images_per_s', 'data_wait', 'epoch'} <= set(rows[-1]) | set(rows[-2]) | set(
        rows[-3]
    )
    steps = [r['step'] for r in rows if 'block/het/1' in r]
    assert steps == [0, 4, 8]
    assert any('val_knn_20' in r for r in rows)


CONFIGS = ['mae', 'mae_mto', 'simmim', 'simmim_mto']
CONFIGS += [pytest.param(name, marks=pytest.mark.slow) for name in ('bootmae', 'bootmae_mto', 'conmim', 'conmim_mto')]


@pytest.mark.parametrize('name', CONFIGS)
def test_shipped_configs_run_two_steps(name, tmp_path):
    config = shrink(importlib.import_module(f'configs.{name}').get_config())
    config.epochs = 0.5
    config.optim.warmup_epochs = 0.0
    config.log_every, config.diagnose_every = 1, 2 if config.mto.enabled else 0
    state = tasks.run(config, tmp_path)
    assert int(state.step) == 2


def test_probe_configs_read_a_checkpoint(finished, tmp_path):
    for name in ('knn', 'linear'):
        c = importlib.import_module(f'configs.{name}').get_config()
        c.checkpoint, c.eval.batch_size, c.eval.linear_steps = str(finished[0]), 32, 20
        out = tasks.run(c, tmp_path / name)
        saved = json.loads((tmp_path / name / f'{name}.json').read_text())
        assert saved == out
        assert saved['split'] == 'test[:70]'
        assert 0.05 < saved['knn_20' if name == 'knn' else 'linear'] <= 1
    c.checkpoint = str(tmp_path / 'nothing')
    with pytest.raises(UserError, match='no checkpoint there'):
        tasks.run(c, tmp_path / 'x')


@pytest.mark.pictures
@pytest.mark.slow
def test_custom_method(config, tmp_path):
    """tests/toy_method.py, named by `config.method`: with a teacher, running statistics and two stacks it learns with
    MTO, accumulates, resumes bitwise, and student and teacher are probed."""
    config.method = 'tests.toy_method'
    config.mto.enabled, config.mto.recalibration, config.mto.w_e, config.mto.w_r = True, 'ramp', 0.1, 1.0
    config.epochs, config.optim.base_lr, config.optim.warmup_epochs, config.accumulate = 4.0, 1e-2, 1.0, 2
    config.eval.every_epochs, config.diagnose_every = 2.0, 8
    whole = pretrain.run(config, tmp_path / 'whole')
    colour = [r['colour'] for r in read_history(tmp_path / 'whole') if 'colour' in r]
    assert colour[-1] < 0.9 * colour[0]
    shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
    shutil.rmtree(tmp_path / 'part' / 'checkpoints' / '16')
    config.diagnose_every = 0
    assert same(whole, pretrain.run(config, tmp_path / 'part'))
    assert not same(whole.params['encoder'], whole.model_state['teacher']['encoder'])
    rows = read_history(tmp_path / 'whole')
    assert [r['feature_weight'] for r in rows if 'feature_weight' in r][-1] == 1.0
    assert {'block/het.encoder/1', 'block/het.predictor/1', 'token_distance.predictor'} <= set().union(*rows)
    for name in ('heterogeneity.png', 'report.html'):
        assert (tmp_path / 'whole' / name).stat().st_size > 5000
    config.task, config.checkpoint = 'knn', str(tmp_path / 'part')
    found = []
    for weights in ('student', 'teacher'):
        config.eval.weights = weights
        found.append(tasks.run(config, tmp_path / weights)['knn_20'])
        assert 0.05 < found[-1] <= 1
    assert len([r for r in rows if 'val_knn_20' in r]) == 2


def test_model_state_after_one_update(config):
    """The teacher moves towards the updated student, and the statistics of both microbatches are folded in once."""
    config.method, config.accumulate = 'tests.toy_method', 2
    training, state, meter, batch = build_step(config)
    after, meter = jax.jit(training.train_step)(state, meter, {}, batch, jax.random.key(7))
    before, key = state.model_state, jax.random.fold_in(jax.random.key(7), 0)
    statistics = []
    for i in range(2):
        arguments = {}, {'image': batch['image'][i::2]}, jax.random.fold_in(key, i), training.clock(jnp.int32(0))
        _, (_, found) = jax.jit(training.objective.loss)(state.params, before, *arguments)
        statistics.append(found)
    near = {'rtol': 1e-5, 'atol': 1e-6}
    for name, old in before['running'].items():
        want = 0.9 * old + 0.1 * (statistics[0][name] + statistics[1][name]) / 2
        np.testing.assert_allclose(after.model_state['running'][name], want, **near)
    want = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before['teacher'], {'encoder': after.params['encoder']})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **near), after.model_state['teacher'], want)
    assert meter.sums['model_state_norm'] == pytest.approx(float(optax.tree.norm(after.model_state)), rel=1e-5)


def test_a_model_state_that_is_not_finite_stops(config, tmp_path, monkeypatch):
    """The loss is finite; a running statistic is not, from step 3 on."""
    config.method, config.checkpoints.every, config.log_every = 'tests.toy_method', 2, 1
    real = toy_method.Toy.after_update

    def broken(self, params, model_state, statistics, clock):
        out = real(self, params, model_state, statistics, clock)
        return out | {'running': jax.tree.map(lambda x: x / jnp.where(clock.step >= 2, 0.0, 1.0), out['running'])}

    monkeypatch.setattr(toy_method.Toy, 'after_update', broken)
    with pytest.raises(UserError, match=r'not finite at step 3: model_state_norm.*checkpoints/2'):
        pretrain.run(config, tmp_path)


def test_a_teacher_is_asked_for_where_there_is_none(config, tmp_path):
    config.eval.weights = 'teacher'
    with pytest.raises(UserError, match=r"eval\.weights is 'teacher', but the method has no teacher"):
        pretrain.run(config, tmp_path)


@pytest.mark.pictures
def test_quickstart_config_compares(tmp_path):
    from configs import quickstart

    c = shrink(quickstart.get_config())
    c.epochs, c.optim.warmup_epochs, c.diagnose_every = 0.5, 0.0, 2
    out = tasks.run(c, tmp_path)
    assert set(out) == {'raw pixels', 'random encoder', 'mae', 'mae + MTO'}
    table = (tmp_path / 'results.md').read_text()
    assert table.count('\n') == 6
    assert (tmp_path / 'curves.png').stat().st_size > 5000
    assert (tmp_path / 'seed0' / 'mae_mto' / 'reconstructions.png').exists()


def test_the_flagship_config():
    from configs import mae, mae_mto

    plain, flagship = mae.get_config('vit_l'), mae_mto.get_config('vit_l')
    assert isinstance(plain, ConfigDict)
    assert (plain.model.size, plain.epochs, flagship.epochs) == ('l', 800, 400)
    assert flagship.mto.enabled
    mto = flagship.mto
    assert (mto.recalibration, mto.w_spa, mto.w_e, mto.w_r) == ('adaptive', 3.0, 0.03, 0.3)
    tuned = mae_mto.get_config('vit_l,tuned')
    assert (tuned.model.size, tuned.mto.recalibration, tuned.mto.w_r) == ('l', 'ramp', 0)
    with pytest.raises(ValueError, match=r"'best'; it must be one of full, tuned"):
        mae_mto.get_config('vit_l,best')
    with pytest.raises(ValueError, match='vit_xl'):
        mae.get_config('vit_xl')


class Distillation:
    """An objective with constants: a frozen matrix that parameters are drawn to."""

    tensor_axes = ()

    def __init__(self, target):
        self.constants = {'target': target}

    def init(self, key):
        return {'w': jax.random.normal(key, self.constants['target'].shape)}, {}

    def loss(self, params, model_state, constants, batch, key, clock):
        loss = jnp.square(params['w'] - constants['target']).mean() * batch['image'].mean()
        return loss, ({}, {})

    def after_update(self, params, model_state, statistics, clock):
        return model_state


def test_constants_are_not_donated(config):
    """They are an argument of the step: still there after it, and no part of the state."""
    config.optim.warmup_epochs, config.optim.base_lr, config.optim.weight_decay = 0.0, 1.0, 0.0
    target = jnp.arange(6.0).reshape(2, 3)
    shapes = {'image': jax.ShapeDtypeStruct((8,), np.float32)}
    training = job.assemble(Distillation(target), config.optim, 32, 200, 10, shapes)
    mesh = parallel.make_mesh(1)
    with jax.set_mesh(mesh):
        step, state = training.step(mesh), training.create(0)
        for _ in range(200):
            meter = train_state.Meter.empty(training.names)
            state, meter = step(state, meter, training.objective.constants, {'image': jnp.ones(8)}, jax.random.key(0))
    assert not target.is_deleted()
    assert float(meter.sums['loss']) < 0.1
    np.testing.assert_allclose(state.params['w'], target, atol=0.5)


@pytest.mark.parametrize('left', ['attends', 'stacks'])
def test_a_method_that_gives_mto_nothing_is_refused(config, monkeypatch, left):
    """MTO would do nothing there, without a word."""
    config.mto.enabled, config.mto.recalibration = True, 'ramp'
    if left == 'attends':
        monkeypatch.setattr(methods, 'attends', lambda *_: None)
    else:
        real = mae.MAE.loss
        monkeypatch.setattr(mae.MAE, 'loss', lambda *args, **more: real(*args, **more).replace(stacks={}))
    with pytest.raises(UserError, match=r'MAE gives it nothing to read.*methods\.attends'):
        job.prepare(config, 100)
    config.mto.enabled = False
    job.prepare(config, 100)
