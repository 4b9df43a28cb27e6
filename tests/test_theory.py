"The gauge and its split: identities, a second implementation by explicit bases, real blocks, the stages."
import itertools, json
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from rlsft_nb import blocks, chance, checkpoint_chains, comparison, drift, freedoms, gauge, pipeline, theory as T
from rlsft_nb.parameters import load_params
from rlsft_nb.stages import Stage, run_stage
from rlsft_nb.verdicts import verdict_table
from rlsft_nb.weights import Checkpoint
from pretend import GPU
from test_spectra import same_draws

few = settings(max_examples=20)
close = lambda a, b, tol=1e-9: torch.testing.assert_close(a, b, rtol=tol, atol=tol)
normal = lambda seed, *shape: torch.from_numpy(np.random.default_rng(seed).normal(size=shape))
orthogonal = lambda seed, n: torch.linalg.qr(normal(seed, n, n)).Q
def skew(seed, n): return (X := normal(seed, n, n)) - X.mT
def near(a, b, tol=1e-8): assert {p: a[p] for p in gauge.PARTS} == pytest.approx({p: b[p] for p in gauge.PARTS}, abs=tol)

@st.composite
def updates(draw, heads=False):
    "A chain before and after an update, up to 7 wide; with heads also their number."
    n = draw(st.integers(1, 3)) if heads else 1
    h, d, o, seed = draw(st.integers(1, 5))*n, draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 10**6))
    g = draw(st.integers(1, 2)) if heads else 1
    before = normal(seed, h, d), normal(seed + 1, o, g*h)
    after = [W + draw(st.sampled_from([.01, .3]))*normal(seed + i, *W.shape) for i, W in enumerate(before, 2)]
    return (before, after, n) if heads else (before, after)

# a second implementation: the tangent spaces spelt out, and least squares

def project(columns, x):
    "`x` projected on the span of `columns`."
    if not columns: return np.zeros_like(x)
    B = np.stack(columns, 1)
    return B @ np.linalg.lstsq(B, x, rcond=1e-10)[0]

def generators(n): # of rotations in n dimensions
    for i, j in itertools.combinations(range(n), 2):
        E = np.zeros((n, n)); E[i, j], E[j, i] = 1, -1
        yield E

def by_bases(before, after, heads=1, planes=False):
    D, M = [(b - a).numpy() for a, b in zip(before, after)], [((a + b)/2).numpy() for a, b in zip(before, after)]
    flat = lambda *Xs: np.concatenate([X.ravel() for X in Xs])
    h, n = len(M[0])//heads, M[1].shape[1]//len(M[0])
    def spread(E, j): # a head's generator on all rows, and on all columns of its group
        one = np.zeros((heads, heads)); one[j, j] = 1
        return np.kron(one, E), np.kron(one, np.kron(np.eye(n), E))
    allowed = [E for E in generators(h) if not planes or np.argwhere(E)[0].tolist() in [[i, i + h//2] for i in range(h//2)]]
    pairs = [spread(E, j) for E in allowed for j in range(heads)]
    gauge = project([flat(A @ M[0], -M[1] @ B) for A, B in pairs], flat(*D))
    def turns(W): return [flat(E @ W) for E in generators(W.shape[0])] + [flat(W @ E) for E in generators(W.shape[1])]
    left = [flat(d) - project(turns(m), flat(d)) for d, m in zip(D, M)]
    total, g, v = sum(x @ x for x in map(flat, D)), gauge @ gauge, sum(x @ x for x in left)
    return dict(gauge=g/total, values=v/total, rotation=1 - (g + v)/total)

@few
@given(updates())
def test_a_second_implementation_agrees(update): near(gauge.split(*update), by_bases(*update))

@few
@given(updates(heads=True))
def test_and_head_by_head(update):
    before, after, n = update
    near(gauge.split(before, after, n), by_bases(before, after, n))
    if len(before[0])//n % 2 == 0: near(gauge.split(before, after, n, True), by_bases(before, after, n, True))

@few
@given(updates())
def test_the_step_is_the_nearest_one(update):
    before, after = update
    D, M = [b - a for a, b in zip(before, after)], [(a + b)/2 for a, b in zip(before, after)]
    A = gauge.gauge_part(D, M)
    miss = lambda X: float((D[0] - X @ M[0]).norm()**2 + (D[1] + M[1] @ X).norm()**2)
    close(A, -A.mT)
    assert all(miss(A) <= miss(A + eps*skew(s, len(A))) + 1e-9 for eps in (1e-3, .1) for s in range(5))

# what must hold

@few
@given(updates(), st.integers(0, 99), st.floats(.1, 10.))
def test_the_split_does_not_depend_on_bases_order_or_scale(update, seed, c):
    before, after = update
    own, (h, d), o = gauge.split(before, after), before[0].shape, len(before[1])
    assert sum(own[p] for p in gauge.PARTS) == pytest.approx(1) and min(own[p] for p in gauge.PARTS) >= 0
    R, P, Q = orthogonal(seed, h), orthogonal(seed + 1, d), orthogonal(seed + 2, o)
    near(own, gauge.split(after, before))
    near(own, gauge.split(*((R @ a @ P, Q @ b @ R.mT) for a, b in update)))
    near(own, gauge.split(*((c*a, c*b) for a, b in update)))

@few
@given(updates(), st.integers(0, 99), st.floats(.01, 3.))
def test_pure_updates(update, seed, size):
    (W1, W2), (h, d) = update[0], update[0][0].shape
    if h > 1:
        R = torch.linalg.matrix_exp(size*skew(seed, h)/h)
        V1, V2 = gauge.turn(W1, W2, R)
        close(V2 @ V1, W2 @ W1)
        close(torch.linalg.svdvals(V1), torch.linalg.svdvals(W1))
        near(gauge.split((W1, W2), (V1, V2)), dict(gauge=1, rotation=0, values=0), 1e-6)
    near(gauge.split((W1, W2), (W1*(1 + size), W2/(1 + size))), dict(gauge=0, rotation=0, values=1))
    if d > 1: assert gauge.split((W1, W2), (W1 @ torch.linalg.matrix_exp(size*skew(seed, d)/d), W2))['values'] < 1e-9

@few
@given(updates(), st.integers(0, 99))
def test_procrustes_finds_the_same_gauge(update, seed):
    (W1, W2), h = update[0], len(update[0][0])
    V1, V2 = gauge.turn(W1, W2, torch.linalg.matrix_exp(skew(seed, h)/h))
    U, _, Vt = torch.linalg.svd(V1 @ W1.mT + V2.mT @ W2)
    for a, b in zip(gauge.turn(W1, W2, U @ Vt), (V1, V2)): close(a, b)

@few
@given(updates(), st.integers(0, 99), st.sampled_from([0., .3]))
def test_no_gradient_points_along_the_gauge(update, seed, decay):
    Ws = [W.clone().requires_grad_() for W in update[0]]
    x, y = normal(seed, 9, Ws[0].shape[1]), normal(seed + 1, 9, len(Ws[1]))
    (torch.nn.functional.huber_loss(x @ Ws[0].mT @ Ws[1].mT, y) + decay*sum((W**2).sum() for W in Ws)).backward()
    K = gauge.momentum([W.grad for W in Ws], update[0])
    close(K - K.mT, torch.zeros_like(K))
    if not decay: close(K, torch.zeros_like(K))

@few
@given(updates())
def test_the_symmetric_part_is_what_flow_conserves(update):
    (a1, a2), (b1, b2) = update
    K = gauge.momentum((b1 - a1, b2 - a2), ((a1 + b1)/2, (a2 + b2)/2))
    close(K + K.mT, (b1 @ b1.mT - b2.mT @ b2) - (a1 @ a1.mT - a2.mT @ a2))

@few
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_dimensions(h, d, o):
    W1, W2 = normal(0, h, d).numpy(), normal(1, o, h).numpy()
    rank = lambda rows: int(np.linalg.matrix_rank(np.stack(rows), tol=1e-9)) if rows else 0
    turns = lambda W: rank([(E @ W).ravel() for E in generators(W.shape[0])] + [(W @ E).ravel() for E in generators(W.shape[1])])
    along = rank([np.concatenate([(E @ W1).ravel(), -(W2 @ E).ravel()]) for E in generators(h)])
    values = h*(d + o) - turns(W1) - turns(W2)
    assert gauge.dimensions(h, d, o) == dict(gauge=along, rotation=h*(d + o) - along - values, values=values)

@pytest.mark.parametrize('rank', [1, 12])
def test_chance_is_a_count_of_dimensions(rank):
    before = normal(0, 14, 12), normal(1, 12, 14)
    after = [W + 1e-5*normal(i, len(W), rank) @ normal(i + 9, rank, W.shape[1]) for i, W in enumerate(before, 2)]
    found, count = gauge.judge(before, after, draws=200), gauge.dimensions(14, 12, 12)
    assert found['chance'] == pytest.approx({p: n/sum(count.values()) for p, n in count.items()}, rel=.08)
    assert found['judged']['gauge']['verdict'] == 'within' # a random update is one of them

def test_one_matrix_may_stay():
    W1, W2 = normal(0, 5, 4), normal(1, 3, 5)
    found = gauge.judge((W1, W2), (W1 + .1*normal(2, 5, 4), W2))
    assert found['judged']['gauge']['verdict'] == 'within' and found['gauge'] > 0

@pytest.mark.parametrize('how, says', [(dict(), 'no update to split'), (dict(draws=1), 'draws=1, expected at least 2')])
def test_refused(how, says):
    W = normal(0, 4, 4), normal(1, 4, 4)
    with pytest.raises(ValueError, match=says): gauge.judge(W, W, **how)

# freedoms of real blocks

def random_model(cls, config, seed=0, **more):
    sizes = dict(vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=4, tie_word_embeddings=False)
    return freedoms.shake(cls(config(**sizes | more)), torch.Generator().manual_seed(seed))

def test_freedoms_with_other_sizes():
    lms = [random_model(Qwen2ForCausalLM, Qwen2Config), random_model(LlamaForCausalLM, LlamaConfig)]
    rows = freedoms.freedoms(lms)
    assert [r['what'] for r in rows if not r['as_expected']] == [] and len(rows) == len(freedoms.FREEDOMS)
    assert freedoms.freedom_table(rows).count('| kept |') + freedoms.freedom_table(rows).count('| changed |') >= len(rows)
    assert all(freedoms.moved(lm, lambda lm, g: None) == 0 for lm in lms)

def test_a_bias_decides_whether_v_can_turn_without_it():
    with_bias = random_model(LlamaForCausalLM, LlamaConfig, attention_bias=True)
    left, along = (freedoms.moved(with_bias, freedoms.FREEDOMS[k][0]) for k in ('the same, bias of v left behind', 'v and o, a rotation for each value head'))
    assert freedoms.says(left) == 'changed' and freedoms.says(along) == 'kept'

def test_without_groups_each_query_head_may_turn():
    lm = random_model(LlamaForCausalLM, LlamaConfig, num_key_value_heads=6)
    assert freedoms.says(freedoms.moved(lm, freedoms.FREEDOMS['v and o, a rotation for each query head'][0])) == 'kept'

def test_planes_commute_with_rope():
    config, g = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8), torch.Generator().manual_seed(0)
    x = normal(0, 1, 1, 5, 8)
    cos, sin = (v.double() for v in LlamaRotaryEmbedding(config)(x, torch.arange(5)[None]))
    rope = lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0]
    R, any_R = freedoms.rope_rotation(8, g), freedoms.rotation(8, g)
    close(R @ R.mT, torch.eye(8).double())
    close(rope(x @ R.mT), rope(x) @ R.mT, 1e-6)
    assert float((rope(x @ any_R.mT) - rope(x) @ any_R.mT).abs().max()) > .1

# checkpoints

def test_chains_of_every_architecture(pico):
    found = {k: Checkpoint(f) for k, f in pico.items()}
    kinds = {k: checkpoint_chains.chains(c, c, 48) for k, c in found.items()}
    assert kinds['qwen2'] == kinds['llama'] == [(l, k) for l in (0, 1) for k in ('vo', 'qk', 'mlp')]
    assert kinds['mllama'] == [(0, 'vo'), (0, 'qk'), (0, 'mlp'), (1, 'mlp'), (2, 'vo'), (2, 'qk'), (2, 'mlp')] # layer 1 reads images
    assert not [k for _, k in checkpoint_chains.chains(found['qwen2'], found['qwen2'], 47) if k == 'mlp']
    assert {checkpoint_chains.kv_heads(c) for c in found.values()} == {2}
    shapes = {(k, kind): [tuple(W.shape) for W in checkpoint_chains.chain(found[k], 0, kind)] for k in ('qwen2', 'llama') for kind in checkpoint_chains.CHAINS}
    assert shapes['qwen2', 'vo'] == [(16, 33), (32, 32)] and shapes['qwen2', 'qk'] == [(16, 33), (33, 32)] # biases of q, k and v are a column
    assert shapes['llama', 'vo'] == [(16, 32), (32, 32)] and shapes['llama', 'qk'] == [(16, 32), (32, 32)]
    assert shapes['qwen2', 'mlp'] == [(48, 32), (32, 48)]

@pytest.mark.parametrize('kind', ['qwen2', 'llama'])
@pytest.mark.parametrize('name, at', [('v and o, a rotation for each value head', 'vo'), ('q and k, in the planes of RoPE', 'qk'), ('q and k, any rotation', 'mlp')])
def test_freedoms_on_disk_are_all_gauge(pico, tmp_path, kind, name, at):
    "A turned checkpoint: the chain that was turned moved along its gauge only, in every head."
    from rlsft_nb.models import load_lm, save_lm
    lm, tok = load_lm(str(pico[kind]))
    freedoms.FREEDOMS[name][0](lm.double(), torch.Generator().manual_seed(1))
    b = Checkpoint(save_lm(lm, tok, tmp_path/'turned'))
    r = checkpoint_chains.measure_chain('x', Checkpoint(pico[kind]), b, 1, at, 2, 0)
    if at == 'mlp': assert r == dict(label='x', kind='mlp', layer=1, changed=False)
    else: assert r['gauge'] == pytest.approx(1, abs=1e-6)

# the stages

def test_blocks_are_made_once_and_the_same(tmp_path):
    cfg = load_params('tiny', dict(workers=1, theory=dict(draws=2, blocks=dict(width=5, middle=6, steps=20, seeds=2))))
    a = pipeline.blocks_stage(cfg)
    made = a.results()['runs']
    assert len(made) == 16 and {r['seed'] for r in made} == {0, 1} and pipeline.blocks_stage(cfg, 1).results()['runs'][0]['seed'] == 2
    assert blocks.train_block('swiglu', 'adam', True, 1, cfg.theory.blocks, 2) == made[-1]
    linear = [r for r in made if r['kind'] == 'linear' and r['optimizer'] == 'sgd']
    assert all(r['loss'][1] < r['loss'][0] for r in linear)
    assert all(r['steps']['gauge']['share'] < 1e-12 < r['steps']['gauge']['chance'] for r in linear)

def made(name, results, seed=0):
    return run_stage(Stage(name, 'tiny', {}, seed=seed), lambda folder: results, {})

def test_theory_stage(pico, tmp_path, monkeypatch):
    "Three checkpoints; RL left one layer alone; the second call reads."
    for i, who in enumerate(('end', 'rl')):
        W = load_file(pico['qwen2']/'model.safetensors')
        new = {k: v + .01*(i + 1)*normal(i, *v.shape).float() if i == 0 or 'layers.1' in k else v + .01*normal(0, *v.shape).float() for k, v in W.items()}
        (tmp_path/who).mkdir()
        save_file(new, tmp_path/who/'model.safetensors')
        (tmp_path/who/'config.json').write_text((pico['qwen2']/'config.json').read_text())
    base, end, rl = str(pico['qwen2']), str(tmp_path/'end'), str(tmp_path/'rl')
    monkeypatch.setattr(pipeline, 'curve_stage', lambda cfg, seed: made('sft-curve', dict(end=8), seed))
    monkeypatch.setattr(pipeline, 'rl_stage', lambda cfg, step, seed: made('ppo', dict(step=step), seed))
    monkeypatch.setattr(pipeline, 'named_with_rl', lambda cfg, seed: dict(base=base, peak=end, end=end, rl=rl))
    cfg = load_params('tiny', dict(workers=1, theory=dict(draws=3)))
    st = pipeline.theory_stage(cfg)
    chains = st.results()['chains']
    same = {(r['label'], r['layer']) for r in chains if not r['changed']}
    assert same == {('SFT from peak', 0), ('SFT from peak', 1), ('RL', 0)}
    assert len(chains) == 18 and [u.name for u in st.upstream] == ['sft-curve', 'ppo']
    narrow = pipeline.theory_stage(load_params('tiny', dict(workers=1, theory=dict(draws=3, widest=47)))).results()['chains']
    assert narrow == [r for r in chains if r['kind'] != 'mlp']
    monkeypatch.setattr(checkpoint_chains, 'measure_chain', None)
    assert pipeline.theory_stage(cfg).results()['chains'] == chains

# GPUs, pretended

@pytest.mark.parametrize('heads, planes', [(1, False), (2, False), (2, True)])
def test_a_gpu_judges_the_same(heads, planes, monkeypatch):
    before = normal(0, 16, 12), normal(1, 10, 16*heads)
    after = before[0] + .01*normal(2, 16, 12), before[1] + .01*normal(3, 10, 16*heads)
    run = lambda at: gauge.judge([W.to(at) for W in before], [W.to(at) for W in after], heads, planes, 3)
    with GPU() as gpu: got = run('cuda:0')
    assert {'linalg_eigh', 'linalg_qr', 'randn'} <= gpu.ran
    other = run('cpu')
    monkeypatch.setattr(chance, '_source', same_draws)
    want = run('cpu')
    near(got, want)
    assert got['chance'] == pytest.approx(want['chance']) and got['chance'] != pytest.approx(other['chance'])

def test_singular_values_of_an_update_are_found_once(monkeypatch):
    seen, real = [], gauge.singular_values
    for m in (gauge, comparison): monkeypatch.setattr(m, 'singular_values', lambda X: (seen.append(tuple(X.shape)), real(X))[1])
    before = normal(0, 6, 5), normal(1, 4, 6)
    gauge.judge(before, [W + .01 for W in before], draws=7)
    assert seen == [(6, 5), (4, 6)]

def test_size_of_a_chain(pico):
    ck = Checkpoint(pico['qwen2'])
    assert {k: checkpoint_chains.chain_extent(ck, 0, k) for k in checkpoint_chains.CHAINS} == dict(vo=(32, 16*32 + 32*32 + 16**2), qk=(32, 16*32 + 32*32 + 16**2), mlp=(48, 2*32*48 + 48**2))

def test_large_chains_go_to_a_gpu(pico, tmp_path, monkeypatch):
    "The others stay; records as on a CPU, in the same order."
    (tmp_path/'b').mkdir()
    save_file({k: v + .01*normal(0, *v.shape).float() for k, v in load_file(pico['qwen2']/'model.safetensors').items()}, tmp_path/'b'/'model.safetensors')
    a, b = Checkpoint(pico['qwen2']), Checkpoint(tmp_path/'b')
    run = lambda: [checkpoint_chains.measure_chain('x', a, b, l, k, 2, 0) for l, k in checkpoint_chains.chains(a, b, 48)]
    want, where, real = run(), [], gauge.judge
    monkeypatch.setattr(comparison, 'gpus', lambda: [('one', 24.)])
    monkeypatch.setattr(comparison, 'own_device', lambda: 'cuda:0')
    monkeypatch.setattr(comparison, 'NARROW', 48)
    monkeypatch.setattr(checkpoint_chains, 'judge', lambda before, after, *how: (where.append({W.is_cuda for W in (*before, *after)}), real(before, after, *how))[1])
    with GPU(): got = run()
    assert where == [{False}, {False}, {True}]*2
    for r, s in zip(got, want):
        near(r, s)
        if r['kind'] != 'mlp': assert r == s

def test_the_stage_uses_all_processes(pico, monkeypatch):
    monkeypatch.setattr(pipeline, 'curve_stage', lambda cfg, seed: made('sft-curve', dict(end=8), seed))
    monkeypatch.setattr(pipeline, 'rl_stage', lambda cfg, step, seed: made('ppo', dict(step=step), seed))
    monkeypatch.setattr(pipeline, 'named_with_rl', lambda cfg, seed: dict.fromkeys(('base', 'peak', 'end', 'rl'), str(pico['qwen2'])))
    calls = []
    monkeypatch.setattr(T, 'map_sized', lambda fn, items, extents, folder, workers, desc: (calls.append((fn, list(items), extents, workers)), {})[1])
    monkeypatch.setattr(T, 'processes', lambda cfg: cfg.workers + 7)
    pipeline.theory_stage(load_params('tiny', dict(workers=2, theory=dict(draws=3))))
    (fn, items, extents, workers), = calls
    assert fn == 'checkpoint_chains.measure_chain' and workers == 9 and len(items) == 18 and items == list(extents)
    assert extents['RL-1-mlp'] == (48, 2*32*48 + 48**2)

# figure and verdict

def record(label, kind, gauge, values, **more):
    part = lambda v: dict(ratio=dict(beyond=2., below=.5, within=1.)[v], lo=.8, hi=1.2, verdict=v)
    return dict(label=label, kind=kind, changed=True, judged=dict(gauge=part(gauge), rotation=part('within'), values=part(values))) | more

def made_up(along, values):
    steps = {p: dict(share=.1, chance=.2) for p in gauge.PARTS}
    runs = [record(blocks.LABELS[o], k, along, values, optimizer=o, steps=steps) for k in ('linear', 'swiglu') for o in ('sgd', 'adam') for _ in range(3)]
    return dict(blocks=runs, updates=[record(l, k, along, values, layer=i) for l in ('SFT', 'RL') for k in checkpoint_chains.CHAINS for i in range(2)] + [dict(label='RL', kind='vo', changed=False)])

@pytest.mark.parametrize('gauge, values, verdict', [('beyond', 'below', 'holds'), ('beyond', 'within', 'fails'), ('within', 'below', 'fails'), ('below', 'beyond', 'fails')])
def test_verdicts(gauge, values, verdict):
    found = made_up(gauge, values)
    rows = T.verdicts(found)
    assert [r['verdict'] for r in rows] == [verdict]*6 + ['control']*4 + [verdict]
    assert [r['n'] for r in rows] == [3, 3, 2, 2, 2, 2, 3, 3, 2, 2, 6] and 'drifts' in verdict_table(rows)
    for r in found['blocks']: r['judged']['gauge']['verdict'], r['judged']['values']['verdict'] = ('below', 'within') if verdict == 'holds' else ('beyond', 'below')
    assert T.verdicts(found)[-1]['verdict'] == 'mixed'

def test_half_is_enough():
    found = made_up('beyond', 'below')
    found['updates'][0]['judged']['gauge']['verdict'] = 'within' # one of two chains of v and o in SFT
    assert [r['verdict'] for r in T.verdicts(found)[2:4]] == ['holds']*2
    found['updates'][1]['judged']['values']['verdict'] = 'within'
    assert [r['verdict'] for r in T.verdicts(found)[2:4]] == ['fails', 'holds'] # q and k are another group

def test_figure_shows_every_group():
    import matplotlib
    matplotlib.use('agg')
    found = made_up('below', 'beyond')
    fig = drift.fig_theory(json.loads(json.dumps(found)), 'a title')
    assert [ax.get_title(loc='left') for ax in fig.axes if ax.axison][3:] == ['SFT', 'RL'] and len(fig.axes) == 6
    dots = [l.get_ydata() for l in fig.axes[3].lines if l.get_color() == drift.COLOURS['gauge'][0]]
    assert [list(y) for y in dots] == [[.5, .5]]*3
