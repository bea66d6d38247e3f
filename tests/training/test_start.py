"""Where a training starts: resume, resume from another workdir, initialise from weights, scratch."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from configs import base
from mto_jax.data import sources
from mto_jax.errors import UserError
from mto_jax.runtime.log import read_history
from mto_jax.studies import study
from mto_jax.studies.table import read
from mto_jax.tasks import pretrain, train
from mto_jax.training import checkpoint, start, train_state
from tests.conftest import shrink


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run of 8 steps with checkpoints at 4, 6, 8: config, workdir, state."""
    c = shrink(base.get_config())
    c.model.dtype, c.checkpoints.keep = 'float32', 3
    workdir = tmp_path_factory.mktemp('finished')
    return c, workdir, pretrain.run(c, workdir)


def fresh(config):
    return ConfigDict(config.to_dict())


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_another_workdir_goes_on_bitwise(finished, tmp_path, capsys):
    config, workdir, whole = finished
    c = fresh(config)
    c.resume_from = str(workdir / 'checkpoints' / '4')
    before = sorted(workdir.rglob('*'))
    state = pretrain.run(c, tmp_path)
    assert 'resuming at step 4' in capsys.readouterr().out
    assert same(state, whole)
    assert sorted(workdir.rglob('*')) == before
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [6, 8]


def test_another_config_is_refused(finished, tmp_path):
    config, workdir, _ = finished
    c = fresh(config)
    c.resume_from, c.mask_ratio = str(workdir / 'checkpoints' / '6'), 0.5
    with pytest.raises(UserError, match=r'mask_ratio: 0\.75 there, 0\.5 now'):
        pretrain.run(c, tmp_path)
    assert not (tmp_path / 'config.json').exists()
    c.resume_anyway = True
    assert int(pretrain.run(c, tmp_path).step) == 8


@pytest.mark.parametrize('elsewhere', [False, True], ids=['own workdir', 'resume_from'])
@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (
            {'batch_size': 64},
            'after 2 epochs of 4 steps; with batch_size from 32 to 64 an epoch has 2 steps, and step 8',
        ),
        ({'batch_size': 16}, 'batch_size from 32 to 16 an epoch has 8 steps, and step 8 would be after 1'),
        ({'data.train_split': 'train[:70]'}, r"data.train_split from 'train\[:130\]' to 'train\[:70\]' an epoch has 2"),
        ({}, 'ends a training of 2 epochs, at a rate of .* epochs=4 would take it back up'),
    ],
    ids=['larger batch', 'smaller batch', 'other images', 'longer'],
)
def test_a_step_that_would_mean_another_place_is_refused(finished, tmp_path, changes, words, elsewhere):
    """Whichever way the run goes on, and nothing is written; the way out that is named is one."""
    config, workdir, _ = finished
    c, run = fresh(config), tmp_path / 'run'
    c.update_from_flattened_dict(changes)
    c.epochs, c.resume_anyway = 4.0, True
    if elsewhere:
        c.resume_from = str(workdir)
    else:
        shutil.copytree(workdir, run)
    with pytest.raises(UserError, match=words) as e:
        pretrain.run(c, run)
    assert f'--config.init_from={c.resume_from or run}/checkpoints/8' in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert elsewhere or (run / 'config.json').read_text() == (workdir / 'config.json').read_text()


def test_other_images_in_the_same_place_are_refused(finished, tmp_path, monkeypatch):
    """As where a folder has grown: no field tells."""
    config, workdir, _ = finished
    c, about = fresh(config), checkpoint.Checkpointer.about
    c.resume_from = str(workdir / 'checkpoints' / '4')
    monkeypatch.setattr(checkpoint.Checkpointer, 'about', lambda *a: about(*a) | {'steps_per_epoch': 8})
    with pytest.raises(UserError, match=r'is after 0\.5 epochs of 8 steps; with other images in the same place an'):
        pretrain.run(c, tmp_path)


def test_images_that_were_replaced_are_refused(finished, tmp_path, monkeypatch, capsys):
    """As many as there were."""
    config, workdir, whole = finished
    c = fresh(config)
    c.resume_from = str(workdir / 'checkpoints' / '4')
    monkeypatch.setattr(sources.Tfds, 'contents', '130 others')
    with pytest.raises(UserError, match=r"was trained on 130 examples of .*; 'train\[:130\]' has 130 others now"):
        pretrain.run(c, tmp_path)
    assert not (tmp_path / 'config.json').exists()
    c.resume_anyway = True
    assert int(pretrain.run(c, tmp_path).step) == int(whole.step)
    assert 'images: 130 examples of' in capsys.readouterr().out


def test_a_finished_run_goes_on_at_the_rate_where_it_ended(finished, tmp_path):
    config, workdir, _ = finished
    c = fresh(config)
    c.epochs, c.resume_anyway, c.resume_from = 3.0, True, str(workdir)
    with pytest.raises(UserError, match='the rate where it ended') as e:
        pretrain.run(c, tmp_path)
    named = dict(re.findall(r'--config\.(optim\.\w+)=(\S+)', str(e.value)))
    c.update_from_flattened_dict({n: int(v) if v == '0' else float(v) for n, v in named.items()})
    assert int(pretrain.run(c, tmp_path).step) == 12
    rates = [r['learning_rate'] for r in read_history(tmp_path) if 'learning_rate' in r]
    assert rates == pytest.approx([float(named['optim.base_lr'])] * len(rates))


def test_more_and_fewer_epochs(finished, tmp_path, capsys):
    """Of a run that has not ended more epochs are taken; where as many are there, that is said."""
    config, workdir, _ = finished
    c = fresh(config)
    c.epochs, c.resume_anyway, c.resume_from = 2.5, True, str(workdir / 'checkpoints' / '4')
    assert int(pretrain.run(c, tmp_path).step) == 10
    pretrain.run(c, tmp_path)
    assert '= 10 steps on 1 cpu device(s), all done already' in capsys.readouterr().out
    c.epochs = 1.5
    with pytest.raises(UserError, match=f'epochs is 1.5, and {tmp_path}/checkpoints/10 is after 2.5: that is done al'):
        pretrain.run(c, tmp_path)


def test_weights_with_a_fresh_optimizer(finished, tmp_path, capsys, monkeypatch):
    """From step 0; and a run that has a checkpoint of its own resumes there, not at the weights."""
    config, workdir, whole = finished
    c = fresh(config)
    c.init_from, c.epochs = str(workdir), 1.0
    begun = []
    real = train.begin

    def begin(*args):
        state, about = real(*args)
        begun.append(jax.device_get(state))
        return state, about

    monkeypatch.setattr(train, 'begin', begin)
    state = pretrain.run(c, tmp_path)
    assert f'weights of {workdir} at step 8' in capsys.readouterr().out
    assert same(begun[0].params, whole.params)
    assert int(begun[0].step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(begun[0].opt_state))
    assert not same(state.params, whole.params)
    assert same(pretrain.run(c, tmp_path), state)
    assert int(begun[1].step) == 4


@pytest.mark.parametrize('field', ['init_from', 'resume_from'])
def test_no_checkpoint_there(config, tmp_path, field):
    config[field] = str(tmp_path / 'none')
    with pytest.raises(UserError, match=f'{field} is .*no checkpoint there.*config.{field}'):
        pretrain.run(config, tmp_path / 'run')


@pytest.mark.parametrize('repeated', [False, True])
def test_a_run_from_weights_goes_on_elsewhere(finished, tmp_path, repeated):
    """Whether the same command is given with `resume_from` or only that: its state has the weights it began with."""
    config, workdir, _ = finished
    c = fresh(config)
    c.init_from, c.checkpoints.every = str(workdir), 4
    whole = pretrain.run(c, tmp_path / 'first')
    c.resume_from = str(tmp_path / 'first' / 'checkpoints' / '4')
    c.init_from = c.init_from if repeated else ''
    assert same(pretrain.run(c, tmp_path / 'second'), whole)


def test_weights_of_another_model(finished, tmp_path):
    config, workdir, _ = finished
    c = fresh(config)
    c.init_from, c.model.width = str(workdir), 32
    words = r'(?s)is of another model.*\.\.\. and \d+ more\n.*differ in\n  model\.width: 16 there, 32 now$'
    with pytest.raises(UserError, match=words):
        pretrain.run(c, tmp_path)


def test_a_teacher_comes_with_the_weights(tmp_path):
    """Written and read on its own, without a training."""
    own = {'params': {'w': jnp.arange(3.0)}, 'teacher': {'w': jnp.arange(3.0) + 1}}
    state = train_state.TrainState(jnp.int32(5), own['params'], {'count': jnp.int32(5)}, {'teacher': own['teacher']})
    saver = checkpoint.Checkpointer(tmp_path, entries=state.model_state)
    saver.save(state, {}, None, {})
    saver.close()
    zero = jax.tree.map(jnp.zeros_like, state)
    c = base.get_config()
    c.init_from = str(tmp_path)
    found = start.initialised(c, zero)
    assert same(found.params, own['params'])
    assert same(found.model_state['teacher'], own['teacher'])
    assert int(found.step) == 0


def test_members_of_a_study(finished, tmp_path):
    """Every seed starts from the given weights."""
    config, workdir, _ = finished
    c = fresh(config)
    c.data.crop, c.epochs, c.init_from = 'resize', 1.0, str(workdir)
    c.study.variants, c.study.seeds, c.study.seeds_at_once = {'baseline': {}}, (0, 1), 2
    rows = read(study.run(c, tmp_path / 'study'))
    untrained = [r['reconstruction'] for r in rows if r['epoch'] == '0']
    assert len(untrained) == 2
    assert untrained[0] == untrained[1]
    c.resume_from = str(workdir)
    with pytest.raises(UserError, match='resume_from'):
        study.run(c, tmp_path / 'study')


def test_constants_are_written_once(tmp_path):
    """Beside the checkpoints, and compared when the run resumes."""
    constants = {'encoder': {'w': jnp.arange(6.0).reshape(2, 3)}}
    saver = checkpoint.Checkpointer(tmp_path)
    saver.keep_constants({})
    assert not (tmp_path / 'constants').exists()
    saver.keep_constants(constants)
    saver.keep_constants(constants)
    with ocp.StandardCheckpointer() as reader:
        assert same(reader.restore(tmp_path / 'constants'), constants)
    with pytest.raises(UserError, match=r'holds other values of encoder/w \(1 of 1 arrays\)'):
        saver.keep_constants({'encoder': {'w': constants['encoder']['w'] + 1e-6}})
    saver.close()


def test_no_step_left(finished, tmp_path):
    """Nothing is trained or saved, and it is said so."""
    config, workdir, _ = finished
    c = fresh(config)
    c.resume_from = str(workdir)
    with pytest.raises(UserError, match='at step 8; this training ends at step 8'):
        pretrain.run(c, tmp_path)
    c.resume_from = str(workdir / 'checkpoints' / '5')
    with pytest.raises(UserError, match=r'steps there: 4, 6, 8'):
        pretrain.run(c, tmp_path)
