"""MMEngine and the code bases on it; configs import them by ``diffbackbone.mmseg`` and others."""
