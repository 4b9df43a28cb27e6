"The whole pipeline on a random pico model; what a late notebook made first, the others find."
import json, os, subprocess, sys
from rlsft_nb.files import read_json
from rlsft_nb.places import ROOT
from rlsft_nb.runner import numbered

SMALL = dict(sft=dict(steps=6, checkpoints=[2, 4, 6], hands=32, batch=8, warmup=2, loss_hands=6, log_every=1), eval=dict(hands=16, val_hands=8, max_new_tokens=4),
             game=dict(attempts=2), ppo=dict(updates=1, episodes=8, batch=8, micro=4, epochs=1, between=1), spectra=dict(draws=3), theory=dict(draws=3, blocks=dict(steps=20, seeds=1)),
             restore=dict(draws=50, ranks=[.2, 1.], prefixes=[.5], bands=2, place_ranks=[.5], coded_ranks=[.5], blends=[.5]), workers=1)

def run(nb, overrides):
    r = subprocess.run([sys.executable, '-m', 'papermill', f'nbs/{nb}.ipynb', '-p', 'model', 'tiny', '-y', f'overrides: {json.dumps(overrides)}'],
                       cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert r.returncode == 0, r.stderr[-3000:]

def made(folder): return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob('done.json')}
def shown(folder): return {p.name: p.read_bytes() for p in next((folder/'tiny').glob('records-*')).iterdir()}

def test_every_notebook_and_one_twice(pico, tmp_path):
    small, runs = SMALL | dict(model=dict(source='folder', path=str(pico['qwen2']))), tmp_path/'runs'
    run('05_restore', small) # makes the stages that it needs
    first, figures = made(runs), shown(runs)
    assert {p.split('/')[1].rsplit('-', 1)[0] for p in first} >= {'sft', 'sft-curve', 'ppo', 'restore'} and 'fig6-seed0.png' in figures, [*figures]
    for nb in numbered():
        if nb.stem != '00_game': run(nb.stem, small)
    again, all_figures = made(runs), shown(runs)
    assert {k: again[k] for k in first} == first # nothing was made twice
    assert {k: all_figures[k] for k in figures} == figures # drawn again from the records, to the byte
    assert {'fig2-seed0.png', 'fig1-sft-seed0.json', 'fig1-seed0.json', 'fig3-seed0.png', 'fig7-seed0.png', 'figA-seed0.json', 'claims-seed0.json'} <= set(all_figures)
    for d in runs.rglob('done.json'):
        told = read_json(d)
        assert {'commit', 'versions', 'device', 'seconds', 'peak_mib', 'date'} <= set(told) and read_json(d.parent/'results.json')
