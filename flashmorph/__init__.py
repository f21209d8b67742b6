"""Turn a pretrained Transformer into a hybrid attention model, and choose which layers keep full
attention."""
__version__ = "0.0.1"

# What is slow to import (plotly, datasets, kernels) is imported inside the functions that need it:
# `import flashmorph` stays light, which tests/test_rules.py checks. The import of
# `flashmorph.model.hybrid` registers the hybrid with transformers' Auto classes.
from flashmorph.choose import relaxed as _r, scores as _s, tuned as _t  # noqa: F401 (selectors)
from flashmorph.choose.gates import train_gates
from flashmorph.choose.rank import rank, register_selector
from flashmorph.choose.trajectory import GateRun
from flashmorph.choose.uniform import uniform
from flashmorph.data.mixture import Mixture
from flashmorph.data.needles import needles
from flashmorph.data.passkeys import passkeys
from flashmorph.data.text import text
from flashmorph.folder import Run
from flashmorph.measure.evaluate import evaluate
from flashmorph.measure.harness import lm_eval
from flashmorph.measure.plan import plan
from flashmorph.measure.ruler import ruler
from flashmorph.model.hybrid import HybridConfig, HybridForCausalLM
from flashmorph.measure.pace import lay_out
from flashmorph.model.mixers import Mixer, mixer_names, register_mixer
from flashmorph.model.morph import MorphableModel, morph
from flashmorph.model.teacher import load_model, load_teacher
from flashmorph.run.models import evaluate_models
from flashmorph.selection import Ranking, Selection
from flashmorph.serve import native as _native  # noqa: F401 (registers `gdn_native`)
from flashmorph.train.align import align
from flashmorph.train.distill import distill, finetune
from flashmorph.train.objective import Callback, FitConfig, FitResult
from flashmorph.train.tracking import Tracking

# Looked up when asked for, because they need ipywidgets and plotly: name -> module.
ON_DEMAND = {
    "BudgetExplorer": "flashmorph.show.explorer",
    "GateMonitor": "flashmorph.show.monitor",
    "RecallMap": "flashmorph.show.compare",
    "SelectionCompare": "flashmorph.show.compare",
}


def __getattr__(name: str):
    "The widgets, on demand."
    if name not in ON_DEMAND: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(ON_DEMAND[name]), name)


__all__ = [
    "BudgetExplorer", "Callback", "FitConfig", "FitResult", "GateMonitor", "GateRun",
    "HybridConfig", "HybridForCausalLM", "Mixer", "Mixture", "MorphableModel", "Ranking",
    "RecallMap", "Run", "Selection", "SelectionCompare", "Tracking", "align", "distill",
    "evaluate", "evaluate_models", "finetune", "lay_out", "lm_eval", "load_model",
    "load_teacher", "mixer_names", "morph", "needles", "passkeys", "plan", "rank",
    "register_mixer", "register_selector", "ruler", "text", "train_gates", "uniform",
]
