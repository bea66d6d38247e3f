"""The command line: --config, --workdir, and --config.field=value, for everything that is run."""

import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from mto_jax.config import EVALUATIONS, PATHS, evaluation, values

LEAVE_AFTER = 20  # seconds that a host which fails waits for the others
# What absl, ml_collections and Python say of flags, and what is said instead.
PLAIN = (
    (r'flag --config=None: .*', '--config is missing: give a file of configs/, like --config=configs/mae_mto.py'),
    (r"Unknown command line flag '(.*?)'", r'unknown flag --\1; config fields are set with --config.field=value'),
    (r'Error whilst parsing config file: \w+: ', ''),
    (r'get_config\(\) takes 0 positional .*', 'this file takes no argument after the colon'),
    (r'get_config\(\) missing .*', 'this file needs an argument after a colon: its first lines say which'),
    (r'could not convert string to float.*', 'it must be a number'),
    (r'invalid literal for int.*', 'it must be an integer'),
    (r'\(.Non-boolean argument.*', 'it must be True or False'),
)

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Where the run is kept; the same one resumes. Default: runs/<config>, of an evaluation runs/<config>/<run>.',
)


def start(job: Callable[[ConfigDict, epath.Path], object]) -> None:
    """Parse the flags and call `job(config, workdir)`. Never returns.

    `job` imports what it needs itself, so that a mistyped flag is reported before any library is loaded. What is wrong
    with the user's input is one line on stderr and exit code 2; for what may pass see `errors.Temporary`.
    """
    # TensorFlow's start-up notes; an accelerator is jax's alone.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    flags.mark_flag_as_required('config')

    def main(argv):
        if len(argv) > 1:
            stop(f'unknown argument {argv[1]!r}; config fields are set with --config.field=value')
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.FATAL)  # the libraries' own chatter, errors that we report too; --verbosity=0
            sys.unraisablehook = _unraisable
        from mto_jax.errors import UserError

        file, _, argument = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
        # A comma would lie between two runs in report.runs.
        name = '_'.join([Path(file).stem, *argument.split(',')]).rstrip('_')
        config = _CONFIG.value
        try:
            _expand_home(config)
            workdir = _WORKDIR.value or config.workdir or default_workdir(name, config)
            job(config, epath.Path(workdir).expanduser())
            sys.stdout.flush()
        except UserError as e:
            stop(str(e), e.exit_code)
        except BrokenPipeError:
            # What Python flushes at its end must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            stop('the output was closed, so the job stopped; the same command resumes it')

    app.run(main, flags_parser=_parse)


def _expand_home(config: ConfigDict) -> None:
    """~ in the fields that are paths: a shell leaves it in --config.field=~/x."""
    for name in PATHS:
        *group, last = name.split('.')
        inner = config[group[0]] if group else config
        if inner[last]:
            inner[last] = ','.join(os.path.expanduser(path) for path in inner[last].split(','))


def default_workdir(name: str, config: ConfigDict) -> str:
    """`runs/<name>`; for an evaluation `runs/<name>/<run>`, so that no two overwrite each other's results.

    Quick evaluations add the step and the settings that differ from the defaults. Those that train add the step only if
    one is given: the same command finds its workdir again, even if the run has continued.
    """
    if config.task not in EVALUATIONS or not config.checkpoint:
        return f'runs/{name}'
    path = epath.Path(config.checkpoint)
    if not EVALUATIONS[config.task] and path.parent.name != 'checkpoints':
        steps = [int(p.name) for p in path.glob('checkpoints/*') if p.name.isdigit()]
        path = path / 'checkpoints' / str(max(steps)) if steps else path
    parts = os.path.relpath(path).split(os.sep) if '://' not in str(path) else str(path).split('/')
    run = '_'.join(part.strip(':') for part in parts if part.strip('.') and part not in ('runs', 'checkpoints'))
    if not EVALUATIONS[config.task]:
        run = '_'.join([run, *_settings(config)])
    return f'runs/{name}/{run}'


def _settings(config: ConfigDict) -> list[str]:
    """'<field>=<value>' of what changes the result of a quick evaluation and differs from its default."""
    defaults = dict(values(evaluation(config.task)))
    same = (*PATHS, 'eval.batch_size', 'data.threads')
    changed = [(n, v) for n, v in values(config) if n.startswith(('eval.', 'data.')) and v != defaults[n]]
    return [re.sub(r'[^\w=.]+', '-', f'{n.split(".")[1]}={v}').strip('-') for n, v in changed if n not in same]


def _parse(argv):
    """Parse the flags; an unknown field or config file is one line, not a traceback."""
    given = [a for a in argv[1:] if re.match(r'--?config=', a)]
    if len(given) > 1:
        stop(f'--config is given {len(given)} times ({", ".join(given)}); give one')
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value.task  # where a config file failed to load, this raises
        return rest
    except (AttributeError, KeyError) as e:
        # ml_collections wraps the message of one error in another.
        words = ' '.join(re.sub(r"\\n|[\\']", ' ', str(e.args[0])).strip(' "').split())
        words = re.sub(r' Did you mean "(.*?)" instead.*', r' (did you mean \1?)', words)
        stop(f'unknown config field: {words}; mto_jax/config.py lists all fields')
    except (flags.Error, OSError) as e:
        if missing := re.search(r"No such file or directory: '(.*?)'", str(e)):
            stop(f'--config={missing[1]}: no such file in {os.getcwd()}; run from the project folder, or give its path')
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        words = lines[0] if len(lines) == 1 else f'{lines[0]} {lines[-1]}'
        for theirs, ours in PLAIN:
            words = re.sub(theirs, ours, words)
        stop(words)


def _unraisable(found):
    """Leaves out what tensorstore's threads print, hundreds of times, once a save has failed: that is reported."""
    if str(found.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(found)


def stop(problem: str, code: int = 2):
    """End with one line on stderr."""
    print(f'error: {problem}', file=sys.stderr, flush=True)
    jax = sys.modules.get('jax')
    if jax and jax.distributed.is_initialized():
        # At its end jax waits for the other hosts. Where this one alone fails, they wait for it in their next step:
        # then jax would abort all of them after five minutes, with a code of its own.
        last = threading.Timer(LEAVE_AFTER, os._exit, (code,))
        last.daemon = True
        last.start()
    sys.exit(code)
