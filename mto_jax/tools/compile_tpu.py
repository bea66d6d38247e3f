"""What a training will need on a TPU slice, without one: compiles its real step ahead of time.

    python -m mto_jax.tools.compile_tpu --config=configs/mae_mto.py:vit_l --topology=v5e:16x16 [--per_chip_batch=16,32]

Fine-tunings and probes that are trained work too; without `--config.checkpoint` they are of configs/mae.py's encoder.
Needs `libtpu` (requirements-tpu.txt), no hardware. Prints, for each batch, whether it fits, the bytes per chip, the
collectives, and an estimate of the step's time from the compiler's own cycle counts, which leave out what collectives
cost where they do not overlap. All are the compiler's estimates, not measurements.
"""

import dataclasses
import math
import os
import re
import time

import jax
from absl import flags
from jax.experimental import topologies

from mto_jax import cli, methods
from mto_jax.config import EVALUATIONS, get_config
from mto_jax.errors import UserError
from mto_jax.runtime import parallel
from mto_jax.tasks import pretrained, supervised
from mto_jax.training import job, perf
from mto_jax.training.train_state import Meter

_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:8x8', 'Chip and slice: v4:2x2x4, v5e:16x16, v5p:4x4x8, v6e:8x8, ...')
_BATCHES = flags.DEFINE_list('per_chip_batch', [], "Images per chip and step. Default: the config's batch_size, split.")

IMAGENET = 1_281_167


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, after Google's public documentation ("TPU v4", "v5e", "v5p", "v6e" at cloud.google.com/tpu/docs).

    Attributes:
      memory: bytes of HBM.
      peak: bfloat16 FLOPs per second.
      lanes: multiply-adds a clock of all its matrix units; peak / (2 * lanes) is the clock.
      config: libtpu's name for how its cores are joined; v4's two make one device, as jax wants them.
    """

    memory: float
    peak: float
    lanes: int
    config: str = 'default'

    @property
    def clock(self) -> float:
        return self.peak / (2 * self.lanes)


CHIPS = {
    'v4': Chip(32 * 2**30, 275e12, 8 * 128**2, 'megacore'),
    'v5e': Chip(16 * 2**30, 197e12, 4 * 128**2),
    'v5p': Chip(95 * 2**30, 459e12, 8 * 128**2),
    'v6e': Chip(32 * 2**30, 918e12, 4 * 256**2),
}


def run(config, workdir) -> list[dict]:
    """Compile for each batch and print; returns the rows. `workdir` is not used.

    Raises:
      UserError: for an unknown topology, a mesh or batch that does not fit it, or without libtpu.
    """
    del workdir
    if not EVALUATIONS.get(config.task, True):
        raise UserError(f'task is {config.task!r}, which trains nothing')
    if wrong := [b for b in _BATCHES.value if not b.isdecimal()]:
        raise UserError(f'--per_chip_batch has {wrong[0]!r}; it must be numbers of images, like 16,32')
    prepare_libtpu()
    name = _TOPOLOGY.value
    chip = CHIPS.get(name.partition(':')[0])
    if chip is None:
        raise UserError(
            f'--topology is {name!r}; it must be one of {", ".join(CHIPS)}, a colon and the shape, like v5e:4x8'
        )
    try:
        devices = topologies.get_topology_desc(name, 'tpu', chip_config_name=chip.config).devices
    except Exception as e:
        first = next(iter(str(e).splitlines()), '')
        raise UserError(
            f'--topology={name}: {first}. Needs libtpu (requirements-tpu.txt) and a shape it knows'
        ) from None
    mesh = parallel.make_mesh(**config.mesh, devices=devices)
    rows = []
    for batch in [int(b) * mesh.size for b in _BATCHES.value] or [config.batch_size]:
        config.batch_size = batch
        parallel.check_batch(batch, config.accumulate, mesh)
        rows.append(estimate(config, mesh, chip))
        print('\n'.join(f'{k}: {v}' for k, v in {'topology': name, **rows[-1]}.items()), end='\n\n', flush=True)
    return rows


def prepare_libtpu() -> None:
    """Before libtpu is loaded: no lock against other compilations, no look-up of a machine's own TPU."""
    jax.config.update('jax_platforms', 'cpu')
    os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'none')


def estimate(config, mesh, chip: Chip) -> dict[str, str]:
    """Compile the step of `config` on a mesh of described devices; {what: text}."""
    training = _prepared(config)
    state, batch = training.shapes, training.batch(config.batch_size)
    shardings = training.sharding(mesh)
    meter = jax.eval_shape(lambda: Meter.empty(training.names))
    key = jax.eval_shape(lambda: jax.random.key(0))
    start_time = time.perf_counter()
    flops_per_image = perf.train_flops(training)
    roofline_seconds = flops_per_image * config.batch_size / mesh.size / chip.peak
    out = {
        'mesh': ', '.join(f'{n} {s}' for n, s in mesh.shape.items()),
        'batch': f'{config.batch_size} ({config.batch_size / mesh.size:g} per chip)',
        'parameters and optimizer per chip': f'{_gb(_held(state.params, shardings.params))}, '
        f'{_gb(_held(state.opt_state, shardings.opt_state))}',
        'GFLOPs per image (matrix products, forward + backward)': f'{flops_per_image / 1e9:.1f}',
        'roofline': f'{1e3 * roofline_seconds:.1f} ms per step',
    }
    try:
        with jax.set_mesh(mesh):
            compiled = training.step(mesh).lower(state, meter, training.objective.constants, batch, key).compile()
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        return out | {'fits': f'no: {_reason(str(e))}'}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    extra_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + extra_bytes + memory.generated_code_size_in_bytes
    )
    out |= {
        'fits': f'{"yes" if total <= chip.memory else "no"}: {_gb(total)} of {_gb(chip.memory)}',
        'temporaries per chip': _gb(memory.temp_size_in_bytes),
        'compiled in': f'{time.perf_counter() - start_time:.0f} s',
    }
    cycles, collectives, unknown = read_hlo(text)
    seconds = cycles / chip.clock
    return out | {
        'collectives': ', '.join(
            f'{n} x {kind} ({_gb(size)}, {overlapped / size:.0%} overlapped)'
            for kind, (n, size, overlapped) in collectives.items()
        )
        or 'none',
        'estimated step': f'at least {1e3 * seconds:.1f} ms, with {"; ".join(unknown)}'
        if unknown
        else f'{1e3 * seconds:.1f} ms without exposed collectives, '
        f'{config.batch_size / seconds:.0f} images/s, {roofline_seconds / seconds:.0%} MFU',
    }


def _prepared(config) -> job.Job:
    """The training of `config`; one that starts from a checkpoint needs none here: without, it is of an MAE ViT-B."""
    if config.task not in EVALUATIONS:
        return job.prepare(config, IMAGENET)
    if config.checkpoint:
        start = pretrained.find(config)
    else:
        c = pretrained.merged(get_config().to_dict(), config)
        start = pretrained.Pretrained(c, methods.build(c), methods.build(c))
    return supervised.prepare(start, jax.eval_shape(start.fresh, jax.random.key(0)), IMAGENET)


def _reason(error: str) -> str:
    """How much is missing, of what the compiler says when memory ran out; it has several ways to say so."""
    used = re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', error)
    if used:
        return f'the compiler needs {used[1]} of {used[2]}'
    temporaries = re.search(r'temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)', error)
    if temporaries:
        return f'temporaries alone take {temporaries[1]} of {temporaries[2]}'
    return error.partition('RESOURCE_EXHAUSTED: ')[2].partition('\n')[0]


def _held(tree, shardings) -> int:
    """Bytes of a tree on one device."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _gb(size: float) -> str:
    return f'{size / 2**30:.2f} GiB' if size >= 2**27 else f'{size / 2**20:.2f} MiB'


COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4}


def read_hlo(text: str) -> tuple[int, dict[str, list[int]], list[str]]:
    """From a compiled program: cycles of all it runs, {collective: [count, bytes of its results, overlapped bytes]},
    and what makes the cycles too few, in words.

    What a loop holds counts once a turn; once, where the program does not tell how many turns there are. Of a kernel
    (Pallas') there is no estimate. A collective overlaps with computation if the compiler starts it in one place and
    waits for it in another.
    """
    kernels = text.count('custom_call_target="tpu_custom_call"')
    unknown = [f'{kernels} calls of a kernel of unknown cost'] if kernels else []
    bodies: dict[str, list[str]] = {}
    entry = name = ''
    for line in text.splitlines():
        found = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
        if found:
            name = found[1]
            bodies[name] = []
            entry = name if line.startswith('ENTRY') else entry
        elif name:
            bodies[name].append(line)

    collectives: dict[str, list[int]] = {}
    seen = set()  # channels: what is fused with its start, its steps and its end is written down in each

    def walk(name, times):
        cycles = 0
        split = any('AsyncCollectiveStart' in line for line in bodies.get(name, ()))
        for line in bodies.get(name, ()):
            found = re.match(r'\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(', line)
            if not found:
                continue
            result, op = found[1], found[2]
            own = re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles += times * int(own[1]) if own else 0
            kind = op.removesuffix('-start')
            channel = re.search(r'channel_id=(\d+)', line)
            if kind in COLLECTIVES and not (channel and channel[1] in seen):
                if channel:
                    seen.add(channel[1])
                sizes = [_size(t, dims) for t, dims in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', result)]
                # What starts such a collective returns its operand too.
                paired = op.endswith('-start') and kind != 'all-reduce'
                size = times * (max(sizes) if paired else sum(sizes))
                overlapped = size if split or op.endswith('-start') else 0
                old = collectives.get(kind, (0, 0, 0))
                collectives[kind] = [a + b for a, b in zip(old, (times, size, overlapped), strict=True)]
            turns = 1
            if op == 'while':
                turns = _turns(line, bodies)
                if turns is None:
                    unknown.append('a loop of unknown length, counted once')
                    turns = 1
                inner = re.findall(r'body=%?([\w.\-]+)', line)
            elif op in ('call', 'fusion', 'async-start', 'conditional'):
                inner = re.findall(r'(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)', line)
            else:
                inner = []
            cycles += sum(walk(other, times * turns) for other in inner)
        return cycles

    return walk(entry, 1), collectives, unknown


def _turns(loop: str, bodies: dict[str, list[str]]) -> int | None:
    """How many turns a loop has: said on its line, or the number that its condition compares a counter from 0 with;
    None where neither is there."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    if known:
        return int(known[1])
    condition = re.search(r'condition=%?([\w.\-]+)', loop)[1]
    text = '\n'.join(bodies.get(condition, ()))
    bounds = re.findall(r'= s32\[\]\S* constant\((\d+)\)', text)
    return int(bounds[0]) if len(bounds) == 1 and text.count('direction=LT') == 1 else None


def _size(dtype: str, dims: str) -> int:
    return BYTES.get(dtype, 4) * math.prod(int(d) for d in dims.split(',') if d)


if __name__ == '__main__':
    cli.start(run)
