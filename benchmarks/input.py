"""Images per second of the input pipeline on JPEGs of ImageNet's size, against PyTorch's DataLoader with PIL.

    python -m benchmarks.input --out=rows.jsonl [--images=500] [--rounds=7]

The JPEGs are parts of scikit-image's photographs, about 500 x 375 pixels and 100 kB, in a plain folder that lies in the
page cache. One long-lived process per contestant, each with two threads or workers, in alternating rounds:

  read      the files' bytes, in batches
  decode    `decode_and_crop_jpeg` of the crops, no resize: the limit
  full      `pipeline.train_batches`: crop, antialiased bicubic resize to 224, uint8
  device    the same with `data.resize` = 'device', up to where the device gets the batch
  torch     DataLoader with two workers: PIL's crop and bicubic resize to 224, uint8

CPU-ms per image are those of the process and its workers, `bytes` those of an image that the device gets. `psnr_db` is
the mean over images of random crops, decoded and resized as the contestant does, against PIL's crop and antialiased
bicubic resize. It needs the machine to itself, and requirements-peers.txt for the last row.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import gpu

CONTESTANTS = ('read', 'decode', 'full', 'device', 'torch')
WHOLE = {'full': 'host', 'device': 'device'}  # contestants that are our pipeline: `data.resize`
PHOTOS = ('astronaut', 'chelsea', 'coffee', 'rocket')
BATCH, THREADS, SIZE = 64, 2, 224
BUFFERED = 8  # batches, at least as many as any contestant prepares while others are timed
AREA, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def make(root: Path, count: int) -> int:
    """Write `count` JPEGs to root/train/<photograph>/; returns their bytes."""
    import skimage.data

    rng, total = np.random.default_rng(0), 0
    for i in range(count):
        name = PHOTOS[i % len(PHOTOS)]
        image = Image.fromarray(getattr(skimage.data, name)())
        width = int(rng.uniform(0.6, 1.0) * min(image.width, image.height * 4 / 3))
        height = int(0.75 * width)
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        part = np.asarray(image.crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 6, part.shape[:2])[..., None]  # as a camera's; else they would be too smooth for 100 kB
        path = root / 'train' / name / f'{i:05}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(part + grain, 0, 255).astype(np.uint8)).save(path, quality=94)
        total += path.stat().st_size
    return total


class TensorFlow:
    """Our pipeline, or a part of it."""

    def __init__(self, name: str, root: str):
        import tensorflow as tf

        from configs import mae
        from mto_jax.data import pipeline, sources

        data = mae.get_config().data
        data.name, data.data_dir, data.threads, data.crop_area = 'folder', root, THREADS, AREA
        source = sources.open_source(data, 'train')
        steps = 10**6
        if name in WHOLE:
            data.resize = WHOLE[name]
            self.batches = pipeline.train_batches(source, data, BATCH, 0, 0, steps)
            return

        def prepare(position, example):
            encoded = source.read(example)['image']
            if name == 'read':
                return tf.strings.length(encoded)
            pair = tf.stack([tf.constant(0, tf.int64), position])
            window = pipeline._window(encoded, pair, data)
            return tf.reduce_sum(tf.cast(tf.image.decode_and_crop_jpeg(encoded, window, channels=3)[0, 0], tf.int32))

        chosen = (np.random.default_rng(i).permutation(source.num_examples)[:BATCH] for i in range(steps))
        examples = source.stream(chosen)
        found = tf.data.Dataset.zip(tf.data.Dataset.counter(tf.constant(0, tf.int64)), examples)
        found = found.map(prepare, num_parallel_calls=THREADS, deterministic=True).batch(BATCH).prefetch(2)
        self.batches = found.as_numpy_iterator()

    def time(self, batches: int) -> dict:
        for _ in range(BUFFERED):
            next(self.batches)
        start_time, cpu = time.perf_counter(), cpu_seconds(os.getpid())
        for _ in range(batches):
            next(self.batches)
        return {'seconds': time.perf_counter() - start_time, 'cpu': cpu_seconds(os.getpid()) - cpu}


def psnr(root: Path, count: int, resize: str) -> float:
    """Mean PSNR in dB of our crops of `count` images, with `data.resize`, against PIL's of the same windows."""
    import tensorflow as tf

    from configs import mae
    from mto_jax.data import augment, pipeline

    data, found = mae.get_config().data, []
    data.crop_area = AREA
    for i, path in enumerate(sorted(Path(root).rglob('*.jpg'))[:count]):
        encoded, seed = tf.constant(path.read_bytes()), tf.constant([0, i], tf.int64)
        y, x, h, w = pipeline._window(encoded, seed, data).numpy().tolist()
        if resize == 'device':
            sent = {name: value.numpy()[None] for name, value in pipeline.canvas_image(encoded, seed, data).items()}
            [ours] = np.asarray(augment.resize(sent['image'], sent['size'], (SIZE, SIZE)))
        else:
            ours = pipeline.train_image(encoded, seed, data).numpy()
        with Image.open(path) as image:
            part = image.convert('RGB').crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        error = np.mean((ours.astype(np.float64) - np.asarray(part)) ** 2)
        found.append(20 * np.log10(255) - 10 * np.log10(max(error, 1e-9)))
    return float(np.mean(found))


class Crops:
    """A map-style data set: torchvision's RandomResizedCrop with PIL, to uint8 (3, 224, 224)."""

    def __init__(self, root: str):
        self.paths = sorted(Path(root).rglob('*.jpg'))

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int):
        import torch

        rng = np.random.default_rng(index)
        with Image.open(self.paths[int(rng.integers(len(self.paths)))]) as image:
            image = image.convert('RGB')
        for _ in range(10):
            area = rng.uniform(*AREA) * image.width * image.height
            ratio = np.exp(rng.uniform(*np.log(RATIO)))
            width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if width <= image.width and height <= image.height:
                break
        else:
            width = height = min(image.size)
        x, y = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        box = (int(x), int(y), int(x) + width, int(y) + height)
        part = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)


class Torch:
    """PyTorch's loader of the same images."""

    def __init__(self, name: str, root: str):
        del name
        import torch

        self.batches = iter(
            torch.utils.data.DataLoader(Crops(root), BATCH, num_workers=THREADS, persistent_workers=True)
        )

    time = TensorFlow.time


def cpu_seconds(process: int) -> float:
    """User and system time of a process and of its living children."""
    total = 0.0
    with contextlib.suppress(OSError):
        for thread in Path(f'/proc/{process}/task').iterdir():
            for child in (thread / 'children').read_text().split():
                total += cpu_seconds(int(child))
        fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return total


def work(job: dict) -> None:
    """Time what each line on stdin asks for."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is not an answer
    side = (Torch if job['name'] == 'torch' else TensorFlow)(**job)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(getattr(side, what)(*arguments)), file=out, flush=True)


def measure(images: int, rounds: int, batches: int, names=CONTESTANTS) -> list[dict]:
    """Rows of all contestants."""
    with tempfile.TemporaryDirectory() as root:
        size = make(Path(root), images)
        print(f'{images} JPEGs of {size / images / 1000:.0f} kB', flush=True)
        workers = {n: gpu.Worker('', {'name': n, 'root': root}, 'benchmarks.input') for n in names}
        try:
            for worker in workers.values():
                worker.ask('time', max(4, batches))  # starts workers, fills caches
            told = {n: [] for n in workers}
            for _ in range(rounds):
                for name, worker in workers.items():
                    told[name].append(worker.ask('time', batches))
        finally:
            for worker in workers.values():
                worker.close()
        quality = {n: psnr(Path(root), 64, WHOLE[n]) for n in names if n in WHOLE}
    from mto_jax.data.pipeline import CANVAS

    rows, count = [], batches * BATCH
    for name, each in told.items():
        speeds = [count / t['seconds'] for t in each]
        row = {'name': name, 'images_per_s': statistics.median(speeds)}
        row |= {'images_per_s_min': min(speeds), 'images_per_s_max': max(speeds)}
        row['cpu_ms'] = 1000 * statistics.median(t['cpu'] for t in each) / count
        for other in ('decode', 'torch'):
            if other in told:
                ratios = [t['seconds'] / own['seconds'] for t, own in zip(told[other], each, strict=True)]
                row[f'over_{other}'] = statistics.median(ratios)
                row |= {f'over_{other}_min': min(ratios), f'over_{other}_max': max(ratios)}
        if name in WHOLE:
            side = SIZE * (CANVAS if name == 'device' else 1)
            row |= {'psnr_db': quality[name], 'bytes': 3 * side**2}
        rows.append(row | {'rounds': rounds, 'images': count, 'threads': THREADS})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path)
    parser.add_argument('--images', type=int, default=500)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batches', type=int, default=16, help='of 64 images, per round')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--job', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    from mto_jax.runtime import environment

    for row in measure(args.images, args.rounds, args.batches):
        row['commit'] = environment.commit()
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open('a') as f:
                f.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    main()
