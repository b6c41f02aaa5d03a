"""MMEngine and the code bases on it; configs import ``diffbackbone.mmseg``, ``.mmdet`` or ``.mmpretrain``."""
