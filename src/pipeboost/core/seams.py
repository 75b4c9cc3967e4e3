"""Seams: chains of middleware around the methods of one object, without touching its class.

Middleware is a callable `(call_next, owner, *args, **kwargs)`: `call_next(*args, **kwargs)` continues the chain and
ends in the stock method; `owner` is the object the method was called on, which for a `copy.copy` view is the view.
A property can be wrapped too, and is then read through the chain: `(call_next, owner)`.
The object's `__class__` becomes a subclass that passes for the stock class (same name, module, signatures; it pickles
and saves as the stock class; what others read, set or delete on it is the stock class's) and whose methods look up the
object's own chain. A `copy.copy` shares the chain; a deep copy, like a pickle, is a stock object.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipeboost.core.nesting import order_of

Middleware = Callable[..., Any]
T = TypeVar("T")

_CHAINS = "_pipeboost_chains"
_STOCK = "__pipeboost_stock_class__"
_WRAPPED = "__pipeboost_wrapped__"
_SHOWN = "__pipeboost_shown__"
_MADE = "__pipeboost_made__"
"""On a class of ours that is complete: while it is made, what its metaclass sets on it is its own."""

_COPYING = frozenset(("__dict__", "__copy__", "__deepcopy__", "__reduce_ex__"))
"""What `copy` and `pickle` must find on our class."""

_members: Callable[[type], Mapping[str, Any]] = type.__dict__["__dict__"].__get__
_ABSENT = object()
_replaced: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()
"""Stock class → what it had of its own before others set something on a subclass of ours."""
_seamed_classes: dict[tuple[type, frozenset[str]], type] = {}
_lock = threading.RLock()


class _Chains(dict[str, tuple[tuple[int, Middleware], ...]]):
    """The middleware of one object: method name → ((order, middleware), …), outermost first.

    Attributes:
        attached: names of attributes of ours, which deep copies and pickles leave out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attached: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Chains:
        return _Chains()


_signature = functools.lru_cache(maxsize=256)(inspect.signature)


def signature_of(cls: type, method: str) -> inspect.Signature:
    """Return what a method of a class takes, `self` first; of the present one, where it has been replaced."""
    return _signature(getattr(cls, method))


def stock_class(obj: object) -> type:
    """Return the class the object had before pipeboost wrapped its methods."""
    return _stock_of(type(obj))


def disguised_subclass(base: type, namespace: Mapping[str, Any], *, shown: frozenset[str] = frozenset()) -> type:
    """Return a subclass of `base` with the members of `namespace` that passes for `base`.

    It has the same `__name__`, `__qualname__`, `__module__` and `__doc__`, and equals `base`. Its attributes, as others
    read, set and delete them, are those of `base`, which it also constructs; only its instances have `namespace`. Deep
    copies and pickles of them are instances of `base`; `copy.copy` keeps the subclass.

    Args:
        shown: members that the class has for its readers too, as `forward`, which Dynamo reads there.
    """
    members = {
        _STOCK: base,
        _SHOWN: shown | _COPYING,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_as_stock,
    }
    for name, method in (("__copy__", _copy), ("__deepcopy__", _deepcopy)):
        if not hasattr(base, name):
            members[name] = method
    subclass = _passing(type(base))(base.__name__, (base,), {**members, **namespace})
    type.__setattr__(subclass, _MADE, True)
    return subclass


def add_middleware(obj: Any, method: str, middleware: Middleware, *, place: str) -> None:
    """Wrap a method or property of this one object.

    `place` is where the middleware nests (`nesting.py`); among equals the first added is outermost. Adding the same
    twice is an error of ours.

    Raises:
        AttributeError: the object has no such method or property.
    """
    order = order_of(place)
    stock = getattr(stock_class(obj), method, None)
    if not callable(stock) and not isinstance(stock, property):
        raise AttributeError(f"{stock_class(obj).__name__} has no method {method!r} to wrap")
    with _lock:
        chains = vars(obj).setdefault(_CHAINS, _Chains())
        chain = chains.get(method, ())
        assert all(present is not middleware for _, present in chain), f"{method} has this middleware already"
        chains[method] = tuple(sorted((*chain, (order, middleware)), key=lambda entry: entry[0]))
        _set_wrapped(obj, frozenset(chains))


def attach(obj: Any, name: str, value: Any) -> None:
    """Set an attribute on an object that has middleware; deep copies and pickles of the object come without it.

    A shallow copy has `value.of_copy(the copy)`.
    """
    vars(obj)[_CHAINS].attached.add(name)
    setattr(obj, name, value)


def remove_middleware(obj: Any, method: str, middleware: Middleware) -> None:
    """Take middleware off again, if it is there; when the last goes, the object has its stock class back."""
    with _lock:
        chains = vars(obj).get(_CHAINS)
        if chains is None:
            return
        chain = tuple(entry for entry in chains.get(method, ()) if entry[1] is not middleware)
        if chain:
            chains[method] = chain
        else:
            chains.pop(method, None)
        _set_wrapped(obj, frozenset(chains))
        if not chains:
            del vars(obj)[_CHAINS]


def middleware_of(obj: Any, method: str) -> tuple[Middleware, ...]:
    """Return the middleware of a method, outermost first."""
    return tuple(middleware for _, middleware in vars(obj).get(_CHAINS, {}).get(method, ()))


def has_middleware(obj: Any, method: str, middleware: Middleware) -> bool:
    """Whether a method has this middleware, which would be called."""
    return any(present is middleware for present in middleware_of(obj, method)) and method in _members(type(obj)).get(
        _WRAPPED, ()
    )


def _stock_of(cls: Any) -> Any:
    return _members(cls).get(_STOCK, cls) if isinstance(cls, type) else cls


@functools.cache
def _passing(stock_metaclass: Any) -> type:
    """Return the metaclass of subclasses that pass for their stock class.

    `from_pipe` asks whether `type(component) in` some types, and is called on `type(pipe)`. Diffusers' hooks look
    classes up in registries. Recipes and cache-dit keep their switches on `type(model)` and wrap its methods there.
    """

    def read(cls: type, name: str) -> Any:
        members = _members(cls)
        if name in members and name not in members[_SHOWN]:
            return getattr(members[_STOCK], name)
        return stock_metaclass.__getattribute__(cls, name)

    def write(cls: type, name: str, value: Any) -> None:
        if _MADE not in _members(cls):
            stock_metaclass.__setattr__(cls, name, value)
            return
        stock = _stock_of(cls)
        if value is not _members(cls).get(name):
            _replaced.setdefault(stock, {}).setdefault(name, _members(stock).get(name, _ABSENT))
            setattr(stock, name, value)
        # What reads `cls.__dict__` to put it back later, as `unittest.mock` does, finds our own member there.
        elif (before := _replaced.get(stock, {}).pop(name, None)) is _ABSENT:
            delattr(stock, name)
        elif before is not None:
            setattr(stock, name, before)

    members = {
        "__eq__": lambda cls, other: _stock_of(cls) is _stock_of(other),
        "__hash__": lambda cls: hash(_stock_of(cls)),
        "__call__": lambda cls, *args, **kwargs: _stock_of(cls)(*args, **kwargs),
        "__instancecheck__": lambda cls, obj: isinstance(obj, _stock_of(cls)),
        "__subclasscheck__": lambda cls, other: issubclass(other, _stock_of(cls)),
        "__getattribute__": read,
        "__setattr__": write,
        "__delattr__": lambda cls, name: delattr(_stock_of(cls), name),
    }
    return type(stock_metaclass.__name__, (stock_metaclass,), members)


def _set_wrapped(obj: Any, methods: frozenset[str]) -> None:
    stock = stock_class(obj)
    wanted = _seamed_class(stock, methods) if methods else stock
    if type(obj) is not wanted:
        obj.__class__ = wanted


def _seamed_class(stock: type, methods: frozenset[str]) -> type:
    """Return the one subclass for a stock class and set of methods: objects of one class stay so, as Dynamo guards."""
    key = (stock, methods)
    if key not in _seamed_classes:
        members = {_WRAPPED: methods, **{method: _wrapped_method(stock, method) for method in methods}}
        _seamed_classes[key] = disguised_subclass(stock, members)
    return _seamed_classes[key]


def _wrapped_method(stock: type, name: str) -> Any:
    static = inspect.getattr_static(stock, name)
    if isinstance(static, property):
        return _wrapped_property(stock, static, name)
    if isinstance(static, (staticmethod, classmethod)):
        raise AttributeError(f"{stock.__name__}.{name} is not an instance method, so it cannot be wrapped")

    @functools.wraps(getattr(stock, name))
    def through_the_chain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _chained(self, name, getattr(stock, name))(*args, **kwargs)

    return through_the_chain


def _wrapped_property(stock: type, static: property, name: str) -> property:
    def through_the_chain(self: Any) -> Any:
        return _chained(self, name, lambda owner: getattr(stock, name).__get__(owner))()

    return property(through_the_chain, static.fset, static.fdel, static.__doc__)


def _chained(owner: Any, name: str, stock_method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method as its middleware makes it."""
    call_next = functools.partial(stock_method, owner)
    for _, middleware in reversed(vars(owner).get(_CHAINS, {}).get(name, ())):
        call_next = functools.partial(middleware, call_next, owner)
    return call_next


def _reduce_as_stock(self: Any, protocol: Any) -> Any:
    """Pickle as the stock class, without middleware: what is loaded elsewhere, without pipeboost, is a stock object."""
    _, _, *rest = super(type(self), self).__reduce_ex__(protocol)
    if rest and isinstance(rest[0], dict):
        rest[0] = _without_ours(rest[0])
    # pickle lets `copyreg.__newobj__` name only the object's own class, so the older reconstructor names the stock one.
    return (copyreg._reconstructor, (stock_class(self), object, None), *rest)  # type: ignore[attr-defined]


def _copy(self: T) -> T:
    twin = copyreg.__newobj__(type(self))  # type: ignore[attr-defined]
    vars(twin).update(vars(self))
    chains = vars(self).get(_CHAINS)
    for name in vars(self).keys() & (chains.attached if chains is not None else ()):
        vars(twin)[name] = vars(self)[name].of_copy(twin)
    return twin


def _deepcopy(self: T, memo: dict[int, Any]) -> T:
    twin = copyreg.__newobj__(stock_class(self))  # type: ignore[attr-defined]
    memo[id(self)] = twin
    vars(twin).update(copy.deepcopy(_without_ours(vars(self)), memo))
    return twin


def _without_ours(attributes: dict[str, Any]) -> dict[str, Any]:
    chains = attributes.get(_CHAINS)
    ours = {_CHAINS, *chains.attached} if chains is not None else {_CHAINS}
    return {name: value for name, value in attributes.items() if name not in ours}
