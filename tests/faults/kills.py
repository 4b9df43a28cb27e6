"Runs that are killed at random moments, parents, workers and ranks, and files cut at random lengths; then started again, to the same end."
import json, os, random, re, select, shutil, subprocess, sys, time
from collections import Counter
from pathlib import Path
import psutil
from rlsft_nb.files import whole
from stages import SMALL, STEPS

TIMES = {'tokens_s', 'rollout_s', 'update_s', 'seconds', 'stages', 'memory_free_gib', 'made', 'date', 'provenance', 'commit', 'dirty', 'files'} # what a record holds of how it was made
COMMANDS = ('report', 'export', 'compare', 'restore', 'rlsft sweep', 'forget')
POOLS = ('curve', 'sweep', 'restoration', 'theory', 'blocks') # steps that a pool of workers makes
LAUNCHED = ('SFT', 'RL') # and those of launched ranks
FORMS = (((1, 1), tuple(STEPS), .8, .5), ((2, 1), POOLS, .1, .3), ((1, 2), LAUNCHED, .1, .2)) # (workers, processes), the steps that are struck, their shares of the kills and of the time
HERE = Path(__file__).parent

def without(x):
    "A record without its times and what made it."
    if isinstance(x, dict): return {k: without(v) for k, v in x.items() if k not in TIMES}
    return [without(v) for v in x] if isinstance(x, list) else x

def ends(folder) -> dict: # path -> the bytes there; of a cache, whose name tells when a checkpoint was written, those of all its generations
    "Results, records, figures and weights of a run; done.json, states to go on from, logs and pages tell of times and machines."
    out = {}
    for p in sorted(Path(folder).rglob('*')):
        at = p.relative_to(folder)
        if p.name in ('done.json', 'log.jsonl', 'training_args.bin') or any(d.startswith(('resume', 'state-', '.')) for d in at.parts) or not p.is_file(): continue
        name = re.sub(r'/(matrices|updates|texts)-[0-9a-f]{8,16}\b', r'/\1', str(at))
        if name != str(at) and p.suffix == '.json' and not whole(p): continue # of a generation that nothing reads any more; what is read was made again
        out.setdefault(name, set()).add(json.dumps(without(json.loads(p.read_text()))).encode() if p.suffix == '.json' and whole(p) else p.read_text().rstrip()[-7:].encode() if p.suffix == '.html' else p.read_bytes())
    return out

def left(folder) -> list: return [str(p) for p in Path(folder).rglob('.*') if not p.name.endswith('.lock')]

class Runner:
    "Runs steps of one configuration, each time in a fork of a process that has imported everything."
    def __init__(self, folder, pico):
        self.folder, self.pico, self.mark = Path(folder), pico, f'{os.getpid()}-{time.monotonic_ns()}'
        self.runs, self.at, self.said = self.folder/'home'/'runs', self.folder/'at.json', self.folder/'said.txt'
        env = os.environ | dict(RLSFT_RUNS=str(self.runs), RLSFT_FAULTS=self.mark, OMP_NUM_THREADS='1', RLSFT_QUIET='1', RLSFT_LOCK_S='120', TOKENIZERS_PARALLELISM='false')
        self.server = subprocess.Popen([sys.executable, str(HERE/'stages.py')], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        self.warm = ''
    def start(self, form, names, mib=0, **more):
        "Starts a run; `form` is (workers, processes)."
        self.at.unlink(missing_ok=True)
        over = SMALL | dict(model=dict(source='folder', path=str(self.pico)), workers=form[0], launch=dict(processes=form[1])) | more
        asked = dict(over=over, names=list(names), out=str(self.folder/'home'/'out'), at=str(self.at), said=str(self.said), mib=mib, load=self.warm, warm=str(self.folder/'warm.json') if not self.warm else '')
        self.server.stdin.write(f'{json.dumps(asked)}\n'.encode())
        self.pid, self.code = int(self.server.stdout.readline()), None
    def wait(self, seconds=None): # the code; None where it still runs
        if self.code is None and select.select([self.server.stdout], [], [], seconds)[0]: self.code = int(self.server.stdout.readline() or 70)
        return self.code
    def whole(self, form, names, **more):
        "A run to its end."
        self.start(form, names, **more); code = self.wait()
        if not code and not self.warm: self.warm = str(self.folder/'warm.json')
        return code
    def told(self) -> dict:
        try: return json.loads(self.at.read_text())
        except (OSError, ValueError): return dict(now='', took={})
    def reach(self, name) -> bool: # False where the run ended before
        "Waits for a step to begin."
        while self.told()['now'] != name:
            if self.wait(.005) is not None: return False
        return True
    def ours(self) -> list:
        "What still runs, beside the process that forks."
        out = []
        for p in psutil.process_iter():
            try:
                if p.pid != self.server.pid and p.environ().get('RLSFT_FAULTS') == self.mark and p.status() != psutil.STATUS_ZOMBIE: out.append(p)
            except (psutil.Error, OSError): pass
        return out
    def last(self): return '\n'.join(l for l in re.split('[\r\n]+', self.said.read_bytes().decode(errors='replace')) if l.strip() and '|' not in l)[-600:]
    def close(self): self.server.stdin.close(); self.server.wait(); self.server.stdout.close()

def struck(rng, pid, parent:float) -> str:
    "Kills the parent, by chance `parent`, or one of those below it."
    try: p = psutil.Process(pid); below = p.children(recursive=True)
    except psutil.NoSuchProcess: return 'too late'
    one = p if not below or rng.random() < parent else rng.choice(below)
    try: words = ' '.join(one.cmdline()); one.kill()
    except psutil.Error: return 'too late'
    return 'parent' if one is p else 'launcher' if 'torch.distributed' in words else 'rank' if '-m rlsft_nb.' in words else 'worker' if 'spawn_main' in words else 'helper'

def cut(rng, home) -> str:
    "Spoils one of the newest files of runs/ as a disk without power may: cut short, empty, or its last rename undone."
    files = sorted((f for f in (home/'runs').rglob('*') if f.is_file() and f.stat().st_size and not f.name.endswith('.lock')), key=lambda f: f.stat().st_mtime)[-40:]
    if not files: return ''
    f, how = rng.choice(files), rng.choice(['cut', 'empty', 'renamed'])
    if how == 'renamed' and (any((d/'done.json').is_file() for d in f.parents) or f.name.startswith('.')): how = 'cut' # what is done was on the disk before
    os.truncate(f, 0 if how == 'empty' else rng.randrange(f.stat().st_size))
    if how == 'renamed':
        from rlsft_nb.files import _HOST
        os.replace(f, f.with_name(f'.{f.name}.{_HOST}-{2**22 + 1}.part'))
    return f'{how} {f.relative_to(home)}'

def campaign(kills:int, seed:int, folder, pico, forms=FORMS, seconds=10**9) -> dict:
    "`kills` kills, dealt to the steps of all forms in turn, or as many as the time allows; every chain of them ends in a run that nobody disturbs."
    folder, rng, begun = Path(folder), random.Random(seed), time.monotonic()
    class Faults(list):
        def append(self, x): super().append(x); print(x, file=sys.__stderr__, flush=True)
    f = dict(kills=0, struck=Counter(), during=Counter(), spoiled=Counter(), chains=0, lost=0, differ=0, orphans=0, parts=0, compared=0, faults=Faults())
    run = Runner(folder, pico)
    home, until, first = folder/'home', begun, None
    def lost(text): f['lost'] += 1; f['faults'].append(text)
    def keep(found): return {k: v for k, v in found.items() if form == (1, 1) or k.startswith('runs/tiny/') and '/records' not in k}
    try:
        for form, steps, share, part in forms:
            until, mine = until + part*seconds, 0
            late = lambda: time.monotonic() > until
            names = [n for n in STEPS if form == (1, 1) or n not in (*COMMANDS, 'figures', 'claims')]
            names = names[:1 + max(map(names.index, steps))]
            if first and form[1] == 1: took, want = {k: v + 12 for k, v in first[0].items()}, keep(first[1]) # workers change no number, but have to start
            else:
                shutil.rmtree(home, ignore_errors=True)
                if run.whole(form, names): lost(f'{form} undisturbed: code {run.code}: {run.last()}'); continue
                took, want = first = run.told()['took'], ends(home)
            f['compared'] = max(f['compared'], len(want))
            shutil.rmtree(home, ignore_errors=True)
            while mine < round(kills*share) and not late():
                told, todo, f['chains'] = [], [s for s in steps][:round(kills*share) - mine], f['chains'] + 1
                since = names[0]
                for step in todo:
                    if late(): break
                    if names.index(step) < names.index(since): continue # a kill came later than it was meant to
                    run.start(form, names[names.index(since):])
                    if not run.reach(step): # it ended before: no kill
                        if not run.code: since = step; continue # what an earlier run had made is passed at once
                        lost(f'{form} after {told[-3:]}: code {run.code} before {step}: {run.last()}')
                        break
                    run.wait(rng.uniform(0, 1.05*took[step]))
                    now = run.told()['now'] or 'after the last'
                    who = struck(rng, run.pid, 1. if form == (1, 1) else .25) if run.code is None else 'too late'
                    if who == 'too late': since = step; run.wait(); continue
                    mine, f['kills'], since = mine + 1, f['kills'] + 1, now if now in names else names[-1]
                    f['struck'][who] += 1; f['during'][now] += 1
                    code = run.wait(300)
                    if code is None: lost(f'{form}: hangs after a {who} was killed in {now}'); psutil.Process(run.pid).kill(); run.wait()
                    text = run.last()
                    if who in ('worker', 'helper') and code and 'Traceback' in text: lost(f'{form}: a {who} was killed in {now}, told in more than one line: {text[-300:]}')
                    end = time.monotonic() + 45
                    while (stay := run.ours()) and time.monotonic() < end: time.sleep(.1)
                    if stay: f['orphans'] += len(stay); lost(f'{form}: stays after a {who} was killed in {now}: {stay[0].cmdline()[:6]}'); [x.kill() for x in stay]
                    told.append(f'{who} in {now}')
                    if rng.random() < .4 and (what := cut(rng, home)): f['spoiled'][what.split()[0]] += 1; told.append(what); since = names[0] # whoever made it has to see it
                if run.whole(form, names): lost(f'{form} after {told}: code {run.code}: {run.last()}'); shutil.rmtree(home, ignore_errors=True); continue
                got = keep(ends(home))
                bad = sorted(k for k in got.keys() | want.keys() if got.get(k) != want.get(k))
                if bad: f['differ'] += len(bad); lost(f'{form} after {told}: differ: {bad[:5]}')
                if stay := left(home): f['parts'] += len(stay); lost(f'{form} after {told}: left: {stay[:3]}')
                shutil.rmtree(home)
    finally: run.close()
    return f | {k: dict(f[k]) for k in ('struck', 'during', 'spoiled')} | dict(faults=f['faults'][:20])
