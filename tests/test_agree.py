"A run made here beside the published one, and how `make paper` ends."
import copy, shutil
from rlsft_nb.agree import agreement, beside, inside, lines, main
from rlsft_nb.claims import here_text, judge_claims, load_claims
from rlsft_nb.files import read_json, write_json
from rlsft_nb.parameters import load_params
from rlsft_nb.publishing import publish_runs
from rlsft_nb.runner import known_seconds, numbered
from rlsft_nb.records import records_dir
from rlsft_nb.report import closing
from test_claims import fake, save

TINY = load_params('tiny')

def keep(records, seed=0):
    for name, r in records.items(): write_json(records_dir(TINY)/f'{name}-seed{seed}.json', r)

def test_a_number_is_inside_its_published_interval_or_equal_to_three_digits():
    there = dict(value=.2, lo=.1, hi=.3)
    assert [inside(dict(value=v), there) for v in (.1, .3, .0999, .31)] == [True, True, False, False]
    assert [inside(dict(value=v), dict(value=12.34, lo=None)) for v in (12.31, 12.36)] == [True, False]
    assert beside(dict(id='a', claim='', each=[dict(seed=0, verdict='not run', why='')]), dict(each=[dict(seed=0, value=1, verdict='holds')])) == []

def test_a_training_in_other_digits_is_one_more_seed():
    seeds = [.50, .52, .47, .51, .49]
    assert [inside(dict(value=v), dict(value=.5, lo=None), seeds) for v in (.55, .45, .60, .40)] == [True, True, False, False]
    assert not inside(dict(value=.55), dict(value=.5, lo=None), seeds[:2]), 'two seeds say nothing of a third'
    assert inside(dict(value=.62), dict(value=.5, lo=.3, hi=.7), seeds) and inside(dict(value=.55), dict(value=.5, lo=.49, hi=.51), seeds)
    each = lambda *vs: [dict(seed=i, value=x, verdict=v) for i, (x, v) in enumerate(zip(seeds, vs))]
    row, = beside(dict(id='a', claim='', each=[dict(seed=0, value=.53, verdict='fails')]), dict(each=each('holds', 'holds', 'fails', 'holds', 'holds')))
    assert (row['inside'], row['published'], row['seeds']) == (True, 'holds', dict(holds=4, fails=1))
    assert lines(dict(model='x', seeds=[0], n=1, inside=1, differ=[row], agrees=True))[1] == '  a (seed 0): fails, published holds; the number lies inside (published seeds: holds 4, fails 1)'

def test_the_same_run_agrees_and_another_does_not(tmp_path, capsys):
    save(fake(), tmp_path); keep(fake())
    same = agreement(TINY)
    assert same['agrees'] and same['n'] == same['inside'] > 30 and same['differ'] == [] and same['seeds'] == [0]
    assert main([]) == 0 and 'Agrees with the published seed 0' in capsys.readouterr().out
    other = copy.deepcopy(fake())
    points = other['fig2']['curve']['points']
    curve = other['fig1-sft']['scores']
    curve['end'], curve['peak'] = curve['peak'], curve['end'] # OOD accuracy rises
    keep(other)
    found = agreement(TINY)
    assert not found['agrees'] and points and any(r['id'] == 'ood-falls' and (r['verdict'], r['published'], r['inside']) == ('fails', 'holds', False) for r in found['differ'])
    assert main([]) == 1 and 'ood-falls (seed 0): fails, published holds; the number lies outside' in capsys.readouterr().out

def test_a_verdict_that_the_last_digits_decide_says_so(tmp_path, capsys):
    "A seed run once more is kept beside the published one, and no more than its verdicts."
    save(fake(), tmp_path)
    assert main(['--keep']) == 1 and not (tmp_path/'figures'/'tiny'/'again.json').exists() # nothing was made here
    other = copy.deepcopy(fake())
    curve = other['fig1-sft']['scores']
    curve['end'], curve['peak'] = curve['peak'], curve['end']
    keep(other)
    assert main(['--keep']) == 1
    kept = read_json(tmp_path/'figures'/'tiny'/'again.json')
    assert kept['seeds'] == [0] and kept['verdicts']['ood-falls'] == {'0': 'fails'} and kept['cpu']['name'] and kept['inside'] < kept['n']
    shutil.rmtree(records_dir(TINY)) # now the published ones are judged
    found = {c['id']: c for c in judge_claims(TINY, [0])['claims']}
    assert found['ood-falls']['again'] == {0: 'fails'} and here_text(found['ood-falls']).endswith('; not stable: seed 0 in other arithmetic: fails')
    same = [c for c in found.values() if c['each'] and c['each'][0]['verdict'] == kept['verdicts'].get(c['id'], {}).get('0')]
    assert len(same) > 20 and not any(c['again'] or 'not stable' in here_text(c) for c in same)
    assert not any(c['again'] for c in judge_claims(load_params('tiny', dict(sft=dict(lr=1e-3))), [0])['claims']) # another run

def test_nothing_to_compare(tmp_path, capsys):
    save(fake(), tmp_path)
    assert agreement(TINY)['agrees'] is None and main([]) == 1 and 'nothing to compare' in capsys.readouterr().out

def test_how_a_run_ends(tmp_path):
    assert closing('tiny') == []
    save(fake(), tmp_path); keep(fake())
    said = closing('tiny')
    assert said[1].startswith(f"Seed 0 made here. {len(load_claims()['claims'])} claims: ") and said[-1] == f"Page: {tmp_path/'runs'/'tiny'/'report.html'}" and (tmp_path/'runs'/'tiny'/'report.html').is_file()
    assert len(load_claims()['findings']) == 6 == len([l for l in said if l.startswith('  ')]) and any(l.startswith('Agrees with the published seed 0') for l in said)
    assert any('OOD accuracy peaks early in SFT' in l and 'points' in l for l in said)

def test_how_long_things_took(tmp_path):
    assert known_seconds('tiny') == {}
    write_json(tmp_path/'figures'/'tiny'/'seconds.json', dict(seconds={n.stem: 60. for n in numbered()} | dict(ppo=300.)))
    write_json(tmp_path/'runs'/'tiny'/'02_sft-seed1.json', dict(fingerprint='', seconds=600., files={}, figures=[], stages=[]))
    for name, told in (('spectra-sft-shuffle-1a2b3c4d', dict(seconds=7.)), ('sft-curve-1a2b3c4d', dict(seconds=9., resumed=False)), ('sft-1a2b3c4d', dict(seconds=1., resumed=True)), ('sweep-1a2b3c4d', dict(seconds=3.)), ('base-1a2b3c4d', [])):
        write_json(tmp_path/'runs'/'tiny'/name/'done.json', told)
    assert known_seconds('tiny') == {n.stem: 60. for n in numbered()} | {'02_sft': 600., 'ppo': 300., 'spectra': 7., 'sft-curve': 9.}

def test_publishing_from_the_command(tmp_path, capsys):
    keep(dict(fig2=fake()['fig2']))
    assert publish_runs('tiny', dry=True) == 0 and not (tmp_path/'figures'/'tiny').exists() and capsys.readouterr().out.startswith('new: fig2-seed0.json')
    assert publish_runs('tiny') == 0 and (tmp_path/'figures'/'tiny'/'fig2-seed0.json').is_file()
    assert capsys.readouterr().out.splitlines() == ['new: fig2-seed0.json', '1 new, 0 changed, 0 as they were, 0 refused.']
    timed = tmp_path/'figures'/'tiny'/'seconds.json'
    write_json(timed, dict(cpu=dict(name='another'), seconds={'02_sft': 60.}))
    assert publish_runs('tiny') == 0 and read_json(timed)['cpu'] == dict(name='another') # nothing was timed here
    write_json(tmp_path/'runs'/'tiny'/'sft-x'/'done.json', dict(name='sft', seconds=7))
    assert publish_runs('tiny') == 0 and read_json(timed)['seconds'] == {'02_sft': 60., 'sft': 7} and read_json(timed)['cpu']['cores'] >= 1
    capsys.readouterr()
    assert publish_runs('nothing') == 2 and "model='nothing' has no file in params/" in capsys.readouterr().err
