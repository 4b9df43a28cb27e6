"Intervals and paired tests, against scipy; the table that ends in verdicts."
import math
import numpy as np, pytest, scipy.stats
from hypothesis import given, strategies as st
from rlsft_nb.intervals import cluster_interval, mcnemar, mean_spread, one_more, wilson
from rlsft_nb.verdicts import verdict_table

counts = st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))

@given(counts, st.floats(.5, .999))
def test_wilson(kn, conf):
    k, n = kn
    if n == 0: assert wilson(0, 0) == (0, 1); return
    ci = scipy.stats.binomtest(k, n).proportion_ci(conf, method='wilson')
    assert wilson(k, n, conf) == pytest.approx((ci.low, ci.high), abs=1e-12)

@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar(pairs):
    r = mcnemar([a for a, _ in pairs], [b for _, b in pairs])
    n = r['n01'] + r['n10']
    assert r['n01'] == sum(b and not a for a, b in pairs) and r['n10'] == sum(a and not b for a, b in pairs)
    assert r['p'] == pytest.approx(scipy.stats.binomtest(r['n01'], n).pvalue if n else 1)

def test_mcnemar_of_clusters():
    rng = np.random.default_rng(0)
    def p(by_cluster): # 40 multisets of 10 hands; two models as good as each other, who disagree by multiset
        a, b = ((rng.random((40, 10)) < rng.choice([.05, .95], (40, 1))).ravel() for _ in range(2))
        return mcnemar(a, b, np.repeat(range(40), 10) if by_cluster else None)['p']
    naive, mended = (np.mean([p(c) < .05 for _ in range(400)]) for c in (False, True))
    assert naive > .3 and mended < .09
    a, b = [True]*30 + [False]*20, [False]*20 + [True]*30
    alone = mcnemar(a, b, range(50))
    assert alone['p'] >= mcnemar(a, b)['p'] and (alone['n01'], alone['n10']) == (20, 20)
    c = [True]*10 + [False]*40
    assert mcnemar(a, c, range(50))['p'] == pytest.approx(max(mcnemar(a, c)['p'], 2*scipy.stats.norm.sf(20/math.sqrt(20))))
    with pytest.raises(ValueError, match=r'len\(groups\)=2: expected 3'): mcnemar([1]*3, [0]*3, [1, 2])

@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_mean_spread(xs):
    r = mean_spread(xs)
    assert (r['mean'], r['n']) == (pytest.approx(np.mean(xs), abs=1e-9), len(xs)) and r['sd'] == pytest.approx(np.std(xs, ddof=1), abs=1e-9)
    if r['sd'] > 1e-6: assert (r['lo'], r['hi']) == pytest.approx(scipy.stats.t.interval(.95, len(xs) - 1, np.mean(xs), scipy.stats.sem(xs)), abs=1e-6)

@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=60))
def test_cluster_interval_contains_wilson(rows):
    hits, groups = zip(*rows)
    lo, hi = cluster_interval(hits, groups)
    p = sum(hits)/len(hits)
    assert 0 <= lo <= p + 1e-12 and p - 1e-12 <= hi <= 1
    if 0 < p < 1: assert hi - lo >= np.subtract(*wilson(sum(hits), len(hits))[::-1]) - 1e-12

def test_cluster_interval_covers():
    "Of 95 % intervals over groups that succeed or fail as a whole, about 95 % hold the truth; plain Wilson far fewer."
    rng, n, held, plain = np.random.default_rng(0), 400, 0, 0
    for _ in range(n):
        hits = np.repeat(rng.random(40) < .3, 5)
        (a, b), (c, d) = cluster_interval(hits, np.repeat(np.arange(40), 5)), wilson(hits.sum(), len(hits))
        held += a <= .3 <= b; plain += c <= .3 <= d
    assert .91 < held/n < .98 and plain/n < .75

def test_statistics_refuse():
    for f, m in ((lambda: wilson(-1, 3), 'k=-1, n=3'), (lambda: mcnemar([1], []), r'len\(a\)=1'), (lambda: mean_spread([]), r'xs=\[\]'), (lambda: cluster_interval([1], []), 'a group for each')):
        with pytest.raises(ValueError, match=m): f()

# verdicts

def test_verdict_table():
    t = verdict_table([dict(claim='a|b\nc', paper=None, here=.123456, n=234, interval=(.1, .2), verdict='held')])
    assert t.splitlines()[-1] == '| a\\|b c | – | 0.123 | 234 | 0.1 to 0.2 | – | held |'
    assert t._repr_markdown_() == t

def test_one_more_seed_lies_inside_as_often_as_it_should():
    g = np.random.default_rng(0)
    for n in (2, 3, 5):
        xs = g.normal(3, 2, (4000, n + 1))
        bounds = [one_more(x[:n], .9) for x in xs[:400]]
        half = scipy.stats.t.ppf(.95, n - 1)*xs[:400, :n].std(1, ddof=1)*math.sqrt(1 + 1/n)
        assert np.allclose(bounds, np.c_[xs[:400, :n].mean(1) - half, xs[:400, :n].mean(1) + half])
        assert abs(np.mean([lo <= x <= hi for (lo, hi), x in zip((one_more(x[:n], .9) for x in xs), xs[:, n])]) - .9) < .02
    with pytest.raises(ValueError, match='at least two'): one_more([1.])
