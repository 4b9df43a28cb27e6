"The literal commands, as they are typed: in a terminal, a pipe, a loop and a Jupyter cell."
import base64, hashlib, json, os, shutil, subprocess, sys
import pexpect, pytest
from rlsft_nb.core import ROOT, read_json

sha = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()
files = lambda repo: sorted(str(p.relative_to(repo)) for f in ('runs', 'figures') for p in (repo/f).rglob('*') if p.is_file())

def terminal(command, cwd, timeout=300):
    "Run a command in a terminal: (exit code, what it showed)."
    c = pexpect.spawn('bash', ['-c', command], cwd=str(cwd), timeout=timeout, dimensions=(40, 200), encoding='utf-8', env=dict(os.environ))
    c.expect(pexpect.EOF); c.close()
    return c.exitstatus, c.before

def pipe(command, cwd, **kw):
    return subprocess.run(['bash', '-c', command], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, **kw)

@pytest.fixture(autouse=True)
def source_stays(request):
    "The source notebook is never written."
    nbs = (request.getfixturevalue('repo') if 'repo' in request.fixturenames else ROOT)/'nbs'
    before = {p: sha(p) for p in nbs.glob('00_*.ipynb')}
    yield
    assert before and {p: sha(p) for p in nbs.glob('00_*.ipynb')} == before

# it works

def test_terminal(repo):
    rc, shown = terminal('papermill nbs/00_toy.ipynb -p model tiny', repo)
    assert rc == 0, shown
    assert 'runs/tiny/00_toy.ipynb' in files(repo) and 'figures/tiny/toy.json' in files(repo)
    assert "name: tiny" in (repo/'runs/tiny/00_toy.ipynb').read_text() # the configuration is recorded

def test_pipe_other_seed_and_module(repo):
    r = pipe('python -m papermill nbs/00_toy.ipynb -p seed 1 -y "overrides: {sft: {lr: 2.0e-6}}" -p lr 1 | cat', repo)
    assert r.stdout == '' and 'runs/tiny/00_toy-seed1.ipynb' in files(repo), r.stderr
    made = read_json(repo/'figures/tiny/toy-seed1.json')
    assert (made['n'], made['seed'], list(made['stages'])) == (3, 1, [p.parent.name.join(['tiny/', '']) for p in (repo/'runs'/'tiny').glob('toy-*/done.json')])
    assert 'lr: 2.0e-06' in (repo/'runs/tiny/00_toy-seed1.ipynb').read_text()

def test_switches_may_be_spelt_in_lower_case(repo):
    r = pipe('papermill nbs/00_toy.ipynb -p smoke true', repo)
    assert r.returncode == 0 and 'smoke = True' in (repo/'runs/tiny/00_toy.ipynb').read_text(), r.stderr

def test_loop_with_stdin_fifo(repo):
    r = pipe(r"printf 'tiny\nsmollm2\n' | while read m; do papermill nbs/00_toy.ipynb -p model $m; echo $m $?; done", repo)
    assert r.stdout.split() == ['tiny', '0', 'smollm2', '0'], r.stderr
    assert {'runs/tiny/00_toy.ipynb', 'runs/smollm2/00_toy.ipynb'} <= set(files(repo))

def test_notebook_on_stdin_is_not_mistaken(repo):
    r = pipe('cat nbs/00_toy.ipynb | papermill nbs/00_toy.ipynb', repo)
    assert r.returncode == 0 and 'runs/tiny/00_toy.ipynb' in files(repo), r.stderr

def test_jupyter_cells(repo):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    command = 'papermill nbs/00_toy.ipynb -p model tiny'
    nb = new_notebook(cells=[new_code_cell(f'!{command}; echo rc $?'), new_code_cell(f'%%bash\n{command} -p seed 1; echo rc $?')])
    NotebookClient(nb, timeout=300, kernel_name='python3', resources=dict(metadata=dict(path=str(repo)))).execute()
    shown = [''.join(o.get('text', '') for o in c.outputs) for c in nb.cells]
    assert all('rc 0' in s for s in shown), shown
    assert {'runs/tiny/00_toy.ipynb', 'runs/tiny/00_toy-seed1.ipynb'} <= set(files(repo))

def test_own_output_path_from_another_folder(repo, tmp_path):
    r = pipe(f'papermill ../nbs/00_toy.ipynb {tmp_path}/"out-{{model}}.ipynb" -p model tiny', repo/'params')
    assert r.returncode == 0 and (tmp_path/'out-tiny.ipynb').is_file() and 'runs/tiny/00_toy.ipynb' not in files(repo), r.stderr

def test_real_notebook(env):
    rc, shown = terminal('papermill nbs/00_game.ipynb -p model tiny', ROOT)
    assert rc == 0, shown
    assert os.path.isfile(os.path.join(os.environ['RLSFT_RUNS'], 'tiny', '00_game.ipynb'))

# it refuses, in one line, and writes nothing

coded = base64.b64encode(b'seed: x').decode()

@pytest.mark.parametrize('args, message', [
    ('-p modle tiny', "unknown parameter 'modle' of 00_toy; did you mean 'model'?"),
    ('-p model qwen8b', "model='qwen8b' has no file in params/; did you mean 'qwen7b'?"),
    ('-p seed x', "parameter seed='x' is str, expected int"),
    ('-r seed 0', "parameter seed='0' is str, expected int"),
    ('-p smoke maybe', "parameter smoke='maybe' is str, expected bool"),
    ("-y '{smoke: 1}'", "parameter smoke=1 is int, expected bool"),
    ("-y 'overrides: {sft: {lrr: 1.0}}'", "overrides: sft.lrr is no parameter; did you mean 'lr'?"),
    (f'-b {coded}', "parameter seed='x' is str, expected int"),
    ('-f nope.yaml', 'cannot read nope.yaml: No such file or directory'),
    ("-y '{a'", "'{a' is not YAML: "),
    ('nbs/00_toy.ipynb', 'output path nbs/00_toy.ipynb is among the source notebooks'),
    ('nbs/new.ipynb', 'output path nbs/new.ipynb is among the source notebooks'),
    ("'nbs/{model}.ipynb' -p model tiny", 'output path nbs/{model}.ipynb is among the source notebooks')])
def test_refused(repo, args, message):
    r = pipe(f'papermill nbs/00_toy.ipynb {args}', repo)
    assert r.returncode == 2 and r.stdout == '' and r.stderr.count('\n') == 1, r.stderr
    assert r.stderr.startswith(f'ParamError: {message}')
    assert files(repo) == [] and not (repo/'runs').exists() and len(list((repo/'nbs').iterdir())) == 1

def test_refused_in_a_terminal(repo):
    rc, shown = terminal('papermill nbs/00_toy.ipynb -p modle tiny', repo)
    assert rc == 2 and shown.strip() == "ParamError: unknown parameter 'modle' of 00_toy; did you mean 'model'?"
    assert not (repo/'runs').exists()

def test_misspelt_notebook(repo):
    r = pipe('papermill nbs/00_toi.ipynb -p model tiny', repo)
    assert r.returncode == 2 and r.stderr == "ParamError: no notebook nbs/00_toi.ipynb; did you mean '00_toy.ipynb'?\n"

def test_model_that_needs_gpus(repo):
    (repo/'params'/'huge.yaml').write_text('needs: {gpus: 99, gib: 80}\n')
    r = pipe('papermill nbs/00_toy.ipynb -p model huge', repo)
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode == 1 and 'Traceback' not in r.stderr, r.stderr
    assert last.startswith('StageMissing: stage huge/toy-') and last.endswith('Make it with: papermill nbs/00_toy.ipynb -p model huge -p seed 0')

# other people's papermill is left alone

def test_foreign_notebook(repo, tmp_path):
    nb = json.loads((repo/'nbs'/'00_toy.ipynb').read_text())
    nb['cells'] = nb['cells'][:2]
    (tmp_path/'other.ipynb').write_text(json.dumps(nb))
    r = pipe('papermill other.ipynb out.ipynb -p modle tiny', tmp_path)
    assert r.returncode == 0 and 'Passed unknown parameter: modle' in r.stderr
    rc, shown = terminal('papermill other.ipynb', tmp_path)
    assert rc == 2 and "Missing argument 'OUTPUT_PATH'" in shown
    assert pipe('papermill other.ipynb', tmp_path).stdout.lstrip().startswith('{')

def test_light_on_papermill(env):
    code = "import sys, papermill; assert 'rlsft_nb.paper' in sys.modules; assert not {'rlsft_nb.core', 'torch', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], stdin=subprocess.DEVNULL).returncode == 0
    code = "import rlsft_nb.paper, papermill.engines as e; assert e.papermill_engines.get_engine('rlsft').nb_kernel_name"
    assert subprocess.run([sys.executable, '-c', code], stdin=subprocess.DEVNULL).returncode == 0

# make paper

def test_runner_twice(repo):
    run = lambda *a: pipe(' '.join(['python -m rlsft_nb.paper', *a]), repo)
    first = run()
    assert first.returncode == 0 and 'runs/tiny/00_toy.ipynb' in first.stdout and 'figures/tiny/toy.json' in first.stdout and 'runs/tiny/toy-' in first.stdout, first.stderr
    before = {p: sha(repo/p) for p in files(repo)}
    second = run('--model', 'tiny', '--seed', '0')
    assert second.returncode == 0 and second.stdout.splitlines()[-1] == 'Everything is up to date for model tiny, seed 0.'
    assert {p: sha(repo/p) for p in files(repo)} == before
    (repo/'figures/tiny/toy.json').unlink()
    third = run()
    assert 'up to date' not in third.stdout and (repo/'figures/tiny/toy.json').is_file()

def test_what_follows_runs_again(repo):
    first, record = repo/'nbs'/'00_toy.ipynb', repo/'runs'/'tiny'/'01_more.json'
    shutil.copy(first, repo/'nbs'/'01_more.ipynb')
    run, was = lambda: pipe('python -m rlsft_nb.paper', repo), first.read_text()
    assert run().returncode == 0 and record.is_file()
    nb = json.loads(was)
    nb['cells'][-1]['source'] = '1/0'
    first.write_text(json.dumps(nb))
    r = run()
    assert r.returncode == 1 and '00_toy.ipynb stopped' in r.stderr and not record.is_file()
    first.write_text(was)
    r = run()
    assert r.returncode == 0 and 'up to date' not in r.stdout and record.is_file()
    assert run().stdout.splitlines()[-1] == 'Everything is up to date for model tiny, seed 0.'

def test_runner_failure(repo):
    (repo/'params'/'huge.yaml').write_text('needs: {gpus: 99, gib: 80}\n')
    r = pipe('python -m rlsft_nb.paper --model huge', repo)
    assert r.returncode == 1 and '00_toy.ipynb stopped. StageMissing: stage huge/toy-' in r.stderr and 'Traceback' not in r.stderr
    assert not list((repo/'runs'/'huge').glob('*.json'))
    r = pipe('python -m rlsft_nb.paper --model qwen8b', repo)
    assert r.returncode == 2 and r.stderr == "ParamError: model='qwen8b' has no file in params/; did you mean 'qwen7b'?\n"

def test_runner_of_seeds(repo):
    run = lambda *a: pipe(' '.join(['python -m rlsft_nb.paper', *a]), repo)
    first = run('--seeds', '3')
    told = sorted(l for l in first.stderr.splitlines() if l.startswith('seed '))
    assert first.returncode == 0 and [l[:12] for l in told] == ['seed 0   don', 'seed 1   don', 'seed 2   don'], first.stderr
    made = sorted(p.name for p in (repo/'runs'/'tiny').glob('*.ipynb'))
    assert made == ['00_toy-seed1.ipynb', '00_toy-seed2.ipynb', '00_toy-seeds3.ipynb', '00_toy.ipynb']
    records = [json.loads((repo/'figures'/'tiny'/f'{n}.json').read_text()) for n in ('toy', 'toy-seed1', 'toy-seed2')]
    assert [(r['seed'], r['seeds'], len(r['stages'])) for r in records] == [(0, 3, 1), (1, 1, 1), (2, 1, 1)]
    assert all('python' in made and 'torch' in made['versions'] for r in records for made in r['stages'].values())
    before = {p: sha(repo/p) for p in files(repo)}
    (repo/'figures'/'tiny'/'toy-seed2.json').unlink() # as if that seed had been killed before its end
    second, third = run('--seeds', '3'), run('--seeds', '3')
    assert second.returncode == 0 and second.stdout.count('up to date') == 2 and {p: sha(repo/p) for p in files(repo)}.keys() == before.keys() # seed 2 and the sum again
    assert third.stdout.splitlines()[-1] == 'Everything is up to date for model tiny, seeds 0 to 2.'
    r = run('--seeds', '2', '--seed', '1')
    assert r.returncode == 2 and r.stderr == 'ParamError: seed=1, seeds=2: give a seed, or a number of seeds, which are counted from 0\n'

def test_runner_of_seeds_fails(repo):
    (repo/'params'/'huge.yaml').write_text('needs: {gpus: 99, gib: 80}\n')
    r = pipe('python -m rlsft_nb.paper --model huge --seeds 2', repo)
    assert r.returncode == 1 and 'seed 0: 00_toy.ipynb stopped. StageMissing' in r.stderr and 'seed 1: 00_toy.ipynb stopped. StageMissing' in r.stderr and 'Traceback' not in r.stderr
