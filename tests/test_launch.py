"Launching: many processes do what one does, in shards or copies, on each architecture; interrupts leave nothing behind."
import io, json, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import psutil, pytest, torch, yaml
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy
from rlsft_nb.files import read_json
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.problems import ParamError, StageMissing
from rlsft_nb.stages import Stage
from rlsft_nb.models import cells, load_lm, score, woven
from rlsft_nb.launch import *
from rlsft_nb.launch import _stop, _why
from rlsft_nb.plan import config_file
from rlsft_nb.plan import idle, overrides_of
from rlsft_nb.pipeline import sft_stage

KINDS = ('qwen2', 'llama', 'mllama') # untied, tied, with a vision tower
SMALL = dict(sft=dict(steps=6, checkpoints=[3, 6], hands=64, batch=8, warmup=2, save_every=3, log_every=1, loss_hands=4), eval=dict(hands=8, val_hands=4, max_new_tokens=4), workers=1)
EXACT = 1e-5 # of losses and weights: sums in another order, in fp32

def small(pico, kind='qwen2', **more): return load_params('tiny', SMALL | dict(model=dict(source='folder', path=str(pico[kind]))) | more)
def weights(folder): return {n: p for n, p in load_lm(str(folder))[0].named_parameters()}
def far(a, b): return max((a[n] - b[n]).abs().max().item() for n in a)
def norm(a, b): return sum((a[n] - b[n]).double().square().sum().item() for n in a)**.5
def seen(st, key): return [h[key] for h in st.results()['log']]

SHARDS = '''
import sys, torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import TrainerCallback
from rlsft_nb import sft
from rlsft_nb.launch import options, resolved
from rlsft_nb.models import leave
from rlsft_nb.pipeline import sft_stage
torch.set_num_threads(1)
plain, last = sft.trainer, int(sys.argv[1])
class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == last: raise KeyboardInterrupt
def sharded(*args): # accelerate itself never shards on CPU
    t = plain(*args)
    state = t.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT")
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    t.is_fsdp_enabled = True
    t.add_callback(Stop())
    return t
sft.trainer = sharded
for overrides in sys.argv[2:]:
    try: sft_stage(resolved(options("sft", "").parse_args(["--overrides", overrides])))
    except KeyboardInterrupt: pass
leave()
'''

@pytest.fixture(scope='module')
def pairs(pico, tmp_path_factory):
    "The same SFT on one process, and in shards on two that were stopped after four of six steps and started again."
    root, out = tmp_path_factory.mktemp('shards'), {}
    cfgs = [small(pico, kind) for kind in KINDS]
    (root/'shards.py').write_text(SHARDS)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('OMP_NUM_THREADS', '1'); m.setenv('RLSFT_RUNS', str(root/'one'))
        one = [sft_stage(c) for c in cfgs]
        m.setenv('RLSFT_RUNS', str(root/'two'))
        two = [Stage('sft', 'tiny', st.params) for st in one]
        for last in (4, -1):
            r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc_per_node', '2', str(root/'shards.py'), str(last), *map(overrides_of, cfgs)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
            out[last] = [(st.done, sorted(p.name for p in st.path.glob('resume/checkpoint-3/*'))) for st in two]
    return dict(zip(KINDS, zip(one, two))), out, r.stderr

def test_a_sharded_run_resumes(pairs):
    _, out, said = pairs
    for done, files in out[4]: assert not done and 'pytorch_model_fsdp_0' in files and 'optimizer_0' in files
    assert [done for done, _ in out[-1]] == [True]*3, said[-3000:]

@pytest.mark.parametrize('kind', KINDS)
def test_two_sharded_processes_do_what_one_does(pairs, pico, kind):
    one, two = pairs[0][kind]
    assert seen(two, 'loss') == pytest.approx(seen(one, 'loss'), rel=EXACT) and seen(two, 'learning_rate') == seen(one, 'learning_rate')
    assert seen(two, 'grad_norm') == pytest.approx(seen(one, 'grad_norm'), rel=1e-4)
    start, still = weights(pico[kind]), set(idle(load_lm(str(pico[kind]))[0]))
    assert bool(still) == (kind == 'mllama')
    for n in (3, 6):
        a, b = weights(one.path/f'step-{n}'), weights(two.path/f'step-{n}') # the export loads as any other checkpoint
        assert a.keys() == b.keys() and far(a, b) < 5e-5 < far(a, start)
        assert {k for k in b if torch.equal(b[k], start[k])} == {k for k in a if torch.equal(a[k], start[k])} >= still
        assert read_json(two.path/f'step-{n}'/'config.json')['architectures'] == read_json(one.path/f'step-{n}'/'config.json')['architectures']

KILLED = '''
import os, sys
from transformers import TrainerCallback
from rlsft_nb import sft
plain, last = sft.trainer, int(sys.argv[1])
class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == last: os.kill(os.getpid(), 9)
def killed(*args):
    t = plain(*args)
    t.add_callback(Kill())
    return t
sft.trainer = killed
sys.exit(sft.main(sys.argv[2:]))
'''

@pytest.fixture
def quick_compiler(monkeypatch):
    "DeepSpeed compiles its Adam at the first start: without optimisation half as long, and apart from what a real run uses."
    (at := Path(sys.prefix)/'torch_extensions_of_tests').mkdir(exist_ok=True)
    if not (at/'c++').exists(): (at/'c++').write_text('#!/bin/sh\nexec c++ "$@" -O0 -g0\n'); (at/'c++').chmod(0o755)
    monkeypatch.setenv('CXX', str(at/'c++')); monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(at))

@pytest.mark.skipif(find_spec('deepspeed') is None, reason="pip install -e '.[deepspeed]'")
@pytest.mark.parametrize('kind, bf16', [('qwen2', False), ('llama', True), ('mllama', True)])
def test_deepspeed_does_what_one_process_does(pico, tmp_path, env, monkeypatch, quick_compiler, kind, bf16):
    "ZeRO-3 with the optimizer on the host, on two CPU processes; the second of two starts of Mllama, the first being killed after four steps."
    cfg = small(pico, kind, sft=SMALL['sft'] | dict(bf16=bf16), launch=dict(processes=2, config='deepspeed_zero3'))
    monkeypatch.setenv('DS_ACCELERATOR', 'cpu'); monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'one'))
    one = sft_stage(small(pico, kind, sft=cfg.sft))
    monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'two'))
    two, words, out = Stage('sft', 'tiny', one.params), command('sft', cfg, True), io.StringIO() # as where there are GPUs
    if kind == 'mllama':
        (tmp_path/'killed.py').write_text(KILLED)
        at = words.index('rlsft_nb.sft')
        with pytest.raises(LaunchError): stream(words[:at - 2] + ['--', str(tmp_path/'killed.py'), '4', *words[at + 1:]], out)
        assert not two.done and (two.path/'resume'/'checkpoint-3'/'trainer_state.json').is_file() and len(list(two.path.glob('resume/checkpoint-3/*/*optim_states.pt'))) == 2, out.getvalue()[-3000:]
    try: stream(words, out)
    except LaunchError: pass
    assert two.done, out.getvalue()[-3000:]
    assert read_json(two.path/'done.json')['resumed'] == (kind == 'mllama')
    assert seen(two, 'loss') == pytest.approx(seen(one, 'loss'), rel=5e-5 if bf16 else EXACT) and seen(two, 'learning_rate') == seen(one, 'learning_rate')
    start, still = weights(pico[kind]), set(idle(load_lm(str(pico[kind]))[0]))
    for n in (3, 6):
        a, b = weights(one.path/f'step-{n}'), weights(two.path/f'step-{n}')
        assert a.keys() == b.keys() and all(torch.equal(b[k], start[k]) for k in still)
        if not bf16: assert far(a, b) < 5e-5 < far(a, start)
        else: assert norm(a, b) < .02*norm(a, start) # Adam makes much of a gradient near zero

def test_a_stage_launches_its_processes(pico, tmp_path, env, monkeypatch, capfd):
    monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'one'))
    one = sft_stage(small(pico))
    monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'two'))
    two = sft_stage(small(pico, launch=dict(processes=2)))
    assert two.key == one.key and two.path != one.path # how it is made is no part of what it is
    assert seen(two, 'loss') == pytest.approx(seen(one, 'loss'), rel=EXACT)
    assert str(two.path) in capfd.readouterr().err # what the processes print is passed on
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(ParamError, match='sft.batch=8 over sft.accumulate=1 is no multiple of 3 processes'): sft_stage(small(pico), 1)

def test_a_score_split_over_processes_is_the_same(pico, env):
    over = dict(eval=dict(hands=21, max_new_tokens=6, batch=4), game=dict(attempts=2))
    code = 'import sys, json\nfrom rlsft_nb.parameters import load_params\nfrom rlsft_nb.models import *\ncfg = load_params("tiny", json.loads(sys.argv[2]))\ngot = score(sys.argv[1], cfg, "test", list(cells(cfg)), 2)\nif not rank(): print("got" + json.dumps(got))\nleave()'
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc_per_node', '2', '--no-python', sys.executable, '-c', code, str(pico['qwen2']), json.dumps(over)]
    two = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    got = json.loads(two.stdout.split('got')[1]) if 'got' in two.stdout else pytest.fail(two.stderr[-2000:])
    cfg = load_params('tiny', over)
    assert got == json.loads(json.dumps(score(str(pico['qwen2']), cfg, 'test', list(cells(cfg)), 2))) # every hand, bit and interval
    assert {r['n'] for r in got.values()} == {21} and woven([[0, 2, 4], [1, 3]]) == [0, 1, 2, 3, 4]

def test_scores_from_a_shell(pico, capsys):
    from rlsft_nb.models import main
    assert main([str(pico['qwen2']), '--overrides', '{eval: {hands: 5, max_new_tokens: 4}, game: {attempts: 1}}']) == 0
    assert capsys.readouterr().out.count('n 5') == 4

# starting and stopping

FAMILY = '''
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)
print(child.pid, flush=True)
{how}
time.sleep(60)
'''

@pytest.mark.parametrize('how', ['', 'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)'])
def test_an_interrupt_leaves_nothing_running(how, monkeypatch):
    monkeypatch.setattr('rlsft_nb.launch._stop', lambda p: _stop(p, 1))
    class Stopped(io.StringIO):
        def write(self, text): super().write(text); raise KeyboardInterrupt # as a notebook's stop button does
    out = Stopped()
    with pytest.raises(KeyboardInterrupt): stream([sys.executable, '-c', FAMILY.format(how=how)], out)
    pid = int(out.getvalue())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has ended')
def test_a_killed_notebook_takes_its_processes_along(tmp_path):
    code = f'import sys\nfrom rlsft_nb.launch import stream\nstream([sys.executable, "-c", "import os, time; open({str(tmp_path/"pid")!r}, \'w\').write(str(os.getpid())); time.sleep(60)"])'
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path/'pid').exists() or not (tmp_path/'pid').read_text(): time.sleep(.05)
    pid = int((tmp_path/'pid').read_text())
    p.kill(); p.wait()
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end: time.sleep(.05)
    assert time.monotonic() < end

@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere the environment of a process may not be read')
def test_a_killed_launcher_takes_its_processes_along():
    class Kill(io.StringIO):
        def write(self, text): super().write(text); psutil.Process(int(text)).parent().kill()
    out, start = Kill(), time.monotonic()
    with pytest.raises(LaunchError, match='code -9'): stream([sys.executable, '-c', FAMILY.format(how='')], out)
    pid = int(out.getvalue())
    assert time.monotonic() - start < 30 and (not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)

def test_the_first_message_is_told():
    assert _why('noise\n[rank1]:stopped: ParamError: no such key\nTraceback\nRuntimeError: later', 1) == 'ParamError: no such key'
    assert _why('[default0]:x\ntorch.OutOfMemoryError: CUDA out of memory\n', 1).startswith('a launched') or 'OutOfMemory' in _why('OutOfMemoryError: CUDA out of memory\n', 1)
    assert _why('said nothing useful', 7) == 'a launched process ended with code 7; its last words: said nothing useful'

# commands

def test_overrides_make_the_same_configuration():
    for over in ({}, dict(sft=dict(lr=1.0e-6, checkpoints=[1, 2], steps=4), launch=dict(processes=4)), dict(model=dict(source='folder', path="/a b/it's {x}"))):
        cfg = load_params('qwen7b', over)
        assert load_params('qwen7b', yaml.safe_load(overrides_of(cfg))) == cfg
    assert overrides_of(load_params('tiny')) == '{}'

def test_commands_with_and_without_gpus():
    cfg = load_params('qwen7b', dict(launch=dict(processes=4)))
    words = command('sft', cfg, True, seed=3)
    at = lambda w: words[words.index(w) + 1]
    assert words[:3] == [sys.executable, '-m', 'accelerate.commands.launch'] and at('--num_processes') == '4' and at('--mixed_precision') == 'bf16'
    assert at('--config_file') == str(ROOT/'params'/'accelerate'/'fsdp2.yaml') and at('--model') == 'qwen7b' and at('--seed') == '3'
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser
    for gpu, parser in ((True, launch_command_parser()), (False, get_args_parser())): # both would read --start as one of their own
        seen = parser.parse_args(command('ppo', cfg, gpu, start=3)[3:])
        assert seen.training_script == 'rlsft_nb.ppo' and seen.training_script_args[:4] == ['--model', 'qwen7b', '--start', '3'] and seen.module
    assert 'torch.distributed.run' in command('sft', cfg, False) and '--config_file' not in command('sft', cfg, False)
    assert command('sft', load_params('tiny'), True)[command('sft', load_params('tiny'), True).index('--mixed_precision') + 1] == 'no'

def test_a_machine_without_its_gpus_is_told_before_anything_starts(monkeypatch):
    cfg = load_params('qwen7b', dict(launch=dict(processes=4), needs=dict(gpus=99)))
    st = Stage('sft', 'qwen7b', {}, notebook='02_sft.ipynb')
    monkeypatch.setattr('rlsft_nb.launch.stream', lambda *_: 1/0)
    with pytest.raises(StageMissing, match='needs 99 GPUs of 80 GiB.*papermill nbs/02_sft.ipynb'): run_on_many(st, lambda _: {}, cfg, 'sft')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    with pytest.raises(ParamError, match='launch.processes=4: this machine has 2 GPUs'): run_on_many(st, lambda _: {}, load_params('tiny', dict(launch=dict(processes=4))), 'sft')

def test_deepspeed_is_not_held_to_the_estimate_for_shards(monkeypatch):
    class Checked(Exception): pass
    def no(kind):
        def f(*_, **__): raise kind('here')
        return f
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('rlsft_nb.launch.check_fits', no(Checked)); monkeypatch.setattr('rlsft_nb.launch.stream', no(LaunchError))
    for config, kind in (('fsdp2', Checked), ('deepspeed_zero3', LaunchError)):
        cfg = load_params('qwen7b', dict(launch=dict(processes=2, config=config), needs=dict(gpus=0)))
        with pytest.raises(kind): run_on_many(Stage('sft', 'qwen7b', {}), lambda _: {}, cfg, 'sft')
        monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('ACCELERATE_USE_DEEPSPEED', str(config == 'deepspeed_zero3').lower()) # as one of the launched processes
        with pytest.raises(Checked if config == 'fsdp2' else ZeroDivisionError): run_on_many(Stage('sft', 'qwen7b', {}), lambda _: 1/0, cfg, 'sft')
        monkeypatch.delenv('WORLD_SIZE')

# precision

def test_only_the_arithmetic_is_bf16(monkeypatch):
    class Plugin: mixed_precision_policy = None
    class Acc:
        mixed_precision = 'bf16'
        class state: fsdp_plugin, deepspeed_plugin = Plugin(), None
    assert keep_fp32(Acc).state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    Acc.mixed_precision, Acc.state.fsdp_plugin = 'no', Plugin()
    assert keep_fp32(Acc).state.fsdp_plugin.mixed_precision_policy is None
    class Zero: deepspeed_config = dict(bf16=dict(enabled=True), zero_optimization=dict(stage=3))
    Acc.state.fsdp_plugin, Acc.state.deepspeed_plugin, Acc.mixed_precision = None, Zero(), 'bf16'
    keep_fp32(Acc)
    assert Acc.state.deepspeed_plugin.deepspeed_config == dict(bf16=dict(enabled=False), zero_optimization=dict(stage=3), torch_autocast=dict(enabled=True, dtype='bfloat16'))

def test_gathering_names_what_is_lost(pico):
    lm, _ = load_lm(str(pico['qwen2']))
    acc = Accelerator(cpu=True)
    lm.extra = torch.nn.Linear(2, 2)
    plain, extra = gathered(acc, lm, type(lm))
    assert set(extra) == {'extra.weight', 'extra.bias'} and all(torch.equal(p, dict(lm.named_parameters())[n]) for n, p in plain.named_parameters())
    class Lossy:
        is_main_process, distributed_type = True, acc.distributed_type
        unwrap_model = staticmethod(lambda m: m)
        get_state_dict = staticmethod(lambda m: {k: v for k, v in m.state_dict().items() if 'norm' not in k})
    with pytest.raises(RuntimeError, match='tensors were not gathered, such as model.layers.0.input_layernorm.weight'): gathered(Lossy, lm, type(lm))

# files of params/accelerate/

@pytest.mark.parametrize('name', ['fsdp2', 'one_gpu', 'deepspeed_zero3'])
def test_accelerate_reads_its_files(name, monkeypatch):
    "Loaded as `accelerate launch` does, down to the environment that it hands to the processes."
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    path = str(config_file(name))
    config = load_config_from_file(path)
    assert config.mixed_precision == 'bf16' and config.num_processes == (1 if name == 'one_gpu' else 4)
    if name == 'deepspeed_zero3': # the rest needs deepspeed itself
        assert config.distributed_type == 'DEEPSPEED' and config.deepspeed_config['zero_stage'] == 3 and config.deepspeed_config['zero3_save_16bit_model'] is False
        return
    args, defaults, bf16 = _validate_launch_command(launch_command_parser().parse_args(['--config_file', path, '-m', 'rlsft_nb.sft']))
    assert args.use_fsdp == (name == 'fsdp2') and args.mixed_precision == 'bf16' and args.training_script == 'rlsft_nb.sft'
    if name == 'fsdp2':
        from accelerate.utils.launch import prepare_multi_gpu_env
        env = prepare_multi_gpu_env(args)
        assert env['ACCELERATE_USE_FSDP'] == 'true' and env['FSDP_VERSION'] == '2' and env['FSDP_STATE_DICT_TYPE'] == 'SHARDED_STATE_DICT' and env['FSDP_RESHARD_AFTER_FORWARD'].lower() == 'true'
        assert env['FSDP_CPU_RAM_EFFICIENT_LOADING'].lower() == 'false'

def test_plan_holds_for_the_sharded_run(pairs):
    "What a real process held, beside the prediction for a machine without a GPU."
    from rlsft_nb.plan import memory
    for kind, (one, two) in pairs[0].items():
        told = read_json(two.path/'done.json')['peak_mib']/1024
        assert .3 < told < sum(memory(load_params('tiny', SMALL), 'sft', 2).values())/2**30 + 1.5, kind

def test_deepspeed_weights_are_gathered_in_fp32(pico, monkeypatch):
    "Its own state dict would be rounded to bf16; deepspeed itself is not needed here."
    import types
    lm, _ = load_lm(str(pico['llama']))
    monkeypatch.setitem(sys.modules, 'deepspeed', types.ModuleType('deepspeed'))
    monkeypatch.setitem(sys.modules, 'deepspeed.utils', types.SimpleNamespace(safe_get_full_fp32_param=lambda p: p.detach().clone()))
    class Acc:
        is_main_process, distributed_type = True, types.SimpleNamespace(value='DEEPSPEED')
        unwrap_model = staticmethod(lambda m: m)
        get_state_dict = staticmethod(lambda m: {k: v.bfloat16() for k, v in m.state_dict().items()})
    plain, _ = gathered(Acc, lm, type(lm))
    assert all(p.equal(dict(lm.named_parameters())[n]) for n, p in plain.named_parameters()) and plain.lm_head.weight is plain.model.embed_tokens.weight
