"`make paper` of a small model again and again in one process, stages taken away before each run, kernels and workers killed now and then: what it holds must not grow, and every stage ends as if nobody had struck."
import json, os, shutil, subprocess, sys
from pathlib import Path
from stages import small_paper
from rlsft_nb.places import ROOT

LOOP = '''
import contextlib, hashlib, io, json, os, random, shutil, sys, threading, time
import psutil
from kills import without
from rlsft_nb.paper import main
from rlsft_nb.places import runs_root
rng, me, rows, root = random.Random(int(sys.argv[2])), psutil.Process(), [], runs_root()
def strike(all_):
    below = me.children(recursive=True)
    for c in below if all_ else rng.sample(below, min(1, len(below))):
        with contextlib.suppress(psutil.Error): c.kill()
def works(c): # a process that is neither at its end nor multiprocessing's own
    try: return 'resource_tracker' not in ' '.join(c.cmdline())
    except psutil.Error: return False
def paper():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try: main(['--model', 'small'], standalone_mode=False); code = 0
        except SystemExit as e: code = e.code or 0
    return code, err.getvalue()[-300:]
for i in range(int(sys.argv[1])):
    stages, kill = sorted(p.parent for p in root.glob('small/*/done.json')), i % 3 == 2
    for at in rng.sample(stages, min(2, len(stages))): # one from its parts, one from nothing
        (at/'done.json').unlink()
        if rng.random() < .5: shutil.rmtree(at)
    for p in (root/'small').glob('0*.json'): p.unlink()
    if kill: timer = threading.Timer(rng.uniform(.5, 20), strike, [rng.random() < .5]); timer.start()
    code, said = paper()
    if kill: timer.cancel(); timer.join()
    if code: code, said = paper() # the next run goes on
    end = time.monotonic() + 30
    while any(map(works, me.children(recursive=True))) and time.monotonic() < end: time.sleep(.1)
    made = {p.parent.name: hashlib.sha256(json.dumps(without(json.loads(p.read_text())), sort_keys=True).encode()).hexdigest()[:8] for p in sorted(root.glob('small/*/results.json'))}
    files = [p for p in root.rglob('*') if p.is_file()]
    rows.append(dict(code=code, kill=kill, said=said, descriptors=me.num_fds(), threads=me.num_threads(), mib=round(me.memory_info().rss/2**20, 1), disk=sum(p.stat().st_size for p in files),
                     files=len(files), children=len(me.children(recursive=True)), parts=sum(p.name.endswith('.part') for p in files), made=made))
print(json.dumps(rows))
'''

def campaign(loops:int, seed:int, folder, pico) -> dict:
    "`loops` runs of a small repository."
    new = Path(folder)/'repository'
    new.mkdir(parents=True)
    for f in ('settings.ini', 'params', 'rlsft_nb'): (shutil.copytree if (ROOT/f).is_dir() else shutil.copy)(ROOT/f, new/f)
    small_paper(new, pico)
    env = {k: v for k, v in os.environ.items() if k not in ('RLSFT_RUNS', 'RLSFT_FIGURES')} | dict(PYTHONPATH=os.pathsep.join([str(new), str(Path(__file__).parent)]), OMP_NUM_THREADS='1')
    p = subprocess.run([sys.executable, '-c', LOOP, str(loops), str(seed)], cwd=new, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if p.returncode: return dict(loops=0, lost=1, faults=[p.stderr[-500:]])
    rows, faults = json.loads(p.stdout.splitlines()[-1]), []
    first, last = rows[min(2, len(rows) - 1)], rows[-1] # by then a run has been whole, and one has gone on
    for k, room in dict(descriptors=4, threads=2, mib=60, children=0, files=2, parts=0).items():
        if last[k] > first[k] + room: faults.append(f'{k} grew from {first[k]} to {last[k]}')
    if last['disk'] > 1.05*first['disk'] + 20_000: faults.append(f"disk grew from {first['disk']} to {last['disk']}")
    faults += [f"run {i} failed: {r['said']}" for i, r in enumerate(rows) if r['code']]
    faults += [f"run {i}: other results" for i, r in enumerate(rows) if any(rows[-1]['made'].get(k) != v for k, v in r['made'].items())]
    keep = ('descriptors', 'threads', 'mib', 'disk', 'files')
    return dict(model='small', loops=loops, kills=sum(r['kill'] for r in rows), first={k: first[k] for k in keep}, last={k: last[k] for k in keep}, lost=len(faults), faults=faults[:10])
