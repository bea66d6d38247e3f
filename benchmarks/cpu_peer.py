"""The MAE pre-training step on a CPU in float32: ours against Hugging Face's ViTMAEForPreTraining.

    python -m benchmarks.cpu_peer --out=rows.jsonl [--sizes=quickstart,s,b] [--rounds=9]
    python -m benchmarks.cpu_peer --profile --sizes=quickstart    # what a step of ours is made of; needs no peer

One long-lived process per contestant: ours, the peer eager, and the peer under torch.compile. All keep freed memory
(`cpu.keep_memory`); the peer has SDPA and fused AdamW. First the peers load our weights, and their losses must agree
with ours on the same images and masks. Then stretches of steps alternate, and a row per contestant goes to --out:
seconds per step, ours over it in each round, and the peak memory of the process.

It needs the machine to itself, and requirements-peers.txt. Ours starts from uint8 and flips and normalises in the step,
as training does, and logs norms of gradients and parameters; the peer gets normalised images and logs nothing.
"""

import argparse
import collections
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import gpu
from mto_jax.runtime import cpu

SIZES = {'quickstart': 64, 's': 8, 'b': 8, 'tiny': 4}  # images per step
SECONDS = 2.0  # that a stretch should take
CONTESTANTS = ('ours', 'peer, eager', 'peer, compiled')


def config_of(size: str):
    """MAE without MTO, in float32."""
    from configs import base, mae, quickstart

    if size in ('quickstart', 'tiny'):
        c = quickstart.small(base.get_config())
        c.model.depth = 2 if size == 'tiny' else 0
    else:
        c = mae.get_config(f'vit_{size}')
        c.model.dtype, c.mesh.data = 'float32', 1
    c.batch_size = SIZES[size]
    return c


class Ours:
    """Our train step."""

    def __init__(self, name: str, size: str, threads: int):
        del name, threads  # XLA takes those it finds
        cpu.keep_memory()
        import jax

        from mto_jax.runtime import parallel
        from mto_jax.training import job, train_state

        self.config, self.mesh = config_of(size), parallel.make_mesh(1)
        self.training = job.prepare(self.config, 54_000)
        self.state = jax.jit(self.training.create)(0)
        self.step, self.key = self.training.step(self.mesh), train_state.stream(0, 'train')
        shape = (SIZES[size], *self.config.data.image_size, self.config.data.channels)
        self.batch = {'image': jax.random.randint(jax.random.key(0), shape, 0, 256).astype('uint8')}
        self.meter = job.Meter.empty(self.training.names)

    def loss(self, folder: str) -> dict:
        """Write weights, images and noise for the peers; returns our loss of them."""
        import jax

        from mto_jax import exchange
        from mto_jax.data import augment

        method, data = self.training.objective.method, self.config.data
        images = augment.normalize(self.batch['image'], data.mean, data.std)
        noise = jax.random.uniform(jax.random.key(1), (len(images), method.arch.num_patches))
        params = jax.tree.map(np.asarray, self.state.params)
        exchange.write(exchange.Weights(self.config, params), Path(folder) / 'model', 'huggingface')
        np.savez(Path(folder) / 'batch.npz', images=np.asarray(images).transpose(0, 3, 1, 2), noise=np.asarray(noise))
        result = jax.jit(lambda p: method._apply(p, images, jax.random.key(0), noise))(params)
        return {'loss': float(result.losses['reconstruction'])}

    def time(self, steps: int) -> dict:
        import jax

        start_time = time.perf_counter()
        for _ in range(steps):
            self.state, self.meter = self.step(self.state, self.meter, {}, self.batch, self.key)
        jax.block_until_ready((self.state, self.meter))
        return {'seconds': time.perf_counter() - start_time}

    def profile(self, steps: int) -> dict:
        """What a step is made of, by kind of operation: thread-milliseconds and number of operations, most first."""
        spent, count = collections.Counter(), collections.Counter()
        for _, _, event in gpu.profiled(lambda: self.time(steps)):
            if name := dict(event.stats).get('hlo_op'):
                kind = name.rstrip('.0123456789')
                spent[kind] += event.duration_ns / 1e6 / steps
                count[kind] += 1 / steps
        return {kind: [round(ms, 3), round(count[kind])] for kind, ms in spent.most_common()}


class Peer:
    """Hugging Face's model with PyTorch's fused AdamW."""

    def __init__(self, name: str, size: str, threads: int):
        cpu.keep_memory()
        import torch

        torch.set_num_threads(threads)
        self.torch, self.compiled = torch, 'compiled' in name

    def loss(self, folder: str) -> dict:
        import transformers

        torch, where = self.torch, str(Path(folder) / 'model')
        self.model = transformers.ViTMAEForPreTraining.from_pretrained(where, attn_implementation='sdpa').train()
        batch = np.load(Path(folder) / 'batch.npz')
        self.images, noise = torch.from_numpy(batch['images']), torch.from_numpy(batch['noise'])
        with torch.no_grad():
            loss = float(self.model(self.images, noise=noise).loss)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{'params': [p for p in trained if p.ndim > 1], 'weight_decay': 0.05}]
        groups.append({'params': [p for p in trained if p.ndim == 1], 'weight_decay': 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.run = torch.compile(self.model) if self.compiled else self.model
        return {'loss': loss}

    def time(self, steps: int) -> dict:
        start_time = time.perf_counter()
        for _ in range(steps):
            self.run(self.images).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {'seconds': time.perf_counter() - start_time}


def work(job: dict) -> None:
    """Answer each line on stdin, the name of a method and its arguments, with one line of JSON."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is not an answer
    side = (Ours if job['name'] == 'ours' else Peer)(**job)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(getattr(side, what)(*arguments) | {'peak_gib': peak}), file=out, flush=True)


def measure(size: str, rounds: int, threads: int, names=CONTESTANTS) -> list[dict]:
    """Rows of one size.

    Raises:
      AssertionError: where the losses differ by more than 1e-4 of their value.
    """
    workers = {n: gpu.Worker('', {'name': n, 'size': size, 'threads': threads}, 'benchmarks.cpu_peer') for n in names}
    try:
        with tempfile.TemporaryDirectory() as folder:
            losses = {n: w.ask('loss', folder)['loss'] for n, w in workers.items()}
        print(f'{size}: losses of the same weights, images and masks: {losses}', flush=True)
        assert all(abs(loss / losses['ours'] - 1) < 1e-4 for loss in losses.values()), losses
        for worker in workers.values():
            worker.ask('time', 3)  # compiles
        one = {n: w.ask('time', 2)['seconds'] / 2 for n, w in workers.items()}
        steps = max(1, round(SECONDS / max(one.values())))
        told = {n: [] for n in workers}
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no one always follows the same
                told[name].append(workers[name].ask('time', steps))
    finally:
        for worker in workers.values():
            worker.close()
    seconds = {n: [t['seconds'] / steps for t in each] for n, each in told.items()}
    rows = []
    for name, each in seconds.items():
        ratios = [ours / peer for ours, peer in zip(seconds['ours'], each, strict=True)]
        rows.append(
            {
                'size': size,
                'name': name,
                'batch': SIZES[size],
                'seconds': statistics.median(each),
                'seconds_min': min(each),
                'seconds_max': max(each),
                'ours_over_it': statistics.median(ratios),
                'ours_over_it_min': min(ratios),
                'ours_over_it_max': max(ratios),
                'peak_gib': told[name][-1]['peak_gib'],
                'rounds': rounds,
                'steps': steps,
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path)
    parser.add_argument('--sizes', default='quickstart,s,b')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--profile', action='store_true', help='list what a step of ours is made of, and time nothing')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--job', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    from mto_jax.runtime import environment

    for size in args.sizes.split(','):
        if args.profile:
            side = Ours('ours', size, args.threads)
            side.time(3)  # compiles
            rows = [{'size': size, 'profile': side.profile(20)}]
        else:
            rows = measure(size, args.rounds, args.threads)
        for row in rows:
            row |= {'commit': environment.commit(), 'threads': args.threads}
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open('a') as f:
                    f.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    main()
