"""The experiments behind the claims, on distributions whose truth is known: ``python -m experiments.paper NAME``.

Reading order: ``rows`` (what is compared), ``running`` (a small denoiser: trained, sampled), ``measuring`` (exact
errors), ``working`` (what one worker does), ``linear_gaussian`` (closed forms against the product), ``drawing``,
``figures`` and ``gallery`` (which figures an experiment has), ``results`` and ``tables`` (from rows to text),
``command`` (rows side by side, resumable).
"""
