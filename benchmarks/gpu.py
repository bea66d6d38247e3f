"""The pre-training step on one GPU in bfloat16: ours against Hugging Face's models under torch.compile.

    python -m benchmarks.gpu --out=rows.jsonl                 # all parts; each takes a few minutes
    python -m benchmarks.gpu --out=rows.jsonl --parts=mae_b   # one of PARTS
    python -m benchmarks.gpu --out=rows.jsonl --tiny          # small models on a CPU, to try the script

A part is one model at one batch size. Both libraries stay loaded, one long-lived process per library, and are timed in
alternating rounds on the same card. A row is appended to --out as soon as its part has been measured; a part whose rows
are all in the file, none with an error, is skipped, so that a stopped run continues where it was. The script needs the
GPU to itself. It imports neither TensorFlow nor TFDS nor clu; PyTorch and transformers are needed for the peers alone.

Both sides get synthetic images that lie on the GPU. Ours starts from uint8 and flips and normalises them in the step,
as training does; the peer gets normalised float32 images, which favours it. MFU is the analytic FLOPs of the matrix
products of the plain model, MTO's own products left out, over the card's dense bfloat16 peak.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mto_jax.training import perf

ROUNDS, STEPS = 7, 8
LIMIT = 0.97  # of the card's memory, what jax may take
KEPT = 0.93  # of the card's memory, what a step may take where the largest batch is looked for

PRESETS = {'mto': 'tuned', 'full': 'full'}  # MTO's preset, by the last word of a variant's name
OURS = ('ours', 'ours, mto', 'ours, full', 'ours, plain')
PEER = ('peer, compiled', 'peer, compiled, graphs', 'peer, eager')


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured together.

    Attributes:
      method, size: of the model.
      batch: images per step; 0 for the largest that fits, found from the rows of the part `before`.
      names: variants; those that begin with 'peer' are PyTorch.
      before: for batch 0, the part that has measured the memory at another batch.
      profile: the variants whose kernels are listed afterwards.
    """

    method: str
    size: str
    batch: int
    names: tuple[str, ...]
    before: str = ''
    profile: tuple[str, ...] = ()


# In the order of their value: where time is short, the last are left out.
PARTS = {
    'mae_b': Part('mae', 'b', 256, (*OURS, *PEER), profile=('ours', 'ours, plain')),
    'mae_l': Part('mae', 'l', 256, ('ours', PEER[0])),
    'simmim_b': Part('simmim', 'b', 256, (*OURS, "ours, peer's model", PEER[0]), profile=('ours',)),
    'mae_b_large': Part('mae', 'b', 0, ('ours', PEER[0]), before='mae_b'),
}
TINY = {'depth': 2, 'width': 32, 'heads': 2, 'image': 32, 'patch': 8, 'batch': 4}


# ------------------------------------------------------------------------------------------------- the driving process


def run(
    out: Path, parts, seconds: float, tiny: bool, commit: str, at_once: int = 1, only: tuple[str, ...] = ()
) -> None:
    """Measure the parts that are not in `out`; no part starts, and none goes on, after `seconds`.

    Args:
      at_once: parts whose programs are compiled at the same time; they are measured one after another all the same.
      only: if not empty, the variants to measure.
    """
    deadline = time.monotonic() + seconds
    wanted = {p: [n for n in PARTS[p].names if not only or n in only] for p in parts}
    done = {(r['part'], r['name']) for r in read(out) if 'error' not in r}
    # All variants of a part again where one is missing: what is compared is measured together.
    wanted = {p: names for p, names in wanted.items() if any((p, n) not in done for n in names)}
    print('to measure: ' + (', '.join(wanted) or 'nothing'), flush=True)
    while wanted and time.monotonic() < deadline:
        started = []
        try:
            for part in list(wanted)[:at_once]:
                started += [(part, start(group)) for group in jobs(part, wanted.pop(part), read(out), tiny)]
                if not PARTS[part].batch:
                    break
            heard = [listen(workers) for _, workers in started]  # nothing is timed while something compiles
            for (part, workers), (rows, ready) in zip(started, heard, strict=True):
                measure(rows, ready, PARTS[part], read(out), deadline, out)
                for w in workers:
                    w.close()
                for row in rows.values():
                    append(out, row | {'commit': commit})
        finally:
            for _, workers in started:
                for w in workers:
                    w.close()


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def append(out: Path, row: dict) -> None:
    with out.open('a') as f:
        f.write(json.dumps(row) + '\n')
    shown = {k: row[k] for k in ('ms', 'ms_min', 'ms_max', 'images_per_s', 'mfu', 'memory_gib') if row.get(k)}
    values = ' '.join(f'{k} {v:.4g}' for k, v in shown.items())
    print(f'{row["part"]} | {row["name"]} | batch {row["batch"]} | {values}{row.get("error", "")}', flush=True)


class Worker:
    """A process that holds the variants of one library; it answers each line with one line of JSON."""

    def __init__(self, library: str, job: dict, module: str = 'benchmarks.gpu'):
        self.job = job
        command = [sys.executable, '-m', module, '--worker', library, '--job', json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict:
        for line in self.process.stdout:
            if line.startswith('{'):
                return json.loads(line)
        raise EOFError(f'the worker ended with code {self.process.wait()}')

    def ask(self, *what) -> dict:
        self.process.stdin.write(json.dumps(what) + '\n')
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        if self.process.stdout.closed:
            return
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def jobs(name: str, names: list[str], rows: list[dict], tiny: bool) -> list[list[tuple[str, dict]]]:
    """(library, job) of the workers of one part: our variants share a process, each peer has its own.

    The lists are measured one after another: two steps that fill the card cannot be there at once.
    """
    part = PARTS[name]
    ours = [n for n in names if not n.startswith('peer')]
    split = [('jax', ours)] * bool(ours) + [('torch', [n]) for n in names if n.startswith('peer')]
    about = {'part': name, 'method': part.method, 'size': part.size, 'tiny': tiny}
    fixed = TINY['batch'] if tiny else part.batch
    if part.batch:
        return [[(library, about | {'names': n, 'batch': fixed}) for library, n in split]]
    sizes = [(library, n, largest(n, part.before, rows, tiny)) for library, n in split]
    return [[(library, about | {'names': n, 'batch': size})] for library, n, size in sizes if size]


def start(group: list[tuple[str, dict]]) -> list[Worker]:
    return [Worker(library, job) for library, job in group]


def largest(names: list[str], before: str, rows: list[dict], tiny: bool) -> int:
    """The largest multiple of 128 images for which all the variants should fit, by their memory in another part."""
    if tiny:
        return 2 * TINY['batch']
    sizes = []
    for r in rows:
        if r['part'] == before and r['name'] in names and r.get('memory_gib'):
            per_image = (r['memory_gib'] - r['state_gib']) / r['batch']
            sizes.append(int((KEPT * r['card_gib'] - r['state_gib']) / per_image) // 128 * 128)
    return min(sizes, default=0)


def measure(rows, ready, part: Part, before: list[dict], deadline: float, out: Path) -> None:
    """Complete the rows of one part: its variants in alternating rounds, then the profiles."""
    if not rows:
        return
    names = (next(iter(rows.values()))['part'], part.before)
    flops = next((r['flops_per_image'] for r in before if r['part'] in names and r.get('flops_per_image')), None)
    flops = next((r['flops_per_image'] for r in rows.values() if r.get('flops_per_image')), flops)
    time_all(rows, ready, flops, deadline)
    for name in part.profile:
        if 'ms' in rows.get(name, {}) and time.monotonic() < deadline:
            file = out.with_name(f'{rows[name]["part"]}_{name.replace(", ", "_")}'.replace(' ', '_'))
            print(f'  profile of {name}: {ready[name].ask("profile", name, str(file))}', flush=True)


def listen(workers: list[Worker]) -> tuple[dict[str, dict], dict[str, Worker]]:
    """What the workers say while they compile: the rows begun, and who holds the variants that work."""
    rows, ready = {}, {}
    for worker in workers:
        job, about = worker.job, {}
        for name in job['names']:
            rows[name] = {'part': job['part'], 'name': name, 'batch': job['batch']}
        try:
            about = worker.hear()  # the card and versions, at the start
            for _ in job['names']:
                heard = worker.hear()
                rows[heard['name']] |= about | heard
                shown = heard.get('error', f'ready, {heard.get("compile_s", 0):.0f} s')
                print(f'  {heard["name"]}: {shown}', flush=True)
                if 'error' not in heard:
                    ready[heard['name']] = worker
        except EOFError as e:
            for name in job['names']:
                if name not in ready:
                    rows[name] = {'error': str(e)} | about | rows[name]
    return rows, ready


def time_all(rows: dict[str, dict], ready: dict[str, Worker], flops: float | None, deadline: float) -> None:
    """Complete the rows of the variants that are ready."""
    times = {name: [] for name in ready}
    for turn in range(-1, ROUNDS):  # the first round loads kernels and is not counted
        if time.monotonic() > deadline and turn > 0:
            break
        for name in list(times):
            try:
                told = ready[name].ask('time', name, STEPS if turn >= 0 else 2)
            except (EOFError, OSError) as e:
                told = {'error': str(e)}
            if 'error' in told:
                rows[name]['error'] = told['error']
                del times[name]
            elif turn >= 0:
                times[name].append(1000 * told.pop('seconds') / STEPS)
                rows[name] |= told
    for name, values in times.items():
        row, ms = rows[name], statistics.median(values)
        row |= {'ms': ms, 'ms_min': min(values), 'ms_max': max(values), 'rounds': len(values), 'steps': STEPS}
        row['images_per_s'] = 1000 * row['batch'] / ms
        peak = perf.peak(row['card'])
        if flops:
            row |= {'flops_per_image': flops, 'mfu': row['images_per_s'] * flops / peak if peak else None}


# ------------------------------------------------------------------------------------------------ the measured process


def work(library: str, job: dict) -> None:
    """Compile the variants of a job, say so for each, then time them as told on stdin."""
    say, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is not an answer

    def tell(what):
        print(json.dumps(what), file=say, flush=True)

    try:
        side = {'jax': Ours, 'torch': Peer}[library](job)
    except Exception as e:
        tell({'card': '', 'error': f'{type(e).__name__}: {e}'[:300]})
        for name in job['names']:
            tell({'name': name, 'error': f'{type(e).__name__}: {e}'[:300]})
        return
    tell(side.about())
    with ThreadPoolExecutor(side.threads) as pool:  # XLA compiles several programs at once

        def prepare(name):
            start_time = time.monotonic()
            try:
                return {'name': name} | side.prepare(name) | {'compile_s': time.monotonic() - start_time}
            except Exception as e:
                return {'name': name, 'error': f'{type(e).__name__}: {e}'[:300]}

        for told in pool.map(prepare, job['names']):
            tell(told)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            tell(getattr(side, what)(*arguments))
        except Exception as e:
            tell({'error': f'{type(e).__name__}: {e}'[:300]})


def described(config, job: dict):
    """The config of a job: a model, a batch and one device."""
    config.batch_size, config.mesh.data = job['batch'], 1
    if job['tiny']:
        config.data.image_size, m = (TINY['image'],) * 2, config.model
        m.depth, m.width, m.heads, m.patch_size = (TINY[k] for k in ('depth', 'width', 'heads', 'patch'))
        config.mae.decoder_depth, config.mae.decoder_width, config.mae.decoder_heads = 2, 32, 2
    return config


class Ours:
    """Our train step: method, objective, optimizer and MTO as a run of the config has them."""

    threads = 5

    def __init__(self, job: dict):
        os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # the peer needs memory too
        os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'] = str(LIMIT)
        import jax

        from mto_jax.runtime import parallel

        self.job, self.device = job, jax.devices()[0]
        self.mesh = parallel.make_mesh(1, devices=[self.device])
        self.steps, self.states, self.begin = {}, {}, {}
        shape = (job['batch'], *self.config('ours').data.image_size, 3)
        self.images = jax.random.randint(jax.random.key(0), shape, 0, 256).astype('uint8')

    def about(self) -> dict:
        stats = self.device.memory_stats() or {}
        return {
            'card': self.device.device_kind,
            'card_gib': stats.get('bytes_limit', 0) / LIMIT / 2**30,
            'versions': {n: importlib.metadata.version(n) for n in ('jax', 'jaxlib', 'flax', 'optax')},
        }

    def config(self, name: str):
        from configs import mae, presets, simmim

        method = self.job['method']
        config = described({'mae': mae, 'simmim': simmim}[method].get_config(f'vit_{self.job["size"]}'), self.job)
        if preset := PRESETS.get(name.split(', ')[-1]):
            config = presets.with_mto(config, preset)
        if "peer's model" in name:  # ViTForMaskedImageModeling: learned positions, no layer scale, no dropped paths
            m = config.model
            m.relative_bias, m.position, m.layer_scale, m.drop_path, m.qkv_bias = False, 'learned', 0.0, 0.0, 'qkv'
        if 'plain' in name:
            config.model.attention = ''
        return config

    def prepare(self, name: str) -> dict:
        import jax
        import jax.numpy as jnp

        from mto_jax.training import job, train_state
        from mto_jax.training.train_state import Meter

        training = job.prepare(self.config(name), 1_281_167)
        key = train_state.stream(0, 'train')
        with jax.set_mesh(self.mesh):
            state = jax.eval_shape(training.create, 0)
            batch = {'image': self.images}
            lowered = training.step(self.mesh).lower(state, Meter.empty(training.names), {}, batch, key)
            compiled = lowered.compile()
            create = jax.jit(training.create, out_shardings=training.sharding(self.mesh)).lower(jnp.int32(0)).compile()
        # The arrays come with the first step: other parts may still need the memory.
        self.steps[name] = compiled
        self.begin[name] = lambda: (create(jnp.int32(0)), Meter.empty(training.names), key)
        out = {'state_gib': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 2**30}
        if m := compiled.memory_analysis():
            total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            out['memory_gib'] = total / 2**30
        if name == self.job['names'][0]:
            plain = self.config('ours, plain')
            plain.batch_size = 8
            out['flops_per_image'] = perf.train_flops(job.prepare(plain, 1_281_167))
        return out

    def time(self, name: str, steps: int) -> dict:
        import jax

        state, meter, key = self.states.pop(name) if name in self.states else self.begin[name]()
        step, batch = self.steps[name], {'image': self.images}
        jax.block_until_ready(state)
        start_time = time.perf_counter()
        for _ in range(steps):
            state, meter = step(state, meter, {}, batch, key)
        jax.block_until_ready((state, meter))
        seconds = time.perf_counter() - start_time
        self.states[name] = state, meter, key
        return {'seconds': seconds, 'loss': float(meter.sums['loss'] / meter.count)}

    def profile(self, name: str, file: str) -> dict:
        """Write the time per kernel of a step, the mean of three, to `file`.jsonl; returns `account` of it."""
        total = collections.Counter()
        for plane, line, event in profiled(lambda: self.time(name, 3)):
            if plane.startswith('/device:GPU') and line.startswith('Stream'):
                total[event.name] += event.duration_ns / 3e6
        kernels = with_operations(total, self.steps[name].as_text())
        Path(f'{file}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in kernels))
        return account(kernels)


def profiled(run: Callable[[], object]) -> Iterator[tuple[str, str, object]]:
    """(plane, line, event) of everything that a profile of `run()` has recorded; planes and lines by name."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        for trace in Path(folder).rglob('*.xplane.pb'):
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
                for line in plane.lines:
                    for event in line.events:
                        yield plane.name, line.name, event


def with_operations(total: dict[str, float], program: str) -> list[list]:
    """[ms, kernel, JAX operation] of each kernel, the longest first.

    Args:
      total: ms by kernel.
      program: the compiled program's text, in which a kernel's operation is looked up; kernels of libraries have none.
    """
    found = re.findall(r'%([\w.\-]+) = .*?metadata=\{op_name="([^"]*)"', program)
    names = {re.sub(r'[.\-]', '_', name): operation for name, operation in found}
    ranked = sorted(total.items(), key=lambda item: -item[1])
    return [[round(ms, 4), kernel[:80], names.get(re.sub(r'[.\-]', '_', kernel), '')] for kernel, ms in ranked]


def account(kernels: list[list]) -> dict[str, float]:
    """ms per kind of work, the longest first."""
    kinds = collections.Counter()
    for ms, kernel, operation in kernels:
        if 'cudnn' in kernel:
            kind = 'fused attention'
        elif kernel.startswith('gemm_fusion') and '/attn/' in operation and '->tbnhd' not in operation:
            kind = 'attention: products, from XLA'
        elif kernel.startswith(('nvjet', 'cutlass', 'gemm_fusion')) or 'cublas' in kernel:
            kind = 'matrix products'
        elif '/attn/vmap' in operation:
            kind = 'attention: softmax'
        elif '/attn/' in operation:
            kind = 'attention: layouts, padding and biases'
        elif '/norm' in operation:
            kind = 'layer norms and residuals'
        elif re.search(r'block\d+/mul', operation):
            kind = 'GELU'
        elif '/mlp_' in operation:
            kind = 'MLP: gradients of GELU and biases'
        elif 'jvp' in operation:
            kind = 'other layers'
        else:
            kind = 'optimizer, norms of gradients, other'
        kinds[kind] += ms
    return {kind: round(ms, 2) for kind, ms in kinds.most_common()}


class Peer:
    """Hugging Face's model of the same size: SDPA, bfloat16 autocast, fused AdamW, and torch.compile."""

    threads = 1

    def __init__(self, job: dict):
        import torch

        self.job, self.torch = job, torch
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        torch.set_float32_matmul_precision('high')
        torch.manual_seed(0)
        self.steps = {}
        side = TINY['image'] if job['tiny'] else 224
        self.images = torch.randn(job['batch'], 3, side, side, device=self.device)

    def about(self) -> dict:
        cuda = self.torch.cuda
        return {
            'card': cuda.get_device_name() if self.device == 'cuda' else 'cpu',
            'card_gib': cuda.get_device_properties(0).total_memory / 2**30 if self.device == 'cuda' else 0,
            'versions': {n: importlib.metadata.version(n) for n in ('torch', 'transformers')},
        }

    def model(self):
        import transformers

        from mto_jax.models.vit import SIZES

        tiny = self.job['tiny']
        small = TINY['depth'], TINY['width'], TINY['heads']
        depth, width, heads = small if tiny else SIZES[self.job['size']]
        sizes = {
            'hidden_size': width,
            'num_hidden_layers': depth,
            'num_attention_heads': heads,
            'intermediate_size': 4 * width,
            'image_size': TINY['image'] if tiny else 224,
            'patch_size': TINY['patch'] if tiny else 16,
            'layer_norm_eps': 1e-6,
            'hidden_dropout_prob': 0.0,
            'attention_probs_dropout_prob': 0.0,
            'attn_implementation': 'sdpa',
        }
        if self.job['method'] == 'simmim':
            config = transformers.ViTConfig(**sizes, encoder_stride=sizes['patch_size'])
            return transformers.ViTForMaskedImageModeling(config)
        decoder = (2, 32, 2) if tiny else (8, 512, 16)
        config = transformers.ViTMAEConfig(
            **sizes,
            decoder_num_hidden_layers=decoder[0],
            decoder_hidden_size=decoder[1],
            decoder_num_attention_heads=decoder[2],
            decoder_intermediate_size=4 * decoder[1],
            mask_ratio=0.75,
            norm_pix_loss=True,
        )
        return transformers.ViTMAEForPreTraining(config)

    def prepare(self, name: str) -> dict:
        torch = self.torch
        model = self.model().to(self.device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{'params': [p for p in trained if p.ndim > 1], 'weight_decay': 0.05}]
        groups.append({'params': [p for p in trained if p.ndim == 1], 'weight_decay': 0.0})
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        mode = 'reduce-overhead' if 'graphs' in name else None
        run = torch.compile(model, mode=mode) if 'compiled' in name and self.device == 'cuda' else model
        arguments, patches = {}, self.images.shape[2] // (TINY['patch'] if self.job['tiny'] else 16)

        def step():
            if self.job['method'] == 'simmim':  # 30 of 49 units of 2 x 2 patches, anew each step
                half = patches // 2
                rank = torch.rand(len(self.images), half * half, device=self.device).argsort(1).argsort(1)
                mask = (rank < math.ceil(0.6 * half * half)).view(-1, half, half)
                mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
                arguments['bool_masked_pos'] = mask
            with torch.autocast(self.device, dtype=torch.bfloat16):
                loss = run(self.images, **arguments).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        self.steps[name] = step
        for _ in range(3):
            self.time(name, 1)
        if self.device == 'cuda':
            torch.cuda.empty_cache()  # other parts may still need the memory
        bytes_each = 12  # float32 parameters and two moments
        return {
            'state_gib': bytes_each * sum(p.numel() for p in trained) / 2**30,
            'attention': model.config._attn_implementation,
        }

    def time(self, name: str, steps: int) -> dict:
        cuda = self.torch.cuda
        on_gpu, step = self.device == 'cuda', self.steps[name]
        if on_gpu:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
        start_time = time.perf_counter()
        for _ in range(steps):
            loss = step()
        if on_gpu:
            cuda.synchronize()
        seconds = time.perf_counter() - start_time
        told = {'seconds': seconds, 'loss': float(loss)}
        return told | ({'memory_gib': cuda.max_memory_allocated() / 2**30} if on_gpu and 'graphs' not in name else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path)
    parser.add_argument('--parts', default=','.join(PARTS))
    parser.add_argument('--seconds', type=float, default=540.0, help='start and go on with no part after this time')
    parser.add_argument('--tiny', action='store_true', help='small models, to try the script')
    parser.add_argument('--at_once', type=int, default=1, help='parts whose programs are compiled at the same time')
    parser.add_argument('--only', default='', help='variants to measure, semicolons between them; all by default')
    parser.add_argument('--commit', default='', help='of the code, where this is no git checkout')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--job', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.job)
        return
    commit = args.commit
    if not commit:
        described = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
        commit = described.stdout.strip()
    only = tuple(filter(None, args.only.split(';')))
    run(args.out, args.parts.split(','), args.seconds, args.tiny, commit, args.at_once, only)


if __name__ == '__main__':
    main()
