"Checkpoints as people have them: every architecture, layout, wrapper, quantisation and adapter through the one reader."
import json, math, shutil, subprocess, sys
import pytest, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoModel
from transformers.utils import logging
from rlsft_nb import tensor_files, weights
from rlsft_nb.matrix_names import *
from rlsft_nb.problems import CheckpointError, CheckpointMissing, MatrixError
from rlsft_nb.slices import *
from rlsft_nb.tensor_files import *
from rlsft_nb.weights import *

logging.disable_progress_bar()
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, head_dim=8, d_model=32, n_embd=32, n_layer=3, n_head=4,
             num_layers=3, num_heads=4, n_layers=3, n_heads=4, d_ff=48, d_kv=8, ffn_dim=48, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=48, word_embed_proj_dim=32, moe_intermediate_size=20, num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2,
             shared_expert_intermediate_size=24, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4,
             v_head_dim=8, max_position_embeddings=64, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, state_size=8, intermediate_size_mlp=48, moe_num_experts=4, moe_k=2,
             dim=32, hidden_dim=48, embedding_size=32, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_num_heads=4, mamba_head_dim=16, num_dense_layers=1, mamba_chunk_size=8)

def config(kind, **more):
    "A configuration of pico size."
    cls = CONFIG_MAPPING[kind]
    small = lambda c: {k: v for k, v in SMALL.items() if getattr(c, k, None) is not None}
    plain = cls()
    try: c = cls(**small(plain) | more)
    except Exception: # some of these are derived there
        c = plain
        for k, v in (small(plain) | more).items():
            if not isinstance(getattr(cls, k, None), property): setattr(c, k, v)
    for sub in getattr(plain, 'sub_configs', {}):
        if (s := getattr(c, sub, None)) is not None: setattr(c, sub, type(s)(**small(s)))
    return c

DENSE = 'llama qwen2 qwen3 gemma gemma2 gemma3_text mistral phi phi3 olmo2 cohere stablelm granite glm4 starcoder2 smollm3 gpt2 gpt_neo gpt_neox gptj gpt_bigcode codegen bloom falcon mpt opt mamba mamba2 rwkv bamba persimmon nemotron_h recurrent_gemma xglm openai-gpt qwen3_next'.split()
MOE = 'mixtral qwen2_moe qwen3_moe gpt_oss deepseek_v2 deepseek_v3 glm4_moe granitemoe granitemoeshared olmoe phimoe jamba llama4_text aria_text afmoe minimax ernie4_5_moe flex_olmo qwen3_5_moe_text nemotron_h'.split()
OTHERS = dict.fromkeys('t5 mt5 umt5 bart pegasus mbart m2m_100 longt5 switch_transformers'.split(), AutoModelForSeq2SeqLM) | dict.fromkeys('bert roberta distilbert electra deberta-v2 modernbert mpnet albert'.split(), AutoModelForMaskedLM)
OTHERS |= dict.fromkeys('llava gemma3 idefics3 internvl qwen3_vl_moe mllama'.split(), AutoModelForImageTextToText)

def build(kind, auto=AutoModelForCausalLM, **more):
    "A random model of pico size."
    torch.manual_seed(0)
    if kind == 'mllama': return pico_mllama()
    more = dict(gpt_neo=dict(attention_types=[[['global', 'local', 'global'], 1]]), mamba2=dict(head_dim=16, num_heads=4)).get(kind, {}) | more
    lm = auto.from_config(config(kind, **more)).float()
    with torch.no_grad():
        for p in lm.parameters(): p.normal_(0, .1)
    return lm

def pico_mllama():
    from transformers import MllamaConfig
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_global_layers=1, attention_heads=2, image_size=28, patch_size=14, vision_output_dim=64, intermediate_layers_indices=[0])
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, cross_attention_layers=[1], rope_parameters=dict(rope_type='default', rope_theta=1e4), pad_token_id=0)
    return AutoModelForImageTextToText.from_config(MllamaConfig(text_config=text, vision_config=vision))

def experts_of(lm):
    "(layer, expert, half) -> matrix as (outputs, inputs), from the modules and what transformers says of their layout."
    out = {}
    for name, module in lm.named_modules():
        ps = {n: p.detach() for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and n in ('gate_up_proj', 'up_proj', 'down_proj', 'weight')}
        if not ps or 'expert' not in name and not name.endswith('_linear') or 'attention' in name: continue
        layer = next(int(w) for w in name.split('.') if w.isdigit())
        turned = getattr(module, 'is_transposed', 'Llama4' in type(module).__name__)
        for n, p in ps.items():
            p = p.mT if turned else p
            for e, W in enumerate(p):
                if n == 'gate_up_proj':
                    halves = (W[:len(W)//2], W[len(W)//2:]) if getattr(module, 'is_concatenated', True) else (W[::2], W[1::2])
                    out |= {(layer, e, 'gate'): halves[0], (layer, e, 'up'): halves[1]}
                else: out[layer, e, n.removesuffix('_proj')] = W
    return out

def check(lm, folder, same=True):
    "Every weight of a model, read from its files, against the modules."
    ck = Checkpoint(folder)
    for (layer, e, half), W in experts_of(lm).items():
        n = f'layers.{layer}.experts.{e}.{half}'
        assert ck[n].shape == tuple(W.shape) and torch.equal(ck.read(n), W), n
    tied = set(lm.all_tied_weights_keys)
    plain = {n: p.detach() for n, p in lm.named_parameters() if p.ndim == 2 and not n.endswith('bias')}
    found = {ck.name_of(n): p for n, p in plain.items()}
    assert len(found) == len(plain) # no two under one name
    if same:
        assert set(found) - set(ck.copies) == {n for n in ck.matrices if '.experts.' not in n} | {ck.name_of(n) for n in plain if '.experts.' in n}
        for n, p in found.items(): assert n in ck.copies or torch.equal(ck.read(n), p), n
    assert ck.tied == any(ck.name_of(k) == 'head' for k in tied) or not tied
    assert sum(m.numel() for m in map(ck.read, ck.matrices)) + sum(t.size for t in ck.others.values()) + sum(math.prod(m.shape) for m in ck.copies.values()) == ck.size
    return ck

@pytest.mark.parametrize('kind', DENSE)
def test_dense(kind, tmp_path):
    lm = build(kind)
    lm.save_pretrained(tmp_path)
    ck = check(lm, tmp_path)
    assert {0, 1, 2} <= {m.layer for m in ck.matrices.values()} and 'embed' in ck.matrices
    assert ck.headless is False and ('head' in ck.matrices) != ck.tied

@pytest.mark.parametrize('original', [True, False])
@pytest.mark.parametrize('kind', MOE)
def test_experts(kind, original, tmp_path):
    lm = build(kind, **(dict(layers_block_type=['mamba', 'moe', 'attention']) if kind == 'nemotron_h' else {}))
    want = experts_of(lm)
    assert want
    lm.save_pretrained(tmp_path, save_original_format=original)
    ck = check(lm, tmp_path, same=not original or kind not in ('afmoe', 'minimax'))
    assert sum('.experts.' in n for n in ck.matrices) == len(want)
    assert ck.names('experts.*.down') and all(m.layer >= 0 for m in ck.matrices.values() if '.experts.' in m.name)

@pytest.mark.parametrize('kind', MOE)
def test_both_layouts_are_the_same_matrices(kind, tmp_path):
    lm = build(kind)
    lm.save_pretrained(tmp_path/'a', save_original_format=True); lm.save_pretrained(tmp_path/'b', save_original_format=False)
    a, b = Checkpoint(tmp_path/'a'), Checkpoint(tmp_path/'b')
    if kind == 'ernie4_5_moe': assert a.matrices.keys() == b.matrices.keys()
    names = paired(a, b)
    assert all(torch.equal(a.read(n), b.read(n)) for n in names) and len(names) > 20

@pytest.mark.parametrize('kind', OTHERS)
def test_other_architectures(kind, tmp_path):
    lm = build(kind, OTHERS[kind])
    lm.save_pretrained(tmp_path)
    ck = check(lm, tmp_path)
    assert {0, 1, 2} <= {m.layer for m in ck.matrices.values()} or kind == 'albert'
    if kind == 't5':
        assert {'encoder.layers.0.q', 'decoder.layers.0.q', 'decoder.layers.0.cross_q', 'encoder.layers.2.down'} <= set(ck.matrices)
        assert not torch.equal(ck.read('encoder.layers.0.q'), ck.read('decoder.layers.0.q')) and ck['decoder.layers.1.q'].layer == 1
    if kind == 'llava': assert all(m.layer < 0 for n, m in ck.matrices.items() if 'vision' in n) and 'layers.0.q' in ck.names(ck.text())

@pytest.mark.parametrize('kind', MOE)
@pytest.mark.parametrize('original', [True, False])
def test_put_slice_is_the_inverse(kind, original, tmp_path):
    build(kind).save_pretrained(tmp_path, save_original_format=original)
    ck = Checkpoint(tmp_path)
    by_key = {}
    for m in ck.matrices.values(): by_key.setdefault((m.file, m.key), []).append(m)
    for (file, key), ms in by_key.items():
        with safe_open(file, 'pt') as f: T = f.get_tensor(key)
        new = torch.full_like(T, float('nan'))
        for m in ms: put_slice(new, m, ck.read(m.name))
        assert torch.equal(new, T), key

PEAK = """
import resource, sys, torch
from rlsft_nb.weights import Checkpoint
ck = Checkpoint(sys.argv[1])
peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))//1024
ck.read('layers.0.experts.0.down'); before = peak()
for n in ck.names(): ck.read(n)
print(len(ck.matrices), peak() - before)
"""

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_one_expert_is_one_slice(tmp_path):
    "128 experts, 192 MiB: reading all of them in turn takes the memory of a few."
    E, H, F = 128, 512, 256
    save_file({'model.layers.0.mlp.experts.gate_up_proj': torch.ones(E, 2*F, H), 'model.layers.0.mlp.experts.down_proj': torch.ones(E, H, F)}, tmp_path/'model.safetensors')
    out = subprocess.run([sys.executable, '-c', PEAK, tmp_path], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout.split()
    assert int(out[0]) == 3*E and int(out[1]) < 24, out

# wrappers

WRAPS = ['_orig_mod.{}', 'module.{}', 'module._orig_mod.{}', 'base_model.model.{}', 'pretrained_model.{}', '_fsdp_wrapped_module.{}', '_orig_mod.module._fsdp_wrapped_module.{}']

@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('both', [True, False])
def test_wrappers(wrap, both, tmp_path):
    lm = build('qwen2')
    for side, on in (('a', both), ('b', True)):
        lm.save_pretrained(tmp_path/side)
        t = load_file(tmp_path/side/'model.safetensors')
        save_file({wrap.format(k) if on else k: v for k, v in t.items()}, tmp_path/side/'model.safetensors')
    a, b = Checkpoint(tmp_path/'a'), Checkpoint(tmp_path/'b')
    assert len(paired(a, b)) == 23 and 'layers.2.down' in a.matrices and 'head' in b.matrices

def test_wrappers_in_the_middle():
    for mid in ('_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod', 'module', '_fsdp_wrapped_module._checkpoint_wrapped_module'):
        assert canonical(f'model.layers.0.{mid}.mlp.{mid}.up_proj.weight') == 'layers.0.up'
        assert canonical(f'{mid}.lm_head.{mid}.weight') == 'head'

def test_unknown_prefix_is_hinted(tmp_path):
    lm = build('qwen2'); lm.save_pretrained(tmp_path/'a'); lm.save_pretrained(tmp_path/'b')
    t = load_file(tmp_path/'b'/'model.safetensors')
    save_file({f'actor-x/{k}': v for k, v in t.items()}, tmp_path/'b'/'model.safetensors')
    with pytest.raises(CheckpointError, match='no matrix of one name and shape in common'): common(Checkpoint(tmp_path/'a'), Checkpoint(tmp_path/'b'))

def test_an_unknown_body_is_no_stack(tmp_path):
    build('qwen2').save_pretrained(tmp_path)
    names, t = Checkpoint(tmp_path).names(), load_file(tmp_path/'model.safetensors')
    for start in ('actor.', 'student.model.', 'my_net.'):
        save_file({start + k: v for k, v in t.items()}, tmp_path/'model.safetensors')
        assert Checkpoint(tmp_path).names() == names
    save_file({s + k: v.clone() for k, v in t.items() for s in ('actor.', 'critic.')}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    assert {'actor.layers.0.q', 'critic.layers.0.q'} <= set(ck.matrices) and ck['critic.layers.2.q'].layer == 2

def test_a_vision_model_alone_has_layers(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel
    CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)).save_pretrained(tmp_path, save_original_format=True)
    ck = Checkpoint(tmp_path)
    assert {m.layer for m in ck.matrices.values()} >= {0, 1, 2} and 'layers.0.q' in ck.matrices

def test_draft_layers_are_no_layers(tmp_path):
    lm = build('qwen2'); lm.save_pretrained(tmp_path)
    t = load_file(tmp_path/'model.safetensors')
    save_file(t | {'mtp.layers.0.mlp.up_proj.weight': torch.ones(4, 4), 'model.layers.3.mlp.up_proj.weight': torch.ones(48, 32)}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    assert ck['mtp.layers.0.up'].layer == -1 and ck['layers.0.up'].layer == 0 and any('layers 3 to 3 are beyond' in n for n in ck.notes)

def test_dbrx(tmp_path):
    "All experts below each other: w1, v1 as (outputs, inputs), w2 turned."
    from types import SimpleNamespace
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU
    glu = DbrxExpertGLU(SimpleNamespace(hidden_size=32, ffn_hidden_size=48, moe_num_experts=4, ffn_act_fn={}))
    with torch.no_grad(): [p.normal_() for p in glu.parameters()]
    save_file({f'transformer.blocks.0.ffn.experts.mlp.{n}': p.detach() for n, p in glu.named_parameters()}, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='dbrx', ffn_config=dict(moe_num_experts=4))))
    ck, x = Checkpoint(tmp_path), torch.randn(5, 32)
    w1, v1, w2 = (getattr(glu, n).detach().view(4, 48, 32) for n in ('w1', 'v1', 'w2'))
    for e in range(4):
        gate, up, down = (ck.read(f'layers.0.experts.{e}.{n}') for n in ('gate', 'up', 'down'))
        torch.testing.assert_close((torch.nn.functional.silu(x @ gate.mT)*(x @ up.mT)) @ down.mT, glu(x, w1[e], v1[e], w2[e]).detach(), atol=1e-3, rtol=1e-3)

def test_experts_of_an_attention(tmp_path):
    lm = build('jetmoe'); lm.save_pretrained(tmp_path)
    ck = Checkpoint(tmp_path)
    assert torch.equal(ck.read('layers.1.self_attention.experts.2.input_linear'), lm.model.layers[1].self_attention.experts.input_linear.weight[2]) and len(ck.names('layers.0.experts.*')) == 12

def test_turned_experts_of_the_hub(tmp_path):
    "Qwen3-VL-MoE of transformers 4: (experts, inputs, outputs), also where the width is twice the inner one."
    for F in (20, 32, 16, 64):
        H = 32
        W, D = torch.randn(4, 2*F, H), torch.randn(4, H, F)
        for turned in (False, True):
            t = {'gate_up_proj': W, 'down_proj': D}
            save_file({f'model.language_model.layers.0.mlp.experts.{n}': (p.mT if turned else p).contiguous() for n, p in t.items()}, tmp_path/'model.safetensors')
            ck = Checkpoint(tmp_path)
            assert torch.equal(ck.read('layers.0.experts.3.up'), W[3, F:]) and torch.equal(ck.read('layers.0.experts.3.down'), D[3]), (F, turned)

# tying

def test_headless_save_of_an_untied_model(tmp_path):
    lm = build('llama', tie_word_embeddings=False)
    lm.save_pretrained(tmp_path/'whole'); lm.model.save_pretrained(tmp_path/'bare')
    a, b = Checkpoint(tmp_path/'whole'), Checkpoint(tmp_path/'bare')
    assert not a.tied and not b.tied and b.headless and not a.headless
    with pytest.raises(KeyError): b['head']
    assert common(a, b).only_a == ['head'] and any('absent' in n for n in b.notes)
    with pytest.raises(CheckpointError, match='lacks head'): paired(a, b)

@pytest.mark.parametrize('kind, tied', [('llama', True), ('llama', False), ('gpt2', True), ('gemma', True), ('opt', True), ('qwen2', False), ('mamba', True), ('phi', False)])
def test_tying_as_transformers(kind, tied, tmp_path):
    lm = build(kind, **(dict(tie_word_embeddings=tied) if kind == 'llama' else {}))
    lm.save_pretrained(tmp_path)
    ck = Checkpoint(tmp_path)
    assert ck.tied == tied == (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight)
    assert torch.equal(ck.read('head'), lm.get_output_embeddings().weight)

def test_tied_by_default_where_config_is_silent(tmp_path):
    build('gemma').save_pretrained(tmp_path)
    c = json.loads((tmp_path/'config.json').read_text()); c.pop('tie_word_embeddings', None)
    (tmp_path/'config.json').write_text(json.dumps(c))
    assert Checkpoint(tmp_path).tied
    c['model_type'] = 'qwen2'
    (tmp_path/'config.json').write_text(json.dumps(c))
    assert not Checkpoint(tmp_path).tied and Checkpoint(tmp_path).headless

def test_tied_saved_as_head_only(tmp_path):
    lm = build('llama', tie_word_embeddings=True)
    lm.save_pretrained(tmp_path)
    t = load_file(tmp_path/'model.safetensors')
    E = t.pop('model.embed_tokens.weight')
    save_file(t | {'lm_head.weight': E}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    assert ck.tied and torch.equal(ck.read('embed'), E) and torch.equal(ck.read('head'), E) and ck['embed'].key == 'lm_head.weight'
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight, E)

def test_tied_with_two_copies(tmp_path):
    lm = build('llama', tie_word_embeddings=True)
    lm.save_pretrained(tmp_path)
    t = load_file(tmp_path/'model.safetensors')
    save_file(t | {'lm_head.weight': t['model.embed_tokens.weight'].clone()}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    assert ck.tied and list(ck.copies) == ['head'] and 'head' not in ck.matrices
    save_file(t | {'lm_head.weight': t['model.embed_tokens.weight'] + 1}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path) # transformers keeps both and warns
    assert not ck.tied and torch.equal(ck.read('head'), AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight)

def test_plain_configurations_need_no_transformers():
    for kind in tensor_files._PLAIN:
        for tied in (True, False):
            c = dict(model_type=kind, tie_word_embeddings=tied)
            assert says_tied(c) == tied == tensor_files._resolved(c)['tie_word_embeddings']
    assert says_tied(dict(model_type='qwen2')) is False and says_tied(dict(model_type='t5', tie_word_embeddings=False)) is True

def test_nested_tying(tmp_path):
    for tied in (True, False):
        c = dict(model_type='llava', text_config=dict(model_type='llama', tie_word_embeddings=tied), vision_config=dict(model_type='clip_vision_model'))
        assert says_tied(c) == tied
    assert says_tied(dict(model_type='no-such', text_config=dict(tie_word_embeddings=True))) is True

# value and reward heads

def test_heads_of_trainers(tmp_path):
    lm = build('qwen2'); lm.save_pretrained(tmp_path/'base')
    t = load_file(tmp_path/'base'/'model.safetensors')
    for name in ('v_head.summary', 'value_head', 'pretrained_model.v_head.summary'):
        out = tmp_path/name
        shutil.copytree(tmp_path/'base', out)
        save_file(t | {f'{name}.weight': torch.ones(1, 32), f'{name}.bias': torch.ones(1)}, out/'model.safetensors')
        ck = Checkpoint(out)
        assert 'head' in ck.matrices and not any('v' in n.split('.')[0][:1] for n in ck.matrices)
        assert any('value heads' in w and n == 2 for w, n, _ in ck.left_out)
        assert paired(Checkpoint(tmp_path/'base'), ck)
    rm = AutoModelForSequenceClassification.from_config(config('qwen2', num_labels=1))
    rm.save_pretrained(tmp_path/'rm')
    both = common(Checkpoint(tmp_path/'base'), Checkpoint(tmp_path/'rm'))
    assert both.only_a == ['head'] and both.only_b == ['score'] and len(both.names) == 22

def test_common(tmp_path):
    build('qwen2').save_pretrained(tmp_path/'a'); build('qwen2', num_hidden_layers=4, vocab_size=67).save_pretrained(tmp_path/'b')
    a, b = Checkpoint(tmp_path/'a'), Checkpoint(tmp_path/'b')
    both = common(a, b)
    assert both.rows == dict(embed=64, head=64) and set(both.shapes) == {'embed', 'head'} and len(both.names) == 21
    assert both.only_a == [] and len(both.only_b) == 7 and both.only_b[0].startswith('layers.3.')
    assert paired(a, b, 'layers.0.*, layers.1.*') and len(common(a, b, 'q').names) == 3
    build('gpt2').save_pretrained(tmp_path/'c')
    with pytest.raises(CheckpointError, match='no matrix of one name and shape in common'): common(a, Checkpoint(tmp_path/'c'), 'layers.0.q*')

# files

def two(tmp_path):
    lm = build('qwen2'); lm.save_pretrained(tmp_path, max_shard_size='20KB')
    other = build('qwen2')
    with torch.no_grad(): [p.add_(1) for p in other.parameters()]
    return lm, other

def test_single_file_before_a_stale_index(tmp_path):
    lm, other = two(tmp_path)
    shutil.copy(tmp_path/'model.safetensors.index.json', tmp_path/'keep.json')
    shards = sorted(tmp_path.glob('model-*'))
    assert len(shards) > 1
    save_file({k: v.clone() for k, v in other.state_dict().items()}, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    ck = Checkpoint(tmp_path)
    want = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(ck.read('layers.0.q'), want) and torch.equal(want, other.model.layers[0].self_attn.q_proj.weight)
    for f in shards: f.unlink()
    assert torch.equal(Checkpoint(tmp_path).read('layers.0.q'), want) # shards gone, index still there

def test_shards_not_in_the_index(tmp_path):
    lm, other = two(tmp_path)
    save_file({'model.layers.0.self_attn.q_proj.weight': torch.zeros(32, 32)}, tmp_path/'model-99999.safetensors')
    ck = Checkpoint(tmp_path)
    assert torch.equal(ck.read('layers.0.q'), lm.model.layers[0].self_attn.q_proj.weight) and any('model-99999' in n for n in ck.notes)

def test_overlapping_shards(tmp_path):
    lm, _ = two(tmp_path)
    last = sorted(tmp_path.glob('model-*'))[-1]
    save_file(load_file(last) | {'model.layers.0.self_attn.q_proj.weight': torch.zeros(32, 32)}, last, metadata=dict(format='pt'))
    ck = Checkpoint(tmp_path)
    assert torch.equal(ck.read('layers.0.q'), AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.weight) and any('more than one shard' in n for n in ck.notes)

@pytest.mark.parametrize('text, told', [('{"weight_map": {"a": "mo', 'cut short'), ('{}', "no 'weight_map'"), ('[]', 'holds list'), ('{"weight_map": []}', "no 'weight_map'"),
                                        ('{"weight_map": {"a": "../x.safetensors"}}', 'is no file of this folder'), ('{"weight_map": {"a": "gone.safetensors"}}', '1 of 1 shards are missing: gone.safetensors')])
def test_bad_index(tmp_path, text, told):
    (tmp_path/'model.safetensors.index.json').write_text(text)
    with pytest.raises((CheckpointError, CheckpointMissing)) as e: Checkpoint(tmp_path)
    assert told in str(e.value) and 'index.json' in str(e.value) and '\n' not in str(e.value)

def test_bad_config(tmp_path):
    build('qwen2').save_pretrained(tmp_path)
    (tmp_path/'config.json').write_text('{"model_type": "qw')
    with pytest.raises(CheckpointError, match='config.json: cut short'): Checkpoint(tmp_path)
    (tmp_path/'config.json').unlink()
    assert any('no config.json' in n for n in Checkpoint(tmp_path).notes)

def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    def told(source, words, kind=(CheckpointError, CheckpointMissing)):
        with pytest.raises(kind) as e: Checkpoint(source)
        assert words in str(e.value) and '\n' not in str(e.value), str(e.value)
    monkeypatch.chdir(tmp_path)
    for n in ('checkpoint-20', 'checkpoint-200'): (tmp_path/'run'/n).mkdir(parents=True)
    told(tmp_path/'run', 'checkpoint-200')
    for file, words in (('pytorch_model.bin', 'pickled weights'), ('consolidated.00.pth', 'pickled weights'), ('model.pt', 'pickled weights'), ('__0_0.distcp', 'torch.distributed'), ('zero_to_fp32.py', 'DeepSpeed'), ('m.gguf', 'for its GGUF file')):
        d = tmp_path/file.replace('.', '-'); d.mkdir(); (d/file).write_bytes(b'x')
        told(d, words)
        if file.endswith(('.bin', '.pt')): told(d/file, 'pickled weights')
    d = tmp_path/'lfs'; d.mkdir()
    (d/'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n')
    told(d, 'git-lfs pointer')
    told('gpt2', 'owner/gpt2'); told('no/such/place', 'no such folder'); told('./x', 'no such folder')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    told('nobody-here/nothing@v1.0', 'the Hub gives nothing')
    with pytest.raises(CheckpointError, match='is another one'): Checkpoint('nobody-here/nothing@v1', 'v2')

def test_hub_revision(tmp_path, monkeypatch):
    build('qwen2').save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda repo, revision=None, **k: (seen.append((repo, revision)), str(tmp_path))[1])
    for source, rev in (('a/b@v1.0', ''), ('a/b', 'v1.0'), ('a/b', ''), ('a/b@refs/pr/1', '')): Checkpoint(source, rev)
    assert any('one of 3 shards' in n for n in Checkpoint(shutil.copy(tmp_path/'model.safetensors', tmp_path/'x-00001-of-00003.safetensors')).notes)
    assert seen == [('a/b', 'v1.0'), ('a/b', 'v1.0'), ('a/b', None), ('a/b', 'refs/pr/1')]

def test_names_that_are_paths(tmp_path):
    save_file({'../../x.weight': torch.ones(2, 2), 'a/b\0c': torch.ones(3, 3), '.hidden': torch.ones(2, 3)}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    for n in ck.matrices:
        s = safe_name(n)
        assert '/' not in s and '\0' not in s and not s.startswith('.') and (tmp_path/s).resolve().parent == tmp_path.resolve()
    assert len({safe_name(n) for n in ck.matrices}) == 3

# what is left out

def test_everything_is_accounted_for(tmp_path):
    save_file({'model.layers.0.mlp.up_proj.weight': torch.ones(4, 4), 'model.norm.weight': torch.ones(4), 'model.conv.weight': torch.ones(2, 1, 3), 'model.ids': torch.ones(2, 2, dtype=torch.int64), 'model.empty': torch.ones(0, 4)}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    assert {w.split(':')[0]: (n, p) for w, n, p in ck.left_out} == {'norms, biases and other vectors': (1, 4), 'convolutions and other tensors of three or more dimensions': (1, 6), 'integers and flags': (1, 4), 'tensors without elements': (1, 0)}
    assert set(ck.others) == {'norm', 'conv', 'ids', 'empty'} and torch.equal(ck.read_other('ids'), torch.ones(2, 2, dtype=torch.int64))
    s = ck.summary()
    assert s['share_left_out'] == 14/30 and s['matrices'] == 1 and s['others'] == 4 and json.dumps(s)

def test_matrices_that_cannot_be_used(tmp_path):
    save_file({'a.weight': torch.zeros(4, 4), 'b.weight': torch.full((4, 4), float('nan')), 'c.weight': torch.ones(4, 4)}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    assert torch.equal(ck.read('a'), torch.zeros(4, 4))
    with pytest.raises(MatrixError, match='16 values that are NaN'): ck.read('b')
    assert ck.read('b', finite=False).isnan().all() and issubclass(MatrixError, CheckpointError)

def test_patterns_of_experts(tmp_path):
    build('mixtral').save_pretrained(tmp_path)
    ck = Checkpoint(tmp_path)
    assert len(ck.names('experts.*')) == 36 and len(ck.names('experts.*.gate')) == 12 and len(ck.names('layers.1.experts.0.*')) == 3 and len(ck.names('router')) == 3
    with pytest.raises(CheckpointError) as e: ck.names('expert')
    assert 'layers.*.experts.*.gate' in str(e.value) and len(str(e.value)) < 300

# quantised weights

def fp8(W, block):
    "FP8 with block scales, as DeepSeek stores it."
    rows, cols = (-(-s//b) for s, b in zip(W.shape, block))
    scale = torch.zeros(rows, cols)
    Q = torch.zeros(W.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(cols):
            at = (slice(i*block[0], (i + 1)*block[0]), slice(j*block[1], (j + 1)*block[1]))
            scale[i, j] = W[at].abs().max()/448
            Q[at] = (W[at]/scale[i, j]).to(Q)
    return Q, scale

@pytest.mark.parametrize('shape', [(64, 32), (40, 20), (16, 16)])
def test_fp8_in_blocks(shape, tmp_path):
    W = torch.randn(shape)
    Q, s = fp8(W, (16, 16))
    save_file({'model.layers.0.mlp.up_proj.weight': Q, 'model.layers.0.mlp.up_proj.weight_scale_inv': s, 'model.embed_tokens.weight': torch.ones(4, 4)}, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='x', quantization_config=dict(quant_method='fp8', weight_block_size=[16, 16]))))
    ck = Checkpoint(tmp_path)
    assert ck.names() == ['embed', 'layers.0.up'] and ck['layers.0.up'].shape == shape
    assert (ck.read('layers.0.up') - W).abs().max() < .07*W.abs().max() and ck.dequantized and not ck.writable and 'quantised' in ck.unwritable
    want = torch.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]): want[i, j] = Q[i, j].float()*s[i//16, j//16]
    assert torch.equal(ck.read('layers.0.up'), want)
    with pytest.raises(CheckpointError, match='not written'): put_slice(Q, ck['layers.0.up'], want)

@pytest.mark.parametrize('scale', [torch.tensor(.5), torch.tensor([.5]), torch.rand(6), torch.rand(6, 1)])
def test_fp8_by_tensor_and_by_row(scale, tmp_path):
    Q = torch.randn(6, 4).to(torch.float8_e4m3fn)
    save_file({'a.weight': Q, 'a.weight_scale': scale, 'a.input_scale': torch.tensor(1.)}, tmp_path/'model.safetensors')
    s = scale.reshape(-1, 1) if scale.numel() > 1 else scale
    assert torch.equal(Checkpoint(tmp_path).read('a'), Q.float()*s)

def test_fp8_as_transformers_reads_it():
    from types import SimpleNamespace
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    W = torch.randn(64, 32)
    Q, s = fp8(W, (16, 16))
    assert torch.equal(Fp8Dequantize(SimpleNamespace())._dequantize_one(Q, s), scaled(Q, s, (16, 16)))

def test_fp8_without_scales(tmp_path):
    save_file({'a.weight': torch.randn(6, 4).to(torch.float8_e4m3fn), 'b.weight': torch.ones(2, 2)}, tmp_path/'model.safetensors')
    ck = Checkpoint(tmp_path)
    assert ck.names() == ['b'] and ck.left_out == [(weights.WHY['fp8'], 1, 24)]

def test_mxfp4_as_transformers_reads_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    g = torch.Generator().manual_seed(0)
    E, H, F = 3, 64, 32
    t = {}
    for n, rows, cols in (('gate_up_proj', 2*F, H), ('down_proj', H, F)):
        t[f'model.layers.0.mlp.experts.{n}_blocks'] = torch.randint(0, 256, (E, rows, cols//32, 16), generator=g, dtype=torch.uint8)
        t[f'model.layers.0.mlp.experts.{n}_scales'] = torch.randint(118, 130, (E, rows, cols//32), generator=g, dtype=torch.uint8)
        t[f'model.layers.0.mlp.experts.{n}_bias'] = torch.ones(E, rows)
    save_file(t, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='gpt_oss', hidden_size=H, quantization_config=dict(quant_method='mxfp4'))))
    ck = Checkpoint(tmp_path)
    get = lambda n: convert_moe_packed_tensors(t[f'model.layers.0.mlp.experts.{n}_blocks'], t[f'model.layers.0.mlp.experts.{n}_scales'], dtype=torch.float32)
    up, down = get('gate_up_proj'), get('down_proj') # (E, inputs, outputs)
    for e in range(E):
        assert torch.equal(ck.read(f'layers.0.experts.{e}.gate'), up[e, :, ::2].mT) and torch.equal(ck.read(f'layers.0.experts.{e}.up'), up[e, :, 1::2].mT)
        assert torch.equal(ck.read(f'layers.0.experts.{e}.down'), down[e].mT)
    assert len(ck.matrices) == 3*E and ck.dequantized == 'MXFP4' and not ck.writable and len(ck.others) == 2

def test_fp8_of_fused_experts(tmp_path):
    E, H, F = 2, 32, 16
    W, D = torch.randn(E, 2*F, H), torch.randn(E, H, F)
    t = {}
    for n, X in (('gate_up_proj', W), ('down_proj', D)):
        parts = [fp8(x, (16, 16)) for x in X]
        t[f'model.layers.0.mlp.experts.{n}'], t[f'model.layers.0.mlp.experts.{n}_scale_inv'] = (torch.stack(p) for p in zip(*parts))
    save_file(t, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='x', hidden_size=H, quantization_config=dict(quant_method='fp8', weight_block_size=[16, 16]))))
    ck = Checkpoint(tmp_path)
    assert len(ck.matrices) == 3*E
    for e in range(E):
        assert (ck.read(f'layers.0.experts.{e}.up') - W[e, F:]).abs().max() < .2 and (ck.read(f'layers.0.experts.{e}.down') - D[e]).abs().max() < .2

I8, I32, U8 = torch.int8, torch.int32, torch.uint8
@pytest.mark.parametrize('tensors, quant, told', [
    ({'a.qweight': torch.ones(4, 8, dtype=I32), 'a.qzeros': torch.ones(1, 1, dtype=I32), 'a.scales': torch.ones(1, 8, dtype=torch.float16), 'a.g_idx': torch.ones(32, dtype=I32)}, dict(quant_method='gptq', bits=4), 'GPTQ'),
    ({'a.qweight': torch.ones(4, 8, dtype=I32), 'a.qzeros': torch.ones(1, 1, dtype=I32), 'a.scales': torch.ones(1, 8, dtype=torch.float16)}, dict(quant_method='awq'), 'AWQ'),
    ({'a.qweight': torch.ones(4, 8, dtype=I32), 'a.scales': torch.ones(1, 8, dtype=torch.float16)}, None, 'AWQ or GPTQ'),
    ({'a.weight': torch.ones(64, 1, dtype=U8), 'a.weight.absmax': torch.ones(2), 'a.weight.quant_map': torch.ones(16), 'a.weight.quant_state.bitsandbytes__nf4': torch.ones(9, dtype=U8)}, None, 'bitsandbytes'),
    ({'a.weight': torch.ones(8, 8, dtype=I8), 'a.SCB': torch.ones(8)}, None, 'bitsandbytes'),
    ({'a.weight_packed': torch.ones(8, 2, dtype=I32), 'a.weight_scale': torch.ones(8, 1), 'a.weight_shape': torch.ones(2, dtype=torch.int64)}, dict(quant_method='compressed-tensors'), 'compressed-tensors'),
    ({'a.weight': torch.ones(8, 4, dtype=U8), 'a.weight_scale': torch.ones(8, 1).to(torch.float8_e4m3fn), 'a.weight_scale_2': torch.ones(1)}, None, 'NVFP4'),
    ({'a.weight': torch.ones(8, 4, dtype=U8), 'a.weight_scale': torch.ones(1)}, dict(quant_method='bitnet'), 'bitnet'),
    ({'a.weight': torch.ones(8, 8, dtype=I8), 'a.weight_scale': torch.ones(8, 1)}, None, 'integers and scales'),
    ({'a.W_q': torch.ones(8, 4, dtype=U8)}, dict(quant_method='hqq'), 'HQQ')])
def test_refused(tensors, quant, told, tmp_path):
    save_file(tensors | {'model.embed_tokens.weight': torch.ones(4, 4)}, tmp_path/'model.safetensors')
    if quant: (tmp_path/'config.json').write_text(json.dumps(dict(model_type='qwen2', quantization_config=quant)))
    with pytest.raises(CheckpointError) as e: Checkpoint(tmp_path)
    assert f'quantised with {told}' in str(e.value) and 'dequantised copy' in str(e.value) and '\n' not in str(e.value)

def test_float_weights_under_a_quantised_configuration(tmp_path):
    "Quantised while loading: the files are plain."
    build('qwen2').save_pretrained(tmp_path)
    c = json.loads((tmp_path/'config.json').read_text()) | dict(quantization_config=dict(quant_method='bitsandbytes', load_in_4bit=True))
    (tmp_path/'config.json').write_text(json.dumps(c))
    assert len(Checkpoint(tmp_path).matrices) == 23

# one function for every source

def test_gguf(tmp_path, monkeypatch):
    build('llama').save_pretrained(tmp_path)
    (tmp_path/'m.gguf').write_bytes(b'GGUF')
    monkeypatch.setattr('rlsft_nb.models.converted', lambda path: tmp_path)
    ck = open_checkpoint(tmp_path/'m.gguf')
    assert ck.source.endswith('m.gguf') and 'GGUF' in ck.summary()['dequantized'] and len(ck.matrices) == 23
    with pytest.raises(CheckpointMissing, match='opened by open_checkpoint'): Checkpoint(tmp_path/'m.gguf')

def test_open_checkpoint(tmp_path):
    build('qwen2').save_pretrained(tmp_path)
    ck = open_checkpoint(tmp_path)
    assert open_checkpoint(ck) is ck and len(open_checkpoint(tmp_path/'model.safetensors').matrices) == 23 == len(open_checkpoint(str(tmp_path)).matrices)
    assert open_checkpoint('tiny')['layers.0.q'].layer == 0
    with pytest.raises(CheckpointMissing, match='no such folder'): open_checkpoint('tinyy')

# adapters

def pico(folder, kind='llama', **more):
    build(kind, **more).save_pretrained(folder)
    return Checkpoint(folder)

def lora(folder, base, factors, rest=(), **config):
    "An adapter by hand: module -> (A, B)."
    folder.mkdir(exist_ok=True)
    t = {f'base_model.model.{m}.lora_{x}.weight': W for m, ab in factors.items() for x, W in zip('AB', ab)} | {f'base_model.model.{k}': W for k, W in dict(rest).items()}
    save_file(t, folder/'adapter_model.safetensors')
    (folder/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=2, lora_alpha=6, base_model_name_or_path=str(base)) | config))
    return folder

def ab(m, n, r=2): return torch.randn(r, n), torch.randn(m, r)

def test_lora_by_hand(tmp_path):
    base = pico(tmp_path/'base')
    A, B = ab(32, 32); A2, B2 = ab(48, 32, 4)
    mods = {'model.layers.0.self_attn.q_proj': (A, B), 'model.layers.1.mlp.up_proj': (A2, B2)}
    ck = Checkpoint(lora(tmp_path/'l', tmp_path/'base', mods, rank_pattern={'up_proj': 4}, alpha_pattern={r'layers\\.1\\..*up_proj'.replace('\\\\', '\\'): 12}))
    assert torch.allclose(ck.read('layers.0.q'), base.read('layers.0.q') + 3*B @ A, atol=1e-5)
    assert torch.allclose(ck.read('layers.1.up'), base.read('layers.1.up') + 3*B2 @ A2, atol=1e-5)
    b, a, s = ck.factors('layers.0.q')
    assert torch.equal(b, B) and torch.equal(a, A) and s == 3 and ck.factors('layers.0.k') is None
    assert all(torch.equal(ck.read(n), base.read(n)) for n in ck.names() if n not in ('layers.0.q', 'layers.1.up')) and paired(base, ck) == base.names()
    assert ck.adapter == dict(kind='LoRA', base=str(tmp_path/'base'), updated=2, replaced=[], rank=4) and ck.summary()['adapter'] and json.dumps(ck.summary())
    assert ck.files == base.files and ck.writable and len(ck.stamp()) == len(base.stamp()) + 2
    key = base['layers.0.q'].key
    assert torch.equal(ck.written(key), ck.read('layers.0.q')) and ck.written(base['layers.0.k'].key) is None
    again = Checkpoint(lora(tmp_path/'rs', tmp_path/'base', {'model.layers.0.self_attn.q_proj': (A, B)}, use_rslora=True))
    assert torch.allclose(again.read('layers.0.q'), base.read('layers.0.q') + 6/2**.5*B @ A, atol=1e-5)

def test_base_of_an_adapter(tmp_path, monkeypatch):
    pico(tmp_path/'base')
    A, B = ab(32, 32)
    f = lora(tmp_path/'l', 'somebody/gone', {'model.layers.0.self_attn.q_proj': (A, B)})
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointMissing, match='an adapter, and its base cannot be read .*give base='): Checkpoint(f)
    for base in (tmp_path/'base', str(tmp_path/'base'), Checkpoint(tmp_path/'base')): assert Checkpoint(f, base=base).factors('layers.0.q')
    assert open_checkpoint(f, base=tmp_path/'base').base.source == str(tmp_path/'base')
    with pytest.raises(CheckpointError, match='does not name its base'): Checkpoint(lora(tmp_path/'l', '', {'model.layers.0.self_attn.q_proj': (A, B)}))
    with pytest.raises(CheckpointError, match='2 x 32|make 2'): Checkpoint(lora(tmp_path/'l', tmp_path/'base', {'model.layers.0.self_attn.q_proj': (A, B[:2])})).read('layers.0.q')
    with pytest.raises(CheckpointError, match='layers.9.q is updated'): Checkpoint(lora(tmp_path/'l', tmp_path/'base', {'model.layers.9.self_attn.q_proj': (A, B)}))

@pytest.mark.parametrize('config, told', [(dict(peft_type='IA3'), 'kind IA3'), (dict(peft_type='PREFIX_TUNING'), 'kind PREFIX_TUNING'), (dict(init_lora_weights='pissa_niter_4'), 'changed the base'),
                                          (dict(init_lora_weights='olora'), 'changed the base'), (dict(layer_replication=[[0, 1]]), 'layer_replication'), (dict(trainable_token_indices=[1]), 'trainable_token_indices')])
def test_adapters_that_are_refused(config, told, tmp_path):
    pico(tmp_path/'base')
    with pytest.raises(CheckpointError) as e: Checkpoint(lora(tmp_path/'l', tmp_path/'base', {'model.layers.0.self_attn.q_proj': ab(32, 32)}, **config))
    assert told in str(e.value) and 'merge_and_unload' in str(e.value) and '\n' not in str(e.value)

def test_files_of_an_adapter(tmp_path):
    pico(tmp_path/'base')
    f = lora(tmp_path/'l', tmp_path/'base', {'model.layers.0.self_attn.q_proj': ab(32, 32)})
    assert Checkpoint(f/'adapter_model.safetensors').factors('layers.0.q')
    (f/'adapter_config.json').unlink()
    for source in (f, f/'adapter_model.safetensors'):
        with pytest.raises(CheckpointError, match='without the adapter_config.json'): Checkpoint(source)

def test_unknown_tensors_of_an_adapter(tmp_path):
    pico(tmp_path/'base')
    with pytest.raises(CheckpointError, match='lora_B.bias is not read'): Checkpoint(lora(tmp_path/'l', tmp_path/'base', {'model.layers.0.self_attn.q_proj': ab(32, 32)}, {'model.layers.0.self_attn.q_proj.lora_B.bias': torch.ones(32)}))

def test_modules_to_save(tmp_path):
    base = pico(tmp_path/'base', tie_word_embeddings=False)
    H, N = torch.randn(64, 32), torch.randn(32)
    ck = Checkpoint(lora(tmp_path/'l', tmp_path/'base', {'model.layers.0.self_attn.q_proj': ab(32, 32)}, {'lm_head.weight': H, 'model.norm.weight': N, 'score.weight': torch.ones(1, 32)}))
    assert torch.equal(ck.read('head'), H) and torch.equal(ck.read_other('norm'), N) and ck.factors('head') is None and ck.adapter['replaced'] == ['head', 'norm', 'score']
    assert torch.equal(ck.written('lm_head.weight'), H) and torch.equal(ck.written('model.norm.weight'), N) and common(base, ck).only_b == ['score']

def test_tied_ends_of_an_adapter(tmp_path):
    base = pico(tmp_path/'base', tie_word_embeddings=True)
    A, B = ab(64, 32)
    ck = Checkpoint(lora(tmp_path/'l', tmp_path/'base', {'lm_head': (A, B)}))
    assert base.tied and not ck.tied and not ck.writable and torch.equal(ck.read('embed'), base.read('embed'))
    assert torch.allclose(ck.read('head'), base.read('embed') + 3*B @ A, atol=1e-5) and any('tied' in n for n in ck.notes)
    assert 'head' in paired(base, ck)

def test_adapter_on_experts_one_by_one(tmp_path):
    "An adapter trained on the modules of transformers 4, on a fused base."
    base = pico(tmp_path/'base', 'mixtral')
    A, B = ab(48, 32)
    ck = Checkpoint(lora(tmp_path/'l', tmp_path/'base', {'model.layers.1.block_sparse_moe.experts.2.w1': (A, B)}))
    assert torch.allclose(ck.read('layers.1.experts.2.gate'), base.read('layers.1.experts.2.gate') + 3*B @ A, atol=1e-5) and ck.factors('layers.1.experts.2.up') is None

# the same, against PEFT itself where it is installed

def tuned(lm, **config):
    import peft
    torch.manual_seed(1)
    m = peft.get_peft_model(lm, peft.LoraConfig(r=4, lora_alpha=10, **config))
    with torch.no_grad():
        for n, p in m.named_parameters():
            if 'lora_' in n: p.add_(torch.randn_like(p)*.1)
    return m

PEFT = [('llama', dict(target_modules=['q_proj', 'down_proj'])), ('llama', dict(target_modules='all-linear', use_rslora=True)), ('llama', dict(target_modules=['q_proj', 'up_proj'], use_dora=True)),
        ('llama', dict(target_modules=['q_proj', 'v_proj'], rank_pattern={'v_proj': 2}, alpha_pattern={'layers.1.self_attn.q_proj': 3})), ('gpt2', dict(target_modules=['c_attn', 'c_proj'])),
        ('gpt2', dict(target_modules=['c_attn'], use_dora=True)), ('llama', dict(target_modules=['embed_tokens', 'q_proj'])), ('llama', dict(target_modules=['q_proj'], modules_to_save=['lm_head'])),
        ('mixtral', dict(target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'])), ('gpt_oss', dict(target_modules=['q_proj'], target_parameters=['mlp.experts.gate_up_proj'])),
        ('qwen3_moe', dict(target_modules=['q_proj'], target_parameters=['mlp.experts.down_proj'])), ('llama4_text', dict(target_parameters=['feed_forward.experts.gate_up_proj', 'feed_forward.experts.down_proj']))]
@pytest.mark.parametrize('kind, config', PEFT)
def test_peft(kind, config, tmp_path):
    pytest.importorskip('peft')
    lm = build(kind, **(dict(tie_word_embeddings=False) if kind == 'llama' else {}))
    lm.save_pretrained(tmp_path/'base', save_original_format=False)
    lm.name_or_path = lm.config._name_or_path = str(tmp_path/'base')
    m = tuned(lm, **config)
    m.save_pretrained(tmp_path/'lora')
    m.merge_and_unload().save_pretrained(tmp_path/'merged', save_original_format=False)
    ck, want, base = Checkpoint(tmp_path/'lora'), Checkpoint(tmp_path/'merged'), Checkpoint(tmp_path/'base')
    assert ck.names() == want.names()
    moved = [n for n in ck.names() if not torch.equal(want.read(n), base.read(n))]
    assert moved and len(moved) == ck.adapter['updated'] + len([n for n in ck.adapter['replaced'] if n in moved and not ck[n].update])
    for n in ck.names(): torch.testing.assert_close(ck.read(n), want.read(n), atol=1e-5, rtol=1e-4)
    for n in moved:
        if not ck.factors(n): continue
        B, A, s = ck.factors(n)
        torch.testing.assert_close(base.read(n) + s*B @ A, want.read(n), atol=1e-5, rtol=1e-4)
    for file, keys in ck.files.items():
        for k in keys:
            if (T := ck.written(k)) is None: continue
            with safe_open(tmp_path/'merged'/file.name, 'pt') as f: torch.testing.assert_close(T, f.get_tensor(k), atol=1e-5, rtol=1e-4)
