import json, math, os, re, socket, subprocess, sys
import mpmath, numpy as np, pytest, scipy.linalg, torch
from hypothesis import given as all_of, settings, strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from transformers import AutoModelForCausalLM, GPT2Config, Gemma2Config
from rlsft_nb import chance, comparison, comparison_page, matrices, spectra
from rlsft_nb.matrices import *
from rlsft_nb.chance import *
from rlsft_nb.comparison import *
from rlsft_nb.comparison_page import *
from rlsft_nb.spectra import *
from rlsft_nb.parameters import load_params
from rlsft_nb.problems import CheckpointError
from rlsft_nb.weights import Checkpoint
from pretend import GPU, Claimed, plain
from test_weights import build

def given(*s): return lambda f: settings(max_examples=25)(all_of(*s)(f))
def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)
def basis(d, k, seed=0): return torch.linalg.qr(randn(d, k, seed=seed)).Q
def defect(Q): return float((Q.mT @ Q - torch.eye(Q.shape[1]).double()).abs().max())
def made(s, m, n, seed=0): return (basis(m, len(s), seed)*torch.as_tensor(s).double()) @ basis(n, len(s), seed + 1).mT

def check(W, S, value=1e-12):
    "What every decomposition must satisfy, against LAPACK."
    ref = np.linalg.svd(W.double().numpy(), compute_uv=False)
    assert S.U.dtype == S.s.dtype == S.Vt.dtype == torch.float64
    assert S.U.shape == (W.shape[0], len(ref)) and S.Vt.shape == (len(ref), W.shape[1])
    assert defect(S.U) < 1e-10 and defect(S.Vt.mT) < 1e-10
    assert torch.allclose((S.U*S.s) @ S.Vt, W.double(), atol=1e-12*max(ref[0], 1e-300), rtol=0)
    assert np.abs(S.s.numpy() - ref).max() <= value*max(ref[0], 1e-300) and (S.s.diff() <= 1e-13*ref[0]).all()

# the decomposition

@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from(['float64', 'float32', 'bfloat16', 'float16']), st.integers(0, 9))
def test_decompose(m, n, dtype, seed):
    W = randn(m, n, seed=seed).to(getattr(torch, dtype))
    check(W, decompose(W))
    assert torch.allclose(singular_values(W), decompose(W).s, atol=1e-8)

TAILS = {'graded': 10.**-torch.linspace(0, 9, 40), 'cliff': torch.cat([torch.ones(36), torch.full((4,), 1e-9)]), 'one zero': torch.cat([torch.ones(39), torch.zeros(1)]),
         'rank 3': torch.cat([torch.ones(3), torch.zeros(37)]), 'tiny tail': torch.cat([torch.linspace(1, .1, 33), 10.**-torch.linspace(3.1, 16, 7)]), 'equal': torch.ones(40), 'zero': torch.zeros(40)}

@pytest.mark.parametrize('tail', TAILS)
@pytest.mark.parametrize('m, n', [(40, 40), (40, 90), (90, 40)])
def test_hard_spectra(tail, m, n):
    W = made(TAILS[tail], m, n)
    check(W, decompose(W), 1e-13)
    assert (singular_values(W) - TAILS[tail].double()).abs().max() < 1e-8

@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 5))
def test_zero_rows_and_columns(m, n, seed):
    W = randn(m, n, seed=seed)
    W[::2], W[:, 1::3] = 0, 0
    check(W, decompose(W))

def test_precision_against_mpmath():
    "Relative accuracy of every value, also far below the largest; 40 digits as the reference."
    W = made(10.**-torch.linspace(0, 8, 12), 16, 12)
    with mpmath.workdps(40): ref = sorted((float(x) for x in mpmath.svd(mpmath.matrix(W.tolist()), compute_uv=False)), reverse=True)
    s = decompose(W).s
    assert np.abs(s.numpy()/ref - 1).max() < 1e-7 # the matrix itself is known to 1e-16 of the largest
    assert np.abs(s.numpy()[:6]/ref[:6] - 1).max() < 1e-11

def test_transposition_changes_sides_only():
    A, B = decompose(W := randn(9, 6)), decompose(W.mT)
    assert torch.allclose(A.s, B.s, atol=1e-13)
    assert max(principal_angles(A.U, B.Vt.mT, 6).max(), principal_angles(A.Vt.mT[:, :2], B.U[:, :2], 2).max()) < 1e-12

@pytest.mark.parametrize('W, message', [(torch.ones(3), 'two dimensions'), (torch.ones(0, 3), 'neither of them 0'), (torch.full((2, 2), math.nan), 'NaN'), (torch.full((2, 2), math.inf), 'infinity')])
def test_refused(W, message):
    for f in (decompose, singular_values):
        with pytest.raises(ValueError, match=message): f(W)

def test_large_matrix_uses_the_guard_and_not_the_fallback(monkeypatch):
    "A weight-like spectrum: few values below the cut, so one Gram decomposition suffices."
    s = torch.cat([torch.linspace(1, .05, 190), 10.**-torch.linspace(3.5, 7, 10)])
    W = made(s, 200, 200)
    lapack, shapes = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, 'svd', lambda A, **k: (shapes.append(A.shape), lapack(A, **k))[1])
    S = decompose(W)
    monkeypatch.undo()
    assert shapes == [(200, 10)]
    check(W, S)

@pytest.mark.parametrize('old', [True, False])
def test_tf32_is_off_whatever_the_caller_allows(old, tmp_path, monkeypatch):
    "Both of torch's flags; put back afterwards, also after an error."
    flag, seen = torch.backends.cuda.matmul, []
    if not old and not hasattr(flag, 'fp32_precision'): pytest.skip('this torch has one flag only')
    for n, noise in (('a', 0), ('b', .1)): save_file({'model.layers.0.self_attn.q_proj.weight': (randn(8, 8) + noise*randn(8, 8, seed=1)).float()}, tmp_path/f'{n}.safetensors')
    read = (lambda: ['ieee', 'tf32'][flag.allow_tf32]) if old else lambda: flag.fp32_precision
    monkeypatch.setattr(comparison, 'as_coded', lambda *a: seen.append(read()) or {})
    try:
        if old: torch.set_float32_matmul_precision('high')
        else: flag.fp32_precision = 'tf32'
        comparison.measure_pair(*(Checkpoint(tmp_path/f'{n}.safetensors')['layers.0.q'] for n in 'ab'), [2], 'shuffle', 2, 0, 8, coded=True)
        with pytest.raises(ZeroDivisionError), full_precision(): 1/0
        assert seen == ['ieee'] and read() == 'tf32'
    finally: torch.set_float32_matmul_precision('highest')
    assert torch.get_float32_matmul_precision() == 'highest'

def test_tf32_that_cannot_be_turned_off(monkeypatch):
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda v: None)
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'high')
    with pytest.raises(RuntimeError, match="'high', expected 'highest'"):
        with full_precision(): pass

# angles

@given(st.lists(st.floats(1e-9, math.pi/2), min_size=1, max_size=6), st.integers(0, 20), st.integers(0, 9))
def test_planted_rotation(angles, extra, seed):
    "Known angles come back to 1e-8 rad, by both methods, and scipy agrees."
    k = len(angles)
    d, t = 2*k + extra, torch.tensor(angles, dtype=torch.float64)
    Q, R1, R2 = basis(d, d, seed), basis(k, k, seed + 1), basis(k, k, seed + 2)
    A, B = Q[:, :k] @ R1, (Q[:, :k]*t.cos() + Q[:, k:2*k]*t.sin()) @ R2
    got = principal_angles(B, A, k)
    assert (got - t.sort().values).abs().max() < 1e-8
    assert np.abs(got.numpy() - np.sort(scipy.linalg.subspace_angles(A.numpy(), B.numpy()))).max() < 5e-8 # at a right angle scipy itself is 2e-8 off
    assert (nested_angles(*overlap(B, A), k, d) - got).abs().max() < 5e-8

@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 9))
def test_structural_zeros(d, p, seed):
    p = min(d, p)
    A, B = basis(d, p, seed), basis(d, p, seed + 50)
    for k in range(1, p + 1):
        a, z = principal_angles(A, B, k), structural_zeros(d, k)
        assert len(a) == k and (a[:z] == 0).all() and (a.diff() >= -1e-12).all() and (a[z:] > 0).all()
        assert torch.allclose(nested_angles(*overlap(A, B), k, d), a[z:], atol=1e-7)
        if k == d: assert a.max() == 0
        if k < d: assert len(random_angles(d, k)) == k - z

def test_equal_inputs_give_exactly_zero():
    S = decompose(randn(8, 5))
    assert principal_angles(S.U, S.U.clone(), 3).max() == 0 and max(a.max() for a in vector_angles(S, S)) == 0
    assert not measure(W := randn(6, 4), W)['changed']

@given(st.integers(0, 30))
def test_signs_do_not_matter(seed):
    A, B = decompose(W := randn(8, 5, seed=seed)), decompose(W + .01*randn(8, 5, seed=seed + 99))
    flip = torch.randn(5, generator=gen(seed)).sign().double()
    C = Spectrum(A.U*flip, A.s, A.Vt*flip[:, None])
    for x, y in zip(vector_angles(B, A), vector_angles(B, C)): assert torch.allclose(x, y, atol=1e-12)
    one = Spectrum(A.U*flip, A.s, A.Vt) # a sign on one side only is another matrix
    assert all((flip == 1).tolist()) or max(a.max() for a in vector_angles(one, A)) > 1.5

@given(st.integers(0, 30))
def test_permutation_inside_a_cluster_does_not_matter(seed):
    W = made([5, 3, 3, 3, 1], 8, 5)
    A = decompose(W)
    order = torch.tensor([0, *(1 + torch.randperm(3, generator=gen(seed))).tolist(), 4])
    B, spans = Spectrum(A.U[:, order], A.s, A.Vt[order]), clusters(A.s, A.s, 1e-9)
    assert spans == [(0, 1), (1, 4), (4, 5)]
    assert max(a.max() for a in cluster_angles(B, A, spans)) < 1e-7

@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 2))
def test_clusters_cover(values, tol):
    s = torch.tensor(sorted(values, reverse=True)).double()
    spans = clusters(s, s, tol)
    assert [i for a, b in spans for i in range(a, b)] == list(range(len(s)))
    assert all(s[b - 1] - s[b] > tol for _, b in spans[:-1])

@pytest.mark.parametrize('k', [0, 6])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f'k={k}, expected 1..5'): principal_angles(basis(8, 5), basis(8, 5), k)

@pytest.mark.parametrize('d, k', [(60, 15), (60, 30), (60, 45), (200, 20)])
def test_law_of_random_subspaces(d, k):
    drawn = torch.stack([principal_angles(basis(d, k, i), basis(d, k, i + 500), k)[structural_zeros(d, k):].rad2deg() for i in range(30)]).mean(0)
    assert (drawn - random_angles(d, k)).abs().max() < 3 and abs(drawn.mean() - random_angles(d, k).mean()) < .3

def test_law_refuses():
    for k in (0, 5):
        with pytest.raises(ValueError, match='expected 1..4'): random_angles(5, k)

# nulls

@pytest.mark.parametrize('null', NULLS)
@pytest.mark.parametrize('m, n', [(9, 9), (7, 12), (12, 7)])
def test_null_updates(null, m, n):
    D = made(torch.linspace(3, .1, min(m, n)), m, n)
    W0 = 2.**torch.randint(-3, 3, (m, n), generator=gen(3)) * (1 + torch.rand(m, n, generator=gen(4), dtype=torch.float64))
    X = null_update(D, null, gen(), W0=W0)
    assert X.shape == D.shape and torch.allclose(X.norm(), D.norm(), rtol=1e-12) and not torch.allclose(X, D)
    if null != 'orient': assert torch.allclose(X.abs().flatten().sort().values, D.abs().flatten().sort().values)
    if null == 'sized': # every size keeps its own entries
        for e in torch.frexp(W0).exponent.unique(): assert torch.equal(*(Y[torch.frexp(W0).exponent == e].abs().sort().values for Y in (X, D)))
    if null == 'orient': assert torch.allclose(singular_values(X), singular_values(D), atol=1e-10)

@pytest.mark.parametrize('m, n', [(9, 9), (7, 12), (12, 7)])
def test_draws_of_a_cpu_are_these(m, n):
    "Committed records hold them."
    D, g, same = randn(m, n, seed=2), gen(5), gen(5)
    shuffled = D.flatten()[torch.randperm(m*n, generator=same)].reshape(m, n)*torch.randn(m, n, generator=same, dtype=torch.float64).sign()
    assert torch.equal(null_update(D, 'shuffle', g), shuffled)
    U, V = (torch.linalg.qr(torch.randn(d, min(m, n), generator=same, dtype=torch.float64)).Q for d in (m, n))
    oriented = (U*singular_values(D)) @ V.mT
    assert torch.equal(null_update(D, 'orient', g), oriented) and torch.equal(null_update(D, 'orient', gen(5), singular_values(D)), null_update(D, 'orient', gen(5)))
    assert torch.equal(storage_noise(D, g), (torch.frexp(D).exponent - 8).double().exp2()*(torch.rand(m, n, generator=same, dtype=torch.float64) - .5))

def test_singular_values_of_an_update_are_found_once(monkeypatch):
    seen, real, W = [], matrices.singular_values, randn(9, 6)
    monkeypatch.setattr(comparison, 'singular_values', lambda X: (seen.append(X.shape), real(X))[1])
    measure(W + .1*randn(9, 6, seed=1), W, [2], 'orient', 7)
    assert len(seen) == 2 # for the record, and for all draws

def test_first_order_against_measurement():
    for m, n in ((80, 40), (40, 80), (60, 60)):
        W, size = made(torch.linspace(3, 1, min(m, n)), m, n), .0
        S0, seen = decompose(W), []
        for i in range(20):
            D = 1e-4*randn(m, n, seed=i)
            size = float(D.norm())
            u, v = vector_angles(decompose(W + D), S0)
            seen.append((v, u) if m >= n else (u, v))
        for j, told in enumerate(first_order(S0.s, m, n, size)):
            rms = torch.stack([s[j] for s in seen]).square().mean(0).sqrt()
            assert .85 < (rms/told).median() < 1.15, (m, n, j)

def test_first_order_of_subspaces():
    W = made(torch.linspace(3, 1, 40), 80, 40)
    S0, D = decompose(W), 1e-4*randn(80, 40, seed=5)
    S = decompose(W + D)
    short, far = first_order_principal(S0.s, 80, 40, float(D.norm()), 10, gen())
    for told, A, B, d in ((short, S.Vt.mT, S0.Vt.mT, 40), (far, S.U, S0.U, 80)):
        assert len(told) == 10 and .6 < told.mean()/nested_angles(*overlap(A, B), 10, d).mean() < 1.6

def test_flag_fires_at_its_nominal_rate():
    "On random updates: 5 % of the time in all, half of it on each side (binomial, 99.9 %)."
    n, flags = 240, dict(lead=[], values=[], bulk=[])
    W, g = made(torch.linspace(3, .5, 12), 16, 12), gen(3)
    S0 = decompose(W)
    for i in range(n):
        D = .01*torch.randn(16, 12, generator=g, dtype=torch.float64)
        here = compared(decompose(W + D), S0)[0]
        null = [compared(decompose(W + null_update(D, 'shuffle', g)), S0)[0] for _ in range(9)]
        for k in flags: flags[k].append(beyond(here[k], [x[k] for x in null])['verdict'])
    for k, f in flags.items():
        assert binom.ppf(.0005, n, .05) <= n - f.count('within') <= binom.ppf(.9995, n, .05), (k, f.count('beyond'), f.count('below'))
        assert max(f.count('beyond'), f.count('below')) <= binom.ppf(.9995, n, .025), (k, f.count('beyond'), f.count('below'))

def test_storage_noise_is_that_of_rounding():
    W = randn(300, 300)
    real, drawn = W.bfloat16().double() - W, storage_noise(W, gen(1))
    assert abs(float(drawn.norm()/real.norm()) - 1) < .01 and (drawn.abs() <= 2.**-8*W.abs()).all()

@given(st.integers(2, 9), st.floats(.1, 10), st.floats(.01, 3))
def test_beyond_is_a_ratio(n, x, spread):
    draws = [math.exp(spread*v) for v in np.random.default_rng(n).normal(size=n)]
    a, b = beyond(x, draws), beyond(7*x, [7*d for d in draws])
    assert a['verdict'] == b['verdict'] and math.isclose(a['ratio'], b['ratio'], rel_tol=1e-9) and a['lo'] < 1 < a['hi']

# the record

@given(st.sampled_from([(1, 1), (1, 5), (5, 1), (2, 2), (3, 7), (12, 12), (30, 9)]), st.sampled_from(NULLS), st.floats(1e-6, 2))
def test_record_is_json_and_consistent(shape, null, size):
    W0, D = randn(*shape), size*randn(*shape, seed=1)
    r = json.loads(json.dumps(measure(W0 + D, W0, [1, .5, 1.], null, 2), allow_nan=False))
    assert math.isclose(r['update'], float(D.norm()), rel_tol=1e-9) and 0 <= r['split']['values'] <= 1
    assert np.allclose(r['ds'], (decompose(W0 + D).s - decompose(W0).s).tolist(), rtol=1e-4, atol=1e-6*size)
    for side, d in zip('UV', shape):
        for p in r['sides'][side]['principal']: assert len(p['curve']) == min(p['k'], d - p['k']) and p['zeros'] == structural_zeros(d, p['k'])

def test_measure_refuses():
    W = randn(6, 4)
    for kwargs, message in ((dict(draws=1), 'draws=1'), (dict(null='x'), "null='x'"), (dict(ks=[0]), 'k=0'), (dict(ks=[1.5]), 'k=1.5'), (dict(ks=['3']), "k='3'")):
        with pytest.raises(ValueError, match=message): measure(W + randn(6, 4, seed=2), W, **kwargs)
    with pytest.raises(ValueError, match=r'shape \(4, 6\)'): measure(W.mT, W)

def test_rank_deficient_reference():
    "A matrix with zero rows and an update that keeps them: finite, and the free directions are counted."
    W = randn(12, 8); W[6:] = 0
    D = .01*randn(12, 8, seed=4); D[6:] = 0
    r = measure(W + D, W)
    assert r['dead'] == 2 and json.dumps(r, allow_nan=False)

def test_split_against_a_loop():
    W, D = randn(7, 5), randn(7, 5, seed=1)
    U, s, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    values = sum((U[:, i] @ D.numpy() @ Vt[i])**2 for i in range(5))/float(D.norm()**2)
    assert math.isclose(split_update(decompose(W + D), decompose(W), D.norm())['values'], values, rel_tol=1e-10)

# two checkpoints

def build_other(kind):
    "Architectures that the package has no names for."
    torch.manual_seed(0)
    if kind == 'gpt2': return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    return AutoModelForCausalLM.from_config(Gemma2Config(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8))

@pytest.fixture(params=['qwen2', 'qwen2 tied', 'llama', 'mllama', 'gpt2', 'gemma2'])
def pico(request, tmp_path):
    "A pico model and a copy with noise, one in shards."
    kind, *tied = request.param.split()
    lm = build_other(kind) if kind in ('gpt2', 'gemma2') else build(kind, bool(tied))
    lm.save_pretrained(tmp_path/'a')
    with torch.no_grad():
        for p in lm.parameters(): p.add_(.01*p.std()*torch.randn(p.shape, generator=gen(7)) if p.ndim == 2 else 0)
    lm.save_pretrained(tmp_path/'b', max_shard_size='8KB')
    return tmp_path

def test_compare(pico):
    found = compare(pico/'a', pico/'b', pico/'out', ks=[2, .5], draws=2)
    assert list(found['matrices']) == Checkpoint(pico/'a').names()
    kind = json.loads((pico/'a'/'config.json').read_text())['model_type']
    if kind != 'mllama': # every 2-D parameter, a tied one once
        assert len(found['matrices']) == sum(p.ndim == 2 for p in AutoModelForCausalLM.from_pretrained(pico/'a').parameters())
    assert all(r['changed'] for n, r in found['matrices'].items() if n.startswith('layers'))
    assert (set(found['ends']) == {'a', 'b'}) == (not Checkpoint(pico/'a').tied)
    json.dumps(found, allow_nan=False)

def test_report(toy):
    "One page with everything in it, a table for pandas, and pictures."
    found = compare(toy/'a', toy/'b', toy/'out', ks=[2, .5], draws=2)
    files = write_report(found, toy/'out')
    assert all(f.stat().st_size > 100 for f in files)
    import pandas as pd
    table = pd.read_parquet(toy/'out'/'spectra.parquet')
    assert list(table['matrix']) == list(found['matrices']) and table['lead_ratio'].notna().all()
    page = (toy/'out'/'report.html').read_text()
    assert page.count('<tr>') == len(table) + 1 and 'src="http' not in page and page.count('data:image/png') == 2

@pytest.fixture
def toy(tmp_path):
    for name, noise in (('a', 0), ('b', .01)):
        (tmp_path/name).mkdir()
        t = {f'model.layers.{i}.{n}.weight': randn(*s, seed=i).float() for i in range(3) for n, s in {'self_attn.q_proj': (12, 12), 'mlp.up_proj': (20, 12)}.items()}
        save_file({n: W + noise*randn(*W.shape, seed=9).float() for n, W in t.items()}, tmp_path/name/'model.safetensors')
    return tmp_path

def test_resumes_by_matrix_and_notices_change(toy, monkeypatch):
    first = compare(toy/'a', toy/'b', toy/'out', ks=[3])
    kept = sorted((toy/'out').glob('matrices-*/*.json'))
    assert len(kept) == 6
    kept[0].unlink()
    done, real = [], comparison.measure_pair
    monkeypatch.setattr(comparison, 'measure_pair', lambda *a: (done.append(a[1].name), real(*a))[1])
    assert compare(toy/'a', toy/'b', toy/'out', ks=[3]) == first and done == [kept[0].stem]
    monkeypatch.setattr(comparison, 'measure_pair', lambda *a: pytest.fail('measured again'))
    assert compare(toy/'a', toy/'b', toy/'out', ks=[3]) == first
    monkeypatch.setattr(comparison, 'measure_pair', real)
    save_file({n: 2*W for n, W in load_file(toy/'b'/'model.safetensors').items()}, toy/'b'/'model.safetensors')
    assert compare(toy/'a', toy/'b', toy/'out', ks=[3]) != first

def test_the_same_checkpoint_twice(toy, capsys):
    assert main([str(toy/'a'), str(toy/'a'), '--out', str(toy/'out'), '--workers', '1']) == 0
    assert '6 matrices, none changed: both checkpoints hold the same weights.' in capsys.readouterr().out
    assert 'none changed' in (toy/'out'/'report.html').read_text()

def test_bad_inputs(toy, capsys):
    for change, message in ((dict(extra=torch.ones(2, 2)), 'Left out: only in B: extra.'), ({'model.layers.1.mlp.up_proj.weight': torch.ones(20, 11)}, 'layers.1.up (20x12 and 20x11)'),
                            ({'model.layers.1.mlp.up_proj.weight': torch.full((20, 12), math.nan)}, '240 values that are NaN')): # the rest is measured
        save_file(load_file(toy/'a'/'model.safetensors') | change, toy/'c.safetensors')
        assert main([str(toy/'a'), str(toy/'c.safetensors'), '--out', str(toy/'out'), '--workers', '1']) == 0
        assert message in capsys.readouterr().out and 'Left out' in (toy/'out'/'report.html').read_text()
    (toy/'lost').mkdir()
    save_file(load_file(toy/'a'/'model.safetensors'), toy/'lost'/'model-00001-of-00002.safetensors')
    assert main([str(toy/'a'), str(toy/'lost'), '--out', str(toy/'out'), '--workers', '1']) == 1
    assert '1 of 2 shards are missing: model-00002-of-00002.safetensors' in capsys.readouterr().err
    save_file({'norm': torch.ones(3)}, toy/'c.safetensors')
    for args, message in (([str(toy/'c.safetensors')], 'no 2-D'), (['nobody'], 'nobody'), ([str(toy/'b'), '--matrices', 'z*'], "'z*' matches none"), ([str(toy/'b'), '--draws', '1'], 'draws=1')):
        assert main([str(toy/'a'), *args, '--out', str(toy/'out'), '--workers', '1']) == 1
        assert message in capsys.readouterr().err

def test_command_line(toy, env, capsys):
    "The literal command, in a pipe, with worker processes."
    run = lambda *a: subprocess.run([sys.executable, '-m', 'rlsft_nb.spectra', *a], capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=toy, env=env)
    done = run('a', 'b', '--out', 'seen', '--matrices', 'layers.0.*', '--k', '2,0.5', '--null', 'orient', '--draws', '3')
    assert done.returncode == 0 and done.stdout.splitlines()[0].startswith('2 matrices, 2 changed.'), done.stderr
    assert sorted(p.name for p in (toy/'seen').iterdir() if p.is_file()) == ['matrices.png', 'overview.png', 'report.html', 'spectra.json', 'spectra.parquet']
    with pytest.raises(SystemExit): main(['a', 'b', '--k', 'many'])
    assert "'many' is no list" in capsys.readouterr().err
    assert re.search(r'spectra:.* 0/2 \[00:00<', done.stderr) # how many, time gone, time left

def test_a_killed_run_goes_on_where_it_stopped(toy, env, capsys):
    "Killed in the middle; the second run measures only the rest."
    code = """
import os, sys, rlsft_nb.comparison as s
from rlsft_nb.comparison_page import main
real = s.measure_pair
s.measure_pair = lambda *a: os.kill(os.getpid(), 9) if a[0].name == 'layers.1.q' else real(*a)
main(sys.argv[1:])"""
    args = [str(toy/'a'), str(toy/'b'), '--out', str(toy/'seen'), '--workers', '1', '--draws', '2', '--k', '2']
    assert subprocess.run([sys.executable, '-c', code, *args], capture_output=True, env=env).returncode == -9
    times = lambda: {f.name: f.stat().st_mtime_ns for f in (toy/'seen').glob('matrices-*/*.json')}
    kept = times()
    assert 0 < len(kept) < 6 and not (toy/'seen'/'report.html').exists()
    assert main(args) == 0 and f'/{6 - len(kept)} [' in capsys.readouterr().err
    assert len(now := times()) == 6 and kept.items() <= now.items() and (toy/'seen'/'report.html').exists()

def test_ranks_under_accelerate_launch(toy, env):
    "Two processes with gloo: each does its share, one report, the same numbers as one process."
    with socket.socket() as s: s.bind(('', 0)); port = s.getsockname()[1]
    launch = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port), '-m']
    args = ['rlsft_nb.spectra', 'a', 'b', '--k', '3', '--draws', '2', '--out']
    done = subprocess.run([sys.executable, *launch, *args, 'two'], capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=toy, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('6 matrices, 6 changed.') == 1 and len(re.findall(r'spectra:.* 0/3 ', done.stderr)) == 2, done.stderr
    assert json.loads((toy/'two'/'spectra.json').read_text())['matrices'] == compare(toy/'a', toy/'b', toy/'one', ks=[3], draws=2)['matrices']

def test_workers_and_memory_are_in_the_help(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    assert f'{comparison.BYTES} bytes for each element' in ' '.join(capsys.readouterr().out.split())

def test_memory_is_bounded_by_the_largest_matrix(tmp_path, env):
    "Peak memory of many matrices is that of one, and below what the help says."
    code = '''import sys, torch, rlsft_nb.comparison as s
from rlsft_nb.machine import peak_mib
from rlsft_nb.weights import Checkpoint
torch.set_num_threads(1)
A, B = (Checkpoint(f) for f in sys.argv[1:])
def go(name): return s.measure_pair(A[name], B[name], [.5], 'shuffle', 2, 0, 1000)
go('layers.0.q'); before = peak_mib() # small: brings in what every process needs
for n in A.names(): go(n)
print((peak_mib() - before)*2**20)'''
    draw = lambda i, seed: randn(*((64, 64), (1000, 1000))[i > 0], seed=seed)
    for f, noise in (('a', 0), ('b', .01)): save_file({f'model.layers.{i}.self_attn.q_proj.weight': (draw(i, i) + noise*draw(i, 8)).bfloat16() for i in range(3)}, tmp_path/f'{f}.safetensors')
    run = lambda: subprocess.run([sys.executable, '-c', code, tmp_path/'a.safetensors', tmp_path/'b.safetensors'], capture_output=True, text=True, env=env, check=True)
    seen = [float(run().stdout) for _ in range(3)] # what the allocator keeps differs from run to run, by a fifth
    assert 40*1000**2 < min(seen) < comparison.BYTES*1000**2 + 2**24 and max(seen) < 1.5*comparison.BYTES*1000**2 # 16 MiB for the libraries

# GPUs, pretended

def same_draws(g, device): # what `_source` makes for a GPU, on the CPU
    return gen(int(torch.randint(2**62, (), generator=g)))

def near(a, b, tol=1e-4):
    "Records alike, whatever they hold."
    if isinstance(a, dict): assert a.keys() == b.keys(); return [near(a[k], b[k], tol) for k in a]
    if isinstance(a, list): assert len(a) == len(b); return [near(x, y, tol) for x, y in zip(a, b)]
    assert a == (pytest.approx(b, rel=tol, abs=1e-7) if isinstance(b, float) else b)

@pytest.mark.parametrize('null', NULLS)
@pytest.mark.parametrize('m, n', [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize('rank', [0, 3])
def test_a_gpu_measures_the_same(m, n, rank, null, monkeypatch):
    W0, D = randn(m, n), .01*randn(m, n, seed=1)
    W = (W0 + (decompose(D).U[:, :rank] @ randn(rank, n, seed=2) if rank else D)).bfloat16()
    run = lambda at: measure(W.to(at), W0.to(at), [.1, .5, 1.], null, 3, 1)
    with GPU() as gpu: got = run('cuda:0')
    assert {'linalg_eigh', 'linalg_eigvalsh', 'randn', 'rand'} <= gpu.ran and ('randperm' in gpu.ran) == (null != 'orient')
    other = run('cpu')
    monkeypatch.setattr(chance, '_source', same_draws)
    near(got, run('cpu'))
    assert got['verdicts'] != other['verdicts']

@pytest.mark.parametrize('m, n', [(40, 24), (24, 40), (24, 24)])
def test_a_gpu_codes_the_same(m, n):
    W0, W = randn(m, n), randn(m, n) + .1*randn(m, n, seed=1)
    with GPU() as gpu: got = as_coded(W.to('cuda:0'), W0.to('cuda:0'), 5)
    assert gpu.drivers == [('gesvd', (5, 5))]*2 and 'linalg_eigh' in gpu.ran
    want = as_coded(W, W0, 5)
    assert got['ds'] == pytest.approx(want['ds'], abs=1e-4)
    for side in 'UV': assert got[side] == pytest.approx(want[side], abs=.2) # fp32 and arccos

@pytest.mark.parametrize('m, n', [(9, 9), (7, 12), (12, 7)])
@pytest.mark.parametrize('null', NULLS)
def test_a_gpu_draws_by_itself(null, m, n):
    "From a seed that the CPU's generator gives, another one each time."
    D, g = randn(m, n, seed=2), gen(5)
    with GPU():
        draws = [null_update(D.to('cuda:0'), null, g, W0=D.to('cuda:0')).cpu() for _ in range(2)]
        noise = storage_noise(D.to('cuda:0'), g).cpu()
    g = gen(5)
    for X in draws: assert torch.allclose(X, null_update(D, null, same_draws(g, None), W0=D), atol=1e-12)
    assert torch.equal(noise, storage_noise(D, same_draws(g, None)))
    assert not torch.allclose(*draws) and not torch.allclose(draws[0], null_update(D, null, gen(5), W0=D))

@pytest.mark.parametrize('tail', TAILS)
@pytest.mark.parametrize('m, n', [(40, 40), (40, 90), (90, 40)])
def test_hard_spectra_on_a_gpu(tail, m, n):
    "Also where the Gram matrix does not suffice: QR first, then `gesvd`, never the default."
    W = made(TAILS[tail], m, n)
    with GPU() as gpu: S, s = decompose(W.to('cuda:0')), singular_values(W.to('cuda:0'))
    assert isinstance(S.U, Claimed)
    check(W, Spectrum(*(plain(x) for x in S)), 1e-13)
    assert (plain(s) - TAILS[tail].double()).abs().max() < 1e-8
    assert all(d == 'gesvd' and a == b for d, (a, b) in gpu.drivers) and bool(gpu.drivers) == (tail != 'equal')

CARDS = {n: [(f'of {n} GB', gib)] for n, gib in ((24, 23.7), (80, 79.2))}
SIZES = dict(kv=(512, 512*3584), square=(3584, 3584**2), up=(3584, 18944*3584), embed=(3584, 152064*3584), smollm2_up=(576, 1536*576), smollm2_embed=(576, 49152*576))

@pytest.mark.parametrize('found, held', [([], [0]*6), (CARDS[80], [0, 29, 8, 1, 0, 16]), (CARDS[80]*4, [0, 116, 32, 4, 0, 64]), (CARDS[24], [0, 8, 2, 0, 0, 5]), (CARDS[80] + CARDS[24], [0, 16, 4, 0, 0, 10])])
def test_room_on_gpus(found, held, monkeypatch):
    "Small matrices and what is too large go to CPUs; as many of the others as the smallest GPU holds, on each."
    monkeypatch.setattr(comparison, 'gpus', lambda: found)
    monkeypatch.setattr(comparison, 'own_device', lambda: 'cuda:2')
    assert [room(*size) for size in SIZES.values()] == held
    assert [device_of(*size) for size in SIZES.values()] == ['cuda:2' if k else 'cpu' for k in held]
    for k, (_, elements) in zip(held, SIZES.values()): assert k*comparison.BYTES*elements < sum(gib for _, gib in found)*2**30 or not k

def test_one_call_a_device(tmp_path, monkeypatch):
    calls, items, extents = [], dict(a=(1,), b=(2,), c=(3,)), dict(a=SIZES['up'], b=SIZES['kv'], c=SIZES['square'])
    monkeypatch.setattr(comparison, 'map_items', lambda fn, todo, folder, workers, desc: (calls.append((list(todo), workers)), dict(todo))[1])
    run = lambda workers: (calls.clear(), map_sized('x.y', items, extents, tmp_path, workers, 'd'), list(calls))[1:]
    monkeypatch.setattr(comparison, 'gpus', lambda: [])
    assert run(64) == (items, [(['a', 'b', 'c'], 64)])
    monkeypatch.setattr(comparison, 'gpus', lambda: CARDS[80])
    assert run(64) == (items, [(['a', 'c'], 8), (['a', 'b', 'c'], 64)]) # the first are on disk by then
    assert run(2)[1] == [(['a', 'c'], 2), (['a', 'b', 'c'], 2)]
    items.pop('a'), items.pop('c')
    assert run(64)[1] == [(['b'], 64)]

def test_processes(monkeypatch):
    cfg = load_params('tiny', dict(workers=3))
    monkeypatch.setattr(os, 'cpu_count', lambda: 16)
    monkeypatch.setattr(comparison, 'gpus', lambda: [])
    assert comparison.processes(cfg) == 3
    monkeypatch.setattr(comparison, 'gpus', lambda: CARDS[80])
    assert comparison.processes(cfg) == 8 and comparison.processes(load_params('tiny', dict(workers=12))) == 12

def test_compare_with_a_gpu(tmp_path, monkeypatch):
    "Some matrices there, some here; the record is in order, and says of each what a CPU says."
    for f, noise in (('a', 0), ('b', .01)):
        t = {f'model.{n}.weight': randn(*s, seed=3) for n, s in (('layers.0.self_attn.q_proj', (12, 12)), ('layers.0.mlp.up_proj', (30, 12)), ('embed_tokens', (60, 12)))}
        save_file({n: (W + noise*randn(*W.shape, seed=8)).float() for n, W in (t | {'lm_head.weight': randn(50, 12, seed=4)}).items()}, tmp_path/f'{f}.safetensors')
    run = lambda out: compare(tmp_path/'a.safetensors', tmp_path/'b.safetensors', tmp_path/out, ks=[3], draws=2)
    want, where, ends, real, align = run('cpu'), {}, [], comparison.measure, comparison.end_alignment
    monkeypatch.setattr(comparison, 'gpus', lambda: CARDS[24])
    monkeypatch.setattr(comparison, 'own_device', lambda: 'cuda:0')
    monkeypatch.setattr(comparison, 'SHORT', 300)
    monkeypatch.setattr(comparison, 'measure', lambda W, W0, *a: (where.update({tuple(W.shape): (W.is_cuda, W0.is_cuda)}), real(W, W0, *a))[1])
    monkeypatch.setattr(comparison, 'end_alignment', lambda *Ws: (ends.append([W.is_cuda for W in Ws]), align(*Ws))[1])
    with GPU(): got = run('gpu')
    assert where == {(12, 12): (False, False), (30, 12): (True, True), (60, 12): (True, True), (50, 12): (True, True)} and ends == [[True]*2]*2
    assert list(got['matrices']) == list(want['matrices']) and got['matrices']['layers.0.q'] == want['matrices']['layers.0.q']
    near(got['ends'], want['ends'])
    for n, r in want['matrices'].items(): near(got['matrices'][n]['sides'], r['sides']); near(got['matrices'][n]['split'], r['split'])
    monkeypatch.setattr(comparison, 'NARROW', 12)
    where.clear()
    with GPU(): run('all')
    assert where == {s: (True, True) for s in ((12, 12), (30, 12), (60, 12), (50, 12))}

# figures

def test_figures_and_verdicts_of_a_run(tmp_path):
    "What the experiment draws, on three noisy copies of a random model."
    h, shapes = 16, {'self_attn.q_proj': (16, 16), 'self_attn.k_proj': (8, 16), 'self_attn.v_proj': (8, 16), 'mlp.up_proj': (40, 16)}
    t = {f'model.layers.{i}.{n}.weight': randn(*s, seed=i) for i in (0, 1) for n, s in shapes.items()}
    for j, name in enumerate(('base', 'peak', 'end', 'rl')):
        save_file({n: (W + .01*j*randn(*W.shape, seed=60 + j)).float() for n, W in t.items()}, tmp_path/f'{name}.safetensors')
    points = {n: tmp_path/f'{n}.safetensors' for n in ('base', 'peak', 'end', 'rl')}
    found = {l: compare(*ab, tmp_path/'out', ks=[.5, 1.], draws=2, coded=True) for l, ab in pairs(points).items()}
    assert all('coded' in r for f in found.values() for r in f['matrices'].values())
    assert not any('coded' in r for r in compare(*pairs(points)['SFT'], tmp_path/'out', ks=[.5, 1.], draws=2)['matrices'].values()) # nor kept from above
    assert list(found) == ['SFT', 'SFT from peak', 'RL'] and list(pairs(dict(base=0, peak=1, end=2))) == list(found)[:2]
    names = ['layers.0.q', 'layers.0.k', 'layers.0.v', 'layers.0.up']
    data = trimmed(found, names, values_part), trimmed(found, names, angles_part)
    for fig, n in ((fig3(data[0], names, h, 't'), 12), (fig4(data[1], names, 't'), 12), (fig_pair(found, names, 't'), 12), (fig_size(sizes(found), 't'), 2)): assert len(fig.axes) == n
    fig_overview({l: summary(f) for l, f in found.items()}, 't')
    rows = verdicts(found, found)
    claims = {r['claim']: r for r in rows}
    assert list(claims)[:2] == ['SFT: singular values stay', 'SFT: directions turn beyond chance'] and len(rows) == len(claims) == 11
    assert all(r['verdict'] in ('holds', 'fails', 'no evidence') for r in rows)
    assert verdicts({'SFT': found['SFT']}, found)[-1]['verdict'] == 'no evidence'
    assert claims['SFT and RL rotate alike per unit of |ΔW|/|W|']['verdict'] == 'holds' # both are noise
    assert claims['Zhu et al.: RL moves the spectrum less']['verdict'] == 'fails'
    same = verdicts(found | dict(RL=found['SFT']), found)[-4:]
    assert [r['here'].split()[-3] for r in same[:3]] == ['1.00']*3 and [r['verdict'] for r in same[:3]] == ['holds', 'holds', 'fails']
    still = found | dict(RL=dict(found['RL'], matrices={n: dict(r, changed=False) for n, r in found['RL']['matrices'].items()}))
    assert verdicts(still, found)[-1] == dict(claim='SFT and RL rotate alike', paper='curves coincide (figure 4)', here='RL changed nothing', n=0, verdict='no evidence')

def test_seeds_side_by_side(tmp_path):
    rec = lambda verdict, shift: dict(layer=0, changed=True, shift=shift, update=.1, norm0=1., verdicts=dict(lead=dict(verdict=verdict, here=shift, ratio=2.), values=dict(ratio=1.)))
    found = lambda *v: {l: dict(matrices={f'layers.0.{i}': rec(x, .005*(i + 1)) for i, x in enumerate(v)}) for l in ('SFT', 'RL')}
    numbers = [seed_numbers(found('beyond', 'beyond', 'below', 'within')), seed_numbers(found('beyond', 'within', 'within', 'within'))]
    assert [n['SFT: share of matrices that turn beyond chance'] for n in numbers] == [.5, .25] and numbers[0]['RL: share of matrices with a shift ≤ 1 %'] == .5
    assert numbers[0]['RL over SFT, angle_per_unit'] == 1 and numbers[0]['SFT: share of matrices that turn less'] == .25
    table = {r['claim']: r for r in seeds_table([([dict(claim='x', verdict=v)], n) for v, n in zip(('holds', 'fails'), numbers)])}
    assert table['x']['verdict'] == 'fails 1, holds 1' and table['SFT: share of matrices that turn beyond chance']['here'] == .375
    lo, hi = table['SFT: share of matrices that turn beyond chance']['interval']
    assert math.isclose(hi - .375, .125*12.7062, rel_tol=1e-4) and math.isclose(lo, .75 - hi) # Student's t, one degree of freedom

def test_median_interval_covers():
    "At least 95 % of the time, for any distribution."
    rng = np.random.default_rng(0)
    for n in (6, 9, 28):
        hits = [lo <= 0 <= hi for _, (lo, hi) in (median_interval(rng.standard_cauchy(n)) for _ in range(1500))]
        assert .94 <= np.mean(hits) <= .985, n

@pytest.mark.parametrize('low_rl, low_sft, verdict', [(3, 0, 'holds'), (3, 3, 'fails'), (1, 0, 'fails')])
def test_principal_entries(low_rl, low_sft, verdict):
    vs = lambda low: [dict(verdict='below' if i < low else 'within', ratio=1.) for i in range(4)]
    assert spectra._avoids(vs(low_rl), vs(low_sft))['verdict'] == verdict
    assert spectra._avoids([], vs(low_sft))['verdict'] == 'no evidence'
