"Reads settings.ini, so that names, versions and requirements stand in one place; a wheel holds params/ as rlsft_nb/params."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements').replace('_', '-'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}

class BuildWithParams(build_py):
    "An editable install reads params/ where it is."
    def run(self):
        super().run()
        if self.editable_mode: return
        to = Path(self.build_lib)/'rlsft_nb'/'params'
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(here/'params', to)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], keywords=cfg['keywords'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['rlsft_nb*']), py_modules=['points24'], package_data={'rlsft_nb': ['data/*', 'data/*/*', 'data/*/*/*']}, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require=extras, cmdclass=dict(build_py=BuildWithParams),
    entry_points={'console_scripts': ['rlsft = rlsft_nb.cli:main'], 'papermill.engine': ['rlsft = rlsft_nb.paper:Engine']},
)
