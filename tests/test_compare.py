"Alternatives to PPO: what they learn from, how much of it, and what is said of them."
import math, random, time
import pytest, torch
from rlsft_nb.parameters import load_params
from rlsft_nb.game import answer, hands, prompt, solve, values, verify
from rlsft_nb.generation import encode, stop_ids
from rlsft_nb.models import load_lm
from rlsft_nb import compare
from rlsft_nb.compare import *
from rlsft_nb.pipeline import rl_stage
from rlsft_nb.ppo_run import accelerator, rl_hands, setup
from rlsft_nb.rollouts import Trace, tail_ids

torch.set_num_threads(1)
PPO = dict(updates=2, episodes=4, batch=2, micro=2, epochs=2, save_every=5, lr=1e-3, between=1)

def small(pico, **p):
    return load_params('tiny', dict(model=dict(source='folder', path=str(pico['qwen2'])), ppo=PPO | p, eval=dict(max_new_tokens=4, hands=6, val_hands=4), game=dict(attempts=2), workers=1,
                                    sft=dict(steps=2, checkpoints=[1, 2], hands=8, batch=4, save_every=2, warmup=1, loss_hands=4)))

def weights(lm): return {n: w.detach().clone() for n, w in lm.named_parameters()}
def same(a, b): return all(torch.equal(w, b[n]) for n, w in a.items())

def solved(rng, cfg, tok, end, n): return [expert_trace(tok, end, h, solve(values(h))[0], cfg.game) for h in rng.sample(hands('val'), n)]

def test_an_expert_trace_is_the_templates(pico):
    cfg = load_params('tiny')
    lm, tok = load_lm('tiny')
    end = tail_ids(tok, stop_ids(lm, tok), dict(role='user', content='?'))[0]
    for h in hands('val', n=10):
        t = expert_trace(tok, end, h, solve(values(h))[0], cfg.game)
        said = dict(role='assistant', content=answer(h, '10', solve(values(h))[0]))
        assert encode(tok, [prompt(h) + [said, dict(role='user', content='x')]])[0][:len(t.ids)] == t.ids
        assert t.solved and t.ids[t.spans[0][0]:] == t.ids[len(encode(tok, [prompt(h)])[0]):]

def test_experts_answer_under_the_rule_of_the_hand(pico):
    cfg = small(pico, episodes=6, batch=6, others=1., other_rule='11-12-13')
    acc = accelerator(cfg)
    model, opt, tok, _ = setup(acc, cfg, str(pico['qwen2']), 0)
    expert = imitated('expert', acc, model, tok, cfg, 3, 1)
    assert all(t.rule == '11-12-13' and t.solved and verify(t.verdicts[0].formula and answer(t.cards, t.rule, t.verdicts[0].formula), t.cards, '11-12-13').correct for t in expert)

def test_sources_of_right_answers(pico):
    cfg = small(pico, episodes=6, batch=6)
    acc = accelerator(cfg)
    model, opt, tok, _ = setup(acc, cfg, str(pico['qwen2']), 0)
    expert, rows = (imitated(arm, acc, model, tok, cfg, 3, 1) for arm in ('expert', 'sft'))
    assert [t.cards for t in expert] == rl_hands(cfg, 3, 1) and all(t.solved for t in expert + rows)
    learned = {(tuple(h['cards']), f) for h, f in compare.sft_rows(cfg, 3)}
    assert len(learned) <= 8 and all((tuple(t.cards), t.verdicts[0].formula) in learned for t in rows)
    assert [t.ids for t in imitated('expert', acc, model, tok, cfg, 3, 2)] != [t.ids for t in expert]

def test_only_correct_answers_count_in_their_context():
    wrong, right = verify('no', ['8', '5', '10', '2']), verify(answer(['8', 'K', '3', '3'], '10', '8+10+3+3'), ['8', 'K', '3', '3'])
    late = Trace(['8', 'K', '3', '3'], [*range(20)], [(3, 6), (9, 20)], [wrong, right])
    never = Trace(['8', '5', '10', '2'], [*range(20)], [(3, 6), (9, 20)], [wrong, wrong])
    kept, = only_correct([late, never])
    assert (kept.ids, kept.spans, kept.solved) == (late.ids, [(9, 20)], True) and len(late.spans) == 2

def test_imitation_is_the_loss_of_sft(pico):
    "Against a plain forward, whatever the micro-batch."
    for micro in (1, 4):
        cfg = small(pico, episodes=4, batch=4, epochs=1, micro=micro)
        acc = accelerator(cfg)
        model, _, tok, _ = setup(acc, cfg, str(pico['qwen2']), 0)
        end = tail_ids(tok, stop_ids(model, tok), dict(role='user', content='?'))[0]
        rows = solved(random.Random(0), cfg, tok, end, 4)
        nats = 0.
        with torch.no_grad():
            for t in rows:
                logp = model(torch.tensor([t.ids])).logits[0].double().log_softmax(-1)
                nats -= sum(logp[i - 1, t.ids[i]].item() for i in range(*t.spans[0]))
        tokens = sum(b - a for t in rows for a, b in t.spans)
        before = torch.cat([w.detach().flatten() for w in model.parameters()])
        got = imitate(acc, model, torch.optim.SGD(model.parameters(), lr=1e-2), rows, cfg.ppo, tok.pad_token_id, random.Random(0))
        assert got == pytest.approx(nats/tokens, rel=1e-4)
        moved = torch.cat([w.detach().flatten() for w in model.parameters()]) - before
        if micro == 1: first = moved
    assert (moved - first).norm() < 1e-4*first.norm() and first.norm() > 0

def test_no_correct_answer_teaches_nothing(pico, tmp_path):
    "A random model solves no hand."
    r = train_imitation('own', small(pico), str(pico['qwen2']), tmp_path, 0)
    assert [l['answers'] for l in r['log']] == [0, 0] and [l['loss'] for l in r['log']] == [0, 0]
    assert same(weights(load_lm(str(tmp_path/'policy'))[0]), weights(load_lm(str(pico['qwen2']))[0]))

def test_grpo_samples_as_many_answers_and_takes_as_many_steps(pico, tmp_path, monkeypatch):
    seen = []
    def reward(prompts, completions, cards, **_): seen.append(list(cards)); return [float(len(c[0]['content']) % 3) for c in completions]
    monkeypatch.setattr(compare, 'reward_func', reward)
    cfg = small(pico)
    r = train_grpo(cfg, str(pico['qwen2']), tmp_path, 0, answers=70.)
    assert r['answers'] == 64 and [len(c) for c in seen] == [64, 64] # 70 to whole passes of 16 for each of two optimizer steps
    assert [seen[0][i*8] for i in range(8)] == [h for u in (1, 2) for h in rl_hands(cfg, 0, u)]
    assert [l['update'] for l in r['log']] == [1, 2] and all(math.isfinite(l['reward']) for l in r['log'])
    assert not same(weights(load_lm(str(tmp_path/'policy'))[0]), weights(load_lm(str(pico['qwen2']))[0]))

def test_all_arms_are_made_once_from_one_start(pico):
    cfg = small(pico)
    st = compare_stage(cfg)
    r = st.results()
    assert list(r['arms']) == list(ARMS) and all(len(a['log']) == 2 and a['scores']['OOD']['n'] == 6 for a in r['arms'].values())
    assert r['arms']['turn']['log'] == rl_stage(cfg, 2).results()['log'] and r['arms']['token']['log'] != r['arms']['turn']['log']
    starts = {p.name: (p/'results.json').is_file() for p in st.path.parent.iterdir() if p.name.startswith('compare-')}
    assert len(starts) == 5 and all(starts.values())
    start = time.perf_counter()
    assert compare_stage(cfg).results() == r and time.perf_counter() - start < 5
    fig = fig_compare(r, 'title')
    assert [len(a.patches) for a in fig.axes] == [7, 7] # six arms and the band of the start

def record(rate, n=200): return dict(n=n, multisets=n, hits='1'*int(rate*n) + '0'*(n - int(rate*n)), first=dict(rate=rate, lo=0., hi=1.))
def scores(ood): return dict(OOD=record(ood), ID=record(.5))

def test_verdicts_follow_their_thresholds():
    result = dict(start=scores(.1), arms={a: dict(scores=scores(v)) for a, v in dict(turn=.4, token=.39, grpo=.6, own=.2, expert=.4, sft=.05).items()})
    rows = verdicts(result, dict(OOD=range(200), ID=range(200)))
    assert [r['verdict'] for r in rows] == ['holds', 'within noise', 'fails', 'holds', 'within noise', 'holds']
    one = result | dict(arms={a: dict(scores=scores(v)) for a, v in dict(turn=.4, token=.3575, grpo=.4, own=.4, expert=.4, sft=.4).items()})
    p = 2*.5**9 # nine hands differ, all one way
    rows_ = verdicts(one, dict(OOD=range(200), ID=range(200)))
    assert [r['verdict'] for r in rows_] == ['holds', 'within noise', *['within noise']*4] and rows_[1]['null'] == f'McNemar p = {5*p:.2g}, Holm' and p < .01 < 5*p # alone it would hold
    assert rows[0]['claim'] == 'PPO, turn-level, is better than its start' and rows[4]['claim'].endswith("SFT on experts, RL's hands")
