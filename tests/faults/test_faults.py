"Each campaign in short; `make faults` runs them at length."
import json, shutil, sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
import pytest
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import disks, hostile_answers, hostile_files, hostile_texts, kills, memory
from rlsft_nb.places import ROOT

linux = pytest.mark.skipif(sys.platform != 'linux', reason='limits and /proc are those of Linux')

def lost(f): return f['lost'], f['faults']

@linux
def test_hostile_files(tmp_path, pico): assert lost(hostile_files.campaign(30, 0, tmp_path, pico['qwen2'], heavy=False).figures()) == (0, [])

@linux
def test_hostile_texts(tmp_path, monkeypatch):
    pytest.importorskip('gguf')
    for k in ('RLSFT_RUNS', 'RLSFT_FIGURES'): monkeypatch.setenv(k, '') # put back afterwards
    assert lost(hostile_texts.campaign(60, 0, tmp_path).figures()) == (0, [])

def test_hostile_answers():
    f = hostile_answers.campaign(8000, 2000, 0)
    assert lost(f) == (0, []) and min(f['outcomes'].values()) > 50 and len(f['outcomes']) == 5

def test_the_second_verifier_can_disagree():
    assert [hostile_answers.opinion(t, [6, 4, 4, 3], 24) for t in ('6*4*(4-3)', '6*4*(4-3)=24', '6*4', '6+4+4+3', '6/(4-4)+3', '2**3', '')] == [5, 5, -2, -1, -1, -3, -3]

@linux
def test_disks(tmp_path, pico, monkeypatch):
    for k in ('RLSFT_RUNS', 'RLSFT_FIGURES'): monkeypatch.setenv(k, '')
    assert lost(disks.campaign(2, 0, tmp_path, pico['qwen2'], ('stage', 'restore'), disks.STRANGE[1:4])) == (0, [])

@linux
def test_kills(tmp_path, pico):
    f = kills.campaign(2, 0, tmp_path, pico['qwen2'], (((1, 1), ('SFT', 'curve'), 1., 1.),))
    assert (f['lost'], f['differ'], f['orphans'], f['parts'], f['faults']) == (0, 0, 0, 0, []) and f['kills'] >= 1 and f['compared'] > 10

@linux
def test_memory(tmp_path, pico): assert lost(memory.campaign(tmp_path, pico['qwen2'], ('base', 'SFT'), (.3,))) == (0, [])

# what comes from elsewhere

def test_code_of_a_checkpoint_never_runs(tmp_path, pico):
    import torch
    from rlsft_nb.generation import ModelError
    from rlsft_nb.models import load_lm
    from rlsft_nb.problems import CheckpointError
    from rlsft_nb.weights import open_checkpoint
    at, ran = shutil.copytree(pico['qwen2'], tmp_path/'ck'), tmp_path/'ran'
    for n in ('modeling_evil', 'configuration_evil', 'tokenization_evil', 'conftest', 'sitecustomize'): (at/f'{n}.py').write_text(f'open({str(ran)!r}, "w").close()\nclass C: pass\n')
    config = json.loads((at/'config.json').read_text())
    for auto in (dict(AutoConfig='configuration_evil.C', AutoModelForCausalLM='modeling_evil.C'), dict(AutoModelForCausalLM='modeling_evil.C')):
        (at/'config.json').write_text(json.dumps(config | dict(auto_map=auto, model_type='evil')))
        with pytest.raises(ModelError): load_lm(str(at))
        open_checkpoint(at)
        (at/'config.json').write_text(json.dumps(config | dict(auto_map=auto)))
        load_lm(str(at)) # a known type is read by the library's own code
    class Evil:
        def __reduce__(self): return open, (str(ran), 'w')
    (at/'model.safetensors').unlink(); torch.save(Evil(), at/'pytorch_model.bin')
    with pytest.raises(CheckpointError, match='pickled weights'): open_checkpoint(at)
    with pytest.raises(ModelError): load_lm(str(at))
    assert not ran.exists()

class Seen(HTMLParser):
    def __init__(self): super().__init__(); self.odd = []
    def handle_starttag(self, tag, attrs):
        if tag == 'link' and dict(attrs).get('href') == 'data:,' or tag == 'form' and not dict(attrs).get('action'): return # no icon is asked for; a form that only filters
        if tag in ('script', 'iframe', 'object', 'embed', 'link', 'base', 'form') or tag == 'meta' and dict(attrs).get('http-equiv'): self.odd.append(tag)
        self.odd += [f'{tag} {k}={v}'[:80] for k, v in attrs if k.startswith('on') or k in ('src', 'href', 'srcset', 'data', 'action', 'style') and not str(v or '').startswith(('data:image/png', '#', '../', './')) and (k != 'style' or 'url' in str(v)) and k != 'href' or k == 'href' and str(v).lower().startswith(('javascript', 'data'))]

def test_pages_load_nothing_from_elsewhere(tmp_path, pico):
    from rlsft_nb import comparison_page, report
    evil = tmp_path/'"><script>alert(1)<'
    shutil.copytree(pico['qwen2'], evil)
    assert comparison_page.main([str(evil), str(pico['qwen2']), '--out', str(tmp_path/'c'), '--matrices', 'layers.0.q', '--draws', '2', '--workers', '1', '--quiet']) == 0
    assert report.main(['--out', str(tmp_path/'r.html'), '--quiet']) == 0
    pages = [*tmp_path.glob('*.html'), *(tmp_path/'c').glob('*.html')]
    assert len(pages) == 2
    for p in pages:
        text, seen = p.read_text(), Seen()
        seen.feed(text)
        assert seen.odd == [] and '@import' not in text and 'url(http' not in text and '<script>alert' not in text, p.name

def test_pins_lie_within_the_bounds():
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    pins = {}
    for r in map(Requirement, (l for l in (ROOT/'constraints.txt').read_text().splitlines() if l and not l.startswith('#'))):
        if not r.marker or r.marker.evaluate(default_environment()): pins[r.name.lower().replace('_', '-')] = next(iter(r.specifier)).version
    for key in ('requirements', 'dev_requirements', 'smollm2_requirements', 'workflow_requirements'):
        for r in map(Requirement, ini['DEFAULT'][key].split()):
            name = r.name.lower().replace('_', '-')
            assert name in pins and r.specifier.contains(pins[name]), f'{r}: pinned {pins.get(name)}'

@pytest.mark.parametrize('events, inside', [([{'introduced': '0'}], True), ([{'introduced': '0'}, {'fixed': '2.0'}], False), ([{'introduced': '2.13'}], True), ([{'introduced': '3'}], False),
                                            ([{'introduced': '0'}, {'last_affected': '2.12.9'}], False), ([{'introduced': '0'}, {'fixed': '1.0'}, {'introduced': '2.13.0'}, {'fixed': '2.13.1'}], True)])
def test_advisories_that_name_a_pin(tmp_path, events, inside, monkeypatch):
    import supply
    monkeypatch.setattr(supply, 'ROOT', tmp_path)
    (tmp_path/'constraints.txt').write_text('# comment\ntorch==2.13.0\nPy_YAML==6.0 ; python_version < "4"\n')
    advisory = lambda name, about, **more: dict(id=name, affected=[dict(package=dict(name=about, ecosystem='PyPI'), **more)])
    told = [('torch', advisory('A', 'torch', ranges=[dict(type='ECOSYSTEM', events=events)])), ('torch', advisory('B', 'torch', ranges=[dict(type='GIT', events=[{'introduced': '0'}])])), ('other', advisory('C', 'other', versions=['2.13.0'])),
            ('py-yaml', advisory('D', 'py.yaml', versions=['6.0'])), ('torch', advisory('E', 'torch', versions=['2.13.0']) | dict(withdrawn='2024-01-01T00:00:00Z'))]
    for at, a in told:
        (tmp_path/'vulns'/at).mkdir(parents=True, exist_ok=True)
        (tmp_path/'vulns'/at/f"{a['id']}.yaml").write_text(json.dumps(a))
    assert supply.advised(tmp_path) == dict(read=3, packages=2, pins=2, unsafe=['py-yaml 6.0: D'] + ['torch 2.13.0: A']*inside)

def test_readme_quotes_the_published_campaigns():
    from run import table, without_folders
    from rlsft_nb.files import read_json
    found = read_json(ROOT/'figures'/'faults.json')['campaigns']
    assert table(found) in (ROOT/'README.md').read_text() and {*found} == {'answers', 'disks', 'files', 'kills', 'longuse', 'memory', 'supply', 'texts'}
    assert without_folders("stays: ['/a/b c/.venv/bin/python', '-m'] in runs/tiny/x of /tmp/y") == "stays: ['python', '-m'] in runs/tiny/x of y"
    assert all(without_folders(x) == x for f in found.values() for x in f['faults']) # this machine's folders stay here
