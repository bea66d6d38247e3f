"""Entry point: python main.py --config=configs/<file>.py [--workdir=DIR] [--config.field=value ...]"""

from mto_jax import cli


def main(config, workdir):
    # Imported here, so that a mistyped flag is reported before TensorFlow is loaded.
    from mto_jax import tasks

    tasks.run(config, workdir)


if __name__ == '__main__':
    cli.start(main)
