"Figures from records alone."
import json, shutil
import pytest
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from rlsft_nb import drawing
from rlsft_nb.places import ROOT
from rlsft_nb.problems import Problem
from rlsft_nb.gallery import FIGURES, main, published, redraw, redraw_all, verdicts_of
from rlsft_nb.papermill_line import NBS

MADE = sorted(p for m in ('tiny', 'smollm2_cpu') for p in (ROOT/'figures'/m).glob('*.png'))
@pytest.fixture(autouse=True)
def _published(monkeypatch): monkeypatch.setenv('RLSFT_FIGURES', str(ROOT/'figures'))

stem = lambda p: p.stem.removesuffix('-seed0')

@pytest.mark.parametrize('book', [p.stem for p in sorted(NBS.glob('*.ipynb')) if 'verdicts_of(\'' in p.read_text() and p.stem != 'gallery'])
def test_verdicts_below_the_claim_are_those_of_the_published_records(book):
    cells = [c for c in json.loads((NBS/f'{book}.ipynb').read_text())['cells'] if ''.join(c['source']) == f"verdicts_of('{book}')"]
    assert [''.join(c['outputs'][0]['data']['text/markdown']) for c in cells] == [verdicts_of(book)], f'python -m rlsft_nb.paper refresh --shown {book}'

def test_every_picture_has_an_entry():
    assert MADE and {stem(p) for p in MADE} <= set(FIGURES)

@pytest.mark.parametrize('name', sorted({stem(p) for p in MADE if stem(p) in FIGURES}))
def test_words_of_a_figure(name):
    fig = redraw(name)
    title = fig.get_suptitle()
    small = ''.join(t.get_text() for t in (fig.legends[0].get_title(),)) if fig.legends else fig.get_supxlabel()
    assert title and len(title) < 180 and small
    labels = [t.get_text() for box in fig.legends for t in box.get_texts()]
    assert len(labels) == len(set(labels)) and not any('layers.' in l or '_' in l for l in labels)
    assert all(t.get_fontsize() >= 10 for ax in fig.axes for t in (ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()))
    accuracy = [ax for ax in fig.axes if 'accuracy (%)' in ax.get_ylabel()]
    assert all(ax.get_ylim()[0] <= 0 and 10 <= ax.get_ylim()[1] <= 102 for ax in accuracy) # no magnified noise
    plt.close(fig)

def test_connected_curves_stand_on_their_ticks():
    fig = redraw('fig6')
    ax = fig.axes[0]
    shares = json.loads((ROOT/'figures/tiny/fig6-seed0.json').read_text())['peak']['cells']
    ticks = dict(zip((t.get_text() for t in fig.axes[2].get_xticklabels()), fig.axes[2].get_xticks()))
    curve = next(c for c in ax.containers if c.get_label() == 'directions (top ranks)')
    want = [ticks[f"{100*r['ranks']:g}"] for n, r in shares.items() if r['mode'] == 'directions' and r.get('place', 'top') == 'top']
    assert list(curve.lines[0].get_xdata()) == want
    plt.close(fig)

def test_only_records_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path/'figures'/'tiny').mkdir(parents=True)
    for n in ('fig1-seed0', 'fig4-law'): shutil.copy(ROOT/'figures'/'tiny'/f'{n}.json', tmp_path/'figures'/'tiny')
    monkeypatch.setenv('RLSFT_FIGURES', str(tmp_path/'figures')); monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'runs'))
    assert main(['--model', 'tiny']) == 0
    assert {p.name for p in (tmp_path/'figures'/'tiny').glob('*.png')} == {'fig1-seed0.png', 'fig4-law.png'}
    assert 'has no record fig2-seed0.json' in capsys.readouterr().out and 'no record' in published('fig5')
    before = (tmp_path/'figures/tiny/fig1-seed0.png').read_bytes()
    assert redraw_all()['fig1'].read_bytes() == before # the same bytes
    assert main(['--model', 'tinny']) == 2 and "did you mean 'tiny'" in capsys.readouterr().err

def test_unknown_figure():
    with pytest.raises(Problem, match="figure 'fig9': expected one of"): redraw('fig9')

def test_style_is_of_the_house_whatever_the_readers_is():
    with plt.rc_context({'font.size': 30, 'axes.spines.top': True}): fig = redraw('fig4-law')
    assert fig.axes[0].xaxis.label.get_fontsize() == drawing.STYLE['axes.labelsize'] and not fig.axes[0].spines['top'].get_visible()
    plt.close(fig)
