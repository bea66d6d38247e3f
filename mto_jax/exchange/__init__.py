"""Weights of other libraries in our names, and ours in theirs."""

from pathlib import Path

from etils import epath

from mto_jax.errors import UserError
from mto_jax.exchange import files, runs, sources
from mto_jax.exchange.card import card
from mto_jax.exchange.model import Weights
from mto_jax.exchange.targets import export

__all__ = ['Weights', 'read', 'save', 'write']


def read(path: str | Path, *, key: str = '', teacher: bool = False, **hints) -> Weights:
    """The weights in a foreign file (.safetensors, .pth, .pt, .bin), a folder of Hugging Face or timm, or a workdir.

    Args:
      key: of a pickled file, as for `files.load`.
      teacher: of a workdir, as for `runs.load`.
      hints: of a foreign file, as in `sources.Hints`: what its shapes cannot tell (`heads`), or is to be another than
        it says. None stands for no hint.

    Raises:
      UserError: in one line, for anything that is not the weights of a known family, or no intact checkpoint. Nothing
        in a file is run.
    """
    path = epath.Path(path)
    if runs.is_run(path):
        return runs.load(path, teacher)[0]
    if '://' in str(path):
        raise UserError(f'{path} is no run; the weights of other libraries are read from local files')
    return sources.weights(files.load(path, key), sources.Hints(**hints))


def save(weights: Weights, workdir: str | Path) -> None:
    """Make a workdir, with weights as the checkpoint of step 0 that evaluations and fine-tunings start from.

    Raises:
      UserError: if there is something of that name, or it cannot be written.
    """
    with files.created(workdir) as part:
        runs.save(weights, part)


def write(
    weights: Weights,
    folder: str | Path,
    target: str,
    *,
    part: str = 'all',
    source: str | Path = '',
    trained: bool = False,
) -> None:
    """Make a folder that `target` loads: model.safetensors, its config.json, and a model card.

    Args:
      target, part: as for `targets.export`.
      source, trained: for the model card, as there.

    Raises:
      UserError: for what the target cannot express, or if the folder exists or cannot be written.
    """
    made = export(weights, target, part)
    with files.created(folder) as there:
        files.save_safetensors(there / 'model.safetensors', made.arrays)
        for name, content in (('config.json', made.config), ('preprocessor_config.json', made.preprocessor)):
            if content:
                files.save_json(there / name, content)
        (there / 'README.md').write_text(card(made, weights, epath.Path(source), trained))
