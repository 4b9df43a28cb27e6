"Fine-tuning: what is learned from, that a kill changes nothing, and that the peak is not chosen on test hands."
import json, os, shutil, signal, subprocess, sys, time
import pytest, torch
from rlsft_nb.files import read_json
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.problems import ParamError
from rlsft_nb.game import answer, hands, multisets, prompt, solve, values, verify
from rlsft_nb.generation import encode, generate
from rlsft_nb.live import read_log
from rlsft_nb.models import ModelError, base_of, load_lm
from rlsft_nb.pipeline import base_stage, curve_stage, kept, named, named_stage, sft_stage
from rlsft_nb.sft import *
from rlsft_nb.sft import _newest, _says

SMALL = dict(sft=dict(steps=12, checkpoints=[4, 8, 12], hands=64, batch=8, warmup=3, save_every=3, log_every=1, loss_hands=10), eval=dict(hands=12, val_hands=8, max_new_tokens=8), workers=1)

def small(pico, **sft): return load_params('tiny', SMALL | dict(model=dict(source='folder', path=str(pico['qwen2'])), sft=SMALL['sft'] | sft))
def weights(folder): return {n: p for n, p in load_lm(str(folder))[0].named_parameters()}
def same(a, b): return all(torch.equal(p, b[n]) for n, p in a.items())

@pytest.fixture(scope='module')
def trained(pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp('sft')
    return folder, train_sft(small(pico), folder, seed=1)

# bases

def test_each_seed_begins_with_its_base(pico, tmp_path, monkeypatch):
    monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'runs'))
    lm, tok = load_lm(str(pico['qwen2']))
    with torch.no_grad(): lm.lm_head.weight.mul_(2.)
    lm.save_pretrained(tmp_path/'other'); tok.save_pretrained(tmp_path/'other')
    bases = [str(pico['qwen2']), str(tmp_path/'other')]
    cfg = load_params('tiny', SMALL | dict(model=dict(source='folder', path=bases[0], bases=bases), sft=SMALL['sft'] | dict(lr=1e-9, steps=4, checkpoints=[4])))
    assert [base_of(cfg, i) for i in range(5)] == [bases[0], bases[1], bases[0], bases[1], bases[0]] and base_of(small(pico), 3) == 'tiny'
    ids = [decides(cfg, [i])['weights'] for i in range(3)]
    assert ids[0] == ids[2] != ids[1] and decides(cfg, range(3))['weights'] == ids[:2] and decides(small(pico))['weights'] == ids[0]
    for seed, base in ((0, bases[0]), (1, bases[1])):
        at = kept(cfg, seed)
        assert at[0] == base
        for (n, a), b in zip(weights(at[4]).items(), weights(base).values()): assert torch.allclose(a, b, atol=1e-6), n
    assert len({base_stage(cfg, i).params['weights'] for i in range(3)}) == 2
    for change, message in ((dict(bases=['nowhere']), "'nowhere' is no folder"), (dict(source='hub', path='a/b', bases=['x']), 'several bases are embedded or folders, not hub')):
        with pytest.raises((ParamError, ModelError), match=message): base_of(load_params('tiny', dict(model=change)), 0)

# rows

def test_expert_rows_are_right_and_stay_in_their_part():
    cfg = load_params('tiny', dict(sft=dict(hands=300)))
    rows, allowed = expert_rows(cfg, 0), set(multisets('sft'))
    assert len(rows) == 300 and {r['rule'] for r in rows} == {'10'}
    for r in rows:
        assert verify(r['completion'][0]['content'], r['cards']).correct
        assert tuple(sorted(values(r['cards']))) in allowed
    assert rows['cards'] == expert_rows(cfg, 0)['cards'] != expert_rows(cfg, 1)['cards']

def test_training_evaluation_and_loss_see_the_same_tokens(pico, tmp_path):
    cfg = small(pico)
    lm, tok = load_lm(str(pico['qwen2']))
    t, r = trainer(cfg, tmp_path, 0, lm, tok), expert_rows(cfg, 0)[0]
    row = t.train_dataset[0]
    asked = encode(tok, [prompt(r['cards'])])[0]
    said = tok(r['completion'][0]['content'])['input_ids'] + [tok.eos_token_id]
    assert list(row['input_ids']) == asked + said
    assert list(row['labels']) == [-100]*len(asked) + said

# loss

def test_loss_is_that_of_one_row_at_a_time(pico):
    lm, tok = load_lm(str(pico['qwen2']))
    h, rule = hands('val', '11-12-13', face=True)[:6], '11-12-13'
    firsts, anys, tokens = [], [], 0
    for x in h:
        logps = []
        for f in solve(values(x, rule)):
            a = encode(tok, [prompt(x, rule)])[0]
            ids = torch.tensor([a + tok(answer(x, rule, f))['input_ids'] + [tok.eos_token_id]])
            logp = torch.log_softmax(lm(ids).logits[0].double(), -1)
            logps.append(sum(logp[i - 1, ids[0, i]] for i in range(len(a), ids.shape[1])).item())
            if len(logps) == 1: firsts.append(-logps[0]); tokens += ids.shape[1] - len(a)
        anys.append(-torch.tensor(logps).logsumexp(0).item())
    got = answer_loss(lm, tok, h, rule, batch_size=3)
    assert got['loss'] == pytest.approx(sum(firsts)/tokens, rel=1e-5)
    assert got['any'] == pytest.approx(sum(anys)/6, rel=1e-5) and got['n'] == 6
    assert got['any'] <= sum(firsts)/6 + 1e-6 # more right answers are never less likely

# training

def test_training_keeps_its_steps_and_its_real_rates(trained, pico):
    folder, r = trained
    assert r['steps'] == [4, 8, 12] and [h['step'] for h in r['log']] == list(range(1, 13))
    rates = [h['learning_rate'] for h in r['log']]
    assert rates[3:] == [2.0e-4]*9 and rates[0] < rates[1] < rates[2] # linear, then constant: no cosine
    assert {p.name for p in folder.iterdir()} == {'resume', 'step-4', 'step-8', 'step-12', 'log.jsonl'}
    assert read_log(folder) == [{k: h[k] for k in ('step', 'loss')} for h in r['log']]
    assert not same(weights(folder/'step-4'), weights(pico['qwen2'])) and not same(weights(folder/'step-4'), weights(folder/'step-12'))
    assert r['log'][-1]['loss'] < r['log'][0]['loss']

def test_killed_at_any_moment_it_ends_in_the_same_weights(trained, pico, tmp_path):
    code = f'from rlsft_nb.parameters import load_params\nfrom rlsft_nb.sft import train_sft\ntrain_sft(load_params("tiny", {SMALL | dict(model=dict(source="folder", path=str(pico["qwen2"])))!r}), {str(tmp_path)!r}, 1)'
    for seen in (4, 8): # killed after each of these was kept
        p = subprocess.Popen([sys.executable, '-c', code], env=os.environ | dict(OMP_NUM_THREADS='1'), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path/f'step-{seen}').exists() and p.poll() is None: time.sleep(.002)
        p.kill(); p.wait()
        assert (tmp_path/f'step-{seen}').exists()
    got = train_sft(small(pico), tmp_path, seed=1)
    for n in (4, 8, 12): assert same(weights(tmp_path/f'step-{n}'), weights(trained[0]/f'step-{n}'))
    assert [h['loss'] for h in got['log']] == [h['loss'] for h in trained[1]['log']] == [l['loss'] for l in read_log(tmp_path)], 'the curve shows the earlier part, once'

def test_a_half_written_state_is_passed_over(tmp_path):
    for n, text in ((2, '{"global_step": 2}'), (3, '{"global_step": 3}'), (4, '{"global_step": 4}'), (6, '{"global_'), (12, None)):
        (tmp_path/f'checkpoint-{n}').mkdir()
        if text: (tmp_path/f'checkpoint-{n}'/'trainer_state.json').write_text(text)
        if n != 4: (tmp_path/f'checkpoint-{n}'/'sizes.json').write_text('{}')
    assert _newest(tmp_path).endswith('checkpoint-3') and _newest(tmp_path/'none') is None

@pytest.mark.parametrize('sft, message', [(dict(checkpoints=[4, 40]), '40 is not within 1..sft.steps=12'), (dict(checkpoints=[0]), '0 is not within'), (dict(accumulate=3), 'sft.batch=8 is no multiple of sft.accumulate=3')])
def test_impossible_settings_are_refused_before_anything_is_made(pico, tmp_path, sft, message):
    with pytest.raises(ParamError, match=message): train_sft(small(pico, **sft), tmp_path/'new')
    assert not (tmp_path/'new').exists()

@pytest.mark.parametrize('sft, seed, message', [(dict(lr=1e-3), 1, r'sft.lr=0.001 \(it began with 0.0002\)'), (dict(hands=65), 1, r'sft.hands=65 \(it began with 64\)'), (dict(steps=24), 1, 'sft.steps=24'), ({}, 2, r'seed=2 \(it began with 1\)')])
def test_a_run_goes_on_with_the_settings_it_began_with(trained, pico, tmp_path, sft, seed, message):
    import shutil
    folder = shutil.copytree(trained[0], tmp_path/'run')
    with pytest.raises(ParamError, match=f'holds a run with other settings: .*{message}'): train_sft(small(pico, **sft), folder, seed)
    assert read_json(folder/'resume'/'settings.json')['seed'] == 1

def test_a_run_on_other_weights_or_another_game_is_refused(trained, pico, tmp_path):
    import shutil
    folder = shutil.copytree(trained[0], tmp_path/'run')
    with pytest.raises(ParamError, match='weights='): train_sft(load_params('tiny', SMALL | dict(model=dict(source='folder', path=str(pico['llama'])))), folder, 1)
    with pytest.raises(ParamError, match=r'game.target=20 \(it began with 24\)'): train_sft(load_params('tiny', SMALL | dict(model=dict(source='folder', path=str(pico['qwen2'])), game=dict(target=20))), folder, 1)

# stages

def test_curve_and_names(pico):
    cfg = small(pico)
    curve = curve_stage(cfg, 1)
    r = curve.results()
    assert [p['step'] for p in r['points']] == [0, 4, 8, 12] and r['end'] == 12
    best = max(p['val']['OOD']['first']['rate'] for p in r['points'])
    assert r['peak'] == next(p['step'] for p in r['points'] if p['val']['OOD']['first']['rate'] == best) # the earliest of equals
    assert {p['val']['OOD']['n'] for p in r['points']} == {8} and {p['test']['ID']['n'] for p in r['points']} == {12}
    at = named(cfg, 1)
    assert at['base'] == 'tiny' and at['end'].endswith('step-12')
    assert same(weights(at['end']), weights(sft_stage(cfg, 1).path/'step-12'))
    scores = named_stage(cfg, 1).results()
    assert set(scores) == {'base', 'peak', 'end'} and set(scores['end']) == {'within', 'cells', 'sampled', 'authors'}
    assert scores['end']['within']['OOD']['rule'] == '11-12-13' and set(scores['end']['cells']) == {'ID rule, face cards', 'OOD rule, any hand'}

# verdicts, on made-up records

def record(hits): return dict(n=len(hits), hits=hits, first=dict(rate=hits.count('1')/len(hits), lo=0., hi=1.))
def told(id_, ood, losses, by=None):
    scores = {s: dict(within=dict(ID=record(i), OOD=record(o))) for s, i, o in zip(('peak', 'end'), id_, ood)}
    return [r['verdict'] for r in verdicts(dict(points=[dict(step=i, loss=dict(ood=dict(loss=l, n=5))) for i, l in enumerate(losses)]), scores, by or dict(ID=range(100), OOD=range(100)))]

def test_verdicts_follow_their_thresholds():
    many, few = '1'*60 + '0'*40, '1'*30 + '0'*70
    assert told((few, many), (many, few), [2., .5, 2.1]) == ['holds']*4
    assert told((many, few), (few, many), [2., .5, .54]) == ['fails']*4
    assert told((many, many), (few, few), [2., .5, .6]) == ['within noise', 'within noise', 'holds', 'fails']
    assert _says(.1, .02) == 'within noise'
    four = [i//25 for i in range(100)] # four multisets: too few to tell
    assert told((few, many), (many, few), [2., .5, 2.1], dict(ID=four, OOD=four))[:2] == ['within noise']*2

def test_rows_from_any_multiset_but_those_kept_out():
    rows = expert_rows(load_params('tiny', dict(sft=dict(part='any', hands=2000))), 0)
    seen = {tuple(sorted(values(h))) for h in rows['cards']}
    assert not seen & set(multisets('kept')) and all(seen & set(multisets(p)) for p in ('sft', 'rl', 'val', 'test'))
    assert {tuple(sorted(values(h))) for h in expert_rows(load_params('tiny'), 0)['cards']} <= set(multisets('sft'))
    with pytest.raises(ParamError, match="sft.part='rl': expected 'sft' or 'any'"): expert_rows(load_params('tiny', dict(sft=dict(part='rl'))), 0)

# adapters

def test_adapters_change_matrices_of_layers_by_their_rank_and_leave_a_plain_checkpoint(pico, tmp_path):
    r = train_sft(small(pico, lora=2, lr=2.0e-3), tmp_path/'a', seed=1)
    base, end = weights(pico['qwen2']), weights(tmp_path/'a'/'step-12')
    assert r['steps'] == [4, 8, 12] and {*end} == {*base} and not (tmp_path/'a'/'step-12'/'adapter_config.json').exists()
    moved = {n for n in base if not torch.equal(base[n], end[n])}
    assert moved == {n for n in base if n.endswith('proj.weight')}
    assert all(torch.linalg.matrix_rank((end[n] - base[n]).double(), rtol=1e-3) == 2 for n in moved)

def test_a_run_that_was_killed_after_its_last_step_takes_no_other(trained, pico, tmp_path):
    folder, r = trained
    shutil.copytree(folder, at := tmp_path/'again')
    assert train_sft(small(pico), at, seed=1) == r # the trainer itself would take step 13
    for lost in ('sizes.json', 'tokenizer.json'): # killed before it was sealed; spoiled later
        next((at/'resume').glob('checkpoint-*')).joinpath(lost).unlink()
        assert train_sft(small(pico), at, seed=1) == r and (at/'step-12'/'model.safetensors').read_bytes() == (folder/'step-12'/'model.safetensors').read_bytes()

def test_adapters_go_on_where_they_were_killed(pico, tmp_path):
    whole = train_sft(small(pico, lora=2), tmp_path/'a', seed=1)
    import shutil
    train_sft(small(pico, lora=2), tmp_path/'b', seed=1)
    for n in (8, 12): shutil.rmtree(tmp_path/'b'/f'step-{n}')
    for p in (tmp_path/'b'/'resume').glob('checkpoint-*'): # as if it had been killed after step 6
        if p.name != 'checkpoint-6': shutil.rmtree(p)
    train_sft(small(pico, lora=2), tmp_path/'b', seed=1)
    assert same(weights(tmp_path/'a'/'step-12'), weights(tmp_path/'b'/'step-12')) and whole['steps'] == [4, 8, 12]

def test_adapters_are_refused_where_they_cannot_be(pico, tmp_path, monkeypatch):
    with pytest.raises(ParamError, match='sft.lora=-1 in 1 processes'): train_sft(small(pico, lora=-1), tmp_path)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ParamError, match='sft.lora=2 in 2 processes: expected 0, or a rank in one process'): train_sft(small(pico, lora=2), tmp_path)
