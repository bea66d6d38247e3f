"""`python -m mto_jax.studies --config=configs/study_<name>.py:<stage>`"""

from mto_jax import cli


def main(config, workdir):
    # Imported here, so that a mistyped flag is reported before jax is loaded.
    from mto_jax.studies import study

    study.run(config, workdir)


if __name__ == '__main__':
    cli.start(main)
