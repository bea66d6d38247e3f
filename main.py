"""Entry point: python main.py --config=configs/<file>.py [--workdir=DIR] [--check] [--config.field=value ...]"""

from absl import flags

from mto_jax import cli

_CHECK = flags.DEFINE_bool('check', False, 'Decode every image of the data set once and list the images that fail.')


def main(config, workdir):
    # Imported here, so that a mistyped flag is reported before TensorFlow is loaded.
    from mto_jax import tasks

    tasks.run(config, workdir, check=_CHECK.value)


if __name__ == '__main__':
    cli.start(main)
