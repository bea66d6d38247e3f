"""Kills a real training at random moments and damages its checkpoints; it must end bitwise like an undisturbed one.

    python benchmarks/faults.py [--kills=32] [--seed=0] [--out=DIR]

The training is `main.py` in a process of its own: a small MAE with MTO on the embedded images. SIGKILL comes at random
steps; every third time it waits until a save is on its way (its unfinished folder is there). Between lives the newest
checkpoint is damaged in each of five ways. After each life the training must resume at its newest whole checkpoint.
The last line counts what was done. docs/reliability.md has the figures.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS_PER_EPOCH = 9  # 300 images in batches of 32
EVERY = 4  # steps between checkpoints
FIELDS = {
    'task': 'pretrain',
    'data.train_split': 'train[:300]',
    'data.val_split': 'train[300:400]',
    'model.patch_size': 7,
    'model.depth': 2,
    'mae.decoder_width': 32,
    'model.drop_path': 0.1,
    'batch_size': 32,
    'optim.warmup_epochs': 1.0,
    'mto.w_spa': 0.1,
    'log_every': 1,
    'diagnose_every': 0,
    'eval.every_epochs': 0.0,
    'checkpoints.every': EVERY,
    'checkpoints.keep': 3,
}
DAMAGES = ('truncate', 'delete', 'flip', 'empty', 'metadata')


def start(workdir: Path, epochs: int) -> subprocess.Popen:
    fields = FIELDS | {'epochs': float(epochs)}
    args = [f'--config.{k}={v}' for k, v in fields.items()]
    command = [sys.executable, 'main.py', '--config=configs/quickstart.py', f'--workdir={workdir}', *args]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'xla')}
    env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    log = (workdir.parent / f'{workdir.name}.log').open('w')
    with log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def said(workdir: Path) -> str:
    return (workdir.parent / f'{workdir.name}.log').read_text()


def finished(workdir: Path) -> list[int]:
    """Steps of the checkpoints whose save was over."""
    return sorted(int(p.name) for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit())


def saving(workdir: Path) -> str:
    """The name of a save's unfinished folder, or ''."""
    return next((p.name for p in (workdir / 'checkpoints').glob('*orbax-checkpoint-tmp*')), '')


def live(workdir: Path, epochs: int, until: int, in_save: bool, rng: random.Random, saved=0) -> tuple[str, str]:
    """One life: kill it once it has reported step `until` and has `saved` checkpoints.

    Returns:
      What it said, and which save was cut ('': none).
    """
    process = start(workdir, epochs)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        steps = re.findall(r'^step (\d+)/', said(workdir), re.M)
        there = len(finished(workdir)) >= saved and (not in_save or saving(workdir))
        if steps and int(steps[-1]) >= until and there:
            break
        time.sleep(0.002)
    if not in_save:
        time.sleep(rng.uniform(0, 0.2))
    process.kill()
    process.wait()
    return said(workdir), saving(workdir)


def damage(step: Path, way: str, rng: random.Random) -> str:
    """Damage one checkpoint; returns what was done."""
    files = sorted((p for p in step.rglob('*') if p.is_file() and '/d/' in str(p)), key=lambda p: p.stat().st_size)
    largest = files[-1]
    # All of them, for some hold what a later file of the same save has replaced, and are never read.
    if way == 'truncate':
        for path in files:
            os.truncate(path, path.stat().st_size // 2)
        return 'every data file cut to half'
    elif way == 'delete':
        for path in files:
            path.unlink()
        return 'every data file removed'
    elif way == 'flip':
        content = bytearray(largest.read_bytes())
        position = rng.randrange(len(content))
        content[position] ^= 1 << rng.randrange(8)
        largest.write_bytes(content)
        return f'one bit of byte {position} of {len(content)} in {largest.relative_to(step)}'
    elif way == 'empty':
        shutil.rmtree(step)
        step.mkdir()
        return 'everything in it removed'
    elif way == 'metadata':
        for path in [*step.rglob('_METADATA'), *step.rglob('_CHECKPOINT_METADATA')]:
            path.unlink()
        return 'its metadata files removed'
    return f'{largest.relative_to(step)}'


def same(a: Path, b: Path, step: int) -> bool:
    """True where every stored array of two checkpoints has the same bits."""
    from mto_jax.training import checkpoint

    sums = [checkpoint.Checkpointer(d, read_only=True).about(step)['checksums'] for d in (a, b)]
    return sums[0] == sums[1]


def run(kills: int, seed: int, place: Path, ways=DAMAGES) -> dict[str, int]:
    """Disturb a training, and compare it with an undisturbed one.

    Returns:
      Counts. Raises AssertionError where anything did not hold.
    """
    rng = random.Random(seed)
    epochs = max(4, 2 * kills * EVERY // STEPS_PER_EPOCH)
    total = epochs * STEPS_PER_EPOCH
    place.mkdir(parents=True, exist_ok=True)
    whole, part = place / 'whole', place / 'part'
    assert start(whole, epochs).wait() == 0, said(whole)
    print(f'undisturbed: {total} steps', flush=True)
    counts = dict.fromkeys(('kills', 'in_a_save', 'damages', 'damages_noticed', 'flips_of_unused_bits'), 0)
    moments = sorted(rng.sample(range(2 * EVERY + 1, total - 2 * EVERY), kills))
    damages = dict(zip(sorted(rng.sample(range(kills // 2, kills), len(ways))), ways, strict=True))
    expected = 0
    for i, moment in enumerate(moments):
        # Before the newest checkpoint is damaged, one more must be there to go back to.
        words, cut = live(part, epochs, moment, i % 3 == 0, rng, saved=2 if i in damages else 0)
        found = re.search(r'resuming at step (\d+)', words)
        resumed = int(found[1]) if found else 0
        assert resumed == expected, f'life {i}: resumed at {resumed}, expected {expected}\n{words}'
        counts['kills'] += 1
        counts['in_a_save'] += bool(cut)
        steps = finished(part)
        expected = steps[-1] if steps else 0
        reached = re.findall(r'^step (\d+)/', words, re.M)
        print(
            f'life {i}: from step {resumed}, killed after the report of step {reached[-1] if reached else resumed}'
            + (f', inside the save {cut}' if cut else '')
            + f'; whole: {steps}',
            flush=True,
        )
        if i in damages:
            done = damage(part / 'checkpoints' / str(steps[-1]), damages[i], rng)
            counts['damages'] += 1
            expected = steps[-2]
            print(f'  damaged step {steps[-1]}: {damages[i]}, {done}', flush=True)
            words, _ = live(part, epochs, 0, False, rng)
            noticed = f'checkpoints/{steps[-1]}' in words and 'It is moved to' in words
            if not noticed and damages[i] == 'flip':
                expected = steps[-1]  # the bit lies where no array is read from; the end of the run is still compared
                counts['flips_of_unused_bits'] += 1
            else:
                assert noticed, words
            counts['damages_noticed'] += noticed
            found = re.search(r'resuming at step (\d+)', words)
            assert int(found[1]) == expected, words
            counts['kills'] += 1
            print(f'  {"noticed" if noticed else "without effect"}, resumed at step {found[1]}', flush=True)
            steps = finished(part)
            expected = steps[-1]
    assert start(part, epochs).wait() == 0, said(part)
    assert same(whole, part, total), 'the disturbed run ended with other bits'
    return counts | {'steps': total, 'bitwise_equal': 1}


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=32)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path)
    flags = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        print(run(flags.kills, flags.seed, flags.out or Path(folder)))
