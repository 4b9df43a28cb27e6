"The game beside independent implementations, and everything a model or a user could hand it."
import ast, hashlib, json, random, resource, subprocess, sys, time, warnings
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement, permutations, product

import gymnasium, numpy as np, pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import example, given, settings, strategies as st

from rlsft_nb import game, hand_files, verifier
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from rlsft_nb.bench import BENCHES, main as bench_main
from rlsft_nb.speed_game import brute_force, second_opinion as exact, tried, verify_before
from rlsft_nb.deals import ANY, deck_of, makes, targets_of
from rlsft_nb.solver import forget, whole
from rlsft_nb.tricks import FORMULAS, audit, cases
from rlsft_nb.game import (ENV_ID, GeneralPoints, MAX_DEPTH, OUTCOMES, PARTS, PHRASES, PLAIN, RULES, Verdict, answer, build_hands, dataset, deal, draw_hand,
                           evaluate, feedback_turn, hands, hands_bytes, multisets, play, prompt, reward_func, solvable, solve, split_multisets,
                           values, verify)

EVERY = list(combinations_with_replacement(range(1, 14), 4))
HAND = ['A', '3', 'Q', '10'] # 10+10+3+1 under '10', 12+10+3-1 under '11-12-13'
says = lambda formula: json.dumps(dict(formula=formula))
judge = lambda formula, rule='11-12-13', **kw: verify(says(formula), HAND, rule, **kw)


# --- a second solver and a second evaluator -----------------------------------------------------------------

@lru_cache(maxsize=None)
def reach(numbers):
    "Every value that some expression over the sorted `numbers` has: join two, go on."
    if len(numbers) == 1: return {Fraction(numbers[0])}
    out = set()
    for i in range(len(numbers)):
        for j in range(i):
            rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
            a, b = numbers[i], numbers[j]
            for c in {a + b, a - b, b - a, a*b, *([Fraction(a)/b] if b else []), *([Fraction(b)/a] if a else [])}:
                out |= reach(tuple(sorted([*rest, c])))
    return out

BIN = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__}

def second_opinion(text):
    "Value by Python's own parser over Fractions; None for a division by zero."
    def walk(n):
        if isinstance(n, ast.Constant): return Fraction(n.value)
        return BIN[type(n.op)](walk(n.left), walk(n.right))
    try: return walk(ast.parse(text, mode='eval').body)
    except ZeroDivisionError: return None

def normal(text):
    "A formula up to the order of terms and factors and the way they are bracketed."
    def split(n, kinds, sign=1):
        if isinstance(n, ast.BinOp) and type(n.op) in kinds:
            return split(n.left, kinds, sign) + split(n.right, kinds, sign if type(n.op) is kinds[0] else -sign)
        return [(form(n), sign)]
    def form(n):
        if isinstance(n, ast.Constant): return ('n', n.value)
        kinds = (ast.Add, ast.Sub) if isinstance(n.op, (ast.Add, ast.Sub)) else (ast.Mult, ast.Div)
        return (kinds[0].__name__, tuple(sorted(split(n, kinds), key=repr)))
    return form(ast.parse(text, mode='eval').body)

SHAPES = ['(({}{}{}){}{}){}{}', '({}{}({}{}{})){}{}', '({}{}{}){}({}{}{})', '{}{}(({}{}{}){}{})', '{}{}({}{}({}{}{}))']

def spelled(numbers):
    "Every expression over four numbers, with all parentheses written."
    for nums in set(permutations(numbers)):
        for ops in product('+-*/', repeat=3):
            for shape in SHAPES: yield shape.format(nums[0], ops[0], nums[1], ops[1], nums[2], ops[2], nums[3])


# --- solver ---------------------------------------------------------------------------------------------------

def test_solvability_of_every_multiset():
    assert len(EVERY) == 1820
    second = [m for m in EVERY if 24 in reach(m)]
    assert [m for m in EVERY if solvable(m)] == second == [m for m in EVERY if solve(m)]
    assert len(second) == 1362
    low = [m for m in second if m[-1] <= 10]
    assert len(low) == 566 and len([m for m in EVERY if m[-1] <= 10]) == 715

def test_every_formula_is_right_and_none_is_listed_twice():
    for m in EVERY:
        found = solve(m)
        assert len({normal(f) for f in found}) == len(found)
        for f in found:
            used, value, fault = evaluate(f)
            assert (sorted(used), value, fault) == (list(m), 24, ''), f
            assert second_opinion(f) == 24

@pytest.mark.parametrize('target', [24, 7])
def test_solutions_are_complete(target):
    some = random.Random(target).sample(EVERY, 60) + [(3, 3, 8, 8), (1, 3, 4, 6), (1, 5, 5, 5), (6, 6, 6, 6)]
    for m in some:
        want = set()
        for text in spelled(m):
            used, value, fault = evaluate(text)
            assert sorted(used) == list(m)
            if value == target: want.add(normal(text))
        assert want == {normal(f) for f in solve(m, target)}, m

def test_brute_force_of_the_benchmark_agrees():
    for m in random.Random(1).sample(EVERY, 6): assert (brute_force(m) > 0) == solvable(m)

def test_solver_other_sizes_and_targets():
    assert solve([24]) == ['24'] and solve([23]) == [] and not solvable([23])
    assert solve([4, 6]) == ['6*4'] and solvable([1, 2, 3, 4, 5, 6], 720)
    assert solve([1, 1], 2) == ['1+1']

@pytest.mark.parametrize('numbers, target', [([], 24), ([1]*7, 24), ([0, 1, 2, 3], 24), ([1.0, 2, 3, 4], 24), ([True, 2, 3, 4], 24),
                                             ([1, 2, 3, 4], 0), ([1, 2, 3, 4], -24), ([1, 2, 3, 4], 24.)])
def test_solver_refuses(numbers, target):
    for f in (solve, solvable):
        with pytest.raises(ValueError, match='positive integer'): f(numbers, target)


# --- evaluator ------------------------------------------------------------------------------------------------

formulas = st.recursive(st.integers(0, 999).map(str), lambda e: st.one_of(
    st.tuples(e, st.sampled_from('+-*/'), e).map(''.join), e.map('({})'.format)), max_leaves=12)

@given(formulas)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_evaluator_agrees_with_python(text):
    used, value, fault = evaluate(text)
    if len(text) > game.MAX_FORMULA: assert fault == 'length'
    elif fault == 'grammar': assert max_depth(text) > MAX_DEPTH
    else: assert (value, fault) == (v := second_opinion(text), 'zero' if v is None else '') and used == [int(n.value) for n in constants(text)]

def constants(text): return sorted((n for n in ast.walk(ast.parse(text, mode='eval')) if isinstance(n, ast.Constant)), key=lambda n: n.col_offset)
def max_depth(text): return max((text[:i].count('(') - text[:i].count(')') for i in range(len(text) + 1)), default=0)

@given(st.text('0123456789+-*/() ', max_size=14))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_evaluator_accepts_only_what_python_reads_alike(text):
    used, value, fault = evaluate(text)
    if not fault: assert second_opinion(text.strip()) == value

@pytest.mark.parametrize('text, fault', [
    ('', 'grammar'), ('()', 'grammar'), ('1+', 'grammar'), ('+1', 'grammar'), ('-1+2', 'grammar'), ('(-1)+2', 'grammar'), ('1 2', 'grammar'),
    ('2(3)', 'grammar'), ('(2)3', 'grammar'), ('2**3', 'grammar'), ('7//2', 'grammar'), ('(1', 'grammar'), ('1)', 'grammar'), ('007', 'grammar'),
    ('1234567', 'grammar'), ('1.5', 'characters'), ('2^3', 'characters'), ('1e3', 'characters'), ('x', 'characters'), ('１+1', 'characters'),
    ('1+1'*200, 'length'), ('1/(2-2)', 'zero'), ('1/(1/(2-2))', 'zero'), ('(2-2)/(3-3)', 'zero'), ('0/5', ''), ('('*MAX_DEPTH + '1' + ')'*MAX_DEPTH, ''),
    ('('*(MAX_DEPTH + 1) + '1' + ')'*(MAX_DEPTH + 1), 'grammar')])
def test_grammar(text, fault): assert evaluate(text)[2] == fault

def test_values_are_exact():
    assert evaluate('8/(3-8/3)')[1] == 24 and type(evaluate('8/(3-8/3)')[1]) is int
    assert evaluate('1/3+1/3')[1] == Fraction(2, 3) and evaluate('1-2/(1-4)')[1] == Fraction(5, 3)


# --- verifier -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('formula, outcome, reward, feedback', [
    ('12+10+3-1=24', 'correct', 5, ''), ('12+10+3-1', 'correct', 5, ''), ('12+10+3-1=99', 'correct', 5, ''), ('(12 + 10) + (3 - 1)=24', 'correct', 5, ''),
    ('12+10+3+1=24', 'wrong_value', -1, 'the formula equals 26, not 24.'), ('12/10+3+1', 'wrong_value', -1, 'the formula equals 26/5, not 24.'),
    ('12/(10*0+3-1)', 'wrong_numbers', -2, 'these numbers are not on the cards: 0.'),
    ('12+10+3', 'wrong_numbers', -2, 'these numbers are not used: 1.'), ('12+10+3-1+7', 'wrong_numbers', -2, 'these numbers are not on the cards: 7.'),
    ('12+10+3-1+3-3', 'wrong_numbers', -2, 'these numbers are used too often: 3.'),
    ('10+10+3+1', 'wrong_numbers', -4, 'these numbers are used too often: 10. these numbers are not used: 12.'),
    ('8*3', 'wrong_numbers', -4, 'these numbers are not on the cards: 8. these numbers are not used: 1, 10, 12.'), ('24', 'wrong_numbers', -4, None),
    ('2**3', 'illegal', -3, 'the formula is not well formed.'), ('12+10+3-1)', 'illegal', -3, None),
    ('Q+10+3-A', 'illegal', -3, 'the formula has illegal characters.'), ('1+'*200 + '1', 'illegal', -3, 'the formula is too long.'),
    ('=24', 'no_formula', -3, 'no formula was found.'), ('', 'no_formula', -3, None), ('  ', 'no_formula', -3, None)])
def test_reward_table(formula, outcome, reward, feedback):
    v = judge(formula)
    assert (v.outcome, v.reward) == (outcome, reward) and type(v.reward) is float
    assert feedback is None or v.feedback == feedback
    plain = judge(formula, feedback='outcome')
    assert (plain.outcome, plain.reward, plain.feedback) == (outcome, reward, PLAIN.get(outcome, ''))

def test_division_by_zero_is_a_wrong_value():
    v = verify(says('4/(3-2-1)'), ['4', '3', '2', 'A'])
    assert (v.outcome, v.reward, v.value, v.feedback) == ('wrong_value', -1, None, 'the formula divides by zero.')

def test_the_published_float_check_would_refuse_this():
    assert verify(says('8/(3-8/3)'), ['3', '3', '8', '8']).correct

def test_unicode_operators():
    assert verify('{"cards": ["4","4","3","6"], "number": [4,4,3,6], "formula": "(6 − 4 + 4) × 4 ÷ 3"}', ['4', '4', '3', '6']).outcome == 'wrong_numbers'
    assert verify('{"formula": "6 × 4 × (4 − 3)"}', ['4', '4', '3', '6']).correct
    assert verify('{"formula": "6\\u00d74 ÷ (4 − 3)"}', ['4', '4', '3', '6']).correct

@pytest.mark.parametrize('text, format_ok, number_ok', [
    ('{"cards": ["A", "3", "Q", "10"], "number": [1, 3, 12, 10], "formula": "12+10+3-1=24"}', True, True),
    ('{"cards": ["A", "3", "Q", "10"], "number": [1, 3, 12, 10], "formula": "12+10+3-1=24",}', True, True),
    (' \n{"cards": ["A", "3", "Q", "10",], "number": [1, 3, 10, 10 , ], "formula": "12+10+3-1=24" ,\n}\n', True, False),
    ('{"cards": [], "number": [1, 3, "12", 10], "formula": "12+10+3-1=24"}', True, False),
    ('{"cards": [], "number": [true, 3, 12, 10], "formula": "12+10+3-1=24"}', True, False),
    ('{"formula": "12+10+3-1=24"}', False, None), ('{"cards": 1, "number": 2, "formula": "12+10+3-1=24"}', False, None),
    ('```json\n{"cards": ["A"], "number": [1, 3, 12, 10], "formula": "12+10+3-1=24"}\n```', False, True),
    ('Sure: "formula" : "12+10+3-1=24" or "formula": "1"', False, None)])
def test_reading(text, format_ok, number_ok):
    v = verify(text, HAND, '11-12-13')
    assert (v.correct, v.format_ok, v.number_ok) == (True, format_ok, number_ok)

@pytest.mark.parametrize('text', ['', ' ', 'null', '[]', '{}', '{"formula": 24}', '{"formula": null}', '24', '12+10+3-1=24', '"formula": "12+10', '{"formula":', 'NaN'])
def test_no_formula(text): assert verify(text, HAND).outcome == 'no_formula'

FOUR = ['4', '4', '3', '6']
FORM = lambda f, escape=False: json.dumps(dict(cards=FOUR, number=[4, 4, 3, 6], formula=f), ensure_ascii=escape)
GOOD, BAD, TEMPLATE = FORM('6×4×(4−3)', True).replace('(4', '(\\u0034'), FORM('6+4+4+3=24'), game.PROMPT.rpartition('\n')[2].format()
HINT = prompt(FOUR)[0]['content']

@pytest.mark.parametrize('dress', [
    '{A}', ' \r\n{A}\r\n', '\ufeff{A}', '\u200b{A}\u200b', '```json\n{A}\n```', '```\r\n{A}\r\n```', 'The answer is {A}.', '"{A}"', '({A})', '[{A}]', '{{"answer": {A}}}',
    'So {{"answer": {A}}}', '{{"a": [{{"b": {A}}}]}}', '```json\n{{"answer": {A}}}\n```', '<answer>{A}</answer>', '\\boxed{{{A}}}', '{A} That is 24.', '{P}{A}',
    '<think>{D}</think>{A}', '<think>\n{D}\n</think>\n\n{A}', '<THINK>{D}</THINK>{A}', '<thinking>{D}</thinking>{A}', '<Reasoning effort="high">{D}</Reasoning>{A}', '<thought>{D}</thought>{A}',
    '[THINK]{D}[/THINK]{A}', '<|begin_of_thought|>{D}<|end_of_thought|>{A}', '<|START_THINKING|>{D}<|END_THINKING|>{A}', '<seed:think>{D}</seed:think>{A}', '<think/>{A}', '<think></think>{A}',
    '<|channel|>analysis<|message|>{D}<|end|><|start|>assistant<|channel|>final<|message|>{A}', '<|channel>thought\n{D}<channel|>{A}',
    '{D}</think>{A}', '<think>a<think>{D}</think>b</think>{A}', '<think>{D}</think>hm<think>{D}</think>{A}', '<think>{D}</think>{D}<think>x</think>{A}', '<think>{A}</think>{A}',
    '<think>{D}</think>```json\n{A}\n```', '<think>{D}</think>{{"answer": {A}}}', '<scratchpad>{D}</scratchpad>{A}', '<think>{T}</think>{A}',
    '{T}\n{A}', '{H}\n{A}', '{A}\nas in {T}', 'Form: {T}. Answer: {A}', '```json\n{T}\n```\n```json\n{A}\n```', '{D} is wrong, so {A}', '{{"draft": {D}, "answer": {A}}}', '[{D}, {A}]'])
@pytest.mark.parametrize('answer', [GOOD, GOOD[:-1] + ',}', GOOD.replace(', "formula"', ' ,\r\n\t"formula" '), FORM('@').replace('@', r'6*4\/(4-3)')])
def test_one_reader_for_every_dress(dress, answer):
    text = dress.format(A=answer, D=BAD, T=TEMPLATE, H=HINT, P='word '*2000)
    v = verify(text, FOUR)
    assert (v.outcome, v.number_ok) == ('correct', True), (text, v)
    assert verify(text + ' '*5000, FOUR).outcome == 'correct' # too long for the JSON parser

@pytest.mark.parametrize('text', [
    '<think>{A}', '<think>{A}</think>', '<think>{A}</think> so that is it', '<THINK>{A}', '<thinking>{A}', '<reasoning>{A}', '[THINK]{A}', '<think>{D}</think><think>{A}', '<think>{A}</think>{A}<think>',
    '{A}<think>or?</think>', '<think><think>{A}</think>', '<think>{A}</think>{T}', '<|begin_of_thought|>{A}', '<|channel|>analysis<|message|>{A}', '<|channel>thought\n{A}', '{T}', '{H}', '```json\n{T}\n```', '{A} {{"formula": null}}', '{A} {{"formula": ["6*4*(4-3)"]}}',
    '{A} {{"formula": "6*4*(4-', '{{"formula": "6*4*(4-3)", "formula": 24}}', '{{"formula": "6*4*(4-3)", "formula": {{}}}}', '{{"formula": ["6*4*(4-3)"]}}', "{{'formula': '6*4*(4-3)'}}",
    '{{"formulas": "6*4*(4-3)"}}', '{{"answer": "6*4*(4-3)"}}', '\\boxed{{6*4*(4-3)}}', '<answer>6*4*(4-3)</answer>', '6*4*(4-3)=24'])
def test_no_answer_no_reward(text):
    text = text.format(A=GOOD, D=BAD, T=TEMPLATE, H=HINT)
    for t in (text, text + ' '*5000, 'word '*2000 + text): assert verify(t, FOUR).outcome == 'no_formula', t

@pytest.mark.parametrize('text', ['<think>{A}</think>{D}', '{A}\n{D}', '[{A}, {D}]', '{{"draft": {A}, "answer": {D}}}', '{D}{A}{D}', '```json\n{A}\n```\nNo:\n```json\n{D}\n```',
                                  '{{"formula": "6*4*(4-3)", "formula": "6+4+4+3"}}', 'x {{"formula": "6*4*(4-3)", "formula": "6+4+4+3"}}', '<think>{D}</think>{A}<think>{A}</think>{D}'])
def test_a_right_draft_does_not_pay_for_a_wrong_answer(text):
    text = text.format(A=GOOD, D=BAD)
    for t in (text, text + ' '*5000): assert verify(t, FOUR).outcome == 'wrong_value', t

def test_reading_details():
    read = lambda t: game.read_answer(t)[0]
    assert read(r'{"formula": "6\"*4"}') == read(r'x {"formula": "6\"*4"} y') == '6"*4'
    assert read(r'{"formula": "6\q4"}') == read(r'x {"formula": "6\q4"}') == r'6\q4' # no escape of JSON's: left as it is, and illegal
    assert read('{"formula": "6*\n4"}') == read('x {"formula": "6*\n4"}') == '6*\n4'
    assert read(r'{"note": "\"formula\": \"1+2\"", "formula": "6*4"}') == '6*4'
    assert read('1 < 2, {"formula": "6*4"} > 3') == '6*4' and read('a thinker\'s <thinker> {"formula": "6*4"}') == '6*4'
    assert game.read_answer('{"number": [1, 2], "formula": "1+2"} or {"number": [6, 4,], "formula": "6*4"}') == ('6*4', [6, 4], False)
    assert game.read_answer('<think>x</think> ' + FORM('6*4'))[2] is True and game.read_answer('{"answer": %s}' % FORM('6*4'))[2] is False

@pytest.mark.parametrize('right', ['', '=24', '=99', '=25=24', ' = x', '='])
def test_what_follows_the_equals_sign_is_not_looked_at(right): assert verify(FORM('6*4*(4-3)' + right), FOUR).reward == 5

def test_the_reader_before_agrees_on_plain_answers():
    texts = [FORM(f) for f in ('6*4*(4-3)', '6+4+4+3=24', '2**3', '', '6*4')] + ['hm', 'So ' + FORM('6*4*(4-3)')]
    assert [verify_before(t, FOUR) for t in texts] == [verify(t, FOUR) for t in texts]

def test_generated_and_mutated_answers():
    found = tried(12_000, 6_000, seed=1)
    assert (found['exceptions'], found['disagreements'], found['example']) == (0, 0, None) and min(found['outcomes'].values()) > 0

def test_second_opinion_is_strict():
    assert exact('6*4*(4-3)') == ([6, 4, 4, 3], 24) or sorted(exact('6*4*(4-3)')[0]) == [3, 4, 4, 6]
    assert [exact(f) for f in ('2**3', '7//2', '-1+2', '007', '1234567', '2(3)', '1.5', 'x', '', '('*21 + '1' + ')'*21)] == [None]*10
    assert exact('1/(2-2)+3')[1] is None

def test_forgotten_rule_and_forgotten_arithmetic_differ():
    rule_gone, sums_gone = answer(HAND, '10', '10+10+3+1'), answer(HAND, '11-12-13', '12+10+3+1')
    a, b = (verify(t, HAND, '11-12-13') for t in (rule_gone, sums_gone))
    assert (a.outcome, a.number_ok, b.outcome, b.number_ok) == ('wrong_numbers', False, 'wrong_value', True)
    assert verify(rule_gone, HAND, '10').correct

MB = 1_000_000
ENORMOUS = dict(parens='('*MB, json_parens='{"formula": "' + '('*(MB - 20) + '"}', brackets='{"a": ' + '['*MB, braces='{"a":'*(MB//5), small_deep='{"a":' + '['*4000,
                digits='{"formula": "' + '9'*MB + '"}', number='{"number": [' + '9'*MB + '], "formula": "1"}', short_int='{"number": [' + '9'*4000 + '], "formula": "1"}',
                keys='"formula": "'*(MB//12), half='"formula"'*(MB//9), spaces='"formula"' + ' '*MB, gaps='"formula": '*(MB//11), commas='{' + ', '*2000, comma='{' + ',' + ' '*4000,
                numbers='"number": [' + '1,'*(MB//2), open_lists='"number": ['*(MB//11), plus='{"formula": "' + '1+'*(MB//2) + '"}', nul='\0'*MB, lone='\ud800'*MB, equals='{"formula": "' + '='*MB + '"}')

@pytest.mark.parametrize('name', ENORMOUS)
def test_enormous_answers(name):
    v = game.verify(ENORMOUS[name], HAND)
    assert v.outcome in ('illegal', 'no_formula', 'wrong_numbers') and len(v.feedback) < 200 and len(v.formula or '') <= game.MAX_FORMULA

junk = st.one_of(st.text(), st.text('{}[]",:=formulanumber0123456789+-*/() \\\n'), st.binary().map(lambda b: b.decode('latin1')),
                 st.binary().map(lambda b: b.decode('utf8', 'surrogateescape')), st.text(st.characters(), max_size=30).map(says),
                 st.text('{}[]",:0123456789', max_size=30).map('{{"number": [{}], "formula": "1+2"'.format))

@given(junk, st.sampled_from([HAND, ['K', 'Q', 'J', '10']]), st.sampled_from(['full', 'outcome']))
@example('{"formula": "1", "formula": {}}', HAND, 'full')
@example('{"number": [NaN, Infinity, 1e999, -0.0], "formula": "1"}', HAND, 'full')
@settings(max_examples=500, deadline=None, derandomize=True)
def test_verify_never_raises(text, cards, feedback):
    v = verify(text, cards, '11-12-13', feedback=feedback)
    assert v.outcome in OUTCOMES and v.reward in (5, -1, -2, -3, -4) and bool(v.feedback) == (not v.correct)
    assert v == verifier._judge(text, tuple(cards), '11-12-13', 24, feedback)

@pytest.mark.parametrize('bad', [None, 3, b'24', ['24'], {}])
def test_not_a_string(bad):
    with pytest.raises(TypeError, match='expected a string'): verify(bad, HAND)

def test_wrong_card_rule_feedback():
    with pytest.raises(ValueError, match="'1' is no rank; expected one of A 2"): verify('x', ['1', '2', '3', '4'])
    with pytest.raises(ValueError, match="'Z' is no rank"): prompt(['Z', '2', '3', '4'])
    for rule in ('x', '11-12', '0-1-2', (1, 2), None, [1, 2, 'q'], ''):
        with pytest.raises(ValueError, match='three positive integers'): verify('x', HAND, rule)
    with pytest.raises(ValueError, match='full, outcome'): verify('x', HAND, feedback='loud')

def test_rules_alike():
    for same in ('11-12-13', (11, 12, 13), [11, 12, 13], ('11', '12', '13')): assert judge('12+10+3-1', same).correct
    assert values(['J', 'Q', 'K', 'A'], '2-3-5') == [2, 3, 5, 1] and values(['K'], 10) == [10]

def test_unsolvable_hand():
    ones = ['A']*4
    assert solve(values(ones)) == [] and verify(says('1+1+1+1'), ones).outcome == 'wrong_value'
    with pytest.raises(ValueError, match=r'no formula over \[1, 1, 1, 1\] equals 24'): play([ones], None)
    with pytest.raises(ValueError, match=r'no formula over'): GeneralPoints().reset(options=dict(cards=ones))

def test_feedback_is_made_of_the_phrases():
    for f in ('12+10+3+1', '2**3', '8*3', 'Q', '=', '10+10+3+1', '1/(1-1)'):
        text = feedback_turn(judge(f))['content']
        for p in sorted(PHRASES, key=len, reverse=True): text = text.replace(p, '')
        assert not set(text) - set('0123456789/-, .'), text
    with pytest.raises(ValueError, match='no feedback'): feedback_turn(judge('12+10+3-1'))

def test_outcome_feedback_leaks_no_number():
    assert not any(c.isdigit() for t in PLAIN.values() for c in t)


# --- episodes -------------------------------------------------------------------------------------------------

def test_env_checker():
    for kw in (dict(), dict(rule='11-12-13', feedback='outcome', attempts=2), dict(hands=hands('val', n=5))):
        check_env(GeneralPoints(**kw), skip_render_check=True)

def test_episode_ends():
    env = GeneralPoints('11-12-13')
    obs, info = env.reset(options=dict(cards=HAND))
    assert obs == prompt(HAND, '11-12-13')[0]['content'] and info == dict(cards=HAND, rule='11-12-13', attempt=0)
    ends = [env.step(says('12+10+3+1')) for _ in range(5)]
    assert [(r, t, tr) for _, r, t, tr, _ in ends] == [(-1, False, False)]*4 + [(-1, False, True)]
    assert ends[0][0] == 'This attempt failed: the formula equals 26, not 24. Try again.'
    assert ends[-1][4]['attempt'] == 5 and set(Verdict.__dataclass_fields__) <= set(ends[-1][4])
    with pytest.raises(RuntimeError, match='call reset first'): env.step('x')

def test_episode_right_at_the_last_attempt_is_terminated_not_truncated():
    env = GeneralPoints('11-12-13', attempts=2)
    env.reset(options=dict(cards=HAND))
    env.step('x')
    obs, reward, terminated, truncated, info = env.step(says('12+10+3-1'))
    assert (obs, reward, terminated, truncated, info['outcome']) == ('', 5, True, False, 'correct')

def test_reset_seeds_and_options():
    a, b = GeneralPoints(), GeneralPoints()
    first = a.reset(seed=7)[1]['cards']
    assert first == b.reset(seed=7)[1]['cards'] and solvable(values(first))
    assert [a.reset()[1]['cards'] for _ in range(5)] == [b.reset()[1]['cards'] for _ in range(5)]
    assert a.reset(options=dict(cards=HAND, rule='11-12-13'))[1]['rule'] == '11-12-13'
    assert a.reset(seed=1)[1]['rule'] == '10'
    with pytest.raises(KeyError, match='expected cards or rule'): a.reset(options=dict(target=3))
    with pytest.raises(ValueError, match='attempts=0'): GeneralPoints(attempts=0).reset()

def test_env_observations_fit_the_space():
    env = GeneralPoints()
    assert env.reset(seed=0)[0] in env.observation_space
    assert env.step('{"formula": "' + '+'.join(map(str, range(10, 70))) + '"}')[0] in env.observation_space
    assert isinstance(env, gymnasium.Env) and '6 × 4' in env.action_space

LOUD = ['{"formula": "6+4+4+3"}', 'no idea', '{"formula": "6*4*(4-3)"}', '{"formula": "%s"}' % '*'.join(['999999']*28), '{"formula": "6/4/4/3"}', '{"formula": "6/(4-4)"}', '{"number": [1], "formula": "6*4"}']

@pytest.mark.parametrize('kind', [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize('mode', list(AutoresetMode))
def test_vector_environments(kind, mode):
    envs = kind([lambda: GeneralPoints(hands=[['4', '4', '3', '6']], attempts=3)]*3, autoreset_mode=mode, **({} if kind is SyncVectorEnv else dict(shared_memory=False)))
    obs, info = envs.reset(seed=0)
    assert obs == (prompt(['4', '4', '3', '6'])[0]['content'],)*3 and list(info['cards'][1]) == ['4', '4', '3', '6']
    rng = random.Random(0)
    for _ in range(30):
        said = rng.choices(LOUD, k=3)
        _, reward, over, cut, info = envs.step(tuple(said))
        for k in set(info) - {f'_{k}' for k in info} - {'final_info', 'final_obs'}: assert len({type(x) for x, there in zip(info[k], info[f'_{k}']) if there}) == 1, k
        if mode == AutoresetMode.DISABLED and (over | cut).any(): envs.reset(options=dict(reset_mask=over | cut))
    start = time.monotonic()
    envs.close()
    assert time.monotonic() - start < 20

def test_vector_infos_keep_fractions_and_huge_values():
    envs = gymnasium.make_vec(ENV_ID, num_envs=4, vectorization_mode='sync', hands=[['4', '4', '3', '6']])
    envs.reset(seed=0)
    *_, info = envs.step((LOUD[1], LOUD[4], LOUD[0], LOUD[3]))
    assert info['value'].tolist() == ['', '1/8', '17', str(999999**28)] and info['number_ok'].dtype == info['format_ok'].dtype == bool
    assert info['formula'].tolist()[:2] == ['', '6/4/4/3'] and info['attempt'].tolist() == [1]*4

def test_made_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kw in (dict(), dict(attempts=1), dict(attempts=2), dict(render_mode='ansi'), dict(target=None, cards=3, ranks=['A', '2', '3', '4']), dict(rule=(2, 3, 5)), dict(hands=[dict(cards=['4', '6'], target=10)])):
            env = gymnasium.make(ENV_ID, **kw)
            check_env(env.unwrapped)
            assert env.reset(seed=4)[0] == gymnasium.make(ENV_ID, **kw).reset(seed=4)[0]
    code = "import rlsft_nb.game, gymnasium; print(gymnasium.make('rlsft_nb/GeneralPoints-v0').reset(seed=1)[1]['rule'])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout == '10\n'

def test_infos_are_copies():
    env = GeneralPoints(hands=[HAND])
    _, info = env.reset(seed=0)
    info['cards'].append('K')
    _, _, _, _, later = env.step('x')
    later['cards'].clear()
    assert env.step('x')[4]['cards'] == HAND == env.cards and env.hands == [HAND]

def test_a_single_attempt_terminates():
    for said, reward in ((says('10+10+3+1'), 5), ('x', -3)):
        env = GeneralPoints(hands=[HAND], attempts=1)
        env.reset()
        assert env.step(said)[1:4] == (reward, True, False)

def test_environment_arguments():
    for kw, words in ((dict(hands=[]), 'hands='), (dict(feedback='loud'), 'full, outcome'), (dict(render_mode='human'), 'render_mode='), (dict(target='x'), "target='x'"), (dict(target=[]), 'target='),
                      (dict(cards=7), 'cards=7'), (dict(ranks=['B']), "'B' is no rank"), (dict(rule='1-2'), 'three positive')):
        with pytest.raises(ValueError, match=words): GeneralPoints(**kw)

def test_render():
    env = GeneralPoints(hands=[HAND], render_mode='ansi')
    assert env.render() == ''
    env.reset()
    env.step('hm')
    assert env.render() == f"user: {prompt(HAND)[0]['content']}\nassistant: hm\nuser: This attempt failed: no formula was found. Try again."
    assert GeneralPoints().render() is None

def test_targets_of_hands():
    env = GeneralPoints(target=None, cards=3)
    for s in range(20):
        obs, info = env.reset(seed=s)
        assert f"equals {info['target']} " in obs and solvable(values(info['cards']), info['target']) and len(info['cards']) == 3
    _, info = env.reset(options=dict(cards=['4', '6'], target=10))
    assert info['target'] == 10 and env.step(says('4+6'))[1] == 5
    assert env.reset(seed=1, options=dict(cards=['4', '6']))[1]['target'] in (2, 10, 24)
    with pytest.raises(ValueError, match='equals 11'): env.reset(options=dict(cards=['4', '6'], target=11))
    mixed = [dict(cards=['4', '6'], target=10), dict(cards=['K', '2'], target=26, rule='11-12-13'), ['4', '4', '3', '6']]
    seen = [e.solved for e in play(mixed, lambda chats: [says({'10': '4+6', '26': 'x', '24': '6*4*(4-3)'}[c[0]['content'].split('equals ')[1].split()[0]]) for c in chats], attempts=2)]
    assert seen == [True, False, True]
    with pytest.raises(ValueError, match='brings no target'): play([['4', '6']], None, target=None)

def player(chats):
    "Answers that depend on the chat alone: sometimes right, sometimes each kind of wrong."
    out = []
    for c in chats:
        cards = json.loads(c[0]['content'].split('Cards: ')[1].split('\n')[0])
        rng = random.Random(json.dumps(c))
        good = answer(cards, '11-12-13', rng.choice(solve(values(cards, '11-12-13'))))
        out.append(rng.choice([good, good.replace('+', '-'), good + '}', says('1+2'), 'hm']))
    return out

@pytest.mark.parametrize('feedback', ['full', 'outcome'])
def test_play_equals_the_environment_hand_by_hand(feedback):
    drawn = hands('test', '11-12-13', n=60)
    together = play(drawn, player, '11-12-13', feedback=feedback)
    env = GeneralPoints('11-12-13', feedback=feedback)
    for cards, e in zip(drawn, together):
        assert e == play([cards], player, '11-12-13', feedback=feedback)[0]
        obs, _ = env.reset(options=dict(cards=cards))
        chat, rewards, over = [], [], False
        while not over:
            chat.append(dict(role='user', content=obs))
            said = player([chat])[0]
            chat.append(dict(role='assistant', content=said))
            obs, r, terminated, truncated, _ = env.step(said)
            rewards.append(r)
            over = terminated or truncated
        assert chat == e.messages and rewards == [v.reward for v in e.verdicts] and e.solved == terminated
        assert e.answers == [m['content'] for m in chat if m['role'] == 'assistant']
    assert {len(e.verdicts) for e in together} == {1, 2, 3, 4, 5}

def test_play_drops_finished_hands_and_only_appends():
    drawn, seen = hands('val', '11-12-13', n=40), {}
    def watch(chats):
        for c in chats:
            now = json.dumps(c)[:-1]
            assert c[-1]['role'] == 'user' and now.startswith(seen.get(id(c), ''))
            seen[id(c)] = now
        sizes.append(len(chats))
        return player(chats)
    sizes = []
    done = play(drawn, watch, '11-12-13')
    assert sizes == [sum(len(e.verdicts) > i for e in done) for i in range(len(sizes))] and len(seen) == 40

def test_play_edges():
    assert play([], None) == []
    with pytest.raises(ValueError, match='answer_fn: 1 answers for 2 chats'): play(hands('val', n=2), lambda c: ['x'])
    with pytest.raises(ValueError, match='attempts=0'): play(hands('val', n=1), player, attempts=0)


# --- hands and rows -------------------------------------------------------------------------------------------

def test_hand_file_is_what_the_code_makes():
    data = hand_files.files('rlsft_nb').joinpath('data', 'hands.json').read_bytes()
    assert hands_bytes(build_hands()) == data and hashlib.sha256(data).hexdigest() == game.HANDS_SHA

def test_hand_file_damaged(monkeypatch):
    for kept in (hand_files._hand_file, hand_files._hands): kept.cache_clear()
    monkeypatch.setattr(hand_files, 'HANDS_SHA', '0'*64)
    with pytest.raises(ValueError, match='hands.json: sha256 is'): hands('test')
    monkeypatch.undo()
    assert hands('test')

def test_parts_are_disjoint_and_whole():
    parts = {p: multisets(p) for p in PARTS}
    assert parts == split_multisets()
    counts = Counter(m for ms in parts.values() for m in ms)
    assert set(counts.values()) == {1} and set(counts) == {m for m in EVERY if solvable(m)}

@pytest.mark.parametrize('part, rule, face', list(product(['val', 'test', 'kept'], RULES, [False, True])))
def test_cells(part, rule, face):
    cell, allowed = hands(part, rule, face), set(multisets(part))
    assert len(cell) == len({tuple(h) for h in cell}) == game.SIZES[part]
    tuned = {*multisets('sft'), *multisets('rl')}
    for h in cell:
        m = tuple(sorted(values(h, rule)))
        assert m in allowed and m not in tuned and solvable(m)
        assert not face or any(c in 'JQK' for c in h)
    assert any(not set(h) & set('JQK') for h in cell) != face

def test_authors_draw():
    a, b = hands('authors'), hands('authors', '11-12-13', face=True)
    assert len(a) == len(b) == 234
    assert all(solvable(values(h)) for h in a) and all(solvable(values(h, '11-12-13')) and set(h) & set('JQK') for h in b)
    assert {i for h in b for i, c in enumerate(h) if c in 'JQK'} == {0, 1, 2, 3}

def test_hands_arguments():
    assert hands('test', (11, 12, 13), True, 5) == hands('test', '11-12-13', True)[:5]
    for bad, words in ((dict(part='sft'), 'val, test, kept, authors'), (dict(part='test', rule='1-2-3'), 'expected one of 10, 11-12-13'),
                       (dict(part='authors', face=True), "cell='face': expected one of any")):
        with pytest.raises(KeyError, match=words): hands(**bad)
    with pytest.raises(ValueError, match='n=1001: test has 1000 hands'): hands('test', n=1001)
    with pytest.raises(KeyError, match='expected one of sft, rl'): multisets('train')
    hands('test')[0].append('x')
    assert len(hands('test')[0]) == 4 # a caller's changes stay with the caller

def test_deal():
    allowed = set(multisets('rl'))
    drawn = deal(random.Random(0), 50, allowed=allowed, face=True)
    assert drawn == deal(random.Random(0), 50, allowed=allowed, face=True)
    assert all(tuple(sorted(values(h))) in allowed and set(h) & set('JQK') for h in drawn)
    with pytest.raises(ValueError, match='0 of 1 hands'): deal(random.Random(0), 1, allowed=set())

@pytest.mark.parametrize('rule, target, solutions', [('10', 24, 1), ('11-12-13', 24, 3), ((2, 3, 5), 10, 2)])
def test_dataset(rule, target, solutions):
    kw = dict(n=40, part='sft', rule=rule, seed=3, solutions=solutions, target=target)
    rows = dataset(**kw)
    assert rows.column_names == ['prompt', 'completion', 'cards', 'rule', 'target'] and len(rows) == 40
    assert list(rows) == list(dataset(**kw)) == list(dataset(**kw, stream=True)) != list(dataset(**{**kw, 'seed': 4}))
    allowed = set(multisets('sft'))
    for r in rows:
        v = verify(r['completion'][0]['content'], r['cards'], r['rule'], r['target'])
        assert v.correct and v.format_ok and v.number_ok and tuple(sorted(values(r['cards'], rule))) in allowed
        assert r['prompt'] == prompt(r['cards'], rule, target) and r['completion'][0]['role'] == 'assistant'
    most = Counter(zip(map(tuple, rows['cards']), (c[0]['content'] for c in rows['completion'])))
    assert solutions == 1 or max(Counter(map(tuple, rows['cards'])).values()) > 1
    assert len(most) > 30

def test_dataset_without_end():
    rows = iter(dataset(None, stream=True))
    assert len([next(rows) for _ in range(500)]) == 500
    with pytest.raises(ValueError, match='stream=True'): dataset(None)
    with pytest.raises(ValueError, match='n=0'): dataset(0)
    with pytest.raises(KeyError, match='train'): dataset(3, part='train')
    with pytest.raises(ValueError, match='target=999983'): dataset(3, target=999983)


# --- other games ----------------------------------------------------------------------------------------------

SMALL = ['A', '2', '3', '4', '5']

@pytest.mark.parametrize('size', [1, 2, 3, 4, 5])
def test_solver_of_any_size_is_complete(size):
    rng = random.Random(size)
    for _ in range({5: 6}.get(size, 30)):
        m = sorted(rng.choice([1, 1, 2, 3, 5, 7, 10, 13, 20]) for _ in range(size))
        got = reach(tuple(Fraction(x) for x in m)) if size > 1 else {Fraction(m[0])}
        for t in range(1, 60): assert solvable(m, t) == (t in got) == bool(solve(m, t) if t % 10 == 0 else solvable(m, t)), (m, t)
        for t in (10, 24):
            for f in solve(m, t):
                used, value, fault = evaluate(f)
                assert (sorted(used), value, fault) == (m, t, '')

def test_six_numbers():
    for m in ((8, 9, 10, 11, 12, 13), (1, 2, 3, 4, 5, 6), (1, 1, 5, 5, 5, 24)):
        forget()
        start = time.process_time()
        found = solve(list(m))
        took = time.process_time() - start
        assert took < 3 and len({normal(f) for f in found}) == len(found) and all(evaluate(f)[1] == 24 and sorted(evaluate(f)[0]) == list(m) for f in found) # a second where nothing else runs
    assert solvable([8, 9, 10, 11, 12, 13], 7919) and not solvable([8, 9, 10, 11, 12, 13], 999_983)

def test_six_number_caches_are_bounded():
    forget()
    rng, before = random.Random(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300): solvable([rng.randint(1, 20) for _ in range(6)], rng.randint(1, 100))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000 # KiB

def test_defaults_are_the_papers_game():
    sha = lambda x: hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()[:16]
    rows = [list(dataset(60, p, r, s, k, target=t)) for p, r, s, k, t in (('sft', '10', 0, 1, 24), ('sft', '11-12-13', 3, 3, 24), ('rl', '10', 1, 2, 24), ('sft', '2-3-5', 3, 2, 10), ('val', '10', 0, 1, 24))]
    env = GeneralPoints()
    first, said = env.reset(seed=5), [env.step(a)[:4] for a in ('x', '{"formula":"1+2"}')]
    assert [sha(x) for x in (rows, [hands(p, r, f) for p in ('val', 'test', 'kept') for r in RULES for f in (0, 1)],
            [deal(random.Random(i), 20, r, face=f, target=t) for i, (r, f, t) in enumerate([('10', False, 24), ('11-12-13', True, 24), ('10', False, 10)])],
            [split_multisets(), split_multisets(10), split_multisets(24, 20, 3)], [prompt(HAND, r, t) for r in RULES for t in (24, 7)], [answer(HAND, '10', 'x')], [first, said])] == [
        'bbe45be2e6d97ac5', 'e8677927c75931d8', 'd1739ac750176e41', 'e27c8e4c18dd291b', '0b820e73a69f48fc', 'c4c9558546a2c62a', 'ded65faec27ace83'] # made before there were other games

@pytest.mark.parametrize('cards, ranks', [(2, None), (3, None), (3, SMALL), (4, SMALL), (4, ['A', '2', '5', '12', '20', 'K']), (5, SMALL), (6, ['A', '2', '3', 'K'])])
@pytest.mark.parametrize('target', [24, 10, None, range(5, 30)])
def test_other_games(cards, ranks, target):
    kw = dict(cards=cards, ranks=ranks)
    one, deck = isinstance(target, int), deck_of(ranks)
    parts = {p: set(multisets(p, **kw)) for p in PARTS}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) and all(len(m) == cards for p in parts.values() for m in p)
    for rule in RULES:
        try: dealt = deal(random.Random(0), 5, rule, target=target, **kw)
        except ValueError: assert one; dealt = []
        for h in (*dealt, *hands('test', rule, n=None, target=target, **kw)[:20], *hands('val', rule, target=target, **kw)[:20]):
            h = dict(cards=h, target=target) if one else h
            vals = values(h['cards'], rule)
            assert set(h['cards']) <= set(deck) and len(vals) == cards and solvable(vals, h['target']) and (one or h['target'] in (target or ANY))
        assert all(tuple(sorted(values(h if one else h['cards'], rule))) in parts['test'] for h in hands('test', rule, target=target, **kw)[:50])
        assert hands('test', rule, target=target, **kw) == hands('test', rule, target=target, **kw)
        try: rows = dataset(6, 'sft', rule, target=target, solutions=2, **kw)
        except ValueError as e: assert 'no hand of' in str(e) and one; continue
        assert list(rows) == list(dataset(6, 'sft', rule, target=target, solutions=2, stream=True, **kw))
        for r in rows:
            assert verify(r['completion'][0]['content'], r['cards'], r['rule'], r['target']).correct and tuple(sorted(values(r['cards'], rule))) in parts['sft']
            assert f"equals {r['target']} " in r['prompt'][0]['content']
        assert reward_func(completions=rows['completion'], **{k: rows[k] for k in ('cards', 'rule', 'target')}) == [5]*6

def test_four_cards_keep_the_packaged_split_whatever_the_target():
    for target in (10, None):
        for p in ('test', 'val'):
            for h in hands(p, n=100, target=target): assert tuple(sorted(values(h if target else h['cards']))) in set(multisets(p))

def test_other_games_refuse():
    for f in (lambda: deal(random.Random(0), 1, cards=1), lambda: multisets('sft', cards=7), lambda: hands('test', cards=True), lambda: dataset(1, cards='3'), lambda: split_multisets(cards=0)):
        with pytest.raises(ValueError, match='cards='): f()
    for f in (lambda: deal(random.Random(0), 1, ranks=['0']), lambda: dataset(1, ranks=['1000']), lambda: GeneralPoints(ranks=['x']), lambda: deck_of(['A', '02']), lambda: deck_of([])):
        with pytest.raises(ValueError, match='rank'): f()
    for f in (lambda: targets_of(0), lambda: targets_of([0]), lambda: targets_of(()), lambda: deal(random.Random(0), 1, target='x'), lambda: dataset(1, target=[True])):
        with pytest.raises(ValueError, match='target='): f()
    with pytest.raises(KeyError, match='expected one of val, test, kept'): hands('authors', cards=3)
    with pytest.raises(ValueError, match='0 of 1 hands'): deal(random.Random(0), 1, cards=2, target=999)
    assert makes([2, 3], (9, 6)) and not makes([2, 3], 7) and values(['20', '11', '999']) == [20, 11, 999]


# --- tricks and the picture -----------------------------------------------------------------------------------

def test_ours_is_not_fooled():
    for f in (lambda a, c, t: verify(a, c, target=t).reward, lambda a, c, t: verify(a, c, target=t).correct, lambda a, c, t: reward_func(completions=[[dict(role='assistant', content=a)]], cards=[c], target=[t])[0]):
        assert audit(f).faults == []
    table = cases()
    assert sum(not c['pay'] for c in table) >= 52 and sum(c['pay'] for c in table) >= 12 and len({c['what'] for c in table}) == len(table)

def test_formulas_of_the_table_are_tricks():
    for line in '\n'.join(FORMULAS.values()).splitlines():
        cards, f, _ = line.split(' | ')
        found = exact(f.partition('=')[0])
        assert not (found and sorted(found[0]) == sorted(map(int, cards.split())) and found[1] == 24), line

def test_audit_of_others():
    nothing, everything = audit(lambda a, c, t: 0), audit(lambda a, c, t: True)
    assert {r['fault'] for r in nothing} == {'', 'refuses'} and {r['fault'] for r in everything} == {'', 'pays'} and len(nothing.faults) + len(everything.faults) == len(cases())
    assert repr(everything).startswith('pays for 58 of 58 tricks, refuses 0 of 15 right answers, breaks on 0')
    bare = audit(lambda a, c, t: verify(says(a), c, target=t).reward, form=lambda f, cards: f) # a verifier of another form
    assert [r['what'] for r in bare.faults if r['pay'] is False] == [] and len(bare) < len(cases())
    assert [r['said'] for r in audit(lambda a, c, t: None)][:1] == ['raises TypeError']
    floats = audit(lambda a, c, t: (f := evaluate((game.read_answer(a)[0] or '').split('=')[0]))[2] == '' and sorted(f[0]) == sorted(map(int, c)) and float(f[1])*3/3 == t and f[1].denominator == 1)
    assert all(r['pay'] for r in floats.faults)

def test_audit_survives():
    def bad(a, c, t):
        if '**9' in a: time.sleep(60)
        if '!' in a: raise SystemExit
        if 'max' in a: resource.setrlimit(resource.RLIMIT_CPU, (0, 1)); sum(range(10**12))
        return verify(a, c, target=t).reward
    start = time.monotonic()
    found = {r['what']: r['said'] for r in audit(bad, seconds=3.).faults}
    assert found == {'a number that does not end': 'no end within 3 s', 'factorial': 'the process died', 'a function': found['a function']} and time.monotonic() - start < 40
    assert found['a function'] in ('the process died', 'no end within 3 s')

def test_draw_hand():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    said = lambda ax: [t.get_text() for t in ax.texts]
    ax = draw_hand(['3', '3', '8', '8'])
    assert {'= 24', '= 1/3', '= 8/3', '÷', '−'} <= set(said(ax)) and ax.get_title() == '+5: correct'
    for f in ('2**3', '', '6/(4-4)*3', '6×4×(4−3)=99', '1+1'): assert (draw_hand(FOUR, f).get_title() == '+5: correct') == (f[0:1] == '6' and '=99' in f)
    with pytest.raises(ValueError, match='no formula over'): draw_hand(['A']*4)
    assert len(draw_hand(['8', '9', '10', 'J', 'Q', 'K'], rule='11-12-13').texts) > 12
    plt.close('all')


# --- TRL ------------------------------------------------------------------------------------------------------

def test_reward_func_forms():
    good, bad = says('12+10+3-1'), says('10+10+3+1')
    turn = lambda text: dict(role='assistant', content=text)
    cols = dict(cards=[HAND]*2, rule=['11-12-13']*2, target=[24]*2, trainer_state=None, completion_ids=[[1], [2]])
    assert reward_func(['p']*2, [good, bad], **cols) == reward_func(None, [[turn(good)], [turn(bad)]], **cols) == [5, -4]
    retry = [turn(bad), dict(role='user', content='no'), turn(good)]
    assert reward_func(None, [retry, []], **cols) == [5, -3] and reward_func(None, [[turn(None)]]*2, **cols) == [-3, -3]
    assert reward_func(None, [bad], cards=[HAND]) == [5] and reward_func(None, [], cards=[]) == []
    with pytest.raises(KeyError, match='no column cards'): reward_func(None, [good])

nan = float('nan')
YES = says('12+10+3-1')

@pytest.mark.parametrize('cols', [
    dict(cards=[HAND, HAND], rule=['11-12-13']*2, target=[24]*2), dict(cards=[HAND, HAND], rule='11-12-13', target=24), dict(cards=HAND, rule='11-12-13'),
    dict(cards=np.array([HAND, HAND]), rule=np.array(['11-12-13']*2), target=np.array([24, 24])), dict(cards=(HAND, tuple(HAND)), rule=[(11, 12, 13), [11, 12, 13]], target=['24', ' 24 ']),
    dict(cards=np.array([HAND, HAND], dtype=object), rule=np.array([[11, 12, 13]]*2), target=np.array([24., 24.])), dict(cards=[np.array(HAND), HAND], rule=(11, 12, 13), target=np.int64(24)),
    dict(cards=[json.dumps(HAND), str(HAND)], rule='11-12-13', target=[24., '24.0']), dict(cards=['A 3 Q 10', 'A,3,Q,10'], rule='11-12-13', target=['24', None]), dict(cards='A, 3, Q, 10', rule='11-12-13', target=nan),
    dict(cards=[['A', 3, 'Q', 10], [1, '3', 'Q', np.int64(10)]], rule='11-12-13', target=[None, nan]), dict(cards=[HAND]*2, rule='11-12-13', target=None, trainer_state=object(), ids=[[1]])])
def test_reward_columns_of_any_type(cols):
    for c in ([YES, YES], np.array([YES, YES]), (YES, YES)): assert reward_func(completions=c, **cols) == [5, 5]
    assert reward_func(prompts=['p', 'p'], completions=[YES, 'hm'], **cols) == [5, -3]

@pytest.mark.parametrize('rule', [None, '10', 10, 10., '10.0', np.int64(10), [None, None], [10, '10'], [nan, (10, 10, 10)]])
def test_reward_rules_of_any_type(rule): assert reward_func(completions=[says('10+10+3+1')]*2, cards=[HAND]*2, rule=rule) == [5, 5]

@pytest.mark.parametrize('cols, words', [
    (dict(cards=[HAND]), 'cards: 1 values for 2'), (dict(cards=[HAND]*3), 'cards: 3 values for 2'), (dict(cards=[HAND]*2, rule=['10']), 'rule: 1 values for 2'),
    (dict(cards=[HAND]*2, target=[24]), 'target: 1 values for 2'), (dict(cards=[HAND]*2, target='twenty'), "target='twenty'"), (dict(cards=[HAND]*2, target=[True, 24]), 'target=True'),
    (dict(cards=[HAND]*2, target=24.5), 'target=24.5'), (dict(cards=[HAND]*2, target=[0, 24]), 'target=0'), (dict(cards=[HAND]*2, target=[[24], 24]), 'target='), (dict(cards=[HAND]*2, rule=['11-12', '10']), 'rule='),
    (dict(cards=[HAND]*2, rule=[True, True]), 'rule='), (dict(cards=[HAND]*2, rule=[10.5, 10]), 'rule='), (dict(cards=['A3Q10', 'A 3 Q 10']), "'A3Q10' is no rank"), (dict(cards=[[], HAND]), 'cards='),
    (dict(cards=['', 'A 3 Q 10']), 'cards='), (dict(cards=[{'a': 1}, HAND]), 'cards='), (dict(cards=[['a', '3', 'Q', '10'], HAND]), "'a' is no rank"), (dict(cards=7), 'cards=7'), (dict(cards=[7, 7]), None)])
def test_reward_columns_that_cannot_be_read(cols, words):
    with pytest.raises(ValueError, match=words): reward_func(completions=[YES]*2, **cols) if words else reward_func(completions=[YES], cards=[7.5])

def test_rows_of_another_task():
    assert reward_func(completions=[YES, 'x', YES], cards=[HAND, None, HAND], rule='11-12-13') == [5, None, 5]
    assert reward_func(completions=[YES, 'x'], cards=[HAND, nan], rule=['11-12-13', None], target=['24', None]) == [5, None] and reward_func(completions=['x'], cards=None) == [None]
    with pytest.raises(ValueError, match='completions=None'): reward_func([YES], cards=[HAND])
    with pytest.raises(ValueError, match='completions='): reward_func(completions=YES, cards=[HAND])

@pytest.mark.parametrize('said', [
    [dict(content=YES)], [dict(role='assistant', content=YES)], dict(role='assistant', content=YES), [dict(role='assistant', content=[dict(type='text', text=YES)])],
    [dict(content=[dict(type='text', text=YES[:9]), dict(type='text', text=YES[9:])])], [dict(role='assistant', content=[dict(type='image'), dict(text=YES), YES[:0]])],
    (dict(role='user', content='x'), dict(role='assistant', content=YES)), [dict(role='assistant', content=YES), dict(role='user', content='hm')]])
def test_completions_of_any_form(said): assert reward_func(completions=[said], cards=[HAND], rule='11-12-13') == [5]

def test_completions_that_cannot_be_read():
    for bad in (None, 5, [YES], [[YES]], b'x', [None]):
        with pytest.raises(ValueError, match='expected strings or chats'): reward_func(completions=[bad], cards=[HAND])
    assert reward_func(completions=[[], [dict(role='user', content=YES)], [dict(role='assistant')]], cards=[HAND]*3) == [-3]*3

@pytest.mark.parametrize('target', [24, '24', 24., np.int64(24), np.float32(24), np.array(24), Fraction(24), '24.0'])
def test_targets_of_any_type(target): assert judge('12+10+3-1', target=target).correct and prompt(HAND, target=target) == prompt(HAND) and whole(target, 'x') == 24

@pytest.mark.parametrize('target', [True, np.bool_(True), None, 24.5, '24.5', 'x', nan, float('inf'), [24], b'24', np.array([24]), '-24', '٢٤', -24., 0.])
def test_no_target(target):
    for f in (lambda: judge('1', target=target), lambda: prompt(HAND, target=target), lambda: answer(HAND, '10', '1', target)):
        with pytest.raises(ValueError, match='target='): f()

def test_cards_are_a_list():
    for bad in ('A3Q10', '4436', 'A 3 Q 10'):
        with pytest.raises(ValueError, match='expected a list of ranks'): verify('x', bad)
        with pytest.raises(ValueError, match='expected a list of ranks'): prompt(bad)
    assert prompt(tuple(HAND)) == prompt(np.array(HAND)) == prompt(HAND)

def tiny_lm():
    "A random Qwen2 and a byte tokenizer."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token='<|im_end|>', pad_token='<|pad|>', padding_side='left')
    tok.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)), tok

def test_trl_grpo_takes_the_reward(tmp_path):
    torch = pytest.importorskip('torch')
    trl = pytest.importorskip('trl')
    torch.manual_seed(0)
    lm, tok = tiny_lm()
    seen = []
    def spy(prompts, completions, **columns):
        seen.append(reward_func(prompts, completions, **columns))
        return seen[-1]
    args = trl.GRPOConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=8, logging_steps=1, report_to=[],
                          use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy='no', disable_tqdm=True)
    trainer = trl.GRPOTrainer(lm, spy, args=args, train_dataset=dataset(8, rule='11-12-13').remove_columns('completion'), processing_class=tok)
    trainer.train()
    assert trainer.state.global_step == 2 and [len(s) for s in seen] == [4, 4] and set(sum(seen, [])) == {-3.}


# --- the house ------------------------------------------------------------------------------------------------

def test_import_is_light():
    code = "import sys, rlsft_nb.game; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'trl')))"
    assert subprocess.run([sys.executable, '-c', code], stdin=subprocess.DEVNULL).returncode == 0

def test_bench_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BENCHES, 'game', lambda: dict(rows=[('a', 1.5, 'x/s')], ratios=dict(a_vs_b=2.)))
    assert bench_main(['game', '--json', str(tmp_path/'b.json')]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'ratio a_vs_b 2'
    assert json.loads((tmp_path/'b.json').read_text())['ratios'] == dict(a_vs_b=2.)
    for argv in ([], ['nothing'], ['game', '--jsn', 'x']):
        with pytest.raises(SystemExit) as e: bench_main(argv)
        assert e.value.code == 2
