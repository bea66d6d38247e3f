"""Weights in from other libraries, and out to them:

  python -m mto_jax.convert --from=FILE_OR_FOLDER --to=WORKDIR
  python -m mto_jax.convert --from=WORKDIR_OR_CHECKPOINT --target=huggingface --to=FOLDER

The first makes a workdir whose checkpoint every evaluation starts from (--config.checkpoint=WORKDIR). The second makes
a folder for Hugging Face (huggingface), timm (timm) or the official MAE code (mae). docs/exchange.md has the details.
"""

import argparse
from pathlib import Path

from absl import logging
from etils import epath

from mto_jax import cli
from mto_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Convert as the arguments say. What is wrong with them or with a file is one line on stderr and exit code 2."""
    args = vars(_parser().parse_args(argv))
    source, to, target = epath.Path(args.pop('from')), args.pop('to'), args.pop('target')
    try:
        if '://' in to:
            raise UserError(f'--to is {to}; it must be a local folder: convert there, then copy it')
        print(_convert(source, Path(to), target, **args))
    except UserError as e:
        cli.stop(' '.join(str(e).split()))


def _convert(source, to, target, part, teacher, key, **hints) -> str:
    # Imported here, so that a mistyped flag is reported at once.
    logging.set_verbosity(logging.ERROR)  # the libraries' own chatter
    from mto_jax import exchange
    from mto_jax.exchange import files, runs

    files.require_new(to)
    is_run = runs.is_run(source)
    if is_run and not target:
        raise UserError(f'{source} is already a run of mto_jax; to export it, give --target=huggingface, timm or mae')
    if is_run and (given := [name for name, value in hints.items() if value is not None]):
        raise UserError(f'--{given[0]} is for foreign files; {source} is a run, whose config says it')
    for flag, given, what in (
        ('--teacher', teacher and not is_run, 'a workdir'),
        ('--key', key and is_run, 'a .pth file'),
        ('--part', part != 'all' and not target, 'an export (--target)'),
    ):
        if given:
            raise UserError(f'{flag} is for {what}; leave it out')
    if is_run:
        weights, source = runs.load(source, teacher)
    else:
        weights = exchange.read(source, key=key, **hints)
    for note in weights.notes:
        print(note)
    if target:
        trained = is_run and source.name != '0'  # step 0 is what this program made
        exchange.write(weights, to, target, part=part, source=source, trained=trained)
        return f'written: {to}; its README.md shows how to load it'
    exchange.save(weights, to)
    return f'written: {to}; evaluate it with --config.checkpoint={to}'


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        cli.stop(f'{message}; --help lists the flags')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='python -m mto_jax.convert',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--from', required=True, metavar='PATH', help='a foreign file or folder, or a workdir or a checkpoint in it')
    add('--to', required=True, metavar='FOLDER', help='what is made; it must not exist')
    add('--target', metavar='LIBRARY', help='huggingface, timm or mae; without it a workdir is made')
    add('--part', default='all', choices=('all', 'encoder'), help='encoder: leave out the decoder of an MAE')
    add('--teacher', action='store_true', help="of a workdir: the method's teacher")
    add('--key', default='', help="of a .pth file: the entry that holds the weights, such as 'model_ema'")
    add('--kind', metavar='FAMILY', help='refuse a file that is of another family')
    add('--image_size', type=_numbers(int), metavar='PIXELS', help='224 or 224,192 (height, width)')
    add('--heads', type=int, help='of the attention, where the width is not a standard one')
    add('--decoder_heads', type=int, help="of an MAE's decoder that is not 512 wide")
    add('--norm_eps', type=float, help='of LayerNorm')
    add('--mean', type=_numbers(float), metavar='NUMBERS', help='of the pixels in [0, 1]: 0.5,0.5,0.5')
    add('--std', type=_numbers(float), metavar='NUMBERS', help='of the pixels')
    add('--pool', choices=('class', 'mean'), help="what a classifier's head sees, where the file does not say")
    add('--norm_pix_loss', type=_boolean, metavar='BOOL', help='of an MAE: it predicts normalised patches')
    add('--dtype', choices=('float32', 'bfloat16'), help='of matrix products in evaluations of the workdir')
    return parser


def _numbers(kind):
    def numbers(text: str):
        found = tuple(kind(part) for part in text.split(','))
        return found[0] if len(found) == 1 and kind is int else found

    return numbers


def _boolean(text: str) -> bool:
    if text.lower() not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'{text!r}; it must be True or False')
    return text.lower() == 'true'


if __name__ == '__main__':
    main()
