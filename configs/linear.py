"""Linear-probe accuracy of a pre-trained encoder on the test split: logistic regression on frozen features.

    python main.py --config=configs/linear.py --config.checkpoint=runs/mae_mto

The model and the data come from the checkpoint's own config; the fields under `eval` from here. The data source and
splits can be set (`--config.data.test_split=...`); a field that cannot is refused by name. This is a quick, convex
probe, comparable between encoders, not the augmented 90-epoch recipe that papers report.
"""

from configs import base


def get_config():
    return base.evaluation('linear')
