"The game in other people's frameworks: each form is played in its framework, by a scripted player and by a model."
import hashlib, json, os, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from rlsft_nb.places import ROOT
from rlsft_nb.envs import CONFIGS, SPLITS, PointsEnv, export, export_main, multi_turn, register_general_points, rows
from rlsft_nb.game import answer, feedback_turn, hands, multisets, prompt, solve, values, verify

pytestmark = pytest.mark.filterwarnings('ignore') # TRL calls both of its roads experimental
RIGHT = lambda cards, rule='10': answer(cards, rule, solve(values(cards, rule))[0])
cards_of = lambda text: json.loads(re.findall(r'Cards: (\[.*?\])', text)[-1])

# Rows

@pytest.mark.parametrize('part', [*SPLITS])
@pytest.mark.parametrize('rule,face', CONFIGS.values())
def test_rows(part, rule, face):
    got = rows(part, rule, face, n=40)
    assert got == rows(part, rule, face, n=40) and len({tuple(r['cards']) for r in got}) == len(got)
    for r in got:
        assert r['prompt'] == prompt(r['cards'], rule) and (r['rule'], r['target']) == (rule, 24)
        assert not face or {*r['cards']} & {'J', 'Q', 'K'}
        assert part == 'authors' or tuple(sorted(values(r['cards'], rule))) in multisets(part)

def test_rows_of_other_rules_and_targets():
    assert rows('test', (10, 10, 10), n=3) == [r | dict(rule='10-10-10') for r in rows('test', n=3)]
    for r in rows('kept', '7-8-9', n=20, target=20):
        assert solve(values(r['cards'], '7-8-9'), 20) and r['target'] == 20 and 'equals 20' in r['prompt'][0]['content']
    for bad, said in ((dict(part='all'), 'expected one of'), (dict(n=0), 'n=0'), (dict(part='test', n=5000), 'n=5000'), (dict(rule='x'), 'rule=')):
        with pytest.raises((ValueError, KeyError), match=said): rows(**bad)

# TRL

def scripted(cls, config, say):
    "A model whose `generate` says what `say(text so far)` returns; its weights are real and trained."
    import torch
    class Scripted(cls):
        def generate(self, input_ids, attention_mask, **_):
            said = [self.tok(say(self.tok.decode(ids[m.bool()])), add_special_tokens=False)['input_ids'] + [self.tok.eos_token_id] for ids, m in zip(input_ids, attention_mask)]
            wide = max(map(len, said))
            return torch.cat([input_ids, torch.tensor([s + [self.tok.pad_token_id]*(wide - len(s)) for s in said])], 1)
    torch.manual_seed(0)
    return Scripted(config)

def pico_lm(tok, say):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    lm = scripted(Qwen2ForCausalLM, Qwen2Config(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                  max_position_embeddings=4096, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None), say)
    lm.tok = tok
    return lm

def grpo(tmp_path, lm, tok, data, steps=1, **how):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    args = dict(max_steps=steps, num_generations=2, per_device_train_batch_size=4, max_completion_length=600, bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1,
                save_strategy='no', report_to='none', disable_tqdm=True, learning_rate=1e-2, shuffle_dataset=False) | how.pop('args', {})
    t = GRPOTrainer(lm, args=GRPOConfig(str(tmp_path), **args), train_dataset=Dataset.from_list(data), processing_class=tok, **how)
    t.train()
    return [h for h in t.state.log_history if 'reward' in h]

def spied(how): # `multi_turn`, and what its rollouts returned
    seen, play = [], how['rollout_func']
    def rollout_func(prompts, trainer): seen.append((prompts, play(prompts, trainer))); return seen[-1][1]
    return how | dict(rollout_func=rollout_func), seen

def test_multi_turn_scripted(tmp_path):
    from rlsft_nb.tiny import make_tokenizer
    tok, data = make_tokenizer(), rows('test', n=1) + rows('test', '11-12-13', n=2)[1:]
    tries = []
    def say(text): # solved at the third attempt under the rule 10, never under the other
        tries.append(text.count('This attempt failed'))
        return RIGHT(cards_of(text)) if '"J" as 10' in text and tries[-1] == 2 else 'no idea'
    how, seen = spied(multi_turn(data, attempts=3))
    log = grpo(tmp_path, pico_lm(tok, say), tok, data, **how)
    assert log[0]['reward'] == 1. and sorted(tries) == [0]*4 + [1]*4 + [2]*4 # (5 + 5 - 3 - 3)/4
    (asked, out), = seen
    assert out['points'] == [5., 5., -3., -3.] and out['logprobs'] is None
    for p, ids, more, mask in zip(asked, out['prompt_ids'], out['completion_ids'], out['env_mask']):
        chat = tok.decode(ids + more)
        assert ids == tok.apply_chat_template(p, add_generation_prompt=True, return_dict=False) and len(mask) == len(more)
        heard = tok.decode([i for i, m in zip(more, mask) if m])
        assert heard.count('<|end|>') == 3 and 'This attempt failed' not in heard and '<|user|>' not in heard
        said = [dict(role='assistant', content='no idea'), feedback_turn(verify('no idea', ['A']*4))]*2
        last = RIGHT(cards_of(chat)) if out['points'][asked.index(p)] == 5. else 'no idea'
        assert chat == tok.apply_chat_template(p + said + [dict(role='assistant', content=last)], tokenize=False)

def test_multi_turn_logprobs_line_up():
    "Where the trainer has log-probabilities of what it sampled (vLLM), feedback counts none."
    from types import SimpleNamespace
    from rlsft_nb.tiny import make_tokenizer
    tok = make_tokenizer()
    data, no = rows('test', n=1), tok('no', add_special_tokens=False)['input_ids'] + [tok.eos_token_id]
    lm = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=tok.eos_token_id))
    trainer = SimpleNamespace(processing_class=tok, model=lm, accelerator=SimpleNamespace(unwrap_model=lambda m: m, num_processes=1), _generate_single_turn=lambda ids, *_: ([no]*len(ids), [[-1.]*len(no)]*len(ids)))
    out = multi_turn(data, attempts=3)['rollout_func']([data[0]['prompt']]*2, trainer)
    for ids, mask, logp in zip(out['completion_ids'], out['env_mask'], out['logprobs']):
        assert len(ids) == len(mask) == len(logp) and [-float(m) for m in mask] == logp and sum(mask) == 3*len(no)

def test_multi_turn_refuses():
    with pytest.raises(ValueError, match='attempts=0'): multi_turn([], attempts=0)
    r = rows('test', n=1)[0]
    with pytest.raises(KeyError, match='no column cards'): multi_turn([dict(prompt=r['prompt'])])
    with pytest.raises(ValueError, match='expected a chat'): multi_turn([r | dict(prompt=r['prompt'][0]['content'])])
    with pytest.raises(ValueError, match='is no prompt of the rows'): multi_turn([r])['rollout_func']([[dict(role='user', content='another')]], None)

def test_multi_turn_tiny_learns(tmp_path):
    "The embedded model: from the base every reward is -3."
    from rlsft_nb.models import load_lm
    lm, tok = load_lm('tiny')
    data = rows('rl', n=2)[:2]
    log = grpo(tmp_path, lm, tok, data, args=dict(max_completion_length=48), **multi_turn(data, attempts=2))
    assert log[0]['reward'] == -3. and log[0]['reward_std'] == 0.

@pytest.fixture(scope='module')
def qwen(): # a tokenizer whose template renders tool calls, as Qwen 3's does
    import trl
    from rlsft_nb.tiny import make_tokenizer
    tok = make_tokenizer()
    tok.chat_template = (Path(trl.__file__).parent/'chat_templates'/'qwen3.jinja').read_text()
    tok.add_special_tokens(dict(eos_token='<|im_end|>', additional_special_tokens=['<|im_start|>']))
    return tok

call = lambda cards, formula: '<tool_call>\n' + json.dumps(dict(name='answer', arguments=dict(cards=cards, number=values(cards, '10'), formula=formula))) + '\n</tool_call>'

def test_environment_factory(tmp_path, qwen):
    "TRL renders the tool, parses the calls, runs them and asks for the reward."
    data, told = [dict(prompt=[dict(role='user', content='')], cards=h, rule='10', target=24) for h in hands('test', n=2)], []
    one, two = (r['cards'] for r in data)
    def say(text): # the first hand at the second attempt; the second never calls the tool
        told.append(text)
        cards = cards_of(text.rpartition('<|im_start|>user')[2].partition('<|im_end|>')[0]) if '<tool_response>' not in text else one
        if cards == two: return 'I do not know.'
        if 'Correct.' in text: return 'Done.'
        return call(one, solve(values(one, '10'))[0] + '=24' if 'This attempt failed' in text else '1+1=24')
    log = grpo(tmp_path, pico_lm(qwen, say), qwen, data, environment_factory=PointsEnv)
    assert log[0]['reward'] == 1. and log[0]['rewards/PointsEnv/mean'] == 1. # (5 + 5 - 3 - 3)/4
    assert log[0]['tools/call_frequency'] == 1. and log[0]['tools/failure_frequency'] == 0.
    assert '"name": "answer"' in told[0] and all(n not in told[0] for n in ('get_reward', '"reset"')), 'other methods are no tools'
    assert any('these numbers are not on the cards' in t for t in told) and any('Correct.' in t for t in told)

def test_environment_factory_needs_tool_calls(tmp_path):
    from rlsft_nb.models import load_lm
    lm, tok = load_lm('tiny')
    with pytest.raises(ValueError, match='does not support tool calling'): grpo(tmp_path, lm, tok, rows('test', n=1), environment_factory=PointsEnv)

def test_points_env():
    public = {n for n in vars(PointsEnv) if not n.startswith('_')}
    assert public == {'reset', 'answer', 'get_reward'}
    e, cards = PointsEnv(attempts=2, feedback='outcome'), ['4', '4', '3', '6']
    with pytest.raises(KeyError, match='no cards'): e.reset(prompt='x')
    assert e.reset(cards=cards, rule=None, target=None, other=1) == prompt(cards)[0]['content'] and e.get_reward() == -3.
    assert e.reset(cards=cards, prompt=prompt(cards)) is None
    assert e.reset(cards=cards, prompt=[dict(role='user', content=[dict(type='text', text=prompt(cards)[0]['content'])])]) is None
    assert e.answer(cards, [4, 4, 3, 6], '1+1') == 'This attempt failed: the numbers do not match the cards. Try again.' and e.get_reward() == -4.
    e.answer(cards, [4, 4, 3, 6], 24)
    assert e.get_reward() == -3. and e.answer(cards, [4, 4, 3, 6], '4*6*(4-3)=24') == 'The hand is over.' and e.get_reward() == -3.
    e.reset(cards=cards)
    assert e.get_reward() == -3. and e.answer(cards, [4, 4, 3, 6], '4*6*(4-3)=24') == 'Correct.' and e.get_reward() == 5.
    e.reset(cards=['K', 'Q', '2', 'A'], rule='11-12-13', target=26)
    assert e.answer(['K', 'Q', '2', 'A'], [13, 12, 2, 1], '13+12+2-1=26') == 'Correct.'
    for bad in (dict(attempts=0), dict(feedback='all')):
        with pytest.raises(ValueError, match='expected'): PointsEnv(**bad)

# verifiers

class Players(BaseHTTPRequestHandler):
    "An OpenAI-compatible endpoint; the model's name says how it plays."
    def log_message(self, *_): pass
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        chat, name = body['messages'], body['model']
        text = self.server.play(name, chat)
        out = json.dumps(dict(id='1', object='chat.completion', created=0, model=name, usage=dict(prompt_tokens=1, completion_tokens=1, total_tokens=2),
                              choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))])).encode()
        self.send_response(200)
        for k, v in (('Content-Type', 'application/json'), ('Content-Length', str(len(out)))): self.send_header(k, v)
        self.end_headers(); self.wfile.write(out)

@pytest.fixture
def endpoint():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Players)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown(); s.server_close()

def vf_eval(tmp_path, endpoint, model, *more):
    "The traces of `vf-eval points24`."
    pytest.importorskip('verifiers.v1', reason='the extra [verifiers] is not installed')
    run = [str(Path(sys.executable).with_name('vf-eval')), 'points24', '-m', model, '--client.base-url', f'http://127.0.0.1:{endpoint.server_port}/v1', '--no-push', '--no-rich', '-o', str(tmp_path), '--run.dir', 'run', *more]
    env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()} | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    r = subprocess.run(run, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert r.returncode == 0, r.stderr[-2000:]
    lines = [json.loads(l) for l in (tmp_path/'run'/'traces.jsonl').read_text().splitlines()]
    return [t for l in lines for t in l.get('traces', [l])]

score = lambda t: t['rewards']['points']['score']

def test_verifiers_scripted(tmp_path, endpoint):
    first = cards_of(rows('test', '11-12-13', n=1)[0]['prompt'][0]['content'])
    def play(name, chat): # the first hand at once, the others at the third attempt
        cards, tried = cards_of(chat[0]['content']), sum(m['role'] == 'assistant' for m in chat)
        return RIGHT(cards, '11-12-13') if cards == first or tried == 2 else 'no idea'
    endpoint.play = play
    got = vf_eval(tmp_path, endpoint, 'scripted', '-n', '4', '--env.taskset.rule', '11-12-13')
    assert [score(t) for t in got] == [5.]*4 and all(t['ok'] for t in got)
    by = sorted((t['task']['data']['idx'], t['metrics']) for t in got)
    assert [m for _, m in by] == [dict(attempts=1., first=1., solved=1.)] + [dict(attempts=3., first=0., solved=1.)]*3
    said = [n['message']['content'] for n in next(t for t in got if t['task']['data']['idx'] == 1)['nodes']]
    assert said[2] == said[4] == 'This attempt failed: no formula was found. Try again.'

def test_verifiers_attempts(tmp_path, endpoint):
    endpoint.play = lambda name, chat: '{"formula": "1+1=24"}'
    got = vf_eval(tmp_path, endpoint, 'wrong', '-n', '2', '--env.attempts', '2', '--env.feedback', 'outcome', '--env.taskset.part', 'rl', '--env.taskset.hands', '5')
    assert [(score(t), t['metrics']) for t in got] == [(-4., dict(attempts=2., first=0., solved=0.))]*2
    assert got[0]['nodes'][2]['message']['content'] == 'This attempt failed: the numbers do not match the cards. Try again.'

def test_verifiers_limits_and_failures(tmp_path, endpoint):
    "A limit of the run ends the hand, which is scored; a model that cannot be reached is an error, not an answer."
    endpoint.play = lambda name, chat: 'no idea'
    (t,) = vf_eval(tmp_path/'a', endpoint, 'm', '-n', '1', '--env.agent.max-turns', '2', '--env.taskset.system-prompt', str(ROOT/'LICENSE'))
    assert t['ok'] and t['stop_condition'] == 'max_turns' and t['metrics']['attempts'] == 2. and t['nodes'][0]['message']['role'] == 'system'
    endpoint.play = lambda name, chat: 1/0
    (t,) = vf_eval(tmp_path/'b', endpoint, 'm', '-n', '1')
    assert not t['ok'] and t['errors'] and not t['rewards'].get('points')

def test_verifiers_tiny(tmp_path, endpoint):
    "The embedded model, served."
    from rlsft_nb.generation import generate
    from rlsft_nb.models import load_lm
    pytest.importorskip('verifiers.v1', reason='the extra [verifiers] is not installed')
    lm, tok = load_lm('tiny')
    lock = threading.Lock()
    def play(name, chat):
        with lock: return generate(lm, tok, [[dict(role=m['role'], content=m['content']) for m in chat]])[0]
    endpoint.play = play
    got = vf_eval(tmp_path, endpoint, 'tiny', '-n', '2', '--env.attempts', '2')
    assert [score(t) for t in got] == [-3.]*2 and all(t['ok'] for t in got)

# reasoning-gym

@pytest.fixture
def gym():
    r = pytest.importorskip('reasoning_gym', reason='the extra [reasoning-gym] is not installed')
    register_general_points()
    return r

@pytest.mark.parametrize('how', [dict(), dict(rule='11-12-13', face=True), dict(target=20), dict(part='test'), dict(rule='7-8-9', part='rl')])
def test_reasoning_gym(gym, how):
    data, again = (gym.create_dataset('general_points', seed=3, size=12, **how) for _ in range(2))
    assert [*data] == [*again] and len(data) == 12 and data[5] == [*data][5]
    assert gym.create_dataset('general_points', seed=4, size=12, **how)[0] != data[0]
    score = gym.get_score_answer_fn('general_points')
    for x in data:
        m = x['metadata']
        assert m['source_dataset'] == 'general_points' and m['numbers'] == values(m['cards'], m['rule']) and x['question'] == prompt(m['cards'], m['rule'], m['target'])[0]['content']
        assert how.get('part') is None or tuple(sorted(m['numbers'])) in multisets(how['part'])
        assert data.score_answer(x['answer'], x) == score(f"Well: {x['answer']}", x) == 1.
        for wrong in (None, '', 'no idea', 24, answer(m['cards'], m['rule'], '4*6', m['target']), answer(m['cards'], m['rule'], '+'.join(map(str, m['numbers'])) + '+0', m['target'])):
            assert data.score_answer(wrong, x) == 0.

def test_reasoning_gym_among_others(gym):
    "Registered once, mixed with its own, and without what fools its own `puzzle24`."
    assert register_general_points() is register_general_points()
    from reasoning_gym.composite import DatasetSpec
    mix = gym.create_dataset('composite', seed=0, size=20, datasets=[DatasetSpec('general_points', weight=1, config=dict(rule='11-12-13')), DatasetSpec('chain_sum', weight=1, config={})])
    kinds = [x['metadata']['source_dataset'] for x in mix]
    assert {*kinds} == {'general_points', 'chain_sum'} and all(mix.score_answer(x['answer'], x) == 1. for x in mix)
    theirs, ours = gym.create_dataset('puzzle24', seed=0, size=1), gym.create_dataset('general_points', seed=0, size=1)
    assert theirs.score_answer('1*1*4*6', theirs[0]) == 1. and ours.score_answer('{"formula": "1*1*4*6"}', ours[0]) == 0.
    for bad in (dict(rule='x'), dict(size=0), dict(part='all')):
        with pytest.raises((ValueError, KeyError), match='expected'): gym.create_dataset('general_points', **bad)

def test_reasoning_gym_tiny(gym):
    from rlsft_nb.generation import generate
    from rlsft_nb.models import load_lm
    data = gym.create_dataset('general_points', seed=0, size=4)
    said = generate(*load_lm('tiny'), [[dict(role='user', content=x['question'])] for x in data])
    assert [data.score_answer(s, x) for s, x in zip(said, data)] == [0.]*4

# Export

LOAD = """
import sys
sys.modules['rlsft_nb'] = None # not to be had
from datasets import get_dataset_config_names, load_dataset
folder, cache = sys.argv[1:]
names, plain = get_dataset_config_names(folder), load_dataset(folder, cache_dir=cache)
ood = load_dataset(folder, 'ood', split='test', cache_dir=cache)
rows = [dict(r) for r in ood.select(range(3))]
import json; print(json.dumps(dict(names=names, splits={k: len(v) for k, v in plain.items()}, rows=rows, columns=ood.column_names)))
"""

def load(folder, tmp_path): # in a process that cannot import this package
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'hf'))
    r = subprocess.run([sys.executable, '-c', LOAD, str(folder), str(tmp_path/'cache')], env=env, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1])

files = lambda d: {str(f.relative_to(d)): f.read_bytes() for f in sorted(Path(d).rglob('*')) if f.is_file()}

def test_gymnasium_tiny():
    "Two environments at once, played by the embedded model: rewards are the verifier's."
    import gymnasium
    from rlsft_nb.game import verify
    from rlsft_nb.generation import generate
    from rlsft_nb.models import load_lm
    (lm, tok), hand = load_lm('tiny:end'), ['4', '4', '3', '6']
    env = gymnasium.make_vec('rlsft_nb/GeneralPoints-v0', num_envs=2, vectorization_mode='sync', hands=[hand], attempts=2)
    asked, _ = env.reset(seed=0)
    said = generate(lm, tok, [[dict(role='user', content=q)] for q in asked], max_new_tokens=48, temperature=1., seed=3)
    _, reward, *_ = env.step(tuple(said))
    assert reward.tolist() == [verify(a, hand).reward for a in said] and any('formula' in a for a in said)
    env.close()

def test_export(tmp_path):
    out = export(tmp_path/'points', deals=60)
    got = load(out, tmp_path)
    assert got['names'] == ['id', 'ood'] and list(got['splits']) == list(SPLITS)
    assert {k: got['splits'][k] for k in ('val', 'test', 'kept', 'authors')} == {k: len(hands(k)) for k in ('val', 'test', 'kept', 'authors')} and 50 < got['splits']['sft'] <= 60
    assert got['columns'] == ['prompt', 'completion', 'cards', 'numbers', 'rule', 'target', 'solutions']
    for r, h in zip(got['rows'], hands('test', '11-12-13', face=True)):
        assert r['cards'] == h and r['prompt'] == prompt(h, '11-12-13') and r['numbers'] == values(h, '11-12-13') and (r['rule'], r['target']) == ('11-12-13', 24)
        assert r['solutions'] == solve(r['numbers']) and verify(r['completion'][0]['content'], h, '11-12-13').reward == 5.
    card = (out/'README.md').read_text()
    for name, data in files(out).items(): assert name == 'README.md' or (f'`{name}`' in card and hashlib.sha256(data).hexdigest() in card)
    import yaml
    front = yaml.safe_load(card.split('---\n')[1])
    assert front['license'] == 'apache-2.0' and [c['config_name'] for c in front['configs']] == ['id', 'ood']
    assert {f['path'] for c in front['configs'] for f in c['data_files']} == {*files(out)} - {'README.md'}

def test_exported_parts_share_no_numbers(tmp_path):
    import pyarrow.parquet as pq
    out = export(tmp_path/'points', splits=['sft', 'rl', 'val', 'test', 'kept'], deals=300, solutions=1)
    seen = {}
    for f in sorted(out.rglob('*.parquet')):
        for r in pq.read_table(f).to_pylist(): assert seen.setdefault(tuple(sorted(r['numbers'])), f.stem) == f.stem and len(r['solutions']) == 1

def test_same_bytes(tmp_path):
    how = dict(splits=['rl', 'kept'], deals=40, solutions=2, seed=1)
    a, b, c = export(tmp_path/'a', **how), tmp_path/'deep'/'b', export(tmp_path/'c', **how | dict(seed=2))
    run = [sys.executable, '-m', 'rlsft_nb.envs', '--out', str(b), '--splits', 'rl', 'kept', '--deals', '40', '--solutions', '2', '--seed', '1']
    r = subprocess.run(run, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0 and r.stdout.splitlines() == [str(b)], r.stderr
    assert files(a) == files(b) != files(c)

def test_export_refuses(tmp_path, capsys):
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'mine').write_text('x'); (tmp_path/'file').write_text('x'); (tmp_path/'empty').mkdir()
    new = tmp_path/'new'
    for code, out, more, said in ((1, tmp_path/'full', [], 'not an empty folder'), (1, tmp_path/'file', [], 'not an empty folder'), (1, tmp_path/'file'/'below', ['--splits', 'kept'], 'cannot'),
                                  (2, new, ['--splits', 'tset'], "'tset'"), (2, new, ['--deals', '0'], 'deals=0'), (2, new, ['--solutions', '-1'], 'solutions=-1'), (2, new, ['--rules', 'x'], "rule='x'"),
                                  (2, new, ['--rules', '7', '--splits', 'authors'], 'none of them'), (2, new, ['--target', '-3'], '-3')):
        assert export_main(['--out', str(out), *more]) == code
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1, err
    assert {p.name for p in tmp_path.iterdir()} == {'full', 'file', 'empty'} and files(tmp_path) == {'full/mine': b'x', 'file': b'x'}
    assert export_main(['--out', str(tmp_path/'empty'), '--splits', 'kept', '--rules', '10', '1-2-3', '--target', '20', '--deals', '10']) == 0
    assert set(files(tmp_path/'empty')) == {'README.md', 'rule-10-10-10/kept.parquet', 'rule-1-2-3/kept.parquet'}
    assert export(tmp_path/'one', '7', 'kept', deals=5, target=20).name == 'one'

def test_export_says(tmp_path, capsys):
    how = ['--splits', 'kept', '--rules', '10']
    assert export_main(['--out', str(tmp_path/'a'), *how, '--quiet']) == 0 and capsys.readouterr() == ('', '')
    assert export_main(['--out', str(tmp_path/'b'), *how, '--json']) == 0
    told = json.loads(capsys.readouterr().out)
    assert told['out'] == str(tmp_path/'b') and told['files'] == {k: hashlib.sha256(v).hexdigest() for k, v in files(tmp_path/'a').items()}

def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    write = Path.write_bytes
    def full(self, data):
        if self.name == 'README.md': raise OSError(28, 'No space left on device')
        return write(self, data)
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'): export(tmp_path/'x', splits=['kept'])
    assert not list(tmp_path.iterdir())
