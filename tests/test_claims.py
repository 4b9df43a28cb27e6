"The table of claims: its list, its rules, agreement with the notebooks that measure, and the paper's own numbers."
import ast, itertools, json, math, random, shlex
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from rlsft_nb import judging, measures, ppo, restore, sft, spectra, theory
from rlsft_nb.sweep import gain_order
from rlsft_nb.answers import OUTCOMES
from rlsft_nb.claims import heading, judge_claims, load_claims, table, tally, to_markdown
from rlsft_nb.judging import VERDICTS, over_seeds
from rlsft_nb.paired import difference
from rlsft_nb.power import needed, needed_paired, newcombe, own_numbers
from rlsft_nb.records import records_dir, seeds_of
from rlsft_nb.files import write_json
from rlsft_nb.intervals import mcnemar, wilson
from rlsft_nb.parameters import load_params, models
from rlsft_nb.places import ROOT
from rlsft_nb.problems import ParamError
from rlsft_nb.models import clusters

CFG = load_params('tiny')
BY = clusters(CFG)
LIST = load_claims()
CLAIM = {c['id']: c for c in LIST['claims']}

# records as the notebooks save them

def cell(c, rate, g):
    hits = ''.join('1' if g.random() < rate else '0' for _ in BY[c])
    k, n = hits.count('1'), len(hits)
    lo, hi = wilson(k, n)
    return dict(n=n, multisets=len(set(BY[c])), first=dict(k=k, rate=k/n, lo=lo, hi=hi), hits=hits)

def stage(ood, id, g): return dict(within=dict(OOD=cell('OOD', ood, g), ID=cell('ID', id, g)))

def losses(*ys): return [dict(step=100*i, loss={k: dict(loss=y*f, n=50) for k, f in (('id_train', 1.), ('id_test', 1.1), ('ood', 2.))}, test=dict(OOD=cell('OOD', min(.9, .1*y), random.Random(i)))) for i, y in enumerate(ys)]

def edited(target, peak, rate, g, c='OOD', **more):
    e = cell(c, rate, g)
    r = restore.recovery(e['hits'], target[c]['hits'], peak[c]['hits'], BY[c], 100)
    kept = restore.recovery(e['hits'], '0'*e['n'], target[c]['hits'], BY[c], 100)
    return dict(n=e['n'], **e['first'], p=mcnemar(map(int, e['hits']), map(int, target[c]['hits']), BY[c])['p'], recovery=r, kept=kept) | more

def both(target, peak, ood, id, g, **spec): return spec | dict(OOD=edited(target, peak, ood, g), ID=edited(target, peak, id, g, 'ID'))

def matrix(layer, kind, shift, angle, verdict='beyond'):
    return dict(matrix=f'layers.{layer}.{kind}', layer=layer, type=kind, update=.1, shift=shift, values_ratio=2., values_share=.01, values_share_by_chance=.02, angle_U=angle, angle_V=angle,
                lead_ratio=1.5, lead_verdict=verdict)

def curves(ds):
    v = lambda here, ratio: dict(here=here, ratio=ratio)
    band = dict(mean=[.001]*20, lo=[-.01]*20, hi=[.012]*20)
    side = dict(d=20, principal=[dict(k=5, mean=4.), dict(k=20, mean=0.)])
    return dict(changed=True, s0=[2.]*20, ds=ds, null=dict(curves=dict(values=band)), sides=dict(U=side, V=side), verdicts=dict(head=v(.1, 2.), bulk=v(.2, 1.), tail=v(.3, 1.5)))

def won(gain, holm): return dict(gain=gain, holm=holm, p=holm, n01=9, n10=1)

def moved(label, kind, gauge, values, **more): return dict(label=label, kind=kind, changed=True, judged=dict(gauge=dict(verdict=gauge, ratio=2.), values=dict(verdict=values, ratio=.5))) | more

def fake(seed=0, ood=(.33, .09, .25), id=(.79, .49, .47)) -> dict: # OOD and ID at peak, end and RL
    "A whole set of records of one seed."
    g = random.Random(seed)
    peak, end, rl = (stage(o, i, g) for o, i in zip(ood, id))
    t, p, r = end['within'], peak['within'], rl['within']
    scores = dict(base=stage(0., 0., g), peak=peak, end=end)
    starts = [dict(step=s, before=dict(OOD=cell('OOD', b, g), ID=cell('ID', b, g)), after=dict(OOD=cell('OOD', a, g), ID=cell('ID', a, g)), log=[dict(zip(OUTCOMES, (1 - 4*a/5, *[a/5]*4)))]) for s, b, a in ((100, .1, .2), (200, ood[0], .25), (300, (ood[0] + ood[1])/2, .4), (400, ood[1], ood[2]))]
    name = restore.cell_name
    ranks = {name('directions', k): both(t, p, ood[1] + (ood[0] - ood[1])*k**.5, id[1] + .3*k, g, mode='directions', ranks=k) for k in (.05, .2, .5, 1.)}
    controls = {name(m, k): both(t, p, rate, .5, g, mode=m, ranks=k) for m, k, rate in (('interpolate', .2, ood[0]), ('values', 1., ood[1]), ('random_rotation', 1., ood[1]))}
    layers = {name(m, layers=l): both(t, p, o, i, g, mode=m, layers=l) for m in ('directions', 'swap') for l, o, i in (('0', .1, .6), ('1-2', .09, .7), ('3', .1, .2), ('0-3', .1, .7))} | {name('directions', types=True): both(t, p, ood[0]*.6, id[1], g, mode='directions')} | {name(m, layers='0', types=['*']): both(t, p, ood[0]*.95, id[1], g, mode=m) for m in ('directions', 'swap')}
    for n, c in [*ranks.items(), *controls.items(), (name('blend', .5), both(t, p, (ood[0] + ood[1])/2, .6, g, mode='blend', ranks=.5))]: controls[n] = c | dict(edit=dict(size=2., to_reference=1. if n != name('blend', .5) else 2.))
    target = dict(OOD=t['OOD']['first'] | dict(n=t['OOD']['n']), ID=t['ID']['first'] | dict(n=t['ID']['n']))
    reference = dict(OOD=p['OOD']['first'] | dict(n=p['OOD']['n']), ID=p['ID']['first'])
    res = dict(depth=4, freedom=dict(chance=.05), target=target, reference=reference, tests=dict(distance=[won(-.1, .001)], places=[won(.1, .001), won(.05, .02)], bands_OOD=[won(.01, .5)]*2, bands_ID=[won(-.1, .001)]*2))
    imposed = {name(m, 1.): both(r, r, o, .4, g, mode=m) for m, o in (('directions', ood[1]), ('values', ood[2]), ('interpolate', ood[1]), ('swap', ood[1]))}
    layer = [matrix(i, k, s, 3., v) for i in (0, 1) for k, s, v in zip('qkv', (.004, .005, .02), ('beyond', 'beyond', 'within'))]
    spectra_ = {label: layer for label in ('SFT', 'SFT from peak', 'RL')}
    kept = {label: dict(matrices={k: curves([.02, .01] + [.001]*16 + [-.01, .01]) for k in 'qkv'}) for label in spectra_}
    gauge = dict(blocks=[moved('SGD', 'linear', 'below', 'within', optimizer='sgd'), moved('Adam', 'swiglu', 'beyond', 'below', optimizer='adam')], updates=[moved('SFT', 'vo', 'beyond', 'below'), moved('RL', 'mlp', 'within', 'within')])
    return {'fig1-sft': dict(scores=scores), 'fig1': dict(scores=scores | dict(rl=rl), stages={'tiny/ppo-1a2b3c4d': dict(commit='0'*40, dirty=False, python='3.11', device=['H100'], versions=dict(torch='2.9'))}),
            'fig2': dict(curve=dict(points=losses(5., 1., .5, .8, 1.), peak=200, end=400)), 'sweep': dict(sweep=dict(points=starts)), 'spectra-overview': spectra_, 'fig3': kept, 'fig4': dict(kept),
            'fig5': dict(peak=res | dict(cells=layers)), 'fig6': dict(peak=res | dict(cells=ranks | controls)), 'fig6-unrelated': {k: dict(reference=dict(OOD=dict(rate=x))) for k, x in (('unrelated-peak', .31), ('unrelated-end', .08))} | dict(tests=[won(.1, .001), won(.2, .001)], steps=dict(peak=160, end=800)),
            'compare': dict(result=dict(arms={a: dict(scores=dict(OOD=cell('OOD', x, g))) for a, x in (('own', .3), ('expert', .1))})),
            'fig7': dict(rl=res | dict(cells=imposed, target=dict(OOD=r['OOD']['first'] | dict(n=r['OOD']['n'])))), 'figA': gauge}

def save(records, folder, seed=0):
    for name, r in records.items(): write_json(folder/'figures'/'tiny'/f'{name}-seed{seed}.json', r)

def answer(v, **more): return dict(value=v, lo=v - .01, hi=v + .01, by_chance=.02, share=.1, mismatched=[.03, .04], p=.001) | more

def shipped(folder, back=.3, kl=-.5, shuffled=.2, inside=.6, avoids=-.4) -> int: # number of files
    "Records of the checkpoints that ship, which are of no seed."
    g = random.Random(9)
    two = lambda: dict(ID=cell('ID', .5, g), OOD=cell('OOD', .1, g))
    card = lambda at, x: dict(source=f'tiny:{at}', numbers=dict(unchanged=dict(value=.2, lo=.1, hi=.3, n=30)), sums={t: [[1, x + .01*i, 0, 0, x + .01*i, 0] for i in range(6)] for t in ('new', 'old')})
    step = dict(before=2., value=kl, lo=kl - .1, hi=kl + .1, n=50, shuffled=[shuffled])
    said = dict(cosine=-back, taken_back=back/10, p=1e-9, mismatched=[.01, -.01, .02], n=30, answers=dict(reverses=answer(back), nearer=answer(back/9, by_chance=-.1), stays=answer(inside), avoids=answer(avoids), takes=answer(2.)))
    won = dict(gain=.02, holm=.001, p=.001, n01=30, n10=10)
    records = dict(forget=dict(base=dict(cards=[card('peak', 1), card('end', 2), card('rl', 3)]), end=dict(cards=[card('rl', 1)]), peak=dict(steps=[dict(new=step)])), chain=dict(peak=dict(overall=[said]), base=dict(overall=[said])),
                   freed=dict(peak=dict(before=dict(OOD=cell('OOD', .33, g))), end=dict(tokens=['11', '12', '13'], constant=6., before=two(), after=dict(OOD=cell('OOD', .25, g)), other=two())),
                   repairs=dict(target=dict(OOD=dict(n=1000)), tests=dict(intruders=[won], denoise=[won | dict(gain=-.02)])))
    for name, r in records.items(): write_json(folder/'figures'/'tiny'/f'{name}.json', r)
    return len(records)

def verdicts_of(record): return {c['id']: c['verdict'].removesuffix(' by chance too') for c in record['claims']}

# the list

def test_every_claim_has_its_place_and_its_source():
    assert len(CLAIM) == len(LIST['claims']) >= 50
    order = list(LIST['sections'])
    at = [order.index(c['at'][0]) for c in LIST['claims']]
    assert at == sorted(at), 'in the order of the paper'
    papers = [list(LIST['papers']).index(c['version']) for c in LIST['claims']]
    assert papers == sorted(papers) and {*papers} == {*range(len(LIST['papers']))}, 'paper by paper, and none without a claim'
    notebooks = {p.stem for p in (ROOT/'nbs').glob('*.ipynb')}
    assert {r.split()[0] for r in LIST['records'].values()} <= notebooks
    for c in LIST['claims']: assert c['fixed'].startswith('here') or c['fixed'] in notebooks, c['id']
    assert {f'figure {i}' for i in range(1, 8)} | {'abstract', '1', '6', 'A'} <= {p for c in LIST['claims'] for p in c['at']}
    assert {c['measure'] for c in LIST['claims'] if 'measure' in c} == set(measures.MEASURES), 'a measure without a claim'
    assert {c['args']['record'] for c in LIST['claims'] if 'record' in c.get('args', {})} <= set(LIST['records'])

@pytest.mark.parametrize('old,new,says', [
    ('kind: above, at: 0.7', 'kind: abov, at: 0.7', "test kind 'abov'; did you mean 'above'?"), ('measure: gains', 'measure: gain', "measure 'gain'; did you mean 'gains'?"),
    ('  unit: rho\n', '', "better-in has no 'unit'"), ('id: better-in', 'id: rl-limit', "'rl-limit' stands there twice"), ('at: [abstract]', 'at: [abstrac]', "at 'abstrac'; did you mean 'abstract'?"),
    (', clear: 0.5}', '}', "has no 'clear'")])
def test_mistakes_in_the_list_are_told(tmp_path, old, new, says):
    text = (ROOT/'params'/'claims.yaml').read_text(encoding='utf-8')
    assert old in text
    (tmp_path/'claims.yaml').write_text(text.replace(old, new, 1), encoding='utf-8')
    with pytest.raises(ParamError, match=says.replace('?', r'\?')): load_claims(tmp_path/'claims.yaml')

def test_no_code_asks_for_a_model_by_name():
    for module in ('claims', 'report'):
        tree = ast.parse((ROOT/'rlsft_nb'/f'{module}.py').read_text(encoding='utf-8'))
        compared = [n for c in ast.walk(tree) if isinstance(c, (ast.Compare, ast.match_case)) for n in ast.walk(c) if isinstance(n, ast.Constant)]
        assert not {n.value for n in compared if isinstance(n.value, str)} & set(models())

# verdicts

numbers = st.lists(st.floats(-1, 1).filter(lambda v: abs(v) > 1e-6), min_size=1, max_size=6)
TESTS = [dict(kind='sign', expect='up', alpha=.01), dict(kind='sign', expect='down', alpha=.01), dict(kind='above', at=.3, clear=.1), dict(kind='least', at=.2), dict(kind='most', at=.2), dict(kind='between', lo=-.2, hi=.4), dict(kind='all')]

@pytest.mark.parametrize('t', TESTS, ids=lambda t: ' '.join(map(str, t.values())))
@given(values=numbers)
def test_over_seeds(t, values):
    got = over_seeds(t, ['holds']*len(values), values)
    assert got['verdict'] in ('holds', 'fails', 'within noise') and got == over_seeds(t, ['holds']*len(values), values)
    if len(values) == 1: assert got['verdict'] == 'holds'; return
    assert over_seeds(t, ['fails']*len(values), values)['verdict'] == got['verdict'] # seeds' verdicts count only where there is one
    inside = [judging.inside(t, v) for v in values]
    if got['verdict'] == 'holds': assert all(inside)
    if got['verdict'] == 'fails': assert not any(inside)

@given(values=numbers)
def test_up_is_the_mirror_of_down(values):
    up, down = (over_seeds(dict(kind='sign', expect=e, alpha=.01), ['within noise']*len(values), v)['verdict'] for e, v in (('up', values), ('down', [-v for v in values])))
    assert up == down

def test_identical_seeds_decide():
    assert over_seeds(TESTS[3], ['holds']*3, [.5]*3)['verdict'] == 'holds'
    assert over_seeds(TESTS[3], ['fails']*3, [.1]*3)['verdict'] == 'fails'
    assert over_seeds(TESTS[2], ['holds']*3, [.31, .6, .05])['verdict'] == 'within noise'

def test_difference_of_single_hands_is_the_textbook_interval():
    g = np.random.default_rng(0)
    a, b = (''.join(map(str, g.integers(0, 2, 300))) for _ in range(2))
    d = np.array([int(y) - int(x) for x, y in zip(a, b)])
    got = difference(*(dict(hits=h, multisets=300) for h in (a, b)), range(300))
    half = stats.norm.ppf(.975)*d.std(ddof=1)/math.sqrt(300)
    assert np.allclose([got['lo'], got['hi']], [d.mean() - half, d.mean() + half]) and got['p'] == mcnemar(map(int, a), map(int, b), range(300))['p']

# agreement with the notebooks that measure

WORDS = {'undecided': 'within noise', 'mixed': 'within noise', 'no difference seen': 'within noise', 'nothing to recover': 'not testable here', 'nothing to lose': 'not testable here'}

@pytest.mark.parametrize('seed,ood,id', [(0, (.33, .09, .25), (.79, .49, .47)), (1, (.2, .19, .2), (.5, .5, .51)), (2, (.1, .3, .1), (.3, .6, .4)), (3, (.33, .09, .09), (.3, .6, .6))])
def test_verdicts_agree_with_the_notebooks(tmp_path, seed, ood, id):
    r = fake(seed, ood, id)
    save(r, tmp_path, seed)
    ours = verdicts_of(judge_claims(CFG, [seed]))
    scores, sweep, curve = r['fig1']['scores'], r['sweep']['sweep'], r['fig2']['curve']
    res, cells = r['fig6']['peak'], r['fig5']['peak']['cells'] | r['fig6']['peak']['cells']
    theirs = dict(zip(('ood-falls', 'id-rises', 'ood-loss-climbs', 'ood-loss-above-start'), [x['verdict'] for x in sft.verdicts(curve, scores, BY)]))
    theirs |= dict(zip(('rl-restores', None, 'better-in', 'rl-costs-id', 'rl-from-peak'), [x['verdict'] for x in ppo.verdicts(scores, sweep, curve['peak'], BY)]))
    theirs.pop(None) # a plain difference, which is no claim
    theirs |= dict(zip(('ranks-20', 'layers-25', 'directions-not-values', 'more-than-distance', 'random-rotation', 'top-ranks', 'outer-ood', 'middle-id'),
                       [x['verdict'] for x in restore.verdicts(res | dict(cells=cells), CFG.restore)]))
    theirs |= dict(imposed=restore.imposed_verdicts(r['fig7'])[0]['verdict'])
    assert {k: ours[k] for k in theirs} == {k: WORDS.get(v, v) for k, v in theirs.items()}

def test_another_seeds_past_and_the_ends_of_the_first_layers(tmp_path):
    r = fake()
    save(r, tmp_path)
    c = {c['id']: c['each'][0] for c in judge_claims(CFG, [0])['claims'] if c['id'] in ('own-past', 'layers-25', 'layers-25-ends')}
    assert (c['own-past']['verdict'], c['own-past']['value']) == ('holds', .1) and c['own-past']['control'] == "the other seed's peak and end have 31.0 % and 8.0 % themselves"
    ends, alone = (r['fig5']['peak']['cells'][restore.cell_name('directions', layers='0', types=t)]['OOD']['recovery']['value'] for t in (['*'], None))
    assert c['layers-25-ends']['value'] == ends > .8 > .1 > c['layers-25']['value'] == alone and c['layers-25-ends']['verdict'] == 'holds'
    save({'fig6-unrelated': {k: v for k, v in r['fig6-unrelated'].items() if k != 'steps'}}, tmp_path) # as they were told at first
    old = next(c['each'][0] for c in judge_claims(CFG, [0])['claims'] if c['id'] == 'own-past')
    assert old['verdict'] == 'not testable here' and 'at the steps of this one' in old['why']

@pytest.mark.parametrize('shifts,verdicts,angles', [((.005, .02, .001), ('beyond', 'within', 'below'), 3.), ((.005,)*10, ('beyond',)*10, 6.), ((.005,)*8 + (.02,)*2, ('beyond',)*5 + ('within',)*5, 1.)])
def test_spectra_agree(tmp_path, shifts, verdicts, angles):
    rows = [matrix(0, str(i), s, 3., v) for i, (s, v) in enumerate(zip(shifts, verdicts))]
    save({'spectra-overview': dict(SFT=rows, RL=[r | dict(angle_U=angles, angle_V=angles) for r in rows])}, tmp_path)
    full = dict(matrices={r['matrix']: dict(layer=0, changed=True, shift=r['shift'], verdicts=dict(lead=dict(verdict=r['lead_verdict'], ratio=1.5), values=dict(ratio=2.))) for r in rows})
    theirs = [x['verdict'] for x in spectra.verdicts(dict(SFT=full), dict(SFT=full))]
    ours = verdicts_of(judge_claims(CFG, [0]))
    assert [ours['values-stay'], ours['turn']] == theirs[:2]
    assert ours['alike'] == ('holds' if .8 <= angles/3 <= 1.25 else 'fails')

@pytest.mark.parametrize('gauge', ['beyond', 'below'])
def test_theory_agrees(tmp_path, gauge):
    for blocks in ('beyond', 'below'):
        r = dict(blocks=[moved('SGD', 'linear', blocks, 'below', optimizer='sgd')], updates=[moved('SFT', 'vo', gauge, 'below'), moved('SFT', 'mlp', 'within', 'within')])
        save(dict(figA=r), tmp_path)
        theirs = theory.verdicts(r)[-1]['verdict']
        assert verdicts_of(judge_claims(CFG, [0]))['drifts'] == WORDS.get(theirs, theirs)

# verdicts that can lose

def test_what_the_control_earns_as_well_is_counted_apart(tmp_path):
    save(fake(), tmp_path)
    c = {c['id']: c for c in judge_claims(CFG, [0])['claims']}
    assert c['directions-not-values']['verdict'] == c['alike-per-unit']['verdict'] == 'holds by chance too' and c['turn']['verdict'] == 'holds'
    assert all(x['chance'] == (x['verdict'] == VERDICTS[1]) for x in c.values() if x['verdict'].startswith('holds'))

def test_a_limit_needs_a_start_that_is_mended(tmp_path):
    r = fake()
    save(r, tmp_path)
    assert (c := {c['id']: c for c in judge_claims(CFG, [0])['claims']})['rl-limit']['each'][0]['value'] > 0 and 'from step 300' in c['rl-limit']['here']
    r['sweep']['sweep']['points'][2]['after'] = r['sweep']['sweep']['points'][2]['before']
    save(r, tmp_path)
    c = {c['id']: c for c in judge_claims(CFG, [0])['claims']}['rl-limit']
    assert c['verdict'] == 'not testable here' and c['why'].startswith('RL mends no moderate start here (') and 'would have been seen' in c['why']

def test_what_rl_did_not_gain_cannot_be_lost(tmp_path):
    save(fake(0, (.33, .09, .09)), tmp_path)
    c = {c['id']: c for c in judge_claims(CFG, [0])['claims']}
    assert all(c[i]['why'] == 'RL gained no OOD accuracy beyond doubt, so that nothing of it can be lost' for i in ('imposed', 'directions-not-values-rl'))

@given(st.lists(st.tuples(st.integers(1, 99), st.floats(-1, 2)), min_size=2, max_size=6))
def test_pooled_shares_are_all_that_came_back_of_all_that_was_lost(seeds):
    wholes, shares = zip(*seeds)
    got, lost = judging.pooled(shares, wholes), np.array(wholes, float)
    back = lost*np.array(shares)
    assert math.isclose(got['mean'], back.sum()/lost.sum(), abs_tol=1e-12)
    error = (back - got['mean']*lost).std(ddof=1)/math.sqrt(len(lost))/lost.mean() # a ratio estimator, as in Cochran 1977, 2.11
    assert np.allclose((got['hi'] - got['lo'])/2, stats.t.ppf(.975, len(lost) - 1)*error, atol=1e-9)

def test_the_smallest_effect_is_seen_four_times_in_five():
    g = np.random.default_rng(0)
    for n in (4000, 5):
        x = g.normal(size=(20000, n)) if n == 5 else g.normal(size=(20000, 1))/math.sqrt(n)
        half = (stats.t.ppf(.975, n - 1)*1/math.sqrt(n)) if n == 5 else stats.norm.ppf(.975)/math.sqrt(n)
        d = judging.seen(dict(lo=-half, hi=half), 5 if n == 5 else 1)
        if n == 5: found = stats.ttest_1samp(x + d, 0, axis=1).pvalue < .05
        else: found = abs(x + d) > half
        assert .75 < found.mean() < .87

def test_gain_order_by_another_hand():
    g = np.random.default_rng(1)
    groups = [int(i) for i in g.integers(0, 60, 240)]
    bits = lambda p: dict(OOD=dict(hits=''.join('1' if x < p else '0' for x in g.random(240))))
    points = [dict(before=bits(p), after=bits(p + .1)) for p in (.1, .5, .3, .2, .4)]
    of = {m: i % 2 for i, m in enumerate(sorted(set(groups)))}
    def rates(w, h): return [np.mean([int(b) for b, m in zip(q[w]['OOD']['hits'], groups) if of[m] == h]) for q in points]
    def rho(order): return np.mean([stats.spearmanr(rates('before', h), (np.array(rates('after', 1 - h)) - rates('before', 1 - h))[list(order)]).statistic for h in (0, 1)])
    every = [rho(o) for o in itertools.permutations(range(5))]
    assert np.allclose(gain_order(points, groups), (every[0], np.mean(np.abs(every) >= abs(every[0]) - 1e-9)))

# the whole table

def test_whole_table(tmp_path):
    for s in range(3): save(fake(s), tmp_path, s)
    alone = shipped(tmp_path)
    assert seeds_of(CFG) == [0, 1, 2]
    r = judge_claims(CFG, [0, 1, 2])
    json.dumps(json.loads(write_json(tmp_path/'r.json', r).read_text())) # no NaN, nothing but JSON
    assert verdicts_of(r) == verdicts_of(judge_claims(CFG, [0, 1, 2]))
    left = {c['id'] for c in r['claims'] if c['verdict'] in ('not run', 'not testable here')}
    assert left == {c['id'] for c in LIST['claims'] if c['test']['kind'] == 'none'} | {'id-spread'} # all directions raise ID here
    assert sum(tally(r).values()) == len(LIST['claims']) and len(r['files']) == 3*len(fake()) + alone and list(r['stages']) == ['tiny/ppo-1a2b3c4d']
    falls = next(c for c in r['claims'] if c['id'] == 'ood-falls')
    rates = [[int(e['here'].split(' %')[0].replace('.', '')) for e in falls['each']], falls['over']]
    assert falls['verdict'] == 'holds' and falls['seeds'] == [0, 1, 2] and rates[1]['n'] == 3 and rates[1]['lo'] < rates[1]['mean'] < rates[1]['hi'] < 0
    assert math.isclose(rates[1]['mean'], np.mean([e['value'] for e in falls['each']]))
    text = table('tiny')
    assert text == to_markdown(r)
    rows = [l for l in text.splitlines() if not l.startswith('| **')]
    assert len(rows) == 2 + len(LIST['claims']) and {len(l.replace('\\|', '').split(' | ')) for l in text.splitlines()} == {4}
    assert '3 seeds: holds 3' in text and '; the control passes' in text

@pytest.mark.parametrize('how, want', [({}, {}), (dict(back=-.3), {'rl-reverses': 'fails', 'rl-nearer-weights': 'fails'}), (dict(kl=.5), {'rl-nearer-function': 'fails'}), (dict(kl=-.05), {'rl-nearer-function': 'within noise'}),
    (dict(shuffled=-.6), {'rl-nearer-function': 'holds by chance too'}), (dict(inside=.1), {'locked-to-sft': 'fails'}), (dict(avoids=.4), {'path-not-taken': 'fails'})])
def test_checkpoints_that_ship_can_say_either(tmp_path, how, want):
    shipped(tmp_path, **how)
    c = {c['id']: c for c in judge_claims(CFG, [0, 1, 2])['claims']}
    told = {i: c[i]['verdict'] for i in ('rl-reverses', 'rl-nearer-weights', 'rl-nearer-function', 'path-not-taken', 'sft-takes-it', 'locked-to-sft', 'suppressed-values', 'intruders-scaled', 'denoised', 'kl-old')}
    assert told == dict.fromkeys(told, 'holds') | {'denoised': 'fails', 'kl-old': 'within noise'} | want
    assert c['rl-reverses']['seeds'] == [] and len(c['rl-reverses']['each']) == 1, 'one pipeline, whatever the seeds'
    assert c['kl-old']['here'].startswith('3 of 3 pairs agree') and c['suppressed-values']['here'].endswith('with +6 on 11, 12, 13')
    if how.get('kl') == -.05: assert c['rl-nearer-function']['seen'] == told_share(.05*(1 + .8416/1.96))
    assert c['rl-reverses']['each'][0]['commands'] == ['papermill nbs/09_forget.ipynb -p model tiny']

def told_share(x): return judging.told(x, 'share')

def test_a_model_that_ships_nothing_is_told_what_to_type(tmp_path):
    c = {c['id']: c for c in judge_claims(load_params('qwen7b'), [0])['claims']}
    assert c['rl-reverses']['verdict'] == 'not testable here' and c['rl-reverses']['why'] == 'qwen7b ships no checkpoints; rlsft compare BASE SFT RL and rlsft forget BASE SFT RL say it of any'

def test_an_own_record_of_no_seed_goes_before_the_published_one(tmp_path):
    shipped(tmp_path)
    write_json(records_dir(CFG)/'freed.json', dict(end=dict(tokens=[])))
    c = {c['id']: c for c in judge_claims(CFG, [0])['claims']}
    assert c['suppressed-values']['why'] == 'every token of OOD answers is said in ID answers' and c['rl-reverses']['verdict'] == 'holds'
    assert {c['id']: c for c in judge_claims(CFG, [0], tmp_path/'figures'/'tiny')['claims']}['suppressed-values']['verdict'] == 'holds'

def test_every_claim_stands_under_its_paper():
    r = judge_claims(CFG, [0])
    heads = dict.fromkeys(heading(c, r) for c in r['claims'])
    assert list(heads)[0] == 'The paper (arXiv 2508.16546): Abstract' and 'The Path Not Taken (2511.08567)' in heads and sum(l.startswith('| **') for l in to_markdown(r).splitlines()) == len(heads)

def test_missing_seed_is_left_out_by_name(tmp_path):
    save(fake(0), tmp_path); save({k: v for k, v in fake(1).items() if k in ('fig2', 'fig1-sft')}, tmp_path, 1)
    c = {c['id']: c for c in judge_claims(CFG, [0, 1])['claims']}
    assert c['ood-falls']['seeds'] == [0, 1] and c['rl-restores']['seeds'] == [0] and c['rl-restores']['n'] == 1000
    assert c['rl-restores']['each'][1] == dict(seed=1, verdict='not run', why='no record fig1-seed1.json', commands=['papermill nbs/03_ppo.ipynb -p model tiny -p seed 1'])

def test_a_control_that_was_not_played_is_no_reason_to_leave_a_claim_out(tmp_path):
    for s in range(2):
        r = fake(s)
        if s: del r['fig5']['peak']['cells'][restore.cell_name('swap', layers='0')], r['fig6']['peak']['cells'][restore.cell_name('interpolate', .2)]
        save(r, tmp_path, s)
    c = {c['id']: c for c in judge_claims(CFG, [0, 1])['claims']}
    assert all(c[i]['seeds'] == [0, 1] for i in ('layers-25', 'knob-layers', 'ranks-20', 'knob-ranks')) and c['ranks-20']['chance'] and c['ranks-20']['beside']

def test_without_records_every_line_says_what_makes_it():
    assert seeds_of(CFG) == []
    r = judge_claims(CFG, [4])
    once = {c['id'] for c in LIST['claims'] if c.get('once')}
    for c in r['claims']:
        if c['id'] in once or CLAIM[c['id']]['test']['kind'] == 'none': continue
        words = shlex.split(c['each'][0]['commands'][0])
        assert c['verdict'] == 'not run' and words[:2] == ['papermill', words[1]] and (ROOT/words[1]).is_file() and words[2:8] == ['-p', 'model', 'tiny', '-p', 'seed', '4'], c['id']
    assert '`papermill nbs/03_ppo.ipynb' in table('tiny') and r['files'] == {}

def test_records_of_another_shape_are_told_by_their_path(tmp_path):
    r = fake()
    del r['fig6']['peak']['tests'], r['fig1']['scores']['rl'], r['spectra-overview']['RL'], r['fig4']['RL']
    save(r, tmp_path)
    c = {c['id']: c for c in judge_claims(CFG, [0])['claims']}
    assert [c[i]['why'] for i in ('top-ranks', 'rl-restores', 'alike')] == ['record fig6-seed0.json lacks peak.tests', 'record fig1-seed0.json lacks scores.rl', 'record spectra-overview-seed0.json lacks RL']
    assert 'RL' not in c['extremes-turn']['here'] and 'RL' in c['centred']['here'] # of two pairs, the one that is there

def test_a_model_that_learns_nothing(tmp_path):
    r = fake(0, (0., 0., 0.), (0., 0., 0.))
    r['sweep']['sweep']['points'] = r['sweep']['sweep']['points'][3:]
    r['spectra-overview'] = {k: [dict(matrix='layers.0.q', layer=0, type='q', update=0.)] for k in r['spectra-overview']}
    for name in ('fig3', 'fig4'): r[name] = {k: dict(matrices=dict(q=dict(changed=False))) for k in r[name]}
    for u in r['figA']['updates']: u['changed'] = False
    r['figA']['blocks'] = r['figA']['blocks'][1:]
    save(r, tmp_path)
    got = judge_claims(CFG, [0])
    write_json(tmp_path/'r.json', got)
    c = {c['id']: c for c in got['claims']}
    asked = ('rl-share', 'gives-back', 'ranks-20', 'values-stay', 'alike', 'centred', 'extremes-turn', 'imposed', 'drifts', 'better-in')
    for i in asked: assert c[i]['verdict'] == 'not testable here' and c[i]['why'], i
    assert c['rl-restores']['verdict'] == c['ood-falls']['verdict'] == 'within noise'

def test_records_of_other_hands_are_refused(tmp_path):
    few = load_params('tiny', dict(eval=dict(hands=500)))
    for name, r in fake().items(): write_json(records_dir(few)/f'{name}-seed0.json', r)
    with pytest.raises(ParamError, match='give the overrides of their run'): judge_claims(few, [0])

# the paper's own numbers

def test_known_p_values():
    rows = {(r['a'], r['b']): r for r in own_numbers(LIST['numbers'])['numbers']}
    for (a, b), p in {(41, 21): .009, (21, 38): .025, (21, 36): .047, (46, 40): .55, (38, 25): .10, (21, 25): .64, (160, 168): .48, (102, 95): .57}.items():
        assert abs(rows[a, b]['fisher'] - p) < .006 and rows[a, b]['boschloo'] <= rows[a, b]['fisher'] <= rows[a, b]['holm'] + 1e-12
        assert rows[a, b]['verdict'] == ('exceeds chance' if p < .05 else 'within noise')
    assert all(r['needed_at_best'] <= r['needed_paired'] <= r['needed'] for r in rows.values())

def test_newcombe_as_published(): # Newcombe 1998, table II, 9/10 - 3/10 by method 10
    assert np.allclose(newcombe(3, 10 - 1, 10), (.1705, .8090), atol=2e-4)

def fisher_power(p, q, n):
    "Exact power: every pair of counts, Fisher's p by total."
    a = np.arange(n + 1)
    one, two = stats.binom.pmf(a, n, p), stats.binom.pmf(a, n, q)
    power = 0.
    for total in range(2*n + 1):
        x = np.arange(max(0, total - n), min(n, total) + 1)
        h = stats.hypergeom.pmf(x, 2*n, n, total)
        ps = np.array([h[h <= v*(1 + 1e-7)].sum() for v in h])
        power += (one[x]*two[total - x])[ps < .05].sum()
    return power

@pytest.mark.parametrize('p,q', [(41/234, 21/234), (61/234, 102/234), (.5, .8)])
def test_needed_is_the_exact_power(p, q):
    n = needed(p, q)
    assert .79 < fisher_power(p, q, n) < .82 and fisher_power(p, q, int(.8*n)) < .75

def test_needed_paired_is_the_exact_power():
    p, q = 41/234, 21/234
    apart = p + q - 2*p*q
    n, lean = needed_paired(p, q, apart), p*(1 - q)/apart
    power = sum(stats.binom.pmf(m, n, apart)*sum(stats.binom.pmf(k, m, lean) for k in range(m + 1) if stats.binomtest(k, m).pvalue < .05) for m in range(20, 100))
    assert .74 < power < .82 # McNemar's exact test spends less than its 5 %
