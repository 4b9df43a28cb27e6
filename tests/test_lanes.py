"Stages side by side: what begins when, who helps whom, the same files as one after another, and what a kill or a failure leaves."
import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pexpect, pytest
from rlsft_nb import lanes, pipeline, stages
from rlsft_nb.files import read_json, write_json
from rlsft_nb.graph import STEPS, notebooks, ranks
from rlsft_nb.intervals import wilson
from rlsft_nb.lanes import Job, Plan
from rlsft_nb.parallel import LOST, Crew
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.stages import Stage
from faults.stages import SMALL, small_paper

TINY, AHEAD = load_params('tiny'), pipeline.points_ahead

# what begins when

@pytest.fixture
def world(monkeypatch):
    "Folders of stages that count as made; nothing is made, and the curve has its peak at the third kept step."
    made, steps = set(), sorted(TINY.sft.checkpoints)
    fake = dict(sft=dict(steps=steps, log=[]), ppo=dict(log=[]), **{'sft-curve': dict(points=[dict(step=s, test={}) for s in [0, *steps]], peak=steps[2], end=steps[-1])})
    monkeypatch.setattr(Stage, 'done', property(lambda self: self.path in made))
    monkeypatch.setattr(Stage, 'results', lambda self: fake.get(self.name, {}))
    monkeypatch.setattr(pipeline, 'points_ahead', lambda cfg, seed: [])
    return made

def books(*seeds):
    stems = [n for n in notebooks() if n[0].isdigit()] + ['00_game']
    more = lambda s: f', seed {s}' if s >= 0 else ', all'
    return {n + more(s): Job(n + more(s), n, s, '', ()) for s in seeds for n in stems if s >= 0 or n in ('02_sft', '07_claims')}

def played(plan, made, workers=2):
    "Names of jobs in the order in which they begin, each ended before the next may begin in its place; what was at work beside each."
    begun, beside = [], []
    while plan.left:
        while len(plan.at_work) < workers and (ready := plan.ready()):
            job = ready[0]
            if job.step: assert not stages.first_missing(lanes.named_function(job.fn), *job.args).endswith('x') and job.wants not in {j.wants for j in plan.at_work}
            plan.at_work.append(job); begun.append(job); beside.append(len(plan.at_work))
        job = plan.at_work[0]
        if job.step: made.add(Path(job.wants))
        plan.end(job)
    return begun, beside

@pytest.mark.parametrize('seeds', [(0,), (0, 1, 2, 3, 4)])
def test_everything_once_and_after_what_it_reads(world, seeds):
    plan = Plan(TINY, books(*seeds, *[-1]*(len(seeds) > 1)), {}, seeds)
    begun, beside = played(plan, world)
    names = [j.name for j in begun]
    assert len(names) == len(set(names)) == plan.done and max(beside) == 2
    assert len({j.wants for j in begun if j.step}) == len([j for j in begun if j.step]) == len(world)
    starts = len([n for n in names if n.startswith('ppo from')])
    assert starts == 6 + len(seeds) - 1 and sum(n.startswith('spectra') for n in names) == 6*len(seeds) and not any('start' in n for n in names)
    at = {(j.seed, j.step or j.notebook): i for i, j in enumerate(begun)} # the last of each step
    for (seed, n), i in at.items():
        if n in STEPS and seed >= 0 and n != 'spectra': assert all(at[seed, m] < i for m in STEPS[n].needs if (seed, m) in at and m != 'ppo'), n
        if n not in STEPS and seed >= 0: assert all(at[seed, m] < i for m, s in STEPS.items() if s.notebook == n and (seed, m) in at), n
    assert all(at[s, n] < at[s, '07_claims'] for s in seeds for n in ('02_sft', '03_ppo', '04_spectra', '05_restore', '06_theory')) and all(at[s, '03_ppo'] < at[s, '08_explore'] for s in seeds)
    if len(seeds) > 1: assert names[-2:] == ['02_sft, all', '07_claims, all'] and sum(n.startswith('restore-unrelated') for n in names) == 5

def test_the_longest_way_first_and_figures_as_they_are_made(world):
    plan = Plan(TINY, books(0), {})
    assert [j.name for j in plan.ready()][:1] == ['sft'] and {'base', 'theory-blocks', '00_game, seed 0', '09_forget, seed 0'} == {j.name for j in plan.ready()[1:]}
    begun, _ = played(plan, world)
    names = [j.name for j in begun]
    assert names[:4] == ['sft', '09_forget, seed 0', '00_game, seed 0', 'sft-curve'] and names.index('ppo from 800') < names.index('sft-named') < names.index('spectra SFT, shuffle') < names.index('base')
    for book in ('02_sft', '03_ppo', '04_spectra', '05_restore', '06_theory'): # drawn when the last of its stages is there
        assert names.index(f'{book}, seed 0') - max(i for i, j in enumerate(begun) if j.step and j.notebook == book) <= 3, book
    world.clear()
    slow = Plan(TINY, books(0), {'theory-blocks': 10**4})
    assert slow.ready()[0].name == 'theory-blocks' and ranks({'theory-blocks': 10})['theory-blocks'] == 11

def test_what_is_made_is_no_job(world):
    only = {n: j for n, j in books(0).items() if j.notebook in ('04_spectra', '02_sft')}
    assert {j.step for j in Plan(TINY, only, {}).left.values()} == {'', 'sft', 'sft-curve', 'sft-named', 'spectra'}
    world |= {pipeline.sft_of(TINY).path, pipeline.curve_of(TINY).path}
    plan = Plan(TINY, only, {})
    assert [j.name for j in plan.ready()] == ['sft-named', 'spectra SFT, shuffle', 'spectra SFT, orient', 'spectra SFT from peak, shuffle', 'spectra SFT from peak, orient', 'spectra RL, shuffle']
    assert plan.ready()[-1].wants == pipeline.rl_of(TINY, 800).path.__str__() # nobody else makes it

def test_stages_stay_with_their_notebooks_where_there_are_gpus(world):
    plan = Plan(TINY, books(0, 1), {}, (0, 1), apart=False)
    names = [j.name for j in played(plan, world, 1)[0]]
    assert not any(j.step for j in plan.left.values()) and len(names) == 20
    assert all(names.index(f'{a}, seed {s}') < names.index(f'{b}, seed {s}') for s in (0, 1) for b, needs in notebooks().items() if b[0].isdigit() for a in needs)

def test_a_seed_that_is_given_up(world):
    plan = Plan(TINY, books(0, 1, -1), {}, (0, 1))
    first = plan.ready()[:2]
    assert [j.name for j in first] == ['sft, seed 0', 'sft, seed 1']
    plan.at_work += first
    plan.drop(1)
    assert plan.at_work == first[:1] and {j.seed for j in plan.left.values()} == {0} and 'restore-unrelated, seed 0' not in plan.left

def test_checkpoints_are_measured_while_sft_runs(world, monkeypatch):
    plan = Plan(TINY, books(0), {})
    monkeypatch.setattr(pipeline, 'points_ahead', AHEAD)
    assert not plan.ahead()
    plan.at_work.append(plan.ready()[0])
    assert [j.name for j in plan.ready()][:4] == ['09_forget, seed 0', '00_game, seed 0', 'sft: step-0', 'theory-blocks']
    run = pipeline.sft_of(TINY)
    (run.path/'step-120').mkdir(parents=True)
    write_json(pipeline.curve_of(TINY).path/'points'/'step-0.json', {})
    job, = plan.ahead()
    assert job.name == 'sft: step-120' and job.args[0] == pipeline.curve_of(TINY).path/'points'/'step-120.json' and job.args[1:] == ('sft.curve_point', (str(run.path/'step-120'), TINY, 0))
    plan.at_work.append(job)
    world.add(run.path); plan.end(plan.at_work[0])
    assert not plan.ahead() and 'sft-curve' not in [j.name for j in plan.ready()] # its folder is in use
    plan.end(job, 'it could not be read')
    assert 'sft-curve' in [j.name for j in plan.ready()] and 'sft-curve' in plan.left and job.name in plan.failed

def test_what_is_left(world):
    seconds = {n: 60 for n in STEPS} | {n: 0 for n in notebooks()} | {'00_game': 0}
    plan = Plan(TINY, books(0), seconds)
    n = len([j for j in plan.left.values() if j.step])
    assert plan.rest({}, 1) == f', about {n} min left' and plan.rest({}, 100) == f", about {max(ranks(seconds).values())//60} min left"
    assert plan.rest({plan.ready()[0]: 60}, 1) == f', about {n - 1} min left' and Plan(TINY, books(0), seconds | {'00_game': None}).rest({}, 1) == ''

# a crew

def ended(crew, n=1):
    out = []
    while len(out) < n: crew.help(); out += crew.events(60)
    return out

def test_a_crew_shares_items(tmp_path):
    items = {f'k{k}': (k, 40) for k in range(40)}
    with Crew(2) as crew:
        crew.hands[0].give('a', 'parallel.map_items', ('intervals.wilson', items, tmp_path, 2, 'intervals'))
        helped, out = set(), []
        while not out:
            crew.help()
            if crew.hands[1].helps: helped.add(crew.hands[1].job); assert re.fullmatch(r'intervals: \d+/40', crew.hands[1].doing()) and crew.hands[1].helps.out <= 2
            out = [*crew.events(60)]
        (job, why, got, seconds), = out
        assert (job, why) == ('a', '') and got == {n: list(wilson(*a)) for n, a in items.items()} and helped == {'a'} and seconds > 0
        assert not crew.hands[0].items and len(crew.free()) == 2 - bool(crew.hands[1].job)

def test_a_crew_says_why(tmp_path):
    with Crew(2) as crew:
        crew.hands[0].give('a', 'parameters.load_params', ('tinny',))
        assert ended(crew)[0][:3] == ('a', "ParamError: model='tinny' has no file in params/; did you mean 'tiny'?", None)
        crew.hands[0].give('b', 'parallel.map_items', ('intervals.wilson', dict(x=(1, 4), y=(1,)), tmp_path, 2, 'intervals'))
        (job, why, *_), = ended(crew)
        assert job == 'b' and why.startswith('Traceback') and "missing 1 required positional argument" in why
        crew.end(['b'])
        crew.hands[1].process.kill(); crew.hands[1].process.join(); crew.hands[1].give('c', 'intervals.wilson', (1, 4))
        assert ended(crew)[0][:2] == ('c', f'WorkerLost: {LOST}')
        crew.end([])
        for h in crew.hands: h.give('d', 'intervals.wilson', (1, 4))
        assert [o[:3] for o in ended(crew, 2)] == [('d', '', wilson(1, 4))]*2

# the real stages of a small model, by the command, with notebooks that take no time

@pytest.fixture
def small(repo, pico):
    "A copy of the repository with a model `small`; each numbered notebook asks for one stage, as the real ones do for all of theirs."
    (repo/'rlsft_nb'/'data').symlink_to(ROOT/'rlsft_nb'/'data')
    (repo/'nbs'/'00_toy.ipynb').unlink()
    small_paper(repo, pico['qwen2'])
    return repo

TIMES = ('tokens_s', 'rollout_s', 'update_s')

def kept(repo) -> dict: # file -> bytes, or JSON without times and folders
    "All that stages have made."
    def plain(x):
        if isinstance(x, dict): return {k: plain(v) for k, v in x.items() if k not in TIMES}
        return [plain(v) for v in x] if isinstance(x, list) else x.replace(str(repo), '') if isinstance(x, str) else x
    at, out = repo/'runs'/'small', {}
    for p in (p for d in at.glob('*/done.json') for p in d.parent.rglob('*')):
        rel = p.relative_to(at)
        if p.suffix not in ('.json', '.safetensors') or p.name in ('done.json', 'config.json') or any(x.startswith(('resume', 'state-')) for x in rel.parts): continue
        out[re.sub('matrices-[0-9a-f]+', 'matrices', str(rel))] = p.read_bytes() if p.suffix != '.json' else plain(read_json(p))
    return out

PAPER = [sys.executable, '-m', 'rlsft_nb.paper', '--model', 'small']

def alive(repo): # processes that work in this copy
    return [p for p in Path('/proc').iterdir() if p.name.isdecimal() and _cwd(p) == repo and p.name != str(os.getpid())]

def _cwd(p):
    try: return (p/'cwd').resolve()
    except OSError: return None

def test_side_by_side_as_one_after_another(small):
    run = lambda *more, **kw: subprocess.run([*PAPER, *more], cwd=small, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800, **kw)
    p = subprocess.Popen(PAPER, cwd=small, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = [p.stderr.readline() for _ in range(3)]
    p.send_signal(signal.SIGKILL) # somewhere after the third stage
    assert all(re.match(r'(\S+ ?\S* ?\S*) +\d+ s$', l) for l in lines) and p.wait() == -9, lines
    wait = time.monotonic()
    while alive(small) and time.monotonic() - wait < 60: time.sleep(.5)
    assert not alive(small) # workers end with whoever started them
    c = pexpect.spawn(PAPER[0], PAPER[1:], cwd=str(small), timeout=1800, dimensions=(40, 120), encoding='utf-8', env=dict(os.environ))
    c.expect(pexpect.EOF); c.close()
    assert c.exitstatus == 0 and re.search(r'\d+ of \d+ done', c.before) and re.search(r'06_theory.ipynb +\d+ s', c.before), c.before[-3000:]
    assert max(map(len, re.split(r'[\r\n]', re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', c.before)))) < 120
    last = run()
    assert last.returncode == 0 and last.stdout.splitlines()[-1] == 'Everything is up to date for model small, seed 0.' and last.stderr == '', last.stderr
    beside = kept(small)
    shutil.rmtree(small/'runs')
    code = "from rlsft_nb import pipeline\nfrom rlsft_nb.parameters import load_params\ncfg = load_params('small', dict(workers=1))\npipeline.named_stage(cfg), pipeline.sweep_stage(cfg), pipeline.theory_stage(cfg), pipeline.blocks_stage(cfg)"
    alone = subprocess.run([sys.executable, '-c', code], cwd=small, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800, env={k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'})
    assert alone.returncode == 0 and kept(small) == beside and {n.rsplit('-', 1)[0].split('/')[0] for n in beside} >= {'ppo', 'sft'}, alone.stderr[-2000:]

def test_a_stage_that_fails_ends_the_rest(small):
    "One line; what ran beside it is ended, and goes on the next time."
    write_json(small/'params'/'small.yaml', read_json(small/'params'/'small.yaml') | dict(sft=SMALL['sft'] | dict(batch=7, accumulate=2)))
    r = subprocess.run(PAPER, cwd=small, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800)
    assert r.returncode == 1 and r.stderr.splitlines()[-1] == '02_sft.ipynb stopped. ParamError: sft.batch=7 is no multiple of sft.accumulate=2', r.stderr
    assert not alive(small) and not (small/'runs'/'small'/'records').exists()
