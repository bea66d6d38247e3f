"""Imports go one way: a package imports only those before it."""

import ast
import re
from pathlib import Path

import pytest

import mto_jax

ROOT = Path(mto_jax.__file__).parent
# A module that is in no package counts by its own name.
LAYERS = [
    {'errors'},
    {'config', 'masking', 'losses', 'attention'},
    {'mto', 'cli'},
    {'runtime'},
    {'models', 'data'},
    {'methods'},
    {'training'},
    {'evals', 'analysis', 'exchange'},
    {'tasks', 'studies'},
    {'tools', 'api', 'convert'},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path):
    """Dotted names of what a file imports from this repository, functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (n.name for n in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, 'imports name the package'
            yield from (f'{node.module}.{n.name}' for n in node.names)


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).with_suffix('').parts[0]
    if package == '__init__':
        package = None
    for name in imported(path):
        first, _, rest = name.partition('.')
        assert first not in ('configs', 'tests', 'benchmarks'), f'{path} imports {name}'
        if first != 'mto_jax':
            continue
        other = rest.partition('.')[0]
        assert package, f'{path} imports {name}'
        assert other == package or LEVEL[other] < LEVEL[package], f'{path} imports {name}, which comes after it'


def test_every_part_has_a_level():
    there = {p.stem for p in ROOT.iterdir() if p.suffix == '.py' or (p / '__init__.py').exists()} - {'__init__'}
    assert there == LEVEL.keys()


def modules():
    return {'mto_jax.' + '.'.join(p.relative_to(ROOT).with_suffix('').parts): p for p in ROOT.rglob('*.py')}


def test_links_of_the_docs():
    """Every relative link of the README and the docs leads somewhere."""
    top = ROOT.parent
    pages = [*top.glob('*.md'), *top.glob('docs/**/*.md')]
    links = [(p, link) for p in pages for link in re.findall(r'\]\(([^)#:\s]+)[^):]*\)', p.read_text())]
    assert len(links) > 50
    assert not [f'{p.name}: {link}' for p, link in links if not (p.parent / link).exists()]


def test_no_circle_of_modules():
    """Inside the packages too."""
    graph = {}
    for name, path in modules().items():
        found = {n for i in imported(path) for n in (i, i.rpartition('.')[0], f'{i}.__init__') if n in modules()}
        graph[name] = found - {name}
    left = dict(graph)
    while free := [n for n, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f'a circle among {sorted(left)}'
