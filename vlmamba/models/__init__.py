"""Models: encoders, connectors, language models, and the vision-language model made of them.

Importing this package registers vlmamba with transformers' Auto classes (`AutoConfig`,
`AutoModelForImageTextToText`, `AutoProcessor`, `AutoImageProcessor`).
"""
