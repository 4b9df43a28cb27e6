"Reads settings.ini, so that names, versions and requirements stand in one place."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {n: cfg[f'{n}_requirements'].split() for n in ('dev', 'smollm2', 'workflow', 'deepspeed', 'vllm', 'verifiers', 'reasoning_gym')}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], keywords=cfg['keywords'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['rlsft_nb*']), py_modules=['points24'], package_data={'rlsft_nb': ['data/*', 'data/*/*']}, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'papermill.engine': ['rlsft = rlsft_nb.paper:Engine']},
)
