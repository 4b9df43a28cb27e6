"A few answers under the OOD rule: what is trained, in what order, and what is said of it."
import json
import pytest, torch
from rlsft_nb.game import multisets, values
from rlsft_nb.models import clusters
from rlsft_nb.parameters import load_params
from rlsft_nb.pipeline import named_with_rl
from rlsft_nb.relearning import *
from rlsft_nb.relearning import settings
from rlsft_nb.sft import expert_rows

torch.set_num_threads(1)

def small(pico):
    return load_params('tiny', dict(model=dict(source='folder', path=str(pico['qwen2'])), eval=dict(max_new_tokens=4, hands=6, val_hands=4), game=dict(attempts=1), workers=1, relearn=dict(answers=[2, 5], passes=2, batch=2),
                                    sft=dict(steps=2, checkpoints=[1, 2], hands=8, batch=4, save_every=2, warmup=1, loss_hands=4), ppo=dict(updates=1, episodes=4, batch=4, micro=2, epochs=1, between=1)))

def test_rows_are_nested_under_the_other_rule_and_from_the_multisets_of_sft():
    cfg = load_params('tiny')
    few, many = (expert_rows(settings(cfg, 'tiny', n), 3) for n in (5, 30))
    assert few['cards'] == many['cards'][:5] and {*many['rule']} == {'11-12-13'}
    assert {tuple(sorted(values(h, '11-12-13'))) for h in many['cards']} <= set(multisets('sft'))

def test_every_checkpoint_after_every_number_of_answers(pico):
    cfg = small(pico)
    st = relearn_stage(cfg)
    found = st.results()
    assert {*found} == {'base', 'peak', 'end', 'rl'} and all({*points} == {'0', '2', '5'} and all(r['n'] == 6 for p in points.values() for r in p.values()) for points in found.values())
    assert found['rl']['0'] == after_answers(named_with_rl(cfg)['rl'], 0, cfg, 0)
    again = after_answers(named_with_rl(cfg)['end'], 5, cfg, 0)
    assert json.loads(json.dumps(again)) == found['end']['5'], 'the same answers, the same weights'

record = lambda *h: dict(OOD=dict(hits=(s := ''.join(map(str, h))), n=len(s), first=dict(rate=s.count('1')/len(s), lo=0., hi=1.)))
of = lambda k, n=200: record(*[1]*k, *[0]*(n - k))

@pytest.mark.parametrize('peak, end, ten, hundred, verdict', [(120, 40, 90, 110, 'hidden'), (120, 40, 60, 110, 'between'), (120, 40, 45, 70, 'lost'), (44, 40, 120, 120, 'not testable here'), (40, 120, 120, 120, 'not testable here')])
def test_verdicts(peak, end, ten, hundred, verdict):
    found = dict(peak={'0': of(peak)}, end={'0': of(end), '10': of(ten), '100': of(hundred)})
    row = relearning_verdict(found, [*range(200)])
    assert row['verdict'] == verdict and row['n'] == 200
    if verdict == 'hidden': assert row['here'] == '10 answers bring back 62%, 100 88%' and back(found, [*range(200)])[1]['share'] == pytest.approx(50/80)

def test_a_verdict_needs_ten_and_a_hundred_answers():
    row = relearning_verdict(dict(peak={'0': of(120)}, end={'0': of(40), '5': of(60)}), [*range(200)])
    assert row['verdict'] == 'not testable here' and row['here'] == 'asked after [0, 5] answers, not after 10 and 100'
