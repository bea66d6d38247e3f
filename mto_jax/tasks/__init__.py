"""From `config.task` to the function that does it."""

from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from mto_jax import methods
from mto_jax.config import EVALUATIONS
from mto_jax.config import check as check_fields
from mto_jax.errors import UserError
from mto_jax.runtime import environment, hosts
from mto_jax.tasks import pretrained


def _tasks() -> dict[str, Callable[[ConfigDict, epath.Path], object]]:
    # Imported here, so that what reads checkpoints alone (`mto_jax.api`) does not load TensorFlow.
    from mto_jax.analysis import report
    from mto_jax.tasks import compare, pretrain, probe, supervised

    return {
        'pretrain': pretrain.run,
        'knn': probe.run,
        'linear': probe.run,
        'probe': supervised.run,
        'finetune': supervised.run,
        'compare': compare.run,
        'report': report.run,
    }


def run(config: ConfigDict, workdir: epath.Path, check: bool = False) -> object:
    """Do what `config.task` says.

    Args:
      check: only build the method and look for images that cannot be decoded, in the data that the task would read.

    Raises:
      UserError: for an unknown task, and whatever the task raises.
    """
    tasks = _tasks()
    if config.task not in tasks:
        raise UserError(f'task is {config.task!r}; it must be one of {", ".join(tasks)}')
    check_fields(config, partial=config.task in EVALUATIONS)
    if config.study.variants:
        raise UserError('this config is of a study: python -m mto_jax.studies --config=...')
    if config.deterministic:
        environment.make_deterministic()
    if check:  # by this host alone, which needs no other and no device
        return _check(config, epath.Path(workdir))
    hosts.start(config.hosts)
    return tasks[config.task](config, epath.Path(workdir))


def _check(config: ConfigDict, workdir: epath.Path) -> list[str]:
    from mto_jax.data import check

    if config.task not in EVALUATIONS:
        methods.build(config)
    if config.task in EVALUATIONS:
        trains = EVALUATIONS[config.task]
        config = pretrained.find(config).config
        if not (trains and config.eval.every_epochs):  # who reads no validation split
            config.data.val_split = config.data.test_split
    return check.run(config, workdir)
