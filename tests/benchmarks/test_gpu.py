"""The GPU benchmark in its tiny form on a CPU."""

import importlib.util

import numpy as np
import pytest

from benchmarks import gpu

TORCH = all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


@pytest.mark.parametrize('peer', [False, pytest.param(True, marks=pytest.mark.peers)])
def test_rows_of_a_part(tmp_path, monkeypatch, peer):
    """One row per variant, with what a table needs; a second start finds the part measured."""
    if peer and not TORCH:
        pytest.skip('PyTorch or transformers is not installed (requirements-peers.txt)')
    monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
    name = 'peer, eager' if peer else 'ours, mto'
    monkeypatch.setattr(gpu, 'PARTS', {'part': gpu.Part('mae', 'b', 256, (name,))})
    out = tmp_path / 'rows.jsonl'
    for _ in range(2):
        gpu.run(out, ['part'], float('inf'), tiny=True, commit='abc')
    (row,) = gpu.read(out)
    assert (row['part'], row['name'], row['batch'], row['commit']) == ('part', name, gpu.TINY['batch'], 'abc')
    assert 0 < row['ms_min'] <= row['ms'] <= row['ms_max']
    assert row['images_per_s'] == pytest.approx(1000 * row['batch'] / row['ms'])
    assert row['rounds'] == gpu.ROUNDS
    assert np.isfinite(row['loss'])
    assert ('torch' if peer else 'jax') in row['versions']


def test_a_variant_that_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'PARTS', {'part': gpu.Part('no_such_method', 'b', 256, ('ours',))})
    gpu.run(tmp_path / 'rows.jsonl', ['part'], float('inf'), tiny=True, commit='')
    (row,) = gpu.read(tmp_path / 'rows.jsonl')
    assert 'no_such_method' in row['error']
    assert 'ms' not in row


def test_largest_batch():
    row = {'part': 'a', 'name': 'ours', 'batch': 256, 'memory_gib': 21.0, 'state_gib': 1.0, 'card_gib': 80.0}
    assert gpu.largest(['ours'], 'a', [row], tiny=False) == 896  # (0.93 * 80 - 1) / (20 / 256) = 939
    assert gpu.largest(['peer'], 'a', [row], tiny=False) == 0


def test_account_of_a_profile():
    """Each kernel finds its operation in the program; library kernels are known by their names."""
    program = """
  %loop_add.1 = f32[2]{0} fusion(%a), calls=%c, metadata={op_name="jit(step)/jvp(M)/block0/norm1/add" line=1}
  ROOT %loop_mul = f32[2]{0} fusion(%a), metadata={op_name="jit(step)/jvp(M)/block0/mul"}
"""
    times = {'loop_mul': 1.0, 'nvjet_sm90': 4.0, 'loop_add_1': 2.0, 'cudnn_flash': 3.0, 'Memset': 0.5}
    kernels = gpu.with_operations(times, program)
    assert kernels[2] == [2.0, 'loop_add_1', 'jit(step)/jvp(M)/block0/norm1/add']
    assert gpu.account(kernels) == {
        'matrix products': 4.0,
        'fused attention': 3.0,
        'layer norms and residuals': 2.0,
        'GELU': 1.0,
        'optimizer, norms of gradients, other': 0.5,
    }
