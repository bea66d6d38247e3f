"""How far bfloat16 moves an encoder's features: python -m benchmarks.precision [--weights=FILE_OR_FOLDER]

Without weights: those of a fresh ViT-B/16. On random images, with the same seed each time.
"""

import argparse

import jax
import numpy as np

from mto_jax import exchange, methods
from mto_jax.config import get_config
from mto_jax.exchange import Weights


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--weights', help='as for python -m mto_jax.convert --from')
    path = parser.parse_args().weights
    if path:
        weights = exchange.read(path)
    else:
        config = get_config()
        weights = Weights(config, methods.build(config).init(jax.random.key(0))[0])
    config, d = weights.config, weights.config.data
    images = jax.random.normal(jax.random.key(1), (8, *d.image_size, d.channels))
    features = []
    for config.model.dtype in ('float32', 'bfloat16'):
        tokens = methods.build(config).encode(weights.params, images)
        features.append(np.asarray(tokens, np.float32)[:, int(config.model.class_token) :])
    a, b = features
    print(f'patch tokens: relative error {np.linalg.norm(a - b) / np.linalg.norm(a):.4f}')
    a, b = (x.mean(1) / np.linalg.norm(x.mean(1), axis=1, keepdims=True) for x in (a, b))
    print(f'mean features: cosine at least {(a * b).sum(1).min():.6f}')


if __name__ == '__main__':
    main()
