"""One page about one or more runs: numbers, curves, reconstructions, heterogeneity, config.

    python main.py --config=configs/report.py --config.report.runs=runs/a,runs/b --workdir=runs/a_and_b

Writes `<workdir>/report.html`. Each training writes its own when it ends.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.task = 'report'
    return c
