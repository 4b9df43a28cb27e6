"The site: every link leads somewhere, nothing comes from elsewhere, a phone is wide enough."
import html, json, os, re, shutil, subprocess
from pathlib import Path
from urllib.parse import unquote
import pytest
from rlsft_nb.places import ROOT
from rlsft_nb.problems import Problem
from rlsft_nb.site import body, main, make_site
from test_report import BROWSER, Page

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The whole site, its page of results without figures."
    folder = tmp_path_factory.mktemp('made')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('RLSFT_FIGURES', str(folder/'figures')); m.setenv('RLSFT_RUNS', str(folder/'runs'))
        make_site('tiny', folder/'site')
    return folder/'site'

@pytest.fixture(scope='module')
def parsed(site): return {p.name: Page(p.read_text()) for p in sorted(site.glob('*.html'))}

links = lambda page: [v for _, a in page.tags for k, v in a.items() if k in ('src', 'href')]

def test_every_notebook_has_its_page(parsed):
    assert {p.stem for p in (ROOT/'nbs').glob('*.ipynb')} | {'results', 'LOG', 'CHANGELOG', 'CONTRIBUTING'} == {n.removesuffix('.html') for n in parsed}
    assert 'SFT' in [s.strip() for _, s in parsed['02_sft.html'].said] and len(parsed['02_sft.html'].all('img')) == 3

def test_every_link_leads_somewhere(site, parsed):
    ids = {n: {a['id'] for _, a in p.tags if 'id' in a} for n, p in parsed.items()}
    seen, lost = 0, []
    for name, page in parsed.items():
        for link in (l for l in links(page) if not re.match('[a-z]+:', l)):
            path, _, at = link.partition('#')
            seen += 1
            if not (site/(path or name)).is_file() or at and not {at, unquote(at)} & ids[path or name]: lost.append((name, link))
    assert seen > 5000 and lost == []
    reached, new = set(), {'index.html'}
    while new: reached |= new; new = {l.partition('#')[0] for n in new for l in links(parsed[n]) if l.partition('#')[0] in parsed} - reached
    assert reached == set(parsed), 'from the start one comes to every page'

def test_nothing_is_loaded_from_elsewhere(site, parsed):
    for name, page in parsed.items():
        loaded = [a[k] for t, a in page.tags for k in ('src', 'srcset', 'data', 'poster') if k in a] + [a['href'] for a in page.all('link')]
        assert all(v.startswith('data:') or (site/v).is_file() for v in loaded), name
        assert not page.all('script') and not page.all('iframe') and not page.all('base') and not [k for _, a in page.tags for k in a if k.startswith('on')], name
        assert all(a.get('alt') and 'No description' not in a['alt'] for a in page.all('img')), name
        if name != 'results.html': assert "default-src 'none'" in next(a['content'] for a in page.all('meta') if a.get('http-equiv'))
    assert not re.search(r'@import|url\(', (site/'site.css').read_text())

def test_no_page_tells_where_it_was_made(site):
    for p in site.glob('*.html'): assert str(ROOT) not in p.read_text() and str(site.parent) not in p.read_text()

def test_a_link_to_nothing_is_an_error(tmp_path, monkeypatch):
    (tmp_path/'a.md').write_text('# A\n\n[there](nowhere.md)')
    with pytest.raises(Problem, match='nowhere.md'): body(tmp_path/'a.md', set())

def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('rlsft_nb.site.make_site', lambda model, out: [ROOT/'LICENSE'])
    assert main(['--out', 'x']) == 0 and capsys.readouterr().out.splitlines() == ['x/index.html', '1 files, 0.0 MB']

LOOK = '''<!doctype html><meta charset="utf-8"><iframe id="f" style="width:390px;height:800px;border:0"></iframe><pre id="told"></pre><script>
const f = document.getElementById('f'), pages = %s, told = {};
const next = () => { if (!pages.length) return document.getElementById('told').textContent = JSON.stringify(told); f.src = pages[0]; };
f.onload = () => { const d = f.contentDocument, name = pages.shift();
  for (const x of d.querySelectorAll('details')) x.open = true;
  told[name] = {scroll: d.documentElement.scrollWidth, images: d.images.length, broken: [...d.images].filter(i => !i.naturalWidth).length, styled: getComputedStyle(d.body).margin}; next(); };
next(); </script>'''

@pytest.mark.skipif(not BROWSER, reason='no Chromium or Chrome on PATH (Debian: apt-get install chromium)')
def test_in_a_browser(site, tmp_path):
    pages = ['index.html', '02_sft.html', '05_restore.html', '08_explore.html', 'stages.html', 'LOG.html', 'results.html']
    (site/'look.html').write_text(LOOK % json.dumps(pages))
    args = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--allow-file-access-from-files', f'--user-data-dir={tmp_path}/profile', '--enable-logging=stderr', '--virtual-time-budget=20000', '--dump-dom']
    r = subprocess.run([BROWSER, *args, (site/'look.html').as_uri()], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, env=os.environ | dict(HOME=str(tmp_path)))
    (site/'look.html').unlink()
    told = json.loads(html.unescape(re.search('<pre id="told">(.*?)</pre>', r.stdout, re.S)[1]))
    assert [*told] == pages and all(t['scroll'] <= 390 and not t['broken'] and t['styled'] == '0px' for t in told.values()), told
    assert told['02_sft.html']['images'] == 3 and not re.findall('CONSOLE.*', r.stderr), r.stderr[-2000:]

# in a browser

POLICY = "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; report-uri /told"

def looked_at(folder, profile):
    "Every page of a folder in a browser that may load nothing but what lies beside it: paths asked for, what the policy refused as (page, what)."
    import http.server, threading
    pages, asked, refused = sorted(p.name for p in Path(folder).glob('*.html')), set(), []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(folder))
        def log_message(self, *_): pass
        def end_headers(self): self.send_header('Content-Security-Policy', POLICY if self.path != '/all' else ''); super().end_headers()
        def do_GET(self):
            asked.add(self.path.lstrip('/'))
            if self.path != '/all': return super().do_GET()
            body = ''.join(f'<iframe src="{n}"></iframe>' for n in pages).encode()
            self.send_response(200); self.send_header('Content-Type', 'text/html'); self.end_headers(); self.wfile.write(body)
        def do_POST(self):
            r = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['csp-report']
            refused.append((r['document-uri'].rsplit('/', 1)[1], r['blocked-uri'])); self.send_response(204); self.end_headers()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        args = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', f'--user-data-dir={profile}', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', '--timeout=60000', '--dump-dom']
        subprocess.run([BROWSER, *args, f'http://127.0.0.1:{server.server_address[1]}/all'], stdin=subprocess.DEVNULL, capture_output=True, timeout=240, env=os.environ | dict(HOME=str(profile)))
        server.shutdown()
    return asked, refused

@pytest.mark.skipif(not BROWSER, reason='no Chromium or Chrome on PATH (Debian: apt-get install chromium)')
def test_every_page_in_a_browser_with_a_strict_policy(site, tmp_path, pico):
    from rlsft_nb import comparison_page, report
    from rlsft_nb.forget_page import card_page
    at, evil = shutil.copytree(site, tmp_path/'pages'), '"><script>fetch("http://elsewhere.invalid")</script><img src=http://elsewhere.invalid/x>'
    assert comparison_page.main([str(pico['qwen2']), str(pico['qwen2']), '--out', str(tmp_path/'c'), '--matrices', 'layers.0.q', '--draws', '2', '--workers', '1', '--quiet']) == 0
    for p in (tmp_path/'c').glob('*.html'): shutil.copy(p, at/'comparison.html')
    assert report.main(['--out', str(at/'report.html'), '--quiet']) == 0
    card = json.loads((ROOT/'figures'/'tiny'/'forget.json').read_text())['base']
    (at/'card.html').write_text(card_page(card | dict(base=evil)))
    (at/'bad.html').write_text('<img src="http://elsewhere.invalid/a.png"><script>1</script><link rel="stylesheet" href="https://elsewhere.invalid/a.css">')
    asked, refused = looked_at(at, tmp_path/'profile')
    assert {p.name for p in at.glob('*.html')} <= asked and len(asked) > 50
    assert {p for p, _ in refused} == {'bad.html'} and len(refused) == 3, refused
    assert {a for a in asked if not (at/a).is_file()} <= {'all', 'favicon.ico'}
