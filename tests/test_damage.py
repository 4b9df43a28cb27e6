"What the campaign of faults found, one kind a test."
import json, os, resource, shutil, struct
import pytest, torch
from safetensors.torch import save_file
from rlsft_nb import files, intervals, surgery
from rlsft_nb.files import *
from rlsft_nb.machine import *
from rlsft_nb.origins import *
from rlsft_nb.parallel import *
from rlsft_nb.parameters import *
from rlsft_nb.places import *
from rlsft_nb.problems import *
from rlsft_nb.stages import *
from rlsft_nb.generation import ModelError
from rlsft_nb.models import load_lm, save_lm
from rlsft_nb.weights import Checkpoint

# stages

def work(folder):
    write_json(folder/'more.json', dict(a=1))
    save_file({'w': torch.ones(4, 4)}, folder/'model.safetensors')
    (folder/'chat_template.jinja').write_text('{% for m in messages %}{{ m }}{% endfor %}')
    return dict(n=1)

@pytest.mark.parametrize('name', ['results.json', 'config.json', 'done.json', 'more.json', 'model.safetensors', 'chat_template.jinja'])
def test_a_stage_that_was_cut_is_made_again(name, capsys):
    s = run_stage(Stage('a', 'm', {}), work, {})
    assert s.done
    os.truncate(s.path/name, (s.path/name).stat().st_size//2)
    assert not s.done and s.damage() == name
    assert run_stage(s, work, {}).results() == dict(n=1) and f'm/{s.path.name}: {name} is damaged' in capsys.readouterr().err

@pytest.mark.parametrize('name', ['chat_template.jinja', 'tokenizer.json', 'model.safetensors'])
def test_a_checkpoint_that_was_cut_before_its_stage_was_done(name, capsys, pico):
    "A template that is cut may still be one, of other prompts."
    s, times = Stage('a', 'm', {}), []
    def steps(folder):
        if not (folder/'step-2').exists(): times.append(2); save_lm(*load_lm(str(pico['qwen2'])), folder/'step-2')
        if len(times) == 1: os.truncate(folder/'step-2'/name, (folder/'step-2'/name).stat().st_size//2); raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt): run_stage(s, steps, {})
    assert run_stage(s, steps, {}).done and times == [2, 2] and 'is damaged; the stage is made again' in capsys.readouterr().err

def test_weights_that_were_taken_away_are_no_damage():
    s = run_stage(Stage('a', 'm', {}), work, {})
    (s.path/'model.safetensors').unlink()
    assert s.done

def test_what_a_kill_left_goes():
    s = Stage('a', 'm', {})
    for n in ('.results.json.00000000-1.part', '.step-2.999999999'): (s.path/n).mkdir(parents=True)
    (s.path/'keep.json').write_text('{}')
    run_stage(s, lambda folder: {}, {})
    assert not list(s.path.glob('.*')) and (s.path/'keep.json').exists()

def test_a_cut_item_is_made_again(tmp_path):
    run = lambda: map_items('intervals.wilson', dict(a=(1, 2), b=(2, 2)), tmp_path, 1, 'x')
    first = run()
    (tmp_path/'a.json').write_text('[0.')
    assert run() == first

def test_a_half_written_file_of_a_dead_process_goes(tmp_path):
    for pid in (2**22 + 1, os.getppid()): (tmp_path/f'.a.json.{files._HOST}-{pid}.part').write_text('')
    write_json(tmp_path/'a.json', 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'.a.json.{files._HOST}-{os.getppid()}.part', 'a.json'] # that one may still write

def test_a_folder_that_is_taken_away_is_told():
    def vanish(folder): shutil.rmtree(folder); return open(folder/'x').read()
    with pytest.raises(DiskError, match='stage m/a-.*No such file or directory'): run_stage(Stage('a', 'm', {}), vanish, {})

def test_a_killed_worker_is_told():
    with pytest.raises(WorkerLost, match='a worker process ended before its work was done'), process_pool(1) as pool: pool.submit(os.abort).result()

def test_sealed_folders(tmp_path):
    (tmp_path/'a').write_text('abc')
    assert intact(tmp_path)
    seal(tmp_path)
    assert intact(tmp_path)
    os.truncate(tmp_path/'a', 1)
    assert not intact(tmp_path)

def test_limits_count_as_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    free, held = free_bytes(), int(open('/proc/self/statm').read().split()[0])*4096
    try: resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, before[1])); assert 0 < free_bytes() < 2**28 + 2**20 < free
    finally: resource.setrlimit(resource.RLIMIT_AS, before)

# parameters

@pytest.mark.parametrize('text, told', [('a: &a [1]\nb: *a', 'aliases'), ('\tsft: {}', 'not YAML'), ('!!timestamp "x"', 'not YAML'), ('sft: {steps: ' + '9'*5000 + '}', 'not YAML'), ('['*3000, 'not YAML'), ('!!int "x"', 'not YAML')])
def test_texts_that_are_no_parameters(text, told):
    with pytest.raises(ParamError, match=told) as e: yaml_mapping(text, 'given')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('text', ['sft: {lr: .nan}', 'sft: {lr: -.inf}', 'sft: {checkpoints: [.nan]}', 'sft: {checkpoints: [2001-01-01]}'])
def test_numbers_that_are_none(text):
    with pytest.raises(ParamError, match='a number or a kind that is not taken'): load_params('tiny', yaml_mapping(text, 'given'))

# checkpoints

@pytest.fixture
def ck(tmp_path):
    save_file({f'model.layers.0.self_attn.{c}_proj.weight': torch.ones(4, 4) for c in 'qk'}, tmp_path/'model.safetensors')
    return tmp_path

@pytest.mark.parametrize('config, told', [(dict(model_type=[]), 'model_type is list'), (dict(text_config=[1]), 'text_config is list'), (dict(quantization_config=3), 'quantization_config is int'), (dict(ffn_config=[]), 'ffn_config is list'),
    (dict(num_hidden_layers=10**9), 'num_hidden_layers=1000000000, expected a whole number up to 1,000'), (dict(transformers_weights='../x.safetensors'), 'is no file of this folder'), (dict(text_config=dict(num_hidden_layers=10**9)), 'num_hidden_layers=1000000000')])
def test_configurations_of_another_kind(ck, config, told):
    (ck/'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as e: Checkpoint(ck)
    assert told in str(e.value)

def test_a_header_that_is_too_large_and_a_name_that_is_too_long(ck):
    head = ('{' + ','.join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(320_000)) + '}').encode()
    (ck/'model.safetensors').write_bytes(struct.pack('<Q', len(head)) + head + b' ')
    with pytest.raises(CheckpointError, match='its header has|cut short'): Checkpoint(ck)
    save_file({'x'*1001: torch.ones(2, 2)}, ck/'model.safetensors')
    with pytest.raises(CheckpointError, match='a name of 1,001 characters'): Checkpoint(ck)

def test_a_small_file_of_many_experts(ck):
    save_file({'model.layers.0.mlp.experts.gate_up_proj': torch.zeros(5000, 1, 1), 'a.weight': torch.ones(2, 2)}, ck/'model.safetensors')
    assert Checkpoint(ck).names() == ['a'] # a stack, and no experts

def test_scales_that_fit_nothing(ck):
    save_file({'a.weight': torch.ones(4, 4).to(torch.float8_e4m3fn), 'a.weight_scale': torch.ones(1, 2, 2)}, ck/'model.safetensors')
    with pytest.raises(MatrixError, match='do not divide'): Checkpoint(ck).read('a')
    (ck/'config.json').write_text(json.dumps(dict(quantization_config=dict(weight_block_size=[4]))))
    with pytest.raises(CheckpointError, match='expected two positive whole numbers'): Checkpoint(ck)

@pytest.mark.parametrize('more, told', [(dict(alpha_pattern=[1]), 'alpha_pattern is list'), (dict(alpha_pattern={'(a+)+$': 1}), 'may take for ever'), (dict(alpha_pattern={'[': 1}), 'no regular expression'), (dict(lora_alpha='x'), 'lora_alpha is str'), (dict(base_model_name_or_path={}), 'base_model_name_or_path is dict')])
def test_adapters_of_another_kind(ck, tmp_path, more, told):
    at = tmp_path/'lora'; at.mkdir()
    save_file({f'base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight': torch.ones(s) for x, s in (('A', (2, 4)), ('B', (4, 2)))}, at/'adapter_model.safetensors')
    (at/'adapter_config.json').write_text(json.dumps(dict(r=2, lora_alpha=4, base_model_name_or_path=str(ck)) | more))
    with pytest.raises(CheckpointError) as e: Checkpoint(at)
    assert told in str(e.value)

def test_a_configuration_larger_than_its_files(pico, tmp_path):
    from rlsft_nb.models import load_lm
    at = shutil.copytree(pico['qwen2'], tmp_path/'ck')
    config = json.loads((at/'config.json').read_text())
    (at/'config.json').write_text(json.dumps(config | dict(vocab_size=10**6, hidden_size=10**4)))
    with pytest.raises(ModelError, match='config.json asks for .* parameters, its files hold'): load_lm(str(at))

def test_a_restore_that_cannot_begin_leaves_nothing(ck, tmp_path, monkeypatch):
    def full(*_): raise DiskError('full')
    monkeypatch.setattr(surgery, 'atomic_write', full)
    other = shutil.copytree(ck, tmp_path/'other', ignore=lambda *_: ['other'])
    with pytest.raises(DiskError): surgery.restore(other, ck, tmp_path.parent/'out', 'blend', strength=.5)
    assert not (tmp_path.parent/'.out.part').exists()

# records and notebooks

@pytest.mark.parametrize('text', ['', '[', '{"a": 1', '[' * 100_000, '\ud800'.encode('utf8', 'surrogatepass')])
def test_a_damaged_file_is_told_in_one_line(tmp_path, text):
    (tmp_path/'r.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Damaged, match='r.json: cut short or no JSON') as e: read_json(tmp_path/'r.json')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('record, told', [([], 'holds no names'), (dict(params=[1]), 'params is no list of names'), (dict(stages=dict(a=1)), 'stages is no list of names'), (dict(curve=3, log=[]), 'no records that|lacks|not run')])
def test_records_of_another_kind(record, told, tmp_path):
    from rlsft_nb.claims import judge_claims
    write_json(tmp_path/'figures'/'tiny'/'fig2-seed0.json', record)
    try: judge_claims(load_params('tiny'), [0])
    except Damaged as e: assert any(t in str(e) for t in told.split('|'))

def test_notes_of_a_run_that_are_none(tmp_path):
    from rlsft_nb.papermill_line import notebook_params
    from rlsft_nb.runner import known_seconds, numbered, up_to_date
    at = tmp_path/'runs'/'tiny'; at.mkdir(parents=True)
    (at/'00_game.ipynb').write_text('{}')
    for text in ('[]', '', '{"fingerprint": 1}', '{"fingerprint": "x", "seconds": "y", "files": {}, "figures": [], "stages": []}'):
        (at/'00_game.json').write_text(text)
        assert not up_to_date(numbered()[0], dict(model='tiny', seed=0)) and isinstance(known_seconds('tiny'), dict)
        with pytest.raises(Damaged): notebook_params(at/'00_game.ipynb')

def test_memory_that_is_used_up_is_told_in_words(capsys):
    from rlsft_nb.commands import ended
    def none(): raise MemoryError
    def some(): raise MemoryError('3 GiB')
    assert [ended(none), ended(some)] == [1, 1] and capsys.readouterr().err == 'MemoryError: no memory is left\nMemoryError: 3 GiB\n'
