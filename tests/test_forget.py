"The card of a tuned model: every number against a second way to get it, every kind of source, and what is refused."
import copy, json, subprocess, sys
from pathlib import Path
import numpy as np, pytest, scipy.linalg, scipy.special, torch
from safetensors.torch import load_file, save_file
from rlsft_nb import divergence, forget as room, forget_page
from rlsft_nb.places import shipped
from rlsft_nb.problems import ParamError, Problem, CheckpointError
from rlsft_nb.divergence import *
from rlsft_nb.forget import *
from rlsft_nb.intervals import resampled
from rlsft_nb.texts import *
from rlsft_nb.tiny import Corpus, make_tokenizer
from rlsft_nb.weights import Checkpoint
from test_checkpoints import ab, build, lora

TOK = make_tokenizer()

def save(lm, folder, tok=TOK, **how):
    lm.save_pretrained(folder, **how); tok.save_pretrained(folder)
    return str(folder)

def noisy(lm, size=.02, seed=3):
    new, g = copy.deepcopy(lm), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in new.parameters(): p.add_(size*torch.randn(p.shape, generator=g))
    return new

def pair(tmp_path, kind='llama', **more):
    lm = build(kind, vocab_size=len(TOK), **more)
    new = noisy(lm)
    return lm, new, save(lm, tmp_path/'base'), save(new, tmp_path/'tuned')

SMALL = dict(most=6, matrices='layers.0.*', draws=2)
DOCS = Texts('toy', {}, [dict(text=t) for t in ('Make 24 of 3 3 8 8.', 'with 12 and 7', 'abc', 'one more line of text', 'x + y', '(8*3)')])

def by_hand(lm, new, texts):
    "KL both ways, losses and changed tokens a text, from whole models, by scipy."
    rows = []
    for ids, labels in texts:
        z = [m(input_ids=torch.tensor([ids])).logits[0].detach().double().numpy() for m in (lm.eval(), new.eval())]
        p, q = (scipy.special.softmax(x, -1) for x in z)
        at = [i for i, l in enumerate(labels) if l != -100]
        kl = lambda a, b: sum(scipy.special.rel_entr(a[i - 1], b[i - 1]).sum() for i in at)
        rows.append([len(at), kl(p, q), kl(q, p), *(-sum(np.log(a[i - 1][labels[i]]) for i in at) for a in (p, q)), sum(z[0][i - 1].argmax() != z[1][i - 1].argmax() for i in at)])
    return np.array(rows)

# divergences

@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'gpt2', 'gemma2', 'cohere', 'mixtral', 'opt', 'mamba', 'llama4_text', 'mllama'])
@pytest.mark.parametrize('elements', [1, 1500, 2**21])
def test_against_whole_models(kind, elements, tmp_path, monkeypatch):
    "Whatever is done after the head (a cap, a scale), and however few positions are made at a time."
    monkeypatch.setattr(divergence, 'ELEMENTS', elements)
    lm = build(kind) if kind == 'mllama' else build(kind, vocab_size=300)
    V, g = lm.config.get_text_config().vocab_size, torch.Generator().manual_seed(1)
    new = noisy(lm)
    texts = [(ids, [-100] + [l if j % 3 else -100 for j, l in enumerate(ids[1:])]) for n in (2, 9, 31) for ids in [torch.randint(3, V, (n,), generator=g).tolist()]]
    texts[0] = (texts[0][0], [-100, texts[0][0][1]])
    want = by_hand(lm, new, texts)
    got = measure_texts(HiddenStates(Parts(copy.deepcopy(lm).eval()), texts, tmp_path), Parts(new), texts)
    assert np.allclose(got, want, rtol=2e-3, atol=1e-5), (got, want)
    assert got[:, 0].tolist() == want[:, 0].tolist() and got[:, 5].tolist() == want[:, 5].tolist()

def test_small_kl_is_no_rounding():
    "The plain sum in fp32 is noise where the update is that of a few RL steps."
    g = torch.Generator().manual_seed(0)
    z = 5*torch.randn(20, 5000, generator=g).double()
    for size in (1e-3, 1e-5, 1e-7):
        d = size*torch.randn(20, 5000, generator=g).double()
        p = z.softmax(-1)
        second = .5*((p*d**2).sum(-1) - (p*d).sum(-1)**2) # the second order of KL in d
        got = divergences(z, z + d, torch.zeros(20, dtype=torch.long))[:, 0]
        assert torch.allclose(got, second, rtol=max(20*size, 1e-6)), size

def test_kl_is_never_negative_and_infinite_where_it_is():
    g = torch.Generator().manual_seed(0)
    z, w = 300*torch.randn(50, 200, generator=g), 300*torch.randn(50, 200, generator=g)
    got = divergences(z, w, torch.zeros(50, dtype=torch.long))
    assert got.isfinite().all() and (got[:, :2] >= 0).all()
    a, b = torch.tensor([[0., 0.]]), torch.tensor([[0., -torch.inf]])
    assert divergences(a, b, torch.tensor([0]))[0, :2].tolist() == [torch.inf, pytest.approx(np.log(2))]

def test_logits_that_need_more_than_the_hidden_state():
    lm = build('llama', vocab_size=300)
    own = lm.forward
    class Odd(type(lm)):
        def forward(self, input_ids=None, **k):
            out = super().forward(input_ids=input_ids, **k)
            out.logits = out.logits + input_ids[..., None][:, -out.logits.shape[1]:]*torch.arange(300)
            return out
    lm.__class__ = Odd
    with pytest.raises(CutError, match='do not follow from its last hidden state'): Parts(lm).hidden([5, 6, 7])

def test_memory_does_not_grow_with_the_text():
    script = '''
import resource, sys, tempfile, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from rlsft_nb.divergence import *
V, T = 40_000, int(sys.argv[1])
new = lambda: LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096)).eval()
ids = torch.randint(0, V, (T,)).tolist()
peak, texts = (lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024), [(ids, [-100] + ids[1:])]
with tempfile.TemporaryDirectory() as d:
    base, tuned = HiddenStates(Parts(new()), texts, Path(d)), Parts(new())
    tuned.hidden(ids)
    before = peak()
    measure_texts(base, tuned, texts)
    print(peak() - before, chunk_bytes(V), 8*T*V)'''
    for n in (300, 3000): # all logits at once in fp64: 96 and 960 MB, and many times that for the terms
        r = subprocess.run([sys.executable, '-c', script, str(n)], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200)
        assert r.returncode == 0, r.stderr
        took, bound, _ = map(int, r.stdout.split())
        assert took < bound < 420e6, (n, took, bound)

# the whole card

@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'gpt2', 'mixtral'])
def test_card_of_pico_models(kind, tmp_path):
    lm, new, base, tuned = pair(tmp_path, kind)
    found = forget(base, [tuned, base], DOCS, DOCS, **SMALL)
    json.dumps(found, allow_nan=False)
    texts = [p for d in DOCS.docs for p in encoded(TOK, d, 64)]
    total, q = by_hand(lm, new, texts).sum(0), found['cards'][0]['numbers']
    for name in ('new', 'old'):
        got = [q[f'{name}_{n}']['value'] for n in ('forward', 'reverse', 'changed')] + [q[f'{name}_loss'][k] for k in ('before', 'after')]
        assert got == pytest.approx([x/total[0] for x in (total[1], total[2], total[5], total[3], total[4])], rel=2e-3, abs=1e-6)
        assert all(r['lo'] <= r['value'] <= r['hi'] for n, r in q.items() if r['lo'] is not None), q
    same = found['cards'][1]['numbers']
    assert [same[n]['value'] for n in ('new_forward', 'old_forward', 'old_reverse', 'old_loss', 'new_changed', 'update', 'relative', 'inside', 'rotation', 'unchanged')] == [0]*7 + [None, None, 1]
    assert same['old_loss']['says'] == 'within noise'
    for show in (forget_page.card_text, forget_page.card_page): assert show(found)

@pytest.mark.parametrize('kind, way', [('llama', 'nearer'), ('llama', 'farther'), ('mixtral', 'nearer')])
def test_nearer_in_function_than_the_one_before(kind, way, tmp_path):
    "SFT is noise on the base; RL takes half of it back, or doubles it. A shuffled update does neither."
    lm = build(kind, vocab_size=len(TOK))
    sft, rl = noisy(lm, .2), noisy(lm, .1 if way == 'nearer' else .4)
    ps = [save(m, tmp_path/n) for n, m in (('base', lm), ('sft', sft), ('rl', rl))]
    found = forget(ps[0], ps[1:], DOCS, DOCS, **SMALL, shuffles=2)
    s, texts = found['steps'][0]['old'], [p for d in DOCS.docs for p in encoded(TOK, d, 64)]
    a, b = (by_hand(lm, m, texts).sum(0) for m in (sft, rl))
    assert len(found['steps']) == 1 and s['before'] == pytest.approx(a[1]/a[0], rel=2e-3) and s['value'] == pytest.approx(b[1]/b[0] - a[1]/a[0], rel=5e-3)
    assert s['verdict'] == way and s['lo'] <= s['value'] <= s['hi'] and s['n'] == 6
    assert len(s['shuffled']) == (0 if kind == 'mixtral' else 2) # experts are packed
    if s['shuffled'] and way == 'nearer': assert min(s['shuffled']) > s['value']
    lines = forget_page.first_lines(found)
    assert lines[-1].startswith('From sft to rl the KL to the base on old text changes by') and lines[-1].endswith(f': {way}.') and ('no shuffled update' in lines[-1]) == (kind == 'mixtral')
    assert forget_page.card_page(found).count('From sft to rl the KL') == 2
    with pytest.raises(ParamError, match='shuffles=-1: expected none or more'): forget(ps[0], ps[1:], DOCS, DOCS, **SMALL, shuffles=-1)

def test_what_a_shuffled_update_does_as_well_is_said():
    card = lambda kl: dict(numbers=dict(old_forward=dict(value=kl)), sums=dict(old=[[1, kl + .001*i, 0, 0, 0, 0] for i in range(6)]))
    assert [step(card(2), card(1), [card(x)])['old']['verdict'] for x in (3, .5)] == ['nearer', 'nearer, as by chance']
    assert step(card(2), card(2), [])['old']['verdict'] == 'within noise'

def test_weights_by_numpy(tmp_path):
    lm, new, base, tuned = pair(tmp_path)
    q = forget(base, tuned, DOCS, DOCS, draws=2, most=6)['cards'][0]['numbers']
    A, B = Checkpoint(base), Checkpoint(tuned)
    D = {n: (B.read(n).double() - A.read(n).double()).numpy() for n in A.names()}
    size = sum((x**2).sum() for x in D.values())
    assert q['update']['value'] == pytest.approx(size**.5) and q['relative']['value'] == pytest.approx((size/sum(float((A.read(n).double()**2).sum()) for n in D))**.5)
    inside = 0
    for n, x in D.items():
        from rlsft_nb.chance import lead
        U, s, Vt = scipy.linalg.svd(A.read(n).double().numpy(), full_matrices=False)
        k = lead(torch.tensor(s))
        inside += ((U[:, :k].T @ x @ Vt[:k].T)**2).sum()
    assert q['inside']['value'] == pytest.approx(inside/size, rel=1e-6)
    assert q['inside']['value'] == pytest.approx(q['inside']['by_chance'], rel=.2) # noise has no direction
    ranks = [scipy.linalg.svdvals(x) for x in D.values()]
    assert q['stable_rank']['value'] == pytest.approx(np.median([(s**2).sum()/s[0]**2 for s in ranks])) and q['effective_rank']['value'] == pytest.approx(np.median([np.exp(scipy.special.entr(s/s.sum()).sum()) for s in ranks]))
    same = sum(int((A.read(n).bfloat16() == B.read(n).bfloat16()).sum()) for n in D)/sum(x.size for x in D.values())
    assert q['unchanged']['value'] == pytest.approx(same)

def test_a_bf16_rounding_is_judged_by_nothing(tmp_path):
    lm, _, base, _ = pair(tmp_path)
    half = save(copy.deepcopy(lm).bfloat16(), tmp_path/'half')
    q = forget(base, half, DOCS, DOCS, draws=2, most=6)['cards'][0]['numbers']
    assert q['unchanged']['value'] == 1 and q['rotation']['value'] is None and q['update']['value'] > 0 and 0 < q['old_forward']['value'] < .01

def test_shards_and_bf16_are_the_same_model(tmp_path):
    lm, new, base, tuned = pair(tmp_path)
    sharded = save(new, tmp_path/'sharded', max_shard_size='30KB')
    assert len(list(Path(sharded).glob('*.safetensors'))) > 2
    a, b = forget(base, [tuned, sharded], DOCS, DOCS, **SMALL)['cards']
    assert a['numbers'] == b['numbers'] and a['sums'] == b['sums']

@pytest.mark.parametrize('kind, config', [('llama', dict(target_modules=['q_proj', 'down_proj'])), ('llama', dict(target_modules=['q_proj', 'up_proj'], use_dora=True)),
                                          ('gpt2', dict(target_modules=['c_attn', 'c_proj'], fan_in_fan_out=True)), ('llama', dict(target_modules=['q_proj'], modules_to_save=['lm_head']))])
def test_an_adapter_is_what_peft_computes(kind, config, tmp_path):
    peft = pytest.importorskip('peft')
    lm = build(kind, vocab_size=len(TOK), **(dict(tie_word_embeddings=False) if kind == 'llama' else {}))
    base = save(lm.bfloat16(), tmp_path/'base') # merging in bf16 would round
    lm = lm.float()
    lm.name_or_path = lm.config._name_or_path = base
    m = peft.get_peft_model(copy.deepcopy(lm), peft.LoraConfig(r=4, lora_alpha=10, task_type='CAUSAL_LM', **config))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if p.requires_grad: p.add_(.05*torch.randn(p.shape, generator=g))
    m.save_pretrained(tmp_path/'lora')
    found = forget(base, tmp_path/'lora', DOCS, DOCS, **SMALL)
    texts = [p for d in DOCS.docs for p in encoded(TOK, d, 64)]
    want, q = by_hand(lm, m, texts).sum(0), found['cards'][0]['numbers']
    assert q['old_forward']['value'] == pytest.approx(want[1]/want[0], rel=5e-3) and q['old_loss']['after'] == pytest.approx(want[4]/want[0], rel=1e-3)

def test_an_adapter_whose_base_is_given(tmp_path):
    _, _, base, _ = pair(tmp_path)
    f = lora(tmp_path/'l', 'somebody/gone', {'model.layers.0.self_attn.q_proj': ab(32, 32)})
    other = forget(base, f, DOCS, DOCS, below=base, **SMALL)['cards'][0]['numbers']
    assert other['old_forward']['value'] > 0
    experts = build('mixtral', vocab_size=len(TOK))
    packed = save(experts, tmp_path/'moe')
    m = lora(tmp_path/'m', packed, {'model.layers.1.block_sparse_moe.experts.2.w1': ab(48, 32)})
    with pytest.raises(CheckpointError, match=r'packed otherwise in the loaded base; merge the adapter \(merge_and_unload\)'): forget(packed, m, DOCS, DOCS, **SMALL)

def test_a_revision_reaches_transformers(tmp_path):
    from types import SimpleNamespace
    from rlsft_nb.models import locate
    hub = lambda source, revision: locate(room._where(SimpleNamespace(home=tmp_path, source=source, revision=revision)))[:2]
    assert hub('owner/name', '') == ('owner/name', None) and hub('owner/name', 'v1') == hub('owner/name@v1', '') == hub('owner/name@v1', 'v1') == ('owner/name', 'v1')

# what is refused

def test_another_vocabulary_is_refused(tmp_path):
    lm, new, base, tuned = pair(tmp_path)
    tok = make_tokenizer(); tok.add_tokens(['<|more|>'])
    new.resize_token_embeddings(len(tok))
    with pytest.raises(ParamError) as e: forget(base, save(new, tmp_path/'more', tok), DOCS, DOCS, **SMALL)
    assert '407 tokens and that of' in str(e.value) and 'one vocabulary' in str(e.value) and '\n' not in str(e.value)

def test_other_logits_under_one_tokenizer_are_refused(tmp_path):
    lm, new, base, _ = pair(tmp_path)
    new.resize_token_embeddings(len(TOK) + 10) # rows without a token
    with pytest.raises(ParamError) as e: forget(base, save(new, tmp_path/'padded'), DOCS, DOCS, **SMALL)
    assert 'gives 416 logits' in str(e.value) and '406' in str(e.value)

def test_nan_and_what_is_no_model(tmp_path):
    lm, new, base, tuned = pair(tmp_path)
    new.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(Problem, match='holds NaN'): forget(base, save(new, tmp_path/'nan'), DOCS, DOCS, **SMALL)
    with pytest.raises(Problem, match='no such folder'): forget(base, 'nowhere', DOCS, DOCS, **SMALL)
    with pytest.raises(ParamError, match='expected one tuned model or more'): forget(base, [], DOCS, DOCS)

@pytest.mark.parametrize('name, text, said', [
    ('a.txt', '', 'a.txt: holds no document'), ('a.txt', ' \n\n \n', 'holds no document'), ('a.jsonl', '', 'holds no document; expected one a line'), ('a.csv', 'x', "ends in '.csv', expected .txt or .jsonl"),
    ('a.jsonl', '{"text": "x"}\n\n{"txt": "x"}', "a.jsonl, line 3: keys 'txt'; expected 'text', 'prompt' and 'completion', or 'messages'"), ('a.jsonl', '{"text": "x"}\n{', 'a.jsonl, line 2: no JSON'),
    ('a.jsonl', '[1]', 'a.jsonl, line 1: list, expected an object'), ('a.jsonl', '{"prompt": "x"}', "line 1: keys 'prompt'"), ('a.jsonl', '{"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}', 'line 1: keys'),
    ('a.jsonl', '{"messages": [{"role": "user"}]}', "line 1: keys 'messages'"), ('a.jsonl', '{"messages": []}', 'line 1')])
def test_files_that_are_refused(name, text, said, tmp_path):
    (tmp_path/name).write_text(text)
    with pytest.raises(TextError) as e: read_texts(tmp_path/name)
    assert said in str(e.value) and '\n' not in str(e.value)

def test_files_that_cannot_be_read(tmp_path):
    (tmp_path/'a.txt').write_bytes(b'ab\xff')
    with pytest.raises(TextError, match='no UTF-8 at byte 2'): read_texts(tmp_path/'a.txt')
    with pytest.raises(TextError, match='No such file'): read_texts(tmp_path/'b.txt')

def test_documents_of_one_token(tmp_path):
    _, _, base, tuned = pair(tmp_path)
    (tmp_path/'one.txt').write_text('a\n\nb\n\nmore than one')
    found = forget(base, tuned, str(tmp_path/'one.txt'), DOCS, **SMALL)
    assert (found['texts']['new']['documents'], found['texts']['new']['without_tokens'], found['texts']['new']['groups']) == (3, 2, 1)
    assert found['cards'][0]['numbers']['new_forward']['lo'] is None and 'no interval: too few' in forget_page.card_text(found)
    (tmp_path/'one.txt').write_text('a\n\nb')
    with pytest.raises(ParamError, match='one.txt: no document has a token to predict'): forget(base, tuned, tmp_path/'one.txt', DOCS, **SMALL)

# texts

def test_what_is_counted():
    shown = lambda doc, context=512: [TOK.decode([l for l in ls if l != -100]) for _, ls in encoded(TOK, doc, context)]
    assert shown(dict(prompt='12 + ', completion='7')) == ['7'] and shown(dict(text='abc')) == ['bc']
    assert shown(dict(text='abcdefgh'), 3) == ['bc', 'ef', 'h']
    ask = [dict(role='user', content='7')]
    assert shown(dict(prompt=ask, completion=[dict(role='assistant', content='8')])) == ['8<|end|>'] == shown(dict(messages=ask + [dict(role='assistant', content='8')]))
    assert shown(dict(messages=ask)) == [] # nothing that the model says
    early = dict(role='assistant', content='5')
    assert shown(dict(prompt=[*ask, early, *ask], completion=[dict(role='assistant', content='8')])) == ['8<|end|>'] # an earlier answer is part of the question
    c = Corpus(0)
    for chat in (c.chat() for _ in range(50)): assert shown(dict(turns=chat)) == [''.join(t + '<|end|>' for _, t, counted in chat if counted)]

def test_a_chat_template_that_rewrites_earlier_turns():
    tok = make_tokenizer()
    tok.chat_template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] if loop.last or m['role'] == 'user' else m['content'][-1]) + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    chat = [dict(role='user', content='a'), dict(role='assistant', content='think b'), dict(role='user', content='c'), dict(role='assistant', content='d')]
    (ids, labels), = encoded(tok, dict(messages=chat), 512)
    assert tok.decode(ids) == '<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>d<|end|>' and tok.decode([l for l in labels if l != -100]).endswith('d<|end|>')

def test_defaults():
    book = book_texts()
    assert 20_000 < book.about['bytes'] < 60_000 and {'name', 'author', 'source', 'licence', 'sha256'} <= {*book.about} and old_texts('owner/name') == old_texts('some/folder') == book
    assert old_texts('tiny').docs == corpus_texts().docs and 'turns' in old_texts('tiny:rl').docs[0]
    game = game_texts('tiny')
    assert len(game.docs) == 200 and len({d['group'] for d in game.docs}) < 200
    assert game.sha256 == game_texts().sha256 != book.sha256

def test_old_text_follows_the_params_file(tmp_path, monkeypatch):
    from rlsft_nb import parameters
    (tmp_path/'mine.yaml').write_text('model: {source: embedded, path: tiny}\n'); (tmp_path/'its.yaml').write_text('model: {source: folder, path: x}\n')
    files = parameters._model_files() | {n: tmp_path/f'{n}.yaml' for n in ('mine', 'its')}
    monkeypatch.setattr(parameters, '_model_files', lambda: files)
    assert 'turns' in old_texts('mine').docs[0] and old_texts('its') == book_texts()

# runs

def test_a_second_card_loads_nothing(tmp_path, monkeypatch):
    _, _, base, tuned = pair(tmp_path)
    first = forget(base, tuned, DOCS, DOCS, **SMALL)
    with monkeypatch.context() as m:
        m.setattr(room, 'loaded', lambda *a: pytest.fail('a model was loaded'))
        assert forget(base, tuned, DOCS, DOCS, **SMALL) == first
    other = Texts('other', {}, DOCS.docs[:5] + [dict(text='something else')])
    assert forget(base, tuned, other, DOCS, **SMALL)['cards'][0]['numbers']['new_loss'] != first['cards'][0]['numbers']['new_loss']

def test_intervals_hold_their_rate():
    "Documents of unlike length whose tokens agree: 95 of 100 intervals hold the mean, or nearly."
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        n = rng.integers(5, 60, 60)
        hits += (lambda q: q[0] <= 1 <= q[1])(resampled(lambda s: s[1]/s[0], np.c_[n, n*(1 + .5*rng.normal(size=60))]))
    assert 180 <= hits <= 198

def test_score(tmp_path, capsys):
    lm, _, base, tuned = pair(tmp_path)
    script = tmp_path/'score.py'
    script.write_text('import sys, os\nprint("noise")\nprint(len(sys.argv[1]))')
    found = forget(base, tuned, DOCS, DOCS, score=f'{sys.executable} {script}', **SMALL)
    assert found['cards'][0]['score'] == dict(before=len(base), after=len(tuned)) and 'one number has no interval' in forget_page.card_text(found)
    assert forget_page.main([base, tuned, '--old', str(tmp_path/'x.txt'), '--score', 'false']) == 1 and 'x.txt: No such file' in capsys.readouterr().err

def test_command(tmp_path, capsys):
    _, _, base, tuned = pair(tmp_path)
    words = ['forget', base, tuned, '--texts', '6', '--matrices', 'layers.0.*', '--draws', '2']
    from rlsft_nb.cli import main
    assert main([*words, '--json', '--out', str(tmp_path/'<card>.html')]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told['base'] == base and [c['source'] for c in told['cards']] == [tuned] and told['texts']['old']['name'].startswith('Alice')
    page = (tmp_path/'<card>.html').read_text()
    assert page.count('<dt>') == page.count('</dt>') and 'public domain' in page and 'http' not in page.replace('http-equiv', '')
    assert all(q['means'] in page.replace('&#x27;', "'") and {'lo', 'hi', 'n', 'over', 'unit'} <= {*q} for q in told['cards'][0]['numbers'].values())
    assert main([*words, '--quiet']) == 0 and capsys.readouterr().out == ''
    assert main(words) == 0 and 'rotation over its null' in capsys.readouterr().out
    (tmp_path/'bad.jsonl').write_text('{}')
    assert main([*words, '--new', str(tmp_path/'bad.jsonl')]) == 1
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('TextError: ') and err.count('\n') == 1 and 'bad.jsonl, line 1' in err

def test_page_escapes_names(tmp_path):
    _, _, base, tuned = pair(tmp_path)
    odd = str(Path(tuned).rename(tmp_path/'<b>&'))
    page = forget_page.card_page(forget(base, odd, DOCS, DOCS, **SMALL))
    assert '<b>' not in page and '&lt;b&gt;&amp;' in page
