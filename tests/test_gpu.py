"What runs on a GPU, on a pretended one: nothing is left behind on the CPU, and the numbers are the CPU's."
import pytest, torch
from accelerate.state import AcceleratorState, PartialState
from pretend import GPU, HERE, moved
from rlsft_nb import machine, parallel, ppo, ppo_run, rollouts
from rlsft_nb.parameters import load_params
from rlsft_nb.game import hands, prompt
from rlsft_nb.generation import encode, generate_ids
from rlsft_nb.models import load_lm
from rlsft_nb.sft import answer_loss

def test_the_pretence_refuses_what_a_gpu_refuses():
    with GPU() as g:
        a = torch.eye(3).to('cuda:0')
        with pytest.raises(RuntimeError, match='on the same device'): a @ torch.eye(3)
        with pytest.raises(TypeError, match="can't convert cuda:0"): a.numpy()
        for where, chance in (('cuda:0', 'cpu'), ('cpu', 'cuda:0')):
            with pytest.raises(RuntimeError, match='a generator of'): torch.randn(2, device=where, generator=torch.Generator(chance))
        a += 1
        assert (a.device, a.is_cuda, (a @ a).is_cuda, a.cpu().is_cuda, a.float().sum().item()) == (HERE, True, True, False, 12.) and {'matmul', 'sum'} <= g.ran
    assert isinstance(torch.Generator(), torch.Generator)

def asked(tok, n): return encode(tok, [prompt(h, '10') for h in hands('test', '10')[:n]])

def test_rollouts():
    lm, tok = load_lm('tiny')
    play = lambda: rollouts.Player(lm, tok, 31, 1., 3)(asked(tok, 6))
    here = play()
    with GPU() as g: moved(lm); there = play()
    assert here == there and len({tuple(x) for x in here}) == 6 and 'multinomial' in g.ran

def test_greedy_answers_and_losses():
    lm, tok = load_lm('tiny')
    ask = lambda: (generate_ids(lm, tok, asked(tok, 4), 31), answer_loss(lm, tok, hands('test', '10')[:4], '10'))
    here = ask()
    with GPU(): moved(lm); there = ask()
    assert here[0] == there[0] and there[1] == pytest.approx(here[1], rel=1e-5)

@pytest.mark.parametrize('over', [{}, dict(kl_coef=.1, credit='token')])
def test_an_update_of_ppo(over, monkeypatch):
    "Two epochs: rollout, credit, losses, backward, optimizer."
    cfg = load_params('tiny', dict(ppo=dict(episodes=8, batch=4, micro=2, epochs=2, **over), eval=dict(max_new_tokens=31)))
    def line(gpu):
        acc = ppo_run.accelerator(cfg)
        model, _, tok, ref = ppo_run.setup(acc, cfg, 'tiny', 0)
        if gpu:
            for state in (PartialState, AcceleratorState): monkeypatch.setitem(state._shared_state, 'device', HERE)
            for lm in (model, ref): lm and moved(lm)
        opt = torch.optim.SGD([dict(params=[*model.parameters()], lr=.1, top=.1)], foreach=False)
        got = ppo.play_and_learn(acc, model, opt, tok, ref, cfg, 0, 1)
        return {k: v for k, v in got.items() if k not in ('tokens_s', 'rollout_s', 'update_s')}
    here = line(False)
    with GPU() as g: there = line(True)
    assert there == pytest.approx(here, rel=1e-3, abs=1e-6) and 'backward' in g.ran and here['grad_norm'] > 0

def test_workers_see_one_gpu_each(monkeypatch):
    monkeypatch.setattr(parallel, 'own_device', lambda: 'cuda:1')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
    parallel._worker(1)
    assert machine.visible_gpus() == ['4', '7'] # one worker may launch processes on all
    parallel._worker(2)
    assert machine.visible_gpus() == ['7']
