"""kNN accuracy of a pre-trained encoder on the test split.

    python main.py --config=configs/knn.py --config.checkpoint=runs/mae_mto

The model and the data come from the checkpoint's own config; the fields under `eval` from here. The data source and
splits can be set (`--config.data.test_split=...`); a field that cannot is refused by name.
"""

from configs import base


def get_config():
    return base.evaluation('knn')
