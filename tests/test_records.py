"Where records are kept, who may read them, and what is published."
import json, os, subprocess, sys
import pytest
from rlsft_nb.claims import judge_claims, table
from rlsft_nb.files import read_json, sha256_file, write_json
from rlsft_nb.parameters import load_params
from rlsft_nb.stages import Stage, run_stage
from rlsft_nb.records import Stranger, decides, find, home, made_here, publish, read_record, records_dir, run_key, save_figure, save_record, seeds_of, shown_path
from rlsft_nb.report import content, origins

TINY = load_params('tiny')
FAST = load_params('tiny', dict(sft=dict(lr=1.0e-3)))

def test_figure_bytes_are_stable(tmp_path):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    cfg, shas = load_params('tiny'), []
    for _ in range(2):
        fig, ax = plt.subplots(); ax.plot([1, 2]); plt.close(fig)
        shas.append(sha256_file(save_figure(fig, 'f', cfg)))
    assert shas[0] == shas[1] and save_record('f', dict(y=[1, 2]), cfg) == tmp_path/'runs'/'tiny'/'records'/'f.json'

def test_a_record_names_the_stages_behind_it_alone(tmp_path):
    cfg = load_params('tiny')
    first, other = (run_stage(Stage(n, 'tiny', {}), lambda folder: {}, cfg) for n in ('first', 'other'))
    second = run_stage(Stage('second', 'tiny', {}, [first]), lambda folder: {}, cfg)
    behind = lambda **more: set(read_json(save_record('f', dict(y=1), cfg, **more))['stages'])
    assert behind(of=second) == {repr(first), repr(second)} and behind(of=first) == {repr(first)}
    assert behind() >= {repr(first), repr(second), repr(other)}

def test_the_key_is_of_what_decides_a_result():
    same = [dict(workers=7), dict(threads=3), dict(launch=dict(processes=2)), dict(needs=dict(gpus=4)), dict(sft=dict(lr=TINY.sft.lr)), dict(ppo=dict(sweep_seeds=5))]
    assert [run_key(load_params('tiny', o)) for o in same] == ['']*6
    other = [dict(sft=dict(lr=1.0e-3)), dict(eval=dict(hands=40)), dict(restore=dict(draws=7))]
    assert len({run_key(load_params('tiny', o)) for o in other} - {''}) == 3
    here, there = (load_params('qwen7b', dict(model=dict(source='folder', path=f'{d}/w'))) for d in ('/a', '/b'))
    assert run_key(here) == run_key(there) != '' and '/a' not in json.dumps(decides(here)) # a way to a folder is of one machine

def test_a_seed_is_all_ones_own_or_all_published(tmp_path):
    for n in ('fig2-seed0', 'fig1-seed0', 'fig2-seed1'): write_json(tmp_path/'figures'/'tiny'/f'{n}.json', dict(n=n))
    assert seeds_of(TINY) == [0, 1] and not made_here(TINY, 0) and origins(TINY, [0, 1]) == 'Seeds 0, 1 as published.'
    save_record('fig2-seed0', dict(n='mine'), TINY); save_record('fig2-seed7', dict(n='mine'), TINY)
    assert seeds_of(TINY) == [0, 1, 7] and origins(TINY, [0, 1, 7]) == 'Seeds 0, 7 made here; seed 1 as published.'
    assert find(TINY, 'fig2.json', 0).parent == records_dir(TINY) and find(TINY, 'fig1.json', 0) is None # not one's own SFT beside published RL
    assert read_json(tmp_path/'figures'/'tiny'/'fig2-seed0.json') == dict(n='fig2-seed0')

def test_what_rests_on_published_records_alone_makes_no_seed_ones_own(tmp_path):
    "Claims or a tour by themselves, on a fresh clone, write records of a seed that was never run here."
    for n in ('fig2-seed0', 'fig1-seed0'): write_json(tmp_path/'figures'/'tiny'/f'{n}.json', dict(n=n))
    before = table('tiny')
    for n in ('claims-seed0', 'explore-seed0', 'fig5-seed0'): save_record(n, dict(n='mine'), TINY)
    assert table('tiny') == before and seeds_of(TINY) == [0] and home(TINY, 0) == tmp_path/'figures'/'tiny' and origins(TINY, [0]) == 'Seed 0 as published.'

def test_overrides_never_join_the_seeds(tmp_path):
    write_json(tmp_path/'figures'/'tiny'/'fig2-seed3.json', dict(n='published'))
    before = table('tiny')
    path = save_record('fig2-seed3', dict(n='fast'), FAST)
    assert path.parent == tmp_path/'runs'/'tiny'/f'records-{run_key(FAST)}' and seeds_of(FAST) == [3] and home(TINY, 3) == tmp_path/'figures'/'tiny'
    assert table('tiny') == before and find(TINY, 'fig2.json', 3).parent == tmp_path/'figures'/'tiny'
    assert seeds_of(load_params('tiny', dict(sft=dict(lr=5.0e-3)))) == []

def test_a_stranger_is_refused_by_its_name(tmp_path):
    write_json(tmp_path/'figures'/'tiny'/'fig2-seed0.json', dict(params=decides(FAST), curve={}))
    with pytest.raises(Stranger, match=r'fig2-seed0\.json was made with sft\.lr=0\.001, where tiny has 0\.0002: make it again, or move it away'): judge_claims(TINY, [0])
    done = subprocess.run([sys.executable, '-m', 'rlsft_nb.report'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and 'fig2-seed0.json was made with sft.lr=0.001' in done.stderr and 'Traceback' not in done.stderr
    old = write_json(tmp_path/'old.json', dict(curve={}))
    assert read_record(old, TINY) == dict(curve={}) # from before parameters were kept
    more = write_json(tmp_path/'more.json', dict(params=dict(sft=dict(gone=3), lost=dict(x=1))))
    assert read_record(more, TINY) # a parameter that is no longer there decides nothing

def test_only_publish_changes_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr('rlsft_nb.records.stages_used', lambda of: {}) # those of other tests
    there = tmp_path/'figures'/'tiny'
    write_json(there/'fig1-seed0.json', dict(old=1))
    save_record('fig1-seed0', dict(new=1), TINY); save_record('fig9-seed0', dict(new=1), TINY); save_record('fast-seed0', dict(new=1), FAST)
    assert publish('tiny', dry=True) == dict(new=['fig9-seed0.json'], changed=['fig1-seed0.json'], same=[], refused={}) and not (there/'fig9-seed0.json').exists()
    publish('tiny')
    assert read_json(there/'fig1-seed0.json')['new'] == 1 and (there/'fig9-seed0.json').is_file() and not (there/'fast-seed0.json').exists()
    assert publish('tiny') == dict(new=[], changed=[], same=['fig1-seed0.json', 'fig9-seed0.json'], refused={})

def test_a_model_that_never_ran_has_no_verdicts():
    c = content('smollm2')
    assert c['tally'] == {'not run': len(c['r']['claims'])} and c['origin'] == 'Nothing of smollm2 with these parameters is here: make paper MODEL=smollm2. What has a verdict needs no run.'

def test_paths_as_they_are_typed(tmp_path):
    assert shown_path(records_dir(TINY)/'a.json') == 'runs/tiny/records/a.json' and shown_path(tmp_path/'figures'/'tiny'/'a.json') == 'figures/tiny/a.json'
    assert shown_path('/elsewhere/a') == '/elsewhere/a'
