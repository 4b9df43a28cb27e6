"Files that someone made to do harm, continued: parameters, records, stages, notebooks, GGUF."
import json, os, shutil
from functools import partial
from pathlib import Path
from hypothesis import HealthCheck, Phase, given, seed as seeded, settings, strategies as st
import rlsft_nb.pipeline # what a page is drawn with, before any clock runs
from hostile_files import BOMBS, changed, junk, said, spoiled
from rlsft_nb.files import to_json
from rlsft_nb.parameters import _read_layer, load_params, show_params, yaml_mapping
from rlsft_nb.places import ROOT
from rlsft_nb.stages import Stage, run_stage
from watch import Watch

# --- parameters

LAUGHS = 'a: &a [x,x,x,x,x,x,x,x,x]\n' + '\n'.join(f'{b}: &{b} [{",".join([f"*{a}"]*9)}]' for a, b in zip('abcdefgh', 'bcdefghi'))
YAML = [LAUGHS, 'game: &g {target: 24}\nsft: *g', '\tsft: {}', 'sft:\n\tlr: 1.0', 'sft: {lr: .nan}', 'sft: {lr: .inf}', 'sft: {lr: -.inf}', 'sft: {checkpoints: [.nan]}', 'sft: {steps: 1e999}', 'sft: {steps: ' + '9'*5000 + '}', 'sft: {lr: 1' + '0'*400 + '}',
        '!!python/object/apply:os.system ["true"]', 'sft: !!python/name:os.system', '!!binary "x"', '!!int "x"', '!!float "x"', '!!timestamp "x"', 'sft: {checkpoints: [2001-99-99]}', 'sft: {checkpoints: [2001-01-01]}', 'sft: {checkpoints: !!set {a, b}}', 'sft: {checkpoints: !!binary aGVq}', '? [a]\n: 1', '{{}: 1}', '[', '{'*5000,
        '['*5000, '- '*3000, 'a: b: c', '%YAML 9.9\n---\n{}', '--- {}\n--- {}', '\ufeff{}', '\0', 'sft: {<<: {lr: 1.0}}', 'sft: {<<: 3}', 'sft: {lr: 0x_}', 'sft: {lr: 1_000:99}', '1: 2', 'null: 1', 'true: 1', 'sft: null', 'sft: {steps: true}', 'model: {path: "\\uD800"}', '"\\UFFFFFFFF": 1', '=: =', 'sft: {checkpoints: {a: 1}}', '!<tag:yaml.org,2002:map> x']
piece = st.sampled_from(['sft', 'lr', 'steps', 'game', ': ', ', ', '{', '}', '[', ']', '\n', '  ', '\t', '- ', '&a ', '*a', '!!float ', '!!int ', '!', '|', '>', '"', "'", '#', '.nan', '1e9', '---', '<<', '%', '@', '`', '\0', '\x85', '😀'])
yamls = st.one_of(st.sampled_from(YAML), st.lists(piece, max_size=12).map(''.join), st.sampled_from([p.read_text() for p in sorted((ROOT/'params').glob('*.yaml'))]).flatmap(lambda t: spoiled(t.encode())).map(lambda b: b.decode('latin1')),
                  st.dictionaries(st.sampled_from(['sft', 'game', 'eval', 'ppo', 'model', 'x']), st.dictionaries(st.sampled_from(['lr', 'steps', 'checkpoints', 'target', 'path', 'x']), junk, max_size=2), max_size=2).map(json.dumps))

def parameters(at, text):
    cfg = load_params('tiny', yaml_mapping(text, 'given'))
    Stage('x', 'tiny', cfg); to_json(cfg); show_params(cfg)

def layer(at, text):
    (at/'m.yaml').write_text(text, encoding='utf-8', errors='surrogatepass')
    _read_layer(at/'m.yaml')

# --- records, and what stands beside a run

def report(at, _):
    from rlsft_nb.report import main
    said(main(['--out', str(at/'page.html'), '--quiet']))

def agreed(at, _):
    from rlsft_nb.agree import main
    said(main(['--quiet']))

def published(at, _):
    from rlsft_nb.records import publish
    publish('tiny', dry=True)

def staged(at, _):
    up = Stage('x', 'tiny', {}); st_ = Stage('y', 'tiny', {}, [up])
    for s in (up, st_):
        run_stage(s, lambda folder: dict(n=1), {})
        assert s.results() == dict(n=1) and s.config()['params'] == {} # what was spoilt was made again

def noted(at, _):
    from rlsft_nb.runner import known_seconds, numbered, up_to_date
    nb = numbered()[0]
    assert not up_to_date(nb, dict(model='tiny', seed=0)); known_seconds('tiny')

def noticed(at, _):
    from rlsft_nb.papermill_line import notebook_params
    notebook_params(at/'n.ipynb')

def converted(at, _):
    from rlsft_nb.weights import open_checkpoint
    ck = open_checkpoint(at/'m.gguf')
    for n in ck.names(): ck.read(n, finite=False)

def gguf_file(path):
    "A small model with a tokenizer, as llama.cpp writes one."
    import gguf, numpy as np
    w, g = gguf.GGUFWriter(str(path), 'llama'), np.random.default_rng(0)
    d, ff, v = 8, 16, 12
    w.add_block_count(1); w.add_context_length(32); w.add_embedding_length(d); w.add_feed_forward_length(ff); w.add_head_count(2); w.add_head_count_kv(2); w.add_layer_norm_rms_eps(1e-5); w.add_vocab_size(v)
    w.add_tokenizer_model('gpt2'); w.add_token_list(['t', '0', 't0', *map(chr, range(97, 94 + v))]); w.add_token_types([1]*v); w.add_token_merges(['t 0']); w.add_bos_token_id(0); w.add_eos_token_id(1)
    shapes = dict(token_embd=(v, d), output=(v, d), output_norm=(d,)) | {f'blk.0.{n}': s for n, s in dict(attn_q=(d, d), attn_k=(d, d), attn_v=(d, d), attn_output=(d, d), attn_norm=(d,), ffn_norm=(d,), ffn_gate=(ff, d), ffn_up=(ff, d), ffn_down=(d, ff)).items()}
    for n, s in shapes.items(): w.add_tensor(f'{n}.weight', g.standard_normal(s).astype('f4'))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return Path(path).read_bytes()

@st.composite
def ggufs(draw, data):
    "A GGUF file whose numbers lie."
    new = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from([4, 8, 16]) | st.integers(0, min(2200, len(data) - 8)))
        new[at:at + 8] = draw(st.sampled_from([0, 1, 2, 9, 2**16, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])).to_bytes(8, 'little') if draw(st.booleans()) else draw(st.binary(min_size=1, max_size=8))
    return bytes(new[:draw(st.integers(0, len(data)))] if draw(st.integers(0, 3)) == 0 else new)

def campaign(n:int, seed:int, folder) -> Watch:
    "`n` spoiled texts, each put to the use that reads it."
    folder, at, runs, figures = Path(folder), Path(folder)/'work', Path(folder)/'runs', Path(folder)/'figures'
    os.environ['RLSFT_RUNS'], os.environ['RLSFT_FIGURES'] = str(runs), str(figures)
    w = Watch([at, runs, figures])
    source = ROOT/'figures'/'tiny'
    names = sorted(p.name for p in source.glob('*-seed0.json'))
    nb, gguf = next((ROOT/'nbs').glob('00_*.ipynb')).read_bytes(), gguf_file(folder/'m.gguf')
    def fresh():
        for d in (at, runs, figures): shutil.rmtree(d, ignore_errors=True); d.mkdir(parents=True)
    def record(name, data, use):
        here, there = figures/'tiny', runs/'tiny'/'records'
        for d in (here, there) if use is agreed else (there,): shutil.copytree(source, d, ignore=lambda _, fs: [f for f in fs if not f.endswith('-seed0.json')])
        (there/name).write_bytes(data)
    def stages():
        up = run_stage(Stage('x', 'tiny', {}), lambda folder: dict(n=1), {})
        run_stage(Stage('y', 'tiny', {}, [up]), lambda folder: dict(n=1), {})
        return [p for s in sorted((runs/'tiny').iterdir()) if s.is_dir() for p in sorted(s.glob('*.json'))]
    def spoil(draw, path): path.write_bytes(draw(st.one_of(spoiled(path.read_bytes()), changed(json.loads(path.read_text())).map(lambda x: json.dumps(x).encode()))))
    fresh(); record(names[0], (source/names[0]).read_bytes(), agreed); report(at, 0); (at/'m.gguf').write_bytes(gguf); converted(at, 0) # what libraries do once
    @settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @seeded(seed)
    @given(st.sampled_from(['yaml', 'yaml', 'layer', 'record', 'stage', 'note', 'notebook', 'gguf', 'gguf']), st.data())
    def one(kind, data):
        fresh()
        draw, text, use = data.draw, '', dict(yaml=parameters, layer=layer, stage=staged, note=noted, notebook=noticed, gguf=converted).get(kind)
        match kind:
            case 'yaml' | 'layer': text = draw(yamls)
            case 'record':
                use, name = draw(st.sampled_from([report, agreed, published])), draw(st.sampled_from(names))
                was = (source/name).read_bytes()
                text = draw(spoiled(was) | changed(json.loads(was)).map(lambda x: json.dumps(x).encode()))
                record(name, text, use); kind = f'{name} {use.__name__}'
            case 'stage': # its bytes hold the time, so what is drawn may not depend on them
                path, how = stages()[draw(st.integers(0, 5))], draw(st.floats(0, 1) | st.sampled_from(BOMBS) | junk.map(json.dumps))
                was = path.read_bytes()
                path.write_bytes(was[:int(how*len(was))] if isinstance(how, float) else how if isinstance(how, bytes) else how.encode())
                kind, text = f'{path.parent.name[:1]}/{path.name}', path.read_bytes()
            case 'note':
                p = runs/'tiny'/'00_game.json'; p.parent.mkdir(); (p.parent/'00_game.ipynb').write_bytes(nb); p.write_text(json.dumps(dict(fingerprint='x', seconds=1., files={'00_game.ipynb': 'x'}, figures=[], stages=[]))); spoil(draw, p); text = p.read_bytes()
            case 'notebook': text = draw(spoiled(nb) | changed(json.loads(nb)).map(lambda x: json.dumps(x).encode())); (at/'n.ipynb').write_bytes(text)
            case 'gguf': text = draw(ggufs(gguf)); (at/'m.gguf').write_bytes(text)
        w(partial(use, at, text), (kind, text[:300] if len(text) < 5000 else len(text)))
    one()
    return w
