"""The page about a run and about several."""

import html.parser
import json
import re

import pytest
from conftest import shrink
from etils import epath

from configs import base
from mto_jax import tasks, trainer
from mto_jax.analysis import report
from mto_jax.errors import UserError
from mto_jax.metrics import read_history

VOID = {'meta', 'img', 'br'}


class Page(html.parser.HTMLParser):
    """Cells of the tables, sources of the pictures, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.sources, self.links = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')
        for name, value in attributes:
            if name == 'src':
                self.sources.append(value)
            if name in ('href', 'src', 'action'):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ('td', 'th', 'strong'):
            self.rows[-1][-1] += data

    def row(self, name):
        return next(r[1:] for r in self.rows if r[0] == name)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two short trainings, without and with MTO; the second has a name that HTML must not read as a tag."""
    root = epath.Path(tmp_path_factory.mktemp('runs'))
    folders = []
    for name, enabled in (('plain', False), ('<b>mto', True)):
        c = shrink(base.get_config())
        c.model.dtype, c.eval.every_epochs = 'float32', 1.0
        c.mto.enabled, c.mto.w_r, c.mto.initial_blocks = enabled, 0.1, 1  # the same where MTO is off
        folders.append(root / name)
        trainer.pretrain(c, folders[-1])
    return folders


def test_a_run_writes_its_page(runs):
    """Its numbers are those of metrics.jsonl and config.json, and nothing is fetched from elsewhere."""
    text = (runs[0] / 'report.html').read_text()
    page = Page(text)
    rows = read_history(runs[0])
    for term in ('loss', 'reconstruction', 'val_knn_5'):
        last = [r[term] for r in rows if term in r][-1]
        assert float(page.row(f'{term}, last')[0]) == pytest.approx(last, rel=1e-3)
    assert page.row('steps')[0].startswith(f'{rows[-1]["step"]} (epoch 2 of 2')
    assert page.row('MTO') == ['off']
    assert page.row('mask_ratio') == ['0.75']
    assert page.row('versions.jax')[0].count('.') == 2
    assert all(link.startswith('data:image/') for link in page.links)
    assert sum(s.startswith('data:image/png') for s in page.sources) == 1
    assert len(page.sources) > 8
    assert not re.search(r'https?://', re.sub(r'base64,[A-Za-z0-9+/=]+', '', text))


def test_runs_side_by_side(runs, config, tmp_path):
    config.task, config.report.runs = 'report', ','.join(map(str, runs))
    text = tasks.run(config, tmp_path).read_text()
    page = Page(text)
    assert '<b>mto' not in text
    assert '&lt;b&gt;mto' in text
    differing = text[text.index('Config: what differs') : text.index('Config: all')]
    fields = re.findall(r'<tr><td>([\w.]+)</td>', differing)
    assert fields == ['mto.enabled']
    assert page.row('MTO') == ['off', 'recalibration none, w_r 0.1']
    best = max(float(v) for v in page.row('val_knn_5, last'))
    assert f'<strong>{best:.4g}</strong>' in text


def test_accuracies_of_a_comparison(runs, tmp_path):
    found = {'a': [{'linear': 0.5, 'knn_5': 0.25}, {'linear': 0.75, 'knn_5': 0.5}], 'b': [{'linear': 0.25, 'knn_5': 1}]}
    page = Page(report.write_report(epath.Path(tmp_path), runs, found).read_text())
    assert page.row('a') == ['2', '0.625', '0.375']
    assert page.row('b') == ['1', '0.25', '1']


def test_what_is_missing_or_damaged_is_named(config, tmp_path):
    config.task = 'report'
    for runs, word in (('', 'report.runs'), (str(tmp_path / 'none'), 'no config.json')):
        config.report.runs = runs
        with pytest.raises(UserError, match=word):
            tasks.run(config, tmp_path / 'w')
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    config.report.runs = str(tmp_path)
    with pytest.raises(UserError, match=r'no metrics\.jsonl'):
        tasks.run(config, tmp_path / 'w')
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with pytest.raises(UserError, match=r'metrics\.jsonl is damaged in line 2'):
        tasks.run(config, tmp_path / 'w')
    assert not (tmp_path / 'w').exists()
