"Turn a pretrained Transformer into a hybrid attention model, and choose which layers keep full attention."
__version__ = "0.0.1"

# Bound here and not on demand: some functions have the name of their module (`text`, `morph`, …), and a name that is only
# looked up when missing would be hidden by the module as soon as anything imports it. So what a chapter needs and is slow to
# import (plotly, datasets, kernels) is imported inside its functions; tests/test_house.py keeps watch.
from flashmorph.text import text

__all__ = ["text"]
