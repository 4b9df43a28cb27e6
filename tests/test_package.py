"A wheel, installed into an empty folder and used outside the repository; and what the small installation must not need."
import importlib.metadata, json, os, re, shutil, subprocess, sys, textwrap, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from rlsft_nb.places import INSTALLED, PACKAGE, ROOT, shipped

PARTS = ('rlsft_nb', 'params', 'settings.ini', 'setup.py', 'MANIFEST.in', 'points24.py', 'README.md', 'LICENSE', 'constraints.txt')
LIGHT = ('parameters', 'stages', 'intervals', 'verdicts', 'parallel', 'commands', 'cli', 'solver', 'answers', 'deals', 'tricks', 'game', 'models', 'matrix_names', 'tensor_files', 'slices', 'weights', 'tiny', 'matrices', 'chance', 'comparison', 'comparison_page', 'chain',
         'edits', 'surgery', 'spectra', 'workbench', 'restoration', 'restore', 'graph', 'papermill_line', 'texts', 'divergence', 'forget', 'forget_page') # rooms of the game and the workbench

def call(words, cwd, **env):
    "A command without this repository on its path, and without folders set for it."
    clean = {k: v for k, v in os.environ.items() if k not in ('RLSFT_RUNS', 'RLSFT_FIGURES', 'PYTHONPATH', 'IN_TEST')}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=clean | dict(OMP_NUM_THREADS='1') | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)

def done(words, cwd, **env):
    r = call(words, cwd, **env)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    return r.stdout

@pytest.fixture(scope='session')
def source(tmp_path_factory):
    "The files that a package is built from, in a folder that may be written to."
    new = tmp_path_factory.mktemp('source')
    for f in PARTS: (shutil.copytree(ROOT/f, new/f, ignore=shutil.ignore_patterns('__pycache__')) if (ROOT/f).is_dir() else shutil.copy(ROOT/f, new/f))
    return new

@pytest.fixture(scope='session')
def wheel(source, tmp_path_factory):
    to = tmp_path_factory.mktemp('wheel')
    done([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', to, source], to)
    return next(to.glob('*.whl'))

@pytest.fixture(scope='session')
def target(wheel, tmp_path_factory):
    "The wheel in an empty folder; what it requires comes from the environment of the tests."
    to = tmp_path_factory.mktemp('installed')
    done([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--no-compile', '--target', to, wheel], to)
    return to

@pytest.fixture
def outside(target, tmp_path):
    "Runs a script outside the repository: its stdout."
    there = tmp_path/'empty'
    there.mkdir()
    return lambda script: done([sys.executable, '-c', textwrap.dedent(script)], there, PYTHONPATH=str(target))

# what is in it

files = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

def test_the_wheel_holds_code_data_and_params(wheel):
    with zipfile.ZipFile(wheel) as z: names = set(z.namelist())
    inside = {n.removeprefix('rlsft_nb/') for n in names if n.startswith('rlsft_nb/')}
    assert inside == files(ROOT/'rlsft_nb') | {f'params/{n}' for n in files(ROOT/'params')}
    assert {n.split('/')[0] for n in names} == {'rlsft_nb', 'points24.py', next(n for n in names if '.dist-info' in n).split('/')[0]}

def test_a_source_archive_builds_the_same_wheel(source, wheel, tmp_path):
    made = done([sys.executable, '-c', f'from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))'], source).split()[-1]
    done([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', tmp_path, tmp_path/made], tmp_path)
    names = lambda w: set(zipfile.ZipFile(w).namelist())
    assert names(next(tmp_path.glob('*.whl'))) == names(wheel)

def test_the_repository_reads_its_own_params(): assert not INSTALLED and not (PACKAGE/'params').exists()

# outside the repository

def test_game_params_and_model(outside, target, tmp_path):
    before = files(target)
    told = json.loads(outside('''
        import json, rlsft_nb
        from rlsft_nb.origins import provenance
        from rlsft_nb.parameters import load_params, models
        from rlsft_nb.places import figures_dir, params_dir, runs_root, shipped
        from rlsft_nb.game import prompt, solve, verify
        from rlsft_nb.generation import generate
        from rlsft_nb.models import load_lm
        lm, tok = load_lm('tiny')
        said = generate(lm, tok, [prompt(['3', '3', '8', '8'])])[0]
        print(json.dumps(dict(file=rlsft_nb.__file__, params=str(params_dir()), models=models(), model=load_params('tiny').model.path, solved=solve([3, 3, 8, 8]),
            right=verify('{"formula": "8/(3-8/3)=24"}', ['3', '3', '8', '8']).correct, said=said, runs=str(runs_root()), figures=str(figures_dir('tiny')), commit=provenance()['commit'])))'''))
    there = tmp_path/'empty'
    assert told['file'] == str(target/'rlsft_nb'/'__init__.py') and told['params'] == str(target/'rlsft_nb'/'params')
    assert told['models'] == sorted(p.stem for p in (ROOT/'params').glob('*.yaml') if p.stem not in ('base', 'claims')) and told['model'] == 'tiny'
    assert told['solved'] == ['8/(3-8/3)'] and told['right'] and told['said']
    assert (told['runs'], told['figures'], told['commit']) == (str(there/'runs'), str(there/'figures'/'tiny'), 'unknown')
    assert files(target) == before and not list(there.iterdir())

def test_a_model_of_ones_own_and_a_stage(outside, tmp_path):
    (tmp_path/'empty'/'params').mkdir()
    (tmp_path/'empty'/'params'/'mine.yaml').write_text('sft: {steps: 7}\n')
    subprocess.run(['git', 'init', '-q', str(tmp_path/'empty')], check=True) # somebody's repository is not ours
    out = outside('''
        from rlsft_nb.parameters import load_params, models
        from rlsft_nb.stages import Stage, run_stage
        cfg = load_params('mine')
        st = run_stage(Stage('a', 'mine', {}), lambda folder: dict(n=1), cfg)
        print('mine' in models(), cfg.sft.steps, cfg.name, st.results()['n'], st.path)''').split()
    assert out[:4] == ['True', '7', 'mine', '1'] and Path(out[4]).parent == tmp_path/'empty'/'runs'/'mine'
    assert json.loads((Path(out[4])/'done.json').read_text())['commit'] == 'unknown'

def test_the_command(outside, target, tmp_path):
    for words in ([target/'bin'/'rlsft'], ['-m', 'rlsft_nb']):
        run = lambda *args: call([sys.executable, *words, *args], tmp_path, PYTHONPATH=str(target))
        assert run('--help').stdout.startswith('usage: rlsft COMMAND')
        assert run('game', 'solve', '3', '3', '8', '8').stdout == '8/(3-8/3)\n'
    assert run('plan', 'tiny', '--quiet').returncode == 0
    r = run('plan', 'tiny', '--slurm') # a script that runs notebooks
    assert (r.returncode, r.stdout) == (1, '') and r.stderr.startswith('Problem: this runs the notebooks of the repository')
    r = call([sys.executable, '-m', 'rlsft_nb.paper'], tmp_path, PYTHONPATH=str(target))
    assert r.returncode == 2 and r.stderr.startswith('Problem: this runs the notebooks of the repository') and len(r.stderr.splitlines()) == 1

SNIPPETS = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)

def test_readme_has_snippets(): assert SNIPPETS

@pytest.mark.parametrize('code', SNIPPETS)
def test_readme_snippets(code, outside, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    tuned = shutil.copytree(shipped('tiny'), tmp_path/'tuned')
    rng = torch.Generator().manual_seed(0)
    w = load_file(tuned/'model.safetensors')
    save_file({k: v + .01*torch.randn(v.shape, generator=rng).to(v.dtype) if v.ndim == 2 else v for k, v in w.items()}, tuned/'model.safetensors', metadata=dict(format='pt'))
    for said, meant in (('path/to/base', shipped('tiny')), ('path/to/tuned', tuned), ('path/to/new', tmp_path/'new'), ('0-6', '0-1')): code = code.replace(said, str(meant))
    outside('if __name__ == "__main__":\n' + textwrap.indent(code, '    '))

# the small installation

ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini')
asked = lambda key: ini['DEFAULT'][key].split()
plain = lambda name: re.sub(r'[-_.]+', '-', name).lower()

def closure(requirements):
    "The distributions that an installation of `requirements` brings."
    found, todo = set(), [Requirement(r) for r in requirements]
    while todo:
        r = todo.pop()
        if plain(r.name) in found or r.marker and not any(r.marker.evaluate(dict(extra=e)) for e in ('', *r.extras)): continue
        try: below = importlib.metadata.requires(r.name) or []
        except importlib.metadata.PackageNotFoundError: continue
        found.add(plain(r.name))
        wanted = ('', *r.extras)
        todo += [q for q in map(Requirement, below) if not q.marker or any(q.marker.evaluate(dict(extra=e)) for e in wanted)]
        for q in todo: q.marker = None # judged by whoever asked for it
    return found

def small(script, *more, cwd=ROOT):
    "Runs a script as in an installation of `requirements` alone: what else is here, and `more`, is not there."
    here = closure(asked('requirements'))
    assert {'torch', 'transformers', 'tokenizers'} <= here and not here & {'jupyterlab', 'nbdev', 'papermill', 'trl', 'accelerate', 'datasets', 'ipywidgets', 'ipython'}
    by_module = importlib.metadata.packages_distributions()
    barred = sorted(m for m, names in by_module.items() if not {*map(plain, names)} & (here | {'rlsft-nb', 'setuptools', 'pip'}) and m.isidentifier())
    assert {'jupyterlab', 'nbdev', 'papermill', 'trl', 'accelerate', 'datasets', 'ipywidgets', 'IPython'} <= {*barred}
    bar = f"""
import sys
from importlib.machinery import PathFinder
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None): return None if name.split('.')[0] in {{*{[*barred, *more]!r}}} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Installed if f is PathFinder else f for f in sys.meta_path]
"""
    return call([sys.executable, '-c', bar + textwrap.dedent(script)], cwd, PYTHONPATH=str(ROOT))

def test_rooms_need_only_what_is_required():
    r = small(f'''
        import importlib
        for room in {LIGHT!r}:
            try: importlib.import_module(f'rlsft_nb.{{room}}')
            except ModuleNotFoundError as e: print(room, e)''', 'matplotlib') # drawn with, but only on demand
    assert (r.returncode, r.stdout) == (0, ''), r.stdout + r.stderr

@pytest.mark.parametrize('words, code', [('game solve 3 3 8 8', 0), ('compare tiny tiny --draws 2 --workers 1', 0)])
def test_commands_of_the_small_installation(words, code, tmp_path):
    r = small(f'''
        from rlsft_nb.cli import main
        if __name__ == '__main__': sys.exit(main({words.split()}))''', cwd=tmp_path)
    assert r.returncode == code and 'No module' not in r.stderr, r.stderr

def test_help_and_game_do_not_load_torch():
    for room in ('parameters', 'stages', 'intervals', 'verdicts', 'parallel', 'commands', 'cli', 'game'):
        r = call([sys.executable, '-c', f"import sys, rlsft_nb.{room}; print(*{{'torch', 'transformers', 'scipy', 'matplotlib', 'pandas'}} & {{*sys.modules}})"], ROOT, PYTHONPATH=str(ROOT))
        assert (r.returncode, r.stdout) == (0, '\n'), (room, r.stdout + r.stderr)

def test_extras():
    assert {*asked('train_requirements'), *asked('notebooks_requirements'), *asked('paper_requirements')} <= {*asked('dev_requirements')}
    assert not {*asked('requirements')} & {*asked('train_requirements'), *asked('notebooks_requirements')}
