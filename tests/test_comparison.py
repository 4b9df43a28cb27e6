"Comparisons of checkpoints as people have them, through `compare`, `compare_chain` and the command."
import copy, json, math, os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pytest, scipy.linalg, torch
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from rlsft_nb import chain, comparison
from rlsft_nb.chain import *
from rlsft_nb.chance import *
from rlsft_nb.comparison import *
from rlsft_nb.comparison_page import *
from rlsft_nb.commands import parser
from rlsft_nb.problems import DiskError, Problem, CheckpointError
from rlsft_nb.matrices import *
from rlsft_nb.weights import Checkpoint
from test_checkpoints import build, fp8, lora

def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)

def saved(lm, folder, **more):
    lm.save_pretrained(folder, **more)
    return folder

def tuned(lm, which=lambda n, p: p.ndim == 2, size=.05, seed=7):
    "A copy with noise in some parameters."
    new, g = copy.deepcopy(lm), gen(seed)
    with torch.no_grad():
        for n, p in new.named_parameters():
            if which(n, p): p.add_(size*torch.randn(p.shape, generator=g))
    return new

@pytest.fixture
def run(tmp_path):
    "`compare` with small settings, in a folder of its own."
    return lambda a, b, **more: compare(a, b, tmp_path/'out', **dict(ks=[4], draws=2) | more)

def command(tmp_path, *args, env=None, workers=1):
    return subprocess.run([sys.executable, '-m', 'rlsft_nb.spectra', *map(str, args), '--out', str(tmp_path/'seen'), '--draws', '2', '--k', '4', '--workers', str(workers)],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, timeout=200)

# what both have, and the rest

@pytest.mark.parametrize('kind, auto', [('llama', None), ('qwen3', None), ('mixtral', None), ('gpt_oss', None), ('opt', None), ('mamba', None), ('t5', AutoModelForSeq2SeqLM), ('bert', AutoModelForMaskedLM)])
def test_architectures(kind, auto, tmp_path, run):
    lm = build(kind, auto) if auto else build(kind)
    found = run(saved(lm, tmp_path/'a'), saved(tuned(lm, lambda n, p: p.ndim >= 2), tmp_path/'b'))
    assert all(r['changed'] for r in found['matrices'].values()) and not left_out(found)
    assert any(r['layer'] == 2 for r in found['matrices'].values())
    json.dumps(found, allow_nan=False)
    assert headline(found).startswith(f"{len(found['matrices'])} matrices, {len(found['matrices'])} changed.")
    assert 'expert' not in kind or found['left']['measured_a'] > .9

@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe', 'gpt_oss'])
def test_experts_alone(kind, tmp_path, run):
    "Fused experts are most of such a model; each is a matrix."
    lm = build(kind)
    new = tuned(lm, lambda n, p: p.ndim == 3)
    found = run(saved(lm, tmp_path/'a'), saved(new, tmp_path/'b'))
    changed = {n for n, r in found['matrices'].items() if r['changed']}
    assert changed == {n for n in found['matrices'] if '.experts.' in n} and len(changed) == 3*4*3
    other = run(tmp_path/'a', saved(new, tmp_path/'c', save_original_format=True), matrices='experts.*.down') # the layout of transformers 4
    assert set(other['matrices']) == {n for n in changed if n.endswith('down')} and all(other['matrices'][n]['update'] == found['matrices'][n]['update'] for n in other['matrices'])

def test_layouts_are_equal(tmp_path, run):
    lm = build('mixtral')
    found = run(saved(lm, tmp_path/'a'), saved(lm, tmp_path/'b', save_original_format=True))
    assert 'none changed: both checkpoints hold the same weights.' in headline(found)

def test_untied_against_headless(tmp_path, run):
    "A head that was not saved is no embedding."
    lm = build('llama', tie_word_embeddings=False)
    saved(lm, tmp_path/'a'), saved(lm.model, tmp_path/'b')
    found = run(tmp_path/'a', tmp_path/'b')
    assert 'head' not in found['matrices'] and found['left']['only_a'] == ['head'] and not any(r['changed'] for r in found['matrices'].values())
    assert 'Left out: only in A: head.' in headline(found) and 'same weights' not in headline(found)

@pytest.mark.parametrize('which, said', [(lambda n: n.endswith('norm.weight'), 'norm'), (lambda n: n.endswith('bias'), 'bias')])
def test_only_others_differ(which, said, tmp_path, run):
    lm = build('qwen2')
    found = run(saved(lm, tmp_path/'a'), saved(tuned(lm, lambda n, p: which(n)), tmp_path/'b'))
    n = sum(which(n) for n, _ in lm.named_parameters())
    assert len(found['others']['differ']) == n and f'none changed; {n} other tensors differ: ' in headline(found) and said in headline(found) and 'same weights' not in headline(found)

def test_integers_and_convolutions(tmp_path, run):
    t = {'model.layers.0.mlp.up_proj.weight': torch.ones(4, 4), 'conv.weight': torch.ones(2, 2, 3), 'steps': torch.tensor([1, 2**60]), 'nan': torch.tensor([math.nan])}
    save_file(t, tmp_path/'a.safetensors')
    for change, names in (({'steps': torch.tensor([1, 2**60 + 1])}, ['steps']), ({'conv.weight': torch.ones(2, 2, 3)*2}, ['conv']), ({}, []), ({'nan': torch.tensor([1.])}, ['nan']), ({'steps': torch.ones(3)}, [])):
        save_file(t | change, tmp_path/'b.safetensors')
        found = run(tmp_path/'a.safetensors', tmp_path/'b.safetensors')
        assert found['others']['differ'] == names and ('1 other tensor differs' in headline(found)) == bool(names)
    assert found['others']['shapes'] == ['steps'] and '1 other tensor of another shape' in headline(found)

def test_added_tokens(tmp_path, run):
    lm = build('llama', tie_word_embeddings=False)
    saved(lm, tmp_path/'a')
    new = tuned(lm, lambda n, p: 'q_proj' in n)
    new.resize_token_embeddings(67, mean_resizing=False)
    found = run(tmp_path/'a', saved(new, tmp_path/'b'))
    assert found['left']['rows'] == {n: dict(a=64, b=67, compared=64) for n in ('embed', 'head')}
    assert {n for n, r in found['matrices'].items() if r['changed']} == {f'layers.{i}.q' for i in range(3)} and found['matrices']['embed']['shape'] == [64, 32]
    assert 'embed: rows after the first 64 (64 and 67)' in headline(found)

def test_a_reward_model_and_fewer_layers(tmp_path, run):
    lm = build('llama', tie_word_embeddings=False)
    saved(lm, tmp_path/'a'), saved(build('llama', AutoModelForSequenceClassification, num_labels=1), tmp_path/'b')
    found = run(tmp_path/'a', tmp_path/'b')
    assert found['left']['only_a'] == ['head'] and found['left']['only_b'] == ['score'] and 'layers.2.q' in found['matrices']
    found = run(tmp_path/'a', saved(build('llama', num_hidden_layers=4, tie_word_embeddings=False), tmp_path/'c'))
    assert len(found['left']['only_b']) == 7 and all(n.startswith('layers.3.') for n in found['left']['only_b'])
    assert 'only in B: layers.3.q, layers.3.k, layers.3.v, ... (7 in all)' in headline(found) and re.search(r'99.\d% of the parameters of A and 7\d\.\d% of B', headline(found))

@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'base_model.model.', 'pretrained_model.'])
def test_wrappers_on_one_side(prefix, tmp_path, run):
    lm = build('qwen2')
    t = load_file(saved(lm, tmp_path/'a')/'model.safetensors')
    (tmp_path/'b').mkdir()
    save_file({prefix + k: v for k, v in t.items()} | {'v_head.summary.weight': torch.ones(1, 32)}, tmp_path/'b'/'model.safetensors')
    (tmp_path/'b'/'config.json').write_text((tmp_path/'a'/'config.json').read_text())
    found = run(tmp_path/'a', tmp_path/'b')
    assert list(found['matrices']) == Checkpoint(tmp_path/'a').names() and '1 other tensor only in B' in headline(found) and 'value heads' in ' '.join(notes(found['opened'].values()))

def test_nothing_in_common(tmp_path, run):
    save_file({'x.weight': torch.ones(4, 4)}, tmp_path/'a.safetensors'); save_file({'y.weight': torch.ones(4, 4)}, tmp_path/'b.safetensors')
    with pytest.raises(CheckpointError, match='no matrix of one name and shape in common'): run(tmp_path/'a.safetensors', tmp_path/'b.safetensors')

def test_exclude(tmp_path, run):
    lm = build('llama')
    a = saved(lm, tmp_path/'a')
    found = run(a, a, exclude=['layers.0.*', 'down'])
    assert not any(n.startswith('layers.0.') or n.endswith('down') for n in found['matrices']) and len(found['left']['excluded']) == 9
    with pytest.raises(CheckpointError, match="exclude='z'"): run(a, a, exclude='z')
    with pytest.raises(CheckpointError, match='leaves no matrix'): run(a, a, exclude='*')

@pytest.mark.parametrize('name', ['../../up', 'a/b', '.hidden', 'x y', '%2e'])
def test_names_stay_in_the_folder(name, tmp_path, run):
    for f, size in (('a', 1), ('b', 2)): save_file({name: size*torch.eye(4), 'q': torch.eye(4)}, tmp_path/f'{f}.safetensors')
    (tmp_path/'in').mkdir()
    before = {p for p in tmp_path.rglob('*')}
    found = compare(tmp_path/'a.safetensors', tmp_path/'b.safetensors', tmp_path/'in'/'out', ks=[2], draws=2)
    assert len(found['matrices']) == 2 and sum(r['changed'] for r in found['matrices'].values()) == 1
    assert all((tmp_path/'in') in p.parents for p in {*tmp_path.rglob('*')} - before)

# matrices that are odd

@pytest.mark.parametrize('side', 'ab')
@pytest.mark.parametrize('shape', [(8, 8), (12, 5), (5, 12), (1, 6)])
def test_zeros(side, shape, tmp_path, run):
    "Measured without directions; the run goes on, to the page."
    W, X = randn(*shape).float(), randn(9, 9).float()
    for f, Y in (('a', W*(side != 'a')), ('b', W*(side != 'b'))): save_file({'model.layers.0.mlp.up_proj.weight': Y, 'model.layers.0.self_attn.q_proj.weight': X + (f == 'b')*.1}, tmp_path/f'{f}.safetensors')
    found = run(tmp_path/'a.safetensors', tmp_path/'b.safetensors')
    r = found['matrices']['layers.0.up']
    assert r['zero'] == side and r['changed'] and r['rank'] == min(shape) and math.isclose(r['update'], float(W.double().norm())) and 'verdicts' not in r
    assert '1 were all zeros' in headline(found) and len(write_report(found, tmp_path/'page')) == 5
    json.dumps(brief(found), allow_nan=False)

def test_all_zeros(tmp_path, run):
    save_file({'w': torch.zeros(4, 4)}, tmp_path/'a.safetensors'); save_file({'w': torch.eye(4)}, tmp_path/'b.safetensors')
    found = run(tmp_path/'a.safetensors', tmp_path/'b.safetensors')
    assert 'Nothing to judge' in how_much(found) and write_report(found, tmp_path/'page')

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_one_bad_matrix(bad, tmp_path, capsys):
    lm = build('llama', tie_word_embeddings=False)
    t = load_file(saved(lm, tmp_path/'a')/'model.safetensors')
    t['lm_head.weight'][3, 4] = bad
    saved(lm, tmp_path/'b'); save_file(t, tmp_path/'b'/'model.safetensors', dict(format='pt'))
    args = [str(tmp_path/'a'), str(tmp_path/'b'), '--out', str(tmp_path/'out'), '--workers', '1']
    assert main(args) == 0
    assert 'not readable' in (said := capsys.readouterr().out) and 'lm_head.weight holds 1 values' in said and 'same weights' not in said
    record = json.loads((tmp_path/'out'/'spectra.json').read_text())
    assert list(record['unread']) == ['head'] and len(record['matrices']) == 22 and record['ends'] == {} and 'lm_head.weight holds 1' in (tmp_path/'out'/'report.html').read_text()
    assert main([*args, '--exclude', 'head']) == 0 and 'not readable' not in capsys.readouterr().out

def test_rounded(tmp_path, run):
    lm = build('llama')
    saved(lm, tmp_path/'a')
    for kind, name in ((torch.bfloat16, 'bf16'), (torch.float16, 'fp16')):
        saved(copy.deepcopy(lm).to(kind), tmp_path/name)
        found = run(tmp_path/'a', tmp_path/name)
        assert f'B is A rounded to {name}' in headline(found) and 'beyond' not in headline(found) and where(found) == 'Nowhere beyond chance.'
        assert f'A is B rounded to {name}' in headline(run(tmp_path/name, tmp_path/'a'))
        write_report(found, tmp_path/'page')
        assert 'lead_beyond' in brief(found)['counts'] and brief(found)['counts']['judged'] == 0
    new = copy.deepcopy(lm).bfloat16()
    with torch.no_grad(): new.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
    found = run(tmp_path/'a', saved(new, tmp_path/'c'))
    assert 'B is A rounded to bf16 in' in headline(found) and 'Rotated beyond' in headline(found) and brief(found)['counts']['judged'] == 1

def test_rounding_is_beyond_chance_at_the_nominal_rate():
    "Small matrices, rounded: a plain shuffle puts 5 to 9 % beyond chance."
    n, got = 240, []
    for i in range(n):
        W = torch.randn(16, 12, generator=gen(i))
        got.append({k: v['verdict'] for k, v in measure(W.bfloat16(), W, [2], 'sized', 5, i)['verdicts'].items()})
    for k in ('lead', 'values'):
        for v in ('beyond', 'below'): assert sum(x[k] == v for x in got) <= binom.ppf(.999, n, .025), (k, v)

def test_no_number_of_draws_changed():
    "What is counted besides takes no draws: those of the null are the first after the seed."
    W0, D = randn(12, 9), .1*randn(12, 9, seed=1)
    r, g = measure(W0 + D, W0, [3], draws=3, seed=4), gen(4)
    D = (W0 + D) - W0
    drawn = [compared(decompose(W0 + null_update(D, 'shuffle', g)), decompose(W0))[0] for _ in range(3)]
    assert r['null']['draws']['lead'] == [d['lead'] for d in drawn]
    assert r['steps'] == pytest.approx(float(D.norm()/(bf16_steps(W0)**2/12).sum().sqrt()))

def test_intruders_by_a_loop():
    W0 = randn(30, 20)
    W = W0 + 12*torch.outer(*(torch.nn.functional.normalize(randn(d, seed=d), dim=0) for d in (30, 20)))
    r = measure(W, W0, draws=2)
    (U, _, Vt), (U0, _, Vt0) = (np.linalg.svd(X.numpy(), full_matrices=False) for X in (W, W0))
    for side, X, X0 in (('U', U.T, U0.T), ('V', Vt, Vt0)): assert r['intruders'][side] == sum(max(abs(x @ x0) for x0 in X0) < .5 for x in X[:10])
    assert r['intruders']['U'] and len(r['intruders']['null']['U']) == 2

def test_small_matrices_and_large_k(tmp_path, run):
    for f, noise in (('a', 0), ('b', .1)): save_file({f'x{m}{n}': (randn(m, n) + noise*randn(m, n, seed=1)).float() for m, n in ((1, 1), (1, 7), (2, 2), (3, 9))}, tmp_path/f'{f}.safetensors')
    found = run(tmp_path/'a.safetensors', tmp_path/'b.safetensors', ks=[64, 256, 64, 1, .5, 1.])
    assert len(found['matrices']) == 4 and write_report(found, tmp_path/'page')

# adapters

@pytest.fixture
def adapted(tmp_path):
    lm = build('llama')
    base = saved(lm, tmp_path/'base')
    A, B = randn(2, 32).float(), randn(32, 2, seed=1).float()
    lora(tmp_path/'lora', base, {'model.layers.1.self_attn.q_proj': (A, B)})
    return lm, base, tmp_path/'lora', A, B

def test_an_adapter_is_its_product(adapted, tmp_path, run):
    lm, base, folder, A, B = adapted
    found = run(base, folder)
    assert [n for n, r in found['matrices'].items() if r['changed']] == ['layers.1.q']
    r, ck = found['matrices']['layers.1.q'], Checkpoint(folder)
    B1, A1, scale = ck.factors('layers.1.q')
    D = scale*(B1.double() @ A1.double())
    assert r['update'] == pytest.approx(float(D.norm()), rel=1e-12) and r['rank'] == 2
    assert np.allclose(r['sd'], scipy.linalg.svdvals(D.numpy()), rtol=1e-4, atol=1e-6*float(D.norm())) and r['sd'][2:] == [0]*30 # exactly
    M = randn(2, 2, seed=9).float()
    lora(tmp_path/'gauge', base, {'model.layers.1.self_attn.q_proj': (torch.linalg.inv(M) @ A, B @ M)}) # the same function
    other = run(base, tmp_path/'gauge')['matrices']['layers.1.q']
    assert {n: v['verdict'] for n, v in other['verdicts'].items()} == {n: v['verdict'] for n, v in r['verdicts'].items()} and other['spectral'] == pytest.approx(r['spectral'], rel=1e-4)
    assert not any(x['changed'] for x in run(folder, tmp_path/'lora')['matrices'].values())

def test_an_adapter_whose_base_is_not_here(adapted, tmp_path, run):
    lm, base, folder, A, B = adapted
    c = json.loads((folder/'adapter_config.json').read_text())
    (folder/'adapter_config.json').write_text(json.dumps(c | dict(base_model_name_or_path=str(tmp_path/'gone'))))
    found = run(base, folder)
    assert found['matrices']['layers.1.q']['rank'] == 2 and 'put on the first checkpoint' in ' '.join(notes(found['opened'].values()))
    with pytest.raises(Problem, match='gone'): run(folder, base)
    assert run(folder, base, base=base)['matrices']['layers.1.q']['changed']

def test_factor_values():
    for m, n, r in ((30, 20, 3), (20, 30, 1), (8, 8, 8)):
        B, A = randn(m, r), randn(r, n, seed=1)
        assert np.allclose(factor_values(B, A, .3), scipy.linalg.svdvals(.3*(B @ A).numpy()), atol=1e-12*m)

def test_quantised(tmp_path, run):
    "FP8 with block scales is measured as numbers, and said; without scales it is counted."
    t = {f'model.layers.{i}.mlp.up_proj.weight': torch.randn(256, 128, generator=gen(i)) for i in range(2)}
    W, s = zip(*(fp8(x, (128, 128)) for x in t.values()))
    for f in ('a', 'b', 'c'): (tmp_path/f).mkdir()
    conf = dict(model_type='llama', quantization_config=dict(quant_method='fp8', weight_block_size=[128, 128]))
    save_file(dict(zip(t, W)) | {f'{k}_scale_inv': x for k, x in zip(t, s)}, tmp_path/'a'/'model.safetensors'); (tmp_path/'a'/'config.json').write_text(json.dumps(conf))
    save_file(t, tmp_path/'b'/'model.safetensors')
    found = run(tmp_path/'a', tmp_path/'b')
    assert 0 < found['matrices']['layers.0.up']['update']/found['matrices']['layers.0.up']['norm'] < .1 and 'A was dequantised: FP8' in ' '.join(notes(found['opened'].values()))
    save_file({k: x.to(torch.float8_e4m3fn) for k, x in t.items()} | {'q': torch.eye(4)}, tmp_path/'c'/'model.safetensors')
    found = run(tmp_path/'c', tmp_path/'c')
    assert list(found['matrices']) == ['q'] and 'FP8 without scales' in ' '.join(notes(found['opened'].values()))

# arguments and the machine

def test_numbers_of_numpy(tmp_path, run):
    lm = build('llama')
    a, b = saved(lm, tmp_path/'a'), saved(tuned(lm), tmp_path/'b')
    want = run(a, b, matrices='layers.0.q,layers.1.*', ks=[4, 8], seed=3)
    got = run(Path(a), str(b), matrices=['layers.0.q', 'layers.1.*'], ks=np.array([4, 8]), seed=np.int64(3), draws=np.int32(2), workers=np.int64(1))
    assert json.dumps(got) == json.dumps(want)
    for ks in (np.int64(4), 4, (4,), {4}, np.array([4]), torch.tensor([4])): assert ranks(ks, 10) == [4]
    assert ranks([np.float32(.5), np.int8(2)], 10) == [2, 5]
    for seed in (2**70, -2**70, -1, 2**64 - 1): assert run(a, b, matrices='layers.0.q', seed=seed)['matrices']['layers.0.q']['changed']
    with pytest.raises(ValueError, match="null='x', expected one of"): run(a, b, null='x')
    with pytest.raises(ValueError, match='draws=1'): run(a, b, draws=1)

def test_numpy_matrices():
    W = np.random.default_rng(0).normal(size=(6, 4))
    assert np.allclose(decompose(W).s, np.linalg.svd(W, compute_uv=False)) and np.allclose(singular_values(W), decompose(W).s)
    r = measure(W, W + .1, np.array([2]), draws=np.int64(2), seed=10**30)
    assert r['changed']
    with pytest.raises(ValueError, match='complex'): decompose(W + 1j)

@pytest.mark.parametrize('d, k', [(12, 3), (6, 6), (9, 5)])
def test_columns_that_are_no_basis(d, k):
    "Angles of the spans, as scipy has them; a span that is too small is refused."
    A, B = 7*randn(d, k), randn(d, k, seed=1) + 3
    want = np.sort(scipy.linalg.subspace_angles(A.numpy(), B.numpy()))
    for X in (A, A.float(), A.numpy()): assert np.allclose(principal_angles(X, B, k), want, atol=1e-6)
    bad = A.clone(); bad[:, k - 1] = bad[:, 0]
    for X in (bad, torch.zeros(d, k)):
        with pytest.raises(ValueError, match='span fewer than'): principal_angles(X, B, k)
    with pytest.raises(ValueError, match='rows, expected'): principal_angles(randn(d + 1, k), B, k)
    with pytest.raises(ValueError, match=f'expected 1..{k}'): principal_angles(A, B, k + 1)

@pytest.mark.parametrize('env, want', [(dict(), (0, 1)), (dict(RANK='', WORLD_SIZE=''), (0, 1)), (dict(RANK='1'), (0, 1)), (dict(WORLD_SIZE='2'), (0, 1)), (dict(WORLD_SIZE='2', RANK='1'), (0, 1)),
                                       (dict(WORLD_SIZE='2', RANK='1', MASTER_ADDR='h', MASTER_PORT='9'), (1, 2))])
def test_place(env, want, monkeypatch):
    for v in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(v, raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    rank, world, odd = place()
    assert (rank, world) == want and bool(odd) == bool({k for k, v in env.items() if v})

def test_place_refuses(monkeypatch):
    monkeypatch.setenv('RANK', 'x')
    with pytest.raises(ValueError, match="RANK='x'"): place()
    for k, v in dict(RANK='5', WORLD_SIZE='2', MASTER_ADDR='h', MASTER_PORT='9').items(): monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match=r'RANK=5, expected 0..1'): place()

@pytest.mark.parametrize('left', [dict(WORLD_SIZE='2'), dict(RANK='1'), dict(RANK='')])
def test_what_a_launcher_left(left, tmp_path, monkeypatch, capsys):
    for v in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(v, raising=False)
    for k, v in left.items(): monkeypatch.setenv(k, v)
    lm = build('llama')
    assert main([str(saved(lm, tmp_path/'a')), str(saved(tuned(lm), tmp_path/'b')), '--matrices', 'layers.0.*', '--out', str(tmp_path/'seen'), '--draws', '2']) == 0
    said = capsys.readouterr()
    assert '7 matrices, 7 changed.' in said.out and (tmp_path/'seen'/'report.html').exists() and ('this process does all' in said.err) == any(left.values())

def test_affordable(tmp_path, monkeypatch, run):
    monkeypatch.setattr(comparison, 'gpus', lambda: [])
    some = dict(small=(64, 64**2), head=(2048, 10**8))
    assert [affordable(some, 8, tmp_path, free) for free in (10**12, 3*10**10, 130*10**8)] == [8, 2, 1]
    with pytest.raises(CheckpointError, match=r"head needs about 12.1 GiB of memory \(130 bytes for each of 100,000,000 elements\), 1.0 GiB are free: leave it out with exclude='head'"): affordable(some, 1, tmp_path, 2**30)
    monkeypatch.setattr(comparison, 'free_bytes', lambda: 1000)
    lm = build('llama')
    with pytest.raises(CheckpointError, match='embed needs about'): run(saved(lm, tmp_path/'a'), tmp_path/'a')
    monkeypatch.undo()
    monkeypatch.setattr(comparison.shutil, 'disk_usage', lambda p: type('usage', (), dict(free=10)))
    with pytest.raises(DiskError, match='records of 23 matrices need about'): run(tmp_path/'a', tmp_path/'a')

def test_a_script_without_a_guard(tmp_path, env):
    "One line that says so, and no page of tracebacks from the workers."
    for f, noise in (('a', 0), ('b', .01)): save_file({f'model.layers.{i}.mlp.up_proj.weight': (randn(2100, 2000, seed=i) + noise).float()[:, :2000] for i in range(2)}, tmp_path/f'{f}.safetensors')
    (tmp_path/'s.py').write_text(f"from rlsft_nb.spectra import compare\ncompare('{tmp_path}/a.safetensors', '{tmp_path}/b.safetensors', '{tmp_path}/o', workers=2, draws=2)\n")
    done = subprocess.run([sys.executable, tmp_path/'s.py'], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1 and "`if __name__ == '__main__':`" in done.stderr.splitlines()[-1] and 'BrokenProcessPool' not in done.stderr and 'bootstrapping' not in done.stderr

# the command and its page

class Page(HTMLParser):
    "Tags with attributes, and the text."
    def __init__(self, text): super().__init__(); self.tags, self.text = [], []; self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)

def closed(page):
    "Nothing is loaded from elsewhere, and nothing runs."
    p = Page(page)
    assert not {t for t, _ in p.tags} & {'script', 'link', 'iframe', 'object', 'base'} and 'url(' not in page and '@import' not in page
    assert all(a['src'].startswith('data:image/png;base64,') for t, a in p.tags if 'src' in a) and not any(k in a for _, a in p.tags for k in ('href', 'onerror', 'onload'))
    assert 'prefers-color-scheme:dark' in page and '@media print' in page and 'width=device-width' in page
    return ' '.join(p.text)

def test_page_escapes_everything(tmp_path, run):
    evil = '<img src=x onerror=alert(1)>&"\''
    for f, noise in (('a', 0), ('b', .1)):
        (tmp_path/f'{f} <b>').mkdir()
        save_file({f'model.layers.0.{evil}.weight': (randn(8, 8) + noise*randn(8, 8, seed=1)).float(), **({evil: torch.ones(3)} if f == 'a' else {})}, tmp_path/f'{f} <b>'/'model.safetensors')
    found = run(tmp_path/'a <b>', tmp_path/'b <b>')
    write_report(found, tmp_path/'page')
    text = closed((tmp_path/'page'/'report.html').read_text())
    assert evil in text and '<b>' in text
    chain = compare_chain([tmp_path/'a <b>', tmp_path/'b <b>', tmp_path/'a <b>'], tmp_path/'out')
    write_chain_report(chain, tmp_path/'page')
    assert evil in closed((tmp_path/'page'/'report.html').read_text())

def test_first_lines(tmp_path):
    lm = build('llama')
    saved(lm, tmp_path/'a'), saved(tuned(lm, lambda n, p: 'layers.1' in n and p.ndim == 2, size=.3), tmp_path/'b')
    assert main([str(tmp_path/'a'), str(tmp_path/'b'), '--out', str(tmp_path/'out'), '--workers', '1', '--exclude', 'layers.2.*']) == 0
    page = (tmp_path/'out'/'report.html').read_text()
    first = re.findall('<li>(.*?)</li>', page.split('class="first">')[1].split('</ul>')[0])
    assert len(first) == 4 and first[0].startswith('16 matrices, 7 changed.') and 'chance alone gives 2.5 %' in first[1] and first[3].startswith('Left out: excluded: layers.2.q, layers.2.k, layers.2.v, ... (7 in all)')
    assert page.count('<dt>') == 6

def test_json_and_quiet(tmp_path, env, capfd):
    lm = build('llama')
    a, b = map(str, (saved(lm, tmp_path/'a'), saved(tuned(lm), tmp_path/'b')))
    done = command(tmp_path, a, b, '--json', '--matrices', 'layers.0.*', env=env)
    got = json.loads(done.stdout)
    assert done.returncode == 0 and got['counts']['changed'] == 7 and len(got['matrices']) == 7 and 'curve' not in done.stdout and got['said'][0].startswith('7 matrices')
    out = ['--out', str(tmp_path/'quiet'), '--draws', '2', '--workers', '1']
    capfd.readouterr()
    assert main([a, b, '--quiet', '--matrices', 'layers.0.*', *out]) == 0 and tuple(capfd.readouterr()) == ('', '') and (tmp_path/'quiet'/'report.html').exists()
    assert main([a, str(tmp_path/'none'/'x'), '--quiet', *out]) == 1
    said = capfd.readouterr()
    assert said.out == '' and len(said.err.splitlines()) == 1
    for words in ([a], [a, b, '--null', 'x'], [a, b, '--nope']):
        with pytest.raises(SystemExit) as e: main(words)
        assert e.value.code == 2
    assert main(['o/a', 'o/b', '--revision', 'x']) == 2
    capfd.readouterr()
    assert main([a, b, a, '--json', '--matrices', 'layers.*.q', *out]) == 0
    got = json.loads(capfd.readouterr().out)
    assert got['overall'][0]['verdict'] == 'back' and got['overall'][0]['taken_back'] == pytest.approx(1) and 'moves back along' in got['said'][0]

def test_revisions(tmp_path, monkeypatch, capsys):
    (tmp_path/'local').mkdir()
    here = str(tmp_path/'local')
    assert revisions(['o/a', here, 'o/b'], ['x', 'y']) == ['x', '', 'y'] and revisions(['o/a', 'o/b'], []) == ['', ''] and revisions([here, here], ['x', 'y']) == ['x', 'y']
    with pytest.raises(ValueError, match='given 1 times for 2 Hub ids'): revisions(['o/a', 'o/b'], ['x'])
    seen, lm = [], build('llama')
    real, folder = comparison.open_checkpoint, saved(lm, tmp_path/'a')
    monkeypatch.setattr(comparison, 'open_checkpoint', lambda source, revision, *rest: (seen.append((source, revision)), real(folder, '', *rest))[1])
    assert main(['o/a', 'o/a', '--revision', 'r1', '--revision', 'r2', '--out', str(tmp_path/'out'), '--workers', '1']) == 0
    assert seen == [('o/a', 'r1'), ('o/a', 'r2')]

@pytest.mark.parametrize('make, said', [(lambda d: (d/'x.pt').write_bytes(b'PK'), 'pickled weights'), (lambda d: (d/'checkpoint-200').mkdir(), 'checkpoint-200'), (lambda d: (d/'a.distcp').write_bytes(b''), '.distcp'),
                                        (lambda d: (d/'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\n'), 'git lfs pull')])
def test_what_is_no_checkpoint(make, said, tmp_path, capsys):
    (tmp_path/'x').mkdir(); make(tmp_path/'x')
    assert main([str(tmp_path/'x'), str(tmp_path/'x'), '--out', str(tmp_path/'out')]) == 1
    assert said in (err := capsys.readouterr().err) and len(err.splitlines()) == 1

def test_tiny_by_name(tmp_path, capsys):
    assert main(['tiny', 'tiny', '--matrices', 'layers.0.*', '--out', str(tmp_path/'out')]) == 0 and 'both checkpoints hold the same weights' in capsys.readouterr().out

def test_help_is_light(env):
    done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'rlsft_nb.comparison_page', '--help'], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not re.search(r'\| +(torch|transformers|matplotlib|pandas)$', done.stderr, re.M)
    assert next(a for a in parser('compare')._actions if a.dest == 'null').choices == NULLS

# chains

def points(tmp_path, second, n=6, types='qk', d=24, kind=torch.float32):
    "base, sft, rl: a low-rank update and another."
    names = [f'model.layers.{i}.self_attn.{t}_proj.weight' for i in range(n) for t in types]
    g = gen(3)
    base = {k: torch.randn(d, d, generator=g) for k in names}
    first = {k: .05*torch.randn(d, 2, generator=g) @ torch.randn(2, d, generator=g) for k in names}
    then = second(first, g)
    for name, t in (('base', base), ('sft', {k: base[k] + first[k] for k in names}), ('rl', {k: base[k] + first[k] + then[k] for k in names})): save_file({k: x.to(kind) for k, x in t.items()}, tmp_path/f'{name}.safetensors')
    return [tmp_path/f'{n}.safetensors' for n in ('base', 'sft', 'rl')]

def same_space(F, g):
    out = {}
    for k, x in F.items():
        U, s, Vt = torch.linalg.svd(x)
        out[k] = U[:, :2] @ torch.diag(torch.tensor([1., -s[0]/s[1]])) @ Vt[:2]
    return out

@pytest.mark.parametrize('second, verdict, cosine, inside', [(lambda F, g: {k: -.5*x for k, x in F.items()}, 'back', -1, 1), (lambda F, g: {k: .3*x for k, x in F.items()}, 'on', 1, 1),
    (same_space, 'sideways', 0, 1), (lambda F, g: {k: .02*torch.randn(x.shape, generator=g) for k, x in F.items()}, 'sideways', 0, 0)])
def test_chain_with_known_answers(second, verdict, cosine, inside, tmp_path):
    ps = points(tmp_path, second)
    found = compare_chain(ps, tmp_path/'out')
    o = found['overall'][0]
    assert o['verdict'] == verdict and o['matrices'][verdict] >= 11 and o['cosine'] == pytest.approx(cosine, abs=.06) and o['share']['both'] == pytest.approx(inside, abs=.05) # one in twenty may stray
    assert (o['inside'] >= 11) == bool(inside)
    loaded = [load_file(p) for p in ps]
    D1, D2 = (torch.cat([(b[k].double() - a[k].double()).flatten() for k in a]) for a, b in zip(loaded, loaded[1:]))
    assert o['cosine'] == pytest.approx(float(D1 @ D2/D1.norm()/D2.norm()), abs=1e-12) and o['taken_back'] == pytest.approx(-float(D1 @ D2/D1.norm()**2), abs=1e-12)
    json.dumps(found, allow_nan=False)
    assert ('takes back 50 %' in chain_sentence(found)) == (verdict == 'back') and chain_summary(found)[0]['verdict_2'] in ('back', 'on', 'sideways')

def leading_of(tmp_path, base=0):
    "Leading quarter of every matrix of a saved checkpoint, by another library."
    from rlsft_nb.chance import lead
    out = {}
    for k, W in load_file(tmp_path/'base.safetensors').items():
        U, s, Vt = np.linalg.svd(W.double().numpy())
        j = lead(torch.tensor(s))
        out[k] = torch.tensor(U[:, :j]), torch.tensor(Vt[:j].T)
    return out

def part(which): # of noise: inside the leading quarter of the base on both sides, or outside on both
    def second(F, g):
        out = {}
        for k, x in F.items():
            W = BASE[k].double()
            U, s, Vt = torch.linalg.svd(W)
            j, N = 6, torch.randn(x.shape, generator=g).double()
            P, Q = U[:, :j] @ U[:, :j].mT, Vt[:j].mT @ Vt[:j]
            if which == 'avoids them': N = N - P @ N - N @ Q + P @ N @ Q
            elif which == 'seeks them': N = P @ N @ Q + .2*N
            out[k] = (.02*N).float()
        return out
    return second

g3 = gen(3)
BASE = {f'model.layers.{i}.self_attn.{t}_proj.weight': torch.randn(24, 24, generator=g3) for i in range(6) for t in 'qk'} # as in `points`

@pytest.mark.parametrize('way', ['avoids them', 'seeks them', 'no more and no less than chance'])
def test_leading_directions_of_the_base(way, tmp_path):
    found = compare_chain(points(tmp_path, part(way)), tmp_path/'out')
    a, said = found['overall'][0]['answers'], chain_answers(found)
    assert said[2].endswith(f': {way}.'), said
    sft, rl, base = (load_file(tmp_path/f'{n}.safetensors') for n in ('sft', 'rl', 'base'))
    inside = lambda x, y: sum(float((U.mT @ (x[k] - y[k]).double() @ V).norm()**2) for k, (U, V) in leading_of(tmp_path).items())/sum(float((x[k] - y[k]).double().norm()**2) for k in x)
    assert a['avoids']['share'] == pytest.approx(inside(rl, sft), rel=1e-4) and a['takes']['share'] == pytest.approx(inside(sft, base), rel=1e-4)
    assert a['avoids']['value'] == pytest.approx(a['avoids']['share']/a['avoids']['by_chance'] - 1)

@pytest.mark.parametrize('back, way', [(.5, 'nearer'), (-.5, 'farther')])
def test_nearer_in_weights(back, way, tmp_path):
    found = compare_chain(points(tmp_path, lambda F, g: {k: -back*x for k, x in F.items()}), tmp_path/'out')
    a = found['overall'][0]['answers']['nearer']
    assert a['value'] == pytest.approx(back, abs=1e-4) and a['by_chance'] == pytest.approx(1 - 1.25**.5, abs=1e-4) and chain_answers(found)[1].endswith(f': {way}.')
    assert chain_answers(found)[3].endswith(': stays there.') # the same directions

def test_a_null_result_says_what_it_would_have_seen(tmp_path):
    found = compare_chain(points(tmp_path, lambda F, g: {k: .001*torch.randn(x.shape, generator=g) for k, x in F.items()}), tmp_path/'out')
    said = chain_answers(found)
    assert re.search(r'within noise, [\d.e-]+ would have been seen\.$', said[1]) or 'farther' in said[1]
    assert said[3].endswith(': no more than other updates do.')

def test_stray_holds_its_rate():
    g = np.random.default_rng(0)
    hits = sum(chain.stray(x[0], list(x[1:])) < .05 for x in g.normal(size=(2000, 6)))
    assert binom.ppf(.001, 2000, .05) <= hits <= binom.ppf(.999, 2000, .05)

def test_chain_chance_holds_its_rate():
    "Updates without structure: 5 % leave the interval of shuffles, less with mismatched ones on top."
    n, out = 300, []
    for i in range(n):
        D1, D2, *others = (randn(10, 8, seed=1000*i + j) for j in range(6))
        r = follows(D1, D2, (), draws=2)
        out.append((r['verdict'] != 'sideways', r['p'] < .05, follows(D1, D2, others, draws=2)['verdict'] != 'sideways'))
    alone, p, both = (sum(x) for x in zip(*out))
    assert binom.ppf(.001, n, .05) <= alone <= binom.ppf(.999, n, .05) and abs(p - alone) <= 1 and both <= alone

def test_updates_that_all_share_a_direction(tmp_path):
    "A cosine that other matrices have as well is nothing of this one."
    common = torch.outer(torch.ones(24), torch.ones(24))
    def second(F, g):
        for x in F.values(): x.add_(common)
        return {k: -.5*common + .05*torch.randn(24, 24, generator=g) for k in F}
    found = compare_chain(points(tmp_path, second), tmp_path/'out')
    assert found['overall'][0]['verdict'] == 'sideways' and found['overall'][0]['matrices']['sideways'] >= 10
    assert all(r['pairs'][0]['p'] < 1e-6 for r in found['matrices'].values()) # shuffles alone would say back

def test_a_rounded_middle_is_no_way_back(tmp_path):
    "Training went on from unrounded weights; the middle was stored in bf16."
    g = gen(1)
    W = {f'model.layers.{i}.mlp.up_proj.weight': torch.randn(40, 40, generator=g) for i in range(4)}
    save_file(W, tmp_path/'a.safetensors'); save_file({k: x.bfloat16() for k, x in W.items()}, tmp_path/'b.safetensors'); save_file({k: x + 1e-6 for k, x in W.items()}, tmp_path/'c.safetensors')
    o = compare_chain([tmp_path/f'{n}.safetensors' for n in 'abc'], tmp_path/'out')['overall'][0]
    assert o['cosine'] < -.99 and o['storage'] < -.9 and o['verdict'] == 'sideways' or o['cosine'] >= 1.2*o['storage'] # the bound is a mean

def test_chain_ranks_and_unchanged():
    s = torch.tensor([3., 2, 1], dtype=torch.float64)
    assert stable_rank(s) == pytest.approx(14/9) and effective_rank(s) == pytest.approx(math.exp(-sum(p*math.log(p) for p in (1/2, 1/3, 1/6))))
    W = randn(8, 6).bfloat16()
    X = W.clone(); X[:2] += 1
    r = chain.describe_update(X.double() - W.double(), W, X)
    assert r['unchanged'] == r['unchanged_bf16'] == .75 and r['size'] == pytest.approx(float((X.double() - W.double()).norm()/W.double().norm()))

def test_chain_of_models(tmp_path, capsys):
    "Four checkpoints of a real architecture; one step changes nothing, one matrix is missing, one is bad."
    lm = build('qwen3')
    a, b = saved(lm, tmp_path/'a'), saved(tuned(lm), tmp_path/'b')
    c = saved(tuned(tuned(lm), seed=8), tmp_path/'c')
    t = load_file(c/'model.safetensors')
    t.pop('model.layers.2.mlp.down_proj.weight'); t['model.layers.1.mlp.up_proj.weight'][0, 0] = math.nan
    (tmp_path/'d').mkdir(); save_file(t, tmp_path/'d'/'model.safetensors'); (tmp_path/'d'/'config.json').write_text((c/'config.json').read_text())
    assert main([str(x) for x in (a, b, c, c, tmp_path/'d')] + ['--out', str(tmp_path/'out'), '--workers', '1']) == 0
    said = capsys.readouterr().out
    assert 'The update from b to c moves sideways' in said or 'The update from 2 to 3 moves sideways' in said
    assert said.count('nothing to compare') == 2 and 'layers.2.down' in said and 'up_proj.weight holds 1 values' in said
    assert sorted(p.name for p in (tmp_path/'out').iterdir() if p.is_file()) == ['chain-1.png', 'chain.json', 'chain.parquet', 'report.html']

def test_chain_of_adapters(adapted, tmp_path):
    "Base, one adapter, the same with half the scale: half is taken back."
    lm, base, folder, A, B = adapted
    lora(tmp_path/'half', base, {'model.layers.1.self_attn.q_proj': (A, .5*B)})
    o = compare_chain([base, folder, tmp_path/'half'], tmp_path/'out')['overall'][0]
    assert o['n'] == 1 and o['cosine'] == pytest.approx(-1, abs=1e-4) and o['taken_back'] == pytest.approx(.5, abs=1e-4)

def test_chain_refuses(tmp_path):
    with pytest.raises(ValueError, match='three checkpoints'): compare_chain([tmp_path, tmp_path])
    with pytest.raises(ValueError, match='draws=1'): compare_chain([tmp_path]*3, draws=1)

def test_chain_resumes(tmp_path, monkeypatch):
    ps = points(tmp_path, same_space, 2)
    first, done, real = compare_chain(ps, tmp_path/'out'), [], chain.measure_matrix
    next((tmp_path/'out').glob('chain-*/*.json')).unlink()
    monkeypatch.setattr(chain, 'measure_matrix', lambda *a: (done.append(1), real(*a))[1])
    assert compare_chain(ps, tmp_path/'out') == first and len(done) == 1
