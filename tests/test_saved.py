"What git sees of notebooks that were opened, run, saved and merged."
import copy, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from rlsft_nb.places import ROOT
from rlsft_nb.papermill_line import NBS
from rlsft_nb.upkeep import saved, tidy

read = lambda p: json.loads(p.read_text())

@pytest.mark.parametrize('nb', sorted(NBS.glob('*.ipynb')), ids=lambda p: p.stem)
def test_what_is_stored_is_as_it_would_be_saved(nb):
    now = read(nb)
    tidy(now)
    assert now == read(nb)

def test_a_run_leaves_no_diff():
    was = read(NBS/'08_explore.ipynb')
    now = copy.deepcopy(was)
    now['metadata'] |= dict(widgets={'application/vnd.jupyter.widget-state+json': dict(state=dict(a=1))}, language_info=dict(name='python', version='3.12'))
    now['metadata']['kernelspec']['display_name'] = 'Python 3 (ipykernel)'
    for i, c in enumerate(c for c in now['cells'] if c['cell_type'] == 'code'):
        c['execution_count'] = i
        c['metadata'] |= dict(execution={'iopub.execute_input': '2026-01-01'}, collapsed=False)
        for o in (o for o in c['outputs'] if 'execution_count' in o): o['execution_count'] = i
    code = next(c for c in now['cells'] if c['cell_type'] == 'code')
    code['outputs'] += [dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': dict(model_id='f00'), 'text/plain': ['Box()']}),
                        dict(output_type='display_data', metadata=dict(live=True), data={'text/plain': ['a curve']}), dict(output_type='stream', name='stderr', text=['12%|###'])]
    dirty = copy.deepcopy(now)
    saved('runs/tiny/08_explore.ipynb', dict(type='notebook', content=now))
    assert now == dirty, 'what lies elsewhere is saved as it is'
    saved('nbs/08_explore.ipynb', dict(type='notebook', content=now))
    assert now == was
    saved('nbs/notes.txt', dict(type='file', content='x'))

def test_jupyter_takes_the_hook_by_its_name():
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
    from traitlets.config import Config
    line = next(l for l in (ROOT/'Makefile').read_text().splitlines() if 'pre_save_hook' in l)
    name = line.partition('pre_save_hook=')[2].split()[0]
    assert AsyncLargeFileManager(config=Config(ContentsManager=dict(pre_save_hook=name))).pre_save_hook is saved
    assert 'root_dir="$(CURDIR)"' in line, 'notebooks show figures/, which lies beside nbs/'

# hooks

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A Makefile that finds itself installed, and one notebook."
    new = tmp_path/'a checkout'
    (new/'nbs').mkdir(parents=True)
    for f in ('Makefile', 'settings.ini', 'setup.py', 'constraints.txt', '.gitignore'): shutil.copy(ROOT/f, new)
    shutil.copy(NBS/'drawing.ipynb', new/'nbs')
    (new/'.venv').mkdir(); (new/'.venv'/'bin').symlink_to(Path(sys.executable).parent); (new/'.venv'/'.ready').touch(); (new/'.venv'/'.ready-dev').touch()
    (tmp_path/'home').mkdir(); monkeypatch.setenv('HOME', str(tmp_path/'home'))
    return new

def sh(where, *words):
    r = subprocess.run(words, cwd=where, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout + r.stderr

needs_make = pytest.mark.skipif(not shutil.which('make') or not shutil.which('git'), reason='no make or git')

@needs_make
def test_install_sets_up_hooks_once_and_nothing_outside(checkout):
    git = lambda *words: sh(checkout, 'git', '-c', 'user.name=x', '-c', 'user.email=x@y', *words)
    git('init', '-q'); git('add', '.'); git('commit', '-qm', 'a')
    assert sh(checkout, 'make', 'hooks') == '' and git('status', '--porcelain') == ''
    assert '.venv/bin/nbdev_merge %O' in git('config', 'merge.nbdev-merge.driver') and 'merge: nbdev-merge' in git('check-attr', 'merge', 'nbs/drawing.ipynb')
    assert os.listdir(os.environ['HOME']) == [] and os.access(checkout/'.git'/'hooks'/'post-merge', os.X_OK)
    (checkout/'.git'/'hooks'/'post-merge').write_text('mine')
    assert sh(checkout, 'make', 'hooks') == '' and (checkout/'.git'/'hooks'/'post-merge').read_text() == 'mine'
    (checkout/'.git'/'hooks'/'post-merge').unlink()
    nb, text = checkout/'nbs'/'drawing.ipynb', (checkout/'nbs'/'drawing.ipynb').read_text()
    git('checkout', '-qb', 'one'); nb.write_text(text.replace('> Colours, axes', '> Colors, axes')); git('commit', '-qam', 'one')
    git('checkout', '-q', '-'); nb.write_text(text.replace('byte for byte: no date', 'bit for bit: no date')); git('commit', '-qam', 'two')
    git('merge', '-q', '-m', 'both', 'one')
    merged = nb.read_text()
    assert '> Colors, axes' in merged and 'bit for bit' in merged and len(json.loads(merged)['cells']) == len(json.loads(text)['cells'])

@needs_make
def test_install_from_an_archive(checkout):
    assert sh(checkout, 'make', 'hooks') == '' and not (checkout/'.gitconfig').exists() and not (checkout/'.gitattributes').exists()
    sh(checkout.parent, 'git', 'init', '-q') # a repository of something else around it
    assert sh(checkout, 'make', 'hooks') == '' and not (checkout.parent/'.gitconfig').exists()

@needs_make
def test_hooks_that_cannot_be_installed_are_told_and_no_more(checkout):
    (checkout/'.git').mkdir() # no repository after all
    assert 'could not be installed; all else works' in sh(checkout, 'make', 'hooks')

def test_what_stands_below_the_claim_is_made_again_alone(tmp_path, monkeypatch):
    import nbformat
    from rlsft_nb import upkeep
    from nbformat.v4 import new_code_cell as code, new_notebook
    old = nbformat.from_dict(dict(output_type='stream', name='stdout', text='old\n'))
    nb = new_notebook(cells=[code("print('new')", outputs=[old]), code('#| default_exp x', outputs=[old]), code("raise SystemExit('it trained')", outputs=[old])])
    nbformat.write(nb, tmp_path/'x.ipynb')
    monkeypatch.setattr(upkeep, 'NBS', tmp_path)
    was = os.environ.get('IN_TEST')
    upkeep.refresh(['x'], shown=True)
    first, *rest = nbformat.read(tmp_path/'x.ipynb', 4).cells
    assert os.environ.get('IN_TEST') == was, 'later progress would be silent'
    assert [o.text for o in first.outputs] == ['new\n'] and all([o.text for o in c.outputs] == ['old\n'] for c in rest)
