"Every test keeps its stages and figures in a folder of its own; random inputs are the same on every run."
import os, shutil, sys
from pathlib import Path
import pytest
from hypothesis import settings
from rlsft_nb.places import ROOT

for name in ('MAKELEVEL', 'MAKEFLAGS', 'MFLAGS', 'MAKEOVERRIDES'): os.environ.pop(name, None) # a make within `make test` would print that it enters a folder

settings.register_profile('fixed', derandomize=True, deadline=None)
settings.load_profile('fixed')

@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv('RLSFT_RUNS', str(tmp_path/'runs'))
    monkeypatch.setenv('RLSFT_FIGURES', str(tmp_path/'figures'))

@pytest.fixture
def env(monkeypatch):
    "For subprocesses: this environment's commands first, one thread."
    monkeypatch.setenv('PATH', f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return os.environ

@pytest.fixture
def repo(tmp_path, env, monkeypatch):
    "A small copy of the repository with one numbered notebook that takes no time."
    new = tmp_path/'a repo {x}' # a space and a brace, as real folders may have
    (new/'nbs').mkdir(parents=True)
    (new/'rlsft_nb').mkdir()
    for f in ('settings.ini', 'params'): (shutil.copytree if (ROOT/f).is_dir() else shutil.copy)(ROOT/f, new/f)
    for f in (ROOT/'rlsft_nb').glob('*.py'): shutil.copy(f, new/'rlsft_nb')
    shutil.copy(Path(__file__).parent/'toy.ipynb', new/'nbs'/'00_toy.ipynb')
    monkeypatch.setenv('PYTHONPATH', str(new))
    monkeypatch.delenv('RLSFT_RUNS'); monkeypatch.delenv('RLSFT_FIGURES')
    return new

@pytest.fixture(scope='session')
def pico(tmp_path_factory):
    "Folders of random small checkpoints, by architecture, all with the embedded tokenizer."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM
    from rlsft_nb.tiny import make_tokenizer
    tok, root = make_tokenizer(), tmp_path_factory.mktemp('pico')
    text = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None)
    vision = dict(hidden_size=16, attention_heads=2, num_hidden_layers=1, num_global_layers=1, intermediate_size=16, image_size=28, patch_size=14, max_num_tiles=1,
                  vision_output_dim=32, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]])
    kinds = dict(qwen2=(Qwen2ForCausalLM, lambda: Qwen2Config(**text, tie_word_embeddings=False)),
                 llama=(LlamaForCausalLM, lambda: LlamaConfig(**text, tie_word_embeddings=True)),
                 mllama=(MllamaForConditionalGeneration, lambda: MllamaConfig(vision_config=vision, image_token_index=0, text_config=text | dict(bos_token_id=1, num_hidden_layers=3, cross_attention_layers=[1]))))
    for name, (cls, config) in kinds.items():
        torch.manual_seed(0)
        lm = cls(config())
        lm.generation_config.eos_token_id = tok.eos_token_id
        lm.generation_config.pad_token_id = tok.pad_token_id
        lm.save_pretrained(root/name); tok.save_pretrained(root/name)
    return {name: root/name for name in kinds}
