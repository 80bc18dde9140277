"""vlmamba checkpoints inside other evaluation harnesses, which stay unmodified.

    `lmms_eval`    found by lmms-eval through the entry point group ``lmms_eval.models``
    `vlmevalkit`   a launcher around VLMEvalKit's ``run.py``
    `openai_server` a checkpoint behind OpenAI's chat-completions interface
    `asking`       what all use: a checkpoint that answers chat messages

Importing this package imports none of them.
"""
