"Parameters of notebooks and models, and where the package keeps them."
import json, re, yaml, pytest
from rlsft_nb import parameters, places
from rlsft_nb.parameters import check_params, load_params, models, plain_dict, show_params, yaml_mapping
from rlsft_nb.files import read_json
from rlsft_nb.places import ROOT, params_dir, repository, shipped, shipped_names
from rlsft_nb.problems import ParamError, Problem

# parameters

NS = dict(__annotations__=dict(model=str, seed=int, smoke=bool, lr=float, layers=list, overrides=dict),
          model='tiny', seed=0, smoke=False, lr=1., layers=[], overrides={})

@pytest.mark.parametrize('change, message', [
    (dict(modle='tiny'), "unknown parameter 'modle'; did you mean 'model'?"),
    (dict(zzz=1), "unknown parameter 'zzz'; known: model, seed, smoke, lr, layers, overrides"),
    (dict(nothing=None), "unknown parameter 'nothing'; known: model, seed, smoke, lr, layers, overrides"),
    (dict(smoke='false'), "parameter smoke='false' is str, expected bool"),
    (dict(seed=True), "parameter seed=True is bool, expected int"),
    (dict(seed=1.), "parameter seed=1.0 is float, expected int"),
    (dict(lr='1e-3'), "parameter lr='1e-3' is str, expected float"),
    (dict(layers='[1]'), "parameter layers='[1]' is str, expected list"),
    (dict(model=None), "parameter model=None is NoneType, expected str")])
def test_check_params_refuses(change, message):
    with pytest.raises(ParamError) as e: check_params(NS | change)
    assert str(e.value) == message
    assert e.value._render_traceback_() == [f'ParamError: {message}']

def test_check_params_accepts():
    ns = NS | dict(lr=1, In=['x'], Out={}, _private=3, json=json, test=lambda: 0)
    check_params(ns)
    ns['counted'] = 5 # a variable of the notebook, when its cell is run again
    check_params(ns)
    with pytest.raises(ParamError): check_params(ns | dict(seed='0'))

def test_check_params_where_annotations_are_lazy():
    ns = dict(model='tiny', seed='0', In=['', '%matplotlib inline', "model: str = 'tiny'\nseed: int = 0", 'x: int = f('])
    with pytest.raises(ParamError, match="seed='0' is str, expected int"): check_params(ns)
    with pytest.raises(ParamError, match="unknown parameter 'modle'"): check_params(ns | dict(seed=0, modle=''))
    check_params(ns | dict(seed=0))

@pytest.fixture
def params(tmp_path, monkeypatch):
    (tmp_path/'params').mkdir()
    (tmp_path/'params'/'base.yaml').write_text('sft: {lr: 1.0e-3, steps: 10, name: x, ks: [1], deep: {a: true}}\n')
    for room in (places, parameters): monkeypatch.setattr(room, 'ROOT', tmp_path)
    return lambda text: (tmp_path/'params'/'m.yaml').write_text(text)

@pytest.mark.parametrize('text, message', [
    ('sft: {lrr: 1.0}', "params/m.yaml: sft.lrr is no parameter; did you mean 'lr'?"),
    ('stf: {}', "params/m.yaml: stf is no parameter; did you mean 'sft'?"),
    ('sft: {lr: 1e-6}', "params/m.yaml: sft.lr='1e-6' is str, expected float"),
    ('sft: {steps: 1.5}', "params/m.yaml: sft.steps=1.5 is float, expected int"),
    ('sft: {deep: {a: 1}}', "params/m.yaml: sft.deep.a=1 is int, expected bool"),
    ('sft: {deep: 1}', "params/m.yaml: sft.deep=1 is int, expected dict"),
    ('sft: {name: null}', "params/m.yaml: sft.name=None is NoneType, expected str"),
    ('sft: 3', "params/m.yaml: sft=3 is int, expected dict")])
def test_layer_refused(params, text, message):
    params(text)
    with pytest.raises(ParamError) as e: load_params('m')
    assert str(e.value) == message

def test_layers(params):
    params('sft: {lr: 2, deep: {a: false}}')
    cfg = load_params('m', dict(sft=dict(steps=3)))
    assert (cfg.name, cfg.sft.lr, type(cfg.sft.lr), cfg.sft.steps, cfg.sft.deep.a) == ('m', 2., float, 3, False)
    with pytest.raises(ParamError, match="overrides: sft.step is no parameter; did you mean 'steps'"): load_params('m', dict(sft=dict(step=3)))
    with pytest.raises(ParamError, match="overrides=.* is list, expected dict"): load_params('m', [1])

def test_broken_layer_and_missing_model(params):
    for text in ('a: [', '- 1', '\x00'):
        params(text)
        with pytest.raises(ParamError, match='m.yaml'): load_params('m')
    for name in ('base', '../params/m', 'n', ''):
        with pytest.raises(ParamError, match='has no file in params/'): load_params(name)

def test_missing_base(tmp_path, monkeypatch):
    (tmp_path/'params').mkdir(); (tmp_path/'params'/'m.yaml').write_text('')
    for room in (places, parameters): monkeypatch.setattr(room, 'ROOT', tmp_path)
    with pytest.raises(ParamError, match='cannot read .*base.yaml: No such file'): load_params('m')

def test_shipped_models(capsys):
    for m in models():
        cfg = load_params(m)
        show_params(cfg)
        assert yaml.safe_load(capsys.readouterr().out) == plain_dict(cfg)

@pytest.mark.parametrize('notebook', ['01_models', '02_sft', '03_ppo', '05_restore'])
def test_lessons_hold_for_another_model(notebook, monkeypatch):
    "Papermill runs the lessons of a notebook with the model it was given: none may lean on what `tiny` happens to say."
    monkeypatch.chdir(ROOT/'nbs')
    cells = [''.join(c['source']) for c in read_json(ROOT/'nbs'/f'{notebook}.ipynb')['cells'] if c['cell_type'] == 'code']
    own = dict(__name__='lesson')
    for c in cells:
        if not re.match(r'#\| (slow|default_exp)', c): exec(compile(c.replace("model: str = 'tiny'", "model: str = 'digits'"), notebook, 'exec'), own)
    assert own['model'] == 'digits'

# what the package holds

def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.setattr(places, 'PACKAGE', tmp_path)
    for name in ('tiny', 'tiny/peak', 'tiny/rl', 'other'): (tmp_path/'data'/name).mkdir(parents=True); (tmp_path/'data'/name/'config.json').touch()
    (tmp_path/'data'/'tiny'/'notes').mkdir()
    assert shipped_names() == ['other', 'tiny', 'tiny:peak', 'tiny:rl'] and shipped('tiny:peak') == tmp_path/'data'/'tiny'/'peak'
    for name in ('tiny:notes', 'tiny/peak', '', 'peak', '../data', 'tiny:'):
        with pytest.raises(ParamError) as e: shipped(name)
        assert str(e.value) == f'checkpoint={name!r} is not in the package, which has: other, tiny, tiny:peak, tiny:rl'

def test_models_of_an_installed_package(tmp_path, monkeypatch):
    "Those of the package, and those in ./params, which go first."
    for f, text in dict(pkg='sft: {lr: 1.0}', own='sft: {lr: 2.0}').items():
        (tmp_path/f/'params').mkdir(parents=True)
        (tmp_path/f/'params'/'base.yaml').write_text('sft: {lr: 0.0}\n' if f == 'pkg' else 'mine: 1\n')
        for m in ('both', f): (tmp_path/f/'params'/f'{m}.yaml').write_text(text)
    for name, value in dict(PACKAGE=tmp_path/'pkg', INSTALLED=True, ROOT=tmp_path/'own').items(): monkeypatch.setattr(places, name, value)
    monkeypatch.setattr(parameters, 'ROOT', tmp_path/'own')
    assert models() == ['both', 'own', 'pkg'] and params_dir() == tmp_path/'pkg'/'params'
    assert [load_params(m).sft.lr for m in models()] == [2., 2., 1.]
    with pytest.raises(Problem, match='an installed package does not hold'): repository()

@pytest.mark.parametrize('text, message', [('['*5000, 'more than 100 brackets within one another'), ('a: ' + '{'*101, 'more than 100 brackets'), ('- '*3000, 'maximum recursion depth exceeded'), ('!!float ', 'string index out of range'), ('a: &x 1\nb: *x', 'aliases')])
def test_yaml_that_would_take_long_or_break_the_parser(text, message):
    with pytest.raises(ParamError, match=f'is not YAML: .*{message}'): yaml_mapping(text, 'given')

def test_brackets_side_by_side_and_quoted_are_fine():
    assert yaml_mapping('{a: ' + '['*90 + ']'*90 + ', b: ' + '['*90 + ']'*90 + '}', 'x').keys() == {'a', 'b'} and yaml_mapping('a: "[[["', 'x') == dict(a='[[[')

def test_what_is_read_twice_is_not_shared():
    first = yaml_mapping('{sft: {checkpoints: [1, 2]}}', 'x')
    first['sft']['checkpoints'].append(3)
    assert yaml_mapping('{sft: {checkpoints: [1, 2]}}', 'x') == {'sft': {'checkpoints': [1, 2]}}
