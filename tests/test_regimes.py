"The choice of SFT: its rule on points made by hand, and every trial on a small model."
import random
import pytest
from rlsft_nb import regimes
from rlsft_nb.parameters import load_params
from rlsft_nb.pipeline import kept
from rlsft_nb.models import score
from rlsft_nb.regimes import candidate, choice, chosen, fig_regimes, good, regimes_stage
from test_e2e import SMALL

@pytest.mark.parametrize('points, is_good', [([.2, .3, .3], True), ([.2, .3, .26, .28], True), ([.2, .3, .259, .27], False), ([.2, .3, .28], True), ([.2, .3, .321], False), ([.3], False)])
def test_steady_and_on_a_plateau(points, is_good): assert good(points) is is_good

def test_the_rule_takes_the_best_then_the_slowest():
    rng = random.Random(0)
    for _ in range(300):
        tried = {lr: [rng.uniform(.3, .34) for _ in range(3)] for lr in regimes.RATES}
        lr, fit = choice(tried), {lr: p for lr, p in tried.items() if all(b >= a - .04 for i, b in enumerate(p) for a in p[:i]) and abs(p[-1] - p[-2]) <= .02}
        if not fit: assert tried[lr][-1] == max(p[-1] for p in tried.values())
        else: assert lr in fit and max(p[-1] for p in fit.values()) - fit[lr][-1] <= .01 and not any(x < lr and max(p[-1] for p in fit.values()) - p[-1] <= .01 for x, p in fit.items())

def test_every_trial_is_sft_of_its_own_rate(pico, monkeypatch):
    monkeypatch.setattr(regimes, 'REGIMES', dict(paper=dict(part='any', hands=24), small=dict(part='sft', hands=8)))
    monkeypatch.setattr(regimes, 'RATES', (1e-3, 1e-2))
    cfg = load_params('tiny', SMALL | dict(model=dict(source='folder', path=str(pico['qwen2'])), workers=1))
    found = regimes_stage(cfg).results()
    assert {r: {*t} for r, t in found.items()} == {r: {'0.001', '0.01'} for r in ('paper', 'small')}
    at = kept(candidate(cfg, 'small', 1e-2))
    assert [p['step'] for p in found['small']['0.01']] == [n for n in at if n] == sorted(cfg.sft.checkpoints)
    last = score(at[max(at)], cfg, 'val', ['ID'])['ID']
    assert found['small']['0.01'][-1] == dict(step=max(at), n=last['n'], first=last['first'])
    assert [c['regime'] for c in chosen(found)] == ['paper', 'small'] and [len(a.containers) for a in fig_regimes(found, 'x').axes] == [2, 2]
