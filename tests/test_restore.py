"Restoration: identities, an independent implementation, checkpoints of several architectures, interrupted writes, the command."
import gc, json, math, subprocess, sys, weakref
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoModelForImageTextToText, GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MllamaConfig,
                          MllamaForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM)
from rlsft_nb import edits, restoration, restoration_figures, restore, surgery, workbench
from rlsft_nb.files import read_json, write_json
from rlsft_nb.intervals import wilson
from rlsft_nb.parameters import load_params
from rlsft_nb.problems import DiskError, ParamError, StageBusy, CheckpointError
from rlsft_nb.verdicts import verdict_table
from rlsft_nb.models import score
from rlsft_nb.tiny import make_tokenizer, new_model
from rlsft_nb.matrix_names import canonical
from pretend import GPU

EXACT = ('directions', 'rotate', 'values', 'swap')
few = settings(max_examples=25)

@st.composite
def matrices(draw, eps=None):
    "A reference and a target near it, up to 12 x 12, tall, wide or square, well conditioned enough for 1e-9."
    m, n, seed = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    W0 = rng.normal(size=(m, n))
    return torch.from_numpy(W0 + (draw(st.sampled_from([.01, .1, 1.])))*rng.normal(size=(m, n))), torch.from_numpy(W0)

def band_of(draw_k, p): return tuple(sorted(min(k, p) for k in draw_k))
spans = st.tuples(st.integers(0, 12), st.integers(0, 12))
close = lambda a, b, tol=1e-8: torch.testing.assert_close(a, b, rtol=tol, atol=tol)
sv = torch.linalg.svdvals
norm = lambda M: float(M.norm())
orthogonal = lambda n, seed: torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0])

def by_loops(W, W0, mode, lo, hi):
    "Rank-one pieces added one after another, from numpy's decomposition."
    (U, s, Vt), (U0, s0, V0t) = (np.linalg.svd(M.numpy(), full_matrices=False) for M in (W, W0))
    out = np.zeros(W.shape)
    for i in range(len(s)):
        inside = lo <= i < hi
        u, v = (U0[:, i], V0t[i]) if inside and mode in ('directions', 'swap') else (U[:, i], Vt[i])
        x = s0[i] if inside and mode in ('values', 'swap') else s[i]
        for r in range(W.shape[0]):
            for c in range(W.shape[1]): out[r, c] += x*u[r]*v[c]
    return torch.from_numpy(out)

# the operation

@few
@given(matrices(), spans, st.sampled_from(['directions', 'values', 'swap']))
def test_an_independent_implementation_agrees(pair, ks, mode):
    lo, hi = band_of(ks, min(pair[0].shape))
    close(edits.edit(edits.pair(*pair), mode, lo, hi), by_loops(*pair, mode, lo, hi))

@few
@given(matrices(), st.sampled_from(edits.MODES), st.integers(0, 12))
def test_no_ranks_change_no_bit(pair, mode, k):
    k = min(k, min(pair[0].shape))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        W, W0 = (M.to(dtype) for M in pair)
        assert torch.equal(edits.edit(edits.pair(W, W0), mode, k, k), W)
    assert torch.equal(edits.restore_directions(*pair, 0), pair[0])

@few
@given(matrices())
def test_full_rank(pair):
    W, W0 = pair
    full = edits.restore_directions(W, W0, min(W.shape))
    close(sv(full)/sv(W)[0], sv(W)/sv(W)[0], 1e-10)
    assert not torch.allclose(full, W0, 1e-9, 1e-9)
    assert torch.equal(edits.edit(edits.pair(W, W0), 'swap'), W0)
    close(sv(edits.restore_values(W, W0)), sv(W0), 1e-10)
    close(edits.edit(edits.pair(W, W0), 'rotate'), full)

@few
@given(matrices(), spans, st.sampled_from(EXACT))
def test_transposing_first_or_last(pair, ks, mode):
    W, W0 = pair
    lo, hi = band_of(ks, min(W.shape))
    close(edits.edit(edits.pair(W.mT, W0.mT), mode, lo, hi), edits.edit(edits.pair(W, W0), mode, lo, hi).mT)

@few
@given(matrices(), spans, st.sampled_from(EXACT), st.integers(0, 99))
def test_a_change_of_basis_before_or_after(pair, ks, mode, seed):
    W, W0 = pair
    lo, hi = band_of(ks, min(W.shape))
    Q, P = orthogonal(W.shape[0], seed), orthogonal(W.shape[1], seed + 1)
    close(edits.edit(edits.pair(Q @ W @ P, Q @ W0 @ P), mode, lo, hi), Q @ edits.edit(edits.pair(W, W0), mode, lo, hi) @ P)

@few
@given(matrices(), st.integers(0, 12), st.sampled_from(['directions', 'values']))
def test_bands_add_up(pair, k, mode):
    p = edits.pair(*pair)
    k = min(k, p.rank)
    close(edits.edit(p, mode, 0, k) + edits.edit(p, mode, k) - p.W, edits.edit(p, mode))

@few
@given(matrices(), spans)
def test_rotation_keeps_values_and_takes_the_directions(pair, ks):
    p = edits.pair(*pair)
    lo, hi = band_of(ks, p.rank)
    out = edits.edit(p, 'rotate', lo, hi)
    close(sv(out), p.a.s, 1e-10)
    close(p.a0.U[:, lo:hi].mT @ out @ p.a0.Vt[lo:hi].mT, torch.diag(p.a.s[lo:hi]))

def test_rotation_where_a_direction_is_taken_twice():
    W, W0 = torch.diag(torch.tensor([3., 2., 1.]).double()), torch.diag(torch.tensor([1., 2., 3.]).double())
    out = edits.edit(edits.pair(W, W0), 'rotate', 0, 1) # the reference's first is the target's last
    close(sv(out), torch.tensor([3., 2., 1.]).double())
    assert out[2, 2] == pytest.approx(3)

@few
@given(matrices(), spans, st.integers(0, 99))
def test_controls_move_as_far_as_directions(pair, ks, seed):
    p = edits.pair(*pair)
    lo, hi = band_of(ks, p.rank)
    size, gap = norm(edits.edit(p, 'directions', lo, hi) - p.W), norm(p.W - p.W0)
    assert norm(edits.edit(p, 'random_change', lo, hi, seed) - p.W) == pytest.approx(size, 1e-6, abs=1e-9)
    line = edits.edit(p, 'interpolate', lo, hi)
    assert norm(line - p.W) == pytest.approx(min(size, gap), 1e-6, abs=1e-9)
    assert norm(line - p.W) + norm(line - p.W0) == pytest.approx(gap, 1e-6)

@pytest.mark.parametrize('shape', [(16, 16), (8, 24), (30, 8)])
def test_random_rotation_keeps_values_and_is_seeded(shape):
    rng = torch.Generator().manual_seed(0)
    W0 = torch.randn(shape, generator=rng).double()
    p = edits.pair(W0 + .1*torch.randn(shape, generator=rng).double(), W0)
    a, b, c = (edits.edit(p, 'random_rotation', 0, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    close(sv(a), p.a.s, 1e-10)
    assert norm(a - p.W) == pytest.approx(norm(edits.edit(p, 'directions', 0, 4) - p.W), 2e-6)

def test_random_rotation_cannot_go_further_than_the_matrix():
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match='no rotation moves'): edits._random_rotation(edits.pair(*torch.randn(2, 6, 6, generator=rng).double()), 1e3, rng)

@few
@given(matrices(), st.lists(st.integers(0, 12), max_size=6))
def test_many_ranks_are_each_as_alone(pair, ks):
    p = edits.pair(*pair)
    ks = sorted(min(k, p.rank) for k in ks)
    for k, M in edits.restore_many(*pair, ks): close(M, edits.restore_directions(*pair, k))

@pytest.mark.parametrize('kind, moved', [('float32', 1.), ('bfloat16', .01)])
@pytest.mark.parametrize('shape', [(60, 60), (40, 90), (90, 40)])
def test_products_are_no_finer_than_what_is_kept(shape, kind, moved):
    rng, kind = torch.Generator().manual_seed(0), getattr(torch, kind)
    W0 = torch.randn(shape, generator=rng)*torch.randn(shape[1], generator=rng).exp()
    pair = (W0 + .01*torch.randn(shape, generator=rng)).to(kind), W0.to(kind)
    for k, M in edits.restore_many(*pair, [0, 5, 20, 40]):
        want = edits.restore_directions(*pair, k)
        assert M.dtype == kind and (k or torch.equal(M, pair[0]))
        assert float((M != want).double().mean()) <= moved # where both would be rounded, hardly any entry falls to the other side
        assert float((M.double() - want.double()).abs().max()) <= 4*torch.finfo(kind).eps*float(want.abs().max())
    assert kind != torch.float32 or not torch.equal(M, want) # in fp64 every entry would be the same

@few
@given(matrices(), spans, st.sampled_from(EXACT))
def test_the_record(pair, ks, mode):
    p = edits.pair(*pair)
    lo, hi = band_of(ks, p.rank)
    exact = edits.edit64(p, mode, lo, hi)
    r = edits.describe(p, exact, mode, lo, hi)
    assert r['size'] == pytest.approx(float((exact - p.W).norm()), abs=1e-12) and r['rounding'] == 0
    rest = [i for i in range(p.rank) if not lo <= i < hi]
    if mode == 'directions':
        bases = [torch.cat([B0[:, lo:hi], B[:, rest]], 1) for B, B0 in ((p.a.U, p.a0.U), (p.a.Vt.mT, p.a0.Vt.mT))]
        cond = max(float(torch.linalg.cond(B)) for B in bases)
        if cond < 1e3: assert r['condition'] == pytest.approx(cond, 1e-6)
    if mode == 'rotate': assert r['values'] < 1e-6 and r['condition'] == 1

def test_a_change_without_structure_is_directions_only():
    rng = torch.Generator().manual_seed(0)
    W0 = torch.randn(60, 90, generator=rng).double()
    p = edits.pair(W0 + .003*torch.randn(60, 90, generator=rng).double(), W0)
    left = float((edits.edit(p, 'directions') - W0).norm()/(p.W - W0).norm())
    assert left == pytest.approx(edits.freedom(p)['chance'], rel=.2) and edits.freedom(p)['measured'] == pytest.approx(left, rel=.1)

# what is asked for

@pytest.mark.parametrize('ranks, want', [(None, (0, 7)), (0., (0, 0)), (1., (0, 7)), (.5, (0, 4)), (.01, (0, 1)), (3, (0, 3)), (99, (0, 7)), ((.5, 1.), (4, 7)), ([2, 5], (2, 5))])
def test_bands(ranks, want): assert edits.band(ranks, 7) == want

@pytest.mark.parametrize('ranks', [1.1, -1, -.1, True, 'all', (5, 2), (1, 2, 3), float('nan')])
def test_bands_refused(ranks):
    with pytest.raises(ValueError, match='ranks'): edits.band(ranks, 7)

@pytest.mark.parametrize('text', ['', 'x', '0.1-0.2-0.3', '-3'])
def test_rank_texts_refused(text):
    with pytest.raises(ValueError, match='ranks='): edits.parse_ranks(text)

@pytest.mark.parametrize('layers', ['a', '3-1', '1-2-3', ''])
def test_layer_texts_refused(layers):
    with pytest.raises(ValueError, match='layers='): surgery.parse_layers(layers)

# checkpoints

small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, max_position_embeddings=64)

def mllama():
    text = {k: v for k, v in small.items() if k != 'max_position_embeddings'} | dict(cross_attention_layers=[1], num_hidden_layers=3, pad_token_id=0, rope_parameters=dict(rope_type='default', rope_theta=1e4))
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_global_layers=1, attention_heads=2, image_size=28, patch_size=14, vision_output_dim=32,
                  intermediate_layers_indices=[0], max_num_tiles=1, supported_aspect_ratios=[[1, 1]])
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_index=49))

PICO = dict(qwen2=lambda: Qwen2ForCausalLM(Qwen2Config(**small, tie_word_embeddings=False)),
            llama=lambda: LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True)),
            gpt2=lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=64)), mllama=mllama,
            gemma=lambda: GemmaForCausalLM(GemmaConfig(**small, head_dim=4)))

def two(folder, kind, dtype=torch.float32, shards='10MB'):
    "A reference and a target 5 % away from it, on disk, with a tokenizer."
    torch.manual_seed(0)
    lm = PICO[kind]().to(dtype)
    lm.save_pretrained(folder/'ref', max_shard_size=shards)
    with torch.no_grad():
        for v in lm.parameters(): v.add_(.05*(v.float().abs().mean() + 1e-3)*torch.randn(v.shape))
    lm.save_pretrained(folder/'tgt', max_shard_size=shards)
    make_tokenizer().save_pretrained(folder/'tgt')
    return folder/'tgt', folder/'ref'

def logits(folder, kind):
    lm = (AutoModelForImageTextToText if kind == 'mllama' else AutoModelForCausalLM).from_pretrained(folder).eval()
    with torch.no_grad(): return lm(input_ids=torch.arange(1, 9)[None]).logits, lm

def tensors(folder): return {k: v for f in sorted(folder.glob('*.safetensors')) for k, v in load_file(f).items()}

@pytest.mark.parametrize('kind', PICO)
def test_architectures(tmp_path, kind):
    tgt, ref = two(tmp_path, kind, shards='8KB' if kind != 'llama' else '10MB')
    surgery.restore(tgt, ref, tmp_path/'same', ranks=0)
    before, after = tensors(tgt), tensors(tmp_path/'same')
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    want, _ = logits(tgt, kind)
    got, lm = logits(tmp_path/'same', kind)
    assert torch.equal(want, got)
    done = surgery.restore(tgt, ref, tmp_path/'new', ranks=.5, layers='0-1')
    got, lm = logits(tmp_path/'new', kind)
    assert not torch.equal(want, got) and got.isfinite().all()
    now, theirs = tensors(tmp_path/'new'), tensors(ref)
    for k, v in before.items():
        if canonical(k) not in done['edits']: assert torch.equal(now[k], v)
        else: close(now[k], edits.restore_directions(v, theirs[k], edits.band(.5, min(v.shape))[1]), 1e-6)
    assert {n.split('.')[1] for n in done['edits'] if n.startswith('layers')} == {'0', '1'} and 'embed' not in done['edits']
    assert (tmp_path/'new'/'tokenizer.json').is_file() and 'directions' in (tmp_path/'new'/'README.md').read_text()
    assert read_json(tmp_path/'new'/'config.json') == read_json(tgt/'config.json')
    assert read_json(tmp_path/'new'/'restore.json')['edits'] == json.loads(json.dumps(done['edits']))

def test_tied_stays_tied(tmp_path):
    tgt, ref = two(tmp_path, 'llama')
    done = surgery.restore(tgt, ref, tmp_path/'out', types='embed')
    lm = logits(tmp_path/'out', 'llama')[1]
    assert list(done['edits']) == ['embed'] and lm.lm_head.weight is lm.model.embed_tokens.weight
    with pytest.raises(ValueError, match="'head' is none of"): surgery.restore(tgt, ref, tmp_path/'no', types='head')

def test_bf16_is_kept_and_its_rounding_told(tmp_path):
    tgt, ref = two(tmp_path, 'qwen2', torch.bfloat16)
    done = surgery.restore(tgt, ref, tmp_path/'out', types=['q', 'v'])
    assert {v.dtype for v in tensors(tmp_path/'out').values()} == {torch.bfloat16}
    assert all(0 < r['rounding'] < r['size'] for r in done['edits'].values()) and len(done['edits']) == 4

def test_vectors_are_a_group_of_their_own(tmp_path):
    tgt, ref = two(tmp_path, 'qwen2')
    done = surgery.restore(tgt, ref, tmp_path/'out', types='1d', layers='1')
    now, before, theirs = (tensors(f) for f in (tmp_path/'out', tgt, ref))
    changed = {k for k in now if not torch.equal(now[k], before[k])}
    assert changed and all(v.ndim == 1 and 'layers.1.' in k for k, v in now.items() if k in changed)
    assert all(torch.equal(now[k], theirs[k]) for k in changed) and len(done['edits']) == len(changed)

@pytest.mark.parametrize('mode', edits.MODES)
def test_every_mode_on_disk_as_in_memory(tmp_path, mode):
    tgt, ref = two(tmp_path, 'qwen2')
    surgery.restore(tgt, ref, tmp_path/'out', mode, ranks=.4, types='k', seed=3)
    now, before, theirs = (tensors(f) for f in (tmp_path/'out', tgt, ref))
    key = 'model.layers.1.self_attn.k_proj.weight'
    assert torch.equal(now[key], edits.edit(edits.pair(before[key], theirs[key]), mode, *edits.band(.4, 8), surgery.seed_of('layers.1.k', 3)))

@pytest.mark.parametrize('kind', ['qwen2', 'mllama'])
def test_many_variants_are_each_as_alone(tmp_path, kind, monkeypatch):
    tgt, ref = two(tmp_path, kind, shards='8KB')
    variants = {f'k{k}': dict(ranks=k) for k in (0, 1, 4, .5, None)} | dict(again=dict(ranks=4), layer=dict(layers='0'), rotate=dict(mode='rotate', ranks=.5, types='q'),
                noise=dict(mode='random_rotation', ranks=2, seed=3, types=['k']), vectors=dict(types=['q', '1d'], mode='swap'))
    true, decomposed = edits.pair, []
    monkeypatch.setattr(surgery, 'pair', lambda *a: decomposed.append(a[2]) or true(*a))
    done = surgery.restore_all(tgt, ref, {tmp_path/n: v for n, v in variants.items()})
    assert len(decomposed) == len(set(decomposed)) == len(surgery.Checkpoint(tgt).matrices) # once each, whatever the number of variants
    for n, v in variants.items():
        alone = surgery.restore(tgt, ref, tmp_path/f'{n}-alone', **v)
        a, b = tensors(tmp_path/n), tensors(tmp_path/f'{n}-alone')
        assert list(a) == list(b)
        for k in a: close(a[k], b[k], 1e-6)
        assert set(alone['edits']) == set(done[tmp_path/n]['edits']) == set(read_json(tmp_path/n/'restore.json')['edits'])
    assert all(torch.equal(a, b) for a, b in zip(tensors(tmp_path/'k4').values(), tensors(tmp_path/'again').values()))

def test_one_of_many_variants_exists(tmp_path):
    tgt, ref = two(tmp_path, 'qwen2')
    surgery.restore(tgt, ref, tmp_path/'b', ranks=1)
    with pytest.raises(surgery.Exists, match='b exists already'): surgery.restore_all(tgt, ref, {tmp_path/'a': {}, tmp_path/'b': {}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b', 'ref', 'tgt']

@pytest.mark.parametrize('at_once', [1, 2, 8])
def test_a_stopped_sweep_goes_on(tmp_path, at_once):
    tgt, ref = two(tmp_path, 'qwen2')
    specs, seen = {f'k{k}': dict(ranks=k, types='k') for k in (1, 2, 8)}, []
    def score(folder):
        seen.append(folder.name)
        if seen == ['k1', 'k2']: raise KeyboardInterrupt
        return len(tensors(folder))
    with pytest.raises(KeyboardInterrupt): surgery.sweep(tgt, ref, tmp_path/'s', specs, score, at_once)
    assert set(surgery.sweep(tgt, ref, tmp_path/'s', specs, score, at_once).values()) == {len(tensors(tgt))}
    assert seen == ['k1', 'k2', 'k2', 'k8'] and sorted(p.name for p in (tmp_path/'s').iterdir()) == ['k1.json', 'k2.json', 'k8.json']

# what goes wrong

def spoil(folder, change):
    f = folder/'model.safetensors'
    sd = load_file(f)
    change(sd)
    save_file(sd, f, {'format': 'pt'})

Q = 'model.layers.0.self_attn.q_proj.weight'
@pytest.mark.parametrize('change, message', [
    (lambda sd: sd[Q].view(-1)[0].fill_(float('nan')), 'NaN'),
    (lambda sd: sd.update({Q: sd[Q][:8].contiguous()}), r'layers.0.q is \(8, 16\)'),
    (lambda sd: sd.pop(Q), 'lacks layers.0.q'),
    (lambda sd: sd.update({'model.layers.2.self_attn.q_proj.weight': sd[Q].clone()}), 'lacks layers.2.q')])
def test_unfit_references(tmp_path, change, message):
    tgt, ref = two(tmp_path, 'qwen2')
    spoil(ref, change)
    with pytest.raises(CheckpointError, match=message): surgery.restore(tgt, ref, tmp_path/'out')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ref', 'tgt']

def test_matrices_that_do_not_fit():
    M = torch.eye(3)
    with pytest.raises(ValueError, match='shapes'): edits.restore_directions(M, M[:2], 1)
    with pytest.raises(ValueError, match='reference holds NaN'): edits.restore_directions(M, M*float('nan'), 1)
    with pytest.raises(ValueError, match=r'lo <= hi <= 3'): edits.restore_directions(M, M, 4)

@pytest.mark.parametrize('error, seen', [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, 'No space left on device'), DiskError)])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error, seen):
    tgt, ref = two(tmp_path, 'qwen2', shards='8KB')
    true, calls = edits.describe, []
    def describe(*a):
        calls.append(1)
        if len(calls) == 4: raise error
        return true(*a)
    monkeypatch.setattr(surgery, 'describe', describe)
    with pytest.raises(seen): surgery.restore_all(tgt, ref, {tmp_path/f'out-{k}': dict(ranks=k) for k in (1, 2)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ref', 'tgt']

def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    tgt, ref = two(tmp_path, 'qwen2', shards='8KB')
    kill = f"import os; from rlsft_nb import surgery; surgery._copy_aux = lambda *a: os._exit(9); surgery.restore({str(tgt)!r}, {str(ref)!r}, {str(tmp_path/'out')!r})"
    assert subprocess.run([sys.executable, '-c', kill], stdin=subprocess.DEVNULL).returncode == 9
    assert not (tmp_path/'out').exists() and (tmp_path/'.out.part').is_dir()
    surgery.restore(tgt, ref, tmp_path/'fresh')
    monkeypatch.setattr(surgery, 'pair', None) # every shard is there already
    surgery.restore(str(tgt), str(ref), tmp_path/'out')
    a, b = tensors(tmp_path/'out'), tensors(tmp_path/'fresh')
    assert all(torch.equal(a[k], b[k]) for k in b) and sorted(p.name for p in tmp_path.iterdir()) == ['fresh', 'out', 'ref', 'tgt']

def test_two_at_once_and_leftovers_of_another_job(tmp_path):
    tgt, ref = two(tmp_path, 'qwen2')
    with pytest.raises(StageBusy, match='another process'), surgery._workplace(tmp_path/'out', 'another job'): surgery.restore(tgt, ref, tmp_path/'out')
    part = tmp_path/'.out.part'
    part.mkdir()
    (part/'.job').write_text('another job')
    (part/'model.safetensors').write_text('left behind')
    surgery.restore(tgt, ref, tmp_path/'out', ranks=0)
    assert all(torch.equal(v, tensors(tgt)[k]) for k, v in tensors(tmp_path/'out').items())

# the command

def test_the_command(tmp_path, capsys):
    tgt, ref = two(tmp_path, 'qwen2')
    asked = [str(a) for a in ('--target', tgt, '--reference', ref, '--out', tmp_path/'out', '--rank', '0.2', '--types', 'q,k,v', '--layers')]
    assert surgery.main([*asked, '0', '--dry-run']) == 0 and not (tmp_path/'out').exists()
    assert 'matrices    3' in capsys.readouterr().out
    run = subprocess.run([sys.executable, '-m', 'rlsft_nb.restore', *asked, '0'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0 and '3 tensors changed' in run.stdout, run.stderr
    assert set(read_json(tmp_path/'out'/'restore.json')['edits']) == {'layers.0.q', 'layers.0.k', 'layers.0.v'}
    for layers, said in (('0', 'exists already'), ('7', 'layers: 7 is not there'), ('x', "layers='x'")):
        with pytest.raises(SystemExit) as e: surgery.main([*asked, layers])
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count('\n') == 1

@pytest.mark.parametrize('kind', ['gpt2', 'gemma', 'mllama'])
def test_the_command_takes_other_architectures(tmp_path, kind, capsys):
    tgt, ref = two(tmp_path, kind)
    ask = lambda out, *more: surgery.main([*map(str, ('--target', tgt, '--reference', ref, '--out', tmp_path/out)), *more])
    assert ask('same', '--rank', '0') == 0 and torch.equal(logits(tgt, kind)[0], logits(tmp_path/'same', kind)[0])
    assert ask('new', '--rank', '0.5', '--layers', '0') == 0 and not torch.equal(logits(tgt, kind)[0], logits(tmp_path/'new', kind)[0])
    assert {n.split('.')[1] for n in read_json(tmp_path/'new'/'restore.json')['edits']} == {'0'} and 'tensors changed' in capsys.readouterr().out

# the experiment

def test_cells_in_place_are_the_checkpoints_on_disk(tmp_path):
    (tgt, ref, _), cfg = pico_pair(tmp_path)
    spec = dict(mode='directions', ranks=.5, layers='0', types=['q', 'down'])
    cell = workbench.score_cell(tgt, ref, cfg, spec)
    done = surgery.restore(tgt, ref, tmp_path/'out', **spec)
    now = {canonical(k): v for k, v in tensors(tmp_path/'out').items()}
    assert all(torch.equal(v, now[n]) for n, v in workbench.workbench(tgt, ref, cfg).params.items())
    assert cell['edit']['matrices'] == 2 and cell['edit']['size'] == pytest.approx(sum(r['size']**2 for r in done['edits'].values())**.5)
    plain = workbench.score_cell(tgt, ref, cfg, dict(mode='swap', ranks=0.))
    want = score(tgt, cfg, 'test', ['ID', 'OOD'])
    assert all(plain[c]['hits'] == want[c]['hits'] and plain[c]['outcomes'] == want[c]['outcomes'] for c in want)

def pico_pair(folder, **more):
    "Checkpoints of tiny's architecture, and the parameters to play them."
    tok = make_tokenizer()
    for name, seed in (('tgt', 0), ('ref', 1), ('other', 2)): new_model(tok, seed, width=64, layers=2).save_pretrained(folder/name); tok.save_pretrained(folder/name)
    return [str(folder/n) for n in ('tgt', 'ref', 'other')], load_params('tiny', dict(eval=dict(hands=6, max_new_tokens=4), workers=1, **more))

def test_a_workbench_on_disk_is_the_one_in_memory(tmp_path, monkeypatch):
    (tgt, ref, _), cfg = pico_pair(tmp_path)
    small = workbench.Workbench(tgt, ref, cfg)
    monkeypatch.setattr(workbench, 'KEEP_GIB', 0)
    large = workbench.Workbench(tgt, ref, cfg)
    folder = Path(large.pairs.folder.name)
    assert len(list(folder.iterdir())) == len(large.params) and not any(isinstance(p, edits.Pair) for p in large.pairs.here.values())
    for spec in (dict(ranks=.3), dict(mode='swap', layers='1'), dict(mode='values', types=['q']), dict(mode='directions', ranks=0.)):
        assert small.put(**spec) == pytest.approx(large.put(**spec), 1e-6)
        for n, v in small.params.items(): close(v, large.params[n], 1e-6)
    assert all(torch.equal(v, tensors(Path(tgt))[k]) for k, v in small.lm.named_parameters()) and small.freedom == large.freedom
    large.pairs.folder.cleanup()
    assert not folder.exists()

@pytest.mark.parametrize('shape', [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize('kept', [12, 9, 2, 0]) # of 12 directions: all, some columns on the disk, the fallback of `decompose`, a matrix of zeros
def test_a_decomposition_comes_back_from_its_short_side(tmp_path, monkeypatch, shape, kept):
    rng = torch.Generator().manual_seed(0)
    W0 = torch.randn(shape, generator=rng)
    W = (torch.randn(shape[0], kept, generator=rng) @ torch.randn(kept, shape[1], generator=rng)) + 1e-9*W0*bool(kept)
    monkeypatch.setattr(workbench, 'KEEP_GIB', 0)
    pairs, p = workbench.Pairs([shape]), edits.pair(W, W0)
    pairs['a'] = p
    q, held = pairs['a'], load_file(pairs._file('a'))
    assert q.dtype == torch.float32 and torch.equal(q.W, p.W) and torch.equal(q.W0, p.W0)
    for S, T, M in ((q.a, p.a, W), (q.a0, p.a0, W0)):
        for a, b in zip(S, T): close(a, b, 1e-11)
        close((S.U*S.s) @ S.Vt, M.double(), 1e-6)
        for B in (S.U, S.Vt.mT): close(B.mT @ B, torch.eye(B.shape[1]).double(), 1e-9)
    assert held['tail0'].shape[1] == min(shape) - min(kept, min(shape)) and held['tail1'].shape[1] == 0

# with a GPU, or what says it is one

def near(shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    W0 = torch.randn(shape, generator=rng)
    return W0 + .05*torch.randn(shape, generator=rng), W0

@pytest.mark.parametrize('shape', [(30, 14), (14, 30), (20, 20)])
@pytest.mark.parametrize('mode', edits.MODES)
def test_every_mode_on_a_gpu(shape, mode):
    W, W0 = near(shape)
    for lo, hi in ((0, 5), (4, 9), (0, min(shape))):
        p = edits.pair(W, W0)
        want = edits.edit64(p, mode, lo, hi, 3)
        with GPU() as gpu:
            there = lambda *Ms: [M.to('cuda:0') for M in Ms]
            q = edits.Pair(*there(p.W, p.W0), edits.Spectrum(*there(*p.a)), edits.Spectrum(*there(*p.a0)), p.dtype) # another decomposition would have other signs
            got = edits.edit64(q, mode, lo, hi, 3)
            assert got.is_cuda and (mode == 'denoise') == bool(gpu.ran & {'linalg_svd', 'linalg_eigh', 'linalg_eigvalsh', 'linalg_svdvals'}) # the update of a pair is decomposed when it is asked for
            told = edits.describe(q, got, mode, lo, hi) | dict(freedom=edits.freedom(q))
            got = got.cpu()
        size = norm(want - p.W)
        assert norm(got - p.W) == pytest.approx(size, 2e-6)
        close(got, want, 1e-6*size if mode == 'random_rotation' else 1e-9) # the pretended GPU draws as the CPU does; trials of a size end within a millionth
        if mode in ('rotate', 'random_rotation'): close(sv(got), p.a.s, 1e-10)
        mine = edits.describe(p, want, mode, lo, hi) | dict(freedom=edits.freedom(p))
        assert json.dumps(told) and told.keys() == mine.keys()
        for k in ('size', 'distance', 'to_reference', 'norm', 'condition'): assert told[k] == pytest.approx(mine[k], 1e-5), k

def test_a_gpu_draws_by_itself():
    W, W0 = near((20, 14))
    with GPU():
        p = edits.pair(W.to('cuda:0'), W0.to('cuda:0'))
        for mode in ('random_rotation', 'random_change'):
            a, b, c = (edits.edit64(p, mode, 0, 4, seed).cpu() for seed in (0, 0, 1))
            assert torch.equal(a, b) and not torch.equal(a, c)

@few
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(0, 20), st.floats(-6, 0), st.floats(-3, 3))
def test_the_nearest_frame_by_products(seed, p, more, least, scale):
    "Singular values from 10**least to 1, all of them times 10**scale."
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(n, p)))[0] for n in (p + more, p))
    s = 10**rng.uniform(least, 0, p)*10**scale
    X = torch.from_numpy((U*s) @ V.T)
    close(edits._by_products(X), torch.from_numpy(U @ V.T), 1e-8*10**-least*1e-2 + 1e-10)

def test_a_frame_that_products_do_not_find():
    X = torch.eye(4, dtype=torch.float64)
    X[:, 3] = X[:, 0]
    assert edits._by_products(X) is None and edits._by_products(0*X) is None
    W, W0 = torch.diag(torch.tensor([3., 2., 1.]).double()), torch.diag(torch.tensor([1., 2., 3.]).double())
    with GPU() as gpu: # a direction is taken twice
        out = edits.edit64(edits.pair(W.to('cuda:0'), W0.to('cuda:0')), 'rotate', 0, 1).cpu()
        assert 'linalg_svd' in gpu.ran
    close(sv(out), torch.tensor([3., 2., 1.]).double())

def test_on_a_cpu_random_rotation_is_what_it_was():
    "To the last bit: kept figures were made with these sums in this order."
    def frame(X):
        lam, Q = torch.linalg.eigh(X.mT @ X)
        return X @ ((Q*lam.rsqrt()) @ Q.mT)
    for shape in ((30, 14), (14, 30), (20, 20)):
        p, rng = edits.pair(*near(shape)), torch.Generator().manual_seed(3)
        size = float((p.W + (p.a0.U*p.a.s) @ p.a0.Vt - (p.a.U*p.a.s) @ p.a.Vt - p.W).norm())
        G, H = (torch.randn(B.shape, generator=rng, dtype=torch.float64)/B.shape[0]**.5 for B in (p.a.U, p.a.Vt.mT))
        t, got = size/float(p.W.norm()), 0.
        while abs(got - size) > 1e-6*size:
            out = p.W + (frame(p.a.U + t*G)*p.a.s) @ frame(p.a.Vt.mT + t*H).mT - (p.a.U*p.a.s) @ p.a.Vt
            got = float((out - p.W).norm())
            t *= size/got
        assert torch.equal(edits.edit64(p, 'random_rotation', seed=3), out)

def most_bytes(f):
    "The most memory of tensors that a call takes at a time."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: f()
    each = [e.nbytes() for e in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()) if e.name() == '[memory]']
    return int(np.cumsum(each).max())

@pytest.mark.parametrize('shape', [(6000, 48), (48, 6000)])
@pytest.mark.parametrize('mode', edits.MODES)
def test_the_memory_of_an_edit_is_as_planned(shape, mode):
    "Bytes for each entry: the pair, and the most that anything made of it takes."
    def work():
        p = edits.pair(*(M.to('cuda:0') for M in near(shape)))
        edits.describe(p, edits.edit64(p, mode, 0, 10), mode, 0, 10)
    with GPU(): assert 50 < most_bytes(work)/math.prod(shape) < workbench.WORK

def test_narrow_matrices_stay_on_the_cpu():
    with GPU(): assert [surgery.placed(torch.zeros(s), 'cuda:0').is_cuda for s in ((1024, 1024), (1024, 3000), (1023, 3000), (3000, 576))] == [True, True, False, False]
    assert surgery.placed(W := torch.zeros(1024, 1024), 'cpu') is W

@pytest.mark.parametrize('keep', [8, 0])
def test_a_workbench_with_a_gpu_is_the_one_without(tmp_path, monkeypatch, keep):
    (tgt, ref, _), cfg = pico_pair(tmp_path)
    true = workbench.load_lm
    for name, by in (('ref', .02), ('other', .03)): # near the target, as checkpoints of one run are
        spoil(tmp_path/'tgt', lambda sd: save_file({k: v + by*v.std()*torch.randn(v.shape, generator=torch.Generator().manual_seed(len(k))) if v.ndim == 2 else v for k, v in sd.items()}, tmp_path/name/'model.safetensors', {'format': 'pt'}))
    cpu = workbench.Workbench(tgt, ref, cfg, like=str(tmp_path/'other'))
    monkeypatch.setattr(workbench, 'KEEP_GIB', keep); monkeypatch.setattr(workbench, 'placed', lambda W, d: W.to(d) if W.shape[0] > 64 else W)
    monkeypatch.setattr(workbench, 'device', lambda cfg: 'cuda:0'); monkeypatch.setattr(workbench, 'load_lm', lambda t, c, d, dtype: true(t, c, 'cpu', dtype))
    with GPU() as gpu:
        w = workbench.Workbench(tgt, ref, cfg, like=str(tmp_path/'other'))
        at = {n: w.pairs[n].W.is_cuda for n in w.params}
        assert at == {n: v.shape[0] > 64 for n, v in w.params.items()} and len(set(at.values())) == 2 and bool(w.pairs.folder) == (keep == 0)
        assert w.freedom == pytest.approx(cpu.freedom)
        for mode in edits.MODES:
            for spec in (dict(ranks=.3), dict(layers='1')):
                assert cpu.put(mode, **spec) == pytest.approx(w.put(mode, **spec), 1e-3, abs=1e-6)
                if mode != 'random_rotation': # other signs, another turn
                    for n, v in w.params.items(): close(v, cpu.params[n], 1e-5)

def test_checkpoints_on_disk_are_made_with_the_gpu(tmp_path, monkeypatch):
    tgt, ref = two(tmp_path, 'qwen2')
    variants = dict(part=dict(ranks=.4), turned=dict(mode='random_rotation', ranks=2), vectors=dict(types=['q', '1d'], mode='swap'))
    surgery.restore_all(tgt, ref, {tmp_path/n: v for n, v in variants.items()})
    monkeypatch.setattr(surgery, 'WIDE', 16); monkeypatch.setattr(surgery, 'own_device', lambda: 'cuda:0')
    with GPU() as gpu: surgery.restore_all(tgt, ref, {tmp_path/f'{n}-gpu': v for n, v in variants.items()})
    assert gpu.ran
    for n in variants:
        a, b = tensors(tmp_path/n), tensors(tmp_path/f'{n}-gpu')
        assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype for k in a)
        for k in a if n != 'turned' else (): close(a[k], b[k], 1e-5)

# workbenches

def test_never_two_workbenches_and_none_beside_workers(monkeypatch, tmp_path):
    (tgt, ref, other), cfg = pico_pair(tmp_path)
    alive, made, calls, true = weakref.WeakSet(), [], [], restoration.map_items
    class Bench:
        freedom = dict(measured=.1, chance=.1)
        def __init__(self, *a): alive.add(self); self.me = self; made.append(len(alive)) # a ring, as models have
        def put(self, **spec): made.append(len(alive)); return {}
    def counted(*a): calls.append(len(alive)); return true(*a)
    monkeypatch.setattr(workbench, 'Workbench', Bench); monkeypatch.setattr(restoration, 'map_items', counted); monkeypatch.setattr(restoration, 'within_all', lambda *a: {})
    monkeypatch.setattr(workbench, 'score_cell', lambda t, r, c, spec, seed, like, within: dict(edit=workbench.workbench(t, r, c, like).put(**spec), freedom=workbench.workbench(t, r, c, like).freedom))
    gc.disable()
    try:
        workbench.workbench(tgt, other, cfg) # left from before
        got = restore.play_cells(cfg, 0, dict(peak=(tgt, ref, ''), base=(tgt, other, '')), tmp_path/'one')
        assert set(made) == {1} and made.count(1) == 3 + sum(len(o['specs']) for o in got.values()) # opened, played
        assert calls == [0] and not alive and not workbench._bench
        workbench.workbench(tgt, other, cfg)
        monkeypatch.setattr(restoration, 'map_items', lambda fn, items, *_: calls.append(len(alive)) or dict.fromkeys(items, got['peak']['got']['values-all-full']))
        restore.play_cells(cfg, 0, dict(peak=(tgt, ref, ''), base=(tgt, other, '')), tmp_path/'two')
        assert calls == [0, 0] and not alive
    finally: gc.enable()

@pytest.mark.parametrize('kind', ['qwen2', 'llama', 'mllama'])
def test_the_cells_of_a_target_follow_from_its_headers(pico, kind):
    cfg, folder = load_params('tiny'), str(pico[kind])
    params = workbench.Workbench(folder, folder, cfg).params
    rows = [workbench.Row(n) for n in params]
    assert restore.outline(folder, cfg) == dict(depth=1 + max(r.layer for r in rows), rank=max(min(v.shape) for v in params.values()), tied='head' not in params)

def test_the_unrelated_reference_is_as_far(tmp_path):
    (tgt, ref, other), cfg = pico_pair(tmp_path)
    w, far = workbench.Workbench(tgt, other, cfg, like=ref), workbench.Workbench(tgt, ref, cfg)
    for n in w.params: assert norm(w.pairs[n].W0 - w.pairs[n].W) == pytest.approx(norm(far.pairs[n].W0 - far.pairs[n].W), rel=1e-5)

def test_grid_has_every_cell_once():
    r = load_params('tiny').restore
    for depth, tied in ((4, False), (28, True), (1, False)):
        for which in restore.WHICH:
            cells, few = (restore.grid(r, depth, 192, tied, which, full) for full in (True, False))
            assert set(few) <= set(cells) and all(cells[n] == few[n] for n in few)
            assert len({json.dumps(s, sort_keys=True) for s in cells.values()}) == len(cells)
        assert all(g['layers'] is None or max(surgery.parse_layers(g['layers'])) < depth for g in restore.layer_groups(depth, r.bands, r.prefixes))
    assert [len(restore.within_all(r, w, restore.grid(r, 4, 192, which=w))) for w in restore.WHICH] == [3, 0, 3, 0, 0, 0]
    with pytest.raises(ParamError, match="peak has no cell 'nothing'"): restore.within_all(load_params('tiny', dict(restore=dict(within=['peak/nothing']))).restore, 'peak', {})

def test_first_layers_are_put_back_alone_and_with_embedding_and_head(tmp_path):
    (tgt, ref, _), cfg = pico_pair(tmp_path)
    at, w = restore.outline(tgt, cfg), workbench.Workbench(tgt, ref, cfg)
    group = {g['kind']: g for g in restore.layer_groups(at['depth'], 3, [.25, 1.])}
    def edited(kind):
        w.put('swap', **{k: group[kind][k] for k in ('layers', 'types')})
        return {n for n in w.edited}
    first = next(g for g in restore.layer_groups(at['depth'], 3, [.25, 1.]) if g['kind'] == 'prefix')
    w.put('swap', layers=first['layers']); alone = set(w.edited)
    assert edited('coded') == alone | edited('ends') and alone and not alone & edited('ends') and len(edited('ends')) == 2 - at['tied']
    assert all(restore.cell_name(m, layers='0', types=['*']) in restore.grid(cfg.restore, 4, 192) for m in ('directions', *cfg.restore.layer_controls))

@few
@given(spans, st.integers(12, 40), st.integers(0, 99))
def test_bands_elsewhere_are_as_wide(ks, p, seed):
    lo, hi = sorted(ks)
    for place in edits.PLACES:
        a, b = edits.elsewhere(lo, hi, p, place, seed)
        assert 0 <= a <= b <= p and b - a == hi - lo and (a, b) == edits.elsewhere(lo, hi, p, place, seed)
    assert edits.elsewhere(lo, hi, p, 'top') == (lo, hi) and edits.elsewhere(lo, hi, p, 'tail')[1] == p

def test_random_places_differ():
    assert len({edits.elsewhere(0, 3, 40, 'random', seed) for seed in range(20)}) > 5
    with pytest.raises(ValueError, match="place='middle'"): edits.elsewhere(0, 1, 2, 'middle')

@few
@given(matrices(), spans)
def test_the_authors_reading_and_the_straight_line(pair, ks):
    p = edits.pair(*pair)
    lo, hi = band_of(ks, p.rank)
    whole = hi - lo == p.rank
    assert torch.equal(edits.edit(p, 'coded', lo, hi), p.W0 if whole else edits.edit(p, 'directions', lo, hi))
    close(edits.edit(p, 'blend', lo, hi), p.W + (p.W0 - p.W)*(hi - lo)/p.rank)
    assert torch.equal(edits.edit(p, 'blend'), p.W0)

@few
@given(matrices(), st.integers(0, 99))
def test_an_unrelated_matrix_is_moved_to_the_distance(pair, seed):
    W, W0 = pair
    Z = torch.from_numpy(np.random.default_rng(seed).normal(size=W.shape))
    got = workbench.at_distance(W, Z, W0)
    assert norm(got - W) == pytest.approx(norm(W0 - W)) and norm(got - Z) == pytest.approx(abs(norm(Z - W) - norm(W0 - W)), abs=1e-9)
    assert torch.equal(workbench.at_distance(W, W.clone(), W0), W)

def test_recovery():
    rng = np.random.default_rng(0)
    draw = lambda p: ''.join(map(str, (rng.random(500) < p).astype(int)))
    t, e, ref = draw(.2), draw(.35), draw(.5)
    one, many = restore.recovery(e, t, ref, range(500)), restore.recovery(e, t, ref, [i//10 for i in range(500)])
    rate = lambda b: b.count('1')/500
    assert one['value'] == many['value'] == pytest.approx((rate(e) - rate(t))/(rate(ref) - rate(t)))
    assert one['lo'] < one['value'] < one['hi']
    assert restore.recovery(e, t, t, range(500))['value'] is None # nothing lost
    faint = t[:-1] + ('1' if t[-1] == '0' else '0')
    assert restore.recovery(e, t, faint, range(500))['lo'] is None # the loss may be nothing
    rare = restore.recovery('1'*4 + '0'*496, '0'*500, '1'*4 + '0'*496, range(500)) # some draws have no loss at all
    assert rare['lo'] == rare['hi'] == 1

def test_verdicts_follow_the_thresholds():
    r = lambda v, lo, hi: dict(value=v, lo=lo, hi=hi)
    none = r(None, None, None)
    assert [restore.judge_share(x) for x in (r(.8, .6, 1.), r(.7, .4, .9), r(.3, .1, .6), none)] == ['holds', 'undecided', 'fails', 'nothing to recover']
    assert [restore.judge_cost(x) for x in (r(.66, .5, .9), r(.7, .4, 1.1), r(.9, .8, 1.), none)] == ['holds', 'undecided', 'fails', 'nothing to lose']
    assert [restore.judge_values(*x) for x in ((r(.9, .6, 1.), r(.1, 0., .4)), (r(.3, .1, .4), r(0., -.1, .1)), (r(.6, .4, .8), r(0., -.1, .1)), (none, none))] == ['holds', 'fails', 'undecided', 'nothing to recover']
    assert restore.holm([.01, .04, .03, .5]) == pytest.approx([.04, .09, .09, .5])
    t = lambda *pairs: [dict(holm=p, gain=g) for p, g in pairs]
    won, lost, even = (.01, .1), (.01, -.1), (.2, .1)
    assert [restore.judge_wins(t(*x)) for x in ((won, won), (won, even), (won, lost), (lost, even), (even,), ())] == ['holds', 'undecided', 'fails', 'fails', *['no difference seen']*2]
    assert [restore.judge_wins(t(*x), any) for x in ((won, even), (won, lost), (lost, even), (even, even))] == ['holds', 'mixed', 'fails', 'no difference seen']

def played(p, seed, n=1000):
    "A made-up record of `evaluate` with success rate `p`."
    hits = (np.random.default_rng(seed).random(n) < p).astype(int)
    lo, hi = wilson(hits.sum(), n)
    bits = ''.join(map(str, hits))
    return dict(n=n, first=dict(k=int(hits.sum()), rate=float(hits.mean()), lo=lo, hi=hi), format=1., numbers=1., hits=bits, hits_within=bits)

EDIT = dict(matrices=1, norm=1., distance=.1, size=.1, to_reference=.05, rounding=0., condition=2., values=.1)
ENDS = [{c: played(p, [900, j, k]) for j, c in enumerate(('ID', 'OOD'))} for k, p in enumerate((.2, .5))]

def made_up(which, cfg, back, full=True):
    "`summary` of cells whose success is `back(spec)`, target 0.2, peak 0.5."
    specs = restore.grid(cfg.restore, 4, 192, which=which, full=full)
    got = {n: {c: played(back(s), [i, j]) for j, c in enumerate(('ID', 'OOD'))} | dict(edit=EDIT) for i, (n, s) in enumerate(specs.items())}
    for n in restore.within_all(cfg.restore, which, specs) if full else (): got[n]['within'] = {c: got[n][c] | dict(n=300) for c in ('ID', 'OOD')}
    told = dict(specs=specs, got=got, freedom=dict(measured=.1, chance=.1), depth=4, rank=192)
    return restore.summary(told, *(ENDS if which != 'rl' else ENDS[::-1]), None if which in ('rl', 'end') else ENDS[1], cfg)

def restored(s):
    if s['mode'] in ('values', 'random_rotation') or s.get('place'): return .2
    if s.get('layers') == '1-2': return .3
    return .5 if s.get('ranks') in (None, 1.) else .25 if s['mode'] == 'directions' else .48

def test_figures_and_verdicts_of_made_up_cells():
    import matplotlib
    matplotlib.use('agg')
    cfg = load_params('tiny', dict(restore=dict(draws=200)))
    found = {w: made_up(w, cfg, restored) for w in ('peak', 'base')}
    imposed = {w: made_up(w, cfg, lambda s: .5 if s.get('ranks') == 0. or s['mode'] in ('values', 'random_rotation') else .3) for w in ('rl', 'end')}
    unrelated = {w: made_up(w, cfg, lambda s: .2) for w in ('unrelated-peak', 'unrelated-end')}
    figs = restore.fig_layers(found, cfg.restore, 'five'), restore.fig_ranks(found, 'six', unrelated), restore.fig_ranks(imposed, 'seven')
    assert all(len(f.axes) == 4 for f in figs)
    far = restore.fig_distance(found['peak'], 'by distance')
    assert {len(a.containers) for a in far.axes} == {len(restoration_figures.series_of(found['peak']['cells'], 192)) - 1} # every series but the authors' reading
    labels = [t.get_text() for t in figs[1].legends[0].get_texts()]
    assert len(labels) == len(set(labels)) and {restore.LOOK[k][2] for k in ('coded', 'tail', 'random', 'blend', 'unrelated-end')} < set(labels)
    rows = {r['claim']: r['verdict'] for r in restore.verdicts(found['peak'], cfg.restore)}
    assert list(rows.values()) == ['fails', 'holds', 'holds', 'fails', *['holds']*3, 'nothing to lose'] # layers bring ID back here
    assert [r['verdict'] for r in restore.readings(found, cfg.restore)] == ['fails', 'holds', 'fails', *['holds']*3]
    assert [r['verdict'] for r in restore.imposed_verdicts(imposed)] == ['holds']*3 + ['fails']*2
    assert json.loads(json.dumps(found | imposed, allow_nan=False)) and 'fails' in verdict_table(restore.verdicts(found['peak'], cfg.restore))
    assert [w['ranks'] for w in restore.way_table(found['peak'])] == cfg.restore.ranks and len(restore.way_table(imposed['rl'])) == 4

def test_five_attempts_are_told_on_the_hands_that_were_played_so(tmp_path):
    cfg = load_params('tiny')
    half = dict(hits='10'*150, hits_within='1'*150 + '0'*150)
    stages = {w: SimpleNamespace(path=tmp_path/w) for w in ('peak', 'rl')}
    for n in cfg.restore.within[:-1]:
        which, cell = n.split('/')
        write_json(tmp_path/which/'cells'/f'{which}-{cell}.json', dict(within=dict(ID=half, OOD=half)))
    table = restore.five_table(stages, {k: dict(within={c: dict(hits='1'*300 + '0'*700, hits_within='1'*1000) for c in ('ID', 'OOD')}) for k in ('end', 'peak')}, cfg)
    assert [r['cell'] for r in table] == ['end', 'peak', *cfg.restore.within[:-1]]
    assert {(r['hands'], r['OOD first'], r['ID within all']) for r in table[:2]} == {(300, 1., 1.)} and {(r['hands'], r['OOD first'], r['ID within all']) for r in table[2:]} == {(300, .5, .5)}
    assert restore.five_table({}, {}, cfg) == []
