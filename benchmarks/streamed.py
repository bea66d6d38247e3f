"""How much of its limits a streamed training on a CPU reaches: images per second of MAE ViT-Ti/16 at 224.

    python -m benchmarks.streamed [--images=500] [--rounds=7] [--steps=8]

On the JPEGs of benchmarks/input.py, in alternating rounds of one process:

  decode     `decode_and_crop_jpeg` of the crops, no resize and no training
  resident   training steps on one batch that lies in memory
  streamed   training steps on batches from the pipeline, as the program trains

The limit is 1 / (1 / decode + 1 / resident), as decoding and training share the cores. Printed as JSON: the medians
with the smallest and largest round, and streamed over its limit in the same round. It needs the machine to itself.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import input as pipeline_alone
from configs import mae
from mto_jax.data import pipeline, sources
from mto_jax.runtime import environment, parallel
from mto_jax.training import feed, job, train_state

BATCH = pipeline_alone.BATCH


def config_of(root: str):
    c = mae.get_config('vit_b')
    c.model.size, c.model.dtype = 'ti', 'float32'
    c.mae.decoder_depth, c.mae.decoder_width, c.mae.decoder_heads = 2, 192, 6
    c.data.name, c.data.data_dir, c.data.crop_area = 'folder', root, pipeline_alone.AREA
    c.batch_size, c.epochs, c.allow_cpu = BATCH, 1000.0, True
    return c


def training(config, mesh, batches):
    """Trains for `n` steps at each `send(n)`, and returns once they are done."""
    run = job.prepare(config, 10 * BATCH)
    placed = pipeline.Prefetch(batches, lambda b: parallel.put_batch({'image': b['image']}, mesh))
    source = feed.Streamed(run, mesh, placed, train_state.stream(0, 'train'))
    state, meter, step = run.create(0), source.meter(), 0
    count = yield
    while True:
        for _ in range(count):
            state, meter, step = source.advance(state, meter, step, step + 1)
        jax.block_until_ready(state)
        count = yield


def measure(images: int, rounds: int, steps: int) -> dict:
    mesh, seconds = parallel.make_mesh(1), {'decode': [], 'resident': [], 'streamed': []}
    with tempfile.TemporaryDirectory() as root, jax.set_mesh(mesh):
        pipeline_alone.make(Path(root), images)
        config = config_of(root)
        source = sources.open_source(config.data, 'train')
        fixed = next(pipeline.train_batches(source, config.data, BATCH, 0, 0, 1))
        decode = pipeline_alone.TensorFlow('decode', root)
        trainings = {
            'resident': training(config, mesh, itertools.repeat(fixed)),
            'streamed': training(config, mesh, pipeline.train_batches(source, config.data, BATCH, 0, 0, 10**6)),
        }
        for each in trainings.values():
            next(each)
            each.send(2)  # compiles
        for _ in range(rounds):
            seconds['decode'].append(decode.time(steps)['seconds'])
            for name, each in trainings.items():
                each.send(2)  # what the pipeline prepared while others were timed
                start_time = time.perf_counter()
                each.send(steps)
                seconds[name].append(time.perf_counter() - start_time)
    row = {'commit': environment.commit(), 'rounds': rounds, 'images': steps * BATCH}
    for name, each in seconds.items():
        speeds = [steps * BATCH / s for s in each]
        row |= {name: statistics.median(speeds), f'{name}_min': min(speeds), f'{name}_max': max(speeds)}
    share = np.add(seconds['decode'], seconds['resident']) / seconds['streamed']
    return row | {'over_limit': float(np.median(share)), 'over_limit_min': share.min(), 'over_limit_max': share.max()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', type=int, default=500)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--steps', type=int, default=8)
    args = parser.parse_args()
    print(json.dumps(measure(args.images, args.rounds, args.steps)))


if __name__ == '__main__':
    main()
