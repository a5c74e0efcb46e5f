"""The methods of the suite. A new one is a module (or a folder) here and one line in METHODS.

A method module registers its classes in Detectron2's registries when imported and declares its config keys in
`add_config(cfg)`. It may also have `complete_config(cfg)`, where its classes stand in for those of a network file,
`setting_faults(cfg)` and `idle_keys(cfg)`. Methods do not know each other.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from fsdet.methods import defrcn, fewx, os2d, tfa

METHODS = (defrcn, fewx, os2d, tfa)


def add_method_configs(cfg: CfgNode) -> None:
    """Declare the config keys of every method; call it on a copy of Detectron2's defaults."""
    for method in METHODS:
        method.add_config(cfg)


def complete_method_configs(cfg: CfgNode) -> None:
    """Let the methods fit the merged configuration to its network; call it once, before anything is derived."""
    for method in METHODS:
        complete = getattr(method, "complete_config", None)
        if complete is not None:
            complete(cfg)


def method_faults(cfg: CfgNode) -> list[str]:
    """One line for each value of a method's keys that cannot be."""
    return [fault for method in METHODS for fault in getattr(method, "setting_faults", lambda cfg: [])(cfg)]


def idle_method_keys(cfg: CfgNode) -> list[str]:
    """Keys of methods that change no result of this configuration, dotted; a node stands for all that is in it."""
    return [key for method in METHODS for key in getattr(method, "idle_keys", lambda cfg: [])(cfg)]
