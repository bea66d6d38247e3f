"""What tests of evaluations that train share: a pre-trained run, and a config cut down for it."""

import shutil

import pytest

from configs import base
from mto_jax import tasks
from mto_jax.tasks import pretrain
from mto_jax.training import checkpoint
from tests.conftest import shrink


@pytest.fixture(scope='session')
def pretrained(tmp_path_factory):
    """The workdir of a finished pre-training."""
    c = shrink(base.get_config())
    c.model.dtype, c.epochs, c.optim.warmup_epochs = 'float32', 0.5, 0.0
    folder = tmp_path_factory.mktemp('pretrained') / 'run'
    pretrain.run(c, folder)
    return folder


def cut_down(c, pretrained):
    """A shipped config of an evaluation that trains, from that run, 8 steps long."""
    c.checkpoint = str(pretrained)
    c.data.crop_area, c.data.val_split = (0.5, 1.0), 'train[130:190]'
    c.batch_size, c.epochs, c.optim.warmup_epochs, c.allow_cpu = 32, 2.0, 0.5, True
    if c.task == 'probe':
        c.probe.group = 16
    if c.probe.head == 'attentive':
        c.probe.heads = 2
    c.model.dtype, c.mesh.data = 'float32', 1
    c.log_every, c.checkpoints.every, c.checkpoints.keep = 3, 4, 9
    c.eval.every_epochs, c.eval.batch_size = 1.0, 32
    return c


def check_resumed(c, whole, part, out, capsys):
    """Stopped at step 4 of 8, the run in `whole`, whose report is `out`, ends in `part` with the same bits."""
    assert 'step 4 validation: top1' in capsys.readouterr().out
    shutil.copytree(whole, part)
    shutil.rmtree(part / 'checkpoints' / '8')
    assert tasks.run(c, part) == out
    assert 'resuming at step 4' in capsys.readouterr().out
    sums = [checkpoint.Checkpointer(d, read_only=True).about(8)['checksums'] for d in (whole, part)]
    assert sums[0] == sums[1]
