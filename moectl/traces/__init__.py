"""Who went where: the RoutingTrace, its statistics and its metrics, as data and pure functions of it."""
