"""vlmamba: train, compare and use vision-language models whose language model is Mamba.

Importing this package imports neither torch nor transformers; the parts do, where they need them:
`vlmamba.ssm`, `vlmamba.models`, `vlmamba.data`, `vlmamba.training`, `vlmamba.evaluation`.
"""

__version__ = "0.1.0"
