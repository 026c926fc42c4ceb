"""flowjax: diffusion and flow matching in JAX, from pre-training to a one-step student.

Everything follows one equation, with t = 0 at the data and t = 1 at the noise:

    x_t = a(t) x + b(t) z          what the network sees        (flowjax.paths)
    y   = c(t) x + d(t) z          what the network predicts    (flowjax.predictions)

Importing the package imports nothing else; import the room you need.
"""

__version__ = "0.1.0"
