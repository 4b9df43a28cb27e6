"PPO: second implementations, the reference's defects, invariances, kills, several processes."
import json, math, os, random, re, subprocess, sys, time
import pytest, torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save
from rlsft_nb.files import atomic_write, read_json
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.problems import ParamError
from rlsft_nb.game import Verdict, answer, feedback_turn, hands, multisets, prompt, solvable, solve, values, verify
from rlsft_nb.generation import ModelError, encode, generate_ids, stop_ids
from rlsft_nb.models import clusters, load_lm
from rlsft_nb import actor_critic, ppo_run, rollouts
from rlsft_nb.actor_critic import *
from rlsft_nb.pipeline import curve_stage, named_with_rl, policy, rl_of, rl_stage, score_stage, sweep_stage
from rlsft_nb.ppo import *
from rlsft_nb.live import read_log
from rlsft_nb.ppo_run import *
from rlsft_nb.products import keeps_fp32, products
from rlsft_nb.reading import *
from rlsft_nb.rollouts import *
from rlsft_nb.sweep import sweep_rows

torch.set_num_threads(1)
PPO = dict(updates=4, episodes=8, batch=4, micro=2, epochs=2, save_every=1, lr=1e-3, lr_end=1., between=1)

def small(pico, kind='qwen2', **p):
    return load_params('tiny', dict(model=dict(source='folder', path=str(pico[kind])), ppo=PPO | p, eval=dict(max_new_tokens=5, hands=6, val_hands=4), game=dict(attempts=3), workers=1))

@pytest.fixture(scope='module')
def acc(): return Accelerator(cpu=True)

@pytest.fixture(scope='module')
def tiny(): return load_lm('tiny')

def weights(folder): return {n: p for n, p in load_lm(str(folder))[0].named_parameters()}
def same(a, b): return all(torch.equal(p, b[n]) for n, p in a.items())

def fake(rng, n=6, vocab=300, turns=5, longest=9): # hands of random tokens and rewards
    out = []
    for _ in range(n):
        t = Trace(['A']*4, [rng.randrange(vocab) for _ in range(rng.randint(3, 8))])
        for k in range(rng.randint(1, turns)):
            t.hear([rng.randrange(vocab) for _ in range(rng.randint(1, longest))], Verdict('wrong_value', float(rng.choice([-3, -2, -1]))))
            t.ids = t.ids + [rng.randrange(vocab) for _ in range(4)]
        if rng.random() < .5: t.verdicts[-1] = Verdict('correct', 5.)
        t.ids = t.ids[:t.spans[-1][1]]
        out.append(t)
    return out

def ready(lm, acc, traces, p, pad=0, seed=0): # as `update` leaves them before the first step
    for t in traces: t.old = t.value = None
    recall(acc, lm, traces, p, pad)
    advs, rets = credit_turns(traces, [t.value for t in traces], p)
    for t, a, r in zip(traces, normalise(acc, advs), rets): t.adv, t.ret = a, r
    return traces

# advantages and loss, each a second time in plain loops

def loop_gae(rewards, values, discounts, lam):
    out = []
    for t in range(len(rewards)):
        total, weight = 0., 1.
        for k in range(t, len(rewards)):
            after = values[k + 1] if k + 1 < len(rewards) else 0.
            total += weight*(rewards[k] + discounts[k]*after - values[k])
            weight *= discounts[k]*lam
        out.append(total)
    return out

@given(st.integers(0, 10**6), st.sampled_from(['turn', 'token']), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60)
def test_gae_is_that_of_the_loop(seed, credit, gamma, lam):
    rng = random.Random(seed)
    traces = fake(rng)
    n = [sum(b - a for a, b in t.spans) if credit == 'token' else len(t.spans) for t in traces]
    vals = [torch.tensor([rng.gauss(0, 3) for _ in range(k)]) for k in n]
    p = load_params('tiny', dict(ppo=dict(credit=credit, gamma=gamma, lam=lam))).ppo
    advs, rets = credit_turns(traces, vals, p)
    for t, v, a, r in zip(traces, vals, advs, rets):
        rewards, discounts = [], []
        for (x, y), verdict in zip(t.spans, t.verdicts):
            steps = y - x if credit == 'token' else 1
            rewards += [0.]*(steps - 1) + [verdict.reward]; discounts += [1.]*(steps - 1) + [gamma]
        want = loop_gae(rewards, v.tolist(), discounts, lam)
        assert torch.allclose(a, torch.tensor(want), atol=1e-3) and torch.allclose(r, torch.tensor(want) + v, atol=1e-3)

def test_nothing_is_borrowed_from_the_next_hand():
    "Fails where truncation bootstraps across hands, as in the reference."
    p = load_params('tiny', dict(ppo=dict(credit='turn', gamma=.9, lam=.95))).ppo
    lost = lambda: Trace(['A']*4, [0]*12, [(2, 4), (6, 8)], [Verdict('wrong_value', -1.)]*2)
    alone = credit_turns([lost()], [torch.tensor([1., 2.])], p)
    beside = credit_turns([lost(), lost()], [torch.tensor([1., 2.]), torch.tensor([100., 100.])], p)
    assert torch.equal(alone[0][0], beside[0][0]) and alone[1][0][-1] == -1.

@given(st.integers(0, 10**6), st.floats(.05, .5), st.floats(.05, 3))
@settings(max_examples=60)
def test_the_loss_is_that_of_the_loop(seed, clip, value_clip):
    g = torch.Generator().manual_seed(seed)
    logp, old, adv, value, before, ret = torch.randn(6, 9, generator=g, dtype=torch.float64)
    policy, val, ratio = ppo_loss(logp, old, adv, value, before, ret, clip, value_clip)
    want_p = want_v = 0.
    for i in range(9):
        r = math.exp(logp[i] - old[i])
        bound = max(1 - clip, min(1 + clip, r))
        want_p += max(-r*adv[i].item(), -bound*adv[i].item())
        near = before[i].item() + max(-value_clip, min(value_clip, (value[i] - before[i]).item()))
        want_v += max((value[i].item() - ret[i].item())**2, (near - ret[i].item())**2)/2
    assert policy.item() == pytest.approx(want_p) and val.item() == pytest.approx(want_v) and ratio.min() > 0

def test_large_ratios_keep_their_bound():
    "The reference drops the minimum where any ratio is above 10."
    one = torch.ones(1)
    assert ppo_loss(3*one, 0*one, one, one, one, one, .1, .1)[0].item() == pytest.approx(-1.1)

# ids only grow

def test_grown_ids_are_those_of_the_template(tiny):
    lm, tok = tiny
    stops = stop_ids(lm, tok)
    for h in hands('val', n=20):
        chat, ids = prompt(h), encode(tok, [prompt(h)])[0]
        for said in (answer(h, '10', '1+2+3'), answer(h, '10', '(1'), '{}'):
            turn = feedback_turn(verify(said, h))
            ids = extend(ids + tok(said)['input_ids'] + [stops[0]], tail_ids(tok, stops, turn), stops)
            chat += [dict(role='assistant', content=said), turn]
        assert ids == encode(tok, [chat])[0]

def scripted(tok, stops, lines):
    lines = iter(lines)
    return lambda prompts: [tok(x)['input_ids'] + stops for x in [next(lines)]*len(prompts)]

def test_history_is_never_tokenized_again(tiny):
    "An answer in unusual pieces stays as it was said."
    lm, tok = tiny
    stops, h = stop_ids(lm, tok), ['8', '5', '10', '2']
    odd = [tok.convert_tokens_to_ids(c) for c in '24']
    assert tok(tok.decode(odd))['input_ids'] != odd
    t, = rollout(lambda prompts: [odd + stops], tok, stops, [h], load_params('tiny', dict(game=dict(attempts=3))).game)
    assert [t.ids[a:b] for a, b in t.spans] == [odd + stops]*3

def test_cut_answers_get_the_end_of_turn_that_they_lack(tiny):
    lm, tok = tiny
    stops, h = stop_ids(lm, tok), ['8', '5', '10', '2']
    game = load_params('tiny', dict(game=dict(attempts=2))).game
    cut, = rollout(lambda prompts: [tok('{"')['input_ids']], tok, stops, [h], game)
    whole, = rollout(lambda prompts: [tok('{"')['input_ids'] + stops], tok, stops, [h], game)
    a, b = cut.spans[1][0], whole.spans[1][0]
    assert cut.ids[:a] == whole.ids[:b] # the same context, but the end of turn is nobody's action
    assert cut.spans[0][1] + 1 == whole.spans[0][1]

def test_every_answer_is_scored_and_there_is_no_sixth(tiny):
    lm, tok = tiny
    stops, asked = stop_ids(lm, tok), []
    def ask(prompts): asked.append(len(prompts)); return [tok('no')['input_ids'] + stops for _ in prompts]
    t, = rollout(ask, tok, stops, [['8', '5', '10', '2']], load_params('tiny').game)
    assert asked == [1]*5 and len(t.verdicts) == len(t.spans) == 5
    assert t.spans[-1][1] == len(t.ids) and {v.outcome for v in t.verdicts} == {'no_formula'} # no -1 of a step limit

def test_solved_hands_are_asked_no_more_and_busier_processes_are_waited_for(tiny):
    lm, tok = tiny
    stops, sizes, h = stop_ids(lm, tok), [], ['8', '5', '10', '2']
    right = answer(h, '10', solve(values(h))[0])
    def ask(prompts): sizes.append(len(prompts)); return [tok(right if p is prompts[0] and len(sizes) < 3 else 'no')['input_ids'] + stops for p in prompts]
    play = lambda most: [len(t.verdicts) for t in rollout(ask, tok, stops, [h, h], load_params('tiny', dict(game=dict(attempts=4))).game, most)]
    assert play(lambda n: n) == [1, 2] and sizes == [2, 1]
    sizes.clear()
    assert play(lambda n: n + 1) == [1, 2] and sizes == [2, 1, 1, 1] # its answers beyond the last hand count for nothing

def test_an_empty_answer_is_refused_and_a_bare_stop_is_an_answer(tiny):
    lm, tok = tiny
    stops, game = stop_ids(lm, tok), load_params('tiny', dict(game=dict(attempts=1))).game
    with pytest.raises(ValueError, match='answer 0 has no tokens'): rollout(lambda prompts: [[]], tok, stops, [['8', '5', '10', '2']], game)
    t, = rollout(lambda prompts: [stops], tok, stops, [['8', '5', '10', '2']], game)
    assert t.verdicts[0].outcome == 'no_formula' and t.spans == [(21, 22)]

def test_a_template_without_an_end_of_turn_is_an_error(tiny):
    lm, tok = load_lm('tiny')
    tok.chat_template = tok.chat_template.replace("'<|end|>'", "' and '")
    with pytest.raises(ModelError, match="after an answer; expected one of the tokens that end a turn"): tail_ids(tok, stop_ids(lm, tok), dict(role='user', content='no'))

# asking

def test_hands_are_those_of_generate(tiny, pico):
    "Near temperature 0, over all turns, on several architectures; rows stop at different times."
    for kind in ('tiny', 'qwen2', 'llama', 'mllama'):
        lm, tok = tiny if kind == 'tiny' else load_lm(str(pico[kind]))
        stops, game, few = stop_ids(lm, tok), load_params('tiny').game, hands('val', n=24 if kind == 'tiny' else 8)
        ours = rollout(Player(lm, tok, 31, 1e-6), tok, stops, few, game)
        plain = rollout(lambda prompts: generate_ids(lm, tok, prompts, max_new_tokens=31), tok, stops, few, game)
        assert [t.ids for t in ours] == [t.ids for t in plain]
        if kind == 'tiny': assert len({b - a for t in ours for a, b in t.spans}) > 3
        busy = rollout(Player(lm, tok, 31, 1e-6, most=lambda n: n + 1), tok, stops, few, game) # other processes are never done
        assert [t.ids for t in busy] == [t.ids for t in ours]

def test_tokens_are_drawn_as_generate_draws_them(pico):
    lm, tok = load_lm(str(pico['qwen2']))
    asked = [i for i in encode(tok, [prompt(h) for h in hands('val', n=40)]) if len(i) == 21][:8]
    assert Player(lm, tok, 4, .7, 3)(asked) == generate_ids(lm, tok, asked, max_new_tokens=4, temperature=.7, seed=3)
    said = torch.tensor(Player(lm, tok, 1, .7)(asked[:1]*4000))[:, 0]
    with torch.no_grad(): want = (lm(torch.tensor(asked[:1])).logits[0, -1].double()/.7).softmax(-1)
    got = said.bincount(minlength=len(want))/4000
    assert ((got - want).abs() < 5*(want/4000).sqrt() + 1e-3).all()

def test_only_what_is_new_is_read(pico):
    "Also when a hand in the middle has dropped out; prompts that continue nothing start anew."
    lm, tok = load_lm(str(pico['qwen2']))
    asked, read, player = encode(tok, [prompt(h) for h in hands('val', n=3)]), [], Player(lm, tok, 5, 1e-4)
    draw = player.draw
    player.draw = lambda ids, at, real: (read.append(int(real.sum())), draw(ids, at, real))[1]
    first = player(asked)
    assert read[0] == sum(map(len, asked))
    later = [a + f + [7, 8] for a, f in zip(asked, first)]
    read.clear()
    second = player([later[0], later[2]])
    assert read[0] == 2*3 # the last token of an answer was never read
    fresh = Player(lm, tok, 5, 1e-4)
    assert second == fresh([later[0], later[2]])
    read.clear()
    assert player([asked[1]]) == [first[1]] and read[0] == len(asked[1])

def test_hands_of_rl_are_its_own():
    own, cfg = set(multisets('rl')), load_params('tiny')
    assert all(tuple(sorted(values(h))) in own for h in rl_hands(cfg, 0, 3))
    assert rl_hands(cfg, 0, 3) != rl_hands(cfg, 0, 4) != rl_hands(cfg, 1, 4)
    wide = rl_hands(load_params('tiny', dict(ppo=dict(part='any'))), 0, 3)
    assert not all(tuple(sorted(values(h))) in own for h in wide) and not any(tuple(sorted(values(h))) in set(multisets('kept')) for h in wide)
    with pytest.raises(ParamError, match="ppo.part='test'"): rl_hands(load_params('tiny', dict(ppo=dict(part='test'))), 0, 0)

def test_hands_under_other_rules():
    cfg = lambda **p: load_params('tiny', dict(ppo=p))
    plain, some, ood = rl_hands(cfg(), 0, 3), rl_hands(cfg(others=.1), 0, 3), rl_hands(cfg(others=1., other_rule='11-12-13'), 0, 3)
    drawn = [h for h in some if isinstance(h, dict)]
    assert 5 <= len(drawn) <= 22 and all(h == p for h, p in zip(some, plain) if h not in drawn)
    assert all(solvable(values(h['cards'], h['rule'])) and set(h['cards']) & set('JQK') and h['rule'] not in ('10-10-10', '11-12-13') for h in drawn)
    assert len({h['rule'] for h in drawn}) > 3 and {h['rule'] for h in ood} == {'11-12-13'}
    assert all(tuple(sorted(values(h['cards'], h['rule']))) in set(multisets('rl')) for h in drawn + ood)
    for p, message in ((dict(others=2.), 'ppo.others=2.0: expected a number from 0 to 1'), (dict(other_rule='queens'), "ppo.other_rule='queens': expected 'varied', or a rule")):
        with pytest.raises(ParamError, match=message): check_ppo(cfg(**p))

def test_rl_may_have_attempts_of_its_own(pico, acc):
    tries = lambda **p: {len(t.verdicts) for t in play_update(acc, lm, tok, small(pico, **p), 0, 1)} # no random network solves a hand
    lm, tok = load_lm(str(pico['qwen2']))
    assert (tries(), tries(attempts=1), tries(attempts=2)) == ({3}, {1}, {2})
    with pytest.raises(ParamError, match='ppo.attempts=-1: expected attempts a hand, or 0 for those of the game'): check_ppo(small(pico, attempts=-1))

def test_each_hand_is_judged_by_its_own_rule(pico):
    lm, tok = load_lm(str(pico['qwen2']))
    stops, said = stop_ids(lm, tok), {}
    hand = ['J', '3', '10', '10'] # 10 + 10 + 10 - ... is another hand where J counts 11
    def ask(prompts): return [tok('{"cards": ["J", "3", "10", "10"], "number": [7, 3, 10, 10], "formula": "7+10+10-3"}')['input_ids'] + stops[:1] for _ in prompts]
    game = load_params('tiny', dict(game=dict(attempts=1))).game
    seven, ten = rollout(ask, tok, stops, [dict(cards=hand, target=24, rule='7-8-9'), hand], game)
    assert seven.solved and not ten.solved and '"J" as 7' in tok.decode(seven.ids) and '"J" as 10' in tok.decode(ten.ids)

# models of many kinds

MANY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=.3)
KINDS = dict(gemma2=dict(final_logit_softcapping=1.5), gemma3_text={}, granite=dict(logits_scaling=8.), cohere=dict(logit_scale=.0625), cohere2=dict(logit_scale=4.), hyperclovax=dict(logits_scaling=3.), phi={}, qwen2={}, llama={}, phi3={}, olmo2={}, gpt2={}, gpt_neox={},
             opt=dict(word_embed_proj_dim=16, ffn_dim=48), nanochat=dict(final_logit_softcapping=1.5), mixtral=dict(num_local_experts=2), nemotron={}, gpt_oss=dict(num_local_experts=2, num_experts_per_tok=1))

def model_of(kind, tok, impl='eager', **more):
    torch.manual_seed(0)
    c = AutoConfig.for_model(kind, **(MANY if kind != 'opt' else {k: v for k, v in MANY.items() if k != 'head_dim'} | dict(init_std=.3)), vocab_size=len(tok), pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None, **more)
    lm = AutoModelForCausalLM.from_config(c, attn_implementation=impl).eval()
    for n, w in lm.named_parameters():
        if n.endswith('bias'): torch.nn.init.normal_(w, std=.3) # zero in a new model
    return lm

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tied', [False, True])
def test_log_probabilities_are_the_models_own(tiny, monkeypatch, kind, tied):
    "Fails where logits are taken to be states times head: caps, scales, biases, projections; in one chunk and in many."
    tok = tiny[1]
    lm = model_of(kind, tok, tie_word_embeddings=tied, **KINDS[kind])
    traces, T = fake(random.Random(3), 3, vocab=len(tok)), .7
    with torch.no_grad(): own = [(lm(input_ids=torch.tensor([t.ids])).logits[0].double()/T).log_softmax(-1) for t in traces]
    want = torch.stack([x[i - 1, t.ids[i]] for x, t in zip(own, traces) for a, b in t.spans for i in range(a, b)])
    entropy = torch.stack([-(x[i - 1].exp()*x[i - 1]).sum() for x, t in zip(own, traces) for a, b in t.spans for i in range(a, b)])
    attach(lm)
    for size in (2**26, 7*len(tok)):
        monkeypatch.setattr(actor_critic, 'LOGITS', size)
        got = lm(**collate(traces, 0), temperature=T)
        assert (got['logp'] - want).abs().max() < 2e-4 and (got['entropy'] - entropy).abs().max() < 2e-4
    got['logp'].sum().backward()
    assert lm.get_output_embeddings().weight.grad.norm() > 0

@pytest.mark.parametrize('kind, name', [('gemma2', 'final_logit_softcapping'), ('granite', 'logits_scaling'), ('cohere', 'logit_scale')])
def test_gradients_are_those_of_the_models_own_logits(tiny, kind, name):
    tok, grads = tiny[1], []
    for ours in (True, False):
        lm, t = model_of(kind, tok, **{name: 2.}), fake(random.Random(4), 1, vocab=300)[0]
        if ours: loss = attach(lm)(**collate([t], 0), temperature=1.)['logp'].sum()
        else: loss = lm(input_ids=torch.tensor([t.ids])).logits[0].log_softmax(-1)[[i - 1 for a, b in t.spans for i in range(a, b)], [t.ids[i] for a, b in t.spans for i in range(a, b)]].sum()
        loss.backward()
        grads.append(torch.cat([w.grad.flatten() for n, w in lm.named_parameters() if not n.startswith('value_head.')]))
    assert (grads[0] - grads[1]).norm() < 1e-4*grads[1].norm()

def test_a_model_whose_logits_are_something_else_is_refused(tiny):
    "By the name of what its config says about logits; nothing is attached."
    from transformers import GraniteForCausalLM
    class Odd(GraniteForCausalLM):
        def forward(self, input_ids, **how):
            out = super().forward(input_ids, **how)
            out.logits = out.logits + 3*torch.nn.functional.one_hot(input_ids, out.logits.shape[-1])[:, -out.logits.shape[1]:]
            return out
    class Pointer(GraniteForCausalLM):
        def forward(self, input_ids, **how): return super().forward(input_ids, **how) if self.model(input_ids).hidden_states[0] is None else 1
    for cls, why in ((Odd, 'off by'), (Pointer, 'cannot be made from trunk and head')):
        lm = cls(model_of('granite', tiny[1], logits_scaling=8.).config).eval()
        with pytest.raises(ModelError, match=f'{cls.__name__}: .*{why}.*logits_scaling=8.0'): attach(lm)
        assert type(lm) is cls

WINDOWS = [('gemma2', 6), ('gemma3_text', 6), ('mistral', 6), ('phi3', 6), ('cohere2', 6), ('gpt_oss', 6), ('mixtral', 6), ('gemma2', 400), ('qwen2', None), ('llama', None), ('olmo2', None), ('gpt2', None), ('gpt_neox', None), ('granite', None)]

EAGER = ('gemma2', 'gpt_oss') # have eager attention alone

@pytest.mark.parametrize('kind, window, impl', [(*k, impl) for k in WINDOWS for impl in ('eager', 'sdpa') if impl == 'eager' or k[0] not in EAGER])
def test_hands_of_other_models_are_those_of_generate(tiny, kind, window, impl):
    "A boolean mask is added where attention is eager; windows are shorter than a hand, and than a prompt."
    tok = tiny[1]
    lm = model_of(kind, tok, impl, **KINDS.get(kind, {}), **(dict(sliding_window=window) if window else {}))
    stops, game, few = stop_ids(lm, tok), load_params('tiny', dict(game=dict(attempts=3))).game, hands('val', n=5)
    ours = rollout(Player(lm, tok, 8, 1e-6), tok, stops, few, game)
    assert [t.ids for t in ours] == [t.ids for t in rollout(lambda prompts: generate_ids(lm, tok, prompts, max_new_tokens=8), tok, stops, few, game)]
    t, = rollout(Player(lm, tok, 8, 1.), tok, stops, few[:1], game)
    with torch.no_grad(): own = lm(input_ids=torch.tensor([t.ids])).logits[0].log_softmax(-1)
    assert t.sampled == pytest.approx([own[i - 1, t.ids[i]].item() for a, b in t.spans for i in range(a, b)], abs=1e-4)

def refused(kind, tok):
    if kind == 'flash': lm = model_of('llama', tok); lm.config._attn_implementation = 'flash_attention_2'; return lm, "LlamaForCausalLM .*attn_implementation='flash_attention_2', expected sdpa or eager"
    more = dict(bloom=dict(), mpt=dict(d_model=32, n_heads=4, n_layers=2), mamba=dict(), rwkv=dict(), llama4_text=dict(num_local_experts=2), falcon=dict(alibi=True))[kind]
    if kind == 'falcon': return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=len(tok), **more)).eval(), 'FalconForCausalLM cannot be played'
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **({} if kind == 'mpt' else MANY), vocab_size=len(tok), **more)).eval()
    return lm, f'{type(lm).__name__} cannot be played with keys and values that are kept: ' + ('layers of the kind chunked_attention' if kind == 'llama4_text' else 'its forward takes no position_ids')

@pytest.mark.parametrize('kind', ['bloom', 'mpt', 'mamba', 'rwkv', 'llama4_text', 'falcon', 'flash'])
def test_models_that_keep_something_else_are_refused_in_one_line(tiny, kind):
    lm, message = refused(kind, tiny[1])
    with pytest.raises(ModelError, match=message) as e: Player(lm, tiny[1], 4, 1.)
    assert '\n' not in str(e.value)

def test_hybrids_are_refused(tiny):
    from transformers import FalconH1Config, FalconH1ForCausalLM
    lm = FalconH1ForCausalLM(FalconH1Config(**MANY, vocab_size=len(tiny[1]), mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, lm_head_multiplier=.5)).eval()
    with pytest.raises(ModelError, match='FalconH1ForCausalLM cannot be played with keys and values that are kept: it keeps a state besides them'): Player(lm, tiny[1], 4, 1.)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(): want = lm(input_ids=ids).logits[0].log_softmax(-1)[1:-1].gather(-1, ids[0, 2:, None])[:, 0]
    got = attach(lm)(**collate([Trace(['A']*4, ids[0].tolist(), [(2, 5)])], 0), temperature=1.)['logp'] # `lm_head_multiplier` sits on its trunk
    assert torch.allclose(got, want, atol=1e-5)

def test_a_wrong_mask_is_noticed_before_a_hand_is_played(tiny, monkeypatch):
    "As it was: true and false added to the scores of eager attention."
    tok, right = tiny[1], rollouts.sight
    wrong = lambda lm, at, width: torch.arange(width) <= at[:, None, :, None]
    monkeypatch.setattr(rollouts, 'sight', wrong)
    with pytest.raises(ModelError, match='LlamaForCausalLM .*its logits are then off by'): Player(model_of('llama', tok), tok, 4, 1.)
    Player(model_of('llama', tok, 'sdpa'), tok, 4, 1.)

@pytest.mark.parametrize('impl', ['eager', 'sdpa'])
def test_dropout_is_off_in_rollouts(tiny, impl):
    tok = tiny[1]
    lm, asked = model_of('llama', tok, impl, attention_dropout=.8), encode(tok, [prompt(h) for h in hands('val', n=4)])
    still = Player(lm, tok, 8, 1., 3)(asked)
    assert Player(lm.train(), tok, 8, 1., 3)(asked) == still and lm.training and lm.model.layers[0].self_attn.training

# log-probabilities

@pytest.mark.parametrize('temperature', [1., .5])
def test_what_sampled_is_what_is_trained(tiny, temperature):
    "Fails where sampling filters or a temperature are missing from log-probabilities: PPO's against those that generation drew from."
    lm, tok = load_lm('tiny')
    lm.generation_config.top_k, lm.generation_config.repetition_penalty = 3, 1.5 # a checkpoint's own settings must not matter
    stops, ids = stop_ids(lm, tok), encode(tok, [prompt(h) for h in hands('val', n=4)])
    said = generate_ids(lm, tok, ids, max_new_tokens=12, temperature=temperature, seed=1)
    traces = [Trace(['A']*4, i) for i in ids]
    for t, s in zip(traces, said): t.hear(s, Verdict('wrong_value', -1.))
    out = attach(lm)(**collate(traces, tok.pad_token_id), temperature=temperature)
    got = iter(out['logp'].tolist())
    plain, _ = load_lm('tiny')
    for i, s in zip(ids, said):
        with torch.no_grad(): logits = plain(torch.tensor([i + s])).logits[0].double()/temperature
        for k, token in enumerate(s): assert next(got) == pytest.approx(logits[len(i) + k - 1].log_softmax(-1)[token].item(), abs=2e-5)

def test_filters_would_be_noticed(tiny, acc, monkeypatch):
    "The check of the ratio: a policy that changes between the two readings is an error."
    lm, tok = load_lm('tiny')
    model, p = attach(lm), load_params('tiny', dict(ppo=PPO | dict(micro=8))).ppo
    traces = ready(model, acc, fake(random.Random(0), 4), p)
    opt = torch.optim.SGD(model.parameters(), lr=0.)
    step(acc, model, opt, traces, p, 0, True)
    for t in traces: t.old = t.old.bfloat16().float() # as the reference rounds them
    with pytest.raises(TrainingError, match='ratio is off by'): step(acc, model, opt, traces, p, 0, True)

def test_one_forward_a_hand_is_one_a_turn(pico):
    for kind in ('qwen2', 'llama', 'mllama'):
        lm, tok = load_lm(str(pico[kind]))
        model, traces = attach(lm), fake(random.Random(1), 5)
        whole = model(**collate(traces, 0), temperature=.7)
        turns = [Trace(t.cards, t.ids[:b], [(a, b)]) for t in traces for a, b in t.spans]
        single = [model(**collate([t], 0), temperature=.7) for t in turns]
        for k in ('logp', 'entropy', 'value'): assert torch.allclose(whole[k], torch.cat([s[k] for s in single]), atol=2e-5)
        if kind != 'mllama': assert torch.equal(lm(torch.tensor([[1, 2, 3]])).logits, load_lm(str(pico[kind]))[0](torch.tensor([[1, 2, 3]])).logits)

@pytest.mark.parametrize('credit', ['turn', 'token'])
def test_padding_order_and_micro_batches_change_nothing(pico, acc, credit):
    "Also fails where accumulation is off by one: all micro-batches count, once."
    grads = []
    for micro, flip in ((1, False), (4, False), (3, True), (12, False)):
        lm, tok = load_lm(str(pico['qwen2']))
        model, p = attach(lm), load_params('tiny', dict(ppo=dict(credit=credit, micro=micro, grad_clip=1e9, entropy_coef=.01))).ppo
        traces = ready(model, acc, fake(random.Random(2), 12), p)
        for t in traces: t.old = t.old - .05*torch.arange(len(t.old)) # ratios that are not 1
        before = [w.detach().clone() for w in model.parameters()]
        step(acc, model, torch.optim.SGD(model.parameters(), lr=1.), traces[::-1] if flip else traces, p, 0, False)
        grads.append(torch.cat([(b - w.detach()).flatten() for b, w in zip(before, model.parameters())]))
    for g in grads[1:]: assert (g - grads[0]).norm() < 1e-4*grads[0].norm() and grads[0].norm() > 0

def test_micro_batches_make_one_step(pico, acc):
    lm, tok = load_lm(str(pico['qwen2']))
    model, p, calls = attach(lm), load_params('tiny', dict(ppo=dict(micro=2, batch=6, epochs=3))).ppo, []
    opt = torch.optim.SGD(model.parameters(), lr=0.)
    plain = opt.step
    opt.step = lambda *a: (calls.append(sum(w.grad is not None for w in model.parameters())), plain())
    got = update(acc, model, opt, fake(random.Random(3), 15), p, 0, random.Random(0))
    assert len(calls) == 3*3 and min(calls) > 0 # 6 + 6 + 3 hands, three epochs: no step early, none left over
    assert got['kl'] == pytest.approx(0, abs=1e-6) and got['clipped'] == 0 and got['ratio_max'] == pytest.approx(1, abs=1e-4)

def test_equal_rewards_teach_the_policy_nothing(pico, acc):
    lm, tok = load_lm(str(pico['qwen2']))
    model, p = attach(lm), load_params('tiny', dict(ppo=dict(value_coef=0., gamma=1., lam=0., micro=4, grad_clip=1e9))).ppo
    traces = fake(random.Random(4), 6, turns=1)
    for t in traces: t.verdicts = [Verdict('wrong_value', -1.)]
    torch.nn.init.zeros_(model.value_head[-1].weight)
    ready(model, acc, traces, p)
    sums, _, norm = step(acc, model, torch.optim.SGD(model.parameters(), lr=0.), traces, p, 0, True)
    assert norm < 1e-3 and sums['policy_loss'] == pytest.approx(0, abs=1e-3)

def test_a_loss_that_is_not_finite_stops_before_anything_is_changed(pico, acc):
    lm, tok = load_lm(str(pico['qwen2']))
    model, p = attach(lm), load_params('tiny', dict(ppo=dict(micro=4))).ppo
    traces, before = ready(model, acc, fake(random.Random(5), 4), p), [w.detach().clone() for w in model.parameters()]
    traces[0].ret = traces[0].ret*math.nan
    with pytest.raises(TrainingError, match='gradient is not finite'): step(acc, model, torch.optim.SGD(model.parameters(), lr=1.), traces, p, 0, True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))

def test_a_policy_that_has_left_its_samples_stops_before_anything_is_changed(pico, acc):
    "As at a temperature near 0, where ratios overflow; nothing infinite reaches the log."
    lm, tok = load_lm(str(pico['qwen2']))
    model, p = attach(lm), load_params('tiny', dict(ppo=dict(micro=4))).ppo
    for off, text in ((-200., 'ratios of probabilities from .* to inf: .*ppo.temperature=1'), (200., 'ratios of probabilities from 0 to')):
        traces, before = ready(model, acc, fake(random.Random(5), 4), p), [w.detach().clone() for w in model.parameters()]
        traces[0].old = traces[0].old + off
        with pytest.raises(TrainingError, match=text): step(acc, model, torch.optim.SGD(model.parameters(), lr=1.), traces, p, 0, False)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))

def test_the_reference_model_is_the_start_and_k3_is_never_negative(pico, acc):
    lm, tok = load_lm(str(pico['qwen2']))
    model, ref, p = attach(lm), attach(load_lm(str(pico['qwen2']))[0]), load_params('tiny', dict(ppo=dict(kl_coef=.1, micro=4, batch=6, epochs=1))).ppo
    opt, rng = torch.optim.Adam(model.parameters(), lr=1e-3), random.Random(0)
    seen = [update(acc, model, opt, fake(random.Random(6), 6), p, 0, rng, ref)['reference_kl'] for _ in range(3)]
    assert seen[0] == pytest.approx(0, abs=1e-6) and 0 < seen[1] < seen[2]

# a toy game: the first token of the answer decides

def toy_run(pico, acc, shuffled, credit='turn'):
    lm, tok = load_lm(str(pico['qwen2']))
    model, p = attach(lm), load_params('tiny', dict(ppo=dict(credit=credit, micro=64, batch=64, epochs=4, clip=.2))).ppo
    opt = torch.optim.AdamW([dict(params=[w for n, w in model.named_parameters() if 'value' not in n], lr=5e-3), dict(params=model.value_head.parameters(), lr=5e-3)])
    rng, rates, asked = random.Random(0), [], encode(tok, [prompt(h) for h in hands('val', n=64)])
    for u in range(20):
        said = generate_ids(model, tok, asked, max_new_tokens=2, temperature=1., seed=u)
        won = [s[0] % 2 == 0 for s in said]
        rates.append(sum(won)/64)
        if shuffled: rng.shuffle(won)
        traces = [Trace(['A']*4, i) for i in asked]
        for t, s, w in zip(traces, said, won): t.hear(s, Verdict('correct', 1.) if w else Verdict('wrong_value', -1.))
        update(acc, model, opt, traces, p, tok.pad_token_id, rng)
    return sum(rates[-3:])/3

@pytest.mark.parametrize('credit', ['turn', 'token'])
def test_a_toy_game_is_learned_and_shuffled_rewards_teach_nothing(pico, acc, credit):
    assert toy_run(pico, acc, False, credit) > .9
    assert toy_run(pico, acc, True, credit) < .75

# the run

@pytest.fixture(scope='module')
def trained(pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp('ppo')
    return folder, train_ppo(small(pico), str(pico['qwen2']), folder, 1)

def test_a_run_leaves_a_plain_checkpoint_a_head_and_a_log(trained, pico):
    folder, r = trained
    assert sorted(p.name for p in folder.iterdir()) == ['log.jsonl', 'policy', 'state-4', 'trained.json']
    assert [l['update'] for l in r['log']] == [1, 2, 3, 4] and r['log'] == read_log(folder)
    assert read_json(folder/'policy'/'config.json')['architectures'] == ['Qwen2ForCausalLM']
    assert set(load_file(folder/'policy'/'value_head.safetensors')) == {f'{i}.{k}' for i in (0, 2, 4) for k in ('weight', 'bias')}
    assert set(weights(folder/'policy')) == set(weights(pico['qwen2'])) and not same(weights(folder/'policy'), weights(pico['qwen2']))
    line = r['log'][0]
    assert line['hands'] == 8 and 1 <= line['turns'] <= 3 and abs(sum(line[o] for o in ppo_run.OUTCOMES) - 1) < 1e-9
    assert 0 < line['length'] <= 5 and line['ratio_min'] <= 1 <= line['ratio_max'] and line['kl'] >= 0 and line['lr'] == pytest.approx(1e-3)

@pytest.mark.parametrize('kind', ['llama', 'mllama'])
def test_other_architectures_train_and_load_again(pico, tmp_path, kind):
    train_ppo(small(pico, kind, updates=1, kl_coef=.1, entropy_coef=.01, credit='token'), str(pico[kind]), tmp_path)
    before, after = weights(pico[kind]), weights(tmp_path/'policy')
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert set(before) == set(after) and any('self_attn' in n for n in moved)
    assert not any('vision' in n or 'cross_attn' in n for n in moved)

def test_kept_updates_are_policies_of_their_own(trained, pico, tmp_path):
    train_ppo(small(pico, keep=[1]), str(pico['qwen2']), tmp_path, 1)
    first, last, alone = weights(tmp_path/'policy-1'), weights(tmp_path/'policy'), weights(trained[0]/'policy')
    assert same(last, alone) and not same(first, last) and load_lm(str(tmp_path/'policy-1'))[0].config.model_type == 'qwen2'
    with pytest.raises(ParamError, match=r'ppo.keep=\[0\]: expected updates, from 1 on'): train_ppo(small(pico, keep=[0]), str(pico['qwen2']), tmp_path/'b', 1)
    assert rl_of(small(pico, keep=[]), 1).key == rl_of(small(pico), 1).key != rl_of(small(pico, keep=[1]), 1).key

def test_a_finished_run_is_not_made_again(trained, pico):
    start = time.perf_counter()
    assert train_ppo(small(pico), str(pico['qwen2']), trained[0], 1) == trained[1] and time.perf_counter() - start < 1

def test_killed_at_any_moment_it_ends_in_the_same_weights(trained, pico, tmp_path):
    over = dict(model=dict(source='folder', path=str(pico['qwen2'])), ppo=PPO, eval=dict(max_new_tokens=5, hands=6, val_hands=4), game=dict(attempts=3), workers=1)
    code = f'from rlsft_nb.parameters import load_params\nfrom rlsft_nb.ppo import train_ppo\ntrain_ppo(load_params("tiny", {over!r}), {str(pico["qwen2"])!r}, {str(tmp_path)!r}, 1)'
    for seen in (1, 3): # killed after each of these was reached
        p = subprocess.Popen([sys.executable, '-c', code], env=os.environ | dict(OMP_NUM_THREADS='1'), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(int(f.name.split('-')[1]) >= seen for f in tmp_path.glob('state-*')) and p.poll() is None: time.sleep(.002)
        p.kill(); p.wait()
    with open(tmp_path/'log.jsonl', 'a') as f: f.write('{"update": 4, "hal') # cut short by the kill
    got = train_ppo(small(pico), str(pico['qwen2']), tmp_path, 1)
    assert same(weights(tmp_path/'policy'), weights(trained[0]/'policy'))
    timeless = lambda log: [{k: v for k, v in l.items() if not k.endswith('_s')} for l in log]
    assert timeless(got['log']) == timeless(trained[1]['log'])
    assert torch.equal(*(load_file(d/'policy'/'value_head.safetensors')['0.weight'] for d in (tmp_path, trained[0])))

@pytest.mark.parametrize('more, message', [(dict(ppo=dict(lr=2e-3)), r'ppo.lr=0.002 \(it began with 0.001\)'), (dict(ppo=dict(part='any')), "ppo.part='any'"), (dict(game=dict(attempts=2)), r'game.attempts=2 \(it began with 3\)'), (dict(game=dict(id_rule='11-12-13')), 'game.id_rule'),
    (dict(eval=dict(max_new_tokens=6)), 'eval.max_new_tokens=6'), (dict(model=dict(dtype='bfloat16')), "model.dtype='bfloat16'"), (dict(sft=dict(bf16=True)), 'sft.bf16=True'), (dict(ppo=dict(lr=2e-3, updates=6)), r'ppo.updates=6 \(it began with 4\), ppo.lr=0.002'), (dict(seed=2), r'seed=2 \(it began with 1\)')])
@pytest.mark.parametrize('done', [True, False])
def test_a_run_goes_on_with_the_settings_it_began_with(trained, pico, tmp_path, more, message, done):
    import shutil
    folder = shutil.copytree(trained[0], tmp_path/'run')
    if not done: (folder/'trained.json').unlink()
    base = dict(model=dict(source='folder', path=str(pico['qwen2'])), ppo=PPO, eval=dict(max_new_tokens=5, hands=6, val_hands=4), game=dict(attempts=3), workers=1)
    over = {k: base.get(k, {}) | more.get(k, {}) if k != 'workers' else 1 for k in {*base, *more} - {'seed'}}
    before = sorted(p.name for p in folder.rglob('*'))
    with pytest.raises(ParamError, match=f'holds a run with other settings: .*{message}'): train_ppo(load_params('tiny', over), str(pico['qwen2']), folder, more.get('seed', 1))
    assert sorted(p.name for p in folder.rglob('*')) == before

def test_a_run_whose_start_was_trained_further_is_refused(trained, pico, tmp_path):
    import shutil
    folder, start = shutil.copytree(trained[0], tmp_path/'run'), shutil.copytree(pico['qwen2'], tmp_path/'start')
    note = read_json(folder/'state-4'/'start.json')
    (folder/'state-4'/'start.json').write_text(json.dumps(note | dict(start=str(start))))
    assert train_ppo(small(pico), str(start), folder, 1) == trained[1] # the same weights elsewhere
    w = load_file(start/'model.safetensors'); w['model.norm.weight'] += 1
    atomic_write(start/'model.safetensors', save(w, dict(format='pt')))
    with pytest.raises(ParamError, match='weights='): train_ppo(small(pico), str(start), folder, 1)

def test_states_without_a_note_of_settings_go_on(trained, pico, tmp_path):
    import shutil
    folder = shutil.copytree(trained[0], tmp_path/'run')
    (folder/'state-4'/'start.json').write_text(json.dumps(dict(start=str(pico['qwen2'])))) # as earlier versions wrote them
    assert train_ppo(small(pico, lr=2e-3), str(pico['qwen2']), folder, 1) == trained[1]

def test_what_was_sampled_is_compared_with_what_is_read_again(trained, pico, tmp_path, monkeypatch):
    assert 0 < trained[1]['reread'] < 1e-4
    draw = Player.draw
    def other(self, *args): said, logp = draw(self, *args); return said, logp - .05
    monkeypatch.setattr(Player, 'draw', other)
    with pytest.raises(TrainingError, match=r'Qwen2ForCausalLM: log-probabilities read again are off by 0.05 nats a token .*expected 0.01 or less'): train_ppo(small(pico, temperature=1.), str(pico['qwen2']), tmp_path)
    assert not list(tmp_path.glob('state-*'))

def test_rounding_is_granted_and_no_more(acc, pico):
    lm, tok = load_lm(str(pico['qwen2']))
    def traces(off):
        out = fake(random.Random(0), 4)
        for t in out: n = sum(b - a for a, b in t.spans); t.old, t.sampled = torch.zeros(n), [off]*n
        return out
    assert reread(acc, lm, traces(.009)) == pytest.approx(.009)
    for off in (.015, math.nan):
        with pytest.raises(TrainingError, match='Qwen2ForCausalLM: log-probabilities read again are off by'): reread(acc, lm, traces(off))
    assert reread(acc, lm.bfloat16(), traces(.015)) == pytest.approx(.015)
    with pytest.raises(TrainingError, match='off by 0.12 nats a token'): reread(acc, lm, traces(.12))
    silent = traces(0.)
    for t in silent: t.sampled = [] # a player that does not tell
    assert reread(acc, lm, silent) is None

@pytest.mark.parametrize('kind, name', [('llama', 'attention_dropout'), ('opt', 'dropout'), ('gpt2', 'resid_pdrop')])
def test_recomputed_layers_have_no_dropout(tiny, acc, kind, name):
    "Also where a layer itself drops out, as OPT's."
    tok, got = tiny[1], []
    for redo, p in ((False, 0.), (True, .5)):
        lm = model_of(kind, tok, 'sdpa', **KINDS[kind], **{name: p})
        model = attach(recompute(lm) if redo else lm)
        more, traces = load_params('tiny', dict(ppo=PPO | dict(micro=4, batch=4, checkpointing=redo))).ppo, fake(random.Random(1), 4)
        line = update(acc, model, torch.optim.SGD(model.parameters(), lr=1e-3), traces, more, 0, random.Random(0))
        got.append((line, torch.cat([w.detach().flatten() for w in model.parameters()])))
        assert not model.training
    assert got[0][0] == got[1][0] and torch.equal(got[0][1], got[1][1])

def test_layers_are_computed_again(pico):
    lm, calls = recompute(load_lm(str(pico['qwen2']))[0]), []
    for l in lm.model.layers: l.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    out = attach(lm)(**collate(fake(random.Random(1), 2), 0), temperature=1.)
    n = len(calls)
    out['logp'].sum().backward()
    assert n >= 2 and len(calls) == n + 2
    with pytest.raises(ParamError, match='ppo.checkpointing=True: Linear has no layers'): recompute(torch.nn.Linear(2, 2))

def test_a_folder_of_another_start_is_refused(pico, tmp_path):
    train_ppo(small(pico, updates=1), str(pico['qwen2']), tmp_path)
    (tmp_path/'trained.json').unlink()
    with pytest.raises(ParamError, match='holds a run from'): train_ppo(small(pico), str(pico['llama']), tmp_path)

@pytest.mark.parametrize('p, message', [(dict(credit='word'), "ppo.credit='word': expected 'turn' or 'token'"), (dict(episodes=6), 'ppo.episodes=6 is no multiple of ppo.batch=4'), (dict(temperature=0.), 'ppo.temperature=0.0: expected a positive'),
    (dict(micro=0), 'ppo.micro=0'), (dict(gamma=1.5), 'ppo.gamma=1.5'), (dict(lr=math.inf), 'ppo.lr=inf')])
def test_impossible_settings_are_refused_before_anything_is_made(pico, tmp_path, p, message):
    with pytest.raises(ParamError, match=message): train_ppo(small(pico, **p), str(pico['qwen2']), tmp_path/'new')
    assert not (tmp_path/'new').exists()

def test_a_start_that_is_no_language_model_is_an_error(pico, tmp_path):
    with pytest.raises(ModelError, match='cannot load'): train_ppo(small(pico), str(tmp_path/'..'), tmp_path)

def test_keys_are_kept_in_the_arithmetic_of_attention(monkeypatch):
    "Rotary embeddings make fp32 keys under autocast; attention would round them again for every token."
    lm, tok = load_lm('tiny')
    asked, kept, real = encode(tok, [prompt(h, '10') for h in hands('test', '10')[:6]]), set(), Bank.update
    def seen(self, *args, **how): out = real(self, *args, **how); kept.update(x.dtype for x in out); return out
    def rounded_late(self, keys, values, layer, *_, **__):
        with torch.autocast('cpu', enabled=False): return real(self, keys, values.float(), layer)
    def answers(update):
        monkeypatch.setattr(Bank, 'update', update)
        with torch.autocast('cpu', torch.bfloat16): return Player(lm, tok, 31, 1., 3)(asked)
    assert answers(seen) == answers(rounded_late) and kept == {torch.bfloat16}

def test_log_probabilities_are_fp32_over_bf16_weights(monkeypatch):
    "As under FSDP2, whose gathered weights are bf16: rounded logits of 30 would be off by a quarter at temperature 0.2."
    lm, tok = load_lm('tiny', dtype='bfloat16')
    attach(lm)
    x = collate([Trace(['2', '3', '4', '5'], list(range(40, 80)), [(10, 30)])], tok.pad_token_id)
    with torch.no_grad():
        hidden = lm.base_model(input_ids=x['input_ids'], attention_mask=x['attention_mask']).last_hidden_state[0, 9:29].double()
        want = (hidden @ lm.get_output_embeddings().weight.double().T/.2).log_softmax(-1)[range(20), range(50, 70)]
        got = {size: lm(**x, temperature=.2)['logp'] for size in (2**26, 3*500) if not monkeypatch.setattr(actor_critic, 'LOGITS', size)}
    for logp in got.values(): assert logp.dtype == torch.float32 and (logp - want).abs().max() < 1e-4

# products by another library

def gradient(acc, lm, p, kind, dtype=torch.float32): # loss and gradients of hands whose ratios are not 1, some of them clipped
    model = attach(load_lm(str(lm))[0])
    traces, loss = ready(model, acc, fake(random.Random(0), 8), p), 0.
    for t in traces: t.old = t.old + .02
    model.to(dtype)
    with products(kind):
        for part in chunks(traces, p.micro):
            one = micro_loss(acc, model, part, p, 0)[0]
            acc.backward(one)
            loss += one.item()
    return loss, {n: w.grad.double() for n, w in model.named_parameters() if w.grad is not None}

@pytest.mark.skipif(not keeps_fp32(), reason='oneDNN is missing or rounds to bf16 here')
@pytest.mark.parametrize('credit', ['turn', 'token'])
@pytest.mark.parametrize('kind', ['qwen2', 'llama'])
def test_another_library_and_smaller_passes_give_the_losses_and_gradients_of_fp64(pico, acc, kind, credit):
    of = lambda micro: load_params('tiny', dict(ppo=PPO | dict(micro=micro, batch=8, credit=credit))).ppo
    loss, exact = gradient(acc, pico[kind], of(8), 'torch', torch.float64)
    for micro in (8, 3):
        got, grads = gradient(acc, pico[kind], of(micro), 'onednn')
        assert got == pytest.approx(loss, rel=1e-5) and grads.keys() == exact.keys()
        for n, g in exact.items(): assert (grads[n] - g).norm() <= 1e-5*g.norm(), n

@pytest.mark.skipif(not keeps_fp32(), reason='oneDNN is missing or rounds to bf16 here')
def test_products_are_sent_recorded_and_not_mixed(pico, tmp_path, monkeypatch):
    from rlsft_nb import products as room
    sent, real = [], room._sent
    monkeypatch.setattr(room, '_sent', lambda *a, **k: sent.append(1) or real(*a, **k))
    other = small(pico, updates=1, products='onednn')
    first = train_ppo(other, str(pico['qwen2']), tmp_path/'a', 1)
    assert sent and first['log'][0].keys() == train_ppo(other, str(pico['qwen2']), tmp_path/'b', 1)['log'][0].keys()
    assert same(weights(tmp_path/'a'/'policy'), weights(tmp_path/'b'/'policy'))
    assert rl_settings(other)['products'] == 'onednn' and rl_of(other, 1).key != rl_of(small(pico, updates=1), 1).key
    (tmp_path/'a'/'trained.json').unlink()
    with pytest.raises(ParamError, match='products'): train_ppo(small(pico, updates=1), str(pico['qwen2']), tmp_path/'a', 1)
    n = len(sent)
    train_ppo(small(pico, updates=1), str(pico['qwen2']), tmp_path/'c', 1)
    assert len(sent) == n

def test_a_processor_that_rounds_is_refused(monkeypatch):
    from rlsft_nb import products as room
    monkeypatch.setattr(room, 'keeps_fp32', lambda: False)
    with pytest.raises(ParamError, match="ppo.products='onednn': on this processor oneDNN is missing or rounds factors to bf16, expected 'torch'"): check_ppo(load_params('tiny', dict(ppo=dict(products='onednn'))))

# several processes

class Scripted: # answers that depend on the prompt alone
    def __init__(self, *args): pass
    def __call__(self, prompts): return [[sum(p)*(k + 7) % 400 for k in range(1 + sum(p) % 4)] for p in prompts]

RANKS = '''
import faulthandler, json, sys, torch
faulthandler.dump_traceback_later(150) # where it hangs, if it hangs
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from rlsft_nb import actor_critic, ppo, ppo_run
from rlsft_nb.parameters import load_params
from test_ppo import Scripted
torch.set_num_threads(1)
kind, over, start, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
acc = ppo_run.accelerator(load_params("tiny", over))
if kind == "fsdp2": # accelerate itself never shards on CPU
    acc.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT")
    PartialState._shared_state["distributed_type"] = acc.state.distributed_type = DistributedType.FSDP
assert acc.num_processes == 2
def train(name, engine="hf", **more):
    acc.free_memory()
    ppo.train_ppo(load_params("tiny", over | dict(ppo=over["ppo"] | more, launch=dict(engine=engine))), start, f"{folder}/{name}", 1, acc)
train("whole")
learn = ppo.play_and_learn
def stop(*args, **more):
    if args[-1] == 2: raise KeyboardInterrupt
    return learn(*args, **more)
ppo.play_and_learn = stop
try: train("again")
except KeyboardInterrupt: pass
ppo.play_and_learn = learn
train("again")
import test_vllm
test_vllm.stand_in(lambda x, name, value, raising=True: setattr(x, name, value))
train("played", "vllm") # not in a folder vllm: this script's place is on Python's path, where it would be found as a package
assert len(test_vllm.vllm._kept) == 1 # not closed: with vLLM would go the group
json.dump(test_vllm.LLM.made[0].synced, open(f"{folder}/synced-{acc.process_index}.json", "w"))
ppo_run.Player = Scripted
train("scripted", updates=1, batch=8)
actor_critic.LOGITS = (500*3, 2**26)[acc.process_index] # many chunks of logits on one process, one on the other
train("uneven", updates=1, batch=8)
acc.end_training()
'''

@pytest.mark.parametrize('kind', ['fsdp2', 'ddp'])
def test_two_processes_stay_in_step_resume_and_do_what_one_does(pico, tmp_path, kind, env, monkeypatch):
    over = dict(model=dict(source='folder', path=str(pico['qwen2'])), ppo=PPO | dict(updates=2), eval=dict(max_new_tokens=5), game=dict(attempts=3))
    (tmp_path/'ranks.py').write_text(RANKS)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([os.path.dirname(__file__), str(ROOT)]))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc_per_node', '2', str(tmp_path/'ranks.py'), kind]
    with open(tmp_path/'said', 'w') as f: subprocess.run(['timeout', '300', *launch, json.dumps(over), str(pico['qwen2']), str(tmp_path)], stdin=subprocess.DEVNULL, stdout=f, stderr=f)
    assert (tmp_path/'uneven'/'trained.json').is_file(), (tmp_path/'said').read_text()[-4000:]
    log, again, two = (read_json(tmp_path/name/'trained.json')['log'] for name in ('whole', 'again', 'scripted'))
    assert [l['hands'] for l in log] == [8, 8] and all(math.isfinite(l['grad_norm']) for l in log)
    assert [l['update'] for l in again] == [1, 2] and again[1]['kl'] == log[1]['kl']
    own = read_json(tmp_path/'played'/'trained.json')['log'] # sharded weights came whole, under names that the engine knows
    assert [{k: l[k] for k in ('reward', 'length', 'kl')} for l in own] == [pytest.approx({k: l[k] for k in ('reward', 'length', 'kl')}, rel=1e-3) for l in log] and own[1]['engine'] == 'vllm'
    assert all(sorted(read_json(tmp_path/f'synced-{r}.json')) == sorted([*load_file(pico['qwen2']/'model.safetensors')]*2) for r in (0, 1))
    assert same(weights(tmp_path/'again'/'policy'), weights(tmp_path/'whole'/'policy')) and not same(weights(tmp_path/'whole'/'policy'), weights(pico['qwen2']))
    monkeypatch.setattr(ppo_run, 'Player', Scripted)
    one = train_ppo(load_params('tiny', over | dict(ppo=over['ppo'] | dict(updates=1, batch=8))), str(pico['qwen2']), tmp_path/'one', 1)['log']
    uneven = read_json(tmp_path/'uneven'/'trained.json')['log']
    for k in ('reward', 'turns', 'length', 'policy_loss', 'value_loss', 'kl', 'grad_norm', 'explained'): assert one[0][k] == pytest.approx(two[0][k], rel=1e-3) and uneven[0][k] == pytest.approx(two[0][k], rel=1e-4), k
    assert one[0]['kl'] > 1e-6 # the second epoch saw a policy that had moved
    a, b = weights(tmp_path/'one'/'policy'), weights(tmp_path/'scripted'/'policy')
    assert all((a[n] - b[n]).abs().max() < 1e-4 for n in a)

def test_the_command_line(pico, capsys):
    got = subprocess.run([sys.executable, '-m', 'rlsft_nb.ppo', '--model', 'tinny'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert got.returncode == 1 and "did you mean 'tiny'" in got.stderr and 'Traceback' not in got.stderr
    over = json.dumps(dict(model=dict(source='folder', path=str(pico['qwen2'])), sft=dict(steps=2, checkpoints=[1, 2], hands=8, batch=4, save_every=2), ppo=PPO | dict(updates=1), eval=dict(max_new_tokens=4), game=dict(attempts=2)))
    run = lambda *args: (main(['--overrides', over, *args]), *capsys.readouterr())
    code, out, _ = run()
    assert code == 0 and out.strip().endswith('policy') and weights(out.strip())
    code, _, err = run('--start', '7')
    assert code == 1 and 'start=7: SFT kept the steps [0, 1, 2]' in err

def test_progress_is_told_to_the_runner(pico, tmp_path, monkeypatch):
    monkeypatch.setenv('RLSFT_WATCH', str(tmp_path))
    train_ppo(small(pico, updates=2), str(pico['qwen2']), tmp_path/'run')
    lines = [l for l in (tmp_path/'progress').read_text().splitlines() if l.startswith('ppo')]
    assert len(lines) == 2 and re.fullmatch(r'ppo qwen2: 2/2, first 0\.\d{3}, within 0\.\d{3}, kl \d\.\d{3}, clipped [01]\.\d{3}', lines[1])

# sweep and verdicts

def test_the_sweep_is_cached_and_complete(pico):
    cfg_over = dict(model=dict(source='folder', path=str(pico['qwen2'])), ppo=PPO | dict(updates=1), eval=dict(max_new_tokens=4, hands=6, val_hands=4), game=dict(attempts=2), workers=1,
                    sft=dict(steps=4, checkpoints=[1, 2, 3, 4], hands=8, batch=4, save_every=4, warmup=1, loss_hands=4))
    cfg = load_params('tiny', cfg_over)
    sweep = sweep_stage(cfg)
    r = sweep.results()
    assert [q['step'] for q in r['points']] == starts(curve_stage(cfg).results(), 1) and r['points'][-1]['step'] == 4
    assert all(q['after']['OOD']['n'] == 6 and len(q['log']) == 1 for q in r['points'])
    assert score_stage(cfg, 4).results() == r['points'][-1]['after']
    assert rl_stage(load_params('tiny', cfg_over | dict(ppo=cfg_over['ppo'] | dict(sweep_seeds=0, between=2))), 4).key == rl_stage(cfg, 4).key
    assert named_with_rl(cfg)['rl'] == str(policy(cfg, 4)) and same(weights(named_with_rl(cfg)['rl']), weights(rl_stage(cfg, 4).path/'policy'))
    start = time.perf_counter()
    assert sweep_stage(cfg).results() == r and time.perf_counter() - start < 5
    assert len(sweep_rows(r, clusters(cfg))) == len(r['points'])

def record(rate, n=200): return dict(n=n, hits='1'*int(rate*n) + '0'*(n - int(rate*n)), first=dict(rate=rate, lo=0., hi=1.), within=dict(rate=rate, lo=0., hi=1.))
def cell(ood, i=.5): return dict(OOD=record(ood), ID=record(i))

def told(before, after, peak, ids=(.5, .5)):
    points = [dict(step=k, before=cell(b, ids[0]), after=cell(a, ids[1])) for k, (b, a) in enumerate(zip(before, after))]
    scores = dict(peak=dict(within=cell(before[peak])), end=dict(within=points[-1]['before']), rl=dict(within=points[-1]['after']))
    return [r['verdict'] for r in verdicts(scores, dict(points=points), peak, dict(ID=range(200), OOD=range(200)))]

def test_verdicts_follow_their_thresholds():
    assert told((.3, .5, .4, .2, .1, .05), (.45, .75, .6, .3, .15, .14), 1, (.6, .4)) == ['holds']*5
    assert told((.3, .5, .4, .2, .1, .05), (.1, .02, .05, .2, .6, .04), 1, (.4, .6))[0] == 'within noise'
    assert told((.1, .5, .4, .3, .2, .15), (.5, .1, .2, .3, .4, .49), 1, (.4, .6)) == ['holds', 'within noise', 'fails', 'fails', 'fails']

def test_without_a_sweep_the_verdicts_that_need_it_name_the_command():
    scores = dict(peak=dict(within=cell(.5)), end=dict(within=cell(.1, .6)), rl=dict(within=cell(.4, .4)))
    rows = verdicts(scores, None, 1, dict(ID=range(200), OOD=range(200)), sweep_command('tiny', 3))
    assert [r['verdict'] for r in rows] == ['holds', 'holds', 'not run', 'holds', 'not run']
    assert rows[2]['here'] == "Run: papermill nbs/03_ppo.ipynb -p model tiny -p seed 3 -y 'overrides: {ppo: {sweep_seeds: 4}}'"
