"Restoration of checkpoints as people have them: what is edited, what is left alone, what is refused, and nothing lost."
import fcntl, json, math, os, shutil, subprocess, sys
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoModel
from rlsft_nb import edits, surgery
from rlsft_nb.files import read_json
from rlsft_nb.problems import DiskError, StageBusy, CheckpointError
from rlsft_nb.surgery import Exists, TooBig, choose_strength, main, plan, restore, restore_all, sweep
from rlsft_nb.tiny import make_tokenizer
from rlsft_nb.weights import Checkpoint, open_checkpoint
from test_checkpoints import MOE, build, config, experts_of, lora

def moved(lm, by=.05, seed=1):
    "A model with every parameter changed a little."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters(): p.add_(by*torch.randn(p.shape, generator=rng))
    return lm

def two(folder, kind='llama', auto=AutoModelForCausalLM, save={}, **more):
    lm = build(kind, auto, **more)
    lm.save_pretrained(folder/'ref', **save)
    moved(lm).save_pretrained(folder/'tgt', **save)
    return folder/'tgt', folder/'ref'

def tensors(folder): return {k: v for f in sorted(Path(folder).glob('*.safetensors')) for k, v in load_file(f).items()}
def state(folder, auto=AutoModelForCausalLM): return auto.from_pretrained(folder).state_dict()
def changed(out, tgt): return {k for k, v in tensors(out).items() if not torch.equal(v, tensors(tgt)[k])}
def rewrite(folder, change, name='model.safetensors'):
    sd = load_file(folder/name)
    sd = change(sd) or sd
    save_file({k: v.contiguous() for k, v in sd.items()}, folder/name, {'format': 'pt'})
def command(*argv): return subprocess.run([sys.executable, '-m', 'rlsft_nb.surgery', *map(str, argv)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
def refused(capsys, *argv, code=2):
    "The one line with which a command ends."
    with pytest.raises(SystemExit) as e: main(list(map(str, argv)))
    err = capsys.readouterr().err.split('\r')[-1].lstrip() # after the bars
    assert e.value.code == code and err.count('\n') == 1, err
    return err
def asked(tgt, ref, out): return ['--target', tgt, '--reference', ref, '--out', out]

# experts

@pytest.mark.parametrize('original', [True, False])
@pytest.mark.parametrize('kind', MOE)
def test_experts_are_edited_one_by_one(tmp_path, kind, original):
    more = dict(layers_block_type=['mamba', 'moe', 'attention']) if kind == 'nemotron_h' else {}
    tgt, ref = two(tmp_path, kind, save=dict(save_original_format=original), **more)
    a, b = (experts_of(AutoModelForCausalLM.from_pretrained(f)) for f in (tgt, ref))
    done = restore(tgt, ref, tmp_path/'out', 'swap', types='experts.*.down', layers=max(i for i, *_ in a))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path/'out')
    got, last = experts_of(lm), max(i for i, *_ in a)
    for (i, e, half), W in got.items(): assert torch.equal(W, (b if i == last and half == 'down' else a)[i, e, half]), (i, e, half)
    assert len(done['edits']) == sum(i == last and h == 'down' for i, _, h in a)
    before, now = state(tgt), lm.state_dict()
    assert all(torch.equal(before[k], now[k]) for k in now if 'expert' not in k and 'feed_forward' not in k and 'moe' not in k and 'mlp' not in k)

@pytest.mark.parametrize('kind', ['mixtral', 'gpt_oss', 'llama4_text', 'granitemoe'])
def test_one_expert_as_in_memory(tmp_path, kind):
    tgt, ref = two(tmp_path, kind, save=dict(save_original_format=False))
    a, b = (experts_of(AutoModelForCausalLM.from_pretrained(f)) for f in (tgt, ref))
    restore_all(tgt, ref, {tmp_path/'one': dict(ranks=.5, types='experts.1.gate', layers=1), tmp_path/'both': dict(mode='rotate', types=['experts.[12].*'], layers='0,1'), tmp_path/'none': dict(ranks=0)})
    one, both, none = (experts_of(AutoModelForCausalLM.from_pretrained(tmp_path/n)) for n in ('one', 'both', 'none'))
    for at, W in a.items():
        i, e, half = at
        k = edits.band(.5, min(W.shape))[1]
        torch.testing.assert_close(one[at], edits.restore_directions(W, b[at], k) if (i, e, half) == (1, 1, 'gate') else W, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both[at], edits.edit(edits.pair(W, b[at]), 'rotate') if i < 2 and e in (1, 2) else W, atol=1e-5, rtol=1e-5)
        assert torch.equal(none[at], W)

@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe', 'gpt_oss', 'deepseek_v3'])
def test_all_of_a_mixture(tmp_path, kind):
    tgt, ref = two(tmp_path, kind)
    restore(tgt, ref, tmp_path/'out', 'swap', types='*,1d')
    lacking = {k for k, v in state(tmp_path/'out').items() if not torch.equal(v, state(ref)[k])}
    assert not {k for k in lacking if 'bias' not in k or 'experts' not in k}

def test_one_side_by_expert_the_other_fused(tmp_path):
    lm = build('mixtral')
    lm.save_pretrained(tmp_path/'ref', save_original_format=True)
    moved(lm).save_pretrained(tmp_path/'tgt', save_original_format=False)
    restore(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out', 'swap', types='experts.*')
    got, want = (experts_of(AutoModelForCausalLM.from_pretrained(tmp_path/n)) for n in ('out', 'ref'))
    assert all(torch.equal(W, want[at]) for at, W in got.items()) and 'experts' in ''.join(changed(tmp_path/'out', tmp_path/'tgt'))

def test_only_edited_experts_are_decomposed(tmp_path, monkeypatch):
    tgt, ref = two(tmp_path, 'qwen3_moe', save=dict(save_original_format=False))
    true, seen = surgery.pair, []
    monkeypatch.setattr(surgery, 'pair', lambda *a: seen.append(a[2]) or true(*a))
    restore(tgt, ref, tmp_path/'out', types='experts.3.up')
    assert sorted(seen) == [f'layers.{i}.experts.3.up' for i in range(3)]

def test_types_that_are_none_are_told_in_short(tmp_path, capsys):
    tgt, ref = two(tmp_path, 'qwen3_moe')
    err = refused(capsys, *asked(tgt, ref, tmp_path/'out'), '--types', 'expert')
    assert 'experts.*.gate' in err and len(err) < 300

# ends

def test_a_headless_save_keeps_its_embedding(tmp_path):
    lm = build('llama', tie_word_embeddings=False)
    lm.save_pretrained(tmp_path/'ref')
    moved(lm).model.save_pretrained(tmp_path/'bare'); lm.save_pretrained(tmp_path/'tgt')
    done = restore(tmp_path/'bare', tmp_path/'ref', tmp_path/'a', 'swap')
    assert any(t.startswith('head: ') for t in done['left_alone']) and 'head' not in done['edits'] and 'lm_head.weight' not in tensors(tmp_path/'a')
    assert torch.equal(AutoModel.from_pretrained(tmp_path/'a').embed_tokens.weight, tensors(tmp_path/'ref')['model.embed_tokens.weight'])
    done = restore(tmp_path/'tgt', tmp_path/'bare', tmp_path/'b', 'swap') # the reference has none
    assert torch.equal(tensors(tmp_path/'b')['lm_head.weight'], tensors(tmp_path/'tgt')['lm_head.weight']) and any(t.startswith('head: not in') for t in done['left_alone'])
    with pytest.raises(CheckpointError, match='lacks head'): restore(tmp_path/'tgt', tmp_path/'bare', tmp_path/'c', types='head')
    assert 'head: not in' in (tmp_path/'b'/'README.md').read_text() + str(read_json(tmp_path/'b'/'restore.json'))

@pytest.mark.parametrize('form', ['head only', 'two copies'])
def test_tied_under_another_name(tmp_path, form):
    tgt, ref = two(tmp_path, tie_word_embeddings=True)
    E = 'model.embed_tokens.weight'
    rewrite(tgt, lambda sd: {('lm_head.weight' if k == E else k): v for k, v in sd.items()} if form == 'head only' else sd | {'lm_head.weight': sd[E].clone()})
    restore(tgt, ref, tmp_path/'out', 'directions', types='embed')
    lm, want = AutoModelForCausalLM.from_pretrained(tmp_path/'out'), edits.restore_directions(tensors(tgt)['lm_head.weight'], tensors(ref)[E], 32)
    torch.testing.assert_close(lm.model.embed_tokens.weight, want, atol=1e-5, rtol=1e-5)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight and changed(tmp_path/'out', tgt) == {'lm_head.weight', *([E] if form == 'two copies' else [])}

def test_a_tied_reference_serves_both_ends(tmp_path):
    lm = build('llama', tie_word_embeddings=True); lm.save_pretrained(tmp_path/'ref')
    build('llama', tie_word_embeddings=False).save_pretrained(tmp_path/'tgt')
    restore(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out', 'swap', types='head')
    assert torch.equal(state(tmp_path/'out')['lm_head.weight'], lm.lm_head.weight) and changed(tmp_path/'out', tmp_path/'tgt') == {'lm_head.weight'}

def test_added_tokens(tmp_path, capsys):
    build('llama', tie_word_embeddings=False).save_pretrained(tmp_path/'ref')
    moved(build('llama', tie_word_embeddings=False, vocab_size=67)).save_pretrained(tmp_path/'tgt')
    tgt, ref = tmp_path/'tgt', tmp_path/'ref'
    done = restore(tgt, ref, tmp_path/'layers', layers='0-1')
    assert {n.split('.')[1] for n in done['edits']} == {'0', '1'} and len(done['edits']) == 14
    assert 'embed is (64, 32)' in refused(capsys, *asked(tgt, ref, tmp_path/'no')) and not (tmp_path/'no').exists()
    assert main(list(map(str, [*asked(tgt, ref, tmp_path/'rows'), '--common-rows', '--types', 'embed,head']))) == 0
    now, before, theirs = map(tensors, (tmp_path/'rows', tgt, ref))
    for k in ('model.embed_tokens.weight', 'lm_head.weight'):
        assert now[k].shape == (67, 32) and torch.equal(now[k][64:], before[k][64:])
        torch.testing.assert_close(now[k][:64], edits.restore_directions(before[k][:64], theirs[k], 32), atol=1e-5, rtol=1e-5)
    assert 'rows from 64 on' in str(read_json(tmp_path/'rows'/'restore.json')['left_alone']) and read_json(tmp_path/'rows'/'restore.json')['edits']['embed']['rows'] == 64
    AutoModelForCausalLM.from_pretrained(tmp_path/'rows')

# what only one side has

def test_a_reward_model_towards_its_base(tmp_path):
    build('qwen2').save_pretrained(tmp_path/'base')
    rm = moved(AutoModelForSequenceClassification.from_config(config('qwen2', num_labels=1)))
    rm.save_pretrained(tmp_path/'rm')
    done = restore(tmp_path/'rm', tmp_path/'base', tmp_path/'out', 'swap')
    now, base = state(tmp_path/'out', AutoModelForSequenceClassification), tensors(tmp_path/'base')
    assert torch.equal(now['score.weight'], rm.score.weight) and torch.equal(now['model.layers.1.mlp.up_proj.weight'], base['model.layers.1.mlp.up_proj.weight'])
    assert any(t.startswith('score: not in') for t in done['left_alone']) and any(t.startswith('head: not in') for t in done['left_alone'])

def test_a_value_head_stays(tmp_path):
    tgt, ref = two(tmp_path)
    rewrite(tgt, lambda sd: sd | {'v_head.summary.weight': torch.ones(1, 32), 'v_head.summary.bias': torch.ones(1)})
    done = restore(tgt, ref, tmp_path/'out', 'swap', types='*,1d')
    assert changed(tmp_path/'out', tgt) == set(tensors(ref)) and 'v_head.summary.bias' in str(done['left_alone'])

def test_more_layers_than_the_reference(tmp_path, capsys):
    build('llama').save_pretrained(tmp_path/'ref'); build('llama', num_hidden_layers=4).save_pretrained(tmp_path/'tgt')
    err = refused(capsys, *asked(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out'))
    assert 'lacks layers.*' in err and '--layers' in err
    assert set(restore(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out', layers='0-2', types='q', mode='swap')['edits']) == {f'layers.{i}.q' for i in range(3)}
    assert restore(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out2', exclude='layers.3.*')['matrices'] > 14

@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'base_model.model.', 'pretrained_model.', '_fsdp_wrapped_module.'])
@pytest.mark.parametrize('side', ['tgt', 'ref', 'both'])
def test_wrapped_names(tmp_path, prefix, side):
    tgt, ref = two(tmp_path)
    for f in (tgt, ref):
        if side in (f.name, 'both'): rewrite(f, lambda sd: {prefix + k: v for k, v in sd.items()})
    done = restore(tgt, ref, tmp_path/'out', 'swap', layers=0, types='q,1d')
    assert set(done['edits']) == {'layers.0.q', 'layers.0.input_layernorm', 'layers.0.post_attention_layernorm'} and changed(tmp_path/'out', tgt) == {k for k in tensors(tgt) if k.endswith(('layers.0.self_attn.q_proj.weight', 'layers.0.input_layernorm.weight', 'layers.0.post_attention_layernorm.weight'))}

@pytest.mark.parametrize('kind, auto', [('t5', AutoModelForSeq2SeqLM), ('bart', AutoModelForSeq2SeqLM), ('bert', AutoModel), ('opt', AutoModelForCausalLM), ('mamba', AutoModelForCausalLM), ('gpt_neox', AutoModelForCausalLM)])
def test_layers_of_other_architectures(tmp_path, kind, auto):
    tgt, ref = two(tmp_path, kind, auto)
    done = restore(tgt, ref, tmp_path/'out', 'swap', layers=0)
    assert done['edits'] and all('layers.0.' in n for n in done['edits'])
    now, before, theirs = (state(f, auto) for f in (tmp_path/'out', tgt, ref))
    moved_ = {k for k in now if not torch.equal(now[k], before[k])}
    assert len(moved_) == len(done['edits']) and all(torch.equal(now[k], theirs[k]) for k in moved_)

def test_names_without_layers(tmp_path, capsys):
    for f in ('tgt', 'ref'): (tmp_path/f).mkdir(); save_file({'a.weight': torch.randn(4, 4), 'b.weight': torch.randn(4, 5)}, tmp_path/f/'model.safetensors')
    assert 'none are known for these names: a, b' in refused(capsys, *asked(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out'), '--layers', '0')
    assert len(restore(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out', 'swap')['edits']) == 2

# quantised weights, other formats

def test_quantised_weights_are_never_edited(tmp_path, capsys):
    tgt, ref = two(tmp_path)
    fp8 = lambda sd: {k: v for n, W in sd.items() for k, v in ({n: W.to(torch.float8_e4m3fn), n + '_scale_inv': torch.ones(-(-W.shape[0]//16), -(-W.shape[1]//16))} if 'proj' in n else {n: W}).items()}
    gptq = lambda sd: {k: v for n, W in sd.items() for k, v in ({n.replace('weight', 'qweight'): torch.ones(4, 8, dtype=torch.int32), n.replace('weight', 'scales'): torch.ones(1, 8).half()} if 'proj' in n else {n: W}).items()}
    for name, change, told in (('fp8', fp8, 'quantised'), ('gptq', gptq, 'GPTQ')):
        shutil.copytree(tgt, tmp_path/name)
        rewrite(tmp_path/name, change)
        assert told in refused(capsys, *asked(tmp_path/name, ref, tmp_path/'out'), '--mode', 'swap') and not (tmp_path/'out').exists()
    done = restore(ref, tmp_path/'fp8', tmp_path/'from', 'swap', types='q', layers=0) # as a reference FP8 is read
    assert torch.equal(tensors(tmp_path/'from')['model.layers.0.self_attn.q_proj.weight'], tensors(tgt)['model.layers.0.self_attn.q_proj.weight'].to(torch.float8_e4m3fn).float()) and done['edits']

def test_fp8_without_scales_is_told(tmp_path):
    tgt, ref = two(tmp_path)
    for f in (tgt, ref): rewrite(f, lambda sd: {k: v.to(torch.float8_e4m3fn) if 'proj' in k else v for k, v in sd.items()})
    done = restore(tgt, ref, tmp_path/'out', 'swap')
    assert set(done['edits']) == {'embed', 'head'} and any('21 tensors: FP8' in t for t in done['left_alone'])

# adapters

def base_and_lora(folder, **more):
    build('llama', tie_word_embeddings=False).save_pretrained(folder/'base')
    torch.manual_seed(3)
    return lora(folder/'lora', folder/'base', {f'model.layers.{i}.self_attn.{t}_proj': (torch.randn(2, 32), torch.randn(o, 2)) for i in (0, 2) for t, o in (('q', 32), ('v', 16))}, **more)

def test_an_adapter_is_edited_as_the_merged_model(tmp_path):
    f, base = base_and_lora(tmp_path), tmp_path/'base'
    make_tokenizer().save_pretrained(f)
    before, want = tensors(base), tensors(base)
    for k in ('q', 'v'):
        A, B = (tensors(f)[f'base_model.model.model.layers.{{}}.self_attn.{k}_proj.lora_{x}.weight'.format(2)] for x in 'AB')
        want[f'model.layers.2.self_attn.{k}_proj.weight'] = before[f'model.layers.2.self_attn.{k}_proj.weight'] + 3*B @ A
    done = restore(f, base, tmp_path/'out', 'swap', layers='0')
    now = {k: v for k, v in state(tmp_path/'out').items()}
    for k, v in want.items(): torch.testing.assert_close(now[k], v, atol=1e-5, rtol=1e-5) # layer 0 is the base's again, layer 2 keeps its update
    assert set(done['edits']) == {'layers.0.q', 'layers.0.v'} and (tmp_path/'out'/'tokenizer.json').is_file() and not list((tmp_path/'out').glob('adapter*'))
    assert not torch.equal(now['model.layers.2.self_attn.q_proj.weight'], before['model.layers.2.self_attn.q_proj.weight'])

def test_an_adapter_unedited_is_the_merged_model(tmp_path):
    f, base = base_and_lora(tmp_path), tmp_path/'base'
    restore_all(f, base, {tmp_path/'none': dict(ranks=0, types='down'), tmp_path/'half': dict(mode='blend', strength=.5), tmp_path/'noise': dict(mode='random_change', like='swap', types='k')})
    ck, old = Checkpoint(f), Checkpoint(base)
    for n in ck.names():
        assert torch.equal(Checkpoint(tmp_path/'none').read(n), ck.read(n))
        torch.testing.assert_close(Checkpoint(tmp_path/'half').read(n), (ck.read(n) + old.read(n))/2, atol=1e-5, rtol=1e-5)

def test_an_adapter_as_reference_and_with_its_own_norms(tmp_path):
    f, base = base_and_lora(tmp_path), tmp_path/'base'
    restore(base, f, tmp_path/'a', 'swap')
    assert all(torch.equal(Checkpoint(tmp_path/'a').read(n), Checkpoint(f).read(n)) for n in Checkpoint(f).names())
    N, H = torch.randn(32), torch.randn(64, 32)
    g = lora(tmp_path/'g', base, {'model.layers.0.self_attn.q_proj': (torch.randn(2, 32), torch.randn(32, 2))}, {'model.norm.weight': N, 'lm_head.weight': H})
    restore(g, base, tmp_path/'b', 'swap', types='q')
    now = state(tmp_path/'b')
    assert torch.equal(now['model.norm.weight'], N) and torch.equal(now['lm_head.weight'], H) and torch.equal(now['model.layers.0.self_attn.q_proj.weight'], tensors(base)['model.layers.0.self_attn.q_proj.weight'])
    restore(g, base, tmp_path/'c', 'swap', types='head,1d')
    assert torch.equal(state(tmp_path/'c')['model.norm.weight'], tensors(base)['model.norm.weight']) and torch.equal(state(tmp_path/'c')['lm_head.weight'], tensors(base)['lm_head.weight'])

def test_an_adapter_of_experts(tmp_path):
    build('mixtral').save_pretrained(tmp_path/'base', save_original_format=False)
    f = lora(tmp_path/'l', tmp_path/'base', {'model.layers.1.block_sparse_moe.experts.2.w1': (torch.randn(2, 32), torch.randn(48, 2))})
    restore(f, tmp_path/'base', tmp_path/'out', 'swap', types='experts.1.*')
    got, base, ck = experts_of(AutoModelForCausalLM.from_pretrained(tmp_path/'out')), experts_of(AutoModelForCausalLM.from_pretrained(tmp_path/'base')), Checkpoint(f)
    for at, W in got.items(): assert torch.equal(W, ck.read('layers.1.experts.2.gate') if at == (1, 2, 'gate') else base[at]), at

def test_an_adapter_that_cannot_be_written(tmp_path, capsys):
    build('llama', tie_word_embeddings=True).save_pretrained(tmp_path/'base')
    f = lora(tmp_path/'l', tmp_path/'base', {'lm_head': (torch.randn(2, 32), torch.randn(64, 2))})
    assert 'unties' in refused(capsys, *asked(f, tmp_path/'base', tmp_path/'out'))
    g = lora(tmp_path/'g', 'nobody/nothing', {'model.layers.0.self_attn.q_proj': (torch.randn(2, 32), torch.randn(32, 2))})
    os.environ['HF_HUB_OFFLINE'] = '1'
    assert main(list(map(str, [*asked(g, tmp_path/'base', tmp_path/'out'), '--base', tmp_path/'base', '--quiet']))) == 0 and Checkpoint(tmp_path/'out').matrices

# values that do not fit, matrices of zeros

@pytest.mark.parametrize('types, key, mode', [('1d', 'model.norm.weight', 'directions'), ('up', 'model.layers.1.mlp.up_proj.weight', 'swap'), ('up', 'model.layers.1.mlp.up_proj.weight', 'blend'),
                                              ('up', 'model.layers.1.mlp.up_proj.weight', 'values'), ('up,1d', 'model.layers.1.mlp.up_proj.weight', 'trim')])
def test_a_value_that_does_not_fit(tmp_path, capsys, types, key, mode):
    lm = build('llama')
    lm.half().save_pretrained(tmp_path/'tgt')
    moved(lm.float()).save_pretrained(tmp_path/'ref')
    rewrite(tmp_path/'ref', lambda sd: sd[key].view(-1)[3:5].fill_(1e6).sum() and None)
    err = refused(capsys, *asked(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out'), '--types', types, '--mode', mode)
    assert "does not fit into the target's float16" in err and ('norm' if 'norm' in key else 'layers.1.up') in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ref', 'tgt']

def test_what_surely_does_not_fit_is_refused_before_work(tmp_path, monkeypatch):
    lm = build('llama')
    lm.half().save_pretrained(tmp_path/'tgt')
    moved(lm.float()).save_pretrained(tmp_path/'ref')
    rewrite(tmp_path/'ref', lambda sd: sd['model.layers.2.mlp.up_proj.weight'].view(-1)[3:5].fill_(-1e6).sum() and None)
    monkeypatch.setattr(surgery, '_write_shard', None)
    with pytest.raises(CheckpointError, match=r"layers\.2\.up: -1e\+06 does not fit"): restore(tmp_path/'tgt', tmp_path/'ref', tmp_path/'out', 'swap')

@pytest.mark.parametrize('mode', [m for m in edits.MODES if m != 'random_rotation'])
@pytest.mark.parametrize('side', ['tgt', 'ref'])
def test_a_matrix_of_zeros(tmp_path, mode, side):
    tgt, ref = two(tmp_path)
    K = 'model.layers.1.mlp.up_proj.weight'
    rewrite(dict(tgt=tgt, ref=ref)[side], lambda sd: sd[K].zero_().sum() and None)
    done = restore(tgt, ref, tmp_path/'out', mode, types='up')
    now = tensors(tmp_path/'out')[K]
    assert now.isfinite().all() and json.dumps(done, allow_nan=False)
    if mode == 'swap': assert torch.equal(now, tensors(ref)[K])
    if mode in ('directions', 'values') and side == 'tgt': assert torch.equal(now, torch.zeros_like(now)) == (mode == 'directions')

# repairs

def test_the_level_of_noise():
    "Against the published fit of the optimal threshold, and the known value for square matrices."
    assert edits.noise_level(1.) == pytest.approx(4/3**.5/math.sqrt(0.6528), rel=1e-3) == pytest.approx(2.858, abs=1e-3)
    for b in (.05, .1, .25, .5, .75, 1.): assert edits.noise_level(b) == pytest.approx(.56*b**3 - .95*b**2 + 1.82*b + 1.43, abs=.025)

@pytest.mark.parametrize('shape', [(60, 60), (40, 90), (90, 40)])
def test_denoising_keeps_what_was_learned(shape):
    rng = np.random.default_rng(0)
    W0, learned = rng.normal(size=shape), sum(5*np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1]))/math.sqrt(shape[0]*shape[1])*10 for _ in range(3))
    D = learned + .1*rng.normal(size=shape)
    p = edits.pair(torch.from_numpy(W0 + D), torch.from_numpy(W0))
    U, s, Vt = np.linalg.svd(D, full_matrices=False)
    for strength in (.3, 1.):
        keep = s > strength*edits.noise_level(min(shape)/max(shape))*np.median(s)
        np.testing.assert_allclose(edits.edit(p, 'denoise', strength=strength).numpy(), W0 + (U[:, keep]*s[keep]) @ Vt[keep], atol=1e-10)
    assert keep.sum() == 3
    told = edits.describe(p, edits.edit64(p, 'denoise'), 'denoise', 0, min(shape))
    assert told['removed'] == min(shape) - 3 and told['strength'] == 1

@pytest.mark.parametrize('strength', [0., .3, 1.])
def test_intruders_are_scaled_down(strength):
    rng = np.random.default_rng(0)
    W0 = rng.normal(size=(40, 25)) @ np.diag(np.linspace(3, 1, 25))
    x, y = (v/np.linalg.norm(v) for v in (rng.normal(size=40), rng.normal(size=25)))
    W = W0 + 60*np.outer(x, y)
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    U0 = np.linalg.svd(W0, full_matrices=False)[0]
    new = [i for i in range(10) if np.abs(U0.T @ U[:, i]).max() < .5]
    p = edits.pair(torch.from_numpy(W), torch.from_numpy(W0))
    assert 0 in new and edits.new_directions(p.a, p.a0) == new
    want = W - strength*(U[:, new]*s[new]) @ Vt[new]
    np.testing.assert_allclose(edits.edit(p, 'intruders', 0, 10, strength=strength).numpy(), want, atol=1e-10)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('strength', [0., .2, .5, .99, 1.])
def test_trimming_keeps_the_largest_entries(dtype, strength):
    rng = torch.Generator().manual_seed(0)
    W0 = torch.randn(30, 20, generator=rng).to(dtype)
    W = (W0.double() + .1*torch.randn(30, 20, generator=rng)).to(dtype) # in bf16 many steps are as large as each other
    out = edits.edit(edits.pair(W, W0), 'trim', strength=strength)
    back = int(strength*600 + .5)
    D = (W.double() - W0.double()).abs().flatten()
    order = sorted(range(600), key=lambda i: (float(D[i]), i))
    want = W.flatten().clone()
    want[order[:back]] = W0.flatten()[order[:back]]
    assert out.dtype == dtype and torch.equal(out.flatten(), want)

@pytest.mark.parametrize('mode', [m for m in edits.MODES if m not in edits.CONTROLS])
def test_strength_runs_from_nothing_to_all(mode):
    rng = torch.Generator().manual_seed(0)
    W0 = torch.randn(20, 14, generator=rng).double()
    p = edits.pair(W0 + .1*torch.randn(20, 14, generator=rng).double(), W0)
    assert torch.equal(edits.edit(p, mode, strength=0.), p.W) and torch.equal(edits.edit(p, mode, strength=1.), edits.edit(p, mode))
    for s in (.25, .5):
        size = float((edits.edit(p, mode, strength=s) - p.W).norm())
        for c in edits.controls_of(mode):
            got = float((edits.edit(p, c, strength=s, like=mode, seed=1) - p.W).norm())
            assert got == pytest.approx(min(size, p.distance) if c == 'interpolate' else size, rel=1e-5)
    if mode in ('directions', 'rotate', 'coded', 'values', 'swap'): assert torch.equal(edits.edit(p, mode, strength=.5), edits.edit(p, mode, 0, 7))
    if mode == 'blend': torch.testing.assert_close(edits.edit(p, mode, strength=.25), .75*p.W + .25*W0)

@pytest.mark.parametrize('mode', ['denoise', 'intruders', 'trim', 'blend', 'directions'])
def test_strengths_on_disk_as_in_memory(tmp_path, mode):
    tgt, ref = two(tmp_path)
    restore_all(tgt, ref, {tmp_path/f's{s}': dict(mode=mode, strength=s, types='up') for s in (0, .4, np.float32(.5), 1)} | {tmp_path/'like': dict(mode='random_change', like=mode, strength=.4, types='up', seed=2)})
    K = 'model.layers.1.mlp.up_proj.weight'
    p = edits.pair(tensors(tgt)[K], tensors(ref)[K])
    band = (0, 10) if mode == 'intruders' else (0, -1)
    for s in (0, .4, .5, 1): torch.testing.assert_close(tensors(tmp_path/f's{s}')[K], edits.edit(p, mode, *band, strength=s), atol=1e-6, rtol=1e-6)
    assert torch.equal(tensors(tmp_path/'s0')[K], tensors(tgt)[K]) and read_json(tmp_path/'s0.4'/'restore.json')['strength'] == .4
    torch.testing.assert_close(tensors(tmp_path/'like')[K], edits.edit(p, 'random_change', *band, seed=surgery.seed_of('layers.1.up', 2), strength=.4, like=mode), atol=1e-6, rtol=1e-6)

# beside the weights

def test_everything_beside_the_weights_is_copied_as_data(tmp_path):
    tgt, ref = two(tmp_path)
    make_tokenizer().save_pretrained(tgt)
    go = {'modeling_x.py': 'raise SystemExit("run")', 'LICENSE': 'mine', 'NOTICE': 'n', 'generation_config.json': '{}', 'additional_chat_templates/tool.jinja': '{{ x }}', 'chat_template.jinja': 'x', 'x.tiktoken': 'a', '1_Pooling/config.json': '{}',
          'sentencepiece.bpe.model': 'm', 'vocab.txt': 'v', 'preprocessor_config.json': '{}', 'deep/er/code.py': 'y'}
    stay = {'optimizer.pt': 'o', 'rng_state_0.pth': 'r', 'training_args.bin': 'b', 'pytorch_model.bin': 'old', 'consolidated.safetensors': 'c', 'model-00001-of-00002.safetensors': 's', 'model.safetensors.index.json': '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
            'trainer_state.json': '{}', 'checkpoint-10/config.json': '{}', '.git/config': 'g', 'earlier/restore.json': '{}', 'earlier/model.safetensors': 'e', 'README.md': 'card', 'model.gguf': 'g', 'runs/events.out.tfevents.1': 'e', '__pycache__/a.pyc': 'p'}
    for name, text in (go | stay).items(): (tgt/name).parent.mkdir(parents=True, exist_ok=True); (tgt/name).write_text(text)
    save_file({'v.weight': torch.ones(1, 32)}, tgt/'value_head.safetensors')
    c = read_json(tgt/'config.json') | dict(auto_map={'AutoModel': 'modeling_x.X'})
    (tgt/'config.json').write_text(json.dumps(c))
    done = restore(tgt, ref, tmp_path/'out', types='q')
    names = {str(f.relative_to(tmp_path/'out')) for f in (tmp_path/'out').rglob('*') if f.is_file()}
    assert names == {*go, 'value_head.safetensors', 'config.json', 'model.safetensors', 'restore.json', 'README.md', *(f.name for f in tgt.glob('tokenizer*')), *(f.name for f in tgt.glob('special_tokens*'))}
    assert all((tmp_path/'out'/n).read_text() == t for n, t in go.items() if n != 'generation_config.json') and 'pytorch_model.bin' in done['not_copied']
    AutoModelForCausalLM.from_pretrained(tmp_path/'out')

def test_a_single_file_before_a_stale_index(tmp_path):
    tgt, ref = two(tmp_path)
    build('llama', num_hidden_layers=2).save_pretrained(tmp_path/'old', max_shard_size='20KB')
    for f in (tmp_path/'old').glob('*.safetensors*'): shutil.copy(f, tgt)
    want = state(tgt)
    restore(tgt, ref, tmp_path/'out', ranks=0)
    assert all(torch.equal(v, want[k]) for k, v in state(tmp_path/'out').items()) and not list((tmp_path/'out').glob('*index*')) and len(list((tmp_path/'out').glob('*.safetensors'))) == 1
    for f in tgt.glob('model-0*'): f.unlink() # only the index is left
    restore(tgt, ref, tmp_path/'out2', 'swap', types='q')
    assert torch.equal(state(tmp_path/'out2')['model.layers.0.self_attn.q_proj.weight'], tensors(ref)['model.layers.0.self_attn.q_proj.weight'])

def test_shards_keep_their_index(tmp_path):
    tgt, ref = two(tmp_path, save=dict(max_shard_size='20KB'))
    restore(tgt, ref, tmp_path/'out', 'swap', types='*,1d')
    assert {f.name for f in tgt.glob('*.safetensors*')} == {f.name for f in (tmp_path/'out').glob('*.safetensors*')}
    assert all(torch.equal(v, state(ref)[k]) for k, v in state(tmp_path/'out').items())

def test_a_single_file_brings_little_along(tmp_path):
    tgt, ref = two(tmp_path)
    (tgt/'other').mkdir(); (tgt/'other'/'a.txt').write_text('x'); (tgt/'photo.png').write_text('p')
    restore(tgt/'model.safetensors', ref/'model.safetensors', tmp_path/'out', types='q')
    assert {f.name for f in (tmp_path/'out').iterdir()} == {'model.safetensors', 'config.json', 'generation_config.json', 'restore.json', 'README.md'}

# outputs

def test_an_output_that_is_a_link(tmp_path):
    tgt, ref = two(tmp_path)
    (tmp_path/'disk').mkdir(); (tmp_path/'link').symlink_to(tmp_path/'disk'); (tmp_path/'dangling').symlink_to(tmp_path/'elsewhere')
    for name, real in (('link', 'disk'), ('dangling', 'elsewhere')):
        restore(tgt, ref, tmp_path/name, types='q')
        assert (tmp_path/name).is_symlink() and (tmp_path/real/'model.safetensors').is_file()
    with pytest.raises(Exists): restore(tgt, ref, tmp_path/'link', types='q')

def test_outputs_in_the_wrong_place(tmp_path, capsys, monkeypatch):
    tgt, ref = two(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    for out in (tgt, ref, tgt/'out', ref/'a'/'b'): assert refused(capsys, *asked(tgt, ref, out))
    with pytest.raises(ValueError, match='one lies in the other'): restore_all(tgt, ref, {tmp_path/'a': {}, tmp_path/'a'/'b': {}})
    with pytest.raises(ValueError, match='one folder'): restore_all(tgt, ref, {tmp_path/'a': {}, str(tmp_path/'x'/'..'/'a'): {}})
    monkeypatch.setattr(os.path, 'ismount', lambda p: Path(p).name == 'disk')
    (tmp_path/'disk').mkdir()
    with pytest.raises(Exists, match='mount point'): restore(tgt, ref, tmp_path/'disk')
    assert before == {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} and not list(tmp_path.glob('.*'))

def test_too_little_disk_and_memory(tmp_path, capsys, monkeypatch):
    tgt, ref = two(tmp_path)
    monkeypatch.setattr(surgery, '_write_shard', None)
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 1000))
        assert 'free' in refused(capsys, *asked(tgt, ref, tmp_path/'out'), code=1)
        with pytest.raises(DiskError, match='2 checkpoints take'): restore_all(tgt, ref, {tmp_path/'a': {}, tmp_path/'b': {}})
    with monkeypatch.context() as m:
        m.setattr(surgery, '_memory', lambda: 1000)
        err = refused(capsys, *asked(tgt, ref, tmp_path/'out'), code=1)
        assert '--exclude' in err and 'GiB of memory' in err
        assert restore(tgt, ref, tmp_path/'out', dry_run=True)['memory_free_gib'] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ref', 'tgt']

@pytest.mark.parametrize('name', ['../../evil', '/evil', 'a/b/../../../../evil', '..', '.hidden'])
def test_names_that_are_paths_write_nowhere_else(tmp_path, name):
    home = tmp_path/'home'
    home.mkdir()
    tgt, ref = two(home)
    for f in (tgt, ref): rewrite(f, lambda sd: sd | {f'{name}.weight': torch.randn(6, 8)})
    done = restore(tgt, ref, home/'out', 'swap')
    assert changed(home/'out', tgt) >= {f'{name}.weight'} and sorted(p.name for p in tmp_path.iterdir()) == ['home'] and sorted(p.name for p in home.iterdir()) == ['out', 'ref', 'tgt'] and len(done['edits']) > 20
    with pytest.raises(ValueError, match='no name for a file'): sweep(tgt, ref, home/'s', {name if '/' in name or name[0] == '.' else '/' + name: {}}, len)

def test_arguments_of_every_kind(tmp_path):
    tgt, ref = two(tmp_path)
    want = restore(str(tgt), str(ref), str(tmp_path/'0'), ranks=4, layers=[0, 1], types='q,k')['edits']
    for i, more in enumerate([dict(ranks=np.int64(4), layers=np.array([0, 1]), types=('q', 'k')), dict(ranks=np.int32(4), layers=range(2), types=np.array(['q', 'k'])), dict(ranks=(0, np.int64(4)), layers={0, 1}, types=['q', ' k']),
                              dict(ranks=np.array([0, 4]), layers='0-1', types='q, k'), dict(ranks=torch.tensor(4).item(), layers=(np.int64(0), '1'), types=iter('qk'))], 1):
        out = tmp_path/str(i)
        assert restore(tgt, ref, out, **more)['edits'] == want and read_json(out/'restore.json')['edits'] and changed(out, tmp_path/'0') == set()
    a = restore(tgt, ref, tmp_path/'f', ranks=np.float32(.5), types='q', layers=np.int64(1), strength=np.float32(1))['edits']
    assert a == restore(tgt, ref, tmp_path/'g', ranks=.5, types='q', layers=1)['edits']
    for seed in (2**70, -2**70, np.int64(5), 2**63 - 1, -3): assert restore(tgt, ref, tmp_path/f's{seed}', 'random_change', seed=seed, types='q', layers=0)['edits']
    for bad, told in ((dict(seed=1.5), 'seed=1.5'), (dict(strength=1.5), 'strength=1.5'), (dict(strength=float('nan')), 'strength'), (dict(like='random_change'), 'like='), (dict(ranks=np.bool_(True)), 'ranks'), (dict(layers='-1'), 'layers'), (dict(exclude='nothing'), 'exclude')):
        with pytest.raises(ValueError, match=told): restore(tgt, ref, tmp_path/'bad', **bad)
    with pytest.raises(ValueError, match="'rank' is no argument"): restore_all(tgt, ref, {tmp_path/'bad': dict(rank=2)})

# sweeps

def test_a_sweep_removes_only_what_it_made(tmp_path):
    two(tmp_path)
    runs = tmp_path
    (runs/'sft').mkdir(); (runs/'sft'/'notes.txt').write_text('mine')
    before = {f: f.read_bytes() for f in runs.rglob('*') if f.is_file()}
    got = sweep(runs/'tgt', runs/'ref', runs, {'ref': dict(ranks=1, types='q'), 'tgt': dict(types='k'), 'sft': dict(types='v')}, lambda f: len(tensors(f)))
    assert set(got) == {'ref', 'tgt', 'sft'} and {f: f.read_bytes() for f in before} == before
    assert {p.name for p in runs.iterdir()} == {'tgt', 'ref', 'sft', 'ref.json', 'tgt.json', 'sft.json'}
    (runs/'mine.json').write_text('{"a": 1}')
    with pytest.raises(Exists, match='no score of a sweep'): sweep(runs/'tgt', runs/'ref', runs, {'mine': dict(types='q')}, len)
    for inside in (runs/'tgt', runs/'ref'/'s'):
        with pytest.raises(Exists, match='which is read'): sweep(runs/'tgt', runs/'ref', inside, {'config': dict(types='q')}, len)
    assert (runs/'mine.json').read_text() == '{"a": 1}' and {f: f.read_bytes() for f in before} == before

def test_scores_are_kept_by_what_made_them(tmp_path):
    tgt, ref = two(tmp_path)
    seen, scale = [], 1
    def score(folder): seen.append(folder.name); return scale*float(tensors(folder)['model.layers.0.self_attn.q_proj.weight'].norm())
    run = lambda spec=dict(ranks=2, types='q'), score=score, **more: sweep(tgt, ref, tmp_path/'s', {'a': spec}, score, **more)['a']
    first = run()
    assert run() == first and len(seen) == 1
    other = run(dict(ranks=3, types='q'))
    assert other != first and len(seen) == 2 and run() == first and len(seen) == 3
    scale = 2 # what the function sees
    assert run() == 2*first and len(seen) == 4
    assert run(score=lambda f: 7) == 7 and run(score=lambda f: 8) == 8
    assert run(score=lambda f: 5, key='mine') == run(score=lambda f: 9, key='mine') == 5 # named by hand
    assert [run(score=partial(lambda k, f: k, k)) for k in (1, 2)] == [1, 2]
    run(); n = len(seen)
    rewrite(ref, lambda sd: sd['model.layers.0.self_attn.q_proj.weight'].mul_(3).sum() and None)
    run(); assert len(seen) == n + 1
    rewrite(tgt, lambda sd: sd['model.layers.0.self_attn.q_proj.weight'].mul_(3).sum() and None)
    run(); assert len(seen) == n + 2
    (tgt/'config.json').write_text((tgt/'config.json').read_text() + ' ') # what the output is loaded with
    run(); assert len(seen) == n + 3
    (tmp_path/'s'/'a.json').write_text(json.dumps(dict(spec=dict(ranks=2, types='q'), score=-1))) # of an older version
    assert run() > 0

def test_a_sweep_that_was_killed_at_its_very_end_leaves_nothing(tmp_path):
    tgt, ref = two(tmp_path)
    first = surgery.sweep(tgt, ref, tmp_path/'s', dict(a=dict(types='q')), lambda f: 1.)
    (tmp_path/'s'/'.sweep'/'a').mkdir(parents=True); (tmp_path/'s'/'.sweep'/'.lock').touch()
    with open(tmp_path/'s'/'.sweep'/'.lock') as held:
        fcntl.flock(held, fcntl.LOCK_EX) # another process sweeps
        assert surgery.sweep(tgt, ref, tmp_path/'s', dict(a=dict(types='q')), lambda f: 1.) == first and (tmp_path/'s'/'.sweep'/'a').is_dir()
    assert surgery.sweep(tgt, ref, tmp_path/'s', dict(a=dict(types='q')), lambda f: 1.) == first and [p.name for p in (tmp_path/'s').iterdir()] == ['a.json']

def test_two_sweeps_at_once_and_a_killed_one(tmp_path):
    tgt, ref = two(tmp_path)
    with surgery._bench(surgery.make_dir(tmp_path/'s')):
        with pytest.raises(StageBusy, match='another process'): sweep(tgt, ref, tmp_path/'s', {'a': dict(types='q')}, len)
    kill = f"import os; from rlsft_nb import surgery; surgery.sweep({str(tgt)!r}, {str(ref)!r}, {str(tmp_path/'s')!r}, dict(a=dict(types='q'), b=dict(types='k')), lambda f: os._exit(9))"
    assert subprocess.run([sys.executable, '-c', kill], stdin=subprocess.DEVNULL).returncode == 9 and (tmp_path/'s'/'.sweep'/'a').is_dir()
    sweep(tgt, ref, tmp_path/'s', {'a': dict(types='q')}, lambda f: 1)
    assert [p.name for p in (tmp_path/'s').iterdir()] == ['a.json']
    (tmp_path/'t'/'.sweep'/'mine').mkdir(parents=True)
    with pytest.raises(Exists, match='made by something else'): sweep(tgt, ref, tmp_path/'t', {'a': dict(types='q')}, len)
    assert (tmp_path/'t'/'.sweep'/'mine').is_dir()

def test_controls_move_as_far(tmp_path):
    tgt, ref = two(tmp_path)
    size = lambda f: float(sum((v.double() - tensors(tgt)[k].double()).norm()**2 for k, v in tensors(f).items())**.5)
    got = sweep(tgt, ref, tmp_path/'s', {m: dict(mode=m, strength=.5, types='up') for m in ('directions', 'denoise', 'trim', 'blend', 'rotate')}, size, controls=True)
    assert set(got) == {*'directions denoise trim blend rotate'.split(), *(f'{m}-{c}' for m in 'directions denoise trim blend rotate'.split() for c in edits.controls_of(m))} and len(got) == 5 + 3 + 2 + 2 + 1 + 3
    for m in ('denoise', 'trim', 'blend', 'rotate'):
        for c in edits.controls_of(m): assert got[f'{m}-{c}'] == pytest.approx(got[m], rel=1e-4), (m, c)

SCORE = """import sys, pathlib; from safetensors.numpy import load_file
W = load_file(pathlib.Path(sys.argv[-1])/'model.safetensors')['model.layers.0.self_attn.q_proj.weight']
with open({log!r}, 'a') as f: f.write(pathlib.Path(sys.argv[-1]).name + '\\n')
print('some words'); print(-abs(float(((W - load_file({ref!r})['model.layers.0.self_attn.q_proj.weight'])**2).sum()**.5) - {want}))"""

def test_strength_by_a_command(tmp_path):
    tgt, ref = two(tmp_path)
    far = float((tensors(tgt)['model.layers.0.self_attn.q_proj.weight'] - tensors(ref)['model.layers.0.self_attn.q_proj.weight']).norm())
    (tmp_path/'score.py').write_text(SCORE.format(log=str(tmp_path/'log'), ref=str(ref/'model.safetensors'), want=.75*far))
    run = lambda *more: command(*asked(tgt, ref, tmp_path/'out'), '--types', 'q', '--auto', f'{sys.executable} {tmp_path}/score.py', *more)
    done = run()
    assert done.returncode == 0, done.stderr
    assert '0.25' in done.stdout and 'no interval' in done.stdout and 'what moves as far' in done.stdout
    auto = read_json(tmp_path/'out'/'restore.json')['auto']
    assert auto['best'] == .25 and [t['strength'] for t in auto['scores']] == list(surgery.GRID) and set(auto['controls']) == {'random_change'}
    torch.testing.assert_close(tensors(tmp_path/'out')['model.layers.0.self_attn.q_proj.weight'], .75*tensors(tgt)['model.layers.0.self_attn.q_proj.weight'] + .25*tensors(ref)['model.layers.0.self_attn.q_proj.weight'])
    AutoModelForCausalLM.from_pretrained(tmp_path/'out')
    assert len((tmp_path/'log').read_text().split()) == 7
    shutil.rmtree(tmp_path/'out')
    again = run('--json') # scores are kept
    assert json.loads(again.stdout)['auto'] == auto and len((tmp_path/'log').read_text().split()) == 7
    assert run().returncode == 2 # it exists
    swept = command('sweep', *asked(tgt, ref, tmp_path/'swept'), '--types', 'q', '--strengths', '0,1', '--score', f'{sys.executable} {tmp_path}/score.py', '--controls')
    assert swept.returncode == 0 and [l.split()[0] for l in swept.stdout.splitlines()] == ['blend-0', 'blend-0-random_change', 'blend-1', 'blend-1-random_change']

def test_no_strength_is_better(tmp_path):
    tgt, ref = two(tmp_path)
    done = choose_strength(tgt, ref, tmp_path/'out', lambda f: -len(changed(f, tgt)), 'trim', types='q', strengths=[.5])
    assert done['auto']['best'] == 0 and 'no strength scores higher' in done['auto']['verdict'] and not changed(tmp_path/'out', tgt)
    assert not done['auto']['controls']

@pytest.mark.parametrize('score, told', [('false', 'exit code 1'), ('echo words', "expected a number"), ('echo nan', 'finite'), ('no-such-program', 'No such file'), ('true', 'nothing was printed')])
def test_scores_that_fail(tmp_path, capsys, score, told):
    tgt, ref = two(tmp_path)
    wrapped = score if score in ('false', 'true', 'no-such-program') else f'sh -c "{score}"'
    assert told in refused(capsys, *asked(tgt, ref, tmp_path/'out'), '--types', 'q', '--auto', wrapped, code=1)
    assert not (tmp_path/'out').exists()

# the command

def test_the_command_says_what_it_did(tmp_path, capsys):
    tgt, ref = two(tmp_path)
    assert main(list(map(str, [*asked(tgt, ref, tmp_path/'a'), '--types', 'q', '--json', '--exclude', 'layers.1.*']))) == 0
    done = json.loads(capsys.readouterr().out)
    assert set(done['edits']) == {'layers.0.q', 'layers.2.q'} and done['exclude'] == ['layers.1.*']
    assert main(list(map(str, [*asked(tgt, ref, tmp_path/'b'), '--types', 'q', '--quiet', '--strength', '0.5', '--mode', 'trim']))) == 0
    assert capsys.readouterr() == ('', '') and read_json(tmp_path/'b'/'restore.json')['strength'] == .5
    for more, told in ((['--strength', '2'], 'strength=2.0'), (['--strengths', '1'], '--strengths needs --auto'), (['--auto', 'true', '--strengths', 'x'], "strengths='x'"), (['--types', 'z'], "'z' is none of"), (['--exclude', '*'], 'no matrix is meant')):
        assert told in refused(capsys, *asked(tgt, ref, tmp_path/'c'), *more)
    for module in ('rlsft_nb.surgery', 'rlsft_nb.restore'):
        run = subprocess.run([sys.executable, '-m', module, '--help'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert run.returncode == 0 and '--auto' in run.stdout

@pytest.mark.parametrize('source, told', [('gpt2', 'owner/gpt2'), ('nothing/here/at/all', 'no such folder'), ('trainer', 'checkpoint-200'), ('x.pt', 'pickled')])
def test_sources_that_are_none(tmp_path, capsys, source, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tgt, ref = two(tmp_path)
    shutil.copytree(ref, tmp_path/'trainer'/'checkpoint-200'); (tmp_path/'x.pt').write_text('x')
    assert told in refused(capsys, *asked(source, ref, 'out')) and told in refused(capsys, *asked(tgt, source, 'out'))

def test_the_shipped_model_is_a_source(tmp_path):
    ck = open_checkpoint('tiny')
    shutil.copytree(ck.home, tmp_path/'mine')
    rewrite(tmp_path/'mine', lambda sd: sd['model.layers.0.self_attn.q_proj.weight'].mul_(-1).sum() and None, next(iter(ck.files)).name)
    done = restore(tmp_path/'mine', 'tiny', tmp_path/'out', 'swap')
    assert list(done['edits']) == ['layers.0.q'] and Path(done['reference']).name == 'tiny'
    assert all(torch.equal(Checkpoint(tmp_path/'out').read(n), ck.read(n)) for n in ck.names())
