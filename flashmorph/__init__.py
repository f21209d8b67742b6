"Turn a pretrained Transformer into a hybrid attention model, and choose which layers keep full attention."
__version__ = "0.0.1"

# Bound here and not on demand: some functions have the name of their module (`text`, `morph`, …), and a name that is only
# looked up when missing would be hidden by the module as soon as anything imports it. So what a chapter needs and is slow to
# import (plotly, datasets, kernels) is imported inside its functions; tests/test_house.py keeps watch.
# `flashmorph.hybrid` also registers the hybrid with transformers' Auto classes.
from flashmorph.align import align
from flashmorph.baselines import uniform
from flashmorph.distill import distill, finetune
from flashmorph.evaluate import evaluate
from flashmorph.fit import Callback, FitConfig, FitResult
from flashmorph.gates import GateRun, train_gates
from flashmorph.hybrid import HybridConfig, HybridForCausalLM
from flashmorph.mixers import Mixer, mixer_names, register_mixer
from flashmorph.morph import MorphableModel, morph
from flashmorph.retrieval import Mixture, passkeys
from flashmorph.select import Selection
from flashmorph.teacher import load_model, load_teacher
from flashmorph.text import text


def __getattr__(name: str):
    "The widgets, on demand: they need ipywidgets and plotly. No module has their names, so the trouble above cannot befall them."
    if name not in ("BudgetExplorer", "GateMonitor"): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashmorph import widgets
    return getattr(widgets, name)


__all__ = ["BudgetExplorer", "Callback", "FitConfig", "FitResult", "GateMonitor", "GateRun", "HybridConfig", "HybridForCausalLM", "Mixer",
           "Mixture", "MorphableModel", "Selection", "align", "distill", "evaluate", "finetune", "load_model", "load_teacher", "mixer_names",
           "morph", "passkeys", "register_mixer", "text", "train_gates", "uniform"]
