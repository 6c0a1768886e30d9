"""A page about runs: figures, curves, solves, samples and configurations in one HTML file.

`runs` reads run folders, whatever state they are in; `sections` says what there is to see of them,
one file per section, in terms of `blocks`; `charts` draws; `page` writes the HTML.
"""
