"""Evaluation: distances between image sets, class agreement, memorisation, and the record that makes them comparable.

evaluate.py     generated images + real splits -> a dict of measurements (METRICS lists them)
protocol.py     the record of sampler, guidance, labels, references ... that is stored with every number
frechet, kid, prdc, memorisation      statistics of features: numpy float64 on the host, no framework
features.py     the networks that make features; agreement.py: the independent judge of classes; image.py: 8-bit rule, PSNR, SSIM
processes.py    of several processes, who looks at what, and how it is put together
"""
