"Stages at the shape of a model, beside the plan."
import pytest
from rlsft_nb.files import read_json
from rlsft_nb.parameters import load_params
from rlsft_nb.measure import RUNS, alone, deepest, first_layers, foretold, long_hand, main, operations, random_checkpoint, standing_in
from rlsft_nb.models import load_lm
from rlsft_nb.plan import STAGES, lengths, memory, needed, sizes

SMALL = dict(needs=dict(gpus=0), launch=dict(processes=1), threads=1, eval=dict(batch=4, max_new_tokens=8), sft=dict(batch=4, accumulate=1, bf16=False), ppo=dict(episodes=4, batch=4, micro=2), spectra=dict(draws=2))

def over(pico, kind): return SMALL | dict(model=dict(source='folder', path=str(pico[kind])))

@pytest.mark.parametrize('model, kind', [('qwen7b', 'qwen2'), ('llama11b', 'mllama')])
def test_a_checkpoint_of_fewer_layers(pico, tmp_path, model, kind):
    cfg = load_params(model, over(pico, kind))
    full = sizes(cfg)
    some = standing_in(cfg, random_checkpoint(cfg, 1, tmp_path/'one'))
    lm, tok = load_lm(model, some)
    assert lm.config.get_text_config().num_hidden_layers == 1 == sizes(some).depth and sizes(some).embed == full.embed
    assert sum(p.numel() for p in lm.parameters()) == sizes(some).params < full.params and tok.chat_template

def test_the_full_shapes():
    "Of Qwen2.5-7B, without its weights."
    config = first_layers(load_params('qwen7b'), 3)
    assert (config.num_hidden_layers, len(config.layer_types), config.hidden_size) == (3, 3, 3584)

def test_operations_count_the_head_where_a_token_is_scored():
    tied, untied = sizes(load_params('smollm2')), sizes(load_params('qwen7b'))
    assert operations(untied, 10, 4) == 2*(10*(untied.params - 2*152064*3584) + 4*152064*3584)
    assert operations(tied, 10, 10) == 2*10*tied.params # the head is the embedding

def test_the_deepest_that_fits(pico, tmp_path):
    cfg = load_params('qwen7b', over(pico, 'qwen2'))
    both = max(needed(memory(standing_in(cfg, random_checkpoint(cfg, 2, tmp_path/'two')), s, 1)) for s in STAGES)
    one = max(needed(memory(standing_in(cfg, random_checkpoint(cfg, 1, tmp_path/'one')), s, 1)) for s in STAGES)
    assert [deepest(cfg, g, tmp_path) for g in (both, (one + both)/2, one)] == [2, 1, 1]
    with pytest.raises(ValueError, match='one layer does not fit'): deepest(cfg, one/2, tmp_path)

def test_hands_of_the_greatest_length():
    import random
    cfg = load_params('tiny')
    t = long_hand(cfg, 20, random.Random(0))
    assert len(t.ids) + lengths(cfg).feedback == lengths(cfg).longest and len(t.verdicts) == 5 and not t.solved
    assert [b - a for a, b in t.spans] == [cfg.eval.max_new_tokens]*5

def test_every_stage_beside_the_plan(pico, tmp_path):
    cfg = load_params('qwen7b', over(pico, 'qwen2'))
    some = standing_in(cfg, random_checkpoint(cfg, 2, tmp_path/'two'))
    got, said = {s: alone(s, some) for s in RUNS}, {s: foretold(s, some) for s in RUNS}
    assert all(got[s]['tokens_s'] > 0 and said[s]['peak_gib'] > 0 for s in ('sft', 'ppo', 'rollout', 'score'))
    assert all(got[s]['layer_s'] > 0 for s in ('spectra', 'restore', 'compare', 'edit')) and said['spectra']['layer_s'] > 0
    assert all(0 <= got[s]['peak_gib'] < said[s]['peak_gib'] for s in ('compare', 'edit')) and got['edit']['disk_gib'] > 0 and got['compare']['disk_gib'] > 0
    assert 0 < got['sft']['of_product'] < 1 and 0 < got['rollout']['of_copy'] < 1 and 'of_sheet' not in got['sft'] # no data sheet for a CPU

def test_the_command(pico, tmp_path, capsys):
    import yaml
    given = yaml.safe_dump(over(pico, 'llama'), default_flow_style=True, width=10**6)
    assert main(['qwen7b', '--stages', 'score', '--overrides', given]) == 0
    said, kept = capsys.readouterr().out, read_json(next((tmp_path/'runs'/'qwen7b').glob('records*/measured-cpu.json')))
    assert 'qwen7b, 2 of 2 layers, random weights' in said and [r['stage'] for r in kept['rows']] == ['score']
    assert [*kept['rows'][0]['planned']] == ['peak_gib'] and '(planned -)' in said # times are planned for GPUs
    with pytest.raises(SystemExit): main(['tiny', '--stages', 'sleep'])
    assert 'expected some of sft,ppo,rollout,score,spectra,restore,compare,edit' in capsys.readouterr().err
