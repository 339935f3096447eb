"""How long things take: seconds of a step or a transfer, predicted, with how far off the prediction may be.

    shape + device -> roofline --+
    tables measured by NVIDIA ---+--> prior --> online fit, overridden by what the worker itself measures
    `penstock profile` ----------+

`steps` says what a step is made of, `transfers` a transfer; `fit` learns what each part costs.
"""
