"""The benchmarks on a CPU in their smallest forms: what their rows hold. Nothing is said of the times."""

import importlib.util
import json
import os
import sys

import pytest

from benchmarks import cpu_peer, guard, step_cost, streamed, studies
from benchmarks import input as pipeline
from mto_jax.config import get_config
from mto_jax.training import job

TORCH = all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


def test_relative_cost_of_a_variant(config, monkeypatch):
    """The baseline's is one; a variant that keeps more for the backward pass takes more memory."""
    monkeypatch.setattr(step_cost, 'STEPS', 1)
    config.data.crop, config.data.train_split, config.epochs = 'resize', 'train[:64]', 1.0
    config.model.depth = config.mae.decoder_depth = 1
    config.study.variants = {'baseline': {}, 'mto': {'mto': {'enabled': True, 'w_spa': 1.0}}, 'left out': {'seed': 1}}
    first, second = step_cost.measure(config, ('mto',), 2)
    assert (first['variant'], first['time'], first['memory']) == ('baseline', 1.0, 1.0)
    assert second['variant'] == 'mto'
    assert second['time'] > 0
    assert second['memory'] >= 1.0
    assert step_cost.step_memory(job.prepare(config, 64)) > 0


def test_ways_to_train_a_study(config, monkeypatch):
    monkeypatch.setattr(studies, 'STEPS', 1)
    config.data.crop, config.data.train_split, config.epochs = 'resize', 'train[:64]', 1.0
    config.model.depth = config.mae.decoder_depth = 1
    rows = {r['way']: r for r in studies.measure(config, 1)}
    assert list(rows) == list(studies.WAYS)
    assert rows['default']['over_default'] == 1.0
    for r in rows.values():
        assert r['over_default'] * rows['default']['seconds'] == pytest.approx(r['seconds'])
        assert r['runs_per_core_hour'] * r['seconds'] * r['cores'] * studies.EPOCH == pytest.approx(3600)


@pytest.mark.slow
def test_what_a_step_is_made_of(monkeypatch):
    monkeypatch.setattr(cpu_peer.cpu, 'keep_memory', lambda: None)
    side = cpu_peer.Ours('ours', 'tiny', 1)
    side.time(1)
    found = side.profile(2)
    spent = [ms for ms, _ in found.values()]
    assert spent == sorted(spent, reverse=True)
    products = sum(count for kind, (_, count) in found.items() if kind in ('dot', 'ynn_fusion'))
    # Of each of the 4 blocks: 6 products, and 2 of the gradients of each, at least.
    assert products >= 4 * 18


@pytest.mark.slow
def test_streamed_training():
    row = streamed.measure(64, 1, 1)
    limit = 1 / (1 / row['decode'] + 1 / row['resident'])
    assert row['over_limit'] == pytest.approx(row['streamed'] / limit)


@pytest.mark.slow
def test_parts_of_the_input_pipeline():
    rows = {r['name']: r for r in pipeline.measure(64, 1, 1, pipeline.CONTESTANTS[:-1])}
    assert list(rows) == ['read', 'decode', 'full', 'device']
    assert all(r['images_per_s'] > 0 for r in rows.values())
    assert rows['decode']['over_decode'] == 1.0
    assert rows['full']['images'] == pipeline.BATCH
    assert 'over_torch' not in rows['full']
    assert rows['device']['bytes'] == 4 * rows['full']['bytes'] == 4 * 224 * 224 * 3


@pytest.mark.parametrize('resize', ['host', 'device'])
def test_crops_against_pil(tmp_path, resize):
    """Our crops are close to PIL's of the same windows; those of other windows are not."""
    pipeline.make(tmp_path, 4)
    assert pipeline.psnr(tmp_path, 4, resize) > 38
    crop = pipeline.Image.Image.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Image.Image, 'crop', lambda image, box: crop(image, (0, 0, 100, 100)))
        assert pipeline.psnr(tmp_path, 4, resize) < 25


def test_cpu_seconds_count_children(tmp_path):
    """More than nothing, and of a process that is not there nothing."""
    assert pipeline.cpu_seconds(os.getpid()) > 0.1
    assert pipeline.cpu_seconds(2**30) == 0


@pytest.mark.peers
def test_the_step_against_its_peer(monkeypatch):
    """The losses of the same weights agree, or it raises; then a row each."""
    if not TORCH:
        pytest.skip('PyTorch or transformers is not installed (requirements-peers.txt)')
    monkeypatch.setattr(cpu_peer, 'SECONDS', 0.01)
    ours, peer = cpu_peer.measure('tiny', 2, 1, cpu_peer.CONTESTANTS[:2])
    assert (ours['name'], ours['ours_over_it'], peer['name']) == ('ours', 1.0, 'peer, eager')
    assert 0 < peer['ours_over_it_min'] <= peer['ours_over_it'] <= peer['ours_over_it_max']
    assert peer['peak_gib'] > 0.1


def test_sizes_have_configs():
    for size in cpu_peer.SIZES:
        config = cpu_peer.config_of(size)
        assert (config.model.dtype, config.mto.enabled) == ('float32', False)
        assert set(config) == set(get_config())


def test_guard_names_what_fell(tmp_path, monkeypatch, capsys):
    """More than a tenth above the stored ratio fell; what is new or left out is neither, and --write keeps it."""
    found = {'a': 1.0, 'b': 2.0}
    for part in ('mto_costs', 'input_pipeline', 'against_peers'):
        monkeypatch.setattr(guard, part, lambda *_: {})
    monkeypatch.setattr(guard, 'studies_on_cpu', lambda: found)
    monkeypatch.setattr(guard, 'STORED', tmp_path / 'guard.json')
    monkeypatch.setattr(sys, 'argv', ['guard', '--write'])
    guard.main()
    capsys.readouterr()
    found = {'a': 1.09, 'b': 2.21, 'new': 9.0}
    monkeypatch.setattr(sys, 'argv', ['guard'])
    guard.main()
    rows = {line.split()[-1]: line for line in capsys.readouterr().out.splitlines()}
    assert 'ok' in rows['a']
    assert 'FELL' in rows['b']
    assert not {'ok', 'FELL'} & set(rows['new'].split())
    assert json.loads((tmp_path / 'guard.json').read_text()) == {'a': 1.0, 'b': 2.0}
