"""Who may use the service, and how much of it: tenants, their limits, their API keys.

    tenants   a tenant's claims and limits
    keys      API keys: made once, kept as hashes, checked in constant time
    roots     where a tenant's data may lie
    accounts  both in the database

Invariant: a key's secret is shown to whoever creates it, and is nowhere afterwards.
"""

from s2ft_ray.accounts.accounts import Accounts
from s2ft_ray.accounts.keys import ApiKey, NewKey, Principal
from s2ft_ray.accounts.roots import is_inside
from s2ft_ray.accounts.tenants import Tenant

__all__ = ["Accounts", "ApiKey", "NewKey", "Principal", "Tenant", "is_inside"]
