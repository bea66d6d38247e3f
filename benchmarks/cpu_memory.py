"""A short training on the CPU with and without `cpu.keep_memory`, in alternating processes.

    python benchmarks/cpu_memory.py [--pairs=3] [--steps=100]

Prints wall, user and system seconds of each whole process and the ratio of the medians, with over without.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN = """
import sys
from pathlib import Path
from configs import quickstart
from mto_jax.runtime import cpu
from mto_jax.tasks import pretrain
if sys.argv[1] == 'without':
    cpu.keep_memory = lambda: False
c = quickstart.get_config()
c.task, c.epochs, c.optim.warmup_epochs = 'pretrain', int(sys.argv[2]) / 70, 0.1
c.diagnose_every, c.eval.every_epochs = 0, 0.0
pretrain.run(c, Path(sys.argv[3]))
"""


def measure(mode: str, steps: int) -> tuple[float, float, float]:
    before, start = os.times(), time.perf_counter()
    with tempfile.TemporaryDirectory() as workdir:
        subprocess.run(
            [sys.executable, '-c', RUN, mode, str(steps), workdir],
            cwd=ROOT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '2', 'PYTHONPATH': str(ROOT)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    after = os.times()
    return (
        time.perf_counter() - start,
        after.children_user - before.children_user,
        after.children_system - before.children_system,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--pairs', type=int, default=3)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args()
    found = {'without': [], 'with': []}
    for _ in range(args.pairs):
        for mode, rows in found.items():
            rows.append(measure(mode, args.steps))
            print(
                f'{mode:8}' + ''.join(f'{v:8.1f} s {n}' for v, n in zip(rows[-1], ('wall', 'user', 'sys'), strict=True))
            )
    for i, name in enumerate(('wall', 'user', 'system')):
        ratio = statistics.median(r[i] for r in found['with']) / statistics.median(r[i] for r in found['without'])
        print(f'{name}: with / without = {ratio:.2f}')


if __name__ == '__main__':
    main()
