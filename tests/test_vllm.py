"Rollouts by vLLM: TRL's own code over a stand-in for the engine (on several processes in test_ppo.py), every reason to fall back; the real engine where it is installed."
import functools, os, sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
import pytest, torch
from accelerate import Accelerator
from safetensors import safe_open
from rlsft_nb import ppo_run, rollouts, vllm
from rlsft_nb.parameters import load_params
from rlsft_nb.problems import ParamError
from rlsft_nb.game import hands, prompt
from rlsft_nb.generation import encode, generate_ids, stop_ids
from rlsft_nb.models import load_lm, save_lm
from rlsft_nb.actor_critic import attach
from rlsft_nb.ppo import train_ppo
from rlsft_nb.rollouts import rollout
from rlsft_nb.vllm import NAMES, Shown, VLLMPlayer, drawn, engine, lacks
from test_ppo import PPO, same, weights

torch.set_num_threads(1)
CPU = torch.device('cpu')

def small(folder, engine='vllm', **p):
    return load_params('tiny', dict(model=dict(source='folder', path=str(folder)), ppo=PPO | dict(updates=2) | p, eval=dict(max_new_tokens=5), game=dict(attempts=3), launch=dict(engine=engine)))

# a stand-in for vllm.LLM, below TRL's own code

class LLM:
    "Takes and refuses weights as vLLM does, and answers as `Player` from the seed that was set."
    made = []
    def __init__(self, model, **how):
        (self.lm, self.tok), self.how, self.synced, self.asked, self.turn = load_lm(model), how, [], [], None
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self.model = self
        LLM.made.append(self)
        for k in NAMES: assert os.environ[k], k
    def load_weights(self, named):
        for name, w in named: self.lm.get_parameter(name).data.copy_(w); self.synced.append(name) # an unknown name is an error
    def reset_prefix_cache(self): pass
    def generate(self, prompts, sampling_params, use_tqdm):
        assert not torch.is_autocast_enabled('cpu')
        self.asked.append(sampling_params)
        was, self.turn = self.turn, torch.initial_seed()
        if self.turn - 1 != was: self.player = rollouts.Player(self.lm, self.tok, sampling_params['max_tokens'], sampling_params['temperature'], self.turn)
        said = self.player([p['prompt_token_ids'] for p in prompts]) # one player for the turns of a rollout
        return [SimpleNamespace(prompt_token_ids=p['prompt_token_ids'], outputs=[SimpleNamespace(token_ids=tuple(s), logprobs=None)]) for p, s in zip(prompts, said)]

def stand_in(setattr):
    "TRL's `VLLMGeneration` over `LLM` above."
    import trl.generation.vllm_generation as trl
    LLM.made, left = [], []
    for name, x in dict(is_vllm_available=lambda: True, LLM=LLM, SamplingParams=dict).items(): setattr(trl, name, x, raising=False)
    setattr(sys.modules['trl.generation'], 'VLLMGeneration', trl.VLLMGeneration, raising=False)
    for name, x in dict(lacks=lambda *_: '', share=lambda *_: .3, _left=lambda: left.append(1)).items(): setattr(vllm, name, x)
    return left

timeless = lambda log: [{k: v for k, v in l.items() if not k.endswith('_s') and k != 'engine'} for l in log]

@pytest.mark.parametrize('kind', ['qwen2', 'llama'])
def test_a_run_is_the_one_that_hugging_face_plays(pico, tmp_path, monkeypatch, kind):
    left, before = stand_in(monkeypatch.setattr), dict(os.environ)
    plain = train_ppo(small(pico[kind], 'hf'), str(pico[kind]), tmp_path/'hf', 1)['log']
    log = train_ppo(small(pico[kind]), str(pico[kind]), tmp_path/'vllm', 1)['log']
    assert timeless(log) == timeless(plain) and [l['engine'] for l in log] == ['vllm']*2 and 'engine' not in plain[0]
    assert same(weights(tmp_path/'vllm'/'policy'), weights(tmp_path/'hf'/'policy')) and not same(weights(tmp_path/'hf'/'policy'), weights(pico[kind]))
    (llm,) = LLM.made # once a run, weights once an update
    with safe_open(pico[kind]/'model.safetensors', 'pt') as f: assert sorted(llm.synced) == sorted([*f.keys()]*2)
    assert left == [1] and os.environ == before

def test_what_vllm_is_asked_for(pico, tmp_path, monkeypatch):
    stand_in(monkeypatch.setattr)
    (lm, tok), cfg = load_lm(str(pico['qwen2'])), small(pico['qwen2'], temperature=.2)
    tok.eos_token = '!' # a second token that ends a turn
    stops = stop_ids(lm, tok)
    with engine(Accelerator(cpu=True), attach(lm), tok, cfg) as player:
        played = rollout(player.asking(3), tok, stops, hands('val', n=4), cfg.game)
        with torch.autocast('cpu', torch.bfloat16): again = [rollout(player.asking(s), tok, stops, hands('val', n=4), cfg.game) for s in (3, 4)]
    (llm,) = LLM.made
    assert len(stops) == 2 and llm.asked[0] == dict(n=1, repetition_penalty=1., temperature=.2, top_p=1., top_k=0, min_p=0., max_tokens=5, logprobs=None, stop_token_ids=stops)
    assert llm.how['max_num_seqs'] == cfg.eval.batch and llm.how['max_model_len'] == 512 and not llm.how['enable_sleep_mode']
    assert [t.ids for t in again[0]] == [t.ids for t in played] != [t.ids for t in again[1]]

def test_what_is_shown_can_be_asked_whether_it_is_of_peft(pico):
    "As TRL does where peft is installed."
    from accelerate.utils import extract_model_from_parallel
    shown = Shown(attach(load_lm(str(pico['qwen2']))[0]))
    assert extract_model_from_parallel(shown) is shown

def test_without_a_sync_answers_are_old(pico, monkeypatch):
    stand_in(monkeypatch.setattr)
    lm, tok = load_lm(str(pico['llama']))
    asked = encode(tok, [prompt(h) for h in hands('val', n=8)])
    with engine(Accelerator(cpu=True), attach(lm), tok, small(pico['llama'])) as player:
        old = player.asking(1)(asked)
        with torch.no_grad(): lm.model.norm.weight *= 5
        assert player.asking(1)(asked) == old
        player.renew()
        assert player.asking(1)(asked) != old

def test_chance_is_left_as_it_was():
    import random, numpy as np
    look = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    before = look()
    with pytest.raises(KeyError), drawn(5, CPU): assert look() != before; raise KeyError
    assert look() == before

# falling back

def installed(monkeypatch, kind='cuda', archs=('Qwen2ForCausalLM', 'LlamaForCausalLM')):
    monkeypatch.setattr(vllm, 'find_spec', lambda name: True)
    modules = dict(vllm=dict(ModelRegistry=SimpleNamespace(get_supported_archs=lambda: archs)), **{'vllm.platforms': dict(current_platform=SimpleNamespace(device_type=kind))})
    for name, has in modules.items():
        m = ModuleType(name); m.__dict__.update(has); m.__path__ = []
        monkeypatch.setitem(sys.modules, name, m)

def broken(monkeypatch):
    monkeypatch.setattr(vllm, 'find_spec', lambda name: True)
    monkeypatch.setitem(sys.modules, 'vllm', None) # which makes its import fail

REASONS = dict(missing=(lambda m: m.setattr(vllm, 'find_spec', lambda name: None), "vLLM is not installed; run: pip install -e '.[vllm]'"), broken=(broken, 'vLLM cannot be imported (ModuleNotFoundError: '),
    architecture=(lambda m: installed(m, archs=('OtherForCausalLM',)), 'vLLM has no Qwen2ForCausalLM'), other=(installed, 'vLLM is on cuda, the policy on cpu'),
    nowhere=(lambda m: installed(m, ''), 'vLLM is on no device that it knows, the policy on cpu'), cpu=(lambda m: installed(m, 'cpu'), "vLLM's CPU build takes no new weights"))

@pytest.mark.parametrize('reason', REASONS)
def test_a_run_that_cannot_have_vllm_says_so_once_and_goes_on(pico, tmp_path, monkeypatch, capsys, reason):
    change, why = REASONS[reason]
    change(monkeypatch)
    if reason == 'missing': plain = train_ppo(small(pico['qwen2'], 'hf'), str(pico['qwen2']), tmp_path/'hf', 1)['log']
    log = train_ppo(small(pico['qwen2'], updates=2 if reason == 'missing' else 1), str(pico['qwen2']), tmp_path/'run', 1)['log']
    said = [l.split('\x1b[A')[-1] for l in capsys.readouterr().err.splitlines() if 'vllm' in l.lower()] # below a bar that another test left open, it begins with a step up
    assert len(said) == 1 and said[0].startswith(f'launch.engine=vllm: {why}') and said[0].endswith('Rollouts are made with Hugging Face instead.')
    assert all('engine' not in l for l in log) and (reason != 'missing' or timeless(log) == timeless(plain))

def test_a_supported_policy_lacks_nothing(pico, monkeypatch):
    installed(monkeypatch)
    assert lacks(load_lm(str(pico['qwen2']))[0], torch.device('cuda:1')) == ''
    assert lacks(load_lm(str(pico['mllama']))[0], torch.device('cuda')) == 'vLLM has no MllamaForConditionalGeneration'

@pytest.mark.parametrize('more, message', [(dict(engine='vlm'), "launch.engine='vlm': expected 'hf' or 'vllm'"), (dict(temperature=.001), 'ppo.temperature=0.001: launch.engine=vllm samples at 0.01 or above')])
def test_impossible_settings_are_refused(pico, tmp_path, more, message):
    with pytest.raises(ParamError, match=message): train_ppo(small(pico['qwen2'], **more), str(pico['qwen2']), tmp_path/'new')
    assert not (tmp_path/'new').exists()

# the engine itself

@pytest.fixture
def real(monkeypatch):
    "vLLM in fp32, so that answers can be compared token by token."
    if not find_spec('vllm'): pytest.skip("vLLM is an extra that is not installed: pip install -e '.[vllm]'")
    import trl.generation.vllm_generation as trl
    from vllm.platforms import current_platform
    monkeypatch.setattr(trl, 'LLM', functools.partial(trl.LLM, dtype='float32', enforce_eager=True))
    if current_platform.device_type != 'cpu': return
    monkeypatch.setenv('VLLM_CPU_KVCACHE_SPACE', '1')
    for name, x in dict(lacks=lambda *_: '', share=lambda *_: .1).items(): monkeypatch.setattr(vllm, name, x)
    plain = lambda layer, remove_weight: setattr(layer, 'cpu_linear', torch.nn.functional.linear) # not packed, or it could take no new weights
    monkeypatch.setattr('vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm', plain)

@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    "Random small checkpoints with heads of 32, for which vLLM has kernels."
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from rlsft_nb.tiny import make_tokenizer
    tok, root = make_tokenizer(), tmp_path_factory.mktemp('wide')
    how = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=96, initializer_range=.2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    for kind, lm in dict(qwen2=Qwen2ForCausalLM(Qwen2Config(**how, tie_word_embeddings=False)), llama=LlamaForCausalLM(LlamaConfig(**how, tie_word_embeddings=True))).items():
        lm.generation_config.update(eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, do_sample=True, top_k=1, top_p=.1, repetition_penalty=9.) # filters, as chat models bring along
        save_lm(lm, tok, root/kind)
    return root

@pytest.mark.parametrize('kind', ['qwen2', 'llama'])
def test_real_answers_come_from_the_newest_weights_unfiltered(real, wide, kind):
    cfg, (lm, tok) = small(wide/kind, temperature=1.), load_lm(str(wide/kind))
    acc = ppo_run.accelerator(cfg)
    asked = encode(tok, [prompt(h) for h in hands('val', n=8)])
    with engine(acc, attach(lm.to(acc.device)), tok, cfg) as player:
        player.vllm.temperature = 0.
        old = player.asking(1)(asked)
        assert old == generate_ids(lm, tok, asked, max_new_tokens=5)
        with torch.no_grad(): [w.add_(torch.randn_like(w)*w.std()) for w in lm.parameters() if w.ndim == 2]
        player.renew()
        new = player.asking(1)(asked)
        assert new == generate_ids(lm, tok, asked, max_new_tokens=5) != old
        stop = torch.tensor(new).flatten()[0].item() # now a token that ends a turn
        player.vllm.generation_kwargs['stop_token_ids'] = [stop]
        assert player.asking(1)(asked)[0] == [stop]
        player.vllm.temperature = 1.
        player.vllm.max_completion_length = 1
        said = torch.tensor(player.asking(2)(asked[:1]*4000))[:, 0].cpu()
        with torch.no_grad(): p = lm(input_ids=torch.tensor(asked[:1], device=lm.device)).logits[0, -1].float().softmax(-1).cpu()
        rate = torch.bincount(said, minlength=len(p))/4000
        assert ((rate - p).abs() < 5*(p*(1 - p)/4000).sqrt() + 1/4000).all() and said.tolist() == torch.tensor(player.asking(2)(asked[:1]*4000))[:, 0].tolist()

def test_real_runs_train(real, wide, tmp_path):
    log = train_ppo(small(wide/'qwen2'), str(wide/'qwen2'), tmp_path, 1)['log']
    assert [l['engine'] for l in log] == ['vllm']*2 and not same(weights(tmp_path/'policy'), weights(wide/'qwen2'))
    assert log[0]['ratio_min'] <= 1 <= log[0]['ratio_max'] and not torch.distributed.is_initialized()
