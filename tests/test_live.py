"Curves while a run is looked at, and nothing where nobody looks."
import sys, threading, time, types
import pytest
from rlsft_nb import live
from rlsft_nb.live import add_line, fig_logs, looked_at, picture, read_log, write_log

YS = dict(loss='loss (nats a token)')

class Shown:
    "IPython.display as far as it is used."
    def __init__(self): self.all, self.HTML, self.Image = [], lambda text: ('html', text), lambda png: ('png', png)
    def display(self, what, display_id, metadata): self.all.append((what, metadata, threading.current_thread())); return self
    def update(self, what, metadata): self.all.append((what, metadata, threading.current_thread()))

@pytest.fixture
def jupyter(monkeypatch):
    shown = Shown()
    monkeypatch.setattr(live, 'looked_at', lambda: True)
    monkeypatch.setitem(sys.modules, 'IPython.display', shown)
    return shown

def test_only_a_notebook_that_is_open_is_looked_at(monkeypatch):
    for name in ('IN_TEST', 'RLSFT_WATCH', 'RLSFT_QUIET', 'JPY_SESSION_NAME'): monkeypatch.delenv(name, raising=False)
    assert not looked_at()
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1)))
    assert not looked_at(), 'a kernel of papermill'
    monkeypatch.setenv('JPY_SESSION_NAME', 'nbs/02_sft.ipynb')
    assert looked_at()
    for name in ('IN_TEST', 'RLSFT_WATCH', 'RLSFT_QUIET'):
        with monkeypatch.context() as m: m.setenv(name, '1'); assert not looked_at()
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda: object()))
    assert not looked_at(), 'a terminal'

def test_nothing_is_drawn_where_nobody_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(live, 'picture', None)
    with live.live(dict(SFT=tmp_path), 'step', YS): add_line(tmp_path, dict(step=1, loss=1.))

def test_it_grows_while_the_block_runs_and_stays(tmp_path, jupyter):
    write_log(tmp_path, [dict(step=1, loss=9.), dict(step=2, loss=5.)]) # an earlier part
    with live.live(dict(SFT=tmp_path), 'step', YS, every=.05):
        for _ in range(200):
            if len(jupyter.all) > 1: break
            time.sleep(.05)
        add_line(tmp_path, dict(step=3, loss=.1))
    kinds = [what[0] for what, _, _ in jupyter.all]
    assert kinds[0] == 'html' and set(kinds[1:]) == {'png'} and len(kinds) >= 3
    assert jupyter.all[1][2] is not threading.main_thread() and jupyter.all[-1][0][1] == picture(dict(SFT=tmp_path), 'step', YS) != jupyter.all[1][0][1]
    assert all(m == dict(live=True) for _, m, _ in jupyter.all) and threading.active_count() == 1 + sum(t.daemon for t in threading.enumerate() if t is not threading.main_thread())

def test_it_ends_with_the_block_also_where_that_fails(tmp_path, jupyter):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with live.live(dict(SFT=tmp_path), 'step', YS): raise KeyboardInterrupt
    assert time.monotonic() - began < 5 and [what for what, *_ in jupyter.all][-1] == ('html', ''), 'no run, no picture'

def test_it_takes_a_hundredth_of_the_time_at_most(tmp_path, jupyter, monkeypatch):
    def slow(*_): end = time.thread_time() + .05; [None for _ in iter(lambda: time.thread_time() < end, False)]; return b'x'
    monkeypatch.setattr(live, 'picture', slow)
    with live.live({}, 'step', YS, every=.01): time.sleep(1.5)
    assert len(jupyter.all) == 3, 'the placeholder, one picture, the last: the next would come after five seconds'

def test_runs_side_by_side():
    logs = {f'from {s}': [dict(update=u, reward=-1. + u/10, first=.3 + u/50) for u in range(1, n)] for s, n in ((240, 9), (800, 4))}
    fig = fig_logs(logs, 'update', dict(reward='reward a hand', first='success (%)'))
    assert [[len(l.get_xdata()) for l in ax.lines] for ax in fig.axes] == [[8, 3]]*2 and fig.get_suptitle() == 'from 240: update 8, from 800: update 3'
    assert list(fig.axes[1].lines[1].get_ydata()) == pytest.approx([32, 34, 36]) and fig.axes[1].get_ylim()[0] <= 0
    import matplotlib.pyplot as plt
    plt.close(fig)
