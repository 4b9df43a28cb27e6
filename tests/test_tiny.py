"The embedded base: its tokenizer, its corpus, and that the shipped weights are what their record says."
import collections, itertools, random, re
from pathlib import Path
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
SHIPPED, CALCULATES = shipped('tiny'), ['digits', 'tiny_words'] # made by nbs/tiny.ipynb, by nbs/digits.ipynb

@given(st.text())
def test_any_text_round_trips(text): assert TOK.decode(TOK(text)['input_ids']) == text

def test_shipped_tokenizer_is_the_one_this_code_makes():
    assert load_lm('tiny')[1].get_vocab() == TOK.get_vocab()

@pytest.mark.parametrize('name', shipped_names())
def test_every_shipped_folder_loads_as_it_is(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    lm, tok = AutoModelForCausalLM.from_pretrained(shipped(name)), AutoTokenizer.from_pretrained(shipped(name))
    own = make_tokenizer(words=read_json(shipped(name.partition(':')[0])/'provenance.json').get('words', True))
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

def test_a_second_round_warms_up_again_and_goes_on_from_the_first(tmp_path, monkeypatch):
    rates, how = [], dict(size=4, width=64, layers=1, save=4)
    class Noted(torch.optim.AdamW):
        def step(self, *a): rates.append(self.param_groups[0]['lr']); return super().step(*a)
    monkeypatch.setattr(torch.optim, 'AdamW', Noted)
    pretrain(tmp_path/'a', 8, **how)
    assert pretrain(tmp_path/'a', 8, again=(6, 5e-4), **how)['step'] == 14 # the first round is not made again
    whole = pretrain(tmp_path/'b', 8, again=(6, 5e-4), **how)
    assert rates[:14] == rates[14:] == [rate(s, 8) for s in range(1, 9)] + [rate(s, 6, 5e-4) for s in range(1, 7)] and rates[8] > rates[7]
    a, b = (load_lm(str(tmp_path/x/'base'))[0].state_dict() for x in 'ab')
    assert whole['step'] == 14 and all(torch.equal(a[k], b[k]) for k in a)

# what ships

def test_shipped_weights_match_their_record():
    r = read_json(SHIPPED/'provenance.json')
    assert sha256_file(SHIPPED/'model.safetensors') == r['sha256']
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 12e6
    assert corpus_sha(Corpus(r['seed'])) == r['corpus'], 'the corpus of this code is not the one the base was trained on'
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

def test_practised_pairs_and_those_kept_out_are_apart_and_all_there_are():
    from rlsft_nb.practice import TARGETS, kept_pair, pairs, plainness
    for cards, known in ((2, 197), (3, 3847), (4, 54640)):
        parts, kept = {p: pairs(cards, p) for p in ('known', 'pair', 'multiset')}, set(multisets('kept', cards))
        at = {p: {(m, t) for m, t, _ in found} for p, found in parts.items()}
        assert len(at['known']) == len(parts['known']) == known and not at['known'] & at['pair'] and not at['known'] & at['multiset'] and not at['pair'] & at['multiset']
        assert not any(m in kept or kept_pair(m, t) for m, t in at['known']) and {m for m, _ in at['multiset']} <= kept and all(kept_pair(m, t) for m, t in at['pair'])
        for m, t, f in random.Random(0).sample(parts['known'], 190): assert evaluate(f)[1] == t and sorted(map(int, re.findall(r'\d+', f))) == sorted(m)
        if cards < 4: assert {x for p in at.values() for x in p} == {(m, t) for m in itertools.combinations_with_replacement(range(1, 14), cards) for t in TARGETS if solve(m, t)}
    assert [min(solve(m, t), key=plainness) for m, t in (((1, 2, 3, 4), 24), ((2, 5, 8, 10), 25))] == ['4*3*2*1', '10+8+5+2']

def test_every_target_is_practised_alike_in_every_size():
    from rlsft_nb.practice import Practice
    c, sizes, shown = Practice(3), collections.Counter(), set()
    for _ in range(1000): numbers, target, _ = c.pick(.06, .44); shown.add(target); sizes[len(numbers)] += 1
    assert shown == {*range(1, 61)} and 40 <= sizes[2] <= 85 and 390 <= sizes[3] <= 490
    rule, cards, target, formula = c.hand()
    assert sorted(values(cards, rule)) == sorted(map(int, re.findall(r'\d+', formula))) and evaluate(formula)[1] == target

def test_digits_spell_numbers_and_the_record_is_of_the_weights_that_ship():
    from rlsft_nb.digits import corpus
    tok = make_tokenizer(words=False)
    assert [len(tok(n)['input_ids']) for n in ('7', '13', '100')] == [1, 2, 3] and tok.decode(tok('13*10')['input_ids']) == '13*10'
    for name in CALCULATES:
        r = read_json(shipped(name)/'provenance.json')
        assert r['sha256'] == sha256_file(shipped(name)/'model.safetensors') and r['words'] == (name == 'tiny_words')
        assert corpus_sha(corpus(r['seed'])) == r['corpus'], 'the corpus of this code is not the one the base was trained on'

@pytest.mark.parametrize('name', CALCULATES)
def test_a_base_calculates(name):
    r = read_json(shipped(name)/'provenance.json')['abilities']
    assert {*r} == {f'{a} {b}' for a in ('ID', 'OOD') for b in ('known', 'pair kept out', 'multiset kept out')} and all(v['n'] == 400 for v in r.values())
    for rule in ('ID', 'OOD'):
        for kept in ('pair', 'multiset'): assert .35 <= r[f'{rule} {kept} kept out']['rate'] and r[f'{rule} known']['rate'] <= r[f'{rule} {kept} kept out']['rate'] + .25
    from rlsft_nb.digits import dealt
    from rlsft_nb.practice import pairs
    again = free_form(*load_lm(name), dealt([p for p in pairs(3, 'pair') if max(p[0]) > 10], (11, 12, 13), 100), '11-12-13')
    assert abs(again['rate'] - r['OOD pair kept out']['rate']) < .2 and again['read'] >= .9

def test_abilities_are_asked_of_the_right_hands(monkeypatch):
    from rlsft_nb import digits
    from rlsft_nb.practice import kept_pair
    asked = {}
    monkeypatch.setattr(digits, 'free_form', lambda lm, tok, hands, rule: asked.setdefault(len(asked), (hands, rule)))
    names, kept = list(digits.abilities(None, None, 60)), set(multisets('kept', 3))
    for name, (hands_, rule) in zip(names, asked.values(), strict=True):
        ms = [(tuple(sorted(values(h['cards'], rule))), h['target']) for h in hands_]
        assert len(ms) == 60 and all(len(m) == 3 and solve(m, t) for m, t in ms) and {max(m) > 10 for m, _ in ms} == {name.startswith('OOD')}
        assert {m in kept for m, _ in ms} == {'multiset' in name} and ('multiset' in name or {kept_pair(m, t) for m, t in ms} == {'pair' in name})

def test_hands_that_repeat_their_cards():
    from rlsft_nb.practice import Practice, kept_pair
    c, kinds = Practice(5), collections.Counter()
    for _ in range(500):
        (_, asked, _), *_, (_, said, _) = c.chat()
        if not (cards := re.search(r'(?:hold|Cards:?|Read|of|do) ([^.;]*?)(?:[.;\n]|$| as| and| count)', asked)) or asked.startswith(('Make', 'Which')): continue
        ranks = re.findall(r'10|[2-9AJQK]', cards[1])
        rule = tuple(int(re.search(rf'{f}"?(?:=| is | as )(\d+)', asked)[1]) for f in 'JQK') if not asked.startswith('Rule') else tuple(map(int, re.match(r'Rule (\d+)/(\d+)/(\d+)', asked).groups()))
        worth = values(ranks, rule)
        record = said[0] in '{['
        assert len(ranks) in (3, 4) and (', ' if record else ' ').join(map(str, worth)) in said
        if record: # as the game's answer: quotes, brackets, and other keys
            assert re.findall(r'"(10|[2-9AJQK])"', said) == ranks and '"cards"' not in said and '"number"' not in said and '"formula"' not in said
            body = re.search(r'([-+*/()\d]+)=(\d+)"?}?$', said)
            assert body is None and 'Read' in asked or evaluate(body[1])[1] == int(body[2]) and not kept_pair(worth, int(body[2]))
        elif 'epeat' in asked: assert re.findall(r'10|[2-9AJQK]', said)[:len(ranks)] == ranks
        kinds['record' if record else 'words' if 'epeat' in asked else 'plain'] += 1
        kinds[len(ranks)] += 1
    assert min(kinds[k] for k in ('record', 'words', 'plain')) > 35 and kinds[3] > kinds[4] > 30, kinds

def test_the_command_makes_a_base_once(tmp_path, monkeypatch, capsys):
    from rlsft_nb import digits
    asked = []
    def few_steps(folder, steps, seed, corpus, tok, peak, again, **how):
        asked.append((type(corpus).__name__, steps, seed, len(tok('100')['input_ids']), peak, again))
        return pretrain(folder, 2, seed, size=2, corpus=corpus, tok=tok, width=64, layers=1)
    monkeypatch.setattr(digits, 'pretrain', few_steps)
    monkeypatch.setattr(digits, 'abilities', lambda *lm: dict(here=dict(rate=.5)))
    for _ in range(2): assert digits.main(['--out', str(tmp_path/'a'), '--words', '--seed', '3']) == 0
    assert asked == [('Practice', digits.STEPS, 3, 1, digits.PEAK, digits.AGAIN)] # once
    packed = tmp_path/'a'/'packed'
    r = read_json(packed/'provenance.json')
    assert r['seed'] == 3 and r['words'] and r['step'] == 2 and r['corpus'] == corpus_sha(digits.corpus(3)) != corpus_sha(digits.corpus(0)) and r['sha256'] == sha256_file(packed/'model.safetensors')
    (lm, tok), (last, _) = load_lm(str(packed)), load_lm(str(tmp_path/'a'/'base'))
    assert capsys.readouterr().out.count("{'here': 0.5}") == 2 and torch.equal(lm.lm_head.weight.float(), last.lm_head.weight.bfloat16().float())
