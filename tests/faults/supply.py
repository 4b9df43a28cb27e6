"The lowest and the newest allowed versions of what is installed: resolved for each Python, installed and run for the oldest and the newest; and the pins set against what is known to be unsafe."
import json, os, re, shutil, subprocess
from configparser import ConfigParser
from pathlib import Path
import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version
from rlsft_nb.places import ROOT

PYTHONS, WAYS = ('3.10', '3.11', '3.12', '3.13', '3.14'), ('lowest-direct', 'highest')
EXTRAS = ('requirements', 'train_requirements', 'paper_requirements')
SMOKED = (('3.10', 'lowest-direct'), ('3.13', 'highest'))
SMOKE = '''
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1])/'faults')]
from stages import SMALL, STEPS, everything, small_model
at = Path(sys.argv[2])
over = SMALL | dict(model=dict(source='folder', path=str(small_model(at/'pico'))), workers=1, launch=dict(processes=1))
everything(over, list(STEPS), at/'out', at/'at.json')
'''

def asked(*keys) -> list:
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    return sorted({r for k in keys for r in ini['DEFAULT'][k].split()})

def resolved(python, way, folder, keys=EXTRAS) -> tuple: # name -> version; what it said where there is none
    "What uv would install."
    ask = Path(folder)/'asked.txt'
    ask.write_text('\n'.join(asked(*keys)) + '\n')
    p = subprocess.run([shutil.which('uv'), 'pip', 'compile', '-q', '--no-header', '--no-annotate', '--only-binary', ':all:', '--python-version', python, '--resolution', way, str(ask)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return dict(l.split('==') for l in p.stdout.splitlines() if '==' in l), p.stderr.strip() if p.returncode else ''

def smoked(python, way, folder, keys=EXTRAS) -> str: # what it said where it fails, in short; takes some GB of downloads
    "Installs what uv would, and makes every stage, record and command of a small model with it."
    at = Path(folder)/f'{python} {way}'
    at.mkdir(parents=True)
    (at/'asked.txt').write_text('\n'.join(asked(*keys)) + '\n')
    env = os.environ | dict(RLSFT_RUNS=str(at/'runs'), RLSFT_FIGURES=str(at/'figures'), PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', RLSFT_QUIET='1')
    run = [str(at/'env'/'bin'/'python'), '-c', SMOKE, str(ROOT/'tests'), str(at)]
    for words in (['uv', 'venv', '-q', '--python', python, str(at/'env')], ['uv', 'pip', 'install', '-q', '--python', run[0], '--only-binary', ':all:', '--resolution', way, '-r', str(at/'asked.txt')], run):
        p = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if p.returncode: return f"{' '.join(words[:3])}: {p.stderr.strip()[-400:]}"
    shutil.rmtree(at/'env')
    return ''

def audited(folder) -> dict:
    "What pip-audit says of the pins; `known` counts the packages that it could look up."
    tool = shutil.which('pip-audit')
    if not tool: return dict(known=0, unsafe=[], why='pip-audit is not installed')
    p = subprocess.run([tool, '-r', str(ROOT/'constraints.txt'), '--no-deps', '--disable-pip', '-f', 'json', '--progress-spinner', 'off'], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try: found = json.loads(p.stdout)['dependencies']
    except (ValueError, KeyError): return dict(known=0, unsafe=[], why=p.stderr.strip()[-200:])
    return dict(known=sum('vulns' in d for d in found), unknown=[d['name'] for d in found if 'vulns' not in d], unsafe=[f"{d['name']} {d['version']}: {v['id']}" for d in found for v in d.get('vulns', ())])

def holds(events:list, version:str) -> bool: # of a range; as the OSV schema has it
    "Whether an advisory's range has a version in it."
    inside = False
    for kind, at in (kv for e in events for kv in e.items()):
        if kind == 'introduced': inside |= at == '0' or Version(version) >= Version(at)
        elif kind == 'fixed': inside &= Version(version) < Version(at)
        elif kind == 'last_affected': inside &= Version(version) <= Version(at)
    return inside

def advised(folder) -> dict: # read: advisories of pinned packages; packages that have some; unsafe: pins that one of them names
    "The pins beside a checkout of github.com/pypa/advisory-database, which needs no network."
    pins = {canonicalize_name(l.split('==')[0]): l.split('==')[1].split(';')[0].strip() for l in (ROOT/'constraints.txt').read_text().splitlines() if re.match(r'[\w.-]+==', l)}
    read, unsafe = {}, []
    for p in sorted(Path(folder).glob('vulns/*/*.yaml')):
        name = canonicalize_name(p.parent.name)
        if name not in pins: continue
        told = yaml.safe_load(p.read_text())
        if 'withdrawn' in told: continue
        read[name] = read.get(name, 0) + 1
        mine = [a for a in told.get('affected', ()) if canonicalize_name(a['package']['name']) == name]
        if any(pins[name] in a.get('versions', ()) or any(holds(r['events'], pins[name]) for r in a.get('ranges', ()) if r['type'] == 'ECOSYSTEM') for a in mine): unsafe.append(f"{name} {pins[name]}: {told['id']}")
    return dict(read=sum(read.values()), packages=len(read), pins=len(pins), unsafe=unsafe)

def campaign(folder, advisories='') -> dict: # a checkout of the advisories, where there is no network
    "Every Python and both ways, and the audit; the ends are installed and run."
    f = dict(resolved={}, smoked={}, lost=0, faults=[], audit=audited(folder))
    if advisories: f['advised'] = advised(advisories)
    if not shutil.which('uv'): return f | dict(lost=1, faults=['uv is not installed: pip install uv pip-audit'])
    for python in PYTHONS:
        for way in WAYS:
            found, why = resolved(python, way, folder)
            f['resolved'][f'{python} {way}'] = {n: found[n] for n in ('torch', 'transformers', 'trl', 'numpy') if n in found}
            if why: f['faults'].append(f'Python {python}, {way}: {" ".join(why.split())[:300]}')
    for python, way in SMOKED:
        why = f['smoked'][f'{python} {way}'] = smoked(python, way, folder)
        if why: f['faults'].append(f'Python {python}, {way}, run: {" ".join(why.split())}')
    f['faults'] += f['audit']['unsafe'] + f.get('advised', {}).get('unsafe', [])
    return f | dict(lost=len(f['faults']))
