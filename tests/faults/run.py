"`make faults`: every campaign at its long size, a table of what was tried and lost, and the record faults.json."
import argparse, json, os, re, sys, tempfile, time
from pathlib import Path
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import disks, hostile_answers, hostile_files, hostile_texts, kills, longuse, memory, supply
from stages import small_model
from rlsft_nb.places import ROOT
from rlsft_nb.origins import provenance
from rlsft_nb.files import write_json

SIZES = dict(files=1000, texts=1000, generated=1_000_000, mutated=200_000, disks=100, kills=200, loops=50)

def campaigns(n:dict, seed:int, folder, pico, minutes:float, advisories='') -> dict: # name -> function
    "Every campaign; `n` as `SIZES`."
    return dict(files=lambda: hostile_files.campaign(n['files'], seed, folder/'files', pico).figures(), texts=lambda: hostile_texts.campaign(n['texts'], seed, folder/'texts').figures(),
                answers=lambda: hostile_answers.campaign(n['generated'], n['mutated'], seed), disks=lambda: disks.campaign(n['disks'], seed, folder/'disks', pico),
                kills=lambda: kills.campaign(n['kills'], seed, folder/'kills', pico, seconds=minutes*60),
                memory=lambda: memory.campaign(folder/'memory', pico), longuse=lambda: longuse.campaign(n['loops'], seed, folder/'longuse', pico), supply=lambda: supply.campaign(folder/'supply', advisories))

def tried(name, f) -> str:
    "What a campaign did, in a few words."
    if name in ('files', 'texts'): return f"{f['tried']:,} spoiled, at most {f['most']['seconds']} s and {f['most']['mib']:.0f} MiB each"
    if name == 'answers': return f"{f['generated']:,} generated, {f['mutated']:,} mutated; {f['exceptions']} exceptions, {f['disagreements']} disagreements, slowest {f['slowest']} s"
    if name == 'disks': return f"{f['full']} full, {f['limited']} limited, {f['read_only']} read-only, {f['slow']} slow, {f['places']} strange paths, {f['vanished']} vanished, {f['races']} races, {f['jumps']} clocks"
    if name == 'memory': return f"{f['tried']} stages with too little memory, {f['enough']} with enough"
    if name == 'longuse': return f"{f['loops']} runs of make paper{' on a small model' if f.get('model') else ''}, {f.get('kills', 0)} struck"
    if name == 'supply': return f"{len(f.get('resolved', ()))} resolutions, {len(f.get('smoked', ()))} of them installed and run; {f['audit']['known']} pins looked up, {len(f['audit']['unsafe'])} known to be unsafe" + (f"; {a['read']} advisories of {a['packages']} of {a['pins']} pins read, {len(a['unsafe'])} of a pinned version" if (a := f.get('advised')) else '')
    return f"{f['kills']} kills ({', '.join(f'{k} {v}' for k, v in f['struck'].items())}), {sum(f['spoiled'].values())} files spoiled; {f['differ']} of {f['compared']} files differ, {f['orphans']} orphans, {f['parts']} parts left"

def without_folders(text:str) -> str:
    "What a fault says, without where this machine keeps its files."
    return re.sub(r'''(['"])/[^'"]*/|(?<![\w.])/(?:[^\s/'"]+/)+''', r'\1', text)

def table(found:dict) -> str: # of the record
    "What README quotes."
    rows = [f"| {name} | {tried(name, f)} | {f['lost']} |" for name, f in sorted(found.items())]
    return '\n'.join(['| campaign | tried | lost |', '| --- | --- | ---: |', *rows])

def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--share', type=float, default=1., help='of the long sizes, such as 0.1')
    p.add_argument('--minutes', type=float, default=600., help='most that the kills may take')
    p.add_argument('--advisories', default='', help='a checkout of github.com/pypa/advisory-database, for the pins where there is no network')
    p.add_argument('--only', default='', help='campaigns, separated by commas')
    p.add_argument('--out', default=str(ROOT/'figures'/'faults.json'))
    o = p.parse_args()
    n = {k: v if isinstance(v, tuple) else max(1, round(v*o.share)) for k, v in SIZES.items()}
    out, lost = Path(o.out), 0
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        todo, env = campaigns(n, o.seed, d, small_model(d/'pico'), o.minutes, o.advisories), dict(os.environ)
        for name in o.only.split(',') if o.only else todo:
            (d/{'answers': 'x'}.get(name, name)).mkdir(exist_ok=True)
            start = time.monotonic()
            f = todo[name]()
            os.environ.clear(); os.environ.update(env)
            made = provenance()
            f |= dict(faults=[without_folders(x) for x in f['faults']], seed=o.seed, took=round(time.monotonic() - start), commit=made['commit'], dirty=made['dirty'])
            lost += f['lost']
            print(f"{name:<9}lost {f['lost']:>3}  {tried(name, f)}", flush=True)
            for fault in f['faults'][:5]: print(f'         {fault[:300]}', flush=True)
            earlier = json.loads(out.read_text())['campaigns'] if out.is_file() else {}
            write_json(out, dict(campaigns=earlier | {name: f}, **made))
    print(f"\n{table(json.loads(out.read_text())['campaigns'])}")
    return 1 if lost else 0

if __name__ == '__main__': sys.exit(main())
