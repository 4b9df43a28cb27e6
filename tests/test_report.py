"The report: one page that holds everything, with and without a browser."
import base64, html, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from xml.etree import ElementTree
import pytest
from rlsft_nb.claims import load_claims
from rlsft_nb.judging import VERDICTS
from rlsft_nb import judging, report
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.report import content, figure, main, page, png_size, svg_size, template, vector
from test_claims import fake, save

PNG = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')

def figures(folder): # a small picture, and a wide one as matplotlib saves it
    import matplotlib.pyplot as plt
    for name in ('fig1-seed0', 'sweep-seed0', 'fig4-law'): (folder/'figures'/'tiny'/f'{name}.png').write_bytes(PNG)
    fig = plt.figure(figsize=(9, 3)); fig.savefig(folder/'figures'/'tiny'/'fig2-seed0.png'); plt.close(fig)

@pytest.fixture(scope='module')
def told(tmp_path_factory):
    "What the template takes, from the records of two seeds."
    folder = tmp_path_factory.mktemp('two')
    for s in range(2): save(fake(s), folder, s)
    figures(folder)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('RLSFT_FIGURES', str(folder/'figures'))
        m.setattr('rlsft_nb.report.vector', lambda *_: b'') # what is drawn here has no whole record
        return content('tiny')

@pytest.fixture(scope='module')
def text(told): return template().render(told)

class Page(HTMLParser):
    "Tags with their attributes, ids, text by tag, and what encloses each table."
    VOID = {'meta', 'link', 'img', 'br', 'input'}
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.said, self.tables, self.wrong = [], [], [], [], []
        self.feed(text); self.close()
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == 'table': self.tables.append([a.get('class', '') for _, a in self.open])
        if tag not in self.VOID: self.open.append((tag, attrs))
    def handle_endtag(self, tag):
        if self.open and self.open[-1][0] == tag: self.open.pop()
        else: self.wrong.append((tag, self.getpos()))
    def handle_data(self, data): self.said.append(([t for t, _ in self.open], data))
    def all(self, name): return [a for t, a in self.tags if t == name]

def test_page_holds_everything(text):
    p = Page(text)
    assert not p.wrong and not p.open, 'every tag is closed in its order'
    images = p.all('img')
    assert len(images) == 5 and all(a['alt'] and a['src'].startswith('data:image/png;base64,' if i else 'data:image/svg+xml;base64,') for i, a in enumerate(images))
    assert [(png_size if i else svg_size)(base64.b64decode(a['src'].split(',')[1])) for i, a in enumerate(images)] == [(int(a['width']), int(a['height'])) for a in images]
    links = [v for t, a in p.tags for k, v in a.items() if k in ('src', 'href', 'srcset', 'data', 'action', 'poster')]
    assert all(v.startswith(('data:', '#')) for v in links) and not re.search(r'https?://|@import|url\(', text)
    assert not p.all('script') and not p.all('iframe') and not [k for _, a in p.tags for k in a if k.startswith('on')]
    ids = [a['id'] for _, a in p.tags if 'id' in a]
    assert len(ids) == len(set(ids)) and {v[1:] for v in links if v.startswith('#')} <= set(ids)

def test_page_can_be_read_by_anybody(text):
    p = Page(text)
    assert p.all('html') == [dict(lang='en')] and any('width=device-width' in a.get('content', '') for a in p.all('meta')) and any('light dark' in a.get('content', '') for a in p.all('meta'))
    levels = [int(t[1]) for t, _ in p.tags if re.fullmatch('h[1-6]', t)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    assert len(p.tables) > 4 and all('scroll' in t for t in p.tables), 'a table may be wider than a phone, its container is not'
    assert all(a.get('tabindex') == '0' and a.get('aria-label') for _, a in p.tags if a.get('class') in ('scroll', 'picture')), 'what scrolls can be reached by keyboard and has a name'
    assert all(a.get('scope') in ('col', 'row', 'rowgroup') for a in p.all('th'))
    shown = [s.strip() for stack, s in p.said if s.strip() in VERDICTS and 'span' in stack]
    assert set(shown) == set(VERDICTS) and len(shown) >= 2*len(load_claims()['claims']), 'a verdict is a word'

def test_page_says_what_the_records_say(text, told):
    c, plain = told, html.unescape(re.sub('<[^>]+>', ' ', text)).replace('\xa0', ' ')
    for claim in c['r']['claims']: assert claim['claim'] in plain and claim['here'] in plain and claim['threshold'] in plain
    assert 'tiny/ppo-1a2b3c4d' in text and 'H100' in text and 'make paper MODEL=tiny SEEDS=2' in text and 'learning_rate' not in text
    for name, sha in c['r']['files'].items(): assert f'figures/tiny/{name}' in text and sha[:16] in text
    assert 'papermill nbs/02_sft.ipynb -p model tiny -p seed 1' in text and 'embedded' in text
    drawn, missing = ([f for f in c['figures'] if bool(f['data']) == b] for b in (True, False))
    assert [f['name'] for f in drawn] == ['fig1', 'fig2', 'sweep', 'fig4-law'] and 'Not drawn yet' in text and all(f['command'] in plain for f in missing)

def test_figures_are_drawn_from_their_records(monkeypatch):
    monkeypatch.setenv('RLSFT_FIGURES', str(ROOT/'figures'))
    cfg, t = load_params('tiny'), load_claims()
    for name in ('fig1', 'fig4-law', 'fig6-distance'):
        svg = vector(name, cfg, 0)
        tags = {e.tag.rpartition('}')[2] for e in ElementTree.fromstring(svg).iter()}
        assert svg == vector(name, cfg, 0) and b'<date>' not in svg.replace(b'dc:', b'') and not tags & {'script', 'image', 'text', 'a', 'foreignObject'}
        w, h = png_size((ROOT/'figures'/'tiny'/(f'{name}.png' if name == 'fig4-law' else f'{name}-seed0.png')).read_bytes())
        assert all(abs(a - b) < 3 for a, b in zip(svg_size(svg), (w, h))), 'as large as the picture in git'
    entry = next(f for f in t['figures'] if f['name'] == ['fig4-law'])
    assert figure(entry, t['records'], cfg, 0)['data'].startswith('data:image/svg+xml;base64,')
    monkeypatch.setattr(report, 'LARGEST', 1000)
    assert vector('fig4-law', cfg, 0) == b'' and figure(entry, t['records'], cfg, 0)['data'].startswith('data:image/png;base64,')
    assert vector('fig1', cfg, 999) == b'', 'no record'

def test_claims_are_filtered_by_verdict_without_a_script(text, told):
    p = Page(text)
    ids = [a['id'] for a in p.all('input')]
    assert ids == ['show-all', *(f"show-{v.replace(' ', '-')}" for v in told['given'])] and {a['for'] for a in p.all('label')} == set(ids)
    rows = [a['class'] for a in p.all('tr') if a.get('class', '').startswith('claim ')]
    assert len(rows) == len(told['r']['claims']) == sum(told['given'].values())
    for v in VERDICTS: assert f"#show-{v.replace(' ', '-')}:checked) ~ .scroll tr.claim:not(.{v.replace(' ', '-')})" in text

def test_findings_and_what_they_need(text, told):
    assert [c['id'] for c, _ in told['findings']] == [f['id'] for f in load_claims()['findings']] and len(told['findings']) == 6
    plain = html.unescape(re.sub('<[^>]+>', ' ', text))
    for word in ('Four cards', 'In distribution', 'Out of distribution', 'To make all of it again'): assert plain.index(word) < plain.index('Paper by paper, the first in its own order')
    assert [f['id'] for f in Page(text).all('figure')[:2]] == ['figure-claims', f"figure-{told['main']['name']}"] and text.index('figure-claims') < text.index('id="findings"') and text.count(f"id=\"figure-{told['main']['name']}\"") == 1

def test_the_scoreboard_says_what_the_table_says(told):
    alt, n = told['board']['alt'], len(told['r']['claims'])
    assert all(f'{k} {v}' in alt for v, k in told['given'].items()) and sum(told['given'].values()) == n
    import matplotlib.pyplot as plt
    fig = judging.fig_verdicts(told['r'], 'tiny')
    marks = [l.get_label() for l in fig.axes[0].lines]
    assert {v: marks.count(v) for v in told['given']} == told['given'] and len(marks) == n, 'one mark a claim'
    assert [t.get_text() for t in fig.axes[0].get_yticklabels() if t.get_text()] == list(told['r']['papers'].values())
    assert len({(l.get_marker(), l.get_fillstyle(), l.get_markerfacecolor()) for l in fig.axes[0].lines}) == len({*marks}), 'told apart'
    assert len({(l.get_marker(), l.get_fillstyle(), l.get_markerfacecolor() == 'white') for l in fig.axes[0].lines}) == len({*marks}), 'without colour too'
    plt.close(fig)

def test_a_model_that_was_never_run_has_no_tally_of_verdicts(capsys, tmp_path):
    assert main(['--model', 'smollm2', '--out', str(tmp_path/'r.html')]) == 0
    n = len(load_claims()['claims'])
    assert capsys.readouterr().out.splitlines()[1] == f'{n} not run'
    assert 'make paper MODEL=smollm2' in (tmp_path/'r.html').read_text()

def test_nothing_becomes_markup(tmp_path):
    r = fake()
    r['fig1']['stages'] = {'<b>x</b>': dict(commit='"><script>', dirty=True, python='<i>', device='<img src=x>', versions={'<u>': '&'})}
    save(r, tmp_path)
    p = Page(page('tiny'))
    assert not p.all('script') and not p.all('i') and not p.all('u') and [a['alt'][:6] for a in p.all('img')] == ['A line'] and not p.wrong

def test_one_seed_and_none(tmp_path):
    empty = Page(page('tiny'))
    assert not empty.wrong and sum(s.strip() == 'not run' for _, s in empty.said) > 80
    save(fake(), tmp_path)
    text = page('tiny')
    assert 'make paper MODEL=tiny</code>' in text and 'Seed 0 as published.' in text and not Page(text).wrong

@pytest.mark.parametrize('model,says', [('tiny', 'in the package'), ('smollm2', 'converted from a GGUF file'), ('qwen7b', 'from the Hub (Qwen/Qwen2.5-7B-Instruct)')])
def test_a_model_of_every_source_has_a_page(model, says):
    text = page(model)
    assert f'<code>{model}</code>' in text and says in text and f'papermill nbs/02_sft.ipynb -p model {model}' in text

def test_command(tmp_path, capsys):
    assert main(['--model', 'tiny', '--out', str(tmp_path/'deep'/'r.html')]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == str(tmp_path/'deep'/'r.html') and re.fullmatch(r'(\d+ [a-z ]+, )*\d+ [a-z ]+', told[1]) and 'not run' in told[1]
    assert main([]) == 0 and (tmp_path/'runs'/'tiny'/'report.html').is_file()
    for args, says, code in ((['--model', 'tinny'], "did you mean 'tiny'", 2), (['--overrides', '{sft: {lrr: 1.0}}'], "did you mean 'lr'", 2), (['--overrides', '{'], 'is not YAML', 2), (['--out', str(tmp_path/'deep'/'r.html'/'x')], 'cannot make the folder', 1)):
        assert main(args) == code
        err = capsys.readouterr().err
        assert says in err and len(err.splitlines()) == 1

def test_command_line(tmp_path, env):
    r = subprocess.run([sys.executable, '-m', 'rlsft_nb.report', '--model', 'tiny', '--out', str(tmp_path/'r.html')], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0 and r.stdout.splitlines()[0] == str(tmp_path/'r.html'), r.stderr

def test_readme_says_how_make_paper_ends(tmp_path, monkeypatch):
    (tmp_path/'runs'/'tiny').mkdir(parents=True); (tmp_path/'runs'/'tiny'/'records').mkdir()
    for p in (ROOT/'figures'/'tiny').glob('*-seed0.json'): shutil.copy(p, tmp_path/'runs'/'tiny'/'records')
    monkeypatch.setenv('RLSFT_FIGURES', str(ROOT/'figures'))
    monkeypatch.setattr(report, 'vector', lambda *_: b'')
    blocks = re.findall('```console\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    assert '\n'.join(report.closing('tiny')).replace(str(tmp_path/'runs'), 'runs').strip() == blocks[0].strip()

# in a browser

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'))), '')
LOOK = '''<!doctype html><meta charset="utf-8"><iframe id="f" style="width:%dpx;height:800px;border:0" srcdoc="%s"></iframe><pre id="told"></pre><script>
const f = document.getElementById('f');
f.onload = () => { const d = f.contentDocument, w = d.documentElement.clientWidth;
  for (const x of d.querySelectorAll('details')) x.open = true;
  const wide = [...d.querySelectorAll('body *')].filter(x => x.getBoundingClientRect().right > w + 1 && !x.closest('.scroll, .picture') && !x.matches('.skip'));
  const low = [...d.querySelectorAll('.chip')].filter(x => !x.innerText.trim()).length;
  document.getElementById('told').textContent = JSON.stringify({width: w, scroll: d.documentElement.scrollWidth, images: d.images.length, broken: [...d.images].filter(i => !i.naturalWidth).length,
    wide: wide.map(x => x.outerHTML.slice(0, 80)), empty: low, height: d.documentElement.scrollHeight}); }
</script>'''

def look(text, width, folder):
    "What a browser says of a page at a width, and what it complains of."
    (folder/'look.html').write_text(LOOK % (width, html.escape(text)), encoding='utf-8')
    args = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', f'--user-data-dir={folder}/profile', '--enable-logging=stderr', '--virtual-time-budget=8000', '--dump-dom']
    r = subprocess.run([BROWSER, *args, (folder/'look.html').as_uri()], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, env=os.environ | dict(HOME=str(folder)))
    told = re.search('<pre id="told">(.*?)</pre>', r.stdout, re.S)
    assert told and told[1], r.stderr[-2000:]
    return json.loads(html.unescape(told[1])), re.findall(r'CONSOLE.*', r.stderr)

@pytest.mark.skipif(not BROWSER, reason='no Chromium or Chrome on PATH (Debian: apt-get install chromium)')
@pytest.mark.parametrize('width', [360, 1200])
def test_in_a_browser(text, tmp_path, width):
    seen, complaints = look(text, width, tmp_path)
    assert seen['width'] <= width and seen['scroll'] <= seen['width'], f'the page is wider than the screen: {seen}'
    assert seen['images'] == 5 and seen['broken'] == seen['empty'] == 0 and seen['wide'] == [] and seen['height'] > 3000, seen
    assert complaints == []

@pytest.mark.skipif(not BROWSER, reason='no Chromium or Chrome on PATH (Debian: apt-get install chromium)')
def test_the_browser_test_sees_what_it_should(tmp_path):
    bad = '<html><body><h1>x</h1><div style="width:900px">wide</div><img src="data:image/png;base64,AAAA"><script>console.error("seen")</script></body></html>'
    seen, complaints = look(bad, 360, tmp_path)
    assert seen['broken'] == 1 and seen['scroll'] > seen['width'] and seen['wide'] and any('seen' in c for c in complaints)
