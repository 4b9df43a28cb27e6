"The literal commands, as they are typed: in a terminal, a pipe, a loop and a Jupyter cell."
import base64, hashlib, json, os, re, shutil, signal, subprocess, sys, time
from contextlib import redirect_stdout
import pexpect, pytest
from rlsft_nb.files import read_json
from rlsft_nb.places import ROOT

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
    assert 'runs/tiny/00_toy.ipynb' in files(repo) and 'runs/tiny/records/toy.json' in files(repo)
    assert "name: tiny" in (repo/'runs/tiny/00_toy.ipynb').read_text() # the configuration is recorded

def test_pipe_other_seed_and_module(repo):
    r = pipe('python -m papermill nbs/00_toy.ipynb -p seed 1 -y "overrides: {sft: {lr: 2.0e-6}}" -p lr 1 | cat', repo)
    assert r.stdout == '' and 'runs/tiny/00_toy-seed1.ipynb' in files(repo), r.stderr
    made, = map(read_json, (repo/'runs'/'tiny').glob('records-*/toy-seed1.json')) # apart from the seeds: it has overrides
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
    code = "import sys, papermill; assert {m for m in sys.modules if m.startswith('rlsft_nb')} == {'rlsft_nb', 'rlsft_nb.paper', 'rlsft_nb.papermill_line'}; assert not {'torch', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], stdin=subprocess.DEVNULL).returncode == 0
    code = "import rlsft_nb.paper, papermill.engines as e; assert e.papermill_engines.get_engine('rlsft').nb_kernel_name"
    assert subprocess.run([sys.executable, '-c', code], stdin=subprocess.DEVNULL).returncode == 0

# make paper

def test_runner_twice(repo):
    run = lambda *a: pipe(' '.join(['python -m rlsft_nb.paper', *a]), repo)
    first = run()
    assert first.returncode == 0 and 'runs/tiny/00_toy.ipynb' in first.stdout and 'runs/tiny/records/toy.json' in first.stdout and 'runs/tiny/toy-' in first.stdout, first.stderr
    before = {p: sha(repo/p) for p in files(repo)}
    assert not any(str(repo) in (repo/p).read_text() for p in before if p.endswith('.json')) # a record holds no absolute path
    second = run('--model', 'tiny', '--seed', '0')
    assert second.returncode == 0 and second.stdout.splitlines()[-1] == 'Everything is up to date for model tiny, seed 0.'
    assert {p: sha(repo/p) for p in files(repo)} == before
    light = pipe(f'''{sys.executable} -c "import sys; from rlsft_nb.lanes import run_paper; run_paper(); sys.exit('torch' in sys.modules)"''', repo)
    assert light.returncode == 0 and 'up to date' in light.stdout, light.stderr # torch would take seconds
    (repo/'runs/tiny/records/toy.json').unlink()
    third = run()
    assert 'up to date' not in third.stdout and (repo/'runs/tiny/records/toy.json').is_file()

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
    assert r.returncode == 1 and r.stderr.startswith('00_toy.ipynb stopped. StageMissing: stage huge/toy-') and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr
    assert not list((repo/'runs'/'huge').glob('*.json'))
    r = pipe('python -m rlsft_nb.paper --model qwen8b', repo)
    assert r.returncode == 2 and r.stderr == "ParamError: model='qwen8b' has no file in params/; did you mean 'qwen7b'?\n"

def test_runner_of_seeds(repo):
    run = lambda *a: pipe(' '.join(['python -m rlsft_nb.paper', *a]), repo)
    first = run('--seeds', '3')
    told = [l.rpartition('  ')[0].strip() for l in first.stderr.splitlines()] # one line each, in the order in which they ended
    assert first.returncode == 0 and sorted(told[:3]) == [f'00_toy.ipynb, seed {s}' for s in range(3)] and told[3:] == ['00_toy.ipynb, 3 seeds'], first.stderr
    made = sorted(p.name for p in (repo/'runs'/'tiny').glob('*.ipynb'))
    assert made == ['00_toy-seed1.ipynb', '00_toy-seed2.ipynb', '00_toy-seeds3.ipynb', '00_toy.ipynb']
    records = [json.loads((repo/'runs'/'tiny'/'records'/f'{n}.json').read_text()) for n in ('toy', 'toy-seed1', 'toy-seed2')]
    assert [(r['seed'], r['seeds'], len(r['stages'])) for r in records] == [(0, 3, 1), (1, 1, 1), (2, 1, 1)]
    assert all('python' in made and 'torch' in made['versions'] for r in records for made in r['stages'].values())
    before = {p: sha(repo/p) for p in files(repo)}
    (repo/'runs'/'tiny'/'records'/'toy-seed2.json').unlink() # as if that seed had been killed before its end
    second, third = run('--seeds', '3'), run('--seeds', '3')
    assert second.returncode == 0 and second.stdout.count('up to date') == 2 and {p: sha(repo/p) for p in files(repo)}.keys() == before.keys() # seed 2 and the sum again
    assert third.stdout.splitlines()[-1] == 'Everything is up to date for model tiny, seeds 0 to 2.'
    r = run('--seeds', '2', '--seed', '1')
    assert r.returncode == 2 and r.stderr == 'ParamError: seed=1, seeds=2: give a seed, or a number of seeds, which are counted from 0\n'

def test_runner_of_seeds_fails(repo):
    (repo/'params'/'huge.yaml').write_text('needs: {gpus: 99, gib: 80}\n')
    r = pipe('python -m rlsft_nb.paper --model huge --seeds 2', repo)
    assert r.returncode == 1 and 'seed 0: 00_toy.ipynb stopped. StageMissing' in r.stderr and 'seed 1: 00_toy.ipynb stopped. StageMissing' in r.stderr and 'Traceback' not in r.stderr

# the command `rlsft`

rlsft = lambda *words, **kw: subprocess.run([sys.executable, '-m', 'rlsft_nb', *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, cwd=ROOT, **kw)
HAND = ['--cards', '3 3 8 8']

@pytest.mark.parametrize('words, message', [
    (['compar', 'a', 'b'], "ParamError: rlsft has no command 'compar'; did you mean 'compare'?"),
    (['xyz'], 'ParamError: rlsft has no command \'xyz\'; known: compare, forget, restore, sweep, game, report, agree, clean, plan, bench'),
    (['--versoin'], "ParamError: rlsft has no command '--versoin'"),
    (['game'], 'rlsft game: the following arguments are required: COMMAND'),
    (['game', 'slove', '1'], "rlsft game: argument COMMAND: 'slove' is not known; did you mean 'solve'?"),
    (['game', 'solve', '3', '--tarjet', '3'], "rlsft game: '--tarjet' is not known; did you mean '--target'?"),
    (['game', 'solve', '3', '--target', 'x'], "rlsft game solve: argument --target: invalid int value: 'x'"),
    (['game', 'solve', '0', '3'], 'ParamError: numbers='),
    (['game', 'solve', 'A', 'Z'], "ParamError: cards=['A', 'Z']: 'Z' is no rank"),
    (['game', 'verify', '1+1'], 'rlsft game verify: the following arguments are required: --cards'),
    (['game', 'verify', '1+1', *HAND, '--rule', 'x'], "ParamError: rule='x': expected"),
    (['game', 'prompt', '--cards', '1 3'], "ParamError: cards=['1', '3']: '1' is no rank"),
    (['plan', 'qwen8b'], "ParamError: model='qwen8b' has no file in params/; did you mean 'qwen7b'?"),
    (['plan', 'tiny', '--gpus', '0'], 'rlsft plan: argument --gpus: 0: expected at least 1'),
    (['plan', 'tiny', '--gib', 'nan'], 'rlsft plan: argument --gib: nan: expected at least 1'),
    (['bench', 'gmae'], "rlsft bench: argument name: 'gmae' is not known; did you mean 'game'?"),
    (['compare', 'a'], 'rlsft compare: the following arguments are required: '),
    (['compare', 'a', 'b', '--drws', '1'], "rlsft compare: '--drws' is not known; did you mean '--draws'?"),
    (['forget', 'a'], 'rlsft forget: the following arguments are required: TUNED'), (['forget', 'a', 'b', '--texts', '0'], 'rlsft forget: argument --texts: 0: expected at least 1'), (['forget', 'a', 'b', '--odl', 'x'], "rlsft forget: '--odl' is not known; did you mean '--old'?"),
    (['restore', '--target', 'a', '--reference', 'b', '--out', 'c', '--mode', 'swop'], "rlsft restore: argument --mode: 'swop' is not known; did you mean 'swap'?")])
def test_wrong_usage_is_one_line(words, message, capsys):
    from rlsft_nb.cli import main
    try: code = main(words)
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert (code, out, err.count('\n')) == (2, '', 1) and err.startswith(message), err

def test_no_command_is_wrong_usage_and_help_is_none():
    bare, asked = rlsft(), rlsft('--help')
    assert (bare.returncode, bare.stdout, asked.returncode, asked.stderr) == (2, '', 0, '') and bare.stderr == asked.stdout
    assert rlsft('-h').stdout == asked.stdout and 'Exit codes: 0 done' in asked.stdout

@pytest.mark.parametrize('words', [['--help'], *[[c, '--help'] for c in ('compare', 'forget', 'restore', 'sweep', 'game', 'report', 'plan', 'bench')], ['game', 'solve', '--help'], ['game', 'slove'], ['compare', 'a']])
def test_help_and_wrong_usage_load_nothing_heavy(words):
    code = f'import sys\nfrom rlsft_nb.cli import main\ntry: main({words})\nexcept SystemExit: pass\nprint(*{{"torch", "transformers", "scipy", "numpy", "matplotlib"}} & {{*sys.modules}}, file=sys.stderr)'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert r.returncode == 0 and r.stderr.splitlines()[-1] == '', r.stderr
    if words[-1] == '--help': assert r.stdout.startswith('usage: rlsft')

@pytest.mark.parametrize('name', ['compare', 'forget', 'restore', 'sweep', 'report', 'plan', 'bench'])
def test_help_is_that_of_the_room_that_does_the_work(name, capsys):
    from rlsft_nb.commands import COMMANDS, parser
    from rlsft_nb.parallel import named_function
    with pytest.raises(SystemExit) as e: named_function(COMMANDS[name][1])(['--help'])
    options = lambda text: sorted(set(re.findall(r'^  +(--?[\w-]+|[A-Z]\b)', text, re.M)))
    assert e.value.code == 0 and options(capsys.readouterr().out) == options(parser(name).format_help())

def test_names_written_out_are_those_of_the_rooms():
    from rlsft_nb import bench
    from rlsft_nb.commands import parser
    choices = lambda name, dest: next(tuple(a.choices) for a in parser(name)._actions if a.dest == dest)
    assert choices('bench', 'name') == tuple(bench.BENCHES)
    from rlsft_nb import edits, surgery
    assert choices('restore', 'mode') == choices('sweep', 'mode') == edits.MODES and choices('restore', 'like') == tuple(m for m in edits.MODES if m not in edits.CONTROLS)
    assert tuple(map(float, next(a.default for a in parser('sweep')._actions if a.dest == 'strengths').split(','))) == surgery.GRID

def test_every_command_module_has_help(capsys):
    "`python -m rlsft_nb.X --help` says something for each room with a `main`."
    import importlib
    rooms = sorted(p.stem for p in (ROOT/'rlsft_nb').glob('*.py') if re.search(r'^def main\(', p.read_text(), re.M) and p.stem not in ('paper', 'cli'))
    assert {'plan', 'report', 'tiny', 'sft', 'ppo'} <= {*rooms}
    for room in rooms:
        with pytest.raises(SystemExit) as e: importlib.import_module(f'rlsft_nb.{room}').main(['--help'])
        out = capsys.readouterr().out
        assert e.value.code == 0 and out.startswith(f'usage: python -m rlsft_nb.{room}') and len(out.splitlines()) > 4, out

@pytest.mark.parametrize('words, code, text', [
    (['solve', '3', '3', '8', '8'], 0, '8/(3-8/3)\n'), (['solve', 'A', '3', 'K', '10', '--rule', '10'], 0, '10+10+3+1\n'), (['solve', '2', '3', '--target', '6'], 0, '3*2\n'),
    (['verify', '8/(3-8/3)', *HAND], 0, 'correct, reward 5\n'), (['verify', '8/(3-8/3)=24', *HAND], 0, 'correct, reward 5\n'),
    (['verify', '{"formula": "8/(3-8/3)=24"}', *HAND], 0, 'correct, reward 5\n'), (['verify', '13+11', '--cards', 'K J', '--rule', '11-12-13'], 0, 'correct, reward 5\n'),
    (['verify', '3*8', '--cards', '3,8', '--target', '25'], 1, 'wrong_value, reward -1: '), (['verify', 'three', '--cards', '3 8'], 1, 'illegal, reward -3: ')])
def test_game(words, code, text, capsys):
    from rlsft_nb.cli import main
    assert main(['game', *words]) == code
    out, err = capsys.readouterr()
    assert out.startswith(text) and out.count('\n') == 1 and err == ''
    assert main(['game', *words, '--quiet']) == code and capsys.readouterr() == ('', '')
    assert main(['game', *words, '--json']) == code and json.loads(capsys.readouterr().out)

def test_game_prompt_and_no_solution(capsys):
    from rlsft_nb.cli import main
    from rlsft_nb.game import prompt
    assert main(['game', 'prompt', *HAND, '--rule', '11-12-13']) == 0 and capsys.readouterr().out == prompt(['3', '3', '8', '8'], '11-12-13')[0]['content'] + '\n'
    assert main(['game', 'prompt', *HAND, '--json']) == 0 and json.loads(capsys.readouterr().out) == prompt(['3', '3', '8', '8'])
    assert main(['game', 'solve', '1', '1', '1', '1']) == 1 and capsys.readouterr() == ('', 'no formula over 1, 1, 1, 1 makes 24\n')
    assert main(['game', 'solve', '1', '1', '1', '1', '--json']) == 1 and json.loads(capsys.readouterr().out) == dict(numbers=[1]*4, target=24, formulas=[])
    assert main(['game', 'verify', '1/3+1/3', '--cards', 'A 3 A 3', '--json']) == 1 and json.loads(capsys.readouterr().out)['value'] == '2/3'

def test_json_is_all_of_stdout(tmp_path, capsys):
    from rlsft_nb.claims import load_claims
    from rlsft_nb.cli import main
    assert main(['plan', 'tiny', '--json']) == 0
    told = json.loads(capsys.readouterr().out)
    assert told['model'] == 'tiny' and [s['stage'] for s in told['stages']][:1] == ['sft'] and all(s['fits'] for s in told['stages'])
    assert main(['plan', 'qwen7b', '--gpus', '1', '--json']) == 1 and not all(s['fits'] for s in json.loads(capsys.readouterr().out)['stages'])
    assert main(['plan', 'tiny', '--slurm', '--json']) == 0 and json.loads(capsys.readouterr().out)['script'].startswith('#!/bin/bash')
    assert main(['report', '--out', str(tmp_path/'r.html'), '--json']) == 0
    told = json.loads(capsys.readouterr().out)
    assert told['page'] == str(tmp_path/'r.html') and sum(told['tally'].values()) == len(load_claims()['claims'])

def test_bench_prints_or_writes_json(tmp_path, capsys, monkeypatch):
    from rlsft_nb import bench
    found = dict(rows=[['sleep', 100., 'calls/s']], ratios=dict(sleep_vs_wake=13.8))
    monkeypatch.setitem(bench.BENCHES, 'game', lambda: print('a library talks') or found)
    assert bench.main(['game', '--json']) == 0 and json.loads(capsys.readouterr().out) == found
    assert bench.main(['game', '--json', str(tmp_path/'b.json')]) == 0 and read_json(tmp_path/'b.json') == found
    assert capsys.readouterr().out.splitlines()[-1] == 'ratio sleep_vs_wake 13.8'
    assert bench.main(['game', '--json', str(tmp_path/'b.json'/'c')]) == 1 and 'cannot' in capsys.readouterr().err

def test_errors_end_in_one_line(capsys):
    from rlsft_nb.commands import ended
    def stop(e): raise e
    for e, code, line in ((KeyboardInterrupt(), 130, 'interrupted'), (OSError(28, 'No space\nleft'), 1, 'OSError: [Errno 28] No space left'), (RuntimeError('out of memory'), 1, 'RuntimeError: out of memory'), (MemoryError(), 1, 'MemoryError: no memory is left')):
        assert ended(lambda: stop(e)) == code
        assert capsys.readouterr() == ('', f'{line.strip()}\n')
    with redirect_stdout(None): assert ended(lambda: 0) == 0
    with pytest.raises(ZeroDivisionError): ended(lambda: 1/0) # a mistake of ours keeps its frames

def test_a_missing_library_is_told_with_its_extra(monkeypatch, capsys):
    from rlsft_nb.commands import ended, extra_of
    asked = ['torch>=2.6', 'trl<2,>=1.13; extra == "train"', "reasoning_gym>=0.1; extra == 'reasoning-gym'", 'trl>=1; extra == "dev"']
    monkeypatch.setattr('importlib.metadata.requires', lambda name: asked)
    assert [extra_of(m) for m in ('trl', 'reasoning_gym', 'torch', 'nothing')] == ['train', 'reasoning-gym', '', '']
    def need(): raise ModuleNotFoundError("No module named 'trl.x'", name='trl.x')
    assert ended(need) == 1 and capsys.readouterr().err == "No module named 'trl.x'; it comes with an extra of this package: rlsft_nb[train]\n"

def test_a_reader_that_leaves_and_an_interrupt(env):
    r = pipe(f'set -o pipefail; {sys.executable} -m rlsft_nb game solve 1 2 3 4 5 6 --json | true; echo ${{PIPESTATUS[0]}}', ROOT)
    assert (r.stdout, r.stderr) == ('0\n', '')
    p = subprocess.Popen([sys.executable, '-c', "import sys, time\nfrom rlsft_nb.commands import ended\nprint('up', flush=True)\nsys.exit(ended(lambda: time.sleep(60)))"],
                         cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline(); time.sleep(.5); p.send_signal(signal.SIGINT)
    assert p.communicate(timeout=20)[1] == 'interrupted\n' and p.returncode == 130

def test_exported_hands(tmp_path):
    pytest.importorskip('rlsft_nb.envs')
    assert rlsft('game', 'export', '--out', tmp_path/'d').returncode == 0 and (tmp_path/'d'/'README.md').is_file()
