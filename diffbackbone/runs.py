"""Former home of helpers that are in ``diffbackbone.utils`` now."""

from diffbackbone.utils import atomic_write as write_whole
from diffbackbone.utils import first_not_finite, lost_loss, seed_everything

__all__ = ["first_not_finite", "lost_loss", "seed_everything", "write_whole"]
