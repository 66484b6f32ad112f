"""Prints the id of a node on which a training worker runs."""

import ray
from ray.util.state import list_actors

ray.init(log_to_driver=False)
workers = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
print(max(worker.node_id for worker in workers))
