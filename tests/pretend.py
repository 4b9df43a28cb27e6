"""A GPU that is none: tensors that say so are computed on the CPU, and what a real GPU refuses is refused.

`with GPU(): x.to('cuda:0')` gives such a tensor. Mixing it with CPU tensors (but for scalars and indices), `.numpy()`, and
a generator of another device raise, as they do on a GPU. Speed, memory and rounding are the CPU's."""
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = torch.device('cuda:0')
get = lambda name: getattr(torch.Tensor, name).__get__
SAYS = {get('is_cuda'): True, get('is_cpu'): False, get('device'): HERE}
INTO = {'__getitem__', '__setitem__', 'copy_', 'index_put_'} # take CPU tensors too
OUT = {'tolist', 'item', '__float__', '__int__', '__bool__', '__index__', '__len__'}

class Claimed(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

class Source(torch.Generator):
    device = HERE

_generator = torch.Generator
def _source(device='cpu'): return Source() if is_gpu(device) else _generator(device)

def is_gpu(d): return isinstance(d, (str, torch.device)) and str(d).startswith('cuda')
def claim(x): return x.as_subclass(Claimed) if isinstance(x, torch.Tensor) and not isinstance(x, Claimed) else x
def plain(x): return x.as_subclass(torch.Tensor) if isinstance(x, Claimed) else x

def _to(t, args, kwargs):
    rest = [*args, *kwargs.values()]
    where, like, dtype = ([x for x in rest if isinstance(x, k)] for k in ((str, torch.device), torch.Tensor, torch.dtype))
    gpu = is_gpu(where[0]) if where else isinstance((like or [t])[0], Claimed)
    out = plain(t)
    for d in [x.dtype for x in like] + dtype: out = out.to(d, copy=kwargs.get('copy', False))
    return claim(out) if gpu else out

class GPU(TorchFunctionMode):
    "The pretence; `ran` names what was computed there, `drivers` cuSOLVER's methods that were asked for, with the shapes."
    def __enter__(self): self.ran, self.drivers, torch.Generator = set(), [], _source; return super().__enter__()
    def __exit__(self, *a): torch.Generator = _generator; return super().__exit__(*a)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, '__name__', str(func))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, Claimed)]
        if here and func in SAYS: return SAYS[func]
        with torch._C.DisableTorchFunction():
            if name == 'cpu': return plain(args[0])
            if name == 'cuda': return claim(args[0])
            if name == 'to': return _to(args[0], args[1:], kwargs)
            where, chance = kwargs.pop('device', None), kwargs.get('generator')
            gpu = is_gpu(where) if where is not None else bool(here)
            if chance is not None and isinstance(chance, Source) != gpu: raise RuntimeError(f'{name}: a generator of {chance.device} on another device')
            if where is not None and not gpu: kwargs['device'] = where
            if not gpu: return func(*args, **kwargs)
            if name == 'numpy': raise TypeError(f"can't convert {HERE} device type tensor to numpy")
            if name in OUT: return func(*args, **kwargs)
            if name not in INTO and any(x.dim() for x in tensors if not isinstance(x, Claimed)) and where is None: raise RuntimeError(f'{name}: expected all tensors to be on the same device')
            self.ran.add(name)
            if 'driver' in kwargs: self.drivers.append((kwargs.pop('driver'), tuple(args[0].shape)))
            return tree_map(claim, func(*args, **kwargs))

def moved(lm):
    "A model there; `Module.to` would ask for more of tensors than these can do."
    for m in lm.modules():
        for kept in (m._parameters, m._buffers):
            kept.update({k: claim(v.detach()).requires_grad_(v.requires_grad) for k, v in kept.items() if v is not None})
    return lm
