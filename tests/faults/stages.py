"Every stage, record and command on a small model, step by step: what the campaigns of kills and of memory run."
import contextlib, importlib, io, json, os, shlex, sys, time
from pathlib import Path

SMALL = dict(sft=dict(steps=6, checkpoints=[2, 4, 6], hands=16, batch=4, warmup=2, save_every=2, log_every=1, loss_hands=4), eval=dict(hands=8, val_hands=4, max_new_tokens=4), game=dict(attempts=2),
             ppo=dict(updates=3, episodes=8, batch=8, micro=4, epochs=1, between=1, save_every=1), spectra=dict(draws=2),
             restore=dict(draws=20, ranks=[.2, 1.], prefixes=[.5], bands=2, place_ranks=[.5], coded_ranks=[.5], blends=[.5], controls=['swap'], layer_controls=['swap'], within=['peak/directions-all-20%'], base_ranks=[1.], base_controls=['swap'], imposed_ranks=[1.], imposed_controls=['swap']), theory=dict(draws=3, blocks=dict(steps=20, seeds=1)))

# --- steps: name -> function of a configuration and of the folder that commands write to

def _made(name, **more): # a function of the pipeline
    def step(cfg, out):
        from rlsft_nb import pipeline
        f = getattr(pipeline, name)
        return f(cfg, *(pipeline.curve_stage(cfg).results()['end'] for _ in more)).results()
    return step

def _swept(cfg, out): # every start, as `make paper` asks
    from rlsft_nb import pipeline, ppo
    for s in ppo.starts(pipeline.curve_stage(cfg).results(), cfg.ppo.between): pipeline.score_stage(cfg, s)
    return pipeline.sweep_stage(cfg).results()

def _named(cfg, out):
    from rlsft_nb import pipeline, spectra
    return {label: pipeline.pair_stage(cfg, label).results() for label in spectra.pairs(pipeline.named_with_rl(cfg))}

def _figures(cfg, out):
    from rlsft_nb import sft, sweep
    from rlsft_nb.records import save_figure, save_record
    curve, scores, log = STEPS['curve'](cfg, out), STEPS['named'](cfg, out), STEPS['SFT'](cfg, out)['log']
    save_record('fig2-seed0', dict(curve=curve, log=log), cfg)
    save_figure(sft.fig_curve(curve, log, 'small'), 'fig2-seed0', cfg)
    save_record('fig1-sft-seed0', dict(scores=scores), cfg)
    scores['rl'] = dict(within=STEPS['RL, scored'](cfg, out))
    save_record('fig1-seed0', dict(scores=scores, log=STEPS['RL'](cfg, out)['log']), cfg)
    save_figure(sft.fig_stages(scores, 'small'), 'fig1-seed0', cfg)
    swept = STEPS['sweep'](cfg, out)
    save_record('sweep-seed0', dict(sweep=swept), cfg)
    save_figure(sweep.fig_sweep(swept, 'small'), 'sweep-seed0', cfg)
    save_record('fig3-seed0', _named(cfg, out), cfg)
    save_record('fig7-seed0', STEPS['imposed'](cfg, out), cfg)

def _claims(cfg, out):
    from rlsft_nb.claims import judge_claims
    from rlsft_nb.records import save_record
    save_record('claims-seed0', judge_claims(cfg, [0]), cfg)

asked = {} # the overrides of this run
REFUSE = ('envs.export_main', 'surgery.main')

def _typed(main, *words): # a command on the checkpoints of the run
    def step(cfg, out):
        from rlsft_nb import pipeline
        from rlsft_nb.parallel import named_function
        at = dict(out=str(out), python=shlex.quote(sys.executable), over=json.dumps(asked), **{k: cfg.model.path if k == 'base' else str(p) for k, p in pipeline.named_with_rl(cfg).items()})
        if main in REFUSE and Path(words[words.index('--out') + 1].format(**at)).exists(): return # it is whole, and these write nothing over it
        if code := named_function(main)([w.format(**at) for w in words]): sys.exit(code)
    return step

STEPS = {'base': _made('base_stage'), 'SFT': _made('sft_stage'), 'curve': _made('curve_stage'), 'named': _made('named_stage'), 'RL': _made('rl_stage', end=1), 'RL, scored': _made('score_stage', end=1), 'sweep': _swept,
         'spectra': _named, 'restoration': _made('restore_stage'), 'imposed': _made('imposed_stage'), 'theory': _made('theory_stage'), 'blocks': _made('blocks_stage'), 'figures': _figures, 'claims': _claims,
         'report': _typed('report.main', '--overrides', '{over}', '--out', '{out}/report.html', '--quiet'), 'export': _typed('envs.export_main', '--out', '{out}/hands', '--splits', 'val', '--solutions', '1', '--quiet'),
         'compare': _typed('comparison_page.main', '{base}', '{end}', '--out', '{out}/compared', '--draws', '2', '--matrices', 'layers.0.*', '--workers', '1', '--quiet'), 'restore': _typed('surgery.main', '--target', '{end}', '--reference', '{base}', '--out', '{out}/restored', '--quiet'),
         'rlsft sweep': _typed('surgery.main_sweep', '--target', '{end}', '--reference', '{base}', '--out', '{out}/swept', '--score', '{python} -S -c print(1)', '--strengths', '0,1', '--quiet'),
         'forget': _typed('forget_page.main', '{base}', '{end}', '--texts', '6', '--draws', '2', '--matrices', 'layers.0.*', '--out', '{out}/card.html', '--quiet')}

def everything(over, names, out, at):
    "The steps `names`; the file `at` holds the one that runs, and how long the earlier ones took."
    from rlsft_nb.parameters import load_params
    cfg, took = load_params('tiny', over), {}
    asked.update(over)
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        at.with_suffix('.new').write_text(json.dumps(dict(now=name, took=took))); os.replace(at.with_suffix('.new'), at)
        start = time.monotonic()
        STEPS[name](cfg, out)
        took[name] = time.monotonic() - start
    at.write_text(json.dumps(dict(now='', took=took)))

def small_model(folder) -> Path:
    "A random model of two layers with the embedded tokenizer."
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from rlsft_nb.tiny import make_tokenizer
    tok = make_tokenizer()
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                                      pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None, tie_word_embeddings=False))
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = tok.eos_token_id, tok.pad_token_id
    lm.save_pretrained(folder); tok.save_pretrained(folder)
    return Path(folder)

# --- a process that has imported everything once, and forks for every run: what is killed is the fork

def run(how) -> int:
    "One run, in a process of its own: `how` has over, names, out, at, said, mib (of memory that it may take; 0 for all)."
    from rlsft_nb.commands import ended
    os.setsid()
    said = os.open(how['said'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0); os.dup2(said, 1); os.dup2(said, 2)
    if how['mib']:
        import psutil, resource
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + how['mib']*2**20,)*2)
    code = ended(lambda: everything(how['over'], how['names'], Path(how['out']), Path(how['at'])) or 0)
    if how.get('warm') and not code: Path(how['warm']).write_text(json.dumps([m for m in sys.modules if m.split('.')[0] != '__main__']))
    return code

def serve():
    "Reads what is asked, a line each; answers with the process and, at its end, its code."
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1) # libraries print at their import
    import matplotlib; matplotlib.use('agg')
    for m in ('comparison_page', 'envs', 'forget_page', 'pipeline', 'report', 'surgery'): importlib.import_module(f'rlsft_nb.{m}')
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get('load'):
            for m in json.loads(Path(asked['load']).read_text()):
                with contextlib.suppress(BaseException), contextlib.redirect_stderr(io.StringIO()): importlib.import_module(m)
        if not (pid := os.fork()):
            code = 70
            try: code = run(asked)
            except SystemExit as e: code = e.code if isinstance(e.code, int) else 1
            except BaseException: import traceback; traceback.print_exc()
            finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)

if __name__ == '__main__': serve()

def small_paper(new, pico):
    "Makes a copy of settings.ini, params and the package into a repository with a model `small`; each numbered notebook asks for one stage, as the real ones do for all of theirs."
    from rlsft_nb.files import read_json, write_json
    over = SMALL | dict(model=dict(source='folder', path=str(pico)), workers=2)
    write_json(Path(new)/'params'/'small.yaml', over)
    toy = read_json(Path(__file__).parent.parent/'toy.ipynb')
    for nb, ask in {'02_sft': 'named_stage(cfg, seed)', '03_ppo': 'sweep_stage(cfg, seed)', '06_theory': 'theory_stage(cfg, seed)'}.items():
        toy['cells'][-1]['source'] = f'from rlsft_nb import pipeline\nstage = pipeline.{ask}\nsave_record(f"{nb}-seed{{seed}}", dict(n=1), cfg)'
        write_json(Path(new)/'nbs'/f'{nb}.ipynb', toy)
