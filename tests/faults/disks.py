"Disks that are full, read-only, strange or taken away; two runs at once; clocks that jump."
import contextlib, io, json, os, random, resource, shlex, shutil, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path
from hostile_files import forms
from rlsft_nb.files import read_json, write_json
from rlsft_nb.parallel import map_items
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.problems import Problem
from rlsft_nb.stages import Stage, run_stage

# --- what is tried: name -> function of a folder that writes below it and says how it ended

def _command(main, *words):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try: code = main([str(w) for w in words])
        except SystemExit as e: code = e.code
    return code or 0, err.getvalue()

def works(good, at) -> dict:
    "Everything that writes, small."
    from rlsft_nb import comparison_page, envs, report, surgery
    pair = [good['other'], good['plain']]
    cfg = load_params('tiny')
    def stage():
        def fn(folder): write_json(folder/'big.json', 'x'*30_000); return dict(n=map_items('game.multisets', {'a': ('val',), 'b': ('test',)}, folder/'items', 1, 'x')['a'][:3])
        run_stage(Stage('x', 'tiny', {}), fn, cfg); return 0, ''
    def record():
        import matplotlib; matplotlib.use('agg')
        import matplotlib.pyplot as plt
        from rlsft_nb.records import save_figure, save_record
        fig, ax = plt.subplots(); ax.plot([1, 2]); plt.close(fig)
        save_figure(fig, 'f', cfg); save_record('f', dict(y=list(range(5000))), cfg, Stage('x', 'tiny', {})); return 0, ''
    def called(f):
        def one():
            try: return f()
            except Problem as e: return 1, f'{e}\n'
        return one
    score = f'{shlex.quote(sys.executable)} -S -c print(1)'
    return dict(stage=called(stage), record=called(record), restore=lambda: _command(surgery.main, '--target', pair[0], '--reference', pair[1], '--out', at()/'restored', '--quiet'),
                sweep=lambda: _command(surgery.main_sweep, '--target', pair[0], '--reference', pair[1], '--out', at()/'swept', '--score', score, '--strengths', '0,1', '--quiet'),
                compare=lambda: _command(comparison_page.main, *pair, '--out', at()/'compared', '--draws', 2, '--workers', 1, '--matrices', 'layers.0.*', '--quiet'),
                export=lambda: _command(envs.export_main, '--out', at()/'hands', '--splits', 'val', '--solutions', '1', '--quiet'), report=lambda: _command(report.main, '--out', at()/'page.html', '--quiet'))

def ends(folder) -> dict:
    "What is there, without times: path -> bytes, and what should not be."
    out, odd = {}, []
    for p in sorted(Path(folder).rglob('*')):
        name = str(p.relative_to(folder))
        if p.name.startswith('.') and not p.name.endswith('.lock') and not p.is_dir() or p.name.endswith('.part'): odd.append(name)
        if p.is_file() and not p.name.startswith('.') and p.name != 'done.json': out[name] = json.dumps(_told(json.loads(p.read_text()))).encode() if p.suffix == '.json' else bytes([p.read_text().rstrip().endswith('</html>')]) if p.suffix == '.html' else p.read_bytes()
    return out, odd

def _told(x): return {k: _told(v) for k, v in x.items() if k not in ('memory_free_gib', 'stages', 'made', 'seconds', 'date', 'provenance')} if isinstance(x, dict) else [_told(v) for v in x] if isinstance(x, list) else x

@contextlib.contextmanager
def small_disk(folder, kib):
    "A disk of its own; False where none can be mounted."
    folder.mkdir(parents=True, exist_ok=True)
    ok = not subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={kib}k', 'none', str(folder)], capture_output=True).returncode
    try: yield ok
    finally:
        if ok: subprocess.run(['umount', '-l', str(folder)], check=True)

@contextlib.contextmanager
def slow_disk(rng):
    "Every wait for the disk takes up to a tenth of a second more."
    real = os.fsync
    os.fsync = lambda fd: time.sleep(rng.uniform(0, .1)) or real(fd)
    try: yield
    finally: os.fsync = real

@contextlib.contextmanager
def small_files(n):
    "No file may be larger."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

STRANGE = ['a b', "it's {x} %s", 'ünïcödé 文件', 'x'*200, '-o', 'a\tb', '$HOME', '*', '#1']
RACE = '''
import sys, time
from rlsft_nb.files import *
from rlsft_nb.machine import *
from rlsft_nb.origins import *
from rlsft_nb.parallel import *
from rlsft_nb.parameters import *
from rlsft_nb.places import *
from rlsft_nb.problems import *
from rlsft_nb.stages import *
from rlsft_nb import records
def fn(folder): time.sleep(.2); return dict(n=1)
cfg = load_params('tiny')
st = run_stage(Stage(sys.argv[1], 'tiny', {}), fn, cfg)
for i in range(20): atomic_write(records.records_dir(cfg)/'f.png', bytes([i])*100_000); records.save_record('f', dict(y=list(range(2000))), cfg, st)
'''

def campaign(n:int, seed:int, folder, pico, names=(), places=STRANGE) -> dict:
    "`n` disks too small, and each strange place, race and jump once for every work."
    rng, folder = random.Random(seed), Path(folder)
    good, home = forms(folder/'good', pico), [folder/'home']
    f = dict(full=0, limited=0, read_only=0, slow=0, places=0, vanished=0, races=0, jumps=0, ended=Counter(), lost=0, faults=[])
    def fault(*what): f['lost'] += 1; f['faults'].append(' '.join(map(str, what))[:400]); print(f['faults'][-1], file=sys.__stderr__, flush=True)
    last = ['']
    def at(): return home[0]
    def moved(to): home[0] = to; os.environ['RLSFT_RUNS'], os.environ['RLSFT_FIGURES'] = str(to/'runs'), str(ROOT/'figures')
    ws = {k: f for k, f in works(good, at).items() if not names or k in names}
    def told(name, where, rc, text):
        f['ended'][f'{name}: {"done" if not rc else "refused"}'] += 1
        if rc and (text.count('\n') != 1 or 'Traceback' in text): fault(name, where, 'said', repr(text[-200:]))
    def run(name, where):
        try: rc, text = ws[name]()
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt): raise
            return fault(name, where, f'{type(e).__name__}: {e}')
        last[0] = text; told(name, where, rc, text)
        return rc
    want = {}
    for name in ws:
        shutil.rmtree(folder/'home', ignore_errors=True); moved(folder/'home'); (folder/'home').mkdir()
        if run(name, 'undisturbed'): fault(name, 'undisturbed')
        want[name] = ends(folder/'home')[0]
    def again(name, where):
        "What was refused leaves nothing half-written, and the next run goes on."
        got, odd = ends(home[0])
        if odd: fault(name, where, 'left', odd[:3])
        if bad := [k for k in got if name != 'compare' and got[k] != want[name].get(k)]: fault(name, where, 'half-written', bad[:3])
    def goes_on(name, where):
        if run(name, f'{where}, again'): return fault(name, where, 'does not go on:', last[0][-200:])
        if (got := ends(home[0])[0]) != want[name]: fault(name, where, 'differs', [k for k in got.keys() | want[name].keys() if got.get(k) != want[name].get(k)][:3])
    def fresh(to): shutil.rmtree(to, ignore_errors=True); to.mkdir(parents=True); moved(to)
    for i in range(n):
        name = rng.choice(list(ws))
        size = sum(p.stat().st_size for p in (folder/'home').rglob('*') if p.is_file()) + 40_000
        with small_disk(folder/'disk', max(8, int(size*rng.uniform(.05, 1.5)/1024))) as ok:
            if ok:
                moved(folder/'disk'); f['full'] += 1
                rc = run(name, 'full disk'); again(name, 'full disk')
                subprocess.run(['mount', '-o', 'remount,size=64m', str(folder/'disk')], check=True)
                if rc: goes_on(name, 'full disk')
        fresh(folder/'home'); f['limited'] += 1
        with small_files(rng.choice([0, 100, 1000, 10_000, rng.randint(0, 60_000)])): rc = run(name, 'small files')
        again(name, 'small files')
        if rc: goes_on(name, 'small files')
    for name in ws:
        with small_disk(folder/'disk', 1024) as ok:
            if ok:
                moved(folder/'disk'); subprocess.run(['mount', '-o', 'remount,ro', str(folder/'disk')], check=True); f['read_only'] += 1
                if not run(name, 'read-only'): fault(name, 'read-only: done')
        fresh(folder/'home'); f['slow'] += 1
        with slow_disk(rng): goes_on(name, 'slow disk')
        for place in places: fresh(folder/place); f['places'] += 1; goes_on(name, place); shutil.rmtree(folder/place)
        fresh(folder/'home'); (folder/'link').unlink(missing_ok=True); (folder/'link').symlink_to(folder/'home'); moved(folder/'link'); f['places'] += 1
        goes_on(name, 'a link')
        fresh(folder/'home'); f['vanished'] += 1
        t = threading.Timer(rng.uniform(.005, .2), lambda: shutil.rmtree(folder/'home', ignore_errors=True)); t.start()
        run(name, 'vanishing'); t.join()
        fresh(folder/'home'); goes_on(name, 'vanished')
        for year in (1, 2**33):
            fresh(folder/'home'); f['jumps'] += 1
            real, start = time.time, [year]
            time.time = lambda: start.append(start[-1] + rng.uniform(-1e6, 1e6)) or start[-1]
            try: goes_on(name, f'clock {year}')
            finally: time.time = real
            for p in (folder/'home').rglob('*'): os.utime(p, (year, year))
            if name in ('stage', 'record', 'report', 'compare', 'sweep'): goes_on(name, f'files of {year}')
    for two in (('x', 'x'), ('x', 'y'), ('x', 'x', 'y', 'y')):
        fresh(folder/'home'); f['races'] += 1
        ps = [subprocess.Popen([sys.executable, '-c', RACE, s], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for s in two]
        for p in ps:
            err = p.communicate()[1]
            if p.returncode: fault('race', two, err[-200:])
        odd = [str(p) for p in (folder/'home').rglob('.*') if not p.name.endswith('.lock')]
        if odd: fault('race', two, 'left', odd[:2])
        read_json(next((folder/'home').rglob('f.json')))
        if (folder/'home'/'runs'/'tiny'/'records'/'f.png').read_bytes() != bytes([19])*100_000: fault('race', two, 'a figure of two')
    return f | dict(ended=dict(f['ended']), faults=f['faults'][:30])
