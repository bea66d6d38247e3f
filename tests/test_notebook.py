"""docs/notebook.ipynb is what docs/make_notebook.py makes, and still runs."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from tests.test_api import pretrained, small

DOCS = Path(__file__).parent.parent / 'docs'
NOTEBOOK = DOCS / 'notebook.ipynb'


def cells():
    spec = importlib.util.spec_from_file_location('make_notebook', DOCS / 'make_notebook.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CELLS


def test_the_notebook_is_the_scripts():
    """The same cells, all run in order without an error, with three pictures, and no path of a machine."""
    made = json.loads(NOTEBOOK.read_text())['cells']
    assert [(c['cell_type'], ''.join(c['source'])) for c in made] == cells()
    code = [c for c in made if c['cell_type'] == 'code']
    assert [c['execution_count'] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c['outputs']]
    assert {o['output_type'] for o in outputs} <= {'stream', 'display_data'}
    assert all(o['name'] == 'stdout' for o in outputs if o['output_type'] == 'stream')
    assert sum('image/png' in o.get('data', ()) for o in outputs) == 3
    text = NOTEBOOK.read_text()
    assert len(text) < 500_000
    assert not [word for word in ('/tmp/', '/home/', '/root/', '/usr/') if word in text]


def test_its_cells_run(monkeypatch, tmp_path, rng):
    """On a small model with random weights."""
    import matplotlib

    matplotlib.use('agg')
    pretrained(small(**{'data.test_split': 'test'}), tmp_path / 'runs' / 'notebook', rng)
    (tmp_path / 'data').symlink_to(DOCS.parent / 'data')
    monkeypatch.chdir(tmp_path)
    names = {}
    for kind, text in cells():
        if kind == 'code':
            exec(text, names)
    assert names['features'].shape == (2000, 16)
    assert np.isfinite(names['features']).all()
    matplotlib.pyplot.close('all')
