"Choosing by hand: the numbers are those of the restoration notebook, for both architectures, and every try counts."
import pytest, torch
from hypothesis import given, strategies as st
from rlsft_nb import explore
from rlsft_nb.core import ParamError, load_params
from rlsft_nb.explore import Explorer, checkpoints, label, panel, table, tour
from rlsft_nb.models import cells, load_lm, save_lm
from rlsft_nb.restore import holm
from rlsft_nb.workbench import put_away, score_cell
from rlsft_nb.game import hands, values

FEW = load_params('tiny', dict(eval=dict(val_hands=6, max_new_tokens=4)))

@pytest.fixture(params=['qwen2', 'llama', 'mllama'])
def pair(request, pico, tmp_path):
    "A pico checkpoint with every matrix moved, and the checkpoint itself."
    lm, tok = load_lm(str(pico[request.param]))
    g = torch.Generator().manual_seed(1)
    for p in lm.parameters(): p.data += .01*torch.randn(p.shape, generator=g)
    yield save_lm(lm, tok, tmp_path/'moved'), pico[request.param]
    put_away()

def test_a_try_is_two_cells_of_restoration_on_validation_hands(pair, monkeypatch):
    dealt = []
    real = explore.score_cell
    monkeypatch.setattr(explore, 'score_cell', lambda *a, **k: dealt.append(k['part']) or real(*a, **k))
    ex = Explorer(*pair, FEW)
    for choice in tour(explore._matrices(ex)): record = ex.play(**choice)
    assert set(dealt) == {'val'} and record['target']['OOD']['n'] == 6
    assert len(record['tries']) == 4 and all(0 < t['edit']['moved'] < 1.5 for t in record['tries'])
    spec = dict(mode='directions', ranks=(0., .2), layers=None, types=None)
    again = score_cell(*map(str, pair), ex.cfg, spec, 0, part='val')
    mine = ex.got[label(**spec)]
    assert (mine['OOD'], mine['edit']) == (again['OOD'], again['edit'])
    assert ex.groups == {c: [tuple(sorted(values(h, rule))) for h in hands('val', rule, face, 6)] for c, (rule, face) in cells(FEW).items()}

def test_layers_and_ends_together_are_everything(pair):
    "Squared distances of disjoint matrices add up to the whole way."
    ex = Explorer(*pair, FEW)
    for choice in tour(explore._matrices(ex))[2:]: ex.play(**choice | dict(mode='swap', beside='values'))
    moved = [t['edit']['moved'] for t in ex.record()['tries']]
    assert sum(m*m for m in moved) == pytest.approx(1., rel=1e-6)

def test_all_directions_of_one_matrix_leave_no_angle(pair):
    ex = Explorer(*pair, FEW)
    name = next(m.name for m in explore._matrices(ex) if m.layer == 0)
    found = {n: f['matrices'][name] for n, f in ex.spectrum(name, 'swap', (0., 1.), 2).items()}
    assert not found['edit, from the reference']['changed'] and found['reference, from the target']['update'] == pytest.approx(found['edit, from the target']['update'])
    with pytest.raises(ParamError, match='did you mean'): ex.spectrum(name + 'x')

def test_the_panel_offers_what_the_model_has(pair):
    ex = Explorer(*pair, FEW)
    box = panel(ex)
    w = {w.description: w for half in box.children[0].children for w in half.children}
    assert w['spectra of'].options == tuple(m.name for m in explore._matrices(ex)) and not any('cross' in t or 'vision' in t for t in w['types'].options)
    w['layers'].value = (0, 0)
    w['play'].click()
    assert ex.tries == [tuple(f'{m}, ranks 0 to 20 %, layers 0-0' for m in ('directions', 'interpolate'))] and w['play'].description == 'play'
    before = box.children[3].value
    w['ranks'].value = (.5, 1.)
    assert box.children[3].value != before and len(ex.tries) == 1 # looking costs no try
    w['mode'].value = 'interpolate'; w['play'].click()
    assert 'expected another one' in box.children[1].value and len(ex.tries) == 1

class Known(Explorer):
    "Accuracy by the number of ranks."
    def score(self, spec):
        k = int(spec['ranks'][1]*6) if isinstance(spec['ranks'], tuple) else 0
        hits = dict(n=6, hits=('1'*k).ljust(6, '0'), first=dict(k=k, rate=k/6, lo=0., hi=1.), format=1.)
        return dict(ID=hits, OOD=hits, edit=dict(size=1., distance=1.))
    def score_reference(self): return self.score(dict(ranks=(0., 1.)))

@given(st.lists(st.tuples(st.sampled_from(['directions', 'swap', 'blend']), st.floats(0, 1)), min_size=1, max_size=12))
def test_every_p_counts(choices):
    ex = Known('a', 'b', FEW)
    for mode, hi in choices: record = ex.play(mode, 'values', (0., hi))
    tests = [t[c] for t in record['tries'] for c in ('OOD', 'ID')]
    assert [t['holm'] for t in tests] == holm([t['p'] for t in tests])
    assert len(record['tries']) == len({(label(m, (0., hi))) for m, hi in choices}) and table(record).count('<tr>') == 1 + len(record['tries'])

def test_wrong_names():
    with pytest.raises(ParamError, match="reference='peek'; did you mean 'peak'"): checkpoints(FEW, 0, 'end', 'peek')
    with pytest.raises(ParamError, match='expected two checkpoints'): checkpoints(FEW, 0, 'rl', 'rl')
    with pytest.raises(ValueError, match="mode='magic'"): Explorer('tiny', 'tiny', FEW).play('magic')
