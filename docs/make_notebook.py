"""Makes docs/notebook.ipynb: executes its cells in a Jupyter kernel and saves them with their outputs.

    python main.py --config=configs/quickstart.py --config.task=pretrain --config.epochs=10 --workdir=runs/notebook
    pip install nbformat nbclient ipykernel
    python docs/make_notebook.py

The cells are below; tests/test_notebook.py compares them with the file, and runs them on a tiny model.
"""

import os
from pathlib import Path

TEXT, CODE = 'markdown', 'code'

CELLS = [
    (
        TEXT,
        """# mto_jax on Fashion-MNIST

A small MAE with masked token optimization, pre-trained without labels on the 9,000 bundled training images, is applied
to test images. Run this in the root of a checkout, after a pre-training that takes minutes:

```bash
python main.py --config=configs/quickstart.py --config.task=pretrain --config.epochs=10 --workdir=runs/notebook
```

[api.md](api.md) describes what is used here. `docs/make_notebook.py` made this page.""",
    ),
    (
        CODE,
        """import absl.logging

absl.logging.set_verbosity('error')  # hides orbax's notes""",
    ),
    (
        CODE,
        """import matplotlib.pyplot as plt
import numpy as np

from mto_jax import api
from mto_jax.data import memory

model = api.load('runs/notebook')
images, labels = memory.load(model.config.data, 'test')
names = ['T-shirt', 'trousers', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'boot']
print(f'{type(model.method).__name__}, {model.method.arch.depth} blocks of width {model.method.arch.width}')
print(f'images: {images.shape}, {images.dtype}')""",
    ),
    (
        TEXT,
        """## Features

One vector per image: the mean of the encoder's patch tokens.""",
    ),
    (
        CODE,
        """features = model.embed(images)
print(features.shape, features.dtype)""",
    ),
    (
        TEXT,
        """## Nearest neighbours

Each row begins with a query, followed by the five images nearest to it by cosine similarity. The titles are the labels,
which the model never saw.""",
    ),
    (
        CODE,
        """unit = features / np.linalg.norm(features, axis=1, keepdims=True)
queries = [np.flatnonzero(labels == c)[0] for c in (1, 3, 5, 6, 8, 9)]
similarity = unit[queries] @ unit.T
rows = np.argsort(-similarity, axis=1)[:, :6]  # itself first

fig, axes = plt.subplots(len(rows), 6, figsize=(6, 7), layout='constrained')
for axis, i in zip(axes.flat, rows.flat, strict=True):
    axis.imshow(images[i].squeeze(), cmap='gray')
    axis.set_title(names[labels[i]], fontsize=8)
    axis.axis('off')""",
    ),
    (
        TEXT,
        """Over all test images, how often does the nearest other image have the same label?""",
    ),
    (
        CODE,
        """others = unit @ unit.T - 2 * np.eye(len(unit))
print(f'same label: {(labels[others.argmax(1)] == labels).mean():.1%} (by chance: about 10%)')""",
    ),
    (
        TEXT,
        """## Reconstructions

Three quarters of the patches of 4 x 4 pixels are hidden (grey in the second row), and the decoder predicts them.""",
    ),
    (
        CODE,
        """pictures = model.reconstruct(images[queries], seed=0)

fig, axes = plt.subplots(3, len(queries), figsize=(6, 3.2), layout='constrained')
for line, name in zip(axes, ('original', 'masked', 'reconstruction'), strict=True):
    for axis, picture in zip(line, pictures[name], strict=True):
        axis.imshow(picture.squeeze(), cmap='gray', vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
    line[0].set_ylabel(name, fontsize=8)""",
    ),
    (
        TEXT,
        """## Heterogeneity per block

Masked token optimization acts on how far masked tokens are from visible ones in each block that sees both, here those
of the decoder. [method.md](method.md) defines both measures: `het` is the entropy of attention (1 for an even spread);
`rho` is the log density of visible tokens around masked ones, minus that around visible ones.""",
    ),
    (
        CODE,
        """blocks = model.heterogeneity(images[:256])

fig, axes = plt.subplots(1, 2, figsize=(6, 2.4), layout='constrained')
for axis, name in zip(axes, ('het', 'rho'), strict=True):
    axis.plot(blocks[name], marker='o')
    axis.set_title(name)
    axis.set_xlabel('block of the decoder')
    axis.set_xticks(range(len(blocks[name])))""",
    ),
]


def main():
    import nbformat
    from nbclient import NotebookClient

    os.environ['TF_CPP_MIN_LOG_LEVEL'], os.environ['TF_ENABLE_ONEDNN_OPTS'] = '2', '0'  # as mto_jax.cli: no notes
    root = Path(__file__).parent.parent
    new = {TEXT: nbformat.v4.new_markdown_cell, CODE: nbformat.v4.new_code_cell}
    cells = [new[kind](text, id=f'cell-{i}') for i, (kind, text) in enumerate(CELLS)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={'language_info': {'name': 'python'}})
    NotebookClient(notebook, resources={'metadata': {'path': str(root)}}, record_timing=False).execute()
    notebook.metadata = {'language_info': {'name': 'python'}}  # not of the machine that ran it
    nbformat.write(notebook, root / 'docs' / 'notebook.ipynb')


if __name__ == '__main__':
    main()
