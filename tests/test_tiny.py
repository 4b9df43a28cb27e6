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
    from rlsft_nb.practice import Practice, kept_pair, pairs, plainness
    four, kept = pairs(4), set(multisets('kept'))
    assert not any(m in kept or kept_pair(m, t) for m, t, _ in four) and len({(m, t) for m, t, _ in four}) == len(four) == 54640
    assert all(evaluate(f)[1] == t and sorted(map(int, re.findall(r'\d+', f))) == sorted(m) for m, t, f in random.Random(0).sample(four, 300))
    assert [min(solve(m, t), key=plainness) for m, t in (((1, 2, 3, 4), 24), ((2, 5, 8, 10), 25))] == ['4*3*2*1', '10+8+5+2']
    three, out = pairs(3), pairs(3, kept=True)
    assert not {p[:2] for p in three} & {p[:2] for p in out} and all(kept_pair(m, t) and evaluate(f)[1] == t for m, t, f in out) and .1 < len(out)/len(three) < .18
    c, shown = Practice(3), set()
    for _ in range(400): numbers, target, _ = c.pick(); shown.add(target)
    assert len(shown) > 50 # every target alike, not mostly 24
    rule, cards, target, formula = c.hand()
    assert sorted(values(cards, rule)) == sorted(map(int, re.findall(r'\d+', formula))) and 1 <= target <= 60

def test_digits_spell_numbers_and_the_record_is_of_the_weights_that_ship():
    tok = make_tokenizer(words=False)
    assert [len(tok(n)['input_ids']) for n in ('7', '13', '100')] == [1, 2, 3] and tok.decode(tok('13*10')['input_ids']) == '13*10'
    r = read_json(shipped('digits')/'provenance.json')
    assert r['sha256'] == sha256_file(shipped('digits')/'model.safetensors') and set(r['abilities']) == {f'{a} {b}' for a in ('ID', 'OOD') for b in ('known', 'pair kept out', 'multiset kept out', 'three numbers, known', 'three numbers, pair kept out')}

def test_reach_has_every_value_that_formulas_make():
    from rlsft_nb.practice import reach
    for m in ((4,), (3, 8), (2, 2, 7), (1, 5, 11, 12), (5, 5, 5, 5)):
        whole = {v for v in reach(m) if type(v) is int}
        assert {t for t in range(1, 101) if solve(m, t)} == {v for v in whole if 1 <= v <= 100} and min(reach(m)) >= 0
        assert all(type(v) is int or v.denominator > 1 for v in reach(m))

def ends(pool): # every value of a list of numbers, none of the results below zero; a plain way
    if len(pool) == 1: return {pool[0]}
    out = set()
    for i, j in itertools.permutations(range(len(pool)), 2):
        a, b, rest = pool[i], pool[j], [x for k, x in enumerate(pool) if k not in (i, j)]
        for v in (a + b, a*b, *([a - b] if a >= b else []), *([a/b] if b else [])): out |= ends([v, *rest])
    return out

def test_a_try_is_as_near_as_its_beginning_allows():
    from fractions import Fraction
    from rlsft_nb.practice import TARGETS, kept_pair, search
    for numbers, t in (((4, 7, 11, 11), 37), ((12, 8, 5, 13), 40), ((10, 3, 5, 3), 40), ((3, 8, 3, 8), 24)):
        for chain in search(numbers, t).partition(' so ')[0].split(', '):
            a, b = map(int, re.match(r'(\d+)[-+*/](\d+)=', chain).groups())
            rest = list(numbers); rest.remove(a); rest.remove(b)
            found = set().union(*(ends([Fraction(v), *map(Fraction, rest)]) for v in (a + b, abs(a - b), a*b, Fraction(a, b), Fraction(b, a))))
            nearest = min(abs(v - t) for v in found if v == t or v in TARGETS and not kept_pair(numbers, int(v)))
            assert abs(int(chain.rpartition('=')[2]) - t) == nearest, chain

def test_a_search_is_honest_and_in_order_and_keeps_what_is_kept():
    from rlsft_nb.practice import kept_pair, pairs, search
    rng, tries = random.Random(1), collections.Counter()
    for m, t, _ in rng.sample(pairs(4) + pairs(3), 400):
        numbers = tuple(rng.sample(m, len(m)))
        said, _, formula = search(numbers, t).partition(' so ')
        assert evaluate(formula)[1] == t and sorted(map(int, re.findall(r'\d+', formula))) == sorted(m)
        order = [sorted(p) for p in itertools.combinations(numbers, 2)]
        begins = []
        for chain in said.split(', '):
            ops = chain.split(' ')
            for op in ops: # each is true
                made, _, v = op.partition('=')
                sign = next(s for s in '+-*/' if any(eval_exact(f'({x}){s}({y})') == eval_exact(v) for x, _, y in [made.partition(s)] if x and y))
            begins.append(sorted(map(int, re.match(r'(\d+)[-+*/](\d+)=', ops[0]).groups())))
            ends = eval_exact(ops[-1].partition('=')[2])
            assert (ends == t) is (chain == said.split(', ')[-1]) and (ends == t or not kept_pair(m, ends)) and len(ops) == len(m) - 1
        assert [order.index(b) for b in begins] == sorted(order.index(b) for b in begins) and len({*map(tuple, begins)}) == len(begins)
        tries[len(begins)] += 1
    assert tries[1] > 150 and sum(tries.values()) - tries[1] > 50
    with pytest.raises(ValueError, match='nothing makes 24'): search((1, 1, 1, 1), 24)

def test_a_hand_in_plain_words_searches_with_the_numbers_that_it_read():
    from rlsft_nb.practice import Practice
    c = Practice(4)
    found = [x for x in (c.chat() for _ in range(300)) if len(x) == 2 and ' so ' in x[1][1] and x[0][1].startswith('Cards')]
    for (_, asked, _), (_, said, counted) in found:
        listed, _, worked = said.removeprefix('numbers ').partition(' : ')
        formula, _, target = worked.partition(' so ')[2].partition('=')
        assert counted is True and evaluate(formula)[1] == int(target) and sorted(re.findall(r'\d+', formula)) == sorted(listed.split()) and asked.endswith(f'reach {target}.')
    assert len(found) > 10

def test_hands_that_repeat_their_cards():
    from rlsft_nb.practice import Cards, kept_pair
    c, kinds = Cards(5), collections.Counter()
    for _ in range(500):
        (_, asked, _), *_, (_, said, _) = c.chat()
        if not (cards := re.search(r'(?:hold|Cards:?|Read|of) ([^.;]*?)(?:[.;\n]|$| as| and)', asked)) or asked.startswith(('Make', 'Which')): continue
        ranks = re.findall(r'10|[2-9AJQK]', cards[1])
        rule = tuple(int(re.search(rf'{f}"?(?:=| is | as )(\d+)', asked)[1]) for f in 'JQK') if not asked.startswith('Rule') else tuple(map(int, re.match(r'Rule (\d+)/(\d+)/(\d+)', asked).groups()))
        worth = values(ranks, rule)
        record = said[0] in '{['
        assert len(ranks) == 4 and (', ' if record else ' ').join(map(str, worth)) in said
        if record: # as the game's answer: quotes, brackets, the formula alone, and other keys
            assert re.findall(r'"(10|[2-9AJQK])"', said) == ranks and '"cards"' not in said and '"number"' not in said and '"formula"' not in said
            body = re.search(r'([-+*/()\d]+)=(\d+)"?}?$', said)
            assert body is None and 'Read' in asked or evaluate(body[1])[1] == int(body[2]) and not kept_pair(worth, int(body[2])) and '=' not in said.replace(body[0], '')
        elif 'epeat' in asked: assert re.findall(r'10|[2-9AJQK]', said)[:4] == ranks
        kinds['record' if record else 'words' if 'epeat' in asked else 'plain'] += 1
    assert min(kinds[k] for k in ('record', 'words', 'plain')) > 35, kinds

def test_the_command_makes_a_base_lesson_by_lesson(tmp_path, monkeypatch, capsys):
    from rlsft_nb import digits
    asked = []
    def few_steps(folder, steps, seed, corpus, tok, start, **how):
        asked.append((type(corpus).__name__, steps, seed, Path(start).parent.name, how['peak']))
        return pretrain(folder, 2, seed, size=2, corpus=corpus, tok=tok, start=start, **({} if start else dict(width=64, layers=1)))
    monkeypatch.setattr(digits, 'pretrain', few_steps)
    monkeypatch.setattr(digits, 'abilities', lambda *lm: dict(here=dict(rate=.5)))
    for _ in range(2): assert digits.main(['--out', str(tmp_path/'a'), '--words', '--seed', '3']) == 0
    assert asked == [('Formulas', digits.LESSONS['formulas'][1], 3, '', 1.5e-3), ('Practice', digits.LESSONS['practice'][1], 3, 'formulas', 1e-3), ('Cards', digits.LESSONS['cards'][1], 3, 'practice', 7e-4), ('Three', digits.LESSONS['three'][1], 3, 'cards', 7e-4)] # each once
    packed = tmp_path/'a'/'packed'
    r = read_json(packed/'provenance.json')
    assert r['seed'] == 3 and {*r['lessons']} == {*digits.LESSONS} and r['lessons']['practice']['step'] == 2 and r['sha256'] == sha256_file(packed/'model.safetensors')
    lm, tok = load_lm(str(packed))
    assert len(tok('100')['input_ids']) == 1 and capsys.readouterr().out.count("{'here': 0.5}") == 2
    last, _ = load_lm(str(tmp_path/'a'/'three'/'base'))
    assert torch.equal(lm.lm_head.weight.float(), last.lm_head.weight.bfloat16().float())
    asked.clear()
    assert digits.main(['--out', str(tmp_path/'b'), '--start', str(packed), '--lesson', 'cards']) == 0
    assert [a[:4] for a in asked] == [('Cards', digits.LESSONS['cards'][1], 0, 'a'), ('Three', digits.LESSONS['three'][1], 0, 'cards')] and {*read_json(tmp_path/'b'/'packed'/'provenance.json')['lessons']} == {'cards', 'three'}

def test_the_last_lesson_has_hands_of_three_cards():
    from rlsft_nb.practice import Three, kept_pair
    c, sizes = Three(0), []
    for _ in range(300):
        rule, cards, target, formula = c.hand()
        sizes.append(len(cards))
        assert not kept_pair(values(cards, rule), target) and verify(answer(cards, rule, formula, target), cards, rule, target).correct
    assert set(sizes) == {3, 4} and .58 < sizes.count(3)/300 < .75

def test_a_base_that_goes_on_keeps_its_tokenizer(tmp_path, capsys):
    from rlsft_nb import digits
    with pytest.raises(SystemExit): digits.main(['--out', str(tmp_path/'a'), '--start', str(shipped('digits')), '--words'])
    assert '--start has a tokenizer of its own' in capsys.readouterr().err and not (tmp_path/'a').exists()

def test_training_goes_on_from_given_weights(tmp_path):
    from rlsft_nb.practice import Practice
    tok = make_tokenizer(words=False)
    first = pretrain(tmp_path/'a', 10, size=4, width=64, layers=1, corpus=Practice(0), tok=tok, save=2)
    more = pretrain(tmp_path/'b', 5, size=4, corpus=Practice(1), tok=tok, start=str(tmp_path/'a'/'base'), peak=1e-9, save=2)
    a, b = (load_lm(str(tmp_path/n/'base'))[0].state_dict() for n in 'ab')
    assert first['step'] == 10 and more['step'] == 5 and all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)
