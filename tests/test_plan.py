"Plans: sizes against published ones, memory against what is really held, advice that works, scripts that parse."
import json, subprocess, sys
from pathlib import Path
import pytest, torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.generation import ModelError
from rlsft_nb.models import load_lm
from rlsft_nb.plan import *
from rlsft_nb.plan import _decomposed, _filed, with_keys

# sizes

@pytest.mark.parametrize('kind', ['qwen2', 'llama', 'mllama'])
def test_sizes_are_those_of_the_weights(pico, kind):
    lm, _ = load_lm(str(pico[kind]))
    s, off = sizes(load_params('tiny', dict(model=dict(source='folder', path=str(pico[kind]))))), set(idle(lm))
    assert s.params == sum(p.numel() for p in lm.parameters()) and s.trained == sum(p.numel() for n, p in lm.named_parameters() if n not in off)
    assert s.head == (0 if kind == 'llama' else lm.lm_head.weight.numel()) and s.depth == 2 and s.kv == 16 and s.hidden == 32
    assert bool(off) == (kind == 'mllama') and set(s.matrices) == {tuple(p.shape) for n, p in lm.named_parameters() if p.ndim == 2 and n not in off}

def test_published_sizes(): # model cards; counts on the meta device
    q, l, s = (sizes(load_params(m)) for m in ('qwen7b', 'llama11b', 'smollm2'))
    assert (q.params, l.params, s.params) == (7_615_616_512, 10_642_941_475, 134_515_008)
    assert q.params - q.embed - q.head == pytest.approx(6.53e9, rel=1e-3) and l.trained == pytest.approx(8.030e9, rel=1e-3)
    assert 2*2*q.depth*q.kv == 57_344 # bytes of cache a token, bf16

def test_another_repository_is_not_given_these_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr('rlsft_nb.plan.AutoConfig.from_pretrained', lambda where, **k: asked.append(where) or (_ for _ in ()).throw(OSError('offline')))
    with pytest.raises(ModelError, match='cannot read the config of my/model: offline'): sizes(load_params('qwen7b', dict(model=dict(path='my/model'))))
    assert asked == ['my/model']

# measured

def saved_bytes(lm, B, T):
    "What autograd keeps for the backward pass of the trunk, without weights."
    own, kept = {p.untyped_storage().data_ptr() for p in [*lm.parameters(), *lm.buffers()]}, {}
    def pack(x):
        if x.untyped_storage().data_ptr() not in own: kept[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): lm.model(input_ids=torch.randint(0, 64, (B, T)), use_cache=False)
    return sum(x.untyped_storage().nbytes() for x in kept.values())

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('config, cls', [(Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)])
def test_activations_are_as_measured(config, cls, dtype):
    how = dict(vocab_size=64, hidden_size=128, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2)
    one, two = (saved_bytes(cls(config(**how, num_hidden_layers=n)).to(dtype), 4, 64) for n in (1, 2))
    s = Sizes(0, 0, 0, 0, 0, 2, 128, 512, 32, 64, ())
    assert (two - one)/256 == pytest.approx(layer_bytes(s, dtype.itemsize), rel=.05)

def test_recomputing_keeps_one_layer(pico):
    cfg = load_params('qwen7b')
    s, few = sizes(cfg), with_keys(cfg, dict(sft=dict(checkpointing=True)))
    assert sft_memory(cfg, s, 4)['activations'] > 9*sft_memory(few, s, 4)['activations']

def test_sixteen_bytes_a_parameter_over_all_gpus():
    cfg = load_params('qwen7b')
    s = sizes(cfg)
    for n in (1, 4, 8):
        p = sft_memory(cfg, s, n)
        assert p['weights'] + p['gradients'] + p['optimizer'] == pytest.approx(16*s.params/n)
    l = sizes(load_params('llama11b'))
    assert sft_memory(load_params('llama11b'), l, 4)['weights'] == pytest.approx(l.params) # 4 bytes over 4 GPUs, frozen ones too

# fits

def test_the_shipped_recipes_fit_where_they_say():
    for model in ('qwen7b', 'llama11b', 'smollm2'):
        cfg = load_params(model)
        assert [r['stage'] for r in table(cfg, max(1, cfg.needs.gpus), 80) if not r['fits']] == [], model

@pytest.mark.parametrize('stage, change, gib', [('sft', dict(), 60), ('sft', dict(sft=dict(batch=1024)), 60), ('ppo', dict(ppo=dict(checkpointing=False, micro=16)), 80), ('score', dict(eval=dict(batch=512)), 80)])
def test_advice_makes_it_fit(stage, change, gib):
    import yaml
    cfg = with_keys(load_params('qwen7b'), change)
    assert needed(memory(cfg, stage, 4)) > gib
    said = advice(cfg, stage, 4, gib)
    assert said.startswith("-y 'overrides: ")
    over = yaml.safe_load(said[4:-1])['overrides']
    assert needed(memory(with_keys(cfg, over), stage, 4)) <= gib

def test_vllm_counts_in_rollouts_and_updates():
    import yaml
    cfg = load_params('qwen7b')
    own, s = with_keys(cfg, dict(launch=dict(engine='vllm'))), sizes(cfg)
    keys = 57_344*lengths(cfg).longest*16 # hands of one GPU
    assert vllm_bytes(own, s, 4) == pytest.approx(1.1*(2*s.params + keys) + 2*2**30) and vllm_bytes(cfg, s, 4) == 0
    assert vllm_bytes(with_keys(own, dict(launch=dict(vllm_gib=30.))), s, 4) == 30*2**30
    for f in (rollout_memory, update_memory): assert f(own, s, 4)['vLLM'] == vllm_bytes(own, s, 4) and not f(cfg, s, 4).get('vLLM')
    assert needed(memory(own, 'ppo', 4)) - needed(memory(cfg, 'ppo', 4)) == pytest.approx(1.1*vllm_bytes(own, s, 4)/2**30)
    assert needed(memory(own, 'ppo', 4)) < 80 and ppo_hours(own, s, 4) < ppo_hours(cfg, s, 4)
    assert needed(memory(own, 'ppo', 4)) > 50 > needed(memory(with_keys(own, yaml.safe_load(advice(own, 'ppo', 4, 50)[4:-1])['overrides']), 'ppo', 4))
    assert "engine: hf" in advice(with_keys(own, dict(ppo=dict(micro=1), eval=dict(batch=1))), 'ppo', 4, 50)

def test_where_nothing_helps_it_says_how_many_gpus():
    assert advice(load_params('qwen7b'), 'sft', 1, 70) == '4 GPUs' and needed(memory(load_params('qwen7b'), 'sft', 4)) <= 80
    assert advice(load_params('qwen7b'), 'spectra', 4, 40).startswith('GPUs of ')

def test_a_stage_that_cannot_fit_is_refused_before_it_starts(pico, monkeypatch):
    from rlsft_nb.pipeline import sft_stage
    with pytest.raises(TooLarge, match=r'sft of qwen7b takes about \d+ GiB on each of 4 GPUs of 40 GiB \(activations 21.8, optimizer 14.2.*It would fit with: '): check_fits(load_params('qwen7b'), 'sft', 4, [('A100', 40.)]*4)
    check_fits(load_params('qwen7b'), 'sft', 4, [('H100', 79.6)]*4)
    class Memory: available = 2**30
    monkeypatch.setattr('psutil.virtual_memory', lambda: Memory)
    monkeypatch.setattr('rlsft_nb.sft.train_sft', lambda *_: 1/0)
    with pytest.raises(TooLarge, match='without a GPU; 1.0 GiB are free'): sft_stage(load_params('tiny', dict(model=dict(source='folder', path=str(pico['qwen2'])))))

@pytest.mark.parametrize('step, row', [('base', 'score'), ('sft', 'sft'), ('sft-curve', 'score'), ('sft-named', 'score'), ('ppo', 'ppo'), ('ppo-score', 'score'), ('spectra', 'spectra'), ('restore', 'restore'), ('restore-imposed', 'restore'), ('theory', 'spectra')])
def test_every_planned_stage_says_its_need_and_makes_nothing(step, row, pico, monkeypatch):
    from rlsft_nb import graph, pipeline
    from rlsft_nb.places import runs_root
    from rlsft_nb.stages import Stage
    cfg = load_params('tiny', dict(model=dict(source='folder', path=str(pico['qwen2']))))
    class Done(Stage):
        @property
        def done(self): return self.name != step
        def results(self): return dict(steps=[*cfg.sft.checkpoints], peak=cfg.sft.checkpoints[0], end=cfg.sft.checkpoints[-1])
    class Memory: available = 2**30
    monkeypatch.setattr(graph, 'Stage', Done); monkeypatch.setattr('psutil.virtual_memory', lambda: Memory)
    make = getattr(pipeline, graph.STEPS[step].makes.split('.')[1])
    more = dict(ppo=(cfg.sft.checkpoints[-1],), **{'ppo-score': (cfg.sft.checkpoints[-1],)}, spectra=('SFT', 'a', 'b')).get(step, ())
    if step == 'spectra': make, name = (lambda cfg, *a: pipeline.pair_stage(cfg, *a)), monkeypatch.setattr(Done, 'done', property(lambda s: not s.name.startswith('spectra')))
    with pytest.raises(TooLarge, match=rf'^{row} of tiny takes about \d+\.\d GiB of memory without a GPU; 1.0 GiB are free$'): make(cfg, *more)
    assert not [p for p in runs_root().rglob('*') if p.is_file()]

def test_runs_of_rl_side_by_side_share_a_gpu():
    cfg = load_params('smollm2') # five starts, eight workers
    one, four = (memory(cfg, 'ppo', n)['weights'] for n in (1, 4))
    alone = memory(with_keys(cfg | dict(workers=1), {}), 'ppo', 1)['weights']
    assert one == 5*alone and four == 2*alone/4 # of four GPUs one has two
    assert memory(with_keys(cfg, dict(launch=dict(processes=2))), 'ppo', 1)['weights'] == alone # they follow each other
    class Memory: available = needed(memory(with_keys(cfg | dict(workers=1), {}), 'ppo', 1))*2**30
    with pytest.MonkeyPatch.context() as m:
        m.setattr('psutil.virtual_memory', lambda: Memory)
        check_fits(cfg, 'ppo', 1, []) # without a GPU, what runs beside it has taken its part

def test_the_head_in_fp32_counts_where_weights_are_gathered_in_bf16():
    cfg = load_params('qwen7b')
    s = sizes(cfg)
    assert update_memory(cfg, s, 4)['head in fp32, and its gradient'] == 8*152064*3584 and 'head in fp32, and its gradient' not in update_memory(cfg, s, 1)

# hours

def test_hours_scale_as_they_must():
    cfg = load_params('qwen7b')
    s = sizes(cfg)
    assert sft_hours(cfg, s, 8) == pytest.approx(sft_hours(cfg, s, 4)/2)
    assert sft_hours(with_keys(cfg, dict(sft=dict(checkpointing=True))), s, 4) == pytest.approx(sft_hours(cfg, s, 4)*8/6)
    assert token_seconds(s, 4, 2) > 2*s.params/450e9 # sharded weights come over the link for each token
    assert all(r['hours'] > 0 for r in table(cfg, 4, 80))

# commands

def run(*args): return subprocess.run([sys.executable, '-m', 'rlsft_nb.plan', *args], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)

def test_the_command(env):
    good = run('qwen7b', '--gpus', '4', '--gib', '80')
    assert good.returncode == 0 and 'optimizer' in good.stdout and 'KV cache' in good.stdout and 'DOES NOT FIT' not in good.stdout, good.stderr
    bad = run('qwen7b', '--gpus', '1')
    assert bad.returncode == 1 and 'would fit with: 2 GPUs' in bad.stdout

@pytest.mark.parametrize('args, message', [(['qwen8b'], "did you mean 'qwen7b'?"), (['qwen7b', '--overrides', '{sft: {lrr: 1.0}}'], "did you mean 'lr'?"), (['qwen7b', '--overrides', '{a'], 'is not YAML')])
def test_wrong_commands(args, message, capsys):
    assert main(args) == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit): main(['qwen7b', '--gpus', '0'])

@pytest.mark.parametrize('model', ['tiny', 'smollm2', 'qwen7b', 'llama11b'])
@pytest.mark.parametrize('nodes', [1, 2])
def test_scripts_parse_and_ask_for_what_is_needed(model, nodes):
    cfg = load_params(model)
    text = slurm(cfg, nodes, 4, 'me', 'gpu')
    assert subprocess.run(['bash', '-n'], input=text, text=True, capture_output=True).stderr == ''
    assert f'#SBATCH --nodes={nodes}\n' in text and ('--gpus-per-node=4' in text) == (cfg.needs.gpus > 0)
    assert '#SBATCH --account=me\n' in text and '#SBATCH --partition=gpu\n' in text
    assert ('accelerate launch' in text) == (nodes > 1) and (nodes == 1 or '--num_processes 8' in text)
    mem = int(text.split('--mem=')[1].split('G')[0])
    assert mem >= host_gib(cfg, 'restore', 4)

def test_own_overrides_reach_every_command():
    cfg = load_params('qwen7b', dict(sft=dict(lr=2.0e-6)))
    text = slurm(cfg, 2, 4)
    assert text.count('lr: 2.0e-06') == 2 and text.count('processes: 4') == 0 # 4 is what the file says already
    assert slurm(cfg, 2, 8).count('processes: 8') == 2

def test_disk_and_host():
    cfg = load_params('qwen7b')
    s = sizes(cfg)
    assert disk_gib(cfg, 'sft') == pytest.approx((11*4 + 12)*s.params/2**30) and disk_gib(load_params('tiny'), 'restore') == 0
    assert host_gib(cfg, 'sft', 4) == pytest.approx(4*1.5 + 5*4*s.params/2**30) # each of four loads all weights; one gathers them
    from rlsft_nb.workbench import Pairs
    assert host_gib(load_params('qwen7b', dict(launch=dict(config='deepspeed_zero3'))), 'sft', 4) == pytest.approx(4*1.5 + (5*4 + 12)*s.params/2**30)
    assert (disk_gib(cfg, 'restore') > 50) == bool(Pairs(s.matrices).folder)

# restoration

def test_what_a_workbench_leaves_on_the_disk(monkeypatch):
    from rlsft_nb import edits, workbench
    monkeypatch.setattr(workbench, 'KEEP_GIB', 0)
    shapes = [(600, 100), (100, 600), (300, 300)]
    pairs, rng = workbench.Pairs(shapes), torch.Generator().manual_seed(0)
    for i, m in enumerate(shapes): pairs[str(i)] = edits.pair(*torch.randn(2, *m, generator=rng)) # a square one has columns of small values
    assert sum(f.stat().st_size for f in Path(pairs.folder.name).iterdir()) == pytest.approx(2**30*_filed(shapes, 4), .05)
    s = sizes(load_params('qwen7b'))
    assert 80 < _filed(s.matrices, 4) < 90 < 250 < _decomposed(s.matrices) < 260

def test_edits_fit_beside_the_model():
    from rlsft_nb.workbench import WORK
    cfg = load_params('qwen7b')
    s = sizes(cfg)
    parts = edit_memory(cfg, s, 1)
    assert parts == {'weights': 4*s.params, 'pair and edit': WORK*152064*3584} and memory(cfg, 'restore', 1) in (parts, score_memory(cfg, s, 1))
    assert needed(parts) < 80 and host_gib(cfg, 'restore', 1) < 64
    small = load_params('smollm2')
    assert edit_memory(small, sizes(small), 1)['pair and edit'] == 0 # no matrix of it goes to a GPU

def test_hours_of_edits():
    cfg = load_params('qwen7b')
    s, m, p = sizes(cfg), 2048, 1024
    one = s._replace(matrices=((m, p),), depth=1)
    by_hand = 6*2*m*p**2/(33.5e12*.6) + 4*p**3/(33.5e12*.02)
    assert edit_seconds(cfg, one, dict(mode='directions')) == pytest.approx(by_hand) # in memory: nothing is read
    narrow = one._replace(matrices=((m, p//2),))
    assert edit_seconds(cfg, narrow, dict(mode='directions')) == pytest.approx((6*2*m*(p/2)**2 + 4*(p/2)**3)/30e9) # on a CPU
    whole, layers, ends, turned = (edit_seconds(cfg, s, spec) for spec in (dict(mode='directions'), dict(mode='directions', layers='0-6'), dict(mode='directions', types=['embed', 'head']), dict(mode='random_rotation')))
    assert whole == pytest.approx(4*layers + ends) and whole < turned < 3*whole
    assert 2**30*disk_gib(cfg, 'restore')/3e9 < whole < 180 and open_seconds(cfg, s) < 600

def test_hours_of_restoration():
    cfg = load_params('qwen7b')
    s, many = sizes(cfg), with_keys(load_params('qwen7b'), dict(workers=4))
    cells = sum(map(len, grids_of(cfg, s).values()))
    assert restore_hours(cfg, s, 4) > cells*score_hours(cfg, s, 2*cfg.eval.hands) and restore_hours(cfg, s, 4) < 12
    opened = 6*open_seconds(cfg, s)/3600 # by every worker
    assert restore_hours(many, s, 4) - opened == pytest.approx((restore_hours(cfg, s, 4) - opened)/4)

def test_plan_says_the_dose(capsys):
    assert main(['llama11b', '--gpus', '4']) == 0
    said = capsys.readouterr().out
    assert 'Dose. SFT: 1,100 optimizer steps, 70,400 hands, rates sum to 0.00091. RL from one start: 400 optimizer steps, 25,600 hands, rates sum to 0.0002, which is 0.22 of SFT\'s' in said

def test_the_dose_is_what_the_schedules_give():
    import torch
    from transformers import get_constant_schedule_with_warmup
    from rlsft_nb.dose import ledger
    from rlsft_nb.ppo_run import set_rates
    cfg = load_params('tiny')
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], cfg.sft.lr)
    rates, spent = get_constant_schedule_with_warmup(opt, cfg.sft.warmup), []
    for _ in range(cfg.sft.steps): spent.append(opt.param_groups[0]['lr']); opt.step(); rates.step()
    opt.param_groups[0]['top'] = cfg.ppo.lr
    rl = [set_rates(opt, cfg.ppo, u)*cfg.ppo.lr*cfg.ppo.epochs*2 for u in range(1, cfg.ppo.updates + 1)] # 128 hands in batches of 64
    assert ledger(cfg)['SFT']['rates'] == pytest.approx(sum(spent)) and ledger(cfg)['RL']['rates'] == pytest.approx(sum(rl))
    assert ledger(load_params('tiny', dict(sft=dict(accumulate=4))))['SFT']['hands'] == 800*32, 'passes share a step, they add no rows'
