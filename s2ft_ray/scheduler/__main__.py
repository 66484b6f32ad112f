"""``python -m s2ft_ray.scheduler``: the scheduler of the cluster that RAY_ADDRESS names."""

from s2ft_ray.scheduler.actor import look_after_scheduler

if __name__ == "__main__":
    look_after_scheduler()
