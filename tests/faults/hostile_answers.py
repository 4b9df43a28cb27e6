"Answers that no model should give, through everything that judges them, beside a verifier of its own."
import json, random, time
from collections import Counter
from fractions import Fraction
from rlsft_nb.answers import read_answer
from rlsft_nb.game import GeneralPoints, answer, play, reward_func, solve, values, verify

# --- a second verifier: operators on a stack, numbers as fractions; nothing of it is the package's

SAME, RANK = {'×': '*', '÷': '/', '−': '-'}, {'+': 1, '-': 1, '*': 2, '/': 2}
REWARD = dict(correct=5, wrong_value=-1, illegal=-3, no_formula=-3)

def words(text):
    "Numbers and signs of a formula; None where it has anything else."
    out, i = [], 0
    while i < len(text):
        c = SAME.get(text[i], text[i])
        if c in '0123456789':
            j = i
            while j < len(text) and text[j] in '0123456789': j += 1
            if j - i > 6 or c == '0' and j > i + 1: return None
            out.append(int(text[i:j])); i = j; continue
        if c not in '+-*/() ': return None
        if c != ' ': out.append(c)
        i += 1
    return out

def worth(text): # (numbers, value; None where it divides by zero), or None where it is no formula
    "What a formula is worth."
    if len(text) > 200 or (ws := words(text)) is None: return None
    nums, signs, used, operand, zero, deep = [], [], [], True, False, 0
    def reduce():
        nonlocal zero
        b, a, s = nums.pop(), nums.pop(), signs.pop()
        if s == '/' and not b: zero, b = True, Fraction(1)
        nums.append(a + b if s == '+' else a - b if s == '-' else a*b if s == '*' else a/b)
    for w in ws:
        if operand:
            if isinstance(w, int): nums.append(Fraction(w)); used.append(w); operand = False
            elif w == '(':
                signs.append(w); deep += 1
                if deep > 20: return None
            else: return None
        elif isinstance(w, int) or w == '(': return None
        elif w == ')':
            while signs and signs[-1] != '(': reduce()
            if not signs: return None
            signs.pop(); deep -= 1
        else:
            while signs and signs[-1] != '(' and RANK[signs[-1]] >= RANK[w]: reduce()
            signs.append(w); operand = True
    if operand or '(' in signs: return None
    while signs: reduce()
    return used, None if zero else nums[0]

def opinion(formula, have, target): # reward
    "What a formula deserves."
    formula = (formula or '').split('=')[0].strip()
    if not formula: return REWARD['no_formula']
    got = worth(formula)
    if got is None: return REWARD['illegal']
    used, value = Counter(got[0]), got[1]
    if used != Counter(have): return -2*(bool(used - Counter(have)) + bool(Counter(have) - used))
    return REWARD['correct' if value == target else 'wrong_value']

def clean(text): # (True, formula), where nobody could read it otherwise
    "The formula of an answer that is one plain JSON object."
    try: d = json.loads(text)
    except (ValueError, RecursionError): return False, None
    plain = isinstance(d, dict) and text.count('"formula"') == 1 and isinstance(d.get('formula'), str) and '<' not in text and 'THINK]' not in text and not d['formula'].startswith('your formula') and len(text) <= 4096
    return plain, d['formula'] if plain else None

# --- answers

RANKS, RULES = ['A', *map(str, range(2, 11)), 'J', 'Q', 'K'], ['10', '11-12-13', '7-8-9']
SCRAPS = ['{', '}', '[', ']', '"', '\\', '\\u0022', '\\"', ',', ':', '"formula"', '"number": [', '"cards": [', '<think>', '</think>', '<|channel|>final', '[THINK]', '[/THINK]', '=24', '==', '**', '//', '×', '÷', '−', '(', ')', ' ', '\n', '\t', '\0', '\ud800', '٣', '²', '½', '1e9', '0x18', '1_0',
          '007', '9'*30, 'NaN', 'Infinity', 'true', 'null', '{"formula": {}}', '{"formula": null}', '```json\n', '\n```', 'your formula', '\ufeff', '\u200b', '\u202e', '😀', '"formula": "', ', "formula": "1+1"}', 'A', 'J', '.', ';', '#', '__import__("os")', '('*30, ')'*30, '+'*40, '{'*60, '['*60]

def formula(rng, vals):
    "Numbers and signs, mostly those of the hand."
    ns = [str(rng.choice([v, v, v, v, v, rng.randint(0, 14)])) for v in rng.sample(vals, len(vals))]
    ns = ns[:rng.choice([4, 4, 4, 4, 3, 2])] + ns[:rng.choice([0, 0, 0, 0, 1])]
    while len(ns) > 1:
        i = rng.randrange(len(ns) - 1)
        text = f'{ns[i]}{rng.choice("+-*/+-*/×÷")}{ns[i + 1]}'
        ns[i:i + 2] = [f'({text})' if rng.random() < .7 else text]
    return ns[0]

def generated(rng):
    "(text, cards, rule, target)"
    cards, rule, target = [rng.choice(RANKS) for _ in range(4)], rng.choice(RULES), rng.choice([24, 24, 24, 10, 1])
    vals, kind = values(cards, rule), rng.random()
    if kind < .15 and (found := solve(vals, target)): return answer(cards, rule, rng.choice(found), target), cards, rule, target
    f = formula(rng, vals) + rng.choice(['', '=24', f'={target}', ' = 24 '])
    if kind < .6: said = json.dumps(dict(cards=cards, number=vals, formula=f), ensure_ascii=rng.random() < .5)
    elif kind < .75: said = f'{rng.choice(["", "Let me see. ", "<think>" + f + "</think>"])}{{"formula": "{f}"}}{rng.choice(["", " done", "```"])}'
    elif kind < .85: said = ''.join(rng.choices(SCRAPS, k=rng.randint(0, 25)))
    elif kind < .95: said = json.dumps({rng.choice(['formula', 'formula', 'number', 'cards', 'x']): rng.choice([f, None, [f], {'formula': f}, 1e999, vals, True, '', ' ', [[[]]]]) for _ in range(rng.randint(0, 4))})
    else: said = ''.join(chr(rng.choice([rng.randint(0, 127), rng.randint(0, 0xffff), rng.randint(0, 0x10ffff)])) for _ in range(rng.randint(0, 200)))
    return said, cards, rule, target

def mutated(rng):
    "A generated answer with parts changed, doubled, cut or taken from another."
    said, *hand = generated(rng)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randint(0, len(said)) for _ in range(2))
        said = rng.choice([lambda: said[:i] + rng.choice(SCRAPS) + said[i:], lambda: said[:i] + said[j:], lambda: said[:j] + said[i:], lambda: said[:i], lambda: said[:i] + generated(rng)[0] + said[j:], lambda: said[:i] + said[i:j][::-1] + said[j:]])()
        said = said[:20_000]
    return said, *hand

def campaign(made:int, changed:int, seed:int) -> dict:
    "Every answer through `verify` and `reward_func`, one in ten through the environments."
    rng, f = random.Random(seed), dict(generated=made, mutated=changed, exceptions=0, disagreements=0, slowest=0., outcomes=Counter(), faults=[])
    env = GeneralPoints(attempts=3)
    try:
        from rlsft_nb.envs import PointsEnv
        tool = PointsEnv(attempts=2)
    except ImportError: tool = None
    for i in range(made + changed):
        said, cards, rule, target = generated(rng) if i < made else mutated(rng)
        have = values(cards, rule)
        try:
            start = time.thread_time()
            v = verify(said, cards, rule, target)
            took = time.thread_time() - start
            if took > f['slowest']: f['slowest'] = took
            read = read_answer(said)[0]
            plain, meant = clean(said)
            r = reward_func(completions=[said], cards=[cards], rule=rule, target=target)
            checks = dict(reader=not plain or read == meant, judge=v.reward == opinion(read, have, target), reward=r == [v.reward], outcome=v.correct == (v.reward == 5), chat=reward_func(completions=[[dict(role='assistant', content=said)]], cards=[cards], rule=rule, target=target) == r)
            if i % 10 == 0: checks |= environments(env, tool, rng, said, cards, rule, target, v)
            bad = [k for k, ok in checks.items() if not ok]
            if bad: f['disagreements'] += 1; f['faults'].append(f'{bad[0]}: {said[:200]!r} {cards} {rule} {target}: {v.reward}')
            f['outcomes'][v.outcome] += 1
        except Exception as e: f['exceptions'] += 1; f['faults'].append(f'{type(e).__name__}: {e}: {said[:200]!r} {cards} {rule} {target}')
    return f | dict(faults=f['faults'][:20], outcomes=dict(f['outcomes']), slowest=round(f['slowest'], 4), lost=f['exceptions'] + f['disagreements'] + (f['slowest'] > 1))

def environments(env, tool, rng, said, cards, rule, target, v) -> dict: # name -> whether it agrees
    "The same answer as an action, as a turn of a chat and as a tool call; only hands that can be solved are dealt."
    if not solve(values(cards, rule), target): return {}
    env.reset(options=dict(cards=cards, rule=rule, target=target))
    text, reward, ended, _, info = env.step(said)
    e, = play([cards], lambda chats: [said]*len(chats), rule, 2, 'full', target)
    out = dict(step=reward == v.reward and ended == v.correct and info['outcome'] == v.outcome, play=e.verdicts[0] == v and len(e.verdicts) == 2 - v.correct)
    if tool:
        tool.reset(cards=cards, rule=rule, target=target)
        tool.answer(rng.choice([cards, [], None, 'x']), rng.choice([values(cards, rule), None, [1e999], 'x']), said)
        out['tool'] = tool.get_reward() == (v2 := verify(json.dumps(dict(formula=said)), cards, rule, target)).reward and v2.reward == opinion(read_answer(json.dumps(dict(formula=said)))[0], values(cards, rule), target)
    return out
