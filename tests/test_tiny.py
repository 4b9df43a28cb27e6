"The embedded base: its tokenizer, its corpus, and that the shipped weights are what their record says."
import collections, random, re
import pytest, torch
from hypothesis import given, strategies as st
from rlsft_nb.files import read_json, sha256_file
from rlsft_nb.parameters import load_params
from rlsft_nb.places import shipped, shipped_names
from rlsft_nb.game import PHRASES, PROMPT, answer, evaluate, feedback_turn, hands, multisets, prompt, solve, values, verify
from rlsft_nb.generation import encode
from rlsft_nb.models import load_lm
from rlsft_nb import tiny
from rlsft_nb.tiny import *

TOK = make_tokenizer()
SHIPPED = shipped('tiny')

@given(st.text())
def test_any_text_round_trips(text): assert TOK.decode(TOK(text)['input_ids']) == text

def test_shipped_tokenizer_is_the_one_this_code_makes():
    assert load_lm('tiny')[1].get_vocab() == TOK.get_vocab()

@pytest.mark.parametrize('name', shipped_names())
def test_every_shipped_folder_loads_as_it_is(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    lm, tok = AutoModelForCausalLM.from_pretrained(shipped(name)), AutoTokenizer.from_pretrained(shipped(name))
    own = TOK if name.partition(':')[0] == 'tiny' else make_tokenizer(words=False)
    assert lm.dtype == torch.bfloat16 and tok.get_vocab() == own.get_vocab() and tok.chat_template == TOK.chat_template and len(tok) == lm.config.vocab_size

def test_the_game_is_short_in_tokens():
    for h in hands('test', '11-12-13', face=True, n=50):
        asked = encode(TOK, [prompt(h, '11-12-13')])[0]
        assert len(asked) == 21
        v = verify('hm', h, '11-12-13', feedback='outcome')
        assert len(TOK(feedback_turn(v)['content'])['input_ids']) == 3

def test_cards_and_values_share_tokens_between_corpus_and_game():
    ids = lambda t: TOK(t)['input_ids']
    assert ids('K')[0] in ids('["K", "3"]') and ids('13')[0] in ids('"number": [13, 3]') and len(ids('100')) == 1 and len(ids('101')) == 2

# corpus

@pytest.fixture(scope='module')
def chats():
    c = Corpus(7)
    return [c.chat() for _ in range(3000)]

def test_corpus_never_holds_the_answer_format(chats):
    said = [t for c in chats for role, t, _ in c if role == 'assistant']
    assert not any('"formula"' in t or '{' in t or '"number"' in t for t in said)

def test_corpus_never_shows_kept_multisets_in_a_formula(chats):
    kept = set(multisets('kept'))
    for c in chats:
        f = re.search(r'([-+*/()0-9]+)=\d+$', c[-1][1])
        if f: assert tuple(sorted(map(int, re.findall(r'\d+', f[1])))) not in kept

def test_counted_answers_are_right_and_failures_are_not_counted(chats):
    kinds = collections.Counter()
    for c in chats:
        assert [counted for *_, counted in c] == [False, True] if len(c) == 2 else [False]*3 + [True]
        f = re.search(r'([-+*/()0-9]+)=(\d+)$', c[-1][1])
        if f: assert eval_exact(f[1]) == int(f[2])
        if len(c) == 4: kinds[c[2][1]] += 1; assert c[1][1] != c[3][1]
    assert sum(kinds.values()) > 300 and len(kinds) > 50

def eval_exact(formula): # an own evaluator: Python's syntax tree over fractions
    import ast
    from fractions import Fraction
    def go(n):
        if isinstance(n, ast.Constant): return Fraction(n.value)
        a, b = go(n.left), go(n.right)
        return {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[type(n.op)](b)
    return go(ast.parse(formula, mode='eval').body)

def test_every_known_multiset_is_practised_under_both_rules():
    c, seen = Corpus(3), collections.defaultdict(set)
    for _ in range(20000):
        rule, cards, target, _ = c.hand()
        if target == 24: seen[rule].add(tuple(sorted(values(cards, rule))))
    known = set(known_multisets())
    assert len(seen[11, 12, 13] & known) > .95*len(known)
    assert len(seen[10, 10, 10]) == sum(m[-1] <= 10 for m in known)

def test_labels_cover_counted_turns_only():
    chat = [('user', 'Make 24 of 4 6.', False), ('assistant', '4*6=24', True)]
    ids, labels = encode_chat(TOK, chat)
    assert TOK.decode(ids) == '<|user|>Make 24 of 4 6.<|end|><|assistant|>4*6=24<|end|>'
    assert TOK.decode([l for l in labels if l >= 0]) == '4*6=24<|end|>' and len(ids) == len(labels)

# training

def test_a_stopped_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    how = dict(size=8, width=64, layers=1, save=5)
    pretrain(tmp_path/'a', 15, **how)
    with monkeypatch.context() as m:
        whole = tiny.batches
        def cut(*args): # as if killed in step 9, after the state of step 5
            yield from (b for _, b in zip(range(8), whole(*args)))
            raise KeyboardInterrupt
        m.setattr(tiny, 'batches', cut)
        with pytest.raises(KeyboardInterrupt): pretrain(tmp_path/'b', 15, **how)
    log = pretrain(tmp_path/'b', 15, **how)
    a, b = (load_lm(str(tmp_path/x/'base'))[0].state_dict() for x in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a) and log['step'] == 15

# what ships

def test_shipped_weights_match_their_record():
    r = read_json(SHIPPED/'provenance.json')
    assert sha256_file(SHIPPED/'model.safetensors') == r['sha256']
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 12e6
    assert corpus_sha(r['seed']) == r['corpus'], 'the corpus of this code is not the one the base was trained on'
    lm, tok = load_lm('tiny')
    assert sum(p.numel() for p in lm.parameters()) == r['parameters'] and len(tok) == r['vocabulary']
    assert lm.lm_head.weight is not lm.model.embed_tokens.weight
    assert {'commit', 'device', 'seconds', 'tokens', 'losses', 'versions', 'kept_out'} <= set(r)

def test_shipped_base_reaches_the_mark():
    r = read_json(SHIPPED/'provenance.json')['knowledge']
    assert r['ID known']['rate'] >= .7 and r['OOD known']['rate'] >= .7 and r['ID known']['n'] == 1000
    lm, tok = load_lm('tiny')
    again = free_form(lm, tok, hands('test', '11-12-13', face=True, n=100), '11-12-13')
    assert again['rate'] >= .6 and again['read'] >= .95

# the base that calculates

def test_digits_keep_their_pairs_and_multisets_apart():
    from rlsft_nb.digits import Practice, kept_pair, pairs, plainness
    four, kept = pairs(4), set(multisets('kept'))
    assert not any(m in kept or kept_pair(m, t) for m, t, _ in four) and len({(m, t) for m, t, _ in four}) == len(four) == 54640
    assert all(evaluate(f)[1] == t and sorted(map(int, re.findall(r'\d+', f))) == sorted(m) for m, t, f in random.Random(0).sample(four, 300))
    assert [min(solve(m, t), key=plainness) for m, t in (((1, 2, 3, 4), 24), ((2, 5, 8, 10), 25))] == ['4*3*2*1', '10+8+5+2']
    c, shown = Practice(3), set()
    for _ in range(400): numbers, target, _ = c.pick(); shown.add(target)
    assert len(shown) > 50 # every target alike, not mostly 24
    rule, cards, target, formula = c.hand()
    assert sorted(values(cards, rule)) == sorted(map(int, re.findall(r'\d+', formula))) and 1 <= target <= 60

def test_digits_spell_numbers_and_the_record_is_of_the_weights_that_ship():
    tok = make_tokenizer(words=False)
    assert [len(tok(n)['input_ids']) for n in ('7', '13', '100')] == [1, 2, 3] and tok.decode(tok('13*10')['input_ids']) == '13*10'
    r = read_json(shipped('digits')/'provenance.json')
    assert r['sha256'] == sha256_file(shipped('digits')/'model.safetensors') and set(r['abilities']) == {f'{a} {b}' for a in ('ID', 'OOD') for b in ('known', 'pair kept out', 'multiset kept out')}

def test_a_chain_of_operations_is_the_formula_it_came_from():
    from rlsft_nb.digits import pairs, steps, tried
    for m, t, f in random.Random(1).sample(pairs(4) + pairs(3), 400):
        back = tried(steps(f), random.Random(t).sample(m, len(m)))
        assert evaluate(back)[1] == t and sorted(map(int, re.findall(r'\d+', back))) == sorted(m) and sorted(steps(back).split()) == sorted(steps(f).split())
    assert [tried(c, (13, 10, 9, 6)) for c in ('13-10=3 3*9=27', '13-10=4 4*9=36 36+6=42', '13-10=3 3*8=24 24+6=30', '6/0=1', '', 'so')] == ['']*6

def test_only_the_last_try_is_learned():
    from rlsft_nb.digits import Practice, steps
    tok, pair = make_tokenizer(words=False), ((4, 6, 8, 8), 24)
    class Mine(Practice):
        def pick(self): return *pair, '(8-4)*6*8/8'
    c, aside, own = Mine(0, {pair: ['8+8+6+4', '(8+8)*6/4']}), collections.Counter(), {steps('8+8+6+4'), steps('(8+8)*6/4')}
    for _ in range(300):
        chat = [t for t in c.chat() if '-4=4' in t[1] and t[0] == 'assistant' and t[2]]
        for _, text, counted in chat:
            ids, labels = encode_chat(tok, [('assistant', text, counted)])
            learned = tok.decode([l for l in labels if l >= 0])
            assert ids[1:] == tok(text + '<|end|>')['input_ids'] and steps('(8-4)*6*8/8') in learned and not any(o in learned for o in own)
            aside[sum(o in text for o in own)] += 1
    assert set(aside) == {0, 1, 2} and min(aside.values()) > 20

def test_own_tries_are_wrong_guesses_of_the_network():
    from rlsft_nb.digits import own_tries, steps
    lm, tok = load_lm(str(shipped('digits')))
    asked = [((3, 5, 9, 13), 24), ((1, 2, 3, 4), 10)]
    found = own_tries(lm, tok, asked, samples=6, seed=1)
    assert found == own_tries(lm, tok, asked, samples=6, seed=1) and 0 < sum(map(len, found)) <= 12
    for (m, t), fs in zip(asked, found):
        assert len(fs) == len(set(fs)) and all(evaluate(f)[1] != t and sorted(map(int, re.findall(r'\d+', f))) == sorted(m) for f in fs)

def test_the_command_goes_on_from_what_it_packed(tmp_path, monkeypatch, capsys):
    from rlsft_nb import digits
    asked = []
    def few_steps(folder, steps, seed, corpus, tok, start, **how):
        asked.append((steps, seed, start, corpus.own, how['peak']))
        return pretrain(folder, 2, seed, size=2, corpus=corpus, tok=tok, start=start, **({} if start else dict(width=64, layers=1)))
    monkeypatch.setattr(digits, 'pretrain', few_steps)
    monkeypatch.setattr(digits, 'abilities', lambda *lm: dict(here=dict(rate=.5)))
    assert digits.main(['--out', str(tmp_path/'a'), '--afresh', '--words', '--seed', '3', '--steps', '7']) == 0
    packed = tmp_path/'a'/'packed'
    first = read_json(packed/'provenance.json')
    assert first['seed'] == 3 and first['start'] is None and len(load_lm(str(packed))[1]('100')['input_ids']) == 1 and first['sha256'] == sha256_file(packed/'model.safetensors')
    for _ in range(2): assert digits.main(['--out', str(tmp_path/'b'), '--start', str(packed), '--pairs', '3', '--peak', '1e-4']) == 0
    again = read_json(tmp_path/'b'/'packed'/'provenance.json')
    assert again['start']['sha256'] == first['sha256'] and again['seed'] == 3 and [p.name for p in (tmp_path/'b'/'tries').iterdir()] == ['0.json']
    assert [(*a[:3], a[4]) for a in asked] == [(7, 3, '', 5e-4)] + [(20000, 3, str(packed), 1e-4)]*2 and asked[0][3] == {} and capsys.readouterr().out.count("{'here': 0.5}") == 3

def test_training_goes_on_from_given_weights(tmp_path):
    from rlsft_nb.digits import Practice
    tok = make_tokenizer(words=False)
    first = pretrain(tmp_path/'a', 10, size=4, width=64, layers=1, corpus=Practice(0), tok=tok, save=2)
    more = pretrain(tmp_path/'b', 5, size=4, corpus=Practice(1), tok=tok, start=str(tmp_path/'a'/'base'), peak=1e-9, save=2)
    a, b = (load_lm(str(tmp_path/n/'base'))[0].state_dict() for n in 'ab')
    assert first['step'] == 10 and more['step'] == 5 and all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)
