"What is left of a base: questions that have one right answer, and a measure that sees a changed model and not an unchanged one."
import copy, json
import pytest, torch
from rlsft_nb import ability
from rlsft_nb.ability import *
from rlsft_nb.ability import ROUNDED
from rlsft_nb.game import solve, values
from rlsft_nb.models import load_lm
from rlsft_nb.parameters import load_params
from rlsft_nb.problems import Problem
from rlsft_nb.quiz import *
from rlsft_nb.texts import Texts, TextError, instruction_texts
from rlsft_nb import texts
from rlsft_nb.quiz import _last_word as last_word

# questions

def test_every_question_has_its_answer_and_does_not_say_it():
    quiz = written_quiz()
    assert len(quiz) == len({q['ask'] for q in quiz}) > 500 and quiz == written_quiz()
    for q in quiz:
        assert is_right(q, q['right']) and is_right(q, f'"{q["right"]}".') and is_right(q, f'It is "{q["right"]}". I think') and is_there(q, f'It is {q["right"]}, I think') and not is_right(q, f'{q["right"]} it is')
        assert q['kind'] == 'what is the first letter of the word' or not is_there(q, q['ask']), q

def test_sums_are_right():
    for q in written_quiz():
        if q['kind'] in ('sum', 'difference', 'product'):
            assert eval_sum(q['ask']) == int(q['right'])

def eval_sum(ask): # a second way to read it
    _, _, a, op, b = ask.split(' Answer')[0].rstrip('?').split()
    return {'+': int.__add__, '-': int.__sub__, 'times': int.__mul__}[op](int(a), int(b))

def test_hands_in_plain_words_are_judged_by_the_verifier():
    quiz = plain_quiz(load_params('tiny').game, 20)
    assert len(quiz) == 40 and {q['kind'] for q in quiz} == {'ID rule', 'OOD rule'}
    q = dict(ask='', cards=['3', '3', '8', '8'], rule='10', target=24)
    assert is_right(q, '3 3 8 8 gives 8/(3-8/3)=24') and not is_right(q, '8*3=24') and not is_right(q, '8/(3-8/3)=24.') and is_there(q, 'so 8/(3-8/3)=24.')

def test_hands_in_plain_words_are_of_the_models_game():
    quiz = plain_quiz(load_params('tiny', dict(game=dict(cards=3, targets=[1, 60]))).game, 50)
    assert {len(q['cards']) for q in quiz} == {3} and len({q['target'] for q in quiz}) > 20
    for q in quiz: assert f"{q['target']}" in q['ask'] and all(c in q['ask'] for c in q['cards']) and solve(values(q['cards'], q['rule']), q['target'])

def test_a_base_that_searches_may_answer_at_length():
    from rlsft_nb.quiz import answer_tokens
    from rlsft_nb.texts import corpus_texts
    tiny, digits, mine = (load_params('tiny', o) for o in ({}, dict(model=dict(path='digits')), dict(model=dict(source='folder', path='x'))))
    assert [answer_tokens(c) for c in (tiny, digits, mine)] == [48, 192, 48]
    own, other = ([t for d in corpus_texts(60, b).docs for _, t, _ in d['turns']] for b in ('digits', 'tiny'))
    assert any(', ' in t and ' so ' in t and '=' in t.split(' so ')[0] for t in own) and not any(', ' in t and ' so ' in t and '=' in t.split(' so ')[0] for t in other)

def test_carried_instructions_are_whole_and_a_damaged_file_is_told(monkeypatch, tmp_path):
    t = instruction_texts()
    assert len(t.docs) == 40 and t.about['licence'].startswith('Apache')
    (tmp_path/'data'/'old').mkdir(parents=True)
    for n in ('instructions.json', 'instructions.jsonl'): (tmp_path/'data'/'old'/n).write_bytes((texts.resources.files('rlsft_nb')/'data'/'old'/n).read_bytes())
    (tmp_path/'data'/'old'/'instructions.jsonl').write_text('{}')
    monkeypatch.setattr(texts.resources, 'files', lambda _: tmp_path)
    with pytest.raises(TextError, match='instructions.jsonl: sha256 is .*damaged'): instruction_texts()

# the measure

@pytest.fixture
def setting(pico, monkeypatch, tmp_path):
    "A pico base, a copy of it that is far off, and questions whose answers are the base's own."
    cfg = load_params('tiny', dict(model=dict(source='folder', path=str(pico['qwen2'])), eval=dict(max_new_tokens=6, batch=8), workers=1))
    lm, tok = load_lm(str(pico['qwen2']))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lm.parameters(): p.add_(.1*torch.randn(p.shape, generator=g))
    lm.save_pretrained(tmp_path/'off'); tok.save_pretrained(tmp_path/'off')
    asked = [dict(kind='toy', ask=f'Make {i} of 3 3 8 8.', right='') for i in range(24)]
    own = said(str(pico['qwen2']), cfg, asked, 'float32')
    quiz = [q | dict(right=last_word(s) or 'nothing') for q, s in zip(asked, own)]
    monkeypatch.setattr(ability, 'quiz_of', lambda cfg: quiz + [dict(kind='toy', ask='x', right='no model says this')])
    docs = Texts('toy', {}, [dict(text=f'Make {i} of 3 3 8 8, and then 7 7 2 {i}.') for i in range(12)])
    monkeypatch.setattr(ability, 'texts_of', lambda cfg: dict(text=docs, instructions=docs))
    return cfg, dict(base=str(pico['qwen2']), peak=str(pico['qwen2']), end=str(tmp_path/'off'), rl=str(pico['qwen2']))

def test_what_is_unchanged_has_lost_nothing_and_what_is_far_off_has(setting, tmp_path):
    cfg, at = setting
    found = measure_ability(at, cfg, tmp_path/'stage')
    n = len(found['known'])
    assert found['asked'] == 25 and 5 < n < 25 and json.loads(json.dumps(found)) == found
    assert all(found['right']['peak']) and all(found['right']['rl']) and sum(found['right']['end']) < n/2
    got = numbers(found)
    assert got['peak']['text forward']['value'] == pytest.approx(0, abs=1e-9) and got['rl']['text rise']['value'] == pytest.approx(0, abs=1e-9)
    assert got['end']['text forward']['lo'] > 10*abs(got[ROUNDED]['text forward']['value']) > 0 and got['end']['instructions reverse']['lo'] > 0
    assert found['sums']['end']['text'] == found['sums']['end']['instructions'] and len(found['sums']['end']['text']) == 12
    told = [r['verdict'] for r in ability_verdicts(found)]
    assert told[0] == 'holds' and told[2] == 'holds'
    files = {p: p.stat().st_mtime_ns for p in (tmp_path/'stage').rglob('*.json')}
    assert measure_ability(at, cfg, tmp_path/'stage') == found and files == {p: p.stat().st_mtime_ns for p in files} # a second time from what is kept

def test_a_base_that_answers_nothing_is_told(setting, monkeypatch, tmp_path):
    cfg, at = setting
    monkeypatch.setattr(ability, 'quiz_of', lambda cfg: [dict(kind='toy', ask='x', right='no model says this')])
    with pytest.raises(Problem, match='the base answers none of 1 questions'): measure_ability(at, cfg, tmp_path/'stage')

def test_only_surety_is_a_verdict():
    row = lambda after: dict(text=[[10, 0., 0., 20., after + .5*(i % 3), 0] for i in range(9)])
    known = [dict(ask=str(i), right='x') for i in range(30)]
    def of(end, rl, text=(20., 20.)): return dict(known=known, right={ROUNDED: [True]*30, 'end': end, 'rl': rl}, sums={ROUNDED: row(19.5), 'end': row(text[0]), 'rl': row(text[1])})
    verdicts = lambda *a: [r['verdict'] for r in ability_verdicts(of(*a))]
    all_, none, most = [True]*30, [False]*30, [True]*28 + [False]*2
    assert verdicts(most, all_) == ['within noise', 'holds', 'not testable', 'within noise']
    assert verdicts(none, none, (15., 10.)) == ['holds', 'fails', 'within noise', 'not testable']
    assert verdicts(none, all_, (30., 25.)) == ['holds']*4

def test_a_common_beginning_read_once_gives_the_same_answers(pico):
    from rlsft_nb.generation import encode, stop_ids
    from rlsft_nb.rollouts import Player, shared
    lm, tok = load_lm(str(pico['llama']))
    asked = encode(tok, [[dict(role='user', content=f'Make 24 of 3 3 8 {i} 5 5 5'[:n])] for i, n in ((1, 30), (22, 30), (333, 99), (4, 19), (5, 40))])
    n, seen = min(shared(asked[0], p) for p in asked), []
    plain, once = (Player(lm, tok, 9, 0., once=o) for o in (False, True))
    first, again = plain(asked), once(asked)
    assert n > 8 and first == again and torch.allclose(torch.tensor(sum(map(list, plain.logp), [])), torch.tensor(sum(map(list, once.logp), [])), atol=1e-4)
    lm.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k['input_ids'].shape)), with_kwargs=True)
    Player(lm, tok, 2, 0., once=True)(asked)
    assert seen[0] == (1, n) and seen[1][1] == max(map(len, asked)) - n
    longer = [p + s + [7, 8] for p, s in zip(asked, first)] # a second turn reads what is new alone, as before
    assert plain(longer) == once(longer) and once([asked[0]]) == [first[0]] and once([asked[0], asked[0]]) == [first[0]]*2
