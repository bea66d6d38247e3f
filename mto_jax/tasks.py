"""From `config.task` to the function that does it."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from mto_jax import compare, trainer
from mto_jax.errors import UserError
from mto_jax.evals import probes

TASKS: dict[str, Callable[[ConfigDict, Path], object]] = {
    'pretrain': trainer.pretrain,
    'knn': probes.run,
    'linear': probes.run,
    'compare': compare.run,
}


def run(config: ConfigDict, workdir: Path) -> object:
    """Do what `config.task` says.

    Raises:
      UserError: for an unknown task, and whatever the task raises.
    """
    if config.task not in TASKS:
        raise UserError(f'task is {config.task!r}; it must be one of {", ".join(TASKS)}')
    return TASKS[config.task](config, workdir)
