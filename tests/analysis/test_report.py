"""The page about a run and about several."""

import html.parser
import json
import re

import jax
import numpy as np
import pytest
from conftest import shrink
from etils import epath

from configs import base
from mto_jax import tasks
from mto_jax.analysis import report
from mto_jax.analysis import runs as analysis_runs
from mto_jax.errors import UserError
from mto_jax.runtime.hosts import flatten
from mto_jax.runtime.log import read_history
from mto_jax.tasks import pretrain

pytestmark = pytest.mark.pictures
VOID = {'meta', 'img', 'br'}


class Page(html.parser.HTMLParser):
    """Cells of the tables, sources of the pictures, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.sources, self.links, self.pictures = [], [], [], [], []
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
            if name == 'alt':
                self.pictures.append(value)
            if name == 'src':
                self.sources.append(value)
            if name in ('href', 'src', 'action'):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ('td', 'th', 'strong', 'span'):
            self.rows[-1][-1] += data

    def row(self, name):
        return next(r[1:] for r in self.rows if r[0] == name)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A short training with MTO, and one as it might be without, whose name HTML must not read as a tag."""
    root = epath.Path(tmp_path_factory.mktemp('runs'))
    c = shrink(base.get_config())
    c.model.dtype, c.eval.every_epochs, c.diagnose_every = 'float32', 1.0, 4
    c.mto.enabled, c.mto.w_r, c.mto.initial_blocks = True, 0.1, 1
    pretrain.run(c, root / 'mto')
    rows = read_history(root / 'mto')
    c.mto.enabled, c.seed = False, 3
    other = [{k: v / 2 if k == 'reconstruction' else v for k, v in r.items() if k != 'mto_r'} for r in rows]
    record(root / '<b>plain', c.to_dict(), other)
    return [root / 'mto', root / '<b>plain']


def record(folder, config, rows):
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


def between(text, start, end):
    return text[text.index(start) : text.index(end)]


def fields(text):
    return re.findall(r'<tr><td>([\w.]+)</td>', text)


def test_a_run_writes_its_page(runs):
    """Its numbers are those of metrics.jsonl and config.json, and nothing is fetched from elsewhere."""
    text = (runs[0] / 'report.html').read_text()
    page = Page(text)
    rows = read_history(runs[0])
    for term in ('loss', 'reconstruction', 'mto_r', 'val_knn_5'):
        last = [r[term] for r in rows if term in r][-1]
        assert float(page.row(term)[0]) == pytest.approx(last, rel=1e-3)
    assert page.row('steps') == [f'{rows[-1]["step"]} steps (epoch 2 of 2)']
    assert page.row('MTO') == ['on: recalibration none, w_r 0.1']
    assert page.row('model') == ['ViT b, patches of 7, depth 2, width 16, heads 2']
    speed = np.median([r['images_per_s'] for r in rows if 'images_per_s' in r])
    assert page.row('speed, median') == [f'{speed:,.0f} images / s']
    assert page.row('mask_ratio') == ['0.75']
    assert page.row('versions.jax') == [jax.__version__]
    assert all(link.startswith('data:image/') for link in page.links)
    assert sum(s.startswith('data:image/png') for s in page.sources) == 1
    assert '<script' not in text
    assert not re.search(r'https?://', re.sub(r'base64,[A-Za-z0-9+/=]+', '', text))


def test_every_logged_term_has_its_picture(runs):
    page = Page((runs[0] / 'report.html').read_text())
    rows = read_history(runs[0])
    logged = {n for r in rows for n in r if '/' not in n} - {'step', 'epoch', 'seconds_per_step'}
    assert logged <= {alt.split(':')[0] for alt in page.pictures}
    # Two diagnoses and more: each term of the blocks over depth and over time.
    kinds = [alt.split(':')[0] for alt in page.pictures if alt.startswith('Over')]
    assert kinds.count('Over depth') == kinds.count('Over time') >= 3


def test_fields_that_are_not_the_default_come_first(runs):
    text = (runs[0] / 'report.html').read_text()
    default, given = (flatten(json.loads(json.dumps(c))) for c in (base.get_config().to_dict(), config_of(runs[0])))
    changed = fields(between(text, 'What differs from the defaults', '<details>'))
    assert changed == [n for n in given if given[n] != default[n]]
    assert 'mto.w_r' in changed
    assert 'mask_ratio' not in changed


def test_runs_side_by_side(runs, config, tmp_path):
    config.task, config.report.runs = 'report', ','.join(map(str, runs))
    text = tasks.run(config, tmp_path).read_text()
    page = Page(text)
    assert '<b>plain' not in text
    assert '&lt;b&gt;plain' in text
    assert fields(between(text, 'What differs in the config', '<details>')) == ['mto.enabled', 'seed']
    assert page.row('MTO') == ['on: recalibration none, w_r 0.1', 'off']
    assert page.row('mto_r')[1] == ''
    # The same target: the lower reconstruction is the better one. Equal accuracies: none is.
    low = min(float(v) for v in page.row('reconstruction'))
    assert f'<strong>{low:.4g}</strong>' in text
    assert text.count('<strong>') == 1


def test_nothing_is_best_where_targets_differ(runs, tmp_path):
    config = config_of(runs[1])
    crops = {'data': config['data'] | {'crop_area': (0.67, 1.0)}}
    older = {
        'mae': {n: v for n, v in config['mae'].items() if n != 'norm_pix_loss'}
    }  # than a field, which is as it was
    cases = [({}, True), (older, True), ({'mask_ratio': 0.5}, False), (crops, False)]
    for i, (changes, comparable) in enumerate(cases):
        other = epath.Path(tmp_path / f'other{i}')
        record(other, config | changes, read_history(runs[1]))
        assert ('<strong>' in report.write_report(tmp_path, [runs[0], other]).read_text()) == comparable


@pytest.mark.parametrize('change', [{}, {'eval': {'balanced': True}}, {'data': {'image_size': (56, 56)}}])
def test_probes_of_two_kinds_are_not_compared(runs, tmp_path, change):
    config = config_of(runs[0])
    for group, fields_of in change.items():
        config[group] |= fields_of
    record(epath.Path(tmp_path / 'other'), config, read_history(runs[0]))
    both = [analysis_runs.Run(epath.Path(folder), 'a run') for folder in (runs[0], tmp_path / 'other')]
    assert analysis_runs.best(both, 'val_knn_1') is (None if change else max)


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    folders = [epath.Path(tmp_path / s / 'mae') for s in 'ab']
    for f in folders:
        f.parent.mkdir()
        record(f, config_of(runs[0]), read_history(runs[0])[:2])
    page = Page(report.write_report(tmp_path, folders).read_text())
    assert page.rows[0][1:] == ['a/mae', 'b/mae']


def test_accuracies_of_a_comparison(runs, tmp_path):
    found = {
        'a': [{'linear': 0.5, 'knn_5': 0.25, 'linear_l2': 0.1}, {'linear': 0.75, 'knn_5': 0.5, 'linear_l2': 0.01}],
        'b': [{'linear': 0.25, 'knn_5': 1, 'linear_l2': 1}],
    }
    page = Page(report.write_report(epath.Path(tmp_path), runs[:1], found).read_text())
    assert page.row('features') == ['seeds', 'linear', 'knn_5']
    assert page.row('a') == ['2', '0.625 ± 0.12', '0.375 ± 0.12']
    assert page.row('b') == ['1', '0.25', '1']


def test_missing_or_damaged_files_are_named(config, tmp_path):
    config.task = 'report'
    for runs, word in (('', 'report.runs'), (str(tmp_path / 'none'), 'no config.json')):
        config.report.runs = runs
        with pytest.raises(UserError, match=word):
            tasks.run(config, tmp_path / 'w')
    settings, metrics = tmp_path / 'config.json', tmp_path / 'metrics.jsonl'
    settings.write_text(json.dumps(config.to_dict()))
    config.report.runs = str(tmp_path)
    with pytest.raises(UserError, match=r'no metrics\.jsonl'):
        tasks.run(config, tmp_path / 'w')
    for line in (b'{"step": 2, "lo', b'{"step": 2, "loss": null}', b'{"loss": 1.0}', b'[2]', b'\xff\xfe', b'\0\0\0\0'):
        metrics.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line)
        with pytest.raises(UserError, match=r'metrics\.jsonl is damaged in line 2'):
            tasks.run(config, tmp_path / 'w')
    metrics.write_text('{"step": 1, "loss": 2.0}\n')
    for content, word in (('{"task": ', r'config\.json is damaged .*line 1'), ('[]', 'damaged'), ('{}', 'no field')):
        settings.write_text(content)
        with pytest.raises(UserError, match=word):
            tasks.run(config, tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


def test_a_report_that_fails_costs_nothing_else(runs, tmp_path, capsys):
    (tmp_path / 'report.html').mkdir()
    with pytest.raises(UserError, match='cannot be written'):
        report.write_report(tmp_path, runs[:1])
    report.finish(tmp_path, runs[:1])
    report.finish(tmp_path, [tmp_path / 'none'])
    out = capsys.readouterr().out
    assert out.count('report.html could not be written') == 2
    assert 'no config.json' in out


def test_findings_of_a_watch_are_no_losses(config, tmp_path):
    """A name that nobody has listed: with the terms of every step it is a loss, from a watch alone it is measured."""
    rows = [{'step': s, 'loss': 1.0 / s, 'colour': 0.5, 'images_per_s': 9.0} for s in (1, 2)]
    record(tmp_path / 'a', config.to_dict(), [*rows, {'step': 2, 'effective_rank': 3.5}])
    loaded = analysis_runs.load([tmp_path / 'a'])
    assert analysis_runs.losses(loaded) == ['loss', 'colour']
    assert 'effective_rank' in analysis_runs.measured(loaded)
