"""kNN accuracy of a pre-trained encoder on the test split.

    python main.py --config=configs/knn.py --config.checkpoint=runs/mae_mto

The model and the data come from the checkpoint's own config; the fields under `eval` from here.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.task = 'knn'
    return c
