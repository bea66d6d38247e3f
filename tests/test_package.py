"""The package as others install it: away from the checkout."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import mto_jax
from mto_jax import methods
from tests.test_api import save, small

PARTS = ('mto_jax', 'pyproject.toml', 'README.md', 'LICENSE', 'requirements.txt')  # what an installation reads


def project():
    return tomllib.loads(Path('pyproject.toml').read_text())['project']


def required(path):
    """What a requirements file names beside those of requirements.txt, files that it includes included."""
    found = []
    for line in (line.partition(' #')[0].strip() for line in Path(path).read_text().splitlines()):
        if line.startswith('-r ') and line != '-r requirements.txt':
            found += required(line.removeprefix('-r '))
        elif line and not line.startswith(('#', '-r')):
            found.append(line)
    return found


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r'^## (\S+)', Path('CHANGELOG.md').read_text(), re.M)
    assert headings[0] == mto_jax.__version__


def test_extras_are_the_requirements():
    """Each extra has its file, with the same packages; a file without one is for comparisons only."""
    extras = project()['optional-dependencies']
    files = {p.stem.removeprefix('requirements-'): p for p in Path().glob('requirements-*.txt')}
    assert extras.keys() == files.keys() - {'peers', 'timm'}
    for name, listed in extras.items():
        assert listed == required(files[name]), name
        assert '-r requirements.txt' in files[name].read_text().splitlines()


def test_the_oldest_python_is_the_one_the_code_is_written_for():
    tools = tomllib.loads(Path('pyproject.toml').read_text())['tool']
    oldest = project()['requires-python'].removeprefix('>=')
    assert tools['ruff']['target-version'] == 'py' + oldest.replace('.', '')
    assert f'Python {oldest}+' in Path('README.md').read_text()


USE = """
import sys
import mto_jax
assert 'jax' not in sys.modules, 'import mto_jax must be light'
from mto_jax import api
import numpy as np
features = api.load(sys.argv[1]).embed(np.load('images.npy'))
assert 'tensorflow' not in sys.modules
np.save('features.npy', features)
print(mto_jax.__version__, mto_jax.__file__)
"""


@pytest.mark.slow
def test_installed_into_an_empty_environment(tmp_path, rng):
    """From a copy of the files that it needs, it is found there alone, and embeds images, from an empty folder.

    Its dependencies are this environment's, through a path file: to download them again would show nothing more.
    """
    for name in PARTS:
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy
        copy(name, tmp_path / 'source' / name)
    python = tmp_path / 'env' / 'bin' / 'python'
    run = {'check': True, 'capture_output': True, 'text': True}
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'env'], **run)
    pip = [sys.executable, '-m', 'pip', '--python', python]
    subprocess.run([*pip, 'install', '-q', '--no-deps', tmp_path / 'source'], **run)
    (site,) = (tmp_path / 'env').glob('lib/*/site-packages')
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))

    c, empty = small(), tmp_path / 'empty'
    method, images = methods.build(c), rng.integers(0, 256, (5, 28, 28, 1), np.uint8)
    where = save(c, tmp_path / 'run', *method.init(jax.random.key(0)))
    empty.mkdir()
    np.save(empty / 'images.npy', images)
    out = subprocess.run([python, '-I', '-c', USE, where], cwd=empty, **run).stdout.split()
    assert out == [mto_jax.__version__, str(site / 'mto_jax' / '__init__.py')]
    assert np.load(empty / 'features.npy').shape == (5, 16)
