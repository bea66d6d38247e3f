"""Kills a real training run at random moments, damages its checkpoints, and evaluates them while this goes on.

    python benchmarks/faults.py [--kills=32] [--seed=0] [--out=DIR]

The run is `main.py` in a process of its own: a small MAE with MTO on the bundled images. SIGKILL comes at random steps;
every third time it waits until a save is on its way (its unfinished folder is there). Between two lives the newest
checkpoint is damaged, once in each of five ways. After each life the run must resume at its newest intact checkpoint,
and it must end bitwise equal to an undisturbed one.

Next to it, kNN evaluations of the same workdir follow one another, each a process too. Each must end with the numbers
that the undisturbed run has at that step, or with one line that says which checkpoint is missing or damaged.

The last line counts what was done. docs/reliability.md has the figures.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
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
EVALUATION = {'data.test_split': 'train[300:400]', 'eval.batch_size': 32, 'eval.knn_k': (20,), 'allow_cpu': True}
EXPECTED = ('no checkpoint there', 'cannot be read', 'is damaged')  # one of these is in each error of an evaluation
PAUSE = 5.0  # seconds between two evaluations
DAMAGES = ('truncate', 'delete', 'flip', 'empty', 'metadata')


def start(config: str, workdir: Path, fields: dict) -> subprocess.Popen:
    """main.py in a process of its own, which writes `<workdir>.log`."""
    args = [f'--config.{k}={v}' for k, v in fields.items()]
    command = [sys.executable, 'main.py', f'--config=configs/{config}.py', f'--workdir={workdir}', *args]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'xla')}
    env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    log = (workdir.parent / f'{workdir.name}.log').open('w')
    with log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def train(workdir: Path, epochs: int, **fields) -> subprocess.Popen:
    return start('quickstart', workdir, FIELDS | {'epochs': float(epochs)} | fields)


def read_log(workdir: Path) -> str:
    return (workdir.parent / f'{workdir.name}.log').read_text()


def evaluate(checkpoint: Path, workdir: Path) -> tuple[dict | None, str]:
    """A kNN evaluation in a process of its own.

    Returns:
      Its numbers with their step, or None where it ended with one line of an error; and its log, or that line.

    Raises:
      AssertionError: if it ended in any other way.
    """
    code = start('knn', workdir, {'checkpoint': checkpoint} | EVALUATION).wait()
    log = read_log(workdir)
    if code == 0:
        return json.loads((workdir / 'knn.json').read_text()), log
    assert (code, log.count('error: '), log.count('Traceback')) == (2, 1, 0), f'exit code {code}\n{log}'
    return None, log[log.index('error: ') :].strip()


class Evaluations(threading.Thread):
    """Evaluations of one workdir, one after another, until `finish`.

    Attributes:
      found: the numbers of each that ended with numbers.
      errors: the error line of each other one.
    """

    def __init__(self, run: Path, folder: Path):
        super().__init__(daemon=True)
        self.run_dir, self.folder, self.over = run, folder, threading.Event()
        self.found, self.errors, self.failure = [], [], None

    def run(self):
        number = 0
        while not self.over.is_set():
            number += 1
            workdir = self.folder / f'evaluation{number}'
            try:
                numbers, log = evaluate(self.run_dir, workdir)
            except AssertionError as e:
                self.failure = e
                return
            self.keep(numbers, log)
            shutil.rmtree(workdir, ignore_errors=True)
            self.over.wait(PAUSE)

    def keep(self, numbers: dict | None, log: str) -> None:
        if numbers:
            self.found.append(numbers)
        else:
            self.errors.append(log)

    def finish(self):
        self.over.set()
        self.join()
        if self.failure:
            raise self.failure


def finished(workdir: Path) -> list[int]:
    """Steps of the checkpoints whose save was over."""
    return sorted(int(p.name) for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit())


def saving(workdir: Path) -> str:
    """The name of a save's unfinished folder, or ''."""
    return next((p.name for p in (workdir / 'checkpoints').glob('*orbax-checkpoint-tmp*')), '')


def run_until_killed(
    workdir: Path, epochs: int, until: int, in_save: bool, rng: random.Random, saved=0
) -> tuple[str, str]:
    """One life: kill it once it has reported step `until` and has `saved` checkpoints.

    Returns:
      What it said, and which save was cut ('': none).
    """
    process = train(workdir, epochs)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        steps = re.findall(r'^step (\d+)/', read_log(workdir), re.M)
        there = len(finished(workdir)) >= saved and (not in_save or saving(workdir))
        if steps and int(steps[-1]) >= until and there:
            break
        time.sleep(0.002)
    if not in_save:
        time.sleep(rng.uniform(0, 0.2))
    process.kill()
    process.wait()
    return read_log(workdir), saving(workdir)


def damage(step: Path, way: str, rng: random.Random) -> str:
    """Damage one checkpoint; returns what was done."""
    files = sorted((p for p in step.rglob('*') if p.is_file() and '/d/' in str(p)), key=lambda p: p.stat().st_size)
    largest = files[-1]
    # All of them, for some hold what a later file of the same save has replaced, and are never read.
    if way == 'truncate':
        for path in files:
            os.truncate(path, path.stat().st_size // 2)
        return 'every data file cut to half'
    if way == 'delete':
        for path in files:
            path.unlink()
        return 'every data file removed'
    if way == 'flip':
        content = bytearray(largest.read_bytes())
        position = rng.randrange(len(content))
        content[position] ^= 1 << rng.randrange(8)
        largest.write_bytes(content)
        return f'one bit of byte {position} of {len(content)} in {largest.relative_to(step)}'
    if way == 'empty':
        shutil.rmtree(step)
        step.mkdir()
        return 'everything in it removed'
    for path in [*step.rglob('_METADATA'), *step.rglob('_CHECKPOINT_METADATA')]:
        path.unlink()
    return 'its metadata files removed'


def same(a: Path, b: Path, step: int) -> bool:
    """True where every stored array of two checkpoints has the same bits."""
    from mto_jax.training import checkpoint

    sums = [checkpoint.Checkpointer(d, read_only=True).about(step)['checksums'] for d in (a, b)]
    return sums[0] == sums[1]


def compare(found: list[dict], whole: Path, folder: Path) -> int:
    """Evaluate the undisturbed run at each step that was evaluated, in this process; returns how many steps.

    Raises:
      AssertionError: where a number differs.
    """
    from configs import knn
    from mto_jax import tasks

    by_step = collections.defaultdict(list)
    for numbers in found:
        by_step[numbers['step']].append(numbers | {'checkpoint': ''})
    for step, each in by_step.items():
        config = knn.get_config()
        config.update_from_flattened_dict(EVALUATION | {'checkpoint': str(whole / 'checkpoints' / str(step))})
        with contextlib.redirect_stdout(None):
            want = tasks.run(config, folder / 'reference' / str(step)) | {'checkpoint': ''}
        assert all(numbers == want for numbers in each), f'step {step}: {each}, undisturbed {want}'
    return len(by_step)


def run(kills: int, seed: int, folder: Path, ways=DAMAGES) -> dict[str, int]:
    """Disturb and evaluate a run, and compare it with an undisturbed one.

    Returns:
      Counts. Raises AssertionError where anything did not hold.
    """
    rng = random.Random(seed)
    epochs = max(4, 2 * kills * EVERY // STEPS_PER_EPOCH)
    total = epochs * STEPS_PER_EPOCH
    folder.mkdir(parents=True, exist_ok=True)
    whole, part = folder / 'whole', folder / 'part'
    assert train(whole, epochs, **{'checkpoints.keep': total}).wait() == 0, read_log(whole)
    print(f'undisturbed: {total} steps', flush=True)
    counts = dict.fromkeys(('kills', 'in_a_save', 'damages', 'damages_noticed', 'flips_of_unused_bits'), 0)
    moments = sorted(rng.sample(range(2 * EVERY + 1, total - 2 * EVERY), kills))
    damages = dict(zip(sorted(rng.sample(range(kills // 2, kills), len(ways))), ways, strict=True))
    evaluations, expected, damaged = Evaluations(part, folder), 0, set()
    evaluations.start()
    for i, moment in enumerate(moments):
        # Before the newest checkpoint is damaged, one more must be there to go back to.
        words, cut = run_until_killed(part, epochs, moment, i % 3 == 0, rng, saved=2 if i in damages else 0)
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
            damaged.add(steps[-1])
            expected = steps[-2]
            print(f'  damaged step {steps[-1]}: {damages[i]}, {done}', flush=True)
            # One that surely meets the damage; it may lie in what an evaluation does not read.
            numbers, log = evaluate(part, folder / f'evaluation_of_damage{i}')
            evaluations.keep(numbers, log)
            print(f'  evaluated: {numbers or log}', flush=True)
            words, _ = run_until_killed(part, epochs, 0, False, rng)
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
    assert train(part, epochs).wait() == 0, read_log(part)
    evaluations.finish()
    assert same(whole, part, total), 'the disturbed run ended with other bits'
    names = [{p.name.split('.tfevents')[0] for p in folder.iterdir()} - {'damaged'} for folder in (whole, part)]
    assert names[0] == names[1], f'evaluations left {names[1] - names[0]} in the workdir'
    for error in evaluations.errors:
        assert any(words in error for words in EXPECTED), error
        found = re.search(r'checkpoints/(\d+) ', error)
        assert EXPECTED[0] in error or int(found[1]) in damaged, f'of no damaged checkpoint: {error}'
    counts['evaluations'] = len(evaluations.found)
    counts['evaluations_that_found_no_checkpoint'] = sum(EXPECTED[0] in e for e in evaluations.errors)
    counts['evaluations_that_found_damage'] = len(evaluations.errors) - counts['evaluations_that_found_no_checkpoint']
    counts['steps_evaluated'] = compare(evaluations.found, whole, folder)
    return counts | {'steps': total, 'bitwise_equal': 1}


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=32)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path)
    flags = parser.parse_args()
    if flags.kills < 2 * len(DAMAGES):
        parser.error(f'--kills is {flags.kills}; the {len(DAMAGES)} damages need at least {2 * len(DAMAGES)}')
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ['JAX_PLATFORMS'] = 'cpu'
    with tempfile.TemporaryDirectory() as folder:
        print(run(flags.kills, flags.seed, flags.out or Path(folder)))
