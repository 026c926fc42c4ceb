"""Data: from files of any kind to an exactly resumable stream of batches.

    prepare.py   doors: npz, idx, folders of images, TFDS  ->  records (tools/prepare_data.py is its command line)
    records.py   the native format: ArrayRecord shards of msgpack examples beside a manifest.json
    images.py    decode, convert, resize, pad: the only place that touches pixels with Pillow
    digits.py    scikit-learn's 8x8 digits as a TFDS data set; needs no network
    toys.py      endless 2-D mixtures
    counter.py   random bits, and shuffled orders, that are functions of a position
    sources.py   name -> random access to examples
    filters.py   what is left out of a data set
    text.py      captions -> token ids
    pipeline.py  sources -> batches
    latents.py   images and captions through frozen encoders, once  ->  records (tools/encode_latents.py is its command line)
"""
