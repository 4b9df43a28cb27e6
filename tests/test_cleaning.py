"Old stages: what is listed, what goes, and what never does."
import fcntl, json
import pytest
from rlsft_nb.cleaning import all_stages, clean, main, old, used
from rlsft_nb.files import write_json
from rlsft_nb.parameters import load_params
from rlsft_nb.places import runs_root
from rlsft_nb.stages import Stage, run_stage
from rlsft_nb.records import save_record

CFG = load_params('tiny')
def made(name, n, up=(), seed=0): return run_stage(Stage(name, 'tiny', dict(n=n), up, seed), lambda folder: write_json(folder/'big.json', 'x'*1000) and {}, CFG)

@pytest.fixture
def pairs():
    "Two versions of a chain of two, the newer last, and another seed."
    old_ = made('first', 1); made('second', 1, [old_]); new = made('first', 2); last = made('second', 2, [new])
    return [made('first', 1, seed=1), old_, new, last]

def test_the_newest_and_what_it_was_made_from_stay(pairs):
    assert len(all_stages(runs_root())) == 5 and {n.split('-')[0] for n in old(runs_root())} == {'tiny/first', 'tiny/second'} and len(old(runs_root())) == 2
    assert not {repr(s) for s in (pairs[0], *pairs[2:])} & old(runs_root()).keys() and min(old(runs_root()).values()) > 1000
    assert len(old(runs_root(), 'used')) == 5

def test_what_records_rest_on_stays_with_all_below_it(pairs):
    second = made('second', 1, [pairs[1]])
    save_record('fig9', dict(y=1), CFG, second)
    assert used(runs_root()) == {repr(second), repr(pairs[1])} and old(runs_root()) == {}
    assert set(clean(runs_root(), 'used', yes=True)['stages']) == {repr(s) for s in (pairs[0], *pairs[2:])} and set(all_stages(runs_root())) == used(runs_root())

def test_what_a_process_makes_stays(pairs):
    second = made('second', 1, [pairs[1]])
    with open(second.path.parent/f'.{second.path.name}.lock', 'a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert used(runs_root()) == {repr(second), repr(pairs[1])} and clean(runs_root(), 'latest', yes=True)['stages'] == {}
    assert len(clean(runs_root(), yes=True)['stages']) == 2 and not second.path.exists()

def test_the_command_lists_first(pairs, capsys):
    assert main([]) == 0 and capsys.readouterr().out.splitlines()[-1].startswith('2 old stages, 0.0 MiB; --yes removes them') and len(all_stages(runs_root())) == 5
    assert main(['--yes', '--json']) == 0 and json.loads(capsys.readouterr().out)['removed'] and len(all_stages(runs_root())) == 3
    assert main(['--yes']) == 0 and capsys.readouterr().out == '0 old stages, 0.0 MiB removed\n'
