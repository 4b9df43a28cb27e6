"Prints the steps of SFT that RL starts from, as JSON: python workflow/starts.py MODEL SEED OVERRIDES"
import json, sys
import yaml
from rlsft_nb.parameters import load_params
from rlsft_nb.pipeline import curve_stage
from rlsft_nb.ppo import starts

model, seed, overrides = sys.argv[1:]
cfg = load_params(model, yaml.safe_load(overrides))
print(json.dumps(starts(curve_stage(cfg, int(seed)).results(), cfg.ppo.between)))
