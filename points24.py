"The game as a taskset of Prime Intellect's verifiers, which finds it by this name: `vf-eval points24 -m MODEL -n 20`."
from rlsft_nb.envs import points24

Points24, Points24Env, Answerer = points24()
__all__ = ['Points24', 'Points24Env', 'Answerer']
