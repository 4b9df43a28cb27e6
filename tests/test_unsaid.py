"Tokens that fine-tuning never says: found by another count, raised and left as they were, chosen on validation hands."
import pytest, torch
from rlsft_nb import unsaid as room
from rlsft_nb.game import hands, values
from rlsft_nb.answers import answer
from rlsft_nb.models import load_tok, score_lm
from rlsft_nb.parameters import load_params
from rlsft_nb.problems import Problem
from rlsft_nb.solver import solve
from rlsft_nb.tiny import make_tokenizer
from rlsft_nb.unsaid import freed, measure_freed, unsaid
from test_checkpoints import build

FEW = load_params('tiny', dict(eval=dict(hands=6, val_hands=400)))

class Letters:
    "A tokenizer that spells numbers in digits."
    def __call__(self, texts, add_special_tokens=True): return dict(input_ids=[[ord(c) for c in t] for t in texts])
    def decode(self, ids): return ''.join(map(chr, ids))

def test_what_is_never_said_is_counted_by_hand():
    tok = load_tok('tiny')
    said = {}
    for cell, rule, face in (('ID', '10', False), ('OOD', '11-12-13', True)):
        said[cell] = [answer(h, rule, solve(values(h, rule))[0]) for h in hands('val', rule, face)[:400]]
    number = lambda texts: {w for t in texts for w in __import__('re').findall(r'\d+', t)}
    never, control = unsaid(tok, FEW)
    assert {tok.decode([i]) for i in never} == {w for w in number(said['OOD']) - number(said['ID']) if len(tok(w, add_special_tokens=False)['input_ids']) == 1} == {'11', '12', '13'}
    assert [tok.decode([i]) for i in control] == ['8', '9', '10'] and not {*never} & {*control}

def test_digits_are_never_unsaid(monkeypatch):
    assert unsaid(Letters(), FEW) == ([], [])
    played = []
    monkeypatch.setattr(room, 'load_lm', lambda *_: (None, Letters())); monkeypatch.setattr(room, 'score_lm', lambda lm, tok, cfg, part, names: played.append((part, *names)) or 'score')
    assert measure_freed('x', FEW) == dict(tokens=[], control=[], before='score') and played == [('test', 'ID', 'OOD')]

@pytest.mark.parametrize('kind', ['llama', 'gemma2', 'gpt2'])
def test_logits_are_raised_and_left(kind):
    lm, x = build(kind, vocab_size=len(make_tokenizer())).eval(), torch.tensor([[5, 6, 7]])
    logits = lambda: lm(input_ids=x).logits.detach()
    before = logits()
    with pytest.raises(RuntimeError, match='in between'):
        with freed(lm, [3, 9], 5.):
            up = logits() - before
            raise RuntimeError('in between')
    rest = [i for i in range(up.shape[-1]) if i not in (3, 9)]
    assert torch.allclose(up[..., rest], torch.zeros(()), atol=1e-5) and (up[..., [3, 9]] > (1 if kind == 'gemma2' else 4.99)).all() # gemma caps its logits afterwards
    assert torch.equal(logits(), before)

def test_a_model_without_a_head_is_refused():
    class Headless:
        def get_output_embeddings(self): return None
    with pytest.raises(Problem, match='Headless: has no output head'):
        with freed(Headless(), [1], 1.): pass

def test_the_constant_is_chosen_on_validation_hands(monkeypatch):
    "By OOD accuracy there; of two equal ones the smaller; the control gets the same."
    asked = []
    def played(lm, tok, cfg, ids, by, part, names):
        asked.append((len(ids), by, part, *names))
        return {c: dict(first=dict(rate={2.: .1, 4.: .3, 6.: .3}.get(by, 0.))) for c in names}
    monkeypatch.setattr(room, '_played', played); monkeypatch.setattr(room, 'load_lm', lambda *_: (None, load_tok('tiny')))
    got = measure_freed('x', FEW, (2., 4., 6.))
    assert got['constant'] == 4. and got['val'] == {'2': .1, '4': .3, '6': .3}
    assert asked == [(0, 0., 'test', 'ID', 'OOD'), *((3, c, 'val', 'OOD') for c in (2., 4., 6.)), (3, 4., 'test', 'ID', 'OOD'), (3, 4., 'test', 'OOD')]

def test_raised_tokens_reach_what_is_played():
    "A token raised beyond all others is all that a model says."
    from rlsft_nb.models import load_lm
    lm, tok = load_lm('tiny:end')
    never, _ = unsaid(tok, FEW)
    with freed(lm, never[:1], 1000.): got = score_lm(lm, tok, FEW, 'test', ['OOD'])['OOD']
    assert got['first']['rate'] == 0 and got['outcomes']['no_formula'] == 1
