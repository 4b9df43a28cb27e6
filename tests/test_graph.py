"The graph of stages: keys as they were written down before it was one, and rooms that know nothing of what stands before them."
import ast, json
from pathlib import Path
import pytest
from rlsft_nb import compare, explore, pipeline, ppo, repairs, runner, spectra
from rlsft_nb.files import write_json
from rlsft_nb.graph import STEPS, as_stage, notebooks, readers, sources, weights
from rlsft_nb.parallel import named_function
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.plan import STAGES
from rlsft_nb.runner import numbered
from rlsft_nb.stages import Stage

KEYS = Path(__file__).parent/'stage_keys.json' # `python tests/test_graph.py` writes it anew, where parameters of tiny were changed on purpose

def all_keys(patch) -> dict: # what -> key
    "Keys of every stage of seeds 0 to 2 of tiny, as if the curve had its peak at the third kept step; nothing is made."
    cfg, made, init = load_params('tiny'), {}, Stage.__init__
    steps = sorted(cfg.sft.checkpoints)
    fake = {f'compare-{a}': dict(scores={}, log=[]) for a in ('grpo', 'own', 'expert', 'sft')} | {'sft': dict(steps=steps, log=[]), 'ppo': dict(log=[]), 'sft-named': dict(end=dict(within={}), peak=dict(within={})),
        'sft-curve': dict(points=[dict(step=s, test={}) for s in [0, *steps]], peak=steps[2], end=steps[-1])}
    def noted(self, *a, **k):
        init(self, *a, **k)
        more = f" start {self.params['start']}" if 'start' in self.params else f" after start {self.upstream[0].params['start']}" if self.name == 'ppo-score' else ''
        made[f'{self.name} seed {self.seed}{more}'] = self.key
    patch(Stage, '__init__', noted); patch(Stage, 'done', property(lambda self: True)); patch(Stage, 'results', lambda self: fake.get(self.name, {}))
    for seed in range(3):
        for stage in ('base', 'named', 'sweep', 'restore', 'imposed', 'unrelated', 'theory', 'blocks'): getattr(pipeline, f'{stage}_stage')(cfg, seed)
        for s in ppo.starts(fake['sft-curve'], cfg.ppo.between): pipeline.score_stage(cfg, s, seed)
        for label in spectra.pairs(pipeline.named_with_rl(cfg, seed)):
            for null in ('shuffle', 'orient'): pipeline.pair_stage(cfg, label, seed, null)
        for arm in ('grpo', 'own', 'expert', 'sft'): compare.arm_item(cfg, arm, steps[-1], seed)
        compare.compare_stage(cfg, seed)
        made |= {f'explore {t} {r} seed {seed}': explore.tour_stage(cfg, seed, t, r).key for t, r in (('end', 'peak'), ('rl', 'end'))}
        made |= {f'ppo {c} seed {seed}': pipeline.rl_stage(compare.with_credit(cfg, c), steps[-1], seed).key for c in ('turn', 'token')}
    pipeline.sft_seeds_stage(cfg, 5); pipeline.restore_seeds_stage(cfg, 5); repairs.repairs_stage(cfg, 'tiny:end', 'tiny:peak')
    return {k: v for k, v in made.items() if k not in ('explore seed 0', 'explore seed 1', 'explore seed 2')}

def test_keys_are_those_written_down(monkeypatch): assert all_keys(monkeypatch.setattr) == json.loads(KEYS.read_text())

def test_the_table_is_whole():
    assert {n for s in STEPS.values() for n in s.needs} <= {*STEPS} and {s.weighs for s in STEPS.values()} - {''} == {*STAGES}
    assert all(callable(named_function(s.makes)) for s in STEPS.values() if s.makes)
    assert {s.notebook for s in STEPS.values()} <= {p.stem for p in (ROOT/'nbs').glob('*.ipynb')} and {nb.stem for nb in numbered()} - {*notebooks()} == {'00_game'}

def test_notebooks_stand_in_the_order_of_the_graph():
    assert all(need < nb for nb, needs in notebooks().items() for need in needs if nb[0].isdigit())
    assert readers('02_sft') == {'03_ppo', '04_spectra', '05_restore', '06_theory', '07_claims', '08_explore', 'ability', 'compare', 'healing', 'relearning'} and readers('01_models') == set()
    assert sources('06_theory') == ['03_ppo'] and sources('02_sft') == [] and weights('05_restore') == ['restore']

def test_a_stage_reads_what_the_graph_says():
    cfg = load_params('tiny')
    with pytest.raises(ValueError, match="stage 'sft-curve' reads 'base', which the graph does not say"): as_stage('sft-curve', cfg, {}, [as_stage('base', cfg, {})])

def test_a_notebook_outdates_those_that_read_it(tmp_path):
    asked = dict(model='tiny', seed=0)
    def left(stem): # of all, when `stem` is about to run
        kept = {nb.stem: runner.record_path(runner.output_path(nb, runner.values_of(nb, asked))) for nb in numbered()}
        for p in kept.values(): write_json(p, {})
        runner.outdate(runner.NBS/f'{stem}.ipynb', asked)
        return [stem for stem, p in kept.items() if p.is_file()]
    assert left('06_theory') == ['00_game', '01_models', '02_sft', '03_ppo', '04_spectra', '05_restore', '08_explore', '09_forget']
    assert left('02_sft') == ['00_game', '01_models', '09_forget'] and left('00_game') == []

def imported(room): # rooms below, by way of others too
    tree = ast.parse((ROOT/'rlsft_nb'/f'{room}.py').read_text())
    return {n.module or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 for a in n.names}

@pytest.mark.parametrize('room', ['sft', 'ppo', 'models', 'spectra', 'restoration', 'restore', 'surgery', 'comparison', 'theory', 'workbench'])
def test_rooms_know_nothing_of_stages_before_them(room):
    below, todo = set(), [room]
    while todo:
        below |= (new := imported(todo.pop()) - below); todo += new
    assert not below & {'pipeline', 'sft', 'ppo', *({'launch'} if room not in ('sft', 'ppo') else set())} and 'graph' not in imported(room)
    text = (ROOT/'rlsft_nb'/f'{room}.py').read_text()
    assert 'Stage(' not in text and 'as_stage(' not in text and 'run_stage(' not in text

def test_stages_are_spelt_out_by_the_graph_alone():
    assert [p.stem for p in sorted((ROOT/'rlsft_nb').glob('*.py')) if any(isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'Stage' for n in ast.walk(ast.parse(p.read_text())))] == ['graph']

if __name__ == '__main__': KEYS.write_text(json.dumps(all_keys(setattr), indent=1) + '\n')
