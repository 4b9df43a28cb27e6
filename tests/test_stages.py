"Files, stages, and what they say about the machine that made them."
import errno, math, os, signal, subprocess, sys, textwrap, time
import numpy as np, pytest
from fastcore.basics import AttrDict
from rlsft_nb import machine, origins
from rlsft_nb.files import read_json, sha256_file, write_json
from rlsft_nb.machine import cpu, missing_device, peak_mib
from rlsft_nb.notices import progress
from rlsft_nb.origins import provenance
from rlsft_nb.parallel import threads
from rlsft_nb.problems import DiskError, StageBusy, StageMissing
from rlsft_nb.stages import Stage, run_stage

# machine

def test_processor():
    import torch
    told = cpu()
    assert told['name'] and told['cores'] == os.cpu_count() and told['threads'] == torch.get_num_threads() and told['kernels'] == torch.backends.cpu.get_cpu_capability()
    assert set(told['vector']) <= set(machine.VECTOR) and provenance()['cpu'] == told
    p = script('assert cpu().keys() == {"name", "cores", "vector"}') # torch is not loaded to be asked
    assert p.wait() == 0, p.stderr.read()

# files

def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    p = write_json(tmp_path/'r.json', dict(a=1))
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(DiskError) as e: write_json(p, dict(a=2))
    assert str(e.value) == f'cannot write {p}: No space left on device'
    assert read_json(p) == dict(a=1) and [f.name for f in tmp_path.iterdir()] == ['r.json']

def test_runs_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'file'))
    with pytest.raises(OSError, match=f"cannot make the folder {tmp_path/'file'/'m'}: Not a directory"):
        run_stage(Stage('a', 'm', {}), lambda p: {}, {})

def test_json_keeps_every_digit_and_takes_arrays(tmp_path):
    x = dict(a=0.1 + 0.2, b=np.float32(1)/3, c=np.arange(3), d=tmp_path)
    back = read_json(write_json(tmp_path/'x.json', x))
    assert back['a'] == x['a'] and back['b'] == float(x['b']) and back['c'] == [0, 1, 2] and back['d'] == str(tmp_path)
    for bad in (math.nan, math.inf, np.float32('nan'), np.array([1, math.nan])):
        with pytest.raises(ValueError, match='NaN or infinity'): write_json(tmp_path/'y.json', dict(a=bad))
    with pytest.raises(TypeError, match='set cannot be saved'): write_json(tmp_path/'y.json', dict(a={1}))
    assert not (tmp_path/'y.json').exists()

# stages

def test_cache_hit_and_records():
    up = run_stage(Stage('up', 'm', {}), lambda p: dict(n=1), {})
    calls = []
    for _ in range(2):
        s = run_stage(Stage('a', 'm', dict(k=1), [up], seed=3), lambda p: calls.append(p) or dict(n=2), {})
    assert len(calls) == 1 and s.done and s.results() == dict(n=2) and s.config()['upstream'] == [repr(up)]
    done = read_json(s.path/'done.json')
    assert done['inputs'] == {repr(up): sha256_file(up.path/'done.json')} and done['results'] == sha256_file(s.path/'results.json')
    assert {'commit', 'dirty', 'versions', 'python', 'device', 'cpu', 'seconds', 'peak_mib', 'date'} <= done.keys()

@pytest.mark.skipif(not os.path.isfile('/proc/self/status'), reason='elsewhere a process may count from its parent')
def test_a_peak_is_ones_own():
    "Not that of the process that started this one."
    held = np.ones(2**27) # 1 GiB
    done = subprocess.run([sys.executable, '-c', 'from rlsft_nb.machine import peak_mib; print(peak_mib())'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert peak_mib() > held.nbytes/2**20 > 2*float(done.stdout) > 0

def test_redrawn_figures_leave_the_code_as_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, 'ROOT', tmp_path)
    git = lambda *a: subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', *a], check=True, capture_output=True)
    (tmp_path/'figures').mkdir()
    for f in ('figures/a.png', 'code.py'): (tmp_path/f).write_text('1')
    git('init'); git('add', '.'); git('commit', '-m', 'x')
    seen = []
    for f in ('code.py', 'figures/a.png', 'figures/new.png', 'code.py'): seen.append(provenance()['dirty']); (tmp_path/f).write_text('2')
    assert seen == [False, True, True, True] and provenance()['dirty']
    git('checkout', 'code.py')
    assert not provenance()['dirty']
    (tmp_path/'new.py').touch()
    assert provenance()['dirty']

def test_key_depends_on_all_that_decides():
    base = dict(name='a', model='m', params=dict(x=1, y=dict(z=2.)), upstream=[], seed=0)
    up = Stage('u', 'm', {})
    other = [dict(name='b'), dict(params=dict(x=2, y=dict(z=2.))), dict(params=dict(x=1, y=dict(z=3.))), dict(seed=1), dict(upstream=[up])]
    assert len({Stage(**(base | o)).key for o in [{}, *other]}) == len(other) + 1
    assert Stage(**(base | dict(params=dict(y=dict(z=2.), x=1)))).key == Stage(**base).key

def test_no_done_file_no_hit():
    s = run_stage(Stage('a', 'm', {}), lambda p: dict(n=1), {})
    (s.path/'done.json').unlink()
    assert not s.done
    with pytest.raises(StageMissing, match='m/a-.* is not there'): s.results()
    assert run_stage(s, lambda p: dict(n=2), {}).results() == dict(n=2)

def test_interrupted_stage_leaves_no_result():
    def stop(path): raise KeyboardInterrupt
    s = Stage('a', 'm', {})
    with pytest.raises(KeyboardInterrupt): run_stage(s, stop, {})
    assert not s.done and [p.name for p in s.path.iterdir()] == ['config.json']
    with pytest.raises(TypeError, match='returned list, expected a dict'): run_stage(s, lambda p: [], {})
    with pytest.raises(ValueError, match='NaN'): run_stage(s, lambda p: dict(a=math.nan), {})
    assert not s.done

ALL = ''.join(f'from rlsft_nb.{room} import *\n' for room in ('problems', 'files', 'places', 'parameters', 'machine', 'origins', 'notices', 'stages', 'intervals', 'verdicts', 'parallel'))

def script(body):
    return subprocess.Popen([sys.executable, '-c', 'import os, signal, time\n' + ALL + textwrap.dedent(body)],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_killed_stage_resumes():
    p = script('''
        def work(path):
            write_json(path/'half.json', dict(n=1))
            os.kill(os.getpid(), signal.SIGKILL)
        run_stage(Stage('a', 'm', {}), work, {})''')
    assert p.wait() == -signal.SIGKILL
    s = Stage('a', 'm', {})
    assert not s.done
    run_stage(s, lambda path: dict(n=read_json(path/'half.json')['n'] + 1), {})
    assert s.results() == dict(n=2) and read_json(s.path/'done.json')['resumed']

def test_second_process_waits_or_stops(monkeypatch, capsys):
    s = Stage('a', 'm', {})
    p = script('''
        def work(path):
            write_json(path/'started.json', {})
            time.sleep(3)
            return dict(by='first')
        run_stage(Stage('a', 'm', {}), work, {})''')
    while not (s.path/'started.json').exists(): assert p.poll() is None, p.stderr.read(); time.sleep(.05)
    monkeypatch.setenv('RLSFT_LOCK_S', '0.2')
    with pytest.raises(StageBusy, match=f'stage {s} is still being made by another process after 0.2 s'): run_stage(s, lambda path: {}, {})
    monkeypatch.delenv('RLSFT_LOCK_S')
    run_stage(s, lambda path: dict(by='second'), {})
    assert s.results() == dict(by='first') and p.wait() == 0
    assert 'waiting for another process' in capsys.readouterr().err

def test_needs(monkeypatch):
    s = Stage('sft', 'big', {}, seed=2, notebook='02_sft.ipynb')
    monkeypatch.setattr(machine, 'gpus', lambda: [])
    with pytest.raises(StageMissing) as e: run_stage(s, lambda p: {}, AttrDict(needs=dict(gpus=4, gib=80)))
    assert str(e.value) == f'stage {s} (seed 2) is not there and needs 4 GPUs of 80 GiB; found none. Make it with: papermill nbs/02_sft.ipynb -p model big -p seed 2'
    assert not s.path.exists()
    assert missing_device(dict(gpus=2, gib=80), [('A', 79.2), ('B', 40)]) == 'needs 2 GPUs of 80 GiB; found A with 79 GiB, B with 40 GiB'
    assert missing_device(dict(gpus=2, gib=80), [('A', 79.2)]*2) == ''
    run_stage(s, lambda p: dict(n=1), {})
    assert run_stage(s, None, AttrDict(needs=dict(gpus=4, gib=80))).results() == dict(n=1)

def test_no_torch_at_import():
    p = script("import sys; assert not {'torch', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)")
    assert p.wait() == 0, p.stderr.read()

# progress, threads

def test_progress_notes(tmp_path, monkeypatch):
    monkeypatch.setenv('RLSFT_WATCH', str(tmp_path))
    assert list(progress((i for i in range(3)), 'loop', total=3)) == [0, 1, 2]
    assert (tmp_path/'progress').read_text() == 'loop: 0/3\n'

def test_quiet_has_no_bars(monkeypatch, capsys):
    for k in ('IN_TEST', 'RLSFT_WATCH'): monkeypatch.delenv(k, raising=False)
    shown = lambda: (list(progress(range(3), 'loop')), capsys.readouterr().err)[1]
    assert 'loop' in shown()
    monkeypatch.setenv('RLSFT_QUIET', '1')
    assert shown() == ''

def test_threads_are_those_of_linear_algebra_too():
    import torch, threadpoolctl, scipy.linalg
    now = lambda: (torch.get_num_threads(), {p['num_threads'] for p in threadpoolctl.threadpool_info() if p['user_api'] == 'blas'})
    with threads(2):
        with threads(1): assert now() == (1, {1})
        with threads(0): assert now() == (2, {2})
        assert now() == (2, {2})
