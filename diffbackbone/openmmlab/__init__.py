"""MMEngine and the code bases on it.

Configs import :mod:`diffbackbone.mmseg`, :mod:`diffbackbone.mmdet` or
:mod:`diffbackbone.mmpretrain`, which check and repair the environment first. Everything is
registered at MMEngine's root, so that all of them find it.
"""
