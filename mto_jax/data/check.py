"""Decode a full data set once and list the images that fail: `python main.py --config=configs/mae_mto.py --check`."""

import time

import numpy as np
from etils import epath

from mto_jax.data import pipeline, sources
from mto_jax.errors import UserError
from mto_jax.runtime.workdir import write


def run(config, workdir: epath.Path) -> list[str]:
    """Check the training, validation and test split; writes `<workdir>/unreadable.txt`, one line per image.

    Raises:
      UserError: at the end, if there is such an image and `data.on_error` is 'raise'; for data that are missing.
    """
    data = config.data
    splits = list(dict.fromkeys((data.train_split, data.val_split, data.test_split)))
    opened = [sources.open_source(data, split) for split in splits]
    lines = []
    for split, source in zip(splits, opened, strict=True):
        found = unreadable(source, data, f'{split}: ')
        print(f'{split}: {source.num_examples:,} images, {len(found)} of them cannot be decoded', flush=True)
        lines += found
    path = epath.Path(workdir) / 'unreadable.txt'
    write(path, ''.join(f'{line}\n' for line in lines))
    for line in lines[:20]:
        print(f'  {line}')
    if lines and data.on_error == 'raise':
        raise UserError(
            f'data: {len(lines)} images cannot be decoded; {path} lists them. Repair or remove them, or train with '
            '--config.data.on_error=replace'
        )
    return lines


def unreadable(source: sources.Source, data, label: str = '') -> list[str]:
    """Every image of a source that cannot be decoded, or its label map, as 'name: why'; progress after `label`."""
    total = source.num_examples
    everything = np.array_split(np.arange(total), -(-total // 1024))
    decoded = np.zeros(total, bool)

    def decode(position, example):
        del position
        example = source.read(example)
        maps = pipeline.label_map(example, data, pipeline.decode)
        return {'image': pipeline.decode(example['image'], data.channels)} | maps

    start_time = shown = time.perf_counter()
    for position in pipeline.whole_ones(source.select(everything).enumerate(), decode, data.threads):
        decoded[position] = True
        now = time.perf_counter()
        if now - shown > 10:
            shown, speed = now, (position + 1) / (now - start_time)
            print(f'{label}{position + 1:,} of {total:,}, ETA {(total - position) / speed:.0f} s', flush=True)
    bad = np.flatnonzero(~decoded)
    examples = source.select([bad]) if len(bad) else ()
    return [f'{pipeline.name_of(e)}: {pipeline.problem_of(decode, 0, e)}' for e in examples]
