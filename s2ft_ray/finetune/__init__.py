"""The main job: a fine-tune that goes through the queue, by either of its two doors.

    main      the command line; from a configuration to a registered adapter, in stages
    inputs    what a run names, where it will still be found when it is started
    waiting   a driver whose job is queued: it waits, or follows, without torch
    attempt   a driver that has its workers: signs of life, the stop, the end

`ray job submit ... jobs/finetune.py --config F` enqueues itself and trains when it is admitted;
`s2ft submit` stores the job, and the scheduler starts `python -m s2ft_ray.finetune --job ID`.
"""
