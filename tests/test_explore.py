"Choosing by hand: the numbers are those of the restoration notebook, for both architectures; every try counts and stays; one hand is judged as the verifier judges it."
import json, shlex
import pytest, torch
from hypothesis import given, strategies as st
from rlsft_nb import explore, hand, surgery
from rlsft_nb.files import write_json
from rlsft_nb.parameters import load_params
from rlsft_nb.problems import ParamError
from rlsft_nb.explore import Explorer, Stopped, checkpoints, distances, fig_tries, label, matrices, packaged, restore_command, standing, table, tour, tour_verdicts, tries_file
from rlsft_nb.explore_panel import NO_TRY, Panel, panel, time_left
from rlsft_nb.gallery import published_record
from rlsft_nb.game import hands, prompt, solve, values, verify
from rlsft_nb.hand import HandError, answer_table, ask, player, read_cards, read_rule, solution_text
from rlsft_nb.models import cells, load_lm, save_lm
from rlsft_nb.restore import holm
from rlsft_nb.weights import open_checkpoint
from rlsft_nb.workbench import put_away, score_cell, workbench

FEW = load_params('tiny', dict(eval=dict(val_hands=6, max_new_tokens=4)))
TINY = load_params('tiny')

@pytest.fixture(params=['qwen2', 'llama', 'mllama'])
def pair(request, pico, tmp_path):
    "A pico checkpoint with every matrix moved, and the checkpoint itself."
    lm, tok = load_lm(str(pico[request.param]))
    g = torch.Generator().manual_seed(1)
    for p in lm.parameters(): p.data += .01*torch.randn(p.shape, generator=g)
    yield save_lm(lm, tok, tmp_path/'moved'), pico[request.param]
    put_away()

def test_a_try_is_two_cells_of_restoration_on_validation_hands(pair, monkeypatch):
    dealt, real = [], explore.score_cell
    monkeypatch.setattr(explore, 'score_cell', lambda *a, **k: dealt.append(k['part']) or real(*a, **k))
    ex = Explorer(*pair, FEW)
    for choice in tour(matrices(ex)): record = ex.play(**choice)
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
    for choice in tour(matrices(ex))[2:]: ex.play(**choice | dict(mode='swap', beside='values'))
    moved = [t['edit']['moved'] for t in ex.record()['tries']]
    assert sum(m*m for m in moved) == pytest.approx(1., rel=1e-6)

def test_all_directions_of_one_matrix_leave_no_angle(pair):
    ex = Explorer(*pair, FEW)
    name = next(m.name for m in matrices(ex) if m.layer == 0)
    found = {n: f['matrices'][name] for n, f in ex.spectrum(name, 'swap', (0., 1.), 2).items()}
    assert not found['edit, from the reference']['changed'] and found['reference, from the target']['update'] == pytest.approx(found['edit, from the target']['update'])
    with pytest.raises(ParamError, match='did you mean'): ex.spectrum(name + 'x')

def test_what_is_looked_at_is_what_is_played(pair):
    "One matrix by itself and in the workbench."
    ex = Explorer(*pair, FEW, seed=3)
    bench = workbench(ex.target, ex.reference, ex.cfg)
    assert {m.name for m in matrices(ex)} == set(bench.params)
    for m in matrices(ex):
        for mode in ('directions', 'interpolate', 'random_rotation'): assert torch.equal(ex.edited_matrix(m.name, mode, (0., .5)), bench.tensor(m.name, mode, (0., .5), 'top', 3)[0]), (m.name, mode)

@pytest.mark.parametrize('mode', ['directions', 'random_rotation'])
def test_the_command_makes_the_weights_that_are_played(pair, tmp_path, mode):
    ex = Explorer(*pair, FEW, seed=2)
    choice = dict(mode=mode, ranks=(.25, .75), layers='0-1', types=['q', 'down'])
    words = shlex.split(ex.command(**choice, out=str(tmp_path/'made')))
    assert words[:2] == ['rlsft', 'restore'] and surgery.main(words[2:]) == 0
    bench, made, before = workbench(ex.target, ex.reference, ex.cfg), open_checkpoint(tmp_path/'made'), open_checkpoint(ex.target)
    bench.put(**choice, seed=2)
    for n, p in bench.params.items(): assert torch.allclose(made.read(n), p, atol=1e-6), n
    asked = {f'layers.{i}.{t}' for i in (0, 1) for t in ('q', 'down')} & set(bench.params) # of Llama 3.2 no matrix of a cross-attention layer
    assert {n for n in before.matrices if not torch.equal(made.read(n), before.read(n))} == asked

def test_the_command_of_all_matrices(pair):
    ex = Explorer(*pair, FEW)
    idle = {n for n in open_checkpoint(ex.target).matrices} - {m.name for m in matrices(ex)}
    assert ('--exclude' in ex.command('swap', (0., 1.))) == bool(idle)
    assert restore_command('tiny:end', 'a folder', 'swap') == "rlsft restore --target tiny:end --reference 'a folder' --mode swap --rank 0.0-1.0 --out restored"

@pytest.fixture
def quick(monkeypatch):
    "Panels whose pictures are the words under them."
    from rlsft_nb import explore_panel
    monkeypatch.setattr(explore_panel, 'png_bytes', lambda fig, dpi: f'.PNG {fig}'.encode())
    monkeypatch.setattr(explore_panel, 'fig_spectrum', lambda found, choice: f'{choice}: {next(iter(found.values()))["matrices"]}')
    monkeypatch.setattr(explore_panel, 'fig_tries', lambda record, title: [t['edit']['name'] for t in record['tries']])

def pressed(box, button): button.click(); box.job.wait()

def test_the_panel_offers_what_the_model_has(pair, quick):
    ex = Explorer(*pair, FEW)
    box = Panel(ex)
    c = box.c
    assert c['matrix'].options == tuple(m.name for m in matrices(ex)) and not any('cross' in t or 'vision' in t for t in c['types'].options)
    before = bytes(box.spectra.value) # drawn before any play: no slider is dead
    c['ranks'].value = (.5, 1.)
    assert b'ranks 0 to 20 %' in before and b'ranks 50 to 100 %' in bytes(box.spectra.value) and not ex.tries # looking costs no try
    assert '--rank 0.5-1.0' in box.command.value
    c['layers'].value = (0, 0)
    pressed(box, box.play)
    assert ex.tries == [tuple(f'{m}, ranks 50 to 100 %, layers 0-0' for m in ('directions', 'interpolate'))] and box.tries.value.count('<tr>') == 2
    assert '1: rlsft restore' in box.tries.value and '--layers 0-0' in box.tries.value
    kept = box.tries.value, box.picture.value
    c['mode'].value = 'interpolate'; pressed(box, box.play)
    assert 'expected another one' in box.note.value and (box.tries.value, box.picture.value) == kept and len(ex.tries) == 1 # an error replaces nothing
    assert not box.play.disabled and box.stop.disabled

class Known(Explorer):
    "Accuracy by the number of ranks."
    def score(self, spec):
        if self.told: self.told(6); self.told(6)
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

def test_batches_are_told_and_a_stop_keeps_whole_cells():
    ex, told = Known('a', 'b', FEW), []
    ex.play(told=lambda *a: told.append(a))
    assert told == [(6*i, 48) for i in range(1, 9)]
    def stop(done, total):
        if done == 18: raise Stopped('enough')
    with pytest.raises(Stopped): ex.play(ranks=(0., .5), told=stop) # in its second cell
    assert len(ex.tries) == 1 and label('directions', (0., .5)) in ex.got and label('interpolate', (0., .5)) not in ex.got
    ex.play(ranks=(0., .5), told=lambda *a: told.append(a))
    assert told[8:] == [(6, 12), (12, 12)] and len(ex.tries) == 2

def test_batches_of_a_real_model():
    told, cfg = [], load_params('tiny', dict(eval=dict(val_hands=6, max_new_tokens=2, batch=4)))
    Explorer('tiny:end', 'tiny:peak', cfg).play(told=lambda *a: told.append(a))
    assert told == [(n, 48) for n in (4, 6, 10, 12, 16, 18, 22, 24, 28, 30, 34, 36, 40, 42, 46, 48)]
    put_away()

def test_tries_come_back(tmp_path):
    file = tmp_path/'tries'/'a.json'
    one, two = (Known('a', 'b', FEW, file=file) for _ in range(2))
    one.play(ranks=(0., .5))
    two.play('swap', 'values') # begun before, and loses nothing of the other
    again = Known('a', 'b', FEW, file=file)
    assert again.tries == one.tries + [two.tries[-1]] and again.record() == two.record() and again.got[label('swap', (0., .2))]['spec']['mode'] == 'swap'
    assert restore_command('a', 'b', **again.got[label('directions', (0., .5))]['spec']).endswith('--rank 0.0-0.5 --out restored') # ranks are a list in JSON
    assert [p.name for p in file.parent.iterdir() if not p.name.endswith('.lock')] == ['a.json']
    assert again.forget() == 2 and Known('a', 'b', FEW, file=file).tries == []
    third = Known('a', 'b', FEW, file=file)
    third.play(); third.forget()
    assert json.loads(file.read_text())['forgotten'] == third.forgotten == 3

@pytest.mark.parametrize('text', ['{"tries": [', '[]', '{"forgotten": 0, "tries": [["a", "b"]], "got": {}}', '{"forgotten": 0, "tries": 7, "got": {}}'])
def test_a_broken_file_of_tries_is_set_aside(tmp_path, text):
    (tmp_path/'t.json').write_text(text)
    ex = Known('a', 'b', FEW, file=tmp_path/'t.json')
    assert 'is no file of tries' in ex.note and 'set aside as t.unreadable' in ex.note and '\n' not in ex.note and (tmp_path/'t.unreadable').read_text() == text
    ex.play()
    assert len(Known('a', 'b', FEW, file=tmp_path/'t.json').tries) == 1

def test_tries_that_cannot_be_written_are_not_lost(tmp_path):
    (tmp_path/'no').write_text('')
    ex = Known('a', 'b', FEW, file=tmp_path/'no'/'t.json')
    assert len(ex.play()['tries']) == len(ex.tries) == 1 and str(tmp_path/'no') in ex.note

def test_other_weights_or_hands_have_other_tries(pico):
    asked = [(TINY, 0, 'tiny:end', 'tiny:peak'), (TINY, 0, 'tiny:peak', 'tiny:end'), (TINY, 1, 'tiny:end', 'tiny:peak'), (FEW, 0, 'tiny:end', 'tiny:peak')]
    files = [tries_file(*a) for a in asked]
    assert len(set(files)) == 4 and all(f.parent.name == 'tries' and f.parent.parent.name == 'tiny' for f in files) and tries_file(*asked[0]) == files[0]

def test_distances_are_said(monkeypatch):
    side = lambda mode, moved: dict(mode=mode, moved=moved)
    assert distances(side('directions', 1.161), side('interpolate', .9989)) == '16 points less: the line ends at the reference'
    assert distances(side('directions', .294), side('interpolate', .294)) == 'as far' and distances(side('swap', .5), side('values', .2)) == '30 points less'
    monkeypatch.delenv('RLSFT_FIGURES')
    record = published_record('explore')
    assert [v['claim'].split('(moved ')[1][:-1] for v in tour_verdicts(record)] == ['16 points less', 'as far', 'as far', '1 point more'] # the tour as published
    assert '100</td><td>16 points less: the line ends at the reference' in table(record)
    labels = [t.get_text() for t in fig_tries(record, '').legends[0].get_texts()]
    assert explore.LINE in labels and not any('same distance' in t for t in labels)

def test_wrong_names():
    with pytest.raises(ParamError, match="reference='peek'; did you mean 'peak'"): checkpoints(FEW, 0, 'end', 'peek')
    with pytest.raises(ParamError, match='expected two checkpoints'): checkpoints(FEW, 0, 'rl', 'rl')
    with pytest.raises(ParamError, match="target='ende'; did you mean 'end'"): panel(TINY, 0, 'ende')
    with pytest.raises(ValueError, match="mode='magic'"): Explorer('tiny', 'tiny', FEW).play('magic')

def test_whose_checkpoints(monkeypatch):
    "Those of the package until one's own are there; of other parameters or seeds never."
    assert standing(TINY) == packaged(TINY) == dict(base='tiny', peak='tiny:peak', end='tiny:end', rl='tiny:rl')
    assert packaged(TINY, 1) == packaged(FEW) == {}
    own = dict(base='tiny', peak='x', end='y', rl='z')
    monkeypatch.setattr(explore, 'named_with_rl', lambda cfg, seed: own)
    assert standing(TINY, 1) == own
    write_json(explore.records_dir(TINY)/'fig1-seed0.json', {})
    assert standing(TINY) == own

@pytest.mark.parametrize('text, said', [('A 3 Q', '3 given, expected 4'), ('A 3 Q 10 2', '5 given'), ('', '0 given'), ('A 3 Q 11', "'11' is no card; expected 4 of A 2 3"), ('A 3 Q 1', "'1' is no card"), ('A 3 Q <b>', "'<B>'")])
def test_cards_that_cannot_be(text, said):
    with pytest.raises(HandError) as e: read_cards(text)
    assert said in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('text, said', [('11 0 13', "Q counts '0'"), ('1000', "J counts '1000': expected a whole number from 1 to 999"), ('11 12', '2 values'), ('', '0 values'), ('11 12 -5', "K counts '-5'"), ('11 12 1.5', "K counts '1.5'"), ('a b c', "J counts 'a'"), ('9'*5000, 'J counts')])
def test_rules_that_cannot_be(text, said):
    with pytest.raises(HandError) as e: read_rule(text)
    assert said in str(e.value) and len(str(e.value)) < 120

@given(st.lists(st.sampled_from('A 2 3 4 5 6 7 8 9 10 J Q K'.split()), min_size=4, max_size=4), st.tuples(*[st.integers(1, 999)]*3))
def test_what_is_typed_is_read(cards, rule):
    assert read_cards(', '.join(cards).lower()) == cards and read_rule('-'.join(map(str, rule))) == read_rule(' '.join(map(str, rule))) == rule

def test_a_hand_is_judged_by_the_verifier():
    "The shipped checkpoints on one hand: the end counts the queen as 10, the peak and the edit as 12."
    ex = Explorer('tiny:end', 'tiny:peak', TINY, players=packaged(TINY))
    got = ex.answers('Q 9 2 10', '11 12 13')
    assert got['values'] == [12, 9, 2, 10] and got['solutions'] == solve([12, 9, 2, 10]) and got['note'] == ''
    assert [*got['answers']] == ['base', 'peak', 'end', 'rl', 'the edit']
    for a in got['answers'].values():
        v = verify(a['said'], ['Q', '9', '2', '10'], '11-12-13')
        assert (a['right'], a['why'], a['formula'] or None) == (v.correct, v.feedback, v.formula)
    right = {n: (a['right'], a['tens']) for n, a in got['answers'].items()}
    assert right == {'base': (False, False), 'peak': (True, False), 'end': (False, True), 'rl': (False, True), 'the edit': (True, False)}
    lm, tok = load_lm('tiny:peak', TINY)
    assert got['answers']['peak']['said'] == hand.greedy(lm, tok, 48)([prompt(['Q', '9', '2', '10'], '11-12-13')])[0]
    assert player('tiny:peak', TINY)[0] is player('tiny:peak', TINY)[0] # loaded once
    text = answer_table(got)
    assert text.count('✓ right') == 2 and text.count('✗ wrong') == 3 and text.count('Right if J, Q and K counted 10.') == 2 and f"{solve([12, 9, 2, 10])[0]} = 24, one of 4 formulas" in text
    none = ex.answers('a a a a', '10', layers='9')
    assert none['solutions'] == [] and 'impossible, no formula over these four makes 24' in solution_text(none)
    assert none['note'].startswith('no edit: layers: 9 is not there') and [*none['answers']] == ['base', 'peak', 'end', 'rl']
    put_away()

def test_a_large_model_is_let_go(monkeypatch):
    monkeypatch.setattr(hand, 'KEEP', 0); monkeypatch.setattr(hand, '_kept', {})
    assert player('tiny', TINY)[0] is not player('tiny', TINY)[0] and hand._kept == {}

def test_no_markup_from_models():
    got = ask([], ['Q', '9', '2', '10'], '10', TINY)
    got['answers'] = dict(x=hand.judged('<script>alert(1)</script>', ['Q', '9', '2', '10'], '10'))
    assert '<script>' not in answer_table(got) and '&lt;script&gt;' in answer_table(got)

@pytest.fixture
def box(tmp_path, quick): return Panel(Known('tiny:end', 'tiny:peak', FEW, file=tmp_path/'t.json'))

def test_before_the_first_play(monkeypatch):
    "No picture is empty, and what cannot act is disabled."
    monkeypatch.delenv('RLSFT_FIGURES') # the published tour
    box = Panel(Known('tiny:end', 'tiny:peak', FEW))
    assert box.picture.value[1:4] == box.spectra.value[1:4] == b'PNG' and box.tries.value == NO_TRY
    assert [b.disabled for b in (box.ask, box.play, box.stop, box.forget)] == [False, False, True, True]
    box.ex.cfg.name, box.ex.seed = 'qwen7b', 0
    box.show_tries()
    assert box.picture.layout.display == 'none' # no record, no broken picture

def test_progress_and_stop(box):
    seen = []
    box.left.observe(lambda ch: seen.append((ch['new'], box.play.disabled, box.ask.disabled, box.stop.disabled)), 'value')
    pressed(box, box.play)
    assert [s for s in seen if 'hands' in s[0]] == [(f'{6*i} of 48 hands, about 1 s left', True, True, False) for i in range(1, 9)] and box.left.value == ''
    box.c['ranks'].value = (0., .5)
    before = box.tries.value
    stops = lambda ch: '6 of 24' in ch['new'] and box.stop.click()
    box.left.observe(stops, 'value')
    pressed(box, box.play)
    box.left.unobserve(stops, 'value')
    assert box.note.value.startswith('stopped after 6 of 24 hands') and box.tries.value == before and len(box.ex.tries) == 1
    pressed(box, box.play)
    assert len(box.ex.tries) == 2 and box.note.value == '' # a stop holds for one play

def test_an_error_of_a_library_is_told_and_the_panel_lives(box, monkeypatch):
    monkeypatch.setattr(Known, 'score', lambda *a: 1/0)
    pressed(box, box.play)
    assert box.note.value == 'ZeroDivisionError: division by zero' and not box.play.disabled

def test_a_bad_hand_loses_nothing(box, monkeypatch):
    asked = dict(cards=['Q'], values=[12], target=24, solutions=[], answers={}, note='')
    monkeypatch.setattr(Known, 'answers', lambda self, cards, rule, **spec: read_cards(cards) and read_rule(rule) and asked)
    pressed(box, box.ask)
    kept = box.answers.value
    for widget, text, said in ((box.cards, 'Q 9 2 14', '&#x27;14&#x27; is no card'), (box.cards, 'Q 9', '2 given'), (box.rule, '11 12 0', 'K counts')):
        was, widget.value = widget.value, text
        pressed(box, box.ask)
        assert said in box.told.value and box.answers.value == kept and widget.value == text
        widget.value = was
    pressed(box, box.ask)
    assert box.told.value == ''

def test_forgetting_asks_first(box):
    pressed(box, box.play)
    box.forget.click()
    assert box.forget.description == 'forget all 1?' and len(box.ex.tries) == 1
    pressed(box, box.play)
    assert box.forget.description == 'forget tries' # anything else in between takes the question back
    box.forget.click(); box.forget.click()
    assert 'which no p counts: 1.' in box.tries.value and box.forget.disabled and not Known('tiny:end', 'tiny:peak', FEW, file=box.ex.file).tries

def test_times(): assert [time_left(*a) for a in ((1, 2, 5.), (0, 2, .1), (1, 601, 1.))] == ['about 5 s left', 'about 1 s left', 'about 10 min left']
