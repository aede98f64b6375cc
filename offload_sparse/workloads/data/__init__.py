"""Images to batches.

``source`` resolves a dataset's name to its splits (``folder`` and ``parquet`` read them, ``labels`` numbers
their classes), ``images`` decodes them (by ``decode``; ``cache`` keeps what it gives), ``corrupt`` counts
those that cannot be decoded, ``order`` says which images a step reads, ``augmentation`` changes them,
``loader`` makes batches of them and ``normalise`` turns those into floats on the device. Everything random is
a function of (seed, epoch, step or image index) alone: nothing to save, nothing to restore.
"""
