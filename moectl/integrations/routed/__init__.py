"""Models of transformers with a router of `moectl.routers` in the place of their own, and checkpoints of them.

A family's class holds the router that its authors chose and no other. What another router computes is saved as a
*research checkpoint*: its config.json has the model_type "moectl_routed", which transformers refuses, names the router,
and has the family's config inside. After `import moectl.integrations.transformers` it loads as any other.
"""
