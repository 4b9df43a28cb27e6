"Rules of the house."
import ast, json, re, statistics, subprocess, sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path
import pytest
from rlsft_nb.parameters import TYPES, load_params, models
from rlsft_nb.places import ROOT
from rlsft_nb.papermill_line import NBS, notebook_params
from rlsft_nb.readme import to_markdown
from rlsft_nb.runner import numbered
from rlsft_nb.upkeep import drift

ALL = sorted(NBS.glob('*.ipynb'))
cells = lambda p: json.loads(p.read_text())['cells']
source = lambda c: ''.join(c['source'])
code = lambda p: [c for c in cells(p) if c['cell_type'] == 'code']
name = lambda p: p.stem

def test_lists_are_not_empty():
    from nbdev.doclinks import nbglob
    assert numbered() and {Path(p).name for p in nbglob(str(NBS))} == {p.name for p in ALL}
    assert not list(NBS.rglob('.notest'))

@pytest.mark.parametrize('nb', numbered(), ids=name)
def test_parameters_cell(nb):
    tagged = [i for i, c in enumerate(code(nb)) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, 'expected one cell tagged parameters'
    src = source(code(nb)[tagged[0]])
    assert '#|' not in src and len(src.splitlines()) <= 6
    assert all(isinstance(n, ast.AnnAssign) for n in ast.parse(src).body)
    assert not any('=' in line.partition('#')[2] for line in src.splitlines()), 'papermill drops a parameter with = in its comment'
    params = notebook_params(nb)
    assert all(kind in TYPES for kind, _ in params.values())
    assert params['model'][1] == 'tiny' and params.get('seed', ('int', 0)) == ('int', 0)
    assert 'check_params(globals())' in source(code(nb)[tagged[0] + 1])

@pytest.mark.parametrize('nb', ALL, ids=name)
def test_stored_outputs(nb):
    outs = [o for c in code(nb) for o in c['outputs']]
    text = json.dumps([{k: v for k, v in o.get('data', o).items() if not k.startswith('image/')} for o in outs])
    figures = any('image/png' in o.get('data', {}) for o in outs)
    assert len(json.dumps(outs)) < (450_000 if figures else 50_000)
    assert not re.search(r'/(home|root|Users|tmp|private|work)/|[A-Z]:\\\\', text) and str(ROOT) not in text, 'an absolute path in a stored output'
    assert not re.search(r'\d+%\|| at 0x[0-9a-f]{6}', text), 'a progress bar or an address in a stored output'
    assert not any(o['output_type'] == 'error' for o in outs), 'a stored error'
    assert 'widgets' not in json.loads(nb.read_text())['metadata'], 'widgets without their kernel'

@pytest.mark.parametrize('nb', ALL, ids=name)
def test_notebook_rules(nb):
    first = source(cells(nb)[0])
    assert first.startswith('# ') and json.loads(nb.read_text())['metadata']['kernelspec']['name'] == 'python3'
    for c in code(nb): assert 'nbdev_export' + '()' not in source(c)
    for c in code(nb): assert 'RLSFT_RUNS' in source(c) or not re.search(r'^(?!#\| (slow|export)).*save_(figure|record)\(', source(c), re.S), 'lessons leave runs/ alone'
    assert all(c.get('id') for c in cells(nb))

@pytest.mark.parametrize('nb', numbered(), ids=name)
def test_a_numbered_notebook_is_read_in_a_quarter_of_an_hour(nb):
    lines = [[l for l in source(c).splitlines() if l.strip() and not l.startswith('#|')] for c in code(nb)]
    exported = [c for c in code(nb) if source(c).startswith('#| export')]
    shown = next(i for i, c in enumerate(cells(nb)) if any('image/png' in (d := o.get('data', {})) or 'verdict' in str(d.get('text/markdown')) for o in c.get('outputs', ())))
    assert len(cells(nb)) <= 60 and statistics.median(len(l) for l in lines if l) <= 5 and 2*len(exported) <= len(code(nb))
    assert shown <= 4, 'figure and verdicts stand below the claim'

def test_no_stale_module():
    made = {m for nb in ALL for c in code(nb) for m in re.findall(r'#\|\s*default_exp\s+(\S+)', source(c))}
    assert {p.stem for p in (ROOT/'rlsft_nb').glob('*.py')} - {'__init__', '__main__', '_modidx'} == made

def test_export_clean_and_readme_leave_no_diff(): assert drift() == []

def test_readme(): assert (ROOT/'README.md').read_text() == to_markdown(json.loads((NBS/'index.ipynb').read_text()))

INDEX = '\n\n'.join(map(source, cells(NBS/'index.ipynb')))
SLUG = { # what a heading is called in a link
    'README.md': lambda h: re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-'), # as GitHub does
    'nbs/index.ipynb': lambda h: h.replace(' ', '-')} # as JupyterLab and nbconvert do

@pytest.mark.parametrize('file,text', [('README.md', (ROOT/'README.md').read_text()), ('nbs/index.ipynb', INDEX)], ids=SLUG)
def test_links_and_images_of_the_first_page(file, text):
    links, prose = re.findall(r'\]\(([^)]+)\)', text), re.sub(r'```.*?```', '', text, flags=re.S)
    heads = {SLUG[file](h) for h in re.findall(r'^#+ (.*)', prose, re.M)}
    assert len(links) > 80 and sum(l.endswith('.png') for l in links) == 5
    assert [l for l in links if '://' not in l and not l.startswith('#') and not ((ROOT/file).parent/l.partition('#')[0]).is_file()] == []
    assert [l for l in links if l.startswith('#') and l[1:] not in heads] == [] and sum(l.startswith('#') for l in links) >= 9

def test_first_screen():
    prose = re.sub(r'```.*?```', lambda m: '\n'*m[0].count('\n'), INDEX, flags=re.S)
    at = [INDEX.index(x) for x in ('make paper', 'rlsft compare', 'rlsft game', '**Price:**', '.png', '(#Two-commands)', '```console', '## What-comes-out'.replace('-', ' '))]
    assert at == sorted(at) and len(prose[:prose.index('.png')].splitlines()) < 15

def test_pyflakes():
    r = subprocess.run([sys.executable, '-m', 'pyflakes', 'rlsft_nb'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr

def room_imports():
    "(room, room it takes from, name, whether at its top level) for every import between rooms."
    for p in sorted((ROOT/'rlsft_nb').glob('[a-z0-9]*.py')):
        tree = ast.parse(p.read_text())
        for n in ast.walk(tree):
            if not isinstance(n, ast.ImportFrom) or not (n.level == 1 or (n.module or '').startswith('rlsft_nb')): continue
            module = (n.module or '').removeprefix('rlsft_nb').removeprefix('.')
            for a in n.names: yield p.stem, module or a.name, a.name if module else '', n in tree.body

def test_imports_point_downwards():
    below = {}
    for room, other, _, top in room_imports():
        if top: below.setdefault(room, set()).add(other)
    assert len(below) > 30
    tuple(TopologicalSorter(below).static_order()) # CycleError names the rooms of a circle

def test_the_house_is_drawn_as_it_stands():
    "Every room is on one floor of the index, and imports from its own floor or from one above it in the table."
    rows = [l for l in source(next(c for c in cells(NBS/'index.ipynb') if source(c).startswith('## The house'))).splitlines() if l.startswith('|')]
    floor = {m.lstrip('0123456789_'): i for i, l in reversed([*enumerate(rows)]) for m in re.findall(r'\]\((\w+)\.ipynb\)', l)} # of forget and 09_forget the module is the first
    said = [m for l in rows for m in re.findall(r'\]\((\w+)\.ipynb\)', l)]
    assert sorted(said) == sorted(p.stem for p in ALL if p.stem != 'index')
    assert [(room, other) for room, other, _, top in room_imports() if top and other in floor and floor[other] > floor[room]] == []

def test_no_room_takes_what_another_hides():
    assert [(room, other, name) for room, other, name, _ in room_imports() if name.startswith('_') and not name.startswith('__')] == []

def test_everything_required_is_pinned():
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    asked = ' '.join(ini['DEFAULT'][k] for k in ('requirements', 'dev_requirements', 'smollm2_requirements')) # dev holds those of training and of the notebooks
    plain = lambda s: re.split(r'[<>=!;]', s)[0].strip().lower().replace('_', '-')
    pinned = {plain(l) for l in (ROOT/'constraints.txt').read_text().splitlines() if l and not l.startswith('#')}
    assert {plain(r) for r in asked.split()} <= pinned

@pytest.mark.parametrize('model', models())
def test_model_files(model):
    cfg = load_params(model)
    assert cfg.model.source in ('embedded', 'hub', 'folder', 'gguf') and cfg.model.dtype in ('float32', 'bfloat16')
    if cfg.model.source == 'hub': assert re.fullmatch(r'[0-9a-f]{40}', cfg.model.revision), 'a Hub model pins its commit'

def test_nothing_unsafe():
    for p in (ROOT/'rlsft_nb').glob('*.py'):
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Call)}
        assert not calls & {'eval', 'exec', 'yaml.load', 'pickle.load', 'pickle.loads', 'os.system'}, p.name
        assert 'trust_remote_code=True' not in p.read_text(), p.name
