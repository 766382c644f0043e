"""The paper's experiments, on distributions whose truth is known and on images: ``python -m experiments.paper NAME``.

Reading order: ``toy_grid`` (what is compared), ``worlds`` (distributions), ``toy_training`` (a small denoiser: trained,
sampled), ``errors`` (exact errors), ``worker`` (what one process does), ``linear`` and ``linear_gaussian`` (closed
forms, and the package held against them), ``plots``, ``figures`` and ``plot_set`` (which figures an experiment has),
``results`` and ``tables`` (from rows to text), ``command`` (rows side by side, resumable). Of images the same:
``image_grid_spec``, ``image_rows``, ``image_folder``, ``image_grid``, ``image_figures``.

Needs the extra `experiments` (POT, matplotlib).
"""
