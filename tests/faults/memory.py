"Less memory than a stage needs: told in one line, with the need, before anything is made; and a little more than that is enough."
import shutil
from collections import Counter
from pathlib import Path
from kills import Runner

PLANNED = ('base', 'SFT', 'curve', 'named', 'RL', 'RL, scored', 'spectra', 'restoration', 'imposed', 'theory') # steps whose stages have a row in `plan.table`
SHARES, NEED = (.02, .3, .9), 1.54 # of the need, which for so small a model is what `check_fits` sets aside, in GiB

def made(home) -> set: return {str(p) for p in Path(home).rglob('*') if p.is_file() and not p.name.endswith('.lock')}

def campaign(folder, pico, steps=PLANNED, shares=SHARES) -> dict:
    "Every planned step with too little memory, then with enough."
    run, f = Runner(folder, pico), dict(tried=0, enough=0, told=Counter(), lost=0, faults=[])
    home = run.folder/'home'
    def fault(*what): f['lost'] += 1; f['faults'].append(' '.join(map(str, what))[:400])
    try:
        if code := run.whole((1, 1), steps): fault('undisturbed: code', code, run.last()[-250:]) # from here on everything is imported before a limit holds
        shutil.rmtree(home, ignore_errors=True)
        for step in steps:
            for share in shares:
                before, f['tried'] = made(home), f['tried'] + 1
                run.start((1, 1), [step], int(share*NEED*1024)); code, text = run.wait(), run.said.read_text(errors='replace').strip()
                f['told'][text.split(':')[0][:30]] += 1
                if code != 1 or '\n' in text or 'GiB of memory' not in text: fault(step, f'with {share:.0%} of its need: code {code}:', text[-250:])
                if new := made(home) - before: fault(step, f'with {share:.0%} of its need made', *sorted(new)[:2])
            run.start((1, 1), [step], int(1.05*NEED*1024)); f['enough'] += 1
            if code := run.wait(): fault(step, f'with all of its need: code {code}:', run.last()[-250:])
    finally: run.close(); shutil.rmtree(home, ignore_errors=True)
    return f | dict(told=dict(f['told']))
