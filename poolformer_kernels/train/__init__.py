"""Training as a product: `poolformer-kernels train`; each part is a module of its own.

`recipe` says what is trained and how, `data` what is read and in which order, `networks` makes the model,
`state` keeps checkpoints, `loop` runs the steps, `evaluation` measures a model, `report` shows a run.
"""
