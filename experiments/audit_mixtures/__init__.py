"""How right the audit is on folders as people have them: every kind of damage at once, of any strength.

    python -m experiments.audit_mixtures --data PHOTOS --data MORE --scale full --workers 2 --output mixtures.json

Sets are photographs (``--data``, repeatable) and drawn pictures (``experiments.picture_sets``, so that it runs without
any data), of 32, 64 and 128 pixels, in colour and grey, 5 to 90 % of them damaged by ``damages.py``: kinds that the
audit simulates, made by other means, and, in :data:`sets.FOREIGN` of the damaged images, kinds that it does not. Then
clean sets alone, two clean sets together, and one kind of damage alone.

What is in the output is not run again, so that the same command goes on after a stop. Beside the audit: a wavelet's
estimate of noise, with a threshold that was told the truth; and cleanvision where it is installed
(``pip install 'robustdiff[comparison]'``), as it comes.
"""
