"RL from every start at every dose: where it begins, what each arm trains on, that a score is that of its policy, and what is said of it."
import json
import pytest, torch
from rlsft_nb import healing
from rlsft_nb.healing import *
from rlsft_nb.game import multisets, values
from rlsft_nb.healing import doses, dosed, runs
from rlsft_nb.models import score
from rlsft_nb.parameters import load_params
from rlsft_nb.pipeline import curve_stage, kept
from rlsft_nb.ppo import train_ppo
from rlsft_nb.problems import ParamError
from rlsft_nb.ppo_run import rl_hands
from test_e2e import SMALL

torch.set_num_threads(1)

def small(pico, **heal):
    return load_params('tiny', SMALL | dict(model=dict(source='folder', path=str(pico['qwen2'])), ppo=SMALL['ppo'] | dict(updates=2), heal=dict(doses=[.5, 1.0, 2.0], past=1.5) | heal))

def point(step, rate): return dict(step=step, val=dict(OOD=dict(first=dict(rate=rate))))

@pytest.mark.parametrize('peak, expected', [(160, dict(before=80, peak=160, moderate=320, end=800)), (80, dict(peak=80, moderate=320, end=800)), (800, dict(before=500, end=800)), (0, dict(end=800))])
def test_starts_by_validation_hands(peak, expected):
    curve = dict(points=[point(s, r) for s, r in ((0, 0.), (80, .5), (160, .5), (320, .31), (500, .2), (800, .1))], peak=peak, end=800)
    assert starts(curve) == expected

def test_arms_differ_in_their_hands_alone():
    cfg = load_params('tiny')
    own, any_, ood, varied = (rl_hands(dosed(cfg, a), 0, 1) for a in arms(cfg))
    assert doses(cfg) == {'0.25': 4, '0.5': 8, '1': 15, '2': 30} and dosed(cfg, 'rl').ppo.keep == [4, 8, 15]
    assert all(isinstance(h, list) for h in own) and own != any_ and {h['rule'] for h in ood} == {'11-12-13'} and len(ood) == 128
    rules = [h['rule'] for h in varied if isinstance(h, dict)]
    assert 4 <= len(rules) <= 25 and not {'10-10-10', '11-12-13'} & {*rules}
    assert [dosed(load_params('tiny', dict(ppo=dict(part=p))), a).ppo.part for p in ('rl', 'any') for a in ('rl', 'pool', 'ood')] == ['rl', 'any', 'rl', 'any', 'rl', 'any'] and {tuple(sorted(values(h, '10'))) for h in own} <= {*multisets('rl')}
    differ = {k: (v, dosed(cfg, 'rl').ppo[k]) for k, v in dosed(cfg, 'pool').ppo.items() if v != dosed(cfg, 'rl').ppo[k]}
    assert differ == dict(part=('any', 'rl'), updates=(15, 30), keep=([4, 8], [4, 8, 15])) # the arms end at the dose of figure 1

@pytest.mark.parametrize('bad', [[.5, 2.], [0., 1.], [-1., 1.]])
def test_doses_that_cannot_be_judged_are_refused(bad, tmp_path):
    with pytest.raises(ParamError, match='heal.doses=.*1.0 among them'): heal_stage(load_params('tiny', dict(heal=dict(doses=bad))))
    assert not (tmp_path/'runs').exists()

def test_what_a_seed_runs():
    cfg, at = load_params('tiny'), ['before', 'peak', 'moderate', 'end', 'past']
    assert len(runs(cfg, 0, at)) == 5 + 2*3 == len(runs(cfg, 1, at)) and runs(cfg, 2, at) == [('moderate', 'rl'), ('end', 'rl')]

def test_every_score_is_of_the_policy_at_that_dose(pico, tmp_path, monkeypatch):
    cfg = small(pico)
    st = heal_stage(cfg)
    found, curve = st.results(), curve_stage(cfg).results()
    assert {*found['steps']} >= {'end', 'past'} and found['steps']['past'] == 9 and {'end, rl', 'end, pool', 'end, ood', 'end, varied', 'past, rl'} <= {*found['runs']}
    run = found['runs']['end, rl']
    assert [*run['scores']] == ['0', '0.5', '1', '2'] and [*found['runs']['end, ood']['scores']] == ['0', '0.5', '1'] and all(r['n'] == 16 for p in run['scores'].values() for r in p.values())
    c = dosed(cfg, 'rl')
    train_ppo(c, kept(cfg)[curve['end']], tmp_path/'again', 0)
    for dose, where in (('0', kept(cfg)[curve['end']]), ('0.5', tmp_path/'again'/'policy-1'), ('2', tmp_path/'again'/'policy')):
        assert json.loads(json.dumps(score(str(where), c, 'test', ['ID', 'OOD']))) == run['scores'][dose], dose
    assert not (st.path/'runs').exists() # policies are thrown away
    fig = fig_healing(found, 'x')
    assert len(fig.axes) == 3 and [len(a.containers) for a in fig.axes] == [len(found['steps'])]*2 + [4]

rec = lambda k, n=200: dict(OOD=dict(hits='1'*k + '0'*(n - k), multisets=n, n=n, first=dict(rate=k/n, lo=0., hi=1.)))

@pytest.mark.parametrize('end, ood, verdicts', [(25, 120, ['within noise', 'mended', 'harmed', 'mended']), (60, 120, ['mended', 'mended', 'harmed', 'mended']), (25, 21, ['not testable here']*4)])
def test_verdicts(end, ood, verdicts):
    run = lambda before, after: dict(scores={'0': rec(before), '1': rec(after)})
    found = dict(steps=dict(end=800, moderate=500, peak=160), runs={'end, rl': run(20, end), 'moderate, rl': run(50, 90), 'peak, rl': run(90, 50), 'end, ood': run(20, ood)})
    rows = mended(found, [*range(200)])
    assert [r['verdict'] for r in rows] == verdicts and rows[0]['here'] == f'10.0 % to {end/2:.1f} % from step 800'
    assert ('would have been seen' in rows[0]['null']) is (end == 25 and ood == 120 or ood == 21)
