"""Foreign files: read without executing anything in them, and written atomically."""

import contextlib
import dataclasses
import json
import pickle
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mto_jax.errors import UserError

PICKLED = ('.pth', '.pt', '.bin')
WEIGHTS = ('model.safetensors', 'pytorch_model.bin')  # in a folder, the first that is there
INDEX = 'model.safetensors.index.json'  # of weights in several files
NESTED = ('model', 'state_dict', 'module')  # where a training's file keeps the weights
# Settings in official files. They become OrderedDicts, to which alone PyTorch's safe loading adds items.
INERT = ('argparse.Namespace', 'yacs.config.CfgNode')


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file or folder holds.

    Attributes:
      path: it.
      arrays: by name; half-precision floats are float32.
      config: of a folder, its config.json; {} where there is none.
      preprocessor: of a folder, its preprocessor_config.json.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(path: str | Path, key: str = '') -> Source:
    """Everything in a .safetensors, .pth, .pt or .bin file, or in a folder with one.

    Args:
      key: of a pickled file, the entry that holds the weights; '' for one of NESTED, or the file itself.

    Raises:
      UserError: where there is nothing, or nothing that can be read safely.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f'{path} does not exist')
    if not path.is_dir():
        return Source(path, _floats(_file(path, key)))
    if (path / INDEX).exists():
        shards = sorted(set(_json(path / INDEX).get('weight_map', {}).values()))
        if not shards or any(Path(name).name != name or not (path / name).exists() for name in shards):
            raise UserError(f'{path / INDEX} names files that are not in its folder')
        arrays = {name: array for shard in shards for name, array in _file(path / shard, key).items()}
    else:
        found = next((path / name for name in WEIGHTS if (path / name).exists()), None)
        if found is None:
            raise UserError(f'{path} holds none of {", ".join((*WEIGHTS, INDEX))}')
        arrays = _file(found, key)
    return Source(path, _floats(arrays), _json(path / 'config.json'), _json(path / 'preprocessor_config.json'))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise UserError(f'{path} is not JSON ({e})') from None
    if not isinstance(found, dict):
        raise UserError(f'{path} holds a {type(found).__name__}, expected a JSON object')
    return found


def _floats(arrays):
    return {k: v.astype(np.float32) if v.dtype in (np.float16, ml_dtypes.bfloat16) else v for k, v in arrays.items()}


def _file(path: Path, key: str) -> dict[str, np.ndarray]:
    if path.stat().st_size == 0:
        raise UserError(f'{path} is empty')
    if path.suffix == '.safetensors':
        if key:
            raise UserError(f'key is {key!r}, which is for entries of a .pth file; {path} has none: leave it out')
        return _safetensors(path)
    if path.suffix in PICKLED:
        return _pickled(path, key)
    raise UserError(f'{path}: the name must end with .safetensors, {", ".join(PICKLED)}, or be that of a folder')


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(f'to read {path}, install safetensors (requirements-convert.txt)') from None
    try:
        return safetensors.numpy.load_file(path)
    except Exception as e:  # whatever a reader makes of a damaged file
        raise UserError(f'{path} is not an intact safetensors file ({_first_line(e)})') from None


def _pickled(path: Path, key: str) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f'to read {path}, install PyTorch (pip install torch), or convert it to .safetensors elsewhere'
        ) from None
    try:
        with torch.serialization.safe_globals([(OrderedDict, name) for name in INERT]):
            found = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        why = str(e).partition('WeightsUnpickler error:')[2].strip().partition('\n')[0] or type(e).__name__
        raise UserError(f'{path} holds more than weights and is refused; nothing in it was run ({why[:200]})') from None
    except Exception as e:  # whatever a reader makes of a damaged file
        raise UserError(f'{path} is not an intact PyTorch file ({_first_line(e)})') from None
    if key or isinstance(found, Mapping):
        entries = found if isinstance(found, Mapping) else {}
        if key and not isinstance(entries.get(key), Mapping):
            raise UserError(f'{path} has no weights under {key!r}; its entries are {", ".join(map(str, entries))}')
        nested = key or next((name for name in NESTED if isinstance(entries.get(name), Mapping)), '')
        found = entries[nested] if nested else entries
    if not isinstance(found, Mapping) or not found:
        raise UserError(f'{path} holds a {type(found).__name__}, expected named weights')
    if wrong := [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f'{path} holds entries that are not arrays: {", ".join(wrong[:5])}')
    return {str(n): (v.float() if v.dtype == torch.bfloat16 else v).detach().numpy() for n, v in found.items()}


def _first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), type(e).__name__)[:200]


def require_new(folder: Path) -> None:
    """Raises UserError if there is something of that name."""
    if folder.exists():
        raise UserError(f'{folder} exists; choose another --to, or remove it')


@contextlib.contextmanager
def created(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill, which appears under its name once it is complete, or not at all.

    Raises:
      UserError: if there is something of that name, or it cannot be made.
    """
    folder = Path(folder)
    require_new(folder)
    part = folder.parent / f'.{folder.name}.{uuid.uuid4().hex[:8]}.part'
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    except OSError as e:
        raise UserError(f'{folder} cannot be written: {e.strerror or e}') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as Hugging Face and timm read them."""
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError('to write safetensors, install it (requirements-convert.txt)') from None
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path, {'format': 'pt'})


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')
