"Work under watch: what it raised, how long it took, what memory it held, where it wrote and what it ran."
import contextlib, io, os, resource, signal, sys, time
from collections import Counter
from pathlib import Path
from rlsft_nb.problems import Problem

SECONDS, MIB = 10, 512 # what one hostile input may take

class TooSlow(BaseException): "No `Exception`: nothing on the way may swallow it."

TIMERS = lambda n: ((signal.SIGPROF, signal.ITIMER_PROF, n), (signal.SIGALRM, signal.ITIMER_REAL, 10*n)) # of the processor; and of the wall, where the machine has other work
_at = None # the watch that is on; audit hooks cannot be taken away

def _wrote(event, args):
    "The path that an event writes to, or None."
    if event == 'open': return args[0] if isinstance(args[0], (str, bytes, os.PathLike)) and (isinstance(args[1], str) and set(args[1]) & set('wax+') or args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) else None
    if event not in ('os.mkdir', 'os.remove', 'os.rmdir', 'os.rename', 'os.truncate', 'os.symlink', 'os.link'): return None
    path, at = (args[1], args[3]) if event in ('os.rename', 'os.link') else (args[0], args[-1])
    return os.path.join(os.readlink(f'/proc/self/fd/{at}'), os.fsdecode(path)) if isinstance(at, int) and at >= 0 and event in ('os.remove', 'os.rmdir', 'os.rename') and isinstance(path, (str, bytes)) else path if isinstance(path, (str, bytes, os.PathLike)) else None

def _hook(event, args):
    if _at is None: return
    if event in ('subprocess.Popen', 'os.posix_spawn') and str(args[0]).rsplit('/', 1)[-1] == 'git': return # provenance asks it for the commit
    if event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'pickle.find_class', 'socket.connect'): _at.ran.append(f'{event} {args[0]!r}'[:200])
    path = _wrote(event, args)
    if path is None or os.fsdecode(path) == os.devnull: return
    real = Path(os.path.realpath(os.fsdecode(path)))
    if not any(real == d or d in real.parents for d in _at.allowed): _at.outside.append(f'{event} {real}')

sys.addaudithook(_hook)

def _status(key): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))/2**10 # MiB

class Watch:
    "Figures of many cases; `faults` lists what should not have been."
    def __init__(self, allowed): self.allowed, self.faults, self.outcomes, self.most = [Path(d).resolve() for d in allowed], [], Counter(), dict(seconds=0., mib=0.)
    def __call__(self, work, case, ends=Problem, seconds=SECONDS, mib=MIB): # `ends`: the exceptions that are an answer
        "Runs `work()`; notes how it ended."
        global _at
        self.outside, self.ran, raised, value = [], [], None, None
        with open('/proc/self/clear_refs', 'w') as f: f.write('5')
        held, soft = _status('VmRSS'), resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (int((_status('VmSize') + 2*mib)*2**20), soft[1]))
        before = [(signal.signal(s, self._late), signal.setitimer(timer, much), s, timer)[::2] for s, timer, much in TIMERS(seconds)]
        start, _at = time.process_time(), self
        try:
            with contextlib.redirect_stderr(io.StringIO()) as self.err, contextlib.redirect_stdout(io.StringIO()): value = work()
        except ends as e: raised = e
        except (Exception, TooSlow, SystemExit) as e: raised = e; self.fault(case, f'{type(e).__name__}: {e}', e.__traceback__)
        except BaseException as e:
            if type(e).__module__ != 'pyo3_runtime': raise
            raised = e; self.fault(case, f'{type(e).__name__}: {e}', e.__traceback__)
        finally:
            _at = None
            took = time.process_time() - start
            for (_, timer, _), (handler, s) in zip(TIMERS(0), before): signal.setitimer(timer, 0); signal.signal(s, handler)
            resource.setrlimit(resource.RLIMIT_AS, soft)
        grown = _status('VmHWM') - held
        self.most = dict(seconds=max(self.most['seconds'], round(took, 2)), mib=max(self.most['mib'], round(grown, 1)))
        if grown > mib: self.fault(case, f'held {grown:.0f} MiB')
        for what in self.outside[:1]: self.fault(case, f'wrote outside: {what}')
        for what in self.ran[:1]: self.fault(case, f'ran: {what}')
        if isinstance(raised, Problem) and '\n' in str(raised): self.fault(case, f'more than one line: {raised}')
        self.outcomes[type(raised).__name__ if raised else 'done'] += 1
        return value
    def _late(self, *_): raise TooSlow('took too long')
    def fault(self, case, what, tb=None):
        at = ''
        while tb is not None:
            if 'rlsft_nb' in tb.tb_frame.f_code.co_filename: at = f' ({Path(tb.tb_frame.f_code.co_filename).name}:{tb.tb_lineno})'
            tb = tb.tb_next
        self.faults.append(f'{case}: {" ".join(what.split())[:300]}{at}')
    def figures(self): return dict(tried=sum(self.outcomes.values()), ended=dict(self.outcomes.most_common()), lost=len(self.faults), faults=self.faults[:20], most=self.most)
