import json, os
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, MllamaConfig, Qwen2Config
from rlsft_nb import weights
from rlsft_nb.matrix_names import *
from rlsft_nb.problems import CheckpointError, CheckpointMissing, MatrixError
from rlsft_nb.slices import *
from rlsft_nb.tensor_files import *
from rlsft_nb.weights import *

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40)

def build(kind, tied=False):
    "A random pico model."
    torch.manual_seed(0)
    if kind == 'qwen2': return AutoModelForCausalLM.from_config(Qwen2Config(**SMALL, tie_word_embeddings=tied))
    if kind == 'llama': return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_global_layers=1, attention_heads=2, image_size=28, patch_size=14, vision_output_dim=32, intermediate_layers_indices=[0])
    text = SMALL | dict(num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=dict(rope_type='default', rope_theta=1e4), pad_token_id=0)
    return AutoModelForImageTextToText.from_config(MllamaConfig(text_config=text, vision_config=vision))

def expected(lm):
    "Canonical name -> weight, from the model in memory."
    return {canonical(n): p for n, p in lm.named_parameters() if p.ndim == 2}

@pytest.mark.parametrize('kind, tied', [('qwen2', False), ('qwen2', True), ('llama', False), ('mllama', False)])
@pytest.mark.parametrize('shards', [1, 4])
def test_real_checkpoints(kind, tied, shards, tmp_path):
    lm = build(kind, tied)
    lm.save_pretrained(tmp_path, **(dict(max_shard_size='8KB') if shards > 1 else {}))
    assert (len(list(tmp_path.glob('*.safetensors'))) > 1) == (shards > 1)
    ck, want = Checkpoint(tmp_path), expected(lm)
    assert set(ck.names()) == set(want) and ck.tied == tied
    for n, W in want.items(): assert torch.equal(ck.read(n), W) and ck.shapes()[n] == tuple(W.shape)
    assert {'layers.0.q', 'layers.0.v', 'layers.0.down', 'embed'} <= set(want)
    assert ('head' in ck.names()) != tied
    assert ck['layers.0.gate'][5:7] == (0, 'gate')

def test_mllama_names(tmp_path):
    build('mllama').save_pretrained(tmp_path)
    ck = Checkpoint(tmp_path)
    assert {'layers.1.cross_q', 'layers.1.cross_o', 'layers.2.q'} <= set(ck.names())
    assert ck['layers.1.cross_q'].type == 'cross_q' and 'layers.1.q' not in ck.matrices
    assert any(n.startswith('vision_model.') for n in ck.groups()['other']) and ck.groups()[2][0] == 'layers.2.q'

def test_mllama_on_disk_and_in_memory_are_the_same_names():
    for a, b in (('model.language_model.layers.3.cross_attn.q_proj.weight', 'language_model.model.layers.3.cross_attn.q_proj.weight'),
                 ('lm_head.weight', 'language_model.lm_head.weight'), ('model.language_model.embed_tokens.weight', 'language_model.model.embed_tokens.weight'),
                 ('model.multi_modal_projector.weight', 'multi_modal_projector.weight'), ('model.vision_model.x.weight', 'vision_model.x.weight')):
        assert canonical(a) == canonical(b)

def save(folder, name='model.safetensors', **tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder/name)
    return folder

def test_order_and_groups(tmp_path):
    t = {f'model.layers.{i}.self_attn.{n}_proj.weight': torch.ones(2, 2) for i in (10, 2, 0) for n in 'vq'}
    ck = Checkpoint(save(tmp_path, **t, **{'lm_head.weight': torch.ones(3, 2), 'model.embed_tokens.weight': torch.ones(3, 2), 'x.weight': torch.ones(2, 2)}))
    assert ck.names() == ['embed', 'layers.0.q', 'layers.0.v', 'layers.2.q', 'layers.2.v', 'layers.10.q', 'layers.10.v', 'head', 'x']
    assert ck.groups() == {'embed': ['embed'], 0: ['layers.0.q', 'layers.0.v'], 2: ['layers.2.q', 'layers.2.v'], 10: ['layers.10.q', 'layers.10.v'], 'head': ['head'], 'other': ['x']}
    assert ck.names('layers.*.q, head') == ['layers.0.q', 'layers.2.q', 'layers.10.q', 'head']

def test_left_out(tmp_path):
    ck = Checkpoint(save(tmp_path, **{'a.weight': torch.ones(2, 2), 'v.value_head.weight': torch.ones(2, 2), 'b': torch.ones(2), 'i': torch.ones(2, 2, dtype=torch.int32), 'c': torch.ones(2, 2, 2)}))
    assert ck.names() == ['a'] and sorted(ck.files[tmp_path/'model.safetensors']) == ['a.weight', 'b', 'c', 'i', 'v.value_head.weight']

def fails(message, f, kind=CheckpointError):
    with pytest.raises(kind) as e: f()
    assert message in str(e.value), str(e.value)
    assert e.value._render_traceback_()

def test_missing(tmp_path):
    fails('no such folder', lambda: Checkpoint(tmp_path/'nowhere'), CheckpointMissing)
    fails('no .safetensors file', lambda: Checkpoint(tmp_path), CheckpointMissing)
    (tmp_path/'pytorch_model.bin').write_bytes(b'')
    fails('pickled weights', lambda: Checkpoint(tmp_path))

def test_missing_shard(tmp_path):
    build('qwen2').save_pretrained(tmp_path, max_shard_size='8KB')
    shards = sorted(tmp_path.glob('*.safetensors'))
    shards[1].unlink()
    fails(f'1 of {len(shards)} shards are missing: {shards[1].name}', lambda: Checkpoint(tmp_path), CheckpointMissing)
    (tmp_path/'model.safetensors.index.json').unlink()
    fails(f'1 of {len(shards)} shards are missing: {shards[1].name}', lambda: Checkpoint(tmp_path), CheckpointMissing)

@pytest.mark.parametrize('size', [0, 5, 100, -8])
def test_cut_file(tmp_path, size):
    file = save(tmp_path, **{'a.weight': torch.ones(8, 8)})/'model.safetensors'
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    fails('cut short', lambda: Checkpoint(tmp_path))

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_not_finite(tmp_path, bad):
    W = torch.ones(4, 4, dtype=torch.bfloat16)
    W[1, 2] = bad
    ck = Checkpoint(save(tmp_path, **{'a.weight': W}))
    fails('a.weight holds 1 values that are NaN or infinite', lambda: ck.read('a'))

def test_nothing_to_read(tmp_path): fails('no 2-D', lambda: Checkpoint(save(tmp_path, norm=torch.ones(3))))

def test_same_name_twice(tmp_path):
    fails('are both layers.0.q', lambda: Checkpoint(save(tmp_path, **{f'{p}.layers.0.self_attn.q_proj.weight': torch.ones(2, 2) for p in ('model', 'language_model.model')})))

def test_broken_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    fails('the Hub gives nothing', lambda: Checkpoint('nobody-here/nothing-there'), CheckpointMissing)

def test_unknown_name(tmp_path):
    ck = Checkpoint(save(tmp_path, **{'a.weight': torch.ones(2, 2)}))
    with pytest.raises(KeyError, match="'b' is no matrix"): ck.read('b')
    fails("'b' matches none of a", lambda: ck.names('b'))
    fails('matches none', lambda: ck.names(''))

def test_pairs(tmp_path):
    one = {'model.embed_tokens.weight': torch.ones(5, 2), 'model.layers.0.mlp.up_proj.weight': torch.ones(4, 2)}
    a = Checkpoint(save(tmp_path/'a', **one))
    b = Checkpoint(save(tmp_path/'b', **one, **{'lm_head.weight': torch.ones(5, 2)}))
    c = Checkpoint(save(tmp_path/'c', **{'model.embed_tokens.weight': torch.ones(5, 2)}))
    d = Checkpoint(save(tmp_path/'d', **one | {'model.embed_tokens.weight': torch.ones(6, 2)}))
    assert paired(a, a) == ['embed', 'layers.0.up'] and paired(a, b) == ['embed', 'layers.0.up', 'head'] == paired(b, b)
    assert torch.equal(a.read('head'), a.read('embed'))
    fails('lacks layers.0.up', lambda: paired(a, c)); fails('lacks layers.0.up', lambda: paired(c, a))
    fails('embed is (5, 2)', lambda: paired(a, d))
    assert paired(a, d, 'layers.*') == ['layers.0.up']

def test_formats_agree(tmp_path):
    "One file, many shards, in either order: the same matrices."
    lm = build('llama')
    lm.save_pretrained(tmp_path/'one'); lm.save_pretrained(tmp_path/'many', max_shard_size='5KB')
    a, b = Checkpoint(tmp_path/'one'), Checkpoint(tmp_path/'many')
    assert paired(a, b) == a.names() and all(torch.equal(a.read(n), b.read(n)) for n in a.names())
    single = Checkpoint(tmp_path/'one'/'model.safetensors')
    assert single.names() == a.names()
