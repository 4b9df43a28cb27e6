import errno, json, math, os, signal, subprocess, sys, textwrap, time, yaml
import numpy as np, pytest, scipy.stats
from fastcore.basics import AttrDict
from hypothesis import given, strategies as st
from rlsft_nb import core
from rlsft_nb.core import *

# parameters

NS = dict(__annotations__=dict(model=str, seed=int, smoke=bool, lr=float, layers=list, overrides=dict),
          model='tiny', seed=0, smoke=False, lr=1., layers=[], overrides={})

@pytest.mark.parametrize('change, message', [
    (dict(modle='tiny'), "unknown parameter 'modle'; did you mean 'model'?"),
    (dict(zzz=1), "unknown parameter 'zzz'; known: model, seed, smoke, lr, layers, overrides"),
    (dict(nothing=None), "unknown parameter 'nothing'; known: model, seed, smoke, lr, layers, overrides"),
    (dict(smoke='false'), "parameter smoke='false' is str, expected bool"),
    (dict(seed=True), "parameter seed=True is bool, expected int"),
    (dict(seed=1.), "parameter seed=1.0 is float, expected int"),
    (dict(lr='1e-3'), "parameter lr='1e-3' is str, expected float"),
    (dict(layers='[1]'), "parameter layers='[1]' is str, expected list"),
    (dict(model=None), "parameter model=None is NoneType, expected str")])
def test_check_params_refuses(change, message):
    with pytest.raises(ParamError) as e: check_params(NS | change)
    assert str(e.value) == message
    assert e.value._render_traceback_() == [f'ParamError: {message}']

def test_check_params_accepts():
    ns = NS | dict(lr=1, In=['x'], Out={}, _private=3, json=json, test=lambda: 0)
    check_params(ns)
    ns['counted'] = 5 # a variable of the notebook, when its cell is run again
    check_params(ns)
    with pytest.raises(ParamError): check_params(ns | dict(seed='0'))

def test_check_params_where_annotations_are_lazy():
    ns = dict(model='tiny', seed='0', In=['', '%matplotlib inline', "model: str = 'tiny'\nseed: int = 0", 'x: int = f('])
    with pytest.raises(ParamError, match="seed='0' is str, expected int"): check_params(ns)
    with pytest.raises(ParamError, match="unknown parameter 'modle'"): check_params(ns | dict(seed=0, modle=''))
    check_params(ns | dict(seed=0))

@pytest.fixture
def params(tmp_path, monkeypatch):
    (tmp_path/'params').mkdir()
    (tmp_path/'params'/'base.yaml').write_text('sft: {lr: 1.0e-3, steps: 10, name: x, ks: [1], deep: {a: true}}\n')
    monkeypatch.setattr(core, 'ROOT', tmp_path)
    return lambda text: (tmp_path/'params'/'m.yaml').write_text(text)

@pytest.mark.parametrize('text, message', [
    ('sft: {lrr: 1.0}', "params/m.yaml: sft.lrr is no parameter; did you mean 'lr'?"),
    ('stf: {}', "params/m.yaml: stf is no parameter; did you mean 'sft'?"),
    ('sft: {lr: 1e-6}', "params/m.yaml: sft.lr='1e-6' is str, expected float"),
    ('sft: {steps: 1.5}', "params/m.yaml: sft.steps=1.5 is float, expected int"),
    ('sft: {deep: {a: 1}}', "params/m.yaml: sft.deep.a=1 is int, expected bool"),
    ('sft: {deep: 1}', "params/m.yaml: sft.deep=1 is int, expected dict"),
    ('sft: {name: null}', "params/m.yaml: sft.name=None is NoneType, expected str"),
    ('sft: 3', "params/m.yaml: sft=3 is int, expected dict")])
def test_layer_refused(params, text, message):
    params(text)
    with pytest.raises(ParamError) as e: load_params('m')
    assert str(e.value) == message

def test_layers(params):
    params('sft: {lr: 2, deep: {a: false}}')
    cfg = load_params('m', dict(sft=dict(steps=3)))
    assert (cfg.name, cfg.sft.lr, type(cfg.sft.lr), cfg.sft.steps, cfg.sft.deep.a) == ('m', 2., float, 3, False)
    with pytest.raises(ParamError, match="overrides: sft.step is no parameter; did you mean 'steps'"): load_params('m', dict(sft=dict(step=3)))
    with pytest.raises(ParamError, match="overrides=.* is list, expected dict"): load_params('m', [1])

def test_broken_layer_and_missing_model(params):
    for text in ('a: [', '- 1', '\x00'):
        params(text)
        with pytest.raises(ParamError, match='m.yaml'): load_params('m')
    for name in ('base', '../params/m', 'n', ''):
        with pytest.raises(ParamError, match='has no file in params/'): load_params(name)

def test_missing_base(tmp_path, monkeypatch):
    (tmp_path/'params').mkdir(); (tmp_path/'params'/'m.yaml').write_text('')
    monkeypatch.setattr(core, 'ROOT', tmp_path)
    with pytest.raises(ParamError, match='cannot read .*base.yaml: No such file'): load_params('m')

def test_shipped_models(capsys):
    for m in models():
        cfg = load_params(m)
        show_params(cfg)
        assert yaml.safe_load(capsys.readouterr().out) == core.plain_dict(cfg)

# what the package holds

def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.setattr(core, 'PACKAGE', tmp_path)
    for name in ('tiny', 'tiny/peak', 'tiny/rl', 'other'): (tmp_path/'data'/name).mkdir(parents=True); (tmp_path/'data'/name/'config.json').touch()
    (tmp_path/'data'/'tiny'/'notes').mkdir()
    assert shipped_names() == ['other', 'tiny', 'tiny:peak', 'tiny:rl'] and shipped('tiny:peak') == tmp_path/'data'/'tiny'/'peak'
    for name in ('tiny:notes', 'tiny/peak', '', 'peak', '../data', 'tiny:'):
        with pytest.raises(ParamError) as e: shipped(name)
        assert str(e.value) == f'checkpoint={name!r} is not in the package, which has: other, tiny, tiny:peak, tiny:rl'

def test_models_of_an_installed_package(tmp_path, monkeypatch):
    "Those of the package, and those in ./params, which go first."
    for f, text in dict(pkg='sft: {lr: 1.0}', own='sft: {lr: 2.0}').items():
        (tmp_path/f/'params').mkdir(parents=True)
        (tmp_path/f/'params'/'base.yaml').write_text('sft: {lr: 0.0}\n' if f == 'pkg' else 'mine: 1\n')
        for m in ('both', f): (tmp_path/f/'params'/f'{m}.yaml').write_text(text)
    for name, value in dict(PACKAGE=tmp_path/'pkg', INSTALLED=True, ROOT=tmp_path/'own').items(): monkeypatch.setattr(core, name, value)
    assert models() == ['both', 'own', 'pkg'] and params_dir() == tmp_path/'pkg'/'params'
    assert [load_params(m).sft.lr for m in models()] == [2., 2., 1.]
    with pytest.raises(core.Problem, match='an installed package does not hold'): repository()

def test_processor():
    import torch
    told = cpu()
    assert told['name'] and told['cores'] == os.cpu_count() and told['threads'] == torch.get_num_threads() and told['kernels'] == torch.backends.cpu.get_cpu_capability()
    assert set(told['vector']) <= set(core.VECTOR) and provenance()['cpu'] == told
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
    done = subprocess.run([sys.executable, '-c', 'from rlsft_nb.core import peak_mib; print(peak_mib())'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert core.peak_mib() > held.nbytes/2**20 > 2*float(done.stdout) > 0

def test_threads_are_those_of_linear_algebra_too():
    import torch, threadpoolctl, scipy.linalg
    now = lambda: (torch.get_num_threads(), {p['num_threads'] for p in threadpoolctl.threadpool_info() if p['user_api'] == 'blas'})
    with threads(2):
        with threads(1): assert now() == (1, {1})
        with threads(0): assert now() == (2, {2})
        assert now() == (2, {2})

def test_redrawn_figures_leave_the_code_as_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(core, 'ROOT', tmp_path)
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

def script(body):
    return subprocess.Popen([sys.executable, '-c', 'import os, signal, time\nfrom rlsft_nb.core import *\n' + textwrap.dedent(body)],
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
    monkeypatch.setattr(core, 'gpus', lambda: [])
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

# tables, progress

def test_verdict_table():
    t = verdict_table([dict(claim='a|b\nc', paper=None, here=.123456, n=234, interval=(.1, .2), verdict='held')])
    assert t.splitlines()[-1] == '| a\\|b c | – | 0.123 | 234 | 0.1 to 0.2 | – | held |'
    assert t._repr_markdown_() == t

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

# statistics, against scipy

counts = st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))

@given(counts, st.floats(.5, .999))
def test_wilson(kn, conf):
    k, n = kn
    if n == 0: assert wilson(0, 0) == (0, 1); return
    ci = scipy.stats.binomtest(k, n).proportion_ci(conf, method='wilson')
    assert wilson(k, n, conf) == pytest.approx((ci.low, ci.high), abs=1e-12)

@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar(pairs):
    r = mcnemar([a for a, _ in pairs], [b for _, b in pairs])
    n = r['n01'] + r['n10']
    assert r['n01'] == sum(b and not a for a, b in pairs) and r['n10'] == sum(a and not b for a, b in pairs)
    assert r['p'] == pytest.approx(scipy.stats.binomtest(r['n01'], n).pvalue if n else 1)

def test_mcnemar_of_clusters():
    rng = np.random.default_rng(0)
    def p(by_cluster): # 40 multisets of 10 hands; two models as good as each other, who disagree by multiset
        a, b = ((rng.random((40, 10)) < rng.choice([.05, .95], (40, 1))).ravel() for _ in range(2))
        return mcnemar(a, b, np.repeat(range(40), 10) if by_cluster else None)['p']
    naive, mended = (np.mean([p(c) < .05 for _ in range(400)]) for c in (False, True))
    assert naive > .3 and mended < .09
    a, b = [True]*30 + [False]*20, [False]*20 + [True]*30
    alone = mcnemar(a, b, range(50))
    assert alone['p'] >= mcnemar(a, b)['p'] and (alone['n01'], alone['n10']) == (20, 20)
    c = [True]*10 + [False]*40
    assert mcnemar(a, c, range(50))['p'] == pytest.approx(max(mcnemar(a, c)['p'], 2*scipy.stats.norm.sf(20/math.sqrt(20))))
    with pytest.raises(ValueError, match=r'len\(groups\)=2: expected 3'): mcnemar([1]*3, [0]*3, [1, 2])

@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_mean_spread(xs):
    r = mean_spread(xs)
    assert (r['mean'], r['n']) == (pytest.approx(np.mean(xs), abs=1e-9), len(xs)) and r['sd'] == pytest.approx(np.std(xs, ddof=1), abs=1e-9)
    if r['sd'] > 1e-6: assert (r['lo'], r['hi']) == pytest.approx(scipy.stats.t.interval(.95, len(xs) - 1, np.mean(xs), scipy.stats.sem(xs)), abs=1e-6)

@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=60))
def test_cluster_interval_contains_wilson(rows):
    hits, groups = zip(*rows)
    lo, hi = cluster_interval(hits, groups)
    p = sum(hits)/len(hits)
    assert 0 <= lo <= p + 1e-12 and p - 1e-12 <= hi <= 1
    if 0 < p < 1: assert hi - lo >= np.subtract(*wilson(sum(hits), len(hits))[::-1]) - 1e-12

def test_cluster_interval_covers():
    "Of 95 % intervals over groups that succeed or fail as a whole, about 95 % hold the truth; plain Wilson far fewer."
    rng, n, held, plain = np.random.default_rng(0), 400, 0, 0
    for _ in range(n):
        hits = np.repeat(rng.random(40) < .3, 5)
        (a, b), (c, d) = cluster_interval(hits, np.repeat(np.arange(40), 5)), wilson(hits.sum(), len(hits))
        held += a <= .3 <= b; plain += c <= .3 <= d
    assert .91 < held/n < .98 and plain/n < .75

def test_statistics_refuse():
    for f, m in ((lambda: wilson(-1, 3), 'k=-1, n=3'), (lambda: mcnemar([1], []), r'len\(a\)=1'), (lambda: mean_spread([]), r'xs=\[\]'), (lambda: cluster_interval([1], []), 'a group for each')):
        with pytest.raises(ValueError, match=m): f()
