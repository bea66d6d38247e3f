"""Counted FLOPs against published figures, and what is read off a compiled program."""

import os
import subprocess

import jax
import numpy as np
import pytest

from configs import conmim, mae, simmim
from mto_jax.tools import compile_tpu
from mto_jax.training import job, perf

PROGRAM = """\
HloModule step, entry_computation_layout={()->f32[]}

%fused (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%p)
}

%body.1 (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %f.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
  %g = bf16[4,2]{1,0} all-gather(%y), dimensions={0}
  %deep = (s32[]) while(%z), condition=%cond, body=%body.2, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = (s32[], f32[8,4]) tuple(%i, %f.1)
}

%body.2 (t: (s32[])) -> (s32[]) {
  ROOT %h = (s32[]) fusion(%x), calls=%fused, backend_config={"window_config":{"estimated_cycles":"7"}}
}

%few (c: (s32[])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%i, %constant.9), direction=LT
}

%begun (p: f32[4]) -> (f32[4], f32[4]) {
  %ar = f32[4]{0} all-reduce(%p), channel_id=7, to_apply=%sum
  ROOT %c = (f32[4], f32[4]) custom-call(%ar), custom_call_target="AsyncCollectiveStart"
}

%ended (p: f32[4]) -> f32[4] {
  %ar.2 = f32[4]{0} all-reduce(%p), channel_id=7, to_apply=%sum
  ROOT %c.2 = f32[4] custom-call(%ar.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8]) -> f32[] {
  %start = (f32[4], f32[4]) fusion(%e), calls=%begun
  %end = f32[4] fusion(%start), calls=%ended
  %w = (s32[], f32[8,4]) while(%a), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %w.2 = (s32[]) while(%b), condition=%few, body=%body.2
  %all-reduce.3 = (f32[]{:T(128)}, f32[6,2]{1,0}) all-reduce(%b, %c), to_apply=%sum
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%d), dimensions={0}
  %done = f32[8]{0} all-gather-done(%ag)
  ROOT %k = f32[] fusion(%e), calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
}
"""


def test_a_compiled_program_is_read():
    """5 turns of 10 + 3 x 7 cycles, 4 of 7, and 100; gathers of 16 bytes 5 times and of 32 once, begun ahead;
    reductions of 4 + 48, and of 16 that is begun in one fusion and ended in another."""
    assert compile_tpu.read_hlo(PROGRAM) == (283, {'all-reduce': [2, 68, 16], 'all-gather': [6, 112, 32]}, [])


@pytest.mark.parametrize(
    ('known', 'unknown', 'cycles', 'words'),
    [
        ('direction=LT', 'direction=NE', 262, 'a loop of unknown length, counted once'),  # 3 turns of 7 fewer
        ('"AsyncCollectiveDone"', '"tpu_custom_call"', 283, '1 calls of a kernel of unknown cost'),
    ],
)
def test_the_estimate_names_its_omissions(known, unknown, cycles, words):
    found = compile_tpu.read_hlo(PROGRAM.replace(known, unknown))
    assert (found[0], found[2]) == (cycles, [words])


@pytest.mark.parametrize(
    ('error', 'word'),
    [
        ('RESOURCE_EXHAUSTED: Allocation failed. Used 19.1G of 15.75G hbm. Exceeded by 3G', 'needs 19.1G of 15.75G'),
        (
            'RESOURCE_EXHAUSTED: Ran out: the total memory required for HLO temporaries (20.99G) exceeds available HBM '
            '(15.75G).',
            'alone take 20.99G of 15.75G',
        ),
        ('RESOURCE_EXHAUSTED: No room at all\nand a long list', 'No room at all'),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(error, word):
    """The compiler's own words for too little memory."""
    assert compile_tpu._reason(error).endswith(word)


def test_matrix_products_are_counted():
    """Products in a scan, a batch and a nested jit, against the arithmetic by hand."""

    def f(a, b):
        y = jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=3)[0]
        return jax.jit(lambda x: jax.numpy.einsum('bij,bjk->bik', x, x))(y[None].repeat(2, 0)).sum()

    a = np.ones((4, 4), np.float32)
    assert perf.matmul_flops(f, a, a) == 3 * 2 * 4**3 + 2 * 2 * 4**3


@pytest.mark.parametrize(
    ('module', 'size', 'published'),
    [(mae, 'vit_b', 58.5), (mae, 'vit_l', 124.2), (mae, 'vit_h', 291), (simmim, 'b', 105.3)],
)
def test_published_flops(module, size, published):
    """GFLOPs per image of forward and backward pass, as computed from the papers' architectures."""
    config = module.get_config(size) if module is mae else module.get_config()
    assert perf.train_flops(job.prepare(config, 5000)) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize('remat', [False, True])
def test_flops_of_a_method_with_a_teacher(remat):
    """ConMIM, ViT-B: student and teacher forward, the student alone backward, and no recomputation."""
    config = conmim.get_config('vit_b')
    config.model.remat = remat
    encoder = 2 * (196 * 3 * 16**2 * 768 + 12 * (197 * 12 * 768**2 + 2 * 197**2 * 768))
    projector = 2 * 197 * (768 * 4096 + 4096**2 + 4096 * 256)
    by_hand = 4 * (encoder + projector) + 3 * 2 * 196**2 * 256
    assert perf.train_flops(job.prepare(config, 5000)) == pytest.approx(by_hand, rel=0.01)


TPU_PYTHON = os.environ.get('MTO_JAX_TPU_PYTHON')
NO_LIBTPU = 'needs libtpu; MTO_JAX_TPU_PYTHON names an interpreter that has it'


def compile_for(topology, *args, config='mae_mto'):
    command = [TPU_PYTHON, '-m', 'mto_jax.tools.compile_tpu', f'--config=configs/{config}.py', f'--topology={topology}']
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # those of conftest.py are for CPUs
    # A quarter of the time, for a slower program; benchmarks/tpu.sh and docs/tpu.md have those that would be run.
    env |= {'JAX_OPTIMIZATION_LEVEL': 'O0', 'JAX_EXEC_TIME_OPTIMIZATION_EFFORT': '-1.0'}
    command += args
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not TPU_PYTHON, reason=NO_LIBTPU)
@pytest.mark.parametrize(
    ('config', 'topology', 'batch', 'each', 'fields'),
    [
        ('mae_mto', 'v5e:8x8', 4096, 64, ()),
        ('mae_mto', 'v4:4x4x4', 4096, 64, ('model.depth=2', 'mae.decoder_depth=3', 'mto.w_e=0.1', 'mto.w_r=1.0')),
        ('bootmae_mto', 'v5e:2x2', 256, 64, ('batch_size=256', 'model.depth=4')),
        ('conmim_mto', 'v5e:2x2', 256, 64, ('batch_size=256', 'model.depth=4')),
        ('finetune', 'v5e:2x2', 256, 64, ('batch_size=256',)),
        ('linear_lars', 'v5e:2x2', 2048, 512, ('batch_size=2048',)),
    ],
)
def test_the_methods_compile_for_a_slice(config, topology, batch, each, fields):
    """ViT-B as shipped; the flagship also with losses that read every decoder block. BootMAE and ConMIM with fewer
    blocks, which are alike (benchmarks/results/tpu.txt has them whole)."""
    out = compile_for(topology, *(f'--config.{f}' for f in fields), config=config)
    assert 'fits: yes' in out.stdout, out.stderr[-2000:]
    assert f'batch: {batch} ({each} per chip)' in out.stdout
    assert 'all-reduce' in out.stdout


@pytest.mark.slow
@pytest.mark.skipif(not TPU_PYTHON, reason=NO_LIBTPU)
def test_a_batch_that_does_not_fit():
    small = ['--config.model.depth=1', '--config.mae.decoder_depth=2']
    out = compile_for('v5e:2x2', '--per_chip_batch=8192', *small)
    assert 'fits: no: ' in out.stdout, out.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not TPU_PYTHON, reason=NO_LIBTPU)
@pytest.mark.parametrize(
    ('config', 'args', 'word'),
    [
        ('mae_mto', ['v9:2x2'], 'v9:2x2'),
        ('mae_mto', ['v5e:3x7'], 'v5e:3x7'),
        ('mae_mto', ['v5e:2x4', '--config.mesh.fsdp=3'], 'mesh.fsdp=3'),
        ('mae_mto', ['v5e:2x4', '--per_chip_batch=8,x'], "--per_chip_batch has 'x'"),
        ('knn', ['v5e:2x4'], "task is 'knn', which trains nothing"),
    ],
)
def test_what_cannot_be_compiled_is_named(config, args, word):
    out = compile_for(*args, config=config)
    assert out.returncode == 2
    assert word in out.stderr.splitlines()[-1]
