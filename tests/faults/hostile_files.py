"Files that someone made to do harm: checkpoints, configurations, tokenizers, adapters, parameters, records, notebooks, GGUF."
import json, os, shutil, struct, time
from functools import partial
from pathlib import Path
import torch
from hypothesis import HealthCheck, Phase, given, seed as seeded, settings, strategies as st
from safetensors.torch import save
from watch import SECONDS, Watch

# --- values that no file should hold

HUGE = [2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
WORDS = ['', ' ', '\0', '../../x', '/etc/passwd', 'a/b', '..', '.', '{', '{x}', '%s', '<script>alert(1)</script>', '\ud800', 'é' * 300, 'x' * 5000, 'nan', '-1', '(a+)+$', '[', '*', 'auto', 'true']
leaf = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from(HUGE + [-n for n in HUGE]), st.floats(), st.sampled_from(WORDS), st.text(max_size=8))
junk = st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), x, max_size=3), max_leaves=6)

def places(x, at=()):
    "Every place in nested lists and dicts."
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from places(v, (*at, k))

def put(x, at, value):
    "A copy of `x` with another value at a place; the place is taken away where the value is `...`."
    if not at: return {} if value is ... else value
    new = dict(x) if isinstance(x, dict) else list(x)
    if len(at) == 1 and value is ...: del new[at[0]]
    else: new[at[0]] = put(new[at[0]], at[1:], value)
    return new

@st.composite
def changed(draw, x, known=()):
    "A JSON value with some of its parts, or keys that are looked for, replaced or taken away."
    for _ in range(draw(st.integers(1, 3))):
        if known and isinstance(x, dict) and draw(st.booleans()): x = x | {draw(st.sampled_from(known)): draw(junk | st.sampled_from([0, -1, 7, 10**4, 10**6, 10**9]))}
        else: x = put(x, draw(st.sampled_from(list(places(x))[:400])), draw(st.just(...) | junk))
    return x

BOMBS = [b'', b'\0'*40, b'{', b'[]', b'null', b'"x"', b'1e999', b'NaN', b'\xff\xfe{\0}\0', b'\xef\xbb\xbf{}', b'{"a": "\\ud800"}', b'['*100_000, b'{"a":'*100_000, b'[' + b'9'*10_000 + b']', b'{"a":' + b'1'*5000 + b'}',
         b'{"a": 1, "a": 2}', b'{"a": "' + b'x'*10**6 + b'"}', b'{' + b','.join(b'"%d": 0' % i for i in range(10**5)) + b'}', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n']

def spoiled(data:bytes):
    "Bytes cut at random, with bytes changed, or others altogether."
    cut = st.integers(0, len(data)).map(lambda n: data[:n])
    flip = st.lists(st.tuples(st.integers(0, max(0, len(data) - 1)), st.integers(0, 255)), min_size=1, max_size=8).map(lambda at: bytes(bytearray(data[:0]) + _flipped(data, at)))
    return st.one_of(cut, flip, st.sampled_from(BOMBS), st.binary(max_size=64), st.binary(max_size=16).map(lambda x: data + x))

def _flipped(data, at):
    new = bytearray(data)
    for i, b in at:
        if i < len(new): new[i] = b
    return new

# --- safetensors by hand: the header is a list of pairs, so that a key may stand there twice

def header(data:bytes): n = struct.unpack('<Q', data[:8])[0]; return list(json.loads(data[8:8 + n]).items()), data[8 + n:]

def packed(pairs, body, size=None, pad=b''):
    text = ('{' + ','.join(f'{json.dumps(k)}:{json.dumps(v)}' for k, v in pairs) + '}').encode() + pad
    return struct.pack('<Q', len(text) if size is None else size) + text + body

NAMES = ['../../../x', '/tmp/x', 'a/b\0c', '\0', '', '.', '..', 'x'*10_000, '\ud800', '__metadata__', 'model.layers.99999999999.mlp.up_proj.weight', 'model.layers.-1.mlp.up_proj.weight', 'model.layers.0.mlp.experts.gate_up_proj', 'lm_head.weight',
         'model.layers.0.mlp.experts.99999999999.gate_proj.weight', 'model.layers.٣.mlp.up_proj.weight', 'layers.0.layers.1.layers.2.weight', 'model.layers.0.x.².weight', 'line\nbreak', '\x1b[2J', 'a.weight_scale', 'a.weight_scale_inv', 'a.qweight', 'model.layers.0.mlp.experts.down_proj_scales']
DTYPES = ['BF16', 'F16', 'F32', 'F64', 'F8_E4M3', 'F8_E5M2', 'F8_E8M0', 'F4', 'I8', 'U8', 'I16', 'U16', 'I32', 'U32', 'I64', 'U64', 'BOOL', 'C64', 'f32', 'X', '', None, 3]
number = st.one_of(st.integers(-2, 70), st.sampled_from(HUGE + [-n for n in HUGE]), st.sampled_from([1.5, '3', None, True, [1], 1e300]))

@st.composite
def tensors(draw, data:bytes):
    "A safetensors file with a header that lies."
    pairs, body = header(data)
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(pairs) - 1))
        k, v = pairs[i]
        v = dict(v) if isinstance(v, dict) else {}
        match draw(st.sampled_from(['offsets', 'shift', 'shape', 'fold', 'dtype', 'twice', 'name', 'empty', 'field', 'metadata', 'swap', 'more'])):
            case 'offsets': v['data_offsets'] = draw(st.lists(number, min_size=0, max_size=3))
            case 'shift': d = draw(st.integers(-9, 9)); v['data_offsets'] = [o + d for o in v.get('data_offsets', [0, 0]) if isinstance(o, int)]
            case 'shape': v['shape'] = draw(st.lists(number, max_size=5))
            case 'fold': v['shape'] = draw(st.permutations([1]*draw(st.integers(0, 40)) + [s for s in v.get('shape', []) if isinstance(s, int)]))
            case 'dtype': v['dtype'] = draw(st.sampled_from(DTYPES))
            case 'twice': pairs.append((k, v)); continue
            case 'name': k = draw(st.sampled_from(NAMES) | st.text(max_size=20))
            case 'empty': at = v.get('data_offsets', [0]); pairs.append((draw(st.sampled_from(NAMES)), dict(dtype='F32', shape=draw(st.permutations([0, draw(st.sampled_from([1, 4, 10**6, 2**31, 2**62])), 2])), data_offsets=[at[0] if at else 0]*2))); continue
            case 'field': v = draw(changed(v, ('dtype', 'shape', 'data_offsets')))
            case 'metadata': pairs.append(('__metadata__', draw(junk))); continue
            case 'swap': j = draw(st.integers(0, len(pairs) - 1)); pairs[j], v = (pairs[j][0], v), pairs[j][1]
            case 'more': n = draw(st.integers(1, 64)); pairs.append((f'x{n}.weight', dict(dtype='U8', shape=[1, n], data_offsets=[len(body), len(body) + n]))); body += bytes(n); continue
        pairs[i] = k, v
    size = draw(st.none() | st.none() | st.none() | st.sampled_from([0, 1, 7, 2**20, 2**62, 2**63, 2**64 - 1]))
    return packed(pairs, body, size, draw(st.sampled_from([b'', b'', b'', b' ', b'\0', b'}', b' '*1000])))

# --- checkpoints of every form that is read

def _plain(g, layers=2, d=8):
    t = {'model.embed_tokens.weight': (12, d), 'model.norm.weight': (d,), 'lm_head.weight': (12, d)}
    for i in range(layers):
        t |= {f'model.layers.{i}.self_attn.{c}_proj.weight': (d, d) for c in 'qkvo'} | {f'model.layers.{i}.mlp.{n}_proj.weight': (d, 2*d) if n == 'down' else (2*d, d) for n in ('gate', 'up', 'down')} | {f'model.layers.{i}.input_layernorm.weight': (d,)}
    return {k: torch.randn(s, generator=g) for k, s in t.items()}

def forms(folder, pico) -> dict: # name -> folder
    "One small checkpoint of each form."
    g, out = torch.Generator().manual_seed(0), {}
    def write(name, tensors, config=None, file='model.safetensors'):
        out[name] = folder/name; out[name].mkdir(parents=True, exist_ok=True)
        (folder/name/file).write_bytes(save(tensors))
        if config is not None: (folder/name/'config.json').write_text(json.dumps(config))
    base = _plain(g)
    write('plain', base, dict(model_type='qwen2', tie_word_embeddings=False, num_hidden_layers=2, hidden_size=8))
    write('other', {k: v + .01*torch.randn(v.shape, generator=g) for k, v in base.items()}, dict(model_type='qwen2', tie_word_embeddings=False, num_hidden_layers=2, hidden_size=8))
    write('fused', base | {'model.layers.0.mlp.experts.gate_up_proj': torch.randn(3, 16, 8), 'model.layers.0.mlp.experts.down_proj': torch.randn(3, 8, 8), 'model.layers.1.mlp.experts.w13': torch.randn(2, 4, 4)}, dict(model_type='x', hidden_size=8))
    write('dbrx', {'transformer.blocks.0.ffn.experts.mlp.w1': torch.randn(12, 8), 'transformer.blocks.0.ffn.experts.mlp.w2': torch.randn(12, 8), 'transformer.wte.weight': torch.randn(9, 8)}, dict(model_type='dbrx', ffn_config=dict(moe_num_experts=3)))
    write('fp8', base | {'a.weight': torch.randn(8, 8).to(torch.float8_e4m3fn), 'a.weight_scale_inv': torch.rand(2, 2)}, dict(model_type='x', quantization_config=dict(quant_method='fp8', weight_block_size=[4, 4])))
    write('mxfp4', base | {f'model.layers.0.mlp.experts.{n}_{w}': torch.zeros(s, dtype=torch.uint8) for n, r in (('gate_up_proj', 4), ('down_proj', 32)) for w, s in (('blocks', (2, r, 1, 16)), ('scales', (2, r, 1)))}, dict(model_type='gpt_oss', hidden_size=32, quantization_config=dict(quant_method='mxfp4')))
    write('tied', {k: v for k, v in base.items() if k != 'lm_head.weight'}, dict(model_type='llama', tie_word_embeddings=True))
    write('lora', {f'base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight': torch.randn(s) for x, s in (('A', (2, 8)), ('B', (8, 2)))} | {'base_model.model.model.layers.1.mlp.up_proj.lora_A.weight': torch.randn(2, 8), 'base_model.model.model.layers.1.mlp.up_proj.lora_B.weight': torch.randn(16, 2)}, None, 'adapter_model.safetensors')
    (folder/'lora'/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=2, lora_alpha=4, base_model_name_or_path=str(folder/'plain'), rank_pattern={'up_proj': 2}, alpha_pattern={}, use_rslora=False, use_dora=False, init_lora_weights=True)))
    write('shards', dict(list(base.items())[:9]), dict(model_type='qwen2', tie_word_embeddings=False), 'model-00001-of-00002.safetensors')
    (folder/'shards'/'model-00002-of-00002.safetensors').write_bytes(save(dict(list(base.items())[9:])))
    (folder/'shards'/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={k: f'model-0000{1 + (i > 8)}-of-00002.safetensors' for i, k in enumerate(base)})))
    shutil.copytree(pico, folder/'pico'); out['pico'] = folder/'pico'
    return out

CONFIG = ('model_type', 'tie_word_embeddings', 'text_config', 'quantization_config', 'num_hidden_layers', 'hidden_size', 'transformers_weights', 'ffn_config', 'auto_map', 'architectures', 'layer_types', 'rope_parameters', 'vocab_size', 'd_model',
          'num_attention_heads', 'max_position_embeddings', 'eos_token_id', 'pad_token_id', 'dtype', 'num_labels', 'id2label')
ADAPTER = ('peft_type', 'r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'base_model_name_or_path', 'revision', 'use_dora', 'use_rslora', 'init_lora_weights', 'layer_replication', 'ensure_weight_tying')
INDEX = ('weight_map', 'metadata')
TOKENIZER = ('chat_template', 'eos_token', 'pad_token', 'tokenizer_class', 'auto_map', 'added_tokens_decoder', 'model_max_length', 'extra_special_tokens', 'additional_special_tokens', 'padding_side')
KEYS = {'config.json': CONFIG, 'adapter_config.json': ADAPTER, 'model.safetensors.index.json': INDEX, 'tokenizer_config.json': TOKENIZER, 'tokenizer.json': ('model', 'added_tokens', 'normalizer', 'pre_tokenizer', 'decoder'), 'generation_config.json': CONFIG}

@st.composite
def hostile(draw, made:dict):
    "A form of checkpoint, and the file of it that is spoiled, with its new bytes."
    name = draw(st.sampled_from([n for n in made if n != 'other'] + ['pico', 'pico']))
    files = sorted(f for f in made[name].iterdir() if f.suffix in ('.json', '.safetensors'))
    f = draw(st.sampled_from(files))
    data = f.read_bytes()
    if draw(st.integers(0, 4)) == 0: return name, f.name, draw(spoiled(data))
    if f.suffix == '.safetensors': return name, f.name, draw(tensors(data))
    return name, f.name, json.dumps(draw(changed(json.loads(data), KEYS.get(f.name, ())))).encode()

# --- what is done with them

def read_all(folder):
    from rlsft_nb.weights import open_checkpoint
    ck = open_checkpoint(folder)
    for n in ck.matrices: ck.read(n, finite=False)
    for n in ck.others: ck.read_other(n)
    for keys in ck.files.values():
        for k in keys: ck.written(k)
    ck.summary(), ck.stamp(), ck.text(), ck.unwritable, ck.headless, repr(ck)

def restored(good, folder, turned=False):
    from rlsft_nb.surgery import restore
    out = folder.parent/'out'
    try: restore(*((good, folder) if turned else (folder, good)), out, 'blend', strength=.5)
    finally: shutil.rmtree(out, ignore_errors=True)

def compared(good, folder):
    from rlsft_nb.comparison_page import main
    out = folder.parent/'out'
    try: said(main([str(good), str(folder), '--out', str(out), '--draws', '2', '--workers', '1', '--quiet']))
    finally: shutil.rmtree(out, ignore_errors=True)

class Said(AssertionError): pass

def said(code):
    "What a command told must be one line."
    import sys
    err = sys.stderr.getvalue() if hasattr(sys.stderr, 'getvalue') else ''
    if code not in (0, 1, 2) or code and (err.count('\n') != 1 or 'Traceback' in err): raise Said(f'code {code}, said {err[-300:]!r}')

def loaded(folder):
    from rlsft_nb.models import load_lm
    lm, tok = load_lm(str(folder))
    tok.apply_chat_template([dict(role='user', content='x')], tokenize=False)

def many(n, form='"w{0}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'):
    text = ('{' + ','.join(form.format(i) for i in range(n)) + '}').encode()
    return struct.pack('<Q', len(text)) + text

def stack(layers, experts):
    "A small file with more experts than memory holds."
    size, step = 2*experts, [f'model.layers.{i}.mlp.experts.gate_up_proj' for i in range(layers)]
    return packed([(k, dict(dtype='BF16', shape=[experts, 1, 1], data_offsets=[i*size, (i + 1)*size])) for i, k in enumerate(step)], bytes(layers*size))

def _into(file, data): return lambda folder: (folder/file).write_bytes(data)

def _pipe(file):
    def make(folder): (folder/file).unlink(missing_ok=True); os.mkfifo(folder/file)
    return make

def _link(file, to):
    def make(folder): (folder/file).unlink(missing_ok=True); os.symlink(to, folder/file)
    return make

NASTY = dict(million_tensors=_into('model.safetensors', many(10**6)), most_tensors=_into('model.safetensors', many(280_000)), experts=_into('model.safetensors', stack(1, 10**7)), stacks=_into('model.safetensors', stack(300, 4096)),
             pipe=_pipe('model.safetensors'), pipe_config=_pipe('config.json'), pipe_tokenizer=_pipe('tokenizer.json'), loop=_link('model.safetensors', 'model.safetensors'), zero=_link('config.json', '/dev/zero'), noise=_link('model.safetensors', '/dev/urandom'),
             layers=_into('config.json', b'{"model_type": "qwen2", "num_hidden_layers": 1000000000}'), labels=_into('config.json', b'{"model_type": "bert", "num_labels": 1000000000}'), width=_into('config.json', b'{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1000000, "vocab_size": 1000000}'),
             positions=_into('config.json', b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 1000000000, "n_layer": 1}'), nested=_into('config.json', b'{"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 1000000000}}'),
             remote=_into('config.json', b'{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}'), numbered=lambda f: (f/'model.safetensors').rename(f/'model-00001-of-99999.safetensors'), numbers=lambda f: (f/'model.safetensors').rename(f/'model-1-of-99999999999.safetensors'))

HEAVY = ('million_tensors', 'most_tensors', 'stacks', 'positions', 'width')

def campaign(n:int, seed:int, folder, pico, heavy:bool=True) -> Watch:
    "`n` spoiled checkpoints, each put to one use; then those of `NASTY`, each to three."
    folder, good = Path(folder), forms(Path(folder)/'good', pico)
    w, at = Watch([folder/'work']), folder/'work'/'ck'
    uses = dict(read=read_all, restored=partial(restored, good['other']), reference=partial(restored, good['other'], turned=True), compared=partial(compared, good['other']), loaded=loaded)
    at.parent.mkdir(parents=True, exist_ok=True)
    for use in ('restored', 'compared', 'loaded'): uses[use](shutil.copytree(good['pico' if use == 'loaded' else 'plain'], at)); shutil.rmtree(at) # what libraries do once
    begun = time.process_time()
    uses['compared'](shutil.copytree(good['plain'], at)); shutil.rmtree(at)
    seconds = SECONDS + time.process_time() - begun # a page of a good one takes most of ten seconds where the machine has other work
    @settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @seeded(seed)
    @given(hostile(good), st.sampled_from(['read', 'read', 'restored', 'reference', 'compared']), st.sampled_from(['loaded', 'loaded', 'read']))
    def one(spoilt, use, of_model):
        name, file, data = spoilt
        shutil.rmtree(at, ignore_errors=True); shutil.copytree(good[name], at)
        (at/file).write_bytes(data)
        use = of_model if name == 'pico' else use
        w(partial(uses[use], at), (use, name, file, data[:300] if len(data) < 5000 else len(data)), seconds=seconds)
    one()
    for name, make in NASTY.items():
        if name in HEAVY and not heavy: continue
        shutil.rmtree(at, ignore_errors=True); shutil.copytree(good['plain'], at)
        make(at)
        for use in ('read', 'restored', 'loaded'): w(partial(uses[use], at), (use, name))
    return w
